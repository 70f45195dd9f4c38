"""The demo in headless Chromium, against its own server: upload, switch, compare, and two files that are refused.

Skipped without playwright (the extra `browser`) or without a Chromium on the PATH. SCREENSHOTS=folder takes the
README's pictures into docs/app/, of the runs of the checkout in that folder: `make demo`, `make browser SCREENSHOTS=.`
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.engine.web_demo.tiny_app import photo, png, write_runs
from tests.tiny_training import environment

pytest.importorskip("streamlit", reason="the demo in a browser needs the extra `app`")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
]
OFFLINE = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
PATIENCE = 60_000  # milliseconds
SCREENSHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if SCREENSHOTS:
        return Path(SCREENSHOTS).resolve()
    root = tmp_path_factory.mktemp("browser")
    write_runs(root)
    shutil.copytree(ROOT / ".streamlit", root / ".streamlit")  # it is looked for where the server is started
    return root


@pytest.fixture(scope="module")
def address(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://localhost:{port}"
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app.py"), "--server.port", str(port)]
    with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{url}/_stcore/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield url
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(OFFLINE))
        page = browser.new_page(viewport={"width": 1400, "height": 1150})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        yield page
        browser.close()


def settle(page) -> None:
    """Until the script has run to its end."""
    page.wait_for_timeout(300)
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()


def enhanced(page) -> str:
    """The address of the enhanced picture, which names its content."""
    settle(page)
    return page.locator("img").nth(1).get_attribute("src")


def take(page, name: str) -> None:
    if SCREENSHOTS:
        page.wait_for_timeout(2000)  # tables and charts are drawn after the script has ended
        (ROOT / "docs" / "app").mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.save(ROOT / "docs" / "app" / f"{name}.jpg", quality=82)


def test_switch_and_compare(page):
    page.get_by_text("Latency", exact=True).wait_for()
    before = enhanced(page)
    page.get_by_text("Local contrast (CLAHE)", exact=True).click()
    after = enhanced(page)
    assert before != after
    whole = page.locator("img").last
    divided = whole.get_attribute("src")
    handle = page.get_by_role("slider", name="Divider")
    handle.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    settle(page)
    page.wait_for_timeout(1000)
    assert handle.input_value() == "40"
    assert page.locator("img").last.get_attribute("src") != divided
    take(page, "compare")


def upload(page, name: str, data: bytes) -> None:
    page.get_by_text("upload", exact=True).click()
    settle(page)
    page.locator('input[type="file"]').set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def test_upload(page):
    upload(page, "mine.png", photo(1600, 1200, "PNG"))  # 5.7 MB: more than the parser keeps in memory by itself
    page.get_by_text("mine.png").first.wait_for()
    page.get_by_text("Latency", exact=True).wait_for()
    settle(page)
    assert page.locator('[data-testid="stAlert"]').count() == 0
    assert page.locator("img").first.evaluate("image => image.naturalWidth / image.naturalHeight") == pytest.approx(
        4 / 3, abs=0.01
    )


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("broken.png", photo(kind="PNG")[:-300], "truncated picture"),
        ("bomb.png", png(10_000, 10_000), "too large, 10000 x 10000"),
    ],
    ids=["broken", "100 MP"],
)
def test_an_upload_is_refused_politely(page, name, data, expected):
    page.reload()
    page.get_by_text("Latency", exact=True).wait_for()
    upload(page, name, data)
    page.locator('[data-testid="stAlert"]', has_text=expected).wait_for()  # until the file came, it asks for one
    settle(page)
    assert page.locator('[data-testid="stAlert"]').count() == 1 and page.locator("img").count() == 0
    assert page.locator('[data-testid="stException"]').count() == 0


def test_what_distillation_did(page):
    page.reload()
    page.set_viewport_size({"width": 1400, "height": 2500})
    page.get_by_text("What distillation did", exact=True).click()
    page.get_by_text("Where the maps are strong").wait_for()
    settle(page)
    page.get_by_test_id("stVegaLiteChart").first.wait_for()
    assert page.locator("img").count() >= 1
    take(page, "distillation")
