"""comparison.md and comparison.json: the score of each row, and whether it differs from the row it is compared to.

engine/comparison/decision.py has the rule of the verdicts.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from config import to_tree
from engine.comparison.decision import DEFAULT_RULE, DecisionRule
from engine.comparison.rows import Row, describe_pair
from engine.comparison.study import Study
from errors import counted

NO_VERDICT = "plumbing"  # in place of the verdict of a row whose teachers have random weights
METRICS = {"mAP50": "mAP50", "mAP": "mAP50-95", "precision": "precision", "recall": "recall", "F1": "f1"}


@dataclass
class Result:
    """The results of a row so far: by seed, the reports of finished runs and why others failed."""

    row: Row
    reports: dict[int, dict] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def seeds(self) -> list[int]:
        """The seeds of finished runs."""
        return [seed for seed in self.row.seeds if seed in self.reports]

    @property
    def missing(self) -> list[int]:
        return [seed for seed in self.row.seeds if seed not in self.reports]

    @property
    def notes(self) -> list[str]:
        """The notes of the row, and one for each term that was 0 in every epoch of a run."""
        terms = ((seed, self.reports[seed].get("distillation", {})) for seed in self.seeds)
        idle = [(seed, term) for seed, found in terms for term in found if found[term]["highest"] == 0]
        return [
            *self.row.notes,
            *(f"{self.name} with seed {s}: {t} was 0 in every epoch, it never acted" for s, t in idle),
        ]

    def values(self, metric: str, seeds: list[int] | None = None) -> np.ndarray:
        """(seeds,): one of METRICS on the test split, from the last EMA weights; nan if it is not defined."""
        reports = [self.reports[seed] for seed in (self.seeds if seeds is None else seeds)]
        return np.array([report["test"][METRICS[metric]] for report in reports], dtype=np.float64)

    def start_values(self, metric: str) -> np.ndarray:
        """The same before the first step, of the seeds that have been measured then."""
        starts = [self.reports[seed].get("start") for seed in self.seeds]
        return np.array([start[METRICS[metric]] for start in starts if start is not None], dtype=np.float64)

    def seconds(self) -> np.ndarray:
        """(seeds,): training time without evaluation."""
        return np.array([self.reports[seed]["seconds"] for seed in self.seeds], dtype=np.float64)

    def seconds_per_step(self) -> np.ndarray:
        steps = np.array([self.reports[seed]["steps"] for seed in self.seeds], dtype=np.float64)
        return self.seconds() / np.maximum(steps, 1)


@dataclass(frozen=True)
class Difference:
    """One row minus another over the seeds that both have finished; mAP50, mAP, decisive (seeds,).

    decisive: the difference in the metric of the rule.
    """

    name: str
    against: str
    seeds: tuple[int, ...]
    mAP50: np.ndarray
    mAP: np.ndarray
    decisive: np.ndarray
    rule: DecisionRule
    is_plumbing: bool = False  # a teacher of one of the two has random weights

    @property
    def verdict(self) -> str:
        return NO_VERDICT if self.is_plumbing else self.rule.verdict(self.decisive)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean difference in the rule's metric; None for less than two seeds."""
        return self.rule.interval(self.decisive)


def differences(results: dict[str, Result], rule: DecisionRule = DEFAULT_RULE) -> list[Difference]:
    """Every comparison of the rows, in the order of the table."""
    found = []
    for result in results.values():
        for name in result.row.against:
            other = results[name]
            seeds = [seed for seed in result.seeds if seed in other.reports]
            mAP50, mAP, decisive = (
                result.values(m, seeds) - other.values(m, seeds) for m in ("mAP50", "mAP", rule.metric)
            )
            is_plumbing = bool(result.row.config.plumbing or other.row.config.plumbing)
            found.append(Difference(result.name, name, tuple(seeds), mAP50, mAP, decisive, rule, is_plumbing))
    return found


def cost_per_step(result: Result, results: dict[str, Result]) -> float | None:
    """Time of a training step relative to the row's baseline; None while either is missing."""
    baseline = results[result.row.baseline]
    if not result.reports or not baseline.reports:
        return None
    reference = baseline.seconds_per_step().mean()
    return float(result.seconds_per_step().mean() / reference) if reference > 0 else None


def table_row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def interval_cell(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:+.3f} .. {ends[1]:+.3f}"


def mean_and_spread(values: np.ndarray, *, sign: str = "") -> str:
    """`0.612 ± 0.004`: the mean and the sample standard deviation; only the mean for one seed."""
    if len(values) == 0 or not np.isfinite(values).all():
        return "-"
    mean = f"{values.mean():{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.3f}"


