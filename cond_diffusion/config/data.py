"""Options of the training data: source, captions and preprocessing. Does not import torch."""

from dataclasses import replace
from typing import Any, Literal

from PIL import ImageColor
from pydantic import Field

from cond_diffusion.config.schema import Fraction, LocalPath, NonNegativeInt, PositiveInt, option, section
from cond_diffusion.errors import UserError, user_errors

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The captions of built-in data sets, unless captions are set.
BUILT_IN_CAPTIONS: dict[str, dict[str, Any]] = {
    "mnist": {
        "caption_column": "label",
        "caption_templates": (
            *("a digit {word}", "the digit {word}", "the number {word}", "the number {digit}", "a digit {digit}"),
            *("a handwritten {word}", "a handwritten {digit}", "a handwritten digit {word}", "a picture of a {word}"),
            *("a drawing of the number {word}", "{word}", "{digit}"),
        ),
        "label_names": {"word": [*DIGITS], "digit": [*map(str, range(10))]},
    },
    "emoji": {"caption_column": "captions"},
}
# The defaults of other fields, where they differ from those of `DataConfig`.
BUILT_IN_DEFAULTS: dict[str, dict[str, Any]] = {"emoji": {"resolution": 64, "channels": 3, "background": "white"}}


def _of_source(name: str, default: Any, description: str) -> Any:
    """Declare a field whose default depends on `source`."""

    def choose(fields: dict[str, Any]) -> Any:
        return BUILT_IN_DEFAULTS.get(fields.get("source", ""), {}).get(name, default)

    others = ", ".join(f"{source}: {values[name]}" for source, values in BUILT_IN_DEFAULTS.items())
    return Field(default_factory=choose, description=f"{description}; {others}")


@section("data")
class DataConfig:
    """Training images, their captions and their preprocessing."""

    source: LocalPath = option(
        "mnist",
        "`mnist`, `emoji`, a folder (images with metadata, `a.txt` beside `a.png`, Parquet files, WebDataset tars), a "
        "`.parquet` or `.tar` file, or a Hub id",
    )
    streaming: bool = option(False, "read the source sequentially, without a local copy")
    shuffle_buffer: PositiveInt = option(1000, "size of the shuffle buffer when streaming, in rows")
    image_column: str = option("image", "column with the images; in a tar, the file extension: `png`")
    caption_column: str = option("text", "column with the captions: texts, lists of texts, or labels")
    resolution: PositiveInt = _of_source(
        "resolution", 28, "image size in pixels; the shorter side is resized to it, the rest is cropped"
    )
    channels: int = _of_source("channels", 1, "1 for grayscale, 3 for RGB")
    crop: Literal["center", "random"] = option("center", "position of the crop: `center`, or `random` in each epoch")
    flip: bool = option(False, "flip images horizontally with probability 0.5")
    caption_templates: tuple[str, ...] = option(
        (), "for labels: captions such as `a digit {word}`; one is picked at random each time"
    )
    label_names: dict[str, list[str]] = Field(
        default_factory=dict,
        description="for each field of the templates, the names of all labels in order; `{label}`: the data set's own",
    )
    background: str = _of_source("background", "black", "color that transparent images are composited on")
    max_bad_fraction: Fraction = option(0.01, "fraction of images that may be unreadable; these are skipped")
    memory_gb: float = option(
        4.0,
        "size, in GB, up to which each process holds the decoded data set in memory; not with random crops",
        ge=0,
        allow_inf_nan=False,
    )
    held_out: NonNegativeInt = option(
        512, "number of images held out for validation; at most one in twenty, and at most 64 when streaming"
    )

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"data.channels: {self.channels}; expected 1 (grayscale) or 3 (RGB)")
        hint = "; expected a name such as white, or #rrggbb"
        with user_errors(f"data.background: {self.background!r:.80} is not a color", ValueError, hint=hint):
            ImageColor.getrgb(self.background)

    def with_captions(self) -> "DataConfig":
        """Return the config with the default captions of a built-in source, unless captions are set."""
        if (self.caption_column, self.caption_templates, self.label_names) == ("text", (), {}):
            return replace(self, **BUILT_IN_CAPTIONS.get(self.source, {}))
        return self
