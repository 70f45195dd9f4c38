"""fine_tuning.start_model: fine-tuning begins with what the file's model finds of the same classes."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import checkpoint
import fine_tuning
import models
import train
from config import TeacherConfig
from datasets.class_names import COCO, coco_by_id
from datasets.open import open_dataset
from engine.evaluation.cross_dataset import on_common_classes
from engine.evaluation.measuring import evaluate_model
from engine.training import building, teaching
from errors import UserError
from structures import DetectionSettings
from weights.class_rows import ClassRows, take_rows

FILE_NAMES = ("zebra", "Cat", "airplane", "tv", "potted plant")
NAMES = ("tvmonitor", "lynx", "aeroplane", "cat")  # of them a lynx is not in the file
COLUMNS = (3, None, 2, 1)
TWO_STAGE = "fasterrcnn_mobilenet_v3_small"
ARCHITECTURES = ("yolov8_narrow", "yolov5n", TWO_STAGE)

pytestmark = pytest.mark.usefixtures("one_thread", "small_second_stage")


def save_ours(path, arch: str, names=FILE_NAMES, **head: int) -> nn.Module:
    """A checkpoint of ours of a model whose class rows all differ."""
    torch.manual_seed(1)
    model = models.build(arch, len(names), **head)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(model.class_head):
                value.add_(0.05 * torch.randn(value.shape))
    about = {"arch": arch, "names": list(names), "image_size": 64}
    checkpoint.save(path, about | {"ema": model.state_dict()})
    return model.eval()


def start(path, arch: str, names=NAMES, **options) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(2)
    said: list[str] = []
    return fine_tuning.start_model(arch, names, path, say=said.append, **options), said


def test_weights_that_are_not_those_of_the_report_are_refused(tmp_path):
    """An interrupted run in the folder of a finished one: nobody may begin with it, or learn from it."""
    last = tmp_path / "run" / "weights" / "last.pt"
    state = models.build("yolov8_narrow", 2).state_dict()
    checkpoint.save(last, {"arch": "yolov8_narrow", "names": ["a", "b"], "image_size": 64, "step": 39, "ema": state})
    teacher = TeacherConfig("t", "yolov8_narrow", weights=str(last.parent.parent))
    for text, is_fine in (("", True), ('{"steps": 39}', True), ("[]", True), ('{"steps": 500}', False)):
        (tmp_path / "run" / "report.json").write_text(text)
        for path in (last, last.parent.parent):
            for begin in (
                lambda path=path: start(path, "yolov8_narrow", ("a", "b")),
                lambda: teaching.load_file(teacher, "teachers.0", ("a", "b")),
            ):
                refused = pytest.raises(
                    UserError, match=r"last\.pt: of step 39, but the report .* is of step 500; expec"
                )
                with contextlib.nullcontext() if is_fine else refused:
                    begin()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def started(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "released.pt"
    released = save_ours(path, request.param)
    return request.param, path, released, *start(path, request.param)


def rows_of(arch: str, state: dict[str, Tensor], num_classes: int) -> list[np.ndarray]:
    """The rows of each class, (K, ...) for every layer of the head, and the rows of no class; written out by hand."""
    found = []
    for name, value in state.items():
        value = value.double().numpy()
        if re.match(r"head\.cls\.\d\.2\.|decoder\.(candidate_class|class_heads\.\d|denoising_class)\.", name):
            found.append(value)
        elif name.startswith("head.predict."):
            anchors = value.reshape(3, 5 + num_classes, *value.shape[1:])
            found.append(np.stack([anchors[:, 5 + k] for k in range(num_classes)]))
        elif name.startswith("predictor.classify."):
            found.append(value[1 : 1 + num_classes])
        elif name.startswith("predictor.regress."):
            found.append(np.stack([value[4 + 4 * k : 8 + 4 * k] for k in range(num_classes)]))
    return found


def test_rows_go_by_name_and_the_rest_is_the_files(started):
    arch, _, released, student, said = started
    theirs, ours = (rows_of(arch, m.state_dict(), len(n)) for m, n in ((released, FILE_NAMES), (student, NAMES)))
    torch.manual_seed(2)
    fresh = models.build(arch, len(NAMES), **models.head_of(arch, len(NAMES), student.state_dict()))
    untouched = rows_of(arch, fresh.state_dict(), len(NAMES))
    assert len(ours) == len(theirs) >= 2
    before, after = released.state_dict(), student.state_dict()
    if arch == TWO_STAGE:  # the logit of a fresh class: far below the mean of the file's
        for drawn, name in zip(untouched, ("predictor.classify.weight", "predictor.classify.bias")):
            drawn += before[name].mean(0).numpy()
        untouched[1] += np.log(1e-6)
    for own, file, drawn in zip(ours, theirs, untouched):
        for k, column in enumerate(COLUMNS):
            if arch == TWO_STAGE and column is None:
                np.testing.assert_allclose(own[k], drawn[k], rtol=1e-5, atol=1e-7)
                continue
            np.testing.assert_array_equal(own[k], drawn[k] if column is None else file[column])
    for name, value in before.items():
        if value.shape == after[name].shape and not name.startswith(student.class_head):
            assert torch.equal(value, after[name]), name
    assert said == [
        f"{started[1]}: class rows taken over by name: tvmonitor from tv, aeroplane from airplane, cat from Cat; "
        "start fresh: lynx; left in the file: 2 of 5 classes"
    ]
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("new", [(), ("lynx", "lamp")], ids=["known", "new"])
def test_before_training_its_scores_are_those_of_the_file(started, new):
    """In another order, without one or two classes, which take no part in a Faster R-CNN's softmax otherwise, and
    beside new ones, which nothing is found of yet.
    """
    arch, path, released, *_ = started
    names = ("tv", "airplane", "cat")
    columns = [[name.lower() for name in FILE_NAMES].index(name) for name in names]
    student = start(path, arch, (*names, *new))[0].eval()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (own_boxes, own), (boxes, scores) = (found_by(model, images) for model in (student, released))
    torch.testing.assert_close(own[..., : len(names)], scores[..., columns], rtol=1e-5, atol=1e-6)
    if arch == TWO_STAGE:
        own_boxes, boxes = own_boxes[:, : len(names)], boxes[:, columns]
    torch.testing.assert_close(own_boxes, boxes, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def found_by(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes and class scores before suppression; of a Faster R-CNN, the deltas of each class."""
    output = model(images)
    if hasattr(model, "decode"):
        return model.decode(output)
    logits, deltas = model.predict_at(output, output.proposals)
    return deltas[:, 1:], logits.softmax(1)[:, 1:]


