"""Losses without a batch, of empty batches, of mismatched shapes and of micro-batches."""

import pytest
import torch
from entry_points import (
    BATCHED,
    ENTRY_POINTS,
    REDUCTIONS,
    UNBATCHED,
    C,
    D,
    assert_close,
    assert_matches_truth,
    compute_truth,
    draw_labels,
    draw_leaves,
    draw_probabilities,
    every_reduction,
    is_zero,
    make_class_weight,
    parametrize_entries,
)

import torch_nnmath.functional as F
from torch_nnmath import nn

pytestmark = pytest.mark.usefixtures("fixed_seed")


def draw_normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


# Without a batch


@parametrize_entries(UNBATCHED)
@pytest.mark.parametrize("target_kind", ["index", "probabilities"])
def test_unbatched_loss_is_a_scalar_and_equals_pytorch(entry, target_kind):
    target = draw_labels(()) if target_kind == "index" else draw_probabilities(entry)
    for reduction in REDUCTIONS:
        for options in ({}, {"label_smoothing": 0.1, "weight": make_class_weight()}):
            leaves, named = draw_leaves(entry.shapes), {"reduction": reduction, **options}
            loss = entry.compute_loss(leaves, target, **named)
            assert loss.shape == ()
            z = entry.compute_logits(*leaves)
            assert_close(loss, torch.nn.functional.cross_entropy(z, target, **named))
            assert_matches_truth(entry, leaves, target, **named)


@every_reduction
def test_unbatched_modules_match_their_formulas(reduction):
    z, y = draw_normal(C), torch.tensor(2)
    entry = ENTRY_POINTS["logits unbatched"]
    assert_close(nn.CrossEntropyLoss(reduction=reduction)(z, y), compute_truth(entry, [z], y))
    x, head = draw_normal(D), nn.LinearCrossEntropyLoss(D, C, reduction=reduction).double()
    assert_close(head(x, y), compute_truth(entry, [head.linear(x)], y))
    categorical = nn.CategoricalCrossEntropyLoss(reduction=reduction)
    assert_close(categorical(z.softmax(0), y), compute_truth(entry, [z], y))
    t = torch.rand(C, dtype=torch.float64)
    assert_close(nn.SquaredErrorLoss(reduction=reduction)(z, t), ((z - t) ** 2).sum() / 2)
    a = 1 / (1 + (-z).exp())
    assert_close(nn.SigmoidSquaredErrorLoss(reduction=reduction)(z, t), ((a - t) ** 2).sum() / 2)


# Empty batches


def list_empty_variants(entry):
    """Returns variants with size 0 along the first or the last batch axis of the first tensor."""
    last = len(entry.batch) - 1
    has_positions = len(entry.shapes) > 1 and len(entry.shapes[1]) > 2  # axes of W, not of x
    for axis in {0, 0 if has_positions else last}:
        batch, first = list(entry.batch), list(entry.shapes[0])
        on_axis_1 = len(entry.shapes) == 1  # the classes
        batch[axis] = first[axis + (on_axis_1 and axis > 0)] = 0
        yield entry._replace(batch=tuple(batch), shapes=(tuple(first), *entry.shapes[1:]))


def check_empty_loss(f, shapes, reduction, batch):
    """Checks for a sum of 0, a mean of nan, no losses, and full-sized gradients of 0."""
    leaves = draw_leaves(shapes)
    loss = f(*leaves)
    if reduction == "none":
        assert loss.shape == batch
        assert loss.numel() == 0
    else:
        assert is_zero(loss) if reduction == "sum" else loss.isnan()
    first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    assert [d.shape for d in first] == [x.shape for x in leaves]
    assert all(map(is_zero, first))
    along = sum((d * torch.ones_like(d)).sum() for d in first)
    if along.requires_grad:
        assert all(map(is_zero, torch.autograd.grad(along, leaves, materialize_grads=True)))


