"""A run before its first step: what it computes on, starts from, and trains. Training and the preflight share it."""

import importlib.util
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from cond_diffusion.config.run import CONFIG_NAME, Config, LatentConfig, TextConfig, TrainConfig, save_config
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.device import has_bf16, keep_memory, share_cores
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.diffusion.samplers import sampling_timesteps
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError
from cond_diffusion.models.ema import FOLDER as SNAPSHOTS
from cond_diffusion.models.latents import LatentSpace, build_latent_space
from cond_diffusion.models.layers import ResidualBlock, SpatialTransformer
from cond_diffusion.models.lora import add_lora
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.checkpoint import Checkpoint, open_checkpoint
from cond_diffusion.pipeline.run_folder import (
    RunLock,
    make_run_dir,
    named_checkpoint,
    new_run_dir,
    newest_checkpoint,
    supersede_after,
)
from cond_diffusion.training.optimizer import Muon
from cond_diffusion.training.reporting import check_tracker

# What may change within a run, since the weights mean the same afterwards; everything else decides what they mean.
SAFE = {
    "objective": ("loss", "min_snr_gamma", "timesteps"),
    "data": (
        *("source", "streaming", "shuffle_buffer", "image_column", "caption_column", "caption_templates"),
        *("label_names", "crop", "flip", "background", "max_bad_fraction", "memory_gb", "held_out"),
    ),
}

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What a run consists of before it reads data.

    config: with all that `init_from` and the encoder decide filled in. resumed_from: the checkpoint it continues from.
    network, optimizer: `unet` and its optimizer as Accelerate has prepared them.
    """

    config: Config
    accelerator: Accelerator
    run_dir: Path
    resumed_from: Path | None
    latent_space: LatentSpace
    text_encoder: TextEncoder
    objective: Objective
    unet: UNet
    network: Any
    optimizer: Any

    @property
    def samples_per_step(self) -> int:
        """How many samples all processes together see in a step."""
        train = self.config.train
        return train.batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes


def build_run(config: Config, accelerator: Accelerator) -> Run:
    """Load and create everything that a config describes, once, but for the data.

    Raises:
        UserError: Where the config does not fit itself, the run that it resumes, or the model that it starts from.
    """
    run_dir, newest = find_run(config)
    resumed = None if newest is None else Checkpoint(newest)
    config, initial = apply_init_from(config, resumed)
    schedule = NoiseSchedule(config.schedule)
    objective = Objective(config.objective, schedule)
    # Refuses now what the first sample grid would refuse.
    sampling_timesteps("ddpm", schedule, min(config.sample.steps, schedule.num_timesteps))
    source = resumed or initial
    text_encoder = _text_encoder(config, source)
    config = replace(config, text=replace(config.text, max_length=text_encoder.max_length))
    if resumed is not None:
        check_config(config, resumed)
    in_latents = source is not None and source.latent_space.is_latent
    latent_space = source.latent_space if source is not None and in_latents else build_latent_space(config.latent)
    weights = initial.unet.state_dict() if initial is not None and (resumed is None or config.train.lora_rank) else None
    unet = new_unet(config, text_encoder.context_dim, latent_space, weights).to(accelerator.device)
    network, optimizer = accelerator.prepare(unet, new_optimizer(config.train, unet))
    return Run(
        config=config,
        accelerator=accelerator,
        run_dir=run_dir,
        resumed_from=newest,
        latent_space=latent_space.to(accelerator.device),
        text_encoder=text_encoder.to(accelerator.device),
        objective=objective,
        unet=unet,
        network=network,
        optimizer=optimizer,
    )


def make_accelerator(config: Config) -> Accelerator:
    """Create the `Accelerator` for the available hardware and the config."""
    check_tracker(config.track)
    on_cpu = torch.accelerator.current_accelerator(check_available=True) is None
    if on_cpu:
        share_cores()
        keep_memory()
    else:
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=_precision(config.train, on_cpu),
        log_with=config.track,
        project_dir=config.run_dir,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("accelerate launch --use_fsdp: expected --fsdp_version 2 beside it")
        if config.train.lora_rank:
            raise UserError("train.lora_rank: LoRA does not support FSDP; remove --use_fsdp")
        if config.train.optimizer == "muon":
            raise UserError("train.optimizer: muon needs whole matrices, which FSDP shards; expected adamw")
    return accelerator


def _precision(config: TrainConfig, on_cpu: bool) -> str:
    """Return the mixed precision to use: without instructions for it a CPU is many times slower than in fp32."""
    wanted = config.mixed_precision
    if not on_cpu or wanted == "no" or (wanted == "bf16" and has_bf16()):
        return wanted
    logger.warning("train.mixed_precision=%s: this CPU has no instructions for it; training in fp32", wanted)
    return "no"


def find_run(config: Config) -> tuple[Path, Path | None]:
    """Return the folder for a new run; or with `resume` that of the existing run, and the checkpoint that it names or
    the newest that is whole.

    Raises UserError where the folder holds something else.
    """
    if not config.resume:
        return new_run_dir(config.run_dir, or_else=", or continue it by resume=true"), None
    run_dir = Path(config.run_dir)
    if not (run_dir / CONFIG_NAME).exists():
        if isinstance(config.resume, str):
            raise UserError(f"resume: there is no run in {run_dir}, and so no checkpoint {config.resume}")
        return new_run_dir(config.run_dir, or_else="; it is no run that could be resumed"), None
    if isinstance(config.resume, str):
        return run_dir, named_checkpoint(run_dir, config.resume)
    newest = newest_checkpoint(run_dir, with_state=True)
    if newest is None:
        logger.warning("resume: no checkpoint in %s; starting from scratch", run_dir)
    return run_dir, newest


def apply_init_from(config: Config, resumed: Checkpoint | None) -> tuple[Config, Checkpoint | None]:
    """Return the config with all that `init_from` decides - the network, its prediction, its schedule, the latent
    space, the text encoder - and the checkpoint with the initial weights; None where there is none to read.

    A run that is resumed has decided all that already, and has the weights itself, but for those beside which LoRA is
    trained.

    Raises UserError where the config says something else.
    """
    if config.init_from is None:
        if config.train.lora_rank:
            raise UserError("train.lora_rank: there is nothing to add to; expected init_from beside it")
        return config, None
    if config.train.lora_rank and importlib.util.find_spec("peft") is None:
        raise UserError('train.lora_rank needs peft; install it: pip install "cond_diffusion[lora]"')
    if resumed is not None:
        before = resumed.run_config
        if before.init_from is None:
            raise UserError("resume: this run did not begin with init_from; leave it out")
        decided = {name: getattr(before, name) for name in ("unet", "schedule", "latent", "text")}
        kind, source = before.objective.prediction, before.init_from
        initial = None
        if config.train.lora_rank:
            # The folder that a hub id was downloaded to may be gone.
            initial = Checkpoint(Path(source)) if Path(source).is_dir() else open_checkpoint(config.init_from)
            source = str(initial.folder)
    else:
        initial = open_checkpoint(config.init_from)
        latent_space, source = initial.latent_space, str(initial.folder)
        decided = {
            "unet": replace(initial.unet.config, sample_size=None),  # it samples other sizes, too
            "schedule": initial.prediction.schedule.config,
            "latent": LatentConfig(vae=source)
            if latent_space.is_latent
            else LatentConfig(latent_space.downsample_factor),
            "text": _text_of(initial),
        }
        kind = initial.prediction.kind
    for name, values in decided.items():
        given, default = asdict(getattr(config, name)), asdict(type(values)())
        for field in fields(values):
            _check_decided(f"{name}.{field.name}", given[field.name], default[field.name], asdict(values)[field.name])
    _check_decided("objective.prediction", config.objective.prediction, "epsilon", kind)
    changed: dict[str, Any] = {**decided, "objective": replace(config.objective, prediction=kind)}
    return replace(config, **changed, init_from=source), initial


def _text_of(initial: Checkpoint) -> TextConfig:
    """Return the encoder of a pipeline by the name that its run had for it: that may be a whole CLIP's, of which the
    pipeline holds the text half.
    """
    if initial.config is not None:
        return initial.config.text
    return TextConfig(str(initial.folder), initial.text_encoder.max_length)


def _check_decided(key: str, given: Any, default: Any, found: Any) -> None:
    if given not in (default, found):
        raise UserError(f"init_from: {key} is {found!r} there, and {given!r} here; leave it out")


def _text_encoder(config: Config, source: Checkpoint | None) -> TextEncoder:
    """Return the encoder of the checkpoint that a run continues or starts from, whatever has become of the one that it
    was trained with; where there is none, the config's.
    """
    if source is None:
        return TextEncoder.from_pretrained(config.text.encoder, config.text.max_length)
    own = source.text_encoder
    return TextEncoder(own.tokenizer, own.clip, config.text.max_length or own.max_length)


def check_config(config: Config, resumed: Checkpoint) -> None:
    """Compare the config with that of the run that wrote the checkpoint.

    Raises UserError for a change that the weights do not survive; logs one that they do.
    """
    before = resumed.run_config
    for key in ("seed", "train.ema_width", "train.optimizer", "train.lora_rank"):
        then, now = (_value(each, key) for each in (before, config))
        if then != now:
            raise UserError(f"resume: {key} was {then} in this run and is now {now}; keep it")
    for name in ("data", "text", "latent", "unet", "schedule", "objective"):
        now, then = asdict(getattr(config, name)), asdict(getattr(before, name))
        for key in now:
            if now[key] == then[key]:
                continue
            change = f"{name}.{key} was {then[key]!r} in this run and is now {now[key]!r}"
            if key not in SAFE.get(name, ()):
                raise UserError(f"resume: {change}; the weights mean something only with the former")
            logger.warning("resume: %s; continuing with it", change)


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def complete_unet_config(config: Config, context_dim: int, latent_space: LatentSpace) -> UNetConfig:
    """Fill in what the data and the text encoder decide; raise UserError where `config.unet` says otherwise."""
    channels, side, _ = latent_space.shape(config.data)
    from_data = {"in_channels": channels, "sample_size": side, "context_dim": context_dim}
    for name, value in from_data.items():
        given = getattr(config.unet, name)
        if given not in (None, value):
            raise UserError(
                f"unet.{name}: {given} does not fit the data and the text encoder; expected {value}, or nothing"
            )
    return replace(config.unet, **from_data)


def new_unet(
    config: Config, context_dim: int, latent_space: LatentSpace, weights: Mapping[str, Tensor] | None = None
) -> UNet:
    """Return a network with fresh weights, a function of the seed; or with these; and LoRA beside them if the config
    says so.
    """
    torch.manual_seed(config.seed)  # torch draws initial weights from the global state; nothing else here does
    complete = complete_unet_config(config, context_dim, latent_space)
    unet = UNet(complete) if weights is None else UNet.with_weights(complete, weights)
    if weights is None and config.objective.prediction == "epsilon":
        unet.start_as_copy()
    if config.train.lora_rank:
        add_lora(unet, config.train.lora_rank)
    if config.train.gradient_checkpointing:
        for module in unet.modules():
            if isinstance(module, ResidualBlock | SpatialTransformer):
                # Nothing inside draws random numbers whose state would have to be kept.
                module.forward = partial(recompute, module.forward, use_reentrant=False, preserve_rng_state=False)
    if config.train.compile:
        unet.compile()
    if weights is not None:
        logger.info("%s", summary(unet, averages=2 if config.train.snapshots else 1))
    return unet


def new_optimizer(config: TrainConfig, unet: UNet) -> torch.optim.Optimizer:
    """Return Muon, or AdamW in its version that updates all weights in a few calls."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "muon":
        ends = [*unet.conv_in.parameters(), *unet.conv_out.parameters()]
        return Muon(trained, rate, first_and_last=ends, weight_decay=decay)
    return torch.optim.AdamW(trained, rate, weight_decay=decay, fused=True)


