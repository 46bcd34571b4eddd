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


def test_overrides_take_precedence_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text("train: {batch_size: 3, max_steps: 5}\nunet: {channels: [64, 96, 128]}", encoding="utf-8")
    config = load_config(Config, file, ["train.max_steps=7", "unet.attention=[false,true,true]", "run_dir=runs/x"])
    assert config.train == replace(TrainConfig(), batch_size=3, max_steps=7)
    assert config.unet.channels == (64, 96, 128)
    assert config.unet.attention == (False, True, True)
    assert config.run_dir == "runs/x"


def test_saved_config_loads_as_an_equal_config(tmp_path: Path):
    config = load_config(Config, ROOT / "configs" / "mnist.yaml", ["unet.num_heads=[2,4]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Config, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_in_configs_loads(file: Path):
    schema = ClipPretrainingConfig if file.stem.startswith("clip_") else Config
    assert load_config(schema, file) != schema()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=3", r"^train\.batchsize: .*\(did you mean 'train\.batch_size'\?\)"),
        ("unet.chanels=[3]", r"^unet\.chanels: .*\(did you mean 'unet\.channels'\?\)"),
        ("tran.batch_size=3", r"^tran\.batch_size: .*\(did you mean 'train"),
        ("train.max_steps=many", r"^train\.max_steps: 'many'"),
        ("unet.channels=32", r"^unet\.channels: "),
        ("unet.channels=[a]", r"^unet\.channels\[0\]: 'a'"),
        ("train.mixed_precision=fp8", r"^train\.mixed_precision: 'fp8'"),
        ("resume=perhaps", r"^resume: 'perhaps'"),
        ("data.channels=2", r"^data\.channels: 2"),
        ("train.batch_size=0", r"^train\.batch_size: '0'"),
        ("train.learning_rate=-1", r"^train\.learning_rate: '-1'"),
        ("schedule.beta_end=1.5", r"^schedule\.beta_start, schedule\.beta_end: 0\.0001 and 1\.5"),
        ("unet.channels=[30,64]", r"^unet\.channels: 30 .*unet\.num_groups \(32\)"),
        ("unet.channels=[32", r"^'unet\.channels=\[32' .*key=value"),
        ("train=3", r"^train: '3' .*train\.batch_size="),
        ("64", r"^'64' .*key=value"),
    ],
)
def test_invalid_override_is_a_one_line_error_with_the_full_key(override: str, message: str):
    with pytest.raises(UserError, match=message) as error:
        load_config(Config, overrides=[override])
    assert "\n" not in str(error.value)


def test_invalid_file_is_a_one_line_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"^--config: .*configs/mnits\.yaml \(did you mean '.*configs/mnist\.yaml'\?\)"):
        load_config(Config, ROOT / "configs" / "mnits.yaml")
    for content, message in (("a: [", r"^--config: .*x\.yaml.* YAML"), ("- 1\n- 2", r"^--config: .*`key: value`")):
        (tmp_path / "x.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message) as error:
            load_config(Config, tmp_path / "x.yaml")
        assert "\n" not in str(error.value)


def test_empty_file_gives_the_defaults(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("", encoding="utf-8")
    assert load_config(Config, tmp_path / "x.yaml") == Config()


# Texts that YAML would parse as another type, or not at all.
SPECIAL = ["no", "on", "007", "20241125_1530", "3.10", "#ffffff", "a dog: red", r"\\${5}", "- a", "[a"]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    [*SPECIAL, "null", "~", "{a: b}", "'"]
)


@pytest.mark.slow
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
def test_config_with_any_values_is_restored_by_save_and_load(
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


@pytest.mark.parametrize("text", SPECIAL)
def test_text_field_keeps_the_text_as_typed(tmp_path: Path, text: str):
    assert load_config(Config, overrides=[f"data.source={text}"]).data.source == text
    item = f"'{text}'" if text in ("#ffffff", "- a", "[a") else text
    field = f"'{text}'" if text == "a dog: red" else item
    (tmp_path / "x.yaml").write_text(f"run_dir: {field}\nsample:\n  prompts:\n    - {item}\n", encoding="utf-8")
    config = load_config(Config, tmp_path / "x.yaml")
    assert (config.run_dir, config.sample.prompts) == (text, (text,))


def test_only_built_in_sources_have_default_captions():
    mnist = load_config(Config, overrides=["data.source=mnist", "text.encoder=builtin"]).data.with_captions()
    assert mnist.caption_column == "label"
    assert len(mnist.caption_templates) == 12
    assert mnist.label_names["word"][7] == "seven"
    assert load_config(Config, overrides=["data.source=my_pictures"]).data.with_captions().caption_templates == ()
    own = load_config(
        Config, overrides=["data.caption_column=label", "data.caption_templates=[{label}]"]
    ).data.with_captions()
    assert (own.caption_templates, own.label_names) == (("{label}",), {})


def test_parsing_options_does_not_import_torch():
    code = "import sys, cond_diffusion.config.run, cond_diffusion.cli.sample; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
