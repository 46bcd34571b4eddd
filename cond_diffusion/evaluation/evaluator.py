"""Samples beside real pictures, in the eyes of a classifier and of a CLIP: what `evaluation.py` writes down."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from cond_diffusion.config.run import Config
from cond_diffusion.data.dataset import CaptionedImages, load_captioned_images
from cond_diffusion.data.loader import ShuffledSet, open_feed
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation.judges import Classifier, accuracy, kept_classifier, train_classifier
from cond_diffusion.evaluation.metrics import frechet_distance, manifolds, nearest
from cond_diffusion.images import from_pillow, grid, to_bytes, to_model, to_pillow
from cond_diffusion.models.clip import ClipJudge
from cond_diffusion.order import sample_indices
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.training.validation import Diagnosis

MOST_REAL = 10_000  # test pictures whose features are compared with
PICTURES_OF_A_LABEL = 20  # at least so many to a caption group, and the data are taken for a labelled set
NEIGHBOURS = 5

Features = Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n d"]]
"""Pictures to features: a `Classifier`, a `ClipJudge`, or any other network that sees what matters."""

Measures = dict[str, dict[str, float]]
"""Each measure of the samples and, to compare with, of real pictures: {"samples": ..., "real": ...}."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: options of `TextToImage.__call__`.

    seed: of the first prompt's first picture; the others follow, so that no two samples begin with the same noise.
    """

    sampler: str = "dpm_solver"
    steps: int | None = 20
    guidance_scale: float = 3.0
    seed: int = 0


class Judging:
    """A checkpoint, its data, and who judges its samples.

    classifier: trained on the real pictures; None where their captions are no labels.
    clip: the CLIP whose text half the checkpoint reads with; None where that has no half for pictures.
    features: what distances are measured in; if not given, the classifier's or, without one, the CLIP's.
    """

    def __init__(self, pipe: TextToImage, config: Config, features: Features | None = None) -> None:
        self.pipe = pipe
        self.config = config
        self.whole, self.train, self.test = real_pictures(config)
        if len(self.test) <= NEIGHBOURS:
            raise UserError(
                f"data.source: {config.data.source} has {len(self.test)} pictures that were not trained on; expected a "
                f"split named test, or data.held_out, with more than {NEIGHBOURS}"
            )
        groups = len(self.train.caption_groups)
        labelled = groups > 1 and len(self.train) >= PICTURES_OF_A_LABEL * groups
        self.classifier: Classifier | None = kept_classifier(self.train) if labelled else None
        self.clip = own_clip(config) or (features if isinstance(features, ClipJudge) else None)
        found = features or self.classifier or self.clip
        if found is None or (self.classifier is None and self.clip is None):
            raise UserError(
                "--features: the captions are no labels, and the checkpoint's text encoder has no half that sees these "
                "pictures; expected a CLIP, for example --features openai/clip-vit-base-patch32"
            )
        self.features: Features = found
        for judge in (self.clip, self.features):
            if isinstance(judge, ClipJudge):
                judge.to(pipe.device)

    @cached_property
    def features_of_test(self) -> Float[Tensor, "n d"]:
        """In an order of chance: sources are often sorted."""
        return self.features(some(self.test, MOST_REAL).images)

    @cached_property
    def features_of_training(self) -> Float[Tensor, "n d"]:
        return self.features(self.train.images)

    @property
    def judge(self) -> str:
        """What accuracies are those of, with a hash of its weights: figures compare only where it is the same."""
        return "the checkpoint's CLIP" if self.classifier is None else f"classifier {self.classifier.digest()}"

    def prompts(self, samples: int, *, paraphrases: bool = False) -> list[tuple[str, int]]:
        """Return prompts with their caption groups: each group's first caption, or with `paraphrases` all the others.

        Of more prompts than samples, some.
        """
        wanted = slice(1, None) if paraphrases else slice(0, 1)
        groups = self.train.caption_groups
        prompts = [(prompt, i) for i, captions in enumerate(groups) for prompt in captions[wanted]]
        if not prompts:
            raise UserError("--paraphrases: every picture has one caption only in this checkpoint's data")
        if samples < len(prompts):
            prompts = [prompts[i] for i in sample_indices(len(prompts), 0, 0, samples).tolist()]
        return prompts

    def draw(self, prompts: list[tuple[str, int]], samples: int, sampling: Sampling) -> CaptionedImages:
        """Draw equally many samples of each prompt, `samples` in all or less; those of the first prompt come first."""
        each = samples // len(prompts)
        seeds = [sampling.seed + number * each for number in range(len(prompts))]
        images = self.pipe([prompt for prompt, _ in prompts], num_images=each, **{**asdict(sampling), "seed": seeds})
        groups = torch.tensor([group for _, group in prompts]).repeat_interleave(each)
        pixels = to_bytes(torch.stack([from_pillow(image) for image in images]))
        return CaptionedImages(pixels, groups, self.train.caption_groups)

    def recognised(self, samples: CaptionedImages) -> Bool[Tensor, " n"]:
        """Say of each sample whether the best judge that there is sees in it what the prompt says."""
        if self.classifier is None:
            return self.recognised_by_clip(samples)
        return self.classifier.classify(samples.images) == samples.group_of

    def recognised_by_clip(self, samples: CaptionedImages) -> Bool[Tensor, " n"]:
        """Say of each sample whether CLIP finds it nearer to its own caption than to any other of the set's."""
        cosines, own = self._beside_captions(samples)
        return cosines.argmax(1) == own

    def clip_score(self, samples: CaptionedImages) -> float:
        """Return the mean of max(100 cos, 0) between pictures and captions (Hessel et al. 2021, but for their 2.5).

        Only scores of the same CLIP can be compared.
        """
        cosines, own = self._beside_captions(samples)
        return (100 * cosines.gather(1, own[:, None])).clamp(min=0).mean().item()

    def _beside_captions(self, samples: CaptionedImages) -> tuple[Float[Tensor, "n captions"], Int64[Tensor, " n"]]:
        """Return CLIP's cosine of each sample with each caption of the set, and which caption is its own."""
        assert self.clip is not None
        groups, own = samples.group_of.unique(return_inverse=True)
        texts = self.clip.texts([samples.caption_groups[group][0] for group in groups.tolist()])
        return self.clip(samples.images) @ texts.T, own

    def accuracy_and_distance(self, samples: CaptionedImages) -> tuple[float, float]:
        """Return prompt accuracy and Fréchet distance: guidance betters the one at the cost of the other."""
        distance = frechet_distance(self.features(samples.images), self.features_of_test)
        return self.recognised(samples).float().mean().item(), distance

    def floor(self, count: int) -> float:
        """Return the Fréchet distance of as many real training pictures: what samples can hope for."""
        return frechet_distance(self.features(some(self.train, count).images), self.features_of_test)

    def measure(self, samples: CaptionedImages) -> Measures:
        """Return every measure. The real pictures are as many training pictures, but test pictures for those who were
        trained on these.
        """
        both = {"samples": samples, "real": some(self.train, len(samples))}
        unseen = {"samples": samples, "real": some(self.test, len(samples))}
        features = {name: self.features(pictures.images) for name, pictures in both.items()}
        measures: Measures = {}
        if self.classifier is not None:
            measures["prompt accuracy, classifier"] = {
                "samples": self.recognised(samples).float().mean().item(),
                "real": accuracy(self.classifier, self.train, self.test),
            }
        if self.clip is not None:
            measures["prompt accuracy, CLIP"] = {
                name: self.recognised_by_clip(pictures).float().mean().item() for name, pictures in unseen.items()
            }
            measures["CLIP score"] = {name: self.clip_score(pictures) for name, pictures in unseen.items()}
        measures["Fréchet distance"] = {
            name: frechet_distance(rows, self.features_of_test) for name, rows in features.items()
        }
        overlap = {
            name: asdict(manifolds(rows, self.features_of_test[: len(samples)])) for name, rows in features.items()
        }
        for name in ("precision", "recall", "density", "coverage"):
            measures[name] = {kind: overlap[kind][name] for kind in both}
        if self.classifier is not None:
            measures["accuracy on test pictures of a classifier trained on them"] = {
                name: accuracy(train_classifier(pictures), self.train, self.test) for name, pictures in both.items()
            }
        measures["distance to the nearest training picture"] = {
            "samples": self._distance_to_training(features["samples"]),
            "real": self._distance_to_training(self.features_of_test[: len(samples)]),
        }
        return measures

    def _distance_to_training(self, features: Float[Tensor, "n d"]) -> float:
        return nearest(features, self.features_of_training, 1)[0].mean().item()

    def nearest_pictures(self, samples: CaptionedImages, count: int = 10) -> Image.Image:
        """Return rows of a sample and the training pictures that are nearest to it: is it memory?"""
        some = spread(len(samples), count)
        _, which = nearest(self.features(samples.images[some]), self.features_of_training, NEIGHBOURS)
        rows = torch.cat([samples.images[some][:, None], self.train.images[which]], dim=1)
        return grid(to_pillow(to_model(rows.flatten(0, 1))), NEIGHBOURS + 1)

    def held_out_loss(self) -> dict[str, Any] | None:
        """Return the training loss on held-out pictures, by timestep, with other captions and without; None if the run
        held none out.
        """
        data, seed = self.config.data, self.config.seed
        if data.streaming or data.crop == "random" or self.whole.images.nbytes > data.memory_gb * 1e9:
            feed = open_feed(data, seed, aloud=False)  # which counts pictures that cannot be read, too
        else:
            feed = ShuffledSet(self.whole, seed, data.held_out)
        objective = Objective(self.config.objective, self.pipe.schedule)
        diagnosis = Diagnosis(self.config, feed, self.pipe.text_encoder, objective, self.pipe.space)
        findings = diagnosis.measure(self.pipe.unet, Accelerator(cpu=self.pipe.device.type == "cpu"))
        return None if findings is None else asdict(findings)


