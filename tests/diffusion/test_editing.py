"""Editing of input images: the start of sampling, the kept region, and RePaint's resampling."""

from functools import partial

import pytest
import torch
from oracles import SAMPLERS, mixture_denoiser
from torch import Tensor

from cond_diffusion.config.schedule import ScheduleConfig
from cond_diffusion.diffusion.guidance import Edit, repaint
from cond_diffusion.diffusion.objective import Denoiser, DenoiserOutput, Prediction, denoiser
from cond_diffusion.diffusion.samplers import ddpm
from cond_diffusion.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(ScheduleConfig(200, 1e-4, 0.1))


def correlated_denoiser(edit: Edit) -> Denoiser:
    """Return the optimal denoiser of pairs of N(0, 1) pixels with correlation 0.9, with the edit's mask applied."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)

    def x_0_hat(x_t: Tensor, t: int) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar[t]
        noised = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(2)
        gain = alpha_bar.sqrt() * covariance @ torch.linalg.inv(noised)
        return (x_t.reshape(-1, 2) @ gain.T).reshape(x_t.shape)

    return denoiser(x_0_hat, Prediction("sample", SCHEDULE), edit.apply_mask)


@pytest.mark.parametrize(("strength", "count"), [(0.0, 0), (0.01, 1), (0.1, 1), (0.5, 5), (0.96, 10), (1.0, 10)])
def test_strength_is_the_fraction_of_the_timesteps_that_are_run(strength: float, count: int):
    timesteps = SCHEDULE.sampling_timesteps(10)
    assert Edit(strength=strength).timesteps(timesteps) == timesteps[10 - count :]


def test_sampling_starts_from_the_image_noised_to_the_first_timestep():
    x_0, eps = torch.full((1, 1, 2, 2), 0.5), torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    edit = Edit(x_0)
    expected = SCHEDULE.q_sample(x_0.expand_as(eps), torch.full((3,), 120), eps)
    assert torch.equal(edit.begin(eps, SCHEDULE, [120, 60, 0]), expected)
    assert torch.equal(edit.begin(eps, SCHEDULE, []), x_0.expand_as(eps))
    assert torch.equal(Edit().begin(eps, SCHEDULE, [120]), eps)
    mask = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    masked = Edit(x_0, mask).begin(eps, SCHEDULE, [120, 60, 0])  # pure noise where it is generated
    assert torch.equal(masked, torch.where(mask == 1, eps, expected))
    assert torch.equal(Edit(x_0, mask, strength=0.9).begin(eps, SCHEDULE, [120]), expected)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("times", [1, 3])
def test_masked_pixels_are_kept_exactly_and_the_others_are_generated(name: str, times: int):
    x_0 = torch.rand(1, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edit = Edit(x_0, mask=torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).double(), resamplings=times)
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(64, 1, 1, 2, dtype=torch.float64, generator=generator)

    timesteps = SCHEDULE.sampling_timesteps(25)
    start = edit.begin(noise(), SCHEDULE, timesteps)
    steps = list(edit.wrap_sampler(SAMPLERS[name])(correlated_denoiser(edit), SCHEDULE, start, timesteps, noise))
    assert len(steps) == 25 * times
    torch.testing.assert_close(steps[-1].x[..., 0], x_0[..., 0].expand(64, 1, 1))
    assert steps[-1].x[..., 1].std() > 0.1


def conditional_mean_error(times: int) -> float:
    """Return the error of the mean of inpainted pixels, which is E[second | first] = 0.9 first, in units of first."""
    first, count = 1.5, 4000
    x_0 = torch.tensor([first, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    edit = Edit(x_0, mask=torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).double(), resamplings=times)
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(count, 1, 1, 2, dtype=torch.float64, generator=generator)

    timesteps = SCHEDULE.sampling_timesteps(None)
    sampler = edit.wrap_sampler(partial(ddpm, variance="posterior"))
    *_, last = sampler(correlated_denoiser(edit), SCHEDULE, noise(), timesteps, noise)
    return abs(last.x[..., 1].mean().item() / first - 0.9)


@pytest.mark.slow
def test_resampling_reduces_the_error_of_the_inpainted_pixels():
    """The claim of RePaint, checked against the closed form."""
    assert conditional_mean_error(8) < conditional_mean_error(1) / 2


def test_resampling_without_a_mask_preserves_the_distribution():
    schedule, count = NoiseSchedule(ScheduleConfig()), 10_000
    denoise = mixture_denoiser(schedule, [0.4], [0.3], [1.0])
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(count, 1, generator=generator)

    *_, last = repaint(
        partial(ddpm, variance="posterior"),
        denoise,
        schedule,
        noise(),
        schedule.sampling_timesteps(None),
        noise,
        times=2,
    )
    assert last.x.mean().item() == pytest.approx(0.4, abs=0.02)
    assert last.x.std().item() == pytest.approx(0.3, rel=0.03)


def test_resampling_repeats_the_same_timesteps():
    visited: list[int] = []

    def denoise(x_t: Tensor, t: int) -> DenoiserOutput:
        visited.append(t)
        return DenoiserOutput(x_t, x_t)

    timesteps = [9, 7, 5, 3, 1]
    x = torch.zeros(1, 1)
    steps = repaint(partial(ddpm, variance="posterior"), denoise, SCHEDULE, x, timesteps, lambda: x, times=2, jump=3)
    assert [step.t for step in steps] == visited == [9, 7, 5, 9, 7, 5, 3, 1, 3, 1]
