"""Fine-tuning from a checkpoint (`init_from`): all weights, or LoRA."""

import json
from pathlib import Path

import pytest
import torch
from conftest import weights
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from stable_diffusion import stable_diffusion

from cond_diffusion import TextToImage
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.errors import UserError
from cond_diffusion.models.lora import FILE_NAME
from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER, TextEncoder
from cond_diffusion.training.setup import apply_init_from
from cond_diffusion.training.trainer import train

AVERAGE = "unet/diffusion_pytorch_model.safetensors:"


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("stable"), "v_prediction", timestep_spacing="leading")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tuning_config(bars_overrides: list[str], run_dir: Path, *more: str) -> Config:
    """Return a config for RGB bars of another size, without options of the network and the text encoder."""
    overrides = [override for override in bars_overrides if not override.startswith(("unet.", "text."))]
    overrides += ["data.channels=3", "data.resolution=16", "train.learning_rate_schedule=constant", "train.max_steps=4"]
    return load_config(Config, overrides=[*overrides, f"run_dir={run_dir}", *more])


def test_built_in_emoji_model_decides_network_objective_and_text_encoder():
    config = load_config(Config, overrides=["init_from=emoji", "data.source=emoji", "text.encoder=pretrain"])
    completed, initial = apply_init_from(config, None)
    assert initial is not None
    assert (completed.text.encoder, completed.objective.prediction) == ("emoji", "sample")
    assert completed.unet.channels == initial.unet.config.channels
    encoder = TextEncoder.from_pretrained(completed.text.encoder, completed.text.max_length)
    for name, weight in encoder.clip.state_dict().items():
        assert torch.equal(weight, initial.text_encoder.clip.state_dict()[name])


