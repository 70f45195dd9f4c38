"""Detect objects in pictures: drawn copies, a JSON file, YOLO text files.

    python predict.py runs/bccd/weights/best.pt photo.jpg folder 'more/*.png' --output found --json --txt

Writes into --output:
    <name>.jpg          each picture with its boxes, in the folders it had below a given folder
    predictions.json    with --json: a list of {"image_id", "file_name", "category_id", "category_name",
                        "bbox": [x, y, width, height], "score"} in pixels of the upright picture, best first in each
                        picture; image_id counts the pictures from 0, in the order given, and category_id the classes
    labels/<name>.txt   with --txt: a line `class center_x center_y width height score` for each detection, boxes as
                        fractions of the upright picture's size; an empty file where nothing was found
A picture that cannot be read is named, counted and left out; the exit code is 1 if there was one.
"""

import argparse
import glob
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from boxes import xyxy_to_cxcywh, xyxy_to_xywh
from datasets.images import SUFFIXES, read_image
from datasets.letterbox import letterbox, unletterbox
from drawing import draw_detections
from errors import UserError, run_script
from fusion import fuse
from onnx_detector import load_detector
from processes import choose_device, use_bfloat16
from structures import Detections

DISK_EXIT_CODE = 5


@dataclass(frozen=True)
class Picture:
    """A file to look at, and its name below the output folder, without a suffix."""

    path: Path
    name: Path


def find_pictures(sources: Sequence[str]) -> list[Picture]:
    """The pictures of files, folders (and their subfolders) and patterns, each once, in the order given.

    In a folder or a pattern only files with a picture's suffix count; a file given by name is always taken. Two
    pictures that would be written under one name get different ones: `a`, `a-2`.
    """
    found: dict[Path, Picture] = {}  # by the resolved path
    for source in sources:
        path = Path(source)
        if path.is_dir():
            pairs = [(p, p.relative_to(path)) for p in sorted(path.rglob("*")) if is_picture(p)]
        elif path.exists():
            pairs = [(path, Path(path.name))]
        elif glob.has_magic(source):
            pairs = [(p, Path(p.name)) for p in map(Path, sorted(glob.glob(source, recursive=True))) if is_picture(p)]
        else:
            raise UserError(f"{source}: no such file or folder, expected pictures")
        if not pairs:
            raise UserError(f"{source}: holds no picture ({', '.join(SUFFIXES)})")
        for path, name in pairs:
            found.setdefault(path.resolve(), Picture(path, name.with_suffix("")))
    taken: set[Path] = set()
    pictures = []
    for picture in found.values():
        unique, number = picture.name, 1
        while unique in taken:
            number += 1
            unique = picture.name.with_name(f"{picture.name.name}-{number}")
        taken.add(unique)
        pictures.append(Picture(picture.path, unique))
    return pictures


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


class Predictor:
    """A copy of a detector, its BatchNorms folded away, for pictures of any size."""

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        score_threshold: float = 0.25,
        iou_threshold: float = 0.7,
        max_detections: int = 300,
        device: torch.device | str = "cpu",
        bfloat16: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model = fuse(model).to(self.device, memory_format=torch.channels_last)
        self.image_size = image_size
        self.settings = dict(
            score_threshold=score_threshold, iou_threshold=iou_threshold, max_detections=max_detections
        )
        self.bfloat16 = bfloat16

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """uint8 RGB (h, w, 3) each -> Detections on the CPU, in pixels of the picture and clipped to it."""
        squares = [letterbox(picture, self.image_size) for picture in pictures]
        images = torch.from_numpy(np.stack([square for square, _, _ in squares])).to(self.device)  # (B, S, S, 3)
        images = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, S, S), channels_last in memory
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            output = self.model(images)
        found = []
        for picture, square, detections in zip(pictures, squares, self.model.detect(output, **self.settings)):
            _, scale, (left, top, _, _) = square
            height, width = picture.shape[:2]
            boxes = unletterbox(detections.boxes_xyxy.float(), scale, (left, top), width, height)
            found.append(Detections(boxes, detections.scores.float(), detections.labels).to("cpu"))
        return found


def read_in_batches(
    pictures: Sequence[Picture], batch_size: int, broken: list[str]
) -> Iterator[list[tuple[Picture, np.ndarray]]]:
    """Pictures with their pixels; what is wrong with one that cannot be read goes into `broken`."""
    batch = []
    for picture in pictures:
        try:
            batch.append((picture, read_image(picture.path)))
        except UserError as error:
            broken.append(str(error))
            print(f"skipped: {error}", flush=True)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def json_rows(image_id: int, file_name: str, found: Detections, names: Sequence[str]) -> list[dict]:
    """One picture's part of predictions.json."""
    boxes = xyxy_to_xywh(found.boxes_xyxy.double())
    return [
        {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": label,
            "category_name": names[label],
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 6),
        }
        for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist())
    ]


