"""Class lists joined by meaning: every class of COCO, VOC and KITTI has a stated fate, and doubt is refused."""

import itertools

import pytest

from datasets.class_names import (
    COCO,
    COCO_GAPS,
    KIND_OF,
    NEAR,
    SAME,
    coco_by_id,
    map_classes,
    normalize_class_name,
    read_class_map,
    released_columns,
    released_names,
)
from datasets.kitti import CLASSES as KITTI
from datasets.open import open_dataset
from datasets.voc import CLASSES as VOC
from errors import UserError

VOC_TO_COCO = {name: name for name in VOC} | {
    "aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv",
    "diningtable": "dining table", "pottedplant": "potted plant",
}  # fmt: skip
KITTI_ON_COCO = {
    "Car": "-> car", "Truck": "-> truck", "Tram": "-> train", "Pedestrian": "-> person", "Person_sitting": "-> person",
    "Van": "left out (car and truck not judged there)", "Cyclist": "left out (person not judged there)",
    "Misc": "left out",
}  # fmt: skip
KITTI_ON_VOC = KITTI_ON_COCO | {"Truck": "left out", "Van": "left out (car not judged there)"}


def pairs(class_map):
    found = zip(class_map.dataset_names, class_map.columns)
    return {name: class_map.model_names[column] for name, column in found if column is not None}


def test_cocos_list_is_that_of_its_labels(shared_data):
    index = open_dataset("coco", shared_data / "coco128", "train2017")
    assert index.names == COCO and len(set(COCO)) == 80
    names = coco_by_id()
    assert len(names) == len(set(names)) == 90
    assert [names[category - 1] for category in index.category_ids] == list(COCO)
    assert [names[number - 1] for number in COCO_GAPS] == [f"N/A {number}" for number in COCO_GAPS]
    assert {*range(1, 91)} == {*index.category_ids} | {*COCO_GAPS}


def test_every_voc_class_is_one_of_cocos_and_back():
    there = map_classes(VOC, COCO)
    assert pairs(there) == VOC_TO_COCO and there.names == tuple(VOC) and not any(there.near)
    back = map_classes(COCO, VOC)
    assert pairs(back) == {coco: voc for voc, coco in VOC_TO_COCO.items()}
    assert list(back.fates().values()).count("left out") == 60


@pytest.mark.parametrize("model, fates", [(COCO, KITTI_ON_COCO), (VOC, KITTI_ON_VOC)], ids=["coco", "voc"])
def test_every_kitti_class_has_its_fate(model, fates):
    class_map = map_classes(KITTI, model)
    assert class_map.fates() == fates and set(fates) == set(KITTI)
    assert "Pedestrian+Person_sitting" in class_map.names
    assert len(class_map.evaluated) == len(set(pairs(class_map).values())) == len(class_map.names)


def test_a_narrower_class_of_the_model_does_not_stand_for_a_wider_one_of_the_dataset():
    assert pairs(map_classes(COCO, KITTI)) == {"car": "Car", "truck": "Truck"}  # person is more than Pedestrian
    assert pairs(map_classes(VOC, KITTI)) == {"car": "Car"}
    assert pairs(map_classes(VOC, KITTI, {"person": "Pedestrian"})) == {"car": "Car", "person": "Pedestrian"}


def test_a_model_that_knows_the_class_itself_is_asked_for_it():
    class_map = map_classes(KITTI, ("person", "car", "van", "person sitting"))
    assert pairs(class_map)["Van"] == "van" and pairs(class_map)["Person_sitting"] == "person sitting"
    benchmark = map_classes(KITTI, ("Car", "Pedestrian", "Cyclist"))  # its neighbours are the benchmark's own
    assert benchmark.fates()["Person_sitting"] == "left out (Pedestrian not judged there)"
    assert benchmark.fates()["Van"] == "left out (Car not judged there)"


def test_only_evaluated_classes_are_near():
    """Without a car in the dataset's list there is nothing to excuse."""
    class_map = map_classes(("Van", "Truck"), COCO)
    assert class_map.fates() == {"Van": "left out (truck not judged there)", "Truck": "-> truck"}


def test_the_order_of_the_dataset_is_the_order_of_the_labels():
    class_map = map_classes(("b", "x", "a"), ("a", "b", "c"))
    assert class_map.columns == (1, None, 0) and class_map.evaluated == (1, 0) and class_map.names == ("b", "a")
    assert not class_map.is_identity
    assert map_classes(("Potted Plant", "aeroplane"), ("potted-plant", "airplane")).is_identity
    assert not map_classes(("a",), ("a", "b")).is_identity


