"""One set of evaluation settings: in the config, report.json, metrics.csv, the checkpoint, eval.py and predict.py."""

import argparse
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import eval
import models
import predict
import retort
import train
from config import EvaluationConfig, to_tree
from datasets.open import open_dataset
from engine.evaluation import cross_dataset
from engine.evaluation.measuring import evaluate_model, measure
from engine.runtime import run_folder
from engine.training import building, reporting
from errors import UserError
from metrics.tables import DetectionTable, ground_truth_from_samples
from structures import DetectionSettings
from tests.tiny_training import SIZE, tiny_config, write_dataset
from yaml_files import dump_yaml

pytestmark = pytest.mark.usefixtures("one_thread", "small_second_stage")
MOBILENET = "fasterrcnn_mobilenet_v3_small"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("settings") / "data", train=8, test=6)


def numbers_of_eval(folder, *arguments):
    out = folder / "out.json"
    eval.main([*map(str, arguments), "--device", "cpu", "--json", str(out)])
    return json.loads(out.read_text())["numbers"]


def assert_same_numbers(found, expected):
    for name in ("precision", "recall", "mAP50", "mAP50-95"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6, nan_ok=True), name
    assert found["F1"] == pytest.approx(expected["f1"], abs=1e-6)


@pytest.mark.parametrize(
    ("arch", "evaluation"),
    [
        ("yolov8n", {}),
        ("yolov5n", {"score_threshold": 0.0001, "protocol": "voc12", "max_detections": 40}),
        (MOBILENET, {"score_threshold": 0.01}),
    ],
)
def test_eval_of_a_checkpoint_repeats_the_report(data, tmp_path, capsys, arch, evaluation):
    """Also the last row of metrics.csv, which is measured on the same split."""
    changes = {"epochs": 1, "precision": "bfloat16", "optimizer": {"warmup_epochs": 0.0, "learning_rate": 0.002}}
    settings = {"every_epochs": 1, "batch_size": 4} | evaluation
    config = tiny_config(data, tmp_path / "runs", student={"arch": arch}, evaluation=settings, **changes)
    report = train.run(config, quiet=True)
    expected = {name: np.nan if value is None else value for name, value in report["test"].items()}
    run = tmp_path / "runs" / "tiny"
    found = numbers_of_eval(tmp_path, run / "weights" / "last.pt", "yolo", data, "test")
    assert_same_numbers({k: np.nan if v is None else v for k, v in found.items()}, expected)
    used = EvaluationConfig(**settings).completed(models.published_detection(arch))
    assert f"NMS IoU {used.iou_threshold:g}, at most {used.max_detections}" in capsys.readouterr().out
    assert report["evaluation"] == to_tree(used)
    (row,) = run_folder.read_metrics(run / "metrics.csv")
    for name in ("mAP50", "mAP50-95"):
        assert float(row[f"metrics/{name}"]) == pytest.approx(report["test"][name], rel=1e-5)


def saved(path, arch, evaluation=None):
    torch.manual_seed(0)
    model = models.build(arch, 2)
    state = {"arch": arch, "names": ("green", "red"), "image_size": SIZE, "ema": model.state_dict()}
    config = {} if evaluation is None else {"config": {"evaluation": evaluation}}
    checkpoint.save(path, state | config)
    return model.eval()


@pytest.fixture
def used(monkeypatch):
    """What eval.py hands to evaluate_model, and what predict.py hands to its predictor; nothing is computed."""
    found = {}

    class Stop(Exception):
        pass

    def note(*args, **settings):
        found.update(settings | asdict(settings["detection"]))
        raise Stop

    monkeypatch.setattr(cross_dataset, "evaluate_model", note)
    monkeypatch.setattr(predict, "Predictor", note)

    def call(main, *arguments):
        found.clear()
        with pytest.raises(Stop):
            main([*map(str, arguments), "--device", "cpu"])
        return found

    return call


def test_a_file_without_settings_gets_those_of_its_family(data, tmp_path, used):
    expected = {"yolov8n": (0.001, 0.7, 300), MOBILENET: (0.05, 0.5, 100), "rtdetr_r18vd": (0.001, 1.0, 300)}
    picture = next((data / "images" / "test").iterdir())
    for arch, (score, iou, count) in expected.items():
        saved(tmp_path / "m.pt", arch)
        found = used(eval.main, tmp_path / "m.pt", "yolo", data, "test")
        assert (found["score_threshold"], found["iou_threshold"], found["max_detections"]) == (score, iou, count)
        assert found["protocol"] == "coco" and found["ignore_difficult"] is True and found["image_size"] == SIZE
        found = used(predict.main, tmp_path / "m.pt", picture, "--output", tmp_path / "found")
        assert (found["score_threshold"], found["iou_threshold"], found["max_detections"]) == (0.25, iou, count)


