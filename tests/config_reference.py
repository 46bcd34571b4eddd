"""Writes the config reference of training/README.md: `python tests/config_reference.py`."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cond_diffusion.config.run import Config

FILE = Path(__file__).parent.parent / "cond_diffusion" / "training" / "README.md"
HEADING = "| key | default | meaning |\n|---|---|---|\n"


def rows(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield a line of the table for each field, sections resolved."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from rows(value, f"{prefix}{field.name}.")
        else:
            meaning = config.__pydantic_fields__[field.name].description
            default = {None: "none", (): "none", True: "true", False: "false"}.get(_hashable(value), _text(value))
            yield f"| `{prefix}{field.name}` | {default} | {meaning} |\n"


def _hashable(value: Any) -> Any:
    return value if isinstance(value, bool | tuple) or value is None else object()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return str([*value]).replace("True", "true").replace("False", "false")
    return str(value) if value != {} else "none"


def table() -> str:
    return HEADING + "".join(rows(Config()))


def main() -> None:
    text = FILE.read_text(encoding="utf-8")
    FILE.write_text(text[: text.index(HEADING)] + table(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
