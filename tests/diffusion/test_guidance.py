"""Classifier-free guidance, rescaling and thresholding, against their formulas and diffusers."""

from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from cond_diffusion.diffusion.guidance import drop_captions, guided, rescale_deviation, threshold_dynamically

X_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
NULL = torch.tensor([2.0, 1.0, 4.0]).reshape(3, 1, 1, 1)  # means of the null contexts of the examples
NULL_CONTEXT = NULL[:, 0].expand(3, 2, 5)
CONTEXT = NULL_CONTEXT + 5


class Network:
    """Returns mean + (1 + slope mean) x_t, with the mean of the context; records its batch sizes."""

    def __init__(self, slope: float = 0.0) -> None:
        self.slope = slope
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert len(x_t) == len(t) == len(context)
        self.batches.append(len(x_t))
        mean = context.mean((1, 2)).reshape(-1, 1, 1, 1)
        return torch.ones_like(x_t) * mean + (1 + self.slope * mean) * x_t


@pytest.mark.parametrize("scales", [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [3.0, 1.0, 0.0]])
def test_output_is_uncond_plus_w_times_the_difference_per_example(scales: list[float]):
    w = torch.tensor(scales)
    output = guided(Network(), CONTEXT, NULL_CONTEXT, w)(X_T, 9)
    torch.testing.assert_close(output, X_T + NULL + w.reshape(-1, 1, 1, 1) * 5)


def test_both_passes_are_one_batch_and_rows_of_scale_1_are_evaluated_once():
    for scales, expected in (([3.0, 3.0, 3.0], 6), ([1.0, 1.0, 1.0], 3), ([1.0, 3.0, 1.0], 4)):
        network = Network()
        guided(network, CONTEXT, NULL_CONTEXT, torch.tensor(scales))(X_T, 9)
        assert network.batches == [expected]


def test_a_fraction_of_the_guidance_is_the_mean_of_the_phrases_of_each_example():
    def contexts(*means: float) -> list[Tensor]:
        return [torch.full((2, 5), float(mean)) for mean in means]

    phrases, fraction = [contexts(3, 11), [], contexts(7, 7, 3)], 0.25
    # The difference of the captions is 5, the means of the phrases' differences are 5 and 5 / 3.
    for scales, expected, passes in (
        ([4.0, 3.0, 2.0], [4 * (0.75 * 5 + 0.25 * 5), 3 * 5, 2 * (0.75 * 5 + 0.25 * 5 / 3)], 3 + 3 + 5),
        ([1.0, 3.0, 4.0], [5, 3 * 5, 4 * (0.75 * 5 + 0.25 * 5 / 3)], 3 + 2 + 3),  # a scale of 1 is unguided
        ([4.0, 1.0, 0.0], [4 * (0.75 * 5 + 0.25 * 5), 5, 0], 3 + 2 + 2),  # and one of 0 unconditional
    ):
        network = Network()
        denoise = guided(
            network, CONTEXT, NULL_CONTEXT, torch.tensor(scales), phrases=phrases, phrase_guidance=fraction
        )
        torch.testing.assert_close(denoise(X_T, 9), X_T + NULL + torch.tensor(expected).reshape(-1, 1, 1, 1))
        assert network.batches == [passes]
    with pytest.raises(ValueError, match="phrases: 1 lists; expected 3"):
        guided(Network(), CONTEXT, NULL_CONTEXT, torch.ones(3), phrases=[contexts(3)], phrase_guidance=fraction)


