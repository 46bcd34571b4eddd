"""What a user can cause and mend: one clear line, and exit code 2 instead of a traceback."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


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


@contextmanager
def user_errors(what: str, *kinds: type[Exception], hint: str = "") -> Iterator[None]:
    """Raise a UserError in the place of a library's errors: `what`, the first line of their message, `hint`."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what} ({first_line(error)}){hint}") from error


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
