"""Masked imitation: the student's map imitates the teacher's near objects, or near and far with separate weights.

The masks come from distill.losses.masks. Computed in float32 for half-precision inputs, in float64 for float64; teacher
and mask are detached; an empty map or mask gives 0.

The combination that YOLOv5 projects call "masked imitation with KL" is two terms of a config, each with its weight:
masked_mse on the neck, and soft class targets on the outputs (distill.losses.logits).
"""

from torch import Tensor

from distill.losses.features import as_map_pair, require_map_pair
from distill.losses.keywords import by_keyword
from kernels.masked_mse import masked_squares
from layers.over_processes import joint_normaliser
from layers.precision import compute_dtype


@by_keyword
def masked_mse(*, s_map: Tensor, t_map: Tensor, mask: Tensor) -> Tensor:
    """Fine-grained feature imitation (FGFI): half the squared difference per marked pixel.

    Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", arXiv:1906.03609, sec. 3.2.

        L = 1 / (2 N) * sum_bp I_bp sum_c (s_bcp - t_bcp)^2,    N = max(sum_bp I_bp, 1)

    Summed over channels, so a weight tuned for C = 512 (the paper: 0.01) does not fit C = 64.

    Args:
        s_map, t_map: (B, C, H, W).
        mask: I, (B, 1, H, W), bool or in [0, 1]. The published one is masks.anchor_mask.
    Returns:
        scalar (); 0 where nothing is marked.
    """
    require_map_pair(s_map, t_map)
    mask = mask.to(compute_dtype(s_map, t_map))
    return masked_squares(s_map, t_map, mask, normaliser=joint_normaliser(mask.sum(), mask))


@by_keyword
def decoupled_mse(
    *,
    s_map: Tensor,
    t_map: Tensor,
    foreground: Tensor,
    foreground_weight: float = 1.0,
    background_weight: float = 4.0,
) -> Tensor:
    """Decoupled features (DeFeat): imitate foreground and background, each with a mean and a weight of its own.

    Guo et al., "Distilling Object Detectors via Decoupled Features", arXiv:2103.14475.

        L = a_f / (2 N_f) * sum_bcp M_bp (s_bcp - t_bcp)^2 + a_b / (2 N_b) * sum_bcp (1 - M_bp) (s_bcp - t_bcp)^2
        N_f = max(C sum_bp M_bp, 1),    N_b = max(C sum_bp (1 - M_bp), 1)

    Both are means over the elements of a region, so that the wide background does not outweigh small objects.

    Args:
        s_map, t_map: (B, C, H, W).
        foreground: M, (B, 1, H, W), bool or in [0, 1]; masks.box_mask.
        foreground_weight, background_weight: a_f, a_b. The released configuration of Faster R-CNN on VOC has the
            ratio 1 to 4 (3 and 12).
    Returns:
        scalar ().
    Differs from the paper: the mask of every map holds all boxes; the paper gives each level the boxes of its size.
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    mask = as_mask(foreground, s_map)
    difference = (s_map - t_map).square().sum(1, keepdim=True)  # (B, 1, H, W)
    channels = s_map.shape[1]
    near = (mask * difference).sum() / (2 * joint_normaliser(channels * mask.sum(), mask))
    far = ((1 - mask) * difference).sum() / (2 * joint_normaliser(channels * (1 - mask).sum(), mask))
    return foreground_weight * near + background_weight * far


def as_mask(mask: Tensor, feature_map: Tensor) -> Tensor:
    """The mask in the map's dtype, detached. Raises ValueError unless it is (B, 1, H, W) of the map."""
    b, _, h, w = feature_map.shape
    if mask.shape != (b, 1, h, w):
        raise ValueError(f"mask {tuple(mask.shape)} must be (B, 1, H, W) of the map {tuple(feature_map.shape)}")
    return mask.detach().to(feature_map.dtype)
