"""python -m engine.pruning: from a checkpoint to a narrower one, which every other command takes like any other."""

import contextlib
import io

import pytest
import torch
from PIL import Image

import checkpoint
import eval
import export
import models
import predict
import train
from datasets.loader import Loader
from datasets.open import open_dataset
from engine.onnx_files.int8 import calibrate
from engine.pruning import main
from errors import UserError
from layers.channel_groups import STAYS, find_groups
from layers.fusion import fuse
from layers.int8 import add_int8, has_int8
from tests.exporting import save_model
from tests.layers.test_fusion import random_statistics
from yaml_files import read_yaml

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tiny_data):
    """whole.pt, half.pt and half.yaml by taylor on the tiny pictures, and what was said."""
    folder = tmp_path_factory.mktemp("pruned")
    torch.manual_seed(0)
    model = models.build("yolov8_half", 2)
    random_statistics(model)
    about = {"arch": "yolov8_half", "names": ["green", "red"], "image_size": 64}
    checkpoint.save(folder / "whole.pt", about | {"ema": model.state_dict()})
    words = ["--flops", "0.5", "--by", "taylor", "--data", "yolo", str(tiny_data), "--pictures", "8"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([str(folder / "whole.pt"), *words, "--out", str(folder / "half.pt")])
    return folder, output.getvalue()


def test_the_pruned_model_computes_what_the_whole_one_does_without_the_others(pruned):
    folder, said = pruned
    whole, _ = checkpoint.load_model(folder / "whole.pt")
    half, info = checkpoint.load_model(folder / "half.pt")
    tree, widths = read_yaml(folder / "half.yaml"), find_groups(half).widths()
    assert tree == {"arch": "yolov8_half", "widths": widths} and info.names == ("green", "red")
    groups = find_groups(whole)
    for name, own in groups.groups.items():
        assert widths[name] % 8 == 0 or widths[name] == len(own) < 8
        assert widths[name] >= min(len(own), 0.25 * len(own), 8)
    share = float(said.split("px (")[1].split(" %")[0])
    assert 40 < share <= 50 and "groups" in said and said.endswith(f"half.pt, {folder / 'half.yaml'}\n")
    is_kept = torch.zeros(groups.count, dtype=torch.bool)
    state, mine = whole.state_dict(), half.state_dict()
    for name, own in groups.groups.items():
        entry = name.split("/")[0].removesuffix("conv") + "bn.running_mean"
        rows = torch.isin(groups.axes[entry, 0], own)
        is_kept[own] = torch.isin(state[entry][rows], mine[entry])
    for (entry, dim), channels in groups.axes.items():
        if dim == 0 and not entry.endswith("running_var"):
            state[entry][(channels != STAYS) & ~is_kept[channels]] = 0
    images = torch.rand(1, 3, 64, 64)
    for found, expected in zip(half(images).logits(), whole(images).logits()):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_it_trains_with_the_whole_model_as_its_teacher_and_resumes(pruned, make_tiny, tmp_path):
    folder, _ = pruned
    teacher = {"name": "whole", "arch": "yolov8_half", "weights": str(folder / "whole.pt")}
    terms = [
        {"teacher": "whole", "loss": "cwd", "weight": 1.0, "student_maps": ["p3"], "adapter": "conv1x1"},
        {"teacher": "whole", "loss": "soft_class", "weight": 1.0, "student_maps": ["class_logits"]},
    ]
    start = tmp_path / "start.pt"
    start.write_bytes((folder / "half.pt").read_bytes())
    student = {"arch": "yolov8_half", "weights": str(start)}
    settings = {"student": student, "teachers": [teacher], "terms": terms}
    train.run(make_tiny(**settings, epochs=1), quiet=True)
    start.unlink()
    train.run(make_tiny(**settings, epochs=2), resume=True, quiet=True, allow_change=("epochs",))
    last = tmp_path / "runs" / "tiny" / "weights" / "last.pt"
    assert checkpoint.load(last)["epoch"] == 2
    model, _ = checkpoint.load_model(last)
    assert find_groups(model).widths() == read_yaml(folder / "half.yaml")["widths"]


def test_the_same_shape_from_scratch_and_by_inheritance(pruned, make_tiny, tmp_path):
    folder, _ = pruned
    student = {"arch": "yolov8_half", "widths": str(folder / "half.yaml")}
    train.run(make_tiny(student=student, epochs=1), quiet=True)
    model, _ = checkpoint.load_model(tmp_path / "runs" / "tiny" / "weights" / "last.pt")
    assert find_groups(model).widths() == read_yaml(folder / "half.yaml")["widths"]
    inherit = student | {"inherit": {"weights": str(folder / "whole.pt")}}
    train.run(make_tiny(student=inherit, name="begun", epochs=1), quiet=True)
    for change, message in (
        ({"weights": str(folder / "half.pt")}, r"'student\.widths': found .* beside student\.weights"),
        ({"arch": "yolov8n"}, r"half\.yaml: key 'arch': found yolov8_half, expected yolov8n"),
        ({"widths": "absent.yaml"}, r"'student\.widths': absent\.yaml: no such file"),
        ({"widths": str(folder / "half.pt")}, r"half\.pt"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(make_tiny(student=student | change, name="other"), quiet=True)
    odd = tmp_path / "odd.yaml"
    odd.write_text((folder / "half.yaml").read_text().replace("backbone.stem.conv: 8", "backbone.stem.conv: none"))
    with pytest.raises(UserError, match=r"odd\.yaml: architecture 'yolov8_half': .*found a width of 'none'"):
        train.run(make_tiny(student=student | {"widths": str(odd)}, name="other"), quiet=True)


def test_it_is_measured_and_finds_objects(pruned, tiny_data, tmp_path, capsys):
    folder, _ = pruned
    eval.main([str(folder / "half.pt"), "yolo", str(tiny_data), "test"])
    predict.main([str(folder / "half.pt"), str(tiny_data / "images" / "test"), "--output", str(tmp_path / "found")])
    assert "mAP" in capsys.readouterr().out


def test_it_is_quantized(pruned, tiny_data):
    """As export.py --int8 does it: the ranges of its own channels, and scores near those of float32."""
    half = fuse(checkpoint.load_model(pruned[0] / "half.pt")[0])
    loader = Loader(open_dataset("yolo", tiny_data, "train"), image_size=64, batch_size=8, seed=0)
    images = next(iter(loader.epoch(0))).images.float() / 255
    rounding = calibrate(half, [images], 99.99)
    with torch.no_grad():
        found, expected = (m.decode(m(images))[1] for m in (rounding, half))
    assert has_int8(rounding) and 0 < (found - expected).abs().max()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.slow  # a graph is traced and optimised
@pytest.mark.weekly  # it is one of other widths
def test_it_is_exported_and_quantized(tiny_data, tmp_path, monkeypatch):
    """The int8 graph is traced from a model that rounds, as any other is (tests/engine/onnx_files/test_int8.py)."""
    onnx, _, _ = (pytest.importorskip(module) for module in ("onnx", "onnxruntime", "onnxscript"))
    save_model(tmp_path / "whole.pt", "yolov8_narrow")
    main([str(tmp_path / "whole.pt"), "--flops", "0.5", "--by", "l2", "--out", str(tmp_path / "half.pt")])
    rounding, pictures = [], ["--pictures", str(tiny_data / "images" / "test")]
    monkeypatch.setattr(export, "trace_int8", lambda model, *_, **__: rounding.append(model) or onnx.ModelProto())
    monkeypatch.setattr(export, "print_comparison", lambda *_: None)
    export.main([str(tmp_path / "half.pt"), "--int8", "--calibrate", "yolo", str(tiny_data), "train", *pictures])
    assert (tmp_path / "half.onnx").is_file() and (tmp_path / "half.int8.onnx").is_file()
    half, _ = checkpoint.load_model(tmp_path / "half.pt")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (m.decode(m(images))[1] for m in (rounding[0], half))
    assert has_int8(rounding[0]) and 0 < (found - expected).abs().max()
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


WORDS = ["--flops", "0.5", "--by", "l2", "--out", "OUT"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS, "--flops", "1"], "--flops: found 1, expected a share between 0 and 1"),
        ([*WORDS, "--floor", "2"], r"--floor: found 2, expected a share in 0\.\.1"),
        ([*WORDS, "--multiple", "0"], "--multiple: found 0, expected at least 1"),
        ([*WORDS, "--image-size", "33"], "--image-size: found 33, expected a multiple of 32"),
        ([*WORDS, "--by", "taylor"], "--data: found nothing, expected pictures for --by taylor"),
        ([*WORDS, "--data", "a.yaml"], "--data: found pictures, which only taylor reads, with --by l2"),
        ([*WORDS, "--by", "taylor", "--data", "a", "b"], "--data: found 'a b', expected a config, or voc|.* ROOT"),
        ([*WORDS, "--out", "WHOLE"], r"--out: found .*whole\.pt, which is there already, expected a new name"),
        ([*WORDS, "--out", "half.onnx"], r"--out: found half\.onnx, expected a name that ends in \.pt"),
        ([*WORDS, "--floor", "0.9"], r"GFLOPs are left where every group keeps 0\.9 .*; give a lower --floor"),
        ([*WORDS, "--flops", "0.01", "--floor", "0"], "GFLOPs are left where every group keeps 0 of its channels"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(pruned, tmp_path, words, message):
    put = {"OUT": str(tmp_path / "out.pt"), "WHOLE": str(pruned[0] / "whole.pt")}
    with pytest.raises(UserError, match=message) as caught:
        main([str(pruned[0] / "whole.pt"), *(put.get(word, word) for word in words)])
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_pictures_without_an_object_to_learn_measure_no_channel(pruned, tmp_path):
    """Their loss is that of the background alone."""
    (tmp_path / "Annotations").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    box = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    words = f"<annotation><object><name>red</name><difficult>1</difficult>{box}</object></annotation>"
    (tmp_path / "Annotations" / "a.xml").write_text(words)
    options = ["--flops", "0.5", "--by", "taylor", "--data", "voc", str(tmp_path), "all"]
    with pytest.raises(UserError, match=r"--data: .*not one object; .*1 box to be ignored"):
        main([str(pruned[0] / "whole.pt"), *options, "--out", str(tmp_path / "out.pt")])


@pytest.mark.parametrize("name", ["own.pt", "own.yaml"])
def test_nothing_is_overwritten(pruned, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"--out: found .*{name}, which is there already"):
        main([str(pruned[0] / "whole.pt"), *WORDS, "--out", str(tmp_path / "own.pt")])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_family_without_groups_and_other_classes_are_refused(tmp_path, tiny_data):
    save_model(tmp_path / "mobile.pt", "fasterrcnn_mobilenet_v3_small")
    with pytest.raises(UserError, match=r"mobile\.pt: fasterrcnn_mobilenet_v3_small cannot be pruned: "):
        main([str(tmp_path / "mobile.pt"), *WORDS[:-1], str(tmp_path / "out.pt")])
    rounding = models.build("yolov8_half", 2)
    add_int8(rounding)
    about = {"arch": "yolov8_half", "names": ["green", "red"], "image_size": 64}
    checkpoint.save(tmp_path / "int8.pt", about | {"ema": rounding.state_dict()})
    with pytest.raises(UserError, match=r"int8\.pt: .* pruned: its layers round .* \(student\.int8\), expected"):
        main([str(tmp_path / "int8.pt"), *WORDS[:-1], str(tmp_path / "out.pt")])
    save_model(tmp_path / "cats.pt", "yolov8_half", ("cat", "dog"))
    words = ["--flops", "0.5", "--by", "taylor", "--data", "yolo", str(tiny_data), "--out", str(tmp_path / "out.pt")]
    with pytest.raises(UserError, match=r"cats\.pt: none of its classes is among green, red"):
        main([str(tmp_path / "cats.pt"), *words])
