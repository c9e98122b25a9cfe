"""Argument checks of the public functions. Errors have PyTorch's types and say what to do."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from torch_nnmath import _torch
from torch_nnmath._precision import is_autocast
from torch_nnmath.kernels.dispatch import has_dtensor

P = ParamSpec("P")
R = TypeVar("R")
_SEQUENCES = (list, tuple)

NUMBERS = (Real, torch.SymInt, torch.SymFloat)


def support_torch_function(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public function so that it honours `__torch_function__` of every argument.

    This includes arguments inside a list or a tuple. `call_for_per_sample_grads` works as with
    PyTorch's function of the same name.
    """
    return _make_public(function, is_uncompiled_with_dtensors=False)


def leave_dtensors_uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """As `support_torch_function`; Dynamo also ends its graph before a call with DTensors.

    All ranks must issue the same collectives. Dynamo would choose a graph on each rank by itself,
    without a check of a DTensor's size if the size of the rank's part is as before.
    """
    return _make_public(function, is_uncompiled_with_dtensors=True)


def _make_public(function: Callable[P, R], is_uncompiled_with_dtensors: bool) -> Callable[P, R]:
    @functools.wraps(function)
    def public_function(*args: P.args, **kwargs: P.kwargs) -> R:
        flat: tuple[Any, ...] = (*args, *kwargs.values())
        for arg in flat:
            if isinstance(arg, _SEQUENCES):
                flat += (*arg,)
        if has_torch_function(flat):
            return handle_torch_function(public_function, flat, *args, **kwargs)
        if torch.compiler.is_compiling() and is_uncompiled_with_dtensors and has_dtensor(*flat):
            from torch_nnmath._uncompiled import call_uncompiled

            result: R = call_uncompiled(function, args, kwargs)
            return result
        return function(*args, **kwargs)

    torch_function = getattr(torch.nn.functional, function.__name__, None)
    _torch.share_per_sample_gradient(torch_function, public_function)
    return public_function


def real(**tensors: Any) -> None:
    """Raises a TypeError for an argument that is complex or not a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.is_complex():
            raise TypeError(
                f"{name} has dtype {x.dtype}: complex tensors are not supported; pass real and "
                "imaginary parts as two features"
            )


def drop_none(**optional: Any) -> dict[str, Any]:
    """Returns the arguments that are not None."""
    return {name: x for name, x in optional.items() if x is not None}


def writable(x: Tensor) -> None:
    """Raises before the input is overwritten; autograd's own error would come after our forward."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return
    if x.is_leaf or (
        (base := _torch.get_base(x)) is not None and base.is_leaf and base.requires_grad
    ):
        raise RuntimeError(
            f"a {'' if x.is_leaf else 'view of a '}leaf Variable of shape {tuple(x.shape)} that "
            "requires grad is being used in an in-place operation"
        )


def floating(**tensors: Tensor) -> None:
    """Raises a TypeError for an argument that is not a tensor of real floating-point numbers."""
    real(**tensors)
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}: cast it")


def base(base: float) -> None:
    """Checks the base of a logarithm."""
    if not (base > 0 and _is_finite(base) and base != 1):
        raise ValueError(f"base must be positive, finite and not 1, got {base}")


