"""The demo in a browser, without one: Streamlit runs the script and hands back what it would show."""

import asyncio
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import checkpoint
import models
from engine.web_demo import detectors, gallery, sides
from tests.conftest import ROOT
from tests.engine.training.test_distilled_training import TERMS
from tests.engine.web_demo.tiny_app import clip, photo, png, write_runs
from tests.exporting import small_rtdetr
from tests.forked_processes import run_as_main, run_forked

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
    """start(folder): the demo, started there, for this machine alone unless another address is given.

    It times each pair of models once, not for a second.
    """
    import streamlit
    from streamlit.testing.v1 import AppTest

    def start(folder: Path, address: str | None = "localhost") -> AppTest:
        option = streamlit.get_option
        monkeypatch.setattr(streamlit, "get_option", lambda k: address if k == "server.address" else option(k))
        monkeypatch.setattr(detectors, "MOST_ROUNDS", 1)
        monkeypatch.chdir(folder)
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # put back: AppTest makes the page of it
        return check(AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run())

    return start


def check(app):
    assert not app.exception, app.exception
    return app


def pictures(app) -> dict[str, str]:
    """What identifies each picture on the page: those with detections, the picture, its twin, both divided."""
    return dict(zip(("left", "right", "picture", "enhanced", "divided"), (image.value[0] for image in app.image)))


def errors(app) -> str:
    return " ".join(error.value for error in check(app).error)


def chips(app) -> list[dict[str, int]]:
    """The classes of the left and the right model, each with its number of detections."""
    rows = [html.value for html in app.html if 'class="chips"' in html.value]
    found = [re.findall(r'<span class="chip[^>]*>([^< ]+)(?: <b>(\d+)</b>)?</span>', row) for row in rows]
    return [{name: int(count or 0) for name, count in row} for row in found]


def totals(app) -> list[int]:
    return [sum(row.values()) for row in chips(app)]


def latencies(app) -> list[tuple[float, ...]]:
    """(median, least, most) in milliseconds of each model."""
    texts = [re.findall(r"[\d.]+", caption.value) for caption in app.caption if " ms (" in caption.value]
    return [tuple(map(float, numbers)) for numbers in texts]


LEFT, RIGHT = "baseline_seed0", "distilled_seed0"  # titles: names without the folder they share
STUDY = "study"
OTHER_FILE = "another file ..."


def test_started_with_python_it_names_the_command(tmp_path):
    done = run_forked(run_as_main, "app.py", folder=tmp_path)
    said = "error: app.py was started with python, expected `streamlit run app.py` or `make app`\n"
    assert (done.code, done.text) == (2, said)


def test_help_says_how_it_is_started(tmp_path):
    done = run_forked(run_as_main, "app.py", "--help", folder=tmp_path)
    assert done.code == 0 and "\n    streamlit run app.py" in done.text and "make app ADDRESS=" in done.text


def test_two_models_stand_side_by_side(start, runs):
    app = start(runs)
    assert (app.selectbox(key="left").value, app.selectbox(key="right").value) == (
        f"{STUDY}/{LEFT}",
        f"{STUDY}/{RIGHT}",
    )
    assert len(app.image) == 5 and len(set(pictures(app).values())) == 5
    assert all(0 < least <= median <= most < 60_000 for median, least, most in latencies(app))
    assert len(latencies(app)) == 2
    assert [set(row) for row in chips(app)] == [{"green", "red"}] * 2 and all(totals(app))
    facts = [text.value for text in app.markdown if "parameters" in text.value]
    score = json.loads((runs / "runs" / STUDY / RIGHT / "report.json").read_text())["test"]["mAP50-95"]
    assert len(facts) == 2 and all("yolov8_narrow, 0.8" in text and "2 classes, 64 px" in text for text in facts)
    assert "64 px, no teacher, **" in facts[0] and facts[1].endswith(f", taught by big, **mAP {score:.3f} on test**")
    assert [button.label for button in app.download_button] == ["Download both pictures", "Download boxes (JSON)"]


def test_any_two_models_can_be_chosen(start, runs):
    app = start(runs)
    app.selectbox(key="right").set_value(f"{STUDY}/{LEFT}").run()
    assert errors(app) == "" and chips(app)[0] == chips(app)[1] and len(latencies(app)) == 2


