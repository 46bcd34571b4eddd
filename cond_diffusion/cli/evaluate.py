"""How good a checkpoint is: `python -m cond_diffusion.cli.evaluate`.

It draws samples of the checkpoint's own captions and puts them, and as many real pictures, beside the real test
pictures. What real pictures get is what can be hoped for: a classifier is not always right, and the Fréchet distance of
a thousand pictures is not 0. Table, numbers (`evaluation.json`), pictures and plots go into a folder; what is there
already is not done again.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import checkpoint_config
from cond_diffusion.diffusion.guidance import scale_of_each
from cond_diffusion.diffusion.sampler_config import SamplerConfig, SamplerName
from cond_diffusion.errors import UserError, command_line, first_line
from cond_diffusion.evaluation.evaluator import Judging, Sampling, spread
from cond_diffusion.evaluation.report import plot_guidance_scales, plot_steps
from cond_diffusion.images import grid, to_model, to_pillow
from cond_diffusion.models.clip import ClipJudge
from cond_diffusion.pipeline.pretrained import read_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SAMPLERS, STEPS = get_args(SamplerName), (5, 10, 20, 50)
LEAST_SAMPLES = 10  # fewer say nothing


class Results:
    """`evaluation.json` in a folder: what was measured, kept after each part; what is in it is not done again."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.file = folder / "evaluation.json"
        self.parts: dict[str, Any] = {"settings": settings}
        if self.file.is_file():
            try:
                self.parts = json.loads(self.file.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{self.file} is damaged or was cut short: {first_line(error)}") from error
            if not isinstance(self.parts, dict) or self.parts.get("settings") != settings:
                raise UserError(f"--output: {folder} holds another evaluation; give another name")
            return
        if folder.exists():
            raise UserError(f"--output: {folder} exists and holds no evaluation; give another name")
        try:
            folder.mkdir(parents=True)
            self._write()
        except OSError as error:
            raise UserError(f"--output: {folder} cannot be written: {error.strerror}") from error

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part; make it and write it if it is not there."""
        if name not in self.parts:
            self.parts[name] = make()
            self._write()
        return self.parts[name]

    def _write(self) -> None:
        aside = self.file.with_suffix(".part")
        aside.write_text(json.dumps(self.parts, indent=2, ensure_ascii=False) + "\n")
        aside.replace(self.file)


def evaluate(judging: Judging, results: Results, samples: int, sampling: Sampling, *, paraphrases: bool) -> str:
    """Draw, measure and write; return the table."""

    def everything() -> dict[str, Any]:
        prompts = judging.prompts(samples, paraphrases=paraphrases)
        start = time.perf_counter()
        drawn = judging.draw(prompts, samples, sampling)
        seconds = time.perf_counter() - start
        some = to_model(drawn.images[spread(len(drawn), 100)])
        grid(to_pillow(some), 10).save(results.folder / "samples.png")
        judging.nearest_pictures(drawn).save(results.folder / "nearest.png")
        shares = judging.recognised(drawn).reshape(len(prompts), -1).float().mean(1).tolist()
        return {
            "count": len(drawn),
            "judge": judging.judge,
            "seconds per picture": seconds / len(drawn),
            "measures": judging.measure(drawn),
            "prompt accuracy by prompt": dict(zip([prompt for prompt, _ in prompts], shares, strict=True)),
        }

    found = results.part("samples", everything)
    held_out = results.part("held-out loss", judging.held_out_loss)
    lines = [f"{prompt:60}{share:10.1%}" for prompt, share in list(found["prompt accuracy by prompt"].items())[:100]]
    title = f"{found['count']} samples, by {found['judge']}"
    lines += ["", f"{title:60}{'samples':>10}{'real':>10}"]
    for name, values in found["measures"].items():
        shape = "10.2%" if "accuracy" in name else "10.3f"
        lines.append(f"{name:60}{values['samples']:{shape}}{values['real']:{shape}}")
    if held_out is not None:
        lines += ["", f"held-out loss {held_out['true_caption']:.4f}; from the first eighth of the chain to the last:"]
        lines.append("  ".join(f"{loss:.4f}" for loss in held_out["by_timestep"]))
    return "\n".join(lines)


def sweep(judging: Judging, results: Results, samples: int, sampling: Sampling, *, paraphrases: bool) -> None:
    """Measure accuracy and distance over guidance scales, and over steps for each sampler; plot both."""
    prompts = judging.prompts(samples, paraphrases=paraphrases)

    def point(sampling: Sampling) -> dict[str, Any]:
        accuracy, distance = judging.accuracy_and_distance(judging.draw(prompts, samples, sampling))
        return {**asdict(sampling), "prompt accuracy": accuracy, "Fréchet distance": distance}

    floor = results.part("floor of the sweep", lambda: judging.floor(len(prompts) * (samples // len(prompts))))
    scales = [
        results.part(f"guidance scale {scale}", lambda scale=scale: point(replace(sampling, guidance_scale=scale)))
        for scale in SCALES
    ]
    plot_guidance_scales(scales, floor, results.folder / "guidance_scale.png")
    longest = judging.pipe.schedule.num_timesteps
    steps = [
        results.part(f"{name}, {n} steps", lambda name=name, n=n: point(replace(sampling, sampler=name, steps=n)))
        for name in SAMPLERS
        for n in STEPS
        if n <= longest
    ]
    plot_steps(steps, floor, results.folder / "steps.png")


def whole_clip(source: str, data: DataConfig) -> ClipJudge:
    """Return the CLIP that --features names; raise UserError if it cannot see the data's pictures."""
    clip = ClipJudge.from_pretrained(source)
    if clip is None or not clip.reads(data.channels, data.resolution):
        raise UserError(
            f"--features: {source} sees no pictures of {data.resolution} x {data.resolution} pixels in {data.channels} "
            "channels; expected a whole CLIP that does"
        )
    return clip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint's samples beside real pictures.")
    parser.add_argument(
        "--checkpoint", default="builtin", help="a run folder, a checkpoint folder or a hub id (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=1000, help="how many pictures to draw (default: %(default)s)")
    parser.add_argument("--paraphrases", action="store_true", help="use all captions but the first of each group")
    parser.add_argument("--guidance-scale", type=float, default=Sampling.guidance_scale, help="(default: %(default)s)")
    parser.add_argument("--sampler", default=Sampling.sampler, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=Sampling.steps, help="timesteps to visit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of each prompt's first picture (default: %(default)s)")
    parser.add_argument("--features", metavar="CLIP", help="a CLIP's folder or hub id: what distances are measured in")
    parser.add_argument("--sweep", action="store_true", help="also over guidance scales, and over samplers and steps")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="a folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.samples < LEAST_SAMPLES:
        raise UserError(f"--samples: {arguments.samples} say nothing; expected at least {LEAST_SAMPLES}")

    for package in ("torchmetrics", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'evaluation needs {package}; install it: pip install "cond_diffusion[eval]"')
    sampling = Sampling(arguments.sampler, arguments.steps, arguments.guidance_scale, arguments.seed)
    pipe, config = read_checkpoint(
        arguments.checkpoint, lambda folder: (TextToImage.from_pretrained(folder), checkpoint_config(folder))
    )
    pipe.to_accelerator()
    SamplerConfig(arguments.sampler).timesteps(pipe.schedule, arguments.steps)
    scale_of_each(arguments.guidance_scale, 1)
    settings = {
        # Of a run the checkpoint that it is now: the run may go on.
        "checkpoint": str(pipe.folder) if Path(arguments.checkpoint).is_dir() else arguments.checkpoint,
        **{name: getattr(arguments, name) for name in ("samples", "paraphrases", "features")},
        **asdict(sampling),
    }
    features = None if arguments.features is None else whole_clip(arguments.features, config.data)
    results = Results(arguments.output, settings)
    judging = Judging(pipe, config, features)
    print(evaluate(judging, results, arguments.samples, sampling, paraphrases=arguments.paraphrases))
    if arguments.sweep:
        sweep(judging, results, arguments.samples, sampling, paraphrases=arguments.paraphrases)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(command_line(main))
