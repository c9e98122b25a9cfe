"""Options of logits, and public arguments of cross entropies in memory -> losses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas, kernels
from torch_nnmath._precision import (
    cast,
    cast_for_loss,
    get_constant,
    multiply,
    weigh,
    wide_type,
    widen,
)
from torch_nnmath._records import Target
from torch_nnmath._reduction import (
    choose_divisor,
    count_examples,
    count_kept,
    read_divisor,
    reduce_formula,
)
from torch_nnmath._target import (
    TargetOptions,
    read_indices,
    read_probabilities,
    read_row_weight,
)


class LossStats(NamedTuple):
    """What `return_stats` adds to a loss: one value for each row, detached.

    For an ignored row `predicted` is -1, `correct` False, the rest 0.
    """

    lse: Tensor  # ln Σ e^logits, of the logits that the loss sees: scaled, capped, with temperature
    entropy: Tensor  # of their softmax, to the loss's base
    predicted: Tensor  # the class of the largest logit, the first of several
    correct: Tensor  # whether that is the target, or the target's most probable class
    z_loss: Tensor  # lse² times its coefficient


def make_stats(
    lse: Tensor, entropy: Tensor, predicted: Tensor, label: Any, z_loss_coefficient: float
) -> LossStats:
    """`LossStats` of rows with these labels.

    Ignored rows have predicted class -1, so `correct` is False whatever their label.
    """
    lse, entropy = lse.detach(), entropy.detach()
    z_loss = z_loss_coefficient * lse.square()
    return LossStats(lse, entropy, predicted, predicted == label, z_loss)


class LogitOptions(NamedTuple):
    """What is done to logits before the loss, and the base of its logarithm."""

    base: float = math.e
    scale: Tensor | float = 1.0  # F18
    cap: float | None = None  # F19


def is_scaled(logit_scale: Tensor | float) -> bool:
    """Whether the scale changes anything. A tensor's value is not read."""
    return isinstance(logit_scale, Tensor) or logit_scale != 1


def scale_logits(x: Any, logit_scale: Tensor | float) -> Any:
    """F18; None stays None."""
    if x is None or not is_scaled(logit_scale):
        return x
    return formulas.LogitScale.evaluate(x, logit_scale)


def read_logit_options(
    base: float, logit_scale: Tensor | float, softcap: float | None, temperature: float
) -> LogitOptions:
    """Checks the public options of logits.

    A temperature after the cap is a smaller scale and a smaller cap:
    (κ tanh(s z / κ)) / θ = (κ/θ) tanh((s/θ) z / (κ/θ)).
    """
    check.base(base)
    check.logits(logit_scale, softcap, temperature)
    if temperature != 1:
        if isinstance(logit_scale, Tensor):
            logit_scale = multiply(widen(logit_scale), 1 / temperature)
        else:
            logit_scale = logit_scale / temperature
        softcap = None if softcap is None else softcap / temperature
    return LogitOptions(base, logit_scale, softcap)


def measure_logits(
    logits: Tensor,
    keep: Tensor | None,
    dim: int,
    options: LogitOptions,
    label: Any,
    z_loss_coefficient: float,
) -> LossStats:
    """`LossStats` of logits that are in memory, their classes at `dim`."""
    constant = formulas.mask_ignored(keep, logits.detach())
    lse = widen(constant).logsumexp(dim, keepdim=True)
    entropy = formulas.Entropy.evaluate(constant, dim, options.base)
    lse, entropy = (formulas.mask_ignored(keep, v).squeeze(dim) for v in (lse, entropy))
    if constant.shape[dim]:
        predicted = constant.argmax(dim)
    else:
        predicted = lse.new_full(lse.shape, -1, dtype=torch.int64)
    if keep is not None:
        predicted = predicted.masked_fill(~keep.squeeze(dim), -1)
    return make_stats(lse, entropy, predicted, label, z_loss_coefficient)


def compute_plain_cost(
    input: Tensor, target: Tensor, ignore_index: int | None, reduction: str, base: float
) -> Tensor | None:
    """F13 of plain logits (N, C) on the CPU and class indices, reduced, if no row is ignored.

    None for other arguments. It asks each question once, and so takes half the time of
    `compute_cross_entropy` for few rows.
    """
    if reduction == "none" or input.dim() != 2 or target.dtype != torch.int64:
        return None
    if target.shape != input.shape[:1] or not (input.is_cpu and target.is_cpu):
        return None
    if not formulas.CostWithGradient.may_replace(formulas.CrossEntropy, 1, (input, target)):
        return None
    ignore_index = -100 if ignore_index is None else ignore_index
    y = kernels.read_plain_indices(target, input.shape[1], ignore_index)
    if y is None:
        return None
    inputs = input, y.unsqueeze(1), get_constant(1.0, input.dtype), None, None, 1, base
    n = len(y) if reduction == "mean" else 1
    return formulas.CostWithGradient.evaluate(formulas.CrossEntropy, n, *inputs)


