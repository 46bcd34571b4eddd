"""What a picture remembers, films and attention maps."""

import json
import re
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.nn import functional as F

from cond_diffusion import TextToImage, __version__
from cond_diffusion.attention_maps import AttentionMaps, attention_weights, maps_of_words, sheet
from cond_diffusion.drawing import draw_to_file, recorded_words
from cond_diffusion.errors import UserError
from cond_diffusion.film import FRAMES, Film
from cond_diffusion.layers import Attention
from cond_diffusion.pictures import settings_of, to_pillow
from cond_diffusion.samplers import Step


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.from_pretrained()


def watched(number: int) -> Step:
    """A step whose pictures tell its number: x is as bright as it, x_0_hat the other way round."""
    brightness = number / 127.5 - 1
    return Step(0, torch.full((2, 1, 4, 4), brightness), torch.full((2, 1, 4, 4), -brightness))


@pytest.mark.parametrize("total", [1, 7, FRAMES, 100, 250])
def test_a_film_has_the_last_step_and_evenly_spaced_ones_before(total: int):
    film = Film()
    for batch in range(2):
        for number in range(total):
            film(watched(number), number, total)
        assert len(film.frames) == min(FRAMES, total), batch
    shown = [left[0].getpixel((0, 0)) for left, _ in film.frames]
    assert shown[-1] == total - 1
    gaps = {later - earlier for earlier, later in pairwise(shown)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
    assert all(len(left) == len(right) == 4 for left, right in film.frames)  # two batches of two


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_film_is_an_animation_of_x_t_beside_x_0_hat(tmp_path: Path, suffix: str):
    film = Film()
    for number in range(0, 250, 50):
        film(watched(number), number // 50, 5)
    film.save(tmp_path / f"film{suffix}", columns=2)
    with Image.open(tmp_path / f"film{suffix}") as animation:
        assert getattr(animation, "n_frames", 1) == 5
        animation.seek(4)
        frame = animation.convert("L")
        left, right = frame.getpixel((2, 2)), frame.getpixel((frame.width - 3, 2))
        assert isinstance(left, int | float)
        assert isinstance(right, int | float)
        assert abs(left - 200) < 8
        assert abs(right - 55) < 8


def test_attention_weights_are_those_that_the_attention_uses():
    torch.manual_seed(0)
    attention = Attention(8, 6, num_heads=2)
    x, context = torch.randn(3, 16, 8), torch.randn(3, 5, 6)
    keys, values = attention.keys_values(context)
    weights = attention_weights(attention, x, keys, side=4)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 4, 4))
    # Values that only name their token come out of the attention as its weights.
    names = torch.eye(5).expand(3, 2, 5, 5)
    queries = attention._split_heads(attention.to_q(x))
    expected = F.scaled_dot_product_attention(queries, keys, names).mean(1)
    torch.testing.assert_close(weights, expected.transpose(1, 2).reshape(3, 5, 4, 4))
    assert values.shape == keys.shape


def test_maps_average_over_all_that_was_heard_and_leave_the_network_as_it_was(pipe: TextToImage):
    drawn = pipe(["a digit seven", "two"], num_images=2, steps=3, sampler="heun", batch_size=3)
    with AttentionMaps(pipe.unet, pipe.side) as maps:
        again = pipe(["a digit seven", "two"], num_images=2, steps=3, sampler="heun", batch_size=3, watch=maps)
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in again]
    assert len(maps.maps) == 4
    for of_tokens in maps.maps:
        assert of_tokens.shape == (16, 28, 28)
        torch.testing.assert_close(of_tokens.sum(0), torch.ones(28, 28))
    heard = len(maps.heard)
    pipe("two", steps=1, progress=False)
    assert len(maps.heard) == heard  # nobody listens any more


