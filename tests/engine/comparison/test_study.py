"""engine/comparison/study.py: what a file with rows asks to be trained, and every mistake that is found before anything
is."""

from pathlib import Path

import pytest

from config import to_tree
from engine.comparison.decision import DEFAULT_RULE, DecisionRule
from engine.comparison.one_row import find_row
from engine.comparison.study import build_study, four_rows, load_study, merge
from engine.training.flops import forward_flops
from errors import UserError
from tests.tiny_training import tiny_config
from yaml_files import dump_yaml

TERM = {"teacher": "big", "loss": "mse", "weight": 1.0, "student_maps": ["p3"], "adapter": "conv1x1"}
OTHER = TERM | {"teacher": "given"}
TEACHERS = [
    {"name": "big", "arch": "yolov5nu", "epochs": 3, "optimizer": {"learning_rate": 0.005}},
    {"name": "given", "arch": "yolov8n", "weights": "given.pt"},
]
ROWS = {
    "baseline": None,
    "taught": {"terms": [TERM], "data": {"max_samples": 8}},
    "both": {"terms": [TERM, OTHER], "against": ["taught", "baseline"], "seeds": 1},
    "longer": {"compute_of": "taught"},
    "other": {"student": {"arch": "yolov5nu"}, "epochs": 7},
    "other_taught": {"student": {"arch": "yolov5nu"}, "terms": [OTHER], "epochs": 7},
}


def epochs_for_taught(epochs: int) -> int:
    """Of the student for the compute of as many epochs with YOLOv5nu as a teacher, and of the teacher's own three."""
    student, teacher = forward_flops("yolov8_narrow", 64, 80), forward_flops("yolov5nu", 64, 80)
    return round((epochs * (3 * student + teacher) + 3 * 3 * teacher) / (3 * student))


@pytest.fixture
def write(tmp_path):
    """A study's file with some rows and changes at its top level."""

    def write(rows=ROWS, **changes):
        data = {"pictures_per_epoch": 12}
        tree = to_tree(tiny_config(tmp_path, tmp_path / "runs", name="study", seed=5, teachers=TEACHERS, data=data))
        path = tmp_path / "study.yaml"
        path.write_text(dump_yaml(tree | {"rows": rows} | changes))
        return path

    return write


def test_rows_are_the_shared_config_with_their_changes(write):
    study = load_study(write(), seeds=2)
    rows = {row.name: row for row in study.rows}
    assert list(rows) == ["baseline", "teacher_big", "taught", "both", "longer", "other", "other_taught"]
    assert rows["baseline"].config.terms == () and rows["baseline"].config.teachers == ()
    assert rows["taught"].config.data.max_samples == 8 and rows["taught"].config.data.format == "yolo"
    assert [teacher.name for teacher in rows["both"].config.teachers] == ["big", "given"]
    assert [teacher.name for teacher in rows["taught"].config.teachers] == ["big"]
    assert rows["longer"].config.epochs == epochs_for_taught(study.config.epochs) and rows["other"].config.epochs == 7
    assert [len(row.seeds) for row in study.rows] == [2, 1, 2, 1, 2, 2, 2]
    assert rows["taught"].seeds == (5, 6)


def test_a_teacher_in_place_has_the_shared_protocol_and_its_own_rates(write):
    study = load_study(write(), seeds=2)
    rows = {row.name: row for row in study.rows}
    teacher, baseline = to_tree(rows["teacher_big"].config), to_tree(rows["baseline"].config)
    differing = [key for key in teacher if teacher[key] != baseline[key]]
    assert differing == ["student", "epochs", "optimizer"]
    assert teacher["epochs"] == 3 and teacher["optimizer"] == baseline["optimizer"] | {"learning_rate": 0.005}
    weights = study.folder / "teacher_big_seed5" / "weights" / "last.pt"
    assert rows["both"].config.teachers[0].weights == str(weights)
    assert rows["both"].config.teachers[1].weights == "given.pt"


@pytest.mark.parametrize("arch, threshold", [("yolov5nu", 0.6), ("rtdetr_r18vd", None)])
def test_the_shared_suppression_is_not_for_a_teacher_without_it(write, arch, threshold):
    """train.py refuses it for RT-DETR, and a teacher has no section of its own for evaluation."""
    teachers = [TEACHERS[0] | {"arch": arch}, TEACHERS[1]]
    rows = load_study(write(teachers=teachers, evaluation={"iou_threshold": 0.6, "max_detections": 7})).rows
    assert rows[1].is_teacher and rows[1].config.evaluation.iou_threshold == threshold
    assert rows[1].config.evaluation.max_detections == 7 and rows[0].config.evaluation.iou_threshold == 0.6