def test_a_flag_overrides_what_the_checkpoint_carries(data, tmp_path, used, capsys):
    carried = {"protocol": "voc07", "ignore_difficult": False, "score_threshold": 0.02, "iou_threshold": 0.4}
    saved(tmp_path / "m.pt", "yolov8n", carried | {"max_detections": 20, "batch_size": 3})
    found = dict(used(eval.main, tmp_path / "m.pt", "yolo", data, "test"))
    assert found.items() >= (carried | {"max_detections": 20, "batch_size": 3, "precision": "float32"}).items()
    flags = [
        "--protocol",
        "coco",
        "--ignore-difficult",
        "--nms-iou",
        "0.6",
        "--max-detections",
        "7",
        "--batch-size",
        "2",
    ]
    found = used(eval.main, tmp_path / "m.pt", "yolo", data, "test", *flags, "--image-size", "96")
    expected = {
        "protocol": "coco",
        "ignore_difficult": True,
        "iou_threshold": 0.6,
        "max_detections": 7,
        "batch_size": 2,
    }
    assert found.items() >= (expected | {"score_threshold": 0.02, "image_size": 96}).items()
    assert (
        "difficult objects ignored, 96 px, float32, scores from 0.02, NMS IoU 0.6, at most 7" in capsys.readouterr().out
    )
    picture = next((data / "images" / "test").iterdir())
    arguments = [tmp_path / "m.pt", picture, "--output", tmp_path / "found"]
    assert used(predict.main, *arguments)["iou_threshold"] == 0.4
    assert used(predict.main, *arguments, "--nms-iou", "0.0")["iou_threshold"] == 0.0


def test_an_experiment_comes_before_the_checkpoint(data, tmp_path, used):
    saved(tmp_path / "m.pt", MOBILENET, {"score_threshold": 0.3, "iou_threshold": 0.4})
    (tmp_path / "c.yaml").write_text(
        f"name: x\ndata: {{format: yolo, root: {data}}}\nstudent: {{arch: yolov8n}}\nimage_size: 64\n"
        "evaluation: {protocol: voc12, iou_threshold: 0.45}\n"
    )
    found = used(eval.main, tmp_path / "m.pt", "--config", tmp_path / "c.yaml")
    assert (found["protocol"], found["iou_threshold"], found["score_threshold"]) == ("voc12", 0.45, 0.05)


def test_a_key_that_no_checkpoint_has_is_named(data, tmp_path):
    saved(tmp_path / "m.pt", "yolov8n", {"scores": 0.3})
    with pytest.raises(UserError, match=r"evaluation\.scores"):
        eval.main([str(tmp_path / "m.pt"), "yolo", str(data), "test", "--device", "cpu"])


def test_rtdetr_without_suppression(data, tmp_path):
    model = saved(tmp_path / "m.pt", "rtdetr_r18vd", {"batch_size": 6})
    found = numbers_of_eval(tmp_path, tmp_path / "m.pt", "yolo", data, "test")
    index = open_dataset("yolo", data, "test")
    detection = DetectionSettings(0.001, 1.0, 300)
    expected = evaluate_model(model, index, detection, image_size=SIZE, batch_size=6).numbers
    assert found["mAP50-95"] == pytest.approx(expected["mAP50-95"], abs=1e-6)


