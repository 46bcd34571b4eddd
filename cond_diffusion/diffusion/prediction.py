"""What the network predicts, and how one prediction becomes any other.

x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps is one equation with two unknowns. A network that tells any second
mixture of the two, a x_0 + b eps, gives the second equation, and so both unknowns:

    name          a                     b                         what it is
    epsilon       0                     1                         the noise (Ho et al. 2020)
    sample        1                     0                         the picture
    v_prediction  -sqrt(1 - alpha_bar)  sqrt(alpha_bar)           v (Salimans and Ho 2022, section 4)
    score         0                     -1 / sqrt(1 - alpha_bar)  grad log q(x_t | x_0) (Song et al. 2021, "Score-Based
                                                                  Generative Modeling through SDEs", eq. 7)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cond_diffusion.config.run import PredictionKind
from cond_diffusion.diffusion.schedule import NoiseSchedule, per_example
from cond_diffusion.errors import UserError


@dataclass(frozen=True)
class Denoised:
    """What x_t is thought to be made of: x_t = sqrt(alpha_bar) x_0_hat + sqrt(1 - alpha_bar) eps_hat."""

    x_0_hat: Float[Tensor, "b *chw"]
    eps_hat: Float[Tensor, "b *chw"]


Denoiser = Callable[[Tensor, int], Denoised]
"""(x_t, t) -> x_0_hat and eps_hat."""


@dataclass(frozen=True)
class Prediction:
    """One meaning of a network's output under one schedule.

    Any prediction becomes any other by way of x_0 and eps: `other.of(*...)` what `this.denoised(...)` returned.
    Raises UserError for epsilon and score where alpha_bar ends at 0: x_t is then eps itself, the network has nothing to
    tell, and x_0 cannot be had from it (Lin et al. 2023, section 3.2).
    """

    kind: PredictionKind
    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        if self.kind in ("epsilon", "score") and self.schedule.alpha_bar[-1] == 0:
            raise UserError(
                f"objective.prediction: {self.kind} tells nothing of the picture where the schedule leaves no signal "
                "(schedule.zero_terminal_snr, or a last beta of 1); expected v_prediction or sample"
            )

    def of(
        self, x_0: Float[Tensor, "b *chw"], eps: Float[Tensor, "b *chw"], t: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b *chw"]:
        """Return what a network that knows x_0 and eps would predict."""
        of_x_0, of_eps = self._mixture(*self.schedule.alpha_sigma(t))
        return per_example(of_x_0, x_0) * x_0 + per_example(of_eps, x_0) * eps

    def denoised(
        self, output: Float[Tensor, "b *chw"], x_t: Float[Tensor, "b *chw"], t: Int64[Tensor, " b"]
    ) -> Denoised:
        """Solve x_t = alpha x_0 + sigma eps and output = a x_0 + b eps, two equations with two unknowns."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        of_x_0, of_eps = self._mixture(alpha, sigma)
        determinant = alpha * of_eps - sigma * of_x_0

        def combine(of_x_t: Tensor, of_output: Tensor) -> Tensor:
            return per_example(of_x_t / determinant, x_t) * x_t + per_example(of_output / determinant, x_t) * output

        return Denoised(x_0_hat=combine(of_eps, -sigma), eps_hat=combine(-of_x_0, alpha))

    def x_0_error(self, t: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return the factor, in float64, from an error of the output to the error of x_0_hat that it causes."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        of_x_0, of_eps = self._mixture(alpha, sigma)
        return sigma / (alpha * of_eps - sigma * of_x_0).abs()

    def _mixture(
        self, alpha: Float[Tensor, " b"], sigma: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return a and b of the table above."""
        none, whole = torch.zeros_like(alpha), torch.ones_like(alpha)
        match self.kind:
            case "epsilon":
                return none, whole
            case "sample":
                return whole, none
            case "v_prediction":
                return -sigma, alpha
            case "score":
                return none, -1 / sigma


def denoiser(
    network: Callable[[Tensor, int], Tensor], prediction: Prediction, *bounds: Callable[[Tensor], Tensor]
) -> Denoiser:
    """Return what samplers call: x_0_hat and eps_hat from the output of `network`, whatever it predicts.

    bounds: what x_0_hat is put through, to keep it where it must be. eps_hat follows it, so that the two always add up
    to x_t, and every sampler goes where x_0_hat is.
    """
    from_x_0_hat = Prediction("sample", prediction.schedule)

    def denoise(x_t: Float[Tensor, "b *chw"], t: int) -> Denoised:
        at = torch.full((len(x_t),), t)
        denoised = prediction.denoised(network(x_t, t), x_t, at)
        x_0_hat = denoised.x_0_hat
        for bound in bounds:
            x_0_hat = bound(x_0_hat)
        return from_x_0_hat.denoised(x_0_hat, x_t, at) if bounds else denoised

    return denoise
