"""The two sides of the demo's page: which detector stands on each, what the page calls them, and the boxes of both."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from engine.prediction.files import json_rows
from engine.web_demo import texts
from engine.web_demo.detectors import Detector
from engine.web_demo.run_views import Run
from structures import Detections

WHERE = ("left", "right")
NOT_USED = "not used"  # of a slider


@dataclass(frozen=True)
class Side:
    """What is chosen on one side of the page.

    run: None for a file that belongs to no run. key: tells its weights from all others, for what is cached.
    """

    detector: Detector
    run: Run | None
    key: str

    @property
    def facts(self) -> str:
        """`yolov8n, 3.01 M parameters, 8 classes, 160 px, taught by big, **mAP 0.311 on test**`"""
        teachers, score = (self.run.teachers(), self.run.score()) if self.run else ("", "mAP not measured")
        return ", ".join(filter(None, (self.detector.describe(), teachers, f"**{score}**")))


def by_title(pair: tuple[Side, Side]) -> dict[str, Side]:
    """The sides by name: one if both are the same model, with their places if two models have one name."""
    if pair[0].key != pair[1].key and pair[0].detector.name == pair[1].detector.name:
        return {f"{side.detector.name} ({where})": side for side, where in zip(pair, WHERE)}
    return {side.detector.name: side for side in pair}


def title_of_overlap(suppresses: Sequence[bool]) -> tuple[str, str]:
    """The title of the slider of the overlap, and its help. suppresses: whether each side's model suppresses boxes."""
    if all(suppresses):
        return "Overlap (IoU), at most", texts.OVERLAP
    use = f"{WHERE[suppresses.index(True)]} only" if any(suppresses) else NOT_USED
    return f"Overlap, {use}", texts.NO_SUPPRESSION


def boxes_json(found: Sequence[Detections], pair: tuple[Side, Side]) -> str:
    """The detections of both as JSON: `left NAME` and `right NAME`, each with the rows of `predict.py --json`."""
    return json.dumps(
        {
            f"{where} {side.detector.name}": json_rows(0, "picture", rows, side.detector.names)
            for where, rows, side in zip(WHERE, found, pair)
        },
        indent=1,
    )
