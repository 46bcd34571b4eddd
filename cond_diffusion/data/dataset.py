"""Captioned images that can be read in any order: held in memory, or decoded whenever they are asked for.

Every source goes through one path: `datasets` opens it, the configured columns are read, pictures are resized and
cropped to `resolution` x `resolution`. Captions are kept once each: an image belongs to one caption group.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.sources import CaptionGroup, as_table, caption_reader, open_source, pick_captions
from cond_diffusion.device import cores_of_this_process, is_main_process
from cond_diffusion.errors import UserError, did_you_mean, first_line
from cond_diffusion.images import fit

SMALL = 4096  # bytes of a file
ENOUGH_TO_JUDGE = 1000  # rows of a stream: fewer say little about how many of all cannot be read

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EncodedImage:
    """A picture as it lies in its column: the bytes of a file, or where it lies; and what to call it."""

    content: dict[str, Any] | None
    name: str

    @property
    def is_small(self) -> bool:
        return self.content is not None and self.content["bytes"] is not None and len(self.content["bytes"]) < SMALL


class Decoder:
    """Decodes pictures as a config wants them, and keeps count of those that it cannot read.

    expected: how many pictures there are, where that is known.
    """

    def __init__(self, config: DataConfig, expected: int | None) -> None:
        self.config = config
        self.expected = expected
        self.where = f"data.image_column: {config.image_column!r} of {config.source}"
        self.seen = self.enlarged = self.told = 0
        self.bad: dict[str, str] = {}  # by name, so that one that is met again counts once
        Image.init()  # not by the threads, all at once
        self.threads = ThreadPoolExecutor(cores_of_this_process(), "decoding")

    def decode(self, encoded: Sequence[EncodedImage], draws: Sequence[float]) -> list[Pixels | None]:
        """Return each picture's pixels (h w c); None for one that cannot be read.

        places: where each is cropped if it is longer than wide, from 0 to 1.
        """
        found: list[Pixels | None] = []
        # Small files are decoded sooner than Python's lock is handed from one thread to another.
        run = map if all(encoded_image.is_small for encoded_image in encoded) else self.threads.map
        for encoded_image, result in zip(encoded, run(self._decode_one, encoded, draws), strict=True):
            self.seen += 1
            if isinstance(result, tuple):
                pixels, enlarged = result
                self.enlarged += enlarged
                found.append(pixels)
            else:
                path = (encoded_image.content or {}).get("path")
                self.bad[f"{encoded_image.name}, {path}" if path else encoded_image.name] = result
                found.append(None)
        return found

    def check(self) -> None:
        """Raise UserError if too many of the pictures cannot be read; else name those that this is the first time for.

        A set knows how many it may leave out. Of a stream there may be somewhat more for a while than its share.
        """
        if len(self.bad) == self.told:
            return
        if self.expected is None:
            share = self.config.max_bad_fraction * max(self.seen, ENOUGH_TO_JUDGE)
            allowed = share + 4 * share**0.5  # four standard deviations
        else:
            allowed = self.config.max_bad_fraction * self.expected
        bad = [f"{name} ({why})" for name, why in self.bad.items()]
        if len(bad) > allowed:
            raise UserError(
                f"{self.where}: {len(bad)} of {self.expected or self.seen} pictures cannot be read, more than "
                f"data.max_bad_fraction ({self.config.max_bad_fraction}); the first are {'; '.join(bad[:3])}",
                of_this_process=True,
            )
        for name in bad[self.told :]:
            logger.warning("%s: skipping %s: not a readable image", self.where, name)
        self.told = len(bad)

    def warn_upscaled(self) -> None:
        """Say how many pictures were smaller than they are wanted."""
        if self.enlarged:
            logger.warning(
                "%d of %d pictures are smaller than data.resolution (%d) and are enlarged",
                self.enlarged,
                self.seen,
                self.config.resolution,
            )

    def _decode_one(self, encoded_image: EncodedImage, place: float) -> tuple[Pixels, bool] | str:
        """Return the pixels, and whether they were enlarged; or why there are none."""
        side = self.config.resolution
        try:
            picture = _open(encoded_image.content)
            fitted = fit(picture, (side, side), self.config.channels, self.config.background, place)
        except Exception as error:  # files from anywhere meet a dozen parsers, each with exceptions of its own
            return first_line(error)
        return np.asarray(fitted).reshape(side, side, self.config.channels), min(picture.size) < side


def decode_all(
    decoder: Decoder, count: int, images_of: Callable[[list[int], int], list[EncodedImage]], draws: Sequence[float]
) -> tuple[list[Pixels], list[int]]:
    """Decode `count` pictures; return for each how often another had to be tried, since it could not be read, too.

    cells_of: (numbers of pictures, attempt) -> their cells; those of attempt 0 are the ones that are wanted. Raises
    UserError if too many cannot be read.
    """
    found: list[Pixels | None] = [None] * count
    attempts = [0] * count
    todo, attempt = list(range(count)), 0
    while todo:
        for i, pixels in zip(todo, decoder.decode(images_of(todo, attempt), [draws[i] for i in todo]), strict=True):
            found[i], attempts[i] = pixels, attempt
        decoder.check()
        todo, attempt = [i for i in todo if found[i] is None], attempt + 1
        if todo and len(decoder.bad) == decoder.expected:
            raise UserError(f"{decoder.where}: none of the {decoder.expected} pictures can be read")
    return [pixels for pixels in found if pixels is not None], attempts


def _open(content: dict[str, Any] | None) -> Image.Image:
    if content is None or content["bytes"] is content["path"] is None:
        raise ValueError("the cell is empty")
    if content["bytes"] is not None:
        return Image.open(BytesIO(content["bytes"]))
    if "://" in content["path"]:  # on a hub, or inside an archive
        return datasets.Image().decode_example(content)
    return Image.open(BytesIO(Path(content["path"]).read_bytes()))


AT_ONCE = 256  # files that are in memory while a set is decoded

Candidates = Callable[[int], Int64[Tensor, " b"]]
"""attempt -> samples: those of attempt 0 are wanted, those of attempt 1 where these cannot be read, and so on."""


@dataclass(frozen=True)
class RandomDraws:
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
    def of(cls, pictures: list[Pixels], groups: list[CaptionGroup], draws: RandomDraws) -> "CaptionedBatch":
        """Put decoded pictures together, and choose their captions."""
        images = rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w").contiguous()
        return cls(images, pick_captions(groups, draws.caption.tolist()))

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

    def read(self, candidates: Candidates, draws: RandomDraws) -> CaptionedBatch:
        """Gather the first candidates: those that could not be read are not in here."""
        indices = candidates(0)
        return CaptionedBatch(self.images[indices], self.captions_of(indices, draws.caption))

    def in_memory(self) -> "CaptionedImages":
        """Return the set itself."""
        return self

    def captions_of(self, indices: Int64[Tensor, " b"], draws: Float[Tensor, " b"]) -> list[str]:
        """Return one caption for each of the samples `indices`, out of its group."""
        groups = [self.caption_groups[group] for group in self.group_of[indices].tolist()]
        return pick_captions(groups, draws.tolist())


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

    def read(self, candidates: Candidates, draws: RandomDraws) -> CaptionedBatch:
        """Decode samples, those of the next attempt where they cannot be read; UserError if those are too many."""
        rows = candidates(0).tolist()

        def images_of(numbers: list[int], attempt: int) -> list[EncodedImage]:
            if attempt:
                others = candidates(attempt).tolist()
                for i in numbers:
                    rows[i] = others[i]
            return self._cells([rows[i] for i in numbers])

        pixels, _ = decode_all(self.decoder, len(rows), images_of, draws.crop.tolist())
        groups = [self.caption_groups[group] for group in self.group_of[rows].tolist()]
        return CaptionedBatch.of(pixels, groups, draws)

    def in_memory(self) -> CaptionedImages:
        """Decode all of them, once; raise UserError if too many cannot be read."""
        side = self.config.resolution
        decoded = np.empty((len(self), self.config.channels, side, side), dtype=np.uint8)
        read: list[int] = []
        starts = range(0, len(self), AT_ONCE)
        with tqdm(
            total=len(self), desc=f"reading {self.config.source}", disable=not is_main_process(), leave=False
        ) as bar:
            for rows in (range(start, min(start + AT_ONCE, len(self))) for start in starts):
                pictures, of_these = self.decode(rows)
                self.decoder.check()
                decoded[len(read) : len(read) + len(pictures)] = pictures
                read += of_these
                bar.update(len(rows))
        if not read:
            raise UserError(f"{self.decoder.where}: none of the {len(self)} pictures can be read")
        self.decoder.warn_upscaled()
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

    def _cells(self, rows: list[int]) -> list[EncodedImage]:
        contents = self.files[rows][self.config.image_column]
        names = (f"row {row} of {len(self)}, counted from 0" for row in rows)
        return [EncodedImage(content, name) for content, name in zip(contents, names, strict=True)]

    def fits_into_memory(self) -> bool:
        """Say whether the decoded pictures are to be held."""
        size = len(self) * self.config.channels * self.config.resolution**2
        return self.config.crop == "center" and size <= self.config.memory_gb * 1e9


def open_captioned_files(
    config: DataConfig, split: str = "train", dataset: datasets.Dataset | Sequence[Any] | None = None
) -> CaptionedFiles:
    """Open `config.source`, or a data set that a caller gave, and read the captions of its `split`.

    Raises UserError where the source, a column or a template does not fit, naming the key and what is there instead.
    """
    config = config.with_captions()
    opened = open_source(config.source, split) if dataset is None else as_table(dataset, config)
    table = cast(datasets.Dataset, opened)
    if len(table) == 0:
        raise UserError(f"data.source: {config.source} ({split}) holds no examples; expected at least one picture")
    files = select_image_column(table, config)
    captions_of = caption_reader(config, table.features[config.caption_column])
    group_numbers: dict[CaptionGroup, int] = {}
    group_of = []
    for row, value in enumerate(_values(table.data.column(config.caption_column))):
        try:
            group_of.append(group_numbers.setdefault(captions_of(value), len(group_numbers)))
        except UserError as error:
            raise UserError(f"{error} (row {row} of {len(table)}, counted from 0)") from error
    return CaptionedFiles(config, files, torch.tensor(group_of), tuple(group_numbers), columns=table.column_names)


def load_captioned_images(config: DataConfig, split: str = "train") -> CaptionedImages:
    """Open `config.source`, decode its `split` and hold it in memory, however large it is."""
    return open_captioned_files(config, split).in_memory()


def select_image_column(table: Any, config: DataConfig) -> Any:
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
