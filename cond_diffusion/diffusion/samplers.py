"""Samplers: one generator function per algorithm, over any callable denoiser.

A sampler yields after every step, so the caller controls progress bars, early stopping and animations. The denoiser (a
UNet, guidance around it, a closed form) and the source of noise are arguments.

    ddpm        ancestral sampling from the posterior                          the reverse of the training process
    ddim        the same marginals with less noise, or none                    first order
    euler       Euler's method on the probability-flow ODE                     first order; equals ddim without noise
    heun        Heun's method on the ODE                                       second order; two evaluations per step
    dpm_solver  exact solution of the ODE's linear part; optionally with noise second order; one evaluation per step
    unipc       the same, with a corrector that reuses the next evaluation     order `order`; one evaluation per step
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cond_diffusion.config.sampling import SamplerName, SamplingOptions
from cond_diffusion.config.schedule import ScheduleConfig, Variance
from cond_diffusion.diffusion.objective import Denoiser, DenoiserOutput
from cond_diffusion.diffusion.schedule import Images, NoiseLevel, NoiseSchedule

logger = logging.getLogger(__name__)

# With fewer steps the variance beta leaves noise in the image (Nichol and Dhariwal 2021, figure 8).
MIN_STEPS_FOR_BETA = 200

Noise = Callable[[], Tensor]
"""Returns a sample of N(0, I) in the shape of x_t."""


@dataclass(frozen=True)
class Step:
    """One sampling step from timestep t: x at the next timestep, and the prediction of x_0 it was computed from."""

    t: int
    x: Images
    x_0_hat: Images


Sampler = Callable[[Denoiser, NoiseSchedule, Tensor, list[int], Noise], Iterator[Step]]
"""(denoiser, schedule, x, timesteps, noise) -> steps. `timesteps` decrease; the first is that of x."""


def sampling_timesteps(name: SamplerName, schedule: NoiseSchedule, steps: int | None) -> list[int]:
    """Return the timesteps that a sampler visits in `steps` steps, in decreasing order, as diffusers' scheduler does.

    If the schedule leaves the spacing to the sampler, it is "leading" for ddpm and ddim, and "linspace" for the others.
    The last step of dpm_solver and unipc starts before the least noisy timestep.
    """
    spacing = schedule.config.spacing or ("leading" if name in ("ddpm", "ddim") else "linspace")
    return schedule.sampling_timesteps(steps, spacing, include_first=name not in ("dpm_solver", "unipc"))


def build_sampler(options: SamplingOptions, schedule: ScheduleConfig, steps: int) -> Sampler:
    """Return the sampler that `options` select, for `steps` steps."""
    eta, order = options.eta or 0.0, options.order or 2
    match options.sampler:
        case "ddpm":
            return partial(ddpm, variance=options.variance or _default_variance(schedule, steps))
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


def _default_variance(schedule: ScheduleConfig, steps: int) -> Variance:
    if schedule.variance == "beta" and steps < MIN_STEPS_FOR_BETA:
        message = "variance=beta needs at least %d steps, got %d; using posterior (pass variance=beta to force it)"
        logger.warning(message, MIN_STEPS_FOR_BETA, steps)
        return "posterior"
    return schedule.variance


def ddpm(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Images, timesteps: list[int], noise: Noise, *, variance: Variance
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    Each step samples from the posterior, with x_0_hat in place of x_0. Its mean equals the paper's
    (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(1 - beta_t) (eq. 11). The last step adds no noise.

    Args:
        variance: "posterior" (beta-tilde, exact if the data is a single point) or "beta" (exact for N(0, I) data).
    """
    for t, t_prev in _step_pairs(timesteps):
        x_0_hat = denoiser(x, t).x_0_hat
        posterior = schedule.posterior(t, t_prev)
        x = posterior.x_0_coefficient * x_0_hat + posterior.x_t_coefficient * x
        if t_prev is not None:
            x = x + (posterior.variance if variance == "posterior" else posterior.beta) ** 0.5 * noise()
        yield Step(t, x, x_0_hat)


