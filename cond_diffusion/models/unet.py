"""The denoising network: a UNet (Ronneberger et al. 2015) with timestep embedding and cross-attention to the text.

The weights' names, shapes and meaning on disk are those of diffusers' `UNet2DConditionModel`, so each opens what the
other wrote.
"""

import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cond_diffusion.config.unet import UNetConfig, from_diffusers, to_diffusers
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.hub import download, in_half, is_hub_id, variant_of
from cond_diffusion.models.layers import (
    Downsample,
    ProjectedContext,
    ResidualBlock,
    SpatialTransformer,
    TimestepMLP,
    Upsample,
    timestep_embedding,
)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class DownLevel(nn.Module):
    """Residual blocks, each with attention behind it if the level has any, then half the resolution."""

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SpatialTransformer], downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([Downsample(resnets[-1].conv2.out_channels)] if downsample else [])

    def forward(self, x: Tensor, time: Tensor, contexts: ProjectedContext) -> tuple[Tensor, list[Tensor]]:
        """Return the map that goes on, and all those that the way up will read, in the order in which they arose."""
        skips = []
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(x, time)
            if attention is not None:
                x = attention(x, contexts.pop(0))
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

    def forward(self, x: Tensor, time: Tensor, contexts: ProjectedContext) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, contexts.pop(0))
        return self.resnets[1](x, time)


class UpLevel(nn.Module):
    """Residual blocks that each read one more map from the way down, then twice the resolution."""

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SpatialTransformer], upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([Upsample(resnets[-1].conv2.out_channels)] if upsample else [])

    def forward(self, x: Tensor, time: Tensor, contexts: ProjectedContext, skips: list[Tensor]) -> Tensor:
        """Take the maps that this level reads off the end of `skips`."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if attention is not None:
                x = attention(x, contexts.pop(0))
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """Predict, from x_t, t and the context, the noise or what else `prediction.py` lists."""

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

        # In the order of the forward pass, in which the blocks above were registered.
        self._transformers = tuple(module for module in self.modules() if isinstance(module, SpatialTransformer))
        self._start_at_zero()

    def project_context(self, context: Float[Tensor, "b l d"]) -> ProjectedContext:
        """Return the context's keys and values for every cross-attention, to be given to `forward` in its place."""
        return [transformer.keys_values(context) for transformer in self._transformers]

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Int64[Tensor, " b"],
        context: Float[Tensor, "b l d"] | ProjectedContext,
    ) -> Float[Tensor, "b c h w"]:
        """Return the prediction. `context` is the text's embeddings, or what `project_context` made of them."""
        # Each transformer takes its own off the front of the list.
        contexts = self.project_context(context) if isinstance(context, Tensor) else [*context]
        x = self.conv_in(x_t)
        if x.device.type == "cpu":
            # All that follows keeps the format: convolutions are faster in it, and attention reads places uncopied.
            x = x.contiguous(memory_format=torch.channels_last)
        time = self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(x.dtype))
        skips = [x]
        for level in self.down_blocks:
            x, left = level(x, time, contexts)
            skips += left
        x = self.mid_block(x, time, contexts)
        for level in self.up_blocks:
            x = level(x, time, contexts, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _start_at_zero(self) -> None:
        """Begin by returning 0: the last layer of the network, and of every branch that is added to its input, is zero
        (Dhariwal and Nichol 2021).
        """
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                _zero(module.conv2)
            elif isinstance(module, SpatialTransformer):
                _zero(module.proj_out)
        _zero(self.conv_out)

    def start_as_copy(self) -> None:
        """Begin by returning x_t, normalised: the noise, where noise is nearly all there is. That is a good start for
        predicting epsilon; for other predictions it is wrong where it matters most.

        What `conv_in` makes of x_t reaches `conv_out` through the last block's shortcut, and x = silu(x) - silu(-x): a
        pair of channels carries each channel of x_t past the last activation unharmed.
        """
        last_block = cast(ResidualBlock, cast(UpLevel, self.up_blocks[-1]).resnets[-1])
        last_shortcut = last_block.conv_shortcut
        assert last_shortcut is not None  # the last block reads x_t's map beside its own input, so it has one
        assert self.conv_in.bias is not None
        _zero(last_shortcut)
        nn.init.zeros_(self.conv_in.bias)
        width, channels = self.config.channels[0], self.conv_in.in_channels
        pairs = min(channels, width // 2)
        with torch.no_grad():
            last_shortcut.weight[:, -width:, 0, 0] = torch.eye(width)
            self.conv_in.weight[: 2 * pairs] = 0
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
    def with_weights(cls, config: UNetConfig, weights: Mapping[str, Tensor]) -> "UNet":
        """Return a network whose parameters are `weights`, not copies of them; RuntimeError if they do not fit."""
        with torch.device("meta"):  # no random weights are drawn for those that are given
            unet = cls(config)
        unet.load_state_dict(weights, assign=True)
        return unet.eval()

    @classmethod
    def from_pretrained(
        cls, source: Path | str, *, subfolder: str = "", dtype: torch.dtype = torch.float32, **options: Any
    ) -> "UNet":
        """Load a UNet that this package or diffusers saved.

        Args:
            source: A folder or a hub id.
            subfolder: Where the UNet is in `source`: "unet" in a checkpoint.
            dtype: Of the weights.
            **options: Those of `hub.download`.

        Raises:
            UserError: If a file is missing, was cut short, or does not fit the others.
        """
        folder = Path(source)
        if not folder.is_dir() and is_hub_id(source):
            files = [str(PurePosixPath(subfolder, name)) for name in (CONFIG_NAME, WEIGHTS_NAME)]
            folder = download(str(source), files, **options)
        folder = folder / subfolder
        try:
            config = from_diffusers(json.loads((folder / CONFIG_NAME).read_text()))
            half = variant_of(folder, WEIGHTS_NAME)
            unet = cls.with_weights(config, load_file(folder / (in_half(WEIGHTS_NAME) if half else WEIGHTS_NAME)))
        except FileNotFoundError as error:
            raise UserError(f"{folder} is no UNet: there is no {Path(error.filename or str(error)).name}") from error
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: a file is damaged or was cut short: {first_line(error)}") from error
        except RuntimeError as error:  # what load_state_dict raises for missing, unknown or misshapen weights
            raise UserError(
                f"{folder}: the weights are not those of its {CONFIG_NAME}: {' '.join(str(error).split())}"
            ) from error
        return unet.to(dtype)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
