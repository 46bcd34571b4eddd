"""From settings to files: one PNG with a row for each prompt, or a folder with a PNG of each image."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from signal import SIGINT
from typing import Any

from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from cond_diffusion import __version__
from cond_diffusion.config.sampling import GenerationSettings, SamplingOptions
from cond_diffusion.errors import Interrupted, UserError, first_line
from cond_diffusion.images import grid, open_image, opened_image
from cond_diffusion.pipeline.text_to_image import SamplingInterrupted, StepCallback, TextToImage
from cond_diffusion.pipeline.visualize import AttentionMaps, Film, maps_of_words, sheet

CHUNK_PREFIX = "cond_diffusion:"


def save_png(image: Image.Image, path: Path, settings: GenerationSettings) -> None:
    """Write a PNG with its settings in text chunks, one for each that is not None, and the version."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in {**to_flat(settings), "version": __version__}.items():
        chunks.add_itxt(CHUNK_PREFIX + name, json.dumps(value, ensure_ascii=False))
    image.save(path, "PNG", pnginfo=chunks)


def read_settings(path: str, option: str) -> dict[str, Any]:
    """Return what `save_png` wrote into the text chunks, by name; UserError, naming the option, where nothing did."""
    with opened_image(path, option) as image:
        chunks = getattr(image, "text", {})
    ours = {name.removeprefix(CHUNK_PREFIX): text for name, text in chunks.items() if name.startswith(CHUNK_PREFIX)}
    if not ours:
        raise UserError(f"{option}: {path} does not say how it was made; expected a PNG that was made here")
    found: dict[str, Any] = {}
    for name, text in ours.items():
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{option}: the settings in {path} are damaged: {name}: {first_line(error)}") from error
    version = found.pop("version", None)
    if version != __version__:
        logger.warning("%s was made by version %s; version %s may give another image", path, version, __version__)
    if unknown := found.keys() - {*names_of(GenerationSettings), *names_of(SamplingOptions)}:
        raise UserError(f"{option}: {path} has a setting that is not known here: {min(unknown)!r:.60}")
    return found


def names_of(schema: Any) -> list[str]:
    """Return the names of a dataclass's fields, but for the group of sampling options."""
    return [field.name for field in fields(schema) if field.name != "sampling"]


def to_flat(settings: GenerationSettings) -> dict[str, Any]:
    """Return the settings that are not None by name, those of sampling among them."""
    named = asdict(settings)
    sampling = named.pop("sampling")
    return {name: value for name, value in {**named, **sampling}.items() if value is not None}


def from_flat(named: dict[str, Any]) -> GenerationSettings:
    """Invert `to_flat`; raise UserError for a value that is not allowed. Values may be text, as typed."""
    sampling = {name: named[name] for name in names_of(SamplingOptions) if name in named}
    others = {name: named[name] for name in names_of(GenerationSettings) if name in named}
    return GenerationSettings(**others, sampling=SamplingOptions(**sampling))


def name_of(prompt: str) -> str:
    """Return a file's name made of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"


@contextmanager
def reserve_path(wanted: str | None, prompt: str, option: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Reserve a path to write to, `wanted` or a free name made of the prompt; remove the file on an error.

    Raises UserError, before any work is done, if the path exists already or could not be written.
    """
    if wanted is None:
        name, number = name_of(prompt), 1
        path = Path(f"{name}{suffixes[0]}")
        while path.exists():
            number += 1
            path = Path(f"{name}-{number}{suffixes[0]}")
    else:
        path = Path(wanted)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option}: {path} must end in {' or '.join(suffixes)}")
    try:
        path.open("xb").close()  # reserves the name, and shows that it can be written
    except FileExistsError as error:
        raise UserError(f"{option}: {path} exists already and is not overwritten; give another name") from error
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from error
    try:
        yield path
    except BaseException:
        path.unlink()  # the name was reserved, but nothing was written
        raise


logger = logging.getLogger(__name__)


def load_pipeline(settings: GenerationSettings) -> tuple[TextToImage, GenerationSettings]:
    """Return the pipeline on the accelerator, and the settings as a PNG remembers them: with the checkpoint of a run
    that is the newest now, and with the number of steps.
    """
    pipe = TextToImage.from_pretrained(settings.checkpoint, ema_width=settings.ema_width, lora=settings.lora)
    sampling = replace(settings.sampling, steps=settings.sampling.steps or pipe.schedule.num_timesteps)
    checkpoint = str(pipe.folder) if Path(settings.checkpoint).is_dir() else settings.checkpoint
    return pipe.to_accelerator(), replace(settings, sampling=sampling, checkpoint=checkpoint)


