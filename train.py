"""Train: accelerate launch train.py [--config FILE] [key=value ...]"""

import sys
from pathlib import Path

from cond_diffusion.errors import Interrupted, command_line


def main() -> None:
    # Imported here, so that Ctrl-C during the imports is one line, too.
    from cond_diffusion.config import Config, parse_config
    from cond_diffusion.training import train

    default = Path(__file__).parent / "configs" / "mnist.yaml"
    config = parse_config(Config, "Train a text-to-image model.", default=default)
    try:
        train(config)
    except Interrupted:
        raise
    except KeyboardInterrupt as interruption:  # before the first step or after the last
        message = "interrupted; the same command with resume=true goes on from the newest checkpoint"
        raise KeyboardInterrupt(message) from interruption


if __name__ == "__main__":
    sys.exit(command_line(main))
