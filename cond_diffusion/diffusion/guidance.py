"""Classifier-free guidance (Ho and Salimans 2022): one network, asked with the text and without it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cond_diffusion.diffusion.schedule import per_example
from cond_diffusion.errors import UserError

HIGHEST_SCALE = 10_000  # far beyond use, and far below where fp32 overflows


@dataclass(frozen=True)
class GuidanceConfig:
    """How far, when and how carefully to lean towards the text.

    interval: the first and the last timestep at which guidance acts; outside, the text is followed unguided and one
        pass is enough (Kynkäänniemi et al. 2024). None is everywhere.
    rescale: phi, how much of the deviation that guidance adds to the output is taken back (Lin et al. 2023, section
        3.4).
    dynamic_thresholding: p, above which share of the pixels of x_0_hat the largest are cut, the rest being scaled to
        [-1, 1] (Saharia et al. 2022, section 2.3). None does not.
    """

    interval: Sequence[int] | None = None
    rescale: float = 0.0
    dynamic_thresholding: float | None = None

    def __post_init__(self) -> None:
        if self.interval is not None:
            if len(self.interval) != 2:
                raise UserError(f"guidance_interval: {self.interval} is no pair; expected a first and a last timestep")
            if not 0 <= self.interval[0] <= self.interval[1]:
                raise UserError(
                    f"guidance_interval: {self.interval[0]} to {self.interval[1]} holds no timestep; "
                    "expected the lower one first, from 0 on"
                )
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale: {self.rescale} must lie between 0 (none) and 1")
        if self.dynamic_thresholding is not None and not 0 < self.dynamic_thresholding <= 1:
            raise UserError(
                f"dynamic_thresholding: {self.dynamic_thresholding} is a share of the pixels; "
                "expected above 0 and at most 1, for example 0.995"
            )

    def acts_at(self, t: int) -> bool:
        return self.interval is None or self.interval[0] <= t <= self.interval[1]


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
    config: GuidanceConfig,
    *,
    project: Callable[[Tensor], Any] = lambda context: context,
) -> Callable[[Tensor, int], Tensor]:
    """Return (x_t, t) -> uncond + w (cond - uncond), w one for each example (eq. 6, whose weight is w - 1).

    Every prediction is a mixture of x_t and eps, so whatever the network predicts, its eps is guided by the same w.
    Both passes go through the network in one batch, those with the text first; for examples of w = 1, and where the
    interval says so, the unconditional one counts for nothing and is not run.
    project: what is computed of the context once, in advance, for every call of the network.
    """
    lean = (guidance_scale != 1).nonzero().squeeze(1).to(context.device)  # the rows that guidance changes
    weight = guidance_scale.to(context)[lean]
    alone = project(context)
    both = project(torch.cat([context, null_context[lean]])) if len(lean) else alone

    def unguided(x_t: Float[Tensor, "b c h w"], t: int) -> Float[Tensor, "b c h w"]:
        return network(x_t, torch.full((len(x_t),), t, device=x_t.device), alone)

    def lean_to_the_text(x_t: Float[Tensor, "b c h w"], t: int) -> Float[Tensor, "b c h w"]:
        twice = torch.cat([x_t, x_t[lean]])
        cond, uncond = network(twice, torch.full((len(twice),), t, device=x_t.device), both).split(
            [len(x_t), len(lean)]
        )
        leaning = uncond + per_example(weight, uncond) * (cond[lean] - uncond)
        if config.rescale:
            leaning = rescale(leaning, cond[lean], config.rescale)
        return cond.index_copy(0, lean, leaning)

    return lambda x_t, t: lean_to_the_text(x_t, t) if len(lean) and config.acts_at(t) else unguided(x_t, t)


def rescale(
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


def scale_of_each(guidance_scale: float | Sequence[float], count: int) -> list[float]:
    """Return one scale for each of `count` prompts; raise UserError for one that is no number from 0 on."""
    scales = guidance_scale if isinstance(guidance_scale, Sequence) else [guidance_scale] * count
    if len(scales) != count:
        raise UserError(f"guidance_scale: {len(scales)} values for {count} prompts; expected one, or one for each")
    for scale in scales:
        if not 0 <= scale <= HIGHEST_SCALE:
            raise UserError(f"guidance_scale: {scale} must be a number from 0 to {HIGHEST_SCALE}")
    return [*scales]
