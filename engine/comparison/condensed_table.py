"""The value of condensed sets: the part of comparison.md and comparison.json about rows that train on one.

A row with score s (the mean over its seeds) is compared to two rows that train alike (engine/comparison/rows.py):

    s_full      on all real pictures, without distillation
    s_random    on as many random real pictures, with the row's distillation terms; the mean over its draws

Pictures without labels, if the row has any beside its set, are in both as well.

    of full = s / s_full
    gap closed = (s - s_random) / (s_full - s_random)

Both use mAP. The gap closed is left out if the gap s_full - s_random is at most 0 or within two standard errors of
s_random. Candidates that train differently are not used; they are named, with the keys that differ.
"""

import math
from collections.abc import Collection

import numpy as np

from engine.comparison.rows import Row, describe_differences, differing_keys, find_random_row, random_rows
from engine.comparison.table import METRICS, Result, mean_and_spread, table_row, to_json_value
from engine.condensing.set_files import read_manifest
from errors import counted

SOURCE = ("train", "train_root", "train_format", "max_samples", "per_class", "draw_seed")  # the real pictures
HEAD = ("row", "method", "stored", "terms", "seeds", "steps", *METRICS, "of full", "gap closed", "seconds", "GB")


def condensed_markdown(results: dict[str, Result], only: Collection[str] | None = None) -> str:
    """The table of the rows (of those in `only`) that train on a condensed set; empty if there are none."""
    rows = [row for row in condensed_tree(results) if row["seeds"] and (only is None or row["name"] in only)]
    if not rows:
        return ""
    lines = [
        "",
        "Condensed sets. Of full: the row's mAP over that of the same student trained as long on all real pictures. "
        "Gap closed: the share of the way from as many random real pictures to all of them; - if there is no such "
        "row yet, or no gap beyond two standard errors of the draws. Seconds and GB: time and peak memory of making "
        "the set.",
        "",
        table_row(HEAD),
        f"|{'|'.join('---:' if name not in HEAD[:4] else '---' for name in HEAD)}|",
    ]
    for row in rows:
        result = results[row["name"]]
        cells = [row["name"], row["method"], row["pictures"], ", ".join(row["terms"]) or "none", len(row["seeds"])]
        cells += [row["steps"], *(mean_and_spread(result.values(metric)) for metric in METRICS)]
        cells += [_number(row["of_full"], ".3f"), _number(row["gap_closed"], "+.2f")]
        cells += [_number(row["seconds"], ".0f"), _number(row["peak_gigabytes"], ".2f")]
        lines.append(table_row(cells))
    if refused := [f"{line}." for row in rows for line in row["refused"]]:
        lines += ["", *refused]
    return "\n".join([*lines, *phase_lines(results, only)]) + "\n"


def phase_lines(results: dict[str, Result], only: Collection[str] | None) -> list[str]:
    """The table of published project 1: a line for each row that is trained, the one on all real pictures too."""
    lines = ["", "| phase | dataset | mAP50 | precision | recall | F1 |", "|---|---|---:|---:|---:|---:|"]
    for result in results.values():
        if not result.seeds or result.row.is_teacher or (only is not None and result.name not in only):
            continue
        task, data = result.row.task, result.row.config.data
        dataset = (
            f"all of {data.train}"
            if task is None
            else f"{counted(task.condense.pictures, 'picture')}: {task.condense.method}"
        )
        phase = "baseline" if task is None else "condensed"
        phase += " + distillation" if result.row.config.terms else ""
        metrics = [mean_and_spread(result.values(name)) for name in ("mAP50", "precision", "recall", "F1")]
        lines.append(table_row((phase, dataset, *metrics)))
    return lines


def condensed_tree(results: dict[str, Result]) -> list[dict]:
    """The same numbers as plain values, for JSON."""
    planned = {name: result.row for name, result in results.items()}
    rows = []
    for result in results.values():
        task = result.row.task
        if task is None:
            continue
        manifests = [read_manifest(result.row.set_folder(seed)) for seed in result.seeds]
        costs = {str(result.row.set_folder(seed)): m for seed, m in zip(result.seeds, manifests) if m}
        full = full_row(result, results)
        random_row = result.name if task.condense.method == "random" else find_random_row(result.row, planned)
        random = results[random_row] if random_row is not None else None
        score = result.values("mAP").mean() if result.seeds else math.nan
        top = full.values("mAP").mean() if full is not None and full.seeds else 0.0
        rows.append(
            {
                "name": result.name,
                "method": task.condense.method,
                "init": task.condense.init if "init" in task.settings() else None,
                "pictures": task.condense.pictures,
                "formation": list(task.condense.formation),
                "terms": [term.loss for term in result.row.config.terms],
                "seeds": result.seeds,
                "sets": sorted({result.row.set_folder(seed).name for seed in result.seeds}),
                "steps": max((result.reports[seed]["steps"] for seed in result.seeds), default=None),
                "of_full": to_json_value(score / top) if top > 0 else None,
                "gap_closed": to_json_value(gap_closed(score, full, random)),
                "refused": refusals(result.row, planned),
                "seconds": to_json_value(np.mean([m["seconds"] for m in costs.values()])) if costs else None,
                "peak_gigabytes": to_json_value(max(m["peak_gigabytes"] for m in costs.values())) if costs else None,
            }
        )
    return rows


def full_row(result: Result, results: dict[str, Result]) -> Result | None:
    """The row that trains alike on all real pictures, without distillation."""
    candidates = full_rows(result.row, {name: other.row for name, other in results.items()})
    return next((results[row.name] for row in candidates if not differing_keys(row, result.row)), None)


def full_rows(row: Row, rows: dict[str, Row]) -> list[Row]:
    """The rows with the same student on all pictures that the set of `row` was made from, even if not trained alike."""
    assert row.task is not None
    source = row.task.data
    of_real = (other for other in rows.values() if other.task is None and not other.is_teacher)
    of_real = (other for other in of_real if other.config.data.unlabelled == row.config.data.unlabelled)
    same = (other for other in of_real if not other.config.terms and other.config.student == row.config.student)
    return [o for o in same if all(getattr(o.config.data, k) == getattr(source, k) for k in SOURCE)]


def refusals(row: Row, rows: dict[str, Row]) -> list[str]:
    """For each kind of reference row of which there are only rows that train differently: in which keys they differ."""
    assert row.task is not None
    candidates = [full_rows(row, rows)]
    if row.task.condense.method != "random":
        candidates.append(random_rows(row, rows))
    found = []
    for others in candidates:
        unlike = [differing_keys(row, other) for other in others]
        if others and all(unlike):
            what = describe_differences(row, others[0], unlike[0])
            found.append(f"{row.name} is not measured by {others[0].name}, which trains differently: {what}")
    return found


def gap_closed(score: float, full: Result | None, random: Result | None) -> float:
    """See the head of this file; nan if it is left out."""
    if full is None or random is None or not full.seeds or not random.seeds:
        return math.nan
    draws, top = random.values("mAP"), full.values("mAP").mean()
    gap = top - draws.mean()
    error = draws.std(ddof=1) / math.sqrt(len(draws)) if len(draws) > 1 else 0.0
    return (score - draws.mean()) / gap if gap > max(2 * error, 0.0) else math.nan


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
