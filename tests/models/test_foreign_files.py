"""Files of other releases and other models: shards, fields that are off, a UNet without a middle block."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from cond_diffusion import UNet, UNetConfig, UserError
from cond_diffusion.config import schedule
from cond_diffusion.models.text_encoder import TextEncoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_unet() -> UNet:
    return UNet(UNetConfig(channels=(32, 64), num_groups=8, in_channels=1, sample_size=8, context_dim=16))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_unet().save_pretrained(tmp_path)
    return tmp_path


def write_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")


def test_sharded_weights_are_read_by_their_index(saved: Path):
    weights = load_file(saved / WEIGHTS)
    names = sorted(weights)
    shards = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    for shard, own in shards.items():
        save_file({name: weights[name] for name in own}, saved / shard)
    (saved / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (saved / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = UNet.from_pretrained(saved).state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    (saved / f"{WEIGHTS}.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"index\.json"):
        UNet.from_pretrained(saved)


@pytest.mark.parametrize("value", [None, False])
def test_unknown_fields_that_are_off_are_accepted(saved: Path, value: object):
    write_config(saved, an_option_of_tomorrow=value)
    UNet.from_pretrained(saved)
    schedule.from_diffusers({"timestep_values": value, "an_option_of_tomorrow": value, "tensor_format": "pt"})


def test_unknown_fields_that_are_on_are_refused_by_name(saved: Path):
    write_config(saved, an_option_of_tomorrow="on")
    with pytest.raises(UserError, match="an_option_of_tomorrow"):
        UNet.from_pretrained(saved)
    with pytest.raises(UserError, match="an_option_of_tomorrow"):
        schedule.from_diffusers({"an_option_of_tomorrow": 1})


def test_a_unet_without_a_middle_block_equals_that_of_diffusers(tmp_path: Path):
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=16,
        norm_num_groups=8,
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet.from_pretrained(tmp_path / "theirs")
    assert not ours.config.middle_block
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), theirs(*inputs).sample, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert again.config["mid_block_type"] is None


def test_words_outside_the_vocabulary_are_found():
    encoder = TextEncoder.from_pretrained("builtin", None)
    assert encoder.unknown_words(["a digit seven", "the number 2", "a handwritten nine"]) == []
    assert encoder.unknown_words(["a purple elephant", "seven"]) == ["purple", "elephant"]
