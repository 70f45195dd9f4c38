"""Do a few learnt pictures train a linear class head on a frozen detector as well as all pictures do?

    python benchmarks/linear_head.py --format voc --data ROOT --weights yolov8n.pt --out REPORT.json [--arch yolov8n]
        [--per-class 1 2 5] [--draws 5] [--rows matched,...] [--image-size 160] [--steps 60] [--pictures FOLDER]
        [--other OTHER.pt --other-arch ARCH]

The student is the released detector with everything frozen but a fresh class head (engine/condensing/frozen_backbone.py
says what it reads), which is trained on the stored pictures to the one head that minimises its loss
(distill/condense/linear_head.py). So its training has no seed, and it is measured with the project's evaluator on
features that are computed once. A row is a way to come by n pictures for each class:

    full           all pictures
    random         at random, one of each class in turn
    uniform        about as many objects of each class
    herding        the mean of their features (p3, p4, p5 of the frozen detector) is that of all
    k_center       every other picture is near one of them, by these features
    head_gradient  a greedy choice by the gradient that the matched rows follow
    matched        `random` of the same draw with its pixels learnt (distill/condense/head_matching.py)
    noise          likewise, from noise under the same boxes, with twice the steps at four times the rate
    transferred    as matched, but learnt for the detector --other: do its pictures train this one?
    cosine, orthogonal, squared      as matched, by a distance of the literature at a pool of heads

Pictures are stored with 8 bits. The rows from herding to head_gradient do not depend on the draw. The ridge of the
student is that of RIDGES (of FULL_RIDGES for full) with the best mean mAP on the split val, over the first two draws,
for each row and size.

The verdicts follow RULE, which is fixed in this file: a row is better than another if the interval of the paired
differences of the draws lies above 0. The report has seed (the draw), device, threads and commit. It is written after
every set; a command that was stopped and is given again goes on with what is missing.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import models
from benchmarks.timing import parse
from config import DataConfig
from distill.condense import coresets
from distill.condense.head_matching import DISTANCES, HeadMatching, HeadSettings, head_gradient_rows
from distill.condense.linear_head import Head, HeadData, fit_head, head_logits, location_targets
from distill.condense.synthetic import SyntheticSet
from engine.comparison.decision import DecisionRule
from engine.condensing.frozen_backbone import PICTURES_AT_ONCE, FrozenBackbone
from engine.condensing.methods import features_of
from engine.condensing.real_pictures import RealPictures
from engine.condensing.set_files import draw_set, to_picture
from engine.evaluation.measuring import EvaluationResult, measure, to_table
from engine.runtime import run_folder
from engine.runtime.peak_memory import peak_gigabytes, reset_peak
from errors import ArgumentParser, expect, run_script
from kernels.nms import select_detections
from metrics.tables import DetectionTable, ground_truth_from_samples
from random_streams import Stream, seeded_generator
from structures import Targets

RULE = DecisionRule(metric="mAP", smallest=0.0, level=0.95, seeds=5)
RIDGES, FULL_RIDGES = (0.06, 0.2, 0.6, 2.0, 6.0, 20.0), (0.002, 0.02, 0.2, 2.0)
METRICS = {"mAP50": "mAP50", "mAP": "mAP50-95", "precision": "precision", "recall": "recall", "F1": "F1"}
CHOICES = ("random", "uniform", "herding", "k_center", "head_gradient")
WITHOUT_DRAWS = ("full", "herding", "k_center", "head_gradient")
DEFAULT_ROWS = ("full", *CHOICES, "matched", "noise")
ROWS = (*DEFAULT_ROWS, "transferred", *DISTANCES)
NOISE_STEPS, NOISE_RATE = 2, 4  # times those of matched


@dataclass(frozen=True)
class StoredSet:
    """uint8 images (n, 3, S, S), their objects, and what learning them took; content_xyxy as in a Batch."""

    images: Tensor
    targets: Targets
    content_xyxy: Tensor
    cost: dict[str, float]


class Split:
    """What the student sees of a split of real pictures, and their objects for the evaluator."""

    def __init__(self, backbone: FrozenBackbone, data: DataConfig, image_size: int, arch: str) -> None:
        self.real, self._detection = RealPictures(data, image_size), asdict(models.published_detection(arch))
        self._batches, features, boxes = [], [], []
        for rows in torch.arange(len(self.real)).split(PICTURES_AT_ONCE):
            batch = self.real.read(rows.tolist())
            h, boxes_xyxy = backbone.features_and_boxes(batch.images.float() / 255)
            features.append(h)
            boxes.append(boxes_xyxy)
            self._batches.append(replace(batch, images=batch.images[:, :, :0, :0]))  # the rest places the boxes
        self._features, self._boxes = features, boxes

    def measure(self, head: Head) -> EvaluationResult:
        """The detections of the frozen detector with this head."""
        tables = []
        for batch, features, boxes_xyxy in zip(self._batches, self._features, self._boxes):
            scores = torch.cat(head_logits(head, features), dim=1).sigmoid()
            found = select_detections(boxes_xyxy, scores, **self._detection)
            tables.append(to_table(found, batch, self.real.index))
        samples = self.real.index.samples
        truth = ground_truth_from_samples(samples, self.real.index.names)
        return measure(truth, DetectionTable.concatenate(tables))


class Bench:
    """The frozen detector, all real pictures, and the sets that are made of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.steps = args, args.steps
        model, _ = checkpoint.load_model(args.weights, args.arch)
        data = lambda split: DataConfig(args.format, args.data, train=split)
        self.real = RealPictures(data(args.train), args.image_size)
        self.num_classes = len(self.real.index.names)
        self.backbone = FrozenBackbone(model, args.image_size, self.num_classes)
        self.data = self.backbone.data_of(self.real)
        self.other: tuple[FrozenBackbone, HeadData] | None = None
        if args.other:
            other = FrozenBackbone(
                checkpoint.load_model(args.other, args.other_arch)[0], args.image_size, self.num_classes
            )
            self.other = other, other.data_of(self.real)
        self.fresh = self.backbone.grid.fresh_head(self.data.widths, self.num_classes)
        self.val, self.test = (
            Split(self.backbone, data(split), args.image_size, args.arch) for split in (args.val, args.test)
        )
        self._means = features_of(self.real, model)

    def head_data(self, row: str, per_class: int, draw: int) -> tuple[HeadData, dict[str, float]]:
        """What the student learns from, and what making it took."""
        if row == "full":
            return self.data, {}
        if row in CHOICES:
            return self.data[self.choose(row, per_class * self.num_classes, draw)], {}
        made = self.learn(row, per_class, draw)
        if self.args.pictures and draw == 0:
            self.draw(made, Path(self.args.pictures) / f"{row}_{per_class}.png")
        with torch.no_grad():
            features = self.backbone.features(made.images.float() / 255)
        y = location_targets(self.backbone.grid, made.targets, count=len(made.images), num_classes=self.num_classes)
        return HeadData(features, y), made.cost

    def choose(self, rule: str, count: int, draw: int) -> Tensor:
        """Rows of the real pictures."""
        generator = seeded_generator(Stream.CHOICE, draw)
        if rule == "random":
            return coresets.rows_in_turn(self.real.class_counts(), count, generator=generator)
        if rule == "uniform":
            return coresets.balanced_rows(self.real.class_counts(), count, generator=generator)
        if rule == "head_gradient":
            return head_gradient_rows(self.data, count, self.fresh, HeadSettings().ridge)
        return {"herding": coresets.herding, "k_center": coresets.k_center}[rule](self._means, count)

    def learn(self, row: str, per_class: int, draw: int) -> StoredSet:
        """Pixels learnt from the pictures of `random` of the same draw, or from noise under their boxes."""
        count, size = per_class * self.num_classes, self.args.image_size
        batch = self.real.read(self.choose("random", count, draw).tolist())
        settings = HeadSettings(steps=self.steps, distance=row if row in DISTANCES else HeadSettings().distance)
        if row == "noise":
            settings = replace(
                settings, steps=NOISE_STEPS * self.steps, learning_rate=NOISE_RATE * settings.learning_rate
            )
            noise = seeded_generator(Stream.NOISE, draw)
            stored = SyntheticSet.from_noise(
                batch.targets, count=count, image_size=size, content_xyxy=batch.content_xyxy, generator=noise
            )
        else:
            stored = SyntheticSet.from_pictures(
                batch.images.float() / 255, batch.targets, content_xyxy=batch.content_xyxy
            )
        start, reports = stored.pixels.detach().clone(), []
        backbone, data = (self.backbone, self.data) if row != "transferred" or self.other is None else self.other
        matching = HeadMatching(stored, settings=settings, features=backbone.features, grid=backbone.grid, real=data)
        reset_peak(torch.device("cpu"))
        began, cpu = time.perf_counter(), time.process_time()
        matching.run(lambda step, report: reports.append(report.distance))
        steps = max(1, len(reports))
        cost = {
            "seconds_per_step": (time.perf_counter() - began) / steps,
            "cpu_seconds_per_step": (time.process_time() - cpu) / steps,
            "peak_gigabytes": peak_gigabytes(torch.device("cpu")) or 0.0,
            "first_distance": reports[0] if reports else None,
            "last_distance": reports[-1] if reports else None,
            "moved_of_255": 255 * (stored.pixels.detach() - start).abs().mean().item(),
        }
        images, _ = stored.decode(torch.arange(count))
        return StoredSet((images.detach() * 255).round().to(torch.uint8), batch.targets, batch.content_xyxy, cost)

    def draw(self, made: StoredSet, path: Path) -> None:
        """The pictures with their boxes, as one picture."""
        found = []
        for number, image in enumerate(made.images[:12]):
            objects = made.targets[made.targets.image == number]
            found.append(to_picture(image, objects.boxes_xyxy, objects.labels, made.content_xyxy[number]))
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_set(found, self.real.index.names, columns=6).save(path)

    def run(self, row: str, per_class: int) -> dict[str, Any]:
        """The numbers of all draws of a row."""
        draws = range(1 if row in WITHOUT_DRAWS else self.args.draws)
        sets = [self.head_data(row, per_class, draw) for draw in draws]
        on_val = {
            ridge: statistics.mean(
                self.val.measure(fit_head(data, self.fresh, ridge)).numbers["mAP50-95"] for data, _ in sets[:2]
            )
            for ridge in (FULL_RIDGES if row == "full" else RIDGES)
        }
        ridge = max(on_val, key=lambda ridge: on_val[ridge])
        numbers = [self.test.measure(fit_head(data, self.fresh, ridge)).numbers for data, _ in sets]
        found: dict[str, Any] = {name: [n[key] for n in numbers] for name, key in METRICS.items()}
        return found | {"ridge": ridge, "mAP_on_val": on_val, "cost": [cost for _, cost in sets]}


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each row and each other one at this size: the paired differences in mAP and the verdict of RULE."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        for other, reference in rows.items():
            if len(row["mAP"]) < 2 or name == other:
                continue
            values = np.array(row["mAP"]) - np.array(reference["mAP"])  # a row without draws stands for each
            half = RULE.half_width(values)
            found.setdefault(name, {})[other] = {
                "differences": values.tolist(),
                "mean": values.mean(),
                "low": values.mean() - half,
                "high": values.mean() + half,
                "verdict": RULE.verdict(values),
            }
    return found


