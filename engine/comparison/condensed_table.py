"""What condensed sets are worth: the part of comparison.md and comparison.json about rows that train on one.

Beside a row with score s, the mean of its seeds, stand two rows that train alike (engine/comparison/protocol.py): one
on all real pictures and without distillation, s_full, and one with the row's own distillation terms on as many real
pictures at random, s_random, the mean of its draws. Rows that train otherwise are refused by name.

    of full = s / s_full
    gap closed = (s - s_random) / (s_full - s_random)

The second says something only where there is a gap: it is left out where s_full - s_random is at most 0, or within two
standard errors of the draws' mean. Both are of mAP.
"""

import math
from collections.abc import Collection

import numpy as np

from engine.comparison.protocol import describe_difference, differing_keys
from engine.comparison.study import Row, random_rival, random_rows, trains_alike
from engine.comparison.table import METRICS, Result, mean_and_spread, plain
from engine.condensing.set_files import read_manifest

SOURCE = ("train", "train_root", "train_format", "max_samples")  # keys that name the real pictures
HEAD = ("row", "method", "stored", "terms", "seeds", "steps", *METRICS, "of full", "gap closed", "seconds", "GB")


def condensed_markdown(results: dict[str, Result], only: Collection[str] | None = None) -> str:
    """A table, where any row (of those in `only`) trains on a condensed set; else nothing."""
    rows = [row for row in condensed_tree(results) if row["seeds"] and (only is None or row["name"] in only)]
    if not rows:
        return ""
    lines = [
        "",
        "Condensed sets. Of full: the row's mAP over that of the same student trained as long on all real pictures. "
        "Gap closed: the share of the way from as many real pictures at random to all of them; - where there is no "
        "such row yet, or no gap beyond two standard errors of the draws. Seconds and GB: of making the set, the "
        "highest memory of the process.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'|'.join('---:' if name not in HEAD[:4] else '---' for name in HEAD)}|",
    ]
    for row in rows:
        result = results[row["name"]]
        cells = [row["name"], row["method"], row["pictures"], ", ".join(row["terms"]) or "none", len(row["seeds"])]
        cells += [row["steps"], *(mean_and_spread(result.values(metric)) for metric in METRICS)]
        cells += [_number(row["of_full"], ".3f"), _number(row["gap_closed"], "+.2f")]
        cells += [_number(row["seconds"], ".0f"), _number(row["peak_gigabytes"], ".2f")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    refused = [line for row in rows for line in row["refused"]]
    lines += [""] * bool(refused) + [f"{line}." for line in refused]
    return "\n".join(lines) + "\n"


def condensed_tree(results: dict[str, Result]) -> list[dict]:
    """The same numbers as plain values, for every row that trains on a condensed set."""
    planned = {name: result.row for name, result in results.items()}
    rows = []
    for result in results.values():
        task = result.row.task
        if task is None:
            continue
        manifests = [read_manifest(result.row.set_folder(seed)) for seed in result.seeds]
        costs = {id: m for id, m in zip((str(result.row.set_folder(s)) for s in result.seeds), manifests) if m}
        full = full_row(result, results)
        rival = result.name if task.condense.method == "random" else random_rival(result.row, planned)
        random = results[rival] if rival is not None else None
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
                "of_full": plain(score / top) if top > 0 else None,
                "gap_closed": plain(gap_closed(score, full, random)),
                "refused": refusals(result.row, planned),
                "seconds": plain(np.mean([m["seconds"] for m in costs.values()])) if costs else None,
                "peak_gigabytes": plain(max(m["peak_gigabytes"] for m in costs.values())) if costs else None,
            }
        )
    return rows


def full_row(result: Result, results: dict[str, Result]) -> Result | None:
    """The row that trains as this one does on all real pictures, without distillation."""
    candidates = full_rows(result.row, {name: other.row for name, other in results.items()})
    alike = (other.name for other in candidates if trains_alike(other, result.row, terms=False))
    return results.get(next(alike, None))


def full_rows(row: Row, rows: dict[str, Row]) -> list[Row]:
    """The rows of the same student on all pictures that the set of `row` was made of, however they train."""
    of_real = (other for other in rows.values() if other.task is None and not other.is_teacher)
    same = (other for other in of_real if not other.config.terms and other.config.student == row.config.student)
    return [o for o in same if all(getattr(o.config.data, k) == getattr(row.task.data, k) for k in SOURCE)]


def refusals(row: Row, rows: dict[str, Row]) -> list[str]:
    """Why a row is measured by no row of all pictures, or by none of as many at random, where there are some."""
    candidates = [full_rows(row, rows)]
    if row.task.condense.method != "random":
        candidates.append(random_rows(row, rows))
    found = []
    for others in candidates:
        unlike = [differing_keys(row, other) for other in others]
        if others and all(unlike):
            what = ", ".join(describe_difference(row, others[0], key) for key in unlike[0])
            found.append(f"{row.name} is not measured by {others[0].name}, which trains otherwise: {what}")
    return found


def gap_closed(score: float, full: Result | None, random: Result | None) -> float:
    """See the head of this file; nan where it is left out."""
    if full is None or random is None or not full.seeds or not random.seeds:
        return math.nan
    draws, top = random.values("mAP"), full.values("mAP").mean()
    gap = top - draws.mean()
    error = draws.std(ddof=1) / math.sqrt(len(draws)) if len(draws) > 1 else 0.0
    return (score - draws.mean()) / gap if gap > max(2 * error, 0.0) else math.nan


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