def ddim(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Images, timesteps: list[int], noise: Noise, *, eta: float
) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song, Meng and Ermon 2021, eq. 12).

    Args:
        eta: Standard deviation of the added noise in units of the posterior's (eq. 16), 0 to 1: 0 is a deterministic
            map from x_T to the image, 1 is ddpm.
    """
    for t, t_prev in _step_pairs(timesteps):
        output, target = denoiser(x, t), schedule.level(t_prev)
        deviation = eta * schedule.posterior(t, t_prev).variance ** 0.5
        x = target.alpha * output.x_0_hat + (target.sigma**2 - deviation**2) ** 0.5 * output.eps_hat
        if deviation > 0:
            x = x + deviation * noise()
        yield Step(t, x, output.x_0_hat)


def euler(denoiser: Denoiser, schedule: NoiseSchedule, x: Images, timesteps: list[int], noise: Noise) -> Iterator[Step]:
    """Euler's method on the probability-flow ODE (Song et al. 2021, eq. 13; Karras et al. 2022, eq. 1).

    With y = x_t / alpha, an image with noise of standard deviation s = sigma / alpha, the ODE is dy/ds = eps_hat(y, s).
    An Euler step equals the step of ddim without noise (Song, Meng and Ermon 2021, eq. 13).
    """
    del noise
    for t, t_prev in _step_pairs(timesteps):
        output = denoiser(x, t)
        x = _euler_step(output, schedule.level(t_prev))
        yield Step(t, x, output.x_0_hat)


def heun(denoiser: Denoiser, schedule: NoiseSchedule, x: Images, timesteps: list[int], noise: Noise) -> Iterator[Step]:
    """Heun's method on the same ODE (Karras et al. 2022, algorithm 1): a step along the mean of the slopes at its ends.

    The step to x_0 is Euler's, since eps_hat is undefined without noise; so is a step from pure noise, where s is
    infinite.
    """
    del noise
    for t, t_prev in _step_pairs(timesteps):
        current, target = schedule.level(t), schedule.level(t_prev)
        output = denoiser(x, t)
        x_next = _euler_step(output, target)
        if t_prev is not None and current.alpha > 0:
            slope = (output.eps_hat + denoiser(x_next, t_prev).eps_hat) / 2
            x_next = target.alpha * (x / current.alpha + (target.ratio - current.ratio) * slope)
        x = x_next
        yield Step(t, x, output.x_0_hat)


def _euler_step(output: DenoiserOutput, target: NoiseLevel) -> Images:
    """Follow the straight line y = x_0_hat + s eps_hat to the target level."""
    return target.alpha * (output.x_0_hat + target.ratio * output.eps_hat)


def dpm_solver(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x: Images,
    timesteps: list[int],
    noise: Noise,
    *,
    eta: float,
    order: int,
) -> Iterator[Step]:
    """DPM-Solver++ (Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling", algorithm 2, called 2M).

    The linear part of the ODE over lambda = log(alpha / sigma) is solved exactly; x_0_hat is extrapolated linearly from
    its last two values.

    Args:
        eta: 0 solves the ODE, 1 is SDE-DPM-Solver++ (appendix B, 2M); values between interpolate as in k-diffusion.
        order: 2, or 1 for a constant x_0_hat, which is ddim.
    """
    last_lambda, last_x_0_hat = -math.inf, None
    for t, t_prev in _step_pairs(timesteps):
        current, target = schedule.level(t), schedule.level(t_prev)
        x_0_hat = denoiser(x, t).x_0_hat
        h = target.half_log_snr - current.half_log_snr
        eta_h = eta * h if eta else 0.0  # h is infinite in the step to x_0
        x_0_midpoint = x_0_hat
        if order == 2 and last_x_0_hat is not None and t_prev is not None:
            x_0_midpoint = x_0_hat + h / (2 * (current.half_log_snr - last_lambda)) * (x_0_hat - last_x_0_hat)
        x = target.sigma / current.sigma * math.exp(-eta_h) * x - target.alpha * math.expm1(-h - eta_h) * x_0_midpoint
        if eta and t_prev is not None:
            x = x + target.sigma * (-math.expm1(-2 * eta_h)) ** 0.5 * noise()
        last_lambda, last_x_0_hat = current.half_log_snr, x_0_hat
        yield Step(t, x, x_0_hat)


def unipc(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Images, timesteps: list[int], noise: Noise, *, order: int
) -> Iterator[Step]:
    """UniPC predictor-corrector (Zhao et al. 2023, algorithms 1 to 3, with B_2(h) and prediction of x_0).

    The corrector reuses the x_0_hat of the next step, so it raises the order by one without further evaluations.

    Args:
        order: Order of the predictor. It is lower in the first steps, where earlier values are missing, and in the last
            ones.
    """
    del noise
    history: list[tuple[float, Tensor]] = []  # lambda and x_0_hat of the last steps, the newest last
    previous: tuple[Tensor, NoiseLevel] | None = None  # x and level at the start of the previous step
    for index, (t, t_prev) in enumerate(_step_pairs(timesteps)):
        current, target = schedule.level(t), schedule.level(t_prev)
        x_0_hat = denoiser(x, t).x_0_hat
        if previous is not None:
            x = _unipc_step(*previous, current, history, x_0_hat)
        # A value at infinite lambda, from a start without signal, gives no slope.
        history = [entry for entry in history if math.isfinite(entry[0])]
        history = [*history, (current.half_log_snr, x_0_hat)][-min(order, len(timesteps) - index) :]
        previous = x, current
        x = _unipc_step(x, current, target, history)
        yield Step(t, x, x_0_hat)


def _unipc_step(
    x: Images,
    current: NoiseLevel,
    target: NoiseLevel,
    history: list[tuple[float, Tensor]],
    x_0_hat_at_target: Images | None = None,
) -> Images:
    """Step from `current` to `target`: the predictor, or the corrector if x_0_hat at the target is given (eq. 3 and 9).

    Integrates the polynomial through the values of x_0_hat. Its differences to x_0_hat at `current` have weights that
    solve a Vandermonde system in r, their lambdas in units of the step.
    """
    h = target.half_log_snr - current.half_log_snr
    *earlier, (current_lambda, x_0_hat) = history
    r = [(entry_lambda - current_lambda) / h for entry_lambda, _ in earlier]
    differences = [(value - x_0_hat) / r_m for r_m, (_, value) in zip(r, earlier, strict=True)]
    if x_0_hat_at_target is not None:
        r, differences = [*r, 1.0], [*differences, x_0_hat_at_target - x_0_hat]
    b_of_h = math.expm1(-h)
    x = target.sigma / current.sigma * x - target.alpha * b_of_h * x_0_hat
    for weight, difference in zip(_unipc_weights(r, h), differences, strict=True):
        x = x - target.alpha * b_of_h * weight * difference
    return x


def _unipc_weights(r: list[float], h: float) -> list[float]:
    """Solve sum_m r_m^(n-1) weight_m = n! phi_{n+1}(-h) / B_2(h) for n = 1, 2, ... (eq. 5 and 11)."""
    if len(r) <= 1:
        return [0.5] * len(r)  # as in the paper
    phi, b = math.expm1(-h) / -h - 1, []
    for n in range(1, len(r) + 1):
        b.append(phi * math.factorial(n) / math.expm1(-h))
        phi = phi / -h - 1 / math.factorial(n + 1)
    points = torch.tensor(r, dtype=torch.float64)
    powers = torch.stack([points**n for n in range(len(r))])
    return torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()


def _step_pairs(timesteps: list[int]) -> Iterator[tuple[int, int | None]]:
    """Pair each timestep with the next one; the last is paired with None, which stands for x_0."""
    return zip(timesteps, [*timesteps[1:], None], strict=False)  # not strict: there may be no timesteps