@parametrize_entries(BATCHED)
@every_reduction
def test_cross_entropy_of_an_empty_batch(entry, reduction):
    for variant in list_empty_variants(entry):
        y = draw_labels(variant.batch)
        for target, options in (
            (y, {}),
            (y.byte(), {}),
            (y, {"label_smoothing": 0.1}),
            (y, {"weight": make_class_weight()}),
            (draw_probabilities(variant), {}),
        ):
            check_empty_loss(
                lambda *leaves, variant=variant, target=target, options=options: (
                    variant.compute_loss(leaves, target, reduction=reduction, **options)
                ),
                variant.shapes,
                reduction,
                variant.batch,
            )


EMPTY = {  # loss, shapes of its tensors, shape of its losses
    "mse_loss": (F.mse_loss, ((0, D), (0, D)), (0, D)),
    "mse_loss without columns": (F.mse_loss, ((2, 0), (2, 0)), (2, 0)),
    "MSELoss": (lambda a, t, reduction: nn.MSELoss(reduction=reduction)(a, t), ((0,), (0,)), (0,)),
    "squared_error": (F.squared_error, ((0, D), (0, D)), (0,)),
    "sigmoid_squared_error": (F.sigmoid_squared_error, ((0, D), (0, D)), (0,)),
    "categorical_cross_entropy": (F.categorical_cross_entropy, ((0, C), (0, C)), (0,)),
    "categorical_cross_entropy of indices": (
        lambda p, **options: F.categorical_cross_entropy(p, draw_labels((0, 2)), **options),
        ((0, 2, C),),
        (0, 2),
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_other_losses_of_an_empty_batch(name):
    f, shapes, batch = EMPTY[name]
    for reduction in REDUCTIONS:
        check_empty_loss(
            lambda *leaves, r=reduction: f(*leaves, reduction=r), shapes, reduction, batch
        )


LAYERS = {  # layer, shapes of its parameters
    "linear": (F.linear, ((5, D), (5,))),
    "sigmoid": (F.sigmoid, ()),
    "tanh": (F.tanh, ()),
    "relu": (F.relu, ()),
    "softmax": (lambda z: F.softmax(z, 0), ()),
    "feedforward": (
        lambda x, *p: F.feedforward(x, p[:2], p[2:], activation="relu"),
        ((5, D), (2, 5), (5,), (2,)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_an_empty_batch_have_full_zero_gradients(name):
    f, shapes = LAYERS[name]
    parameters = draw_leaves(shapes)
    x = torch.randn(0, D, dtype=torch.float64, requires_grad=True)
    out = f(x, *parameters)
    assert out.shape == (0, *f(draw_normal(4, D), *parameters).shape[1:])
    out.sum().backward()
    assert all(is_zero(v.grad) and v.grad.shape == v.shape for v in (x, *parameters))


# Shapes that differ: (n, 1) and (n)

mismatched_shapes = pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((4, 1), (4,)),
        ((4,), (4, 1)),
        ((4, 3), (3,)),
        ((2, 4, 1), (4,)),
        ((), (4,)),
        ((4,), ()),
        ((4,), (1,)),
    ],
)


@mismatched_shapes
def test_mse_loss_of_mismatched_shapes_warns_and_broadcasts(shape, other):
    for reduction in REDUCTIONS:
        check_broadcast_loss(shape, other, reduction)


def check_broadcast_loss(shape, other, reduction):
    a, t = draw_normal(*shape).requires_grad_(), draw_normal(*other).requires_grad_()
    with pytest.warns(UserWarning, match="different"):
        theirs = torch.nn.functional.mse_loss(a, t, reduction=reduction)
    squares = (a.detach() - t.detach()) ** 2
    expected = {"none": squares, "sum": squares.sum(), "mean": squares.mean()}[reduction]
    with pytest.warns(UserWarning, match="target size.*different to the input size"):
        assert_close(nn.MSELoss(reduction=reduction)(a, t).detach(), expected)
    with pytest.warns(UserWarning, match="target size.*different to the input size"):
        loss = F.mse_loss(a, t, reduction=reduction)
    assert_close(loss.detach(), expected)
    cotangent = torch.randn_like(loss)
    found = torch.autograd.grad(loss, [a, t], cotangent, create_graph=True)
    assert [d.shape for d in found] == [a.shape, t.shape]
    plain = torch.autograd.grad(theirs, [a, t], cotangent, create_graph=True)
    for d, e in zip(found, plain, strict=True):
        assert_close(d, e)
        seconds = (torch.autograd.grad(x.square().sum(), [a, t], retain_graph=True) for x in (d, e))
        for second, their_second in zip(*seconds, strict=True):
            assert_close(second, their_second)


def test_mse_loss_warning_points_at_the_callers_file():
    with pytest.warns(UserWarning, match="broadcasting") as caught:
        F.mse_loss(torch.zeros(4, 1), torch.zeros(4))
    assert caught[0].filename == __file__


@mismatched_shapes
@pytest.mark.parametrize(
    ("f", "module"),
    [
        (F.squared_error, nn.SquaredErrorLoss),
        (F.sigmoid_squared_error, nn.SigmoidSquaredErrorLoss),
    ],
)
def test_squared_error_of_mismatched_shapes_raises_with_both_shapes(shape, other, f, module):
    a, t = draw_normal(*shape), draw_normal(*other)
    for reduction in REDUCTIONS:
        for call in (lambda a, t, r=reduction: f(a, t, reduction=r), module(reduction=reduction)):
            with pytest.raises(ValueError, match="same shape") as error:
                call(a, t)
            assert str(shape) in str(error.value)
            assert str(other) in str(error.value)


# Accumulated micro-batches


@parametrize_entries(
    {
        name: ENTRY_POINTS[name]
        for name in ("logits", "module", "head", "head with bias", "head on sequences")
    }
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("has_options", [False, True], ids=["plain", "smoothed and weighted"])
def test_sums_over_micro_batches_divided_by_total_count_are_the_mean(
    entry, dtype, tolerance, has_options
):
    """Micro-batches of 1, 5, 0 and 3 tokens that count, beside ignored ones."""
    N = 12
    x = draw_leaves([(N, *entry.shapes[0][1:])], dtype)[0]
    leaves = [x, *draw_leaves(entry.shapes[1:], dtype)]
    target = draw_labels((N, *entry.batch[1:]))
    target.view(N, -1)[[1, 2, 8, 9]] = -100
    weight = make_class_weight(dtype) if has_options else None
    options = {"weight": weight, "label_smoothing": 0.1 if has_options else 0.0}

    full = entry.compute_loss(leaves, target, **options)
    expected = torch.autograd.grad(full, leaves)

    y = target[target != -100]
    count = y.numel() if weight is None else weight[y].sum()
    total = 0.0
    for rows in (slice(0, 3), slice(3, 8), slice(8, 10), slice(10, 12)):
        part = entry.compute_loss([x[rows], *leaves[1:]], target[rows], reduction="sum", **options)
        (part / count).backward()
        total += part.item()
    assert_close(torch.tensor(total / float(count), dtype=dtype), full.detach(), tolerance)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    options["weight"] = None if weight is None else weight.double()
    loss = compute_truth(entry, exact, target, **options)
    for x, d, e in zip(leaves, expected, torch.autograd.grad(loss, exact), strict=True):
        assert_close(x.grad, d, tolerance)
        assert_close(x.grad.double(), e, tolerance)


@pytest.mark.parametrize(
    ("f", "count"),
    [(F.mse_loss, 10 * D), (F.squared_error, 10), (F.sigmoid_squared_error, 10)],
)
def test_squared_error_sums_over_micro_batches_are_the_mean(f, count):
    a, t = draw_leaves(((10, D), (10, D)))
    expected = torch.autograd.grad(f(a, t), [a, t])
    for rows in (slice(0, 1), slice(1, 8), slice(8, 8), slice(8, 10)):
        (f(a[rows], t[rows], reduction="sum") / count).backward()
    assert_close(a.grad, expected[0])
    assert_close(t.grad, expected[1])


# Shapes and types that PyTorch accepts, too


def test_cross_entropy_of_one_row_takes_a_target_of_one_axis():
    z = draw_normal(5)
    torch.testing.assert_close(F.cross_entropy(z, torch.tensor([2])), -z.log_softmax(0)[2])


def test_mse_loss_takes_a_bool_target():
    z, target = draw_normal(3, 4), torch.tensor([True, False, True, True])
    expected = torch.nn.functional.mse_loss(z, target.double().expand(3, 4))
    torch.testing.assert_close(F.mse_loss(z, target.expand(3, 4)), expected)
