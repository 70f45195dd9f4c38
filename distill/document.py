"""Write docs/losses.md: one row for every loss a config can name, from its docstring.

    python -m distill.document [--check]

Name, summary, paper, equation, needs and parameters come from distill.terms.LOSSES and the docstrings, so the page
cannot say something else than the code; what was measured here comes from STUDY, the comparison.json of a run of
configs/studies/bccd_study.yaml, from the rows that are named as the losses are. A test compares the committed file
with what would be written. Only what neither holds is listed here: PUBLISHED, what others measured.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.terms import LOSSES, Term
from errors import UserError, run_script

PAGE = Path(__file__).resolve().parent.parent / "docs" / "losses.md"
STUDY = PAGE.parent.parent / "docs" / "reports" / "bccd_study.json"
ARXIV = re.compile(r"arXiv:\s*(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Published:
    """What others report for a method on detection. heads: where it fits, if not every detector with maps."""

    gain: str
    source: str = ""
    heads: str = ""


# Box AP on COCO val unless it says otherwise, student alone -> distilled (teacher).
# fmt: off
PUBLISHED = {
    "mse": Published("GFL R101 to R50, 1x: 40.1 -> 40.7 (44.9)", "README of HikariTJU/LD, many methods alike"),
    "cosine": Published(
        "DINOv3 ViT-B/16 to RT-DETRv4-S: 49.8, beside 48.5 for D-FINE-S, which has no teacher and is another model",
        "arXiv:2510.25257; the 48.5 at second hand"),
    "cwd": Published(
        "GFL R101 to R50, 1x: 40.2 -> 41.9 (44.7). RTMDet l to m: 49.3 -> 50.2. DAMO-YOLO S to T: 42.0 -> 43.6",
        "MMRazor; mmyolo; DAMO-YOLO"),
    "pkd": Published(
        "Faster R-CNN R101 to R50, 2x: 38.4 -> 40.3 (39.8). Mask R-CNN Swin-S to RetinaNet R50: 37.4 -> 41.5 (48.2)",
        "MMRazor"),
    "score_weighted_l2": Published("YOLO26 s to n: 40.9 -> 41.5; m to s: 48.6 -> 49.2", "Ultralytics' guide",
        "dense heads, for the teacher's scores"),
    "masked_mse": Published(
        "Faster R-CNN VGG16 to VGG11, VOC07 AP50: 59.6 -> 67.6 (70.1). GFL R101 to R50, 1x: 40.1 -> 41.1 (44.9)",
        "README of FGFI; README of HikariTJU/LD"),
    "decoupled_mse": Published("GFL R101 to R50, 1x: 40.1 -> 40.8 (44.9)", "README of HikariTJU/LD"),
    "fgd": Published(
        "RetinaNet X101 to R50, 2x: 37.4 -> 40.7 (41.0). YOLOX-l to YOLOX-m: 45.9 -> 46.6", "the authors' README"),
    "mgd": Published("RetinaNet X101 to R50, 2x: 37.4 -> 41.0", "the authors' README; MMRazor repeats it"),
    "crosskd_classes": Published(
        "with the edges: GFL R101 to R50, 1x: 40.2 -> 43.7 (44.9)", "the authors' README",
        "heads with branches of convolutions: YOLOv8, YOLOv5u"),
    "crosskd_edges": Published("", "", "heads with branches of convolutions and bins: YOLOv8, YOLOv5u"),
    "objectness_scaled": Published(
        "YOLOv3 R34 to MobileNetV1, as soft_class below", "PaddleDetection"),
    "prediction_correlation": Published("RetinaNet X101 to R50: 37.4 -> 39.8", "the paper", "softmax heads"),
    "softmax_kl": Published("", "", "softmax heads: Faster R-CNN"),
    "decoupled_kl": Published("", "", "softmax heads: Faster R-CNN"),
    "soft_class": Published(
        "YOLOv3 R34 to MobileNetV1, with box and objectness terms beside the classes: 29.4 -> 31.0", "PaddleDetection",
        "dense sigmoid heads with equal locations and classes"),
    "quality_focal": Published(
        "as the class term of CrossKD, through the teacher's head: GFL R101 to R50, 1x: 40.2 -> 43.7 (44.9)",
        "the authors' README", "dense sigmoid heads with equal locations and classes"),
    "localization": Published(
        "GFL R101 to R50, 1x: 40.1 -> 41.1 (44.9); with class terms and the valuable region 42.1. "
        "YOLOv8 s to n on VOC: +0.4 to +0.6", "README of HikariTJU/LD; its users' report, issue 59",
        "heads with equal locations and bins: YOLOv8, YOLOv5u"),
}
# fmt: on

HEADS = {  # where a loss fits, by what it reads
    "map": "any detector with maps",
    "logits": "dense heads with equal locations",
    "boxes": "any two detectors",
    "image": "any detector with maps; a teacher with image logits (CLIP)",
    "outputs": "YOLOv5, equal anchors",
}

READS = {
    "map": "maps of equal width, or an adapter",
    "logits": "logits of equal shapes",
    "boxes": "boxes to classify",
    "image": "image logits of the teacher",
    "outputs": "outputs of equal shapes",
}

NEEDS = {  # what a term needs besides what it compares, the teacher's class scores and trained parts
    "masked_mse": "labelled boxes (mask)",
    "decoupled_mse": "labelled boxes (mask)",
    "fgd": "labelled boxes (mask)",
    "mgd": "a random draw each step",
    "instance_distance": "labelled boxes",
    "crosskd_classes": "the rest of the teacher's branch",
    "crosskd_edges": "the rest of the teacher's branch",
    "localization": "labelled boxes, for the regions main and valuable",
    "decoupled_kl": "labels of the boxes",
}

INTRODUCTION = """\
# Distillation losses

