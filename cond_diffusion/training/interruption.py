"""Ctrl-C and SIGTERM: finish the step, save, and leave with a line that says how to go on."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from cond_diffusion.errors import Interrupted


class Interruption:
    """While its context is open a first signal is only noted; Ctrl-C after it leaves without saving."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None

    def __enter__(self) -> "Interruption":
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Of SIGTERM there may be two: a cluster sends it to every process, and torchrun hands on its own.
        if self.signal is not None and number == signal.SIGINT:
            raise Interrupted("interrupted again: left without saving", number)
        self.signal = self.signal or number

    def noted(self) -> bool:
        """Say whether any process has been signalled; all must ask together."""
        if self.accelerator.num_processes == 1:
            return self.signal is not None
        # They must all leave at the same step.
        mine = torch.tensor([0 if self.signal is None else self.signal], device=self.accelerator.device)
        noted = int(self.accelerator.gather(mine).max())  # type: ignore[union-attr]
        self.signal = self.signal or noted or None
        return self.signal is not None

    def leave(self, done: int, saved: Path | None) -> None:
        """Raise what ends the command.

        saved: the newest checkpoint.
        """
        assert self.signal is not None
        is_here = saved is not None and int(saved.name.removeprefix("step-")) == done
        where = "which is saved" if is_here else f"which is not saved; the newest checkpoint is {saved and saved.name}"
        raise Interrupted(
            f"interrupted at step {done}, {where}; the same command with resume=true goes on from there", self.signal
        )
