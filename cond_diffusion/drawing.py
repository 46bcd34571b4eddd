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
from cond_diffusion.pipeline import TextToImage, Watch, find_checkpoint
from cond_diffusion.samplers import Step

logger = logging.getLogger(__name__)


def draw_to_file(
    prompts: list[str],
    options: dict[str, Any],
    *,
    checkpoint: str,
    output: str | None,
    film: str | None,
    attention_maps: str | None,
) -> None:
    """Draw, write one PNG with a row for each prompt, and print its path; and what else was asked for beside it.

    options: those of `TextToImage.__call__` by name, pictures as paths. They go into the PNG with the prompts, the
    checkpoint and the version, so that `recorded_words` can type them again.
    """
    folder = find_checkpoint(checkpoint)
    pipe = TextToImage.from_pretrained(folder).to_accelerator()
    pictures = {name: open_picture(options[name], f"--{name}") for name in ("image", "mask") if options[name]}
    settings = {**options, "steps": options["steps"] or pipe.schedule.num_timesteps}
    settings["checkpoint"] = checkpoint if checkpoint == "builtin" else str(folder)  # a run's newest one changes
    each = options["num_images"]
    moving, maps = Film(), AttentionMaps(pipe.unet, pipe.side)
    watchers: list[Watch] = []

    with ExitStack() as stack:

        def claim(wanted: str | None, option: str, *suffixes: str) -> Path:
            return stack.enter_context(claimed_path(wanted, prompts[0], option, suffixes))

        paths = [claim(output, "--output", ".png")]
        if film:
            paths.append(claim(film, "--film", ".gif", ".webp"))
            watchers.append(moving)
        if attention_maps:
            paths.append(claim(attention_maps, "--attention-maps", ".png"))
            watchers.append(stack.enter_context(maps))

        def watch(step: Step, number: int, total: int) -> None:
            for watcher in watchers:
                watcher(step, number, total)

        images = pipe(prompts, **{**options, **pictures}, watch=watch if watchers else None)
        if watchers and not moving.frames and not maps.maps:
            raise UserError(f"strength: {options['strength']} leaves no steps to show; expected more")
        save_png(grid(images, each), paths[0], _typed(prompts, settings))
        if film:
            moving.save(Path(film), each)
        if attention_maps:
            words = [maps_of_words(prompts[i // each], m, pipe.text_encoder) for i, m in enumerate(maps.maps)]
            sheet(list(zip(images, words, strict=True))).save(attention_maps)
    for path in paths:
        print(path)


def _typed(prompts: list[str], settings: dict[str, Any]) -> dict[str, str | list[str]]:
    """Return the settings that are not at "none" as a user would type them."""

    def word(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    given = {name: word(value) for name, value in settings.items() if value is not None}
    return {"prompts": prompts, **given, "version": __version__}


def recorded_words(path: str) -> tuple[list[str], list[str]]:
    """Return the prompts that a PNG was drawn for, and its other settings as words of a command line."""
    settings = settings_of(path)
    prompts, version = settings.pop("prompts", []), settings.pop("version", None)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"--from-image: the settings in {path} are damaged: prompts: {prompts!r:.60}")
    if version != __version__:
        logger.warning("%s was drawn by version %s; this is %s, and may draw it otherwise", path, version, __version__)
    return prompts, [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
