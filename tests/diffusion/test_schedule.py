"""Noise schedules, against closed forms and diffusers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from cond_diffusion.config.schedule import ScheduleConfig, from_diffusers, to_diffusers
from cond_diffusion.diffusion.schedule import NoiseSchedule, expand_like
from cond_diffusion.errors import UserError

EVERY_KIND = [
    ScheduleConfig(),
    ScheduleConfig(400, 1e-4, 0.03),
    ScheduleConfig(1, 0.5, 0.5),
    ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ScheduleConfig(beta_schedule="cosine"),
    ScheduleConfig(300, beta_schedule="cosine"),
    ScheduleConfig(beta_schedule="sigmoid"),
    ScheduleConfig(4, betas=(0.1, 0.3, 0.2, 0.9)),
    ScheduleConfig(zero_terminal_snr=True),
    ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", zero_terminal_snr=True),
    ScheduleConfig(spacing="leading", steps_offset=1, clip_x_0=False),
    ScheduleConfig(500, 2e-4, 0.03, variance="beta", spacing="linspace"),
]


@pytest.mark.parametrize("config", EVERY_KIND)
def test_tables_and_q_sample_equal_those_of_diffusers(config: ScheduleConfig):
    ours, theirs = NoiseSchedule(config), DDPMScheduler.from_config(to_diffusers(config))
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-4, atol=1e-6)
    # diffusers computes products of 1000 factors in fp32.
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    x_0, eps = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    t = torch.arange(5) * (config.num_timesteps - 1) // 4
    torch.testing.assert_close(ours.q_sample(x_0, t, eps), theirs.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_ends_at_0_and_keeps_the_first_alpha_bar():
    for kind in ("linear", "scaled_linear", "cosine", "sigmoid"):
        before, after = (NoiseSchedule(ScheduleConfig(beta_schedule=kind, zero_terminal_snr=z)) for z in (False, True))
        assert after.alpha_bar[-1] == after.snr[-1] == 0
        torch.testing.assert_close(after.alpha_bar[0], before.alpha_bar[0])
        assert (after.betas > 0).all()
        assert (after.betas <= 1).all()


@pytest.mark.parametrize("t", [None, 0, 500, 999])
def test_the_scales_of_a_noise_level_are_consistent(t: int | None):
    level = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)).level(t)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
    if t is None:
        assert (level.ratio, level.half_log_snr) == (0, math.inf)
    elif t == 999:
        assert (level.ratio, level.half_log_snr) == (math.inf, -math.inf)
    else:
        assert level.ratio == pytest.approx(level.sigma / level.alpha)
        assert level.half_log_snr == pytest.approx(math.log(level.alpha / level.sigma))


@pytest.mark.parametrize(("t", "t_prev"), [(999, 998), (1, 0), (999, 499), (700, 3)])
def test_posterior_is_the_product_of_the_two_gaussians(t: int, t_prev: int):
    """By Bayes, q(x_prev | x_t, x_0) is proportional to q(x_t | x_prev) q(x_prev | x_0), whose precisions add."""
    schedule = NoiseSchedule(ScheduleConfig())
    alpha_bar, alpha_bar_prev = schedule.alpha_bar[t].item(), schedule.alpha_bar[t_prev].item()
    scale = (alpha_bar / alpha_bar_prev) ** 0.5  # x_t = scale x_prev + noise of variance 1 - scale^2
    likelihood_precision = scale**2 / (1 - scale**2)
    prior_precision = 1 / (1 - alpha_bar_prev)
    variance = 1 / (likelihood_precision + prior_precision)
    posterior = schedule.posterior(t, t_prev)
    assert posterior.variance == pytest.approx(variance)
    assert posterior.x_0_coefficient == pytest.approx(variance * prior_precision * alpha_bar_prev**0.5)
    assert posterior.x_t_coefficient == pytest.approx(variance * likelihood_precision / scale)
    assert posterior.beta == pytest.approx(1 - scale**2)


def test_the_posterior_of_the_last_step_is_x_0():
    posterior = NoiseSchedule(ScheduleConfig()).posterior(0, None)
    assert posterior.x_0_coefficient == pytest.approx(1)
    assert posterior.x_t_coefficient == posterior.variance == 0


@pytest.mark.parametrize("steps", [None, 5])
def test_no_number_of_steps_and_the_highest_visit_every_timestep(steps: int | None):
    assert NoiseSchedule(ScheduleConfig(num_timesteps=5)).sampling_timesteps(steps) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_outside_the_schedule_are_a_user_error(steps: int):
    with pytest.raises(UserError, match=rf"^steps: {steps} .*1000"):
        NoiseSchedule(ScheduleConfig()).sampling_timesteps(steps)


@pytest.mark.parametrize("config", EVERY_KIND)
def test_config_survives_the_round_trip_through_a_file_of_diffusers(config: ScheduleConfig, tmp_path: Path):
    """The file is written by diffusers."""
    DDPMScheduler.from_config(to_diffusers(config)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "scheduler_config.json").read_text(encoding="utf-8"))
    fields.pop("prediction_type")  # not part of the schedule
    assert from_diffusers(fields) == config


def test_spacing_none_is_not_written():
    config = ScheduleConfig(spacing=None, steps_offset=1)
    assert "timestep_spacing" not in to_diffusers(config)
    assert from_diffusers(to_diffusers(config)) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variance_type", "learned"),
        ("beta_schedule", "laplace"),
        ("timestep_spacing", "random"),
        ("thresholding", True),
        ("clip_sample_range", 2.0),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_an_unsupported_scheduler_option_is_a_user_error(field: str, value: object):
    with pytest.raises(UserError, match=f"{field}: {value!r}"):
        from_diffusers({**to_diffusers(ScheduleConfig()), field: value})


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"num_timesteps": 10**12}, "schedule.num_timesteps: 1000000000000"),
        ({"betas": (0.1, 0.2)}, "schedule.betas: 2"),
        ({"num_timesteps": 2, "betas": (0.1, 1.5)}, "schedule.betas[1]: 1.5"),
        ({"num_timesteps": 2, "betas": (1.0, 1.0)}, "schedule.betas[0]: 1.0"),
        ({"num_timesteps": 1, "zero_terminal_snr": True}, "schedule.zero_terminal_snr: "),
        ({"steps_offset": 1}, "schedule.steps_offset: 1 "),
        ({"spacing": "leading", "steps_offset": -1}, "schedule.steps_offset: -1"),
    ],
)
def test_an_invalid_schedule_is_a_user_error(fields: dict, start: str):
    with pytest.raises(UserError, match=f"^{re.escape(start)}"):
        ScheduleConfig(**fields)


@pytest.mark.parametrize("fields", [{"beta_start": 0.5, "beta_end": 0.99}, {"beta_start": 1e-18}])
def test_betas_beyond_float64_are_a_user_error(fields: dict):
    with pytest.raises(UserError, match=r"^schedule: alpha_bar .*float64"):
        NoiseSchedule(ScheduleConfig(**fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_train_timesteps", "1000"), ("trained_betas", 0.1), ("beta_schedule", ["x"]), ("clip_sample", 1)],
)
def test_a_scheduler_file_with_a_wrong_type_is_a_user_error(field: str, value: object):
    with pytest.raises(UserError, match=rf"^scheduler config: .*{re.escape(repr(value))}"):
        from_diffusers({**to_diffusers(ScheduleConfig()), field: value})


def test_an_offset_beyond_the_schedule_is_a_user_error():
    schedule = NoiseSchedule(ScheduleConfig(10, spacing="leading", steps_offset=3))
    assert schedule.sampling_timesteps(2, "leading") == [8, 3]
    with pytest.raises(UserError, match=r"^steps: 5 with schedule\.steps_offset=3 .*10 "):
        schedule.sampling_timesteps(5, "leading")


def test_expand_like_requires_one_coefficient_per_example():
    x = torch.zeros(8, 1, 4, 4)
    assert expand_like(torch.ones(8, dtype=torch.float64), x).shape == (8, 1, 1, 1)
    with pytest.raises(ValueError, match=r"^coefficient: shape \(4,\) .*\(8,\)"):
        expand_like(torch.ones(4), x)
