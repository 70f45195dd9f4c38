"""Every shipped config names what exists, and the published projects run from end to end on a few pictures."""

import dataclasses
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

import compare
import models
import train
from config import load_config
from datasets.download import DATASETS, WEIGHTS
from distill import criterion as criterion_module
from distill.criterion import TeacherFacts
from distill.probing import probe
from engine.comparison import rows
from engine.comparison.study import load_study
from engine.comparison.table import METRICS
from engine.runtime import run_folder
from engine.training.checks import check_config
from engine.training.teaching import EMA, used_teachers
from errors import UserError
from teachers.clip_tokenizer import VOCABULARY_PATH
from tests.conftest import ROOT

RUNS = sorted((ROOT / "configs").glob("*.yaml"))
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
NAMES = ("a", "b", "c")


@cache
def fresh(arch):
    torch.manual_seed(0)
    model = models.build_teacher(arch) if arch in models.TEACHERS else models.build(arch, len(NAMES))
    if hasattr(model, "set_class_embeddings"):
        model.set_class_embeddings(NAMES, torch.randn(len(NAMES), 512), torch.randn(1, 512))
    return model.requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """The models are two gigabytes."""
    yield
    fresh.cache_clear()
    probe_once.cache_clear()


probe_once = cache(probe)  # of a model and a size, which many configs have in common
shipped_study = cache(load_study)  # reading one takes a fifth of a second; nobody changes it


@pytest.fixture(autouse=True)
def without_data(monkeypatch):
    """Pseudo boxes count as compute by the number of pictures, and the sets are not here."""
    monkeypatch.setattr(rows, "pseudo_flops", lambda config: 0.0)


def runs_of(path):
    """The configs that a shipped file asks to be trained: its rows, or the one it is."""
    return [row.config for row in shipped_study(path).rows] if path in STUDIES else [load_config(path)]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_train_takes_every_config(path):
    """With the weights in place: files of teachers and backbones are downloaded by the command in the first line."""
    config = load_config(path)
    student = dataclasses.replace(config.student, backbone_weights=None, frozen_norms=False)
    check_config(
        dataclasses.replace(config, student=student), without_weights=[teacher.name for teacher in config.teachers]
    )
    assert all(teacher.weights for teacher in config.teachers)  # train.py trains no teacher


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_only_compare_takes_a_study(path):
    assert len(shipped_study(path).rows) > 1
    with pytest.raises(UserError, match=r"compare\.py"):
        train.main([str(path), "device=cpu"])


@pytest.mark.parametrize("path", RUNS + STUDIES, ids=lambda path: path.stem)
def test_every_config_can_be_built(path, monkeypatch):
    """Its keys, architectures, losses, parameters, maps and adapters exist and fit together."""
    monkeypatch.setattr(criterion_module, "probe", probe_once)
    for config in runs_of(path):
        archs = {t.name: config.student.arch if t.arch == EMA else t.arch for t in config.teachers}
        teachers = {name: fresh(arch).eval() for name, arch in archs.items()}
        multiples = {name: getattr(teacher, "size_multiple", 1) for name, teacher in teachers.items()}
        criterion = criterion_module.Criterion(
            config.terms,
            student=fresh(config.student.arch),
            teachers=teachers,
            epochs=config.epochs,
            image_size=64,
            class_names=NAMES,
            facts={name: TeacherFacts(image_size=m * math.ceil(64 / m)) for name, m in multiples.items()},
        )
        assert len(criterion.terms) == len(config.terms)
        assert set(used_teachers(config)) == {teacher.name for teacher in config.teachers}


@pytest.mark.parametrize("path", RUNS + STUDIES, ids=lambda path: path.stem)
def test_every_config_begins_with_its_command(path):
    config = shipped_study(path).config if path in STUDIES else load_config(path)
    script = "compare.py" if path in STUDIES else "train.py"
    command = path.read_text(encoding="utf-8").splitlines()[0]
    assert command.startswith("# ") and f"python {script} {path.relative_to(ROOT)}" in command
    assert config.name == path.stem and config.runs == "runs"
    for part in command.split(" && "):
        if "datasets.download" in part:
            names, root = part.split("datasets.download ")[1].split(" --root ")
            fetched = [Path(root, DATASETS[name].folder) for name in names.split()]
    weights = {Path(teacher.weights) for teacher in config.teachers if teacher.weights}
    trained = {path for path in weights if path.parts[0] == "runs"}  # by another config's command, given before
    assert all(f"compare.py configs/studies/{path.parts[1]}.yaml" in command for path in trained)
    weights -= trained | {path for path in weights if (ROOT / path).is_file()}  # and what the repository has
    read = [Path(config.data.root), *weights]
    read += [VOCABULARY_PATH] if any(t.arch.startswith("clip") for t in config.teachers) else []
    read += [Path(model.backbone_weights) for model in (config.student, *config.teachers) if model.backbone_weights]
    if "datasets.download" in command:  # fetches all that is read, and nothing else
        assert all(any(related(path, target) for target in fetched) for path in read)
        assert all(any(related(path, target) for path in read) for target in fetched)
    released = {Path("data", DATASETS[name].folder, file.filename) for name, file in WEIGHTS.items()}
    assert weights <= released


