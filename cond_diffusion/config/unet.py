"""What the UNet's shape is, in names of our own, and as the JSON that diffusers keeps beside the weights.

`to_diffusers` and `from_diffusers` are the only place that knows both.
"""

from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from cond_diffusion.config.schema import from_json, section
from cond_diffusion.errors import UserError, refuse_other_values


@section("unet")
@dataclass(frozen=True)
class UNetConfig:
    """The network's shape. Levels are counted from the highest resolution; each halves height and width."""

    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(32, 64), min_length=1, description="width of each level, the highest resolution first"
    )
    attention: tuple[bool, ...] = Field(
        default=(False, True), description="whether each level has self- and cross-attention; the middle always has"
    )
    num_heads: int | tuple[int, ...] = Field(
        default=4, description="attention heads: one number, or one for each level"
    )
    blocks_per_level: int = Field(
        default=1, ge=1, description="residual blocks on the way down; one more on the way up"
    )
    num_groups: int = Field(default=32, ge=1, description="groups of the group norms")
    norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of the group norms")
    linear_projection: bool = Field(
        default=False, description="store the projections around attention as linear layers, as Stable Diffusion 2 does"
    )
    in_channels: int | None = Field(default=None, description="channels of x_t; default: from the data")
    sample_size: int | None = Field(default=None, description="side of x_t; default: from the data")
    context_dim: int | None = Field(default=None, description="width of the text embeddings; default: from the encoder")

    def __post_init__(self) -> None:
        for name, values in (("attention", self.attention), ("num_heads", self.heads)):
            if len(values) != len(self.channels):
                raise UserError(f"unet.{name}: {len(values)} entries for the {len(self.channels)} of unet.channels")
        for width, heads in zip(self.channels, self.heads, strict=True):
            if width % self.num_groups:
                raise UserError(f"unet.channels: {width} must be divisible by unet.num_groups ({self.num_groups})")
            if heads < 1 or width % heads:
                raise UserError(f"unet.channels: {width} must be divisible by its unet.num_heads ({heads})")
        if self.channels[0] % 2:
            raise UserError(f"unet.channels: {self.channels[0]} must be even: half of it are cosines of t, half sines")

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of heads of each level."""
        return (self.num_heads,) * len(self.channels) if isinstance(self.num_heads, int) else self.num_heads


# What diffusers' UNet can be told, and ours does in one way only.
_DOES_ONLY: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
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
        "_class_name": _DOES_ONLY["_class_name"],
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
    fields = dict(fields)
    refuse_other_values(fields, _DOES_ONLY, "UNet config")
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
    ours = {
        "channels": channels,
        "attention": attention,
        "num_heads": take("attention_head_dim", 8),
        "blocks_per_level": take_one("layers_per_block", 2),
        "num_groups": take("norm_num_groups", 32),
        "norm_eps": take("norm_eps", 1e-5),
        "linear_projection": take("use_linear_projection", False),
        "in_channels": in_channels,
        "sample_size": take_one("sample_size", None),
        "context_dim": take_one("cross_attention_dim", 1280),
    }
    if fields:
        raise UserError(f"UNet config: {min(fields)} is not a field that this UNet knows")
    return from_json(UNetConfig, ours, "UNet config")
