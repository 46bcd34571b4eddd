"""Samplers against models whose answer is known, and against diffusers."""

from typing import Literal

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from cond_diffusion.samplers import ddpm
from cond_diffusion.schedule import NoiseSchedule, ScheduleConfig, to_diffusers

Variance = Literal["posterior", "beta"]


def gaussian_denoiser(schedule: NoiseSchedule, mean: float, deviation: float):
    """The best eps_hat for data N(mean, deviation^2): E[eps | x_t], eps and x_t being jointly Gaussian."""

    def denoiser(x_t: Tensor, t: int) -> Tensor:
        alpha_bar = schedule.alpha_bar[t].item()
        variance = alpha_bar * deviation**2 + 1 - alpha_bar
        return (1 - alpha_bar) ** 0.5 * (x_t - alpha_bar**0.5 * mean) / variance

    return denoiser


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.5), (-1.0, 0.3), (2.0, 1.0)])
def test_ddpm_draws_the_gaussian_that_its_denoiser_knows(variance: Variance, mean: float, deviation: float):
    schedule = NoiseSchedule(ScheduleConfig())
    draw = torch.Generator().manual_seed(0)
    count = 40_000

    def noise() -> Tensor:
        return torch.randn(count, 1, generator=draw)

    chain = ddpm(
        gaussian_denoiser(schedule, mean, deviation),
        schedule,
        noise(),
        schedule.shorter_chain(None),
        noise,
        variance=variance,
        clip_x_0=False,
    )
    *_, last = chain
    # Four standard errors of the estimates, and 1% for the chain's own discretisation (more than it is from 0.3 up).
    assert last.x.mean().item() == pytest.approx(mean, abs=4 * deviation / count**0.5 + 0.01 * deviation)
    assert last.x.std().item() == pytest.approx(deviation, rel=4 / (2 * count) ** 0.5 + 0.01)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("clip_x_0", [True, False])
@pytest.mark.parametrize("steps", [None, 37])
def test_ddpm_takes_the_steps_of_diffusers(variance: Variance, clip_x_0: bool, steps: int | None):
    config = ScheduleConfig(200, 1e-4, 0.05, variance=variance, clip_x_0=clip_x_0)
    schedule, theirs = NoiseSchedule(config), DDPMScheduler.from_config(to_diffusers(config))
    theirs.set_timesteps(steps or config.num_timesteps)
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) / 3

    def denoiser(x_t: Tensor, t: int) -> Tensor:
        return torch.tanh(x_t @ weight + t / 200)

    x = x_T = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    our_draw, their_draw = (torch.Generator().manual_seed(3) for _ in range(2))
    chain = ddpm(
        denoiser,
        schedule,
        x_T,
        schedule.shorter_chain(steps),
        lambda: torch.randn(x_T.shape, generator=our_draw),
        variance=variance,
        clip_x_0=clip_x_0,
    )
    visited = 0
    for step, t in zip(chain, theirs.timesteps.tolist(), strict=True):
        assert step.t == t
        result = theirs.step(denoiser(x, t), t, x, generator=their_draw)
        x = result.prev_sample
        torch.testing.assert_close(step.x_0_hat, result.pred_original_sample, rtol=1e-3, atol=1e-3)
        visited += 1
        if visited == len(theirs.timesteps) and t > 0 and variance == "beta":
            break  # diffusers adds noise to the last step of a shorter chain, which leads to the picture itself
        torch.testing.assert_close(step.x, x, rtol=1e-4, atol=1e-4)
    assert visited == (steps or 200)


def test_the_mean_is_equation_11_and_the_last_step_adds_no_noise():
    schedule = NoiseSchedule(ScheduleConfig(50, 1e-3, 0.2))
    eps_hat = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def fail() -> Tensor:
        raise AssertionError("the last step drew noise")

    for t, timesteps, noise in ((0, [0], fail), (20, [20, 19], lambda: torch.zeros(4, 2, dtype=torch.float64))):
        chain = ddpm(lambda x, t: eps_hat, schedule, x_t, timesteps, noise, variance="beta", clip_x_0=False)
        alpha, alpha_bar = 1 - schedule.betas[t], schedule.alpha_bar[t]
        mean = (x_t - (1 - alpha) / (1 - alpha_bar).sqrt() * eps_hat) / alpha.sqrt()
        torch.testing.assert_close(next(chain).x, mean)


def test_clipping_keeps_the_last_picture_in_the_range_of_the_data():
    schedule = NoiseSchedule(ScheduleConfig(20, 1e-3, 0.5))
    draw = torch.Generator().manual_seed(0)
    x_T = torch.randn(16, 4, generator=draw)

    def last(clip_x_0: bool) -> Tensor:
        *_, step = ddpm(
            lambda x, t: -2 * x,
            schedule,
            x_T,
            schedule.shorter_chain(None),
            lambda: torch.randn(x_T.shape, generator=draw),
            variance="posterior",
            clip_x_0=clip_x_0,
        )
        return step.x

    assert last(clip_x_0=True).abs().max() <= 1 + 1e-6
    assert last(clip_x_0=False).abs().max() > 1