def test_a_threshold_of_no_suppression_is_refused(data, tmp_path, monkeypatch):
    """Its numbers would be those of all boxes, under a line that states the threshold."""
    saved(tmp_path / "m.pt", "rtdetr_r18vd")
    file, place, found = str(tmp_path / "m.pt"), ("yolo", str(data), "test"), "found 0.5, but boxes of rtdetr_r18vd are"
    picture = str(next((data / "images" / "test").iterdir()))
    config = tiny_config(data, tmp_path / "runs", student={"arch": "rtdetr_r18vd"}, evaluation={"iou_threshold": 0.5})
    (tmp_path / "c.yaml").write_text(dump_yaml(to_tree(config)))
    model = retort.load(file, device="cpu")
    for what, call in {
        "--nms-iou": lambda: eval.main([file, *place, "--nms-iou", "0.5"]),
        "argument --nms-iou": lambda: predict.main(
            [file, picture, "--nms-iou", "0.5", "--output", str(tmp_path / "p")]
        ),
        "key 'evaluation.iou_threshold'": lambda: eval.main([file, "--config", str(tmp_path / "c.yaml")]),
        "argument iou": lambda: model.predict(picture, iou=0.5),
        "argument iou_threshold": lambda: retort.evaluate(model, *place, iou_threshold=0.5),
    }.items():
        with pytest.raises(UserError, match=f"^{what}: {found}"):
            call()
    with pytest.raises(UserError, match=f"^key 'evaluation.iou_threshold': {found}"):
        train.run(config, quiet=True)
    model.predict(picture, iou=1.0)


# ----------------------------------------------------------------------------------------------- difficult objects

VOC = """<annotation><size><width>64</width><height>64</height><depth>3</depth></size>{}</annotation>"""
OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path):
    """Two pictures; one object of three is difficult."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    objects = {"a": [("cat", 0, 5, 5, 30, 30), ("cat", 1, 40, 40, 60, 60)], "b": [("dog", 0, 10, 10, 50, 50)]}
    for stem, rows in objects.items():
        (root / "Annotations" / f"{stem}.xml").write_text(VOC.format("".join(OBJECT.format(*row) for row in rows)))
        Image.new("RGB", (64, 64)).save(root / "JPEGImages" / f"{stem}.jpg")
    (root / "ImageSets" / "Main" / "test.txt").write_text("a\nb\n")
    return root


class Taught(torch.nn.Module):
    """Finds exactly what training taught: every object that is not difficult."""

    num_classes = 2
    boxes = (((5 - 1, 5 - 1, 30, 30), 0), ((10 - 1, 10 - 1, 50, 50), 1))

    def forward(self, images):
        return len(images)

    def detect(self, output, **settings):
        from structures import Detections

        assert output == 2
        rows = [(torch.tensor([box], dtype=torch.float32), torch.tensor([label])) for box, label in self.boxes]
        return [Detections(boxes, torch.ones(1), labels) for boxes, labels in rows]


def test_difficult_objects_are_no_misses_unless_asked(voc, tmp_path, monkeypatch):
    index = open_dataset("voc", voc, "test")
    truth = ground_truth_from_samples(index.samples, index.names)
    taught = ~truth.difficult
    assert taught.sum() == 2 and len(taught) == 3
    table = DetectionTable(truth.image[taught], truth.boxes_xyxy[taught], np.ones(2), truth.labels[taught])
    assert measure(truth, table).numbers["mAP50-95"] == pytest.approx(1.0)
    assert measure(truth, table, ignore_difficult=False).numbers["recall"] == pytest.approx(0.75)

    # The training loop's own numbers, by the config.
    data = {"format": "voc", "root": str(voc), "train": "test", "test": "test"}
    for ignored, recall in ((True, 1.0), (False, 0.75)):
        config = tiny_config(voc, tmp_path, data=data, evaluation={"ignore_difficult": ignored})
        parts = argparse.Namespace(
            config=building.with_published_settings(config),
            processes=argparse.Namespace(device=torch.device("cpu"), rank=0, count=1),
            evaluation_loaders={},
        )
        numbers, _ = reporting.evaluate(parts, Taught(), index)
        assert numbers["recall"] == pytest.approx(recall)

    # eval.py with a model, and from files.
    saved(tmp_path / "m.pt", "yolov8n")
    monkeypatch.setattr(
        eval, "load_detector", lambda *args, **kw: (Taught(), checkpoint.CheckpointInfo("yolov8n", index.names, 64))
    )
    files = ["--ground-truth", voc / "Annotations", "--detections", tmp_path / "found"]
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "a.txt").write_text("cat 1.0 5 5 30 30\n")
    (tmp_path / "found" / "b.txt").write_text("dog 1.0 10 10 50 50\n")
    for arguments in (["m.pt", "voc", voc, "test", "--device", "cpu"], files):
        for flags, recall in (([], 1.0), (["--ignore-difficult"], 1.0), (["--no-ignore-difficult"], 0.75)):
            out = tmp_path / "out.json"
            eval.main([*map(str, arguments), *flags, "--json", str(out)])
            assert json.loads(out.read_text())["numbers"]["recall"] == pytest.approx(recall), (arguments, flags)
