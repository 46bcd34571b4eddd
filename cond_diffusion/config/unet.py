"""Options of the UNet, and their conversion to and from the `config.json` of diffusers' `UNet2DConditionModel`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cond_diffusion.config.schema import Depth, PositiveFloat, PositiveInt, Width, from_json, option, section
from cond_diffusion.errors import UserError, refuse_other_values

Levels = Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)]
MIDDLE_BLOCK: Literal["UNetMidBlock2DCrossAttn"] = "UNetMidBlock2DCrossAttn"


@section("unet")
class UNetConfig:
    """The architecture of the UNet. Each level has half the height and width of the level before it."""

    channels: Levels = option((32, 64), "number of channels of each level, the highest resolution first")
    attention: tuple[bool, ...] = option(
        (False, True), "whether each level has self- and cross-attention; the middle block always has"
    )
    num_heads: PositiveInt | tuple[PositiveInt, ...] = option(4, "attention heads: one number, or one per level")
    blocks_per_level: Depth = option(1, "residual blocks per level of the encoder; the decoder has one more")
    num_groups: Width = option(32, "groups of the group norms")
    norm_eps: PositiveFloat = option(1e-5, "epsilon of the group norms")
    linear_projection: bool = option(
        False, "store the projections around attention as linear layers, as Stable Diffusion 2 does"
    )
    middle_block: bool = option(True, "whether there is a middle block; small BK-SDM models have none")
    in_channels: Width | None = option(None, "channels of x_t; default: from the data")
    sample_size: Width | None = option(None, "height and width of x_t; default: from the data")
    context_dim: Width | None = option(None, "width of the text embeddings; default: from the encoder")

    def __post_init__(self) -> None:
        for name, values in (("attention", self.attention), ("num_heads", self.heads)):
            if len(values) != (levels := len(self.channels)):
                raise UserError(f"unet.{name}: {len(values)} values; expected {levels}, one per level of unet.channels")
        for channels, heads in zip(self.channels, self.heads, strict=True):
            if channels % self.num_groups:
                raise UserError(f"unet.channels: {channels} must be divisible by unet.num_groups ({self.num_groups})")
            if heads < 1 or channels % heads:
                raise UserError(f"unet.channels: {channels} must be divisible by its unet.num_heads ({heads})")
        if self.channels[0] % 2:
            raise UserError(f"unet.channels: {self.channels[0]} must be even; half encode t as cosines, half as sines")

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of heads of each level."""
        return (self.num_heads,) * len(self.channels) if isinstance(self.num_heads, int) else self.num_heads


# Fields of diffusers' config of which one value is supported. Others must be None or False, which is off.
_ONLY_SUPPORTED: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
# Without effect: diffusers' fused attention ignores it as well.
_IGNORED = {"upcast_attention"}


def to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """Return the config of diffusers' `UNet2DConditionModel`."""
    return {
        "_class_name": _ONLY_SUPPORTED["_class_name"],
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)],
        "mid_block_type": MIDDLE_BLOCK if config.middle_block else None,
        # A misnomer that diffusers keeps for its old checkpoints: it holds the number of heads, not their width.
        "attention_head_dim": list(config.heads),
        "layers_per_block": config.blocks_per_level,
        "norm_num_groups": config.num_groups,
        "norm_eps": config.norm_eps,
        "use_linear_projection": config.linear_projection,
        "cross_attention_dim": config.context_dim,
    }


@dataclass(frozen=True)
class _DiffusersConfig:
    """The fields of diffusers' `UNet2DConditionModel` that vary, with its defaults."""

    block_out_channels: Levels = (320, 640, 1280, 1280)
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] | None = MIDDLE_BLOCK
    attention_head_dim: Width | tuple[Width, ...] = 8
    layers_per_block: Depth = 2
    norm_num_groups: Width = 32
    norm_eps: PositiveFloat = 1e-5
    use_linear_projection: bool = False
    in_channels: Width = 4
    out_channels: Width = 4
    sample_size: Width | None = None
    cross_attention_dim: Width = 1280


def from_diffusers(fields: dict[str, Any], where: str | Path = "UNet config") -> UNetConfig:
    """Convert the config of diffusers' `UNet2DConditionModel`; inverse of `to_diffusers`."""
    fields = dict(fields)
    refuse_other_values(fields, _ONLY_SUPPORTED, where)
    theirs = from_json(_DiffusersConfig, fields, where)
    known = {*vars(theirs), *_IGNORED}
    if unknown := [  # options that are on
        key
        for key, value in fields.items()
        if key not in known and not key.startswith("_") and value not in (None, False)
    ]:
        raise UserError(f"{where}: {min(unknown)}: this field is not supported")
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in theirs.down_block_types)
    mirrored = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    for key, expected in (("up_block_types", mirrored), ("out_channels", theirs.in_channels)):
        if (value := getattr(theirs, key)) != expected:
            raise UserError(f"{where}: {key}: {value!r:.200} is not supported; expected {expected!r}")
    ours = {
        "channels": theirs.block_out_channels,
        "attention": attention,
        "num_heads": theirs.attention_head_dim,
        "blocks_per_level": theirs.layers_per_block,
        "num_groups": theirs.norm_num_groups,
        "norm_eps": theirs.norm_eps,
        "linear_projection": theirs.use_linear_projection,
        "middle_block": theirs.mid_block_type is not None,
        "in_channels": theirs.in_channels,
        "sample_size": theirs.sample_size,
        "context_dim": theirs.cross_attention_dim,
    }
    return from_json(UNetConfig, ours, where)