def yolo_text(found: Detections, width: int, height: int) -> str:
    """One picture's label file: `class center_x center_y width height score`, fractions of the picture's size."""
    size = torch.tensor([width, height, width, height], dtype=torch.float64)
    boxes = xyxy_to_cxcywh(found.boxes_xyxy.double()) / size
    rows = zip(found.labels.tolist(), boxes.tolist(), found.scores.tolist())
    return "".join(f"{label} {' '.join(f'{v:.6f}' for v in box)} {score:.6f}\n" for label, box, score in rows)


def count_words(labels: Sequence[int], names: Sequence[str]) -> str:
    """`3 RBC, 1 WBC`: the most frequent first."""
    counts = Counter(labels).most_common()
    return ", ".join(f"{count} {names[label]}" for label, count in counts) or "nothing"


def drawn_path(output: Path, picture: Picture) -> Path:
    return output / picture.name.with_name(picture.name.name + ".jpg")


def text_path(output: Path, picture: Picture) -> Path:
    return output / "labels" / picture.name.with_name(picture.name.name + ".txt")


def predict(
    predictor: Predictor,
    pictures: Sequence[Picture],
    names: Sequence[str],
    output: Path,
    *,
    batch_size: int,
    write_json: bool,
    write_txt: bool,
    draw: bool = True,
    quiet: bool = False,
) -> list[str]:
    """Write everything into `output` and say so; what was wrong with the pictures that could not be read."""
    broken: list[str] = []
    rows: list[dict] = []
    all_labels: list[int] = []
    done, seconds, image_ids = 0, 0.0, {picture.path: number for number, picture in enumerate(pictures)}
    for batch in read_in_batches(pictures, batch_size, broken):
        began = time.perf_counter()
        found = predictor([pixels for _, pixels in batch])
        seconds += time.perf_counter() - began
        done += len(batch)
        for (picture, pixels), detections in zip(batch, found):
            height, width = pixels.shape[:2]
            labels = detections.labels.tolist()
            all_labels += labels
            rows += json_rows(image_ids[picture.path], str(picture.path), detections, names)
            if write_txt:
                path = text_path(output, picture)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(yolo_text(detections, width, height), encoding="utf-8")
            if draw:
                path = drawn_path(output, picture)
                path.parent.mkdir(parents=True, exist_ok=True)
                draw_detections(pixels, detections, names).save(path, quality=92)
            if not quiet:
                print(f"{picture.path}: {width} x {height}, {count_words(labels, names)}", flush=True)
    if write_json:
        output.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (output / "predictions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(
        f"{done} picture{'s' * (done != 1)}, {len(all_labels)} detection{'s' * (len(all_labels) != 1)} "
        f"({count_words(all_labels, names)}), {len(broken)} skipped, "
        f"{1000 * seconds / max(1, done):.0f} ms a picture: {output}"
    )
    return broken


def check_output(output: Path, pictures: Sequence[Picture]) -> None:
    """Refuse an output folder where a drawn picture would replace one of the pictures themselves."""
    sources = {picture.path.resolve() for picture in pictures}
    for picture in pictures:
        path = drawn_path(output, picture).resolve()
        if path in sources:
            raise UserError(f"--output {output}: would overwrite {path}, expected another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file, expected a folder")


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a checkpoint of ours, a public one with --arch, or a .onnx file")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="pictures, folders, or patterns in quotes")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="write predictions.json")
    parser.add_argument("--txt", action="store_true", help="write labels/*.txt")
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    parser.add_argument("--arch", help="the model a public checkpoint is of, such as yolov8n")
    parser.add_argument("--image-size", type=int, help="pixels; default: what the model was trained at")
    parser.add_argument("--score-threshold", type=fraction, default=0.25, help="drop what scores less (%(default)s)")
    parser.add_argument("--nms-iou", type=fraction, default=0.7, help="IoU of suppression (%(default)s)")
    parser.add_argument("--max-detections", type=int, default=300, help="in a picture (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--quiet", action="store_true", help="only the last line and what was skipped")
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_detections"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected at least 1")
    if args.image_size is not None and (args.image_size < 32 or args.image_size % 32):
        parser.error(f"--image-size: found {args.image_size}, expected a multiple of 32")
    return args


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    pictures = find_pictures(args.sources)
    check_output(args.output, [] if args.no_pictures else pictures)
    device = choose_device(args.device)
    model, info = load_detector(args.checkpoint, args.arch, device=str(device), precision=args.precision)
    predictor = Predictor(
        model,
        image_size=args.image_size or info.image_size,
        score_threshold=args.score_threshold,
        iou_threshold=args.nms_iou,
        max_detections=args.max_detections,
        device=device,
        bfloat16=use_bfloat16(args.precision, device),
    )
    try:
        broken = predict(
            predictor,
            pictures,
            info.names,
            args.output,
            batch_size=args.batch_size,
            write_json=args.json,
            write_txt=args.txt,
            draw=not args.no_pictures,
            quiet=args.quiet,
        )
    except OSError as error:
        raise UserError(
            f"{error.filename or args.output}: could not be written: {error.strerror}", DISK_EXIT_CODE
        ) from None
    return 1 if broken else 0


if __name__ == "__main__":
    run_script(main)
