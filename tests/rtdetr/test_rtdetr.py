"""RT-DETR against the recorded outputs of the released implementations, and what a teaching detector must keep to."""

import dataclasses

import numpy as np
import pytest
import torch

import checkpoint
import predict
from boxes import xyxy_to_cxcywh
from engine.training import building
from errors import UserError
from layers.fusion import fuse
from models import build
from rtdetr.rtdetr import RTDETROutput, build_rtdetr, read_best_query
from structures import DetectionSettings, Detector
from tests.reference.golden_models import golden_image, public_state, relative_error, undrawn
from weights import load_public, rename_public
from weights.families import guess_family

GOLDENS = [
    ("rtdetr_r18vd", "rtdetr_r18vd"),
    ("rtdetr_r50vd", "rtdetr_r50vd"),
    ("rtdetr_l", "rtdetr-l"),
    pytest.param("rtdetr_x", "rtdetr-x", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("arch, file", GOLDENS)
def test_reproduces_the_released_model(golden, arch, file):
    arrays, meta = golden(file)
    with undrawn():
        model = build(arch, meta["nc"])
    state = public_state(meta, {})
    renamed = rename_public(model, state)[0]
    assert set(renamed) == {name for name in model.state_dict() if name in renamed or "num_batches" not in name}
    assert len(renamed) == len(state)
    frozen = file.startswith("rtdetr_")  # the authors' count leaves the backbone's BatchNorms out: they are buffers
    counted = {n: p for n, p in model.named_parameters() if not (frozen and n.startswith("backbone.") and ".bn." in n)}
    theirs = next(value for name, value in state.items() if "denoising_class_embed" in name)
    padding = theirs.numel() - counted["decoder.denoising_class.weight"].numel()  # the authors have a row for it
    assert padding == (256 if frozen else 0)
    assert sum(p.numel() for p in counted.values()) + padding == meta["params"]
    load_public(model, state)
    with torch.no_grad():
        output = model.eval()(golden_image(meta))
    for index, name in enumerate(("p3", "p4", "p5")):
        assert relative_error(output.features[name][:, ::8], arrays[f"encoder_f{index}"]) < 1e-5, name
    height, width = output.image_size
    boxes = xyxy_to_cxcywh(output.boxes_xyxy) / torch.tensor([width, height, width, height])
    order = order_of(output.query_logits[0], torch.from_numpy(arrays["logits"][0]))
    assert relative_error(boxes[:, order], arrays["boxes"]) < 1e-5
    assert relative_error(output.query_logits[:, order], arrays["logits"]) < 1e-5


def order_of(ours, theirs):
    """Our row for each golden row. Queries are in the order of scores; two that are equal to rounding may swap."""
    order = torch.cdist(theirs, ours).argmin(1)
    assert order.sort().values.equal(torch.arange(len(ours)))
    moved = (order - torch.arange(len(ours))).abs()
    assert moved.max() <= 1 and moved.sum() <= 4
    return order


@pytest.fixture(scope="module")
def public_state_of_r18(golden):
    return public_state(golden("rtdetr_r18vd")[1], {})


@pytest.fixture(scope="module")
def model(public_state_of_r18):
    """R18 with the golden's weights: no statistic of a BatchNorm is trivial, and no two queries are alike."""
    with undrawn():
        model = build("rtdetr_r18vd", 80)
    load_public(model, public_state_of_r18)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 128, 160, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def output(model, images):
    return model(images)


@pytest.mark.parametrize("arch", ["rtdetr_r18vd", "rtdetr_r50vd", "rtdetr_l", "rtdetr_x"])
def test_features_are_as_announced(arch):
    """On the meta device: shapes alone."""
    with torch.device("meta"):
        model = build(arch, 3).eval()
        output = model(torch.zeros(1, 3, 64, 96))
    assert list(output.features) == list(model.strides) == list(model.channels) == ["c3", "c4", "c5", "p3", "p4", "p5"]
    assert output.boxes_xyxy.shape == (1, 96 + 24 + 6, 4) and output.query_logits.shape == (1, 96 + 24 + 6, 3)
    for name, value in output.features.items():
        assert value.shape == (1, model.channels[name], 64 // model.strides[name], 96 // model.strides[name])


def test_output_is_the_same_in_train_mode_but_for_batchnorm(model, images, output):
    assert output.image_size == (128, 160)
    assert output.boxes_xyxy.shape == (2, 300, 4) and output.query_logits.shape == (2, 300, 80)
    boxes = model.decoder([output.features[name] for name in ("p3", "p4", "p5")]).boxes[:, -1]
    in_fractions = xyxy_to_cxcywh(output.boxes_xyxy) / torch.tensor([160.0, 128.0, 160.0, 128.0])
    torch.testing.assert_close(in_fractions, boxes, rtol=1e-4, atol=1e-5)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    again = model(images)
    model.eval()
    torch.testing.assert_close(again.boxes_xyxy, output.boxes_xyxy)
    torch.testing.assert_close(again.query_logits, output.query_logits)


def test_is_a_detector_whose_head_follows_the_classes(model):
    assert isinstance(model, Detector)
    assert model.class_activation == "sigmoid" and model.size_multiple == 32
    head = {name for name in model.state_dict() if name.startswith(model.class_head)}
    with torch.device("meta"):
        other = build("rtdetr_r18vd", 6).state_dict()
    assert {name for name, value in model.state_dict().items() if value.shape != other[name].shape} == head


def test_the_decoder_is_skipped_where_only_maps_are_requested(model, images, output):
    calls = []
    hook = model.decoder.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        for requested, runs in [
            (None, True), (frozenset({"p3", "c5"}), False), (frozenset(), False),
            (frozenset({"query_logits"}), True), (frozenset({"p3", "boxes_xyxy"}), True),
        ]:  # fmt: skip
            calls.clear()
            model.requested_outputs = requested
            got = model(images)
            assert len(calls) == runs and (got.boxes_xyxy is None) == (got.query_logits is None) == (not runs)
            assert all(torch.equal(got.features[name], value) for name, value in output.features.items())
            if not runs:
                with pytest.raises(ValueError, match="the decoder was skipped"):
                    model.class_logits_at(got, [torch.zeros(0, 4)] * 2)
    finally:
        model.requested_outputs = None
        hook.remove()


def test_fused_inference_equals_unfused(model, images, output):
    fused = fuse(fuse(model))  # folding twice is folding once
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert "encoder.top_down3.blocks.0.conv1x1.conv.weight" in model.state_dict()
    assert not any("conv1x1" in name for name in fused.state_dict())
    got = fused(images)
    for name, value in output.features.items():
        assert relative_error(got.features[name], value.numpy()) < 1e-5, name
    order = order_of(got.query_logits[0], output.query_logits[0])
    torch.testing.assert_close(got.boxes_xyxy[0, order], output.boxes_xyxy[0], rtol=1e-4, atol=0.02)


def test_channels_last_and_autocast(model, images, output):
    got = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    model.to(memory_format=torch.contiguous_format)
    assert relative_error(got.features["p3"], output.features["p3"].numpy()) < 1e-5
    assert got.features["p3"].is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    assert half.query_logits.dtype == torch.bfloat16 and half.boxes_xyxy.dtype == torch.float32
    assert half.boxes_xyxy.isfinite().all()
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found = model.detect(half, score_threshold=0.0, iou_threshold=0.7, max_detections=9)
        assert found[0].scores.dtype == torch.float32 and len(found[0]) == 9


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (96, 160)])
def test_small_pictures_have_as_many_queries_as_cells(model, size):
    height, width = size
    cells = sum((height // s) * (width // s) for s in (8, 16, 32))
    got = model(torch.rand(1, 3, height, width))
    assert got.boxes_xyxy.shape == (1, min(cells, 300), 4) and got.boxes_xyxy.isfinite().all()
    x1, y1, x2, y2 = got.boxes_xyxy.unbind(-1)
    assert (x1 <= x2).all() and (y1 <= y2).all() and (x1 + x2 <= 2 * width).all() and (y1 + y2 >= 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 33, 64), (1, 3, 64, 48), (1, 3, 0, 32), (3, 32, 32), (1, 1, 32, 32)])
def test_refuses_other_sizes(model, shape):
    with pytest.raises(ValueError, match=r"expected (multiples of 32|\(B, 3, H, W\))"):
        model(torch.zeros(shape))


def planted(logits, boxes_xyxy, image_size=(64, 96)):
    return RTDETROutput({}, torch.tensor(boxes_xyxy).float(), torch.tensor(logits).float(), image_size)


def test_detect_ranks_pairs_of_query_and_class_without_suppression(model):
    box = [10.0, 10.0, 40.0, 50.0]
    logits = np.full((2, 3, 5), -9.0)
    logits[0, 0, 3], logits[0, 1, 3], logits[0, 1, 4], logits[0, 2, 0] = 2.0, 1.0, 3.0, 1.0
    output = planted(logits, [[box, box, [0.0, 0.0, 5.0, 5.0]]] * 2)
    settings = dict(score_threshold=0.5, iou_threshold=0.1, max_detections=10)
    first, second = model.detect(output, **settings)
    assert first.labels.tolist() == [4, 3, 3, 0]  # equal boxes stay; of equal scores the earlier query first
    assert first.scores.tolist() == pytest.approx([1 / (1 + np.exp(-z)) for z in (3, 2, 1, 1)])
    assert first.boxes_xyxy.tolist() == [box, box, box, [0, 0, 5, 5]]
    assert len(second) == 0 and second.boxes_xyxy.shape == (0, 4) and second.labels.dtype == torch.int64
    assert len(model.detect(output, **settings | {"max_detections": 2})[0]) == 2
    assert len(model.detect(output, **settings | {"score_threshold": 0.0, "max_detections": 99})[0]) == 15
    one = model.detect(output, **settings | {"iou_threshold": 0.99})[0]
    assert torch.equal(one.scores, first.scores)  # the IoU threshold is ignored


def test_detect_never_returns_what_is_not_a_number(model):
    logits = np.zeros((1, 2, 5))
    logits[0, 0] = np.nan
    (found,) = model.detect(
        planted(logits, [[[0.0, 0.0, 5.0, 5.0]] * 2]), score_threshold=0.0, iou_threshold=0.7, max_detections=300
    )
    assert len(found) == 5 and found.scores.isfinite().all()


def best_query_reference(z, queries, boxes):
    """The rule of read_best_query in float64 numpy, box by box."""
    rows = []
    for x1, y1, x2, y2 in boxes:
        best, chosen = 0.0, None
        for logits, (a1, b1, a2, b2) in zip(z, queries):
            overlap = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            iou = overlap / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - overlap)
            measure = iou**6 / (1 + np.exp(-logits.max()))
            if measure > best:
                best, chosen = measure, logits
        rows.append(z.min(0) if chosen is None else chosen)
    return np.array(rows)


