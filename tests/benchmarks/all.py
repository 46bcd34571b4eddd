"""Run all benchmarks and print the results and the hardware as Markdown.

    python tests/benchmarks/all.py > benchmarks.md

Each benchmark is also a separate script. On 2 CPU cores all of them take many hours, nearly all of it for the last one;
the others take about 1.5 hours (select them with `--only`).
"""

import argparse
import subprocess
import sys
from pathlib import Path

PARTS = {
    "Networks": ["networks.py"],
    "Where a training step goes": ["step.py"],
    "The whole job": ["peers.py", "--who", "ours"],
    "The whole job, epsilon loss and prediction": ["peers.py", "--who", "ours", "--config", "configs/mnist.yaml"],
    # Fewer samples: the other libraries' networks take minutes for a hundred.
    "The whole job, by the peers": [
        "peers.py",
        "--samples",
        "100",
        "--who",
        "diffusers",
        "denoising-diffusion-pytorch",
    ],
    "Fewer steps": ["chain.py"],
    "What the parts of a prompt give": ["prompts.py"],
    "Large networks": ["large.py"],
    "Predictions and losses": ["objectives.py"],
}
SHORT = {
    "networks.py": ["--sizes", "built-in", "--modes", "default", "bf16", "--rounds", "1"],
    "step.py": ["--steps", "1", "train.batch_size=4"],
    "peers.py": [
        *["--who", "ours", "diffusers", "--minutes", "0.01", "--samples", "10"],
        *["train.max_steps=1", "train.batch_size=4", "train.sample_every=0", "train.evaluate_every=0"],
    ],
    "chain.py": ["--samples", "10", "--chain", "10", "--steps", "2"],
    "prompts.py": ["--samples", "4"],
    "large.py": ["--small"],
    "objectives.py": ["--predictions", "sample", "--losses", "sample", "--steps", "1", "--samples", "10"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only check that everything runs")
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", default=[*SHORT], help=f"of {', '.join(SHORT)}")
    arguments = parser.parse_args()
    folder = Path(__file__).parent
    failed = []
    for title, (script, *words) in PARTS.items():
        if script not in arguments.only:
            continue
        if arguments.short:
            arguments.only.remove(script)  # one run of each script is enough
        print(f"\n## {title}\n", flush=True)
        more = SHORT[script] if arguments.short else []
        result = subprocess.run([sys.executable, str(folder / script), *words, *more], check=False)
        if result.returncode != 0:
            failed.append(title)
            print("failed", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
