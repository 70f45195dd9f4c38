"""compare.py: what it trains and in which order, what it reuses, what it refuses, and what a stop leaves."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest

import checkpoint
import compare
import models
from config import to_tree
from engine.comparison.study import build_study, load_study
from engine.comparison.work import list_work, write_failure
from engine.runtime import claims, run_folder
from engine.training.inputs import labels_of
from errors import UserError
from tests.tiny_training import tiny_config, write_dataset
from yaml_files import dump_yaml

TEACHER = {"name": "big", "arch": "yolov5nu", "epochs": 3, "optimizer": {"learning_rate": 0.005}}
TERM = {"teacher": "big", "loss": "mse", "weight": 1.0, "student_maps": ["p3"], "adapter": "conv1x1"}
ROWS = {"baseline": None, "taught": {"terms": [TERM]}, "longer": {"epochs": 5, "differs": ["epochs"]}}


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "data", tmp_path / "runs", name="study", teachers=[TEACHER], seed=5)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for train.run: notes the configs, and writes the report of a run that scored by its name and seed."""
    configs = []

    def run(config, *, resume=False, **_):
        configs.append(dataclasses.replace(config, name=config.name + (" resumed" if resume else "")))
        folder = run_folder.RunFolder(Path(config.runs) / config.name)
        folder.last.parent.mkdir(parents=True, exist_ok=True)
        folder.last.touch()
        folder.config.write_text(dump_yaml(to_tree(config)))
        base = {"baseline": 0.5, "teacher": 0.7, "taught": 0.6, "longer": 0.55}[config.name.split("_")[0]]
        score = base + 0.01 * (config.seed - 5) ** 2
        test = {"mAP50": score + 0.2, "mAP50-95": score, "precision": 0.8, "recall": 0.7, "f1": 0.75}
        report = {"test": test, "seconds": 60.0, "steps": 6, "parameters": 3_000_000}
        report |= {"device": "cpu", "precision": "float32", "threads": 1, "torch": "2"}
        folder.report.write_text(json.dumps(report))
        return report

    monkeypatch.setattr(compare.train, "run", run)
    monkeypatch.setattr(compare, "check_rows", lambda rows, study: {})
    monkeypatch.setattr(compare.plot, "write", lambda path, *_, **__: path)
    return configs


def make(config, rows=ROWS, *, seeds=1):
    return build_study(config, rows, seeds=seeds, source="study.yaml")


def names(trained):
    return [config.name for config in trained]


def test_a_folder_that_cannot_be_made_is_the_disk(config, trained, tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match="Not a directory") as error:
        compare.compare(make(config))
    assert error.value.exit_code == 5 and not trained


def test_every_row_with_the_first_seed_then_with_the_next(config, trained):
    results = compare.compare(make(config, seeds=2))
    assert names(trained) == [
        "baseline_seed5", "teacher_big_seed5", "taught_seed5", "longer_seed5",
        "baseline_seed6", "taught_seed6", "longer_seed6",
    ]  # fmt: skip
    assert [result.name for result in results] == ["baseline", "teacher_big", "taught", "longer"]
    assert results[2].values("mAP") == pytest.approx([0.6, 0.61])
    by_name = dict(zip(names(trained), trained))
    baseline, taught = to_tree(by_name["baseline_seed5"]), to_tree(by_name["taught_seed6"])
    assert [key for key in baseline if baseline[key] != taught[key]] == ["name", "teachers", "terms", "seed"]
    weights = by_name["taught_seed6"].teachers[0].weights
    assert weights == str(Path(config.runs) / "study" / "teacher_big_seed5" / "weights" / "last.pt")


def test_finished_runs_are_not_repeated_and_interrupted_ones_go_on(config, trained):
    compare.compare(make(config))
    folder = Path(config.runs) / "study" / "taught_seed5"
    (folder / "report.json").unlink()
    stale = Path(config.runs) / "study" / "longer_seed5"
    shutil.rmtree(stale / "weights")
    (stale / "report.json").unlink()
    trained.clear()
    compare.compare(make(config))
    assert names(trained) == ["taught_seed5 resumed", "longer_seed5"]


