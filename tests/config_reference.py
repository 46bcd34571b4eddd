"""Writes the config reference of training/README.md: `python tests/config_reference.py`."""

import dataclasses
import json
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
            yield f"| `{prefix}{field.name}` | {_text(value)} | {meaning} |\n"


def _text(value: Any) -> str:
    if value in (None, (), {}):
        return "none"
    return json.dumps(value) if isinstance(value, bool | tuple) else str(value)


def table() -> str:
    return HEADING + "".join(rows(Config()))


def main() -> None:
    text = FILE.read_text(encoding="utf-8")
    FILE.write_text(text[: text.index(HEADING)] + table(), encoding="utf-8")


if __name__ == "__main__":
    main()
