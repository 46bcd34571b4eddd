"""Draw pictures: python sample.py "a digit seven"."""

import argparse
import sys

from cond_diffusion.errors import command_line


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw pictures of the prompts: one row of the PNG for each.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help='for example "a digit seven"')
    parser.add_argument(
        "--checkpoint", help="a run folder, a checkpoint folder or a hub id (default: the built-in model)"
    )
    parser.add_argument("--num-images", type=int, default=1, help="pictures of each prompt (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="1 is unguided (default: %(default)s)")
    parser.add_argument("--negative-prompt", default="", help="what to steer away from")
    parser.add_argument("--sampler", default="ddpm", help="ddpm (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="timesteps to visit (default: the whole chain)")
    parser.add_argument("--seed", type=int, default=0, help="picture i has seed + i (default: %(default)s)")
    parser.add_argument("--output", help="the PNG to write (default: a free name made of the prompt)")
    arguments = parser.parse_args()

    # Imported here, so that --help and a misspelt option answer at once.
    from cond_diffusion.pipeline import draw_to_file

    draw_to_file(**vars(arguments))


if __name__ == "__main__":
    sys.exit(command_line(main))
