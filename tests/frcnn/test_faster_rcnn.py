"""Faster R-CNN against torchvision's recorded outputs, through its public names; its contract; its losses; learning."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from boxes import box_iou
from errors import UserError
from frcnn import faster_rcnn
from frcnn.anchors import ROI_WEIGHTS, decode_boxes
from frcnn.faster_rcnn import RPN_SAMPLES, FasterRCNN
from frcnn.norm import EPSILON, BatchNorm
from models import build
from structures import Detector, Targets
from tests.reference.golden_models import golden_image, public_state, relative_error, undrawn
from weights import load_public, rename

GOLDENS = {
    "fasterrcnn_resnet50_fpn": "fasterrcnn_resnet50",
    "fasterrcnn_resnet50_fpn_v2": "fasterrcnn_resnet50_v2",
    "fasterrcnn_mobilenet_v3_large_fpn": "fasterrcnn_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn": "fasterrcnn_mobilenet_v3_large_320",
}
LOSSES = {"rpn_objectness", "rpn_box", "roi_class", "roi_box"}
RECORDED_THRESHOLD = 0.012  # of the recorded detections; fresh weights score low
NO_TARGETS = Targets.empty()


def unnormalised(model: FasterRCNN, meta: dict) -> torch.Tensor:
    """The recorded image entered the backbone as it is; ours comes before normalisation."""
    return golden_image(meta) * model.std + model.mean


def with_proposals(output, proposals):
    output = copy.copy(output)
    output.__dict__["proposals"] = proposals  # where the cached property keeps them
    return output


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(golden, name):
    arrays, meta = golden(name)
    with undrawn():
        model = build(GOLDENS[name], meta["num_classes"] - 1).eval()
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    state = public_state(meta, {})
    assert set(rename(state, model.public_names)) == set(model.state_dict())
    assert load_public(model, state).layout == "torchvision"
    boxes_xyxy = torch.tensor(arrays["given_boxes"])
    with torch.no_grad():
        output = model(unnormalised(model, meta))
        class_logits, box_deltas = model.predict_at(output, [boxes_xyxy])
        found = model.detect(
            with_proposals(output, [boxes_xyxy]),
            score_threshold=RECORDED_THRESHOLD, iou_threshold=0.5, max_detections=100,
        )[0]  # fmt: skip
    levels = range(len(model.levels))
    join = lambda kind, width: np.concatenate(
        [arrays[f"rpn_{kind}_{i}"].transpose(0, 2, 3, 1).reshape(1, -1, width) for i in levels], 1
    )
    keys = [*(f"fpn_{i}" for i in levels[:-1]), "fpn_pool"]
    for ours, recorded, what in [
        *((output.features[level][:, ::16], arrays[key], level) for level, key in zip(model.levels, keys)),
        (output.objectness_logits, join("objectness", 1)[..., 0], "objectness"),
        (output.box_deltas, join("deltas", 4), "RPN deltas"),
        (output.proposals[0][: len(arrays["proposals_top50"])], arrays["proposals_top50"], "proposals"),
        (class_logits, arrays["roi_class_logits"], "class logits"),
        (box_deltas.flatten(1), arrays["roi_box_deltas"], "box deltas"),
        (found.boxes_xyxy, arrays["det_boxes"], "detected boxes"),
        (found.scores, arrays["det_scores"], "scores"),
    ]:
        assert relative_error(ours, recorded) < 1e-5, what
    assert (found.labels + 1).tolist() == arrays["det_labels"].tolist()
    torch.testing.assert_close(model.class_logits_at(output, [boxes_xyxy]), class_logits)


def test_golden_pooling(golden, mobilenet_state):
    """What the box head is given: RoIAlign of the recorded boxes, every 16th channel."""
    arrays, meta = golden("fasterrcnn_mobilenet_v3_large_fpn")
    model = build("fasterrcnn_mobilenet_v3_large", 90).eval()
    load_public(model, mobilenet_state)
    seen = []
    model.box_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.predict_at(model(unnormalised(model, meta)), [torch.tensor(arrays["given_boxes"])])
    assert relative_error(seen[0][:, ::16], arrays["roi_pooled"]) < 1e-5


@pytest.fixture(scope="module")
def mobilenet_state(golden) -> dict[str, torch.Tensor]:
    """Nobody changes it."""
    return public_state(golden("fasterrcnn_mobilenet_v3_large_fpn")[1], {})


def old_names(state):
    """As files from before torchvision 0.13: shorter names, frozen BatchNorms without counters."""
    replaced = {}
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            for part in ("inner_blocks.", "layer_blocks."):
                if part in name:
                    head, _, tail = name.partition(part)
                    index, _, rest = tail.split(".", 2)
                    name = f"{head}{part}{index}.{rest}"
            replaced[name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    return replaced


def test_files_from_before_version_2(mobilenet_state):
    """MobileNet's were trained with our epsilon: nothing but the names differs."""
    state = mobilenet_state
    old = old_names(state)
    assert len(old) < len(state) and "rpn.head.conv.weight" in old and "backbone.fpn.inner_blocks.0.weight" in old
    new_model, old_model = (build("fasterrcnn_mobilenet_v3_large", 90) for _ in range(2))
    load_public(new_model, state)
    assert load_public(old_model, old).layout == "torchvision before version 2"
    for (name, a), b in zip(new_model.state_dict().items(), old_model.state_dict().values()):
        assert torch.equal(a, b) or name.endswith("num_batches_tracked"), name


