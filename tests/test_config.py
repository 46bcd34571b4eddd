from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from cond_diffusion.config.run import Config, TrainConfig, load_config, save_config
from cond_diffusion.errors import UserError
from cond_diffusion.training.clip_pretraining import ClipPretrainingConfig


def test_words_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text("train: {batch_size: 3, max_steps: 5}\nunet: {channels: [64, 96, 128]}")
    config = load_config(Config, file, ["train.max_steps=7", "unet.attention=[false,true,true]", "run_dir=runs/x"])
    assert config.train == replace(TrainConfig(), batch_size=3, max_steps=7)
    assert config.unet.channels == (64, 96, 128)
    assert config.unet.attention == (False, True, True)
    assert config.run_dir == "runs/x"


def test_a_saved_config_reads_back_the_same(tmp_path: Path):
    config = load_config(Config, ROOT / "configs" / "mnist.yaml", ["unet.num_heads=[2,4]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Config, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_that_comes_with_the_project_loads(file: Path):
    schema = ClipPretrainingConfig if file.stem.startswith("clip_") else Config
    assert load_config(schema, file) != schema()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.batchsize=3", r"there is no config key 'train.batchsize' \(did you mean 'train.batch_size'\?\)"),
        ("unet.chanels=[3]", r"did you mean 'unet.channels'\?"),
        ("tran.batch_size=3", r"did you mean 'train"),
        ("train.max_steps=many", "train.max_steps: Value 'many' .* could not be converted to Integer"),
        ("unet.channels=32", "unet.channels: "),
        ("unet.channels=[a]", r"unet.channels=\[a\]: an item of a list has the wrong type"),
        ("train.mixed_precision=fp8", "train.mixed_precision: Invalid value 'fp8', expected one of"),
        ("resume=perhaps", "resume: 'perhaps'; expected true, false or a checkpoint"),
        ("data.channels=2", r"data.channels: 2 must be 1 \(grey\) or 3 \(RGB\)"),
        ("train.batch_size=0", "train.batch_size: 0 must be at least 1"),
        ("train.learning_rate=-1", "train.learning_rate: -1.0 must be above 0"),
        ("schedule.beta_end=1.5", "schedule.beta_start, schedule.beta_end: 0.0001 and 1.5"),
        ("unet.channels=[30,64]", "unet.channels: 30 must be divisible by unet.num_groups"),
        ("unet.channels=[32", r"'unet.channels=\[32' cannot be read as key=value"),
        ("train=3", "Merge error"),
        ("64", "'64' is no override; expected key=value"),
    ],
)
def test_a_bad_word_is_one_line_with_the_full_key(word: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        load_config(Config, overrides=[word])
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file .*configs/mnits.yaml \(did you mean '.*configs/mnist.yaml'\?\)"):
        load_config(Config, ROOT / "configs" / "mnits.yaml")
    for content, message in (("a: [", "cannot be read as YAML"), ("- 1\n- 2", "no `key: value` lines"), ("", "")):
        (tmp_path / "x.yaml").write_text(content)
        if message:
            with pytest.raises(UserError, match=message) as caught:
                load_config(Config, tmp_path / "x.yaml")
            assert "\n" not in str(caught.value)
        else:
            assert load_config(Config, tmp_path / "x.yaml") == Config()
