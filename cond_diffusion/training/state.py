"""Training state (weights, optimizer moments, averages of the weights), and saving it in the background.

`TrainingState` holds the state and loads it from a checkpoint; `Saver` writes checkpoints and snapshots. Under FSDP
each process holds a shard of every tensor: the training state is written as one file per process, and any number of
processes can load it; the averaged weights, which are sampled from, are gathered and written as full tensors.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from cond_diffusion.config.run import Config, TrainConfig, save_config
from cond_diffusion.errors import UserError, first_line, user_errors
from cond_diffusion.files import load_tensors, save_tensors, write_json
from cond_diffusion.models.ema import EMA, Weights, save_snapshot
from cond_diffusion.models.lora import digest_of_base, load_lora, merged, save_lora
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.run_folder import PROGRESS_NAME, read_progress, save_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage

logger = logging.getLogger(__name__)

LocalShards = dict[str, dict[str, Tensor]]  # by file stem and tensor name


class TrainingState:
    """The network, placed or sharded by Accelerate, its optimizer, prepared by it, and the averages: the one that is
    sampled from, and one of half its width if the run stores snapshots."""

    def __init__(self, unet: UNet, optimizer: Any, config: TrainConfig, accelerator: Accelerator) -> None:
        self.unet = unet
        self.base = digest_of_base(unet) if config.lora_rank else None
        self.optimizer = optimizer
        self.scaler = accelerator.scaler  # of the loss, with fp16 only
        named = unet.named_parameters()
        self.parameters: Weights = {name: parameter for name, parameter in named if parameter.requires_grad}
        widths = [config.ema_width, config.ema_width / 2] if config.snapshots else [config.ema_width]
        self.averages = [EMA(self.parameters, width) for width in widths]
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters.values())
        self.process, self.processes = accelerator.process_index, accelerator.num_processes

    def update_averages(self, step: int) -> None:
        """Update the averages with the weights after `step` steps."""
        for average in self.averages:
            average.update(self.parameters, step)

    def is_finite(self) -> bool:
        """Return whether the weights and averages that this process holds are finite."""
        groups = (self.parameters, *(average.weights for average in self.averages))
        return all(bool(local_shard(weight.detach()).isfinite().all()) for group in groups for weight in group.values())

    @contextmanager
    def ema_weights(self, pipe: TextToImage) -> Iterator[None]:
        """Context manager in which a pipeline uses the averaged weights; under FSDP all processes must call this."""
        unet = pipe.unet
        pipe.unet = self.averaged_unet()
        try:
            yield
        finally:
            pipe.unet = unet

    def averaged_unet(self) -> UNet:
        """Return a network with the averaged weights; under FSDP it is a copy, and all processes must call this."""
        average = {name: full_tensor(weight) for name, weight in self.averages[0].weights.items()}
        return UNet.with_weights(self.unet.config, self.merge_lora(average))

    def merge_lora(self, weights: Weights) -> Weights:
        """Return the weights of a network without LoRA layers from the trained weights."""
        return weights if self.base is None else merged(self.unet, weights)

    def local_shards(self) -> LocalShards:
        """Return CPU copies of the training state on this process; the first average is saved separately, in full."""
        groups: dict[str, Weights] = {"unet": self.parameters, "optimizer": moments_of(self.optimizer)}
        if len(self.averages) > 1:
            groups["narrow_ema"] = self.averages[1].weights
        return {stem: copy_to_cpu(tensors, local_shard) for stem, tensors in groups.items()}

    def full_averages(self, *, copy: bool) -> list[Weights]:
        """Gather the averages and return CPU copies of them, or nothing if `copy` is false.

        Under FSDP all processes must call this together.
        """
        if copy:
            return [copy_to_cpu(average.weights, full_tensor) for average in self.averages]
        for average in self.averages:
            for weight in average.weights.values():
                full_tensor(weight)
        return []

    def progress(self) -> dict[str, Any]:
        """Return the part of the state that is saved as JSON."""
        progress = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return progress if self.base is None else {**progress, "base": self.base}

    def write_shards(self, folder: Path, local_shards: Mapping[str, Weights]) -> None:
        """Write the shards of this process; without FSDP one process writes for all."""
        suffix = f"-{self.process + 1:05d}-of-{self.processes:05d}" if self.sharded else ""
        for stem, tensors in local_shards.items():
            save_tensors(tensors, folder / f"{stem}{suffix}.safetensors")

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Load the state of a checkpoint; return its progress."""
        folder = checkpoint / "state"
        if len(self.averages) > 1 and not any(folder.glob("narrow_ema*")):
            raise UserError("train.snapshots: this run has stored no second average so far; expected 0")
        damaged = f"resume: {folder} is damaged or belongs to a different network"
        library_errors = (SafetensorError, RuntimeError, LookupError, ValueError, TypeError)
        hint = f"; delete {checkpoint} to resume from the checkpoint before"
        unread = user_errors(f"resume: {folder} cannot be read", OSError)
        with unread, user_errors(damaged, *library_errors, hint=hint):
            progress = read_progress(checkpoint)
            if progress.get("base") != self.base:
                raise UserError("resume: the weights of init_from or train.lora_rank have changed; expected no change")
            _load_weights(read_shards(folder, "unet"), self.parameters)
            average = UNet.from_pretrained(checkpoint / "unet").state_dict() if not self.base else load_lora(checkpoint)
            _load_weights({name: [weight] for name, weight in average.items()}, self.averages[0].weights)
            if len(self.averages) > 1:
                _load_weights(read_shards(folder, "narrow_ema"), self.averages[1].weights)
            load_moments(self.optimizer, read_shards(folder, "optimizer"), self.parameters)
            if self.scaler is not None and "scaler" in progress:
                self.scaler.load_state_dict(progress["scaler"])
        return progress


