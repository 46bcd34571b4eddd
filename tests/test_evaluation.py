"""The judges and the measures, against closed forms, cases done by hand, and torchmetrics."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bar
from PIL import Image
from torch import nn
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from cond_diffusion import TextToImage
from cond_diffusion.cli import evaluate as evaluation
from cond_diffusion.cli.evaluate import Results
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.dataset import CaptionedImages, load_captioned_images
from cond_diffusion.errors import UserError, command_line
from cond_diffusion.evaluation import evaluator as judging
from cond_diffusion.evaluation import judges as classifier
from cond_diffusion.evaluation.evaluator import Judging, Sampling, real_pictures
from cond_diffusion.evaluation.metrics import frechet_distance, manifolds, nearest
from cond_diffusion.images import to_model
from cond_diffusion.models.clip import ClipJudge
from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER
from cond_diffusion.pipeline.pretrained import BUILT_IN_MODEL


def with_moments(mean: torch.Tensor, deviation: torch.Tensor, count: int) -> torch.Tensor:
    """Return rows whose own mean and covariance are exactly `mean` and diag(deviation^2)."""
    draw = torch.Generator().manual_seed(count)
    rows = torch.randn(count, len(mean), generator=draw, dtype=torch.float64)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T.cov())).T
    return white * deviation + mean


def test_the_frechet_distance_is_that_of_two_gaussians():
    """With diagonal covariances it is |m1 - m2|^2 + |s1 - s2|^2 (Dowson and Landau 1982)."""
    mean, deviation = torch.tensor([0.0, 1, 2], dtype=torch.float64), torch.tensor([1.0, 2, 0.5], dtype=torch.float64)
    other_mean, other_deviation = mean + torch.tensor([3.0, 0, 4]), deviation * torch.tensor([1, 2, 3])
    samples, real = with_moments(mean, deviation, 50), with_moments(other_mean, other_deviation, 70)
    expected = 25 + (deviation - other_deviation).square().sum().item()
    assert frechet_distance(samples, real) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_precision_recall_density_and_coverage_of_a_case_done_by_hand():
    """With k = 1 real pictures at 0, 1 and 10 have balls of radius 1, 1, 9; samples those of 4.5, 4.5, 1, 1."""
    real, samples = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.5], [5.0], [100.0], [101.0]])
    found = manifolds(samples, real, k=1)
    assert found.precision == 2 / 4  # 0.5 and 5
    assert found.recall == pytest.approx(2 / 3)  # 10 is 5 from 5 and 90 from 100
    assert found.density == 3 / 4  # 0.5 lies in the balls of 0 and 1, 5 in that of 10
    assert found.coverage == 1
    with pytest.raises(UserError, match="more than 3 pictures"):
        manifolds(samples, real, k=3)


def test_sets_that_cannot_be_told_apart_have_density_and_coverage_near_1():
    draw = torch.Generator().manual_seed(0)
    samples, real = torch.randn(2, 1000, 16, generator=draw)
    found = manifolds(samples, real)
    assert found.density == pytest.approx(1, abs=0.1)
    # 1 - (n - 1) ... (n - k) / ((2n - 1) ... (2n - k)), which tends to 1 - 2^-k (Naeem et al. 2020, section 3.3)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_the_nearest_pictures_are_those_at_the_least_distance():
    real = torch.tensor([[0.0, 0], [3, 4], [0, 1]])
    distance, which = nearest(torch.zeros(1, 2), real, 2)
    assert which.tolist() == [[0, 2]]
    assert distance.tolist() == [[0, 1]]


@pytest.fixture(scope="module")
def digits() -> tuple[CaptionedImages, CaptionedImages]:
    config = load_config(Config, BUILT_IN_MODEL / "config.yaml").data
    train, test = (load_captioned_images(config, split, progress=False) for split in ("train", "test"))
    return train, test


@pytest.fixture(scope="module")
def judged(digits: tuple[CaptionedImages, CaptionedImages]) -> Judging:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "real_pictures", lambda config: (digits[0], *digits))
        return Judging(TextToImage.from_pretrained(), load_config(Config, BUILT_IN_MODEL / "config.yaml"))


def some(data: CaptionedImages, first: int, count: int) -> CaptionedImages:
    rows = slice(first, first + count)
    return replace(data, images=data.images[rows], group_of=data.group_of[rows])


@pytest.mark.slow
def test_real_digits_pass_for_real_and_wrong_ones_do_not(judged: Judging):
    """Real test pictures stand in for samples: good ones, ones with the labels of others, and ones drowned in noise."""
    test = judged.test
    number = {captions: i for i, captions in enumerate(judged.train.caption_groups)}
    groups = torch.tensor([number[captions] for captions in test.caption_groups])[test.group_of]
    test = CaptionedImages(test.images, groups, judged.train.caption_groups)
    # Every twentieth: neighbours in MNIST are by the same hand, so that 500 of them are not like all the others.
    good = CaptionedImages(test.images[::20], test.group_of[::20], test.caption_groups)
    wrong = replace(good, group_of=(good.group_of + 1) % 10)
    draw = torch.Generator().manual_seed(0)
    noise = replace(good, images=torch.randint(0, 256, good.images.shape, generator=draw, dtype=torch.uint8))

    measures = judged.measure(good)
    assert measures["prompt accuracy, classifier"]["samples"] > 0.97
    assert measures["prompt accuracy, classifier"]["real"] > 0.99
    assert measures["prompt accuracy, CLIP"]["samples"] > 0.95
    # Over five offsets of the subset 1.6 to 7.5, against 4.9; of noise above 5000.
    assert measures["Fréchet distance"]["samples"] < 3 * measures["Fréchet distance"]["real"]
    assert measures["precision"]["samples"] > 0.7
    assert measures["recall"]["samples"] > 0.7
    name = "accuracy on test pictures of a classifier trained on them"
    assert measures[name]["samples"] > 0.85  # trained here; over five subsets 0.898 and more
    assert measures[name]["samples"] == pytest.approx(measures[name]["real"], abs=0.1)
    assert judged.recognised(wrong).float().mean() < 0.02
    assert judged.recognised_by_clip(wrong).float().mean() < 0.05
    assert judged.clip_score(wrong) < judged.clip_score(good) - 1
    accuracy, distance = judged.accuracy_and_distance(noise)
    assert accuracy < 0.3
    assert distance > 10 * measures["Fréchet distance"]["real"]
    # A training picture's nearest training picture is itself; a test picture's is not.
    copies = judged.features(judged.train.images[:100])
    assert nearest(copies, judged.features_of_training, 1)[0].max() < 1e-2
    assert measures["distance to the nearest training picture"]["samples"] > 1
    assert judged.nearest_pictures(good).size == (6 * 30 - 2, 10 * 30 - 2)


@pytest.mark.filterwarnings("ignore")  # torchmetrics' own
def test_the_clip_score_is_torchmetrics_s(digits: tuple[CaptionedImages, CaptionedImages]):
    test = some(digits[1], 0, 50)
    judge = ClipJudge.from_pretrained("builtin", 16)
    assert judge is not None

    class Adapter(nn.Module):
        """Transformers 5 answers with an object that holds what torchmetrics expects."""

        config = judge.clip.config

        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return judge.clip.get_image_features(pixel_values=pixel_values).pooler_output

        def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return judge.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def processor(text: Any = None, images: Any = None, return_tensors: str = "pt", padding: bool = True) -> Any:
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        return judge.tokenizer(text, padding="max_length", truncation=True, max_length=16, return_tensors="pt")

    theirs = CLIPScore(lambda: (Adapter(), processor))
    captions = [test.caption_groups[group][0] for group in test.group_of.tolist()]
    theirs.update([*to_model(test.images)], captions)
    judged = object.__new__(Judging)  # without data, which the score does not ask for
    judged.clip = judge
    assert judged.clip_score(test) == pytest.approx(theirs.compute().item(), abs=1e-3)


def test_a_text_encoder_without_eyes_judges_nothing_and_a_folder_without_a_clip_is_one_line(tmp_path: Path):
    assert ClipJudge.from_pretrained(BUILT_IN_MODEL / "text_encoder") is None
    with pytest.raises(UserError, match="is not a complete CLIP"):
        ClipJudge.from_pretrained(tmp_path)
    assert ClipJudge.from_pretrained(BUILT_IN_ENCODER) is not None


def test_without_test_pictures_those_that_were_held_out_are_measured_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for i in range(60):
        Image.fromarray(bar(i % 2, i // 2).numpy()).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"a bar, number {i}")
    config = load_config(Config, overrides=[f"data.source={tmp_path}", "data.resolution=8"])
    whole, train, test = real_pictures(config)
    assert (len(whole), len(train), len(test)) == (60, 57, 3)
    assert "measuring with the 3 that training holds out" in caplog.text
    pictures = {tuple(picture.flatten().tolist()) for picture in torch.cat([train.images, test.images])}
    assert len(pictures) == len({(i % 2, i // 2 % 8) for i in range(60)})  # none is lost


class Painter(TextToImage):
    """Stands in for a pipeline that draws what it was told: grey for odd seeds, its prompt's colour for even ones."""

    device = torch.device("cpu")  # type: ignore[assignment]

    def __init__(self) -> None:
        """Need no network."""

    def __call__(self, prompts: list[str], *, num_images: int, seed: list[int], **options: Any) -> list[Image.Image]:
        jobs = [(prompt, first + i) for prompt, first in zip(prompts, seed, strict=True) for i in range(num_images)]
        return [Image.new("RGB", (8, 8), prompt.split()[1] if seed % 2 else "grey") for prompt, seed in jobs]


