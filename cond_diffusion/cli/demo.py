"""The page of the command `demo`, which generates images (an optional dependency: Gradio)."""

import os
import re
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from time import sleep
from typing import Any, get_args
from urllib.parse import parse_qs

from PIL import Image
from psutil import net_if_addrs

from cond_diffusion.config.sampling import GenerationSettings, SamplerName
from cond_diffusion.diffusion.samplers import Step
from cond_diffusion.errors import UserError, user_errors
from cond_diffusion.files import write_json
from cond_diffusion.images import enlarged, grid, to_pillow
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODELS, open_checkpoint
from cond_diffusion.pipeline.generate import generate_to_file, read_settings
from cond_diffusion.pipeline.run_folder import INDEX_NAME, checkpoints

MIN_WIDTH = 448  # pixels; smaller grids are enlarged
MAX_PROMPTS = 16
MAX_SCALE = 10  # of the slider, unless a model's default is larger
FIRST_CHECKPOINT = "emoji"
EXAMPLES = (
    *("a red apple, 3d style", "a cat face, noto style", "a purple heart, glossy style", "a penguin, twemoji style"),
    *("a green book, flat style", "a rocket, 3d style", "a blue circle, twemoji style", "a house, blob style"),
)
# The settings that the page has an input for, in the order of the inputs.
INPUTS = (
    *("checkpoint", "prompts", "negative_prompt", "guidance_scale", "phrase_guidance"),
    *("sampler", "steps", "seed", "num_images"),
)
POLL_SECONDS = 0.1
LISTEN_SECONDS = 10  # from a request until its client listens for the results

Update = tuple[Image.Image | None, str, list[str]]
"""State of the page: the image grid, the progress text, and the files to download."""


class ClientDisconnected(Exception):
    """The client closed the page or stopped the generation, or the server ends."""


class SameOrigin:
    """ASGI middleware that refuses requests of other sites' pages, and counts the open streams of results of each
    session in `listening`. Proxies may replace the name in the header `host`, so `other_hosts` are names of the page.

    Gradio only withholds its responses from other sites, after it has done what they ask for.
    """

    def __init__(self, app: Any, listening: Counter[str], other_hosts: Collection[str] = ()) -> None:
        self.app, self.listening = app, listening
        self.other_hosts = [name.strip("[]") for name in other_hosts]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        origin = headers.get(b"origin", "").partition("//")[2]
        host = re.sub(r":\d+$", "", origin).strip("[]")
        is_own = origin == headers.get(b"host") or any(
            host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in self.other_hosts
        )
        if b"origin" in headers and not is_own:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"requests from other sites are refused"})
            return
        is_stream = scope.get("path", "").endswith("/queue/data")
        sessions = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", []) if is_stream else []
        self.listening.update(sessions)
        try:
            await self.app(scope, receive, send)
        finally:
            self.listening.subtract(sessions)


closing = Event()  # set when the server ends: it would wait for the threads


def generate_in_thread(folder: Path, settings: GenerationSettings) -> Iterator[Update]:
    """Generate images in a thread, write the files into `folder`, and yield updates of the page until it ends."""
    updates: Queue[Update | Exception | None] = Queue()
    stopped = Event()

    def callback_on_step_end(step: Step, number: int, total: int) -> None:
        if stopped.is_set() or closing.is_set():
            raise ClientDisconnected
        if updates.empty():  # otherwise the page has not shown the previous step yet
            image = enlarged(grid(to_pillow(step.x), settings.num_images), MIN_WIDTH)
            updates.put((image, f"step {number + 1} of {total}", []))

    def generate() -> None:
        try:
            names = {"output": "images.png", "film": "film.webp", "attention_maps": "words.png"}
            outputs: Any = {option: str(folder / name) for option, name in names.items()}
            paths = generate_to_file(settings, **outputs, labels=False, callback_on_step_end=callback_on_step_end)
            files = [next(paths), folder / "settings.json"]
            write_json(files[1], read_settings(str(files[0]), "settings"))
            state = "done"
            try:
                files += paths
            except UserError as error:  # for example an animation that is too large; the images are complete
                state = f"done, but {error}"
            with Image.open(files[0]) as image:
                updates.put((enlarged(image, MIN_WIDTH), state, [str(file) for file in files]))
        except ClientDisconnected:
            pass
        except Exception as error:  # raised again below, in the thread of the caller
            updates.put(error)
        finally:
            updates.put(None)

    Thread(target=generate, name="generate").start()
    try:
        for update in iter(updates.get, None):
            if isinstance(update, Exception):
                raise update
            yield update
    finally:
        stopped.set()  # without joining the thread: Gradio closes this generator in its event loop


def list_checkpoints(runs: Path) -> list[str]:
    """Return the built-in models, `FIRST_CHECKPOINT` first, and the run folders with a checkpoint, the newest first."""
    folders = runs.iterdir() if runs.is_dir() else ()
    found = [path for path in folders if any((folder / INDEX_NAME).exists() for folder in checkpoints(path))]
    built_in = dict.fromkeys([FIRST_CHECKPOINT, *BUILT_IN_MODELS])
    return [*built_in, *map(str, sorted(found, key=lambda path: path.stat().st_mtime, reverse=True))]


