import pytest
import torch
from torch import Tensor

from cond_diffusion.guidance import drop_captions, guided

X_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.full((3, 2, 5), 7.0)
NULL_CONTEXT = torch.full((3, 2, 5), 2.0)


class Network:
    """Predict the context's mean everywhere, and remember how it was called."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert len(x_t) == len(t) == len(context)
        assert set(t.tolist()) == {9}
        self.batches.append(len(x_t))
        return torch.ones_like(x_t) * context.mean((1, 2)).reshape(-1, 1, 1, 1) + x_t


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_uncond_plus_w_times_the_difference(scale: float):
    eps_hat = guided(Network(), CONTEXT, NULL_CONTEXT, scale)(X_T, 9)
    torch.testing.assert_close(eps_hat, X_T + 2 + scale * (7 - 2))


def test_both_passes_are_one_batch_and_scale_1_runs_one_alone():
    network = Network()
    guided(network, CONTEXT, NULL_CONTEXT, 3.0)(X_T, 9)
    guided(network, CONTEXT, NULL_CONTEXT, 1.0)(X_T, 9)
    assert network.batches == [6, 3]


def test_the_context_is_projected_once():
    calls = []

    def project(context: Tensor) -> Tensor:
        calls.append(len(context))
        return context

    denoiser = guided(Network(), CONTEXT, NULL_CONTEXT, 3.0, project=project)
    denoiser(X_T, 9)
    denoiser(X_T, 9)
    assert calls == [6]


def test_captions_are_dropped_with_the_given_probability():
    context, null_context = torch.ones(10_000, 1, 1), torch.zeros(1, 1)
    kept = drop_captions(context, null_context, 0.1, torch.Generator().manual_seed(0))
    assert kept.mean().item() == pytest.approx(0.9, abs=4 * (0.1 * 0.9 / 10_000) ** 0.5)
    assert torch.equal(drop_captions(context, null_context, 0.0, torch.Generator()), context)
    assert drop_captions(context, null_context, 1.0, torch.Generator()).sum() == 0
