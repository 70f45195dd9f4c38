"""Draw patience.svg: mAP against compute of one student, alone and taught, for 30 epochs and more.

python docs/figures/patience.py
"""

import json
import math
import statistics
from pathlib import Path

from svg import page

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 820, 400, 70, 70, 790, 330  # pixels
LOWEST, HIGHEST = 0.30, 0.54  # mAP at the ends of the axis
GREY, GREEN, BLUE = "#777777", "#228833", "#4477aa"
EPOCHS = {"alone": (30, 100, 300, 627), "taught": (30, 100, 300)}
TEACHER_EPOCHS = 100
# FLOPs of a training step as engine/training/flops.py counts them, as multiples of those of the student alone
FLOPS = {"alone": 1.0, "taught": 2.09, "teacher": 3.27}


def curves(rows: dict[str, dict]) -> list[tuple[str, str, list[tuple[float, float, float]]]]:
    """Color, title and points of each curve: epochs of the student alone, mean mAP, its standard deviation."""

    def points(kind: str, before: float) -> list[tuple[float, float, float]]:
        scores = [rows[f"{kind}_{epochs}"]["mAP"] for epochs in EPOCHS[kind]]
        costs = [before + epochs * FLOPS[kind] for epochs in EPOCHS[kind]]
        return [(cost, statistics.mean(mAP), statistics.stdev(mAP)) for cost, mAP in zip(costs, scores)]

    return [
        (GREY, "alone", points("alone", 0)),
        (GREEN, "taught, the teacher exists already", points("taught", 0)),
        (BLUE, "taught, the teacher's training counted", points("taught", TEACHER_EPOCHS * FLOPS["teacher"])),
    ]


def picture() -> str:
    report = json.loads((HERE.parent / "reports" / "bccd_patience.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    drawn = curves(rows)
    costs = [cost for _, _, points in drawn for cost, _, _ in points]
    low, high = math.log(min(costs) / 1.3), math.log(max(costs) * 1.3)

    def x(cost: float) -> float:
        return LEFT + (math.log(cost) - low) / (high - low) * (RIGHT - LEFT)

    def y(score: float) -> float:
        return BOTTOM - (score - LOWEST) / (HIGHEST - LOWEST) * (BOTTOM - TOP)

    lines = [f'<path d="M{LEFT} {TOP} V{BOTTOM} H{RIGHT}" stroke="#999" fill="none"/>']
    for score in (0.30, 0.35, 0.40, 0.45, 0.50):
        lines.append(f'<text x="{LEFT - 6}" y="{y(score) + 4:.1f}" text-anchor="end">{score:.2f}</text>')
    for epochs in (30, 100, 300, 1000):
        if low < math.log(epochs) < high:
            lines.append(f'<text x="{x(epochs):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{epochs:,}</text>')
    for index, (color, title, points) in enumerate(drawn):
        path = " L".join(f"{x(cost):.1f} {y(mean):.1f}" for cost, mean, _ in points)
        lines.append(f'<path d="M{path}" stroke="{color}" fill="none"/>')
        for cost, mean, deviation in points:
            at, top, bottom = x(cost), y(mean + deviation), y(mean - deviation)
            lines += [
                f'<path d="M{at:.1f} {top:.1f} V{bottom:.1f}" stroke="{color}"/>',
                f'<circle cx="{at:.1f}" cy="{y(mean):.1f}" r="5" fill="{color}"/>',
            ]
        lines += [
            f'<circle cx="{LEFT + 20 + 240 * index}" cy="46" r="5" fill="{color}"/>',
            f'<text x="{LEFT + 30 + 240 * index}" y="50">{title}</text>',
        ]
    lines.append(
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">'
        "compute (FLOPs), in epochs of the student alone</text>"
    )
    return page(
        WIDTH,
        HEIGHT,
        "mAP against compute, alone for 30 to 627 epochs and taught for 30 to 300",
        "YOLOv8n from scratch on BCCD, 96 px: test mAP of 30, 100, 300 (alone: 627) epochs against compute",
        lines,
        "Means of three seeds and their deviation. Drawn by docs/figures/patience.py",
    )


if __name__ == "__main__":
    (HERE / "patience.svg").write_text(picture(), encoding="utf-8")
