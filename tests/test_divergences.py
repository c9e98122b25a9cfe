"""Divergences between two heads: limits, infinite logits, cost, memory and the page's examples.

`test_random_calls.py` compares every option and order with plain PyTorch.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import truth
from conftest import limit_head_blocks, measure_peak_growth, needs_linux_maxrss
from tolerance import find_errors
from torch.utils.flop_counter import FlopCounterMode

import torch_nnmath.functional as F
from torch_nnmath import nn
from torch_nnmath.kernels import _divergence_block, _top_k_block

F64 = torch.float64
N, C, D, DT, K = 70, 90, 4, 3, 5
MIXES = (0.0, 1.0, 0.3)  # KL, reverse KL, Jensen-Shannon


def draw(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def draw_heads(dtype=F64, rows=N, classes=C):
    """Returns x, W, b and the teacher's xt, Wt, bt."""
    shapes = (rows, D), (classes, D), (classes,), (rows, DT), (classes, DT), (classes,)
    return [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def draw_top_k(dtype=F64):
    log_probs, indices = draw(N, C, seed=8).mul(2).log_softmax(1).topk(K)
    return log_probs.to(dtype), indices


def draw_labels():
    y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(9))
    y[::4] = -100
    return y


def compute(mix, x, W, xt, Wt=None, b=None, bt=None, **options):
    heads, biases = (x, W, xt, Wt), {"student_bias": b, "teacher_bias": bt}
    if mix in (0, 1):
        return F.linear_kl_div(*heads, **biases, reverse=mix == 1, **options)
    return F.linear_jsd(*heads, **biases, beta=mix, **options)


