"""Training: the loop, and what begins and ends it."""

import logging
import math
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from cond_diffusion.batches import Batches
from cond_diffusion.checkpoint import (
    load_state,
    make_run_dir,
    new_run_dir,
    newest_checkpoint,
    save_checkpoint,
    save_state,
)
from cond_diffusion.config import Config, TrainConfig, load_config, save_config
from cond_diffusion.data import CaptionedImages, load_captioned_images
from cond_diffusion.ema import EMA
from cond_diffusion.errors import UserError
from cond_diffusion.interruption import Interruption
from cond_diffusion.pipeline import TextToImage
from cond_diffusion.reporting import Reporter
from cond_diffusion.text import ContextTable, TextEncoder
from cond_diffusion.unet import UNet
from cond_diffusion.unet_config import UNetConfig

logger = logging.getLogger(__name__)


def train(config: Config) -> Path:
    """Train as `config` says, or go on with a run; return the newest checkpoint's folder."""
    on_cpu = torch.accelerator.current_accelerator(check_available=True) is None
    if on_cpu:
        _share_cores()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=_precision(config.train, on_cpu))
    run_dir, newest = _find_run(config)
    with accelerator.main_process_first():  # the others then read what the first one has cached
        data = load_captioned_images(config.data, progress=accelerator.is_main_process)
    # A resumed run reads with the encoder that its checkpoint holds, whatever has become of the one that it began with.
    encoder = config.text.encoder if newest is None else newest
    text_encoder = TextEncoder.from_pretrained(encoder, config.text.max_length).to(accelerator.device)
    batches = Batches(config, data, _embed_captions(data, text_encoder, accelerator), accelerator)

    torch.manual_seed(config.seed)  # torch draws initial weights from the global state; nothing else here does
    unet = UNet(complete_unet_config(config, text_encoder.context_dim)).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
    )
    ema = EMA(unet, config.train.ema_width)
    pipe = TextToImage(ema.network, text_encoder, batches.objective.prediction, config.latent.patch_size)
    start = 0 if newest is None else _resume(newest, batches.per_step, unet, ema, optimizer)
    network, optimizer = accelerator.prepare(unet, optimizer)
    _make_run(run_dir, config, accelerator)

    reporter = Reporter(config, run_dir, start, batches.per_step, accelerator)
    done, bad = start, 0
    with Interruption(accelerator) as interruption:
        for step in reporter.steps():
            loss = _accumulate_gradients(network, batches, step, accelerator)
            gradient_norm: Any = accelerator.clip_grad_norm_(network.parameters(), config.train.max_grad_norm)
            rate = learning_rate(config.train, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # The same on all processes, which have exchanged their gradients.
            bad = 0 if torch.isfinite(gradient_norm) else bad + 1
            if bad:
                _skip(step, bad, batches, accelerator)
            else:
                optimizer.step()
                ema.update(unet, step + 1)
            optimizer.zero_grad()

            done = step + 1
            reporter.log(done, loss, gradient_norm, rate)
            leaving = interruption.noted(done) or done == config.train.max_steps
            if accelerator.is_main_process:
                if leaving or _is_due(done, config.train.checkpoint_every):
                    progress = {"step": done, "samples_per_step": batches.per_step}
                    _save(run_dir, config, progress, pipe, unet, optimizer, must=leaving)
                if config.sample.prompts and _is_due(done, config.train.sample_every):
                    reporter.draw(done, pipe)
            if leaving:
                break
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if interruption.signal is not None and done < config.train.max_steps:
        interruption.leave(done)
    return reporter.last_words()


def complete_unet_config(config: Config, context_dim: int) -> UNetConfig:
    """Fill in what the data and the text encoder decide; raise UserError where `config.unet` says otherwise."""
    side, patch = config.data.resolution, config.latent.patch_size
    if side % patch:
        raise UserError(f"latent.patch_size: {patch} does not divide data.resolution ({side})")
    from_data = {
        "in_channels": config.data.channels * patch**2,
        "sample_size": side // patch,
        "context_dim": context_dim,
    }
    for name, value in from_data.items():
        given = getattr(config.unet, name)
        if given not in (None, value):
            raise UserError(
                f"unet.{name}: {given} does not fit the data and the text encoder; expected {value}, or nothing"
            )
    return replace(config.unet, **from_data)


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


def _accumulate_gradients(network: Any, batches: Batches, step: int, accelerator: Accelerator) -> Float[Tensor, ""]:
    """Add up the gradients of a step's micro-batches; return their mean loss on this process."""
    rounds = batches.config.train.gradient_accumulation_steps
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches.of_step(step)):
        # Processes exchange gradients once a step, with the last micro-batch.
        with nullcontext() if i == rounds - 1 else accelerator.no_sync(network):
            loss = batches.objective.loss(network, batch.x_0, batch.t, batch.eps, batch.context)
            accelerator.backward(loss / rounds)
        total += loss.detach() / rounds
    return total


