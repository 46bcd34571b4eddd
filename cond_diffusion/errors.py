"""Errors that a user can cause and fix. A command prints them as one line, without a traceback, and exits with 2.

Any function of the package may raise UserError; the docstrings of the public API say when.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT
from typing import Any


class UserError(ValueError):
    """Invalid input. The message is one line: key, value, and what is expected.

    Args:
        of_this_process: The error concerns this process only; otherwise all processes of a run raise it, and only the
            main process prints it.
    """

    def __init__(self, message: str, *, of_this_process: bool = False) -> None:
        super().__init__(message)
        self.of_this_process = of_this_process


class Interrupted(KeyboardInterrupt):
    """The work was ended by a signal. The message describes what was saved."""

    def __init__(self, message: str, signal: int = SIGINT) -> None:
        super().__init__(message)
        self.signal = signal


@contextmanager
def user_errors(what: str, *exception_types: type[Exception], hint: str = "") -> Iterator[None]:
    """Convert exceptions of a library to a UserError with the message "`what` (first line of the exception)`hint`"."""
    try:
        yield
    except exception_types as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{what} ({first_line(error)}){hint}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the machine or of an accelerator was insufficient; torch raises a RuntimeError."""
    messages = "(out of|can't allocate|not enough) memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(messages, str(error)) is not None
    )


def check_cache(error: BaseException, cache: str | Path, variable: str) -> None:
    """Raise UserError if `error` is about a file or folder of `cache`, which the environment variable moves."""
    file = getattr(error, "filename", None)
    if file and (Path(file).is_relative_to(cache) or Path(cache).is_relative_to(file)):
        message = f"the cache {cache} cannot be written ({first_line(error)}); set {variable} to another folder"
        raise UserError(message) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_text(text: str, key: str) -> str:
    """Return a text; raise UserError if it cannot be written in UTF-8 or contains a NUL, as no file name does."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{key}: {text!r:.80} is not valid text; expected UTF-8 without NUL")
    return text


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """Escape characters that are not printable: text from a file can contain escape sequences of the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def refuse_other_values(fields: dict[str, Any], only: dict[str, Any], where: object) -> None:
    """Remove the keys of `only` from `fields`; raise UserError if one of them has another value than in `only`."""
    for key, expected in only.items():
        value = fields.pop(key, expected)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):  # True == 1
            raise UserError(f"{where}: {key}: {value!r:.80} is not supported; expected {expected!r}")