def test_what_is_said():
    lines = map_classes(KITTI, COCO).lines()
    assert lines[0].startswith("8 classes of the dataset, 80 of the model, 4 evaluated: Car -> car, Truck -> truck, ")
    assert lines[1].endswith("Van (car and truck not judged there), Cyclist (person not judged there), Misc")
    assert lines[2].endswith("76 classes")
    lines = map_classes(("a",), ("a", "b")).lines()
    assert lines[0].startswith("1 class of the dataset, 2 of") and lines[1].endswith(": none")
    assert lines[2].endswith(": 1 class")
    tree = map_classes(VOC, COCO).to_tree()
    assert tree["dataset"]["sofa"] == "-> couch" and len(tree["model_left_out"]) == 60
    assert "giraffe" in tree["model_left_out"] and "couch" not in tree["model_left_out"]


@pytest.mark.parametrize(
    "dataset, model, given, message",
    [
        (("sofa",), ("dog",), {}, "no class in common: the dataset has sofa; the model has dog"),
        (("sofa",), COCO[:50], {}, f"the model has {', '.join(COCO[:12])} and 38 more"),
        (("car",), ("Car", "c a r"), {}, "class 'car' of the dataset may be 'Car' and 'c a r' of the model"),
        (
            ("television",),
            ("tv", "tvmonitor"),
            {},
            "may be 'tv' and 'tvmonitor' of the model; choose by",
        ),
        (("Tram",), ("train", "Train"), {}, "class 'Tram' of the dataset may be 'train' and 'Train'"),
        (("car",), ("car",), {"bus": "car"}, "--class-map: found 'bus', expected of the dataset's classes one of car"),
        (("car",), ("car",), {"car": "bus"}, "--class-map: found 'bus', expected of the model's classes one of car"),
        (("car",), ("Car", "CAR"), {"car": "car"}, "expected of the model's classes exactly one of Car, CAR"),
        (("car",), ("car",), {"car": None}, "no class in common"),
        (("0", "1", "2"), ("1", "2", "3"), {}, "classes 0, 1, 2 and 1, 2, 3 may be names, or places in one list"),
    ],
)
def test_doubt_is_refused(dataset, model, given, message):
    with pytest.raises(UserError) as error:
        map_classes(dataset, model, given)
    assert message in str(error.value)


def test_what_is_given_settles_doubt():
    assert map_classes(("0", "1"), ("1", "2"), {"0": "1", "1": "2"}).columns == (0, 1)
    assert released_columns(("1", "2"), ("0", "1"), "a.pt", {"1": "0", "2": "1"}) == (0, 1)
    with pytest.raises(UserError, match=r"a\.pt: classes 1, 2 and 0, 1 may be names"):
        released_columns(("1", "2"), ("0", "1"), "a.pt")
    assert map_classes(("0", "1"), ("1", "0")).columns == (1, 0)  # digits in another order are names
    assert map_classes(("1", "2"), ("0", "1", "2")).columns == (1, 2)
    assert map_classes(("television",), ("tv", "tvmonitor"), {"television": "tvmonitor"}).columns == (1,)
    assert map_classes(("car", "sofa"), ("Car", "CAR", "couch"), {"car": None}).columns == (None, 2)
    assert map_classes(KITTI, COCO, {"Misc": "bus"}).fates()["Misc"] == "-> bus"
    excused = map_classes(KITTI, COCO, {"Person_sitting": None}).fates()["Person_sitting"]
    assert excused == "left out"  # COCO's person is no pedestrian


def test_the_arguments_are_read():
    assert read_class_map(["person=Pedestrian", "Misc="]) == {"person": "Pedestrian", "Misc": None}
    for wrong, message in ((["person"], "found 'person', expected"), (["=x"], "found '=x'"), (["a=b", "a=c"], "twice")):
        with pytest.raises(UserError, match=message):
            read_class_map(wrong)


def test_the_tables_do_not_contradict_themselves():
    words = [normalize_class_name(word) for group in SAME for word in group]
    assert len(words) == len(set(words))
    assert not set(map(normalize_class_name, KIND_OF)) & set(words)
    for kind, near in NEAR.items():
        assert KIND_OF.get(kind) not in near
    for a, b in itertools.permutations((VOC, COCO, KITTI), 2):
        map_classes(a, b)  # no doubt between the lists that are known


def test_names_of_released_files():
    assert released_names("fasterrcnn_resnet50", 90) == coco_by_id()
    assert released_names("rtdetr_r50vd", 80) == COCO
    for arch, count in (("fasterrcnn_resnet50", 80), ("rtdetr_r18vd", 365), ("yolov8n", 80), ("rtdetr_x", 80)):
        assert released_names(arch, count) == ()
