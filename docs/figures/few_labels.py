"""Draw few_labels.svg: mAP against the number of labelled pictures, alone and taught, from the studies' reports.

python docs/figures/few_labels.py
"""

import json
import math
from pathlib import Path

from svg import page

HERE = Path(__file__).resolve().parent
REPORTS = HERE.parent / "reports"
PANELS = (  # report, title, labelled pictures of the rows `labels` and `all_labels`
    ("neu_few_labels", "Steel defects (NEU-DET): YOLOv8n", (60, 1259)),
    ("animals_few_labels", "Animals (VOC 2012): half of YOLOv8n", (60, 1396)),
)
WIDTH, HEIGHT, MARGIN, PANEL = 820, 330, 60, 330  # pixels
GREY, GREEN = "#777777", "#228833"


def panel(rows: dict[str, list[float]], title: str, counts: tuple[int, int], left: int) -> list[str]:
    """The drawing of one study. rows: mAP of each seed, by row."""
    values = [value for name in ("labels", "all_labels", "pseudo_and_outputs") for value in rows[name]]
    low, high = math.floor(min(values) * 50 - 0.5) / 50, math.ceil(max(values) * 50 + 0.5) / 50
    right, top, bottom = left + PANEL - 30, 70, HEIGHT - 60

    def x(count: int) -> float:
        share = math.log(count / counts[0]) / math.log(counts[1] / counts[0])
        return left + 40 + share * (right - left - 80)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    mean = {name: sum(numbers) / len(numbers) for name, numbers in rows.items() if numbers}
    few, many = mean["labels"], mean["all_labels"]
    lines = [
        f'<text x="{left}" y="52" font-weight="bold">{title}</text>',
        f'<path d="M{left} {top} V{bottom} H{right}" stroke="#999" fill="none"/>',
        f'<path d="M{x(counts[0]):.1f} {y(few):.1f} L{x(counts[1]):.1f} {y(many):.1f}" stroke="{GREY}" fill="none"/>',
    ]
    for tick in range(round(low * 50), round(high * 50) + 1):
        lines.append(f'<text x="{left - 6}" y="{y(tick / 50) + 4:.1f}" text-anchor="end">{tick / 50:.2f}</text>')
    for count in counts:
        lines.append(f'<text x="{x(count):.1f}" y="{bottom + 18}" text-anchor="middle">{count:,}</text>')
    marks = (
        ("labels", counts[0], 0, GREY, f"labels {few:.3f}"),
        ("all_labels", counts[1], 0, GREY, f"all labels {many:.3f}"),
        ("pseudo_and_outputs", counts[0], 14, GREEN, f"taught {mean['pseudo_and_outputs']:.3f}"),
    )
    for name, count, shift, color, text in marks:
        at = x(count) + shift
        lines += [f'<circle cx="{at:.1f}" cy="{y(v):.1f}" r="2.5" fill="{color}" opacity="0.5"/>' for v in rows[name]]
        lines.append(f'<circle cx="{at:.1f}" cy="{y(mean[name]):.1f}" r="5" fill="{color}"/>')
        anchor, offset = ("end", -10) if count == counts[1] else ("start", 10)
        lines.append(
            f'<text x="{at + offset:.1f}" y="{y(mean[name]) + 4:.1f}" text-anchor="{anchor}" fill="{color}">'
            f"{text}</text>"
        )
    lines.append(f'<text x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">labelled pictures</text>')
    return lines


def picture() -> str:
    lines = []
    for index, (name, title, counts) in enumerate(PANELS):
        tree = json.loads((REPORTS / f"{name}.json").read_text())
        lines += panel({row["name"]: row["mAP"] for row in tree["rows"]}, title, counts, MARGIN + 400 * index)
    return page(
        WIDTH,
        HEIGHT,
        "mAP against the number of labelled pictures, alone and taught",
        "What a teacher gives a student that has few labels: test mAP, equally many steps",
        lines,
        "Small dots: seeds. Drawn by docs/figures/few_labels.py",
    )


if __name__ == "__main__":
    (HERE / "few_labels.svg").write_text(picture(), encoding="utf-8")
