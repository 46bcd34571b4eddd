"""The README tells the truth: every command and code block in it runs, and its tables are complete."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import colours
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, bar
from PIL import Image

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL

README = (ROOT / "README.md").read_text()

# What is added to each command to make it short; None where continuous integration runs it before the tests.
COMMANDS = {
    'pip install -e . && python sample.py "a digit seven"': "--steps 10",
    'pip install -c tests/constraints.txt -e ".[test]" && pytest': None,
    'python sample.py "a digit seven" "the number 2" --num-images 4 --output digits.png': "--steps 10",
    'python sample.py "a handwritten nine" --sampler dpm_solver --steps 20 --guidance-scale 2 --seed 7': "",
    "python sample.py --from-image digits.png --seed 8 --output more.png": "",
    'python sample.py "a digit two" --image a-digit-seven.png --strength 0.8 --sampler ddim --steps 50': "",
    'python sample.py "a digit seven" --num-images 3 --steps 24 --film seven.webp --attention-maps words.png '
    "--output seven.png": "",
    'python sample.py "a digit seven" --checkpoint runs/mnist': "--steps 10",
    "python train.py --check": "train.batch_size=4",
    "accelerate launch train.py": "train.max_steps=2 train.batch_size=4",
    "accelerate launch train.py track=tensorboard run_dir=runs/watched": "train.max_steps=1 train.batch_size=4",
    'python sample.py "a digit seven" --checkpoint runs/mnist --ema-width 0.05': "--steps 10",
    "accelerate launch train.py resume=true": "train.max_steps=3 train.batch_size=4",
    "python train.py --config configs/mnist.yaml train.batch_size=64 run_dir=runs/x": "train.max_steps=1",
    "torchrun --nproc_per_node 2 train.py run_dir=runs/two": "train.max_steps=1 train.batch_size=4",
    "python train.py --config configs/folder.yaml data.source=my_pictures run_dir=runs/mine": (
        "train.max_steps=1 train.batch_size=2 unet.channels=[32,32,32]"
    ),
    "python train.py --config configs/folder.yaml data.source=my_tars data.image_column=png data.caption_column=txt "
    "data.streaming=true run_dir=runs/streamed": "train.max_steps=1 train.batch_size=2 unet.channels=[32,32,32]",
    "python tests/colours.py my_colours": "40",
    "python -m cond_diffusion pretrain-clip data.source=my_colours data.image_column=png data.caption_column=txt "
    "data.resolution=24 data.channels=3 test_split=train batch_size=128 max_steps=1500 run_dir=runs/clip_colours": (
        "max_steps=2 warmup_steps=1 batch_size=8"
    ),
    "accelerate launch train.py --config configs/colours.yaml": "train.max_steps=1 train.batch_size=4",
    "python train.py objective.prediction=v_prediction objective.loss=v_prediction schedule.zero_terminal_snr=true "
    "run_dir=runs/v": "train.max_steps=1 train.batch_size=4",
    "printf 'a digit one\\na digit two\\n' | python sample.py --prompts-file - --num-images 20 --sampler ddim "
    "--steps 20 --output-dir digits": "--num-images 2",
    "python train.py --config configs/mnist.yaml init_from=builtin train.lora_rank=4 run_dir=runs/further": (
        "train.max_steps=1 train.batch_size=4 train.evaluate_every=0"
    ),
    "python tests/benchmarks/objectives.py": "--predictions sample --losses sample --steps 1 --samples 10",
    "accelerate launch train.py --config configs/mnist_fast.yaml": (
        "train.max_steps=1 train.batch_size=4 train.sample_every=0 train.evaluate_every=0"
    ),
    "python -m cond_diffusion evaluate": "--samples 10 --steps 2",
    "python -m cond_diffusion evaluate --sweep": "--samples 10 --steps 2",
    "python tests/benchmarks/all.py": "--short --only networks.py step.py peers.py chain.py large.py",
    "python -m cond_diffusion likelihood": "--samples 2",
    "python -m cond_diffusion pretrain-clip --config configs/clip_mnist.yaml": "max_steps=2 warmup_steps=1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts and configs in a folder of their own, so that runs and pictures do not land in the project."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("train.py", "sample.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "tests/benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "tests" / "colours.py", folder / "tests")
    colours.write(folder / "my_tars", "tar", 6)
    pictures = folder / "my_pictures"
    pictures.mkdir()
    lines = []
    for i in range(4):
        Image.fromarray(bar(i % 2, i).numpy()).save(pictures / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a bar"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def commands_of(text: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]


# Each section stands for itself, but that one draws on what its two commands have drawn.
SECTIONS = [
    "## Two commands",
    "## Training",
    "### Your own pictures",
    "### In latents, and from a checkpoint on",
    "### What to train for",
    "## How good",
    "## How fast",
]


def test_every_command_is_known():
    assert sorted(commands_of(README)) == sorted(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SECTIONS)), ids=SECTIONS)
def test_every_command_runs(clone: Path, number: int):
    starts = [README.index(f"\n{section}\n") for section in SECTIONS]
    assert starts == sorted(starts)
    commands = commands_of(README[starts[number] : [*starts, len(README)][number + 1]])
    assert commands
    ci = (ROOT / ".ci" / "run").read_text()
    for command in commands:
        more = COMMANDS[command]
        if more is None:
            assert command.replace("[", r"\[").replace("]", r"\]") in ci
            continue
        command = command.removeprefix("pip install -e . && ")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            f"{command} {more}",
            shell=True,
            cwd=clone,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    made = {"## Two commands": "digits.png", "## Training": "runs/mnist/checkpoints/step-00000003"}
    if SECTIONS[number] in made:
        assert (clone / made[SECTIONS[number]]).exists()


def test_what_needs_a_hub_has_configs_that_are_right():
    """The page among these lines has a test of its own."""
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("python ")]
    assert lines.pop(0) == "python -m cond_diffusion demo"
    configs = [load_config(Config, ROOT / words[3], words[4:]) for words in map(str.split, lines)]
    assert [config.latent.vae for config in configs] == ["stabilityai/sd-vae-ft-mse", None]
    assert [config.train.lora_rank for config in configs] == [0, 4]


def test_the_lines_for_several_gpus_are_ones_that_accelerate_knows():
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("accelerate ")]
    assert len(lines) == 3
    for line in lines:
        given = launch_command_parser().parse_args(line.removeprefix("accelerate launch ").split())
        assert given.training_script == "train.py"
        assert given.num_processes == 8 * int(given.num_machines or 1)
        assert given.multi_gpu != given.use_fsdp


def test_every_python_block_runs(clone: Path, monkeypatch: pytest.MonkeyPatch):
    """With a shorter chain, and the built-in model in the place of a run's checkpoint."""
    monkeypatch.chdir(clone)
    checkpoint = clone / "runs" / "mnist" / "checkpoints" / "step-00001000"
    shutil.copytree(BUILT_IN_MODEL, checkpoint)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block.replace("steps=None", "steps=5"), names)
    assert len(names["images"]) == 8
    assert names["image"].shape == (1, 1, 28, 28)
    assert (names["image"].abs() > 0.8).float().mean() > 0.8  # black and white, as a digit is
    assert (clone / "seven.png").exists()


def keys(config: Any, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found += keys(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [prefix + field.name]
    return found


def test_the_config_table_has_every_key_and_the_map_every_package():
    table = README[README.index("## The config") : README.index("## How good")]
    assert re.findall(r"^\| `([\w.]+)`", table, flags=re.MULTILINE) == keys(Config())
    packages = README[README.index("## The packages") : README.index("## The config")]
    folders = {path.parent.name for path in (ROOT / "cond_diffusion").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/`", packages, flags=re.MULTILINE)) == folders | {"assets"}
    leaves = {file.name for file in (ROOT / "cond_diffusion").glob("*.py") if not file.name.startswith("__")}
    assert leaves <= set(re.findall(r"`(\w+\.py)`", packages))
