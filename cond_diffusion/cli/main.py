"""What train.py and sample.py do, and the commands that `pip install` makes of them.

All else is imported when it is needed, so that the `--help` of drawing and a misspelt option of it answer at once.
"""

import argparse
import sys
from pathlib import Path

from cond_diffusion.errors import Interrupted, UserError, command_line, did_you_mean

# Beside the package in a clone, in it in a wheel.
CONFIGS = next(
    folder
    for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    if folder.is_dir()
)


def scale(text: str) -> float | list[float]:
    """Read "3" or "2,5"."""
    values = [float(part) for part in text.split(",")]
    return values if len(values) > 1 else values[0]


def interval(text: str) -> list[int]:
    """Read "200,800"."""
    first, last = (int(part) for part in text.split(","))
    return [first, last]


def sample_parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        description="Draw pictures of the prompts: one row of the PNG for each.", allow_abbrev=False
    )
    words.add_argument("prompts", nargs="*", metavar="PROMPT", help='for example "a digit seven"')
    words.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; - is standard input")
    words.add_argument(
        "--checkpoint", default="builtin", help="a run folder, a checkpoint folder or a hub id (default: %(default)s)"
    )
    words.add_argument(
        "--ema-width", type=float, help="average over this share of the training, 0.03 to 0.25 (default: as trained)"
    )
    words.add_argument("--lora", metavar="FILE", help="added to the network: a file, a folder with it or a hub id")
    words.add_argument("--num-images", type=int, default=1, help="pictures of each prompt (default: %(default)s)")
    words.add_argument("--batch-size", type=int, help="pictures in work at once (default: as many as fit, at most 64)")
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
    files.add_argument("--no-labels", action="store_true", help="no prompts beside the rows of several")
    files.add_argument(
        "--output-dir", metavar="FOLDER", help="a PNG for each picture instead; what is there is not drawn again"
    )
    files.add_argument("--film", metavar="FILE", help="a .gif or .webp of the chain: x_t and x_0_hat")
    files.add_argument("--attention-maps", metavar="PNG", help="where each word was read for")
    return words


def sample() -> None:
    """Draw pictures of prompts: sample.py."""
    parser = sample_parser()
    options = vars(parser.parse_intermixed_args())
    from cond_diffusion.pipeline.generate import draw_to_file, draw_to_folder, recorded_words

    recorded_prompts: list[str] = []
    if options["from_image"] is not None:
        recorded_prompts, words = recorded_words(options["from_image"], sys.argv[1:])
        options = vars(parser.parse_intermixed_args([*words, *sys.argv[1:]]))
    del options["from_image"]
    prompts = options.pop("prompts") + prompts_of(options.pop("prompts_file")) or recorded_prompts
    if not prompts:
        parser.error('no PROMPT; expected at least one, for example "a digit seven"')
    where = {name: options.pop(name) for name in ("output", "film", "attention_maps", "no_labels")}
    of_model = {name: options.pop(name) for name in ("checkpoint", "ema_width", "lora")}
    folder = options.pop("output_dir")
    if folder is None:
        labels = not where.pop("no_labels")
        for path in draw_to_file(prompts, options=options, labels=labels, **of_model, **where):
            print(path)
        return
    if given := next((name for name, value in where.items() if value), None):
        raise UserError(f"--{given.replace('_', '-')}: means nothing beside --output-dir; leave one out")
    draw_to_folder(prompts, options=options, folder=folder, **of_model)
    print(folder)


def prompts_of(file: str | None) -> list[str]:
    """Return the lines of a file, or of standard input, that are not empty; raise UserError if it cannot be read."""
    if file is None:
        return []
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file: {file} cannot be read ({error}); expected prompts, one a line") from error
    if not (prompts := [line.strip() for line in text.splitlines() if line.strip()]):
        raise UserError(f"--prompts-file: {file} holds no prompts; expected one a line")
    return prompts


def config_file(given: Path) -> Path:
    """Return the file that --config names; a bare name is one of those that come with the project.

    Raises UserError for a bare name that none has.
    """
    if given.parent != Path() or given.suffix:
        return given
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    if given.name not in names:
        raise UserError(
            f"--config: {given} is none of {', '.join(names)}{did_you_mean(given.name, names)}, and no .yaml file"
        )
    return CONFIGS / f"{given.name}.yaml"


def train() -> None:
    """Train a model: train.py."""
    # Imported here, so that Ctrl-C during the imports is one line, too.
    from cond_diffusion.config.run import Config, config_parser, load_config
    from cond_diffusion.training.preflight import check
    from cond_diffusion.training.trainer import train

    words = config_parser("Train a text-to-image model.", Path("mnist"))
    words.add_argument("--check", action="store_true", help="look at the data and try one batch, and train nothing")
    given = words.parse_intermixed_args()
    config = load_config(Config, config_file(given.config), given.overrides)
    if given.check:
        for line in check(config):
            print(line)
        return
    try:
        train(config)
    except Interrupted:
        raise
    except KeyboardInterrupt as interruption:  # before the first step or after the last
        message = "interrupted; the same command with resume=true goes on from the newest checkpoint"
        raise KeyboardInterrupt(message) from interruption


def sample_command() -> int:
    """Be the command `cond-diffusion-sample`."""
    return command_line(sample)


def train_command() -> int:
    """Be the command `cond-diffusion-train`."""
    return command_line(train)