def spread(of: int, count: int) -> Tensor:
    """Return `count` numbers below `of`, evenly spread, or all of them."""
    count = min(of, count)
    return torch.arange(count) * of // count


def some(data: CaptionedImages, count: int) -> CaptionedImages:
    """Return `count` pictures of a set, or all of them, drawn without replacement."""
    return _subset(data, sample_indices(len(data), 0, 0, min(count, len(data))))


def _subset(data: CaptionedImages, rows: Tensor) -> CaptionedImages:
    return replace(data, images=data.images[rows], group_of=data.group_of[rows])


def own_clip(config: Config) -> ClipJudge | None:
    """Return the CLIP that a checkpoint's text encoder is half of; None, with a line that says why, if it cannot judge
    the checkpoint's pictures.
    """
    encoder, data = config.text.encoder, config.data
    try:
        clip = ClipJudge.from_pretrained(encoder, config.text.max_length)
    except UserError as error:
        logger.warning("text.encoder: %s; without CLIP's opinion", error)
        return None
    if clip is not None and not clip.reads(data.channels, data.resolution):
        shape = f"{data.resolution} x {data.resolution} pixels in {data.channels} channels"
        logger.warning("text.encoder: %s reads no pictures of %s; without CLIP's opinion", encoder, shape)
        return None
    return clip


def real_pictures(config: Config) -> tuple[CaptionedImages, CaptionedImages, CaptionedImages]:
    """Return the whole training split, what is trained on of it, and the test pictures, all in memory. Of a source
    without test pictures those that training holds out stand in for them.
    """
    whole = load_captioned_images(config.data)
    try:
        return whole, whole, load_captioned_images(config.data, "test")
    except UserError as error:
        if config.data.streaming:  # which pictures a stream holds out only the stream knows
            raise
        feed = ShuffledSet(whole, config.seed, config.data.held_out)
        held_out = feed.held_out_indices()
        logger.warning("no test pictures (%s); measuring with the %d that training holds out", error, len(held_out))
        trained_on = torch.ones(len(whole), dtype=torch.bool)
        trained_on[held_out] = False
        return whole, _subset(whole, trained_on.nonzero().squeeze(1)), _subset(whole, held_out)
