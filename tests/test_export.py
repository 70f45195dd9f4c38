"""export.py: what it checks before it writes, what is in the file and what is not, what it refuses."""

import builtins
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import export
import models
from datasets.images import read_image
from engine.onnx_files import check
from engine.onnx_files import graph as onnx_graph
from engine.prediction.predictor import Predictor
from engine.prediction.sources import find_pictures
from errors import UserError
from frcnn.faster_rcnn import FasterRCNN
from layers.fusion import fuse
from rtdetr.rtdetr import RTDETR
from structures import Detections, DetectionSettings
from tests.conftest import ROOT
from tests.datasets import small_sets
from tests.exporting import ARCH, NAMES, save_model, small_rtdetr
from tests.tiny_training import SIZE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def traced(exported, monkeypatch):
    """The graph of the distilled student, given back where export.py would trace it again; 5 seconds less each."""
    import onnx

    graph = onnx.load(exported.fixed)
    del graph.metadata_props[:]

    def give(*args, **kwargs):
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)
        return copy

    monkeypatch.setattr(onnx_graph, "trace", give)
    return graph


def test_says_what_was_checked_and_written(exported):
    for said, size in zip(exported.said, (exported.dynamic, exported.fixed)):
        difference = re.search(
            r"4 pictures of --pictures at 64 px: ONNX and PyTorch differ in boxes by at most (\S+) px, scores by (\S+)",
            said,
        )
        assert float(difference[1]) < 1e-3 and float(difference[2]) < 1e-5
        assert f"written: {size} ({ARCH}, 2 classes, float32)" in said
    table = exported.said[1].splitlines()[-3:]
    assert table[0].split() == ["mAP50", "mAP50-95", "ms", "MB"]
    rows = {line.split()[0]: list(map(float, line.split()[1:])) for line in table[1:]}
    assert rows["int8"][3] < 0.35 * rows["float32"][3] and rows["int8"][2] > 0


