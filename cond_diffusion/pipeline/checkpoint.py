"""Checkpoint folders in diffusers' layout: open, read and write them, and write the model card for the Hub.

A pipeline in latent space is stored as a `StableDiffusionPipeline`, whether it was trained here or elsewhere. diffusers
has no pipeline for pixel space; such a pipeline is stored with the class name `TextToImage`.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args

from huggingface_hub import ModelCard, ModelCardData

from cond_diffusion.config import schedule as schedule_config
from cond_diffusion.config.run import (
    CONFIG_NAME,
    PRETRAIN,
    Config,
    LatentConfig,
    PredictionKind,
    SampleConfig,
    load_config,
)
from cond_diffusion.config.schema import from_json, read_json, read_text
from cond_diffusion.diffusion.objective import Prediction
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError, did_you_mean
from cond_diffusion.files import write_file, write_json
from cond_diffusion.hub import WEIGHTS, download, is_hub_id, refuse_pickles
from cond_diffusion.models.latents import IN_LATENTS, IN_PIXELS, VAE, LatentSpace, PixelPatchify
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline import run_folder

ASSETS = Path(__file__).parent.parent / "assets"
BUILT_IN_MODEL = ASSETS / "mnist_model"
# By the names that `--checkpoint` and `init_from` accept.
BUILT_IN_MODELS = {"builtin": BUILT_IN_MODEL, "emoji": ASSETS / "emoji_model"}
GRID_NAME = "samples.png"
LATENT_GUIDANCE_SCALE = 7.5  # the default of diffusers' StableDiffusionPipeline
Result = TypeVar("Result")


class Checkpoint:
    """A checkpoint folder. Each part is loaded and validated on first access.

    Loading a part raises UserError if a file is missing, damaged, or belongs to an unsupported kind of pipeline.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def index(self) -> dict[str, Any]:
        """The contents of `model_index.json`."""
        return check_kind(self.folder, str(self.folder))

    @cached_property
    def latent_space(self) -> LatentSpace:
        """The space that the diffusion runs in: the latents of a VAE, or pixels."""
        for part, weights in WEIGHTS.items():
            refuse_pickles(self.folder / part, weights)
        if self.index["_class_name"] == IN_PIXELS:
            return PixelPatchify(from_json(LatentConfig, self.index, self.folder / run_folder.INDEX_NAME).patch_size)
        return VAE.from_pretrained(self.folder)

    @cached_property
    def guidance(self) -> dict[str, Any]:
        """The default guidance of sampling; for a model in pixel space, that of the run's sample grids."""
        if self.index["_class_name"] == IN_LATENTS:
            return SampleConfig(guidance_scale=LATENT_GUIDANCE_SCALE).guidance
        return from_json(SampleConfig, self.index, self.folder / run_folder.INDEX_NAME).guidance

    @cached_property
    def unet(self) -> UNet:
        unet = UNet.from_pretrained(self.folder, subfolder="unet")
        if self.index["_class_name"] == IN_LATENTS and (unet.config.sample_size or 64) < 64:
            # StableDiffusionPipeline corrects this, too: before 0.9, diffusers wrote 32 for models of 64 x 64 latents.
            version = str(read_json(self.folder / "unet" / "config.json").get("_diffusers_version", "1"))
            if re.match(r"0\.[0-8]\.", version):
                unet.config = replace(unet.config, sample_size=64)
        return unet

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, with the maximum length that its tokenizer was saved with."""
        return TextEncoder.from_pretrained(self.folder, max_length=None)

    @cached_property
    def prediction(self) -> Prediction:
        """The prediction type and the noise schedule."""
        file = self.folder / "scheduler" / "scheduler_config.json"
        fields = read_json(file)
        if self.index["_class_name"] == IN_LATENTS:
            fields |= {"clip_sample": False, "steps_offset": 1}  # as StableDiffusionPipeline overrides them
        kind, kinds = fields.pop("prediction_type", "epsilon"), get_args(PredictionKind)
        if kind not in kinds:
            raise UserError(f"{file}: prediction_type: {kind!r:.60} is not supported; expected {', '.join(kinds)}")
        return Prediction(kind, NoiseSchedule(schedule_config.from_diffusers(fields, file)))

    @cached_property
    def config(self) -> Config | None:
        """The config of the training run, or None if the folder has none."""
        file = self.folder / CONFIG_NAME
        if not file.is_file() or not re.search("^run_dir:", read_text(file), re.MULTILINE):  # of other software
            return None
        config, run_dir = load_config(Config, file), self.folder.absolute().parent.parent
        is_moved = config.text.encoder == PRETRAIN and Path(config.run_dir).resolve() != run_dir.resolve()
        return replace(config, run_dir=str(run_dir)) if is_moved and (run_dir / "text_encoder").is_dir() else config

    @property
    def background(self) -> str:
        """The color that transparent images were composited on in training."""
        return "black" if self.config is None else self.config.data.background

    @property
    def run_config(self) -> Config:
        """The config of the training run; raises UserError if the folder has none."""
        if self.config is None:
            raise UserError(f"{self.folder} has no {CONFIG_NAME} of a training run; expected a checkpoint of a run")
        return self.config


def open_checkpoint(source: str | Path, **options: Any) -> Checkpoint:
    """Open a model in `BUILT_IN_MODELS`, the newest checkpoint of a run folder, a checkpoint folder, or a model of the
    Hub, which is downloaded with options of `hub.download`."""
    if source in BUILT_IN_MODELS:
        return Checkpoint(BUILT_IN_MODELS[str(source)])
    folder = Path(source)
    if (folder / run_folder.INDEX_NAME).is_file():
        if problem := run_folder.find_corruption(folder, with_state=False):
            raise UserError(f"{folder}: {problem}")
        return Checkpoint(folder)
    if folder.is_dir():
        newest = run_folder.newest_checkpoint(folder, with_state=False)
        if newest is None:
            raise UserError(f"{folder}: no complete checkpoint; expected {run_folder.INDEX_NAME} or checkpoints/step-*")
        return Checkpoint(newest)
    if not is_hub_id(source):
        names = f"{', '.join(BUILT_IN_MODELS)}, a run folder, a checkpoint folder or a hub id"
        hint = did_you_mean(str(source), BUILT_IN_MODELS)
        raise UserError(f"there is no checkpoint {source}{hint}; expected {names}")
    # Check the kind before downloading gigabytes of an unsupported pipeline.
    check_kind(download(str(source), [run_folder.INDEX_NAME], **options), str(source))
    return Checkpoint(download(str(source), **options))


def read_checkpoint(source: str | Path, read: Callable[[Checkpoint], Result], **options: Any) -> Result:
    """Return `read(checkpoint)` for the checkpoint that `open_checkpoint` opens.

    A run in progress deletes old checkpoints. If it deletes this one during the call, the newest one is read instead.
    """
    while True:
        checkpoint = open_checkpoint(source, **options)
        try:
            return read(checkpoint)
        except (UserError, OSError):
            if checkpoint.folder.exists():
                raise


def lasting_name(source: str, folder: Path | None) -> str:
    """Return the name to record of a checkpoint: that of `folder` if `source` is a run, which training changes."""
    return str(folder) if source not in BUILT_IN_MODELS and Path(source).is_dir() else source


def write_index(folder: Path, latent_space: LatentSpace, prediction: Prediction, guidance: Mapping[str, Any]) -> None:
    """Write `model_index.json`, in pixel space with the default guidance, `scheduler/`, and `vae/` in latent space.

    diffusers has no score prediction: its schedulers raise an error that names `prediction_type` at their first step.
    """
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {**schedule_config.to_diffusers(prediction.schedule.config), "prediction_type": prediction.kind}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    index |= latent_space.save_pretrained(folder)
    if not latent_space.is_latent:
        index |= guidance
    write_json(folder / run_folder.INDEX_NAME, index)


def write_card(
    folder: Path,
    name: str,
    latent_space: LatentSpace,
    image_size: int,
    prediction: PredictionKind,
    prompts: list[str],
    checkpoint: Path | None,
    *,
    split_phrases: bool,
) -> None:
    """Write the model card of the Hub id `name`, with the prompts of the rows of the sample grid, and the config of the
    training run if the pipeline was loaded from a checkpoint of one."""
    config = None if checkpoint is None else Checkpoint(checkpoint).config
    if checkpoint is not None and config is not None:
        shutil.copy(checkpoint / CONFIG_NAME, folder)
    card = ModelCard.from_template(
        ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=["cond_diffusion", "diffusion"]),
        template_path=str(ASSETS / "model_card.md"),
        name=name,
        image_size=image_size,
        patch_size=None if latent_space.is_latent else latent_space.downsample_factor,
        prediction=prediction,
        split_phrases=split_phrases,
        prompts=prompts,
        prompt=json.dumps(prompts[0], ensure_ascii=False),
        config=config,
        metrics=_last_metrics(checkpoint),
    )
    write_file(folder / "README.md", str(card))


def prompts_of_run(checkpoint: Path | None) -> list[str]:
    """Return the prompts of the sample grids of a run; raise UserError if there are none."""
    config = None if checkpoint is None else Checkpoint(checkpoint).config
    if config is None or not config.sample.prompts:
        raise UserError("prompts: none given and none in the checkpoint's config; expected prompts for the sample grid")
    return [*config.sample.prompts]


def check_kind(folder: Path, name: str) -> dict[str, Any]:
    """Return the contents of `model_index.json`; raise UserError if the kind of pipeline is not supported."""
    index = read_json(folder / run_folder.INDEX_NAME)
    if (kind := index.get("_class_name")) not in (IN_PIXELS, IN_LATENTS):
        expected = f"{IN_PIXELS}, or {IN_LATENTS} of Stable Diffusion 1.x or 2.x"
        raise UserError(f"{name}: pipeline {kind!s:.60} is not supported; expected {expected}")
    return index


def _last_metrics(checkpoint: Path | None) -> dict[str, float | int]:
    """Return the last finite value of each metric up to the step of a checkpoint; empty without a run folder."""
    if checkpoint is None:
        return {}
    progress = checkpoint / "state" / run_folder.PROGRESS_NAME
    metrics = checkpoint.parent.parent / run_folder.METRICS_NAME
    if not (progress.is_file() and metrics.is_file()):
        return {}
    step = run_folder.read_progress(checkpoint)["step"]
    last: dict[str, float | int] = {}
    for values in run_folder.read_metrics(metrics):
        if values["step"] <= step:
            last |= {name: value for name, value in values.items() if isinstance(value, int | float)}
    return last
