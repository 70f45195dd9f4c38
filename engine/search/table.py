"""search.md and search.json: what each method found, and how well short trainings and proxies order the shapes."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from config import to_tree
from engine.comparison.table import interval_cell, mean_and_spread, table_row, to_json_value
from engine.search.config import SearchFile, Teaching
from engine.search.kendall import kendall_tau, spread_without_relation
from engine.search.methods import Scored
from engine.search.space import Shape, Space
from errors import counted

AGAINST = (("random", "scaled"), ("evolution", "scaled"), ("evolution", "random"))


@dataclass(frozen=True)
class Found:
    """What one search trained: the shapes of each rung with their scores, best first. minutes: of its trainings."""

    rungs: list[Scored]
    minutes: float

    @property
    def best(self) -> tuple[Shape, float]:
        return self.rungs[-1][0]


@dataclass(frozen=True)
class Ranked:
    """A shape that was trained in full. scores: by the epochs of the trainings. proxies: by their names.

    again: the score after all epochs with another seed, None without such a training.
    """

    shape: Shape
    scores: dict[int, float]
    proxies: dict[str, float]
    again: float | None = None

    def mean_of_seeds(self, full: int) -> float:
        """The mean score after all `full` epochs of the seeds that were trained."""
        return self.scores[full] if self.again is None else (self.scores[full] + self.again) / 2


@dataclass
class Results:
    """All of one teaching. found: by method, one for each draw."""

    found: dict[str, list[Found]] = field(default_factory=dict)
    ranked: list[Ranked] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # by the name of a run

    def taus(self) -> dict[str, float | None]:
        """Kendall's tau with the full training of the ranked shapes, of each proxy, short training and other seed."""
        if not self.ranked:
            return {}
        full = max(self.ranked[0].scores)
        scores = np.array([ranked.scores[full] for ranked in self.ranked])
        proxies = self.ranked[0].proxies
        columns = {name: [ranked.proxies[name] for ranked in self.ranked] for name in proxies}
        for epochs in sorted(self.ranked[0].scores)[:-1]:
            columns[counted(epochs, "epoch")] = [r.scores[epochs] for r in self.ranked]
        again = [r.again for r in self.ranked if r.again is not None]
        if len(again) == len(self.ranked):
            columns["another seed"] = again
        return {name: kendall_tau(np.array(values), scores) for name, values in columns.items()}

    def best(self) -> tuple[Shape, float]:
        """The shape with the highest score of all that were trained in full."""
        full = [pair for searches in self.found.values() for found in searches for pair in found.rungs[-1]]
        full += [(ranked.shape, ranked.scores[max(ranked.scores)]) for ranked in self.ranked]
        return max(full, key=lambda pair: pair[1])


def markdown(file: SearchFile, space: Space, results: dict[Teaching, Results], origin: str, machine: str) -> str:
    """The tables of all that has been trained so far."""
    search, rule = file.search, file.decide
    trainings = " -> ".join(f"{n} x {epochs}" for n, epochs in rung_sizes(file))
    lines = [
        f"# {file.name}",
        "",
        f"Shapes of {file.student.arch} between {space.low / 1e9:.3f} and {space.high / 1e9:.3f} GFLOPs at "
        f"{file.image_size} px ({100 * search.flops:g} % of its own is the limit), chosen by {rule.metric} on "
        f"`{file.data.test}` of {file.data.format} data, batch {file.batch_size}. Each search trains {trainings} "
        f"(shapes x epochs). Trainings have seed {file.seed} where no other is named; mean ± sample standard deviation "
        f"over {rule.seeds} draws of shapes. The best of many is chosen and measured on the same pictures, so its "
        f"score is too high; `scaled` is one shape, not chosen. {machine}",
    ]
    for teaching, result in results.items():
        lines += ["", f"## {teaching}", "", *found_lines(file, result, origin)]
        if result.ranked:
            lines += ["", *ranked_lines(file, result)]
        lines += [f"Failed, counted as 0: {name}: {why}" for name, why in result.failures.items()]
    if all(result.ranked for result in results.values()) and len(results) == 2:
        lines += ["", *order_lines(results, file)]
    return "\n".join(lines) + "\n"


