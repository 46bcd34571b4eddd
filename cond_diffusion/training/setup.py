"""Setup of a run before its first step: accelerator, initial weights, network and optimizer.

Training and the preflight check share it.
"""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from time import monotonic, sleep
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from cond_diffusion.config.run import (
    CONFIG_NAME,
    PRETRAIN,
    ClipPretrainingConfig,
    Config,
    LatentConfig,
    ObjectiveConfig,
    TextConfig,
    TrainConfig,
    load_config,
    save_config,
)
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.data.dataset import open_captioned_files
from cond_diffusion.data.sources import Examples
from cond_diffusion.device import check_memory, choose_precision, is_emulated, keep_memory, share_cores
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.diffusion.samplers import sampling_timesteps
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.models.clip import untrained_text_encoder
from cond_diffusion.models.ema import snapshot_files
from cond_diffusion.models.latents import LatentSpace, build_latent_space
from cond_diffusion.models.layers import ResidualBlock, SpatialTransformer
from cond_diffusion.models.lora import add_lora
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline import run_folder
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODELS, Checkpoint, open_checkpoint
from cond_diffusion.training.optimizer import Muon
from cond_diffusion.training.reporting import check_tracker

SECONDS_TO_APPEAR = 60  # of a new folder, on a disk that machines share
# Keys that a resumed run may not change, because the weights depend on them; of the other sections, all keys.
FIXED_KEYS = {"data": ("resolution", "channels"), "objective": ("prediction",)}

