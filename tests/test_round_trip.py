"""What predict.py and eval.py write, evaluated from files, gives the numbers of the model on its dataset."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint
import eval
import models
import predict
from datasets.letterbox import letterbox
from engine.prediction.predictor import Predictor
from structures import DetectionSettings

NAMES = ("traffic light", "1")  # a name of two words, and one that could be a place
PICTURES = ("0.png", "1.PNG", "a/0.png", "b/0.png", "b/v1.0 é.png", "b/x.png")
SIZE = 64
SETTINGS = ["--score-threshold", "0.001", "--nms-iou", "0.6", "--max-detections", "40", "--device", "cpu"]


def tiny_model(arch: str, pictures: list[np.ndarray]) -> nn.Module:
    """A model without training whose answers differ from picture to picture: its BatchNorms have seen these."""
    torch.manual_seed(0)
    model = models.build(arch, len(NAMES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images = torch.stack([torch.from_numpy(letterbox(picture, SIZE)[0]) for picture in pictures])
    with torch.no_grad():
        model.train()(images.permute(0, 3, 1, 2).float() / 255)
        for name, parameter in model.named_parameters():
            if name.startswith(tuple(model.class_head)) and parameter.dim() > 1 and len(parameter) <= 1 + len(NAMES):
                parameter *= 20.0  # scores that are apart
    return model.eval()


def write_sets(folder, boxes_of) -> None:
    """One set as YOLO's text, as COCO's JSON (ids in another order) and as VOC's XML; boxes are continuous corners."""
    yolo, coco = folder / "yolo", {"images": [], "annotations": [], "categories": []}
    coco["categories"] = [{"id": 2 + k, "name": name} for k, name in enumerate(NAMES)]
    for number, (name, (width, height, rows)) in enumerate(boxes_of.items()):
        stem = name.rpartition(".")[0]
        label_path, xml_path = yolo / "labels" / f"{stem}.txt", folder / "voc" / f"{stem}.xml"
        for path in (label_path, xml_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        coco["images"].append({"id": 40 - number, "file_name": name, "width": width, "height": height})
        lines, objects = [], []
        for label, (x1, y1, x2, y2) in rows:
            center = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{label} " + " ".join(f"{value:.12f}" for value in center))
            row = {"image_id": 40 - number, "category_id": 2 + label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            coco["annotations"].append(row | {"id": len(coco["annotations"])})
            corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            objects.append(f"<object><name>{NAMES[label]}</name><bndbox>{corners}</bndbox></object>")
        label_path.write_text("\n".join(lines))
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        xml_path.write_text(f"<annotation>{size}{''.join(objects)}</annotation>", encoding="utf-8")
    (yolo / "data.yaml").write_text(f"train: images\ntest: images\nnames: {json.dumps(NAMES)}\n")
    (folder / "gt.json").write_text(json.dumps(coco))


@pytest.mark.parametrize("arch", ["yolov8n", "fasterrcnn_mobilenet_v3_small"])
def test_files_of_predict_and_eval_give_the_numbers_of_the_model(tmp_path, arch):
    rng = np.random.default_rng(3)
    images = tmp_path / "yolo" / "images"
    pictures = {name: rng.integers(0, 255, (*rng.integers(48, 80, 2), 3), dtype=np.uint8) for name in PICTURES}
    for name, pixels in pictures.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(images / name, format="PNG")
    model = tiny_model(arch, list(pictures.values()))
    found = Predictor(model, image_size=SIZE, detection=DetectionSettings(0.001, 0.6))(list(pictures.values()))
    boxes_of, seen = {}, Counter()
    for (name, pixels), detections in zip(pictures.items(), found):  # the truth: some of what it finds, moved a little
        height, width = pixels.shape[:2]
        rows = []
        for box, _, label in list(detections)[:8:2]:
            x1, y1, x2, y2 = np.round(box.numpy() + rng.uniform(-3, 3, 4)).clip(0, [width, height] * 2).tolist()
            if x2 > x1 + 1 and y2 > y1 + 1:  # VOC's readers take one pixel for a point
                rows.append((int(label), (x1, y1, x2, y2)))
        rows = list(dict.fromkeys(rows))  # of equal rows YOLO's format keeps one
        boxes_of[name] = (width, height, rows)
        seen.update(label for label, _ in rows)
    scores = [score for detections in found for score in set(detections.scores.tolist())]
    assert len(seen) == 2 and len(set(scores)) == len(scores)  # ties between images go by the order of the images
    write_sets(tmp_path, boxes_of)
    weights = tmp_path / "m.pt"
    checkpoint.save(weights, {"arch": arch, "names": NAMES, "image_size": SIZE, "ema": model.state_dict()})

    def numbers(*arguments) -> dict[str, float]:
        eval.main([*map(str, arguments), "--json", str(tmp_path / "out.json")])
        tree = json.loads((tmp_path / "out.json").read_text())
        return tree["numbers"] | {"detections": tree["detections"], "images": tree["images"]}

    saved = tmp_path / "saved.json"
    own = numbers(weights, "yolo", tmp_path / "yolo", *SETTINGS, "--save-detections", saved)
    assert 0.05 < own["mAP50-95"] < own["mAP50"] < 0.95  # a number that a wrong picture, class or order would move
    predict.main(
        [str(weights), str(images), "--output", str(tmp_path / "p"), "--json", "--txt", "--no-pictures", *SETTINGS]
    )
    labels = ["--ground-truth", tmp_path / "yolo" / "labels", "--names", tmp_path / "yolo" / "data.yaml"]
    labels += ["--images", images, "--ground-truth-boxes", "cxcywhn"]
    truths = (labels, ["--ground-truth", tmp_path / "gt.json"], ["--ground-truth", tmp_path / "voc"])
    text = ["--detections", tmp_path / "p" / "labels", "--detection-boxes", "cxcywhn", "--score-last"]
    for truth in truths:
        for detections in (["--detections", tmp_path / "p" / "predictions.json"], text, ["--detections", saved]):
            assert numbers(*truth, *detections) == pytest.approx(own, abs=1e-6), (truth, detections)
