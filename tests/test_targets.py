"""Class indices and probabilities as targets: ignored, out of range, smoothed, of any integer type.

Each case was reported as a fault of some other library. The truth is `truth.cross_entropy`.
Combinations of options beyond these are drawn in `test_random_calls.py`.
"""

import itertools
import math

import pytest
import torch
import truth
from conftest import OperationRecorder
from entry_points import (
    BASIC,
    BATCHED,
    ENTRY_POINTS,
    REDUCTIONS,
    C,
    D,
    assert_close,
    assert_derivatives_match,
    assert_matches_truth,
    compute_truth,
    draw_labels,
    draw_leaves,
    draw_probabilities,
    every_entry,
    every_reduction,
    is_zero,
    make_class_weight,
    parametrize_entries,
)
from torch.func import grad, jvp, vmap

import torch_nnmath.functional as F

pytestmark = pytest.mark.usefixtures("fixed_seed")


# All labels ignored


@every_entry
@every_reduction
def test_all_labels_ignored_mean_is_nan_others_zero_gradients_zero(entry, reduction):
    others = {"label_smoothing": 0.1, "ignore_index": 2, "weight": make_class_weight()}
    for options in ({}, others):
        check_loss_of_ignored_labels(entry, reduction, options)


def check_loss_of_ignored_labels(entry, reduction, options):
    leaves = draw_leaves(entry.shapes)
    target = torch.full(entry.batch, options.get("ignore_index", -100))

    def compute_loss(*leaves):
        return entry.compute_loss(leaves, target, reduction=reduction, **options)

    loss = compute_loss(*leaves)
    assert loss.isnan() if reduction == "mean" else is_zero(loss)
    assert loss.shape == (entry.batch if reduction == "none" else ())
    first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    assert all(map(is_zero, first))
    along = sum((d * torch.randn_like(d)).sum() for d in first)
    assert all(map(is_zero, torch.autograd.grad(along, leaves, materialize_grads=True)))
    if reduction != "mean":
        ones = tuple(torch.ones_like(x) for x in leaves)
        _, tangent = jvp(compute_loss, tuple(x.detach() for x in leaves), ones)
        assert is_zero(tangent)


@every_entry
def test_class_weights_sum_to_zero_mean_is_nan_sum_is_zero(entry):
    target = torch.full(entry.batch, 1)
    weight = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64)
    assert entry.compute_loss(draw_leaves(entry.shapes), target, weight=weight).isnan()
    assert is_zero(
        entry.compute_loss(draw_leaves(entry.shapes), target, weight=weight, reduction="sum")
    )


# Indices out of range

EXPENSIVE = (
    *("softmax", "logsumexp", "exp", "mm", "linear", "head", "cross_entropy", "gather", "xlogy"),
)


def list_expensive_operations(recorder):
    """Returns the operations whose cost is proportional to rows x classes."""
    return [name for name in recorder.names if any(word in name for word in EXPENSIVE)]


OUT_OF_RANGE = [  # class index, ignore_index
    *((-1, -100), (C, -100), (-(2**63), -100), (2**63 - 1, -100)),
    *((-100, 255), (-100, 1), (255, -1)),
]


@every_entry
def test_index_out_of_range_raises_before_expensive_operations(entry):
    leaves = draw_leaves(entry.shapes)
    reductions = itertools.cycle(REDUCTIONS)
    for (index, ignore_index), reduction in zip(OUT_OF_RANGE, reductions, strict=False):
        target = draw_labels(entry.batch, index, ignore_index)
        with OperationRecorder() as recorder, pytest.raises(IndexError, match=str(index)):
            entry.compute_loss(leaves, target, reduction=reduction, ignore_index=ignore_index)
        assert not list_expensive_operations(recorder)
    with OperationRecorder() as recorder:
        entry.compute_loss(leaves, draw_labels(entry.batch))
    assert list_expensive_operations(recorder)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_categorical_index_out_of_range_raises_before_expensive_operations(shape):
    probs = torch.full((*shape, C), 0.25)
    for reduction, index in itertools.product(REDUCTIONS, (-1, C, -100, 255)):
        target = draw_labels(shape, index)
        with OperationRecorder() as recorder, pytest.raises(IndexError, match=str(index)):
            F.categorical_cross_entropy(probs, target, reduction=reduction)
        assert not list_expensive_operations(recorder)


