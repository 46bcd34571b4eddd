"""The demo page in a browser."""

import asyncio
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse
from io import BytesIO
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from conftest import free_port
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from cond_diffusion.cli import commands, demo
from cond_diffusion.cli.demo import generate_in_thread, list_checkpoints
from cond_diffusion.config.sampling import GenerationSettings
from cond_diffusion.errors import UserError
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL
from cond_diffusion.pipeline.generate import read_settings

QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for temporary files of the demo."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, temporary: Path) -> Iterator[str]:
    """The address of a running demo whose runs folder has one run."""
    if shutil.which("chromium") is None:
        message = "the tests of the demo require Chromium; install it with: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("page")
    run = folder / "runs" / "digits" / "checkpoints" / "step-00000001"
    shutil.copytree(BUILT_IN_MODEL, run)
    index = json.loads((run / "model_index.json").read_text(encoding="utf-8"))
    (run / "model_index.json").write_text(json.dumps(index | {"guidance_scale": 12.5}), encoding="utf-8")
    port = free_port()
    # Lower priority than the browser: on a shared core, the browser would otherwise show only the last image.
    command = ["nice", "-n", "19", sys.executable, "-m", "cond_diffusion", "demo", "--port", str(port), "--no-browser"]
    command += ["--allow-host", "Digits.example"]
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")  # where nothing listens
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", **proxies}
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **output) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{port}"
        assert url in next((line for line in server.stdout if "http" in line), "")  # printed once it listens
        yield url
        server.terminate()
        assert server.wait(60) == 128 + signal.SIGTERM
        assert not any(temporary.glob("cond-diffusion-*"))


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    """The page in a browser; fails if the console contains errors at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        with page.expect_request("**/queue/join**"):  # sent when the page is ready for input
            page.goto(address)
        yield page
        browser.close()
    assert errors == []


# Records the address of each image that the page shows.
RECORD_IMAGES = """
window.addresses = [];
new MutationObserver(() => document.querySelectorAll("img[src*='/file=']").forEach(image => addresses.push(image.src)))
    .observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ["src"]});
