"""Files of others in the folder of a run are neither used nor deleted."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cond_diffusion.config.run import CONFIG_NAME, Config, TextConfig, save_config
from cond_diffusion.files import write_json
from cond_diffusion.models.ema import snapshot_files
from cond_diffusion.pipeline.checkpoint import Checkpoint
from cond_diffusion.pipeline.run_folder import (
    PROGRESS_NAME,
    checkpoints,
    newest_checkpoint,
    read_metrics,
    remove_unfinished,
    save_checkpoint,
)


def write_checkpoint(folder: Path) -> None:
    for name in ("model_index.json", "unet/config.json", f"state/{PROGRESS_NAME}"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, {})


def test_the_clip_of_a_run_that_was_moved_is_the_one_in_its_folder(tmp_path: Path):
    folder = tmp_path / "moved" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    save_config(Config(run_dir="runs/before", text=TextConfig(encoder="pretrain")), folder / CONFIG_NAME)
    assert Checkpoint(folder).run_config.clip == str(Path("runs/before/text_encoder"))
    (tmp_path / "moved" / "text_encoder").mkdir()
    assert Checkpoint(folder).run_config.clip == str(tmp_path / "moved" / "text_encoder")


def test_a_config_of_other_software_is_not_one_of_a_run(tmp_path: Path):
    (tmp_path / CONFIG_NAME).write_text("model:\n  target: ldm.models.LatentDiffusion\n", encoding="utf-8")
    assert Checkpoint(tmp_path).config is None


def write_note(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").touch()


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "file": Path.touch,
    "empty folder": Path.mkdir,
    "folder": write_note,
    "link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_skipped_and_kept(
    kind: str, with_state: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole = save_checkpoint(tmp_path, 5, write_checkpoint, keep=1)
    names = ("step-00000001", "step-00000007", "step-99999999")
    for name in names:
        FOREIGN[kind](whole.with_name(name))
    assert newest_checkpoint(tmp_path, with_state=with_state) == whole
    assert kind == "link" or str(whole.with_name("step-99999999")) in caplog.text
    assert save_checkpoint(tmp_path, 7, write_checkpoint, keep=1) in checkpoints(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000007"]
    kept = [path.name for path in whole.parent.iterdir() if not (path / "model_index.json").exists()]
    assert sorted(kept) == ["step-00000001", "step-00000007.superseded-1", "step-99999999"]


def test_only_names_that_a_run_writes_are_deleted(tmp_path: Path):
    foreign = [
        *("snapshots/step-00000001.bak", "snapshots/step-notes.txt", "snapshots/step-foo.safetensors"),
        *("snapshots/step-00000001.safetensors.bak", "checkpoints/.step-mine/x", "checkpoints/.step-00000001.mine/x"),
        *(".x.part", "samples/.x.0123456.part", "checkpoints/.step-00000001.old.bak/x"),
        *("notes.part", "checkpoints/.step-00000001.old"),
    ]
    ours = [
        *("checkpoints/.step-00000002.unfinished/x", "checkpoints/.step-00000002.state/x"),
        *("checkpoints/.step-00000002.old/x", "snapshots/.step-00000001.safetensors.89abcdef.part"),
        ".config.yaml.01234567.part",
    ]
    for name in [*foreign, *ours, "snapshots/step-00000001.safetensors"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*foreign, "snapshots/step-00000001.safetensors"}
    assert snapshot_files(tmp_path) == [(1, tmp_path / "snapshots" / "step-00000001.safetensors")]


def test_lines_that_are_not_metrics_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    wrong = [b"", b"5", b"[]", b"null", b'"a"', b"{}", b'{"step": "1"}', b'{"step": 2, "lo', b"\xff\0", b"[" * 100_000]
    lines = [b'{"step": 1}', *wrong, b'{"step": 2, "loss": null}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with caplog.at_level(logging.WARNING, "cond_diffusion"):
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "loss": None}]
    assert f"{len(wrong) - 1} of {len(lines) - 1} lines" in caplog.text
