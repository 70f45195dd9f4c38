"""eval.py: files without a model, a checkpoint on a dataset; what is printed, written and refused."""

import json
import sys

import numpy as np
import pytest
import torch

import checkpoint
import eval
import models
from datasets import open_dataset
from datasets.convert import convert
from engine.evaluation import measuring
from errors import UserError, run_script
from structures import DetectionSettings
from tests.test_fine_tuning import released_state
from tests.tiny_training import write_dataset

# ------------------------------------------------------------------------------------------- files, without a model


@pytest.fixture
def voc_files(shared_data):
    folder = shared_data / "voc2012_100"
    found = folder / "detections" / "abs_xyx2y2"
    return ["--ground-truth", str(folder / "Annotations"), "--detections", str(found)]


def test_voc_oracle_from_the_command_line(voc_files, shared_data, tmp_path, capsys):
    oracle = json.loads((shared_data / "evaluator_oracles" / "voc2012_100_expected.json").read_text())
    out = tmp_path / "out.json"
    for protocol, key in (("voc07", "voc07_11pt"), ("voc12", "voc_area")):
        expected = oracle["plus_one_pixel_convention"][key]
        eval.main([*voc_files, "--protocol", protocol, "--json", str(out)])
        tree = json.loads(out.read_text())
        assert tree["numbers"]["AP50"] == pytest.approx(expected["mAP"], abs=1e-9)
        got = {name: row["AP50"] for name, row in tree["per_class"].items()}
        assert got == pytest.approx(expected["per_class_AP"], abs=1e-9)
        assert f"IoU=0.50 = {expected['mAP']:.4f}" in capsys.readouterr().out
        eval.main([*voc_files, "--protocol", protocol, "--json", str(out), "--pixels", "continuous"])
        assert json.loads(out.read_text())["numbers"]["AP"] < tree["numbers"]["AP"] - 1e-3
    eval.main([*voc_files, "--json", str(out), "--no-ignore-difficult"])
    tree = json.loads(out.read_text())
    expected = oracle["coco_metric_difficult_counted_as_normal"]
    assert {key: tree["numbers"][key] for key in expected} == pytest.approx(expected, abs=1e-9)


def test_seven_image_oracle_from_the_command_line(shared_data, tmp_path):
    folder, out = shared_data / "evaluator_oracles" / "voc_toy_7images", tmp_path / "out.json"
    arguments = ["--ground-truth", str(folder / "groundtruths"), "--detections", str(folder / "detections")]
    arguments += ["--detection-boxes", "xywh", "--iou-thresholds", "0.3", "--json", str(out), "--protocol"]
    expected = json.loads((folder / "expected.json").read_text())
    for protocol, key in (("voc07", "AP_11_point"), ("voc12", "AP_every_point")):
        eval.main([*arguments, protocol])
        assert json.loads(out.read_text())["numbers"]["AP30"] == pytest.approx(expected[key], abs=1e-9)


