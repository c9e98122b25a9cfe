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
from torch_nnmath import formulas, kernels
from torch_nnmath._head import LogitOptions, is_scaled, measure_logits, prepare_head, scale_logits
from torch_nnmath._precision import (
    bool_to_int,
    cast_for_loss,
    cast_for_product,
    is_autocast,
    multiply,
    widen,
)
from torch_nnmath._records import Target
from torch_nnmath._reduction import (
    choose_divisor,
    count_examples,
    count_kept,
    reduce_examples,
    reduce_formula,
)
from torch_nnmath._target import TargetOptions, read_indices, read_probabilities

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
    check.real(input=input, weight=weight, **check.drop_none(bias=bias))
    check.product("weight", input, weight, bias, dims=(1, 2))
    input, weight, bias = cast_for_product(input, weight, bias)
    if weight.dim() == 2:
        return formulas.Affine.evaluate(input, weight, bias)
    if bias is not None and bias.dim():
        raise RuntimeError(
            f"a weight of shape {tuple(weight.shape)} needs a bias of shape (), got "
            f"{tuple(bias.shape)}"
        )
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
        loss = c if reduction == "none" else formulas.Cost.evaluate(c, n)
        is_integer_mean = reduction == "mean" and not dtype.is_floating_point
        return loss if is_integer_mean else loss.to(dtype)  # an integer mean stays float
    axis_count = 0 if reduction == "none" else input.dim()
    inputs = input, target, axis_count, scale
    loss = reduce_formula(reduction, input.numel(), formulas.SquaredError, *inputs)
    return loss if loss.dtype == dtype else loss.to(dtype)


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
) -> Tensor:
    """-Σ target log_base probs over the axis `dim` (F5), and its cost (F3).

    Args:
        probs: (*, C, *) probabilities, the C classes at `dim`.
        target: class indices, (*, *), or probabilities in the shape of probs.
        base: base of the logarithm; positive, not 1.
        reduction: "none" (a loss for each example), "sum", or "mean" over the examples.

    0 log 0 is 0. If the target class has probability 0, the loss is inf.

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
    reduction = check.resolve_reduction(reduction)
    (dim,) = check.normalise_axes(probs, dim) or (0,)
    dtype = torch.promote_types(probs.dtype, target.dtype)
    dtype, probs, target = cast_for_loss(dtype, probs, target)
    if target.is_floating_point():
        check.shape("target with class probabilities", target, probs.shape)
    else:
        if probs.dim() == 0:
            raise IndexError("class indices need probs with an axis of classes, got shape ()")
        check.shape(
            "target with class indices", target, (*probs.shape[:dim], *probs.shape[dim + 1 :])
        )
        y, _ = kernels.class_indices(target, probs.shape[dim], None)
        probs = probs.gather(dim, y.unsqueeze(dim))
        target = torch.ones_like(probs)
    inputs, n = (probs, target, dim, base), count_examples(probs, dim)
    return reduce_formula(reduction, n, formulas.CategoricalCrossEntropy, *inputs, axes=dim).to(
        dtype
    )


@check.support_torch_function
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
        weight: (C), one factor for each class.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index: rows with this index add nothing, at any order, whatever their logits are.
        reduction: "none", "sum" or "mean". "mean" divides by the total weight of the target
            classes, or by the number of examples if the target holds probabilities.
        label_smoothing: in [0, 1], the share of the target that is spread evenly.
        base: base of the logarithm; positive, not 1.
        logit_scale: a factor of the logits (F18): any finite number, or a tensor of shape (),
            whose value is not checked, so it may be a parameter.
        softcap: if given, the scaled logits are capped to softcap tanh(logits / softcap) (F19);
            must be positive.
        z_loss: the coefficient of lse² (F20, with the natural logarithm whatever `base` is), which
            is added to each row's loss. Class weights do not affect it, and "mean" divides it by
            the number of rows that are not ignored.
        return_stats: whether to return `(loss, LossStats)`; each field has the shape of class
            indices.

    Raises:
        ValueError: for an unknown reduction, an invalid base, scale, cap or z-loss coefficient, or
            another batch size in target.
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
    check.base(base)
    check.logits(logit_scale, softcap, z_loss)
    reduction = check.resolve_reduction(reduction, size_average, reduce)
    check.smoothing(label_smoothing)
    dtype, input, target, weight = cast_for_loss(input.dtype, input, target, weight)
    options = TargetOptions(weight, ignore_index, label_smoothing)
    dim = 0 if input.dim() == 1 else 1
    is_distribution = input.shape == target.shape
    if is_distribution:
        check.probabilities(target, ignore_index)
    C = input.size(dim)  # an IndexError if there is no axis
    if not input.is_floating_point():
        raise NotImplementedError(f"cross_entropy does not support {input.dtype}: cast the logits")
    keep: Any = None
    label: Any = None
    if is_distribution:
        t, dtype = read_probabilities(target, options, dim, C, dtype)
        read_target = Target(None, None, t, dim)
        total_weight: Any = count_examples(input, dim) if C else 0
        label = target.argmax(dim) if return_stats and C else None
    else:
        check.indices(input.shape, target)
        target = target.reshape(()) if input.dim() == 1 else target
        indices = read_indices(target, C, options, input.dtype)
        label, total_weight = indices.y, indices.total_weight
        y, p = label.unsqueeze(dim), indices.p.unsqueeze(dim) if indices.p.dim() else indices.p
        read_target = indices.make_target(y, p, dim, input.dim())
        keep = None if indices.keep is None else indices.keep.unsqueeze(dim)
    if softcap is not None or z_loss or is_scaled(logit_scale):
        input = scale_logits(formulas.mask_ignored(keep, input), logit_scale)
        input = input if softcap is None else formulas.SoftCap.evaluate(input, softcap)
    inputs = input, *read_target[:3], keep, dim, base
    loss = reduce_formula(reduction, total_weight, formulas.CrossEntropy, *inputs, axes=dim)
    if z_loss:
        z_losses = formulas.mask_ignored(keep, formulas.ZLoss.evaluate(input, dim)).squeeze(dim)
        if reduction == "none":
            loss = loss + multiply(z_losses, z_loss)
        else:
            kept_count = count_kept(keep, count_examples(input, dim)) if C else 0
            divisor = choose_divisor(reduction, kept_count, input)
            loss = loss + multiply(formulas.Cost.evaluate(z_losses, divisor), z_loss)
    loss = loss if loss.dtype == dtype else loss.to(dtype)
    if not return_stats:
        return loss
    return loss, measure_logits(input, keep, dim, LogitOptions(base), label, z_loss)


@check.support_torch_function
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

    At first and second order, only one block of the logits is in memory.

    Args:
        input: features, (in_features) or (N, in_features); with a two-dimensional weight any
            (*, in_features).
        linear_weight: (C, in_features), or (C, d_1, ..., d_K, in_features).
        target: class indices (int64 or uint8), () or (N) or (N, d_1, ..., d_K), or (*); or
            probabilities (C) or (N, C) or (N, C, d_1, ..., d_K), or (*, C).
        linear_bias: (C) or (C, d_1, ..., d_K).
        weight, reduction, label_smoothing, base: as in `cross_entropy`.
        ignore_index: as there; None is -100. Must be None if the target holds probabilities.
        options: ignored; accepted for compatibility.
        logit_scale, softcap, z_loss, return_stats: as in `cross_entropy`; the bias is scaled too.

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
    check.logits(logit_scale, softcap, z_loss)
    target_options = TargetOptions(weight, ignore_index, label_smoothing)
    logit_options = LogitOptions(base, logit_scale, softcap)
    head = prepare_head(input, linear_weight, target, linear_bias, target_options, logit_options)
    return head.compute_loss(check.resolve_reduction(reduction), z_loss, return_stats)


@check.support_torch_function
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
    """The log-probability of each row's class (F22), without materialising the logits.

    log_base softmax(linear(input, linear_weight, linear_bias)) at the target. It is differentiable
    to any order; the logits are in memory from the third order on. Use it for policy gradients and
    preference learning.

    Args:
        input, linear_weight, linear_bias, base, logit_scale, softcap: as in `linear_cross_entropy`.
        target: class indices, as in `linear_cross_entropy`.
        ignore_index: rows with this index have the log-probability (and entropy) 0; None is -100.
        return_entropy: whether to return `(log_probs, entropy)`, the entropy of each row's softmax
            (F21) to the same base, which is differentiable, too.

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
    check.logits(logit_scale, softcap, 0.0)
    if target.is_floating_point():
        raise RuntimeError(
            f"linear_log_probs needs class indices as target, got {target.dtype} of shape "
            f"{tuple(target.shape)}; for class probabilities use linear_cross_entropy"
        )
    target_options = TargetOptions(ignore_index=ignore_index)
    logit_options = LogitOptions(base, logit_scale, softcap)
    head = prepare_head(input, linear_weight, target, linear_bias, target_options, logit_options)
    return head.compute_log_probs(return_entropy)


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
    layer_input = input
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check.real(**check.drop_none(**{f"biases[{i}]": bias}), **{f"weights[{i}]": weight})
        check.product(f"weights[{i}]", layer_input, weight, bias, dims=(2,))
        layer_input = weight.T  # stands for the layer's output: as many features, the same dtype
    input, *parameters = cast_for_product(input, *weights, *biases)
    # one string, since PyTorch derives no batching rule of a Function with a list as an argument
    activations = " ".join([activation] * (len(weights) - 1) + [output_activation])
    return formulas.Feedforward.evaluate(activations, input, *parameters)[-1]
