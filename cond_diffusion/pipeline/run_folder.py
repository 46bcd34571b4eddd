"""The folder of a training run, and its checkpoints.

    runs/mnist/.lock                   held by the process that trains in this folder
    runs/mnist/config.yaml             all config keys of the run
    runs/mnist/metrics.jsonl           one line of JSON every `train.log_every` steps
    runs/mnist/samples/step-00001000.png
    runs/mnist/snapshots/step-00000250.safetensors   averaged weights (`models/ema.py`)
    runs/mnist/checkpoints/step-00001000/   a pipeline in diffusers' layout, with an additional folder
                                       state/  the training state: raw weights, optimizer, progress

A run keeps its newest checkpoints and the one with the lowest held-out loss. A checkpoint is written into a hidden
sibling folder, flushed to disk and then renamed, so a folder named step-* is always complete, even after a crash of the
process or the machine. Later damage is detected by the sizes and checksums of its files. A checkpoint consists of
safetensors, JSON and YAML only, which cannot execute code.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError

from cond_diffusion.config.schema import NonNegativeInt, PositiveInt, from_json, read_json
from cond_diffusion.errors import UserError, did_you_mean, user_errors
from cond_diffusion.files import UNFINISHED, check_writable, flush, write_json, written_aside

INDEX_NAME = "model_index.json"
CHECKSUMS_NAME = "checksums.json"
PROGRESS_NAME = "progress.json"  # in state/: the step, the held-out loss and the position in the data
LOCK_NAME = ".lock"
METRICS_NAME = "metrics.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamState:
    """The beginning of a block of a stream (`data/loader.py`)."""

    epoch: NonNegativeInt
    block: NonNegativeInt
    position: NonNegativeInt
    shard: NonNegativeInt
    inside: dict[str, Any] | None


@dataclass(frozen=True)
class Progress:
    """What `PROGRESS_NAME` stores."""

    step: NonNegativeInt
    samples_per_step: PositiveInt
    data: dict[str, Any]
    held_out_loss: float | None = None
    validation: list[Any] | None = None  # options that held-out losses depend on
    validated: bool = True
    stream: StreamState | None = None
    scaler: dict[str, Any] | None = None
    base: str | None = None


def check_new_run_dir(run_dir: Path, or_else: str = "") -> None:
    """Raise UserError if the folder for a new run cannot be written to, or has files of an earlier run. `or_else` ends
    the message with an alternative to choosing another folder."""
    ours = re.compile(f"{re.escape(LOCK_NAME)}|{UNFINISHED.pattern}")  # of processes that start at the same time
    if exists(run_dir) and not (run_dir.is_dir() and all(ours.fullmatch(path.name) for path in run_dir.iterdir())):
        raise UserError(
            f"run_dir: {run_dir} already exists and is not overwritten; choose another, run_dir={run_dir}-2{or_else}"
        )
    with user_errors(f"run_dir: {run_dir} cannot be written to", OSError):
        check_writable(run_dir)


def exists(run_dir: Path) -> bool:
    """Return whether a run's folder exists; raise UserError if it cannot, for example because its name is too long."""
    with user_errors(f"run_dir: {run_dir} cannot be a folder", OSError, ValueError), suppress(FileNotFoundError):
        return bool(run_dir.stat())
    return False


class RunLock:
    """Lock of the one process that writes into a folder; the system releases it when that process dies. Messages name
    the option `key` and the kind of `process`."""

    def __init__(self, run_dir: Path, key: str = "run_dir", process: str = "training process") -> None:
        self.run_dir, self.key, self.process = run_dir, key, process
        self.lock = FileLock(run_dir / LOCK_NAME)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def acquire(self) -> None:
        """Acquire the lock if this object does not hold it; raise UserError if another process holds it."""
        if self.lock.is_locked:
            return
        try:
            self.lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"{self.key}: {self.run_dir} is in use by another {self.process}; wait until it ends, or choose "
                "another folder"
            ) from error
        except OSError as error:
            raise UserError(f"{self.key}: {self.run_dir} cannot be written to: {error.strerror}") from error


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the number of completed steps of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return [path for path in _numbered(run_dir) if _is_checkpoint(path)]


def _numbered(run_dir: Path) -> list[Path]:
    """Return what has the name of a checkpoint, in order."""
    paths = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in paths if re.fullmatch("step-[0-9]{8,}", path.name) and path.exists())


