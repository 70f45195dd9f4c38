"""The fused losses against their specifications in float64, value and gradient: shapes, types, layouts, upstreams."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.backend import IS_INTERPRETED
from kernels.channel_wise_kl import channel_kl, channel_kl_eager
from kernels.masked_mse import masked_squares, masked_squares_eager
from kernels.sigmoid_kl import sigmoid_kl, sigmoid_kl_eager
from kernels.temperature_kl import STRIDED_ROW, WHOLE_ROW, temperature_kl, temperature_kl_eager

TOLERANCES = {  # of the value, of each entry of the gradient; relative
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 2**-6),  # two roundings, which the interpreter makes by cutting off: up to 2^-7 each
    torch.float16: (1e-5, 2**-10),
    torch.float64: (1e-12, 1e-10),
}
DTYPES = list(TOLERANCES)
T = 3.0


@dataclass(frozen=True)
class Loss:
    """A kernel and its specification as functions of (student, teacher), for inputs of one shape."""

    kernel: Callable[[Tensor, Tensor], Tensor]
    eager: Callable[[Tensor, Tensor], Tensor]


def row_loss(kernel: Callable, eager: Callable) -> Callable[[Tensor], Loss]:
    def make(s: Tensor) -> Loss:
        weight = torch.rand(s.shape[:-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(s.device)
        weight = weight.float()
        total = weight.double().sum()
        return Loss(
            lambda s, t: kernel(s, t, temperature=T, weight=weight, normaliser=total),
            lambda s, t: eager(s, t, T, weight, total),
        )

    return make


def map_mask(s: Tensor) -> Tensor:
    """(B, 1, H, W), two pixels in three 0, the others in (0, 1)."""
    b, _, h, w = s.shape
    mask = 3 * torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(1)) - 2
    return mask.clamp(min=0).to(s.device)


def masked(s: Tensor) -> Loss:
    mask = map_mask(s)
    total = mask.double().sum().clamp(min=1)
    return Loss(
        lambda s, t: masked_squares(s, t, mask, normaliser=total), lambda s, t: masked_squares_eager(s, t, mask, total)
    )


def channel_wise(s: Tensor) -> Loss:
    return Loss(lambda s, t: channel_kl(s, t, temperature=T), lambda s, t: channel_kl_eager(s, t, T))


ROW_LOSSES = {
    "temperature_kl": row_loss(temperature_kl, temperature_kl_eager),
    "sigmoid_kl": row_loss(sigmoid_kl, sigmoid_kl_eager),
}
MAP_LOSSES = {"channel_wise_kl": channel_wise, "masked_mse": masked}
SMALL = [pytest.param(make, (5, 7), id=name) for name, make in ROW_LOSSES.items()]
SMALL += [pytest.param(make, (2, 3, 4, 5), id=name) for name, make in MAP_LOSSES.items()]


def pair(shape, device, dtype=torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    s, t = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return s.to(device, dtype), t.to(device, dtype)


def assert_same(loss: Loss, s: Tensor, t: Tensor, upstream: float = 3.0) -> None:
    """Value and gradient of the kernel are those of the specification in float64 on the same numbers."""
    s = s.detach().requires_grad_()
    exact = s.detach().double().requires_grad_()
    expected = loss.eager(exact, t.double())
    (expected_gradient,) = torch.autograd.grad(upstream * expected, exact)
    got = loss.kernel(s, t)
    (gradient,) = torch.autograd.grad(upstream * got, s)
    value_tolerance, gradient_tolerance = TOLERANCES[s.dtype]
    assert got.shape == () and got.dtype == (torch.float64 if s.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == s.dtype and gradient.shape == s.shape
    torch.testing.assert_close(got.double(), expected, rtol=value_tolerance, atol=1e-7 * value_tolerance)
    largest = expected_gradient.abs().max().item() if s.numel() else 0.0
    underflow = 2**-24 if s.dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=gradient_tolerance, atol=2e-6 * largest + underflow
    )


@pytest.mark.parametrize("name", ROW_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 20, 41, 80, 401, 1271])
def test_rows_of_any_length(columns, dtype, name, device):
    s, t = pair((3, columns), device, dtype)
    assert_same(ROW_LOSSES[name](s), s, t)


@pytest.mark.parametrize("name", ROW_LOSSES)
@pytest.mark.parametrize("rows", [1, 16, 17, 130])
def test_any_number_of_rows(rows, name, device):
    s, t = pair((rows, 80), device)
    assert_same(ROW_LOSSES[name](s), s, t)


@pytest.mark.parametrize("name", ROW_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [WHOLE_ROW, WHOLE_ROW + 1])
def test_rows_longer_than_registers(columns, dtype, name, device):
    s, t = pair((2, columns), device, dtype)
    assert_same(ROW_LOSSES[name](s), s, t)


@pytest.mark.parametrize("name", ROW_LOSSES)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 3, 2, 7)])
def test_any_leading_dimensions(shape, name, device):
    s, t = pair(shape, device)
    assert_same(ROW_LOSSES[name](s), s, t)


@pytest.mark.parametrize("name", MAP_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 4, 5), (1, 17, 5, 8), (2, 3, 31, 41)])
def test_maps(shape, dtype, name, device):
    s, t = pair(shape, device, dtype)
    assert_same(MAP_LOSSES[name](s), s, t)


@pytest.mark.parametrize("name", MAP_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 4, 5), (2, 40, 13, 11), (1, 160, 3, 3)])
def test_channels_last_maps_keep_their_layout(shape, dtype, name, device):
    s, t = (x.to(memory_format=torch.channels_last) for x in pair(shape, device, dtype))
    assert_same(MAP_LOSSES[name](s), s, t)
    s.requires_grad_()
    MAP_LOSSES[name](s).kernel(s, t).backward()
    assert s.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_map_longer_than_registers(device):
    s, t = pair((1, 1, 91, 97), device)
    assert s[0, 0].numel() > WHOLE_ROW
    assert_same(channel_wise(s), s, t)
    assert_same(masked(s), s, t)


LAYOUTS = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other column": lambda x: torch.stack((x, 0 * x), -1).flatten(-2)[..., ::2],
    "padded rows": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
}


@pytest.mark.parametrize(("make", "shape"), SMALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, make, shape, device):
    s, t = pair(shape, device)
    other = LAYOUTS[layout]
    assert not other(s).is_contiguous() and torch.equal(other(s), s)
    for students, teachers in ((other(s), t), (s, other(t)), (other(s), other(t))):
        assert_same(make(s), students, teachers)
    assert_same(make(s), s, t[:1].expand_as(t))


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_class_first_heads(name, device):
    """A dense head's (B, K, A) seen as (B, A, K): rows are neighbours in memory, columns A apart."""
    for columns in (20, STRIDED_ROW + 1):
        s, t = (x.transpose(1, 2) for x in pair((2, columns, 33), device))
        assert_same(ROW_LOSSES[name](s), s, t)
        s.requires_grad_()
        ROW_LOSSES[name](s).kernel(s, t).backward()
        assert s.grad.stride() == s.stride()


