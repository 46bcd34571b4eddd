"""What a step changes - the weights, the optimizer's moments, the averages of the weights - to files and back.

Under FSDP each process holds a piece of every tensor: a tensor is *whole* when the pieces have been gathered. Training
state is written in pieces, one file a process, and read back by any number of processes; the averaged weights that are
drawn from are written whole.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from cond_diffusion.config.train import TrainConfig
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.models.ema import EMA, Weights
from cond_diffusion.models.lora import digest_of_base, has_lora, load_lora, merged
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.run_folder import PROGRESS_NAME
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
        return all(bool(_piece(weight.detach()).isfinite().all()) for part in parts for weight in part.values())

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
        average = {name: _whole(weight) for name, weight in self.averages[0].weights.items()}
        return UNet.with_weights(self.unet.config, self.plain(average))

    def plain(self, weights: Weights) -> Weights:
        """Return the weights of a plain network out of those that are trained."""
        return weights if self.base is None else merged(self.unet, weights)

    def pieces(self) -> dict[str, dict[str, Tensor]]:
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
        return {stem: _copied(tensors, _piece) for stem, tensors in parts.items()}

    def whole_averages(self, *, copy: bool) -> list[Weights]:
        """Return copies of the averages, on the CPU; under FSDP all processes must ask together, and those that say
        that they need no copy get none.
        """
        if copy:
            return [_copied(average.weights, _whole) for average in self.averages]
        for average in self.averages:
            for weight in average.weights.values():
                _whole(weight)
        return []

    def progress(self) -> dict[str, Any]:
        """Return what is no tensor."""
        found = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return found if self.base is None else {**found, "base": self.base}

    def write_pieces(self, folder: Path, pieces: Mapping[str, Weights]) -> None:
        """Write the pieces of this process; of processes that all hold the same only the first need do so."""
        name = f"-{self.process + 1:05d}-of-{self.processes:05d}" if self.sharded else ""
        for stem, tensors in pieces.items():
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

    def _load_moments(self, pieces: Mapping[str, list[Tensor]]) -> None:
        parameters = list(self.parameters.values())
        state: dict[int, dict[str, Tensor]] = {}
        for key, parts in pieces.items():
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
    pieces: dict[str, list[Tensor]] = {}
    for file in files:
        for name, piece in load_file(file).items():
            pieces.setdefault(name, []).append(piece)
    return pieces


@torch.no_grad()
def _put(pieces: Mapping[str, list[Tensor]], into: Weights) -> None:
    if pieces.keys() != into.keys():
        raise KeyError(f"its weights are others: {', '.join(sorted(pieces.keys() ^ into.keys())[:3])}")
    for name, parts in pieces.items():
        into[name].copy_(_sharded_like(_joined(parts), into[name]))


def _joined(pieces: list[Tensor]) -> Tensor:
    """Undo the sharding: FSDP cuts along the first dimension, and has every process keep the same scalars."""
    return torch.cat(pieces) if pieces[0].ndim else pieces[0]


def _sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    # Every process has the whole tensor and keeps its piece: nothing has to be sent (src_data_rank=None).
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _piece(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copied(tensors: Weights, take: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU, so that training may go on while they are written."""
    return {name: take(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
