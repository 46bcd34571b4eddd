"""The config of a run: its sections, read from a YAML file and `key=value` overrides, and written back."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.sampling import HIGHEST_SCALE, SamplingOptions
from cond_diffusion.config.schedule import READING_OFFSET, ScheduleConfig
from cond_diffusion.config.schema import from_override, from_yaml, merge, read_text, section, to_yaml
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.errors import UserError

Count = Annotated[int, Field(ge=1)]
CountOrNever = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@section("train")
@dataclass(frozen=True)
class TrainConfig:
    batch_size: Count = Field(
        default=64,
        description="samples in one forward pass of one process; a step sees `batch_size` x "
        "`gradient_accumulation_steps` x processes",
    )
    max_steps: Count = Field(default=10_000, description="optimizer steps")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="`adamw`, or `muon`, which needs fewer images and whole matrices: not with FSDP"
    )
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False, description="peak learning rate")
    learning_rate_schedule: Literal["constant", "cosine", "warmup_stable_decay"] = Field(
        default="cosine",
        description="`cosine` falls to 0 at `max_steps`, `warmup_stable_decay` in the last `decay_steps`, `constant` "
        "not at all",
    )
    warmup_steps: CountOrNever = Field(default=200, description="steps of linear warm-up")
    decay_steps: CountOrNever = Field(default=1000, description="steps in which `warmup_stable_decay` falls to 0")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    max_bad_steps: Count = Field(
        default=10, description="consecutive steps with non-finite gradients, which are skipped, before the run stops"
    )
    gradient_accumulation_steps: Count = Field(default=1, description="forward passes of each process in one step")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="`no`, `bf16` or `fp16`; a CPU without bf16 instructions uses fp32"
    )
    tf32: bool = Field(default=True, description="allow TF32 for fp32 matrix products on GPUs")
    compile: bool = Field(default=False, description="compile the network; a minute or more before the first step")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations: less memory, more time")
    ema_width: float = Field(
        default=0.1,
        gt=0,
        le=0.28,
        description="relative width of the average of the weights (sigma_rel, Karras et al. 2024)",
    )
    snapshots: CountOrNever = Field(
        default=0, description="number of times in a run that two averages are stored for `--ema-width`; 0 stores none"
    )
    caption_dropout: Share = Field(default=0.1, description="probability that a caption is replaced by the empty one")
    lora_rank: CountOrNever = Field(
        default=0, description="train LoRA matrices of this rank only; 0 trains all weights"
    )
    checkpoint_every: CountOrNever = Field(
        default=1000, description="steps between checkpoints; 0 writes the last one only"
    )
    keep_checkpoints: Count = Field(
        default=3, description="newest checkpoints to keep, in addition to the one with the lowest held-out loss"
    )
    sample_every: CountOrNever = Field(default=1000, description="steps between sample grids; 0 is never")
    evaluate_every: CountOrNever = Field(
        default=1000, description="steps between validations on held-out images; 0 is never"
    )
    log_every: Count = Field(default=50, description="steps between lines of `metrics.jsonl`")


@section("sample")
@dataclass(frozen=True)
class SampleConfig:
    """The grids: one column for each prompt."""

    prompts: tuple[str, ...] = Field(default=(), description="prompts of the sample grids, one column each")
    num_images: Count = Field(default=4, description="rows of the grids")
    guidance_scale: float = Field(default=3.0, ge=0, le=HIGHEST_SCALE, description="guidance scale of the grids")
    steps: Count = Field(default=100, description="sampling steps of the grids")

    def sampling_options(self, num_timesteps: int) -> SamplingOptions:
        """Return the options that the grids are sampled with."""
        steps = min(self.steps, num_timesteps)
        return SamplingOptions(num_images=self.num_images, guidance_scale=self.guidance_scale, steps=steps)


CONFIG_NAME = "config.yaml"  # in a run and in each of its checkpoints

PredictionKind = Literal["epsilon", "sample", "score", "v_prediction"]
Loss = Literal["epsilon", "sample", "v_prediction", "min_snr", "variational_bound"]
TimestepDensity = Literal["uniform", "logit_normal", "loss_weight"]

Schema = TypeVar("Schema")


@section("text")
@dataclass(frozen=True)
class TextConfig:
    encoder: str = Field(default="builtin", description="`builtin`, a hub id, or a folder with a CLIP")
    max_length: int | None = Field(
        default=None, ge=3, description="tokens that every caption is padded or cut to; default: the encoder's own"
    )


@section("latent")
@dataclass(frozen=True)
class LatentConfig:
    patch_size: int = Field(
        default=1, ge=1, description="side of the patches of pixels that become channels; 1 is none"
    )
    vae: str | None = Field(
        default=None, description="a hub id or a folder with an `AutoencoderKL`, in whose latents diffusion happens"
    )

    def __post_init__(self) -> None:
        if self.vae is not None and self.patch_size != 1:
            raise UserError(f"latent.patch_size: {self.patch_size} is for pixels; with latent.vae it must be 1")


@section("objective")
@dataclass(frozen=True)
class ObjectiveConfig:
    prediction: PredictionKind = Field(
        default="epsilon", description="what the network predicts: `epsilon`, `sample`, `score`, `v_prediction`"
    )
    loss: Loss = Field(
        default="epsilon",
        description="weights of the timesteps: `epsilon`, `sample`, `v_prediction`, `min_snr`, `variational_bound`",
    )
    min_snr_gamma: float = Field(default=5.0, gt=0, description="gamma of `min_snr`")
    timesteps: TimestepDensity = Field(
        default="uniform",
        description="which t are sampled more often, the loss being divided by it: `uniform`, `logit_normal` (Esser et "
        "al. 2024, eq. 19), `loss_weight`",
    )


@section("")
@dataclass(frozen=True)
class Config:
    """A whole run."""

    run_dir: str = Field(default="runs/new", description="folder of the run; an existing one is never overwritten")
    seed: int = Field(default=0, description="seed of everything random: order, noise, timesteps, initial weights")
    resume: Annotated[bool | str, Field(union_mode="left_to_right")] = Field(
        default=False,
        description="`true`: continue from the newest checkpoint in `run_dir`, if there is one; `step-00001000`: from "
        "that one; later ones are renamed",
    )
    init_from: str | None = Field(
        default=None,
        description="a run, a checkpoint or a hub id to start from, which decides all that its weights depend on",
    )
    track: str | None = Field(default=None, description="`tensorboard`, or another of Accelerate's trackers")
    data: DataConfig = Field(default_factory=DataConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    latent: LatentConfig = Field(default_factory=LatentConfig)
    unet: UNetConfig = Field(default_factory=UNetConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if isinstance(self.resume, str) and not re.fullmatch(r"step-\d{8,}", self.resume):
            raise UserError(f"resume: {self.resume!r}; expected true, false or a checkpoint such as step-00001000")
        leading = self.schedule.spacing in READING_OFFSET
        if self.latent.vae is not None and leading and self.schedule.steps_offset == 0:
            raise UserError("schedule.steps_offset: 0; with latent.vae and leading it must be 1, as diffusers has it")
        if self.latent.vae is not None and self.schedule.clip_x_0:
            raise UserError("schedule.clip_x_0: latents have no range to be kept in; with latent.vae it must be false")


@section("")
@dataclass(frozen=True)
class ClipPretrainingConfig:
    """A small CLIP: both halves have the same width, depth and number of heads."""

    run_dir: str = Field(default="runs/clip", description="folder of the CLIP; an existing one is never overwritten")
    seed: int = Field(default=0, description="seed of everything random")
    data: DataConfig = Field(default_factory=DataConfig)
    test_split: str = Field(default="test", description="split that the zero-shot accuracy is measured on")
    vocab_size: int = Field(default=1000, ge=514, description="tokens: all bytes twice, two marks, and merges")
    max_length: int = Field(default=16, ge=3, description="tokens that a caption is padded or cut to")
    patch_size: int = Field(default=4, ge=1, description="side of the image patches")
    width: int = Field(default=64, ge=1, description="width of both halves")
    layers: int = Field(default=4, ge=1, description="transformer layers of both halves")
    num_heads: int = Field(default=4, ge=1, description="attention heads of both halves")
    batch_size: int = Field(default=256, ge=1, description="images in one step")
    max_steps: int = Field(default=1000, ge=1, description="optimizer steps")
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False, description="peak learning rate")
    warmup_steps: int = Field(default=100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="decoupled weight decay")

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.max_steps:
            raise UserError(f"warmup_steps: {self.warmup_steps} must be less than max_steps ({self.max_steps})")
        if self.width % self.num_heads:
            raise UserError(f"width: {self.width} must be divisible by num_heads ({self.num_heads})")
        if self.data.resolution % self.patch_size:
            raise UserError(f"patch_size: {self.patch_size} does not divide data.resolution ({self.data.resolution})")


def load_config(schema: type[Schema], file: Path | None = None, overrides: list[str] | None = None) -> Schema:
    """Merge the defaults of `schema`, then the file, then the `key=value` overrides, the later one winning.

    Raises UserError, with the full key, for an unknown key, a wrong type or a value that is not allowed.
    """
    fields: dict[str, Any] = {} if file is None else from_yaml(schema, read_text(file, "--config"), f"--config: {file}")
    for override in overrides or []:
        fields = merge(fields, from_override(schema, override), schema)
    return schema(**fields)


def save_config(config: Any, file: Path) -> None:
    """Write every field of `config`, defaults too, as YAML that `load_config` reads back equal."""
    file.write_text(to_yaml(config), encoding="utf-8")
