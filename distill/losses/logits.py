"""Logit distillation: the student's class predictions imitate the teacher's.

Softmax heads (Faster R-CNN's boxes, with their background column; a classifier of whole images): softmax_kl,
decoupled_kl, prediction_correlation, image_kl. Sigmoid heads (YOLO, RT-DETR): soft_class_targets, quality_focal, and
objectness_scaled for YOLOv5. Between a softmax and a sigmoid head, or between class lists that differ:
distill.losses.box_classes.

Pure functions of logits. Computed in float32 for half-precision inputs, in float64 for float64. Student gradients
only: the teacher's logits and every weight are detached. No rows give 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.features import unit_deviations
from distill.losses.keywords import by_keyword
from kernels.sigmoid_kl import bernoulli_kl, sigmoid_kl
from kernels.temperature_kl import temperature_kl
from layers.over_processes import joint_normaliser, sum_over_processes
from layers.precision import at_least_float32, compute_dtype


@by_keyword
def soft_class_targets(
    *,
    s_logits: Tensor,
    t_logits: Tensor,
    score: Tensor | None = None,
    temperature: float = 1.0,
    power: float = 1.0,
) -> Tensor:
    """Soft class targets for sigmoid heads: per location, K independent Bernoulli KL terms.

        L    = T^2 / max(sum_n w_n, 1) * sum_n w_n * sum_k KL(Bern(p^t_nk) || Bern(p^s_nk))
        p_nk = sigmoid(logit_nk / T),    w_n = c_n^power,    c_n = o_n max_k sigmoid(t_nk)

    with o_n = sigmoid(objectness logit) for a teacher with objectness (YOLOv5, YOLOv7), and 1 for all others.

    The KL is the binary cross-entropy with the teacher's probability as its target, minus the teacher's entropy: the
    gradient is the same, and the loss is 0 where the student equals the teacher. T^2 undoes the 1/T^2 shrinkage of the
    gradient (Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, sec. 2). The weight w_n
    lets the few locations where the teacher predicts an object count more than the thousands of background, after the
    objectness-scaled distillation of Mehta and Ozturk, arXiv:1805.06361.

    Args:
        s_logits, t_logits: (..., K), before the sigmoid; every leading index is one location n.
        score: c_n, (...,), masks.location_scores; detached. None: computed as for a teacher without objectness. Give it
            for a head with objectness, whose class logits mean nothing on the background.
        temperature: T > 0.
        power: exponent of the teacher's confidence c_n; 0 weighs all locations alike.
    Returns:
        scalar ().
    """
    require_equal_shapes(s_logits, t_logits)
    dtype = compute_dtype(s_logits, t_logits)
    if s_logits.shape[-1] == 0:
        return s_logits.sum(dtype=dtype)
    confidence = t_logits.amax(-1).to(dtype).sigmoid() if score is None else score.detach().to(dtype)
    if confidence.shape != s_logits.shape[:-1]:
        raise ValueError(f"score {tuple(confidence.shape)} must be {tuple(s_logits.shape[:-1])}, one per location")
    weight = confidence**power  # (...,)
    normaliser = joint_normaliser(weight.sum(), weight)
    return sigmoid_kl(s_logits, t_logits, temperature=temperature, weight=weight, normaliser=normaliser)


@by_keyword
def softmax_kl(*, s_logits: Tensor, t_logits: Tensor, weight: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Hinton's distillation for softmax heads: KL of the softened class distributions, with T^2.

    Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, sec. 2.

        L    = T^2 / max(sum_n w_n, 1) * sum_n w_n * KL(p^t_n || p^s_n)
        p_n  = softmax over the K columns of logit_n / T

    T^2 undoes the 1/T^2 shrinkage of the gradient. Invariant to a constant added to all logits of a row.

    Args:
        s_logits, t_logits: (..., K), before the softmax, background column included; every leading index is a row n.
        weight: w_n >= 0, (...,). None weighs all rows 1: the mean.
        temperature: T > 0.
    Returns:
        scalar ().
    Differs from the paper: the KL, not the cross-entropy, so the loss is 0 where the student equals the teacher.
    """
    require_equal_shapes(s_logits, t_logits)
    rows: Tensor | int = s_logits.shape[:-1].numel()
    if weight is not None:
        weight = weight.to(compute_dtype(s_logits, t_logits))
        rows = weight.sum()
    normaliser = joint_normaliser(rows, s_logits)
    return temperature_kl(s_logits, t_logits, temperature=temperature, weight=weight, normaliser=normaliser)


