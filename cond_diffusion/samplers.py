"""From noise to a picture: one generator function an algorithm, over any callable denoiser.

A sampler yields after every step, so progress bars, early stops and films of the chain are the caller's business.
What the denoiser is (a UNet, guidance around it, a closed form) and where the noise comes from it does not know.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from cond_diffusion.schedule import NoiseSchedule

Denoiser = Callable[[Tensor, int], Tensor]
"""(x_t, t) -> eps_hat."""

Noise = Callable[[], Tensor]
"""Draw N(0, I) in the shape of x_t."""


@dataclass(frozen=True)
class Step:
    """Where the chain is after leaving timestep t: the next, less noisy picture, and the x_0 that it is heading for."""

    t: int
    x: Float[Tensor, "b *chw"]
    x_0_hat: Float[Tensor, "b *chw"]


def ddpm(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_T: Float[Tensor, "b *chw"],
    timesteps: list[int],
    noise: Noise,
    *,
    variance: Literal["posterior", "beta"],
    clip_x_0: bool,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over `timesteps`, the noisiest first.

    Each step draws from the posterior with x_0_hat in the place of x_0. Unclipped, its mean is the paper's
    (x_t - (1 - alpha_t) / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t) (eq. 11); clip_x_0 first brings x_0_hat into
    [-1, 1].
    variance: "posterior" (beta-tilde, right for data that is a point) or "beta" (right for data that is N(0, I)). The
    last step adds no noise.
    """
    x = x_T
    for t, t_prev in pairwise([*timesteps, None]):
        assert t is not None  # None stands at the end alone, as the last t_prev
        x_0_hat = schedule.predict_x_0(x, t, denoiser(x, t))
        if clip_x_0:
            x_0_hat = x_0_hat.clamp(-1, 1)
        posterior = schedule.posterior(t, t_prev)
        x = posterior.x_0_coefficient * x_0_hat + posterior.x_t_coefficient * x
        if t_prev is not None:
            x = x + (posterior.variance if variance == "posterior" else posterior.beta) ** 0.5 * noise()
        yield Step(t, x, x_0_hat)
