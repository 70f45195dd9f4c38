"""Rows of a study that train on condensed sets: what is planned, what is refused, and what the table says of them."""

import json
import shutil
from pathlib import Path

import pytest

import compare
import condense
from config import to_tree
from datasets.open import open_dataset
from engine.comparison.condensed_table import condensed_markdown, condensed_tree
from engine.comparison.study import build_study, load_study
from engine.comparison.table import Result
from engine.comparison.work import list_work, with_needs
from errors import UserError
from tests.tiny_training import tiny_config, write_dataset
from yaml_files import dump_yaml

ROWS = {
    "full": None,
    "random_2": {"condense": {"method": "random", "pictures": 2}, "seeds": 2},
    "herding_2": {"condense": {"method": "herding", "pictures": 2}},
    "mosaic_2": {"condense": {"method": "mosaic", "formation": [2, 2], "pictures": 2}, "decoded": True},
}
SHARED = {"network": {"row": "full"}}


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "data", tmp_path / "runs", name="study", seed=5, data={"pictures_per_epoch": 12})


def make(config, rows=ROWS, shared=SHARED, *, seeds=1):
    return build_study(config, rows, seeds=seeds, source="study.yaml", condense=shared)


def by_name(study):
    return {row.name: row for row in study.rows}


def test_a_row_trains_on_its_set_and_tests_on_the_shared_one(config, tmp_path):
    rows = by_name(make(config))
    assert rows["full"].task is None and rows["full"].run(5).data == config.data
    data = rows["random_2"].run(6).data
    assert Path(data.train_root).parent == tmp_path / "runs" / "study" / "sets"
    assert Path(data.train_root).name.startswith("random_2_seed6_")
    assert (data.train_format, data.train, data.pictures_per_epoch) == ("yolo", "train", 12)
    assert (data.format, data.root, data.test) == (config.data.format, config.data.root, config.data.test)
    assert rows["mosaic_2"].run(5).data.train == "train_decoded"
    assert rows["random_2"].seeds == (5, 6) and rows["herding_2"].against == rows["mosaic_2"].against == ("random_2",)
    assert rows["random_2"].against == ("full",)


def test_max_samples_is_of_the_real_pictures(tmp_path):
    config = tiny_config(tmp_path / "data", tmp_path / "runs", name="study", data={"max_samples": 9})
    rows = by_name(make(config))
    assert rows["full"].config.data.max_samples == rows["random_2"].task.data.max_samples == 9
    assert rows["random_2"].config.data.max_samples == 0


def test_a_set_is_named_by_what_it_follows_from_and_by_nothing_else(config):
    def folder(section, seed=5, **row):
        rows = {"full": None, "x": {"condense": {"pictures": 2} | section, **row}}
        return by_name(make(config, rows))["x"].set_folder(seed)

    random = folder({"method": "random"})
    assert folder({"method": "random"}, epochs=9, student={"arch": "yolov5n"}) == random
    assert folder({"method": "random", "crops": 4, "matching": {"steps": 7}}) == random  # of no use to this method
    assert folder({"method": "random"}, seed=6) != random
    assert folder({"method": "random", "seed": 3}) == folder({"method": "random", "seed": 3}, seed=6)
    assert folder({"method": "herding"}) == folder({"method": "herding"}, seed=6)  # draws nothing
    assert folder({"method": "random"}, image_size=32) != random
    mosaic = {"method": "mosaic", "formation": [2, 1], "layouts": "most_objects"}
    assert folder(mosaic) == folder(mosaic, seed=6) != folder(mosaic | {"layouts": "uniform"})
    learnt = folder({"method": "gradient_matching"})
    assert folder({"method": "gradient_matching", "layouts": "most_objects"}, seed=6) != folder(
        {"method": "gradient_matching", "layouts": "most_objects"}
    )  # draws more than its pictures
    assert folder({"method": "gradient_matching"}, student={"arch": "yolov5n"}) == learnt  # made for the shared student
    for changed in ({"matching": {"steps": 7}}, {"arch": "yolov5n"}, {"init": "noise"}, {"layouts": "uniform"}):
        assert folder({"method": "gradient_matching"} | changed) != learnt


def test_a_network_is_the_first_run_of_a_row_above(config, tmp_path):
    study = make(config, seeds=2)
    herding = by_name(study)["herding_2"]
    last = str(tmp_path / "runs" / "study" / "full_seed5" / "weights" / "last.pt")
    assert herding.task.condense.network.weights == last and herding.network_row == "full"
    assert by_name(study)["random_2"].network_row is None
    assert [row.name for row in study.with_teachers(["herding_2"])] == ["full", "herding_2"]
    assert [row.name for row in study.with_teachers(["random_2"])] == ["random_2"]


