"""Datasets of captioned images with random access, either in memory or decoded on each access.

All sources take the same path: `datasets` opens them, the configured columns are read, images are resized and cropped
to `resolution` x `resolution`. Each distinct tuple of captions is stored once, as a caption group.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import torch
from datasets.utils.file_utils import xopen
from einops import rearrange
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.sources import CaptionGroup, Examples, as_table, caption_reader, open_source, pick_captions
from cond_diffusion.device import check_memory, cores_of_this_process, is_main_process, processes_of_machine
from cond_diffusion.errors import UserError, did_you_mean, first_line, user_errors
from cond_diffusion.images import fit, open_content

SMALL_FILE = 4096  # bytes
MIN_ROWS_OF_STREAM = 1000  # with fewer rows the share of unreadable images cannot be estimated
CAPTION_BLOCK_SIZE = 1000  # captions that are converted from Arrow at once
DECODING_BATCH_SIZE = 256  # files that are in memory at once while a dataset is decoded

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

Candidates = Callable[[int], Int64[Tensor, " b"]]
"""Maps an attempt to sample indices: attempt 0 to the requested ones, attempt 1 to replacements for unreadable ones,
and so on."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as stored in its column (the bytes of a file, or its path), and a name for messages."""

    content: dict[str, Any] | None
    name: str
    problem: str | None = None  # why the example is unusable, if that is known without decoding

    @property
    def is_small(self) -> bool:
        content = (self.content or {}).get("bytes")
        return content is not None and len(content) < SMALL_FILE


class Decoder:
    """Decodes and preprocesses images, and counts those that are unreadable, of `expected` in the dataset (None if
    unknown)."""

    def __init__(self, config: DataConfig, expected: int | None) -> None:
        self.config = config
        self.expected = expected
        self.where = f"data.image_column: {config.image_column!r} of {config.source}"
        self.seen = self.enlarged = self.num_reported = 0
        self.bad: dict[str, str] = {}  # name -> reason; an image that is read again counts once
        Image.init()  # here, not by all threads at once
        self.threads = ThreadPoolExecutor(cores_of_this_process(), "decoding")

    def decode(self, encoded: Sequence[EncodedImage], crops: Sequence[float]) -> list[Pixels | None]:
        """Return each image's pixels (h w c), or None if it is unreadable. Crops are positions along the longer side, 0
        to 1."""
        decoded: list[Pixels | None] = []
        # Decoding a small file takes less time than passing the GIL between threads.
        run = map if all(image.is_small for image in encoded) else self.threads.map
        for image, result in zip(encoded, run(self._decode_one, encoded, crops), strict=True):
            self.seen += 1
            if isinstance(result, str):
                path = (image.content or {}).get("path")
                self.bad[f"{image.name}, {path}" if path else image.name] = result
                decoded.append(None)
            else:
                decoded.append(result[0])
                self.enlarged += result[1]
        return decoded

    def check(self) -> None:
        """Log unreadable images that are new, or raise UserError if there are too many.

        For a stream, whose length is unknown, four standard deviations above the allowed share are tolerated.
        """
        if len(self.bad) == self.num_reported:
            return
        if self.expected is None:
            mean = self.config.max_bad_fraction * max(self.seen, MIN_ROWS_OF_STREAM)
            allowed = mean + 4 * mean**0.5
        else:
            allowed = self.config.max_bad_fraction * self.expected
        bad = [f"{name} ({reason})" for name, reason in self.bad.items()]
        if len(bad) > allowed:
            raise UserError(
                f"{self.where}: {len(bad)} of {self.expected or self.seen} images cannot be read, more than "
                f"data.max_bad_fraction ({self.config.max_bad_fraction}); the first are {'; '.join(bad[:3])}",
                of_this_process=True,
            )
        for name in bad[self.num_reported :]:
            logger.warning("%s: skipping %s: not a readable image", self.where, name)
        self.num_reported = len(bad)

    def _decode_one(self, encoded: EncodedImage, crop: float) -> tuple[Pixels, bool] | str:
        """Return the pixels and whether the image was upscaled, or the reason why it is unreadable."""
        size = self.config.resolution
        if encoded.problem is not None:
            return encoded.problem
        try:
            image = _open(encoded.content)
            fitted = fit(image, (size, size), self.config.channels, self.config.background, crop)
        except Exception as error:  # image parsers raise many types of exceptions
            return first_line(error)
        return np.asarray(fitted).reshape(size, size, self.config.channels), min(image.size) < size


