"""What a run shows while it trains: a progress bar, `metrics.jsonl`, a tracker, grids of samples, and a last line."""

import json
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, cast

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.run import Config
from cond_diffusion.errors import Interrupted, UserError, did_you_mean
from cond_diffusion.images import grid, to_bytes, to_model, to_pillow
from cond_diffusion.models.ema import EMA
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.training.validation import ValidationResult

logger = logging.getLogger(__name__)


class Reporter:
    """Counts the steps and tells of them; only the main process shows anything."""

    def __init__(
        self, config: Config, run_dir: Path, start: int, images_per_step: int, accelerator: Accelerator
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.start = start
        self.accelerator = accelerator
        self.images_per_step = images_per_step
        self.bar: Any = None
        self.metrics = run_dir / "metrics.jsonl"
        if accelerator.is_main_process:
            _drop_metrics_after(self.metrics, start)
        if config.track:
            accelerator.init_trackers(
                "tracked",
                init_kwargs={"tensorboard": {"purge_step": start + 1}},  # forget steps that are done again
            )
        self.last_log = (start, monotonic())

    def announce_snapshots(self, averages: Sequence[EMA]) -> None:
        """Log how much disk the snapshots will take."""
        if count := self.config.train.snapshots:
            size = 4 * sum(weight.numel() for average in averages for weight in average.weights.values())
            logger.info(
                "train.snapshots: %d snapshots will take %.2f GB in %s", count, count * size / 1e9, self.run_dir
            )

    def steps(self) -> Iterator[int]:
        """Count the steps that are left, behind a progress bar."""
        total, quiet = self.config.train.max_steps, not self.accelerator.is_main_process
        with tqdm(total=total, initial=self.start, desc="training", unit=" steps", disable=quiet) as self.bar:
            for step in range(self.start, total):
                yield step
                self.bar.update()

    def log(self, done: int, loss: Float[Tensor, ""], gradient_norm: Any, learning_rate: float) -> None:
        """Every `log_every` steps: average the loss over processes, write a line, show it."""
        if done % self.config.train.log_every and done != self.config.train.max_steps:
            return
        mean_loss = cast(Tensor, self.accelerator.reduce(loss, "mean")).item()
        steps, seconds = done - self.last_log[0], monotonic() - self.last_log[1]
        self.last_log = (done, monotonic())
        images_per_second = steps * self.images_per_step / seconds
        self._write(
            done,
            {
                "images": done * self.images_per_step,
                "loss": mean_loss,
                "gradient_norm": float(gradient_norm),
                "learning_rate": learning_rate,
                "images_per_second": round(images_per_second, 1),
                "memory_gb": round(_memory(self.accelerator.device) / 1e9, 3),
            },
        )
        self.bar.set_postfix({"loss": f"{mean_loss:.4f}", "images/s": f"{images_per_second:.0f}"})

    def log_validation(self, done: int, result: ValidationResult) -> None:
        """Report what the diagnosis has found."""
        by_timestep = {f"held_out_loss_bucket_{i}": loss for i, loss in enumerate(result.by_timestep)}
        over_all = {
            "held_out_loss": result.true_caption,
            "held_out_loss_other_caption": result.other_caption,
            "held_out_loss_no_caption": result.no_caption,
        }
        self._write(done, over_all | by_timestep)
        if self.accelerator.is_main_process:
            logger.info("step %d: %s", done, result.summary())

    def draw(self, done: int, pipe: TextToImage) -> None:
        """Draw the fixed prompts, one a column, always with the same noise, so that the grids show the progress.

        All processes must call this; each draws some of the columns.
        """
        sample, accelerator = self.config.sample, self.accelerator
        prompts, processes = sample.prompts, accelerator.num_processes
        rounds = -(-len(prompts) // processes)  # as many for each, so that they can be gathered; some are drawn twice
        mine = [prompts[(i * processes + accelerator.process_index) % len(prompts)] for i in range(rounds)]
        options = vars(sample.sampling_options(pipe.schedule.num_timesteps))
        batch_size = self.config.train.batch_size
        pixels = to_bytes(pipe(mine, **options, batch_size=batch_size, progress=False, output_type="pt"))
        columns = pixels.unflatten(0, (rounds, sample.num_images)).to(accelerator.device)
        gathered = cast(Tensor, accelerator.gather(columns))  # process by process
        if accelerator.is_main_process:
            by_column = gathered.unflatten(0, (processes, rounds)).transpose(0, 1).flatten(0, 1)[: len(prompts)]
            by_row = by_column.transpose(0, 1).flatten(0, 1).cpu()
            file = self.run_dir / "samples" / f"step-{done:08d}.png"
            try:
                file.parent.mkdir(exist_ok=True)
                grid(to_pillow(to_model(by_row)), columns=len(prompts)).save(file)
            except OSError as error:
                logger.warning("%s cannot be written (%s); training goes on", file, error.strerror)

    def log_summary(self, saved: Path | None) -> Path:
        """Say where the result is, the newest checkpoint, and what to type next; return it.

        Raises UserError where there is none.
        """
        if saved is None:
            raise UserError(f"train: {self.run_dir} has no checkpoint: no step had finite gradients; try a lower rate")
        if self.accelerator.is_main_process:
            prompt = self.config.sample.prompts[0] if self.config.sample.prompts else "a prompt"
            # In a clone beside the other script; a wheel has no scripts.
            sample = "python sample.py" if Path(sys.argv[0]).name == "train.py" else "cond-diffusion-sample"
            logger.info('wrote %s; next: %s "%s" --checkpoint %s', saved, sample, prompt, self.run_dir)
        return saved

    def _write(self, done: int, values: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`, and tell the tracker."""
        if self.config.track:
            self.accelerator.log(values, step=done)
        if self.accelerator.is_main_process:
            # JSON has no word for what is not finite.
            line = {"step": done, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
            try:
                with self.metrics.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                logger.warning("%s cannot be written (%s); training goes on", self.metrics, error.strerror)


def check_tracker(name: str | None) -> None:
    """Raise UserError for a tracker that Accelerate does not know or that is not installed."""
    if name is None:
        return
    known = {str(kind) for kind in LOGGER_TYPE_TO_CLASS}
    if name not in known:
        raise UserError(
            f"track: {name!r} is no tracker{did_you_mean(name, known)}; it is one of {', '.join(sorted(known))}"
        )
    if name not in {str(kind) for kind in get_available_trackers()}:
        raise UserError(f"track: {name} is not installed; type: pip install {name}")


def _memory(device: torch.device) -> int:
    """Return how many bytes of the accelerator were in use at most, or are of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _drop_metrics_after(file: Path, step: int) -> None:
    """Forget the lines of steps that a resumed run does again, and what a full disk or a kill has left of a line."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    aside = file.with_suffix(".part")  # replaced in one go, so that being killed here costs nothing
    try:
        aside.write_text("".join(kept))
        aside.replace(file)
    except OSError as error:
        raise UserError(f"run_dir: {file} cannot be written: {error.strerror}") from error


class Interruption:
    """While its context is open a first signal is only noted; Ctrl-C after it leaves without saving."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None

    def __enter__(self) -> "Interruption":
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Of SIGTERM there may be two: a cluster sends it to every process, and torchrun hands on its own.
        if self.signal is not None and number == signal.SIGINT:
            raise Interrupted("interrupted again: left without saving", number)
        self.signal = self.signal or number

    def requested(self) -> bool:
        """Say whether any process has been signalled; all must ask together."""
        if self.accelerator.num_processes == 1:
            return self.signal is not None
        # They must all leave at the same step.
        mine = torch.tensor([0 if self.signal is None else self.signal], device=self.accelerator.device)
        requested = int(self.accelerator.gather(mine).max())  # type: ignore[union-attr]
        self.signal = self.signal or requested or None
        return self.signal is not None

    def leave(self, done: int, saved: Path | None) -> None:
        """Raise what ends the command.

        saved: the newest checkpoint.
        """
        assert self.signal is not None
        is_here = saved is not None and int(saved.name.removeprefix("step-")) == done
        where = "which is saved" if is_here else f"which is not saved; the newest checkpoint is {saved and saved.name}"
        raise Interrupted(
            f"interrupted at step {done}, {where}; the same command with resume=true goes on from there", self.signal
        )