def test_a_teacher_in_place_may_start_from_weights(write):
    teachers = [TEACHERS[0] | {"start_weights": "coco.pt"}, TEACHERS[1]]
    student = load_study(write(teachers=teachers)).rows[1].config.student
    assert (student.arch, student.weights, student.new_head) == ("yolov5nu", "coco.pt", False)


@pytest.mark.parametrize(
    "key",
    [{"start_weights": "coco.pt"}, {"epochs": 9}, {"backbone_weights": "b.pt"}, {"optimizer": {"name": "sgd"}},
     {"data": {"per_class": 2}}],
)  # fmt: skip
def test_a_given_teacher_has_no_keys_of_training_in_place(write, key):
    """Nothing would read them."""
    with pytest.raises(UserError, match=rf"'teachers.1.{next(iter(key))}': 'given' is not trained in place"):
        load_study(write(teachers=[TEACHERS[0], TEACHERS[1] | key]))


def test_a_teacher_of_pseudo_boxes_needs_no_term(write):
    """It is trained in place on the labelled pictures alone, or on those of its own key `data`."""
    few = {"per_class": 2, "pictures_per_epoch": 12, "unlabelled": {"rest": True, "labelled_share": 0.25}}
    pseudo = {"data": {"unlabelled": {"pseudo": {"teacher": "big"}}}}
    rows = {
        "labels": {"data": {"unlabelled": None}},
        "pseudo": pseudo,
        "soft": {"terms": [OTHER | {"on": "unlabelled"}]},
        "both": pseudo | {"terms": [OTHER], "against": ["labels", "all"]},
        "all": {"data": {"per_class": 0, "unlabelled": None}},
    }
    tree = to_tree(load_study(write()).config)
    study = load_study(write(rows, data=tree["data"] | few))
    found = {row.name: row for row in study.rows}
    names = {name: [teacher.name for teacher in row.config.teachers] for name, row in found.items()}
    assert names == {
        "labels": [], "teacher_big": [], "pseudo": ["big"], "soft": ["given"], "both": ["big", "given"], "all": [],
    }  # fmt: skip
    assert (
        found["teacher_big"].config.data == found["labels"].config.data and not found["labels"].config.data.unlabelled
    )
    assert found["pseudo"].config.data.unlabelled.labelled_share == 0.25
    weights = study.folder / "teacher_big_seed5" / "weights" / "last.pt"
    assert found["pseudo"].config.teachers[0].weights == str(weights)
    assert found["both"].against == ("labels", "all")
    assert not any(row.notes for row in study.rows if row.name != "teacher_big")
    assert [row.name for row in study.with_teachers(["pseudo"])] == ["teacher_big", "pseudo"]

    teachers = [TEACHERS[0] | {"data": {"per_class": 0, "max_samples": 9}}, TEACHERS[1]]
    other = {row.name: row for row in load_study(write(rows, data=tree["data"] | few, teachers=teachers)).rows}
    data = other["teacher_big"].config.data
    assert (data.per_class, data.max_samples, data.unlabelled, data.pictures_per_epoch) == (0, 9, None, 12)
    rows["pseudo"] = {"data": {"unlabelled": {"pseudo": {"teacher": "bug"}}}}
    with pytest.raises(
        UserError, match=r"row 'pseudo': key 'data.unlabelled.pseudo.teacher': found 'bug', .* big, given"
    ):
        load_study(write(rows, data=tree["data"] | few))
    sizes = {"pictures_per_epoch": 0}  # an epoch of each set is one pass: another number of steps
    rows |= {"pseudo": pseudo, "both": pseudo | {"terms": [OTHER]}}
    study = load_study(write(rows, data=tree["data"] | few | sizes))
    notes = [note for row in study.rows if row.name == "soft" for note in row.notes]
    assert notes == ["soft is compared to no row: labels trains differently (data.pictures_per_epoch)"]


