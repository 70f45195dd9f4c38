"""All tables of a GPU in nine minutes: a training step, the Triton kernels, what the compiler made of them.

    python benchmarks/gpu.py [--minutes 9] [--output benchmarks/results]
    python benchmarks/gpu.py --rehearse          # tiny sizes on the CPU, in seconds: to see that it runs

No number of this file is known yet: it has run on CPUs only. What matters most comes first, and OUTPUT/gpu.md and
gpu.json are written after every row. A row that would begin after --minutes is listed as left out.

Training: a step as train.py makes it, from the images' way to the device to SGD and the running mean, in bfloat16 and
channels_last, on random images with ten objects each. YOLOv8n and YOLOv8s are trained alone, and taught by YOLOv8m (CWD
on the neck, soft class targets); RT-DETR-R18 is trained alone, last of all. "images/s" is the median round. The parts
of a step are percentages of steps with events between the parts. "waits" counts what makes the host wait in one step; 1
is the goal. The contestants:

    peer      Ultralytics' model and loss (and its distillation), all else the same, where it is installed
    eager     the losses' specifications, no kernel of ours
    kernels   the Triton kernels, where there are terms to distil
    compile   the same, student and teacher under torch.compile
    graphs    the same, replayed as CUDA graphs (mode "reduce-overhead")

Kernels: milliseconds on the device of the forward pass and the student's gradient (RoIAlign: all maps' gradients; NMS
and attention have none), for NMS until the host has its result. "GB" is the least traffic: a fused loss reads student
and teacher and writes a gradient. "TB/s" is that over the kernel's time, "of copy" its share of what copying 1 GiB
reaches here. Inputs change with every call and together exceed the L2 cache.

Agreement: the same steps from the same weights, eager and with another contestant. Rounding differs, and grows from
step to step, so the table has the relative difference of the two losses: its largest, and that of the means of the last
tenth.

A contestant whose results differ from eager's has no times. Targets: 1.3 times the peer's images per second; fused
losses at 0.8 of copying, 5 times eager, 1.5 times torch.compile.
"""

import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.distill_step import TERMS, build_ours, build_peer
from benchmarks.host_waits import host_waits
from benchmarks.kernel_cases import Sizes, copy_rate, first_line, kernel_cases, kernels, measure_kernel, require_equal
from benchmarks.timing import device_seconds, now, random_batch, seconds_between, synchronize, ultralytics_rows
from config import AugmentConfig, OptimizerConfig, TermConfig
from datasets.augment import augment
from distill.criterion import TeacherFacts
from engine.runtime.processes import choose_device
from engine.training.optimization import Ema, build_optimizer
from engine.training.teaching import Teachers
from errors import ArgumentParser, run_script
from kernels.backend import HAS_TRITON
from structures import Targets

TEACHER = "yolov8m"
COMPILE = {"compile": "default", "graphs": "reduce-overhead"}  # modes of torch.compile
TOLERANCE = 0.02  # of losses against eager's, relative: bfloat16, and operations in another order

Rows = list[dict[str, Any]]
Mark = Callable[[str], None]
Forward = Callable[[Tensor, Targets, Mark], dict[str, Tensor]]  # images, targets -> named terms
no_mark: Mark = lambda name: None


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    image_size: int = 640
    batch_size: int = 64
    warmup: int = 5  # steps before the first round
    rounds: int = 3
    steps: int = 10  # of a round
    agreement_steps: int = 200
    kernels: Sizes = dataclasses.field(default_factory=Sizes)


REHEARSAL = Scale(64, 2, 1, 1, 1, 2, Sizes((2, 4, 8, 8), 50, (50, 2000), 6, 64, 1, 2**20))


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    student: str
    is_taught: bool
    contestant: str
    device: torch.device
    scale: Scale = Scale()
    bfloat16: bool = True


def our_forward(setting: Setting, *further: TermConfig) -> tuple[nn.Module, nn.Module, Forward]:
    """Student, what learns beside it, the terms of a batch. further: terms beside the two of a taught student."""
    teacher = TEACHER if setting.is_taught else None
    terms = (*TERMS["cwd+soft_class"], *further) if teacher else ()
    terms = tuple(dataclasses.replace(term, teacher=TEACHER) for term in terms)
    student, criterion, teachers = build_ours(setting.student, teacher, terms, setting.device)
    for name, model in teachers.items():
        model.requested_outputs = criterion.requested_outputs(name)
    if setting.contestant in COMPILE:
        for module in (student, *teachers.values()):
            module.compile(mode=COMPILE[setting.contestant])
    teach = Teachers(teachers, {name: TeacherFacts() for name in teachers}, setting.bfloat16)

    def forward(images: Tensor, targets: Targets, mark: Mark) -> dict[str, Tensor]:
        if setting.contestant == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        t_outputs = teach(images)
        mark("teacher")
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=setting.bfloat16):
            s_output = student(images)
        mark("student")
        terms = student.losses(s_output, targets)
        mark("detection")
        terms |= criterion(s_output, t_outputs, targets, 0.0)
        mark("distillation")
        return terms

    return student, criterion, forward


