"""What sample.py does: prompts and options in, files out."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGINT
from typing import Any

from tqdm.auto import tqdm

from cond_diffusion import __version__
from cond_diffusion.diffusion.guidance import scale_of_each
from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.errors import Interrupted, UserError
from cond_diffusion.images import claimed_path, grid, name_of, open_picture, save_png, settings_of
from cond_diffusion.pipeline.attention_maps import AttentionMaps, maps_of_words, sheet
from cond_diffusion.pipeline.film import Film
from cond_diffusion.pipeline.text_to_image import PartlyDrawn, TextToImage, Watch

# What goes into a PNG and out of it again: the options of `TextToImage.__call__` that decide the picture.
SETTINGS = {
    *("checkpoint", "num_images", "seed", "sampler", "steps", "variance", "eta", "order", "image", "strength", "mask"),
    *("resamplings", "guidance_scale", "negative_prompt", "guidance_interval", "guidance_rescale"),
    *("dynamic_thresholding", "ema_width", "lora"),
}
BELONGINGS = {"sampler": ("variance", "eta", "order"), "image": ("strength", "mask", "resamplings")}

logger = logging.getLogger(__name__)


def draw_to_file(
    prompts: list[str],
    options: dict[str, Any],
    *,
    checkpoint: str,
    ema_width: float | None = None,
    lora: str | None = None,
    output: str | None,
    film: str | None,
    attention_maps: str | None,
    labels: bool = True,
    watch: Watch | None = None,
) -> Iterator[Path]:
    """Draw, write one PNG with a row for each prompt, and yield its path; then what else was asked for beside it.

    options: those of `TextToImage.__call__` by name, pictures as paths. They go into the PNG with the prompts, the
    checkpoint and the version, so that `recorded_words` can type them again.
    labels: whether the prompts stand beside the rows where there are several.

    Raises Interrupted on Ctrl-C; the PNG has the pictures that were drawn then.
    """
    pipe = TextToImage.from_pretrained(checkpoint, ema_width=ema_width, lora=lora).to_accelerator()
    pictures, settings = _pictures(options), _settings(pipe, options, checkpoint, ema_width, lora)
    each = options["num_images"]
    moving, maps = Film(), AttentionMaps(pipe.unet, pipe.side)
    watchers: list[Watch] = [] if watch is None else [watch]

    with ExitStack() as extras:
        film_path, maps_path = None, None
        if film is not None:
            film_path = extras.enter_context(claimed_path(film, "", "--film", (".gif", ".webp")))
            watchers.append(moving)
        if attention_maps is not None:
            maps_path = extras.enter_context(claimed_path(attention_maps, "", "--attention-maps", (".png",)))
            watchers.append(extras.enter_context(maps))

        def tell_all(step: Step, number: int, total: int) -> None:
            for watcher in watchers:
                watcher(step, number, total)

        with claimed_path(output, prompts[0], "--output", (".png",)) as path:
            try:
                images = pipe(prompts, **{**options, **pictures}, watch=tell_all if watchers else None)
            except PartlyDrawn as interruption:
                images = interruption.images
                if not images:
                    raise
            if (film_path or maps_path) and not moving.frames and not maps.maps:
                raise UserError(f"strength: {options['strength']} leaves no steps to show; expected more")
            shown = prompts[: -(-len(images) // each)]
            save_png(
                grid(images, each, shown if labels and len(prompts) > 1 else None), path, _typed(prompts, settings)
            )
        if len(images) < (total := len(prompts) * each):
            message = (
                f"interrupted; {path} has the first {len(images)} of {total} pictures, and --from-image "
                f"{path} draws them all"
            )
            raise Interrupted(message, SIGINT)
        yield path
        if film_path:
            moving.save(film_path, each)
            yield film_path
        if maps_path:
            words = [maps_of_words(prompts[i // each], m, pipe.text_encoder) for i, m in enumerate(maps.maps)]
            sheet(list(zip(images, words, strict=True))).save(maps_path)
            yield maps_path


def draw_to_folder(
    prompts: list[str],
    options: dict[str, Any],
    *,
    checkpoint: str,
    ema_width: float | None = None,
    lora: str | None = None,
    folder: str,
) -> None:
    """Draw, and write a PNG for each picture as soon as its batch is done.

    Names begin with the numbers of prompt and picture, so they sort as the pictures are asked for, and more of them may
    be asked for later. What is there is not drawn again; UserError where it was drawn otherwise, or cannot be written;
    Interrupted on Ctrl-C.
    """
    pipe = TextToImage.from_pretrained(checkpoint, ema_width=ema_width, lora=lora).to_accelerator()
    pictures, settings = _pictures(options), _settings(pipe, options, checkpoint, ema_width, lora)
    each, first_seed = options["num_images"], options["seed"]
    at_once = pipe.fitting_batch_size() if options["batch_size"] is None else options["batch_size"]
    for name, value in (("num_images", each), ("batch_size", at_once)):
        if value < 1:
            raise UserError(f"{name}: {value} must be at least 1")
    todo: list[tuple[Path, str, dict[str, Any]]] = []
    scales = scale_of_each(options["guidance_scale"], len(prompts))
    for row, (prompt, scale) in enumerate(zip(prompts, scales, strict=True)):
        for i in range(each):
            path = Path(folder) / f"{row:04}-{i:04}-{name_of(prompt)}.png"
            own = {"seed": first_seed + i, "guidance_scale": scale}
            if path.exists():
                _check_same(path, _typed([prompt], {**settings, **own, "num_images": 1}))
            else:
                todo.append((path, prompt, own))
    of_each = ("num_images", "batch_size")
    shared = {name: value for name, value in {**options, **pictures}.items() if name not in of_each}
    total = len(prompts) * each
    with tqdm(total=total, initial=total - len(todo), desc="drawing", unit=" pictures") as bar:
        for start in range(0, len(todo), at_once):
            batch = todo[start : start + at_once]
            own = {name: [of_one[name] for _, _, of_one in batch] for name in ("seed", "guidance_scale")}
            prompts_of_batch = [prompt for _, prompt, _ in batch]
            try:
                drawn = pipe(prompts_of_batch, **{**shared, **own}, batch_size=at_once, progress=False)
            except PartlyDrawn as interruption:
                message = (
                    f"interrupted; {folder} has {bar.n} of {total} pictures, and the same command goes on from there"
                )
                raise Interrupted(message, SIGINT) from interruption
            for (path, prompt, of_one), image in zip(batch, drawn, strict=True):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    aside = path.with_name(f".{path.name}")
                    save_png(image, aside, _typed([prompt], {**settings, **of_one, "num_images": 1}))
                    aside.replace(path)
                except OSError as error:
                    raise UserError(f"--output-dir: {path} cannot be written: {error.strerror}") from error
            bar.update(len(batch))


def _check_same(path: Path, settings: dict[str, str | list[str]]) -> None:
    """Raise UserError if a picture was drawn with other settings."""
    there = settings_of(str(path), "--output-dir")
    for name in sorted(there.keys() | settings.keys()):
        if (then := there.get(name)) != (now := settings.get(name)):
            raise UserError(
                f"--output-dir: {path} was drawn with {name} {then}, not {now}, and is not overwritten; give another "
                "folder"
            )


def _pictures(options: dict[str, Any]) -> dict[str, Any]:
    return {name: open_picture(options[name], f"--{name}") for name in ("image", "mask") if options[name] is not None}


def _settings(
    pipe: TextToImage, options: dict[str, Any], checkpoint: str, ema_width: float | None, lora: str | None
) -> dict[str, Any]:
    """Return what decides the pictures, to be written into them."""
    settings = {name: value for name, value in options.items() if name != "batch_size"}
    return {
        **settings,
        "steps": options["steps"] or pipe.schedule.num_timesteps,
        # Of a run the checkpoint that it is now: the run may go on.
        "checkpoint": str(pipe.folder) if Path(checkpoint).is_dir() else checkpoint,
        "ema_width": ema_width,
        "lora": lora,
    }


def _typed(prompts: list[str], settings: dict[str, Any]) -> dict[str, str | list[str]]:
    """Return the settings that are not at "none" as a user would type them."""

    def word(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    given = {name: word(value) for name, value in settings.items() if value is not None}
    return {"prompts": prompts, **given, "version": __version__}


def recorded_words(path: str, typed: list[str]) -> tuple[list[str], list[str]]:
    """Return the prompts that a PNG was drawn for, and its other settings as words of a command line.

    typed: the words that stand beside --from-image. What belonged to a sampler or to a picture that they replace is
    left out. Only settings that decide the picture are taken: a PNG can name no file to write.
    """
    settings = settings_of(path, "--from-image")
    version = settings.pop("version", None)
    if version != __version__:
        logger.warning("%s was drawn by version %s; this is %s, and may draw it otherwise", path, version, __version__)
    prompts = settings.pop("prompts", [])
    if unknown := settings.keys() - SETTINGS:
        raise UserError(f"--from-image: {path} has a setting that is not known here: {min(unknown)!r:.60}")
    for option, belongings in BELONGINGS.items():
        if any(word.split("=")[0] == f"--{option}" for word in typed):
            settings = {name: value for name, value in settings.items() if name not in belongings}
    return list(prompts), [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
