"""The noise schedule and the algebra of the forward process (Ho et al. 2020, "Denoising Diffusion Probabilistic
Models").

Vocabulary of the whole package:

    x_0, x_t, x_T     a picture in [-1, 1]; the same after t + 1 noising steps; (almost) pure noise
    t                 integer timesteps, counted from 0: t = 0 is the first, least noisy step (Ho et al. count from 1)
    num_timesteps     T, the number of steps of the chain
    betas             beta_t, the variance that step t adds
    alpha_bar         the product of 1 - beta up to and including t; written alpha-bar in the papers
    snr               alpha_bar / (1 - alpha_bar), the signal-to-noise ratio
    eps               the noise that was drawn
    x_0_hat, eps_hat  what the network's output says of both (see `prediction.py`)
    alpha, sigma      sqrt(alpha_bar) and sqrt(1 - alpha_bar), as later papers call them (`NoiseLevel`); not Ho et al.'s
                      alpha, which is 1 - beta
    posterior         q(x_{t-1} | x_t, x_0); its variance is the beta-tilde of the paper
    context           the text embeddings that the network reads; null_context those of the empty caption
    guidance_scale    w in uncond + w (cond - uncond): 1 is unguided, 0 unconditional
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cond_diffusion.config.schedule import ScheduleConfig, Spacing
from cond_diffusion.errors import UserError


class NoiseSchedule:
    """The tables of one chain, and what follows from them.

    The tables are float64 and belong to no module. float64: half precision rounds alpha_bar[0] to 1, and the noise that
    is left there, 1 - alpha_bar[0], to 0. No module: buffers get cast and averaged by accident.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.betas = _betas(config)
        self.alpha_bar = (1 - self.betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        if not (self.alpha_bar < before).all() or (config.num_timesteps > 1 and self.alpha_bar[-2] == 0):
            raise UserError(
                "schedule: betas so small that they add no noise, or so large that no signal is left long before the "
                f"end: alpha_bar, in float64, begins at {self.alpha_bar[0]:g} and ends at {self.alpha_bar[-1]:g}"
            )

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def snr(self) -> Float[Tensor, " T"]:
        """alpha_bar / (1 - alpha_bar) at every t."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def q_sample(
        self, x_0: Float[Tensor, "b *chw"], t: Int64[Tensor, " b"], eps: Float[Tensor, "b *chw"]
    ) -> Float[Tensor, "b *chw"]:
        """Draw x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), with eps ~ N(0, I) (eq. 4)."""
        alpha, sigma = self.alpha_sigma(t)
        return expand_like(alpha, x_0) * x_0 + expand_like(sigma, x_0) * eps

    def alpha_sigma(self, t: Int64[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) at each t, in float64 on the CPU; `level` for one t."""
        alpha_bar = self.alpha_bar[t.cpu()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def level(self, t: int | None) -> "NoiseLevel":
        """Return how much signal and noise x_t holds; None stands for the step behind t = 0, the picture."""
        alpha_bar = 1.0 if t is None else self.alpha_bar[t].item()
        return NoiseLevel(alpha=alpha_bar**0.5, sigma=(1 - alpha_bar) ** 0.5)

    def posterior(self, t: int, t_prev: int | None) -> "Posterior":
        """Return q(x_{t_prev} | x_t, x_0) for a chain that jumps from t to t_prev (eq. 6 and 7).

        A chain that visits only some timesteps is a chain with other betas: 1 - alpha_bar_t / alpha_bar_{t_prev}
        (Nichol and Dhariwal 2021, eq. 19). For t_prev = t - 1 that is beta_t. None stands for the step behind t = 0,
        the picture.
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
        """Return the variance of p(x_0 | x_1), the Gaussian that the chain's last step is in the likelihood.

        The posterior's own is 0 there; the next one stands in for it, as in the code of Ho et al. 2020 and Nichol and
        Dhariwal 2021.
        """
        return self.posterior(1, 0).variance if self.num_timesteps > 1 else self.betas[0].item()

    def sampling_timesteps(
        self, steps: int | None, spacing: Spacing = "trailing", *, include_first: bool = True
    ) -> list[int]:
        """Return the timesteps that a chain of `steps` steps visits, the noisiest first; None visits all of them.

        They lie in equal gaps (the names are diffusers'; Lin et al. 2023, table 2): "trailing" counts the gaps from the
        end, so that T - 1, where sampling starts from pure noise, is always visited; "leading" counts them from
        steps_offset up and leaves T - 1 out; "linspace" visits both ends, from two steps on.

        include_first: without it "leading" and "linspace" leave out the least noisy one, for samplers whose last step
            goes to x_0 from the next one.
        """
        total = self.num_timesteps
        if steps is None or steps == total:
            return list(reversed(range(total)))
        if not 1 <= steps <= total:
            raise UserError(f"steps: {steps} must lie between 1 and the {total} steps of the chain")
        points = steps if include_first else steps + 1
        match spacing:
            case "trailing":
                return [round(total - i * total / steps) - 1 for i in range(steps)]
            case "leading":
                gap, offset = total // points, self.config.steps_offset
                timesteps = [i * gap + offset for i in reversed(range(points))][:steps]
                if timesteps[0] >= total:
                    raise UserError(
                        f"steps: {steps} with schedule.steps_offset={offset} reach beyond the "
                        f"{total} steps of the chain; expected fewer"
                    )
                return timesteps
            case "linspace":
                return [round(i * (total - 1) / max(1, points - 1)) for i in reversed(range(points))][:steps]


@dataclass(frozen=True)
class NoiseLevel:
    """x_t = alpha x_0 + sigma eps, with alpha^2 + sigma^2 = 1, alpha^2 being alpha_bar.

    Solvers see the same level on two other scales, each infinite where nothing but noise or nothing but signal is left.
    """

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha: the noise of x_t / alpha, which is x_0 with noise added. The sigma of Karras et al. 2022."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), the lambda of Lu et al. 2022."""
        return -math.log(self.ratio) if self.sigma else math.inf


@dataclass(frozen=True)
class Posterior:
    """A Gaussian with mean x_0_coefficient x_0 + x_t_coefficient x_t; `beta` is the upper choice of variance."""

    x_0_coefficient: float
    x_t_coefficient: float
    variance: float
    beta: float


def expand_like(coefficient: Float[Tensor, " n"], x: Float[Tensor, "b *chw"]) -> Float[Tensor, "n *ones"]:
    """Shape one coefficient an example so that it multiplies `x`, in the dtype and on the device of `x`.

    The one door for broadcasting: (8,) against (8, 1) would silently become (8, 8).
    """
    if coefficient.shape != x.shape[:1]:
        raise ValueError(f"expected one coefficient an example, {tuple(x.shape[:1])}, not {tuple(coefficient.shape)}")
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
            case "cosine":
                share_done = torch.arange(steps + 1, dtype=torch.float64) / steps
                alpha_bar = ((share_done + 0.008) / 1.008 * math.pi / 2).cos() ** 2
                betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
            case "sigmoid":  # its flat ends are cut at -6 and 6, as diffusers does
                betas = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start
    return _with_zero_terminal_snr(betas) if config.zero_terminal_snr else betas


def _with_zero_terminal_snr(betas: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Bend sqrt(alpha_bar) so that its last value is 0 and its first stays (Lin et al. 2023, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
