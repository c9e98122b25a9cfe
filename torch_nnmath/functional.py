"""The formulas as functions: PyTorch's signatures, argument checks, shapes and reductions.

A function with PyTorch's name takes PyTorch's arguments, raises PyTorch's exception types and
returns PyTorch's values; the gradients are this library's own (see `torch_nnmath.formulas`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas
from torch_nnmath._distillation import linear_jsd, linear_kl_div
from torch_nnmath._head import make_any_class, prepare_head
from torch_nnmath._layers import (
    feedforward,
    linear,
    relu,
    sigmoid,
    softmax,
    softmax_jacobian,
    tanh,
)
from torch_nnmath._logits import (
    compute_categorical_cross_entropy,
    compute_cross_entropy,
    read_logit_options,
)
from torch_nnmath._precision import wide_type
from torch_nnmath._reduction import compute_mse_loss, reduce_examples
from torch_nnmath._target import TargetOptions
from torch_nnmath.kernels.dispatch import has_dtensor

__all__ = [
    "categorical_cross_entropy",
    "cross_entropy",
    "feedforward",
    "linear",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl_div",
    "linear_log_probs",
    "linear_log_sum_exp",
    "mse_loss",
    "relu",
    "sigmoid",
    "sigmoid_squared_error",
    "softmax",
    "softmax_jacobian",
    "squared_error",
    "tanh",
]


@check.support_torch_function
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
        input, target: of the same shape; a different one is broadcast, with a warning.
        size_average, reduce: deprecated; use `reduction`.
        reduction: "none", "sum", or "mean" over the elements.
        weight: one factor for each element, in input's shape; "mean" divides by their sum.

    Returns:
        (), or the broadcast shape for `reduction="none"`.

    Raises:
        ValueError: for an unknown reduction, or a weight of another shape.
        RuntimeError: if input and target do not broadcast.
        NotImplementedError: if input and target are both integers, and no weight is given.
        TypeError: if an argument is complex or not a tensor.

    >>> mse_loss(torch.tensor([1., 2.]), torch.tensor([1., 4.]))
    tensor(2.)
    """
    check.real(input=input, target=target, **check.drop_none(weight=weight))
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
    reduction = check.resolve_reduction(reduction, size_average, reduce)
    return compute_mse_loss(input, target, reduction, weight)


@check.support_torch_function
def squared_error(
    input: Tensor, target: Tensor, *, reduction: str = "mean", dim: int | Sequence[int] = -1
) -> Tensor:
    """½ Σ (target - input)² over the axes `dim` of an example (F4), and its cost (F3).

    Args:
        input, target: of the same shape; they are not broadcast.
        reduction: "none" (a loss for each example), "sum", or "mean" over the examples.
        dim: the axis or axes of one example.

    Returns:
        (), or the shape of input without the axes `dim` for `reduction="none"`.

    Raises:
        ValueError: if the shapes differ, or for an unknown reduction or a repeated axis.
        IndexError: if an axis is out of range.
        TypeError: if an argument is not a tensor of real floating-point numbers.

    >>> squared_error(torch.tensor([.7, .2]), torch.tensor([1., 0.]))
    tensor(0.0650)
    """
    check.floating(input=input, target=target)
    formula = formulas.SquaredError
    return reduce_examples("squared_error", input, target, reduction, dim, formula, 1)


@check.support_torch_function
def sigmoid_squared_error(
    input: Tensor, target: Tensor, *, reduction: str = "mean", dim: int | Sequence[int] = -1
) -> Tensor:
    """½ Σ (target - σ(input))² over the axes `dim` of an example (F9, F11), and its cost (F3).

    Args:
        input, target: pre-activations and targets of the same shape; they are not broadcast.
        reduction: "none" (a loss for each example), "sum", or "mean" over the examples.
        dim: the axis or axes of one example.

    Returns:
        (), or the shape of input without the axes `dim` for `reduction="none"`.

    Raises:
        ValueError: if the shapes differ, or for an unknown reduction or a repeated axis.
        IndexError: if an axis is out of range.
        TypeError: if an argument is not a tensor of real floating-point numbers.

    >>> sigmoid_squared_error(torch.tensor([0., 0.]), torch.tensor([1., 0.]))
    tensor(0.2500)
    """
    check.floating(input=input, target=target)
    formula = formulas.SigmoidSquaredError
    return reduce_examples("sigmoid_squared_error", input, target, reduction, dim, formula)