def decode_all(
    decoder: Decoder, fetch: Callable[[list[int], int], list[EncodedImage]], crops: Sequence[float]
) -> list[Pixels]:
    """Decode one image per crop, replacing unreadable ones.

    Args:
        fetch: Maps (positions in `crops`, attempt) to images: attempt 0 to the requested ones, others to replacements.
        crops: Position of each crop along the longer side, 0 to 1.
    """
    decoded: list[Pixels | None] = [None] * len(crops)
    todo, attempt = list(range(len(crops))), 0
    while todo:
        for i, pixels in zip(todo, decoder.decode(fetch(todo, attempt), [crops[i] for i in todo]), strict=True):
            decoded[i] = pixels
        decoder.check()
        todo, attempt = [i for i in todo if decoded[i] is None], attempt + 1
        if todo and decoder.expected is not None and attempt > decoder.expected:
            raise UserError(f"{decoder.where}: none of the {decoder.expected} images, or none held out, can be read")
    return [pixels for pixels in decoded if pixels is not None]


def _open(content: dict[str, Any] | None) -> Image.Image:
    if content is None or content["bytes"] is content["path"] is None:
        raise ValueError("the cell is empty")
    if content["bytes"] is not None:
        return open_content(content["bytes"])
    if "://" in content["path"]:  # on the Hub, or inside an archive
        with xopen(content["path"], "rb") as file:
            return open_content(file.read())
    if not Path(content["path"]).is_file():  # a device can be endless
        raise ValueError("not a regular file")
    return open_content(Path(content["path"]).read_bytes())


@dataclass(frozen=True)
class RandomDraws:
    """Random numbers in [0, 1) for each sample of a batch: which caption is picked, and where the image is cropped."""

    caption: Float[Tensor, " b"]
    crop: Float[Tensor, " b"]

    @classmethod
    def fixed(cls, count: int) -> "RandomDraws":
        """Return the draws that pick the first caption and the center crop for each of `count` samples."""
        return cls(caption=torch.zeros(count), crop=torch.full((count,), 0.5))


@dataclass(frozen=True)
class CaptionedBatch:
    """Images with one caption each; the images are bytes, or x_0 if that is already computed."""

    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]
    captions: list[str]

    @classmethod
    def of(cls, pixels: list[Pixels], groups: list[CaptionGroup], draws: RandomDraws) -> "CaptionedBatch":
        """Stack decoded images and pick a caption for each."""
        images = rearrange(torch.from_numpy(np.stack(pixels)), "b h w c -> b c h w").contiguous()
        return cls(images, pick_captions(groups, draws.caption.tolist()))

    def repeated(self, count: int) -> "CaptionedBatch":
        """Return a batch of `count` samples that repeats these."""
        indices = torch.arange(count) % len(self.captions)
        return CaptionedBatch(self.images[indices], [self.captions[i] for i in indices.tolist()])


@dataclass(frozen=True)
class CaptionedImages:
    """A dataset in memory: images[i] has the captions caption_groups[group_of[i]].

    `is_read` marks the rows of the source that could be read, which the images are in this order; None if all could.
    """

    images: UInt8[Tensor, "n c h w"]
    group_of: Int64[Tensor, " n"]
    caption_groups: tuple[CaptionGroup, ...]
    is_read: Bool[Tensor, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, candidates: Candidates, draws: RandomDraws) -> CaptionedBatch:
        """Return the samples `candidates(0)`; unreadable images are not in the dataset."""
        indices = candidates(0)
        return CaptionedBatch(self.images[indices], self.captions_of(indices, draws.caption))

    def in_memory(self) -> "CaptionedImages":
        """Return the dataset itself."""
        return self

    def captions_of(self, indices: Int64[Tensor, " b"], draws: Float[Tensor, " b"]) -> list[str]:
        """Pick one caption for each of the samples `indices`."""
        groups = [self.caption_groups[group] for group in self.group_of[indices].tolist()]
        return pick_captions(groups, draws.tolist())


