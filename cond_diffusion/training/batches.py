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
from cond_diffusion.data.contexts import Contexts
from cond_diffusion.data.dataset import CaptionedImages, Places
from cond_diffusion.data.loader import Feed, ShuffledSet, ahead
from cond_diffusion.data.stream import CaptionedStream
from cond_diffusion.diffusion.guidance import drop_captions
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.models.latents import LatentSpace, x_0_of
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
        feed: Feed,
        contexts: Contexts,
        objective: Objective,
        accelerator: Accelerator,
        start: int,
        space: LatentSpace,
    ) -> None:
        self.config = config
        self.space = space
        self.feed = feed
        self.contexts = contexts
        self.objective = objective
        self.device = accelerator.device
        self.shape = space.shape(config.data)
        self.rounds = config.train.gradient_accumulation_steps
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.per_step = config.train.batch_size * self.rounds * self.processes
        self.null_context = contexts([""])[0].to(self.device)
        in_memory = isinstance(feed, ShuffledSet) and isinstance(feed.data, CaptionedImages)
        self._samples = ahead(self._reads(start), depth=0 if in_memory else READ_AHEAD)

    def next_step(self) -> Iterator[MicroBatch]:
        """Yield this process's share of the step that follows."""
        for _ in range(self.rounds):
            samples = next(self._samples)
            if isinstance(self.feed, CaptionedStream):
                self.feed.behind = samples.state
            yield MicroBatch(
                x_0=x_0_of(samples.images.to(self.device), self.space),
                context=drop_captions(
                    self.contexts(samples.captions).to(self.device), self.null_context, samples.dropped
                ),
                t=self.objective.timesteps_at(samples.time),
                eps=samples.eps.to(self.device),
            )

    def names_of_step(self, step: int) -> str:
        """Say which samples all processes read in a step."""
        first = step * self.per_step
        if isinstance(self.feed, CaptionedStream):
            return f"the stream's {first} to {first + self.per_step - 1}"
        return str(self.feed.indices(first, self.per_step).tolist())

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
        batch = self.feed.read(first, Places(caption, crop))
        images = batch.images
        if self.config.data.flip:
            images = torch.where((flip < 0.5)[:, None, None, None], images.flip(3), images)
        return _Samples(
            images=images,
            captions=batch.captions,
            time=time,
            dropped=drop < self.config.train.caption_dropout,
            eps=torch.stack([torch.randn(self.shape, generator=draw) for draw in draws]),
            state=self.feed.state if isinstance(self.feed, CaptionedStream) else None,
        )
