"""The losses of some images of a batch are exactly those of a batch of these images alone."""

import contextlib
import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import models
from config import TermConfig
from distill.batch import BatchOutputs
from distill.criterion import Criterion
from errors import UserError
from structures import OF_BATCH, Targets, select_images
from tests.distill.test_criterion import Output, TinyDetector, term

CHOSEN = torch.tensor([False, True, True, False])
DETECTORS = ["yolov5n", "yolov5nu", "yolov8n", "fasterrcnn_mobilenet_v3_small"]


@dataclass(frozen=True)
class Whole:
    features: dict[str, Tensor]
    rows: list[Tensor]
    counts: list[int]
    nothing: None
    image_size: tuple[int, int]
    anchors: Tensor = field(metadata=OF_BATCH)


def test_select_images():
    maps, anchors = torch.rand(4, 2, 3, 3), torch.rand(4, 4)
    output = Whole({"p3": maps}, list(maps), [1, 2, 3, 4], None, (8, 8), anchors)
    part = select_images(output, CHOSEN)
    assert torch.equal(part.features["p3"], maps[1:3]) and part.anchors is anchors
    assert len(part.rows) == 2 and torch.equal(part.rows[1], maps[2])
    assert part.counts == [1, 2, 3, 4] and part.image_size == (8, 8) and part.nothing is None
    assert select_images(output, torch.ones(4, dtype=torch.bool)) is output
    with pytest.raises(TypeError, match="3 tensors for 4 images"):
        select_images(dataclasses.replace(output, rows=list(maps[:3])), CHOSEN)


def test_targets_of_images():
    image = torch.tensor([2, 0, 1, 2, 3])
    targets = Targets(torch.rand(5, 4), torch.arange(5), image, image == 2, torch.eye(5))
    part = targets.of_images(CHOSEN)
    assert part.image.tolist() == [1, 0, 1] and part.labels.tolist() == [0, 2, 3]
    assert part.ignore.tolist() == [True, False, True] and torch.equal(part.class_scores, torch.eye(5)[[0, 2, 3]])
    assert len(targets.of_images(torch.zeros(4, dtype=torch.bool))) == 0


