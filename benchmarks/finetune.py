"""Does fine-tuning keep what a model already finds? A COCO YOLOv8n on 1,000 pictures of six classes that COCO has.

    python benchmarks/finetune.py --data ROOT --weights yolov8n.pt [--seeds 3] [--split test] [--peer PYTHON]
        ["key=value key=value" ...]

--data is a folder in VOC's layout with splits train, val and test; at most 1,000 pictures of train are used, always the
same. Every row is trained for 10 epochs at 192 px without mosaic. The table has mAP and mAP50 on --split, measured by
one evaluator, objects marked difficult left out:

    untrained   the COCO model as it is, its answers restricted to the six classes
    before      the student before its first step: equal to `untrained` where nothing is lost
    asked       AdamW at 0.001, everything else as train.py has it
    kept        a lower rate, and a running mean that still holds half of the COCO weights at the end; chosen on val
    peer        Ultralytics with AdamW at 0.001, trained by the Python that --peer names, which has its package

The running mean that is evaluated forgets its start within some hundred steps, as fresh weights need it. `kept` takes a
mean that does not (ema_ramp_steps=0). That is for classes which the file has: fresh rows would stay in such a mean too.

A further argument is a recipe of its own: overrides of the config, separated by spaces. Choose on --split val.

Runs lie in --out. What is finished there is not repeated, and what was interrupted goes on; so the command can be
stopped and given again. results.json in --out has the numbers with device, threads and commit.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from structures import DetectionSettings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import fine_tuning
import train
from config import Config, apply_override, from_tree
from datasets.index import DatasetIndex
from datasets.open import open_dataset
from engine.evaluation.cross_dataset import on_common_classes
from engine.evaluation.measuring import evaluate_model
from engine.runtime import run_folder
from engine.training.splits import take
from errors import ArgumentParser, UserError, run_script

ARCH, IMAGE_SIZE, NUM_PICTURES, EPOCHS, BATCH_SIZE = "yolov8n", 192, 1000, 10, 16
RECIPES = {
    "asked": "",
    "kept": "optimizer.learning_rate=0.0002 optimizer.ema_decay=0.999 optimizer.ema_ramp_steps=0",
}
PEER_SCRIPT = """
import json, os, sys
from pathlib import Path
task = json.loads(sys.argv[1])
os.environ["YOLO_CONFIG_DIR"] = task["settings"]
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
start = Path(task["folder"]) / "start.pt"
state = torch.load(task["weights"], map_location="cpu", weights_only=True)
model = DetectionModel("yolov8n.yaml", nc=len(state["names"]), verbose=False)
model.load_state_dict({name: value.float() for name, value in state["model"].items()}, strict=True)
names = state["names"]
model.names = names if isinstance(names, dict) else dict(enumerate(names))
torch.save({"model": model, "epoch": -1, "train_args": {"task": "detect"}}, start)
YOLO(str(start)).train(
    data=task["data"], epochs=task["epochs"], imgsz=task["image_size"], batch=task["batch_size"], optimizer="AdamW",
    lr0=0.001, mosaic=0.0, seed=task["seed"], device="cpu", workers=0, amp=False, plots=False, val=False,
    project=task["folder"], name="run", exist_ok=True, verbose=False,
)
trained = torch.load(Path(task["folder"]) / "run/weights/last.pt", map_location="cpu", weights_only=False)
trained = trained["ema"] or trained["model"]
names = [trained.names[k] for k in range(len(trained.names))]
torch.save({"model": trained.float().state_dict(), "names": names}, task["trained"])
"""


def config_of(args: argparse.Namespace, recipe: str, seed: int) -> Config:
    """The run of a recipe: overrides of the shared protocol, separated by spaces."""
    tree: dict[str, Any] = {
        "name": f"{slug(recipe)}_{seed}",
        "data": {"format": "voc", "root": args.data, "test": "val", "max_samples": NUM_PICTURES},
        "student": {"arch": ARCH, "weights": args.weights},
        "optimizer": {"name": "adamw", "learning_rate": 0.001},
        "augment": {"mosaic": 0.0},
        "evaluation": {"every_epochs": 0},
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "image_size": IMAGE_SIZE,
        "seed": seed,
        "device": "cpu",
        "runs": args.out,
    }
    for override in recipe.split():
        apply_override(tree, override)
    return from_tree(Config, tree, source="benchmarks/finetune.py")


def slug(recipe: str) -> str:
    return re.sub(r"[^a-zA-Z0-9.]+", "_", recipe) or "asked"


def train_ours(args: argparse.Namespace, recipe: str, seed: int) -> Path:
    """The weights of a run, trained or gone on with where they are not finished."""
    config = config_of(args, recipe, seed)
    folder = run_folder.RunFolder(Path(args.out) / config.name)
    if not folder.report.is_file():
        if folder.path.exists() and not folder.last.is_file():
            raise UserError(f"{folder.path}: stopped before its first checkpoint; remove it")
        train.run(config, resume=folder.last.is_file(), quiet=True)
    return folder.last


def train_peer(args: argparse.Namespace, seed: int) -> Path:
    """The weights of the peer's run, under the names it releases them with."""
    folder = Path(args.out).resolve() / f"peer_{seed}"
    trained = folder / "trained.pt"
    if not trained.is_file():
        data = write_peer_data(args, Path(args.out).resolve() / "peer_data")
        folder.mkdir(parents=True, exist_ok=True)
        task = {"weights": str(Path(args.weights).resolve()), "data": str(data), "folder": str(folder), "seed": seed}
        task |= {"epochs": EPOCHS, "image_size": IMAGE_SIZE, "batch_size": BATCH_SIZE, "trained": str(trained)}
        task |= {"settings": str(folder.parent / "peer_settings")}
        command = [args.peer, "-c", PEER_SCRIPT, json.dumps(task)]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return trained


