"""The options of the training loop, and of the sample grids that it writes."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cond_diffusion.config.sampling import HIGHEST_SCALE, SamplingOptions
from cond_diffusion.config.schema import section

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
