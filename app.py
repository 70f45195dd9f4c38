"""The demo in a browser: what two models find in one picture, its enhanced twin, and how a run was distilled.

    make app                        after `make demo`; the page is at http://localhost:8501
    streamlit run app.py            the same, in an environment with the extra `app`

It shows the runs and ONNX files below runs/, and weights files that are uploaded. The server listens on localhost only
(`make app ADDRESS=0.0.0.0` changes that; files and folders of this machine can then no longer be named). Uploads stay
in memory until the session ends: pictures of 10 MB and 24 megapixels, videos of 40 MB, weights files of 200 MB at most.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import streamlit as st
import torch
from PIL import Image
from starlette.formparsers import MultiPartParser
from streamlit.runtime.scriptrunner import get_script_run_ctx

from config import Config
from datasets.enhance import Enhancement, enhance
from datasets.images import SUFFIXES, read_image
from engine.prediction import video
from engine.runtime.processes import choose_device
from engine.web_demo import clips, detectors, diagram, gallery, run_views, sides, texts
from engine.web_demo.detectors import Detector, Latency
from engine.web_demo.run_views import Run
from engine.web_demo.sides import WHERE, Side
from errors import UserError
from models import suppresses
from structures import Detections
from weights import file_of_run

# Before any decorator of Streamlit's complains, and not in the processes that multiprocessing starts.
if __name__ == "__main__" and get_script_run_ctx(suppress_warning=True) is None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        raise SystemExit(0)
    print("error: app.py was started with python, expected `streamlit run app.py` or `make app`", file=sys.stderr)
    raise SystemExit(2)

RUNS = Path("runs")
COMPARE, EXPLAIN = "Compare two models", "What distillation did"
BUILT_IN, FROM_RUN, UPLOAD, CAMERA, FOLDER, VIDEO = "built in", "test split", "upload", "camera", "folder", "video"
OTHER_FILE = "another file ..."
WEIGHTS_SUFFIXES = ("pt", "pth", "bin", "safetensors", "npz", "onnx")
GREY_WORLD, WHITE_PATCH = "grey world", "white patch"
Place = st.delta_generator.DeltaGenerator  # a part of the page


@dataclass(frozen=True)
class Thresholds:
    score: float
    iou: float


def main() -> None:
    st.set_page_config(page_title="Retort", page_icon="⚗️", layout="wide", initial_sidebar_state="collapsed")
    st.html(texts.STYLE)
    keep_uploads_in_memory()
    title, pages = st.columns([3, 2], vertical_alignment="center")
    title.title("Retort: what did distillation buy me?", anchor=False)
    page = pages.container(horizontal=True, horizontal_alignment="right").segmented_control(
        "Page", (COMPARE, EXPLAIN), default=COMPARE, required=True, key="page", label_visibility="collapsed"
    )
    try:
        runs = run_views.find_runs(RUNS.resolve())
    except UserError as error:  # a link to nothing
        st.error(str(error))
        return
    if not runs:
        st.info(f"There is no trained model below {RUNS.resolve()} yet. This command trains four in some minutes:")
        st.code("make demo", language="sh")
    controls = st.container(key="controls")
    places = st.container(key="sides").columns(2)
    try:
        pair = choose_pair(runs, places)
        with controls:
            at_source, at_picture, at_score, at_overlap, at_steps = st.columns(
                [1, 1.25, 1.1, 1.1, 1.25], vertical_alignment="bottom"
            )
            source = choose_source(page, pair, at_source)
            thresholds, steps = choose_thresholds(page, pair, at_score, at_overlap), choose_enhancement(at_steps)
        if pair is None:
            return
        if source == VIDEO:
            show_video(pair, steps, thresholds)
            return
        with controls:
            picture = choose_picture(source, at_picture, pair[1])
        if picture is None:
            return
        enhanced = enhance_once(gallery.digest(picture.pixels), steps, picture.pixels)
        if page == COMPARE:
            show_results(picture, enhanced, pair, thresholds)
        else:
            explain(pair, enhanced)
    except UserError as error:
        st.error(str(error))


def keep_uploads_in_memory() -> None:
    """Starlette, which parses uploads for Streamlit, writes larger files than this to disk."""
    MultiPartParser.spool_max_size = 2 * detectors.MAX_WEIGHTS_MEGABYTES * 2**20


def is_local() -> bool:
    """Whether only people on this machine reach the server, who may read its files anyway."""
    return st.get_option("server.address") in ("localhost", "127.0.0.1", "::1")


# ---------------------------------------------------------------- what is chosen


def choose_pair(runs: dict[str, Run], places: Sequence[Place]) -> tuple[Side, Side] | None:
    """The two sides, with their choosers at the top of two columns; None while a file is missing."""
    names = [*runs, OTHER_FILE]
    first = run_views.default_pair(list(runs)) if runs else (OTHER_FILE, OTHER_FILE)
    picked = [
        place.selectbox(f"{key.title()} model", names, index=names.index(name), key=key)
        for place, key, name in zip(places, WHERE, first)
    ]
    chosen: list[Side] = []
    for place, key, name, title in zip(places, WHERE, picked, run_views.short_names(picked)):
        with place:
            run = runs.get(name)
            side = choose_file(key) if run is None else side_of(run.weights, title, run)
            if side is not None:
                chosen.append(side)
                st.markdown(side.facts)
    return (chosen[0], chosen[1]) if len(chosen) == 2 else None


def side_of(path: Path, name: str, run: Run | None = None) -> Side:
    """The model of a weights file or of a run's folder, anew when the file changes; a folder keeps its time then."""
    file = file_of_run(path)
    version = file.stat().st_mtime_ns if file.is_file() else 0
    return Side(load_file(file, version, name), run, f"{file} {version}")


