"""The evaluation on the built-in emoji, with the shipped judge."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import emoji_dataset
import pytest
import torch

from cond_diffusion.cli.commands import evaluate
from cond_diffusion.cli.main import command_line
from cond_diffusion.config.sampling import DEFAULT_EVALUATION
from cond_diffusion.errors import UserError
from cond_diffusion.evaluation.emoji import SUBSETS, Emoji, EmojiJudge, copies, evaluate_emoji, recognized
from cond_diffusion.evaluation.report import Results
from cond_diffusion.pipeline.text_to_image import TextToImage


@pytest.fixture(scope="module")
def judge() -> EmojiJudge:
    return EmojiJudge.load()


def test_subsets_are_the_splits_of_the_data(emoji: Emoji):
    seen, pairs, colors = (emoji.subset(name, 10_000) for name in SUBSETS)
    assert (len(seen), len(pairs), len(colors)) == (7989, 194, 60)
    assert {emoji.concepts[i] for i in colors.concept.tolist()} == {*emoji_dataset.HELD_OUT_COLORS}
    row = pairs.prompts.index("a penguin, twemoji style")
    assert (emoji.concepts[pairs.concept[row]], emoji.styles[pairs.style[row]]) == ("penguin", "twemoji")


@pytest.mark.parametrize("name", SUBSETS)
def test_the_judge_recognizes_real_images_and_no_others(emoji: Emoji, judge: EmojiJudge, name: str):
    real = emoji.subset(name, 200)
    measures = recognized(judge, emoji, real)
    assert measures["concept, top 1"] > 0.97
    assert measures["concept, top 5"] > 0.99
    assert measures["family of styles"] > 0.9
    assert measures["style"] > 0.7  # 3d and glossy are alike
    wrong = replace(real, concept=(real.concept + 1) % len(emoji.concepts), style=(real.style + 1) % len(emoji.styles))
    assert recognized(judge, emoji, wrong)["concept, top 1"] < 0.03
    assert recognized(judge, emoji, wrong)["style"] < 0.1
    generator = torch.Generator().manual_seed(0)
    noise = replace(real, images=torch.randint(256, real.images.shape, generator=generator, dtype=torch.uint8))
    assert recognized(judge, emoji, noise)["concept, top 5"] < 0.1


def test_training_images_are_copies_and_held_out_ones_are_not(emoji: Emoji):
    seen = emoji.subset("seen pairs", 100)
    assert copies(emoji, seen) == {"copies": 1.0, "nearest is of the prompt": pytest.approx(1.0, abs=0.02)}
    assert copies(emoji, replace(seen, concept=seen.concept + 1))["nearest is of the prompt"] == 0
    held_out = copies(emoji, emoji.subset("held-out pairs", 194))
    assert held_out["copies"] < 0.1
    assert held_out["nearest is of the prompt"] == 0


def test_a_model_of_other_images_is_refused_before_it_samples(tmp_path: Path):
    with pytest.raises(UserError, match=r"^--checkpoint: .*\(1, 28, 28\); .* expects \(3, 64, 64\)"):
        evaluate_emoji(TextToImage.from_pretrained(), 10, DEFAULT_EVALUATION, Results(tmp_path / "evaluation", {}))


@pytest.mark.slow
def test_the_command_measures_each_subset_and_refuses_what_does_not_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, emoji: Emoji
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cond_diffusion.evaluation.emoji.Emoji", lambda: emoji)
    seeds = []
    noise = TextToImage._noise
    monkeypatch.setattr(TextToImage, "_noise", lambda pipe, batch: seeds.extend(batch) or noise(pipe, batch))
    arguments = ["--checkpoint", "emoji", "--samples", "10", "--steps", "2"]

    def type_in(*others: str) -> tuple[int, str, str]:
        return command_line(lambda: evaluate([*arguments, *others])), *capsys.readouterr()

    code, table, _ = type_in("--seed", "5")
    assert code == 0
    assert seeds == [*range(5, 15)] * len(SUBSETS)
    found = json.loads(Path("evaluation/evaluation.json").read_text(encoding="utf-8"))
    assert {*SUBSETS} < found.keys()
    for name in SUBSETS:
        assert f"{name}: 10 samples, by emoji judge " in table
        assert found[name]["count"] == 10
        assert found[name]["real"]["concept, top 1"] > 0.8
    assert len([*Path("evaluation").glob("*.png")]) == 2 * len(SUBSETS)
    assert type_in("--seed", "5")[:2] == (0, table)  # from the file
    for option in (["--paraphrases"], ["--sweep"]):
        code, _, errors = type_in(*option, "--output", "x")
        assert code == 2
        assert option[0] in errors
    assert not Path("x").exists()
