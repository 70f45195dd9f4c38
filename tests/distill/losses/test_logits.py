"""Logit losses on rows small enough to work out by hand; their checks and mutants are in test_mutants."""

import math

import pytest
import torch

from distill.losses.logits import (
    ImageHead,
    bernoulli_kl,
    decoupled_kl,
    image_kl,
    objectness_scaled,
    prediction_correlation,
    probability_correlation,
    quality_focal,
    soft_class_targets,
    softmax_kl,
)


def logits_of(*probabilities: float) -> torch.Tensor:
    """One row whose softmax is the probabilities given."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_softmax_kl_of_two_classes():
    """KL((3/4, 1/4) || (1/2, 1/2)); at T = 2 the teacher's odds of 3 become sqrt 3."""
    t, s = logits_of(0.75, 0.25), logits_of(0.5, 0.5)
    assert softmax_kl(s_logits=s, t_logits=t).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    p = 3**0.5 / (1 + 3**0.5)
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert softmax_kl(s_logits=s, t_logits=t, temperature=2.0).item() == pytest.approx(expected)


def test_row_weights_choose_the_rows():
    s, t = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    only = softmax_kl(s_logits=s[1:2], t_logits=t[1:2])
    torch.testing.assert_close(softmax_kl(s_logits=s, t_logits=t, weight=weight), only)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(softmax_kl(s_logits=s, t_logits=t, weight=ones), softmax_kl(s_logits=s, t_logits=t))


@pytest.mark.parametrize("loss", [softmax_kl, image_kl])
def test_gradient_size_hardly_depends_on_temperature(loss):
    """T^2 keeps the gradient of close, small logits the same at every T; without it, it would shrink 100-fold."""
    t = 0.01 * torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for temperature in (1.0, 10.0):
        s = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
        loss(s_logits=s, t_logits=t, temperature=temperature).backward()
        gradients.append(s.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.03, atol=1e-5)


def test_hinton_is_decoupled_with_the_teachers_doubt_as_weight():
    """KL(p^t || p^s) = KL(b^t || b^s) + (1 - p^t_y) KL(q^t || q^s), row by row."""
    s, t = 2 * torch.randn(7, 6, dtype=torch.float64), 2 * torch.randn(7, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 2])
    for temperature in (1.0, 3.0):
        for n in range(7):
            row = dict(s_logits=s[n : n + 1], t_logits=t[n : n + 1], temperature=temperature)
            doubt = 1 - (t[n] / temperature).softmax(0)[labels[n]].item()
            decoupled = decoupled_kl(**row, labels=labels[n : n + 1], target_weight=1.0, other_weight=doubt)
            torch.testing.assert_close(decoupled, softmax_kl(**row))


def test_a_sure_teacher_is_still_heard_about_the_other_classes():
    """In float32, p_y = 1 to the last digit: Hinton's gradient on the other classes is gone, DKD's is not."""
    t = torch.tensor([[60.0, 1.0, -1.0]])
    s = torch.tensor([[60.0, -1.0, 1.0]], requires_grad=True)
    softmax_kl(s_logits=s, t_logits=t).backward()
    assert s.grad.abs().max() < 1e-20
    s.grad = None
    decoupled_kl(s_logits=s, t_logits=t, labels=torch.tensor([0])).backward()
    expected = 0.25 * (torch.tensor([-1.0, 1.0]).softmax(0) - torch.tensor([1.0, -1.0]).softmax(0))
    torch.testing.assert_close(s.grad[0, 1:], expected)


def test_background_is_a_label_like_any_other():
    s, t = torch.randn(2, 4), torch.randn(2, 4)
    column = [2, 0, 1, 3]
    moved = decoupled_kl(s_logits=s[:, column], t_logits=t[:, column], labels=torch.tensor([1, 3]))
    torch.testing.assert_close(decoupled_kl(s_logits=s, t_logits=t, labels=torch.tensor([0, 3])), moved)


def test_correlation_is_content_with_a_less_certain_student():
    """Probabilities half way to uniform: each row is a scaled and shifted copy, and costs nothing over classes."""
    t_prob = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]], dtype=torch.float64)
    s_prob = 0.5 * t_prob + 0.5 / 3
    assert probability_correlation(s_prob=s_prob, t_prob=t_prob).abs() < 1e-12
    assert prediction_correlation(s_logits=s_prob.log(), t_logits=t_prob.log()).abs() < 1e-12
    assert softmax_kl(s_logits=s_prob.log(), t_logits=t_prob.log()) > 0.05


def test_correlation_is_2_for_the_opposite_order():
    t_prob = torch.tensor([[0.6, 0.4, 0.2], [0.1, 0.3, 0.5]], dtype=torch.float64)
    assert probability_correlation(s_prob=t_prob.flip(1), t_prob=t_prob).item() == pytest.approx(2)


