"""What the UNet's shape is, in names of our own, and as the JSON that diffusers keeps beside the weights.

`to_diffusers` and `from_diffusers` are the only place that knows both.
"""

from dataclasses import dataclass
from typing import Any

from cond_diffusion.errors import UserError, refuse_other_values


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
        if self.channels[0] % 2:
            raise UserError(f"unet.channels: {self.channels[0]} must be even: half of it are cosines of t, half sines")
        if not self.norm_eps > 0:
            raise UserError(f"unet.norm_eps: {self.norm_eps} must be above 0")
        if self.blocks_per_level < 1:
            raise UserError(f"unet.blocks_per_level: {self.blocks_per_level} must be at least 1")

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
