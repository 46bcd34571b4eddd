"""Validation against networks whose loss is known, and the metrics that a run logs."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import metrics
from safetensors.torch import load_file
from torch import Tensor

from cond_diffusion import TextToImage
from cond_diffusion.config.run import Config
from cond_diffusion.data.cache import context_table
from cond_diffusion.data.dataset import CaptionedBatch
from cond_diffusion.data.loader import open_training_data
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation.evaluator import held_out_loss
from cond_diffusion.models.latents import PixelPatchify
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.training.trainer import train
from cond_diffusion.training.validation import (
    NUM_BUCKETS,
    NUM_EXAMPLES,
    Validator,
    mismatched_captions,
    summarize_losses,
)


@pytest.fixture
def validator(bars_config: Config) -> Validator:
    training_data = open_training_data(bars_config.data, seed=0)
    encoder = TextEncoder.from_pretrained("builtin", 16)
    text_embedder = context_table(encoder, training_data.captions(), Accelerator(cpu=True))
    objective = Objective(bars_config.objective, NoiseSchedule(bars_config.schedule))
    return Validator(bars_config, training_data, text_embedder, objective, PixelPatchify(1))


def test_loss_of_a_network_that_predicts_zero_is_the_mean_of_eps_squared(validator: Validator):
    def zero(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    result = validator.measure(zero, Accelerator(cpu=True))
    assert result is not None
    assert result.by_timestep == pytest.approx(
        [validator.eps[validator.bucket == i].square().mean().item() for i in range(NUM_BUCKETS)], rel=1e-5
    )
    assert result.true_caption == result.other_caption == result.no_caption
    assert result.true_caption == pytest.approx(1, abs=0.02)
    assert not result.text_is_used
    assert not result.captions_are_alike
    assert "ignores the text" in result.summary()
    assert validator.bucket.bincount().tolist() == [NUM_EXAMPLES // NUM_BUCKETS] * NUM_BUCKETS
    assert validator.t.sort().values.diff().max() <= 2  # evenly spaced over all timesteps


def test_a_network_that_needs_the_true_caption_uses_the_text(validator: Validator):
    """Its error is proportional to the distance from the true text embedding."""
    assert validator.batch is not None
    true_context = validator.text_embedder(validator.batch.captions)
    calls = count()

    def text_dependent(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        first = next(calls) // 3 * len(x_t)  # of three captions each
        rows = slice(first, first + len(x_t))
        distance = (context - true_context[rows]).flatten(1).norm(dim=1)
        return validator.eps[rows] + 0.1 * distance[:, None, None, None]

    result = validator.measure(text_dependent, Accelerator(cpu=True))
    assert result is not None
    assert result.true_caption == pytest.approx(0, abs=1e-9)
    assert result.difference > 3 * result.its_error
    assert result.no_caption > 0
    assert result.text_is_used
    assert "uses the text" in result.summary()


def test_text_is_used_only_if_the_difference_is_significant():
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(512, generator=generator, dtype=torch.float64)
    bucket = torch.arange(512) * NUM_BUCKETS // 512
    difference = 0.01 + 0.05 * torch.randn(512, generator=generator, dtype=torch.float64)

    def text_is_used(difference: Tensor) -> bool:
        return summarize_losses(torch.stack([loss, loss + difference, loss]), bucket).text_is_used

    assert text_is_used(difference)
    assert not text_is_used(difference - 0.01)
    assert not text_is_used(-difference)
    assert not text_is_used(1e-4 * difference.abs())


def test_use_of_the_text_is_not_reported_if_all_captions_are_the_same(validator: Validator):
    assert validator.batch is not None
    validator.batch = CaptionedBatch(validator.batch.images, ["level"] * NUM_EXAMPLES)
    result = validator.measure(lambda x_t, t, context: x_t, Accelerator(cpu=True))
    assert result is not None
    assert result.captions_are_alike
    assert "uses the text" not in result.summary()
    assert "ignores the text" not in result.summary()


def test_each_caption_is_paired_with_a_different_one():
    assert mismatched_captions(["a", "a", "b", "c"]) == ["b", "b", "c", "a"]
    assert mismatched_captions(["a", "a"]) == ["a", "a"]


@pytest.mark.usefixtures("short_validation")
def test_held_out_loss_is_written_to_metrics_and_tracker(
    bars_config: Config, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO", logger="cond_diffusion")
    config = replace(bars_config, track="tensorboard", train=replace(bars_config.train, evaluate_every=2))
    train(replace(config, train=replace(config.train, max_steps=2)))
    train(replace(config, resume=True))
    lines = metrics(Path(config.run_dir))
    validations = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in validations] == [2, 4]
    assert all(f"held_out_loss_bucket_{i}" in validations[0] for i in range(NUM_BUCKETS))
    assert f"step 4: held-out loss {validations[1]['held_out_loss']:.4f}" in caplog.text
    assert lines[0]["memory_gb"] > 0
    (folder,) = {file.parent for file in Path(config.run_dir).rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("loss", "gradient_norm", "images_per_second", "memory_gb"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
    tracked = [event.value for event in events.Scalars("held_out_loss")]
    assert tracked == pytest.approx([line["held_out_loss"] for line in validations])


@pytest.mark.usefixtures("short_validation")
def test_the_held_out_loss_is_that_of_the_averaged_weights(bars_config: Config):
    config = replace(bars_config, train=replace(bars_config.train, evaluate_every=4, learning_rate=1e-2))
    newest = train(config)
    (logged,) = [line["held_out_loss"] for line in metrics(Path(config.run_dir)) if "held_out_loss" in line]
    pipe, data = TextToImage.from_pretrained(newest), open_training_data(config.data, config.seed)

    def true_caption() -> float:
        found = held_out_loss(pipe, config, data)
        assert found is not None
        return found["true_caption"]

    assert true_caption() == pytest.approx(logged, rel=1e-5)
    pipe.unet.load_state_dict(load_file(newest / "state" / "unet.safetensors"))
    assert abs(true_caption() / logged - 1) > 1e-3


def test_an_unknown_or_missing_tracker_is_a_user_error(bars_config: Config):
    with pytest.raises(UserError, match=r"^track: 'tensorbord' .*\(did you mean 'tensorboard'\?\)"):
        train(replace(bars_config, track="tensorbord"))
    with pytest.raises(UserError, match=r"^track: wandb .*pip install wandb"):
        train(replace(bars_config, track="wandb"))
