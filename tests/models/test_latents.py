"""Latent spaces, and Stable Diffusion pipelines in both directions, compared with diffusers on small random models."""

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
from cond_diffusion.device import autocast
from cond_diffusion.errors import UserError
from cond_diffusion.images import from_pillow
from cond_diffusion.models.latents import VAE
from cond_diffusion.training.trainer import train

# Our samplers and the schedulers of diffusers that implement the same algorithm.
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def stable_diffusion_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def theirs(stable_diffusion_folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion_folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, about numpy
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", None])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_both_libraries_generate_the_same_image_with_a_stable_diffusion_pipeline(
    stable_diffusion_folder: Path, theirs: StableDiffusionPipeline, sampler: str, spacing: str | None
):
    """From the same noise, up to one gray level."""
    if (sampler, spacing) == ("ddim", "linspace"):
        pytest.skip("diffusers' DDIM computes a previous timestep that is not the next one it visits: README, Limits")
    file = stable_diffusion_folder / "scheduler" / "scheduler_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields.pop("timestep_spacing", None)
    if spacing is not None:  # none in the published files of Stable Diffusion; each scheduler has its own default
        fields["timestep_spacing"] = spacing
    file.write_text(json.dumps(fields), encoding="utf-8")
    ours = TextToImage.from_pretrained(stable_diffusion_folder)
    ddpm = DDPMScheduler.from_pretrained(stable_diffusion_folder / "scheduler")
    theirs.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(ddpm.config)
    steps, prompts = 12, ["a digit seven", "the number 2"]
    options: dict[str, Any] = {"negative_prompt": "a digit one"}
    if spacing is not None:  # otherwise the default of both libraries
        options["guidance_scale"] = 4.0
    image, other = ours(prompts, sampler=sampler, steps=steps, seed=5, progress=False, **options)
    draw = ours._noise([5])
    first = draw()
    noise = [draw() for _ in range(steps - 1)]
    noise.append(torch.zeros_like(first))  # diffusers adds noise in the last step if it does not end at timestep 0
    with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=noise):
        expected = theirs(prompts[0], latents=first, num_inference_steps=steps, **options).images[0]
    assert expected.size == image.size == (SIDE, SIDE)
    pixels = [from_pillow(result) * 127.5 for result in (image, expected)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1.001
    assert pixels[1].std() > 1
    assert other.tobytes() != image.tobytes()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, about numpy
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
        ("DPMSolverMultistepScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
    ],
)
def test_the_noise_schedule_is_loaded_from_any_supported_scheduler(tmp_path: Path, name: str, fields: dict[str, Any]):
    folder = stable_diffusion(tmp_path, "v_prediction", timestep_spacing="leading")
    theirs = getattr(diffusers, name).from_config({**DDPMScheduler.load_config(folder / "scheduler"), **fields})
    theirs.save_pretrained(folder / "scheduler")
    pipe = TextToImage.from_pretrained(folder)
    assert pipe.prediction.kind == "v_prediction"
    torch.testing.assert_close(pipe.schedule.alpha_bar.float(), theirs.alphas_cumprod)
    assert (pipe.schedule.config.spacing, pipe.schedule.config.clip_x_0) == ("leading", False)


@pytest.mark.parametrize(("version", "is_corrected"), [("0.6.0", True), ("0.9.0", False), ("0.37.1", False)])
def test_the_size_of_old_stable_diffusion_files_is_corrected_as_in_diffusers(
    tmp_path: Path, version: str, is_corrected: bool
):
    folder = stable_diffusion(tmp_path, "epsilon")
    file = folder / "unet" / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**fields, "_diffusers_version": version}), encoding="utf-8")
    theirs = StableDiffusionPipeline.from_pretrained(folder).unet.config.sample_size
    assert TextToImage.from_pretrained(folder).unet.config.sample_size == theirs
    assert theirs == (64 if is_corrected else fields["sample_size"])


def test_half_precision_weights_are_loaded_if_there_are_no_others(tmp_path: Path):
    whole = TextToImage.from_pretrained(stable_diffusion(tmp_path / "whole", "epsilon"))
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    for part in (theirs.unet, theirs.vae, theirs.text_encoder):
        part.half()
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    half = TextToImage.from_pretrained(tmp_path / "half")
    for part in ("unet", "text_encoder.clip", "latent_space.autoencoder"):
        found, expected = (operator.attrgetter(part)(pipe).state_dict() for pipe in (half, whole))
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight.half().float(), rtol=0, atol=0)


