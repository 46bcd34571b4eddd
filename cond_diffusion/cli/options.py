"""Command-line options made from the declarations in `config/`."""

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cond_diffusion.errors import UserError, did_you_mean

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
