"""Samplers against closed-form denoisers, their order of convergence, and diffusers."""

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
from cond_diffusion.diffusion.samplers import Sampler, build_sampler, ddpm, sampling_timesteps
from cond_diffusion.diffusion.schedule import NoiseSchedule


def run(sampler: Sampler, denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    *_, last = sampler(
        denoise, schedule, x, timesteps, lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)
    )
    return last.x


# The others equal one of these: `test_first_order_samplers_are_equal_at_eta_0_and_equal_ddpm_at_eta_1`.
DISTINCT = [name for name in SAMPLERS if name not in ("ddim 1", "euler", "dpm_solver 1", "dpm_solver 1 sde")]


@pytest.mark.parametrize("name", DISTINCT)
def test_the_closed_form_denoiser_yields_its_gaussian(name: str):
    schedule, count, mean, deviation = NoiseSchedule(ScheduleConfig(250, 4e-4, 0.08)), 10_000, 2.0, 1.0
    denoise = mixture_denoiser(schedule, [mean], [deviation], [1.0])
    x_T = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    x = run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(None))
    # Four standard errors of the estimates, and 1% for the discretization, which is smaller for deviations above 0.3.
    assert x.mean().item() == pytest.approx(mean, abs=4 * deviation / count**0.5 + 0.01 * deviation)
    assert x.std().item() == pytest.approx(deviation, rel=4 / (2 * count) ** 0.5 + 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT)
def test_the_closed_form_denoiser_yields_its_mixture_of_gaussians(name: str):
    schedule, count = NoiseSchedule(ScheduleConfig()), 10_000
    means, deviations, weights = [-1.0, 0.5], [0.2, 0.1], [0.3, 0.7]
    x_T = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    denoise = mixture_denoiser(schedule, means, deviations, weights)
    x = run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(None)).flatten().double()
    x = x.sort().values
    cumulative = sum(w * torch.special.ndtr((x - m) / d) for m, d, w in zip(means, deviations, weights, strict=True))
    assert isinstance(cumulative, Tensor)
    distance = (cumulative - torch.arange(1, count + 1) / count).abs().max().item()  # Kolmogorov-Smirnov
    assert distance < 1.95 / count**0.5 + 0.01  # 1.95: exceeded by chance with probability 0.001


def ode_solution(schedule: NoiseSchedule, x: Tensor, mean: float, deviation: float, start: int, end: int) -> Tensor:
    """Return x at `end`: along the ODE of a Gaussian, x_t / alpha - mean is a constant number of its deviations."""
    current, target = schedule.level(start), schedule.level(end)
    scale = ((deviation**2 + target.ratio**2) / (deviation**2 + current.ratio**2)) ** 0.5
    return target.alpha * (mean + (x / current.alpha - mean) * scale)


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("euler", 1), ("dpm_solver 1", 1), ("heun", 2), ("dpm_solver", 2), ("unipc", 2), ("unipc 3", 3)],
)
def test_halving_the_step_size_divides_the_error_by_two_to_the_order(name: str, order: int):
    schedule = NoiseSchedule(ScheduleConfig(num_timesteps=20_000, beta_start=5e-6, beta_end=1e-3))
    start, end, mean, deviation = 19_000, 3_000, 0.4, 0.5
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = ode_solution(schedule, x, mean, deviation, start, end)
    denoise = mixture_denoiser(schedule, [mean], [deviation], [1.0])
    errors = []
    for gap in (50, 25):
        steps = SAMPLERS[name](denoise, schedule, x, list(range(start, end - 1, -gap)), lambda: torch.zeros_like(x))
        x_end = [step.x for step in steps][-2]  # the last step goes to x_0
        errors.append((x_end - exact).abs().max().item())
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert errors[-1] > 1e-9  # far above rounding errors
    # Convergence may be faster than the order, as it is for unipc, but not slower.
    assert ratios[-1] > 2**order * 0.9, ratios
    if not name.startswith("unipc"):
        assert ratios[-1] < 2**order * 1.1, ratios


