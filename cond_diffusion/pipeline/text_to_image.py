"""Text to image: everything that turns a prompt into a picture, as one object that loads, saves and is called."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from psutil import virtual_memory
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.sampling import SamplingOptions
from cond_diffusion.device import keep_memory
from cond_diffusion.diffusion.guidance import Edit, guided, threshold_dynamically
from cond_diffusion.diffusion.objective import Prediction, denoiser
from cond_diffusion.diffusion.samplers import Noise, Sampler, Step, build_sampler, sampling_timesteps
from cond_diffusion.errors import Interrupted, UserError
from cond_diffusion.hub import upload
from cond_diffusion.images import PILLOW_MODES, Pictures, fit, from_pillow, grid, normalize_image, to_pillow
from cond_diffusion.models.ema import weights_of_width
from cond_diffusion.models.latents import LatentSpace
from cond_diffusion.models.lora import add_lora_file
from cond_diffusion.models.text_encoder import TextEncoder
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.checkpoint import (
    GRID_NAME,
    Checkpoint,
    prompts_of_run,
    read_checkpoint,
    write_card,
    write_index,
    write_prediction,
)
from cond_diffusion.seeding import generator

DEFAULT_STRENGTH = 0.8
MOST_AT_ONCE = 64
MAPS_AT_ONCE = 120  # of the first level's size and width, that a guided picture takes; 54 to 118 were measured

StepCallback = Callable[[Step, int, int], None]
"""(step, its number from 0, how many there are), the pictures in pixels."""

logger = logging.getLogger(__name__)


class SamplingInterrupted(KeyboardInterrupt):
    """Sampling was interrupted; `images` are those of the batches that were complete."""

    def __init__(self, images: Pictures) -> None:
        super().__init__(f"interrupted, with {len(images)} images complete")
        self.images = images


@dataclass(frozen=True)
class Job:
    """What a call of `TextToImage` was resolved to.

    scales, seeds, negative_prompts: one for each prompt.
    """

    prompts: list[str]
    options: SamplingOptions
    scales: list[float]
    seeds: list[int]
    negative_prompts: list[str]
    batch_size: int
    edit: Edit
    timesteps: list[int]
    sampler: Sampler


@dataclass(frozen=True)
class Example:
    """One image to be sampled."""

    context: Float[Tensor, "l d"]
    null_context: Float[Tensor, "l d"]
    scale: float
    seed: int


class TextToImage:
    """A text encoder, a UNet, and what its output means under a noise schedule: prompts in, PIL images out."""

    def __init__(
        self, unet: UNet, text_encoder: TextEncoder, prediction: Prediction, latent_space: LatentSpace
    ) -> None:
        if unet.config.in_channels is None or unet.config.sample_size is None:
            raise UserError("UNet config: sample_size is not given; expected the side of the pictures that it draws")
        if unet.config.context_dim != text_encoder.context_dim:
            raise UserError(
                f"the UNet reads contexts of width {unet.config.context_dim}, and the text encoder's have "
                f"{text_encoder.context_dim}"
            )
        self.shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.channels = latent_space.pixel_channels(unet.config.in_channels)
        self.unet = unet
        self.text_encoder = text_encoder
        self.prediction = prediction
        self.schedule = prediction.schedule
        self.latent_space = latent_space
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
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        pipe = read_checkpoint(source, partial(cls.from_checkpoint, ema_width=ema_width), revision=revision, **hub)
        if lora is not None:
            add_lora_file(pipe.unet, lora, **hub)
        return pipe

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, ema_width: float | None = None) -> "TextToImage":
        """Load all parts of a checkpoint that was opened; UserError as in `from_pretrained`."""
        latent_space, unet = checkpoint.latent_space, checkpoint.unet
        if ema_width is not None:
            unet = UNet.with_weights(unet.config, weights_of_width(checkpoint.folder, ema_width))
        pipe = cls(unet, checkpoint.text_encoder, checkpoint.prediction, latent_space)
        pipe.folder = checkpoint.folder
        return pipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline in diffusers' layout; in latent space its `StableDiffusionPipeline` opens that."""
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        self.text_encoder.save_pretrained(folder)
        write_prediction(folder, self.prediction)
        write_index(folder, self.latent_space)

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
            write_card(folder, repo_id, self.latent_space, self.image_size, self.prediction.kind, shown, self.folder)
            return upload(folder, repo_id, private=private, token=token)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def image_size(self) -> int:
        """Of the pictures, in pixels."""
        return self.shape[1] * self.latent_space.downsample_factor

    def to(self, device: torch.device | str) -> "TextToImage":
        self.unet.to(device)
        self.text_encoder.to(device)
        self.latent_space.to(device)
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
        where = "latents" if self.latent_space.is_latent else "pixels"
        return (
            f"TextToImage: {self.image_size} x {self.image_size}, {PILLOW_MODES.get(self.channels, self.channels)}, "
            f"diffusion of {where}; {parameters:.1f} million parameters predict {self.prediction.kind} at "
            f"{self.schedule.num_timesteps} timesteps; prompts of up to {self.text_encoder.max_length} tokens; on "
            f"{self.device}; from {self.folder or 'code'}"
        )

    def max_batch_size(self) -> int:
        """Return how many pictures can be in work at once in the memory that is free, at most `MOST_AT_ONCE`."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else virtual_memory().available
        values = MAPS_AT_ONCE * self.unet.config.channels[0] * self.shape[1] * self.shape[2]
        return max(1, min(MOST_AT_ONCE, int(free / 2 // (4 * values))))

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        batch_size: int | None = None,
        output_type: Literal["pil", "pt"] = "pil",
        progress: bool = True,
        callback_on_step_end: StepCallback | None = None,
        **options: Any,
    ) -> Any:
        """Sample `num_images` images of each prompt; those of the first prompt come first.

        Image i of a prompt depends on the prompt and seed + i alone, up to the network's rounding, which differs a
        little from one batch size to another; its noise is the same bit for bit.

        Args:
            prompts: One text or several.
            image: An image to begin with, resized and cropped to the model's.
            mask: Of the size of `image`: what is white is generated anew, what is black stays.
            batch_size: Images in one batch; None is as many as fit into the memory, at most 64.
            output_type: "pil" for PIL images, "pt" for a tensor (n, c, h, w) in [-1, 1].
            progress: Whether to show a progress bar.
            watch: Called after each step of each batch.
            **options: The fields of `SamplingOptions` by name; None is a field's default.

        Raises:
            UserError: For options that are not allowed, or do not go together.
            SamplingInterrupted: On Ctrl-C, with the images of the complete batches.
        """
        given = {name: value for name, value in options.items() if value is not None}
        job = self._resolve(prompts, SamplingOptions(**given), image, mask, batch_size)
        examples = self._encode(job)
        batches = [examples[i : i + job.batch_size] for i in range(0, len(examples), job.batch_size)]
        steps = len(job.timesteps) * job.options.resamplings
        done: list[Tensor] = []
        with tqdm(total=len(batches) * steps, desc="sampling", unit=" steps", disable=not progress) as bar:
            try:
                for batch in batches:
                    noise = self._noise([example.seed for example in batch])
                    x = job.edit.begin(noise(), self.schedule, job.timesteps)
                    for number, step in enumerate(self._denoise(job, batch, x, noise)):
                        x = step.x
                        bar.update()
                        if callback_on_step_end is not None:
                            shown = {
                                "x": self.latent_space.decode(x),
                                "x_0_hat": self.latent_space.decode(step.x_0_hat),
                            }
                            callback_on_step_end(replace(step, **shown), number, steps)
                    done.append(self.latent_space.decode(x))
            except Interrupted:  # of a run that samples while it trains
                raise
            except KeyboardInterrupt as interruption:
                raise SamplingInterrupted(self._to_pil(done, job)) from interruption
        return torch.cat(done) if output_type == "pt" else self._to_pil(done, job)

    def _resolve(
        self,
        prompts: str | Sequence[str],
        options: SamplingOptions,
        image: Image.Image | None,
        mask: Image.Image | None,
        batch_size: int | None,
    ) -> Job:
        """Check the arguments against each other and against the model."""
        prompts = [prompts] if isinstance(prompts, str) else [*prompts]
        if not prompts:
            raise UserError('prompts: none given; expected at least one, for example "a digit seven"')
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size: {batch_size}; expected at least 1")
        negative_prompts = options.per_prompt("negative_prompt", len(prompts))
        for prompt in [*prompts, *negative_prompts]:
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise UserError(f"prompts: {prompt!r} is not valid text; expected UTF-8")
        total, interval = self.schedule.num_timesteps, options.guidance_interval
        if interval is not None and interval[0] >= total:
            raise UserError(f"guidance_interval: {interval[0]} to {interval[1]} lies beyond the {total} timesteps")
        if options.dynamic_thresholding is not None and self.latent_space.is_latent:
            raise UserError("dynamic_thresholding: applies only to models of pixels, and this one samples latents")
        edit = self._prepare_edit(options, image, mask)
        visited = sampling_timesteps(options.sampler, self.schedule, options.steps)
        return Job(
            prompts=prompts,
            options=options,
            scales=options.per_prompt("guidance_scale", len(prompts)),
            seeds=options.per_prompt("seed", len(prompts)),
            negative_prompts=negative_prompts,
            batch_size=batch_size or self.max_batch_size(),
            edit=edit,
            timesteps=edit.timesteps(visited),
            sampler=edit.wrap_sampler(build_sampler(options, self.schedule.config, len(visited))),
        )

    def _prepare_edit(self, options: SamplingOptions, image: Image.Image | None, mask: Image.Image | None) -> Edit:
        """Return what sampling begins with and what stays; UserError for options that need another input."""
        if image is None:
            for name, value in (("mask", mask), ("strength", options.strength)):
                if value is not None:
                    raise UserError(f"{name}: applies only to an image to begin with; pass image, too")
        if mask is None and options.resamplings != 1:
            raise UserError(f"resamplings: {options.resamplings} applies only to a mask; pass image and mask, too")
        if image is None:
            return Edit()
        image, mask = normalize_image(image), None if mask is None else normalize_image(mask)
        strength = DEFAULT_STRENGTH if options.strength is None else options.strength
        if mask is None:
            return Edit(self.latent_space.encode(self._fitted(image)), None, strength)
        if mask.size != image.size:
            (width, height), (wide, high) = mask.size, image.size
            raise UserError(f"mask: {width} x {height} pixels do not fit the image's {wide} x {high}")
        region = self.latent_space.encode_mask((self._fitted(mask) + 1) / 2)
        strength = 1.0 if options.strength is None else strength
        return Edit(self.latent_space.encode(self._fitted(image)), region, strength, options.resamplings)

    def _encode(self, job: Job) -> list[Example]:
        """Embed each prompt once, and list the images: all of the first prompt first."""
        negatives = list(dict.fromkeys(job.negative_prompts))
        contexts, null_contexts = self._embed(job.prompts), self._embed(negatives)
        rows = zip(job.prompts, job.negative_prompts, job.scales, job.seeds, strict=True)
        return [
            Example(contexts[prompt], null_contexts[negative], scale, seed + i)
            for prompt, negative, scale, seed in rows
            for i in range(job.options.num_images)
        ]

    def _embed(self, prompts: list[str]) -> dict[str, Float[Tensor, "l d"]]:
        """Return each prompt's text embedding; warn of prompts that are cut."""
        ids, cut = self.text_encoder.tokenize(prompts)
        for rest in filter(None, cut):
            length = self.text_encoder.max_length
            logger.warning("the prompt is longer than the text encoder's %d tokens; this part is cut: %r", length, rest)
        return dict(zip(prompts, self.text_encoder.embed(ids), strict=True))

    def _denoise(self, job: Job, batch: list[Example], x: Float[Tensor, "b c h w"], noise: Noise) -> Iterator[Step]:
        """Yield the steps of a batch from x on."""
        network = guided(
            self.unet,
            torch.stack([example.context for example in batch]),
            torch.stack([example.null_context for example in batch]),
            torch.tensor([example.scale for example in batch]),
            interval=job.options.guidance_interval,
            rescale=job.options.guidance_rescale,
            project=self.unet.project_context,
        )
        clip = self.clip_fn(job.options.dynamic_thresholding)
        denoise = denoiser(network, self.prediction, clip, job.edit.apply_mask)
        return job.sampler(denoise, self.schedule, x, job.timesteps, noise)

    def _to_pil(self, batches: list[Tensor], job: Job) -> Pictures:
        return Pictures((image for batch in batches for image in to_pillow(batch)), columns=job.options.num_images)

    def _fitted(self, picture: Image.Image) -> Float[Tensor, "1 c h w"]:
        return from_pillow(fit(picture, (self.image_size, self.image_size), self.channels)).to(self.device)[None]

    def clip_fn(self, dynamic_thresholding: float | None = None) -> Callable[[Tensor], Tensor]:
        """Return what keeps x_0_hat in [-1, 1], the range of pixels; the identity where the schedule does not clip."""
        if dynamic_thresholding is not None:
            return partial(threshold_dynamically, share=dynamic_thresholding)
        return (lambda x_0_hat: x_0_hat.clamp(-1, 1)) if self.schedule.config.clip_x_0 else (lambda x_0_hat: x_0_hat)

    def _noise(self, seeds: list[int]) -> Noise:
        """Return the noise of one batch, each image's out of a stream of its own."""
        # On the CPU whatever the device, so that a seed means the same image everywhere.
        draws = [generator("sample", seed) for seed in seeds]
        return lambda: torch.stack([torch.randn(self.shape, generator=draw) for draw in draws]).to(self.device)


def _signature() -> inspect.Signature:
    """Return the signature of `TextToImage.__call__` with the sampling options in place of **options."""
    own = inspect.signature(TextToImage.__call__)
    defaults = SamplingOptions()
    declared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, field.name), annotation=field.type
        )
        for field in fields(SamplingOptions)
    ]
    *first, _ = own.parameters.values()
    return own.replace(parameters=[*first, *declared])


TextToImage.__call__.__signature__ = _signature()  # what help() and editors show  # type: ignore[attr-defined]
