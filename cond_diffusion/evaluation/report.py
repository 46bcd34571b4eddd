"""The evaluation report: a folder with evaluation.json, image grids, and plots."""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from jaxtyping import UInt8
from torch import Tensor

from cond_diffusion.config.sampling import REPORTED_OPTIONS, SamplerName, SamplingOptions
from cond_diffusion.config.schema import read_json
from cond_diffusion.errors import Interrupted, UserError, printable, user_errors
from cond_diffusion.evaluation.evaluator import Evaluator, Judged, spread
from cond_diffusion.files import write_file
from cond_diffusion.images import encode, grid, to_model, to_pillow
from cond_diffusion.pipeline.run_folder import LOCK_NAME, RunLock

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SAMPLERS, STEPS = get_args(SamplerName), (5, 10, 20, 50)

Generate = Callable[[SamplingOptions], Judged]
Point = dict[str, Any]
"""The `REPORTED_OPTIONS`, "prompt accuracy" and "Fréchet distance" of one point of a sweep."""


class Results:
    """The parts of `evaluation.json`; the file is written after each part, so an interrupted evaluation can be resumed.
    The folder must be new, or contain an evaluation with the same settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.file = folder / "evaluation.json"
        self.parts: dict[str, Any] = {"settings": settings}
        self.lock = RunLock(folder, "output", "evaluation")
        with user_errors(f"output: {folder} cannot be written", OSError, ValueError):
            is_free = folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK_NAME}
            if folder.exists() and not (is_free or self.file.is_file()):
                raise UserError(f"output: {folder} exists and is not an evaluation folder; choose another path")
            folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            try:
                if self.file.is_file():
                    self._continue(read_json(self.file))
                self._write()  # fails before the first image is generated if the folder cannot be written
            except (UserError, OSError):
                self.__exit__()
                (folder / LOCK_NAME).unlink(missing_ok=True)
                raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.__exit__()

    def _continue(self, stored: dict[str, Any]) -> None:
        """Take over the parts of an earlier evaluation with the same settings."""
        if stored.get("settings") == self.parts["settings"]:
            self.parts = stored
        elif stored.keys() != {"settings"}:  # without results there is nothing to lose
            raise UserError(f"output: {self.folder} contains an evaluation with other settings; choose another path")

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the part `name`; compute and write it if it is missing."""
        if name not in self.parts:
            try:
                self.parts[name] = compute()
            except KeyboardInterrupt as interruption:
                finished = ", ".join(part for part in self.parts if part != "settings") or "no results yet"
                message = f"interrupted; {self.folder} has {finished}, and the same command continues from there"
                raise Interrupted(message) from interruption
            self._write()
        return self.parts[name]

    def _write(self) -> None:
        _write(self.file, json.dumps(self.parts, indent=2, ensure_ascii=False) + "\n")


def reported(sampling: SamplingOptions) -> dict[str, Any]:
    """Return the sampling options that the report contains."""
    return {name: getattr(sampling, name) for name in REPORTED_OPTIONS}


def evaluate(
    evaluator: Evaluator, prompts: Sequence[str], generate: Generate, sampling: SamplingOptions, results: Results
) -> dict[str, Any]:
    """Generate and measure samples, equally many of each prompt in their order, and write grids of them and of their
    nearest training images. Returns the part "samples" of `evaluation.json`."""

    def compute() -> dict[str, Any]:
        start = time.perf_counter()
        samples = generate(sampling)
        seconds = time.perf_counter() - start
        images = samples.data.images
        save_grid(images[spread(len(images), 100)], 10, results.folder / "samples.png")
        nearest = evaluator.nearest_images(samples, spread(len(images), 10))
        save_grid(nearest.flatten(0, 1), nearest.shape[1], results.folder / "nearest.png")
        by_prompt: dict[str, list[float]] = {}  # two groups can have the same first caption
        for prompt, share in zip(prompts, samples.recognized.reshape(len(prompts), -1).float().mean(1), strict=True):
            by_prompt.setdefault(prompt, []).append(share.item())
        return {
            "count": len(images),
            "judge": evaluator.judge_name,
            "seconds per image": seconds / len(images),
            "measures": evaluator.measure(samples),
            "prompt accuracy by prompt": {prompt: fmean(shares) for prompt, shares in by_prompt.items()},
        }

    return results.part("samples", compute)


