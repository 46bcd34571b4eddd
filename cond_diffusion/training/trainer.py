"""Training: the loop, and what begins and ends it."""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from cond_diffusion.config.run import Config, TrainConfig
from cond_diffusion.data.cache import TextEmbedder, context_table, latent_set
from cond_diffusion.data.dataset import open_captioned_files
from cond_diffusion.data.loader import ShuffledDataset, TrainingData, open_training_data
from cond_diffusion.errors import UserError
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.run_folder import RunLock, checkpoint_of, checkpoints
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.training.batches import Batches, MicroBatch
from cond_diffusion.training.reporting import Interruption, Reporter
from cond_diffusion.training.setup import Run, acquire, build_run, make_accelerator, make_run
from cond_diffusion.training.state import Saver, TrainingState
from cond_diffusion.training.validation import Validator

GIVEN = "a data set given to train()"  # in config.yaml, in the place of data.source

logger = logging.getLogger(__name__)


def train(config: Config, dataset: datasets.Dataset | Sequence[Any] | None = None) -> Path:
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
        config = replace(config, data=replace(config.data, source=GIVEN, streaming=False))
    accelerator = make_accelerator(config)
    with RunLock(Path(config.run_dir)) as lock:
        if config.resume and lock.run_dir.is_dir():
            acquire(lock, accelerator)  # before the checkpoint is read: no other process rotates it away
        return _train(build_run(config, accelerator), lock, dataset)


