"""The config of a run: sections that are read from YAML and `key=value` overrides, and saved as YAML."""

import math
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.sampling import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    GUIDANCE_OF_MODEL,
    MAX_GUIDANCE_SCALE,
    Precision,
)
from cond_diffusion.config.schedule import SPACINGS_WITH_OFFSET, ScheduleConfig
from cond_diffusion.config.schema import (
    Fraction,
    LocalPath,
    NonNegativeInt,
    PositiveInt,
    Schema,
    Seed,
    from_override,
    from_yaml,
    option,
    read_text,
    section,
    to_yaml,
)
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.errors import UserError
from cond_diffusion.files import write_file

CONFIG_NAME = "config.yaml"  # in a run folder and in each of its checkpoints
PRETRAIN = "pretrain"

PredictionKind = Literal["epsilon", "sample", "score", "v_prediction"]
Loss = Literal["epsilon", "sample", "v_prediction", "min_snr", "clamped_snr", "variational_bound"]
TimestepDensity = Literal["uniform", "logit_normal", "loss_weight", "later"]


@section("train")
class TrainConfig:
    """Optimization, averaging, checkpoints and logging."""

    batch_size: PositiveInt = option(
        64, "samples per forward pass and process; a step uses `batch_size` x `gradient_accumulation_steps` x processes"
    )
    max_steps: PositiveInt = option(10_000, "optimizer steps")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "`adamw`, or `muon`, which needs fewer images but does not support FSDP"
    )
    learning_rate: float = option(1e-3, "peak learning rate", gt=0, allow_inf_nan=False)
    learning_rate_schedule: Literal["constant", "cosine", "warmup_stable_decay"] = option(
        "cosine",
        "`cosine` decays to 0 at `max_steps`, `warmup_stable_decay` in the last `decay_steps`, `constant` not at all",
    )
    warmup_steps: NonNegativeInt = option(200, "steps of linear warm-up")
    decay_steps: NonNegativeInt = option(1000, "steps in which `warmup_stable_decay` decays to 0")
    weight_decay: float = option(0.0, "decoupled weight decay", ge=0, allow_inf_nan=False)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", gt=0)
    max_bad_steps: PositiveInt = option(
        10, "consecutive steps with non-finite gradients, which are skipped, before the run stops"
    )
    gradient_accumulation_steps: PositiveInt = option(1, "forward passes of each process in one step")
    mixed_precision: Literal[Precision, "no"] | None = option(
        "auto",
        "`fp32` or `no`, `bf16`, `fp16`, or `auto`: that of `accelerate launch`, or else `bf16` where the hardware is "
        "faster in it; a CPU without bf16 instructions uses fp32",
    )
    tf32: bool = option(True, "allow TF32 for fp32 matrix products on GPUs")
    compile: bool = option(False, "compile the network; adds a minute or more before the first step of a first run")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    ema_width: float = option(
        0.1, "relative width of the average of the weights (sigma_rel, Karras et al. 2024)", ge=1e-3, le=0.28
    )
    snapshots: NonNegativeInt = option(
        0, "number of times in a run that two averages are stored for `--ema-width`; 0 stores none"
    )
    first_caption: Fraction = option(
        0.0, "probability of using the first of an image's captions instead of a random one"
    )
    caption_dropout: Fraction = option(0.1, "probability that a caption is replaced by the empty one")
    phrase_dropout: Fraction = option(
        0.0,
        "probability that a phrase of a caption of several is left out (commas separate phrases), so that the network "
        "learns each by itself; captions are then encoded in each step",
    )
    lora_rank: NonNegativeInt = option(0, "train LoRA matrices of this rank only; 0 trains all weights")
    checkpoint_every: NonNegativeInt = option(1000, "steps between checkpoints; 0 writes the last one only")
    keep_checkpoints: PositiveInt = option(
        3, "number of newest checkpoints to keep, in addition to the one with the lowest held-out loss"
    )
    sample_every: NonNegativeInt = option(1000, "steps between sample grids; 0 is never")
    evaluate_every: NonNegativeInt = option(1000, "steps between validations on held-out images; 0 is never")
    log_every: PositiveInt = option(50, "steps between lines of `metrics.jsonl`")


