"""Logit distillation: the student's class beliefs imitate the teacher's.

Pure functions of logits. Computed in float32 for half-precision inputs, in float64 for float64. Student gradients
only: the teacher's logits are detached. No rows give 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_class_targets(*, s_logits: Tensor, t_logits: Tensor, temperature: float = 1.0, power: float = 1.0) -> Tensor:
    """Soft class targets for sigmoid heads: per location, K independent Bernoulli KL terms.

        L    = T^2 / max(sum_n w_n, 1) * sum_n w_n * sum_k KL(Bern(p^t_nk) || Bern(p^s_nk))
        p_nk = sigmoid(logit_nk / T),    w_n = (max_k sigmoid(t_nk))^power

    The KL is the binary cross-entropy with the teacher's probability as its target, less the teacher's entropy: the
    same gradient, and 0 where the student equals the teacher. T^2 undoes the 1/T^2 shrinkage of the gradient
    (Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, sec. 2). The weight w_n lets the
    few locations where the teacher sees something speak louder than the thousands of background, after the
    objectness-scaled distillation of Mehta and Ozturk, arXiv:1805.06361, with the best class score as objectness.

    Args:
        s_logits, t_logits: (..., K), before the sigmoid; every leading index is one location n.
        temperature: T > 0.
        power: exponent of the teacher's confidence; 0 weighs all locations alike.
    Returns:
        scalar ().
    """
    if s_logits.shape != t_logits.shape:
        raise ValueError(f"student logits {tuple(s_logits.shape)} and teacher logits {tuple(t_logits.shape)} differ")
    dtype = s_logits.dtype if s_logits.dtype.itemsize >= 4 else torch.float32
    s_logits, t_logits = s_logits.to(dtype), t_logits.detach().to(dtype)
    if s_logits.numel() == 0:
        return s_logits.sum()
    weight = t_logits.amax(-1).sigmoid() ** power  # (...,)
    kl = bernoulli_kl(s_logits / temperature, t_logits / temperature).sum(-1)  # (...,)
    return temperature**2 * (weight * kl).sum() / weight.sum().clamp(min=1)


def bernoulli_kl(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """KL(Bern(sigmoid(t)) || Bern(sigmoid(s))) element by element, from logits, stable when saturated.

    KL = p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q)),    p = sigmoid(t), q = sigmoid(s)
    """
    p = t_logits.sigmoid()
    positive = F.logsigmoid(t_logits) - F.logsigmoid(s_logits)  # log p - log q
    negative = F.logsigmoid(-t_logits) - F.logsigmoid(-s_logits)  # log(1 - p) - log(1 - q)
    return p * positive + (1 - p) * negative
