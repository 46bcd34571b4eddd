"""What a training step reads, by its number.

A step draws `gradient_accumulation_steps` x processes micro-batches. Everything random in micro-batch m of step s is a
function of (seed, s, m): which samples, which of their captions, noise, timesteps, dropped captions. So a resumed run
equals one that was never stopped, and 2 processes equal 1 with twice the accumulation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor

from cond_diffusion import latents
from cond_diffusion.config import Config
from cond_diffusion.data import CaptionedImages, sample_indices
from cond_diffusion.guidance import drop_captions
from cond_diffusion.objective import Objective
from cond_diffusion.pictures import to_model
from cond_diffusion.randomness import generator
from cond_diffusion.schedule import NoiseSchedule
from cond_diffusion.text import ContextTable


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one process reads."""

    x_0: Float[Tensor, "b c h w"]
    context: Float[Tensor, "b l d"]
    t: Tensor
    eps: Float[Tensor, "b c h w"]


class Batches:
    """Micro-batches by their number."""

    def __init__(self, config: Config, data: CaptionedImages, contexts: ContextTable, accelerator: Accelerator) -> None:
        self.config = config
        self.data = data
        self.contexts = contexts
        self.objective = Objective(config.objective, NoiseSchedule(config.schedule))
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.device = accelerator.device
        self.per_step = config.train.batch_size * config.train.gradient_accumulation_steps * self.processes

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """Yield this process's share of a step."""
        rounds = self.config.train.gradient_accumulation_steps
        for i in range(rounds):
            yield self._draw(step, i * self.processes + self.process, rounds * self.processes)

    def indices_of_step(self, step: int) -> Int64[Tensor, " n"]:
        """Return which samples all processes read in a step."""
        return sample_indices(len(self.data), self.config.seed, step * self.per_step, self.per_step)

    def _draw(self, step: int, number: int, numbers: int) -> MicroBatch:
        seed, train = self.config.seed, self.config.train
        first = (step * numbers + number) * train.batch_size
        indices = sample_indices(len(self.data), seed, first, train.batch_size)
        captions = self.data.draw_captions(indices, generator("captions", seed, step, number))
        x_0 = latents.encode(to_model(self.data.images[indices].to(self.device)), self.config.latent.patch_size)
        draw = generator("noise", seed, step, number, device=self.device)
        null_context = self.contexts[[""]][0]
        return MicroBatch(
            x_0=x_0,
            context=drop_captions(self.contexts[captions], null_context, train.caption_dropout, draw),
            t=self.objective.draw_timesteps(train.batch_size, generator("timesteps", seed, step, number)),
            eps=torch.randn(x_0.shape, generator=draw, device=self.device),
        )