def peer_forward(setting: Setting) -> tuple[nn.Module, nn.Module, Forward]:
    student, model = build_peer(setting.student, TEACHER if setting.is_taught else None, setting.device)

    def forward(images: Tensor, targets: Targets, mark: Mark) -> dict[str, Tensor]:
        rows = ultralytics_rows(targets, images.shape[-1])
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=setting.bfloat16):
            loss = model({"img": images, **rows})[0]
        mark("student")  # with its losses, the teacher and distillation
        return {"all": loss.sum().float() / len(images)}

    of_student = {id(parameter) for parameter in student.parameters()}
    return student, nn.ParameterList(p for p in model.parameters() if id(p) not in of_student), forward


def build_step(setting: Setting) -> Callable[[int, Mark], dict[str, float]]:
    """step(number, mark) -> the terms' values: one step of train.py, a pure function of its number and the weights."""
    student, others, forward = (peer_forward if setting.contestant == "peer" else our_forward)(setting)
    settings, augmentation, device = OptimizerConfig(learning_rate=1e-3), AugmentConfig(), setting.device
    optimizer = build_optimizer((student, others), settings)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ema = Ema(student, decay=settings.ema_decay, ramp_steps=settings.ema_ramp_steps)
    host_images, host_targets = random_batch(setting.scale.batch_size, setting.scale.image_size)
    host_images = (255 * host_images).to(torch.uint8)  # as the loader gives them
    host_images = host_images.pin_memory() if device.type == "cuda" else host_images

    def step(number: int, mark: Mark) -> dict[str, float]:
        torch.manual_seed(number)
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


def measure_training(setting: Setting, before: Rows) -> dict[str, Any]:
    """A row of the table. before: those so far, for the peer's rate and eager's losses; ValueError if these differ."""
    trained = (setting.student, "yes" if setting.is_taught else "no")
    same = [row for row in before if (row["student"], row["taught"]) == trained]
    found = {row["contestant"]: row for row in same if "images/s" in row}
    scale, device = setting.scale, setting.device
    numbers, is_gpu = itertools.count(), device.type == "cuda"
    with kernels("eager" if setting.contestant in ("eager", "peer") or not HAS_TRITON else "triton"):
        step = build_step(setting)
        losses = [sum(step(next(numbers), no_mark).values()) for _ in range(scale.warmup)]
        if setting.contestant != "peer" and "eager" in found:
            require_equal(torch.tensor(losses[:2]), torch.tensor(found["eager"]["losses"]), TOLERANCE, "losses")
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        run = lambda: [step(next(numbers), no_mark) for _ in range(scale.steps)]
        time_round = device_seconds(device, host_waits=True)
        rate = scale.steps * scale.batch_size / statistics.median(time_round(run) for _ in range(scale.rounds))
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if is_gpu else None
        points = [("", now(device))]
        for _ in range(scale.steps):
            points.append(("", now(device)))
            step(next(numbers), lambda name: points.append((name, now(device))))
        synchronize(device)
        parts: dict[str, float] = {}
        for (_, start), (name, end) in itertools.pairwise(points):
            parts[name] = parts.get(name, 0.0) + seconds_between(start, end)
        del parts[""]
        with host_waits(device) as waits:
            # On a CPU all tensors look alike; those of the augmentation would be the host's own.
            step(next(numbers), lambda name: waits.clear() if name == "augment" and not is_gpu else None)
    if not all(abs(loss) < float("inf") for loss in losses):
        raise ValueError(f"losses that are not finite: {losses}")
    row = {"images/s": rate, "of peer": rate / found["peer"]["images/s"] if "peer" in found else None, "peak GB": peak}
    row["waits"] = sum(waits.values())
    row |= {f"{name} %": 100 * part / sum(parts.values()) for name, part in parts.items()}
    return row | {"losses": losses[:2], "waits by line": dict(sorted(waits.items()))}