def test_captions_that_are_no_labels_are_judged_by_a_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Coloured squares, each with a caption of its own; the built-in CLIP cannot see them, another has to be given."""
    for i in range(130):
        colour = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{i:03}.png")
        (tmp_path / f"{i:03}.txt").write_text(f"a {colour} square, number {i}")
    config = load_config(Config, overrides=[f"data.source={tmp_path}", "data.resolution=8", "data.channels=3"])
    pipe = Painter()
    with pytest.raises(UserError, match="--features: the captions are no labels"):
        Judging(pipe, config)
    assert "reads no pictures of 8 x 8 pixels in 3 channels" in caplog.text
    vision = {"image_size": 8, "patch_size": 4, "num_channels": 3}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = CLIPTokenizer.from_pretrained(BUILT_IN_ENCODER)
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 16}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**small, **vision}, projection_dim=16))
    judged = Judging(pipe, config, ClipJudge(clip, words, None, 16))
    prompts = judged.prompts(20)
    assert len(prompts) == 20
    samples = judged.draw(prompts, 40, Sampling(seed=7))
    assert (samples.images[0] == 128).all() != (samples.images[1] == 128).all()
    measures = judged.measure(samples)
    assert "prompt accuracy, classifier" not in measures
    assert 0 <= measures["prompt accuracy, CLIP"]["samples"] <= 1
    assert measures["distance to the nearest training picture"]["real"] < 1e-3  # one of three colours, all trained on


@pytest.mark.slow
def test_an_evaluation_picks_up_where_it_was_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, digits: tuple[CaptionedImages, CaptionedImages]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = some(digits[0], 0, 2000), some(digits[1], 0, 500)
    monkeypatch.setattr(judging, "real_pictures", lambda config: (few[0], *few))
    monkeypatch.setattr(classifier, "LEAST_STEPS", 20)
    monkeypatch.setattr(evaluation, "SCALES", (1.0, 4.0))
    monkeypatch.setattr(evaluation, "SAMPLERS", ("ddim", "unipc"))
    monkeypatch.setattr(evaluation, "STEPS", (2, 4))

    def type_in(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluation", "--samples", "20", "--steps", "4", *words])
        code = command_line(evaluation.main)
        return code, *capsys.readouterr()

    code, table, _ = type_in("--sweep")
    assert code == 0
    assert "a digit seven" in table
    folder = tmp_path / "evaluation"
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["samples"]["count"] == 20
    assert len(found["held-out loss"]["by_timestep"]) == 8
    swept = {f"{name}, {steps} steps" for name in ("ddim", "unipc") for steps in (2, 4)}
    swept |= {"floor of the sweep", "guidance scale 1.0", "guidance scale 4.0"}
    assert found.keys() == {"settings", "samples", "held-out loss", *swept}
    assert found["unipc, 4 steps"]["Fréchet distance"] > 0
    assert {file.name for file in folder.glob("*.png")} == {
        *("samples.png", "nearest.png", "guidance_scale.png", "steps.png"),
    }
    with Image.open(folder / "nearest.png") as picture:
        assert picture.size == (6 * 30 - 2, 10 * 30 - 2)

    # Interrupted in the sweep: what was there is kept as it is, what was not is made again, and comes out the same.
    removed = found.pop("unipc, 4 steps")
    found["guidance scale 1.0"]["prompt accuracy"] = 0.123
    (folder / "evaluation.json").write_text(json.dumps(found))
    assert type_in("--sweep")[:2] == (0, table)
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["guidance scale 1.0"]["prompt accuracy"] == 0.123
    assert again["unipc, 4 steps"] == pytest.approx(removed)

    assert type_in("--guidance-scale", "2")[::2] == (
        2,
        "error: --output: evaluation holds another evaluation; give another name\n",
    )
    (tmp_path / "there").mkdir()
    assert "exists and holds no evaluation" in type_in("--output", "there")[2]
    assert "say nothing" in type_in("--samples", "3")[2]
    assert "sees no pictures" in type_in("--features", str(BUILT_IN_MODEL / "text_encoder"), "--output", "x")[2]
    assert "sampler: " in type_in("--sampler", "eulr", "--output", "x")[2]
    assert not (tmp_path / "x").exists()
    assert "cannot be written" in type_in("--output", "evaluation/evaluation.json/x")[2]

    assert type_in("--features", str(BUILT_IN_ENCODER), "--output", "by_clip")[0] == 0
    by_clip = json.loads((tmp_path / "by_clip" / "evaluation.json").read_text())["samples"]["measures"]
    assert by_clip["prompt accuracy, classifier"] == found["samples"]["measures"]["prompt accuracy, classifier"]
    assert by_clip["Fréchet distance"]["samples"] < 2  # of directions of length 1


def test_a_damaged_evaluation_is_one_line(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match="damaged or was cut short"):
        Results(tmp_path, {})
