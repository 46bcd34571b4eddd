"""Train: accelerate launch train.py [--config FILE] [key=value ...]; python train.py --check before a long run."""

import sys
from pathlib import Path

from cond_diffusion.errors import Interrupted, command_line


def main() -> None:
    # Imported here, so that Ctrl-C during the imports is one line, too.
    from cond_diffusion.check import check
    from cond_diffusion.config import Config, config_parser, load_config
    from cond_diffusion.training import train

    words = config_parser("Train a text-to-image model.", Path(__file__).parent / "configs" / "mnist.yaml")
    words.add_argument("--check", action="store_true", help="look at the data and try one batch, and train nothing")
    given = words.parse_intermixed_args()
    config = load_config(Config, given.config, given.overrides)
    if given.check:
        check(config)
        return
    try:
        train(config)
    except Interrupted:
        raise
    except KeyboardInterrupt as interruption:  # before the first step or after the last
        message = "interrupted; the same command with resume=true goes on from the newest checkpoint"
        raise KeyboardInterrupt(message) from interruption


if __name__ == "__main__":
    sys.exit(command_line(main))
