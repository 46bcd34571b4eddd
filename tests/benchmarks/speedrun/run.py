"""Time a training from its launch to the first checkpoint that passes the bar of the speedrun, and print a record.

    python tests/benchmarks/speedrun/run.py configs/mnist_fast.yaml [key=value ...] [--seeds 0 1 2]

The config's data decide the track: digits or emoji. The rules are in README.md beside this script.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from cond_diffusion.cli.main import command_line
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.device import cores_of_this_process
from cond_diffusion.evaluation.emoji import SOURCE, Emoji, EmojiJudge, generate, recognized
from cond_diffusion.evaluation.evaluator import load_evaluator
from cond_diffusion.evaluation.metrics import digest
from cond_diffusion.pipeline.text_to_image import TextToImage

ROOT = Path(__file__).parent.parent.parent.parent
SAMPLES = 1000


class Result(NamedTuple):
    """A checkpoint: seconds from the launch of its training, its measures by name, and whether it passes the bar."""

    seconds: float
    measures: dict[str, str]
    qualifies: bool


class Digits:
    """99% of the samples are recognized, and their Fréchet distance is at most 3 times that of real images."""

    judge_name = "classifier a1516e26aa90c2d4"
    sampling = SamplingOptions(sampler="dpm_solver", steps=20, guidance_scale=1.5)
    min_accuracy, max_distance_ratio = 0.99, 3.0

    def __init__(self, config: Config, samples: int) -> None:
        self.evaluator = load_evaluator(TextToImage.from_pretrained().to_accelerator(), config)
        self.samples = samples
        self.max_distance = self.max_distance_ratio * self.evaluator.real_baseline(samples)
        if self.evaluator.judge_name != self.judge_name:
            sys.exit(f"judged by {self.evaluator.judge_name}; expected {self.judge_name}")

    def measure(self, pipe: TextToImage) -> tuple[dict[str, str], bool]:
        judged = self.evaluator.generate(pipe, self.evaluator.prompts(self.samples), self.samples, self.sampling)
        accuracy, distance = judged.accuracy, self.evaluator.distance(judged)
        measures = {"accuracy": f"{accuracy:.1%}", "Fréchet distance": f"{distance:.2f}"}
        return measures, accuracy >= self.min_accuracy and distance <= self.max_distance


class HeldOutEmoji:
    """Of half of the held-out pairs of concept and style, the concept is among the judge's first five."""

    judge_name = "emoji judge a2e2c03da96a05e7"
    sampling = SamplingOptions(
        sampler="dpm_solver", steps=20, guidance_scale=5.0, phrase_guidance=0.6, first_phrase_from=800
    )
    min_top_5 = 0.5

    def __init__(self, samples: int) -> None:
        self.judge, self.emoji = EmojiJudge.load(), Emoji()
        self.real = self.emoji.subset("held-out pairs", samples)
        if (name := f"emoji judge {digest(self.judge)}") != self.judge_name:
            sys.exit(f"judged by {name}; expected {self.judge_name}")

    def measure(self, pipe: TextToImage) -> tuple[dict[str, str], bool]:
        measured = recognized(self.judge, self.emoji, generate(pipe, self.real, self.sampling))
        return {name: f"{value:.1%}" for name, value in measured.items()}, measured["concept, top 5"] >= self.min_top_5


def timed_checkpoints(config: Path, run_dir: Path, overrides: list[str]) -> list[tuple[float, Path]]:
    """Train in a new process, and return each checkpoint with the seconds from the launch until it was complete."""
    accelerate = str(Path(sys.executable).parent / "accelerate")
    command = [accelerate, "launch", "train.py", "--config", str(config.resolve()), f"run_dir={run_dir}"]
    start = time.time()
    subprocess.run([*command, "train.keep_checkpoints=100", *overrides], cwd=ROOT, check=True, stdout=sys.stderr)
    # A folder gets its final name, and with it the time of its last change, after everything in it is written.
    return [(path.stat().st_ctime - start, path) for path in sorted((run_dir / "checkpoints").glob("step-*"))]


def judge(track: Digits | HeldOutEmoji, checkpoints: list[tuple[float, Path]]) -> Iterator[Result]:
    """Sample from each checkpoint with the text prompts, and measure the samples."""
    for seconds, checkpoint in checkpoints:
        result = Result(seconds, *track.measure(TextToImage.from_pretrained(checkpoint).to_accelerator()))
        print(f"{seconds:.0f} s, {checkpoint.name}: {result.measures}", file=sys.stderr)
        yield result


def first_qualified(results: Iterable[Result]) -> Result | None:
    """Return the first result that passes the bar, or None; later results are not computed."""
    return next((result for result in results if result.qualifies), None)


def record(results: dict[int, Result], hardware: str, commit: str) -> str:
    """Return a table of one record: the run with the median time, and the times of all seeds."""
    median = statistics.median_low(result.seconds for result in results.values())
    measures = next(result.measures for result in results.values() if result.seconds == median)
    seeds = ", ".join(f"{seed} ({result.seconds:.0f} s)" for seed, result in results.items())
    row = {"hardware": hardware, "commit": commit, "seconds": f"{median:.0f}", **measures, "seeds": seeds}
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (row, ["---"] * len(row), row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="fewer than %(default)s is not a record")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()

    config = load_config(Config, arguments.config, arguments.overrides)
    track = HeldOutEmoji(arguments.samples) if config.data.source == SOURCE else Digits(config, arguments.samples)
    qualified: dict[int, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            overrides = [*arguments.overrides, f"seed={seed}"]
            checkpoints = timed_checkpoints(arguments.config, Path(folder, str(seed)), overrides)
            if (result := first_qualified(judge(track, checkpoints))) is None:
                sys.exit(f"seed {seed}: no checkpoint qualifies")
            qualified[seed] = result
    name = f"{torch.cuda.device_count()} GPU" if torch.cuda.is_available() else f"{cores_of_this_process()} CPU cores"
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    print(record(qualified, name, commit))


if __name__ == "__main__":
    sys.exit(command_line(main))
