"""The variational bound of Gaussian data with its closed-form denoiser, where the values are known."""

import math

import pytest
import torch
from oracles import mixture_denoiser

from cond_diffusion.config.schedule import ScheduleConfig, Variance
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.evaluation.likelihood import VARIANCES, decoder_bits, prior_bits, step_bits, variational_bound

MEAN, DEVIATION = 0.1, 0.3


def gaussian(count: int) -> torch.Tensor:
    return MEAN + DEVIATION * torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_prior_term_is_the_divergence_of_two_gaussians():
    schedule, x_0 = NoiseSchedule(ScheduleConfig(50, 1e-3, 0.05)), gaussian(20)
    alpha_bar = schedule.alpha_bar[-1]
    end = torch.distributions.Normal(alpha_bar.sqrt() * x_0, (1 - alpha_bar).sqrt())
    noise = torch.distributions.Normal(torch.zeros_like(x_0), torch.ones_like(x_0))
    expected = torch.distributions.kl_divergence(end, noise).flatten() / math.log(2)
    torch.testing.assert_close(prior_bits(schedule, x_0), expected)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("t", [1, 20, 199])
def test_each_term_is_the_divergence_from_the_posterior(variance: Variance, t: int):
    schedule, x_0 = NoiseSchedule(ScheduleConfig(200, 1e-4, 0.08)), gaussian(20)
    x_0_hat = x_0 + 0.1 * torch.randn(x_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    posterior = schedule.posterior(t, t - 1)
    model_variance = posterior.variance if variance == "posterior" else posterior.beta
    q, p = (
        torch.distributions.Normal(posterior.x_0_coefficient * x, torch.tensor(v).double().sqrt())
        for x, v in ((x_0, posterior.variance), (x_0_hat, model_variance))
    )
    expected = torch.distributions.kl_divergence(q, p).flatten() / math.log(2)
    torch.testing.assert_close(step_bits(schedule, x_0, x_0_hat, t, variance), expected)


@pytest.mark.parametrize("mean", [-1.0, -0.2, 0.9, 3.0])
@pytest.mark.parametrize("deviation", [0.003, 0.2])
def test_the_decoder_probabilities_of_all_pixel_values_add_up_to_1(mean: float, deviation: float):
    all_values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    bits = decoder_bits(all_values, torch.full_like(all_values, mean), deviation**2)
    assert torch.isfinite(bits).all()
    assert (2**-bits).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("variance", VARIANCES)
def test_each_term_of_the_bound_of_a_gaussian_equals_its_closed_form(variance: Variance):
    """E |x_0 - x_0_hat|^2 is the variance of x_0 given x_t: s^2 (1 - a) / (a s^2 + 1 - a)."""
    schedule, count = NoiseSchedule(ScheduleConfig(100, 1e-3, 0.15)), 20_000
    generator = torch.Generator().manual_seed(2)
    denoise = mixture_denoiser(schedule, [MEAN], [DEVIATION], [1.0])
    terms = variational_bound(
        denoise, schedule, gaussian(count), lambda: torch.randn(count, 1, dtype=torch.float64, generator=generator)
    )
    found = {t: bits[variance].mean().item() for t, bits in terms}
    assert list(found) == list(range(99, -1, -1))
    for t in range(1, 100):
        alpha_bar, posterior = schedule.alpha_bar[t].item(), schedule.posterior(t, t - 1)
        remaining = DEVIATION**2 * (1 - alpha_bar) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
        model_variance = posterior.variance if variance == "posterior" else posterior.beta
        ratio = posterior.variance / model_variance
        distance = posterior.x_0_coefficient**2 * remaining / model_variance
        expected = (ratio - 1 - math.log(ratio) + distance) / 2 / math.log(2)
        # Four standard errors of the mean of `count` squared Gaussians are 4 sqrt(2 / count) of the distance.
        assert found[t] == pytest.approx(expected, abs=4 * (2 / count) ** 0.5 * distance / 2 / math.log(2) + 1e-12)


@pytest.mark.slow
def test_the_bound_is_above_the_entropy_and_approaches_it_with_more_timesteps():
    """With the optimal denoiser, the gap is due to the number of timesteps alone."""
    count = 4000
    x_0 = ((gaussian(count).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1  # rounded to 8-bit values
    best = decoder_bits(x_0, torch.full_like(x_0, MEAN), DEVIATION**2)
    gaps = []
    for steps in (125, 500, 2000):
        schedule = NoiseSchedule(ScheduleConfig(steps, 0.1 / steps, 20 / steps))
        generator = torch.Generator().manual_seed(2)
        total = prior_bits(schedule, x_0)
        for _, bits in variational_bound(
            mixture_denoiser(schedule, [MEAN], [DEVIATION], [1.0]),
            schedule,
            x_0,
            lambda generator=generator: torch.randn(count, 1, dtype=torch.float64, generator=generator),
        ):
            total = total + bits["posterior"]
        gaps.append((total - best).mean().item())
    assert gaps[0] > gaps[1] > gaps[2] > 0
