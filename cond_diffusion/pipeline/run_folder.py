"""A run's folder and its checkpoints: whole or not there at all.

    runs/mnist/.lock                   held by the process that trains here
    runs/mnist/config.yaml             every key of the run
    runs/mnist/metrics.jsonl           one line of JSON every `train.log_every` steps
    runs/mnist/samples/step-00001000.png
    runs/mnist/snapshots/step-00000250.safetensors   averages of the weights (`posthoc_ema.py`)
    runs/mnist/checkpoints/step-00001000/   a pipeline in diffusers' layout, and beside it
                                       state/  what training needs to go on: raw weights, optimizer, progress

A run keeps its newest checkpoints and the one with the lowest held-out loss. A checkpoint is written into a hidden
sibling, flushed to the disk and then renamed, so a folder named step-* is complete whenever the process or the machine
stopped. What happens to it later is seen by the sizes and checksums of its files. Nothing in it can run code:
safetensors, JSON and YAML only.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from cond_diffusion.errors import UserError, did_you_mean, first_line
from cond_diffusion.files import flush

CHECKSUMS_NAME = "checksums.json"
PROGRESS_NAME = "progress.json"  # in state/: the step, the held-out loss, where the data stand
LOCK_NAME = ".lock"

logger = logging.getLogger(__name__)


def new_run_dir(path: str, or_else: str = "") -> Path:
    """Return the folder for a new run, or raise UserError: what an earlier run left there is never overwritten.

    or_else: what the message offers beside another name.
    """
    run_dir = Path(path)
    if run_dir.exists() and not (run_dir.is_dir() and all(path.name == LOCK_NAME for path in run_dir.iterdir())):
        raise UserError(f"run_dir: {run_dir} exists and is not overwritten; name another, run_dir={run_dir}-2{or_else}")
    return run_dir


def make_run_dir(run_dir: Path) -> None:
    """Make the folder; raise UserError where that cannot be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir: {run_dir} cannot be made: {error.strerror}") from error


class RunLock:
    """Held by the one process that writes into a run's folder; the system releases it when that process dies."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.lock = FileLock(run_dir / LOCK_NAME)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def acquire(self) -> None:
        """Take the lock, unless it is held here already; raise UserError where another process holds it."""
        if self.lock.is_locked:
            return
        try:
            self.lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"run_dir: another process is training into {self.run_dir}; wait until it ends, or name another folder"
            ) from error
        except OSError as error:
            raise UserError(f"run_dir: {self.run_dir} cannot be written to: {error.strerror}") from error


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def newest_checkpoint(run_dir: Path, *, with_state: bool) -> Path | None:
    """Return the newest checkpoint of a run that is whole, if it has any; name those that are not.

    Raises UserError where none of them is.
    """
    while True:
        problem = None
        for checkpoint in reversed(checkpoints(run_dir)):
            problem = find_corruption(checkpoint, with_state=with_state)
            if not checkpoint.exists():
                break  # training deleted it meanwhile, and has written a newer one: list them again
            if problem is None:
                return checkpoint
            logger.warning("%s: %s; going back to the checkpoint before it", checkpoint, problem)
        else:
            if problem is not None:
                raise UserError(f"{run_dir}: none of its checkpoints is whole: {problem}")
            return None


def named_checkpoint(run_dir: Path, name: str) -> Path:
    """Return the checkpoint of a run that `resume` names; raise UserError where it is not there or not whole."""
    checkpoint = run_dir / "checkpoints" / name
    there = [path.name for path in checkpoints(run_dir)]
    if name not in there:
        has = f"it has {', '.join(there)}" if there else "it has none"
        raise UserError(f"resume: {run_dir} has no checkpoint {name}{did_you_mean(name, there)}; {has}")
    if problem := find_corruption(checkpoint, with_state=True):
        raise UserError(f"resume: {checkpoint}: {problem}")
    return checkpoint


def supersede_after(run_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, which a run that goes back to `step` leaves behind; return their new
    paths. They stay on the disk and are not rotated.
    """
    renamed = []
    for checkpoint in checkpoints(run_dir):
        if checkpoint.name > checkpoint_of(run_dir, step).name:
            names = (checkpoint.with_name(f"{checkpoint.name}.superseded-{number}") for number in count(1))
            renamed.append(checkpoint.rename(next(name for name in names if not name.exists())))
    return renamed


def find_corruption(checkpoint: Path, *, with_state: bool) -> str | None:
    """Say which of a checkpoint's files is missing, was cut short or changed since it was written; None if none is.

    with_state: look at the training state, too, which nobody needs for drawing.
    """
    try:
        listed = json.loads((checkpoint / CHECKSUMS_NAME).read_text())
    except FileNotFoundError:
        return None  # of another make, or from before there were checksums
    except ValueError:  # no JSON, or not even text
        return f"{CHECKSUMS_NAME} was cut short"
    for name, expected in listed.items():
        if name.startswith("state/") and not with_state:
            continue
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{name} was cut short: {size} of {expected['bytes']} bytes"
            if _checksum(file) != expected["blake2b"]:
                return f"{name} is not what was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def save_checkpoint(run_dir: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Let `write` fill a folder and make it the checkpoint of `step`; then delete all but the newest `keep` and
    the one with the lowest held-out loss.

    Raises UserError where it cannot be written, a full disk for example; the ones before it are then untouched.
    """
    final = checkpoint_of(run_dir, step)
    unfinished = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it wrote this
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        files = sorted(file for file in unfinished.rglob("*") if file.is_file())
        listed = {
            str(file.relative_to(unfinished)): {"bytes": file.stat().st_size, "blake2b": _checksum(file)}
            for file in files
        }
        (unfinished / CHECKSUMS_NAME).write_text(json.dumps(listed, indent=2) + "\n")
        for path in [*unfinished.rglob("*"), unfinished]:
            flush(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{final} cannot be written ({first_line(error)}); the checkpoints before it are untouched"
        ) from error
    if final.exists():  # one that was found damaged, and that the run now has come back to
        _remove(final)
    unfinished.rename(final)
    flush(final.parent)
    # Later ones are damaged, or the run would not have come back to this step; they do not count.
    until_here = [path for path in checkpoints(run_dir) if path.name <= final.name]
    losses = {path: loss for path in until_here if (loss := _held_out_loss(path)) is not None}
    best = min(losses, key=losses.__getitem__, default=None)  # of equals the first
    for old in until_here[:-keep]:
        if old != best:
            _remove(old)
    return final


def _held_out_loss(checkpoint: Path) -> float | None:
    """Return the last held-out loss that was measured up to a checkpoint; None where there is none."""
    try:
        loss = json.loads((checkpoint / "state" / PROGRESS_NAME).read_text()).get("held_out_loss")
    except (OSError, ValueError, AttributeError):  # damaged, or of another make
        return None
    return loss if isinstance(loss, float) else None


def _remove(checkpoint: Path) -> None:
    # Renamed first: a checkpoint that is half deleted must not look like one.
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old")))


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()
