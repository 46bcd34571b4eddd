"""Measure samples against real images, as seen by a classifier and a CLIP."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from cond_diffusion.config.run import Config
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.data.dataset import CaptionedImages, load_captioned_images
from cond_diffusion.data.loader import TrainingData, open_training_data
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation.metrics import (
    Classifier,
    ClipJudge,
    accuracy,
    frechet_distance,
    load_clip_judge,
    load_or_train_classifier,
    nearest,
    prdc,
    renumber_groups,
    train_classifier,
)
from cond_diffusion.images import to_bytes
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.seeding import sample_indices
from cond_diffusion.training.validation import Validator

MAX_REAL = 10_000  # test images that features are compared with
MIN_IMAGES_PER_LABEL = 20  # with fewer images per caption group the captions are no class labels
NEIGHBORS = 5

CLASSIFICATION = "accuracy on test pictures of a classifier trained on them"  # Ravuri and Vinyals 2019
NEAREST = "distance to the nearest training picture"

FeatureExtractor = Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n d"]]
"""Images to features: a `Classifier`, a `ClipJudge`, or any other network."""

logger = logging.getLogger(__name__)


# How samples are generated unless told otherwise; what a report names of it. The seed is that of the first image of the
# first prompt: no two samples share a seed.
DEFAULT_SAMPLING = SamplingOptions(sampler="dpm_solver", steps=20)
REPORTED_OPTIONS = ("sampler", "steps", "guidance_scale", "seed")


def reported(sampling: SamplingOptions) -> dict[str, Any]:
    """Return the options that a report names."""
    return {name: getattr(sampling, name) for name in REPORTED_OPTIONS}


@dataclass(frozen=True, eq=False)
class Judged:
    """A set of captioned images with the outputs of each judge, computed on first use and kept."""

    data: CaptionedImages
    classifier: Classifier | None
    clip: ClipJudge | None
    extractor: FeatureExtractor

    @cached_property
    def features(self) -> Float[Tensor, "n d"]:
        return self.extractor(self.data.images)

    @cached_property
    def recognized_by_classifier(self) -> Bool[Tensor, " n"]:
        """Whether the classifier assigns each image to its caption group."""
        assert self.classifier is not None
        features = self.features if self.extractor is self.classifier else self.classifier(self.data.images)
        return self.classifier.predict(features) == self.data.group_of

    @cached_property
    def clip_cosines(self) -> tuple[Float[Tensor, "n captions"], Int64[Tensor, " n"]]:
        """CLIP's cosine of each image with each caption of the set, and the index of its own caption."""
        assert self.clip is not None
        groups, own = self.data.group_of.unique(return_inverse=True)
        texts = self.clip.texts([self.data.caption_groups[group][0] for group in groups.tolist()])
        images = self.features if self.extractor is self.clip else self.clip(self.data.images)
        return images @ texts.T, own

    @property
    def recognized_by_clip(self) -> Bool[Tensor, " n"]:
        """Whether CLIP finds each image closer to its own caption than to any other caption of the set."""
        cosines, own = self.clip_cosines
        return cosines.argmax(1) == own

    @property
    def clip_score(self) -> float:
        """The mean of max(100 cos, 0) of images and captions (Hessel et al. 2021, without their factor 2.5)."""
        cosines, own = self.clip_cosines
        return (100 * cosines.gather(1, own[:, None])).clamp(min=0).mean().item()

    @property
    def recognized(self) -> Bool[Tensor, " n"]:
        """Whether each image shows what its caption says, by the classifier or, without one, by CLIP."""
        return self.recognized_by_clip if self.classifier is None else self.recognized_by_classifier

    @property
    def accuracy(self) -> float:
        return self.recognized.float().mean().item()


