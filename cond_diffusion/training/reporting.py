"""Progress of a training run, and its interruption.

`Reporter` shows a progress bar and writes `metrics.jsonl`, an experiment tracker, sample grids and a final summary.
`Interruption` turns signals into a request to save and stop after the current step, on all processes.
"""

import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from einops import rearrange
from jaxtyping import Float, UInt8
from psutil import Process
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.run import Config
from cond_diffusion.errors import Interrupted, UserError, did_you_mean, first_line, user_errors
from cond_diffusion.files import write_file
from cond_diffusion.images import encode, grid, to_bytes, to_model, to_pillow
from cond_diffusion.models.ema import EMA
from cond_diffusion.pipeline.run_folder import METRICS_NAME, read_metrics, step_of
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.training.validation import ValidationResult

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

logger = logging.getLogger(__name__)


class Reporter:
    """Counts the steps of a run, of which `start` are completed, and reports metrics; output comes from the main
    process only."""

    def __init__(self, config: Config, start: int, images_per_step: int, accelerator: Accelerator) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.start = start
        self.accelerator = accelerator
        self.images_per_step = images_per_step
        self.progress_bar: Any = None
        self.metrics = self.run_dir / METRICS_NAME
        if accelerator.is_main_process:
            _drop_metrics_after(self.metrics, start)
        if config.track:
            # Removes the events of steps that are repeated.
            with user_errors(f"track: {config.track} cannot be started", Exception):  # of a kind for each tracker
                accelerator.init_trackers("tracked", init_kwargs={"tensorboard": {"purge_step": start + 1}})
        self.last_log = (start, perf_counter())

    def log_snapshot_size(self, averages: Sequence[EMA]) -> None:
        """Log the disk space of all snapshots."""
        if count := self.config.train.snapshots:
            size = 4 * sum(weight.numel() for average in averages for weight in average.weights.values())
            logger.info("train.snapshots: %d snapshots need %.2f GB in %s", count, count * size / 1e9, self.run_dir)

    def steps(self, description: str = "training") -> Iterator[int]:
        """Yield the remaining step numbers, counted from 0, and update the progress bar."""
        total, disable = self.config.train.max_steps, not self.accelerator.is_main_process
        position: dict[str, Any] = {"total": total, "initial": self.start}
        with tqdm(**position, desc=description, unit=" steps", disable=disable, file=_StandardError()) as bar:
            self.progress_bar = bar
            for step in range(self.start, total):
                yield step
                bar.update()

    def log(self, step: int, loss: Float[Tensor, ""], gradient_norm: Any, learning_rate: float) -> None:
        """Log metrics after `step` completed steps, every `log_every` steps; the loss is averaged over processes."""
        if step % self.config.train.log_every and step != self.config.train.max_steps:
            return
        mean_loss = cast(Tensor, self.accelerator.reduce(loss, "mean")).item()
        steps, seconds = step - self.last_log[0], perf_counter() - self.last_log[1]
        self.last_log = (step, perf_counter())
        images_per_second = steps * self.images_per_step / seconds
        device = self.accelerator.device  # its peak memory, or the current one of the process
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else Process().memory_info().rss
        metrics = {
            "images": step * self.images_per_step,
            "loss": mean_loss,
            "gradient_norm": float(gradient_norm),
            "learning_rate": learning_rate,
            "images_per_second": round(images_per_second, 1),
            "memory_gb": round(memory / 1e9, 3),
        }
        self._write(step, metrics)
        self.progress_bar.set_postfix({"loss": f"{mean_loss:.4f}", "images/s": f"{images_per_second:.0f}"})

    def log_validation(self, step: int, result: ValidationResult) -> None:
        """Log the held-out losses after `step` completed steps."""
        means = {
            "held_out_loss": result.true_caption,
            "held_out_loss_other_caption": result.other_caption,
            "held_out_loss_no_caption": result.no_caption,
        }
        self._write(step, means | {f"held_out_loss_bucket_{i}": loss for i, loss in enumerate(result.by_timestep)})
        if self.accelerator.is_main_process:
            logger.info("step %d: %s", step, result.summary())

    def sample(self, pipe: TextToImage) -> UInt8[Tensor, "columns rows c h w"]:
        """Sample the columns of the grid that this process computes, with the same noise each time."""
        sample, accelerator = self.config.sample, self.accelerator
        prompts, processes = sample.prompts, accelerator.num_processes
        # The same number of columns on each process, as gather() requires; some prompts are sampled twice.
        columns = -(-len(prompts) // processes)
        local = [prompts[(i * processes + accelerator.process_index) % len(prompts)] for i in range(columns)]
        pixels = pipe(
            local,
            num_images=sample.num_images,
            steps=min(sample.steps, pipe.schedule.num_timesteps),
            batch_size=self.config.train.batch_size,
            output_type="pt",
            progress=False,
        )
        return to_bytes(pixels).unflatten(0, (columns, sample.num_images)).to(accelerator.device)

    def log_samples(self, step: int, pixels: UInt8[Tensor, "columns rows c h w"]) -> None:
        """Save a grid of samples, one column per prompt; all processes must call this with their columns."""
        prompts, accelerator = self.config.sample.prompts, self.accelerator
        processes = accelerator.num_processes
        gathered = cast(Tensor, accelerator.gather(pixels))  # ordered by process
        if accelerator.is_main_process:
            rows = rearrange(gathered, "(process column) row ... -> row (column process) ...", process=processes)
            images = rows[:, : len(prompts)].flatten(0, 1).cpu()
            file = self.run_dir / "samples" / f"step-{step:08d}.png"
            try:
                file.parent.mkdir(exist_ok=True)
                write_file(file, encode(grid(to_pillow(to_model(images)), columns=len(prompts))))
            except OSError as error:
                logger.warning("%s cannot be written (%s); continuing without it", file, error.strerror)

    def log_summary(self, checkpoint: Path | None) -> Path:
        """Log the newest checkpoint and the command that samples from it; return the checkpoint."""
        if checkpoint is None:
            raise UserError(
                f"train.learning_rate: {self.run_dir} has no checkpoint, because no step had finite gradients; lower it"
            )
        if self.accelerator.is_main_process:
            prompt = self.config.sample.prompts[0] if self.config.sample.prompts else "a prompt"
            # A clone has sample.py beside train.py; a wheel installs the command.
            command = ["python", "sample.py"] if Path(sys.argv[0]).name == "train.py" else ["cond-diffusion-sample"]
            quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
            command += [prompt, "--checkpoint", str(self.run_dir)]
            logger.info("saved %s; sample from it with: %s", checkpoint, quote(command))
        return checkpoint

    def _write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl` and log the values to the tracker."""
        self._track(lambda: self.accelerator.log(values, step=step))
        if self.accelerator.is_main_process:
            # JSON has no infinity and no NaN.
            line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
            try:
                with self.metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                logger.warning("%s cannot be written (%s); continuing without it", self.metrics, error.strerror)

    def end(self) -> None:
        """Close experiment trackers and, on GPUs, the process group."""
        for tracker in self.accelerator.trackers:
            self._track(tracker.finish)
        self.accelerator.trackers = []
        # Gloo's process group ends with the process. Closing it here can deadlock: the caller holds Python's GIL and
        # waits for gloo's threads, one of which may need the GIL to release the last tensor.
        if self.accelerator.device.type != "cpu":
            self.accelerator.end_training()

    def _track(self, action: Callable[[], None]) -> None:
        """Call a method of the trackers; stop tracking if it fails, for example because the disk is full."""
        try:
            action()
        except Exception as error:  # of a kind for each tracker
            logger.warning("track: %s (%s); continuing without it", self.config.track, first_line(error))
            self.accelerator.trackers = []


class _StandardError:
    """`sys.stderr`, whose errors are ignored: a run goes on if its log is on a full disk or its reader has ended."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def __eq__(self, other: object) -> bool:  # tqdm asks, to write messages above the progress bar
        return other is sys.stderr

    __hash__ = object.__hash__


def check_tracker(name: str | None) -> None:
    """Raise UserError if Accelerate does not support the tracker, or it is not installed."""
    if name is None:
        return
    known = {str(tracker) for tracker in LOGGER_TYPE_TO_CLASS}
    if name not in known:
        expected = ", ".join(sorted(known))
        raise UserError(f"track: {name!r} is not a tracker{did_you_mean(name, known)}; expected one of {expected}")
    if name not in {str(tracker) for tracker in get_available_trackers()}:
        raise UserError(f"track: {name} is not installed; run: pip install {name}")


def _drop_metrics_after(file: Path, step: int) -> None:
    """Remove the lines of steps that a resumed run repeats, and lines that are not metrics."""
    if not file.exists():
        return
    lines = [json.dumps(values) + "\n" for values in read_metrics(file) if values["step"] <= step]
    with user_errors(f"run_dir: {file} cannot be written", OSError):
        write_file(file, "".join(lines))


class Interruption:
    """Context manager in which signals only request a stop: SIGINT, SIGTERM and SIGHUP, unless they are ignored.

    A SIGINT after that stops without saving.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None

    def __enter__(self) -> "Interruption":
        self.handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in the main thread only
            numbers = [signal.Signals[name] for name in SIGNALS if hasattr(signal, name)]
            heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup: no SIGHUP
            self.handlers = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # SIGTERM may arrive twice: a cluster sends it to every process, and torchrun forwards its own.
        if self.signal is not None and number == signal.SIGINT:
            raise Interrupted("interrupted twice: stopped without saving", number)
        self.signal = self.signal or number

    def requested(self) -> bool:
        """Return whether any process has received a signal; all processes must call this together."""
        if self.accelerator.num_processes == 1:
            return self.signal is not None
        # All processes must stop at the same step.
        local = torch.tensor([self.signal or 0], device=self.accelerator.device)
        received = int(self.accelerator.gather(local).max())  # type: ignore[union-attr]
        self.signal = self.signal or received or None
        return self.signal is not None

    def raise_interrupted(self, step: int, newest: Path | None) -> None:
        """Raise `Interrupted` after `step` completed steps; `newest` is the newest checkpoint."""
        assert self.signal is not None
        if newest is not None and step_of(newest) == step:
            status = f"saved as {newest.name}"
        else:
            status = f"not saved; newest checkpoint: {newest.name if newest else 'none'}"
        message = f"interrupted at step {step} ({status}); the same command with resume=true continues the run"
        raise Interrupted(message, self.signal)
