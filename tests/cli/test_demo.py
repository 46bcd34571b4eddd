"""The page, in a real browser."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from conftest import free_port
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from cond_diffusion.cli.demo import choices, drawn
from cond_diffusion.config.sampling import GenerationSettings, SamplingOptions
from cond_diffusion.errors import UserError
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL
from cond_diffusion.pipeline.generate import read_settings

QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running page, with a run beside it."""
    if shutil.which("chromium") is None:
        needed = "the page's tests need Chromium; install it: apt-get install chromium"
        pytest.fail(needed) if os.environ.get("CI") else pytest.skip(needed)
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(BUILT_IN_MODEL, folder / "runs" / "digits" / "checkpoints" / "step-00000001")
    port = free_port()
    # Behind the browser where they share a core, which would else be shown the last picture only.
    words = ["nice", "-n", "19", sys.executable, "-m", "cond_diffusion", "demo", "--port", str(port), "--no-browser"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        url = f"http://127.0.0.1:{port}"
        while True:
            assert server.poll() is None, server.stdout.read() if server.stdout else ""
            try:
                urlopen(url).close()
                break
            except URLError:
                time.sleep(0.2)
        yield url
        server.terminate()


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    """The page in a browser, whose console has no errors in the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        with page.expect_request("**/queue/join**"):  # what the page asks for when it is ready to be typed in
            page.goto(address)
        yield page
        browser.close()
    assert errors == []


# Takes down the address of every picture that the page shows.
TAKE_DOWN = """
window.seen = [];
new MutationObserver(() => document.querySelectorAll("img[src*='/file=']").forEach(image => seen.push(image.src)))
    .observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ["src"]});
"""


def shown(page: Page, address: str) -> Image.Image:
    """The picture itself, without what the page lays over it."""
    with Image.open(BytesIO(page.request.get(address).body())) as picture:
        return picture.convert("L")


@pytest.mark.slow
def test_a_prompt_becomes_a_picture_that_forms_on_the_page(page: Page, tmp_path: Path):
    page.evaluate(TAKE_DOWN)
    page.get_by_label("Prompt", exact=True).fill("a digit seven\na digit two")
    page.get_by_label("number input for Steps").fill("300")
    page.get_by_label("number input for Steps").press("Tab")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_label("Progress")).to_have_value("done", timeout=120_000)
    addresses = list(dict.fromkeys(page.evaluate("seen")))
    assert len(addresses) > 1  # it formed while the chain ran
    noise, digits = (shown(page, address) for address in (addresses[0], addresses[-1]))
    assert noise.size == digits.size
    assert noise.tobytes() != digits.tobytes()
    low, high = digits.getextrema()
    assert low < 30
    assert high > 200
    dark = sum(digits.histogram()[:30]) / (digits.width * digits.height)
    assert dark > 0.5  # digits, not noise
    for name in ("pictures.png", "film.webp", "words.png", "settings.json"):
        with page.expect_download() as download:
            page.locator(f"a[download='{name}']").click()
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    assert read_settings(str(tmp_path / "pictures.png"), "")["prompts"] == ["a digit seven", "a digit two"]
    page.screenshot(path=tmp_path / "page.png")


@pytest.mark.slow
def test_bad_input_is_said_on_the_page(page: Page):
    page.get_by_label("Prompt", exact=True).fill("  ")
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_text("prompts: none given")).to_be_visible(timeout=60_000)
    page.get_by_label("Checkpoint").click()
    expect(page.get_by_role("option", name="runs/digits")).to_be_visible()


def test_whoever_leaves_stops_the_chain(tmp_path: Path):
    sampling = SamplingOptions(sampler="ddim", steps=1000)
    settings = GenerationSettings(prompts=("a digit seven",), sampling=sampling)
    chain = drawn(tmp_path, settings)
    picture, state, files = next(chain)
    assert picture is not None
    assert (state, files) == ("step 1 of 1000", [])
    chain.close()
    for thread in threading.enumerate():
        if thread.name == "drawing":
            thread.join()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="there is no checkpoint nowhere"):
        next(drawn(tmp_path, replace(settings, checkpoint="nowhere")))


def test_runs_with_a_checkpoint_can_be_chosen(tmp_path: Path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert choices(tmp_path) == ["builtin", str(tmp_path / "whole")]
    assert choices(tmp_path / "nowhere") == ["builtin"]
