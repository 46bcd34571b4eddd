"""What sample.py does: prompts and options in, files out."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cond_diffusion import __version__
from cond_diffusion.attention_maps import AttentionMaps, maps_of_words, sheet
from cond_diffusion.errors import UserError
from cond_diffusion.film import Film
from cond_diffusion.pictures import claimed_path, grid, open_picture, save_png, settings_of
from cond_diffusion.pipeline import TextToImage, Watch
from cond_diffusion.samplers import Step

# What goes into a PNG and out of it again: the options of `TextToImage.__call__` that decide the picture.
SETTINGS = {
    *("checkpoint", "num_images", "seed", "sampler", "steps", "variance", "eta", "order", "image", "strength", "mask"),
    *("resamplings", "guidance_scale", "negative_prompt", "guidance_interval", "guidance_rescale"),
    *("dynamic_thresholding", "ema_width"),
}
BELONGINGS = {"sampler": ("variance", "eta", "order"), "image": ("strength", "mask", "resamplings")}

logger = logging.getLogger(__name__)


def draw_to_file(
    prompts: list[str],
    options: dict[str, Any],
    *,
    checkpoint: str,
    ema_width: float | None = None,
    output: str | None,
    film: str | None,
    attention_maps: str | None,
) -> None:
    """Draw, write one PNG with a row for each prompt, and print its path; and what else was asked for beside it.

    options: those of `TextToImage.__call__` by name, pictures as paths. They go into the PNG with the prompts, the
    checkpoint and the version, so that `recorded_words` can type them again.
    """
    pipe = TextToImage.from_pretrained(checkpoint, ema_width=ema_width).to_accelerator()
    pictures = {n: open_picture(options[n], f"--{n}") for n in ("image", "mask") if options[n] is not None}
    settings = {**options, "steps": options["steps"] or pipe.schedule.num_timesteps}
    # Of a run the checkpoint that it is now: the run may go on.
    settings["checkpoint"] = str(pipe.folder) if Path(checkpoint).is_dir() else checkpoint
    settings["ema_width"] = ema_width
    each = options["num_images"]
    moving, maps = Film(), AttentionMaps(pipe.unet, pipe.side)
    watchers: list[Watch] = []

    with ExitStack() as extras:
        film_path, maps_path = None, None
        if film is not None:
            film_path = extras.enter_context(claimed_path(film, "", "--film", (".gif", ".webp")))
            watchers.append(moving)
        if attention_maps is not None:
            maps_path = extras.enter_context(claimed_path(attention_maps, "", "--attention-maps", (".png",)))
            watchers.append(extras.enter_context(maps))

        def watch(step: Step, number: int, total: int) -> None:
            for watcher in watchers:
                watcher(step, number, total)

        with claimed_path(output, prompts[0], "--output", (".png",)) as path:
            images = pipe(prompts, **{**options, **pictures}, watch=watch if watchers else None)
            if watchers and not moving.frames and not maps.maps:
                raise UserError(f"strength: {options['strength']} leaves no steps to show; expected more")
            save_png(grid(images, each), path, _typed(prompts, settings))
        print(path)
        if film_path:
            moving.save(film_path, each)
            print(film_path)
        if maps_path:
            words = [maps_of_words(prompts[i // each], m, pipe.text_encoder) for i, m in enumerate(maps.maps)]
            sheet(list(zip(images, words, strict=True))).save(maps_path)
            print(maps_path)


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
    settings = settings_of(path)
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
