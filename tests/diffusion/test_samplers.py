"""Samplers against models whose answer is known in closed form, by their order, and against diffusers."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from oracles import SAMPLERS, mixture_denoiser
from torch import Tensor

from cond_diffusion.config.run import PredictionKind
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.config.schedule import ScheduleConfig, to_diffusers
from cond_diffusion.diffusion import samplers
from cond_diffusion.diffusion.objective import Denoiser, Prediction, denoiser
from cond_diffusion.diffusion.samplers import (
    Sampler,
    build_sampler,
    ddpm,
    sampling_timesteps,
)
from cond_diffusion.diffusion.schedule import NoiseSchedule


def run(sampler: Sampler, denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: list[int]) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    *_, last = sampler(denoise, schedule, x, timesteps, lambda: torch.randn(x.shape, generator=draw, dtype=x.dtype))
    return last.x


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gaussian_is_drawn_by_whoever_knows_it(name: str):
    schedule, count, mean, deviation = NoiseSchedule(ScheduleConfig()), 10_000, 2.0, 1.0
    denoise = mixture_denoiser(schedule, [mean], [deviation], [1.0])
    x_T = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    x = run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(None))
    # Four standard errors of the estimates, and 1% for the chain's own discretisation (more than it is from 0.3 up).
    assert x.mean().item() == pytest.approx(mean, abs=4 * deviation / count**0.5 + 0.01 * deviation)
    assert x.std().item() == pytest.approx(deviation, rel=4 / (2 * count) ** 0.5 + 0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mixture_of_gaussians_is_drawn_with_its_parts_and_their_weights(name: str):
    schedule, count = NoiseSchedule(ScheduleConfig()), 10_000
    means, deviations, weights = [-1.0, 0.5], [0.2, 0.1], [0.3, 0.7]
    x_T = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    denoise = mixture_denoiser(schedule, means, deviations, weights)
    x = run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(None)).flatten().double()
    x = x.sort().values
    cumulative = sum(w * torch.special.ndtr((x - m) / d) for m, d, w in zip(means, deviations, weights, strict=True))
    assert isinstance(cumulative, Tensor)
    distance = (cumulative - torch.arange(1, count + 1) / count).abs().max().item()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / count**0.5 + 0.01  # 1.95: one in a thousand exceeds it by chance


def ode_solution(schedule: NoiseSchedule, x: Tensor, mean: float, deviation: float, start: int, end: int) -> Tensor:
    """For a Gaussian, x_t / alpha - mean keeps its distance in deviations all along the probability-flow ODE."""
    now, then = schedule.level(start), schedule.level(end)
    stretch = ((deviation**2 + then.ratio**2) / (deviation**2 + now.ratio**2)) ** 0.5
    return then.alpha * (mean + (x / now.alpha - mean) * stretch)


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("euler", 1), ("dpm_solver 1", 1), ("heun", 2), ("dpm_solver", 2), ("unipc", 2), ("unipc 3", 3)],
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name: str, order: int):
    schedule = NoiseSchedule(ScheduleConfig(num_timesteps=20_000, beta_start=5e-6, beta_end=1e-3))
    start, end, mean, deviation = 19_000, 3_000, 0.4, 0.5
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = ode_solution(schedule, x, mean, deviation, start, end)
    denoise = mixture_denoiser(schedule, [mean], [deviation], [1.0])
    errors = []
    for gap in (200, 100, 50, 25):
        chain = SAMPLERS[name](denoise, schedule, x, list(range(start, end - 1, -gap)), lambda: torch.zeros_like(x))
        at_the_end = [step.x for step in chain][-2]  # the last step leaves for the picture
        errors.append((at_the_end - exact).abs().max().item())
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert errors[-1] > 1e-9  # far above rounding, so that the ratios mean something
    # A method may do better than its order promises, as unipc does; it must not do worse.
    assert ratios[-1] > 2**order * 0.9, ratios
    if not name.startswith("unipc"):
        assert ratios[-1] < 2**order * 1.1, ratios


def test_the_first_order_samplers_are_one_at_eta_0_and_ddpm_at_eta_1():
    schedule = NoiseSchedule(ScheduleConfig())
    denoise = mixture_denoiser(schedule, [-0.5, 0.5], [0.1, 0.3], [0.5, 0.5])
    x_T = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = {name: run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(40)) for name in SAMPLERS}
    torch.testing.assert_close(drawn["ddim 1"], drawn["ddpm"])
    torch.testing.assert_close(drawn["dpm_solver 1 sde"], drawn["ddpm"])
    torch.testing.assert_close(drawn["ddim"], drawn["euler"])
    torch.testing.assert_close(drawn["ddim"], drawn["dpm_solver 1"])
    assert (drawn["ddim"] - drawn["dpm_solver"]).abs().max() > 1e-3


# Our sampler, diffusers' scheduler of the same algorithm, and how that one is told to do the same.
PAIRS: dict[str, tuple[Sampler, str, dict[str, Any], dict[str, Any]]] = {
    "ddpm": (SAMPLERS["ddpm"], "DDPMScheduler", {"variance_type": "fixed_small"}, {}),
    "ddpm beta": (SAMPLERS["ddpm beta"], "DDPMScheduler", {"variance_type": "fixed_large"}, {}),
    "ddim": (SAMPLERS["ddim"], "DDIMScheduler", {}, {"eta": 0.0, "use_clipped_model_output": True}),
    "ddim 0.5": (SAMPLERS["ddim 0.5"], "DDIMScheduler", {}, {"eta": 0.5, "use_clipped_model_output": True}),
    "euler": (SAMPLERS["euler"], "EulerDiscreteScheduler", {}, {}),
    "heun": (SAMPLERS["heun"], "HeunDiscreteScheduler", {}, {}),
    "dpm_solver": (SAMPLERS["dpm_solver"], "DPMSolverMultistepScheduler", {}, {}),
    "dpm_solver 1": (SAMPLERS["dpm_solver 1"], "DPMSolverMultistepScheduler", {"solver_order": 1}, {}),
    "dpm_solver sde": (
        SAMPLERS["dpm_solver sde"],
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        {},
    ),
    "unipc": (SAMPLERS["unipc"], "UniPCMultistepScheduler", {}, {}),
    "unipc 3": (SAMPLERS["unipc 3"], "UniPCMultistepScheduler", {"solver_order": 3}, {}),
}


def their_trajectory(
    name: str, config: ScheduleConfig, kind: PredictionKind, network: Callable, x_T: Tensor, steps: int, eps: Tensor
) -> Tensor:
    """Take every step with diffusers' scheduler, which keeps x_t / alpha in places where we keep x_t."""
    _, scheduler_class, options, step_options = PAIRS[name]
    theirs = getattr(diffusers, scheduler_class)
    fields = {**to_diffusers(config), "prediction_type": kind, **options}
    known = inspect.signature(theirs.__init__).parameters  # not all of them know clip_sample and the like
    scheduler = theirs(**{name: value for name, value in fields.items() if name in known})
    scheduler.set_timesteps(steps)
    keeps_x_over_alpha = scheduler_class in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")
    x = x_T
    if keeps_x_over_alpha:
        x = x_T / NoiseSchedule(config).level(int(scheduler.timesteps[0])).alpha
    for number, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), int(t))
        fresh = eps[min(number, steps - 1)]  # Heun's has two of its timesteps for one of ours, and no noise
        if scheduler_class == "DDPMScheduler":  # it takes a generator alone, not the noise itself
            if steps < config.num_timesteps and number == steps - 1:
                fresh = 0 * fresh  # it adds noise to the last step of a shorter chain, which leads to the picture
            with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=fresh):
                x = scheduler.step(output, t, x).prev_sample
        elif step_options.get("eta") or options.get("algorithm_type"):
            x = scheduler.step(output, t, x, **step_options, variance_noise=fresh).prev_sample
        else:
            x = scheduler.step(output, t, x, **step_options).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, about numpy
