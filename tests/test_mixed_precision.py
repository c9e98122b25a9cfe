"""Result types with and without autocast, and values with and without gradients."""

import itertools

import pytest
import torch
import truth
from entry_points import (
    ENTRY_POINTS,
    HALF,
    HEADS,
    REDUCTIONS,
    C,
    D,
    assert_close,
    assert_same_bits,
    compute_truth,
    draw_labels,
    draw_leaves,
    draw_probabilities,
    every_entry,
    make_class_weight,
    parametrize_entries,
)

import torch_nnmath.functional as F

every_half_type = pytest.mark.parametrize("half", HALF)


pytestmark = pytest.mark.usefixtures("fixed_seed")


# The value does not depend on which inputs need a gradient


@every_entry
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
def test_loss_has_the_same_bits_whichever_inputs_need_gradients(entry, kind):
    for reduction, dtype in itertools.product(REDUCTIONS, (torch.float64, torch.bfloat16)):
        options = {"label_smoothing": 0.1 if kind == "smoothed" else 0.0, "reduction": reduction}
        leaves = [x.detach() for x in draw_leaves(entry.shapes, dtype)]
        if kind == "probabilities":
            target = draw_probabilities(entry, dtype)
        else:
            target = draw_labels(entry.batch, *[-100] * (len(entry.batch) > 0))
        with torch.no_grad():
            value = entry.compute_loss(leaves, target, **options)
        with torch.inference_mode():
            assert_same_bits(entry.compute_loss(leaves, target, **options), value)
        for needs_grad in itertools.product((False, True), repeat=len(leaves)):
            pairs = zip(leaves, needs_grad, strict=True)
            some = [x.clone().requires_grad_(needed) for x, needed in pairs]
            loss = entry.compute_loss(some, target, **options)
            assert loss.requires_grad == any(needs_grad)
            assert_same_bits(loss.detach(), value)
        with torch.no_grad():
            assert_same_bits(entry.compute_loss(some, target, **options), value)
        exact = [x.double() for x in leaves]
        target = target.double() if kind == "probabilities" else target
        eps = torch.finfo(dtype).eps
        assert_close(value.double(), compute_truth(entry, exact, target, **options), 32 * eps)


FUNCTIONS = {
    "linear": (F.linear, ((4, D), (5, D), (5,))),
    "sigmoid": (F.sigmoid, ((4, D),)),
    "tanh": (F.tanh, ((4, D),)),
    "relu": (F.relu, ((4, D),)),
    "softmax": (lambda z: F.softmax(z, 0), ((4, D),)),
    "mse_loss": (F.mse_loss, ((4, D), (4, D))),
    "squared_error": (F.squared_error, ((4, D), (4, D))),
    "sigmoid_squared_error": (F.sigmoid_squared_error, ((4, D), (4, D))),
    "categorical_cross_entropy": (
        lambda z, t: F.categorical_cross_entropy(z.sigmoid(), t),
        ((4, C), (4, C)),
    ),
    "feedforward": (
        lambda x, *p: F.feedforward(x, p[:2], p[2:], activation="relu"),
        ((4, D), (5, D), (2, 5), (5,), (2,)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_functions_have_the_same_bits_without_gradients(name):
    f, shapes = FUNCTIONS[name]
    for dtype in (torch.float64, torch.float32, *HALF):
        leaves = draw_leaves(shapes, dtype)
        value = f(*leaves)
        assert value.requires_grad
        with torch.no_grad():
            assert_same_bits(f(*leaves), value.detach())
        with torch.inference_mode():
            assert_same_bits(f(*leaves), value.detach())
        assert_same_bits(f(*(x.detach() for x in leaves)), value.detach())


# Autocast


@every_entry
@every_half_type
def test_autocast_loss_is_float32_and_no_less_exact_than_pytorchs(entry, half):
    n = len(entry.shapes)
    which_are_half = [False] * n, [True] + [False] * (n - 1), [False] + [True] * (n - 1)
    kinds = (
        ("indices", "none"),
        ("weighted", "mean"),
        ("half weights", "sum"),
        ("smoothed", "mean"),
        ("probabilities", "sum"),
    )
    for is_half, (kind, reduction) in itertools.product(which_are_half, kinds):
        leaves = [
            x.detach().to(half if narrow else torch.float32).requires_grad_()
            for x, narrow in zip(draw_leaves(entry.shapes), is_half, strict=True)
        ]
        target, options, weight = draw_labels(entry.batch), {"reduction": reduction}, None
        if kind == "probabilities":
            target = draw_probabilities(entry, torch.float32)
        if kind == "smoothed":
            options["label_smoothing"] = 0.1
        if "weight" in kind:
            weight = make_class_weight(half if kind == "half weights" else torch.float32)
        check_autocast_loss(entry, half, leaves, target, weight, options)


def check_autocast_loss(entry, half, leaves, target, weight, options):
    with torch.autocast("cpu", half):
        loss = entry.compute_loss(leaves, target, weight=weight, **options)
        z = entry.compute_logits(*leaves).float()
        dims = entry.class_dim, min(1, z.dim() - 1)  # PyTorch takes classes at axis 1
        is_dense = target.is_floating_point()
        theirs = torch.nn.functional.cross_entropy(
            z.movedim(*dims),
            target.movedim(*dims) if is_dense else target,
            weight=None if weight is None else weight.float(),
            **options,
        )
    assert loss.dtype == torch.float32
    ours = torch.autograd.grad(loss.sum(), leaves)
    assert [d.dtype for d in ours] == [x.dtype for x in leaves]

    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = compute_truth(
        entry,
        exact,
        target.double() if is_dense else target,
        weight=None if weight is None else weight.double(),
        **options,
    )
    plain = torch.autograd.grad(theirs.sum(), leaves)
    true = torch.autograd.grad(expected.sum(), exact)
    for triple in ((loss, theirs, expected), *zip(ours, plain, true, strict=True)):
        assert_no_less_exact(*triple, torch.finfo(half).eps)


def assert_no_less_exact(found, theirs, true, eps):
    def compute_error(x):
        return (x.detach().double() - true).abs().max().item()

    assert compute_error(found) <= compute_error(theirs) + eps * true.abs().max().item()


@every_half_type
def test_autocast_casts_products_and_gradients_keep_their_types(half):
    x, W, b = draw_leaves(((5, D), (C, D), (C,)), torch.float32)
    with torch.autocast("cpu", half):
        z = F.linear(x, W, b)
        a = F.feedforward(x, [W], [b], activation="relu", output_activation="identity")
        plain = torch.nn.functional.linear(x, W, b)
    assert z.dtype == a.dtype == half
    assert torch.equal(z, plain)
    assert torch.equal(a, plain)
    for out in (z, a):
        assert {d.dtype for d in torch.autograd.grad(out.sum(), [x, W, b])} == {torch.float32}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 1.7}, {"z_loss": 0.1}], ids=str)
