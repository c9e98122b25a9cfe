"""Algebraic properties of the losses, over random shapes, options and values in float64.

Losses and gradients are compared with themselves, in blocks of 32 rows: no truth is needed.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import limit_head_blocks
from hypothesis import given
from hypothesis import strategies as st
from random_arguments import BASES, F64, ROW_COUNTS, RandomArguments, use_examples
from torch import Tensor

import torch_nnmath.functional as ours

pytestmark = pytest.mark.usefixtures("one_thread", "new_memory_is_nan")


class RandomRows:
    """Rows of logits and features, a target, class weights and options."""

    def __init__(self, data: Any, min_rows: int = 1):
        self.arguments = a = RandomArguments(data)
        self.N = max(a.choose(*ROW_COUNTS), min_rows)
        self.C, self.D = a.choose(2, 3, 1, 5, 17), a.choose(2, 3, 1, 5)
        self.has_indices = a.choose(True, False)
        self.options = {
            "base": a.choose(*BASES),
            "label_smoothing": a.choose(0.0, 0.1, 1.0),
            "weight": a.choose(None, a.uniform(self.C) + 0.1),
            "reduction": a.choose("sum", "mean", "none"),
        }
        self.z = a.normal(self.N, self.C) * 3
        self.x, self.W = a.normal(self.N, self.D), a.normal(self.C, self.D)
        self.b = a.choose(None, a.normal(self.C))
        if self.has_indices:
            self.target = a.indices((self.N,), self.C)
        else:
            self.target = a.uniform(self.N, self.C)
        self.block_bytes = a.choose(1, 4 * self.C * 64)

    def cross_entropy(self, z: Tensor, target: Tensor | None = None, **changes: Any) -> Tensor:
        target = self.target if target is None else target
        return ours.cross_entropy(z, target, **self.options | changes)

    def head(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor | None = None,
        target: Tensor | None = None,
        **changes: Any,
    ) -> Tensor:
        target = self.target if target is None else target
        return ours.linear_cross_entropy(x, W, target, linear_bias=b, **self.options | changes)

    def limit_blocks(self) -> Any:
        return limit_head_blocks(self.block_bytes)

    def cast_options(self, dtype: torch.dtype) -> None:
        """Casts the class weights and a target of probabilities."""
        if self.options["weight"] is not None:
            self.options["weight"] = self.options["weight"].to(dtype)
        if not self.has_indices:
            self.target = self.target.to(dtype)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.W] if self.b is None else [self.W, self.b]


def compute_gradients(f: Any, *xs: Tensor, create_graph: bool = False) -> Any:
    return torch.autograd.grad(f(*xs), xs, create_graph=create_graph, materialize_grads=True)


def make_leaves(*xs: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in xs]


def assert_close(what: str, found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Asserts equality relative to the largest expected number."""
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * size, msg=lambda m: f"{what}: {m}"
    )


@use_examples(60)
@given(data=st.data())
def test_constant_added_to_the_logits_of_a_row_changes_nothing(data: Any):
    rows = RandomRows(data)
    shift = rows.arguments.normal(rows.N, 1) * 100
    assert_close("loss", rows.cross_entropy(rows.z + shift), rows.cross_entropy(rows.z), 1e-12)
    upstream = rows.arguments.normal(rows.N)
    found, expected = (
        compute_gradients(lambda z: (rows.cross_entropy(z) * upstream).sum(), z)[0]
        for z in make_leaves(rows.z + shift, rows.z)
    )
    assert_close("gradient", found, expected, 1e-11)


@use_examples(60)
@given(data=st.data())
def test_gradient_of_logits_sums_to_zero_and_hessian_times_ones_is_zero(data: Any):
    """The loss is invariant along 1, so dc/dz · 1 = 0 and H 1 = 0."""
    rows = RandomRows(data)
    with rows.limit_blocks():
        upstream = rows.arguments.normal(rows.N)
        (z,) = make_leaves(rows.z)
        (dz,) = compute_gradients(
            lambda z: (rows.cross_entropy(z) * upstream).sum(), z, create_graph=True
        )
        assert_close("Σ dz", dz.detach().sum(1), torch.zeros(rows.N, dtype=F64), 1e-12)
        along_ones = rows.arguments.normal(rows.N, 1).expand_as(z)
        (Hv,) = torch.autograd.grad(dz, z, along_ones)
        assert_close("H 1", Hv, torch.zeros_like(Hv), 1e-11)
        x, W = make_leaves(rows.x, rows.W)
        b = torch.zeros(rows.C, dtype=F64, requires_grad=True)
        _, dW, db = compute_gradients(lambda *xs: (rows.head(*xs) * upstream).sum(), x, W, b)
        assert_close("dW summed over classes", dW.sum(0), torch.zeros_like(dW[0]), 1e-11)
        assert_close("db summed over classes", db.sum(), torch.zeros((), dtype=F64), 1e-11)