def test_below_a_timestep_guidance_leaves_out_the_first_of_several_phrases():
    contexts = [torch.full((2, 5), mean) for mean in (3.0, 11.0, 5.0)]
    phrases = [contexts, contexts[:1], []]
    scales = torch.tensor([4.0, 4.0, 4.0])
    options: dict[str, Any] = {"phrases": phrases, "phrase_guidance": 0.25, "first_phrase_from": 5}
    network = Network()
    denoise = guided(network, CONTEXT, NULL_CONTEXT, scales, **options)
    # The difference of the captions is 5; those of the phrases are 1, 9 and 3, and 2. A single phrase stays.
    for t, mean in ((9, (1 + 9 + 3) / 3), (5, (1 + 9 + 3) / 3), (4, (9 + 3) / 2), (0, (9 + 3) / 2)):
        expected = torch.tensor([4 * (0.75 * 5 + 0.25 * mean), 4 * (0.75 * 5 + 0.25 * 2), 4 * 5])
        torch.testing.assert_close(denoise(X_T, t), X_T + NULL + expected.reshape(-1, 1, 1, 1))
    assert network.batches == [3 + 3 + 4, 3 + 3 + 4, 3 + 3 + 3, 3 + 3 + 3]
    mixed = guided(Network(), CONTEXT, NULL_CONTEXT, torch.tensor([1.0, 4.0, 0.0]), **options)(X_T, 4)
    expected = torch.tensor([5, 4 * (0.75 * 5 + 0.25 * 2), 0])
    torch.testing.assert_close(mixed, X_T + NULL + expected.reshape(-1, 1, 1, 1))


def test_outside_the_interval_the_unconditional_pass_is_not_run():
    network = Network()
    denoise = guided(network, CONTEXT, NULL_CONTEXT, torch.full((3,), 3.0), interval=(5, 8))
    outputs = [denoise(X_T, t) for t in (4, 5, 8, 9)]
    assert network.batches == [3, 6, 6, 3]
    for output, expected in zip(outputs, (5, 15, 15, 5), strict=True):
        torch.testing.assert_close(output, X_T + NULL + expected)


def test_the_context_is_projected_once():
    calls = []

    def project(context: Tensor) -> Tensor:
        calls.append(len(context))
        return context

    denoise = guided(Network(), CONTEXT, NULL_CONTEXT, torch.full((3,), 3.0), project=project)
    denoise(X_T, 9)
    denoise(X_T, 9)
    assert calls == [3, 6]


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaling_equals_that_of_diffusers(phi: float):
    guided_output, cond = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    guided_output = 4 * guided_output
    torch.testing.assert_close(
        rescale_deviation(guided_output, cond, phi), rescale_noise_cfg(guided_output, cond, guidance_rescale=phi)
    )


def test_rescaling_with_phi_1_restores_the_deviation_without_guidance():
    scales = torch.tensor([5.0, 1.0, 5.0])
    cond, guided_only, rescaled = (
        guided(Network(slope=0.1), CONTEXT, NULL_CONTEXT, w, rescale=phi)(X_T, 9).flatten(1).std(1)
        for w, phi in ((torch.ones(3), 0.0), (scales, 0.0), (scales, 1.0))
    )
    assert (guided_only[[0, 2]] > 1.5 * cond[[0, 2]]).all()
    torch.testing.assert_close(rescaled, cond)
    torch.testing.assert_close(guided_only[1], cond[1])


def test_dynamic_thresholding_clips_at_the_quantile_and_keeps_images_within_range():
    x_0_hat = torch.linspace(-3, 3, 101).reshape(1, 1, 101).repeat(2, 1, 1)
    x_0_hat[1] /= 4
    clipped = threshold_dynamically(x_0_hat, 0.9)
    s = x_0_hat[0].abs().quantile(0.9)
    torch.testing.assert_close(clipped[0], x_0_hat[0].clamp(-s, s) / s)
    assert torch.equal(clipped[1], x_0_hat[1])
    assert clipped.abs().max() <= 1


def test_the_null_context_replaces_dropped_captions():
    context, null_context = torch.ones(10_000, 1, 1), torch.zeros(1, 1)
    dropped = torch.arange(10_000) % 3 == 0
    assert torch.equal(drop_captions(context, null_context, dropped)[:, 0, 0] == 0, dropped)