def test_runs_before_and_after_a_change_of_labels_or_weights_are_refused(config, trained, monkeypatch):
    """A table would mix numbers of two sets, or of two teachers."""
    inputs = {"labels of voc set test": "a", "weights big.pt": "b"}
    before, run = dict(inputs), compare.train.run

    def run_with_inputs(config, **options):
        report = run(config, **options) | {"inputs": dict(inputs)}
        (Path(config.runs) / config.name / "report.json").write_text(json.dumps(report))
        return report

    monkeypatch.setattr(compare.train, "run", run_with_inputs)
    compare.compare(make(config))
    monkeypatch.setattr(compare, "check_rows", lambda rows, study: dict(inputs))
    for name in before:  # changed before the runs of the second seed: none is trained
        inputs[name] = "c"
        with pytest.raises(UserError, match=f"^now: the {name} are not those of .*baseline_seed5: changed in between"):
            compare.compare(make(config, seeds=2))
        inputs[name] = before[name]
    assert len(trained) == 4
    monkeypatch.setattr(compare, "check_rows", lambda rows, study: {})
    inputs["weights big.pt"] = "c"  # changed while they are trained
    with pytest.raises(UserError, match=r"baseline_seed6: the weights big.pt are not those of .*seed5: changed"):
        compare.compare(make(config, seeds=2))


def test_weights_that_are_gone_are_noticed_before_anything_is_trained(config, trained):
    """A teacher that is trained anew is another one: hours later, its new students would not fit to the old ones."""
    compare.compare(make(config))
    runs = Path(config.runs) / "study"
    teacher, taught = (run_folder.RunFolder(runs / f"{name}_seed5") for name in ("teacher_big", "taught"))
    report = json.loads(taught.report.read_text()) | {"inputs": {f"weights {teacher.last}": "a"}}
    taught.report.write_text(json.dumps(report))
    teacher.last.unlink()
    compare.compare(make(config))  # nothing is left to train with it
    with pytest.raises(UserError, match=r"last.pt: found no such file, but its run is finished and taught_seed6 b"):
        compare.compare(make(config, seeds=2))
    shutil.rmtree(teacher.path)
    with pytest.raises(UserError, match=r"big_seed5/weights/last.pt: found no such file, but .*taught_seed5 learned"):
        compare.compare(make(config))
    shutil.rmtree(taught.path)
    compare.compare(make(config))
    assert names(trained)[4:] == ["teacher_big_seed5", "taught_seed5"]


def test_more_seeds_and_rows_are_added_to_what_is_there(config, trained):
    compare.compare(make(config))
    trained.clear()
    compare.compare(make(config, ROWS | {"taught_more": {"terms": [TERM], "epochs": 4}}, seeds=2))
    assert names(trained) == [
        "taught_more_seed5",
        "baseline_seed6",
        "taught_seed6",
        "longer_seed6",
        "taught_more_seed6",
    ]


def test_a_stop_between_rows_loses_nothing(config, trained, monkeypatch):
    """Killed in its third run, the study has a table of two; given again, it goes on with the third."""
    run = compare.train.run

    def run_until_taught(config, **options):
        if config.name.startswith("taught"):
            raise SystemExit(143)  # what train.run raises after a signal
        return run(config, **options)

    monkeypatch.setattr(compare.train, "run", run_until_taught)
    with pytest.raises(SystemExit):
        compare.compare(make(config))
    text = (Path(config.runs) / "study" / "comparison.md").read_text()
    assert "| baseline | yolov8_narrow | 3.00 M | 2 | 1 | 0.700 | 0.500 |" in text
    assert "Not trained yet, row (seeds): taught, longer (5)." in text
    monkeypatch.setattr(compare.train, "run", run)
    trained.clear()
    compare.compare(make(config))
    assert names(trained) == ["taught_seed5", "longer_seed5"]
    assert "Not trained yet" not in (Path(config.runs) / "study" / "comparison.md").read_text()


def test_some_rows_leave_the_others_as_they_are(config, trained):
    compare.compare(make(config), only=["baseline"])
    assert names(trained) == ["baseline_seed5"]
    trained.clear()
    results = compare.compare(make(config), only=["taught"])
    assert names(trained) == ["teacher_big_seed5", "taught_seed5"]
    assert [len(result.reports) for result in results] == [1, 1, 1, 0]
    text = (Path(config.runs) / "study" / "comparison.md").read_text()
    assert "| taught | baseline | 1 | +0.100 | +0.100 | - | not decided: 1 of 2 seeds |" in text
    assert "Not trained yet, row (seeds): longer (5)." in text


