"""Latent space, and Stable Diffusion's pipelines both ways, against diffusers' own on small random parts."""

import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from accelerate import Accelerator
from colours import write
from conftest import weights
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from stable_diffusion import SIDE, autoencoder, stable_diffusion

from cond_diffusion import TextToImage
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.cache import latent_set
from cond_diffusion.data.dataset import open_captioned_files
from cond_diffusion.errors import UserError
from cond_diffusion.images import from_pillow
from cond_diffusion.models.latents import VAE
from cond_diffusion.training.trainer import train

# Our sampler, and diffusers' scheduler of the same algorithm.
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
}


def same_picture(folder: Path, ours: TextToImage, sampler: str) -> None:
    """Compare pictures of both libraries, of the same noise, to a grey level."""
    theirs = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(theirs.scheduler.config)
    steps, prompts = 12, ["a digit seven", "the number 2"]
    options: dict[str, Any] = {"guidance_scale": 4.0, "negative_prompt": "a digit one"}
    (drawn,) = ours(prompts[0], sampler=sampler, steps=steps, seed=5, progress=False, **options)
    draw = ours._noise([5])
    first = draw()
    fresh = [draw() for _ in range(steps - 1)]
    fresh.append(torch.zeros_like(first))  # theirs adds noise in the last step of a chain that does not end at 0
    with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=fresh):
        expected = theirs(prompts[0], latents=first, num_inference_steps=steps, **options).images[0]
    assert expected.size == drawn.size == (SIDE, SIDE)
    pixels = [from_pillow(picture) * 127.5 for picture in (drawn, expected)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1.001
    assert pixels[1].std() > 1
    (other,) = ours(prompts[1], sampler=sampler, steps=steps, seed=5, progress=False, **options)
    assert other.tobytes() != drawn.tobytes()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, about numpy
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", None])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_stable_diffusion_draws_the_same_picture_in_both_libraries(
    tmp_path: Path, sampler: str, prediction: str, spacing: str | None
):
    if (sampler, spacing) == ("ddim", "linspace"):
        pytest.skip("diffusers' DDIM steps to others than it visits next: README, Limits")
    folder = stable_diffusion(tmp_path, prediction, timestep_spacing=spacing or "leading")
    if spacing is None:  # as in the files of Stable Diffusion itself: each scheduler has its own
        file = folder / "scheduler" / "scheduler_config.json"
        fields = json.loads(file.read_text())
        del fields["timestep_spacing"]
        file.write_text(json.dumps(fields))
    same_picture(folder, TextToImage.from_pretrained(folder), sampler)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, about numpy
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
        ("DPMSolverMultistepScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
    ],
)
def test_the_schedule_is_read_from_whatever_scheduler_is_there(tmp_path: Path, name: str, fields: dict[str, Any]):
    folder = stable_diffusion(tmp_path, "v_prediction", timestep_spacing="leading")
    theirs = getattr(diffusers, name).from_config({**DDPMScheduler.load_config(folder / "scheduler"), **fields})
    theirs.save_pretrained(folder / "scheduler")
    pipe = TextToImage.from_pretrained(folder)
    assert pipe.prediction.kind == "v_prediction"
    torch.testing.assert_close(pipe.schedule.alpha_bar.float(), theirs.alphas_cumprod)
    assert (pipe.schedule.config.spacing, pipe.schedule.config.clip_x_0) == ("leading", False)


