"""Runs that are killed, interrupted, or go on with another number of processes, equal one that was left alone."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import colours
import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, weights
from PIL import Image
from safetensors.torch import load_file

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.pipeline.run_folder import checkpoints
from cond_diffusion.training.trainer import train

# A server that has imported everything, and of which each run is a copy: what is killed is a process of its own, but it
# is there in a moment.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cond_diffusion.training.trainer"])
KILLS = 10  # of each of two runs


def launch(arguments: list[str], processes: int = 1) -> subprocess.Popen[str]:
    program = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *program, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    bars_config: Config, tmp_path: Path, streaming: bool
):
    """Bit for bit, with accumulation, in later epochs, and every third time while a checkpoint is being written."""
    changes = {
        "max_steps": 80,
        "evaluate_every": 40,
        "checkpoint_every": 5,
        "keep_checkpoints": 2,
        "gradient_accumulation_steps": 2,
    }
    config = replace(bars_config, train=replace(bars_config.train, **changes, batch_size=6, snapshots=4))
    if streaming:
        colours.write(tmp_path / "set", "tar", 60)
        words = [f"data.source={tmp_path / 'set'}", "data.streaming=true", *colours.TAR_COLUMNS]
        data = load_config(Config, overrides=[*words, "data.shuffle_buffer=16", "data.resolution=8"]).data
        config = replace(config, data=data)
    straight = PROCESSES.Process(target=train, args=(replace(config, run_dir=str(tmp_path / "straight")),))
    straight.start()
    straight.join()
    assert straight.exitcode == 0
    config = replace(config, run_dir=str(tmp_path / "killed"), resume=True)
    folder, chance, kills = tmp_path / "killed", random.Random(0), 0
    while kills < KILLS:
        before = _lines(folder)
        process = PROCESSES.Process(target=train, args=(config,))
        process.start()
        after_lines, wait = before + chance.randint(1, 6), chance.uniform(0, 0.1)
        while process.is_alive() and _lines(folder) < after_lines:
            time.sleep(0.002)
        if kills % 3 == 0:  # a checkpoint that is half written has a hidden name
            while process.is_alive() and not list(folder.glob("checkpoints/.step-*")):
                time.sleep(0.001)
        else:
            time.sleep(wait)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed often enough"
        kills += 1
    last = PROCESSES.Process(target=train, args=(config,))
    last.start()
    last.join()
    assert last.exitcode == 0
    expected, found = (weights(checkpoints(tmp_path / name)[-1]) for name in ("straight", "killed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, 81))
    held_out = [[line for line in metrics(tmp_path / run) if "held_out_loss" in line] for run in ("straight", "killed")]
    assert held_out[0] == held_out[1]
    assert not list(folder.glob("checkpoints/.*"))
    snapshots = [
        {file.name: load_file(file) for file in (tmp_path / run / "snapshots").iterdir()}
        for run in ("straight", "killed")
    ]
    assert snapshots[0].keys() == snapshots[1].keys()
    for name, values in snapshots[0].items():
        assert all(torch.equal(value, snapshots[1][name][key]) for key, value in values.items())


def _lines(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_signals_save_and_leave_with_a_line(bars_overrides: list[str], tmp_path: Path):
    words = [*bars_overrides, "train.max_steps=60", "train.checkpoint_every=0"]
    finish(launch([*words, f"run_dir={tmp_path / 'straight'}"]))
    left_words = [*words, "resume=true", f"run_dir={tmp_path / 'left'}"]
    for leave_after, number in ((14, signal.SIGTERM), (35, signal.SIGINT)):
        process = launch(left_words)
        while process.poll() is None and _lines(tmp_path / "left") < leave_after:
            time.sleep(0.01)
        process.send_signal(number)
        if number == signal.SIGTERM:  # as where a cluster and torchrun both send it
            process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == 128 + number
        step = int(checkpoints(tmp_path / "left")[-1].name.removeprefix("step-"))
        assert step >= leave_after
        assert errors.splitlines()[-1] == (
            f"interrupted at step {step}, which is saved; the same command with resume=true goes on from there"
        )
    finish(launch(left_words))
    expected, found = (weights(checkpoints(tmp_path / name)[-1]) for name in ("straight", "left"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_how_a_step_is_shared_out_changes_nothing_but_rounding(bars_overrides: list[str], tmp_path: Path):
    """2 processes; 1 with twice the accumulation; 1 with twice the batch; and one after the other in the same run."""
    words = [
        *bars_overrides,
        *("train.max_steps=20", "train.sample_every=20", "train.evaluate_every=10", "train.checkpoint_every=0"),
        *("train.learning_rate_schedule=constant", "sample.prompts=[a bar that is level,upright,level]"),
    ]

    def run(name: str, processes: int, batch_size: int, rounds: int, *more: str) -> None:
        share = [f"train.batch_size={batch_size}", f"train.gradient_accumulation_steps={rounds}"]
        arguments = [*words, *share, *more, f"run_dir={tmp_path / name}"]
        if processes == 1:
            process = PROCESSES.Process(
                target=train, args=(load_config(Config, ROOT / "configs" / "mnist.yaml", arguments),)
            )
            process.start()
            process.join()
            assert process.exitcode == 0
        else:
            finish(launch(arguments, processes))

    run("one", 1, 16, 1)
    run("two", 2, 8, 1)
    run("accumulated", 1, 8, 2)
    tars = colours.write(tmp_path / "set", "tar", 60)
    stream = [*tars, "data.streaming=true", "data.resolution=8", "data.caption_templates=[]"]
    run("one process reads a stream", 1, 16, 1, *stream, "data.channels=3")
    run("two processes read a stream", 2, 8, 1, *stream, "data.channels=3")
    run("changing", 2, 8, 1, "train.max_steps=7")
    run("changing", 1, 16, 1, "train.max_steps=14", "resume=true")
    run("changing", 1, 4, 4, "resume=true")
    pairs = [("two", "one"), ("accumulated", "one"), ("changing", "one")]
    for other, same in (*pairs, ("two processes read a stream", "one process reads a stream")):
        lines = [metrics(tmp_path / name) for name in (other, same)]
        for name in ("loss", "held_out_loss", "held_out_loss_bucket_0", "held_out_loss_other_caption"):
            values = [[line[name] for line in of if name in line] for of in lines]
            assert len(values[0]) >= 2
            np.testing.assert_allclose(*values, atol=1e-5)
        first, second = (weights(checkpoints(tmp_path / name)[-1]) for name in (other, same))
        for name in first:
            values = [of[name].sqrt() if name.endswith("exp_avg_sq") else of[name] for of in (first, second)]
            atol = 1e-6 if "optimizer" in name else 1e-4  # of gradients, of weights
            torch.testing.assert_close(*values, rtol=0, atol=atol, msg=f"{other} {name}")
        grids = [np.asarray(Image.open(tmp_path / name / "samples" / "step-00000020.png")) for name in (other, same)]
        assert grids[0].shape[:2] == (4 * (8 + 2) - 2, 3 * (8 + 2) - 2)
        assert np.abs(grids[0].astype(int) - grids[1]).max() <= 1
