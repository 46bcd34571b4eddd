"""What a training step reads, by its number.

Everything random about the sample at position p of the training order - which of its captions, where it is cropped, its
noise, its timestep, whether its caption is dropped - is a function of (seed, p). A step sees the positions that follow
those of the step before, and shares them out among micro-batches and processes. So a resumed run equals one that was
never stopped, and how a step is shared out changes nothing but rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cond_diffusion.config.run import Config
from cond_diffusion.data.cache import TextEmbedder
from cond_diffusion.data.dataset import RandomDraws
from cond_diffusion.data.loader import TrainingData, prefetch
from cond_diffusion.diffusion.guidance import drop_captions
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.models.latents import LatentSpace, encode_images
from cond_diffusion.seeding import generator

READ_AHEAD = 4  # micro-batches


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one process reads."""

    x_0: Float[Tensor, "b c h w"]
    context: Float[Tensor, "b l d"]
    t: Tensor
    eps: Float[Tensor, "b c h w"]


@dataclass(frozen=True)
class _Samples:
    """The samples of a micro-batch before they are moved to where the network is, and what chance says of them."""

    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]  # in bytes, or x_0
    captions: list[str]
    time: Float[Tensor, " b"]
    dropped: Bool[Tensor, " b"]
    eps: Float[Tensor, "b _ _ _"]
    state: Any  # of the stream, from where it would come to them again


class Batches:
    """Micro-batches, step by step from `start` on.

    contexts: captions to their contexts.
    """

    def __init__(
        self,
        config: Config,
        training_data: TrainingData,
        contexts: TextEmbedder,
        objective: Objective,
        accelerator: Accelerator,
        start: int,
        latent_space: LatentSpace,
    ) -> None:
        self.config = config
        self.latent_space = latent_space
        self.training_data = training_data
        self.contexts = contexts
        self.objective = objective
        self.device = accelerator.device
        self.shape = latent_space.shape(config.data)
        self.rounds = config.train.gradient_accumulation_steps
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.per_step = config.train.batch_size * self.rounds * self.processes
        self.null_context = contexts([""])[0].to(self.device)
        self._samples = prefetch(self._reads(start), depth=0 if training_data.is_in_memory else READ_AHEAD)

    def next_step(self) -> Iterator[MicroBatch]:
        """Yield this process's share of the step that follows."""
        for _ in range(self.rounds):
            samples = next(self._samples)
            self.training_data.consumed(samples.state)
            yield MicroBatch(
                x_0=encode_images(samples.images.to(self.device), self.latent_space),
                context=drop_captions(
                    self.contexts(samples.captions).to(self.device), self.null_context, samples.dropped
                ),
                t=self.objective.timesteps_at(samples.time),
                eps=samples.eps.to(self.device),
            )

    def names_of_step(self, step: int) -> str:
        """Say which samples all processes read in a step."""
        return self.training_data.sample_names(step * self.per_step, self.per_step)

    def _reads(self, start: int) -> Iterator[Callable[[], _Samples]]:
        """Yield what reads this process's micro-batches, from step `start` on."""
        for step in count(start):
            for i in range(self.rounds):
                number = (step * self.rounds + i) * self.processes + self.process
                yield partial(self._read, number * self.config.train.batch_size)

    def _read(self, first: int) -> _Samples:
        """Read the samples at the positions from `first` on."""
        draws = [generator("sample", self.config.seed, first + i) for i in range(self.config.train.batch_size)]
        chances = torch.stack([torch.rand(5, generator=draw, dtype=torch.float64) for draw in draws])
        caption, crop, flip, time, drop = chances.T.contiguous()
        batch = self.training_data.read(first, RandomDraws(caption, crop))
        images = batch.images
        if self.config.data.flip:
            images = torch.where((flip < 0.5)[:, None, None, None], images.flip(3), images)
        return _Samples(
            images=images,
            captions=batch.captions,
            time=time,
            dropped=drop < self.config.train.caption_dropout,
            eps=torch.stack([torch.randn(self.shape, generator=draw) for draw in draws]),
            state=self.training_data.state,
        )
