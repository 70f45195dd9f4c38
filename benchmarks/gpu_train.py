"""A training step on a GPU, as train.py makes it: images per second, where the time goes, memory, waits of the host.

    python benchmarks/gpu_train.py [--rounds 5] [--steps 10] [--students yolov8n] [--contestants eager kernels]
    python benchmarks/gpu_train.py --device cpu --image-size 64 --batch-size 2 --steps 2     # to see that it runs

None of this has run on a GPU yet, and no number of it is known.

YOLOv8n and YOLOv8s at 640 px, batch 64, bfloat16, channels_last, random pictures with ten objects each; alone, and
taught by YOLOv8m (CWD on the neck, soft class targets). A step is: pictures to the device, augmentation there, the
teacher, the student, its losses, those of distillation, backward, clipping, the one wait of the host (for the numbers
to log), SGD and the running mean. The contestants, one after another, each alone in memory:

    eager     the losses' specifications, no kernel of ours
    kernels   the Triton kernels, where there are terms to distil
    compile   the same, student and teacher under torch.compile
    graphs    the same, replayed as CUDA graphs (mode "reduce-overhead")
    peer      Ultralytics' model and loss (and its distillation), all else the same, where it is installed

"images/s" is the median round, of `steps` steps without marks between the parts. The parts' shares are of one more
round, between events on the device: where the host is late, the part that the device waits in is the longer one.
"waits" counts what makes the host wait in one step, by line in the JSON; 1 is the goal. With --device cpu it is more:
there the assigner lists its candidates, which costs less than masks. "of peer" has the target 1.3.
Where a contestant's first losses are not those of eager, it has no numbers. Writes OUTPUT/gpu_train.md and .json.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from benchmarks.distill_step import TERMS
from benchmarks.host_waits import host_waits
from benchmarks.train_step import NUM_CLASSES, random_batch
from boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from config import AugmentConfig, OptimizerConfig, TermConfig
from datasets.augment import augment
from distill.criterion import Criterion, TeacherFacts
from errors import run_script
from kernels.backend import HAS_TRITON
from layers.fusion import fuse
from runtime.processes import choose_device
from structures import Targets
from training.optimization import Ema, build_optimizer
from training.teaching import Teachers

STUDENTS, TEACHER = ("yolov8n", "yolov8s"), "yolov8m"
CONTESTANTS = ("eager", "kernels", "compile", "graphs", "peer")
COMPILE = {"compile": "default", "graphs": "reduce-overhead"}  # modes of torch.compile
TARGET = 1.3
PARTS = (
    "upload", "augment", "teacher", "student", "detection", "distillation", "backward", "clip", "wait", "update",
)  # fmt: skip
TOLERANCE = 0.02  # of the first losses, relative: bfloat16, and operations in another order

Mark = Callable[[str], None]
Forward = Callable[[Tensor, Targets, Mark], dict[str, Tensor]]  # images, targets -> named terms


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    student: str
    is_taught: bool
    contestant: str
    device: torch.device
    image_size: int
    batch_size: int
    bfloat16: bool = True


class Marks:
    """The time of the device at named points; milliseconds() is of the parts that end there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.points = device, [("", self.now(device))]

    @staticmethod
    def now(device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, name: str) -> None:
        self.points.append((name, self.now(self.device)))

    def milliseconds(self) -> dict[str, float]:
        synchronize(self.device)
        return {name: elapsed(before, now) for (_, before), (name, now) in zip(self.points, self.points[1:])}


def elapsed(before: Any, now: Any) -> float:
    return 1000 * (now - before) if isinstance(now, float) else before.elapsed_time(now)


def no_mark(name: str) -> None:
    pass


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_forward(setting: Setting, *further: TermConfig) -> tuple[nn.Module, nn.Module, Forward]:
    """Student, what learns beside it, the terms of one batch: as building.build and train.train_step have them.

    further: terms beside the two of the taught student.
    """
    device = setting.device
    build = lambda arch: models.build(arch, NUM_CLASSES).to(device, memory_format=torch.channels_last)
    torch.manual_seed(0)
    student = build(setting.student).train()
    teachers = {TEACHER: fuse(build(TEACHER).eval().requires_grad_(False))} if setting.is_taught else {}
    terms = (*TERMS["cwd+soft_class"], *further) if setting.is_taught else ()
    criterion = Criterion(
        tuple(dataclasses.replace(term, teacher=TEACHER) for term in terms),
        student=student,
        teachers=teachers,
        epochs=1,
        class_names=tuple(map(str, range(NUM_CLASSES))),
    ).to(device)
    for name, teacher in teachers.items():
        teacher.requested_outputs = criterion.requested_outputs(name)
    if setting.contestant in COMPILE:
        for module in (student, *teachers.values()):
            module.compile(mode=COMPILE[setting.contestant])
    teach = Teachers(teachers, {name: TeacherFacts() for name in teachers}, setting.bfloat16)

    def forward(images: Tensor, targets: Targets, mark: Mark) -> dict[str, Tensor]:
        if setting.contestant == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        t_outputs = teach(images)
        mark("teacher")
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=setting.bfloat16):
            s_output = student(images)
        mark("student")
        found = student.losses(s_output, targets)
        mark("detection")
        found |= criterion(s_output, t_outputs, targets, 0.0)
        mark("distillation")
        return found

    return student, criterion, forward


