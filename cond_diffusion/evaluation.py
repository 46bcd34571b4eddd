"""How often a picture shows what its prompt says, in the eyes of a classifier that was trained on real pictures.

`python -m cond_diffusion.evaluation` draws samples of a checkpoint's own captions with the default settings of
sample.py, and counts those that a plain CNN recognises. The CNN is trained once on the checkpoint's training images
and kept; its own accuracy on the real test images is printed beside the result, which cannot be trusted further than
that.
"""

import argparse
import hashlib
import sys

import torch
from jaxtyping import Float, Int64
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from cond_diffusion.checkpoint import save_tensors
from cond_diffusion.config import checkpoint_config
from cond_diffusion.contexts import cache_folder
from cond_diffusion.data import CaptionedImages, load_captioned_images
from cond_diffusion.errors import UserError, command_line
from cond_diffusion.pictures import from_pillow, to_model
from cond_diffusion.pipeline import TextToImage
from cond_diffusion.randomness import generator

EPOCHS, BATCH_SIZE, LEARNING_RATE = 4, 128, 2e-3


class Classifier(nn.Sequential):
    """A plain CNN: from a picture in [-1, 1] to one logit for each caption group."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__(
            *[nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(3)],
            *[nn.Flatten(), nn.Linear(128 * 9, num_groups)],
        )

    @torch.no_grad()
    def classify(self, images: Float[Tensor, "n c h w"]) -> Int64[Tensor, " n"]:
        """Return the number of the caption group that each picture looks most like."""
        return torch.cat([self(batch).argmax(1) for batch in images.split(500)])


def train_classifier(data: CaptionedImages) -> Classifier:
    """Train on `data`, the learning rate falling to 0."""
    torch.manual_seed(0)
    classifier = Classifier(data.images.shape[1], len(data.caption_groups))
    steps = max(1, EPOCHS * len(data) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    epochs = [torch.randperm(len(data), generator=generator("order", 0, epoch)) for epoch in range(EPOCHS)]
    batches = torch.cat(epochs).split(BATCH_SIZE)[:steps]
    for indices in tqdm(batches, desc="training the classifier", unit=" steps", leave=False):
        loss = F.cross_entropy(classifier(to_model(data.images[indices])), data.group_of[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return classifier.eval()


def kept_classifier(data: CaptionedImages) -> Classifier:
    """Return the classifier for a data set, trained if this machine has not done so before."""
    key = hashlib.blake2b(repr((data.caption_groups, EPOCHS, BATCH_SIZE, LEARNING_RATE)).encode(), digest_size=8)
    key.update(data.images.numpy().data)
    key.update(data.group_of.numpy().data)
    file = cache_folder() / f"classifier-{key.hexdigest()}.safetensors"
    if file.exists():
        classifier = Classifier(data.images.shape[1], len(data.caption_groups))
        classifier.load_state_dict(load_file(file))
        return classifier.eval()
    classifier = train_classifier(data)
    save_tensors(classifier.state_dict(), file)
    return classifier


def accuracy_on_real_images(classifier: Classifier, train: CaptionedImages, test: CaptionedImages) -> float:
    """Return the share of real test images that the classifier gets right."""
    number = {captions: i for i, captions in enumerate(train.caption_groups)}
    # Captions that training never saw have number -1, and no picture is recognised as theirs.
    labels = torch.tensor([number.get(captions, -1) for captions in test.caption_groups])[test.group_of]
    return (classifier.classify(to_model(test.images)) == labels).float().mean().item()


def recognised(classifier: Classifier, images: list[Image.Image], groups: list[int]) -> Tensor:
    """Return, for each picture, whether the classifier sees the group that the prompt named."""
    return classifier.classify(torch.stack([from_pillow(image) for image in images])) == torch.tensor(groups)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Count the samples that a classifier recognises as what the prompt says."
    )
    parser.add_argument(
        "--checkpoint", default="builtin", help="a run folder, a checkpoint folder or a hub id (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=1000, help="how many pictures to draw (default: %(default)s)")
    parser.add_argument("--paraphrases", action="store_true", help="use all captions but the first of each group")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="(default: %(default)s)")
    parser.add_argument("--sampler", default="ddpm", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help="timesteps to visit (default: the whole chain)")
    parser.add_argument("--seed", type=int, default=0, help="of each prompt's first picture (default: %(default)s)")
    arguments = parser.parse_args()

    pipe = TextToImage.from_pretrained(arguments.checkpoint).to_accelerator()
    config = checkpoint_config(pipe.folder).data
    train, test = load_captioned_images(config), load_captioned_images(config, "test")
    classifier = kept_classifier(train)
    print(f"the classifier recognises {accuracy_on_real_images(classifier, train, test):.2%} of the real test images")

    wanted = slice(1, None) if arguments.paraphrases else slice(0, 1)
    prompts = [(prompt, i) for i, captions in enumerate(train.caption_groups) for prompt in captions[wanted]]
    if not prompts:
        raise UserError("--paraphrases: every picture has one caption only in this checkpoint's data")
    if arguments.samples < len(prompts):
        raise UserError(
            f"--samples: {arguments.samples} is fewer than the {len(prompts)} prompts; draw at least one of each"
        )
    each = arguments.samples // len(prompts)
    images = pipe(
        [prompt for prompt, _ in prompts],
        num_images=each,
        guidance_scale=arguments.guidance_scale,
        sampler=arguments.sampler,
        steps=arguments.steps,
        seed=arguments.seed,
    )
    right = recognised(classifier, images, [group for _, group in prompts for _ in range(each)])
    for (prompt, _), share in sorted(zip(prompts, right.reshape(-1, each).float().mean(1), strict=True)):
        print(f"{prompt:32} {share:7.1%}")
    print(f"{'recognised, of ' + str(len(right)):32} {right.float().mean():7.1%}")


if __name__ == "__main__":
    sys.exit(command_line(main))
