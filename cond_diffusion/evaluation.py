"""How good a checkpoint is: its samples beside real pictures, by every measure that the field uses.

`python -m cond_diffusion.evaluation` draws samples of the checkpoint's own captions and puts them, and as many real
training pictures, beside the real test pictures. What real pictures get is what can be hoped for: a classifier is not
always right, and the Fréchet distance of a thousand pictures is not 0. Table, numbers (`evaluation.json`), pictures and
plots go into a folder; what is there already is not done again.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cond_diffusion.classifier import Classifier, accuracy, kept_classifier, train_classifier
from cond_diffusion.clip import ClipJudge
from cond_diffusion.config import Config, checkpoint_config
from cond_diffusion.data import CaptionedImages, load_captioned_images
from cond_diffusion.diagnosis import Diagnosis
from cond_diffusion.errors import UserError, command_line, first_line
from cond_diffusion.feed import ShuffledSet
from cond_diffusion.metrics import frechet_distance, manifolds, nearest
from cond_diffusion.objective import Objective
from cond_diffusion.order import sample_indices
from cond_diffusion.pictures import from_pillow, grid, to_bytes, to_model, to_pillow
from cond_diffusion.pipeline import TextToImage
from cond_diffusion.plots import plot_guidance_scales, plot_steps

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SAMPLERS, STEPS = ("ddpm", "ddim", "euler", "heun", "dpm_solver", "unipc"), (5, 10, 20, 50)
MOST_REAL = 10_000  # test pictures whose features are compared with
PICTURES_OF_A_LABEL = 20  # at least so many to a caption group, and the data are taken for a labelled set
NEIGHBOURS = 5

Judge = Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n d"]]
"""Pictures to features."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn; all of it goes to `TextToImage.__call__`."""

    sampler: str = "dpm_solver"
    steps: int | None = 20
    guidance_scale: float = 3.0
    seed: int = 0


