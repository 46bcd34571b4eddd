"""Writes the config references of training/README.md: `python tests/config_reference.py`."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cond_diffusion.config.run import ClipPretrainingConfig, Config

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


def reference() -> str:
    """Return the tables of both configs; the second one without the section that they share."""
    own = (row for row in rows(ClipPretrainingConfig()) if not row.startswith("| `data."))
    second = f"\nThe keys of `pretrain-clip`, beside those of `data`:\n\n{HEADING}"
    return "".join([HEADING, *rows(Config()), second, *own])


def main() -> None:
    text = FILE.read_text(encoding="utf-8")
    FILE.write_text(text[: text.index(HEADING)] + reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
