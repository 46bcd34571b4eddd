"""A run's folder at its beginning: a new one is never mixed with an old one, and a run goes on only as what it was."""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from cond_diffusion.config.run import Config, load_config, save_config
from cond_diffusion.data.loader import Feed
from cond_diffusion.errors import UserError
from cond_diffusion.models.posthoc_ema import FOLDER as SNAPSHOTS
from cond_diffusion.pipeline.checkpoint import (
    RunLock,
    make_run_dir,
    named_checkpoint,
    new_run_dir,
    newest_checkpoint,
    supersede_after,
)
from cond_diffusion.training.state import TrainingState

# What may change within a run, since the weights mean the same afterwards; everything else decides what they mean.
SAFE = {
    "objective": ("loss", "min_snr_gamma", "timesteps"),
    "data": (
        *("source", "streaming", "shuffle_buffer", "image_column", "caption_column", "caption_templates"),
        *("label_names", "crop", "flip", "background", "max_bad_fraction", "memory_gb", "held_out"),
    ),
}

logger = logging.getLogger(__name__)


def find_run(config: Config, *, aloud: bool) -> tuple[Path, Path | None]:
    """Return the folder for a new run; or with `resume` that of the run that is there, and the checkpoint that it names
    or the newest that is whole.

    Raises UserError where the folder holds something else, or a run that cannot go on with this config.
    """
    if not config.resume:
        return new_run_dir(config.run_dir, or_else=", or go on with it by resume=true"), None
    run_dir = Path(config.run_dir)
    if not (run_dir / "config.yaml").exists():
        if isinstance(config.resume, str):
            raise UserError(f"resume: there is no run in {run_dir}, and so no checkpoint {config.resume}")
        return new_run_dir(config.run_dir, or_else="; it is no run that could be resumed"), None
    if isinstance(config.resume, str):
        return run_dir, named_checkpoint(run_dir, config.resume)
    newest = newest_checkpoint(run_dir, with_state=True)
    if newest is None and aloud:
        logger.warning("resume: %s has no checkpoint yet; it begins anew", run_dir)
    return run_dir, newest


def acquire(lock: RunLock, accelerator: Accelerator) -> None:
    """Take the lock in the main process; all processes must call this, and raise UserError where that fails."""
    problem = None
    if accelerator.is_main_process:
        try:
            lock.acquire()
        except UserError as error:
            problem = error
    if accelerator.num_processes > 1:
        failed = torch.tensor([problem is not None], dtype=torch.int32, device=accelerator.device)
        if cast(Tensor, accelerator.gather(failed)).any() and problem is None:
            problem = UserError("run_dir: the main process could not lock it")
    if problem is not None:
        raise problem


def make_run(lock: RunLock, config: Config, newest: Path | None, start: int, accelerator: Accelerator) -> None:
    """Make the run's folder and lock it, now that nothing in the config has turned out to be wrong; remove what a run
    that goes on after `start` steps will write again, and rename later checkpoints if `resume` named an earlier one.

    Raises UserError where another process has begun to train there meanwhile.
    """
    run_dir = lock.run_dir
    accelerator.wait_for_everyone()  # until all processes have seen that it was not there
    if accelerator.is_main_process:
        make_run_dir(run_dir)
    acquire(lock, accelerator)
    if accelerator.is_main_process:
        if newest is None and not config.resume:
            new_run_dir(config.run_dir)  # still: it could not be locked before it was there
        if isinstance(config.resume, str) and (later := supersede_after(run_dir, start)):
            logger.warning("resume: renamed later checkpoints to %s", ", ".join(path.name for path in later))
        for unfinished in (run_dir / "checkpoints").glob(".step-*"):  # of a run that was killed while it wrote this
            shutil.rmtree(unfinished)
        for snapshot in (run_dir / SNAPSHOTS).glob("step-*"):
            if snapshot.suffix != ".safetensors" or int(snapshot.stem.removeprefix("step-")) > start:
                snapshot.unlink()
        try:
            save_config(config, run_dir / "config.yaml")
        except OSError as error:
            raise UserError(f"run_dir: {run_dir} cannot be written to: {error.strerror}") from error


def check_config(config: Config, checkpoint: Path, *, aloud: bool) -> None:
    """Compare the config with that of the run that wrote the checkpoint.

    Raises UserError for a change that the weights do not survive; warns of one that they do.
    """
    before = load_config(Config, checkpoint / "config.yaml")
    for key, then, now in (
        ("seed", before.seed, config.seed),
        ("train.ema_width", before.train.ema_width, config.train.ema_width),
        ("train.optimizer", before.train.optimizer, config.train.optimizer),
        ("train.lora_rank", before.train.lora_rank, config.train.lora_rank),
    ):
        if then != now:
            raise UserError(f"resume: {key} was {then} in this run and is now {now}; keep it")
    changes: list[str] = []
    for section in ("data", "text", "latent", "unet", "schedule", "objective"):
        now, then = asdict(getattr(config, section)), asdict(getattr(before, section))
        for key in now:
            if now[key] == then[key]:
                continue
            change = f"{section}.{key} was {then[key]!r} in this run and is now {now[key]!r}"
            if key not in SAFE.get(section, ()):
                raise UserError(f"resume: {change}; the weights mean something only with the former")
            changes.append(change)
    if aloud:
        for change in changes:
            logger.warning("resume: %s; going on with it", change)


def go_on(
    checkpoint: Path, state: TrainingState, feed: Feed, per_step: int, *, aloud: bool
) -> tuple[int, float | None]:
    """Load a checkpoint, and have the feed go on from there; return the number of steps that are done, and the last
    held-out loss.

    Raises UserError where the checkpoint is not whole, or for another number of samples a step.
    """
    progress = state.load(checkpoint)
    if progress["samples_per_step"] != per_step:
        raise UserError(
            f"resume: a step saw {progress['samples_per_step']} samples in this run and would now see {per_step}; keep "
            "train.batch_size x train.gradient_accumulation_steps x processes the same"
        )
    then, now = progress["data"], feed.identity()
    if then != now and aloud:
        logger.warning("resume: the data are others: %s, now %s; going on with them in a new order", then, now)
    feed.resume(progress, progress["step"] * per_step, same=then == now)
    return progress["step"], progress.get("held_out_loss")
