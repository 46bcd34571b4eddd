"""What a run learns about itself while it trains: the loss on pictures that it is not trained on, timestep by timestep,
and whether the captions make any difference.

All of it is measured with the averaged weights, on the same pictures with the same noise each time, so that two steps
of a run, and two runs, can be compared.
"""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor

from cond_diffusion.config.run import Config
from cond_diffusion.data.cache import TextEmbedder
from cond_diffusion.data.dataset import RandomDraws
from cond_diffusion.data.loader import TrainingData
from cond_diffusion.diffusion.objective import Network, Objective
from cond_diffusion.models.latents import LatentSpace, encode_images
from cond_diffusion.seeding import generator

EXAMPLES = 512
BUCKETS = 8
SURE, LEAST = 3, 0.002  # standard errors, and share of the loss, that a difference has to exceed to be one


@dataclass(frozen=True)
class ValidationResult:
    """Held-out losses: by timestep, in `BUCKETS` equal parts of the chain, and over all with the true captions, with
    those of other pictures, and without any.

    difference, its_error: how much worse other captions are, on average over the examples, with its standard error.
    captions_are_alike: there are no other captions.
    """

    by_timestep: list[float]
    true_caption: float
    other_caption: float
    no_caption: float
    difference: float
    its_error: float
    captions_are_alike: bool = False

    @property
    def text_is_used(self) -> bool:
        return self.difference > max(SURE * self.its_error, LEAST * self.true_caption)

    def summary(self) -> str:
        """Say what was found."""
        losses = (
            f"held-out loss {self.true_caption:.4f}, with the captions of other pictures {self.other_caption:.4f}, "
            f"without captions {self.no_caption:.4f}"
        )
        if self.captions_are_alike:
            return f"{losses}: the held-out captions are all the same, so nothing can be said of the text"
        if self.text_is_used:
            return f"{losses}: the text is used"
        return f"{losses}: no difference to speak of; so far the network ignores the text"


class Validator:
    """Fixed examples: held-out pictures with their captions, noise and timesteps.

    contexts: captions to their contexts.
    """

    def __init__(
        self,
        config: Config,
        training_data: TrainingData,
        contexts: TextEmbedder,
        objective: Objective,
        latent_space: LatentSpace,
    ) -> None:
        self.latent_space = latent_space
        self.contexts = contexts
        self.objective = objective
        self.batch_size = config.train.batch_size
        middle = torch.full((EXAMPLES,), 0.5, dtype=torch.float64)
        first_caption = torch.zeros_like(middle)
        self.batch = training_data.held_out(RandomDraws(first_caption, middle))
        if self.batch is None:
            return
        self.images = self.batch.images
        draw = generator("held-out noise", config.seed)
        self.eps = torch.randn((EXAMPLES, *latent_space.shape(config.data)), generator=draw)
        # Every part of the chain alike, and in an order that has nothing to do with that of the pictures.
        order = torch.randperm(EXAMPLES, generator=generator("held-out timesteps", config.seed))
        self.t = order * objective.schedule.num_timesteps // EXAMPLES
        self.bucket = order * BUCKETS // EXAMPLES

    @torch.no_grad()
    def measure(self, network: Network, accelerator: Accelerator) -> ValidationResult | None:
        """Measure; None if no pictures are held out. All processes must ask together, and share the work."""
        if self.batch is None:
            return None
        captions = self.batch.captions
        losses = torch.zeros(3, EXAMPLES, device=accelerator.device)
        mine = torch.arange(EXAMPLES)[accelerator.process_index :: accelerator.num_processes]
        for row, words in enumerate((captions, others(captions), [""] * EXAMPLES)):
            for indices in mine.split(self.batch_size):
                losses[row, indices] = self._losses(network, indices, words, accelerator.device)
        total: Tensor = accelerator.reduce(losses, "sum")  # type: ignore[assignment]
        return replace(summarize_losses(total.cpu().double(), self.bucket), captions_are_alike=len(set(captions)) == 1)

    def _losses(
        self, network: Network, indices: Int64[Tensor, " b"], captions: list[str], device: torch.device
    ) -> Float[Tensor, " b"]:
        return self.objective.losses(
            network,
            encode_images(self.images[indices].to(device), self.latent_space),
            self.t[indices],
            self.eps[indices].to(device),
            self.contexts([captions[i] for i in indices.tolist()]).to(device),
        )


def others(captions: list[str]) -> list[str]:
    """Return for each caption the next one that is another; itself where all are the same."""
    twice = captions + captions
    return [
        next((other for other in twice[i + 1 : i + len(captions)] if other != caption), caption)
        for i, caption in enumerate(captions)
    ]


def summarize_losses(losses: Float[Tensor, "3 n"], bucket: Int64[Tensor, " n"]) -> ValidationResult:
    """Sum up the losses of n examples with the true captions, with others, and with none."""
    true, other, none = losses
    worse = other - true
    return ValidationResult(
        by_timestep=[true[bucket == number].mean().item() for number in range(BUCKETS)],
        true_caption=true.mean().item(),
        other_caption=other.mean().item(),
        no_caption=none.mean().item(),
        difference=worse.mean().item(),
        its_error=(worse.var() / len(worse)).sqrt().item(),
    )
