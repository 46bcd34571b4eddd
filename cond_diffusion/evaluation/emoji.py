"""Evaluation on the built-in emoji: whether a CNN, the emoji judge, recognizes concept and style of the prompt.

The emoji have one image per concept and style, too few for caption groups as class labels. The judge is trained on all
real images, those of the test split included. The package contains it, so that results compare across machines.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.data.dataset import open_captioned_files
from cond_diffusion.data.sources import open_source
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation import evaluator
from cond_diffusion.evaluation.metrics import digest, nearest
from cond_diffusion.evaluation.report import Results, save_grid
from cond_diffusion.images import to_model
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.seeding import sample_indices

SOURCE = "emoji"
IMAGE_SHAPE = (3, 64, 64)
SHIPPED = Path(__file__).parent.parent / "assets" / "emoji_judge" / "judge.safetensors"
FAMILY_OF = {"3d": "fluent", "glossy": "fluent", "flat": "fluent"}  # of styles; others are families of their own
SUBSETS = ("seen pairs", "held-out pairs", "held-out colors")
COPY_NEIGHBORS, COPY_RATIO = 50, 0.5
BATCH_SIZE = 256


class EmojiJudge(nn.Module):
    """A CNN that maps RGB images of 64 x 64 to logits of concepts and of styles."""

    def __init__(self, num_concepts: int, num_styles: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width in pairwise((3, 32, 64, 128, 256)):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.concept = nn.Linear(4 * 256, num_concepts)
        self.style = nn.Linear(4 * 256, num_styles)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs

    def logits(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b concepts"], Float[Tensor, "b styles"]]:
        """Compute the logits of one batch of images in [-1, 1], with gradients."""
        features = self.body(images.contiguous(memory_format=torch.channels_last))
        return self.concept(features), self.style(features)

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "n c h w"]
    ) -> tuple[Float[Tensor, "n concepts"], Float[Tensor, "n styles"]]:
        """Compute the logits of any number of images, in batches and without gradients."""
        concepts, styles = zip(*(self.logits(to_model(batch)) for batch in images.split(BATCH_SIZE)), strict=True)
        return torch.cat(concepts), torch.cat(styles)

    @classmethod
    def load(cls, file: Path = SHIPPED) -> "EmojiJudge":
        """Load weights, by default the shipped ones."""
        weights = load_file(file)
        judge = cls(len(weights["concept.weight"]), len(weights["style.weight"]))
        judge.load_state_dict(weights)
        return judge.eval()


@dataclass(frozen=True, eq=False)
class EmojiImages:
    """Images with the indices of their concepts and styles, and their prompts."""

    images: UInt8[Tensor, "n c h w"]
    concept: Int64[Tensor, " n"]
    style: Int64[Tensor, " n"]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def thumbnails(self) -> Float[Tensor, "n d"]:
        """The images at half the resolution, as rows: what distances to training images are measured in."""
        return torch.cat([F.avg_pool2d(to_model(batch), 2).flatten(1) for batch in self.images.split(BATCH_SIZE)])

    def rows(self, rows: Int64[Tensor, " m"]) -> "EmojiImages":
        """Return some of the images."""
        prompts = [self.prompts[row] for row in rows.tolist()]
        return EmojiImages(self.images[rows], self.concept[rows], self.style[rows], prompts)


class Emoji:
    """The training and test images of the built-in emoji. The names of concepts and styles are sorted: the judge's
    logits have this order."""

    def __init__(self) -> None:
        tables = [cast(Any, open_source(SOURCE, split)) for split in ("train", "test")]
        self.concepts, self.styles = (
            sorted({name for table in tables for name in table.unique(column)}) for column in ("concept", "style")
        )
        self.train, self.test = map(self._load, tables)

    def _load(self, table: Any) -> EmojiImages:
        columns = table.select_columns(["concept", "style", "captions"]).to_dict()
        concept_of, style_of = ({name: i for i, name in enumerate(names)} for names in (self.concepts, self.styles))
        return EmojiImages(
            open_captioned_files(DataConfig(source=SOURCE), dataset=table).in_memory().images,
            torch.tensor([concept_of[name] for name in columns["concept"]]),
            torch.tensor([style_of[name] for name in columns["style"]]),
            [captions[0] for captions in columns["captions"]],
        )

    @cached_property
    def family_of_style(self) -> Int64[Tensor, " styles"]:
        """The index of each style's family."""
        families = [FAMILY_OF.get(style, style) for style in self.styles]
        return torch.tensor([families.index(family) for family in families])

    def subset(self, name: str, count: int) -> EmojiImages:
        """Return up to `count` random images of one of `SUBSETS`.

        "seen pairs" are training images. "held-out colors" are test images of concepts that are in no training image,
        "held-out pairs" those of concepts that training has seen in other styles.
        """
        images = self.train
        if name != "seen pairs":
            seen = torch.isin(self.test.concept, self.train.concept)
            images = self.test.rows((seen if name == "held-out pairs" else ~seen).nonzero().squeeze(1))
        return images.rows(sample_indices(len(images), 0, 0, min(count, len(images))))


