"""Generate images from settings and write them to files, and store the settings in the metadata of each PNG.

The output is one PNG with a row per prompt, or a folder with one PNG per image. A PNG holds its `GenerationSettings` as
text chunks, from which the images can be generated again.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields, replace
from itertools import chain, count, islice, product, starmap
from pathlib import Path
from secrets import token_hex
from tempfile import gettempdir
from typing import Any

from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from cond_diffusion import __version__
from cond_diffusion.config.sampling import PER_PROMPT, GenerationSettings, SamplingOptions
from cond_diffusion.config.schema import parse_json
from cond_diffusion.errors import Interrupted, UserError, user_errors
from cond_diffusion.files import check_writable, write_file
from cond_diffusion.images import encode, grid, open_image
from cond_diffusion.pipeline.checkpoint import lasting_name
from cond_diffusion.pipeline.text_to_image import SamplingInterrupted, StepCallback, TextToImage
from cond_diffusion.pipeline.visualize import AttentionMaps, Film, maps_per_word, render_maps

CHUNK_PREFIX = "cond_diffusion:"

SettingsOfImage = Callable[[int, int], tuple[Path, GenerationSettings]]

logger = logging.getLogger(__name__)


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
    """Generate images, write them as one PNG with a row per prompt, and yield the path of each file written.

    The PNG comes first, then the animation and the attention maps if requested. The PNG stores the settings.

    Args:
        output: Path of the PNG; None derives an unused name from the prompt.
        film: Path of an animation of the sampling, .gif or .webp.
        labels: Whether to write the prompts beside the rows if there are several.
        batch_size: Number of images per batch; None uses as many as fit into memory.

    Raises:
        UserError: If the settings are not valid, or a file exists or cannot be written.
        Interrupted: On Ctrl-C, after the PNG was written with the images that were complete.
    """
    prompts, columns = [*settings.prompts], settings.num_images
    path = output_path(output, prompts, "--output", (".png",))
    film_path = None if film is None else output_path(film, prompts, "--film", (".gif", ".webp"))
    maps_path = None
    if attention_maps is not None:
        maps_path = output_path(attention_maps, prompts, "--attention-maps", (".png",))
        if maps_path.absolute() == path.absolute():
            raise UserError(f"--attention-maps: {maps_path} is the path of the images; choose another")
    pipe, settings = load_pipeline(settings)
    frames, maps = Film(), AttentionMaps(pipe.unet, pipe.image_size)
    if maps_path and not maps.blocks:
        raise UserError("--attention-maps: this network has no cross-attention; remove the option")
    callbacks: list[StepCallback] = [] if callback_on_step_end is None else [callback_on_step_end]
    callbacks += [frames] if film_path else []
    callbacks += [maps] if maps_path else []

    def call_all(*step: Any) -> None:
        for callback in callbacks:
            callback(*step)

    with maps if maps_path else nullcontext():
        try:
            callback = call_all if callbacks else None
            images = pipe(prompts, **_call_kwargs(settings), batch_size=batch_size, callback_on_step_end=callback)
        except SamplingInterrupted as interruption:
            images = interruption.images
            if not images:
                raise
    if (film_path or maps_path) and not frames.frames and not maps.maps:
        raise UserError(f"strength: {settings.strength} leaves no steps to visualize; increase it")
    if output is None:
        path = output_path(None, prompts, "--output", (".png",))  # another process may have taken the first name
    row_labels = prompts[: -(-len(images) // columns)] if labels and len(prompts) > 1 else None
    write_output(path, encode_png(grid(images, columns, row_labels), settings), "--output")
    if len(images) < (total := len(prompts) * columns):
        found = f"{path} has the first {len(images)} of {total} images"
        raise Interrupted(f"interrupted; {found}, and --from-image {path} samples them all")
    yield path
    if film_path:
        write_output(film_path, frames.encode(film_path, columns), "--film")
        yield film_path
    if maps_path:
        words = [maps_per_word(prompts[i // columns], m, pipe.text_encoder) for i, m in enumerate(maps.maps)]
        write_output(maps_path, encode(render_maps(list(zip(images, words, strict=True)))), "--attention-maps")
        yield maps_path


def generate_to_folder(settings: GenerationSettings, folder: str, *, batch_size: int | None = None) -> None:
    """Generate images and write one PNG per image, after each batch.

    File names begin with the numbers of the prompt and the image, so up to 10,000 of each sort in order, and a later
    call can request more images. Existing files are skipped.

    Raises:
        UserError: If a file exists that was made with other settings or another prompt, or cannot be written.
        Interrupted: On Ctrl-C.
    """
    with user_errors(f"--output-dir: {folder} cannot be written", OSError, ValueError):
        check_writable(Path(folder))
    pipe, settings = load_pipeline(settings)
    batch_size = pipe.max_batch_size(settings.prompts, settings) if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size}; expected at least 1")
    hint = "; the same command continues from there"
    total = len(settings.prompts) * settings.num_images
    pipe.check_memory(min(batch_size, total), "batch_size")
    image_of = _settings_of_image(settings, Path(folder))
    existing = _existing_images(settings, Path(folder), image_of)
    pairs = product(range(len(settings.prompts)), range(settings.num_images))
    todo = (image for image in starmap(image_of, pairs) if image[0].name not in existing)
    with tqdm(total=total, initial=len(existing), desc="sampling", unit=" images") as bar:
        while batch := list(islice(todo, batch_size)):
            each = {name: [getattr(own, name) for _, own in batch] for name in PER_PROMPT}
            kwargs = {**_call_kwargs(settings), "num_images": 1, **each}
            try:
                images = pipe([own.prompts[0] for _, own in batch], **kwargs, batch_size=batch_size, progress=False)
            except SamplingInterrupted as interruption:
                message = f"interrupted; {folder} has {bar.n} of {total} images{hint}"
                raise Interrupted(message) from interruption
            for (path, own), image in zip(batch, images, strict=True):
                with user_errors(f"--output-dir: {path} cannot be written", OSError, hint=hint):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with suppress(FileExistsError):  # written by another process meanwhile
                        write_file(path, encode_png(image, own), overwrite=False)
            bar.update(len(batch))


def load_pipeline(settings: GenerationSettings) -> tuple[TextToImage, GenerationSettings]:
    """Return the pipeline on the accelerator, and the settings to store in a PNG.

    In these, a run folder is replaced by its newest checkpoint, and the model's defaults are filled in.
    """
    pipe = TextToImage.from_pretrained(
        settings.checkpoint, ema_width=settings.ema_width, lora=settings.lora, dtype=settings.dtype
    ).to_accelerator()
    if settings.compile:
        pipe.compile()
    checkpoint = lasting_name(settings.checkpoint, pipe.folder)
    return pipe, replace(pipe.completed(settings), checkpoint=checkpoint)


def encode_png(image: Image.Image, settings: GenerationSettings) -> bytes:
    """Return a PNG with the version and each setting that is not None in text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in {**_stored(settings), "version": __version__}.items():
        chunks.add_itxt(CHUNK_PREFIX + name, json.dumps(value, ensure_ascii=False))
    return encode(image, pnginfo=chunks)


