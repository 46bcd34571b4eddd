"""The model card of a checkpoint: its training, its measures, and how to sample from it in both libraries."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from cond_diffusion.config.run import CONFIG_NAME, Config, PredictionKind, load_config
from cond_diffusion.errors import UserError
from cond_diffusion.models.latents import VAE, LatentSpace

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
    space: LatentSpace,
    side: int,
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
        image_size=side,
        patch_size=None if isinstance(space, VAE) else space.downscaling,
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