def test_runs_of_another_config_are_refused_before_anything_is_trained(config, trained):
    compare.compare(make(config), only=["longer"])
    trained.clear()
    changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, momentum=0.5))
    with pytest.raises(UserError, match=r"longer_seed5.config.yaml: key 'optimizer.momentum' differs"):
        compare.compare(make(changed))
    with pytest.raises(UserError, match=r"longer_seed5.config.yaml: key 'epochs' differs"):
        compare.compare(make(config, ROWS | {"longer": ROWS["longer"] | {"epochs": 7}}))
    assert not trained


def fail_runs(monkeypatch, beginning: str, error: UserError) -> None:
    """From now on the runs whose names begin so end in this error."""
    run = compare.train.run

    def run_or_fail(config, **options):
        if config.name.startswith(beginning):
            raise error
        return run(config, **options)

    monkeypatch.setattr(compare.train, "run", run_or_fail)


def test_a_loss_that_is_not_finite_ends_its_row_only(config, trained, monkeypatch):
    fail_runs(monkeypatch, "taught", UserError("step 3: mse_big is nan", 3))
    with pytest.raises(UserError, match="runs failed, see the table: taught") as raised:
        compare.compare(make(config))
    assert raised.value.exit_code == 3 and names(trained)[-1] == "longer_seed5"
    assert (
        "Failed: taught with seed 5: step 3: mse_big is nan"
        in (Path(config.runs) / "study" / "comparison.md").read_text()
    )


def test_nothing_is_taught_by_a_teacher_that_failed(config, trained, monkeypatch):
    fail_runs(monkeypatch, "teacher", UserError("step 3: box is nan", 3))
    with pytest.raises(UserError, match="runs failed, see the table: teacher_big, taught"):
        compare.compare(make(config))
    assert names(trained) == ["baseline_seed5", "longer_seed5"]


def test_other_errors_stop_the_study(config, trained, monkeypatch):
    def full_disk(config, **options):
        raise UserError("no space", 5)

    monkeypatch.setattr(compare.train, "run", full_disk)
    with pytest.raises(UserError, match="no space"):
        compare.compare(make(config))


# ---------------------------------------------------------------- several processes


@pytest.fixture
def study_file(config, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(to_tree(config) | {"rows": ROWS}))
    return str(path)


def another_process(monkeypatch, *steps):
    """While compare.py waits, somebody else does these steps, one for each look."""
    steps = list(steps)
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: steps.pop(0)())
    return steps


