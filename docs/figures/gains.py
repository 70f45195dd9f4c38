"""Draw gains.svg: what each loss was worth in docs/results.md's study, from its report.

python docs/figures/gains.py
"""

import json
from pathlib import Path

from svg import page

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent.parent / "docs" / "reports" / "bccd_study.json"
LEFT, TOP, STEP, WIDTH, SCALE = 250, 52, 17, 820, 2000  # pixels; SCALE pixels for one of mAP
TITLES = {"teacher_yolov8s": "the teacher: YOLOv8s, 100 epochs", "longer": "the student alone, 120 epochs"}


def picture() -> str:
    rows = {row["name"]: row["differences"][0] for row in json.loads(REPORT.read_text())["rows"] if row["differences"]}
    order = sorted(rows, key=lambda name: -rows[name]["mAP_mean"])
    zero, height = LEFT + 150, TOP + STEP * len(order) + 34
    lines = [
        '<text x="10" y="37" fill="#666">One seed decides nothing; cwd has two, and its 95 % interval holds 0.</text>',
        f'<path d="M{zero} {TOP - 4} V{height - 26}" stroke="#999"/>',
    ]
    for index, name in enumerate(order):
        gain, y = rows[name]["mAP_mean"], TOP + STEP * index
        width = abs(gain) * SCALE
        color = "#4477aa" if name in TITLES else "#228833" if gain > 0.01 else "#bbbbbb"
        at = zero - (width if gain < 0 else 0)
        lines += [
            f'<text x="{LEFT - 10}" y="{y + 11}" text-anchor="end">{TITLES.get(name, name)}</text>',
            f'<rect x="{at:.1f}" y="{y}" width="{max(width, 1):.1f}" height="{STEP - 4}" fill="{color}"/>',
            f'<text x="{zero + 6 if gain < 0 else zero + width + 6:.1f}" y="{y + 11}">{gain:+.3f}</text>',
        ]
    return page(
        WIDTH,
        height,
        "Gain of each loss over the student alone",
        "Gain in mAP over YOLOv8n alone, 20 epochs of BCCD at 160 px (mAP 0.404)",
        lines,
        "docs/figures/gains.py, from docs/reports/bccd_study.json",
    )


if __name__ == "__main__":
    (HERE / "gains.svg").write_text(picture(), encoding="utf-8")
