"""Commands: argument parsing and output. Processes start here: Ctrl-C is handled while libraries are imported."""

import os
import signal
from functools import partial
from traceback import walk_stack
from types import FrameType


class InterruptHandler:
    """Handler of SIGINT: raises KeyboardInterrupt once while a command runs, and ends the process otherwise.

    It also ends the process during an import, which libraries do not expect to be interrupted, and at a second Ctrl-C:
    Python prints exceptions that are raised while it exits.
    """

    running = False
    """Whether a command runs, which handles KeyboardInterrupt."""
    line = b"interrupted\n"
    """What is printed when the process is ended."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        files = {caller.f_code.co_filename for caller, _ in walk_stack(frame)}
        if self.running and "<frozen importlib._bootstrap>" not in files:
            self.running = False
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":
            os.write(2, self.line)
        os._exit(128 + number)


interrupt_handler = InterruptHandler()


def start(command: str | None = None) -> int:
    """Run the process: the command of this name, or the one that the arguments name. Returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a background job
        signal.signal(signal.SIGINT, interrupt_handler)
    from cond_diffusion.cli.main import main, run

    return main() if command is None else run(command)


# Entry points of `cond-diffusion-sample` and `cond-diffusion-train`.
start_sample, start_train = partial(start, "sample"), partial(start, "train")
