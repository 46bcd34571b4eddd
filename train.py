"""Train a model: accelerate launch train.py [--config FILE] [key=value ...]. Check a run: python train.py --check."""

import sys

from cond_diffusion.cli import start

if __name__ == "__main__":
    sys.exit(start("train"))