@use_examples(60)
@given(data=st.data())
def test_permuted_rows_give_permuted_losses_and_the_same_gradients(data: Any):
    rows = RandomRows(data)
    upstream, y, t = rows.arguments.normal(rows.N), rows.target, rows.z.flip(0)

    def compute(order: Tensor) -> Any:
        z, x, *Wb = make_leaves(rows.z, rows.x, *rows.parameters)
        losses = (
            rows.cross_entropy(z[order], y[order], reduction="none"),
            rows.head(x[order], *Wb, target=y[order], reduction="none"),
            ours.squared_error(z[order], t[order], reduction="none"),
            ours.sigmoid_squared_error(z[order], t[order], reduction="none"),
        )
        total = sum((c * upstream[order]).sum() for c in losses)
        return [c.detach() for c in losses], torch.autograd.grad(total, [z, x, *Wb])

    order = torch.randperm(rows.N, generator=rows.arguments.generator)
    with rows.limit_blocks():
        losses, gradients = compute(order)
        plain_losses, plain_gradients = compute(torch.arange(rows.N))
    for found, expected in zip(losses, plain_losses, strict=True):
        assert_close("losses", found, expected[order], 1e-12)
    for found, expected in zip(gradients, plain_gradients, strict=True):
        assert_close("gradients", found, expected, 1e-11)


@use_examples(60)
@given(data=st.data())
def test_head_matches_cross_entropy_of_linear_to_second_order(data: Any):
    rows = RandomRows(data)
    a, xs, target = rows.arguments, [rows.x, *rows.parameters], rows.target.clone()
    if a.choose(False, True) and rows.has_indices:
        target[a.uniform(rows.N) < 0.5] = -100
        target[-1] = 0
    upstream, directions = a.normal(rows.N), [a.normal(*x.shape) for x in xs]

    def compute(f: Any) -> list[Tensor]:
        leaves = make_leaves(*xs)
        value = f(*leaves)
        first = torch.autograd.grad((value * upstream).sum(), leaves, create_graph=True)
        along = sum((d * v).sum() for d, v in zip(first, directions, strict=True))
        second = torch.autograd.grad(along, leaves)
        return [v.detach() for v in (value, *first, *second)]

    with rows.limit_blocks():
        of_head = compute(lambda *xs: rows.head(*xs, target=target))
        of_logits = compute(lambda *xs: rows.cross_entropy(ours.linear(*xs), target))
    for found, expected in zip(of_head, of_logits, strict=True):
        assert_close("head", found, expected, 1e-10)


@pytest.mark.parametrize("name", ["cross_entropy", "head", "categorical_cross_entropy"])
@use_examples(40)
@given(data=st.data())
def test_base_divides_loss_and_gradient_by_its_logarithm(name: str, data: Any):
    rows = RandomRows(data)
    base = rows.arguments.draw(st.sampled_from((2, 10, 0.5, 1.5)) | st.floats(1.01, 1e6))

    def compute_categorical(z: Tensor, base: float) -> Tensor:
        reduction = rows.options["reduction"]
        return ours.categorical_cross_entropy(
            z.sigmoid(), rows.target, reduction=reduction, base=base
        )

    f, xs = {
        "cross_entropy": (rows.cross_entropy, [rows.z]),
        "head": (rows.head, [rows.x, *rows.parameters]),
        "categorical_cross_entropy": (compute_categorical, [rows.z]),
    }[name]
    xs = make_leaves(*xs)
    with rows.limit_blocks():
        loss, natural = f(*xs, base=base), f(*xs, base=math.e)
        upstream = rows.arguments.normal(*loss.shape)
        gradients, natural_gradients = (
            torch.autograd.grad(c, xs, upstream) for c in (loss, natural)
        )
    assert_close("value", loss.detach(), natural.detach() / math.log(base), 1e-12)
    for found, expected in zip(gradients, natural_gradients, strict=True):
        assert_close("gradient", found, expected / math.log(base), 1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "head"])