Written by `python -m distill.document` from the docstrings; change those. `name` is what a term of a config gives as
`loss`; `parameters` are the keys it may give, with their defaults. Each loss is one function or module in `distill/`,
whose docstring also says its reduction, its empty cases and how it differs from the published code. An adapter is a
small layer of the criterion that brings the student's map to the teacher's width.

Published gains are those of others, with their detectors and schedules: box AP on COCO val unless it says otherwise,
student alone -> distilled (teacher). Between strongly augmented YOLO models they were 0.6 to 1.7.

"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m distill.document", description="Write docs/losses.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    arguments = parser.parse_args(argv)
    text = page()
    if arguments.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            raise UserError(f"{PAGE}: differs from the docstrings, expected what python -m distill.document writes")
        return
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}", file=sys.stderr)


def page() -> str:
    """The whole page, ending in a newline."""
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    heading = (
        "name", "loss", "equation", "needs", "parameters", "heads it fits", "cost per step", "gain measured here",
        "published gain",
    )  # fmt: skip
    lines = [heading, ("---",) * len(heading), *(row(name, entry, study) for name, entry in LOSSES.items())]
    return INTRODUCTION + protocol(study) + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def protocol(study: dict[str, Any]) -> str:
    """What the study trained, in a paragraph."""
    config, rows = study["config"], study["rows"]
    by_name = {row["name"]: row for row in rows}
    teachers = "; ".join(
        f"{row['arch']}, {row['epochs']} epochs, mAP {mean(row['mAP']):.3f}" for row in rows if row["is_teacher"]
    )
    baseline = by_name["baseline"]
    return (
        f"Gains measured here are in mAP on the test split of BCCD, against the same student without a teacher under "
        f"the same seeds ({config['student']['arch']}, {config['image_size']} px, {config['epochs']} epochs of "
        f"{baseline['steps'][0] // config['epochs']} steps of {config['batch_size']}: mAP {mean(baseline['mAP']):.3f}; "
        f"teacher: {teachers}); the cost is that of a whole step, the teacher's forward pass included, relative to the "
        f"student's alone. `docs/reports/bccd_study.md` has all rows, combinations too, and the longer one.\n\n"
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measured(name: str, study: dict[str, Any]) -> tuple[str, str]:
    """Cost per step and gain of the study's row of this loss; dashes where there is none."""
    found = next((row for row in study["rows"] if row["name"] == name), None)
    if found is None or not found["differences"]:
        return "-", "-"
    against = found["differences"][0]
    spread = "" if against["mAP_std"] is None else f" ± {against['mAP_std']:.3f}"
    count = len(against["seeds"])
    gain = f"{against['mAP_mean']:+.3f}{spread} ({count} seed{'s' if count > 1 else ''}): {against['verdict']}"
    return f"{found['cost_per_step']:.2f}x", gain


def row(name: str, entry: Term, study: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one loss."""
    cost, gain_here = measured(name, study)
    published = PUBLISHED.get(name, Published(""))
    gain = published.gain + (f" [{published.source}]" if published.source else "")
    heads = published.heads or HEADS[entry.reads]
    parameters = ", ".join(f"`{key}={value!r}`" for key, value in defaults(entry).items())
    loss = entry.loss
    equations = "<br>".join(f"`{cell(line)}`" for line in equation(loss))
    where = f"`{loss.__module__.replace('.', '/')}.py`, `{loss.__name__}`"
    title = f"{cell(summary(loss))}<br>{where}" + "".join(f"<br>{paper}" for paper in papers(loss))
    return (
        f"`{name}`", title, equations, cell(needs(name, entry)), cell(parameters) or "-", cell(heads), cost,
        cell(gain_here), cell(gain) or "-",
    )  # fmt: skip


def describe(loss: Callable[..., Any]) -> list[str]:
    """The docstrings that describe a loss. A class is described by its file: its head, then its functions."""
    if not isinstance(loss, type):
        return [inspect.getdoc(loss) or ""]
    module = sys.modules[loss.__module__]
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    return [inspect.getdoc(part) or "" for part in (module, *functions)]


def summary(loss: Callable[..., Any]) -> str:
    """The first paragraph, on one line."""
    return describe(loss)[0].split("\n\n")[0].replace("\n", " ")


def equation(loss: Callable[..., Any]) -> list[str]:
    """The first indented lines of a docstring that define L, up to the next empty one, without their indent."""
    for text in describe(loss):
        for block in text.split("\n\n"):
            lines = [line.rstrip().removeprefix("    ") for line in block.splitlines()]
            if block.startswith("    ") and re.match(r"L\s*=", lines[0]):
                return lines
    raise UserError(f"{loss.__module__}.{loss.__name__}: found no docstring with an equation, expected `    L = ...`")


def papers(loss: Callable[..., Any]) -> list[str]:
    """Links to the papers that the head of its file, which may be about one method, and its docstring name."""
    texts = [inspect.getdoc(part) or "" for part in (sys.modules[loss.__module__], loss)]
    numbers = dict.fromkeys(number for text in texts for number in ARXIV.findall(text))
    return [f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in numbers]


def needs(name: str, entry: Term) -> str:
    """What a term needs beside student and teacher."""
    found = ["maps of any widths" if entry.reads == "map" and not entry.same_width else READS[entry.reads]]
    found += ["class scores of the teacher"] * entry.reads_scores
    found += [NEEDS[name]] if name in NEEDS else []
    found += ["trained parts"] * (entry.module is not None)
    return "; ".join(found)


def defaults(entry: Term) -> dict[str, Any]:
    """The parameters a term may give, and what each is when it does not; required ones are `...`."""
    is_required = inspect.Parameter.empty
    return {k: ... if p.default is is_required else p.default for k, p in entry.parameters().items()}


def cell(text: str) -> str:
    """Text as it may stand between the bars of a table, in code too."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    run_script(main)
