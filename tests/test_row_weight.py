"""Weights of rows: what they multiply, and what they cost.

`test_random_calls.py` and `test_head_options.py` combine them with every option and order.
"""

import math

import pytest
import torch
import truth
from conftest import measure_peak_growth, needs_linux_maxrss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torch_nnmath import functional as F
from torch_nnmath import nn

F64 = torch.float64
N, D, C = 70, 4, 7
IGNORED = torch.arange(N) % 4 == 1


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def draw_classes(rows: int = N) -> Tensor:
    return torch.randint(C, (rows,), generator=torch.Generator().manual_seed(3))


def compute_on_logits(x: Tensor, W: Tensor, y: Tensor, **options) -> Tensor:
    return F.cross_entropy(x @ W.T, y, **options)


LOSSES = {"head": F.linear_cross_entropy, "logits": compute_on_logits}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@every_loss
@every_reduction
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_of_ignored_rows_do_not_matter(small_blocks, loss, reduction, value):
    """Also at second order; features and weights of these rows get exactly 0."""
    y = draw_classes().masked_fill(IGNORED, -100)

    def differentiate(weight: Tensor) -> list[Tensor]:
        leaves = [normal(N, D).requires_grad_(), normal(C, D, seed=1).requires_grad_()]
        leaves.append(weight.requires_grad_())
        x, W, r = leaves
        total = loss(x, W, y, row_weight=r, reduction=reduction, z_loss=0.1).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [total.detach(), *(g.detach() for g in first), *second]

    r = normal(N, seed=2).abs()
    results = differentiate(r.masked_fill(IGNORED, value))
    for result, expected in zip(results, differentiate(r.masked_fill(IGNORED, 0.5)), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        if result.shape[:1] == (N,):
            assert not result[IGNORED].count_nonzero()


@every_loss
def test_mean_of_ignored_rows_alone_is_nan_and_gives_them_no_gradient(loss):
    x, W = normal(N, D).requires_grad_(), normal(C, D, seed=1)
    r = torch.full((N,), math.inf, dtype=F64).requires_grad_()
    value = loss(x, W, torch.full((N,), -100), row_weight=r)
    assert value.isnan()
    for gradient in torch.autograd.grad(value, (x, r)):
        assert not gradient.count_nonzero()


@every_loss
@pytest.mark.parametrize("class_weight", [None, torch.linspace(0.3, 2, C, dtype=F64)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.3}])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_integer_weights_are_repeated_rows(small_blocks, loss, reduction, options, class_weight):
    x, W, y = normal(N, D), normal(C, D, seed=1), draw_classes().masked_fill(IGNORED, -100)
    times = torch.arange(N) % 3
    options = {"reduction": reduction, "weight": class_weight, **options}
    repeated = loss(x.repeat_interleave(times, 0), W, y.repeat_interleave(times), **options)
    torch.testing.assert_close(loss(x, W, y, row_weight=times, **options), repeated)
    torch.testing.assert_close(
        loss(x, W, y, row_weight=times > 0, **options),
        loss(x, W, y.masked_fill(times == 0, -100), **options),
    )


@pytest.mark.parametrize("is_head", [False, True])
@every_reduction
def test_weight_0_of_an_infinite_loss_is_0(reduction, is_head):
    """The logit of the first row's class is -inf."""
    x, W, b = torch.ones(2, 1, dtype=F64), torch.ones(2, 1, dtype=F64), torch.zeros(2).double()
    b[1] = -math.inf
    y, r = torch.tensor([1, 0]), torch.tensor([0.0, 2.0], dtype=F64)
    leaves = [v.requires_grad_() for v in (x, W)]
    if is_head:
        value = F.linear_cross_entropy(
            x, W, y, linear_bias=b, row_weight=r, reduction=reduction
        ).sum()
    else:
        value = F.cross_entropy(x @ W.T + b, y, row_weight=r, reduction=reduction).sum()
    assert value == 0
    for gradient in torch.autograd.grad(value, leaves):
        assert not gradient.count_nonzero()


