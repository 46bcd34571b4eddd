"""Models on the hub, against a stand-in for its HTTP interface on this machine."""

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


def test_a_model_goes_to_the_hub_and_comes_back_the_same(model_hub: type[ModelHub], tmp_path: Path):
    pipe = TextToImage.from_pretrained()
    address = pipe.push_to_hub("someone/digits", token="secret")
    assert address.endswith("/someone/digits")
    files = model_hub.repositories["someone/digits"]
    assert {"model_index.json", "config.yaml", "README.md", "samples.png"} < files.keys()
    (tmp_path / "samples.png").write_bytes(files["samples.png"])
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (112 + 4 * 30 - 2, 10 * 30 - 2)
    files["unet/diffusion_pytorch_model.fp16.safetensors"] = files["other.bin"] = b"not asked for"
    again = TextToImage.from_pretrained("someone/digits", cache_dir=tmp_path / "cache", revision="main", token="secret")
    assert not [path for path in model_hub.asked if path.endswith(("fp16.safetensors", ".bin"))]
    assert torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert again("two", steps=3, progress=False)[0].tobytes() == pipe("two", steps=3, progress=False)[0].tobytes()
    model_hub.repositories.clear()
    once_more = TextToImage.from_pretrained("someone/digits", cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(once_more.unet.conv_in.weight, pipe.unet.conv_in.weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # of diffusers
def test_the_card_tells_of_the_run_and_its_lines_draw_in_both_libraries(model_hub: type[ModelHub]):
    TextToImage.from_pretrained().push_to_hub("someone/digits", token="secret", prompts=["a digit seven", "two"])
    card = model_hub.repositories["someone/digits"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: ")
    assert "Data: `mnist`, captions from `label`, 28 x 28. Loss: epsilon; the network predicts epsilon." in card
    assert "A row for each of: a digit seven; two." in card
    ours, theirs = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(ours.replace('images[0].save("picture.png")', ""), names)
    torch.manual_seed(0)
    exec(theirs, names)
    assert len(names["images"]) == 4
    image = names["image"]
    assert image.shape == (1, 1, 28, 28)
    assert image.min() < -0.9
    assert image.max() > 0.9
    assert (image.abs() > 0.8).float().mean() > 0.8  # black and white, as a digit is


def test_a_card_leaves_out_what_was_not_finite_what_came_later_and_half_a_line(tmp_path: Path):
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "progress.json").write_text('{"step": 2}')
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "gradient_norm": null}', '{"step": 3, "loss": 0.1}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (checkpoint / "config.yaml").write_text("seed: 0")
    write_card(tmp_path, "someone/digits", PixelPatchify(1), 8, "epsilon", ["two"], checkpoint)
    card = (tmp_path / "README.md").read_text()
    assert "| step | 2 |\n| loss | 0.5 |\n\nThe whole config" in card


@pytest.mark.parametrize("prediction", ["v_prediction", "score"])
def test_the_card_shows_diffusers_lines_only_where_they_draw(tmp_path: Path, prediction: Any):
    write_card(tmp_path, "someone/digits", PixelPatchify(1), 8, prediction, ["two"], checkpoint=None)
    card = (tmp_path / "README.md").read_text()
    assert ("from diffusers import" in card, "no name for the score" in card) == (
        (False, True) if prediction == "score" else (True, False)
    )


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("someone/nothing", {}, "there is no folder someone/nothing, and as a hub id it cannot be fetched"),
        ("someone/digits", {"local_files_only": True}, "not on this disk and cannot be fetched (local_files_only)"),
        ("someone/digits", {"revision": "nowhere"}, "as a hub id it cannot be fetched"),
        ("someone/xl", {}, "someone/xl holds a StableDiffusionXLPipeline; expected a TextToImage"),
        ("someone/digits", {}, "someone/digits/unet has its weights in diffusion_pytorch_model.bin, a pickle"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(
    model_hub: type[ModelHub], tmp_path: Path, source: str, options: dict[str, Any], message: str
):
    model_hub.repositories["someone/digits"] = {
        "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.bin": b"",
    }
    model_hub.repositories["someone/xl"] = {"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}'}
    with pytest.raises(UserError) as refusal:
        TextToImage.from_pretrained(source, cache_dir=tmp_path / "cache", **options)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_half_precision_is_fetched_where_there_is_nothing_else(model_hub: type[ModelHub], tmp_path: Path):
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


def test_pickles_that_lie_alone_are_refused(model_hub: type[ModelHub], tmp_path: Path):
    model_hub.repositories["someone/vae"] = {"config.json": b"{}", "diffusion_pytorch_model.bin": b""}
    model_hub.repositories["someone/lora"] = {"pytorch_lora_weights.bin": b""}
    with pytest.raises(UserError, match=r"latent.vae: someone/vae has its weights in .*\.bin, a pickle"):
        VAE.from_pretrained("someone/vae")
    with pytest.raises(UserError, match=r"lora: someone/lora has its weights in pytorch_lora_weights.bin, a pickle"):
        TextToImage.from_pretrained(lora="someone/lora", cache_dir=tmp_path / "cache")


def test_what_the_hub_does_not_take_is_one_line(model_hub: type[ModelHub], monkeypatch: pytest.MonkeyPatch):
    pipe = TextToImage.from_pretrained()
    with pytest.raises(UserError, match="someone/digits: the hub does not take it"):
        pipe.push_to_hub("someone/digits", token="wrong", prompts="two")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(UserError, match="someone/digits: the hub does not take it"):
        pipe.push_to_hub("someone/digits", token="secret", prompts=["two"])
    pipe.folder = None
    with pytest.raises(UserError, match="prompts: none given"):
        pipe.push_to_hub("someone/digits", token="secret")
