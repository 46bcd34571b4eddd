"""Settings stored in PNG files, animations and attention maps."""

import json
import re
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from cond_diffusion import SamplingOptions, TextToImage, __version__
from cond_diffusion.cli.commands import recorded_settings
from cond_diffusion.config.sampling import DEFAULT_GUIDANCE_SCALE, GenerationSettings
from cond_diffusion.config.schedule import ScheduleConfig
from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError
from cond_diffusion.images import to_pillow
from cond_diffusion.models.layers import Attention
from cond_diffusion.pipeline.generate import generate_to_file, read_settings
from cond_diffusion.pipeline.visualize import FRAMES, AttentionMaps, Film, attention_weights, maps_per_word, render_maps


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.from_pretrained()


def step_at(number: int) -> Step:
    """Return a step whose x has the pixel value `number`, and x_0_hat the value 255 - `number`."""
    brightness = number / 127.5 - 1
    return Step(0, torch.full((2, 1, 4, 4), brightness), torch.full((2, 1, 4, 4), -brightness))


@pytest.mark.parametrize("total", [1, 7, FRAMES, 100, 250])
def test_film_has_evenly_spaced_steps_and_the_last_one(total: int):
    film = Film()
    for batch in range(2):
        for number in range(total):
            film(step_at(number), number, total)
        assert len(film.frames) == min(FRAMES, total), batch
    shown = [left[0].getpixel((0, 0)) for left, _ in film.frames]
    assert shown[-1] == total - 1
    gaps = {later - earlier for earlier, later in pairwise(shown)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
    assert all(len(left) == len(right) == 4 for left, right in film.frames)  # two batches of two


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_film_is_an_animation_of_x_t_beside_x_0_hat(tmp_path: Path, suffix: str):
    film = Film()
    for number in range(0, 250, 50):
        film(step_at(number), number // 50, 5)
    (tmp_path / f"film{suffix}").write_bytes(film.encode(tmp_path / f"film{suffix}", columns=2))
    with Image.open(tmp_path / f"film{suffix}") as animation:
        assert getattr(animation, "n_frames", 1) == 5
        animation.seek(4)
        frame = animation.convert("L")
        left, right = frame.getpixel((2, 2)), frame.getpixel((frame.width - 3, 2))
        assert isinstance(left, int | float)
        assert isinstance(right, int | float)
        assert abs(left - 200) < 8
        assert abs(right - 55) < 8


def test_attention_weights_equal_those_of_the_attention_layer():
    torch.manual_seed(0)
    attention = Attention(8, 6, num_heads=2)
    x, context = torch.randn(3, 16, 8), torch.randn(3, 5, 6)
    keys, values = attention.keys_values(context)
    weights = attention_weights(attention, x, keys)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, 4, 4))
    # With one-hot values, the output of the attention is its weights.
    one_hot = torch.eye(5).expand(3, 2, 5, 5)
    queries = attention._split_heads(attention.to_q(x))
    expected = F.scaled_dot_product_attention(queries, keys, one_hot).mean(1)
    torch.testing.assert_close(weights, expected.transpose(1, 2).reshape(3, 5, 4, 4))
    assert values.shape == keys.shape


def test_maps_average_the_conditional_pass_over_steps_and_levels(pipe: TextToImage):
    """Compares with the attention weights that a hook in each layer records."""
    expected: list[Tensor] = []

    def record(attention: Attention, inputs: tuple[Any, ...]) -> None:
        x, (keys, _) = inputs
        assert len(x) == 8  # four images: the conditional rows, then the unconditional ones
        weights = attention_weights(attention, x, keys)[:4]
        expected.append(F.interpolate(weights, size=(28, 28), mode="bilinear"))

    options: dict[str, Any] = {"num_images": 2, "steps": 3, "sampler": "heun", "progress": False}
    plain = pipe(["a digit seven", "two"], **options)
    hooks = [
        block.attn2.register_forward_pre_hook(record) for block in AttentionMaps(pipe.unet, pipe.image_size).blocks
    ]
    with AttentionMaps(pipe.unet, pipe.image_size) as maps:
        recorded = pipe(["a digit seven", "two"], **options, callback_on_step_end=maps)
    for hook in hooks:
        hook.remove()
    assert len(expected) == 5 * len(maps.blocks)  # heun evaluates the network twice per step, except in the last one
    torch.testing.assert_close(torch.stack(maps.maps), torch.stack(expected).mean(0))
    torch.testing.assert_close(maps.maps[0].sum(0), torch.ones(28, 28))
    assert [image.tobytes() for image in plain] == [image.tobytes() for image in recorded]
    pipe("two", steps=1, progress=False)
    assert not maps.recorded  # the hooks are removed


