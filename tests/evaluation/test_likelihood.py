"""The variational bound of Gaussian data with its closed-form denoiser, where the values are known."""

import math
from pathlib import Path

import pytest
import torch
from oracles import mixture_denoiser
from PIL import Image
from stable_diffusion import stable_diffusion

from cond_diffusion import TextToImage
from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.schedule import ScheduleConfig, Variance
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.diffusion.objective import Prediction
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import Interrupted, UserError
from cond_diffusion.evaluation.likelihood import (
    VARIANCES,
    bits_per_dimension,
    decoder_bits,
    format_bits,
    prior_bits,
    step_bits,
    variational_bound,
)
from cond_diffusion.files import cache_folder
from cond_diffusion.images import to_model
from cond_diffusion.models.latents import PixelPatchify
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet

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


class CaptionNetwork(UNet):
    """Predicts an image of a single value, which depends on the caption alone."""

    def project_context(self, context: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return context

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return context[:, 1, 0].tanh().reshape(-1, 1, 1, 1).expand_as(x_t)


@pytest.fixture
def captioned(tmp_path: Path) -> tuple[TextToImage, DataConfig]:
    """A pipeline with a `CaptionNetwork`, and five images with three captions."""
    for i, caption in enumerate(("one", "two", "one", "three", "two")):
        Image.new("L", (4, 4), 40 * i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption, encoding="utf-8")
    config = DataConfig(source=str(tmp_path), caption_column="text", caption_templates=(), resolution=4)
    schedule, encoder = NoiseSchedule(ScheduleConfig(20, 1e-3, 0.3)), TextEncoder.from_pretrained("builtin", 16)
    shape = UNetConfig((8,), (False,), num_groups=4, in_channels=1, sample_size=4, context_dim=encoder.context_dim)
    return TextToImage(CaptionNetwork(shape), encoder, Prediction("sample", schedule), PixelPatchify(1)), config


def test_the_terms_of_a_set_are_those_of_each_image_with_its_own_caption(captioned: tuple[TextToImage, DataConfig]):
    pipe, config = captioned
    schedule, encoder = pipe.schedule, pipe.text_encoder
    data = load_captioned_images(config)
    captions = [data.caption_groups[group][0] for group in data.group_of.tolist()]
    assert len({*captions[:4]}) == 3
    x_0 = to_model(data.images)
    x_0_hat = encoder(captions)[:, 1, 0].tanh().reshape(-1, 1, 1, 1).expand_as(x_0)
    expected = [[step_bits(schedule, x_0, x_0_hat, t, v) for t in reversed(range(20))] for v in VARIANCES]
    for batch_size in (1, 3):
        prior, terms = bits_per_dimension(pipe, config, "train", count=4, batch_size=batch_size)
        torch.testing.assert_close(prior, prior_bits(schedule, x_0)[:4])
        for found, each in zip(terms, expected, strict=True):
            torch.testing.assert_close(found, torch.stack(each, dim=-1)[:4], rtol=1e-5, atol=1e-5)

    lines = format_bits(prior, terms).splitlines()
    for i in range(len(VARIANCES)):
        *rows, total = (line[20 + 22 * i :].split()[0] for line in lines[1:])
        assert sum(map(float, rows)) == pytest.approx(float(total), abs=1e-3)
        assert float(total) == pytest.approx((prior + terms[i].sum(1)).mean().item(), abs=1e-3)


def test_an_interrupted_bound_continues_after_the_complete_batches(
    captioned: tuple[TextToImage, DataConfig], monkeypatch: pytest.MonkeyPatch
):
    pipe, config = captioned
    expected = bits_per_dimension(pipe, config, "train", batch_size=2)
    forward, calls = CaptionNetwork.forward, []

    def interrupted_forward(self: CaptionNetwork, *inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 50:  # in the third of three batches of 20 steps
            raise KeyboardInterrupt
        return forward(self, *inputs)

    monkeypatch.setattr(CaptionNetwork, "forward", interrupted_forward)
    with pytest.raises(Interrupted, match="the same command continues"):
        bits_per_dimension(pipe, config, "train", batch_size=2)
    found = bits_per_dimension(pipe, config, "train", batch_size=2)
    assert len(calls) == 50 + 20
    assert all(map(torch.equal, found, expected))
    assert not [*(cache_folder() / "likelihood").iterdir()]  # nothing is left behind


def test_latents_have_no_bits_per_dimension(tmp_path: Path):
    pipe = TextToImage.from_pretrained(stable_diffusion(tmp_path, "epsilon"))
    with pytest.raises(UserError, match=r"^checkpoint: .* generates latents"):
        bits_per_dimension(pipe, DataConfig(), "test")
