"""Arguments of other projects, answered by the line that does the same here.

`train.py --epochs 5` is answered with `epochs=5`, `predict.py --conf 0.5` with `--score-threshold 0.5`; so are the
names that Ultralytics' and YOLOv5's scripts have, and the commands of published projects that this one replaces
(docs/coming_from.md).
"""

import argparse
import dataclasses
import difflib
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import models
from config import NEAR, Config
from errors import UserError

# Flags without dashes, _ for -. {} is the value; a text without it is a flag that takes none.
RENAMED = {
    "batch": "batch_size={}",
    "img": "image_size={}",
    "imgsz": "image_size={}",
    "img_size": "image_size={}",
    "lr": "optimizer.learning_rate={}",
    "lr0": "optimizer.learning_rate={}",
    "lrf": "optimizer.final_fraction={}",
    "optimizer": "optimizer.name={}",
    "cos_lr": "optimizer.schedule=cosine",
    "warmup": "optimizer.warmup_epochs={}",
    "grad_accum": "optimizer.accumulate={}",
    "amp": "precision=bfloat16",
    "weights": "student.weights={}",
    "pretrained": "student.weights=FILE",
    "model": "student.arch={}",
    "cfg": "student.arch={}",
    "data": "data.format=yolo data.root={} data.test=val",
    "cache": "data.cache=true",
    "single_cls": "'data.classes=[NAME]'",
    "project": "runs={}",
    "output": "runs={}",
    "fliplr": "augment.flip_horizontal={}",
    "flipud": "augment.flip_vertical={}",
    "close_mosaic": "augment.close_mosaic_epochs={}",
    "hsv_h": "augment.hue={}",
    "hsv_s": "augment.saturation={}",
    "hsv_v": "augment.value={}",
    "conf": "evaluation.score_threshold={}",
    "iou": "evaluation.iou_threshold={}",
    "max_det": "evaluation.max_detections={}",
    "noval": "evaluation.every_epochs=0",
    "eval_every_epoch": "evaluation.every_epochs=1",
    "eval_final_only": "evaluation.every_epochs=0",
    "distill_model": "'teachers=[{{name: teacher, arch: ARCH, weights: {}}}]'",
    "dis": "terms.0.weight={}",
    "temperature": "terms.0.parameters.temperature={}",
}

ON, OFF = ("true", "1", "ram", "disk"), ("false", "0")  # values of flags that take none here, such as `--amp True`
SWITCHED_OFF = {"amp": "precision=float32", "cache": "data.cache=false", "cos_lr": "optimizer.schedule=linear"}

# Of the other commands. A value alone stands where the command takes it, in this order: the model before what it reads.
ALONE = "{}"
OF_MODEL = ("weights", "checkpoint", "model")
WEIGHTS_SUFFIXES = (".pt", ".pth", ".safetensors")
OF_BOTH = {
    "weights": ALONE,
    "checkpoint": ALONE,
    "model": ALONE,
    "img": "--image-size {}",
    "imgsz": "--image-size {}",
    "img_size": "--image-size {}",
    "conf": "--score-threshold {}",
    "conf_thres": "--score-threshold {}",
    "iou": "--nms-iou {}",
    "iou_thres": "--nms-iou {}",
    "max_det": "--max-detections {}",
    "half": "--precision bfloat16",
    "batch": "--batch-size {}",
}
OF_COMMANDS = {
    "eval.py": OF_BOTH
    | {
        "data": "yolo {} val",
        "backbone": "--config configs/voc_fasterrcnn_resnet18.yaml --arch fasterrcnn_{}",
        "save_json": "--save-detections predictions.json",
    },
    "predict.py": OF_BOTH
    | {
        "source": ALONE,
        "image": ALONE,
        "input": ALONE,
        "backbone": "--arch fasterrcnn_{}",
        "project": "--output {}",
        "save_txt": "--txt",
        "save_json": "--json",
        "nosave": "--no-pictures",
        "view_img": "--show",
    },
}


class Project(NamedTuple):
    """A published project: the flags that tell it, what its flags are here, and the config that is its experiment."""

    flags: frozenset[str]
    renamed: dict[str, str]
    config: str
    without_distill: str | None = None  # its config without --distill; None: it always distils
    datasets: dict[str, str] = {}  # noqa: RUF012  # value of --dataset: config


PROJECTS = (
    Project(  # a Faster R-CNN taught by DINOv2 and CLIP
        frozenset({"distill", "backbone"}),
        {
            "backbone": "student.arch=fasterrcnn_{}",
            "distill": "",
            "alpha": "detection_weight={}",
            "beta": "terms.0.weight={}",
            "gamma": "terms.1.weight={}",
        },
        "configs/voc_fasterrcnn_resnet18_dinov2_clip.yaml",
        without_distill="configs/voc_fasterrcnn_resnet18.yaml",
    ),
    Project(  # a YOLOv5 taught by a larger one
        frozenset({"teacher_model", "student_model"}),
        {
            "teacher_model": "teachers.0.arch={}",
            "student_model": "student.arch={}",
            "temperature": "terms.1.parameters.temperature={}",
            "alpha": "terms.1.weight={}",
        },
        "configs/studies/voc_yolov5n_from_yolov5x.yaml",
        datasets={"bccd": "configs/studies/bccd_yolov5n_from_yolov5x.yaml"},
    ),
)


