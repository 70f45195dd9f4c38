"""Arguments of other projects are answered by a line that runs here."""

import shlex

import pytest

import eval
import predict
import train
from config import Config, from_tree, load_config, read_tree
from engine.command_line.keys import SECTIONS, keys_of
from engine.command_line.translation import OF_COMMANDS, PROJECTS, RENAMED, keys_by_name
from engine.comparison.study import load_study
from errors import UserError
from tests.conftest import ROOT

GRID = "configs/voc_fasterrcnn_resnet18_dinov2_clip.yaml"
ALONE = "configs/voc_fasterrcnn_resnet18.yaml"
CELLS = "configs/studies/bccd_yolov5n_from_yolov5x.yaml"
PAIR = "configs/studies/voc_yolov5n_from_yolov5x.yaml"


def answer(line: str, command=train) -> str:
    """What a command says after `expected: `."""
    with pytest.raises(UserError) as error:
        command.main(shlex.split(line))
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
        ("--model yolov8n.pt", "python train.py CONFIG student.arch=yolov8n student.weights=yolov8n.pt"),
        ("--model=runs/best.pt", "python train.py CONFIG student.weights=runs/best.pt"),
        (
            "--optimizer SGD --cos-lr --workers 4",
            "python train.py CONFIG optimizer.name=sgd optimizer.schedule=cosine data.workers=4",
        ),
        ("--amp True --cache ram", "python train.py CONFIG precision=bfloat16 data.cache=true"),
        ("--amp=False --cos-lr 0 --noval False", "python train.py CONFIG precision=float32 optimizer.schedule=linear"),
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
        ("--distill False --backbone resnet18", f"python train.py {ALONE} student.arch=fasterrcnn_resnet18"),
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


EVAL, PREDICT = "python eval.py", "python predict.py"


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        (
            eval,
            "--checkpoint runs/a --backbone resnet18",
            f"{EVAL} runs/a --config {ALONE} --arch fasterrcnn_resnet18",
        ),
        (
            eval,
            "--data coco128.yaml --weights best.pt --img 640 --conf-thres 0.001 --iou-thres=0.6",
            f"{EVAL} best.pt yolo coco128.yaml val --image-size 640 --score-threshold 0.001 --nms-iou 0.6",
        ),
        (eval, "x.pt voc data --conf 0.1 --iou 0.5", f"{EVAL} x.pt voc data --score-threshold 0.1 --nms-iou 0.5"),
        (
            predict,
            "--source 'my photos' --weights yolov5n.pt --img 320 --conf 0.5 --iou 0.4 --json",
            f"{PREDICT} yolov5n.pt 'my photos' --json --image-size 320 --score-threshold 0.5 --nms-iou 0.4",
        ),
        (predict, "a b.jpg --conf 0.3 --imgsz 640", f"{PREDICT} a b.jpg --score-threshold 0.3 --image-size 640"),
        (predict, "--image a.jpg --checkpoint c.pt --save-txt", f"{PREDICT} c.pt a.jpg --txt"),
        (eval, "best.pt --data coco128.yaml --img 640", f"{EVAL} best.pt yolo coco128.yaml val --image-size 640"),
        (eval, "--device cpu best.pt --data c.yaml", f"{EVAL} --device cpu best.pt yolo c.yaml val"),
        (predict, "best.pt --source a.jpg --json", f"{PREDICT} best.pt a.jpg --json"),
        (predict, "best.pt --json --source a.jpg", f"{PREDICT} best.pt a.jpg --json"),
        (predict, "m.pt a.jpg --half False --nosave True", f"{PREDICT} m.pt a.jpg --no-pictures"),
        (predict, "m.pt webcam --view-img --half", f"{PREDICT} m.pt webcam --show --precision bfloat16"),
    ],
)  # fmt: skip
def test_answers_of_other_commands(command, line, expected):
    """And the command takes the answer."""
    assert answer(line, command) == expected
    command.parse_arguments(shlex.split(expected)[2:])


@pytest.mark.parametrize(("command", "name"), [(eval, "eval.py"), (predict, "predict.py")])
def test_every_flag_of_another_project_is_one_here(command, name):
    sample = {"half": "", "save_json": "", "save_txt": "", "nosave": "", "view_img": ""}
    for flag in OF_COMMANDS[name]:
        value = sample.get(flag, "0.5" if flag[:4] in ("conf", "iou", "iou_") else "64")
        said = answer(f"m.pt x --{flag} {value}", command)
        words = shlex.split(said.removeprefix(f"python {name} "))
        command.parse_arguments(words)


def test_own_flags_of_other_commands_stay(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        eval.main(["none.pt", "voc", str(tmp_path), "--score-thr", "0.5", "--nms-iou", "0.5"])
    for flags in (["--iou-thresholds", "0.5"], ["--iou-thr", "0.5"]):
        with pytest.raises(UserError, match=r"gone\.json"):
            eval.main(["--ground-truth", "gone.json", "--detections", "gone.json", *flags])
    assert answer("m.pt x.jpg --scorethreshold 0.5", predict).startswith("argument --scorethreshold: no such argument")


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
        for key in (word.partition("=")[0] for word in shlex.split(template) if "=" in word):
            assert key.replace("terms.1", "terms.0").replace(".temperature", "") in keys, key