def test_printed_runs_train_each_run_once_in_any_order(study_file, trained, capsys):
    compare.main([study_file, "--seeds", "2", "batch_size=4", "--print-runs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == [
        "baseline_seed5", "teacher_big_seed5", "taught_seed5", "longer_seed5",
        "baseline_seed6", "taught_seed6", "longer_seed6",
    ]  # fmt: skip
    assert lines[2] == f"python compare.py {study_file} batch_size=4 --seeds 2 --run taught_seed5" and not trained
    for line in reversed(lines):
        compare.main(shlex.split(line)[2:])
    assert sorted(names(trained)) == sorted(line.rpartition(" ")[2] for line in lines)
    assert names(trained)[1:3] == ["teacher_big_seed5", "taught_seed6"]  # a command makes what it needs
    assert {c.batch_size for c in trained} == {4}
    with pytest.raises(UserError, match="--run: found 'bath_seed5', expected one of baseline_seed5, teacher_big_seed5"):
        compare.main([study_file, "--run", "bath_seed5"])


def test_what_another_process_trains_is_left_to_it(config, trained, monkeypatch, capsys):
    """The teacher is held: the rest is trained first. When it is done elsewhere, what waited for it goes on."""
    study = make(config, seeds=2)
    works = {work.name: work for work in list_work(study.rows)}
    held = claims.take(works["teacher_big_seed5"].path)

    def finish():
        assert names(trained) == ["baseline_seed5", "longer_seed5", "baseline_seed6", "longer_seed6"]
        text = (study.folder / "comparison.md").read_text()
        assert "Not trained yet, row (seeds): teacher_big (5); taught (5, 6)." in text
        compare.train.run(works["teacher_big_seed5"].row.run(5))
        trained.pop()
        held.release()

    left = another_process(monkeypatch, lambda: None, finish)
    results = compare.compare(study)
    assert not left and names(trained)[4:] == ["taught_seed5", "taught_seed6"]
    assert capsys.readouterr().out.count("waiting: ") == 1
    assert [result.missing for result in results] == [[], [], [], []]


def test_what_a_dead_process_left_is_taken_over(config, trained, monkeypatch):
    study = make(config)
    taught = next(work for work in list_work(study.rows) if work.name == "taught_seed5")
    held = claims.take(taught.path)
    (taught.path / "weights").mkdir(parents=True)
    (taught.path / "weights" / "last.prev.pt").write_bytes(b"")  # killed between two renames
    left = another_process(monkeypatch, held.release)
    compare.compare(study)
    assert not left and names(trained) == [
        "baseline_seed5",
        "teacher_big_seed5",
        "longer_seed5",
        "taught_seed5 resumed",
    ]


def test_a_run_that_another_version_of_the_study_made_meanwhile_is_refused(config, trained, monkeypatch):
    study = make(config)
    taught = next(work for work in list_work(study.rows) if work.name == "taught_seed5")
    held = claims.take(taught.path)
    other = dataclasses.replace(taught.row.run(5), batch_size=2)
    another_process(monkeypatch, lambda: (compare.train.run(other), held.release()))
    with pytest.raises(UserError, match=r"taught_seed5/config.yaml: key 'batch_size' differs from this comparison"):
        compare.compare(study)


def test_what_failed_elsewhere_is_tried_again_by_a_later_command_only(config, trained, monkeypatch):
    study = make(config)
    teacher = next(work for work in list_work(study.rows) if work.name == "teacher_big_seed5")
    held = claims.take(teacher.path)
    left = another_process(monkeypatch, lambda: (write_failure(teacher, "step 3: box is nan"), held.release()))
    with pytest.raises(UserError, match=r"runs failed, see the table: teacher_big, taught$") as raised:
        compare.compare(study)
    assert raised.value.exit_code == 3 and not left and names(trained) == ["baseline_seed5", "longer_seed5"]
    text = (study.folder / "comparison.md").read_text()
    assert "Failed: teacher_big with seed 5: step 3: box is nan" in text and "seed 5: teacher_big failed" in text

    with pytest.raises(UserError, match=r"runs failed, see the table: teacher_big, taught$"):
        compare.compare(study, run="taught_seed5")  # asks for its teacher, not for another try at it
    trained.clear()
    compare.compare(study)
    assert names(trained) == ["teacher_big_seed5", "taught_seed5"] and not teacher.failure.exists()
    assert "Failed" not in (study.folder / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0", "--submit", "local"], "--workers: found 0"),
        (["--workers", "2"], "--workers and --submit-option: expected --submit"),
        (["--run", "a", "--print-runs"], "argument --print-runs: found beside --run"),
        (["--run", "a", "--rows", "b"], "argument --rows: found beside --run"),
        (["--submit", "local", "--submit-option", "fast"], "--submit-option: found 'fast', expected key=value"),
    ],
)
def test_arguments_that_do_not_go_together(study_file, trained, monkeypatch, arguments, message):
    monkeypatch.setattr(compare.submission, "require_submitit", lambda cluster: None)
    with pytest.raises(UserError, match=message):
        compare.main([study_file, *arguments])
    assert not trained


def test_arguments(config, trained, tmp_path):
    with pytest.raises(UserError, match="--seeds: found 0"):
        compare.main(["missing.yaml", "--seeds", "0"])
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(to_tree(config) | {"rows": ROWS}))
    with pytest.raises(UserError, match="--rows: found 'bath'"):
        compare.main([str(path), "--rows", "baseline,bath"])
    assert not trained
    compare.main([str(path), "--rows", "longer,baseline", "--seeds", "2", "batch_size=4"])
    assert names(trained) == ["baseline_seed5", "longer_seed5", "baseline_seed6", "longer_seed6"]
    assert {c.batch_size for c in trained} == {4}


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"loss": "mze"}, r"row 'taught': terms.0.loss: found 'mze'"),
        ({"adapter": "none"}, r"row 'taught': terms.0: p3 and p3: "),
        ({"student_maps": ["p9"]}, r"row 'taught': terms.0: map 'p9'"),
    ],
)
def test_a_term_that_cannot_act_is_found_before_anything_is_trained(config, tmp_path, term, message):
    write_dataset(tmp_path / "data", train=2, test=2)
    teacher = dataclasses.replace(config.teachers[0], arch="yolov8s")
    study = make(
        dataclasses.replace(config, teachers=(teacher,)), {"baseline": None, "taught": {"terms": [TERM | term]}}
    )
    with pytest.raises(UserError, match=message):
        compare.compare(study)
    assert not study.folder.exists()


