"""The built-in data set and model are what their cards say."""

from copy import deepcopy
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from cond_diffusion import TextToImage
from cond_diffusion.config.run import Config, PredictionKind, load_config
from cond_diffusion.data.dataset import CaptionedImages, load_captioned_images
from cond_diffusion.diffusion.objective import Prediction
from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation.metrics import accuracy, load_or_train_classifier, renumber_groups
from cond_diffusion.images import from_pillow, to_bytes
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.from_pretrained()


@pytest.mark.slow
def test_a_classifier_of_real_digits_recognises_what_the_model_draws(pipe: TextToImage):
    """In short: 50 steps of the chain, and every wording of every digit once."""
    config = load_config(Config, BUILT_IN_MODEL / "config.yaml").data
    train, test = (load_captioned_images(config, split) for split in ("train", "test"))
    classifier = load_or_train_classifier(train)
    assert accuracy(classifier, renumber_groups(test, train.caption_groups)) > 0.99
    prompts = [(caption, group) for group, captions in enumerate(train.caption_groups) for caption in captions]
    images = pipe([caption for caption, _ in prompts], steps=50, progress=False)
    assert len(images) == 120
    drawn = to_bytes(torch.stack([from_pillow(image) for image in images]))
    groups = torch.tensor([group for _, group in prompts])
    assert accuracy(classifier, CaptionedImages(drawn, groups, train.caption_groups)) > 0.9


def in_double_precision(pipe: TextToImage) -> TextToImage:
    """The same pipeline, but for its network's rounding."""
    unet = deepcopy(pipe.unet).double()
    forward, project = unet.forward, unet.project_context
    unet.forward = lambda x_t, t, context: forward(x_t.double(), t, context).float()
    unet.project_context = lambda context: project(context.double())
    return TextToImage(unet, pipe.text_encoder, pipe.prediction, pipe.latent_space)


@pytest.mark.parametrize("options", [{"steps": 50}, {"steps": 20, "sampler": "ddim"}])
def test_a_picture_depends_on_its_prompt_and_seed_alone(pipe: TextToImage, options: dict[str, Any]):
    """In a batch of 1, 3 or 64, among other prompts or alone, but for rounding: matrix products of other sizes round
    otherwise, and the chain enlarges that. So the network computes in double precision here.
    """
    pipe = in_double_precision(pipe)
    last: list[Tensor] = []

    def callback_on_step_end(step: Step, number: int, total: int) -> None:
        if number == total - 1:
            last.append(step.x)

    for batch_size in (1, 3, 64):
        pipe(
            ["a digit two", "seven"],
            num_images=3,
            seed=5,
            batch_size=batch_size,
            callback_on_step_end=callback_on_step_end,
            **options,
        )
    alone, by_three, together = torch.cat(last).split(6)
    torch.testing.assert_close(by_three, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    last.clear()
    pipe("seven", seed=7, callback_on_step_end=callback_on_step_end, **options)
    torch.testing.assert_close(last[0], alone[5:], rtol=0, atol=1e-5)
    assert (alone[3] - alone[4]).abs().max() > 0.1


def test_the_noise_of_a_seed_is_the_same_bit_for_bit(pipe: TextToImage):
    together, alone = pipe._noise([5, 6, 7]), pipe._noise([6])
    for _ in range(3):
        assert torch.equal(together()[1], alone()[0])


def test_each_prompt_can_have_its_own_scale(pipe: TextToImage):
    both = pipe(["two", "seven"], guidance_scale=[1.0, 4.0], steps=5, batch_size=1, progress=False)
    apart = [pipe(p, guidance_scale=w, steps=5, progress=False)[0] for p, w in (("two", 1.0), ("seven", 4.0))]
    assert [image.tobytes() for image in both] == [image.tobytes() for image in apart]


def test_a_picture_is_changed_as_much_as_its_strength_says(pipe: TextToImage):
    image = pipe("a digit seven", steps=50, progress=False)[0]
    original = np.asarray(image, dtype=float)
    off = []
    for strength in (0.0, 0.2, 0.4, 0.8):
        (changed,) = pipe("a digit two", image=image, strength=strength, steps=50, progress=False)
        off.append(np.abs(np.asarray(changed) - original).mean())
    assert off[0] == 0
    assert off[0] < off[1] < off[2] < off[3]


def test_what_the_mask_keeps_stays_to_the_last_byte(pipe: TextToImage):
    image = pipe("a digit seven", steps=50, progress=False)[0]
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 14, 28, 28))  # the lower half is drawn anew
    for sampler, resamplings in (("ddpm", 1), ("ddpm", 2), ("unipc", 1)):
        (changed,) = pipe(
            "a digit nine", image=image, mask=mask, resamplings=resamplings, sampler=sampler, steps=20, seed=3
        )
        before, after = np.asarray(image, dtype=int), np.asarray(changed, dtype=int)
        assert (before[:14] == after[:14]).all()
        assert np.abs(before[14:] - after[14:]).max() > 50


