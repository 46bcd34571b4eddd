import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from cond_diffusion.diffusion.guidance import (
    GuidanceConfig,
    drop_captions,
    guided,
    rescale,
    scale_of_each,
    threshold_dynamically,
)
from cond_diffusion.errors import UserError

X_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.full((3, 2, 5), 7.0)
NULL_CONTEXT = torch.full((3, 2, 5), 2.0)
PLAIN = GuidanceConfig()


class Network:
    """Predict the context's mean everywhere, and x_t `slope` times that mean; remember how it was called."""

    def __init__(self, slope: float = 0.0) -> None:
        self.slope = slope
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert len(x_t) == len(t) == len(context)
        self.batches.append(len(x_t))
        mean = context.mean((1, 2)).reshape(-1, 1, 1, 1)
        return torch.ones_like(x_t) * mean + (1 + self.slope * mean) * x_t


@pytest.mark.parametrize("scales", [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [3.0, 1.0, 0.0]])
def test_guidance_is_uncond_plus_w_times_the_difference_for_each(scales: list[float]):
    w = torch.tensor(scales)
    output = guided(Network(), CONTEXT, NULL_CONTEXT, w, PLAIN)(X_T, 9)
    torch.testing.assert_close(output, X_T + 2 + w.reshape(-1, 1, 1, 1) * (7 - 2))


def test_both_passes_are_one_batch_and_scale_1_costs_one_alone():
    for scales, expected in (([3.0, 3.0, 3.0], 6), ([1.0, 1.0, 1.0], 3), ([1.0, 3.0, 1.0], 4)):
        network = Network()
        guided(network, CONTEXT, NULL_CONTEXT, torch.tensor(scales), PLAIN)(X_T, 9)
        assert network.batches == [expected]


def test_outside_the_interval_the_unconditional_pass_is_not_run():
    network = Network()
    denoise = guided(network, CONTEXT, NULL_CONTEXT, torch.full((3,), 3.0), GuidanceConfig(interval=(5, 8)))
    outputs = [denoise(X_T, t) for t in (4, 5, 8, 9)]
    assert network.batches == [3, 6, 6, 3]
    for output, expected in zip(outputs, (7, 17, 17, 7), strict=True):
        torch.testing.assert_close(output, X_T + expected)


def test_the_context_is_projected_once():
    calls = []

    def project(context: Tensor) -> Tensor:
        calls.append(len(context))
        return context

    denoise = guided(Network(), CONTEXT, NULL_CONTEXT, torch.full((3,), 3.0), PLAIN, project=project)
    denoise(X_T, 9)
    denoise(X_T, 9)
    assert calls == [3, 6]


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaling_is_that_of_diffusers(phi: float):
    guided_output, cond = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    guided_output = 4 * guided_output
    torch.testing.assert_close(
        rescale(guided_output, cond, phi), rescale_noise_cfg(guided_output, cond, guidance_rescale=phi)
    )


def test_whole_rescaling_takes_back_all_of_the_deviation():
    scales = torch.tensor([5.0, 1.0, 5.0])
    cond, plain, tamed = (
        guided(Network(slope=0.1), CONTEXT, NULL_CONTEXT, w, config)(X_T, 9).flatten(1).std(1)
        for w, config in ((torch.ones(3), PLAIN), (scales, PLAIN), (scales, GuidanceConfig(rescale=1.0)))
    )
    assert (plain[[0, 2]] > 1.5 * cond[[0, 2]]).all()
    torch.testing.assert_close(tamed, cond)
    torch.testing.assert_close(plain[1], cond[1])


def test_dynamic_thresholding_cuts_at_the_quantile_and_leaves_alone_what_fits():
    x_0_hat = torch.linspace(-3, 3, 101).reshape(1, 1, 101).repeat(2, 1, 1)
    x_0_hat[1] /= 4
    cut = threshold_dynamically(x_0_hat, 0.9)
    s = x_0_hat[0].abs().quantile(0.9)
    torch.testing.assert_close(cut[0], x_0_hat[0].clamp(-s, s) / s)
    assert torch.equal(cut[1], x_0_hat[1])
    assert cut.abs().max() <= 1


def test_the_null_context_takes_the_place_of_dropped_captions():
    context, null_context = torch.ones(10_000, 1, 1), torch.zeros(1, 1)
    dropped = torch.arange(10_000) % 3 == 0
    assert torch.equal(drop_captions(context, null_context, dropped)[:, 0, 0] == 0, dropped)


def test_one_scale_is_for_all_prompts_and_a_list_for_each():
    assert scale_of_each(3.0, 2) == [3.0, 3.0]
    assert scale_of_each([1.0, 2.0], 2) == [1.0, 2.0]
    with pytest.raises(UserError, match="guidance_scale: 3 values for 2 prompts; expected one, or one for each"):
        scale_of_each((1.0, 2.0, 3.0), 2)
    for wrong in (float("inf"), float("nan"), -1.0, 1e308):
        with pytest.raises(UserError, match="guidance_scale: .* must be a number from 0 to 10000"):
            scale_of_each([1.0, wrong], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (800, 200)}, "guidance_interval: 800 to 200 holds no timestep; expected the lower one first"),
        ({"interval": (-1, 200)}, "guidance_interval: -1 to 200"),
        ({"interval": (200,)}, "guidance_interval: (200,) is no pair"),
        ({"rescale": 1.5}, "guidance_rescale: 1.5 must lie between 0"),
        ({"dynamic_thresholding": 0.0}, "dynamic_thresholding: 0.0 is a share"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, message: str):
    with pytest.raises(UserError) as refusal:
        GuidanceConfig(**options)
    assert message in str(refusal.value)
