"""What is fetched from others: safetensors, JSON and text, never a pickle, which can run code when it is loaded."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
)

from cond_diffusion.errors import UserError, first_line

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
# Of each part the one file that is read: pipelines of others hold the same weights in more precisions and formats.
FILES = [
    *("model_index.json", "config.yaml", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"),
    *(f"{part}/{name}" for part, weights in WEIGHTS.items() for name in ("config.json", weights)),
]
CANNOT_REACH = (OSError, ValueError, RuntimeError, HTTPError)  # what the hub's client raises
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def is_hub_id(source: str | Path) -> bool:
    """Say whether a source that is no folder here can name a repository: owner/name."""
    return str(source).count("/") == 1 and not str(source).startswith((".", "/", "~"))


def download(repo_id: str, files: Sequence[str] = FILES, **options: Any) -> Path:
    """Fetch a pipeline from the hub, or find it where it was fetched before; return its folder.

    files: what to fetch of it. options: huggingface_hub's revision, token, cache_dir and local_files_only.

    Of weights that are there in half precision alone that file is fetched.

    Raises UserError where it cannot be fetched, or has weights as pickles only.
    """
    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=[*files], **options))
        lacking = _lacking(folder, files)
        if lacking and not options.get("local_files_only"):
            api = huggingface_hub.HfApi(token=options.get("token"))
            names = api.list_repo_files(repo_id, revision=options.get("revision"))
            halves = [in_half(file) for file in lacking if in_half(file) in names]
            if halves:
                folder = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=halves, **options))
            for file in map(PurePosixPath, _lacking(folder, files)):
                beside = [name for name in names if PurePosixPath(name).parent == file.parent]
                _refuse(str(PurePosixPath(repo_id, file.parent)), beside, file.name)
    except LocalEntryNotFoundError as error:
        why = "local_files_only" if options.get("local_files_only") else first_line(error.__cause__ or error)
        raise UserError(
            f"there is no folder {repo_id}, and as a hub id it is not on this disk and cannot be fetched ({why}); "
            "check the name and the network"
        ) from error
    except UserError:
        raise
    except CANNOT_REACH as error:
        raise UserError(
            f"there is no folder {repo_id}, and as a hub id it cannot be fetched ({first_line(error)}); "
            "check the name and the network"
        ) from error
    return folder


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Make a repository of a folder, or a new commit in one that is there; return its address.

    Raises UserError where the hub does not take it.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a cond_diffusion pipeline")
    except CANNOT_REACH as error:
        raise UserError(
            f"{repo_id}: the hub does not take it ({first_line(error)}); check the name, the network, and the token "
            "(hf auth login)"
        ) from error
    return str(address)


def in_half(name: str) -> str:
    """Return diffusers' and transformers' name for the same weights in half precision."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.fp16.{suffix}"


def variant_of(folder: Path, name: str) -> str | None:
    """Return "fp16", as diffusers and transformers call it, if the weights are there in half precision alone."""
    return "fp16" if _has_weights(folder, name) and not (folder / name).exists() else None


def _has_weights(folder: Path, name: str) -> bool:
    """Say whether the weights of this name are in a folder, in whatever precision."""
    return any((folder / found).exists() for found in (name, in_half(name), f"{name}.index.json"))


def _lacking(folder: Path, files: Sequence[str]) -> list[str]:
    """Return the weights among `files` that are in no precision in a folder that has the rest of their part."""
    weights = [name for name in files if name.endswith(".safetensors")]
    gone = [name for name in weights if not _has_weights(folder, name)]
    return [name for name in gone if gone == weights or ("/" in name and (folder / name).parent.is_dir())]


def refuse_pickles(folder: Path, expected: str) -> None:
    """Raise UserError if a folder has pickled weights in the place of the file that is `expected`."""
    if folder.is_dir() and not _has_weights(folder, expected):
        _refuse(str(folder), (file.name for file in sorted(folder.iterdir())), expected)


def _refuse(where: str, names: Iterable[str], expected: str) -> None:
    for name in names:
        if name.endswith(PICKLES):
            raise UserError(
                f"{where} has its weights in {Path(name).name}, a pickle, which can run any code when it is loaded; "
                f"expected {expected}"
            )