def test_maps_of_several_batches_are_in_the_order_of_the_images(pipe: TextToImage):
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


def test_map_of_a_word_averages_its_tokens(pipe: TextToImage):
    token_maps = torch.arange(16.0)[:, None, None].expand(16, 28, 28)
    words = maps_per_word("a digit  seven", token_maps, pipe.text_encoder)
    assert [word for word, _ in words] == ["a", "digit", "seven"]
    tokens = [tokens for _, tokens in pipe.text_encoder.words("a digit  seven")]
    in_order = list(chain.from_iterable(tokens))
    assert in_order == list(range(1, len(in_order) + 1))
    for (_, heat), positions in zip(words, tokens, strict=True):
        assert heat[0, 0] == sum(positions) / len(positions)
    truncated = pipe.text_encoder.words("one " * 30)
    assert truncated[-1][1][-1] == 14  # position 15 is the end-of-text token


def test_high_attention_is_yellow_and_low_attention_is_blue():
    heat = torch.zeros(28, 28)
    heat[:, 14:] = 0.3
    (gray,) = to_pillow(torch.zeros(1, 1, 28, 28))
    page = render_maps([(gray, [("warm", heat)]), (gray, [("warm", heat), ("er", heat)])])
    assert page.width == 3 * 114 - 2
    low, high = (page.getpixel((114 + x, 60)) for x in (10, 100))
    assert isinstance(low, tuple)
    assert isinstance(high, tuple)
    assert high[0] > low[0] + 50
    assert high[1] > low[1] + 50
    assert high[2] < low[2]


SAMPLING = SamplingOptions(
    num_images=2,
    seed=3,
    sampler="ddim",
    steps=3,
    eta=0.5,
    guidance_scale=(2.0, 4.0),
    phrase_guidance=0.25,
    first_phrase_from=300,
    guidance_interval=(100, 900),
    negative_prompt="two",
)


def png_with_chunks(folder: Path, **chunks: str) -> str:
    """Write a PNG with these text chunks, prompts and the version; return its path."""
    info = PngImagePlugin.PngInfo()
    for name, value in {"prompts": '["a"]', "version": json.dumps(__version__), **chunks}.items():
        info.add_itxt(f"cond_diffusion:{name}", value)
    Image.new("L", (2, 2)).save(folder / "x.png", pnginfo=info)
    return str(folder / "x.png")


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({"output": '"planted.png"'}, "'output'"),
        ({"film": '"planted.gif"'}, "'film'"),
        ({"seed": "[" * 100_000}, "x.png: seed"),
        ({"seed": "1" * 5000}, "x.png: seed"),
        ({"seed": '"1'}, "x.png: seed"),
        ({"seed": "null"}, "seed: None"),
        ({"steps": '"many"'}, "steps: 'many'"),
        ({"prompts": '"a"'}, "prompts: 'a'"),
        ({"prompts": "[1]"}, "prompts[0]: 1"),
    ],
    ids=["output", "film", "deep", "long", "cut", "null", "text", "no list", "numbers"],
)
def test_png_with_invalid_settings_raises_user_error(tmp_path: Path, chunks: dict[str, str], message: str):
    with pytest.raises(UserError) as error:
        GenerationSettings(**recorded_settings(png_with_chunks(tmp_path, **chunks), {}))
    assert message in str(error.value)


@pytest.mark.parametrize(("option", "value"), [("phrase_guidance", 0.5), ("first_phrase_from", 600)])
def test_a_png_from_before_an_option_was_generated_without_it(tmp_path: Path, option: str, value: float):
    assert read_settings(png_with_chunks(tmp_path), "--from-image")[option] == 0
    assert read_settings(png_with_chunks(tmp_path, **{option: str(value)}), "--from-image")[option] == value