@check.support_torch_function
def categorical_cross_entropy(
    probs: Tensor,
    target: Tensor,
    *,
    base: float = math.e,
    reduction: str = "mean",
    dim: int = -1,
    row_weight: Tensor | None = None,
) -> Tensor:
    """-Σ target log_base probs over the axis `dim` (F5), and its cost (F3).

    Args:
        probs: (*, C, *) probabilities, the C classes at `dim`.
        target: class indices, (*, *), or probabilities in the shape of probs.
        base: base of the logarithm; positive, not 1.
        reduction: "none" (a loss for each example), "sum", or "mean" over the examples.
        row_weight: a factor for each example's loss (F30), in the shape of class indices; may be
            negative and may require a gradient. "mean" divides by the sum of the weights.

    0 log 0 is 0. If the target class has probability 0, the loss is inf.

    Returns:
        (), or (*, *), the shape of class indices, for `reduction="none"`.

    Raises:
        ValueError: for an unknown reduction, a bad base, or a target or weight of another shape.
        RuntimeError: if row_weight is wider than the losses.
        IndexError: if a class index or `dim` is out of range.
        TypeError: if probs are not real floating-point numbers.

    >>> categorical_cross_entropy(torch.tensor([.5, .25, .25]), torch.tensor(1), base=2)
    tensor(2.)
    """
    check.floating(probs=probs)
    check.real(target=target)
    check.base(base)
    reduction = check.resolve_reduction(reduction)
    return compute_categorical_cross_entropy(probs, target, base, reduction, dim, row_weight)


@check.leave_dtensors_uncompiled
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
    row_weight: Tensor | None = None,
    divisor: Tensor | float | None = None,
    base: float = math.e,
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    output_dtype: torch.dtype | None = None,
) -> Any:
    """`F.cross_entropy`: softmax and cross entropy on logits (F13), to any base.

    Args:
        input: logits (C), (N, C) or (N, C, d_1, ..., d_K); a DTensor may be split over any of
            these axes (F24), and the loss is then a DTensor.
        target: class indices (int64 or uint8), (), (N) or (N, d_1, ..., d_K), or probabilities of
            input's shape.
        weight: (C), one factor for each class; may be float32 where the logits are half precision.
        size_average, reduce: deprecated; use `reduction`.
        ignore_index: rows with this index add nothing, at any order, whatever their logits are.
        reduction: "none", "sum" or "mean". "mean" divides by the total weight of the target
            classes, or by the number of examples if the target holds probabilities.
        label_smoothing: in [0, 1], the share of the target that is spread evenly.
        row_weight: a factor for each row's loss, z-loss included (F30), in the shape of class
            indices, of a real type that is not wider than the loss's arithmetic; may be negative,
            and may require a gradient. "mean" divides by the sum of the weights, each times that
            of its target class. The weight of an ignored row does not matter.
        divisor: what "mean" divides by, z-loss included, in place of the total weight: a number, or
            a tensor of shape (), such as the count of all ranks' and micro-batches' tokens
            (`parallel.count_tokens_per_rank`).
        base: base of the logarithm; positive, not 1.
        logit_scale: a factor of the logits (F18): any finite number, or a tensor of shape (),
            whose value is not checked, so it may be a parameter.
        softcap: if given, the scaled logits are capped to softcap tanh(logits / softcap) (F19);
            must be positive.
        temperature: divides the logits after the cap; must be positive and finite.
        z_loss: the coefficient of lse² (F20, with the natural logarithm whatever `base` is), which
            is added to each row's loss. Class weights do not affect it, and "mean" divides it by
            the number of rows that are not ignored, or the sum of their row weights.
        return_stats: whether to return `(loss, LossStats)`; each field has the shape of class
            indices and is not weighted.
        output_dtype: the dtype of the loss; None is that of the input. float32 keeps a loss of
            half-precision input as it was computed, unrounded.

    Returns:
        The loss, (), or the shape of class indices for `reduction="none"`; with `return_stats` the
        tuple `(loss, LossStats)`.

    Raises:
        ValueError: for an unknown reduction, an invalid base, scale, cap, temperature or z-loss
            coefficient, another batch size in target, another shape of row_weight, or a divisor
            that is negative, has another shape, or comes without `reduction="mean"`.
        RuntimeError: for other shapes or dtypes that do not fit, or a `label_smoothing` outside
            [0, 1].
        IndexError: if a class index is outside [0, C) and is not `ignore_index`.
        NotImplementedError: if the logits are integers.
        TypeError: if an argument is complex or not a tensor.

    >>> cross_entropy(torch.tensor([[0., 0.]]), torch.tensor([1]), base=2)
    tensor(1.)
    """
    check.real(input=input, target=target)
    if weight is not None:
        check.real(weight=weight)
    reduction = check.resolve_reduction(reduction, size_average, reduce)
    options = TargetOptions(weight, ignore_index, label_smoothing, row_weight, divisor=divisor)
    logit_options = read_logit_options(base, logit_scale, softcap, temperature)
    compute: Any = compute_cross_entropy
    if has_dtensor(input):
        from torch_nnmath._split_logits import compute_split_cross_entropy as compute
    return compute(
        *(input, target, options, logit_options),
        *(reduction, z_loss, return_stats, output_dtype),
    )


