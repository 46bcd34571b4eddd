"""A pipeline's folder: where it is, and what its JSON says. The layout is diffusers'.

A pipeline in latent space is a `StableDiffusionPipeline`, ours and others' alike; one in pixels, which diffusers has
no pipeline for, says TextToImage.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args

from huggingface_hub import ModelCard, ModelCardData

from cond_diffusion.config import schedule as schedule_config
from cond_diffusion.config.run import CONFIG_NAME, Config, PredictionKind, load_config
from cond_diffusion.diffusion.objective import Prediction
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.hub import WEIGHTS, download, is_hub_id, refuse_pickles
from cond_diffusion.models.latents import IN_LATENTS, IN_PIXELS, VAE, LatentSpace, PixelPatchify
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.run_folder import find_corruption, newest_checkpoint

BUILT_IN_MODEL = Path(__file__).parent.parent / "assets" / "mnist_model"
INDEX_NAME = "model_index.json"
Result = TypeVar("Result")


class Checkpoint:
    """A pipeline's folder. Each part is read, and checked, when it is first asked for.

    Reading a part raises UserError where a file is missing, damaged, or of another kind of pipeline.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def index(self) -> dict[str, Any]:
        """What `model_index.json` holds."""
        return check_kind(self.folder, str(self.folder))

    @cached_property
    def latent_space(self) -> LatentSpace:
        """Where the diffusion happens."""
        for part, weights in WEIGHTS.items():
            refuse_pickles(self.folder / part, weights)
        if self.index["_class_name"] == IN_PIXELS:
            return PixelPatchify(self.index.get("patch_size", 1))
        return VAE.from_pretrained(self.folder)

    @cached_property
    def unet(self) -> UNet:
        return UNet.from_pretrained(self.folder, subfolder="unet")

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The encoder, with the length that the tokenizer was saved with."""
        return TextEncoder.from_pretrained(self.folder, max_length=None)

    @cached_property
    def prediction(self) -> Prediction:
        """What the network predicts, and its schedule."""
        fields = read_json(self.folder / "scheduler" / "scheduler_config.json")
        if self.index["_class_name"] == IN_LATENTS:
            fields |= {"clip_sample": False, "steps_offset": 1}  # whatever is written there, as that pipeline has it
        kind, kinds = fields.pop("prediction_type", "epsilon"), get_args(PredictionKind)
        if kind not in kinds:
            raise UserError(
                f"scheduler config: prediction_type: {kind!r} is not supported; expected {', '.join(kinds)}"
            )
        return Prediction(kind, NoiseSchedule(schedule_config.from_diffusers(fields)))

    @cached_property
    def config(self) -> Config | None:
        """The config of the run that wrote it; None where there is none."""
        file = self.folder / CONFIG_NAME
        return load_config(Config, file) if file.is_file() else None

    @property
    def run_config(self) -> Config:
        """The config; UserError where there is none."""
        if self.config is None:
            raise UserError(
                f"--checkpoint: {self.folder} has no {CONFIG_NAME}, which names its data; expected a run's checkpoint"
            )
        return self.config


def open_checkpoint(source: str | Path, **options: Any) -> Checkpoint:
    """Open the built-in model, a run's newest checkpoint, a checkpoint folder, or what a hub id names.

    Args:
        source: "builtin", a folder or a hub id, which is downloaded.
        **options: Those of `hub.download`.

    Raises:
        UserError: Where there is none, or a file of it was changed since it was written.
    """
    if source == "builtin":
        return Checkpoint(BUILT_IN_MODEL)
    folder = Path(source)
    if (folder / INDEX_NAME).is_file():
        if problem := find_corruption(folder, with_state=False):
            raise UserError(f"{folder}: {problem}")
        return Checkpoint(folder)
    if folder.is_dir():
        newest = newest_checkpoint(folder, with_state=False)
        if newest is None:
            raise UserError(f"{folder} holds no complete checkpoint: neither {INDEX_NAME} nor checkpoints/step-*")
        return Checkpoint(newest)
    if not is_hub_id(source):
        raise UserError(f"there is no checkpoint {source}; expected a run folder, a checkpoint folder or a hub id")
    check_kind(download(str(source), [INDEX_NAME], **options), str(source))  # before gigabytes of something else
    return Checkpoint(download(str(source), **options))


def read_checkpoint(source: str | Path, read: Callable[[Checkpoint], Result], **options: Any) -> Result:
    """Return what `read` makes of the checkpoint that `open_checkpoint` opens.

    A run that is being trained deletes old checkpoints. Where it deletes this one meanwhile, the newest is read.
    """
    while True:
        checkpoint = open_checkpoint(source, **options)
        try:
            return read(checkpoint)
        except (UserError, OSError):
            if checkpoint.folder.exists():
                raise


def check_kind(folder: Path, name: str) -> dict[str, Any]:
    """Return what `model_index.json` says; raise UserError for a pipeline of another kind."""
    index = read_json(folder / INDEX_NAME)
    if (kind := index.get("_class_name")) not in (IN_PIXELS, IN_LATENTS):
        raise UserError(
            f"{name} holds a {kind}; expected a {IN_PIXELS}, or a {IN_LATENTS} of Stable Diffusion 1.x or 2.x"
        )
    return index


def write_index(folder: Path, latent_space: LatentSpace) -> None:
    """Write `model_index.json`, and the autoencoder where there is one."""
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    index |= latent_space.save_pretrained(folder)
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def write_prediction(folder: Path, prediction: Prediction) -> None:
    """Write `scheduler/`. diffusers has no name for score; its schedulers refuse ours, by name, at their first step."""
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {**schedule_config.to_diffusers(prediction.schedule.config), "prediction_type": prediction.kind}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is no complete checkpoint: there is no {file.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged or was cut short: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is damaged: expected names and values")
    return fields


GRID_NAME = "samples.png"
TEMPLATE = Path(__file__).parent.parent / "assets" / "model_card.md"


def prompts_of_run(checkpoint: Path | None) -> list[str]:
    """Return the prompts of a run's sample grids; raise UserError where there are none."""
    config = _config_of_run(checkpoint)
    if config is None or not config.sample.prompts:
        raise UserError("prompts: none given, and the checkpoint has none; expected the prompts of the card's samples")
    return [*config.sample.prompts]


