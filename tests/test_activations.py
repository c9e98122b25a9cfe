"""ReLU of nan and at 0, and softmax in another type than its input's."""

import itertools
import math

import pytest
import torch
import truth
from entry_points import HALF, is_zero
from torch.func import jvp

import torch_nnmath.functional as F
from torch_nnmath import nn

pytestmark = pytest.mark.usefixtures("fixed_seed")


# ReLU

RELUS = {
    "function": F.relu,
    "function in place": lambda z: F.relu(z.clone(), inplace=True),
    "module": nn.ReLU(),
    "module in place": lambda z: nn.ReLU(inplace=True)(z.clone()),
    "feedforward": lambda z: F.feedforward(
        z.unsqueeze(-1),
        [torch.ones(1, 1, dtype=z.dtype), torch.ones(1, 1, dtype=z.dtype)],
        [None, None],
        activation="relu",
        output_activation="relu",
    ).squeeze(-1),
}


@pytest.mark.parametrize("name", RELUS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_relu_passes_nan_and_has_slope_0_at_0(name, dtype):
    z = torch.tensor([-2.0, -0.0, 0.0, 1e-7, 3.0, math.nan, math.inf, -math.inf], dtype=dtype)
    a = torch.tensor([0.0, 0.0, 0.0, 1e-7, 3.0, math.nan, math.inf, 0.0], dtype=dtype)
    slope = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0], dtype=dtype)
    z.requires_grad_()
    da = torch.arange(2, 10).to(dtype).requires_grad_()
    found = RELUS[name](z)
    torch.testing.assert_close(found, a, rtol=0, atol=0, equal_nan=True)
    (dz,) = torch.autograd.grad(found, z, da, create_graph=True)
    assert torch.equal(dz, da * slope)
    second = torch.autograd.grad(dz.sum(), [z, da], materialize_grads=True)
    assert is_zero(second[0])
    assert torch.equal(second[1], slope)
    _, tangent = jvp(RELUS[name], (z.detach(),), (da.detach(),))
    assert torch.equal(tangent, da * slope)
    (theirs,) = torch.autograd.grad(torch.relu(z), z, da.detach())
    assert torch.equal(dz, theirs)


@pytest.mark.parametrize("name", [name for name in RELUS if name != "feedforward"])
def test_relu_passes_nan_at_the_ends_of_vectorised_loops(name):
    for size in (1, 33, 5000):
        for place in {0, size // 2, size - 1}:
            z = torch.full((size,), -1.0)
            z[place] = math.nan
            assert RELUS[name](z).isnan().nonzero().flatten().tolist() == [place]


def test_relu_in_place_on_a_view_changes_the_view_alone():
    base = torch.randn(6, 8, dtype=torch.float64)
    before = base.clone()
    view = base[1:4, ::2]
    assert F.relu(view, inplace=True) is view
    expected = before.clone()
    expected[1:4, ::2] = before[1:4, ::2].clamp(min=0)
    assert torch.equal(base, expected)


# Memory formats

ACTIVATIONS = {
    "sigmoid": (F.sigmoid, torch.sigmoid),
    "tanh": (F.tanh, torch.tanh),
    "relu": (F.relu, torch.relu),
    "relu in place": (RELUS["function in place"], torch.relu),
}
UPSTREAM = {
    "its own": lambda v, memory_format: v.contiguous(memory_format=memory_format),
    "contiguous": lambda v, _: v,
    "expanded": lambda v, _: v.flatten()[:1].view([1] * v.dim()).expand_as(v),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 4, 5), torch.float64),
        ((2, 3, 2, 4, 5), torch.float32),
        ((2, 3, 192, 256), torch.float32),
        ((2, 3, 32, 32, 48), torch.bfloat16),
    ],
)
def test_gradients_keep_channels_last(name, upstream, shape, dtype):
    ours, pytorch = ACTIVATIONS[name]
    channels_last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    z = torch.randn(shape, dtype=dtype).contiguous(memory_format=channels_last).requires_grad_()
    v = UPSTREAM[upstream](torch.randn(shape, dtype=dtype), channels_last).requires_grad_()
    a = ours(z)
    (dz,) = torch.autograd.grad(a, z, v, retain_graph=True)
    (same,) = torch.autograd.grad(a, z, v, create_graph=True)
    _, tangent = jvp(ours, (z.detach(),), (v.detach(),))
    (expected,) = torch.autograd.grad(pytorch(z), z, v)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for gradient in (dz, same, tangent):
        assert gradient.stride() == z.stride()
        torch.testing.assert_close(gradient, expected, **tolerance)
    (second,) = torch.autograd.grad(same.sum(), z, materialize_grads=True)
    assert second.stride() == z.stride()