def moments_of(optimizer: Any) -> Weights:
    """Return the tensors of an optimizer's state, named by the number of the parameter and the name of the moment."""
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_moments(optimizer: Any, shards: Mapping[str, list[Tensor]], parameters: Weights) -> None:
    """Load the state of an optimizer of `parameters` from the shards of its tensors."""
    like = list(parameters.values())
    state: dict[int, dict[str, Tensor]] = {}
    for key, parts in shards.items():
        number, name = key.split(".", 1)
        moment = _join(parts)
        if moment.ndim:
            moment = _shard_like(moment, like[int(number)])
        state.setdefault(int(number), {})[name] = moment
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_shards(folder: Path, stem: str) -> dict[str, list[Tensor]]:
    """Return the shards of each tensor, ordered by process."""
    files = [folder / f"{stem}.safetensors"]
    if not files[0].exists():
        files = sorted(folder.glob(f"{stem}-*-of-*.safetensors")) or files
    shards: dict[str, list[Tensor]] = {}
    for file in files:
        for name, tensor in load_tensors(file).items():
            shards.setdefault(name, []).append(tensor)
    return shards


@torch.no_grad()
def _load_weights(shards: Mapping[str, list[Tensor]], weights: Weights) -> None:
    if shards.keys() != weights.keys():
        raise KeyError(f"weights that differ: {', '.join(sorted(shards.keys() ^ weights.keys())[:3])}")
    for name, parts in shards.items():
        weights[name].copy_(_shard_like(_join(parts), weights[name]))


def _join(shards: list[Tensor]) -> Tensor:
    """Return the full tensor: FSDP shards along the first dimension, and replicates scalars."""
    return torch.cat(shards) if shards[0].ndim else shards[0]


def _shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    # Every process has the full tensor and keeps its shard: no communication is needed (src_data_rank=None).
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; return other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor; return other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_to_cpu(tensors: Weights, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return converted copies on the CPU, which training does not modify while they are written."""
    return {name: convert(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


class Saver:
    """Context manager that writes checkpoints and snapshots of a run in a background thread, one after the other."""

    def __init__(self, config: Config, pipe: TextToImage, state: TrainingState, accelerator: Accelerator) -> None:
        self.run_dir = Path(config.run_dir)
        self.config = config
        self.pipe = pipe
        self.state = state
        self.is_main = accelerator.is_main_process
        # Background threads must not use the process group of training.
        self.group = torch.distributed.new_group(backend="gloo") if state.sharded else None
        self.executor = ThreadPoolExecutor(1, "saving")
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self.executor.shutdown()

    def save(self, step: int, progress: dict[str, Any] | None, *, snapshot: bool) -> None:
        """Copy the state and start writing it: a checkpoint with the progress, if there is any, and a snapshot of the
        averages if asked for. All processes must call this together."""
        if not (self.is_main or self.state.sharded):
            return
        local_shards = {} if progress is None else self.state.local_shards()
        averages = self.state.full_averages(copy=self.is_main)
        self.finish()
        self.pending = self.executor.submit(self._write, step, progress, local_shards, averages, snapshot)

    def finish(self, *, required: bool = False) -> None:
        """Wait for pending writes. Errors, such as a full disk, are logged, or raised if the write is `required`."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except UserError as error:
            if required:
                raise
            logger.warning("%s", error)

    def _write(
        self, step: int, progress: dict[str, Any] | None, shards: LocalShards, averages: list[Weights], snapshot: bool
    ) -> None:
        if snapshot and self.is_main:
            widths = [average.width for average in self.state.averages]
            try:
                save_snapshot(self.run_dir, step, list(zip(widths, averages, strict=True)))
            except UserError as error:  # a missing snapshot only reduces the choice of --ema-width
                logger.warning("%s", error)
        if progress is None:
            return
        state_folder = self.run_dir / "checkpoints" / f".step-{step:08d}.state"
        problem = self._write_shards(state_folder, shards)
        if not self.is_main:
            return

        def write(folder: Path) -> None:
            if problem:
                raise OSError(problem)
            unet = UNet.with_weights(self.pipe.unet.config, self.state.merge_lora(averages[0]))
            if self.state.base is not None:
                save_lora(averages[0], folder)
            pipe = copy(self.pipe)
            pipe.unet = unet
            pipe.save_pretrained(folder)
            save_config(self.config, folder / "config.yaml")
            state_folder.rename(folder / "state")
            write_json(folder / "state" / PROGRESS_NAME, progress)

        try:
            save_checkpoint(self.run_dir, step, write, keep=self.config.train.keep_checkpoints)
        finally:
            shutil.rmtree(state_folder, ignore_errors=True)

    def _write_shards(self, folder: Path, shards: LocalShards) -> str | None:
        """Write the shards of this process and wait for the others; return the error of any process."""
        problem = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.state.write_shards(folder, shards)
        except (OSError, SafetensorError) as error:
            problem = first_line(error)
        if self.group is not None:
            failed = torch.tensor([problem is not None], dtype=torch.int32)
            torch.distributed.all_reduce(failed, group=self.group)
            if failed.item() and problem is None:
                problem = "another process could not write its shard"
        return problem
