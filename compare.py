"""What did distillation buy? The same student with and without it, under one protocol, over several seeds.

    python compare.py configs/demo.yaml --seeds 3 [key=value ...]

trains, on the same data, schedule and evaluator:

    baseline    the student alone
    teacher     each teacher of the config that has no weights, alone (once, with the config's seed)
    distilled   the student with the config's distillation terms
    longer      the student alone, for as many epochs as baseline and teachers together: what the time spent on the
                teacher would have bought without it (absent where every teacher came with weights)

and writes comparison.md, comparison.json and comparison.png to <runs>/<name>/. Numbers are those of the last EMA
weights on the test split; no epoch is selected on it. A run that is already there with the same config is not
repeated, and one that was interrupted goes on, so the command can be stopped and given again.
"""

import argparse
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import comparison_plot
import run_folder
import train
from config import Config, TeacherConfig, from_tree, load_config, to_tree
from errors import UserError, run_script
from yaml_files import read_yaml

METRICS = {"mAP50": "mAP50", "mAP": "mAP50-95", "precision": "precision", "recall": "recall", "F1": "f1"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a model trained with one or more seeds, and the reports of its runs."""

    name: str
    arch: str
    epochs: int
    folders: tuple[Path, ...]
    reports: tuple[dict, ...]

    def values(self, metric: str) -> np.ndarray:
        """(seeds,) of one of METRICS, on the test split, of the last EMA weights."""
        return np.array([report["test"][METRICS[metric]] for report in self.reports], dtype=np.float64)

    def seconds(self) -> float:
        return float(np.mean([report["seconds"] for report in self.reports]))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="compare.py", description="Baseline, teacher and distilled student compared.")
    parser.add_argument("config", help="a YAML file with a student, at least one teacher, and terms")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the config")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each student: seed, seed + 1, ... (default 1)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.seeds < 1:
        raise UserError(f"argument --seeds: found {arguments.seeds}, expected at least 1")
    compare(load_config(arguments.config, arguments.overrides), seeds=arguments.seeds)


def compare(config: Config, *, seeds: int) -> list[Row]:
    """Train what is missing, then write and print the comparison. Returns its rows, in the order of the table."""
    if not config.teachers or not config.terms:
        raise UserError("keys 'teachers' and 'terms': found none, expected a teacher and a term to compare")
    comparison_plot.require_plots()
    folder = Path(config.runs) / config.name
    student = dataclasses.replace(config, runs=str(folder))
    alone = dataclasses.replace(student, teachers=(), terms=())
    every_seed = range(config.seed, config.seed + seeds)

    baseline = train_row("baseline", alone, every_seed)
    taught, teacher_rows, teacher_epochs = [], [], 0
    for teacher in config.teachers:
        if teacher.weights is None:
            row = train_row(f"teacher_{teacher.name}", teacher_config(alone, teacher), [config.seed])
            teacher_rows.append(row)
            teacher_epochs += row.epochs
            teacher = dataclasses.replace(teacher, weights=str(row.folders[0] / "weights" / "last.pt"))
        taught.append(teacher)
    distilled = train_row("distilled", dataclasses.replace(student, teachers=tuple(taught)), every_seed)
    rows = [baseline, *teacher_rows, distilled]
    if teacher_epochs:
        longer = dataclasses.replace(alone, epochs=config.epochs + teacher_epochs)
        rows.append(train_row("longer", longer, every_seed))

    text = markdown(config, rows)
    run_folder.write_text(folder / "comparison.md", text)
    run_folder.write_text(folder / "comparison.json", json.dumps(as_json(config, rows), indent=2) + "\n")
    picture = comparison_plot.write(folder / "comparison.png", config, rows)
    print(text)
    print(f"written: {folder / 'comparison.md'}, {folder / 'comparison.json'}, {picture}")
    return rows


def teacher_config(alone: Config, teacher: TeacherConfig) -> Config:
    """The run that trains a teacher in place: the student's protocol with the teacher's model, epochs and rates."""
    tree = to_tree(alone)
    tree["student"] = {"arch": teacher.arch}
    tree["optimizer"].update(teacher.optimizer)
    tree["epochs"] = alone.epochs if teacher.epochs is None else teacher.epochs
    return from_tree(Config, tree, source=f"teacher {teacher.name!r}")


def train_row(name: str, config: Config, seeds: range | list[int]) -> Row:
    """One run per seed, each in <runs>/<name>_seed<seed>."""
    folders, reports = [], []
    for seed in seeds:
        run = dataclasses.replace(config, name=f"{name}_seed{seed}", seed=seed)
        print(f"== {run.name}: {run.student.arch}, {run.epochs} epochs", flush=True)
        reports.append(train_or_reuse(run))
        folders.append(Path(run.runs) / run.name)
    return Row(name, config.student.arch, config.epochs, tuple(folders), tuple(reports))


def train_or_reuse(config: Config) -> dict:
    """The report of a run: read where it is finished, resumed where it was interrupted, trained where it is new.

    UserError where the folder holds a run of another config: its numbers do not belong in this table.
    """
    path = Path(config.runs) / config.name
    folder = run_folder.RunFolder(path)
    if folder.config.is_file():
        there = from_tree(Config, read_yaml(folder.config), source=str(folder.config))
        key = first_difference(to_tree(there), to_tree(config))
        if key:
            raise UserError(
                f"{folder.config}: key {key!r} differs from this comparison; give another name=, or remove {path}"
            )
    if folder.report.is_file():
        print(f"   finished before: {folder.report}")
        return json.loads(folder.report.read_text(encoding="utf-8"))
    if folder.last.is_file():
        return train.run(config, resume=True)
    if path.exists():
        shutil.rmtree(path)  # stopped before its first checkpoint: nothing to go on from
    return train.run(config)


def first_difference(a: dict | list | object, b: dict | list | object, key: str = "") -> str | None:
    """The dotted key at which two trees of plain values differ first; None where they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            inner = f"{key}.{name}" if key else str(name)
            if (name in a) != (name in b):
                return inner
            if found := first_difference(a[name], b[name], inner):
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b)):
            if found := first_difference(x, y, f"{key}.{index}"):
                return found
        return None
    return None if a == b else key


