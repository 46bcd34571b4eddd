"""Training loop: start or resume a run, train, validate, sample, and save checkpoints."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from cond_diffusion.config.run import PRETRAIN, Config, TrainConfig
from cond_diffusion.data.cache import TextEmbedder, context_table, latent_set
from cond_diffusion.data.dataset import open_captioned_files
from cond_diffusion.data.loader import ShuffledDataset, TrainingData, open_training_data
from cond_diffusion.data.sources import Examples, as_table
from cond_diffusion.device import autocast
from cond_diffusion.errors import UserError, first_line, is_out_of_memory
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.run_folder import RunLock, checkpoint_of, checkpoints, step_of
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.training import setup
from cond_diffusion.training.batches import Batches, MicroBatch
from cond_diffusion.training.clip_pretraining import pretrain
from cond_diffusion.training.optimizer import learning_rate
from cond_diffusion.training.reporting import Interruption, Reporter
from cond_diffusion.training.state import Saver, TrainingState
from cond_diffusion.training.validation import Validator

DEFAULT_PROMPTS = 8  # captions in the sample grids of a run whose config has no prompts
DATASET_ARGUMENT = "a data set given to train()"  # stored in config.yaml as data.source

logger = logging.getLogger(__name__)


def train(config: Config, dataset: Examples | None = None) -> Path:
    """Train a model, or resume a run.

    Args:
        config: The run.
        dataset: What to train on in place of `config.data.source`: a `datasets.Dataset` with the columns of
            `config.data`, or a sequence of (image, caption).

    Returns:
        The path of the newest checkpoint.

    Raises:
        UserError: If the config, the data or the run's folder cannot be used, or another process trains there.
    """
    if dataset is not None:
        config = replace(config, data=replace(config.data, source=DATASET_ARGUMENT, streaming=False))
        dataset = as_table(dataset, config.data)  # once, since it encodes all images
    accelerator = setup.make_accelerator(config)
    with RunLock(Path(config.run_dir)) as lock:
        setup.acquire_resumed(lock, config, accelerator)
        return _train(setup.build_run(config, accelerator, dataset), lock, dataset)


def _train(run: setup.Run, lock: RunLock, dataset: Examples | None) -> Path:
    accelerator, network, optimizer = run.accelerator, run.network, run.optimizer
    if run.resumed_from is not None and (done := step_of(run.resumed_from)) >= run.config.train.max_steps:
        logger.info("train.max_steps: %s has %d steps already; nothing to train", run.resumed_from, done)
        return run.resumed_from
    training_data = open_data(run, dataset)
    captions = training_data.captions()
    config = run.config = with_prompts(run.config, captions)
    counted = "" if captions is None else f", {len(captions) - 1} different captions"  # without the empty one
    logger.info("data.source: %s: %s%s", config.data.source, training_data.size, counted)
    state = TrainingState(accelerator.unwrap_model(network), optimizer, config.train, accelerator)
    progress = resume_from(run, state, training_data)
    start = progress.get("step", 0)
    setup.prepare_run_dir(lock, config, accelerator, run.resumed_from, start)
    if config.text.encoder == PRETRAIN and run.resumed_from is None:
        run.text_encoder = pretrained_text_encoder(config, accelerator, dataset)
    text_embedder = build_text_embedder(captions, run.text_encoder, config.train, accelerator)

    with torch.device("meta"):  # it holds weights only while it samples
        precision: Any = accelerator.mixed_precision.replace("no", "fp32")
        parts = (UNet(run.unet.config), run.text_encoder, run.objective.prediction, run.latent_space)
        pipe = TextToImage(*parts, precision, **config.sample.guidance)
    validator = Validator(config, training_data, text_embedder, run.objective, run.latent_space)
    batches = Batches(config, training_data, text_embedder, run.objective, accelerator, start, run.latent_space)
    reporter = Reporter(config, start, run.samples_per_step, accelerator)
    reporter.log_snapshot_size(state.averages)
    global_step, bad_steps, held_out_loss = start, 0, progress.get("held_out_loss")
    validated = progress.get("validated", True)
    # Held-out losses are comparable if these are equal, and the data.
    validation = [config.objective.weighting, config.objective.min_snr_gamma, config.data.held_out]
    if progress.get("validation", validation) != validation or progress.get("data") != training_data.identity():
        held_out_loss = None
    if config.train.warmup_steps >= config.train.max_steps:
        message = "train.warmup_steps: %d of %d steps; the learning rate does not reach train.learning_rate"
        logger.warning(message, config.train.warmup_steps, config.train.max_steps)

    def progress_at(step: int) -> dict[str, Any]:
        counts = {"step": step, "samples_per_step": run.samples_per_step, "held_out_loss": held_out_loss}
        validations = {"validation": validation, "validated": validated}
        return {**counts, **validations, **training_data.progress(), **state.progress()}

    def validate_and_sample(step: int) -> None:
        nonlocal held_out_loss
        if (loss := _validate_and_sample(step, validator, reporter, state, pipe)) is not None:
            held_out_loss = loss

    if not validated:
        validate_and_sample(start)
    last_batch: MicroBatch | None = None  # of the last step that changed the weights since the newest checkpoint
    with Interruption(accelerator) as interruption, Saver(config, pipe, state, accelerator) as saver:

        def save_at_error() -> None:
            if last_batch is not None and _can_save(global_step, last_batch, state, batches, accelerator):
                saver.save(global_step, progress_at(global_step), snapshot=False)
                saver.finish(required=True)
            accelerator.wait_for_everyone()  # a launcher stops the other processes when the first one ends

        for step in reporter.steps():
            micro_batches, error = _attempt(batches.next_step)
            if setup.any_process(error is not None, accelerator):
                save_at_error()
                if error is None:
                    raise UserError(f"data.source: step {step + 1}: another process cannot read its data")
                what = "" if isinstance(error, UserError) else "out of memory: "
                raise UserError(f"{what}{first_line(error)}", of_this_process=True) from error
            assert micro_batches is not None
            loss, batch = accumulate_gradients(network, micro_batches, batches, accelerator)
            gradient_norm: Any = accelerator.clip_grad_norm_(network.parameters(), config.train.max_grad_norm)
            rate = learning_rate(config.train, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Gradients are averaged over processes, so the norm is the same on all of them.
            bad_steps = 0 if torch.isfinite(gradient_norm) else bad_steps + 1
            if bad_steps:
                _skip_step(step, batches, optimizer, accelerator)
                if bad_steps >= config.train.max_bad_steps:
                    global_step = step + 1  # the position of the data
                    save_at_error()
                    raise UserError(
                        f"train.max_bad_steps: non-finite gradients in {bad_steps} consecutive steps, up to step "
                        f"{step + 1}; checkpoints have the weights from before them; lower train.learning_rate"
                    )
            else:
                optimizer.step()
                state.update_averages(step + 1)
                last_batch = batch
            optimizer.zero_grad()

            global_step = step + 1
            reporter.log(global_step, loss, gradient_norm, rate)
            interrupted = interruption.requested() and global_step < config.train.max_steps
            is_last = interrupted or global_step == config.train.max_steps
            validated = not interrupted  # otherwise when the run is resumed
            if validated:
                validate_and_sample(global_step)
            checkpoint_due = is_last or _is_due(global_step, config.train.checkpoint_every)
            snapshot_due = is_snapshot_due(config.train, global_step, is_last)
            if (checkpoint_due or snapshot_due) and _can_save(global_step, last_batch, state, batches, accelerator):
                saver.save(global_step, progress_at(global_step) if checkpoint_due else None, snapshot=snapshot_due)
                last_batch = None if checkpoint_due else last_batch
            if is_last:
                break
        saver.finish(required=True)
    accelerator.wait_for_everyone()
    reporter.end()
    last_name = checkpoint_of(lock.run_dir, global_step).name
    newest = max((path for path in checkpoints(lock.run_dir) if path.name <= last_name), default=None)
    if interruption.signal is not None and global_step < config.train.max_steps:
        interruption.raise_interrupted(global_step, newest)
    return reporter.log_summary(newest)


def resume_from(run: setup.Run, state: TrainingState, training_data: TrainingData) -> dict[str, Any]:
    """Load the checkpoint that the run continues from and move the data to its position; return its progress."""
    if run.resumed_from is None:
        return {}
    progress = state.load(run.resumed_from)
    if progress["samples_per_step"] != run.samples_per_step:
        raise UserError(
            f"resume: train.batch_size x train.gradient_accumulation_steps x processes changed from "
            f"{progress['samples_per_step']} to {run.samples_per_step}; expected {progress['samples_per_step']}"
        )
    old, new = progress["data"], training_data.identity()
    if old != new:
        logger.warning("resume: the data changed from %s to %s; continuing with the new data in a new order", old, new)
    training_data.resume(progress, progress["step"] * run.samples_per_step, same=old == new)
    return progress


def with_prompts(config: Config, captions: Sequence[str] | None) -> Config:
    """Return the config with prompts for the sample grids, by default evenly spaced captions of the data."""
    known = [caption for caption in captions or () if caption]
    if config.sample.prompts or not known:
        return config
    count = min(len(known), DEFAULT_PROMPTS)
    prompts = tuple(known[i * len(known) // count] for i in range(count))
    return replace(config, sample=replace(config.sample, prompts=prompts))


def pretrained_text_encoder(config: Config, accelerator: Accelerator, dataset: Examples | None) -> TextEncoder:
    """Train the CLIP of `text.encoder: pretrain` in the run's folder, or resume it, and return its text encoder.

    Each process trains the same CLIP, and the main process writes it.
    """
    logger.info("text.encoder: first training a CLIP for %d steps in %s", config.text.pretrain_steps, config.clip)
    _, accuracy = pretrain(config.clip_pretraining(), accelerator, dataset)
    measured = ", ".join(f"{name}: {value:.1%}" for name, value in accuracy.items())
    logger.info("text.encoder: the CLIP on its training images: %s", measured)
    accelerator.wait_for_everyone()
    text = config.text
    return TextEncoder.from_pretrained(config.clip, text.max_length, text.split_phrases).to(accelerator.device)


def build_text_embedder(
    captions: Sequence[str] | None, text_encoder: TextEncoder, config: TrainConfig, accelerator: Accelerator
) -> TextEmbedder:
    """Return a function from captions to text embeddings, and log how many captions are truncated.

    For a data set it is a table of all captions; for a stream, whose captions are not known in advance (None), and with
    phrase dropout, the encoder.
    """
    if captions is None:
        return text_encoder
    if truncated := text_encoder.cut(captions):
        message = "text.max_length: %d of %d captions are longer than %d tokens and are truncated, for example %r"
        logger.warning(message, len(truncated), len(captions), text_encoder.max_length, truncated[0])
    return text_encoder if config.phrase_dropout else context_table(text_encoder, captions, accelerator)


def open_data(run: setup.Run, dataset: Examples | None = None) -> TrainingData:
    """Open the training data: images, or cached latents if each image always has the same latents."""
    config = run.config
    augmented = config.data.flip or config.data.crop == "random"
    if run.latent_space.is_latent and augmented:
        logger.warning("data.flip or data.crop=random: latents are not cached but computed for each batch")
    if not run.latent_space.is_latent or config.data.streaming or augmented:
        return open_training_data(config.data, config.seed, dataset)
    files = open_captioned_files(config.data, dataset=dataset)
    return ShuffledDataset(latent_set(files, run.latent_space, run.accelerator), config.seed, config.data.held_out)


def accumulate_gradients(
    network: Any, micro_batches: Iterator[MicroBatch], batches: Batches, accelerator: Accelerator
) -> tuple[Float[Tensor, ""], MicroBatch]:
    """Accumulate the gradients of a step. Returns its mean loss on this process and its last micro-batch."""
    total, batch = torch.zeros((), device=accelerator.device), None
    for i, batch in enumerate(micro_batches):
        # Processes exchange gradients once per step, with the last micro-batch.
        with nullcontext() if i == batches.accumulation_steps - 1 else accelerator.no_sync(network):
            loss = batches.objective.loss(network, batch.x_0, batch.t, batch.eps, batch.context)
            accelerator.backward(loss / batches.accumulation_steps)
        total += loss.detach() / batches.accumulation_steps
    assert batch is not None
    return total, batch


def is_snapshot_due(config: TrainConfig, step: int, is_last: bool) -> bool:
    """Return whether to store a snapshot: at `config.snapshots` evenly spaced steps and at the last step."""
    if config.snapshots == 0:
        return False
    return is_last or _is_due(step, math.ceil(config.max_steps / config.snapshots))


def _validate_and_sample(
    step: int, validator: Validator, reporter: Reporter, state: TrainingState, pipe: TextToImage
) -> float | None:
    """Validate and sample if due; all processes must call this. Returns the held-out loss if it is new and finite."""
    config = reporter.config
    validation_due = _is_due(step, config.train.evaluate_every)
    samples_due = bool(config.sample.prompts) and _is_due(step, config.train.sample_every)
    if not (validation_due or samples_due):
        return None
    loss = math.nan
    with state.ema_weights(pipe), autocast(pipe.precision, pipe.device):
        if validation_due and (result := validator.measure(pipe.unet, reporter.accelerator)):
            reporter.log_validation(step, result)
            loss = result.true_caption
        if samples_due:
            pixels, error = _attempt(partial(reporter.sample, pipe))
            if not setup.any_process(error is not None, reporter.accelerator):
                reporter.log_samples(step, pixels)
            elif reporter.accelerator.is_main_process:
                reason = first_line(error) if error else "another process has too little memory"
                logger.warning("step %d: no sample grid: %s", step, reason)
    return loss if math.isfinite(loss) else None


def _attempt(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return the result of an action, or the UserError or lack of memory that ended it, which other processes must
    learn of before it is raised."""
    try:
        return action(), None
    except (UserError, MemoryError, RuntimeError) as error:
        if not (isinstance(error, UserError) or is_out_of_memory(error)):
            raise
        return None, error


