"""Files are written whole or not at all."""

import errno
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cond_diffusion import TextToImage, UserError, files
from cond_diffusion.config.run import Config, save_config
from cond_diffusion.config.sampling import GenerationSettings
from cond_diffusion.evaluation.report import Results, plot, save_grid
from cond_diffusion.models.ema import save_snapshot
from cond_diffusion.models.lora import save_lora
from cond_diffusion.pipeline import generate
from cond_diffusion.pipeline.generate import generate_to_file, generate_to_folder
from cond_diffusion.pipeline.run_folder import save_checkpoint

SETTINGS = GenerationSettings(prompts=("seven",), steps=2)
POINT = {"steps": 5, "prompt accuracy": 0.5, "Fréchet distance": 2.0}


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], None]:
    """Return a function after whose call no file of more than a byte can be written into a folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in ("temporary", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    full: list[Path] = []
    flush = files.flush

    def flush_if_there_is_room(path: Path) -> None:
        if path.stat().st_size > 1 and any(folder in path.parents for folder in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(files, "flush", flush_if_there_is_room)
    return full.append


WRITERS: dict[str, Callable[[], Any]] = {
    "image": lambda: [*generate_to_file(SETTINGS, output="x.png")],
    "folder": lambda: generate_to_folder(SETTINGS, "."),
    "evaluation.json": lambda: Results(Path("evaluation"), {"a": 1}),
    "grid": lambda: save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 2, Path("grid.png")),
    "plot": lambda: plot({"": [POINT]}, "steps", 1.0, Path("plot.png")),
    "config": lambda: save_config(Config(), Path("config.yaml")),
    "model": lambda: TextToImage.from_pretrained().save_pretrained("model"),
    "LoRA": lambda: save_lora({"a": torch.zeros(4)}, Path()),
    "snapshot": lambda: save_snapshot(Path(), 1, [(0.1, {"a": torch.zeros(4)})]),
    "checkpoint": lambda: save_checkpoint(Path(), 1, lambda folder: files.write_json(folder / "x", {}), keep=1),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_leaves_no_partial_file(kind: str, fill_disk: Callable[[Path], None], tmp_path: Path):
    for folder in ("work", "temporary"):
        fill_disk(tmp_path / folder)
    with pytest.raises((UserError, OSError)) as error:
        WRITERS[kind]()
    assert "No space left on device" in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["image", "film", "attention maps"])
def test_images_that_cannot_be_written_are_kept_elsewhere(kind: str, fill_disk: Callable[[Path], None], tmp_path: Path):
    written = generate_to_file(SETTINGS, output="x.png", film="x.webp", attention_maps="maps.png")
    for _ in range(["image", "film", "attention maps"].index(kind)):
        next(written)
    before = sorted((tmp_path / "work").iterdir())
    fill_disk(tmp_path / "work")
    with pytest.raises(UserError, match="No space left on device") as error:
        next(written)
    (kept,) = (tmp_path / "temporary").iterdir()
    assert str(kept) in str(error.value)
    with Image.open(kept) as image:
        image.load()
    assert sorted((tmp_path / "work").iterdir()) == before


def test_nothing_is_written_before_the_end_and_a_file_that_appears_meanwhile_is_kept(
    fill_disk: Callable[[Path], None], tmp_path: Path
):
    """So that a kill leaves nothing behind."""

    def callback(*_: Any) -> None:
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "x.png"]
        Path("x.png").write_text("precious", encoding="utf-8")

    with pytest.raises(UserError, match=r"^--output: x\.png"):
        next(generate_to_file(SETTINGS, output="x.png", film="x.gif", callback_on_step_end=callback))
    assert Path("x.png").read_text(encoding="utf-8") == "precious"
    (kept,) = (tmp_path / "temporary").iterdir()
    with Image.open(kept) as image:
        assert image.size == (28, 28)


def write_to(option: str, path: str) -> Any:
    if option == "output_dir":
        return generate_to_folder(SETTINGS, path)
    return next(generate_to_file(SETTINGS, **{option: path}))


@pytest.mark.parametrize("path", ["/proc/x/x", "file/x", "y" * 300, "x\0", "no/such/x"])
@pytest.mark.parametrize("option", ["output", "film", "attention_maps", "output_dir"])
def test_path_that_cannot_be_written_is_reported_before_the_model_is_loaded(
    path: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load_pipeline(settings: GenerationSettings) -> None:
        raise AssertionError("loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_pipeline", load_pipeline)
    (tmp_path / "file").touch()
    suffix = {"film": ".gif", "output_dir": ""}.get(option, ".png")
    expected = AssertionError if (option, path) == ("output_dir", "no/such/x") else UserError  # it is created later
    with pytest.raises(expected, match="loaded" if expected is AssertionError else f"^--{option.replace('_', '-')}: "):
        write_to(option, path + suffix)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_empty_variable_leaves_the_cache_in_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert files.cache_folder() == Path.home() / ".cache" / "cond_diffusion"


def test_a_folder_that_is_a_link_is_written_on_the_disk_that_it_leads_to(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "disk")
    with files.written_aside(tmp_path / "here" / "link") as unfinished:
        assert unfinished.parent == tmp_path / "disk"
        unfinished.mkdir()
        (unfinished / "a").write_text("new", encoding="utf-8")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["a"]
    assert (tmp_path / "here" / "link").is_symlink()


def test_existing_folder_receives_the_new_files_and_keeps_the_others(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/old", "a/b/same"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    with files.written_aside(tmp_path / "a") as unfinished:
        (unfinished / "b").mkdir(parents=True)
        (unfinished / "b" / "same").write_text("new", encoding="utf-8")
        assert (tmp_path / "a" / "b" / "same").read_text(encoding="utf-8") == "old"
        assert files.UNFINISHED.fullmatch(unfinished.name)
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a/old": "old", "a/b/same": "new"}
    files.write_json(tmp_path / "x.json", {"ä": 1})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"ä": 1}