def test_correlation_over_samples_alone_sees_a_class_that_is_never_told_apart():
    """Two rows of equal shape in the student: over classes it is perfect, over samples it tells nothing (1/2 each)."""
    t = logits_of(0.6, 0.3, 0.1).repeat(2, 1) + torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    s = t.mean(0, keepdim=True).expand(2, 3)
    over_samples = prediction_correlation(s_logits=s, t_logits=t, class_weight=0.0)
    assert over_samples.item() == pytest.approx(1 / 2)


def test_quality_focal_of_one_class():
    """|1/2 - 9/10| * log 2, over one location the teacher is 0.9 sure of, so over max(0.9, 1)."""
    s, t = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), logit(0.9), dtype=torch.float64)
    assert quality_focal(s_logits=s, t_logits=t).item() == pytest.approx(0.4 * math.log(2))
    assert quality_focal(s_logits=s, t_logits=t, beta=2.0).item() == pytest.approx(0.16 * math.log(2))
    assert quality_focal(s_logits=s, t_logits=t, normaliser=4).item() == pytest.approx(0.1 * math.log(2))


def test_quality_focal_is_blind_to_agreement_and_ignored_locations():
    t = torch.tensor([[2.0, -3.0], [-4.0, 1.0], [0.5, 0.5]])
    s = t.clone()
    s[2] += 5
    weight = torch.tensor([1.0, 1.0, 0.0])
    assert quality_focal(s_logits=s, t_logits=t, weight=weight) == 0
    assert quality_focal(s_logits=s, t_logits=t) > 0.5


def test_the_usual_normaliser_is_what_the_teacher_believes_in():
    """Ten thousand empty locations more change nothing; one object more does."""
    t, s = torch.tensor([[6.0, -6.0], [-6.0, 6.0]]), torch.zeros(2, 2)
    few = quality_focal(s_logits=s, t_logits=t)
    empty = torch.full((10_000, 2), -30.0)
    many = quality_focal(s_logits=torch.cat((s, empty)), t_logits=torch.cat((t, empty)))
    torch.testing.assert_close(few, many)


def test_objectness_scales_class_and_box():
    """At a location the teacher is half sure of, and one where it sees nothing, only the first counts."""
    t = dict(
        t_box_logits=torch.zeros(2, 4), t_objectness_logits=torch.tensor([0.0, -40.0]), t_class_logits=torch.zeros(2, 1)
    )
    s = dict(
        s_box_logits=torch.tensor([[logit(0.75)] * 4, [9.0] * 4]),
        s_objectness_logits=t["t_objectness_logits"].clone(),
        s_class_logits=torch.tensor([[logit(0.25)], [9.0]]),
    )
    class_kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    expected = 0.5 * (2 * class_kl + 3 * 4 * 0.5**2)  # sum of objectness 0.5, held above 1
    assert objectness_scaled(**s, **t, class_weight=2.0, box_weight=3.0).item() == pytest.approx(expected)


def test_objectness_is_learnt_everywhere():
    s = torch.zeros(4, requires_grad=True)
    nothing = dict(
        s_box_logits=torch.zeros(4, 4), t_box_logits=torch.zeros(4, 4),
        s_class_logits=torch.zeros(4, 2), t_class_logits=torch.zeros(4, 2),
    )  # fmt: skip
    objectness_scaled(s_objectness_logits=s, t_objectness_logits=torch.full((4,), -9.0), **nothing).backward()
    torch.testing.assert_close(s.grad, torch.full((4,), 0.5 / 4), rtol=1e-3, atol=0)


def test_image_head_reads_a_map():
    torch.manual_seed(0)
    head = ImageHead(3, 5)
    feature_map = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(head(feature_map), head(feature_map.flip(3)))
    loss = image_kl(s_logits=head(feature_map), t_logits=torch.randn(2, 5))
    loss.backward()
    assert head.classify.weight.grad.abs().sum() > 0


def test_bernoulli_kl_of_equal_saturated_logits_is_zero():
    saturated = torch.tensor([1e4, -1e4])
    assert not bernoulli_kl(saturated, saturated).any()


def test_descent_reaches_the_teacher():
    """Each loss, minimised from far away, gives the teacher's probabilities: all of them, or their order (DIST)."""
    torch.manual_seed(0)
    t = torch.randn(6, 4)
    losses = {
        softmax_kl: {},
        image_kl: {},
        decoupled_kl: dict(labels=torch.tensor([0, 1, 2, 3, 0, 1])),
        prediction_correlation: {},
        soft_class_targets: {},
        quality_focal: dict(beta=2.0),
    }
    for loss, others in losses.items():
        s = (3 * torch.randn(6, 4)).requires_grad_()
        optimizer = torch.optim.Adam([s], lr=0.1)
        start = loss(s_logits=s, t_logits=t, **others).item()
        for _ in range(200):
            optimizer.zero_grad()
            loss(s_logits=s, t_logits=t, **others).backward()
            optimizer.step()
        assert loss(s_logits=s, t_logits=t, **others).item() < 0.02 * start, loss.__name__
        assert (s.argmax(1) == t.argmax(1)).all(), loss.__name__