def _can_save(
    step: int, last_batch: MicroBatch | None, state: TrainingState, batches: Batches, accelerator: Accelerator
) -> bool:
    """Return whether training can continue from the weights; all processes must call this.

    It can if a step has changed the weights since the newest checkpoint, and the weights, their averages and the loss
    on that step's batch are finite. One step at a learning rate that is too high leaves finite weights whose loss is
    not finite.
    """
    if last_batch is None:
        problem = "no step since the last checkpoint had finite gradients"
    else:
        loss = batches.objective.loss(state.unet, last_batch.x_0, last_batch.t, last_batch.eps, last_batch.context)
        finite = bool(loss.isfinite()) and state.is_finite()
        problem = "weights or loss are not finite" if setup.any_process(not finite, accelerator) else None
    if problem and accelerator.is_main_process:
        logger.warning("step %d: no checkpoint is written: %s", step, problem)
    return problem is None


def _skip_step(step: int, batches: Batches, optimizer: Any, accelerator: Accelerator) -> None:
    """Log the samples of a step with non-finite gradients."""
    if accelerator.scaler is not None:
        optimizer.step()  # leaves the weights unchanged, but decreases the loss scale
    if accelerator.is_main_process:
        logger.warning("step %d: skipped, non-finite gradients; samples: %s", step + 1, batches.sample_names(step))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
