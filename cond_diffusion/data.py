"""Captioned images: from any source to uint8 tensors in memory, and the order in which training visits them.

Every source goes through one path: `datasets` opens it, the configured columns are decoded, pictures are resized and
cropped to `resolution` x `resolution`. Captions are kept once each: a *caption group* is a list of captions that mean
the same ("a digit seven", "7"), and an image belongs to one group.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from string import Formatter
from typing import Any, cast

import datasets
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int64, UInt8
from PIL import Image, ImageColor
from torch import Tensor
from tqdm import tqdm

from cond_diffusion.errors import UserError, did_you_mean, first_line
from cond_diffusion.pictures import CANNOT_READ, PILLOW_MODES, fit
from cond_diffusion.randomness import generator
from cond_diffusion.sources import open_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Which pictures, and what they are called.

    source: a built-in name ("mnist"), a folder (pictures with metadata, pictures with name.txt beside name.png, or
        Parquet files), a Parquet file, or a hub id.
    image_column, caption_column: the columns that hold the pictures and their captions (text, a list of texts, or a
    label).
    resolution, channels: the pictures' side in pixels; 1 for grey or 3 for RGB.
    caption_templates: where the caption column is a label, the captions made of it: "a digit {word}" names a list of
        `label_names`; "{label}" is the name that the data set itself gives the label.
    label_names: for each word in braces, the label's name by its number.
    background: the colour, a name or #rrggbb, that transparent pictures are laid on.
    max_bad_fraction: the share of pictures that may be unreadable, and are left out.
    """

    source: str = "mnist"
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int = 28
    channels: int = 1
    caption_templates: tuple[str, ...] = ()
    label_names: dict[str, list[str]] = field(default_factory=dict)
    background: str = "black"
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.channels not in PILLOW_MODES:
            raise UserError(f"data.channels: {self.channels} must be 1 (grey) or 3 (RGB)")
        if self.resolution < 1:
            raise UserError(f"data.resolution: {self.resolution} must be at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction: {self.max_bad_fraction} is a share: expected 0 to 1")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise UserError(
                f"data.background: {self.background!r} is no colour; expected a name such as white, or #rrggbb"
            ) from error


@dataclass(frozen=True)
class CaptionedImages:
    """images[i] is described by every caption in caption_groups[group_of[i]]."""

    images: UInt8[Tensor, "n c h w"]
    group_of: Int64[Tensor, " n"]
    caption_groups: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.images)

    def draw_captions(self, indices: Int64[Tensor, " b"], draw: torch.Generator) -> list[str]:
        """Draw one caption for each of the images `indices`, out of its group."""
        groups = [self.caption_groups[group] for group in self.group_of[indices].tolist()]
        return [group[int(torch.randint(len(group), (), generator=draw))] for group in groups]


def load_captioned_images(config: DataConfig, split: str = "train", *, progress: bool = True) -> CaptionedImages:
    """Open `config.source`, decode its `split` and hold it in memory.

    Raises UserError where the source, a column or a template does not fit, naming the key and what is there instead.
    """
    table = open_source(config.source, split)
    if len(table) == 0:
        raise UserError(f"data.source: {config.source} ({split}) holds no examples; expected at least one picture")
    for key, column in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if column not in table.column_names:
            raise UserError(
                f"data.{key}: no column {column!r} in {config.source}{did_you_mean(column, table.column_names)}; "
                f"it has {', '.join(map(repr, table.column_names))}"
            )

    captions_of = _caption_reader(config, table.features[config.caption_column])
    group_numbers: dict[tuple[str, ...], int] = {}
    cells = table.data.column(config.caption_column).to_pylist()
    group_of = [group_numbers.setdefault(captions_of(cell), len(group_numbers)) for cell in cells]

    images, read = _decode(table, config, f"reading {config.source} ({split})", progress)
    return CaptionedImages(images=images, group_of=torch.tensor(group_of)[read], caption_groups=tuple(group_numbers))


