"""Pictures as input: image to image, and inpainting, by any sampler."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from cond_diffusion.diffusion.prediction import Denoiser
from cond_diffusion.diffusion.samplers import Noise, Sampler, Step
from cond_diffusion.diffusion.schedule import NoiseSchedule


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
