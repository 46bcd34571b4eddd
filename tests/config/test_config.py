import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cond_diffusion.config.data import DataConfig
from cond_diffusion.config.run import ClipPretrainingConfig, Config, SampleConfig, TrainConfig, load_config, save_config
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.config.schedule import ScheduleConfig
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


INVALID_FILES = [
    ("a: [", "YAML"),
    ("- 1\n- 2", "`key: value`"),
    ("[" * 3000, "YAML"),
    ("? [a]\n: b", r"\[a\]"),
    ("tran: {}", "tran"),
    ("train: 5", "train: '5'"),
    ("train: [1]", r"train: '\[1\]'"),
    ("train:\n  max_stesp: 1", r"train\.max_stesp: "),
    ("train: {max_steps: many}", r"train\.max_steps: 'many'"),
    ("unet: {channels: [a]}", r"unet\.channels\[0\]: 'a'"),
    ("sample: {prompts: null}", r"sample\.prompts: 'null'"),
    ("seed: 1\nseed: 2", "seed: .*twice"),
    ("data: {label_names: [a, b]}", r"data\.label_names: "),
    ("data: {label_names: {a: b}}", r"data\.label_names\.a: 'b'"),
    ("train.batch_size: 64", r"train\.batch_size: expected the section `train:`"),
    ("data: {label_names: {a: [x], a: [y]}}", r"data\.label_names\.a: given twice"),
    ('run_dir: "\\ud800"', r"run_dir: '\\ud800'"),
    ("data: {source: ''}", r"data\.source: ''; expected a path .* not empty"),
    ('data: {background: "\\0"}', r"data\.background: '\\x00'"),
]


def test_invalid_file_is_a_one_line_error(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"^--config: .*configs/mnits\.yaml .*\(did you mean '.*configs/mnist\.yaml'\?\)"
    ):
        load_config(Config, ROOT / "configs" / "mnits.yaml")
    for content, message in INVALID_FILES:
        (tmp_path / "x.yaml").write_text(content, encoding="utf-8")
        for overrides in ([], ["train.batch_size=8"]):  # which are not to blame
            with pytest.raises(UserError, match=f"x\\.yaml: .*{message}") as error:
                load_config(Config, tmp_path / "x.yaml", overrides)
            assert "\n" not in str(error.value)
    (tmp_path / "x.yaml").write_text("train: {max_steps: 10, warmup_steps: 1}", encoding="utf-8")
    with pytest.raises(UserError, match=r"^train\.max_steps: 'many'"):
        load_config(Config, tmp_path / "x.yaml", ["train.max_steps=many"])


def leaves(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        yield from leaves(kind, f"{prefix}{name}.") if is_dataclass(kind) else (prefix + name,)


def values_of(config: Any) -> Iterator[Any]:
    """Yield all values, also those inside of sections and lists."""
    if isinstance(config, dict | list | tuple):
        for value in config.values() if isinstance(config, dict) else config:
            yield from values_of(value)
    else:
        yield config


WRONG = [
    *["nan", "inf", "-inf", "1e400", "-1", "0", str(2**63), str(2**70), str(-(2**70)), "9" * 5000, "1.5", "true", "~"],
    *["", "???", "[]", "[a,b]", "[[a]]", "[nan]", "[-1]", "{a: b}", "[" * 400, "a" * 300, "\udcff", "\0", "a: b"],
]


def outcome(construct: Callable[[], Any]) -> Any:
    """Return what a constructor returns, or the message of its UserError; any other error fails the test."""
    try:
        return construct()
    except UserError as error:
        return str(error)


def assert_valid(result: Any, key: str, value: str) -> None:
    """Assert that a result is a message of one line that names the key, or a config without infinite numbers."""
    if isinstance(result, str):
        assert "\n" not in result
        assert len(result) < 500
        assert key in result
    else:
        numbers = [number for number in values_of(asdict(result)) if isinstance(number, int | float)]
        assert all(abs(number) < 2**64 if isinstance(number, int) else math.isfinite(number) for number in numbers) or (
            key == "train.max_grad_norm"  # inf: no clipping
        )


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("schema", [Config, ClipPretrainingConfig])
def test_every_value_of_every_field_is_accepted_or_a_one_line_error(schema: type, value: str, tmp_path: Path):
    for key in leaves(schema):
        result = outcome(lambda key=key: load_config(schema, overrides=[f"{key}={value}"]))
        assert_valid(result, key, value)
        if key in ("run_dir", "seed", "train.learning_rate") and not isinstance(result, str):
            save_config(result, tmp_path / "config.yaml")
            assert load_config(schema, tmp_path / "config.yaml") == result


@pytest.mark.parametrize("value", WRONG)
def test_every_value_of_every_sampling_option_is_accepted_or_a_one_line_error(value: str):
    for field in fields(SamplingOptions):
        assert_valid(outcome(lambda name=field.name: SamplingOptions(**{name: value})), field.name, value)


@pytest.mark.parametrize("schema", [SamplingOptions, ScheduleConfig, Config])
def test_an_unknown_field_is_a_type_error(schema: type):
    with pytest.raises(TypeError, match=f"{schema.__name__} has no field 'stepz'"):
        schema(stepz=5)


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
        run_dir=text or "x",
        track=optional,
        init_from=optional or None,
        data=DataConfig(source=text or "x", caption_templates=tuple(texts), label_names=names),
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


def test_comments_are_not_part_of_a_text_field(tmp_path: Path):
    lines = ["- a dog: red  # one", "# two", "- {a: b}  # three", "- [a, b] # four", "- a cat: blue", "", "# five"]
    text = "sample:\n  prompts:\n" + "".join(f"    {line}\n" for line in lines) + "# six\nseed: 1\n"
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    prompts = load_config(Config, tmp_path / "x.yaml").sample.prompts
    assert prompts == ("a dog: red", "{a: b}", "[a, b]", "a cat: blue")


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
