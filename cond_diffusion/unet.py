"""The denoising network: a UNet (Ronneberger et al. 2015) with timestep embedding and cross-attention to the text.

The weights' names, shapes and meaning on disk are those of diffusers' `UNet2DConditionModel`, so each opens what the
other wrote. Inside, `UNetConfig` has names of our own; `to_diffusers` and `from_diffusers` are the only place that
knows both.
"""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cond_diffusion.errors import UserError, first_line, refuse_other_values
from cond_diffusion.layers import (
    Downsample,
    ResidualBlock,
    SpatialTransformer,
    TimestepMLP,
    Upsample,
    timestep_embedding,
)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

ProjectedContext = list[tuple[Tensor, Tensor]]
"""The context's keys and values for each of the network's transformers, in the order in which it meets them."""


@dataclass(frozen=True)
class UNetConfig:
    """The network's shape. Levels are counted from the highest resolution; each halves height and width.

    channels: the width of each level; their number is the number of levels.
    attention: whether each level attends to itself and to the text; the middle always does.
    num_heads: of attention, one number for all levels or one for each.
    blocks_per_level: residual blocks of each level on the way down; there is one more on the way up.
    num_groups, norm_eps: of the group norms.
    linear_projection: whether the layers around a transformer block are stored as linear or as 1 x 1 convolutions.
    in_channels, sample_size, context_dim: what comes in: channels and side of x_t, width of the context. Training
        fills them in from the data and the text encoder.
    """

    channels: tuple[int, ...] = (32, 64)
    attention: tuple[bool, ...] = (False, True)
    num_heads: int | tuple[int, ...] = 4
    blocks_per_level: int = 1
    num_groups: int = 32
    norm_eps: float = 1e-5
    linear_projection: bool = False
    in_channels: int | None = None
    sample_size: int | None = None
    context_dim: int | None = None

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise UserError(f"unet.channels: {list(self.channels)}; expected the width of each level, at least one")
        if len(self.attention) != len(self.channels):
            raise UserError(
                f"unet.attention: {len(self.attention)} entries for the {len(self.channels)} of unet.channels"
            )
        if len(self.heads) != len(self.channels):
            raise UserError(f"unet.num_heads: {len(self.heads)} entries for the {len(self.channels)} of unet.channels")
        for width, heads in zip(self.channels, self.heads, strict=True):
            if self.num_groups < 1 or width % self.num_groups:
                raise UserError(f"unet.channels: {width} must be divisible by unet.num_groups ({self.num_groups})")
            if heads < 1 or width % heads:
                raise UserError(f"unet.channels: {width} must be divisible by its unet.num_heads ({heads})")
        if self.blocks_per_level < 1:
            raise UserError(f"unet.blocks_per_level: {self.blocks_per_level} must be at least 1")

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of heads of each level."""
        return (self.num_heads,) * len(self.channels) if isinstance(self.num_heads, int) else self.num_heads


class DownLevel(nn.Module):
    """Residual blocks, each with attention behind it if the level has any, then half the resolution."""

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SpatialTransformer], downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([Downsample(resnets[-1].conv2.out_channels)] if downsample else [])

    def forward(self, x: Tensor, time: Tensor, context: ProjectedContext) -> tuple[Tensor, list[Tensor]]:
        """Return the map that goes on, and all those that the way up will read, in the order in which they arose."""
        skips = []
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(x, time)
            if attention is not None:
                x = attention(x, context[attention.number])
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, resnets: list[ResidualBlock], attention: SpatialTransformer) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention])

    def forward(self, x: Tensor, time: Tensor, context: ProjectedContext) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context[self.attentions[0].number])
        return self.resnets[1](x, time)


class UpLevel(nn.Module):
    """Residual blocks that each read one more map from the way down, then twice the resolution."""

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SpatialTransformer], upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([Upsample(resnets[-1].conv2.out_channels)] if upsample else [])

    def forward(self, x: Tensor, time: Tensor, context: ProjectedContext, skips: list[Tensor]) -> Tensor:
        """Take the maps that this level reads off the end of `skips`."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if attention is not None:
                x = attention(x, context[attention.number])
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """Predict eps_hat from x_t, t and the context."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if config.in_channels is None or config.context_dim is None:
            raise ValueError("UNetConfig.in_channels and context_dim must be given: the UNet cannot guess its input")
        self.config = config
        widths, context_dim = config.channels, config.context_dim
        time_dim = 4 * widths[0]

        def resnets(in_widths: list[int], width: int) -> list[ResidualBlock]:
            return [ResidualBlock(w, width, time_dim, config.num_groups, config.norm_eps) for w in in_widths]

        def attentions(level: int, count: int) -> list[SpatialTransformer]:
            shape = (widths[level], context_dim, config.heads[level], config.num_groups, config.linear_projection)
            return [SpatialTransformer(*shape) for _ in range(count)]

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], time_dim)

        per_level, last = config.blocks_per_level, len(widths) - 1
        skips = [widths[0]]  # the widths of the maps that the way down leaves for the way up
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = resnets([skips[-1], *[width] * (per_level - 1)], width)
            attend = attentions(level, per_level if config.attention[level] else 0)
            self.down_blocks.append(DownLevel(blocks, attend, downsample=level < last))
            skips += [width] * (per_level + (level < last))

        self.mid_block = Middle(resnets([widths[-1]] * 2, widths[-1]), attentions(last, 1)[0])

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            blocks = resnets([w + skips.pop() for w in [below, *[width] * per_level]], width)
            attend = attentions(level, per_level + 1 if config.attention[level] else 0)
            self.up_blocks.append(UpLevel(blocks, attend, upsample=level > 0))
            below = width

        self.conv_norm_out = nn.GroupNorm(config.num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

        self._transformers = tuple(module for module in self.modules() if isinstance(module, SpatialTransformer))
        for number, transformer in enumerate(self._transformers):
            transformer.number = number
        self._start_as_identity()

    def project_context(self, context: Float[Tensor, "b l d"]) -> ProjectedContext:
        """Return the context's keys and values for every cross-attention, to be given to `forward` in its place."""
        return [transformer.transformer_blocks[0].attn2.keys_values(context) for transformer in self._transformers]

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Int64[Tensor, " b"],
        context: Float[Tensor, "b l d"] | ProjectedContext,
    ) -> Float[Tensor, "b c h w"]:
        """Return eps_hat. `context` is the text's embeddings, or `project_context` of them where they are used
        again."""
        projected = self.project_context(context) if isinstance(context, Tensor) else context
        x = self.conv_in(x_t)
        time = self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(x.dtype))
        skips = [x]
        for level in self.down_blocks:
            x, left = level(x, time, projected)
            skips += left
        x = self.mid_block(x, time, projected)
        for level in self.up_blocks:
            x = level(x, time, projected, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _start_as_identity(self) -> None:
        """Begin with eps_hat = x_t, normalised: right where noise is nearly all there is, and a place to learn from.

        The last layer of every branch that is added to its input starts at zero (Dhariwal and Nichol 2021), so every
        block starts as the identity. What `conv_in` makes of x_t reaches `conv_out` through the last shortcut, and x
        = silu(x) - silu(-x): a pair of channels carries each channel of x_t past the last activation unharmed.
        """
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                _zero(module.conv2)
            elif isinstance(module, SpatialTransformer):
                _zero(module.proj_out)
        _zero(self.conv_out)
        width, channels = self.config.channels[0], self.conv_in.in_channels
        pairs = min(channels, width // 2)
        with torch.no_grad():
            self.conv_in.bias.zero_()
            self.conv_in.weight[: 2 * pairs] = 0
            shortcut = self.up_blocks[-1].resnets[-1].conv_shortcut
            _zero(shortcut)
            shortcut.weight[:, -width:, 0, 0] = torch.eye(width)
            for i in range(pairs):
                for channel, sign in ((2 * i, 1.0), (2 * i + 1, -1.0)):
                    self.conv_in.weight[channel, i, 1, 1] = sign
                    self.conv_out.weight[i, channel, 1, 1] = sign

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json` and the weights, as diffusers does."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(to_diffusers(self.config), indent=2) + "\n")
        weights = {name: weight.detach().contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "UNet":
        """Load what `save_pretrained`, ours or diffusers', wrote; raise UserError if files miss, are cut short or do
        not fit."""
        folder = Path(folder)
        try:
            unet = cls(from_diffusers(json.loads((folder / CONFIG_NAME).read_text())))
            unet.load_state_dict(load_file(folder / WEIGHTS_NAME))
        except FileNotFoundError as error:
            raise UserError(f"{folder} is no UNet: there is no {Path(error.filename or str(error)).name}") from error
        except (SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{folder}: a file is damaged or was cut short: {first_line(error)}") from error
        except RuntimeError as error:  # what load_state_dict raises for missing, unknown or misshapen weights
            raise UserError(
                f"{folder}: the weights are not those of its {CONFIG_NAME}: {' '.join(str(error).split())}"
            ) from error
        return unet.eval()


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


# What diffusers' UNet can be told, and ours does in one way only.
_DOES_ONLY: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
# Both values mean the same to us: diffusers' fused attention ignores it as well.
_IGNORED = {"upcast_attention"}


def to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """Return the `config.json` that `UNet2DConditionModel` reads."""
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)],
        # A misnomer that diffusers keeps for its old checkpoints: it holds the number of heads, not their width.
        "attention_head_dim": list(config.heads),
        "layers_per_block": config.blocks_per_level,
        "norm_num_groups": config.num_groups,
        "norm_eps": config.norm_eps,
        "use_linear_projection": config.linear_projection,
        "cross_attention_dim": config.context_dim,
    }


def from_diffusers(fields: dict[str, Any]) -> UNetConfig:
    """Invert `to_diffusers`; raise UserError, naming the field, for what our UNet does not do."""
    fields = {key: value for key, value in fields.items() if not key.startswith("_") and key not in _IGNORED}

    def take(key: str, default: Any) -> Any:
        value = fields.pop(key, default)
        return tuple(value) if isinstance(value, list) else value

    def take_one(key: str, default: Any) -> Any:
        if isinstance(value := take(key, default), tuple):
            raise refuse(key, list(value), "one number for all levels and sides")
        return value

    def refuse(key: str, value: Any, expected: Any) -> UserError:
        return UserError(f"UNet config: {key}: {value!r} is not supported; expected {expected}")

    refuse_other_values(fields, _DOES_ONLY, "UNet config")
    channels = take("block_out_channels", (320, 640, 1280, 1280))
    down = take("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up = take("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    if unknown := set(down) - {"CrossAttnDownBlock2D", "DownBlock2D"}:
        raise refuse("down_block_types", min(unknown), "CrossAttnDownBlock2D or DownBlock2D")
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    mirrored = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    if up != mirrored:
        raise refuse("up_block_types", up, mirrored)
    in_channels = take("in_channels", 4)
    if (out_channels := take("out_channels", 4)) != in_channels:
        raise refuse("out_channels", out_channels, in_channels)
    config = UNetConfig(
        channels=channels,
        attention=attention,
        num_heads=take("attention_head_dim", 8),
        blocks_per_level=take_one("layers_per_block", 2),
        num_groups=take("norm_num_groups", 32),
        norm_eps=take("norm_eps", 1e-5),
        linear_projection=take("use_linear_projection", False),
        in_channels=in_channels,
        sample_size=take_one("sample_size", None),
        context_dim=take_one("cross_attention_dim", 1280),
    )
    if fields:
        raise UserError(f"UNet config: {min(fields)} is not a field that this UNet knows")
    return config