def _decode(
    table: datasets.Dataset, config: DataConfig, title: str, progress: bool
) -> tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, " n"]]:
    """Return the pictures that can be read, and in which rows they stand; name the others.

    Raises UserError if more than `max_bad_fraction` cannot be read.
    """
    size = (config.resolution, config.resolution)
    decoded = np.empty((len(table), *size, config.channels), dtype=np.uint8)
    read: list[int] = []
    bad: list[str] = []
    enlarged = 0
    try:
        files = table.select_columns(config.image_column)
        files = files.cast_column(config.image_column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"data.image_column: {config.image_column!r} of {config.source} holds no pictures ({first_line(error)})"
        ) from error
    rows = cast(Iterable[dict[str, Any]], tqdm(files, title, disable=not progress, leave=False))
    for number, row in enumerate(rows):
        try:
            picture = _open_cell(row[config.image_column])
            enlarged += min(picture.size) < config.resolution
            pixels = np.asarray(fit(picture, size, config.channels, config.background))
        except CANNOT_READ as error:
            bad.append(f"row {number} of {len(table)}, counted from 0 ({first_line(error)})")
            continue
        decoded[len(read)] = pixels.reshape(decoded.shape[1:])
        read.append(number)
    where = f"data.image_column: {config.image_column!r} of {config.source}"
    if len(bad) > config.max_bad_fraction * len(table) or not read:
        raise UserError(
            f"{where}: {len(bad)} of {len(table)} pictures cannot be read, more than data.max_bad_fraction "
            f"({config.max_bad_fraction}); the first are in {'; '.join(bad[:3])}"
        )
    if progress:
        for line in bad:
            logger.warning("%s holds no picture that can be read in %s; it is left out", where, line)
        if enlarged:
            logger.warning(
                "%d of %d pictures are smaller than data.resolution (%d) and are enlarged",
                enlarged,
                len(read),
                config.resolution,
            )
    images = rearrange(torch.from_numpy(decoded[: len(read)]), "n h w c -> n c h w").contiguous()
    return images, torch.tensor(read)


def _open_cell(cell: dict[str, Any] | None) -> Image.Image:
    """Open what a column of pictures holds where it is not decoded: the bytes of a file, or its path."""
    if cell is None:
        raise ValueError("the cell is empty")
    return Image.open(BytesIO(Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]))


def sample_indices(num_samples: int, seed: int, start: int, count: int) -> Int64[Tensor, " count"]:
    """Say which samples stand at positions start .. start + count - 1 of the endless training order.

    Every epoch is a fresh permutation, a function of (seed, epoch) alone, and batches run on across its end: each
    sample is seen exactly once an epoch, and any position can be reached without walking there.
    """
    positions = range(start, start + count)
    return torch.tensor([int(_epoch_order(num_samples, seed, p // num_samples)[p % num_samples]) for p in positions])


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> Int64[Tensor, " num_samples"]:
    return torch.randperm(num_samples, generator=generator("order", seed, epoch))


def _caption_reader(config: DataConfig, feature: Any) -> Callable[[Any], tuple[str, ...]]:
    """Return the function from a cell of the caption column to its caption group."""
    if not config.caption_templates:
        if isinstance(feature, datasets.ClassLabel):
            raise UserError(
                f"data.caption_column: {config.caption_column!r} holds labels, not text; "
                'say how they read, for example data.caption_templates=["a picture of {label}"]'
            )
        return lambda cell: _texts(cell, config.caption_column)

    names = dict(config.label_names)
    if isinstance(feature, datasets.ClassLabel):
        names.setdefault("label", feature.names)
    for template in config.caption_templates:
        for word in _words_in_braces(template):
            if word not in names:
                raise UserError(
                    f"data.caption_templates: {template!r} asks for {word!r}, which data.label_names does not list; "
                    f"it lists {', '.join(map(repr, names)) or 'nothing'}"
                )

    def fill_in(cell: Any) -> tuple[str, ...]:
        if not isinstance(cell, int) or not all(0 <= cell < len(values) for values in names.values()):
            raise UserError(
                f"data.label_names: no name for the label {cell!r} of column {config.caption_column!r}; "
                f"labels run from 0 to {min(map(len, names.values()), default=0) - 1}"
            )
        return tuple(
            t.format(**{word: values[cell] for word, values in names.items()}) for t in config.caption_templates
        )

    return fill_in


def _words_in_braces(template: str) -> list[str]:
    try:
        return [word for _, word, _, _ in Formatter().parse(template) if word is not None]
    except ValueError as error:
        raise UserError(f"data.caption_templates: {template!r}: {error}") from error


def _texts(cell: Any, column: str) -> tuple[str, ...]:
    texts = (cell,) if isinstance(cell, str) else tuple(cell) if isinstance(cell, list) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"data.caption_column: {column!r} holds {repr(cell)[:60]}; expected a text or a list of texts")
    return texts
