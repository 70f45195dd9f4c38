"""predict.py: which pictures are taken, boxes in their pixels, what the files hold, what happens to broken ones."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import models
import predict
from engine.prediction.sources import find_pictures
from errors import UserError
from tests.engine.prediction.colour_detector import NAMES, ColourDetector


def scene(width: int, height: int, red=None, blue=None) -> Image.Image:
    pixels = np.full((height, width, 3), 200, dtype=np.uint8)
    for box, color in ((red, (255, 0, 0)), (blue, (0, 0, 255))):
        if box is not None:
            pixels[box[1] : box[3], box[0] : box[2]] = color
    return Image.fromarray(pixels)


@pytest.fixture
def colour_model(monkeypatch):
    info = checkpoint.CheckpointInfo("colours", NAMES, 160)
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **kwargs: (ColourDetector(), info))


@pytest.mark.parametrize("size", [(160, 160), (320, 100), (75, 300), (1000, 700), (40, 33)])
def test_boxes_are_in_pixels_of_the_picture(size):
    width, height = size
    red = (width // 8, height // 4, width // 2, height * 3 // 4)
    blue = (width * 5 // 8, 0, width, height // 2)
    predictor = predict.Predictor(ColourDetector(), image_size=160)
    pictures = [np.asarray(scene(width, height, red, blue)), np.asarray(scene(60, 60))]
    found, nothing = predictor(pictures)
    step = max(1.0, max(size) / 160)  # one pixel of what the model saw
    np.testing.assert_allclose(found.boxes_xyxy.numpy(), [red, blue], atol=1.5 * step)
    assert (found.boxes_xyxy <= torch.tensor([width, height] * 2)).all() and (found.boxes_xyxy >= 0).all()
    assert found.labels.tolist() == [0, 1] and len(nothing) == 0


def test_writes_pictures_json_and_text(tmp_path, colour_model, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    scene(200, 100, red=(20, 40, 60, 80), blue=(100, 0, 200, 50)).save(tmp_path / "in" / "b.png")
    scene(100, 200).save(tmp_path / "in" / "deep" / "c.PNG")
    scene(80, 80, red=(0, 0, 80, 80)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    output = tmp_path / "out"
    code = predict.main(["weights.pt", str(tmp_path / "in"), "--output", str(output), "--json", "--txt"])
    assert code == 0
    assert "3 pictures, 3 detections (2 red thing, 1 blue thing), 0 skipped" in capsys.readouterr().out

    rows = json.loads((output / "predictions.json").read_text())
    assert [(row["image_id"], row["category_id"], row["category_name"]) for row in rows] == [
        (1, 0, "red thing"),
        (2, 0, "red thing"),
        (2, 1, "blue thing"),
    ]
    assert rows[1]["file_name"] == str(tmp_path / "in" / "b.png")
    np.testing.assert_allclose(rows[1]["bbox"], [20, 40, 40, 40], atol=2)  # x, y, width, height
    assert rows[1]["score"] == pytest.approx(0.9)

    lines = [line.split() for line in (output / "labels" / "b.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == ["0", "1"]
    np.testing.assert_allclose(np.float64(lines)[0, 1:], [0.2, 0.6, 0.2, 0.4, 0.9], atol=0.02)
    np.testing.assert_allclose(np.float64(lines)[1, 1:], [0.75, 0.25, 0.5, 0.5, 0.6], atol=0.02)
    assert (output / "labels" / "deep" / "c.txt").read_text() == ""

    for name, size in (("a", (80, 80)), ("b", (200, 100)), ("deep/c", (100, 200))):
        with Image.open(output / f"{name}.jpg") as drawn:
            assert drawn.size == size
    assert np.abs(np.asarray(Image.open(output / "deep" / "c.jpg")).astype(int) - 200).max() < 3  # nothing drawn
    assert np.asarray(Image.open(output / "b.jpg"))[:, :, 1].min() < 60  # boxes and letters are not grey


def test_broken_pictures_are_named_and_left_out(tmp_path, colour_model, capsys):
    scene(64, 64, red=(0, 0, 30, 30)).save(tmp_path / "good.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "words.txt").write_text("words")
    sources = [str(tmp_path), str(tmp_path / "words.txt")]
    code = predict.main(["w.pt", *sources, "--output", str(tmp_path / "out"), "--txt", "--batch-size", "1"])
    said = capsys.readouterr().out
    assert code == 1 and "1 picture, 1 detection (1 red thing), 3 skipped" in said
    for name in ("empty.jpg", "cut.png", "words.txt"):
        assert f"skipped: {tmp_path / name}: " in said
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        "good.jpg",
        "good.txt",
        "classes.txt",
    }


def test_finds_each_picture_once_under_a_name_of_its_own(tmp_path):
    for name in ("a.png", "a.jpg", "sub/a.png", "sub/b.JPEG", "other/a.png", "other/[x].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_pictures([str(tmp_path / "a.jpg"), str(tmp_path), str(tmp_path / "sub" / "*.png")])
    assert [str(picture.name) for picture in found] == ["a", "a-2", "other/[x]", "other/a", "sub/a", "sub/b"]
    assert len({picture.path for picture in found}) == 6
    assert [p.name.name for p in find_pictures([str(tmp_path / "other" / "[x].png")])] == ["[x]"]
    assert len(find_pictures([str(tmp_path / "**" / "a.*")])) == 4
    for source in (tmp_path / "absent", tmp_path / "no*match", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=source.name.replace("*", r"\*")):
            find_pictures([str(source)])


def test_never_overwrites_a_source(tmp_path, colour_model):
    scene(64, 64).save(tmp_path / "a.jpg")
    before = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(UserError, match="would overwrite"):
        predict.main(["w.pt", str(tmp_path), "--output", str(tmp_path)])
    assert (tmp_path / "a.jpg").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        predict.main(["w.pt", str(tmp_path / "a.jpg"), "--output", str(tmp_path / "file")])


def test_never_overwrites_labels(tmp_path, colour_model, monkeypatch):
    """In the layout of YOLO, labels/ of the data set is where --txt writes for --output DATASET."""
    for name in ("images/test/a.png", "labels/test/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
    scene(64, 64).save(tmp_path / "images/test/a.png")
    (tmp_path / "labels/test/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    monkeypatch.chdir(tmp_path / "images")
    for source in (str(tmp_path / "images"), "../images"):
        with pytest.raises(UserError, match=r"would overwrite .*labels/test/a\.txt, expected another folder"):
            predict.main(["w.pt", source, "--output", str(tmp_path), "--txt", "--no-pictures"])
    assert (tmp_path / "labels/test/a.txt").read_text() == "0 0.5 0.5 0.5 0.5\n"


@pytest.mark.parametrize("names", [NAMES, ("0", "1")])
def test_numbers_of_text_files_keep_their_meaning(tmp_path, colour_model, monkeypatch, names):
    """A list of classes for pictures that nobody has labelled yet, or of another model's predictions."""
    info = checkpoint.CheckpointInfo("colours", names, 160)
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **kwargs: (ColourDetector(), info))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "classes.txt").write_text("cat\ndog\n")
    scene(64, 64).save(tmp_path / "a.png")
    arguments = ["w.pt", str(tmp_path / "a.png"), "--output", str(tmp_path), "--txt", "--no-pictures"]
    message = rf"^--output .*: found the classes cat, dog in .*classes.txt, expected {names[0]}, {names[1]}, or another"
    with pytest.raises(UserError, match=message):
        predict.main(arguments)
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["classes.txt"]
    (tmp_path / "labels" / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    assert predict.main(arguments) == 0


@pytest.mark.parametrize(
    "option", [("--image-size", "100"), ("--score-threshold", "1.5"), ("--batch-size", "0"), ("--nms-iou", "x")]
)
def test_bad_options_are_usage_errors(option):
    with pytest.raises(UserError, match=f"argument {option[0]}: found '?{option[1]}'?, expected a") as stop:
        predict.parse_arguments(["w.pt", "a.jpg", *option])
    assert stop.value.exit_code == 2


def test_options_reach_the_detector(tmp_path, colour_model, capsys):
    scene(64, 64, red=(0, 0, 30, 30), blue=(40, 40, 60, 60)).save(tmp_path / "a.png")
    arguments = ["w.pt", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--quiet", "--no-pictures"]
    predict.main(arguments)
    assert capsys.readouterr().out.startswith("1 picture, 2 detections")
    predict.main([*arguments, "--score-threshold", "0.7"])
    predict.main([*arguments, "--max-detections", "1"])
    assert capsys.readouterr().out.count("1 detection (1 red thing)") == 2
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_ours(tmp_path):
    torch.manual_seed(0)
    model = models.build("yolov8n", num_classes=2)
    state = {"arch": "yolov8n", "names": list(NAMES), "image_size": 64, "ema": model.state_dict()}
    checkpoint.save(tmp_path / "last.pt", state)
    scene(90, 60, red=(0, 0, 30, 30)).save(tmp_path / "a.png")
    arguments = [str(tmp_path / "last.pt"), str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--json"]
    assert predict.main([*arguments, "--score-threshold", "0", "--max-detections", "7"]) == 0
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(rows) == 7 and {row["category_name"] for row in rows} <= set(NAMES)


def test_a_full_disk_is_one_line(tmp_path, colour_model, monkeypatch):
    scene(64, 64).save(tmp_path / "a.png")

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "a.jpg"))

    monkeypatch.setattr(predict, "draw_detections", lambda *args: SimpleNamespace(save=refuse))
    with pytest.raises(UserError, match=r"a\.jpg: could not be written: No space left on device") as error:
        predict.main(["w.pt", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")])
    assert error.value.exit_code == 5


@pytest.fixture
def predictions(tmp_path, colour_model):
    """(pictures in their order, predictions.json)"""
    (tmp_path / "in").mkdir()
    boxes = {"a": {}, "b": {"red": (20, 40, 60, 80), "blue": (100, 0, 200, 50)}, "c": {"red": (0, 0, 80, 80)}}
    for name, rectangles in boxes.items():
        scene(200, 100, **rectangles).save(tmp_path / "in" / f"{name}.png")
    predict.main(["weights.pt", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--json", "--no-pictures"])
    return sorted((tmp_path / "in").iterdir()), tmp_path / "out" / "predictions.json"


def test_pycocotools_reads_the_json_as_it_is(predictions):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    pictures, path = predictions
    truth = COCO()
    truth.dataset = {
        "images": [{"id": k, "file_name": str(p), "width": 200, "height": 100} for k, p in enumerate(pictures, 1)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES)],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 0, "bbox": [20, 40, 40, 40], "area": 1600, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 1, "bbox": [100, 0, 100, 50], "area": 5000, "iscrowd": 0},
            {"id": 3, "image_id": 3, "category_id": 0, "bbox": [0, 0, 80, 80], "area": 6400, "iscrowd": 0},
        ],
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(str(path)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[1] == pytest.approx(1)  # mAP50: every object at its place, under its class, in its picture


def test_the_json_follows_the_rules_of_fiftyones_reader(predictions):
    """Its add_coco_labels: a list; image_id is the sample's place from 1, category_id a key of docs/use.md's dict."""
    pictures, path = predictions
    rows, categories = json.loads(path.read_text()), dict(enumerate(NAMES))
    assert isinstance(rows, list) and rows
    of_sample = [[row for row in rows if row["image_id"] == place] for place in range(1, len(pictures) + 1)]
    assert [len(found) for found in of_sample] == [0, 2, 1] and sum(map(len, of_sample)) == len(rows)
    for picture, found in zip(pictures, of_sample):
        for row in found:
            assert type(row["category_id"]) is int and categories[row["category_id"]] == row["category_name"]
            assert row["file_name"] == str(picture) and 0 <= row["score"] <= 1
            x, y, width, height = row["bbox"]  # of the top-left corner, in pixels
            assert 0 <= x < x + width <= 200 and 0 <= y < y + height <= 100
            reserved = {"id", "area", "iscrowd", "segmentation", "keypoints", "attributes"}
            assert not reserved & set(row)