@check.leave_dtensors_uncompiled
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
    row_weight: Tensor | None = None,
    divisor: Tensor | float | None = None,
    base: float = math.e,
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    output_dtype: torch.dtype | None = None,
) -> Any:
    """`F.linear_cross_entropy`: cross_entropy(linear(input, ...), target), the head (F14, F15).

    At first and second order, only one block of the logits is in memory. DTensors whose classes or
    rows a device mesh splits are accepted (F24); the loss is then a DTensor. The page Scale
    (docs/scale.md) has their placements.

    Args:
        input: features, (in_features) or (N, in_features); with a two-dimensional weight any
            (*, in_features).
        linear_weight: (C, in_features), or (C, d_1, ..., d_K, in_features).
        target: class indices (int64 or uint8), () or (N) or (N, d_1, ..., d_K), or (*); or
            probabilities (C) or (N, C) or (N, C, d_1, ..., d_K), or (*, C).
        linear_bias: (C) or (C, d_1, ..., d_K).
        weight: (C), one factor for each class; may be float32 for half-precision features.
        reduction: "none", "sum" or "mean". "mean" divides by the total weight of the target
            classes, or by the number of rows if the target holds probabilities.
        ignore_index: rows with this index add nothing, at any order, whatever their features are;
            None is -100. Must be None if the target holds probabilities.
        label_smoothing: in [0, 1], the share of the target that is spread evenly.
        options: ignored; accepted for compatibility.
        row_weight: a factor for each row's loss, z-loss included (F30), in the shape of class
            indices; may be negative and may require a gradient. "mean" divides by the sum of the
            weights, each times that of its target class.
        divisor: what "mean" divides by, z-loss included, in place of the total weight: a number, or
            a tensor of shape (), such as the count of all ranks' and micro-batches' tokens
            (`parallel.count_tokens_per_rank`).
        base: base of the logarithm; positive, not 1.
        logit_scale: a factor of the logits, bias included (F18): a finite number, or a tensor of
            shape (), which may be a parameter.
        softcap: if given, the scaled logits are capped to softcap tanh(logits / softcap) (F19);
            must be positive.
        temperature: divides the logits after the cap; must be positive and finite.
        z_loss: the coefficient of lse² (F20), which is added to each row's loss. Class weights do
            not affect it.
        return_stats: whether to return `(loss, LossStats)`, unweighted statistics of each row.
        output_dtype: the dtype of the loss; None is that of the input.

    Returns:
        The loss, (), or the shape of class indices for `reduction="none"`; with `return_stats` the
        tuple `(loss, LossStats)`.

    Raises:
        ValueError: for an unknown reduction, an invalid base, scale, cap, temperature or z-loss
            coefficient, another shape of row_weight, or a divisor that is negative, has another
            shape, or comes without `reduction="mean"`.
        RuntimeError: for shapes or dtypes that do not fit, or a `label_smoothing` outside [0, 1].
        IndexError: if a class index is outside [0, C) and is not `ignore_index`.
        TypeError: if an argument is complex or not a tensor.

    >>> features, weight = torch.zeros(3, 4), torch.ones(2, 4)
    >>> linear_cross_entropy(features, weight, torch.tensor([0, 1, 0]), base=2)
    tensor(1.)
    """
    del options
    check.real(
        input=input,
        linear_weight=linear_weight,
        target=target,
        **check.drop_none(linear_bias=linear_bias, weight=weight),
    )
    target_options = TargetOptions(weight, ignore_index, label_smoothing, row_weight)
    logit_options = read_logit_options(base, logit_scale, softcap, temperature)
    head = prepare_head(input, linear_weight, target, linear_bias, target_options, logit_options)
    reduction = check.resolve_reduction(reduction)
    head = head.with_output_dtype(output_dtype).with_divisor(divisor, reduction)
    return head.compute_loss(reduction, z_loss, return_stats)