def test_pictures_to_begin_with_are_made_to_fit(pipe: TextToImage):
    image, mask = Image.new("RGB", (90, 60), "red"), Image.new("1", (90, 60), 1)
    (drawn,) = pipe("two", image=image, mask=mask, steps=2, progress=False)
    assert (drawn.size, drawn.mode) == ((28, 28), "L")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength: applies only to an image"),
        ({"mask": Image.new("L", (28, 28))}, "mask: applies only to an image"),
        ({"resamplings": 2}, "resamplings: 2 applies only to a mask"),
        (
            {"image": Image.new("L", (28, 28)), "mask": Image.new("L", (20, 30))},
            "mask: 20 x 30 pixels do not fit the image's 28 x 28",
        ),
        ({"image": Image.new("L", (28, 28)), "strength": 2.0}, "strength: 2.0;"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale: 2 values for 1 prompts"),
        ({"guidance_interval": (5000, 6000)}, "guidance_interval: 5000 to 6000 lies beyond the 1000 timesteps"),
        ({"negative_prompt": "\udcff"}, "prompts: '\\udcff'"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 values for 1 prompts"),
        ({"seed": 1.5}, "seed: 1.5;"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(pipe: TextToImage, options: dict[str, Any], message: str):
    with pytest.raises(UserError) as refusal:
        pipe("seven", **options)
    assert message in str(refusal.value)


def test_options_take_integers_of_any_kind_and_none_is_the_default(pipe: TextToImage):
    options = {"steps": 2, "progress": False, "output_type": "pt"}
    plain = pipe(["two", "nine"], seed=[3, 4], negative_prompt="one", **options)
    other = pipe(["two", "nine"], seed=np.array([3, 4]).tolist(), negative_prompt=["one", "one"], **options)
    assert torch.equal(plain, other)
    default = pipe("two", **options)
    assert torch.equal(pipe("two", seed=None, negative_prompt=None, guidance_scale=None, **options), default)
    assert torch.equal(pipe("two", seed=np.int64(0), **options), default)
    each = pipe(["two", "nine"], negative_prompt=["one", "four"], batch_size=1, **options)
    assert torch.equal(each[1:], pipe("nine", negative_prompt="four", **options))
    (image,) = pipe("two", steps=2, progress=False)
    assert torch.equal(to_bytes(default), to_bytes(from_pillow(image)[None]))


@pytest.mark.parametrize("kind", ["score", "v_prediction"])
def test_what_the_network_predicts_is_saved_with_it(pipe: TextToImage, tmp_path: Path, kind: PredictionKind):
    TextToImage(pipe.unet, pipe.text_encoder, Prediction(kind, pipe.schedule), pipe.latent_space).save_pretrained(
        tmp_path
    )
    assert TextToImage.from_pretrained(tmp_path).prediction.kind == kind
    theirs = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    theirs.set_timesteps(10)
    x = torch.zeros(1, 1)
    if kind == "v_prediction":
        assert theirs.step(x, 999, x).prev_sample.shape == x.shape
    else:  # they have no name for it, and say so rather than draw something else
        with pytest.raises(ValueError, match="prediction_type given as score must be one of"):
            theirs.step(x, 999, x)


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
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".yaml", ".md", ".png", ".webp"}
    assert sum(file.stat().st_size for file in files) < 12e6


def test_a_notebook_shows_the_pipeline_in_words_and_its_pictures_as_a_grid(pipe: TextToImage):
    assert repr(pipe).startswith("TextToImage: 28 x 28, L, diffusion of pixels; 1.0 million parameters predict epsilon")
    images = pipe(["one", "two"], num_images=3, steps=1, progress=False)
    png = images._repr_png_()
    assert png is not None
    with Image.open(BytesIO(png)) as picture:
        assert picture.size == (3 * (3 * 30 - 2), 3 * (2 * 30 - 2))


def test_as_many_pictures_are_in_work_as_half_of_the_free_memory_holds(pipe: TextToImage, monkeypatch: Any):
    def with_free(gigabytes: float) -> int:
        free = SimpleNamespace(available=int(gigabytes * 1e9))
        monkeypatch.setattr("cond_diffusion.pipeline.text_to_image.virtual_memory", lambda: free)
        return pipe.max_batch_size()

    a_picture = 120 * 4 * 32 * 14 * 14 / 1e9
    assert [with_free(0), with_free(2 * 5.5 * a_picture), with_free(100)] == [1, 5, 64]
