"""Micro-batches of each training step, as a function of the step number.

All randomness of the sample at position p of the training order (caption, crop, flip, timestep, noise, dropout of the
caption and of its phrases) is a function of (seed, p), and consecutive steps read consecutive positions. A resumed run
therefore equals an uninterrupted one, and dividing a step among micro-batches and processes changes only rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from cond_diffusion.config.run import Config
from cond_diffusion.data.cache import TextEmbedder
from cond_diffusion.data.dataset import RandomDraws
from cond_diffusion.data.loader import TrainingData, prefetch
from cond_diffusion.diffusion.guidance import drop_captions
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.models.latents import LatentSpace, encode_images
from cond_diffusion.models.text_encoder import find_phrases
from cond_diffusion.seeding import generator

PREFETCH_DEPTH = 4  # micro-batches


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass on one process."""

    x_0: Float[Tensor, "b c h w"]
    context: Float[Tensor, "b l d"]
    t: Tensor
    eps: Float[Tensor, "b c h w"]


@dataclass(eq=False)
class Batches:
    """Iterates over the micro-batches of this process, step by step; the first step is `start`, counted from 0."""

    config: Config
    training_data: TrainingData
    text_embedder: TextEmbedder
    objective: Objective
    accelerator: Accelerator
    start: int
    latent_space: LatentSpace

    def __post_init__(self) -> None:
        accelerator, train = self.accelerator, self.config.train
        self.device = accelerator.device
        self.shape = self.latent_space.shape(self.config.data)
        self.accumulation_steps, batch_size = train.gradient_accumulation_steps, train.batch_size
        processes, process = accelerator.num_processes, accelerator.process_index
        self.per_step = batch_size * self.accumulation_steps * processes
        self.null_context = self.text_embedder([""])[0].to(self.device)
        first = self.start * self.accumulation_steps
        jobs = (partial(self._read, (i * processes + process) * batch_size) for i in count(first))
        is_fast = self.training_data.is_in_memory and self.device.type == "cpu"  # an accelerator would wait meanwhile
        self._samples = prefetch(jobs, depth=0 if is_fast else PREFETCH_DEPTH)

    def next_step(self) -> Iterator[MicroBatch]:
        """Read the data of the next step, and return an iterator over its micro-batches on this process."""
        return (complete() for complete in list(islice(self._samples, self.accumulation_steps)))

    def sample_names(self, step: int) -> str:
        """Return the dataset indices of all samples in a step, across processes."""
        return self.training_data.sample_names(step * self.per_step, self.per_step)

    def _read(self, first: int) -> Callable[[], MicroBatch]:
        """Load a micro-batch from position `first` of the training order, and return what completes it on the device.

        Loading runs ahead of training, in another thread.
        """
        data, train = self.config.data, self.config.train
        generators = [generator("sample", self.config.seed, first + i) for i in range(train.batch_size)]
        uniform = torch.stack([torch.rand(5, generator=each, dtype=torch.float64) for each in generators])
        caption, crop, flip, t_uniform, dropout = uniform.T.contiguous()
        is_first = caption < train.first_caption
        caption = torch.where(is_first, 0, (caption - train.first_caption) / (1 - train.first_caption))
        batch = self.training_data.read(first, RandomDraws(caption, crop))
        images = batch.images
        if data.flip:
            images = torch.where((flip < 0.5)[:, None, None, None], images.flip(3), images)
        eps = torch.stack([torch.randn(self.shape, generator=each) for each in generators])
        captions = [
            drop_phrases(caption, train.phrase_dropout, each)
            for caption, each in zip(batch.captions, generators, strict=True)
        ]
        state = self.training_data.state  # position of a stream after these samples

        def complete() -> MicroBatch:
            self.training_data.last_consumed_state = state
            context = self.text_embedder(captions).to(self.device)
            return MicroBatch(
                x_0=encode_images(images.to(self.device), self.latent_space),
                context=drop_captions(context, self.null_context, dropout < train.caption_dropout),
                t=self.objective.timesteps_at(t_uniform),
                eps=eps.to(self.device),
            )

        return complete


def drop_phrases(caption: str, rate: float, draw: torch.Generator) -> str:
    """Leave out each phrase with probability `rate`; a caption of a single phrase keeps it."""
    if rate == 0:
        return caption
    phrases = [phrase.strip() for _, phrase in find_phrases(caption)]
    if len(phrases) < 2:
        return caption
    is_kept = torch.rand(len(phrases), generator=draw) >= rate
    return ", ".join(phrase for phrase, kept in zip(phrases, is_kept.tolist(), strict=True) if kept)
