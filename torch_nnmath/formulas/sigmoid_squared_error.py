"""Sigmoid and squared error as one formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nnmath._precision import wide
from torch_nnmath.formulas._formula import Formula, save, summed, total
from torch_nnmath.formulas.sigmoid import Sigmoid


class SigmoidSquaredError(Formula):
    r"""F9, F11: c = ½ Σ_j (t_j - a_j)², a = σ(z);  dc/dz = (a - t) ∘ a ∘ (1 - a),  dc/dt = t - a.

    z, t of one shape -> c, in which the last `axes` axes, those of the sum, have size 1.
    """

    @staticmethod
    def forward(z: Tensor, t: Tensor, axes: int) -> Tensor:
        return summed((wide(t) - wide(z).sigmoid()).square(), axes) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        z, t, ctx.axes = inputs
        save(ctx, z, t)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        z, t = ctx.saved_tensors
        a, slope = sigmoid_and_slope(wide(z))
        da = dc * (a - wide(t))
        dz = (da * slope).to(z.dtype) if ctx.needs_input_grad[0] else None
        dt = -da.to(t.dtype) if ctx.needs_input_grad[1] else None
        return dz, dt, None

    @staticmethod
    def tangent(ctx: Any, dz: Tensor | None, dt: Tensor | None, *_: None) -> Tensor:
        z, t = ctx.saved_tensors
        a, slope = sigmoid_and_slope(wide(z))
        change = total(None if dz is None else slope * dz, None if dt is None else -wide(dt))
        return summed((a - wide(t)) * change, ctx.axes)


def sigmoid_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """σ(z) and σ(z) σ(-z), which is a (1 - a) without its cancellation at large z."""
    a = Sigmoid.apply(z)
    return a, a * Sigmoid.apply(-z)
