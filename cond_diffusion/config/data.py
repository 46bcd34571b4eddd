"""Which images a run is trained on, their captions, and how they are preprocessed. Imports no torch."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import Field
from pydantic.dataclasses import dataclass

from cond_diffusion.config.schema import section
from cond_diffusion.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The captions that a built-in source brings along: column, templates, names of its labels.
BUILT_IN_CAPTIONS: dict[str, dict[str, Any]] = {
    "mnist": {
        "caption_column": "label",
        "caption_templates": (
            *("a digit {word}", "the digit {word}", "the number {word}", "the number {digit}", "a digit {digit}"),
            *("a handwritten {word}", "a handwritten {digit}", "a handwritten digit {word}", "a picture of a {word}"),
            *("a drawing of the number {word}", "{word}", "{digit}"),
        ),
        "label_names": {"word": [*DIGITS], "digit": [*map(str, range(10))]},
    }
}


@section("data")
@dataclass(frozen=True)
class DataConfig:
    source: str = Field(
        default="mnist",
        description="`mnist`, a folder (images with metadata, `a.txt` beside `a.png`, Parquet files, WebDataset tars), "
        "a `.parquet` or `.tar` file, or a hub id",
    )
    streaming: bool = Field(default=False, description="read the source sequentially, without a copy on this disk")
    shuffle_buffer: Annotated[int, Field(ge=1)] = Field(
        default=1000, description="rows of a stream that are shuffled among each other"
    )
    image_column: str = Field(default="image", description="column with the images; in a tar the file's ending: `png`")
    caption_column: str = Field(
        default="text", description="column with the captions: texts, lists of texts, or labels"
    )
    resolution: Annotated[int, Field(ge=1)] = Field(
        default=28, description="side in pixels; the short side is resized to it, the rest cropped"
    )
    channels: int = Field(default=1, description="1 for grey, 3 for RGB")
    crop: Literal["center", "random"] = Field(
        default="center", description="where to crop: `center`, or `random` each time"
    )
    flip: bool = Field(default=False, description="mirror half of the images at random")
    caption_templates: tuple[str, ...] = Field(
        default=(), description="for labels: captions such as `a digit {word}`; one is picked at random each time"
    )
    label_names: dict[str, list[str]] = Field(
        default_factory=dict,
        description="for each word in braces, the labels' names by number; `{label}` is the data set's own name",
    )
    background: str = Field(default="black", description="color that transparent images are composited on")
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="share of images that may be unreadable; skipped"
    )
    memory_gb: float = Field(
        default=4.0,
        ge=0,
        description="decoded images up to this size are held in memory by each process; not with random crops",
    )
    held_out: Annotated[int, Field(ge=0)] = Field(
        default=512, description="images that are held out for validation; at most one in twenty, of a stream 64"
    )

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"data.channels: {self.channels}; expected 1 (grey) or 3 (RGB)")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise UserError(
                f"data.background: {self.background!r} is not a color; expected a name such as white, or #rrggbb"
            ) from error

    def with_captions(self) -> "DataConfig":
        """Return the config with the captions of a built-in source, unless it gives captions of its own."""
        if (self.caption_column, self.caption_templates, self.label_names) == ("text", (), {}):
            return replace(self, **BUILT_IN_CAPTIONS.get(self.source, {}))
        return self
