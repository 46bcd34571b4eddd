"""Captioned images that can be read in any order: held in memory, or decoded whenever they are asked for.

Every source goes through one path: `datasets` opens it, the configured columns are read, pictures are resized and
cropped to `resolution` x `resolution`. Captions are kept once each: an image belongs to one caption group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.captions import CaptionGroup, caption_reader, chosen
from cond_diffusion.data_config import DataConfig
from cond_diffusion.decoding import Decoder, Pixels
from cond_diffusion.errors import UserError, did_you_mean, first_line
from cond_diffusion.sources import open_source

AT_ONCE = 1024  # pictures that are decoded between two updates of the progress bar


@dataclass(frozen=True)
class Places:
    """What chance says of each sample of a batch, as numbers from 0 to 1."""

    caption: Float[Tensor, " b"]
    crop: Float[Tensor, " b"]


@dataclass(frozen=True)
class CaptionedBatch:
    """Pictures with a caption each."""

    images: UInt8[Tensor, "b c h w"]
    captions: list[str]


@dataclass(frozen=True)
class CaptionedImages:
    """A set in memory: images[i] is described by every caption in caption_groups[group_of[i]]."""

    images: UInt8[Tensor, "n c h w"]
    group_of: Int64[Tensor, " n"]
    caption_groups: tuple[CaptionGroup, ...]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Int64[Tensor, " b"], places: Places) -> CaptionedBatch:
        """Gather the samples `indices`."""
        return CaptionedBatch(self.images[indices], self.captions_of(indices, places.caption))

    def captions_of(self, indices: Int64[Tensor, " b"], places: Float[Tensor, " b"]) -> list[str]:
        """Return one caption for each of the samples `indices`, out of its group."""
        groups = [self.caption_groups[group] for group in self.group_of[indices].tolist()]
        return [chosen(group, place) for group, place in zip(groups, places.tolist(), strict=True)]


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
        aloud: bool,
    ) -> None:
        self.config = config
        self.columns = columns
        self.files = files
        self.group_of = group_of
        self.caption_groups = caption_groups
        self.decoder = Decoder(config, len(files), aloud=aloud)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Int64[Tensor, " b"], places: Places) -> CaptionedBatch:
        """Decode the samples `indices`; raise UserError if too many cannot be read."""
        rows = indices.tolist()
        cells = self.files[rows][self.config.image_column]
        groups = [self.caption_groups[group] for group in self.group_of[indices].tolist()]
        names = [f"row {row} of {len(self)}, counted from 0" for row in rows]
        return decoded_batch(self.decoder, cells, groups, names, places)

    def in_memory(self, *, progress: bool) -> CaptionedImages:
        """Decode all of them, once; raise UserError if too many cannot be read."""
        side, channels = self.config.resolution, self.config.channels
        decoded = np.empty((len(self), side, side, channels), dtype=np.uint8)
        read: list[int] = []
        starts = range(0, len(self), AT_ONCE)
        with tqdm(total=len(self), desc=f"reading {self.config.source}", disable=not progress, leave=False) as bar:
            for rows in (range(start, min(start + AT_ONCE, len(self))) for start in starts):
                cells = self.files[rows][self.config.image_column]
                names = [f"row {row} of {len(self)}, counted from 0" for row in rows]
                pictures = self.decoder.decode(cells, names, [0.5] * len(rows))
                for row, pixels in zip(rows, pictures, strict=True):
                    if pixels is not None:
                        decoded[len(read)] = pixels
                        read.append(row)
                bar.update(len(rows))
        self.decoder.check()
        self.decoder.tell_enlarged()
        images = rearrange(torch.from_numpy(decoded[: len(read)]), "n h w c -> n c h w").contiguous()
        return CaptionedImages(images, self.group_of[read], self.caption_groups)

    def fits_into_memory(self) -> bool:
        """Say whether the decoded pictures are to be held."""
        size = len(self) * self.config.channels * self.config.resolution**2
        return self.config.crop == "center" and size <= self.config.memory_gb * 1e9


def open_captioned_files(config: DataConfig, split: str = "train", *, aloud: bool = True) -> CaptionedFiles:
    """Open `config.source`, and read the captions of its `split`.

    Raises UserError where the source, a column or a template does not fit, naming the key and what is there instead.
    """
    table = cast(datasets.Dataset, open_source(config.source, split))
    if len(table) == 0:
        raise UserError(f"data.source: {config.source} ({split}) holds no examples; expected at least one picture")
    files = files_of(table, config)
    captions_of = caption_reader(config, table.features[config.caption_column])
    group_numbers: dict[CaptionGroup, int] = {}
    cells = table.data.column(config.caption_column)
    group_of = [group_numbers.setdefault(captions_of(cell), len(group_numbers)) for cell in _values(cells)]
    return CaptionedFiles(
        config, files, torch.tensor(group_of), tuple(group_numbers), columns=table.column_names, aloud=aloud
    )


def load_captioned_images(config: DataConfig, split: str = "train", *, progress: bool = True) -> CaptionedImages:
    """Open `config.source`, decode its `split` and hold it in memory, however large it is."""
    return open_captioned_files(config, split, aloud=progress).in_memory(progress=progress)


def files_of(table: Any, config: DataConfig) -> Any:
    """Return the column with the pictures of a table or a stream, undecoded; raise UserError where a column is missing
    or holds no pictures.
    """
    names = table.column_names
    for key, column in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if column not in names:
            hint = "" if len(names) > 1 else "; captions go into a metadata.jsonl, or into a.txt beside a.png"
            raise UserError(
                f"data.{key}: no column {column!r} in {config.source}{did_you_mean(column, names)}; "
                f"it has {', '.join(map(repr, names))}{hint}"
            )
    try:
        if isinstance(table, datasets.Dataset):
            table = table.select_columns(config.image_column)
        return table.cast_column(config.image_column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"data.image_column: {config.image_column!r} of {config.source} holds no pictures ({first_line(error)})"
        ) from error


def decoded_batch(
    decoder: Decoder, cells: list[Any], groups: list[CaptionGroup], names: list[str], places: Places
) -> CaptionedBatch:
    """Decode a batch. The place of a picture that cannot be read is taken by the next one that can, with its caption.

    So the batch keeps its size, and is still a function of which samples it was to hold.
    """
    pictures = decoder.decode(cells, names, places.crop.tolist())
    decoder.check()
    whole = [i for i, pixels in enumerate(pictures) if pixels is not None]
    if not whole:
        raise UserError(f"{decoder.where}: all {len(cells)} pictures of a batch cannot be read: {decoder.bad[-1]}")
    of = [next((j for j in whole if j >= i), whole[0]) for i in range(len(cells))]
    pixels: list[Pixels] = [pictures[i] for i in of]  # type: ignore[misc]
    captions = [chosen(groups[i], place) for i, place in zip(of, places.caption.tolist(), strict=True)]
    return CaptionedBatch(rearrange(torch.from_numpy(np.stack(pixels)), "b h w c -> b c h w").contiguous(), captions)


def _values(column: Any) -> Iterator[Any]:
    """Yield a column's cells, a chunk at a time."""
    for chunk in column.chunks:
        yield from chunk.to_pylist()
