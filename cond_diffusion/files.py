"""Atomic writes, hashes, and the cache folder. Does not import torch before tensors are read or written."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cond_diffusion.errors import UserError


def cache_folder() -> Path:
    """Return the folder of cached results on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cond_diffusion"


UNFINISHED = re.compile(r"\..*\.[0-9a-f]{8}\.part")


@contextmanager
def written_aside(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an unused path beside `path`. What the body writes there, a file or a folder, is flushed and renamed.

    If the body or the renaming fails, it is removed. A killed process leaves it with a name that matches `UNFINISHED`.

    Args:
        path: The file or folder to write. The files of a folder are moved into an existing folder, one after the other.
        overwrite: Whether an existing file is replaced.

    Raises:
        FileExistsError: If `overwrite` is false and `path` exists at the end.
        OSError: If the result cannot be written.
    """
    path = path.absolute()
    # What is mounted or linked can be on another disk than the folder around it.
    is_elsewhere = path.is_dir() and (path.is_symlink() or os.path.ismount(path))
    parent = path.resolve() if is_elsewhere else path.parent
    unfinished = parent / f".{path.name[:32]}.{secrets.token_hex(4)}.part"
    try:
        yield unfinished
        for written in [*unfinished.rglob("*"), unfinished]:
            flush(written)
        if unfinished.is_dir() and path.is_dir():
            for file in sorted(file for file in unfinished.rglob("*") if file.is_file()):
                target = path / file.relative_to(unfinished)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
        elif overwrite or unfinished.is_dir():
            unfinished.replace(path)
        else:
            try:
                os.link(unfinished, path)  # unlike a rename, it fails if the path exists
            except OSError:  # it exists, or the file system has no links
                path.open("xb").close()  # fails if it exists
                unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            unfinished.unlink()


def write_file(path: Path, content: bytes | str, *, overwrite: bool = True) -> None:
    """Write a file atomically; text is encoded as UTF-8. Raises as `written_aside` does."""
    with written_aside(path, overwrite=overwrite) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically. Raises as `written_aside` does."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_writable(folder: Path) -> None:
    """Raise OSError if no file can be written in a folder or, if it does not exist, in the nearest folder above it."""
    folder = folder.absolute()
    while True:
        try:
            folder.stat()
            break
        except FileNotFoundError:
            folder = folder.parent
    probe = folder / f".probe.{secrets.token_hex(4)}.part"
    try:
        probe.write_bytes(b"0")
        flush(probe)
    finally:
        with suppress(OSError):
            probe.unlink()


def save_tensors(tensors: Mapping[str, Any], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Several processes may write the same file at once.

    Raises:
        OSError, SafetensorError: The file cannot be written; no partial file is left.
    """
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as unfinished:
        save_file(dict(tensors), unfinished, metadata)


def load_tensors(file: Path) -> dict[str, Any]:
    """Load a safetensors file.

    Raises:
        OSError, SafetensorError: The file does not exist or is damaged.
        UserError: It is not a regular file, or a value is not finite.
    """
    from safetensors.torch import load_file

    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a regular file")
    tensors = load_file(file)
    check_finite(tensors.items(), file)
    return tensors


def check_finite(weights: Iterable[tuple[str, Any]], where: str | Path) -> None:
    """Raise UserError if a tensor has NaN or infinite values, which make every image black."""
    for name, weight in weights:
        # `isfinite` does not support every 8-bit type.
        if not (weight if weight.element_size() > 1 else weight.float()).isfinite().all():
            raise UserError(f"{where}: {name} is not finite; the weights are damaged")


def hash_weights(digest: Any, weights: Iterable[tuple[str, Any]]) -> None:
    """Update a hash of `hashlib` with names and values of tensors."""
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().data)


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return  # not possible there
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
