"""Train the built-in model's UNet with AdamW for every prediction and loss, with the same small budget, and print the
prompt accuracy of their samples as a Markdown table.

    python tests/benchmarks/objectives.py [--steps 1000] [--samples 500] [--jobs 1] [--timesteps uniform]
"""

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from cond_diffusion.config.run import Loss, PredictionKind, TimestepDensity
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.evaluation.evaluator import Evaluator, load_evaluator
from cond_diffusion.pipeline.checkpoint import open_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage

ROOT = Path(__file__).parent.parent.parent


def train(prediction: str, loss: str, timesteps: str, folder: str, steps: int) -> str:
    """Train one model and return its run folder."""
    run_dir = f"{folder}/{prediction}-{loss}"
    command = [
        *["train.py", f"run_dir={run_dir}", f"objective.prediction={prediction}", f"objective.loss={loss}"],
        *[f"objective.timesteps={timesteps}", "train.optimizer=adamw", "train.batch_size=128"],
        *[f"train.max_steps={steps}", "train.checkpoint_every=0", "train.sample_every=0"],
    ]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-2000:]}")
    return run_dir


def share(evaluator: Evaluator, run_dir: str, samples: int) -> str:
    """Return the prompt accuracy of a run's samples."""
    pipe = TextToImage.from_pretrained(run_dir).to_accelerator()
    generated = evaluator.generate(
        pipe, evaluator.prompts(samples), samples, SamplingOptions(sampler="dpm_solver", steps=50)
    )
    return f"{generated.accuracy:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs")
    parser.add_argument("--predictions", nargs="+", default=get_args(PredictionKind), help="default: all")
    parser.add_argument("--losses", nargs="+", default=get_args(Loss), help="default: all")
    parser.add_argument("--timesteps", choices=get_args(TimestepDensity), default="uniform")
    parser.add_argument("--folder", help="folder to keep the runs in (default: a temporary folder)")
    arguments = parser.parse_args()

    predictions, losses = arguments.predictions, arguments.losses
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = str(Path(arguments.folder or scratch).resolve())  # the runs have another working directory
        built_in = TextToImage.from_pretrained()
        evaluator = load_evaluator(built_in, open_checkpoint("builtin").run_config)
        runs = {
            (prediction, loss): pool.submit(train, prediction, loss, arguments.timesteps, folder, arguments.steps)
            for prediction in predictions
            for loss in losses
        }
        print(f"Prompt accuracy by {evaluator.judge_name}.\n")
        print(f"| prediction / loss | {' | '.join(losses)} |")
        print(f"|---|{'---|' * len(losses)}")
        for prediction in predictions:
            shares = [share(evaluator, runs[prediction, loss].result(), arguments.samples) for loss in losses]
            print(f"| {prediction} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