# Softmax with dtype


@pytest.mark.parametrize("source", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_softmax_with_dtype_casts_first_and_its_gradient_has_the_inputs_type(source, dtype):
    for axis in (0, 1, 2, -1, -3):
        z = torch.randn(3, 4, 2).to(source).requires_grad_()
        da = torch.randn(3, 4, 2).to(dtype)
        found = F.softmax(z, axis, dtype=dtype)
        assert found.dtype == dtype
        (dz,) = torch.autograd.grad(found, z, da, create_graph=True)
        (second,) = torch.autograd.grad(dz.sum(), z)
        ones = torch.ones_like(z)
        _, tangent = jvp(lambda z, i=axis: F.softmax(z, i, dtype=dtype), (z.detach(),), (ones,))
        assert (dz.dtype, second.dtype, tangent.dtype) == (source, source, dtype)

        x = z.detach().to(dtype).double().requires_grad_()
        a = truth.softmax(x, axis)
        (dx,) = torch.autograd.grad(a, x, da.double(), create_graph=True)
        (dxx,) = torch.autograd.grad(dx.sum(), x)
        eps = max(torch.finfo(dtype).eps, torch.finfo(source).eps)
        torch.testing.assert_close(found.double(), a, rtol=4 * torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(dz.double(), dx, rtol=4 * eps, atol=4 * eps)
        torch.testing.assert_close(second.double(), dxx, rtol=8 * eps, atol=8 * eps)
        # a shift of all logits by the same amount changes nothing
        assert tangent.abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("source", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_softmax_of_integers_needs_dtype(source):
    z = torch.tensor([[0, 1, 3], [2, 1, 0]]).to(source)
    for axis, dtype in itertools.product((0, 1, -1), (torch.float32, torch.float64)):
        found = F.softmax(z, axis, dtype=dtype)
        assert found.dtype == dtype
        expected, eps = truth.softmax(z.double(), axis), torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=4 * eps, atol=0)
        with pytest.raises(NotImplementedError):
            torch.softmax(z, axis)
        with pytest.raises(NotImplementedError):
            F.softmax(z, axis)


def test_softmax_with_dtype_of_large_float16_does_not_overflow():
    z = torch.tensor([60000.0, 60000.0, -60000.0], dtype=torch.float16)
    expected = torch.tensor([0.5, 0.5, 0.0])
    assert torch.equal(F.softmax(z, 0, dtype=torch.float32), expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_softmax_without_dim_warns_and_takes_the_axis_of_pytorch(shape):
    z = torch.randn(shape, dtype=torch.float64)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        a = F.softmax(z)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        expected = torch.nn.functional.softmax(z)
    torch.testing.assert_close(a, expected)


def test_softmax_over_a_middle_axis_of_large_examples_has_the_gradient_of_the_truth():
    """An example has more entries than a slice of the kernel."""
    z = torch.randn(2, 3, 2**17, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(z)
    (dz,) = torch.autograd.grad(F.softmax(z, 1), z, g)
    (expected,) = torch.autograd.grad(truth.softmax(z, 1), z, g)
    torch.testing.assert_close(dz, expected)