def sweep(
    evaluator: Evaluator, generate: Generate, sampling: SamplingOptions, results: Results, count: int, max_steps: int
) -> None:
    """Measure and plot accuracy and distance by guidance scale, and by number of steps for each sampler, beside the
    distance of `count` real images."""

    def point(name: str, sampling: SamplingOptions) -> Point:
        def compute() -> Point:
            samples = generate(sampling)
            distance = evaluator.distance(samples)
            return {**reported(sampling), "prompt accuracy": samples.accuracy, "Fréchet distance": distance}

        return results.part(name, compute)

    baseline = results.part("floor of the sweep", lambda: evaluator.real_baseline(count))
    scales = [point(f"guidance scale {scale}", replace(sampling, guidance_scale=scale)) for scale in SCALES]
    plot({"": scales}, "guidance_scale", baseline, results.folder / "guidance_scale.png")
    counts = [steps for steps in STEPS if steps <= max_steps]
    lines = {
        name: [point(f"{name}, {steps} steps", replace(sampling, sampler=name, steps=steps)) for steps in counts]
        for name in SAMPLERS
    }
    plot(lines, "steps", baseline, results.folder / "steps.png")


def format_table(samples: dict[str, Any], held_out: dict[str, Any] | None) -> str:
    """Format the accuracy of up to 100 prompts, all metrics, and the held-out loss as text."""
    accuracies = list(samples["prompt accuracy by prompt"].items())[:100]
    lines = [f"{printable(prompt):60}{accuracy:10.1%}" for prompt, accuracy in accuracies]
    title = f"{samples['count']} samples, by {samples['judge']}"
    lines += ["", f"{title:60}{'samples':>10}{'real':>10}"]
    for name, values in samples["measures"].items():
        spec = "10.2%" if "accuracy" in name else "10.3f"
        lines.append(f"{name:60}{values['samples']:{spec}}{values['real']:{spec}}")
    if held_out is not None:
        lines += ["", f"held-out loss {held_out['true_caption']:.4f}; by eighths of the timesteps, from t = 0:"]
        lines.append("  ".join(f"{loss:.4f}" for loss in held_out["by_timestep"]))
    return "\n".join(lines)


def save_grid(images: UInt8[Tensor, "n c h w"], columns: int, file: Path) -> None:
    """Write images, row by row, as one PNG."""
    _write(file, encode(grid(to_pillow(to_model(images)), columns)))


def plot(lines: Mapping[str, Sequence[Point]], option: str, baseline: float, file: Path) -> None:
    """Plot prompt accuracy and Fréchet distance against a sampling option, one line per label, and the baseline, the
    Fréchet distance of real images."""
    from matplotlib.figure import Figure  # in the extra `eval`

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, distance = figure.subplots(1, 2)
    ticks = sorted({point[option] for points in lines.values() for point in points})
    for axes, name, unit in ((accuracy, "prompt accuracy", 0.01), (distance, "Fréchet distance", 1)):
        for label, points in lines.items():
            x, y = [point[option] for point in points], [point[name] / unit for point in points]
            axes.semilogx(x, y, base=2, marker="o", label=label)
        axes.set(xlabel=option.replace("_", " "), ylabel=name if unit == 1 else f"{name}, %")
        axes.set_xticks(ticks, map(str, ticks))
        axes.grid(alpha=0.3)
    distance.axhline(baseline, color="black", linestyle="dotted")
    distance.annotate("real images", (1, baseline), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    distance.set_yscale("log")
    if len(lines) > 1:
        accuracy.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=100)
    _write(file, content.getvalue())


def _write(file: Path, content: bytes | str) -> None:
    hint = "; the same command continues where this one stopped"
    with user_errors(f"output: {file} cannot be written", OSError, hint=hint):
        write_file(file, content)