def test_every_switch_changes_the_enhanced_picture_alone(start, runs):
    app = start(runs)
    app.selectbox(key="built_in").set_value("shapes under a warm lamp").run()
    with_defaults = pictures(check(app))
    assert app.toggle(key="enhance").value and with_defaults["picture"] != with_defaults["enhanced"]
    app.toggle(key="enhance").set_value(False).run()
    seen = pictures(check(app))
    assert seen["enhanced"] == seen["picture"] == with_defaults["picture"]
    app.toggle(key="enhance").set_value(True).run()
    enhanced = {seen["enhanced"], with_defaults["enhanced"]}
    for key in ("denoise", "gamma", "sharpen"):
        assert app.slider(key=key).disabled
        app.toggle(key=f"{key}_on").set_value(True).run()
        assert not app.slider(key=key).disabled
        now = pictures(check(app))
        assert now["picture"] == seen["picture"] and now["enhanced"] not in enhanced and now["left"] != seen["left"]
        enhanced.add(now["enhanced"])
    app.radio(key="balance_by").set_value("white patch").run()
    assert pictures(check(app))["enhanced"] not in enhanced


def test_thresholds_sort_detections_out(start, runs):
    app = start(runs)
    before = totals(app)
    app.slider(key="iou").set_value(0.05).run()
    fewer = totals(check(app))
    assert before[1] > fewer[1] > 0 and before[0] >= fewer[0] > 0
    app.slider(key="score").set_value(0.95).run()
    assert totals(check(app)) == [0, 0]


def test_a_slider_that_would_change_nothing_is_disabled(start, runs, monkeypatch, tmp_path):
    """RT-DETR's boxes are not suppressed, and the page about distillation shows no boxes."""
    app = start(runs)
    app.slider(key="iou").set_value(0.5).run()
    labels = lambda: [app.slider(key=key).label for key in ("score", "iou") if not app.slider(key=key).disabled]
    assert labels() == ["Score, at least", "Overlap (IoU), at most"]
    open_explanation(app)
    assert labels() == [] and app.slider(key="score").label == "Score, not used"
    app.segmented_control(key="page").set_value("Compare two models").run()
    assert labels() == ["Score, at least", "Overlap (IoU), at most"] and app.slider(key="iou").value == 0.5
    monkeypatch.setitem(models.ARCHITECTURES, "rtdetr_r18vd", lambda num_classes: small_rtdetr())
    state = models.build("rtdetr_r18vd", 2).state_dict()
    file = {"arch": "rtdetr_r18vd", "names": ("green", "red"), "image_size": 64, "ema": state}
    checkpoint.save(tmp_path / "rtdetr.pt", file)
    choose_path(app, "left", tmp_path / "rtdetr.pt")
    assert labels() == ["Score, at least", "Overlap, right only"]
    choose_path(app, "right", tmp_path / "rtdetr.pt")
    assert errors(app) == "" and labels() == ["Score, at least"]
    assert app.slider(key="iou").label == "Overlap, not used" and "RT-DETR" in app.slider(key="iou").help


def choose_path(app, side: str, path: Path):
    app.selectbox(key=side).set_value(OTHER_FILE).run()
    app.text_input(key=f"{side}_path").set_value(str(path)).run()
    return check(app)


def test_the_first_built_in_picture_shows_what_the_model_knows(start, runs, tmp_path):
    """Until another one is chosen, and again when a model with other classes comes, or the built-in ones do again."""
    chosen = lambda: app.selectbox(key="built_in").value
    state = checkpoint.load(runs / "runs" / STUDY / RIGHT / "weights" / "last.pt")
    for names in (("cat", "sheep"), ("horse", "cow")):
        checkpoint.save(tmp_path / f"{names[0]}.pt", state | {"names": names})
    app = start(runs)
    assert chosen() == next(iter(gallery.BUILT_IN))  # none shows these classes
    choose_path(app, "right", tmp_path / "cat.pt")
    assert errors(app) == "" and chosen() == "photo: a cat"
    app.selectbox(key="built_in").set_value("shapes").run()
    app.slider(key="score").set_value(0.5).run()
    assert chosen() == "shapes"
    choose_path(app, "right", tmp_path / "horse.pt")
    assert chosen() == "photo: a pasture"
    app.selectbox(key="source").set_value("upload").run()
    app.selectbox(key="source").set_value("built in").run()
    assert errors(app) == "" and not app.warning and chosen() == "photo: a pasture"


def test_the_page_about_distillation_takes_no_video(start, runs):
    app = start(runs)
    app.selectbox(key="source").set_value("video").run()
    assert "video" not in open_explanation(app).selectbox(key="source").options
    assert errors(app) == "" and app.selectbox(key="source").value == "built in" and app.image


def test_the_divider_moves_between_two_of_the_pictures(start, runs):
    app = start(runs)
    seen = {pictures(app)["divided"]}
    app.slider(key="divider").set_value(20).run()
    seen.add(pictures(check(app))["divided"])
    app.selectbox(key="wipe_left").set_value("picture").run()
    seen.add(pictures(check(app))["divided"])
    assert len(seen) == 3 and app.image[4].captions[0] == f"picture | {RIGHT} (right)"


