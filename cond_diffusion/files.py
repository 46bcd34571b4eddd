"""Atomic writes, hashes, and the cache folder."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def cache_folder() -> Path:
    """Return the folder of cached results on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cond_diffusion"


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Several processes may write the same file at once.

    Raises:
        OSError, SafetensorError: The file cannot be written; no partial file is left.
    """
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata)
        flush(unfinished)
        unfinished.replace(file)
    except (OSError, SafetensorError):
        with suppress(OSError):
            unfinished.unlink()
        raise


def hash_weights(digest: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Update a hash of `hashlib` with names and values of tensors."""
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().data)


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
