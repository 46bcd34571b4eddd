"""Evaluation models, metrics and the report, against closed forms, hand-computed examples, and torchmetrics."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bar
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from cond_diffusion import TextToImage
from cond_diffusion.cli.commands import evaluate
from cond_diffusion.cli.main import command_line
from cond_diffusion.config.run import Config, load_config
from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.data.dataset import CaptionedImages, RandomDraws
from cond_diffusion.data.loader import open_training_data
from cond_diffusion.errors import Interrupted, UserError
from cond_diffusion.evaluation import metrics
from cond_diffusion.evaluation.evaluator import Evaluator, Judged, load_evaluator, load_real_images, subset
from cond_diffusion.evaluation.metrics import (
    Classifier,
    ClipJudge,
    frechet_distance,
    load_or_train_classifier,
    nearest,
    prdc,
    renumber_groups,
)
from cond_diffusion.evaluation.report import Results
from cond_diffusion.images import from_pillow, to_model
from cond_diffusion.models.text_encoder import BUILT_IN_ENCODER
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL


def with_moments(mean: torch.Tensor, deviation: torch.Tensor, count: int) -> torch.Tensor:
    """Return rows whose sample mean and covariance are exactly `mean` and diag(deviation^2)."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T.cov())).T
    return white * deviation + mean


def test_the_frechet_distance_equals_that_of_two_gaussians():
    """With diagonal covariances it is |m1 - m2|^2 + |s1 - s2|^2 (Dowson and Landau 1982)."""
    mean, deviation = torch.tensor([0.0, 1, 2], dtype=torch.float64), torch.tensor([1.0, 2, 0.5], dtype=torch.float64)
    other_mean, other_deviation = mean + torch.tensor([3.0, 0, 4]), deviation * torch.tensor([1, 2, 3])
    samples, real = with_moments(mean, deviation, 50), with_moments(other_mean, other_deviation, 70)
    expected = 25 + (deviation - other_deviation).square().sum().item()
    assert frechet_distance(samples, real) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_precision_recall_density_and_coverage_of_a_hand_computed_example():
    """With k = 1 real images at 0, 1 and 10 have balls of radius 1, 1, 9; samples those of 4.5, 4.5, 1, 1."""
    real, samples = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.5], [5.0], [100.0], [101.0]])
    assert prdc(samples, real, k=1) == {
        "precision": 2 / 4,  # 0.5 and 5
        "recall": pytest.approx(2 / 3),  # 10 is 5 from 5 and 90 from 100
        "density": 3 / 4,  # 0.5 lies in the balls of 0 and 1, 5 in that of 10
        "coverage": 1,
    }
    with pytest.raises(UserError, match=r"^samples: 4 .*3 real images.*more than 3"):
        prdc(samples, real, k=3)


def test_equal_distributions_have_density_and_coverage_near_1():
    generator = torch.Generator().manual_seed(0)
    samples, real = torch.randn(2, 1000, 16, generator=generator)
    values = prdc(samples, real)
    assert values["density"] == pytest.approx(1, abs=0.1)
    # 1 - (n - 1) ... (n - k) / ((2n - 1) ... (2n - k)), which tends to 1 - 2^-k (Naeem et al. 2020, section 3.3)
    assert values["coverage"] == pytest.approx(1 - 2**-5, abs=0.02)


def test_nearest_returns_the_images_at_the_smallest_distances():
    real = torch.tensor([[0.0, 0], [3, 4], [0, 1]])
    distance, indices = nearest(torch.zeros(1, 2), real, 2)
    assert indices.tolist() == [[0, 2]]
    assert distance.tolist() == [[0, 1]]


def real_images(config: Config) -> tuple[CaptionedImages, CaptionedImages]:
    return load_real_images(config, open_training_data(config.data, config.seed))


def every(data: CaptionedImages, step: int) -> CaptionedImages:
    """Return a fraction of the images: consecutive MNIST digits have the same writer and are not representative."""
    return replace(data, images=data.images[::step], group_of=data.group_of[::step])