def markdown(study: Study, results: dict[str, Result], only: Collection[str] | None = None) -> str:
    """The tables of scores and comparisons, and the missing runs, for all rows or those in `only`.

    A row without a finished run is in no table; it stands among the missing runs. Nor is a comparison without a seed
    that both rows have finished, and if there is none, there is no table of them.
    """
    shown = [result for name, result in results.items() if only is None or name in only]
    trained = [result for result in shown if result.reports]
    names = {result.name for result in trained}
    compared = [d for d in differences(results, study.rule) if d.name in names and d.seeds]
    lines = [f"# {study.config.name}", "", describe_protocol(study, results), ""]
    lines += score_lines(trained, results)
    lines += ["", *difference_lines(study, compared)] if compared else []
    marked = [f"**{r.name}: {r.row.config.plumbing}.**" for r in shown if r.row.config.plumbing]
    lines += ["", *marked] if marked else []
    notes = [note for result in shown for note in result.notes]
    pairs = [describe_pair(results[d.name].row, results[d.against].row) for d in compared]
    notes += [pair for pair in pairs if pair is not None]
    lines += ["", *(f"{note}." for note in notes)] if notes else []
    lines += missing_lines(shown)
    for result in shown:
        lines += [f"Failed: {result.name} with seed {seed}: {why}" for seed, why in result.failures.items()]
    return "\n".join(lines) + "\n"


def describe_protocol(study: Study, results: dict[str, Result]) -> str:
    """What all rows share, how the numbers of the tables are made, and the machines."""
    config = study.config
    views = "" if config.view_seed is None else f"All seeds see the same views, those of seed {config.view_seed}. "
    if config.teacher_cache_gigabytes:
        views += "A row that read its teachers' outputs from those of an earlier run has a step without their passes. "
    classes = f"classes {', '.join(config.data.classes)} alone, " if config.data.classes else ""
    return (
        f"{config.data.format} data, train `{config.data.train}`, test `{config.data.test}`, {classes}"
        f"{config.image_size} px, batch {config.batch_size}. Last EMA weights, {config.evaluation.protocol} protocol; "
        f"mean ± sample standard deviation over seeds. Cost per step: seconds of a training step, relative to the "
        f"student alone. {views}{machines(results)}"
    )


def score_lines(shown: list[Result], results: dict[str, Result]) -> list[str]:
    """The table of scores, with a line for each start before the first row that begins there."""
    lines = [
        "| row | model | parameters | epochs | seeds | " + " | ".join(METRICS) + " | cost per step | minutes |",
        "|---|---|---:|---:|---:|" + "---:|" * (len(METRICS) + 2),
    ]
    starts = distinct_starts(shown)
    for result in shown:
        if result.name in starts:
            lines.append(table_row(start_cells(result, is_only=len(starts) == 1)))
        lines.append(table_row(score_cells(result, results)))
    return lines


def missing_lines(shown: list[Result]) -> list[str]:
    """`Not trained yet, row (seeds): cwd, pkd (0, 1, 2); mse (2).`: rows that lack the same seeds stand together."""
    rows_of: dict[tuple[int, ...], list[str]] = {}
    for result in shown:
        if result.missing:
            rows_of.setdefault(tuple(result.missing), []).append(result.name)
    groups = [f"{', '.join(names)} ({', '.join(map(str, seeds))})" for seeds, names in rows_of.items()]
    return ["", f"Not trained yet, row (seeds): {'; '.join(groups)}."] if groups else []


def difference_lines(study: Study, compared: list[Difference]) -> list[str]:
    """The rule, and the table of the comparisons."""
    rule = study.rule
    of_metric = "" if rule.metric == "mAP" else f" of {rule.metric}"
    return [
        f"Differences are paired by seed. The rule ({study.rule_origin}): {rule.describe()}. Of rows without any "
        f"effect, {1 - rule.level:.2g} would still be called better or worse.",
        "",
        f"| row | compared to | seeds | mAP50 | mAP | {100 * rule.level:g} % interval{of_metric} | verdict |",
        "|---|---|---:|---:|---:|---:|---|",
        *(table_row(difference_cells(d)) for d in compared),
    ]


def distinct_starts(results: list[Result]) -> list[str]:
    """The first row of each start that was measured: the same weights, test split and image size have one."""
    first: dict[str, str] = {}
    for result in results:
        if len(result.start_values("mAP")):
            config = result.row.config
            start = [to_tree(config.student), config.image_size, config.data.test, config.evaluation.protocol]
            first.setdefault(json.dumps(start), result.name)
    return list(first.values())


