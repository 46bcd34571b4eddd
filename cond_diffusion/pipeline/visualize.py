"""Visualize sampling: animations of x_t beside x_0_hat, and cross-attention maps of each word of a prompt."""

import math
import struct
from pathlib import Path
from typing import Any, cast

from einops import einsum, rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional as F

from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.images import encode, enlarged, grid, label_font, to_pillow
from cond_diffusion.models.layers import Attention, TransformerBlock
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet

FRAMES = 60
FRAME_MS, LAST_FRAME_MS = 80, 2000
FRAME_WIDTH, MAP_WIDTH = 84, 112  # minimum width of an image in an animation and under a heat map, in pixels
LABEL_HEIGHT = 14


class Film:
    """Step callback that records x_t and x_0_hat of up to `FRAMES` evenly spaced steps, including the last one."""

    def __init__(self) -> None:
        self.frames: list[tuple[list[Image.Image], list[Image.Image]]] = []

    def __call__(self, step: Step, number: int, total: int) -> None:
        count = min(FRAMES, total)
        shown = [round((i + 1) * total / count) - 1 for i in range(count)]
        if number not in shown:
            return
        if (frame := shown.index(number)) == len(self.frames):
            self.frames.append(([], []))
        left, right = self.frames[frame]  # it may have the images of previous batches
        left += to_pillow(step.x)
        right += to_pillow(step.x_0_hat)

    def encode(self, path: Path, columns: int) -> bytes:
        """Return the content of a GIF or WebP animation, by the suffix of `path`: x_t on the left, x_0_hat on the
        right, in rows of `columns` images."""
        first, *others = [_side_by_side(*(_image_grid(half, columns) for half in frame)) for frame in self.frames]
        durations = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
        what = f"--film: {path}, {first.width} x {first.height} pixels, cannot be written"
        # The limits are 16383 pixels for WebP and 65535 for GIF, which is a struct.error.
        kinds = (ValueError, RuntimeError, OverflowError, OSError, struct.error)
        with user_errors(what, *kinds, hint="; reduce the number of images"):
            return encode(first, path.suffix[1:], save_all=True, append_images=others, duration=durations, loop=0)


class AttentionMaps:
    """Context manager and step callback that records a UNet's cross-attention at each step (DAAM, Tang et al. 2022).

    Attributes:
        maps: For each image one heat map per token: the attention of each pixel to the token, averaged over steps,
            heads and resolution levels. Coarser levels are interpolated to `image_size`.
    """

    def __init__(self, unet: UNet, image_size: int) -> None:
        self.modules = [*unet.modules()]
        self.blocks = [module for module in self.modules if isinstance(module, TransformerBlock)]
        self.image_size = image_size
        self.recorded: list[Float[Tensor, "n l h w"]] = []  # since the previous step
        self.sums: dict[int, Tensor] = {}  # of this batch, by resolution
        self.count = 0
        self.maps: list[Float[Tensor, "l side side"]] = []

    def __enter__(self) -> "AttentionMaps":
        if any(module._compiled_call_impl is not None for module in self.modules):
            raise UserError("attention_maps: not available with compile; remove one")  # compiled code skips hooks
        self.hooks = [block.attn2.register_forward_pre_hook(self._record) for block in self.blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _record(self, attention: Any, inputs: tuple[Any, ...]) -> None:
        x, (keys, _) = inputs
        self.recorded.append(attention_weights(attention, x, keys))

    def __call__(self, step: Step, number: int, total: int) -> None:
        """Add the maps of this step. Only the conditional rows are used, which come first in the batch."""
        for weights in self.recorded:
            self.sums[weights.shape[-1]] = self.sums.get(weights.shape[-1], 0) + weights[: len(step.x)]
            self.count += 1
        self.recorded = []
        if number == total - 1:
            size = (self.image_size, self.image_size)
            levels = (F.interpolate(level, size=size, mode="bilinear") for level in self.sums.values())
            self.maps += [*(cast(Tensor, sum(levels)) / self.count).cpu()]
            self.sums, self.count = {}, 0


def attention_weights(
    attention: Attention, x: Float[Tensor, "b p d"], keys: Float[Tensor, "b n l k"]
) -> Float[Tensor, "b l h w"]:
    """Return the attention of each pixel to each token, averaged over heads; it sums to 1 over the tokens."""
    queries = rearrange(attention.to_q(x), "b p (n k) -> b n p k", n=attention.num_heads)
    scores = einsum(queries, keys, "b n p k, b n l k -> b n p l") / math.sqrt(keys.shape[-1])
    return rearrange(scores.float().softmax(-1).mean(1), "b (h w) l -> b l h w", h=math.isqrt(x.shape[1]))


def maps_per_word(
    prompt: str, maps: Float[Tensor, "l side side"], text_encoder: TextEncoder
) -> list[tuple[str, Float[Tensor, "side side"]]]:
    """Return each word of the prompt with the mean of the heat maps of its tokens."""
    return [(word, maps[tokens].mean(0)) for word, tokens in text_encoder.words(prompt)]


def render_maps(rows: list[tuple[Image.Image, list[tuple[str, Float[Tensor, "side side"]]]]]) -> Image.Image:
    """Return a page with a row per image: the image, then the heat map of each word over it. Each map is scaled to its
    own range, so colors compare the pixels of a map, not different words."""
    cells = []
    for image, words in rows:
        base = enlarged(image, MAP_WIDTH).convert("RGB")
        cells.append([("", base), *((word, _overlay(base, heat)) for word, heat in words)])
    width, height = cells[0][0][1].size
    columns = max(len(row) for row in cells)
    page = Image.new("RGB", (columns * (width + 2) - 2, len(cells) * (LABEL_HEIGHT + height + 2) - 2))
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(cells):
        for j, (word, cell) in enumerate(row):
            x, y = j * (width + 2), i * (LABEL_HEIGHT + height + 2)
            draw.text((x + 2, y + 1), word, fill="white", font=label_font(word))
            page.paste(cell, (x, y + LABEL_HEIGHT))
    return page


def _image_grid(images: list[Image.Image], columns: int) -> Image.Image:
    return grid([enlarged(image, FRAME_WIDTH).convert("RGB") for image in images], columns)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (2 * left.width + 8, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 8, 0))
    return both


def _overlay(image: Image.Image, heat: Float[Tensor, "side side"]) -> Image.Image:
    low, high = heat.min(), heat.max()
    (gray,) = to_pillow(((heat - low) / (high - low).clamp(min=1e-12) * 2 - 1)[None, None])
    colors = ImageOps.colorize(gray.resize(image.size, Image.Resampling.BICUBIC), "navy", "yellow", mid="red")
    return Image.blend(image, colors, 0.5)
