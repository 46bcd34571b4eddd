"""Training data, read by position in an endless order: a dataset that is reshuffled each epoch, or a stream.

A position gives the same sample in every run and for any number of processes.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.cache import LatentSet
from cond_diffusion.data.dataset import (
    CaptionedBatch,
    CaptionedFiles,
    CaptionedImages,
    RandomDraws,
    open_captioned_files,
)
from cond_diffusion.data.sources import Examples
from cond_diffusion.data.stream import CaptionedStream
from cond_diffusion.seeding import permutation, sample_indices

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def identity_of(data: CaptionedImages | CaptionedFiles | LatentSet) -> dict[str, Any]:
    """Return what identifies a dataset: the numbers of images and of rows, and a hash of the captions."""
    digest = hashlib.blake2b(repr(data.caption_groups).encode(), digest_size=8)
    digest.update(data.group_of.numpy().tobytes())
    rows = {} if data.is_read is None else {"rows": len(data.is_read)}
    return {"pictures": len(data), "captions": digest.hexdigest(), **rows}


class ShuffledDataset:
    """A dataset in training order, without the samples that are held out for validation.

    A fixed permutation of the rows of the source splits the dataset, because sources are often sorted: its first
    entries are trained on, the others are held out. Rows that cannot be read do not change what the others are used
    for.

    Args:
        seed: Determines the order of training, not the split.
        held_out: Number of rows to hold out; at most a twentieth of the source.
    """

    state: Any = None  # only streams have one
    last_consumed_state: Any = None

    def __init__(self, data: CaptionedImages | CaptionedFiles | LatentSet, seed: int, held_out: int) -> None:
        self.data = data
        self.seed = seed
        self.num_images, self.size = len(data), f"{len(data)} images"
        self.is_in_memory = isinstance(data, CaptionedImages)  # reading requires no decoding
        is_read = data.is_read
        total = len(data) if is_read is None else len(is_read)
        order = permutation(total, "held-out")
        count = min(held_out, total // 20)
        trained_on, held_out_rows = order.split([total - count, count])
        if is_read is not None:  # from rows of the source to samples
            sample = is_read.cumsum(0) - 1
            trained_on, held_out_rows = (sample[rows[is_read[rows]]] for rows in (trained_on, held_out_rows))
        self._order = torch.cat([trained_on, held_out_rows])
        self.num_trained_on, self.num_held_out = len(trained_on), len(held_out_rows)
        self._identity = identity_of(data)
        if isinstance(data, CaptionedFiles):  # the check before a run reads them
            self.decoder, self.columns = data.decoder, data.columns

    def read(self, first: int, draws: RandomDraws) -> CaptionedBatch:
        """Return one sample per draw, from position `first` on."""
        numbers = sample_indices(self.num_trained_on, self.seed, first, len(draws.crop))
        return self._read(numbers, 0, self.num_trained_on, draws)

    def indices(self, first: int, count: int) -> Int64[Tensor, " count"]:
        """Return the dataset indices of the samples at positions first .. first + count - 1."""
        return self._order[sample_indices(self.num_trained_on, self.seed, first, count)]

    def held_out(self, count: int) -> CaptionedBatch | None:
        """Return `count` held-out samples, cropped at the center, repeated if there are fewer; None without any."""
        if not self.num_held_out:
            return None
        numbers = torch.arange(self.num_trained_on, len(self.data))[:count]
        draws = RandomDraws.fixed(len(numbers))
        return self._read(numbers, self.num_trained_on, len(self.data), draws).repeated(count)

    def held_out_indices(self) -> Int64[Tensor, " n"]:
        """Return the dataset indices of the held-out samples."""
        return self._order[self.num_trained_on :]

    def _read(self, numbers: Int64[Tensor, " b"], start: int, stop: int, draws: RandomDraws) -> CaptionedBatch:
        """Read entries of the split permutation; an unreadable one is replaced by the next in [start, stop)."""
        return self.data.read(lambda attempt: self._order[start + (numbers - start + attempt) % (stop - start)], draws)

    def captions(self) -> list[str] | None:
        """Return the distinct captions, preceded by the empty one."""
        return list(dict.fromkeys(["", *(caption for group in self.data.caption_groups for caption in group)]))

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint stores about the data; the position follows from the step."""
        return {"data": self.identity()}

    def sample_names(self, first: int, count: int) -> str:
        """Return the dataset indices of the samples at positions first .. first + count - 1, as text."""
        return str(self.indices(first, count).tolist())

    def in_memory(self) -> CaptionedImages:
        """Return the whole dataset in memory, including held-out samples."""
        assert not isinstance(self.data, LatentSet)
        return self.data.in_memory()

    def identity(self) -> dict[str, Any]:
        """Return what identifies the dataset; see `identity_of`."""
        return self._identity

    def resume(self, progress: dict[str, Any], position: int, *, same: bool) -> None:
        """Do nothing; a stream goes to its saved state here."""


TrainingData = ShuffledDataset | CaptionedStream


def open_training_data(config: DataConfig, seed: int, dataset: Examples | None = None) -> TrainingData:
    """Open the training data: as a stream if `config.streaming`, otherwise in memory if it fits.

    Args:
        dataset: Used instead of `config.source`; see `as_table`.
    """
    if config.streaming and dataset is None:
        return CaptionedStream(config, seed)
    files = open_captioned_files(config, dataset=dataset)
    data = files.in_memory() if files.fits_into_memory() else files
    if len(data) == 1:
        logger.warning("data.source: %s contains a single image; the model will memorize it", config.source)
    return ShuffledDataset(data, seed, config.held_out)


def prefetch(jobs: Iterable[Callable[[], Result]], depth: int) -> Iterator[Result]:
    """Yield the results of `jobs` in order, computed by a thread that is up to `depth` jobs ahead."""
    if depth == 0:
        yield from (job() for job in jobs)
        return
    thread = ThreadPoolExecutor(1, "reading")
    try:
        pending: deque[Future[Result]] = deque()
        for job in jobs:
            pending.append(thread.submit(job))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
