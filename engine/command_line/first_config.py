"""The first config for a folder of pictures: `train.py --init own.yaml --data FOLDER` looks, measures and writes it.

Numbers are chosen by rules that stand beside them in the file: the image size by the size of the objects, the batch by
the memory that a training step takes here, the optimizer by the number of steps.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import models
from config import Config, apply_override, from_tree
from datasets.download import released
from datasets.folders import list_files
from datasets.images import SUFFIXES
from datasets.index import DatasetIndex
from datasets.scan import SUGGESTED, scan
from datasets.subset import keep_classes
from engine.command_line.data_folder import FoundSet, look
from engine.command_line.keys import SECTIONS, keys_of
from engine.runtime.peak_memory import peak_gigabytes, reset_peak
from engine.runtime.processes import choose_device
from engine.runtime.run_folder import write_text
from engine.training.checks import check_data, check_numbers
from errors import UserError, counted, expect, naming, shortened
from structures import Detector, Targets
from yaml_files import dump_yaml

STUDENT, UNLABELLED_TEACHER = "yolov8n", "yolov8s"
LABELLED = "data/labelled"  # stands in a config for the set that is not there
MULTIPLE = 32
SMALL_OBJECT = 8.0  # pixels: a side below is one location of the finest map
LONG_TRAINING = 10_000  # steps from which SGD with its published rates is proposed; AdamW below
LARGEST_BATCH = {"cpu": 16, "cuda": 64}
SIZES = {"cpu": (320, 416, 512, 640), "cuda": (640, 800, 960)}  # pixels, the usual one first


@dataclass(frozen=True)
class Measured:
    """A training step of the student on this machine."""

    seconds_per_image: float
    gigabytes_per_image: float | None  # None where the system does not say
    gigabytes: float | None  # of the process with a batch of one


def write_first_config(path: Path, folder: Path, overrides: Sequence[str], teacher: str | None) -> None:
    """Look at `folder`, write the config to `path`, and print what was found and the next line to type.

    overrides: keys that the user has chosen. teacher: an architecture that is to teach the student.
    UserError, with no config written, where the folder or a value cannot be used, and where `path` is there already.
    """
    expect(path.suffix in (".yaml", ".yml"), "argument --init", path, "the name of a new YAML file")
    if path.exists():
        raise UserError(f"argument --init: {path} is there already, expected a new name")
    if not path.parent.is_dir():
        raise UserError(f"argument --init: {path.parent}: no such folder")
    given = check_given(path, overrides, teacher)
    found = look(folder)
    if found is None:
        write_without_labels(path, folder, overrides, teacher or UNLABELLED_TEACHER)
        return
    print(describe(found))
    if classes := given.data.classes:
        keep_classes(found.train_index, classes, str(folder))
    tree, reasons = propose(found, path.stem, overrides, teacher)
    text = annotate(tree, reasons, f"{path}: made by train.py --init for {folder}; docs/configs.md has all keys.")
    from_tree(Config, tree, source=str(path))
    write_text(path, text)
    command = "compare.py" if tree.get("teachers") else "train.py"
    print(f"written: {path}\nnext: python {command} {path}")


def check_given(path: Path, overrides: Sequence[str], teacher: str | None) -> Config:
    """The given keys, beside defaults. UserError for a mistake in them or in --teacher, before any picture is read."""
    tree: dict[str, Any] = {"name": path.stem, "data": {"format": "yolo", "root": "."}, "student": {"arch": STUDENT}}
    for override in overrides:
        apply_override(tree, override)
    given = cast(Config, from_tree(Config, tree, source=str(path)))
    check_numbers(given, processes=1)
    check_data(given.data)
    with naming("key 'student.arch'"):
        models.check_arch(given.student.arch)
    if teacher is not None:
        with naming("argument --teacher"):
            models.check_arch(teacher)
    return given


def write_without_labels(path: Path, folder: Path, overrides: Sequence[str], teacher: str) -> None:
    """The config of a student that learns from a released teacher's boxes on pictures without labels.

    A set to measure on is not there, so its place is left to the user: the printed next line names the keys.
    """
    count = len(list_files(folder, SUFFIXES))
    weights, first = released(teacher) or (f"{teacher}.pt", f"put the teacher's weights at {teacher}.pt")
    tree: dict[str, Any] = {
        "name": path.stem,
        "data": {
            "format": "yolo",
            "root": LABELLED,
            "train": None,
            "test": "test",
            "unlabelled": {"root": shown_path(folder), "pseudo": {"teacher": "teacher", "threshold": 0.4}},
        },
        "student": {"arch": STUDENT},
        "teachers": [{"name": "teacher", "arch": teacher, "weights": weights}],
        "epochs": 100,
        "batch_size": 16,
        "image_size": SIZES[choose_device("auto").type][0],
        "evaluation": {"every_epochs": 5},
    }
    reasons = {"data.root": "a labelled set to measure on, and to name the classes; a hundred pictures tell something"}
    for override in overrides:
        apply_override(tree, override)
    title = f"{path}: made by train.py --init for {folder}; docs/use.md, Few labels, describes the setting."
    from_tree(Config, tree, source=str(path))
    write_text(path, annotate(tree, reasons, title))
    pictures = f"{counted(count, 'picture')} without labels"
    print(f"{folder}: {pictures}; {teacher}'s detections can serve as their boxes (pseudo boxes)")
    print(f"written: {path}\nnext: {first}, then")
    print(f"python train.py {path} data.format=FORMAT data.root=LABELLED_SET data.test=test")


def shown_path(path: Path) -> str:
    """Relative to the working directory where it lies below, else as it was given."""
    return os.path.relpath(path) if Path.cwd() in path.resolve().parents else str(path)


def describe(found: FoundSet) -> str:
    """The lines that are printed: format, splits, classes, what was written and what cannot be used."""
    names, train, test = found.train_index.names, found.train_index, found.test_index
    lines = [
        f"{found.root}: {found.format}, {counted(len(train), 'picture')} to train on ({found.train}), {len(test)} to "
        f"test on ({found.test})",
        f"{counted(len(names), 'class')}: {shortened(names)}",
        *found.notes,
    ]
    if found.written:
        lines.append("written: " + ", ".join(map(str, found.written)))
    faults = [*train.faults, *test.faults]
    if faults:
        command = f"python -m datasets.scan {found.format} {found.root} {found.train},{found.test}"
        lines.append(
            f"{counted(len(faults), 'fault')} in labels or pictures, the first: {faults[0]}; {command} lists them"
        )
    return "\n".join(lines)


def propose(
    found: FoundSet, name: str, overrides: Sequence[str], teacher: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The plain values of the config, and the reasons of some by their dotted key: of none that overrides change."""
    device = choose_device("auto")
    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    arch = given.get("student", {}).get("arch", STUDENT)
    size, size_reason = choose_image_size([found.train_index, found.test_index], device.type)
    size = given.get("image_size", size)
    measured = measure(arch, len(found.train_index.names), size, device)
    count = len(found.train_index)
    batch, batch_reason = choose_batch_size(measured, count, device)
    batch = given.get("batch_size", batch)
    epochs = given.get("epochs", 100)
    minutes = epochs * count * measured.seconds_per_image / 60
    reasons = {
        "image_size": size_reason,
        "batch_size": batch_reason,
        "epochs": f"about {minutes:.0f} min here for the student alone, by one measured step, without evaluation",
        "student.arch": "`train.py --list` has all",
        "data.test": "no number is chosen on it",
        "data.workers": "processes that read pictures; 0: the training process",
    }
    bad = max(scan(index).bad_fraction for index in (found.train_index, found.test_index))
    data = {
        "format": found.format,
        "root": shown_path(found.root),
        "train": found.train,
        "test": found.test,
        "workers": 0 if (os.cpu_count() or 1) < 4 else min(8, (os.cpu_count() or 1) // 2),
    }
    if bad > 0.01:
        data["max_bad_fraction"] = next(limit for limit in SUGGESTED if limit >= bad)
        reasons["data.max_bad_fraction"] = f"{bad:.1%} of the pictures or objects cannot be used; see datasets.scan"
    optimizer, reasons["optimizer.name"] = choose_optimizer(epochs * count / batch, batch)
    tree: dict[str, Any] = {
        "name": name,
        "data": data,
        "student": {"arch": arch},
        **(taught_by(teacher, arch) if teacher is not None else {}),
        "epochs": epochs,
        "batch_size": batch,
        "image_size": size,
        "optimizer": optimizer,
        "evaluation": {"every_epochs": 5},
    }
    for override in overrides:
        apply_override(tree, override)
    changed = {override.partition("=")[0].split(".")[0] for override in overrides} - {"epochs"}  # counted as given
    return tree, {key: reason for key, reason in reasons.items() if key.split(".")[0] not in changed}


def choose_optimizer(steps: float, batch: int) -> tuple[dict[str, Any], str]:
    """(the section `optimizer`, why) for a run of that many steps."""
    if steps >= LONG_TRAINING:
        sgd = {"name": "sgd", "learning_rate": 0.01, "accumulate": max(1, 64 // batch)}
        return sgd, "many steps: the published rates"
    adamw = {"name": "adamw", "learning_rate": 0.0015, "momentum": 0.9, "schedule": "cosine", "ema_ramp_steps": 500}
    return adamw, "few steps: the rates of configs/bccd_yolov8n.yaml"


def choose_image_size(indexes: Sequence[DatasetIndex], device: str) -> tuple[int, str]:
    """(side in pixels, why): the smallest usual size at which nine of ten objects are at least SMALL_OBJECT wide."""
    samples = [sample for index in indexes for sample in index.samples]
    longest = np.array([max(sample.width, sample.height) for sample in samples], dtype=np.float64)
    sides = [
        np.sqrt(np.clip(sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2], 0, None).prod(1)) / side
        for sample, side in zip(samples, longest)
    ]
    small = float(np.quantile(np.concatenate(sides), 0.1))  # as a share of the picture's longer side
    usual, *larger = SIZES[device]
    own = MULTIPLE * math.ceil(float(np.median(longest)) / MULTIPLE)
    size = next((size for size in (usual, *larger) if small * size >= SMALL_OBJECT), max(usual, *larger))
    size = max(MULTIPLE * 2, min(size, own))  # larger than the pictures is mostly interpolation
    return size, (
        f"pictures are {np.median(longest):.0f} px long at the median; at {size} px one object in ten is smaller than "
        f"{small * size:.0f} px"
    )


def measure(arch: str, num_classes: int, image_size: int, device: torch.device) -> Measured:
    """Two training steps with one and with three random images: the second of each counts."""
    detector = cast(Detector, models.build(arch, num_classes).to(device))
    peaks, seconds = [], 0.0
    for batch in (1, 3):
        images = torch.rand(batch, 3, image_size, image_size, device=device)
        rows = torch.arange(batch, device=device)
        boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75]], device=device).repeat(batch, 1) * image_size
        targets = Targets(boxes, torch.zeros_like(rows), rows, torch.zeros_like(rows, dtype=torch.bool))
        for _ in range(2):
            reset_peak(device)
            began = time.perf_counter()
            cast(torch.Tensor, sum(detector.losses(detector(images), targets).values())).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - began) / batch
        peaks.append(peak_gigabytes(device))
    first, last = peaks
    growth = None if first is None or last is None else max(0.0, last - first) / 2
    return Measured(seconds, growth, first)


