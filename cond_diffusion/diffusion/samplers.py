"""From noise to a picture: one generator function an algorithm, over any callable denoiser.

A sampler yields after every step, so progress bars, early stops and films of the chain are the caller's business.
What the denoiser is (a UNet, guidance around it, a closed form) and where the noise comes from it does not know.

    ddpm        ancestral sampling, a draw from the posterior at each step     the chain that was trained
    ddim        the same marginals with less noise, or none                    first order
    euler       the probability-flow ODE, in the plainest way                  first order; ddim without noise
    heun        the same, each step corrected by a second look                 second order; two passes a step
    dpm_solver  the same, its linear part solved exactly; also with noise      second order; one pass a step
    unipc       the same, each step corrected by the next step's own pass      as high as `order`; one pass a step
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from cond_diffusion.config.sampling import SamplerName, SamplingOptions
from cond_diffusion.config.schedule import ScheduleConfig, Variance
from cond_diffusion.diffusion.objective import Denoiser
from cond_diffusion.diffusion.schedule import NoiseLevel, NoiseSchedule

logger = logging.getLogger(__name__)

Noise = Callable[[], Tensor]
"""Draw N(0, I) in the shape of x_t."""


@dataclass(frozen=True)
class Step:
    """Where the chain is after leaving timestep t: the next, less noisy picture, and the x_0 that it is heading for."""

    t: int
    x: Float[Tensor, "b *chw"]
    x_0_hat: Float[Tensor, "b *chw"]


Sampler = Callable[[Denoiser, NoiseSchedule, Tensor, list[int], Noise], Iterator[Step]]
"""(denoiser, schedule, x, timesteps, noise) -> the steps. `timesteps` begin with that of x, the noisiest."""


# Below this many steps the variance beta leaves noise in the image (Nichol and Dhariwal 2021, figure 8).
FEWEST_STEPS_FOR_BETA = 200


def sampling_timesteps(name: SamplerName, schedule: NoiseSchedule, steps: int | None) -> list[int]:
    """Return the timesteps that `steps` steps visit, the noisiest first: those of diffusers' scheduler of the sampler.

    Where the schedule leaves the spacing to the sampler, it is "leading" for ddpm and ddim and "linspace" for the
    others. The multistep solvers' last step comes to x_0 from farther away than the least noisy timestep.
    """
    spacing = schedule.config.spacing or ("leading" if name in ("ddpm", "ddim") else "linspace")
    return schedule.sampling_timesteps(steps, spacing, include_first=name not in ("dpm_solver", "unipc"))


def build_sampler(options: SamplingOptions, schedule: ScheduleConfig, steps: int) -> Sampler:
    """Return the sampler's generator function, its options filled in, for `steps` steps."""
    eta, order = options.eta or 0.0, options.order or 2
    match options.sampler:
        case "ddpm":
            return partial(ddpm, variance=options.variance or _variance(schedule, steps))
        case "ddim":
            return partial(ddim, eta=eta)
        case "euler":
            return euler
        case "heun":
            return heun
        case "dpm_solver":
            return partial(dpm_solver, eta=eta, order=order)
        case "unipc":
            return partial(unipc, order=order)


def _variance(schedule: ScheduleConfig, steps: int) -> Variance:
    if schedule.variance == "beta" and steps < FEWEST_STEPS_FOR_BETA:
        logger.warning(
            "variance=beta needs at least %d steps, got %d; using posterior (pass variance=beta to force it)",
            FEWEST_STEPS_FOR_BETA,
            steps,
        )
        return "posterior"
    return schedule.variance


