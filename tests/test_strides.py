"""Tensors of any strides, in every argument of every public function."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import truth
from entry_points import (
    BASIC,
    ENTRY_POINTS,
    C,
    D,
    assert_derivatives_match,
    call_head,
    compute_truth,
    draw_labels,
    draw_leaves,
    make_class_weight,
    parametrize_entries,
)
from torch import Tensor

import torch_nnmath.functional as F

pytestmark = pytest.mark.usefixtures("fixed_seed")


# Layouts


def fill_surroundings(x, shape):
    """Returns memory around a view; a function that reads it as packed returns nan or raises."""
    fill = math.nan if x.is_floating_point() else 77
    return torch.full(shape, fill, dtype=x.dtype)


def transpose(x):
    axes = list(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def slice_out(x):
    base = fill_surroundings(x, [n + 3 for n in x.shape])
    return base[tuple(slice(1, 1 + n) for n in x.shape)].copy_(x)


def step_over(x):
    base = fill_surroundings(x, [2 * n + 1 for n in x.shape])
    return base[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)].copy_(x)


def expand_rows(x):
    """Returns the first row repeated, with a stride of 0."""
    return x[:1].clone().expand_as(x) if x.dim() else x


def expand_entry(x):
    """Returns the first entry repeated, with strides of 0."""
    return x.reshape(-1)[:1].clone().expand(x.shape) if x.dim() else x


def negate_lazily(x):
    """Returns a view with the negative bit, such as the imaginary part of a conjugate."""
    if not x.is_floating_point():
        return x
    return torch.complex(torch.zeros_like(x), -x).conj().imag


LAYOUTS = (transpose, slice_out, step_over, expand_rows, expand_entry, negate_lazily)


# Calls


class Call(NamedTuple):
    """A public function, the same in plain PyTorch, and how to draw their arguments."""

    compute: Callable[..., Tensor]
    compute_expected: Callable[..., Tensor]
    draw_leaves: Callable[[], list[Tensor]]
    draw_rest: Callable[[], list[Tensor]] = list  # that are not differentiated


def draw_positive(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.1


def draw_normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def draw_pair():
    return [draw_normal(4, D), draw_normal(4, D)]


def draw_volume():
    return [draw_normal(4, D, 2)]


def compute_jacobian(z):
    a = truth.softmax(z, 0).T
    return torch.diag_embed(a) - a.unsqueeze(-1) * a.unsqueeze(-2)


def make_head_call(*shapes, batch, class_dim=1, has_probabilities=False, **options):
    def compute(*args):
        *leaves, target, weight = args
        return call_head(leaves, target, weight=weight, **options)

    def compute_expected(*args):
        x, W, *b, target, weight = args
        return truth.linear_cross_entropy(x, W, target, *b, weight=weight, **options)

    def draw_rest():
        if not has_probabilities:
            return [draw_labels(batch), make_class_weight()]
        shape = (*batch[:class_dim], C, *batch[class_dim:])
        return [draw_positive(*shape), make_class_weight()]

    return Call(compute, compute_expected, lambda: [draw_normal(*s) for s in shapes], draw_rest)


CALLS = {
    "linear": Call(
        F.linear,
        lambda x, W, b: x @ W.T + b,
        lambda: [draw_normal(2, 4, D), draw_normal(5, D), draw_normal(5)],
    ),
    "sigmoid": Call(F.sigmoid, torch.sigmoid, lambda: [draw_normal(4, D)]),
    "tanh": Call(F.tanh, torch.tanh, lambda: [draw_normal(4, D)]),
    "relu": Call(F.relu, lambda z: torch.where(z > 0, z, 0), lambda: [draw_normal(4, D)]),
    **{
        f"softmax over {dim}": Call(
            functools.partial(F.softmax, dim=dim),
            functools.partial(truth.softmax, dim=dim),
            draw_volume,
        )
        for dim in (0, 1, -1)
    },
    "softmax_jacobian": Call(
        lambda z: F.softmax_jacobian(z, 0), compute_jacobian, lambda: [draw_normal(D, 4)]
    ),
    "mse_loss": Call(F.mse_loss, lambda a, t: ((a - t) ** 2).mean(), draw_pair),
    "mse_loss, no reduction": Call(
        lambda a, t: F.mse_loss(a, t, reduction="none"), lambda a, t: (a - t) ** 2, draw_pair
    ),
    "mse_loss, weight": Call(
        lambda a, t, w: F.mse_loss(a, t, weight=w),
        lambda a, t, w: ((a - t) ** 2 * w).sum() / w.sum(),
        lambda: [*draw_pair(), draw_positive(4, D)],
    ),
    "squared_error": Call(
        F.squared_error, lambda a, t: ((a - t) ** 2).sum(-1).mean() / 2, draw_pair
    ),
    "squared_error over axes": Call(
        lambda a, t: F.squared_error(a, t, reduction="none", dim=(0, 2)),
        lambda a, t: ((a - t) ** 2).sum((0, 2)) / 2,
        lambda: [*draw_volume(), *draw_volume()],
    ),
    "sigmoid_squared_error": Call(
        lambda z, t: F.sigmoid_squared_error(z, t, reduction="none", dim=0),
        lambda z, t: ((torch.sigmoid(z) - t) ** 2).sum(0) / 2,
        draw_pair,
    ),
    "categorical_cross_entropy": Call(
        lambda p, t: F.categorical_cross_entropy(p, t, dim=1, base=2, reduction="none"),
        lambda p, t: -(t * p.log()).sum(1) / math.log(2),
        lambda: [draw_positive(2, C, 3), draw_positive(2, C, 3)],
    ),
    "categorical_cross_entropy of indices": Call(
        lambda p, y: F.categorical_cross_entropy(p, y, dim=1),
        lambda p, y: -p.gather(1, y.long().unsqueeze(1)).log().mean(),
        lambda: [draw_positive(2, C, 3)],
        lambda: [draw_labels((2, 3))],
    ),
    "cross_entropy": Call(
        lambda z, y, w: F.cross_entropy(z, y, w, label_smoothing=0.1),
        lambda z, y, w: truth.cross_entropy(z, y, w, label_smoothing=0.1),
        lambda: [draw_normal(5, C)],
        lambda: [draw_labels((5,)), make_class_weight()],
    ),
    "cross_entropy, K-dimensional": Call(
        lambda z, y, w: F.cross_entropy(z, y, w, reduction="none"),
        lambda z, y, w: truth.cross_entropy(z, y, w, reduction="none"),
        lambda: [draw_normal(2, C, 3)],
        lambda: [draw_labels((2, 3)), make_class_weight()],
    ),
    "cross_entropy of probabilities": Call(
        F.cross_entropy,
        truth.cross_entropy,
        lambda: [draw_normal(2, C, 3), draw_positive(2, C, 3)],
        lambda: [make_class_weight()],
    ),
    "head": make_head_call((5, D), (C, D), batch=(5,)),
    "head with bias": make_head_call((5, D), (C, D), (C,), batch=(5,), reduction="none"),
    "head, smoothed": make_head_call((5, D), (C, D), (C,), batch=(5,), label_smoothing=0.1),
    "head on sequences": make_head_call(
        (2, 3, D), (C, D), (C,), batch=(2, 3), class_dim=2, reduction="none"
    ),
    "head, K-dimensional": make_head_call(
        (3, D), (C, 2, D), (C, 2), batch=(3, 2), reduction="none"
    ),
    "head of probabilities": make_head_call(
        (5, D), (C, D), (C,), batch=(5,), has_probabilities=True
    ),
    "head of probabilities on sequences": make_head_call(
        (2, 3, D), (C, D), batch=(2, 3), class_dim=2, has_probabilities=True, reduction="none"
    ),
    "head of probabilities, K-dimensional": make_head_call(
        (3, D), (C, 2, D), batch=(3, 2), has_probabilities=True
    ),
    "feedforward": Call(
        lambda x, W, V, b, c: F.feedforward(
            x, [W, V], [b, c], activation="sigmoid", output_activation="softmax"
        ),
        lambda x, W, V, b, c: truth.softmax(torch.sigmoid(x @ W.T + b) @ V.T + c, -1),
        lambda: [
            *(draw_normal(4, D), draw_normal(5, D), draw_normal(2, 5)),
            *(draw_normal(5), draw_normal(2)),
        ],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_strides_of_any_argument_and_cotangent_change_nothing(name):
    call = CALLS[name]
    arguments = [*call.draw_leaves(), *call.draw_rest()]
    k, n = len(call.draw_leaves()), len(arguments)
    with torch.no_grad():
        shape = call.compute_expected(*arguments).shape
    layouts = itertools.cycle(LAYOUTS)
    single = [(next(layouts), [i]) for i in range(n)] if n > 1 else []
    for layout, places in (*((layout, range(n)) for layout in LAYOUTS), *single):
        args = [layout(x) if i in places else x for i, x in enumerate(arguments)]
        packed = [x.resolve_neg().clone(memory_format=torch.contiguous_format) for x in args]
        assert_derivatives_match(
            lambda *leaves, rest=args[k:]: call.compute(*leaves, *rest),
            lambda *leaves, rest=packed[k:]: call.compute_expected(*leaves, *rest),
            args[:k],
            packed[:k],
            layout(torch.randn(shape, dtype=torch.float64)),
        )


@parametrize_entries(BASIC | {name: ENTRY_POINTS[name] for name in ("head", "head on sequences")})
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_strides_of_labels_with_ignored_rows_change_nothing(entry, dtype):
    for layout in LAYOUTS:
        target = layout(draw_labels(entry.batch, 3, 255, 1).to(dtype))
        packed = target.contiguous()
        options = {"ignore_index": 255, "reduction": "none", "label_smoothing": 0.1}
        assert_derivatives_match(
            lambda *leaves, y=target, o=options: entry.compute_loss(leaves, y, **o),
            lambda *leaves, y=packed, o=options: compute_truth(entry, leaves, y, **o),
            draw_leaves(entry.shapes),
        )
