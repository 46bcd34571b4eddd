"""The network and the optimizer that training begins with."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cond_diffusion.config.run import Config, TrainConfig
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.errors import UserError
from cond_diffusion.models.latents import LatentSpace
from cond_diffusion.models.layers import ResidualBlock, SpatialTransformer
from cond_diffusion.models.lora import add_lora
from cond_diffusion.models.unet import UNet
from cond_diffusion.training.optimizer import Muon


def new_unet(config: Config, context_dim: int, space: LatentSpace, weights: Mapping[str, Tensor] | None = None) -> UNet:
    """Return a network with fresh weights, a function of the seed; or with these, and LoRA beside them if it is asked
    for.
    """
    torch.manual_seed(config.seed)  # torch draws initial weights from the global state; nothing else here does
    complete = complete_unet_config(config, context_dim, space)
    unet = UNet(complete) if weights is None else UNet.with_weights(complete, weights)
    if weights is None and config.objective.prediction == "epsilon":
        unet.start_as_copy()
    if config.train.lora_rank:
        add_lora(unet, config.train.lora_rank)
    if config.train.gradient_checkpointing:
        for module in unet.modules():
            if isinstance(module, ResidualBlock | SpatialTransformer):
                # Nothing inside draws random numbers whose state would have to be kept.
                module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    if config.train.compile:
        unet.compile()
    return unet


def new_optimizer(config: TrainConfig, unet: UNet) -> torch.optim.Optimizer:
    """Return Muon, or AdamW in its version that updates all weights in a few calls."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "muon":
        ends = [*unet.conv_in.parameters(), *unet.conv_out.parameters()]
        return Muon(trained, rate, first_and_last=ends, weight_decay=decay)
    return torch.optim.AdamW(trained, rate, weight_decay=decay, fused=True)


def in_words(unet: UNet) -> str:
    """Say how much of a network is trained, and what memory that takes beside what its activations do."""
    counts = [parameter.numel() for parameter in unet.parameters()]
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    # 4 bytes each: weights; and of what is trained a gradient, two moments (Muon has one), two averages.
    return (
        f"trains {trained / 1e6:.2f} of {sum(counts) / 1e6:.2f} million parameters: about "
        f"{(4 * sum(counts) + 20 * trained) / 1e9:.2f} GB for weights, gradients, moments and averages"
    )


def complete_unet_config(config: Config, context_dim: int, space: LatentSpace) -> UNetConfig:
    """Fill in what the data and the text encoder decide; raise UserError where `config.unet` says otherwise."""
    channels, side, _ = space.shape(config.data)
    from_data = {"in_channels": channels, "sample_size": side, "context_dim": context_dim}
    for name, value in from_data.items():
        given = getattr(config.unet, name)
        if given not in (None, value):
            raise UserError(
                f"unet.{name}: {given} does not fit the data and the text encoder; expected {value}, or nothing"
            )
    return replace(config.unet, **from_data)
