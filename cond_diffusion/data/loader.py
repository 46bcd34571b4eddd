"""What training reads, by its position in an endless order: a set, shuffled anew each epoch, or a stream.

Reading a position gives the same sample in every run, on any number of processes.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import datasets
import torch
from jaxtyping import Int64
from torch import Tensor

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.cache import LatentSet
from cond_diffusion.data.dataset import (
    CaptionedBatch,
    CaptionedFiles,
    CaptionedImages,
    Decoder,
    RandomDraws,
    open_captioned_files,
)
from cond_diffusion.data.stream import CaptionedStream
from cond_diffusion.seeding import permute_indices, sample_indices

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class ShuffledDataset:
    """A set in the order of training, but for the samples that are held out."""

    def __init__(self, data: CaptionedImages | CaptionedFiles | LatentSet, seed: int, held_out: int) -> None:
        self.data = data
        self.seed = seed
        self.num_held_out = min(held_out, len(data) // 20)
        self.num_trained_on = len(data) - self.num_held_out
        digest = hashlib.blake2b(repr(data.caption_groups).encode(), digest_size=8)
        digest.update(data.group_of.numpy().tobytes())
        self._digest = digest.hexdigest()

    def read(self, first: int, draws: RandomDraws) -> CaptionedBatch:
        """Return the samples from position `first` on."""
        numbers = sample_indices(self.num_trained_on, self.seed, first, len(draws.crop))
        return self._read(numbers, 0, self.num_trained_on, draws)

    def indices(self, first: int, count: int) -> Int64[Tensor, " count"]:
        """Return which samples stand at positions first .. first + count - 1."""
        return self._of(sample_indices(self.num_trained_on, self.seed, first, count))

    def held_out(self, draws: RandomDraws) -> CaptionedBatch | None:
        """Return samples that are not trained on, as many as there are places, again and again if they are fewer."""
        if not self.num_held_out:
            return None
        numbers = torch.arange(self.num_trained_on, len(self.data))[: len(draws.crop)]
        few = RandomDraws(draws.caption[: len(numbers)], draws.crop[: len(numbers)])
        return self._read(numbers, self.num_trained_on, len(self.data), few).repeated(len(draws.crop))

    def held_out_indices(self) -> Int64[Tensor, " n"]:
        """Return which samples are not trained on."""
        return self._of(torch.arange(self.num_trained_on, len(self.data)))

    def _read(self, numbers: Int64[Tensor, " b"], first: int, stop: int, draws: RandomDraws) -> CaptionedBatch:
        """Return samples by their numbers; where one cannot be read, of those from `first` to `stop` the next."""
        return self.data.read(lambda attempt: self._of(first + (numbers - first + attempt) % (stop - first)), draws)

    def captions(self) -> list[str] | None:
        """Return each caption once, and the empty one."""
        return list(dict.fromkeys(["", *(caption for group in self.data.caption_groups for caption in group)]))

    def progress(self) -> dict[str, Any]:
        """Return what a resumed run wants to know of the data; the step tells the position."""
        return {"data": self.identity()}

    def sample_names(self, first: int, count: int) -> str:
        """Name the samples at positions first .. first + count - 1: their rows."""
        return str(self.indices(first, count).tolist())

    def in_memory(self) -> CaptionedImages:
        """Return the whole set, held-out images included, in memory."""
        assert not isinstance(self.data, LatentSet)
        return self.data.in_memory()

    @property
    def decoder(self) -> Decoder:
        """The decoder of a set of files."""
        assert isinstance(self.data, CaptionedFiles)
        return self.data.decoder

    @property
    def columns(self) -> list[str]:
        """The columns of a set of files."""
        assert isinstance(self.data, CaptionedFiles)
        return self.data.columns

    @property
    def num_images(self) -> int:
        return len(self.data)

    @property
    def is_in_memory(self) -> bool:
        """Whether reading needs no decoding."""
        return isinstance(self.data, CaptionedImages)

    state = None  # a set is read at any position, a stream from its state on

    def consumed(self, state: None) -> None:
        """Note that samples were trained on, which a set need not know."""

    def identity(self) -> dict[str, Any]:
        """Return what tells one set from another, as far as counts and captions do."""
        return {"pictures": len(self.data), "captions": self._digest}

    def resume(self, progress: dict[str, Any], position: int, *, same: bool) -> None:
        """Do nothing: any position can be read at any time."""

    def _of(self, numbers: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return the samples of these numbers, the last ones being held out; sources are often sorted."""
        return permute_indices(numbers, len(self.data), "held-out")


TrainingData = ShuffledDataset | CaptionedStream


def open_training_data(
    config: DataConfig, seed: int, dataset: datasets.Dataset | Sequence[Any] | None = None
) -> TrainingData:
    """Open the source of `config`, or a data set that a caller gave: as a stream where the config says so, else in
    memory where it fits.
    """
    if config.streaming and dataset is None:
        return CaptionedStream(config, seed)
    files = open_captioned_files(config, dataset=dataset)
    data = files.in_memory() if files.fits_into_memory() else files
    if len(data) == 1:
        logger.warning("data.source: %s contains a single image; the model will memorize it", config.source)
    return ShuffledDataset(data, seed, config.held_out)


def prefetch(jobs: Iterable[Callable[[], Result]], depth: int) -> Iterator[Result]:
    """Yield the results of `jobs`, one after the other, while a thread is up to `depth` of them ahead."""
    if depth == 0:
        yield from (job() for job in jobs)
        return
    thread = ThreadPoolExecutor(1, "reading")
    try:
        waiting: deque[Future[Result]] = deque()
        for job in jobs:
            waiting.append(thread.submit(job))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