def compute_categorical_cross_entropy(
    probs: Tensor,
    target: Tensor,
    base: float,
    reduction: str,
    dim: int,
    row_weight: Tensor | None,
) -> Tensor:
    """F5 of probabilities, reduced."""
    (dim,) = check.normalise_axes(probs, dim) or (0,)
    dtype = torch.promote_types(probs.dtype, target.dtype)
    dtype, probs, target = cast_for_loss(dtype, probs, target)
    rows = (*probs.shape[:dim], *probs.shape[dim + 1 :])
    if target.is_floating_point():
        check.shape("target with class probabilities", target, probs.shape)
    else:
        if probs.dim() == 0:
            raise IndexError("class indices need probs with an axis of classes, got shape ()")
        check.shape("target with class indices", target, rows)
        y, _ = kernels.class_indices(target, probs.shape[dim], None)
        probs = probs.gather(dim, y.unsqueeze(dim))
        target = torch.ones_like(probs)
    r = read_row_weight(TargetOptions(row_weight=row_weight), rows, None, wide_type(dtype))
    inputs, n = (probs, target, dim, base), count_kept(None, count_examples(probs, dim), r)
    formula = formulas.CategoricalCrossEntropy
    return reduce_formula(reduction, n, formula, *inputs, axes=dim, row_weight=r).to(dtype)


def compute_cross_entropy(
    input: Tensor,
    target: Tensor,
    target_options: TargetOptions,
    logit_options: LogitOptions,
    reduction: str,
    z_loss: float,
    return_stats: bool,
    output_dtype: torch.dtype | None,
) -> Any:
    """F13 and F20 of logits that are in memory, reduced; with `return_stats` also `LossStats`."""
    check.finite("z_loss", z_loss)
    check.output_dtype(output_dtype)
    check.smoothing(target_options.label_smoothing)
    base, logit_scale, softcap = logit_options
    weight, ignore_index, label_smoothing, row_weight, _, divisor = target_options
    defaults_to_none = weight, row_weight, divisor, softcap, output_dtype
    is_any_given = any(v is not None for v in defaults_to_none)
    has_options = is_any_given or label_smoothing or z_loss or return_stats
    if not (has_options or is_scaled(logit_scale)):
        cost = compute_plain_cost(input, target, ignore_index, reduction, base)
        if cost is not None:
            return cost
    dtype, input, target, weight = cast_for_loss(input.dtype, input, target, weight)
    options = target_options._replace(weight=weight)
    dim = 0 if input.dim() == 1 else 1
    is_distribution = input.shape == target.shape
    if is_distribution:
        check.probabilities(target, -100 if ignore_index is None else ignore_index)
    C = input.size(dim)  # an IndexError if there is no axis
    if not input.is_floating_point():
        raise NotImplementedError(f"cross_entropy does not support {input.dtype}: cast the logits")
    keep: Any = None
    label: Any = None
    if is_distribution:
        t, dtype = read_probabilities(target, options, dim, C, dtype)
        read_target = Target(None, None, t, dim)
        rows = (*input.shape[:dim], *input.shape[dim + 1 :])
        r = read_row_weight(options, rows, None, wide_type(input.dtype))
        total_weight: Any = count_kept(None, count_examples(input, dim), r) if C else 0
        label = target.argmax(dim) if return_stats and C else None
    else:
        check.indices(input.shape, target)
        if input.dim() == 1:  # one row, whose class and weight may have the shape (1)
            target = target.reshape(())
            if isinstance(row_weight, Tensor) and row_weight.dim():
                options = options._replace(row_weight=row_weight.squeeze(0))
        indices = read_indices(target, C, options, input.dtype)
        label, total_weight, r = indices.y, indices.total_weight, indices.row_weight
        y, p = label.unsqueeze(dim), indices.p.unsqueeze(dim) if indices.p.dim() else indices.p
        read_target = indices.make_target(y, p, dim, input.dim())
        keep = None if indices.keep is None else indices.keep.unsqueeze(dim)
    divisor = read_divisor(divisor, reduction, input)
    total_weight = total_weight if divisor is None else divisor
    if softcap is not None or z_loss or is_scaled(logit_scale):
        input = scale_logits(formulas.mask_ignored(keep, input), logit_scale)
        input = input if softcap is None else formulas.SoftCap.evaluate(input, softcap)
    inputs = input, *read_target[:3], keep, dim, base
    loss = reduce_formula(
        reduction, total_weight, formulas.CrossEntropy, *inputs, axes=dim, row_weight=r
    )
    if z_loss:
        z_losses = formulas.mask_ignored(keep, formulas.ZLoss.evaluate(input, dim)).squeeze(dim)
        if reduction == "none":
            loss = loss + multiply(weigh(r, z_losses), z_loss)
        else:
            kept_rows: Any = divisor
            if divisor is None:
                kept_rows = count_kept(keep, count_examples(input, dim), r) if C else 0
            n = choose_divisor(reduction, kept_rows, input)
            loss = loss + multiply(formulas.Cost.evaluate(z_losses, n, r), z_loss)
    loss = cast(loss, output_dtype or dtype)
    if not return_stats:
        return loss
    return loss, measure_logits(input, keep, dim, logit_options, label, z_loss)
