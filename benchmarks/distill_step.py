"""What distillation adds to a training step: YOLOv8n taught by YOLOv8s, beside its two unavoidable parts.

    python benchmarks/distill_step.py [--image-size 320] [--batch-size 16] [--rounds 7] [--threads N] [--cpu-time]
    /path/to/env/bin/python benchmarks/distill_step.py      # an environment with torch and ultralytics

    overhead = distilled step / (student's step + teacher's forward pass)

A step is forward, loss, backward and SGD on one batch: random pictures, ten objects each, 80 classes. The distilled
step also runs the teacher, the adapters and the terms. The target for the overhead is 1.08. Precision and memory format
are those of a run's defaults on the device, for both sides; Ultralytics' own distillation (its model, projector and
loss, from its package) stands beside ours where it is installed. `--terms score_weighted_l2` gives ours the loss and
the adapters it has. All steps take turns, round by round, in one process, each timed after an untimed one of its kind,
as in a run; times are those of the median round, the overhead is the median of the rounds' own. `--cpu-time` counts
CPU seconds of all threads instead of the clock's.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from benchmarks.train_step import NUM_CLASSES, build_step, random_batch
from boxes import cxcywh_to_xyxy
from config import TermConfig
from distill.criterion import Criterion, TeacherFacts
from errors import run_script
from layers.fusion import fuse
from runtime.processes import choose_device, keep_freed_memory, use_bfloat16
from runtime.timing import rotate
from structures import Targets
from training.building import Learner
from training.teaching import Teachers

TARGET = 1.08
NECK = ("p3", "p4", "p5")
TERMS = {
    "cwd+soft_class": (
        TermConfig("yolov8s", "cwd", 2.0, NECK, adapter="conv1x1"),
        TermConfig("yolov8s", "soft_class", 2.0, ("class_logits",)),
    ),
    "score_weighted_l2": (TermConfig("yolov8s", "score_weighted_l2", 6.0, NECK, adapter="mlp"),),
}
PARTS = ("student", "teacher", "distilled")
Steps = dict[str, Callable[[], float]]  # by PARTS; each returns a number, so the device has finished


def our_steps(batch: tuple[Tensor, ...], terms: tuple[TermConfig, ...], bfloat16: bool, channels_last: bool) -> Steps:
    """The training step's own losses, and Teachers for the teacher, folded as a run folds it."""
    images, boxes_cxcywh_norm, labels, image = batch
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    targets = Targets(
        cxcywh_to_xyxy(boxes_cxcywh_norm) * images.shape[-1], labels, image, torch.zeros_like(labels, dtype=torch.bool)
    )
    torch.manual_seed(0)
    teacher = models.build("yolov8s", NUM_CLASSES).to(images.device, memory_format=memory_format)
    teachers = {"yolov8s": fuse(teacher.requires_grad_(False))}
    teach = Teachers(teachers, {"yolov8s": TeacherFacts()}, bfloat16)
    images = images.to(memory_format=memory_format)

    def step_with(terms: tuple[TermConfig, ...]) -> Callable[[], float]:
        student = models.build("yolov8n", NUM_CLASSES).to(images.device).train()
        names = tuple(map(str, range(NUM_CLASSES)))
        criterion = Criterion(terms, student=student, teachers=teachers, epochs=1, image_size=64, class_names=names)
        criterion = criterion.to(images.device)

        def loss(images: Tensor) -> Tensor:
            t_outputs = teach(images) if terms else {}
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bfloat16):
                s_output = student(images)
            losses = student.losses(s_output, targets) | criterion(s_output, t_outputs, targets, 0.0)
            return sum(losses.values()) * len(images)

        return build_step(Learner(student, criterion), loss, images, channels_last)

    def forward() -> float:
        return teach(images)["yolov8s"].features["p5"].sum().item()

    return {"student": step_with(()), "teacher": forward, "distilled": step_with(terms)}


def peer_steps(batch: tuple[Tensor, ...], bfloat16: bool, channels_last: bool) -> Steps:
    """Ultralytics' models and losses, called from outside; ImportError where there is no distillation in it."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.distill_model import DistillationModel
    from ultralytics.nn.tasks import DetectionModel

    images, boxes_cxcywh_norm, labels, image = batch
    rows = {"cls": labels[:, None].float(), "bboxes": boxes_cxcywh_norm, "batch_idx": image.float()}

    def build(size: str) -> DetectionModel:
        model = DetectionModel(f"yolov8{size}.yaml", nc=NUM_CLASSES, verbose=False).to(images.device)
        model.args = get_cfg()
        return model

    def step_of(model: torch.nn.Module) -> Callable[[], float]:
        def loss(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bfloat16):
                return model({"img": images, **rows})[0].sum()

        return build_step(model.train(), loss, images, channels_last)

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    alone = build("s").to(memory_format=memory_format).eval().requires_grad_(False)
    formatted = images.to(memory_format=memory_format)

    @torch.no_grad()
    def teach() -> float:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return alone(formatted)[0].float().sum().item()

    distilled = DistillationModel(build("s"), build("n")).to(images.device)
    return {"student": step_of(build("n")), "teacher": teach, "distilled": step_of(distilled)}


def overhead(seconds: dict[tuple[str, str], list[float]], side: str) -> float:
    """The median over rounds of distilled / (student + teacher)."""
    rounds = zip(*(seconds[side, part] for part in PARTS))
    return statistics.median(distilled / (student + teacher) for student, teacher, distilled in rounds)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default, one for each core")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--terms", choices=list(TERMS), default="cwd+soft_class")
    parser.add_argument("--device", default="auto", help="cuda where there is one")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()  # as train.py does
    device = choose_device(args.device)
    bfloat16 = use_bfloat16("auto", device)
    batch = tuple(part.to(device) for part in random_batch(args.batch_size, args.image_size))
    steps = {("ours", name): step for name, step in our_steps(batch, TERMS[args.terms], bfloat16, True).items()}
    try:
        steps |= {("peer", name): step for name, step in peer_steps(batch, bfloat16, True).items()}
        peer = f"ultralytics {sys.modules['ultralytics'].__version__}"
    except ImportError:
        peer = "ultralytics with distillation is not installed: its column is empty"
    print(
        f"YOLOv8n from YOLOv8s, {args.terms}, {args.image_size} px, batch {args.batch_size}, {device}, "
        f"{'bfloat16' if bfloat16 else 'float32'} channels_last, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; {peer}"
    )
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = rotate(steps, args.rounds, clock, settle=True)
    sides = [side for side in ("ours", "peer") if (side, "student") in steps]
    unit = "images per CPU second" if args.cpu_time else "images/s"
    print(f"{unit:<24}{'ours':>12}{'Ultralytics':>14}")
    rate = {key: args.batch_size / statistics.median(values) for key, values in seconds.items()}
    for part, label in zip(PARTS, ("student's step", "teacher's forward pass", "distilled step")):
        print(f"{label:<24}" + "".join(f"{rate[side, part]:{12 + 2 * number}.2f}" for number, side in enumerate(sides)))
    found = {side: overhead(seconds, side) for side in sides}
    cells = "".join(f"{value:{12 + 2 * number}.3f}" for number, value in enumerate(found.values()))
    print(f"{'overhead':<24}{cells}   target for ours {TARGET}: {'met' if found['ours'] <= TARGET else 'missed'}")
    if "peer" in sides:
        print(f"distilled images/s, ours / Ultralytics: {rate['ours', 'distilled'] / rate['peer', 'distilled']:.2f}")


if __name__ == "__main__":
    run_script(main)
