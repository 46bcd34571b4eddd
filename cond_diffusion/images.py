"""Images: bytes outside, [-1, 1] inside; preprocessing, and grids of them."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import wrap

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from cond_diffusion.errors import UserError, first_line

PILLOW_MODES = {1: "L", 3: "RGB"}
CANNOT_READ = (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError)  # Pillow's words
LABEL_WIDTH, LINE_HEIGHT = 112, 13  # pixels


def to_model(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Map bytes 0..255 to [-1, 1], where diffusion happens."""
    return images.float() / 127.5 - 1


def to_bytes(x_0: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
    """Map [-1, 1] back to bytes, rounding to the nearest and clipping what lies outside."""
    return ((x_0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pillow(images: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Turn pictures in [-1, 1] into PIL's, grey or RGB."""
    arrays = rearrange(to_bytes(images), "b c h w -> b h w c").cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def from_pillow(picture: Image.Image) -> Float[Tensor, "c h w"]:
    """Turn a grey or RGB picture of PIL's into one in [-1, 1]."""
    shape = (picture.height, picture.width, len(picture.getbands()))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(shape)
    return to_model(rearrange(pixels, "h w c -> 1 c h w"))[0]


def normalize_image(picture: Image.Image, background: str = "black") -> Image.Image:
    """Turn upright what a camera marked as rotated, in grey or RGB of 8 bits; transparent ones lie on `background`."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel; Pillow would cut them at 255
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture.convert("RGBA"))
    return picture if picture.mode in PILLOW_MODES.values() else picture.convert("L" if picture.mode == "1" else "RGB")


def fit(
    picture: Image.Image, size: tuple[int, int], channels: int, background: str = "black", place: float = 0.5
) -> Image.Image:
    """Turn upright, resize the short side to the size (width, height) with antialiasing, and crop what is too long.

    place: what is kept of it, from 0, the left or upper end, over the centre to 1, the right or lower one.
    """
    picture = normalize_image(picture, background).convert(PILLOW_MODES[channels])
    if picture.size == size:
        return picture
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS, centering=(place, place))


class Pictures(list[Image.Image]):
    """PIL images, which a notebook shows as a grid."""

    def __init__(self, images: Iterable[Image.Image] = (), columns: int = 1) -> None:
        super().__init__(images)
        self.columns = columns

    def _repr_png_(self) -> bytes | None:
        """Return what a notebook displays (IPython's name for it): small pictures enlarged."""
        if not self:
            return None
        file = io.BytesIO()
        enlarged(grid(self, self.columns), min(256, 112 * self.columns)).save(file, "PNG")
        return file.getvalue()


def grid(images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """Lay equally large pictures out row by row, two pixels apart; with a label each, on the left of the rows."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    left = LABEL_WIDTH if labels else 0
    sheet = Image.new(images[0].mode, (left + columns * (width + 2) - 2, rows * (height + 2) - 2), color=0)
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels or ()):
        lines = wrap(label, 22, max_lines=max(1, height // LINE_HEIGHT), placeholder="…")
        top = i * (height + 2) + (height - LINE_HEIGHT * len(lines)) // 2
        draw.multiline_text((2, top), "\n".join(lines), fill="white", font_size=10, spacing=2)
    for i, image in enumerate(images):  # over the end of a label in wide letters
        sheet.paste(image, (left + (i % columns) * (width + 2), (i // columns) * (height + 2)))
    return sheet


def enlarged(picture: Image.Image, width: int) -> Image.Image:
    """Repeat the pixels of a small picture until it is at least so wide."""
    factor = max(1, -(-width // picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def open_image(path: str, option: str) -> Image.Image:
    """Read the picture at `path`, upright; raise UserError, naming the option that gave it, where there is none."""
    with opened_image(path, option) as picture:
        return normalize_image(picture)


@contextmanager
def opened_image(path: str, option: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            picture.load()
            yield picture
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{option}: there is no file {path}") from error
    except CANNOT_READ as error:
        raise UserError(f"{option}: {path} holds no picture that can be read ({first_line(error)})") from error
