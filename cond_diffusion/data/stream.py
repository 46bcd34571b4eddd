"""Captioned images that are read from front to back, as they come: from a hub, or from files too large to copy.

A stream is shuffled twice: its shards (files) among themselves, and, in blocks of `shuffle_buffer` rows, what lies next
to each other. The order is a function of (seed, epoch) and of the files alone. A block, unlike a buffer that is drawn
from and filled up again, has a beginning: there `datasets` tells where in its file it stands, and a resumed run reads
on from there.

Every process reads the whole stream and decodes its own share of it, so the order does not depend on how many there
are.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import datasets
import torch

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.dataset import (
    CaptionedBatch,
    CaptionedImages,
    Decoder,
    EncodedImage,
    RandomDraws,
    decode_all,
    load_captioned_images,
    select_image_column,
)
from cond_diffusion.data.sources import caption_reader, open_source
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.seeding import permute_indices

Row = dict[str, Any]
State = dict[str, Any]
"""Where a block begins: its epoch and number, its first row's position in the endless order, its place in the epoch's
shards and, as `datasets` tells it, inside that shard. JSON can hold it."""

BEGINNING: State = {"epoch": 0, "block": 0, "position": 0, "shard": 0, "inside": None}
MOST_HELD_OUT = 64  # rows: they are read before the first step, and twenty times as many to see that they are few


class CaptionedStream:
    """The rows of a streamed source, epoch after epoch, by their position.

    state: the beginning of the block that is being read. last_consumed_state: of that which was trained on last; a
    caller that reads ahead says so by `consumed`.

    Raises UserError where the source, a column or a template does not fit, naming the key and what is there instead.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config = config = config.with_captions()
        self.seed = seed
        table = cast(datasets.IterableDataset, open_source(config.source, "train", streaming=True))
        self.table: datasets.IterableDataset = select_image_column(table, config)
        self.columns = table.column_names or list(next(iter(table), {}))
        self.captions_of = caption_reader(config, (table.features or {}).get(config.caption_column))
        self.decoder = Decoder(config, None)
        wanted = min(config.held_out, MOST_HELD_OUT)
        reader = _Reader(self, order=[0], shard=0, inside=None, skipped=0)
        rows = reader.take(wanted)
        count = len(rows) + sum(len(reader.take(1)) for _ in range(19 * wanted))
        self.held_out_rows = rows[: count // 20]
        self.go_to(BEGINNING)

    def go_to(self, state: State) -> None:
        """Begin with the block whose `state` is given."""
        self.state = self.last_consumed_state = state
        self.position = state["position"]
        self._turns = self._endless(state)

    is_in_memory = False
    num_images = None  # unknown

    def held_out_indices(self) -> None:
        """Return None: the rows of a stream have no numbers."""

    def in_memory(self) -> CaptionedImages:
        """Open the source a second time, not as a stream, and load all of it."""
        return load_captioned_images(self.config)

    def captions(self) -> None:
        """Return None: the captions of a stream are not known in advance."""

    def sample_names(self, first: int, count: int) -> str:
        """Name the samples at positions first .. first + count - 1."""
        return f"the stream's {first} to {first + count - 1}"

    def consumed(self, state: State) -> None:
        """Note the state that the samples were read in which were trained on last."""
        self.last_consumed_state = state

    def progress(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on behind the last batch that was trained on."""
        return {"data": self.identity(), "stream": self.last_consumed_state}

    def identity(self) -> dict[str, Any]:
        """Return what tells one stream from another, as far as that can be known before it is read."""
        return {
            "source": self.config.source,
            "shards": self.table.num_shards,
            "shuffle_buffer": self.config.shuffle_buffer,
            "held_out": len(self.held_out_rows),
        }

    def resume(self, progress: dict[str, Any], position: int, *, same: bool) -> None:
        """Go to where `progress` was made; to the beginning, counted as `position`, if the data are no longer the
        same.
        """
        self.go_to(progress["stream"] if same else {**BEGINNING, "position": position})

    def read(self, first: int, draws: RandomDraws) -> CaptionedBatch:
        """Decode the samples from position `first` on, which must not lie behind what was read already; where one
        cannot be read, the next one in its block that can. UserError if those are too many.
        """
        assert first >= self.position
        for _ in range(first - self.position):
            self._next()
        rows = [self._next() for _ in range(len(draws.crop))]
        return self._decoded(rows, f"the stream's row {first} + %d, counted from 0", draws)

    def held_out(self, draws: RandomDraws) -> CaptionedBatch | None:
        """Return rows that are not trained on, as many as there are places, again and again if they are fewer."""
        if not self.held_out_rows:
            return None
        rows = [_BlockRow(self.held_out_rows, i) for i in range(min(len(draws.crop), len(self.held_out_rows)))]
        few = RandomDraws(draws.caption[: len(rows)], draws.crop[: len(rows)])
        return self._decoded(rows, "held-out row %d, counted from 0", few).repeated(len(draws.crop))

    def _decoded(self, turns: list["_BlockRow"], name: str, draws: RandomDraws) -> CaptionedBatch:
        def images_of(numbers: list[int], attempt: int) -> list[EncodedImage]:
            if attempt > min(len(turns[i].block) for i in numbers):
                raise UserError(f"{self.decoder.where}: a whole block of the stream cannot be read")
            rows = [turns[i].row(attempt) for i in numbers]
            names = [name % i + (f", or {attempt} behind it" if attempt else "") for i in numbers]
            return [EncodedImage(r[self.config.image_column], n) for r, n in zip(rows, names, strict=True)]

        pixels, attempts = decode_all(self.decoder, len(turns), images_of, draws.crop.tolist())
        rows = [turn.row(attempt) for turn, attempt in zip(turns, attempts, strict=True)]
        return CaptionedBatch.of(pixels, [self.captions_of(row[self.config.caption_column]) for row in rows], draws)

    def _next(self) -> "_BlockRow":
        self.position += 1
        return next(self._turns)

    def _endless(self, state: State) -> Iterator["_BlockRow"]:
        """Yield the rows from the beginning of a block on, each block shuffled; keep the state of the one at hand."""
        while True:
            epoch = state["epoch"]
            shards = permute_indices(
                torch.arange(self.table.num_shards), self.table.num_shards, "shards", self.seed, epoch
            )
            reader = _Reader(self, shards.tolist(), state["shard"], state["inside"], skipped=len(self.held_out_rows))
            while block := reader.take(self.config.shuffle_buffer):
                self.state = state
                order = permute_indices(torch.arange(len(block)), len(block), "block", self.seed, epoch, state["block"])
                shuffled = [block[i] for i in order.tolist()]
                yield from (_BlockRow(shuffled, i) for i in range(len(block)))
                following = {"block": state["block"] + 1, "position": state["position"] + len(block)}
                state = {**state, **following, **reader.place()}
            if state["block"] == 0:
                raise UserError(f"data.source: {self.config.source} holds no examples; expected at least one picture")
            state = {**state, "epoch": epoch + 1, "block": 0, "shard": 0, "inside": None}


@dataclass(frozen=True)
class _BlockRow:
    """The row that a block shows at a place."""

    block: list[Row]
    place: int

    def row(self, attempt: int) -> Row:
        """Return it, or the one so many behind it."""
        return self.block[(self.place + attempt) % len(self.block)]


class _Reader:
    """Reads the shards of a stream in the given order, and knows where it stands.

    skipped: how many rows at the beginning of the very first shard are left out.
    """

    def __init__(
        self, stream: CaptionedStream, order: list[int], shard: int, inside: dict[str, Any] | None, *, skipped: int
    ) -> None:
        self.source, self.table = stream.config.source, stream.table
        self.order = order
        self.skipped = skipped
        self._open(shard, inside)

    def place(self) -> dict[str, Any]:
        """Return what the constructor needs to read on from here."""
        return {"shard": self.shard, "inside": self.rows_of_shard.state_dict() if self.begun else None}

    def take(self, count: int) -> list[Row]:
        """Read `count` rows, or what is left."""
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
        self.shard, self.begun = shard, False
        if shard == len(self.order):
            return
        number = self.order[shard]
        self.rows_of_shard = self.table.shard(self.table.num_shards, number)
        if inside is not None:
            self.rows_of_shard.load_state_dict(inside)
            self.begun = True
        self.rows: Iterator[Row] = iter(self.rows_of_shard)
        if inside is None and number == 0:
            for _ in range(self.skipped):
                self._read()
                self.begun = True

    def _read(self) -> Row | None:
        try:
            return next(self.rows, None)
        # What it is that cannot be read depends on the format and on where it comes from.
        except (OSError, ValueError, TypeError, NotImplementedError, tarfile.TarError) as error:
            raise UserError(f"data.source: cannot read {self.source}: {first_line(error)}") from error