def test_options_of_a_replaced_sampler_or_image_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    for name in ("a.png", "mask.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    everything = {"prompts": ["a"], "sampler": "ddim", "eta": 0.5, "image": str(tmp_path / "a.png"), "strength": 0.3}
    everything |= {"mask": str(tmp_path / "mask.png"), "resamplings": 2, "seed": 4}
    everything |= {"phrase_guidance": 0.25, "first_phrase_from": 300}
    path = png_with_chunks(tmp_path, **{name: json.dumps(value) for name, value in everything.items()})

    def recorded(**typed: str) -> set[str]:
        found = recorded_settings(path, typed)
        assert found == {name: everything[name] for name in found}
        return everything.keys() - found.keys()

    assert recorded(eta="1") == set()
    assert recorded(sampler="ddim", image=str(tmp_path / "a.png")) == set()  # nothing is replaced
    assert not caplog.text
    assert recorded(sampler="euler") == {"eta"}
    assert "--from-image: without eta 0.5, since --sampler replaces ddim" in caplog.text
    assert recorded(image="b.png") == {"strength", "mask", "resamplings"}
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"^--from-image: .* was made from .*a\.png, .*; give --image$"):
        recorded()


def test_settings_of_older_versions_stored_as_text_are_read(tmp_path: Path):
    chunks = {"guidance_scale": "2.0,4.0", "guidance_interval": "100,900", "steps": "3", "seed": "5"}
    path = png_with_chunks(tmp_path, prompts='["a", "b"]', **{key: json.dumps(value) for key, value in chunks.items()})
    wanted = GenerationSettings(
        prompts=("a", "b"),
        guidance_scale=(2.0, 4.0),
        phrase_guidance=0.0,
        first_phrase_from=0,
        guidance_interval=(100, 900),
        steps=3,
        seed=5,
    )
    assert GenerationSettings(**recorded_settings(path, {})) == wanted


def test_another_checkpoint_samples_with_its_own_guidance(tmp_path: Path):
    path = png_with_chunks(tmp_path, prompts='["a"]', guidance_scale="1.5", lora='"x"', ema_width="0.1", steps="7")
    assert recorded_settings(path, {"checkpoint": "emoji"}) == {"prompts": ["a"], "steps": 7}


def test_images_are_written_if_the_film_is_too_large(tmp_path: Path):
    settings = GenerationSettings(prompts=("seven",), num_images=100, steps=1)
    files = generate_to_file(settings, output=str(tmp_path / "x.png"), film=str(tmp_path / "x.webp"))
    assert next(files) == tmp_path / "x.png"
    with pytest.raises(UserError, match=r"^--film: .*x\.webp, 17204 x 84 pixels"):
        next(files)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
    film, image = Film(), Image.new("L", (84, 84))
    film.frames = [([image] * 400, [image] * 400)]
    with pytest.raises(UserError, match=r"^--film: x\.gif, 68804 x 84 pixels"):
        film.encode(Path("x.gif"), 400)


def generate(prompts: list[str], output: Path, **changes: Any) -> None:
    settings = GenerationSettings(**{**vars(SAMPLING), "prompts": tuple(prompts), **changes})
    assert [*generate_to_file(settings, output=str(output))] == [output]


def test_png_stores_its_settings_in_text_chunks(tmp_path: Path):
    prompts = ["seven", 'a "näive" digit']
    generate(prompts, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        chunks = {name: json.loads(value) for name, value in image.text.items()}  # type: ignore[attr-defined]
    ours = {name.removeprefix("cond_diffusion:"): value for name, value in chunks.items()}
    assert ours.pop("version") == __version__
    assert GenerationSettings(**ours) == GenerationSettings(**vars(SAMPLING), prompts=tuple(prompts))
    assert (ours["eta"], ours["guidance_scale"]) == (0.5, [2.0, 4.0])


def test_defaults_of_the_model_are_stored_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TextToImage, "__call__", lambda *_, **__: to_pillow(torch.zeros(1, 1, 28, 28)))
    generate(["seven"], tmp_path / "x.png", num_images=1, steps=None, guidance_scale=None)
    stored = read_settings(str(tmp_path / "x.png"), "--from-image")
    assert (stored["steps"], stored["guidance_scale"]) == (50, 1.5)
    guidance = {"guidance_scale": 3.0, "phrase_guidance": 0.5, "first_phrase_from": 600}
    pipe = TextToImage.from_pretrained()
    pipe.guidance, pipe.schedule = guidance, NoiseSchedule(ScheduleConfig(num_timesteps=20))
    assert pipe.completed(SamplingOptions()) == SamplingOptions(steps=20, **guidance)
    given = SamplingOptions(steps=1000, guidance_scale=0, phrase_guidance=0, first_phrase_from=0)
    assert pipe.completed(given) == given