def test_half_precision_is_read_where_there_is_nothing_else(tmp_path: Path):
    whole = TextToImage.from_pretrained(stable_diffusion(tmp_path / "whole", "epsilon"))
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    for part in (theirs.unet, theirs.vae, theirs.text_encoder):
        part.half()
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    half = TextToImage.from_pretrained(tmp_path / "half")
    for part in ("unet", "text_encoder.clip", "latent_space.autoencoder"):
        mine, other = (operator.attrgetter(part)(pipe).state_dict() for pipe in (half, whole))
        for name, weight in other.items():
            torch.testing.assert_close(mine[name], weight.half().float(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`key=value` words for a tiny run in the latents of a random autoencoder."""
    folder = tmp_path_factory.mktemp("coloured")
    autoencoder().save_pretrained(folder / "vae")
    pictures = write(folder / "set", "tar", 60)
    return [
        *pictures,
        *(f"latent.vae={folder / 'vae'}", "data.channels=3", "data.caption_templates=[]", "data.resolution=24"),
        *("schedule.clip_x_0=false", "schedule.beta_schedule=scaled_linear", "text.max_length=16"),
        *("unet.channels=[32,32]", "unet.attention=[false,true]", "unet.num_groups=8", "train.batch_size=8"),
        *("train.max_steps=4", "train.warmup_steps=1", "train.checkpoint_every=2", "train.log_every=1"),
        *("sample.prompts=[a red circle]", "sample.steps=2", "train.sample_every=4", "train.evaluate_every=4"),
    ]


def config_of(words: list[str], run_dir: Path, *more: str) -> Config:
    return load_config(Config, overrides=[*words, f"run_dir={run_dir}", *more])


def test_what_is_trained_in_latent_space_opens_in_stable_diffusion_s_own_pipeline(
    coloured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = train(config_of(coloured, tmp_path / "run"))
    theirs = StableDiffusionPipeline.from_pretrained(checkpoint)
    theirs.set_progress_bar_config(disable=True)
    ours = TextToImage.from_pretrained(tmp_path / "run")
    (drawn,) = ours("a red circle", sampler="ddim", steps=5, guidance_scale=3.0, progress=False)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    latents = ours._noise([0])()
    expected = theirs("a red circle", latents=latents, num_inference_steps=5, guidance_scale=3.0).images[0]
    pixels = [from_pillow(picture) * 127.5 for picture in (drawn, expected)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1.001
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()
    # The same again: from the kept latents, without the autoencoder; and resumed, with the checkpoint's own.
    constant = "train.learning_rate_schedule=constant"
    with patch.object(VAE, "encode", side_effect=AssertionError):
        train(config_of(coloured, tmp_path / "again", constant, "train.max_steps=2"))
        resumed = weights(train(config_of(coloured, tmp_path / "again", constant, "resume=true")))
        straight = weights(train(config_of(coloured, tmp_path / "straight", constant)))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_latents_are_kept_without_pictures_that_cannot_be_read(
    coloured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(5):
        Image.new("RGB", (24, 24), (40 * i, 0, 255)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    for i in (2, 4):  # one of them alone in its shard
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    monkeypatch.setattr("cond_diffusion.data.cache.IMAGES_PER_SHARD", 2)
    (tmp_path / "cache").mkdir()
    words = [f"data.source={tmp_path}", "data.resolution=24", "data.channels=3", "data.max_bad_fraction=0.5"]
    data = load_config(Config, overrides=words).data
    vae = VAE(autoencoder())
    found = latent_set(open_captioned_files(data), vae, Accelerator(cpu=True))
    assert [found.caption_groups[group] for group in found.group_of.tolist()] == [(f"picture {i}",) for i in (0, 1, 3)]
    third = vae.encode(from_pillow(Image.new("RGB", (24, 24), (120, 0, 255)))[None])[0]
    torch.testing.assert_close(found._row(2), third, rtol=1e-3, atol=1e-3)
    strict = replace(data, max_bad_fraction=0.3)
    with pytest.raises(UserError, match="2 of the 5 pictures of .* cannot be read"):  # though nothing is computed again
        latent_set(open_captioned_files(strict), vae, Accelerator(cpu=True))
    Image.new("RGB", (24, 24), "red").save(tmp_path / "3.png")  # of the same name, and another
    again = latent_set(open_captioned_files(data), vae, Accelerator(cpu=True))
    assert (again._row(2) - found._row(2)).abs().max() > 0.1


def test_random_crops_and_streams_are_encoded_as_they_come(
    coloured: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    short = ("train.max_steps=1", "train.sample_every=0", "train.evaluate_every=0")
    train(config_of(coloured, tmp_path / "flipped", "data.flip=true", *short))
    assert "latents cannot be kept" in caplog.text
    train(config_of(coloured, tmp_path / "stream", "data.streaming=true", *short))


def test_decoding_is_that_of_the_autoencoder_and_masks_cover_every_pixel_that_is_drawn_anew():
    theirs = autoencoder()
    vae = VAE(theirs)
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        x_0 = theirs.encode(images).latent_dist.mean * 0.3
        torch.testing.assert_close(vae.encode(images), x_0)
        torch.testing.assert_close(vae.decode(x_0), theirs.decode(x_0 / 0.3).sample)
    mask = torch.zeros(1, 3, 24, 24)
    mask[:, :, 5, 7] = 1
    assert vae.encode_mask(mask).nonzero().tolist() == [[0, 0, 2, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.channels=1"], "data.channels: 1; latent.vae sees pictures of 3 channels"),
        (["data.resolution=25"], "data.resolution: 25 must be divisible by 2"),
        (["schedule.clip_x_0=true"], "schedule.clip_x_0: latents have no range"),
        (["latent.patch_size=2"], "latent.patch_size: 2 is for pixels"),
        (["latent.vae=nowhere"], "latent.vae: there is no folder nowhere, and as a hub id"),
    ],
)
def test_latents_that_do_not_fit_are_refused(coloured: list[str], tmp_path: Path, change: list[str], message: str):
    with pytest.raises(UserError) as refusal:
        train(config_of(coloured, tmp_path / "run", *change))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_pipelines_of_other_kinds_pickles_and_parts_that_do_not_fit_are_refused_by_name(tmp_path: Path):
    folder = stable_diffusion(tmp_path / "sd", "epsilon")

    def refused(message: str) -> None:
        with pytest.raises(UserError) as refusal:
            TextToImage.from_pretrained(folder)
        assert message in str(refusal.value)

    index = folder / "model_index.json"
    whole = index.read_text()
    for kind in ("StableDiffusionXLPipeline", "FluxPipeline"):
        index.write_text(whole.replace('"StableDiffusionPipeline"', f'"{kind}"'))
        refused(f"holds a {kind}; expected a TextToImage, or a StableDiffusionPipeline of Stable Diffusion 1.x or 2.x")
    index.write_text(whole)
    for damaged in (b"[]", b"\xff\xfe{\x00}\x00", b"{"):
        index.write_bytes(damaged)
        refused("model_index.json is damaged")
    index.write_text(whole)
    config = folder / "unet" / "config.json"
    fields = config.read_text()
    config.write_text(fields.replace('"norm_num_groups": 8', '"norm_num_groups": "8"'))
    assert config.read_text() != fields
    refused("UNet config: num_groups: ")
    config.write_text(fields)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    text = scheduler.read_text()
    scheduler.write_text(text.replace("DDPMScheduler", "FlowMatchEulerDiscreteScheduler"))
    refused("_class_name: 'FlowMatchEulerDiscreteScheduler' is not supported")
    scheduler.write_text(text)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused("a pickle, which can run any code when it is loaded")
    weights.with_suffix(".bin").rename(weights)
    wide = AutoencoderKL(latent_channels=8, block_out_channels=(8,), norm_num_groups=8)
    wide.save_pretrained(folder / "vae")
    refused("the UNet draws 4 channels, and the VAE's latents have 8")
    pipe = TextToImage.from_pretrained(stable_diffusion(tmp_path / "other", "epsilon"))
    with pytest.raises(UserError, match="dynamic_thresholding: "):
        pipe("seven", dynamic_thresholding=0.9, steps=2)
