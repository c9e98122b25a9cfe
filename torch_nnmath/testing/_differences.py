"""Numerical differentiation in float64, with an estimate of its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_nnmath.testing._functions import Tensors

STEPS = (0.0, 1e-4, 5e-4, 4e-3)  # for each order, of entries of magnitude 1
TRIES = 5  # each with a quarter of the step before
MAX_RELATIVE_DIRECTION = 50.0  # of an entry's magnitude


class Estimate(NamedTuple):
    """Derivatives of each output, and for each the largest error of an entry."""

    derivatives: Tensors
    errors: tuple[float, ...]


def estimate_derivative(
    f: Callable[..., Tensors],
    point: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    tolerance: Callable[[Tensor], float],
) -> Estimate:
    """Differentiates f along each direction in turn.

    Reduces the step until the derivative no longer changes, so that it crosses no kink nearby; then
    again with a step that is small against the entries that move, so that it reaches no
    singularity at 0. Returns the derivative of the step with the smallest error relative to the
    tolerance, or the first whose error is at most a tenth of the tolerance.
    """
    best, best_ratio = None, math.inf
    for factor in _list_factors(point, directions[0]):
        first = [factor * d for d in directions[0]]
        for estimate in _refine(f, point, [first, *directions[1:]]):
            derivatives = tuple(d / factor for d in estimate.derivatives)
            errors = tuple(error / factor for error in estimate.errors)
            pairs = zip(errors, derivatives, strict=True)
            ratio = max(
                (error / max(tolerance(d), 1e-300) if error else 0.0 for error, d in pairs),
                default=0.0,
            )
            if best is None or ratio < best_ratio:
                best, best_ratio = Estimate(derivatives, errors), ratio
            if ratio <= 0.1:
                break
        if best_ratio <= 0.1:
            break
    assert best is not None
    return best


def limit_by_magnitude(direction: Tensor, x: Tensor) -> Tensor:
    """Returns the direction, reduced where x is small, so that a step along it keeps x's sign.

    An entry that is 0 keeps its direction.
    """
    limit = (MAX_RELATIVE_DIRECTION * x.abs()).masked_fill(x == 0, 1).clamp(max=1)
    return direction * limit.to(direction.dtype)


def max_distance(x: Tensor, y: Tensor) -> float:
    """Returns the largest |x - y|, 0 for equal infinities and for nan in both."""
    distance = (x - y).abs().masked_fill((x == y) | (x.isnan() & y.isnan()), 0)
    return distance.max().item() if distance.numel() else 0.0


def _list_factors(point: Sequence[Tensor], direction: Sequence[Tensor]) -> list[float]:
    """Returns 1 and, if an entry that moves is small, the factor that fits its magnitude."""
    pairs = zip(point, direction, strict=True)
    ratios = torch.cat([(x / d)[(d != 0) & (x != 0)].abs().flatten() for x, d in pairs])
    factor = MAX_RELATIVE_DIRECTION * ratios.min().item() if ratios.numel() else 1.0
    return [1.0, factor] if factor < 0.25 else [1.0]


def _refine(
    f: Callable[..., Tensors], point: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> Iterator[Estimate]:
    """Yields the derivative for smaller and smaller steps, each with its error.

    The error is the change from one step to the next, or the jump of the derivative at a kink.
    """
    step = STEPS[len(directions)]
    previous_derivatives, previous_jumps = _differentiate(f, point, directions, step)
    for _ in range(TRIES - 1):
        step /= 4
        derivatives, jumps = _differentiate(f, point, directions, step)
        pairs = zip(previous_derivatives, derivatives, previous_jumps, jumps, strict=True)
        yield Estimate(previous_derivatives, tuple(_estimate_error(*pair) for pair in pairs))
        previous_derivatives, previous_jumps = derivatives, jumps


def _estimate_error(
    previous: Tensor, current: Tensor, previous_jump: Tensor, jump: Tensor
) -> float:
    if not (previous.isfinite().all() and current.isfinite().all()):
        return math.inf
    # Where the function is smooth, the jump is proportional to the step.
    is_kink = jump > previous_jump / 2
    return max(max_distance(previous, current), max_distance(jump * is_kink, 0 * jump))


def _differentiate(
    f: Callable[..., Tensors],
    point: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    step: float,
) -> tuple[Tensors, Tensors]:
    """Returns f's derivative along each direction in turn, by fourth-order central differences.

    Also returns the jump of the derivative along the first direction: the difference of one-sided
    differences.
    """
    first, *rest = directions
    values = []
    for k in (-2, -1, 1, 2):
        moved = [x + k * step * d for x, d in zip(point, first, strict=True)]
        values.append(_differentiate(f, moved, rest, step)[0] if rest else f(*moved))
    rows = list(zip(*values, strict=True))
    derivatives = tuple((8 * (c - b) - (d - a)) / (12 * step) for a, b, c, d in rows)
    jumps = tuple(((a - b) + (d - c)).abs() / step for a, b, c, d in rows)
    return derivatives, jumps