def _is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint, maybe a damaged one, and not another folder or file of the same name."""
    return any((path / name).is_file() for name in (CHECKSUMS_NAME, INDEX_NAME))


def newest_checkpoint(run_dir: Path, *, with_state: bool) -> Path | None:
    """Return the newest intact checkpoint of a run (`with_state`: with an intact training state), or None if it has no
    checkpoints. Log a warning for damaged ones."""
    problem = None
    for checkpoint in reversed(_numbered(run_dir)):
        if checkpoint.exists() and not _is_checkpoint(checkpoint):
            logger.warning("%s: skipped, not a checkpoint", checkpoint)
            continue
        problem = find_corruption(checkpoint, with_state=with_state)
        if not checkpoint.exists():  # training deleted it during the check, and has written a newer one
            return newest_checkpoint(run_dir, with_state=with_state)
        if problem is None:
            return checkpoint
        logger.warning("%s: %s; trying the previous checkpoint", checkpoint, problem)
    if problem is not None:
        raise UserError(f"{run_dir}: all checkpoints are damaged: {problem}")
    return None


def named_checkpoint(run_dir: Path, name: str) -> Path:
    """Return the checkpoint of a run that `resume` names; raise UserError if it does not exist or is damaged."""
    checkpoint = run_dir / "checkpoints" / name
    names = [path.name for path in checkpoints(run_dir)]
    if name not in names:
        found = f"it has {', '.join(names)}" if names else "it has none"
        raise UserError(f"resume: {run_dir} has no checkpoint {name}{did_you_mean(name, names)}; {found}")
    if problem := find_corruption(checkpoint, with_state=True):
        raise UserError(f"resume: {checkpoint}: {problem}")
    return checkpoint


def superseded_name(path: Path) -> Path:
    """Return the first unused path `*.superseded-N`."""
    paths = (path.with_name(f"{path.name}.superseded-{number}") for number in count(1))
    return next(path for path in paths if not path.exists())


def supersede(path: Path) -> Path:
    """Rename a file or folder to `superseded_name`, which nothing reads or deletes; return its new path."""
    return path.rename(superseded_name(path))


def remove_unfinished(run_dir: Path) -> None:
    """Remove the files and folders that a killed run was writing or deleting, and no others."""
    for path in [*run_dir.glob(".*.part"), *run_dir.glob("*/.*.part")]:
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (run_dir / "checkpoints").glob(".step-*"):
        if re.fullmatch(r"\.step-[0-9]{8,}\.(unfinished|state|old)", path.name) and path.is_dir():
            shutil.rmtree(path)


def find_corruption(checkpoint: Path, *, with_state: bool) -> str | None:
    """Return a description of the first missing, truncated or changed file of a checkpoint, or None if it is intact.
    Sampling does not need the state (`with_state`)."""
    if not (checkpoint / CHECKSUMS_NAME).exists():  # written by other software, or by a version without checksums
        required = (INDEX_NAME, "unet/config.json", *([f"state/{PROGRESS_NAME}"] if with_state else []))
        return next((f"{name} is missing" for name in required if not (checkpoint / name).is_file()), None)
    try:
        listed = read_json(checkpoint / CHECKSUMS_NAME)
    except UserError as error:
        return str(error)
    for name, expected in listed.items():
        if name.startswith("state/") and not with_state:
            continue
        file = checkpoint / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if _fingerprint(file) != expected:
                return f"{name} is truncated, or has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the contents of `PROGRESS_NAME` in a checkpoint; raise UserError if they are damaged."""
    file = checkpoint / "state" / PROGRESS_NAME
    from_json(Progress, fields := read_json(file), file)
    return fields


def save_checkpoint(run_dir: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Write the checkpoint of `step` by calling `write` with its folder, then delete all but the newest `keep` and the
    one with the lowest held-out loss. Returns the checkpoint's folder."""
    final = checkpoint_of(run_dir, step)
    hint = "; earlier checkpoints are intact"
    with user_errors(f"{final} cannot be written", OSError, SafetensorError, hint=hint):
        with written_aside(final) as unfinished:
            unfinished.mkdir(parents=True)
            write(unfinished)
            files = sorted(file for file in unfinished.rglob("*") if file.is_file())
            listed = {file.relative_to(unfinished).as_posix(): _fingerprint(file) for file in files}
            write_json(unfinished / CHECKSUMS_NAME, listed)
            if _is_checkpoint(final):  # a damaged one, which the run has now reached again
                _remove(final)
            elif final.exists() or final.is_symlink():
                supersede(final)
        flush(final.parent)
        # Ignore later checkpoints: they are damaged, or the run would not have gone back to this step.
        until_here = [path for path in checkpoints(run_dir) if path.name <= final.name]
    best = _best(until_here)
    for old in until_here[:-keep]:
        if old != best:
            try:
                _remove(old)
            except OSError as error:  # for example files that another machine reads; the next start removes it
                logger.warning("%s cannot be deleted (%s)", old, error.strerror)
    return final


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; log how many are skipped, since they are not JSON objects with a step."""
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if line]
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                found.append(values)
    if skipped := len(lines) - len(found):
        logger.warning("%s: skipped %d of %d lines that are not metrics", file, skipped, len(lines))
    return found


def _best(paths: list[Path]) -> Path | None:
    """Return the checkpoint with the lowest held-out loss of the same data and objective as the newest one's."""
    found: dict[Path, dict[str, Any]] = {}
    for path in paths:
        with suppress(UserError):  # damaged, or of another format
            found[path] = read_progress(path)
    newest = found.get(paths[-1], {})
    losses = {
        path: progress["held_out_loss"]
        for path, progress in found.items()
        if progress.get("held_out_loss") is not None
        and progress["data"] == newest.get("data")
        and progress.get("validation", newest.get("validation")) == newest.get("validation")  # earlier versions
    }
    return min(losses, key=losses.__getitem__, default=None)  # the earliest of equal ones


def _remove(checkpoint: Path) -> None:
    # Rename first: a partly deleted folder must not have the name of a checkpoint.
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old")))


def _fingerprint(file: Path) -> dict[str, Any]:
    """Return what `CHECKSUMS_NAME` stores of a file: its size and checksum."""
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "blake2b": hashlib.file_digest(content, "blake2b").hexdigest()}
