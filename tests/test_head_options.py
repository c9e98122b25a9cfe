"""Scale, soft cap, z-loss, log-probabilities, entropy and stats against logits in memory.

`truth.py` in float64 is the truth. In float32 and bfloat16 a result may be as far from it as
`truth.py` at that precision, plus rounding (see `tolerance.py`). Hypothesis draws the combinations
of options; the numbers come from a seeded generator.
"""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import truth
from conftest import OperationRecorder, measure_peak_growth, needs_linux_maxrss
from entry_points import assert_derivatives_match
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import find_errors
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from torch_nnmath import functional as F
from torch_nnmath import nn
from torch_nnmath._records import HeadInputs, Requests, Target
from torch_nnmath.formulas import LinearCrossEntropy
from torch_nnmath.kernels import _block

F64 = torch.float64
D, C = 4, 7  # features, classes
IGNORE = -100


def weighted_log_sum_exp(x: Tensor, W: Tensor, p: Tensor, b: Any, keep: Any, base: float, cap: Any):
    """F14 of a target that has a weight p, but no class: p log_base Σ e^v."""
    p, keep = (None if v is None else v[:, None] for v in (p, keep))
    inputs = HeadInputs(x, W, b, Target(None, p, None), keep, base, cap)
    return LinearCrossEntropy.evaluate(*inputs.flatten(), Requests())[0].squeeze(1)


@pytest.fixture
def gather_or_mask_ignored_rows(request, monkeypatch):
    """Selects how the head leaves out ignored rows: gathers the others, or masks as on a GPU."""
    if request.param == "mask":
        monkeypatch.setattr(_block, "may_gather_rows", lambda keep: False)