def test_first_order_samplers_are_equal_at_eta_0_and_equal_ddpm_at_eta_1():
    schedule = NoiseSchedule(ScheduleConfig())
    denoise = mixture_denoiser(schedule, [-0.5, 0.5], [0.1, 0.3], [0.5, 0.5])
    x_T = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = {name: run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(40)) for name in SAMPLERS}
    torch.testing.assert_close(samples["ddim 1"], samples["ddpm"])
    torch.testing.assert_close(samples["dpm_solver 1 sde"], samples["ddpm"])
    torch.testing.assert_close(samples["ddim"], samples["euler"])
    torch.testing.assert_close(samples["ddim"], samples["dpm_solver 1"])
    assert (samples["ddim"] - samples["dpm_solver"]).abs().max() > 1e-3


# The sampler, diffusers' scheduler of the same algorithm, the scheduler's options, and those of its steps.
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


def diffusers_result(
    name: str, config: ScheduleConfig, kind: PredictionKind, network: Callable, x_T: Tensor, steps: int, eps: Tensor
) -> Tensor:
    """Return the final x of diffusers' scheduler; some of the schedulers store x_t / alpha instead of x_t."""
    _, scheduler_class, options, step_options = PAIRS[name]
    scheduler_type = getattr(diffusers, scheduler_class)
    fields = {**to_diffusers(config), "prediction_type": kind, **options}
    parameters = inspect.signature(scheduler_type.__init__).parameters  # not all of them have clip_sample, for example
    scheduler = scheduler_type(**{name: value for name, value in fields.items() if name in parameters})
    scheduler.set_timesteps(steps)
    stores_x_over_alpha = scheduler_class in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")
    x = x_T
    if stores_x_over_alpha:
        x = x_T / NoiseSchedule(config).level(int(scheduler.timesteps[0])).alpha
    for number, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), int(t))
        step_noise = eps[min(number, steps - 1)]  # the Heun scheduler has two timesteps per step, and no noise
        if scheduler_class == "DDPMScheduler":  # it accepts a generator, but no noise
            if steps < config.num_timesteps and number == steps - 1:
                step_noise = 0 * step_noise  # it adds noise in the last step if timesteps are skipped
            with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=step_noise):
                x = scheduler.step(output, t, x).prev_sample
        elif step_options.get("eta") or options.get("algorithm_type"):
            x = scheduler.step(output, t, x, **step_options, variance_noise=step_noise).prev_sample
        else:
            x = scheduler.step(output, t, x, **step_options).prev_sample
    return x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, about numpy
@pytest.mark.parametrize(("kind", "steps"), [("epsilon", 200), ("epsilon", 10), ("sample", 10), ("v_prediction", 10)])
@pytest.mark.parametrize("name", PAIRS)
def test_trajectories_equal_those_of_diffusers(name: str, kind: PredictionKind, steps: int):
    """With the same noise and network, for each prediction type, within 1e-4."""
    clip = name.startswith("dd")  # only these two schedulers have clip_sample
    config = ScheduleConfig(200, 1e-4, 0.05, clip_x_0=clip, variance="beta" if name == "ddpm beta" else "posterior")
    schedule = NoiseSchedule(config)
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3

    def network(x_t: Tensor, t: int) -> Tensor:
        return torch.tanh(x_t @ weight.to(x_t) + t / 200)

    x_T = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    eps = torch.randn(steps, 3, 6, generator=torch.Generator().manual_seed(3))
    noises = iter(eps)
    bounds = [lambda x_0: x_0.clamp(-1, 1)] if clip else []
    *_, last = PAIRS[name][0](
        denoiser(network, Prediction(kind, schedule), *bounds),
        schedule,
        x_T,
        schedule.sampling_timesteps(steps),
        lambda: next(noises),
    )
    expected = diffusers_result(name, config, kind, network, x_T, steps, eps)
    torch.testing.assert_close(last.x, expected, rtol=1e-4, atol=1e-4)


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
def test_sampling_timesteps_equal_those_of_diffusers(name: str, scheduler: Any, spacing: Any):
    config = ScheduleConfig(spacing=spacing, steps_offset=1 if spacing in ("leading", None) else 0)
    reference = scheduler.from_config(to_diffusers(config))
    for steps in (1, 7, 10, 50, 400):
        reference.set_timesteps(steps)
        # The timesteps of its Euler scheduler are fractional.
        expected = reference.timesteps.double().round().long().tolist()
        assert sampling_timesteps(name, NoiseSchedule(config), steps) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reaches_the_gaussian_with_zero_terminal_snr(name: str):
    """There, lambda and sigma / alpha are infinite at T - 1."""
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    assert schedule.alpha_bar[-1] == 0
    mean, deviation, count = 0.4, 0.5, 10_000
    x_T = torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    denoise = mixture_denoiser(schedule, [mean], [deviation], [1.0])
    x = run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(None))
    assert x.mean().item() == pytest.approx(mean, abs=0.03)
    assert x.std().item() == pytest.approx(deviation, rel=0.04)


