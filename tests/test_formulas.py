"""Every sample of the catalog, held to the reference and to numerical differentiation."""

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, jvp
from torch.utils._python_dispatch import TorchDispatchMode

from torch_nnmath import formulas, functional, testing
from torch_nnmath.catalog import CATALOG
from torch_nnmath.verify import BEYOND_PYTORCH, CHECKS, TRANSFORMS

ROWS = [pytest.param(row, id=row.name) for row in CATALOG]
SAMPLES = [
    pytest.param(sample, id=f"{row.name}: {sample.name or 'plain'}")
    for row in CATALOG
    for sample in row.samples
]


def drawn(sample):
    """A sample's inputs, and those of them that are differentiable."""
    inputs = sample.draw()
    return inputs, [x for x in inputs if x.requires_grad]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("check", CHECKS)
def test_reference(row, check):
    CHECKS[check](row, "cpu")


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_transform(sample):
    """Every sample under every transform; what PyTorch cannot is what its own sin cannot."""
    report = testing.check(sample.call, sample.draw(), transforms=TRANSFORMS)
    assert report.right, report
    cannot = {found.transform for found in report if found.verdict == testing.Verdict.CANNOT}
    assert cannot <= set(BEYOND_PYTORCH), report


@pytest.mark.parametrize("sample", SAMPLES)
def test_orders_and_modes_agree(sample):
    """Third derivatives along one direction do not depend on how the modes are nested."""
    # PyTorch changes nothing in place at two levels of forward mode, its own relu_ included
    most_forward = 1 if sample.name == "in place" else 3
    inputs = tuple(x.detach() for x in sample.draw())
    directions = tuple(0.3 * torch.randn(x.shape).double() for x in inputs)

    def along(step):
        moved = (
            x + step * d if x.is_floating_point() else x
            for x, d in zip(inputs, directions, strict=True)
        )
        out = sample.call(*moved)
        return (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()

    zero = torch.zeros((), dtype=torch.float64)
    nestings = [
        third(second(first(along)))
        for third in (jacfwd, jacrev)
        for second in (jacfwd, jacrev)
        for first in (jacfwd, jacrev)
        if [first, second, third].count(jacfwd) <= most_forward
    ]
    want = _third_derivative(along)
    for nesting in nestings:
        torch.testing.assert_close(nesting(zero), want, rtol=1e-4, atol=1e-5)


def _third_derivative(f, h=2e-2):
    """By central differences of an order that leaves about 1e-7."""
    steps, weights = (1, 2, 3, 4), (-488 / 240, 338 / 240, -72 / 240, 7 / 240)
    terms = (
        w * (f(torch.tensor(k * h).double()) - f(torch.tensor(-k * h).double()))
        for k, w in zip(steps, weights, strict=True)
    )
    return sum(terms) / h**3


@pytest.mark.parametrize("sample", SAMPLES)
def test_reverse_over_dual_numbers(sample):
    """The gradient of a tangent in leaves that require gradients, without `torch.func`."""
    inputs, differentiable = drawn(sample)
    tangents = [x.detach().cos() for x in differentiable]
    with forward_ad.dual_level():
        duals = iter(map(forward_ad.make_dual, differentiable, tangents))
        out = sample.call(*(next(duals) if x.is_floating_point() else x for x in inputs))
        tangent = forward_ad.unpack_dual(out).tangent
        if tangent.requires_grad:
            got = torch.autograd.grad(tangent.cos().sum(), differentiable, allow_unused=True)
        else:
            got = [None] * len(differentiable)

    def along(*xs):
        given = iter(xs)
        arguments = (next(given) if x.is_floating_point() else x for x in inputs)
        return sample.call(*arguments)

    plain = tuple(x.detach() for x in differentiable)
    want = torch.func.grad(
        lambda *xs: jvp(along, xs, tuple(tangents))[1].cos().sum(), tuple(range(len(plain)))
    )(*plain)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(torch.zeros_like(theirs) if mine is None else mine, theirs)


def test_every_formula_is_in_the_catalog():
    """F1 to F17 are the document's, F18 to F23 the head's."""
    assert {id for row in CATALOG for id in row.ids} == {f"F{i}" for i in range(1, 24)}


def test_every_public_function_is_in_a_docstring_with_its_formula():
    for name in functional.__all__:
        doc = getattr(functional, name).__doc__
        assert "(F" in doc or "F4" in doc, name
        assert ">>>" in doc, name


@pytest.mark.parametrize("row", ROWS)
def test_every_docstring_names_its_formula(row):
    holder = formulas.softmax_jacobian if row.ids == ("F17",) else row.function
    assert row.ids[0] in holder.__doc__


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    """Frozen inputs cost no product, and the others still get their gradient."""
    asked = []
    plain = torch.ops.torch_nnmath.head.default

    def spy(*args):
        asked.append(tuple(args[-1]))
        return plain(*args)

    monkeypatch.setattr("torch_nnmath.kernels.head", spy)
    x, W, b = (torch.randn(*s, dtype=torch.float64) for s in ((5, 3), (4, 3), (4,)))
    y = torch.tensor([0, 1, 2, 3, 0])
    calls = itertools.product(("mean", "none"), range(3))
    for reduction, i in calls:
        wanted = tuple(i == j for j in range(3))
        leaves = [v.clone().requires_grad_(w) for v, w in zip((x, W, b), wanted, strict=True)]
        asked.clear()
        c = functional.linear_cross_entropy(
            leaves[0], leaves[1], y, linear_bias=leaves[2], reduction=reduction
        )
        c.mean().backward()
        came_before = [] if reduction == "mean" else [(False,) * 5]  # the value's own call
        assert asked == [*came_before, (*wanted, False, False)]
        z = torch.nn.functional.linear(x, W, b).requires_grad_()
        (dz,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, y), z)
        want = (dz @ W, dz.T @ x, dz.sum(0))[wanted.index(True)]
        torch.testing.assert_close(leaves[wanted.index(True)].grad, want)


