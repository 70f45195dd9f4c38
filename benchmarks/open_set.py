"""What it takes to open a set of COCO's size, and to open it again: CPU seconds and memory, each in a new process.

    python benchmarks/open_set.py [--pictures 118000]

The set is generated: pictures of 640 x 480 (links to a few files, so that a header costs what it costs) with 7.4
objects each, their masks beside them, in one JSON file of some 400 MB. Opening reads every label and every picture's
header, and counts what the table of datasets.scan shows. The second process takes the index that the first one kept
(datasets/kept_index.py). Memory is the highest resident size of a process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.evaluator import resident_mb
from datasets.kept_index import RECENT_NS, KeptSets
from datasets.open import open_dataset
from datasets.scan import scan
from errors import ArgumentParser, UserError, run_script

WIDTH, HEIGHT, NUM_CLASSES, MASK_NUMBERS = 640, 480, 80, 40
LINKS_OF_A_FILE = 30_000  # file systems limit them, some to 65,000


def generate(root: Path, count: int) -> int:
    """Write the split `train` in COCO's layout. Returns the number of objects."""
    rng = np.random.default_rng(0)
    for folder in ("annotations", "train"):
        (root / folder).mkdir()
    pixels = Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    images, annotations = [], []
    for image in range(count):
        source, name = root / f"{image // LINKS_OF_A_FILE}.jpg", f"{image:012d}.jpg"
        if not source.exists():
            pixels.save(source, quality=30)
        os.link(source, root / "train" / name)
        images.append({"id": image, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for _ in range(min(1 + rng.geometric(1 / 6.4), 60)):
            size = rng.uniform(8, 300, 2)
            corner = rng.uniform(0, (WIDTH, HEIGHT) - size)
            mask = rng.uniform(0, HEIGHT, MASK_NUMBERS).round(2).tolist()
            annotations.append({
                "id": len(annotations), "image_id": image, "category_id": int(rng.integers(NUM_CLASSES)), "iscrowd": 0,
                "bbox": [*corner.round(2).tolist(), *size.round(2).tolist()], "area": round(float(size.prod()), 2),
                "segmentation": [mask],
            })  # fmt: skip
    tree = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in range(NUM_CLASSES)],
    }
    (root / "annotations" / "instances_train.json").write_text(json.dumps(tree), encoding="utf-8")
    return len(annotations)


def measure(root: str) -> dict[str, float]:
    """Open the split in this process, and keep its index if there is none yet."""
    kept, began, clock = KeptSets(Path(root) / "opened_sets"), time.process_time(), time.perf_counter()
    index = open_dataset("coco", root, "train", kept=kept)
    opened, clock = time.process_time(), time.perf_counter() - clock
    scan(index).table()
    found = {"pictures": len(index), "objects": sum(map(len, index.samples)), "faults": len(index.faults)}
    counted = time.process_time()
    for path, parts in kept.new_files():
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:
            file.writelines(parts)
    cost = {"open": opened - began, "clock": clock, "count": counted - opened, "keep": time.process_time() - counted}
    return found | cost | {"megabytes": resident_mb("VmHWM")}


def main(argv: list[str]) -> int:
    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("--pictures", type=int, default=118_000)
    parser.add_argument("--measure", metavar="ROOT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        objects = generate(Path(folder), args.pictures)
        time.sleep(1.5 * RECENT_NS / 1e9)  # an index of files that have just changed is not kept
        print(f"{args.pictures} pictures, {objects} objects")
        for which in ("first", "second"):
            command = [sys.executable, __file__, "--measure", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                return done.returncode
            found = json.loads(done.stdout)
            if (found["pictures"], found["objects"], found["faults"]) != (args.pictures, objects, 0):
                raise UserError(f"{found}, expected {args.pictures} pictures with {objects} objects and no fault")
            print(
                f"{which} time: opened in {found['open']:.1f} CPU seconds ({found['clock']:.1f} by the clock), counted"
                f" in {found['count']:.1f}, kept in {found['keep']:.1f}, {found['megabytes']:.0f} MB at most",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    run_script(main)