def differentiate(f, leaves, order=2):
    """Returns the value, and gradients of that many orders, of it and of the upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = f(*leaves)
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    results, scalar = [value], (value.square() * weights).sum()
    for _ in range(order):
        gradients = torch.autograd.grad(scalar, leaves, create_graph=True)
        scalar = sum((g * g.detach().cos()).sum() for g in gradients)
        results += gradients
    return [r.detach() for r in results]


def find_difference(f, g, leaves, **options):
    """The largest difference between the derivatives of two functions, relative to the largest."""
    pairs = zip(
        differentiate(f, leaves, **options), differentiate(g, leaves, **options), strict=True
    )
    return max(((a - b).abs().max() / max(b.abs().max(), 1)).item() for a, b in pairs)


# The path of a frozen teacher, and the limits of beta


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.4}, {"alpha": 0.4, "temperature": 2.0}, {"temperature": 0.5}]
)
@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_student_alone_equal_truth(mix, reduction, options):
    x, W, b, xt, Wt, bt = draw_heads()
    options = {"reduction": reduction, "labels": draw_labels(), **options}

    def ours(x, W, b):
        return compute(mix, x, W, xt, Wt, b, bt, **options)

    def plain(x, W, b):
        return truth.linear_divergence(x, W, xt, Wt, b, bt, mix=mix, **options)

    assert find_difference(ours, plain, (x, W, b)) < 1e-10


@pytest.mark.parametrize("mix", MIXES)
def test_gradients_of_teacher_alone_equal_truth(mix):
    x, W, b, xt, Wt, bt = draw_heads()

    def ours(xt, Wt, bt):
        return compute(mix, x, W, xt, Wt, b, bt)

    def plain(xt, Wt, bt):
        return truth.linear_divergence(x, W, xt, Wt, b, bt, mix=mix)

    assert find_difference(ours, plain, (xt, Wt, bt)) < 1e-10


def test_jensen_shannon_divergence_over_beta_tends_to_kl_divergence_at_both_ends():
    x, W, _, xt, Wt, _ = draw_heads()
    for reverse, beta, weight in ((False, 1e-9, 1e-9), (True, 1 - 1e-9, 1e-9)):
        divergence = F.linear_kl_div(x, W, xt, Wt, reverse=reverse)
        torch.testing.assert_close(
            F.linear_jsd(x, W, xt, Wt, beta=beta) / weight, divergence, rtol=1e-4, atol=0
        )
        at_end = F.linear_jsd(x, W, xt, Wt, beta=float(reverse))
        torch.testing.assert_close(at_end, divergence, rtol=0, atol=0)


def test_divergence_of_equal_heads_is_zero_with_zero_gradients():
    x, W, b, *_ = draw_heads(torch.float32)
    leaves = [v.requires_grad_() for v in (x, W, b)]
    for mix in MIXES:
        loss = compute(mix, x, W, x.detach(), W.detach(), b, b.detach())
        assert abs(loss) < 1e-6
        assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, leaves))


def test_batchmean_is_mean():
    x, W, _, xt, Wt, _ = draw_heads()
    losses = [F.linear_kl_div(x, W, xt, Wt, reduction=r) for r in ("batchmean", "mean")]
    assert torch.equal(*losses)


# Infinite, huge and ignored values


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("needs_teacher", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_classes_that_are_impossible_for_both_add_nothing(mix, needs_teacher):
    """Both biases are -inf: 0 ln 0 = 0. The truth has the other classes alone."""
    x, W, b, xt, Wt, bt = draw_heads()
    impossible = torch.zeros(C, dtype=torch.bool)
    impossible[::7] = True
    b, bt = (v.masked_fill(impossible, -math.inf) for v in (b, bt))
    leaves = (x, W, xt, Wt) if needs_teacher else (x, W)

    def ours(x, W, xt=xt, Wt=Wt):
        return compute(mix, x, W, xt, Wt, b, bt, reduction="none")

    def plain(x, W, xt=xt, Wt=Wt):
        possible = [v[~impossible] for v in (W, Wt, b, bt)]
        W, Wt, b_possible, bt_possible = possible
        return truth.linear_divergence(
            x, W, xt, Wt, b_possible, bt_possible, mix=mix, reduction="none"
        )

    assert find_difference(ours, plain, leaves) < 1e-10


@pytest.mark.parametrize(
    ("mix", "of_teacher"), [(0.0, True), (1.0, False), (0.3, True), (0.3, False)]
)
def test_class_that_is_impossible_for_the_weighted_side_has_finite_gradients(mix, of_teacher):
    x, W, b, xt, Wt, bt = draw_heads()
    (bt if of_teacher else b)[3] = -math.inf

    def ours(x, W):
        return compute(mix, x, W, xt, Wt, b, bt)

    def plain(x, W):
        l, lt = (truth.compute_logits(*v).log_softmax(1) for v in ((x, W, b), (xt, Wt, bt)))
        q, p = l.exp(), lt.exp()
        m = mix * p + (1 - mix) * q
        # the divergence of a side is 0 where its probability is
        s = (l - (lt if mix == 1 else m.log())).masked_fill(q == 0, 0)
        st = (lt - (l if mix == 0 else m.log())).masked_fill(p == 0, 0)
        return (
            ((1 - mix) * q * s * (mix > 0) + mix * p * st * (mix < 1)).sum(1).mean()
            if (0 < mix < 1)
            else (q * s if mix == 1 else p * st).sum(1).mean()
        )

    assert find_difference(ours, plain, (x, W), order=1) < 1e-10


def test_class_that_is_impossible_for_the_other_side_makes_kl_divergence_infinite():
    x, W, b, xt, Wt, bt = draw_heads()
    b[3] = -math.inf
    assert F.linear_kl_div(x, W, xt, Wt, student_bias=b, teacher_bias=bt) == math.inf
    assert F.linear_kl_div(xt, Wt, x, W, teacher_bias=b, reverse=True) == math.inf


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_huge_logits_in_float32_equal_truth(mix, shift):
    """Their exponentials overflow, or are 0, without the maximum."""
    x, W, _, xt, Wt, _ = draw_heads(torch.float32)
    b, bt = torch.full((C,), shift), torch.full((C,), -shift)
    leaves = [v.requires_grad_() for v in (x, W)]
    loss = compute(mix, x, W, xt, Wt, b, bt)
    exact_leaves = [v.detach().double().requires_grad_() for v in leaves]
    heads = *exact_leaves, *(v.double() for v in (xt, Wt, b, bt))
    expected = truth.linear_divergence(*heads, mix=mix)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-3)
    pairs = zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact_leaves), strict=True
    )
    for found, wanted in pairs:
        torch.testing.assert_close(
            found.double(), wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max()
        )


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("teacher", ["head", "logits", "top-k"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ignored_rows_of_nan_change_nothing(mix, teacher, reduction):
    x, W, b, xt, Wt, _ = draw_heads()
    log_probs, indices = draw_top_k()
    labels = draw_labels()
    bad = x.masked_fill((labels < 0)[:, None], math.nan)
    zero = x.masked_fill((labels < 0)[:, None], 0)
    given = {"head": (xt, Wt), "logits": (draw(N, C, seed=7), None), "top-k": (log_probs, None)}
    xt, Wt = given[teacher]
    options = {"teacher_indices": indices} if teacher == "top-k" else {}
    results = []
    for features in (bad, zero):
        leaves = [v.clone().requires_grad_() for v in (features, W, xt)]
        x, W_leaf, xt_leaf = leaves
        loss = compute(
            mix, x, W_leaf, xt_leaf, Wt, b, labels=labels, alpha=0.3, reduction=reduction, **options
        )
        results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    _, dx, *_ = results[0]
    assert not dx[labels < 0].any()


# A teacher's likeliest classes


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("remainder", ["class", "drop"])
@pytest.mark.usefixtures("small_blocks")
def test_top_k_gradients_equal_truth(mix, remainder):
    x, W, b, *_ = draw_heads()
    log_probs, indices = draw_top_k()
    options = {
        "teacher_indices": indices,
        "remainder": remainder,
        "labels": draw_labels(),
        "alpha": 0.4,
        "temperature": 1.5,
        "reduction": "none",
    }

    def ours(x, W, b, lt):
        return compute(mix, x, W, lt, None, b, **options)

    def plain(x, W, b, lt):
        return truth.linear_divergence(x, W, lt, None, b, mix=mix, **options)

    assert find_difference(ours, plain, (x, W, b, log_probs)) < 1e-10


@pytest.mark.parametrize("mix", MIXES)
def test_all_classes_as_top_k_equal_given_logits(mix):
    x, W, *_ = draw_heads()
    logits = draw(N, C, seed=7)
    indices = logits.argsort(1)
    log_probs = logits.log_softmax(1).gather(1, indices)
    for remainder in ("class", "drop"):
        loss = compute(mix, x, W, log_probs, teacher_indices=indices, remainder=remainder)
        torch.testing.assert_close(loss, compute(mix, x, W, logits))


@pytest.mark.parametrize("mix", MIXES)
def test_log_probabilities_that_round_to_a_mass_above_one_have_finite_gradients(mix):
    x, W, *_ = draw_heads(torch.float32)
    indices = draw_top_k()[1]
    log_probs = torch.full((N, K), -math.log(K)) + 1e-3
    leaves = [v.requires_grad_() for v in (x, W, log_probs)]
    loss = compute(mix, x, W, log_probs, teacher_indices=indices)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves))


# Accuracy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_error_with_many_classes_is_at_most_that_of_float32_logits(dtype, mix, temperature):
    x, W, _, xt, Wt, _ = draw_heads(dtype, rows=64, classes=8000)
    x, xt = 2 * x, 2 * xt

    def differentiate_student(f, change=lambda v: v):
        leaves = [change(v).detach().requires_grad_() for v in (x, W)]
        value = f(*leaves, change(xt), change(Wt))
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def plain(*heads):
        return truth.linear_divergence(*heads, mix=mix, temperature=temperature)

    found = differentiate_student(lambda *heads: compute(mix, *heads, temperature=temperature))
    lines = find_errors(
        ("value", "x", "W"),
        found,
        differentiate_student(plain),
        lambda change: differentiate_student(plain, change),
    )
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_median_error_of_rows_is_at_most_that_of_pytorch(mix):
    """The rounding of a log-sum-exp is the same for all classes of a row: it does not average."""
    temperature = 2.0
    heads = [
        draw(*shape, dtype=torch.float32, seed=i)
        for i, shape in enumerate([(640, 64), (1000, 64), (640, 64), (1000, 64)])
    ]
    heads[1], heads[3] = heads[1] / 4, heads[3] / 4

    def plain(x, W, xt, Wt):
        l, lt = ((v @ w.T / temperature).log_softmax(-1) for v, w in ((x, W), (xt, Wt)))
        l, lt = (l, lt) if mix == 0 else (lt, l)
        return torch.nn.functional.kl_div(l, lt.exp(), reduction="none").sum(-1)

    expected = plain(*(v.double() for v in heads))
    error, plain_error = (
        (found - expected).div(expected).abs().median()
        for found in (
            compute(mix, *heads, temperature=temperature, reduction="none"),
            plain(*heads),
        )
    )
    assert error < 1.1 * plain_error


# Cost and memory


def count_products(needs_teacher, **options):
    """The FLOP of a training step, over those of a product with the student's weight."""
    x, W, _, xt, Wt, _ = draw_heads()
    leaves = [v.requires_grad_() for v in ((x, W, xt, Wt) if needs_teacher else (x, W))]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(F.linear_kl_div(x, W, xt, Wt, **options), leaves)
    return counter.get_total_flops() / (2 * N * C)


