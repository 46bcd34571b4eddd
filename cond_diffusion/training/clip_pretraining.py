"""Pretrain a small CLIP on a captioned data set, for use as a text encoder where the Hub is not available.

`cond-diffusion pretrain-clip --config clip_mnist` learns a byte-pair vocabulary from the captions and writes a
`CLIPModel` folder in transformers' format, which can be used like any CLIP from the Hub. `text.encoder: pretrain` does
the same at the start of a training run, in its folder.

As in any run, everything is a function of the seed and the step, so a resumed run equals an uninterrupted one:

    runs/clip/config.yaml, metrics.jsonl, .lock
    runs/clip/checkpoints/step-00001000/   the CLIP, with an additional folder state/
    runs/clip/config.json, model.safetensors, tokenizer*.json   the CLIP after the last step
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from cond_diffusion.config.run import CONFIG_NAME, ClipPretrainingConfig, load_config
from cond_diffusion.config.schema import read_json
from cond_diffusion.data.dataset import CaptionedImages, load_captioned_images, open_captioned_files
from cond_diffusion.data.loader import identity_of
from cond_diffusion.data.sources import Examples
from cond_diffusion.device import autocast
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.files import save_tensors, write_json, written_aside
from cond_diffusion.images import to_model
from cond_diffusion.models import text_encoder
from cond_diffusion.models.clip import (
    ClipJudge,
    build_clip,
    contrastive_loss,
    count_truncated,
    count_whole_words,
    nearest_captions,
    train_tokenizer,
)
from cond_diffusion.pipeline.run_folder import PROGRESS_NAME, RunLock, save_checkpoint
from cond_diffusion.seeding import generator, sample_indices
from cond_diffusion.training.optimizer import learning_rate
from cond_diffusion.training.reporting import Interruption, Reporter
from cond_diffusion.training.setup import acquire_resumed, check_unchanged, find_run, make_accelerator, prepare_run_dir
from cond_diffusion.training.state import copy_to_cpu, load_moments, local_shard, moments_of, read_shards

KEEP_CHECKPOINTS = 2
# Keys that a resumed run may not change, because the weights depend on them.
FIXED_KEYS = (
    *("seed", "vocab_size", "max_length", "patch_size", "width", "layers", "num_heads", "batch_size"),
    *("data.resolution", "data.channels"),
)

logger = logging.getLogger(__name__)


def zero_shot_accuracy(clip: ClipJudge, data: CaptionedImages) -> dict[str, float]:
    """Compute the zero-shot classification accuracy for each caption template.

    Each image is classified as the caption group with the nearest caption. The n-th template consists of the n-th
    captions of all groups; where groups differ in length, only indices that all of them have are evaluated.

    Returns:
        The accuracy by template; keys are the captions of the first group.
    """
    features, accuracy = clip(data.images), {}
    for captions in zip(*data.caption_groups, strict=False):
        nearest = (features @ clip.texts(captions).T).argmax(1)
        accuracy[captions[0]] = (nearest == data.group_of).float().mean().item()
    return accuracy


def retrieval_accuracy(clip: ClipJudge, data: CaptionedImages) -> dict[str, float]:
    """Compute how often a caption of an image is the nearest ("top-1"), or among the five nearest ("top-5"), of all
    distinct captions."""
    captions = list(dict.fromkeys(caption for group in data.caption_groups for caption in group))
    texts = clip.texts(captions)
    nearest = nearest_captions(clip(data.images), texts, min(5, len(captions)))
    own = [set(data.caption_groups[group]) for group in data.group_of.tolist()]
    is_own = [[captions[i] in group for i in row] for row, group in zip(nearest.tolist(), own, strict=True)]
    return {"top-1": sum(row[0] for row in is_own) / len(data), "top-5": sum(map(any, is_own)) / len(data)}


def pretrain(
    config: ClipPretrainingConfig, accelerator: Accelerator | None = None, dataset: Examples | None = None
) -> tuple[str, dict[str, float]]:
    """Train a CLIP and save it to `config.run_dir`, or resume its training.

    Several processes train the same CLIP; the main process writes it.

    Args:
        accelerator: That of the run that the CLIP belongs to.
        dataset: Used instead of `config.data.source`; see `as_table`.

    Returns:
        The split that accuracies are measured on, and the accuracies by name.

    Raises:
        UserError: If the config, the data or the run's folder cannot be used, or another process trains there.
        Interrupted: After a signal, when a checkpoint has been saved.
    """
    for name, expected in (("streaming", False), ("crop", "center"), ("flip", False)):
        if (value := getattr(config.data, name)) != expected:
            raise UserError(f"data.{name}: {value} is not supported, as all images are in memory; expected {expected}")
    accelerator = accelerator or make_accelerator(config.as_run())
    with RunLock(Path(config.run_dir)) as lock:
        acquire_resumed(lock, config, accelerator)
        newest = find_run(config)
        data = open_captioned_files(config.data, dataset=dataset).in_memory()
        split, test = "train", data
        if config.test_split != "train":
            try:
                split, test = config.test_split, load_captioned_images(config.data, config.test_split)
            except UserError as error:
                logger.warning("test_split: %s; measuring accuracies on the training images", error)
        clip = ClipJudge(*_train(config, data, newest, lock, accelerator), None, config.max_length)
        accuracy = {}
        if config.data.with_captions().caption_templates:
            templates = zero_shot_accuracy(clip, test)
            accuracy = {f"zero-shot accuracy, captions such as {name!r}": value for name, value in templates.items()}
        retrieval = retrieval_accuracy(clip, test)
        return split, accuracy | {f"retrieval of an own caption, {name}": value for name, value in retrieval.items()}


def _train(
    config: ClipPretrainingConfig, data: CaptionedImages, newest: Path | None, lock: RunLock, accelerator: Accelerator
) -> tuple[CLIPModel, CLIPTokenizer]:
    run_dir = lock.run_dir
    captions = [caption for group in data.caption_groups for caption in group]
    if newest is None:
        tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
        # transformers initializes weights from the global random state; nothing else does.
        torch.manual_seed(config.seed)
        clip = build_clip(config, tokenizer)
    else:
        check_unchanged(load_config(ClipPretrainingConfig, run_dir / CONFIG_NAME), config, FIXED_KEYS)
        with text_encoder.clip_errors("resume", newest):
            clip: Any = text_encoder.load_clip(CLIPModel, newest)
            tokenizer = text_encoder.load_tokenizer(newest, clip.config.text_config.vocab_size)
    logger.info("vocab_size: %d of %d distinct words are whole tokens", *count_whole_words(tokenizer, captions))
    if truncated := count_truncated(tokenizer, captions, config.max_length):
        message = "max_length: %d of %d captions are longer than %d tokens and are truncated"
        logger.warning(message, truncated, len(captions), config.max_length)
    clip.to(accelerator.device).train()
    weights = dict(clip.named_parameters())
    optimizer = torch.optim.AdamW(
        weights.values(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True
    )
    start, identity = 0, identity_of(data)
    if newest is not None:
        progress = read_json(newest / "state" / PROGRESS_NAME)
        start = progress["step"]
        if (old := progress.get("data", identity)) != identity:  # CLIPs of earlier versions did not store it
            logger.warning("resume: the data changed from %s to %s; continuing with the new data", old, identity)
        load_moments(optimizer, read_shards(newest / "state", "optimizer"), weights)
    prepare_run_dir(lock, config, accelerator, newest, start)

    def write(step: int, folder: Path) -> None:
        save_clip(clip, tokenizer, folder)
        save_tensors(copy_to_cpu(moments_of(optimizer), local_shard), folder / "state" / "optimizer.safetensors")
        write_json(folder / "state" / PROGRESS_NAME, {"step": step, "data": identity})

    run = config.as_run()
    reporter = Reporter(run, start, config.batch_size, accelerator)
    with Interruption(accelerator) as interruption:
        for step in reporter.steps("training CLIP"):
            loss = training_loss(clip, tokenizer, data, config, step, bf16=accelerator.mixed_precision == "bf16")
            loss.backward()
            gradient_norm = torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            if not torch.isfinite(gradient_norm):
                raise UserError(
                    f"learning_rate: {config.learning_rate}: non-finite gradients in step {step + 1}; lower it"
                )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run.train, step)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            reporter.log(done, loss.detach(), gradient_norm, learning_rate(run.train, step))
            interrupted = interruption.requested() and done < config.max_steps
            is_due = config.checkpoint_every and done % config.checkpoint_every == 0
            if accelerator.is_main_process and (interrupted or is_due or done == config.max_steps):
                newest = save_checkpoint(run_dir, done, partial(write, done), keep=KEEP_CHECKPOINTS)
            if interrupted:
                interruption.raise_interrupted(done, newest)
    clip.eval()
    if accelerator.is_main_process:
        written = user_errors(f"run_dir: {run_dir} cannot be written", OSError, SafetensorError)
        with written, written_aside(run_dir) as unfinished:
            save_clip(clip, tokenizer, unfinished)
    return clip, tokenizer


def training_loss(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    data: CaptionedImages,
    config: ClipPretrainingConfig,
    step: int,
    *,
    bf16: bool,
) -> Float[Tensor, ""]:
    """Compute the loss of a step, counted from 0; with `bf16` the networks run under autocast, on fp32 weights."""
    indices = sample_indices(len(data), config.seed, step * config.batch_size, config.batch_size)
    draws = torch.rand(len(indices), generator=generator("captions", config.seed, step))
    captions = list(dict.fromkeys(data.captions_of(indices, draws)))
    own = {group: set(data.caption_groups[group]) for group in data.group_of[indices].tolist()}
    rows = {group: [caption in own[group] for caption in captions] for group in own}
    is_positive = torch.tensor([rows[group] for group in data.group_of[indices].tolist()], device=clip.device)
    with autocast("bf16" if bf16 else "fp32", clip.device):
        images = text_encoder.embed_images(clip, to_model(data.images[indices].to(clip.device)))
        texts = text_encoder.embed_texts(clip, tokenizer, captions, config.max_length)
    # fp32: logits are up to 100, where bf16 is rounded to 0.5.
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    return contrastive_loss(clip.logit_scale.exp().clamp(max=100) * images @ texts.T, is_positive)


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a CLIP in transformers' format."""
    with text_encoder.quiet_transformers():
        clip.save_pretrained(folder)
        text_encoder.save_tokenizer(tokenizer, folder)
