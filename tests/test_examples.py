"""The examples run, and the public API suffices to sample from a custom network."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import Tensor

import cond_diffusion
from cond_diffusion import NoiseSchedule, Prediction, ScheduleConfig, TextToImage, denoiser, dpm_solver, guided
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.evaluation.emoji import Emoji
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODELS


def test_every_public_name_can_be_imported():
    for name in cond_diffusion.__all__:
        assert getattr(cond_diffusion, name) is not None
    with pytest.raises(AttributeError):
        cond_diffusion.nothing  # noqa: B018


@pytest.mark.slow
def test_whole_method_trains_and_samples(
    tmp_path: Path, small_mnist: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With smaller batches, a smaller network and fewer steps."""
    script = (ROOT / "tests" / "examples" / "whole_method.py").read_text(encoding="utf-8")
    assert len([line for line in script.splitlines() if line]) <= 40
    smaller = (("64,)", "16,)"), ("rand(64)", "rand(16)"), ("(32, 64)", "(16, 16)"), ("timesteps(100)", "timesteps(5)"))
    for usual, short in smaller:
        assert usual in script
        script = script.replace(usual, short)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["whole_method.py", "101"])
    torch.manual_seed(0)
    exec(script, {})
    first_loss, last_loss = (float(line.split("loss ")[1]) for line in capsys.readouterr().out.splitlines())
    assert last_loss < 0.6 * first_loss  # measured over five seeds: at most 0.28
    with Image.open(tmp_path / "digits.png") as image:
        assert image.size == (4 * 30 - 2, 4 * 30 - 2)


@pytest.mark.slow
def test_public_api_samples_from_a_custom_network():
    """The network is the optimal eps_hat for data ~ N(context, 0.1^2), so the samples must have that distribution."""
    schedule = NoiseSchedule(ScheduleConfig())

    def network(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        alpha, sigma = (value.to(x_t)[:, None, None, None] for value in schedule.alpha_sigma(t))
        variance = alpha**2 * 0.1**2 + sigma**2
        return sigma * (x_t - alpha * context[..., None]) / variance

    context = torch.tensor([0.5, -0.5]).repeat_interleave(500)[:, None, None]
    conditioned = guided(network, context, torch.zeros_like(context), torch.ones(1000))
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 1, 1, 1, generator=noise)
    denoise = denoiser(conditioned, Prediction("epsilon", schedule))
    timesteps = schedule.sampling_timesteps(None)
    *_, last = dpm_solver(denoise, schedule, x, timesteps, lambda: torch.randn_like(x), eta=0.0, order=2)
    for samples, mean in zip(last.x.split(500), (0.5, -0.5), strict=True):
        assert samples.mean().item() == pytest.approx(mean, abs=0.02)
        assert samples.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.fixture
def speedrun() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speedrun", ROOT / "tests" / "benchmarks" / "speedrun" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_speedrun_records_first_checkpoint_that_passes_the_bar(speedrun: ModuleType):
    passes = {10: False, 20: False, 30: True, 40: True}
    results = [speedrun.Result(seconds, {"accuracy": f"{seconds}%"}, passed) for seconds, passed in passes.items()]
    remaining = iter(results)
    assert speedrun.first_qualified(remaining) == results[2]
    assert [*remaining] == results[3:]  # not evaluated
    assert speedrun.first_qualified(results[:2]) is None
    table = speedrun.record({0: results[3], 1: results[2], 2: results[1]}, "2 CPU cores", "abc").splitlines()
    assert table[0] == "| hardware | commit | seconds | accuracy | seeds |"
    assert table[2] == "| 2 CPU cores | abc | 30 | 30% | 0 (40 s), 1 (30 s), 2 (20 s) |"


@pytest.mark.slow
def test_speedrun_trains_times_and_judges_checkpoints(
    speedrun: ModuleType, first_of_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    digits = [
        f"data.source={first_of_mnist}",
        "data.caption_column=label",
        'data.caption_templates=["a digit {label}"]',
    ]
    config = ROOT / "configs" / "mnist_fast.yaml"
    short = ["train.batch_size=4", "train.max_steps=2", "train.checkpoint_every=1", "train.evaluate_every=0"]
    checkpoints = speedrun.timed_checkpoints(config, tmp_path / "run", [*short, *digits, "train.warmup_steps=1"])
    assert [path.name for _, path in checkpoints] == ["step-00000001", "step-00000002"]
    assert 0 < checkpoints[0][0] < checkpoints[1][0]
    track = speedrun.Digits(load_config(Config, config), 100)
    untrained, trained = speedrun.judge(track, [checkpoints[1], (1.0, BUILT_IN_MODELS["builtin"])])
    assert not untrained.qualifies
    assert trained.qualifies
    assert trained.measures.keys() == {"accuracy", "Fréchet distance"}


@pytest.mark.slow
def test_speedrun_judges_emoji(speedrun: ModuleType, emoji: Emoji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speedrun, "Emoji", lambda: emoji)
    track = speedrun.HeldOutEmoji(10)
    untrained = TextToImage.from_pretrained("emoji")
    for weight in untrained.unet.parameters():
        weight.data.zero_()
    untrained.save_pretrained(tmp_path / "untrained")
    checkpoints = [(1.0, BUILT_IN_MODELS["emoji"]), (2.0, tmp_path / "untrained")]
    trained, other = speedrun.judge(track, checkpoints)
    assert trained.measures.keys() == {"concept, top 1", "concept, top 5", "style", "family of styles"}
    assert trained.qualifies
    assert not other.qualifies