@pytest.mark.slow
def test_real_digits_score_well_and_wrong_labels_or_noise_do_not(monkeypatch: pytest.MonkeyPatch):
    """The samples are real test images, real ones with wrong labels, and noise."""
    config = load_config(Config, BUILT_IN_MODEL / "config.yaml")
    train, test = real_images(config)
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "train_classifier", lambda _: pytest.fail("the shipped classifier is not used"))
        classifier, clip = load_or_train_classifier(train), ClipJudge.from_pretrained("builtin", 16)
    evaluator = Evaluator(every(train, 10), every(test, 2), classifier, clip)
    good = every(test, 20)
    wrong = evaluator.judge(replace(good, group_of=(good.group_of + 1) % 10))
    generator = torch.Generator().manual_seed(0)
    noise = replace(good, images=torch.randint(0, 256, good.images.shape, generator=generator, dtype=torch.uint8))
    noise = evaluator.judge(noise)
    good = evaluator.judge(good)

    measures = evaluator.measure(good)
    assert measures["prompt accuracy, classifier"]["samples"] > 0.97
    assert measures["prompt accuracy, classifier"]["real"] > 0.99
    assert measures["prompt accuracy, CLIP"]["samples"] > 0.95
    # Measured: 1.6 to 7.5 over five offsets of the subset, against 4.9; above 5000 for noise.
    assert measures["Fréchet distance"]["samples"] < 3 * measures["Fréchet distance"]["real"]
    assert measures["precision"]["samples"] > 0.7
    assert measures["recall"]["samples"] > 0.7
    name = "accuracy on test images of a classifier trained on them"
    assert measures[name]["samples"] > 0.85  # trained in this test; measured: at least 0.898 over five subsets
    assert measures[name]["samples"] == pytest.approx(measures[name]["real"], abs=0.1)
    assert wrong.accuracy < 0.02
    assert wrong.recognized_by_clip.float().mean() < 0.05
    assert wrong.clip_score < good.clip_score - 1
    assert noise.accuracy < 0.3
    assert evaluator.distance(noise) > 10 * measures["Fréchet distance"]["real"]
    # A training image's nearest training image is itself; a test image's is not.
    copies = evaluator.extractor(evaluator.train.images[:100])
    assert nearest(copies, evaluator.training.features, 1)[0].max() < 1e-2
    assert measures["distance to the nearest training image"]["samples"] > 1
    rows = evaluator.nearest_images(good, torch.arange(0, 500, 50))
    assert rows.shape == (10, 6, 1, 28, 28)
    assert torch.equal(rows[:, 0], good.data.images[::50])


class CountingExtractor:
    """Uses mean colors as features, and counts the calls for each image."""

    def __init__(self) -> None:
        self.counts: dict[bytes, int] = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        for image in images:
            key = image.numpy().tobytes()
            self.counts[key] = self.counts.get(key, 0) + 1
        return images.float().mean(dim=(2, 3))


def test_each_model_evaluates_each_sample_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "MIN_STEPS", 1)
    generator = torch.Generator().manual_seed(0)
    train, test, generated = (
        CaptionedImages(
            torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8),
            torch.arange(count) % 2,
            (("a red square",), ("a blue square",)),
        )
        for count in (30, 20, 10)
    )
    features, classifier = CountingExtractor(), Classifier(3, 2).eval()
    by_classifier = CountingExtractor()
    monkeypatch.setattr(classifier, "features", lambda images: by_classifier(images).repeat(1, 43)[:, :128] / 255)
    evaluator = Evaluator(train, test, classifier, None, features)
    samples = evaluator.judge(generated)
    measures = evaluator.measure(samples)
    evaluator.nearest_images(samples, torch.arange(10))
    assert evaluator.distance(samples) == pytest.approx(measures["Fréchet distance"]["samples"])
    assert samples.accuracy == measures["prompt accuracy, classifier"]["samples"]
    for image in generated.images:
        assert features.counts[image.numpy().tobytes()] == by_classifier.counts[image.numpy().tobytes()] == 1
    assert evaluator.real_baseline(10) == pytest.approx(measures["Fréchet distance"]["real"])
    assert measures["distance to the nearest training image"]["real"] > 0


def test_an_evaluator_without_classifier_and_clip_is_a_user_error():
    images = CaptionedImages(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.zeros(6, dtype=torch.long), (("a",),))
    with pytest.raises(UserError, match="features: "):
        Evaluator(images, images, None, None, lambda images: images.flatten(1).float())


