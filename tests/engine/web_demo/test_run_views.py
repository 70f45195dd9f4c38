"""What the demo reads from runs."""

from pathlib import Path

import pytest
import torch

import checkpoint
from config import TermConfig
from engine.runtime import run_folder
from engine.runtime.run_folder import RunFolder
from engine.web_demo import run_views
from structures import Detections
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


def test_counts_of_models_with_other_classes():
    one = Detections(torch.zeros(3, 4), torch.ones(3), torch.tensor([0, 1, 1]))
    two = Detections(torch.zeros(1, 4), torch.ones(1), torch.tensor([0]))
    table = run_views.count_classes({"left": (one, ("cat", "dog", "cow")), "right": (two, ("dog",))})
    assert table == {"class": ["cat", "dog", "all"], "left": [1, 2, 3], "right": [0, 1, 1]}


def test_a_term_in_words():
    term = TermConfig(teacher="big", loss="cwd", weight=2.0, student_maps=("p3", "p4"), adapter="conv1x1")
    words = run_views.describe_term(term)
    assert words.startswith("2 x cwd on p3, p4, from the teacher big, through an adapter conv1x1: ")
    assert len(words.split(": ", 1)[1]) > 10


def test_two_models_on_one_picture(tmp_path, one_thread):
    models = {arch: checkpoint.load_model(save_teacher(tmp_path / arch, arch)) for arch in ("yolov8n", "yolov5nu")}
    picture = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
    results = run_views.compare(models, picture, score_threshold=0.0, iou_threshold=0.7)
    assert list(results) == list(models)
    for result in results.values():
        assert len(result.found.scores) and result.milliseconds > 0
        assert result.found.boxes_xyxy[:, 2].max() <= 60 and result.found.boxes_xyxy[:, 3].max() <= 40
    names = run_views.map_names([model for model, _ in models.values()])
    assert {"p3", "p4", "p5"} <= set(names)
    assert run_views.heat_sheet(models, picture, "p4").width >= 3 * run_views.CELL_SIDE
