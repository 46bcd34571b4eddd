"""From the files of pictures to their pixels, on several threads, which decode side by side: Pillow works outside of
Python's lock.

Threads, not processes: nothing is copied from one to another, a signal meets one process only, and one that is killed
leaves no others behind.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image

from cond_diffusion.config.data import DataConfig
from cond_diffusion.device import cores_of_this_process
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.images import fit

SMALL = 4096  # bytes of a file
ENOUGH_TO_JUDGE = 1000  # rows of a stream: fewer say little about how many of all cannot be read

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Cell:
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

    def decode(self, cells: Sequence[Cell], places: Sequence[float]) -> list[Pixels | None]:
        """Return each picture's pixels (h w c); None for one that cannot be read.

        places: where each is cropped if it is longer than wide, from 0 to 1.
        """
        found: list[Pixels | None] = []
        # Small files are decoded sooner than Python's lock is handed from one thread to another.
        run = map if all(cell.is_small for cell in cells) else self.threads.map
        for cell, result in zip(cells, run(self._decode_one, cells, places), strict=True):
            self.seen += 1
            if isinstance(result, tuple):
                pixels, enlarged = result
                self.enlarged += enlarged
                found.append(pixels)
            else:
                path = (cell.content or {}).get("path")
                self.bad[f"{cell.name}, {path}" if path else cell.name] = result
                found.append(None)
        return found

    def check(self, *, aloud: bool) -> None:
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
        if aloud:
            for name in bad[self.told :]:
                logger.warning("%s: no picture that can be read in %s; it is left out", self.where, name)
        self.told = len(bad)

    def tell_enlarged(self) -> None:
        """Say how many pictures were smaller than they are wanted."""
        if self.enlarged:
            logger.warning(
                "%d of %d pictures are smaller than data.resolution (%d) and are enlarged",
                self.enlarged,
                self.seen,
                self.config.resolution,
            )

    def _decode_one(self, cell: Cell, place: float) -> tuple[Pixels, bool] | str:
        """Return the pixels, and whether they were enlarged; or why there are none."""
        side = self.config.resolution
        try:
            picture = _open(cell.content)
            fitted = fit(picture, (side, side), self.config.channels, self.config.background, place)
        except Exception as error:  # files from anywhere meet a dozen parsers, each with exceptions of its own
            return first_line(error)
        return np.asarray(fitted).reshape(side, side, self.config.channels), min(picture.size) < side


def decode_all(
    decoder: Decoder, count: int, cells_of: Callable[[list[int], int], list[Cell]], places: Sequence[float]
) -> tuple[list[Pixels], list[int]]:
    """Decode `count` pictures; return for each how often another had to be tried, since it could not be read, too.

    cells_of: (numbers of pictures, attempt) -> their cells; those of attempt 0 are the ones that are wanted. Raises
    UserError if too many cannot be read.
    """
    found: list[Pixels | None] = [None] * count
    attempts = [0] * count
    todo, attempt = list(range(count)), 0
    while todo:
        for i, pixels in zip(todo, decoder.decode(cells_of(todo, attempt), [places[i] for i in todo]), strict=True):
            found[i], attempts[i] = pixels, attempt
        decoder.check(aloud=True)
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
