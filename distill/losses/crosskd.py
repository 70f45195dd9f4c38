"""CrossKD: the teacher's head completes the student's prediction, which is then compared with the teacher's own.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", arXiv:2306.11369.

A branch of a dense head is a row of convolutions. The student's map after its i-th convolution goes through the layers
that follow the i-th convolution of the teacher's branch, which are frozen. The gradient reaches the student through the
teacher's layers. It skips the end of the student's own branch: only the annotations train that, with which the teacher
may disagree.

Each function handles one level of one branch; with the `normaliser` of the whole head, the sum over the levels is the
published loss. Differs from the paper:

- Where the widths differ, an adapter comes first and is trained with the student. The paper's heads are equally wide.
- Maps are taken after the activation. The paper takes them before it, and activates them once more.
- For detectors with edge distributions the paper weighs classes 1 and edges 4, and adds a GIoU term, which is not here.
"""

import torch
from torch import Tensor, nn

from distill.losses.features import as_map_pair, row_moments, unit_deviations
from distill.losses.keywords import by_keyword
from distill.losses.localization import localization_kl
from distill.losses.logits import quality_focal

TRAINS_OTHERWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


@by_keyword
def crosskd_classes(
    *,
    s_map: Tensor,
    t_map: Tensor,
    t_tail: nn.Module,
    normaliser: Tensor | float | None = None,
    columns: Tensor | None = None,
    beta: float = 1.0,
    rescale: bool = True,
) -> Tensor:
    """CrossKD of classes: the teacher's head predicts from the student's class map what it predicts from its own.

        L = logits.quality_focal(s = tail(r(s_map)), t = tail(t_map)),    r as in cross_logits

    Args:
        s_map, t_map: (B, C, H, W), after the same convolution of the class branch of one level.
        t_tail: the rest of the teacher's branch, (B, C, H, W) -> (B, K, H, W), see cross_logits.
        normaliser: the number of positives of the batch. None: the number that the teacher expects on this level.
        columns: (J,) int64, the columns of the K classes that are compared: those that the student has. None: all.
        beta: see quality_focal.
        rescale: see cross_logits.
    Returns:
        scalar ().
    """
    t_logits = teacher_logits(t_map, t_tail)  # (B, K, H, W)
    cross = cross_logits(s_map=s_map, t_map=t_map, t_tail=t_tail, rescale=rescale)
    if columns is not None:
        cross, t_logits = (z[:, columns.to(z.device)] for z in (cross, t_logits))
    s_logits, t_logits = cross.permute(0, 2, 3, 1), t_logits.permute(0, 2, 3, 1)  # (B, H, W, K)
    return quality_focal(s_logits=s_logits, t_logits=t_logits, beta=beta, normaliser=normaliser)


@by_keyword
def crosskd_edges(
    *,
    s_map: Tensor,
    t_map: Tensor,
    t_tail: nn.Module,
    weight: Tensor,
    normaliser: Tensor | float | None = None,
    temperature: float = 1.0,
    rescale: bool = True,
) -> Tensor:
    """CrossKD of box edges: the same for the box branch of a head that predicts distributions over R bins.

        L = localization.localization_kl(s = tail(r(s_map)), t = tail(t_map)),    r as in cross_logits

    Args:
        s_map, t_map: (B, C, H, W), after the same convolution of the box branch of one level.
        t_tail: the rest of the teacher's branch, (B, C, H, W) -> (B, 4 R, H, W), edge by edge; see cross_logits.
        weight: (B, H, W), w >= 0; published: the teacher's best class score, masks.score_maps.
        normaliser: the sum of all weights, of every level. None: the sum of these.
        temperature: T > 0.
        rescale: see cross_logits.
    Returns:
        scalar ().
    """
    t_logits = teacher_logits(t_map, t_tail)  # (B, 4 R, H, W)
    if t_logits.shape[1] % 4:
        raise ValueError(f"the rest of the branch makes {t_logits.shape[1]} channels, expected four edges of R bins")
    cross = cross_logits(s_map=s_map, t_map=t_map, t_tail=t_tail, rescale=rescale)
    s_edges, t_edges = (z.permute(0, 2, 3, 1).unflatten(3, (4, -1)) for z in (cross, t_logits))  # (B, H, W, 4, R)
    return localization_kl(
        s_logits=s_edges, t_logits=t_edges, weight=weight, normaliser=normaliser, temperature=temperature
    )


@by_keyword
def cross_logits(*, s_map: Tensor, t_map: Tensor, t_tail: nn.Module, rescale: bool = True) -> Tensor:
    """The teacher's remaining layers, applied to the student's map.

        out = tail(r(s)),    r(s)_c = (s_c - mean(s_c)) / std(s_c) * std(t_c) + mean(t_c)

    Mean and standard deviation are those of channel c over the batch and the pixels together, so that the tail gets
    values in the range it was trained on. The result is then invariant to any scale above 0 and any shift of each
    channel of the student's map. For s = t it is the teacher's own prediction.

    Args:
        s_map, t_map: (B, C, H, W), after the same convolution of the same branch, the student's at the teacher's width.
        t_tail: (B, C, H, W) -> (B, C_out, H, W), the rest of the teacher's branch, in eval mode and without
            parameters that learn, else ValueError. It runs in the precision of its weights, autocast or not.
        rescale: False leaves the student's map as it is: r(s) = s.
    Returns:
        (B, C_out, H, W). A channel that is constant in the student enters the tail as mean(t_c), without gradient.
    """
    for name, parameter in t_tail.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"the teacher's layers must be frozen, {name} is not")
    # Only layers that training changes: a slice of a Sequential in eval mode and a folded BatchNorm have training=True.
    if any(module.training for module in t_tail.modules() if isinstance(module, TRAINS_OTHERWISE)):
        raise ValueError("the teacher's layers must be in eval mode, or its statistics would follow the student")
    s_map, t_map = as_map_pair(s_map, t_map)
    return run_tail(t_tail, like_teacher(s_map, t_map) if rescale else s_map)


def like_teacher(s_map: Tensor, t_map: Tensor) -> Tensor:
    """(B, C, H, W): each channel of the student's map, at the mean and the standard deviation of the teacher's."""
    b, _, h, w = s_map.shape
    s_unit = unit_deviations(s_map.transpose(0, 1).flatten(1), joint=True)  # (C, B*H*W), length 1
    t_mean, _, t_square = row_moments(t_map.transpose(0, 1).flatten(1), joint=True)  # (C, 1) each
    return (s_unit * t_square.sqrt() + t_mean).unflatten(1, (b, h, w)).transpose(0, 1)


@torch.no_grad()
def teacher_logits(t_map: Tensor, t_tail: nn.Module) -> Tensor:
    """The teacher's prediction from its own map."""
    return run_tail(t_tail, t_map)


def run_tail(t_tail: nn.Module, feature_map: Tensor) -> Tensor:
    dtype = next((p.dtype for p in t_tail.parameters()), feature_map.dtype)
    with torch.autocast(feature_map.device.type, enabled=False):
        return t_tail(feature_map.to(dtype))