def test_words_find_their_tokens(pipe: TextToImage):
    of_tokens = torch.arange(16.0)[:, None, None].expand(16, 28, 28)
    words = maps_of_words("a digit  seven", of_tokens, pipe.text_encoder)
    assert [word for word, _ in words] == ["a", "digit", "seven"]
    tokens = [tokens for _, tokens in pipe.text_encoder.words("a digit  seven")]
    in_order = list(chain.from_iterable(tokens))
    assert in_order == list(range(1, len(in_order) + 1))
    for (_, heat), places in zip(words, tokens, strict=True):
        assert heat[0, 0] == sum(places) / len(places)
    cut = pipe.text_encoder.words("one " * 30)
    assert cut[-1][1][-1] == 14  # the last place is the mark at the end


def test_a_hot_place_is_yellow_and_a_cold_one_blue():
    heat = torch.zeros(28, 28)
    heat[:, 14:] = 0.3
    (grey,) = to_pillow(torch.zeros(1, 1, 28, 28))
    page = sheet([(grey, [("warm", heat)]), (grey, [("warm", heat), ("er", heat)])])
    assert page.width == 3 * 114 - 2
    cold, hot = (page.getpixel((114 + x, 60)) for x in (10, 100))
    assert isinstance(cold, tuple)
    assert isinstance(hot, tuple)
    assert hot[0] > cold[0] + 50
    assert hot[1] > cold[1] + 50
    assert hot[2] < cold[2]


OPTIONS = {
    "num_images": 2,
    "seed": 3,
    "sampler": "ddim",
    "steps": 3,
    "eta": 0.5,
    "guidance_scale": [2.0, 4.0],
    "guidance_interval": [100, 900],
    "negative_prompt": "two",
    "image": None,
    "mask": None,
    "strength": None,
}


def draw(prompts: list[str], output: Path, **changes: object) -> None:
    draw_to_file(
        prompts, {**OPTIONS, **changes}, checkpoint="builtin", output=str(output), film=None, attention_maps=None
    )


def test_a_picture_says_in_its_text_chunks_how_it_was_drawn(tmp_path: Path):
    prompts = ["seven", 'a "näive" digit']
    draw(prompts, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        chunks = {name: json.loads(value) for name, value in picture.text.items()}  # type: ignore[attr-defined]
    assert chunks == {
        "cond_diffusion:prompts": prompts,
        "cond_diffusion:num_images": "2",
        "cond_diffusion:seed": "3",
        "cond_diffusion:sampler": "ddim",
        "cond_diffusion:steps": "3",
        "cond_diffusion:eta": "0.5",
        "cond_diffusion:guidance_scale": "2.0,4.0",
        "cond_diffusion:guidance_interval": "100,900",
        "cond_diffusion:negative_prompt": "two",
        "cond_diffusion:checkpoint": "builtin",
        "cond_diffusion:version": __version__,
    }


def test_no_steps_given_are_written_down_as_the_number_that_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TextToImage, "__call__", lambda *_, **__: to_pillow(torch.zeros(1, 1, 28, 28)))
    draw(["seven"], tmp_path / "x.png", num_images=1, steps=None)
    assert settings_of(str(tmp_path / "x.png"))["steps"] == "1000"


def test_another_version_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    chunks = PngImagePlugin.PngInfo()
    for name, value in (("prompts", ["a"]), ("version", "0.0.1"), ("seed", "5")):
        chunks.add_itxt(f"cond_diffusion:{name}", json.dumps(value))
    Image.new("L", (2, 2)).save(tmp_path / "old.png", pnginfo=chunks)
    assert recorded_words(str(tmp_path / "old.png")) == (["a"], ["--seed=5"])
    assert re.search(r"old.png was drawn by version 0.0.1; this is [\d.]+", caplog.text)


def test_a_picture_without_settings_is_refused(tmp_path: Path):
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="plain.png does not say how it was drawn; expected a PNG that sample.py wrote"):
        recorded_words(str(tmp_path / "plain.png"))