@every_half_type
def test_autocast_head_does_not_round_the_gradient_of_a_float32_weight(half, options, reduction):
    """The products round the weight; its gradient is computed in float32 and stays so."""
    x, W = torch.randn(9, D), torch.randn(C, D, requires_grad=True)
    y, c = torch.randint(C, (9,)), torch.rand(9)
    with torch.autocast("cpu", half):
        loss = F.linear_cross_entropy(x, W, y, reduction=reduction, **options)
    (dW,) = torch.autograd.grad(loss if reduction == "mean" else (c * loss).sum(), W)
    exact = W.detach().to(half).double().requires_grad_()
    rounded_x = x.to(half).double()
    loss = F.linear_cross_entropy(rounded_x, exact, y, reduction=reduction, **options)
    loss = loss if reduction == "mean" else (c.double() * loss).sum()
    (expected,) = torch.autograd.grad(loss, exact)
    assert dW.dtype == torch.float32
    torch.testing.assert_close(dW.double(), expected, rtol=1e-4, atol=1e-6)


@every_half_type
@pytest.mark.parametrize("f", [F.mse_loss, F.squared_error, F.sigmoid_squared_error])
@pytest.mark.parametrize("has_half_target", [True, False])
def test_autocast_squared_errors_are_float32(f, half, has_half_target):
    for reduction in REDUCTIONS:
        a, t = (x.detach().to(half).requires_grad_() for x in draw_leaves(((5, D), (5, D))))
        t = t if has_half_target else t.detach().float().requires_grad_()
        with torch.autocast("cpu", half):
            loss = f(a, t, reduction=reduction)
        assert loss.dtype == torch.float32
        da, dt = torch.autograd.grad(loss.sum(), [a, t])
        assert (da.dtype, dt.dtype) == (a.dtype, t.dtype)
        exact = [x.detach().double().requires_grad_() for x in (a, t)]
        expected = f(*exact, reduction=reduction)
        assert_close(loss.double(), expected, 1e-5)
        for d, e in zip((da, dt), torch.autograd.grad(expected.sum(), exact), strict=True):
            assert_close(d.double(), e, torch.finfo(d.dtype).eps)


@every_half_type
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_autocast_categorical_cross_entropy_is_float32(half, kind):
    for reduction in REDUCTIONS:
        p = torch.rand(5, C).softmax(-1).to(half).requires_grad_()
        target = draw_labels((5,)) if kind == "indices" else torch.rand(5, C).to(half)
        with torch.autocast("cpu", half):
            loss = F.categorical_cross_entropy(p, target, reduction=reduction)
        t = torch.eye(C)[target].double() if kind == "indices" else target.double()
        c = -(t * p.detach().double().log()).sum(-1)
        assert loss.dtype == torch.float32
        expected = {"none": c, "sum": c.sum(), "mean": c.mean()}[reduction]
        assert_close(loss.double(), expected, 1e-5)
        (d,) = torch.autograd.grad(loss.sum(), p)
        assert d.dtype == half