def test_the_files_hold_the_student_alone(exported):
    """No adapter, no teacher, no optimizer: as many numbers as the folded student has, and no name but its own."""
    import onnx

    state = checkpoint.load(exported.checkpoint)
    adapters = [name for name in state["criterion"] if "adapter" in name]
    assert adapters and state["optimizer"]  # the checkpoint has what must not be in the file
    model, _ = checkpoint.load_model(exported.checkpoint)
    folded = dict(fuse(model).named_parameters())
    weights = {i.name: i for i in onnx.load(exported.fixed).graph.initializer}
    of_student = {
        name.removeprefix("detector."): value for name, value in weights.items() if name.startswith("detector.")
    }
    assert set(of_student) == set(folded)
    for name, value in folded.items():
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(of_student[name]), value.detach().numpy(), err_msg=name
        )
    others = {name: onnx.numpy_helper.to_array(v) for name, v in weights.items() if not name.startswith("detector.")}
    locations = sum((SIZE // stride) ** 2 for stride in (8, 16, 32))
    # Beside the weights: small constants, and the points and strides of the locations.
    assert all(value.size <= 4 * locations for value in others.values())
    for path in (exported.dynamic, exported.fixed, exported.int8):
        data = path.read_bytes().replace(b"retort.random_teachers", b"")  # the metadata has this key, empty
        assert b"adapter" not in data and b"teacher" not in data


def test_the_files_do_not_name_the_machine(exported):
    for path in (exported.dynamic, exported.fixed, exported.int8):
        data = path.read_bytes()
        for trace in (str(ROOT).encode(), b"site-packages", b".py", str(exported.checkpoint.parent).encode()):
            assert trace not in data, (path.name, trace)


def test_the_graphs_declare_what_they_take_and_give(exported):
    import onnxruntime

    locations = sum((SIZE // stride) ** 2 for stride in (8, 16, 32))

    shapes = {}
    for path in (exported.dynamic, exported.fixed):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        shapes[path.stem] = [{v.name: v.shape for v in part()} for part in (session.get_inputs, session.get_outputs)]
    assert shapes["fixed"] == [
        {"images": [1, 3, SIZE, SIZE]},
        {"boxes_xyxy": [1, locations, 4], "scores": [1, locations, 2]},
    ]
    inputs, outputs = shapes["dynamic"]
    assert inputs["images"] == ["batch", 3, "height", "width"]
    assert list(outputs) == ["boxes_xyxy", "scores", "labels", "image"]


def test_metadata(exported):
    import onnx

    entries = {entry.key: entry.value for entry in onnx.load(exported.int8).metadata_props}
    info = onnx_graph.read_info(entries, exported.int8)
    assert (info.arch, info.names, info.image_size, info.classes) == (ARCH, NAMES, SIZE, NAMES)
    assert (info.suppresses, info.precision, info.source) == (True, "int8", "ours")
    assert info.commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", info.commit)


@pytest.mark.parametrize("branch", ["cls", "box"])
@pytest.mark.parametrize("fault", [0.1, np.nan])
def test_a_graph_that_differs_is_not_written(exported, traced, tmp_path, branch, fault):
    """A network that computes something else, or nothing finite, is found out before there is a file."""
    import onnx

    weight = next(i for i in traced.graph.initializer if i.name == f"detector.head.{branch}.0.2.bias")
    values = np.array(onnx.numpy_helper.to_array(weight))
    values[0] += fault
    weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weight.name))
    path = tmp_path / "out.onnx"
    path.write_bytes(b"what was there before")
    with pytest.raises(UserError, match=r"out\.onnx: differs from PyTorch in boxes .*; nothing was written"):
        export.main([str(exported.checkpoint), "--output", str(path)])
    assert path.read_bytes() == b"what was there before" and len(list(tmp_path.iterdir())) == 1


def test_a_selection_that_differs_is_not_written(exported, traced, tmp_path, monkeypatch):
    worse = onnx_graph.SELECTION.replace("TopK (scores1, count)", "TopK <largest = 0> (scores1, count)")
    assert worse != onnx_graph.SELECTION
    monkeypatch.setattr(onnx_graph, "SELECTION", worse)
    with pytest.raises(UserError, match="chooses other detections than PyTorch does; nothing was written"):
        export.main([str(exported.checkpoint), "--output", str(tmp_path / "out.onnx"), "--with-nms"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(exported, traced, tmp_path, monkeypatch):
    from engine.runtime import run_folder

    def refuse(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_durably", refuse)
    with pytest.raises(UserError, match=r"out\.onnx: could not be written: No space left on device") as error:
        export.main([str(exported.checkpoint), "--output", str(tmp_path / "out.onnx")])
    assert error.value.exit_code == 5 and not list(tmp_path.iterdir())


def test_pictures_may_be_given(exported, traced, tmp_path, capsys):
    picture = exported.data / "images" / "test" / "000.png"
    arguments = [str(exported.checkpoint), "--output", str(tmp_path / "out.onnx")]
    export.main([*arguments, "--pictures", str(picture)])
    assert capsys.readouterr().out.startswith("1 picture of --pictures at 64 px")
    with pytest.raises(UserError, match="absent: no such file or folder, expected pictures"):
        export.main([*arguments, "--pictures", str(tmp_path / "absent")])


def test_real_pictures_come_first(exported, traced, tmp_path, capsys):
    """Without --pictures: the test split of --calibrate, else of the run itself; drawn ones where neither is there."""
    output = ["--output", str(tmp_path / "out.onnx")]
    export.main([str(exported.checkpoint), *output])
    assert capsys.readouterr().out.startswith("4 pictures of the test split at 64 px: ")
    moved = tmp_path / "moved.pt"
    moved.write_bytes(exported.checkpoint.read_bytes())
    export.main([str(moved), *output])
    assert capsys.readouterr().out.startswith("4 pictures drawn for the check at 64 px: ")
    calibrate = ["--int8", "--calibrate", "yolo", str(exported.data), "--test-split", "train"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "calibrate", lambda model, images, percentile: model)
        patch.setattr(export, "trace_int8", onnx_graph.trace)
        patch.setattr(export, "print_comparison", lambda *args: None)
        export.main([str(moved), *output, *calibrate])
    overlap, images = capsys.readouterr().out.splitlines()[:2]
    assert overlap.startswith("8 of 8 pictures of train are also in train (8 the same file)")  # calibrated and measured
    assert images.startswith("4 pictures of the test split at 64 px: ")


def test_a_folder_that_is_not_there_is_refused_before_any_work(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("read the model"))
    with pytest.raises(UserError, match=r"absent/out\.onnx: no such folder: .*absent"):
        export.main([str(exported.checkpoint), "--output", str(tmp_path / "absent" / "out.onnx")])


def test_a_query_is_compared_to_its_nearest():
    """Rounding may swap two queries of RT-DETR; that is no difference. A query that is nowhere is one."""
    boxes, scores = torch.tensor([[0.0, 0, 9, 9], [20, 20, 30, 30]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    swap = torch.tensor([1, 0])
    assert check.differences(boxes, scores, boxes[swap], scores[swap], in_order=False) == (0.0, 0.0)
    assert check.differences(boxes, scores, boxes[swap], scores[swap], in_order=True)[0] == 21.0
    moved = boxes + torch.tensor([[0.0], [0.5]])
    assert check.differences(boxes, scores, moved[swap], scores[swap], in_order=False) == (0.5, 0.0)


@pytest.mark.parametrize("suppresses", [False, True])
def test_queries_may_change_places_and_locations_may_not(monkeypatch, suppresses):
    model, images = small_rtdetr(), export.draw_images(SIZE)[:1]
    with torch.no_grad():
        swapped = [part[:, [1, 0, *range(2, part.shape[1])]].numpy() for part in model.decode(model(images))]
    session = SimpleNamespace(run=lambda names, feed: swapped)
    monkeypatch.setattr(check, "open_session", lambda data: session)
    graph = SimpleNamespace(graph=SimpleNamespace(output=[SimpleNamespace(name="boxes_xyxy")]), SerializeToString=bytes)
    difference = check.compare(model, graph, [images], suppresses=suppresses)
    assert difference.is_small() is not suppresses


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_model_that_cannot_be_exported(tmp_path, monkeypatch):
    """A detector without `decode`: the regions of a second stage are as many as the first finds."""
    pytest.importorskip("onnxscript")
    info = checkpoint.CheckpointInfo("fasterrcnn_resnet18", NAMES, SIZE)
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: (nn.Identity(), info))
    with pytest.raises(UserError, match="fasterrcnn_resnet18 cannot be exported: its second stage") as error:
        export.main([str(tmp_path / "frcnn.pt")])
    assert error.value.exit_code == 2 and not list(tmp_path.iterdir())
    assert not hasattr(FasterRCNN, "decode") and hasattr(RTDETR, "decode")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "model.trt"], "expected a name ending in .onnx"),
        (["--image-size", "100"], "expected a multiple of 32"),
        (["--calibrate", "yolo", "data"], "--calibrate: found it alone, expected --int8 beside it"),
        (["--int8", "--calibration-pictures", "5"], "--calibration-pictures: found it alone, expected --calibrate"),
        (["--test-split", "val"], "--test-split: found it alone, expected --calibrate beside it"),
        (["--nms-iou", "0.3"], "--nms-iou: found it alone, expected --with-nms beside it"),
        (["--score-threshold", "0.3"], "--score-threshold: found it alone, expected --with-nms beside it"),
        (["--max-detections", "5"], "--max-detections: found it alone, expected --with-nms beside it"),
        (["--int8", "--percentile", "20"], "--percentile: found 20.0, expected above 50 and at most 100"),
        (["--max-detections", "0"], "--max-detections: found 0, expected at least 1"),
    ],
)
def test_bad_options_are_usage_errors(arguments, said):
    with pytest.raises(UserError, match=said) as stop:
        export.main(["w.pt", *arguments])
    assert stop.value.exit_code == 2


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"^\.: found no run, expected a weights file or the folder of a run"):
        export.main(["."])
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match=r"absent\.pt: no such file, expected a weights file"):
        export.main([str(tmp_path / "absent.pt")])
    with pytest.raises(
        UserError, match=r": a folder, expected a weights file or the folder of a run, such as runs/NAME"
    ):
        export.main([str(tmp_path)])


