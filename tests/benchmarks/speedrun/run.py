"""Time a training from its launch to the first checkpoint that passes the bar of the speedrun, and print a record.

    python tests/benchmarks/speedrun/run.py configs/mnist_fast.yaml [key=value ...] [--seeds 0 1 2]

The rules are in README.md beside this script.
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

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.device import cores_of_this_process
from cond_diffusion.evaluation.evaluator import Evaluator, load_evaluator
from cond_diffusion.pipeline.text_to_image import TextToImage

ROOT = Path(__file__).parent.parent.parent.parent
JUDGE = "classifier a1516e26aa90c2d4"
SAMPLES, SAMPLING = 1000, SamplingOptions(sampler="dpm_solver", steps=20, guidance_scale=1.5)
MIN_ACCURACY, MAX_DISTANCE_RATIO = 0.99, 3.0  # the distance is relative to that of equally many real images


class Result(NamedTuple):
    """A checkpoint: seconds from the launch of its training, prompt accuracy, and Fréchet distance."""

    seconds: float
    accuracy: float
    distance: float


def timed_checkpoints(config: Path, run_dir: Path, overrides: list[str]) -> list[tuple[float, Path]]:
    """Train in a new process, and return each checkpoint with the seconds from the launch until it was complete."""
    accelerate = str(Path(sys.executable).parent / "accelerate")
    command = [accelerate, "launch", "train.py", "--config", str(config.resolve()), f"run_dir={run_dir}"]
    start = time.time()
    subprocess.run([*command, "train.keep_checkpoints=100", *overrides], cwd=ROOT, check=True, stdout=sys.stderr)
    # A folder gets its final name, and with it the time of its last change, after everything in it is written.
    return [(path.stat().st_ctime - start, path) for path in sorted((run_dir / "checkpoints").glob("step-*"))]


def judge(evaluator: Evaluator, checkpoints: list[tuple[float, Path]], samples: int) -> Iterator[Result]:
    """Sample from each checkpoint with the text prompts, and measure the samples."""
    prompts = evaluator.prompts(samples)
    for seconds, checkpoint in checkpoints:
        pipe = TextToImage.from_pretrained(checkpoint).to_accelerator()
        judged = evaluator.generate(pipe, prompts, samples, SAMPLING)
        yield Result(seconds, judged.accuracy, evaluator.distance(judged))


def first_qualified(results: Iterable[Result], max_distance: float) -> Result | None:
    """Return the first result that passes the bar, or None; later results are not computed."""
    return next((r for r in results if r.accuracy >= MIN_ACCURACY and r.distance <= max_distance), None)


def record(results: dict[int, Result], hardware: str, commit: str) -> str:
    """Return the row of the table of records: the run with the median time, and all seeds."""
    median = statistics.median_low(result.seconds for result in results.values())
    _, accuracy, distance = next(result for result in results.values() if result.seconds == median)
    seeds = ", ".join(f"{seed} ({result.seconds:.0f} s)" for seed, result in results.items())
    return f"| {hardware} | {commit} | {median:.0f} | {accuracy:.1%} | {distance:.2f} | {seeds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="fewer than %(default)s is not a record")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()

    evaluator = load_evaluator(TextToImage.from_pretrained().to_accelerator(), load_config(Config, arguments.config))
    if evaluator.judge_name != JUDGE:
        sys.exit(f"{arguments.config}: judged by {evaluator.judge_name}; expected {JUDGE}")
    max_distance = MAX_DISTANCE_RATIO * evaluator.real_baseline(arguments.samples)
    print(f"bar: {MIN_ACCURACY:.0%} recognized, Fréchet distance at most {max_distance:.2f}", file=sys.stderr)
    qualified: dict[int, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            overrides = [*arguments.overrides, f"seed={seed}"]
            checkpoints = timed_checkpoints(arguments.config, Path(folder, str(seed)), overrides)
            if (result := first_qualified(judge(evaluator, checkpoints, arguments.samples), max_distance)) is None:
                sys.exit(f"seed {seed}: no checkpoint qualifies")
            qualified[seed] = result
    name = f"{torch.cuda.device_count()} GPU" if torch.cuda.is_available() else f"{cores_of_this_process()} CPU cores"
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    print("| hardware | commit | seconds | accuracy | Fréchet distance | seeds |\n|---|---|---|---|---|---|")
    print(record(qualified, name, commit))


if __name__ == "__main__":
    main()
