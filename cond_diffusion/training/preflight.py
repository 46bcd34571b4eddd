"""Checks before a long run (`python train.py --check`), in less than a minute.

Inspects the data, estimates memory and time, and overfits one batch: a network that cannot overfit one batch will not
learn a data set.
"""

import math
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import wrap
from timeit import repeat
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm.auto import tqdm

from cond_diffusion.config.run import PRETRAIN, Config
from cond_diffusion.data.dataset import CaptionedImages, RandomDraws, open_captioned_files
from cond_diffusion.data.loader import TrainingData, open_training_data
from cond_diffusion.device import free_memory
from cond_diffusion.errors import UserError
from cond_diffusion.images import encode, enlarged, grid, label_font, to_model, to_pillow
from cond_diffusion.models.clip import MAX_LENGTH, build_clip, count_whole_words, train_tokenizer
from cond_diffusion.models.text_encoder import TextEncoder, distinct_words
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.generate import output_path, write_output
from cond_diffusion.training.batches import Batches
from cond_diffusion.training.clip_pretraining import training_loss
from cond_diffusion.training.setup import build_run, make_accelerator, summary

MAX_INSPECTED, INSPECTION_BATCH = 1000, 100  # images
MAX_TRUNCATED, MAX_UNKNOWN, MAX_HOURS = 0.01, 0.05, 24  # shares of captions and words; hours
HUB_ENCODER = "openai/clip-vit-base-patch32 with access to the Hub"
GRID_IMAGES, GRID_WIDTH = 8, 160  # images of the grid, and width of each in pixels
OVERFIT_SECONDS, MAX_OVERFIT_STEPS = 25, 200
MAX_LOSS_RATIO = 0.7  # last loss / first loss of the overfitting test that passes


