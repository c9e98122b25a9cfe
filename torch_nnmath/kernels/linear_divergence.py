"""The divergence between a student's and a teacher's head (F25 to F29), block by block of rows.

The operators take the fields of `DivergenceInputs`. Half types are computed in float32 and results
are rounded once. A result that is not needed is an empty tensor. A GPU runs the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._records import DivergenceInputs, PairValues
from torch_nnmath.kernels._block import count_rows, group_rows
from torch_nnmath.kernels._divergence_block import (
    NO_VALUES,
    DenseBlock,
    Side,
    choose_divergence_dtype,
)
from torch_nnmath.kernels._library import register_operator
from torch_nnmath.kernels._top_k_block import TopKBlock
from torch_nnmath.kernels.linear_cross_entropy import is_rounded_now

INPUTS = (
    "Tensor x, Tensor W, Tensor? b, Tensor xt, Tensor? Wt, Tensor? bt, Tensor? indices, Tensor? y,"
    " Tensor? keep, float mix, float temperature, float alpha, float base,"
    " bool has_temperature_factor, bool has_rest"
)
INPUT_COUNT = len(DivergenceInputs._fields)
GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"


@register_operator(
    f"divergence({INPUTS}, Tensor? gamma, bool[] needs_gradient) -> (Tensor, {GRADIENTS})",
    lambda *args: _allocate_results(*args),
    count_flops=lambda *args, out_shape: _count_flops(*args),
)
def divergence(*args: Any) -> tuple[Tensor, ...]:
    """Returns each row's loss c (N, 1), and the gradients of Σ γ c (`PairValues`).

    c is `factor` times the divergence plus `label_factor` times the cross entropy. γ is (N, 1), or
    () for one that all rows share; None if no gradient is needed.
    """
    inputs, (gamma, needs_gradient) = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    needs = PairValues(*needs_gradient)
    if gamma is None:
        needs = NO_VALUES
    c = inputs.x.new_zeros((inputs.x.shape[0], 1), dtype=choose_divergence_dtype(inputs))
    gradients = _allocate_gradients(inputs, needs)
    for block in _iterate_blocks(inputs):
        c[block.rows] = block.compute_loss_(needs)
        if gamma is not None:
            block.form_deltas_(block.select_gamma(gamma), needs)
            block.add_gradients(gradients, needs)
    return c, *_round_gradients(inputs, gamma, gradients)


@register_operator(
    f"divergence_second_order({INPUTS}, Tensor gamma, Tensor? u, Tensor? V, Tensor? sigma,"
    " Tensor? ut, Tensor? Vt, Tensor? sigmat, bool[] needs_gradient)"
    f" -> (Tensor, {GRADIENTS})",
    lambda *args: _allocate_second_order(*args),
    count_flops=lambda *args, out_shape: _count_flops_of_second_order(*args),
)
def divergence_second_order(*args: Any) -> tuple[Tensor, ...]:
    """Returns ρ (N, 1), the derivative of each row's loss along the direction (u, V, σ) of x, W, b
    and (ut, Vt, σt) of xt, Wt, bt, and the gradients of Σ γ ρ (`PairValues`).
    """
    inputs, rest = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    gamma, *direction, needs_gradient = rest
    needs = PairValues(*needs_gradient)
    ρ = torch.zeros_like(gamma)
    gradients = _allocate_gradients(inputs, needs)
    for block in _iterate_blocks(inputs, PairValues(*direction)):
        ρ[block.rows] = block.compute_derivative_()
        block.form_second_deltas_(block.select_gamma(gamma))
        block.add_gradients(gradients, needs)
    return ρ, *_round_gradients(inputs, gamma, gradients)


def _iterate_blocks(
    inputs: DivergenceInputs, direction: PairValues | None = None
) -> Iterator[DenseBlock | TopKBlock]:
    """Each block is finished before the next, which reuses its memory."""
    C, dtype = len(inputs.W), choose_divergence_dtype(inputs)
    groups = group_rows(len(inputs.x), C, inputs.keep)
    if not groups:
        return

    def make_side(values: Any, steps: Any) -> Side:
        return Side(values, steps, C, count_rows(groups[0]), dtype)

    student = make_side(inputs.values[:3], None if direction is None else direction[:3])
    if inputs.indices is not None:
        u = None if direction is None else direction.xt
        for i, rows in enumerate(groups):
            yield TopKBlock(inputs, student, u, rows, is_first=i == 0)
        return
    teacher = make_side(inputs.values[3:], None if direction is None else direction[3:])
    for i, rows in enumerate(groups):
        yield DenseBlock(inputs, student, teacher, rows, is_first=i == 0)


def _allocate_gradients(inputs: DivergenceInputs, needs_gradient: Sequence[bool]) -> PairValues:
    """Zeros for each gradient that is needed, in the type of computation; else an empty tensor."""
    x, W, _, xt, Wt, _ = inputs.values
    teacher_shapes = ((0,), (0,)) if Wt is None else (Wt.shape, Wt.shape[:1])
    shapes = x.shape, W.shape, W.shape[:1], xt.shape, *teacher_shapes
    dtype = choose_divergence_dtype(inputs)
    return PairValues(
        *(
            x.new_zeros(shape if is_needed else (0,), dtype=dtype)
            for shape, is_needed in zip(shapes, needs_gradient, strict=True)
        )
    )


def _round_gradients(
    inputs: DivergenceInputs, gamma: Tensor | None, gradients: PairValues
) -> PairValues:
    """The gradients in the types of their inputs; those of a cost on the CPU are left wide."""
    values = zip(gradients, inputs.values, strict=True)
    return PairValues(
        *(
            g.to(v.dtype) if v is not None and is_rounded_now(gamma, v.dtype, v.device) else g
            for g, v in values
        )
    )


def _allocate_results(*args: Any) -> tuple[Tensor, ...]:
    """Memory for the results of `divergence`."""
    inputs, (gamma, needs_gradient) = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    needs = [need and gamma is not None for need in needs_gradient]
    c = inputs.x.new_empty((inputs.x.shape[0], 1), dtype=choose_divergence_dtype(inputs))
    return c, *_round_gradients(inputs, gamma, _allocate_gradients(inputs, needs))


def _allocate_second_order(*args: Any) -> tuple[Tensor, ...]:
    """Memory for the results of `divergence_second_order`."""
    inputs, gamma, needs = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT], args[-1]
    gradients = _allocate_gradients(inputs, needs)
    return torch.empty_like(gamma), *_round_gradients(inputs, gamma, gradients)


def _count_flops(*args: Any) -> int:
    """FLOP of `divergence`, of arguments with shapes in place of tensors: X Wᵀ, Δ W, Δᵀ X and the
    same for the teacher.
    """
    inputs, (gamma, needs_gradient) = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    needs = PairValues(*(need and gamma is not None for need in needs_gradient))
    return _count_flops_of_products(inputs, 1 + needs.x + needs.W, 1 + needs.xt + needs.Wt)


def _count_flops_of_second_order(*args: Any) -> int:
    """FLOP of `divergence_second_order`: X Wᵀ; U Wᵀ, X Vᵀ; Q W, Δ V; Qᵀ X, Δᵀ U, for both."""
    inputs, rest = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    _gamma, *direction, needs_gradient = rest
    counts = []
    for i in (0, 3):
        has_u, has_V = direction[i] is not None, direction[i + 1] is not None
        needs_x, needs_W = needs_gradient[i : i + 2]
        counts.append(1 + has_u + has_V + needs_x * (1 + has_V) + needs_W * (1 + has_u))
    return _count_flops_of_products(inputs, *counts)


def _count_flops_of_products(inputs: Any, count: int, teacher_count: int) -> int:
    """FLOP of this number of products with the student's and with the teacher's weight."""
    (N, D), (C, _) = inputs.x, inputs.W
    teacher_features = 0 if inputs.Wt is None else inputs.Wt[1]
    return 2 * N * C * (D * count + teacher_features * teacher_count)
