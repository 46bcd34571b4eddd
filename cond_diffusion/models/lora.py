"""Low-rank adaptation (LoRA, Hu et al. 2022): the weights are frozen, and a trained product B A of rank r is added to
each matrix of attention. Uses peft, whose parameter names diffusers loads.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cond_diffusion.config.schema import PositiveFloat, from_json, parse_json
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.files import check_finite, hash_weights, load_tensors, save_tensors
from cond_diffusion.hub import download, refuse_pickles
from cond_diffusion.models.unet import UNet

FILE_NAME = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights expects
TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]  # those of diffusers' examples
PREFIX = "unet."  # of names in diffusers' files
BASE = ".base_layer"  # of frozen weights in peft


def add_lora(unet: UNet, rank: int) -> None:
    """Freeze the weights and add LoRA to attention, in place: A random, B zero, alpha = rank (no scaling).

    A is initialized from torch's global random state.
    """
    import peft  # optional

    unet.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGET_MODULES), unet)


@torch.no_grad()
def merged(unet: UNet, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a plain network: the frozen ones of `unet` plus B A of `lora`."""
    weights: dict[str, Tensor] = {}
    for name, weight in unet.named_parameters():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".weight").removesuffix(BASE)
        down = lora.get(f"{stem}.lora_A.default.weight") if name.endswith(f"{BASE}.weight") else None
        value = weight.detach()
        if down is not None:
            value = value.to(down.device) + lora[f"{stem}.lora_B.default.weight"] @ down
        weights[name.replace(BASE, "")] = value
    return weights


def digest_of_base(unet: UNet) -> str:
    """Return a hash of the frozen weights, to which A and B belong."""
    digest = hashlib.blake2b(digest_size=16)
    named = unet.named_parameters()
    hash_weights(digest, ((name.replace(BASE, ""), weight) for name, weight in named if ".lora_" not in name))
    return digest.hexdigest()


def save_lora(lora: Mapping[str, Tensor], folder: Path) -> None:
    """Write A and B in the format of diffusers' `load_lora_weights`."""
    named = {PREFIX + name.replace(".default", ""): weight.contiguous() for name, weight in lora.items()}
    save_tensors(named, folder / FILE_NAME, {"format": "pt"})


@torch.no_grad()
def add_lora_file(unet: UNet, source: str | Path, **options: Any) -> None:
    """Add (alpha / rank) B A of a LoRA file, from this package or diffusers, to the weights of a network, in place.

    Args:
        source: The file, a folder that contains it, or a Hub id.
        **options: Those of `hub.download`.
    """
    file = Path(source)
    with user_errors(f"lora: {source!s:.80} cannot be read", OSError):
        exists = file.exists()
    if not exists:
        try:
            file = download(str(source), [FILE_NAME], **options)
        except UserError as error:
            raise UserError(f"lora: {error}") from error
    if file.is_dir():
        refuse_pickles(file, FILE_NAME)
        file = file / FILE_NAME
    with user_errors(f"lora: {file} cannot be read", OSError, SafetensorError, hint="; expected safetensors"):
        tensors = load_tensors(file)
        with safe_open(file, "pt") as opened:
            metadata = parse_json((opened.metadata() or {}).get("lora_adapter_metadata", "{}"), f"lora: {file}")
    metadata = {name.removeprefix(PREFIX): value for name, value in metadata.items()}
    alpha = from_json(PositiveFloat | None, metadata.get("lora_alpha"), f"lora: {file}: lora_alpha")  # None: the rank
    if other := next((name for name in ("alpha_pattern", "use_rslora") if metadata.get(name)), None):
        raise UserError(f"lora: {file} scales its matrices by {other}, which is not supported")
    weights = dict(unet.named_parameters())
    while tensors:
        name = next(iter(tensors))
        stem = name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".lora_A").removesuffix(".lora_B")
        up, down = (tensors.pop(f"{PREFIX}{stem}.lora_{part}.weight", None) for part in "BA")
        if up is None or down is None:
            raise UserError(f"lora: {file}: unexpected tensor {name}; expected pairs lora_A, lora_B of a UNet")
        weight, shape = weights.get(f"{stem}.weight"), (*up.shape[:1], *down.shape[1:])
        if weight is None or weight.shape != shape:
            expected = "no such matrix" if weight is None else f"shape {tuple(weight.shape)}"
            raise UserError(
                f"lora: {file} is for another model: it changes {stem} of shape {shape}; this UNet has {expected}"
            )
        with user_errors(
            f"lora: {file}: {stem}: A and B do not fit together", RuntimeError, IndexError, ZeroDivisionError
        ):
            change = up.float().flatten(1) @ down.float().flatten(1)
            change = (1 if alpha is None else alpha / len(down)) * change.reshape(weight.shape).to(weight)
        check_finite([(stem, change)], f"lora: {file}")
        weight += change


def load_lora(folder: Path) -> dict[str, Tensor]:
    """Load A and B from the file that `save_lora` writes."""
    return {
        name.removeprefix(PREFIX).removesuffix(".weight") + ".default.weight": weight
        for name, weight in load_tensors(folder / FILE_NAME).items()
    }
