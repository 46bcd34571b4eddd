"""train.py and sample.py with valid and invalid arguments."""

import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from cond_diffusion import TextToImage
from cond_diffusion.cli.commands import read_prompts
from cond_diffusion.cli.main import COMMANDS, command_line, main
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.diffusion.samplers import Noise
from cond_diffusion.errors import UserError
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL
from cond_diffusion.pipeline.generate import read_settings


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Run a script in this process, in an empty folder; returns its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)

    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        return int(exit_info.value.code or 0), *capfd.readouterr()

    yield run
    signal.signal(signal.SIGINT, handler)


def test_every_command_has_a_help_and_an_unknown_one_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "argv", ["cond-diffusion"])
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in COMMANDS:
        with pytest.raises(SystemExit) as exit_info:
            main([name, "--help"])
        assert exit_info.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: cond-diffusion {name} ")
        assert name in listed
    assert main(["samples"]) == 2
    assert capsys.readouterr().err.startswith("error: samples (did you mean 'sample'?); expected one of ")


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        *((f"{name} --help", 0) for name in COMMANDS),
        *((f"{name} --colour", 2) for name in COMMANDS),
        *[("train train.steps=1", 2), ("train --config minst", 2), ("pretrain-clip width=0", 2)],
        *[("sample", 2), ("sample 7 --sampler dpm", 2), ("sample 7 --output-dir a --film a.gif", 2)],
        *[("evaluate --samples 3", 2), ("evaluate --dtype fp8", 2), ("likelihood --batch-size 0", 2)],
        *[("demo --port x", 2), ("demo --allow-host *", 2)],
    ],
)
def test_help_and_wrong_arguments_do_not_wait_for_torch(command: str, exit_code: int):
    """Importing torch and transformers takes seconds."""
    code = "import sys, cond_diffusion.cli.main as cli\ntry: sys.exit(cli.main(sys.argv[1:]))\n"
    code += "finally: print('torch' in sys.modules)"
    arguments = [sys.executable, "-c", code, *command.split()]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout.splitlines()[-1]) == (exit_code, "False")
    assert len(shown.stderr.splitlines()) == (exit_code == 2)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_a_lack_of_memory_is_one_line_and_other_errors_of_torch_are_not(
    error: Exception, is_memory: bool, capsys: pytest.CaptureFixture[str]
):
    def command() -> None:
        raise error

    if not is_memory:
        with pytest.raises(RuntimeError, match="shapes differ"):
            command_line(command)
        return
    assert command_line(command) == 2
    assert re.fullmatch(r"error: out of memory \(.*\); choose a smaller batch size\n", capsys.readouterr().err)


def test_sample_writes_a_png_and_prints_its_path(run_script, tmp_path: Path):
    """The progress bar is on standard error."""
    code, output, errors = run_script("sample", "a digit seven", "--steps", "20")
    assert (code, output) == (0, "a-digit-seven.png\n")
    assert "20/20" in errors
    with Image.open(tmp_path / "a-digit-seven.png") as image:
        assert image.size == (28, 28)
        low, high = image.getextrema()
        assert low < 30
        assert high > 200  # black and white, not gray noise or a constant


def test_grid_has_a_row_per_prompt_and_existing_files_are_not_overwritten(run_script, tmp_path: Path):
    arguments = ["seven", "two", "--num-images", "3", "--steps", "2", "--seed", "5"]
    assert run_script("sample", *arguments)[:2] == (0, "seven.png\n")
    assert run_script("sample", *arguments)[:2] == (0, "seven-2.png\n")
    assert run_script("sample", *arguments, "--output", "other.png")[:2] == (0, "other.png\n")
    with Image.open(tmp_path / "seven.png") as one, Image.open(tmp_path / "other.png") as other:
        assert one.size == (112 + 3 * 30 - 2, 2 * 30 - 2)
        assert one.tobytes() == other.tobytes()