def choose_file(key: str) -> Side | None:
    """A detector from an upload or, on this machine, from a path; None before either is given."""
    file = st.file_uploader(
        f"Weights or ONNX, at most {detectors.MAX_WEIGHTS_MEGABYTES} MB; read as data, nothing in it is run",
        type=WEIGHTS_SUFFIXES,
        max_upload_size=detectors.MAX_WEIGHTS_MEGABYTES,
        key=f"{key}_file",
    )
    path = st.text_input("or its path", key=f"{key}_path", placeholder="yolov8n.pt, runs/NAME") if is_local() else ""
    if file is not None:
        data = file.getvalue()
        content_digest = hashlib.sha256(data).hexdigest()
        return Side(load_upload(content_digest, file.name, data), None, content_digest)
    return side_of(Path(path).expanduser(), Path(path).name) if path else None


@st.cache_resource(max_entries=6, show_spinner="Loading a model")
def load_file(path: Path, version: int, name: str) -> Detector:
    """version: of the file, so that a run that continues is loaded again."""
    return detectors.load_file(path, name)


@st.cache_resource(max_entries=4, show_spinner="Loading a model")
def load_upload(content_digest: str, name: str, _data: bytes) -> Detector:
    """Cached by what the file holds."""
    return detectors.load_upload(_data, name)


def choose_source(page: str, pair: tuple[Side, Side] | None, place: Place) -> str:
    """Where the picture is from. The page about distillation has one picture, and so no video."""
    sources = [BUILT_IN, *([FROM_RUN] if pair and pair[1].run else []), UPLOAD, CAMERA]
    sources += [*([VIDEO] if page == COMPARE else []), *([FOLDER] if is_local() else [])]
    return place.selectbox("Picture", sources, key="source")


def choose_thresholds(page: str, pair: tuple[Side, Side] | None, left: Place, right: Place) -> Thresholds:
    """A slider that would change nothing is disabled and says why."""
    score = ("Score, at least", texts.SCORE)
    overlap = sides.title_of_overlap([suppresses(side.detector.info.arch) for side in pair or ()])
    if page != COMPARE:
        score, overlap = ((f"{what}, {sides.NOT_USED}", texts.NO_BOXES) for what in ("Score", "Overlap"))

    def slide(place: Place, key: str, least: float, first: float, title: str, reason: str) -> float:
        is_idle = title.endswith(sides.NOT_USED)
        return place.slider(title, least, 0.95, first, key=key, help=reason, disabled=is_idle)

    return Thresholds(slide(left, "score", 0.01, 0.25, *score), slide(right, "iou", 0.05, 0.7, *overlap))


