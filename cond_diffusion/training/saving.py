"""Saving without holding up training: the weights are copied, and a thread writes the copies."""

import json
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from safetensors import SafetensorError

from cond_diffusion.config.run import Config, save_config
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.models.ema import Weights
from cond_diffusion.models.lora import save_lora
from cond_diffusion.models.posthoc_ema import save_snapshot
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.run_folder import PROGRESS_NAME, save_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage
from cond_diffusion.training.state import TrainingState

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
        pieces = {} if progress is None else self.state.pieces()
        averages = self.state.whole_averages(copy=self.is_main)
        self.finish()
        self.writing = self.thread.submit(self._write, step, progress, pieces, averages, snapshot)

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
        self, step: int, progress: dict[str, Any] | None, pieces: Pieces, averages: list[Weights], snapshot: bool
    ) -> None:
        if snapshot and self.is_main:
            try:
                widths = [average.width for average in self.state.averages]
                save_snapshot(self.run_dir, step, list(zip(widths, averages, strict=True)))
            except UserError as error:  # a run without it is poorer by a choice of widths, and no more
                logger.warning("%s", error)
        if progress is not None:
            self._write_checkpoint(progress, pieces, averages)

    def _write_checkpoint(self, progress: dict[str, Any], pieces: Pieces, averages: list[Weights]) -> None:
        step = progress["step"]
        aside = self.run_dir / "checkpoints" / f".step-{step:08d}.pieces"
        problem = self._write_pieces(aside, pieces)
        if not self.is_main:
            return

        def write(folder: Path) -> None:
            if problem:
                raise OSError(problem)
            unet = UNet.with_weights(self.pipe.unet.config, self.state.plain(averages[0]))
            if self.state.base is not None:
                save_lora(averages[0], folder)
            pipe = TextToImage(unet, self.pipe.text_encoder, self.pipe.prediction, self.pipe.space)
            pipe.save_pretrained(folder)
            save_config(self.config, folder / "config.yaml")
            aside.rename(folder / "state")
            (folder / "state" / PROGRESS_NAME).write_text(json.dumps(progress, indent=2) + "\n")

        try:
            save_checkpoint(self.run_dir, step, write, keep=self.config.train.keep_checkpoints)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write_pieces(self, folder: Path, pieces: Pieces) -> str | None:
        """Write this process's pieces and wait for those of the others; say what went wrong with any of them."""
        problem = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.state.write_pieces(folder, pieces)
        except (OSError, SafetensorError) as error:
            problem = first_line(error)
        if self.group is not None:
            failed = torch.tensor([problem is not None], dtype=torch.int32)
            torch.distributed.all_reduce(failed, group=self.group)
            if failed.item() and problem is None:
                problem = "another process could not write its part"
        return problem
