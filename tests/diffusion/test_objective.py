"""Losses and timestep densities, against the formulas of the papers."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from cond_diffusion.config.run import Loss, ObjectiveConfig, PredictionKind
from cond_diffusion.config.schedule import ScheduleConfig
from cond_diffusion.diffusion.objective import Objective, Prediction
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation.likelihood import step_bits

SCHEDULE = NoiseSchedule(ScheduleConfig(200, 1e-4, 0.08))
EVERY_T = torch.arange(200)
X_0, EPS, ERROR = torch.randn(3, 200, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GAMMA = 3.0  # not the default


def loss_at_every_t(config: ObjectiveConfig, eps_hat: Tensor) -> Tensor:
    """Return the loss at each t of a network whose output, of any prediction type, corresponds to `eps_hat`."""
    objective = Objective(config, SCHEDULE)
    x_t = SCHEDULE.q_sample(X_0, EVERY_T, EPS)
    x_0_hat = Prediction("epsilon", SCHEDULE).denoised(eps_hat, x_t, EVERY_T).x_0_hat
    output = objective.prediction.of(x_0_hat, eps_hat, EVERY_T)

    def at(t: int) -> Tensor:
        one = slice(t, t + 1)
        return objective.loss(lambda *_: output[one], X_0[one], EVERY_T[one], EPS[one], torch.zeros(1, 1, 1))

    return torch.stack([at(t) for t in range(200)])


def squared_errors(eps_hat: Tensor) -> dict[Loss, Tensor]:
    """Return the losses at each t as in their papers, each in its own target."""
    x_t = SCHEDULE.q_sample(X_0, EVERY_T, EPS)
    alpha, sigma = (a.sqrt().reshape(-1, 1, 1) for a in (SCHEDULE.alpha_bar, 1 - SCHEDULE.alpha_bar))
    x_0_hat = (x_t - sigma * eps_hat) / alpha
    v, v_hat = alpha * EPS - sigma * X_0, alpha * eps_hat - sigma * x_0_hat
    snr = SCHEDULE.alpha_bar / (1 - SCHEDULE.alpha_bar)
    in_eps = (EPS - eps_hat).square().mean((1, 2))
    bound = torch.stack([step_bits(SCHEDULE, X_0[t, None], x_0_hat[t, None], t, "posterior")[0] for t in range(1, 200)])
    return {
        "epsilon": in_eps,
        "sample": (X_0 - x_0_hat).square().mean((1, 2)),
        "v_prediction": (v - v_hat).square().mean((1, 2)),
        "min_snr": in_eps * torch.minimum(snr, torch.tensor(GAMMA)) / snr,  # Hang et al. 2023, section 3.4
        "clamped_snr": in_eps * torch.where(snr < 1, 1, torch.where(snr > GAMMA, GAMMA, snr)) / snr,
        "variational_bound": bound,  # without t = 0, the decoder term
    }


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("kind", get_args(PredictionKind))
def test_every_loss_equals_its_paper_for_every_prediction_type(kind: PredictionKind, loss: Loss):
    """Up to a common factor for all t."""
    eps_hat = EPS + 0.1 * ERROR
    found, expected = loss_at_every_t(ObjectiveConfig(kind, loss, GAMMA), eps_hat), squared_errors(eps_hat)[loss]
    ratio = found[-len(expected) :] / expected
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-9, atol=0)
    assert ratio[0] > 0


def test_the_variational_bound_weighs_t_0_by_the_gaussian_decoder():
    """-log N(x_0; x_0_hat, v) grows by error^2 / 2 v; both are converted to weights of the squared error of eps."""
    objective = Objective(ObjectiveConfig(loss="variational_bound"), SCHEDULE)
    noise_to_signal, posterior = 1 / SCHEDULE.snr, SCHEDULE.posterior(1, 0)
    decoder = noise_to_signal[0] / (2 * posterior.variance)
    next_term = noise_to_signal[1] * posterior.x_0_coefficient**2 / (2 * posterior.variance)
    torch.testing.assert_close(objective.weight[0] / objective.weight[1], decoder / next_term)


@pytest.mark.parametrize("loss", get_args(Loss))
def test_with_zero_terminal_snr_the_last_timestep_has_weight_or_is_an_error(loss: Loss):
    schedule, config = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)), ObjectiveConfig("v_prediction", loss)
    if loss in ("epsilon", "min_snr"):
        with pytest.raises(UserError, match=rf"^objective\.loss: {loss} "):
            Objective(config, schedule)
    else:
        assert Objective(config, schedule).weight[-1] > 0


@pytest.mark.parametrize("kind", get_args(PredictionKind))
def test_the_default_loss_is_the_squared_error_of_the_output_and_for_score_that_of_eps(kind: PredictionKind):
    eps_hat = EPS + 0.5
    found, expected = loss_at_every_t(ObjectiveConfig(kind), eps_hat), squared_errors(eps_hat)
    if kind == "score":  # up to a factor, since the errors of its output differ from those of eps
        torch.testing.assert_close(found / found.mean(), expected["epsilon"] / expected["epsilon"].mean())
    else:
        torch.testing.assert_close(found, expected[kind])


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "loss_weight", "later"])
@pytest.mark.parametrize("loss", ["epsilon", "variational_bound"])
def test_the_timestep_density_does_not_change_the_expected_loss(timesteps, loss: Loss):
    eps_hat = EPS + 0.1 * ERROR
    config = ObjectiveConfig(loss=loss, timesteps=timesteps)
    objective = Objective(config, SCHEDULE)
    torch.testing.assert_close(objective.density.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (objective.importance <= 2 + 1e-12).all()
    uniform = loss_at_every_t(ObjectiveConfig(loss=loss), eps_hat).mean()
    torch.testing.assert_close((objective.density * loss_at_every_t(config, eps_hat)).sum(), uniform)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "loss_weight", "later"])
def test_timesteps_are_distributed_by_the_density(timesteps):
    objective = Objective(ObjectiveConfig(loss="variational_bound", timesteps=timesteps), SCHEDULE)
    count = 200_000
    quantiles = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = objective.timesteps_at(quantiles).bincount(minlength=200)
    expected = objective.density * count
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 200 + 4 * (2 * 200) ** 0.5


def test_the_logit_normal_density_equals_that_of_torch():
    density = Objective(ObjectiveConfig(timesteps="logit_normal"), SCHEDULE).density
    time = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    normal = torch.distributions.LogisticNormal(torch.tensor([0.0]).double(), torch.tensor([1.0]).double())
    reference = normal.log_prob(torch.stack([time, 1 - time], dim=-1)).exp()
    torch.testing.assert_close(density, (reference / reference.sum() + 1 / 200) / 2)


def test_half_of_the_density_loss_weight_is_proportional_to_the_weight():
    objective = Objective(ObjectiveConfig(loss="variational_bound", timesteps="loss_weight"), SCHEDULE)
    torch.testing.assert_close(objective.density * 200, (objective.weight + 1) / 2)
    assert objective.weight.max() > 2 * objective.weight.min()


def test_the_density_later_has_the_noisiest_quarter_five_times_as_often():
    density = Objective(ObjectiveConfig(timesteps="later"), SCHEDULE).density
    torch.testing.assert_close(density / density[0], torch.tensor([1.0] * 150 + [5.0] * 50, dtype=torch.float64))


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 5])
def test_the_density_later_is_highest_at_the_last_timestep_of_a_short_schedule(num_timesteps: int):
    schedule = NoiseSchedule(ScheduleConfig(num_timesteps=num_timesteps, beta_end=0.5))
    density = Objective(ObjectiveConfig(timesteps="later"), schedule).density
    torch.testing.assert_close(density.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert density[-1] == density.max()


def test_gradients_reach_the_network():
    weight = torch.ones(2, 3, requires_grad=True)
    objective = Objective(ObjectiveConfig("v_prediction", "min_snr", 1.0), SCHEDULE)
    t = torch.tensor([3, 150])
    assert torch.autograd.gradcheck(
        lambda w: objective.loss(lambda x, *_: w.double() * x, X_0[t], t, EPS[t], torch.zeros(2, 1, 1)),
        weight.detach().double().requires_grad_(),
    )


def test_min_snr_gamma_below_the_lowest_weight_is_a_user_error():
    with pytest.raises(UserError, match=r"objective\.min_snr_gamma: 0.0"):
        ObjectiveConfig(min_snr_gamma=0.0)
    with pytest.raises(UserError, match=r"objective\.min_snr_gamma: 1.0; expected more than 1"):
        ObjectiveConfig(loss="clamped_snr", min_snr_gamma=1.0)