def peer_forward(setting: Setting) -> tuple[nn.Module, nn.Module, Forward]:
    """Ultralytics' model and loss, called from outside. ImportError where they, or its distillation, are missing."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    def build(arch: str) -> nn.Module:
        model = DetectionModel(f"{arch}.yaml", nc=NUM_CLASSES, verbose=False)
        model.args = get_cfg()
        return model.to(setting.device, memory_format=torch.channels_last)

    torch.manual_seed(0)
    model = student = build(setting.student)
    if setting.is_taught:
        from ultralytics.nn.distill_model import DistillationModel

        model = DistillationModel(build(TEACHER), student).to(setting.device)
    model.train()

    def forward(images: Tensor, targets: Targets, mark: Mark) -> dict[str, Tensor]:
        boxes_cxcywh_norm = xyxy_to_cxcywh(targets.boxes_xyxy) / images.shape[-1]
        rows = {"cls": targets.labels[:, None].float(), "bboxes": boxes_cxcywh_norm, "batch_idx": targets.image.float()}
        with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.bfloat16):
            found = model({"img": images, **rows})[0]
        mark("student")  # with its losses, the teacher and distillation
        return {"all": found.sum().float() / len(images)}

    known = {id(parameter) for parameter in student.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return student, nn.ParameterList(rest), forward


def batches(setting: Setting) -> Iterator[tuple[Tensor, Targets]]:
    """The same batch for ever, as the loader gives it: uint8 pictures (pinned) and targets, both of the host."""
    images, boxes_cxcywh_norm, labels, image = random_batch(setting.batch_size, setting.image_size)
    images = (images * 255).to(torch.uint8)
    images = images.pin_memory() if setting.device.type == "cuda" else images
    boxes_xyxy = cxcywh_to_xyxy(boxes_cxcywh_norm) * setting.image_size
    targets = Targets(boxes_xyxy, labels, image, torch.zeros_like(labels, dtype=torch.bool))
    while True:
        yield images, targets


def build_step(setting: Setting) -> Callable[[int, Mark], dict[str, float]]:
    """step(number, mark) -> the terms' values: one step of train.py, a pure function of its number and the weights."""
    student, others, forward = (peer_forward if setting.contestant == "peer" else our_forward)(setting)
    settings, augmentation, device = OptimizerConfig(), AugmentConfig(), setting.device
    optimizer = build_optimizer(
        (student, others),
        name="sgd",
        learning_rate=1e-3,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ema = Ema(student, decay=settings.ema_decay, ramp_steps=settings.ema_ramp_steps)
    data = batches(setting)

    def step(number: int, mark: Mark) -> dict[str, float]:
        torch.manual_seed(number)
        host_images, host_targets = next(data)
        images = host_images.to(device, non_blocking=True)
        mark("upload")
        generator = torch.Generator().manual_seed(number)
        images, targets = augment(images, host_targets, generator=generator, settings=augmentation)
        images, targets = images.contiguous(memory_format=torch.channels_last), targets.to(device)
        mark("augment")
        terms = forward(images, targets, mark)
        (sum(terms.values()) * len(images)).backward()
        mark("backward")
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        mark("clip")
        values = torch.stack([*(term.detach() for term in terms.values()), norm]).tolist()  # the one wait
        mark("wait")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(number + 1)
        mark("update")
        return dict(zip(terms, values))

    return step


def measure(setting: Setting, warmup: int, rounds: int, steps: int) -> dict[str, Any]:
    """The numbers of one contestant; AssertionError for a loss that is not finite."""
    device, is_gpu = setting.device, setting.device.type == "cuda"
    step = build_step(setting)
    losses = [step(number, no_mark) for number in range(warmup)]
    assert all(abs(value) < float("inf") for row in losses for value in row.values()), losses
    if is_gpu:
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds, number = [], warmup
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step(number, no_mark)
            number += 1
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if is_gpu else None
    rows = []
    for _ in range(steps):
        marks = Marks(device)
        step(number, marks)
        rows.append(marks.milliseconds())
        number += 1
    with host_waits(device) as waits:
        # On a CPU all tensors look alike; those of the augmentation would be the host's own.
        step(number, lambda name: waits.clear() if name == "augment" and not is_gpu else None)
    return {
        "images_per_second": steps * setting.batch_size / statistics.median(seconds),
        "round_seconds": seconds,
        "milliseconds": {part: statistics.median(row[part] for row in rows) for part in rows[0]},
        "peak_gigabytes": peak,
        "waits": dict(sorted(waits.items())),
        "first_losses": losses[:2],
    }


def disagreement(found: list[dict[str, float]], expected: list[dict[str, float]]) -> str | None:
    """How the losses of the first steps differ from eager's by more than TOLERANCE of their sum, or None."""
    for number, (row, other) in enumerate(zip(found, expected)):
        total, wanted = sum(row.values()), sum(other.values())
        if not abs(total - wanted) <= TOLERANCE * abs(wanted):
            return f"step {number}: loss {total:.5g}, eager {wanted:.5g}"
    return None


def contestants_of(student: str, is_taught: bool, device: torch.device, asked: list[str] | None) -> list[str]:
    """Those asked for that differ here, or all that can run on the device."""
    possible = CONTESTANTS if device.type == "cuda" else ("eager", "peer")
    possible = [name for name in possible if name in (asked or possible)]
    return [name for name in possible if name != "kernels" or (is_taught and HAS_TRITON)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a contestant; shares of the parts of a step in %."""
    columns = ("student", "taught", "contestant", "images/s", "of peer", "peak GB", "waits", *PARTS)
    lines = [columns, ("---",) * 3 + ("---:",) * (len(columns) - 3)]
    for row in rows:
        head = (row["student"], "yes" if row["taught"] else "no", row["contestant"])
        if "error" in row:
            lines.append((*head, row["error"].replace("|", "/"), *[""] * (len(columns) - 4)))
            continue
        peak, peer, total = row["peak_gigabytes"], rate_of_peer(row, rows), sum(row["milliseconds"].values())
        shares = [row["milliseconds"].get(part) for part in PARTS]
        numbers = [
            f"{row['images_per_second']:.1f}",
            "" if peer is None else f"{row['images_per_second'] / peer:.2f}",
            "" if peak is None else f"{peak:.1f}",
            str(sum(row["waits"].values())),
        ]
        lines.append((*head, *numbers, *("" if ms is None else f"{100 * ms / total:.0f}" for ms in shares)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rate_of_peer(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Images per second of the peer that trains the same."""
    same = (
        r for r in rows if r["contestant"] == "peer" and (r["student"], r["taught"]) == (row["student"], row["taught"])
    )
    return next((r["images_per_second"] for r in same if "error" not in r), None)


def run_one(setting: Setting, args: argparse.Namespace, expected: list[dict[str, float]] | None) -> dict[str, Any]:
    """A line of the table: the numbers, or why there are none."""
    os.environ["KERNELS"] = "eager" if setting.contestant in ("eager", "peer") or not HAS_TRITON else "triton"
    head = {"student": setting.student, "taught": setting.is_taught, "contestant": setting.contestant}
    try:
        numbers = measure(setting, args.warmup, args.rounds, args.steps)
    except ImportError as error:
        return head | {"error": f"not installed: {error.name}"}
    except Exception as error:  # one that cannot be compiled, or has no memory left, must not cost the others' numbers
        traceback.print_exc()
        return head | {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    finally:
        torch.compiler.reset()
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    wrong = disagreement(numbers["first_losses"], expected) if expected and setting.contestant != "peer" else None
    return head | ({"error": wrong} if wrong else numbers)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    device, chosen = choose_device(args.device), os.environ.get("KERNELS")
    heading = (
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, "
        f"{args.image_size} px, batch {args.batch_size}, bfloat16, teacher {TEACHER}, {args.rounds} rounds of "
        f"{args.steps} steps; target of peer {TARGET}\n"
    )
    print(heading)
    rows: list[dict[str, Any]] = []
    try:
        for student in args.students:
            for is_taught in (False, True):
                expected = None
                for contestant in contestants_of(student, is_taught, device, args.contestants):
                    setting = Setting(student, is_taught, contestant, device, args.image_size, args.batch_size)
                    rows.append(run_one(setting, args, expected))
                    expected = rows[-1].get("first_losses") if contestant == "eager" else expected
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        os.environ.pop("KERNELS", None)
        if chosen is not None:
            os.environ["KERNELS"] = chosen
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gpu_train.md").write_text(f"{heading}\n{table(rows)}", encoding="utf-8")
    (args.output / "gpu_train.json").write_text(
        json.dumps({"heading": heading.strip(), "rows": rows}, indent=1), encoding="utf-8"
    )
    print(f"\n{table(rows)}\nwritten to {args.output}")
    broken = [row for row in rows if "error" in row and not row["error"].startswith("not installed")]
    if broken:
        raise SystemExit(f"{len(broken)} of {len(rows)} contestants failed")


if __name__ == "__main__":
    run_script(main)