@section("sample")
class SampleConfig:
    """Sample grids during training, with one column per prompt."""

    prompts: tuple[str, ...] = option(
        (), "prompts of the sample grids, one column each; default: eight captions of the data, unless streamed"
    )
    num_images: PositiveInt = option(4, "rows of the grids")
    guidance_scale: float = option(
        DEFAULT_GUIDANCE_SCALE,
        "guidance scale of the grids, and the default of sampling from the model in pixel space",
        ge=0,
        le=MAX_GUIDANCE_SCALE,
    )
    phrase_guidance: Fraction = option(
        0.0,
        "fraction of the guidance of the grids that comes from the phrases of a prompt, each by itself; also the "
        "default of sampling from the model in pixel space",
    )
    first_phrase_from: NonNegativeInt = option(
        0,
        "lowest timestep at which phrase guidance includes the first of several phrases, which names the subject; for "
        "the grids, and the default of sampling from the model in pixel space",
    )
    steps: PositiveInt = option(DEFAULT_STEPS, "sampling steps of the grids")

    @property
    def guidance(self) -> dict[str, Any]:
        """The options that are also defaults of the model."""
        return {name: getattr(self, name) for name in GUIDANCE_OF_MODEL}


@section("text")
class TextConfig:
    """The frozen text encoder."""

    encoder: LocalPath = option(
        "builtin",
        "`builtin` (digits), `emoji`, a Hub id, a folder with a CLIP, or `pretrain`: first train a small CLIP on the "
        "data, in `run_dir`",
    )
    pretrain_steps: PositiveInt = option(1000, "steps of `encoder: pretrain`")
    max_length: PositiveInt | None = option(
        None,
        "number of tokens that captions are padded or truncated to; default: the encoder's own, with `pretrain` that "
        "of the longest caption, 16 to 77",
        ge=3,
    )
    split_phrases: bool = option(
        False,
        "encode the phrases of a caption, which commas separate, independently, so that new combinations of known "
        "phrases are understood better; each comma takes two tokens",
    )


@section("latent")
class LatentConfig:
    """The space that diffusion runs in: pixels, patches of pixels, or the latents of a VAE."""

    patch_size: PositiveInt = option(1, "size of the pixel patches that are rearranged into channels; 1 is none")
    vae: LocalPath | None = option(
        None, "a Hub id or a folder with an `AutoencoderKL`; diffusion runs in its latent space"
    )

    def __post_init__(self) -> None:
        if self.vae is not None and self.patch_size != 1:
            raise UserError(f"latent.patch_size: {self.patch_size} does not support latent.vae; expected 1")


@section("objective")
class ObjectiveConfig:
    """Prediction type, loss and timestep distribution."""

    prediction: PredictionKind = option(
        "epsilon", "what the network predicts: `epsilon`, `sample`, `score`, `v_prediction`"
    )
    loss: Loss | None = option(
        None,
        "loss weighting: `epsilon`, `sample`, `v_prediction`, `min_snr`, `clamped_snr`, `variational_bound`; default: "
        "that of the prediction, and for `score` that of `epsilon`",
    )
    min_snr_gamma: float = option(5.0, "gamma of `min_snr` and `clamped_snr`", gt=0, allow_inf_nan=False)
    timesteps: TimestepDensity = option(
        "uniform",
        "distribution of t; the loss is divided by its density: `uniform`, `logit_normal` (Esser et al. 2024, eq. 19), "
        "`loss_weight`, `later` (each timestep of the noisiest quarter five times as often as each other)",
    )

    def __post_init__(self) -> None:
        if self.loss == "clamped_snr" and self.min_snr_gamma <= 1:
            raise UserError(
                f"objective.min_snr_gamma: {self.min_snr_gamma}; expected more than 1, the lowest weight of clamped_snr"
            )

    @property
    def weighting(self) -> Loss:
        """The loss weighting: `loss`, or that of the prediction."""
        return self.loss or ("epsilon" if self.prediction == "score" else self.prediction)


