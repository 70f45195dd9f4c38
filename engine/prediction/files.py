"""The files that predict.py writes besides drawn pictures: predictions.json and YOLO's text files, never in part."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch

from boxes import xyxy_to_cxcywh, xyxy_to_xywh
from datasets.class_names import are_numbers
from engine.prediction.sources import Source
from engine.prediction.video import Frame
from structures import Detections

CLASS_LIST = "classes.txt"


class PredictionFiles:
    """A context that writes predictions.json, labels/ and the list of classes as the detections come.

    predictions.json grows under a temporary name, so that a long video needs no memory, and is renamed at the end.
    After an error there is none.
    """

    def __init__(self, output: Path, names: Sequence[str], *, write_json: bool, write_txt: bool) -> None:
        self.output, self.names, self.write_json, self.write_txt = output, names, write_json, write_txt

    def __enter__(self) -> "PredictionFiles":
        self._open = contextlib.ExitStack()
        self._json: TextIO | None = None
        self._separator = "[\n"
        if self.write_txt and not are_numbers(self.names):
            with complete_file(self.output / "labels" / CLASS_LIST) as path:
                path.write_text("".join(f"{name}\n" for name in self.names), encoding="utf-8")
        if self.write_json:
            path = self._open.enter_context(complete_file(self.output / "predictions.json"))
            self._json = self._open.enter_context(open(path, "w", encoding="utf-8"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._json is not None and kind is None:
            self._json.write("\n]\n" if self._separator == ",\n" else "[\n\n]\n")
        return self._open.__exit__(kind, error, trace)

    def add(
        self, source: Source, image_id: int, found: Detections, size: tuple[int, int], frame: Frame | None = None
    ) -> None:
        """Write the detections of one picture or frame. size: (width, height). frame: None for a picture."""
        if self._json is not None:
            for row in json_rows(image_id, str(source.path), found, self.names, frame):
                self._json.write(self._separator + json.dumps(row, ensure_ascii=False))
                self._separator = ",\n"
        if self.write_txt:
            with complete_file(text_path(self.output, source, frame)) as path:
                path.write_text(yolo_text(found, *size), encoding="utf-8")


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; the file is renamed to `path` at the end, and removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_rows(
    image_id: int, file_name: str, found: Detections, names: Sequence[str], frame: Frame | None = None
) -> list[dict]:
    """The entries of one picture or frame in predictions.json."""
    moment = {} if frame is None else {"frame": frame.number, "seconds": round(frame.seconds, 6)}
    boxes = xyxy_to_xywh(found.boxes_xyxy.double())
    return [
        {
            "image_id": image_id,
            "file_name": file_name,
            **moment,
            "category_id": label,
            "category_name": names[label],
            "bbox": [round(value, 6) for value in box],
            "score": float(f"{score:.9g}"),  # all digits of a float32: an evaluation sorts by it
        }
        for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist())
    ]


def yolo_text(found: Detections, width: int, height: int) -> str:
    """A label file with lines `class center_x center_y width height score`, as fractions of the picture's size."""
    size = torch.tensor([width, height, width, height], dtype=torch.float64)
    boxes = xyxy_to_cxcywh(found.boxes_xyxy.double()) / size
    rows = zip(found.labels.tolist(), boxes.tolist(), found.scores.tolist())
    return "".join(f"{label} {' '.join(f'{v:.9f}' for v in box)} {score:.9g}\n" for label, box, score in rows)


def format_counts(labels: Counter[int], names: Sequence[str]) -> str:
    """`3 RBC, 1 WBC`, the most frequent first."""
    return ", ".join(f"{count} {names[label]}" for label, count in labels.most_common()) or "nothing"


def drawn_path(output: Path, source: Source) -> Path:
    return output / source.name.with_name(source.name.name + (".mp4" if source.is_video else ".jpg"))


def text_path(output: Path, source: Source, frame: Frame | None = None) -> Path:
    """Label file of a picture, or of a frame, in the folder of its video."""
    if frame is None:
        return output / "labels" / source.name.with_name(source.name.name + ".txt")
    return output / "labels" / source.name.with_name(source.name.name + ".mp4") / f"{frame.number:06d}.txt"
