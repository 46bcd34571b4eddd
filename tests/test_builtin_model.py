"""The built-in data set and model are what their cards say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cond_diffusion import TextToImage
from cond_diffusion.config import Config, load_config
from cond_diffusion.data import load_captioned_images
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation import accuracy_on_real_images, kept_classifier, recognised
from cond_diffusion.pipeline import BUILT_IN_MODEL


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.from_pretrained()


@pytest.mark.slow
def test_a_classifier_of_real_digits_recognises_what_the_model_draws(pipe: TextToImage):
    """In short: 50 steps of the chain, and every wording of every digit once."""
    config = load_config(Config, BUILT_IN_MODEL / "config.yaml").data
    train, test = (load_captioned_images(config, split, progress=False) for split in ("train", "test"))
    classifier = kept_classifier(config, train)
    assert accuracy_on_real_images(classifier, train, test) > 0.99
    prompts = [(caption, group) for group, captions in enumerate(train.caption_groups) for caption in captions]
    images = pipe([caption for caption, _ in prompts], steps=50, progress=False)
    assert len(images) == 120
    right = recognised(classifier, images, [group for _, group in prompts])
    assert right.float().mean() > 0.9


def test_a_picture_depends_on_its_prompt_and_seed_alone(pipe: TextToImage):
    together = pipe(["a digit two", "seven"], num_images=3, steps=10, seed=5, batch_size=4, progress=False)
    alone = pipe("seven", num_images=1, steps=10, seed=7, progress=False)
    difference = np.asarray(together[5], dtype=int) - np.asarray(alone[0], dtype=int)
    assert np.abs(difference).max() <= 1  # a rounding of the last bit
    assert together[3].tobytes() != together[4].tobytes()


def test_no_prompts_are_refused(pipe: TextToImage):
    with pytest.raises(UserError, match="prompts: none given; expected at least one"):
        pipe([])


def test_drawing_does_not_touch_the_global_random_state(pipe: TextToImage):
    before = torch.get_rng_state()
    pipe("seven", steps=2, progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_a_saved_pipeline_draws_the_same(pipe: TextToImage, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path)
    first, second = (p("a digit three", steps=5, progress=False)[0] for p in (pipe, again))
    assert first.tobytes() == second.tobytes()


def test_the_weights_are_small_and_cannot_run_code():
    files = [file for file in BUILT_IN_MODEL.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".yaml", ".md", ".png"}
    assert sum(file.stat().st_size for file in files) < 12e6
