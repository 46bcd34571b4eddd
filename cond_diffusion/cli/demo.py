"""`demo`: a page in the browser that samples."""

import argparse
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any, get_args

from PIL import Image

from cond_diffusion.config.sampling import GenerationSettings, SamplerName, SamplingOptions
from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.errors import UserError, first_line
from cond_diffusion.images import enlarged, grid, to_pillow
from cond_diffusion.pipeline.generate import generate_to_file, read_settings
from cond_diffusion.pipeline.run_folder import checkpoints

WIDTH = 448  # pixels that the pictures are shown at least wide
MOST_PROMPTS = 16
PATIENCE = 0.1  # seconds between looks at whether the chain has come further

Shown = tuple[Image.Image | None, str, list[str]]
"""What the page shows: the pictures so far, how far the chain is, and the files to download."""


class Left(Exception):
    """Nobody looks any more."""


def drawn(folder: Path, settings: GenerationSettings) -> Iterator[Shown]:
    """Sample in a thread, and yield what there is to see until all files are written into `folder`."""
    seen: Queue[Shown | Exception] = Queue()
    left = Event()
    each = settings.sampling.num_images

    def callback_on_step_end(step: Step, number: int, total: int) -> None:
        if left.is_set():
            raise Left
        if seen.empty():  # nobody waits for pictures that are out of date
            picture = enlarged(grid(to_pillow(step.x), each), WIDTH)
            seen.put((picture, f"step {number + 1} of {total}", []))

    def draw() -> None:
        files: list[Path] = []
        try:
            drawing = generate_to_file(
                settings,
                output=str(folder / "pictures.png"),
                film=str(folder / "film.webp"),
                attention_maps=str(folder / "words.png"),
                labels=False,
                callback_on_step_end=callback_on_step_end,
            )
            files.append(next(drawing))
            files.append(folder / "settings.json")
            files[1].write_text(json.dumps(read_settings(str(files[0]), "settings"), indent=2, ensure_ascii=False))
            said = "done"
            try:
                files += drawing
            except UserError as error:  # a film can be too large, which costs no pictures
                said = f"done, but {error}"
            with Image.open(files[0]) as picture:
                seen.put((enlarged(picture, WIDTH), said, [str(file) for file in files]))
        except Left:
            pass
        except Exception as error:  # handed on to the thread that asked
            seen.put(error)

    thread = Thread(target=draw, name="drawing")
    thread.start()
    try:
        while thread.is_alive() or not seen.empty():
            try:
                found = seen.get(timeout=PATIENCE)
            except Empty:
                continue
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        left.set()  # and no waiting: Gradio closes this where it serves everybody


def choices(runs: Path) -> list[str]:
    """Return the built-in model and the runs that have a checkpoint, the newest first."""
    found = [path for path in runs.iterdir() if checkpoints(path)] if runs.is_dir() else []
    return ["builtin", *map(str, sorted(found, key=lambda path: path.stat().st_mtime, reverse=True))]


def page(runs: Path) -> Any:
    """Return the page, a `gradio.Blocks`."""
    import gradio  # an extra

    def draw(
        checkpoint: str,
        prompt: str,
        negative: str,
        scale: float,
        sampler: str,
        steps: int,
        seed: int | None,
        count: int,
    ) -> Iterator[Shown]:
        prompts = [line.strip() for line in prompt.splitlines() if line.strip()]
        if not prompts:
            raise gradio.Error("prompts: none given; expected at least one", print_exception=False)
        if len(prompts) > MOST_PROMPTS:
            raise gradio.Error(f"prompts: {len(prompts)} are more than {MOST_PROMPTS}", print_exception=False)
        yield None, "loading", []
        try:
            with TemporaryDirectory(prefix="cond-diffusion-", ignore_cleanup_errors=True) as folder:
                sampling = SamplingOptions(
                    num_images=count,
                    seed=seed or 0,
                    sampler=sampler,  # type: ignore[arg-type]  # checked there
                    steps=steps,
                    guidance_scale=scale,
                    negative_prompt=negative,
                )
                settings = GenerationSettings(prompts=tuple(prompts), sampling=sampling, checkpoint=checkpoint)
                yield from drawn(Path(folder), settings)  # Gradio copies what it is given
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title="cond_diffusion", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.Markdown("# cond_diffusion\nOne prompt a line; each becomes a row of pictures.")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox("a digit seven", label="Prompt", lines=2)
                negative = gradio.Textbox("", label="Negative prompt")
                button = gradio.Button("Draw", variant="primary")
                stop = gradio.Button("Stop")
                scale = gradio.Slider(0, 10, 3, step=0.5, label="Guidance scale")
                sampler = gradio.Dropdown(list(get_args(SamplerName)), value="dpm_solver", label="Sampler")
                steps = gradio.Slider(1, 1000, 20, step=1, label="Steps")
                seed = gradio.Number(0, label="Seed", precision=0)
                count = gradio.Slider(1, 16, 4, step=1, label="Pictures of each prompt")
                checkpoint = gradio.Dropdown(choices(runs), value="builtin", label="Checkpoint")
            with gradio.Column():
                picture = gradio.Image(
                    show_label=False, format="png", interactive=False, buttons=["download", "fullscreen"]
                )
                state = gradio.Textbox("", label="Progress", interactive=False)
                files = gradio.Files(label="Pictures, film, attention maps and settings", interactive=False)
        inputs = [checkpoint, prompt, negative, scale, sampler, steps, seed, count]
        work = button.click(draw, inputs, [picture, state, files], concurrency_limit=1, show_progress="hidden")
        stop.click(lambda: "stopped", outputs=state, cancels=[work])
        blocks.load(lambda: gradio.Dropdown(choices(runs)), outputs=checkpoint)
    return blocks


def demo(arguments: list[str] | None = None) -> None:
    """Open a page that samples."""
    parser = argparse.ArgumentParser(description="Open a page in the browser that samples.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where checkpoints are (default: %(default)s)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 lets all machines in, without a password (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="only say where the page is")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the page needs gradio; install it: pip install "cond_diffusion[demo]"')
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody
    import gradio

    of_system = gradio.themes.Default(  # pyright: ignore[reportPrivateImportUsage]
        font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )
    try:
        page(options.runs).launch(
            server_name=options.host,
            server_port=options.port,
            inbrowser=not options.no_browser,
            theme=of_system,  # whose fonts need not be fetched
        )
    except (OSError, OverflowError) as error:
        where = f"--host {options.host} --port {options.port}"
        raise UserError(f"{where}: cannot be listened on ({first_line(error)}); give another") from error