@every_loss
@every_reduction
def test_signed_weights_have_the_value_and_gradients_of_the_truth(small_blocks, loss, reduction):
    """A mean divides by the sum of the weights, also where these have both signs."""
    y = draw_classes()

    def differentiate(function) -> list[Tensor]:
        x, W, r = normal(N, D), normal(C, D, seed=1), normal(N, seed=2)
        leaves = [v.requires_grad_() for v in (x, W, r)]
        options = {"reduction": reduction, "z_loss": 0.3, "label_smoothing": 0.1}
        value = function(x, W, y, row_weight=r, **options)
        return [value.detach(), *torch.autograd.grad(value, leaves, torch.ones_like(value))]

    expected = differentiate(lambda *args, **o: truth.linear_cross_entropy(*args, None, **o))
    torch.testing.assert_close(differentiate(loss), expected)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_1_change_no_bit(small_blocks, dtype, reduction):
    """So gradients of a half type are rounded after the multiplication by dC, as without weights:
    divided by 1000 rows or more, those of float16 would underflow."""
    rows = 2000
    y = draw_classes(rows).masked_fill(torch.arange(rows) % 4 == 1, -100)
    results = []
    for weight in (None, torch.ones(rows)):
        x, W, b = (normal(*s, dtype=dtype).requires_grad_() for s in ((rows, D), (C, D), (C,)))
        r = weight if weight is None else weight.to(torch.promote_types(dtype, torch.float32))
        loss = F.linear_cross_entropy(
            x,
            W,
            y,
            linear_bias=b,
            row_weight=r,
            reduction=reduction,
            label_smoothing=0.1,
            z_loss=0.01,
            output_dtype=torch.float32,
        )
        results.append([loss, *torch.autograd.grad(loss * 2.0**12, (x, W, b))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_loss
@every_reduction
def test_float32_weights_of_half_features_are_not_rounded(small_blocks, loss, reduction, dtype):
    x, W, y = normal(N, D, dtype=dtype), normal(C, D, seed=1, dtype=dtype), draw_classes()
    r = 1000 + torch.arange(N) / 64.0
    if loss is compute_on_logits:  # logits that are exact in a half type
        x, W = x.round(), W.round()

    def compute(cast) -> list[Tensor]:
        weight = cast(r).requires_grad_()
        options = {"output_dtype": torch.float32 if weight.dtype == torch.float32 else None}
        value = loss(cast(x), cast(W), y, row_weight=weight, reduction=reduction, **options)
        return [value.detach(), *torch.autograd.grad(value.sum(), weight)]

    results = compute(lambda v: v if v.dtype == dtype else v.clone())
    for result, exact in zip(results, compute(Tensor.double), strict=True):
        assert result.dtype == torch.float32
        atol = 4e-6 * exact.abs().max().item()
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=atol)


@every_loss
def test_autocast_rounds_features_but_no_weights(loss):
    x, W, y = normal(N, D).float(), normal(C, D, seed=1).float(), draw_classes()
    r = (1000 + torch.arange(N) / 64.0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, W, y, row_weight=r, reduction="sum")
    (dr,) = torch.autograd.grad(value, r)
    with torch.autocast("cpu", torch.bfloat16):
        rows = loss(x, W, y, reduction="none")
    assert value.dtype == rows.dtype == torch.float32
    torch.testing.assert_close(dr, rows)
    torch.testing.assert_close(value, (r * rows).sum().detach())


def test_log_probs_are_multiplied_and_entropies_are_not(small_blocks):
    x, W, y = normal(N, D), normal(C, D, seed=1), draw_classes().masked_fill(IGNORED, -100)
    r = normal(N, seed=2)
    options = {"softcap": 3.0, "return_entropy": True}
    plain, entropy = F.linear_log_probs(x, W, y, **options)
    log_probs, same_entropy = F.linear_log_probs(
        x, W, y, row_weight=r.masked_fill(IGNORED, math.nan), **options
    )
    torch.testing.assert_close(log_probs, r * plain)
    torch.testing.assert_close(entropy, same_entropy, rtol=0, atol=0)


@every_loss
def test_stats_are_not_weighted(loss):
    x, W, y = normal(N, D), normal(C, D, seed=1), draw_classes().masked_fill(IGNORED, -100)
    options = {"return_stats": True, "z_loss": 0.1}
    _, stats = loss(x, W, y, **options)
    _, weighted_stats = loss(x, W, y, row_weight=normal(N, seed=2), **options)
    for v, w in zip(stats, weighted_stats, strict=True):
        assert torch.equal(v, w)


def count_products(compute, *leaves: Tensor) -> float:
    """FLOP of the value and its gradients, in products of features and weight."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(compute(), leaves)
    return counter.get_total_flops() / (2 * N * D * C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weighted_loss_takes_three_products(dtype, reduction):
    """Four, if the user weighs unreduced losses."""
    x, W = (normal(*s, dtype=dtype).requires_grad_() for s in ((N, D), (C, D)))
    y, r = draw_classes(), normal(N).float().square().requires_grad_()
    options = {"reduction": reduction, "z_loss": 0.1, "label_smoothing": 0.1}
    w = torch.rand(C).to(dtype).requires_grad_()

    def compute(**more):
        return F.linear_cross_entropy(x, W, y, row_weight=r, **(options | more))

    assert count_products(compute, x, W, r) == 3
    assert count_products(lambda: compute(weight=w), x, W, r, w) == 3
    assert count_products(lambda: compute(reduction="none").sum(), x, W) == 4
    x.requires_grad_(False), W.requires_grad_(False)
    assert count_products(compute, r) == 1


MEMORY_SETUP = """
import torch, torch_nnmath
from torch_nnmath import functional as F
torch.set_num_threads(1)
rows, classes, weighted = map(int, sys.argv[1:])
x, W = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
y, r = torch.randint(classes, (rows,)), torch.rand(rows, requires_grad=True)
def step(*rows):
    x_, y_, r_ = (v[: rows[0]] if rows else v for v in (x, y, r))
    options = {"row_weight": r_} if weighted else {}
    F.linear_cross_entropy(x_, W, y_, label_smoothing=0.1, **options).backward()
step(8)
"""


@needs_linux_maxrss
def test_weighted_step_keeps_no_logits_in_memory():
    """The logits would take 250 MiB, a block of them takes 8."""
    growth = measure_peak_growth(MEMORY_SETUP, "step()", 8192, 8000, 1)
    assert growth < measure_peak_growth(MEMORY_SETUP, "step()", 8192, 8000, 0) + 8
    assert growth < 60


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_with_any_number_of_rows_equals_eager(reduction):
    def step(x, W, y, r):
        loss = F.linear_cross_entropy(x, W, y, row_weight=r, reduction=reduction, z_loss=0.1)
        return loss.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 6, 9):
        y = draw_classes(rows)
        y[1] = -100
        results = []
        for function in (step, compiled):
            leaves = [normal(*s).requires_grad_() for s in ((rows, D), (C, D))] + [
                normal(rows, seed=2).square().requires_grad_()
            ]
            x, W, r = leaves
            results.append([*torch.autograd.grad(function(x, W, y, r), leaves)])
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


def test_modules_pass_row_weights():
    x, W, y, r = normal(N, D), normal(C, D, seed=1), draw_classes(), normal(N, seed=2).square()
    z = x @ W.T
    expected = F.linear_cross_entropy(x, W, y, row_weight=r)
    torch.testing.assert_close(nn.CrossEntropyLoss()(z, y, r), expected)
    torch.testing.assert_close(nn.CategoricalCrossEntropyLoss()(z.softmax(1), y, r), expected)
    head = nn.LinearCrossEntropyLoss(D, C, dtype=F64)
    head.linear.weight = torch.nn.Parameter(W)
    torch.testing.assert_close(head(x, y, row_weight=r).detach(), expected)


def test_one_example_without_batch_axis_has_one_weight():
    z, r = normal(C), torch.tensor([3.0], dtype=F64)
    expected = 3 * torch.nn.functional.cross_entropy(z, torch.tensor(2))
    for y, weight in ((torch.tensor([2]), r), (torch.tensor(2), r[0]), (z.new_zeros(C), r[0])):
        if y.is_floating_point():
            y[2] = 1
        value = F.cross_entropy(z, y, row_weight=weight, reduction="sum")
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        F.linear_cross_entropy(
            z, torch.eye(C, dtype=F64), torch.tensor(2), row_weight=r[0], reduction="sum"
        ),
        expected,
    )
