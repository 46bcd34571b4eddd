"""Entry point of `python -m cond_diffusion COMMAND`."""

import sys

from cond_diffusion.cli import start

if __name__ == "__main__":
    sys.exit(start())
