"""The training objective: what the network predicts, and how the loss weighs and samples the timesteps.

Predictions (`Prediction`). x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps is one equation with two unknowns. The
network predicts a second linear combination, a x_0 + b eps, which determines both:

    name          a                     b                         meaning
    epsilon       0                     1                         the noise (Ho et al. 2020)
    sample        1                     0                         the image
    v_prediction  -sqrt(1 - alpha_bar)  sqrt(alpha_bar)           v (Salimans and Ho 2022, section 4)
    score         0                     -1 / sqrt(1 - alpha_bar)  grad log q(x_t | x_0) (Song et al. 2021, "Score-Based
                                                                  Generative Modeling through SDEs", eq. 7)

Losses (`Objective`). For every prediction, the loss is the squared error of x_0_hat times a weight, which is a function
of the timestep's signal-to-noise ratio. By default, it is the squared error of the output (for score, of eps):

    name               weight                       source
    epsilon            snr                          Ho et al. 2020, eq. 14
    sample             1                            squared error of the image
    v_prediction       snr + 1                      Salimans and Ho 2022, section 4
    min_snr            min(snr, min_snr_gamma)      Hang et al. 2023, section 3.4
    clamped_snr        max(min_snr, 1)              the same, but at least 1 (Salimans and Ho 2022, section 4)
    variational_bound  (snr_{t-1} - snr_t) / 2      Kingma et al. 2021, eq. 14
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cond_diffusion.config.run import ObjectiveConfig, PredictionKind, TimestepDensity
from cond_diffusion.diffusion.schedule import Context, Images, NoiseSchedule, PerExample, Timesteps, expand_like
from cond_diffusion.errors import UserError


@dataclass(frozen=True)
class DenoiserOutput:
    """The estimated decomposition x_t = sqrt(alpha_bar) x_0_hat + sqrt(1 - alpha_bar) eps_hat."""

    x_0_hat: Images
    eps_hat: Images


Denoiser = Callable[[Tensor, int], DenoiserOutput]
"""(x_t, t) -> x_0_hat and eps_hat."""


@dataclass(frozen=True)
class Prediction:
    """The meaning of a network's output under a schedule.

    An output is converted to another prediction type by way of x_0 and eps: `denoised` of the one, then `of` the other.

    Raises:
        UserError: For epsilon and score if alpha_bar ends at 0: x_t is then eps itself, and the output contains no
            information about x_0 (Lin et al. 2023, section 3.2).
    """

    kind: PredictionKind
    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        if self.kind in ("epsilon", "score") and self.schedule.alpha_bar[-1] == 0:
            raise UserError(
                f"objective.prediction: {self.kind} does not determine x_0 where alpha_bar is 0 "
                "(schedule.zero_terminal_snr, or a last beta of 1); expected v_prediction or sample"
            )

    def of(self, x_0: Images, eps: Images, t: Timesteps) -> Images:
        """Return the prediction target a x_0 + b eps."""
        a, b = self._coefficients(*self.schedule.alpha_sigma(t))
        return expand_like(a, x_0) * x_0 + expand_like(b, x_0) * eps

    def denoised(self, output: Images, x_t: Images, t: Timesteps) -> DenoiserOutput:
        """Solve x_t = alpha x_0 + sigma eps and output = a x_0 + b eps for x_0 and eps."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        a, b = self._coefficients(alpha, sigma)
        determinant = alpha * b - sigma * a

        def combine(of_x_t: Tensor, of_output: Tensor) -> Tensor:
            return expand_like(of_x_t / determinant, x_t) * x_t + expand_like(of_output / determinant, x_t) * output

        return DenoiserOutput(x_0_hat=combine(b, -sigma), eps_hat=combine(-a, alpha))

    def x_0_error(self, t: Timesteps) -> PerExample:
        """Return the factor, in float64, from an error of the output to the resulting error of x_0_hat."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        a, b = self._coefficients(alpha, sigma)
        return sigma / (alpha * b - sigma * a).abs()

    def _coefficients(self, alpha: PerExample, sigma: PerExample) -> tuple[PerExample, PerExample]:
        """Return a and b of the table of predictions."""
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        match self.kind:
            case "epsilon":
                return zero, one
            case "sample":
                return one, zero
            case "v_prediction":
                return -sigma, alpha
            case "score":
                return zero, -1 / sigma


def denoiser(
    network: Callable[[Tensor, int], Tensor], prediction: Prediction, *bounds: Callable[[Tensor], Tensor]
) -> Denoiser:
    """Return the function (x_t, t) -> x_0_hat and eps_hat that samplers call.

    Args:
        network: (x_t, t) -> output of the type `prediction`.
        prediction: Meaning of the network's output.
        bounds: Functions applied to x_0_hat in turn, for example clipping. eps_hat is recomputed from the result, so
            that both still add up to x_t.
    """
    sample_prediction = Prediction("sample", prediction.schedule)

    def denoise(x_t: Images, t: int) -> DenoiserOutput:
        ts = torch.full((len(x_t),), t)
        output = prediction.denoised(network(x_t, t), x_t, ts)
        if not bounds:
            return output
        x_0_hat = output.x_0_hat
        for bound in bounds:
            x_0_hat = bound(x_0_hat)
        return sample_prediction.denoised(x_0_hat, x_t, ts)

    return denoise


Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, context) -> the network's output, with one timestep per example."""