def test_the_four_rows_of_a_config_with_unlabelled_pictures(tiny_data, tmp_path):
    """The student alone learns from the labelled pictures; a config with pseudo boxes needs no term."""
    data = {"per_class": 2, "unlabelled": {"rest": True, "pseudo": {"teacher": "big"}}, "pictures_per_epoch": 12}
    config = tiny_config(tiny_data, tmp_path / "runs", name="study", teachers=TEACHERS[:1], data=data)
    rows = {row.name: row.config for row in build_study(config, four_rows(config), seeds=1, source="study.yaml").rows}
    assert list(rows) == ["baseline", "teacher_big", "distilled", "longer"]
    assert {name for name, row in rows.items() if row.data.unlabelled is not None} == {"distilled"}


def test_the_students_own_average_is_no_row(write):
    teachers = [{"name": "average", "arch": "ema"}]
    study = load_study(write({"baseline": {}, "self": {"terms": [TERM | {"teacher": "average"}]}}, teachers=teachers))
    assert [row.name for row in study.rows] == ["baseline", "self"]
    assert study.rows[1].config.teachers[0].weights is None


def test_each_row_is_compared_to_the_baseline_with_its_student(write):
    found = {row.name: (row.baseline, row.against) for row in load_study(write()).rows}
    assert found == {
        "baseline": ("baseline", ()),
        "teacher_big": ("other", ("other",)),  # the same architecture, trained alone
        "taught": ("baseline", ("baseline",)),
        "both": ("baseline", ("taught", "baseline")),
        "longer": ("baseline", ("baseline",)),
        "other": ("other", ()),
        "other_taught": ("other", ("other",)),
    }


def test_without_a_baseline_rows_are_compared_to_the_first(write):
    rows = {"taught": ROWS["taught"], "both": {"terms": [TERM, OTHER]}}
    found = {row.name: row.against for row in load_study(write(rows)).rows}
    assert found == {"teacher_big": ("taught",), "taught": (), "both": ("taught",)}


def test_a_baseline_may_stand_below_what_is_compared_to_it(write):
    rows = {"taught": {"terms": [OTHER]}, "baseline": None}
    study = load_study(write(rows, teachers=TEACHERS[1:]))
    assert {row.name: row.against for row in study.rows} == {"taught": ("baseline",), "baseline": ()}


def test_overrides_reach_into_rows(write):
    study = load_study(write(), ["rows.taught.terms.0.weight=0.25", "rows.other.epochs=9", "batch_size=4"])
    rows = {row.name: row.config for row in study.rows}
    assert rows["taught"].terms[0].weight == 0.25 and rows["both"].terms[0].weight == 1.0
    assert rows["other"].epochs == 9 and {config.batch_size for config in rows.values()} == {4}


def test_some_rows_with_the_teachers_they_need(write):
    study = load_study(write())
    assert [row.name for row in study.with_teachers(["both", "baseline"])] == ["baseline", "teacher_big", "both"]
    assert [row.name for row in study.with_teachers(["other_taught"])] == ["other_taught"]
    with pytest.raises(UserError, match="--rows: found 'bath', expected some of baseline, teacher_big"):
        study.with_teachers(["bath"])


def test_a_row_that_is_not_there_is_answered_with_all_that_are(write):
    rows = {"baseline": None} | {f"row{number}": {"epochs": 20 + number} for number in range(20)}
    study = load_study(write(rows, teachers=[]))
    expected = ", ".join(rows)
    with pytest.raises(UserError, match=rf"--rows: found 'bath', expected some of {expected}$"):
        study.with_teachers(["bath"])
    with pytest.raises(UserError, match=rf"--row: found 'bath', expected one of {expected}$"):
        find_row(study, "bath")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"againts": ["taught"]}, r"row 'new': unknown key 'againts', did you mean 'against'"),
        ({"optimizer": {"momemtum": 0.9}}, r"row 'new': unknown key 'optimizer.momemtum', did you mean"),
        ({"terms": [TERM | {"wieght": 1.0}]}, r"row 'new': unknown key 'terms.0.wieght', did you mean"),
        ({"epochs": "many"}, r"row 'new': key 'epochs': found 'many', expected an integer"),
        ({"seeds": 0}, r"row 'new': key 'seeds': found 0"),
        ({"seed": 3}, r"row 'new': key 'seed' is the same for all rows"),
        ({"teachers": []}, r"row 'new': key 'teachers' is the same for all rows"),
        ({"against": ["missing"]}, r"row 'new': key 'against': found 'missing', expected one of baseline, teacher_big"),
        ({"against": ["new"]}, r"row 'new': key 'against': found 'new', expected one of baseline"),
        (
            {"compute_of": "longer"},
            r"row 'new': key 'compute_of': found 'longer', expected a row above: baseline, taught",
        ),
        ({"compute_of": "taught", "epochs": 3}, r"row 'new': key 'epochs': found beside 'compute_of', which sets it"),
        ({"terms": [TERM | {"teacher": "bug"}]}, r"'terms.0.teacher': found 'bug', expected big, given"),
        ([TERM], r"row 'new': found \[.*\], expected keys and values"),
    ],
)
def test_mistakes_in_a_row(write, row, message):
    with pytest.raises(UserError, match=message):
        load_study(write(ROWS | {"new": row}))


