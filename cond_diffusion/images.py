"""Conversion between PIL images (bytes) and tensors in [-1, 1], preprocessing, and image grids."""

import importlib.util
import io
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from cond_diffusion.errors import UserError, user_errors

logger = logging.getLogger(__name__)

PILLOW_MODES = {1: "L", 3: "RGB"}
# Pillow passes these to Ghostscript, to Windows, and to any of its decoders.
UNSAFE_FORMATS = ("EPS", "WMF", "IPTC")
LABEL_WIDTH, LINE_HEIGHT = 112, 13  # pixels
# Fonts of the system with letters outside ASCII; matplotlib ships the first one.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")


def to_model(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Map bytes 0..255 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x_0: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
    """Map [-1, 1] to bytes, rounding to the nearest and clipping values outside."""
    return ((x_0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pillow(images: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Convert images in [-1, 1] to PIL images, grayscale or RGB."""
    arrays = rearrange(to_bytes(images), "b c h w -> b h w c").cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def from_pillow(image: Image.Image) -> Float[Tensor, "c h w"]:
    """Convert a grayscale or RGB PIL image to a tensor in [-1, 1]."""
    shape = (image.height, image.width, len(image.getbands()))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(shape)
    return to_model(rearrange(pixels, "h w c -> 1 c h w"))[0]


def normalize_image(image: Image.Image, background: str = "black") -> Image.Image:
    """Apply the EXIF orientation, composite transparency on `background`, and convert to 8-bit grayscale or RGB.

    Raises:
        ValueError: For 32-bit values, which have no agreed range.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # of these "I" is 16 bits
        raise ValueError(f"32-bit values (mode {image.mode}) have no agreed range; convert the image to 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image if image.mode in PILLOW_MODES.values() else image.convert("L" if image.mode == "1" else "RGB")


def fit(
    image: Image.Image, size: tuple[int, int], channels: int, background: str = "black", place: float = 0.5
) -> Image.Image:
    """Normalize an image, resize its shorter side with antialiasing, and crop its longer side.

    Args:
        size: (width, height) in pixels.
        place: Position of the crop: 0 keeps the left or upper end, 0.5 the center, 1 the right or lower end.
    """
    image = normalize_image(image, background).convert(PILLOW_MODES[channels])
    if image.size == size:
        return image
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=(place, place))


class ImageGrid(list[Image.Image]):
    """List of PIL images that a notebook displays as a grid."""

    def __init__(self, images: Iterable[Image.Image] = (), columns: int = 1) -> None:
        super().__init__(images)
        self.columns = columns

    def _repr_png_(self) -> bytes | None:
        """Return the grid as PNG for IPython; small images are enlarged."""
        if not self:
            return None
        return encode(enlarged(grid(self, self.columns), min(256, 112 * self.columns)))


def grid(images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """Arrange images of equal size in rows, with gaps of two pixels, and labels, one per row, on their left."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    left = LABEL_WIDTH if labels else 0
    sheet = Image.new(images[0].mode, (left + columns * (width + 2) - 2, rows * (height + 2) - 2), color=0)
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels or ()):
        lines = wrap(label, 22, max_lines=max(1, height // LINE_HEIGHT), placeholder="…")
        top = i * (height + 2) + (height - LINE_HEIGHT * len(lines)) // 2
        draw.multiline_text((2, top), "\n".join(lines), fill="white", font=label_font(label), spacing=2)
    for i, image in enumerate(images):  # after the labels, because wide letters can exceed LABEL_WIDTH
        sheet.paste(image, (left + (i % columns) * (width + 2), (i // columns) * (height + 2)))
    return sheet


@lru_cache(256)
def label_font(text: str) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return a font of 10 pixels: the default one for ASCII, else the first of `FONTS` that has all letters."""
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont = ImageFont.load_default(10)
    if text.isascii():
        return font
    matplotlib = importlib.util.find_spec("matplotlib")
    folder = Path(matplotlib.origin or "").parent / "mpl-data" / "fonts" / "ttf" if matplotlib else Path()
    for name in (*FONTS, str(folder / FONTS[0])):
        with suppress(OSError):
            font = ImageFont.truetype(name, 10)
            mask: Any = font.getmask
            box = bytes(mask("\U0010ffff"))  # drawn in place of a letter that the font does not have
            if all(letter.isascii() or bytes(mask(letter)) != box for letter in text):
                return font
    _warn_without_font()
    return font


@cache
def _warn_without_font() -> None:
    logger.warning("labels: no font has all letters of the labels; install one of %s", ", ".join(FONTS))


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return an image as the content of a file, with options of PIL's `Image.save`."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def enlarged(image: Image.Image, width: int) -> Image.Image:
    """Enlarge an image by the smallest integer factor that makes it at least `width` pixels wide."""
    return ImageOps.scale(image, max(1, -(-width // image.width)), Image.Resampling.NEAREST)


def image_formats() -> list[str]:
    """Return the names of the formats that are opened: those that Pillow decodes itself."""
    Image.init()
    return [name for name in Image.ID if name not in UNSAFE_FORMATS]


def open_content(content: bytes) -> Image.Image:
    """Open the content of an image file, by Pillow alone; its format does not depend on the name of the file."""
    return Image.open(io.BytesIO(content), formats=image_formats())


def open_image(path: str, option: str) -> Image.Image:
    """Load an image file as PIL does; it is not normalized yet."""
    # Image parsers raise many types of exceptions.
    with user_errors(f"{option}: {path} is not a readable image", Exception):
        if not Path(path).is_file():  # a pipe or a device can be endless
            raise UserError(f"{option}: there is no file {path}")
        with Image.open(path, formats=image_formats()) as image:
            image.load()
            return image
