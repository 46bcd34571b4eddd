"""Pictures on disk: grids of them, and file names that do not overwrite."""

import re
from pathlib import Path

from PIL import Image

from cond_diffusion.errors import UserError


def grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Lay equally large pictures out row by row, two pixels apart."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (columns * (width + 2) - 2, rows * (height + 2) - 2), color=0)
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return sheet


def output_path(wanted: str | None, prompt: str) -> Path:
    """Return where to write: `wanted`, or a name made of the prompt that is still free.

    Raises UserError, before any work is done, if the path exists already or could not be written.
    """
    if wanted is None:
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
        path, number = Path(f"{name}.png"), 1
        while path.exists():
            number += 1
            path = Path(f"{name}-{number}.png")
    else:
        path = Path(wanted)
    if path.suffix.lower() != ".png":
        raise UserError(f"--output: {path} must end in .png")
    try:
        path.open("xb").close()  # claims the name, and shows that it can be written
    except FileExistsError as error:
        raise UserError(f"--output: {path} exists already and is not overwritten; give another name") from error
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}") from error
    return path