# Settings of `accelerate launch` that would change training silently, and what to use instead.
REFUSED_SETTINGS = {
    "ACCELERATE_DYNAMO_BACKEND": "use train.compile=true",
    "ACCELERATE_USE_DEEPSPEED": "use --use_fsdp --fsdp_version 2",
    "ACCELERATE_USE_MEGATRON_LM": "use --use_fsdp --fsdp_version 2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "use --use_fsdp --fsdp_version 2",
}

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Components of a run, except its data; `network`, which is `unet`, and `optimizer` are prepared by Accelerate."""

    config: Config  # completed with what `init_from` and the text encoder decide
    accelerator: Accelerator
    resumed_from: Path | None  # a checkpoint
    latent_space: LatentSpace
    text_encoder: TextEncoder
    objective: Objective
    unet: UNet
    network: Any
    optimizer: Any

    @property
    def samples_per_step(self) -> int:
        """Number of samples in a step, over all processes."""
        train = self.config.train
        return train.batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes


def build_run(config: Config, accelerator: Accelerator, dataset: Examples | None = None) -> Run:
    """Load or create all components of a run; the data are `dataset` (see `as_table`), or else the config's source. The
    text encoder of `text.encoder: pretrain` has random weights."""
    newest = find_run(config)
    resumed = None if newest is None else Checkpoint(newest)
    config, initial = apply_init_from(config, resumed)
    schedule = NoiseSchedule(config.schedule)
    # Raises an error now that would otherwise occur at the first sample grid.
    sampling_timesteps("ddpm", schedule, min(config.sample.steps, schedule.num_timesteps))
    source = resumed or initial
    text_encoder = _load_text_encoder(config, source, dataset)
    config = replace(config, text=replace(config.text, max_length=text_encoder.max_length))
    if resumed is not None:
        check_config(config, resumed)
    if config.train.lora_rank and config.train.snapshots:
        logger.warning("train.snapshots: %d; LoRA runs store none", config.train.snapshots)
        config = replace(config, train=replace(config.train, snapshots=0))
    latent_space = build_latent_space(config.latent) if source is None else source.latent_space
    weights = None if initial is None else initial.unet.state_dict()
    _check_memory(config, text_encoder.context_dim, latent_space, accelerator)
    unet = new_unet(config, text_encoder.context_dim, latent_space, weights).to(accelerator.device)
    network, optimizer = accelerator.prepare(unet, new_optimizer(config.train, unet))
    return Run(
        config=config,
        accelerator=accelerator,
        resumed_from=newest,
        latent_space=latent_space.to(accelerator.device),
        text_encoder=text_encoder.to(accelerator.device),
        objective=Objective(config.objective, schedule),
        unet=unet,
        network=network,
        optimizer=optimizer,
    )


def make_accelerator(config: Config) -> Accelerator:
    """Create the `Accelerator` for the available hardware and the config."""
    check_tracker(config.track)
    check_launcher(config.train)
    found = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if found is None or parse_flag_from_env("ACCELERATE_USE_CPU") else found
    on_cpu = device.type == "cpu"
    if on_cpu:
        share_cores()
        keep_memory()
    else:
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    precision = mixed_precision(config.train, device)
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()  # of an earlier run of this process
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # losses are divided in the trainer
        log_with=config.track,
        project_dir=config.run_dir,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("accelerate launch --use_fsdp: FSDP1 is not supported; add --fsdp_version 2")
        if config.train.lora_rank:
            raise UserError("train.lora_rank: LoRA does not support FSDP; remove --use_fsdp")
        if config.train.optimizer == "muon":
            raise UserError("train.optimizer: muon does not support FSDP, which shards matrices; expected adamw")
    return accelerator


def check_launcher(config: TrainConfig) -> None:
    """Refuse settings of `accelerate launch` and its environment that training would ignore."""
    for name, replacement in REFUSED_SETTINGS.items():
        if os.environ.get(name, "false").lower() not in ("false", "0", "no", "none", ""):
            raise UserError(f"{name}={os.environ[name]}: not supported; {replacement}")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(config.gradient_accumulation_steps)):
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS: {steps} contradicts train.gradient_accumulation_steps "
            f"({config.gradient_accumulation_steps}); set train.gradient_accumulation_steps={steps}"
        )


def mixed_precision(config: TrainConfig, device: torch.device) -> str:
    """Return Accelerate's name of the precision to use: the config's, or else the launcher's, or else the device's.

    A CPU without the instructions uses fp32, since it would be many times slower otherwise.
    """
    # Runs of earlier versions stored null. The launcher sets "no" where nothing was given.
    given = None if config.mixed_precision == "auto" else config.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", given or launched):
        raise UserError(f"train.mixed_precision: {given} contradicts --mixed_precision {launched}; remove one")
    precision = given or launched
    if precision not in ("no", "fp32", "bf16", "fp16"):
        raise UserError(f"--mixed_precision: {precision} is not supported; expected no, bf16 or fp16")
    if given is None and launched == "no":
        precision = choose_precision("auto", device, "train.mixed_precision")
    elif is_emulated(precision, device):
        logger.warning("train.mixed_precision: this CPU has no %s instructions; training in fp32", precision)
        return "no"
    return "no" if precision == "fp32" else precision


def find_run(config: Config | ClipPretrainingConfig) -> Path | None:
    """Return the checkpoint to resume from, the one that `resume` names or the newest; None if the run is new."""
    run_dir = Path(config.run_dir)
    if not config.resume:
        run_folder.check_new_run_dir(run_dir, or_else=", or continue it by resume=true")
        return None
    if not (run_folder.exists(run_dir) and (run_dir / CONFIG_NAME).exists()):
        if isinstance(config.resume, str):
            raise UserError(f"resume: no checkpoint {config.resume}, because {run_dir} is not a run")
        run_folder.check_new_run_dir(run_dir, or_else="; it is not a run and cannot be resumed")
        return None
    if isinstance(config.resume, str):
        return run_folder.named_checkpoint(run_dir, config.resume)
    newest = run_folder.newest_checkpoint(run_dir, with_state=True)
    if newest is None:
        before: Any = load_config(type(config), run_dir / CONFIG_NAME)
        every, metrics = getattr(before, "train", before).checkpoint_every, run_dir / run_folder.METRICS_NAME
        last = max((line["step"] for line in run_folder.read_metrics(metrics)), default=0) if metrics.exists() else 0
        if 0 < 2 * every <= last:
            problem = f"resume: {run_dir} has no checkpoint, but {metrics.name} reaches step {last}"
            hint = f"put its folder checkpoints back in place, or delete {metrics.name} to start at the first step"
            raise UserError(f"{problem}; {hint}")
        logger.warning("resume: no checkpoint in %s; starting at the first step", run_dir)
    return newest


def apply_init_from(config: Config, resumed: Checkpoint | None) -> tuple[Config, Checkpoint | None]:
    """Complete the config with what `init_from` decides: network, prediction, schedule, latent space, text encoder.
    Returns it, and the checkpoint with the initial weights if they are needed: a resumed run takes all these from its
    own config, and needs them only for LoRA, which is trained beside them."""
    init_from = config.init_from
    if init_from is None:
        if config.train.lora_rank:
            raise UserError(f"train.lora_rank: {config.train.lora_rank} requires init_from, a model to adapt")
        return config, None
    if config.text.encoder == PRETRAIN:  # the checkpoint has a text encoder
        defaults = TextConfig()
        text = replace(config.text, encoder=defaults.encoder, pretrain_steps=defaults.pretrain_steps)
        config = replace(config, text=text)
    if config.train.lora_rank and importlib.util.find_spec("peft") is None:
        raise UserError('train.lora_rank: peft is not installed; run: pip install "cond_diffusion[lora]"')
    if resumed is not None:
        before = resumed.run_config
        if before.init_from is None:
            raise UserError(f"resume: this run did not start from init_from={init_from}; remove it")
        decided: dict[str, Any] = {name: getattr(before, name) for name in ("unet", "schedule", "latent", "text")}
        prediction, source = before.objective.prediction, before.init_from
        if not _comes_from(source, init_from):
            raise UserError(f"resume: init_from changed from {source} to {init_from}; expected {source}")
        initial = None
        if config.train.lora_rank:
            # The folder that a Hub model was downloaded to may have been deleted.
            initial = Checkpoint(Path(source)) if Path(source).is_dir() else open_checkpoint(init_from)
            source = str(initial.folder)
    else:
        initial = open_checkpoint(init_from)
        space, source = initial.latent_space, str(initial.folder)
        decided = {
            "unet": replace(initial.unet.config, sample_size=None),  # other sizes are supported
            "schedule": initial.prediction.schedule.config,
            "latent": LatentConfig(vae=source) if space.is_latent else LatentConfig(space.downsample_factor),
            # The run's encoder may name a complete CLIP, while the checkpoint holds only the text model.
            "text": replace(initial.config.text, encoder=initial.config.clip)
            if initial.config is not None
            else TextConfig(
                source, max_length=initial.text_encoder.max_length, split_phrases=initial.text_encoder.split_phrases
            ),
        }
        prediction = initial.prediction.kind
    decided |= {"objective": replace(config.objective, prediction=prediction)}
    for name, values in decided.items():
        given, default, expected = map(_options, (getattr(config, name), type(values)(), values))
        for key, value in expected.items():
            if given[key] not in (default[key], value):
                message = f"init_from: {name}.{key} is {value!r} in the checkpoint, got {given[key]!r}"
                raise UserError(f"{message}; remove {name}.{key}")
    return replace(config, **decided, init_from=source), initial


def _comes_from(folder: str, init_from: str) -> bool:
    """Return whether `folder`, which a run started from, is what `init_from` names; a folder that is gone may be."""
    if init_from in BUILT_IN_MODELS:
        return Path(folder).name == BUILT_IN_MODELS[init_from].name  # maybe of another installation
    in_cache = f"models--{init_from.replace('/', '--')}" in Path(folder).parts  # of the Hub
    return not Path(folder).is_dir() or in_cache or Path(folder).resolve().is_relative_to(Path(init_from).resolve())


def _options(values: Any) -> dict[str, Any]:
    """Return the options of a section. Two ways to write the same, such as 4 and (4, 4) heads, become equal."""
    options = asdict(values)
    if isinstance(values, UNetConfig):
        options["num_heads"] = values.heads
    if isinstance(values, ObjectiveConfig):
        options["loss"] = values.weighting
    return options


def _load_text_encoder(config: Config, source: Checkpoint | None, dataset: Examples | None) -> TextEncoder:
    """Return the text encoder of the checkpoint that the run continues or starts from, or else the config's."""
    if source is None and config.text.encoder == PRETRAIN:
        if config.data.streaming:
            raise UserError("text.encoder: pretrain needs all captions; expected data.streaming=false, or a CLIP")
        groups = open_captioned_files(config.data, dataset=dataset).caption_groups
        captions = [caption for group in groups for caption in group]
        return untrained_text_encoder(config.clip_pretraining(), captions, config.text)
    if source is None:
        return TextEncoder.from_pretrained(config.text.encoder, config.text.max_length, config.text.split_phrases)
    encoder = source.text_encoder
    return TextEncoder(encoder.tokenizer, encoder.clip, config.text.max_length, config.text.split_phrases)


