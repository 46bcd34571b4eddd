"""Averages of the weights over training; samples of the averages are better than those of the raw weights.

An average follows a power function of the step (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.1): its width is a fixed fraction of the training so far, so it needs no warm-up and no
decay rate that depends on the length of the run.

Training tracks one average. With `train.snapshots` it also tracks one of half the width and stores snapshots of both,
from which other widths can be reconstructed after training.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cond_diffusion.config.schema import from_json, parse_json
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.files import check_finite, save_tensors
from cond_diffusion.models.unet import WEIGHTS_NAME

Weights = Mapping[str, Tensor]


class EMA:
    """Power-function average of parameters, on their device and with their sharding.

    Args:
        parameters: The parameters; the average starts as a copy.
        width: sigma_rel, the standard deviation of the average's profile as a fraction of the training so far.
    """

    def __init__(self, parameters: Weights, width: float) -> None:
        self.width = width
        self.exponent = power_of_width(width)
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Weights, step: int) -> None:
        """Update the average after optimizer step number `step`, counted from 1.

        beta = (1 - 1 / step)^(exponent + 1) is 0 at the first step, so the initial weights are discarded.
        """
        beta = (1 - 1 / step) ** (self.exponent + 1)
        averages, weights = list(self.weights.values()), [parameters[name].detach() for name in self.weights]
        torch._foreach_lerp_(averages, weights, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]


def power_of_width(width: float) -> float:
    """Return the exponent gamma of the average whose relative width is sigma_rel.

    It is the largest real root of the cubic sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    square = width**-2
    roots = np.roots([1, 7, 16 - square, 12 - square])
    return float(roots[np.isreal(roots)].real.max())


MAX_ERROR = 0.1  # relative error of the profile; stays below with the settings of the paper
FOLDER = "snapshots"
Widths = tuple[Annotated[float, Field(gt=0, le=0.28)], Annotated[float, Field(gt=0, le=0.28)]]  # of a snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """An average of relative width `width` after `step` steps: the tensors of `file` whose names have `prefix`."""

    step: int
    width: float
    file: Path
    prefix: str = ""


def save_snapshot(run_dir: Path, step: int, averages: Sequence[tuple[float, Weights]]) -> None:
    """Write averages (width, weights) after `step` steps atomically; raise UserError if that fails."""
    file = run_dir / FOLDER / f"step-{step:08d}.safetensors"
    weights = {f"{i}.{name}": value for i, (_, average) in enumerate(averages) for name, value in average.items()}
    with user_errors(f"{file} cannot be written", OSError, SafetensorError):
        save_tensors(weights, file, {"widths": json.dumps([width for width, _ in averages])})


def snapshots_until(run_dir: Path, step: int) -> list[Snapshot]:
    """Return the snapshots of a run up to `step`; raise UserError for a damaged file."""
    snapshots = []
    for file_step, file in snapshot_files(run_dir):
        if 0 < file_step <= step:
            with _opened(file) as content:
                metadata = content.metadata() or {}
            fields = parse_json(f'{{"widths": {metadata.get("widths")}}}', file)
            widths: Any = from_json(Widths, fields.get("widths"), f"{file}: widths")
            snapshots += [Snapshot(file_step, width, file, f"{i}.") for i, width in enumerate(widths)]
    return snapshots


def snapshot_files(run_dir: Path) -> list[tuple[int, Path]]:
    """Return the step and the path of each snapshot of a run; other files are ignored."""
    named = [(re.fullmatch(r"step-([0-9]{8,})\.safetensors", file.name), file) for file in (run_dir / FOLDER).glob("*")]
    return sorted((int(step[1]), file) for step, file in named if step and file.is_file())


