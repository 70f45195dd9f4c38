"""Arguments of other projects are answered by a line that runs here."""

import shlex

import pytest

import train
from config import Config, from_tree, load_config, read_tree
from engine.command_line.keys import SECTIONS, keys_of
from engine.command_line.translation import PROJECTS, RENAMED, keys_by_name
from engine.comparison.study import load_study
from errors import UserError
from tests.conftest import ROOT

GRID = "configs/voc_fasterrcnn_resnet18_dinov2_clip.yaml"
ALONE = "configs/voc_fasterrcnn_resnet18.yaml"
CELLS = "configs/studies/bccd_yolov5n_from_yolov5x.yaml"
PAIR = "configs/studies/voc_yolov5n_from_yolov5x.yaml"


def answer(line: str) -> str:
    """What train.py says after `expected: `."""
    with pytest.raises(UserError) as error:
        train.main(shlex.split(line))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    return str(error.value).split("expected: ")[-1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--epochs 5", "python train.py CONFIG epochs=5"),
        ("mine.yaml --epochs=5 --dry-run", "python train.py mine.yaml --dry-run epochs=5"),
        (
            "mine.yaml seed=1 --batch-size 4 --lr0 0.1",
            "python train.py mine.yaml seed=1 batch_size=4 optimizer.learning_rate=0.1",
        ),
        (
            "--img 320 --cfg models/yolov5s.yaml --device 0",
            "python train.py CONFIG image_size=320 student.arch=yolov5s device=cuda:0",
        ),
        (
            "--data coco128.yaml --weights yolov8n.pt",
            "python train.py CONFIG data.format=yolo data.root=coco128.yaml data.test=val student.weights=yolov8n.pt",
        ),
        (
            "--optimizer SGD --cos-lr --workers 4",
            "python train.py CONFIG optimizer.name=sgd optimizer.schedule=cosine data.workers=4",
        ),
        (
            "--mosaic 0 --weight-decay 1e-4",
            "python train.py CONFIG augment.mosaic=0 optimizer.weight_decay=1e-4",
        ),
        (
            "--backbone resnet18 --distill --alpha 1 --beta 1 --gamma 0 --eval-every-epoch",
            f"python train.py {GRID} student.arch=fasterrcnn_resnet18 detection_weight=1 terms.0.weight=1 "
            "terms.1.weight=0 evaluation.every_epochs=1",
        ),
        (
            "--backbone vit_tiny --eval-final-only",
            f"python train.py {ALONE} student.arch=fasterrcnn_vit_tiny evaluation.every_epochs=0",
        ),
        (
            "--dataset pascal_voc --teacher_model yolov5x --student_model yolov5n",
            f"python compare.py {PAIR} teachers.0.arch=yolov5x student.arch=yolov5n",
        ),
        (
            "--dataset bccd --teacher_model yolov5l --student_model yolov5s --temperature 3 --alpha 0.5",
            f"python compare.py {CELLS} teachers.0.arch=yolov5l student.arch=yolov5s "
            "terms.1.parameters.temperature=3 terms.1.weight=0.5",
        ),
    ],
)  # fmt: skip
def test_answers(line, expected):
    assert answer(line) == expected
    _, script, config, *overrides = expected.split()
    overrides = [word for word in overrides if "=" in word]
    if config == "CONFIG" or config == "mine.yaml":  # every key exists and takes the value
        from_tree(Config, read_tree(ROOT / "configs" / "own_data.yaml", overrides), source="own_data")
    else:
        (load_study if script == "compare.py" else load_config)(ROOT / config, overrides)


def test_a_flag_without_counterpart():
    assert "did you mean augment.mosaic=VALUE? train.py --help lists them" in answer("--mosaik 1")
    assert answer("--frobnicate 3").startswith("argument --frobnicate: no such argument; train.py --help")


def test_own_flags_are_no_others():
    """Beginnings of them too, and what stands behind --init."""
    for line in ("--resume runs/none", "--resu runs/none", "c.yaml --row x", "--init a.txt --data b --teacher c"):
        with pytest.raises(UserError) as error:
            train.main(shlex.split(line))
        assert "a run is described by a config" not in str(error.value)
    assert answer("--data b") == "python train.py CONFIG data.format=yolo data.root=b data.test=val"


def test_every_counterpart_is_a_key():
    keys = {key.name for _, prefix, cls in SECTIONS for key in keys_of(prefix, cls)}
    assert set(keys_by_name().values()) <= keys
    for template in [*RENAMED.values(), *(text for project in PROJECTS for text in project.renamed.values())]:
        for key in (word.partition("=")[0] for word in template.split() if "=" in word):
            assert key.replace("terms.1", "terms.0").replace(".temperature", "") in keys, key