def table(report: dict[str, Any]) -> str:
    """mAP by row and size: mean and deviation over the draws, and the share of the gap between random and full."""
    sizes = list(report["sizes"])
    lines = [f"{'row':<14}" + "".join(f"{size + ' a class':>26}" for size in sizes)]
    full = report["full"]["mAP"][0] if "full" in report else None
    for row in dict.fromkeys(name for size in sizes for name in report["sizes"][size]["rows"]):
        cells = []
        for size in sizes:
            rows = report["sizes"][size]["rows"]
            if row not in rows:
                cells.append(f"{'':>26}")
                continue
            values = rows[row]["mAP"]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            closed = ""
            if full is not None and "random" in rows:
                start = statistics.mean(rows["random"]["mAP"])
                closed = f" [{(statistics.mean(values) - start) / (full - start):+.2f}]" if full > start else " [-]"
            cells.append(f"{f'{statistics.mean(values):.3f}{spread}{closed}':>26}")
        lines.append(f"{row:<14}" + "".join(cells))
    if full is not None:
        lines.append(f"{'full':<14}{full:>26.3f}")
    return "\n".join(lines)


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("--format", default="voc")
    parser.add_argument("--data", required=True)
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", default=split, help="name of the split (%(default)s)")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--arch", default="yolov8n")
    parser.add_argument("--other", metavar="WEIGHTS", help="the detector that the row transferred learns pictures for")
    parser.add_argument("--other-arch", default="yolov8n")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--per-class", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--draws", type=int, default=RULE.seeds)
    parser.add_argument("--rows", default=",".join(DEFAULT_ROWS), help="some of " + ", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=HeadSettings().steps, help="of the pixels of matched")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default, one for each core")
    parser.add_argument("--pictures", metavar="FOLDER", help="draw the learnt sets of the first draw there")
    parser.add_argument("--out", required=True, metavar="REPORT.json")
    args = parse(parser, argv)
    for row in args.rows.split(","):
        expect(row in ROWS, "--rows", repr(row), "some of " + ", ".join(ROWS))
        expect(row != "transferred" or args.other, "--rows", repr(row), "--other WEIGHTS with it")
    return args


