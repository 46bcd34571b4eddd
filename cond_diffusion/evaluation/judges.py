"""A plain CNN that classifies images by caption group: the reference for prompt accuracy and Fréchet distance.

For the built-in data its weights are shipped, so that figures compare across machines. For other data it is trained
once and kept in the user's cache.
"""

import hashlib
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float, Int64, UInt8
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from cond_diffusion.data.cache import cache_folder
from cond_diffusion.data.dataset import CaptionedImages
from cond_diffusion.errors import UserError
from cond_diffusion.images import to_model
from cond_diffusion.order import sample_indices
from cond_diffusion.pipeline.checkpoint import add_weights, save_tensors

SHIPPED = Path(__file__).parent.parent / "assets" / "mnist_classifier" / "classifier.safetensors"
TRAINED_ON = "trained_on"  # metadata of the shipped file: the fingerprint of its training set

EPOCHS, LEAST_STEPS, BATCH_SIZE, LEARNING_RATE = 4, 300, 128, 2e-3
NUM_FEATURES = 128
PIXELS_AT_ONCE = 100 * 28 * 28


class Classifier(nn.Module):
    """From a picture to features, the last hidden layer, and from these to one logit for each caption group."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(3)],
            *[nn.Flatten(), nn.Linear(128 * 9, NUM_FEATURES), nn.ReLU()],
        )
        self.head = nn.Linear(NUM_FEATURES, num_groups)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # on a CPU twice as fast

    def features(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Return the features of a few pictures, with gradients."""
        return self.body(to_model(images).contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Return the features of pictures."""
        at_once = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
        return torch.cat([self.features(batch) for batch in images.split(at_once)])

    @torch.no_grad()
    def classify(self, images: UInt8[Tensor, "n c h w"]) -> Int64[Tensor, " n"]:
        """Return the number of the caption group that each picture looks most like."""
        return self.head(self(images)).argmax(1)

    def digest(self) -> str:
        """Return a hash of the weights; figures compare only where it is the same."""
        digest = hashlib.blake2b(digest_size=8)
        add_weights(digest, self.state_dict().items())
        return digest.hexdigest()


def train_classifier(data: CaptionedImages) -> Classifier:
    """Train on `data` for some epochs, on a small set for more of them, the learning rate falling to 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(data.images.shape[1], len(data.caption_groups))
    steps = max(LEAST_STEPS, EPOCHS * len(data) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", unit=" steps", leave=False):
        indices = sample_indices(len(data), 0, step * BATCH_SIZE, BATCH_SIZE)
        logits = classifier.head(classifier.features(data.images[indices]))
        optimizer.zero_grad()
        F.cross_entropy(logits, data.group_of[indices]).backward()
        optimizer.step()
        rate.step()
    return classifier.eval()


def fingerprint(data: CaptionedImages) -> str:
    """Return a hash of the images and of their labels."""
    digest = hashlib.blake2b(data.images.numpy().data, digest_size=8)
    digest.update(data.group_of.numpy().data)
    return digest.hexdigest()


def kept_classifier(data: CaptionedImages) -> Classifier:
    """Return the classifier of a data set: the shipped one if it was trained on these images and labels, else the one
    in the cache, which is trained on first use.
    """
    trained_on = fingerprint(data)
    with safe_open(SHIPPED, "pt") as shipped:
        if (shipped.metadata() or {}).get(TRAINED_ON) == trained_on:
            return _load(SHIPPED, data)
    settings = (trained_on, data.caption_groups, EPOCHS, LEAST_STEPS, BATCH_SIZE, LEARNING_RATE, NUM_FEATURES)
    key = hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()
    file = cache_folder() / f"classifier-{key}.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".lock").touch()
    except OSError as error:
        raise UserError(f"the classifier cannot be kept in {file.parent}: {error.strerror}") from error
    with FileLock(file.with_suffix(".lock")):  # of several processes one trains it, and the others wait
        if not file.exists():
            weights = train_classifier(data).state_dict()
            save_tensors({name: tensor.contiguous() for name, tensor in weights.items()}, file)
        return _load(file, data)


def _load(file: Path, data: CaptionedImages) -> Classifier:
    classifier = Classifier(data.images.shape[1], len(data.caption_groups))
    classifier.load_state_dict(load_file(file))
    return classifier.eval()


def accuracy(classifier: Classifier, trained_on: CaptionedImages, images: CaptionedImages) -> float:
    """Return the share of pictures whose caption group the classifier, trained on another set, tells."""
    number = {captions: i for i, captions in enumerate(trained_on.caption_groups)}
    # Captions that training never saw have number -1, and no picture is recognised as theirs.
    labels = torch.tensor([number.get(captions, -1) for captions in images.caption_groups])[images.group_of]
    return (classifier.classify(images.images) == labels).float().mean().item()