def test_sharded_weights_are_loaded(tmp_path: Path):
    whole = TextToImage.from_pretrained(stable_diffusion(tmp_path / "whole", "epsilon"))
    StableDiffusionPipeline.from_pretrained(tmp_path / "whole").save_pretrained(
        tmp_path / "shards", max_shard_size="20KB"
    )
    parts = {file.parent.name for file in (tmp_path / "shards").glob("*/*-of-*.safetensors")}
    assert parts == {"unet", "text_encoder", "vae"}
    found = TextToImage.from_pretrained(tmp_path / "shards")
    for part in ("unet", "text_encoder.clip", "latent_space.autoencoder"):
        weights, expected = (operator.attrgetter(part)(pipe).state_dict() for pipe in (found, whole))
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Config overrides for a tiny run in the latents of a random autoencoder."""
    folder = tmp_path_factory.mktemp("latents")
    autoencoder().save_pretrained(folder / "vae")
    return [
        *write(folder / "set", "tar", 60),
        *(f"latent.vae={folder / 'vae'}", "data.channels=3", "data.caption_templates=[]", "data.resolution=24"),
        *("schedule.clip_x_0=false", "schedule.beta_schedule=scaled_linear", "text.max_length=16"),
        *("unet.channels=[32,32]", "unet.attention=[false,true]", "unet.num_groups=8", "train.batch_size=8"),
        *("train.max_steps=4", "train.warmup_steps=1", "train.checkpoint_every=2", "train.log_every=1"),
        *("sample.prompts=[a red circle]", "sample.steps=2", "train.sample_every=4", "train.evaluate_every=4"),
    ]


def config_of(overrides: list[str], run_dir: Path, *more: str) -> Config:
    return load_config(Config, overrides=[*overrides, f"run_dir={run_dir}", *more])


@pytest.mark.slow
@pytest.mark.usefixtures("short_validation")
def test_a_checkpoint_in_latent_space_loads_in_diffusers_and_training_uses_cached_latents(
    latent_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = train(config_of(latent_run, tmp_path / "run"))
    theirs = StableDiffusionPipeline.from_pretrained(checkpoint)
    theirs.set_progress_bar_config(disable=True)
    ours = TextToImage.from_pretrained(tmp_path / "run")
    (image,) = ours("a red circle", sampler="ddim", steps=5, guidance_scale=3.0, progress=False)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    latents = ours._noise([0])()
    expected = theirs("a red circle", latents=latents, num_inference_steps=5, guidance_scale=3.0).images[0]
    pixels = [from_pillow(result) * 127.5 for result in (image, expected)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1.001
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()
    # Further runs use the cached latents without encoding; a resumed run loads the autoencoder of its checkpoint.
    constant = "train.learning_rate_schedule=constant"
    with patch.object(VAE, "encode", side_effect=AssertionError):
        train(config_of(latent_run, tmp_path / "again", constant, "train.max_steps=2"))
        resumed = weights(train(config_of(latent_run, tmp_path / "again", constant, "resume=true")))
        expected = weights(train(config_of(latent_run, tmp_path / "uninterrupted", constant)))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_unreadable_images_have_no_cached_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(5):
        Image.new("RGB", (24, 24), (40 * i, 0, 255)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"image {i}", encoding="utf-8")
    (tmp_path / "2.png").write_bytes(b"not an image")
    (tmp_path / "4.png").unlink()  # the only image of its shard
    (tmp_path / "4.png").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("cond_diffusion.data.cache.IMAGES_PER_SHARD", 2)
    (tmp_path / "cache").mkdir()
    overrides = [f"data.source={tmp_path}", "data.resolution=24", "data.channels=3", "data.max_bad_fraction=0.5"]
    data = load_config(Config, overrides=overrides).data
    vae = VAE(autoencoder())
    found = latent_set(open_captioned_files(data), vae, Accelerator(cpu=True))
    assert [found.caption_groups[group] for group in found.group_of.tolist()] == [(f"image {i}",) for i in (0, 1, 3)]
    third = vae.encode(from_pillow(Image.new("RGB", (24, 24), (120, 0, 255)))[None])[0]
    torch.testing.assert_close(found.x_0[2].float(), third, rtol=1e-3, atol=1e-3)
    strict = replace(data, max_bad_fraction=0.3)
    with pytest.raises(UserError, match=r"^data\.source: 2 of 5 .*data\.max_bad_fraction \(0\.3\)"):  # from the cache
        latent_set(open_captioned_files(strict), vae, Accelerator(cpu=True))
    Image.new("RGB", (24, 24), "red").save(tmp_path / "3.png")  # the same name, another image
    again = latent_set(open_captioned_files(data), vae, Accelerator(cpu=True))
    assert (again.x_0[2] - found.x_0[2]).abs().max() > 0.1
    Image.new("RGBA", (24, 24)).save(tmp_path / "0.png")  # transparent
    on_colors = [
        latent_set(open_captioned_files(replace(data, background=color)), vae, Accelerator(cpu=True)).x_0[0]
        for color in ("black", "white")
    ]
    assert (on_colors[0] - on_colors[1]).abs().max() > 0.1


@pytest.mark.slow
def test_augmented_images_and_streams_are_encoded_for_each_batch(
    latent_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "cond_diffusion" / "latents"
    short = ("train.max_steps=1", "train.sample_every=0", "train.evaluate_every=0")
    train(config_of(latent_run, tmp_path / "flipped", "data.flip=true", *short))
    assert any(message.startswith("data.flip") for message in caplog.messages)
    train(config_of(latent_run, tmp_path / "stream", "data.streaming=true", *short))
    assert not cached.exists()
    train(config_of(latent_run, tmp_path / "plain", *short))
    assert cached.exists()


def test_decoding_under_fp16_autocast_does_not_overflow():
    vae = VAE(autoencoder())
    x_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vae.autoencoder.decoder.conv_in.weight *= 1e6  # beyond fp16; the norms that follow remove the factor
        vae.autoencoder.decoder.conv_in.bias *= 1e6
    expected = vae.decode(x_0)
    with autocast("fp16", x_0.device):
        assert not vae.autoencoder.decode(x_0 / vae.scaling_factor).sample.isfinite().all()
        assert torch.equal(vae.decode(x_0), expected)
    assert expected.isfinite().all()


def test_latents_equal_those_of_the_autoencoder_and_masks_cover_all_masked_pixels():
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
        (["data.channels=1"], "data.channels: 1; "),
        (["data.resolution=25"], "data.resolution: 25 "),
        (["schedule.clip_x_0=true"], "schedule.clip_x_0: true"),
        (["text.split_phrases=true"], "text.split_phrases: true"),
        (["latent.patch_size=2"], "latent.patch_size: 2 "),
        (["latent.vae=nowhere"], "latent.vae: nowhere: "),
    ],
)
def test_options_that_do_not_fit_the_autoencoder_are_refused(
    latent_run: list[str], tmp_path: Path, change: list[str], message: str
):
    with pytest.raises(UserError) as refusal:
        train(config_of(latent_run, tmp_path / "run", *change))
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_unsupported_and_inconsistent_pipelines_are_refused(tmp_path: Path):
    folder = stable_diffusion(tmp_path / "sd", "epsilon")

    def refused(message: str) -> None:
        with pytest.raises(UserError) as refusal:
            TextToImage.from_pretrained(folder)
        assert message in str(refusal.value)

    index = folder / "model_index.json"
    whole = index.read_text(encoding="utf-8")
    for kind in ("StableDiffusionXLPipeline", "FluxPipeline"):
        index.write_text(whole.replace('"StableDiffusionPipeline"', f'"{kind}"'), encoding="utf-8")
        refused(f"{folder}: pipeline {kind} ")
    index.write_text(whole, encoding="utf-8")
    for damaged in (b"[]", b"\xff\xfe{\x00}\x00", b"{"):
        index.write_bytes(damaged)
        refused("model_index.json")
    index.write_text(whole, encoding="utf-8")
    config = folder / "unet" / "config.json"
    fields = config.read_text(encoding="utf-8")
    config.write_text(fields.replace('"norm_num_groups": 8', '"norm_num_groups": "8"'), encoding="utf-8")
    assert config.read_text(encoding="utf-8") != fields
    refused(f"{config}: norm_num_groups: ")
    config.write_text(fields, encoding="utf-8")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    text = scheduler.read_text(encoding="utf-8")
    scheduler.write_text(text.replace("DDPMScheduler", "FlowMatchEulerDiscreteScheduler"), encoding="utf-8")
    refused("_class_name: 'FlowMatchEulerDiscreteScheduler' is not supported")
    scheduler.write_text(text, encoding="utf-8")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(" is a pickle file")
    weights.with_suffix(".bin").rename(weights)
    wide = AutoencoderKL(latent_channels=8, block_out_channels=(8,), norm_num_groups=8)
    wide.save_pretrained(folder / "vae")
    refused("UNet config: in_channels: 4; ")
    pipe = TextToImage.from_pretrained(stable_diffusion(tmp_path / "other", "epsilon"))
    with pytest.raises(UserError, match=r"^dynamic_thresholding: "):
        pipe("seven", dynamic_thresholding=0.9, steps=2)
