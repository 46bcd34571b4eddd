"""What the tests share: small captioned images, and a config that trains on them in seconds."""

# ruff: noqa: E402 - the environment is set before the libraries are imported that read it.

import atexit
import copy
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A cache of the tests' own, removed at the end: nothing depends on what an earlier run or a user left in ~/.cache.
# Set before the libraries are imported that ask where it is.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cond-diffusion-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(name, None)

# Nothing depends on a GPU or on the Hub: there are none.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"

# The tests write some 400 checkpoints, and lose no power meanwhile.
os.fsync = lambda descriptor: None

# Processes that test side by side take a core each: torch's threads of several would wait for one another.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import datasets
import huggingface_hub.constants
import pytest
import torch
from hub import ModelHub, serve
from huggingface_hub.utils import close_session
from pyarrow.parquet import ParquetWriter, read_table, write_table
from safetensors.torch import load

from cond_diffusion import device
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.sources import BUILT_IN_SOURCES
from cond_diffusion.evaluation.emoji import Emoji
from cond_diffusion.models import text_encoder

# Fixtures of tests that train or start processes; `pytest -m "not slow"` leaves these tests out.
SLOW_FIXTURES = {"bars_overrides", "bars_config", "clone"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.slow)


ROOT = Path(__file__).parent.parent
SIDE = 8


def bar(label: int, place: int) -> torch.Tensor:
    """Return a white bar on black, upright for label 0 and level for label 1, at one of eight places."""
    image = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    image[:, place % SIDE] = 255
    return image if label == 0 else image.T.contiguous()


def write_empty_parquet(file: Path) -> None:
    """Write a Parquet file of a data set without examples; `to_parquet` of datasets 4.6 divides by zero there."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    ParquetWriter(file, features.arrow_schema).close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# A process is forked from a server that has already imported everything, so that it starts quickly.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cond_diffusion.training.trainer"])


def run_in_processes(count: int, target: Callable[..., None], *arguments: Any) -> None:
    """Call `target` with its process's number and the arguments in processes that find each other as torchrun's do."""
    port = free_port()
    processes = [PROCESSES.Process(target=_as_process, args=(i, count, port, target, arguments)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0


def _as_process(process: int, count: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    for kind in ("", "LOCAL_"):
        os.environ.update({f"{kind}RANK": str(process), f"{kind}WORLD_SIZE": str(count)})
    target(process, *arguments)


@pytest.fixture(autouse=True)
def fp32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `auto` fp32 on every machine, since outputs are compared."""
    monkeypatch.setattr(device, "has_bf16", lambda: False)


@pytest.fixture(scope="session")
def bars_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 images of bars with labels, in a Parquet file as the hub has them."""
    file = tmp_path_factory.mktemp("bars") / "train.parquet"
    labels = [i % 2 for i in range(64)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["upright", "level"])})
    images = [bar(label, i // 2).numpy() for i, label in enumerate(labels)]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(file)
    return file


@pytest.fixture(scope="session")
def bars_overrides(bars_parquet: Path) -> list[str]:
    """`key=value` words for a tiny run on the bars."""
    return [
        f"data.source={bars_parquet}",
        "data.caption_column=label",
        'data.caption_templates=["a bar that is {label}","{label}"]',
        f"data.resolution={SIDE}",
        "text.max_length=16",
        "unet.channels=[32,32]",
        "unet.attention=[false,true]",
        "unet.num_groups=8",
        "train.mixed_precision=no",
        "train.batch_size=8",
        "train.max_steps=4",
        "train.warmup_steps=1",
        "train.checkpoint_every=2",
        "train.sample_every=0",
        "train.log_every=1",
        'sample.prompts=["a bar that is level"]',
        "sample.steps=3",
    ]


@pytest.fixture
def bars_config(bars_overrides: list[str], tmp_path: Path) -> Config:
    return load_config(Config, overrides=[*bars_overrides, f"run_dir={tmp_path / 'run'}"])


@pytest.fixture
def short_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cond_diffusion.training.validation.NUM_EXAMPLES", 64)


@pytest.fixture(scope="session", autouse=True)
def built_in_text_models_are_read_once() -> Iterator[None]:
    """Copies the text models in `assets/` after the first time, since most tests load one."""
    load_clip, loaded = text_encoder.load_clip, {}

    def load_or_copy(kind: Any, folder: Path) -> Any:
        if not folder.is_relative_to(text_encoder.ASSETS):
            return load_clip(kind, folder)
        if (kind, folder) not in loaded:
            loaded[kind, folder] = load_clip(kind, folder)
        return copy.deepcopy(loaded[kind, folder])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoder, "load_clip", load_or_copy)
        yield


@pytest.fixture(scope="session")
def emoji() -> Emoji:
    return Emoji()


@pytest.fixture(scope="session")
def first_of_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first images of MNIST."""
    folder = tmp_path_factory.mktemp("small_mnist")
    for split, count in (("train", 2000), ("test", 500)):
        write_table(
            read_table(BUILT_IN_SOURCES["mnist"] / f"{split}.parquet").slice(0, count), folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture
def small_mnist(first_of_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces MNIST, which takes many seconds to decode, by its first images."""
    monkeypatch.setitem(BUILT_IN_SOURCES, "mnist", first_of_mnist)


@pytest.fixture
def short_evaluation(small_mnist: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations compare with few real images, train classifiers for few steps, and sweep over few points."""
    monkeypatch.setattr("cond_diffusion.evaluation.metrics.MIN_STEPS", 2)
    monkeypatch.setattr("cond_diffusion.evaluation.metrics.EPOCHS", 0)
    monkeypatch.setattr("cond_diffusion.evaluation.report.SCALES", (1.0, 4.0))
    monkeypatch.setattr("cond_diffusion.evaluation.report.SAMPLERS", ("ddim", "unipc"))
    monkeypatch.setattr("cond_diffusion.evaluation.report.STEPS", (2, 4))


@pytest.fixture
def model_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[ModelHub]]:
    ModelHub.repositories, ModelHub.asked, ModelHub.private = {}, [], set()
    with serve(ModelHub) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        close_session()
        yield ModelHub
    close_session()


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averages, the raw weights, and the optimizer's moments, as copies that later changes of the files leave."""
    state = [f"state/{stem}.safetensors" for stem in ("unet", "optimizer", "narrow_ema")]
    files = [file for file in ("unet/diffusion_pytorch_model.safetensors", *state) if (checkpoint / file).exists()]
    return {f"{file}:{name}": value for file in files for name, value in load((checkpoint / file).read_bytes()).items()}


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
