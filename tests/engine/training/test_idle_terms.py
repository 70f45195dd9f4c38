"""A term of weight 0 is left out, with its teacher, and a line says so; what remains trains as if it were not there."""

import pytest
import torch

import checkpoint
import compare
import train
from config import to_tree
from engine.comparison import one_row
from engine.comparison.study import load_study
from engine.training.dry_run import dry_run
from engine.training.idle_terms import without_idle_terms
from errors import UserError
from tests.engine.training.test_distilled_training import save_teacher
from tests.tiny_training import tiny_config, write_dataset
from yaml_files import dump_yaml

pytestmark = pytest.mark.usefixtures("one_thread")
MAPS = {"teacher": "big", "loss": "mse", "weight": 0.5, "student_maps": ["p3"], "adapter": "conv1x1"}
CLASSES = {"teacher": "gone", "loss": "soft_class", "weight": 0, "student_maps": ["class_logits"]}
GONE = {"name": "gone", "arch": "yolov8s", "weights": "gone.pt"}  # would be refused: there is no such file
SMALL = {"student": {"arch": "yolov8_narrow"}, "epochs": 1, "data": {"max_samples": 8}}


def both(**changes):
    return {"teachers": [{"name": "big", "arch": "yolov8_narrow"}, GONE], "terms": [MAPS, CLASSES], **changes}


@pytest.mark.parametrize("weight", [0, 0.0, {"share": 0.0}])
def test_a_term_of_weight_0_goes_with_its_teacher(make_tiny, weight):
    config, line = without_idle_terms(make_tiny(**both(terms=[MAPS, CLASSES | {"weight": weight}])))
    assert line == "left out, weight 0: soft_class_gone; no need of teacher gone"
    assert [teacher.name for teacher in config.teachers] == ["big"]
    assert [term.loss for term in config.terms] == ["mse"]
    assert without_idle_terms(config) == (config, "")


def test_a_teacher_that_another_needs_stays(make_tiny):
    terms = [MAPS, CLASSES | {"teacher": "big"}]
    config, line = without_idle_terms(make_tiny(teachers=[{"name": "big", "arch": "yolov8_narrow"}], terms=terms))
    assert [teacher.name for teacher in config.teachers] == ["big"]
    assert line == "left out, weight 0: soft_class_big"
    unlabelled = {"unlabelled": {"root": "x", "pseudo": {"teacher": "gone"}}}
    config, line = without_idle_terms(make_tiny(**both(terms=[CLASSES], data=unlabelled, teachers=[GONE])))
    assert [teacher.name for teacher in config.teachers] == ["gone"] and config.terms == ()
    assert line.endswith("the student learns without them")


def test_without_any_term_left_the_student_is_alone(make_tiny):
    terms = [MAPS | {"weight": 0}, CLASSES]
    config, line = without_idle_terms(make_tiny(**both(terms=terms, teacher_weighting="confidence")))
    assert config == make_tiny()
    expected = "every term has weight 0 (mse_big, soft_class_gone): the student learns without them, alone; no need of "
    assert line == expected + "teacher big, gone"


def test_a_mistake_in_such_a_term_is_found(make_tiny):
    for change, message in (
        ({"loss": "soft_klass"}, r"terms\.1\.loss: found 'soft_klass'"),
        ({"teacher": "nobody"}, r"terms\.1\.teacher: found 'nobody'"),
        ({"weight": -1}, r"terms\.1\.weight: found -1\.0, expected a number above 0"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(make_tiny(**both(terms=[MAPS | {"weight": 0}, CLASSES | change])), quiet=True)


def test_it_trains_to_the_bytes_of_the_student_alone(make_tiny, capsys):
    terms = [CLASSES, CLASSES | {"teacher": "big", "name": "other"}]
    teachers = [{"name": "big", "arch": "yolov8_narrow"}, GONE | {"weights": "random"}]
    changes = SMALL | both(name="idle", terms=terms, teachers=teachers)
    train.run(make_tiny(**changes), teachers={"big": torch.nn.Identity()})
    printed = capsys.readouterr().out
    assert "every term has weight 0 (soft_class_gone, other)" in printed and "plumbing" not in printed
    train.run(make_tiny(**SMALL, name="alone"), quiet=True)
    runs = make_tiny().runs
    idle, alone = (checkpoint.load(f"{runs}/{name}/weights/last.pt") for name in ("idle", "alone"))
    assert all(torch.equal(idle["ema"][name], value) for name, value in alone["ema"].items())
    assert idle["criterion"] == {} and idle["config"]["terms"] == []


def test_the_dry_run_says_so(make_tiny, tmp_path, capsys):
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(save_teacher(tmp_path / "teacher.pt"))}, GONE]
    dry_run(make_tiny(**both(teachers=teachers)))
    printed = capsys.readouterr().out
    assert printed.startswith("left out, weight 0: soft_class_gone; no need of teacher gone\n")
    assert "mse_big" in printed and printed.count("soft_class_gone") == 1


def test_rows_of_a_study(tmp_path, monkeypatch, capsys):
    """One row keeps a term, one is the student alone: the table says so, and no teacher is trained for it."""
    monkeypatch.setattr(compare.plot, "write", lambda *args, **kw: None)
    data = write_dataset(tmp_path / "data", train=8, test=4)
    teachers = [{"name": "big", "arch": "yolov8_narrow"}, GONE]
    config = tiny_config(data, tmp_path / "runs", name="grid", teachers=teachers, **SMALL)
    rows = {"baseline": {}, "some": {"terms": [MAPS, CLASSES]}, "none": {"terms": [CLASSES, MAPS | {"weight": 0}]}}
    path = tmp_path / "grid.yaml"
    path.write_text(dump_yaml(to_tree(config) | {"rows": rows}))
    study = load_study(path)
    assert [row.name for row in study.rows] == ["baseline", "teacher_big", "some", "none"]
    assert [len(row.config.teachers) for row in study.rows] == [0, 0, 1, 0]
    compare.compare(study, only=["baseline", "none"])
    printed = capsys.readouterr().out
    line = "every term has weight 0 (soft_class_gone, mse_big): the student learns without them, alone; no need of"
    assert f"\nnone: {line} teacher big, gone.\n" in printed
    assert f"\n{line} teacher big, gone\n" in printed  # when the row is trained
    assert "teacher_big" not in printed
    assert "| none | baseline | 1 | +0.000 | +0.000 |" in printed
    with pytest.raises(UserError, match="row 'none' has a run here"):
        one_row.load_row(str(path), [], "none")
    assert not capsys.readouterr().out
    one_row.load_row(str(path), ["seed=3"], "none")
    assert line in capsys.readouterr().out
    with pytest.raises(UserError, match=r"row 'none': terms\.0\.loss: found 'no'"):
        load_study(path, ["rows.none.terms.0.loss=no"])
