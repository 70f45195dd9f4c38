"""The row of equal compute: epochs by hand, for equal and for different numbers of pictures."""

import pytest

from engine.comparison.rows import describe_pair
from engine.comparison.study import build_study
from engine.training.flops import forward_flops
from errors import UserError
from tests.tiny_training import tiny_config, write_dataset

GIVEN = {"name": "given", "arch": "yolov8s", "weights": "s.pt"}
TERM = {"teacher": "given", "loss": "mse", "weight": 1.0, "student_maps": ["p3"], "adapter": "conv1x1"}


def epochs(tmp_path, rows, *, teachers=(GIVEN,), epochs=30, data=None):
    config = tiny_config(tmp_path / "set", tmp_path / "runs", teachers=list(teachers), epochs=epochs, data=data or {})
    return {row.name: row.config.epochs for row in build_study(config, rows, seeds=1, source="x").rows}


def test_a_teacher_with_weights_costs_its_passes_alone(tmp_path):
    """Without opening a dataset: there is none here."""
    n, s = forward_flops("yolov8_narrow", 64, 80), forward_flops("yolov8s", 64, 80)
    found = epochs(tmp_path, {"taught": {"terms": [TERM]}, "alone": {"compute_of": "taught"}})
    assert found == {"taught": 30, "alone": round(30 * (3 * n + s) / (3 * n))} and found["alone"] == 104
    larger = {"compute_of": "taught", "student": {"arch": "yolov8s"}}
    assert epochs(tmp_path, {"taught": {"terms": [TERM]}, "alone": larger})["alone"] == round(
        30 * (3 * n + s) / (3 * s)
    )


def test_pictures_without_labels_count_with_the_boxes_made_for_them(tmp_path):
    """2 labelled pictures alone, and with 4 more that have pseudo boxes at 96 px: three times the pictures an epoch."""
    write_dataset(tmp_path / "set", train=6, test=3)
    data = {"max_samples": 2}
    unlabelled = {"rest": True, "pseudo": {"teacher": "given", "image_size": 96}}
    rows = {
        "all": {"data": {"unlabelled": unlabelled}, "terms": [TERM]},
        "labelled": {"data": {"unlabelled": None}, "compute_of": "all", "against": []},
    }
    n, s = forward_flops("yolov8_narrow", 64, 80), forward_flops("yolov8s", 64, 80)
    large = forward_flops("yolov8s", 96, 80)
    found = epochs(tmp_path, rows, data=data, epochs=4)
    assert found["labelled"] == round((4 * 6 * (3 * n + s) + 4 * large) / (2 * 3 * n))
    found = epochs(tmp_path, rows, data=data | {"pictures_per_epoch": 8}, epochs=4)
    assert found["labelled"] == round((4 * 8 * (3 * n + s) + 4 * large) / (8 * 3 * n))


@pytest.mark.parametrize(("changes", "pictures"), [({"root": "other"}, 6), ({"holdout_fraction": 0.5}, 1)])
def test_a_teacher_of_another_set_is_counted_with_its_own_pictures(tmp_path, changes, pictures):
    """2 pictures an epoch for the student; its teacher, which is trained in place, has more or fewer."""
    write_dataset(tmp_path / "set", train=2, test=3)
    write_dataset(tmp_path / "other", train=6, test=3)
    changes = changes | ({"root": str(tmp_path / "other")} if "root" in changes else {})
    teacher = {"name": "given", "arch": "yolov8s", "data": changes}
    n, s = forward_flops("yolov8_narrow", 64, 80), forward_flops("yolov8s", 64, 80)
    found = epochs(tmp_path, {"taught": {"terms": [TERM]}, "alone": {"compute_of": "taught"}}, teachers=[teacher])
    assert found["alone"] == round(30 * (2 * (3 * n + s) + pictures * 3 * s) / (2 * 3 * n))


def test_equal_compute_is_no_other_protocol(tmp_path):
    """The rows may be compared though their epochs differ; the table says so."""
    config = tiny_config(tmp_path, tmp_path / "runs", teachers=[GIVEN])
    rows = {"taught": {"terms": [TERM], "against": ["alone"]}, "alone": {"compute_of": "taught"}}
    taught, alone = build_study(config, rows, seeds=1, source="x").rows
    assert taught.against == ("alone",) and describe_pair(taught, alone) == "taught and alone differ in epochs 2 and 7"
    with pytest.raises(UserError, match="'alone' trains differently: epochs 2 and 4"):
        build_study(config, rows | {"alone": {"epochs": 4}}, seeds=1, source="x")
