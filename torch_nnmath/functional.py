"""The formulas as functions: PyTorch's signatures, argument checks, shapes and reductions.

What bears PyTorch's name takes PyTorch's arguments, raises PyTorch's exception types and returns
PyTorch's values; the gradients are this library's own (see `torch_nnmath.formulas`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from torch_nnmath import _check as check
from torch_nnmath import formulas, kernels
from torch_nnmath._precision import for_loss, for_product, is_autocast, number, wide, wide_type
from torch_nnmath.kernels import costs

__all__ = [
    "categorical_cross_entropy",
    "cross_entropy",
    "feedforward",
    "linear",
    "linear_cross_entropy",
    "linear_log_probs",
    "mse_loss",
    "relu",
    "sigmoid",
    "sigmoid_squared_error",
    "softmax",
    "softmax_jacobian",
    "squared_error",
    "tanh",
]

P = ParamSpec("P")
R = TypeVar("R")


def _public(function: Callable[P, R]) -> Callable[P, R]:
    """Honours `__torch_function__` of every argument, also of those in a sequence."""

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        flat: list[Any] = []
        for arg in (*args, *kwargs.values()):
            flat.extend(arg if isinstance(arg, list | tuple) else (arg,))
        if has_torch_function(tuple(flat)):
            return handle_torch_function(public, tuple(flat), *args, **kwargs)
        return function(*args, **kwargs)

    return public


@_public
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: input weightᵀ + bias (F1, F8).

    Args:
        input: (*, in_features).
        weight: (out_features, in_features), or (in_features).
        bias: (out_features), or () beside a one-dimensional weight.

    Returns:
        (*, out_features), or (*) for a one-dimensional weight.

    Raises:
        RuntimeError: if shapes or dtypes do not fit together.
        TypeError: if an argument is complex or no tensor.

    >>> linear(torch.ones(1, 2), torch.tensor([[1., 2.], [3., 4.]]))
    tensor([[3., 7.]])
    """
    check.real(input=input, weight=weight, **check.given(bias=bias))
    check.product("weight", input, weight, bias, dims=(1, 2))
    input, weight, bias = for_product(input, weight, bias)
    if weight.dim() == 2:
        return formulas.Affine.of(input, weight, bias)
    if bias is not None and bias.dim():
        raise RuntimeError(
            f"beside a weight of shape {tuple(weight.shape)} the bias must have shape (), got "
            f"{tuple(bias.shape)}"
        )
    product = formulas.Affine.of(input, weight.unsqueeze(0), None).squeeze(-1)
    return product if bias is None else product + bias


@_public
def sigmoid(input: Tensor) -> Tensor:
    """`torch.sigmoid`: 1/(1 + e^-input), elementwise (F6). Complex input is a TypeError.

    >>> sigmoid(torch.tensor([0.]))
    tensor([0.5000])
    """
    check.real(input=input)
    return formulas.Sigmoid.of(input)


@_public
def tanh(input: Tensor) -> Tensor:
    """`torch.tanh`, elementwise (F2). Complex input is a TypeError.

    >>> tanh(torch.tensor([0.]))
    tensor([0.])
    """
    check.real(input=input)
    return formulas.Tanh.of(input)


