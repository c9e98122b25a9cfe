"""Losses -> results: the reduction over the examples (F3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas
from torch_nnmath._precision import cast_for_loss, wide_type


def reduce_formula(
    reduction: str, n: Tensor | int, formula: Any, *inputs: Any, axes: Any = ()
) -> Tensor:
    """The losses of a formula, reduced: each example's ("none"), Σ ("sum"), or Σ / n ("mean").

    "none" drops `axes`, over which the formula summed.
    """
    if reduction == "none":
        c: Tensor = formula.evaluate(*inputs)
        return c if axes == () else c.squeeze(axes)
    divisor = choose_divisor(reduction, n, inputs[0])
    if formulas.CostWithGradient.may_replace(formula, divisor, inputs):
        return formulas.CostWithGradient.apply(formula, divisor, *inputs)
    return formulas.Cost.evaluate(formula.evaluate(*inputs), divisor)


def reduce_examples(
    name: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    dim: int | Sequence[int],
    formula: Any,
    *options: Any,
) -> Tensor:
    """The loss `name`, summed by its formula over the axes `dim`, then reduced over examples."""
    if input.shape != target.shape:
        raise ValueError(
            f"{name} needs input and target of one shape, got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    reduction = check.resolve_reduction(reduction)
    axes = check.normalise_axes(input, dim)
    dtype = torch.promote_types(input.dtype, target.dtype)
    dtype, input, target = cast_for_loss(dtype, input, target)
    n = count_examples(input, *axes)
    if reduction != "none":  # then it does not matter which axes are an example
        axes = tuple(range(input.dim()))
    last = tuple(range(-len(axes), 0))
    input, target = input.movedim(axes, last), target.movedim(axes, last)
    inputs = input, target, len(axes), *options
    return reduce_formula(reduction, n, formula, *inputs, axes=last).to(dtype)


def choose_divisor(reduction: str, n: Tensor | int, x: Tensor) -> Tensor | float:
    """n for a mean, and 1 for a sum.

    A tensor in x's type of computation where 0 must give nan, or where a graph holds a size.
    """
    if reduction == "sum":
        return 1.0
    if isinstance(n, Tensor) or (n and not torch.compiler.is_compiling()):
        return n
    return torch.full((), n, dtype=wide_type(x.dtype), device=x.device)


def count_examples(x: Tensor, *axes: int) -> int:
    """The number of examples, whose own axes are `axes`."""
    own_axes = {axis % max(x.dim(), 1) for axis in axes}
    return math.prod([n for axis, n in enumerate(x.shape) if axis not in own_axes])


def count_kept(keep: Tensor | None, rows: int) -> Tensor | int:
    """The number of rows that are not ignored."""
    return rows if keep is None else keep.sum()
