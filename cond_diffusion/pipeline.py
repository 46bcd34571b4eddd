"""Text to image: everything that turns a prompt into a picture, as one object that loads, saves and is called."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion import latents, schedule
from cond_diffusion.checkpoint import checkpoints
from cond_diffusion.data import to_bytes
from cond_diffusion.errors import UserError, did_you_mean, first_line
from cond_diffusion.guidance import guided
from cond_diffusion.pictures import grid, output_path
from cond_diffusion.randomness import generator
from cond_diffusion.samplers import Denoiser, ddpm
from cond_diffusion.schedule import NoiseSchedule
from cond_diffusion.text import TextEncoder
from cond_diffusion.unet import UNet

BUILT_IN_MODEL = Path(__file__).parent / "assets" / "mnist_model"
SAMPLERS = ("ddpm",)
INDEX_NAME = "model_index.json"

logger = logging.getLogger(__name__)


class TextToImage:
    """A text encoder, a UNet and a noise schedule: prompts in, PIL images out."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder, noise_schedule: NoiseSchedule, patch_size: int) -> None:
        if unet.config.in_channels is None or unet.config.sample_size is None:
            raise UserError("UNet config: sample_size is not given; expected the side of the pictures that it draws")
        self.shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.unet = unet
        self.text_encoder = text_encoder
        self.schedule = noise_schedule
        self.patch_size = patch_size

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None) -> "TextToImage":
        """Load the built-in model (None), a run's newest checkpoint, a checkpoint folder, or a hub id.

        Raises UserError where there is none, or where a file of it is missing, damaged or for another kind of pipeline.
        """
        folder = find_checkpoint(source)
        index = _read_json(folder / INDEX_NAME)
        if index.get("_class_name") != cls.__name__:
            raise UserError(f"{folder} holds a {index.get('_class_name')}; expected a {cls.__name__}")
        return cls(
            UNet.from_pretrained(folder / "unet"),
            TextEncoder.from_pretrained(folder, max_length=None),
            NoiseSchedule(schedule.from_diffusers(_read_json(folder / "scheduler" / "scheduler_config.json"))),
            patch_size=index.get("patch_size", 1),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline in diffusers' layout."""
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        self.text_encoder.save_pretrained(folder)
        (folder / "scheduler").mkdir(exist_ok=True)
        scheduler = schedule.to_diffusers(self.schedule.config)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
        index = {
            "_class_name": type(self).__name__,
            "unet": ["diffusers", "UNet2DConditionModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "patch_size": self.patch_size,
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def to(self, device: torch.device | str) -> "TextToImage":
        self.unet.to(device)
        self.text_encoder.to(device)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        guidance_scale: float = 3.0,
        negative_prompt: str = "",
        sampler: str = "ddpm",
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = True,
    ) -> list[Image.Image]:
        """Draw `num_images` pictures of each prompt; those of the first prompt come first.

        Picture i of a prompt depends on the prompt and seed + i alone.

        guidance_scale: w; 1 asks for no more than the prompt says, more makes pictures clearer and more alike.
        negative_prompt: what to steer away from, instead of from the empty caption.
        steps: how many of the chain's timesteps to visit; None visits all.
        batch_size: how many pictures are in work at once.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._check(prompts, num_images, guidance_scale, negative_prompt, sampler, batch_size)
        timesteps = self.schedule.shorter_chain(steps)
        jobs = [(prompt, seed + i) for prompt in prompts for i in range(num_images)]
        batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        images: list[Image.Image] = []
        with tqdm(total=len(batches) * len(timesteps), desc="drawing", unit=" steps", disable=not progress) as bar:
            for batch in batches:
                denoiser = self._denoiser([prompt for prompt, _ in batch], negative_prompt, guidance_scale)
                x = self._chain(denoiser, timesteps, [seed for _, seed in batch], bar)
                images += _to_pillow(latents.decode(x, self.patch_size))
        return images

    def _check(
        self,
        prompts: list[str],
        num_images: int,
        guidance_scale: float,
        negative_prompt: str,
        sampler: str,
        batch_size: int,
    ) -> None:
        if not prompts:
            raise UserError('prompts: none given; expected at least one, for example "a digit seven"')
        if num_images < 1:
            raise UserError(f"num_images: {num_images} must be at least 1")
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} must be at least 1")
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise UserError(f"guidance_scale: {guidance_scale} must be a number from 0 on")
        if sampler not in SAMPLERS:
            raise UserError(
                f"sampler: {sampler!r} is unknown{did_you_mean(sampler, SAMPLERS)}; there is {', '.join(SAMPLERS)}"
            )
        for prompt in [*prompts, negative_prompt]:
            if cut := self.text_encoder.words_cut(prompt):
                logger.warning(
                    "the prompt is longer than the %d tokens that the text encoder reads; this part is cut: %r",
                    self.text_encoder.max_length,
                    cut,
                )

    def _denoiser(self, prompts: list[str], negative_prompt: str, guidance_scale: float) -> Denoiser:
        context = self.text_encoder(prompts)
        null_context = self.text_encoder([negative_prompt]).expand_as(context)
        return guided(self.unet, context, null_context, guidance_scale, project=self.unet.project_context)

    def _chain(self, denoiser: Denoiser, timesteps: list[int], seeds: list[int], bar: tqdm) -> Float[Tensor, "b c h w"]:
        device = self.unet.conv_in.weight.device
        # On the CPU whatever the device, so that a seed means the same picture everywhere.
        draws = [generator("sample", seed) for seed in seeds]

        def noise() -> Float[Tensor, "b c h w"]:
            return torch.stack([torch.randn(self.shape, generator=draw) for draw in draws]).to(device)

        x, config = noise(), self.schedule.config
        for step in ddpm(
            denoiser, self.schedule, x, timesteps, noise, variance=config.variance, clip_x_0=config.clip_x_0
        ):
            x = step.x
            bar.update()
        return x


def find_checkpoint(source: str | Path | None) -> Path:
    """Return the folder that holds `model_index.json`."""
    if source is None:
        return BUILT_IN_MODEL
    folder = Path(source)
    if (folder / INDEX_NAME).is_file():
        return folder
    if folder.is_dir():
        complete = checkpoints(folder)
        if not complete:
            raise UserError(f"{folder} holds no complete checkpoint: neither {INDEX_NAME} nor checkpoints/step-*")
        return complete[-1]
    if str(source).count("/") != 1 or folder.is_absolute() or str(source).startswith("."):
        raise UserError(f"there is no checkpoint {source}; expected a run folder, a checkpoint folder or a hub id")
    try:
        wanted = ["*.json", "*.safetensors", "*.txt"]
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=wanted))
    except (OSError, ValueError) as error:  # HfHubHTTPError and its kin are OSErrors
        raise UserError(
            f"there is no folder {source}, and as a hub id it cannot be fetched ({first_line(error)}); "
            "check the name and the network"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is no complete checkpoint: there is no {file.name}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is damaged or was cut short: {first_line(error)}") from error


def _to_pillow(images: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    arrays = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def draw_to_file(
    prompts: Sequence[str],
    *,
    checkpoint: str | None,
    num_images: int,
    guidance_scale: float,
    negative_prompt: str,
    sampler: str,
    steps: int | None,
    seed: int,
    output: str | None,
) -> None:
    """What sample.py does: draw, write one PNG with a row for each prompt, and print its path."""
    pipe = TextToImage.from_pretrained(checkpoint)
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        pipe.to(accelerator)
    path = output_path(output, prompts[0])
    try:
        images = pipe(
            prompts,
            num_images=num_images,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            sampler=sampler,
            steps=steps,
            seed=seed,
        )
        grid(images, columns=num_images).save(path)
    except BaseException:
        path.unlink()  # the name was claimed, but there is nothing to show under it
        raise
    print(path)