@pytest.mark.parametrize("name", [3, "a/b", "a.b", "", "a,b", "teacher_big"])
def test_names_no_row_may_have(write, name):
    with pytest.raises(UserError, match=r"row .*expected (a name of letters|another)"):
        load_study(write(ROWS | {name: {}}))


def test_mistakes_at_the_top_level(write):
    with pytest.raises(UserError, match="unknown key 'epoch', did you mean 'epochs'"):
        load_study(write(epoch=3))
    with pytest.raises(UserError, match=r"'teachers.1.name': no row has a term or pseudo boxes of 'given'"):
        load_study(write({"baseline": {}, "taught": ROWS["taught"]}))
    with pytest.raises(UserError, match="'teachers': two have the same name"):
        load_study(write(teachers=[TEACHERS[0], TEACHERS[0]]))
    with pytest.raises(UserError, match="key 'rows': found 3, expected keys and values"):
        load_study(write(3))


def test_a_config_without_rows_is_four_of_them(tmp_path):
    config = tiny_config(tmp_path, Path("runs"), name="x", teachers=[TEACHERS[0]], terms=[TERM])
    rows = build_study(config, four_rows(config), seeds=1, source="x").rows
    assert [row.name for row in rows] == ["baseline", "teacher_big", "distilled", "longer"]
    assert rows[2].against == ("baseline", "longer") and rows[2].config.terms == config.terms
    assert rows[3].config.epochs == epochs_for_taught(config.epochs) > config.epochs and rows[3].config.terms == ()
    given = tiny_config(tmp_path, Path("runs"), name="x", teachers=[TEACHERS[1]], terms=[OTHER])
    assert list(four_rows(given)) == ["baseline", "distilled", "longer"]  # the teacher's passes cost compute as well
    itself = TERM | {"teacher": "student", "loss": "last_layer"}
    alone = tiny_config(tmp_path, Path("runs"), name="x", terms=[itself])
    rows = build_study(alone, four_rows(alone), seeds=1, source="x").rows
    assert [(row.name, len(row.config.terms)) for row in rows] == [("baseline", 0), ("distilled", 1)]
    with pytest.raises(UserError, match="'teachers' and 'terms': found none"):
        four_rows(tiny_config(tmp_path, Path("runs"), name="x"))


def test_merge():
    tree = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert merge(tree, {"a": {"c": [3]}, "e": None}) == {"a": {"b": 1, "c": [3]}, "d": 3, "e": None}
    assert tree == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


def test_the_rule_of_a_file_and_its_number_of_seeds(write):
    """The rule gives the number of seeds, unless the command does; on the command line it is no rule of the file."""
    rule = {"metric": "mAP50", "smallest": 0.01, "level": 0.9, "seeds": 4}
    study = load_study(write(decide=rule))
    assert study.rule == DecisionRule(**rule) and study.rule_origin.startswith("study.yaml, ")
    assert len(study.rows[0].seeds) == 4 and len(load_study(write(decide=rule), seeds=2).rows[0].seeds) == 2
    assert load_study(write(decide=rule), ["decide.seeds=3"]).rule_origin == "the command line"
    assert load_study(write()).rule == DEFAULT_RULE and len(load_study(write()).rows[0].seeds) == 1
    with pytest.raises(UserError, match=r"unknown key 'decide.smalest', did you mean 'decide.smallest'"):
        load_study(write(decide={"smalest": 0.1}))
    with pytest.raises(UserError, match=r"study.yaml: key 'decide.level': found 95.0, expected a number between"):
        load_study(write(decide={"level": 95}))
