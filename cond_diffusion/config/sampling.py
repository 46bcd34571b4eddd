"""The options of sampling: of the command line, PNG metadata, `TextToImage`, evaluation and the page."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from cond_diffusion.config.schedule import Variance
from cond_diffusion.config.schema import Integer, section
from cond_diffusion.errors import UserError

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpm_solver", "unipc"]
HIGHEST_SCALE = 10_000  # far beyond use, and far below where fp32 overflows

# The samplers that an option belongs to, and the input that it needs.
SAMPLERS_OF = {"variance": ("ddpm",), "eta": ("ddim", "dpm_solver"), "order": ("dpm_solver", "unipc")}
IMAGE_OPTIONS = ("mask", "strength", "resamplings")
_HIGHEST_ORDER = {"dpm_solver": 2, "unipc": 3}


def _split(value: Any) -> Any:
    """Read "2,5" as two values, as on the command line."""
    return value.split(",") if isinstance(value, str) and "," in value else value


Scale = Annotated[float, Field(ge=0, le=HIGHEST_SCALE, allow_inf_nan=False)]


@section("")
@dataclass(frozen=True)
class SamplingOptions:
    """What decides the images of a prompt, beside the model and input images.

    Each field's extra says in which group of the command line it stands.
    """

    num_images: int = Field(default=1, ge=1, description="number of images per prompt")
    seed: Annotated[Integer | tuple[Integer, ...], Field(union_mode="left_to_right")] = Field(
        default=0, description="seed of each prompt's first image; image i has seed + i"
    )
    sampler: SamplerName = Field(
        default="ddpm",
        description="ddpm, ddim, euler, heun, dpm_solver or unipc",
        json_schema_extra={"group": "sampling"},
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        description="number of timesteps to visit (default: all)",
        json_schema_extra={"group": "sampling"},
    )
    variance: Variance | None = Field(
        default=None,
        description="ddpm: posterior or beta (default: the model's)",
        json_schema_extra={"group": "sampling"},
    )
    eta: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="ddim and dpm_solver: share of fresh noise, 0 to 1 (default: 0)",
        json_schema_extra={"group": "sampling"},
    )
    order: int | None = Field(
        default=None,
        ge=1,
        description="dpm_solver (1, 2) and unipc (1 to 3) (default: 2)",
        json_schema_extra={"group": "sampling"},
    )
    guidance_scale: Annotated[Scale | tuple[Scale, ...], Field(union_mode="left_to_right"), BeforeValidator(_split)] = (
        Field(
            default=3.0,
            description="1 is unguided; 2,5 gives each of two prompts its own",
            json_schema_extra={"group": "guidance", "metavar": "W"},
        )
    )
    negative_prompt: str | tuple[str, ...] = Field(
        default="", description="what to guide away from", json_schema_extra={"group": "guidance"}
    )
    guidance_interval: Annotated[tuple[Integer, Integer] | None, BeforeValidator(_split)] = Field(
        default=None,
        description="timesteps to guide at (default: all)",
        json_schema_extra={"group": "guidance", "metavar": "FIRST,LAST"},
    )
    guidance_rescale: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="take back the contrast that high scales add, 0 to 1",
        json_schema_extra={"group": "guidance", "metavar": "PHI"},
    )
    dynamic_thresholding: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="clip x_0_hat at this quantile of its pixels and rescale, for example 0.995",
        json_schema_extra={"group": "guidance", "metavar": "SHARE"},
    )
    strength: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="strength of the change, 0 to 1 (default: 0.8; with --mask 1)",
        json_schema_extra={"group": "input images"},
    )
    resamplings: int = Field(
        default=1, ge=1, description="RePaint's resamplings, for --mask", json_schema_extra={"group": "input images"}
    )

    def __post_init__(self) -> None:
        for option, samplers in SAMPLERS_OF.items():
            if (value := getattr(self, option)) is not None and self.sampler not in samplers:
                raise UserError(f"{option}: {value} applies only to {' and '.join(samplers)}, not to {self.sampler}")
        if self.order is not None and self.order > (highest := _HIGHEST_ORDER[self.sampler]):
            raise UserError(f"order: {self.order}; expected 1 to {highest} for the sampler {self.sampler}")
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] <= self.guidance_interval[1]:
            first, last = self.guidance_interval
            raise UserError(f"guidance_interval: {first} to {last} holds no timestep; expected the lower one first")

    def per_prompt(self, name: str, count: int) -> list[Any]:
        """Return an option's values for each of `count` prompts; raise UserError for another number of values."""
        value = getattr(self, name)
        values = list(value) if isinstance(value, tuple) else [value] * count
        if len(values) != count:
            raise UserError(f"{name}: {len(values)} values for {count} prompts; expected one, or one for each")
        return values


@section("")
@dataclass(frozen=True)
class GenerationSettings:
    """Everything that a PNG remembers of how it was made, input images as paths."""

    prompts: tuple[str, ...] = ()
    sampling: SamplingOptions = Field(default_factory=SamplingOptions)
    checkpoint: str = Field(default="builtin", description="a run folder, a checkpoint folder or a hub id")
    ema_width: float | None = Field(
        default=None, description="average over this share of the training, 0.03 to 0.25 (default: as trained)"
    )
    lora: str | None = Field(
        default=None,
        description="a LoRA to add to the network: a file, a folder or a hub id",
        json_schema_extra={"metavar": "FILE"},
    )
    image: str | None = Field(
        default=None,
        description="an image to begin with",
        json_schema_extra={"group": "input images", "metavar": "FILE"},
    )
    mask: str | None = Field(
        default=None,
        description="white is generated anew, black stays",
        json_schema_extra={"group": "input images", "metavar": "FILE"},
    )
