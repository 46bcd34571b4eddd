"""Muon: orthogonalization against the SVD, updates against torch.optim.Muon, and resuming."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import weights

from cond_diffusion.config.run import Config, TrainConfig
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.errors import UserError
from cond_diffusion.models.unet import UNet
from cond_diffusion.training.optimizer import Muon, orthogonalize
from cond_diffusion.training.setup import new_optimizer
from cond_diffusion.training.trainer import train


@pytest.mark.parametrize("shapes", [[(64, 64), (64, 200), (300, 64)], [(16, 16)], [(1, 5), (5, 1)]])
def test_orthogonalize_keeps_singular_vectors_and_sets_singular_values_near_one(shapes: list[tuple[int, int]]):
    """The nearest orthogonal matrix to M = U S V^T is U V^T."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) * 10 ** (3 * i - 3) for i, shape in enumerate(shapes)]
    for matrix, result in zip(matrices, orthogonalize(matrices), strict=True):
        assert result.shape == matrix.shape
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        core = u.T @ result.double() @ vh.T
        singular_values = core.diagonal()
        assert singular_values[s > 0.02 * s[0]].min() > 0.65  # much smaller ones are increased only in part
        assert singular_values.max() < 1.25
        assert (core - torch.diag(singular_values)).abs().max() < 1e-3


def test_orthogonalize_leaves_the_precision_of_matrix_products():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        orthogonalize([torch.eye(3)])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_has_the_learning_rate_and_the_weight_decay_of_the_config(optimizer: Any):
    unet = UNet(UNetConfig((32,), (False,), num_groups=8, in_channels=1, sample_size=8, context_dim=8))
    config = TrainConfig(optimizer=optimizer, learning_rate=0.02, weight_decay=0.1)
    for group in new_optimizer(config, unet).param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.02, 0.1)


def test_gradients_are_clipped_to_the_norm_of_the_config(bars_config: Config):
    """The first moment of AdamW after one step is 0.1 times the gradient."""
    config = replace(bars_config, train=replace(bars_config.train, max_steps=1, max_grad_norm=1e-3))
    moments = [value for name, value in weights(train(config)).items() if name.endswith(".exp_avg")]
    assert sum(moment.square().sum() for moment in moments) ** 0.5 == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_steps_equal_those_of_torch_muon_and_adamw():
    generator = torch.Generator().manual_seed(0)
    shapes = {"square": (8, 8), "wide": (4, 40), "vector": (8,), "last": (3, 5)}
    ours = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    ours["wide"] = torch.nn.Parameter(ours["wide"].detach().view(4, 10, 2, 2))  # a convolution kernel as a matrix
    optimizer = Muon(ours.values(), 0.02, adamw_parameters=[ours["last"]], weight_decay=0.1)
    muon = torch.optim.Muon(
        [theirs["square"], theirs["wide"]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([theirs["vector"], theirs["last"]], lr=0.02, weight_decay=0.1)
    for _ in range(5):
        for name, parameter in ours.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            theirs[name].grad = parameter.grad.view(theirs[name].shape).clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for name in ("vector", "last"):
        torch.testing.assert_close(ours[name], theirs[name])
    for name in ("square", "wide"):  # torch orthogonalizes in bf16, so allow 2 % of the total update
        difference = theirs[name] - ours[name].view(theirs[name].shape)
        total_update = 5 * 0.02 * 0.2 * theirs[name].numel() ** 0.5
        assert difference.norm() < 0.02 * total_update


def test_resumed_run_with_muon_equals_uninterrupted_run(bars_config: Config):
    config = replace(bars_config, train=replace(bars_config.train, optimizer="muon"))
    newest = train(config)
    expected = weights(newest)
    assert any(name.endswith(".momentum") for name in expected)
    names = [name for name, _ in UNet.from_pretrained(newest / "unet").named_parameters()]
    for layer in ("conv_in", "conv_out"):  # AdamW updates the first and the last layer
        assert f"state/optimizer.safetensors:{names.index(f'{layer}.weight')}.exp_avg" in expected
    shutil.rmtree(newest)  # of step 4, which leaves step 2
    assert train(replace(config, resume=True)) == newest
    resumed = weights(newest)
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name
    # torch checks this key to move a loaded step counter to the parameters' device.
    assert Muon([torch.nn.Parameter(torch.zeros(1))], 0.1).param_groups[0]["fused"]
    with pytest.raises(UserError, match=r"^resume: train\.optimizer .*muon.*adamw"):
        train(replace(bars_config, resume=True))