def read_settings(path: str, option: str) -> dict[str, Any]:
    """Return the settings that `encode_png` stored in a PNG, by name."""
    chunks = getattr(open_image(path, option), "text", {})
    ours = {name.removeprefix(CHUNK_PREFIX): text for name, text in chunks.items() if name.startswith(CHUNK_PREFIX)}
    if not ours:
        raise UserError(f"{option}: {path} has no generation settings; expected a PNG written by cond_diffusion")
    found: dict[str, Any] = {"phrase_guidance": 0.0, "first_phrase_from": 0}  # of images from before these options
    for name, text in ours.items():
        found |= parse_json(f"{{{json.dumps(name)}: {text}}}", f"{option}: {path}: {name}")
    version = found.pop("version", None)
    if version != __version__:
        logger.warning(
            "%s was generated by version %s; version %s may produce a different image", path, version, __version__
        )
    if unknown := found.keys() - {field.name for field in fields(GenerationSettings)}:
        raise UserError(f"{option}: {path} has the unknown setting {min(unknown)!r:.60}")
    try:
        GenerationSettings(**found)
    except UserError as error:
        raise UserError(f"{option}: {path}: {error}") from error
    return found


def _stored(settings: GenerationSettings) -> dict[str, Any]:
    """Return all settings that are not None, by name; `compile` changes no image."""
    return {name: value for name, value in vars(settings).items() if name != "compile" and value is not None}


