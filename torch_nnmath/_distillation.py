"""The losses over a student's and a teacher's head, which `functional` exports."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath._divergence import (
    Distributions,
    DivergenceOptions,
    Labels,
    compute_divergence,
)


@check.support_torch_function
def linear_kl_div(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    remainder: str = "class",
    reverse: bool = False,
    temperature: float = 1.0,
    temperature_factor: bool = False,
    labels: Tensor | None = None,
    alpha: float = 0.0,
    ignore_index: int = -100,
    base: float = math.e,
    reduction: str = "mean",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The divergence KL(p||q) of a teacher's softmax p from a student's q (F25), for distillation.

    q is the softmax of linear(student, student_weight, student_bias) / temperature, p that of
    linear(teacher, teacher_weight, teacher_bias) / temperature. Only one block of either logits is
    in memory, at first and second order. A teacher that needs no gradient costs one product.

    Args:
        student: the student's features, (*, D).
        student_weight: (C, D).
        teacher: the teacher's features (*, D'), or its logits (*, C), or its log-probabilities
            (*, k) of the classes `teacher_indices`.
        teacher_weight: (C, D'); None if `teacher` holds logits or log-probabilities.
        student_bias, teacher_bias: (C).
        teacher_indices: (*, k), different classes in each row, such as the teacher's likeliest
            (F28). Only the student's logits are then divided by the temperature.
        remainder: what becomes of the other classes: "class" makes one class of them, for student
            and teacher; "drop" leaves their terms out of the sum.
        reverse: whether to compute KL(q||p) instead (F26).
        temperature: divides both logits; must be positive and finite.
        temperature_factor: whether the divergence is multiplied by temperature², which keeps the
            size of its gradients.
        labels: class indices (int64 or uint8), (*), whose rows count unless they are
            `ignore_index`.
        alpha: in [0, 1]; the loss is alpha * cross entropy of the labels, at temperature 1, plus
            (1 - alpha) * divergence (F29).
        ignore_index: rows with this label add nothing, at any order, whatever their features are.
        base: base of the logarithm; positive, not 1.
        reduction: "none", "sum" or "mean" over the rows that count, which `F.kl_div` calls
            "batchmean"; both names are accepted.
        output_dtype: the dtype of the loss; None is that of `student`.

    Returns:
        (*) without a reduction, else ().

    Raises:
        ValueError: for an unknown reduction, an invalid base, temperature or alpha, an alpha
            without labels, or a teacher_bias without teacher_weight.
        RuntimeError: for shapes or dtypes that do not fit.
        IndexError: if a label is outside [0, C) and is not `ignore_index`.
        TypeError: if an argument is complex or not a tensor.

    >>> features, weight = torch.ones(3, 1), torch.tensor([[0.], [1.]])
    >>> linear_kl_div(features, weight, 0 * features, weight)
    tensor(0.1201)
    """
    return compute_divergence(
        Distributions(
            *(student, student_weight, student_bias),
            *(teacher, teacher_weight, teacher_bias),
            teacher_indices,
        ),
        Labels(labels, alpha, ignore_index),
        DivergenceOptions(
            mix=1.0 if reverse else 0.0,
            temperature=temperature,
            has_temperature_factor=temperature_factor,
            remainder=remainder,
            base=base,
            reduction=reduction,
            output_dtype=output_dtype,
        ),
    )


@check.support_torch_function
def linear_jsd(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    remainder: str = "class",
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_factor: bool = False,
    labels: Tensor | None = None,
    alpha: float = 0.0,
    ignore_index: int = -100,
    base: float = math.e,
    reduction: str = "mean",
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The generalised Jensen-Shannon divergence of a student's softmax q and a teacher's p (F27).

    beta KL(p||m) + (1 - beta) KL(q||m) with m = beta p + (1 - beta) q, as in GKD. q is the softmax
    of linear(student, student_weight, student_bias) / temperature, p that of linear(teacher,
    teacher_weight, teacher_bias) / temperature. Only one block of either logits is in memory, at
    first and second order. A teacher that needs no gradient costs one product.

    Args:
        student: the student's features, (*, D).
        student_weight: (C, D).
        teacher: the teacher's features (*, D'), or its logits (*, C), or its log-probabilities
            (*, k) of the classes `teacher_indices`.
        teacher_weight: (C, D'); None if `teacher` holds logits or log-probabilities.
        student_bias, teacher_bias: (C).
        teacher_indices: (*, k), different classes in each row, such as the teacher's likeliest
            (F28). Only the student's logits are then divided by the temperature.
        remainder: what becomes of the other classes: "class" makes one class of them, for student
            and teacher; "drop" leaves their terms out of the sum.
        beta: in [0, 1], the weight of the teacher. 0 gives KL(p||q) and 1 gives KL(q||p), as in
            TRL: the limits of the divergence over beta and over 1 - beta.
        temperature: divides both logits; must be positive and finite.
        temperature_factor: whether the divergence is multiplied by temperature², which keeps the
            size of its gradients.
        labels: class indices (int64 or uint8), (*), whose rows count unless they are
            `ignore_index`.
        alpha: in [0, 1]; the loss is alpha * cross entropy of the labels, at temperature 1, plus
            (1 - alpha) * divergence (F29).
        ignore_index: rows with this label add nothing, at any order, whatever their features are.
        base: base of the logarithm; positive, not 1.
        reduction: "none", "sum" or "mean" over the rows that count, which `F.kl_div` calls
            "batchmean"; both names are accepted.
        output_dtype: the dtype of the loss; None is that of `student`.

    Returns:
        (*) without a reduction, else ().

    Raises:
        ValueError: for an unknown reduction, an invalid base, temperature, beta or alpha, an alpha
            without labels, or a teacher_bias without teacher_weight.
        RuntimeError: for shapes or dtypes that do not fit.
        IndexError: if a label is outside [0, C) and is not `ignore_index`.
        TypeError: if an argument is complex or not a tensor.

    >>> features, weight = torch.ones(3, 1), torch.tensor([[0.], [1.]])
    >>> linear_jsd(features, weight, 0 * features, weight)
    tensor(0.0285)
    """
    check.finite("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    return compute_divergence(
        Distributions(
            *(student, student_weight, student_bias),
            *(teacher, teacher_weight, teacher_bias),
            teacher_indices,
        ),
        Labels(labels, alpha, ignore_index),
        DivergenceOptions(
            mix=beta,
            temperature=temperature,
            has_temperature_factor=temperature_factor,
            remainder=remainder,
            base=base,
            reduction=reduction,
            output_dtype=output_dtype,
        ),
    )