def test_frozen_teacher_costs_one_product_and_student_three():
    assert count_products(needs_teacher=False) == 3 * D + DT
    assert count_products(needs_teacher=True) == 3 * D + 3 * DT
    labels = draw_labels().clamp(min=0)
    assert count_products(needs_teacher=False, labels=labels, alpha=0.5) == 3 * D + DT


SETUP = """
import torch
from torch_nnmath import functional as F
rows, order, teacher = int(sys.argv[1]), sys.argv[2], sys.argv[3]
x, W = torch.randn(rows, 16, requires_grad=True), torch.randn(32000, 16, requires_grad=True)
xt, Wt, options = torch.randn(rows, 8), torch.randn(32000, 8), {}
if teacher == "top-k":
    xt, Wt = torch.full((rows, 3), -2.0), None
    options["teacher_indices"] = torch.arange(3).expand(rows, 3)
leaves = [x, W]
if teacher == "trained":
    leaves += [xt.requires_grad_(), Wt.requires_grad_()]
small = {k: v[:64] for k, v in options.items()}
F.linear_jsd(x[:64], W, xt[:64], Wt, **small).backward()  # loads what the first call loads
"""
BODY = """
loss = F.linear_jsd(x, W, xt, Wt, **options)
gradients = torch.autograd.grad(loss, leaves, create_graph=order == "second")
if order == "second":
    torch.autograd.grad(gradients, leaves, [torch.ones_like(v) for v in leaves])
"""


