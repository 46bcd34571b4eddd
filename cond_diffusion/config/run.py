"""Configs: the modules' own frozen dataclasses, merged from defaults, a YAML file and `key=value` words.

The only user of OmegaConf. Behind this module a config is a plain frozen dataclass; an unknown key, a wrong type or a
value that cannot be is a `UserError` whose one line names the full key.
"""

import argparse
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.schedule import READING_OFFSET, ScheduleConfig
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.diffusion.guidance import HIGHEST_SCALE
from cond_diffusion.diffusion.objective import Objective, ObjectiveConfig
from cond_diffusion.diffusion.sampler_config import SamplerConfig
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError, did_you_mean, first_line
from cond_diffusion.models.latents import LatentConfig
from cond_diffusion.models.text_encoder import TextConfig

CONFIG_NAME = "config.yaml"  # in a run and in each of its checkpoints

Schema = TypeVar("Schema")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    batch_size: samples in one forward pass of one process. A step sees batch_size x gradient_accumulation_steps x
    processes.
    optimizer: see `muon.py`.
    learning_rate, learning_rate_schedule, warmup_steps: the peak; what follows the linear warm-up to it.
    decay_steps: how many of the last steps the schedule "warmup_stable_decay" falls in.
    max_bad_steps: how many steps in a row may have gradients that are not finite, and be skipped, before the run ends.
    mixed_precision, tf32: what a GPU computes in; a CPU stays with fp32 unless it has instructions for bf16.
    compile: let torch.compile fuse the network's operations, which takes a minute or more before the first step.
    gradient_checkpointing: keep less for the backward pass, and compute it again there: less memory, more time.
    ema_width: the width of the average of the weights, as a share of the training so far (Karras et al. 2024,
    sigma_rel).
    snapshots: how often in a run that average, and one of half its width, are kept for `sample.py --ema-width`.
    lora_rank: train no more than what LoRA adds to the matrices of attention, of this rank; 0 trains all weights.
    caption_dropout: how often a caption is replaced by the empty one, so that the network learns to do without it, too.
    checkpoint_every, sample_every, evaluate_every, log_every: in steps; 0 is never (the last step always writes a
    checkpoint).
    """

    batch_size: int = 64
    max_steps: int = 10_000
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    learning_rate_schedule: Literal["constant", "cosine", "warmup_stable_decay"] = "cosine"
    warmup_steps: int = 200
    decay_steps: int = 1000
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_bad_steps: int = 10
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    tf32: bool = True
    compile: bool = False
    gradient_checkpointing: bool = False
    ema_width: float = 0.1
    snapshots: int = 16
    caption_dropout: float = 0.1
    lora_rank: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    sample_every: int = 1000
    evaluate_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        counts = ("batch_size", "max_steps", "gradient_accumulation_steps", "max_bad_steps", "keep_checkpoints")
        for name in (*counts, "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}: {getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name}: {getattr(self, name)} must be above 0")
        for name in ("learning_rate", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"train.{name}: {getattr(self, name)} must be a finite number")
        never_at_0 = ("snapshots", "checkpoint_every", "sample_every", "evaluate_every")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "lora_rank", *never_at_0):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name}: {getattr(self, name)} must not be negative")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"train.caption_dropout: {self.caption_dropout} is a probability: expected 0 to 1")
        if not 0 < self.ema_width <= 0.28:
            raise UserError(f"train.ema_width: {self.ema_width} must lie above 0 and at most at 0.28")


@dataclass(frozen=True)
class SampleConfig:
    """The grid that training draws every `train.sample_every` steps, one column a prompt, by a chain of `steps`."""

    prompts: tuple[str, ...] = ()
    num_images: int = 4
    guidance_scale: float = 3.0
    steps: int = 100

    def __post_init__(self) -> None:
        for name in ("num_images", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"sample.{name}: {getattr(self, name)} must be at least 1")
        if not 0 <= self.guidance_scale <= HIGHEST_SCALE:
            raise UserError(f"sample.guidance_scale: {self.guidance_scale} must lie between 0 and {HIGHEST_SCALE}")


@dataclass(frozen=True)
class Config:
    """A whole run.

    resume: true goes on from the newest checkpoint in `run_dir`; step-00001000 from that one.
    init_from: a run, a checkpoint or a hub id to begin with. It decides all that its weights depend on.
    track: one of Accelerate's trackers, such as tensorboard, which is then told what `metrics.jsonl` is told.
    """

    run_dir: str = "runs/new"
    seed: int = 0
    resume: bool | str = False
    init_from: str | None = None
    track: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if isinstance(self.resume, str) and not re.fullmatch(r"step-\d{8,}", self.resume):
            raise UserError(f"resume: {self.resume!r}; expected true, false or a checkpoint such as step-00001000")
        # Both raise, before anything is loaded, where the sections do not go together.
        schedule = NoiseSchedule(self.schedule)
        Objective(self.objective, schedule)
        leading = self.schedule.spacing in READING_OFFSET
        if self.latent.vae is not None and leading and self.schedule.steps_offset == 0:
            raise UserError("schedule.steps_offset: 0; with latent.vae and leading it must be 1, as diffusers has it")
        if self.latent.vae is not None and self.schedule.clip_x_0:
            raise UserError("schedule.clip_x_0: latents have no range to be kept in; with latent.vae it must be false")
        SamplerConfig().timesteps(schedule, min(self.sample.steps, schedule.num_timesteps))


def config_parser(description: str, default: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser for `[--config FILE] [key=value ...]`, whose `config` and `overrides` go to `load_config`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        type=Path,
        default=default,
        metavar="FILE",
        help=f"a YAML file, or the name of one that comes along (default: {default})",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.batch_size=64")
    return parser


def load_config(schema: type[Schema], file: Path | None = None, overrides: list[str] | None = None) -> Schema:
    """Merge the defaults of `schema`, then the file, then the `key=value` words, the later one winning."""
    merged = OmegaConf.structured(schema)
    try:
        if file is not None:
            merged = OmegaConf.merge(merged, _read_yaml(file))
        merged = OmegaConf.merge(merged, _read_words(overrides or []))
        config: Any = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        known = list(_keys(asdict(schema())))  # type: ignore[call-overload]
        raise UserError(
            f"there is no config key {error.full_key!r}{did_you_mean(str(error.full_key), known)}"
        ) from error
    except OmegaConfBaseException as error:
        message = first_line(error)
        if "$VALUE" in message:  # of an item of a list OmegaConf names neither the value nor the key
            message = f"{', '.join(overrides or []) or file}: an item of a list has the wrong type"
        raise UserError(f"{error.full_key}: {message}" if error.full_key else message) from error
    return config


def checkpoint_config(folder: Path | None) -> Config:
    """Return the config of the run that wrote a checkpoint; raise UserError where the folder does not hold it."""
    assert folder is not None  # of a pipeline that was loaded, not made in code
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise UserError(
            f"--checkpoint: {folder} has no config.yaml, so its data are unknown; expected a run's checkpoint"
        )
    return load_config(Config, file)


def save_config(config: Any, file: Path) -> None:
    """Write every key of `config`, defaults too, as YAML that `load_config` reads back."""
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _read_words(words: list[str]) -> Any:
    for word in words:
        if "=" not in word:
            raise UserError(f"{word!r} is no override; expected key=value, for example train.batch_size=64")
        try:
            OmegaConf.from_dotlist([word])
        except yaml.YAMLError as error:
            raise UserError(f"{word!r} cannot be read as key=value: {' '.join(str(error).split())}") from error
    return OmegaConf.from_dotlist(words)


def _read_yaml(file: Path) -> Any:
    try:
        content = OmegaConf.load(file)
    except FileNotFoundError as error:
        there = sorted(map(str, file.parent.glob("*.yaml"))) if file.parent.is_dir() else []
        raise UserError(f"--config: no file {file}{did_you_mean(str(file), there)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"--config: {file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(content):
        raise UserError(f"--config: {file} holds no `key: value` lines")
    return content


def _keys(tree: dict[str, Any], prefix: str = ""):
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