def rung_sizes(file: SearchFile) -> list[tuple[int, int]]:
    """(shapes, epochs) of each rung of a search, as methods.halve counts them."""
    sizes = [(file.search.shapes, file.rungs[0])]
    for epochs in file.rungs[1:]:
        sizes.append((max(1, sizes[-1][0] // file.search.keep), epochs))
    return sizes


def found_lines(file: SearchFile, result: Results, origin: str) -> list[str]:
    rule = file.decide
    lines = [
        f"| search | draws | best {rule.metric} | minutes of a search | best shape (widths_depths) |",
        "|---|---:|---:|---:|---|",
    ]
    for method, searches in result.found.items():
        scores = np.array([found.best[1] for found in searches])
        minutes = np.array([found.minutes for found in searches])
        shape, _ = max((found.best for found in searches), key=lambda pair: pair[1])
        lines.append(table_row([method, len(searches), mean_and_spread(scores), f"{minutes.mean():.1f}", shape.name]))
    level = f"{100 * rule.level:g} % interval"
    lines += [
        "",
        f"Differences are paired by draw. The rule ({origin}): {rule.describe()}.",
        "",
        f"| search | compared to | draws | {rule.metric} | {level} | verdict |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, against, values in differences(result):
        mean, between = mean_and_spread(values, sign="+"), interval_cell(rule.interval(values))
        lines.append(table_row([name, against, len(values), mean, between, rule.verdict(values)]))
    shape, score = result.best()
    return [*lines, "", f"The best of all shapes that were trained in full: {shape.name}, {score:.3f}."]


def differences(result: Results) -> list[tuple[str, str, np.ndarray]]:
    """(method, another, difference of their best scores for each draw that both have)."""
    best = {method: np.array([f.best[1] for f in searches]) for method, searches in result.found.items()}
    compared = []
    for name, against in AGAINST:
        if name in best and against in best:
            other = best[against] if against != "scaled" else np.repeat(best[against], len(best[name]))
            count = min(len(best[name]), len(other))
            compared.append((name, against, best[name][:count] - other[:count]))
    return compared


def ranked_lines(file: SearchFile, result: Results) -> list[str]:
    first, full, metric = result.ranked[0], file.epochs, file.decide.metric
    short = [epochs for epochs in sorted(first.scores) if epochs != full]
    another_seed = [f"{metric}, {counted(full, 'epoch')}, seed {file.seed + 1}"] if first.again is not None else []
    columns = [*first.proxies, *(f"{metric}, {counted(epochs, 'epoch')}" for epochs in short), *another_seed]
    columns.append(f"{metric}, {counted(full, 'epoch')}")
    lines = [f"| random shape | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for ranked in sorted(result.ranked, key=lambda ranked: -ranked.scores[full]):
        numbers = [f"{value:.4g}" for value in ranked.proxies.values()]
        scores = [ranked.scores[epochs] for epochs in short] + [ranked.scores[full]]
        if ranked.again is not None:
            scores.insert(-1, ranked.again)
        numbers += [f"{score:.3f}" for score in scores]
        lines.append(f"| {ranked.shape.name} | {' | '.join(numbers)} |")
    taus = ["-" if tau is None else f"{tau:+.2f}" for tau in result.taus().values()]
    lines.append(f"| **Kendall's tau with {counted(full, 'epoch')}** | {' | '.join(taus)} | |")
    n = len(result.ranked)
    if n >= 2:
        bound = 1.96 * spread_without_relation(n)
        random = f"If the order of {n} shapes were random, |tau| would stay below {bound:.2f} in about 95 % of cases."
        lines += ["", random]
    again = [ranked.again - ranked.scores[full] for ranked in result.ranked if ranked.again is not None]
    if n >= 2 and len(again) == n:
        of_seeds = math.sqrt(np.square(again).mean() / 2)  # pooled: the variance of two values is half of d^2
        means = np.array([ranked.mean_of_seeds(full) for ranked in result.ranked])
        lines[-1] += (
            f" The {metric} of a shape has a standard deviation of {of_seeds:.3f} over its seeds; the means of both "
            f"seeds: {mean_and_spread(means)} over the shapes."
        )
    return lines


def order_lines(results: dict[Teaching, Results], file: SearchFile) -> list[str]:
    """How well the orders of the same shapes under both teachings agree, and which teaching scores more."""
    (first, a), (second, b) = results.items()
    others = {ranked.shape: ranked for ranked in b.ranked}
    pairs = [(ranked, others[ranked.shape]) for ranked in a.ranked if ranked.shape in others]
    in_full = np.array([[ranked.scores[file.epochs] for ranked in pair] for pair in pairs]).reshape(-1, 2)
    tau = kendall_tau(*in_full.T)
    gain = np.array([y.mean_of_seeds(file.epochs) - x.mean_of_seeds(file.epochs) for x, y in pairs])
    return [
        f"Kendall's tau of {first} with {second}, over the same {len(pairs)} shapes in full: "
        f"{'-' if tau is None else f'{tau:+.2f}'}. {second} - {first}, paired by shape: {file.decide.metric} "
        f"{gain.mean():+.3f}, {100 * file.decide.level:g} % interval {interval_cell(file.decide.interval(gain))}."
    ]


def as_json(
    file: SearchFile, space: Space, results: dict[Teaching, Results], origin: str, environment: dict[str, Any]
) -> str:
    """Every number of the tables."""
    tree = {
        "config": to_tree(file),
        "rule": {"origin": origin, **to_tree(file.decide)},
        "flops": [space.low, space.high],
        "rungs": rung_sizes(file),
        "environment": environment,
        "results": {teaching: result_tree(file, space, result) for teaching, result in results.items()},
    }
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def result_tree(file: SearchFile, space: Space, result: Results) -> dict[str, Any]:
    shape, score = result.best()
    return {
        "found": {
            method: [{"minutes": f.minutes, "rungs": [scored_tree(rung) for rung in f.rungs]} for f in searches]
            for method, searches in result.found.items()
        },
        "differences": [
            {
                "method": name,
                "against": against,
                "values": to_json_value(values),
                "interval": file.decide.interval(values),
                "verdict": file.decide.verdict(values),
            }
            for name, against, values in differences(result)
        ],
        "ranked": [
            {
                "shape": r.shape.name,
                "scores": {str(e): s for e, s in r.scores.items()},
                "another_seed": r.again,
                "proxies": r.proxies,
            }
            for r in result.ranked
        ],
        "tau": result.taus(),
        "best": {"shape": shape.name, "score": score, "flops": space.flops(shape)},
        "failures": result.failures,
    }


def scored_tree(rung: Sequence[tuple[Shape, float]]) -> list[dict[str, Any]]:
    return [{"shape": shape.name, "score": score} for shape, score in rung]
