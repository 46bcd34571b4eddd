"""The denoising network: a UNet (Ronneberger et al. 2015) with timestep embedding and cross-attention to the text.

Names, shapes and meaning of the weights on disk are those of diffusers' `UNet2DConditionModel`; either library loads
the files of the other.
"""

import os
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from cond_diffusion.config.schema import from_json, read_json
from cond_diffusion.config.unet import UNetConfig, from_diffusers, to_diffusers
from cond_diffusion.errors import UserError, first_line, user_errors
from cond_diffusion.files import cache_folder, load_tensors, save_tensors, write_json
from cond_diffusion.hub import download, in_half, is_hub_id, variant_of
from cond_diffusion.models import layers

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
MAX_COMPILED_SHAPES = 64  # of a class of blocks


class DownLevel(nn.Module):
    """Residual blocks, each followed by attention where there is one, then downsampling by 2; or the middle block."""

    def __init__(
        self, resnets: list[layers.ResidualBlock], attentions: list[layers.SpatialTransformer], downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([layers.downsample(resnets[-1].conv2.out_channels)] if downsample else [])

    def forward(self, x: Tensor, time: Tensor, contexts: layers.ProjectedContext) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and the feature maps for the skip connections in order of computation."""
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


class UpLevel(nn.Module):
    """Residual blocks, each with a skip connection from the down path, then upsampling by 2."""

    def __init__(
        self, resnets: list[layers.ResidualBlock], attentions: list[layers.SpatialTransformer], upsample: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([layers.Upsample(resnets[-1].conv2.out_channels)] if upsample else [])

    def forward(self, x: Tensor, time: Tensor, contexts: layers.ProjectedContext, skips: list[Tensor]) -> Tensor:
        """Return the output; removes the feature maps of this level from the end of `skips`."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if attention is not None:
                x = attention(x, contexts.pop(0))
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """UNet that maps x_t, t and the context to the prediction (the noise, or another `PredictionKind`).

    The output of a new network is 0 (see `zero_`).

    Args:
        config: The architecture, with `in_channels` and `context_dim`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if config.in_channels is None or config.context_dim is None:
            raise ValueError("UNetConfig: in_channels and context_dim are required")
        self.config = config
        widths, context_dim = config.channels, config.context_dim
        time_dim = 4 * widths[0]

        def resnets(in_widths: list[int], width: int) -> list[layers.ResidualBlock]:
            return [layers.ResidualBlock(w, width, time_dim, config.num_groups, config.norm_eps) for w in in_widths]

        def attentions(level: int, count: int) -> list[layers.SpatialTransformer]:
            shape = (widths[level], context_dim, config.heads[level], config.num_groups, config.linear_projection)
            return [layers.SpatialTransformer(*shape) for _ in range(count)]

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = layers.timestep_mlp(widths[0], time_dim)

        per_level, last = config.blocks_per_level, len(widths) - 1
        skips = [widths[0]]  # widths of the feature maps for the skip connections
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = resnets([skips[-1], *[width] * (per_level - 1)], width)
            transformers = attentions(level, per_level if config.attention[level] else 0)
            self.down_blocks.append(DownLevel(blocks, transformers, downsample=level < last))
            skips += [width] * (per_level + (level < last))

        self.mid_block = None
        if config.middle_block:
            blocks = resnets([widths[-1]] * 2, widths[-1])  # with attention between them
            self.mid_block = DownLevel(blocks, attentions(last, 1), downsample=False)

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            blocks = resnets([w + skips.pop() for w in [below, *[width] * per_level]], width)
            transformers = attentions(level, per_level + 1 if config.attention[level] else 0)
            self.up_blocks.append(UpLevel(blocks, transformers, upsample=level > 0))
            below = width

        self.conv_norm_out = layers.GroupNorm(config.num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)
        layers.zero_(self.conv_out)

        # Modules are registered in the order of the forward pass.
        self._transformers = tuple(module for module in self.modules() if isinstance(module, layers.SpatialTransformer))

    def project_context(self, context: Float[Tensor, "b l d"]) -> layers.ProjectedContext:
        """Compute keys and values of the context for all cross-attentions; `forward` accepts them as the context."""
        return [transformer.keys_values(context) for transformer in self._transformers]

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Int64[Tensor, " b"],
        context: Float[Tensor, "b l d"] | layers.ProjectedContext,
    ) -> Float[Tensor, "b c h w"]:
        """Return the prediction.

        Args:
            x_t: Noisy images.
            t: Timesteps, counted from 0.
            context: Text embeddings, or the result of `project_context`.
        """
        # Each transformer removes its keys and values from the front of the list.
        contexts = self.project_context(context) if isinstance(context, Tensor) else [*context]
        x = self.conv_in(x_t)
        if x.device.type == "cpu":
            # Subsequent layers keep this format: convolutions are faster, and attention needs no copy to flatten.
            x = x.contiguous(memory_format=torch.channels_last)
        time = self.time_embedding(layers.timestep_embedding(t, self.config.channels[0]).to(x.dtype))
        skips = [x]
        for level in self.down_blocks:
            x, level_skips = level(x, time, contexts)
            skips += level_skips
        if self.mid_block is not None:
            x, _ = self.mid_block(x, time, contexts)
        for level in self.up_blocks:
            x = level(x, time, contexts, skips)
        # Guidance and samplers compute in the precision of x_t, also under autocast.
        return self.conv_out(F.silu(self.conv_norm_out(x))).to(x_t.dtype)

    def start_as_copy(self) -> None:
        """Initialize the network to return x_t, normalized: close to the noise at high noise levels.

        This is a good initialization for predicting epsilon only. `conv_in` and the shortcut of the last block pass x_t
        on to `conv_out`, in a pair of channels with opposite signs for each channel of x_t, because
        x = silu(x) - silu(-x).
        """
        last_shortcut = cast(layers.ResidualBlock, cast(UpLevel, self.up_blocks[-1]).resnets[-1]).conv_shortcut
        assert last_shortcut is not None  # the last block has a skip connection, and therefore more input channels
        assert self.conv_in.bias is not None
        layers.zero_(last_shortcut)
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

    def compile(self, **options: Any) -> None:
        """Compile each residual block and transformer on its first call (regional compilation).

        Names and values of the weights stay the same. Compiled code is cached in `TORCHINDUCTOR_CACHE_DIR`, by default
        in the package's cache folder, where later processes find it.

        Args:
            **options: Those of `torch.compile`.

        Raises:
            UserError: If torch's compiler for the CPU finds no C++ compiler.
        """
        # Imported here: both take seconds to import.
        from torch._dynamo import config as dynamo_config
        from torch._inductor.cpp_builder import get_cpp_compiler

        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
        on_cpu = torch.accelerator.current_accelerator(check_available=True) is None
        if on_cpu and options.get("backend", "inductor") == "inductor":
            hint = "; install g++, or set CXX to a compiler, or run without compile"
            with user_errors("compile: there is no C++ compiler", RuntimeError, hint=hint):
                get_cpp_compiler()
        # Blocks of all shapes share one cache, whose default size is 8.
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MAX_COMPILED_SHAPES)
        for module in self.modules():
            if isinstance(module, layers.ResidualBlock | layers.SpatialTransformer):
                module.compile(**options)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json` and the weights in diffusers' format."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_NAME, to_diffusers(self.config))
        weights = {name: weight.detach().contiguous() for name, weight in self.state_dict().items()}
        save_tensors(weights, folder / WEIGHTS_NAME, {"format": "pt"})

    @classmethod
    def with_weights(cls, config: UNetConfig, weights: Mapping[str, Tensor]) -> "UNet":
        """Return a network in eval mode whose parameters are the given tensors, not copies.

        Raises:
            RuntimeError: If names or shapes do not match the config.
        """
        with torch.device("meta"):  # skips random initialization
            unet = cls(config)
        unet.load_state_dict(weights, assign=True)
        return unet.eval()

    @classmethod
    def from_pretrained(
        cls, source: Path | str, *, subfolder: str = "", dtype: torch.dtype = torch.float32, **options: Any
    ) -> "UNet":
        """Load a UNet that was saved by this package or diffusers.

        Args:
            source: A folder or a Hub id.
            subfolder: Folder of the UNet in `source`: "unet" in a checkpoint.
            dtype: Type of the weights.
            **options: Those of `hub.download`.

        Raises:
            UserError: If a file is missing or damaged, or the weights do not match the config.
        """
        folder = Path(source)
        if not folder.is_dir() and is_hub_id(source):
            files = [str(PurePosixPath(subfolder, name)) for name in (CONFIG_NAME, WEIGHTS_NAME)]
            folder = download(str(source), files, **options)
        folder = folder / subfolder
        try:
            config = from_diffusers(read_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
            weights: dict[str, Tensor] = {}
            for file in weight_files(folder, WEIGHTS_NAME):
                weights |= load_tensors(file)
            unet = cls.with_weights(config, weights)
        except FileNotFoundError as error:
            raise UserError(f"{folder} is not a UNet: there is no {Path(error.filename or str(error)).name}") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: a file is damaged or truncated ({first_line(error)})") from error
        except RuntimeError as error:  # load_state_dict: missing or unexpected weights, or other shapes
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: {WEIGHTS_NAME} does not match {CONFIG_NAME} ({reason})") from error
        return unet.to(dtype)


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files of weights: one, if need be in half precision, or the shards of an index."""
    index = folder / f"{name}.index.json"
    if not (folder / name).exists() and index.exists():
        shards: Any = from_json(dict[str, str], read_json(index).get("weight_map"), f"{index}: weight_map")
        return [folder / PurePosixPath(shard).name for shard in sorted({*shards.values()})]
    return [folder / (in_half(name) if variant_of(folder, name) else name)]
