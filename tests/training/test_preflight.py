"""`python train.py --check` tells what a long run would meet."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import colours
import pytest
import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.errors import UserError
from cond_diffusion.training import preflight as check_module
from cond_diffusion.training.preflight import bytes_kept, check, verdict


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_module, "MOST_STEPS", 40)
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_it_tells_of_the_data_the_cost_and_whether_it_learns(here: Path, streaming: bool):
    words = colours.write(here / "set", "jsonl", 60)
    (here / "set" / "00007.png").write_text("no picture")
    lines = (here / "set" / "metadata.jsonl").read_text().replace("a red circle", "a " + "very " * 20 + "red circle")
    (here / "set" / "metadata.jsonl").write_text(lines)
    more = ["text.max_length=16", "unet.channels=[32,32]", "unet.num_groups=8", "data.max_bad_fraction=0.1"]
    more += ["train.batch_size=8", "train.max_steps=1000", "data.resolution=32", f"data.streaming={streaming}"]
    said = list(check(load_config(Config, overrides=[*words, *more])))
    assert said[0] == f"data: {here / 'set'}, {'a stream' if streaming else '60 pictures'}; columns: image, text"
    assert "1 cannot be read" in said[1] if not streaming else " cannot be read" in said[1]
    assert "are smaller than data.resolution (32) and are enlarged" in said[1]
    assert "are longer than text.max_length (16 tokens) and are cut, for example 'a " in said[2]
    assert said[3] == "wrote check-runs-new.png: pictures with their captions"
    with Image.open("check-runs-new.png") as sheet:
        assert sheet.convert("RGB").getextrema() == ((0, 255),) * 3
    assert [line.split(":")[0] for line in said[4:]] == ["network", "memory", "time", "verdict"]
    assert "the loss of one batch went from" in said[7]
    assert not (here / "runs").exists()


def test_what_is_kept_for_the_backward_pass_is_counted():
    """A linear layer keeps its input, a sigmoid its output, the square of a sum that sum."""
    layer, x = torch.nn.Linear(10, 20), torch.randn(5, 10)
    assert bytes_kept(layer, lambda: layer(x).sigmoid().sum().square()) == 4 * (5 * 10 + 5 * 20 + 1)
    again = partial(checkpoint, lambda x: layer(x).sigmoid(), use_reentrant=False)
    assert bytes_kept(layer, lambda: again(x).sum().square()) == 4 * (5 * 10 + 1)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([1.0, 0.5, 0.2], "it learns; start the run"),
        ([1.0, 0.95, 0.9], r"it learns slowly; train.learning_rate \(0.1\) may be low"),
        ([1.0, 2.0, 5.0], r"it does not learn; train.learning_rate \(0.1\) may be too high"),
        ([1.0, float("nan")], r"no number any more; train.learning_rate \(0.1\) is too high"),
    ],
)
def test_the_verdict_says_what_the_losses_mean(losses: list[float], words: str):
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(verdict(losses, 0.1))


def test_what_training_would_refuse_is_refused(bars_config: Config):
    wrong = replace(bars_config, data=replace(bars_config.data, caption_column="lable"))
    with pytest.raises(UserError, match=r"no column 'lable' in .* \(did you mean 'label'\?\)"):
        list(check(wrong))
