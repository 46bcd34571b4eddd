"""Classifier-free guidance (Ho and Salimans 2022): one network, asked with the text and without it."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cond_diffusion.samplers import Denoiser


def drop_captions(
    context: Float[Tensor, "b l d"], null_context: Float[Tensor, "l d"], probability: float, draw: torch.Generator
) -> Float[Tensor, "b l d"]:
    """Replace each example's context by the null context with `probability` (Ho and Salimans 2022, algorithm 1)."""
    drop = torch.rand(len(context), generator=draw, device=draw.device) < probability
    return torch.where(drop.to(context.device)[:, None, None], null_context, context)


def guided(
    network: Callable[[Tensor, Tensor, Any], Tensor],
    context: Float[Tensor, "b l d"],
    null_context: Float[Tensor, "b l d"],
    guidance_scale: float,
    *,
    project: Callable[[Tensor], Any] = lambda context: context,
) -> Denoiser:
    """Return the denoiser (x_t, t) -> uncond + w (cond - uncond) (eq. 6, whose weight is w - 1).

    Both passes go through the network in one batch; at w = 1, where the unconditional one counts for nothing, it is
    not run.
    project: what is computed of the context once, in advance, for every call of the network.
    """
    if guidance_scale == 1:
        projected = project(context)
        return lambda x_t, t: network(x_t, torch.full((len(x_t),), t, device=x_t.device), projected)

    both = project(torch.cat([null_context, context]))

    def denoiser(x_t: Float[Tensor, "b c h w"], t: int) -> Float[Tensor, "b c h w"]:
        twice = torch.cat([x_t, x_t])
        uncond, cond = network(twice, torch.full((len(twice),), t, device=x_t.device), both).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return denoiser