def logits(scale: Any, cap: Any, temperature: Any) -> None:
    """Checks the options that change logits."""
    if isinstance(scale, Tensor):
        real(logit_scale=scale)
        if scale.dim():
            got = tuple(scale.shape)
            raise ValueError(f"logit_scale must be a number or a tensor of shape (), got {got}")
    else:
        finite("logit_scale", scale)
    if cap is not None:
        finite("softcap", cap)
        if cap <= 0:
            raise ValueError(f"softcap must be positive, got {cap}")
    finite("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def output_dtype(dtype: Any) -> None:
    """Raises a TypeError unless the results' type is None or a floating-point type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"output_dtype must be a floating-point torch.dtype or None, got {dtype}")


def finite(name: str, number: Any) -> None:
    """Raises for an option that is not a finite number."""
    if type(number) is not float and not isinstance(number, NUMBERS):  # the first test is fast
        raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    if not _is_finite(number):
        raise ValueError(f"{name} must be finite, got {number}")


def _is_finite(number: Any) -> bool:
    """`math.isfinite`, which Dynamo cannot trace with a symbol.

    The bound is the largest float as a literal: Dynamo drops the guard `symbol < inf`, and a global
    number would be a symbol itself.
    """
    return bool(abs(number) <= 1.7976931348623157e308)


def smoothing(label_smoothing: float) -> None:
    """Raises PyTorch's error for a label smoothing outside [0, 1]."""
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")


def shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Raises a ValueError if x has another shape."""
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def product(
    name: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dims: tuple[int, ...] | None,
    weight_dtype: torch.dtype | None = None,
) -> None:
    """Checks shapes and dtypes of an affine map.

    `name` is that of the weight, `dims` are the numbers of axes that it may have (None: any), and
    `weight_dtype` the type to which it will be rounded.
    """
    if dims is not None and weight.dim() not in dims:
        raise RuntimeError(
            f"{name} must have {' or '.join(map(str, dims))} dimensions, got shape "
            f"{tuple(weight.shape)}"
        )
    if input.dim() == 0:
        raise RuntimeError(
            f"input must have at least one dimension, the features, got shape () for {name} of "
            f"shape {tuple(weight.shape)}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"an input of shape {tuple(input.shape)} does not fit {name} of shape "
            f"{tuple(weight.shape)}: their last axes, the features, must be equal"
        )
    if weight.dim() == 1 and bias is not None and bias.dim():
        raise RuntimeError(
            f"{name} of shape {tuple(weight.shape)} needs a bias of shape (), got "
            f"{tuple(bias.shape)}"
        )
    dtypes = [input.dtype, weight_dtype or weight.dtype]
    dtypes += [] if bias is None else [bias.dtype]
    if dtypes.count(dtypes[0]) < len(dtypes) and not is_autocast(input):
        raise RuntimeError(
            f"input, {name} and bias must have one dtype, got {', '.join(map(str, dtypes))}: cast "
            "them, or use torch.autocast"
        )


def head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight_dtype: torch.dtype | None,
) -> None:
    """Checks shapes and dtypes of the head's features, weight and bias."""
    if linear_weight.dim() < 2:
        hint = ""
        if not linear_weight.numel():
            hint = (
                " and no entry: if ZeRO-3 has partitioned it, compute the loss inside of "
                "deepspeed.zero.GatheredParameters(linear_weight), or in the forward of a module "
                "that has the weight, as nn.LinearCrossEntropyLoss"
            )
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
            f"{hint}"
        )
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError(
            f"a linear_weight of shape {tuple(linear_weight.shape)} needs an input of shape "
            f"(N, {linear_weight.shape[-1]}), got {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got "
            f"{tuple(linear_bias.shape)}"
        )
    product("linear_weight", input, linear_weight, linear_bias, None, weight_dtype)


def flatten_head_indices(input: Tensor, target: Tensor, C: int, positions: Sequence[int]) -> Tensor:
    """Returns the head's class indices, checked against input's shape, with one batch axis."""
    batch = input.shape[:-1]
    if len(batch) > 1:
        if target.shape != batch:
            raise RuntimeError(
                f"for an input of shape {tuple(input.shape)} the target must have shape "
                f"{tuple(batch)} or {(*batch, C)}, got {tuple(target.shape)}"
            )
        target = target.flatten()
    leading = [math.prod([*batch])] if batch else []
    indices((*leading, C, *positions), target)
    return target


def no_ignore_index(ignore_index: int | None, target: Tensor) -> None:
    """Refuses an `ignore_index` for a target of probabilities, as PyTorch's head does."""
    if ignore_index is not None:
        raise RuntimeError(
            "ignore_index cannot be specified when target contains probabilities, got "
            f"{ignore_index} and a target of shape {tuple(target.shape)}"
        )