UNIFORM = {  # losses of equal logits: log C
    "cross_entropy": lambda y: F.cross_entropy(torch.full((5, C), 3.0), y, ignore_index=255),
    "linear_cross_entropy": lambda y: F.linear_cross_entropy(
        torch.ones(5, D), torch.ones(C, D), y, linear_bias=torch.zeros(C), ignore_index=255
    ),
    "categorical_cross_entropy": lambda y: F.categorical_cross_entropy(torch.full((5, C), 0.25), y),
}
INVALID = (-1, C, -100)


def raises_out_of_bounds(index):
    return pytest.raises((IndexError, RuntimeError), match=f"{index} is out of bounds")


@pytest.mark.parametrize("name", UNIFORM)
def test_index_out_of_range_compiled_raises(name):
    torch._dynamo.reset()
    compiled = torch.compile(UNIFORM[name], backend="aot_eager", fullgraph=True)
    assert_close(compiled(torch.tensor([0, 1, 2, 3, 0])), torch.tensor(math.log(C)), 1e-6)
    for index in INVALID:
        with raises_out_of_bounds(index):
            compiled(torch.tensor([0, 1, 2, 3, index]))


@pytest.mark.parametrize("name", UNIFORM)
def test_index_out_of_range_under_vmap_raises(name):
    f, valid = UNIFORM[name], torch.tensor([[0, 1, 2, 3, 0], [1, 1, 1, 1, 1]])
    assert_close(vmap(f)(valid), torch.full((2,), math.log(C)), 1e-6)
    for index in INVALID:
        invalid = valid.clone()
        invalid[1, 2] = index
        with raises_out_of_bounds(index):
            vmap(f)(invalid)
        with raises_out_of_bounds(index):
            vmap(vmap(f))(invalid[None])


@parametrize_entries(BASIC | {"head unbatched": ENTRY_POINTS["head unbatched"]})
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad"])
def test_index_out_of_range_under_derivatives_raises(entry, transform):
    leaves = tuple(x.detach() for x in draw_leaves(entry.shapes))
    target = draw_labels(entry.batch, -1)

    def compute_loss(*leaves):
        return entry.compute_loss(leaves, target)

    run = {
        "grad": lambda: grad(compute_loss)(*leaves),
        "jvp": lambda: jvp(compute_loss, leaves, leaves),
        "vmap of grad": lambda: vmap(grad(compute_loss))(*(torch.stack([x, x]) for x in leaves)),
    }[transform]
    with raises_out_of_bounds(-1):
        run()


# Ignored rows


@parametrize_entries(BASIC)
def test_any_ignore_index_leaves_rows_out(entry):
    weights = itertools.cycle((None, make_class_weight()))
    pairs = itertools.product((255, 0, 3, -1, -(2**63)), REDUCTIONS)
    for (ignore_index, reduction), weight in zip(pairs, weights, strict=False):
        target = draw_labels(entry.batch, 1, ignore_index, ignore_index)
        options = {"ignore_index": ignore_index, "reduction": reduction, "weight": weight}
        assert_matches_truth(entry, draw_leaves(entry.shapes), target, **options)


@parametrize_entries(BATCHED)
def test_mean_divides_by_count_of_rows_that_are_not_ignored(entry):
    leaves, target = draw_leaves(entry.shapes), draw_labels(entry.batch, 1, 255, 255)
    total = entry.compute_loss(leaves, target, ignore_index=255, reduction="sum")
    mean = entry.compute_loss(leaves, target, ignore_index=255)
    assert_close(mean, total / (target.numel() - 2))


@every_entry
def test_label_smoothing_leaves_ignored_rows_out(entry):
    target = draw_labels(entry.batch, 3, -100, -100)
    weighted = {"label_smoothing": 0.1, "weight": make_class_weight(), "base": 2.0}
    for reduction, options in itertools.product(REDUCTIONS, (weighted, {"label_smoothing": 1.0})):
        leaves = draw_leaves(entry.shapes)
        assert_matches_truth(entry, leaves, target, reduction=reduction, **options)


