"""Models of one class list measured on data of another: KITTI and VOC by the classes of COCO."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import eval
import models
from datasets.class_names import COCO, map_classes
from datasets.index import ANY_CLASS, DatasetIndex, Sample
from datasets.kitti import CLASSES as KITTI
from datasets.open import open_dataset
from datasets.voc import CLASSES as VOC
from engine.evaluation import measuring
from engine.evaluation.cross_dataset import CommonClasses, map_index, on_common_classes
from metrics.tables import DetectionTable, ground_truth_from_samples
from structures import Detections


def box(x):
    return [10.0 * x, 0.0, 10.0 * x + 8.0, 8.0]


def street(*names):
    """An index of one picture with a box per name, side by side; DontCare as KITTI's reader has it."""
    labels = np.array([ANY_CLASS if name == "DontCare" else KITTI.index(name) for name in names])
    boxes, any_class = np.array([box(x) for x in range(len(names))]), labels == ANY_CLASS
    area = np.arange(1.0, 1 + len(names))
    sample = Sample("street.png", "street", 200, 100, boxes, labels, any_class.copy(), area, any_class.copy())
    return DatasetIndex(KITTI, (sample,), (), tuple(range(11, 19)), "kitti")


def average_precision(index, *found):
    """AP50 of each class, from (class name, position of its box, score)."""
    rows = [(index.names.index(name), box(place), score) for name, place, score in found]
    labels, boxes, scores = (np.array(column) for column in zip(*rows))
    table = DetectionTable(np.zeros(len(rows), dtype=np.int64), boxes, scores, labels)
    result = measuring.measure(ground_truth_from_samples(index.samples, index.names), table)
    return dict(zip(index.names, result.ap50.round(6)))


def test_objects_become_what_the_map_says():
    index = street("Car", "Van", "Pedestrian", "Person_sitting", "Cyclist", "Misc", "DontCare", "Tram")
    mapped = map_index(index, map_classes(KITTI, COCO))
    assert mapped.names == ("Car", "Truck", "Pedestrian+Person_sitting", "Tram")
    assert mapped.category_ids == (11, 13, 14, 17) and mapped.format == "kitti"
    (sample,) = mapped.samples
    assert sample.labels.tolist() == [0, 0, 1, 2, 2, 2, ANY_CLASS, 3]  # Misc is gone, the Van stands for two
    assert sample.ignore.tolist() == [False, True, True, False, False, True, True, False] == sample.crowd.tolist()
    assert sample.area.tolist() == [1, 2, 2, 3, 4, 5, 7, 8]
    assert sample.boxes_xyxy.tolist() == [box(x) for x in (0, 1, 1, 2, 3, 4, 6, 7)]
    assert index.samples[0].labels.tolist() == [0, 1, 3, 4, 5, 7, ANY_CLASS, 6]  # the index is as it was


def test_pictures_without_objects_stay():
    mapped = map_index(street("Misc"), map_classes(KITTI, COCO))
    (sample,) = mapped.samples
    assert len(sample) == 0 and sample.boxes_xyxy.shape == (0, 4) and sample.labels.dtype == np.int64


def test_difficult_objects_stay_difficult():
    boxes = np.array([box(0), box(1)])
    sample = Sample("a", "a", 90, 90, boxes, np.array([0, 1]), np.array([True, True]), np.ones(2))
    (mapped,) = map_index(DatasetIndex(("sofa", "lamp"), (sample,)), map_classes(("sofa", "lamp"), COCO)).samples
    assert mapped.ignore.tolist() == [True] and mapped.crowd.tolist() == [False]


def test_neighbours_and_dont_care_are_neither_rewarded_nor_punished():
    class_map = map_classes(KITTI, COCO)
    index = map_index(street("Car", "Van", "Cyclist", "DontCare", "Misc", "Pedestrian"), class_map)
    person = "Pedestrian+Person_sitting"
    right = [("Car", 0, 0.5), (person, 5, 0.5)]
    assert average_precision(index, *right)["Car"] == average_precision(index, *right)[person] == 1
    excused = [("Car", 1, 0.9), (person, 2, 0.9), ("Car", 3, 0.9), (person, 3, 0.9)]
    assert average_precision(index, *right, *excused)["Car"] == 1
    assert average_precision(index, *right, *excused)[person] == 1
    for wrong, name in ((("Car", 2, 0.9), "Car"), ((person, 1, 0.9), person), (("Car", 4, 0.9), "Car")):
        found = average_precision(index, *right, wrong)  # a car on a Cyclist, a person on a Van, a car on Misc
        assert found[name] == pytest.approx(0.5) and sum(found[n] == 1 for n in ("Car", person)) == 1