def test_half_of_a_sigmoid_gradient_is_exact_where_the_product_form_is_zero():
    """a (1 - a) is 0 in float32 from z = 17 on; the fused formula uses σ(z) σ(-z)."""
    z = torch.tensor([20.0, 40.0, -40.0], requires_grad=True)
    functional.sigmoid_squared_error(z, torch.zeros(3), reduction="sum").backward()
    a = torch.sigmoid(z.detach().double())
    torch.testing.assert_close(
        z.grad.double(), a * a * torch.sigmoid(-z.detach().double()), rtol=1e-6, atol=0
    )


def test_base_beta_is_natural_over_ln_beta():
    z, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    natural = functional.cross_entropy(z, y)
    torch.testing.assert_close(functional.cross_entropy(z, y, base=0.5), natural / math.log(0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Sigmoid", "Tanh", "Softmax"])
def test_half_products_are_rounded_once(name, dtype):
    """J v of half a and v is the nearest half number to the exact product of those a and v."""
    g = torch.Generator().manual_seed(0)
    a = torch.rand(64, 33, generator=g).to(dtype)
    v = torch.randn(64, 33, generator=g).to(dtype)
    product = getattr(formulas, name).product
    exact = product(a.double(), v.double())
    off = (product(a, v).double() - exact).abs()
    # half a unit in the last place, and what float32 adds to it
    assert (off <= exact.abs() * torch.finfo(dtype).eps * 0.5 * 1.001 + 1e-6).all()


class Recorded(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_derivative_kernel_of_pytorch_runs_at_any_order(sample):
    inputs, differentiable = drawn(sample)
    with Recorded() as recorded:
        derivative = sample.call(*inputs)
        for _ in range(3):
            total = (derivative * derivative.detach().cos()).sum()
            derivative = torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        total, differentiable, create_graph=True, allow_unused=True
                    )
                    if g is not None and g.requires_grad
                ]
                or [sum(x.sum() for x in differentiable).reshape(1)]
            )
        with forward_ad.dual_level():
            sample.call(
                *(forward_ad.make_dual(x.detach(), x) if x.requires_grad else x for x in inputs)
            )
    allowed = {"slice_backward", "select_backward"}  # views: they move numbers, they compute none
    kernels = {
        name
        for name in recorded.names
        if ("backward" in name or "backward_data" in name) and name not in allowed
    }
    assert not kernels