def _train(run: Run, lock: RunLock, dataset: datasets.Dataset | Sequence[Any] | None) -> Path:
    config, accelerator, network, optimizer = run.config, run.accelerator, run.network, run.optimizer
    training_data = open_data(run, dataset)
    contexts = build_text_embedder(training_data, run.text_encoder, accelerator)
    state = TrainingState(accelerator.unwrap_model(network), optimizer, config.train, accelerator)
    progress = resume_from(run, state, training_data)
    start = progress.get("step", 0)
    make_run(lock, run, start)

    with torch.device("meta"):  # without weights, but for the moments when it samples
        pipe = TextToImage(UNet(run.unet.config), run.text_encoder, run.objective.prediction, run.latent_space)
    validator = Validator(config, training_data, contexts, run.objective, run.latent_space)
    batches = Batches(config, training_data, contexts, run.objective, accelerator, start, run.latent_space)
    reporter = Reporter(config, run.run_dir, start, run.samples_per_step, accelerator)
    reporter.announce_snapshots(state.averages)
    done, bad, held_out_loss = start, 0, progress.get("held_out_loss")
    good: MicroBatch | None = None  # of the last step since the newest checkpoint that changed the weights
    with Interruption(accelerator) as interruption, Saver(run.run_dir, config, pipe, state, accelerator) as saver:
        for step in reporter.steps():
            loss, batch = accumulate_gradients(network, batches, accelerator)
            gradient_norm: Any = accelerator.clip_grad_norm_(network.parameters(), config.train.max_grad_norm)
            rate = learning_rate(config.train, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # The same on all processes, which have exchanged their gradients.
            bad = 0 if torch.isfinite(gradient_norm) else bad + 1
            if bad:
                _skip(step, bad, batches, optimizer, accelerator)
            else:
                optimizer.step()
                state.update_averages(step + 1)
                good = batch
            optimizer.zero_grad()

            done = step + 1
            reporter.log(done, loss, gradient_norm, rate)
            interrupted = interruption.requested() and done < config.train.max_steps
            leaving = interrupted or done == config.train.max_steps
            if not interrupted:  # before the checkpoint, after which a resumed run continues
                found = _validate_and_sample(done, config, validator, reporter, state, pipe, accelerator)
                held_out_loss = held_out_loss if found is None else found
            checkpoint_due = leaving or _is_due(done, config.train.checkpoint_every)
            snapshot_due = is_snapshot_due(config.train, done, leaving)
            if (checkpoint_due or snapshot_due) and _worth_saving(done, good, state, batches, accelerator):
                progress = {"step": done, "samples_per_step": run.samples_per_step, "held_out_loss": held_out_loss}
                progress |= {**training_data.progress(), **state.progress()}
                saver.save(done, progress if checkpoint_due else None, snapshot=snapshot_due)
                good = None if checkpoint_due else good
            if leaving:
                break
        saver.finish(must=True)
    accelerator.wait_for_everyone()
    end_training(accelerator)
    until_here = [path for path in checkpoints(run.run_dir) if path.name <= checkpoint_of(run.run_dir, done).name]
    saved = until_here[-1] if until_here else None
    if interruption.signal is not None and done < config.train.max_steps:
        interruption.leave(done, saved)
    return reporter.log_summary(saved)


def resume_from(run: Run, state: TrainingState, training_data: TrainingData) -> dict[str, Any]:
    """Load the checkpoint that a run continues from, and move the data to where it stood; return its progress.

    Raises UserError where the checkpoint is not whole, or for another number of samples a step.
    """
    if run.resumed_from is None:
        return {}
    progress = state.load(run.resumed_from)
    if progress["samples_per_step"] != run.samples_per_step:
        raise UserError(
            f"resume: a step saw {progress['samples_per_step']} samples in this run and would now see "
            f"{run.samples_per_step}; keep train.batch_size x train.gradient_accumulation_steps x processes the same"
        )
    then, now = progress["data"], training_data.identity()
    if then != now:
        logger.warning("resume: the data changed: %s, now %s; continuing with the new data in a new order", then, now)
    training_data.resume(progress, progress["step"] * run.samples_per_step, same=then == now)
    return progress


def end_training(accelerator: Accelerator) -> None:
    """Close the trackers, and on GPUs the connections between processes."""
    if accelerator.device.type != "cpu":
        accelerator.end_training()
        return
    # Gloo's connections close with the process. Closed here they can wait for ever: whoever closes them holds Python's
    # lock and waits for gloo's threads, one of which may be waiting for the lock, to let go of the last tensor.
    for tracker in accelerator.trackers:
        tracker.finish()


def build_text_embedder(
    training_data: TrainingData, text_encoder: TextEncoder, accelerator: Accelerator
) -> TextEmbedder:
    """Return captions -> contexts: a table of all that a set has, or the encoder itself for a stream, whose captions
    nobody knows in advance. Say how many captions are longer than the encoder reads.
    """
    captions = training_data.captions()
    if captions is None:
        return text_encoder
    if cut := text_encoder.cut(captions):
        logger.warning(
            "%d of %d captions are longer than text.max_length (%d tokens) and are cut, for example %r",
            len(cut),
            len(captions),
            text_encoder.max_length,
            cut[0],
        )
    return context_table(text_encoder, captions, accelerator)


def open_data(run: Run, dataset: datasets.Dataset | Sequence[Any] | None = None) -> TrainingData:
    """Return what training reads: the images, or their latents where an image always has the same."""
    config = run.config
    augmented = config.data.flip or config.data.crop == "random"
    if run.latent_space.is_latent and augmented:
        logger.warning("data.flip or data.crop=random: latents are not cached but computed for each batch")
    if not run.latent_space.is_latent or config.data.streaming or augmented:
        return open_training_data(config.data, config.seed, dataset)
    files = open_captioned_files(config.data, dataset=dataset)
    return ShuffledDataset(latent_set(files, run.latent_space, run.accelerator), config.seed, config.data.held_out)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rise linearly over `warmup_steps`, then stay, or fall to 0 at `max_steps`: all the way along half a cosine, or in
    a straight line over the last `decay_steps` (Hu et al. 2024, "MiniCPM", section 4).

    A function of the step alone: no scheduler's state can be lost, or be stepped once for each process.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    match config.learning_rate_schedule:
        case "constant":
            decay = 1.0
        case "cosine":
            left = max(1, config.max_steps - config.warmup_steps)
            decay = (1 + math.cos(math.pi * max(0, step - config.warmup_steps) / left)) / 2
        case "warmup_stable_decay":
            decay = min(1.0, (config.max_steps - step) / (config.decay_steps + 1))
    return config.learning_rate * warmup * decay


def accumulate_gradients(
    network: Any, batches: Batches, accelerator: Accelerator
) -> tuple[Float[Tensor, ""], MicroBatch]:
    """Add up the gradients of the next step's micro-batches; return their mean loss on this process, and the last."""
    total, batch = torch.zeros((), device=accelerator.device), None
    for i, batch in enumerate(batches.next_step()):
        # Processes exchange gradients once a step, with the last micro-batch.
        with nullcontext() if i == batches.rounds - 1 else accelerator.no_sync(network):
            loss = batches.objective.loss(network, batch.x_0, batch.t, batch.eps, batch.context)
            accelerator.backward(loss / batches.rounds)
        total += loss.detach() / batches.rounds
    assert batch is not None  # a step has at least one
    return total, batch


def is_snapshot_due(config: TrainConfig, done: int, leaving: bool) -> bool:
    """Say whether `done` is one of the `snapshots` steps that lie evenly over the run, or the last that there is."""
    return (
        config.snapshots > 0
        and not config.lora_rank
        and (leaving or _is_due(done, math.ceil(config.max_steps / config.snapshots)))
    )


def _validate_and_sample(
    done: int,
    config: Config,
    validator: Validator,
    reporter: Reporter,
    state: TrainingState,
    pipe: TextToImage,
    accelerator: Accelerator,
) -> float | None:
    """Measure and draw what is due; the processes share the work. Return the held-out loss, where it was measured and
    is finite.
    """
    evaluating = _is_due(done, config.train.evaluate_every)
    drawing = bool(config.sample.prompts) and _is_due(done, config.train.sample_every)
    if not (evaluating or drawing):
        return None
    loss = math.nan
    with state.ema_weights(pipe):
        if evaluating and (result := validator.measure(pipe.unet, accelerator)):
            reporter.log_validation(done, result)
            loss = result.true_caption
        if drawing:
            reporter.draw(done, pipe)
    return loss if math.isfinite(loss) else None


def _worth_saving(
    done: int,
    good: MicroBatch | None,
    state: TrainingState,
    batches: Batches,
    accelerator: Accelerator,
) -> bool:
    """Say whether training can go on from the weights: whether a step has changed them since the newest checkpoint, and
    whether they, their averages, and their loss on that step's batch (`good`) are finite. All processes must call this.

    A single step at too high a learning rate leaves weights that are finite, and a loss that is not.
    """
    if good is None:
        problem = "no step since the last one had finite gradients"
    else:
        loss = batches.objective.loss(state.unet, good.x_0, good.t, good.eps, good.context)
        finite = torch.tensor([bool(loss.isfinite()) and state.is_finite()], device=accelerator.device)
        problem = None if cast(Tensor, accelerator.gather(finite)).all() else "weights or loss are not finite"
    if problem and accelerator.is_main_process:
        logger.warning("step %d: no checkpoint is written: %s", done, problem)
    return problem is None


def _skip(step: int, bad: int, batches: Batches, optimizer: Any, accelerator: Accelerator) -> None:
    """Say which samples gave gradients that are not finite; raise UserError when there were too many such steps."""
    if accelerator.scaler is not None:
        optimizer.step()  # changes no weights, but lowers the factor of the loss, which is what fp16 mostly wants
    if accelerator.is_main_process:
        names = batches.names_of_step(step)
        logger.warning("step %d has gradients that are not finite and is skipped; its samples: %s", step + 1, names)
    if bad >= batches.config.train.max_bad_steps:
        raise UserError(
            f"train.max_bad_steps: {bad} steps in a row, up to step {step + 1}, had gradients that are not finite; the "
            "newest checkpoint is from before them; try a lower train.learning_rate"
        )


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