def test_coco_oracle_and_what_is_printed(shared_data, tmp_path, capsys):
    folder, out = shared_data / "evaluator_oracles" / "coco_val2014_100", tmp_path / "out.json"
    truth, found = folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json"
    eval.main(["--ground-truth", str(truth), "--detections", str(found), "--protocol", "coco", "--json", str(out)])
    tree = json.loads(out.read_text())
    expected = json.loads((folder / "expected.json").read_text())["expected"]
    assert {key: tree["numbers"][key] for key in expected} == pytest.approx(expected, abs=1e-9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(" Average ") for line in lines[:13]] == [True] * 12 + [False]
    assert [line.split("=")[1].strip() for line in lines[12:22]] == [f"{t / 100:.2f}" for t in range(50, 100, 5)]
    header = next(n for n, line in enumerate(lines) if line.split()[:1] == ["Class"])
    assert lines[header].split() == ["Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95"]
    assert lines[header + 1].split()[:3] == ["all", "100", "830"]  # 839 less 9 crowd
    assert len(lines[header + 1 : lines.index("", header)]) == 81
    assert lines[-1] == f"written: {out}" and list(tmp_path.iterdir()) == [out]
    assert np.array(tree["confusion"]["counts"]).shape == (81, 81)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "found no input"),
        (["--ground-truth", "x"], "together"),
        (["--ground-truth", "absent.json", "--detections", "absent.json"], r"absent\.json: No such file"),
        (["--ground-truth", "x", "--detections", "y", "--iou-thresholds", "0.5", "0.4"], "expected rising"),
        (["--ground-truth", "x", "--detections", "y", "--iou-thresholds", "0.5", "1.5"], r"rising numbers in 0\.\.1"),
        (
            ["--ground-truth", "x", "--detections", "y", "--score-threshold", "0.5"],
            "^--score-threshold: has no meaning",
        ),
        (["--ground-truth", "x", "--detections", "y", "--class-map", "a=b"], "^--class-map: has no meaning"),
        (["--ground-truth", "x", "--detections", "y", "--report-score", "25"], r"^--report-score: found 25, .* 0\.\.1"),
        (["absent.pt", "voc", "absent", "--pixels", "inclusive"], "^--pixels: has no meaning with a checkpoint"),
        (["absent.pt", "voc", "absent", "--iou-thresholds", "0.5"], "^--iou-thresholds: has no meaning"),
        (["absent.pt", "voc", "absent"], "absent"),
        (["absent.pt", "word", "here"], r"found 'word here', expected voc\|coco"),
        (["absent.pt"], "found 'nothing', expected voc"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        eval.main(arguments)
    assert "\n" not in str(error.value)


def test_script_ends_with_one_line_and_code_two(tmp_path, monkeypatch, capsys):
    (tmp_path / "gt.json").write_text("[]")
    arguments = ["--ground-truth", str(tmp_path / "gt.json"), "--detections", str(tmp_path / "gt.json")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_script(eval.main)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and "gt.json" in printed.err


def test_ctrl_c_is_no_traceback(capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_script(interrupt)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("folder", ["no", "file"])
def test_json_that_cannot_be_written_is_the_disk_before_anything_is_measured(tmp_path, capsys, folder):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written") as error:
        eval.main(["--ground-truth", "gt", "--detections", "dt", "--json", str(tmp_path / folder / "x.json")])
    assert error.value.exit_code == 5 and not capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- with a checkpoint


def test_checkpoint_on_a_dataset(tmp_path, capsys):
    root, weights, out = write_dataset(tmp_path / "data"), tmp_path / "m.pt", tmp_path / "out.json"
    torch.manual_seed(0)
    model = models.build("yolov8n", 2)
    state = {"arch": "yolov8n", "names": ("green", "red"), "image_size": 64, "ema": model.state_dict()}
    checkpoint.save(weights, state)
    settings = ["--device", "cpu", "--batch-size", "3", "--json", str(out), "--max-detections", "50"]
    settings += ["--score-threshold", "0.0001"]
    found = tmp_path / "found.json"
    eval.main([str(weights), "yolo", str(root), "test", *settings, "--save-detections", str(found)])
    with pytest.raises(UserError, match=r"--json: found .*out\.json, which --save-detections names too"):
        eval.main([str(weights), "yolo", str(root), "test", *settings, "--save-detections", f"{tmp_path}/./out.json"])
    tree = json.loads(out.read_text())
    assert tree["images"] == 8 and 0 < tree["detections"] == len(json.loads(found.read_text())) <= 8 * 50
    assert "Speed: loading" in capsys.readouterr().out
    # The same from Python, and a config in place of the dataset.
    index = open_dataset("yolo", root, "test")
    detection = DetectionSettings(score_threshold=0.0001, max_detections=50)
    again = measuring.evaluate_model(model, index, detection, image_size=64, batch_size=8)
    assert len(again.detections) == tree["detections"]
    config = tmp_path / "c.yaml"
    config.write_text(
        f"name: x\ndata: {{format: yolo, root: {root}}}\nstudent: {{arch: yolov8n}}\nimage_size: 64\ndevice: cpu\n"
    )
    arguments = [str(weights), "--config", str(config), "evaluation.max_detections=50"]
    eval.main([*arguments, "evaluation.score_threshold=0.0001", "--json", str(out)])
    assert json.loads(out.read_text())["detections"] == tree["detections"]
    # Classes in another order are found by name; others are refused.
    first = {(row["category_id"], row["score"]) for row in json.loads(found.read_text())}
    checkpoint.save(weights, state | {"names": ("red", "green")})
    eval.main([str(weights), "yolo", str(root), "test", *settings, "--save-detections", str(found)])
    assert {(1 - row["category_id"], row["score"]) for row in json.loads(found.read_text())} == first
    assert "2 of the model, 2 evaluated: green, red" in capsys.readouterr().out
    checkpoint.save(weights, state | {"names": ("blue", "violet")})
    with pytest.raises(UserError, match="no class in common: the dataset has green, red; the model has blue, violet"):
        eval.main([str(weights), "yolo", str(root), "test", *settings])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--image-size", "50"),
        ("--image-size", "0"),
        ("--batch-size", "0"),
        ("--workers", "-1"),
        ("--max-detections", "0"),
        ("--score-threshold", "7"),
        ("--nms-iou", "-0.1"),
    ],
)
def test_settings_that_nothing_can_be_measured_with_are_refused(tmp_path, flag, value):
    weights = tmp_path / "m.pt"
    state = models.build("yolov8n", 2).state_dict()
    checkpoint.save(weights, {"arch": "yolov8n", "names": ("green", "red"), "image_size": 64, "ema": state})
    with pytest.raises(UserError, match=f"^{flag}: found {value}, expected"):
        eval.main([str(weights), "yolo", str(tmp_path), "test", "--device", "cpu", flag, value])


def test_a_split_of_difficult_objects_alone_is_refused_where_they_do_not_count(tmp_path):
    root, weights = write_dataset(tmp_path / "data"), tmp_path / "m.pt"
    convert("yolo", root, ["test"], "voc", tmp_path / "voc")
    for path in (tmp_path / "voc" / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<difficult>0<", "<difficult>1<"))
    model = models.build("yolov8n", 2)
    checkpoint.save(
        weights, {"arch": "yolov8n", "names": ("green", "red"), "image_size": 64, "ema": model.state_dict()}
    )
    arguments = [str(weights), "voc", str(tmp_path / "voc"), "test", "--device", "cpu"]
    for flags in ([], ["--protocol", "voc12", "--no-ignore-difficult"]):
        with pytest.raises(UserError, match=r"8 pictures and not one object.* to be ignored, and no others"):
            eval.main([*arguments, *flags])
    eval.main([*arguments, "--no-ignore-difficult"])


def test_names_of_a_file_name_the_classes_of_a_bare_state_dict(tmp_path, capsys):
    root, weights, out = write_dataset(tmp_path / "data"), tmp_path / "bare.pt", tmp_path / "out.json"
    torch.manual_seed(0)
    torch.save(released_state(models.build("yolov8n", 2)), weights)
    names, found = tmp_path / "classes.txt", tmp_path / "found.json"
    arguments = [str(weights), "yolo", str(root), "test", "--arch", "yolov8n", "--device", "cpu", "--image-size", "64"]
    arguments += ["--score-threshold", "0.0001", "--max-detections", "20", "--save-detections", str(found)]

    def labels_and_scores() -> list[tuple[str, float]]:
        return sorted((row["category_name"], row["score"]) for row in json.loads(found.read_text()))

    eval.main([*arguments, "--json", str(out)])  # without names classes go by their place
    by_place = labels_and_scores()
    assert json.loads(out.read_text())["class_map"] is None and len({name for name, _ in by_place}) == 2
    names.write_text("red\ngreen\n")
    eval.main([*arguments, "--names", str(names), "--json", str(out)])
    assert json.loads(out.read_text())["class_map"]["dataset"] == {"green": "-> green", "red": "-> red"}
    other = {"green": "red", "red": "green"}
    assert labels_and_scores() == sorted((other[name], score) for name, score in by_place)
    assert "names the model's classes" not in capsys.readouterr().out
    (root / "more.yaml").write_text("names: {0: green, 1: red}\n")
    assert eval.name_classes(("0", "1"), root / "more.yaml") == ("green", "red")
    assert eval.name_classes(("cat", "dog"), names) == ("red", "green")
    assert "names the model's classes red, green; its file names them cat, dog" in capsys.readouterr().out
    names.write_text("green\nred\nblue\n")
    with pytest.raises(UserError, match=r"classes\.txt: found 3 names, expected one for each of the model's 2 classes"):
        eval.main([*arguments, "--names", str(names)])


def test_what_numbers_and_alike_names_are_taken_for_is_printed(tmp_path, capsys):
    """Another model numbers its classes in its own order: numbers fit in range, and only a person can see the order."""
    truth, found = tmp_path / "truth", tmp_path / "found"
    truth.mkdir()
    found.mkdir()
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    objects = "".join(f"<object><name>{name}</name>{box}</object>" for name in ("wheel", "Wheel", "axle"))
    (truth / "x.xml").write_text(f"<annotation>{objects}</annotation>")
    (found / "x.txt").write_text("2 0.9 1 2 30 40\n0 0.9 1 2 30 40\n")
    arguments = ["--ground-truth", str(truth), "--detections", str(found)]
    eval.main(arguments)
    printed = capsys.readouterr().out.splitlines()
    assert f"{found}: numbers of classes are read as 0 = Wheel, 2 = wheel" in printed
    assert f"{found}: 'Wheel' and 'wheel' are counted as different classes" in printed
    (found / "classes.txt").write_text("wheel\nWheel\naxle\n")  # the model's own order
    eval.main(arguments)
    assert "numbers of classes" not in capsys.readouterr().out


def test_flags_about_text_are_refused_beside_other_files(tmp_path):
    """Boxes of JSON are read as left, top, width, height, whatever the flag says."""
    truth, found, xml = tmp_path / "truth.json", tmp_path / "found.json", tmp_path / "xml"
    picture, box = {"id": 1, "file_name": "x.png", "width": 64, "height": 64}, {"image_id": 1, "category_id": 1}
    boxes = {"annotations": [box | {"id": 1, "bbox": [5, 5, 20, 20]}], "categories": [{"id": 1, "name": "a"}]}
    truth.write_text(json.dumps({"images": [picture], **boxes}))
    found.write_text(json.dumps([box | {"bbox": [5, 5, 25, 25], "score": 0.9}]))
    xml.mkdir()
    corners = "<bndbox><xmin>6</xmin><ymin>6</ymin><xmax>25</xmax><ymax>25</ymax></bndbox>"
    (xml / "x.xml").write_text(f"<annotation><object><name>a</name>{corners}</object></annotation>")
    for ground_truth, kind in ((truth, "JSON"), (xml, "VOC XML")):
        for flag, value in (("--ground-truth-boxes", "xyxy"), ("--images", str(tmp_path))):
            with pytest.raises(
                UserError, match=f"^{flag}: found {value} for {ground_truth}, which is {kind}, expected"
            ):
                eval.main(["--ground-truth", str(ground_truth), "--detections", str(found), flag, value])
    for flag in (["--detection-boxes", "xyxy"], ["--score-last"]):
        with pytest.raises(UserError, match=f"^{flag[0]}: found .* for {found}, which is JSON, expected none"):
            eval.main(["--ground-truth", str(truth), "--detections", str(found), *flag])