@dataclass(eq=False)
class CaptionedFiles:
    """A dataset whose images are decoded on each access: larger than memory, or with random crops.

    Attributes:
        files: A table with the image files in column `config.image_column`.
        group_of: Row i has the captions `caption_groups[group_of[i]]`.
        columns: Names of all columns of the source.
    """

    config: DataConfig
    files: datasets.Dataset
    group_of: Int64[Tensor, " n"]
    caption_groups: tuple[CaptionGroup, ...]
    columns: list[str]
    is_read = None  # not known before the images are decoded

    def __post_init__(self) -> None:
        self.decoder = Decoder(self.config, len(self))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, candidates: Candidates, draws: RandomDraws) -> CaptionedBatch:
        """Decode the samples `candidates(0)`; unreadable ones are replaced by those of the next attempt."""
        rows = candidates(0).tolist()

        def fetch(positions: list[int], attempt: int) -> list[EncodedImage]:
            if attempt:
                replacements = candidates(attempt).tolist()
                for i in positions:
                    rows[i] = replacements[i]
            return self._encoded([rows[i] for i in positions])

        pixels = decode_all(self.decoder, fetch, draws.crop.tolist())
        return CaptionedBatch.of(pixels, [self.caption_groups[i] for i in self.group_of[rows].tolist()], draws)

    def in_memory(self) -> CaptionedImages:
        """Decode all images with center crops."""
        size, total = self.config.resolution, len(self)
        needed = (total + min(total, DECODING_BATCH_SIZE)) * self.config.channels * size**2
        check_memory(f"data.resolution: {total} images of {size} x {size} pixels", needed * processes_of_machine())
        images = np.empty((total, self.config.channels, size, size), dtype=np.uint8)
        read: list[int] = []
        hidden = not is_main_process()
        with tqdm(total=total, desc=f"reading {self.config.source}", disable=hidden, leave=False) as bar:
            for start in range(0, total, DECODING_BATCH_SIZE):
                rows = range(start, min(start + DECODING_BATCH_SIZE, total))
                decoded, read_rows = self.decode(rows)
                self.decoder.check()
                images[len(read) : len(read) + len(decoded)] = decoded
                read += read_rows
                bar.update(len(rows))
        if not read:
            raise UserError(f"{self.decoder.where}: none of the {total} images can be read")
        if self.decoder.enlarged:
            message = "data.resolution: %d of %d images are smaller than %d pixels and are upscaled"
            logger.warning(message, self.decoder.enlarged, self.decoder.seen, size)
        return CaptionedImages(
            torch.from_numpy(images[: len(read)]), self.group_of[read], self.caption_groups, rows_read(read, total)
        )

    def decode(self, rows: range) -> tuple[UInt8[np.ndarray, "b c h w"], list[int]]:
        """Return the readable images among `rows`, cropped at the center, and their rows."""
        decoded = zip(rows, self.decoder.decode(self._encoded(list(rows)), [0.5] * len(rows)), strict=True)
        readable = [(row, pixels) for row, pixels in decoded if pixels is not None]
        size = self.config.resolution
        images = np.empty((len(readable), self.config.channels, size, size), dtype=np.uint8)
        for i, (_, pixels) in enumerate(readable):
            images[i] = rearrange(pixels, "h w c -> c h w")
        return images, [row for row, _ in readable]

    def fingerprint(self) -> str:
        """Return a hash of the dataset: its `datasets` fingerprint, and path, size and modification time of each file
        that the table refers to by path.
        """
        digest = hashlib.blake2b(self.files._fingerprint.encode(), digest_size=16)
        for chunk in self.files.data.column(self.config.image_column).chunks:
            for path in chunk.filter(chunk.field("bytes").is_null()).field("path").to_pylist():
                file = Path(path or "")
                state = file.stat() if file.is_file() else None  # an unreadable image
                digest.update(repr((path, *((state.st_size, state.st_mtime_ns) if state else ()))).encode())
        return digest.hexdigest()

    def _encoded(self, rows: list[int]) -> list[EncodedImage]:
        contents = self.files[rows][self.config.image_column]
        names = (f"row {row} of {len(self)} (0-based)" for row in rows)
        return [EncodedImage(content, name) for content, name in zip(contents, names, strict=True)]

    def fits_into_memory(self) -> bool:
        """Return whether the decoded images can be held in memory: center crops, at most `data.memory_gb`."""
        size = len(self) * self.config.channels * self.config.resolution**2
        return self.config.crop == "center" and size <= self.config.memory_gb * 1e9