def write_peer_data(args: argparse.Namespace, folder: Path) -> Path:
    """The training pictures as a YOLO set, without the objects marked difficult; its data.yaml."""
    index = take(open_dataset("voc", args.data, "train"), NUM_PICTURES)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for sample in index.samples:
        link = folder / "images" / sample.image_path.name
        if not link.exists():
            link.symlink_to(sample.image_path.resolve())
        lines = []
        for (x1, y1, x2, y2), label, ignore in zip(sample.boxes_xyxy.tolist(), sample.labels, sample.ignore):
            if not ignore:
                cx, cy = (x1 + x2) / 2 / sample.width, (y1 + y2) / 2 / sample.height
                lines.append(f"{label} {cx} {cy} {(x2 - x1) / sample.width} {(y2 - y1) / sample.height}\n")
        (folder / "labels" / f"{sample.image_path.stem}.txt").write_text("".join(lines), encoding="utf-8")
    text = {"path": str(folder), "train": "images", "val": "images", "names": dict(enumerate(index.names))}
    (folder / "data.yaml").write_text(json.dumps(text), encoding="utf-8")
    return folder / "data.yaml"


def measure(model, index: DatasetIndex) -> dict[str, float]:
    result = evaluate_model(model, index, DetectionSettings(), image_size=IMAGE_SIZE, batch_size=32)
    return {name: result.numbers[name] for name in ("mAP50-95", "mAP50")}


def measure_file(path: str | Path, arch: str, index: DatasetIndex) -> dict[str, float]:
    model, info = checkpoint.load_model(path, arch)
    model, common, _ = on_common_classes(model, index, info.names)
    return measure(model, common)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("recipes", nargs="*", metavar="key=value ...", help="further recipes")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--rows", default="asked,kept", help="of RECIPES; '' for none (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has Ultralytics; without, there is no such row")
    parser.add_argument("--out", default="runs/finetune")
    args = parser.parse_args(argv)
    index = open_dataset("voc", args.data, args.split)
    rows = {"untrained": [measure_file(args.weights, ARCH, index)]}
    rows["before"] = [measure(fine_tuning.start_model(ARCH, index.names, args.weights), index)]
    recipes = {name: RECIPES[name] for name in args.rows.split(",") if name} | {text: text for text in args.recipes}
    jobs = [(name, seed) for seed in range(args.seeds) for name in [*recipes, *(["peer"] if args.peer else [])]]
    for name, seed in jobs:
        trained = train_peer(args, seed) if name == "peer" else train_ours(args, recipes[name], seed)
        rows.setdefault(name, []).append(measure_file(trained, ARCH, index))
        print(f"{name}, seed {seed}: {rows[name][-1]}", flush=True)
    print(f"\n{len(index)} pictures of {args.split}, {IMAGE_SIZE} px, {EPOCHS} epochs of {NUM_PICTURES} pictures")
    print(f"{'':<12} {'mAP':>16} {'mAP50':>16}  seeds")
    for name, numbers in rows.items():
        cells = [mean_and_spread([row[column] for row in numbers]) for column in ("mAP50-95", "mAP50")]
        print(f"{name:<12} {cells[0]:>16} {cells[1]:>16}  {len(numbers)}")
    found = {"split": args.split, "recipes": recipes, "rows": rows, **run_folder.environment()}
    run_folder.write_text(Path(args.out) / f"results_{args.split}.json", json.dumps(found, indent=2) + "\n")


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


if __name__ == "__main__":
    run_script(main)