def test_pictures_of_the_test_split_and_of_a_folder(start, runs):
    app = start(runs)
    seen = {pictures(app)["picture"]}
    app.selectbox(key="source").set_value("test split").run()
    assert app.selectbox(key="test").options == [f"{number:03}.png" for number in range(8)]
    seen.add(pictures(check(app))["picture"])
    app.selectbox(key="test").set_value("005.png").run()
    seen.add(third := pictures(check(app))["picture"])
    assert len(seen) == 3
    app.selectbox(key="source").set_value("folder").run()
    assert not check(app).image
    app.text_input(key="folder").set_value(str(runs / "data" / "images" / "test")).run()
    app.selectbox(key="of_folder").set_value("005.png").run()
    assert errors(app) == "" and pictures(app)["picture"] == third
    app.text_input(key="folder").set_value(str(runs / "nowhere")).run()
    assert "nowhere: no such file or folder" in errors(app)


def test_others_cannot_name_files_of_this_machine(start, runs):
    app = start(runs, address="0.0.0.0")
    assert "folder" not in app.selectbox(key="source").options
    app.selectbox(key="right").set_value(OTHER_FILE).run()
    assert not check(app).text_input and len(app.file_uploader) == 1


def upload(app, name: str, data: bytes):
    app.selectbox(key="source").set_value("upload").run()
    app.file_uploader(key="upload").upload(name, data).run()
    return check(app)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_upload(start, runs, kind):
    app = start(runs)
    before = pictures(app)["picture"]
    app.selectbox(key="source").set_value("upload").run()
    assert not check(app).image
    upload(app, f"mine.{kind.lower()}", photo(kind=kind))
    assert errors(app) == "" and pictures(app)["picture"] != before and len(latencies(app)) == 2


def test_downloaded_boxes_are_in_pixels_of_the_uploaded_file(start, runs, monkeypatch):
    """The page shrinks a larger picture before it detects."""
    found = []
    monkeypatch.setattr(sides, "boxes_json", lambda rows, pair: found.extend(rows) or "{}")
    app = start(runs)
    app.slider(key="score").set_value(0.01).run()
    found.clear()
    upload(app, "large.jpg", photo(1920, 1080))
    right = max(float(rows.boxes_xyxy[:, 2].max()) for rows in found if len(rows))
    assert gallery.WORKING_SIDE + 64 < right <= 1920


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param(png(10_000, 10_000), "too large, 10000 x 10000, expected a picture of at most", id="100 MP"),
        pytest.param(photo()[:-300], "truncated picture", id="truncated"),
    ],
)
def test_an_upload_is_refused_politely(start, runs, data, expected):
    app = start(runs)
    upload(app, "mine.png", data)
    assert expected in errors(app) and "the uploaded file" in errors(app)
    assert not app.image and not latencies(app)
    app.selectbox(key="source").set_value("built in").run()
    assert errors(app) == "" and len(latencies(app)) == 2


def test_a_snapshot(start, runs):
    app = start(runs)
    app.selectbox(key="source").set_value("camera").run()
    assert not check(app).image
    app.camera_input(key="camera").upload("snapshot.jpg", photo(640, 480)).run()
    assert errors(app) == "" and len(app.image) == 5


def test_a_short_video(start, runs):
    pytest.importorskip("av")
    app = start(runs)
    app.selectbox(key="source").set_value("video").run()
    app.file_uploader(key="video").upload("clip.mp4", clip(seconds=0.5)).run()
    app.button(key="run_video").click().run()
    assert errors(app) == "" and [button.label for button in app.download_button] == ["Download the video"]


def test_weights_are_uploaded_or_named(start, runs, tmp_path):
    app = start(runs)
    app.selectbox(key="right").set_value(OTHER_FILE).run()
    assert not check(app).image
    weights = runs / "runs" / STUDY / RIGHT / "weights" / "last.pt"
    app.file_uploader(key="right_file").upload("mine.pt", weights.read_bytes()).run()
    assert errors(app) == "" and totals(app)[1] > 0 and "not measured" in app.markdown[-1].value
    uploaded = chips(app)
    app = start(runs)
    app.selectbox(key="right").set_value(OTHER_FILE).run()
    app.text_input(key="right_path").set_value(str(weights)).run()
    assert errors(app) == "" and chips(app) == uploaded
    shutil.copytree(weights.parent, tmp_path / "run" / "weights")
    app.text_input(key="right_path").set_value(str(tmp_path / "run")).run()
    assert errors(app) == "" and chips(app) == uploaded
    shutil.copyfile(runs / "runs" / STUDY / LEFT / "weights" / "last.pt", tmp_path / "run" / "weights" / "last.pt")
    app.text_input(key="right_path").run()  # the run went on: its folder is as old as before, its weights are not
    assert errors(app) == "" and chips(app) != uploaded
    app.text_input(key="right_path").set_value("nowhere.pt").run()
    assert "nowhere.pt: no such file" in errors(app) and not app.image
    app.file_uploader(key="right_file").upload("mine.pt", weights.read_bytes()[:-100]).run()
    assert "mine.pt: " in errors(app) and not app.image


