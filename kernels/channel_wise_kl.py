"""Fused KL divergence between the spatial distributions of the channels of two maps: the core of CWD.

    L    = T^2 / (B C) * sum_bc KL(q^t_bc || q^s_bc)
    q_bc = softmax over the H*W pixels of channel c of image b, of map / T

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", arXiv:2011.13256, sec. 3.2. This is the KL of
kernels.temperature_kl on rows of H*W columns, and it runs the kernel of that file. On a contiguous map a row of up to
8,192 pixels stays in registers: three passes over a map. A longer row, and a channels_last map, whose pixels are C
apart, need an online softmax: up to five passes. The gradient has the memory layout of the student's map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import at_temperature, not_floating, require_shape, use_triton
from kernels.temperature_kl import temperature_kl_triton
from layers.precision import compute_dtype


def channel_kl_eager(s_map: Tensor, t_map: Tensor, temperature: float) -> Tensor:
    """Specification: (B, C, H, W), (B, C, H, W) -> the scalar L."""
    dtype = compute_dtype(s_map, t_map)
    s_map, t_map = s_map.to(dtype), t_map.detach().to(dtype)
    if s_map.numel() == 0:
        return s_map.sum()
    log_q_s, log_q_t = (log_softmax_over_pixels(at_temperature(z, temperature)) for z in (s_map, t_map))  # (B, C, H*W)
    kl = (log_q_t.exp() * (log_q_t - log_q_s)).sum(-1)  # (B, C)
    return temperature**2 * kl.mean()


def log_softmax_over_pixels(logits: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H*W), in the layout of the map: copying channels_last costs more than the softmax."""
    if logits.is_contiguous(memory_format=torch.channels_last):
        return F.log_softmax(logits.permute(0, 2, 3, 1).flatten(1, 2), dim=1).transpose(1, 2)
    return F.log_softmax(logits.flatten(2), dim=-1)


def channel_kl_triton(s_map: Tensor, t_map: Tensor, temperature: float) -> Tensor:
    """The kernel, with its gradient: the contract of channel_kl_eager, for at least one element."""
    rows = s_map.shape[0] * s_map.shape[1]
    return temperature_kl_triton(s_map.flatten(2), t_map.flatten(2), temperature, None, rows)


def channel_kl(s_map: Tensor, t_map: Tensor, *, temperature: float = 1.0) -> Tensor:
    """L (), the equation above, by the kernel or its specification (kernels.backend).

    Args:
        s_map, t_map: (B, C, H, W), of equal shape and any strides. Gradient flows to the student.
        temperature: T > 0. The kernel is compiled once per T.
    Returns:
        float64 if an input is float64, else float32; 0 for empty inputs. ValueError for other shapes.
    """
    require_shape("t_map", t_map, s_map.shape)
    implementation = channel_kl_eager
    unsupported = not_floating(s_map=s_map, t_map=t_map)
    if use_triton("channel_kl", s_map, t_map, unsupported=unsupported) and s_map.numel():
        implementation = channel_kl_triton
    return implementation(s_map, t_map, temperature)
