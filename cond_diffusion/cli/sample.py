"""The command `sample`, which generates images from prompts. torch is imported after the arguments are parsed."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from cond_diffusion.cli.main import ArgumentParser, add_options
from cond_diffusion.config.sampling import GUIDANCE_OF_MODEL, IMAGE_OPTIONS, SAMPLERS_OF, GenerationSettings
from cond_diffusion.config.schema import MAX_TEXT_BYTES, decode_text, expand_home, read_text
from cond_diffusion.errors import UserError, user_errors

logger = logging.getLogger(__name__)

FILES = ("output", "no_labels", "film", "attention_maps")


def sample_parser() -> argparse.ArgumentParser:
    """Return the argument parser of the command."""
    description = "Generate images from prompts, as one PNG with a row per prompt or as a folder of PNGs."
    parser = ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help='for example "a digit seven"')
    parser.add_argument(
        "--prompts-file", type=expand_home, metavar="FILE", help="more prompts, one per line; - is standard input"
    )
    add_options(parser, GenerationSettings)
    parser.add_argument("--batch-size", type=int, help="images per batch (default: as many as fit, at most 64)")
    from_image_help = "PNG to regenerate from its embedded settings; other options override them"
    parser.add_argument("--from-image", type=expand_home, metavar="PNG", help=from_image_help)
    files = parser.add_argument_group("files to write")
    files.add_argument(
        "--output", type=expand_home, metavar="PNG", help="all images (default: an unused name based on the prompt)"
    )
    files.add_argument("--no-labels", action="store_true", help="omit the prompts beside the rows")
    output_dir_help = "write one PNG per image into this folder; existing files are skipped"
    files.add_argument("--output-dir", type=expand_home, metavar="FOLDER", help=output_dir_help)
    files.add_argument(
        "--film", type=expand_home, metavar="FILE", help="animation of x_t and x_0_hat during sampling, .gif or .webp"
    )
    files.add_argument(
        "--attention-maps", type=expand_home, metavar="PNG", help="cross-attention to words of the whole prompt"
    )
    return parser


def sample(arguments: list[str] | None = None) -> None:
    """Generate images from prompts."""
    parser = sample_parser()
    given = vars(parser.parse_intermixed_args(arguments))
    from cond_diffusion.pipeline.generate import generate_to_file, generate_to_folder

    files = {name: given.pop(name) for name in FILES}
    folder, batch_size = given.pop("output_dir"), given.pop("batch_size")
    prompts = given.pop("prompts") + read_prompts(given.pop("prompts_file"))
    recorded = recorded_settings(given.pop("from_image"), given)
    settings = GenerationSettings(**{**recorded, **given, **({"prompts": prompts} if prompts else {})})
    if not settings.prompts:
        parser.error('no PROMPT; expected at least one, for example "a digit seven"')
    if folder == "":
        raise UserError("--output-dir: ''; expected a folder")
    if folder is None:
        labels = not files.pop("no_labels")
        for path in generate_to_file(settings, labels=labels, batch_size=batch_size, **files):
            print(path)
        return
    if conflicting := next((name for name, value in files.items() if value), None):
        raise UserError(f"--{conflicting.replace('_', '-')}: does not support --output-dir; remove one of them")
    generate_to_folder(settings, folder, batch_size=batch_size)
    print(folder)


def recorded_settings(path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings stored in a PNG, without options of a sampler, input image or model that `given` replaces."""
    if path is None:
        return {}
    from cond_diffusion.pipeline.generate import read_settings

    recorded = read_settings(path, "--from-image")
    of_model = (*GUIDANCE_OF_MODEL, "ema_width", "lora")
    for option, names in {"sampler": SAMPLERS_OF, "image": IMAGE_OPTIONS, "checkpoint": of_model}.items():
        if option in given and given[option] != recorded.get(option):
            dropped = {name: recorded.pop(name) for name in names if name in recorded and name not in given}
            if dropped:
                values = ", ".join(f"{name} {value}" for name, value in dropped.items())
                logger.info("--from-image: without %s, since --%s replaces %s", values, option, recorded.get(option))
    for name in ("image", "mask"):
        if recorded.get(name) and name not in given and not Path(recorded[name]).exists():
            raise UserError(f"--from-image: {path} was made from {recorded[name]}, which is not there; give --{name}")
    return recorded


def read_prompts(file: str | None) -> list[str]:
    """Return the non-empty lines of a file, or of standard input for "-"."""
    if file is None:
        return []
    name = "--prompts-file: " + ("standard input" if file == "-" else file)
    if file == "-":
        with user_errors(f"{name} cannot be read", OSError, hint="; expected prompts, one per line"):
            content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise UserError(f"{name} has more than {MAX_TEXT_BYTES} bytes")
        text = decode_text(content, name)
    else:
        text = read_text(Path(file), "--prompts-file")
    if not (prompts := [line.strip() for line in text.splitlines() if line.strip()]):
        raise UserError(f"{name} contains no prompts; expected one per line")
    return prompts
