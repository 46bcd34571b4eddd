"""What a picture remembers, films and attention maps."""

import json
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from cond_diffusion import SamplingOptions, TextToImage, __version__
from cond_diffusion.cli.sample import recorded_settings
from cond_diffusion.config.sampling import GenerationSettings
from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.errors import UserError
from cond_diffusion.images import to_pillow
from cond_diffusion.models.layers import Attention
from cond_diffusion.pipeline.generate import from_flat, generate_to_file, read_settings
from cond_diffusion.pipeline.visualize import FRAMES, AttentionMaps, Film, attention_weights, maps_of_words, sheet


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
    weights = attention_weights(attention, x, keys)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 4, 4))
    # Values that only name their token come out of the attention as its weights.
    names = torch.eye(5).expand(3, 2, 5, 5)
    queries = attention._split_heads(attention.to_q(x))
    expected = F.scaled_dot_product_attention(queries, keys, names).mean(1)
    torch.testing.assert_close(weights, expected.transpose(1, 2).reshape(3, 5, 4, 4))
    assert values.shape == keys.shape


def test_maps_average_over_steps_and_levels_of_the_pass_with_the_text(pipe: TextToImage):
    """Against each attention's weights, taken down by hand where the network is called."""
    by_hand: list[Tensor] = []

    def take_down(attention: Attention, inputs: tuple[Any, ...]) -> None:
        x, (keys, _) = inputs
        assert len(x) == 8  # four pictures with the text, then without it
        weights = attention_weights(attention, x, keys)[:4]
        by_hand.append(F.interpolate(weights, size=(28, 28), mode="bilinear"))

    options: dict[str, Any] = {"num_images": 2, "steps": 3, "sampler": "heun", "progress": False}
    drawn = pipe(["a digit seven", "two"], **options)
    hooks = [
        block.attn2.register_forward_pre_hook(take_down) for block in AttentionMaps(pipe.unet, pipe.image_size).blocks
    ]
    with AttentionMaps(pipe.unet, pipe.image_size) as maps:
        again = pipe(["a digit seven", "two"], **options, callback_on_step_end=maps)
    for hook in hooks:
        hook.remove()
    assert len(by_hand) == 5 * len(maps.blocks)  # heun looks twice at each step but the last
    torch.testing.assert_close(torch.stack(maps.maps), torch.stack(by_hand).mean(0))
    torch.testing.assert_close(maps.maps[0].sum(0), torch.ones(28, 28))
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in again]
    pipe("two", steps=1, progress=False)
    assert not maps.recorded  # the hooks are removed


def test_maps_of_several_batches_stand_in_the_order_of_the_pictures(pipe: TextToImage):
    found = {}
    for batch_size in (1, 3, 64):
        with AttentionMaps(pipe.unet, pipe.image_size) as maps:
            pipe(
                ["a digit seven", "two"],
                num_images=2,
                steps=2,
                batch_size=batch_size,
                callback_on_step_end=maps,
                progress=False,
            )
        found[batch_size] = torch.stack(maps.maps)
    torch.testing.assert_close(found[1], found[64], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[3], found[64], rtol=0, atol=1e-5)


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


SAMPLING = SamplingOptions(
    num_images=2,
    seed=3,
    sampler="ddim",
    steps=3,
    eta=0.5,
    guidance_scale=(2.0, 4.0),
    guidance_interval=(100, 900),
    negative_prompt="two",
)


def hostile(folder: Path, **chunks: str) -> str:
    """A PNG with these text chunks, and prompts."""
    info = PngImagePlugin.PngInfo()
    for name, value in {"prompts": '["a"]', "version": json.dumps(__version__), **chunks}.items():
        info.add_itxt(f"cond_diffusion:{name}", value)
    Image.new("L", (2, 2)).save(folder / "x.png", pnginfo=info)
    return str(folder / "x.png")


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({"output": '"planted.png"'}, "has a setting that is not known here: 'output'"),
        ({"film": '"planted.gif"'}, "has a setting that is not known here: 'film'"),
        ({"seed": "[" * 100_000}, "are damaged: seed: "),
        ({"seed": "1" * 5000}, "are damaged: seed: "),
        ({"seed": '"1'}, "are damaged: seed: "),
        ({"seed": "null"}, "seed: None"),
        ({"steps": '"many"'}, "steps: 'many'"),
        ({"prompts": '"a"'}, "prompts: 'a'"),
        ({"prompts": "[1]"}, "prompts[0]: 1"),
    ],
    ids=["output", "film", "deep", "long", "cut", "null", "text", "no list", "numbers"],
)
def test_a_picture_with_other_settings_than_ours_is_refused(tmp_path: Path, chunks: dict[str, str], message: str):
    with pytest.raises(UserError) as refusal:
        from_flat(recorded_settings(hostile(tmp_path, **chunks), {}))
    assert message in str(refusal.value)