def check(config: Config) -> Iterator[str]:
    """Inspect the data and the cost of a step, overfit one batch, and write a grid of images with their captions.

    Yields:
        One line per finding.
    """
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise UserError("--check: supports one process only; run: python train.py --check")
    run = build_run(config, accelerator)
    config = run.config
    # Inspect all images, including those that training holds out.
    training_data = open_training_data(replace(config.data, held_out=0, memory_gb=0), config.seed)
    problems = yield from _data_summary(config, training_data, run.text_encoder)
    batches = Batches(config, training_data, run.text_encoder, run.objective, accelerator, 0, run.latent_space)
    batch = next(batches.next_step())

    def loss() -> Tensor:
        return run.objective.loss(run.network, batch.x_0, batch.t, batch.eps, batch.context)

    def step() -> float:
        value = loss()
        accelerator.backward(value)
        accelerator.clip_grad_norm_(run.network.parameters(), config.train.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        return value.item()  # synchronizes with the accelerator

    if config.text.encoder == PRETRAIN and run.resumed_from is None:
        yield _clip_summary(config, batch.x_0.device, bf16=accelerator.mixed_precision == "bf16")
    yield f"network: {summary(run.unet, config.train)}"
    gigabytes = activation_bytes(run.unet, loss) / 1e9
    yield f"memory: another {gigabytes:.2f} GB for the activations of a batch of {config.train.batch_size}"
    seconds = min(repeat(step, number=1, repeat=3))  # the first step includes warm-up
    if config.data.streaming or config.train.phrase_dropout:  # the text encoder runs in each step
        empty = [""] * config.train.batch_size  # padded, so that they take as long as others
        seconds += min(repeat(lambda: run.text_encoder(empty).sum().item(), number=1, repeat=3))
    per_step = seconds * config.train.gradient_accumulation_steps
    hours = per_step * config.train.max_steps / 3600
    yield f"time: {per_step:.2f} s per step, {hours:.1f} h for {config.train.max_steps} steps"
    steps = max(10, min(MAX_OVERFIT_STEPS, int(OVERFIT_SECONDS / seconds)))
    progress_bar = tqdm(range(steps), desc="overfitting one batch", unit=" steps", leave=False)
    losses = [step() for _ in progress_bar]
    problems += _cost_problems(config, run.unet, gigabytes, hours)
    yield from verdict(losses, config.train.learning_rate, problems)


def _data_summary(
    config: Config, training_data: TrainingData, text_encoder: TextEncoder
) -> Generator[str, None, list[str]]:
    """Describe the source, from the first images in training order; return its problems, the most important first."""
    data, decoder = config.data.with_captions(), training_data.decoder
    count = min(training_data.num_images or MAX_INSPECTED, MAX_INSPECTED)
    yield f"data: {data.source}, {training_data.size}; columns: {', '.join(training_data.columns)}"

    captions: list[str] = []
    images: list[Image.Image] = []
    for first in tqdm(range(0, count, INSPECTION_BATCH), desc="inspecting images", leave=False):
        if training_data.state is not None and training_data.state["epoch"] > 0:
            break  # the whole stream has been inspected
        batch = training_data.read(first, RandomDraws.fixed(min(INSPECTION_BATCH, count - first)))
        captions += batch.captions
        images += to_pillow(to_model(batch.images[: GRID_IMAGES - len(images)]))
    training_data.resume({}, position=0, same=False)
    yield (
        f"images: column {data.image_column}; {decoder.seen} inspected, {len(decoder.bad)} unreadable, "
        f"{decoder.enlarged} smaller than data.resolution ({data.resolution}) and upscaled"
    )
    known = training_data.captions()
    unique = list(dict.fromkeys(captions)) if known is None else known[1:] or known
    truncated = text_encoder.cut(unique)
    yield (
        f"captions: column {data.caption_column}; {len(unique)} unique, {len(truncated)} longer than text.max_length "
        f"({text_encoder.max_length} tokens) and truncated{f', for example {truncated[0]!r}' if truncated else ''}"
    )
    path = output_path(None, [f"check {config.run_dir}"], "--check", (".png",))
    labeled = [_labeled(*pair) for pair in zip(images, captions, strict=False)]
    write_output(path, encode(grid(labeled, columns=4)), "--check")
    yield f"saved {path}: images with their captions"
    problems = []
    if len(truncated) > MAX_TRUNCATED * len(unique):
        length, longest = text_encoder.max_length_for(unique, 0.99), text_encoder.clip.config.max_position_embeddings
        change = _longer_captions(config, length, longest)
        problems.append(f"{len(truncated) / len(unique):.0%} of the captions are truncated; {change}")
    words, unknown = distinct_words(unique), text_encoder.unknown_words(unique)
    if len(unknown) > MAX_UNKNOWN * len(words):
        share, examples = len(unknown) / len(words), ", ".join(unknown[:3])
        change = f"set text.encoder={HUB_ENCODER}"
        if config.init_from is not None:
            change = "use its words, or remove init_from, which decides the text encoder"
        elif config.text.encoder != PRETRAIN:
            change = f"set text.encoder=pretrain, or {HUB_ENCODER}"
        problems.append(f"{share:.0%} of the words are unknown to text.encoder ({examples}); {change}")
    if decoder.bad:
        problems.append(
            f"{len(decoder.bad)} of {decoder.seen} images are unreadable and will be skipped; repair or remove them"
        )
    if decoder.enlarged > decoder.seen / 2:
        problems.append(f"most images are smaller than data.resolution; set data.resolution below {data.resolution}")
    return problems


def _longer_captions(config: Config, length: int, longest: int) -> str:
    """Return what to change so that captions of `length` tokens are not truncated; the encoder has `longest`."""
    if config.init_from is not None:
        return "shorten them, or remove init_from, which decides the text encoder"
    if config.text.encoder == PRETRAIN or length <= longest:
        return f"set text.max_length={length}"
    if length > MAX_LENGTH:
        return f"set text.encoder=pretrain text.max_length={length}"
    return f"set text.encoder=pretrain, or {HUB_ENCODER}"


def _clip_summary(config: Config, device: torch.device, *, bf16: bool) -> str:
    """Describe the size and the time of the CLIP that is trained first, from steps on blank images."""
    pretraining, data = config.clip_pretraining(), config.data
    groups = open_captioned_files(data).caption_groups
    shape = (pretraining.batch_size, data.channels, data.resolution, data.resolution)
    images = torch.zeros(shape, dtype=torch.uint8)
    blank = CaptionedImages(images, torch.arange(pretraining.batch_size) % len(groups), groups)
    captions = [caption for group in groups for caption in group]
    tokenizer = train_tokenizer(captions, pretraining.vocab_size, pretraining.max_length)
    clip: Any = build_clip(pretraining, tokenizer)
    clip.to(device)
    loss = partial(training_loss, clip, tokenizer, blank, pretraining, 0, bf16=bf16)
    minutes = min(repeat(lambda: loss().backward(), number=1, repeat=3)) * pretraining.max_steps / 60
    millions = sum(parameter.numel() for parameter in clip.parameters()) / 1e6
    whole, words = count_whole_words(tokenizer, captions)
    return (
        f"text.encoder: trains a CLIP of {millions:.1f} million parameters first, about {minutes:.0f} min for "
        f"{pretraining.max_steps} steps; {whole} of {words} distinct words are whole tokens"
    )


def _cost_problems(config: Config, unet: UNet, activations: float, hours: float) -> list[str]:
    """Return the problems of time, memory and disk."""
    problems, train = [], config.train
    if hours > MAX_HOURS:
        problems.append(f"training takes {hours:.0f} h; set train.max_steps, unet.channels or data.resolution lower")
    weights = 4e-9 * sum(parameter.numel() for parameter in unet.parameters())
    free = free_memory(unet.conv_in.weight.device)
    if activations > 0.9 * free / 1e9:
        change = "set train.batch_size lower or train.gradient_checkpointing=true"
        problems.append(f"a batch needs {activations:.1f} GB of memory and {free / 1e9:.1f} GB are free; {change}")
    disk = weights * ((train.keep_checkpoints + 1) * 4 + train.snapshots * 2)
    folder = next(parent for parent in Path(config.run_dir).absolute().parents if parent.exists())
    if disk > 0.9 * (available := shutil.disk_usage(folder).free / 1e9):
        change = "set train.keep_checkpoints or train.snapshots lower, or another run_dir"
        problems.append(f"checkpoints take {disk:.1f} GB and {available:.1f} GB of the disk are free; {change}")
    return problems


def activation_bytes(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Return the bytes of activations that the forward pass of `loss` saves for the backward pass, without weights.

    For modules under gradient checkpointing only their inputs count.
    """
    sizes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        value = loss()  # stays alive until the end, so that no address is reused by another storage
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    del value
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def verdict(losses: Sequence[float], learning_rate: float, problems: Sequence[str] = ()) -> Iterator[str]:
    """Yield the result of the overfitting test, and what to change before the run, the most important first."""
    option, changes = f"train.learning_rate ({learning_rate})", [*problems]
    if not all(math.isfinite(value) for value in losses):
        result = "the loss of one batch is not finite"
        changes.insert(0, f"{option} is too high")
    else:
        result = f"loss of one batch {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"
        ratio = losses[-1] / losses[0]
        if ratio >= 1:
            changes.insert(0, f"the network does not learn; {option} may be too high")
        elif ratio >= MAX_LOSS_RATIO:
            changes.append(f"the network learns slowly; {option} may be too low")
    if not changes:
        yield f"verdict: {result}: the network learns; start the run"
        return
    yield f"verdict: {result}; before you start the run, change:"
    yield from (f"  {number}. {change}" for number, change in enumerate(changes, 1))


def _labeled(image: Image.Image, caption: str) -> Image.Image:
    """Return the image with its caption below."""
    large = enlarged(image.convert("RGB"), GRID_WIDTH).resize((GRID_WIDTH, GRID_WIDTH), Image.Resampling.NEAREST)
    labeled = Image.new("RGB", (GRID_WIDTH, GRID_WIDTH + 48), "white")
    labeled.paste(large)
    text = "\n".join(wrap(caption, GRID_WIDTH // 7)[:3])
    ImageDraw.Draw(labeled).text((4, GRID_WIDTH + 4), text, fill="black", font=label_font(caption))
    return labeled
