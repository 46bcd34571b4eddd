"""Pretraining of a small CLIP: loss, tokenizer, and zero-shot accuracy."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SIDE
from transformers import CLIPModel, CLIPTokenizer

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import load_config
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.errors import UserError
from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER, TextEncoder
from cond_diffusion.pipeline.run_folder import RunLock
from cond_diffusion.training.clip_pretraining import (
    ClipPretrainingConfig,
    contrastive_loss,
    pretrain,
    train_tokenizer,
    zero_shot_accuracy,
)


def test_contrastive_loss_equals_clip_loss_if_all_groups_differ():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    diagonal = torch.arange(4)
    expected = (logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / -2
    torch.testing.assert_close(contrastive_loss(logits, diagonal, diagonal), expected)


def test_contrastive_loss_does_not_separate_captions_of_the_same_group():
    """For two images of group 0 and one of group 1, the optimum has equal logits for both captions of group 0."""
    image_groups, text_groups = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])
    optimum = 10.0 * (image_groups[:, None] == text_groups[None]).float()
    optimum.requires_grad_()
    loss = contrastive_loss(optimum, image_groups, text_groups)
    loss.backward()
    assert optimum.grad is not None
    assert optimum.grad.abs().max() < 1e-4
    assert contrastive_loss(10.0 * torch.eye(3), image_groups, text_groups) > loss + 1


def test_tokenizer_merges_frequent_pairs_and_encodes_any_text():
    tokenizer = train_tokenizer(["a digit seven", "a digit two"], vocab_size=600, max_length=16)
    assert tokenizer.tokenize("A digit  SEVEN") == ["a</w>", "digit</w>", "seven</w>"]
    assert len(tokenizer.tokenize("severe")) > 1
    ids = tokenizer("naïve 🦖").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids[:-1]


@pytest.mark.slow
def test_built_in_clip_classifies_mnist_zero_shot():
    """On the 10,000 test images, with each caption template of its training."""
    config = load_config(ClipPretrainingConfig, ROOT / "configs" / "clip_mnist.yaml")
    clip = CLIPModel.from_pretrained(BUILT_IN_ENCODER).eval()
    tokenizer = CLIPTokenizer.from_pretrained(BUILT_IN_ENCODER)
    accuracy = zero_shot_accuracy(clip, tokenizer, load_captioned_images(config.data, "test"), config.max_length)
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
    assert pretrain(config) == {"a bar that is upright": 1.0, "upright": 1.0}
    # transformers' classes load the result, and so does TextEncoder.
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    bars = load_captioned_images(data)
    accuracy = zero_shot_accuracy(clip, tokenizer, bars, config.max_length)
    assert accuracy == {"a bar that is upright": 1.0, "upright": 1.0}
    assert TextEncoder.from_pretrained(folder, max_length=16)(["level"]).shape == (1, 16, 32)
    with pytest.raises(UserError, match=f"^run_dir: {re.escape(str(folder))} "):
        pretrain(config)