def test_default_guidance_is_that_of_the_model(tmp_path: Path, pipe: TextToImage):
    options = {"steps": 2, "progress": False, "output_type": "pt"}
    assert torch.equal(pipe("seven", **options), pipe("seven", guidance_scale=1.5, **options))
    pipe.save_pretrained(tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    fields = json.loads(index.read_text())
    assert fields.pop("guidance_scale") == 1.5
    assert (fields.pop("phrase_guidance"), fields.pop("first_phrase_from")) == (0, 0)
    for stored in ({"guidance_scale": 5.0, "phrase_guidance": 0.5, "first_phrase_from": 900}, {}):
        index.write_text(json.dumps(fields | stored))
        other = TextToImage.from_pretrained(tmp_path / "other")
        expected = {"guidance_scale": DEFAULT_GUIDANCE_SCALE, "phrase_guidance": 0, "first_phrase_from": 0} | stored
        assert torch.equal(other("two, seven", **options), pipe("two, seven", **expected, **options))


def test_sampling_does_not_import_the_libraries_of_data_sets():
    """They lengthen the start of `sample.py`."""
    code = "import sys, cond_diffusion.pipeline.generate; sys.exit('datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_guidance_by_phrases_alone_does_not_depend_on_their_order_unless_the_first_is_special(pipe: TextToImage):
    def sample(*prompts: str, **guidance: float) -> Any:
        return pipe(prompts, **guidance, steps=8, seed=1, progress=False, output_type="pt")

    prompts = ("two, a digit seven, 4", "two, 4, a digit seven", "4, a digit seven, two", "two", "1,2")
    by_phrases, whole = (sample(*prompts, phrase_guidance=fraction) for fraction in (1, 0))
    torch.testing.assert_close(by_phrases[1:3], by_phrases[:1].expand(2, -1, -1, -1), atol=2e-3, rtol=0)
    assert (whole[0] - whole[1]).abs().max() > 0.1
    assert (whole[0] - by_phrases[0]).abs().max() > 0.1
    torch.testing.assert_close(by_phrases[3:], whole[3:], atol=2e-3, rtol=0)  # prompts of one phrase
    first_is_special = sample(*prompts, phrase_guidance=1, first_phrase_from=500)
    torch.testing.assert_close(first_is_special[0], first_is_special[1], atol=2e-3, rtol=0)
    assert (first_is_special[0] - first_is_special[2]).abs().max() > 0.1
    assert (first_is_special[0] - by_phrases[0]).abs().max() > 0.1
    torch.testing.assert_close(first_is_special[3:], whole[3:], atol=2e-3, rtol=0)


def test_settings_of_another_version_log_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    chunks = PngImagePlugin.PngInfo()
    for name, value in (("prompts", ["a"]), ("version", "0.0.1"), ("seed", "5")):
        chunks.add_itxt(f"cond_diffusion:{name}", json.dumps(value))
    Image.new("L", (2, 2)).save(tmp_path / "old.png", pnginfo=chunks)
    found = GenerationSettings(**read_settings(str(tmp_path / "old.png"), ""))
    assert found == GenerationSettings(prompts=("a",), seed=5, phrase_guidance=0.0, first_phrase_from=0)
    assert re.search(r"old\.png .*version 0\.0\.1", caplog.text)


def test_png_without_settings_raises_user_error(tmp_path: Path):
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match=r"^--from-image: .*plain\.png"):
        read_settings(str(tmp_path / "plain.png"), "--from-image")
