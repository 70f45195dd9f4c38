"""CrossKD with real heads and stand-ins; the checks of its logits, and the mutants, are in test_mutants."""

import copy

import pytest
import torch
from torch import nn

from distill.crosskd import CrossHead, cross_logits
from distill.localization import localization_kl
from distill.logits import quality_focal
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
    box_logits, class_logits = head(maps)
    for branches, expected in ((head.cls, class_logits), (head.box, box_logits.flatten(2))):
        t_maps, t_tails = halves(branches, maps, split)
        widths = tuple(m.shape[1] for m in t_maps)
        for rescale in (True, False):
            cross_head = CrossHead(student_channels=widths, teacher_channels=widths, rescale=rescale)
            cross = cross_head(s_maps=t_maps, t_maps=t_maps, t_tails=t_tails)
            torch.testing.assert_close(cross, expected, rtol=1e-4, atol=1e-4)


def test_a_narrow_student_learns_from_a_wide_teacher():
    """Gradient reaches the student up to the split, and the alignment; not its own last layers, nor the teacher."""
    student, s_in = head_and_maps((16, 24, 32), 1)
    teacher, t_in = head_and_maps((96, 120, 144), 2)
    teacher.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    t_box, t_class = teacher(t_in)
    total = 0
    for branches, t_branches, kind in ((student.cls, teacher.cls, "class"), (student.box, teacher.box, "box")):
        s_maps, _ = halves(branches, s_in, 2)
        t_maps, t_tails = halves(t_branches, t_in, 2)
        cross_head = CrossHead(
            student_channels=tuple(m.shape[1] for m in s_maps), teacher_channels=tuple(m.shape[1] for m in t_maps)
        )
        cross = cross_head(s_maps=s_maps, t_maps=t_maps, t_tails=t_tails)
        if kind == "class":
            assert [type(a) for a in cross_head.align] == [nn.Conv2d] * 3
            loss = quality_focal(s_logits=cross, t_logits=t_class)
        else:
            weight = t_class.amax(-1).sigmoid()
            loss = localization_kl(s_logits=cross.unflatten(2, (4, 16)), t_logits=t_box, weight=weight, temperature=1.0)
        assert loss > 0
        loss.backward()
        total += sum(p.numel() for p in cross_head.parameters())
        assert all(p.grad is not None for p in cross_head.parameters())
        assert all(p.grad is not None for b in branches for layer in b[:2] for p in layer.parameters())
        assert all(p.grad is None for b in branches for p in b[2].parameters())
    assert total > 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_the_alignment_recovers_a_student_that_only_mixed_the_channels():
    """The student has the teacher's map in another basis: the 1x1 convolution alone can bring the loss down to 0."""
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 2, 1)).eval().requires_grad_(False)
    t_map = torch.randn(2, 3, 6, 6)
    s_map = torch.cat((t_map.flip(1) * 2 + 1, t_map[:, :1] - t_map[:, 1:2]), dim=1)  # 4 channels
    cross_head = CrossHead(student_channels=(4,), teacher_channels=(3,))
    t_logits = tail(t_map).flatten(2).transpose(1, 2)
    optimizer = torch.optim.Adam(cross_head.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        cross = cross_head(s_maps=[s_map], t_maps=[t_map], t_tails=[tail])
        losses.append(quality_focal(s_logits=cross, t_logits=t_logits, beta=2.0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.01 * losses[0]


def test_a_teacher_from_inference_mode_can_teach():
    teacher, maps = head_and_maps((16, 24, 32), 3)
    teacher.requires_grad_(False)
    with torch.inference_mode():
        t_maps, t_tails = halves(teacher.cls, maps, 1)
        t_class = teacher(maps)[1]
    s_maps = [torch.randn_like(m).requires_grad_() for m in maps]
    widths = tuple(m.shape[1] for m in t_maps)
    cross_head = CrossHead(student_channels=(16, 24, 32), teacher_channels=widths)
    quality_focal(s_logits=cross_head(s_maps=s_maps, t_maps=t_maps, t_tails=t_tails), t_logits=t_class).backward()
    assert all(m.grad.abs().sum() > 0 for m in s_maps)


def test_maps_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="equal"):
        cross_logits(s_map=torch.zeros(1, 2, 3, 3), t_map=torch.zeros(1, 4, 3, 3), t_tail=nn.Identity().eval())
