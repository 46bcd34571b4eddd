"""The text-to-image pipeline: load a model, generate images from prompts, save it and upload it to the Hub."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from cond_diffusion.config.sampling import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, PER_PROMPT, Precision, SamplingOptions
from cond_diffusion.device import autocast, check_memory, choose_precision, free_memory, keep_memory
from cond_diffusion.diffusion.guidance import Edit, guided, threshold_dynamically
from cond_diffusion.diffusion.objective import Prediction, denoiser
from cond_diffusion.diffusion.samplers import Noise, Sampler, Step, build_sampler, sampling_timesteps
from cond_diffusion.errors import Interrupted, UserError, check_text, user_errors
from cond_diffusion.files import write_file, written_aside
from cond_diffusion.hub import upload
from cond_diffusion.images import PILLOW_MODES, ImageGrid, encode, fit, from_pillow, grid, normalize_image, to_pillow
from cond_diffusion.models.ema import weights_of_width
from cond_diffusion.models.latents import LatentSpace
from cond_diffusion.models.lora import add_lora_file
from cond_diffusion.models.text_encoder import TextEncoder, embed, find_phrases
from cond_diffusion.models.unet import UNet
from cond_diffusion.pipeline.checkpoint import (
    BUILT_IN_MODEL,
    GRID_NAME,
    Checkpoint,
    prompts_of_run,
    read_checkpoint,
    write_card,
    write_index,
)
from cond_diffusion.pipeline.run_folder import CHECKSUMS_NAME
from cond_diffusion.seeding import generator

DEFAULT_STRENGTH = 0.8
MAX_BATCH_SIZE = 64
# Memory per guided image, in feature maps of the first level's resolution and width; measured: 54 to 118.
FEATURE_MAPS_PER_IMAGE, MIN_FEATURE_MAPS = 120, 20
BYTES_PER_EXAMPLE = 1000  # of a generated image's Python objects
PROMPT_BATCH_SIZE = 256  # prompts whose embeddings, and those of their phrases, are in memory at once

Options = TypeVar("Options", bound=SamplingOptions)
StepCallback = Callable[[Step, int, int], None]
"""(step, index of the step from 0, number of steps); the step's `x` and `x_0_hat` are decoded to pixels."""

logger = logging.getLogger(__name__)


class SamplingInterrupted(KeyboardInterrupt):
    """Sampling was interrupted; `images` holds the images of the complete batches."""

    def __init__(self, images: ImageGrid) -> None:
        super().__init__(f"interrupted; {len(images)} images are complete")
        self.images = images


@dataclass(frozen=True)
class Job:
    """The validated arguments of a call."""

    prompts: list[str]
    options: SamplingOptions
    batch_size: int
    edit: Edit
    timesteps: list[int]
    sampler: Sampler


@dataclass(frozen=True)
class Example:
    """The inputs of one image to sample."""

    context: Float[Tensor, "l d"]
    null_context: Float[Tensor, "l d"]
    phrases: list[Float[Tensor, "l d"]]
    scale: float
    seed: int


