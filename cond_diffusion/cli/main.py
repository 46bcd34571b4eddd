"""The command line: `cond-diffusion COMMAND`, `python -m cond_diffusion COMMAND`, train.py and sample.py.

The module of the commands is imported when one of them runs, so that the list of commands is fast.
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from signal import SIGINT
from typing import Any, NoReturn

from cond_diffusion import errors
from cond_diffusion.cli import interrupt_handler
from cond_diffusion.config.schema import local_path

COMMANDS = {
    "train": "train a model, or check a run before training",
    "sample": "generate images from prompts",
    "evaluate": "compare samples of a checkpoint with real images",
    "likelihood": "compute a likelihood bound of real images, in bits per dimension",
    "pretrain-clip": "train a small CLIP on a captioned data set",
    "demo": "open a web page that generates images",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name, and return its exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: cond-diffusion COMMAND [-h] ...\n\ncommands:")
        print("\n".join(f"  {command:15}{description}" for command, description in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        _print_error(f"error: {name}{errors.did_you_mean(name, COMMANDS)}; expected one of {', '.join(COMMANDS)}")
        return 2
    sys.argv[0] = f"cond-diffusion {name}"  # shown in usage lines
    return run(name, rest)


def run(name: str, arguments: list[str] | None = None) -> int:
    """Run a command by name, by default with the arguments of the process, and return its exit code."""

    def command() -> None:
        for argument in sys.argv[1:] if arguments is None else arguments:
            errors.check_text(argument, "arguments")
        resolve_name(f"cond_diffusion.cli.commands:{name.replace('-', '_')}")(arguments)

    return command_line(command)


def command_line(command: Callable[[], None]) -> int:
    """Set up logging, run a command, and return its exit code.

    A UserError, a path that the system refuses, or a lack of memory is printed as one line and gives exit code 2; a
    signal gives 128 plus its number. Only the process of rank 0 logs.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    is_main = os.environ.get("RANK", "0") == "0"
    logger, handler = logging.getLogger("cond_diffusion"), logging.StreamHandler()
    previous_level = logger.level
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    handler.setFormatter(_PrintableFormatter())
    logger.addHandler(handler)
    # huggingface_hub logs each retry; an unreachable Hub is reported as a UserError.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        interrupt_handler.running = True
        with logging_redirect_tqdm([logger]):
            command()
    except errors.UserError as error:
        # An error that all processes share is printed once.
        if error.of_this_process or is_main:
            _print_error(f"error: {errors.printable(str(error))}")
        return 2
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        _print_error(f"error: {errors.printable(str(error.filename)):.200}: {error.strerror}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not errors.is_out_of_memory(error):
            raise
        reason = errors.printable(errors.first_line(error))
        _print_error(f"error: out of memory ({reason}); choose a smaller batch size")
        return 2
    except KeyboardInterrupt as interruption:
        if is_main:
            _print_error(errors.printable(str(interruption)) or "interrupted")
        interrupt_handler.line = b""
        return 128 + (interruption.signal if isinstance(interruption, errors.Interrupted) else SIGINT)
    finally:
        interrupt_handler.running = False
        logger.removeHandler(handler)
        logger.setLevel(previous_level)
    return 0


def _print_error(line: str) -> None:
    with suppress(OSError):  # of a closed terminal or a full disk: the exit code remains
        print(line, file=sys.stderr, flush=True)


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters: messages contain text from files."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return errors.printable(super().formatMessage(record))


# Next to the package in a clone, inside the package in a wheel.
CONFIGS = next(folder for parent in Path(__file__).parents[1:3] if (folder := parent / "configs").is_dir())


class ArgumentParser(argparse.ArgumentParser):
    """Parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise errors.UserError(f"{message}; see {self.prog} --help")


def add_options(
    parser: argparse.ArgumentParser,
    schema: Any,
    *,
    only: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add an argument for each field of a config dataclass that `option` declares.

    Values remain text, which the dataclass parses. Arguments that are not given are absent from the parsed namespace,
    so that the defaults of the dataclass apply. `only` selects fields; the help shows `defaults` instead of those of
    the dataclass.
    """
    groups: dict[Any, Any] = {group.title: group for group in parser._action_groups}
    for name, field in schema.__pydantic_fields__.items():
        if field.json_schema_extra is None or (only is not None and name not in only):
            continue
        default = (defaults or {}).get(name, field.default)
        is_flag = field.annotation is bool
        suffix = "" if is_flag or default in (None, "") else f" (default: {default})"
        title = field.json_schema_extra["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{field.description}{suffix}".replace("%", "%%"),
            **({"action": "store_true"} if is_flag else {"metavar": field.json_schema_extra["metavar"]}),
        )


def config_parser(description: str, default: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser of `[--config FILE] [key=value ...]`, with the results `config` and `overrides`."""
    parser = ArgumentParser(description=description)
    config_help = "a YAML file, or the name of one in configs/" + (f" (default: {default})" if default else "")
    parser.add_argument("--config", type=local_path, default=default, metavar="FILE", help=config_help)
    overrides_help = "for example seed=1; all keys: cond_diffusion/training/README.md"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides_help)
    return parser


def config_file(path: Path) -> Path:
    """Return the file that --config refers to. A name without folder and suffix refers to a file in configs/."""
    if path.parent != Path() or path.suffix:
        return path
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    if path.name not in names:
        hint = errors.did_you_mean(path.name, names)
        raise errors.UserError(f"--config: {path}{hint}; expected a .yaml file, or one of {', '.join(names)}")
    return CONFIGS / f"{path.name}.yaml"
