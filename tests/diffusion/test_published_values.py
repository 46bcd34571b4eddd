"""Sampling loops, schedules and guidance rescale against values that diffusers' tests and papers publish.

The network is `output = x_t * t / (t + 1)`, the start a ramp, and the noise one generator of seed 0.
"""

from functools import partial

import diffusers
import pytest
import torch
from torch import Tensor

from cond_diffusion.config.run import PredictionKind
from cond_diffusion.config.sampling import SamplerName
from cond_diffusion.config.schedule import ScheduleConfig, Spacing
from cond_diffusion.diffusion.guidance import rescale_deviation
from cond_diffusion.diffusion.objective import Prediction, denoiser
from cond_diffusion.diffusion.samplers import Sampler, ddim, ddpm, sampling_timesteps
from cond_diffusion.diffusion.schedule import NoiseSchedule

RAMP = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
NOISE_TO_ADD = (torch.arange(768).flip(0) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def loop(
    sampler: Sampler, prediction: PredictionKind, timesteps: list[int], *, noised: bool = False, **schedule: float
) -> tuple[float, float]:
    """Return the sum and the mean of |x_0| at the end."""
    chain = NoiseSchedule(ScheduleConfig(**schedule))  # type: ignore[arg-type]
    x, draw = RAMP, torch.Generator().manual_seed(0)
    if noised:
        x = chain.q_sample(x, torch.full((4,), timesteps[0]), NOISE_TO_ADD)
    denoise = denoiser(
        lambda x, t: x * t / (t + 1), Prediction(prediction, chain), lambda x_0_hat: x_0_hat.clamp(-1, 1)
    )
    *_, last = sampler(denoise, chain, x, timesteps, lambda: torch.randn(x.shape, generator=draw))
    return last.x.abs().sum().item(), last.x.abs().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "total", "mean"), [("epsilon", 258.9606, 0.3372), ("v_prediction", 202.0296, 0.2631)]
)
def test_ddpm_loops_have_the_published_sums(prediction: PredictionKind, total: float, mean: float):
    found = loop(partial(ddpm, variance="posterior"), prediction, list(reversed(range(1000))))
    assert found == (pytest.approx(total, abs=0.01), pytest.approx(mean, abs=0.001))


def test_a_short_ddpm_loop_has_the_published_sum():
    # 387.9466 in their float32 tables, 387.96725 in float64.
    found = loop(partial(ddpm, variance="posterior"), "epsilon", [1, 0], noised=True)
    assert found == (pytest.approx(387.96725, abs=0.01), pytest.approx(0.5051, abs=0.001))


@pytest.mark.parametrize(
    ("prediction", "schedule", "total", "mean"),
    [
        ("epsilon", {}, 172.0067, 0.223967),
        ("v_prediction", {}, 52.5302, 0.0684),
        ("epsilon", {"beta_start": 0.01}, 149.8295, 0.1951),
    ],
)
def test_ddim_loops_have_the_published_sums(
    prediction: PredictionKind, schedule: dict[str, float], total: float, mean: float
):
    found = loop(partial(ddim, eta=0.0), prediction, list(range(900, -1, -100)), **schedule)
    assert found == (pytest.approx(total, abs=0.01), pytest.approx(mean, abs=0.001))


def test_a_ddim_loop_from_a_noised_image_has_the_published_sum():
    found = loop(partial(ddim, eta=0.0), "epsilon", list(range(100, -1, -100)), noised=True)
    assert found == (pytest.approx(354.5418, abs=0.01), pytest.approx(0.4616, abs=0.001))


@pytest.mark.parametrize(
    ("t", "t_prev", "variance"), [(420, 400, 0.14771), (980, 960, 0.3246), (487, 486, 0.00979), (999, 998, 0.02)]
)
def test_posterior_variances_are_the_published_ones(t: int, t_prev: int, variance: float):
    assert NoiseSchedule(ScheduleConfig()).posterior(t, t_prev).variance == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize(
    ("schedule", "snr", "root"),
    [
        ({"beta_schedule": "linear"}, 4.035993e-05, 0.006353),
        ({"beta_schedule": "cosine"}, 2.428735e-09, 4.92822e-05),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 0.004682, 0.068265),
    ],
)
def test_terminal_snr_is_that_of_lin_et_al(schedule: dict[str, float], snr: float, root: float):
    chain = NoiseSchedule(ScheduleConfig(**schedule))  # type: ignore[arg-type]
    assert chain.snr[-1].item() == pytest.approx(snr, rel=1e-3)
    assert chain.alpha_bar[-1].sqrt().item() == pytest.approx(root, rel=1e-3)


def test_spacings_are_those_of_lin_et_al():
    """Table 2, whose timesteps count from 1."""
    chain = NoiseSchedule(ScheduleConfig())
    assert [t + 1 for t in chain.sampling_timesteps(10, "leading")] == list(range(901, 0, -100))
    assert [t + 1 for t in chain.sampling_timesteps(10, "trailing")] == list(range(1000, 0, -100))


@pytest.mark.parametrize(("cond", "uncond", "expected"), [(0.0, 0.0, 0.0), (1.0, 0.5, 3.5)])
def test_guidance_rescale_leaves_a_constant_output_alone(cond: float, uncond: float, expected: float):
    def constant(value: float) -> Tensor:
        return torch.full((1, 3, 4, 4), value)

    output = constant(uncond) + 6 * (constant(cond) - constant(uncond))
    found = rescale_deviation(output, constant(cond), 0.7)
    torch.testing.assert_close(found, constant(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("ddpm", "DDPMScheduler"),
        ("ddim", "DDIMScheduler"),
        ("dpm_solver", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
    ],
)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_equal_those_of_diffusers_for_every_count(name: SamplerName, scheduler: str, spacing: Spacing):
    chain = NoiseSchedule(ScheduleConfig(spacing=spacing))
    theirs = getattr(diffusers, scheduler)(timestep_spacing=spacing)
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        # A rounding error gives some of their lists a step too many, a repeated timestep or one below 0.
        if len(expected) == steps and len(set(expected)) == steps and min(expected) >= 0:
            assert sampling_timesteps(name, chain, steps) == expected, steps
