"""The config of the data: which pictures, what they are called, and what is done to them on the way in."""

from dataclasses import dataclass, field
from typing import Literal

from PIL import ImageColor

from cond_diffusion.errors import UserError
from cond_diffusion.images import PILLOW_MODES


@dataclass(frozen=True)
class DataConfig:
    """Which pictures, and what they are called.

    source: a built-in name ("mnist"), a folder (pictures with metadata, pictures with name.txt beside name.png, Parquet
        files, or WebDataset tars), a Parquet file, a tar, or a hub id.
    streaming: read the source from front to back, as it comes, without a copy on this disk; samples are shuffled among
        `shuffle_buffer` that lie next to each other, and the files among themselves.
    image_column, caption_column: the columns that hold the pictures and their captions (text, a list of texts, or a
    label). In a tar a column is a file's ending: png, txt.
    resolution, channels: the pictures' side in pixels; 1 for grey or 3 for RGB.
    crop: of what is longer than wide, or wider than long: its centre, or another place each time.
    flip: mirror half of the pictures, left to right, others each time.
    caption_templates: where the caption column is a label, the captions made of it: "a digit {word}" names a list of
        `label_names`; "{label}" is the name that the data set itself gives the label.
    label_names: for each word in braces, the label's name by its number.
    background: the colour, a name or #rrggbb, that transparent pictures are laid on.
    max_bad_fraction: the share of pictures that may be unreadable; they are left out, another taking their place.
    memory_gb: up to which size the decoded pictures are held in memory by each process; larger sets, and those that are
        cropped at random, are decoded again for each batch.
    held_out: how many pictures are not trained on, but measured on; at most one in twenty.
    """

    source: str = "mnist"
    streaming: bool = False
    shuffle_buffer: int = 1000
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int = 28
    channels: int = 1
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    caption_templates: tuple[str, ...] = ()
    label_names: dict[str, list[str]] = field(default_factory=dict)
    background: str = "black"
    max_bad_fraction: float = 0.01
    memory_gb: float = 4.0
    held_out: int = 512

    def __post_init__(self) -> None:
        if self.channels not in PILLOW_MODES:
            raise UserError(f"data.channels: {self.channels} must be 1 (grey) or 3 (RGB)")
        for name in ("resolution", "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}: {getattr(self, name)} must be at least 1")
        for name in ("memory_gb", "held_out"):
            if not getattr(self, name) >= 0:
                raise UserError(f"data.{name}: {getattr(self, name)} must not be negative")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction: {self.max_bad_fraction} is a share: expected 0 to 1")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise UserError(
                f"data.background: {self.background!r} is no colour; expected a name such as white, or #rrggbb"
            ) from error
