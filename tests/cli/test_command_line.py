"""The two scripts as a user types them, rightly and wrongly."""

import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from cond_diffusion import TextToImage
from cond_diffusion.cli.main import command_line
from cond_diffusion.diffusion.samplers import Noise
from cond_diffusion.errors import UserError
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL
from cond_diffusion.pipeline.generate import read_settings


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Run a script of the project in this process, in an empty folder; return its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        code = int(left.value.code or 0)
        output, errors = capfd.readouterr()
        return code, output, errors

    return run


def test_a_prompt_becomes_a_png_whose_path_is_printed(tmp_path: Path):
    """In a process of its own, from another folder, with the progress bar on standard error."""
    command = [sys.executable, str(ROOT / "sample.py"), "a digit seven", "--steps", "20"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "a-digit-seven.png\n"
    assert "20/20" in result.stderr
    with Image.open(tmp_path / "a-digit-seven.png") as picture:
        assert picture.size == (28, 28)
        low, high = picture.getextrema()
        assert low < 30
        assert high > 200  # black and white, not grey noise or nothing


def test_a_grid_has_a_row_for_each_prompt_and_names_are_not_reused(type_in, tmp_path: Path):
    words = ["seven", "two", "--num-images", "3", "--steps", "2", "--seed", "5"]
    assert type_in("sample", *words)[:2] == (0, "seven.png\n")
    assert type_in("sample", *words)[:2] == (0, "seven-2.png\n")
    assert type_in("sample", *words, "--output", "other.png")[:2] == (0, "other.png\n")
    with Image.open(tmp_path / "seven.png") as one, Image.open(tmp_path / "other.png") as other:
        assert one.size == (112 + 3 * 30 - 2, 2 * 30 - 2)
        assert one.tobytes() == other.tobytes()


def test_prompts_come_from_a_file_or_standard_input_and_can_go_without_labels(
    type_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "prompts.txt").write_text("two\n\n  three \n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("four\n"))
    words = ["--steps", "2", "--no-labels"]
    assert type_in("sample", "one", "--prompts-file", "prompts.txt", *words)[:2] == (0, "one.png\n")
    assert type_in("sample", "--prompts-file", "-", *words)[:2] == (0, "four.png\n")
    assert read_settings("one.png", "")["prompts"] == ["one", "two", "three"]
    with Image.open("one.png") as picture:
        assert picture.size == (28, 3 * 30 - 2)


def noise_of_batches(batches: int) -> Callable[[TextToImage, list[int]], Noise]:
    """What draws the noise, for so many batches; then somebody presses Ctrl-C."""
    noise, left = TextToImage._noise, iter(range(batches))

    def until_interrupted(pipe: TextToImage, seeds: list[int]) -> Noise:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return noise(pipe, seeds)

    return until_interrupted


def test_a_folder_of_pictures_goes_on_where_it_was_interrupted(type_in, tmp_path: Path):
    """Each is the picture that is drawn alone, with its own settings; what is there stays."""
    words = ["seven", "a two", "--num-images", "2", "--seed", "3", "--steps", "2", "--guidance-scale", "2,4"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TextToImage, "_noise", noise_of_batches(1))
        code, _, errors = type_in("sample", *words, "--output-dir", "all", "--batch-size", "3")
    assert code == 130
    assert errors.splitlines()[-1] == "interrupted; all has 3 of 4 images, and the same command continues from there"
    assert type_in("sample", *words, "--output-dir", "all", "--batch-size", "3")[:2] == (0, "all\n")
    names = ["0000-0000-seven.png", "0000-0001-seven.png", "0001-0000-a-two.png", "0001-0001-a-two.png"]
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == names
    stamps = [(tmp_path / "all" / name).stat().st_mtime_ns for name in names]
    (tmp_path / "all" / names[2]).unlink()
    assert type_in("sample", *words, "--output-dir", "all")[0] == 0
    again = [(tmp_path / "all" / name).stat().st_mtime_ns for name in names]
    assert [old == new for old, new in zip(stamps, again, strict=True)] == [True, True, False, True]
    alone = ["a two", "--seed", "4", "--steps", "2", "--guidance-scale", "4", "--output", "alone.png"]
    assert type_in("sample", *alone)[0] == 0
    assert type_in("sample", "--from-image", "all/0001-0001-a-two.png", "--output", "repeated.png")[0] == 0
    pictures = [
        Image.open(tmp_path / name).convert("L") for name in ("all/0001-0001-a-two.png", "alone.png", "repeated.png")
    ]
    for picture in pictures[1:]:
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(pictures[0])).max() <= 1
    code, _, errors = type_in("sample", *words[:-1], "5,5", "--output-dir", "all")
    assert code == 2
    assert "--output-dir: all/0000-0000-seven.png was made with guidance_scale 2.0, not 5.0, and is not" in errors


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_an_interrupted_picture_keeps_what_was_drawn(
    type_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
):
    words = ["seven", "two", "--num-images", "3", "--steps", "2", "--batch-size", "2"]
    assert type_in("sample", *words, "--output", "whole.png")[0] == 0
    monkeypatch.setattr(TextToImage, "_noise", noise_of_batches(batches))
    code, output, errors = type_in("sample", *words, "--output", "kept.png")
    assert (code, output) == (130, "")
    if not batches:
        assert not (tmp_path / "kept.png").exists()
        return
    last = errors.splitlines()[-1]
    assert (
        last
        == f"interrupted; kept.png has the first {2 * batches} of 6 images, and --from-image kept.png samples them all"
    )
    with Image.open("whole.png") as whole, Image.open("kept.png") as kept:
        assert kept.size == (whole.width, batches * 30 - 2)  # a row after one batch, two after two
        for i in range(3 * batches):
            x, y = 112 + 30 * (i % 3), 30 * (i // 3)
            encoded_image = (x, y, x + 28, y + 28)
            if i < 2 * batches:
                assert kept.crop(encoded_image).tobytes() == whole.crop(encoded_image).tobytes()
            else:
                assert kept.crop(encoded_image).getextrema() == (0, 0)


def test_every_option_changes_the_picture(type_in, tmp_path: Path):
    drawn = {}
    options = [
        *["", "--seed 1", "--guidance-scale 1", "--negative-prompt seven", "--steps 4", "--guidance-interval 0,500"],
        *["--guidance-rescale 0.7", "--dynamic-thresholding 0.9", "--sampler ddim", "--sampler ddim --eta 0.5"],
        *["--sampler heun", "--sampler dpm_solver", "--sampler dpm_solver --order 1 --eta 0.5", "--sampler unipc"],
        *["--sampler unipc --order 1", "--variance beta", "--image old.png", "--image old.png --strength 0.4"],
        *["--image old.png --mask mask.png", "--image old.png --mask mask.png --resamplings 2"],
    ]
    assert type_in("sample", "seven", "--steps", "3", "--output", "old.png")[0] == 0
    Image.linear_gradient("L").resize((28, 28)).save(tmp_path / "mask.png")
    for option in options:
        assert type_in("sample", "two", "--steps", "3", "--output", "x.png", *option.split())[0] == 0
        with Image.open(tmp_path / "x.png") as picture:
            drawn[picture.tobytes()] = option
        (tmp_path / "x.png").unlink()
    assert len(drawn) == len(options)


def test_a_picture_is_drawn_again_from_itself_and_with_changes(type_in, tmp_path: Path):
    words = ["a digit two", "seven", "--num-images", "2", "--steps", "4", "--sampler", "dpm_solver", "--eta", "0.5"]
    more = ["--guidance-scale", "2,4", "--guidance-interval", "0,900", "--seed=-3", "--negative-prompt=-one"]
    assert type_in("sample", *words, *more, "--output", "first.png")[0] == 0
    assert type_in("sample", "--from-image", "first.png", "--output", "again.png")[:2] == (0, "again.png\n")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert type_in("sample", "three", "--from-image", "first.png", "--guidance-scale", "3")[:2] == (0, "three.png\n")
    with Image.open(tmp_path / "three.png") as other:
        assert other.size == (2 * 30 - 2, 28)
        assert json.loads(other.text["cond_diffusion:eta"]) == 0.5  # type: ignore[attr-defined]
        assert json.loads(other.text["cond_diffusion:prompts"]) == ["three"]  # type: ignore[attr-defined]


def test_an_edited_picture_is_drawn_again_from_itself(type_in, tmp_path: Path):
    Image.linear_gradient("L").resize((40, 40)).save(tmp_path / "old.png")
    Image.radial_gradient("L").resize((40, 40)).save(tmp_path / "mask.png")
    edits = ["--image", "old.png", "--mask", "mask.png", "--strength", "0.9", "--resamplings", "2", "--steps", "12"]
    assert type_in("sample", "two", *edits)[:2] == (0, "two.png\n")
    assert type_in("sample", "--from-image", "two.png", "--output", "again.png")[0] == 0
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert type_in("sample", "--from-image", "two.png", "--image", "mask.png", "--output", "new.png")[0] == 0


def test_a_film_and_attention_maps_lie_beside_the_picture(type_in, tmp_path: Path):
    words = ["a seven", "two", "--num-images", "2", "--steps", "3", "--film", "f.gif", "--attention-maps", "maps.png"]
    assert type_in("sample", *words)[:2] == (0, "a-seven.png\nf.gif\nmaps.png\n")
    with Image.open(tmp_path / "f.gif") as film:
        assert film.n_frames == 3  # type: ignore[attr-defined]
    with Image.open(tmp_path / "maps.png") as maps:
        assert maps.size == (3 * 114 - 2, 4 * (14 + 112 + 2) - 2)  # a row for each picture: it, and two words
    before = sorted(tmp_path.iterdir())
    code, _, errors = type_in("sample", "two", "--film", "new.gif", "--attention-maps", "maps.png", "--output", "y.png")
    assert code == 2
    assert "--attention-maps: maps.png exists already" in errors
    code, _, errors = type_in("sample", "two", "--image", "a-seven.png", "--strength", "0", "--film", "new.gif")
    assert code == 2
    assert "strength: 0.0 leaves no steps to show" in errors
    assert sorted(tmp_path.iterdir()) == before


def test_a_prompt_that_is_too_long_says_what_is_cut(type_in, caplog: pytest.LogCaptureFixture):
    code, output, _ = type_in("sample", "one " * 14 + "and two", "--steps", "1", "--output", "x.png")
    assert (code, output) == (0, "x.png\n")
    assert "this part is cut: 'and two'" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "PROMPT"),
        ("seven --num-images 0", "num_images: '0'"),
        ("seven --num-images -2", "num_images: '-2'"),
        ("seven --num-images two", "num_images: 'two'"),
        ("seven --steps -5", "steps: '-5'"),
        ("seven --steps 1001", "steps: 1001 "),
        ("seven --guidance-scale -1", "guidance_scale: '-1'"),
        ("seven --guidance-scale nan", "guidance_scale: 'nan'"),
        ("seven --sampler dpm", "sampler: 'dpm' (did you mean 'ddpm'?)"),
        ("seven --checkpoint no/such/run", "there is no checkpoint no/such/run"),
        ("seven --checkpoint runs", "there is no checkpoint runs"),
        ("seven --output no-such-folder/x.png", "--output: no-such-folder/x.png cannot be written: No such file"),
        ("seven --output taken.png", "--output: taken.png exists already and is not overwritten"),
        ("seven --output x.jpg", "--output: x.jpg must end in .png"),
        ("seven --checkpoint empty-run", "empty-run holds no complete checkpoint"),
        ("seven --stepps 5", "--stepps"),
        ("seven --guidance-scale 2,x", "guidance_scale[1]: 'x'"),
        ("seven --guidance-scale 2,3", "guidance_scale: 2 values for 1 prompts; expected one, or one for each"),
        ("seven --guidance-interval 800,200", "guidance_interval: 800 to 200 holds no timestep"),
        ("seven --guidance-interval 800", "guidance_interval: '800'"),
        ("seven --eta 0.5", "eta: 0.5 applies only to ddim and dpm_solver"),
        ("seven --sampler euler --order 2", "order: 2 applies only to dpm_solver"),
        ("seven --strength 0.5", "strength: applies only to an image"),
        ("seven --image=", "--image: there is no file"),
        ("seven --film=", "--film: . must end in .gif or .webp"),
        ("seven --samp ddim", "--samp"),
        ("seven --image no-such.png", "--image: there is no file no-such.png"),
        ("seven --image taken.png", "--image: taken.png holds no picture that can be read"),
        ("seven --from-image taken.png", "--from-image: taken.png holds no picture that can be read"),
        ("seven --film x.mp4", "--film: x.mp4 must end in .gif or .webp"),
        ("--steps 3", "no PROMPT; expected at least one"),
        ("--prompts-file no-such.txt", "--prompts-file: no-such.txt cannot be read"),
        ("seven --output-dir x --film y.gif", "--film: does not apply to --output-dir"),
        ("seven --output-dir taken.png --steps 1", "--output-dir: taken.png/0000-0000-seven.png cannot be written"),
        ("seven --output-dir x --batch-size 0", "batch_size: 0;"),
        ("seven --output-dir x --sampler dpm", "sampler: 'dpm'"),
        ("seven --lora no/such/file", "lora: there is no folder no/such/file"),
        ("seven --lora taken.png", "lora: taken.png cannot be read"),
        ("seven --batch-size 0", "batch_size: 0;"),
    ],
)
def test_bad_input_to_sample_is_one_line_and_exit_code_2(type_in, tmp_path: Path, arguments: str, message: str):
    (tmp_path / "taken.png").write_text("precious")
    (tmp_path / "empty-run" / "checkpoints" / ".step-00000001.unfinished").mkdir(parents=True)
    code, output, errors = type_in("sample", *arguments.split())
    assert (code, output) == (2, "")
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert (tmp_path / "taken.png").read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty-run", "taken.png"]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "cut", "cut short"),
        ("text_encoder/model.safetensors", "cut", "cut short"),
        ("scheduler/scheduler_config.json", "cut", "cut short"),
        ("unet/config.json", "cut", "cut short"),
        ("tokenizer/tokenizer.json", "cut", "cut short"),
        ("unet/config.json", "delete", "there is no config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "delete", "there is no diffusion_pytorch_model.safetensors"),
        ("scheduler/scheduler_config.json", "delete", "there is no scheduler_config.json"),
        ("text_encoder/model.safetensors", "delete", "is not a complete CLIP"),
        ("tokenizer", "delete", "tokenizer"),
        ("model_index.json", "delete", "holds no complete checkpoint"),
        ("unet/config.json", {"act_fn": "gelu"}, "UNet config: act_fn: 'gelu' is not supported"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "holds a FluxPipeline; expected a TextToImage"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(
    type_in, tmp_path: Path, file: str, damage: object, message: str
):
    checkpoint = shutil.copytree(BUILT_IN_MODEL, tmp_path / "checkpoint")
    victim = checkpoint / file
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-20])
    elif damage == "delete":
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    else:
        assert isinstance(damage, dict)
        victim.write_text(json.dumps({**json.loads(victim.read_text()), **damage}))
    code, output, errors = type_in("sample", "seven", "--checkpoint", str(checkpoint))
    assert (code, output) == (2, "")
    (line,) = errors.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train.batchsize=3", "there is no config key 'train.batchsize' (did you mean 'train.batch_size'?)"),
        ("train.max_steps=many", "train.max_steps: 'many'"),
        ("--config no-such.yaml", "--config: no file no-such.yaml"),
        ("data.source=no/such/folder", "data.source: no file or folder no/such/folder"),
        ("data.caption_column=words", "no column 'words'"),
        (
            "run_dir=taken",
            "run_dir: taken exists and is not overwritten; name another, run_dir=taken-2, or continue it by resume",
        ),
        ("text.encoder=no/such/clip", "text.encoder: no/such/clip: there is no such folder"),
        ("latent.patch_size=3", "latent.patch_size: 3 does not divide data.resolution (8)"),
        ("schedule.betas=[a]", "schedule.betas[0]: 'a'"),
        (
            "schedule.spacing=leading schedule.steps_offset=400 sample.steps=3",
            "steps: 3 with schedule.steps_offset=400 reach beyond the 1000 steps",
        ),
        ("schedule.zero_terminal_snr=true", "objective.prediction: epsilon tells nothing of the picture where"),
        ("objective.prediction=x_0", "objective.prediction: "),
    ],
)
def test_bad_input_to_train_is_one_line_and_exit_code_2(
    type_in, tmp_path: Path, bars_overrides: list[str], words: str, message: str
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("precious")
    code, output, errors = type_in("train", *bars_overrides, "run_dir=new", *words.split())
    assert (code, output) == (2, "")
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert (tmp_path / "taken" / "metrics.jsonl").read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_training_leaves_what_the_readme_promises(type_in, tmp_path: Path, bars_overrides: list[str]):
    words = [*bars_overrides, "run_dir=runs/bars", "train.sample_every=4"]
    code, _, errors = type_in("train", *words)
    assert code == 0
    assert errors.splitlines()[-1] == (
        'wrote runs/bars/checkpoints/step-00000004; next: python sample.py "a bar that is level" --checkpoint runs/bars'
    )
    assert "loss=" in errors
    assert "images/s=" in errors
    run = tmp_path / "runs" / "bars"
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "samples",
        "snapshots",
    ]
    with Image.open(run / "samples" / "step-00000004.png") as picture:
        assert picture.size == (8, 4 * 10 - 2)
    assert type_in("sample", "level", "--checkpoint", "runs/bars", "--steps", "2")[:2] == (0, "level.png\n")
    code, _, errors = type_in("train", *words, "resume=true")
    assert code == 0  # nothing is left to do, and it says so the same way
    assert "step-00000004; next:" in errors


def test_one_process_of_several_speaks_for_all_but_where_it_alone_has_something_to_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def shared() -> None:
        raise UserError("of all")

    def own() -> None:
        raise UserError("of one", of_this_process=True)

    for rank, said in (("0", "error: of all\nerror: of one\n"), ("1", "error: of one\n")):
        monkeypatch.setenv("RANK", rank)
        assert [command_line(main) for main in (shared, own)] == [2, 2]
        assert capsys.readouterr().err == said