class Answers(nn.Module):
    """Detects the given labels in every picture, best first."""

    def __init__(self, labels):
        super().__init__()
        self.labels, self.settings = torch.tensor(labels), None

    def forward(self, images):
        return len(images)

    def detect(self, output, **settings):
        self.settings, count = settings, len(self.labels)
        boxes = torch.arange(count)[:, None] + torch.zeros(count, 4)
        return [Detections(boxes, torch.linspace(1, 0.5, count), self.labels)] * output


def test_answers_of_other_classes_are_dropped_and_take_no_places():
    dog, person, train = (COCO.index(name) for name in ("dog", "person", "train"))
    detector = Answers([dog, dog, person, dog, train, person])
    model = CommonClasses(detector, map_classes(KITTI, COCO))
    assert model.num_classes == 4
    settings = dict(score_threshold=0.1, iou_threshold=0.6)
    first, second = model.detect(model(torch.zeros(2, 3, 8, 8)), **settings, max_detections=2)
    assert first.labels.tolist() == [2, 3] == second.labels.tolist()
    assert first.boxes_xyxy[:, 0].tolist() == [2, 4] and len(first.scores) == 2
    assert detector.settings.pop("max_detections") > 300 and detector.settings == settings


def test_equal_lists_and_unnamed_models_are_left_alone():
    index, model = street("Car"), Answers([0])
    assert on_common_classes(model, index, KITTI) == (model, index, None)
    assert on_common_classes(model, index, tuple("01234567")) == (model, index, None)
    same, data, class_map = on_common_classes(model, index, tuple(name.upper() for name in KITTI))
    assert same is model and data is index and class_map.is_identity  # said, and nothing to do
    wrapped, data, class_map = on_common_classes(model, index, tuple("0123"), {"Van": "2"})
    assert isinstance(wrapped, CommonClasses) and data.names == ("Van",) and class_map.columns[1] == 2
    digits = replace(index, names=("1", "2", "0", "3", "4", "5", "6", "7"))  # numbers that are names on both sides
    assert on_common_classes(model, digits, tuple("01234567"))[2].columns[:3] == (1, 2, 0)


@pytest.fixture(scope="module")
def coco_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "coco.pt"
    torch.manual_seed(0)
    state = {"arch": "yolov8n", "names": list(COCO), "image_size": 64, "ema": models.build("yolov8n", 80).state_dict()}
    checkpoint.save(path, state)
    return path


def measured(arguments, tmp_path):
    out = tmp_path / "out.json"
    settings = ["--device", "cpu", "--batch-size", "25", "--max-detections", "20", "--json", str(out)]
    eval.main([*map(str, arguments), *settings])
    return json.loads(out.read_text())


@pytest.mark.usefixtures("one_thread")
def test_a_coco_model_on_kitti(coco_model, shared_data, tmp_path, capsys):
    root = shared_data / "kitti_mini"
    tree = measured([coco_model, "kitti", root, "frames", "--score-threshold", "0.0001"], tmp_path)
    names = ["Car", "Truck", "Pedestrian+Person_sitting", "Tram"]
    counts = {name: tree["per_class"][name]["instances"] for name in names}
    assert list(tree["per_class"]) == names and counts == dict(zip(names, (13, 1, 1, 0)))
    assert tree["images"] == 6 and 0 < tree["detections"] <= 6 * 20
    assert tree["class_map"]["dataset"]["Cyclist"] == "left out (person not judged there)"
    assert len(tree["class_map"]["model_left_out"]) == 76
    assert "8 classes of the dataset, 80 of the model, 4 evaluated" in capsys.readouterr().out
    forced = measured([coco_model, "kitti", root, "frames", "--class-map", "Misc=bus", "--class-map", "Car="], tmp_path)
    assert list(forced["per_class"]) == [*names[1:3], "Tram", "Misc"] and forced["per_class"]["Misc"]["instances"] == 1


@pytest.mark.usefixtures("one_thread")
def test_a_coco_model_on_voc(coco_model, shared_data, tmp_path, capsys):
    root = shared_data / "voc2012_100"
    tree = measured([coco_model, "voc", root, "default", "--protocol", "voc12"], tmp_path)
    index = open_dataset("voc", root, "default")
    assert tuple(index.names) == tuple(VOC) == tuple(tree["per_class"])
    labels = np.concatenate([sample.labels[~sample.ignore] for sample in index.samples])
    counts = [row["instances"] for row in tree["per_class"].values()]
    assert counts == np.bincount(labels, minlength=20).tolist() and tree["images"] == 100
    assert "aeroplane -> airplane" in capsys.readouterr().out