def objects(images: int) -> Targets:
    """One to three objects in each of B images of 64 pixels, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(images).repeat_interleave(torch.arange(images) % 3 + 1)
    corner = 30 * torch.rand(len(image), 2, generator=generator, dtype=torch.float64)
    side = 10 + 20 * torch.rand(len(image), 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (len(image),), generator=generator)
    return Targets(torch.cat((corner, corner + side), 1), labels, image, torch.arange(len(image)) % 4 == 3)


@pytest.mark.parametrize("arch", DETECTORS)
def test_detection_losses_of_a_mixed_batch_are_those_of_its_labelled_images(arch, monkeypatch):
    """In float64, values and gradients; Faster R-CNN samples with the same draws, and few, as its box head is wide."""
    monkeypatch.setattr("frcnn.faster_rcnn.ROI_SAMPLES", 16)
    torch.manual_seed(0)
    model = models.build(arch, 3).double().eval()  # BatchNorm would mix the images in train mode
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") and any(part in name for part in ("head", "rpn", "predictor")))
    images, targets = torch.rand(4, 3, 64, 64, dtype=torch.float64), objects(4)
    learnt = [p for p in model.parameters() if p.requires_grad]

    def run(output, targets):
        torch.manual_seed(1)
        losses = model.losses(output, targets)
        return losses, torch.autograd.grad(sum(losses.values()), learnt, allow_unused=True)

    mixed, mixed_gradients = run(select_images(model(images), CHOSEN), targets.of_images(CHOSEN))
    alone, gradients = run(model(images[CHOSEN]), targets.of_images(CHOSEN))
    whole, _ = run(model(images), targets)
    assert mixed.keys() == alone.keys()
    for name in mixed:
        torch.testing.assert_close(mixed[name], alone[name], rtol=1e-6, atol=1e-9, msg=name)
    assert not torch.isclose(sum(mixed.values()), sum(whole.values()), rtol=1e-4)
    for a, b in zip(mixed_gradients, gradients):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------- terms


def criterion_of(*terms, **options) -> tuple[Criterion, TinyDetector, TinyDetector]:
    torch.manual_seed(0)
    student, teacher = TinyDetector(4), TinyDetector(6).eval()
    names = ("a", "b", "c")
    made = Criterion(
        terms, student=student, teachers={"big": teacher}, epochs=10, image_size=32, class_names=names, **options
    )
    return made.eval(), student.eval(), teacher.eval()


TERMS = {
    "mse": term(student_maps=("p3",)),
    "fgd": term(loss="fgd", student_maps=("p3",)),
    "soft_class": term(loss="soft_class", student_maps=("class_logits",), adapter="none"),
    "masked_mse": term(loss="masked_mse", student_maps=("p3",)),
}


@pytest.mark.parametrize("content_only", [False, True])
@pytest.mark.parametrize("on", ["labelled", "unlabelled"])
def test_a_term_acts_on_its_images_alone(on, content_only):
    chosen = CHOSEN if on == "labelled" else ~CHOSEN
    terms = [dataclasses.replace(t, name=name, on=on) for name, t in TERMS.items()]
    terms[0] = dataclasses.replace(terms[0], content_only=content_only)
    criterion, student, teacher = criterion_of(*terms)
    images, targets = torch.rand(4, 3, 32, 32), objects(4)
    targets = dataclasses.replace(targets, boxes_xyxy=targets.boxes_xyxy.float() / 2)
    content = torch.rand(4, 1, 32, 32) > 0.3

    def losses(images, targets, content, is_labelled):
        return criterion(student(images), {"big": teacher(images)}, targets, 0.0, content, is_labelled)

    mixed = losses(images, targets, content, CHOSEN)
    kind = torch.full((2,), on == "labelled")
    alone = losses(images[chosen], targets.of_images(chosen), content[chosen], kind)
    assert list(mixed) == list(TERMS)
    for name in mixed:
        assert mixed[name] > 0
        torch.testing.assert_close(mixed[name], alone[name], rtol=1e-5, atol=1e-7, msg=name)
    whole = criterion_of(*TERMS.values())[0]
    assert whole(student(images), {"big": teacher(images)}, targets, 0.0)["mse_big"] != mixed["mse"]
    for wrong in (CHOSEN.long(), CHOSEN.to(torch.uint8), CHOSEN[:3]):  # ~ of a number is no inverse of a mask
        with pytest.raises(UserError, match=r"argument is_labelled: found .*, expected bool \(4,\)"):
            losses(images, targets, content, wrong)
    nobody = losses(images, targets, content, torch.full((4,), on != "labelled"))
    assert all(value == 0 for value in nobody.values())
    if on == "labelled":  # a run without unlabelled images
        everybody = losses(images, targets, content, None)
        torch.testing.assert_close(everybody, losses(images, targets, content, torch.ones(4, dtype=torch.bool)))


def test_terms_that_read_objects_are_refused_on_images_without():
    reads = {name: name in ("fgd", "masked_mse") for name in TERMS}
    for name, t in TERMS.items():
        for on in ("all", "unlabelled", "labelled"):
            if reads[name] and on != "labelled":
                with pytest.raises(UserError, match=f"terms.0.on: found {on}, but loss {name!r} reads the objects"):
                    criterion_of(dataclasses.replace(t, on=on), unlabelled_has_boxes=False)
            else:
                criterion_of(dataclasses.replace(t, on=on), unlabelled_has_boxes=False)
            criterion_of(dataclasses.replace(t, on=on))


@pytest.mark.parametrize(("loss", "reads"), [("decoupled_kl", True), ("softmax_kl", False)])
def test_labels_of_proposals_are_read_however_few_they_are(loss, reads):
    """Where no proposal meets an object by chance, all would be background with objects and without."""
    torch.manual_seed(0)
    student, teacher = (models.build("fasterrcnn_mobilenet_v3_small", 3).eval() for _ in range(2))
    at_one = TermConfig("t", loss, 1.0, parameters={"boxes": "proposals", "max_boxes": 1})
    given = dict(student=student, teachers={"t": teacher.requires_grad_(False)}, epochs=1, class_names=("a", "b", "c"))
    with pytest.raises(UserError, match="reads the objects") if reads else contextlib.nullcontext():
        Criterion((at_one,), **given, unlabelled_has_boxes=False)


def test_what_terms_share_belongs_to_their_images():
    """Two terms of one teacher on different images must not take what the other computed once."""
    one = TERMS["soft_class"]
    terms = [dataclasses.replace(one, name=on, on=on) for on in ("all", "labelled", "unlabelled")]
    criterion, student, teacher = criterion_of(*terms)
    images = torch.rand(4, 3, 32, 32)
    values = criterion(student(images), {"big": teacher(images)}, Targets.empty(), 0.0, None, CHOSEN)
    for on, chosen in (("labelled", CHOSEN), ("unlabelled", ~CHOSEN)):
        single, *_ = criterion_of(dataclasses.replace(one, name=on, on=on))
        part = BatchOutputs(student(images), {"big": teacher(images)}, Targets.empty()).of_images(chosen)
        kind = torch.full((2,), on == "labelled")
        expected = single(part.s_output, part.t_outputs, part.targets, 0.0, None, kind)[on]
        torch.testing.assert_close(values[on], expected)
    assert isinstance(part.s_output, Output) and len({value.item() for value in values.values()}) == 3