def ddpm(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Float[Tensor, "b *chw"],
    timesteps: list[int],
    noise: Noise,
    *,
    variance: Variance,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    Each step draws from the posterior with x_0_hat in the place of x_0. Its mean is the paper's
    (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(1 - beta_t) (eq. 11).
    variance: "posterior" (beta-tilde, right for data that is a point) or "beta" (right for data that is N(0, I)). The
    last step adds no noise.
    """
    for t, t_prev in _jumps(timesteps):
        x_0_hat = denoiser(x, t).x_0_hat
        posterior = schedule.posterior(t, t_prev)
        x = posterior.x_0_coefficient * x_0_hat + posterior.x_t_coefficient * x
        if t_prev is not None:
            x = x + (posterior.variance if variance == "posterior" else posterior.beta) ** 0.5 * noise()
        yield Step(t, x, x_0_hat)


def ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Float[Tensor, "b *chw"],
    timesteps: list[int],
    noise: Noise,
    *,
    eta: float,
) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song, Meng and Ermon 2021, eq. 12).

    eta: how much of the posterior's standard deviation is drawn anew at each step (eq. 16): 0 is a deterministic map
    from x_T to the picture, 1 is ddpm.
    """
    for t, t_prev in _jumps(timesteps):
        denoised, then = denoiser(x, t), schedule.level(t_prev)
        fresh = eta * schedule.posterior(t, t_prev).variance ** 0.5
        x = then.alpha * denoised.x_0_hat + (then.sigma**2 - fresh**2) ** 0.5 * denoised.eps_hat
        if fresh > 0:
            x = x + fresh * noise()
        yield Step(t, x, denoised.x_0_hat)


def euler(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Float[Tensor, "b *chw"], timesteps: list[int], noise: Noise
) -> Iterator[Step]:
    """Euler's method on the probability-flow ODE (Song et al. 2021, eq. 13; Karras et al. 2022, eq. 1).

    With y = x_t / alpha, a picture with noise of deviation s = sigma / alpha, the ODE is dy/ds = eps_hat(y, s). A step
    along that straight line is the step of ddim without noise (Song, Meng and Ermon 2021, eq. 13).
    """
    del noise
    for t, t_prev in _jumps(timesteps):
        denoised, then = denoiser(x, t), schedule.level(t_prev)
        x = then.alpha * (denoised.x_0_hat + then.ratio * denoised.eps_hat)  # the line starts at x_0_hat, where s = 0
        yield Step(t, x, denoised.x_0_hat)


def heun(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Float[Tensor, "b *chw"], timesteps: list[int], noise: Noise
) -> Iterator[Step]:
    """Heun's method on the same ODE (Karras et al. 2022, algorithm 1): a step along the mean of the slopes at its ends.

    The step to the picture is Euler's, since eps_hat means nothing without noise; so is one from pure noise, which is
    infinitely long in s.
    """
    del noise
    for t, t_prev in _jumps(timesteps):
        now, then = schedule.level(t), schedule.level(t_prev)
        denoised = denoiser(x, t)
        ahead = then.alpha * (denoised.x_0_hat + then.ratio * denoised.eps_hat)
        if t_prev is not None and now.alpha > 0:
            slope = (denoised.eps_hat + denoiser(ahead, t_prev).eps_hat) / 2
            ahead = then.alpha * (x / now.alpha + (then.ratio - now.ratio) * slope)
        x = ahead
        yield Step(t, x, denoised.x_0_hat)


def dpm_solver(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Float[Tensor, "b *chw"],
    timesteps: list[int],
    noise: Noise,
    *,
    eta: float,
    order: int,
) -> Iterator[Step]:
    """DPM-Solver++ (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 2, called 2M).

    Over lambda = log(alpha / sigma) the ODE's linear part is solved exactly; for x_0_hat stands the straight line
    through its last two values (order 2), or the last one (order 1, which is ddim).
    eta: 0 for the ODE; 1 for SDE-DPM-Solver++ (appendix B, 2M), where half of the way is noise drawn anew; between them
    as in Karras's k-diffusion.
    """
    last_lambda, last_x_0_hat = -math.inf, None
    for t, t_prev in _jumps(timesteps):
        now, then = schedule.level(t), schedule.level(t_prev)
        x_0_hat = denoiser(x, t).x_0_hat
        h = then.half_log_snr - now.half_log_snr
        forgotten = eta * h if eta else 0.0  # h is infinite in the step to the picture
        middle = x_0_hat  # the straight line, half way along the step
        if order == 2 and last_x_0_hat is not None and t_prev is not None:
            middle = x_0_hat + h / (2 * (now.half_log_snr - last_lambda)) * (x_0_hat - last_x_0_hat)
        x = then.sigma / now.sigma * math.exp(-forgotten) * x - then.alpha * math.expm1(-h - forgotten) * middle
        if eta and t_prev is not None:
            x = x + then.sigma * (-math.expm1(-2 * forgotten)) ** 0.5 * noise()
        last_lambda, last_x_0_hat = now.half_log_snr, x_0_hat
        yield Step(t, x, x_0_hat)


def unipc(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Float[Tensor, "b *chw"],
    timesteps: list[int],
    noise: Noise,
    *,
    order: int,
) -> Iterator[Step]:
    """UniPC (Zhao et al. 2023, algorithms 1 to 3, B_2(h), predicting the picture): predict, look, correct, go on.

    The x_0_hat that the next step needs anyway corrects this one, and its order rises by one for nothing. Orders are
    lower at both ends: at first there is nothing to look back at, and the last step goes to the picture itself.
    """
    del noise
    known: list[tuple[float, Tensor]] = []  # lambda and x_0_hat, the newest last
    left: tuple[Tensor, NoiseLevel] | None = None  # the step before: where it began
    for number, (t, t_prev) in enumerate(_jumps(timesteps)):
        now, then = schedule.level(t), schedule.level(t_prev)
        x_0_hat = denoiser(x, t).x_0_hat
        if left is not None:
            x = _unipc_step(*left, now, known, ahead=x_0_hat)
        # A value at infinite lambda, at a start from pure noise, gives no slope.
        known = [value for value in known if math.isfinite(value[0])]
        known = [*known, (now.half_log_snr, x_0_hat)][-min(order, len(timesteps) - number) :]
        left = x, now
        x = _unipc_step(x, now, then, known, ahead=None)
        yield Step(t, x, x_0_hat)


def _unipc_step(
    x: Float[Tensor, "b *chw"],
    now: NoiseLevel,
    then: NoiseLevel,
    known: list[tuple[float, Tensor]],
    ahead: Float[Tensor, "b *chw"] | None,
) -> Float[Tensor, "b *chw"]:
    """Step from `now` to `then` with the x_0_hat that are known, and with the one at `then`, once it is (eq. 3 and 9).

    The polynomial through them is integrated exactly. Its differences to x_0_hat at `now` have weights that solve a
    Vandermonde system in the places r, counted in steps; with one difference the paper takes 1/2.
    """
    h = then.half_log_snr - now.half_log_snr
    *earlier, (now_lambda, x_0_hat) = known
    places = [(value_lambda - now_lambda) / h for value_lambda, _ in earlier]
    differences = [(value - x_0_hat) / r for r, (_, value) in zip(places, earlier, strict=True)]
    if ahead is not None:
        places, differences = [*places, 1.0], [*differences, ahead - x_0_hat]
    b_of_h = math.expm1(-h)
    x = then.sigma / now.sigma * x - then.alpha * b_of_h * x_0_hat
    for weight, difference in zip(_unipc_weights(places, h), differences, strict=True):
        x = x - then.alpha * b_of_h * weight * difference
    return x


def _unipc_weights(places: list[float], h: float) -> list[float]:
    """Solve sum_m r_m^(n-1) weight_m = n! phi_{n+1}(-h) / B_2(h) for n = 1, 2, ... (eq. 5 and 11)."""
    if len(places) <= 1:
        return [0.5] * len(places)
    phi, right_side = math.expm1(-h) / -h - 1, []
    for n in range(1, len(places) + 1):
        right_side.append(phi * math.factorial(n) / math.expm1(-h))
        phi = phi / -h - 1 / math.factorial(n + 1)
    r = torch.tensor(places, dtype=torch.float64)
    powers = torch.stack([r**n for n in range(len(places))])
    return torch.linalg.solve(powers, torch.tensor(right_side, dtype=torch.float64)).tolist()


def _jumps(timesteps: list[int]) -> Iterator[tuple[int, int | None]]:
    """Pair each timestep with the next one; behind the last stands None, the picture."""
    for t, t_prev in pairwise([*timesteps, None]):
        assert t is not None  # None stands at the end alone
        yield t, t_prev
