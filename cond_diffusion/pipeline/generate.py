"""From settings to files: one PNG with a row for each prompt, or a folder with a PNG of each image."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from signal import SIGINT
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from cond_diffusion.config.sampling import GenerationSettings
from cond_diffusion.errors import Interrupted, UserError
from cond_diffusion.images import grid, open_image
from cond_diffusion.pipeline.png import from_flat, name_of, read_settings, reserve_path, save_png, to_flat
from cond_diffusion.pipeline.text_to_image import SamplingInterrupted, TextToImage, Watch
from cond_diffusion.pipeline.visualize import AttentionMaps, Film, maps_of_words, sheet

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
    watch: Watch | None = None,
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
    watchers: list[Watch] = [] if watch is None else [watch]
    with ExitStack() as extras:
        film_path, maps_path = None, None
        if film is not None:
            film_path = extras.enter_context(reserve_path(film, "", "--film", (".gif", ".webp")))
            watchers.append(frames)
        if attention_maps is not None:
            maps_path = extras.enter_context(reserve_path(attention_maps, "", "--attention-maps", (".png",)))
            watchers.append(extras.enter_context(maps))
        with reserve_path(output, prompts[0] if prompts else "", "--output", (".png",)) as path:
            try:
                images = pipe(prompts, **_arguments(settings), batch_size=batch_size, watch=_all_of(watchers))
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


def _all_of(watchers: list[Watch]) -> Watch | None:
    """Return one callback for several."""

    def watch_all(*arguments: Any) -> None:
        for watch in watchers:
            watch(*arguments)

    return watch_all if watchers else None
