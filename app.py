"""The demo in a browser: a picture, its enhanced version, and the detections of two models in it.

    make app                        after `make demo`; the page is at http://localhost:8501
    streamlit run app.py            the same, in an environment with the extra `app`

It shows the runs and ONNX files below runs/. The server listens on localhost only (`--server.address` changes that).
Uploaded files may have 10 MB (.streamlit/config.toml) and 24 megapixels; they stay in memory until the session ends.
"""

from pathlib import Path

import numpy as np
import streamlit as st
import torch
from PIL import Image
from starlette.formparsers import MultiPartParser
from torch import nn

from checkpoint import CheckpointInfo
from datasets.enhance import Enhancement, enhance
from datasets.images import SUFFIXES, read_image
from engine.onnx_files.detector import OnnxDetector, load_detector
from engine.runtime.processes import choose_device
from engine.web_demo import gallery, run_views
from engine.web_demo.gallery import MAX_MEGABYTES, MAX_MEGAPIXELS
from engine.web_demo.run_views import Result, Run
from errors import UserError

RUNS = Path("runs")
COMPARE, EXPLAIN = "Compare two models", "What distillation did"
BUILT_IN, FROM_RUN, UPLOAD = "built in", "test split", "upload"
GREY_WORLD, WHITE_PATCH = "grey world", "white patch"

EXPLANATION = """
A small detector, the **student**, is trained on labelled pictures. With *distillation* it also learns to agree with a
larger or longer-trained **teacher**, whose weights do not change:

    loss = detection losses(student, labels) + sum of weight x loss(student, teacher)

A teacher's outputs hold more than the labels: how certain each class is, which classes are similar, and where its
feature maps are strong. Adapters that bring the student's maps to the teacher's width are trained too and dropped at
the end, so that the student is as large and as fast as one without a teacher. The table shows whether it paid off.
"""


def main() -> None:
    st.set_page_config(page_title="Retort", layout="wide")
    keep_uploads_in_memory()
    st.title("Retort: what did distillation buy me?")
    runs = run_views.find_runs(RUNS.resolve())
    if not runs:
        st.info(f"There is no trained model below {RUNS.resolve()} yet. This command trains four in some minutes:")
        st.code("make demo", language="sh")
        return
    page = st.radio("Page", (COMPARE, EXPLAIN), horizontal=True, key="page", label_visibility="collapsed")
    try:
        left, right = choose_models(runs)
        picture = choose_picture(right)
        steps = choose_enhancement()
        thresholds = choose_thresholds()
        titles = run_views.short_names([left.name, right.name])
        models = {title: load(run.weights, run.version) for title, run in zip(titles, (left, right))}
    except UserError as error:
        st.error(str(error))
        return
    if picture is None:
        st.info("Choose a picture to upload, on the left.")
        return
    enhanced = enhance(picture, steps)
    if page == COMPARE:
        show_results(picture, enhanced, models, thresholds)
        return
    try:
        explain(dict(zip(titles, (left, right))), right, models, enhanced)
    except UserError as error:
        st.error(str(error))


def keep_uploads_in_memory() -> None:
    """Starlette, which parses uploads for Streamlit, writes larger files than this to disk."""
    MultiPartParser.spool_max_size = 2 * MAX_MEGABYTES * 2**20


@st.cache_resource(max_entries=6, show_spinner="Loading a model")
def load(path: Path, version: float) -> tuple[nn.Module, CheckpointInfo]:
    """version: of the file, so that a run that continues is loaded again."""
    return load_detector(path, device=str(device()))


def device() -> torch.device:
    return choose_device("auto")


# ---------------------------------------------------------------- the sidebar


def choose_models(runs: dict[str, Run]) -> tuple[Run, Run]:
    names = list(runs)
    first, second = run_views.default_pair(names)
    st.sidebar.header("Models")
    left = st.sidebar.selectbox("Left model", names, index=names.index(first), key="left")
    right = st.sidebar.selectbox("Right model", names, index=names.index(second), key="right")
    return runs[left], runs[right]


