"""Every sample of the catalogue against the reference and numerical differentiation."""

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, jvp
from torch.utils._python_dispatch import TorchDispatchMode

from torch_nnmath import formulas, functional, testing
from torch_nnmath.catalog import CATALOG
from torch_nnmath.testing import Verdict
from torch_nnmath.verify import BEYOND_PYTORCH, CHECKS, TRANSFORMS

TRACING = tuple(n for n in TRANSFORMS if any(w in n for w in ("compile", "export", "make_fx")))
EAGER = tuple(name for name in TRANSFORMS if name not in TRACING)

ROWS = [pytest.param(row, id=row.name) for row in CATALOG]
SAMPLES = [
    pytest.param(sample, id=f"{row.name}: {sample.name or 'plain'}")
    for row in CATALOG
    for sample in row.samples
]
# Tracing takes five times as long as all other transforms together. Here each tracing transform
# runs on one sample of each row, in turn; `python -m torch_nnmath verify` runs all on all samples.
TRACED_SAMPLES = [
    pytest.param(transform, sample, id=f"{row.name}: {transform}: {sample.name or 'plain'}")
    for row in CATALOG
    for transform, sample in zip(TRACING, itertools.cycle(row.samples), strict=False)
]


def draw_inputs(sample):
    """Returns a sample's inputs, and those of them that are differentiable."""
    inputs = sample.draw()
    return inputs, [x for x in inputs if x.requires_grad]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("check", CHECKS)
def test_row_passes_proof_and_reference_check(row, check):
    CHECKS[check](row, "cpu")


@pytest.mark.parametrize("sample", SAMPLES)
def test_sample_under_eager_transforms_is_right(sample):
    report = testing.check(sample.call, sample.draw(), transforms=EAGER)
    assert report.right, report
    assert Verdict.CANNOT not in {row.verdict for row in report}, report


@pytest.mark.parametrize(("transform", "sample"), TRACED_SAMPLES)
def test_sample_under_tracing_transform_is_right(transform, sample):
    report = testing.check(sample.call, sample.draw(), transforms=[transform])
    assert report.right, report
    assert report[transform].verdict != Verdict.CANNOT or transform in BEYOND_PYTORCH, report


@pytest.mark.parametrize("sample", SAMPLES)
def test_third_derivative_is_independent_of_nesting_of_modes(sample):
    # PyTorch supports in-place operations, its own relu_ included, at one level of forward mode.
    max_forward_levels = 1 if sample.name == "in place" else 3
    inputs = tuple(x.detach() for x in sample.draw())
    directions = tuple(0.3 * torch.randn(x.shape).double() for x in inputs)

    def compute_along(step):
        moved = (
            x + step * d if x.is_floating_point() else x
            for x, d in zip(inputs, directions, strict=True)
        )
        out = sample.call(*moved)
        return (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()

    zero = torch.zeros((), dtype=torch.float64)
    nestings = [
        third(second(first(compute_along)))
        for third in (jacfwd, jacrev)
        for second in (jacfwd, jacrev)
        for first in (jacfwd, jacrev)
        if [first, second, third].count(jacfwd) <= max_forward_levels
    ]
    expected = compute_third_derivative(compute_along)
    for nesting in nestings:
        torch.testing.assert_close(nesting(zero), expected, rtol=1e-4, atol=1e-5)


def compute_third_derivative(f, h=2e-2):
    """Returns the third derivative at 0 by central differences, with an error of about 1e-7."""
    steps, weights = (1, 2, 3, 4), (-488 / 240, 338 / 240, -72 / 240, 7 / 240)
    terms = (
        w * (f(torch.tensor(k * h).double()) - f(torch.tensor(-k * h).double()))
        for k, w in zip(steps, weights, strict=True)
    )
    return sum(terms) / h**3


@pytest.mark.parametrize("sample", SAMPLES)
def test_reverse_mode_over_dual_numbers_equals_torch_func(sample):
    """The gradient of a tangent in leaves that require gradients, without `torch.func`."""
    inputs, differentiable = draw_inputs(sample)
    tangents = [x.detach().cos() for x in differentiable]
    with forward_ad.dual_level():
        duals = iter(map(forward_ad.make_dual, differentiable, tangents))
        out = sample.call(*(next(duals) if x.is_floating_point() else x for x in inputs))
        tangent = forward_ad.unpack_dual(out).tangent
        if tangent.requires_grad:
            gradients = torch.autograd.grad(
                tangent.cos().sum(), differentiable, allow_unused=True, materialize_grads=True
            )
        else:
            gradients = map(torch.zeros_like, differentiable)

    def call(*xs):
        remaining = iter(xs)
        return sample.call(*(next(remaining) if x.is_floating_point() else x for x in inputs))

    def compute_tangent(*xs):
        return jvp(call, xs, tuple(tangents))[1].cos().sum()

    points = tuple(x.detach() for x in differentiable)
    expected_gradients = torch.func.grad(compute_tangent, tuple(range(len(points))))(*points)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_catalog_contains_every_formula():
    """F1 to F17 are the document's, F18 to F24 and F30 the head's, F25 to F29 those of tuning."""
    numbers = range(1, 31)
    assert {id for row in CATALOG for id in row.ids} == {f"F{i}" for i in numbers}


@pytest.mark.parametrize("name", functional.__all__)
def test_docstring_of_public_function_has_formula_and_example(name):
    doc = getattr(functional, name).__doc__
    assert "(F" in doc or "F4" in doc
    assert ">>>" in doc


@pytest.mark.parametrize("row", ROWS)
def test_docstring_of_formula_has_its_id(row):
    function = formulas.softmax_jacobian if row.ids == ("F17",) else row.function
    assert row.ids[0] in function.__doc__


def test_head_computes_only_needed_gradients(monkeypatch):
    """Frozen inputs cost no product, and the others still get their gradient."""
    needed_gradients = []
    head = torch.ops.torch_nnmath.head.default

    def record_and_call(*args):
        needed_gradients.append(tuple(args[-1]))
        return head(*args)

    monkeypatch.setattr("torch_nnmath.kernels.head", record_and_call)
    x, W, b = (torch.randn(*s, dtype=torch.float64) for s in ((5, 3), (4, 3), (4,)))
    y = torch.tensor([0, 1, 2, 3, 0])
    for reduction, i in itertools.product(("mean", "none"), range(3)):
        needed = tuple(i == j for j in range(3))
        leaves = [v.clone().requires_grad_(n) for v, n in zip((x, W, b), needed, strict=True)]
        needed_gradients.clear()
        c = functional.linear_cross_entropy(
            leaves[0], leaves[1], y, linear_bias=leaves[2], reduction=reduction
        )
        c.mean().backward()
        forward_calls = [] if reduction == "mean" else [(False,) * 5]  # the value alone
        assert needed_gradients == [*forward_calls, (*needed, False, False)]
        z = torch.nn.functional.linear(x, W, b).requires_grad_()
        (dz,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, y), z)
        torch.testing.assert_close(leaves[i].grad, (dz @ W, dz.T @ x, dz.sum(0))[i])


