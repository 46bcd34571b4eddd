"""Validation: the loss on held-out images by timestep, and whether it depends on the captions.

All losses use the averaged weights and the same images, noise and timesteps each time, so that steps of a run, and
different runs, are comparable.
"""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor

from cond_diffusion.config.run import Config
from cond_diffusion.data.cache import TextEmbedder
from cond_diffusion.data.loader import TrainingData
from cond_diffusion.diffusion.objective import Network, Objective
from cond_diffusion.models.latents import LatentSpace, encode_images
from cond_diffusion.seeding import generator

NUM_EXAMPLES = 512
NUM_BUCKETS = 8
# A difference is significant above this number of standard errors and this share of the loss.
MIN_STANDARD_ERRORS, MIN_RELATIVE_DIFFERENCE = 3, 0.002


@dataclass(frozen=True)
class ValidationResult:
    """Held-out losses, means over the examples."""

    by_timestep: list[float]  # with the true captions, in `NUM_BUCKETS` equal ranges of timesteps
    true_caption: float
    other_caption: float  # with captions of other images
    no_caption: float
    difference: float  # `other_caption - true_caption`
    its_error: float  # standard error of the difference
    captions_are_alike: bool = False  # all are the same

    @property
    def text_is_used(self) -> bool:
        """Whether captions of other images increase the loss significantly."""
        return self.difference > max(MIN_STANDARD_ERRORS * self.its_error, MIN_RELATIVE_DIFFERENCE * self.true_caption)

    def summary(self) -> str:
        """Describe the mean losses and whether the network uses the text."""
        losses = (
            f"held-out loss {self.true_caption:.4f}, with captions of other images {self.other_caption:.4f}, "
            f"without captions {self.no_caption:.4f}"
        )
        if self.captions_are_alike:
            return f"{losses}: all held-out captions are the same, so the use of the text cannot be measured"
        if self.text_is_used:
            return f"{losses}: the network uses the text"
        return f"{losses}: no significant difference; so far the network ignores the text"


@dataclass(eq=False)
class Validator:
    """Computes the losses of fixed held-out examples."""

    config: Config
    training_data: TrainingData
    text_embedder: TextEmbedder
    objective: Objective
    latent_space: LatentSpace

    def __post_init__(self) -> None:
        self.batch = self.training_data.held_out(NUM_EXAMPLES)
        if self.batch is None:
            return
        seed = self.config.seed
        shape = (NUM_EXAMPLES, *self.latent_space.shape(self.config.data))
        self.eps = torch.randn(shape, generator=generator("held-out noise", seed))
        # Timesteps are evenly spaced, in an order that is independent of the images'.
        order = torch.randperm(NUM_EXAMPLES, generator=generator("held-out timesteps", seed))
        self.t = order * self.objective.schedule.num_timesteps // NUM_EXAMPLES
        self.bucket = order * NUM_BUCKETS // NUM_EXAMPLES

    @torch.no_grad()
    def measure(self, network: Network, accelerator: Accelerator) -> ValidationResult | None:
        """Compute the held-out losses, shared among processes; all of them must call this. None if no images are held
        out."""
        if self.batch is None:
            return None
        true_captions = self.batch.captions
        losses = torch.zeros(3, NUM_EXAMPLES, device=accelerator.device)
        local = torch.arange(NUM_EXAMPLES)[accelerator.process_index :: accelerator.num_processes]
        rows = (true_captions, mismatched_captions(true_captions), [""] * NUM_EXAMPLES)
        for indices in local.split(self.config.train.batch_size):
            x_0 = encode_images(self.batch.images[indices].to(accelerator.device), self.latent_space)
            t, eps = self.t[indices], self.eps[indices].to(accelerator.device)
            for row, captions in enumerate(rows):
                context = self.text_embedder([captions[i] for i in indices.tolist()]).to(accelerator.device)
                losses[row, indices] = self.objective.losses(network, x_0, t, eps, context)
        total: Tensor = accelerator.reduce(losses, "sum")  # type: ignore[assignment]
        result = summarize_losses(total.cpu().double(), self.bucket)
        return replace(result, captions_are_alike=len(set(true_captions)) == 1)


def mismatched_captions(captions: list[str]) -> list[str]:
    """Return for each caption the next different one; the caption itself if all are the same."""
    twice = captions + captions
    return [
        next((other for other in twice[i + 1 : i + len(captions)] if other != caption), caption)
        for i, caption in enumerate(captions)
    ]


def summarize_losses(losses: Float[Tensor, "3 n"], bucket: Int64[Tensor, " n"]) -> ValidationResult:
    """Average the losses of n examples with true, other and empty captions (rows of `losses`)."""
    true, other, empty = losses
    difference = other - true
    return ValidationResult(
        by_timestep=[true[bucket == i].mean().item() for i in range(NUM_BUCKETS)],
        true_caption=true.mean().item(),
        other_caption=other.mean().item(),
        no_caption=empty.mean().item(),
        difference=difference.mean().item(),
        its_error=(difference.var() / len(difference)).sqrt().item(),
    )