def weights_of_width(checkpoint: Path, width: float) -> dict[str, Tensor]:
    """Reconstruct the average of another width at a checkpoint from the snapshots of its run."""
    checkpoint = checkpoint.resolve()
    step = re.fullmatch(r"step-(\d+)", checkpoint.name)
    snapshots = snapshots_until(checkpoint.parent.parent, int(step[1])) if step else []
    if not snapshots or step is None:
        raise UserError(
            f"--ema-width: {checkpoint} has no snapshots; expected a checkpoint inside the folder of its run, with "
            f"{FOLDER}/step-*.safetensors (train.snapshots)"
        )
    wide, narrow = snapshots[-2:]  # all snapshots of a run have the same widths
    at_checkpoint = [
        Snapshot(int(step[1]), wide.width, checkpoint / "unet" / WEIGHTS_NAME),
        Snapshot(int(step[1]), narrow.width, checkpoint / "state" / "narrow_ema.safetensors"),
    ]
    if snapshots[-1].step < at_checkpoint[0].step:
        if all(snapshot.file.exists() for snapshot in at_checkpoint):
            snapshots += at_checkpoint
        else:  # a sharded run, whose shards are not merged here
            logger.warning("--ema-width: using step %d, the last snapshot before %s", snapshots[-1].step, checkpoint)
    return reconstruct(snapshots, snapshots[-1].step, width)


def reconstruct(snapshots: Sequence[Snapshot], step: int, width: float) -> dict[str, Tensor]:
    """Return the average of relative width `width` after `step` steps as a combination of snapshots."""
    if not 0 < width <= 0.28:
        raise UserError(f"--ema-width: {width}; expected more than 0 and at most 0.28")
    coefficients, error = combination([(s.step, s.width) for s in snapshots], step, width)
    if error > MAX_ERROR:
        raise UserError(
            f"--ema-width: {width} cannot be reconstructed from {len(snapshots)} snapshots (relative error of the "
            f"profile: {error:.0%}); expected a width closer to those of training, or more train.snapshots"
        )
    total: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
        with _opened(snapshot.file) as content:
            for key in content.keys():  # noqa: SIM118 - not a dict
                if key.startswith(snapshot.prefix):
                    name, weight = key.removeprefix(snapshot.prefix), content.get_tensor(key).double()
                    check_finite([(key, weight)], snapshot.file)
                    total[name] = total[name] + coefficient * weight if name in total else coefficient * weight
    return {name: weight.float() for name, weight in total.items()}


def combination(known: Sequence[tuple[int, float]], step: int, width: float) -> tuple[list[float], float]:
    """Fit the profile of an average by a linear combination of known ones (least squares, appendix C.3).

    Args:
        known: Step and width of each known average.

    Returns:
        The coefficients, which sum to 1, and the relative error of the profile.
    """
    basis = [(t, power_of_width(w)) for t, w in known]
    target = (step, power_of_width(width))
    products = np.array([[_product(a, b) for b in basis] for a in basis])
    projections = np.array([_product(a, target) for a in basis])
    # A Lagrange multiplier makes the sum 1, so that weights that have stopped changing stay as they are.
    ones = np.ones((1, len(basis)))
    equations = np.block([[products, ones.T], [ones, np.zeros((1, 1))]])
    coefficients = np.linalg.lstsq(equations, np.append(projections, 1), rcond=1e-12)[0][:-1]
    square = _product(target, target)
    error = square - 2 * coefficients @ projections + coefficients @ products @ coefficients
    return coefficients.tolist(), float(max(error, 0) / square) ** 0.5


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    what = f"--ema-width: {file} is damaged or truncated"
    if not file.is_file():
        raise UserError(f"--ema-width: {file} is not a regular file")
    errors = (OSError, SafetensorError, RuntimeError)  # the last for tensors of different shapes
    with user_errors(what, *errors, hint="; delete it"), safe_open(file, "pt") as content:
        yield content


def _product(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Return the integral of the product of two profiles p(s) = (gamma + 1) s^gamma / t^(gamma + 1), 0 < s < t."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    until = min(t_a, t_b)
    logarithm = gamma_a * np.log(until / t_a) + gamma_b * np.log(until / t_b)
    factor = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return factor * np.exp(logarithm) * until / (t_a * t_b)