def choose_enhancement(place: Place) -> Enhancement:
    is_on = place.toggle("Enhance the picture", value=True, key="enhance")
    with place.popover("Steps", width="stretch", disabled=not is_on):
        denoise = step("Denoise", "color distance that is noise, in levels", 5.0, 80.0, 25.0, "denoise")
        balance = step("White balance", "strength", 0.0, 1.0, 1.0, "balance", is_first_on=True)
        how = st.radio(
            "White balance by", (GREY_WORLD, WHITE_PATCH), horizontal=True, key="balance_by", disabled=balance is None
        )
        clahe = step("Local contrast (CLAHE)", "clip limit", 1.0, 8.0, 2.0, "clahe", is_first_on=True)
        gamma = step("Gamma", "above 1 brightens", 0.3, 3.0, 1.5, "gamma")
        sharpen = step("Sharpen", "amount", 0.0, 3.0, 1.0, "sharpen")
    if not is_on:
        return Enhancement()
    return Enhancement(
        denoise=denoise,
        grey_world=balance if how == GREY_WORLD else None,
        white_patch=balance if how == WHITE_PATCH else None,
        clahe=clahe,
        gamma=gamma,
        sharpen=sharpen,
    )


def step(
    title: str, what: str, low: float, high: float, start: float, key: str, *, is_first_on: bool = False
) -> float | None:
    """A switch and a slider; None while the switch is off."""
    is_on = st.toggle(title, value=is_first_on, key=f"{key}_on")
    value = st.slider(f"{title}: {what}", low, high, start, key=key, disabled=not is_on, label_visibility="collapsed")
    return value if is_on else None


def choose_picture(source: str, place: Place, side: Side) -> gallery.Picture | None:
    """The chosen picture; None before there is one. UserError for a picture that is refused.

    The built-in picture is at first one that shows classes of the side's model, and again when the model has others.
    """
    if source == BUILT_IN:
        fitting = gallery.fitting_picture(side.detector.names)
        if "built_in" not in st.session_state or st.session_state["fitting"] != fitting:
            st.session_state["fitting"] = st.session_state["built_in"] = fitting
        name = place.selectbox("Which", list(gallery.BUILT_IN), key="built_in")
        return gallery.shrink(gallery.built_in_picture(name))
    if source == FROM_RUN and side.run is not None:
        return choose_of(find_test_pictures(str(side.run.folder.path), side.run), place, "test")
    if source == FOLDER:
        folder = st.text_input("Folder", key="folder", placeholder="a folder of pictures on this machine")
        return choose_of(gallery.find_folder_pictures(folder), place, "of_folder") if folder else None
    if source == CAMERA:
        file = st.columns(3)[0].camera_input("A snapshot", key="camera")
    else:
        limits = f"at most {gallery.MAX_MEGABYTES} MB and {gallery.MAX_MEGAPIXELS} megapixels"
        file = st.file_uploader(
            f"JPEG, PNG, BMP, WebP or TIFF of {limits}; it stays in this server's memory",
            type=[s.removeprefix(".") for s in SUFFIXES],
            max_upload_size=gallery.MAX_MEGABYTES,
            key="upload",
        )
    return None if file is None else gallery.read_upload(file.getvalue())


def choose_of(paths: dict[str, Path], place: Place, key: str) -> gallery.Picture:
    return gallery.shrink(read_image(paths[place.selectbox("Which", list(paths), key=key)]))


@st.cache_data(max_entries=16, show_spinner=False)
def enhance_once(picture_digest: str, steps: Enhancement, _picture: np.ndarray) -> np.ndarray:
    """Cached by the first two arguments: Streamlit's own hash of a large array uses only a part of it."""
    return enhance(_picture, steps)


@st.cache_data(max_entries=8, show_spinner="Reading the test split")
def find_test_pictures(folder: str, _run: Run) -> dict[str, Path]:
    config = _run.config()
    if config is None:
        raise UserError(f"{_run.folder.config}: no such file, so the run's test split is unknown")
    return gallery.find_test_pictures(config)


# ---------------------------------------------------------------- two models on one picture


