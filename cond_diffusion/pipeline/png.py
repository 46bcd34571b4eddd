"""PNGs that remember how they were made: the settings as JSON in text chunks."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from cond_diffusion import __version__
from cond_diffusion.config.sampling import GenerationSettings, SamplingOptions
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.images import opened_image

CHUNK_PREFIX = "cond_diffusion:"

logger = logging.getLogger(__name__)


def save_png(image: Image.Image, path: Path, settings: GenerationSettings) -> None:
    """Write a PNG with its settings in text chunks, one for each that is not None, and the version."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in {**to_flat(settings), "version": __version__}.items():
        chunks.add_itxt(CHUNK_PREFIX + name, json.dumps(value, ensure_ascii=False))
    image.save(path, "PNG", pnginfo=chunks)


def read_settings(path: str, option: str) -> dict[str, Any]:
    """Return what `save_png` wrote into the text chunks, by name; UserError, naming the option, where nothing did."""
    with opened_image(path, option) as image:
        chunks = getattr(image, "text", {})
    ours = {name.removeprefix(CHUNK_PREFIX): text for name, text in chunks.items() if name.startswith(CHUNK_PREFIX)}
    if not ours:
        raise UserError(f"{option}: {path} does not say how it was made; expected a PNG that was made here")
    found: dict[str, Any] = {}
    for name, text in ours.items():
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{option}: the settings in {path} are damaged: {name}: {first_line(error)}") from error
    version = found.pop("version", None)
    if version != __version__:
        logger.warning("%s was made by version %s; version %s may give another image", path, version, __version__)
    if unknown := found.keys() - {*names_of(GenerationSettings), *names_of(SamplingOptions)}:
        raise UserError(f"{option}: {path} has a setting that is not known here: {min(unknown)!r:.60}")
    return found


def names_of(schema: Any) -> list[str]:
    """Return the names of a dataclass's fields, but for the group of sampling options."""
    return [field.name for field in fields(schema) if field.name != "sampling"]


def to_flat(settings: GenerationSettings) -> dict[str, Any]:
    """Return the settings that are not None by name, those of sampling among them."""
    named = asdict(settings)
    sampling = named.pop("sampling")
    return {name: value for name, value in {**named, **sampling}.items() if value is not None}


def from_flat(named: dict[str, Any]) -> GenerationSettings:
    """Invert `to_flat`; raise UserError for a value that is not allowed. Values may be text, as typed."""
    sampling = {name: named[name] for name in names_of(SamplingOptions) if name in named}
    others = {name: named[name] for name in names_of(GenerationSettings) if name in named}
    return GenerationSettings(**others, sampling=SamplingOptions(**sampling))


def name_of(prompt: str) -> str:
    """Return a file's name made of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"


@contextmanager
def reserve_path(wanted: str | None, prompt: str, option: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Reserve a path to write to, `wanted` or a free name made of the prompt; remove the file on an error.

    Raises UserError, before any work is done, if the path exists already or could not be written.
    """
    if wanted is None:
        name, number = name_of(prompt), 1
        path = Path(f"{name}{suffixes[0]}")
        while path.exists():
            number += 1
            path = Path(f"{name}-{number}{suffixes[0]}")
    else:
        path = Path(wanted)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option}: {path} must end in {' or '.join(suffixes)}")
    try:
        path.open("xb").close()  # reserves the name, and shows that it can be written
    except FileExistsError as error:
        raise UserError(f"{option}: {path} exists already and is not overwritten; give another name") from error
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from error
    try:
        yield path
    except BaseException:
        path.unlink()  # the name was reserved, but nothing was written
        raise
