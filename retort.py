"""Retort from Python. It runs from its checkout; a notebook that stands elsewhere adds the checkout to its path first:

    import sys; sys.path.insert(0, "path/to/retort")
    import retort

    model = retort.load("data/weights/yolov8n/yolov8n.pt")  # after python -m datasets.download yolov8n
    found = model.predict("photo.jpg", score=0.25)
    print(found[0])
    found[0].draw().save("out.jpg")

    retort.train("configs/own_data.yaml", epochs=10)
    retort.compare("configs/studies/demo.yaml", seeds=3)
    print(retort.evaluate("runs/own_data", "yolo", "data/mine", "test").text())

In your own training loop: `build` a model, give its losses and those of a `Criterion` to backward; `TeacherFacts`
say which classes and what image size a teacher has. `losses` has each distillation loss as a function of tensors. A
mistake that a user can make raises `UserError`, one line of text.
Images are float (B, 3, H, W), RGB, in [0, 1]; boxes are x1, y1, x2, y2 in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import compare as comparison
import train as training
from config import Config, TermConfig, load_config
from distill import losses
from distill.criterion import Criterion, TeacherFacts
from engine.comparison.study import load_study
from engine.comparison.table import Result
from engine.evaluation.measuring import EvaluationResult
from engine.from_python import model
from engine.from_python.changes import as_overrides
from engine.from_python.found import Detections
from engine.from_python.model import Model
from errors import UserError, expect
from models import ARCHITECTURES, TEACHERS, build, build_teacher
from structures import Targets

__all__ = [
    "ARCHITECTURES",
    "TEACHERS",
    "Criterion",
    "Detections",
    "Model",
    "Targets",
    "TeacherFacts",
    "TermConfig",
    "UserError",
    "build",
    "build_teacher",
    "compare",
    "evaluate",
    "load",
    "losses",
    "train",
]


def load(
    source: str | Path, *, arch: str | None = None, classes: Sequence[str] | None = None, device: str = "auto"
) -> Model:
    """A detector: `model.predict(pictures, score=0.25)` returns a list of Detections, `model.module` is the nn.Module.

    Args:
        source: a released file, a checkpoint of ours, the folder of a run, a file of export.py (ONNX), or a name in
            ARCHITECTURES, which gives a model with untrained weights and warns. An existing file wins over a name.
        arch: the architecture of a released file, where its names and shapes leave it open.
        classes: the class names of an untrained model; None: COCO's 80.
        device: a device of torch; auto: cuda where there is one. An ONNX file runs on the CPU.
    UserError for a file that cannot be read and for an unknown name. Nothing that a file names is run.
    """
    return model.load(source, arch=arch, classes=classes, device=device)


def train(
    config: str | Path,
    /,
    *,
    resume: bool = False,
    quiet: bool = False,
    allow_change: Sequence[str] = (),
    teacher_models: dict[str, nn.Module] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train a config to its end, as train.py does, and return the report that is written to runs/<name>/report.json.

    Args:
        config: a YAML file.
        resume: go on with the run <name> in its folder.
        quiet: print nothing but the line about a signal.
        allow_change: keys that may differ from those of the run that goes on.
        teacher_models: modules by the names in config.teachers, instead of their weights.
        changes: keys of the config, `epochs=10, **{"optimizer.learning_rate": 0.002}`; a dict changes the keys it has.
    UserError for a mistake in the config or the data; SystemExit after Ctrl-C, when all is saved.
    """
    for name, teacher in (teacher_models or {}).items():
        expected = "an nn.Module with the dataset's classes; a file is named as teachers.0.weights in the config"
        expect(isinstance(teacher, nn.Module), f"argument teacher_models: {name}", type(teacher).__name__, expected)
    loaded: Config = load_config(config, as_overrides(changes))
    allowed = model.list_of_texts("allow_change", allow_change)
    return training.run(loaded, resume=resume, quiet=quiet, teachers=teacher_models, allow_change=allowed)


def compare(
    config: str | Path, /, *, seeds: int = 1, only_rows: Sequence[str] | None = None, **changes: Any
) -> list[Result]:
    """Train the missing runs of a study, or of a config with teachers and terms, as compare.py does; print the table.

    Args:
        config: a YAML file.
        seeds: runs of each row, with the seeds seed, seed + 1, ...
        only_rows: names of the rows to train, with the teachers they need; None: all.
        changes: as for train.
    Returns the results of all rows in the order of the table; `result.reports[seed]["test"]` has the numbers of a run.
    UserError as for train, and after all other runs if one had a loss that is not finite.
    """
    model.check_kinds({}, {"seeds": seeds})
    study = load_study(config, as_overrides(changes), seeds=seeds)
    only = None if only_rows is None else list(model.list_of_texts("only_rows", only_rows))
    return comparison.compare(study, only=only)


def evaluate(
    detector: Model | str | Path, format: str, root: str | Path, split: str = "test", **settings: Any
) -> EvaluationResult:
    """Measure a model on a dataset, as eval.py does: `result.numbers["mAP50-95"]`, `print(result.text())`.

    Args:
        detector: a Model, or what `load` takes.
        format, root, split: of the dataset: voc, coco, yolo, kitti or shapes; its folder; the name of the split.
        settings: protocol ("coco", "voc07", "voc12"), score_threshold, iou_threshold, max_detections, batch_size and
            precision, by default those that the model was evaluated with in its run, or published with; classes, the
            only ones to measure; class_map, such as ["aeroplane=airplane"]; image_size in pixels; workers.
    Classes that model and dataset name differently are joined by meaning: `result.class_map` says which.
    """
    held = detector if isinstance(detector, Model) else load(detector)
    return model.evaluate(held, (format, str(root), split), **settings)
