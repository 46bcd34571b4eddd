"""What training minimises. Three choices, kept apart: what the network predicts, how the loss weighs the timesteps, and
how often each of them is drawn.

Whatever the network predicts, its loss is the squared error of x_0_hat times a weight of the timestep, a function of
the signal-to-noise ratio. What is called "the epsilon loss" is one of those weights:

    name               weight                       source
    epsilon            snr                          Ho et al. 2020, eq. 14
    sample             1                            the picture's own squared error
    v_prediction       snr + 1                      Salimans and Ho 2022, section 4
    min_snr            min(snr, min_snr_gamma)      Hang et al. 2023, section 3.4
    variational_bound  (snr_{t-1} - snr_t) / 2      Kingma et al. 2021, eq. 14: the likelihood's own
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cond_diffusion.config.run import ObjectiveConfig, PredictionKind, TimestepDensity
from cond_diffusion.diffusion.schedule import NoiseSchedule, expand_like
from cond_diffusion.errors import UserError


@dataclass(frozen=True)
class DenoiserOutput:
    """What x_t is thought to be made of: x_t = sqrt(alpha_bar) x_0_hat + sqrt(1 - alpha_bar) eps_hat."""

    x_0_hat: Float[Tensor, "b *chw"]
    eps_hat: Float[Tensor, "b *chw"]


Denoiser = Callable[[Tensor, int], DenoiserOutput]
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
        return expand_like(of_x_0, x_0) * x_0 + expand_like(of_eps, x_0) * eps

    def denoised(
        self, output: Float[Tensor, "b *chw"], x_t: Float[Tensor, "b *chw"], t: Int64[Tensor, " b"]
    ) -> DenoiserOutput:
        """Solve x_t = alpha x_0 + sigma eps and output = a x_0 + b eps, two equations with two unknowns."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        of_x_0, of_eps = self._mixture(alpha, sigma)
        determinant = alpha * of_eps - sigma * of_x_0

        def combine(of_x_t: Tensor, of_output: Tensor) -> Tensor:
            return expand_like(of_x_t / determinant, x_t) * x_t + expand_like(of_output / determinant, x_t) * output

        return DenoiserOutput(x_0_hat=combine(of_eps, -sigma), eps_hat=combine(-of_x_0, alpha))

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

    def denoise(x_t: Float[Tensor, "b *chw"], t: int) -> DenoiserOutput:
        at = torch.full((len(x_t),), t)
        denoised = prediction.denoised(network(x_t, t), x_t, at)
        x_0_hat = denoised.x_0_hat
        for bound in bounds:
            x_0_hat = bound(x_0_hat)
        return from_x_0_hat.denoised(x_0_hat, x_t, at) if bounds else denoised

    return denoise


Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, context) -> what the network predicts, for a batch with a timestep each."""


class Objective:
    """The loss of one config under one schedule, as a table of weights and a density of timesteps, in float64.

    Raises UserError for a loss that gives the last timestep no weight, where no signal is left there: sampling begins
    with an answer that was never trained.
    """

    def __init__(self, config: ObjectiveConfig, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.prediction = Prediction(config.prediction, schedule)
        every_t = torch.arange(schedule.num_timesteps)
        # The error of x_0_hat, seen from the output: there nothing cancels, however little signal x_t holds.
        weight = _weight(config, schedule) * self.prediction.x_0_error(every_t) ** 2
        if weight[-1] == 0:
            raise UserError(
                f"objective.loss: {config.loss} gives the last timestep no weight where the schedule leaves no signal "
                "there (schedule.zero_terminal_snr, or a last beta of 1); expected v_prediction or sample"
            )
        # One factor for all t changes what `train.max_grad_norm` means, and nothing else; a mean of 1 keeps the losses
        # of all objectives near each other.
        self.weight = weight / weight.mean()
        self.density = _density(config.timesteps, self.weight)
        self.importance = 1 / (self.density * schedule.num_timesteps)  # of one draw, so that the mean stays what it is

    def timesteps_at(self, places: Float[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """Turn numbers drawn uniformly from 0 to 1 into timesteps drawn from the density.

        On the CPU, where the tables are: looking them up then waits for no accelerator.
        """
        return torch.searchsorted(self.density.cumsum(0), places).clamp(max=self.schedule.num_timesteps - 1)

    def loss(
        self,
        network: Network,
        x_0: Float[Tensor, "b *chw"],
        t: Int64[Tensor, " b"],
        eps: Float[Tensor, "b *chw"],
        context: Float[Tensor, "b l d"],
    ) -> Float[Tensor, ""]:
        """Return the mean of the examples' losses, each divided by how likely its t is drawn."""
        losses = self.losses(network, x_0, t, eps, context)
        return (self.importance[t.cpu()].to(losses) * losses).mean()

    def losses(
        self,
        network: Network,
        x_0: Float[Tensor, "b *chw"],
        t: Int64[Tensor, " b"],
        eps: Float[Tensor, "b *chw"],
        context: Float[Tensor, "b l d"],
    ) -> Float[Tensor, " b"]:
        """Return weight_t (target - output(x_t, t, context))^2 for each example, x_t being x_0 with eps."""
        output = network(self.schedule.q_sample(x_0, t, eps), t.to(x_0.device), context)
        error = (output - self.prediction.of(x_0, eps, t)).square().flatten(1).mean(1)
        return self.weight[t.cpu()].to(error) * error


def _weight(config: ObjectiveConfig, schedule: NoiseSchedule) -> Float[Tensor, " T"]:
    """Return the weight of the squared error of x_0_hat at every t, up to one factor for all."""
    snr = schedule.snr
    match config.loss:
        case "epsilon":
            return snr
        case "sample":
            return torch.ones_like(snr)
        case "v_prediction":
            return snr + 1
        case "min_snr":
            return snr.clamp(max=config.min_snr_gamma)
        case "variational_bound":
            # Behind t = 0 stands the decoder, a Gaussian around x_0_hat (`NoiseSchedule.decoder_variance`).
            decoder = torch.tensor([1 / schedule.decoder_variance], dtype=snr.dtype)
            return torch.cat([decoder, snr[:-1] - snr[1:]]) / 2


def _density(kind: TimestepDensity, weight: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Return how likely each t is drawn. Half of every density is uniform, so no loss is multiplied by more than 2."""
    match kind:
        case "uniform":
            density = torch.ones_like(weight)
        case "logit_normal":
            share = (torch.arange(len(weight), dtype=weight.dtype) + 0.5) / len(weight)
            density = torch.exp(-(share.logit() ** 2) / 2) / (share * (1 - share))
        case "loss_weight":
            density = weight
    uniform = torch.full_like(weight, 1 / len(weight))
    return (density / density.sum() + uniform) / 2