def test_groups_are_numbered_as_in_training_and_new_groups_come_last():
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    data = CaptionedImages(images, torch.tensor([0, 1, 2]), (("three",), ("two",), ("one",)))
    renumbered = renumber_groups(data, (("one",), ("two",)))
    assert renumbered.group_of.tolist() == [2, 1, 0]
    assert renumbered.caption_groups == (("one",), ("two",), ("three",))


@pytest.mark.filterwarnings("ignore")  # raised by torchmetrics
def test_the_clip_score_equals_that_of_torchmetrics(small_mnist: None):
    from torchmetrics.multimodal.clip_score import CLIPScore  # takes seconds to import

    digits = real_images(load_config(Config, BUILT_IN_MODEL / "config.yaml"))
    test = subset(digits[1], 50)
    clip = ClipJudge.from_pretrained("builtin", 16)

    class Adapter(nn.Module):
        """Returns the embeddings that torchmetrics expects; those of transformers 5 are in an output object."""

        config = clip.clip.config

        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return clip.clip.get_image_features(pixel_values=pixel_values).pooler_output

        def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return clip.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def processor(text: Any = None, images: Any = None, return_tensors: str = "pt", padding: bool = True) -> Any:
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        return clip.tokenizer(text, padding="max_length", truncation=True, max_length=16, return_tensors="pt")

    reference = CLIPScore(lambda: (Adapter(), processor))
    captions = [test.caption_groups[group][0] for group in test.group_of.tolist()]
    reference.update([*to_model(test.images)], captions)
    evaluator = Evaluator(*digits, classifier=None, clip=clip)
    assert evaluator.judge(test).clip_score == pytest.approx(reference.compute().item(), abs=1e-3)


def test_a_text_encoder_or_a_folder_without_a_clip_is_a_user_error(tmp_path: Path):
    for folder in (BUILT_IN_MODEL, BUILT_IN_MODEL / "text_encoder"):
        with pytest.raises(UserError, match=rf"^CLIP: {re.escape(str(folder))}"):
            ClipJudge.from_pretrained(folder)
    with pytest.raises(UserError, match=rf"^CLIP: {re.escape(str(tmp_path))}"):
        ClipJudge.from_pretrained(tmp_path)
    assert isinstance(ClipJudge.from_pretrained(BUILT_IN_ENCODER), ClipJudge)


def test_too_few_training_or_test_images_are_a_user_error(tmp_path: Path):
    for split, count in (("train", 3), ("test", 8)):
        (tmp_path / split).mkdir()
        for i in range(count):
            Image.new("L", (8, 8), i).save(tmp_path / split / f"{i}.png")
            (tmp_path / split / f"{i}.txt").write_text(f"number {i}", encoding="utf-8")
    config = load_config(Config, overrides=[f"data.source={tmp_path}", "data.resolution=8"])
    with pytest.raises(UserError, match=r"^data\.source: .* has 3 training images; expected more than 5$"):
        load_evaluator(ColorPipeline(), config)
    (tmp_path / "test").rename(tmp_path / "other")
    (tmp_path / "train").rename(tmp_path / "test")
    (tmp_path / "other").rename(tmp_path / "train")
    with pytest.raises(UserError, match=r"has 3 test images; expected more than 5, in a split named test"):
        load_evaluator(ColorPipeline(), config)


