import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import ClipPretrainingConfig, Config, SampleConfig, TrainConfig, load_config, save_config
from cond_diffusion.config.unet import UNetConfig
from cond_diffusion.errors import UserError


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
        ("train.max_steps=many", "train.max_steps: 'many'"),
        ("unet.channels=32", "unet.channels: "),
        ("unet.channels=[a]", r"unet.channels\[0\]: 'a'"),
        ("train.mixed_precision=fp8", "train.mixed_precision: 'fp8'"),
        ("resume=perhaps", "resume: 'perhaps'; expected true, false or a checkpoint"),
        ("data.channels=2", "data.channels: 2"),
        ("train.batch_size=0", "train.batch_size: '0'"),
        ("train.learning_rate=-1", "train.learning_rate: '-1'"),
        ("schedule.beta_end=1.5", "schedule.beta_start, schedule.beta_end: 0.0001 and 1.5"),
        ("unet.channels=[30,64]", "unet.channels: 30 must be divisible by unet.num_groups"),
        ("unet.channels=[32", r"'unet.channels=\[32' cannot be read as key=value"),
        ("train=3", "train: is a section"),
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


TYPED = ["no", "on", "007", "20241125_1530", "3.10", "#ffffff", "a dog: red", r"\${5}", "- a", "[a"]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    [
        "no",
        "on",
        "007",
        "20241125_1530",
        "3.10",
        "#ffffff",
        "a dog: red",
        r"\\${5}",
        "null",
        "~",
        "- a",
        "[a",
        "{a: b}",
        "'",
    ]
)


@given(
    text=TEXT,
    texts=st.lists(TEXT, max_size=3),
    names=st.dictionaries(TEXT, st.lists(TEXT, max_size=3), max_size=3),
    optional=TEXT | st.none(),
    number=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    norm=st.floats(min_value=0, exclude_min=True, allow_nan=False),
    heads=st.sampled_from([4, (2, 4)]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_whatever_is_saved_reads_back_equal(
    tmp_path: Path,
    text: str,
    texts: list[str],
    names: dict,
    optional: str | None,
    number: float,
    norm: float,
    heads: Any,
):
    config = Config(
        run_dir=text,
        track=optional,
        init_from=optional,
        data=DataConfig(source=text, caption_templates=tuple(texts), label_names=names),
        unet=UNetConfig(num_heads=heads),
        train=TrainConfig(learning_rate=number, max_grad_norm=norm),
        sample=SampleConfig(prompts=tuple(texts)),
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Config, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "text", ["no", "on", "007", "20241125_1530", "3.10", "#ffffff", "a dog: red", r"\\${5}", "- a", "[a"]
)
def test_a_text_field_receives_the_text_that_was_typed(tmp_path: Path, text: str):
    assert load_config(Config, overrides=[f"data.source={text}"]).data.source == text
    item = f"'{text}'" if text in ("#ffffff", "- a", "[a") else text
    field = f"'{text}'" if text == "a dog: red" else item
    (tmp_path / "x.yaml").write_text(f"run_dir: {field}\nsample:\n  prompts:\n    - {item}\n", encoding="utf-8")
    config = load_config(Config, tmp_path / "x.yaml")
    assert (config.run_dir, config.sample.prompts) == (text, (text,))


def test_mnist_brings_its_captions_and_other_sources_do_not():
    mnist = load_config(Config, overrides=["data.source=mnist", "text.encoder=builtin"]).data.with_captions()
    assert mnist.caption_column == "label"
    assert len(mnist.caption_templates) == 12
    assert mnist.label_names["word"][7] == "seven"
    assert load_config(Config, overrides=["data.source=my_pictures"]).data.with_captions().caption_templates == ()
    own = load_config(
        Config, overrides=["data.caption_column=label", "data.caption_templates=[{label}]"]
    ).data.with_captions()
    assert (own.caption_templates, own.label_names) == (("{label}",), {})


def test_the_config_imports_no_torch():
    code = "import sys, cond_diffusion.config.run, cond_diffusion.cli.sample; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
