"""Downloads from and uploads to the Hugging Face Hub. Pickle files are refused, because they can execute code."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
)

from cond_diffusion.errors import UserError, check_cache, first_line, user_errors

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
SHARDS = (".safetensors.index.json", "-*-of-*.safetensors")
# Files of a pipeline that are used. Repositories often store the same weights in other precisions and formats too.
FILES = [
    *("model_index.json", "config.yaml", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"),
    *(f"{part}/{name}" for part, weights in WEIGHTS.items() for name in ("config.json", weights)),
    # Shards of large weights, listed in an index.
    *(f"{part}/{Path(weights).stem}{end}" for part, weights in WEIGHTS.items() for end in SHARDS),
]
HUB_ERRORS = (OSError, ValueError, RuntimeError, HTTPError)  # raised by huggingface_hub
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def is_hub_id(source: str | Path) -> bool:
    """Return whether a source that is not a local folder can be a repository on the Hub: owner/name."""
    return str(source).count("/") == 1 and not str(source).startswith((".", "/", "~"))


def download(repo_id: str, files: Sequence[str] = FILES, **options: Any) -> Path:
    """Download a pipeline from the Hub into huggingface_hub's cache.

    Weights that a repository stores only in half precision are downloaded as such.

    Args:
        files: Names or patterns of the files to download.
        options: huggingface_hub's revision, token, cache_dir and local_files_only.

    Returns:
        The local folder.
    """
    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=[*files], **options))
        missing = _missing_weights(folder, files)
        if missing and not options.get("local_files_only"):
            api = huggingface_hub.HfApi(token=options.get("token"))
            names = api.list_repo_files(repo_id, revision=options.get("revision"))
            if halves := [half for file in missing if (half := in_half(file)) in names]:
                folder = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=halves, **options))
            for file in map(PurePosixPath, _missing_weights(folder, files)):
                siblings = [name for name in names if PurePosixPath(name).parent == file.parent]
                _refuse_pickle(str(PurePosixPath(repo_id, file.parent)), siblings, file.name)
    except UserError:
        raise
    except HUB_ERRORS as error:
        check_cache(error, options.get("cache_dir") or huggingface_hub.constants.HF_HUB_CACHE, "HF_HUB_CACHE")
        reason = first_line(error)
        if isinstance(error, LocalEntryNotFoundError):
            reason = "local_files_only" if options.get("local_files_only") else first_line(error.__cause__ or error)
        raise UserError(
            f"{repo_id}: not a local folder, and not available from the Hub or its cache ({reason}); check the name "
            "and the network"
        ) from error
    return folder


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload a folder to a new or existing repository on the Hub, as one commit, and return its URL."""
    api = huggingface_hub.HfApi(token=token)
    hint = "; check the name, the network and the token (hf auth login)"
    with user_errors(f"{repo_id}: could not be uploaded to the Hub", *HUB_ERRORS, hint=hint):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a cond_diffusion pipeline")
    return str(url)


def in_half(name: str) -> str:
    """Return the file name that diffusers and transformers use for the same weights in half precision."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.fp16.{suffix}"


def variant_of(folder: Path, name: str) -> str | None:
    """Return the `variant` argument of diffusers and transformers: "fp16" if there are only half-precision weights."""
    has_full_precision = any((folder / file).exists() for file in (name, f"{name}.index.json"))
    return "fp16" if (folder / in_half(name)).exists() and not has_full_precision else None


def _has_weights(folder: Path, name: str) -> bool:
    """Return whether a folder contains these weights, in any precision, as one file or sharded."""
    return any((folder / file).exists() for file in (name, f"{name}.index.json", in_half(name)))


def _missing_weights(folder: Path, files: Sequence[str]) -> list[str]:
    """Return the weights among `files` that are missing from existing subfolders, or all if no weights exist."""
    weights = [name for name in files if name.endswith(".safetensors") and "*" not in name]
    missing = [name for name in weights if not _has_weights(folder, name)]
    return [name for name in missing if missing == weights or ("/" in name and (folder / name).parent.is_dir())]


def refuse_pickles(folder: Path, expected: str) -> None:
    """Raise UserError if a folder contains pickled weights instead of the file `expected`."""
    if folder.is_dir() and not _has_weights(folder, expected):
        _refuse_pickle(str(folder), (file.name for file in sorted(folder.iterdir())), expected)


def _refuse_pickle(where: str, names: Iterable[str], expected: str) -> None:
    for name in names:
        if name.endswith(PICKLES):
            raise UserError(
                f"{where}: {Path(name).name} is a pickle file, which can execute code when loaded; expected {expected}"
            )