class DrawnHead:
    """Options of the head, drawn by Hypothesis, and random tensors for them."""

    def __init__(
        self, data: Any, dtypes: Any = (F64, torch.float32, torch.bfloat16), z_loss: float = 0.01
    ):
        def draw(*choices: Any) -> Any:
            return data.draw(st.sampled_from(choices))

        self.dtype, self.rows, self.positions = (
            draw(*dtypes),
            draw(5, 1, 33, 70),
            draw((), (), (2,)),
        )
        self.has_bias, self.has_weight = draw(False, True), draw(False, True)
        self.has_row_weight = draw(False, True)
        self.target = draw("classes", "ignored", "probabilities")
        self.scale = draw(1.0, -0.7, 0.0, 20.0, 3, "tensor")
        self.options = {
            "reduction": draw("mean", "sum", "none"),
            "base": draw(math.e, 2.0, 0.5),
            "label_smoothing": draw(0.0, 0.2),
            "softcap": draw(None, 1.5, 30.0),
            "temperature": draw(1.0, 0.6, 3),
            "z_loss": draw(0.0, 0.3, z_loss),
        }
        if self.options["reduction"] == "mean":
            self.options["divisor"] = draw(None, None, 2.5, 40, "tensor")
        self.seed = data.draw(st.integers(0, 2**31))
        self.draw_tensors(self.seed)

    def draw_tensors(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=F64, generator=generator).to(self.dtype)

        N, positions = self.rows, self.positions
        self.tensors = {"x": normal(N, D), "W": normal(C, *positions, D)}
        if self.has_bias:
            self.tensors["b"] = normal(C, *positions)
        if self.has_weight:
            self.tensors["weight"] = normal(C).abs() + 0.1
        if self.target == "probabilities":
            self.tensors["target"] = normal(N, C, *positions).softmax(1)
        else:
            y = torch.randint(C, (N, *positions), generator=generator)
            self.tensors["target"] = y
            if self.target == "ignored":
                y[torch.rand(y.shape, generator=generator) < 0.4] = IGNORE
                y.view(-1)[0] = 0  # the mean over no row is nan
        if self.has_row_weight:  # a mean of signed weights cancels
            row_weight = normal(N, *positions)
            is_mean = self.options["reduction"] == "mean"
            self.tensors["row_weight"] = row_weight.abs() + 0.1 if is_mean else row_weight
        if self.scale == "tensor":
            self.tensors["logit_scale"] = normal()
        if self.options.get("divisor") == "tensor":
            self.tensors["divisor"] = normal().abs() + 1
        upstream = torch.randn(N, *positions, dtype=F64, generator=generator)
        self.upstream = upstream.bfloat16().double()  # exact at every precision

    @property
    def leaves(self) -> list[str]:
        """The tensors in which PyTorch too has a gradient that is no remainder."""
        excluded = ["weight"]
        if (
            self.options["reduction"] == "mean"
        ):  # of equal losses it does not depend on their weights
            excluded.append("row_weight")
        return [k for k, v in self.tensors.items() if v.is_floating_point() and k not in excluded]

    @property
    def cancellation(self) -> float:
        """A bound of the gradients' error where the probability a of the class is nearly 1.

        float32 rounds 1 - a, and scale and tensors multiply that.
        """
        scale = 1.0 if self.scale == "tensor" else abs(self.scale)
        scale /= min(self.options["temperature"], 1.0)
        floats = [v for v in self.tensors.values() if v.is_floating_point()]
        return 2.0**-22 * max(scale, 1.0) * max(v.abs().max().item() for v in floats)

    def collect_options(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        names = "weight", "row_weight", "divisor", "logit_scale"
        tensor_options = {k: v for k, v in tensors.items() if k in names}
        return {"logit_scale": self.scale, **self.options, **tensor_options}

    def compute_truth(self, tensors: dict[str, Tensor]) -> Tensor:
        x, W, target = (tensors[name] for name in ("x", "W", "target"))
        options = self.collect_options(tensors)
        return truth.linear_cross_entropy(x, W, target, tensors.get("b"), **options)

    def compute_head(self, tensors: dict[str, Tensor]) -> Any:
        x, W, target = (tensors[name] for name in ("x", "W", "target"))
        options = self.collect_options(tensors)
        return F.linear_cross_entropy(x, W, target, linear_bias=tensors.get("b"), **options)

    def compute_from_logits(self, tensors: dict[str, Tensor]) -> Any:
        z = truth.compute_logits(tensors["x"], tensors["W"], tensors.get("b"))
        return F.cross_entropy(z, tensors["target"], **self.collect_options(tensors))

    def differentiate(self, function: Any, change: Any = lambda x: x) -> list[Tensor]:
        """Returns the function's value and gradients at the changed tensors."""
        tensors = {
            k: change(v).detach().requires_grad_(k in self.leaves) if v.is_floating_point() else v
            for k, v in self.tensors.items()
        }
        value = function(tensors)
        upstream = self.upstream.view_as(value).to(value.dtype) if value.dim() else None
        gradients = torch.autograd.grad(value, [tensors[k] for k in self.leaves], upstream)
        return [value.detach(), *gradients]


def search_settings(examples: int) -> Any:
    return settings(deadline=None, derandomize=True, max_examples=examples)


def test_drawn_options_have_the_value_and_gradients_of_the_truth(small_blocks):
    """A fault counts only if it recurs with two other sets of random numbers.

    The tolerance is the plain expression's own error, which may be small by chance.
    """

    def find_faults(head: DrawnHead) -> list[str]:
        functions = {"head": head.compute_head, "logits": head.compute_from_logits}
        return find_errors(
            [f"{function}: {name}" for function in functions for name in ("value", *head.leaves)],
            [v for function in functions.values() for v in head.differentiate(function)],
            2 * head.differentiate(head.compute_truth),
            lambda change: 2 * head.differentiate(head.compute_truth, change),
        )

    @search_settings(400)
    @given(st.data())
    def search(data: Any) -> None:
        head = DrawnHead(data)
        for attempt in range(3):
            head.draw_tensors(head.seed + attempt)
            messages = find_faults(head)
            if not messages:
                return
        raise AssertionError("\n".join(messages))

    search()


def test_drawn_options_of_the_head_in_bfloat16_are_rounded_once(small_blocks):
    """A learnt scale has two gradients, through features and bias, and autograd adds them."""

    @search_settings(100)
    @given(st.data())
    def search(data: Any) -> None:
        head = DrawnHead(data, [torch.bfloat16])
        results = head.differentiate(head.compute_head)
        expected = head.differentiate(head.compute_truth, Tensor.double)
        names = "value", *head.leaves
        for name, result, exact in zip(names, results, expected, strict=True):
            if name != "logit_scale":
                half_eps, atol = 2.0**-8, head.cancellation
                atol += 1e-3 * exact.abs().max().item()
                torch.testing.assert_close(result.double(), exact, rtol=half_eps, atol=atol)

    search()


def test_drawn_options_of_logits_in_bfloat16_are_rounded_once(small_blocks):
    """Without scale and cap the z-loss has a gradient of its own, and autograd adds the two."""

    @search_settings(100)
    @given(st.data())
    def search(data: Any) -> None:
        head = DrawnHead(data, [torch.bfloat16])
        logits = truth.compute_logits(*(head.tensors.get(name) for name in ("x", "W", "b")))
        target, options = head.tensors["target"], head.collect_options(head.tensors)

        def differentiate(function: Any, change: Any = lambda v: v) -> list[Tensor]:
            z = change(logits).detach().requires_grad_()
            t = change(target) if target.is_floating_point() else target
            tensors = {k: change(v) for k, v in options.items() if isinstance(v, Tensor)}
            value = function(z, t, **{**options, **tensors})
            upstream = head.upstream.view_as(value).to(value.dtype) if value.dim() else None
            return [value.detach(), *torch.autograd.grad(value, z, upstream)]

        expected = differentiate(truth.cross_entropy, Tensor.double)
        rtol = 2.0**-8 * (2 if options["z_loss"] else 1)
        for result, exact in zip(differentiate(F.cross_entropy), expected, strict=True):
            atol = rtol / 4 * exact.abs().max().item() + head.cancellation
            torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=atol)

    search()