def test_sets_and_networks_come_before_what_needs_them(config):
    works = list_work(make(config, seeds=2).rows)
    names = [work.name for work in works]
    assert names[0] == "full_seed5" and names[1].startswith("sets/random_2_seed5_") and names[2] == "random_2_seed5"
    by_name, done = dict(zip(names, works)), set()
    for name in names:
        assert done.issuperset(by_name[name].needs)
        done.add(name)
    herding = next(name for name in names if name.startswith("sets/herding"))
    assert names.count(herding) == 1, "one set for both seeds"
    assert by_name[herding].needs == ("full_seed5",) and by_name["herding_2_seed6"].needs == (herding,)
    needed = [work.name for work in with_needs(works, ["herding_2_seed6"])]
    assert needed == ["full_seed5", herding, "herding_2_seed6"]


@pytest.mark.parametrize(
    ("row", "shared", "message"),
    [
        ({"condense": {"pictures": 2}}, {}, r"row 'x': key 'condense.method' is missing"),
        ({"condense": {"method": "herding", "pictures": 2}}, {}, r"row 'x': key 'condense.network': herding needs"),
        ({"condense": {"method": "random", "pictures": 2}}, {"network": {"row": "x"}}, r"found 'x', expected a row of"),
        (
            {"condense": {"method": "random", "pictures": 2, "network": {"weights": "a.pt"}}},
            {"network": {"row": "full"}},
            r"row 'x': key 'condense.network': found a row and weights",
        ),
        (
            {"condense": {"method": "random", "pictures": 2}, "data": {"train_root": "there"}},
            {},
            r"row 'x': key 'data.train_root': found beside 'condense'",
        ),
        ({"condense": {"method": "random", "pictures": 2}, "decoded": True}, {}, r"row 'x': key 'decoded': found true"),
        ({"condense": {"method": "random", "pictures": "two"}}, {}, r"key 'condense.pictures': found 'two'"),
    ],
)
def test_what_a_row_cannot_ask(row, shared, message, config):
    with pytest.raises(UserError, match=message):
        make(config, {"full": None, "x": row}, shared)


def test_too_few_pictures_and_missing_weights_are_found_before_anything_is_trained(config, tmp_path):
    write_dataset(tmp_path / "data", train=3, test=2)
    with pytest.raises(UserError, match=r"row 'mosaic_2': key 'condense.pictures': found 2, 2 x 2 .* has: 3"):
        compare.compare(make(config))
    rows = {"full": None, "x": {"condense": {"method": "herding", "pictures": 2}}}
    with pytest.raises(UserError, match=r"row 'x': key 'condense.network.weights': gone.pt: no such file"):
        compare.compare(make(config, rows, {"network": {"weights": "gone.pt"}}))
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- the table


def result(row, scores, *, seconds=None):
    reports = {}
    for seed, score in zip(row.seeds, scores, strict=True):
        test = {"mAP50": score + 0.2, "mAP50-95": score, "precision": 0.8, "recall": 0.7, "f1": 0.75}
        reports[seed] = {"test": test, "seconds": 60.0, "steps": 40, "parameters": 3_000_000}
        if row.task is not None and seconds is not None:
            folder = row.set_folder(seed)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text(json.dumps({"seconds": seconds, "peak_gigabytes": 1.5}))
    return Result(row, reports)


def test_fraction_of_full_and_share_of_the_gap(config):
    rows = by_name(make(config))
    scores = {"full": [0.4], "random_2": [0.19, 0.21], "herding_2": [0.3], "mosaic_2": [0.1]}
    results = {name: result(row, scores[name], seconds=7.0) for name, row in rows.items()}
    found = {row["name"]: row for row in condensed_tree(results)}
    assert list(found) == ["random_2", "herding_2", "mosaic_2"]
    assert found["herding_2"]["of_full"] == pytest.approx(0.75) and found["herding_2"]["gap_closed"] == pytest.approx(
        0.5
    )
    assert found["mosaic_2"]["gap_closed"] == pytest.approx(-0.5) and found["mosaic_2"]["formation"] == [2, 2]
    assert found["random_2"]["gap_closed"] == pytest.approx(0) and found["random_2"]["of_full"] == pytest.approx(0.5)
    assert found["random_2"]["seconds"] == 7 and found["random_2"]["peak_gigabytes"] == 1.5
    assert len(found["random_2"]["sets"]) == 2 and found["herding_2"]["steps"] == 40
    text = condensed_markdown(results)
    row = (
        "| herding_2 | herding | 2 | none | 1 | 40 | 0.500 | 0.300 | 0.800 | 0.700 | 0.750 | 0.750 | +0.50 | 7 | 1.50 |"
    )
    assert row in text and text.count("\n|") == 5 + 6
    phases = text.split("| phase |")[1].splitlines()
    assert phases[0] == " dataset | mAP50 | precision | recall | F1 |" and len(phases) == 6
    assert phases[2] == "| baseline | all of train | 0.600 | 0.800 | 0.700 | 0.750 |"
    assert "| condensed | 2 pictures: herding | 0.500 | 0.800 | 0.700 | 0.750 |" in phases
    json.dumps(condensed_tree(results), allow_nan=False)