@use_examples(60)
@given(data=st.data())
def test_ignored_rows_of_any_value_change_no_derivative(name: str, data: Any):
    """Not one bit changes, and the gradients of ignored rows are exactly 0."""
    rows = RandomRows(data, min_rows=2)
    a = rows.arguments
    ignored = a.uniform(rows.N) < a.choose(0.2, 0.7)
    ignored[0], ignored[-1] = True, False
    y = a.indices((rows.N,), rows.C).masked_fill(ignored, -100)
    hostile = a.choose(math.nan, math.inf, -math.inf, 1e300)
    if name == "cross_entropy":
        f, points = rows.cross_entropy, [rows.z]
    else:
        f, points = rows.head, [rows.x, *rows.parameters]
    directions = [a.normal(*x.shape) for x in points]
    upstream = a.normal(rows.N)
    g = upstream if rows.options["reduction"] == "none" else upstream[0]

    def compute(fill: float | None) -> list[Tensor]:
        """Value, tangent, first and second derivatives; ignored rows are filled."""
        xs, vs = (
            [first if fill is None else torch.where(ignored[:, None], fill, first), *rest]
            for first, *rest in (points, directions)
        )
        xs = make_leaves(*xs)
        value = f(*xs, target=y)
        first = torch.autograd.grad(value, xs, g, create_graph=True)
        second = torch.autograd.grad(first, xs, vs)
        primals = tuple(x.detach() for x in xs)
        _, tangent = torch.func.jvp(lambda *xs: f(*xs, target=y), primals, tuple(vs))
        for derivative in (first[0], second[0]):
            assert (derivative[ignored] == 0).all()
        return [v.detach() for v in (value, tangent, *first, *second)]

    with rows.limit_blocks():
        for found, expected in zip(compute(hostile), compute(None), strict=True):
            assert expected.isfinite().all()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@use_examples(60)
@given(data=st.data())
def test_losses_of_parts_of_the_rows_add_up(data: Any):
    rows = RandomRows(data, min_rows=2)
    a, y = rows.arguments, rows.target
    cut = a.draw(st.integers(0, rows.N))
    t = a.normal(rows.N, rows.C)
    losses = {
        "cross_entropy": lambda z, x, W, s: rows.cross_entropy(z[s], y[s], reduction="sum"),
        "head": lambda z, x, W, s: rows.head(x[s], W, target=y[s], reduction="sum"),
        "squared_error": lambda z, x, W, s: ours.squared_error(z[s], t[s], reduction="sum"),
        "sigmoid_squared_error": lambda z, x, W, s: ours.sigmoid_squared_error(
            z[s], t[s], reduction="sum"
        ),
        "mse_loss": lambda z, x, W, s: ours.mse_loss(z[s], t[s], reduction="sum"),
        "categorical_cross_entropy": lambda z, x, W, s: ours.categorical_cross_entropy(
            z[s].sigmoid(), y[s], reduction="sum"
        ),
    }
    xs = make_leaves(rows.z, rows.x, rows.W)
    with rows.limit_blocks():
        for name, f in losses.items():
            whole = f(*xs, slice(None))
            total = f(*xs, slice(0, cut)) + f(*xs, slice(cut, None))
            assert_close(name, total.detach(), whole.detach(), 1e-12)
            gradients, whole_gradients = (
                torch.autograd.grad(c, xs, allow_unused=True, materialize_grads=True)
                for c in (total, whole)
            )
            for found, expected in zip(gradients, whole_gradients, strict=True):
                assert_close(f"gradient of {name}", found, expected, 1e-11)


@use_examples(30)
@given(data=st.data())
def test_number_of_blocks_changes_only_rounding(data: Any):
    """In half precision too: sums over rows are accumulated in float32."""
    rows = RandomRows(data, min_rows=65)
    a = rows.arguments
    dtype = a.choose(torch.bfloat16, torch.float16, torch.float32, F64)
    repeats = a.choose(1, 20)
    xs = [x.to(dtype) for x in (rows.x.repeat(repeats, 1), *rows.parameters)]
    rows.target = rows.target.repeat(repeats, *[1] * (rows.target.dim() - 1))
    rows.cast_options(dtype)
    directions = [a.normal(*x.shape).to(dtype) for x in xs]

    def compute(block_bytes: int) -> Any:
        with limit_head_blocks(block_bytes):
            leaves = make_leaves(*xs)
            value = rows.head(*leaves, reduction="mean")
            first = torch.autograd.grad(value, leaves, create_graph=True)
            second = torch.autograd.grad(first, leaves, directions)
            return [v.detach() for v in (value, *first, *second)]

    eps = torch.finfo(dtype).eps
    for found, expected in zip(compute(1), compute(2**40), strict=True):
        size = max(expected.abs().max().item(), 1.0)
        # each of the two terms is rounded once, after sums of up to 2000 terms in float32
        atol = 100 * min(eps, torch.finfo(torch.float32).eps) * size
        torch.testing.assert_close(found, expected, rtol=2 * eps, atol=atol)


@use_examples(30)
@given(data=st.data())
def test_head_normalises_half_precision_logits_in_float32(data: Any):
    """The losses are those of the rounded logits, computed in float32 and rounded once."""
    rows = RandomRows(data)
    dtype = rows.arguments.choose(torch.bfloat16, torch.float16)
    x, W, *b = (v.to(dtype) for v in (rows.x, *rows.parameters))
    rows.cast_options(dtype)
    with rows.limit_blocks():
        found = rows.head(x, W, *b, reduction="none")
    rows.cast_options(torch.float32)
    z = F.linear(x, W, *b)
    expected = rows.cross_entropy(z.float(), reduction="none")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected, rtol=eps, atol=eps / 50)