def start_cells(result: Result, *, is_only: bool) -> list[str]:
    """The line of a start; its seeds differ in what of the class head begins fresh."""
    config = result.row.config
    return [
        "untrained start" if is_only else f"untrained start of {result.name}",
        config.student.arch,
        f"{next(iter(result.reports.values()))['parameters'] / 1e6:.2f} M",
        "0",
        str(len(result.start_values("mAP"))),
        *(mean_and_spread(result.start_values(metric)) for metric in METRICS),
        "-",
        "-",
    ]


def score_cells(result: Result, results: dict[str, Result]) -> list[str]:
    """The line of a row that has a finished run."""
    config, cost = result.row.config, cost_per_step(result, results)
    sizes = [report["parameters"] for report in result.reports.values()]
    seeds = f"{len(result.seeds)} of {len(result.row.seeds)}" if result.missing else f"{len(result.seeds)}"
    return [
        f"{result.name} [{NO_VERDICT}]" if config.plumbing else result.name,
        config.student.arch,
        f"{sizes[0] / 1e6:.2f} M",
        str(config.epochs),
        seeds,
        *(mean_and_spread(result.values(metric)) for metric in METRICS),
        "-" if cost is None else f"{cost:.2f}",
        f"{result.seconds().mean() / 60:.1f}",
    ]


def difference_cells(difference: Difference) -> list[str]:
    return [
        difference.name,
        difference.against,
        str(len(difference.seeds)),
        mean_and_spread(difference.mAP50, sign="+"),
        mean_and_spread(difference.mAP, sign="+"),
        interval_cell(difference.interval),
        difference.verdict,
    ]


def machines(results: dict[str, Result]) -> str:
    """The hardware and versions of the runs; costs are comparable only if there is one set of them."""
    found = dict.fromkeys(
        f"{r['device']}, {r['precision']}, {counted(r['threads'], 'thread')}, torch {r['torch']}"
        for result in results.values()
        for r in result.reports.values()
    )
    return f"Trained on {'; '.join(found)}." if found else ""


def as_json(study: Study, results: dict[str, Result], *, condensed: Sequence[dict] = ()) -> str:
    """Every number of the tables, by seed. condensed: the rows of condensed_table.condensed_tree."""
    compared = differences(results, study.rule)
    rows = []
    for result in results.values():
        config = result.row.config
        pairs = [describe_pair(result.row, results[name].row) for name in result.row.against]
        rows.append(
            {
                "name": result.name,
                "is_teacher": result.row.is_teacher,
                "plumbing": config.plumbing or None,
                "arch": config.student.arch,
                "parameters": next((report["parameters"] for report in result.reports.values()), None),
                "epochs": config.epochs,
                "image_size": config.image_size,
                "terms": to_tree(config.terms),
                "seeds": result.seeds,
                "missing_seeds": result.missing,
                "failures": {str(seed): why for seed, why in result.failures.items()},
                "runs": [result.row.folder(seed).name for seed in result.seeds],
                **{metric: to_json_value(result.values(metric)) for metric in METRICS},
                "start": {metric: to_json_value(result.start_values(metric)) for metric in METRICS},
                "seconds": to_json_value(result.seconds()),
                "steps": [result.reports[seed]["steps"] for seed in result.seeds],
                "baseline": result.row.baseline,
                "notes": [*result.notes, *filter(None, pairs)],
                "cost_per_step": cost_per_step(result, results),
                "differences": [difference_tree(d) for d in compared if d.name == result.name],
            }
        )
    tree = {
        "config": to_tree(study.config),
        "rule": {"origin": study.rule_origin, **to_tree(study.rule)},
        "machines": machines(results),
        "rows": rows,
        "condensed": list(condensed),
    }
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def difference_tree(difference: Difference) -> dict:
    """A comparison as plain values, for JSON."""
    is_many = len(difference.seeds) > 1
    return {
        "against": difference.against,
        "seeds": list(difference.seeds),
        "mAP50": to_json_value(difference.mAP50),
        "mAP": to_json_value(difference.mAP),
        "mAP50_mean": to_json_value(difference.mAP50.mean()) if difference.seeds else None,
        "mAP_mean": to_json_value(difference.mAP.mean()) if difference.seeds else None,
        "mAP50_std": to_json_value(difference.mAP50.std(ddof=1)) if is_many else None,
        "mAP_std": to_json_value(difference.mAP.std(ddof=1)) if is_many else None,
        "interval": difference.interval,
        "verdict": difference.verdict,
    }


def to_json_value(values: np.ndarray | float) -> list | float | None:
    """Numbers for JSON: values that are not finite become null."""
    if isinstance(values, np.ndarray) and values.ndim:
        return [to_json_value(value) for value in values]
    return float(values) if math.isfinite(values) else None