@section("")
class Config:
    """The config of a training run."""

    run_dir: LocalPath = option("runs/new", "folder of the run; an existing one is never overwritten")
    seed: Seed = option(0, "random seed of data order, noise, timesteps and initial weights")
    resume: Annotated[bool | str, Field(union_mode="left_to_right")] = option(
        False,
        "`true`: continue from the newest checkpoint in `run_dir`, if there is one; `step-00001000`: from that one; "
        "later checkpoints, snapshots and metrics are kept under other names",
    )
    init_from: LocalPath | None = option(
        None,
        "`builtin`, `emoji`, a run, a checkpoint or a Hub id to start from; it decides all options that its weights "
        "depend on",
    )
    track: str | None = option(None, "`tensorboard`, or another of Accelerate's trackers")
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
            raise UserError(f"resume: {self.resume!r:.80}; expected true, false or a checkpoint such as step-00001000")
        if self.latent.vae is None:
            return
        if self.text.split_phrases:
            raise UserError("text.split_phrases: true; expected false with latent.vae, as in StableDiffusionPipeline")
        if self.schedule.spacing in SPACINGS_WITH_OFFSET and self.schedule.steps_offset == 0:
            raise UserError(
                "schedule.steps_offset: 0; expected 1 with latent.vae and schedule.spacing=leading, as in diffusers"
            )
        if self.schedule.clip_x_0:
            raise UserError("schedule.clip_x_0: true; expected false with latent.vae, whose latents are unbounded")

    @property
    def clip(self) -> str:
        """The name or the folder of the CLIP whose text encoder is used."""
        return str(Path(self.run_dir) / "text_encoder") if self.text.encoder == PRETRAIN else self.text.encoder

    def clip_pretraining(self) -> "ClipPretrainingConfig":
        """Return the config of the CLIP that `text.encoder: pretrain` trains; it divides an image into about 4 x 4."""
        side = self.data.resolution
        divisors = (size for size in range(1, side + 1) if side % size == 0)
        return ClipPretrainingConfig(
            run_dir=self.clip,
            seed=self.seed,
            resume=True,  # whether the run resumes is checked for the run
            data=replace(self.data, flip=False, crop="center"),
            test_split="train",
            vocab_size=8000,
            max_length=self.text.max_length or 77,
            patch_size=min(divisors, key=lambda size: abs(math.log(4 * size / side))),
            width=128,
            batch_size=128,
            max_steps=self.text.pretrain_steps,
            mixed_precision="fp32" if self.train.mixed_precision == "fp16" else self.train.mixed_precision,
            warmup_steps=min(100, self.text.pretrain_steps // 10),
        )


@section("")
class ClipPretrainingConfig:
    """The config of a small CLIP. Its image and text encoders have the same width, depth and number of heads."""

    run_dir: LocalPath = option("runs/clip", "folder of the CLIP; an existing one is never overwritten")
    seed: Seed = option(0, "random seed")
    resume: bool = option(False, "`true`: continue from the newest checkpoint in `run_dir`, if there is one")
    data: DataConfig = Field(default_factory=DataConfig)
    test_split: str = option("test", "split that accuracies are measured on; without it, the training images")
    vocab_size: PositiveInt = option(
        1000, "maximum size of the vocabulary: all bytes twice, two special tokens, and merges", ge=514
    )
    max_length: PositiveInt = option(16, "number of tokens that captions are padded or truncated to", ge=3)
    patch_size: PositiveInt = option(4, "size of the image patches")
    width: PositiveInt = option(64, "width of both encoders")
    layers: PositiveInt = option(4, "transformer layers of both encoders")
    num_heads: PositiveInt = option(4, "attention heads of both encoders")
    batch_size: PositiveInt = option(256, "images per step")
    max_steps: PositiveInt = option(1000, "optimizer steps")
    learning_rate: float = option(1e-3, "peak learning rate", gt=0, allow_inf_nan=False)
    warmup_steps: NonNegativeInt = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.1, "decoupled weight decay", ge=0, allow_inf_nan=False)
    mixed_precision: Literal["auto", "fp32", "bf16", "no"] | None = option(
        "auto", "as `train.mixed_precision`, without `fp16`"
    )
    checkpoint_every: NonNegativeInt = option(100, "steps between checkpoints; 0 writes the last one only")
    log_every: PositiveInt = option(10, "steps between lines of `metrics.jsonl`")

    def as_run(self) -> Config:
        """Return the run config with the same options, for the parts of the trainer."""
        shared = TrainConfig.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        train = TrainConfig(**{name: getattr(self, name) for name in shared})
        return Config(run_dir=self.run_dir, seed=self.seed, resume=self.resume, data=self.data, train=train)

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.max_steps:
            raise UserError(f"warmup_steps: {self.warmup_steps} must be less than max_steps ({self.max_steps})")
        if self.width % self.num_heads:
            raise UserError(f"width: {self.width} must be divisible by num_heads ({self.num_heads})")
        if self.data.resolution % self.patch_size:
            raise UserError(f"patch_size: {self.patch_size} does not divide data.resolution ({self.data.resolution})")


def load_config(schema: type[Schema], file: Path | str | None = None, overrides: list[str] | None = None) -> Schema:
    """Load a config: the defaults of `schema`, updated by a YAML file, then by `key=value` overrides.

    Raises:
        UserError: Unknown key, wrong type or invalid value; the message begins with the full key, or with the file that
            has it.
    """
    from_file: dict[str, Any] = {} if file is None else from_yaml(schema, read_text(Path(file), "--config"), str(file))
    fields = deepcopy(from_file)
    for override in overrides or []:
        (*sections, name), value = from_override(schema, override)
        target = fields
        for section_name in sections:
            target = target.setdefault(section_name, {})
        target[name] = value
    try:
        return schema(**fields)
    except UserError as error:
        try:
            schema(**from_file)
        except UserError as without_overrides:
            if str(without_overrides) == str(error):
                raise UserError(f"{file}: {error}") from error
        raise


def save_config(config: Any, file: Path) -> None:
    """Write all fields, including defaults, as YAML, atomically. `load_config` restores an equal config."""
    write_file(file, to_yaml(config))
