"""Train the built-in model's network by AdamW with every prediction and every loss, for the same small budget, and tell
how many of their samples are recognised, as a Markdown table.

    python tests/benchmarks/objectives.py [--steps 1000] [--samples 500] [--jobs 1] [--timesteps uniform]
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from cond_diffusion.objective import Loss, TimestepDensity
from cond_diffusion.prediction import PredictionKind

ROOT = Path(__file__).parent.parent.parent


def python(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}\n{result.stderr[-2000:]}")
    return result.stdout


def measure(prediction: str, loss: str, timesteps: str, folder: str, steps: int, samples: int) -> str:
    """Train one network, draw from it, and return the share that the classifier recognises."""
    run_dir = f"{folder}/{prediction}-{loss}"
    python(
        *["train.py", f"run_dir={run_dir}", f"objective.prediction={prediction}", f"objective.loss={loss}"],
        *[f"objective.timesteps={timesteps}", "train.optimizer=adamw", "train.batch_size=128"],
        *[f"train.max_steps={steps}", "train.checkpoint_every=0", f"train.sample_every={steps}"],
    )
    report = python(
        *["-m", "cond_diffusion.evaluation", "--checkpoint", run_dir, "--samples", str(samples)],
        *["--sampler", "dpm_solver", "--steps", "50", "--output", f"{run_dir}/evaluation"],
    )
    (share,) = re.findall(r"prompt accuracy, classifier +([\d.]+%)", report)
    print(f"{prediction} {loss} {share}", file=sys.stderr, flush=True)
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--predictions", nargs="+", default=get_args(PredictionKind), help="default: all")
    parser.add_argument("--losses", nargs="+", default=get_args(Loss), help="default: all")
    parser.add_argument("--timesteps", choices=get_args(TimestepDensity), default="uniform")
    parser.add_argument("--folder", help="where to leave the runs (default: nowhere)")
    arguments = parser.parse_args()

    predictions, losses = arguments.predictions, arguments.losses
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = arguments.folder or scratch
        # Trains the classifier, once for all.
        python("-m", "cond_diffusion.evaluation", "--samples", "10", "--steps", "1", "--output", f"{scratch}/warm_up")
        cells = {
            (prediction, loss): pool.submit(
                measure, prediction, loss, arguments.timesteps, folder, arguments.steps, arguments.samples
            )
            for prediction in predictions
            for loss in losses
        }
        print(f"| prediction / loss | {' | '.join(losses)} |")
        print(f"|---|{'---|' * len(losses)}")
        for prediction in predictions:
            print(f"| {prediction} | {' | '.join(cells[prediction, loss].result() for loss in losses)} |")


if __name__ == "__main__":
    main()