class Evaluator:
    """Real images, and the judges that samples are measured with.

    train, test: with the same caption groups. classifier: trained on `train`; None if the captions are no class labels.
    clip: None if there is none that accepts the images; one of the two judges is needed. features: the space that
    distances are measured in; the classifier's by default or, without one, the CLIP's.
    """

    def __init__(
        self,
        train: CaptionedImages,
        test: CaptionedImages,
        classifier: Classifier | None,
        clip: ClipJudge | None,
        features: FeatureExtractor | None = None,
    ) -> None:
        extractor = features or classifier or clip
        if extractor is None or (classifier is None and clip is None):
            raise UserError(
                "features: the captions are no class labels, and the checkpoint's text encoder belongs to no CLIP that "
                "accepts the images; expected a CLIP, for example openai/clip-vit-base-patch32"
            )
        self.train, self.test = train, test
        self.classifier, self.clip, self.extractor = classifier, clip, extractor
        self.training = self.judge(train)
        self.reference = self.judge(subset(test, MAX_REAL))  # in random order: sources are often sorted

    @property
    def judge_name(self) -> str:
        """The judge of prompt accuracy, with a hash of its weights: only figures of the same judge can be compared."""
        return "the checkpoint's CLIP" if self.classifier is None else f"classifier {self.classifier.digest()}"

    def judge(self, data: CaptionedImages) -> Judged:
        return Judged(data, self.classifier, self.clip, self.extractor)

    def prompts(self, count: int, *, paraphrases: bool = False) -> list[tuple[str, int]]:
        """Return up to `count` prompts with their groups: each group's first caption, or all others (`paraphrases`)."""
        wanted = slice(1, None) if paraphrases else slice(0, 1)
        prompts = [(prompt, i) for i, group in enumerate(self.train.caption_groups) for prompt in group[wanted]]
        if not prompts:
            raise UserError("paraphrases: each image in the checkpoint's data has a single caption")
        if count < len(prompts):
            prompts = [prompts[i] for i in sample_indices(len(prompts), 0, 0, count).tolist()]
        return prompts

    def generate(
        self, pipe: TextToImage, prompts: list[tuple[str, int]], count: int, sampling: SamplingOptions
    ) -> Judged:
        """Generate equally many samples of each prompt, at most `count` in all; the first prompt's come first."""
        each = count // len(prompts)
        (first,) = sampling.per_prompt("seed", 1)
        own = {"num_images": each, "seed": [first + number * each for number in range(len(prompts))]}
        images = pipe([prompt for prompt, _ in prompts], **{**vars(sampling), **own}, output_type="pt")
        groups = torch.tensor([group for _, group in prompts]).repeat_interleave(each)
        return self.judge(CaptionedImages(to_bytes(images).cpu(), groups, self.train.caption_groups))

    def measure(self, samples: Judged) -> dict[str, dict[str, float]]:
        """Return {metric: {"samples": value, "real": value}} for all of `METRICS`; "real" is the value of equally many
        real images, the best that samples can reach: no classifier is always right, and no finite set has distance 0.
        """
        count = len(samples.data)
        real = {"train": subset(self.train, count), "test": subset(self.test, count), "whole test": self.test}
        baselines = {name: self.judge(data) for name, data in real.items()}
        measures: dict[str, dict[str, float]] = {}
        for judge, baseline, metric in METRICS:
            if getattr(self, judge) is not None:
                values, of_real = metric(self, samples), metric(self, baselines[baseline])
                measures |= {name: {"samples": value, "real": of_real[name]} for name, value in values.items()}
        return measures

    def distance(self, images: Judged) -> float:
        """Return the Fréchet distance to the test images."""
        return frechet_distance(images.features, self.reference.features)

    def real_baseline(self, count: int) -> float:
        """Return the Fréchet distance of `count` training images."""
        return self.distance(self.judge(subset(self.train, count)))

    def nearest_images(self, samples: Judged, rows: Int64[Tensor, " n"]) -> UInt8[Tensor, "n columns c h w"]:
        """Return samples, each beside its nearest training images, to check for memorization."""
        _, indices = nearest(samples.features[rows], self.training.features, NEIGHBORS)
        return torch.cat([samples.data.images[rows][:, None], self.train.images[indices]], dim=1)


Metric = Callable[[Evaluator, Judged], dict[str, float]]

