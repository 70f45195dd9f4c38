"""Terms with content_only: the padding beside a picture takes no part, whatever both models make of it."""

import pytest
import torch
from torch import nn

from distill.adapters import resize_shown
from distill.criterion import TeacherFacts
from distill.outputs import content_at
from distill.terms import LOSSES
from tests.distill.test_criterion import IMAGES, TARGETS, TinyDetector, build, term


@pytest.mark.parametrize("adapter", ["conv1x1", "conv1x1_norm", "conv3x3"])
@pytest.mark.parametrize(
    "name",
    "mse cosine cwd pkd attention location_similarity fgd masked_mse decoupled_mse score_weighted_l2".split(),
)
def test_padding_takes_no_part_where_a_term_leaves_it_out(name, adapter):
    """What either model makes of the lower half moves neither loss nor gradient; without content_only it does."""
    student, teacher = TinyDetector(4), TinyDetector(6).requires_grad_(False).eval()
    content = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    content[:, :, 16:] = False
    found = {}
    for only in (True, False):
        criterion = build(
            term(loss=name, student_maps=("p3",), adapter=adapter, content_only=only),
            student=student,
            teachers={"big": teacher},
        )
        s, t = student(IMAGES), teacher(IMAGES)
        values = []
        for _ in range(2):
            loss = criterion(s, {"big": t}, TARGETS, 0.0, content)[f"{name}_big"]
            (gradient,) = torch.autograd.grad(loss, s.features["p3"])
            values.append(loss.item())
            t.features["p3"][:, :, 2:] += 3 * torch.randn(2, 6, 2, 4)
            t.class_logits[:, 8:16] += 3  # the locations of these cells
            s.features["p3"].data[:, :, 2:] += torch.randn(2, 4, 2, 4)
        found[only] = values[0] == values[1], gradient[:, :, 2:].abs().max().item() == 0, gradient[:, :, :2].any()
        assert criterion.leaves_padding_out == only
    assert found[True] == (True, True, True) and not found[False][0]


@pytest.mark.parametrize("side", [48, 64])
@pytest.mark.parametrize("name", ["mse", "cwd", "attention", "mgd", "instance_distance", "score_weighted_l2"])
def test_padding_takes_no_part_in_a_resized_map(name, side):
    """A teacher of larger images has finer maps: resizing does not mix its padding into the picture's border."""
    student, teacher = TinyDetector(4), TinyDetector(6).requires_grad_(False).eval()
    content = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    content[:, :, 16:] = False
    adapter = "conv1x1" if LOSSES[name].same_width else "none"
    criterion = build(
        term(loss=name, student_maps=("p3",), adapter=adapter, content_only=True),
        student=student, teachers={"big": teacher}, facts={"big": TeacherFacts(image_size=side)},
    )  # fmt: skip
    s, t = student(IMAGES), teacher(nn.functional.interpolate(IMAGES, size=(side, side)))
    t.image_size, half = (side, side), side // 16
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        values.append(criterion(s, {"big": t}, TARGETS, 0.0, content)[f"{name}_big"].item())
        t.features["p3"][:, :, half:] += 3
        t.class_logits[:, 2 * half * half : 4 * half * half] += 3  # the locations of these cells
    assert values[0] == values[1] > 0


def test_resizing_what_is_shown_is_a_mean_of_that_alone():
    t_map, shown = torch.full((1, 1, 4, 4), 9.0), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    shown[..., :1, :] = True
    t_map[..., :1, :] = 2.0
    resized, is_reached = resize_shown(t_map, shown, (2, 2))
    assert resized[0, 0].tolist() == [[2, 2], [0, 0]] and is_reached[0, 0].tolist() == [[True] * 2, [False] * 2]


def test_thin_content_keeps_the_cells_that_have_most_of_it():
    content = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    content[0, :, 9:11] = True  # two rows of a cell of eight
    content[1, :, 8:21] = True
    found = content_at(content, torch.zeros(2, 6, 4, 4))[:, 0, :, 0]
    assert found.tolist() == [[False, True, False, False], [False, True, True, False]]
