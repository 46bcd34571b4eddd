"""A run's folder and its checkpoints: whole or not there at all.

    runs/mnist/config.yaml             every key of the run
    runs/mnist/metrics.jsonl           one line of JSON every `train.log_every` steps
    runs/mnist/samples/step-00001000.png
    runs/mnist/checkpoints/step-00001000/   a pipeline in diffusers' layout, and beside it
                                       state/  what training needs to go on: raw weights, optimizer, progress

A checkpoint is written into a hidden sibling, flushed to the disk and then renamed, so a folder named step-* is
complete whenever the process or the machine stopped. Nothing in it can run code: safetensors, JSON and YAML only.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cond_diffusion.errors import UserError, first_line


def new_run_dir(path: str, or_else: str = "") -> Path:
    """Return the folder for a new run, or raise UserError: what an earlier run left there is never overwritten.

    or_else: what the message offers beside another name.
    """
    run_dir = Path(path)
    if run_dir.exists() and not (run_dir.is_dir() and not any(run_dir.iterdir())):
        raise UserError(f"run_dir: {run_dir} exists and is not overwritten; name another, run_dir={run_dir}-2{or_else}")
    return run_dir


def make_run_dir(run_dir: Path) -> None:
    """Make the folder; raise UserError where that cannot be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir: {run_dir} cannot be made: {error.strerror}") from error


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if it has one."""
    return next(reversed(checkpoints(run_dir)), None)


def save_checkpoint(run_dir: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Let `write` fill a folder and make it the checkpoint of `step`; then delete all but the newest `keep`."""
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    unfinished = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it wrote this
    unfinished.mkdir(parents=True)
    write(unfinished)
    for path in [*unfinished.rglob("*"), unfinished]:
        _flush(path)
    unfinished.rename(final)
    _flush(final.parent)
    for old in checkpoints(run_dir)[:-keep]:
        # Renamed first: a checkpoint that is half deleted must not look like one.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.unfinished")))
    return final


def save_state(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write the raw (not averaged) weights, the optimizer's moments and `progress` into `folder`."""
    folder.mkdir()
    save_file(
        {name: weight.detach().contiguous() for name, weight in network.state_dict().items()},
        folder / "unet.safetensors",
    )
    moments = {
        f"{number}.{name}": torch.as_tensor(value).contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")


def load_state(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put back what `save_state` wrote, and return the progress; raise UserError if it is not whole or does not fit."""
    try:
        network.load_state_dict(load_file(folder / "unet.safetensors"))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            number, name = key.split(".", 1)
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return json.loads((folder / "progress.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError, RuntimeError) as error:
        raise UserError(
            f"resume: {folder} is damaged, was cut short or belongs to another network ({first_line(error)}); "
            f"delete {folder.parent} to go on from the checkpoint before it"
        ) from error


def _flush(path: Path) -> None:
    """Ask the system to have `path` on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