def test_split_phrases_go_with_the_checkpoint(bars_overrides: list[str], tmp_path: Path):
    overrides = [override for override in bars_overrides if not override.startswith("train.max_steps")]
    overrides += ["train.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    checkpoint = train(load_config(Config, overrides=[*overrides, "text.split_phrases=true"]))
    caption = ["a digit seven, two"]
    expected = TextEncoder.from_pretrained("builtin", 16, split_phrases=True)(caption)
    torch.testing.assert_close(TextToImage.from_pretrained(checkpoint).text_encoder(caption), expected)
    completed, _ = apply_init_from(tuning_config(bars_overrides, tmp_path / "b", f"init_from={tmp_path / 'run'}"), None)
    assert completed.text.split_phrases
    resumed = [*overrides, "train.max_steps=2", "resume=true"]
    with pytest.raises(UserError, match=r"^resume: text\.split_phrases changed from True to False"):
        train(load_config(Config, overrides=resumed))
    train(load_config(Config, overrides=[*resumed, "text.split_phrases=true"]))
    TextToImage.from_pretrained(checkpoint).save_pretrained(tmp_path / "no config")  # only the encoder knows
    init_from = f"init_from={tmp_path / 'no config'}"
    completed, _ = apply_init_from(tuning_config(bars_overrides, tmp_path / "c", init_from), None)
    assert completed.text.split_phrases


def test_fine_tuning_stable_diffusion_keeps_its_settings(bars_overrides: list[str], stable: Path, tmp_path: Path):
    config = tuning_config(bars_overrides, tmp_path / "run", f"init_from={stable}", "train.learning_rate=1e-12")
    checkpoint = train(config)
    before, after = TextToImage.from_pretrained(stable), TextToImage.from_pretrained(checkpoint)
    for name, weight in before.unet.state_dict().items():
        torch.testing.assert_close(after.unet.state_dict()[name], weight, rtol=0, atol=1e-7)
    assert after.prediction.kind == "v_prediction"
    assert after.schedule.config == before.schedule.config
    assert after.image_size == 16
    assert StableDiffusionPipeline.from_pretrained(checkpoint).scheduler.config.prediction_type == "v_prediction"


def test_resumed_fine_tuning_of_own_checkpoint_equals_uninterrupted_run(bars_overrides: list[str], tmp_path: Path):
    overrides = [override for override in bars_overrides if not override.startswith("train.max_steps")]
    overrides.append("train.learning_rate_schedule=constant")
    (tmp_path / "clip").symlink_to(BUILT_IN_ENCODER)
    first_run = ["train.max_steps=2", f"text.encoder={tmp_path / 'clip'}", f"run_dir={tmp_path / 'a'}"]
    first = train(load_config(Config, overrides=[*overrides, *first_run]))
    (tmp_path / "clip").unlink()  # as if trained on another machine: the checkpoint has a copy of the encoder
    overrides = [override for override in overrides if not override.startswith(("unet.", "text."))]

    def fine_tune(name: str, *more: str) -> dict[str, torch.Tensor]:
        options = [f"init_from={tmp_path / 'a'}", f"run_dir={tmp_path / name}", *more]
        return weights(train(load_config(Config, overrides=[*overrides, *options])))

    uninterrupted = fine_tune("uninterrupted", "train.max_steps=4")
    fine_tune("resumed", "train.max_steps=2")
    resumed = fine_tune("resumed", "train.max_steps=4", "resume=true")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    assert not torch.equal(uninterrupted[f"{AVERAGE}conv_in.weight"], weights(first)[f"{AVERAGE}conv_in.weight"])


def test_lora_checkpoint_has_merged_weights_and_loads_in_diffusers(
    bars_overrides: list[str], stable: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from peft import get_peft_model_state_dict  # takes seconds to import

    caplog.set_level("INFO", logger="cond_diffusion")
    lora = (f"init_from={stable}", "train.lora_rank=2", "train.learning_rate=0.02", "train.snapshots=2")
    checkpoint = train(tuning_config(bars_overrides, tmp_path / "run", *lora))
    assert "trains 0.01 of 0.81 million parameters" in caplog.text
    assert "train.snapshots: 2; LoRA runs store none" in caplog.text
    assert "snapshots need" not in caplog.text
    before, after = TextToImage.from_pretrained(stable), TextToImage.from_pretrained(checkpoint)
    changed = {
        name
        for name, weight in after.unet.state_dict().items()
        if not torch.equal(weight, before.unet.state_dict()[name])
    }
    matrices = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    assert changed == {name for name in before.unet.state_dict() if name.endswith(matrices)}
    diffusers_pipe = StableDiffusionPipeline.from_pretrained(stable)
    diffusers_pipe.load_lora_weights(checkpoint)
    diffusers_pipe.fuse_lora()
    fused = diffusers_pipe.unet.state_dict()
    for name in changed:
        expected = fused[name.replace(".weight", ".base_layer.weight")]
        torch.testing.assert_close(after.unet.state_dict()[name], expected, rtol=1e-5, atol=1e-6)
    # LoRA files of this package and of diffusers give the same weights.
    diffusers_pipe.unfuse_lora()
    layers = get_peft_model_state_dict(diffusers_pipe.unet, adapter_name="default_0")
    diffusers_pipe.save_lora_weights(tmp_path / "diffusers", unet_lora_layers=layers)
    for file in (checkpoint, tmp_path / "diffusers"):
        added = TextToImage.from_pretrained(stable, lora=file).unet.state_dict()
        for name, weight in after.unet.state_dict().items():
            torch.testing.assert_close(added[name], weight, rtol=1e-5, atol=1e-6)

    def with_settings(**settings: int) -> dict[str, torch.Tensor]:
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}
        save_file(load_file(checkpoint / FILE_NAME), tmp_path / FILE_NAME, metadata=metadata)
        return TextToImage.from_pretrained(stable, lora=tmp_path).unet.state_dict()

    added = with_settings(r=16, lora_alpha=2)  # the scale is alpha / (rank of the matrix, 2), whatever r is
    for name in changed:
        torch.testing.assert_close(added[name], after.unet.state_dict()[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"^lora: .*use_rslora"):
        with_settings(use_rslora=16, lora_alpha=2)
    with pytest.raises(UserError, match=r"^lora: .*down_blocks\.0\.attentions"):
        TextToImage.from_pretrained(lora=checkpoint)
    # A resumed run ends with the same weights.
    train(tuning_config(bars_overrides, tmp_path / "resumed", *lora, "train.max_steps=2"))
    resumed = weights(train(tuning_config(bars_overrides, tmp_path / "resumed", *lora, "resume=true")))
    assert all(torch.equal(value, resumed[name]) for name, value in weights(checkpoint).items())
    for rank in (4, 0):
        with pytest.raises(UserError, match=rf"^resume: train\.lora_rank .*2.*{rank}"):
            train(tuning_config(bars_overrides, tmp_path / "resumed", *lora, "resume=true", f"train.lora_rank={rank}"))
    # LoRA cannot be resumed with other base weights.
    file = stable / "unet" / "diffusion_pytorch_model.safetensors"
    original = file.read_bytes()
    tensors = load_file(file)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"] + 1}, file)
    with pytest.raises(UserError, match=r"^resume: .*init_from"):
        train(tuning_config(bars_overrides, tmp_path / "resumed", *lora, "resume=true", "train.max_steps=6"))
    file.write_bytes(original)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train.lora_rank=2"], r"^train\.lora_rank: 2 .*init_from"),
        (["init_from=builtin", "unet.channels=[64,64]"], r"^init_from: unet\.channels .*\(32, 64\).*\(64, 64\)"),
        (
            ["init_from=builtin", "objective.prediction=sample"],
            r"^init_from: objective\.prediction .*'epsilon'.*'sample'",
        ),
        (["init_from=builtin"], r"^unet\.in_channels: 4 .*12"),
        (["init_from=nowhere"], "nowhere"),
    ],
)
def test_options_that_contradict_init_from_are_user_errors(
    bars_overrides: list[str], tmp_path: Path, options: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        train(tuning_config(bars_overrides, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()
