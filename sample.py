"""Generate images: python sample.py "a digit seven"."""

import sys

from cond_diffusion.cli import start

if __name__ == "__main__":
    sys.exit(start("sample"))
