"""Classifier-free guidance (Ho and Salimans 2022): one network, asked with the text and without it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cond_diffusion.diffusion.schedule import per_example


def drop_captions(
    context: Float[Tensor, "b l d"], null_context: Float[Tensor, "l d"], dropped: Bool[Tensor, " b"]
) -> Float[Tensor, "b l d"]:
    """Put the null context in the place of those that are dropped (Ho and Salimans 2022, algorithm 1)."""
    return torch.where(dropped.to(context.device)[:, None, None], null_context, context)


def guided(
    network: Callable[[Tensor, Tensor, Any], Tensor],
    context: Float[Tensor, "b l d"],
    null_context: Float[Tensor, "b l d"],
    guidance_scale: Float[Tensor, " b"],
    *,
    interval: Sequence[int] | None = None,
    rescale: float = 0.0,
    project: Callable[[Tensor], Any] = lambda context: context,
) -> Callable[[Tensor, int], Tensor]:
    """Return (x_t, t) -> uncond + w (cond - uncond), w one for each example (eq. 6, whose weight is w - 1).

    Every prediction is a mixture of x_t and eps, so whatever the network predicts, its eps is guided by the same w.
    Both passes go through the network in one batch, those with the text first; for examples of w = 1, and where the
    interval says so, the unconditional one counts for nothing and is not run.

    interval: the first and the last timestep at which guidance acts (Kynkäänniemi et al. 2024); None is all.
    rescale: phi, how much of the deviation that guidance adds to the output is taken back (Lin et al. 2023, section
        3.4).
    project: what is computed of the context once, in advance, for every call of the network.
    """
    first, last = (-math.inf, math.inf) if interval is None else interval
    guided_rows = (guidance_scale != 1).nonzero().squeeze(1).to(context.device)  # the rows that guidance changes
    weight = guidance_scale.to(context)[guided_rows]
    alone = project(context)
    both = project(torch.cat([context, null_context[guided_rows]])) if len(guided_rows) else alone

    def unguided(x_t: Float[Tensor, "b c h w"], t: int) -> Float[Tensor, "b c h w"]:
        return network(x_t, torch.full((len(x_t),), t, device=x_t.device), alone)

    def guided_forward(x_t: Float[Tensor, "b c h w"], t: int) -> Float[Tensor, "b c h w"]:
        twice = torch.cat([x_t, x_t[guided_rows]])
        cond, uncond = network(twice, torch.full((len(twice),), t, device=x_t.device), both).split(
            [len(x_t), len(guided_rows)]
        )
        output = uncond + per_example(weight, uncond) * (cond[guided_rows] - uncond)
        if rescale:
            output = rescale_deviation(output, cond[guided_rows], rescale)
        return cond.index_copy(0, guided_rows, output)

    return lambda x_t, t: guided_forward(x_t, t) if len(guided_rows) and first <= t <= last else unguided(x_t, t)


def rescale_deviation(
    guided_output: Float[Tensor, "b *chw"], cond: Float[Tensor, "b *chw"], phi: float
) -> Float[Tensor, "b *chw"]:
    """Go back by phi to the deviation that the output had without guidance (Lin et al. 2023, eq. 15 and 16).

    High scales widen the output, and pictures come out too bright or too dark.
    """
    stretch = cond.flatten(1).std(1) / guided_output.flatten(1).std(1)
    return per_example(phi * stretch + 1 - phi, guided_output) * guided_output


def threshold_dynamically(x_0_hat: Float[Tensor, "b *chw"], share: float) -> Float[Tensor, "b *chw"]:
    """Cut each picture at s, the size that `share` of its pixels stay below, and divide by s (Saharia et al. 2022).

    s is at least 1: a picture that fits is left alone.
    """
    s = x_0_hat.flatten(1).abs().float().quantile(share, dim=1).clamp(min=1)
    bound = per_example(s, x_0_hat)
    return x_0_hat.clamp(-bound, bound) / bound
