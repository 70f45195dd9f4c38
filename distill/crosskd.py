"""CrossKD: the student's half-made prediction is finished by the teacher's head, and shall come out as the teacher's.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", arXiv:2306.11369.

A branch of a dense head is a row of convolutions. The student's map after its i-th convolution goes through what
follows the i-th convolution of the teacher's branch, frozen. The gradient reaches the student through the teacher's
layers, and leaves the end of the student's own branch to the annotations, with which the teacher may disagree.

CrossKD is a way to make logits, not a loss of its own: `CrossHead` gives cross-head logits (B, A, C), and they take the
student's place in a loss against what the teacher predicted:

    classes   logits.quality_focal(s_logits=cross, t_logits=the teacher's class logits, normaliser=positives)
    edges     localization.localization_kl(s_logits=cross.unflatten(2, (4, R)), t_logits=the teacher's edge logits,
              weight=the teacher's best class score at each location, temperature=1)

Differs from the paper: where the widths differ, a 1x1 convolution, trained with the student, comes first (there, heads
are equally wide). Maps are taken after the activation (there, before it, and activated once more). The released
weights are 1 for the classes and 4 for the edges.
"""

import torch
from torch import Tensor, nn

from distill.adapters import build_adapter
from distill.features import as_map_pair, unit_deviations


def cross_logits(*, s_map: Tensor, t_map: Tensor, t_tail: nn.Module, rescale: bool = True) -> Tensor:
    """The teacher's remaining layers, applied to the student's map.

        out = tail(r(s)),    r(s)_c = (s_c - mean(s_c)) / std(s_c) * std(t_c) + mean(t_c)

    with mean and standard deviation per channel c over the batch and the pixels together, so that the tail meets
    values as large as those it was trained on. Invariant then to any scale above 0 and any shift of each channel of
    the student's map. At the teacher's own map: what the teacher predicts.

    Args:
        s_map, t_map: (B, C, H, W), after the same convolution of the same branch, the student's at the teacher's width.
        t_tail: (B, C, H, W) -> (B, C_out, H, W), the rest of the teacher's branch, in eval mode and without
            parameters that learn, else ValueError. It runs in the precision of its weights, autocast or not.
        rescale: False gives it the student's map as it is: r(s) = s.
    Returns:
        (B, C_out, H, W). A channel that is constant in the student arrives as mean(t_c), without gradient.
    """
    for name, parameter in t_tail.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"the teacher's layers must be frozen, {name} is not")
    # Of layers, not of containers: a slice of a Sequential in eval mode says that it trains.
    if any(module.training for module in t_tail.modules() if not list(module.children())):
        raise ValueError("the teacher's layers must be in eval mode, or its statistics would follow the student")
    dtype = next((p.dtype for p in t_tail.parameters()), s_map.dtype)
    s_map, t_map = as_map_pair(s_map, t_map)
    if rescale:
        s_map = like_teacher(s_map, t_map)
    with torch.autocast(s_map.device.type, enabled=False):
        return t_tail(s_map.to(dtype))


def like_teacher(s_map: Tensor, t_map: Tensor) -> Tensor:
    """(B, C, H, W): each channel of the student at the mean and the standard deviation of the teacher's."""
    b, _, h, w = s_map.shape
    s_unit = unit_deviations(s_map.transpose(0, 1).flatten(1))  # (C, B*H*W), length 1
    t_rows = t_map.transpose(0, 1).flatten(1)
    count = max(b * h * w, 1)
    t_mean = t_rows.sum(1, keepdim=True) / count  # (C, 1)
    t_length = (t_rows - t_mean).square().sum(1, keepdim=True).sqrt()  # std * sqrt(count)
    return (s_unit * t_length + t_mean).unflatten(1, (b, h, w)).transpose(0, 1)


class CrossHead(nn.Module):
    """Cross-head logits of one branch, all levels, in the order of a dense head. Its convolutions join the optimizer.

    Args:
        student_channels, teacher_channels: per level, of the maps after the chosen convolution. Where the two are
            equal the map goes on as it is.
        rescale: see cross_logits.
    """

    def __init__(
        self, *, student_channels: tuple[int, ...], teacher_channels: tuple[int, ...], rescale: bool = True
    ) -> None:
        super().__init__()
        if len(student_channels) != len(teacher_channels):
            raise ValueError(f"{len(student_channels)} levels of the student, {len(teacher_channels)} of the teacher")
        self.rescale = rescale
        self.align = nn.ModuleList(
            build_adapter("none" if s == t else "conv1x1", s, t) for s, t in zip(student_channels, teacher_channels)
        )

    def forward(self, *, s_maps: list[Tensor], t_maps: list[Tensor], t_tails: list[nn.Module]) -> Tensor:
        """One map and one tail per level, see cross_logits -> (B, A, C_out), A = sum_l H_l W_l.

        Locations run level by level, row by row, as in the class and edge logits of the anchor-free heads.
        """
        rows = []
        for align, s_map, t_map, t_tail in zip(self.align, s_maps, t_maps, t_tails, strict=True):
            out = cross_logits(s_map=align(s_map), t_map=t_map, t_tail=t_tail, rescale=self.rescale)
            rows.append(out.flatten(2).transpose(1, 2))  # (B, H*W, C_out)
        return torch.cat(rows, dim=1)
