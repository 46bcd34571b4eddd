"""Training that begins with what somebody has trained: any pipeline that can be drawn from, Stable Diffusion too."""

import importlib.util
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cond_diffusion.config.run import CONFIG_NAME, Config, load_config
from cond_diffusion.errors import UserError
from cond_diffusion.models.latents import LatentConfig, Patches
from cond_diffusion.models.text_encoder import TextConfig, TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.pretrained import find_checkpoint, read_latent_space, read_prediction


def adopted(config: Config, newest: Path | None) -> tuple[Config, dict[str, Tensor] | None]:
    """Return the config with all that `init_from` decides - the network, what it predicts, its schedule, where
    diffusion happens, who reads the captions - and the weights to begin with; None where there are none to be read.

    newest: the checkpoint that a run goes on from. It has decided all that already, and holds the weights itself, but
    for those beside which LoRA is trained.

    Raises UserError where the config says something else.
    """
    if config.init_from is None:
        if config.train.lora_rank:
            raise UserError("train.lora_rank: there is nothing to add to; expected init_from beside it")
        return config, None
    if config.train.lora_rank and importlib.util.find_spec("peft") is None:
        raise UserError('train.lora_rank needs peft; install it: pip install "cond_diffusion[lora]"')
    if newest is not None:
        before = load_config(Config, newest / CONFIG_NAME)
        if before.init_from is None:
            raise UserError("resume: this run did not begin with init_from; leave it out")
        found = {name: getattr(before, name) for name in ("unet", "schedule", "latent", "text")}
        kind, source = before.objective.prediction, Path(before.init_from)
        if config.train.lora_rank and not source.is_dir():
            source = find_checkpoint(config.init_from)
        unet = UNet.from_pretrained(source / "unet") if config.train.lora_rank else None
    else:
        source = find_checkpoint(config.init_from)
        space, prediction = read_latent_space(source), read_prediction(source)
        unet = UNet.from_pretrained(source / "unet")
        found = {
            # It draws other sizes, too.
            "unet": replace(unet.config, sample_size=None),
            "schedule": prediction.schedule.config,
            "latent": LatentConfig(space.downscaling) if isinstance(space, Patches) else LatentConfig(vae=str(source)),
            "text": _text(source),
        }
        kind = prediction.kind
    for section, values in found.items():
        given, default = asdict(getattr(config, section)), asdict(type(values)())
        for field in fields(values):
            _check(f"{section}.{field.name}", given[field.name], default[field.name], asdict(values)[field.name])
    _check("objective.prediction", config.objective.prediction, "epsilon", kind)
    changed: dict[str, Any] = {**found, "objective": replace(config.objective, prediction=kind)}
    weights = None if unet is None else dict(unet.state_dict())
    return replace(config, **changed, init_from=str(source)), weights


def text_encoder_of(config: Config, newest: Path | None) -> TextEncoder:
    """Return who reads a run's captions: the encoder that the checkpoint holds which it goes on from or begins with,
    whatever has become of the one that this was trained with; where there is none, the config's.
    """
    return TextEncoder.from_pretrained(newest or config.init_from or config.text.encoder, config.text.max_length)


def _text(source: Path) -> TextConfig:
    """Return who reads the captions of a pipeline, by the name that its run had for it: that may be a whole CLIP's, of
    which the pipeline holds the half that reads.
    """
    if (source / CONFIG_NAME).is_file():
        return load_config(Config, source / CONFIG_NAME).text
    return TextConfig(str(source), TextEncoder.from_pretrained(source, None).max_length)


def _check(key: str, given: Any, default: Any, found: Any) -> None:
    if given not in (default, found):
        raise UserError(f"init_from: {key} is {found!r} there, and {given!r} here; leave it out")
