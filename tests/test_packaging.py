"""Training and sampling with an installed wheel."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, ROOT], check=True
    )
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_installed_wheel_trains_and_samples(wheel: Path, tmp_path: Path):
    """The commands run in a folder outside the project."""
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def run_python(*arguments: str | Path) -> str:
        env = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert run_python("-c", "import cond_diffusion; print(cond_diffusion.__file__)").startswith(str(site))
    short = ["train.max_steps=1", "train.batch_size=4", "train.evaluate_every=0"]
    run_python(site / "bin" / "cond-diffusion-train", "--config", "mnist_fast", *short)
    sample = site / "bin" / "cond-diffusion-sample"
    assert run_python(sample, "seven", "--checkpoint", "runs/mnist_fast", "--steps", "2") == "seven.png\n"


@pytest.mark.slow
def test_types_are_seen_by_the_pyright_of_a_user(wheel: Path, tmp_path: Path):
    """The wheel in a virtual environment of its own, beside the dependencies of this one."""
    if importlib.util.find_spec("pyright") is None:
        assert "CI" not in os.environ
        pytest.skip("pyright is not installed; run: pip install --group dev")
    venv.create(tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        "from cond_diffusion import TextToImage, train\n"
        "reveal_type(TextToImage.from_pretrained())\n"
        "reveal_type(train)\n"
        "TextToImage.from_pretrained(1.5)\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pyright", "--pythonpath", tmp_path / "venv" / "bin" / "python", script]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert 'is "TextToImage"' in output
    assert '"(config: Config, dataset: ' in output
    assert re.search(r"script\.py:4:.*error.*float", output)
    assert "1 error" in output