class Evaluation:
    """A checkpoint's data, and who judges its samples.

    classifier: trained on the real pictures; None where their captions are no labels.
    clip: the CLIP whose text half the checkpoint reads with; None where that has no half for pictures.
    features: what the distances are measured in; by default the classifier's or, without one, the CLIP's.
    """

    def __init__(self, pipe: TextToImage, config: Config, features: Judge | None = None) -> None:
        self.pipe = pipe
        self.config = config
        self.train, self.test = real_pictures(config)
        labelled = len(self.train) >= PICTURES_OF_A_LABEL * len(self.train.caption_groups)
        self.classifier: Classifier | None = kept_classifier(self.train) if labelled else None
        clip = ClipJudge.from_pretrained(config.text.encoder, config.text.max_length)
        self.clip: ClipJudge | None = None if clip is None else clip.to(pipe.device)
        features = features or self.classifier or self.clip
        if features is None:
            raise UserError(
                "--features: the captions are no labels, and the checkpoint's text encoder has no half that sees "
                "pictures; expected a CLIP, for example --features openai/clip-vit-base-patch32"
            )
        self.features: Judge = features
        self.features_of_test = self.features(self.test.images[:MOST_REAL])

    def prompts(self, samples: int, *, paraphrases: bool = False) -> list[tuple[str, int]]:
        """Return prompts with their caption groups: each group's first caption, or with `paraphrases` all the others.

        Of more groups than samples, some.
        """
        wanted = slice(1, None) if paraphrases else slice(0, 1)
        groups = self.train.caption_groups
        prompts = [(prompt, i) for i, captions in enumerate(groups) for prompt in captions[wanted]]
        if not prompts:
            raise UserError("--paraphrases: every picture has one caption only in this checkpoint's data")
        if samples < len(prompts):
            prompts = [prompts[i] for i in sample_indices(len(prompts), 0, 0, samples).tolist()]
        return prompts

    def draw(self, prompts: list[tuple[str, int]], samples: int, drawing: Drawing) -> CaptionedImages:
        """Draw as many samples of each prompt, `samples` in all or a few less."""
        each = samples // len(prompts)
        images = self.pipe([prompt for prompt, _ in prompts], num_images=each, **asdict(drawing))
        groups = torch.tensor([group for _, group in prompts]).repeat_interleave(each)
        bytes_ = to_bytes(torch.stack([from_pillow(image) for image in images]))
        return CaptionedImages(bytes_, groups, self.train.caption_groups)

    def accuracy_and_distance(self, samples: CaptionedImages) -> tuple[float, float]:
        """Return the two numbers that are looked at together: guidance betters the one at the cost of the other."""
        return self.prompt_accuracy(samples), frechet_distance(self.features(samples.images), self.features_of_test)

    def floor(self, count: int) -> float:
        """Return the Fréchet distance of as many real training pictures: what samples can hope for."""
        chosen = sample_indices(len(self.train), 0, 0, min(count, len(self.train)))
        return frechet_distance(self.features(self.train.images[chosen]), self.features_of_test)

    def prompt_accuracy(self, samples: CaptionedImages) -> float:
        """Return the share of samples in which the best judge that there is sees what the prompt says."""
        if self.classifier is not None:
            return accuracy(self.classifier, self.train, samples)
        return self.zero_shot_accuracy(samples)

    def zero_shot_accuracy(self, samples: CaptionedImages) -> float:
        """Return the share of samples that CLIP finds nearer to their own caption than to any other that was drawn."""
        assert self.clip is not None
        groups = sorted(set(samples.group_of.tolist()))
        texts = self.clip.texts([samples.caption_groups[group][0] for group in groups])
        best = (self.clip(samples.images) @ texts.T).argmax(1)
        return (torch.tensor(groups)[best] == samples.group_of).float().mean().item()

    def clip_score(self, samples: CaptionedImages) -> float:
        """Return the mean of max(100 cos, 0) between pictures and captions (Hessel et al. 2021, but for their 2.5).

        Only scores of the same CLIP can be compared.
        """
        assert self.clip is not None
        texts = self.clip.texts([captions[0] for captions in samples.caption_groups])
        cosines = (self.clip(samples.images) * texts[samples.group_of]).sum(1)
        return (100 * cosines).clamp(min=0).mean().item()

    def measure(self, samples: CaptionedImages) -> dict[str, dict[str, float]]:
        """Return every measure of the samples and, to compare with, of as many real pictures: `samples` and `real`.

        These are training pictures, but for what a judge that was trained on them cannot be asked of them.
        """
        count = len(samples)
        chosen = sample_indices(len(self.train), 0, 0, min(count, len(self.train)))
        real = replace(self.train, images=self.train.images[chosen], group_of=self.train.group_of[chosen])
        both = {"samples": samples, "real": real}
        table: dict[str, dict[str, float]] = {}
        if self.classifier is not None:
            table["prompt accuracy, classifier"] = {
                "samples": self.prompt_accuracy(samples),
                "real": accuracy(self.classifier, self.train, self.test),
            }
        if self.clip is not None:
            unseen = {"samples": samples, "real": self.test}
            table["prompt accuracy, CLIP"] = {name: self.zero_shot_accuracy(s) for name, s in unseen.items()}
            table["CLIP score"] = {name: self.clip_score(s) for name, s in unseen.items()}
        features = {name: self.features(s.images) for name, s in both.items()}
        table["Fréchet distance"] = {name: frechet_distance(f, self.features_of_test) for name, f in features.items()}
        overlap = {name: asdict(manifolds(f, self.features_of_test[:count])) for name, f in features.items()}
        for name in ("precision", "recall", "density", "coverage"):
            table[name] = {kind: overlap[kind][name] for kind in both}
        if self.classifier is not None:
            trained = {name: train_classifier(s) for name, s in both.items()}
            table["accuracy on test pictures of a classifier trained on them"] = {
                name: accuracy(classifier, self.train, self.test) for name, classifier in trained.items()
            }
        table["distance to the nearest training picture"] = {
            "samples": self._distance_to_training(features["samples"]),
            "real": self._distance_to_training(self.features_of_test[:count]),
        }
        return table

    def _distance_to_training(self, features: Float[Tensor, "n d"]) -> float:
        return nearest(features, self.features_of_training(), 1)[0].mean().item()

    def features_of_training(self) -> Float[Tensor, "n d"]:
        if not hasattr(self, "_of_training"):
            self._of_training = self.features(self.train.images)
        return self._of_training

    def nearest_pictures(self, samples: CaptionedImages, count: int = 10) -> Image.Image:
        """Return rows of a sample and the training pictures that are nearest to it: is it memory?"""
        some = torch.arange(count) * len(samples) // count
        _, which = nearest(self.features(samples.images[some]), self.features_of_training(), NEIGHBOURS)
        rows = torch.cat([samples.images[some][:, None], self.train.images[which]], dim=1)
        return grid(to_pillow(to_model(rows.flatten(0, 1))), NEIGHBOURS + 1)

    def held_out_loss(self) -> dict[str, Any] | None:
        """Return the training loss on held-out pictures, by timestep, with other captions and without; None if the run
        held none out.
        """
        feed = ShuffledSet(self.train, self.config.seed, self.config.data.held_out)
        objective = Objective(self.config.objective, self.pipe.schedule)
        diagnosis = Diagnosis(self.config, feed, self.pipe.text_encoder, objective)
        findings = diagnosis.measure(self.pipe.unet, Accelerator(cpu=self.pipe.device.type == "cpu"))
        return None if findings is None else asdict(findings)