def test_a_teacher_in_place_stands_in_with_the_head_of_its_file(config, tmp_path):
    """Its class branches are as wide as those of the weights it starts from: 81 channels, which no adapter brings."""
    write_dataset(tmp_path / "data", train=2, test=2)
    released = models.build("yolov8n", 81)
    about = {"arch": "yolov8n", "names": ["red", *map(str, range(80))], "image_size": 64}
    checkpoint.save(tmp_path / "coco.pt", about | {"ema": released.state_dict()})
    teacher = dataclasses.replace(config.teachers[0], arch="yolov8n", start_weights=str(tmp_path / "coco.pt"))
    term = TERM | {"student_maps": ["cls3_1"], "adapter": "none"}
    study = make(dataclasses.replace(config, teachers=(teacher,)), {"baseline": None, "taught": {"terms": [term]}})
    with pytest.raises(UserError, match=r"row 'taught': terms.0: cls3_1 and cls3_1: .*81"):
        compare.compare(study)


def test_a_teacher_that_goes_on_is_no_changed_input(config, tmp_path):
    """Its file was half trained when the study began, and will be another; a finished one must stay what it is."""
    write_dataset(tmp_path / "data", train=2, test=2)
    study = make(config)
    half = study.folder / "teacher_big_seed5" / "weights" / "last.pt"
    half.parent.mkdir(parents=True)
    about = {"arch": config.teachers[0].arch, "names": ["red", "green"], "image_size": 64}
    checkpoint.save(half, about | {"ema": models.build(config.teachers[0].arch, 2).state_dict()})
    of_teacher, data = f"weights {half}", study.config.data
    labels = {labels_of(data.train_place, data), labels_of(data.test_place, data)}
    assert set(compare.check_rows(study.rows, study)) == labels
    assert set(compare.check_rows([row for row in study.rows if not row.is_teacher], study)) == labels | {of_teacher}


@pytest.mark.slow
def test_end_to_end(config, tmp_path, capsys, monkeypatch, one_plot):
    """The real thing, tiny: four runs, a table and a picture; given again, nothing is trained twice."""
    write_dataset(tmp_path / "data", train=8, test=4)
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(to_tree(config) | {"rows": ROWS, "epochs": 1}))
    study = load_study(
        path, ["teachers.0.epochs=1", "teachers.0.arch=yolov8_narrow", "rows.baseline.evaluation.every_epochs=1"]
    )
    results = compare.compare(study)
    assert [result.name for result in results] == ["baseline", "teacher_big", "taught", "longer"]
    assert [result.reports[5]["steps"] for result in results] == [1, 1, 1, 5]  # the last: what the teacher cost, too
    assert (study.folder / "comparison.png").stat().st_size > 10_000
    monkeypatch.setattr(compare.plot, "write", lambda *args, **options: None)  # of the same rows as before
    again = compare.compare(study)
    assert capsys.readouterr().out.count("finished before") == 4
    for result, other in zip(results, again):
        assert result.reports[5]["test"] == other.reports[5]["test"]

    labels = tmp_path / "data" / "labels" / "test" / "000.txt"
    before = labels.read_text()
    labels.write_text("0 0.5 0.5 0.2 0.2\n")  # corrected after the first seed
    overrides = [f"teachers.0.{key}" for key in ("epochs=1", "arch=yolov8_narrow")]
    more = load_study(path, [*overrides, "rows.baseline.evaluation.every_epochs=1"], seeds=2)
    with pytest.raises(UserError, match=r"now: the labels of yolo .* test are not those of .*baseline_seed5: changed"):
        compare.compare(more)
    labels.write_text(before)
    teacher = study.folder / "teacher_big_seed5" / "weights" / "last.pt"
    shutil.copy(study.folder / "baseline_seed5" / "weights" / "last.pt", teacher)  # trained anew, by other means
    with pytest.raises(UserError, match=r"now: the weights .*teacher_big_seed5.* are not those of .*taught_seed5"):
        compare.compare(more)
    assert not list(study.folder.glob("*_seed6"))
