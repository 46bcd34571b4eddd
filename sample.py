"""Draw pictures: python sample.py "a digit seven"."""

import sys

from cond_diffusion.cli.main import sample as main
from cond_diffusion.errors import command_line

if __name__ == "__main__":
    sys.exit(command_line(main))