def show_results(
    picture: gallery.Picture, enhanced: np.ndarray, pair: tuple[Side, Side], thresholds: Thresholds
) -> None:
    found = [detect_once(gallery.digest(enhanced), side.key, thresholds, enhanced, side.detector) for side in pair]
    views = [gallery.shown_with(enhanced, rows, side.detector.names) for rows, side in zip(found, pair)]
    places, latencies = st.container(key="views").columns(2), list[Place]()
    for place, view, rows, side in zip(places, views, found, pair):
        with place:
            st.image(view, width="stretch", output_format="JPEG")
            st.html(detectors.class_chips(rows, side.detector.names))
            latencies.append(st.empty())
    show_downloads(views, [gallery.scaled(rows, enhanced, picture.size) for rows in found], pair)
    left, right = st.columns(2)
    plain = {"picture": gallery.shown(picture.pixels), "enhanced": gallery.shown(enhanced)}
    for place, (title, view) in zip((left, right), plain.items()):
        place.image(view, caption=title, width="stretch", output_format="JPEG")
    show_divided(plain | {f"{side.detector.name} ({where})": view for side, view, where in zip(pair, views, WHERE)})
    machine = {"device": choose_device("auto").type, "threads": torch.get_num_threads()}
    measured = measure_once((pair[0].key, pair[1].key), enhanced.shape, enhanced, pair)
    for place, latency in zip(latencies, measured):
        place.caption(f"{latency}", help=texts.LATENCY.format(rounds=latency.rounds, **machine))


def show_downloads(views: Sequence[Image.Image], found: Sequence[Detections], pair: tuple[Side, Side]) -> None:
    """found: in pixels of the picture's file."""
    names = [side.detector.name for side in pair]
    sheet = gallery.as_jpeg(gallery.beside(views[0], views[1], names))
    place = st.container(horizontal=True)
    place.download_button("Download both pictures", sheet, "detections.jpg", "image/jpeg", on_click="ignore")
    text = sides.boxes_json(found, pair)
    place.download_button("Download boxes (JSON)", text, "detections.json", "application/json", on_click="ignore")


@st.fragment  # moving the divider redraws nothing else
def show_divided(views: dict[str, Image.Image]) -> None:
    """Two of the pictures in one, with a movable divider."""
    with st.expander("One against the other, with a divider"):
        names = list(views)
        first, second, third = st.columns(3)
        left = first.selectbox("Left of the divider", names, index=len(names) - 2, key="wipe_left")
        right = second.selectbox("Right of the divider", names, index=len(names) - 1, key="wipe_right")
        share = third.slider("Divider", 0, 100, 50, key="divider", format="%d %%")
        whole = gallery.wipe(views[left], views[right], share / 100)
        st.image(whole, caption=f"{left} | {right}", width="stretch", output_format="JPEG")


@st.cache_data(max_entries=64, show_spinner="Detecting")
def detect_once(
    picture_digest: str, key: str, thresholds: Thresholds, _picture: np.ndarray, _detector: Detector
) -> Detections:
    """Cached by what the picture shows, so that nobody sees another session's."""
    return detectors.detect(_detector, _picture, score=thresholds.score, iou=thresholds.iou)


@st.cache_data(max_entries=64, show_spinner="Measuring the latency")
def measure_once(
    keys: tuple[str, str], shape: tuple[int, ...], _picture: np.ndarray, _pair: tuple[Side, Side]
) -> list[Latency]:
    return detectors.measure_latency([side.detector for side in _pair], _picture)


def show_video(pair: tuple[Side, Side], steps: Enhancement, thresholds: Thresholds) -> None:
    """A short video through both models, drawn when asked for: each frame takes its time."""
    st.caption(
        f"The first {clips.MAX_SECONDS} seconds of a video of at most {clips.MAX_MEGABYTES} MB, "
        f"{clips.FRAMES_PER_SECOND} frames a second. It stays in this server's memory."
    )
    file = st.file_uploader(
        "Your video",
        type=[s.removeprefix(".") for s in video.SUFFIXES],
        max_upload_size=clips.MAX_MEGABYTES,
        key="video",
        label_visibility="collapsed",
    )
    if file is None or not st.button("Run both models on it", key="run_video", type="primary"):
        return
    bar, most = st.progress(0.0, "Detecting"), clips.MAX_SECONDS * clips.FRAMES_PER_SECOND
    drawn = clips.draw_clip(
        file.getvalue(),
        [side.detector for side in pair],
        steps,
        score=thresholds.score,
        iou=thresholds.iou,
        progress=lambda done: bar.progress(min(1.0, done / most), f"{done} frames"),
    )
    bar.empty()
    st.video(drawn, format="video/mp4")
    st.download_button("Download the video", drawn, "detections.mp4", "video/mp4", on_click="ignore")