def test_without_a_test_split_the_held_out_images_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for i in range(60):
        Image.fromarray(bar(i % 2, i // 2).numpy()).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"a bar, number {i}", encoding="utf-8")
    config = load_config(Config, overrides=[f"data.source={tmp_path}", "data.resolution=8"])
    train, test = real_images(config)
    assert (len(train), len(test)) == (57, 3)
    assert "data.source: " in caplog.text
    assert "3 held-out" in caplog.text
    images = {tuple(image.flatten().tolist()) for image in torch.cat([train.images, test.images])}
    assert len(images) == len({(i % 2, i // 2 % 8) for i in range(60)})  # none is missing


def test_the_held_out_images_are_those_of_training_if_some_images_cannot_be_read(tmp_path: Path):
    for i in range(60):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"number {i}", encoding="utf-8")
    for i in (2, 30):
        (tmp_path / f"{i:02}.png").write_text("not an image", encoding="utf-8")
    options = [f"data.source={tmp_path}", "data.resolution=8", "data.max_bad_fraction=0.1"]
    for crop in ("center", "random"):  # in memory, or decoded on access
        config = load_config(Config, overrides=[*options, f"data.crop={crop}"])
        training = open_training_data(config.data, config.seed)
        train, test = real_images(config)
        assert len(test) > 0
        assert len(train) + len(test) == 58
        trained_on = {*training.read(0, RandomDraws.fixed(200)).captions}
        captions = [{data.caption_groups[group][0] for group in data.group_of.tolist()} for data in (train, test)]
        assert captions[0] == trained_on
        assert captions[1].isdisjoint(trained_on)


def test_groups_with_the_same_first_caption_are_one_class_of_clip():
    clip = ClipJudge.from_pretrained("builtin", 16)
    groups = (("a digit one", "one"), ("a digit one", "1"), ("a digit two",))
    images = torch.randint(256, (6, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = CaptionedImages(images, torch.tensor([0, 1, 2, 0, 1, 2]), groups)
    cosines = clip(images) @ clip.texts(["a digit one", "a digit two"]).T
    own = [0, 0, 1, 0, 0, 1]
    judged = Judged(data, None, clip, clip)
    assert judged.recognized_by_clip.tolist() == [
        row[i] == max(row) for row, i in zip(cosines.tolist(), own, strict=True)
    ]
    assert judged.clip_score == pytest.approx((100 * cosines[range(6), own]).clamp(min=0).mean().item(), abs=1e-4)


class ColorPipeline(TextToImage):
    """A pipeline that generates single-color images: gray for even seeds, the color in the prompt for odd ones."""

    device = torch.device("cpu")  # type: ignore[assignment]

    def __init__(self) -> None:
        """Skip the initialization of the model."""

    def __call__(self, prompts: list[str], *, num_images: int, seed: list[int], **options: Any) -> torch.Tensor:
        self.seeds = seed
        jobs = [(prompt, first + i) for prompt, first in zip(prompts, seed, strict=True) for i in range(num_images)]
        assert options["output_type"] == "pt"
        colors = [prompt.split()[1] if seed % 2 else "gray" for prompt, seed in jobs]
        return torch.stack([from_pillow(Image.new("RGB", (8, 8), color)) for color in colors])


def test_captions_that_are_not_class_labels_are_evaluated_by_a_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Each image has its own caption; the built-in CLIP does not accept RGB images, so another one is required."""
    for i in range(130):
        color = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{i:03}.png")
        (tmp_path / f"{i:03}.txt").write_text(f"a {color} square, number {i}", encoding="utf-8")
    config = load_config(Config, overrides=[f"data.source={tmp_path}", "data.resolution=8", "data.channels=3"])
    pipe = ColorPipeline()
    with pytest.raises(UserError, match="^features: "):
        load_evaluator(pipe, config)
    assert "text.encoder: CLIP: builtin" in caplog.text
    assert "(3, 8, 8)" in caplog.text
    vision = {"image_size": 8, "patch_size": 4, "num_channels": 3}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(BUILT_IN_ENCODER)
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**small, **vision}, projection_dim=16))
    evaluator = load_evaluator(pipe, config, ClipJudge(clip, tokenizer, None, 16))
    prompts = evaluator.prompts(20)
    assert len(prompts) == 20
    samples = evaluator.generate(pipe, prompts, 40, SamplingOptions(sampler="dpm_solver", steps=20, seed=7))
    assert (samples.data.images[0] == 128).all() != (samples.data.images[1] == 128).all()
    assert pipe.seeds == [*range(7, 7 + 40, 2)]  # two images of each prompt: no two samples have the same seed
    assert samples.data.caption_groups == evaluator.reference.data.caption_groups  # compared by the same CLIP captions
    measures = evaluator.measure(samples)
    assert re.search(r"only \d+ test images for 40 samples", caplog.text)
    assert evaluator.judge_name.startswith("CLIP ")
    assert "prompt accuracy, classifier" not in measures
    assert 0 <= measures["prompt accuracy, CLIP"]["samples"] <= 1
    # Every image has one of three colors, all in the training set.
    assert measures["distance to the nearest training image"]["real"] < 1e-3
    with pytest.raises(UserError, match=r"^paraphrases: True; .* a single caption"):
        evaluator.prompts(20, paraphrases=True)
    evaluator.train = replace(evaluator.train, caption_groups=(("red", "crimson", "ruby"), ("blue",), ("sea", "ocean")))
    assert evaluator.prompts(20, paraphrases=True) == [("crimson", 0), ("ruby", 0), ("ocean", 2)]


@pytest.mark.slow
def test_an_interrupted_evaluation_is_resumed_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, short_evaluation: None
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def type_in(*arguments: str) -> tuple[int, str, str]:
        code = command_line(lambda: evaluate(["--samples", "20", "--steps", "4", *arguments]))
        return code, *capsys.readouterr()

    def assert_error(message: str, *arguments: str) -> None:
        code, _, errors = type_in(*arguments)
        assert code == 2
        assert message in errors

    code, table, _ = type_in("--sweep")
    assert code == 0
    assert "a digit seven" in table
    folder = tmp_path / "evaluation"
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert found["samples"]["count"] == 20
    assert len(found["held-out loss"]["by_timestep"]) == 8
    swept = {f"{name}, {steps} steps" for name in ("ddim", "unipc") for steps in (2, 4)}
    swept |= {"floor of the sweep", "guidance scale 1.0", "guidance scale 4.0"}
    assert found.keys() == {"settings", "samples", "held-out loss", *swept}
    assert found["unipc, 4 steps"]["Fréchet distance"] > 0
    assert {file.name for file in folder.glob("*.png")} == {
        *("samples.png", "nearest.png", "guidance_scale.png", "steps.png")
    }
    with Image.open(folder / "nearest.png") as image:
        assert image.size == (6 * 30 - 2, 10 * 30 - 2)

    # Interrupted in the sweep: existing parts are kept as they are, and the missing part gets the same values.
    removed = found.pop("unipc, 4 steps")
    found["guidance scale 1.0"]["prompt accuracy"] = 0.123
    (folder / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    assert type_in("--sweep")[:2] == (0, table)
    again = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert again["guidance scale 1.0"]["prompt accuracy"] == 0.123
    assert again["unipc, 4 steps"] == pytest.approx(removed)

    code, _, errors = type_in("--guidance-scale", "2")
    assert code == 2
    assert "error: output: evaluation " in errors
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    assert_error("output: there ", "--output", "there")
    assert_error("--samples: 3", "--samples", "3")
    clip = str(BUILT_IN_MODEL / "text_encoder")
    assert_error(f"CLIP: {clip} ", "--features", clip, "--output", "x")
    assert_error("sampler: 'eulr'", "--sampler", "eulr", "--output", "x")
    assert not (tmp_path / "x").exists()
    assert_error("output: evaluation/evaluation.json/x ", "--output", "evaluation/evaluation.json/x")

    assert type_in("--features", str(BUILT_IN_ENCODER), "--output", "by_clip")[0] == 0
    by_clip = json.loads((tmp_path / "by_clip" / "evaluation.json").read_text(encoding="utf-8"))["samples"]["measures"]
    assert by_clip["prompt accuracy, classifier"] == found["samples"]["measures"]["prompt accuracy, classifier"]
    assert by_clip["Fréchet distance"]["samples"] < 2  # features are unit vectors


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_evaluation_without_results_is_replaced_and_another_one_is_not(tmp_path: Path):
    Results(tmp_path, {"features": None})
    results = Results(tmp_path, {"features": "clip"})
    results.part("samples", lambda: 1)
    with pytest.raises(UserError, match=r"^output: .* in use by another evaluation"):
        Results(tmp_path, {"features": "clip"})
    with pytest.raises(Interrupted, match=r"^interrupted; .* has samples, and the same command continues from there"):
        results.part("more", interrupt)
    results.__exit__()
    with pytest.raises(UserError, match=r"^output: .*other settings"):
        Results(tmp_path, {"features": None})
    assert Results(tmp_path, {"features": "clip"}).parts == {"settings": {"features": "clip"}, "samples": 1}


def test_a_damaged_evaluation_file_is_a_user_error(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/evaluation.json: "):
        Results(tmp_path, {})
