"""Sums over the classes of the terms of divergences, which two heads compute without logits.

A term is p_i l_j, times a coefficient: the probabilities of side i, and the log-probabilities of
side j. Its sum is Σ p_i l_j = E_i - KL(p_i‖p_j) (F25), where E_i = Σ p_i l_i is the negated entropy
of side i. In a divergence the coefficients of each p_i add up to 0, and E_i is not computed.

With the logarithm lm of a mixture m = μ p_t + (1-μ) p_s, μ Σ p_t lm + (1-μ) Σ p_s lm is
μ E_t + (1-μ) E_s - JSD (F27), the Jensen-Shannon divergence.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_nnmath import functional as F
from torch_nnmath._precision import multiply, wide_type, widen
from torch_nnmath._target import TargetOptions
from torch_nnmath.deferred.expansion import Expansion, Mixture, Side, Term
from torch_nnmath.deferred.logits import DeferredLogits, is_traced
from torch_nnmath.deferred.rows import HeadRows, build_rows
from torch_nnmath.deferred.steps import Layout

Numbers: TypeAlias = defaultdict[Any, float]
CANCELLED = "terms that cancel"  # they have a gradient of 0, or none


class Part(NamedTuple):
    """A summand of the result: a number times what `compute` returns for a reduction.

    That is one value for each row for "none". For "sum" it is their sum, if `has_sum`.
    """

    number: float
    compute: Callable[[str], Tensor]
    has_sum: bool = False


def sum_terms(
    input: DeferredLogits, axes: Sequence[int], dtype: torch.dtype, divisor: int = 1
) -> Any:
    """Returns the sum of a combination over these axes, divided by a number.

    The axes are kept with size 1. Returns NotImplemented if they are not those of the classes and
    others, and, after materialising the terms, if these are not the terms of divergences.
    """
    recipe = input.recipe
    form, layout, call = recipe.form, recipe.layout, recipe.call
    if call.is_materialized or is_traced() or form.axis not in axes:
        return NotImplemented
    for other in call.list_calls():
        other.check_operands()
    expansion = Expansion(input)
    dtypes = layout.dtype, dtype
    heads = Heads(layout._replace(dtype=torch.promote_types(*dtypes)), expansion.eps)
    parts = []
    for terms in expansion.group_terms():
        factors, parts_of_terms = terms[0].factors, heads.list_parts(terms)
        if not parts_of_terms and any(f.requires_grad for f in factors):
            heads.refuse(CANCELLED)
        if any(has_infinite_entry(f) for f in factors):
            heads.refuse("terms times a number that is not finite")
        parts += [(factors, part) for part in parts_of_terms]
    obstacle = expansion.obstacle or heads.obstacle
    if obstacle or not parts or heads.has_unused_gradient():
        call.materialize(obstacle or CANCELLED)
        return NotImplemented
    is_total = len(axes) == layout.dim() and all(
        part.has_sum and not any(f.dim() for f in factors) for factors, part in parts
    )
    total: Any = 0.0
    for factors, part in parts:
        value = multiply(part.compute("sum" if is_total else "none"), part.number)
        total = total + math.prod(factors, start=value)
    if is_total:
        result = total.reshape([1] * layout.dim())
    else:
        result = total.unsqueeze(form.axis)
        others = [d for d in axes if d != form.axis]
        result = result.sum(others, keepdim=True) if others else result
    return (result / divisor).to(dtype)


def has_infinite_entry(x: Tensor) -> bool:
    """Whether an entry is known to be infinite or nan. A GPU would have to be waited for."""
    return x.is_cpu and not bool(x.isfinite().all())


class Heads:
    """The sides of divergences, each with its rows: the arguments of the fused losses.

    `obstacle` says why the sum needs the logits, "" if it does not.
    """

    def __init__(self, layout: Layout, eps: float):
        self.layout, self.eps, self.obstacle = layout, eps, ""
        self.dtype = wide_type(layout.dtype)
        self.sides: list[Side] = []
        self.rows: list[HeadRows] = []
        self.used: set[int] = set()  # sides that a part is computed from

    def refuse(self, obstacle: str) -> list[Part]:
        """Records the first obstacle."""
        self.obstacle = self.obstacle or obstacle
        return []

    def has_unused_gradient(self) -> bool:
        """Whether no part depends on a side that a gradient, if of 0, must reach."""
        return any(s.has_gradient and i not in self.used for i, s in enumerate(self.sides))

    def find(self, side: Side) -> int:
        """Returns the index of a side, after building its rows the first time."""
        for i, other in enumerate(self.sides):
            if side.is_same(other):
                return i
        recipe, moves, has_gradient = side
        layout = self.layout._replace(dtype=self.dtype)
        rows = build_rows(recipe, [*recipe.list_steps(), *moves], layout, has_gradient)
        if rows is NotImplemented:
            self.refuse("a step that has another effect on the features than on the logits")
        self.sides.append(side)
        self.rows.append(rows)
        return len(self.sides) - 1

    def list_parts(self, terms: list[Term]) -> list[Part]:
        """Returns the parts whose sum is that of the terms, which all have the same factors."""
        products: Numbers = defaultdict(float)  # of p_i l_j, by (i, j)
        mixtures: list[tuple[dict[int, float], Numbers]] = []  # weights, and numbers of p_i lm by i
        parts: list[Part] = []
        for number, _, tensors, side, log in terms:
            i = None if side is None else self.find(side)
            if not math.isfinite(number):
                return self.refuse("terms times a number that is not finite")
            if any(map(has_infinite_entry, tensors)):
                return self.refuse("terms times a tensor that is not finite")
            if i is not None and isinstance(log, Side) and not tensors:
                products[i, self.find(log)] += number
            elif i is not None and isinstance(log, Mixture) and not tensors:
                self._find_numbers(mixtures, log)[i] += number
            elif i is not None and log is None and len(tensors) == 1:
                products[i, i] += number
                self.used.add(i)
                parts.append(Part(number, partial(self._compute_excess, i, tensors[0])))
                self._check_divergence(i)
            elif i is None and isinstance(log, Side) and len(tensors) < 2:
                j = self.find(log)
                self.used.add(j)
                parts.append(Part(number, partial(self._compute_log_probs, j, tensors)))
            elif i is None and log is None and tensors:
                parts.append(Part(number, partial(self._sum_tensors, tensors)))
            else:
                return self.refuse("a sum of terms that are not those of a divergence")
        for weights, numbers in mixtures:
            parts += self._take_mixture(weights, numbers, products)
        sizes: Numbers = defaultdict(float)
        totals: Numbers = defaultdict(float)
        for (i, j), number in products.items():
            sizes[i] += abs(number)
            totals[i] += number
            if i != j and number:
                parts.append(self._make_divergence(-number, F.linear_kl_div, j, i))
        for i, number in totals.items():
            if abs(number) > 4 * sys.float_info.epsilon * sizes[i]:
                self.used.add(i)
                parts.append(Part(number, partial(self._compute_negated_entropy, i)))
        return parts

    def _find_numbers(self, mixtures: Any, log: Mixture) -> Numbers:
        """Returns the coefficients of p_i lm for this mixture, by i; the caller adds to them."""
        weights: dict[int, float] = defaultdict(float)
        for side, weight in log.weights:
            weights[self.find(side)] += weight
        for other, numbers in mixtures:
            if other == weights:
                return numbers
        mixtures.append((weights, defaultdict(float)))
        return mixtures[-1][1]

    def _take_mixture(
        self, weights: dict[int, float], numbers: Numbers, products: Numbers
    ) -> list[Part]:
        """Returns the terms of a mixture's logarithm as a Jensen-Shannon divergence.

        The coefficients of its E_i are added to the products.
        """
        total = sum(numbers.values())
        if len(weights) != 2 or numbers.keys() != weights.keys() or not total:
            return self.refuse("a mixture in other terms than those of a Jensen-Shannon divergence")
        shares = {i: number / total for i, number in numbers.items()}
        for i, share in shares.items():
            w = weights[i]
            rounding = self.eps * (2 * w * (1 + abs(math.log(w))) + 0.5)  # of ln w, and of 1 - w
            if share <= 0 or abs(w - share) > rounding:
                return self.refuse("a mixture whose weights are not those of the divergence")
            products[i, i] += numbers[i]
        student, teacher = sorted(shares)
        jsd = partial(F.linear_jsd, beta=shares[teacher])
        return [self._make_divergence(-total, jsd, student, teacher)]

    def _make_divergence(self, number: float, loss: Any, student: int, teacher: int) -> Part:
        """Returns a number times a loss of two sides."""
        self.used |= {student, teacher}
        self._check_divergence(student)
        self._check_divergence(teacher)

        def compute(reduction: str) -> Tensor:
            options = make_pair(self.rows[student], self.rows[teacher])
            result: Tensor = loss(**options, reduction=reduction, output_dtype=self.dtype)
            return result

        return Part(number, compute, has_sum=True)

    def _check_divergence(self, i: int) -> None:
        """Refuses a side that no divergence of two heads can have."""
        if not self.obstacle and self.rows[i].softcap is not None:
            self.refuse("a divergence of capped logits")
        if not self.obstacle and self.rows[i].sharding is not None:
            self.refuse("a divergence of a head whose classes are split")

    def _compute_excess(self, i: int, z: Tensor, _: str) -> Tensor:
        """Σ p_i z - E_i, of logits z in memory: their log-sum-exp - KL(p_i‖softmax z)."""
        z, rows = z.to(self.dtype), self.rows[i]
        x, W, b = fold_scale(rows, rows.scale)
        options: Any = {"student_bias": b, "output_dtype": self.dtype, "reduction": "none"}
        return z.logsumexp(-1) - F.linear_kl_div(x, W, z, reverse=True, **options)

    def _compute_log_probs(self, i: int, tensors: tuple[Tensor, ...], _: str) -> Tensor:
        """Σ t l_i of a tensor t; without one, of 1."""
        rows = self.rows[i]
        if tensors:
            loss = rows.prepare_head(tensors[0].to(self.dtype)).compute_loss("none", 0.0, False)
        else:
            head = rows.prepare_head_of_any_class(TargetOptions(label_smoothing=1.0))
            loss = len(rows.weight) * head.compute_loss("none", 0.0, False)
        return -loss.to(self.dtype)

    def _compute_negated_entropy(self, i: int, _: str) -> Tensor:
        """E_i = Σ p_i l_i."""
        expectation = self.rows[i].prepare_head_of_any_class().compute_expectation(True)
        return expectation.to(self.dtype)

    def _sum_tensors(self, tensors: tuple[Tensor, ...], _: str) -> Tensor:
        """The sum of a product of tensors in memory."""
        result: Tensor = math.prod(tensors[1:], start=tensors[0]).sum(-1, dtype=self.dtype)
        return result


def make_pair(student: HeadRows, teacher: HeadRows) -> dict[str, Any]:
    """Returns two heads as arguments of a divergence.

    If the student's scale is a positive number, its inverse is the temperature of both. Other
    scales are those of the features.
    """
    scale, teacher_scale, temperature = student.scale, teacher.scale, 1.0
    if not isinstance(scale, Tensor) and scale > 0:
        scale, teacher_scale, temperature = 1.0, teacher_scale / scale, 1 / scale
    x, W, b = fold_scale(student, scale)
    xt, Wt, bt = fold_scale(teacher, teacher_scale)
    return {
        "student": x,
        "student_weight": W,
        "student_bias": b,
        "teacher": xt,
        "teacher_weight": Wt,
        "teacher_bias": bt,
        "temperature": temperature,
    }


def fold_scale(rows: HeadRows, scale: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns features, weight and bias of a head whose logits are these, times a scale."""
    x, W, b = rows.features, rows.weight, rows.bias
    if rows.weight_dtype is not None:
        W = W.to(rows.weight_dtype)
    if rows.row is not None:
        b = rows.row if b is None else widen(b) + rows.row
    if isinstance(scale, Tensor) or scale != 1:
        x, b = widen(x) * scale, None if b is None else widen(b) * scale
    if rows.row_scale is not None:
        x = widen(x) * rows.row_scale
    return x.to(W.dtype), W, None if b is None else b.to(W.dtype)
