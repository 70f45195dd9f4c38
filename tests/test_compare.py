"""compare.py: what it trains, what it reuses, what it refuses, and the arithmetic of its table."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import compare
import run_folder
from config import to_tree
from errors import UserError
from tests.tiny_training import tiny_config, write_dataset
from yaml_files import dump_yaml

TEACHER = {"name": "big", "arch": "yolov5nu", "epochs": 3, "optimizer": {"learning_rate": 0.005}}
TERM = {"teacher": "big", "loss": "mse", "weight": 1.0, "student_maps": ["p3"], "adapter": "conv1x1"}


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "data", tmp_path / "runs", name="study", teachers=[TEACHER], terms=[TERM], seed=5)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for train.run: notes the configs, and writes the report of a run that scored by its name and seed."""
    configs = []

    def run(config, *, resume=False, **_):
        configs.append(dataclasses.replace(config, name=config.name + (" resumed" if resume else "")))
        folder = run_folder.RunFolder(Path(config.runs) / config.name)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.config.write_text(dump_yaml(to_tree(config)))
        base = {"baseline": 0.5, "teacher": 0.7, "distilled": 0.6, "longer": 0.55}[config.name.split("_")[0]]
        score = base + 0.01 * (config.seed - 5) ** 2
        test = {"mAP50": score + 0.2, "mAP50-95": score, "precision": 0.8, "recall": 0.7, "f1": 0.75}
        report = {"test": test, "seconds": 60.0, "parameters": 3_000_000}
        folder.report.write_text(json.dumps(report))
        return report

    monkeypatch.setattr(compare.train, "run", run)
    monkeypatch.setattr(compare.comparison_plot, "write", lambda path, *_: path)
    return configs


def test_one_protocol_for_every_row(config, trained):
    compare.compare(config, seeds=2)
    names = [c.name for c in trained]
    assert names == [
        "baseline_seed5", "baseline_seed6", "teacher_big_seed5", "distilled_seed5", "distilled_seed6",
        "longer_seed5", "longer_seed6",
    ]  # fmt: skip
    by_name = dict(zip(names, trained))
    assert by_name["longer_seed5"].epochs == config.epochs + 3
    teacher = by_name["teacher_big_seed5"]
    assert (teacher.student.arch, teacher.epochs, teacher.optimizer.learning_rate) == ("yolov5nu", 3, 0.005)
    assert not teacher.teachers and not teacher.terms
    weights = by_name["distilled_seed6"].teachers[0].weights
    assert weights == str(Path(teacher.runs) / "teacher_big_seed5" / "weights" / "last.pt")

    def protocol(run):
        """Everything that must not differ between baseline and distilled."""
        tree = to_tree(run)
        return {key: tree[key] for key in tree if key not in ("name", "seed", "teachers", "terms")}

    assert protocol(by_name["baseline_seed5"]) == protocol(by_name["distilled_seed6"])


def test_a_teacher_with_weights_is_not_trained(config, trained):
    teacher = dataclasses.replace(config.teachers[0], weights="teacher.pt")
    rows = compare.compare(dataclasses.replace(config, teachers=(teacher,)), seeds=1)
    assert [row.name for row in rows] == ["baseline", "distilled"]


def test_finished_runs_are_not_repeated_and_interrupted_ones_go_on(config, trained):
    compare.compare(config, seeds=1)
    folder = Path(config.runs) / "study" / "distilled_seed5"
    (folder / "report.json").unlink()
    (folder / "weights").mkdir()
    (folder / "weights" / "last.pt").write_bytes(b"")
    stale = Path(config.runs) / "study" / "longer_seed5"
    (stale / "report.json").unlink()
    trained.clear()
    compare.compare(config, seeds=1)
    assert [c.name for c in trained] == ["distilled_seed5 resumed", "longer_seed5"]


def test_runs_of_another_config_are_refused(config, trained):
    compare.compare(config, seeds=1)
    with pytest.raises(UserError, match=r"baseline_seed5.config.yaml: key 'optimizer.momentum' differs"):
        compare.compare(
            dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, momentum=0.5)), seeds=1
        )


def test_nothing_to_compare_is_refused(config, trained):
    with pytest.raises(UserError, match="'teachers' and 'terms'"):
        compare.compare(dataclasses.replace(config, terms=()), seeds=1)
    with pytest.raises(UserError, match="--seeds: found 0"):
        compare.main(["missing.yaml", "--seeds", "0"])
    assert not trained


def test_the_table_holds_means_spreads_and_the_paired_difference(config, trained, capsys):
    rows = compare.compare(config, seeds=3)
    # Scores of seeds 5, 6, 7 are base + 0, 0.01, 0.04: mean + 0.0167, sample standard deviation 0.0208.
    assert rows[0].values("mAP") == pytest.approx([0.5, 0.51, 0.54])
    text = (Path(config.runs) / "study" / "comparison.md").read_text()
    assert "| baseline | yolov8n | 3.00 M | 2 | 3 | 0.717 ± 0.021 | 0.517 ± 0.021 | 0.800 ± 0.000 |" in text
    assert "| teacher_big | yolov5nu | 3.00 M | 3 | 1 | 0.900 | 0.700 |" in text
    assert "distilled - baseline: mAP +0.100 ± 0.000 (paired by seed, 3 seeds)" in text
    assert "distilled - longer: mAP +0.050" in text
    assert text in capsys.readouterr().out
    numbers = json.loads((Path(config.runs) / "study" / "comparison.json").read_text())
    assert numbers["rows"][2]["mAP"] == pytest.approx([0.6, 0.61, 0.64])


def test_mean_and_spread():
    assert compare.mean_and_spread(np.array([0.25])) == "0.250"
    assert compare.mean_and_spread(np.array([0.2, 0.4])) == "0.300 ± 0.141"


def test_first_difference():
    assert compare.first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a.1.b"
    assert compare.first_difference({"a": 1}, {"a": 1, "c": 2}) == "c"
    assert compare.first_difference({"a": [1]}, {"a": [1, 2]}) == "a"
    assert compare.first_difference({"a": [1, 2]}, {"a": [1, 2]}) is None


@pytest.mark.slow
def test_end_to_end(config, tmp_path, capsys):
    """The real thing, tiny: four runs, a table and a picture; given again, nothing is trained twice."""
    write_dataset(tmp_path / "data", train=8, test=4)
    config = dataclasses.replace(config, epochs=1, teachers=(dataclasses.replace(config.teachers[0], epochs=1),))
    rows = compare.compare(config, seeds=1)
    assert [row.name for row in rows] == ["baseline", "teacher_big", "distilled", "longer"]
    assert (tmp_path / "runs" / "study" / "comparison.png").stat().st_size > 10_000
    again = compare.compare(config, seeds=1)
    assert capsys.readouterr().out.count("finished before") == 4
    for row, other in zip(rows, again):
        assert row.reports[0]["test"] == other.reports[0]["test"]