@check.leave_dtensors_uncompiled
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    row_weight: Tensor | None = None,
    base: float = math.e,
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
    output_dtype: torch.dtype | None = None,
) -> Any:
    """The log-probability of each row's class (F22), without materialising the logits.

    log_base softmax(linear(input, linear_weight, linear_bias)) at the target. It is differentiable
    to any order; the logits are in memory from the third order on. Use it for policy gradients and
    preference learning. DTensors whose classes or rows a device mesh splits are accepted (F24).

    Args:
        input: features, (in_features) or (N, in_features); with a two-dimensional weight any
            (*, in_features).
        linear_weight: (C, in_features), or (C, d_1, ..., d_K, in_features).
        target: class indices (int64 or uint8), () or (N) or (N, d_1, ..., d_K), or (*).
        linear_bias: (C) or (C, d_1, ..., d_K).
        ignore_index: rows with this index have the log-probability (and entropy) 0; None is -100.
        row_weight: a factor for each log-probability, not for the entropy, in the shape of the
            target; may be negative and may require a gradient.
        base: base of the logarithm; positive, not 1.
        logit_scale: a factor of the logits, bias included (F18): a finite number, or a tensor of
            shape (), which may be a parameter.
        softcap: if given, the scaled logits are capped to softcap tanh(logits / softcap) (F19);
            must be positive.
        temperature: divides the logits after the cap; must be positive and finite.
        return_entropy: whether to return `(log_probs, entropy)`, the entropy of each row's softmax
            (F21) to the same base, which is differentiable, too.
        output_dtype: the dtype of the results; None is that of the input, but float32 for half
            precision: rounding would change a ratio of probabilities by several percent.

    Returns:
        The log-probabilities, in the target's shape, or with `return_entropy` the tuple
        `(log_probs, entropy)`, both in that shape.

    Raises:
        RuntimeError: if the target holds probabilities, or for shapes or dtypes that do not fit.
        ValueError: for an invalid base, scale, cap or temperature, or another shape of row_weight.
        IndexError: if a class index is outside [0, C) and is not `ignore_index`.
        TypeError: if an argument is complex or not a tensor.

    >>> features, weight = torch.zeros(3, 4), torch.ones(2, 4)
    >>> linear_log_probs(features, weight, torch.tensor([0, 1, 0]), base=2)
    tensor([-1., -1., -1.])
    """
    check.real(
        input=input,
        linear_weight=linear_weight,
        target=target,
        **check.drop_none(linear_bias=linear_bias),
    )
    if target.is_floating_point():
        raise RuntimeError(
            f"linear_log_probs needs class indices as target, got {target.dtype} of shape "
            f"{tuple(target.shape)}; for class probabilities use linear_cross_entropy"
        )
    target_options = TargetOptions(ignore_index=ignore_index, row_weight=row_weight)
    logit_options = read_logit_options(base, logit_scale, softcap, temperature)
    head = prepare_head(input, linear_weight, target, linear_bias, target_options, logit_options)
    head = head.with_output_dtype(output_dtype or wide_type(head.output_dtype))
    return head.compute_log_probs(return_entropy)


@check.leave_dtensors_uncompiled
def linear_log_sum_exp(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: Tensor | float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """ln Σ e^logits of each row (F13 with T = 1, t = 0), without materialising the logits.

    The logits are linear(input, linear_weight, linear_bias). It is differentiable to any order;
    the logits are in memory from the third order on.

    Args:
        input: features, (in_features) or (N, in_features); with a two-dimensional weight any
            (*, in_features).
        linear_weight: (C, in_features), or (C, d_1, ..., d_K, in_features), with C at least 1.
        linear_bias: (C) or (C, d_1, ..., d_K).
        logit_scale: a factor of the logits, bias included (F18): a finite number, or a tensor of
            shape (), which may be a parameter.
        softcap: if given, the scaled logits are capped to softcap tanh(logits / softcap) (F19);
            must be positive.
        temperature: divides the logits after the cap; must be positive and finite.
        output_dtype: the dtype of the result; None is that of the input, but float32 for half
            precision.

    Returns:
        () or (N) or (N, d_1, ..., d_K) or (*), the shape of class indices.

    Raises:
        RuntimeError: for shapes or dtypes that do not fit.
        ValueError: for an invalid scale, cap or temperature.
        IndexError: if there is no class.
        TypeError: if an argument is complex or not a tensor.

    >>> linear_log_sum_exp(torch.zeros(1, 4), torch.ones(2, 4))
    tensor([0.6931])
    """
    check.real(input=input, linear_weight=linear_weight, **check.drop_none(linear_bias=linear_bias))
    options = read_logit_options(math.e, logit_scale, softcap, temperature)
    any_class = make_any_class(input, linear_weight)
    head = prepare_head(input, linear_weight, any_class, linear_bias, TargetOptions(), options)
    head = head.with_output_dtype(output_dtype or wide_type(head.output_dtype))
    return head.compute_log_sum_exp()