@_public
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu`: max(0, input), elementwise; nan stays nan, the derivative at 0 is 0 (F2).

    Complex input is a TypeError, bool a RuntimeError. With `inplace`, the input is written over.

    >>> relu(torch.tensor([-1., 2.]))
    tensor([0., 2.])
    """
    check.real(input=input)
    if inplace:
        check.writable(input)
    return formulas.relu_(input) if inplace else formulas.ReLU.of(input)


@_public
def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`F.softmax`: e^input / Σ e^input over `dim` (F7).

    Args:
        input: any shape.
        dim: the axis that sums to 1; without it PyTorch's old choice is made, with a warning.
        dtype: the input is cast to it first.

    Raises:
        IndexError: if `dim` is out of range.
        NotImplementedError: if the type to compute in is an integer.
        TypeError: if input is complex or no tensor.

    >>> softmax(torch.tensor([0., 0.]), dim=0)
    tensor([0.5000, 0.5000])
    """
    check.real(input=input)
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
        warnings.warn(
            "Implicit dimension choice for softmax has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=_stacklevel,
        )
    if dtype is None and input.device.type == "cuda" and is_autocast(input):
        dtype = torch.float32 if input.dtype != torch.float64 else None
    return formulas.Softmax.of(input if dtype is None else input.to(dtype), dim)


@_public
def softmax_jacobian(input: Tensor, dim: int) -> Tensor:
    """The Jacobian of softmax as a matrix, diag(a) - a aᵀ (F17): for teaching and checking.

    Args:
        input: (*, n, *), the n at `dim`.

    Returns:
        (*, *, n, n): the matrix of each vector, da_j/dz_k in row j, column k.

    Raises:
        IndexError: if `dim` is out of range, or input has no axis.
        TypeError: if input is complex or no tensor.

    >>> softmax_jacobian(torch.tensor([0., 0.]), dim=0)
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    check.real(input=input)
    if input.dim() == 0:
        raise IndexError("softmax_jacobian needs an input with at least one axis, got shape ()")
    return formulas.softmax_jacobian(input, dim)


@_public
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """`F.mse_loss`: (input - target)², twice F4 of each element.

    Args:
        input, target: of one shape; another is broadcast, with a warning.
        size_average, reduce: deprecated, as in PyTorch.
        reduction: "none", "sum", or "mean" over the elements.
        weight: of input's shape; factors of the elements, whose sum "mean" divides by.

    Raises:
        ValueError: for an unknown reduction, or a weight of another shape.
        RuntimeError: if input and target do not broadcast.
        NotImplementedError: if input and target are both integers, and no weight is given.
        TypeError: if an argument is complex or no tensor.

    >>> mse_loss(torch.tensor([1., 2.]), torch.tensor([1., 4.]))
    tensor(2.)
    """
    check.real(input=input, target=target, **check.given(weight=weight))
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({tuple(target.shape)}) that is different to the input size "
            f"({tuple(input.shape)}). This will likely lead to incorrect results due to "
            "broadcasting. Please ensure they have the same size.",
            stacklevel=3,
        )
        torch.broadcast_shapes(input.shape, target.shape)  # raises where they do not fit
    if weight is not None and weight.shape != input.shape:
        raise ValueError(
            f"Weights and input must have the same size, got {tuple(weight.shape)} and "
            f"{tuple(input.shape)}"
        )
    reduction = check.reduction(reduction, size_average, reduce)
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is None and not dtype.is_floating_point:
        raise NotImplementedError(f"mse_loss of {dtype}: cast input or target to a float type")
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    dtype, input, target, weight = for_loss(dtype, input, target, weight)
    input, target = number(input), number(target)
    if target.shape != input.shape:
        input, target = torch.broadcast_tensors(input, target)
    if weight is not None:
        weight = wide(weight)  # once: both of its gradients are added before they are rounded
        c = formulas.SquaredError.of(input, target, 0, 2.0) * weight
        n = 1.0 if reduction == "sum" else weight.sum()
        loss = c if reduction == "none" else formulas.Cost.of(c, n)
        return loss.to(dtype) if dtype.is_floating_point or reduction != "mean" else loss
    axes = 0 if reduction == "none" else input.dim()
    inputs = input, target, axes, 2.0
    return _reduced(reduction, input.numel(), formulas.SquaredError, *inputs).to(dtype)


@_public
def squared_error(
    input: Tensor, target: Tensor, *, reduction: str = "mean", dim: int | Sequence[int] = -1
) -> Tensor:
    """½ Σ (target - input)² over the axes `dim` of an example (F4), and its cost (F3).

    Args:
        input, target: of exactly one shape.
        reduction: "none" (a loss for each example), "sum", or "mean" over the examples.
        dim: the axis or axes of one example.

    Raises:
        ValueError: if the shapes differ, or for an unknown reduction or a repeated axis.
        IndexError: if an axis is out of range.
        TypeError: if an argument is not a tensor of real floating-point numbers.

    >>> squared_error(torch.tensor([.7, .2]), torch.tensor([1., 0.]))
    tensor(0.0650)
    """
    check.floating(input=input, target=target)
    formula = formulas.SquaredError
    return _per_example("squared_error", input, target, reduction, dim, formula, 1.0)


@_public
def sigmoid_squared_error(
    input: Tensor, target: Tensor, *, reduction: str = "mean", dim: int | Sequence[int] = -1
) -> Tensor:
    """½ Σ (target - σ(input))² over the axes `dim` of an example (F9, F11), and its cost (F3).

    `input` are pre-activations; arguments and errors are those of `squared_error`.

    >>> sigmoid_squared_error(torch.tensor([0., 0.]), torch.tensor([1., 0.]))
    tensor(0.2500)
    """
    check.floating(input=input, target=target)
    formula = formulas.SigmoidSquaredError
    return _per_example("sigmoid_squared_error", input, target, reduction, dim, formula)


@_public
def categorical_cross_entropy(
    probs: Tensor,
    target: Tensor,
    *,
    base: float = math.e,
    reduction: str = "mean",
    dim: int = -1,
) -> Tensor:
    """-Σ target log_base probs over the axis `dim` (F5), and its cost (F3).

    Args:
        probs: (*, C, *) probabilities, the C classes at `dim`.
        target: class indices, (*, *), or probabilities of probs' shape.
        base: the logarithm's, positive and not 1.
        reduction: "none" (a loss for each example), "sum", or "mean" over the examples.

    0 log 0 is 0; a true class of probability 0 costs inf.

    Raises:
        ValueError: for an unknown reduction, a bad base, or a target of another shape.
        IndexError: if a class index or `dim` is out of range.
        TypeError: if probs are not real floating-point numbers.

    >>> categorical_cross_entropy(torch.tensor([.5, .25, .25]), torch.tensor(1), base=2)
    tensor(2.)
    """
    check.floating(probs=probs)
    check.real(target=target)
    check.base(base)
    reduction = check.reduction(reduction)
    (dim,) = check.axes(probs, dim) or (0,)
    dtype = torch.promote_types(probs.dtype, target.dtype)
    dtype, probs, target = for_loss(dtype, probs, target)
    if target.is_floating_point():
        check.shape("target with class probabilities", target, probs.shape)
    else:
        if probs.dim() == 0:
            raise IndexError("beside class indices probs needs an axis of classes, got shape ()")
        check.shape(
            "target with class indices", target, (*probs.shape[:dim], *probs.shape[dim + 1 :])
        )
        y, _ = kernels.class_indices(target, probs.shape[dim], None)
        probs = probs.gather(dim, y.unsqueeze(dim))
        target = torch.ones_like(probs)
    inputs, n = (probs, target, dim, base), _examples(probs, dim)
    return _reduced(reduction, n, formulas.CategoricalCrossEntropy, *inputs, over=dim).to(dtype)


class LossStats(NamedTuple):
    """What `return_stats` gives beside a loss: of each row, without gradient.

    An ignored row has 0 everywhere, the class -1 and False.
    """

    lse: Tensor  # ln Σ e^logits, of the logits that the loss sees: scaled, then capped
    entropy: Tensor  # of their softmax, to the loss's base
    predicted: Tensor  # the class of the largest logit, the first of several
    correct: Tensor  # whether that is the target, or the target's most probable class
    z_loss: Tensor  # lse² times its coefficient


@_public
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    base: float = math.e,
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_stats: bool = False,
) -> Any:
    """`F.cross_entropy`: softmax and cross entropy on logits (F13), to any base.

    Args:
        input: logits (C), (N, C) or (N, C, d_1, ..., d_K).
        target: class indices (int64 or uint8), (), (N) or (N, d_1, ..., d_K), or probabilities of
            input's shape.
        weight: (C), a factor for each class.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index: rows with this index add nothing, at any order, whatever their logits are.
        reduction: "none", "sum", or "mean": over the weights of the indices, or over the examples
            where targets are probabilities.
        label_smoothing: in [0, 1], the share of the target that is spread evenly.
        base: the logarithm's, positive and not 1.
        logit_scale: a factor of the logits (F18): any finite number, or a tensor (), which may be
            learnt and is not looked at.
        softcap: then they are capped, to softcap tanh(logits / softcap) (F19); positive.
        z_loss: the coefficient of lse² (F20; natural, whatever the base), which is added to each
            row's loss. A mean of it is over the rows that are not ignored, without class weights.
        return_stats: whether to return `(loss, LossStats)`, with the shape of the targets' indices.

    Raises:
        ValueError: for an unknown reduction, a bad base, scale, cap or coefficient, or another
            batch size in target.
        RuntimeError: for other shapes or types that do not fit.
        IndexError: if a class index is outside [0, C) and is not `ignore_index`.
        TypeError: if an argument is complex or no tensor.

    >>> cross_entropy(torch.tensor([[0., 0.]]), torch.tensor([1]), base=2)
    tensor(1.)
    """
    check.real(input=input, target=target, **check.given(weight=weight))
    check.base(base)
    check.logits(logit_scale, softcap, z_loss)
    reduction = check.reduction(reduction, size_average, reduce)
    check.smoothing(label_smoothing)
    dtype, input, target, weight = for_loss(input.dtype, input, target, weight)
    dim = 0 if input.dim() == 1 else 1
    if input.shape == target.shape:
        check.probabilities(target, ignore_index)
    C = input.size(dim)  # an IndexError if there is no axis
    if not input.is_floating_point():
        raise NotImplementedError(f"cross_entropy of {input.dtype} logits: cast to a float type")
    y: Any = None
    keep: Any = None
    p: Any = None
    q: Any
    label: Any
    if input.shape == target.shape:
        q, dtype = _probabilities(target, weight, label_smoothing, dim, C, dtype)
        count: Any = _examples(input, dim) if C else 0
        label = target.argmax(dim) if return_stats and C else None
    else:
        check.indices(input.shape, target)
        if input.dim() == 1:
            target = target.reshape(())
        label, keep, p, q, count = _indices(
            target, C, weight, ignore_index, label_smoothing, input.dtype
        )
        y, p = label.unsqueeze(dim), p.unsqueeze(dim)
        keep = None if keep is None else keep.unsqueeze(dim)
        if q is not None:
            q = q.view([C if d == dim else 1 for d in range(input.dim())])
    if softcap is not None or _is_scale(logit_scale) or z_loss:
        input = formulas.kept(keep, input)
    input = _scaled(input, logit_scale)
    input = input if softcap is None else formulas.SoftCap.of(input, softcap)
    inputs = input, p, q, y, keep, dim, base
    loss = _reduced(reduction, count, formulas.CrossEntropy, *inputs, over=dim)
    if z_loss:
        of_rows = formulas.kept(keep, formulas.ZLoss.of(input, dim)).squeeze(dim)
        n = _divisor(reduction, _kept(keep, _examples(input, dim)) if C else 0, input)
        loss = loss + z_loss * (of_rows if reduction == "none" else formulas.Cost.of(of_rows, n))
    if not return_stats:
        return loss.to(dtype)
    seen = formulas.kept(keep, input.detach())
    lse, h = wide(seen).logsumexp(dim, keepdim=True), formulas.Entropy.of(seen, dim, base)
    lse, h = (formulas.kept(keep, v).squeeze(dim) for v in (lse, h))
    largest = seen.argmax(dim) if C else lse.new_full(lse.shape, -1, dtype=torch.int64)
    if keep is not None:
        largest = largest.masked_fill(~keep.squeeze(dim), -1)
    return loss.to(dtype), _stats(lse, h, largest, label, z_loss)


@_public
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    base: float = math.e,
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_stats: bool = False,
) -> Any:
    """`F.linear_cross_entropy`: cross_entropy(linear(input, ...), target), the head (F14, F15).

    The logits are never all in memory, at first and at second order.

    Args:
        input: features, (in_features) or (N, in_features); with a two-dimensional weight any
            (*, in_features).
        linear_weight: (C, in_features), or (C, d_1, ..., d_K, in_features).
        target: class indices (int64 or uint8), () or (N) or (N, d_1, ..., d_K), or (*); or
            probabilities (C) or (N, C) or (N, C, d_1, ..., d_K), or (*, C).
        linear_bias: (C) or (C, d_1, ..., d_K).
        weight, reduction, label_smoothing, base: as in `cross_entropy`.
        ignore_index: as there; None is -100. Not to be named where targets are probabilities.
        options: accepted for PyTorch's sake; the work is always done in blocks.
        logit_scale, softcap, z_loss, return_stats: as in `cross_entropy`; the bias is scaled too.

    Raises:
        RuntimeError: for shapes or types that do not fit.
        ValueError, IndexError, TypeError: as in `cross_entropy`.

    >>> features, weight = torch.zeros(3, 4), torch.ones(2, 4)
    >>> linear_cross_entropy(features, weight, torch.tensor([0, 1, 0]), base=2)
    tensor(1.)
    """
    del options
    check.real(
        input=input,
        linear_weight=linear_weight,
        target=target,
        **check.given(linear_bias=linear_bias, weight=weight),
    )
    check.logits(logit_scale, softcap, z_loss)
    head = _head(
        *(input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing),
        *(base, logit_scale, softcap),
    )
    return _loss_of_head(head, check.reduction(reduction), z_loss, return_stats)


def _loss_of_head(head: _Head, reduction: str, z_loss: float, return_stats: bool) -> Any:
    asks = bool(z_loss), return_stats, return_stats
    if reduction == "none":
        each = [formulas.LinearCrossEntropy.of(*inputs, asks) for inputs in head.inputs]
        losses = [c + z_loss * q if z_loss else c for c, q, *_ in each]
        loss, its = head.stacked(losses), [outputs[2:] for outputs in each]
    else:
        zero = head.labels.new_zeros((), dtype=head.loss_type)
        n, kept = (_divisor(reduction, k, zero) for k in (head.count, head.kept))
        costs_of = [_cost_of_head(n, kept, z_loss, asks, *inputs) for inputs in head.inputs]
        costs_, its = [C for C, *_ in costs_of], [outputs[1:] for outputs in costs_of]
        loss = sum(costs_[1:], costs_[0]) if costs_ else zero / n
    if not return_stats:
        return loss.to(head.dtype)
    h, lse, largest = (head.stacked([outputs[i] for outputs in its]) for i in range(3))
    if largest.is_floating_point():  # of no position
        largest = largest.to(torch.int64)
    return loss.to(head.dtype), _stats(lse, h, largest, head.label(), z_loss)


@_public
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    base: float = math.e,
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Any:
    """The log-probability of each row's class (F22), without logits in memory; of any order.

    log_base softmax(linear(input, linear_weight, linear_bias)) at the target. For policy gradients
    and for what learns from preferences.

    Args:
        input, linear_weight, linear_bias, base, logit_scale, softcap: as in `linear_cross_entropy`.
        target: class indices, as there.
        ignore_index: rows with this index have the log-probability (and entropy) 0; None is -100.
        return_entropy: whether to return `(log_probs, entropy)`, the entropy of each row's softmax
            (F21) to the same base, which may be differentiated too.

    Returns:
        (N) or (N, d_1, ..., d_K) or (*), as the target.

    Raises:
        RuntimeError: for probabilities as target, and other shapes or types that do not fit.
        ValueError, IndexError, TypeError: as in `cross_entropy`.

    >>> features, weight = torch.zeros(3, 4), torch.ones(2, 4)
    >>> linear_log_probs(features, weight, torch.tensor([0, 1, 0]), base=2)
    tensor([-1., -1., -1.])
    """
    check.real(
        input=input,
        linear_weight=linear_weight,
        target=target,
        **check.given(linear_bias=linear_bias),
    )
    check.logits(logit_scale, softcap, 0.0)
    if target.is_floating_point():
        raise RuntimeError(
            "linear_log_probs needs class indices, of which it gives the log-probability (and "
            f"beside it the entropy), got {target.dtype} of shape {tuple(target.shape)}: for "
            "probabilities as target use linear_cross_entropy"
        )
    head = _head(
        *(input, linear_weight, target, linear_bias, None, ignore_index, 0.0),
        *(base, logit_scale, softcap),
    )
    return _log_probs_of_head(head, return_entropy)


def _log_probs_of_head(head: _Head, return_entropy: bool) -> Any:
    asks = False, return_entropy, False
    each = [formulas.LinearCrossEntropy.of(*inputs, asks) for inputs in head.inputs]
    log_probs = head.stacked([-c for c, *_ in each]).to(head.dtype)
    if not return_entropy:
        return log_probs
    return log_probs, head.stacked([h for _, _, h, *_ in each]).to(head.dtype)


def _log_sum_exp_of_head(head: _Head) -> Tensor:
    """ln Σ e^v of each row, whatever its target is: F14 without a class."""
    each = [
        formulas.LinearCrossEntropy.of(x, W, b, p, None, None, keep, math.e, cap, (False,) * 3)
        for x, W, b, p, _, _, keep, _, cap in head.inputs
    ]
    return head.stacked([c for c, *_ in each]).to(head.dtype)


def _logits_of_head(head: _Head) -> Tensor:
    """v_y of each row."""
    each = []
    for x, W, b, _, _, y, _, _, cap in head.inputs:
        z = (wide(x) * wide(W)[y]).sum(1)  # widened first: many a row's gradient goes to one class
        z = z if b is None else z + wide(b)[y]
        each.append(z if cap is None else formulas.SoftCap.of(z, cap))
    return head.stacked(each).to(head.dtype)


class _Head(NamedTuple):
    """What the head computes: `inputs` of F14 for each position, and what is made of the losses."""

    inputs: list[tuple[Any, ...]]
    dtype: torch.dtype  # of the loss
    loss_type: torch.dtype  # that it is computed in
    shape: tuple[int, ...]  # of a number for each row
    count: Any  # examples, or their total weight
    kept: Any  # rows that are not ignored
    labels: Tensor  # class indices, or probabilities (N, C, positions)

    def stacked(self, of_positions: list[Tensor]) -> Tensor:
        """Numbers of each row in the shape of the losses."""
        if not of_positions:
            return self.labels.new_zeros(self.shape, dtype=self.loss_type)
        return torch.stack(of_positions, -1).reshape(self.shape)

    def label(self) -> Tensor:
        """The target's class of each row, or its most probable one."""
        y = self.labels
        if y.is_floating_point():
            y = y.argmax(1) if y.shape[1] else y.sum(1).to(torch.int64)
        return y.reshape(self.shape)


def _head(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    base: float,
    logit_scale: Tensor | float,
    softcap: float | None,
    dtype: torch.dtype | None = None,
    row: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> _Head:
    """Checks the head's arguments and makes F14's of them.

    The logits may be of a wider `dtype`, have a `row` added to each, and without a bias each times
    its `row_scale`.
    """
    check.base(base)
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    C, out_features = linear_weight.shape[0], linear_weight.shape[1:-1]
    if len(out_features) and input.dim() != 2:
        raise RuntimeError(
            f"a linear_weight of shape {tuple(linear_weight.shape)} needs an input of shape "
            f"(N, {linear_weight.shape[-1]}), got {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got "
            f"{tuple(linear_bias.shape)}"
        )
    check.product("linear_weight", input, linear_weight, linear_bias, dims=None)
    check.smoothing(label_smoothing)
    of_logits = dtype or input.dtype
    dtype, target, weight = for_loss(of_logits, target, weight)
    if is_autocast(input):
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    input, linear_weight, linear_bias = for_product(input, linear_weight, linear_bias)
    if row is not None:
        linear_bias = row if linear_bias is None else wide(linear_bias) + row
    loss_type = wide_type(input.dtype)
    batch = input.shape[:-1]
    N, positions = math.prod([*batch]), math.prod([*out_features])
    x = input.reshape(N, input.shape[-1])
    W, b = linear_weight, _scaled(linear_bias, logit_scale)
    if positions > 1:  # their gradients in x are added up: in float32
        x, W, b = wide(x), wide(W), None if b is None else wide(b)
    Ws, bs = _by_position(W, positions, input.shape[-1]), _by_position(b, positions)
    if target.shape == (*batch, C, *out_features):
        check.probabilities(target, -1)
        if ignore_index is not None:
            raise RuntimeError(
                "ignore_index cannot be specified when target contains probabilities, got "
                f"{ignore_index} and a target of shape {tuple(target.shape)}"
            )
        t, dtype = _probabilities(target, weight, label_smoothing, len(batch), C, dtype)
        labels, keep = t.reshape(N, C, positions).to(loss_type), None
        columns: list[Any] = [(None, labels[..., d], None, None) for d in range(positions)]
        count: Any = N * positions if C else 0
    else:
        if len(batch) > 1:
            if target.shape != batch:
                raise RuntimeError(
                    f"for an input of shape {tuple(input.shape)} the target must have shape "
                    f"{tuple(batch)} or {(*batch, C)}, got {tuple(target.shape)}"
                )
            target = target.flatten()
        check.indices((*[N] * (len(batch) > 0), C, *out_features), target)
        labels, keep, p, q, count = _indices(
            target.reshape(N, positions), C, weight, ignore_index, label_smoothing, of_logits
        )
        q = None if q is None else q.unsqueeze(0)
        columns = [
            (p[:, d], q, labels[:, d], None if keep is None else keep[:, d])
            for d in range(positions)
        ]
    if row_scale is not None:
        x = wide(x) * row_scale.reshape(N, 1)
    if _is_scale(logit_scale):
        x = _scaled(x if keep is None else formulas.kept(keep.any(1, keepdim=True), x), logit_scale)
    pairs = zip(Ws, bs, columns, strict=True)
    inputs = [(x, W, b, *column, base, softcap) for W, b, column in pairs]
    kept = _kept(keep, N * positions) if C else 0
    return _Head(inputs, dtype, loss_type, (*batch, *out_features), count, kept, labels)


@_public
def feedforward(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    activation: str = "sigmoid",
    output_activation: str = "sigmoid",
) -> Tensor:
    """A feed-forward network as one function, its backward layer by layer (F10, F12).

    Args:
        input: (*, n_0).
        weights: matrices (n_1, n_0), (n_2, n_1), ...
        biases: as many vectors (n_1), (n_2), ..., or None.
        activation: of the hidden layers: "sigmoid", "tanh", "relu" or "identity".
        output_activation: of the last: one of these, or "softmax" over the last axis.

    Returns:
        (*, n_L), the activation of the last layer.

    Raises:
        ValueError: for an unknown activation, no layer, or another number of biases.
        RuntimeError: if shapes or dtypes do not fit together.
        TypeError: if an argument is complex or no tensor.

    >>> feedforward(torch.zeros(1, 3), [torch.ones(2, 3)], [None])
    tensor([[0.5000, 0.5000]])
    """
    weights, biases = list(weights), list(biases)
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"feedforward needs at least one layer and a bias (or None) for each weight, got "
            f"{len(weights)} weights and {len(biases)} biases"
        )
    hidden = [name for name in formulas.ACTIVATIONS if name != "softmax"]
    for name, value, allowed in (
        ("activation", activation, hidden),
        ("output_activation", output_activation, list(formulas.ACTIVATIONS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    check.real(input=input)
    features = input
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check.real(**check.given(**{f"biases[{i}]": bias}), **{f"weights[{i}]": weight})
        check.product(f"weights[{i}]", features, weight, bias, dims=(2,))
        features = weight.T  # the next layer's input has as many features, and this dtype
    input, *parameters = for_product(input, *weights, *biases)
    activations = " ".join([activation] * (len(weights) - 1) + [output_activation])
    return formulas.Feedforward.of(activations, input, *parameters)[-1]


def _by_position(v: Tensor | None, positions: int, *last: int) -> Any:
    """The head's weight or bias of each position; of an only one a view, whose backward is free."""
    if v is None:
        return [None] * positions
    if positions == 1:
        return [v.reshape(v.shape[0], *last)]
    return v.reshape(v.shape[0], positions, *last).unbind(1)


def _indices(
    target: Tensor,
    C: int,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """Class indices y, the rows that are kept (None: all), the target p e_y + q, and Σ weights.

    `dtype` is the logits'.
    """
    check.class_weight(weight, C)
    if weight is not None and weight.dtype != dtype and not is_autocast(target):
        raise RuntimeError(f"expected weight of type {dtype}, as input, got {weight.dtype}")
    y, keep = kernels.class_indices(target, C, -100 if ignore_index is None else ignore_index)
    dtype = wide_type(dtype)
    w = None if weight is None else weight.to(dtype)
    p = keep.to(dtype) if w is None else w[y].masked_fill(~keep, 0)
    count, q = p.sum(), None
    if label_smoothing:
        w = torch.ones((C,), dtype=dtype, device=target.device) if w is None else w
        p, q = (1 - label_smoothing) * p, label_smoothing / max(C, 1) * w
    is_whole = kernels.choice.are_numbers(keep) and bool(keep.all())  # known without waiting for it
    return y, None if is_whole else keep, p, q, count


def _probabilities(
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    dim: int,
    C: int,
    dtype: torch.dtype,
) -> tuple[Tensor, torch.dtype]:
    """Probabilities, smoothed and weighted, as the target of F13; and the loss's dtype."""
    check.class_weight(weight, C)
    dtype = torch.promote_types(dtype, target.dtype)
    t = wide(target)
    if label_smoothing:
        t = t * (1 - label_smoothing) + label_smoothing / max(C, 1)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
        t = formulas.Weighted.of(t, wide(weight).view(-1, *[1] * (t.dim() - 1 - dim)))
    return t, dtype


def _per_example(
    name: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    dim: int | Sequence[int],
    formula: Any,
    *options: Any,
) -> Tensor:
    """A loss summed over the axes `dim`, then reduced over the examples."""
    if input.shape != target.shape:
        raise ValueError(
            f"{name} needs input and target of one shape, got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    reduction = check.reduction(reduction)
    axes = check.axes(input, dim)
    dtype, input, target = for_loss(torch.promote_types(input.dtype, target.dtype), input, target)
    n = _examples(input, *axes)
    if reduction != "none":  # then it does not matter which axes are an example
        axes = tuple(range(input.dim()))
    last = tuple(range(-len(axes), 0))
    input, target = input.movedim(axes, last), target.movedim(axes, last)
    inputs = input, target, len(axes), *options
    return _reduced(reduction, n, formula, *inputs, over=last).to(dtype)


def _examples(input: Tensor, *axes: int) -> int:
    """How many there are: the product of the sizes of the other axes."""
    its = {axis % max(input.dim(), 1) for axis in axes}
    return math.prod([n for axis, n in enumerate(input.shape) if axis not in its])


def _reduced(reduction: str, n: Tensor | int, formula: Any, *inputs: Any, over: Any = ()) -> Tensor:
    """F3: a formula's losses, without the axes that are summed over, their sum, or that over n."""
    if reduction != "none":
        return _cost(formula, _divisor(reduction, n, inputs[0]), *inputs)
    c: Tensor = formula.of(*inputs)
    return c if over == () else c.squeeze(over)


def _cost(formula: Any, n: Tensor | float, *inputs: Any) -> Tensor:
    """F3 of a formula's losses: their sum over n."""
    if costs.comes_with_gradient(formula, n, inputs):
        return costs.CostWithGradient.apply(formula, n, *inputs)
    return formulas.Cost.of(formula.of(*inputs), n)


def _cost_of_head(n: Any, kept: Any, z_loss: float, asks: Any, *inputs: Any) -> tuple[Any, ...]:
    """The same of F14, and z_loss times that of F20 over the rows that are kept; on any device and
    compiled too. Then h, lse and the largest logit's class of each row.
    """
    wants, x = costs.wanted_of_head(n, inputs), inputs[0]
    if wants is None:
        c, q, h, lse, largest, _ = formulas.LinearCrossEntropy.of(*inputs, asks)
        loss = formulas.Cost.of(c, n)
        return loss + z_loss * formulas.Cost.of(q, kept) if z_loss else loss, h, lse, largest
    n, kept = (torch.as_tensor(k, dtype=wide_type(x.dtype), device=x.device) for k in (n, kept))
    ω = z_loss / kept if z_loss else None
    loss, *_, h, largest, lse = costs.HeadCost.apply(n, ω, *inputs, asks[1:], wants)
    return loss, h, lse, largest


def _stats(lse: Tensor, h: Tensor, largest: Tensor, label: Any, z_loss: float) -> LossStats:
    """Of the labels of ignored rows it does not matter which they are."""
    lse, h = lse.detach(), h.detach()
    return LossStats(lse, h, largest, largest == label, z_loss * lse.square())


def _is_scale(logit_scale: Tensor | float) -> bool:
    """Whether it changes anything; a tensor is not looked at."""
    return isinstance(logit_scale, Tensor) or logit_scale != 1


def _scaled(x: Any, logit_scale: Tensor | float) -> Any:
    """F18."""
    if x is None or not _is_scale(logit_scale):
        return x
    return formulas.LogitScale.of(x, logit_scale)


def _kept(keep: Tensor | None, rows: int) -> Tensor | int:
    """How many rows are not ignored."""
    return rows if keep is None else keep.sum()


def _divisor(reduction: str, n: Tensor | int, x: Tensor) -> Tensor | float:
    """n for a mean, and 1 for a sum. A tensor where 0 is to make nan, and of a size in a graph."""
    if reduction == "sum":
        return 1.0
    if isinstance(n, Tensor) or (n and not torch.compiler.is_compiling()):
        return n
    return torch.full((), n, dtype=wide_type(x.dtype), device=x.device)