def main(argv: list[str]) -> None:
    args = arguments_of(argv)
    path = Path(args.out)
    own = ("format", "train", "val", "test", "arch", "image_size", "draws", "steps")
    settings = {key: getattr(args, key) for key in own} | {"data": Path(args.data).name}
    settings |= {"weights": Path(args.weights).name, "rule": asdict(RULE), "ridges": [RIDGES, FULL_RIDGES]}
    if args.other:
        settings["other"] = Path(args.other).name
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if report.get("settings") != json.loads(json.dumps(settings)):
        report = {"settings": settings, "sizes": {}}
    bench = Bench(args)
    report |= {"pictures": len(bench.real), "device": "cpu", **run_folder.environment()}
    for row in args.rows.split(","):
        for size in args.per_class if row != "full" else [0]:
            rows = report if row == "full" else report["sizes"].setdefault(str(size), {"rows": {}})["rows"]
            if row in rows:
                continue
            began = time.perf_counter()
            rows[row] = bench.run(row, size)
            for entry in report["sizes"].values():
                entry["differences"] = compare(entry["rows"])
            run_folder.write_text(path, json.dumps(report, indent=1) + "\n")
            mean = statistics.mean(rows[row]["mAP"])
            print(f"{row}, {size} a class: mAP {mean:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\n{table(report)}")


if __name__ == "__main__":
    run_script(main)