def choose_picture(run: Run) -> np.ndarray | None:
    """The chosen picture; None before an upload. UserError for a picture that is refused."""
    st.sidebar.header("Picture")
    source = st.sidebar.radio("Where from", (BUILT_IN, FROM_RUN, UPLOAD), horizontal=True, key="source")
    if source == BUILT_IN:
        name = st.sidebar.selectbox("Built-in picture", list(gallery.BUILT_IN), key="built_in")
        return gallery.built_in_picture(name)
    if source == FROM_RUN:
        paths = find_test_pictures(str(run.folder.path), run)
        return gallery.shrink(read_image(paths[st.sidebar.selectbox("Test picture", list(paths), key="test")]))
    st.sidebar.caption(
        f"JPEG, PNG, BMP, WebP or TIFF of at most {MAX_MEGABYTES} MB and {MAX_MEGAPIXELS} megapixels. It stays in this "
        f"server's memory; a picture of more than {gallery.WORKING_SIDE} pixels a side is shrunk."
    )
    file = st.sidebar.file_uploader(
        "Your picture", type=[s.removeprefix(".") for s in SUFFIXES], max_upload_size=MAX_MEGABYTES, key="upload"
    )
    return None if file is None else gallery.read_upload(file.getvalue())


@st.cache_data(max_entries=8, show_spinner="Reading the test split")
def find_test_pictures(folder: str, _run: Run) -> dict[str, Path]:
    config = _run.config()
    if config is None:
        raise UserError(f"{_run.folder.config}: no such file, so the run's test split is unknown")
    return gallery.find_test_pictures(config)


def choose_enhancement() -> Enhancement:
    st.sidebar.header("Enhancement")
    denoise = step("Denoise", "color distance that is noise, in levels", 5.0, 80.0, 25.0, "denoise")
    balance = step("White balance", "strength", 0.0, 1.0, 1.0, "balance")
    how = st.sidebar.radio(
        "White balance by", (GREY_WORLD, WHITE_PATCH), horizontal=True, key="balance_by", disabled=balance is None
    )
    clahe = step("Local contrast (CLAHE)", "clip limit", 1.0, 8.0, 2.0, "clahe")
    gamma = step("Gamma", "above 1 brightens", 0.3, 3.0, 1.5, "gamma")
    sharpen = step("Sharpen", "amount", 0.0, 3.0, 1.0, "sharpen")
    return Enhancement(
        denoise=denoise,
        grey_world=balance if how == GREY_WORLD else None,
        white_patch=balance if how == WHITE_PATCH else None,
        clahe=clahe,
        gamma=gamma,
        sharpen=sharpen,
    )


def step(title: str, what: str, low: float, high: float, start: float, key: str) -> float | None:
    """A switch and a slider; None while the switch is off."""
    is_on = st.sidebar.toggle(title, key=f"{key}_on")
    value = st.sidebar.slider(
        f"{title}: {what}", low, high, start, key=key, disabled=not is_on, label_visibility="collapsed"
    )
    return value if is_on else None


def choose_thresholds() -> tuple[float, float]:
    st.sidebar.header("Thresholds")
    score = st.sidebar.slider("Score of a detection, at least", 0.01, 0.95, 0.25, key="score")
    iou = st.sidebar.slider("Overlap (IoU) of two detections, at most", 0.05, 0.95, 0.7, key="iou")
    return score, iou


# ---------------------------------------------------------------- two models on one picture


def show_results(
    picture: np.ndarray,
    enhanced: np.ndarray,
    models: dict[str, tuple[nn.Module, CheckpointInfo]],
    thresholds: tuple[float, float],
) -> None:
    results = detect(gallery.digest(enhanced), tuple(models), thresholds, enhanced, models)
    named = {name: (result.found, models[name][1].names) for name, result in results.items()}
    views = {"picture": gallery.shown(picture), "enhanced": gallery.shown(enhanced)}
    views |= {name: gallery.shown_with(enhanced, *pair) for name, pair in named.items()}
    pictures, numbers = st.columns([2, 1])
    places = [place for _ in range(2) for place in pictures.columns(2)]
    for place, (title, view) in zip(places, views.items()):
        place.image(view, caption=title, width="stretch", output_format="JPEG")
    numbers.subheader("Found")
    numbers.dataframe(run_views.count_classes(named), hide_index=True)
    numbers.subheader("Latency")
    for name, result in results.items():
        numbers.metric(name, f"{result.milliseconds:.1f} ms")
    graphs = [
        f"{name}: ONNX, {m.info.precision}, cpu." for name, (m, _) in models.items() if isinstance(m, OnnxDetector)
    ]
    numbers.caption(
        f"Median of {run_views.ROUNDS} rounds in turns, from letterbox to suppression; one picture, float32, "
        f"device {device().type}, threads {torch.get_num_threads()}. {' '.join(graphs)}"
    )
    show_divided(views)


