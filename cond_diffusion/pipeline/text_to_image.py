"""Text to image: everything that turns a prompt into a picture, as one object that loads, saves and is called."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from psutil import virtual_memory
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.device import keep_memory
from cond_diffusion.diffusion.editing import edit_of
from cond_diffusion.diffusion.guidance import GuidanceConfig, guided, scale_of_each, threshold_dynamically
from cond_diffusion.diffusion.prediction import Prediction, denoiser
from cond_diffusion.diffusion.sampler_config import SamplerConfig
from cond_diffusion.diffusion.samplers import Noise, Step
from cond_diffusion.errors import Interrupted, UserError
from cond_diffusion.hub import upload
from cond_diffusion.images import PILLOW_MODES, Pictures, fit, from_pillow, grid, to_pillow
from cond_diffusion.models.latents import VAE, LatentSpace
from cond_diffusion.models.lora import add_lora_file
from cond_diffusion.models.posthoc_ema import weights_of_width
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.model_card import GRID_NAME, prompts_of_run, write_card
from cond_diffusion.pipeline.pretrained import (
    read_checkpoint,
    read_latent_space,
    read_prediction,
    write_index,
    write_prediction,
)
from cond_diffusion.seeding import generator

MOST_AT_ONCE = 64
MAPS_AT_ONCE = 120  # of the first level's size and width, that a guided picture takes; 54 to 118 were measured

Watch = Callable[[Step, int, int], None]
"""(step, its number from 0, how many there are), the pictures in pixels."""

logger = logging.getLogger(__name__)


class PartlyDrawn(KeyboardInterrupt):
    """An interruption of drawing; `images` are those of the batches that were done."""

    def __init__(self, images: Pictures) -> None:
        super().__init__(f"interrupted, with {len(images)} pictures drawn")
        self.images = images


@contextmanager
def _carrying(images: Pictures) -> Iterator[None]:
    """Let an interruption carry the pictures that are done."""
    try:
        yield
    except Interrupted:  # of a run that draws while it trains
        raise
    except KeyboardInterrupt as interruption:
        raise PartlyDrawn(images) from interruption


class TextToImage:
    """A text encoder, a UNet, and what its output means under a noise schedule: prompts in, PIL images out."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder, prediction: Prediction, space: LatentSpace) -> None:
        if unet.config.in_channels is None or unet.config.sample_size is None:
            raise UserError("UNet config: sample_size is not given; expected the side of the pictures that it draws")
        if unet.config.context_dim != text_encoder.context_dim:
            raise UserError(
                f"the UNet reads contexts of width {unet.config.context_dim}, and the text encoder's have "
                f"{text_encoder.context_dim}"
            )
        self.shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.channels = space.pixel_channels(unet.config.in_channels)
        self.unet = unet
        self.text_encoder = text_encoder
        self.prediction = prediction
        self.schedule = prediction.schedule
        self.space = space
        self.folder: Path | None = None  # the checkpoint that it was loaded from

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "builtin",
        *,
        ema_width: float | None = None,
        lora: str | Path | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "TextToImage":
        """Load the built-in model, a run's newest checkpoint, a checkpoint folder, or a hub id: ours, or Stable
        Diffusion 1.x or 2.x.

        ema_width: average the weights over another share of the training than the checkpoint does, as far as the run's
            snapshots reach up to it.
        lora: what is added to the network's weights: a file, a folder with it, or a hub id.
        revision: of `source` where it is a hub id. token, cache_dir, local_files_only: of hub ids, as huggingface_hub
            has them.

        Raises UserError where there is none, or where a file of it is missing, damaged or for another kind of pipeline.
        """
        options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}

        def read(folder: Path) -> TextToImage:
            space = read_latent_space(folder)
            unet = UNet.from_pretrained(folder / "unet")
            if ema_width is not None:
                unet = UNet.with_weights(unet.config, weights_of_width(folder, ema_width))
            pipe = cls(unet, TextEncoder.from_pretrained(folder, max_length=None), read_prediction(folder), space)
            pipe.folder = folder
            return pipe

        pipe = read_checkpoint(source, read, revision=revision, **options)
        if lora is not None:
            add_lora_file(pipe.unet, lora, **options)
        return pipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline in diffusers' layout; in latent space its `StableDiffusionPipeline` opens that."""
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        self.text_encoder.save_pretrained(folder)
        write_prediction(folder, self.prediction)
        write_index(folder, self.space)

    def push_to_hub(
        self, repo_id: str, *, prompts: str | Sequence[str] = (), private: bool = False, token: str | None = None
    ) -> str:
        """Put the pipeline on the hub, with a card and a grid of samples; return its address.

        prompts: what the grid shows, a row each; if not given, those that the run drew while it trained.

        Raises UserError where there are none, or where the hub does not take it.
        """
        shown = ([prompts] if isinstance(prompts, str) else [*prompts]) or prompts_of_run(self.folder)
        with TemporaryDirectory() as name:
            folder, steps = Path(name), min(20, self.schedule.num_timesteps)
            self.save_pretrained(folder)
            grid(self(shown, num_images=4, sampler="dpm_solver", steps=steps), 4, shown).save(folder / GRID_NAME)
            write_card(folder, repo_id, self.space, self.side, self.prediction.kind, shown, self.folder)
            return upload(folder, repo_id, private=private, token=token)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return self.shape[1] * self.space.downscaling

    def to(self, device: torch.device | str) -> "TextToImage":
        self.unet.to(device)
        self.text_encoder.to(device)
        self.space.to(device)
        return self

    def to_accelerator(self) -> "TextToImage":
        """Move to the accelerator, where the machine has one; where it has none, be ready to draw on the CPU."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None:
            return self.to(accelerator)
        keep_memory()
        return self

    def __repr__(self) -> str:
        """Say what it is, where a notebook or a prompt shows it."""
        parameters = sum(parameter.numel() for parameter in self.unet.parameters()) / 1e6
        where = "latents" if isinstance(self.space, VAE) else "pixels"
        return (
            f"TextToImage: {self.side} x {self.side}, {PILLOW_MODES.get(self.channels, self.channels)}, diffusion of "
            f"{where}; {parameters:.1f} million parameters predict {self.prediction.kind} at "
            f"{self.schedule.num_timesteps} timesteps; prompts of up to {self.text_encoder.max_length} tokens; on "
            f"{self.device}; from {self.folder or 'code'}"
        )

    def fitting_batch_size(self) -> int:
        """Return how many pictures can be in work at once in the memory that is free, at most `MOST_AT_ONCE`."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else virtual_memory().available
        values = MAPS_AT_ONCE * self.unet.config.channels[0] * self.shape[1] * self.shape[2]
        return max(1, min(MOST_AT_ONCE, int(free / 2 // (4 * values))))

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        guidance_scale: float | Sequence[float] = 3.0,
        negative_prompt: str = "",
        guidance_interval: Sequence[int] | None = None,
        guidance_rescale: float = 0.0,
        dynamic_thresholding: float | None = None,
        sampler: str = "ddpm",
        steps: int | None = None,
        variance: str | None = None,
        eta: float | None = None,
        order: int | None = None,
        image: Image.Image | None = None,
        strength: float | None = None,
        mask: Image.Image | None = None,
        resamplings: int = 1,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        progress: bool = True,
        watch: Watch | None = None,
    ) -> Pictures:
        """Draw `num_images` pictures of each prompt; those of the first prompt come first.

        Picture i of a prompt depends on the prompt and seed + i alone, up to the network's rounding, which differs a
        little from one batch size to another; its noise is the same bit for bit.

        guidance_scale: w, one for all prompts or one for each; 1 asks for no more than the prompt says, more makes
            pictures clearer and more alike.
        negative_prompt: what to steer away from, instead of from the empty caption.
        guidance_interval, guidance_rescale, dynamic_thresholding: see `GuidanceConfig`.
        sampler, variance, eta, order: see `SamplerConfig`.
        steps: how many of the chain's timesteps to visit; None visits all.
        image: a picture to begin with, resized and cropped to the model's. strength, 0 to 1, is how much of the chain
            it goes through, at least a step unless it is 0: 0.8, or all of it (1) where there is a mask.
        mask: of the size of `image`: what is white is drawn anew, what is black stays.
        resamplings: how often inpainting goes through every ten steps, so that the new fits the old better.
        seed: of each prompt's first picture, one for all prompts or one for each.
        batch_size: how many pictures are in work at once; None is as many as fit into the memory, at most 64.
        watch: called after each step of each batch.

        Raises UserError for options that cannot be, and PartlyDrawn on Ctrl-C.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._check(prompts, num_images, negative_prompt, batch_size)
        scales = scale_of_each(guidance_scale, len(prompts))
        guidance = GuidanceConfig(guidance_interval, guidance_rescale, dynamic_thresholding)
        if guidance.interval is not None and guidance.interval[0] >= self.schedule.num_timesteps:
            raise UserError(
                f"guidance_interval: {guidance.interval[0]} to {guidance.interval[1]} lies beyond the "
                f"{self.schedule.num_timesteps} timesteps of the chain"
            )
        choice = SamplerConfig(sampler, variance, eta, order)
        edit = edit_of(image, mask, strength, resamplings, self._fitted, self.space)
        chain = choice.timesteps(self.schedule, steps)
        timesteps = edit.timesteps(chain)
        run = edit.around(choice.sampler(self.schedule.config, len(chain)))

        context = dict(zip(prompts, self.text_encoder(prompts), strict=True))
        null_context = self.text_encoder([negative_prompt])
        seeds = [seed] * len(prompts) if isinstance(seed, int) else [*seed]
        if len(seeds) != len(prompts):
            raise UserError(f"seed: {len(seeds)} values for {len(prompts)} prompts; expected one, or one for each")
        each = zip(prompts, scales, seeds, strict=True)
        jobs = [(context[prompt], scale, first + i) for prompt, scale, first in each for i in range(num_images)]
        batch_size = batch_size or self.fitting_batch_size()
        batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
        total = len(timesteps) * resamplings
        images = Pictures(columns=num_images)
        bar = tqdm(total=len(batches) * total, desc="drawing", unit=" steps", disable=not progress)
        with bar, _carrying(images):
            for batch in batches:
                contexts = torch.stack([context for context, _, _ in batch])
                weights = torch.tensor([w for _, w, _ in batch])
                network = guided(
                    self.unet,
                    contexts,
                    null_context.expand_as(contexts),
                    weights,
                    guidance,
                    project=self.unet.project_context,
                )
                denoise = denoiser(network, self.prediction, self.range_of_pixels(guidance), edit.keep)
                noise = self._noise([seed for _, _, seed in batch])
                x = edit.begin(noise(), self.schedule, timesteps)
                for number, step in enumerate(run(denoise, self.schedule, x, timesteps, noise)):
                    x = step.x
                    bar.update()
                    if watch is not None:
                        watch(replace(step, x=self._to_pixels(x), x_0_hat=self._to_pixels(step.x_0_hat)), number, total)
                images += to_pillow(self._to_pixels(x))
        return images

    def _check(self, prompts: list[str], num_images: int, negative_prompt: str, batch_size: int | None) -> None:
        if not prompts:
            raise UserError('prompts: none given; expected at least one, for example "a digit seven"')
        if num_images < 1:
            raise UserError(f"num_images: {num_images} must be at least 1")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size: {batch_size} must be at least 1")
        for prompt in [*prompts, negative_prompt]:
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise UserError(f"prompts: {prompt!r} is not valid text; expected UTF-8")
            if cut := self.text_encoder.words_cut(prompt):
                logger.warning(
                    "the prompt is longer than the %d tokens that the text encoder reads; this part is cut: %r",
                    self.text_encoder.max_length,
                    cut,
                )

    def _fitted(self, picture: Image.Image) -> Float[Tensor, "1 c h w"]:
        return from_pillow(fit(picture, (self.side, self.side), self.channels)).to(self.device)[None]

    def range_of_pixels(self, guidance: GuidanceConfig) -> Callable[[Tensor], Tensor]:
        """Return what keeps x_0_hat in [-1, 1], the range of pixels."""
        if guidance.dynamic_thresholding is not None and isinstance(self.space, VAE):
            raise UserError("dynamic_thresholding: is about the range of pixels, and this model draws latents")
        if guidance.dynamic_thresholding is not None:
            return partial(threshold_dynamically, share=guidance.dynamic_thresholding)
        return (lambda x_0_hat: x_0_hat.clamp(-1, 1)) if self.schedule.config.clip_x_0 else (lambda x_0_hat: x_0_hat)

    def _noise(self, seeds: list[int]) -> Noise:
        """Return the noise of one batch, each picture's out of a stream of its own."""
        # On the CPU whatever the device, so that a seed means the same picture everywhere.
        draws = [generator("sample", seed) for seed in seeds]
        return lambda: torch.stack([torch.randn(self.shape, generator=draw) for draw in draws]).to(self.device)

    def _to_pixels(self, x: Float[Tensor, "b c_pp h_p w_p"]) -> Float[Tensor, "b c h w"]:
        return self.space.decode(x)
