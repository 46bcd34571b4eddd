"""Pretraining of a small CLIP: loss, tokenizer, accuracies, resuming, and as the first part of a run."""

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SIDE, metrics
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from cond_diffusion import TextToImage, train
from cond_diffusion.cli import main
from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import ClipPretrainingConfig, Config, load_config
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.errors import Interrupted, UserError
from cond_diffusion.models.clip import ClipJudge, build_clip, contrastive_loss, count_whole_words, train_tokenizer
from cond_diffusion.models.text_encoder import TextEncoder, embed_texts
from cond_diffusion.pipeline.run_folder import RunLock, checkpoints
from cond_diffusion.training import preflight
from cond_diffusion.training.clip_pretraining import pretrain, retrieval_accuracy, training_loss, zero_shot_accuracy
from cond_diffusion.training.preflight import check
from cond_diffusion.training.reporting import Reporter

COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """A folder of transparent images: a disk of one of four colors, upright or level."""
    folder = tmp_path / "disks"
    folder.mkdir()
    lines = []
    for i in range(24):
        color, place = list(COLORS)[i % 4], ("left", "right")[i // 4 % 2]
        pixels = np.zeros((SIDE, SIDE, 4), dtype=np.uint8)
        pixels[2 + i // 8 : 5 + i // 8, slice(0, 4) if place == "left" else slice(4, 8)] = (*COLORS[color], 255)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {color} bar at the {place}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def small_clip(disks: Path, tmp_path: Path) -> ClipPretrainingConfig:
    data = DataConfig(source=str(disks), resolution=SIDE, channels=3, background="gray")
    sizes = {"vocab_size": 700, "patch_size": 4, "width": 32, "layers": 1, "batch_size": 16}
    steps = {"max_steps": 12, "warmup_steps": 2, "checkpoint_every": 3, "log_every": 1}
    return ClipPretrainingConfig(run_dir=str(tmp_path / "clip"), data=data, **sizes, **steps)


class Killed(BaseException):
    """Ends training as SIGKILL does: nothing is saved after it."""


def at_step(monkeypatch: pytest.MonkeyPatch, step: int | None, action: Callable[[], None]) -> None:
    """Perform an action when a step has been logged, before it can be saved; None: at no step."""
    log = vars(Reporter).get("unpatched", Reporter.log)

    def log_and_act(self: Reporter, global_step: int, *values: Any) -> None:
        log(self, global_step, *values)
        if global_step == step:
            action()

    monkeypatch.setattr(Reporter, "unpatched", log, raising=False)
    monkeypatch.setattr(Reporter, "log", log_and_act)


def kill() -> None:
    raise Killed


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_contrastive_loss_equals_clip_loss_if_all_groups_differ():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    expected = (logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / -2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(4, dtype=torch.bool)), expected)


def test_contrastive_loss_does_not_separate_captions_of_the_same_group():
    """For two images of group 0 and one of group 1, the optimum has equal logits for both captions of group 0."""
    groups = torch.tensor([0, 0, 1])
    is_positive = groups[:, None] == groups[None]
    optimum = (10.0 * is_positive.float()).requires_grad_()
    loss = contrastive_loss(optimum, is_positive)
    loss.backward()
    assert optimum.grad is not None
    assert optimum.grad.abs().max() < 1e-4
    assert contrastive_loss(10.0 * torch.eye(3), is_positive) > loss + 1


def test_every_caption_of_an_image_is_positive(small_clip: ClipPretrainingConfig, monkeypatch: pytest.MonkeyPatch):
    """Images share captions although their lists of captions differ: they are not each other's negatives."""
    data = load_captioned_images(small_clip.data)
    groups = (("apple", "red apple"), ("apple", "green apple"), ("pear",))
    data = replace(data, caption_groups=groups, group_of=torch.arange(len(data)) % 3)
    received = []
    monkeypatch.setattr(
        "cond_diffusion.training.clip_pretraining.contrastive_loss",
        lambda logits, is_positive: received.append(is_positive) or logits.sum(),
    )
    texts: list[str] = []
    tokenizer = train_tokenizer(["red apple"], 600, 16)
    clip = build_clip(small_clip, tokenizer)
    monkeypatch.setattr(
        "cond_diffusion.models.text_encoder.embed_texts",
        lambda clip, tokenizer, captions, length: (
            texts.extend(captions) or embed_texts(clip, tokenizer, captions, length)
        ),
    )
    training_loss(clip, tokenizer, data, replace(small_clip, batch_size=24), 0, bf16=False)
    assert sorted(texts) == ["apple", "green apple", "pear", "red apple"]
    rows = {tuple(sorted(text for text, own in zip(texts, row, strict=True) if own)) for row in received[0].tolist()}
    assert rows == {tuple(sorted(group)) for group in groups}


def test_tokenizer_merges_frequent_pairs_and_encodes_any_text():
    tokenizer = train_tokenizer(["a digit seven", "a digit two"], vocab_size=600, max_length=16)
    assert tokenizer.tokenize("A digit  SEVEN") == ["a</w>", "digit</w>", "seven</w>"]
    assert len(tokenizer.tokenize("severe")) > 1
    ids = tokenizer("naïve 🦖").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids[:-1]
    words = [first + second for first in "abcdefg" for second in "hijklm"]  # all pairs are equally frequent
    vocabularies = [train_tokenizer(words, 540, 16).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert len(vocabularies[0]) == 540
    assert count_whole_words(tokenizer, ["Seven digits, a digit"]) == (2, 3)


def test_retrieval_ranks_an_own_caption_among_all_distinct_captions(
    small_clip: ClipPretrainingConfig, monkeypatch: pytest.MonkeyPatch
):
    """Known embeddings: of three images one has its caption first, one second, and one sixth."""
    data = load_captioned_images(small_clip.data)
    groups = (("a", "other a"), ("b",), ("c", "d", "e", "f", "g"), ("h",))
    data = replace(data, images=data.images[:3], group_of=torch.tensor([0, 1, 3]), caption_groups=groups)
    scores = torch.tensor([[9, 8, 1, 1, 1, 1, 1, 1, 1], [9, 0, 8, 1, 1, 1, 1, 1, 1], [9, 8, 7, 6, 5, 1, 1, 1, 4]])
    monkeypatch.setattr(ClipJudge, "forward", lambda *_: scores.float())
    monkeypatch.setattr(ClipJudge, "texts", lambda *_: torch.eye(9))
    tokenizer = train_tokenizer(["a"], 600, 16)
    accuracy = retrieval_accuracy(ClipJudge(build_clip(small_clip, tokenizer), tokenizer, None, 16), data)
    assert accuracy == {"top-1": pytest.approx(1 / 3), "top-5": pytest.approx(2 / 3)}


@pytest.mark.slow
def test_built_in_clip_classifies_mnist_zero_shot():
    """On the 10,000 test images, with each caption template of its training."""
    config = load_config(ClipPretrainingConfig, ROOT / "configs" / "clip_mnist.yaml")
    clip = ClipJudge.from_pretrained("builtin", config.max_length)
    accuracy = zero_shot_accuracy(clip, load_captioned_images(config.data, "test"))
    assert len(accuracy) == 12
    assert min(accuracy.values()) > 0.97


@pytest.mark.slow
def test_pretrained_clip_classifies_images_by_their_captions(bars_parquet: Path, tmp_path: Path):
    data = DataConfig(
        source=str(bars_parquet),
        caption_column="label",
        caption_templates=("a bar that is {label}", "{label}"),
        resolution=SIDE,
    )
    config = ClipPretrainingConfig(
        run_dir=str(tmp_path / "clip"),
        data=data,
        test_split="train",
        vocab_size=600,
        patch_size=4,
        width=32,
        layers=2,
        batch_size=32,
        max_steps=120,
        warmup_steps=20,
        learning_rate=2e-3,
    )
    folder = tmp_path / "clip"
    folder.mkdir()
    with RunLock(folder) as other:
        other.acquire()
        with pytest.raises(UserError, match=r"^run_dir: .* in use"):
            pretrain(config)
    templates = {f"zero-shot accuracy, captions such as {name!r}": 1.0 for name in ("a bar that is upright", "upright")}
    retrieval = {f"retrieval of an own caption, {name}": 1.0 for name in ("top-1", "top-5")}
    assert pretrain(config) == ("train", templates | retrieval)
    # transformers' classes load the result, and so does TextEncoder.
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    bars = load_captioned_images(data)
    accuracy = zero_shot_accuracy(ClipJudge(clip, tokenizer, None, config.max_length), bars)
    assert accuracy == {"a bar that is upright": 1.0, "upright": 1.0}
    assert TextEncoder.from_pretrained(folder, max_length=16)(["level"]).shape == (1, 16, 32)
    with pytest.raises(UserError, match=f"^run_dir: {re.escape(str(folder))} "):
        pretrain(config)


@pytest.mark.slow
def test_killed_clip_pretraining_equals_an_uninterrupted_one(
    small_clip: ClipPretrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Bit for bit; killed before the first checkpoint, after one, and at the last step; and ended by a signal."""
    split, expected = pretrain(small_clip)
    assert (split, len(expected)) == ("train", 2)  # the set has no split `test`
    assert "test_split: " in caplog.text
    killed = replace(small_clip, run_dir=str(tmp_path / "killed"), resume=True)
    endings = [(2, kill, Killed), (5, send_sigterm, Interrupted), (8, kill, Killed), (12, kill, Killed)]
    for step, action, ending in endings:
        at_step(monkeypatch, step, action)
        with pytest.raises(ending):
            pretrain(killed)
        if ending is Interrupted:
            assert checkpoints(Path(killed.run_dir))[-1].name == "step-00000005"
    assert not (Path(killed.run_dir) / "config.json").exists()
    at_step(monkeypatch, None, kill)
    for _ in range(2):  # resuming a finished one trains nothing and measures again
        assert pretrain(killed) == ("train", expected)
    folders = [Path(config.run_dir) for config in (small_clip, killed)]
    for name in ("model.safetensors", "checkpoints/step-00000012/state/optimizer.safetensors"):
        first, second = (load_file(folder / name) for folder in folders)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    losses = [[(line["step"], line["loss"]) for line in metrics(folder)] for folder in folders]
    assert losses[0] == losses[1]
    assert [path.name for path in checkpoints(folders[1])] == ["step-00000009", "step-00000012"]
    with pytest.raises(UserError, match=r"^run_dir: "):
        pretrain(replace(killed, resume=False))
    with pytest.raises(UserError, match=r"^resume: width .*32.*64"):
        pretrain(replace(killed, width=64))
    assert not re.search("data changed|truncated", caplog.text)
    file = Path(killed.data.source) / "metadata.jsonl"
    file.write_text(
        file.read_text(encoding="utf-8").replace("a red bar", "a red bar of 3 x 4 pixels"), encoding="utf-8"
    )
    pretrain(killed)
    assert "resume: the data changed" in caplog.text
    pretrain(replace(small_clip, run_dir=str(tmp_path / "short"), max_length=7, max_steps=3))
    assert "8 of 8 captions are longer than 7 tokens" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("streaming", True), ("crop", "random"), ("flip", True)])
def test_pretraining_refuses_options_that_it_would_ignore(small_clip: ClipPretrainingConfig, name: str, value: Any):
    with pytest.raises(UserError, match=f"^data\\.{name}: {value} "):
        pretrain(replace(small_clip, data=replace(small_clip.data, **{name: value})))


def test_bf16_runs_the_networks_under_autocast_on_fp32_weights(small_clip: ClipPretrainingConfig):
    data = load_captioned_images(small_clip.data)
    tokenizer = train_tokenizer([caption for group in data.caption_groups for caption in group], 700, 16)
    torch.manual_seed(0)
    clip = build_clip(small_clip, tokenizer)
    losses = [training_loss(clip, tokenizer, data, small_clip, 0, bf16=bf16) for bf16 in (False, True)]
    losses[1].backward()
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert 0 < abs(losses[0].item() - losses[1].item()) < 0.1
    parameters = list(clip.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)


@pytest.mark.slow
def test_a_run_pretrains_its_text_encoder_and_resumes_within_it(
    disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    overrides = [f"data.source={disks}", f"data.resolution={SIDE}", "latent.patch_size=2", "text.pretrain_steps=4"]
    overrides += ["unet.channels=[32,32]", "unet.num_groups=8", "train.batch_size=8", "train.max_steps=4"]
    overrides += ["train.warmup_steps=1", "train.checkpoint_every=2", "train.sample_every=4", "train.log_every=1"]
    overrides += ["sample.steps=2", "sample.num_images=1", f"run_dir={tmp_path / 'run'}", "text.split_phrases=true"]
    config = load_config(Config, ROOT / "configs" / "folder.yaml", overrides)
    checkpoint = train(replace(config, run_dir=str(tmp_path / "uninterrupted")))
    resume = replace(config, resume=True)
    at_step(monkeypatch, 2, kill)
    with pytest.raises(Killed):
        train(config)  # in the CLIP, without a checkpoint
    with pytest.raises(UserError, match=r"^run_dir: "):
        train(config)
    at_step(monkeypatch, 3, send_sigterm)
    with pytest.raises(Interrupted):
        train(resume)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [path.name for path in checkpoints(tmp_path / "run" / "text_encoder")] == ["step-00000003"]
    at_step(monkeypatch, 3, kill)
    with pytest.raises(Killed):
        train(resume)  # after the CLIP, in the network
    at_step(monkeypatch, None, kill)
    resumed = train(resume)
    assert [line["step"] for line in metrics(tmp_path / "run" / "text_encoder")] == [4]
    for name in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        first, second = (load_file(folder / name) for folder in (checkpoint, resumed))
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    # The grid has one column for each of the 8 captions.
    with Image.open(tmp_path / "run" / "samples" / "step-00000004.png") as grid:
        assert grid.size == (8 * (SIDE + 2) - 2, SIDE)
    # A checkpoint does not need the folder of the CLIP, and neither does another run that starts from it.
    (tmp_path / "run" / "text_encoder").rename(tmp_path / "moved")
    pipe = TextToImage.from_pretrained(tmp_path / "run")
    assert pipe.text_encoder.unknown_words(["a red bar at the left"]) == []
    assert pipe.text_encoder.split_phrases
    assert pipe(["a red bar at the left"], steps=2, progress=False)[0].size == (SIDE, SIDE)
    further = train(replace(config, init_from=str(resumed), run_dir=str(tmp_path / "further")))
    first, second = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (resumed, further))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_pretraining_a_text_encoder_refuses_a_stream(disks: Path, tmp_path: Path):
    config = load_config(Config, overrides=[f"data.source={disks}", "text.encoder=pretrain", "data.streaming=true"])
    with pytest.raises(UserError, match=r"^text\.encoder: pretrain "):
        train(replace(config, run_dir=str(tmp_path / "run")))


@pytest.mark.slow
def test_the_command_reports_retrieval_and_continues(
    small_clip: ClipPretrainingConfig, capsys: pytest.CaptureFixture[str]
):
    arguments = [f"data.source={small_clip.data.source}", f"data.resolution={SIDE}", "data.channels=3", "layers=1"]
    arguments += ["max_steps=2", "warmup_steps=1", "batch_size=8", "mixed_precision=bf16", "test_split=train"]
    arguments += [f"run_dir={small_clip.run_dir}"]
    assert main.main(["pretrain-clip", *arguments]) == 0
    assert re.search(r"top-1: [\d.]+%\n.*top-5: [\d.]+%\n", capsys.readouterr().out)
    assert main.main(["pretrain-clip", *arguments]) == 2
    assert main.main(["pretrain-clip", *arguments, "max_steps=3", "resume=true"]) == 0
    assert [line["step"] for line in metrics(Path(small_clip.run_dir))] == [2, 3]


@pytest.mark.slow
def test_check_reports_the_clip_that_is_trained_first(disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "MAX_OVERFIT_STEPS", 2)
    overrides = [f"data.source={disks}", f"data.resolution={SIDE}", "latent.patch_size=2", "text.pretrain_steps=4"]
    overrides += ["unet.channels=[32,32]", "unet.num_groups=8", "train.batch_size=8", "run_dir=run"]
    lines = list(check(load_config(Config, ROOT / "configs" / "folder.yaml", overrides)))
    (line,) = (line for line in lines if line.startswith("text.encoder: "))
    assert "4 steps" in line
    assert "8 of 8 distinct words" in line  # the article is shorter than the words that are counted
    assert not any("text.encoder" in line or "truncated; set" in line for line in lines if line.startswith("  "))
    assert not Path("run").exists()
