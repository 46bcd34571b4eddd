"""`sample`: images of prompts, into one PNG or into a folder. torch is imported after the command line was parsed."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cond_diffusion.cli.main import add_options
from cond_diffusion.config.sampling import IMAGE_OPTIONS, SAMPLERS_OF, GenerationSettings, SamplingOptions
from cond_diffusion.errors import UserError

FILES = ("output", "no_labels", "film", "attention_maps")


def sample_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Sample images of prompts: one row of the PNG for each.", allow_abbrev=False
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='for example "a digit seven"')
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; - is standard input")
    add_options(parser, GenerationSettings, without=("prompts", "sampling"))
    add_options(parser, SamplingOptions)
    parser.add_argument("--batch-size", type=int, help="images in one batch (default: as many as fit, at most 64)")
    parser.add_argument(
        "--from-image",
        metavar="PNG",
        help="PNG to regenerate from its embedded settings; other options override them",
    )
    files = parser.add_argument_group("files to write")
    files.add_argument("--output", metavar="PNG", help="the images (default: a free name made of the prompt)")
    files.add_argument("--no-labels", action="store_true", help="no prompts beside the rows of several")
    files.add_argument(
        "--output-dir", metavar="FOLDER", help="write one PNG per image into this folder; existing files are skipped"
    )
    files.add_argument("--film", metavar="FILE", help="a .gif or .webp of the sampling: x_t and x_0_hat")
    files.add_argument("--attention-maps", metavar="PNG", help="where each word is attended to")
    return parser


def sample(arguments: list[str] | None = None) -> None:
    """Sample images of prompts."""
    parser = sample_parser()
    typed = vars(parser.parse_intermixed_args(arguments))
    from cond_diffusion.pipeline.generate import from_flat, generate_to_file, generate_to_folder

    files = {name: typed.pop(name) for name in FILES}
    folder, batch_size = typed.pop("output_dir"), typed.pop("batch_size")
    prompts = typed.pop("prompts") + prompts_of(typed.pop("prompts_file"))
    recorded = recorded_settings(typed.pop("from_image"), typed)
    settings = from_flat({**recorded, **typed, **({"prompts": prompts} if prompts else {})})
    if not settings.prompts:
        parser.error('no PROMPT; expected at least one, for example "a digit seven"')
    if folder is None:
        labels = not files.pop("no_labels")
        for path in generate_to_file(settings, labels=labels, batch_size=batch_size, **files):
            print(path)
        return
    if given := next((name for name, value in files.items() if value), None):
        raise UserError(f"--{given.replace('_', '-')}: does not apply to --output-dir; leave one out")
    generate_to_folder(settings, folder, batch_size=batch_size)
    print(folder)


def recorded_settings(path: str | None, typed: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a PNG was made with, without what belonged to a sampler or image that is replaced."""
    if path is None:
        return {}
    from cond_diffusion.pipeline.generate import read_settings

    found = read_settings(path, "--from-image")
    replaced = {*(SAMPLERS_OF if "sampler" in typed else ()), *(IMAGE_OPTIONS if "image" in typed else ())}
    return {name: value for name, value in found.items() if name not in replaced}


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