def test_uploads_stay_in_memory(start, runs, monkeypatch):
    """A form with a file larger than any picture passes through the server's parser without a temporary file."""
    from starlette.requests import Request

    start(runs)
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: pytest.fail("written to disk"))
    data = bytes(21 * 2**20)
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
    assert app.selectbox(key="left").options == [OTHER_FILE] and len(app.file_uploader) == 2 and not app.image


def test_a_damaged_checkpoint_and_a_lost_dataset_are_named(start, runs, tmp_path):
    shutil.copytree(runs / "runs", tmp_path / "runs")
    config = tmp_path / "runs" / STUDY / RIGHT / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(runs / "data"), "gone"), encoding="utf-8")
    app = start(tmp_path)
    app.selectbox(key="source").set_value("test split").run()
    assert "gone" in errors(app)
    weights = tmp_path / "runs" / STUDY / LEFT / "weights"
    (weights / "last.pt").write_bytes(b"not a checkpoint")
    (weights / "last.prev.pt").unlink(missing_ok=True)
    app.selectbox(key="source").set_value("built in").run()
    assert "last.pt" in errors(app) and not app.image


def test_an_exported_file_beside_its_checkpoint(start, runs, exported, tmp_path):
    shutil.copytree(runs / "runs", tmp_path / "runs")
    weights = tmp_path / "runs" / STUDY / RIGHT / "weights"
    shutil.copy(exported.int8, weights / "last.int8.onnx")
    (weights / "broken.onnx").write_bytes(b"not a graph")
    app = start(tmp_path)
    assert app.selectbox(key="right").value == f"{STUDY}/{RIGHT}"
    app.selectbox(key="right").set_value(f"{STUDY}/{RIGHT}/last.int8.onnx").run()
    assert errors(app) == "" and len(latencies(app)) == 2
    assert "ONNX, int8" in app.markdown[-1].value and "not measured" in app.markdown[-1].value
    open_explanation(app)
    assert app.text[0].value.startswith("0.5 x mse on p3") and app.selectbox(key="map").value == "p3"
    app.selectbox(key="left").set_value(f"{STUDY}/{RIGHT}/broken.onnx").run()
    assert "broken.onnx: damaged or not an ONNX file" in errors(app)


def open_explanation(app):
    app.segmented_control(key="page").set_value("What distillation did").run()
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
    drawing, heat = (image.value for image in app.image)
    app.selectbox(key="map").set_value("p5").run()
    assert check(app).image[0].value == drawing and check(app).image[1].value != heat


def test_maps_are_those_of_the_weights_whatever_their_name(start, runs):
    """Two uploads of one name are two models, and another file of that name has maps of its own."""
    app = start(runs)
    for side, name in (("left", LEFT), ("right", RIGHT)):
        state = checkpoint.load(runs / "runs" / STUDY / name / "weights" / "last.pt")
        if side == "right":
            state["ema"] = {key: 2 * value if "weight" in key else value for key, value in state["ema"].items()}
        checkpoint.save(runs / f"{side}.pt", state)
    maps = []
    for left, right in (("left", "left"), ("left", "right"), ("right", "right")):
        app.selectbox(key="left").set_value(OTHER_FILE).run()
        app.selectbox(key="right").set_value(OTHER_FILE).run()
        for key, file in (("left_file", left), ("right_file", right)):
            app.file_uploader(key=key).upload("mine.pt", (runs / f"{file}.pt").read_bytes()).run()
        maps.append(open_explanation(app).image[-1].value)
        app.segmented_control(key="page").set_value("Compare two models").run()
    assert len(set(map(str, maps))) == 3


def test_a_run_without_a_teacher_says_so(start, runs):
    app = open_explanation(start(runs))
    app.selectbox(key="right").set_value(f"{STUDY}/{LEFT}").run()
    assert "without distillation terms" in check(app).info[0].value


def test_the_server_listens_to_this_machine_alone():
    import tomllib

    from engine.web_demo import detectors

    settings = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    assert settings["server"]["address"] == "localhost"
    assert settings["server"]["maxUploadSize"] == detectors.MAX_WEIGHTS_MEGABYTES
    assert settings["browser"]["gatherUsageStats"] is False
