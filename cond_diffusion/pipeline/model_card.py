"""The model card of a checkpoint: what it was trained on, how, how good it is, and how to use it in both libraries."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from cond_diffusion.config.run import CONFIG_NAME, Config, load_config
from cond_diffusion.diffusion.prediction import PredictionKind
from cond_diffusion.errors import UserError
from cond_diffusion.models.latents import VAE, LatentSpace

GRID_NAME = "samples.png"

_OURS = """\
from cond_diffusion import TextToImage

pipe = TextToImage.from_pretrained("{name}")
images = pipe({prompt}, num_images=4, sampler="dpm_solver", steps=20)
images[0].save("picture.png")
"""

_THEIRS_IN_LATENTS = """\
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{name}")
image = pipe({prompt}, guidance_scale=3.0).images[0]
"""

_THEIRS_IN_PIXELS = """\
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

name = "{name}"
unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet")
scheduler = DDPMScheduler.from_pretrained(name, subfolder="scheduler")
text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder")
tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")

with torch.inference_mode():
    tokens = tokenizer([{prompt}, ""], padding="max_length", return_tensors="pt")
    context = text_encoder(tokens.input_ids)[0]
    x = torch.randn(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps:
        cond, uncond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = scheduler.step(uncond + 3 * (cond - uncond), t, x).prev_sample
    image = torch.nn.functional.pixel_shuffle(x, {patch_size})  # 1 x channels x height x width, in [-1, 1]
"""


def prompts_of_run(checkpoint: Path | None) -> list[str]:
    """Return what a run drew while it trained; raise UserError where that is not known."""
    if checkpoint is not None and (checkpoint / CONFIG_NAME).is_file():
        prompts = load_config(Config, checkpoint / CONFIG_NAME).sample.prompts
        if prompts:
            return [*prompts]
    raise UserError("prompts: none given, and no run tells any; expected what the card's samples should show")


def write_card(
    folder: Path,
    name: str,
    space: LatentSpace,
    side: int,
    prediction: PredictionKind,
    prompts: list[str],
    checkpoint: Path | None,
) -> None:
    """Write the card into a folder for the hub, and the run's config beside it.

    name: the hub id. side: of the pictures. prediction: of the network. prompts: what the rows of its grid of samples
    show. checkpoint: the folder of a run's checkpoint, if the pipeline comes from one.
    """
    fill = {"name": name, "prompt": json.dumps(prompts[0], ensure_ascii=False), "patch_size": space.downscaling}
    in_latents = isinstance(space, VAE)
    where = "in the latents of its VAE" if in_latents else "of pixels"
    if prediction == "score":
        theirs = (
            "diffusers' schedulers do not draw with this network: they have no name for the score, which it predicts."
        )
    else:
        lines = (_THEIRS_IN_LATENTS if in_latents else _THEIRS_IN_PIXELS).format(**fill)
        theirs = f"In diffusers:\n\n```python\n{lines}```"
    head = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["cond_diffusion", "diffusion"]}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    parts = [
        f"---\n{front}\n---\n# {name}",
        f"A text-to-image diffusion model {where}, {side} x {side}, by cond_diffusion.",
        f"![samples]({GRID_NAME})\n\n*A row for each of: {'; '.join(prompts)}. Nothing selected.*",
        f"## How to use it\n\n```python\n{_OURS.format(**fill)}```\n\n{theirs}",
    ]
    if checkpoint is not None and (checkpoint / CONFIG_NAME).is_file():
        shutil.copy(checkpoint / CONFIG_NAME, folder)
        config = load_config(Config, checkpoint / CONFIG_NAME)
        data = config.data
        parts.append(
            f"## Training\n\nData: `{data.source}`, captions from `{data.caption_column}`, {data.resolution} x "
            f"{data.resolution}. Loss: {config.objective.loss}; the network predicts {config.objective.prediction}.\n\n"
            f"{_measured(checkpoint)}\n\nThe whole config is in `{CONFIG_NAME}`."
        )
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def _measured(checkpoint: Path) -> str:
    """Return what a run measured up to a checkpoint, as a table."""
    progress, metrics = checkpoint / "state" / "progress.json", checkpoint.parent.parent / "metrics.jsonl"
    if not (progress.is_file() and metrics.is_file()):
        return "What the run measured is not known here."
    step = json.loads(progress.read_text())["step"]
    newest: dict[str, Any] = {}
    for line in metrics.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # a line that a kill has cut short
            values = json.loads(line)
            if values["step"] <= step:
                newest |= values
    rows = [f"| {name} | {value:g} |" for name, value in newest.items() if value is not None]
    return "\n".join(["| measure | last value |", "|---|---|", *rows])