@pytest.mark.parametrize(("make", "shape"), SMALL)
@pytest.mark.parametrize("teacher", [torch.bfloat16, torch.float32], ids=str)
def test_student_and_teacher_of_different_types(teacher, make, shape, device):
    s, t = pair(shape, device)
    assert_same(make(s), s.bfloat16() if teacher == torch.float32 else s, t.to(teacher))


@pytest.mark.parametrize(("make", "shape"), SMALL)
@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradients(dtype, upstream, make, shape, device):
    s, t = pair(shape, device, dtype)
    assert_same(make(s), s, t, upstream)


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_a_loss_scaler_saves_float16_gradients(name, device):
    """Entries far below the smallest float16 meet the scaler's factor before they are rounded."""
    kernel, eager = {
        "temperature_kl": (temperature_kl, temperature_kl_eager),
        "sigmoid_kl": (sigmoid_kl, sigmoid_kl_eager),
    }[name]
    loss = Loss(lambda s, t: kernel(s, t, normaliser=1e9), lambda s, t: eager(s, t, 1.0, None, 1e9))
    s, t = pair((5, 7), device, torch.float16)
    (gradient,) = torch.autograd.grad(65536 * loss.kernel(s.requires_grad_(), t), s)
    assert gradient.any()
    assert_same(loss, s, t, 65536.0)


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_a_graph_used_twice(make, shape, device):
    s, t = pair(shape, device)
    s.requires_grad_()
    loss = make(s).kernel(s, t)
    (once,) = torch.autograd.grad(loss, s, retain_graph=True)
    before = once.clone()
    (twice,) = torch.autograd.grad(2 * loss, s, retain_graph=True)
    (last,) = torch.autograd.grad(4 * loss, s)
    assert torch.equal(once, before)
    torch.testing.assert_close(twice, 2 * before)
    torch.testing.assert_close(last, 4 * before)


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_gradients_add_up_with_those_of_other_losses(make, shape, device):
    s, t = pair(shape, device)
    s.requires_grad_()
    loss = make(s)
    (alone,) = torch.autograd.grad(loss.kernel(s, t), s)
    doubled = 2 * s
    (loss.kernel(doubled, 2 * t) + loss.kernel(s, t) + doubled.sum()).backward()
    (inner,) = torch.autograd.grad(loss.kernel(s2 := doubled.detach().requires_grad_(), 2 * t), s2)
    torch.testing.assert_close(s.grad, alone + 2 * inner + 2)


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_gradcheck(make, shape, device):
    s, t = pair([1] * (len(shape) - 2) + [2, 3], device, torch.float64)
    loss = make(s)
    assert torch.autograd.gradcheck(lambda s: 3 * loss.kernel(s, t), s.requires_grad_())


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_no_second_derivative(make, shape, device):
    s, t = pair(shape, device)
    with pytest.raises(RuntimeError, match="KERNELS=eager"):
        torch.autograd.grad(make(s).kernel(s.requires_grad_(), t), s, create_graph=True)


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_only_the_student_learns(make, shape, device):
    s, t = pair(shape, device)
    loss = make(s)
    with torch.no_grad():
        value = loss.kernel(s.requires_grad_(), t)
    assert not value.requires_grad
    loss.kernel(s, t.requires_grad_()).backward()
    assert s.grad.abs().sum() > 0 and t.grad is None
    assert not loss.kernel(s.detach(), t).requires_grad
    with torch.inference_mode():
        frozen = t.detach().clone()
    learnt, s.grad = s.grad, None
    loss.kernel(s, frozen).backward()
    assert torch.equal(s.grad, learnt)
    assert torch.equal(loss.kernel(s, t), value)


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_weights(name, device):
    s, t = pair((2, 5, 4), device)
    kernel = {"temperature_kl": temperature_kl, "sigmoid_kl": sigmoid_kl}[name]
    one = torch.ones(2, 5, device=device)
    torch.testing.assert_close(kernel(s, t, weight=one, normaliser=10.0), kernel(s, t, normaliser=10.0))
    some = one.clone()
    some[0, 1:] = 0
    some[1] = 0
    torch.testing.assert_close(kernel(s, t, weight=3 * some), 3 * kernel(s[:1, :1], t[:1, :1]))
    some = some.double().t().contiguous().t().requires_grad_()
    normaliser = torch.tensor(2.0, device=device, requires_grad=True)
    kernel(s.requires_grad_(), t, weight=some, normaliser=normaliser).backward()
    assert some.grad is None and normaliser.grad is None
    assert s.grad[0, 0].any() and not s.grad[0, 1:].any() and not s.grad[1].any()


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_nothing_at_the_teacher(make, shape, device):
    for dtype in DTYPES:
        _, t = pair(shape, device, dtype)
        s = t.clone().requires_grad_()
        value = make(s).kernel(s, t)
        value.backward()
        assert value == 0 and not s.grad.any()