def test_drawn_options_have_the_second_order_and_tangent_of_the_truth(small_blocks):
    """Also in class weights and row weights."""

    @search_settings(100)
    @given(st.data())
    def search(data: Any) -> None:
        head = DrawnHead(data, [F64], z_loss=-0.1)
        names = [name for name, v in head.tensors.items() if v.is_floating_point()]
        points = tuple(head.tensors[name] for name in names)
        directions = tuple(v.sin() + 0.3 for v in points)

        def compute_derivatives(function: Any) -> list[Tensor]:
            def compute_scalar(*values: Tensor) -> Tensor:
                value = function(head.tensors | dict(zip(names, values, strict=True)))
                return (value * head.upstream.view_as(value)).sum() if value.dim() else value

            leaves = [v.clone().requires_grad_() for v in points]
            first = torch.autograd.grad(compute_scalar(*leaves), leaves, create_graph=True)
            dot = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
            second = torch.autograd.grad(dot, leaves)
            tangent = jvp(compute_scalar, points, directions)[1]
            return [tangent.detach(), *(g.detach() for g in first), *second]

        expected = compute_derivatives(head.compute_truth)
        for function in (head.compute_head, head.compute_from_logits):
            torch.testing.assert_close(
                compute_derivatives(function), expected, rtol=1e-9, atol=1e-9
            )

    search()


# Factors of log-probabilities and entropy in a sum that is differentiated
SUMS = {"log_probs": (1, 0), "entropy": (0, 1), "both": (1, 1)}


