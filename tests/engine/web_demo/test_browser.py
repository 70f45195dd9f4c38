"""The demo in headless Chromium, against its own server: its layout at two widths, and everything that can be done.

Skipped without playwright (the extra `browser`) or without a Chromium on the PATH. SCREENSHOTS=folder takes the
README's pictures into docs/app/, of the runs of the checkout in that folder: `make demo`, `make browser SCREENSHOTS=.`
"""

import io
import json
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
from tests.engine.web_demo.tiny_app import clip, photo, png, write_runs
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
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
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
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*OFFLINE, *CAMERA])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.context.grant_permissions(["camera"])
        page.faults = []
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(address)
        page.locator("img").nth(3).wait_for()
        settle(page)
        yield page
        browser.close()


@pytest.fixture(autouse=True)
def no_console_error(page):
    yield
    settle(page)
    faults = [*page.faults]
    page.faults.clear()
    assert faults == []


def settle(page) -> None:
    """Until the script has run to its end, and what it shows is drawn.

    Streamlit drops pictures that a later run of the script does not show: one that is fetched too late is not found.
    """
    page.wait_for_timeout(300)
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    page.wait_for_function("document.querySelectorAll('[data-testid=stSkeleton]').length == 0")
    page.wait_for_function("[...document.images].every(image => image.complete)")


def picture(page, number: int):
    """0 and 1: with detections; 2: the picture; 3: its enhanced twin. Its address names its content."""
    settle(page)
    return page.locator("img").nth(number)


def choose(page, label: str, option: str) -> None:
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=option, exact=True).click()
    settle(page)


def start_again(page) -> None:
    settle(page)
    page.reload()
    page.locator("img").nth(3).wait_for()
    settle(page)


def take(page, name: str, *, width: int = 1400, height: int = 1000, quality: int = 80) -> None:
    if SCREENSHOTS:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(3000)  # tables and charts are drawn after the script has ended
        (ROOT / "docs" / "app").mkdir(parents=True, exist_ok=True)
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        shot.save(ROOT / "docs" / "app" / f"{name}.jpg", quality=quality, optimize=True)


@pytest.mark.parametrize("width, least", [(1400, 640), (900, 400)])
def test_pictures_are_as_wide_as_the_page_allows(page, width, least):
    page.set_viewport_size({"width": width, "height": 1000})
    boxes = [picture(page, number).bounding_box() for number in range(4)]
    assert all(box["width"] >= least for box in boxes)
    assert boxes[0]["y"] == pytest.approx(boxes[1]["y"], abs=2) and boxes[0]["y"] < 420
    assert boxes[1]["x"] + boxes[1]["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_there_soon(page):
    """The server is warm: what a visitor waits for. Other load on the machine may make it longer."""
    settle(page)
    start = time.perf_counter()
    page.reload()
    page.locator("img").nth(1).wait_for()
    assert time.perf_counter() - start < float(os.environ.get("LOAD_SECONDS", "15"))


def test_switch_and_compare(page):
    take(page, "narrow", width=900)
    page.set_viewport_size({"width": 1400, "height": 1000})
    start_again(page)
    take(page, "compare")
    before = picture(page, 3).get_attribute("src")
    page.get_by_text("Enhance the picture", exact=True).click()
    settle(page)
    assert picture(page, 3).get_attribute("src") != before
    assert picture(page, 3).get_attribute("src") == picture(page, 2).get_attribute("src")
    page.get_by_text("Enhance the picture", exact=True).click()
    page.get_by_text("One against the other, with a divider").click()
    divided = page.locator("img").nth(4)
    divided.wait_for()
    settle(page)
    seen = divided.get_attribute("src")
    handle = page.get_by_role("slider", name="Divider")
    handle.focus()
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(1000)
        settle(page)
    assert handle.input_value() == "48" and divided.get_attribute("src") != seen


def test_the_result_is_downloaded(page):
    start_again(page)
    with page.expect_download() as held:
        page.get_by_role("button", name="Download both pictures").click()
    saved = Image.open(held.value.path())
    assert saved.format == "JPEG" and saved.width > 2 * saved.height * 0.8
    with page.expect_download() as held:
        page.get_by_role("button", name="Download boxes (JSON)").click()
    assert set(json.loads(Path(held.value.path()).read_text())) == {"left baseline_seed0", "right distilled_seed0"}


def upload(page, name: str, data: bytes) -> None:
    choose(page, "Picture", "upload")
    page.locator('input[type="file"]').set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def test_upload(page):
    start_again(page)
    upload(page, "mine.png", photo(1600, 1200, "PNG"))  # 5.7 MB: more than the parser keeps in memory by itself
    page.get_by_text("mine.png").first.wait_for()
    picture(page, 3).wait_for()
    assert page.locator('[data-testid="stAlert"]').count() == 0
    assert picture(page, 0).evaluate("image => image.naturalWidth / image.naturalHeight") == pytest.approx(4 / 3, 0.01)


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("broken.png", photo(kind="PNG")[:-300], "truncated picture"),
        ("bomb.png", png(10_000, 10_000), "too large, 10000 x 10000"),
    ],
    ids=["broken", "100 MP"],
)
def test_an_upload_is_refused_politely(page, name, data, expected):
    start_again(page)
    upload(page, name, data)
    page.locator('[data-testid="stAlert"]', has_text=expected).wait_for()
    settle(page)
    assert page.locator('[data-testid="stAlert"]').count() == 1 and page.locator("img").count() == 0
    assert page.locator('[data-testid="stException"]').count() == 0


def test_a_snapshot(page):
    start_again(page)
    choose(page, "Picture", "camera")
    page.get_by_role("button", name="Take Photo").click()
    page.locator('[data-testid="stImage"] img').nth(3).wait_for()
    settle(page)
    assert page.locator('[data-testid="stAlert"]').count() == 0


def test_a_short_video(page):
    start_again(page)
    choose(page, "Picture", "video")
    data = clip(seconds=0.5)
    page.locator('input[type="file"]').set_input_files({"name": "a.mp4", "mimeType": "video/mp4", "buffer": data})
    page.get_by_role("button", name="Run both models on it").click()
    page.get_by_role("button", name="Download the video").wait_for()
    page.locator("video").wait_for()


def test_weights_are_uploaded(page, folder):
    start_again(page)
    choose(page, "Right model", "another file ...")
    weights = next(folder.glob("**/distilled_seed0/weights/last.pt"))
    file = {"name": "mine.pt", "mimeType": "application/octet-stream", "buffer": weights.read_bytes()}
    page.locator('input[type="file"]').set_input_files(file)
    page.get_by_text("mAP not measured").wait_for()
    picture(page, 3).wait_for()
    assert page.locator('[data-testid="stAlert"]').count() == 0


def test_what_distillation_did(page):
    start_again(page)
    page.get_by_text("What distillation did", exact=True).click()
    page.get_by_text("Where the maps are strong").wait_for()
    settle(page)
    page.get_by_test_id("stVegaLiteChart").first.wait_for()
    drawing = page.locator("img").first
    assert drawing.bounding_box()["width"] > 1000 and drawing.evaluate("image => image.naturalHeight") > 100
    take(page, "distillation", height=2850, quality=60)
