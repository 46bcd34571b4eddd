import json
import math
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
def test_tables_and_noising_are_those_of_diffusers(config: ScheduleConfig):
    ours, theirs = NoiseSchedule(config), DDPMScheduler.from_config(to_diffusers(config))
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-4, atol=1e-6)
    # Theirs are products of 1000 factors in fp32.
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    x_0, eps = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    t = torch.arange(5) * (config.num_timesteps - 1) // 4
    torch.testing.assert_close(ours.q_sample(x_0, t, eps), theirs.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_ends_at_nothing_and_begins_where_it_was():
    for kind in ("linear", "scaled_linear", "cosine", "sigmoid"):
        before, after = (NoiseSchedule(ScheduleConfig(beta_schedule=kind, zero_terminal_snr=z)) for z in (False, True))
        assert after.alpha_bar[-1] == after.snr[-1] == 0
        torch.testing.assert_close(after.alpha_bar[0], before.alpha_bar[0])
        assert (after.betas > 0).all()
        assert (after.betas <= 1).all()


@pytest.mark.parametrize("t", [None, 0, 500, 999])
def test_a_level_is_one_point_on_three_scales(t: int | None):
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
    """Bayes: q(x_prev | x_t, x_0) is proportional to q(x_t | x_prev) q(x_prev | x_0), whose precisions add."""
    schedule = NoiseSchedule(ScheduleConfig())
    alpha_bar, alpha_bar_prev = schedule.alpha_bar[t].item(), schedule.alpha_bar[t_prev].item()
    shrink = (alpha_bar / alpha_bar_prev) ** 0.5  # x_t = shrink x_prev + noise of variance 1 - shrink^2
    likelihood_precision = shrink**2 / (1 - shrink**2)
    prior_precision = 1 / (1 - alpha_bar_prev)
    variance = 1 / (likelihood_precision + prior_precision)
    posterior = schedule.posterior(t, t_prev)
    assert posterior.variance == pytest.approx(variance)
    assert posterior.x_0_coefficient == pytest.approx(variance * prior_precision * alpha_bar_prev**0.5)
    assert posterior.x_t_coefficient == pytest.approx(variance * likelihood_precision / shrink)
    assert posterior.beta == pytest.approx(1 - shrink**2)


def test_the_posterior_of_the_last_step_is_x_0_itself():
    posterior = NoiseSchedule(ScheduleConfig()).posterior(0, None)
    assert posterior.x_0_coefficient == pytest.approx(1)
    assert posterior.x_t_coefficient == posterior.variance == 0


@pytest.mark.parametrize("steps", [1, 7, 10, 50, 999, 1000])
def test_shorter_chains_visit_the_timesteps_of_diffusers(steps: int):
    ours = NoiseSchedule(ScheduleConfig()).sampling_timesteps(steps)
    theirs = DDPMScheduler.from_config(to_diffusers(ScheduleConfig()))
    theirs.set_timesteps(steps)
    assert ours == theirs.timesteps.tolist()
    assert ours[0] == 999


def test_no_steps_given_means_the_whole_chain():
    assert NoiseSchedule(ScheduleConfig(num_timesteps=5)).sampling_timesteps(None) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_outside_the_chain_are_refused(steps: int):
    with pytest.raises(UserError, match=f"{steps} must lie between 1 and the 1000 steps"):
        NoiseSchedule(ScheduleConfig()).sampling_timesteps(steps)


@pytest.mark.parametrize("config", EVERY_KIND)
def test_the_file_of_diffusers_and_back_loses_nothing(config: ScheduleConfig, tmp_path: Path):
    """Through the file itself, written by diffusers."""
    DDPMScheduler.from_config(to_diffusers(config)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "scheduler_config.json").read_text())
    fields.pop("prediction_type")  # the pipeline's business
    assert from_diffusers(fields) == config


def test_a_spacing_that_is_left_to_the_sampler_is_not_written():
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
def test_a_scheduler_that_we_do_not_do_is_refused_by_name(field: str, value: object):
    with pytest.raises(UserError, match=f"{field}: {value!r} is not supported"):
        from_diffusers({**to_diffusers(ScheduleConfig()), field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_timesteps": 10**12}, "schedule.num_timesteps: 1000000000000;"),
        ({"betas": (0.1, 0.2)}, "schedule.betas: 2 values for schedule.num_timesteps=1000"),
        ({"num_timesteps": 2, "betas": (0.1, 1.5)}, "schedule.betas: number 1 is 1.5"),
        ({"num_timesteps": 2, "betas": (1.0, 1.0)}, "schedule.betas: number 0 is 1.0"),
        ({"num_timesteps": 1, "zero_terminal_snr": True}, "schedule.zero_terminal_snr: "),
        ({"steps_offset": 1}, "schedule.steps_offset: 1 applies only to"),
        ({"spacing": "leading", "steps_offset": -1}, "schedule.steps_offset: -1;"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields: dict, message: str):
    with pytest.raises(UserError) as refusal:
        ScheduleConfig(**fields)
    assert message in str(refusal.value)


@pytest.mark.parametrize("fields", [{"beta_start": 0.5, "beta_end": 0.99}, {"beta_start": 1e-18}])
def test_betas_that_float64_cannot_multiply_are_refused(fields: dict):
    with pytest.raises(UserError, match="schedule: betas so small .* or so large .*: alpha_bar, in float64, begins at"):
        NoiseSchedule(ScheduleConfig(**fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_train_timesteps", "1000"), ("trained_betas", 0.1), ("beta_schedule", ["x"]), ("clip_sample", 1)],
)
def test_a_scheduler_file_with_a_wrong_type_is_refused(field: str, value: object):
    with pytest.raises(UserError, match="scheduler config: "):
        from_diffusers({**to_diffusers(ScheduleConfig()), field: value})


def test_an_offset_that_leads_beyond_the_chain_is_refused():
    schedule = NoiseSchedule(ScheduleConfig(10, spacing="leading", steps_offset=3))
    assert schedule.sampling_timesteps(2, "leading") == [8, 3]
    with pytest.raises(UserError, match="steps: 5 with schedule.steps_offset=3 reach beyond the 10 steps"):
        schedule.sampling_timesteps(5, "leading")


def test_per_example_refuses_what_would_broadcast_silently():
    x = torch.zeros(8, 1, 4, 4)
    assert expand_like(torch.ones(8, dtype=torch.float64), x).shape == (8, 1, 1, 1)
    with pytest.raises(ValueError, match="one coefficient an example"):
        expand_like(torch.ones(4), x)
