"""COCO evaluation of a COCO-sized set: ours beside pycocotools and faster-coco-eval, where they are installed.

    python benchmarks/evaluator.py [--images 5000] [--seed 0] [--repeats 1] [--only ours pycocotools faster-coco-eval]
    python benchmarks/evaluator.py --peers-python /path/to/env/bin/python     # peers installed elsewhere
    python benchmarks/evaluator.py --images 20000 --classes 1203 --detections 300 --only ours      # LVIS's scale

Every evaluator runs in a process of its own with one thread, and gets the same boxes as arrays; pycocotools and
faster-coco-eval first build the objects they need from them, which is timed apart ("load"). Memory is the highest
resident size during load and evaluation, beyond that at the start, with the input arrays already there. CPU
seconds are what to compare on a shared machine.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.runtime.timing import wall_and_cpu
from errors import ArgumentParser, UserError, run_script

WIDTH, HEIGHT = 640.0, 480.0
EVALUATORS = {"ours": "metrics.coco", "pycocotools": "pycocotools", "faster-coco-eval": "faster_coco_eval"}


def generate(num_images: int, seed: int, num_classes: int = 80, detections: int = 100) -> dict[str, np.ndarray]:
    """A COCO-like set, its sizes, classes and scores skewed as there; boxes are x, y, width, height in 1/100 pixel.

    Objects (about 7.5 an image, 1.2 % crowd): object_image, object_label, object_xywh, object_area, object_crowd.
    Detections (`detections` an image; some 0.31 AP with 80 classes): image, label, xywh, score.
    """
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, num_classes + 1) ** 1.1
    counts = np.minimum(1 + rng.geometric(1 / 6.4, num_images), 60)
    object_image = np.repeat(np.arange(num_images), counts)
    num_objects = len(object_image)
    # Objects of one image share few classes.
    palette = rng.choice(num_classes, (num_images, 3), p=frequency / frequency.sum())
    object_label = palette[object_image, rng.integers(0, 3, num_objects)]
    side = np.exp(rng.normal(3.95, 1.1, num_objects)).clip(4, 460)
    aspect = np.exp(rng.normal(0, 0.4, num_objects))
    size = np.stack((np.minimum(side * aspect, WIDTH), np.minimum(side / aspect, HEIGHT)), axis=1)
    corner = rng.random((num_objects, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    object_xywh = np.round(np.concatenate((corner, size), axis=1), 2)
    object_area = object_xywh[:, 2] * object_xywh[:, 3] * rng.uniform(0.45, 0.95, num_objects)

    # Each object gets a few detections around it; the rest of the 100 are noise of low score.
    tries = np.where(rng.random(num_objects) < 0.92, 1 + rng.geometric(0.4, num_objects), 0)
    source = np.repeat(np.arange(num_objects), tries)
    nth = np.arange(len(source)) - np.repeat(np.cumsum(tries) - tries, tries)
    quality = rng.beta(2.0, 2.0, len(source))
    spread = (0.018 + 0.12 * (1 - quality) + 0.05 * nth)[:, None]
    noise = rng.normal(0, 1, (len(source), 4)) * spread
    around = object_xywh[source]
    near = np.concatenate((around[:, :2] + noise[:, :2] * around[:, 2:], around[:, 2:] * np.exp(noise[:, 2:])), axis=1)
    near_label = np.where(
        rng.random(len(source)) < 0.9, object_label[source], rng.integers(0, num_classes, len(source))
    )
    near_score = (0.25 + 0.6 * quality) * 0.75**nth * rng.uniform(0.5, 1.0, len(source))
    far_image = np.repeat(np.arange(num_images), detections)
    far_size = np.exp(rng.normal(3.9, 1.0, (len(far_image), 2))).clip(4, 470)
    far = np.concatenate((rng.random((len(far_image), 2)) * 400, far_size), axis=1)
    in_palette = rng.random(len(far_image)) < 0.6
    far_label = np.where(
        in_palette,
        palette[far_image, rng.integers(0, 3, len(far_image))],
        rng.choice(num_classes, len(far_image), p=frequency / frequency.sum()),
    )
    far_score = rng.beta(1.0, 16.0, len(far_image))

    image = np.concatenate((object_image[source], far_image))
    first = np.concatenate((np.zeros(len(source)), np.ones(len(far_image))))
    order = np.lexsort((rng.random(len(image)), first, image))  # of each image: those near objects, then noise
    place = np.arange(len(image)) - np.searchsorted(image[order], image[order])
    order = order[place < detections]
    order = order[np.lexsort((rng.random(len(order)), image[order]))]
    return {
        "object_image": object_image,
        "object_label": object_label,
        "object_xywh": object_xywh,
        "object_area": object_area,
        "object_crowd": rng.random(num_objects) < 0.012,
        "image": image[order],
        "label": np.concatenate((near_label, far_label))[order],
        "xywh": np.round(np.concatenate((near, far))[order], 2),
        "score": np.round(np.concatenate((near_score, far_score))[order], 3),
        "num_images": np.array(num_images),
        "num_classes": np.array(num_classes),
    }


def run_ours(data: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
    from metrics import coco
    from metrics.tables import DetectionTable, GroundTruth

    def corners(xywh: np.ndarray) -> np.ndarray:
        return np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)

    start = time.process_time()
    objects, found = data["object_xywh"], data["xywh"]
    ground_truth = GroundTruth(
        data["object_image"],
        corners(objects),
        data["object_label"],
        int(data["num_images"]),
        tuple(map(str, range(int(data["num_classes"])))),
        crowd=data["object_crowd"],
        area=data["object_area"],
        box_area=objects[:, 2] * objects[:, 3],
    )
    detections = DetectionTable(data["image"], corners(found), data["score"], data["label"], found[:, 2] * found[:, 3])
    loaded = time.process_time() - start
    return loaded, coco.evaluate(ground_truth, detections).numbers


def run_peer(data: dict[str, np.ndarray], coco_class: type, eval_class: type) -> tuple[float, dict[str, float]]:
    start = time.process_time()
    ground_truth = coco_class()
    columns = (
        data["object_image"],
        data["object_label"],
        data["object_xywh"],
        data["object_area"],
        data["object_crowd"],
    )
    ground_truth.dataset = {
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(int(data["num_images"]))],
        "categories": [{"id": k, "name": str(k)} for k in range(int(data["num_classes"]))],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for n, (i, k, box, area, crowd) in enumerate(zip(*(c.tolist() for c in columns)), 1)
        ],
        "info": {},
    }
    ground_truth.createIndex()
    rows = [
        {"image_id": i, "category_id": k, "bbox": box, "score": score}
        for i, k, box, score in zip(*(data[c].tolist() for c in ("image", "label", "xywh", "score")))
    ]
    detections = ground_truth.loadRes(rows)
    loaded = time.process_time() - start
    evaluation = eval_class(ground_truth, detections, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = "AP AP50 AP75 AP_small AP_medium AP_large AR_1 AR_10 AR_100 AR_small AR_medium AR_large".split()
    return loaded, dict(zip(names, map(float, evaluation.stats)))


def run_pycocotools(data: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return run_peer(data, COCO, COCOeval)


def run_faster(data: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
    from faster_coco_eval import COCO, COCOeval_faster

    return run_peer(data, COCO, COCOeval_faster)


RUNS: dict[str, Callable] = {
    "ours": run_ours,
    "pycocotools": run_pycocotools,
    "faster-coco-eval": run_faster,
}


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (highest) of this process in MB, from Linux; nan elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return float("nan")


def measure(name: str, path: str) -> None:
    """In a process of its own: run one evaluator on the arrays of an .npz file, print a line of JSON."""
    if importlib.util.find_spec(EVALUATORS[name].split(".")[0]) is None:
        print(json.dumps({"absent": True}))
        return
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    __import__(EVALUATORS[name])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest size so far
    before, found = resident_mb("VmRSS"), []
    with contextlib.redirect_stdout(io.StringIO()):
        wall, cpu = wall_and_cpu(lambda: found.extend(RUNS[name](data)))
    memory, (load, numbers) = resident_mb("VmHWM") - before, found
    print(json.dumps({"wall": wall, "cpu": cpu, "load": load, "memory": memory, "numbers": numbers}))


def main(argv: list[str]) -> int | None:
    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detections", type=int, default=100, help="for each image (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the one of least CPU time is shown")
    parser.add_argument("--only", nargs="+", choices=list(EVALUATORS), default=list(EVALUATORS))
    parser.add_argument("--peers-python", help="a Python that has numpy and the peers, for those absent here")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        return measure(*args.measure)

    data = generate(args.images, args.seed, args.classes, args.detections)
    ranges = [np.mean(data["object_area"] <= 32**2), np.mean(data["object_area"] > 96**2)]
    print(
        f"{args.images} images, {len(data['object_image'])} objects ({data['object_crowd'].sum()} crowd, "
        f"{ranges[0]:.0%} small, {ranges[1]:.0%} large), {len(data['image'])} detections, "
        f"{args.classes} classes; one thread"
    )
    print(f"{'evaluator':<18}{'cpu s':>8}{'wall s':>8}{'load s':>8}{'MB':>8}{'AP':>12}{'AP50':>10}{'AP75':>10}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/set.npz"
        np.savez(path, **data)
        for name in args.only:
            best = min((run_apart(name, path, args.peers_python) for _ in range(args.repeats)), key=lambda r: r["cpu"])
            if "numbers" not in best:
                print(f"{name:<18}not installed")
                continue
            results[name] = best["numbers"]
            print(
                f"{name:<18}{best['cpu']:8.2f}{best['wall']:8.2f}{best['load']:8.2f}{best['memory']:8.0f}"
                f"{best['numbers']['AP']:12.8f}{best['numbers']['AP50']:10.6f}{best['numbers']['AP75']:10.6f}"
            )
    for name in results:
        if name != "ours" and "ours" in results:
            apart = max(abs(results["ours"][key] - value) for key, value in results[name].items())
            print(f"largest difference of the 12 numbers, ours and {name}: {apart:.1e}")


def run_apart(name: str, path: str, peers_python: str | None) -> dict:
    """measure() in a fresh process with one thread; with the peers' Python where this one lacks the evaluator."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    here = importlib.util.find_spec(EVALUATORS[name].split(".")[0]) is not None
    python = sys.executable if here or not peers_python else peers_python
    command = [python, str(Path(__file__).resolve()), "--measure", name, path]
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return {"cpu": float("inf"), **json.loads(done.stdout.splitlines()[-1])}


if __name__ == "__main__":
    run_script(main)