def test_prompts_are_read_from_a_file_or_standard_input_and_labels_can_be_omitted(
    run_script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "prompts.txt").write_text("two\n\n  three \n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"four\n"), encoding="utf-8"))
    arguments = ["--steps", "2", "--no-labels"]
    assert run_script("sample", "one", "--prompts-file", "prompts.txt", *arguments)[:2] == (0, "one.png\n")
    assert run_script("sample", "--prompts-file", "-", *arguments)[:2] == (0, "four.png\n")
    assert read_settings("one.png", "")["prompts"] == ["one", "two", "three"]
    with Image.open("one.png") as image:
        assert image.size == (28, 3 * 30 - 2)


@pytest.mark.parametrize("source", ["-", "prompts.txt"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeffein Bär\r\nzwei".encode(), ["ein Bär", "zwei"]),
        ("ein Bär".encode("latin1"), None),
        ("ein Bär".encode("utf-16"), None),
        ("a bear".encode("utf-16-le"), None),
    ],
)
def test_prompts_are_utf_8_in_any_locale(
    source: str, content: bytes, expected: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    if expected is not None:
        assert read_prompts(source) == expected
        return
    with pytest.raises(UserError, match=r"^--prompts-file: (standard input|prompts\.txt) .*UTF-8"):
        read_prompts(source)


def interrupt_after(batches: int) -> Callable[[TextToImage, list[int]], Noise]:
    """Return a replacement of `TextToImage._noise` that raises KeyboardInterrupt after a number of batches."""
    noise, remaining = TextToImage._noise, iter(range(batches))

    def interrupted_noise(pipe: TextToImage, seeds: list[int]) -> Noise:
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return noise(pipe, seeds)

    return interrupted_noise


def test_interrupted_output_folder_is_continued_and_its_images_equal_those_sampled_alone(run_script, tmp_path: Path):
    arguments = ["seven", "a two", "--num-images", "2", "--seed", "3", "--steps", "2", "--guidance-scale", "2,4"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TextToImage, "_noise", interrupt_after(1))
        code, _, errors = run_script("sample", *arguments, "--output-dir", "all", "--batch-size", "3")
    assert code == 130
    assert "all has 3 of 4 images" in errors.splitlines()[-1]
    assert run_script("sample", *arguments, "--output-dir", "all", "--batch-size", "3")[:2] == (0, "all\n")
    names = ["0000-0000-seven.png", "0000-0001-seven.png", "0001-0000-a-two.png", "0001-0001-a-two.png"]
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == names
    stamps = [(tmp_path / "all" / name).stat().st_mtime_ns for name in names]
    (tmp_path / "all" / names[2]).unlink()
    assert run_script("sample", *arguments, "--output-dir", "all")[0] == 0
    assert run_script("sample", "seven", "--guidance-scale", "2", *arguments[2:-2], "--output-dir", "all")[0] == 0
    again = [(tmp_path / "all" / name).stat().st_mtime_ns for name in names]
    assert [old == new for old, new in zip(stamps, again, strict=True)] == [True, True, False, True]
    alone = ["a two", "--seed", "4", "--steps", "2", "--guidance-scale", "4", "--output", "alone.png"]
    assert run_script("sample", *alone)[0] == 0
    assert run_script("sample", "--from-image", "all/0001-0001-a-two.png", "--output", "repeated.png")[0] == 0
    images = [
        Image.open(tmp_path / name).convert("L") for name in ("all/0001-0001-a-two.png", "alone.png", "repeated.png")
    ]
    for image in images[1:]:
        assert np.abs(np.asarray(image).astype(int) - np.asarray(images[0])).max() <= 1
    more = ["seven", "a two", "six", "--num-images", "3", *arguments[4:-1], "2,4,2", "--output-dir", "all"]
    assert run_script("sample", *more)[0] == 0
    assert [(tmp_path / "all" / name).stat().st_mtime_ns for name in names] == again
    assert len(list((tmp_path / "all").glob("*.png"))) == 9
    code, _, errors = run_script("sample", *arguments[:-1], "5,5", "--output-dir", "all")
    assert code == 2
    assert re.search(r"error: --output-dir: all/0000-0000-seven\.png .*guidance_scale.* 2\.0.* 5\.0", errors)
    code, _, errors = run_script("sample", "seven", "a six", *arguments[2:], "--output-dir", "all")
    assert code == 2
    assert re.search(r"error: --output-dir: all/0001-0000-a-two\.png .* 0001-0000-a-six\.png.* another folder", errors)
    Image.new("L", (8, 8)).save("all/0000-0000-seven-2x.png")  # of the user
    assert run_script("sample", *more)[0] == 0


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_interrupted_grid_contains_the_completed_images(
    run_script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
):
    arguments = ["seven", "two", "--num-images", "3", "--steps", "2", "--batch-size", "2"]
    assert run_script("sample", *arguments, "--output", "whole.png")[0] == 0
    monkeypatch.setattr(TextToImage, "_noise", interrupt_after(batches))
    code, output, errors = run_script("sample", *arguments, "--output", "kept.png")
    assert (code, output) == (130, "")
    if not batches:
        assert not (tmp_path / "kept.png").exists()
        return
    last = errors.splitlines()[-1]
    assert f"kept.png has the first {2 * batches} of 6 images" in last
    assert "--from-image kept.png" in last
    with Image.open("whole.png") as whole, Image.open("kept.png") as kept:
        assert kept.size == (whole.width, batches * 30 - 2)  # a row after one batch, two after two
        for i in range(3 * batches):
            x, y = 112 + 30 * (i % 3), 30 * (i // 3)
            box = (x, y, x + 28, y + 28)
            if i < 2 * batches:
                assert kept.crop(box).tobytes() == whole.crop(box).tobytes()
            else:
                assert kept.crop(box).getextrema() == (0, 0)


@pytest.mark.slow
def test_every_option_changes_the_image(run_script, tmp_path: Path):
    option_of = {}
    options = [
        *["", "--seed 1", "--guidance-scale 1", "--negative-prompt seven", "--steps 4", "--guidance-interval 0,500"],
        *["--guidance-rescale 0.7", "--dynamic-thresholding 0.9", "--sampler ddim", "--sampler ddim --eta 0.5"],
        *["--sampler heun", "--sampler dpm_solver", "--sampler dpm_solver --order 1 --eta 0.5", "--sampler unipc"],
        *["--sampler unipc --order 1", "--variance beta", "--image old.png", "--image old.png --strength 0.4"],
        *["--image old.png --mask mask.png", "--image old.png --mask mask.png --resamplings 2"],
        *["--phrase-guidance 0.5", "--phrase-guidance 0.5 --first-phrase-from 600"],
    ]
    named = {word[2:].replace("-", "_") for option in options for word in option.split() if word.startswith("--")}
    assert named - {"image", "mask"} == {field.name for field in fields(SamplingOptions)} - {"num_images"}
    assert run_script("sample", "seven", "--steps", "3", "--output", "old.png")[0] == 0
    Image.linear_gradient("L").resize((28, 28)).save(tmp_path / "mask.png")
    for option in options:
        assert run_script("sample", "two, bold", "--steps", "3", "--output", "x.png", *option.split())[0] == 0
        with Image.open(tmp_path / "x.png") as image:
            option_of[image.tobytes()] = option
        (tmp_path / "x.png").unlink()
    assert len(option_of) == len(options)


def test_a_folder_with_the_name_of_a_built_in_model_is_not_recorded(run_script, tmp_path: Path):
    (tmp_path / "builtin").mkdir()
    assert run_script("sample", "seven", "--checkpoint", "builtin", "--steps", "1", "--output", "x.png")[0] == 0
    assert read_settings(str(tmp_path / "x.png"), "--from-image")["checkpoint"] == "builtin"


def test_png_is_reproduced_from_its_settings_and_options_override_them(run_script, tmp_path: Path):
    arguments = ["a digit two", "seven", "--num-images", "2", "--steps", "4", "--sampler", "dpm_solver", "--eta", "0.5"]
    more = ["--guidance-scale", "2,4", "--guidance-interval", "0,900", "--seed=-3", "--negative-prompt=-one"]
    assert run_script("sample", *arguments, *more, "--output", "first.png")[0] == 0
    assert run_script("sample", "--from-image", "first.png", "--output", "again.png")[:2] == (0, "again.png\n")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert run_script("sample", "three", "--from-image", "first.png", "--guidance-scale", "3")[:2] == (0, "three.png\n")
    with Image.open(tmp_path / "three.png") as other:
        assert other.size == (2 * 30 - 2, 28)
        assert json.loads(other.text["cond_diffusion:eta"]) == 0.5  # type: ignore[attr-defined]
        assert json.loads(other.text["cond_diffusion:prompts"]) == ["three"]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_edited_image_is_reproduced_from_its_settings(run_script, tmp_path: Path):
    Image.linear_gradient("L").resize((40, 40)).save(tmp_path / "old.png")
    Image.radial_gradient("L").resize((40, 40)).save(tmp_path / "mask.png")
    edits = ["--image", "old.png", "--mask", "mask.png", "--strength", "0.9", "--resamplings", "2", "--steps", "12"]
    assert run_script("sample", "two", *edits)[:2] == (0, "two.png\n")
    assert run_script("sample", "--from-image", "two.png", "--output", "again.png")[0] == 0
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert run_script("sample", "--from-image", "two.png", "--image", "mask.png", "--output", "new.png")[0] == 0


def test_animation_and_attention_maps_are_written_beside_the_image(run_script, tmp_path: Path):
    arguments = [
        "a seven",
        "two",
        "--num-images",
        "2",
        "--steps",
        "3",
        "--film",
        "f.gif",
        "--attention-maps",
        "maps.png",
    ]
    assert run_script("sample", *arguments)[:2] == (0, "a-seven.png\nf.gif\nmaps.png\n")
    with Image.open(tmp_path / "f.gif") as film:
        assert film.n_frames == 3  # type: ignore[attr-defined]
    with Image.open(tmp_path / "maps.png") as maps:
        assert maps.size == (3 * 114 - 2, 4 * (14 + 112 + 2) - 2)  # a row per image: the image and two words
    before = sorted(tmp_path.iterdir())
    code, _, errors = run_script(
        "sample", "two", "--film", "new.gif", "--attention-maps", "maps.png", "--output", "y.png"
    )
    assert code == 2
    assert "--attention-maps: maps.png " in errors
    code, _, errors = run_script("sample", "two", "--image", "a-seven.png", "--strength", "0", "--film", "new.gif")
    assert code == 2
    assert "strength: 0.0 " in errors
    assert sorted(tmp_path.iterdir()) == before


def test_warning_contains_the_truncated_part_of_a_long_prompt(run_script, caplog: pytest.LogCaptureFixture):
    code, output, _ = run_script("sample", "one " * 14 + "and two", "--steps", "1", "--output", "x.png")
    assert (code, output) == (0, "x.png\n")
    assert "'and two'" in caplog.text


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
        ("seven --checkpoint no/such/run", "no/such/run"),
        ("seven --checkpoint runs", " runs"),
        ("seven --checkpoint " + "a/" * 3000, ": File name too long"),
        ("seven --output no-such-folder/x.png", "--output: no-such-folder/x.png "),
        ("seven --output taken.png", "--output: taken.png "),
        ("seven --output x.jpg", "--output: x.jpg "),
        ("seven --checkpoint empty-run", "empty-run: "),
        ("seven --stepps 5", "--stepps"),
        ("seven --guidance-scale 2,x", "guidance_scale[1]: 'x'"),
        ("seven --guidance-scale 2,3", "guidance_scale: 2 values for 1 prompts"),
        ("seven --guidance-interval 800,200", "guidance_interval: 800,200"),
        ("seven --guidance-interval 800", "guidance_interval: '800'"),
        ("seven --eta 0.5", "eta: 0.5 "),
        ("seven --sampler euler --order 2", "order: 2 "),
        ("seven --dtype fp8", "dtype: 'fp8'"),
        ("seven --compile --attention-maps words.png", "attention_maps: "),
        ("seven --strength 0.5", "strength: "),
        ("seven --image=", "image: ''; expected a path"),
        ("seven --film=", "--film: . "),
        ("seven --samp ddim", "--samp"),
        ("seven --image no-such.png", "--image: "),
        ("seven --image taken.png", "--image: taken.png "),
        ("seven --from-image taken.png", "--from-image: taken.png "),
        ("seven --film x.mp4", "--film: x.mp4 "),
        ("--steps 3", "no PROMPT"),
        ("--prompts-file no-such.txt", "--prompts-file: no-such.txt "),
        ("seven --output-dir x --film y.gif", "--film: "),
        ("seven --output-dir=", "--output-dir: ''"),
        ("seven --output-dir taken.png --steps 1", "--output-dir: taken.png "),
        ("seven --output-dir x --batch-size 0", "batch_size: 0;"),
        ("seven --output-dir x --sampler dpm", "sampler: 'dpm'"),
        ("seven --lora no/such/file", "lora: no/such/file"),
        ("seven --lora taken.png", "lora: taken.png"),
        ("seven --batch-size 0", "batch_size: 0;"),
        ("seven --batch-size x", "--batch-size: "),
        ("seven --sampler dpm_solver --order 0", "order: '0'"),
        ("seven --output \udcff.png", "'\\udcff.png'"),
        ("\udcff", "'\\udcff'"),
    ],
)
def test_invalid_arguments_of_sample_give_one_line_and_exit_code_2(
    run_script, tmp_path: Path, arguments: str, message: str
):
    (tmp_path / "taken.png").write_text("precious", encoding="utf-8")
    (tmp_path / "empty-run" / "checkpoints" / ".step-00000001.unfinished").mkdir(parents=True)
    code, output, errors = run_script("sample", *arguments.split())
    assert (code, output) == (2, "")
    assert message in errors.splitlines()[-1]
    assert len(errors.splitlines()) == 1 or "--from-image" in arguments or "--checkpoint" in arguments
    assert (tmp_path / "taken.png").read_text(encoding="utf-8") == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty-run", "taken.png"]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "cut", "checkpoint/unet: "),
        ("text_encoder/model.safetensors", "cut", "text.encoder: "),
        ("scheduler/scheduler_config.json", "cut", "scheduler_config.json: "),
        ("unet/config.json", "cut", "checkpoint/unet/config.json: "),
        ("tokenizer/tokenizer.json", "cut", "text.encoder: "),
        ("unet/config.json", "delete", "config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "delete", "diffusion_pytorch_model.safetensors"),
        ("scheduler/scheduler_config.json", "delete", "scheduler_config.json"),
        ("text_encoder/model.safetensors", "delete", "text_encoder"),
        ("tokenizer", "delete", "tokenizer"),
        ("model_index.json", "delete", "model_index.json"),
        ("unet/config.json", {"act_fn": "gelu"}, "unet/config.json: act_fn: 'gelu'"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
    ],
)
def test_damaged_checkpoint_gives_one_line_and_exit_code_2(
    run_script, tmp_path: Path, file: str, damage: object, message: str
):
    checkpoint = shutil.copytree(BUILT_IN_MODEL, tmp_path / "checkpoint")
    path = checkpoint / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "delete":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        assert isinstance(damage, dict)
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **damage}), encoding="utf-8")
    code, output, errors = run_script("sample", "seven", "--checkpoint", str(checkpoint))
    assert (code, output) == (2, "")
    (line,) = errors.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train.batchsize=3", "train.batchsize: "),
        ("train.max_steps=many", "train.max_steps: 'many'"),
        ("--config no-such.yaml", "--config: "),
        ("data.source=no/such/folder", "data.source: "),
        ("data.caption_column=words", "data.caption_column: "),
        ("run_dir=taken", "run_dir: taken "),
        ("text.encoder=no/such/clip", "text.encoder: no/such/clip"),
        ("latent.patch_size=3", "latent.patch_size: 3 "),
        ("schedule.betas=[a]", "schedule.betas[0]: 'a'"),
        ("schedule.spacing=leading schedule.steps_offset=400 sample.steps=3", "steps: 3 "),
        ("schedule.zero_terminal_snr=true", "objective.prediction: epsilon"),
        ("objective.prediction=x_0", "objective.prediction: "),
        ("seed=18446744073709551616", "seed: "),
        ("run_dir=" + "a/" * 3000, "run_dir: "),
        ("run_dir=" + "a/" * 3000 + " resume=true", "run_dir: "),
        ("run_dir=/proc/x/y", "run_dir: "),
        ("run_dir=\udcff", "run_dir="),
        ("--chekc", "--chekc"),
    ],
)
def test_invalid_arguments_of_train_give_one_line_and_exit_code_2(
    run_script, tmp_path: Path, bars_overrides: list[str], arguments: str, message: str
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("precious", encoding="utf-8")
    code, output, errors = run_script("train", *bars_overrides, "run_dir=new", *arguments.split())
    assert (code, output) == (2, "")
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert (tmp_path / "taken" / "metrics.jsonl").read_text(encoding="utf-8") == "precious"
    assert not (tmp_path / "new").exists()


def test_training_writes_the_files_that_the_readme_lists(run_script, tmp_path: Path, bars_overrides: list[str]):
    arguments = [*bars_overrides, "run_dir=runs/bars", "train.sample_every=4"]
    code, _, errors = run_script("train", *arguments)
    assert code == 0
    last = errors.splitlines()[-1]
    assert "runs/bars/checkpoints/step-00000004" in last
    assert "python sample.py 'a bar that is level' --checkpoint runs/bars" in last
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
    with Image.open(run / "samples" / "step-00000004.png") as image:
        assert image.size == (8, 4 * 10 - 2)
    assert run_script("sample", "level", "--checkpoint", "runs/bars", "--steps", "2")[:2] == (0, "level.png\n")
    code, _, errors = run_script("train", *arguments, "resume=true")
    assert code == 0  # no steps remain
    assert "runs/bars/checkpoints/step-00000004" in errors.splitlines()[-1]


def test_shared_error_is_printed_by_the_main_process_only_and_own_error_by_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def shared() -> None:
        raise UserError("of all")

    def own() -> None:
        raise UserError("of one", of_this_process=True)

    for rank, expected in (("0", "error: of all\nerror: of one\n"), ("1", "error: of one\n")):
        monkeypatch.setenv("RANK", rank)
        assert [command_line(main) for main in (shared, own)] == [2, 2]
        assert capsys.readouterr().err == expected