def related(a: Path, b: Path) -> bool:
    """One is the other, or in it."""
    return a == b or a in b.parents or b in a.parents


@pytest.fixture(scope="module")
def few_cells(shared_data, tmp_path_factory):
    """Nine training and three test pictures of BCCD, in its own layout."""
    root = tmp_path_factory.mktemp("bccd")
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).symlink_to(shared_data / "bccd" / folder)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "classes.txt").write_text("Platelets\nRBC\nWBC\n")
    for split, count in (("trainval", 9), ("test", 3)):
        lines = (shared_data / "bccd" / "ImageSets" / "Main" / f"{split}.txt").read_text().splitlines()[:count]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def run_small(name, tmp_path, *overrides):
    """compare.py on a shipped config: one epoch at 64 px, a nano teacher; the rows, and the rows as written."""
    study = load_study(
        ROOT / "configs" / "studies" / f"{name}.yaml",
        [
            "image_size=64", "epochs=1", "batch_size=2", "evaluation.every_epochs=0", "optimizer.accumulate=1",
            "data.workers=0", "device=cpu", "precision=float32", f"runs={tmp_path}", *overrides,
        ],
    )  # fmt: skip
    rows = compare.compare(study)
    written = json.loads((tmp_path / name / "comparison.json").read_text())
    assert (tmp_path / name / "comparison.png").stat().st_size > 10_000
    assert "| distilled | longer | 1 |" in (tmp_path / name / "comparison.md").read_text()
    return rows, written


def logged(row, name):
    """A column of metrics.csv of a row's only run."""
    return [float(line[name]) for line in run_folder.read_metrics(row.row.folder(0) / "metrics.csv")]


def check_rows(rows, written, teacher):
    assert [row.name for row in rows] == ["baseline", f"teacher_{teacher}", "distilled", "longer"]
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    assert [row.row.config.epochs for row in rows] == [1, 1, 1, 2]
    for row in rows:
        assert all(0 <= row.values(metric)[0] <= 1 for metric in METRICS)


@pytest.mark.slow
@pytest.mark.usefixtures("one_plot")
def test_kitti_from_baseline_to_comparison(shared_data, tmp_path):
    rows, written = run_small(
        "kitti_yolov8n_from_yolov8m", tmp_path,
        f"data.root={shared_data / 'kitti_mini'}", "data.train=frames", "data.test=frames", "data.max_samples=4",
        "data.allow_overlap=true", "teachers.0.arch=yolov5nu", "terms.1.parameters.temperature=2.0",
    )  # fmt: skip
    check_rows(rows, written, "yolov8m")
    distilled = rows[2]
    assert [row.row.config.student.arch for row in rows[:3]] == ["yolov8n", "yolov5nu", "yolov8n"]
    for name in ("cwd_yolov8m", "soft_class_yolov8m"):
        assert logged(distilled, f"train/{name}")[0] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_plot")
@pytest.mark.parametrize(
    "name",
    [
        "bccd_yolov5n_from_yolov5x",
        pytest.param("bccd_yolov5n_from_yolov5s", marks=pytest.mark.weekly),
        pytest.param("voc_yolov5n_from_yolov5x", marks=pytest.mark.weekly),
    ],
)
def test_masked_imitation_from_baseline_to_comparison(name, few_cells, tmp_path):
    rows, written = run_small(
        name, tmp_path,
        f"data.root={few_cells}", "data.train=trainval", "data.test=test", "data.max_samples=4",
        "data.max_bad_fraction=0.1", "teachers.0.arch=yolov5n",
    )  # fmt: skip
    teacher = name.rsplit("_", 1)[1]
    check_rows(rows, written, teacher)
    assert {row.row.config.student.arch for row in rows} == {"yolov5n"}
    for loss in ("masked_mse", "soft_class"):
        assert logged(rows[2], f"train/{loss}_{teacher}")[0] > 0
        assert f"train/{loss}_{teacher}" not in run_folder.read_metrics(rows[0].row.folder(0) / "metrics.csv")[0]


def test_a_pair_on_kitti_at_each_temperature_and_alpha():
    rows = {row.name: row.config for row in load_study(ROOT / "configs/studies/kitti_yolov8s_from_yolov8l.yaml").rows}
    assert [rows[name].student.arch for name in ("baseline", "teacher_yolov8l")] == ["yolov8s", "yolov8l"]
    outputs = {name: config.terms[1] for name, config in rows.items() if config.terms}
    found = {name: (term.weight, term.parameters["temperature"]) for name, term in outputs.items()}
    alphas = {"alpha_0_3": (0.3, 3), "alpha_0_7": (0.7, 3)}
    assert found == {f"temperature_{t}": (0.5, t) for t in (2, 3, 5, 10)} | alphas
    assert len([term for term in outputs.values() if term.loss == "soft_class"]) == 6


def test_a_yolov5n_for_bccd_has_the_published_size():
    """1.77 M parameters, as the published comparison on BCCD says of its student."""
    assert round(sum(p.numel() for p in fresh("yolov5n").parameters()) / 1e6, 2) == 1.77