def mean_and_spread(values: np.ndarray) -> str:
    """`0.612 ± 0.004`: the mean and the sample standard deviation; the mean alone for one seed."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def markdown(config: Config, rows: list[Row]) -> str:
    """The table, and below it what the difference between distilled and baseline is worth."""
    lines = [
        f"# {config.name}",
        "",
        f"{config.data.format} data, train `{config.data.train}`, test `{config.data.test}`, {config.image_size} px, "
        f"batch {config.batch_size}. Last EMA weights, COCO protocol; mean ± standard deviation over seeds.",
        "",
        "| row | model | parameters | epochs | seeds | " + " | ".join(METRICS) + " | minutes |",
        "|---|---|---:|---:|---:|" + "---:|" * (len(METRICS) + 1),
    ]
    for row in rows:
        cells = [mean_and_spread(row.values(metric)) for metric in METRICS]
        size = f"{row.reports[0]['parameters'] / 1e6:.2f} M"
        lines.append(
            f"| {row.name} | {row.arch} | {size} | {row.epochs} | {len(row.reports)} | "
            + " | ".join(cells)
            + f" | {row.seconds() / 60:.1f} |"
        )
    by_name = {row.name: row for row in rows}
    lines += ["", verdict(by_name["distilled"], by_name["baseline"])]
    if "longer" in by_name:
        lines.append(verdict(by_name["distilled"], by_name["longer"]))
    return "\n".join(lines) + "\n"


def verdict(row: Row, against: Row) -> str:
    """The paired difference in mAP, seed by seed, in one sentence."""
    difference = row.values("mAP") - against.values("mAP")
    text = f"{row.name} - {against.name}: mAP {difference.mean():+.3f}"
    if len(difference) == 1:
        return text + " (one seed: the spread is unknown)"
    return text + f" ± {difference.std(ddof=1):.3f} (paired by seed, {len(difference)} seeds)"


def as_json(config: Config, rows: list[Row]) -> dict:
    return {
        "config": to_tree(config),
        "rows": [
            {
                "name": row.name,
                "arch": row.arch,
                "epochs": row.epochs,
                "runs": [str(folder) for folder in row.folders],
                **{metric: row.values(metric).tolist() for metric in METRICS},
                "seconds": [report["seconds"] for report in row.reports],
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    run_script(main)
