import pytest

from errors import UserError
from models import ARCHITECTURES, build


def test_table_holds_every_name_once_and_builds_what_it_says():
    assert list(ARCHITECTURES) == [
        f"{family}{size}{suffix}"
        for family, suffix in [("yolov8", ""), ("yolov5", ""), ("yolov5", "u")]
        for size in ("n", "s", "m", "l", "x", *(["_narrow", "_half"] if family == "yolov8" else []))
    ] + ["yolov7_tiny"] + [
        f"fasterrcnn_{backbone}"
        for backbone in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet50_v2",
            "mobilenet_v3_small",
            "mobilenet_v3_large",
            "mobilenet_v3_large_320",
            "vit_tiny",
        )
    ] + ["rtdetr_l", "rtdetr_x", "rtdetr_r18vd", "rtdetr_r50vd"]
    small = build("yolov5nu", 4)
    assert small.num_classes == 4 and small.training


@pytest.mark.parametrize(
    "arch, nearest", [("yolov8", "yolov8n"), ("YOLOv5su", "yolov5su"), ("yolo8x", "yolov8x"), ("YOLOV8S", "yolov8s")]
)
def test_unknown_architecture_names_the_nearest(arch, nearest):
    with pytest.raises(UserError, match=f"did you mean '{nearest}"):
        build(arch, 80)


@pytest.mark.parametrize("num_classes", [0, -1])
def test_refuses_no_classes(num_classes):
    with pytest.raises(UserError, match="at least 1"):
        build("yolov8n", num_classes)


def test_an_older_name_leads_to_the_one_of_now():
    with pytest.raises(UserError, match="'yolov8p' is called 'yolov8_narrow' now"):
        build("yolov8p", 2)