def test_no_share_of_a_gap_that_is_not_there(config):
    rows = by_name(make(config))
    for scores in ([0.1, 0.3], [0.25, 0.26]):  # draws that differ by as much as the gap; random above full
        results = {
            "full": result(rows["full"], [0.24]),
            "random_2": result(rows["random_2"], scores),
            "herding_2": result(rows["herding_2"], [0.3]),
        }
        assert condensed_tree(results)[1]["gap_closed"] is None
        assert "| 1.250 | - | - | - |" in condensed_markdown(results)
    assert condensed_markdown({"full": results["full"]}) == ""
    results["full"].reports.clear()
    assert condensed_tree(results)[1]["of_full"] is None


def test_rows_are_measured_by_rows_of_the_same_student_length_and_terms(config):
    teacher = {"name": "big", "arch": "yolov5nu", "epochs": 3}
    term = {"teacher": "big", "loss": "mse", "weight": 1.0, "student_maps": ["p3"], "adapter": "conv1x1"}
    data = {"pictures_per_epoch": 12}
    config = tiny_config(config.data.root, config.runs, name="study", teachers=[teacher], data=data)
    random = {"condense": {"method": "random", "pictures": 2}}
    best = {"condense": {"method": "most_objects", "pictures": 2}}
    long = {"epochs": 7}
    rows = {
        "full": None, "full_long": long, "random": random, "random_long": random | long, "random_kd": random,
        "best": best, "best_long": best | long, "best_kd": best, "best_other": best | {"student": {"arch": "yolov5n"}},
    }  # fmt: skip
    rows["random_kd"] = random | {"terms": [term]}
    rows["best_kd"] = best | {"terms": [term]}
    planned = by_name(make(config, rows, {}))
    scores = {"full": 0.4, "full_long": 0.5, "random": 0.2, "random_long": 0.3, "random_kd": 0.1}
    results = {name: result(row, [scores.get(name, 0.35)]) for name, row in planned.items()}
    found = {row["name"]: row for row in condensed_tree(results)}
    assert found["best"]["gap_closed"] == pytest.approx(0.75) and found["best"]["of_full"] == pytest.approx(0.875)
    assert found["best_long"]["gap_closed"] == pytest.approx(0.25) and found["best_long"]["of_full"] == pytest.approx(
        0.7
    )
    assert found["best_kd"]["gap_closed"] == pytest.approx(0.25 / 0.3) and found["best_kd"]["terms"] == ["mse"]
    assert found["best_kd"]["of_full"] == pytest.approx(0.875)
    assert found["best_other"]["gap_closed"] is None and found["best_other"]["of_full"] is None


@pytest.mark.slow
def test_end_to_end(config, tmp_path, capsys, monkeypatch, one_thread):
    """One command: the network, the sets, a row on each, a table; given again, nothing is made twice."""
    monkeypatch.setattr(compare.plot, "write", lambda path, *_, **__: path)
    write_dataset(tmp_path / "data", train=12, test=4)
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(to_tree(config) | {"rows": ROWS, "condense": SHARED, "epochs": 1}))
    study = load_study(path)
    results = {result.name: result for result in compare.compare(study)}
    assert {name: found.reports[5]["steps"] for name, found in results.items()} == dict.fromkeys(ROWS, 2)
    sets = sorted(p.name[:-9] for p in (study.folder / "sets").glob("[!.]*"))  # beside .claims
    assert sets == ["herding_2", "mosaic_2_seed5", "random_2_seed5", "random_2_seed6"]
    assert len(open_dataset("yolo", by_name(study)["mosaic_2"].set_folder(5), "train_decoded")) == 8
    assert json.loads((study.folder / "comparison.json").read_text())["condensed"][0]["seconds"] > 0
    assert "| herding_2 | herding | 2 | none | 1 | 2 |" in (study.folder / "comparison.md").read_text()
    capsys.readouterr()
    shutil.rmtree(study.folder / "random_2_seed6")
    manifest = by_name(study)["random_2"].set_folder(6) / "manifest.json"
    made = manifest.stat().st_mtime_ns
    compare.compare(study)
    assert capsys.readouterr().out.count("finished before") == 4 and manifest.stat().st_mtime_ns == made
    condense.main([str(path), "--row", "random_2", "--seed", "6"])
    assert f"made before: {manifest.parent}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--row: found 'full', expected random_2, herding_2, mosaic_2"):
        condense.main([str(path), "--row", "full"])
    with pytest.raises(UserError, match=r"condense.method' is missing, expected condense.method=NAME, or --row"):
        condense.main([str(path)])
