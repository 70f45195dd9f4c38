"""What the demo reads from runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
from config import (
    STUDENT,
    Config,
    DataConfig,
    ModelConfig,
    PseudoBoxConfig,
    TeacherConfig,
    TermConfig,
    UnlabelledConfig,
)
from engine.drawing.heat_maps import LINE
from engine.runtime import run_folder
from engine.runtime.run_folder import RunFolder
from engine.web_demo import run_views
from tests.engine.training.test_distilled_training import save_teacher


def place(root: Path, name: str, file: str) -> None:
    path = root / name / "weights" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_runs_are_found_at_any_depth_with_the_best_weights(tmp_path):
    place(tmp_path, "alone", "last.pt")
    place(tmp_path, "study/a", "last.pt")
    place(tmp_path, "study/a", "best.safetensors")
    place(tmp_path, "study/killed", "last.prev.pt")
    (tmp_path / "study" / "empty" / "weights").mkdir(parents=True)
    found = run_views.find_runs(tmp_path)
    assert {name: run.weights.name for name, run in found.items()} == {
        "alone": "last.pt",
        "study/a": "best.safetensors",
        "study/killed": "last.pt",
    }
    assert run_views.find_runs(tmp_path / "nothing") == {}


def test_runs_in_linked_folders_are_found(tmp_path):
    """As where runs lie on another disk; macOS's ._ files are none."""
    place(tmp_path / "away", "a", "last.pt")
    place(tmp_path / "away", "b", "last.onnx")
    place(tmp_path / "away", "b", "._last.onnx")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "away")
    assert list(run_views.find_runs(tmp_path / "runs")) == ["linked/a", "linked/b/last.onnx"]


def test_exported_files_stand_behind_their_run(tmp_path):
    place(tmp_path, "study/a", "last.pt")
    place(tmp_path, "study/a", "last.onnx")
    place(tmp_path, "study/a", "last.int8.onnx")
    place(tmp_path, "study/b", "last.pt")
    place(tmp_path, "only", "mine.onnx")
    (tmp_path / "alone.onnx").write_bytes(b"")
    found = run_views.find_runs(tmp_path)
    assert {name: run.weights.relative_to(tmp_path).as_posix() for name, run in found.items()} == {
        "alone.onnx": "alone.onnx",
        "only/mine.onnx": "only/weights/mine.onnx",
        "study/a": "study/a/weights/last.pt",
        "study/a/last.int8.onnx": "study/a/weights/last.int8.onnx",
        "study/a/last.onnx": "study/a/weights/last.onnx",
        "study/b": "study/b/weights/last.pt",
    }
    assert found["study/a/last.onnx"].folder == found["study/a"].folder
    assert list(found).index("study/a") < list(found).index("study/a/last.int8.onnx")


@pytest.mark.parametrize(
    "names, pair",
    [
        (["x"], ("x", "x")),
        (["x", "y", "z"], ("x", "z")),
        (["a/distilled_seed0", "b/baseline_seed1", "b/distilled_seed1"], ("b/baseline_seed1", "b/distilled_seed1")),
        (["baseline", "cwd", "distilled_twice"], ("baseline", "distilled_twice")),
        (["a.onnx", "x", "y", "y/last.onnx"], ("x", "y")),
        (["a.onnx", "b.onnx"], ("a.onnx", "b.onnx")),
    ],
)
def test_default_pair(names, pair):
    assert run_views.default_pair(names) == pair


def test_short_names():
    assert run_views.short_names(["demo/a", "demo/b"]) == ["a", "b"]
    assert run_views.short_names(["demo/a", "other/a"]) == ["demo/a", "other/a"]
    assert run_views.short_names(["x/a", "x/a"]) == ["a", "a"] and run_views.short_names(["a", "a/b"]) == ["a", "a/b"]