@pytest.mark.parametrize("steps", [10, 50, 200])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_whole_trajectory_is_that_of_diffusers(name: str, kind: PredictionKind, steps: int):
    """The same noise, the same network, whatever it predicts: latents equal within 1e-4."""
    clip = name.startswith("dd")  # the only two of diffusers' that know clip_sample
    config = ScheduleConfig(200, 1e-4, 0.05, clip_x_0=clip, variance="beta" if name == "ddpm beta" else "posterior")
    schedule = NoiseSchedule(config)
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3

    def network(x_t: Tensor, t: int) -> Tensor:
        return torch.tanh(x_t @ weight.to(x_t) + t / 200)

    x_T = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    eps = torch.randn(steps, 3, 6, generator=torch.Generator().manual_seed(3))
    rest = iter(eps)
    bounds = [lambda x_0: x_0.clamp(-1, 1)] if clip else []
    chain = PAIRS[name][0](
        denoiser(network, Prediction(kind, schedule), *bounds),
        schedule,
        x_T,
        schedule.sampling_timesteps(steps),
        lambda: next(rest),
    )
    *_, last = chain
    theirs = their_trajectory(name, config, kind, network, x_T, steps, eps)
    torch.testing.assert_close(last.x, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, about numpy
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", None])
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("ddpm", diffusers.DDPMScheduler),
        ("ddim", diffusers.DDIMScheduler),
        ("euler", diffusers.EulerDiscreteScheduler),
        ("dpm_solver", diffusers.DPMSolverMultistepScheduler),
        ("unipc", diffusers.UniPCMultistepScheduler),
    ],
)
def test_shorter_chains_visit_what_diffusers_visits(name: str, scheduler: Any, spacing: Any):
    config = ScheduleConfig(spacing=spacing, steps_offset=1 if spacing in ("leading", None) else 0)
    theirs = scheduler.from_config(to_diffusers(config))
    for steps in (1, 7, 10, 50, 400):
        theirs.set_timesteps(steps)
        # Its Euler goes through fractions of timesteps.
        expected = theirs.timesteps.double().round().long().tolist()
        assert sampling_timesteps(name, NoiseSchedule(config), steps) == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_from_a_start_without_signal_every_sampler_comes_to_the_gaussian(name: str):
    """Zero terminal SNR: lambda and sigma / alpha are infinite at T - 1."""
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    assert schedule.alpha_bar[-1] == 0
    mean, deviation, count = 0.4, 0.5, 10_000
    x_T = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    denoise = mixture_denoiser(schedule, [mean], [deviation], [1.0])
    x = run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(None))
    assert x.mean().item() == pytest.approx(mean, abs=0.03)
    assert x.std().item() == pytest.approx(deviation, rel=0.04)


