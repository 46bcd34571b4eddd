"""Runs that are killed, interrupted, or resumed on another number of processes equal an uninterrupted run."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import colours
import numpy as np
import pytest
import torch
from conftest import PROCESSES, ROOT, metrics, run_in_processes, weights
from PIL import Image
from safetensors.torch import load_file

from cond_diffusion.cli import main
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.errors import Interrupted
from cond_diffusion.pipeline import run_folder
from cond_diffusion.pipeline.run_folder import checkpoints
from cond_diffusion.training import validation
from cond_diffusion.training.reporting import Reporter
from cond_diffusion.training.trainer import train

KILLED_AT = (3, None, 9, None, 14)  # steps; None: while a checkpoint is written


def run_process(target: Callable[..., Any], *arguments: Any) -> int | None:
    """Call `target` in a process of its own; return its exit code."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def train_quickly(process: int, config: Config) -> None:
    """Train in this process, one of several, with short validations."""
    torch.set_num_threads(1)
    validation.NUM_EXAMPLES = 64
    train(config)


def train_in_process(config: Config) -> None:
    assert run_process(train_quickly, 0, config) == 0


def at_step(step: int, action: Callable[[], None]) -> None:
    """Have this process perform an action when training has logged a step."""
    log = Reporter.log

    def log_and_act(self: Reporter, global_step: int, *values: Any) -> None:
        log(self, global_step, *values)
        if global_step == step:
            action()

    Reporter.log = log_and_act


