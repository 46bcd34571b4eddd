"""What a step changes - the weights, the optimizer's moments, the averages of the weights - to files and back.

Under FSDP each process holds a piece of every tensor: a tensor is *whole* when the pieces have been gathered. Training
state is written in pieces, one file a process, and read back by any number of processes; the averaged weights that are
drawn from are written whole.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from cond_diffusion.config.run import Config, TrainConfig, save_config
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.models.ema import EMA, Weights, save_snapshot
from cond_diffusion.models.lora import digest_of_base, has_lora, load_lora, merged, save_lora
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.run_folder import PROGRESS_NAME, save_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage


class TrainingState:
    """The network, its optimizer, and its averages: the one that is sampled from, and one of half its width where the
    run stores snapshots.

    unet, optimizer: after Accelerate has placed or sharded them.
    """

    def __init__(self, unet: UNet, optimizer: Any, config: TrainConfig, accelerator: Accelerator) -> None:
        self.unet = unet
        self.base = digest_of_base(unet) if has_lora(unet) else None
        self.optimizer = optimizer
        self.scaler = accelerator.scaler  # of the loss, with fp16 alone
        named = unet.named_parameters()
        self.parameters: Weights = {name: parameter for name, parameter in named if parameter.requires_grad}
        widths = [config.ema_width, config.ema_width / 2] if config.snapshots else [config.ema_width]
        self.averages = [EMA(self.parameters, width) for width in widths]
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters.values())
        self.process, self.processes = accelerator.process_index, accelerator.num_processes

    def update_averages(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        for average in self.averages:
            average.update(self.parameters, step)

    def is_finite(self) -> bool:
        """Say whether the weights and both averages are finite, as far as this process holds them."""
        parts = (self.parameters, *(average.weights for average in self.averages))
        return all(bool(local_shard(weight.detach()).isfinite().all()) for part in parts for weight in part.values())

    @contextmanager
    def ema_weights(self, pipe: TextToImage) -> Iterator[None]:
        """Have a pipeline draw from the average; under FSDP all processes must ask, and each has a copy meanwhile."""
        before = pipe.unet
        pipe.unet = self.averaged_unet()
        try:
            yield
        finally:
            pipe.unet = before

    def averaged_unet(self) -> UNet:
        """Return the network whose weights are the average; under FSDP a copy, for which all processes must ask."""
        average = {name: full_tensor(weight) for name, weight in self.averages[0].weights.items()}
        return UNet.with_weights(self.unet.config, self.merge_lora(average))

    def merge_lora(self, weights: Weights) -> Weights:
        """Return the weights of a plain network out of those that are trained."""
        return weights if self.base is None else merged(self.unet, weights)

    def local_shards(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of what this process holds, on the CPU, by the files' stems; without the average that is
        written whole.
        """
        moments = {
            f"{number}.{name}": torch.as_tensor(value)
            for number, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        parts = {
            "unet": self.parameters,
            "optimizer": moments,
            **({"narrow_ema": self.averages[1].weights} if len(self.averages) > 1 else {}),
        }
        return {stem: copy_to_cpu(tensors, local_shard) for stem, tensors in parts.items()}

    def whole_averages(self, *, copy: bool) -> list[Weights]:
        """Return copies of the averages, on the CPU; under FSDP all processes must ask together, and those that say
        that they need no copy get none.
        """
        if copy:
            return [copy_to_cpu(average.weights, full_tensor) for average in self.averages]
        for average in self.averages:
            for weight in average.weights.values():
                full_tensor(weight)
        return []

    def progress(self) -> dict[str, Any]:
        """Return what is no tensor."""
        found = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return found if self.base is None else {**found, "base": self.base}

    def write_pieces(self, folder: Path, local_shards: Mapping[str, Weights]) -> None:
        """Write the pieces of this process; of processes that all hold the same only the first need do so."""
        name = f"-{self.process + 1:05d}-of-{self.processes:05d}" if self.sharded else ""
        for stem, tensors in local_shards.items():
            save_file(dict(tensors), folder / f"{stem}{name}.safetensors")

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Put back what a checkpoint holds, and return its progress.

        Raises UserError if it is not whole or does not fit.
        """
        folder = checkpoint / "state"
        has_narrow = any(folder.glob("narrow_ema*"))
        if len(self.averages) > 1 and not has_narrow:
            raise UserError("train.snapshots: this run has kept no second average until now; expected 0")
        try:
            progress = json.loads((folder / PROGRESS_NAME).read_text())
            if progress.get("base") != self.base:
                raise UserError(
                    "resume: init_from is not what it was when this run began, or train.lora_rank has come or gone; "
                    "keep both"
                )
            _put(_read(folder, "unet"), self.parameters)
            whole = UNet.from_pretrained(checkpoint / "unet").state_dict() if not self.base else load_lora(checkpoint)
            _put({name: [weight] for name, weight in whole.items()}, self.averages[0].weights)
            if len(self.averages) > 1:
                _put(_read(folder, "narrow_ema"), self.averages[1].weights)
            self._load_moments(_read(folder, "optimizer"))
            if self.scaler is not None and "scaler" in progress:
                self.scaler.load_state_dict(progress["scaler"])
            return progress
        except UserError:
            raise
        except (OSError, SafetensorError, json.JSONDecodeError, RuntimeError, KeyError) as error:
            raise UserError(
                f"resume: {folder} is damaged, was cut short or belongs to another network ({first_line(error)}); "
                f"delete {checkpoint} to go on from the checkpoint before it"
            ) from error

    def _load_moments(self, local_shards: Mapping[str, list[Tensor]]) -> None:
        parameters = list(self.parameters.values())
        state: dict[int, dict[str, Tensor]] = {}
        for key, parts in local_shards.items():
            number, name = key.split(".", 1)
            like = parameters[int(number)]
            joined = _joined(parts)
            state.setdefault(int(number), {})[name] = _sharded_like(joined, like) if joined.ndim else joined
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _read(folder: Path, stem: str) -> dict[str, list[Tensor]]:
    """Return the pieces of each tensor, in order."""
    files = [folder / f"{stem}.safetensors"]
    if not files[0].exists():
        files = sorted(folder.glob(f"{stem}-*-of-*.safetensors")) or files
    local_shards: dict[str, list[Tensor]] = {}
    for file in files:
        for name, piece in load_file(file).items():
            local_shards.setdefault(name, []).append(piece)
    return local_shards


@torch.no_grad()
def _put(local_shards: Mapping[str, list[Tensor]], into: Weights) -> None:
    if local_shards.keys() != into.keys():
        raise KeyError(f"its weights are others: {', '.join(sorted(local_shards.keys() ^ into.keys())[:3])}")
    for name, parts in local_shards.items():
        into[name].copy_(_sharded_like(_joined(parts), into[name]))


def _joined(local_shards: list[Tensor]) -> Tensor:
    """Undo the sharding: FSDP cuts along the first dimension, and has every process keep the same scalars."""
    return torch.cat(local_shards) if local_shards[0].ndim else local_shards[0]


def _sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    # Every process has the whole tensor and keeps its piece: nothing has to be sent (src_data_rank=None).
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_to_cpu(tensors: Weights, take: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU, so that training may go on while they are written."""
    return {name: take(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


logger = logging.getLogger(__name__)

Pieces = dict[str, dict[str, torch.Tensor]]


class Saver:
    """Writes checkpoints and snapshots of a run, one after the other, in the background."""

    def __init__(
        self, run_dir: Path, config: Config, pipe: TextToImage, state: TrainingState, accelerator: Accelerator
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.pipe = pipe
        self.state = state
        self.is_main = accelerator.is_main_process
        # The threads of several processes must speak to each other beside what training exchanges.
        self.group = torch.distributed.new_group(backend="gloo") if state.sharded else None
        self.thread = ThreadPoolExecutor(1, "saving")
        self.writing: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self.thread.shutdown()

    def save(self, step: int, progress: dict[str, Any] | None, *, snapshot: bool) -> None:
        """Begin to write what is due after `step`: a checkpoint with this progress, a snapshot of both averages. All
        processes must call this together.
        """
        if (progress is None and not snapshot) or not (self.is_main or self.state.sharded):
            return
        local_shards = {} if progress is None else self.state.local_shards()
        averages = self.state.whole_averages(copy=self.is_main)
        self.finish()
        self.writing = self.thread.submit(self._write, step, progress, local_shards, averages, snapshot)

    def finish(self, *, must: bool = False) -> None:
        """Wait until what was begun is written. A full disk costs that and no more, unless it `must` be written."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.result()
        except UserError as error:
            if must:
                raise
            logger.warning("%s", error)

    def _write(
        self, step: int, progress: dict[str, Any] | None, local_shards: Pieces, averages: list[Weights], snapshot: bool
    ) -> None:
        if snapshot and self.is_main:
            try:
                widths = [average.width for average in self.state.averages]
                save_snapshot(self.run_dir, step, list(zip(widths, averages, strict=True)))
            except UserError as error:  # a run without it is poorer by a choice of widths, and no more
                logger.warning("%s", error)
        if progress is not None:
            self._write_checkpoint(progress, local_shards, averages)

    def _write_checkpoint(self, progress: dict[str, Any], local_shards: Pieces, averages: list[Weights]) -> None:
        step = progress["step"]
        aside = self.run_dir / "checkpoints" / f".step-{step:08d}.pieces"
        problem = self._write_pieces(aside, local_shards)
        if not self.is_main:
            return

        def write(folder: Path) -> None:
            if problem:
                raise OSError(problem)
            unet = UNet.with_weights(self.pipe.unet.config, self.state.merge_lora(averages[0]))
            if self.state.base is not None:
                save_lora(averages[0], folder)
            pipe = TextToImage(unet, self.pipe.text_encoder, self.pipe.prediction, self.pipe.latent_space)
            pipe.save_pretrained(folder)
            save_config(self.config, folder / "config.yaml")
            aside.rename(folder / "state")
            (folder / "state" / PROGRESS_NAME).write_text(json.dumps(progress, indent=2) + "\n")

        try:
            save_checkpoint(self.run_dir, step, write, keep=self.config.train.keep_checkpoints)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write_pieces(self, folder: Path, local_shards: Pieces) -> str | None:
        """Write this process's pieces and wait for those of the others; say what went wrong with any of them."""
        problem = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.state.write_pieces(folder, local_shards)
        except (OSError, SafetensorError) as error:
            problem = first_line(error)
        if self.group is not None:
            failed = torch.tensor([problem is not None], dtype=torch.int32)
            torch.distributed.all_reduce(failed, group=self.group)
            if failed.item() and problem is None:
                problem = "another process could not write its part"
        return problem