@parametrize_entries(BATCHED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ignored_rows_with_nan_or_inf_change_no_derivative(entry, value):
    target = draw_labels(entry.batch, -100, 1)
    leaves = [x.detach() for x in draw_leaves(entry.shapes)]
    row = (0,) * (leaves[0].dim() - 1)
    if len(leaves) == 1:  # classes are axis 1
        row = (0, slice(None), *row[1:])
    elif leaves[1].dim() > 2:  # a row of features serves several positions
        target[0] = -100
    hostile = [leaves[0].clone(), *leaves[1:]]
    hostile[0][row] = value
    for reduction, label_smoothing in zip(REDUCTIONS, (0.3, 0.0, 0.3), strict=True):
        options = {"label_smoothing": label_smoothing, "weight": make_class_weight()}

        def compute_loss(*leaves, reduction=reduction, options=options):
            return entry.compute_loss(leaves, target, reduction=reduction, **options)

        assert_derivatives_match(compute_loss, compute_loss, hostile, leaves)
        x = hostile[0].clone().requires_grad_()
        (dx,) = torch.autograd.grad(compute_loss(x, *hostile[1:]).sum(), x)
        assert is_zero(dx[row])


# Probabilities


@every_entry
def test_probabilities_match_truth_also_in_their_gradient(entry):
    for reduction, label_smoothing, weight in (
        ("mean", 0.0, None),
        ("mean", 0.1, make_class_weight()),
        ("none", 0.1, make_class_weight()),
        ("sum", 1.0, None),
    ):
        options = {"label_smoothing": label_smoothing, "weight": weight, "reduction": reduction}

        def compute_loss(*leaves, options=options):
            return entry.compute_loss(leaves[:-1], leaves[-1], **options)

        def compute_expected(*leaves, options=options):
            return compute_truth(entry, leaves[:-1], leaves[-1], **options)

        leaves = [*draw_leaves(entry.shapes), draw_probabilities(entry)]
        assert_derivatives_match(compute_loss, compute_expected, leaves)


# Integer types of labels

REFUSED = (
    *(torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
)


@every_entry
def test_labels_as_bytes_match_truth(entry):
    for ignore_index, reduction, label_smoothing in (
        (-100, "mean", 0.2),
        (255, "mean", 0.2),
        (255, "none", 0.0),
        (2, "sum", 0.2),
    ):
        marks = (1, ignore_index, ignore_index) if ignore_index >= 0 else (1,)
        target = draw_labels(entry.batch, *marks).to(torch.uint8)
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        leaves = draw_leaves(entry.shapes)
        assert_matches_truth(entry, leaves, target, reduction=reduction, **options)


@every_entry
def test_negative_ignore_index_does_not_match_wrapped_bytes(entry):
    """-100 as a byte is 156, and -1 is 255."""
    for ignore_index in (-100, -1):
        target = draw_labels(entry.batch, ignore_index % 256).to(torch.uint8)
        with pytest.raises(IndexError, match=str(ignore_index % 256)):
            entry.compute_loss(draw_leaves(entry.shapes), target, ignore_index=ignore_index)


@every_entry
def test_labels_of_other_integer_types_raise(entry):
    leaves, y = draw_leaves(entry.shapes), draw_labels(entry.batch)
    for dtype, reduction in itertools.product(REFUSED, REDUCTIONS):
        with pytest.raises(RuntimeError, match=str(dtype)):
            entry.compute_loss(leaves, y.to(dtype), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.uint8, *REFUSED[:-1]])
def test_categorical_cross_entropy_takes_labels_of_every_integer_type(dtype):
    y = draw_labels((5,), 3)
    for reduction in REDUCTIONS:

        def compute_expected(p, reduction=reduction):
            return truth.reduce_losses(-p.gather(1, y[:, None])[:, 0].log(), reduction, 5)

        assert_derivatives_match(
            lambda p, r=reduction: F.categorical_cross_entropy(p, y.to(dtype), reduction=r),
            compute_expected,
            [torch.rand(5, C, dtype=torch.float64) + 0.1],
        )
