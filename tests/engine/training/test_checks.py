"""Every cheap mistake is found before a picture is listed, and a file of another command names that command."""

import json

import pytest
import torch

import checkpoint
import compare
import condense
import eval
import models
import train
from config import from_tree, to_tree
from datasets import open as opening
from engine.comparison.study import load_study
from engine.training.checks import check_config
from errors import UserError
from tests.tiny_training import tiny_config, write_dataset
from yaml_files import dump_yaml

pytestmark = pytest.mark.usefixtures("one_thread")
TERM = {"teacher": "t", "loss": "mse", "weight": 1.0, "student_maps": ["p3"], "adapter": "conv1x1"}
TEACHER = {"name": "t", "arch": "yolov5nu"}
MOBILENET = "fasterrcnn_mobilenet_v3_small"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of YOLOv5nu, and files that are none."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    state = {"arch": "yolov5nu", "names": ["green", "red"], "image_size": 64}
    checkpoint.save(folder / "yolov5nu.pt", state | {"ema": models.build("yolov5nu", 2).state_dict()})
    (folder / "text.pt").write_text("no weights")
    (folder / "damaged.pt").write_bytes((folder / "yolov5nu.pt").read_bytes()[:-5000])
    (folder / "backbones").mkdir()
    (folder / "backbones" / "mobilenet_v3_small-12345678.pth").write_text("no weights")
    return folder


@pytest.fixture
def no_data(monkeypatch):
    """Whoever opens a dataset fails."""

    def fail(*args, **kw):
        raise AssertionError("a dataset was opened")

    import engine.condensing.real_pictures
    from engine.training import splits

    for module in (opening, splits, compare, engine.condensing.real_pictures):
        monkeypatch.setattr(module, "open_dataset", fail)


def with_teacher(files, term=None, **changes):
    teacher = TEACHER | {"weights": str(files / "yolov5nu.pt")} | changes
    return {"teachers": [teacher], "terms": [TERM | (term or {})]}