@needs_linux_maxrss
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("teacher", ["frozen", "trained", "top-k"])
def test_memory_does_not_grow_with_rows_times_classes(order, teacher):
    """Each head's logits would take 125 MiB, and twice that for twice the rows."""
    peaks = [measure_peak_growth(SETUP, BODY, rows, order, teacher) for rows in (1024, 2048)]
    assert max(peaks) < 400, peaks
    assert peaks[1] - peaks[0] < 60, peaks


# Faults that are planted in the kernels


def negate(function):
    def negated(*args):
        result = function(*args)
        return tuple(-v for v in result) if isinstance(result, tuple) else -result

    return negated


def negate_score_derivatives(function):
    return lambda *args: [(r, -ds) for r, ds in function(*args)]


DENSE, SLICE, TOP_K = (
    _divergence_block.DenseBlock,
    _divergence_block._Slice,
    _top_k_block.TopKBlock,
)


@pytest.mark.parametrize(
    ("owner", "name", "plant"),
    [
        (SLICE, "differentiate_scores", negate_score_derivatives),
        (SLICE, "compute_gradients", negate),
        (_divergence_block.Block, "subtract_labels_", lambda _: lambda *args: None),
        (_divergence_block.Block, "compute_label_derivative", negate),
        (TOP_K, "_subtract_rest", negate),
        (TOP_K, "_compute_rest", negate),
        (TOP_K, "_differentiate_rest", negate),
        (_top_k_block, "differentiate_partials", negate),
    ],
)
def test_comparison_with_truth_notices_a_fault(monkeypatch, owner, name, plant):
    x, W, b, xt, Wt, bt = draw_heads()
    log_probs, indices = draw_top_k()
    options = {"labels": draw_labels(), "alpha": 0.4}
    leaves = x, W, b, xt, Wt, bt
    if owner in (TOP_K, _top_k_block):
        leaves, options["teacher_indices"] = (x, W, b, log_probs), indices

    def order(x, W, b, xt, Wt=None, bt=None):
        return x, W, xt, Wt, b, bt

    def find():
        return find_difference(
            lambda *v: compute(0.3, *order(*v), **options),
            lambda *v: truth.linear_divergence(*order(*v), mix=0.3, **options),
            leaves,
        )

    assert find() < 1e-10
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    assert find() > 1e-6