def test_given_boxes_read_the_query_of_the_reference_rule():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 70, (60, 2))
    queries = np.concatenate([corner, corner + rng.uniform(5, 40, (60, 2))], axis=1)
    boxes = queries[rng.permutation(60)[:15]] + rng.uniform(-2, 2, (15, 4))
    boxes[0] = [300, 300, 320, 330]  # where no query is
    z = 3 * rng.normal(size=(60, 4))
    got = read_best_query(torch.tensor(z), query_xyxy=torch.tensor(queries), boxes_xyxy=torch.tensor(boxes))
    np.testing.assert_allclose(got.numpy(), best_query_reference(z, queries, boxes))
    np.testing.assert_allclose(got[0].numpy(), z.min(0))


def test_of_queries_on_one_object_the_confident_one_speaks(model):
    """The duplicates that training has silenced do not outvote it, nor does a confident neighbour."""
    box = [10.0, 10.0, 50.0, 50.0]
    queries = [[11.0, 10.0, 50.0, 50.0], box, [10.0, 10.0, 50.0, 49.0], [40.0, 10.0, 80.0, 50.0]]
    logits = np.full((1, 4, 5), -7.0)
    logits[0, 2, 1], logits[0, 3, 4] = 2.0, 6.0
    output = planted(logits, [queries])
    got = model.class_logits_at(output, [torch.tensor([box, box])])  # two boxes may read one query
    assert torch.equal(got, output.query_logits[0, [2, 2]])
    # Where the object's own queries all doubt, the neighbour, overlapping by 1/3, still does not speak for it.
    logits[0, :3] = -3.0
    output = planted(logits, [[*queries[:3], [30.0, 10.0, 70.0, 50.0]]])
    assert torch.equal(model.class_logits_at(output, [torch.tensor([box])]), output.query_logits[0, [1]])