def test_the_oldest_file_was_trained_without_an_epsilon():
    """fasterrcnn_resnet50_fpn_coco: with our epsilon its BatchNorms must compute (x - mean) / sqrt(var) still."""
    model = build("fasterrcnn_resnet50", 90).eval()
    theirs = {new: old for old, new in model.public_names}
    state = {}
    for name, value in model.state_dict().items():  # back to their names
        ours, old = next((new, old) for new, old in theirs.items() if re.match(new.replace("{}", r"\d+"), name))
        numbers = re.match(ours.replace("{}", r"(\d+)"), name).groups()
        state[old.format(*numbers) + name[len(ours.format(*numbers)) :]] = torch.rand_like(value.float()).to(value)
    assert load_public(model, old_names(state)).layout == "torchvision before version 2"
    x = torch.randn(1, 64, 3, 3)
    entries = {last: state[f"backbone.body.bn1.{last}"][:, None, None] for last in
               ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    expected = (x - entries["running_mean"]) / entries["running_var"].sqrt() * entries["weight"] + entries["bias"]
    torch.testing.assert_close(model.backbone.stem.norm(x), expected, rtol=1e-5, atol=1e-6)
    with_counters = {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}
    load_public(model, old_names(state) | with_counters)  # live ones had it
    torch.testing.assert_close(model.backbone.stem.norm.weight, state["backbone.body.bn1.weight"], rtol=0, atol=0)


def test_a_head_for_other_classes_is_refused(mobilenet_state):
    with pytest.raises(UserError, match="only the class head differs"):
        load_public(build("fasterrcnn_mobilenet_v3_large", 3), mobilenet_state)


def test_weights_of_another_detector_are_refused(mobilenet_state):
    with pytest.raises(UserError, match="mobilenet"):
        load_public(build("fasterrcnn_resnet18", 90), mobilenet_state)


# ------------------------------------------------------------------------------------------------ contract


@pytest.fixture(scope="module")
def small() -> FasterRCNN:
    """Fresh, but it answers differently from place to place, in eval mode too."""
    torch.manual_seed(0)
    model = calibrated(build("fasterrcnn_mobilenet_v3_small", 4), torch.rand(4, 3, 96, 128))
    for layer in (*model.rpn.convs, model.rpn.objectness, model.predictor.classify):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model


@torch.no_grad()
def calibrated(model, images):
    """With running statistics that are those of these images."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = None  # the mean over all batches seen: this one
    model.train()(images)
    return model


@pytest.fixture
def scene():
    """Two pictures of 96 x 128: two objects and an ignored one in the first, none in the second."""
    boxes_xyxy = torch.tensor([[10.0, 10, 60, 50], [70, 30, 120, 90], [0, 60, 40, 96]])
    targets = Targets(boxes_xyxy, torch.tensor([0, 3, 2]), torch.tensor([0, 0, 0]), torch.tensor([False, False, True]))
    return torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0)), targets


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "vit_tiny"])
def test_contract(arch):
    torch.manual_seed(0)
    model = build(f"fasterrcnn_{arch}", 5)
    assert isinstance(model, Detector) and model.class_activation == "softmax"
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        output = model.eval()(images)
    assert output.image_size == (64, 96) and set(output.features) == set(model.strides) == set(model.channels)
    for name, x in output.features.items():
        stride = model.strides[name]
        assert x.shape == (1, model.channels[name], -(-64 // stride), -(-96 // stride)), name
    A = sum(output.level_counts)
    assert output.objectness_logits.shape == (1, A) and output.box_deltas.shape == (1, A, 4)
    assert output.anchors_xyxy.shape == (A, 4)
    (proposals,) = output.proposals
    assert 0 < len(proposals) <= 1000 and output.proposals[0] is proposals
    assert (proposals >= 0).all() and (proposals <= torch.tensor([96, 64, 96, 64])).all()
    (found,) = model.detect(output, score_threshold=0.0, iou_threshold=0.5, max_detections=7)
    assert len(found) == 7 and (found.scores.diff() <= 0).all() and found.labels.max() < 5


def test_two_names_of_one_network():
    """The 320 px form differs in how many proposals it looks at, and in nothing else."""
    large, low = (build(f"fasterrcnn_mobilenet_v3_large{suffix}", 2) for suffix in ("", "_320"))
    assert large.eval_selection["proposals"] == 1000 and low.eval_selection["proposals"] == 150
    assert large.train_selection == low.train_selection
    assert {k: v.shape for k, v in large.state_dict().items()} == {k: v.shape for k, v in low.state_dict().items()}


def test_forward_is_the_same_in_both_modes_but_for_batch_statistics(small, scene):
    images, _ = scene
    model = copy.deepcopy(small)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.freeze()
    with torch.no_grad():
        train, evaluation = model.train()(images), model.eval()(images)
    torch.testing.assert_close(train.objectness_logits, evaluation.objectness_logits)
    torch.testing.assert_close(train.proposals[1], evaluation.proposals[1])


@pytest.mark.parametrize(
    "shape", [(1, 3, 96, 100), (1, 3, 33, 64), (1, 3, 0, 32), (1, 3, 32, 0), (3, 32, 32), (1, 1, 32, 32)]
)
def test_sizes_that_do_not_fit_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"expected (multiples of 32|\(B, 3, H, W\))"):
        small(torch.zeros(shape))


def test_images_are_normalised_inside(small, scene):
    images, _ = scene
    seen = []
    handle = small.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    small.eval()(images)
    handle.remove()
    torch.testing.assert_close(seen[0][0, 1], (images[0, 1] - 0.456) / 0.224)


def test_class_logits_at_any_boxes(small, scene):
    """Per image, empty images too; gradients reach the backbone; each row is that of its box alone."""
    images, _ = scene
    model = copy.deepcopy(small).eval()
    output = model(images)
    boxes = [torch.tensor([[5.0, 5, 60, 60], [0, 0, 128, 96], [3, 3, 3, 3]]), torch.tensor([[20.0, 20, 90, 80]])]
    logits = model.class_logits_at(output, boxes)
    assert logits.shape == (4, 5)
    alone = model.class_logits_at(output, [torch.zeros(0, 4), boxes[1]])
    torch.testing.assert_close(alone, logits[3:])
    assert model.class_logits_at(output, [torch.zeros(0, 4)] * 2).shape == (0, 5)
    logits.sum().backward()
    assert model.backbone.stem.conv.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="2 images"):
        model.class_logits_at(output, boxes[:1])


# ------------------------------------------------------------------------------------------------ losses


def losses_of(model, scene, seed=0, targets=None):
    images, own = scene
    torch.manual_seed(seed)
    return model.losses(model(images), own if targets is None else targets)


def test_losses_are_named_finite_and_reproducible(small, scene):
    model = copy.deepcopy(small).eval()  # running statistics: nothing else changes between calls
    terms = losses_of(model, scene)
    assert set(terms) == LOSSES
    assert all(term.dtype == torch.float32 and term.shape == () and term.isfinite() for term in terms.values())
    again, other = losses_of(model, scene), losses_of(model, scene, seed=1)
    assert all(terms[name] == again[name] for name in LOSSES)
    assert any(terms[name] != other[name] for name in LOSSES)
    with pytest.raises(ValueError, match=r"targets: image is \[.*\], expected 0..1"):
        losses_of(model, scene, targets=replace(scene[1], image=scene[1].image + 2))


def test_losses_run_the_second_stage_once_and_forward_never(small, scene):
    images, targets = scene
    model = copy.deepcopy(small).eval()
    calls = []
    model.box_head.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    output = model(images)
    assert calls == []
    model.losses(output, targets)
    assert len(calls) == 1 and "proposals" not in output.__dict__
    model.detect(output, score_threshold=0.5, iou_threshold=0.5, max_detections=1)
    assert calls[1:] == [sum(map(len, output.proposals))]


@pytest.mark.parametrize("ignored", [False, True])
def test_no_objects(small, scene, ignored):
    """All is background, or, where an ignored region covers it, nothing."""
    targets = NO_TARGETS
    if ignored:
        everything = torch.tensor([[-500.0, -500, 600, 600]]).repeat(2, 1)
        targets = Targets(everything, torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([True, True]))
    model = copy.deepcopy(small).train()
    terms = losses_of(model, scene, targets=targets)
    assert terms["rpn_box"] == 0 and terms["roi_box"] == 0
    assert (terms["rpn_objectness"] == 0) == ignored and (terms["roi_class"] == 0) == ignored
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_ignored_objects_are_neither_learnt_nor_punished(small, scene):
    """Their region gives no gradient to the objectness logits of the anchors within it."""
    images, _ = scene
    model = copy.deepcopy(small).eval()
    region = torch.tensor([[0.0, 0, 64, 96]])
    covered = Targets(region, torch.tensor([1]), torch.tensor([1]), torch.tensor([True]))
    output = model(images)
    chosen = []
    at = model.rpn.at
    model.rpn.at = lambda maps, image, anchor: chosen.append((image, anchor)) or at(maps, image, anchor)
    model.losses(output, covered)
    image, anchor = chosen[0]
    assert (image == 0).sum() == RPN_SAMPLES and (image == 1).any()
    boxes = output.anchors_xyxy[anchor[image == 1]]
    inside = (torch.minimum(boxes[:, 2:], region[0, 2:]) - torch.maximum(boxes[:, :2], region[0, :2])).clamp(min=0)
    assert (inside.prod(1) < 0.5 * (boxes[:, 2:] - boxes[:, :2]).prod(1)).all()


def test_the_second_stage_is_given_proposals_and_objects(small, monkeypatch):
    """512 of an image, at most a quarter positive, and targets that decode to the objects with their labels."""
    given = {}
    model = copy.deepcopy(small).eval()
    torch.nn.init.zeros_(model.rpn.objectness.weight)  # all proposals pass,
    torch.nn.init.zeros_(model.rpn.deltas.weight)  # and are the anchors

    def predict_at(output, boxes_per_image):
        given["boxes"] = boxes_per_image
        count = sum(map(len, boxes_per_image))
        return torch.zeros(count, 5), torch.zeros(count, 5, 4)

    monkeypatch.setattr(model, "predict_at", predict_at)
    monkeypatch.setattr(faster_rcnn, "roi_losses", lambda **inputs: given.update(inputs) or (torch.zeros(()),) * 2)
    objects = torch.tensor([[3.0, 3, 40, 30], [50, 60, 200, 190], [1, 2, 4, 5]])
    targets = Targets(objects, torch.tensor([2, 0, 3]), torch.tensor([1, 1, 1]), torch.zeros(3, dtype=torch.bool))
    model.losses(model(torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))), targets)
    assert [len(boxes) for boxes in given["boxes"]] == [512, 512]
    labels = given["labels"].split(512)
    assert (labels[0] == 0).all() and 3 <= (labels[1] > 0).sum() <= 128
    assert all((box == given["boxes"][1][labels[1] > 0]).all(1).any() for box in objects)
    decoded = decode_boxes(given["target_deltas"], given["boxes"][1][labels[1] > 0], ROI_WEIGHTS)
    row = box_iou(decoded, objects).argmax(1)
    torch.testing.assert_close(decoded, objects[row], rtol=1e-4, atol=1e-3)
    assert torch.equal(labels[1][labels[1] > 0], 1 + targets.labels[row])


@pytest.mark.parametrize("arch, strides", [("resnet18", [4, 8, 16, 32]), ("mobilenet_v3_small", [32, 32])])
def test_the_second_stage_never_reads_p6(arch, strides, monkeypatch):
    model = build(f"fasterrcnn_{arch}", 1).eval()
    seen = []
    pool = faster_rcnn.roi_align
    monkeypatch.setattr(
        faster_rcnn, "roi_align", lambda *args, **options: seen.append(options["strides"]) or pool(*args, **options)
    )
    with torch.no_grad():
        model.class_logits_at(model(torch.rand(1, 3, 64, 64)), [torch.tensor([[-900.0, -900, 900, 900]])])
    assert seen == [strides]


def test_the_rpn_learns_through_sampled_anchors_as_through_all(small, scene, monkeypatch):
    """Losses and gradients are those of the dense head at the same anchors."""
    images, targets = scene
    gradients = []
    for dense in (False, True):
        model = copy.deepcopy(small).eval()
        output = model(images)
        if dense:
            all_rows = output.objectness_logits, output.box_deltas
            at = lambda maps, image, anchor, all_rows=all_rows: tuple(x[image, anchor] for x in all_rows)
            monkeypatch.setattr(model.rpn, "at", at)
        torch.manual_seed(5)
        terms = model.losses(output, targets)
        (terms["rpn_objectness"] + terms["rpn_box"]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "rpn.convs.0.weight" in gradients[0] and "backbone.stem.conv.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * gradients[1][name].norm() + 1e-7, name


def test_bfloat16_autocast(small, scene):
    """Losses are called outside of autocast, and compute the second stage in the precision of the maps."""
    images, targets = scene
    model = copy.deepcopy(small).eval()
    kinds = []
    model.box_head.register_forward_hook(lambda module, inputs, x: kinds.append(x.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    torch.manual_seed(0)
    terms = model.losses(output, targets)
    assert kinds == [torch.bfloat16] and all(term.dtype == torch.float32 for term in terms.values())
    exact = losses_of(model, scene)
    for name in ("rpn_objectness", "roi_class"):
        assert abs(terms[name] / exact[name] - 1) < 0.1
    assert len(model.detect(output, score_threshold=0.0, iou_threshold=0.5, max_detections=5)[0]) == 5


def test_frozen_epsilon_is_the_documented_one(small):
    assert {module.eps for module in small.modules() if isinstance(module, BatchNorm)} == {EPSILON}
