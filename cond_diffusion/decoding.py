"""From the files of pictures to their pixels, on several threads, which decode side by side: Pillow works outside of
Python's lock.

Threads, not processes: nothing is copied from one to another, a signal meets one process only, and one that is killed
leaves no others behind.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image

from cond_diffusion.data_config import DataConfig
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.pictures import CANNOT_READ, fit

ENOUGH_TO_JUDGE = 1000  # pictures: fewer say little about how many of a large set cannot be read

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]


class Decoder:
    """Decodes pictures as a config wants them, and keeps count of those that it cannot read.

    expected: how many pictures there are, where that is known.
    """

    def __init__(self, config: DataConfig, expected: int | None, *, aloud: bool) -> None:
        self.config = config
        self.expected = expected
        self.aloud = aloud
        self.where = f"data.image_column: {config.image_column!r} of {config.source}"
        self.seen = self.enlarged = 0
        self.bad: list[str] = []
        Image.init()  # not by the threads, all at once
        self.threads = ThreadPoolExecutor(cores_of_this_process(), "decoding")

    def decode(self, cells: Sequence[Any], names: Sequence[str], places: Sequence[float]) -> list[Pixels | None]:
        """Return each picture's pixels (h w c), None for one that cannot be read; name it in the log.

        names: what to call a picture that has no file name of its own.
        places: where each is cropped if it is longer than wide, from 0 to 1.
        """
        found: list[Pixels | None] = []
        for cell, name, result in zip(cells, names, self.threads.map(self._decode_one, cells, places), strict=True):
            self.seen += 1
            if isinstance(result, tuple):
                pixels, enlarged = result
                self.enlarged += enlarged
                found.append(pixels)
                continue
            path = cell.get("path") if isinstance(cell, dict) else None
            self.bad.append(f"{name}{f', {path}' if path else ''} ({result})")
            if self.aloud:
                logger.warning("%s: no picture that can be read in %s; it is left out", self.where, self.bad[-1])
            found.append(None)
        return found

    def check(self) -> None:
        """Raise UserError if more than `max_bad_fraction` of the pictures so far could not be read."""
        seen = max(self.seen, min(self.expected or ENOUGH_TO_JUDGE, ENOUGH_TO_JUDGE))
        if len(self.bad) > self.config.max_bad_fraction * seen:
            raise UserError(
                f"{self.where}: {len(self.bad)} of {self.seen} pictures cannot be read, more than "
                f"data.max_bad_fraction ({self.config.max_bad_fraction}); the first are {'; '.join(self.bad[:3])}"
            )

    def tell_enlarged(self) -> None:
        """Say how many pictures were smaller than they are wanted."""
        if self.aloud and self.enlarged:
            logger.warning(
                "%d of %d pictures are smaller than data.resolution (%d) and are enlarged",
                self.enlarged,
                self.seen,
                self.config.resolution,
            )

    def _decode_one(self, cell: Any, place: float) -> tuple[Pixels, bool] | str:
        """Return the pixels, and whether they were enlarged; or why there are none."""
        side = self.config.resolution
        try:
            picture = _open(cell)
            fitted = fit(picture, (side, side), self.config.channels, self.config.background, place)
        except CANNOT_READ as error:
            return first_line(error)
        return np.asarray(fitted).reshape(side, side, self.config.channels), min(picture.size) < side


def _open(cell: dict[str, Any] | None) -> Image.Image:
    """Open what a column of pictures holds where it is not decoded: the bytes of a file, or where it lies."""
    if cell is None:
        raise ValueError("the cell is empty")
    content, path = cell["bytes"], cell["path"]
    if content is None and "://" in path:  # on a hub, or inside an archive
        return datasets.Image().decode_example(cell)
    return Image.open(BytesIO(Path(path).read_bytes() if content is None else content))


def cores_of_this_process() -> int:
    """Return this process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
