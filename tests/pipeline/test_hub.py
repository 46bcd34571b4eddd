"""Upload models to the Hub and download them, against a local server that implements its HTTP API."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub import ModelHub
from PIL import Image

from cond_diffusion import TextToImage
from cond_diffusion.errors import UserError
from cond_diffusion.models.latents import VAE, PixelPatchify
from cond_diffusion.pipeline.checkpoint import write_card


@pytest.mark.slow
def test_model_uploaded_to_the_hub_is_downloaded_unchanged(model_hub: type[ModelHub], tmp_path: Path):
    pipe = TextToImage.from_pretrained()
    address = pipe.push_to_hub("someone/digits", token="secret", private=True)
    assert model_hub.private == {"someone/digits"}
    assert address.endswith("/someone/digits")
    files = model_hub.repositories["someone/digits"]
    assert {"model_index.json", "config.yaml", "README.md", "samples.png"} < files.keys()
    (tmp_path / "samples.png").write_bytes(files["samples.png"])
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (112 + 4 * 30 - 2, 10 * 30 - 2)
    files["unet/diffusion_pytorch_model.fp16.safetensors"] = files["other.bin"] = b"not needed"
    again = TextToImage.from_pretrained("someone/digits", cache_dir=tmp_path / "cache", revision="main", token="secret")
    assert not [path for path in model_hub.asked if path.endswith(("fp16.safetensors", ".bin"))]
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert again("two", steps=3, progress=False)[0].tobytes() == pipe("two", steps=3, progress=False)[0].tobytes()
    model_hub.repositories.clear()
    once_more = TextToImage.from_pretrained("someone/digits", cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(once_more.unet.conv_in.weight, pipe.unet.conv_in.weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # of diffusers
def test_card_describes_the_run_and_its_code_generates_images_in_both_libraries(model_hub: type[ModelHub]):
    TextToImage.from_pretrained().push_to_hub("someone/digits", token="secret", prompts=["a digit seven", "two"])
    assert not model_hub.private
    card = model_hub.repositories["someone/digits"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: ")
    assert "Data: `mnist`, captions from `label`, 28 x 28. Loss: epsilon; the network predicts epsilon." in card
    assert "a digit seven; two." in card
    ours, theirs = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(ours.replace('images[0].save("image.png")', ""), names)
    torch.manual_seed(0)
    exec(theirs, names)
    assert len(names["images"]) == 4
    image = names["image"]
    assert image.shape == (1, 1, 28, 28)
    assert image.min() < -0.9
    assert image.max() > 0.9
    assert (image.abs() > 0.8).float().mean() > 0.8  # a digit is black and white


def test_card_omits_later_metrics_nonfinite_values_and_a_truncated_line(tmp_path: Path):
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "progress.json").write_text(
        '{"step": 2, "samples_per_step": 4, "data": {}}', encoding="utf-8"
    )
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": null}', '{"step": 3, "loss": 0.1}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (checkpoint / "config.yaml").write_text("run_dir: runs/x", encoding="utf-8")
    write_card(tmp_path, "someone/digits", PixelPatchify(1), 8, "epsilon", ["two"], checkpoint, split_phrases=False)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "|---|---|\n| step | 2 |\n| loss | 0.5 |\n\n" in card


@pytest.mark.parametrize(
    ("prediction", "split_phrases", "reason"),
    [("v_prediction", False, None), ("score", False, "score prediction"), ("sample", True, "text.split_phrases")],
)
def test_card_shows_code_for_diffusers_only_where_diffusers_can_sample(
    tmp_path: Path, prediction: Any, split_phrases: bool, reason: str | None
):
    pixels = PixelPatchify(1)
    write_card(tmp_path, "someone/digits", pixels, 8, prediction, ["two"], None, split_phrases=split_phrases)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("from diffusers import" in card) == (reason is None)
    assert [why for why in ("score prediction", "text.split_phrases") if why in card] == [reason] * (reason is not None)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("someone/nothing", {}, "someone/nothing"),
        ("someone/digits", {"local_files_only": True}, "someone/digits.*local_files_only"),
        ("someone/digits", {"revision": "nowhere"}, "someone/digits"),
        ("someone/xl", {}, "^someone/xl: .*StableDiffusionXLPipeline.*TextToImage"),
        ("someone/digits", {}, r"^someone/digits/unet.* diffusion_pytorch_model\.bin.*pickle"),
    ],
)
def test_failed_download_is_a_one_line_error(
    model_hub: type[ModelHub], tmp_path: Path, source: str, options: dict[str, Any], message: str
):
    model_hub.repositories["someone/digits"] = {
        "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.bin": b"",
    }
    model_hub.repositories["someone/xl"] = {"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}'}
    with pytest.raises(UserError, match=message) as error:
        TextToImage.from_pretrained(source, cache_dir=tmp_path / "cache", **options)
    assert "\n" not in str(error.value)


def test_half_precision_is_downloaded_if_there_is_nothing_else(model_hub: type[ModelHub], tmp_path: Path):
    pipe = TextToImage.from_pretrained()
    pipe.save_pretrained(tmp_path / "pipe")
    files = {str(f.relative_to(tmp_path / "pipe")): f.read_bytes() for f in (tmp_path / "pipe").rglob("*.*")}
    weights = "unet/diffusion_pytorch_model.safetensors"
    files[weights.replace(".safetensors", ".fp16.safetensors")] = files.pop(weights)
    model_hub.repositories["someone/half"] = files
    again = TextToImage.from_pretrained("someone/half", cache_dir=tmp_path / "cache")
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)
    model_hub.repositories.clear()
    TextToImage.from_pretrained("someone/half", cache_dir=tmp_path / "cache", local_files_only=True)


def test_weights_that_exist_only_as_pickles_are_refused(model_hub: type[ModelHub], tmp_path: Path):
    model_hub.repositories["someone/vae"] = {"config.json": b"{}", "diffusion_pytorch_model.bin": b""}
    model_hub.repositories["someone/lora"] = {"pytorch_lora_weights.bin": b""}
    with pytest.raises(UserError, match=r"^latent\.vae: someone/vae.* diffusion_pytorch_model\.bin.*pickle"):
        VAE.from_pretrained("someone/vae")
    with pytest.raises(UserError, match=r"^lora: someone/lora.* pytorch_lora_weights\.bin.*pickle"):
        TextToImage.from_pretrained(lora="someone/lora", cache_dir=tmp_path / "cache")


def test_failed_upload_raises_user_error(model_hub: type[ModelHub], monkeypatch: pytest.MonkeyPatch):
    pipe = TextToImage.from_pretrained()
    with pytest.raises(UserError, match="^someone/digits: "):
        pipe.push_to_hub("someone/digits", token="wrong", prompts="two")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # no server
    with pytest.raises(UserError, match="^someone/digits: "):
        pipe.push_to_hub("someone/digits", token="secret", prompts=["two"])
    pipe.folder = None
    with pytest.raises(UserError, match="^prompts: none given"):
        pipe.push_to_hub("someone/digits", token="secret")
