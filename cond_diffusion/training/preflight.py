"""`python train.py --check`: what one would like to have known before a long run, in less than a minute.

It looks at the data and at a batch of them, estimates memory and time, and learns one batch by heart: a network that
cannot do that will not learn anything else.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from textwrap import wrap
from time import monotonic

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm.auto import tqdm

from cond_diffusion.config.run import Config
from cond_diffusion.data.dataset import RandomDraws
from cond_diffusion.data.loader import TrainingData, open_training_data
from cond_diffusion.errors import UserError
from cond_diffusion.images import enlarged, grid, to_model, to_pillow
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.pipeline.generate import reserve_path
from cond_diffusion.training.batches import Batches
from cond_diffusion.training.setup import build_run, make_accelerator, summary

LOOKED_AT, PER_BATCH = 1000, 100  # pictures
SHOWN, WIDTH = 8, 160  # pictures, and pixels of each
SECONDS, MOST_STEPS = 25, 200  # for learning a batch by heart
LEARNS = 0.7  # to which share of itself the loss of one batch falls within that time if all is well


def check(config: Config) -> Iterator[str]:
    """Yield, a line each, what was found, and write a picture of a batch on the way.

    Raises UserError for what training would refuse at once.
    """
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise UserError("--check inspects the work of one process; type: python train.py --check")
    run = build_run(config, accelerator)
    config, text_encoder, unet = run.config, run.text_encoder, run.unet
    # All images are inspected, also those that training would hold out.
    training_data = open_training_data(replace(config.data, held_out=0, memory_gb=0), config.seed)
    yield from _data_summary(config, training_data, text_encoder)
    batch = next(
        Batches(config, training_data, text_encoder, run.objective, accelerator, 0, run.latent_space).next_step()
    )

    def loss() -> Tensor:
        return run.objective.loss(run.network, batch.x_0, batch.t, batch.eps, batch.context)

    def step() -> float:
        value = loss()
        accelerator.backward(value)
        accelerator.clip_grad_norm_(run.network.parameters(), config.train.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        return value.item()  # waits for the accelerator

    yield f"network: {summary(unet)}"
    kept = bytes_kept(unet, loss) / 1e9
    yield f"memory: {kept:.2f} GB more for what a batch of {config.train.batch_size} keeps for the backward pass"
    seconds = _seconds_of(step)
    of_all = seconds * config.train.gradient_accumulation_steps
    hours = of_all * config.train.max_steps / 3600
    yield f"time: {of_all:.2f} s a step, {hours:.1f} h for {config.train.max_steps} of them"
    steps = max(10, min(MOST_STEPS, int(SECONDS / seconds)))
    bar = tqdm(range(steps), desc="learning one batch by heart", unit=" steps", leave=False)
    yield verdict([step() for _ in bar], config.train.learning_rate)


def _data_summary(config: Config, training_data: TrainingData, text_encoder: TextEncoder) -> Iterator[str]:
    """Tell what the source holds and what is wrong with it, from its first pictures in the order of training."""
    data, decoder = config.data.with_captions(), training_data.decoder
    num_images = training_data.num_images
    size = "a stream" if num_images is None else f"{num_images} images"
    count = LOOKED_AT if num_images is None else min(num_images, LOOKED_AT)
    yield f"data: {data.source}, {size}; columns: {', '.join(training_data.columns)}"

    captions: list[str] = []
    shown: list[Image.Image] = []
    for first in tqdm(range(0, count, PER_BATCH), desc="looking at pictures", leave=False):
        middle = torch.full((min(PER_BATCH, count - first),), 0.5)
        if training_data.state is not None and training_data.state["epoch"] > 0:
            break  # it is a short one, and all of it has been seen
        batch = training_data.read(first, RandomDraws(caption=torch.zeros_like(middle), crop=middle))
        captions += batch.captions
        shown += to_pillow(to_model(batch.images[: SHOWN - len(shown)]))
    training_data.resume({}, position=0, same=False)
    yield (
        f"pictures: column {data.image_column}; of {decoder.seen} looked at, {len(decoder.bad)} cannot be read and "
        f"{decoder.enlarged} are smaller than data.resolution ({data.resolution}) and are enlarged"
    )
    known = training_data.captions()
    different = list(dict.fromkeys(captions)) if known is None else known[1:]
    cut = text_encoder.cut(different)
    yield (
        f"captions: column {data.caption_column}; {len(different)} different ones; {len(cut)} are longer than "
        f"text.max_length ({text_encoder.max_length} tokens) and are cut{f', for example {cut[0]!r}' if cut else ''}"
    )
    with reserve_path(None, f"check {config.run_dir}", "--check", (".png",)) as path:
        grid([_labelled(*pair) for pair in zip(shown, captions, strict=False)], columns=4).save(path)
    yield f"wrote {path}: pictures with their captions"


def _seconds_of(step: Callable[[], float]) -> float:
    """Return what a step takes: the least of three, since the first warms things up."""
    times = []
    for _ in range(3):
        begun = monotonic()
        step()
        times.append(monotonic() - begun)
    return min(times)


def bytes_kept(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Return the size of what the forward pass of `loss` keeps for the backward pass, beside the network's weights.

    Of a part that gradient checkpointing computes again it is the part's input.
    """
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss()  # alive until the end, so that no storage makes room for another at its address
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    del value
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def verdict(losses: Sequence[float], rate: float) -> str:
    """Say what the losses of one batch, step by step, mean."""
    if not all(math.isfinite(value) for value in losses):
        return f"verdict: the loss of one batch is no number any more; train.learning_rate ({rate}) is too high"
    fell = f"the loss of one batch went from {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"
    share = losses[-1] / losses[0]
    if share < LEARNS:
        return f"verdict: {fell}: it learns; start the run"
    if share < 1:
        return f"verdict: {fell}: it learns slowly; train.learning_rate ({rate}) may be low"
    return f"verdict: {fell}: it does not learn; train.learning_rate ({rate}) may be too high"


def _labelled(picture: Image.Image, caption: str) -> Image.Image:
    """Write the caption under the picture."""
    large = enlarged(picture.convert("RGB"), WIDTH).resize((WIDTH, WIDTH), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (WIDTH, WIDTH + 48), "white")
    sheet.paste(large)
    ImageDraw.Draw(sheet).text((4, WIDTH + 4), "\n".join(wrap(caption, WIDTH // 7)[:3]), fill="black")
    return sheet
