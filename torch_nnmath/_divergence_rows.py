"""The catalogue's rows of divergences between two heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import formulas, nn
from torch_nnmath import functional as F
from torch_nnmath import reference_divergence as reference
from torch_nnmath._catalog_rows import CLASSES, Input, Row, Sample, layer, per_example, vector

INDICES = (2, 0)  # classes of the teacher's log-probabilities
LABEL = 1

STUDENT = {"x": vector(2), **layer(2, CLASSES)}
TEACHER = {"xt": vector(2), **layer(2, CLASSES, "t")}
# two classes, since the polynomials of a proof grow fast
SMALL_HEADS = {"x": vector(1), **layer(1, 2), "xt": vector(1), **layer(1, 2, "t")}
LABELS = {"y": Input((), "label")}
LOG_PROBABILITIES = {"lt": vector(2, "log_probability")}


def compute_loss(*inputs: Tensor, loss: Callable[..., Tensor], **options: Any) -> Tensor:
    """Calls a loss with (x, W, b, xt, Wt, bt), or with labels after these."""
    x, W, b, xt, Wt, bt, *labels = inputs
    if labels:
        options["labels"] = labels[0]
    return loss(x, W, xt, Wt, student_bias=b, teacher_bias=bt, **options)


def compute_distillation_loss(*inputs: Tensor) -> Tensor:
    """Computes F29 of the inputs (x, W, b, xt, Wt, bt), with the same label in each row."""
    labels = torch.full(inputs[0].shape[:1], LABEL, device=inputs[0].device)
    options = {"alpha": 0.3, "temperature": 1.5, "temperature_factor": True, "base": 2}
    return compute_loss(*inputs, labels, loss=per_example(F.linear_kl_div), **options)


def compute_top_k_loss(
    x: Tensor, W: Tensor, b: Tensor, lt: Tensor, *labels: Tensor, loss: Any, **options: Any
) -> Tensor:
    """Calls a loss with log-probabilities of the classes `INDICES`, or with labels after these."""
    indices = torch.tensor(INDICES, device=x.device).expand(lt.shape)
    if labels:
        options["labels"] = labels[0]
    return loss(x, W, lt, student_bias=b, teacher_indices=indices, **options)


def _compute(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return partial(compute_loss, loss=loss, **options)


def _compute_top_k(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return partial(compute_top_k_loss, loss=loss, **options)


DIVERGENCE_ROWS = (
    Row(
        ids=("F25",),
        section="tuning",
        title="Kullback-Leibler divergence between two heads",
        function=formulas.LinearDivergence,
        reference=reference.LINEAR_KL_DIV,
        samples=(
            Sample(
                _compute(per_example(F.linear_kl_div), base=2, temperature=1.5),
                {**STUDENT, **TEACHER},
            ),
            Sample(_compute(F.linear_kl_div), {**STUDENT, **TEACHER, **LABELS}, "ignored, mean"),
            Sample(
                lambda x, W, z: F.linear_kl_div(x, W, z, reduction="sum"),
                {"x": vector(2), "W": STUDENT["W"], "z": vector(CLASSES)},
                "teacher's logits, no bias, sum",
            ),
            Sample(
                nn.LinearKLDivLoss(temperature=0.8),
                {"x": vector(2), "W": STUDENT["W"], "xt": vector(2), "Wt": TEACHER["Wt"]},
                "module, mean",
            ),
        ),
        options={"beta": 2, "tau": 1.5},
    ),
    Row(
        ids=("F26",),
        section="tuning",
        title="reverse Kullback-Leibler divergence between two heads",
        function=formulas.LinearDivergence,
        reference=reference.LINEAR_REVERSE_KL_DIV,
        samples=(
            Sample(
                _compute(per_example(F.linear_kl_div), reverse=True, base=2, temperature=1.5),
                {**STUDENT, **TEACHER},
            ),
            Sample(
                _compute(F.linear_kl_div, reverse=True, reduction="sum"),
                {**STUDENT, **TEACHER, **LABELS},
                "ignored, sum",
            ),
        ),
        options={"beta": 2, "tau": 1.5},
    ),
    Row(
        ids=("F27",),
        section="tuning",
        title="generalised Jensen-Shannon divergence between two heads",
        function=formulas.LinearDivergence,
        reference=reference.LINEAR_JSD,
        samples=(
            Sample(
                _compute(per_example(F.linear_jsd), beta=0.3, base=2, temperature=1.5),
                SMALL_HEADS,
            ),
            Sample(
                _compute(F.linear_jsd, alpha=0.4), {**STUDENT, **TEACHER, **LABELS}, "labels, mean"
            ),
            Sample(
                nn.LinearJSDLoss(beta=0.7, reduction="sum"),
                {"x": vector(2), "W": STUDENT["W"], "xt": vector(2), "Wt": TEACHER["Wt"]},
                "module, sum",
            ),
        ),
        options={"beta": 2, "tau": 1.5, "mix": 0.3},
    ),
    Row(
        ids=("F28",),
        section="tuning",
        title="divergence from a teacher's likeliest classes",
        function=formulas.LinearDivergence,
        reference=reference.TOP_K_KL_DIV,
        samples=(
            Sample(
                _compute_top_k(per_example(F.linear_kl_div), base=2, temperature=1.5),
                {**STUDENT, **LOG_PROBABILITIES},
            ),
            Sample(
                _compute_top_k(F.linear_kl_div, reverse=True, remainder="drop"),
                {**STUDENT, **LOG_PROBABILITIES, **LABELS},
                "reverse, rest dropped, ignored, mean",
            ),
            Sample(
                _compute_top_k(F.linear_jsd, alpha=0.4, temperature=0.8),
                {**STUDENT, **LOG_PROBABILITIES, **LABELS},
                "Jensen-Shannon, labels, mean",
            ),
        ),
        options={"indices": INDICES, "beta": 2, "tau": 1.5},
    ),
    Row(
        ids=("F29",),
        section="tuning",
        title="distillation with labels",
        function=formulas.LinearDivergence,
        reference=reference.DISTILLATION,
        samples=(
            Sample(compute_distillation_loss, SMALL_HEADS),
            Sample(
                _compute(F.linear_kl_div, alpha=0.3, temperature=2, reverse=True),
                {**STUDENT, **TEACHER, **LABELS},
                "reverse, ignored, mean",
            ),
        ),
        options={"y": LABEL, "alpha": 0.3, "beta": 2, "tau": 1.5},
    ),
)
