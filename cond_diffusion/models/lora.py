"""Low-rank adaptation (Hu et al. 2022): the weights stay as they are, and each of some matrices W gets a sum B A of
rank r added to it, which is all that is trained. By peft, whose names for A and B diffusers reads.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cond_diffusion.errors import UserError, first_line
from cond_diffusion.files import hash_weights
from cond_diffusion.hub import download, refuse_pickles
from cond_diffusion.models.unet import UNet

FILE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers' load_lora_weights looks for
MATRICES = ["to_q", "to_k", "to_v", "to_out.0"]  # of attention, as in diffusers' examples
PREFIX, BASE = "unet.", ".base_layer"  # diffusers' for the network's; peft's for what stays


def add_lora(unet: UNet, rank: int) -> None:
    """Freeze a network's weights, and give the matrices of its attention something to train: A random, B zero.

    A is drawn from torch's global state. alpha is the rank, so that B A is added as it is.
    """
    import peft  # an extra

    unet.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=MATRICES)
    peft.inject_adapter_in_model(config, unet)


def has_lora(unet: UNet) -> bool:
    """Say whether something was added to a network's matrices."""
    return any(".lora_A." in name for name, _ in unet.named_parameters())


@torch.no_grad()
def merged(unet: UNet, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a plain network: those of `unet` that stay, with B A of `lora` added."""
    weights: dict[str, Tensor] = {}
    for name, weight in unet.named_parameters():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".weight").removesuffix(BASE)
        down = lora.get(f"{stem}.lora_A.default.weight") if name.endswith(f"{BASE}.weight") else None
        value = weight.detach()
        if down is not None:
            up = lora[f"{stem}.lora_B.default.weight"]
            value = value.to(down.device) + up @ down
        weights[name.replace(BASE, "")] = value
    return weights


def digest_of_base(unet: UNet) -> str:
    """Return a hash of the weights that stay: B A means something only beside them."""
    digest = hashlib.blake2b(digest_size=16)
    named = unet.named_parameters()
    hash_weights(digest, ((name.replace(BASE, ""), weight) for name, weight in named if ".lora_" not in name))
    return digest.hexdigest()


def save_lora(lora: Mapping[str, Tensor], folder: Path) -> None:
    """Write A and B as diffusers' `load_lora_weights` reads them."""
    named = {PREFIX + name.replace(".default", ""): weight.contiguous() for name, weight in lora.items()}
    save_file(named, folder / FILE_NAME, metadata={"format": "pt"})


@torch.no_grad()
def add_lora_file(unet: UNet, source: str | Path, **options: Any) -> None:
    """Add to a network's weights what a file of LoRA says, ours or diffusers', times alpha / rank.

    source: the file, a folder with it, or a hub id, with the `options` of `hub.download`.

    Raises UserError where it cannot be read, or is for another network.
    """
    file = Path(source)
    if not file.exists():
        try:
            file = download(str(source), [FILE_NAME], **options)
        except UserError as error:
            raise UserError(f"lora: {error}") from error
    if file.is_dir():
        refuse_pickles(file, FILE_NAME)
        file = file / FILE_NAME
    try:
        with safe_open(file, "pt") as opened:
            settings = dict(json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}")))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"lora: {file} cannot be read ({first_line(error)}); expected safetensors") from error
    if other := next((name for name in ("alpha_pattern", "use_rslora") if settings.get(f"{PREFIX}{name}")), None):
        raise UserError(f"lora: {file} scales its matrices by {other}, which is not supported")
    weights = dict(unet.named_parameters())
    while tensors:
        name = next(iter(tensors))
        stem = name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".lora_A").removesuffix(".lora_B")
        up, down = (tensors.pop(f"{PREFIX}{stem}.lora_{part}.weight", None) for part in "BA")
        if up is None or down is None:
            raise UserError(f"lora: {file}: {name} is not what diffusers writes for a UNet: lora_A, lora_B")
        weight = weights.get(f"{stem}.weight")
        if weight is None or weight.shape != up.shape[:1] + down.shape[1:]:
            there = "has none of that name" if weight is None else f"has {tuple(weight.shape)}"
            shape = (*up.shape[:1], *down.shape[1:])
            raise UserError(f"lora: {file} is for another model: it changes {stem}, {shape}, and this UNet {there}")
        scale = settings.get(f"{PREFIX}lora_alpha", len(down)) / len(down)
        weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape).to(weight)


def load_lora(folder: Path) -> dict[str, Tensor]:
    """Invert `save_lora`."""
    return {
        name.removeprefix(PREFIX).removesuffix(".weight") + ".default.weight": weight
        for name, weight in load_file(folder / FILE_NAME).items()
    }
