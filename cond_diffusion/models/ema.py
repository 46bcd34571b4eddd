"""Averages of the weights over training, which draw better pictures than the weights themselves.

An average is a power function of the step (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.1): it remembers a fixed share of the training so far, however long that is, and forgets
the random start by itself, so it needs neither a warm-up nor a decay that fits the length of the run.

Two of them are kept. One is what the checkpoints hold; from snapshots of both an average of any other width can be put
together after training (`posthoc_ema.py`).
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cond_diffusion.errors import UserError, first_line
from cond_diffusion.files import save_tensors
from cond_diffusion.models.unet import WEIGHTS_NAME

Weights = Mapping[str, Tensor]


class EMA:
    """An average of parameters, kept where they are: on the same device, sharded as they are.

    width: sigma_rel, the average's standard deviation in time as a share of the training so far.
    """

    def __init__(self, parameters: Weights, width: float) -> None:
        self.width = width
        self.exponent = power_of_width(width)
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Weights, step: int) -> None:
        """Take in the parameters after optimizer step number `step`, counted from 1.

        beta = (1 - 1 / step)^(exponent + 1) is 0 at the first step, which therefore replaces the start.
        """
        beta = (1 - 1 / step) ** (self.exponent + 1)
        averages, weights = list(self.weights.values()), [parameters[name].detach() for name in self.weights]
        torch._foreach_lerp_(averages, weights, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]


def power_of_width(width: float) -> float:
    """Return the exponent gamma whose average has relative width sigma_rel.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic in gamma; its largest real root is
    wanted.
    """
    square = width**-2
    roots = np.roots([1, 7, 16 - square, 12 - square])
    return float(roots[np.isreal(roots)].real.max())


LARGEST_ERROR = 0.1  # of the profile, as a share of it; the paper's own setting stays below
FOLDER = "snapshots"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """One average after `step` steps, in a file, under names that begin with `prefix`."""

    step: int
    width: float
    file: Path
    prefix: str = ""


def save_snapshot(run_dir: Path, step: int, averages: Sequence[tuple[float, Weights]]) -> None:
    """Write the averages of the given widths after `step` steps, all of it or nothing; UserError where that fails."""
    file = run_dir / FOLDER / f"step-{step:08d}.safetensors"
    weights = {f"{i}.{name}": value for i, (_, average) in enumerate(averages) for name, value in average.items()}
    try:
        save_tensors(weights, file, {"widths": json.dumps([width for width, _ in averages])})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be written ({first_line(error)})") from error


def snapshots_until(run_dir: Path, step: int) -> list[Snapshot]:
    """Find what `save_snapshot` has written up to `step`; raise UserError for a file that is damaged."""
    found = []
    for file in sorted((run_dir / FOLDER).glob("step-*.safetensors")):
        if (taken_at := int(file.stem.removeprefix("step-"))) <= step:
            with _opened(file) as content:
                widths = json.loads(content.metadata()["widths"])
            found += [Snapshot(taken_at, width, file, f"{i}.") for i, width in enumerate(widths)]
    return found


def weights_of_width(checkpoint: Path, width: float) -> dict[str, Tensor]:
    """Return the average of another width at a checkpoint, from what its run has left up to it.

    Raises UserError where that is nothing, or too little.
    """
    step = re.fullmatch(r"step-(\d+)", checkpoint.name)
    snapshots = snapshots_until(checkpoint.parent.parent, int(step[1])) if step else []
    if not snapshots or step is None:
        raise UserError(
            f"--ema-width: {checkpoint} has no snapshots; expected a checkpoint in its run's folder, with "
            f"{FOLDER}/step-*.safetensors beside it (train.snapshots)"
        )
    wide, narrow = snapshots[-2:]  # the widths are the same all along the run
    own = [
        Snapshot(int(step[1]), wide.width, checkpoint / "unet" / WEIGHTS_NAME),
        Snapshot(int(step[1]), narrow.width, checkpoint / "state" / "narrow_ema.safetensors"),
    ]
    if snapshots[-1].step < own[0].step:
        if all(snapshot.file.exists() for snapshot in own):
            snapshots += own
        else:  # a sharded run's, whose pieces are not put together here
            logger.warning("--ema-width: this is the average at step %d, the last snapshot", snapshots[-1].step)
    return reconstruct(snapshots, snapshots[-1].step, width)


def reconstruct(snapshots: Sequence[Snapshot], step: int, width: float) -> dict[str, Tensor]:
    """Return the average of relative width `width` after `step` steps.

    Raises UserError where the snapshots do not suffice for it.
    """
    if not 0 < width <= 0.28:
        raise UserError(f"--ema-width: {width} must lie above 0 and at most at 0.28")
    shares, error = combination([(s.step, s.width) for s in snapshots], step, width)
    if error > LARGEST_ERROR:
        raise UserError(
            f"--ema-width: {len(snapshots)} snapshots do not suffice for a width of {width} (its profile would be off "
            f"by {error:.0%}); expected a width nearer to those of training, or more of train.snapshots"
        )
    total: dict[str, Tensor] = {}
    for snapshot, share in zip(snapshots, shares, strict=True):
        with _opened(snapshot.file) as content:
            for key in content.keys():  # noqa: SIM118 - it is no dict
                if key.startswith(snapshot.prefix):
                    name, weight = key.removeprefix(snapshot.prefix), content.get_tensor(key).double()
                    total[name] = total[name] + share * weight if name in total else share * weight
    return {name: weight.float() for name, weight in total.items()}


def combination(known: Sequence[tuple[int, float]], step: int, width: float) -> tuple[list[float], float]:
    """Return the shares of the known averages, (step, width) each, that together are nearest to the wanted one, and how
    far off their profile is, as a share of it (least squares, appendix C.3).
    """
    basis = [(t, power_of_width(w)) for t, w in known]
    wanted = (step, power_of_width(width))
    products = np.array([[_product(a, b) for b in basis] for a in basis])
    aims = np.array([_product(a, wanted) for a in basis])
    # With a sum of 1, weights that have stopped changing stay what they are: a Lagrange multiplier sees to it.
    ones = np.ones((1, len(basis)))
    equations = np.block([[products, ones.T], [ones, np.zeros((1, 1))]])
    shares = np.linalg.lstsq(equations, np.append(aims, 1), rcond=1e-12)[0][:-1]
    square = _product(wanted, wanted)
    error = square - 2 * shares @ aims + shares @ products @ shares
    return shares.tolist(), float(max(error, 0) / square) ** 0.5


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as content:
            yield content
    except (OSError, SafetensorError) as error:
        raise UserError(f"--ema-width: {file} is damaged or was cut short; delete it ({first_line(error)})") from error


def _product(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Return the integral of the product of two profiles p(s) = (gamma + 1) s^gamma / t^(gamma + 1), 0 < s < t."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    until = min(t_a, t_b)
    logarithm = gamma_a * np.log(until / t_a) + gamma_b * np.log(until / t_b)
    factor = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return factor * np.exp(logarithm) * until / (t_a * t_b)