@by_keyword
def image_kl(*, s_logits: Tensor, t_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """A classifier of whole images, such as a zero-shot one, teaches a detector's auxiliary image logits.

        L   = T^2 / B * sum_b KL(p^t_b || p^s_b),    p_b = softmax over the K classes of logit_b / T

    The classifier gives one distribution per image and no boxes. If an image shows several classes, they share a
    probability of 1. The student's logits come from an ImageHead on its deepest map, which is trained with the student
    and discarded afterwards.

    Args:
        s_logits, t_logits: (B, K), columns of the same classes. The teacher's logits include its own scale: for an
            embedding model, they are K cosines between image and class prompts, times the scale it was trained with.
        temperature: T > 0.
    Returns:
        scalar ().
    """
    if s_logits.dim() != 2:
        raise ValueError(f"student logits {tuple(s_logits.shape)} must be (B, K), one row per image")
    return softmax_kl(s_logits=s_logits, t_logits=t_logits, temperature=temperature)


class ImageHead(nn.Module):
    """Image logits of a map: the mean over the pixels, then one linear layer. (B, C, H, W) -> (B, K)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(channels, num_classes)

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.classify(feature_map.mean((2, 3)))


class TaughtImageHead(nn.Module):
    """image_kl between the teacher and an ImageHead on the student's map. The head is trained with the student."""

    def __init__(self, channels: int, num_classes: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.head = ImageHead(channels, num_classes)
        self.temperature = temperature

    @by_keyword
    def forward(self, *, s_map: Tensor, t_logits: Tensor) -> Tensor:
        return image_kl(s_logits=self.head(at_least_float32(s_map)), t_logits=t_logits, temperature=self.temperature)


@by_keyword
def decoupled_kl(
    *,
    s_logits: Tensor,
    t_logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    target_weight: float = 1.0,
    other_weight: float = 0.25,
    temperature: float = 1.0,
) -> Tensor:
    """Decoupled distillation (DKD): the label against the rest, and the distribution over the rest, weighted apart.

    Zhao et al., "Decoupled Knowledge Distillation", arXiv:2203.08679.

        L   = T^2 / max(sum_n w_n, 1) * sum_n w_n * [ alpha KL(b^t_n || b^s_n) + beta KL(q^t_n || q^s_n) ]
        b_n = (p_ny, 1 - p_ny),    q_n = softmax over the K - 1 classes other than y of logit_n / T

    with p_n = softmax(logit_n / T) and y the label. Since KL(p^t || p^s) = KL(b^t || b^s) + (1 - p^t_y) KL(q^t || q^s),
    Hinton's loss gives the other classes hardly any weight where the teacher is sure of the label; here beta sets it.

    Args:
        s_logits, t_logits: (N, K), before the softmax, background column included.
        labels: (N,) int64, y: a column of the logits (0 for a background row of Faster R-CNN).
        weight: w_n >= 0, (N,). None weighs all rows 1: the mean.
        target_weight, other_weight: alpha, beta. The published detectors take 1 and 0.25 at T = 1.
        temperature: T > 0.
    Returns:
        scalar (); 0 for K = 1, which leaves nothing to distil.
    Differs from the released code: it takes the logarithm of a sum of probabilities, which is -inf for a saturated row.
    We take b = (sigmoid(m), sigmoid(-m)) from the log-odds m = z_y - log sum_{k != y} exp z_k.
    """
    s_logits, t_logits = as_logit_pair(s_logits, t_logits)
    if s_logits.dim() != 2 or labels.shape != (len(s_logits),):
        raise ValueError(f"logits {tuple(s_logits.shape)} must be (N, K), labels {tuple(labels.shape)} (N,)")
    k = s_logits.shape[1]
    if k < 2:
        return s_logits.sum() * 0
    others = torch.arange(k - 1, device=labels.device)
    others = others + (others >= labels[:, None])  # (N, K - 1), every column but the label's
    s_rest, t_rest = (z.gather(1, others) / temperature for z in (s_logits, t_logits))  # (N, K - 1)
    s_label, t_label = (z.gather(1, labels[:, None])[:, 0] / temperature for z in (s_logits, t_logits))  # (N,)
    target = bernoulli_kl(s_label - s_rest.logsumexp(1), t_label - t_rest.logsumexp(1))  # (N,)
    log_q_s, log_q_t = F.log_softmax(s_rest, dim=1), F.log_softmax(t_rest, dim=1)  # (N, K - 1)
    other = (log_q_t.exp() * (log_q_t - log_q_s)).sum(1)  # (N,)
    return temperature**2 * weighted_mean(target_weight * target + other_weight * other, weight)


@by_keyword
def prediction_correlation(
    *,
    s_logits: Tensor,
    t_logits: Tensor,
    class_weight: float = 1.0,
    sample_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST: correlate the probabilities with the teacher's, over the classes of a row and over the rows of a class.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536.

        L   = T^2 * [ beta / N * sum_n (1 - r(p^s_n:, p^t_n:)) + gamma / K * sum_k (1 - r(p^s_:k, p^t_:k)) ]
        p_n = softmax(logit_n / T),    r the Pearson correlation

    The first part compares how each sample ranks the classes, the second how each class ranks the samples. Each r is
    invariant to any scale above 0 and any shift of its probabilities, so a small student need not be as confident as
    its teacher. The loss is invariant to a constant added to all logits of a row.

    Args:
        s_logits, t_logits: (N, K), before the softmax, background column included.
        class_weight, sample_weight: beta, gamma.
        temperature: T > 0.
    Returns:
        scalar (), in [0, 2 T^2 (beta + gamma)].
    """
    s_logits, t_logits = as_logit_pair(s_logits, t_logits)
    if s_logits.dim() != 2:
        raise ValueError(f"student logits {tuple(s_logits.shape)} must be (N, K)")
    s_prob, t_prob = ((z / temperature).softmax(1) for z in (s_logits, t_logits))  # (N, K)
    over_classes = probability_correlation(s_prob=s_prob, t_prob=t_prob)
    over_samples = probability_correlation(s_prob=s_prob.T, t_prob=t_prob.T, is_split=True)
    return temperature**2 * (class_weight * over_classes + sample_weight * over_samples)


@by_keyword
def probability_correlation(*, s_prob: Tensor, t_prob: Tensor, is_split: bool = False) -> Tensor:
    """One minus the Pearson correlation of rows (N, K), on average: 1 / N * sum_n (1 - r(s_n, t_n)), a scalar ().

    Invariant to any scale above 0 and any shift of each row of either. Computed as half the squared distance of the
    rows at zero mean and unit length, whose gradient is exactly 0 at the teacher. A row that is constant up to rounding
    has no correlation: it gets no gradient, and costs 1/2 if the other row varies and 0 if not.

    is_split: each process holds some columns of every row; otherwise it holds rows of its own.
    """
    s_prob, t_prob = as_logit_pair(s_prob, t_prob)
    s_unit, t_unit = (unit_deviations(p, joint=is_split) for p in (s_prob, t_prob))  # (N, K)
    distance = (s_unit - t_unit).square().sum()
    if is_split:
        return sum_over_processes(distance) / max(2 * len(s_unit), 1)
    return distance / joint_normaliser(2 * len(s_unit), distance)


@by_keyword
def quality_focal(
    *,
    s_logits: Tensor,
    t_logits: Tensor,
    beta: float = 1.0,
    weight: Tensor | None = None,
    normaliser: Tensor | float | None = None,
) -> Tensor:
    """Quality-focal soft targets for sigmoid heads: cross-entropy, weighted by how far student and teacher differ.

        L    = 1 / max(M, 1) * sum_n w_n sum_k |p^s_nk - p^t_nk|^beta * BCE(s_nk, p^t_nk),    p = sigmoid(logit)

    The quality focal loss (Li et al., "Generalized Focal Loss", arXiv:2006.04388) with the teacher's probability as
    the quality, as in the class term of CrossKD (Wang et al., arXiv:2306.11369). The gradient flows through the factor,
    too. The loss is 0 at the teacher, where the cross-entropy alone is not; for beta = 1 it has a kink there.

    Args:
        s_logits, t_logits: (..., K), before the sigmoid; every leading index is one location n.
        beta: at least 1, or 0 for the plain cross-entropy (between 0 and 1 the gradient at the teacher is infinite).
        weight: w_n >= 0, (...,), 0 where a location is ignored. None weighs all 1.
        normaliser: M, in CrossKD the number of positives of the batch. None: M = sum_n max_k p^t_nk, the number that
            the teacher expects, which needs no assignment.
    Returns:
        scalar ().
    """
    if beta < 0 or 0 < beta < 1:
        raise ValueError(f"beta {beta} must be 0 or at least 1")
    s_logits, t_logits = as_logit_pair(s_logits, t_logits)
    if s_logits.shape[-1] == 0:
        return s_logits.sum()
    t_prob = t_logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(s_logits, t_prob, reduction="none")  # (..., K)
    if beta:
        cross_entropy = (s_logits.sigmoid() - t_prob).abs() ** beta * cross_entropy
    expected = t_prob.amax(-1).sum()
    return weighted_mean(cross_entropy.sum(-1), weight, expected if normaliser is None else normaliser)


@by_keyword
def objectness_scaled(
    *,
    s_box_logits: Tensor,
    t_box_logits: Tensor,
    s_objectness_logits: Tensor,
    t_objectness_logits: Tensor,
    s_class_logits: Tensor,
    t_class_logits: Tensor,
    objectness_weight: float = 1.0,
    class_weight: float = 1.0,
    box_weight: float = 1.0,
) -> Tensor:
    """Objectness-scaled outputs for YOLOv5 and YOLOv7: the teacher's objectness weighs the class and box terms.

    Mehta and Ozturk, "Object detection at 200 Frames Per Second", arXiv:1805.06361.

        L   = a_o / N * sum_n KL(Bern(o^t_n) || Bern(o^s_n))
            + 1 / max(sum_n o^t_n, 1) * sum_n o^t_n * [ a_c sum_k KL(Bern(p^t_nk) || Bern(p^s_nk)) + a_b |d_n|^2 ]
        o_n = sigmoid(objectness logit),    p_nk = sigmoid(class logit),    d_n = 2 sigmoid(b^t_n) - 2 sigmoid(b^s_n)

    d_n in R^4 is what YOLOv5 decodes: the difference of the centers in cells, and of the square roots of width and
    height in anchors. So both must have the same anchors at the same strides, in the same order.

    Args:
        box_logits: (..., 4), raw. objectness_logits: (...,). class_logits: (..., K). Every leading index is one
            location n, of N.
        objectness_weight, class_weight, box_weight: a_o, a_c, a_b.
    Returns:
        scalar ().
    Differs from the paper: KL replaces its squared error (objectness) and cross-entropy (classes), in line with
    YOLOv5's own loss. Each term is a mean, not a sum, so that a weight means the same at every image size.
    """
    s_box, t_box = as_logit_pair(s_box_logits, t_box_logits)
    s_object, t_object = as_logit_pair(s_objectness_logits, t_objectness_logits)
    s_class, t_class = as_logit_pair(s_class_logits, t_class_logits)
    if s_box.shape != (*s_object.shape, 4) or s_class.shape[:-1] != s_object.shape:
        shapes = ", ".join(str(tuple(z.shape)) for z in (s_box, s_object, s_class))
        raise ValueError(f"box, objectness and class logits {shapes} must be (..., 4), (...,) and (..., K)")
    objectness = bernoulli_kl(s_object, t_object).sum() / joint_normaliser(s_object.numel(), s_object)
    class_kl = bernoulli_kl(s_class, t_class).sum(-1)  # (...,)
    box = (2 * (s_box.sigmoid() - t_box.sigmoid())).square().sum(-1)  # (...,)
    scaled = weighted_mean(class_weight * class_kl + box_weight * box, t_object.sigmoid())
    return objectness_weight * objectness + scaled


def as_logit_pair(s_logits: Tensor, t_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 (float64 stays), the teacher's detached. Raises ValueError where the shapes differ."""
    require_equal_shapes(s_logits, t_logits)
    dtype = compute_dtype(s_logits)
    return s_logits.to(dtype), t_logits.detach().to(dtype)


def require_equal_shapes(s_logits: Tensor, t_logits: Tensor) -> None:
    """Raises ValueError where the shapes differ: nothing is broadcast."""
    if s_logits.shape != t_logits.shape:
        raise ValueError(f"student logits {tuple(s_logits.shape)} and teacher logits {tuple(t_logits.shape)} differ")


def weighted_mean(values: Tensor, weight: Tensor | None, normaliser: Tensor | float | None = None) -> Tensor:
    """sum(w v) / max(M, 1). Without weight, w = 1; without normaliser, M = sum(w). No values give 0.

    Values and normaliser are this process's parts of the sum and of M: see layers.over_processes. The weight is
    detached. Raises ValueError unless it has the shape of the values.
    """
    if weight is None:
        weight = torch.ones_like(values)
    elif weight.shape != values.shape:
        raise ValueError(f"weight {tuple(weight.shape)} must be {tuple(values.shape)}, one per row")
    weight = weight.detach().to(values.dtype)
    if normaliser is None:
        total = weight.sum()
    elif isinstance(normaliser, Tensor):
        total = normaliser.to(values)
    else:
        total = values.new_full((), normaliser)
    return (weight * values).sum() / joint_normaliser(total, values)