MISTAKES = {
    "unknown student": (lambda f: {"student": {"arch": "yolo9t"}}, r"'student.arch': architecture 'yolo9t' is unknown"),
    "no such weights": (lambda f: {"student": {"weights": "no.pt"}}, "'student.weights': no.pt: no such file"),
    "a released file": (lambda f: {"student": {"weights": "yolov8n.pt"}}, "no such .* datasets.download yolov8n"),
    "a folder without weights": (lambda f: {"student": {"weights": str(f)}}, "'student.weights': .*: no checkpoint in"),
    "a name above": (lambda f: {"name": "../up"}, r"key 'name': found '\.\./up', expected the name of a folder"),
    "weights that are none": (lambda f: {"student": {"weights": str(f / "text.pt")}}, "'student.weights': .*text.pt"),
    "damaged weights": (lambda f: {"student": {"weights": str(f / "damaged.pt")}}, "'student.weights': .*damaged.pt"),
    "weights of another": (lambda f: {"student": {"weights": str(f / "yolov5nu.pt")}}, "holds yolov5nu, expected"),
    "no such backbone": (
        lambda f: {"student": {"arch": MOBILENET, "backbone_weights": "no"}},
        "'student.backbone_weights': no: no such file",
    ),
    "a backbone that is none": (
        lambda f: {"student": {"arch": MOBILENET, "backbone_weights": str(f / "backbones")}},
        "'student.backbone_weights': .*mobilenet_v3_small-12345678.pth",
    ),
    "a backbone without one": (
        lambda f: {"student": {"backbone_weights": str(f)}},
        "'student.backbone_weights': yolov8_narrow has no released backbone",
    ),
    "frozen fresh norms": (lambda f: {"student": {"arch": MOBILENET, "frozen_norms": True}}, "'student.frozen_norms'"),
    "unknown teacher": (lambda f: with_teacher(f, arch="resnet"), "'teachers.0.arch': .*'resnet' is unknown"),
    "a teacher's file": (lambda f: with_teacher(f, weights="no.pt"), "'teachers.0.weights': no.pt: no such file"),
    "a teacher's run": (
        lambda f: with_teacher(f, arch="yolov8s", weights="runs/big/weights/last.pt"),
        r"'teachers.0.weights': runs/big/weights/last.pt: no such file, expected weights of yolov8s; that run is to be",
    ),
    "a teacher's run by its folder": (
        lambda f: with_teacher(f, arch="yolov8s", weights="runs/big"),
        "'teachers.0.weights': runs/big: no such file, expected weights of yolov8s; that run is to be trained first",
    ),
    "another teacher's file": (lambda f: with_teacher(f, arch="yolov8n"), "'teachers.0.weights': .*holds yolov5nu"),
    "a teacher's size": (
        lambda f: with_teacher(f, image_size=0),
        "'teachers.0.image_size': found 0, expected a multiple of",
    ),
    "a teacher without a term": (lambda f: with_teacher(f) | {"terms": []}, "no term names the teacher 't'"),
    "a term's teacher": (lambda f: with_teacher(f, {"teacher": "x"}), "'teachers.0.name'|terms.0.teacher"),
    "a term's loss": (lambda f: with_teacher(f, {"loss": "mze"}), "terms.0.loss: found 'mze', expected one of"),
    "a term's parameter": (lambda f: with_teacher(f, {"parameters": {"tau": 1}}), "terms.0.parameters: found 'tau'"),
    "a term's weight": (lambda f: with_teacher(f, {"weight": -1.0}), "terms.0.weight: found -1"),
    "a term's schedule": (lambda f: with_teacher(f, {"stop_epoch": 0}), "terms.0.stop_epoch: found 0"),
    "a term's maps": (lambda f: with_teacher(f, {"student_maps": []}), "terms.0.student_maps: found none"),
    "two names": (lambda f: with_teacher(f) | {"terms": [TERM, TERM]}, "terms.1: the name 'mse_t' is used twice"),
    "weighting": (lambda f: with_teacher(f) | {"teacher_weighting": "confidence"}, "'teacher_weighting': confidence"),
    "kept outputs": (lambda f: {"teacher_cache_gigabytes": -1.0}, "'teacher_cache_gigabytes': found -1.0, expected"),
    "device": (lambda f: {"device": "cuda:99"}, "'device': found 'cuda:99'"),
    "batch": (lambda f: {"batch_size": 0}, "'batch_size': found 0, expected at least 1"),
    "epochs": (lambda f: {"epochs": 0}, "'epochs': found 0, expected at least 1"),
    "size": (lambda f: {"image_size": 50}, "'image_size': found 50"),
    "accumulate": (lambda f: {"optimizer": {"accumulate": 0}}, "'optimizer.accumulate': found 0"),
    "nothing but itself": (
        lambda f: {"detection_weight": 0.0, "terms": [{"teacher": "student", "loss": "last_layer", "weight": 1}]},
        "'detection_weight': found 0.0, expected a number above 0",
    ),
    "rate": (lambda f: {"optimizer": {"learning_rate": 0.0}}, "'optimizer.learning_rate': found 0.0"),
    "rate of the backbone": (
        lambda f: {"optimizer": {"backbone_factor": 0.0}},
        "'optimizer.backbone_factor': found 0.0, expected a number above 0",
    ),
    "a term's warm-up": (lambda f: with_teacher(f, {"warmup_epochs": -1.0}), "terms.0.warmup_epochs: found -1.0"),
    "a term without end of warm-up": (
        lambda f: with_teacher(f, {"warmup_epochs": float("inf")}),
        "terms.0.warmup_epochs: found inf, expected a number of epochs",
    ),
    "a term that turns round": (
        lambda f: with_teacher(f, {"decay": "linear", "final_fraction": -1.0}),
        r"terms.0.final_fraction: found -1.0, expected a number in 0\.\.1",
    ),
    "a teacher's epochs": (lambda f: with_teacher(f, epochs=-1), "'teachers.0.epochs': found -1, expected at least 1"),
    "seed": (lambda f: {"seed": -1}, "'seed': found -1, expected at least 0"),
    "infinite weight": (lambda f: {"detection_weight": float("inf")}, "'detection_weight': found inf"),
    "a rate below 0": (lambda f: {"optimizer": {"final_fraction": -1.0}}, "'optimizer.final_fraction': found -1.0"),
    "a bias rate below 0": (
        lambda f: {"optimizer": {"warmup_bias_learning_rate": -0.1}},
        "'optimizer.warmup_bias_learning_rate': found -0.1, expected at least 0",
    ),
    "momentum": (lambda f: {"optimizer": {"momentum": -0.5}}, "'optimizer.momentum': found -0.5, expected a number of"),
    "no momentum": (
        lambda f: {"optimizer": {"warmup_momentum": float("nan")}},
        "'optimizer.warmup_momentum': found nan, expected a number of 0 up to less than 1",
    ),
    "a mean that never moves": (lambda f: {"optimizer": {"ema_decay": 1.0}}, "'optimizer.ema_decay': found 1.0"),
    "a mean that runs away": (
        lambda f: {"optimizer": {"ema_ramp_steps": -5.0}},
        "'optimizer.ema_ramp_steps': found -5.0, expected at least 0",
    ),
    "evaluation": (lambda f: {"evaluation": {"batch_size": 0}}, "'evaluation.batch_size': found 0"),
    "threshold": (lambda f: {"evaluation": {"iou_threshold": 1.5}}, "'evaluation.iou_threshold': found 1.5"),
    "pseudo boxes without suppression": (
        lambda f: {
            "teachers": [{"name": "t", "arch": "rtdetr_r18vd", "weights": "random"}],
            "data": {"unlabelled": {"root": str(f), "pseudo": {"teacher": "t", "iou_threshold": 0.5}}},
        },
        "'data.unlabelled.pseudo.iou_threshold': found 0.5, but boxes of rtdetr_r18vd are not suppressed",
    ),
    "workers": (lambda f: {"data": {"workers": -1}}, "'data.workers': found -1"),
    "holdout": (lambda f: {"data": {"holdout_fraction": 1.0}}, "'data.holdout_fraction': found 1.0"),
    "format": (lambda f: {"data": {"train_format": "voc"}}, "'data.train_format': found voc without data.train_root"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_found_before_any_picture_is_listed(files, tmp_path, no_data, mistake):
    changes, message = MISTAKES[mistake]
    if mistake == "device" and torch.cuda.device_count() > 99:
        pytest.skip("this machine has it")
    config = tiny_config(tmp_path / "absent", tmp_path / "runs", **changes(files))
    for start in (lambda: train.run(config, quiet=True), lambda: train.dry_run(config)):
        with pytest.raises(UserError, match=message) as raised:
            start()
        assert raised.value.exit_code == 2 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "mistake", ["unknown student", "weights of another", "a teacher's file", "a term's loss", "rate"]
)
def test_compare_finds_them_in_every_row(files, tmp_path, no_data, mistake):
    changes, message = MISTAKES[mistake]
    tree = to_tree(tiny_config(tmp_path / "absent", tmp_path / "runs"))
    rows = {"good": None, "bad": changes(files)}
    tree["teachers"] = rows["bad"].pop("teachers", [])
    (tmp_path / "s.yaml").write_text(dump_yaml(tree | {"rows": rows}))
    with pytest.raises(UserError, match=f"row 'bad': .*({message})"):
        compare.main([str(tmp_path / "s.yaml")])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"method": "herding", "network": {"weights": "no.pt"}}, "'condense.network.weights': no.pt: no such file"),
        ({"method": "herding", "network": {"weights": "text.pt"}}, "text.pt"),
        ({"method": "gradient_matching", "arch": "yolo9t"}, "architecture 'yolo9t' is unknown"),
        ({"method": "gradient_matching", "seed": -1}, "'condense.seed': found -1, expected 0 or more"),
        (
            {"method": "gradient_matching", "matching": {"learning_rate": float("inf")}},
            "'condense.matching.learning_rate'",
        ),
        (
            {"method": "gradient_matching", "matching": {"pool": {"learning_rate": -1.0}}},
            "matching.pool.learning_rate'",
        ),
        (
            {"method": "gradient_matching", "matching": {"momentum": float("nan")}},
            "'condense.matching.momentum': found",
        ),
        ({"method": "linear_head", "network": {"weights": "no.pt"}, "head": {"ridge": -1.0}}, "'condense.head.ridge'"),
    ],
)
def test_condense_finds_them_too(files, tmp_path, no_data, section, message):
    tree = to_tree(tiny_config(tmp_path / "absent", tmp_path / "runs"))
    if section.get("network", {}).get("weights") == "text.pt":
        section = section | {"network": {"weights": str(files / "text.pt")}}
    (tmp_path / "c.yaml").write_text(dump_yaml(tree | {"condense": section | {"pictures": 2}}))
    with pytest.raises(UserError, match=message):
        condense.main([str(tmp_path / "c.yaml")])


