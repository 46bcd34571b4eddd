"""Muon against singular values, and against torch's own."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import weights

from cond_diffusion.config.run import Config
from cond_diffusion.errors import UserError
from cond_diffusion.training.optimizer import Muon, orthogonal
from cond_diffusion.training.trainer import train


@pytest.mark.parametrize("shapes", [[(64, 64), (64, 200), (300, 64)], [(16, 16)], [(1, 5), (5, 1)]])
def test_the_direction_is_that_of_the_nearest_orthogonal_matrix(shapes: list[tuple[int, int]]):
    """With M = U S V^T that is U V^T: M keeps its singular vectors, and its singular values become about 1."""
    draw = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=draw) * 10 ** (3 * i - 3) for i, shape in enumerate(shapes)]
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        assert found.shape == matrix.shape
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        core = u.T @ found.double() @ vh.T
        new = core.diagonal()
        assert new[s > 0.02 * s[0]].min() > 0.65  # what is far smaller than the rest is brought up in part
        assert new.max() < 1.25
        assert (core - torch.diag(new)).abs().max() < 1e-3


def test_its_steps_are_those_of_torch_s_muon_and_adamw():
    draw = torch.Generator().manual_seed(0)
    start = {"square": (8, 8), "wide": (4, 40), "vector": (8,), "last": (3, 5)}
    ours = {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in start.items()}
    theirs = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    ours["wide"] = torch.nn.Parameter(ours["wide"].detach().view(4, 10, 2, 2))  # a convolution is its matrix
    optimizer = Muon(ours.values(), 0.02, first_and_last=[ours["last"]], weight_decay=0.1)
    muon = torch.optim.Muon(
        [theirs["square"], theirs["wide"]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([theirs["vector"], theirs["last"]], lr=0.02, weight_decay=0.1)
    for _ in range(5):
        for name, parameter in ours.items():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            theirs[name].grad = parameter.grad.view(theirs[name].shape).clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for name in ("vector", "last"):
        torch.testing.assert_close(ours[name], theirs[name])
    for name in ("square", "wide"):  # torch computes the direction in bf16: within a hundredth of the way gone
        apart = theirs[name] - ours[name].view(theirs[name].shape)
        gone = 5 * 0.02 * 0.2 * theirs[name].numel() ** 0.5
        assert apart.norm() < 0.02 * gone


def test_a_run_with_it_that_was_interrupted_equals_one_that_was_not(bars_config: Config):
    config = replace(bars_config, train=replace(bars_config.train, optimizer="muon"))
    newest = train(config)
    expected = weights(newest)
    assert any(name.endswith(".momentum") for name in expected)
    assert any(name.endswith(".exp_avg") for name in expected)
    shutil.rmtree(newest)  # step 4: what is left is step 2
    assert train(replace(config, resume=True)) == newest
    found = weights(newest)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # By this torch knows that the counter of steps belongs on the parameters' device.
    assert Muon([torch.nn.Parameter(torch.zeros(1))], 0.1).param_groups[0]["fused"]
    with pytest.raises(UserError, match="resume: train.optimizer was muon in this run and is now adamw; keep it"):
        train(replace(bars_config, resume=True))
