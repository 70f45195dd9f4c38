"""What distillation adds to a training step: YOLOv8n taught by YOLOv8s, beside its two unavoidable parts.

    python benchmarks/distill_step.py [--image-size 320] [--batch-size 16] [--rounds 7] [--threads N] [--cpu-time]
        [--teacher yolov8s]
    /path/to/env/bin/python benchmarks/distill_step.py      # an environment with torch and ultralytics

    overhead = distilled step / (student's step + teacher's forward pass)
    kept     = distilled step with the teacher's outputs read from disk / student's step

A step is forward, loss, backward and SGD on one batch: random images, ten objects each, 80 classes. The distilled
step also runs the teacher, the adapters and the terms. The targets are 1.08 for the overhead, and 1.25 for the step of
a row that finds its teacher's outputs (teacher_cache_gigabytes; the files lie in the system's memory here). Precision
and memory format are those of a run's defaults on the device, for both sides; Ultralytics' own distillation (its model,
projector and loss, from its package) stands beside ours where it is installed. `--terms score_weighted_l2` gives ours
the loss and the adapters it has. All steps take turns, round by round, in one process, each timed after an untimed one
of its kind, as in a run; times are those of the median round, overhead and kept are the median of the rounds' own.
`--cpu-time` counts CPU seconds of all threads instead of the clock's.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from benchmarks.timing import (
    build_step,
    header,
    options,
    parse,
    random_batch,
    row,
    take_turns,
    ultralytics_rows,
    versions,
)
from config import TermConfig
from distill.criterion import Criterion, TeacherFacts
from engine.runtime.processes import choose_device, keep_freed_memory, use_bfloat16
from engine.training.building import Learner
from engine.training.teaching import Teachers
from errors import run_script
from layers.fusion import fuse
from structures import Targets

TARGET, KEPT_TARGET, NUM_CLASSES = 1.08, 1.25, 80
CHANNELS_LAST = torch.channels_last
NECK = ("p3", "p4", "p5")
TERMS = {
    "cwd+soft_class": (
        TermConfig("yolov8s", "cwd", 2.0, NECK, adapter="conv1x1"),
        TermConfig("yolov8s", "soft_class", 2.0, ("class_logits",)),
    ),
    "score_weighted_l2": (TermConfig("yolov8s", "score_weighted_l2", 6.0, NECK, adapter="mlp"),),
}
PARTS = ("student", "teacher", "distilled")
LABELS = {
    "student": "student's step",
    "teacher": "teacher's forward pass",
    "distilled": "distilled step",
    "kept": "distilled step, outputs kept",
}
Steps = dict[str, Callable[[], float]]  # by PARTS; each returns a number, so the device has finished


def build_ours(
    student: str, teacher: str | None, terms: tuple[TermConfig, ...], device: torch.device
) -> tuple[nn.Module, Criterion, dict[str, nn.Module]]:
    """Student and criterion to train, and by its name the teacher, frozen and folded as a run folds it."""
    build = lambda arch: models.build(arch, NUM_CLASSES).to(device, memory_format=CHANNELS_LAST)
    torch.manual_seed(0)
    model, names = build(student).train(), tuple(map(str, range(NUM_CLASSES)))
    teachers = {teacher: fuse(build(teacher).requires_grad_(False))} if teacher else {}
    criterion = Criterion(terms, student=model, teachers=teachers, epochs=1, image_size=64, class_names=names)
    return model, criterion.to(device), teachers


def build_peer(student: str, teacher: str | None, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Ultralytics' student, and the model (it, or its distillation) that makes losses of a batch.

    ImportError where the package, or its distillation, is missing.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    def build(arch: str) -> nn.Module:
        model = DetectionModel(f"{arch}.yaml", nc=NUM_CLASSES, verbose=False)
        model.args = get_cfg()
        return model.to(device, memory_format=CHANNELS_LAST)

    torch.manual_seed(0)
    model = build(student)
    if teacher is None:
        return model, model.train()
    from ultralytics.nn.distill_model import DistillationModel

    return model, DistillationModel(build(teacher), model).to(device).train()


def our_steps(
    batch: tuple[Tensor, Targets], terms: tuple[TermConfig, ...], bfloat16: bool, folder: Path | None = None
) -> Steps:
    """The training step's own losses, and Teachers for the teacher of the terms.

    folder: of the kept outputs; None: without the step that reads them.
    """
    images, targets = batch
    images = images.contiguous(memory_format=CHANNELS_LAST)
    teacher = terms[0].teacher

    def step_with(terms: tuple[TermConfig, ...], folder: Path | None = None) -> tuple[Callable[[], float], Teachers]:
        student, criterion, teachers = build_ours("yolov8n", teacher, terms, images.device)
        teach = Teachers(teachers, {teacher: TeacherFacts()}, bfloat16)
        if terms:
            teachers[teacher].requested_outputs = criterion.requested_outputs(teacher)
        if folder is not None:
            teach.keep_outputs(folder, 1.0)

        def loss(images: Tensor) -> Tensor:
            t_outputs = teach(images) if terms else {}
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bfloat16):
                s_output = student(images)
            losses = student.losses(s_output, targets) | criterion(s_output, t_outputs, targets, 0.0)
            return sum(losses.values()) * len(images)

        return build_step(Learner(student, criterion), loss, images, channels_last=True), teach

    (student, _), (distilled, teach) = step_with(()), step_with(terms)
    forward = lambda: teach(images)[teacher].features["p5"].sum().item()
    steps = {"student": student, "teacher": forward, "distilled": distilled}
    return steps if folder is None else steps | {"kept": step_with(terms, folder)[0]}


def peer_steps(batch: tuple[Tensor, Targets], bfloat16: bool) -> Steps:
    """ImportError where there is no distillation in Ultralytics' package."""
    images, targets = batch
    rows = ultralytics_rows(targets, images.shape[-1])
    images = images.contiguous(memory_format=CHANNELS_LAST)
    autocast = lambda: torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bfloat16)

    def step_of(model: nn.Module) -> Callable[[], float]:
        def loss(images: Tensor) -> Tensor:
            with autocast():
                return model({"img": images, **rows})[0].sum()

        return build_step(model, loss, images, channels_last=True)

    distilled = step_of(build_peer("yolov8n", "yolov8s", images.device)[1])
    alone = build_peer("yolov8s", None, images.device)[1].eval().requires_grad_(False)

    @torch.no_grad()
    def teach() -> float:
        with autocast():
            return alone(images)[0].float().sum().item()

    student = step_of(build_peer("yolov8n", None, images.device)[1])
    return {"student": student, "teacher": teach, "distilled": distilled}