def make_head(rows: int = 70, dtype: torch.dtype = F64) -> tuple[list[Tensor], Tensor, Tensor]:
    """[x, W, b], class indices, and two cotangents for each row."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, D), (C, D), (C,)
    points = [torch.randn(shape, dtype=F64, generator=generator).to(dtype) for shape in shapes]
    y = torch.randint(C, (rows,), generator=generator)
    return points, y, torch.randn(2, rows, dtype=F64, generator=generator)


def weighted_sum(cotangents: Tensor, values: Any) -> Any:
    """Leaves out values whose cotangent is 0, which are then not differentiated."""
    pairs = zip(cotangents, values, strict=True)
    return sum((u.to(v.dtype) * v).sum() for u, v in pairs if u.any())


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "base"), [(1.0, math.e), (-3.0, 2.0)])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("sums", SUMS)
def test_log_probs_and_entropy_equal_the_truth(small_blocks, sums, cap, scale, base, dtype):
    points, y, cotangents = make_head(dtype=dtype)
    cotangents = cotangents * torch.tensor(SUMS[sums])[:, None]
    options = {"base": base, "logit_scale": scale, "softcap": cap, "temperature": 0.8}

    def compute(x, W, b):
        return F.linear_log_probs(
            x, W, y, linear_bias=b, return_entropy=True, output_dtype=dtype, **options
        )

    def compute_truth(x, W, b):
        return truth.linear_log_probs(x, W, y, b, **options)

    def differentiate(function, change=lambda x: x):
        leaves = [change(v).detach().requires_grad_() for v in points]
        values = function(*leaves)
        gradients = torch.autograd.grad(weighted_sum(cotangents, values), leaves)
        return [*(v.detach() for v in values), *gradients]

    messages = find_errors(
        ["log_probs", "entropy", "x", "W", "b"],
        differentiate(compute),
        differentiate(compute_truth),
        lambda change: differentiate(compute_truth, change),
    )
    assert not messages, "\n".join(messages)


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": -0.7, "softcap": 1.5, "temperature": 0.6}, {"logit_scale": "tensor"}],
)
@pytest.mark.parametrize("shapes", [((40, D), (C, D)), ((D,), (C, D)), ((6, D), (C, 2, D))])
def test_log_sum_exp_has_the_derivatives_of_the_truth(small_blocks, shapes, options):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, dtype=F64, generator=generator) for shape in shapes]
    leaves.append(torch.randn(shapes[1][:-1], dtype=F64, generator=generator))
    learns_scale = options.get("logit_scale") == "tensor"
    if learns_scale:
        leaves.append(torch.tensor(0.7, dtype=F64))

    def compute(x, W, b, *scale):
        o = options | ({"logit_scale": scale[0]} if learns_scale else {})
        return F.linear_log_sum_exp(x, W, linear_bias=b, **o)

    def compute_truth(x, W, b, *scale):
        o = options | ({"logit_scale": scale[0]} if learns_scale else {})
        return truth.log_sum_exp(
            truth.scale_and_cap(truth.compute_logits(x, W, b), **o), x.dim() - 1
        )

    assert_derivatives_match(compute, compute_truth, leaves)


HALF_CALLS = {
    "head": lambda x, W, y, **o: F.linear_cross_entropy(x, W, y, **o),
    "cross entropy": lambda x, W, y, **o: F.cross_entropy(x @ W.mT, y, **o),
    "head module": lambda x, W, y, **o: functional_call(
        nn.LinearCrossEntropyLoss(D, C, **o), {"linear.weight": W}, (x, y)
    ),
    "module": lambda x, W, y, **o: nn.CrossEntropyLoss(**o)(x @ W.mT, y),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("call", HALF_CALLS)
def test_loss_of_half_inputs_in_float32_is_not_rounded(call, reduction, dtype):
    """A sum of 70000 exceeds the range of float16."""
    x, W, y = make_half_head(dtype)
    z = (x @ W.mT).double() if "head" not in call else x.double() @ W.double().mT
    expected = truth.cross_entropy(z, y, reduction=reduction)
    leaves = x.requires_grad_(), W.requires_grad_()
    loss = HALF_CALLS[call](*leaves, y, reduction=reduction, output_dtype=torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert HALF_CALLS[call](*leaves, y, reduction=reduction).dtype == dtype
    gradients = torch.autograd.grad(loss.sum(), leaves)
    wide = [v.detach().double().requires_grad_() for v in leaves]
    exact = torch.autograd.grad(
        truth.linear_cross_entropy(*wide, y, reduction=reduction).sum(), wide
    )
    for v, expected in zip(gradients, exact, strict=True):
        assert v.dtype == dtype
        assert (v.double() - expected).norm() < 0.01 * expected.norm()


def make_half_head(dtype):
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, D, generator=generator).to(dtype) for n in (8192, C))
    return 4 * x, W, torch.randint(C, (8192,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probs_of_half_inputs_are_float32_unless_told_otherwise(dtype):
    x, W, y = make_half_head(dtype)
    expected = (
        *truth.linear_log_probs(x.double(), W.double(), y),
        truth.log_sum_exp(x.double() @ W.double().mT, 1),
    )
    for output_dtype in (None, dtype, F64):
        options = {"output_dtype": output_dtype}
        values = F.linear_log_probs(x, W, y, return_entropy=True, **options)
        values = *values, F.linear_log_sum_exp(x, W, **options)
        for v, exact in zip(values, expected, strict=True):
            assert v.dtype == (output_dtype or torch.float32)
            tolerance = torch.finfo(dtype).eps if output_dtype == dtype else 1e-5
            torch.testing.assert_close(v.double(), exact, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("function", [F.linear_cross_entropy, F.cross_entropy])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_class_weights_with_half_inputs_are_not_rounded(function, dtype):
    x, W, y = make_half_head(dtype)
    w = torch.linspace(0.1, 1.7, C)
    z = x.double() @ W.double().mT if function is F.linear_cross_entropy else (x @ W.mT).double()
    arguments = (x, W) if function is F.linear_cross_entropy else (x @ W.mT,)
    for reduction in ("mean", "none"):
        loss = function(*arguments, y, weight=w, reduction=reduction, output_dtype=torch.float32)
        expected = truth.cross_entropy(z, y, w.double(), reduction=reduction)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("sums", SUMS)
def test_log_probs_and_entropy_have_the_third_order_of_the_truth(small_blocks, sums, cap):
    points, y, cotangents = make_head()
    cotangents = cotangents * torch.tensor(SUMS[sums])[:, None]

    def compute(x, W, b):
        return F.linear_log_probs(x, W, y, linear_bias=b, softcap=cap, return_entropy=True)

    def compute_truth(x, W, b):
        return truth.linear_log_probs(x, W, y, b, softcap=cap)

    def differentiate(function):
        leaves = [v.clone().requires_grad_() for v in points]
        value, results = weighted_sum(cotangents, function(*leaves)), []
        for _ in range(3):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            results += [g.detach() for g in gradients]
            value = sum(
                (g * v.detach().cos()).sum() for g, v in zip(gradients, leaves, strict=True)
            )
        return results

    results, expected = differentiate(compute), differentiate(compute_truth)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


def test_log_probs_and_entropy_of_ignored_rows_are_0_and_ignore_nan(small_blocks):
    (x, W, _), y, _ = make_head(rows=40)
    y[::3] = IGNORE
    x_with_nan = x.clone()
    x_with_nan[::3] = math.nan
    W = W.requires_grad_()
    results = []
    for features in (x, x_with_nan):
        features = features.clone().requires_grad_()
        s = torch.tensor(0.7, dtype=F64, requires_grad=True)
        values = F.linear_log_probs(features, W, y, logit_scale=s, softcap=2.0, return_entropy=True)
        for v in values:
            assert (v[::3] == 0).all()
            assert (v[1::3] != 0).all()
        gradients = torch.autograd.grad(sum(v.sin().sum() for v in values), (features, W, s))
        assert (gradients[0][::3] == 0).all()
        results.append(gradients)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [F.linear_cross_entropy, F.cross_entropy])
def test_options_ignore_nan_and_inf_in_ignored_rows(function):
    """Value, stats and two orders; a learnt scale and the z-loss too."""
    (x, W, _), _, _ = make_head(rows=6)
    y = torch.tensor([0, IGNORE, 2, 3, IGNORE, 1])
    ignored = y == IGNORE
    results = []
    for filler in (0.0, math.nan, math.inf):
        rows = x if function is F.linear_cross_entropy else x @ W.T
        rows = rows.masked_fill(ignored[:, None], filler).requires_grad_()
        s = torch.tensor(0.7, dtype=F64).requires_grad_()
        arguments = (rows, W, y) if function is F.linear_cross_entropy else (rows, y)
        options = {"logit_scale": s, "softcap": 2.0, "z_loss": 0.3, "return_stats": True}
        loss, stats = function(*arguments, **options)
        gradients = torch.autograd.grad(loss, (rows, s), create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in gradients), (rows, s))
        results.append([loss, *gradients, *second, *stats])
        for v in (gradients[0], second[0], *stats):
            assert (v[ignored] == (-1 if v is stats.predicted else 0)).all()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("gather_or_mask_ignored_rows", ["gather", "mask"], indirect=True)
def test_stats_equal_the_truth_and_do_not_change_the_loss(
    small_blocks, gather_or_mask_ignored_rows, positions, requires_grad, reduction, target
):
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(s, dtype=F64, generator=generator) for s in ((70, D), (C, *positions, D)))
    t = torch.randint(C, (70, *positions), generator=generator)
    if target == "probabilities":
        t = torch.rand(70, C, *positions, dtype=F64, generator=generator)
    else:
        t[::7] = IGNORE
    x, W = x.requires_grad_(requires_grad), W.requires_grad_(requires_grad)
    options = {"reduction": reduction, "base": 2.0, "softcap": 2.0, "z_loss": 0.3}
    loss, stats = F.linear_cross_entropy(x, W, t, **options, return_stats=True)
    z = truth.compute_logits(x, W)
    loss_from_logits, stats_from_logits = F.cross_entropy(z, t, **options, return_stats=True)
    torch.testing.assert_close(loss, F.linear_cross_entropy(x, W, t, **options))
    torch.testing.assert_close(loss, loss_from_logits)
    v = truth.scale_and_cap(z.detach(), softcap=2.0)
    keep = t != IGNORE if target == "classes" else torch.ones(70, *positions, dtype=torch.bool)
    l = v.log_softmax(1) / math.log(2)
    label = t if target == "classes" else t.argmax(1)
    expected = {
        "lse": v.logsumexp(1) * keep,
        "entropy": -(v.softmax(1) * l).sum(1) * keep,
        "predicted": torch.where(keep, v.argmax(1), -1),
        "correct": (v.argmax(1) == label) & keep,
        "z_loss": 0.3 * v.logsumexp(1).square() * keep,
    }
    assert stats._fields == tuple(expected)
    assert 0 < expected["correct"].sum() < keep.sum()
    for result in (stats, stats_from_logits):
        assert not any(v.requires_grad for v in result)
        torch.testing.assert_close(result._asdict(), expected)


@pytest.mark.parametrize(
    ("reduction", "gradient_shapes"), [("mean", [(6, D), (C, D)]), ("none", [])]
)
def test_stats_need_one_call_of_the_kernel(reduction, gradient_shapes):
    """The call for a mean also computes the gradients; that for unreduced losses does not."""
    x, W = torch.randn(6, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    y = torch.randint(C, (6,))
    options = {"z_loss": 0.3, "softcap": 2.0, "return_stats": True, "reduction": reduction}
    with OperationRecorder() as recorder:
        loss, _ = F.linear_cross_entropy(x, W, y, **options)
        if reduction == "mean":
            loss.backward()
    (head,) = [operation for operation in recorder.operations if operation.name == "head"]
    assert [shape for shape in head.shapes if shape in [(6, D), (C, D)]] == gradient_shapes


@pytest.mark.parametrize("base", [math.e, 10.0])
def test_z_loss_of_a_mean_divides_by_the_kept_rows_not_class_weights(base):
    z = torch.randn(5, C, dtype=F64)
    y, w = torch.tensor([0, IGNORE, 2, 1, IGNORE]), torch.linspace(1, 9, C, dtype=F64)
    difference = F.cross_entropy(z, y, w, base=base, z_loss=0.5) - F.cross_entropy(
        z, y, w, base=base
    )
    expected = 0.5 * z.logsumexp(1)[[0, 2, 3]].square().mean()
    torch.testing.assert_close(difference, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_ignored_rows_alone_is_nan_or_0_with_gradient_0(reduction):
    x = torch.randn(4, D, requires_grad=True)
    W = torch.randn(C, D, requires_grad=True)
    y = torch.full((4,), IGNORE)
    options = {"reduction": reduction, "z_loss": 0.3, "softcap": 2.0}
    loss = F.linear_cross_entropy(x, W, y, **options)
    assert loss.isnan() if reduction == "mean" else loss == 0
    for g in torch.autograd.grad(loss, (x, W)):
        assert (g == 0).all()
    torch.testing.assert_close(F.cross_entropy(x @ W.T, y, **options), loss, equal_nan=True)


@pytest.mark.parametrize("options", [{"z_loss": 0.3}, {"softcap": 2.0}, {"logit_scale": 2.0}])
def test_options_accept_an_empty_batch(options):
    x, W = torch.zeros(0, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    y = torch.zeros(0, dtype=torch.int64)
    loss, stats = F.linear_cross_entropy(x, W, y, reduction="sum", return_stats=True, **options)
    assert loss == 0
    assert all(v.shape == (0,) for v in stats)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, W)))
    assert F.linear_log_probs(x, W, y).shape == (0,)


def test_classes_with_logit_minus_infinity_do_not_change_log_probs_and_entropy():
    """A bias of -inf masks classes, as if the weight did not have their rows."""
    (x, W, _), _, _ = make_head(rows=5)
    b = torch.zeros(C, dtype=F64)
    b[2:4] = -math.inf
    unmasked = [0, 1, 4, 5, 6]
    results = []
    for W_, b_, y in ((W, b, torch.tensor(unmasked)), (W[unmasked], None, torch.arange(5))):
        leaves = [x.clone().requires_grad_(), W_.clone().requires_grad_()]
        values = F.linear_log_probs(*leaves, y, linear_bias=b_, return_entropy=True)
        first = torch.autograd.grad(sum(v.sin().sum() for v in values), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        results.append([*values, *first, *second])
    for result, expected in zip(*results, strict=True):
        if result.shape == W.shape:
            assert (result[2:4] == 0).all()
            result = result[unmasked]
        torch.testing.assert_close(result, expected)


def test_entropy_of_nearly_certain_rows_keeps_its_digits():
    """Near 0 it is a sum of small terms, not the difference of large ones."""
    x = torch.tensor([[40.0, 5.0, 0.0], [200.0, 190.0, 0.0]])
    _, h = F.linear_log_probs(x, torch.eye(3), torch.tensor([0, 0]), return_entropy=True)
    l = x.double().log_softmax(1)
    torch.testing.assert_close(h.double(), -(l.exp() * l).sum(1), rtol=1e-4, atol=6e-8)


def test_tied_weight_gets_the_gradients_of_embedding_and_head():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(C, D, dtype=F64)
    head = nn.LinearCrossEntropyLoss(D, C, dtype=F64, softcap=2.0, z_loss=0.1)
    head.linear.weight = embedding.weight
    assert len({*embedding.parameters(), *head.parameters()}) == 1
    reference = torch.nn.Embedding(C, D, dtype=F64)
    reference.load_state_dict(embedding.state_dict())
    words = torch.randint(C, (20,))
    optimizers = [torch.optim.Adam(e.parameters(), 0.1) for e in (embedding, reference)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = head(embedding(words[:-1]).tanh(), words[1:])
        features = reference(words[:-1]).tanh()
        expected = truth.linear_cross_entropy(
            features, reference.weight, words[1:], softcap=2.0, z_loss=0.1
        )
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(embedding.weight.grad, reference.weight.grad)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(embedding.weight, reference.weight)


@pytest.mark.parametrize(
    "make_module", [lambda **o: nn.LinearCrossEntropyLoss(D, C, **o), nn.CrossEntropyLoss]
)
def test_modules_apply_show_and_learn_their_options(make_module):
    learnt = torch.nn.Parameter(torch.tensor(0.7))
    fixed = {"softcap": 2.0, "temperature": 0.8, "z_loss": 0.1}
    module = make_module(logit_scale=learnt, return_stats=True, output_dtype=F64, **fixed)
    assert dict(module.named_parameters())["logit_scale"] is learnt
    assert "softcap=2.0" in repr(module)
    assert "temperature=0.8, z_loss=0.1" in repr(module)
    assert "output_dtype=torch.float64" in repr(module)
    assert "logit_scale=Parameter" in repr(module)
    x = torch.randn(5, D if isinstance(module, nn.LinearCrossEntropyLoss) else C)
    y = torch.randint(C, (5,))
    loss, stats = module(x, y)
    loss.backward()
    weight = module.linear.weight if hasattr(module, "linear") else torch.eye(C)
    options = {"logit_scale": 0.7, **fixed}
    expected = F.linear_cross_entropy(x, weight, y, return_stats=True, output_dtype=F64, **options)
    torch.testing.assert_close((loss, tuple(stats)), (expected[0], tuple(expected[1])))
    s = torch.tensor(0.7, dtype=F64, requires_grad=True)
    options["logit_scale"] = s
    true_loss = truth.linear_cross_entropy(x.double(), weight.detach().double(), y, **options)
    (ds,) = torch.autograd.grad(true_loss, s)
    torch.testing.assert_close(learnt.grad.double(), ds, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make_module", [lambda **o: nn.LinearCrossEntropyLoss(D, C, **o), nn.CrossEntropyLoss]
)
def test_modules_keep_a_fixed_scale_as_buffer_and_hide_the_default(make_module):
    fixed = make_module(logit_scale=torch.tensor(2.0))
    assert [*dict(fixed.named_buffers())][-1] == "logit_scale"
    assert fixed.double().logit_scale.dtype == F64
    default = make_module()
    tensors = itertools.chain(default.named_parameters(), default.named_buffers())
    assert "logit_scale" not in dict(tensors)
    assert "scale" not in repr(default)


def test_per_sample_gradients_with_every_option_equal_the_truth():
    x, W, y = torch.randn(3, D, dtype=F64), torch.randn(C, D, dtype=F64), torch.tensor([0, 2, 6])
    s = torch.tensor(1.3, dtype=F64)
    options = {"softcap": 2.0, "z_loss": 0.2}

    def compute(s, W, x, y):
        return F.linear_cross_entropy(x[None], W, y[None], logit_scale=s, **options)

    def compute_truth(s, W, x, y):
        return truth.linear_cross_entropy(x[None], W, y[None], logit_scale=s, **options)

    results, expected = (
        vmap(grad(f, (0, 1)), (None, None, 0, 0))(s, W, x, y) for f in (compute, compute_truth)
    )
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_stats_and_entropy_equal_eager_ones(reduction):
    x, W = torch.randn(6, D, dtype=F64), torch.randn(C, D, dtype=F64)
    y = torch.tensor([0, 1, IGNORE, 3, 4, 5])

    def compute(x, W, s):
        options = {"logit_scale": s, "softcap": 2.0, "z_loss": 0.1, "return_stats": True}
        loss, stats = F.linear_cross_entropy(x, W, y, reduction=reduction, **options)
        log_probs, h = F.linear_log_probs(x, W, y, return_entropy=True)
        return loss.sum() + (log_probs * h).sum(), *stats

    results = []
    for function in (compute, torch.compile(compute, backend="aot_eager", fullgraph=True)):
        leaves = [v.clone().requires_grad_() for v in (x, W, torch.tensor(0.7, dtype=F64))]
        value, *stats = function(*leaves)
        results.append([value, *stats, *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(results[1], results[0])


MEMORY_SETUP = """
import torch
from torch_nnmath import functional as F
rows, classes = int(sys.argv[1]), int(sys.argv[2])
x, W = (torch.randn(n, 16, requires_grad=True) for n in (rows, classes))
y, s = torch.randint(classes, (rows,)), torch.tensor(0.7, requires_grad=True)
"""
MEMORY_BODY = """
if sys.argv[3] == "loss":
    options = {"logit_scale": s, "softcap": 20.0, "z_loss": 0.1}
    loss, _ = F.linear_cross_entropy(x, W, y, return_stats=True, **options)
