"""The demo in a browser, without one: Streamlit runs the script and hands back what it would show."""

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.training.test_distilled_training import TERMS
from tests.engine.web_demo.tiny_app import photo, png, write_runs

pytest.importorskip("streamlit", reason="the demo in a browser needs the extra `app`")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder as the demo is started in; nobody changes it."""
    root = tmp_path_factory.mktemp("app")
    write_runs(root)
    return root


@pytest.fixture
def start(monkeypatch):
    """start(folder): the demo, started there."""
    from streamlit.testing.v1 import AppTest

    def start(folder: Path) -> AppTest:
        monkeypatch.chdir(folder)
        return check(AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run())

    return start


def check(app):
    assert not app.exception, app.exception
    return app


def pictures(app) -> dict[str, str]:
    """What identifies each picture on the page, by its caption."""
    return {image.captions[0]: image.value[0] for image in app.image}


def errors(app) -> str:
    return " ".join(error.value for error in check(app).error)


def total(app) -> list[int]:
    """Detections of the left and the right model."""
    return app.dataframe[0].value.iloc[-1, 1:].tolist()


LEFT, RIGHT = "baseline_seed0", "distilled_seed0"  # titles: names without the folder they share
STUDY = "study"


def test_two_models_stand_side_by_side(start, runs):
    app = start(runs)
    assert (app.selectbox(key="left").value, app.selectbox(key="right").value) == (
        f"{STUDY}/{LEFT}",
        f"{STUDY}/{RIGHT}",
    )
    assert list(pictures(app))[:4] == ["picture", "enhanced", LEFT, RIGHT]
    assert [metric.label for metric in app.metric] == [LEFT, RIGHT]
    assert all(0 < float(metric.value.removesuffix(" ms")) < 5000 for metric in app.metric)
    counts = app.dataframe[0].value
    assert list(counts.columns) == ["class", LEFT, RIGHT] and set(counts["class"]) <= {"green", "red", "all"}
    assert all(count > 0 for count in total(app))
    assert counts.iloc[:-1, 1:].sum().tolist() == total(app)


def test_any_two_models_can_be_chosen(start, runs):
    app = start(runs)
    app.selectbox(key="right").set_value(f"{STUDY}/{LEFT}").run()
    assert errors(app) == "" and total(app) == [total(app)[0]]  # one model, so one column


def test_every_switch_changes_the_enhanced_picture_alone(start, runs):
    app = start(runs)
    app.selectbox(key="built_in").set_value("shapes under a warm lamp").run()
    seen = pictures(app)
    enhanced = {seen["enhanced"]}
    for number, key in enumerate(("denoise", "balance", "clahe", "gamma", "sharpen")):
        assert app.slider(key=key).disabled
        app.toggle(key=f"{key}_on").set_value(True).run()
        assert not app.slider(key=key).disabled
        now = pictures(check(app))
        assert now["picture"] == seen["picture"]
        enhanced.add(now["enhanced"])
        assert len(enhanced) == number + 2, key
        assert seen[LEFT] != now[LEFT]
    app.radio(key="balance_by").set_value("white patch").run()
    app.slider(key="gamma").set_value(0.5).run()
    assert pictures(check(app))["enhanced"] not in enhanced


def test_thresholds_sort_detections_out(start, runs):
    app = start(runs)
    before = total(app)
    app.slider(key="iou").set_value(0.05).run()
    fewer = total(check(app))
    app.slider(key="score").set_value(0.95).run()
    assert before[1] > fewer[1] > 0 and before[0] >= fewer[0] > 0
    assert total(check(app)) == [0, 0]


def test_the_divider_moves_between_two_of_the_pictures(start, runs):
    app = start(runs)
    divided = lambda: next(url for title, url in pictures(check(app)).items() if "|" in title)
    seen = {divided()}
    app.slider(key="divider").set_value(20).run()
    seen.add(divided())
    app.selectbox(key="wipe_left").set_value("picture").run()
    seen.add(divided())
    assert len(seen) == 3 and f"picture | {RIGHT}" in pictures(app)


def test_pictures_of_the_test_split(start, runs):
    app = start(runs)
    first = pictures(app)["picture"]
    app.radio(key="source").set_value("test split").run()
    assert app.selectbox(key="test").options == [f"{number:03}.png" for number in range(8)]
    second = pictures(check(app))["picture"]
    app.selectbox(key="test").set_value("005.png").run()
    assert len({first, second, pictures(check(app))["picture"]}) == 3


def upload(app, name: str, data: bytes):
    app.radio(key="source").set_value("upload").run()
    app.file_uploader(key="upload").upload(name, data).run()
    return check(app)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_upload(start, runs, kind):
    app = start(runs)
    before = pictures(app)["picture"]
    app.radio(key="source").set_value("upload").run()
    assert "Choose a picture" in app.info[0].value and not app.image
    upload(app, f"mine.{kind.lower()}", photo(kind=kind))
    assert errors(app) == "" and pictures(app)["picture"] != before and len(app.metric) == 2


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param(
            png(10_000, 10_000), "too large, 10000 x 10000, expected a picture of at most 24,000,000", id="100 MP"
        ),
        pytest.param(png(60_000, 60_000), "too large", id="3600 MP"),
        pytest.param(photo()[:-300], "truncated picture", id="truncated"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "truncated or broken header", id="header"),
        pytest.param(b"GIF89a and more", "a picture in GIF format, expected a JPEG, PNG", id="gif"),
        pytest.param(b"some text and more", "not a picture", id="text"),
        pytest.param(b"", "empty file", id="empty"),
        pytest.param(photo() + bytes(10 * 2**20), "10.0 MB, expected a picture of at most 10 MB", id="heavy"),
    ],
)
def test_an_upload_is_refused_politely(start, runs, data, expected):
    app = start(runs)
    upload(app, "mine.png", data)
    assert expected in errors(app) and "the uploaded file" in errors(app)
    assert not app.image and not app.metric
    app.radio(key="source").set_value("built in").run()
    assert errors(app) == "" and len(app.metric) == 2


def test_a_large_upload_is_shrunk(start, runs):
    app = start(runs)
    upload(app, "mine.jpg", photo(3000, 1000))
    assert errors(app) == "" and len(app.metric) == 2


def test_uploads_stay_in_memory(start, runs, monkeypatch):
    """A form with a file of the largest size passes through the server's parser without a temporary file."""
    from starlette.requests import Request

    start(runs)
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: pytest.fail("written to disk"))
    data = bytes(10 * 2**20)
    head = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
    body = head + data + b"\r\n--x--\r\n"
    scope = {"type": "http", "method": "PUT", "headers": [(b"content-type", b"multipart/form-data; boundary=x")]}

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def parse():
        async with Request(scope, receive).form() as form:
            return len(await form["f"].read())

    assert asyncio.run(parse()) == len(data)