def generate_to_file(
    settings: GenerationSettings,
    *,
    output: str | None = None,
    film: str | None = None,
    attention_maps: str | None = None,
    labels: bool = True,
    batch_size: int | None = None,
    callback_on_step_end: StepCallback | None = None,
) -> Iterator[Path]:
    """Sample, write one PNG with a row for each prompt, and yield its path; then what else was asked for beside it.

    The PNG remembers the settings. On Ctrl-C, Interrupted is raised and the PNG has the images that are complete.

    Args:
        settings: What to sample, and with which checkpoint.
        output: Path of the PNG; None is a free name made of the prompt.
        film: Path of an animation of the sampling, .gif or .webp.
        attention_maps: Path of a PNG with the cross-attention maps.
        labels: Whether the prompts stand beside the rows where there are several.
        batch_size: Images in one batch; None is as many as fit into the memory.
        watch: Called after each step.
    """
    pipe, settings = load_pipeline(settings)
    prompts, columns = [*settings.prompts], settings.sampling.num_images
    frames, maps = Film(), AttentionMaps(pipe.unet, pipe.image_size)
    callbacks: list[StepCallback] = [] if callback_on_step_end is None else [callback_on_step_end]
    with ExitStack() as extras:
        film_path, maps_path = None, None
        if film is not None:
            film_path = extras.enter_context(reserve_path(film, "", "--film", (".gif", ".webp")))
            callbacks.append(frames)
        if attention_maps is not None:
            maps_path = extras.enter_context(reserve_path(attention_maps, "", "--attention-maps", (".png",)))
            callbacks.append(extras.enter_context(maps))
        with reserve_path(output, prompts[0] if prompts else "", "--output", (".png",)) as path:
            try:
                images = pipe(
                    prompts, **_arguments(settings), batch_size=batch_size, callback_on_step_end=_all_of(callbacks)
                )
            except SamplingInterrupted as interruption:
                images = interruption.images
                if not images:
                    raise
            if (film_path or maps_path) and not frames.frames and not maps.maps:
                raise UserError(f"strength: {settings.sampling.strength} leaves no steps to show; expected more")
            shown = prompts[: -(-len(images) // columns)]
            save_png(grid(images, columns, shown if labels and len(prompts) > 1 else None), path, settings)
        if len(images) < (total := len(prompts) * columns):
            message = (
                f"interrupted; {path} has the first {len(images)} of {total} images, and --from-image {path} samples "
                "them all"
            )
            raise Interrupted(message, SIGINT)
        yield path
        if film_path:
            frames.save(film_path, columns)
            yield film_path
        if maps_path:
            words = [maps_of_words(prompts[i // columns], m, pipe.text_encoder) for i, m in enumerate(maps.maps)]
            sheet(list(zip(images, words, strict=True))).save(maps_path)
            yield maps_path


def generate_to_folder(settings: GenerationSettings, folder: str, *, batch_size: int | None = None) -> None:
    """Sample, and write a PNG for each image as soon as its batch is complete.

    Names begin with the numbers of prompt and image, so they sort as the images are asked for, and more of them may be
    asked for later. Files that exist are skipped.

    Raises:
        UserError: Where a file exists that was made with other settings, or cannot be written.
        Interrupted: On Ctrl-C.
    """
    pipe, settings = load_pipeline(settings)
    batch_size = pipe.max_batch_size() if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size}; expected at least 1")
    todo = []
    for path, own in _settings_of_images(settings, Path(folder)):
        if path.exists():
            _check_same(path, own)
        else:
            todo.append((path, own))
    total = len(settings.prompts) * settings.sampling.num_images
    with tqdm(total=total, initial=total - len(todo), desc="sampling", unit=" images") as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            each = {name: [getattr(own.sampling, name) for _, own in batch] for name in PER_PROMPT}
            prompts = [own.prompts[0] for _, own in batch]
            arguments = {**_arguments(settings), "num_images": 1, **each}
            try:
                images = pipe(prompts, **arguments, batch_size=batch_size, progress=False)
            except SamplingInterrupted as interruption:
                message = (
                    f"interrupted; {folder} has {bar.n} of {total} images, and the same command continues from there"
                )
                raise Interrupted(message, SIGINT) from interruption
            for (path, own), image in zip(batch, images, strict=True):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    aside = path.with_name(f".{path.name}")
                    save_png(image, aside, own)
                    aside.replace(path)
                except OSError as error:
                    raise UserError(f"--output-dir: {path} cannot be written: {error.strerror}") from error
            bar.update(len(batch))


PER_PROMPT = ("seed", "guidance_scale", "negative_prompt")


def _settings_of_images(settings: GenerationSettings, folder: Path) -> Iterator[tuple[Path, GenerationSettings]]:
    """Yield the path and the settings of each image."""
    values = [settings.sampling.per_prompt(name, len(settings.prompts)) for name in PER_PROMPT]
    for row, (prompt, seed, scale, negative) in enumerate(zip(settings.prompts, *values, strict=True)):
        for i in range(settings.sampling.num_images):
            own = {"num_images": 1, "seed": seed + i, "guidance_scale": scale, "negative_prompt": negative}
            path = folder / f"{row:04}-{i:04}-{name_of(prompt)}.png"
            yield path, replace(settings, prompts=(prompt,), sampling=replace(settings.sampling, **own))


def _check_same(path: Path, settings: GenerationSettings) -> None:
    """Raise UserError if an image was made with other settings."""
    there, wanted = to_flat(from_flat(read_settings(str(path), "--output-dir"))), to_flat(settings)
    for name in sorted(there.keys() | wanted.keys()):
        if (then := there.get(name)) != (now := wanted.get(name)):
            raise UserError(
                f"--output-dir: {path} was made with {name} {then}, not {now}, and is not overwritten; choose another "
                "folder"
            )


def _arguments(settings: GenerationSettings) -> dict[str, Any]:
    """Return the keyword arguments of `TextToImage.__call__`."""
    files = {"image": settings.image, "mask": settings.mask}
    images: dict[str, Image.Image] = {
        name: open_image(file, f"--{name}") for name, file in files.items() if file is not None
    }
    return {**vars(settings.sampling), **images}


def _all_of(callbacks: list[StepCallback]) -> StepCallback | None:
    """Return one callback for several."""

    def call_all(*arguments: Any) -> None:
        for callback_on_step_end in callbacks:
            callback_on_step_end(*arguments)

    return call_all if callbacks else None