def check_config(config: Config, resumed: Checkpoint) -> None:
    """Compare the config with that of the resumed run; log changes that are allowed."""
    before = resumed.run_config
    check_unchanged(before, config, ("seed", "train.ema_width", "train.optimizer", "train.lora_rank"))
    for name in ("data", "text", "latent", "unet", "schedule", "objective"):
        old, new = _options(getattr(before, name)), _options(getattr(config, name))
        for key in new:
            if new[key] == old[key]:
                continue
            change = f"{name}.{key} changed from {old[key]!r} to {new[key]!r}"
            if key in FIXED_KEYS.get(name, new):
                raise UserError(f"resume: {change}, but the weights depend on it; expected {old[key]!r}")
            logger.warning("resume: %s; continuing with the new value", change)


def check_unchanged(before: Any, config: Any, keys: Iterable[str]) -> None:
    """Raise UserError if a resumed run changes one of the keys."""
    for key in keys:
        old, new = attrgetter(key)(before), attrgetter(key)(config)
        if old != new:
            raise UserError(f"resume: {key} changed from {old} to {new}; expected {old}")


def complete_unet_config(config: Config, context_dim: int, latent_space: LatentSpace) -> UNetConfig:
    """Return `config.unet` completed with the channels, size and context width of the data and the text encoder."""
    channels, side, _ = latent_space.shape(config.data)
    required = {"in_channels": channels, "sample_size": side, "context_dim": context_dim}
    for name, value in required.items():
        given = getattr(config.unet, name)
        if given not in (None, value):
            raise UserError(f"unet.{name}: {given} does not fit the data and the text encoder; expected {value}")
    return replace(config.unet, **required)


