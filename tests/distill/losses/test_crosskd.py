"""CrossKD with real heads and stand-ins; the checks of its logits, and the mutants, are in test_mutants."""

import copy

import pytest
import torch
from torch import nn

from distill.adapters import build_adapter
from distill.losses.crosskd import cross_logits, crosskd_classes, crosskd_edges
from distill.losses.localization import localization_kl
from distill.losses.logits import quality_focal
from layers.fusion import fuse
from yolo.yolov8 import AnchorFreeHead

GRIDS = [(8, 8), (4, 4), (2, 2)]


def head_and_maps(channels: tuple[int, ...], seed: int) -> tuple[AnchorFreeHead, list[torch.Tensor]]:
    torch.manual_seed(seed)
    head = AnchorFreeHead(channels, 3).eval()
    return head, [torch.randn(2, c, h, w) for c, (h, w) in zip(channels, GRIDS)]


def halves(branches: nn.ModuleList, maps: list[torch.Tensor], split: int) -> tuple[list[torch.Tensor], list[nn.Module]]:
    """The maps after `split` layers of each branch, and the rest of the layers."""
    return [b[:split](x) for b, x in zip(branches, maps)], [b[split:] for b in branches]


@pytest.mark.parametrize("split", [1, 2])
def test_the_teacher_through_its_own_head_predicts_what_it_predicts(split):
    head, maps = head_and_maps((16, 24, 32), 0)
    head.requires_grad_(False)
    box_logits, class_logits, _ = head(maps)
    for branches, expected in ((head.cls, class_logits), (head.box, box_logits.flatten(2))):
        t_maps, t_tails = halves(branches, maps, split)
        for rescale in (True, False):
            cross = [
                cross_logits(s_map=m, t_map=m, t_tail=tail, rescale=rescale).flatten(2).transpose(1, 2)
                for m, tail in zip(t_maps, t_tails)
            ]
            torch.testing.assert_close(torch.cat(cross, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_levels_add_up_to_the_loss_of_the_whole_head():
    """With the normaliser of the whole head, the sum over levels is the loss of the cross-head logits (B, A, ...)."""
    student, s_in = head_and_maps((16, 24, 32), 1)
    teacher, t_in = head_and_maps((16, 24, 32), 2)
    teacher.requires_grad_(False)
    t_box, t_class, _ = teacher(t_in)
    scores = t_class.amax(-1).sigmoid()  # (B, A)
    s_maps, _ = halves(student.cls, s_in, 1)
    t_maps, t_tails = halves(teacher.cls, t_in, 1)
    cross = [
        cross_logits(s_map=s, t_map=t, t_tail=tail).flatten(2).transpose(1, 2)
        for s, t, tail in zip(s_maps, t_maps, t_tails)
    ]
    whole = quality_focal(s_logits=torch.cat(cross, 1), t_logits=t_class, normaliser=5)
    levels = [
        crosskd_classes(s_map=s, t_map=t, t_tail=tail, normaliser=5) for s, t, tail in zip(s_maps, t_maps, t_tails)
    ]
    torch.testing.assert_close(sum(levels), whole)

    s_maps, _ = halves(student.box, s_in, 2)
    t_maps, t_tails = halves(teacher.box, t_in, 2)
    weights = [w.view(2, *grid) for w, grid in zip(scores.split([h * w for h, w in GRIDS], dim=1), GRIDS)]
    cross = [
        cross_logits(s_map=s, t_map=t, t_tail=tail).flatten(2).transpose(1, 2)
        for s, t, tail in zip(s_maps, t_maps, t_tails)
    ]
    cross = torch.cat(cross, 1).unflatten(2, (4, 16))
    whole = localization_kl(s_logits=cross, t_logits=t_box, weight=scores, temperature=1.0)
    levels = [
        crosskd_edges(s_map=s, t_map=t, t_tail=tail, weight=w, normaliser=scores.sum())
        for s, t, tail, w in zip(s_maps, t_maps, t_tails, weights)
    ]
    torch.testing.assert_close(sum(levels), whole)


def test_a_narrow_student_learns_from_a_wide_teacher():
    """Gradient reaches the student up to the split, and the adapter; not its own last layers, nor the teacher."""
    student, s_in = head_and_maps((16, 24, 32), 1)
    teacher, t_in = head_and_maps((96, 120, 144), 2)
    teacher.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    s_maps, _ = halves(student.cls, s_in, 2)
    t_maps, t_tails = halves(teacher.cls, t_in, 2)
    for s_map, t_map, tail in zip(s_maps, t_maps, t_tails):
        adapter = build_adapter("conv1x1", s_map.shape[1], t_map.shape[1])
        crosskd_classes(s_map=adapter(s_map), t_map=t_map, t_tail=tail).backward()
        assert adapter.weight.grad.abs().sum() > 0
    for branch in student.cls:
        assert all(p.grad is not None for layer in branch[:2] for p in layer.parameters())
        assert all(p.grad is None for p in branch[2].parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_an_adapter_recovers_a_student_that_only_mixed_the_channels():
    """The student has the teacher's map in another basis: the 1x1 convolution alone can bring the loss down to 0."""
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 2, 1)).eval().requires_grad_(False)
    t_map = torch.randn(2, 3, 6, 6)
    s_map = torch.cat((t_map.flip(1) * 2 + 1, t_map[:, :1] - t_map[:, 1:2]), dim=1)  # 4 channels
    adapter = build_adapter("conv1x1", 4, 3)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        losses.append(crosskd_classes(s_map=adapter(s_map), t_map=t_map, t_tail=tail, beta=2.0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.01 * losses[0]


def test_a_folded_teacher_from_inference_mode_can_teach():
    """As teachers run: conv-bn folded, in bfloat16, under inference mode."""
    teacher, maps = head_and_maps((16, 24, 32), 3)
    teacher = fuse(teacher).requires_grad_(False).bfloat16()
    with torch.inference_mode():
        t_maps, t_tails = halves(teacher.cls, [m.bfloat16() for m in maps], 1)
    s_maps = [torch.randn_like(m).bfloat16().requires_grad_() for m in t_maps]
    for s_map, t_map, tail in zip(s_maps, t_maps, t_tails):
        loss = crosskd_classes(s_map=s_map, t_map=t_map, t_tail=tail)
        assert loss.dtype == torch.float32
        loss.backward()
        assert s_map.grad.abs().sum() > 0


def test_maps_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="equal"):
        cross_logits(s_map=torch.zeros(1, 2, 3, 3), t_map=torch.zeros(1, 4, 3, 3), t_tail=nn.Identity().eval())
