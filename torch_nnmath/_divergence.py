"""Public arguments of a divergence between two heads -> `DivergenceInputs`, and rows -> losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas, kernels
from torch_nnmath._precision import cast_for_product, is_autocast, make_scalar, wide_type
from torch_nnmath._records import DivergenceInputs
from torch_nnmath._reduction import choose_divisor, count_kept
from torch_nnmath._target import TargetOptions, read_indices
from torch_nnmath.kernels.dispatch import are_plain_cpu_tensors


class Distributions(NamedTuple):
    """The tensors that give the student's and the teacher's distribution, as the caller did."""

    student: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher: Tensor
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_indices: Tensor | None


class Labels(NamedTuple):
    """Class indices, the weight of their cross entropy, and the index of ignored rows."""

    labels: Tensor | None
    alpha: float
    ignore_index: int


class DivergenceOptions(NamedTuple):
    """Which divergence, of which softmaxes, and what becomes of it."""

    mix: float
    temperature: float
    has_temperature_factor: bool
    remainder: str
    base: float
    reduction: str
    output_dtype: torch.dtype | None


def compute_divergence(
    distributions: Distributions, labels: Labels, options: DivergenceOptions
) -> Tensor:
    """Checks the arguments and returns the reduced loss."""
    reduction = check.resolve_reduction(
        "mean" if options.reduction == "batchmean" else options.reduction
    )
    check.base(options.base)
    check.logits(1.0, None, options.temperature)
    check.output_dtype(options.output_dtype)
    _check_distributions(distributions)
    _check_alpha(labels)
    if options.remainder not in ("class", "drop"):
        raise ValueError(f"remainder must be 'class' or 'drop', got {options.remainder!r}")
    student, W, b, teacher, Wt, bt, indices = distributions
    output_dtype = options.output_dtype or student.dtype
    if options.output_dtype is None and is_autocast(student):
        output_dtype = torch.float64 if output_dtype == torch.float64 else torch.float32
    student, W, b = cast_for_product(student, W, b)
    teacher, Wt, bt = cast_for_product(teacher, Wt, bt)
    batch, C = student.shape[:-1], W.shape[0]
    N = math.prod([*batch])
    if indices is not None:
        indices = _read_top_k_indices(indices.reshape(N, indices.shape[-1]), C)
    y = keep = None
    if labels.labels is not None:
        target = check.flatten_head_indices(student, labels.labels, C, ())
        read = read_indices(
            target.reshape(N, 1), C, TargetOptions(None, labels.ignore_index), student.dtype
        )
        y, keep = read.y if labels.alpha else None, read.keep
    inputs = DivergenceInputs(
        x=student.reshape(N, student.shape[-1]),
        W=W,
        b=b,
        xt=teacher.reshape(N, teacher.shape[-1]),
        Wt=Wt,
        bt=bt,
        indices=indices,
        y=y,
        keep=keep,
        mix=options.mix,
        temperature=options.temperature,
        alpha=labels.alpha,
        base=options.base,
        has_temperature_factor=options.has_temperature_factor,
        has_rest=options.remainder == "class",
    )
    if reduction == "none":
        c: Tensor = formulas.LinearDivergence.evaluate(*inputs)
        return c.reshape(batch).to(output_dtype)
    return _reduce(inputs, reduction).to(output_dtype)


def _reduce(inputs: DivergenceInputs, reduction: str) -> Tensor:
    """The sum of the rows' losses, or their mean over the rows that are not ignored."""
    zero = inputs.x.new_zeros((), dtype=wide_type(inputs.x.dtype))
    n = choose_divisor(reduction, count_kept(inputs.keep, inputs.x.shape[0]), zero)
    needs_gradient = formulas.LinearDivergenceCost.select_gradients(inputs)
    if formulas.LinearDivergenceCost.may_replace(n, needs_gradient):
        cost: Tensor
        cost, *_ = formulas.LinearDivergenceCost.apply(
            make_scalar(n, zero), *inputs, needs_gradient
        )
        return cost
    c = formulas.LinearDivergence.evaluate(*inputs)
    cost = formulas.Cost.evaluate(c, n, None)
    return cost


def _check_distributions(distributions: Distributions) -> None:
    """Checks types, dtypes and shapes of both heads."""
    student, W, b, teacher, Wt, bt, indices = distributions
    check.floating(
        student=student,
        student_weight=W,
        teacher=teacher,
        **check.drop_none(student_bias=b, teacher_weight=Wt, teacher_bias=bt),
    )
    check.product("student_weight", student, W, b, (2,))
    _check_bias("student_bias", b, W)
    if indices is not None and Wt is not None:
        raise ValueError("teacher_indices are those of log-probabilities: omit teacher_weight")
    if Wt is None:
        if bt is not None:
            raise ValueError(
                "teacher_bias needs a teacher_weight; without one, teacher holds the logits"
            )
        _check_given_teacher(teacher, indices, student.shape[:-1], W.shape[0])
        return
    check.product("teacher_weight", teacher, Wt, bt, (2,))
    _check_bias("teacher_bias", bt, Wt)
    if teacher.shape[:-1] != student.shape[:-1]:
        raise RuntimeError(
            f"student of shape {tuple(student.shape)} and teacher of shape {tuple(teacher.shape)} "
            "must have the same batch axes"
        )
    if Wt.shape[0] != W.shape[0]:
        raise RuntimeError(
            f"student_weight has {W.shape[0]} classes and teacher_weight {Wt.shape[0]}: a "
            "divergence needs the same classes"
        )


def _check_given_teacher(
    teacher: Tensor, indices: Tensor | None, batch: Sequence[int], C: int
) -> None:
    """Checks the shapes of a teacher's logits, or of its log-probabilities and their indices."""
    if indices is None:
        if teacher.shape != (*batch, C):
            raise RuntimeError(
                f"without teacher_weight, teacher must hold logits of shape {(*batch, C)}, got "
                f"{tuple(teacher.shape)}"
            )
        return
    check.real(teacher_indices=indices)
    if indices.dtype != torch.int64:
        raise RuntimeError(f"teacher_indices must be int64, got {indices.dtype}")
    if teacher.shape[:-1] != batch or teacher.dim() == 0 or indices.shape != teacher.shape:
        raise RuntimeError(
            f"teacher must hold log-probabilities (*, k) with the batch axes {tuple(batch)}, and "
            f"teacher_indices have its shape, got {tuple(teacher.shape)} and "
            f"{tuple(indices.shape)}"
        )


def _read_top_k_indices(indices: Tensor, C: int) -> Tensor:
    """Returns indices (N, k), checked to be in [0, C) and, where that can be read, different."""
    y, _ = kernels.class_indices(indices, C, None)
    if are_plain_cpu_tensors(y) and y.shape[1] > 1:
        ordered = y.sort(1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("teacher_indices must be different classes in each row")
    return y


def _check_bias(name: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"{name} must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )


def _check_alpha(labels: Labels) -> None:
    alpha = labels.alpha
    check.finite("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if labels.labels is not None:
        check.real(labels=labels.labels)
    elif alpha:
        raise ValueError(f"alpha = {alpha} needs labels, whose cross entropy it weights")