def test_class_logits_at_goes_image_by_image_and_is_differentiable(model, output):
    logits = output.query_logits.clone().requires_grad_()
    graph = RTDETROutput(output.features, output.boxes_xyxy, logits, output.image_size)
    chosen = torch.tensor([5, 77, 250])
    got = model.class_logits_at(graph, [torch.zeros(0, 4), output.boxes_xyxy[1, chosen].double()])
    assert got.shape == (3, 80)
    got.sum().backward()
    assert not logits.grad[0].any() and logits.grad[1].sum().item() == 240
    assert model.class_logits_at(output, [torch.zeros(0, 4)] * 2).shape == (0, 80)
    with pytest.raises(ValueError):
        model.class_logits_at(output, [torch.zeros(0, 4)])


@pytest.fixture(scope="module")
def public_file(public_state_of_r18, tmp_path_factory):
    """R18 as the authors' training writes it: weights under ema.module."""
    path = tmp_path_factory.mktemp("public") / "rtdetr_r18vd_dec3_6x_coco_from_paddle.pth"
    torch.save({"ema": {"module": public_state_of_r18, "updates": 1}}, path)
    return path


def test_a_public_file_loads_predicts_and_gives_its_class_count(public_file):
    model, info = checkpoint.load_model(public_file, "rtdetr_r18vd")
    assert info.arch == "rtdetr_r18vd" and len(info.names) == 80 and info.source == "public"
    assert model.num_classes == 80 and not model.training
    predictor = predict.Predictor(model, image_size=128, detection=DetectionSettings(0.0, max_detections=50))
    picture = (255 * np.random.default_rng(0).random((70, 100, 3))).astype(np.uint8)
    (found,) = predictor([picture])
    assert len(found) == 50 and found.scores.diff().le(0).all() and (found.boxes_xyxy <= 100).all()