def output_path(wanted: str | None, prompts: Sequence[str], option: str, suffixes: tuple[str, ...]) -> Path:
    """Return the path of a new file: `wanted`, or an unused name based on the first prompt, with the first of the
    allowed suffixes."""
    if wanted is None:
        endings = chain([""], (f"-{number}" for number in count(2)))
        paths = (Path(f"{_file_stem(prompts[0] if prompts else '')}{ending}{suffixes[0]}") for ending in endings)
        path = next(path for path in paths if not path.exists())
    else:
        path = Path(wanted)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option}: {path} must end in {' or '.join(suffixes)}")
    with user_errors(f"{option}: {path} cannot be written", OSError, ValueError):
        with suppress(FileNotFoundError):
            path.lstat()
            raise UserError(f"{option}: {path} already exists and is not overwritten; choose another path")
        if not path.parent.is_dir():
            raise UserError(f"{option}: {path} cannot be written: there is no folder {path.parent}")
        check_writable(path.parent)
    return path


def write_output(path: Path, content: bytes, option: str) -> None:
    """Write a new file. If that fails, for example on a full disk, write it into the folder for temporary files."""
    try:
        write_file(path, content, overwrite=False)
    except OSError as error:
        what = f"{option}: {path} cannot be written ({error.strerror})"
        with user_errors(f"{what}, nor into the folder for temporary files", OSError, hint="; free space and repeat"):
            kept = Path(gettempdir(), f"cond-diffusion-{token_hex(4)}{path.suffix}")
            write_file(kept, content, overwrite=False)
        raise UserError(f"{what}; saved as {kept} instead") from error


def _file_stem(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"


def _settings_of_image(settings: GenerationSettings, folder: Path) -> SettingsOfImage:
    """Return the function from the numbers of a prompt and an image to the image's path and settings."""
    seeds, scales, negatives = (settings.per_prompt(name, len(settings.prompts)) for name in PER_PROMPT)

    def image_of(row: int, i: int) -> tuple[Path, GenerationSettings]:
        prompt = settings.prompts[row]
        own = {"prompts": (prompt,), "num_images": 1, "seed": seeds[row] + i}
        own |= {"guidance_scale": scales[row], "negative_prompt": negatives[row]}
        return folder / f"{row:04}-{i:04}-{_file_stem(prompt)}.png", replace(settings, **own)

    return image_of


def _existing_images(settings: GenerationSettings, folder: Path, image_of: SettingsOfImage) -> set[str]:
    """Return the names of requested images that exist; raise UserError for one that was made with other settings."""
    existing = set()
    for path in sorted(folder.glob("*.png")):
        numbers = re.match(r"(\d{4,9})-(\d{4,18})-", path.name)
        row, i = map(int, numbers.groups()) if numbers else (-1, -1)
        if 0 <= row < len(settings.prompts) and i < settings.num_images:
            expected, own = image_of(row, i)
            if path == expected:
                _check_same_settings(path, own)
                existing.add(path.name)
            elif (stored := _stored_prompts(path)) not in (None, [*own.prompts]):
                raise UserError(
                    f"--output-dir: {path} is an image of {stored}, with the numbers of {expected.name}; choose "
                    "another folder"
                )
    return existing


def _stored_prompts(path: Path) -> list[str] | None:
    """Return the prompts that a PNG was generated from, or None if it is of other software."""
    with suppress(UserError):
        return read_settings(str(path), "--output-dir")["prompts"]
    return None


def _check_same_settings(path: Path, settings: GenerationSettings) -> None:
    """Raise UserError if an existing image was generated with other settings."""
    stored = _stored(GenerationSettings(**read_settings(str(path), "--output-dir")))
    wanted = _stored(settings)
    for name in sorted(stored.keys() | wanted.keys()):
        if (then := stored.get(name)) != (now := wanted.get(name)):
            hint = f"continue with --checkpoint {then}, or " if name == "checkpoint" else ""
            raise UserError(
                f"--output-dir: {path} was made with {name} {then}, not {now}, and is not overwritten; {hint}choose "
                "another folder"
            )


def _call_kwargs(settings: GenerationSettings) -> dict[str, Any]:
    """Return the keyword arguments of `TextToImage.__call__`; the input images are opened."""
    files = {"image": settings.image, "mask": settings.mask}
    images = {name: open_image(file, f"--{name}") for name, file in files.items() if file is not None}
    return {**{field.name: getattr(settings, field.name) for field in fields(SamplingOptions)}, **images}