def _check_memory(config: Config, context_dim: int, latent_space: LatentSpace, accelerator: Accelerator) -> None:
    """Raise UserError if the weights, a batch, or a sample grid certainly exceed the free memory."""
    train, data, sample = config.train, config.data, config.sample
    pixels = data.channels * data.resolution**2
    unet_config = complete_unet_config(config, context_dim, latent_space)
    with torch.device("meta"):
        unet = UNet(unet_config)
    shards = accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1
    needed = _state_bytes(unet, train) if not train.lora_rank else 0
    check_memory(f"unet.channels ({unet_config.channels})", needed // shards, accelerator.device)
    # A lower bound of the batch: its images, and three feature maps of the first level.
    values = pixels + 3 * unet_config.channels[0] * latent_space.shape(data)[1] ** 2
    what = f"train.batch_size ({train.batch_size}), data.resolution ({data.resolution})"
    check_memory(what, 4 * train.batch_size * values, accelerator.device)
    images = sample.num_images * len(sample.prompts)
    check_memory(f"sample.num_images ({sample.num_images})", images * 6 * pixels)


def new_unet(
    config: Config, context_dim: int, latent_space: LatentSpace, weights: Mapping[str, Tensor] | None = None
) -> UNet:
    """Return the network to train, with LoRA, gradient checkpointing and compilation as configured, and the given
    weights, or else random ones, a function of the seed."""
    torch.manual_seed(config.seed)  # torch initializes weights from the global random state; nothing else here does
    unet_config = complete_unet_config(config, context_dim, latent_space)
    unet = UNet(unet_config) if weights is None else UNet.with_weights(unet_config, weights)
    if weights is None and config.objective.prediction == "epsilon":
        unet.start_as_copy()
    if config.train.lora_rank:
        add_lora(unet, config.train.lora_rank)
    if config.train.gradient_checkpointing:
        for module in unet.modules():
            if isinstance(module, ResidualBlock | SpatialTransformer):
                # These modules draw no random numbers, so there is no state to preserve.
                module.forward = partial(recompute, module.forward, use_reentrant=False, preserve_rng_state=False)
    if config.train.compile:
        unet.compile()
    if weights is not None:
        logger.info("%s", summary(unet, config.train))
    return unet


def new_optimizer(config: TrainConfig, unet: UNet) -> torch.optim.Optimizer:
    """Return Muon or fused AdamW for the trainable parameters."""
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "muon":
        input_and_output = [*unet.conv_in.parameters(), *unet.conv_out.parameters()]
        return Muon(trainable, rate, adamw_parameters=input_and_output, weight_decay=decay)
    return torch.optim.AdamW(trainable, rate, weight_decay=decay, fused=True)


def summary(unet: UNet, config: TrainConfig) -> str:
    """Describe the number of trained parameters and the memory of everything but activations."""
    total, trained = _num_parameters(unet)
    return (
        f"trains {trained / 1e6:.2f} of {total / 1e6:.2f} million parameters: about "
        f"{_state_bytes(unet, config) / 1e9:.2f} GB for weights, gradients, moments and averages"
    )


def _num_parameters(unet: UNet) -> tuple[int, int]:
    """Return the number of all parameters, and of those that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in unet.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _state_bytes(unet: UNet, config: TrainConfig) -> int:
    """Return the bytes of all weights and, for trained ones, a gradient, two moments (Muon has one) and averages."""
    total, trained = _num_parameters(unet)
    averages = 2 if config.snapshots else 1
    return 4 * total + (12 + 4 * averages) * trained


def acquire_lock(lock: run_folder.RunLock, accelerator: Accelerator) -> None:
    """Acquire the lock in the main process; all processes must call this, and raise UserError if that fails."""
    problem = None
    if accelerator.is_main_process:
        try:
            lock.acquire()
        except UserError as error:
            problem = error
    if any_process(problem is not None, accelerator):
        raise problem or UserError(f"run_dir: {lock.run_dir} could not be locked by the main process")


def acquire_resumed(lock: run_folder.RunLock, config: Config | ClipPretrainingConfig, accelerator: Accelerator) -> None:
    """Acquire the lock of a run that is resumed, so that no other process deletes the checkpoint while it is loaded."""
    if config.resume:
        is_here = run_folder.exists(lock.run_dir) and lock.run_dir.is_dir()
        if any_process(is_here, accelerator):
            check_shared(is_here, lock.run_dir, accelerator)
            acquire_lock(lock, accelerator)


def check_shared(is_here: bool, run_dir: Path, accelerator: Accelerator) -> None:
    """Raise UserError unless the run's folder exists for all processes; all of them must call this."""
    if any_process(not is_here, accelerator):
        raise UserError(f"run_dir: {run_dir} is not on a disk that all machines share; expected one")


def any_process(condition: bool, accelerator: Accelerator) -> bool:
    """Return whether `condition` holds on any process; all processes must call this together."""
    if accelerator.num_processes == 1:
        return condition
    local = torch.tensor([condition], dtype=torch.int32, device=accelerator.device)
    return bool(cast(Tensor, accelerator.gather(local)).any())


def prepare_run_dir(
    lock: run_folder.RunLock,
    config: Config | ClipPretrainingConfig,
    accelerator: Accelerator,
    resumed_from: Path | None,
    start: int,
) -> None:
    """Create and lock the run's folder, and remove what a run that continues after `start` steps writes again.

    Called once the config and the data are known to be valid. Checkpoints later than the one that `resume` names are
    renamed.
    """
    run_dir = lock.run_dir
    accelerator.wait_for_everyone()  # until all processes have checked that the folder does not exist
    if accelerator.is_main_process:
        with user_errors(f"run_dir: {run_dir} cannot be created", OSError):
            run_dir.mkdir(parents=True, exist_ok=True)
    acquire_lock(lock, accelerator)
    deadline = monotonic() + SECONDS_TO_APPEAR
    while not run_dir.is_dir() and monotonic() < deadline:  # a network disk may show a new folder late
        sleep(1)
    check_shared(run_dir.is_dir(), run_dir, accelerator)
    if not accelerator.is_main_process:
        return
    # Check again: the folder had to exist before it could be locked.
    if resumed_from is None and not config.resume:
        run_folder.check_new_run_dir(run_dir)
    if resumed_from is None and run_folder.newest_checkpoint(run_dir, with_state=True) is not None:
        raise UserError(f"run_dir: another process has trained in {run_dir} meanwhile; repeat the command")
    with user_errors(f"run_dir: {run_dir} cannot be written to", OSError):
        repeated = [snapshot for step, snapshot in snapshot_files(run_dir) if step > start]
        later = [path for path in run_folder.checkpoints(run_dir) if run_folder.step_of(path) > start]
        if isinstance(config.resume, str):  # the repeated steps may differ
            metrics = run_dir / run_folder.METRICS_NAME
            if metrics.exists() and any(line["step"] > start for line in run_folder.read_metrics(metrics)):
                shutil.copy(metrics, run_folder.superseded_name(metrics))
            for snapshot in repeated:
                run_folder.supersede(snapshot)
            # The checkpoints last, in case that this process is killed.
            if names := ", ".join(run_folder.supersede(path).name for path in later):
                logger.warning("resume: renamed later checkpoints to %s", names)
        else:  # written again, the same
            for snapshot in repeated:
                snapshot.unlink()
        run_folder.remove_unfinished(run_dir)
        save_config(config, run_dir / CONFIG_NAME)
