"""The loop: exact, resumable, the same on any number of processes, and learning."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SIDE, bar
from safetensors.torch import load_file

from cond_diffusion import TextToImage
from cond_diffusion.checkpoint import checkpoints, save_checkpoint
from cond_diffusion.config import Config, TrainConfig
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
    """SIGKILL, three times, at moments spread over a run that writes a checkpoint every second step."""
    words = [*bars_overrides, "train.max_steps=60", "train.keep_checkpoints=2"]
    straight = launch([*words, f"run_dir={tmp_path / 'straight'}"])
    killed_words = [*words, "resume=true", f"run_dir={tmp_path / 'killed'}"]
    _, errors = straight.communicate()
    assert straight.returncode == 0, errors
    for kill_after in (3, 20, 41):
        process = launch(killed_words)
        file = tmp_path / "killed" / "metrics.jsonl"
        while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= kill_after):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = launch(killed_words)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    expected, found = (weights(checkpoints(tmp_path / name)[-1]) for name in ("straight", "killed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "loss", "timesteps"),
    [("epsilon", "epsilon", "uniform"), ("v_prediction", "v_prediction", "logit_normal")],
)
def test_a_few_pictures_are_learned_by_heart_and_the_text_chooses_among_them(
    bars_config: Config, prediction, loss, timesteps
):
    """Overfit; then the words alone decide which way the bar lies. Also where the last timestep holds no signal."""
    config = changed(
        bars_config, max_steps=300, batch_size=64, learning_rate=3e-3, warmup_steps=20, log_every=50, checkpoint_every=0
    )
    config = replace(
        config,
        schedule=ScheduleConfig(100, 1e-3, 0.15, zero_terminal_snr=prediction != "epsilon"),
        objective=ObjectiveConfig(prediction, loss, timesteps=timesteps),
    )
    train(config)
    lines = metrics(Path(config.run_dir))
    assert lines[-1]["loss"] < 0.4 * lines[0]["loss"]
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
    state = newest / "state" / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match="resume: .* is damaged"):
        train(replace(changed(bars_config, max_steps=6), resume=True))
    assert [c.name for c in checkpoints(Path(bars_config.run_dir))] == ["step-00000002", "step-00000004"]


def test_what_the_data_decides_about_the_unet_is_filled_in_or_checked(bars_config: Config):
    complete = complete_unet_config(replace(bars_config, latent=replace(bars_config.latent, patch_size=2)), 64)
    assert (complete.in_channels, complete.sample_size, complete.context_dim) == (4, 4, 64)
    with pytest.raises(UserError, match=r"latent.patch_size: 3 does not divide data.resolution \(8\)"):
        complete_unet_config(replace(bars_config, latent=replace(bars_config.latent, patch_size=3)), 64)
    with pytest.raises(UserError, match="unet.in_channels: 3 does not fit the data"):
        complete_unet_config(replace(bars_config, unet=replace(bars_config.unet, in_channels=3)), 64)
