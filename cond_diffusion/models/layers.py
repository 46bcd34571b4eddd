"""Layers of the UNet: timestep embedding, residual block, attention, transformer block, down- and upsampling.

Submodules have the names of diffusers' `UNet2DConditionModel`, since names are the keys of weights on disk.
Shapes: b batch, c channels, h height, w width, p positions (h w flattened), l tokens, d width, n heads, k head width.
"""

import math
from collections import OrderedDict
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

MAX_KEYS_UNFUSED = 128  # up to here plain products are faster than torch's fused attention on a CPU (measured)
NORM_LANES = 16  # in bf16 on a CPU, torch's group norm is slow unless this divides a group's channels (measured)

KeysValues = tuple[Float[Tensor, "b n l k"], Float[Tensor, "b n l k"]]

ProjectedContext = list[tuple[Tensor, Tensor]]
"""Keys and values of the context for each transformer of a network, in the order of the forward pass."""


def timestep_embedding(t: Int64[Tensor, " b"], dim: int) -> Float[Tensor, "b dim"]:
    """Return cosines, then sines, of t at geometrically spaced frequencies (Vaswani et al. 2017, section 3.5)."""
    exponents = torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def timestep_mlp(in_dim: int, dim: int) -> nn.Sequential:
    """Return the two-layer MLP on the timestep embedding, whose output conditions every residual block."""
    layers = {"linear_1": nn.Linear(in_dim, dim), "act": nn.SiLU(), "linear_2": nn.Linear(dim, dim)}
    return nn.Sequential(OrderedDict(layers))


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu and He 2018); in fp32 where torch's kernel for half precision is slow."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        is_fast = input.device.type != "cpu" or (self.num_channels // self.num_groups) % NORM_LANES == 0
        if is_fast or input.dtype.itemsize > 2:
            return super().forward(input)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


def zero_(layer: nn.Module) -> None:
    """Initialize the last layer of a network or of a residual branch to zero (Dhariwal and Nichol 2021)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """Two convolutions with a timestep bias between them, and a shortcut (He et al. 2016; Ho et al. 2020, app. B)."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNorm(num_groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        zero_(self.conv2)
        # None where widths agree, as in diffusers.
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Float[Tensor, "b i h w"], time: Float[Tensor, "b d"]) -> Float[Tensor, "b o h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + rearrange(self.time_emb_proj(F.silu(time)), "b c -> b c 1 1")
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def attend(
    queries: Float[Tensor, "b n p k"], keys: Float[Tensor, "b n l k"], values: Float[Tensor, "b n l k"]
) -> Float[Tensor, "b n p k"]:
    """Compute softmax(queries keys^T / sqrt(k)) values (Vaswani et al. 2017, eq. 1).

    On a CPU the fused kernel uses blocks for long rows of keys; with few keys plain products are up to three times as
    fast, forward and backward.
    """
    if queries.device.type != "cpu" or keys.shape[2] > MAX_KEYS_UNFUSED:
        return F.scaled_dot_product_attention(queries, keys, values)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)
    # In half precision, the softmax is computed in fp32, which is several times as fast as torch's kernel (measured).
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=softmax_dtype).to(values.dtype) @ values


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2); self-attention if the keys are projected from `x`."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, context: Float[Tensor, "b l d"]) -> KeysValues:
        """Project the context to keys and values; independent of x_t and t, so once per prompt is enough."""
        return self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context))

    def forward(self, x: Float[Tensor, "b p d"], keys_values: KeysValues) -> Float[Tensor, "b p d"]:
        attended = attend(self._split_heads(self.to_q(x)), *keys_values)
        return self.to_out[0](rearrange(attended, "b n p k -> b p (n k)"))

    def _split_heads(self, x: Float[Tensor, "b l nk"]) -> Float[Tensor, "b n l k"]:
        return rearrange(x, "b l (n k) -> b n l k", n=self.num_heads)


class GatedLinear(nn.Module):
    """GEGLU (Shazeer 2020): one half of the projection gates the other."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p i"]:
        (value, gate), (value_bias, gate_bias) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        # Two products instead of one that is split: splitting copies the halves, and concatenates their gradients.
        return F.linear(x, value, value_bias) * F.gelu(F.linear(x, gate, gate_bias))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and a linear layer back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Identity in place of diffusers' dropout, so that the last layer is net.2 on disk.
        self.net = nn.Sequential(GatedLinear(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each with layer norm before it and residual."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Float[Tensor, "b p d"], context: KeysValues) -> Float[Tensor, "b p d"]:
        normed = self.norm1(x)
        x = x + self.attn1(normed, self.attn1.keys_values(normed))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Residual transformer on the flattened positions of a feature map (Rombach et al. 2022, section 3.3)."""

    def __init__(
        self, channels: int, context_dim: int, num_heads: int, num_groups: int, linear_projection: bool
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(num_groups, channels, eps=1e-6)
        # A 1 x 1 convolution is a linear layer at each position; only the shapes of the weights on disk differ.
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, num_heads)])
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        zero_(self.proj_out)

    def keys_values(self, context: Float[Tensor, "b l d"]) -> KeysValues:
        """Project the context to keys and values of the cross-attention."""
        return cast(TransformerBlock, self.transformer_blocks[0]).attn2.keys_values(context)

    def forward(self, x: Float[Tensor, "b c h w"], context: KeysValues) -> Float[Tensor, "b c h w"]:
        hidden = rearrange(self.norm(x), "b c h w -> b (h w) c")
        hidden = F.linear(hidden, self.proj_in.weight.flatten(1), self.proj_in.bias)
        hidden = self.transformer_blocks[0](hidden, context)
        hidden = F.linear(hidden, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + rearrange(hidden, "b (h w) c -> b c h w", h=x.shape[2])


def downsample(channels: int) -> nn.Sequential:
    """Return the strided convolution that halves height and width (rounded up)."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


class Upsample(nn.Module):
    """Resize to the given height and width by nearest-neighbor interpolation, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h_2 w_2"], size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
