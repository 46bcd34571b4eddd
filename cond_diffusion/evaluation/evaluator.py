"""The evaluator: measures generated images against real ones with a classifier, a CLIP, and a feature extractor."""

import logging
from collections.abc import Callable
from dataclasses import InitVar, asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from cond_diffusion.config.run import Config
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.data.dataset import CaptionedImages, load_captioned_images
from cond_diffusion.data.loader import ShuffledDataset, TrainingData, open_training_data
from cond_diffusion.device import autocast
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation import metrics
from cond_diffusion.images import to_bytes
from cond_diffusion.models.clip import ClipJudge, nearest_captions
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.seeding import sample_indices
from cond_diffusion.training.validation import Validator

MAX_REAL = 10_000  # number of test images in the comparison of features
MIN_IMAGES_PER_LABEL = 20  # per caption group; with fewer images captions are not class labels
NEIGHBORS = 5

CLASSIFICATION = "accuracy on test images of a classifier trained on them"  # Ravuri and Vinyals 2019
NEAREST = "distance to the nearest training image"

FeatureExtractor = Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n d"]]
"""Maps images to features: a `Classifier`, a `ClipJudge`, or any other network."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Judged:
    """Captioned images with the outputs of the evaluation models, which are computed on first use and cached."""

    data: CaptionedImages
    classifier: metrics.Classifier | None
    clip: ClipJudge | None
    extractor: FeatureExtractor

    @cached_property
    def features(self) -> Float[Tensor, "n d"]:
        return self.extractor(self.data.images)

    @cached_property
    def _by_clip(self) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
        """`recognized_by_clip`, and the CLIP cosine similarity of each image to its caption."""
        assert self.clip is not None
        captions = [group[0] for group in self.data.caption_groups]
        number_of = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        own = torch.tensor([number_of[caption] for caption in captions])[self.data.group_of]
        texts = self.clip.texts([*number_of])
        images = self.features if self.extractor is self.clip else self.clip(self.data.images)
        return nearest_captions(images, texts, 1)[:, 0] == own, (images * texts[own]).sum(1)

    @property
    def recognized_by_clip(self) -> Bool[Tensor, " n"]:
        """Whether, of the first captions of all groups, the most similar to each image is its own."""
        return self._by_clip[0]

    @property
    def clip_score(self) -> float:
        """The mean of max(100 cos, 0) over images (Hessel et al. 2021, without the factor 2.5)."""
        return (100 * self._by_clip[1]).clamp(min=0).mean().item()

    @cached_property
    def recognized(self) -> Bool[Tensor, " n"]:
        """Whether each image matches its caption, according to the classifier or, without one, to the CLIP."""
        if self.classifier is None:
            return self.recognized_by_clip
        features = self.features if self.extractor is self.classifier else self.classifier(self.data.images)
        return self.classifier.predict(features) == self.data.group_of

    @property
    def accuracy(self) -> float:
        """The fraction of images that match their captions."""
        return self.recognized.float().mean().item()


@dataclass(eq=False)
class Evaluator:
    """Real images and evaluation models to measure samples with.

    Args:
        train: Training images.
        test: Test images, with the same caption groups.
        classifier: Classifier trained on `train`; None if the captions are not class labels.
        clip: CLIP that accepts the images, if there is one. A classifier or a CLIP is required.
        features: Feature extractor for distances; by default the classifier or, without one, the CLIP.
    """

    train: CaptionedImages
    test: CaptionedImages
    classifier: metrics.Classifier | None
    clip: ClipJudge | None
    features: InitVar[FeatureExtractor | None] = None

    def __post_init__(self, features: FeatureExtractor | None) -> None:
        judge = self.classifier or self.clip
        if judge is None:
            raise UserError(
                "features: the captions are not class labels, and the checkpoint's text encoder does not belong "
                "to a CLIP that accepts the images; expected a CLIP, for example openai/clip-vit-base-patch32"
            )
        self.extractor: FeatureExtractor = features or judge
        self.training = self.judge(self.train)
        self.reference = self.judge(subset(self.test, MAX_REAL))  # random, since data sets are often sorted

    @property
    def judge_name(self) -> str:
        """The model of prompt accuracy, with a hash of its weights; values of different models are not comparable."""
        kind, judge = ("classifier", self.classifier) if self.classifier else ("CLIP", cast(ClipJudge, self.clip))
        return f"{kind} {metrics.digest(judge)}"

    def judge(self, data: CaptionedImages) -> Judged:
        """Attach the evaluation models to images."""
        return Judged(data, self.classifier, self.clip, self.extractor)

    def prompts(self, count: int, *, paraphrases: bool = False) -> list[tuple[str, int]]:
        """Return up to `count` prompts with the indices of their caption groups: the first caption of each, or all
        others (`paraphrases`)."""
        selected = slice(1, None) if paraphrases else slice(0, 1)
        prompts = [(prompt, i) for i, group in enumerate(self.train.caption_groups) for prompt in group[selected]]
        if not prompts:
            raise UserError("paraphrases: True; every image of the checkpoint's data has a single caption")
        if count < len(prompts):
            prompts = [prompts[i] for i in sample_indices(len(prompts), 0, 0, count).tolist()]
        return prompts

    def generate(
        self, pipe: TextToImage, prompts: list[tuple[str, int]], count: int, sampling: SamplingOptions
    ) -> Judged:
        """Generate the same number of samples of each prompt, at most `count` in total, in the order of the prompts."""
        num_images = count // len(prompts)
        images = generate(pipe, [prompt for prompt, _ in prompts], num_images, sampling)
        groups = torch.tensor([group for _, group in prompts]).repeat_interleave(num_images)
        # The groups of the test images begin with those of training: CLIP compares both with the same captions.
        return self.judge(CaptionedImages(images, groups, self.test.caption_groups))

    def measure(self, samples: Judged) -> dict[str, dict[str, float]]:
        """Return {metric: {"samples": value, "real": value}} for all of `METRICS`. "real" is the value of the same
        number of real images, the best that samples can reach: classifiers make errors, and finite sets have distances
        above 0."""
        count = len(samples.data)
        for name, data in (("training", self.train), ("test", self.test)):
            if len(data) < count:
                message = "data.source: only %d %s images for %d samples; values of so few are not comparable"
                logger.warning(message, len(data), name, count)
        real = {"train": subset(self.train, count), "test": subset(self.test, count), "whole test": self.test}
        baselines = {name: self.judge(data) for name, data in real.items()}
        measures: dict[str, dict[str, float]] = {}
        for model, baseline, metric in METRICS:
            if getattr(self, model) is not None:
                values, real_values = metric(self, samples), metric(self, baselines[baseline])
                measures |= {name: {"samples": value, "real": real_values[name]} for name, value in values.items()}
        return measures

    def distance(self, images: Judged) -> float:
        """Return the Fréchet distance to the test images."""
        return metrics.frechet_distance(images.features, self.reference.features)

    def real_baseline(self, count: int) -> float:
        """Return the Fréchet distance of `count` training images."""
        return self.distance(self.judge(subset(self.train, count)))

    def distance_to_training(self, images: Judged) -> float:
        """Return the mean distance of images to their nearest training images."""
        return metrics.nearest(images.features, self.training.features, 1)[0].mean().item()

    def nearest_images(self, samples: Judged, rows: Int64[Tensor, " n"]) -> UInt8[Tensor, "n columns c h w"]:
        """Return the samples `rows`, each followed by its nearest training images, to check for memorization."""
        _, indices = metrics.nearest(samples.features[rows], self.training.features, NEIGHBORS)
        return torch.cat([samples.data.images[rows][:, None], self.train.images[indices]], dim=1)


# The model that the metric needs, the real images of its baseline (not those that it compares with), the metric.
METRICS: list[tuple[str, str, Callable[[Evaluator, Judged], dict[str, float]]]] = [
    ("classifier", "whole test", lambda _, x: {"prompt accuracy, classifier": x.accuracy}),
    ("clip", "test", lambda _, x: {"prompt accuracy, CLIP": x.recognized_by_clip.float().mean().item()}),
    ("clip", "test", lambda _, x: {"CLIP score": x.clip_score}),
    ("extractor", "train", lambda real, x: {"Fréchet distance": real.distance(x)}),
    ("extractor", "train", lambda real, x: metrics.prdc(x.features, real.reference.features[: len(x.data)])),
    ("classifier", "train", lambda real, x: {CLASSIFICATION: metrics.train_classifier(x.data).accuracy(real.test)}),
    ("extractor", "test", lambda real, x: {NEAREST: real.distance_to_training(x)}),
]


def load_evaluator(
    pipe: TextToImage, config: Config, features: FeatureExtractor | None = None, training: TrainingData | None = None
) -> Evaluator:
    """Load the data and the evaluation models of a checkpoint.

    The classifier is loaded or trained if the captions are class labels. The CLIP is the checkpoint's own or, if that
    does not accept the images, the one given as `features`. `training` is passed if it is already open.
    """
    if training is None:
        training = open_training_data(config.data, config.seed)
    train, test = load_real_images(config, training)
    for name, images, where in (("training", train, ""), ("test", test, ", in a split named test or by data.held_out")):
        if len(images) <= NEIGHBORS:
            found = f"{config.data.source} has {len(images)} {name} images"
            raise UserError(f"data.source: {found}; expected more than {NEIGHBORS}{where}")
    num_groups = len(train.caption_groups)
    has_labels = num_groups > 1 and len(train) >= MIN_IMAGES_PER_LABEL * num_groups
    clip = features if isinstance(features, ClipJudge) else None
    try:
        clip = metrics.load_clip_judge(config.clip, config.data, config.text.max_length or 77)
    except UserError as error:
        logger.warning("text.encoder: %s; %s", error, "using features" if clip else "skipping CLIP metrics")
    for model in (clip, features):
        if isinstance(model, ClipJudge):
            model.to(pipe.device)
    return Evaluator(train, test, metrics.load_or_train_classifier(train) if has_labels else None, clip, features)


def load_real_images(config: Config, training_data: TrainingData) -> tuple[CaptionedImages, CaptionedImages]:
    """Load the training and the test images into memory; without a test split, the held-out images replace it."""
    data = training_data.in_memory()
    try:
        return data, metrics.renumber_groups(load_captioned_images(config.data, "test"), data.caption_groups)
    except UserError as error:
        if training_data.held_out_indices() is None:  # those of a stream have no indices in the whole data set
            raise
        held_out = ShuffledDataset(data, config.seed, config.data.held_out).held_out_indices()
        logger.warning("%s; using the %d held-out images as test images", error, len(held_out))
        is_held_out = torch.isin(torch.arange(len(data)), held_out)
        return _rows(data, ~is_held_out), _rows(data, held_out)


def held_out_loss(pipe: TextToImage, config: Config, training_data: TrainingData) -> dict[str, Any] | None:
    """Compute the training loss of held-out images, by timestep and by caption; None if the run holds out none."""
    objective = Objective(config.objective, pipe.schedule)
    validator = Validator(config, training_data, pipe.text_encoder, objective, pipe.latent_space)
    with autocast(pipe.precision, pipe.device):
        result = validator.measure(pipe.unet, Accelerator(cpu=pipe.device.type == "cpu"))
    return None if result is None else asdict(result)


def generate(
    pipe: TextToImage, prompts: list[str], num_images: int, sampling: SamplingOptions
) -> UInt8[Tensor, "n c h w"]:
    """Generate images of each prompt, in the order of the prompts; image i of all has the seed `sampling.seed` + i."""
    (seed,) = sampling.per_prompt("seed", 1)
    seeds = [seed + i * num_images for i in range(len(prompts))]
    images = pipe(prompts, **{**vars(sampling), "num_images": num_images, "seed": seeds}, output_type="pt")
    return to_bytes(cast(Tensor, images)).cpu()


def spread(total: int, count: int) -> Int64[Tensor, " n"]:
    """Return up to `count` evenly spaced indices below `total`."""
    count = min(total, count)
    return torch.arange(count) * total // count


def subset(data: CaptionedImages, count: int) -> CaptionedImages:
    """Return up to `count` random images of a set, without replacement."""
    return _rows(data, sample_indices(len(data), 0, 0, min(count, len(data))))


def _rows(data: CaptionedImages, rows: Int64[Tensor, " m"] | Bool[Tensor, " n"]) -> CaptionedImages:
    return replace(data, images=data.images[rows], group_of=data.group_of[rows], is_read=None)