def kept_ratio(seconds: dict[tuple[str, str], list[float]]) -> float:
    """The median over rounds of the step that finds its teacher's outputs / the student's step."""
    return statistics.median(k / s for k, s in zip(seconds["ours", "kept"], seconds["ours", "student"]))


def overhead(seconds: dict[tuple[str, str], list[float]], side: str) -> float:
    """The median over rounds of distilled / (student + teacher)."""
    rounds = zip(*(seconds[side, part] for part in PARTS))
    return statistics.median(distilled / (student + teacher) for student, teacher, distilled in rounds)


def main(argv: list[str]) -> None:
    parser = options(__doc__, rounds=7, image_size=320, batch_size=16)
    parser.add_argument("--terms", choices=list(TERMS), default="cwd+soft_class")
    parser.add_argument("--teacher", default="yolov8s", help="the peer's is always yolov8s")
    parser.add_argument("--device", default="auto", help="cuda where there is one")
    args = parse(parser, argv)
    keep_freed_memory()  # as train.py does
    device = choose_device(args.device)
    bfloat16 = use_bfloat16("auto", device)
    batch = tuple(part.to(device) for part in random_batch(args.batch_size, args.image_size))
    terms = tuple(dataclasses.replace(term, teacher=args.teacher) for term in TERMS[args.terms])
    with tempfile.TemporaryDirectory() as folder:
        measure(args, batch, terms, bfloat16, Path(folder))


def measure(
    args: argparse.Namespace,
    batch: tuple[Tensor, Targets],
    terms: tuple[TermConfig, ...],
    bfloat16: bool,
    folder: Path,
) -> None:
    device = batch[0].device
    steps = {("ours", name): step for name, step in our_steps(batch, terms, bfloat16, folder).items()}
    with contextlib.suppress(ImportError):
        steps |= {("peer", name): step for name, step in peer_steps(batch, bfloat16).items()}
    print(
        f"yolov8n from {args.teacher}, {args.terms}, {args.image_size} px, batch {args.batch_size}, {device}, "
        f"{'bfloat16' if bfloat16 else 'float32'} channels_last, {versions('ultralytics')}"
    )
    print(header("images per CPU second" if args.cpu_time else "images/s", "Ultralytics"))
    seconds = take_turns(steps, args, settle=True)
    for part, label in LABELS.items():
        sides = {side: times for (side, name), times in seconds.items() if name == part}
        print(row(label, sides, lambda s: args.batch_size / s))
    found = {side: overhead(seconds, side) for side in ("ours", "peer") if (side, "student") in steps}
    cells = "".join(f"{value:10.3f}{'':10}" for value in found.values())
    verdict = lambda value, target: f"target for ours {target}: {'met' if value <= target else 'missed'}"
    print(f"{'overhead':<34}{cells}  {verdict(found['ours'], TARGET)}")
    kept = kept_ratio(seconds)
    print(f"{'kept':<34}{kept:10.3f}{'':10}  {verdict(kept, KEPT_TARGET)}")


if __name__ == "__main__":
    run_script(main)
