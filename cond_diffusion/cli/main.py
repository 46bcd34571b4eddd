"""`cond-diffusion COMMAND`, also as `python -m cond_diffusion COMMAND`; train.py and sample.py run two of them.

A command's module is imported when it runs, so that `--help` answers at once.
"""

import argparse
import dataclasses
import importlib
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from signal import SIGINT
from typing import Any

from cond_diffusion.errors import Interrupted, UserError, did_you_mean

COMMANDS = {
    "train": ("main:train", "train a model, or check a run beforehand"),
    "sample": ("sample:sample", "sample images of prompts"),
    "evaluate": ("evaluate:evaluate_command", "measure a checkpoint's samples beside real images"),
    "likelihood": ("evaluate:likelihood_command", "bound the likelihood of real images, in bits per dimension"),
    "pretrain-clip": ("main:pretrain_clip", "train a small CLIP on a captioned data set"),
    "demo": ("demo:demo", "open a page in the browser that samples"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: cond-diffusion COMMAND [-h] ...\n\ncommands:")
        print("\n".join(f"  {command:15}{purpose}" for command, (_, purpose) in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        print(f"error: {name} is none of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"cond-diffusion {name}"  # what usage lines show
    return run(name, rest)


def run(name: str, arguments: list[str] | None = None) -> int:
    """Run a command by its name, with the process's own arguments if none are given; return its exit code."""
    module, function = COMMANDS[name][0].split(":")
    return command_line(lambda: getattr(importlib.import_module(f"cond_diffusion.cli.{module}"), function)(arguments))


def command_line(command: Callable[[], None]) -> int:
    """Set up logging, and run a command: bad input becomes one line and exit code 2, a signal 128 and its number.

    Of several processes the one of rank 0 logs.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    is_main = os.environ.get("RANK", "0") == "0"
    ours, on_screen = logging.getLogger("cond_diffusion"), logging.StreamHandler()
    before = ours.level
    ours.setLevel(logging.INFO if is_main else logging.ERROR)
    ours.addHandler(on_screen)
    # The hub's client logs each of its retries; that it cannot be reached is one line of ours.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with logging_redirect_tqdm([ours]):
            command()
    except UserError as error:
        # Of several processes that all have the same error, one prints it.
        if error.of_this_process or is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        if is_main:
            print(str(interruption) or "interrupted", file=sys.stderr)
        return 128 + (interruption.signal if isinstance(interruption, Interrupted) else SIGINT)
    finally:
        ours.removeHandler(on_screen)
        ours.setLevel(before)
    return 0


def train(arguments: list[str] | None = None) -> None:
    """Train a model, or check a run beforehand."""
    from cond_diffusion.config.run import Config, load_config

    parser = config_parser("Train a text-to-image model.", Path("mnist"))
    parser.add_argument("--check", action="store_true", help="inspect the data, overfit one batch, and train nothing")
    given = parser.parse_intermixed_args(arguments)
    config = load_config(Config, config_file(given.config), given.overrides)
    if given.check:
        from cond_diffusion.training.preflight import check

        for line in check(config):
            print(line)
        return
    from cond_diffusion.training.trainer import train

    try:
        train(config)
    except Interrupted:
        raise
    except KeyboardInterrupt as interruption:  # before the first step or after the last
        message = "interrupted; the same command with resume=true continues from the newest checkpoint"
        raise KeyboardInterrupt(message) from interruption


def pretrain_clip(arguments: list[str] | None = None) -> None:
    """Train a small CLIP on a captioned data set."""
    from cond_diffusion.config.run import ClipPretrainingConfig, load_config

    given = config_parser("Train a small CLIP on a captioned data set.").parse_intermixed_args(arguments)
    config = load_config(ClipPretrainingConfig, given.config and config_file(given.config), given.overrides)
    from cond_diffusion.training.clip_pretraining import pretrain

    for caption, accuracy in pretrain(config).items():
        print(f"zero-shot accuracy on the {config.test_split} images, captions like {caption!r}: {accuracy:.2%}")
    print(f"saved {config.run_dir}; train with it by text.encoder={config.run_dir}")


def sample_command() -> int:
    """The command `cond-diffusion-sample`."""
    return run("sample")


def train_command() -> int:
    """The command `cond-diffusion-train`."""
    return run("train")


# Beside the package in a clone, in it in a wheel.
CONFIGS = next(folder for parent in Path(__file__).parents[1:3] if (folder := parent / "configs").is_dir())


def add_options(
    parser: argparse.ArgumentParser,
    schema: Any,
    *,
    without: Collection[str] = (),
    only: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add an option for each field of a config dataclass. Values stay text; the dataclass parses them.

    An option that was not typed is absent from the parsed arguments, so that the declared default applies.

    Args:
        without, only: Fields to leave out, or the only ones to add.
        defaults: What the help names as the default in place of the declared one.
    """
    groups: dict[Any, Any] = {group.title: group for group in parser._action_groups}
    declared = schema.__pydantic_fields__
    for name in (field.name for field in dataclasses.fields(schema)):
        if name in without or (only is not None and name not in only):
            continue
        info = declared[name]
        extra = info.json_schema_extra or {}
        default = (defaults or {}).get(name, info.default)
        shown = "" if default in (None, "") else f" (default: {default})"
        title = extra.get("group", "options")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar=extra.get("metavar"),
            help=f"{info.description}{shown}".replace("%", "%%"),
        )


def config_parser(description: str, default: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser for `[--config FILE] [key=value ...]`, whose `config` and `overrides` go to `load_config`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        type=Path,
        default=default,
        metavar="FILE",
        help=f"a YAML file, or the name of one of the project's (default: {default})",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.batch_size=64")
    return parser


def config_file(given: Path) -> Path:
    """Return the file that --config names; a bare name is one of the project's configs.

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