def test_the_mean_of_ddpm_is_equation_11_and_the_last_step_adds_no_noise():
    schedule = NoiseSchedule(ScheduleConfig(50, 1e-3, 0.2))
    eps_hat = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoise = denoiser(lambda x, t: eps_hat, Prediction("epsilon", schedule))

    def fail() -> Tensor:
        raise AssertionError("the last step sampled noise")

    for t, timesteps, noise in ((0, [0], fail), (20, [20, 19], lambda: torch.zeros(4, 2, dtype=torch.float64))):
        steps = ddpm(denoise, schedule, x_t, timesteps, noise, variance="beta")
        alpha, alpha_bar = 1 - schedule.betas[t], schedule.alpha_bar[t]
        mean = (x_t - (1 - alpha) / (1 - alpha_bar).sqrt() * eps_hat) / alpha.sqrt()
        torch.testing.assert_close(next(steps).x, mean)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_ends_at_x_0_hat(name: str):
    schedule = NoiseSchedule(ScheduleConfig(20, 1e-3, 0.5))
    denoise = denoiser(lambda x, t: -2 * x, Prediction("epsilon", schedule), lambda x_0: x_0.clamp(-1, 1))
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(16, 4, generator=generator)
    *_, last = SAMPLERS[name](
        denoise, schedule, x_T, schedule.sampling_timesteps(None), lambda: torch.randn(16, 4, generator=generator)
    )
    torch.testing.assert_close(last.x, last.x_0_hat)
    assert last.x.abs().max() <= 1 + 1e-6


def test_variance_beta_with_few_steps_falls_back_to_posterior_with_a_warning(caplog: pytest.LogCaptureFixture):
    beta = ScheduleConfig(variance="beta")
    assert build_sampler(SamplingOptions(), beta, 1000).keywords == {"variance": "beta"}  # type: ignore[attr-defined]
    assert not caplog.text
    assert build_sampler(SamplingOptions(), beta, 199).keywords == {"variance": "posterior"}  # type: ignore[attr-defined]
    assert "variance=beta" in caplog.text
    explicit = build_sampler(SamplingOptions(variance="beta"), ScheduleConfig(), 10)
    assert explicit.keywords == {"variance": "beta"}  # type: ignore[attr-defined]


def test_variance_beta_is_worse_than_posterior_with_few_steps():
    """The reason for the fallback: the error of 20 steps for data with narrow peaks at -1 and 1."""
    schedule = NoiseSchedule(ScheduleConfig())
    denoise = mixture_denoiser(schedule, [-1.0, 1.0], [0.05, 0.05], [0.5, 0.5])
    x_T = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name in ("ddpm", "ddpm beta"):
        x = run(SAMPLERS[name], denoise, schedule, x_T, schedule.sampling_timesteps(20))
        errors[name] = (x.abs() - 1).abs().mean().item()
    assert errors["ddpm beta"] > errors["ddpm"]


def test_build_sampler_returns_the_function_of_each_name():
    for name in ("ddpm", "ddim", "euler", "heun", "dpm_solver", "unipc"):
        sampler = build_sampler(SamplingOptions(sampler=name), ScheduleConfig(), 10)
        assert getattr(sampler, "func", sampler) is getattr(samplers, name)


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({"sampler": "ddim"}, {"eta": 0.0}),
        ({"sampler": "ddim", "eta": 0.5}, {"eta": 0.5}),
        ({"sampler": "dpm_solver"}, {"eta": 0.0, "order": 2}),
        ({"sampler": "dpm_solver", "eta": 0.5}, {"eta": 0.5, "order": 2}),
        ({"sampler": "dpm_solver", "order": 1}, {"eta": 0.0, "order": 1}),
        ({"sampler": "unipc"}, {"order": 2}),
        ({"sampler": "unipc", "order": 3}, {"order": 3}),
    ],
)
def test_build_sampler_passes_on_its_options(options: dict[str, Any], keywords: dict[str, Any]):
    assert build_sampler(SamplingOptions(**options), ScheduleConfig(), 10).keywords == keywords  # type: ignore[attr-defined]
