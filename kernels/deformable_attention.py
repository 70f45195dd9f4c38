"""Multi-scale deformable attention: each query reads a few points of a pyramid of maps instead of every cell.

Zhu et al., "Deformable DETR", arXiv:2010.04159, section 4.1. `deformable_attention` is the specification, in plain
PyTorch; the projections around it belong to the model that uses it.

Differs from the paper's formula in one respect: the points come in already added up (reference point plus offset), so
that each model is free in how it scales its offsets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_attention(
    value: Tensor, level_sizes: list[tuple[int, int]], points: Tensor, attention_prob: Tensor
) -> Tensor:
    """Weighted means of bilinear reads, head by head.

        out[b, q, m] = sum_{l, p} attention_prob[b, q, m, l, p] * x_l[b, m](points[b, q, m, l, p])

    x_l[b, m](u, v) is the bilinear interpolation of level l's map (H_l, W_l, D) at the fractions u of its width and v
    of its height: the center of cell (row i, column j) is at u = (j + 1/2) / W_l, v = (i + 1/2) / H_l, and around the
    map there are zeros.

    Args:
        value: (B, S, M, D) for M heads, S = sum_l H_l W_l cells: level by level, row by row.
        level_sizes: (H_l, W_l) of the L levels.
        points: (B, Q, M, L, P, 2), x then y, as fractions of the map; any real number.
        attention_prob: (B, Q, M, L, P); usually sums to 1 over the L * P points, which nothing here needs.
    Returns:
        (B, Q, M, D) in the dtype of `value`, computed in the wider of the dtypes given. Differentiable in value, points
        and attention_prob; B and Q may be 0. ValueError where S does not fit level_sizes.
    """
    B, S, M, D = value.shape
    Q, L = points.shape[1], points.shape[3]
    cells = [height * width for height, width in level_sizes]
    if sum(cells) != S or len(level_sizes) != L:
        raise ValueError(f"{S} cells and points on {L} levels, expected levels of {level_sizes} (height, width)")
    dtype = torch.promote_types(value.dtype, torch.promote_types(points.dtype, attention_prob.dtype))
    out = torch.zeros(B * M, D, Q, dtype=dtype, device=value.device)
    if out.numel():
        grid = 2 * points.to(dtype) - 1  # grid_sample counts from -1 to 1
        for level, (x, (height, width)) in enumerate(zip(value.to(dtype).split(cells, dim=1), level_sizes)):
            maps = x.permute(0, 2, 3, 1).reshape(B * M, D, height, width)
            at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B M, Q, P, 2)
            read = F.grid_sample(maps, at, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B M, D, Q, P)
            prob = attention_prob[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B M, Q, P)
            out = out + torch.einsum("ndqp,nqp->ndq", read, prob.to(dtype))
    return out.unflatten(0, (B, M)).permute(0, 3, 1, 2).to(value.dtype)  # (B, Q, M, D)