# ------------------------------------------------------------------------------------------------- names that are near


def test_a_key_is_offered_only_where_it_is_near(tmp_path):
    tree = to_tree(tiny_config(tmp_path, tmp_path))
    config = lambda **changes: from_tree(type(tiny_config(tmp_path, tmp_path)), tree | changes, source="c.yaml")
    with pytest.raises(UserError, match=r"unknown key 'optimiser', did you mean 'optimizer'\?"):
        config(optimiser={})
    for key in ("alpha", "lr", "steps", "beta"):
        with pytest.raises(UserError) as raised:
            config(**{key: 1})
        assert f"unknown key {key!r}, expected one of name, data, student" in str(raised.value)
        assert "did you mean" not in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"'augment.rotate', expected one of mosaic, mixup, .*close_mosaic_epochs"):
        config(augment={"rotate": 3.0})
    with pytest.raises(UserError, match="architecture 'detr' is unknown, expected one of yolov8n"):
        models.build("detr", 2)


# ------------------------------------------------------------------------------------------- files of another command


@pytest.fixture
def study(tmp_path):
    """A study of three rows: alone, taught by a teacher that is trained in place, and on a synthetic set."""
    data = write_dataset(tmp_path / "data", train=8, test=4)
    teachers = [{"name": "t", "arch": "yolov5nu", "epochs": 1}]
    changes = {"epochs": 1, "batch_size": 4, "data": {"pictures_per_epoch": 4}, "teachers": teachers}
    tree = to_tree(tiny_config(data, tmp_path / "runs", name="study", **changes))
    rows = {"alone": None, "taught": {"terms": [TERM]}, "few": {"condense": {"method": "random", "pictures": 2}}}
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(tree | {"rows": rows}))
    return path