def test_the_mean_is_equation_11_and_the_last_step_adds_no_noise():
    schedule = NoiseSchedule(ScheduleConfig(50, 1e-3, 0.2))
    eps_hat = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoise = denoiser(lambda x, t: eps_hat, Prediction("epsilon", schedule))

    def fail() -> Tensor:
        raise AssertionError("the last step drew noise")

    for t, timesteps, noise in ((0, [0], fail), (20, [20, 19], lambda: torch.zeros(4, 2, dtype=torch.float64))):
        chain = ddpm(denoise, schedule, x_t, timesteps, noise, variance="beta")
        alpha, alpha_bar = 1 - schedule.betas[t], schedule.alpha_bar[t]
        mean = (x_t - (1 - alpha) / (1 - alpha_bar).sqrt() * eps_hat) / alpha.sqrt()
        torch.testing.assert_close(next(chain).x, mean)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_ends_at_x_0_hat_itself(name: str):
    schedule = NoiseSchedule(ScheduleConfig(20, 1e-3, 0.5))
    denoise = denoiser(lambda x, t: -2 * x, Prediction("epsilon", schedule), lambda x_0: x_0.clamp(-1, 1))
    draw = torch.Generator().manual_seed(0)
    x_T = torch.randn(16, 4, generator=draw)
    *_, last = SAMPLERS[name](
        denoise, schedule, x_T, schedule.sampling_timesteps(None), lambda: torch.randn(16, 4, generator=draw)
    )
    torch.testing.assert_close(last.x, last.x_0_hat)
    assert last.x.abs().max() <= 1 + 1e-6


def test_too_few_steps_do_not_walk_into_the_variance_beta(caplog: pytest.LogCaptureFixture):
    beta = ScheduleConfig(variance="beta")
    assert build_sampler(SamplingOptions(), beta, 1000).keywords == {"variance": "beta"}  # type: ignore[attr-defined]
    assert not caplog.text
    assert build_sampler(SamplingOptions(), beta, 199).keywords == {"variance": "posterior"}  # type: ignore[attr-defined]
    assert "variance=beta" in caplog.text
    insists = build_sampler(SamplingOptions(variance="beta"), ScheduleConfig(), 10)
    assert insists.keywords == {"variance": "beta"}  # type: ignore[attr-defined]


def test_few_steps_with_the_variance_beta_are_worse_than_with_the_posterior():
    """Why the default avoids it: how far 20 steps end from data that are narrow peaks at -1 and 1."""
    schedule = NoiseSchedule(ScheduleConfig())
    denoise = mixture_denoiser(schedule, [-1.0, 1.0], [0.05, 0.05], [0.5, 0.5])
    x_T = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    off = {}
    for name in ("ddpm", "ddpm beta"):
        x = run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(20))
        off[name] = (x.abs() - 1).abs().mean().item()
    assert off["ddpm beta"] > off["ddpm"]


def test_every_name_is_a_sampler_of_that_name():
    for name in ("ddpm", "ddim", "euler", "heun", "dpm_solver", "unipc"):
        pick_captions = build_sampler(SamplingOptions(sampler=name), ScheduleConfig(), 10)
        assert getattr(pick_captions, "func", pick_captions) is getattr(samplers, name)
