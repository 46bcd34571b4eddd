"""Prediction types, against their definitions in the papers and diffusers."""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from cond_diffusion.config.run import PredictionKind
from cond_diffusion.config.schedule import ScheduleConfig
from cond_diffusion.diffusion.objective import Prediction, denoiser
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError

KINDS: tuple[PredictionKind, ...] = get_args(PredictionKind)
SCHEDULE = NoiseSchedule(ScheduleConfig())
T = torch.tensor([0, 1, 500, 999])


@pytest.fixture
def x_0_and_eps() -> tuple[Tensor, Tensor]:
    x_0, eps = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x_0, eps


def test_each_target_equals_the_definition_of_its_paper(x_0_and_eps: tuple[Tensor, Tensor]):
    x_0, eps = x_0_and_eps
    alpha_bar = SCHEDULE.alpha_bar[T].reshape(-1, 1, 1, 1)
    x_t = SCHEDULE.q_sample(x_0, T, eps).requires_grad_()
    log_density = -((x_t - alpha_bar.sqrt() * x_0) ** 2 / (2 * (1 - alpha_bar))).sum()
    (score,) = torch.autograd.grad(log_density, x_t)
    expected = {
        "epsilon": eps,
        "sample": x_0,
        "score": score,
        "v_prediction": DDIMScheduler(beta_end=0.02, beta_schedule="linear")
        .get_velocity(x_0.float(), eps.float(), T)
        .double(),
    }
    for kind in KINDS:
        tolerance = 1e-5 if kind == "v_prediction" else 1e-9  # diffusers' tables are fp32
        found = Prediction(kind, SCHEDULE).of(x_0, eps, T)
        torch.testing.assert_close(found, expected[kind], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_x_0_and_eps_are_recovered_from_every_target(kind: PredictionKind, x_0_and_eps: tuple[Tensor, Tensor]):
    x_0, eps = x_0_and_eps
    prediction = Prediction(kind, SCHEDULE)
    denoised = prediction.denoised(prediction.of(x_0, eps, T), SCHEDULE.q_sample(x_0, T, eps), T)
    torch.testing.assert_close(denoised.x_0_hat, x_0)
    torch.testing.assert_close(denoised.eps_hat, eps)


@pytest.mark.parametrize("kind", KINDS)
def test_x_0_error_is_the_ratio_of_the_errors_of_x_0_hat_and_the_output(kind: PredictionKind):
    prediction = Prediction(kind, SCHEDULE)
    output, x_t = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    error = prediction.denoised(output + 1, x_t, T).x_0_hat - prediction.denoised(output, x_t, T).x_0_hat
    torch.testing.assert_close(error.abs(), prediction.x_0_error(T)[:, None].expand(4, 2))


@pytest.mark.parametrize("kind", ["epsilon", "score"])
def test_epsilon_and_score_with_zero_terminal_snr_are_a_user_error(kind: PredictionKind):
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    with pytest.raises(UserError, match=rf"^objective\.prediction: {kind} .*v_prediction or sample"):
        Prediction(kind, schedule)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_sample_and_v_prediction_determine_x_0_without_signal(kind: PredictionKind, x_0_and_eps: tuple[Tensor, Tensor]):
    x_0, eps = x_0_and_eps
    schedule, last = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)), torch.full((4,), 999)
    prediction = Prediction(kind, schedule)
    x_t = schedule.q_sample(x_0, last, eps)
    torch.testing.assert_close(x_t, eps)
    torch.testing.assert_close(prediction.denoised(prediction.of(x_0, eps, last), x_t, last).x_0_hat, x_0)


def test_bounds_apply_to_x_0_hat_and_eps_hat_is_recomputed():
    denoise = denoiser(
        lambda x, t: -3 * x, Prediction("epsilon", SCHEDULE), lambda x_0: x_0.clamp(-1, 1), lambda x_0: x_0 / 2
    )
    x_t = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    denoised = denoise(x_t, 300)
    assert denoised.x_0_hat.abs().max() == 0.5
    torch.testing.assert_close(SCHEDULE.q_sample(denoised.x_0_hat, torch.full((8,), 300), denoised.eps_hat), x_t)
