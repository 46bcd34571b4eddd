"""Averages of the weights: the power function itself, and any width out of two afterwards."""

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
def test_the_average_of_the_weights_is_the_power_function_of_its_width(width: float):
    """An average that weighs step s of n in proportion to s^gamma has moments that are integrals of powers of s."""
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
WANTED = (0.04, 0.05, 0.07, 0.1, 0.15, 0.2)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, torch.Tensor]]:
    """A run's snapshots of widths 0.1 and 0.05 of a random walk, and the averages of other widths, kept all along."""
    run_dir = tmp_path_factory.mktemp("run")
    walk = torch.randn(STEPS, 500, generator=torch.Generator().manual_seed(0)).cumsum(0)
    weights = {"w": walk[0]}
    pair = [EMA(weights, width) for width in (0.1, 0.05)]
    others = {width: EMA(weights, width) for width in WANTED}
    for step in range(1, STEPS + 1):
        weights["w"] = walk[step - 1]
        for ema in (*pair, *others.values()):
            ema.update(weights, step)
        if step % (STEPS // SNAPSHOTS) == 0:
            save_snapshot(run_dir, step, [(ema.width, ema.weights) for ema in pair])
    return run_dir, {width: ema.weights["w"] for width, ema in others.items()}


@pytest.mark.parametrize("width", WANTED)
def test_any_width_is_put_together_from_snapshots_of_two(kept: tuple[Path, dict[float, torch.Tensor]], width: float):
    run_dir, averages = kept
    snapshots = snapshots_until(run_dir, STEPS)
    assert len(snapshots) == 2 * SNAPSHOTS
    found = reconstruct(snapshots, STEPS, width)["w"]
    error = (found - averages[width]).norm() / averages[width].norm()
    # The error that the profile announces is one in how the steps are weighed; steps near each other are alike.
    _, announced = combination([(s.step, s.width) for s in snapshots], STEPS, width)
    assert announced < 0.1
    assert error < max(0.01, announced)


def test_snapshots_up_to_a_step_give_the_average_at_that_step(kept: tuple[Path, dict[float, torch.Tensor]]):
    run_dir, _ = kept
    half = snapshots_until(run_dir, STEPS // 2 + 1)
    assert max(s.step for s in half) == STEPS // 2
    (shares, error) = combination([(s.step, s.width) for s in half], STEPS // 2, 0.05)
    assert error < 1e-6
    assert shares[-1] == pytest.approx(1)


def test_a_width_that_the_snapshots_do_not_reach_is_refused(kept: tuple[Path, dict[float, torch.Tensor]]):
    run_dir, _ = kept
    snapshots = snapshots_until(run_dir, STEPS)
    with pytest.raises(UserError, match="--ema-width: 32 snapshots do not suffice for a width of 0.005"):
        reconstruct(snapshots, STEPS, 0.005)
    with pytest.raises(UserError, match="--ema-width: 0.4 must lie above 0 and at most at 0.28"):
        reconstruct(snapshots, STEPS, 0.4)
    with pytest.raises(
        UserError, match="--ema-width: .*mnist_model has no snapshots; expected a checkpoint in its run"
    ):
        TextToImage.from_pretrained("builtin", ema_width=0.1)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.2, 0.25])
def test_weights_that_have_stopped_changing_stay_what_they_are(width: float):
    known = [(step, w) for step in range(100, 1601, 100) for w in (0.1, 0.05)]
    assert sum(combination(known, 1600, width)[0]) == pytest.approx(1, abs=1e-9)


def test_a_snapshot_that_was_cut_short_is_one_line(tmp_path: Path):
    save_snapshot(tmp_path, 5, [(width, {"w": torch.zeros(1000)}) for width in (0.1, 0.05)])
    (file,) = (tmp_path / "snapshots").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    with pytest.raises(UserError, match="--ema-width: .*step-00000005.safetensors is damaged or was cut short; delete"):
        weights_of_width(tmp_path / "checkpoints" / "step-00000005", 0.1)