def refuse_unknown(command: str, argv: Sequence[str], known: Sequence[str]) -> None:
    """UserError, with the equivalent line, if `argv` has a flag that is neither `known` nor the beginning of one.

    A name of another project counts as that name, even if it begins a known flag: eval.py's --conf is not --config.
    """
    flags = [token for token in argv if token.startswith("--") and len(token) > 2]
    foreign = OF_COMMANDS.get(command, {})
    unknown = []
    for flag in flags:
        name = flag.split("=")[0]
        if name not in known and (plain(flag) in foreign or not any(option.startswith(name) for option in known)):
            unknown.append(flag)
    if unknown:
        raise UserError((answer_command if foreign else answer_train)(command, argv, unknown))


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def answer_command(command: str, argv: Sequence[str], unknown: Sequence[str]) -> str:
    """One line for eval.py and predict.py: what was found, and the command with each unknown flag replaced."""
    renamed = OF_COMMANDS[command]
    kept, found = translate(command, argv, unknown, renamed)
    order = list(renamed)
    alone = sorted((name for name in found if not renamed[name].startswith("--")), key=order.index)  # without a flag
    model, inputs = ([found[name] for name in alone if (name in OF_MODEL) == is_model] for is_model in (True, False))
    place = 0  # in `kept`, of the inputs: behind the model, which is one of its words if no flag named it
    if not model:
        place = next((place for place, token in enumerate(kept) if token.startswith("-")), 0) or len(kept)
    flags = [found[name] for name in found if name not in alone]
    line = " ".join(filter(None, ["python", command, *model, *kept[:place], *inputs, *kept[place:], *flags]))
    return f"found {' '.join(unknown)}: these are flags of other projects, expected: {line}"


def answer_train(command: str, argv: Sequence[str], unknown: Sequence[str]) -> str:
    """One line: what was found, and the command with each unknown flag replaced."""
    names = [plain(flag) for flag in unknown]
    project = next((project for project in PROJECTS if project.flags & {*names}), None)
    renamed = {name: f"{key}={{}}" for name, key in keys_by_name().items()} | RENAMED
    config = "CONFIG"
    if project is not None:
        renamed |= project.renamed | {"dataset": "{}"}
    kept, found = translate(command, argv, unknown, renamed)
    if project is not None:
        config = project.config if "distill" in found else project.without_distill or project.config
        config = project.datasets.get(found.pop("dataset", ""), config)
    if any(not token.startswith("--") and "=" not in token for token in kept):
        config = ""  # it is given
    script = "compare.py" if config.startswith("configs/studies/") else command
    line = " ".join(filter(None, ["python", script, config, *kept, *found.values()]))
    return f"found {' '.join(unknown)}: a run is described by a config and key=value, expected: {line}"


def translate(
    command: str, argv: Sequence[str], unknown: Sequence[str], renamed: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The tokens that stay, and by the plain name of each unknown flag what it is here. UserError for one without."""
    kept: list[str] = []
    found: dict[str, str] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token not in unknown:
            kept.append(shlex.quote(token))
            continue
        name, (_, equals, value) = plain(token), token.partition("=")
        if name not in renamed:
            near = difflib.get_close_matches(name, renamed, n=1, cutoff=NEAR)
            advice = f"did you mean {renamed[near[0]].format('VALUE')}? " if near else ""
            keys = ", train.py --keys all keys" if command == "train.py" else ""
            raise UserError(f"argument {token}: no such argument; {advice}{command} --help lists them{keys}")
        takes_value = "{}" in renamed[name]
        values = ON + OFF if name in SWITCHED_OFF else (ON[0], OFF[0])
        if not equals and (takes_value or (tokens and tokens[0].lower() in values)):
            value = tokens.pop(0) if tokens else "VALUE"
        if not takes_value and value.lower() in OFF:
            if name in SWITCHED_OFF:  # others are off here without the flag
                found[name] = SWITCHED_OFF[name]
            continue
        if command == "train.py" and name in ("cfg", "model"):
            found[name] = student_of(value)
            continue
        value = as_value(name, value) if command == "train.py" else value
        found[name] = renamed[name].format(shlex.quote(value))
    return kept, found


def keys_by_name() -> dict[str, str]:
    """epochs -> epochs, mosaic -> augment.mosaic: the keys whose last part is a flag's name, the top level first."""
    found: dict[str, str] = {}
    hints = typing.get_type_hints(Config)
    fields = [("", Config)] + [(f"{n}.", hints[n]) for n in ("optimizer", "data", "student", "augment", "evaluation")]
    for prefix, cls in fields:
        for field in dataclasses.fields(cls):
            found.setdefault(field.name, prefix + field.name)
    return {name: key for name, key in found.items() if not dataclasses.is_dataclass(hints.get(key, None))}


def plain(flag: str) -> str:
    """--batch-size=4 -> batch_size"""
    return flag.split("=", 1)[0].removeprefix("--").replace("-", "_")


def as_value(name: str, value: str) -> str:
    """As a key has it: the number of a device is a device of torch."""
    if name == "device" and value.isdigit():
        return f"cuda:{value}"
    return value.lower() if name == "optimizer" else value


def student_of(value: str) -> str:
    """`yolov8n.yaml` -> its architecture; `yolov8n.pt` -> also the weights, from which such a command starts."""
    path = Path(value)
    if path.suffix not in WEIGHTS_SUFFIXES:
        return f"student.arch={shlex.quote(path.stem)}"
    arch = f"student.arch={path.stem} " if path.stem in models.ARCHITECTURES else ""
    return f"{arch}student.weights={shlex.quote(value)}"