def probabilities(target: Tensor, ignore_index: int) -> None:
    """Checks a target whose shape is that of the logits."""
    if not target.is_floating_point():
        raise RuntimeError(
            "Expected floating point type for target with class probabilities, got "
            f"{target.dtype}; its shape {tuple(target.shape)} is that of the logits"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")


def indices(logits: Sequence[int], target: Tensor) -> None:
    """Checks shape and dtype of class indices for logits (C) or (N, C, d_1, ...)."""
    shape = tuple(target.shape)
    has_index_type = target.dtype in (torch.int64, torch.uint8)
    if has_index_type and len(logits) > 1 and shape == (logits[0], *logits[2:]):
        return
    got = f"got logits {tuple(logits)} and target {shape}"
    if len(logits) > 1:
        if shape[:1] != tuple(logits[:1]):
            raise ValueError(f"Expected input batch_size to match target batch_size, {got}")
        if shape[1:] != tuple(logits[2:]):
            raise RuntimeError(
                f"Expected target size {(logits[0], *logits[2:])} for class indices, or that of "
                f"the logits for probabilities, {got}"
            )
    elif target.dim() > 1:
        raise RuntimeError(f"for logits (C) the target must be one class index, {got}")
    if not has_index_type:
        raise RuntimeError(
            f"expected target dtype to be Long or Byte, but got {target.dtype}; {got}"
        )
    if len(logits) == 1 and shape not in ((), (1,)):
        raise ValueError(f"for logits (C) the target must be one class index, {got}")


def class_weight(weight: Tensor | None, C: int) -> None:
    """Checks the shape of class weights."""
    if weight is not None and weight.shape != (C,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {C} classes or no classes, got a "
            f"weight of shape {tuple(weight.shape)}"
        )


def row_weight(row_weight: Tensor, rows: Sequence[int], dtype: torch.dtype) -> None:
    """Checks the weights of rows of this shape, which are computed in `dtype`."""
    real(row_weight=row_weight)
    shape("row_weight", row_weight, rows)
    if torch.promote_types(row_weight.dtype, dtype) != dtype:
        raise RuntimeError(
            f"row_weight would be rounded to {dtype}, in which the loss is computed, got "
            f"{row_weight.dtype}: cast it"
        )


def normalise_axes(x: Tensor, dim: int | Sequence[int]) -> tuple[int, ...]:
    """Returns `dim` as non-negative axes.

    A tensor without axes accepts -1 and 0 and gives ().
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    rank = max(x.dim(), 1)
    for d in dims:
        if not -rank <= d < rank:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but "
                f"got {d})"
            )
    axes = tuple(d % rank for d in dims)
    if len(set(axes)) < len(axes):
        raise ValueError(f"dim names an axis twice: {dims}")
    return axes if x.dim() else ()


def resolve_reduction(
    reduction: str, size_average: bool | None = None, reduce: bool | None = None
) -> str:
    """Returns the checked reduction. The deprecated arguments override it, as in PyTorch."""
    if size_average is not None or reduce is not None:
        mean = size_average is None or size_average
        summed = reduce is None or reduce
        reduction = "none" if not summed else "mean" if mean else "sum"
        warnings.warn(
            "size_average and reduce args will be deprecated, please use "
            f"reduction='{reduction}' instead.",
            stacklevel=4,
        )
    if reduction == "elementwise_mean":
        warnings.warn(
            "reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.",
            stacklevel=4,
        )
        reduction = "mean"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"{reduction} is not a valid value for reduction: use 'none', 'mean' or 'sum'"
        )
    return reduction


def network(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    output_activation: str,
    activations: Sequence[str],
) -> None:
    """Checks a feed-forward network's tensors and activations; the last may be any of them."""
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"feedforward needs at least one layer and a bias (or None) for each weight, got "
            f"{len(weights)} weights and {len(biases)} biases"
        )
    hidden = [name for name in activations if name != "softmax"]
    for option, value, allowed in (
        ("activation", activation, hidden),
        ("output_activation", output_activation, activations),
    ):
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    real(input=input)
    layer_input = input
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        real(**drop_none(**{f"biases[{i}]": bias}), **{f"weights[{i}]": weight})
        product(f"weights[{i}]", layer_input, weight, bias, dims=(2,))
        layer_input = weight.T  # stands for the layer's output: as many features, the same dtype
