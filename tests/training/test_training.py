"""The loop: exact, resumable, the same on any number of processes, and learning."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import colours
import numpy as np
import pytest
import torch
from accelerate import DistributedType
from conftest import ROOT, SIDE, bar, metrics, weights
from safetensors.torch import load_file

from cond_diffusion import TextToImage
from cond_diffusion.config.run import Config, ObjectiveConfig, TrainConfig, load_config
from cond_diffusion.config.schedule import ScheduleConfig
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.data.loader import ShuffledDataset
from cond_diffusion.errors import UserError
from cond_diffusion.models.latents import PixelPatchify
from cond_diffusion.pipeline import checkpoint, run_folder
from cond_diffusion.pipeline.run_folder import RunLock, checkpoints, find_corruption, save_checkpoint
from cond_diffusion.training import batches, reporting, setup
from cond_diffusion.training import state as saving
from cond_diffusion.training import state as training_state
from cond_diffusion.training import trainer as training
from cond_diffusion.training.preflight import bytes_kept
from cond_diffusion.training.setup import complete_unet_config, make_accelerator, new_unet
from cond_diffusion.training.trainer import learning_rate, train


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
    own = {"images_per_second", "memory_gb"}
    lines = [[{k: line[k] for k in line.keys() - own} for line in metrics(Path(c.run_dir))] for c in (config, stopped)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "timesteps", "falls_to"),
    # What v says of the picture is not to be known under much noise: the places of the bars are random.
    [("epsilon", "uniform", 0.4), ("v_prediction", "logit_normal", 0.6)],
)
def test_a_few_pictures_are_learned_by_heart_and_the_text_chooses_among_them(
    bars_config: Config, prediction: Any, timesteps: Any, falls_to: float, caplog: pytest.LogCaptureFixture
):
    """Overfit; then the words alone decide which way the bar lies. Also where the last timestep holds no signal."""
    config = changed(
        bars_config,
        **{"max_steps": 300, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 20},
        **{"log_every": 10, "checkpoint_every": 0, "evaluate_every": 300},
    )
    config = replace(
        config,
        schedule=ScheduleConfig(100, 1e-3, 0.15, zero_terminal_snr=prediction != "epsilon"),
        objective=ObjectiveConfig(prediction, prediction, timesteps=timesteps),
    )
    caplog.set_level("INFO", logger="cond_diffusion")
    train(config)
    lines = metrics(Path(config.run_dir))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < falls_to * losses[0]
    assert "the text is used" in caplog.text
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
        UserError, match=r"exists and is not overwritten; name another, run_dir=.*-2, or continue it by resume=true"
    ):
        train(bars_config)
    wider = replace(bars_config, resume=True, unet=replace(bars_config.unet, channels=(32, 64)))
    with pytest.raises(UserError, match=r"resume: unet.channels was \(32, 32\) in this run and is now \(32, 64\)"):
        train(wider)
    with pytest.raises(UserError, match="resume: seed was 0 in this run and is now 1"):
        train(replace(bars_config, resume=True, seed=1))
    with pytest.raises(UserError, match="resume: objective.prediction was 'epsilon' in this run and is now 'sample'"):
        train(replace(bars_config, resume=True, objective=ObjectiveConfig("sample", "sample")))
    with pytest.raises(UserError, match="a step saw 8 samples in this run and would now see 16"):
        train(replace(changed(bars_config, batch_size=16), resume=True))
    after = weights(newest)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("file", ["state/optimizer.safetensors", "unet/config.json", "state/progress.json"])
@pytest.mark.parametrize("harm", ["cut short", "changed", "deleted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    bars_config: Config, file: str, harm: str, caplog: pytest.LogCaptureFixture
):
    straight = weights(train(replace(bars_config, run_dir=bars_config.run_dir + "-straight")))
    victim = train(bars_config) / file
    content = victim.read_bytes()
    match harm:
        case "cut short":
            victim.write_bytes(content[: len(content) // 2])
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
    read = batches.Batches._read

    def maybe_poisoned(self: Any, first: int) -> Any:
        samples = read(self, first)
        return replace(samples, eps=samples.eps * torch.inf) if first // self.per_step in steps else samples

    monkeypatch.setattr(batches.Batches, "_read", maybe_poisoned)
    return steps


def test_a_step_that_is_not_finite_is_skipped_and_named(
    bars_config: Config, poisoned: list[int], caplog: pytest.LogCaptureFixture
):
    before = weights(train(changed(bars_config, max_steps=2)))
    poisoned += [2]
    after = weights(train(replace(changed(bars_config, max_steps=3), resume=True)))
    assert all(torch.equal(before[name], after[name]) for name in before)
    (samples,) = re.findall(r"step 3 has gradients that are not finite and is skipped; its samples: (.*)", caplog.text)
    assert json.loads(samples) == ShuffledDataset(load_captioned_images(bars_config.data), 0, 3).indices(16, 8).tolist()
    assert metrics(Path(bars_config.run_dir))[-1]["loss"] is None
    poisoned.clear()
    assert metrics(Path(train(replace(bars_config, resume=True)).parent.parent))[-1]["loss"] < 10  # it goes on


def test_too_many_such_steps_end_the_run_and_leave_the_last_good_checkpoint(bars_config: Config, poisoned: list[int]):
    poisoned += [1, 3, 4, 5]
    with pytest.raises(UserError, match="train.max_bad_steps: 3 steps in a row, up to step 6, had gradients that"):
        train(changed(bars_config, max_steps=9, max_bad_steps=3))
    newest = checkpoints(Path(bars_config.run_dir))[-1]
    assert all(value.isfinite().all() for value in weights(newest).values())


def test_divergence_leaves_the_good_checkpoints_and_the_run_goes_on_from_them(
    bars_config: Config, caplog: pytest.LogCaptureFixture
):
    """Steps at a rate that is far too high leave weights that are finite, and useless."""
    run_dir = Path(bars_config.run_dir)
    straight = replace(changed(bars_config, max_steps=12, checkpoint_every=1), run_dir=f"{run_dir}-straight")
    good = changed(bars_config, max_steps=9, checkpoint_every=1, learning_rate_schedule="constant")
    newest = train(good)
    before = weights(newest)
    exploding = {"max_steps": 40, "learning_rate": 1e30, "max_bad_steps": 5, "keep_checkpoints": 1}
    with pytest.raises(UserError, match="train.max_bad_steps: 5 steps in a row"):
        train(replace(changed(good, **exploding), resume=True))
    assert "no checkpoint is written: weights or loss are not finite" in caplog.text
    assert [path.name for path in checkpoints(run_dir)] == [f"step-0000000{step}" for step in (7, 8, 9)]
    after = weights(newest)
    assert all(torch.equal(before[name], after[name]) for name in before)
    sane = weights(train(replace(changed(good, max_steps=12), resume=True)))
    expected = weights(train(changed(straight, learning_rate_schedule="constant")))
    assert all(torch.equal(expected[name], sane[name]) for name in expected)


def test_a_run_whose_weights_are_never_finite_ends_without_a_checkpoint(
    bars_config: Config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "learning_rate", lambda config, step: float("inf"))
    with pytest.raises(UserError, match="has no checkpoint: no step had finite gradients"):
        train(changed(bars_config, max_steps=3))
    assert not list(Path(bars_config.run_dir).rglob("*.safetensors"))
    for key in ("learning_rate", "weight_decay"):
        with pytest.raises(UserError, match=f"train.{key}: inf"):
            changed(bars_config, **{key: float("inf")})


def test_steps_that_are_all_skipped_write_no_checkpoint(bars_config: Config, poisoned: list[int]):
    poisoned += [2, 3, 4]
    assert train(changed(bars_config, max_steps=5, checkpoint_every=1)).name == "step-00000002"


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept_until_there_is_a_better_one(tmp_path: Path):
    def save(step: int, loss: float | None) -> list[int]:
        def write(folder: Path) -> None:
            (folder / "state").mkdir()
            (folder / "state" / "progress.json").write_text(json.dumps({"step": step, "held_out_loss": loss}))

        save_checkpoint(tmp_path, step, write, keep=2)
        return [int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path)]

    assert save(1, None) == [1]
    assert save(2, 0.5) == [1, 2]
    assert save(3, 0.7) == [2, 3]
    assert save(4, 0.6) == [2, 3, 4]
    assert save(5, 0.5) == [2, 4, 5]
    assert save(6, 0.4) == [5, 6]
    assert save(7, 0.9) == [6, 7]


def test_the_held_out_loss_is_kept_with_the_checkpoint(bars_config: Config):
    config = changed(bars_config, evaluate_every=2, checkpoint_every=1, keep_checkpoints=9)
    train(changed(config, max_steps=3))
    train(replace(changed(config, max_steps=5), resume=True))
    told = {line["step"]: line["held_out_loss"] for line in metrics(Path(config.run_dir)) if "held_out_loss" in line}
    files = [path / "state" / "progress.json" for path in checkpoints(Path(config.run_dir))]
    kept = [json.loads(file.read_text())["held_out_loss"] for file in files]
    assert kept == [None, told[2], told[2], told[4], told[4]]


def test_a_named_checkpoint_is_gone_on_from_and_later_ones_are_put_aside(
    bars_config: Config, caplog: pytest.LogCaptureFixture
):
    run_dir = Path(bars_config.run_dir)
    config = changed(bars_config, checkpoint_every=1, max_steps=4, learning_rate_schedule="constant")
    expected = weights(train(config))
    for number in (1, 2):
        found = weights(train(replace(config, resume="step-00000002")))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        aside = {f"step-0000000{step}.superseded-{i + 1}" for i in range(number) for step in (3, 4)}
        assert {path.name for path in run_dir.glob("checkpoints/*.superseded-*")} == aside
    assert "renamed later checkpoints to step-00000003.superseded-1, step-00000004.superseded-1" in caplog.text
    for name, message in (
        ("step-00000009", "has no checkpoint step-00000009 .*; it has step-00000002, "),
        ("step-9", "resume: 'step-9'; expected true, false or a checkpoint such as step-00001000"),
    ):
        with pytest.raises(UserError, match=message):
            train(replace(config, resume=name))
    with pytest.raises(UserError, match="there is no run in .*nowhere, and so no checkpoint step-00000002"):
        train(replace(config, run_dir=str(run_dir / "nowhere"), resume="step-00000002"))


def train_slowly(config: Config, started: Any, may_end: Any) -> None:
    """Train, and wait after the first step; in a process of its own."""
    log = reporting.Reporter.log

    def waiting(self: Any, done: int, *arguments: Any) -> None:
        log(self, done, *arguments)
        started.set()
        may_end.wait()

    reporting.Reporter.log = waiting  # type: ignore[method-assign]
    train(config)


@pytest.mark.slow
def test_two_trainers_in_one_folder_are_one_too_many(bars_config: Config):
    """The second is refused until the first has ended, or has been killed."""
    context = multiprocessing.get_context("spawn")
    started, may_end = context.Event(), context.Event()
    config = changed(bars_config, max_steps=2, checkpoint_every=1)
    first = context.Process(target=train_slowly, args=(config, started, may_end))
    first.start()
    assert started.wait(120)
    before = {file: file.read_bytes() for file in Path(config.run_dir).rglob("*.yaml")}
    for second in (replace(config, seed=1), replace(config, resume=True)):
        with pytest.raises(UserError, match="run_dir: "):
            train(second)
    with pytest.raises(UserError, match="another process is training into"):
        train(replace(config, resume=True))
    assert before == {file: file.read_bytes() for file in Path(config.run_dir).rglob("*.yaml")}
    first.kill()
    first.join()
    assert train(replace(config, resume=True)).name == "step-00000002"


def test_a_trainer_that_comes_second_to_a_new_folder_is_refused(bars_config: Config, monkeypatch: pytest.MonkeyPatch):
    """Both have seen that nothing is there; one makes the folder while the other still reads its data."""
    make_run = training.make_run

    def too_late(lock: Any, *arguments: Any) -> None:
        with RunLock(lock.run_dir) as other:
            lock.run_dir.mkdir()
            other.acquire()
            make_run(lock, *arguments)

    monkeypatch.setattr(training, "make_run", too_late)
    with pytest.raises(UserError, match="another process is training into"):
        train(bars_config)
    assert [path.name for path in Path(bars_config.run_dir).iterdir()] == [".lock"]


def test_reading_goes_on_where_training_deletes_the_checkpoint_that_is_read(
    bars_config: Config, monkeypatch: pytest.MonkeyPatch
):
    """Between finding it and reading it, between any two of its files, and while its checksums are computed."""
    checkpoints_dir = train(bars_config).parent
    newest = checkpoints_dir / "step-00000004"
    wanted = load_file(newest / "unet" / "diffusion_pytorch_model.safetensors")
    step = 4

    def rotate() -> None:
        nonlocal step
        (checkpoints_dir / f"step-{step:08d}").rename(checkpoints_dir / f"step-{step + 1:08d}")
        step += 1

    for module, name in (
        (run_folder, "_checksum"),
        (checkpoint, "check_kind"),
        (checkpoint, "refuse_pickles"),
        (checkpoint.UNet, "from_pretrained"),
        (checkpoint.TextEncoder, "from_pretrained"),
    ):
        original, rotated = getattr(module, name), []

        def first_rotating(
            *arguments: Any, original: Any = original, rotated: list[bool] = rotated, **options: Any
        ) -> Any:
            if not rotated:
                rotated.append(True)
                rotate()
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, first_rotating)
            pipe = TextToImage.from_pretrained(bars_config.run_dir)
        assert rotated
        assert pipe.folder == checkpoints_dir / f"step-{step:08d}"
        assert all(torch.equal(wanted[key], value) for key, value in pipe.unet.state_dict().items())
    with pytest.raises(UserError):
        TextToImage.from_pretrained(newest)  # which is gone


def test_a_full_disk_costs_the_new_checkpoint_and_never_the_old_one(
    bars_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The run goes on without it; at the end, where nothing follows, it is an error."""
    write, saved = training_state.TrainingState.write_pieces, []

    def full_from_the_second_on(*arguments: Any) -> None:
        write(*arguments)
        saved.append(arguments)
        if len(saved) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training_state.TrainingState, "write_pieces", full_from_the_second_on)
    with pytest.raises(UserError, match=r"step-00000006 cannot be written \(.*No space left .* are untouched"):
        train(changed(bars_config, max_steps=6))
    assert len(saved) == 3
    assert "step-00000004 cannot be written" in caplog.text
    assert [path.name for path in (Path(bars_config.run_dir) / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_disk_that_is_really_full_does_the_same(bars_config: Config, tmp_path: Path, caplog: Any):
    """A disk with room for one checkpoint, and no second one."""
    size = sum(file.stat().st_size for file in train(changed(bars_config, snapshots=0)).rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only the system's administrator can mount a small disk")
    try:
        config = changed(bars_config, max_steps=6, snapshots=0)
        with pytest.raises(UserError, match=r"step-00000006 cannot be written \(.*\); the checkpoints before it are"):
            train(replace(config, run_dir=str(disk / "run")))
        assert "step-00000004 cannot be written" in caplog.text
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step-00000002"]
        assert find_corruption(disk / "run" / "checkpoints" / "step-00000002", with_state=True) is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_saving_holds_training_up_no_longer_than_copying(bars_config: Config, monkeypatch: pytest.MonkeyPatch):
    """While a checkpoint waits for its disk, steps go on; and what they change is not in it."""
    disk_is_ready, begun = threading.Event(), threading.Event()
    save = saving.save_checkpoint

    def slow(*arguments: Any, **options: Any) -> Path:
        begun.set()
        assert disk_is_ready.wait(60)
        return save(*arguments, **options)

    log = reporting.Reporter.log

    def watched(self: Any, done: int, *arguments: Any) -> None:
        log(self, done, *arguments)
        if done == 3:  # step 2 has begun to save
            assert begun.wait(60)
            assert not list((Path(config.run_dir) / "checkpoints").glob("step-*"))
            disk_is_ready.set()

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    monkeypatch.setattr(reporting.Reporter, "log", watched)
    config = replace(changed(bars_config, max_steps=3, keep_checkpoints=3, learning_rate_schedule="constant"))
    config = replace(config, run_dir=bars_config.run_dir + "-slow")
    train(config)
    assert [c.name for c in checkpoints(Path(config.run_dir))] == ["step-00000002", "step-00000003"]
    constant = changed(bars_config, max_steps=2, learning_rate_schedule="constant")
    monkeypatch.undo()
    straight = weights(train(replace(constant, run_dir=bars_config.run_dir + "-2")))
    found = weights(checkpoints(Path(config.run_dir))[0])
    assert all(torch.equal(straight[name], found[name]) for name in straight)


def test_any_ema_width_can_be_drawn_from_after_training(bars_config: Config):
    """The width of training gives the checkpoint's own weights; another one those that training with it would have."""
    config = changed(bars_config, max_steps=32, snapshots=32, checkpoint_every=0)
    train(config)
    other = changed(replace(config, run_dir=config.run_dir + "-other"), ema_width=0.07)
    train(other)
    own, as_trained = (TextToImage.from_pretrained(config.run_dir, ema_width=w).unet.state_dict() for w in (0.1, None))
    for name, weight in as_trained.items():
        torch.testing.assert_close(own[name], weight, rtol=1e-5, atol=1e-6)
    found = TextToImage.from_pretrained(config.run_dir, ema_width=0.07).unet.state_dict()
    wanted = TextToImage.from_pretrained(other.run_dir).unet.state_dict()
    distance, moved = (sum((w - of[n]).square().sum() for n, w in wanted.items()) for of in (found, as_trained))
    assert distance < 0.01 * moved


def test_gradient_checkpointing_gives_the_same_weights_and_keeps_less(bars_config: Config):
    plain = weights(train(bars_config))
    config = changed(replace(bars_config, run_dir=bars_config.run_dir + "-2"), gradient_checkpointing=True)
    found = weights(train(config))
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    kept = []
    for checkpointing in (False, True):
        unet = new_unet(changed(bars_config, gradient_checkpointing=checkpointing), 64, PixelPatchify(1))
        x, t, context = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), torch.randn(8, 16, 64)
        kept.append(bytes_kept(unet, lambda unet=unet, x=x, t=t, context=context: unet(x, t, context).sum()))
    assert kept[1] < 0.4 * kept[0]


@pytest.mark.slow
def test_a_compiled_network_trains_the_same_but_for_rounding(bars_overrides: list[str], bars_config: Config):
    """In a process of its own, where no types are checked: the compiler would compile the checks, too."""
    small = [*bars_overrides, "unet.channels=[32]", "unet.attention=[true]"]
    compiled = bars_config.run_dir + "-2"
    train(load_config(Config, ROOT / "configs" / "mnist.yaml", [*small, f"run_dir={bars_config.run_dir}"]))
    command = [sys.executable, ROOT / "train.py", *small, "train.compile=true", f"run_dir={compiled}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    losses = [[line["loss"] for line in metrics(Path(run_dir))] for run_dir in (bars_config.run_dir, compiled)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    TextToImage.from_pretrained(compiled)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cpu_without_the_instructions_trains_in_fp32_and_says_so(
    bars_config: Config, precision: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(setup, "has_bf16", lambda: False)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    assert make_accelerator(changed(bars_config, mixed_precision=precision)).mixed_precision == "no"
    assert f"train.mixed_precision={precision}: this CPU has no instructions for it" in caplog.text


def test_muon_is_refused_where_matrices_are_cut_up(bars_config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(setup.Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(setup.Accelerator, "is_fsdp2", True)
    with pytest.raises(UserError, match="train.optimizer: muon needs whole matrices"):
        make_accelerator(changed(bars_config, optimizer="muon"))


def test_with_fp16_a_step_that_overflows_lowers_the_factor_of_the_loss_and_no_weights(
    bars_config: Config, poisoned: list[int], monkeypatch: pytest.MonkeyPatch
):
    """On a CPU Accelerate makes no scaler; here it is given torch's own."""
    make = training.make_accelerator

    def with_scaler(config: Config) -> Any:
        accelerator = make(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator

    train(changed(bars_config, max_steps=2))
    monkeypatch.setattr(training, "make_accelerator", with_scaler)
    poisoned += [2]
    newest = train(replace(changed(bars_config, max_steps=4), resume=True))
    assert newest.name == "step-00000004"
    assert json.loads((newest / "state" / "progress.json").read_text())["scaler"]["scale"] == 512
    poisoned.clear()
    after = weights(newest)
    train(replace(changed(bars_config, max_steps=6), resume=True))  # goes on with what was saved
    newest = checkpoints(Path(bars_config.run_dir))[-1]
    assert json.loads((newest / "state" / "progress.json").read_text())["scaler"]["scale"] == 512
    assert not all(torch.equal(value, after[name]) for name, value in weights(newest).items())


def test_a_resumed_run_says_what_changed_and_goes_on_where_that_is_safe(
    bars_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train(changed(bars_config, max_steps=2))
    colours.write(tmp_path / "other", "jsonl", 40)
    data = replace(bars_config.data, source=str(tmp_path / "other"), caption_column="text", caption_templates=())
    train(replace(changed(bars_config, max_steps=4), data=data, resume=True))
    assert f"resume: data.source was '{bars_config.data.source}' in this run and is now" in caplog.text
    assert "resume: the data changed: {'pictures': 64, " in caplog.text
    caplog.clear()
    streamed = replace(data, streaming=True)
    train(replace(changed(bars_config, max_steps=5), data=streamed, resume=True))
    assert "resume: data.streaming was False in this run and is now True; continuing with it" in caplog.text
    train(replace(changed(bars_config, max_steps=6), data=streamed, resume=True))
    with pytest.raises(UserError, match="resume: data.resolution was 8 in this run and is now 16; the weights mean"):
        train(replace(bars_config, data=replace(data, resolution=16), resume=True))


def test_a_full_disk_costs_lines_and_grids_and_not_the_run(
    bars_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    opened = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if self.name == "metrics.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    Path(bars_config.run_dir).mkdir()
    config = replace(changed(bars_config, sample_every=2), resume=False)
    monkeypatch.setattr("PIL.Image.Image.save", lambda *_: full(Path("metrics.jsonl"), "a"))
    assert train(config).name == "step-00000004"
    assert "metrics.jsonl cannot be written (No space left on device); training goes on" in caplog.text
    assert "step-00000002.png cannot be written (No space left on device); training goes on" in caplog.text


def test_what_a_kill_has_left_of_a_line_is_forgotten(bars_config: Config):
    train(changed(bars_config, max_steps=2))
    file = Path(bars_config.run_dir) / "metrics.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(f'{first}\n{second}\n{{"step": 3, "lo{{"step": 3}}\n{{"step"')
    train(replace(bars_config, resume=True))
    assert [line["step"] for line in metrics(Path(bars_config.run_dir))] == [1, 2, 3, 4]


def test_what_follows_the_checkpoint_is_measured_again_and_its_snapshots_are_made_again(bars_config: Config):
    """A run that comes back to step 2 with other settings keeps nothing of what it was after it."""
    train(changed(bars_config, evaluate_every=2, snapshots=16))
    run_dir = Path(bars_config.run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    train(replace(changed(bars_config, max_steps=6, snapshots=3, evaluate_every=2), resume=True))
    assert [file.stem for file in sorted((run_dir / "snapshots").iterdir())] == [
        f"step-0000000{step}" for step in (1, 2, 4, 6)
    ]
    assert [line["step"] for line in metrics(run_dir) if "held_out_loss" in line] == [2, 4, 6]


def test_the_checkpoint_that_was_just_written_is_never_the_one_that_is_deleted(tmp_path: Path):
    """Later ones that are damaged, behind which a run has begun again, do not count."""
    for step in (500, 1000, 1500):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "a").write_text("x") and None, keep=3)
    save_checkpoint(tmp_path, 600, lambda folder: (folder / "a").write_text("x") and None, keep=1)
    assert [c.name for c in checkpoints(tmp_path)] == ["step-00000600", "step-00001000", "step-00001500"]


def test_the_width_of_the_average_cannot_change_within_a_run(bars_config: Config):
    train(changed(bars_config, max_steps=2))
    with pytest.raises(UserError, match="resume: train.ema_width was 0.1 in this run and is now 0.2; keep it"):
        train(replace(changed(bars_config, ema_width=0.2), resume=True))


def test_what_the_data_decides_about_the_unet_is_filled_in_or_checked(bars_config: Config):
    complete = complete_unet_config(bars_config, 64, PixelPatchify(2))
    assert (complete.in_channels, complete.sample_size, complete.context_dim) == (4, 4, 64)
    with pytest.raises(UserError, match=r"latent.patch_size: 3 does not divide data.resolution \(8\)"):
        complete_unet_config(bars_config, 64, PixelPatchify(3))
    with pytest.raises(UserError, match="unet.in_channels: 3 does not fit the data"):
        complete_unet_config(replace(bars_config, unet=replace(bars_config.unet, in_channels=3)), 64, PixelPatchify(1))
