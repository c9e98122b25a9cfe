"""The checker in low precision: no fault where rounding decides a branch, and real faults found."""

import pytest
import torch
from torch import nn
from torch.autograd import Function

from torch_nnmath import testing
from torch_nnmath.testing import Verdict

torch_functional = torch.nn.functional
HALF = (torch.bfloat16, torch.float16)
AUTOCAST = {torch.bfloat16: "autocast bfloat16", torch.float16: "autocast float16"}


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# At these inputs four results are nearer to 0 than the error of half precision.
X, W = draw(3, 5), draw(4, 5) + 0.5
OFFSET = (X @ W.T)[0] + 1e-4 * torch.tensor([1.0, -1.0, 1.0, -1.0])


def compute_near_zero(x, W):
    return torch_functional.linear(x, W, -OFFSET.to(x.device, x.dtype))


def pool(z):
    return torch_functional.max_pool1d(torch.stack([z, 0 * z], -1), 2)


PIECEWISE = {
    "relu": torch.relu,
    "abs": torch.abs,
    "leaky_relu": lambda z: torch_functional.leaky_relu(z, -1.0),
    "max_pool": pool,
    "hardtanh": lambda z: torch_functional.hardtanh(z, 0.0, 100.0),
    "clamp": lambda z: z.clamp(min=0),
    "maximum": lambda z: torch.maximum(z, -z),
    "sort": lambda z: torch.stack([z, -2 * z], -1).sort(-1).values,
    "topk": lambda z: torch.stack([z, 0 * z], -1).topk(1).values,
}


@pytest.mark.parametrize("name", PIECEWISE)
def test_kink_that_rounding_crosses_is_no_fault(name):
    def call(x, W):
        return PIECEWISE[name](compute_near_zero(x, W))

    report = testing.check(call, [X, W], transforms=["gradient", *AUTOCAST.values()])
    assert report.right, report
    for dtype in HALF:
        transforms = ["gradient", "jvp", "jacrev", "vmap of subsets", "per-sample gradients"]
        report = testing.check(call, [X, W], transforms=transforms, dtype=dtype)
        assert {row.verdict for row in report} <= {Verdict.RIGHT, Verdict.UNKNOWN}, report


CANCELLING = {
    "softmax": lambda x: x.softmax(-1),
    "softmax of columns": lambda x: x.softmax(0),
    "layer_norm": lambda x: torch_functional.layer_norm(x, x.shape[1:]),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", CANCELLING)
def test_gradient_that_equal_upstreams_cancel_is_right(name, dtype):
    def call(x):
        return CANCELLING[name](x)

    report = testing.check(call, [X], transforms=["gradient", "upstream gradients"], dtype=dtype)
    assert all(row.verdict == Verdict.RIGHT for row in report), report
    assert report["upstream gradients"].error < 0.1


class AddsToGradient(Function):
    """softmax, whose gradient has a wrong term if all upstream gradients are equal."""

    @staticmethod
    def forward(x):
        return x.softmax(-1)

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        is_constant = (dy == dy.flatten()[0]).all()
        return y * (dy - (dy * y).sum(-1, keepdim=True)) + 0.3 * y * dy * is_constant


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_gradient_that_equal_upstreams_do_not_cancel_is_wrong(dtype):
    names = ["gradient", "upstream gradients"]
    report = testing.check(AddsToGradient, [X], transforms=names, dtype=dtype)
    assert [row.verdict for row in report] == [Verdict.RIGHT, Verdict.WRONG], report


class WrongInHalf(Function):
    """x Wᵀ, whose gradient in W has a wrong entry in half precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, W):
        return torch_functional.linear(x, W)

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.save_for_backward(*inputs)
        ctx.is_half = y.dtype in HALF

    @staticmethod
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        dW = dy.mT @ x.to(dy.dtype)
        factors = torch.ones_like(dW)
        factors[2, 1] += 2 * ctx.is_half
        return (dy @ W.to(dy.dtype)).to(x.dtype), (dW * factors).to(W.dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_fault_beside_a_kink_that_rounding_crosses_is_found(dtype):
    def call(x, W, V):
        z = torch.relu(compute_near_zero(x, W))
        return torch.cat([z, WrongInHalf.apply(x + 1, V).sin()], 1)

    inputs = [X, W, draw(4, 5).flip(0) + 0.4]
    report = testing.check(call, inputs, transforms=["gradient", AUTOCAST[dtype]])
    assert [row.verdict for row in report] == [Verdict.RIGHT, Verdict.WRONG]
    assert report[AUTOCAST[dtype]].detail.startswith("the gradient of input 2 is ")
    report = testing.check(call, inputs, transforms=["gradient"], dtype=dtype)
    assert report["gradient"].verdict == Verdict.WRONG


@pytest.mark.parametrize("dtype", HALF)
def test_lost_gradient_beside_kinks_is_a_silent_zero(dtype):
    def call(x, W, b):
        return torch.relu(compute_near_zero(x, W) + b.float().detach().to(b.dtype) + 0 * b)

    inputs = [X, W, torch.full((4,), 1e-5)]
    report = testing.check(call, inputs, transforms=["autocast bfloat16", "autocast float16"])
    assert [row.verdict for row in report] == [Verdict.SILENT_ZERO] * 2


def test_number_that_rounding_decides_has_no_truth():
    def call(scale):
        return torch.relu(compute_near_zero(scale * X.to(scale), W.to(scale)))[0, 1]

    report = testing.check(call, torch.tensor(1.0), transforms=["gradient", "jvp"])
    assert report.right
    report = testing.check(
        call, torch.tensor(1.0), transforms=["gradient", "jvp"], dtype=torch.bfloat16
    )
    assert report["gradient"].detail.startswith("rounding to torch.bfloat16 changes the gradient")
    assert [row.verdict for row in report] == [Verdict.UNKNOWN] * 2


def test_jump_of_the_value_beside_infinities_is_no_fault():
    def call(x, W):
        z = compute_near_zero(x, W).sign()
        return torch.cat([z, torch.full_like(z[:, :1], -torch.inf)], 1)

    report = testing.check(call, [X, W], transforms=["autocast bfloat16"])
    assert report["autocast bfloat16"].verdict == Verdict.UNKNOWN  # the infinities' derivative


@pytest.mark.parametrize("seed", range(4))
def test_encoder_layer_is_right_under_autocast(seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    testing.assert_right(layer, torch.randn(2, 3, 8), transforms=AUTOCAST.values())