def kill_this_process(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(config: Config, step: int | None) -> None:
    """Train until a step, or, for None, until a checkpoint is written but not yet renamed."""
    if step is None:
        run_folder.flush = kill_this_process
    else:
        at_step(step, kill_this_process)
    train_quickly(0, config)


def train_and_signal(arguments: list[str], step: int, numbers: list[int], errors: Path) -> None:
    """Run the command, and send signals to this process at a step."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    at_step(step, send)
    with errors.open("w", encoding="utf-8") as sys.stderr:
        code = main.run("train", arguments)
    sys.exit(code)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_killed_run_equals_uninterrupted_run(bars_config: Config, tmp_path: Path, streaming: bool):
    """Bit for bit, with gradient accumulation and several epochs."""
    changes = {
        "max_steps": 16,
        "evaluate_every": 8,
        "checkpoint_every": 4,
        "keep_checkpoints": 2,
        "gradient_accumulation_steps": 2,
    }
    config = replace(bars_config, train=replace(bars_config.train, **changes, batch_size=6, snapshots=4))
    if streaming:
        colours.write(tmp_path / "set", "tar", 60)
        overrides = [f"data.source={tmp_path / 'set'}", "data.streaming=true", *colours.TAR_COLUMNS]
        data = load_config(Config, overrides=[*overrides, "data.shuffle_buffer=16", "data.resolution=8"]).data
        config = replace(config, data=data)
    train_in_process(replace(config, run_dir=str(tmp_path / "uninterrupted")))
    config = replace(config, run_dir=str(tmp_path / "killed"), resume=True)
    folder = tmp_path / "killed"
    for step in KILLED_AT:
        assert run_process(train_and_die, config, step) == -signal.SIGKILL
    train_in_process(config)
    runs = ("uninterrupted", "killed")
    expected, actual = (weights(checkpoints(tmp_path / run)[-1]) for run in runs)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, 17))
    held_out = [[line for line in metrics(tmp_path / run) if "held_out_loss" in line] for run in runs]
    assert held_out[0] == held_out[1]
    assert not list(folder.glob("checkpoints/.*"))
    snapshots = [{file.name: load_file(file) for file in (tmp_path / run / "snapshots").iterdir()} for run in runs]
    assert snapshots[0].keys() == snapshots[1].keys()
    for name, values in snapshots[0].items():
        assert all(torch.equal(value, snapshots[1][name][key]) for key, value in values.items())


@pytest.mark.slow
def test_signals_save_a_checkpoint_and_exit_with_their_code(bars_overrides: list[str], tmp_path: Path):
    overrides = [*bars_overrides, "train.max_steps=12", "train.checkpoint_every=0"]
    assert main.run("train", [*overrides, f"run_dir={tmp_path / 'uninterrupted'}"]) == 0
    resume = [*overrides, "resume=true", f"run_dir={tmp_path / 'interrupted'}"]
    for step, numbers, saved in (
        (4, [signal.SIGTERM] * 2, 4),  # a cluster and torchrun may both send it
        (6, [signal.SIGINT] * 2, 4),
        (8, [signal.SIGINT], 8),
    ):
        errors = tmp_path / f"errors-{step}"
        assert run_process(train_and_signal, resume, step, numbers, errors) == 128 + numbers[0]
        assert checkpoints(tmp_path / "interrupted")[-1].name == f"step-{saved:08d}"
        message = errors.read_text(encoding="utf-8").splitlines()[-1]
        if saved == step:
            assert message.startswith(f"interrupted at step {step} (saved as step-{step:08d})")
            assert "resume=true" in message
        else:
            assert message == "interrupted twice: stopped without saving"
    assert main.run("train", resume) == 0
    expected, actual = (weights(checkpoints(tmp_path / name)[-1]) for name in ("uninterrupted", "interrupted"))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def train_until_the_second_process_is_signaled(process: int, config: Config) -> None:
    if process == 1:
        at_step(3, partial(os.kill, os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="saved as step-00000003"):
        train_quickly(process, config)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(bars_overrides: list[str], tmp_path: Path):
    options = [*bars_overrides, "train.max_steps=6", "train.batch_size=8", "train.evaluate_every=0"]
    config, whole = (
        load_config(Config, ROOT / "configs" / "mnist.yaml", [*options, f"run_dir={tmp_path / name}"])
        for name in ("signaled", "whole")
    )
    run_in_processes(2, train_until_the_second_process_is_signaled, config)
    run_in_processes(2, train_quickly, replace(config, resume=True))
    run_in_processes(2, train_quickly, whole)
    newest = [weights(checkpoints(tmp_path / name)[-1]) for name in ("signaled", "whole")]
    assert all(torch.equal(value, newest[1][name]) for name, value in newest[0].items())


@pytest.mark.slow
def test_processes_accumulation_and_batch_size_change_only_rounding(bars_overrides: list[str], tmp_path: Path):
    """1 process, 2 processes, and a run that is resumed with other processes, batch sizes and accumulation."""
    overrides = [
        *bars_overrides,
        *("train.max_steps=10", "train.sample_every=10", "train.evaluate_every=5", "train.checkpoint_every=0"),
        *("train.learning_rate_schedule=constant", "sample.prompts=[a bar that is level,upright,level]"),
    ]

    def run(name: str, processes: int, batch_size: int, accumulation_steps: int, *more: str) -> None:
        sizes = [f"train.batch_size={batch_size}", f"train.gradient_accumulation_steps={accumulation_steps}"]
        arguments = [*overrides, *sizes, *more, f"run_dir={tmp_path / name}"]
        config = load_config(Config, ROOT / "configs" / "mnist.yaml", arguments)
        if processes == 1:
            train_in_process(config)
        else:
            run_in_processes(processes, train_quickly, config)

    run("one", 1, 16, 1)
    run("two", 2, 8, 1)
    tars = colours.write(tmp_path / "set", "tar", 60)
    stream = [*tars, "data.streaming=true", "data.resolution=8", "data.caption_templates=[]"]
    run("stream, one process", 1, 16, 1, *stream, "data.channels=3")
    run("stream, two processes", 2, 8, 1, *stream, "data.channels=3")
    run("changing", 2, 8, 1, "train.max_steps=4")
    run("changing", 1, 16, 1, "train.max_steps=7", "resume=true")
    run("changing", 1, 4, 4, "resume=true")
    for pair in (("two", "one"), ("changing", "one"), ("stream, two processes", "stream, one process")):
        logs = [metrics(tmp_path / run) for run in pair]
        for name in ("loss", "held_out_loss", "held_out_loss_bucket_0", "held_out_loss_other_caption"):
            values = [[line[name] for line in log if name in line] for log in logs]
            assert len(values[0]) >= 2
            np.testing.assert_allclose(*values, atol=1e-5)
        tensors = [weights(checkpoints(tmp_path / run)[-1]) for run in pair]
        for name in tensors[0]:
            values = [each[name].sqrt() if name.endswith("exp_avg_sq") else each[name] for each in tensors]
            atol = 1e-6 if "optimizer" in name else 1e-4  # of moments, of weights
            torch.testing.assert_close(*values, rtol=0, atol=atol, msg=f"{pair[0]} {name}")
        grids = [np.asarray(Image.open(tmp_path / run / "samples" / "step-00000010.png")) for run in pair]
        assert grids[0].shape[:2] == (4 * (8 + 2) - 2, 3 * (8 + 2) - 2)
        assert np.abs(grids[0].astype(int) - grids[1]).max() <= 1