@pytest.mark.parametrize("source", ["ours", "public"])
@pytest.mark.parametrize("names", [("red", "green"), ("blue", "red")])
def test_files_are_measured_on_classes_of_the_same_name(exported, capsys, source, names):
    """Not of the same column: a public file with the dataset's classes in another order would get mAP 0."""

    class FindsEachClass(nn.Module):
        def detect(self, output, **_):
            return [Detections(torch.eye(2, 4), torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))]

    args = export.parse_arguments(["w.pt", "--int8", "--calibrate", "yolo", str(exported.data)])
    _, index, to_shared = export.open_splits(args, checkpoint.CheckpointInfo(ARCH, names, SIZE, source=source))
    (found,) = to_shared(FindsEachClass()).detect(None, score_threshold=0, iou_threshold=1, max_detections=9)
    assert [index.names[label] for label in found.labels] == [name for name in names if name in NAMES]
    assert "2 classes of the dataset, 2 of the model" in capsys.readouterr().out


def test_a_dataset_of_other_classes_is_refused_before_any_work(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "trace", lambda *args, **kwargs: pytest.fail("traced"))
    for names, message in (
        (("blue", "grey"), r"no class in common: the dataset has green, red; the model has blue, grey"),
        (("0", "1", "2"), r"three.pt: found 3 classes without names, expected 2"),
    ):
        path = save_model(tmp_path / "three.pt", ARCH, names)
        with pytest.raises(UserError, match=message):
            export.main([str(path), "--int8", "--calibrate", "yolo", str(exported.data), "train"])
    with pytest.raises(UserError, match=r"--calibrate: found 'nothing', expected voc\|coco"):
        export.main([str(exported.checkpoint), "--int8", "--calibrate", "nothing"])