def real_pictures(config: Config) -> tuple[CaptionedImages, CaptionedImages]:
    """Return the training pictures and the test pictures; those that training holds out where there are none."""
    train = load_captioned_images(config.data)
    try:
        return train, load_captioned_images(config.data, "test")
    except UserError as error:
        feed = ShuffledSet(train, config.seed, config.data.held_out)
        held_out = feed.held_out_indices()
        if not len(held_out):
            raise
        logger.warning("no test pictures (%s); measuring with the %d that training holds out", error, len(held_out))
        return train, replace(train, images=train.images[held_out], group_of=train.group_of[held_out])


class Results:
    """`evaluation.json` in a folder: what was measured, kept after each part; what is in it is not done again."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.file = folder / "evaluation.json"
        self.parts: dict[str, Any] = {"settings": settings}
        if self.file.is_file():
            try:
                self.parts = json.loads(self.file.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{self.file} is damaged or was cut short: {first_line(error)}") from error
            if self.parts.get("settings") != settings:
                raise UserError(f"--output: {folder} holds another evaluation; give another name")
        elif folder.exists():
            raise UserError(f"--output: {folder} exists and holds no evaluation; give another name")
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part; make it and write it if it is not there."""
        if name not in self.parts:
            self.parts[name] = make()
            aside = self.file.with_suffix(".part")
            aside.write_text(json.dumps(self.parts, indent=2, ensure_ascii=False) + "\n")
            aside.replace(self.file)
        return self.parts[name]


