"""Training that begins with a checkpoint: all of its weights, or LoRA beside them."""

import json
from pathlib import Path

import pytest
import torch
from conftest import weights
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from stable_diffusion import stable_diffusion

from cond_diffusion import TextToImage
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.errors import UserError
from cond_diffusion.models.lora import FILE_NAME
from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER
from cond_diffusion.training.trainer import train

WHOLE = "unet/diffusion_pytorch_model.safetensors:"


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("stable"), "v_prediction", timestep_spacing="leading")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tuned(bars_overrides: list[str], run_dir: Path, *more: str) -> Config:
    """A run on the bars, in colour and at another size, that says nothing of the network or the text."""
    of_network = ("unet.", "text.")
    words = [word for word in bars_overrides if not word.startswith(of_network)]
    short = ["data.channels=3", "data.resolution=16", "train.learning_rate_schedule=constant", "train.max_steps=4"]
    return load_config(Config, overrides=[*words, *short, f"run_dir={run_dir}", *more])


def test_stable_diffusion_is_trained_further_as_it_is(bars_overrides: list[str], stable: Path, tmp_path: Path):
    config = tuned(bars_overrides, tmp_path / "run", f"init_from={stable}", "train.learning_rate=1e-12")
    checkpoint = train(config)
    before, after = TextToImage.from_pretrained(stable), TextToImage.from_pretrained(checkpoint)
    for name, weight in before.unet.state_dict().items():
        torch.testing.assert_close(after.unet.state_dict()[name], weight, rtol=0, atol=1e-7)
    assert after.prediction.kind == "v_prediction"
    assert after.schedule.config == before.schedule.config
    assert after.image_size == 16
    assert StableDiffusionPipeline.from_pretrained(checkpoint).scheduler.config.prediction_type == "v_prediction"


def test_our_own_checkpoint_is_trained_further_and_resumes(bars_overrides: list[str], tmp_path: Path):
    grey = [word for word in bars_overrides if not word.startswith("train.max_steps")]
    constant = "train.learning_rate_schedule=constant"
    (tmp_path / "clip").symlink_to(BUILT_IN_ENCODER)
    own = ["train.max_steps=2", f"text.encoder={tmp_path / 'clip'}", f"run_dir={tmp_path / 'a'}"]
    first = train(load_config(Config, overrides=[*grey, constant, *own]))
    (tmp_path / "clip").unlink()  # as where it was trained on another machine: the checkpoint has its own
    words = [word for word in grey if not word.startswith(("unet.", "text."))]

    def further(name: str, *more: str) -> dict[str, torch.Tensor]:
        own = [constant, f"init_from={tmp_path / 'a'}", f"run_dir={tmp_path / name}", *more]
        return weights(train(load_config(Config, overrides=[*words, *own])))

    straight = further("straight", "train.max_steps=4")
    further("resumed", "train.max_steps=2")
    resumed = further("resumed", "train.max_steps=4", "resume=true")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not torch.equal(straight[f"{WHOLE}conv_in.weight"], weights(first)[f"{WHOLE}conv_in.weight"])


def test_lora_is_merged_for_us_and_opens_beside_the_original_in_diffusers(
    bars_overrides: list[str], stable: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="cond_diffusion")
    lora = (f"init_from={stable}", "train.lora_rank=2", "train.learning_rate=0.02")
    checkpoint = train(tuned(bars_overrides, tmp_path / "run", *lora))
    assert "trains 0.01 of 0.81 million parameters" in caplog.text
    before, after = TextToImage.from_pretrained(stable), TextToImage.from_pretrained(checkpoint)
    changed = {
        name
        for name, weight in after.unet.state_dict().items()
        if not torch.equal(weight, before.unet.state_dict()[name])
    }
    matrices = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    assert changed == {name for name in before.unet.state_dict() if name.endswith(matrices)}
    theirs = StableDiffusionPipeline.from_pretrained(stable)
    theirs.load_lora_weights(checkpoint)
    theirs.fuse_lora()
    fused = theirs.unet.state_dict()
    for name in changed:
        of_theirs = fused[name.replace(".weight", ".base_layer.weight")]
        torch.testing.assert_close(after.unet.state_dict()[name], of_theirs, rtol=1e-5, atol=1e-6)
    # Our own file and theirs, added to the original here.
    theirs.unfuse_lora()
    layers = get_peft_model_state_dict(theirs.unet, adapter_name="default_0")
    theirs.save_lora_weights(tmp_path / "theirs", unet_lora_layers=layers)
    for file in (checkpoint, tmp_path / "theirs"):
        added = TextToImage.from_pretrained(stable, lora=file).unet.state_dict()
        for name, weight in after.unet.state_dict().items():
            torch.testing.assert_close(added[name], weight, rtol=1e-5, atol=1e-6)

    def with_settings(**settings: int) -> dict[str, torch.Tensor]:
        told = json.dumps({f"unet.{name}": value for name, value in settings.items()})
        save_file(load_file(checkpoint / FILE_NAME), tmp_path / FILE_NAME, metadata={"lora_adapter_metadata": told})
        return TextToImage.from_pretrained(stable, lora=tmp_path).unet.state_dict()

    added = with_settings(r=16, lora_alpha=2)  # it is the matrix's own rank, 2, that counts
    for name in changed:
        torch.testing.assert_close(added[name], after.unet.state_dict()[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="scales its matrices by use_rslora, which is not supported"):
        with_settings(use_rslora=16, lora_alpha=2)
    with pytest.raises(UserError, match="lora: .* is for another model: it changes down_blocks.0.attentions"):
        TextToImage.from_pretrained(lora=checkpoint)
    # Resumed it ends with the same.
    train(tuned(bars_overrides, tmp_path / "resumed", *lora, "train.max_steps=2"))
    resumed = weights(train(tuned(bars_overrides, tmp_path / "resumed", *lora, "resume=true")))
    assert all(torch.equal(value, resumed[name]) for name, value in weights(checkpoint).items())
    for rank, said in (("4", "train.lora_rank was 2 in this run and is now 4"), ("0", "is now 0; keep it")):
        with pytest.raises(UserError, match=said):
            train(tuned(bars_overrides, tmp_path / "resumed", *lora, "resume=true", f"train.lora_rank={rank}"))
    # Not beside other weights.
    file = stable / "unet" / "diffusion_pytorch_model.safetensors"
    original = file.read_bytes()
    others = load_file(file)
    others["conv_in.weight"] = others["conv_in.weight"] + 1
    save_file(others, file)
    with pytest.raises(UserError, match="resume: init_from is not what it was when this run began"):
        train(tuned(bars_overrides, tmp_path / "resumed", *lora, "resume=true", "train.max_steps=6"))
    file.write_bytes(original)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.lora_rank=2"], "train.lora_rank: there is nothing to add to; expected init_from beside it"),
        (
            ["init_from=builtin", "unet.channels=[64,64]"],
            "init_from: unet.channels is (32, 64) there, and (64, 64) here",
        ),
        (["init_from=builtin", "objective.prediction=sample"], "init_from: objective.prediction is 'epsilon' there"),
        (["init_from=builtin"], "unet.in_channels: 4 does not fit the data and the text encoder; expected 12"),
        (["init_from=nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_what_does_not_fit_what_is_begun_with_is_refused(
    bars_overrides: list[str], tmp_path: Path, words: list[str], message: str
):
    with pytest.raises(UserError) as refusal:
        train(tuned(bars_overrides, tmp_path / "run", *words))
    assert message in str(refusal.value)
    assert not (tmp_path / "run").exists()