def test_another_model_s_file_is_refused_in_one_line(public_file):
    with pytest.raises(UserError, match="is not rtdetr_r50vd") as error:
        checkpoint.load_model(public_file, "rtdetr_r50vd")
    assert "\n" not in str(error.value)
    with torch.device("meta"):
        large = build("rtdetr_l", 80)
    with pytest.raises(UserError, match=r"these are rtdetr_r18vd weights, the model is rtdetr-l \(Ultralytics\)$"):
        load_public(large, public_file)


@pytest.mark.parametrize("arch, family", [(a, a) for a in ("rtdetr_r18vd", "rtdetr_r50vd")] + [
    ("rtdetr_l", "rtdetr-l (Ultralytics)"), ("rtdetr_x", "rtdetr-x (Ultralytics)"),
])  # fmt: skip
def test_released_names_are_recognised(golden, arch, family):
    _, meta = golden(arch if "vd" in arch else arch.replace("_", "-"))
    assert guess_family({name: tuple(shape) for name, shape, _ in meta["keys"]}) == family


def test_a_student_from_scratch_is_warned_of(make_tiny, tmp_path):
    config, said = make_tiny(), []
    student = dataclasses.replace(config.student, arch="rtdetr_r18vd")
    building.build_student(dataclasses.replace(config, student=student), ("disc", "square"), say=said.append)
    assert len(said) == 1 and "warning: rtdetr_r18vd starts from random weights" in said[0] and "issue 382" in said[0]
    checkpoint.save(tmp_path / "r.pt", checkpoint_of("rtdetr_r18vd"))
    student = dataclasses.replace(student, weights=str(tmp_path / "r.pt"))
    building.build_student(dataclasses.replace(config, student=student), ("disc", "square"), say=said.append)
    assert not any("warning" in line for line in said[1:])


def checkpoint_of(arch):
    about = {"arch": arch, "names": ["disc", "square"], "image_size": 64}
    return about | {"ema": build(arch, 2).state_dict()}


def test_another_class_count_is_refused(public_file):
    with pytest.raises(UserError, match="only the class head differs"):
        load_public(build("rtdetr_r18vd", 3), public_file)


def test_one_seed_one_model_and_forward_draws_nothing():
    torch.manual_seed(5)
    first = build_rtdetr("r18vd", 2)
    torch.manual_seed(5)
    second = build_rtdetr("r18vd", 2).eval()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    before = torch.get_rng_state()
    second(torch.rand(1, 3, 32, 32, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())
