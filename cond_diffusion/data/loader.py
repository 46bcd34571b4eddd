"""Training data, read by position in an endless order: a dataset that is reshuffled each epoch, or a stream.

A position gives the same sample in every run and for any number of processes.

A stream is read sequentially, from the Hub or from files that are too large to copy. It is shuffled twice: the order of
its shards (files), and the rows within blocks of `shuffle_buffer` consecutive rows. The order is a function of (seed,
epoch) and the files only. Blocks, unlike a buffer that is refilled row by row, have a beginning: there `datasets` gives
the position in the file, from which a resumed run continues. Every process reads the whole stream and decodes its own
share.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
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
    EncodedImage,
    RandomDraws,
    decode_all,
    load_captioned_images,
    open_captioned_files,
    select_image_column,
)
from cond_diffusion.data.sources import CaptionGroup, Examples, caption_reader, open_source
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.seeding import permutation, sample_indices

Result = TypeVar("Result")
Row = dict[str, Any]
BlockRow = tuple[list[Row], int]
"""A block, and the index of the row in it."""
State = dict[str, Any]
"""Where a block begins, as JSON: its epoch, its number in the epoch, the position of its first row in the endless
order, the index of its shard in the epoch's order, and the state of `datasets` inside that shard."""

BEGINNING: State = {"epoch": 0, "block": 0, "position": 0, "shard": 0, "inside": None}
MAX_HELD_OUT = 64  # rows; twenty times as many are read before the first step to check that they are at most 5 %

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


