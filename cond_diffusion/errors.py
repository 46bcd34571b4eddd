"""What a user can cause and mend: one clear line, and exit code 2 instead of a traceback."""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from signal import SIGINT
from typing import Any

from tqdm.auto import tqdm


class UserError(ValueError):
    """Bad input. The message says what is wrong, where, what was expected and what to type; it is one line.

    of_this_process: of several processes the others may have nothing to say.
    """

    def __init__(self, message: str, *, of_this_process: bool = False) -> None:
        super().__init__(message)
        self.of_this_process = of_this_process


class Interrupted(KeyboardInterrupt):
    """A signal that ended the work; the message says what was saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name that is nearest to `name`, or nothing if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, or the error's name where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def refuse_other_values(fields: dict[str, Any], only: dict[str, Any], where: str) -> None:
    """Take the fields of `only` out of `fields`; raise UserError if one of them is there with another value."""
    for key, expected in only.items():
        if (value := fields.pop(key, expected)) != expected:
            raise UserError(f"{where}: {key}: {value!r} is not supported; expected {expected!r}")


class _BesideBars(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, above the progress bars that are there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def command_line(main: Callable[[], None]) -> int:
    """Run `main` as a command: bad input becomes one line and exit code 2, a signal 128 and its number (Ctrl-C 130)."""
    # The hub's client announces each of its retries; that it cannot be reached is one line, and ours to say.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    ours = logging.getLogger("cond_diffusion")
    ours.setLevel(logging.INFO)
    on_screen = _BesideBars()
    ours.addHandler(on_screen)
    try:
        main()
    except UserError as error:
        # Of several processes that all have the same to say, one says it.
        if error.of_this_process or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        if os.environ.get("RANK", "0") == "0":
            print(str(interruption) or "interrupted", file=sys.stderr)
        return 128 + (interruption.signal if isinstance(interruption, Interrupted) else SIGINT)
    finally:
        ours.removeHandler(on_screen)
    return 0