class TextToImage:
    """Text-to-image pipeline: a text encoder, a UNet, its prediction type and noise schedule, and a latent space.

    Args:
        dtype: Precision of the UNet: "fp32", "bf16", "fp16", or "auto" for bf16 where the device is faster in it, and
            fp32 elsewhere. It applies to matrix products and convolutions; the weights and all the rest are fp32.
        guidance_scale: Default guidance scale of sampling.
        phrase_guidance: Default fraction of the guidance that comes from the phrases of a prompt.
        first_phrase_from: Default of the lowest timestep with guidance by the first of several phrases.
    """

    def __init__(
        self,
        unet: UNet,
        text_encoder: TextEncoder,
        prediction: Prediction,
        latent_space: LatentSpace,
        dtype: Precision = "auto",
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        phrase_guidance: float = 0.0,
        first_phrase_from: int = 0,
    ) -> None:
        if dtype not in get_args(Precision):
            raise UserError(f"dtype: {dtype!r}; expected {', '.join(get_args(Precision))}")
        in_channels, size = unet.conv_in.in_channels, unet.config.sample_size
        if size is None:
            raise UserError("UNet config: sample_size: None; it is required for sampling")
        if unet.config.context_dim != text_encoder.context_dim:
            raise UserError(
                f"UNet config: context_dim: {unet.config.context_dim} does not match the text encoder's "
                f"{text_encoder.context_dim}"
            )
        self.shape = (in_channels, size, size)
        self.channels = latent_space.pixel_channels(in_channels)
        if self.channels not in PILLOW_MODES:
            raise UserError(f"UNet config: in_channels: images have {self.channels} channels; expected 1 or 3")
        self.unet = unet
        self.text_encoder = text_encoder
        self.prediction = prediction
        self.schedule = prediction.schedule
        self.latent_space = latent_space
        self.dtype = dtype
        self.guidance: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "phrase_guidance": phrase_guidance,
            "first_phrase_from": first_phrase_from,
        }
        self.folder: Path | None = None  # of the checkpoint that the pipeline was loaded from
        self._warnings: set[str] = set()  # that were logged

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "builtin",
        *,
        ema_width: float | None = None,
        lora: str | Path | None = None,
        dtype: Precision = "auto",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "TextToImage":
        """Load the built-in model, the newest checkpoint of a run, a checkpoint folder, or a model from the Hub.

        Models from the Hub can be from this project or Stable Diffusion 1.x or 2.x.

        Args:
            source: "builtin", "emoji", a run folder, a checkpoint folder or a Hub id.
            ema_width: Width of the weight average, as a share of the training, instead of the checkpoint's; it is
                reconstructed from the run's snapshots (post-hoc EMA).
            lora: LoRA to add to the UNet's weights: a file, a folder or a Hub id.
            dtype: Precision of the UNet: "fp32", "bf16", "fp16", or "auto" for bf16 where the device is faster in it.
            revision: Revision of `source` if it is a Hub id.
            token: Hub token, as in huggingface_hub.
            cache_dir: Cache folder, as in huggingface_hub.
            local_files_only: Whether to use cached files only, as in huggingface_hub.

        Raises:
            UserError: If there is no checkpoint, or a file is missing, damaged or of an unsupported pipeline.
        """
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        read = partial(cls.from_checkpoint, ema_width=ema_width, dtype=dtype)
        pipe = read_checkpoint(source, read, revision=revision, **hub)
        if lora is not None:
            add_lora_file(pipe.unet, lora, **hub)
        return pipe

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, ema_width: float | None = None, dtype: Precision = "auto"
    ) -> "TextToImage":
        """Load all parts of an open checkpoint; raises UserError as `from_pretrained` does."""
        latent_space, unet = checkpoint.latent_space, checkpoint.unet
        if ema_width is not None:
            with user_errors(f"--ema-width: the snapshots do not fit {checkpoint.folder}", RuntimeError):
                unet = UNet.with_weights(unet.config, weights_of_width(checkpoint.folder, ema_width))
        pipe = cls(unet, checkpoint.text_encoder, checkpoint.prediction, latent_space, dtype, **checkpoint.guidance)
        pipe.folder = checkpoint.folder
        return pipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline in diffusers' layout. `StableDiffusionPipeline` can load it if it is in latent space."""
        if (Path(folder) / CHECKSUMS_NAME).exists():
            raise UserError(f"{folder} is a checkpoint of a training run; choose another folder")
        with written_aside(Path(folder)) as unfinished:
            self.unet.save_pretrained(unfinished / "unet")
            self.text_encoder.save_pretrained(unfinished)
            write_index(unfinished, self.latent_space, self.prediction, self.guidance)

    def push_to_hub(
        self, repo_id: str, *, prompts: str | Sequence[str] = (), private: bool = False, token: str | None = None
    ) -> str:
        """Upload the pipeline to the Hub with a model card and a grid of samples. Returns its URL.

        Args:
            repo_id: Hub id, owner/name.
            prompts: One prompt or several, one per row of the grid; by default those of the run's sample grids.
            private: Whether to create a private repository.
            token: Hub token; by default the stored one.

        Raises:
            UserError: If there are no prompts, or the upload fails.
        """
        shown = ([prompts] if isinstance(prompts, str) else [*prompts]) or prompts_of_run(self.folder)
        with TemporaryDirectory() as name:
            folder, steps = Path(name), min(20, self.schedule.num_timesteps)
            self.save_pretrained(folder)
            images = grid(self(shown, num_images=4, sampler="dpm_solver", steps=steps), 4, shown)
            write_file(folder / GRID_NAME, encode(images))
            model = (self.latent_space, self.image_size, self.prediction.kind)
            write_card(folder, repo_id, *model, shown, self.folder, split_phrases=self.text_encoder.split_phrases)
            return upload(folder, repo_id, private=private, token=token)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @cached_property
    def precision(self) -> str:
        """The precision that `dtype` selects on this device: "fp32", "bf16" or "fp16"."""
        return choose_precision(self.dtype, self.device, "dtype")

    @cached_property
    def background(self) -> str:
        """The color that transparent input images are composited on: that of training, or black if it is unknown."""
        return "black" if self.folder is None else Checkpoint(self.folder).background

    @property
    def image_size(self) -> int:
        """Width and height of the images in pixels."""
        return self.shape[1] * self.latent_space.downsample_factor

    def to(self, device: torch.device | str) -> "TextToImage":
        self.__dict__.pop("precision", None)  # it depends on the device
        self.unet.to(device)
        self.text_encoder.to(device)
        self.latent_space.to(device)
        return self

    def to_accelerator(self) -> "TextToImage":
        """Move to the accelerator if there is one; otherwise configure memory allocation for sampling on the CPU."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None:
            return self.to(accelerator)
        keep_memory()
        return self

    def compile(self, **options: Any) -> "TextToImage":
        """Compile the UNet on its first call; see `UNet.compile`. Attention maps need an uncompiled network."""
        self.unet.compile(**options)
        return self

    def __repr__(self) -> str:
        """Return a one-line summary of the model."""
        parameters = sum(parameter.numel() for parameter in self.unet.parameters()) / 1e6
        space = "latent" if self.latent_space.is_latent else "pixel"
        return (
            f"TextToImage: {self.image_size} x {self.image_size}, {PILLOW_MODES.get(self.channels, self.channels)}, "
            f"{space} space; {parameters:.1f} million parameters; {self.prediction.kind} prediction, "
            f"{self.schedule.num_timesteps} timesteps; prompts of up to {self.text_encoder.max_length} tokens; on "
            f"{self.device}; from {self.folder or 'code'}"
        )

    def max_batch_size(self, prompts: Sequence[str], options: SamplingOptions) -> int:
        """Return the largest batch size that fits into half of the free memory, at most `MAX_BATCH_SIZE`."""
        phrases = max((len(separate_phrases(prompt, options)) for prompt in prompts), default=0)
        per_image = FEATURE_MAPS_PER_IMAGE * (1 + phrases / 2) * self._feature_map_bytes
        return max(1, min(MAX_BATCH_SIZE, int(free_memory(self.device) / 2 // per_image)))

    def check_memory(self, count: int, key: str = "num_images") -> None:
        """Raise UserError, naming the option `key`, if `count` images do not fit into memory: as numbers, as PIL images
        and in a grid."""
        per_image = 6 * self.channels * self.image_size**2 + BYTES_PER_EXAMPLE
        what = f"{key}: {count} images of {self.image_size} x {self.image_size} pixels"
        check_memory(what, count * per_image)

    @property
    def _feature_map_bytes(self) -> int:
        """Size of a feature map of the first level, of one image."""
        return 4 * self.unet.config.channels[0] * self.shape[1] * self.shape[2]

    def clip_fn(self, dynamic_thresholding: float | None = None) -> Callable[[Tensor], Tensor]:
        """Return the function that limits x_0_hat to [-1, 1], by dynamic thresholding at a quantile of the pixels if
        that is given; the identity if the schedule does not clip x_0."""
        if dynamic_thresholding is not None:
            return partial(threshold_dynamically, share=dynamic_thresholding)
        return (lambda x_0_hat: x_0_hat.clamp(-1, 1)) if self.schedule.config.clip_x_0 else (lambda x_0_hat: x_0_hat)

    def completed(self, options: Options) -> Options:
        """Return the options with the model's number of steps and guidance where not given."""
        defaults = {"steps": min(DEFAULT_STEPS, self.schedule.num_timesteps), **self.guidance}
        return replace(options, **{name: value for name, value in defaults.items() if getattr(options, name) is None})

    @torch.no_grad()
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
        """Generate `num_images` images for each prompt, in the order of the prompts.

        Image i of a prompt depends only on the prompt and seed + i. Its noise is bit-identical for all batch sizes; the
        network's rounding differs slightly between them.

        Args:
            prompts: One prompt or several.
            image: Input image for editing, resized and cropped to the model's size.
            mask: Mask of the same size as `image`: white is generated, black is kept.
            batch_size: Number of images per batch; None uses as many as fit into memory, at most 64.
            output_type: "pil" for PIL images, "pt" for a tensor (n, c, h, w) in [-1, 1].
            progress: Whether to show a progress bar.
            callback_on_step_end: Called after each step of each batch.
            **options: The fields of `SamplingOptions` by name; None selects a field's default.

        Returns:
            A list of PIL images, or a tensor.

        Raises:
            UserError: If an option is invalid, or options do not go together.
            SamplingInterrupted: On Ctrl-C, with the images of the complete batches.
        """
        if output_type not in ("pil", "pt"):
            raise UserError(f"output_type: {output_type!r}; expected pil or pt")
        given = {name: value for name, value in options.items() if value is not None}
        job = self._resolve(prompts, self.completed(SamplingOptions(**given)), image, mask, batch_size)
        examples = self._encode(job)
        batches = -(-len(job.prompts) * job.options.num_images // job.batch_size)
        steps = len(job.timesteps) * job.options.resamplings
        done: list[Tensor] = []
        bar = tqdm(total=batches * steps, desc="sampling", unit=" steps", disable=not progress)
        with bar, autocast(self.precision, self.device):
            try:
                while batch := list(islice(examples, job.batch_size)):
                    noise = self._noise([example.seed for example in batch])
                    x = job.edit.begin(noise(), self.schedule, job.timesteps)
                    for number, step in enumerate(self._denoise(job, batch, x, noise)):
                        x = step.x
                        bar.update()
                        if callback_on_step_end is not None:
                            decode = self.latent_space.decode
                            shown = replace(step, x=decode(x), x_0_hat=decode(step.x_0_hat))
                            callback_on_step_end(shown, number, steps)
                    done.append(self.latent_space.decode(x).cpu())
            except Interrupted:  # raised by a training run that generates samples
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
        _, scales, negative_prompts = (options.per_prompt(name, len(prompts)) for name in PER_PROMPT)
        for prompt in [*prompts, *negative_prompts]:
            if not isinstance(prompt, str):
                raise UserError(f"prompts: {prompt!r:.80}; expected text")
            check_text(prompt, "prompts")
        count, batch_size = len(prompts) * options.num_images, batch_size or self.max_batch_size(prompts, options)
        self.check_memory(count)
        size, maps = min(count, batch_size), MIN_FEATURE_MAPS * self._feature_map_bytes
        check_memory(f"batch_size: {size} images of {self.image_size} x {self.image_size}", size * maps, self.device)
        total, interval = self.schedule.num_timesteps, options.guidance_interval
        if interval is not None and interval[0] >= total:
            raise UserError(f"guidance_interval: {interval[0]} to {interval[1]} lies beyond the {total} timesteps")
        if options.dynamic_thresholding is not None and self.latent_space.is_latent:
            raise UserError("dynamic_thresholding: applies only to pixel-space models; this model is in latent space")
        given = {"negative_prompt": any(negative_prompts), "guidance_interval": interval is not None}
        for name, is_given in {**given, "guidance_rescale": options.guidance_rescale > 0}.items():
            if is_given and all(scale == 1 for scale in scales):
                self._warn_once(f"{name}: has no effect on prompts with guidance_scale 1")
        edit = self._prepare_edit(options, image, mask)
        visited = sampling_timesteps(options.sampler, self.schedule, options.steps)
        return Job(
            prompts=prompts,
            options=options,
            batch_size=batch_size,
            edit=edit,
            timesteps=edit.timesteps(visited),
            sampler=edit.wrap_sampler(build_sampler(options, self.schedule.config, len(visited))),
        )

    def _prepare_edit(self, options: SamplingOptions, image: Image.Image | None, mask: Image.Image | None) -> Edit:
        """Encode the input image and mask; raise UserError for options that need another input."""
        for name, value in (("image", image), ("mask", mask)):
            if not isinstance(value, Image.Image | None):
                kind = type(value).__name__
                raise UserError(f"{name}: {kind}; expected a PIL image, as of Image.open or Image.fromarray")
        if image is None:
            for name, value in (("mask", mask), ("strength", options.strength)):
                if value is not None:
                    raise UserError(f"{name}: applies only with an input image; pass image too")
        if mask is None and options.resamplings != 1:
            raise UserError(f"resamplings: {options.resamplings} applies only with a mask; pass image and mask too")
        if image is None:
            return Edit()
        with user_errors("image or mask: cannot be used", ValueError, OSError):
            image = normalize_image(image, self.background if image.has_transparency_data else "black")
            mask = None if mask is None else normalize_image(mask)
        region, default = None, DEFAULT_STRENGTH
        if mask is not None:
            default = 1.0
            if mask.size != image.size:
                raise UserError(
                    f"mask: {mask.width} x {mask.height} pixels; expected the size of the image, "
                    f"{image.width} x {image.height}"
                )
            region = self.latent_space.encode_mask((self._preprocess(mask) + 1) / 2)
            if region.max() < 0.5:
                brightest = mask.convert("L").getextrema()[1]
                raise UserError(
                    f"mask: it selects nothing (brightest pixel: {brightest}); expected white, 255, to regenerate"
                )
        strength = default if options.strength is None else options.strength
        return Edit(self.latent_space.encode(self._preprocess(image)), region, strength, options.resamplings)

    def _encode(self, job: Job) -> Iterator[Example]:
        """Yield the inputs of each image, in the order of the prompts; prompts are embedded in batches when needed."""
        values = (job.options.per_prompt(name, len(job.prompts)) for name in PER_PROMPT)
        remaining = zip(job.prompts, *values, strict=True)
        while rows := list(islice(remaining, PROMPT_BATCH_SIZE)):
            prompts, _, _, negatives = map(list, zip(*rows, strict=True))
            contexts, null_contexts = self._embed(prompts), self._embed(list(dict.fromkeys(negatives)))
            phrases = self._embed_phrases(prompts, job.options)
            for prompt, seed, scale, negative in rows:
                for i in range(job.options.num_images):
                    yield Example(contexts[prompt], null_contexts[negative], phrases[prompt], scale, seed + i)

    def _embed(self, prompts: list[str]) -> dict[str, Float[Tensor, "l d"]]:
        """Return the text embedding of each prompt; log a warning for truncated prompts and for unknown words."""
        ids, truncated = self.text_encoder.tokenize(prompts)
        for part in filter(None, truncated):
            length = self.text_encoder.max_length
            self._warn_once(f"prompts: longer than the text encoder's {length} tokens; {part!r} is truncated")
        if unknown := self.text_encoder.unknown_words(prompts):
            message = f"prompts: words that the text encoder was not trained on: {', '.join(unknown[:10])}"
            if self.folder == BUILT_IN_MODEL:
                message += "; --checkpoint emoji was trained on 1,432 concepts, in color"
            self._warn_once(message)
        return dict(zip(prompts, self.text_encoder.embed(ids), strict=True))

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning("%s", message)

    def _embed_phrases(self, prompts: list[str], options: SamplingOptions) -> dict[str, list[Float[Tensor, "l d"]]]:
        """Return the text embeddings of the phrases of each prompt that guidance uses by themselves."""
        phrases = {prompt: separate_phrases(prompt, options) for prompt in prompts}
        unique = list(dict.fromkeys(phrase for each in phrases.values() for phrase in each))
        contexts = dict(zip(unique, embed(self.text_encoder, unique), strict=True)) if unique else {}
        return {prompt: [contexts[phrase] for phrase in each] for prompt, each in phrases.items()}

    def _denoise(self, job: Job, batch: list[Example], x: Float[Tensor, "b c h w"], noise: Noise) -> Iterator[Step]:
        """Yield the sampling steps of a batch, starting from x."""
        network = guided(
            self.unet,
            torch.stack([example.context for example in batch]),
            torch.stack([example.null_context for example in batch]),
            torch.tensor([example.scale for example in batch]),
            phrases=[example.phrases for example in batch],
            phrase_guidance=job.options.phrase_guidance or 0.0,
            first_phrase_from=job.options.first_phrase_from or 0,
            interval=job.options.guidance_interval,
            rescale=job.options.guidance_rescale,
            project=self.unet.project_context,
        )
        clip = self.clip_fn(job.options.dynamic_thresholding)
        denoise = denoiser(network, self.prediction, clip, job.edit.apply_mask)
        return job.sampler(denoise, self.schedule, x, job.timesteps, noise)

    def _to_pil(self, batches: list[Tensor], job: Job) -> ImageGrid:
        return ImageGrid((image for batch in batches for image in to_pillow(batch)), columns=job.options.num_images)

    def _preprocess(self, image: Image.Image) -> Float[Tensor, "1 c h w"]:
        return from_pillow(fit(image, (self.image_size, self.image_size), self.channels)).to(self.device)[None]

    def _noise(self, seeds: list[int]) -> Noise:
        """Return the noise source of one batch, with a random generator per image."""
        # Always on the CPU, so that a seed gives the same image on every device.
        generators = [generator("sample", seed) for seed in seeds]
        return lambda: torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(self.device)


def separate_phrases(prompt: str, options: SamplingOptions) -> list[str]:
    """Return the phrases of a prompt that guidance uses by themselves: none of a prompt with a single one."""
    phrases = [phrase.strip() for _, phrase in find_phrases(prompt)] if options.phrase_guidance else []
    return phrases if len(phrases) > 1 else []


def _signature() -> inspect.Signature:
    """Return the signature of `TextToImage.__call__` with the sampling options in place of **options."""
    own, declared = inspect.signature(TextToImage.__call__), inspect.signature(SamplingOptions).parameters.values()
    *first, _ = own.parameters.values()
    return own.replace(parameters=[*first, *(option.replace(kind=option.KEYWORD_ONLY) for option in declared)])


TextToImage.__call__.__signature__ = _signature()  # shown by help() and editors  # type: ignore[attr-defined]