class Objective:
    """The loss of a config under a schedule: the weight of every timestep, and the density to sample timesteps from.

    Attributes:
        prediction: Meaning of the network's output.
        weight: Weight of the squared error of the output at every t, in float64, with mean 1.
        density: Probability of every t during training, in float64.
        importance: 1 / (T density), which keeps the expected loss the same for every density.

    Raises:
        UserError: If no signal is left at the last timestep and its weight is 0: sampling would start from an output
            that was never trained.
    """

    def __init__(self, config: ObjectiveConfig, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.prediction = Prediction(config.prediction, schedule)
        all_timesteps = torch.arange(schedule.num_timesteps)
        # The loss is computed from the output, not from x_0_hat, to avoid cancellation where x_t holds little signal.
        weight = _weight(config, schedule) * self.prediction.x_0_error(all_timesteps) ** 2
        if weight[-1] == 0:
            raise UserError(
                f"objective.loss: {config.weighting} has weight 0 at the last timestep, where alpha_bar is 0 "
                "(schedule.zero_terminal_snr, or a last beta of 1); expected v_prediction, sample, clamped_snr or "
                "variational_bound"
            )
        # A common factor changes only the meaning of `train.max_grad_norm`; mean 1 keeps all objectives comparable.
        self.weight = weight / weight.mean()
        self.density = _density(config.timesteps, self.weight)
        self.importance = 1 / (self.density * schedule.num_timesteps)

    def timesteps_at(self, quantiles: PerExample) -> Timesteps:
        """Map uniform random numbers in [0, 1] to timesteps distributed by the density (inverse transform sampling).

        Runs on the CPU, where the tables are, and so never waits for an accelerator.
        """
        return torch.searchsorted(self.density.cumsum(0), quantiles).clamp(max=self.schedule.num_timesteps - 1)

    def loss(self, network: Network, x_0: Images, t: Timesteps, eps: Images, context: Context) -> Float[Tensor, ""]:
        """Return the mean loss of a batch, importance-weighted by the density of each t."""
        losses = self.losses(network, x_0, t, eps, context)
        return (self.importance[t.cpu()].to(losses) * losses).mean()

    def losses(self, network: Network, x_0: Images, t: Timesteps, eps: Images, context: Context) -> PerExample:
        """Return weight_t mean((target - output(x_t, t, context))^2) for each example."""
        output = network(self.schedule.q_sample(x_0, t, eps), t.to(x_0.device), context)
        error = (output - self.prediction.of(x_0, eps, t)).square().flatten(1).mean(1)
        return self.weight[t.cpu()].to(error) * error


def _weight(config: ObjectiveConfig, schedule: NoiseSchedule) -> Float[Tensor, " T"]:
    """Return the weight of the squared error of x_0_hat at every t, up to a common factor."""
    snr = schedule.snr
    match config.weighting:
        case "epsilon":
            return snr
        case "sample":
            return torch.ones_like(snr)
        case "v_prediction":
            return snr + 1
        case "min_snr":
            return snr.clamp(max=config.min_snr_gamma)
        case "clamped_snr":
            return snr.clamp(1, config.min_snr_gamma)
        case "variational_bound":
            # The term at t = 0 is the decoder's, a Gaussian around x_0_hat (`NoiseSchedule.decoder_variance`).
            decoder = torch.tensor([1 / schedule.decoder_variance], dtype=snr.dtype)
            return torch.cat([decoder, snr[:-1] - snr[1:]]) / 2


def _density(kind: TimestepDensity, weight: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Return the probability of every t. Half of each density is uniform, which bounds the importance weights by 2."""
    match kind:
        case "uniform":
            density = torch.ones_like(weight)
        case "logit_normal":
            time = (torch.arange(len(weight), dtype=weight.dtype) + 0.5) / len(weight)
            density = torch.exp(-(time.logit() ** 2) / 2) / (time * (1 - time))
        case "loss_weight":
            density = weight
        case "later":
            density = torch.zeros_like(weight)
            density[len(weight) * 3 // 4 :] = 1
    uniform = torch.full_like(weight, 1 / len(weight))
    return (density / density.sum() + uniform) / 2
