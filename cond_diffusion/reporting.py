"""What a run shows while it trains: a progress bar, `metrics.jsonl`, grids of samples, and a last line."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, cast

from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.checkpoint import checkpoints
from cond_diffusion.config import Config
from cond_diffusion.pictures import grid
from cond_diffusion.pipeline import TextToImage


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
        self.last_log = (start, monotonic())

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
        if not self.accelerator.is_main_process:
            return
        steps, seconds = done - self.last_log[0], monotonic() - self.last_log[1]
        self.last_log = (done, monotonic())
        line = {
            "step": done,
            "images": done * self.images_per_step,
            "loss": _or_none(mean_loss),
            "gradient_norm": _or_none(float(gradient_norm)),
            "learning_rate": learning_rate,
            "images_per_second": round(steps * self.images_per_step / seconds, 1),
        }
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.bar.set_postfix(loss=f"{mean_loss:.4f}", **{"images/s": f"{line['images_per_second']:.0f}"})

    def draw(self, done: int, pipe: TextToImage) -> None:
        """Draw the fixed prompts, one a column, always with the same noise, so that the grids show the progress."""
        sample = self.config.sample
        images = pipe(
            sample.prompts,
            num_images=sample.num_images,
            guidance_scale=sample.guidance_scale,
            steps=min(sample.steps, pipe.schedule.num_timesteps),
            progress=False,
        )
        by_row = [image for i in range(sample.num_images) for image in images[i :: sample.num_images]]
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        grid(by_row, columns=len(sample.prompts)).save(folder / f"step-{done:08d}.png")

    def last_words(self) -> Path:
        """Say where the result is and what to type next."""
        newest = checkpoints(self.run_dir)[-1]  # the last step has written it
        if self.accelerator.is_main_process:
            prompt = self.config.sample.prompts[0] if self.config.sample.prompts else "a prompt"
            print(f'wrote {newest}; next: python sample.py "{prompt}" --checkpoint {self.run_dir}')
        return newest


def _or_none(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None


def _drop_metrics_after(file: Path, step: int) -> None:
    """Forget the lines of steps that a resumed run does again."""
    if file.exists():
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        aside = file.with_suffix(".part")  # replaced in one go, so that being killed here costs nothing
        aside.write_text("".join(kept))
        aside.replace(file)
