"""Averages of the weights: the power function, and reconstruction of any width from two."""

from pathlib import Path

import pytest
import torch

from cond_diffusion import TextToImage
from cond_diffusion.errors import UserError
from cond_diffusion.models.ema import (
    EMA,
    combination,
    power_of_width,
    reconstruct,
    save_snapshot,
    snapshots_until,
    weights_of_width,
)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_an_average_has_the_moments_of_the_power_function_of_its_width(width: float):
    """If step s has a weight proportional to s^gamma, the moments are integrals of powers of s."""
    gamma, steps = power_of_width(width), 3000
    weights = {"w": torch.zeros(2, dtype=torch.float64)}
    ema = EMA(weights, width)
    for step in range(1, steps + 1):
        weights["w"] = torch.tensor([step / steps, (step / steps) ** 2], dtype=torch.float64)
        ema.update(weights, step)
    mean, square = ema.weights["w"].tolist()
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)
    assert square == pytest.approx((gamma + 1) / (gamma + 3), rel=2e-3)
    assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=0.01)


STEPS, SNAPSHOTS = 1600, 16
WIDTHS = (0.04, 0.05, 0.07, 0.1, 0.15, 0.2)


@pytest.fixture(scope="module")
def random_walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, torch.Tensor]]:
    """A run folder with snapshots of widths 0.1 and 0.05 of a random walk, and the exact averages of other widths."""
    run_dir = tmp_path_factory.mktemp("run")
    walk = torch.randn(STEPS, 500, generator=torch.Generator().manual_seed(0)).cumsum(0)
    weights = {"w": walk[0]}
    pair = [EMA(weights, width) for width in (0.1, 0.05)]
    others = {width: EMA(weights, width) for width in WIDTHS}
    for step in range(1, STEPS + 1):
        weights["w"] = walk[step - 1]
        for ema in (*pair, *others.values()):
            ema.update(weights, step)
        if step % (STEPS // SNAPSHOTS) == 0:
            save_snapshot(run_dir, step, [(ema.width, ema.weights) for ema in pair])
    return run_dir, {width: ema.weights["w"] for width, ema in others.items()}


@pytest.mark.parametrize("width", WIDTHS)
def test_any_width_is_reconstructed_from_snapshots_of_two(
    random_walk: tuple[Path, dict[float, torch.Tensor]], width: float
):
    run_dir, averages = random_walk
    snapshots = snapshots_until(run_dir, STEPS)
    assert len(snapshots) == 2 * SNAPSHOTS
    found = reconstruct(snapshots, STEPS, width)["w"]
    error = (found - averages[width]).norm() / averages[width].norm()
    # The predicted error concerns the weights of the steps; the error is smaller, since adjacent steps are similar.
    _, predicted = combination([(s.step, s.width) for s in snapshots], STEPS, width)
    assert predicted < 0.1
    assert error < max(0.01, predicted)


def test_snapshots_up_to_a_step_give_the_average_at_that_step(random_walk: tuple[Path, dict[float, torch.Tensor]]):
    run_dir, _ = random_walk
    half = snapshots_until(run_dir, STEPS // 2 + 1)
    assert max(s.step for s in half) == STEPS // 2
    coefficients, error = combination([(s.step, s.width) for s in half], STEPS // 2, 0.05)
    assert error < 1e-6
    assert coefficients[-1] == pytest.approx(1)


def test_a_width_that_cannot_be_reconstructed_is_refused(random_walk: tuple[Path, dict[float, torch.Tensor]]):
    run_dir, _ = random_walk
    snapshots = snapshots_until(run_dir, STEPS)
    with pytest.raises(UserError, match=r"^--ema-width: 0\.005 .*32 snapshots"):
        reconstruct(snapshots, STEPS, 0.005)
    with pytest.raises(UserError, match=r"^--ema-width: 0\.4; .*0\.28"):
        reconstruct(snapshots, STEPS, 0.4)
    with pytest.raises(UserError, match=r"^--ema-width: .*/mnist_model .*train\.snapshots"):
        TextToImage.from_pretrained("builtin", ema_width=0.1)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.2, 0.25])
def test_constant_weights_are_reconstructed_exactly(width: float):
    known = [(step, w) for step in range(100, 1601, 100) for w in (0.1, 0.05)]
    assert sum(combination(known, 1600, width)[0]) == pytest.approx(1, abs=1e-9)


def test_a_truncated_snapshot_is_refused(tmp_path: Path):
    save_snapshot(tmp_path, 5, [(width, {"w": torch.zeros(1000)}) for width in (0.1, 0.05)])
    (file,) = (tmp_path / "snapshots").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--ema-width: .*/step-00000005\.safetensors "):
        weights_of_width(tmp_path / "checkpoints" / "step-00000005", 0.1)
