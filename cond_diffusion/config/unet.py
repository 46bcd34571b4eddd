"""Options of the UNet, and their conversion to and from the `config.json` of diffusers' `UNet2DConditionModel`."""

from typing import Any

from pydantic.dataclasses import dataclass

from cond_diffusion.config.schema import PositiveInt, from_json, option, section
from cond_diffusion.errors import UserError, refuse_other_values


@section("unet")
@dataclass(frozen=True)
class UNetConfig:
    """The architecture of the UNet. Each level has half the height and width of the level before it."""

    channels: tuple[PositiveInt, ...] = option(
        (32, 64), "number of channels of each level, the highest resolution first", min_length=1
    )
    attention: tuple[bool, ...] = option(
        (False, True), "whether each level has self- and cross-attention; the middle block always has"
    )
    num_heads: PositiveInt | tuple[PositiveInt, ...] = option(4, "attention heads: one number, or one per level")
    blocks_per_level: PositiveInt = option(1, "residual blocks per level of the encoder; the decoder has one more")
    num_groups: PositiveInt = option(32, "groups of the group norms")
    norm_eps: float = option(1e-5, "epsilon of the group norms", gt=0, allow_inf_nan=False)
    linear_projection: bool = option(
        False, "store the projections around attention as linear layers, as Stable Diffusion 2 does"
    )
    middle_block: bool = option(True, "whether there is a middle block; small BK-SDM models have none")
    in_channels: PositiveInt | None = option(None, "channels of x_t; default: from the data")
    sample_size: PositiveInt | None = option(None, "height and width of x_t; default: from the data")
    context_dim: PositiveInt | None = option(None, "width of the text embeddings; default: from the encoder")

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


MIDDLE_BLOCK = "UNetMidBlock2DCrossAttn"
# Fields of diffusers' config of which one value is supported.
_ONLY_SUPPORTED: dict[str, Any] = {
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


def from_diffusers(fields: dict[str, Any]) -> UNetConfig:
    """Convert the config of diffusers' `UNet2DConditionModel`; inverse of `to_diffusers`.

    Raises:
        UserError: A field or value is not supported.
    """
    fields = dict(fields)
    refuse_other_values(fields, _ONLY_SUPPORTED, "UNet config")
    fields = {key: value for key, value in fields.items() if not key.startswith("_") and key not in _IGNORED}

    def take(key: str, default: Any) -> Any:
        value = fields.pop(key, default)
        return tuple(value) if isinstance(value, list) else value

    def take_one(key: str, default: Any) -> Any:
        if isinstance(value := take(key, default), tuple):
            raise unsupported(key, list(value), "one number for all levels and sides")
        return value

    def unsupported(key: str, value: Any, expected: Any) -> UserError:
        return UserError(f"UNet config: {key}: {value!r} is not supported; expected {expected}")

    channels = take("block_out_channels", (320, 640, 1280, 1280))
    down = take("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up = take("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    if unknown := set(down) - {"CrossAttnDownBlock2D", "DownBlock2D"}:
        raise unsupported("down_block_types", min(unknown), "CrossAttnDownBlock2D or DownBlock2D")
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    mirrored = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    if up != mirrored:
        raise unsupported("up_block_types", up, mirrored)
    middle = take("mid_block_type", MIDDLE_BLOCK)
    if middle not in (MIDDLE_BLOCK, None):
        raise unsupported("mid_block_type", middle, f"{MIDDLE_BLOCK} or null")
    in_channels = take("in_channels", 4)
    if (out_channels := take("out_channels", 4)) != in_channels:
        raise unsupported("out_channels", out_channels, in_channels)
    ours = {
        "channels": channels,
        "attention": attention,
        "num_heads": take("attention_head_dim", 8),
        "blocks_per_level": take_one("layers_per_block", 2),
        "num_groups": take("norm_num_groups", 32),
        "norm_eps": take("norm_eps", 1e-5),
        "linear_projection": take("use_linear_projection", False),
        "middle_block": middle is not None,
        "in_channels": in_channels,
        "sample_size": take_one("sample_size", None),
        "context_dim": take_one("cross_attention_dim", 1280),
    }
    if unknown := [key for key, value in fields.items() if value not in (None, False)]:  # options that are off
        raise UserError(f"UNet config: {min(unknown)}: this field is not supported")
    return from_json(UNetConfig, ours, "UNet config")
