"""Draw smaller_models.svg: mAP against the time of a picture, of the students that learn the animals with all labels.

python docs/figures/smaller_models.py
"""

import json
from pathlib import Path

from svg import page

HERE = Path(__file__).resolve().parent
REPORTS = HERE.parent / "reports"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 820, 400, 70, 70, 790, 330  # pixels
GREY, GREEN = "#777777", "#228833"
ALONE, TAUGHT = (GREY, "tuned alone"), (GREEN, "tuned with a teacher")
# Rows of the same shape have one time: that of the row named first, as docs/reports/animals_latency.json has it.
SHAPES = (
    ("YOLOv8n", "animals_prune", {"whole": ALONE}),
    ("three quarters", "animals_prune", {"three_quarters_tuned": ALONE, "three_quarters_distilled": TAUGHT}),
    ("half", "animals_prune", {"half_tuned": ALONE, "half_distilled": TAUGHT}),
    ("a quarter", "animals_prune", {"quarter_tuned": ALONE, "quarter_distilled": TAUGHT}),
    ("YOLOv5n", "animals_losses", {"labels": ALONE, "instance_distance": TAUGHT}),
)


def mean_mAP(study: str) -> dict[str, float]:
    rows = json.loads((REPORTS / f"{study}.json").read_text())["rows"]
    return {row["name"]: sum(row["mAP"]) / len(row["mAP"]) for row in rows if row["mAP"]}


def picture() -> str:
    times = json.loads((REPORTS / "animals_latency.json").read_text())
    onnx_ms = {Path(model["name"]).name.removesuffix("_seed0"): model["onnx_ms"] for model in times["models"]}
    longest = max(onnx_ms.values())

    def x(milliseconds: float) -> float:
        return LEFT + milliseconds / (1.1 * longest) * (RIGHT - LEFT)

    def y(score: float) -> float:
        return BOTTOM - score / 0.5 * (BOTTOM - TOP)

    lines = [f'<path d="M{LEFT} {TOP} V{BOTTOM} H{RIGHT}" stroke="#999" fill="none"/>']
    for tenth in range(6):
        at = y(tenth / 10)
        lines.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>')
    for milliseconds in range(0, int(1.1 * longest) + 1, 1 if longest < 10 else 5):
        lines.append(f'<text x="{x(milliseconds):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{milliseconds}</text>')
    for title, study, kinds in SHAPES:
        score = mean_mAP(study)
        at = x(onnx_ms[next(iter(kinds))])
        for name, (color, _) in kinds.items():
            if name in score:
                lines.append(f'<circle cx="{at:.1f}" cy="{y(score[name]):.1f}" r="5" fill="{color}"/>')
        top = max(score[name] for name in kinds if name in score)
        lines.append(f'<text x="{at:.1f}" y="{y(top) - 10:.1f}" text-anchor="middle">{title}</text>')
    for index, (color, text) in enumerate((ALONE, TAUGHT)):
        lines += [
            f'<circle cx="{LEFT + 20 + 170 * index}" cy="46" r="5" fill="{color}"/>',
            f'<text x="{LEFT + 30 + 170 * index}" y="50">{text}</text>',
        ]
    unit = "CPU milliseconds" if times["cpu_time"] else "milliseconds"
    lines.append(
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">{unit} of a picture, one thread</text>'
    )
    return page(
        WIDTH,
        HEIGHT,
        "mAP of smaller models against the time that a picture takes",
        "Six kinds of animals, 160 px: test mAP against the time of a picture in onnxruntime",
        lines,
        "Means over seeds. Drawn by docs/figures/smaller_models.py",
    )


if __name__ == "__main__":
    (HERE / "smaller_models.svg").write_text(picture(), encoding="utf-8")
