"""Train: accelerate launch train.py [--config FILE] [key=value ...]; python train.py --check before a long run."""

import sys

from cond_diffusion.cli.main import train as main
from cond_diffusion.errors import command_line

if __name__ == "__main__":
    sys.exit(command_line(main))
