"""Captioned images: from any source to uint8 tensors in memory, and the order in which training visits them.

Every source goes through one path: `datasets` opens it, the configured columns are decoded, pictures are resized and
cropped to `resolution` x `resolution`. Captions are kept once each: a *caption group* is a list of captions that mean
the same ("a digit seven", "7"), and an image belongs to one group.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any, cast

import datasets
import numpy as np
import torch
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from einops import rearrange
from jaxtyping import Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from cond_diffusion.errors import UserError, did_you_mean, first_line
from cond_diffusion.pictures import PILLOW_MODES, fit
from cond_diffusion.randomness import generator

BUILT_IN_SOURCES = {"mnist": Path(__file__).parent / "assets" / "mnist"}


@dataclass(frozen=True)
class DataConfig:
    """Which pictures, and what they are called.

    source: a built-in name ("mnist"), a folder (pictures with metadata, or Parquet files), a Parquet file, or a hub id.
    image_column, caption_column: the columns that hold the pictures and their captions (text, a list of texts, or a
    label).
    resolution, channels: the pictures' side in pixels; 1 for grey or 3 for RGB.
    caption_templates: where the caption column is a label, the captions made of it: "a digit {word}" names a list of
        `label_names`; "{label}" is the name that the data set itself gives the label.
    label_names: for each word in braces, the label's name by its number.
    """

    source: str = "mnist"
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int = 28
    channels: int = 1
    caption_templates: tuple[str, ...] = ()
    label_names: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.channels not in PILLOW_MODES:
            raise UserError(f"data.channels: {self.channels} must be 1 (grey) or 3 (RGB)")
        if self.resolution < 1:
            raise UserError(f"data.resolution: {self.resolution} must be at least 1")


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
    table = _open_source(config.source, split)
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

    size = (config.resolution, config.resolution)
    shape = (*size, config.channels)
    decoded = np.empty((len(table), *shape), dtype=np.uint8)
    number = 0
    try:
        pictures = table.select_columns(config.image_column).cast_column(config.image_column, datasets.Image())
        rows = tqdm(pictures, f"reading {config.source} ({split})", disable=not progress, leave=False)
        for row in cast(Iterable[dict[str, Any]], rows):
            decoded[number] = np.asarray(fit(row[config.image_column], size, config.channels)).reshape(shape)
            number += 1
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"data.image_column: {config.image_column!r} of {config.source} holds no picture that can be read in row "
            f"{number} of {len(table)}, counted from 0 ({first_line(error)})"
        ) from error
    return CaptionedImages(
        images=rearrange(torch.from_numpy(decoded), "n h w c -> n c h w").contiguous(),
        group_of=torch.tensor(group_of),
        caption_groups=tuple(group_numbers),
    )


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


def _open_source(source: str, split: str) -> datasets.Dataset:
    """Find out what `source` is, and open it with `datasets`."""
    path = BUILT_IN_SOURCES.get(source, Path(source))
    folder: str | None = None
    files: dict[str, list[str]] | None = None
    if path.is_dir():
        parquet = sorted(path.glob("*.parquet"))
        of_split = [file for file in parquet if file.stem.startswith(split)]
        if parquet and not of_split and split == "train":  # files that are named after no split are for training
            of_split = [file for file in parquet if not file.stem.startswith(("test", "val"))]
        if (path / "metadata.parquet").exists() or not parquet:
            builder, folder = "imagefolder", str(path)
        elif not of_split:
            raise UserError(f"data.source: {source} has no split {split!r}: no file {split}*.parquet")
        else:
            builder, files = "parquet", {split: list(map(str, of_split))}
    elif path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"data.source: {source} is no Parquet file; expected a .parquet file, a folder or a hub id")
        builder, files = "parquet", {"train": [str(path)]}
    elif path.is_absolute() or source.startswith(".") or path.suffix or source.count("/") != 1:
        raise UserError(
            f"data.source: no file or folder {source}{did_you_mean(source, BUILT_IN_SOURCES)}; "
            "expected mnist, a folder, a Parquet file or a hub id such as ylecun/mnist"
        )
    else:
        builder = source
    try:
        found = datasets.load_dataset(builder, data_dir=folder, data_files=files)
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise UserError(f"data.source: {source} holds no pictures and no Parquet files") from error
    except (OSError, DatasetNotFoundError) as error:
        raise UserError(
            f"data.source: cannot open {source}: there is no such file or folder, and as a hub id it cannot be fetched "
            f"({first_line(error)}); check the name and the network, or download it and give the folder"
        ) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):  # what `datasets` says of a split without rows
            raise UserError(
                f"data.source: {source} ({split}) holds no examples; expected at least one picture"
            ) from error
        raise UserError(f"data.source: cannot read {source}: {first_line(error)}") from error
    except DatasetGenerationError as error:
        raise UserError(f"data.source: cannot read {source}: {first_line(error.__cause__ or error)}") from error
    if split not in found:
        raise UserError(f"data.source: {source} has no split {split!r}; it has {', '.join(map(repr, found))}")
    return found[split]


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
