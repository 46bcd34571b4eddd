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


def test_the_loss_is_clip_s_where_every_caption_means_something_else():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    diagonal = torch.arange(4)
    expected = (logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / -2
    torch.testing.assert_close(contrastive_loss(logits, diagonal, diagonal), expected)


def test_captions_that_mean_the_same_are_not_pushed_apart():
    """Two images of group 0, one of group 1; both captions of group 0 share the target, so equal logits are the
    optimum."""
    image_groups, text_groups = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])
    best = 10.0 * (image_groups[:, None] == text_groups[None]).float()
    best.requires_grad_()
    contrastive_loss(best, image_groups, text_groups).backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-4
    apart = 10.0 * torch.eye(3)
    assert (
        contrastive_loss(apart, image_groups, text_groups)
        > contrastive_loss(best.detach(), image_groups, text_groups) + 1
    )


def test_the_vocabulary_joins_what_is_common_and_reads_everything():
    tokenizer = train_tokenizer(["a digit seven", "a digit two"], vocab_size=600, max_length=16)
    assert tokenizer.tokenize("A digit  SEVEN") == ["a</w>", "digit</w>", "seven</w>"]
    assert len(tokenizer.tokenize("severe")) > 1
    ids = tokenizer("naïve 🦖").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids[:-1]


def test_the_built_in_clip_recognises_mnist_by_its_captions():
    """Zero-shot on the 10,000 test images, by every wording of the captions it was trained with."""
    config = load_config(ClipPretrainingConfig, ROOT / "configs" / "clip_mnist.yaml")
    clip = CLIPModel.from_pretrained(BUILT_IN_ENCODER).eval()
    tokenizer = CLIPTokenizer.from_pretrained(BUILT_IN_ENCODER)
    accuracy = zero_shot_accuracy(clip, tokenizer, load_captioned_images(config.data, "test"), config.max_length)
    assert len(accuracy) == 12
    assert min(accuracy.values()) > 0.97


@pytest.mark.slow
def test_a_small_clip_learns_to_tell_pictures_by_their_captions(bars_parquet: Path, tmp_path: Path):
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
        with pytest.raises(UserError, match="another process is training into"):
            pretrain(config)
    assert pretrain(config) == {"a bar that is upright": 1.0, "upright": 1.0}
    # Transformers' own classes open the result, and so does our text encoder.
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    bars = load_captioned_images(data)
    accuracy = zero_shot_accuracy(clip, tokenizer, bars, config.max_length)
    assert accuracy == {"a bar that is upright": 1.0, "upright": 1.0}
    assert TextEncoder.from_pretrained(folder, max_length=16)(["level"]).shape == (1, 16, 32)
    with pytest.raises(UserError, match="run_dir: .* exists"):
        pretrain(config)