def test_another_sampler_or_picture_leaves_out_what_belonged_to_the_old_one(tmp_path: Path):
    everything = {"prompts": ["a"], "sampler": "ddim", "eta": 0.5, "image": "a.png", "strength": 0.3, "seed": 4}
    path = hostile(tmp_path, **{name: json.dumps(value) for name, value in everything.items()})

    def recorded(**typed: str) -> set[str]:
        found = recorded_settings(path, typed)
        assert found == {name: everything[name] for name in found}
        return everything.keys() - found.keys()

    assert recorded(eta="1") == set()
    assert recorded(sampler="euler") == {"eta"}
    assert recorded(image="b.png") == {"strength"}


def test_settings_of_releases_that_kept_them_as_typed_text_are_read(tmp_path: Path):
    chunks = {"guidance_scale": "2.0,4.0", "guidance_interval": "100,900", "steps": "3", "seed": "5"}
    path = hostile(tmp_path, prompts='["a", "b"]', **{name: json.dumps(value) for name, value in chunks.items()})
    wanted = SamplingOptions(guidance_scale=(2.0, 4.0), guidance_interval=(100, 900), steps=3, seed=5)
    assert from_flat(recorded_settings(path, {})).sampling == wanted


def test_a_film_that_is_too_large_costs_no_pictures(tmp_path: Path):
    settings = GenerationSettings(prompts=("seven",), sampling=SamplingOptions(num_images=100, steps=1))
    files = generate_to_file(settings, output=str(tmp_path / "x.png"), film=str(tmp_path / "x.webp"))
    assert next(files) == tmp_path / "x.png"
    with pytest.raises(UserError, match="--film: .*x.webp, 17204 x 84 pixels, cannot be written .* fewer pictures"):
        next(files)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def draw(prompts: list[str], output: Path, **changes: Any) -> None:
    settings = GenerationSettings(prompts=tuple(prompts), sampling=replace(SAMPLING, **changes))
    assert [*generate_to_file(settings, output=str(output))] == [output]


def test_a_picture_says_in_its_text_chunks_how_it_was_drawn(tmp_path: Path):
    prompts = ["seven", 'a "näive" digit']
    draw(prompts, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        chunks = {name: json.loads(value) for name, value in picture.text.items()}  # type: ignore[attr-defined]
    ours = {name.removeprefix("cond_diffusion:"): value for name, value in chunks.items()}
    assert ours.pop("version") == __version__
    assert from_flat(ours) == GenerationSettings(prompts=tuple(prompts), sampling=SAMPLING)
    assert (ours["eta"], ours["guidance_scale"]) == (0.5, [2.0, 4.0])


def test_no_steps_given_are_written_down_as_the_number_that_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TextToImage, "__call__", lambda *_, **__: to_pillow(torch.zeros(1, 1, 28, 28)))
    draw(["seven"], tmp_path / "x.png", num_images=1, steps=None, guidance_scale=1.0)
    assert read_settings(str(tmp_path / "x.png"), "--from-image")["steps"] == 1000


def test_another_version_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    chunks = PngImagePlugin.PngInfo()
    for name, value in (("prompts", ["a"]), ("version", "0.0.1"), ("seed", "5")):
        chunks.add_itxt(f"cond_diffusion:{name}", json.dumps(value))
    Image.new("L", (2, 2)).save(tmp_path / "old.png", pnginfo=chunks)
    assert from_flat(read_settings(str(tmp_path / "old.png"), "")) == GenerationSettings(
        prompts=("a",), sampling=SamplingOptions(seed=5)
    )
    assert "old.png was made by version 0.0.1" in caplog.text


def test_a_picture_without_settings_is_refused(tmp_path: Path):
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="plain.png"):
        read_settings(str(tmp_path / "plain.png"), "--from-image")