def measure_agreement(setting: Setting) -> dict[str, Any]:
    """A row of the table: how far the losses of the setting's contestant go from eager's."""
    curves = []
    for contestant in ("eager", setting.contestant):
        with kernels("triton" if contestant == "kernels" else "eager"):
            step = build_step(dataclasses.replace(setting, contestant=contestant))
            curves.append([sum(step(number, no_mark).values()) for number in range(setting.scale.agreement_steps)])
    eager, found = torch.tensor(curves, dtype=torch.float64)
    last = -(-len(eager) // 10)
    row = {"steps": len(eager), "first loss": eager[0].item(), "last loss": eager[-last:].mean().item()}
    row["largest difference"] = ((found - eager).abs() / eager.abs()).max().item()
    row["difference at the end"] = ((found[-last:].mean() - eager[-last:].mean()).abs() / eager[-last:].mean()).item()
    return row


def resources() -> Iterator[dict[str, Any]]:
    """What the compiler made of each kernel that this process launched: registers of a thread, bytes it spills."""
    found = {}  # a kernel may be imported by several modules
    for file, module in sorted(sys.modules.items()):
        if file.startswith("kernels."):
            found |= {id(kernel): (f"{file}.{name}", kernel) for name, kernel in vars(module).items()}
    for name, kernel in sorted(found.values(), key=lambda row: row[0]):
        for cache in getattr(kernel, "device_caches", {}).values():
            for form in cache[0].values():
                row = {"kernel": name, "registers": form.n_regs, "spilled bytes": form.n_spills}
                yield row | {"shared bytes": form.metadata.shared}


class Report:
    """The tables so far, in OUTPUT/gpu.json and gpu.md."""

    def __init__(self, folder: Path, heading: str, minutes: float) -> None:
        self.folder, self.heading, self.end = folder, heading, time.monotonic() + 60 * minutes
        self.parts: dict[str, Rows] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self, part: str, head: dict[str, Any], measure: Callable[[Rows], dict[str, Any]]) -> None:
        """Adds head and what measure(the rows so far) finds, or why it found nothing."""
        try:
            row = {"error": "left out: no time"} if time.monotonic() > self.end else measure(self.parts.get(part, []))
        except ImportError as error:
            row = {"error": f"not installed: {error.name}"}
        except Exception as error:  # one that cannot be compiled, or has no memory left
            traceback.print_exc()
            row = {"error": first_line(error)}
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.add(part, head | row)

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Prints the row and writes the files."""
        self.parts.setdefault(part, []).append(row)
        print(markdown([row]), flush=True)
        text = f"{self.heading}\n" + "".join(f"\n{name}\n\n{markdown(rows)}" for name, rows in self.parts.items())
        (self.folder / "gpu.md").write_text(text, encoding="utf-8")
        found = json.dumps({"heading": self.heading, **self.parts}, indent=1)
        (self.folder / "gpu.json").write_text(found, encoding="utf-8")

    def failures(self) -> int:
        errors = [row["error"] for rows in self.parts.values() for row in rows if "error" in row]
        return sum(not error.startswith(("not installed", "left out")) for error in errors)


def markdown(rows: Rows) -> str:
    """A table; lists and dicts stay out of it, a cell without a value is empty."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")

    plain = [{key: v for key, v in row.items() if not isinstance(v, list | dict)} for row in rows]
    columns = list(dict.fromkeys(key for row in plain for key in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in plain)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str]) -> int:
    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="rows begin until then")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args(argv)
    device = choose_device("cpu" if args.rehearse else "cuda")
    scale, is_gpu = REHEARSAL if args.rehearse else Scale(), device.type == "cuda"
    sizes = scale.kernels
    copy = copy_rate(device, sizes)
    name = torch.cuda.get_device_name(device) if is_gpu else "rehearsal on a CPU"
    heading = f"{name}, torch {torch.__version__}; copying reaches {copy:.2f} TB/s; {scale}\n"
    print(heading)
    report = Report(args.output, heading, args.minutes)

    def train(student: str, is_taught: bool, contestants: str) -> None:
        for contestant in contestants.split():
            if is_gpu or contestant in ("peer", "eager"):
                head = {"student": student, "taught": "yes" if is_taught else "no", "contestant": contestant}
                setting = Setting(student, is_taught, contestant, device, scale)
                report.measure("training", head, lambda rows: measure_training(setting, rows))  # noqa: B023

    train("yolov8n", True, "peer eager kernels")
    train("yolov8n", False, "peer eager")
    for case in kernel_cases(sizes):
        report.measure("kernels", {"case": case.name}, lambda _: measure_kernel(case, sizes, device, copy))  # noqa: B023
    for row in resources():
        report.add("compiled kernels", row)
    small = dataclasses.replace(scale, image_size=min(320, scale.image_size), batch_size=min(16, scale.batch_size))
    for contestant in ("kernels", "compile") if is_gpu else ("eager",):
        setting = Setting("yolov8n", True, contestant, device, small)
        report.measure("agreement", {"contestant": contestant}, lambda _: measure_agreement(setting))  # noqa: B023
    if is_gpu:
        train("yolov8n", True, "compile graphs")
        train("yolov8s", True, "peer eager kernels compile")
        train("yolov8s", False, "peer eager")
        train("yolov8n", False, "compile graphs")
        train("rtdetr_r18vd", False, "eager")
    print(f"written to {args.output}")
    return 1 if report.failures() else 0


if __name__ == "__main__":
    run_script(main)
