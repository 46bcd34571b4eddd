"""Settings of `accelerate launch`, runs that are done, and runs that stop because of their data."""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from conftest import run_in_processes, weights

from cond_diffusion.config.run import Config, TrainConfig
from cond_diffusion.errors import UserError
from cond_diffusion.pipeline.run_folder import checkpoints
from cond_diffusion.training.setup import REFUSED_SETTINGS, check_launcher, mixed_precision
from cond_diffusion.training.trainer import train


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_that_training_would_ignore_are_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "NO")
    check_launcher(TrainConfig())
    monkeypatch.setenv(name, "inductor" if "DYNAMO" in name else "true")
    with pytest.raises(UserError, match=rf"^{name}="):
        check_launcher(TrainConfig())


def test_accumulation_of_the_launcher_must_be_that_of_the_config(
    bars_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(bars_config, train=replace(bars_config.train, gradient_accumulation_steps=2))
    expected = weights(train(config))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    found = weights(train(replace(config, run_dir=str(tmp_path / "launched"))))
    assert all(expected[name].equal(found[name]) for name in expected)
    with pytest.raises(
        UserError, match=r"^ACCELERATE_GRADIENT_ACCUMULATION_STEPS: 2 .*train\.gradient_accumulation_st"
    ):
        train(replace(bars_config, run_dir=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("launched", "given", "expected"),
    [
        *(("bf16", "auto", "bf16"), ("bf16", "bf16", "bf16"), ("no", "bf16", "bf16"), ("no", "no", "no")),
        *(("no", "auto", "bf16"), (None, "auto", "bf16"), (None, None, "bf16"), (None, "fp32", "no")),
    ],
)
def test_precision_is_that_of_the_config_or_the_launcher_or_the_device(
    launched: str | None, given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: not including_emulation)
    config = TrainConfig(mixed_precision=given)  # type: ignore[arg-type]
    assert mixed_precision(config, torch.device("cuda")) == expected


@pytest.mark.parametrize(("launched", "given"), [("bf16", "no"), ("bf16", "fp32"), ("fp16", "bf16"), ("fp8", "auto")])
def test_precisions_that_contradict_or_are_unsupported_are_refused(
    launched: str, given: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(UserError, match=rf"mixed_precision.* {launched}"):
        mixed_precision(TrainConfig(mixed_precision=given), torch.device("cuda"))  # type: ignore[arg-type]


@pytest.mark.parametrize("max_steps", [4, 2])
def test_resuming_a_run_that_is_done_changes_nothing(bars_config: Config, max_steps: int):
    saved = train(bars_config)
    before = (Path(bars_config.run_dir) / "config.yaml").read_bytes()
    data = replace(bars_config.data, source="no/such/folder")  # is not opened
    done = replace(bars_config, resume=True, data=data, train=replace(bars_config.train, max_steps=max_steps))
    assert train(done) == saved
    assert (Path(bars_config.run_dir) / "config.yaml").read_bytes() == before


def train_until_its_data_stop_it(process: int, config: Config) -> None:
    with pytest.raises(UserError) as error:
        train(config)
    (Path(config.run_dir) / f"error-{process}").write_text(str(error.value), encoding="utf-8")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_its_data_stop_is_saved_first(
    bars_config: Config, bars_parquet: Path, tmp_path: Path, processes: int
):
    """Only one of two processes reads the bad row."""
    table = datasets.load_dataset("parquet", data_files=str(bars_parquet), split="train")
    assert isinstance(table, datasets.Dataset)
    labels = table["label"]
    table = table.remove_columns("label").add_column(
        "text", [None if i == 40 else str(x) for i, x in enumerate(labels)]
    )
    table.to_parquet(tmp_path / "set" / "a.parquet")
    changes = {"source": str(tmp_path / "set"), "streaming": True, "caption_column": "text", "caption_templates": ()}
    data = replace(bars_config.data, **changes, shuffle_buffer=8, held_out=0, max_bad_fraction=0.0)
    changes = {"max_steps": 10, "checkpoint_every": 0, "batch_size": 8 // processes}
    config = replace(bars_config, data=data, train=replace(bars_config.train, **changes))
    if processes == 1:
        train_until_its_data_stop_it(0, config)
    else:
        run_in_processes(processes, train_until_its_data_stop_it, config)
    errors = [file.read_text(encoding="utf-8") for file in Path(config.run_dir).glob("error-*")]
    assert len(errors) == processes
    assert sum("data.image_column: " in error and "expected a string" in error for error in errors) == 1
    assert [path.name for path in checkpoints(Path(config.run_dir))] == ["step-00000005"]


def test_init_from_accepts_the_config_of_its_own_run(bars_config: Config, tmp_path: Path):
    config = replace(bars_config, unet=replace(bars_config.unet, num_heads=4))
    saved = train(config)
    train(replace(config, init_from=str(saved), run_dir=str(tmp_path / "further")))
    other = replace(
        config, unet=replace(config.unet, num_heads=8), init_from=str(saved), run_dir=str(tmp_path / "other")
    )
    with pytest.raises(UserError, match=r"^init_from: unet\.num_heads"):
        train(other)
    resumed = replace(config, run_dir=str(tmp_path / "further"), resume=True)
    longer = replace(config.train, max_steps=6)
    for source in (saved, saved.parent.parent):  # the checkpoint, or its run
        train(replace(resumed, init_from=str(source), train=longer))
    with pytest.raises(UserError, match=f"^resume: init_from changed from {saved} to emoji; expected {saved}$"):
        train(replace(resumed, init_from="emoji", train=longer))