@every_half_type
@pytest.mark.parametrize("f", [F.sigmoid, F.tanh, F.relu, lambda z: F.softmax(z, -1)])
def test_autocast_keeps_the_types_of_activations(half, f):
    for dtype in (torch.float64, torch.float32, *HALF):
        z = torch.randn(4, D).to(dtype)
        with torch.autocast("cpu", half):
            a = f(z)
        assert a.dtype == dtype
        assert torch.equal(a, f(z))


@every_entry
def test_autocast_leaves_float64_unchanged(entry):
    leaves, target = draw_leaves(entry.shapes), draw_labels(entry.batch)
    value = entry.compute_loss(leaves, target)
    assert value.dtype == torch.float64
    for half in HALF:
        with torch.autocast("cpu", half):
            assert_same_bits(entry.compute_loss(leaves, target), value)


# Without autocast


@every_entry
def test_without_autocast_loss_and_gradients_have_the_logits_type(entry):
    for dtype in (torch.float32, *HALF):
        leaves = draw_leaves(entry.shapes, dtype)
        loss = entry.compute_loss(leaves, draw_labels(entry.batch))
        assert loss.dtype == dtype
        assert {d.dtype for d in torch.autograd.grad(loss, leaves)} == {dtype}


@parametrize_entries(HEADS)
def test_without_autocast_mixed_types_of_a_head_raise(entry):
    places, others = range(len(entry.shapes)), (*HALF, torch.float64)
    for i, other, reduction in itertools.product(places, others, REDUCTIONS):
        leaves = draw_leaves(entry.shapes, torch.float32)
        leaves[i] = leaves[i].to(other)
        with pytest.raises(RuntimeError, match=str(other)):
            entry.compute_loss(leaves, draw_labels(entry.batch), reduction=reduction)


@every_entry
def test_without_autocast_class_weights_of_another_type_raise(entry):
    """But float32 weights beside half inputs give the loss in the inputs' type."""
    y = draw_labels(entry.batch)
    for half, label_smoothing in itertools.product(HALF, (0.0, 0.1)):
        for dtype, weight_dtype in ((half, torch.float64), (torch.float32, half)):
            options = {
                "weight": make_class_weight(weight_dtype),
                "label_smoothing": label_smoothing,
            }
            with pytest.raises(RuntimeError, match=str(weight_dtype)):
                entry.compute_loss(draw_leaves(entry.shapes, dtype), y, **options)
        leaves = draw_leaves(entry.shapes, half)
        loss = entry.compute_loss(
            leaves, y, **options | {"weight": make_class_weight(torch.float32)}
        )
        assert loss.dtype == half
        exact = [x.detach().double() for x in leaves]
        options["weight"] = make_class_weight(torch.float64)
        expected = compute_truth(entry, exact, y, **options)
        assert_close(loss.double(), expected, 4 * torch.finfo(half).eps)


@pytest.mark.parametrize("name", ["logits", "head"])
@every_half_type
def test_float32_probabilities_beside_half_logits_give_pytorchs_type(name, half):
    entry = ENTRY_POINTS[name]
    leaves = draw_leaves(entry.shapes, half)
    target = draw_probabilities(entry, torch.float32)
    for reduction in REDUCTIONS:
        loss = entry.compute_loss(leaves, target, reduction=reduction)
        z = entry.compute_logits(*leaves)
        theirs = torch.nn.functional.cross_entropy(z, target, reduction=reduction)
        assert loss.dtype == theirs.dtype
        exact = [x.detach().double() for x in leaves]
        expected = compute_truth(entry, exact, target.double(), reduction=reduction)
        assert_no_less_exact(loss, theirs, expected, torch.finfo(half).eps)


@every_half_type
def test_head_adds_gradients_of_positions_in_float32(half):
    """The gradient in the features is rounded once, not at each of 16 positions."""
    x, W = draw_leaves(((3, D), (C, 16, D)), half)
    y = draw_labels((3, 16))
    (dx,) = torch.autograd.grad(F.linear_cross_entropy(x, W, y, reduction="sum"), x)
    exact = [v.detach().double().requires_grad_() for v in (x, W)]
    loss = truth.linear_cross_entropy(*exact, y, reduction="sum")
    (expected,) = torch.autograd.grad(loss, exact[0])
    eps = torch.finfo(half).eps
    torch.testing.assert_close(dx.double(), expected, rtol=eps / 2, atol=eps / 100)