class CaptionedStream:
    """The rows of a streamed source by position, epoch after epoch.

    Attributes:
        state: The beginning of the current block.
        last_consumed_state: The beginning of the block that was trained on last; set by the caller, which may prefetch.
    """

    is_in_memory = False
    num_images = None  # unknown
    size = "a stream"

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config = config = config.with_captions()
        self.seed = seed
        columns = (config.image_column, config.caption_column)
        opened: Any = open_source(config.source, "train", streaming=True, columns=columns)
        with user_errors(f"data.source: cannot read {config.source}", Exception):  # of a kind for each format
            # The features of CSV files are unknown before a row is read. Only images of one column are decoded, here.
            table = opened._resolve_features().decode(False)
        self.table: datasets.IterableDataset = select_image_column(table, config)
        self.columns = table.column_names
        self.captions_of = caption_reader(config, table.features[config.caption_column])
        self.decoder = Decoder(config, None)
        requested = min(config.held_out, MAX_HELD_OUT)
        reader = _Reader(self, order=[0], shard=0, inside=None, skipped=0)
        rows = reader.take(requested)
        count = len(rows) + sum(len(reader.take(1)) for _ in range(19 * requested))
        self.held_out_rows = rows[: count // 20]
        self.go_to(BEGINNING)

    def go_to(self, state: State) -> None:
        """Continue with the block of the given state."""
        self.state = self.last_consumed_state = state
        self.position = state["position"]
        self._rows = self._endless(state)

    def held_out_indices(self) -> None:
        """Return None: the rows of a stream have no indices."""

    def in_memory(self) -> CaptionedImages:
        """Load the whole source into memory; opens it again, without streaming."""
        return load_captioned_images(self.config)

    def captions(self) -> None:
        """Return None: the captions of a stream are not known in advance."""

    def sample_names(self, first: int, count: int) -> str:
        """Return a name for the samples at positions first .. first + count - 1."""
        return f"stream positions {first} to {first + count - 1}"

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint stores to resume after the last batch that was trained on."""
        return {"data": self.identity(), "stream": self.last_consumed_state}

    def identity(self) -> dict[str, Any]:
        """Return what identifies the stream, as far as it is known before reading."""
        return {
            "source": self.config.source,
            "shards": self.table.num_shards,
            "shuffle_buffer": self.config.shuffle_buffer,
            "held_out": len(self.held_out_rows),
        }

    def resume(self, progress: dict[str, Any], position: int, *, same: bool) -> None:
        """Go to the state in `progress`, or, if the data changed, to the beginning, counted as `position`."""
        self.go_to(progress["stream"] if same else {**BEGINNING, "position": position})

    def read(self, first: int, draws: RandomDraws) -> CaptionedBatch:
        """Decode one row per draw, from position `first` on, which must not be before rows that were already read.

        An unreadable image is replaced by the next readable one in its block.
        """
        assert first >= self.position
        skipped, self.position = first - self.position, first + len(draws.crop)
        rows = list(islice(self._rows, skipped, skipped + len(draws.crop)))
        return self._decoded(rows, f"stream row {first} + %d", draws)

    def held_out(self, count: int) -> CaptionedBatch | None:
        """Return `count` held-out rows, cropped at the center, repeated if there are fewer; None without any."""
        if not self.held_out_rows:
            return None
        rows = [(self.held_out_rows, i) for i in range(min(count, len(self.held_out_rows)))]
        return self._decoded(rows, "held-out row %d", RandomDraws.fixed(len(rows))).repeated(count)

    def _decoded(self, block_rows: list[BlockRow], name: str, draws: RandomDraws) -> CaptionedBatch:
        groups: list[CaptionGroup] = [()] * len(block_rows)

        def fetch(positions: list[int], attempt: int) -> list[EncodedImage]:
            if attempt > min(len(block_rows[i][0]) for i in positions):
                raise UserError(f"{self.decoder.where}: no image of a whole block of the stream can be read")
            suffix = f" (0-based), replacement {attempt}" if attempt else " (0-based)"
            encoded = []
            for i in positions:
                block, index = block_rows[i]
                row, problem = block[(index + attempt) % len(block)], None
                try:
                    groups[i] = self.captions_of(row[self.config.caption_column])
                except UserError as error:
                    problem = str(error)
                encoded.append(EncodedImage(row[self.config.image_column], name % i + suffix, problem))
            return encoded

        pixels = decode_all(self.decoder, fetch, draws.crop.tolist())
        return CaptionedBatch.of(pixels, groups, draws)

    def _endless(self, state: State) -> Iterator[BlockRow]:
        """Yield rows from the beginning of a block on, each block shuffled; keep `self.state` at the current block."""
        while True:
            epoch, num_shards = state["epoch"], self.table.num_shards
            shards = permutation(num_shards, "shards", self.seed, epoch)
            reader = _Reader(self, shards.tolist(), state["shard"], state["inside"], skipped=len(self.held_out_rows))
            while block := reader.take(self.config.shuffle_buffer):
                self.state = state
                order = permutation(len(block), "block", self.seed, epoch, state["block"])
                shuffled = [block[i] for i in order.tolist()]
                yield from ((shuffled, i) for i in range(len(block)))
                following = {"block": state["block"] + 1, "position": state["position"] + len(block)}
                state = {**state, **following, **reader.place()}
            if state["block"] == 0:
                raise UserError(f"data.source: {self.config.source} is empty; expected at least one image")
            state = {**state, "epoch": epoch + 1, "block": 0, "shard": 0, "inside": None}


class _Reader:
    """Reads the shards of a stream in the given order, without the first `skipped` rows of shard 0."""

    def __init__(
        self, stream: CaptionedStream, order: list[int], shard: int, inside: dict[str, Any] | None, *, skipped: int
    ) -> None:
        self.source, self.table = stream.config.source, stream.table
        self.order = order
        self.skipped = skipped
        self.last_name = ""  # of the last row that was read
        self._open(shard, inside)

    def place(self) -> dict[str, Any]:
        """Return the arguments with which a new reader continues from here."""
        return {"shard": self.shard, "inside": self.rows_of_shard.state_dict() if self.begun else None}

    def take(self, count: int) -> list[Row]:
        """Read `count` rows, or as many as are left."""
        rows: list[Row] = []
        while len(rows) < count and self.shard < len(self.order):
            row = self._read()
            if row is None:
                self._open(self.shard + 1, None)
            else:
                self.begun = True
                rows.append(row)
        return rows

    def _open(self, shard: int, inside: dict[str, Any] | None) -> None:
        self.shard, self.begun = shard, inside is not None
        if shard == len(self.order):
            return
        number = self.order[shard]
        self.rows_of_shard = self.table.shard(self.table.num_shards, number)
        if inside is not None:
            self.rows_of_shard.load_state_dict(inside)
        self.rows: Iterator[Row] = iter(self.rows_of_shard)
        if inside is None and number == 0:
            for _ in range(self.skipped):
                self._read()
                self.begun = True

    def _read(self) -> Row | None:
        # The types of exceptions depend on the format and on where the source is.
        with user_errors(f"data.source: cannot read {self.source}{self.last_name}", Exception):
            row = next(self.rows, None)
        if row is not None and "__key__" in row:  # of a tar file
            self.last_name = f" after {row['__url__']}: {row['__key__']}"
        return row


TrainingData = ShuffledDataset | CaptionedStream


def open_training_data(config: DataConfig, seed: int, dataset: Examples | None = None) -> TrainingData:
    """Open `dataset` (see `as_table`), or else the config's source: as a stream if it says so, otherwise in memory if
    it fits."""
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