def test_a_study_names_the_commands_that_take_it(study):
    for command in (
        lambda: train.main([str(study)]),
        lambda: train.main([str(study), "--dry-run"]),
        lambda: eval.main(["m.pt", "--config", str(study)]),
    ):
        with pytest.raises(UserError) as raised:
            command()
        for part in (f"compare.py {study}", f"train.py {study} --row NAME", "alone, taught, few"):
            assert part in str(raised.value)
    with pytest.raises(UserError, match=r"condense.method=NAME, or --row NAME, one of alone, taught, few"):
        condense.main([str(study)])


def test_a_plain_config_names_train_and_one_with_a_set_condense(tmp_path):
    tree = to_tree(tiny_config(tmp_path, tmp_path))
    (tmp_path / "plain.yaml").write_text(dump_yaml(tree))
    (tmp_path / "set.yaml").write_text(dump_yaml(tree | {"condense": {"method": "random"}}))
    for name in ("plain.yaml", "set.yaml"):
        with pytest.raises(UserError, match=r"train\.py trains a config without them, and condense\.py"):
            compare.main([str(tmp_path / name)])
    with pytest.raises(UserError, match=r"condense\.py .*set\.yaml makes that set"):
        train.main([str(tmp_path / "set.yaml")])
    with pytest.raises(UserError, match=r"train\.py .*plain\.yaml trains a config without it"):
        condense.main([str(tmp_path / "plain.yaml")])


def test_one_row_is_the_run_that_compare_would_make(study, tmp_path, capsys, monkeypatch):
    train.main([str(study), "--row", "alone", "seed=3"])
    row = next(row for row in load_study(study, ["seed=3"]).rows if row.name == "alone")
    result = compare.find_finished(row)
    assert result.seeds == [3] and result.reports[3]["name"] == "alone_seed3"
    with pytest.raises(UserError, match="row 'alone' has a run here; continue with --resume"):
        train.main([str(study), "--row", "alone", "seed=3"])
    with pytest.raises(UserError, match=r"--row: found 'lone', expected one of alone, teacher_t, taught, few"):
        train.main([str(study), "--row", "lone"])
    with pytest.raises(UserError, match=r"its teacher 't' is not trained yet; .*--row teacher_t, .*--rows taught"):
        train.main([str(study), "--row", "taught"])
    with pytest.raises(UserError, match=r"the set of row 'few' is not made yet: condense.py .* --row few"):
        train.main([str(study), "--row", "few"])
    capsys.readouterr()
    dry = []
    monkeypatch.setattr(train, "dry_run", lambda config, teachers: dry.append((config, teachers)))
    train.main([str(study), "--row", "taught", "--dry-run"])
    assert "not trained yet, untrained models are used: t" in capsys.readouterr().out
    condense.main([str(study), "--row", "few"])
    train.main([str(study), "--row", "few", "--dry-run"])
    assert [(config.name, list(teachers)) for config, teachers in dry] == [("taught_seed0", ["t"]), ("few_seed0", [])]
    check_config(dry[1][0])


def test_rows_prints_those_rows(study, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare.plot, "write", lambda path, *_, **__: path)
    report = {
        "test": dict.fromkeys(("mAP50", "mAP50-95", "precision", "recall", "f1"), 0.5),
        "seconds": 1.0,
        "steps": 2,
    }
    report |= {"parameters": 3, "device": "cpu", "precision": "float32", "threads": 1, "torch": "2"}

    def run(config, **options):
        (tmp_path / "runs" / "study" / config.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "study" / config.name / "report.json").write_text(json.dumps(report))
        return report

    monkeypatch.setattr(compare.train, "run", run)
    compare.main([str(study)])
    assert "| few |" in capsys.readouterr().out
    compare.main([str(study), "--rows", "alone,taught"])
    printed = capsys.readouterr().out
    assert "| alone |" in printed and "| taught | alone |" in printed and "few" not in printed.split("# study")[1]
    assert "| few |" in (tmp_path / "runs" / "study" / "comparison.md").read_text()
    with pytest.raises(UserError, match="found 'x', 'y', expected some of alone, teacher_t, taught, few"):
        compare.main([str(study), "--rows", "x,alone,y"])
