"""The loop: exact, resumable, the same on any number of processes, and learning."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SIDE, bar
from safetensors.torch import load_file

from cond_diffusion import TextToImage, training
from cond_diffusion.checkpoint import checkpoints, save_checkpoint
from cond_diffusion.config import Config, TrainConfig
from cond_diffusion.data import sample_indices
from cond_diffusion.ema import EMA, power_of_width
from cond_diffusion.errors import UserError
from cond_diffusion.objective import ObjectiveConfig
from cond_diffusion.schedule_config import ScheduleConfig
from cond_diffusion.training import complete_unet_config, learning_rate, train


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged and the raw weights, and the optimizer's moments."""
    files = ["unet/diffusion_pytorch_model.safetensors", "state/unet.safetensors", "state/optimizer.safetensors"]
    return {f"{file}:{name}": value for file in files for name, value in load_file(checkpoint / file).items()}


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def changed(config: Config, **train_changes: object) -> Config:
    return replace(config, train=replace(config.train, **train_changes))


def test_four_steps_equal_two_and_resumed_two(bars_config: Config, tmp_path: Path):
    """Bit for bit, with accumulation, across the end of an epoch (64 pictures, 48 a step)."""
    config = changed(bars_config, gradient_accumulation_steps=6, learning_rate_schedule="constant")
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    straight = train(config)
    train(changed(stopped, max_steps=2))
    resumed = train(replace(stopped, resume=True))
    assert resumed.name == straight.name == "step-00000004"
    expected, found = weights(straight), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    lines = [[{**line, "images_per_second": 0} for line in metrics(Path(c.run_dir))] for c in (config, stopped)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4]


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


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(bars_overrides: list[str], tmp_path: Path):
    runs = {}
    for processes, rounds in ((1, 2), (2, 1)):
        run_dir = tmp_path / f"{processes}"
        rounds_word = f"train.gradient_accumulation_steps={rounds}"
        process = launch([*bars_overrides, "train.max_steps=20", rounds_word, f"run_dir={run_dir}"], processes)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        runs[processes] = run_dir
    losses = {n: [line["loss"] for line in metrics(run_dir)] for n, run_dir in runs.items()}
    assert len(losses[1]) == 20
    np.testing.assert_allclose(losses[2], losses[1], atol=1e-5)
    one, two = (weights(checkpoints(runs[n])[-1]) for n in (1, 2))
    for name in one:  # Adam's second moments are far below 1e-4 themselves
        small = one[name].abs().max().item() if name.endswith("exp_avg_sq") else 1.0
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4 * small, msg=name)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(bars_overrides: list[str], tmp_path: Path):
    """SIGKILL, which leaves no time, and SIGTERM and SIGINT, which are answered by saving and a line that says so."""
    words = [*bars_overrides, "train.max_steps=60", "train.keep_checkpoints=2"]
    straight = launch([*words, f"run_dir={tmp_path / 'straight'}"])
    killed_words = [*words, "resume=true", f"run_dir={tmp_path / 'killed'}"]
    _, errors = straight.communicate()
    assert straight.returncode == 0, errors
    for kill_after, number in ((3, signal.SIGKILL), (14, signal.SIGTERM), (27, signal.SIGINT), (41, signal.SIGKILL)):
        process = launch(killed_words)
        file = tmp_path / "killed" / "metrics.jsonl"
        while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= kill_after):
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate()
        if number == signal.SIGKILL:
            assert process.returncode == -number
            continue
        assert process.returncode == 128 + number
        newest = checkpoints(tmp_path / "killed")[-1]
        step = int(newest.name.removeprefix("step-"))
        assert step >= kill_after
        assert errors.splitlines()[-1] == (
            f"interrupted at step {step}, which is saved; the same command with resume=true goes on from there"
        )
    last = launch(killed_words)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    expected, found = (weights(checkpoints(tmp_path / name)[-1]) for name in ("straight", "killed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "timesteps", "falls_to"),
    # What v says of the picture is not to be known under much noise: the places of the bars are random.
    [("epsilon", "uniform", 0.4), ("v_prediction", "logit_normal", 0.6)],
)
def test_a_few_pictures_are_learned_by_heart_and_the_text_chooses_among_them(
    bars_config: Config, prediction: Any, timesteps: Any, falls_to: float
):
    """Overfit; then the words alone decide which way the bar lies. Also where the last timestep holds no signal."""
    config = changed(
        bars_config, max_steps=300, batch_size=64, learning_rate=3e-3, warmup_steps=20, log_every=50, checkpoint_every=0
    )
    config = replace(
        config,
        schedule=ScheduleConfig(100, 1e-3, 0.15, zero_terminal_snr=prediction != "epsilon"),
        objective=ObjectiveConfig(prediction, prediction, timesteps=timesteps),
    )
    train(config)
    lines = metrics(Path(config.run_dir))
    assert lines[-1]["loss"] < falls_to * lines[0]["loss"]
    pipe = TextToImage.from_pretrained(config.run_dir)
    assert pipe.prediction.kind == prediction
    images = pipe(["a bar that is upright", "level"], num_images=16, guidance_scale=2.0, progress=False)
    all_bars = [torch.stack([bar(label, place) for place in range(SIDE)]).float() for label in (0, 1)]
    right = 0
    for i, image in enumerate(images):
        pixels = torch.from_numpy(np.asarray(image).astype(np.float32))
        distance = [(pixels - bars).square().mean((1, 2)).min().item() for bars in all_bars]
        right += distance[i // 16] < distance[1 - i // 16]
    assert right >= 29  # of 32


def test_the_learning_rate_is_a_function_of_the_step():
    config = TrainConfig(max_steps=110, warmup_steps=9, learning_rate=2.0)
    assert learning_rate(config, 0) == pytest.approx(0.2)
    assert learning_rate(config, 9) == pytest.approx(2.0)
    assert learning_rate(config, 9 + 101 // 2) == pytest.approx(1.0, abs=0.02)
    assert learning_rate(config, 109) == pytest.approx(0.0, abs=1e-3)
    stable = replace(config, learning_rate_schedule="warmup_stable_decay", decay_steps=19)
    assert [learning_rate(stable, step) for step in (0, 9, 89, 90)] == pytest.approx([0.2, 2.0, 2.0, 2.0])
    assert [learning_rate(stable, step) for step in (91, 100, 109)] == pytest.approx([1.9, 1.0, 0.1])
    constant = replace(config, learning_rate_schedule="constant")
    assert learning_rate(constant, 0) == pytest.approx(0.2)
    assert learning_rate(constant, 109) == 2.0


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_average_of_the_weights_is_the_power_function_of_its_width(width: float):
    """An average that weighs step s of n in proportion to s^gamma has moments that are integrals of powers of s."""
    gamma, steps = power_of_width(width), 3000
    network = torch.nn.Linear(2, 1, bias=False).double()
    ema = EMA(network, width)
    for step in range(1, steps + 1):
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[step / steps, (step / steps) ** 2]]))
        ema.update(network, step)
    mean, square = ema.network.weight.flatten().tolist()
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)
    assert square == pytest.approx((gamma + 1) / (gamma + 3), rel=2e-3)
    assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=0.01)


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path: Path):
    save_checkpoint(tmp_path, 1, lambda folder: (folder / "a").write_text("whole") and None, keep=2)

    def dies(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, dies, keep=2)
    assert [c.name for c in checkpoints(tmp_path)] == ["step-00000001"]
    for step in (2, 3):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "a").write_text("whole") and None, keep=2)
    assert [c.name for c in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert all((c / "a").read_text() == "whole" for c in checkpoints(tmp_path))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_an_existing_run_is_never_overwritten_and_a_changed_one_not_resumed(bars_config: Config):
    newest = train(bars_config)
    before = weights(newest)
    with pytest.raises(
        UserError, match=r"exists and is not overwritten; name another, run_dir=.*-2, or go on with it by resume=true"
    ):
        train(bars_config)
    wider = replace(bars_config, resume=True, unet=replace(bars_config.unet, channels=(32, 64)))
    with pytest.raises(UserError, match=r"resume: unet.channels was \(32, 32\) in this run and is now \(32, 64\)"):
        train(wider)
    with pytest.raises(UserError, match="resume: seed was 0 in this run and is now 1"):
        train(replace(bars_config, resume=True, seed=1))
    with pytest.raises(UserError, match="resume: objective.loss was 'epsilon' in this run and is now 'min_snr'"):
        train(replace(bars_config, resume=True, objective=ObjectiveConfig(loss="min_snr")))
    with pytest.raises(UserError, match="a step saw 8 samples in this run and would now see 16"):
        train(replace(changed(bars_config, batch_size=16), resume=True))
    after = weights(newest)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("file", ["state/optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("harm", ["cut short", "changed", "deleted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    bars_config: Config, file: str, harm: str, caplog: pytest.LogCaptureFixture
):
    straight = weights(train(replace(bars_config, run_dir=bars_config.run_dir + "-straight")))
    victim = train(bars_config) / file
    content = victim.read_bytes()
    match harm:
        case "cut short":
            victim.write_bytes(content[:-100])
        case "changed":
            victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "deleted":
            victim.unlink()
    if file.startswith("unet"):
        with pytest.raises(UserError, match=f"step-00000004: {file} "):
            TextToImage.from_pretrained(Path(bars_config.run_dir) / "checkpoints" / "step-00000004")
        TextToImage.from_pretrained(bars_config.run_dir)  # the one before
        assert "going back to the checkpoint before it" in caplog.text
    caplog.clear()
    resumed = train(replace(bars_config, resume=True))
    assert f"step-00000004: {file} " in caplog.text
    assert [c.name for c in checkpoints(Path(bars_config.run_dir))] == ["step-00000002", "step-00000004"]
    found = weights(resumed)
    assert all(torch.equal(straight[name], found[name]) for name in straight)


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(bars_config: Config):
    train(changed(bars_config, checkpoint_every=0))
    (victim,) = Path(bars_config.run_dir).rglob("state/unet.safetensors")
    victim.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its checkpoints is whole: state/unet.safetensors was cut short"):
        train(replace(bars_config, resume=True))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps whose pictures become infinite; to be filled by the test."""
    steps: list[int] = []
    draw = training.Batches._draw

    def maybe_poisoned(self: Any, step: int, number: int, numbers: int) -> Any:
        batch = draw(self, step, number, numbers)
        return replace(batch, x_0=batch.x_0 * torch.inf) if step in steps else batch

    monkeypatch.setattr(training.Batches, "_draw", maybe_poisoned)
    return steps


def test_a_step_that_is_not_finite_is_skipped_and_named(
    bars_config: Config, poisoned: list[int], caplog: pytest.LogCaptureFixture
):
    before = weights(train(changed(bars_config, max_steps=2)))
    poisoned += [2]
    after = weights(train(replace(changed(bars_config, max_steps=3), resume=True)))
    assert all(torch.equal(before[name], after[name]) for name in before)
    indices = sample_indices(64, bars_config.seed, 16, 8).tolist()
    assert f"step 3 has gradients that are not finite and is skipped; its samples: {indices}" in caplog.text
    assert metrics(Path(bars_config.run_dir))[-1]["loss"] is None
    poisoned.clear()
    assert metrics(Path(train(replace(bars_config, resume=True)).parent.parent))[-1]["loss"] < 10  # it goes on


def test_too_many_such_steps_end_the_run_and_leave_the_last_good_checkpoint(bars_config: Config, poisoned: list[int]):
    poisoned += [1, 3, 4, 5]
    with pytest.raises(UserError, match="train.max_bad_steps: 3 steps in a row, up to step 6, had gradients that"):
        train(changed(bars_config, max_steps=9, max_bad_steps=3))
    newest = checkpoints(Path(bars_config.run_dir))[-1]
    assert all(value.isfinite().all() for value in weights(newest).values())


def test_a_full_disk_costs_the_new_checkpoint_and_never_the_old_one(
    bars_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The run goes on without it; at the end, where nothing follows, it is an error."""
    whole, saved = training.save_state, []

    def full_from_the_second_on(*arguments: Any) -> None:
        whole(*arguments)
        saved.append(arguments)
        if len(saved) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training, "save_state", full_from_the_second_on)
    with pytest.raises(UserError, match=r"step-00000006 cannot be written \(.*No space left .* are untouched"):
        train(changed(bars_config, max_steps=6))
    assert len(saved) == 3
    assert "step-00000004 cannot be written" in caplog.text
    assert [path.name for path in (Path(bars_config.run_dir) / "checkpoints").iterdir()] == ["step-00000002"]


def test_what_the_data_decides_about_the_unet_is_filled_in_or_checked(bars_config: Config):
    complete = complete_unet_config(replace(bars_config, latent=replace(bars_config.latent, patch_size=2)), 64)
    assert (complete.in_channels, complete.sample_size, complete.context_dim) == (4, 4, 64)
    with pytest.raises(UserError, match=r"latent.patch_size: 3 does not divide data.resolution \(8\)"):
        complete_unet_config(replace(bars_config, latent=replace(bars_config.latent, patch_size=3)), 64)
    with pytest.raises(UserError, match="unet.in_channels: 3 does not fit the data"):
        complete_unet_config(replace(bars_config, unet=replace(bars_config.unet, in_channels=3)), 64)
