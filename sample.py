"""Generate images: python sample.py "a digit seven"."""

import sys

from cond_diffusion.cli.main import run

if __name__ == "__main__":
    sys.exit(run("sample"))