# The judge that a metric needs, the real images of its baseline (never those that it compares with), the metric.
METRICS: list[tuple[str, str, Metric]] = [
    ("classifier", "whole test", lambda _, x: {"prompt accuracy, classifier": x.accuracy}),
    ("clip", "test", lambda _, x: {"prompt accuracy, CLIP": x.recognized_by_clip.float().mean().item()}),
    ("clip", "test", lambda _, x: {"CLIP score": x.clip_score}),
    ("extractor", "train", lambda real, x: {"Fréchet distance": real.distance(x)}),
    ("extractor", "train", lambda real, x: prdc(x.features, real.reference.features[: len(x.data)])),
    ("classifier", "train", lambda real, x: {CLASSIFICATION: accuracy(train_classifier(x.data), real.test)}),
    ("extractor", "test", lambda real, x: {NEAREST: nearest(x.features, real.training.features, 1)[0].mean().item()}),
]


def load_evaluator(
    pipe: TextToImage,
    config: Config,
    features: FeatureExtractor | None = None,
    training_data: TrainingData | None = None,
) -> Evaluator:
    """Load a checkpoint's data and judges: a classifier if the captions are class labels, and the checkpoint's own CLIP
    or, where it has none that accepts the images, the CLIP given as `features`.
    """
    if training_data is None:
        training_data = open_training_data(config.data, config.seed)
    train, test = load_real_images(config, training_data)
    if len(test) <= NEIGHBORS:
        raise UserError(
            f"data.source: {config.data.source} has {len(test)} images that are not trained on; expected a split named "
            f"test, or data.held_out, with more than {NEIGHBORS}"
        )
    groups = len(train.caption_groups)
    labeled = groups > 1 and len(train) >= MIN_IMAGES_PER_LABEL * groups
    clip = features if isinstance(features, ClipJudge) else None
    try:
        clip = load_clip_judge(config.text.encoder, config.data, config.text.max_length or 77)
    except UserError as error:
        logger.warning("text.encoder: %s; %s", error, "using features" if clip else "skipping CLIP metrics")
    for judge in (clip, features):
        if isinstance(judge, ClipJudge):
            judge.to(pipe.device)
    return Evaluator(train, test, load_or_train_classifier(train) if labeled else None, clip, features)


def load_real_images(config: Config, training_data: TrainingData) -> tuple[CaptionedImages, CaptionedImages]:
    """Return the training and test images, in memory. A source without a test split is tested with the images that
    training holds out.
    """
    whole = training_data.in_memory()
    try:
        return whole, renumber_groups(load_captioned_images(config.data, "test"), whole.caption_groups)
    except UserError as error:
        held_out = training_data.held_out_indices()
        if held_out is None:  # a stream, whose held-out images have no number in the whole set
            raise
        logger.warning("no test images (%s); using the %d that training holds out", error, len(held_out))
        trained_on = torch.ones(len(whole), dtype=torch.bool)
        trained_on[held_out] = False
        return _rows(whole, trained_on.nonzero().squeeze(1)), _rows(whole, held_out)


def held_out_loss(pipe: TextToImage, config: Config, training_data: TrainingData) -> dict[str, Any] | None:
    """Return the training loss on held-out images, by timestep and by caption; None if the run holds out none."""
    objective = Objective(config.objective, pipe.schedule)
    diagnosis = Validator(config, training_data, pipe.text_encoder, objective, pipe.latent_space)
    findings = diagnosis.measure(pipe.unet, Accelerator(cpu=pipe.device.type == "cpu"))
    return None if findings is None else asdict(findings)


def spread(total: int, count: int) -> Int64[Tensor, " n"]:
    """Return up to `count` evenly spaced numbers below `total`."""
    count = min(total, count)
    return torch.arange(count) * total // count


def subset(data: CaptionedImages, count: int) -> CaptionedImages:
    """Return up to `count` images of a set, chosen at random without replacement."""
    return _rows(data, sample_indices(len(data), 0, 0, min(count, len(data))))


def _rows(data: CaptionedImages, rows: Int64[Tensor, " n"]) -> CaptionedImages:
    return replace(data, images=data.images[rows], group_of=data.group_of[rows])