# Modules, types, blocks and the page


def test_modules_equal_functions():
    x, W, b, xt, Wt, bt = draw_heads()
    labels = draw_labels()
    inputs = {"student_bias": b, "teacher_bias": bt, "labels": labels}
    shared = {"temperature": 2.0, "alpha": 0.3, "base": 2, "temperature_factor": True}
    found = nn.LinearKLDivLoss(reverse=True, **shared)(x, W, xt, Wt, **inputs)
    expected = F.linear_kl_div(x, W, xt, Wt, reverse=True, **inputs, **shared)
    assert torch.equal(found, expected)
    module = nn.LinearJSDLoss(beta=0.2, **shared)
    assert torch.equal(
        module(x, W, xt, Wt, **inputs), F.linear_jsd(x, W, xt, Wt, beta=0.2, **inputs, **shared)
    )
    assert "beta=0.2, temperature=2.0" in repr(module)


def test_autocast_rounds_features_and_weights_and_returns_float32():
    x, W, b, xt, Wt, bt = (v.requires_grad_() for v in draw_heads(torch.float32))
    heads = x, W, xt, Wt, b, bt
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compute(0.0, *heads)
    assert loss.dtype == torch.float32
    rounded = [v.detach().bfloat16().double() for v in heads]
    torch.testing.assert_close(loss.double(), compute(0.0, *rounded), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(loss, heads)
    assert {g.dtype for g in gradients} == {torch.float32}


def test_teacher_of_another_dtype_is_accepted():
    x, W, _, xt, Wt, _ = draw_heads(torch.float32)
    teacher = xt.bfloat16(), Wt.bfloat16()
    expected = compute(0.0, *(v.double() for v in (x, W, *teacher)))
    loss = compute(0.0, x, W, *teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_output_dtype_keeps_a_loss_of_half_precision_unrounded():
    heads = [v.bfloat16() for v in draw_heads()]
    x, W, _, xt, Wt, _ = heads
    loss = compute(0.0, x, W, xt, Wt, output_dtype=torch.float32)
    assert loss.dtype == torch.float32
    assert compute(0.0, x, W, xt, Wt) == loss.bfloat16()


@pytest.mark.parametrize("mix", MIXES)
def test_several_blocks_equal_one(mix):
    x, W, b, xt, Wt, bt = draw_heads()
    leaves = x, W, xt, Wt, b, bt
    whole = differentiate(lambda *v: compute(mix, *v), leaves)
    with limit_head_blocks():
        several = differentiate(lambda *v: compute(mix, *v), leaves)
    for found, expected in zip(several, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


PAGE = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGE, re.S | re.M)
EXAMPLES = [(code, output) for code, output in BLOCKS if output]


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_page_examples_print_the_output_shown(code, output, capsys):
    exec(code, {})
    assert capsys.readouterr().out == output


def test_first_example_of_the_page_equals_the_truth():
    names: dict = {}
    exec(BLOCKS[0][0], names)
    x, W, xt, Wt = names["heads"]
    expected = truth.linear_divergence(x, W, xt, Wt, mix=0.1, labels=names["labels"])
    torch.testing.assert_close(names["loss"], expected)


def test_page_has_an_example_of_each_use():
    uses = [("swap(" in code, "teacher_indices" in code) for code, _ in EXAMPLES]
    assert uses == [(False, False), (True, False), (False, True)]
