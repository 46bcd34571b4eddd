"""Sampling options, shared by the command line, PNG metadata, `TextToImage`, evaluation and the demo."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cond_diffusion.config.schedule import Variance
from cond_diffusion.config.schema import (
    Fraction,
    Integer,
    LocalPath,
    NonNegativeInt,
    PositiveInt,
    Seed,
    option,
    section,
)
from cond_diffusion.errors import UserError

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpm_solver", "unipc"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
DEFAULT_STEPS = 50  # chosen by measurement: tests/benchmarks/README.md
DEFAULT_GUIDANCE_SCALE = 3.0  # of a model that has no other
GUIDANCE_OF_MODEL = ("guidance_scale", "phrase_guidance", "first_phrase_from")  # each model has defaults of its own
MAX_GUIDANCE_SCALE = 10_000  # far above useful values, and far below fp32 overflow

PER_PROMPT = ("seed", "guidance_scale", "negative_prompt")  # options with one value, or one for each prompt
# Options that apply only to some samplers, and options that require an input image.
SAMPLERS_OF = {"variance": ("ddpm",), "eta": ("ddim", "dpm_solver"), "order": ("dpm_solver", "unipc")}
IMAGE_OPTIONS = ("mask", "strength", "resamplings")
_MAX_ORDER = {"dpm_solver": 2, "unipc": 3}


def _split_commas(value: Any) -> Any:
    """Parse "2,5" from the command line as two values."""
    return value.split(",") if isinstance(value, str) and "," in value else value


GuidanceScale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE_SCALE, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]


@section("")
class SamplingOptions:
    """Options that, together with the model and input images, determine the images of a prompt."""

    num_images: PositiveInt = option(1, "number of images per prompt")
    seed: Annotated[Seed | tuple[Seed, ...], Field(union_mode="left_to_right")] = option(
        0, "seed of each prompt's first image; image i has seed + i"
    )
    sampler: SamplerName = option("ddpm", "ddpm, ddim, euler, heun, dpm_solver or unipc", group="sampling")
    steps: PositiveInt | None = option(
        None, f"number of timesteps to visit (default: {DEFAULT_STEPS}, or all if there are fewer)", group="sampling"
    )
    variance: Variance | None = option(None, "ddpm: posterior or beta (default: the model's)", group="sampling")
    eta: Fraction | None = option(
        None, "ddim and dpm_solver: amount of added noise, 0 to 1 (default: 0)", group="sampling"
    )
    order: PositiveInt | None = option(None, "dpm_solver (1, 2) and unipc (1 to 3) (default: 2)", group="sampling")
    guidance_scale: Annotated[
        GuidanceScale | tuple[GuidanceScale, ...] | None,
        Field(union_mode="left_to_right"),
        BeforeValidator(_split_commas),
    ] = option(
        None,
        "1 disables guidance; 2,5 sets one scale for each of two prompts (default: the model's)",
        group="guidance",
        metavar="W",
    )
    negative_prompt: str | tuple[str, ...] = option("", "text to guide away from", group="guidance")
    guidance_interval: Annotated[tuple[Integer, Integer] | None, BeforeValidator(_split_commas)] = option(
        None, "range of timesteps with guidance (default: all)", group="guidance", metavar="FIRST,LAST"
    )
    phrase_guidance: Fraction | None = option(
        None,
        "fraction of the guidance that comes from the phrases of the prompt, each by itself; commas separate phrases, "
        "and each that is used at a timestep takes one more pass of the network (default: the model's)",
        group="guidance",
        metavar="FRACTION",
    )
    first_phrase_from: NonNegativeInt | None = option(
        None,
        "lowest timestep at which phrase guidance includes the first of several phrases, which names the subject; "
        "lower timesteps have the others, such as the style (default: the model's)",
        group="guidance",
        metavar="TIMESTEP",
    )
    guidance_rescale: Fraction = option(
        0.0, "reduce the contrast that high scales add, 0 to 1", group="guidance", metavar="PHI"
    )
    dynamic_thresholding: PositiveFraction | None = option(
        None, "clip x_0_hat to this quantile of its pixels (e.g. 0.995) and rescale", group="guidance", metavar="SHARE"
    )
    strength: Fraction | None = option(
        None, "strength of the change, 0 to 1 (default: 0.8, or 1 with --mask)", group="input images"
    )
    resamplings: PositiveInt = option(1, "number of RePaint resamplings, with --mask", group="input images")

    def __post_init__(self) -> None:
        for name, samplers in SAMPLERS_OF.items():
            if (value := getattr(self, name)) is not None and self.sampler not in samplers:
                raise UserError(f"{name}: {value} applies only to {' and '.join(samplers)}, not to {self.sampler}")
        if self.order is not None and self.order > (max_order := _MAX_ORDER[self.sampler]):
            raise UserError(f"order: {self.order}; expected 1 to {max_order} for the sampler {self.sampler}")
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] <= self.guidance_interval[1]:
            first, last = self.guidance_interval
            raise UserError(f"guidance_interval: {first},{last} is empty; expected 0 <= FIRST <= LAST")

    def per_prompt(self, name: str, count: int) -> list[Any]:
        """Return the values of an option for `count` prompts; a single value is repeated.

        Raises:
            UserError: The option has another number of values.
        """
        value = getattr(self, name)
        values = list(value) if isinstance(value, tuple) else [value] * count
        if len(values) != count:
            raise UserError(f"{name}: {len(values)} values for {count} prompts; expected one, or one per prompt")
        return values


@section("")
class GenerationSettings(SamplingOptions):
    """Settings that a PNG stores to reproduce it: options, prompts and model. Input images are stored as paths."""

    prompts: tuple[str, ...] = ()
    checkpoint: LocalPath = option("builtin", "builtin (digits), emoji, a run folder, a checkpoint folder or a Hub id")
    ema_width: float | None = option(
        None, "relative width of the average of the weights, at most 0.28, from train.snapshots (default: as trained)"
    )
    lora: LocalPath | None = option(None, "LoRA to add to the network: a file, a folder or a Hub id", metavar="FILE")
    dtype: Precision = option("auto", "precision: fp32, bf16, fp16, or auto: bf16 where the hardware is faster in it")
    compile: bool = option(False, "compile the network with torch.compile; takes less time only for many images")
    image: LocalPath | None = option(None, "image to start from", group="input images", metavar="FILE")
    mask: LocalPath | None = option(
        None, "white areas are regenerated, black areas are kept", group="input images", metavar="FILE"
    )


# Default options of an evaluation, and those that its report contains. `seed` is that of the first image of the first
# prompt; every sample has its own.
DEFAULT_EVALUATION = SamplingOptions(sampler="dpm_solver", steps=20)
REPORTED_OPTIONS = ("sampler", "steps", *GUIDANCE_OF_MODEL, "seed")
