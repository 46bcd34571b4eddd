"""The noise schedule and the closed form of the forward process (Ho et al. 2020, "Denoising Diffusion Probabilistic
Models").

Notation of the whole package:

    x_0, x_t, x_T     an image in [-1, 1]; the same image after t + 1 noising steps; (almost) pure noise
    t                 integer timestep, counted from 0: t = 0 is the first, least noisy step (Ho et al. count from 1)
    num_timesteps     T, the number of timesteps of the schedule
    betas             beta_t, the variance that step t adds
    alpha_bar         the product of 1 - beta up to and including t
    snr               alpha_bar / (1 - alpha_bar), the signal-to-noise ratio
    eps               the noise in x_t
    x_0_hat, eps_hat  the estimates of both from the network's output (see `objective.py`)
    alpha, sigma      sqrt(alpha_bar) and sqrt(1 - alpha_bar), as in later papers (`NoiseLevel`); not Ho et al.'s
                      alpha, which is 1 - beta
    posterior         q(x_{t-1} | x_t, x_0); its variance is the beta-tilde of the paper
    context           the text embeddings that condition the network; null_context is that of the empty caption
    guidance_scale    w in uncond + w (cond - uncond): 1 is unguided, 0 unconditional
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cond_diffusion.config.schedule import ScheduleConfig, Spacing
from cond_diffusion.errors import UserError

Images = Float[Tensor, "b *chw"]
"""Images, or other tensors with one example per row."""
PerExample = Float[Tensor, " b"]
Timesteps = Int64[Tensor, " b"]
Context = Float[Tensor, "b l d"]


class NoiseSchedule:
    """The betas and alpha_bar of a schedule, and the distributions derived from them.

    The tables are float64: half precision rounds alpha_bar[0] to 1, and the noise 1 - alpha_bar[0] to 0. They are not
    buffers of a module, since those get cast and averaged by accident.

    Raises:
        UserError: If the betas are so small or so large that float64 cannot represent alpha_bar.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.betas = _betas(config)
        self.alpha_bar = (1 - self.betas).cumprod(0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        if not (self.alpha_bar < alpha_bar_prev).all() or (config.num_timesteps > 1 and self.alpha_bar[-2] == 0):
            raise UserError(
                f"schedule: alpha_bar runs from {self.alpha_bar[0]:g} to {self.alpha_bar[-1]:g} in float64; it must "
                "decrease at every step and be positive before the last: use larger or smaller betas"
            )

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def snr(self) -> Float[Tensor, " T"]:
        """alpha_bar / (1 - alpha_bar) at every t."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def q_sample(self, x_0: Images, t: Timesteps, eps: Images) -> Images:
        """Sample x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), with eps ~ N(0, I) (eq. 4)."""
        alpha, sigma = self.alpha_sigma(t)
        return expand_like(alpha, x_0) * x_0 + expand_like(sigma, x_0) * eps

    def alpha_sigma(self, t: Timesteps) -> tuple[PerExample, PerExample]:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) at each t, in float64 on the CPU; see `level` for one t."""
        alpha_bar = self.alpha_bar[t.cpu()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def level(self, t: int | None) -> "NoiseLevel":
        """Return the signal and noise levels of x_t; None stands for the noise-free image x_0."""
        alpha_bar = 1.0 if t is None else self.alpha_bar[t].item()
        return NoiseLevel(alpha=alpha_bar**0.5, sigma=(1 - alpha_bar) ** 0.5)

    def posterior(self, t: int, t_prev: int | None) -> "Posterior":
        """Return q(x_{t_prev} | x_t, x_0) for a sampling step from t to t_prev (eq. 6 and 7).

        Skipping timesteps is equivalent to a schedule with beta = 1 - alpha_bar_t / alpha_bar_{t_prev} (Nichol and
        Dhariwal 2021, eq. 19), which is beta_t for t_prev = t - 1.

        Args:
            t: Timestep of the noisier image.
            t_prev: Timestep of the less noisy image; None stands for x_0.
        """
        alpha_bar = self.alpha_bar[t].item()
        alpha_bar_prev = 1.0 if t_prev is None else self.alpha_bar[t_prev].item()
        beta = 1 - alpha_bar / alpha_bar_prev
        return Posterior(
            x_0_coefficient=alpha_bar_prev**0.5 * beta / (1 - alpha_bar),
            x_t_coefficient=(1 - beta) ** 0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar),
            variance=(1 - alpha_bar_prev) / (1 - alpha_bar) * beta,
            beta=beta,
        )

    @property
    def decoder_variance(self) -> float:
        """The variance of p(x_0 | x_1), the Gaussian of the last sampling step in the likelihood.

        The posterior variance is 0 there; that of the step before replaces it, as in the code of Ho et al. 2020 and of
        Nichol and Dhariwal 2021.
        """
        return self.posterior(1, 0).variance if self.num_timesteps > 1 else self.betas[0].item()

    def sampling_timesteps(
        self, steps: int | None, spacing: Spacing = "trailing", *, include_first: bool = True
    ) -> list[int]:
        """Return the timesteps that `steps` sampling steps visit, in decreasing order.

        Args:
            steps: Number of steps, 1 to T; None visits every timestep.
            spacing: As in diffusers (Lin et al. 2023, table 2). "trailing" counts equal gaps from the end, so that
                T - 1, where sampling starts from pure noise, is always visited; "leading" counts them from steps_offset
                and omits T - 1; "linspace" visits both ends if steps > 1.
            include_first: If False, "leading" and "linspace" omit the least noisy timestep, for samplers whose last
                step goes to x_0 from the timestep before.

        Raises:
            UserError: If `steps`, or "leading" with its offset, exceeds the schedule.
        """
        total = self.num_timesteps
        if steps is None or steps == total:
            return list(reversed(range(total)))
        if not 1 <= steps <= total:
            raise UserError(f"steps: {steps} must be between 1 and the {total} timesteps of the schedule")
        points = steps if include_first else steps + 1
        match spacing:
            case "trailing":
                gap = total - (total - total / steps)  # as numpy's arange, so that ties round as in diffusers
                return [round(total - i * gap) - 1 for i in range(steps)]
            case "leading":
                gap, offset = total // points, self.config.steps_offset
                timesteps = [i * gap + offset for i in reversed(range(points))][:steps]
                if timesteps[0] >= total:
                    raise UserError(
                        f"steps: {steps} with schedule.steps_offset={offset} exceeds the {total} timesteps of the "
                        "schedule; use fewer steps"
                    )
                return timesteps
            case "linspace":
                gap = (total - 1) / max(1, points - 1)  # as numpy's linspace
                return [round(i * gap) for i in reversed(range(points))][:steps]


