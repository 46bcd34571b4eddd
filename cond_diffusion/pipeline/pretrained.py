"""A pipeline's folder: where it is, and what its JSON says. The layout is diffusers'.

A pipeline in latent space is a `StableDiffusionPipeline`, ours and others' alike; one in pixels, which diffusers has
no pipeline for, says TextToImage.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from cond_diffusion.config import schedule as schedule_config
from cond_diffusion.diffusion.prediction import Prediction, PredictionKind
from cond_diffusion.diffusion.schedule import NoiseSchedule
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.hub import WEIGHTS, download, is_hub_id, refuse_pickles
from cond_diffusion.models.latents import VAE, LatentSpace, Patches
from cond_diffusion.pipeline.checkpoint import damage, newest_checkpoint

BUILT_IN_MODEL = Path(__file__).parent.parent / "assets" / "mnist_model"
INDEX_NAME = "model_index.json"
Result = TypeVar("Result")

IN_PIXELS, IN_LATENTS = "TextToImage", "StableDiffusionPipeline"


def find_checkpoint(source: str | Path, **options: Any) -> Path:
    """Return the folder that holds `model_index.json`: of the built-in model, of a run's newest checkpoint, of a
    checkpoint, or of what a hub id names, fetched with the `options` of `hub.download`.
    """
    if source == "builtin":
        return BUILT_IN_MODEL
    folder = Path(source)
    if (folder / INDEX_NAME).is_file():
        if problem := damage(folder, with_state=False):
            raise UserError(f"{folder}: {problem}")
        return folder
    if folder.is_dir():
        newest = newest_checkpoint(folder, with_state=False)
        if newest is None:
            raise UserError(f"{folder} holds no complete checkpoint: neither {INDEX_NAME} nor checkpoints/step-*")
        return newest
    if not is_hub_id(source):
        raise UserError(f"there is no checkpoint {source}; expected a run folder, a checkpoint folder or a hub id")
    folder = download(str(source), [INDEX_NAME], **options)  # before gigabytes of something else
    _check_kind(folder, str(source))
    return download(str(source), **options)


def read_checkpoint(source: str | Path, read: Callable[[Path], Result], **options: Any) -> Result:
    """Return what `read` makes of the folder that `find_checkpoint` finds.

    A run that is being trained deletes old checkpoints. Where it deletes this one meanwhile, the newest is read.
    """
    while True:
        folder = find_checkpoint(source, **options)
        try:
            return read(folder)
        except (UserError, OSError):
            if folder.exists():
                raise


def read_latent_space(folder: Path) -> LatentSpace:
    """Return where a pipeline's diffusion happens; raise UserError for a pipeline of another kind."""
    index = _check_kind(folder, str(folder))
    for part, weights in WEIGHTS.items():
        refuse_pickles(folder / part, weights)
    return Patches(index.get("patch_size", 1)) if index["_class_name"] == IN_PIXELS else VAE.from_pretrained(folder)


def _check_kind(folder: Path, name: str) -> dict[str, Any]:
    """Return what `model_index.json` says; raise UserError for a pipeline of another kind."""
    index = _read_json(folder / INDEX_NAME)
    if (kind := index.get("_class_name")) not in (IN_PIXELS, IN_LATENTS):
        raise UserError(
            f"{name} holds a {kind}; expected a {IN_PIXELS}, or a {IN_LATENTS} of Stable Diffusion 1.x or 2.x"
        )
    return index


def write_index(folder: Path, space: LatentSpace) -> None:
    """Write `model_index.json`, and the autoencoder where there is one."""
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if isinstance(space, VAE):
        space.save_pretrained(folder)
        nothing = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        index |= {"vae": ["diffusers", "AutoencoderKL"], **nothing, "requires_safety_checker": False}
        index["_class_name"] = IN_LATENTS
    else:
        index |= {"_class_name": IN_PIXELS, "patch_size": space.downscaling}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def read_prediction(folder: Path) -> Prediction:
    """Return what a pipeline's network predicts, and its schedule."""
    fields = _read_json(folder / "scheduler" / "scheduler_config.json")
    if _read_json(folder / INDEX_NAME).get("_class_name") == IN_LATENTS:
        fields |= {"clip_sample": False, "steps_offset": 1}  # whatever is written there, as that pipeline has it
    kind, kinds = fields.pop("prediction_type", "epsilon"), get_args(PredictionKind)
    if kind not in kinds:
        raise UserError(f"scheduler config: prediction_type: {kind!r} is not supported; expected {', '.join(kinds)}")
    return Prediction(kind, NoiseSchedule(schedule_config.from_diffusers(fields)))


def write_prediction(folder: Path, prediction: Prediction) -> None:
    """Write `scheduler/`. diffusers has no name for score; its schedulers refuse ours, by name, at their first step."""
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {**schedule_config.to_diffusers(prediction.schedule.config), "prediction_type": prediction.kind}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is no complete checkpoint: there is no {file.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged or was cut short: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is damaged: expected names and values")
    return fields
