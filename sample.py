"""Draw pictures: python sample.py "a digit seven"."""

import argparse
import sys

from cond_diffusion.errors import command_line


def scale(text: str) -> float | list[float]:
    """Read "3" or "2,5"."""
    values = [float(part) for part in text.split(",")]
    return values if len(values) > 1 else values[0]


def interval(text: str) -> list[int]:
    """Read "200,800"."""
    first, last = (int(part) for part in text.split(","))
    return [first, last]


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        description="Draw pictures of the prompts: one row of the PNG for each.", allow_abbrev=False
    )
    words.add_argument("prompts", nargs="*", metavar="PROMPT", help='for example "a digit seven"')
    words.add_argument(
        "--checkpoint", default="builtin", help="a run folder, a checkpoint folder or a hub id (default: %(default)s)"
    )
    words.add_argument(
        "--ema-width", type=float, help="average over this share of the training, 0.03 to 0.25 (default: as trained)"
    )
    words.add_argument("--num-images", type=int, default=1, help="pictures of each prompt (default: %(default)s)")
    words.add_argument("--seed", type=int, default=0, help="picture i has seed + i (default: %(default)s)")
    words.add_argument("--from-image", metavar="PNG", help="repeat a picture; options typed beside it change it")

    chain = words.add_argument_group("the chain")
    chain.add_argument(
        "--sampler", default="ddpm", help="ddpm, ddim, euler, heun, dpm_solver or unipc (default: %(default)s)"
    )
    chain.add_argument("--steps", type=int, help="timesteps to visit (default: the whole chain)")
    chain.add_argument("--variance", help="of ddpm: posterior or beta (default: the model's)")
    chain.add_argument("--eta", type=float, help="of ddim and dpm_solver: fresh noise, 0 to 1 (default: 0)")
    chain.add_argument("--order", type=int, help="of dpm_solver (1, 2) and unipc (1 to 3) (default: 2)")

    guidance = words.add_argument_group("guidance")
    guidance.add_argument(
        "--guidance-scale",
        type=scale,
        default=3.0,
        metavar="W",
        help="1 is unguided; 2,5 gives two prompts one each (default: %(default)s)",
    )
    guidance.add_argument("--negative-prompt", default="", help="what to steer away from")
    guidance.add_argument(
        "--guidance-interval", type=interval, metavar="FIRST,LAST", help="timesteps to guide at (default: all)"
    )
    guidance.add_argument(
        "--guidance-rescale", type=float, default=0.0, metavar="PHI", help="tame high scales, 0 to 1 (default: 0)"
    )
    guidance.add_argument(
        "--dynamic-thresholding", type=float, metavar="SHARE", help="cut the brightest pixels, for example 0.995"
    )

    editing = words.add_argument_group("pictures as input")
    editing.add_argument("--image", metavar="FILE", help="a picture to begin with")
    editing.add_argument("--strength", type=float, help="how much to change it, 0 to 1 (default: 0.8; with --mask 1)")
    editing.add_argument("--mask", metavar="FILE", help="white is drawn anew, black stays")
    editing.add_argument("--resamplings", type=int, default=1, help="of RePaint, for --mask (default: %(default)s)")

    files = words.add_argument_group("files to write")
    files.add_argument("--output", metavar="PNG", help="the pictures (default: a free name made of the prompt)")
    files.add_argument("--film", metavar="FILE", help="a .gif or .webp of the chain: x_t and x_0_hat")
    files.add_argument("--attention-maps", metavar="PNG", help="where each word was read for")
    return words


def main() -> None:
    options = vars(parser().parse_args())
    # Imported here, so that --help and a misspelt option answer at once.
    from cond_diffusion.drawing import draw_to_file, recorded_words

    recorded_prompts: list[str] = []
    if options["from_image"] is not None:
        recorded_prompts, words = recorded_words(options["from_image"], sys.argv[1:])
        options = vars(parser().parse_args([*words, *sys.argv[1:]]))
    prompts = options.pop("prompts") or recorded_prompts
    if not prompts:
        parser().error('no PROMPT; expected at least one, for example "a digit seven"')
    del options["from_image"]
    draw_to_file(
        prompts,
        checkpoint=options.pop("checkpoint"),
        ema_width=options.pop("ema_width"),
        output=options.pop("output"),
        film=options.pop("film"),
        attention_maps=options.pop("attention_maps"),
        options=options,
    )


if __name__ == "__main__":
    sys.exit(command_line(main))
