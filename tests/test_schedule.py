import pytest
import torch
from diffusers import DDPMScheduler

from cond_diffusion.errors import UserError
from cond_diffusion.schedule import NoiseSchedule, ScheduleConfig, from_diffusers, per_example, to_diffusers


@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(400, 1e-4, 0.03), ScheduleConfig(1, 0.5, 0.5)])
def test_tables_and_noising_are_those_of_diffusers(config: ScheduleConfig):
    ours, theirs = NoiseSchedule(config), DDPMScheduler.from_config(to_diffusers(config))
    torch.testing.assert_close(ours.betas.float(), theirs.betas)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    x_0, eps = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    t = torch.arange(5) * (config.num_timesteps - 1) // 4
    torch.testing.assert_close(ours.q_sample(x_0, t, eps), theirs.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-5)


def test_predict_x_0_inverts_q_sample():
    schedule = NoiseSchedule(ScheduleConfig())
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64).unbind(0)
    for t in (0, 500, 999):
        x_t = schedule.q_sample(x_0, torch.full((3,), t), eps)
        torch.testing.assert_close(schedule.predict_x_0(x_t, t, eps), x_0)


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
    ours = NoiseSchedule(ScheduleConfig()).shorter_chain(steps)
    theirs = DDPMScheduler.from_config(to_diffusers(ScheduleConfig()))
    theirs.set_timesteps(steps)
    assert ours == theirs.timesteps.tolist()
    assert ours[0] == 999


def test_no_steps_given_means_the_whole_chain():
    assert NoiseSchedule(ScheduleConfig(num_timesteps=5)).shorter_chain(None) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_outside_the_chain_are_refused(steps: int):
    with pytest.raises(UserError, match=f"{steps} must lie between 1 and the 1000 steps"):
        NoiseSchedule(ScheduleConfig()).shorter_chain(steps)


def test_the_file_of_diffusers_and_back_loses_nothing():
    config = ScheduleConfig(500, 2e-4, 0.03, variance="beta", clip_x_0=False)
    assert from_diffusers(dict(DDPMScheduler.from_config(to_diffusers(config)).config)) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("variance_type", "learned"),
        ("beta_schedule", "sigmoid"),
        ("thresholding", True),
    ],
)
def test_a_scheduler_that_we_do_not_do_is_refused_by_name(field: str, value: object):
    with pytest.raises(UserError, match=f"{field}: {value!r} is not supported"):
        from_diffusers({**to_diffusers(ScheduleConfig()), field: value})


def test_per_example_refuses_what_would_broadcast_silently():
    x = torch.zeros(8, 1, 4, 4)
    assert per_example(torch.ones(8, dtype=torch.float64), x).shape == (8, 1, 1, 1)
    with pytest.raises(ValueError, match="one coefficient an example"):
        per_example(torch.ones(4), x)
