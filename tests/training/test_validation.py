"""What a run says about itself is true."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from cond_diffusion.config.run import Config
from cond_diffusion.data.cache import context_table
from cond_diffusion.data.dataset import CaptionedBatch
from cond_diffusion.data.loader import open_training_data
from cond_diffusion.diffusion.objective import Objective
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError
from cond_diffusion.models.latents import PixelPatchify
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.training.trainer import train
from cond_diffusion.training.validation import BUCKETS, EXAMPLES, Validator, findings, others


@pytest.fixture
def diagnosis(bars_config: Config) -> Validator:
    training_data = open_training_data(bars_config.data, seed=0)
    encoder = TextEncoder.from_pretrained("builtin", 16)
    contexts = context_table(encoder, training_data.captions(), Accelerator(cpu=True))
    return Validator(
        bars_config,
        training_data,
        contexts,
        Objective(bars_config.objective, NoiseSchedule(bars_config.schedule)),
        PixelPatchify(1),
    )


def test_the_held_out_loss_is_that_of_a_network_whose_error_is_known(diagnosis: Validator):
    """Always 0 leaves the mean of eps^2 in every part of the chain; the text cannot matter."""

    def zero(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    found = diagnosis.measure(zero, Accelerator(cpu=True))
    assert found is not None
    assert found.by_timestep == pytest.approx(
        [diagnosis.eps[diagnosis.bucket == i].square().mean().item() for i in range(BUCKETS)], rel=1e-5
    )
    assert found.true_caption == found.other_caption == found.no_caption
    assert found.true_caption == pytest.approx(1, abs=0.02)
    assert found.summary().endswith("no difference to speak of; so far the network ignores the text")
    assert diagnosis.bucket.bincount().tolist() == [EXAMPLES // BUCKETS] * BUCKETS
    assert diagnosis.t.sort().values.diff().max() <= 2  # all of the chain, evenly


def test_a_network_that_needs_the_text_is_said_to_use_it(diagnosis: Validator):
    """It knows the answer, and spoils it as far as the context is not the true one."""
    assert diagnosis.batch is not None
    true = diagnosis.contexts(diagnosis.batch.captions)
    calls = count()

    def knowing(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        first = next(calls) * len(x_t) % EXAMPLES
        here = slice(first, first + len(x_t))
        return diagnosis.eps[here] + 0.1 * (context - true[here]).flatten(1).norm(dim=1)[:, None, None, None]

    found = diagnosis.measure(knowing, Accelerator(cpu=True))
    assert found is not None
    assert found.true_caption == pytest.approx(0, abs=1e-9)
    assert found.difference > 3 * found.its_error
    assert found.no_caption > 0
    assert found.summary().endswith("the text is used")


def test_a_difference_counts_when_it_is_more_than_chance():
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(512, generator=draw, dtype=torch.float64)
    bucket = torch.arange(512) * BUCKETS // 512
    worse = 0.01 + 0.05 * torch.randn(512, generator=draw, dtype=torch.float64)
    assert findings(torch.stack([noise, noise + worse, noise]), bucket).text_is_used
    assert not findings(torch.stack([noise, noise + worse - 0.01, noise]), bucket).text_is_used
    assert not findings(torch.stack([noise, noise - worse, noise]), bucket).text_is_used
    assert not findings(torch.stack([noise, noise + 1e-4 * worse.abs(), noise]), bucket).text_is_used


def test_where_all_captions_are_the_same_nothing_is_said_of_the_text(diagnosis: Validator):
    assert diagnosis.batch is not None
    diagnosis.batch = CaptionedBatch(diagnosis.batch.images, ["level"] * EXAMPLES)
    found = diagnosis.measure(lambda x_t, t, context: x_t, Accelerator(cpu=True))
    assert found is not None
    assert found.summary().endswith("the held-out captions are all the same, so nothing can be said of the text")


def test_every_caption_is_set_against_another():
    assert others(["a", "a", "b", "c"]) == ["b", "b", "c", "a"]
    assert others(["a", "a"]) == ["a", "a"]


def test_the_run_reports_what_was_found_and_a_tracker_hears_it(
    bars_config: Config, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO", logger="cond_diffusion")
    config = replace(bars_config, track="tensorboard", train=replace(bars_config.train, evaluate_every=2))
    train(replace(config, train=replace(config.train, max_steps=2)))
    train(replace(config, resume=True))
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in told] == [2, 4]
    assert all(f"held_out_loss_bucket_{i}" in told[0] for i in range(BUCKETS))
    assert "step 4: held-out loss " in caplog.text
    assert lines[0]["memory_gb"] > 0
    (folder,) = {file.parent for file in Path(config.run_dir).rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("loss", "gradient_norm", "images_per_second", "memory_gb"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
    heard = [event.value for event in events.Scalars("held_out_loss")]
    assert heard == pytest.approx([line["held_out_loss"] for line in told])


def test_a_tracker_that_is_not_there_is_one_line(bars_config: Config):
    with pytest.raises(UserError, match=r"track: 'tensorbord' is no tracker \(did you mean 'tensorboard'\?\)"):
        train(replace(bars_config, track="tensorbord"))
    with pytest.raises(UserError, match="track: wandb is not installed; type: pip install wandb"):
        train(replace(bars_config, track="wandb"))