def _skip(step: int, bad: int, batches: Batches, accelerator: Accelerator) -> None:
    """Say which samples gave gradients that are not finite; raise UserError when there were too many such steps."""
    if accelerator.is_main_process:
        indices = batches.indices_of_step(step).tolist()
        logger.warning("step %d has gradients that are not finite and is skipped; its samples: %s", step + 1, indices)
    if bad >= batches.config.train.max_bad_steps:
        raise UserError(
            f"train.max_bad_steps: {bad} steps in a row, up to step {step + 1}, had gradients that are not finite; the "
            "newest checkpoint is from before them or among them; try a lower train.learning_rate"
        )


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _precision(config: TrainConfig, on_cpu: bool) -> str:
    """Return the mixed precision to use: on a CPU without bf16 instructions bf16 is many times slower than fp32."""
    if config.mixed_precision == "bf16" and on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning("train.mixed_precision=bf16: this CPU has no bf16 instructions; training in fp32")
        return "no"
    return config.mixed_precision


def _share_cores() -> None:
    """Share this machine's cores among its processes.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 for whoever did not set it, and all cores but one stand
    idle.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _embed_captions(data: CaptionedImages, text_encoder: TextEncoder, accelerator: Accelerator) -> ContextTable:
    """Embed each unique caption, and the empty one, once; say how many are longer than the encoder reads."""
    captions = list(dict.fromkeys(["", *(caption for group in data.caption_groups for caption in group)]))
    if accelerator.is_main_process and (cut := [caption for caption in captions if text_encoder.words_cut(caption)]):
        logger.warning(
            "%d of %d captions are longer than text.max_length (%d tokens) and are cut, for example %r",
            len(cut),
            len(captions),
            text_encoder.max_length,
            cut[0],
        )
    return text_encoder.table(captions, progress=accelerator.is_main_process)


def _find_run(config: Config) -> tuple[Path, Path | None]:
    """Return the folder for a new run; or with `resume` that of the run that is there, if it has the same config, and
    the newest of its checkpoints that is whole.
    """
    if not config.resume:
        return new_run_dir(config.run_dir, or_else=", or go on with it by resume=true"), None
    run_dir = Path(config.run_dir)
    if not (run_dir / "config.yaml").exists():
        return new_run_dir(config.run_dir, or_else="; it is no run that could be resumed"), None
    if newest := newest_checkpoint(run_dir, with_state=True):
        _check_unchanged(config, load_config(Config, newest / "config.yaml"))
    return run_dir, newest


def _make_run(run_dir: Path, config: Config, accelerator: Accelerator) -> None:
    """Make the run's folder, now that nothing in the config has turned out to be wrong."""
    accelerator.wait_for_everyone()  # until all processes have seen that it was not there
    if accelerator.is_main_process:
        make_run_dir(run_dir)
        save_config(config, run_dir / "config.yaml")


def _check_unchanged(config: Config, before: Config) -> None:
    """Raise UserError for a key that decides what the weights mean, or what the next step sees."""
    if config.seed != before.seed:
        raise UserError(f"resume: seed was {before.seed} in this run and is now {config.seed}")
    for section in ("data", "text", "latent", "unet", "schedule", "objective"):
        now, then = asdict(getattr(config, section)), asdict(getattr(before, section))
        for key in now:
            if now[key] != then[key]:
                raise UserError(f"resume: {section}.{key} was {then[key]!r} in this run and is now {now[key]!r}")


def _resume(newest: Path, per_step: int, unet: UNet, ema: EMA[UNet], optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint; return the number of steps that are done."""
    ema.network.load_state_dict(UNet.from_pretrained(newest / "unet").state_dict())
    progress = load_state(newest / "state", unet, optimizer)
    if progress["samples_per_step"] != per_step:
        raise UserError(
            f"resume: a step saw {progress['samples_per_step']} samples in this run and would now see {per_step}; keep "
            "train.batch_size x train.gradient_accumulation_steps x processes the same"
        )
    return progress["step"]


def _save(
    run_dir: Path,
    config: Config,
    progress: dict[str, int],
    pipe: TextToImage,
    unet: UNet,
    optimizer: Any,
    *,
    must: bool,
) -> None:
    """Write a checkpoint. On a full disk the run goes on without it, unless it `must` be written."""

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        save_config(config, folder / "config.yaml")
        save_state(folder / "state", unet, optimizer, progress)

    try:
        save_checkpoint(run_dir, progress["step"], write, keep=config.train.keep_checkpoints)
    except UserError as error:
        if must:
            raise
        logger.warning("%s", error)