def build_page(runs: Path, folder: Path, listening: Counter[str]) -> Any:
    """Return the page as a `gradio.Blocks`. `folder` holds the files of a request until Gradio has copied them; a
    session without open streams of results in `listening` has left."""
    import gradio  # an optional dependency

    def generate(request: gradio.Request, *values: Any) -> Iterator[Update]:
        options = dict(zip(INPUTS, values, strict=True))
        prompts = [line.strip() for line in options["prompts"].splitlines() if line.strip()]
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            message = f"prompts: {len(prompts) or 'none'} given; expected 1 to {MAX_PROMPTS}"
            raise gradio.Error(message, print_exception=False)
        options |= {"prompts": tuple(prompts), "seed": options["seed"] or 0}  # None in an empty field
        yield None, "loading", []
        for _ in range(int(LISTEN_SECONDS / POLL_SECONDS)):
            if listening[str(request.session_hash)]:
                break
            sleep(POLL_SECONDS)
        else:
            return  # Gradio notices that a client leaves, but not that it never listened
        try:
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as job:
                for update in generate_in_thread(Path(job), GenerationSettings(**options)):
                    if not listening[str(request.session_hash)]:
                        return
                    yield update  # Gradio copies the files
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    def guidance_of(checkpoint: str) -> tuple[float, float]:
        try:
            guidance = open_checkpoint(checkpoint).guidance
            return guidance["guidance_scale"], guidance["phrase_guidance"]
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    def show_guidance(checkpoint: str) -> tuple[Any, float]:
        scale, of_phrases = guidance_of(checkpoint)
        return gradio.Slider(value=scale, maximum=max(MAX_SCALE, scale)), of_phrases

    first_guidance = guidance_of(FIRST_CHECKPOINT)
    with gradio.Blocks(title="cond_diffusion", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.Markdown("# cond_diffusion\nOne prompt per line; each gives a row of images.")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(EXAMPLES[0], label="Prompt", lines=2)
                with gradio.Row():
                    examples = [gradio.Button(example, size="sm", min_width=120) for example in EXAMPLES]
                negative = gradio.Textbox("", label="Negative prompt")
                button = gradio.Button("Generate", variant="primary")
                stop = gradio.Button("Stop")
                scale = gradio.Slider(0, MAX_SCALE, first_guidance[0], step=0.5, label="Guidance scale")
                of_phrases = gradio.Slider(0, 1, first_guidance[1], step=0.1, label="Guidance by separate phrases")
                sampler = gradio.Dropdown(list(get_args(SamplerName)), value="dpm_solver", label="Sampler")
                steps = gradio.Slider(1, 1000, 20, step=1, label="Steps")
                seed = gradio.Number(0, label="Seed", precision=0)
                count = gradio.Slider(1, 16, 4, step=1, label="Images per prompt")
                checkpoint = gradio.Dropdown(list_checkpoints(runs), value=FIRST_CHECKPOINT, label="Checkpoint")
            with gradio.Column():
                buttons: Any = ["download", "fullscreen"]
                image = gradio.Image(show_label=False, format="png", interactive=False, buttons=buttons)
                state = gradio.Textbox("", label="Progress", interactive=False)
                files = gradio.Files(label="Images, animation, attention maps and settings", interactive=False)
        guidance = [scale, of_phrases]
        inputs = [checkpoint, prompt, negative, *guidance, sampler, steps, seed, count]
        outputs = [image, state, files]
        hidden: Any = {"show_progress": "hidden", "api_visibility": "private"}
        options: Any = {"concurrency_limit": 1, "concurrency_id": "generate", **hidden}
        events: list[Any] = [button.click(generate, inputs, outputs, **options)]
        for text, example in zip(EXAMPLES, examples, strict=True):
            values, changed = (text, FIRST_CHECKPOINT, *first_guidance), [prompt, checkpoint, *guidance]
            chosen = example.click(partial(tuple, values), outputs=changed, api_visibility="private")
            events.append(chosen.then(generate, inputs, outputs, **options))
        stop.click(lambda: "stopped", outputs=state, cancels=events)
        checkpoint.input(show_guidance, checkpoint, guidance, **hidden)
        blocks.load(lambda: gradio.Dropdown(list_checkpoints(runs)), outputs=checkpoint)
    return blocks


def serve_until_stopped(runs: Path, host: str, port: int, other_hosts: Collection[str], inbrowser: bool) -> None:
    """Set up the process for the page and its files, and serve it until the process is interrupted or ended."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    # Gradio opens the page once at the start, which must not pass through a proxy.
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = ",".join(filter(None, [no_proxy, "localhost", "127.0.0.1", host]))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="cond-diffusion-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "shown"))
        tempfile.tempdir = folder  # images whose folder is gone because their client left are written there
        try:
            serve(runs, Path(folder), host, port, other_hosts, inbrowser=inbrowser)
        finally:
            closing.set()


def serve(runs: Path, folder: Path, host: str, port: int, other_hosts: Collection[str] = (), **options: Any) -> Any:
    """Start the server with options of `gradio.Blocks.launch`, and return the page. Requests may be addressed to this
    machine or to `other_hosts`."""
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # of the system: not downloaded
    theme = gradio.themes.Default(**fonts)  # pyright: ignore[reportPrivateImportUsage]
    listening: Counter[str] = Counter()
    # A site whose name resolves to this machine (DNS rebinding) has another name in its requests.
    addresses = [address.address for interface in net_if_addrs().values() for address in interface]
    names = {"localhost", host, socket.gethostname(), socket.getfqdn(), *addresses, *other_hosts}
    names |= {f"[{name}]" for name in names if ":" in name}
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=[*names], www_redirect=False),
        Middleware(SameOrigin, listening, other_hosts),
    ]
    what = f"--host {host} --port {port}: cannot listen there"
    with user_errors(what, OSError, OverflowError, hint="; choose another port or host"):
        page = build_page(runs, folder, listening)
        launch = {"app_kwargs": {"middleware": middleware}, "theme": theme, **options}
        page.launch(server_name=host, server_port=port, max_file_size=1, **launch)  # the page uploads nothing
    return page