def summary(unet: UNet, averages: int = 1) -> str:
    """Describe how much of a network is trained, and the memory that it takes beside its activations."""
    total = sum(parameter.numel() for parameter in unet.parameters())
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    # 4 bytes each: weights; and of what is trained a gradient, two moments (Muon has one), the averages.
    return (
        f"trains {trained / 1e6:.2f} of {total / 1e6:.2f} million parameters: about "
        f"{(4 * total + (12 + 4 * averages) * trained) / 1e9:.2f} GB for weights, gradients, moments and averages"
    )


def acquire(lock: RunLock, accelerator: Accelerator) -> None:
    """Take the lock in the main process; all processes must call this, and raise UserError where that fails."""
    problem = None
    if accelerator.is_main_process:
        try:
            lock.acquire()
        except UserError as error:
            problem = error
    if accelerator.num_processes > 1:
        failed = torch.tensor([problem is not None], dtype=torch.int32, device=accelerator.device)
        if cast(Tensor, accelerator.gather(failed)).any() and problem is None:
            problem = UserError("run_dir: the main process could not lock it")
    if problem is not None:
        raise problem


def make_run(lock: RunLock, run: Run, start: int) -> None:
    """Make the run's folder and lock it, now that nothing in the config has turned out to be wrong; remove what a run
    that continues after `start` steps will write again, and rename later checkpoints if `resume` named an earlier one.

    Raises UserError where another process has begun to train there meanwhile.
    """
    run_dir, config, accelerator = run.run_dir, run.config, run.accelerator
    accelerator.wait_for_everyone()  # until all processes have seen that it was not there
    if accelerator.is_main_process:
        make_run_dir(run_dir)
    acquire(lock, accelerator)
    if not accelerator.is_main_process:
        return
    if run.resumed_from is None and not config.resume:
        new_run_dir(config.run_dir)  # still: it could not be locked before it was there
    if isinstance(config.resume, str) and (later := supersede_after(run_dir, start)):
        logger.warning("resume: renamed later checkpoints to %s", ", ".join(path.name for path in later))
    for unfinished in (run_dir / "checkpoints").glob(".step-*"):  # of a run that was killed while it wrote this
        shutil.rmtree(unfinished)
    for snapshot in (run_dir / SNAPSHOTS).glob("step-*"):
        if snapshot.suffix != ".safetensors" or int(snapshot.stem.removeprefix("step-")) > start:
            snapshot.unlink()
    try:
        save_config(config, run_dir / CONFIG_NAME)
    except OSError as error:
        raise UserError(f"run_dir: {run_dir} cannot be written to: {error.strerror}") from error
