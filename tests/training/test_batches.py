"""Captions, timesteps and dropout of the training samples, as functions of the sample alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.loader import open_training_data
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.models.latents import PixelPatchify
from cond_diffusion.seeding import generator
from cond_diffusion.training.batches import Batches, MicroBatch, drop_phrases


def test_phrases_are_dropped_independently_with_the_given_probability():
    count, rate, phrases = 4000, 0.3, ("1,000 apples", "red", "in 3d")
    drawn = Counter(drop_phrases(", ".join(phrases), rate, generator("phrases", i)) for i in range(count))
    assert len(drawn) == 8
    for caption, times in drawn.items():
        kept = sum(phrase in caption for phrase in phrases)
        assert caption == ", ".join(phrase for phrase in phrases if phrase in caption)
        share = (1 - rate) ** kept * rate ** (3 - kept)
        assert times / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)
    for caption in ("a single phrase", "1,000 apples", ""):
        assert drop_phrases(caption, 0.9, generator("phrases", 0)) == caption
    assert drop_phrases("as , it stands", 0.0, generator("phrases", 0)) == "as , it stands"
    drawn = Counter(drop_phrases("room 1,solo,2 girls", rate, generator("phrases", i)) for i in range(100))
    assert "room 1, 2 girls" in drawn  # without the space, this would be the number 1,2


def first_step(folder: Path, *changes: str) -> tuple[MicroBatch, list[str]]:
    """Return the batch of the first step of a run on a folder of images, and its captions; embeddings are lengths."""
    seen: list[str] = []

    def embed(captions: Any) -> Tensor:
        seen.extend(captions)
        return torch.tensor([[[len(caption)]] for caption in captions], dtype=torch.float32)

    data = [f"data.source={folder}", "data.resolution=8", "data.held_out=0", "latent.patch_size=1"]
    config = load_config(Config, overrides=[*data, "train.caption_dropout=0", *changes])
    objective = Objective(config.objective, NoiseSchedule(config.schedule))
    training_data, accelerator = open_training_data(config.data, 0), Accelerator(cpu=True)
    batches = Batches(config, training_data, embed, objective, accelerator, 0, PixelPatchify(1))
    seen.clear()
    parts = list(batches.next_step())
    return MicroBatch(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0]))), seen


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_first_caption_has_its_own_probability_and_the_captions_share_the_rest(tmp_path: Path, share: float):
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    names = ["first", "second", "third"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "image.png", "text": names}), encoding="utf-8")
    count = 4000
    _, seen = first_step(tmp_path, f"train.first_caption={share}", f"train.batch_size={count}")
    for name, own in zip(names, (share, 0.0, 0.0), strict=True):
        probability = own + (1 - share) / 3
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert seen.count(name) / count == pytest.approx(probability, abs=4 * deviation)


def test_captions_are_dropped_with_the_given_probability_which_leaves_the_other_draws(tmp_path: Path):
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "image.txt").write_text("a caption", encoding="utf-8")
    count, rate = 4000, 0.3
    whole, _ = first_step(tmp_path, f"train.batch_size={count}")
    dropped, _ = first_step(tmp_path, f"train.batch_size={count}", f"train.caption_dropout={rate}")
    is_null = dropped.context.flatten() == 0  # the length of the empty caption
    assert is_null.double().mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / count) ** 0.5)
    assert torch.equal(dropped.context[~is_null], whole.context[~is_null])
    for name in ("x_0", "t", "eps"):
        assert torch.equal(getattr(dropped, name), getattr(whole, name))


def test_timesteps_are_drawn_from_the_density_of_the_objective(tmp_path: Path):
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "image.txt").write_text("a caption", encoding="utf-8")
    count, share = 4000, 5 / 8  # of the noisiest quarter, whose timesteps are five times as probable
    batch, _ = first_step(tmp_path, f"train.batch_size={count}", "objective.timesteps=later")
    is_late = (batch.t >= 750).double().mean().item()
    assert is_late == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_dropped_phrases_depend_on_the_sample_alone_and_leave_its_other_draws(tmp_path: Path):
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"{i}, gray, plain", encoding="utf-8")
    whole, captions = first_step(tmp_path, "train.batch_size=8")
    assert all(caption.endswith(", gray, plain") for caption in captions)
    dropped, captions = first_step(tmp_path, "train.batch_size=8", "train.phrase_dropout=0.5")
    assert len({*captions}) > 4
    in_parts = ("train.batch_size=2", "train.gradient_accumulation_steps=4")
    divided, captions_in_parts = first_step(tmp_path, *in_parts, "train.phrase_dropout=0.5")
    assert captions_in_parts == captions
    for name, value in vars(dropped).items():
        assert torch.equal(value, getattr(divided, name))
        assert torch.equal(value, getattr(whole, name)) == (name != "context")
