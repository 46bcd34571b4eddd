"""The demo page in a browser."""

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

from cond_diffusion.cli.demo import generate_in_thread, list_checkpoints
from cond_diffusion.config.sampling import GenerationSettings, SamplingOptions
from cond_diffusion.errors import UserError
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL
from cond_diffusion.pipeline.generate import read_settings

QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running demo whose runs folder has one run."""
    if shutil.which("chromium") is None:
        message = "the tests of the demo require Chromium; install it with: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(BUILT_IN_MODEL, folder / "runs" / "digits" / "checkpoints" / "step-00000001")
    port = free_port()
    # Lower priority than the browser: on a shared core, the browser would otherwise show only the last image.
    command = ["nice", "-n", "19", sys.executable, "-m", "cond_diffusion", "demo", "--port", str(port), "--no-browser"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
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
def test_page_shows_intermediate_steps_and_the_final_images(page: Page, tmp_path: Path):
    page.evaluate(RECORD_IMAGES)
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
    for name in ("pictures.png", "film.webp", "words.png", "settings.json"):
        with page.expect_download() as download:
            page.locator(f"a[download='{name}']").click()
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    assert read_settings(str(tmp_path / "pictures.png"), "")["prompts"] == ["a digit seven", "a digit two"]
    page.screenshot(path=tmp_path / "page.png")


@pytest.mark.slow
def test_page_shows_errors_and_lists_runs(page: Page):
    page.get_by_label("Prompt", exact=True).fill("  ")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("prompts: none given")).to_be_visible(timeout=60_000)
    page.get_by_label("Checkpoint").click()
    expect(page.get_by_role("option", name="runs/digits")).to_be_visible()


def test_closing_the_generator_stops_sampling(tmp_path: Path):
    sampling = SamplingOptions(sampler="ddim", steps=1000)
    settings = GenerationSettings(prompts=("a digit seven",), sampling=sampling)
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


def test_only_runs_with_a_checkpoint_are_listed(tmp_path: Path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for name in ("complete", "clip"):  # the checkpoints of `pretrain-clip` are not models
        (tmp_path / name / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "complete" / "checkpoints" / "step-00000001" / "model_index.json").touch()
    assert list_checkpoints(tmp_path) == ["builtin", str(tmp_path / "complete")]
    assert list_checkpoints(tmp_path / "nowhere") == ["builtin"]