def test_without_a_model_it_says_what_to_do(start, tmp_path):
    app = start(tmp_path)
    assert "no trained model" in app.info[0].value and app.code[0].value == "make demo"
    assert not app.selectbox


def test_a_damaged_checkpoint_and_a_lost_dataset_are_named(start, runs, tmp_path):
    shutil.copytree(runs / "runs", tmp_path / "runs")
    config = tmp_path / "runs" / STUDY / RIGHT / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(runs / "data"), "gone"), encoding="utf-8")
    app = start(tmp_path)
    app.radio(key="source").set_value("test split").run()
    assert "gone" in errors(app)
    weights = tmp_path / "runs" / STUDY / LEFT / "weights"
    (weights / "last.pt").write_bytes(b"not a checkpoint")
    (weights / "last.prev.pt").unlink(missing_ok=True)
    app.radio(key="source").set_value("built in").run()
    assert "last.pt" in errors(app) and not app.image


def test_an_exported_file_beside_its_checkpoint(start, runs, exported, tmp_path):
    shutil.copytree(runs / "runs", tmp_path / "runs")
    weights = tmp_path / "runs" / STUDY / RIGHT / "weights"
    shutil.copy(exported.int8, weights / "last.int8.onnx")
    (weights / "broken.onnx").write_bytes(b"not a graph")
    app = start(tmp_path)
    assert app.selectbox(key="right").value == f"{STUDY}/{RIGHT}"
    app.selectbox(key="right").set_value(f"{STUDY}/{RIGHT}/last.int8.onnx").run()
    assert errors(app) == "" and [metric.label for metric in app.metric] == [LEFT, f"{RIGHT}/last.int8.onnx"]
    assert any("int8" in caption.value for caption in app.caption)
    open_explanation(app)
    assert app.text[0].value.startswith("0.5 x mse on p3") and app.selectbox(key="map").value == "p3"
    app.selectbox(key="left").set_value(f"{STUDY}/{RIGHT}/broken.onnx").run()
    assert "broken.onnx: damaged or not an ONNX file" in errors(app)


def open_explanation(app):
    app.radio(key="page").set_value("What distillation did").run()
    return check(app)


def test_what_distillation_did(start, runs):
    app = open_explanation(start(runs))
    taught = [text.value for text in app.text]
    assert taught[0].startswith("0.5 x mse on p3, p4, p5, from the teacher big, through an adapter conv1x1: ")
    assert len(taught) == len(TERMS) and all(not text.endswith(": ") for text in taught)
    assert any("the table of the study" in text.value for text in app.markdown)
    titles = [caption.value for caption in app.caption]
    assert {"mAP50-95", "mAP50", "mse_big", "cwd_big", "soft_class_big"} <= set(titles)
    assert app.selectbox(key="map").value == "p3" and {"p4", "p5"} <= set(app.selectbox(key="map").options)
    heat = app.image[0].value
    app.selectbox(key="map").set_value("p5").run()
    assert check(app).image[0].value != heat


def test_a_run_without_a_teacher_says_so(start, runs):
    app = open_explanation(start(runs))
    app.selectbox(key="right").set_value(f"{STUDY}/{LEFT}").run()
    assert "without a teacher" in check(app).info[0].value


def test_the_server_listens_to_this_machine_alone():
    import tomllib

    from engine.web_demo import gallery

    settings = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    assert settings["server"]["address"] == "localhost"
    assert settings["server"]["maxUploadSize"] == gallery.MAX_MEGABYTES
    assert settings["browser"]["gatherUsageStats"] is False