def test_an_rtdetr_is_joined_in_all_its_class_layers(tmp_path):
    released = save_ours(tmp_path / "r.pt", "rtdetr_r18vd").state_dict()
    state = start(tmp_path / "r.pt", "rtdetr_r18vd")[0].state_dict()
    theirs, ours = rows_of("rtdetr_r18vd", released, 5), rows_of("rtdetr_r18vd", state, 4)
    assert len(ours) == 2 * (1 + 3) + 1  # the choice of queries, three decoder layers, the denoising embedding
    for own, file in zip(ours, theirs):
        np.testing.assert_array_equal(own[[0, 2, 3]], file[[3, 2, 1]])


def test_new_head_starts_the_whole_head_fresh_also_where_it_fits(started):
    arch, path, released, *_ = started
    student, said = start(path, arch, FILE_NAMES, new_head=True)
    torch.manual_seed(2)
    fresh, before = models.build(arch, len(FILE_NAMES)).state_dict(), released.state_dict()
    for name, value in student.state_dict().items():
        is_head = name.startswith(student.class_head)
        assert torch.equal(value, fresh[name] if is_head else before[name]), name
    count = sum(name.startswith(student.class_head) for name in fresh)
    assert said == [f"{path}: the class head starts fresh as a whole (new_head): {count} entries"]


def test_other_classes_in_the_same_number_are_all_fresh(started):
    arch, path, released, *_ = started
    names = ("a", "b", "c", "d", "e")
    student, said = start(path, arch, names)
    assert "taken over by name: none; start fresh: a, b, c, d, e;" in said[0]
    for own, file in zip(rows_of(arch, student.state_dict(), 5), rows_of(arch, released.state_dict(), 5)):
        assert not any(np.array_equal(own[k], file[j]) for k in range(5) for j in range(5))


@pytest.mark.parametrize("arch", ["yolov8_narrow", "yolov5nu", TWO_STAGE])
def test_the_head_of_a_fine_tuned_model_is_rebuilt_from_its_weights(arch, tmp_path):
    """A width of 80 channels, or five classes counted as background, that three classes alone would not give."""
    names = FILE_NAMES if arch == TWO_STAGE else COCO
    save_ours(tmp_path / "first.pt", arch, names)
    student, _ = start(tmp_path / "first.pt", arch, ("cat", "zebra", "lynx"))
    head = models.head_of(arch, 3, student.state_dict())
    assert head == ({"other_classes": 3} if arch == TWO_STAGE else {"class_width": 80})
    about = {"arch": arch, "names": ["cat", "zebra", "lynx"], "image_size": 64}
    checkpoint.save(tmp_path / "last.pt", about | {"ema": student.state_dict()})
    loaded, _ = checkpoint.load_model(tmp_path / "last.pt")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        own, again = (m.eval()(images).features["c5"] for m in (student, loaded))
    assert torch.equal(own, again) and loaded.state_dict().keys() == student.state_dict().keys()
    once_more, said = start(tmp_path / "last.pt", arch, ("zebra", "cat"))  # fine-tuned a second time
    assert "left in the file: 1 of 3" in said[0]
    assert models.head_of(arch, 2, once_more.state_dict()) == (
        {"other_classes": 4} if arch == TWO_STAGE else {"class_width": 80}
    )


