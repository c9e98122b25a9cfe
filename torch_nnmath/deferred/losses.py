"""Losses of deferred logits that call the fused head instead of computing the logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import functional as F
from torch_nnmath._logits import LogitOptions, is_scaled, read_logit_options
from torch_nnmath._precision import disable_autocast, is_autocast, wide_type, widen
from torch_nnmath._target import TargetOptions
from torch_nnmath.deferred.combinations import PROBABILITY, find_kinds
from torch_nnmath.deferred.divergences import sum_terms
from torch_nnmath.deferred.logits import DeferredLogits, register_override
from torch_nnmath.deferred.rows import make_rows
from torch_nnmath.deferred.wrappers import move_hooks

# The losses


def is_deferred(value: Any) -> bool:
    return isinstance(value, DeferredLogits)


def register_loss(*functions: Any) -> Callable[..., Any]:
    """Registers a rule that computes these functions without logits.

    The rule gets the function, the deferred logits, whether autocast is on and the function's other
    arguments. It runs without autocast, since the head has cast the operands of the product
    already. It returns NotImplemented if the function needs the logits.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        @register_override(*functions)
        @functools.wraps(rule)
        def loss(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(input, DeferredLogits):
                return NotImplemented
            is_loss_autocast = is_autocast(input)
            with disable_autocast(input):
                result = rule(func, input, is_loss_autocast, *args, **kwargs)
            if result is not NotImplemented:
                logits = [v for v in (input, *args, *kwargs.values()) if is_deferred(v)]
                calls = [call for z in logits for call in z.recipe.call.list_calls()]
                for log in {id(call.log): call.log for call in calls}.values():
                    log.fused += 1
                for call in calls:
                    call.has_fused_loss |= torch.is_grad_enabled() and input.requires_grad
                move_hooks([hook for call in calls for hook in call.wrapper_hooks], result)
            return result

        return loss

    return register


@dataclass
class CrossEntropyArguments:
    """The arguments of `cross_entropy` after the logits: PyTorch's, then this library's.

    Those of `nll_loss` are the first six.
    """

    target: Any
    weight: Tensor | None = None
    size_average: bool | None = None
    ignore_index: int = -100
    reduce: bool | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0
    _: KW_ONLY
    row_weight: Tensor | None = None
    divisor: Any = None
    base: float = torch.e
    logit_scale: Any = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    z_loss: float = 0.0
    return_stats: bool = False
    output_dtype: torch.dtype | None = None

    def read_logit_options(self) -> LogitOptions:
        return read_logit_options(self.base, self.logit_scale, self.softcap, self.temperature)


@register_loss(torch.nn.functional.cross_entropy, F.cross_entropy, torch.nn.functional.nll_loss)
def cross_entropy(
    func: Any, input: DeferredLogits, is_loss_autocast: bool, *args: Any, **kwargs: Any
) -> Any:
    """F14, F15: `cross_entropy` of logits, or `nll_loss` of log-probabilities."""
    arguments = CrossEntropyArguments(*args, **kwargs)
    target, weight, is_log = (
        arguments.target,
        arguments.weight,
        func is torch.nn.functional.nll_loss,
    )
    form, axis = input.recipe.form, min(input.dim() - 1, 1)
    if is_deferred(target) and not is_log:
        return _compute_cross_entropy_of_two_heads(input, axis, arguments, is_loss_autocast)
    if not isinstance(target, Tensor) or is_deferred(target) or form.log_sign < 0:
        return NotImplemented
    options = arguments.read_logit_options()
    if form.is_capped and (options.cap is not None or is_scaled(options.scale)):
        return NotImplemented
    is_distribution = target.shape == input.shape and target.is_floating_point()
    if is_distribution and not is_log:
        check.probabilities(target, arguments.ignore_index)
        target = target.movedim(axis, -1)
    elif target.shape != form.rows_shape or target.dtype not in (torch.int64, torch.uint8):
        return NotImplemented
    rows = make_rows(input, is_log=is_log, axis=axis)
    if rows is NotImplemented:
        return NotImplemented
    if is_loss_autocast:
        rows = rows._replace(dtype=wide_type(rows.dtype))
        target, weight = widen(target), None if weight is None else widen(weight)
    ignore_index = None if is_distribution else arguments.ignore_index
    head = rows.prepare_head(
        target,
        TargetOptions(weight, ignore_index, arguments.label_smoothing, arguments.row_weight),
        options,
    ).with_output_dtype(arguments.output_dtype)
    reduction = check.resolve_reduction(
        arguments.reduction, arguments.size_average, arguments.reduce
    )
    head = head.with_divisor(arguments.divisor, reduction)
    return head.compute_loss(reduction, arguments.z_loss, arguments.return_stats)


def _compute_cross_entropy_of_two_heads(
    input: DeferredLogits, axis: int, arguments: CrossEntropyArguments, is_loss_autocast: bool
) -> Any:
    """The cross entropy of another head's probabilities: their entropy plus F25."""
    target, is_half = arguments.target, is_loss_autocast and input.dtype.itemsize < 4
    options = replace(arguments, target=None, size_average=None, reduce=None, reduction="mean")
    if find_kinds(target.recipe.form) != frozenset({PROBABILITY}) or is_half:
        return NotImplemented
    # a learnt scale of value 1 equals the default, but needs a gradient
    has_tensor = isinstance(options.logit_scale, Tensor)
    if not input.recipe.form.is_logits or has_tensor or options != CrossEntropyArguments(None):
        return NotImplemented
    reduction = check.resolve_reduction(
        arguments.reduction, arguments.size_average, arguments.reduce
    )
    terms = input.log_softmax(axis) * target
    if not is_deferred(terms):
        return NotImplemented
    axes = [terms.recipe.form.axis] if reduction == "none" else [*range(terms.dim())]
    rows = math.prod(input.recipe.form.rows_shape) if reduction == "mean" else 1
    total = sum_terms(terms, axes, terms.dtype, -rows)
    return total if total is NotImplemented else total.squeeze(tuple(axes))


@register_loss(torch.gather, Tensor.gather)
def gather(
    func: Any, input: DeferredLogits, is_loss_autocast: bool, dim: Any, index: Any, **kwargs: Any
) -> Any:
    """One class of each row: F22 for log-probabilities, F1 for logits."""
    form, axis = input.recipe.form, input.recipe.form.axis
    if (
        form.softmax_sign
        or not isinstance(index, Tensor)
        or index.dtype != torch.int64
        or "out" in kwargs
    ):
        return NotImplemented
    if [*index.shape] != [1 if d == axis else size for d, size in enumerate(input.shape)]:
        return NotImplemented
    rows = make_rows(input, is_log=bool(form.log_sign), axis=dim)
    if rows is NotImplemented:
        return NotImplemented
    try:
        ignore_nothing = TargetOptions(ignore_index=torch.iinfo(torch.int64).min)
        head = rows.prepare_head(index.squeeze(axis), ignore_nothing)
    except IndexError:  # an index out of range, for which `gather` raises a RuntimeError
        return NotImplemented
    result = (
        form.log_sign * head.compute_log_probs(False)
        if form.log_sign
        else head.compute_class_logits()
    )
    result = result.to(input.dtype).unsqueeze(axis)
    input.recipe.find_original().gathered.append((index.clone(), result.detach().clone()))
    return result


MEANS = (torch.mean, Tensor.mean)


@register_loss(torch.sum, Tensor.sum, *MEANS)
def sum_over_classes(
    func: Any,
    input: DeferredLogits,
    is_loss_autocast: bool,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    **kwargs: Any,
) -> Any:
    """The sum or mean over the classes of log-probabilities, or of their expectation's terms.

    The former is a cross entropy whose target has the same probability for every class. The latter
    is the negated entropy (F21), or for terms of logits the log-sum-exp minus the entropy. Terms of
    divergences (F25 to F27) may also be summed over all axes.
    """
    if "axis" in kwargs:
        dim = kwargs.pop("axis")
    dtype = dtype or input.dtype
    if kwargs or dtype.is_complex or torch.promote_types(dtype, input.dtype) != dtype:
        return NotImplemented
    if input.recipe.form.kinds:
        return _sum_divergences(func, input, dim, keepdim, dtype)
    form, axis = input.recipe.form, _get_only_axis(dim)
    if axis is None:
        return NotImplemented
    is_log = bool(form.log_sign) or not form.is_product
    rows = make_rows(input, is_log=is_log, axis=axis, is_product=form.is_product)
    if rows is NotImplemented:
        return NotImplemented
    rows, class_count = rows._replace(dtype=dtype), input.shape[form.axis]
    if form.is_product:
        expectation = rows.prepare_head_of_any_class().compute_expectation(is_log)
        sign = form.softmax_sign * (form.log_sign or 1)
        result = sign * expectation.to(dtype) / (class_count if func in MEANS else 1)
    else:
        head = rows.prepare_head_of_any_class(TargetOptions(label_smoothing=1.0))
        factor = -form.log_sign * (1 if func in MEANS else class_count)
        result = factor * head.compute_loss("none", 0.0, False).to(dtype)
    return result.unsqueeze(form.axis) if keepdim else result


def _sum_divergences(
    func: Any, input: DeferredLogits, dim: Any, keepdim: bool, dtype: torch.dtype
) -> Any:
    """The sum or mean over these axes of the terms of divergences."""
    n = input.dim()
    dims = [*dim] if isinstance(dim, list | tuple) else [dim]
    if dim is None or not dims:
        dims = [*range(n)]
    if not all(isinstance(d, int) for d in dims):
        return NotImplemented
    axes = {d % n for d in dims}
    if len(axes) != len(dims) or not all(-n <= d < n for d in dims):
        return NotImplemented  # PyTorch raises the error
    count = math.prod(input.shape[d] for d in axes) if func in MEANS else 1
    result = sum_terms(input, [*axes], dtype, count)
    return result if keepdim or result is NotImplemented else result.squeeze(tuple(axes))


@register_override(torch.nn.functional.kl_div)
def kl_div(
    func: Any,
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """The sum or mean of the terms of a divergence (F25).

    PyTorch's function records the terms; with `reduction="none"` they are the result.
    """
    options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    nothing = torch.empty(0)
    func(nothing, nothing, **options)  # its warnings, and errors of these arguments
    is_batchmean = reduction == "batchmean"
    name = check.resolve_reduction("sum" if is_batchmean else reduction, size_average, reduce)
    if name == "none":
        return NotImplemented
    total = compute_kl_div(torch.kl_div, input, target, REDUCTION_NAMES.index(name), log_target)
    return total / input.size(0) if is_batchmean else total


REDUCTION_NAMES = ("none", "mean", "sum")  # in the order of their numbers in PyTorch


@register_override(torch.kl_div)
def compute_kl_div(
    func: Any, input: Any, target: Any, reduction: int = 1, log_target: bool = False
) -> Any:
    """As `kl_div`, for PyTorch's function that takes a reduction as a number."""
    terms = func(input, target, 0, log_target=log_target)
    if reduction == 0:
        return terms
    reduce = torch.mean if reduction == 1 else torch.sum
    total = sum_over_classes(reduce, terms)
    return reduce(terms) if total is NotImplemented else total


@register_loss(torch.logsumexp, torch.special.logsumexp, Tensor.logsumexp)
def log_sum_exp(
    func: Any,
    input: DeferredLogits,
    is_loss_autocast: bool,
    dim: Any,
    keepdim: bool = False,
    **kwargs: Any,
) -> Any:
    """The log-sum-exp over the classes, the logarithm of F7's denominator."""
    form, axis = input.recipe.form, _get_only_axis(dim)
    if kwargs or axis is None or (is_loss_autocast and input.dtype.itemsize < 4):
        return NotImplemented  # autocast's dtype for half-precision logits depends on the device
    rows = make_rows(input, is_log=False, axis=axis)
    if rows is NotImplemented:
        return NotImplemented
    result = rows.prepare_head_of_any_class().compute_log_sum_exp().to(input.dtype)
    return result.unsqueeze(form.axis) if keepdim else result


def _get_only_axis(dim: Any) -> int | None:
    axes = dim if isinstance(dim, list | tuple) else [dim]
    return axes[0] if len(axes) == 1 and isinstance(axes[0], int) else None