@st.fragment  # moving the divider redraws nothing else
def show_divided(views: dict[str, Image.Image]) -> None:
    """Two of the pictures in one, with a movable divider."""
    st.subheader("Side against side")
    names = list(views)
    first, second = st.columns(2)
    left = first.selectbox("Left of the divider", names, index=len(names) - 2, key="wipe_left")
    right = second.selectbox("Right of the divider", names, index=len(names) - 1, key="wipe_right")
    share = st.slider("Divider", 0, 100, 50, key="divider", format="%d %%")
    whole = gallery.wipe(views[left], views[right], share / 100)
    st.image(whole, caption=f"{left} | {right}", output_format="JPEG")


@st.cache_data(max_entries=16, show_spinner="Detecting")
def detect(
    picture_digest: str,
    names: tuple[str, ...],
    thresholds: tuple[float, float],
    _picture: np.ndarray,
    _models: dict[str, tuple[nn.Module, CheckpointInfo]],
) -> dict[str, Result]:
    """Cached by the first three arguments: Streamlit's own hash of a large array uses only a part of it."""
    score, iou = thresholds
    return run_views.compare(_models, _picture, score_threshold=score, iou_threshold=iou, device=device())


# ---------------------------------------------------------------- what distillation did


def explain(
    runs: dict[str, Run],
    right: Run,
    models: dict[str, tuple[nn.Module, CheckpointInfo]],
    enhanced: np.ndarray,
) -> None:
    """runs, models: left and right, by title. right: the run whose terms are explained."""
    st.markdown(EXPLANATION)
    config = right.config()
    terms = run_views.term_columns(config) if config else {}
    if terms:
        st.subheader(f"Distillation terms of {right.name}")
        for term in terms.values():
            st.text(run_views.describe_term(term))
    elif config:
        st.info(f"{right.name} was trained without a teacher: choose a distilled run as the right model.")
    else:
        st.info(f"How {right.name} was trained is unknown: there is no {right.folder.config}.")
    table = right.folder.path.parent / "comparison.md"
    if table.is_file():
        with st.expander("The comparison of both runs", expanded=True):
            st.markdown(table.read_text(encoding="utf-8").partition("\n")[2])
    show_curves(runs, list(terms))
    teachers = run_views.find_teachers(config) if config else {}
    shown = run_views.with_maps(models)
    for name, path in teachers.items():
        shown[f"teacher {name}"] = load(path, path.stat().st_mtime)
    show_maps(shown, enhanced, tuple(name for term in terms.values() for name in term.student_maps))
    sheet = right.folder.path / "distillation.jpg"
    if sheet.is_file():
        st.subheader("The maps that the terms compare, at the end of the run")
        st.image(str(sheet))


def show_curves(runs: dict[str, Run], terms: list[str]) -> None:
    st.subheader("Curves")
    titles = run_views.CURVES | {name.removeprefix("train/"): name for name in terms}
    curves = {title: run_views.read_curves(runs, column) for title, column in titles.items()}
    curves = {title: rows for title, rows in curves.items() if rows["epoch"]}
    if not curves:
        st.info("These runs have written no metrics.csv yet.")
        return
    columns = st.columns(2)
    for number, (title, rows) in enumerate(curves.items()):
        with columns[number % 2]:
            st.caption(title)
            st.line_chart(rows, x="epoch", y="value", color="run", height=280)


@st.fragment
def show_maps(
    models: dict[str, tuple[nn.Module, CheckpointInfo]], picture: np.ndarray, taught: tuple[str, ...]
) -> None:
    """taught: names of maps; the first one that the models have is shown first."""
    st.subheader("Where the maps are strong")
    names = run_views.map_names([model for model, _ in models.values()])
    if not names:
        st.info("These models have no map of the same name.")
        return
    first = next((names.index(name) for name in taught if name in names), 0)
    name = st.selectbox("Map", names, index=first, key="map")
    st.image(draw_heat(gallery.digest(picture), tuple(models), name, picture, models), output_format="JPEG")
    st.caption("The mean absolute value over a map's channels, from the least (black) to the most (white) of each map.")


@st.cache_data(max_entries=16, show_spinner="Looking into the models")
def draw_heat(
    picture_digest: str,
    names: tuple[str, ...],
    map_name: str,
    _picture: np.ndarray,
    _models: dict[str, tuple[nn.Module, CheckpointInfo]],
) -> Image.Image:
    """Cached as `detect`."""
    return run_views.heat_sheet(_models, _picture, map_name)


main()