def test_sigmoid_squared_error_gradient_of_large_logits_is_exact():
    """a (1 - a) is 0 in float32 from z = 17 on; the fused formula computes σ(z) σ(-z)."""
    z = torch.tensor([20.0, 40.0, -40.0], requires_grad=True)
    functional.sigmoid_squared_error(z, torch.zeros(3), reduction="sum").backward()
    a = torch.sigmoid(z.detach().double())
    torch.testing.assert_close(
        z.grad.double(), a * a * torch.sigmoid(-z.detach().double()), rtol=1e-6, atol=0
    )


def test_cross_entropy_with_base_is_natural_loss_over_log_of_base():
    z, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    natural = functional.cross_entropy(z, y)
    torch.testing.assert_close(functional.cross_entropy(z, y, base=0.5), natural / math.log(0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Sigmoid", "Tanh", "Softmax"])
def test_jacobian_product_in_half_precision_is_rounded_once(name, dtype):
    g = torch.Generator().manual_seed(0)
    a = torch.rand(64, 33, generator=g).to(dtype)
    v = torch.randn(64, 33, generator=g).to(dtype)
    product = getattr(formulas, name).product
    exact = product(a.double(), v.double())
    error = (product(a, v).double() - exact).abs()
    # Half a unit in the last place, and the rounding of float32.
    assert (error <= exact.abs() * torch.finfo(dtype).eps * 0.5 * 1.001 + 1e-6).all()


class OperatorRecorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sample", SAMPLES)
def test_sample_calls_no_derivative_kernel_of_pytorch_at_any_order(sample):
    inputs, differentiable = draw_inputs(sample)
    with OperatorRecorder() as recorder:
        derivative = sample.call(*inputs)
        for _ in range(3):
            total = (derivative * derivative.detach().cos()).sum()
            gradients = torch.autograd.grad(
                total, differentiable, create_graph=True, allow_unused=True
            )
            nonzero = [g.flatten() for g in gradients if g is not None and g.requires_grad]
            zero = sum(x.sum() for x in differentiable).reshape(1)
            derivative = torch.cat(nonzero or [zero])
        with forward_ad.dual_level():
            sample.call(
                *(forward_ad.make_dual(x.detach(), x) if x.requires_grad else x for x in inputs)
            )
    views = {"slice_backward", "select_backward"}  # they copy entries and compute nothing
    assert not {name for name in recorder.names - views if "backward" in name}