"""


def download_image(page: Page, address: str) -> Image.Image:
    with Image.open(BytesIO(page.request.get(address).body())) as image:
        return image.convert("L")


@pytest.mark.slow
def test_page_shows_intermediate_steps_and_the_final_images(page: Page, temporary: Path, tmp_path: Path):
    page.evaluate(RECORD_IMAGES)
    page.get_by_label("Checkpoint").click()
    page.get_by_role("option", name="builtin").click()
    page.get_by_label("Prompt", exact=True).fill("a digit seven\na digit two")
    page.get_by_label("number input for Steps").fill("300")
    page.get_by_label("number input for Steps").press("Tab")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Progress")).to_have_value("done", timeout=120_000)
    addresses = list(dict.fromkeys(page.evaluate("addresses")))
    assert len(addresses) > 1  # intermediate steps were shown
    noise, digits = (download_image(page, address) for address in (addresses[0], addresses[-1]))
    assert noise.size == digits.size
    assert noise.tobytes() != digits.tobytes()
    low, high = digits.getextrema()
    assert low < 30
    assert high > 200
    dark = sum(digits.histogram()[:30]) / (digits.width * digits.height)
    assert dark > 0.5  # digits on black, not noise
    assert [*temporary.glob("cond-diffusion-*/shown/*")]  # removed at the end
    for name in ("images.png", "film.webp", "words.png", "settings.json"):
        with page.expect_download() as download:
            page.locator(f"a[download='{name}']").click()
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    assert read_settings(str(tmp_path / "images.png"), "")["prompts"] == ["a digit seven", "a digit two"]
    page.screenshot(path=tmp_path / "page.png")


@pytest.mark.slow
def test_one_click_on_an_example_generates_it(page: Page):
    page.evaluate(RECORD_IMAGES)
    page.get_by_label("Prompt", exact=True).fill("something else")
    scale, of_phrases = (
        page.get_by_label(f"number input for Guidance {what}") for what in ("scale", "by separate phrases")
    )
    expect(scale).to_have_value("5")
    expect(of_phrases).to_have_value("0.6")
    page.get_by_label("Checkpoint").click()
    page.get_by_role("option", name="builtin").click()
    expect(scale).to_have_value("1.5")  # the model's defaults
    expect(of_phrases).to_have_value("0")
    page.get_by_role("button", name="a penguin, twemoji style").click()
    expect(page.get_by_label("Progress")).to_have_value("done", timeout=120_000)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a penguin, twemoji style")
    expect(page.get_by_label("Checkpoint")).to_have_value("emoji")
    expect(scale).to_have_value("5")
    expect(of_phrases).to_have_value("0.6")
    addresses = page.evaluate("addresses")
    with Image.open(BytesIO(page.request.get(addresses[-1]).body())) as image:
        assert image.mode == "RGB"  # the built-in digits are grayscale
        assert image.width >= 4 * 64


@pytest.mark.slow
def test_page_shows_errors_and_lists_runs(page: Page):
    page.get_by_label("Prompt", exact=True).fill("  ")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("prompts: none given")).to_be_visible(timeout=60_000)
    page.get_by_label("Checkpoint").click()
    page.get_by_role("option", name="runs/digits").click()
    expect(page.get_by_label("number input for Guidance scale")).to_have_value("12.5")  # the model's default
    page.get_by_label("Prompt", exact=True).fill("a digit seven")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Progress")).to_have_value("done", timeout=120_000)


@pytest.mark.slow
def test_the_page_is_opened_by_an_allowed_name_and_no_other(address: str):
    for name, status in (("digits.example", 200), ("other.example", 400)):
        connection = HTTPConnection(address.removeprefix("http://"))
        connection.request("GET", "/config", headers={"Host": name, "Origin": f"https://{name}"})
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.parametrize(
    ("origin", "is_own"),
    [
        ("https://digits.example", True),
        ("https://digits.example:8443", True),
        ("https://a.b.wild.example", True),
        ("http://[fd00::5]:80", True),
        ("http://localhost:7860", True),  # the header `host`
        ("http://localhost:7861", False),
        ("https://wild.example.evil", False),
        ("https://evil-digits.example", False),
        ("http://[fd00::6]", False),
        ("http://d", False),
        ("null", False),
        ("", False),
    ],
)
def test_the_origin_of_a_request_is_that_of_the_page(origin: str, is_own: bool):
    answers: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answers.append("page")

    async def send(message: dict[str, Any]) -> None:
        answers.append(str(message.get("status", "")))

    page = demo.SameOrigin(app, Counter(), ["digits.example", "*.wild.example", "[fd00::5]"])
    headers = [(b"host", b"localhost:7860"), (b"origin", origin.encode())]
    asyncio.run(page({"type": "http", "headers": headers, "query_string": b"", "path": "/"}, None, send))
    assert answers == (["page"] if is_own else ["403", ""])


@pytest.mark.parametrize("name", ["a*b", "*", "*.", "*a.b", "https://digits.example", "digits.example:8443", "a b", ""])
def test_a_name_that_no_request_has_is_a_user_error(name: str):
    with pytest.raises(UserError, match=r"^--allow-host: .*; expected a name such as"):
        commands.demo(["--allow-host", name])


def test_closing_the_generator_stops_sampling(tmp_path: Path):
    settings = GenerationSettings(prompts=("a digit seven",), sampler="ddim", steps=1000)
    updates = generate_in_thread(tmp_path, settings)
    image, state, files = next(updates)
    assert image is not None
    assert (state, files) == ("step 1 of 1000", [])
    updates.close()
    for thread in threading.enumerate():
        if thread.name == "generate":
            thread.join()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="nowhere"):
        next(generate_in_thread(tmp_path, replace(settings, checkpoint="nowhere")))


@pytest.fixture
def connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPConnection]:
    """A connection to a page whose jobs never end by themselves."""
    monkeypatch.setattr(demo, "generate_in_thread", endless)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))
    port = free_port()
    page = demo.serve(
        tmp_path, tmp_path, "127.0.0.1", port, ["digits.example"], prevent_thread_lock=True, quiet=True, inbrowser=False
    )
    # Gradio asks whether the function is a generator, which the check of types of the tests hides.
    page.fns[0].fn, page.fns[0].types_generator = inspect.unwrap(page.fns[0].fn), True
    yield HTTPConnection("127.0.0.1", port)
    page.close()


jobs: Queue[str] = Queue()


def endless(folder: Path, settings: GenerationSettings) -> Iterator[demo.Update]:
    jobs.put("started")
    try:
        while True:
            yield None, "working", []
            threading.Event().wait(demo.POLL_SECONDS)  # as a step takes; the server would not notice anything else
    finally:
        jobs.put("stopped")


def join(connection: HTTPConnection, session: str, **headers: str) -> HTTPResponse:
    data = ["builtin", "seven", "", 3.0, 0.0, "ddim", 20, 0, 1]
    body = json.dumps({"data": data, "fn_index": 0, "session_hash": session})
    connection.request("POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    response.read()
    return response


@pytest.mark.slow
def test_requests_of_other_sites_and_uploads_are_refused(connection: HTTPConnection, tmp_path: Path):
    own = f"{connection.host}:{connection.port}"
    for name, value in (("Host", "evil.example"), ("Origin", "http://evil.example"), ("Origin", "null")):
        for path in ("/", "/config", "/gradio_api/upload", "/gradio_api/queue/data?session_hash=x"):
            connection.request("GET", path, headers={name: value})
            response = connection.getresponse()
            response.read()
            assert response.status in (400, 403), (name, value, path)
        assert join(connection, "x", **{name: value}).status in (400, 403)
    connection.request("GET", "/config", headers={"Origin": "https://digits.example"})  # through a proxy
    response = connection.getresponse()
    response.read()
    assert response.status == 200
    boundary = '--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nmuch\r\n--b--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=b", "Origin": f"http://{own}"}
    connection.request("POST", "/gradio_api/upload", boundary, kind)
    assert connection.getresponse().status == 413
    assert jobs.empty()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_job_runs_only_while_its_client_listens(connection: HTTPConnection, monkeypatch: pytest.MonkeyPatch):
    listens = threading.Event()
    monkeypatch.setattr(demo, "sleep", lambda _: listens.wait(60))
    assert join(connection, "gone").status == 200  # it never listens, and the next job waits for it
    listener = HTTPConnection(connection.host, connection.port)
    assert join(connection, "here", Origin=f"http://{connection.host}:{connection.port}").status == 200
    listener.request("GET", "/gradio_api/queue/data?session_hash=here")
    response = listener.getresponse()
    response.readline()
    listens.set()
    assert jobs.get(timeout=120) == "started"
    while b"working" not in response.readline():
        pass
    response.close()
    listener.close()
    assert jobs.get(timeout=120) == "stopped"
    assert jobs.empty()


def test_only_runs_with_a_checkpoint_are_listed(tmp_path: Path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "clip" / "checkpoints" / "step-00000001").mkdir(parents=True)  # of `pretrain-clip`, not a model
    shutil.copytree(BUILT_IN_MODEL, tmp_path / "complete" / "checkpoints" / "step-00000001")
    assert list_checkpoints(tmp_path) == ["emoji", "builtin", str(tmp_path / "complete")]
    assert list_checkpoints(tmp_path / "nowhere") == ["emoji", "builtin"]