def test_classes_that_nobody_asks_for_count_as_background(tmp_path):
    """softmax over 1 + K classes, the background's logit log(e^z0 + sum of the others'), by float64 arithmetic."""
    from frcnn.heads import HIDDEN, BoxPredictor

    torch.manual_seed(0)
    predictor = BoxPredictor(2, other_classes=3).double()
    x = torch.randn(7, HIDDEN, dtype=torch.float64, requires_grad=True)
    logits, deltas = predictor(x)
    assert logits.shape == (7, 3) and deltas.shape == (7, 3, 4)
    z = (x @ predictor.classify.weight.T + predictor.classify.bias).detach().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)  # (N, 1 + K + M)
    expected = np.column_stack((p[:, 0] + p[:, 3:].sum(1), p[:, 1:3]))
    np.testing.assert_allclose(logits.softmax(1).detach().numpy(), expected, rtol=1e-6)
    logits.logsumexp(1).sum().backward()
    np.testing.assert_allclose(predictor.classify.bias.grad.numpy(), p.sum(0), rtol=1e-6)
    assert (
        BoxPredictor(2)(torch.zeros(0, HIDDEN))[0].shape
        == BoxPredictor(2, 3)(torch.zeros(0, HIDDEN))[0].shape
        == (0, 3)
    )


def test_take_rows_by_hand():
    """Two anchors, one shared row, two rows a class, one class left over behind: 3 classes of 4 in another order."""
    own, theirs = ClassRows("x.", groups=2, shared=1, each=2), ClassRows("x.", groups=2, shared=1, each=2, others=2)
    fresh, released = -torch.arange(14.0), torch.arange(22.0)  # 2 * (1 + 3 * 2), 2 * (1 + 4 * 2 + 2)
    found = take_rows(fresh, released, (2, None, 0), fresh_rows=own, released_rows=theirs)
    assert found.tolist() == [0, 5, 6, -3, -4, 1, 2, 11, 16, 17, -10, -11, 12, 13]
    own = ClassRows("x.", groups=2, shared=1, each=2, others=6)
    found = take_rows(-torch.arange(26.0), released, (2, None, 0), fresh_rows=own, released_rows=theirs)
    assert found[:13].tolist() == [0, 5, 6, -3, -4, 1, 2, 9, 10, 3, 4, 7, 8]


@pytest.mark.parametrize(
    ("arch", "file"), [("yolov8n", "yolov8n_coco_rebuilt_fp16.pt"), ("yolov5n", "yolov5n_coco_v6.1.pt")]
)
def test_before_training_the_map_is_that_of_the_coco_model(arch, file, shared_data):
    path, root = shared_data / "public_weights" / file, shared_data / "voc2012_animals"
    if not (path.is_file() and root.is_dir()):
        pytest.skip("no COCO weights or animals among the small real data")
    index = open_dataset("voc", str(root), "val").subset(list(range(12)))
    released, info = checkpoint.load_model(path, arch)
    student, _ = start(path, arch, index.names)
    pair = [
        evaluate_model(m, i, DetectionSettings(), image_size=192, batch_size=12)
        for m, i in (on_common_classes(released, index, info.names)[:2], (student, index))
    ]
    untrained, own = (result.numbers["mAP50-95"] for result in pair)
    assert own == pytest.approx(untrained, abs=1e-9) and untrained > 0.2


def released_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names of the model's first public layout."""
    from weights import layouts_of, row_pattern

    rows = [(row_pattern(new), old) for old, new in layouts_of(model)[0].table if new]
    found = {}
    for name, value in model.state_dict().items():
        matches = [(match, old) for pattern, old in rows if (match := pattern.match(name))]
        match, old = max(matches, key=lambda row: row[0].end())
        found[old.format(*match.groups()) + name[match.end() :]] = value
    dropped = [old.format(0) for old, new in layouts_of(model)[0].table if new is None]
    return found | {f"{name}weight": torch.zeros(1) for name in dropped}


