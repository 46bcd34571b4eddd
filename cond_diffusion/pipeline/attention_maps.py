"""Which places of the picture each word was read for: cross-attention, averaged over the chain (DAAM, Tang et al. 2022,
"What the DAAM: Interpreting Stable Diffusion Using Cross Attention").
"""

import math
from types import TracebackType
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional as F

from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.images import enlarged, to_pillow
from cond_diffusion.models.layers import Attention, TransformerBlock
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet

CELL = 112  # pixels that a picture under a heat map is at least wide
LABEL_HEIGHT = 14


class AttentionMaps:
    """Listens to a UNet's cross-attentions while the context is open, and is told of each step as a `Watch`.

    maps: for each picture a heat map for each token, how much its places attend to it, averaged over steps, heads and
    levels, the coarser levels being interpolated to `side`.
    """

    def __init__(self, unet: UNet, side: int) -> None:
        self.blocks = [module for module in unet.modules() if isinstance(module, TransformerBlock)]
        self.side = side
        self.heard: list[Float[Tensor, "n l h w"]] = []  # since the last step
        self.sums: dict[int, Tensor] = {}  # of this batch, by their side
        self.count = 0
        self.maps: list[Float[Tensor, "l side side"]] = []

    def __enter__(self) -> "AttentionMaps":
        self.hooks = [block.attn2.register_forward_pre_hook(self._listen) for block in self.blocks]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def _listen(self, attention: Any, inputs: tuple[Any, ...]) -> None:
        x, (keys, _) = inputs
        self.heard.append(attention_weights(attention, x, keys))

    def __call__(self, step: Step, number: int, total: int) -> None:
        """Add what was heard in this step; rows behind the pictures' own are the unconditional pass's."""
        for weights in self.heard:
            self.sums[weights.shape[-1]] = self.sums.get(weights.shape[-1], 0) + weights[: len(step.x)]
            self.count += 1
        self.heard = []
        if number == total - 1:
            size = (self.side, self.side)
            levels = [F.interpolate(level, size=size, mode="bilinear") for level in self.sums.values()]
            self.maps += [*(torch.stack(levels).sum(0) / self.count).cpu()]
            self.sums, self.count = {}, 0


def attention_weights(
    attention: Attention, x: Float[Tensor, "b p d"], keys: Float[Tensor, "b n l k"]
) -> Float[Tensor, "b l h w"]:
    """Return how much each place attends to each token, averaged over heads: at every place they add up to 1."""
    queries = rearrange(attention.to_q(x), "b p (n k) -> b n p k", n=attention.num_heads)
    scores = einsum(queries, keys, "b n p k, b n l k -> b n p l") / math.sqrt(keys.shape[-1])
    return rearrange(scores.softmax(-1).mean(1), "b (h w) l -> b l h w", h=math.isqrt(x.shape[1]))


def maps_of_words(
    prompt: str, maps: Float[Tensor, "l side side"], text_encoder: TextEncoder
) -> list[tuple[str, Float[Tensor, "side side"]]]:
    """Return each word of the prompt with its heat map, the mean over its tokens."""
    return [(word, maps[tokens].mean(0)) for word, tokens in text_encoder.words(prompt)]


def sheet(rows: list[tuple[Image.Image, list[tuple[str, Float[Tensor, "side side"]]]]]) -> Image.Image:
    """Lay out a row for each picture: the picture, then under each word its heat map over the picture.

    Each heat map runs from its own least to its own greatest value: colours compare places, not words.
    """
    cells = [[("", enlarged(picture, CELL).convert("RGB"))] for picture, _ in rows]
    for row, (_, words) in zip(cells, rows, strict=True):
        row += [(word, _overlay(row[0][1], heat)) for word, heat in words]
    width, height = cells[0][0][1].size
    columns = max(len(row) for row in cells)
    page = Image.new("RGB", (columns * (width + 2) - 2, len(cells) * (LABEL_HEIGHT + height + 2) - 2))
    draw = ImageDraw.Draw(page)
    for y, row in enumerate(cells):
        for x, (word, cell) in enumerate(row):
            corner = (x * (width + 2), y * (LABEL_HEIGHT + height + 2))
            draw.text((corner[0] + 2, corner[1] + 1), word, fill="white")
            page.paste(cell, (corner[0], corner[1] + LABEL_HEIGHT))
    return page


def _overlay(picture: Image.Image, heat: Float[Tensor, "side side"]) -> Image.Image:
    least, greatest = heat.min(), heat.max()
    (grey,) = to_pillow(((heat - least) / (greatest - least).clamp(min=1e-12) * 2 - 1)[None, None])
    colours = ImageOps.colorize(grey.resize(picture.size, Image.Resampling.BICUBIC), "navy", "yellow", mid="red")
    return Image.blend(picture, colours, 0.5)
