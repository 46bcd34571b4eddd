"""Train a model: accelerate launch train.py [--config FILE] [key=value ...]. Check a run: python train.py --check."""

import sys

from cond_diffusion.cli.main import run

if __name__ == "__main__":
    sys.exit(run("train"))