def test_curves_give_each_run_its_color(tmp_path):
    runs = {name: run_views.Run(name, RunFolder(tmp_path / name), Path("last.pt")) for name in ("a", "b")}
    for name in runs:
        (tmp_path / name).mkdir()
    for epoch in (1, 2):
        run_folder.append_metrics(runs["a"].folder.metrics, {"epoch": epoch, "time": 1.0, "train/cwd": epoch / 2})
    run_folder.append_metrics(runs["b"].folder.metrics, {"epoch": 1, "time": 1.0})
    curves = run_views.read_curves(runs, "train/cwd")
    assert curves == {"epoch": [1, 2, 1], "value": [0.5, 1.0, None], "run": ["a", "a", "b"]}
    assert run_views.read_curves(runs, "train/no") == {"epoch": [], "value": [], "run": []}


def test_the_score_of_a_run_is_that_of_the_weights_shown(tmp_path):
    place(tmp_path, "a", "last.pt")
    place(tmp_path, "a", "last.onnx")
    run = run_views.find_runs(tmp_path)["a"]
    assert run.score() == "mAP not measured"
    best = {"epoch": 3, "test": {"mAP50-95": 0.4}}
    report = {"split": "val", "test": {"mAP50-95": 0.25}, "best_on_holdout": best}
    run.folder.report.write_text(json.dumps(report))
    assert run.score() == "mAP 0.250 on val"
    assert run_views.find_runs(tmp_path)["a/last.onnx"].score() == "mAP not measured"  # rounding may have changed it
    place(tmp_path, "a", "best.safetensors")
    assert run_views.find_runs(tmp_path)["a"].score() == "mAP 0.400 on val"
    for damaged in ("{", "[]", '{"test": 3}'):
        run.folder.report.write_text(damaged)
        assert run.score() == "mAP not measured"


def test_who_taught_a_run(tmp_path):
    place(tmp_path, "a", "last.pt")
    run = run_views.find_runs(tmp_path)["a"]
    assert run.teachers() == ""
    pseudo = PseudoBoxConfig("small")
    data = DataConfig("voc", "data", unlabelled=UnlabelledConfig(pseudo=pseudo))
    terms = tuple(TermConfig(teacher, "mse", 1.0, student_maps=("p3",)) for teacher in ("big", STUDENT, "big"))
    off = (TermConfig("big", "mse", 0.0, student_maps=("p3",)),)
    for config, expected in (
        (Config("a", DataConfig("voc", "data"), ModelConfig("yolov8n"), terms=off), "no teacher"),
        (Config("a", data, ModelConfig("yolov8n"), terms=terms), "taught by big and itself and small"),
    ):
        run_folder.write_config(run.folder, config)
        assert run.teachers() == expected
    run.folder.config.write_text("of: another version\n")
    assert run.teachers() == ""


def test_a_term_in_words():
    term = TermConfig(teacher="big", loss="cwd", weight=2.0, student_maps=("p3", "p4"), adapter="conv1x1")
    words = run_views.describe_term(term)
    assert words.startswith("2 x cwd on p3, p4, from the teacher big, through an adapter conv1x1: ")
    assert len(words.split(": ", 1)[1]) > 10


def test_maps_of_two_models(tmp_path, one_thread):
    models = {arch: checkpoint.load_model(save_teacher(tmp_path / arch, arch)) for arch in ("yolov8n", "yolov5nu")}
    picture = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
    names = run_views.map_names([model for model, _ in models.values()])
    assert {"p3", "p4", "p5"} <= set(names)
    sheet = run_views.heat_sheet(models, picture, "p4")
    assert sheet.width >= 3 * run_views.CELL_SIDE
    assert np.ptp(np.asarray(sheet)[-LINE // 2].astype(int), axis=1).max() > 200  # the bar of the colors, below


def test_a_teacher_is_found_by_its_file_and_by_its_run(tmp_path):
    place(tmp_path, "big", "last.pt")
    (tmp_path / "file.pt").write_bytes(b"")
    weights = {"run": "big", "file": "file.pt", "gone": "gone.pt"}
    named = tuple(TeacherConfig(name, "yolov8s", weights=str(tmp_path / w)) for name, w in weights.items())
    config = SimpleNamespace(teachers=(*named, TeacherConfig("in_place", "yolov8s")))
    found = {"run": tmp_path / "big" / "weights" / "last.pt", "file": tmp_path / "file.pt"}
    assert run_views.find_teachers(config) == found
