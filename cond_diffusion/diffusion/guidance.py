"""Classifier-free guidance (Ho and Salimans 2022): one network, asked with the text and without it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cond_diffusion.diffusion.objective import Denoiser
from cond_diffusion.diffusion.samplers import Noise, Sampler, Step
from cond_diffusion.diffusion.schedule import NoiseSchedule, expand_like


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
        output = uncond + expand_like(weight, uncond) * (cond[guided_rows] - uncond)
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
    return expand_like(phi * stretch + 1 - phi, guided_output) * guided_output


def threshold_dynamically(x_0_hat: Float[Tensor, "b *chw"], share: float) -> Float[Tensor, "b *chw"]:
    """Cut each picture at s, the size that `share` of its pixels stay below, and divide by s (Saharia et al. 2022).

    s is at least 1: a picture that fits is left alone.
    """
    s = x_0_hat.flatten(1).abs().float().quantile(share, dim=1).clamp(min=1)
    bound = expand_like(s, x_0_hat)
    return x_0_hat.clamp(-bound, bound) / bound


@dataclass(frozen=True)
class Edit:
    """What a chain begins with, and what of it stays; with no x_0 it is plain noise, and nothing does.

    x_0: a picture in the place of noise (SDEdit, Meng et al. 2022).
    mask: 1 where the picture is drawn anew, 0 where it stays.
    strength: the share of the chain that is left to go, at least a step: 1 is the whole, 0 leaves the picture as it is.
    resamplings: see `repaint`.
    """

    x_0: Float[Tensor, "1 c h w"] | None = None
    mask: Float[Tensor, "1 c h w"] | None = None
    strength: float = 1.0
    resamplings: int = 1

    def timesteps(self, chain: list[int]) -> list[int]:
        """Return those of the chain that are left to visit."""
        left = max(1, round(self.strength * len(chain))) if self.strength > 0 else 0
        return chain[len(chain) - left :]

    def begin(
        self, eps: Float[Tensor, "b c h w"], schedule: NoiseSchedule, timesteps: list[int]
    ) -> Float[Tensor, "b c h w"]:
        """Return x at the first of the timesteps, with eps as its noise."""
        if self.x_0 is None:
            return eps
        x_0 = self.x_0.expand_as(eps)
        return schedule.q_sample(x_0, torch.full((len(eps),), timesteps[0]), eps) if timesteps else x_0

    def apply_mask(self, x_0_hat: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Put x_0 in the place of x_0_hat wherever the mask is 0.

        A sampler that is told x_0 there takes the forward process back: ancestral steps with the posterior's variance
        draw from q(x_{t-1} | x_t, x_0) itself, and an ODE ends at x_0. RePaint (Lugmayr et al. 2022, eq. 8) noises x_0
        anew at each step instead, which has the same distribution at each t, but not a multistep solver's continuity.
        """
        if self.mask is None or self.x_0 is None:
            return x_0_hat
        return self.mask * x_0_hat + (1 - self.mask) * self.x_0

    def wrap_sampler(self, sampler: Sampler) -> Sampler:
        """Return the sampler, resampling if so told."""
        return sampler if self.resamplings == 1 else partial(repaint, sampler, times=self.resamplings)


def repaint(
    sampler: Sampler,
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Float[Tensor, "b *chw"],
    timesteps: list[int],
    noise: Noise,
    *,
    times: int,
    jump: int = 10,
) -> Iterator[Step]:
    """Go through every `jump` steps `times` times, with noise up to where they began in between (RePaint, Lugmayr et
    al. 2022, algorithm 1 and section 4.2): what is drawn and what is known get to agree with each other.

    Once is the sampler itself. A solver of several steps begins anew after each jump.
    """
    for start in range(0, len(timesteps), jump):
        rest = timesteps[start:]
        left_at = rest[jump] if len(rest) > jump else None
        for time in range(times):
            if time > 0:
                x = _noised_further(schedule, x, left_at, rest[0], noise)
            for step in islice(sampler(denoiser, schedule, x, rest, noise), jump):
                x = step.x
                yield step


def _noised_further(
    schedule: NoiseSchedule, x: Float[Tensor, "b *chw"], t: int | None, t_later: int, noise: Noise
) -> Float[Tensor, "b *chw"]:
    """Draw from q(x_{t_later} | x_t) (Ho et al. 2020, eq. 2, over several steps); None is the picture."""
    kept = schedule.level(t_later).alpha / schedule.level(t).alpha
    return kept * x + (1 - kept**2) ** 0.5 * noise()
