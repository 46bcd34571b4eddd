"""Files: written completely or not at all, hashed, and cached."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def cache_folder() -> Path:
    """Return where this machine keeps what is computed once."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cond_diffusion"


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, all of it or nothing; OSError or SafetensorError where that fails.

    Several processes may write the same one at once.
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
    """Add names and values to a hash of `hashlib`'s."""
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().data)


def flush(path: Path) -> None:
    """Ask the system to have `path` on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
