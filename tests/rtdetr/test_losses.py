"""What RT-DETR learns: matching, losses and denoising against transformers' recorded numbers, and identities."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from rtdetr import decoder as decoder_file
from rtdetr import denoising, losses, matching
from rtdetr.decoder import Decoder, map_sizes
from rtdetr.denoising import make_noisy_objects
from rtdetr.losses import class_shares, is_in_ignored, query_losses, to_fractions
from rtdetr.matching import least_cost_assignment, match_queries
from structures import Targets
from tests.conftest import ROOT
from tests.distill.losses.mutants.machinery import Edit, apply_edit
from tests.golden import recipe
from tests.golden.recipe import uniform


def values(meta, name, shape):
    return torch.tensor(uniform(meta["salt"] + name, tuple(shape)))


def recorded_objects(meta, name, counts, num_classes):
    """boxes (N, 4) cxcywh_norm, labels (N,) and image (N,), image by image."""
    center = [0.5 + 0.3 * values(meta, f"{name}.center{b}", (n, 2)) for b, n in enumerate(counts)]
    size = [0.25 + 0.15 * values(meta, f"{name}.size{b}", (n, 2)) for b, n in enumerate(counts)]
    share = torch.cat([(values(meta, f"{name}.label{b}", (n,)) + 1) / 2 for b, n in enumerate(counts)])
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.cat((torch.cat(center), torch.cat(size)), 1), (share * num_classes).long(), image


def recorded_draws(meta, name, shape, num_classes):
    return dict(
        size=(values(meta, f"{name}.size", (*shape, 4)) + 1) / 2,
        sign=torch.where(values(meta, f"{name}.sign", (*shape, 4)) > 0, 1.0, -1.0),
        flip=(values(meta, f"{name}.flip", shape) + 1) / 2,
        other=((values(meta, f"{name}.other", shape) + 1) / 2 * num_classes).long(),
    )


def noisy_objects(meta, name, counts, num_classes, num_queries, make=make_noisy_objects):
    boxes, labels, image = recorded_objects(meta, name, counts, num_classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "NUM_QUERIES", num_queries)
        patch.setattr(denoising, "draw_noise", lambda shape, K: recorded_draws(meta, name, shape, K))
        return make(boxes, labels, image, num_images=len(counts), num_classes=num_classes)


# --------------------------------------------------------------------------------- against transformers, in float64


def check_recorded_losses(golden, match=match_queries, compute=query_losses):
    """Objects of 4, 0 and 7 in three images; three layers, each matched by itself."""
    arrays, meta = golden("loss_rtdetr")
    K, B, L, Q, counts = meta["losses"].values()
    logits = (3 * values(meta, "logits", (B, L, Q, K))).requires_grad_()
    boxes = (1.5 * values(meta, "boxes", (B, L, Q, 4)) - 0.5).sigmoid().requires_grad_()
    gt_boxes, labels, image = recorded_objects(meta, "a", counts, K)
    matches = match(logits, boxes, labels=labels, gt_boxes=gt_boxes, image=image)
    first_row = np.cumsum([0, *counts])
    own = [(b, layer, q, row - first_row[b]) for b, layer, q, row in torch.stack(matches, 1).tolist()]
    assert sorted(own) == sorted(map(tuple, arrays["matches"].tolist()))
    classes = torch.nn.functional.one_hot(labels, K).double()
    got = compute(logits, boxes, matches, gt_boxes=gt_boxes, classes=classes, count=float(sum(counts)))
    assert list(got) == ["vfl", "l1", "giou"]
    np.testing.assert_allclose([value.item() for value in got.values()], arrays["losses"], rtol=1e-6)
    sum(got.values()).backward()
    np.testing.assert_allclose(logits.grad, arrays["grad_logits"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(boxes.grad, arrays["grad_boxes"], rtol=1e-6, atol=1e-9)


def check_recorded_noise(golden, make=make_noisy_objects):
    """Objects of 3, 1, 0 and 2 in four images: 3 groups of 3 positives and 3 negatives."""
    arrays, meta = golden("loss_rtdetr")
    about = meta["noise"]
    noisy = noisy_objects(meta, "b", about["counts"], about["classes"], about["queries"], make)
    T = noisy.labels.shape[1]
    assert noisy.groups == 3 and T == 18
    assert torch.equal(noisy.is_real, torch.tensor(arrays["noisy_labels"]) < about["classes"])
    assert torch.equal(noisy.labels[noisy.is_real], torch.tensor(arrays["noisy_labels"])[noisy.is_real].long())
    got = decoder_file.inverse_sigmoid(noisy.boxes)[noisy.is_real]
    np.testing.assert_allclose(got, arrays["noisy_logits"][noisy.is_real.numpy()], rtol=1e-6, atol=1e-9)
    groups_apart = torch.tensor(arrays["noisy_hidden"][:T, :T])  # theirs do not hide what pads an image
    assert torch.equal(noisy.is_hidden, groups_apart | ~noisy.is_real[:, None, :])
    assert not arrays["noisy_hidden"][:T, T:].any() and arrays["noisy_hidden"][T:, :T].all()
    image, layer, query, row = noisy.matches
    assert sorted(zip(image.tolist(), query.tolist())) == sorted(map(tuple, arrays["noisy_positive"].tolist()))
    number = row - torch.tensor(np.cumsum([0, *about["counts"]]))[image]  # within its image
    assert torch.equal(number, query % 3) and not layer.any()


def recorded_decoder(meta):
    about = meta["decoder"]
    made = Decoder(
        in_channels=about["channels"], num_classes=about["classes"], num_layers=about["layers"],
        num_queries=about["queries"], width=about["width"], heads=about["heads"], hidden=about["hidden"],
    ).double()  # fmt: skip
    for name, parameter in made.named_parameters():
        parameter.data = torch.tensor(recipe.fill(name, tuple(parameter.shape), 1.0, meta["salt"]))
    maps = [values(meta, f"map{i}", (2, about["channels"], *size)) for i, size in enumerate(about["sizes"])]
    return made, [x.requires_grad_() for x in maps]


def check_recorded_decoder(golden, denoise=None):
    """The queries of the encoder and the denoising ones, computed apart here and under one mask there."""
    arrays, meta = golden("loss_rtdetr")
    about = meta["decoder"]
    made, maps = recorded_decoder(meta)
    decoded = made.train()(maps)
    noisy = noisy_objects(meta, "c", about["counts"], about["classes"], about["denoising"])
    boxes, logits = (denoise or Decoder.denoise)(made, decoded, noisy, map_sizes(maps))
    T = noisy.labels.shape[1]
    for ours, name in ((decoded.boxes, "boxes"), (decoded.logits, "logits")):
        np.testing.assert_allclose(ours[:, 0].detach(), arrays[f"proposal_{name}"], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(ours[:, 1:].detach(), arrays[f"decoder_{name}"][:, :, T:], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(boxes.detach(), arrays["decoder_boxes"][:, :, :T], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(logits.detach(), arrays["decoder_logits"][:, :, :T], rtol=1e-6, atol=1e-9)

    gt_boxes, labels, image = recorded_objects(meta, "c", about["counts"], about["classes"])
    on = dict(gt_boxes=gt_boxes, classes=torch.nn.functional.one_hot(labels, about["classes"]).double())
    matches = match_queries(decoded.logits, decoded.boxes, labels=labels, gt_boxes=gt_boxes, image=image)
    own = query_losses(decoded.logits, decoded.boxes, matches, **on, count=4.0)
    denoised = query_losses(logits, boxes, noisy.matches_of_layers(2), **on, count=4.0 * noisy.groups)
    got = [value.item() for value in (*own.values(), *denoised.values())]
    np.testing.assert_allclose(got, arrays["decoder_losses"], rtol=1e-6)
    (sum(own.values()) + sum(denoised.values())).backward()
    for i, x in enumerate(maps):
        np.testing.assert_allclose(x.grad, arrays[f"grad_map{i}"], rtol=1e-6, atol=1e-9)
    for name in (name for name in arrays if name.startswith("grad:")):
        parameter = made.get_parameter(name.removeprefix("grad:"))
        np.testing.assert_allclose(parameter.grad, arrays[name], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("check", [check_recorded_losses, check_recorded_noise, check_recorded_decoder])
def test_equals_transformers(check, golden):
    check(golden)


# -------------------------------------------------------------------------------------------------- the assignment


def check_assignment(assign=least_cost_assignment):
    rng = np.random.default_rng(0)
    for rows, columns in [(0, 3), (1, 1), (1, 5), (3, 3), (4, 6), (5, 5), (6, 7)]:
        for case in range(12):
            cost = rng.normal(size=(rows, columns)) if case % 2 else rng.integers(-2, 3, (rows, columns)).astype(float)
            found = assign(cost)
            assert found.shape == (rows,) and len(set(found.tolist())) == rows
            orders = itertools.permutations(range(columns), rows)
            best = min(sum(cost[r, c] for r, c in enumerate(order)) for order in orders)
            assert cost[np.arange(rows), found].sum() == pytest.approx(best, abs=1e-9)


def test_assignment_is_the_best_of_all_orders():
    check_assignment()
    with pytest.raises(ValueError, match="3 rows for 2 columns"):
        least_cost_assignment(np.zeros((3, 2)))


def test_a_cost_that_is_no_number_is_avoided():
    cost = np.array([[np.nan, 5.0, 9.0], [1.0, np.inf, 2.0]])
    assert least_cost_assignment(cost).tolist() == [1, 0]
    assert sorted(least_cost_assignment(np.full((2, 2), np.nan)).tolist()) == [0, 1]


def test_more_objects_than_queries_match_the_cheapest():
    gt_boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]])
    boxes = torch.tensor([[[[0.8, 0.8, 0.1, 0.12], [0.5, 0.5, 0.2, 0.18]]]])
    matches = match_queries(
        torch.zeros(1, 1, 2, 1), boxes, labels=torch.zeros(3, dtype=torch.int64), gt_boxes=gt_boxes,
        image=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    assert sorted(zip(matches.query.tolist(), matches.row.tolist())) == [(0, 2), (1, 1)]


# ------------------------------------------------------------------------------------------------------ identities


def scene(counts=(2, 0, 3), K=4, L=2, Q=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    gt_boxes = torch.cat((0.3 + 0.4 * draw(len(image), 2), 0.1 + 0.2 * draw(len(image), 2)), 1)
    labels = torch.randint(K, (len(image),), generator=generator)
    logits = (4 * draw(len(counts), L, Q, K) - 2).requires_grad_()
    boxes = torch.cat((draw(len(counts), L, Q, 2), 0.1 + 0.3 * draw(len(counts), L, Q, 2)), -1).requires_grad_()
    return logits, boxes, gt_boxes, labels, image


def losses_of(logits, boxes, gt_boxes, labels, image, classes=None, **options):
    matches = match_queries(logits, boxes, labels=labels, gt_boxes=gt_boxes, image=image)
    shares = torch.nn.functional.one_hot(labels, logits.shape[-1]).double() if classes is None else classes
    return query_losses(logits, boxes, matches, gt_boxes=gt_boxes, classes=shares, count=max(len(labels), 1), **options)


def test_without_objects_only_the_background_is_learnt():
    logits, boxes, *objects = scene(counts=(0, 0))
    got = losses_of(logits, boxes, *objects)
    expected = 0.75 * logits.sigmoid() ** 2 * torch.nn.functional.softplus(logits)
    assert got["vfl"].item() == pytest.approx(expected.sum().item()) and got["l1"] == got["giou"] == 0
    sum(got.values()).backward()
    assert logits.grad.abs().min() > 0 and not boxes.grad.any()


def test_perfect_queries_cost_nothing():
    _, _, gt_boxes, labels, image = scene(counts=(2, 2))
    logits = torch.full((2, 1, 2, 4), -40.0, dtype=torch.float64)
    for row, (b, label) in enumerate(zip(image.tolist(), labels.tolist())):
        logits[b, 0, row % 2, label] = 40
    got = losses_of(logits, gt_boxes.view(2, 1, 2, 4), gt_boxes, labels, image)
    assert max(abs(value.item()) for value in got.values()) < 1e-12


def test_no_gradient_flows_through_target_and_weight():
    """The class loss moves no box, and its gradient is w (p - t) with w as it is."""
    logits, boxes, *objects = scene()
    losses_of(logits, boxes, *objects)["vfl"].backward()
    assert boxes.grad is None
    p, unmatched = logits.detach()[1].sigmoid(), logits.grad[1]  # the image without objects
    torch.testing.assert_close(unmatched, 0.75 * p**3 / 5)


def test_soft_classes_of_one_class_are_its_label():
    logits, boxes, gt_boxes, labels, image = scene()
    targets = Targets(gt_boxes, labels, image, torch.zeros(len(labels), dtype=torch.bool))
    plain = losses_of(logits, boxes, gt_boxes, labels, image, class_shares(targets, 4, torch.float64))
    soft = replace(targets, class_scores=torch.nn.functional.one_hot(labels, 4).float())
    assert losses_of(logits, boxes, gt_boxes, labels, image, class_shares(soft, 4, torch.float64)) == plain
    spread = torch.full((len(labels), 4), 0.25, dtype=torch.float64)
    assert losses_of(logits, boxes, gt_boxes, labels, image, spread)["vfl"] != plain["vfl"]


def test_a_query_in_an_ignored_region_is_no_background():
    image_size, far = (50, 100), [0.1, 0.1, 0.1, 0.1]
    boxes = torch.tensor([[[far, [0.75, 0.5, 0.3, 0.5], [0.49, 0.5, 0.3, 0.5]]], [[far, far, [0.7, 0.5, 0.2, 0.4]]]])
    targets = Targets(
        torch.tensor([[50.0, 10, 100, 40], [0, 0, 9, 9], [3, 3, 3, 8]]),
        torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.tensor([True, False, False]),
    )  # fmt: skip
    assert is_in_ignored(boxes, targets, image_size).tolist() == [[[False, True, False]], [[False] * 3]]
    assert is_in_ignored(boxes, targets.learnt(), image_size) is None
    assert targets.learnt().boxes_xyxy.tolist() == [[0, 0, 9, 9]]  # the last has no width
    assert to_fractions(targets.boxes_xyxy[:1], image_size).tolist() == [[0.75, 0.5, 0.5, pytest.approx(0.6)]]
    logits, boxes, *objects = scene()
    is_left_out = torch.ones(3, 2, 6, dtype=torch.bool)
    losses_of(logits, boxes, *objects, is_left_out=is_left_out)["vfl"].backward()
    assert not logits.grad[1].any() and (logits.grad.abs().sum(-1) > 0).sum() == 2 * 5  # matched queries learn


def test_an_image_does_not_depend_on_the_padding_that_others_need():
    """Public code pads images with rows that other queries see; here an image alone has the same output."""
    meta = {"salt": "alone"}
    made = Decoder(in_channels=3, num_classes=4, num_layers=2, num_queries=5, width=16, heads=2, hidden=8).double()
    for name, parameter in made.named_parameters():
        parameter.data = torch.tensor(recipe.fill(name, tuple(parameter.shape)))
    maps = [values(meta, f"map{i}", (2, 3, *size)) for i, size in enumerate([(4, 4), (2, 2), (1, 1)])]
    both = noisy_objects(meta, "x", (1, 3), 4, 3)
    assert both.groups == 1 and both.is_real.sum(1).tolist() == [2, 6]
    made.eval()
    boxes, logits = made.denoise(made(maps), both, map_sizes(maps))
    first = both.is_real[0]
    alone = replace(
        both, labels=both.labels[:1, first], boxes=both.boxes[:1, first], is_real=both.is_real[:1, first],
        is_hidden=both.is_hidden[:1, first][:, :, first],
    )  # fmt: skip
    own_maps = [x[:1] for x in maps]
    own_boxes, own_logits = made.denoise(made(own_maps), alone, map_sizes(own_maps))
    torch.testing.assert_close(own_boxes, boxes[:1, :, first])
    torch.testing.assert_close(own_logits, logits[:1, :, first])


def test_noise_is_in_its_range_and_flips_a_quarter():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1]]).double()
    draws = denoising.draw_noise((1, 4000), 5)
    is_negative = torch.arange(4000) % 2 == 1
    noisy, labels = denoising.add_noise(
        boxes.expand(1, 4000, 4), torch.full((1, 4000), 2), is_negative.expand(1, 4000), **draws
    )
    moved = (losses.cxcywh_to_xyxy(noisy) - losses.cxcywh_to_xyxy(boxes))[0].abs() / torch.tensor(
        [0.1, 0.05, 0.1, 0.05]
    )
    assert moved[~is_negative].max() < 1 and moved[~is_negative].min() < 0.01 < 0.99 < moved[~is_negative].max()
    assert 1 <= moved[is_negative].min() + 1e-9 and 1.98 < moved[is_negative].max() < 2
    assert (labels != 2).float().mean() == pytest.approx(0.25 * 4 / 5, abs=0.02)
    assert set(labels.unique().tolist()) == set(range(5)) and sorted(draws["sign"].unique().tolist()) == [-1, 1]


def test_no_objects_give_tensors_that_learn_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    noisy = make_noisy_objects(torch.zeros(0, 4), none, none, num_images=2, num_classes=3)
    assert not noisy.is_real.any() and noisy.labels.shape[1] > 0 and len(noisy.matches.row) == 0


# --------------------------------------------------------------------------------------------------------- mutants

LOSSES, MATCH, NOISE, ASSIGN = "losses", "match", "noise", "assignment"
MUTANTS = {
    "boxes count once": (LOSSES, query_losses, Edit("L1_GAIN * (", "(")),
    "giou is iou": (LOSSES, query_losses, Edit("giou = paired_giou(", "giou = paired_iou(")),
    "overlap is no target": (LOSSES, query_losses, Edit("paired_iou(predicted_xyxy, true_xyxy, eps=0))",
                                                        "torch.ones_like(giou))")),
    "mean of the layers": (LOSSES, query_losses, Edit("vfl.sum() / count", "vfl.sum() / count / logits.shape[1]")),
    "background of the certain alone": (LOSSES, losses.varifocal_loss, Edit("** VARIFOCAL_GAMMA", "** 3")),
    "background weighs as much": (LOSSES, losses.varifocal_loss, Edit("VARIFOCAL_ALPHA * ", "")),
    "other classes of a match weigh nothing": (
        LOSSES, losses.varifocal_loss, Edit("(1 - classes)", "(1 - classes.amax(-1, keepdim=True))")),
    "target is a weight alone": (
        LOSSES, losses.varifocal_loss, Edit("logits, target, weight", "logits, classes, weight")),
    "classes do not cost": (MATCH, matching.match_cost, Edit("CLASS_COST * (", "0 * (")),
    "boxes do not cost": (MATCH, matching.match_cost, Edit("L1_COST * ", "0 * ")),
    "overlap does not cost": (MATCH, matching.match_cost, Edit("- GIOU_COST * giou", "")),
    "the largest cost wins": (MATCH, matching.match_cost, Edit("return CLASS_COST", "return -CLASS_COST")),
    "positives alone cost": (MATCH, matching.match_cost, Edit("(as_positive - as_negative)", "as_positive")),
    "negatives are positives": (NOISE, denoising.add_noise, Edit(" + is_negative[..., None].to(size.dtype)", "")),
    "noise of a whole side": (NOISE, denoising.add_noise, Edit("boxes[..., 2:]), -1) / 2", "boxes[..., 2:]), -1)")),
    "noise to one side": (NOISE, denoising.add_noise, Edit("sign * (size", "(size")),
    "corners leave the image": (NOISE, denoising.add_noise, Edit(".clamp(0, 1)", "")),
    "half of the labels flip": (NOISE, denoising.add_noise, Edit("flip < LABEL_NOISE", "flip < 2 * LABEL_NOISE")),
    "groups see one another": (NOISE, make_noisy_objects, Edit("group[:, None] != group", "group[:, None] < group")),
    "padding is seen": (NOISE, make_noisy_objects, Edit(" | ~is_real[:, None, :]", " | is_real[:, None, :] & False")),
    "negatives are matched": (NOISE, make_noisy_objects, Edit("(is_real & ~is_negative)", "(is_real & is_negative)")),
    "prices of columns stay": (ASSIGN, least_cost_assignment, Edit("v[is_done] -=", "0 * v[is_done] -")),
    "prices of rows stay": (ASSIGN, least_cost_assignment, Edit("u[owner[done]] +=", "0 * u[owner[done]] +")),
    "greedy": (ASSIGN, least_cost_assignment, Edit("length + cost[row]", "cost[row]")),
}  # fmt: skip


def test_the_document_counts_the_wrong_variants():
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    assert (
        f"RT-DETR's matching, losses and denoising: wrong variants that their tests notice | {len(MUTANTS)} of" in text
    )


@pytest.mark.parametrize("wrong", MUTANTS)
def test_wrong_variant_is_noticed(wrong, golden):
    kind, function, edit = MUTANTS[wrong]
    mutant = apply_edit(function, edit)
    place = {"losses": losses, "match": matching, "noise": denoising}.get(kind)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        if place is not None and function is not query_losses and function is not make_noisy_objects:
            patch.setattr(place, function.__name__, mutant)
        if kind == ASSIGN:
            check_assignment(mutant)
        elif kind == NOISE:
            check_recorded_noise(golden, *([mutant] if function is make_noisy_objects else []))
        else:
            check_recorded_losses(golden, compute=mutant if function is query_losses else query_losses)
