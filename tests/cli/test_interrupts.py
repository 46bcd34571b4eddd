"""Ctrl-C at any time gives one line and exit code 130."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT

# Sends SIGINT to its process, twice, as a module that takes long to import would receive it.
INTERRUPTED = "import os, signal\nfor _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n"

# Sends SIGINT while a command runs, while the exception propagates, and while Python exits.
COMMAND = """
import atexit, os, signal, sys, types
from cond_diffusion.cli import start

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)

def command(arguments):
    try:
        interrupt()
    finally:
        if {twice}:
            interrupt()

atexit.register(interrupt)
sys.modules["cond_diffusion.cli.commands"] = types.SimpleNamespace(sample=command)
sys.exit(start("sample"))
"""


def assert_interrupted(command: list[str], path: Path) -> None:
    environment = {"PYTHONPATH": f"{path}:{ROOT}", "PATH": ""}
    result = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit SIG_IGN
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["pydantic", "yaml", "torch", "accelerate", "tqdm"])
def test_interrupt_during_an_import(module: str, tmp_path: Path):
    (tmp_path / f"{module}.py").write_text(INTERRUPTED, encoding="utf-8")
    commands = {"torch": [str(ROOT / "sample.py"), "seven"], "accelerate": [str(ROOT / "train.py")]}
    assert_interrupted(commands.get(module, [str(ROOT / "sample.py")]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_interrupt_of_a_command_and_while_python_exits(twice: bool, tmp_path: Path):
    assert_interrupted(["-c", COMMAND.format(twice=twice)], tmp_path)
