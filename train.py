"""Train: accelerate launch train.py [--config FILE] [key=value ...]; python train.py --check before a long run."""

import sys

from cond_diffusion.cli.main import run

if __name__ == "__main__":
    sys.exit(run("train"))
