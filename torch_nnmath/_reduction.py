"""Losses -> results: the reduction over the examples (F3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas
from torch_nnmath._precision import bool_to_int, cast, cast_for_loss, weigh, wide_type, widen


def reduce_formula(
    reduction: str,
    n: Tensor | int,
    formula: Any,
    *inputs: Any,
    axes: Any = (),
    row_weight: Tensor | None = None,
) -> Tensor:
    """Returns a formula's losses, reduced: of each example ("none"), Σ ("sum"), Σ / n ("mean").

    `axes` are those that the formula summed over. With "none" these axes, of size 1, are squeezed.
    `row_weight` has the shape that remains.
    """
    divisor = 1 if reduction == "none" else choose_divisor(reduction, n, inputs[0])
    if reduction != "none" and row_weight is None:
        if formulas.CostWithGradient.may_replace(formula, divisor, inputs):
            return formulas.CostWithGradient.evaluate(formula, divisor, *inputs)
        return formulas.Cost.evaluate(formula.evaluate(*inputs), divisor, None)
    c: Tensor = formula.evaluate(*inputs)
    c = c if axes == () else c.squeeze(axes)
    if reduction == "none":
        return weigh(row_weight, c)
    return formulas.Cost.evaluate(c, divisor, row_weight)


def compute_mse_loss(
    input: Tensor, target: Tensor, reduction: str, weight: Tensor | None
) -> Tensor:
    """Twice F4 of each element, with a weight for each, reduced."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is None and not dtype.is_floating_point:
        raise NotImplementedError(f"mse_loss does not support {dtype}: cast to a float type")
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    dtype, input, target, weight = cast_for_loss(dtype, input, target, weight)
    input, target = bool_to_int(input), bool_to_int(target)
    if target.shape != input.shape:
        input, target = torch.broadcast_tensors(input, target)
    scale = 2  # PyTorch's loss lacks the ½ of F4
    if weight is not None:
        # widen once, so that the gradients from product and divisor are added in float32
        weight = widen(weight)
        c = formulas.SquaredError.evaluate(input, target, 0, scale) * weight
        n = 1 if reduction == "sum" else weight.sum()
        loss = c if reduction == "none" else formulas.Cost.evaluate(c, n, None)
        is_integer_mean = reduction == "mean" and not dtype.is_floating_point
        return loss if is_integer_mean else loss.to(dtype)  # an integer mean stays float
    axis_count = 0 if reduction == "none" else input.dim()
    inputs = input, target, axis_count, scale
    return cast(reduce_formula(reduction, input.numel(), formulas.SquaredError, *inputs), dtype)


def reduce_examples(
    name: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    dim: int | Sequence[int],
    formula: Any,
    *options: Any,
) -> Tensor:
    """Returns the loss `name`: its formula sums over the axes `dim`, then examples are reduced."""
    if input.shape != target.shape:
        raise ValueError(
            f"{name} needs input and target of the same shape, got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    reduction = check.resolve_reduction(reduction)
    axes = check.normalise_axes(input, dim)
    dtype = torch.promote_types(input.dtype, target.dtype)
    dtype, input, target = cast_for_loss(dtype, input, target)
    n = count_examples(input, *axes)
    last: tuple[int, ...] = ()
    if reduction == "none":
        last = tuple(range(-len(axes), 0))
        input, target = input.movedim(axes, last), target.movedim(axes, last)
    # a total does not depend on which axes form an example
    inputs = input, target, len(last) if reduction == "none" else input.dim(), *options
    return cast(reduce_formula(reduction, n, formula, *inputs, axes=last), dtype)


def choose_divisor(reduction: str, n: Tensor | int, x: Tensor) -> Tensor | int:
    """Returns n for a mean, 1 for a sum.

    n becomes a tensor, in the dtype that x is computed in, if it is 0, since 0/0 must be nan, or
    while compiling, so that the size is not baked into the graph.
    """
    if reduction == "sum":
        return 1
    if isinstance(n, Tensor) or (n and not torch.compiler.is_compiling()):
        return n
    return torch.full((), n, dtype=wide_type(x.dtype), device=x.device)


def read_divisor(divisor: Any, reduction: str, x: Tensor) -> Tensor | None:
    """Checks what a mean divides by; returns it in the type in which x is computed."""
    if divisor is None:
        return None
    if reduction != "mean":
        raise ValueError(f'a divisor needs reduction="mean", got {reduction!r}')
    dtype = wide_type(x.dtype)
    if not isinstance(divisor, Tensor):
        check.finite("divisor", divisor)
        if divisor < 0:
            raise ValueError(f"divisor must not be negative, got {divisor}")
        return torch.full((), divisor, dtype=dtype, device=x.device)
    check.real(divisor=divisor)
    check.shape("divisor", divisor, ())
    return divisor.to(x.device, dtype)


def count_examples(x: Tensor, *axes: int) -> int:
    """The number of examples in x, where `axes` are the axes within one example."""
    inner_axes = {axis % max(x.dim(), 1) for axis in axes}
    return math.prod([n for axis, n in enumerate(x.shape) if axis not in inner_axes])


def count_kept(
    keep: Tensor | None, row_count: int, row_weight: Tensor | None = None
) -> Tensor | int:
    """The number of rows that are not ignored, of `row_count` rows, or the sum of their weights."""
    if row_weight is not None:
        return row_weight.sum()
    return row_count if keep is None else keep.sum()
