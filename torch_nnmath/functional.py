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
from torch_nnmath._logits import (
    compute_categorical_cross_entropy,
    compute_cross_entropy,
    read_logit_options,
)
from torch_nnmath._precision import cast_for_product, is_autocast, wide_type
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
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: input weightᵀ + bias (F1, F8).

    Args:
        input: (*, in_features).
        weight: (out_features, in_features), or (in_features).
        bias: (out_features), or () with a one-dimensional weight.

    Returns:
        (*, out_features), or (*) for a one-dimensional weight.

    Raises:
        RuntimeError: if shapes or dtypes do not fit together.
        TypeError: if an argument is complex or not a tensor.

    >>> linear(torch.ones(1, 2), torch.tensor([[1., 2.], [3., 4.]]))
    tensor([[3., 7.]])
    """
    check.real(input=input, weight=weight)
    if bias is not None:
        check.real(bias=bias)
    check.product("weight", input, weight, bias, dims=(1, 2))
    input, weight, bias = cast_for_product(input, weight, bias)
    if weight.dim() == 2:
        return formulas.Affine.evaluate(input, weight, bias)
    product = formulas.Affine.evaluate(input, weight.unsqueeze(0), None).squeeze(-1)
    return product if bias is None else product + bias


@check.support_torch_function
def sigmoid(input: Tensor) -> Tensor:
    """`torch.sigmoid`: 1/(1 + e^-input), elementwise (F6). Raises TypeError for complex input.

    >>> sigmoid(torch.tensor([0.]))
    tensor([0.5000])
    """
    check.real(input=input)
    return formulas.Sigmoid.evaluate(input)


@check.support_torch_function
def tanh(input: Tensor) -> Tensor:
    """`torch.tanh`, elementwise (F2). Raises TypeError for complex input.

    >>> tanh(torch.tensor([0.]))
    tensor([0.])
    """
    check.real(input=input)
    return formulas.Tanh.evaluate(input)


@check.support_torch_function
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu`: max(0, input), elementwise; nan stays nan, the derivative at 0 is 0 (F2).

    Raises TypeError for complex and RuntimeError for bool input. `inplace` overwrites the input.

    >>> relu(torch.tensor([-1., 2.]))
    tensor([0., 2.])
    """
    check.real(input=input)
    if inplace:
        check.writable(input)
    return formulas.relu_(input) if inplace else formulas.ReLU.evaluate(input)


@check.support_torch_function
def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`F.softmax`: e^input / Σ e^input over `dim` (F7).

    Args:
        input: any shape.
        dim: the axis that sums to 1; None selects PyTorch's deprecated default, with a warning.
        dtype: if given, the input is cast to it first.

    Raises:
        IndexError: if `dim` is out of range.
        NotImplementedError: if the input, after the cast, is of integer type.
        TypeError: if input is complex or not a tensor.

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
    if dtype is None and input.is_cuda and is_autocast(input):
        dtype = torch.float32 if input.dtype != torch.float64 else None
    return formulas.Softmax.evaluate(input if dtype is None else input.to(dtype), dim)