def write_card(
    folder: Path,
    name: str,
    latent_space: LatentSpace,
    image_size: int,
    prediction: PredictionKind,
    prompts: list[str],
    checkpoint: Path | None,
) -> None:
    """Write the card of the model with the hub id `name`, and the run's config, into a folder.

    side: of the images, in pixels. prompts: one for each row of the grid of samples. checkpoint: the folder of a run's
    checkpoint, if the pipeline comes from one.
    """
    config = _config_of_run(checkpoint)
    if checkpoint is not None and config is not None:
        shutil.copy(checkpoint / CONFIG_NAME, folder)
    card = ModelCard.from_template(
        ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=["cond_diffusion", "diffusion"]),
        template_path=str(TEMPLATE),
        name=name,
        image_size=image_size,
        patch_size=None if latent_space.is_latent else latent_space.downsample_factor,
        prediction=prediction,
        prompts=prompts,
        prompt=json.dumps(prompts[0], ensure_ascii=False),
        config=config,
        measures=_last_measures(checkpoint),
    )
    card.save(folder / "README.md")


def _config_of_run(checkpoint: Path | None) -> Config | None:
    if checkpoint is None or not (checkpoint / CONFIG_NAME).is_file():
        return None
    return load_config(Config, checkpoint / CONFIG_NAME)


def _last_measures(checkpoint: Path | None) -> dict[str, float | int]:
    """Return the last finite value of each metric up to a checkpoint; none if the run's folder is not there."""
    if checkpoint is None:
        return {}
    progress, metrics = checkpoint / "state" / "progress.json", checkpoint.parent.parent / "metrics.jsonl"
    if not (progress.is_file() and metrics.is_file()):
        return {}
    step = json.loads(progress.read_text())["step"]
    newest: dict[str, Any] = {}
    for line in metrics.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # a line that a kill has cut short
            values = json.loads(line)
            if values["step"] <= step:
                newest |= values
    return {name: value for name, value in newest.items() if value is not None}