@pytest.mark.parametrize(("make", "shape"), SMALL)
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_close_and_saturated(scale, make, shape, device):
    s, t = pair(shape, device, scale=scale)
    loss = make(s)
    expected = loss.eager(s.double(), t.double())
    tolerance = 1e-5 if scale > 1e-3 else 0.5  # of a loss near 1e-7 float32 has few digits, here as in eager
    torch.testing.assert_close(loss.kernel(s, t).double(), expected, rtol=tolerance, atol=2e-6)
    loss.kernel(s.requires_grad_(), t).backward()
    assert s.grad.isfinite().all()


def test_a_common_offset_costs_no_digits(device):
    """Feature maps are rarely centred: a softmax must subtract its maximum before anything is rounded."""
    s, t = pair((1, 2, 8, 8), device)
    torch.testing.assert_close(
        channel_kl(s + 4096, t - 4096), channel_kl((s + 4096) - 4096, (t - 4096) + 4096), rtol=1e-5, atol=0
    )
    s, t = (x.to(memory_format=torch.channels_last) for x in pair((1, 2, 16, 16), device))
    torch.testing.assert_close(
        channel_kl(s + 4096, t - 4096), channel_kl((s + 4096) - 4096, (t - 4096) + 4096), rtol=1e-5, atol=0
    )