# ---------------------------------------------------------------- what distillation did


def explain(pair: tuple[Side, Side], enhanced: np.ndarray) -> None:
    """The right side's training, and the maps and curves of both."""
    run = pair[1].run
    config = run.config() if run else None
    if run is None or config is None:
        place = f"there is no {run.folder.config}" if run else "the file belongs to no run here"
        st.info(f"How {pair[1].detector.name} was trained is unknown: {place}.")
    else:
        explain_run(run, config)
    runs = {title: side.run for title, side in sides.by_title(pair).items() if side.run}
    terms = run_views.term_columns(config) if config else {}
    show_curves(runs, list(terms))
    shown = sides.by_title(pair)
    for name, path in (run_views.find_teachers(config) if config else {}).items():
        shown[f"teacher {name}"] = side_of(path, name)
    maps = tuple(name for term in terms.values() for name in term.student_maps)
    show_maps({title: side for title, side in shown.items() if side.detector.parameters is not None}, enhanced, maps)
    sheet = run.folder.path / "distillation.jpg" if run else None
    if sheet and sheet.is_file():
        st.header("The maps that the terms compare, at the end of the run", anchor=False)
        st.image(str(sheet))


def explain_run(run: Run, config: Config) -> None:
    st.header(f"How {run.name} was trained", anchor=False)
    st.image(diagram.draw_training(config), width="stretch")
    if not config.terms:
        st.info(f"{run.name} was trained without distillation terms: choose a distilled run as the right model.")
    for term in config.terms:
        st.text(run_views.describe_term(term))
    with st.expander("What distillation is"):
        st.markdown(texts.EXPLANATION)
    table = run.folder.path.parent / "comparison.md"
    if table.is_file():
        with st.expander("The comparison of both runs", expanded=True):
            st.markdown(table.read_text(encoding="utf-8").partition("\n")[2])


def show_curves(runs: dict[str, Run], terms: list[str]) -> None:
    titles = run_views.CURVES | {name.removeprefix("train/"): name for name in terms}
    curves = {title: run_views.read_curves(runs, column) for title, column in titles.items()}
    curves = {title: rows for title, rows in curves.items() if rows["epoch"]}
    if not curves:
        st.info("These models have no metrics.csv, so there are no curves.")
        return
    st.header("Curves", anchor=False)
    columns = st.columns(2)
    for number, (title, rows) in enumerate(curves.items()):
        with columns[number % 2]:
            st.caption(title)
            st.line_chart(rows, x="epoch", y="value", y_label="", color="run", height=240)


@st.fragment
def show_maps(models: dict[str, Side], picture: np.ndarray, taught: tuple[str, ...]) -> None:
    """taught: names of maps; the first one that the models have is shown first."""
    names = run_views.map_names([side.detector.module for side in models.values()])
    if not names:
        st.info("These models have no map of the same name.")
        return
    st.header("Where the maps are strong", anchor=False)
    first = next((names.index(name) for name in (*taught, "p3") if name in names), 0)
    name = st.selectbox("Map", names, index=first, key="map")
    keys = tuple((title, side.key) for title, side in models.items())
    sheet = draw_heat(gallery.digest(picture), keys, name, picture, models)
    st.image(sheet, width="stretch", output_format="JPEG")
    st.caption("The mean absolute value over a map's channels, from the least (black) to the most (white) of each map.")


@st.cache_data(max_entries=16, show_spinner="Looking into the models")
def draw_heat(
    digest: str, keys: tuple[tuple[str, str], ...], map_name: str, _picture: np.ndarray, _models: dict[str, Side]
) -> Image.Image:
    """Cached as `detect_once`, and by the titles on it. keys: title and Side.key of each model."""
    with gallery.ONE_AT_A_TIME:
        models = {title: (side.detector.module, side.detector.info) for title, side in _models.items()}
        return run_views.heat_sheet(models, _picture, map_name)


if __name__ == "__main__":
    main()