@pytest.mark.parametrize("arch", ["yolov8_narrow", "yolov5n", "yolov7_tiny"])
def test_a_public_file_is_joined_by_the_names_it_has(arch, tmp_path):
    torch.manual_seed(1)
    released = models.build(arch, 5)
    torch.save({"model": released_state(released), "names": dict(enumerate(FILE_NAMES))}, tmp_path / "public.pt")
    student, said = start(tmp_path / "public.pt", arch)
    theirs, ours = rows_of(arch, released.state_dict(), 5), rows_of(arch, student.state_dict(), 4)
    for own, file in zip(ours, theirs):
        np.testing.assert_array_equal(own[[0, 2, 3]], file[[3, 2, 1]])
    assert "start fresh: lynx" in said[0]
    torch.save({"model": released_state(released), "names": list(FILE_NAMES[:4])}, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"short\.pt: it names 4 classes, and its class head has 5"):
        start(tmp_path / "short.pt", arch)


def test_a_file_without_names_is_refused_or_its_names_are_said(tmp_path):
    path = tmp_path / "bare.pt"
    torch.save(released_state(models.build("yolov8_narrow", 4)), path)
    with pytest.raises(UserError, match=r"bare\.pt: it does not name its 4 classes, .*new_head=true"):
        start(path, "yolov8_narrow")
    assert "starts fresh as a whole" in start(path, "yolov8_narrow", new_head=True)[1][0]
    torch.save(released_state(models.build(TWO_STAGE, 90)), path)
    student, said = start(path, TWO_STAGE, ("dog", "aeroplane"))
    assert "it does not name its classes; taken for COCO's 90" in said[0]
    assert "dog, aeroplane from airplane" in said[1]
    torch.manual_seed(0)
    released, info = checkpoint.load_model(path, TWO_STAGE)
    assert info.names == coco_by_id() and info.names_from == "the release"
    weight = released.state_dict()["predictor.classify.weight"]
    assert torch.equal(student.state_dict()["predictor.classify.weight"][1:3], weight[[18, 5]])  # COCO's category ids


def test_a_teacher_without_names_says_whose_it_takes(tmp_path, make_tiny):
    path = tmp_path / "bare.pt"
    torch.save(released_state(models.build("yolov8n", 2)), path)
    teacher = {"name": "big", "arch": "yolov8n", "weights": str(path)}
    term = {"teacher": "big", "loss": "cwd", "weight": 1.0, "student_maps": ["p3"]}
    config = make_tiny(teachers=[teacher], terms=[term])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        teaching.build_teachers(config, ("green", "red"))
    assert "bare.pt: it does not name its classes; taken for those of the dataset: green, red" in output.getvalue()


def test_one_word_for_two_classes_of_the_file_is_refused(tmp_path):
    save_ours(tmp_path / "two.pt", "yolov8n", ("tv", "tvmonitor"))
    with pytest.raises(UserError, match=r"two\.pt: class 'television' of the dataset may be 'tv' and 'tvmonitor'"):
        start(tmp_path / "two.pt", "yolov8n", ("television",))
    assert "by name: tvmonitor, tv;" in start(tmp_path / "two.pt", "yolov8n", ("tvmonitor", "tv"))[1][0]
    save_ours(tmp_path / "case.pt", "yolov8n", ("Tv", "tv"))
    _, said = start(tmp_path / "case.pt", "yolov8n", ("tv",))  # as it is written
    assert "by name: tv;" in said[0]


def test_a_file_of_another_model_is_refused(tmp_path):
    save_ours(tmp_path / "small.pt", "yolov8n", ("a",))
    with pytest.raises(UserError, match=r"small\.pt: parameters do not fit the model: .* and \d+ more"):
        start(tmp_path / "small.pt", "yolov8s")
    with pytest.raises(UserError, match=r"small\.pt: parameters do not fit the model: .* and \d+ more"):
        start(tmp_path / "small.pt", "yolov5n")
    with pytest.raises(UserError, match="no such file"):
        start(tmp_path / "absent.pt", "yolov8n")


def test_a_run_is_fine_tuned_and_resumed_without_its_first_weights(tmp_path, make_tiny):
    path = tmp_path / "coco.pt"
    save_ours(path, "yolov8_narrow", ("red", *COCO))
    config = make_tiny(student={"weights": str(path)}, epochs=1)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train.run(config)
    assert "taken over by name: red; start fresh: green; left in the file: 80 of 81" in output.getvalue()
    folder = tmp_path / "runs" / "tiny"
    model, info = checkpoint.load_model(folder / "weights" / "last.pt")
    assert model.head.widths["cls"] == 81 and info.names == ("green", "red")
    path.unlink()
    longer = make_tiny(student={"weights": str(path)}, epochs=2)
    train.run(longer, resume=True, quiet=True, allow_change=("epochs",))
    assert checkpoint.load(folder / "weights" / "last.pt")["epoch"] == 2
    with pytest.raises(UserError, match="no such file"):
        building.build_student(longer, ("green", "red"))