def recognized(judge: EmojiJudge, emoji: Emoji, images: EmojiImages) -> dict[str, float]:
    """Return the shares of images whose concept is the judge's first or among its first five, and whose style is its
    first."""
    concepts, styles = judge(images.images)
    top = concepts.topk(5, dim=1).indices == images.concept[:, None]
    style = styles.argmax(1)
    family = emoji.family_of_style
    hits = {
        "concept, top 1": top[:, 0],
        "concept, top 5": top.any(1),
        "style": style == images.style,
        "family of styles": family[style] == family[images.style],
    }
    return {name: hit.float().mean().item() for name, hit in hits.items()}


def copies(emoji: Emoji, images: EmojiImages) -> dict[str, float]:
    """Compare images with all training images, by Euclidean distance at half the resolution: return the share of
    "copies", whose nearest training image is closer than half the mean distance of the 50 nearest (Carlini et al.
    2023), and the share whose nearest one has the concept and the style of the prompt."""
    distances, indices = nearest(images.thumbnails, emoji.train.thumbnails, COPY_NEIGHBORS)
    is_copy = distances[:, 0] < COPY_RATIO * distances.mean(1)
    first = indices[:, 0]
    same = (emoji.train.concept[first] == images.concept) & (emoji.train.style[first] == images.style)
    return {"copies": is_copy.float().mean().item(), "nearest is of the prompt": same.float().mean().item()}


def generate(pipe: TextToImage, real: EmojiImages, sampling: SamplingOptions) -> EmojiImages:
    """Generate one image for the prompt of each real image; image i has the seed `sampling.seed` + i."""
    return replace(real, images=evaluator.generate(pipe, real.prompts, 1, sampling))


def evaluate_emoji(pipe: TextToImage, count: int, sampling: SamplingOptions, results: Results) -> dict[str, Any]:
    """Generate one image for each of up to `count` prompts of each subset, measure them, and write grids.

    Returns:
        For each subset, a part of `evaluation.json`; and the name of the judge.

    Raises:
        UserError: If the images are not RGB of 64 x 64.
    """
    shape = (pipe.channels, pipe.image_size, pipe.image_size)
    if shape != IMAGE_SHAPE:
        raise UserError(f"--checkpoint: generates images of shape {shape}; the emoji judge expects {IMAGE_SHAPE}")
    emoji, judge = Emoji(), EmojiJudge.load()
    measured: dict[str, Any] = {"judge": f"emoji judge {digest(judge)}"}
    for name in SUBSETS:
        real = emoji.subset(name, count)

        def compute(name: str = name, real: EmojiImages = real) -> dict[str, Any]:
            samples = generate(pipe, real, sampling)
            file = name.replace(" ", "_").replace("-", "_")
            save_grid(samples.images[:64], 8, results.folder / f"{file}.png")
            _, indices = nearest(samples.thumbnails[:8], emoji.train.thumbnails, 5)
            rows = torch.cat([samples.images[:8, None], emoji.train.images[indices]], dim=1)
            save_grid(rows.flatten(0, 1), rows.shape[1], results.folder / f"{file}_nearest.png")
            return {
                "count": len(real),
                "samples": recognized(judge, emoji, samples) | copies(emoji, samples),
                "real": recognized(judge, emoji, real) | copies(emoji, real),
            }

        measured[name] = results.part(name, compute)
    return measured


def format_emoji(measured: dict[str, Any]) -> str:
    """Format the result of `evaluate_emoji` as text."""
    lines = []
    for name in SUBSETS:
        values = measured[name]
        title = f"{name}: {values['count']} samples, by {measured['judge']}"
        lines += [f"{title:60}{'samples':>10}{'real':>10}"]
        lines += [f"  {key:58}{value:10.1%}{values['real'][key]:10.1%}" for key, value in values["samples"].items()]
    return "\n".join(lines)
