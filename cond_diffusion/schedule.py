"""The noise schedule and the algebra of the forward process (Ho et al. 2020, "Denoising Diffusion Probabilistic
Models").

Vocabulary of the whole package:

    x_0, x_t, x_T     a picture in [-1, 1]; the same after t + 1 noising steps; (almost) pure noise
    t                 integer timesteps, counted from 0: t = 0 is the first, least noisy step (Ho et al. count from 1)
    num_timesteps     T, the number of steps of the chain
    betas             beta_t, the variance that step t adds
    alpha_bar         the product of 1 - beta up to and including t; written alpha-bar in the papers
    snr               alpha_bar / (1 - alpha_bar), the signal-to-noise ratio
    eps, eps_hat      the noise that was drawn; the noise that the network predicts
    x_0_hat           the picture that eps_hat implies
    posterior         q(x_{t-1} | x_t, x_0); its variance is the beta-tilde of the paper
    context           the text embeddings that the network reads; null_context those of the empty caption
    guidance_scale    w in uncond + w (cond - uncond): 1 is unguided, 0 unconditional
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cond_diffusion.errors import UserError, refuse_other_values


@dataclass(frozen=True)
class ScheduleConfig:
    """beta rises linearly from beta_start to beta_end over num_timesteps (Ho et al. 2020, section 4).

    variance: of a step of ancestral sampling, the posterior's or beta itself, its lower and upper bound (section 3.2).
    clip_x_0: whether sampling keeps x_0_hat in [-1, 1], the range of pixels.
    """

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    variance: Literal["posterior", "beta"] = "posterior"
    clip_x_0: bool = True

    def __post_init__(self) -> None:
        if self.num_timesteps < 1:
            raise UserError(f"schedule.num_timesteps: {self.num_timesteps} must be at least 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"schedule.beta_start, schedule.beta_end: {self.beta_start} and {self.beta_end}; "
                "expected 0 < beta_start <= beta_end < 1"
            )


class NoiseSchedule:
    """The tables of one chain, and what follows from them.

    The tables are float64 and belong to no module. float64: half precision rounds alpha_bar[0] to 1, and the noise that
    is left there, 1 - alpha_bar[0], to 0. No module: buffers get cast and averaged by accident.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.betas = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)
        self.alpha_bar = (1 - self.betas).cumprod(0)

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def q_sample(
        self, x_0: Float[Tensor, "b *chw"], t: Int64[Tensor, " b"], eps: Float[Tensor, "b *chw"]
    ) -> Float[Tensor, "b *chw"]:
        """Draw x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), with eps ~ N(0, I) (eq. 4)."""
        alpha_bar = self.alpha_bar[t.cpu()]
        return per_example(alpha_bar.sqrt(), x_0) * x_0 + per_example((1 - alpha_bar).sqrt(), x_0) * eps

    def predict_x_0(
        self, x_t: Float[Tensor, "b *chw"], t: int, eps_hat: Float[Tensor, "b *chw"]
    ) -> Float[Tensor, "b *chw"]:
        """Solve `q_sample` for x_0, with eps_hat in the place of eps (eq. 15)."""
        alpha_bar = self.alpha_bar[t].item()
        return (x_t - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5

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

    def shorter_chain(self, steps: int | None) -> list[int]:
        """Return the timesteps that a chain of `steps` steps visits, the noisiest first; None visits all of them.

        The spacing is "trailing": equal gaps counted from the end, so that T - 1, where sampling starts from pure
        noise, is always visited (Lin et al. 2023, section 3.3).
        """
        total = self.num_timesteps
        if steps is None:
            steps = total
        if not 1 <= steps <= total:
            raise UserError(f"steps: {steps} must lie between 1 and the {total} steps of the chain")
        return [round(total - i * total / steps) - 1 for i in range(steps)]


@dataclass(frozen=True)
class Posterior:
    """A Gaussian with mean x_0_coefficient x_0 + x_t_coefficient x_t; `beta` is the upper choice of variance."""

    x_0_coefficient: float
    x_t_coefficient: float
    variance: float
    beta: float


def per_example(coefficient: Float[Tensor, " n"], x: Float[Tensor, "b *chw"]) -> Float[Tensor, "n *ones"]:
    """Shape one coefficient an example so that it multiplies `x`, in the dtype and on the device of `x`.

    The one door for broadcasting: (8,) against (8, 1) would silently become (8, 8).
    """
    if coefficient.shape != x.shape[:1]:
        raise ValueError(f"expected one coefficient an example, {tuple(x.shape[:1])}, not {tuple(coefficient.shape)}")
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))


_VARIANCE_TYPES = {"posterior": "fixed_small", "beta": "fixed_large"}

# What diffusers' DDPMScheduler can be told, and ours does in one way only.
_DOES_ONLY = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
# Of no consequence beside the values above.
_IGNORED = {"dynamic_thresholding_ratio", "sample_max_value", "steps_offset"}


def to_diffusers(config: ScheduleConfig) -> dict[str, Any]:
    """Return the `scheduler_config.json` that `DDPMScheduler` reads."""
    return {
        "num_train_timesteps": config.num_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "variance_type": _VARIANCE_TYPES[config.variance],
        "clip_sample": config.clip_x_0,
        **_DOES_ONLY,
    }


def from_diffusers(fields: dict[str, Any]) -> ScheduleConfig:
    """Invert `to_diffusers`; raise UserError, naming the field, for what our schedule does not do."""
    fields = {"timestep_spacing": "leading", **fields}  # diffusers' default, not ours
    refuse_other_values(fields, _DOES_ONLY, "scheduler config")
    fields = {key: value for key, value in fields.items() if not key.startswith("_") and key not in _IGNORED}
    variances: dict[str, Any] = {theirs: ours for ours, theirs in _VARIANCE_TYPES.items()}
    variance_type = fields.pop("variance_type", "fixed_small")
    if variance_type not in variances:
        raise UserError(
            f"scheduler config: variance_type: {variance_type!r} is not supported; expected {list(variances)}"
        )
    config = ScheduleConfig(
        num_timesteps=fields.pop("num_train_timesteps", 1000),
        beta_start=fields.pop("beta_start", 1e-4),
        beta_end=fields.pop("beta_end", 0.02),
        variance=variances[variance_type],
        clip_x_0=fields.pop("clip_sample", True),
    )
    if fields:
        raise UserError(f"scheduler config: {min(fields)} is not a field that this schedule knows")
    return config