@check.support_torch_function
def softmax_jacobian(input: Tensor, dim: int) -> Tensor:
    """The Jacobian of softmax as a matrix, diag(a) - a aᵀ (F17), for teaching and checking.

    Args:
        input: (*, n, *), the n at `dim`.

    Returns:
        (*, *, n, n): the matrix of each vector, da_j/dz_k in row j, column k.

    Raises:
        IndexError: if `dim` is out of range, or input has no axis.
        TypeError: if input is complex or not a tensor.

    >>> softmax_jacobian(torch.tensor([0., 0.]), dim=0)
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    check.real(input=input)
    if input.dim() == 0:
        raise IndexError("softmax_jacobian needs an input with at least one axis, got shape ()")
    return formulas.softmax_jacobian(input, dim)


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
        size_average, reduce: deprecated, as in PyTorch.
        reduction: "none", "sum", or "mean" over the elements.
        weight: one factor for each element, in input's shape; "mean" divides by their sum.

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

    `input` holds pre-activations; arguments and errors are those of `squared_error`.

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
        row_weight: a factor for each example (F30), in the shape of class indices; as in
            `cross_entropy`.

    0 log 0 is 0. If the target class has probability 0, the loss is inf.

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
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index: rows with this index add nothing, at any order, whatever their logits are.
        reduction: "none", "sum" or "mean". "mean" divides by the total weight of the target
            classes, or by the number of examples if the target holds probabilities.
        label_smoothing: in [0, 1], the share of the target that is spread evenly.
        row_weight: a factor for each row's loss, z-loss included (F30), in the shape of class
            indices, of any real type that the loss's arithmetic need not round; may be negative,
            and may require a gradient. "mean" divides by the sum of the weights, each times that
            of its target class. What it holds for an ignored row does not matter.
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

    Raises:
        ValueError: for an unknown reduction, an invalid base, scale, cap, temperature or z-loss
            coefficient, another batch size in target, or another shape of row_weight.
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
    options = TargetOptions(weight, ignore_index, label_smoothing, row_weight)
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
    rows a device mesh splits are accepted (F24, docs/scale.md); the loss is then a DTensor.

    Args:
        input: features, (in_features) or (N, in_features); with a two-dimensional weight any
            (*, in_features).
        linear_weight: (C, in_features), or (C, d_1, ..., d_K, in_features).
        target: class indices (int64 or uint8), () or (N) or (N, d_1, ..., d_K), or (*); or
            probabilities (C) or (N, C) or (N, C, d_1, ..., d_K), or (*, C).
        linear_bias: (C) or (C, d_1, ..., d_K).
        weight, reduction, label_smoothing, row_weight, base: as in `cross_entropy`.
        ignore_index: as there; None is -100. Must be None if the target holds probabilities.
        options: ignored; accepted for compatibility.
        logit_scale, softcap, temperature, z_loss, return_stats, output_dtype: as in
            `cross_entropy`; the bias is scaled too.

    Raises:
        RuntimeError: for shapes or dtypes that do not fit, or a `label_smoothing` outside [0, 1].
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
        **check.drop_none(linear_bias=linear_bias, weight=weight),
    )
    target_options = TargetOptions(weight, ignore_index, label_smoothing, row_weight)
    logit_options = read_logit_options(base, logit_scale, softcap, temperature)
    head = prepare_head(input, linear_weight, target, linear_bias, target_options, logit_options)
    head = head.with_output_dtype(output_dtype)
    return head.compute_loss(check.resolve_reduction(reduction), z_loss, return_stats)


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
    preference learning. DTensors are accepted as in `linear_cross_entropy`.

    Args:
        input, linear_weight, linear_bias, base, logit_scale, softcap, temperature: as in
            `linear_cross_entropy`.
        target: class indices, as in `linear_cross_entropy`.
        ignore_index: rows with this index have the log-probability (and entropy) 0; None is -100.
        row_weight: a factor for each log-probability, not for the entropy, as in `cross_entropy`.
        return_entropy: whether to return `(log_probs, entropy)`, the entropy of each row's softmax
            (F21) to the same base, which is differentiable, too.
        output_dtype: the dtype of the results; None is that of the input, but float32 for half
            precision: rounding would change a ratio of probabilities by several percent.

    Returns:
        (N) or (N, d_1, ..., d_K) or (*), as the target.

    Raises:
        RuntimeError: if the target holds probabilities, or for other shapes or dtypes that do not
            fit.
        ValueError, IndexError, TypeError: as in `cross_entropy`.

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
        input, linear_weight, linear_bias, logit_scale, softcap, temperature, output_dtype: as in
            `linear_log_probs`; there must be at least one class.

    Returns:
        () or (N) or (N, d_1, ..., d_K) or (*), the shape of class indices.

    Raises:
        RuntimeError: for shapes or dtypes that do not fit.
        ValueError, IndexError, TypeError: as in `linear_log_probs`.

    >>> linear_log_sum_exp(torch.zeros(1, 4), torch.ones(2, 4))
    tensor([0.6931])
    """
    check.real(input=input, linear_weight=linear_weight, **check.drop_none(linear_bias=linear_bias))
    options = read_logit_options(math.e, logit_scale, softcap, temperature)
    any_class = make_any_class(input, linear_weight)
    head = prepare_head(input, linear_weight, any_class, linear_bias, TargetOptions(), options)
    head = head.with_output_dtype(output_dtype or wide_type(head.output_dtype))
    return head.compute_log_sum_exp()


@check.support_torch_function
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
        biases: for each weight a vector (n_1), (n_2), ... or None.
        activation: that of the hidden layers: "sigmoid", "tanh", "relu" or "identity".
        output_activation: that of the last layer: one of these, or "softmax" over the last axis.

    Returns:
        (*, n_L), the activation of the last layer.

    Raises:
        ValueError: for an unknown activation, no layer, or a number of biases other than that of
            weights.
        RuntimeError: if shapes or dtypes do not fit together.
        TypeError: if an argument is complex or not a tensor.

    >>> feedforward(torch.zeros(1, 3), [torch.ones(2, 3)], [None])
    tensor([[0.5000, 0.5000]])
    """
    weights, biases = list(weights), list(biases)
    names = list(formulas.ACTIVATIONS)
    check.network(input, weights, biases, activation, output_activation, names)
    input, *parameters = cast_for_product(input, *weights, *biases)
    # one string, since PyTorch derives no batching rule of a Function with a list as an argument
    activations = " ".join([activation] * (len(weights) - 1) + [output_activation])
    return formulas.Feedforward.evaluate(activations, input, *parameters)[-1]