def test_pictures_with_nothing_that_counts_measure_no_loss(tmp_path):
    small_sets.picture(tmp_path / "a.png")
    difficult = small_sets.xml("red").replace("</name>", "</name><difficult>1</difficult>")
    small_sets.text(tmp_path / "Annotations" / "a.xml", difficult)
    args = export.parse_arguments(["w.pt", "--int8", "--calibrate", "voc", str(tmp_path), "all", "--test-split", "all"])
    with pytest.raises(UserError, match=r"not one object; .*1 box to be ignored"):
        export.open_splits(args, checkpoint.CheckpointInfo(ARCH, ("red",), SIZE))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch, missing):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if name != missing:
            pytest.importorskip(name)
    imports = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(UserError, match=rf"needs the package '{missing}': pip install '\.\[export\]'"):
        export.main([str(tmp_path / "absent.pt")])


# -------------------------------------------------------------------------------------------------- the other families


@pytest.mark.slow
def test_rtdetr(tmp_path, monkeypatch, capsys):
    """Nothing is suppressed in it, queries may change places, and its thresholds are those of any detector."""
    pytest.importorskip("onnxscript")
    from engine.onnx_files.detector import load_onnx

    model, info = small_rtdetr(), checkpoint.CheckpointInfo("rtdetr_r18vd", NAMES, SIZE)
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: (model, info))
    path = tmp_path / "rtdetr.onnx"
    export.main(["rtdetr.pt", "--output", str(path), "--with-nms"])
    assert "4 pictures drawn for the check at 64 px" in capsys.readouterr().out
    detector, images = load_onnx(path), export.draw_images(SIZE)
    assert not detector.info.suppresses
    with pytest.raises(UserError, match=r"^argument --nms-iou: found 0\.5, but boxes of rtdetr_r18vd are not"):
        export.main(["rtdetr.pt", "--output", str(path), "--with-nms", "--nms-iou", "0.5"])
    settings = dict(score_threshold=0.0, iou_threshold=0.1, max_detections=30)
    with torch.no_grad():
        expected = model.detect(model(images), **settings)
    for ours, theirs in zip(expected, detector.detect(detector(images), **settings), strict=True):
        assert len(ours) == len(theirs) == 30
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [
        "rtdetr",  # of YOLOv8, the file of `exported` shows it; the other two have its points and its decoding
        pytest.param("yolov5n", marks=pytest.mark.weekly),
        pytest.param("yolov7_tiny", marks=pytest.mark.weekly),
    ],
)
def test_sizes_stay_free(arch):
    """What torch.export keeps as a constant shows at another size; torch.onnx translates this very program."""
    model = small_rtdetr() if arch == "rtdetr" else fuse(models.build(arch, 2)).requires_grad_(False)
    decoded, shapes = onnx_graph.Decoded(model), onnx_graph.free_sizes()
    with onnx_graph.without_warnings(), torch.no_grad():
        program = torch.export.export(decoded, (torch.zeros(2, 3, 320, 256),), dynamic_shapes=shapes, strict=False)
    images = torch.rand(3, 3, 192, 352, generator=torch.Generator().manual_seed(0))
    found, expected = (tuple(part[0] for part in run(images)) for run in (program.module(), decoded))
    boxes, scores = check.differences(*expected, *found, in_order=arch != "rtdetr")
    assert boxes < 1e-2 and scores < 1e-4


@pytest.mark.slow
def test_yolov5_on_photographs(tmp_path, capsys):
    """The public detector of helmets and vests where it is at hand, else weights by their names on drawn pictures."""
    pytest.importorskip("onnxscript")
    from engine.onnx_files.detector import load_detector

    data = ROOT.parent / "shared" / "data"
    path, photos, options = save_model(tmp_path / "model.pt", "yolov5n"), [], []
    if data.is_dir():
        path = data / "public_weights" / "yolov5n_helmet_vest.pt"
        photos, options = [str(data / "photos")], ["--arch", "yolov5n"]
    output = tmp_path / "out.onnx"
    pictures = ["--pictures", *photos] if photos else []
    export.main([str(path), *options, *pictures, "--output", str(output), "--with-nms"])
    boxes, scores = map(float, re.search(r"at most (\S+) px, scores by (\S+)", capsys.readouterr().out).groups())
    if not photos:
        return
    assert boxes < 0.005 and scores < 1e-5
    model, info = checkpoint.load_model(path, "yolov5n")
    detector, said = load_detector(output)
    assert said == info
    read = [read_image(picture.path) for picture in find_pictures(photos)[:4]]
    expected, found = (Predictor(m, image_size=640, detection=DetectionSettings(0.1))(read) for m in (model, detector))
    assert sum(map(len, expected)) > 1
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(ours.boxes_xyxy, theirs.boxes_xyxy, rtol=0, atol=0.01)
        assert torch.equal(ours.labels, theirs.labels)