def test_improbable_classes_keep_their_digits(device):
    """Most logits of a dense head say background: there a rounded 1 + exp(-x) would be 1, and the KL 0 or worse."""
    s, t = torch.linspace(-25, -9, 65, device=device), torch.linspace(-22, -8, 65, device=device)
    for k in range(0, 65, 8):
        expected = sigmoid_kl_eager(s[k : k + 1].double(), t[k : k + 1].double(), 1.0, None, 1.0)
        torch.testing.assert_close(sigmoid_kl(s[k : k + 1], t[k : k + 1]).double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("nothing", [torch.nan, torch.inf])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmarked_pixels_play_no_role(dtype, channels_last, nothing, device):
    s, t = pair((2, 5, 6, 7), device, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    s, t = (x.to(memory_format=layout) for x in (s, t))
    mask = map_mask(s) > 0
    expected = masked_squares(s.requires_grad_(), t, mask)
    (expected_gradient,) = torch.autograd.grad(expected, s)
    spoilt = [x.detach().masked_fill(~mask, nothing).to(memory_format=layout) for x in (s, t)]
    got = masked_squares(spoilt[0].requires_grad_(), spoilt[1], mask)
    (gradient,) = torch.autograd.grad(got, spoilt[0])
    assert torch.equal(got, expected) and torch.equal(gradient, expected_gradient)
    assert not gradient.masked_select(~mask).any()


@pytest.mark.skipif(not IS_INTERPRETED, reason="only the interpreter can say what is read")
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_is_read_where_the_mask_is_zero(channels_last, device, monkeypatch):
    """One pixel is marked: of each channel, it and the three that share its 16 bytes are read; alone, where last."""
    from triton.runtime.interpreter import interpreter_builder

    s, t = pair((2, 8, 4, 8), device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    s, t = (x.to(memory_format=layout) for x in (s, t))
    mask = torch.zeros(2, 1, 4, 8, device=device)
    mask[1, 0, 2, 5] = 1
    addresses = {id(x): range(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in (s, t)}
    counts, load = {id(s): 0, id(t): 0}, type(interpreter_builder).create_masked_load

    def counting_load(builder, pointers, is_loaded, *others):
        loaded = pointers.data[is_loaded.data]
        for key, addresses_of in addresses.items():
            counts[key] += int(((loaded >= addresses_of.start) & (loaded < addresses_of.stop)).sum())
        return load(builder, pointers, is_loaded, *others)

    monkeypatch.setattr(type(interpreter_builder), "create_masked_load", counting_load)
    masked_squares(s.requires_grad_(), t, mask).backward()
    assert set(counts.values()) == {8 * (1 if channels_last else 4)}


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_masks_and_maps_of_nothing(name, device):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)):
        s = torch.zeros(shape, device=device, requires_grad=True)
        value = MAP_LOSSES[name](s).kernel(s, s.detach())
        value.backward()
        assert value == 0 and s.grad.shape == s.shape
    s, t = pair((2, 3, 4, 5), device)
    assert masked_squares(s, t, torch.zeros(2, 1, 4, 5, device=device)) == 0


@pytest.mark.parametrize("name", ROW_LOSSES)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (2, 0, 7)])
def test_rows_of_nothing(shape, name, device):
    s = torch.zeros(shape, device=device, requires_grad=True)
    kernel = {"temperature_kl": temperature_kl, "sigmoid_kl": sigmoid_kl}[name]
    value = kernel(s, s.detach())
    value.backward()
    assert value == 0 and s.grad.shape == s.shape


@pytest.mark.parametrize(("make", "shape"), SMALL)
def test_the_same_twice(make, shape, device):
    shape = (40, 300) if len(shape) == 2 else (2, 20, 30, 10)
    s, t = pair(shape, device)
    loss = make(s)
    first, second = (loss.kernel(s.requires_grad_(), t) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(*(torch.autograd.grad(value, s)[0] for value in (first, second)))


@pytest.mark.parametrize("name", [*ROW_LOSSES, *MAP_LOSSES])
@pytest.mark.parametrize("step", [2**30 + 64, 2**31 + 64])
def test_offsets_beyond_32_bits(step, name, device):
    """Rows (or channels) so far apart that a product of 32-bit numbers, or one of them, is too large for 32 bits."""
    is_map = name in MAP_LOSSES
    size, strides = ((1, 3, 2, 8), (0, step, 8, 1)) if is_map else ((1, 3, 16), (0, step, 1))
    # On a CPU only the pages that are touched take memory.
    s = torch.empty(2 * step + 16, dtype=torch.bfloat16, device=device).as_strided(size, strides)
    s0, t = pair(size, device, torch.bfloat16)
    s.copy_(s0)
    assert_same((MAP_LOSSES if is_map else ROW_LOSSES)[name](s), s, t)
