"""The preflight check (`python train.py --check`)."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import colours
import pytest
import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint

from cond_diffusion.config.run import Config, TextConfig, load_config
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.errors import UserError
from cond_diffusion.models.unet import UNet
from cond_diffusion.training import preflight
from cond_diffusion.training.preflight import activation_bytes, check, verdict


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "MAX_OVERFIT_STEPS", 40)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_check_reports_data_cost_and_overfitting(working_directory: Path, streaming: bool):
    folder = working_directory / "set"
    overrides = colours.write(folder, "jsonl", 60)
    (folder / "00007.png").write_text("not an image", encoding="utf-8")
    lines = (
        (folder / "metadata.jsonl")
        .read_text(encoding="utf-8")
        .replace("a red circle", "a " + "very " * 20 + "red circle")
    )
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    overrides += ["text.max_length=16", "unet.channels=[32,32]", "unet.num_groups=8", "data.max_bad_fraction=0.1"]
    overrides += ["latent.patch_size=4"]
    overrides += ["train.batch_size=8", "train.max_steps=1000", "data.resolution=32", f"data.streaming={streaming}"]
    findings = list(check(load_config(Config, overrides=overrides)))
    keys = ["data", "images", "captions", "saved check-runs-new.png", "network", "memory", "time", "verdict"]
    assert [line.split(":")[0] for line in findings[:8]] == keys
    assert re.match(r"  1\. .*; set text\.encoder=pretrain text\.max_length=(8|9)\d$", findings[8])
    assert any(re.match(r"  \d\. .*text\.encoder \(.*; set text\.encoder=", line) for line in findings[8:])
    assert str(folder) in findings[0]
    assert ("stream" if streaming else "60 images") in findings[0]
    assert findings[0].endswith("columns: image, text")
    assert "unreadable" in findings[1] if streaming else ", 1 unreadable" in findings[1]
    assert "data.resolution (32)" in findings[1]
    assert "text.max_length (16 tokens)" in findings[2]
    assert "for example 'a " in findings[2]
    with Image.open("check-runs-new.png") as sheet:
        assert sheet.convert("RGB").getextrema() == ((0, 255),) * 3
    assert "loss of one batch" in findings[7]
    assert not (working_directory / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "length", "advice"),
    [
        ({}, 12, "set text.max_length=12"),
        ({}, 60, "set text.encoder=pretrain, or openai/clip-vit-base-patch32 with access to the Hub"),
        ({}, 90, "set text.encoder=pretrain text.max_length=90"),
        ({"text": TextConfig(encoder="pretrain")}, 90, "set text.max_length=90"),
        ({"init_from": "emoji"}, 12, "shorten them, or remove init_from, which decides the text encoder"),
    ],
)
def test_advice_for_long_captions_can_be_followed(changes: dict[str, Any], length: int, advice: str):
    assert preflight._longer_captions(Config(**changes), length, longest=16) == advice


@pytest.mark.slow
def test_check_accepts_empty_captions(working_directory: Path):
    for i in range(4):
        Image.new("L", (28, 28)).save(working_directory / f"{i}.png")
        (working_directory / f"{i}.txt").touch()
    options = ["unet.channels=[32,32]", "unet.num_groups=8", "latent.patch_size=4", "train.batch_size=2"]
    findings = list(check(load_config(Config, overrides=[f"data.source={working_directory}", *options])))
    assert findings[2].startswith("captions: column text; 1 unique, 0 longer")


def test_check_names_what_takes_too_long_or_does_not_fit(bars_config: Config, monkeypatch: pytest.MonkeyPatch):
    unet = UNet(UNetConfig((32,), (False,), num_groups=8, in_channels=1, sample_size=8, context_dim=8))
    for gigabytes, names in ((0.001, ["train.max_steps", "train.batch_size", "train.keep_checkpoints"]), (1e3, [])):
        free = SimpleNamespace(free=gigabytes * 1e9)
        monkeypatch.setattr(preflight, "free_memory", lambda _, free=free: free.free)
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: free)
        problems = preflight._cost_problems(bars_config, unet, activations=1.0, hours=25.0 if names else 23.0)
        assert len(problems) == len(names)
        for problem, name in zip(problems, names, strict=True):
            assert f"set {name}" in problem


def test_activation_bytes_counts_tensors_saved_for_backward():
    """A linear layer saves its input, a sigmoid its output, the square of a sum that sum."""
    layer, x = torch.nn.Linear(10, 20), torch.randn(5, 10)
    assert activation_bytes(layer, lambda: layer(x).sigmoid().sum().square()) == 4 * (5 * 10 + 5 * 20 + 1)
    recomputed = partial(checkpoint, lambda x: layer(x).sigmoid(), use_reentrant=False)
    assert activation_bytes(layer, lambda: recomputed(x).sum().square()) == 4 * (5 * 10 + 1)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 0.5, 0.2], r"learns; start the run$"),
        ([1.0, 0.95, 0.9], r"slowly; train\.learning_rate \(0\.1\) .*low$"),
        ([1.0, 2.0, 5.0], r"not learn; train\.learning_rate \(0\.1\) .*high$"),
        ([1.0, float("nan")], r"not finite; (.|\n)*1\. train\.learning_rate \(0\.1\) .*high$"),
    ],
)
def test_verdict_depends_on_the_loss_curve(losses: list[float], expected: str):
    assert re.search(expected, "\n".join(verdict(losses, 0.1)))


def test_check_raises_the_errors_of_training(bars_config: Config):
    config = replace(bars_config, data=replace(bars_config.data, caption_column="lable"))
    with pytest.raises(UserError, match=r"'lable' .*\(did you mean 'label'\?\)"):
        list(check(config))
