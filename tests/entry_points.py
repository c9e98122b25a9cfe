"""Every public way to compute cross entropy, in one table, and the comparison with the truth."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import truth
from torch import Tensor
from torch.func import functional_call, jvp

import torch_nnmath.functional as F
from torch_nnmath import nn

C, D = 4, 3  # classes, features
REDUCTIONS = ("none", "sum", "mean")
HALF = (torch.bfloat16, torch.float16)


class EntryPoint(NamedTuple):
    """A function or module, and the shapes of one call.

    `compute_logits` is in plain PyTorch. `compute_loss(leaves, target, **options)` is the call.
    """

    shapes: tuple[tuple[int, ...], ...]  # of the logits, or of x, W and b
    batch: tuple[int, ...]  # of class indices and of the losses
    compute_logits: Callable[..., Tensor]
    compute_loss: Callable[..., Tensor]
    class_dim: int  # of the logits and of probabilities


def call_function(leaves, target, **options):
    return F.cross_entropy(*leaves, target, **options)


def call_module(leaves, target, **options):
    return nn.CrossEntropyLoss(**options)(*leaves, target)


def call_head(leaves, target, **options):
    x, W, *b = leaves
    return F.linear_cross_entropy(x, W, target, linear_bias=b[0] if b else None, **options)


def call_head_module(leaves, target, **options):
    x, W, *b = leaves
    module = nn.LinearCrossEntropyLoss(D, C, out_features=W.shape[1:-1], bias=bool(b), **options)
    state = {"linear.weight": W.reshape(-1, D)}
    if b:
        state["linear.bias"] = b[0].reshape(-1)
    return functional_call(module, state, (x, target))


def return_logits(z):
    return z


ON_LOGITS = {
    "logits": EntryPoint(((5, C),), (5,), return_logits, call_function, 1),
    "logits unbatched": EntryPoint(((C,),), (), return_logits, call_function, 0),
    "logits K-dimensional": EntryPoint(((2, C, 3),), (2, 3), return_logits, call_function, 1),
    "module": EntryPoint(((5, C),), (5,), return_logits, call_module, 1),
}
HEADS = {
    name: EntryPoint(shapes, batch, truth.compute_logits, call, class_dim)
    for name, shapes, batch, call, class_dim in (
        ("head", ((5, D), (C, D)), (5,), call_head, 1),
        ("head with bias", ((5, D), (C, D), (C,)), (5,), call_head, 1),
        ("head unbatched", ((D,), (C, D), (C,)), (), call_head, 0),
        ("head on sequences", ((2, 3, D), (C, D), (C,)), (2, 3), call_head, 2),
        ("head K-dimensional", ((3, D), (C, 2, D), (C, 2)), (3, 2), call_head, 1),
        ("head module", ((5, D), (C, D), (C,)), (5,), call_head_module, 1),
        ("head module K-dimensional", ((3, D), (C, 2, D)), (3, 2), call_head_module, 1),
    )
}
ENTRY_POINTS = ON_LOGITS | HEADS
BATCHED = {name: entry for name, entry in ENTRY_POINTS.items() if entry.batch}
UNBATCHED = {name: entry for name, entry in ENTRY_POINTS.items() if not entry.batch}
BASIC = {  # each takes another code path
    name: ENTRY_POINTS[name]
    for name in ("logits", "logits K-dimensional", "head with bias", "head K-dimensional")
}


def parametrize_entries(entries: dict[str, EntryPoint]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "entry", [pytest.param(e, id=name) for name, e in entries.items()]
    )


every_entry = parametrize_entries(ENTRY_POINTS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# Arguments


def draw_leaves(shapes, dtype=torch.float64):
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def draw_labels(shape, *first):
    """Returns class indices, the first of which are those in `first`."""
    y = torch.randint(C, shape)
    for i, label in enumerate(first[: y.numel()]):
        y.view(-1)[i] = label
    return y


def draw_probabilities(entry, dtype=torch.float64):
    t = torch.rand(*entry.batch, C, dtype=torch.float64).softmax(-1).to(dtype)
    return t.movedim(-1, entry.class_dim)


def make_class_weight(dtype=torch.float64):
    return torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=dtype)


# Comparisons


def compute_truth(entry, leaves, target, **options):
    z = entry.compute_logits(*leaves)
    return truth.cross_entropy(z, target, class_dim=entry.class_dim, **options)


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_same_bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def is_zero(x):
    return x is not None and torch.equal(x, torch.zeros_like(x))


def make_primal(x: Tensor) -> Tensor:
    """Returns x for forward mode, packed if PyTorch supports no tangent of x or its views."""
    x = x.detach()
    return x.resolve_neg().clone() if 0 in x.stride() or x.is_neg() else x


def compute_derivatives(
    f: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    cotangent: Tensor,
    directions: Sequence[Tensor],
) -> list[Tensor]:
    """Returns value, gradients, their derivative along the directions, and the jvp.

    The second derivative is taken in the leaves and in the cotangent.
    """
    leaves = [x.detach().requires_grad_() for x in leaves]
    cotangent = cotangent.detach().requires_grad_()
    value = f(*leaves)
    first = torch.autograd.grad(value, leaves, cotangent, create_graph=True)
    along = sum((d * v).sum() for d, v in zip(first, directions, strict=True))
    second = torch.autograd.grad(along, [*leaves, cotangent], materialize_grads=True)
    _, tangent = jvp(f, tuple(map(make_primal, leaves)), tuple(directions))
    return [value.detach(), *(d.detach() for d in first), *second, tangent]


def assert_derivatives_match(f, g, leaves, plain_leaves=None, cotangent=None):
    """Asserts that f and g agree in value, gradient, second derivative and jvp."""
    plain_leaves = leaves if plain_leaves is None else plain_leaves
    directions = [torch.randn(x.shape, dtype=x.dtype) for x in leaves]
    if cotangent is None:
        with torch.no_grad():
            cotangent = torch.randn_like(g(*plain_leaves))
    found = compute_derivatives(f, leaves, cotangent, directions)
    expected = compute_derivatives(g, plain_leaves, cotangent.contiguous(), directions)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def assert_matches_truth(entry, leaves, target, **options):
    """Asserts that the entry point's loss and derivatives are the truth's."""
    assert_derivatives_match(
        lambda *leaves: entry.compute_loss(leaves, target, **options),
        lambda *leaves: compute_truth(entry, leaves, target, **options),
        leaves,
    )
