"""What training reads, by its position in an endless order: a set, shuffled anew each epoch, or a stream.

Reading a position gives the same sample in every run, on any number of processes.
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
from cond_diffusion.data.dataset import CaptionedBatch, CaptionedFiles, CaptionedImages, Places, open_captioned_files
from cond_diffusion.data.latent_set import LatentSet
from cond_diffusion.data.stream import CaptionedStream
from cond_diffusion.seeding import permute_indices, sample_indices

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class ShuffledSet:
    """A set in the order of training, but for the samples that are held out."""

    def __init__(self, data: CaptionedImages | CaptionedFiles | LatentSet, seed: int, held_out: int) -> None:
        self.data = data
        self.seed = seed
        self.num_held_out = min(held_out, len(data) // 20)
        self.num_trained_on = len(data) - self.num_held_out
        digest = hashlib.blake2b(repr(data.caption_groups).encode(), digest_size=8)
        digest.update(data.group_of.numpy().tobytes())
        self._digest = digest.hexdigest()

    def read(self, first: int, places: Places) -> CaptionedBatch:
        """Return the samples from position `first` on."""
        numbers = sample_indices(self.num_trained_on, self.seed, first, len(places.crop))
        return self._read(numbers, 0, self.num_trained_on, places)

    def indices(self, first: int, count: int) -> Int64[Tensor, " count"]:
        """Return which samples stand at positions first .. first + count - 1."""
        return self._of(sample_indices(self.num_trained_on, self.seed, first, count))

    def held_out(self, places: Places) -> CaptionedBatch | None:
        """Return samples that are not trained on, as many as there are places, again and again if they are fewer."""
        if not self.num_held_out:
            return None
        numbers = torch.arange(self.num_trained_on, len(self.data))[: len(places.crop)]
        few = Places(places.caption[: len(numbers)], places.crop[: len(numbers)])
        return self._read(numbers, self.num_trained_on, len(self.data), few).repeated(len(places.crop))

    def held_out_indices(self) -> Int64[Tensor, " n"]:
        """Return which samples are not trained on."""
        return self._of(torch.arange(self.num_trained_on, len(self.data)))

    def _read(self, numbers: Int64[Tensor, " b"], first: int, stop: int, places: Places) -> CaptionedBatch:
        """Return samples by their numbers; where one cannot be read, of those from `first` to `stop` the next."""
        return self.data.read(lambda attempt: self._of(first + (numbers - first + attempt) % (stop - first)), places)

    def captions(self) -> list[str]:
        """Return each caption once, and the empty one."""
        return list(dict.fromkeys(["", *(caption for group in self.data.caption_groups for caption in group)]))

    def progress(self) -> dict[str, Any]:
        """Return what a resumed run wants to know of the data; the step tells the position."""
        return {"data": self.identity()}

    def identity(self) -> dict[str, Any]:
        """Return what tells one set from another, as far as counts and captions do."""
        return {"pictures": len(self.data), "captions": self._digest}

    def resume(self, progress: dict[str, Any], position: int, *, same: bool) -> None:
        """Do nothing: any position can be read at any time."""

    def _of(self, numbers: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return the samples of these numbers, the last ones being held out; sources are often sorted."""
        return permute_indices(numbers, len(self.data), "held-out")


Feed = ShuffledSet | CaptionedStream


def open_feed(config: DataConfig, seed: int, *, aloud: bool) -> Feed:
    """Open the source of `config`: as a stream where it says so, else in memory where it fits."""
    if config.streaming:
        return CaptionedStream(config, seed, aloud=aloud)
    files = open_captioned_files(config, aloud=aloud)
    data = files.in_memory(progress=aloud) if files.fits_into_memory() else files
    if len(data) == 1 and aloud:
        logger.warning("data.source: %s holds one picture; it will be learned by heart", config.source)
    return ShuffledSet(data, seed, config.held_out)


def ahead(jobs: Iterable[Callable[[], Result]], depth: int) -> Iterator[Result]:
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