def evaluate(evaluation: Evaluation, results: Results, samples: int, drawing: Drawing, *, paraphrases: bool) -> None:
    """Draw, measure, and write and print what was found."""

    def everything() -> dict[str, Any]:
        prompts = evaluation.prompts(samples, paraphrases=paraphrases)
        start = time.perf_counter()
        drawn = evaluation.draw(prompts, samples, drawing)
        seconds = time.perf_counter() - start
        some = to_pillow(to_model(drawn.images[: 10 * max(1, len(drawn) // 10) : max(1, len(drawn) // 100)]))
        grid(some[:100], 10).save(results.folder / "samples.png")
        evaluation.nearest_pictures(drawn).save(results.folder / "nearest.png")
        by_prompt = {
            prompt: evaluation.prompt_accuracy(
                _rows(drawn, i * (len(drawn) // len(prompts)), len(drawn) // len(prompts))
            )
            for i, (prompt, _) in enumerate(prompts[:100])
        }
        return {
            "count": len(drawn),
            "seconds per picture": seconds / len(drawn),
            "measures": evaluation.measure(drawn),
            "prompt accuracy by prompt": by_prompt,
        }

    print_table(results.part("samples", everything))
    results.part("held-out loss", evaluation.held_out_loss)


def sweep(evaluation: Evaluation, results: Results, samples: int, drawing: Drawing) -> None:
    """Measure accuracy and distance over guidance scales, and over steps for each sampler; plot both."""
    prompts = evaluation.prompts(samples)

    def point(drawing: Drawing) -> dict[str, Any]:
        accuracy, distance = evaluation.accuracy_and_distance(evaluation.draw(prompts, samples, drawing))
        return {**asdict(drawing), "prompt accuracy": accuracy, "Fréchet distance": distance}

    lowest = results.part("floor of the sweep", lambda: evaluation.floor(samples))
    scales = [
        results.part(f"guidance scale {scale}", lambda scale=scale: point(replace(drawing, guidance_scale=scale)))
        for scale in SCALES
    ]
    plot_guidance_scales(scales, lowest, results.folder / "guidance_scale.png")
    longest = evaluation.pipe.schedule.num_timesteps
    steps = [
        results.part(f"{name}, {n} steps", lambda name=name, n=n: point(replace(drawing, sampler=name, steps=n)))
        for name in SAMPLERS
        for n in STEPS
        if n <= longest
    ]
    plot_steps(steps, lowest, results.folder / "steps.png")


def _rows(data: CaptionedImages, first: int, count: int) -> CaptionedImages:
    rows = slice(first, first + count)
    return replace(data, images=data.images[rows], group_of=data.group_of[rows])


def print_table(found: dict[str, Any]) -> None:
    """Print what `evaluate` found."""
    for prompt, share in found["prompt accuracy by prompt"].items():
        print(f"{prompt:58}{share:10.1%}")
    print(f"{found['count']} samples{'':{58 - len(str(found['count'])) - 8}}{'samples':>10}{'real':>10}")
    for name, values in found["measures"].items():
        shape = "10.2%" if "accuracy" in name else "10.3f"
        print(f"{name:58}{values['samples']:{shape}}{values['real']:{shape}}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint's samples beside real pictures.")
    parser.add_argument(
        "--checkpoint", default="builtin", help="a run folder, a checkpoint folder or a hub id (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=1000, help="how many pictures to draw (default: %(default)s)")
    parser.add_argument("--paraphrases", action="store_true", help="use all captions but the first of each group")
    parser.add_argument("--guidance-scale", type=float, default=Drawing.guidance_scale, help="(default: %(default)s)")
    parser.add_argument("--sampler", default=Drawing.sampler, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=Drawing.steps, help="timesteps to visit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of each prompt's first picture (default: %(default)s)")
    parser.add_argument("--features", metavar="CLIP", help="a CLIP's folder or hub id: what distances are measured in")
    parser.add_argument("--sweep", action="store_true", help="also over guidance scales and over samplers and steps")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="a folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.samples < 10:
        raise UserError(f"--samples: {arguments.samples} says nothing; expected at least 10")

    drawing = Drawing(arguments.sampler, arguments.steps, arguments.guidance_scale, arguments.seed)
    pipe = TextToImage.from_pretrained(arguments.checkpoint).to_accelerator()
    settings = {
        **{"checkpoint": str(pipe.folder) if Path(arguments.checkpoint).is_dir() else arguments.checkpoint},
        **{name: getattr(arguments, name) for name in ("samples", "paraphrases", "features")},
        **asdict(drawing),
    }
    config = checkpoint_config(pipe.folder)
    results = Results(arguments.output, settings)
    features = None
    if arguments.features is not None and (features := ClipJudge.from_pretrained(arguments.features)) is None:
        raise UserError(f"--features: {arguments.features} is no whole CLIP; expected one with both halves")
    evaluation = Evaluation(pipe, config, features)
    evaluate(evaluation, results, arguments.samples, drawing, paraphrases=arguments.paraphrases)
    if arguments.sweep:
        sweep(evaluation, results, arguments.samples, drawing)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(command_line(main))