@dataclass(frozen=True)
class NoiseLevel:
    """The scales of x_t = alpha x_0 + sigma eps, where alpha^2 + sigma^2 = 1 and alpha^2 = alpha_bar.

    `ratio` and `half_log_snr` are the same level on the scales of ODE solvers; they are infinite where no signal or no
    noise is left.
    """

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the standard deviation of the noise in x_t / alpha: the sigma of Karras et al. 2022."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), the lambda of Lu et al. 2022."""
        return -math.log(self.ratio) if self.sigma else math.inf


@dataclass(frozen=True)
class Posterior:
    """A Gaussian with mean x_0_coefficient x_0 + x_t_coefficient x_t; `beta` is the upper choice of its variance."""

    x_0_coefficient: float
    x_t_coefficient: float
    variance: float
    beta: float


def expand_like(coefficient: Float[Tensor, " n"], x: Images) -> Float[Tensor, "n *ones"]:
    """Reshape one coefficient per example to broadcast over `x`, in the dtype and on the device of `x`.

    All broadcasting over examples goes through this check: (8,) against (8, 1) would silently become (8, 8).

    Raises:
        ValueError: If there is not exactly one coefficient per example.
    """
    if coefficient.shape != x.shape[:1]:
        raise ValueError(f"coefficient: shape {tuple(coefficient.shape)} must be {tuple(x.shape[:1])}, one per example")
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))


def _betas(config: ScheduleConfig) -> Float[Tensor, " T"]:
    """Return beta_t at every t, in float64."""
    if config.betas:
        betas = torch.tensor(config.betas, dtype=torch.float64)
    else:
        steps, start, end = config.num_timesteps, config.beta_start, config.beta_end
        match config.beta_schedule:
            case "linear":
                betas = torch.linspace(start, end, steps, dtype=torch.float64)
            case "scaled_linear":
                betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
            case "cosine":  # Nichol and Dhariwal 2021, eq. 17
                time = torch.arange(steps + 1, dtype=torch.float64) / steps
                alpha_bar = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
                betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
            case "sigmoid":  # over [-6, 6], as in diffusers
                betas = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start
    return _rescale_zero_terminal_snr(betas) if config.zero_terminal_snr else betas


def _rescale_zero_terminal_snr(betas: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Rescale sqrt(alpha_bar) to end at 0 and keep its first value (Lin et al. 2023, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
