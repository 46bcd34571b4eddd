"""Evaluation models and metrics.

Models: a CNN that classifies images by caption group, and a CLIP that compares images with captions. The package
contains the classifier of the built-in data, so that results are comparable across machines; for other data it is
trained once and kept in the user's cache.

Metrics: the similarity of two sets of images, given as features: n rows of samples and m rows of real images. The
features come from any network: the classifier, a CLIP, or an Inception network for photographs.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.dataset import CaptionedImages
from cond_diffusion.data.sources import CaptionGroup
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.files import cache_folder, hash_weights, save_tensors
from cond_diffusion.images import to_model
from cond_diffusion.models.clip import ClipJudge
from cond_diffusion.seeding import sample_indices

SHIPPED = Path(__file__).parent.parent / "assets" / "mnist_classifier" / "classifier.safetensors"
TRAINED_ON = "trained_on"  # metadata key of the shipped file: fingerprint of its training set

EPOCHS, MIN_STEPS, BATCH_SIZE, LEARNING_RATE = 4, 300, 128, 2e-3
NUM_FEATURES = 128
PIXELS_PER_BATCH = 100 * 28 * 28


class Classifier(nn.Module):
    """A CNN that maps images to features (its last hidden layer), and features to one logit per caption group."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(3)],
            *[nn.Flatten(), nn.Linear(128 * 9, NUM_FEATURES), nn.ReLU()],
        )
        self.head = nn.Linear(NUM_FEATURES, num_groups)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPUs

    def features(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Compute the features of one batch, with gradients."""
        return self.body(to_model(images).contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Compute the features of any number of images, in batches and without gradients."""
        batch_size = max(1, PIXELS_PER_BATCH // (images.shape[2] * images.shape[3]))
        return torch.cat([self.features(batch) for batch in images.split(batch_size)])

    @torch.no_grad()
    def predict(self, features: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """Return the most likely caption group of each row of features."""
        return self.head(features).argmax(1)

    def accuracy(self, data: CaptionedImages) -> float:
        """Return the fraction of images assigned to their caption group, numbered as in the training set."""
        return (self.predict(self(data.images)) == data.group_of).float().mean().item()


def digest(model: nn.Module) -> str:
    """Return a hash of a model's weights; results of judges with different weights are not comparable."""
    hashed = hashlib.blake2b(digest_size=8)
    hash_weights(hashed, model.state_dict().items())
    return hashed.hexdigest()


def train_classifier(data: CaptionedImages) -> Classifier:
    """Train a classifier for `EPOCHS` epochs, but at least `MIN_STEPS` steps, with a one-cycle learning rate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(data.images.shape[1], len(data.caption_groups))
    steps = max(MIN_STEPS, EPOCHS * len(data) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", unit=" steps", leave=False):
        indices = sample_indices(len(data), 0, step * BATCH_SIZE, BATCH_SIZE)
        logits = classifier.head(classifier.features(data.images[indices]))
        optimizer.zero_grad()
        F.cross_entropy(logits, data.group_of[indices]).backward()
        optimizer.step()
        scheduler.step()
    return classifier.eval()


def load_or_train_classifier(data: CaptionedImages) -> Classifier:
    """Return the shipped classifier if it was trained on this data, else one from the cache, trained on first use."""
    trained_on = fingerprint(data)
    with safe_open(SHIPPED, "pt") as shipped:
        if (shipped.metadata() or {}).get(TRAINED_ON) == trained_on:
            return _load(SHIPPED, data)
    settings = (trained_on, data.caption_groups, EPOCHS, MIN_STEPS, BATCH_SIZE, LEARNING_RATE, NUM_FEATURES)
    key = hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()
    file = cache_folder() / f"classifier-{key}.safetensors"
    with user_errors(f"cache: the classifier cannot be saved in {file.parent}", OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".lock").touch()
        with FileLock(file.with_suffix(".lock")):  # of several processes, one trains while the others wait
            if not file.exists():
                weights = train_classifier(data).state_dict()
                save_tensors({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    return _load(file, data)


def _load(file: Path, data: CaptionedImages) -> Classifier:
    classifier = Classifier(data.images.shape[1], len(data.caption_groups))
    classifier.load_state_dict(load_file(file))
    return classifier.eval()


def fingerprint(data: CaptionedImages) -> str:
    """Return a hash of the images and their caption groups."""
    digest = hashlib.blake2b(data.images.numpy().data, digest_size=8)
    digest.update(data.group_of.numpy().data)
    return digest.hexdigest()


def renumber_groups(data: CaptionedImages, caption_groups: tuple[CaptionGroup, ...]) -> CaptionedImages:
    """Return `data` with its groups numbered as in `caption_groups`; groups that are missing there come last."""
    index_of = {group: i for i, group in enumerate(dict.fromkeys([*caption_groups, *data.caption_groups]))}
    group_of = torch.tensor([index_of[group] for group in data.caption_groups])[data.group_of]
    return replace(data, group_of=group_of, caption_groups=tuple(index_of))


def load_clip_judge(source: str, data: DataConfig, max_length: int = 77) -> ClipJudge:
    """Load a CLIP that accepts the images of `data`."""
    judge = ClipJudge.from_pretrained(source, max_length)
    vision = cast(Any, judge.clip.config.vision_config)
    if judge.processor is None and (vision.num_channels, vision.image_size) != (data.channels, data.resolution):
        shape = (data.channels, data.resolution, data.resolution)
        raise UserError(f"CLIP: {source} does not accept images of shape {shape}")
    return judge


def frechet_distance(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float:
    """Compute the Fréchet distance of Gaussians with the features' means and covariances (Heusel et al. 2017, eq. 6).

    Values are larger for fewer images; compare them with the value of the same number of real images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # in the extra `eval`

    identity = nn.Identity()
    identity.num_features = samples.shape[1]  # torchmetrics reads this from the network  # pyright: ignore
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(samples.double(), real=False)
    return metric.compute().item()


def prdc(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 5) -> dict[str, float]:
    """Compute precision, recall, density and coverage, which compare the manifolds of two sets of features.

    The manifold of a set is the union of balls, around each row, that reach to its k-th nearest neighbor.

    Returns:
        precision, recall: Fraction of samples in a ball of a real image, and vice versa (Kynkäänniemi et al. 2019).
        density: Mean number of balls of real images around a sample, divided by k (Naeem et al. 2020).
        coverage: Fraction of real images whose ball contains a sample (Naeem et al. 2020).
        For equal distributions, density and coverage are close to 1, precision and recall are lower.
    """
    if min(len(samples), len(real)) <= k:
        found = f"{len(samples)} samples and {len(real)} real images"
        raise UserError(f"samples: {found}; precision and recall need more than {k} each")
    samples, real = samples.double(), real.double()
    # Of the k + 1 nearest rows, the first is the row itself.
    sample_radii, real_radii = (nearest(rows, rows, k + 1)[0][:, -1] for rows in (samples, real))
    distance = torch.cdist(samples, real)
    in_real_ball = distance < real_radii
    return {
        "precision": in_real_ball.any(1).double().mean().item(),
        "recall": (distance < sample_radii[:, None]).any(0).double().mean().item(),
        "density": in_real_ball.double().sum(1).mean().item() / k,
        "coverage": in_real_ball.any(0).double().mean().item(),
    }


def nearest(
    samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Return the distances from each sample to its k nearest real images, and their indices."""
    real = real.double()  # in fp32 the distance of identical rows is above 0
    neighbors = [torch.cdist(rows.double(), real).topk(k, dim=1, largest=False) for rows in samples.split(250)]
    return torch.cat([found.values for found in neighbors]), torch.cat([found.indices for found in neighbors])
