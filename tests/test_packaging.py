"""A wheel alone is enough to train and to draw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_wheel_trains_and_draws(tmp_path: Path):
    """Installed beside what it depends on; its commands run in a folder where nothing of the project lies."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def run(command: str, *words: str) -> str:
        result = subprocess.run(
            [sys.executable, site / "bin" / command, *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import cond_diffusion; print(cond_diffusion.__file__)"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
    short = ["train.max_steps=1", "train.batch_size=4", "train.evaluate_every=0"]
    run("cond-diffusion-train", "--config", "mnist_fast", *short)
    assert run("cond-diffusion-sample", "seven", "--checkpoint", "runs/mnist_fast", "--steps", "2") == "seven.png\n"