def rows_read(rows: list[int] | Int64[Tensor, " n"], total: int) -> Bool[Tensor, " rows"] | None:
    """Return `is_read` of a dataset with these rows of `total`."""
    if len(rows) == total:
        return None
    return torch.zeros(total, dtype=torch.bool).index_fill_(0, torch.as_tensor(rows), True)


def open_captioned_files(config: DataConfig, split: str = "train", dataset: Examples | None = None) -> CaptionedFiles:
    """Open `dataset` (see `as_table`), or else the config's source, and read its captions; images are decoded on
    access."""
    config = config.with_captions()
    columns = (config.image_column, config.caption_column)
    opened = open_source(config.source, split, columns=columns) if dataset is None else as_table(dataset, config)
    table = cast(datasets.Dataset, opened)
    if len(table) == 0:
        raise UserError(f"data.source: {config.source} ({split}) is empty; expected at least one image")
    files = select_image_column(table, config)
    captions_of = caption_reader(config, table.features[config.caption_column])
    group_numbers: dict[CaptionGroup, int] = {}
    group_of = []
    # Not from `table.data`, which ignores the selection and the order of the rows.
    blocks: Any = table.select_columns(config.caption_column).iter(CAPTION_BLOCK_SIZE)
    for row, value in enumerate(value for block in blocks for value in block[config.caption_column]):
        try:
            group_of.append(group_numbers.setdefault(captions_of(value), len(group_numbers)))
        except UserError as error:
            raise UserError(f"{error} (row {row} of {len(table)}, 0-based)") from error
    if rows_of := _rows_of_repeated_images(files, config.image_column):
        logger.info("data.source: %d rows of %d images; their captions are joined", len(files), len(rows_of))
        of_rows = [*group_numbers]
        joined = [dict.fromkeys(text for row in rows for text in of_rows[group_of[row]]) for rows in rows_of]
        group_numbers = {}
        group_of = [group_numbers.setdefault(tuple(group), len(group_numbers)) for group in joined]
        files = files.select([rows[0] for rows in rows_of])
    return CaptionedFiles(config, files, torch.tensor(group_of), tuple(group_numbers), table.column_names)


def _rows_of_repeated_images(files: datasets.Dataset, column: str) -> list[list[int]]:
    """Return the rows of each image if some rows have the same path, and therefore the same image; otherwise nothing.

    Embedded images, which may have the same name, are not compared; if the first is one, all are.
    """
    first = files[0][column]
    if first is None or first["bytes"] is not None:
        return []
    blocks: Any = files.with_format("arrow").iter(CAPTION_BLOCK_SIZE)
    chunks = (chunk for block in blocks for chunk in block.column(column).chunks)
    cells = ((chunk.field("path").to_pylist(), chunk.field("bytes").is_valid().to_pylist()) for chunk in chunks)
    paths = [None if embedded else path for columns in cells for path, embedded in zip(*columns, strict=True)]
    if len({*paths} - {None}) + paths.count(None) == len(paths):
        return []
    rows_of: dict[str | int, list[int]] = {}
    for row, path in enumerate(paths):
        rows_of.setdefault(row if path is None else path, []).append(row)
    return [*rows_of.values()]


def load_captioned_images(config: DataConfig, split: str = "train") -> CaptionedImages:
    """Load a split of `config.source` into memory, whatever its size."""
    return open_captioned_files(config, split).in_memory()


def select_image_column(table: Any, config: DataConfig) -> Any:
    """Return a table or a stream with its image column undecoded."""
    names = table.column_names
    for key, column in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if column not in names:
            without_text = key == "caption_column" and {*names} <= {"image", "label"}  # `datasets` found images alone
            hint = "; captions belong in metadata.jsonl, or in a.txt beside a.png" if without_text else ""
            raise UserError(
                f"data.{key}: no column {column!r} in {config.source}{did_you_mean(column, names)}; "
                f"it has {', '.join(map(repr, names))}{hint}"
            )
    feature = table.features[config.image_column]
    what = f"data.image_column: {config.image_column!r} of {config.source} does not contain images"
    with user_errors(what, ValueError, TypeError, NotImplementedError):
        if isinstance(feature, datasets.Value) and feature.dtype not in ("string", "binary", "large_string"):
            raise ValueError(f"its values have type {feature.dtype}")
        if isinstance(table, datasets.Dataset):
            table = table.select_columns(config.image_column)
        return table.cast_column(config.image_column, datasets.Image(decode=False))