else:
    values = F.linear_log_probs(x, W, y, logit_scale=s, softcap=20.0, return_entropy=True)
    loss = sum(v.mean() for v in values)
gradients = torch.autograd.grad(loss, (x, W, s), create_graph=True)
torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, W, s))
"""


@needs_linux_maxrss
@pytest.mark.parametrize("value", ["loss", "log_probs"])
def test_second_order_keeps_no_logits_in_memory(value):
    """The logits would take 125 MiB; a block of them takes 8."""
    growth = measure_peak_growth(MEMORY_SETUP, MEMORY_BODY, 4096, 8000, value)
    assert growth < 100


PAGE = (Path(__file__).parents[1] / "docs" / "head.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGE, re.S | re.M)
EXAMPLES = [(code, output) for code, output in BLOCKS if output]


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_page_examples_print_the_output_shown(code, output, capsys):
    exec(code, {})
    assert capsys.readouterr().out == output
    assert "within a millionth: True" in output


def test_first_example_of_the_page_equals_the_truth():
    names: dict = {}
    exec(BLOCKS[0][0], names)
    features, weight, target = (names[name] for name in ("features", "weight", "target"))
    options = {"logit_scale": 1 / 0.7, "softcap": 30.0, "z_loss": 1e-4}
    expected = truth.linear_cross_entropy(features, weight, target, **options)
    torch.testing.assert_close(names["loss"], expected)
    assert names["log_probs"].shape == names["entropy"].shape == (6,)


def test_page_has_a_policy_gradient_and_a_distillation():
    assert ["linear_log_probs" in code for code, _ in EXAMPLES] == [True, False]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("keep", [None, [True, False, True, True]])
@pytest.mark.parametrize("scale", [1, 300])  # e^v overflows at 300 without the row's maximum
def test_weighted_log_sum_exp_has_the_third_order_of_the_truth(cap, has_bias, keep, scale):
    keep = None if keep is None else torch.tensor(keep)
    generator = torch.Generator().manual_seed(0)

    def make_leaf(*shape, factor=1.0):
        return (factor * torch.randn(shape, generator=generator, dtype=F64)).requires_grad_()

    x, W, p, b = make_leaf(4, D, factor=scale), make_leaf(C, D), make_leaf(4), make_leaf(C)
    inputs = (x, W, p, b) if has_bias else (x, W, p)

    def compute(x, W, p, b=None):
        return weighted_log_sum_exp(x, W, p, b, keep, 2, cap)

    def compute_truth(x, W, p, b=None):
        v = truth.scale_and_cap(truth.compute_logits(x, W, b), softcap=cap)
        c = p * truth.log_sum_exp(v, 1) / math.log(2)
        return c if keep is None else torch.where(keep, c, 0)

    def differentiate_three_times(function):
        random = torch.Generator().manual_seed(1)
        value, results = function(*inputs).square(), []
        for _ in range(3):
            upstream = torch.randn(value.shape, generator=random, dtype=F64)
            gradients = torch.autograd.grad(value, inputs, upstream, create_graph=True)
            value = sum(g.square().sum() for g in gradients)
            results += [*gradients, value]
        return results

    def push_forward(function):
        directions = tuple(torch.ones_like(v).cumsum(0) for v in inputs)
        gradient = grad(lambda *v: function(*v).square().sum(), tuple(range(len(inputs))))
        return [jvp(function, inputs, directions)[1], *jvp(gradient, inputs, directions)[1]]

    for derive in (differentiate_three_times, push_forward):
        for result, expected in zip(derive(compute), derive(compute_truth), strict=True):
            atol = 1e-8 * (1 + expected.abs().max().item())
            torch.testing.assert_close(result, expected, rtol=1e-8, atol=atol)


def test_compiled_gradient_of_weighted_log_sum_exp_equals_softmax():
    x, W, p = torch.randn(5, D), torch.randn(C, D), torch.rand(5)

    def compute(x, W):
        return weighted_log_sum_exp(x, W, p, None, None, math.e, None)

    compiled = torch.compile(lambda x, W: grad(lambda x: compute(x, W).sum())(x), fullgraph=True)
    torch.testing.assert_close(compiled(x, W), p[:, None] * (x @ W.T).softmax(1) @ W)


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7, "softcap": 3.0, "z_loss": 0.01}])
def test_head_compiled_with_symbolic_numbers_equals_eager(options):
    arguments = torch.randn(5, D), torch.randn(C, D), torch.randint(C, (5,))
    compiled = torch.compile(F.linear_cross_entropy, backend="eager", fullgraph=True, dynamic=True)
    loss, expected = (f(*arguments, **options) for f in (compiled, F.linear_cross_entropy))
    torch.testing.assert_close(loss, expected)
