"""Rows are compared where they train alike; what differs is refused by its name."""

import pytest

from engine.comparison.condensed_table import condensed_markdown, condensed_tree, full_row
from engine.comparison.rows import describe_pair, differing_keys, find_random_row
from engine.comparison.study import build_study
from engine.comparison.table import Result, as_json, markdown
from errors import UserError
from tests.tiny_training import tiny_config

CHANGES = {  # key that is named -> what a row changes
    "optimizer.name": {"optimizer": {"name": "adamw"}},
    "optimizer.learning_rate": {"optimizer": {"learning_rate": 1e-5}},
    "optimizer.accumulate": {"optimizer": {"accumulate": 2}},
    "optimizer.sum_over_batch": {"optimizer": {"sum_over_batch": False}},
    "batch_size": {"batch_size": 2},
    "epochs": {"epochs": 5},
    "image_size": {"image_size": 96},
    "augment.mosaic": {"augment": {"mosaic": 0.0}},
    "detection_weight": {"detection_weight": 0.5},
    "precision": {"precision": "bfloat16"},
    "student.weights": {"student": {"weights": "coco.pt"}},
    "student.frozen_norms": {"student": {"frozen_norms": True}},
    "data.pictures_per_epoch": {"data": {"pictures_per_epoch": 24}},
    "data.holdout_fraction": {"data": {"holdout_fraction": 0.25}},
    "patience": {"patience": 3},
    "evaluation.iou_threshold": {"evaluation": {"iou_threshold": 0.5}},
    "evaluation.ignore_difficult": {"evaluation": {"ignore_difficult": False}},
}
FREE = [
    {"data": {"train": "other"}},
    {"data": {"workers": 2, "cache": False}},
    {"data": {"per_class": 5, "draw_seed": 1, "unlabelled": {"rest": True, "labelled_share": 0.25}}},
    {"evaluation": {"every_epochs": 3}},
    {"save_every_steps": 5},
    {"evaluation": {"iou_threshold": 0.7}},  # what the family has anyway
]
RANDOM = {"condense": {"method": "random", "pictures": 2}}
BEST = {"condense": {"method": "most_objects", "pictures": 2}}


@pytest.fixture
def make(tmp_path):
    def make(rows, per_epoch=12):
        config = tiny_config(tmp_path / "data", tmp_path / "runs", name="study", data={"pictures_per_epoch": per_epoch})
        return build_study(config, rows, seeds=1, source="study.yaml")

    return make


def by_name(study):
    return {row.name: row for row in study.rows}


@pytest.mark.parametrize("key", CHANGES)
def test_a_row_that_trains_otherwise_is_refused_by_name(make, key):
    rows = {"full": None, "changed": CHANGES[key] | {"against": ["full"]}}
    with pytest.raises(UserError, match=rf"row 'changed': key 'against': 'full' trains differently: {key}\b"):
        make(rows)
    for differs in (key, key.split(".")[0]):
        study = make({**rows, "changed": rows["changed"] | {"differs": [differs]}})
        full, changed = study.rows
        assert changed.against == ("full",) and changed.notes == ()
        assert describe_pair(changed, full).startswith(f"changed and full differ in {key}")
    with pytest.raises(UserError, match="trains differently"):
        make({**rows, "changed": rows["changed"] | {"differs": ["seed", "weight_decay"]}})


@pytest.mark.parametrize("key", CHANGES)
def test_without_against_it_is_compared_to_none_and_the_table_says_why(make, key):
    study = make({"full": None, "changed": CHANGES[key]})
    row = by_name(study)["changed"]
    if key.startswith("student"):  # a student of its own is its own baseline
        assert row.baseline == "changed" and row.against == row.notes == ()
        return
    assert row.against == () and key in row.notes[0] and "compared to no row: full" in row.notes[0]
    results = {name: Result(row) for name, row in by_name(study).items()}
    assert row.notes[0] in markdown(study, results) and row.notes[0] in as_json(study, results)


@pytest.mark.parametrize("change", FREE)
def test_what_no_number_depends_on_and_the_pictures_are_free(make, change):
    study = make({"full": None, "changed": change | {"against": ["full"]}})
    full, changed = study.rows
    assert changed.against == ("full",) and describe_pair(changed, full) is None


@pytest.mark.parametrize("key", [key for key in CHANGES if key != "image_size"])  # another size is another set
def test_shares_of_the_gap_need_rows_that_train_alike(make, key):
    rows = {"full": None, "random": RANDOM, "best": BEST}
    planned = by_name(make(rows))
    results = {name: Result(row) for name, row in planned.items()}
    assert find_random_row(planned["best"], planned) == "random" and full_row(results["best"], results).name == "full"
    for changed in ("random", "full"):
        planned = by_name(make({**rows, changed: (rows[changed] or {}) | CHANGES[key]}))
        results = {
            name: Result(
                row, {0: {"test": dict.fromkeys(("mAP50", "mAP50-95", "precision", "recall", "f1"), score), "steps": 4}}
            )
            for score, (name, row) in zip((0.4, 0.2, 0.3), planned.items())
        }
        found = {row["name"]: row for row in condensed_tree(results)}["best"]
        assert found["gap_closed"] is None and (found["of_full"] is None) == (changed == "full")
        if not key.startswith("student") or changed == "random":
            assert any(f"is not measured by {changed}" in line and key in line for line in found["refused"])
            assert f"best is not measured by {changed}, which trains differently: {key}" in condensed_markdown(results)


def test_passes_over_sets_of_other_sizes_are_other_numbers_of_steps(make):
    rows = {
        "full": None,
        "random": RANDOM,
        "best": BEST,
        "tiles": {"condense": {"method": "mosaic", "pictures": 2, "formation": [2, 2]}},
    }
    rows["decoded"] = rows["tiles"] | {"decoded": True}
    planned = by_name(make(rows, per_epoch=0))
    results = {name: Result(row) for name, row in planned.items()}
    assert full_row(results["best"], results) is None and find_random_row(planned["best"], planned) == "random"
    assert (
        find_random_row(planned["tiles"], planned) == "random" and find_random_row(planned["decoded"], planned) is None
    )
    assert differing_keys(planned["full"], planned["best"]) == ["data.pictures_per_epoch"]


def test_full_is_all_the_pictures_the_set_was_made_of(make):
    planned = by_name(make({"part": {"data": {"max_samples": 9}}, "full": None, "best": BEST}))
    results = {name: Result(row) for name, row in planned.items()}
    assert full_row(results["best"], results).name == "full"
    del results["full"]
    assert full_row(results["best"], results) is None


@pytest.mark.parametrize("data", [{"per_class": 1}, {"draw_seed": 1}, {"unlabelled": {"rest": True}}])
def test_rows_on_fewer_labels_or_more_pictures_measure_no_set(make, data):
    """A row of a few labels is not full, and pictures without labels in one of two rows are no matter of the set."""
    planned = by_name(make({"few": {"data": data}, "full": None, "random": RANDOM, "best": BEST}))
    results = {name: Result(row) for name, row in planned.items()}
    assert full_row(results["best"], results).name == "full"
    del results["full"]
    assert full_row(results["best"], results) is None
    if "unlabelled" in data:
        planned = by_name(make({"full": None, "random": RANDOM | {"data": data}, "best": BEST}))
        assert find_random_row(planned["best"], planned) is None
        planned = by_name(
            make({"full": {"data": data}, "random": RANDOM | {"data": data}, "best": BEST | {"data": data}})
        )
        assert find_random_row(planned["best"], planned) == "random"
        assert full_row(Result(planned["best"]), {n: Result(r) for n, r in planned.items()}).name == "full"
