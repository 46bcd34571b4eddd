"""Captioned images that can be read in any order: held in memory, or decoded whenever they are asked for.

Every source goes through one path: `datasets` opens it, the configured columns are read, pictures are resized and
cropped to `resolution` x `resolution`. Captions are kept once each: an image belongs to one caption group.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.captions import CaptionGroup, caption_reader, chosen
from cond_diffusion.data.decoding import Cell, Decoder, Pixels, decode_all
from cond_diffusion.data.sources import open_source
from cond_diffusion.errors import UserError, did_you_mean, first_line

AT_ONCE = 256  # files that are in memory while a set is decoded

Candidates = Callable[[int], Int64[Tensor, " b"]]
"""attempt -> samples: those of attempt 0 are wanted, those of attempt 1 where these cannot be read, and so on."""


@dataclass(frozen=True)
class Places:
    """What chance says of each sample of a batch, as numbers from 0 to 1."""

    caption: Float[Tensor, " b"]
    crop: Float[Tensor, " b"]


@dataclass(frozen=True)
class CaptionedBatch:
    """Pictures with a caption each.

    images: in bytes; or x_0, where that has been computed already.
    """

    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]
    captions: list[str]

    @classmethod
    def of(cls, pictures: list[Pixels], groups: list[CaptionGroup], places: Places) -> "CaptionedBatch":
        """Put decoded pictures together, and choose their captions."""
        images = rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w").contiguous()
        return cls(images, chosen(groups, places.caption.tolist()))

    def repeated(self, count: int) -> "CaptionedBatch":
        """Return `count` of them: these, again and again."""
        numbers = torch.arange(count) % len(self.captions)
        return CaptionedBatch(self.images[numbers], [self.captions[i] for i in numbers.tolist()])


@dataclass(frozen=True)
class CaptionedImages:
    """A set in memory: images[i] is described by every caption in caption_groups[group_of[i]]."""

    images: UInt8[Tensor, "n c h w"]
    group_of: Int64[Tensor, " n"]
    caption_groups: tuple[CaptionGroup, ...]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, candidates: Candidates, places: Places) -> CaptionedBatch:
        """Gather the first candidates: those that could not be read are not in here."""
        indices = candidates(0)
        return CaptionedBatch(self.images[indices], self.captions_of(indices, places.caption))

    def captions_of(self, indices: Int64[Tensor, " b"], places: Float[Tensor, " b"]) -> list[str]:
        """Return one caption for each of the samples `indices`, out of its group."""
        groups = [self.caption_groups[group] for group in self.group_of[indices].tolist()]
        return chosen(groups, places.tolist())


class CaptionedFiles:
    """A set whose pictures are decoded anew each time: larger than memory, or cropped at another place each time.

    files: a table with the pictures' files in a column. columns: all that the source has.
    """

    def __init__(
        self,
        config: DataConfig,
        files: datasets.Dataset,
        group_of: Int64[Tensor, " n"],
        caption_groups: tuple[CaptionGroup, ...],
        *,
        columns: list[str],
    ) -> None:
        self.config = config
        self.columns = columns
        self.files = files
        self.group_of = group_of
        self.caption_groups = caption_groups
        self.decoder = Decoder(config, len(files))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, candidates: Candidates, places: Places) -> CaptionedBatch:
        """Decode samples, those of the next attempt where they cannot be read; UserError if those are too many."""
        rows = candidates(0).tolist()

        def cells_of(numbers: list[int], attempt: int) -> list[Cell]:
            if attempt:
                others = candidates(attempt).tolist()
                for i in numbers:
                    rows[i] = others[i]
            return self._cells([rows[i] for i in numbers])

        pixels, _ = decode_all(self.decoder, len(rows), cells_of, places.crop.tolist())
        groups = [self.caption_groups[group] for group in self.group_of[rows].tolist()]
        return CaptionedBatch.of(pixels, groups, places)

    def in_memory(self, *, progress: bool) -> CaptionedImages:
        """Decode all of them, once; raise UserError if too many cannot be read."""
        side = self.config.resolution
        decoded = np.empty((len(self), self.config.channels, side, side), dtype=np.uint8)
        read: list[int] = []
        starts = range(0, len(self), AT_ONCE)
        with tqdm(total=len(self), desc=f"reading {self.config.source}", disable=not progress, leave=False) as bar:
            for rows in (range(start, min(start + AT_ONCE, len(self))) for start in starts):
                pictures, of_these = self.decode(rows)
                self.decoder.check(aloud=progress)
                decoded[len(read) : len(read) + len(pictures)] = pictures
                read += of_these
                bar.update(len(rows))
        if not read:
            raise UserError(f"{self.decoder.where}: none of the {len(self)} pictures can be read")
        if progress:
            self.decoder.tell_enlarged()
        return CaptionedImages(torch.from_numpy(decoded[: len(read)]), self.group_of[read], self.caption_groups)

    def decode(self, rows: range) -> tuple[UInt8[np.ndarray, "b c h w"], list[int]]:
        """Return the pictures of those rows that can be read, cropped in the middle, and which rows these are."""
        decoded = zip(rows, self.decoder.decode(self._cells(list(rows)), [0.5] * len(rows)), strict=True)
        found = [(row, rearrange(pixels, "h w c -> c h w")) for row, pixels in decoded if pixels is not None]
        side = self.config.resolution
        images = np.empty((len(found), self.config.channels, side, side), dtype=np.uint8)
        for i, (_, pixels) in enumerate(found):
            images[i] = pixels
        return images, [row for row, _ in found]

    def fingerprint(self) -> str:
        """Return what tells these pictures from all others: what `datasets` does by, and of files that it only knows
        the names of, their sizes and when they were changed.
        """
        digest = hashlib.blake2b(self.files._fingerprint.encode(), digest_size=16)
        for chunk in self.files.data.column(self.config.image_column).chunks:
            elsewhere = chunk.filter(chunk.field("bytes").is_null())
            for path in elsewhere.field("path").to_pylist():
                state = Path(path).stat()
                digest.update(repr((path, state.st_size, state.st_mtime_ns)).encode())
        return digest.hexdigest()

    def _cells(self, rows: list[int]) -> list[Cell]:
        contents = self.files[rows][self.config.image_column]
        names = (f"row {row} of {len(self)}, counted from 0" for row in rows)
        return [Cell(content, name) for content, name in zip(contents, names, strict=True)]

    def fits_into_memory(self) -> bool:
        """Say whether the decoded pictures are to be held."""
        size = len(self) * self.config.channels * self.config.resolution**2
        return self.config.crop == "center" and size <= self.config.memory_gb * 1e9


def open_captioned_files(config: DataConfig, split: str = "train", *, aloud: bool = True) -> CaptionedFiles:
    """Open `config.source`, and read the captions of its `split`.

    Raises UserError where the source, a column or a template does not fit, naming the key and what is there instead.
    """
    config = config.with_captions()
    table = cast(datasets.Dataset, open_source(config.source, split, aloud=aloud))
    if len(table) == 0:
        raise UserError(f"data.source: {config.source} ({split}) holds no examples; expected at least one picture")
    files = files_of(table, config)
    captions_of = caption_reader(config, table.features[config.caption_column])
    group_numbers: dict[CaptionGroup, int] = {}
    group_of = []
    for row, cell in enumerate(_values(table.data.column(config.caption_column))):
        try:
            group_of.append(group_numbers.setdefault(captions_of(cell), len(group_numbers)))
        except UserError as error:
            raise UserError(f"{error} (row {row} of {len(table)}, counted from 0)") from error
    return CaptionedFiles(config, files, torch.tensor(group_of), tuple(group_numbers), columns=table.column_names)


def load_captioned_images(config: DataConfig, split: str = "train", *, progress: bool = True) -> CaptionedImages:
    """Open `config.source`, decode its `split` and hold it in memory, however large it is."""
    return open_captioned_files(config, split, aloud=progress).in_memory(progress=progress)


def files_of(table: Any, config: DataConfig) -> Any:
    """Return the column with the pictures of a table or a stream, undecoded; raise UserError where a column is missing
    or holds no pictures.
    """
    # Of some streams `datasets` knows no columns before it has read a row.
    names = table.column_names or list(next(iter(table), {}))
    for key, column in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if column not in names:
            hint = "" if len(names) > 1 else "; captions go into a metadata.jsonl, or into a.txt beside a.png"
            raise UserError(
                f"data.{key}: no column {column!r} in {config.source}{did_you_mean(column, names)}; "
                f"it has {', '.join(map(repr, names))}{hint}"
            )
    feature = (table.features or {}).get(config.image_column)
    try:
        if isinstance(feature, datasets.Value) and feature.dtype not in ("string", "binary", "large_string"):
            raise ValueError(f"it holds values of type {feature.dtype}")
        if isinstance(table, datasets.Dataset):
            table = table.select_columns(config.image_column)
        return table.cast_column(config.image_column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"data.image_column: {config.image_column!r} of {config.source} holds no pictures ({first_line(error)})"
        ) from error


def _values(column: Any) -> Iterator[Any]:
    """Yield a column's cells, a chunk at a time."""
    for chunk in column.chunks:
        yield from chunk.to_pylist()