def choose_batch_size(measured: Measured, pictures: int, device: torch.device) -> tuple[int, str]:
    """(images of a batch, why): a power of two, of at most half the free memory and an eighth of the pictures."""
    most = LARGEST_BATCH[device.type]
    free = free_gigabytes(device)
    reason = "the usual one"
    if measured.gigabytes_per_image and free is not None:
        fits = int(free / 2 / measured.gigabytes_per_image)
        reason = (
            f"an image takes about {1000 * measured.gigabytes_per_image:.0f} MB of {free:.0f} GB that are free here"
        )
        most = min(most, max(1, fits))
    if most > max(1, pictures // 8):
        most, reason = max(1, pictures // 8), f"an eighth of the {pictures} pictures at most"
    return 2 ** int(math.log2(most)), f"{reason}; out of memory? half of it, and optimizer.accumulate=2"


def free_gigabytes(device: torch.device) -> float | None:
    """Memory in 10^9 bytes that a training may take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024 / 1e9
    except (OSError, StopIteration):
        return None


def taught_by(teacher: str, arch: str) -> dict[str, Any]:
    """A teacher that compare.py trains on the same pictures, and a term on the maps of equal strides that both have."""
    if teacher.startswith(tuple(models.NEED_WEIGHTS)):
        raise UserError(f"argument --teacher: {teacher} does not learn from scratch, expected a detector that does")
    with torch.device("meta"):
        s, t = (cast(Detector, models.build(name, 1)) for name in (arch, teacher))
    maps = [name for name in ("p3", "p4", "p5") if name in s.strides and s.strides[name] == t.strides.get(name)]
    term = {"teacher": "teacher", "loss": "cwd", "weight": {"share": 0.1}, "student_maps": maps, "adapter": "conv1x1"}
    return {"teachers": [{"name": "teacher", "arch": teacher}], "terms": [term]}


def annotate(tree: dict[str, Any], reasons: dict[str, str], title: str) -> str:
    """The config as text, each key with its reason, or else with the comment of its field."""
    comments = {key.name: key.comment for _, prefix, cls in SECTIONS for key in keys_of(prefix, cls)} | reasons
    lines = [f"# {title}"]

    def add(key: str, value: Any, dotted: str, indent: str) -> None:
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}:")
            for name, item in value.items():
                add(name, item, f"{dotted}.{name}", indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{key}:")
            lines.extend(f"{indent}  - {dump_yaml(item, on_one_line=True).strip()}" for item in value)
        else:
            comment = comments.get(dotted, "")
            shown = dump_yaml({key: value}, on_one_line=True).strip()[1:-1]
            lines.append(f"{indent}{shown}" + (f"  # {comment}" if comment else ""))

    for key, value in tree.items():
        add(key, value, key, "")
    if "teachers" not in tree:
        lines += [
            "# A teacher, trained first by compare.py on the same pictures, and what it teaches:",
            "# teachers: [{name: big, arch: yolov8s}]",
            "# terms: [{teacher: big, loss: cwd, weight: {share: 0.1}, student_maps: [p3, p4, p5], adapter: conv1x1}]",
        ]
    return "\n".join(lines) + "\n"
