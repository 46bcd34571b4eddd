"""Every command and code block of the documentation runs and writes what it should; the tables are complete."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import colours
import config_reference
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, bar
from PIL import Image

from cond_diffusion.cli import main
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL

DOCUMENTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "cond_diffusion/diffusion/README.md",
        "cond_diffusion/training/README.md",
        "tests/benchmarks/README.md",
    )
}
README = DOCUMENTS["README.md"]
ONE_STEP = "train.max_steps=1 train.batch_size=4 train.sample_every=0 train.evaluate_every=0"
SMALL = f"{ONE_STEP} train.warmup_steps=0 unet.channels=[32,32] text.pretrain_steps=2"

# For each command: the arguments that make it short, and the files that it writes, which are opened.
COMMANDS = {
    'pip install -e . && python sample.py "a digit seven"': ("--steps 10", "a-digit-seven.png"),
    'python sample.py "a digit seven" "the number 2" --num-images 4 --output digits.png': ("--steps 10", "digits.png"),
    'python sample.py "a handwritten nine" --sampler dpm_solver --steps 20 --guidance-scale 2 --seed 7': (
        "",
        "a-handwritten-nine.png",
    ),
    "python sample.py --from-image digits.png --seed 8 --output more.png": ("", "more.png"),
    'python sample.py "a red apple, 3d style" --checkpoint emoji --sampler dpm_solver --steps 20': (
        "",
        "a-red-apple-3d-style.png",
    ),
    'python sample.py "a digit two" --image a-digit-seven.png --strength 0.8 --sampler ddim --steps 50': (
        "",
        "a-digit-two.png",
    ),
    'python sample.py "a digit seven" --num-images 3 --steps 24 --film seven.webp --attention-maps words.png '
    "--output seven.png": ("", "seven.webp words.png seven.png"),
    "printf 'a digit one\\na digit two\\n' | python sample.py --prompts-file - --num-images 20 --sampler ddim "
    "--steps 20 --output-dir digits": ("--num-images 2", "digits/0000-0001-a-digit-one.png digits/0001-0000-*.png"),
    "python train.py --config configs/folder.yaml data.source=my_images run_dir=runs/mine --check": (
        f"{SMALL} train.batch_size=2",
        "check-runs-mine.png",
    ),
    "accelerate launch train.py --config configs/folder.yaml data.source=my_images run_dir=runs/mine": (
        SMALL,
        "runs/mine/checkpoints/step-00000001/unet/*.safetensors",
    ),
    'python sample.py "a red circle" --checkpoint runs/mine': ("--steps 2", "a-red-circle.png"),
    "accelerate launch train.py": (
        "train.max_steps=2 train.batch_size=4 sample.steps=2 sample.num_images=1",
        "runs/mnist/checkpoints/step-00000002/unet/*.safetensors",
    ),
    "accelerate launch train.py resume=true": (
        "train.max_steps=3 train.batch_size=4 sample.steps=2 sample.num_images=1",
        "runs/mnist/checkpoints/step-00000003/unet/*.safetensors",
    ),
    'python sample.py "a digit seven" --checkpoint runs/mnist': ("--steps 2", "a-digit-seven.png"),
    "accelerate launch train.py track=tensorboard run_dir=runs/watched": (
        ONE_STEP,
        "runs/watched/tracked/events.out.tfevents.*",
    ),
    'python sample.py "a digit seven" --checkpoint runs/mnist --ema-width 0.05': ("--steps 2", "a-digit-seven-2.png"),
    "torchrun --nproc_per_node 2 train.py run_dir=runs/two": (
        f"{ONE_STEP} data.source=my_images",
        "runs/two/checkpoints/step-00000001/unet/*.safetensors",
    ),
    "python train.py --config configs/folder.yaml data.source=my_tars data.image_column=png data.caption_column=txt "
    "data.streaming=true text.encoder=builtin run_dir=runs/streamed": (
        SMALL,
        "runs/streamed/checkpoints/step-00000001/unet/*.safetensors",
    ),
    "python tests/colours.py my_colours": ("40", "my_colours/*.tar"),
    "python -m cond_diffusion pretrain-clip data.source=my_colours data.image_column=png data.caption_column=txt "
    "data.resolution=24 data.channels=3 test_split=train batch_size=128 max_steps=1500 run_dir=runs/clip_colours": (
        "max_steps=2 warmup_steps=1 batch_size=8",
        "runs/clip_colours/*.safetensors",
    ),
    "accelerate launch train.py --config configs/colours.yaml": (
        ONE_STEP,
        "runs/colours/checkpoints/step-00000001/unet/*.safetensors",
    ),
    "python -m cond_diffusion pretrain-clip --config configs/clip_mnist.yaml": (
        "max_steps=2 warmup_steps=1",
        "runs/clip_mnist/*.safetensors",
    ),
    "python train.py --config configs/mnist.yaml init_from=builtin train.lora_rank=4 run_dir=runs/further": (
        ONE_STEP,
        "runs/further/checkpoints/step-00000001/pytorch_lora_weights.safetensors",
    ),
    "python train.py objective.prediction=v_prediction schedule.zero_terminal_snr=true run_dir=runs/v": (
        ONE_STEP,
        "runs/v/checkpoints/step-00000001/unet/*.safetensors",
    ),
    "python tests/examples/whole_method.py": None,  # run by test_examples.py
    "python tests/benchmarks/all.py": ("--short --only step.py chain.py prompts.py", ""),
    "python tests/benchmarks/objectives.py": ("--predictions sample --losses sample --steps 1 --samples 10", ""),
    "python -m cond_diffusion evaluate": ("--samples 10 --steps 2", "evaluation/samples.png evaluation/nearest.png"),
    "python -m cond_diffusion evaluate --sweep": ("--samples 10 --steps 2", "evaluation/guidance_scale.png"),
    "python -m cond_diffusion likelihood": ("--samples 2", ""),
}
TEST_COMMAND = 'pip install -c tests/constraints.txt -e ".[test]" && pytest '  # run by .ci/run


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands_of(text: str) -> list[str]:
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(TEST_COMMAND)]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_evaluation: None) -> Path:
    """A folder with the scripts, the configs and little data, in place of the project's own."""
    monkeypatch.setattr("cond_diffusion.training.preflight.MAX_OVERFIT_STEPS", 10)
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("train.py", "sample.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "tests/benchmarks", "tests/examples"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "tests" / "colours.py", folder / "tests")
    colours.write(folder / "my_tars", "tar", 6)
    images = folder / "my_images"
    images.mkdir()
    lines = []
    for i in range(4):
        Image.fromarray(bar(i % 2, i).numpy()).save(images / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a red circle"}))
    (images / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process, which spares the imports; only torchrun starts processes."""
    if " | " in command:
        text, command = command.split(" | ")
        monkeypatch.setattr(
            "sys.stdin",
            io.TextIOWrapper(io.BytesIO(shlex.split(text)[1].replace("\\n", "\n").encode()), encoding="utf-8"),
        )
    words = shlex.split(command)
    if words[0] == "torchrun":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(words, env={**os.environ, "PATH": path}, check=False).returncode

    def run_script(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, run_words(["python", *words[1:]], monkeypatch), stderr="")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run_script)  # of the benchmarks
        return run_words(words, monkeypatch)


def run_words(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    match words:
        case ["python", "sample.py", *words]:
            return main.run("sample", words)
        case ["python", "train.py", *words] | ["accelerate", "launch", "train.py", *words]:
            return main.run("train", words)
        case ["python", "-m", "cond_diffusion", *words]:
            return main.main(words)
        case ["python", script, *words]:
            with monkeypatch.context() as patch:
                patch.setattr("sys.argv", [script, *words])
                patch.syspath_prepend(Path(script).parent)
                runpy.run_path(script, run_name="__main__")
            return 0
    raise AssertionError(words)


def test_every_command_is_tested():
    found = [command for text in DOCUMENTS.values() for command in commands_of(text)]
    assert sorted(set(found)) == sorted(COMMANDS)
    (test_command,) = (line for block in blocks(README, "sh") for line in block.splitlines() if TEST_COMMAND in line)
    assert TEST_COMMAND.replace("[", r"\[").replace("]", r"\]") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert test_command.startswith(TEST_COMMAND)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_runs_and_writes_its_files(document: str, clone: Path, monkeypatch: pytest.MonkeyPatch):
    for command in commands_of(DOCUMENTS[document]):
        if (short := COMMANDS[command]) is None:
            continue
        more, written = short
        assert run(f"{command.removeprefix('pip install -e . && ')} {more}", monkeypatch) == 0, command
        for pattern in written.split():
            files = sorted(clone.glob(pattern))
            assert files, f"{command}: {pattern}"
            for file in files:
                assert file.stat().st_size > 0
                if file.suffix in (".png", ".webp"):
                    with Image.open(file) as image:
                        least, greatest = image.convert("L").getextrema()
                        assert least < greatest, file


def console_lines() -> list[str]:
    return [
        line
        for block in blocks(DOCUMENTS["cond_diffusion/training/README.md"], "console")
        for line in block.splitlines()
    ]


def test_lines_that_need_the_hub_have_valid_configs():
    words = [line.split() for line in console_lines() if line.startswith("python ")]
    configs = [load_config(Config, ROOT / line[3], line[4:]) for line in words]
    assert [config.latent.vae for config in configs] == ["stabilityai/sd-vae-ft-mse", None]
    assert [config.train.lora_rank for config in configs] == [0, 4]


def test_accelerate_parses_the_lines_for_several_gpus():
    lines = [line for line in console_lines() if line.startswith("accelerate ")]
    assert len(lines) == 3
    for line in lines:
        given = launch_command_parser().parse_args(line.removeprefix("accelerate launch ").split())
        assert given.training_script == "train.py"
        assert given.num_processes == 8 * int(given.num_machines or 1)
        assert given.multi_gpu != given.use_fsdp


@pytest.mark.slow
def test_every_python_block_runs(clone: Path):
    """With fewer steps, and the built-in model in place of a run's checkpoint."""
    shutil.copytree(BUILT_IN_MODEL, clone / "runs" / "mnist" / "checkpoints" / "step-00008000")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks(README, "python"):
        exec(block.replace("steps=50", "steps=5"), names)
    assert len(names["images"]) == 8
    assert names["checkpoint"].startswith("runs/mnist")
    assert (clone / "runs" / "two_colors" / "checkpoints" / "step-00000002" / "model_index.json").exists()
    assert names["image"].shape == (1, 1, 28, 28)
    assert (names["image"].abs() > 0.8).float().mean() > 0.8  # black and white, as a digit is
    assert (clone / "seven.png").exists()


@pytest.mark.slow
def test_the_notebook_runs(clone: Path):
    notebook = json.loads((ROOT / "tests" / "examples" / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"MAX_STEPS": 2}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(names["images"]) == 4
    assert len(names["trajectory"]) > 1
    assert (names["run"] / "model_index.json").exists()


def test_the_config_reference_is_generated():
    assert DOCUMENTS["cond_diffusion/training/README.md"].endswith(config_reference.reference())


def test_the_readme_is_short_and_lists_every_package():
    assert len(README.splitlines()) <= 220
    packages = README[README.index("## Packages") : README.index("## Limits")]
    folders = {path.parent.name for path in (ROOT / "cond_diffusion").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/`", packages, flags=re.MULTILINE)) == folders | {"assets"}
    leaves = {file.name for file in (ROOT / "cond_diffusion").glob("*.py") if not file.name.startswith("__")}
    assert leaves <= set(re.findall(r"`(\w+\.py)`", packages))


def test_relative_links_lead_somewhere():
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
