"""The squared error."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import multiply, widen
from torch_nnmath.formulas._formula import Formula, save, sum_last_axes, sum_present
from torch_nnmath.kernels.dispatch import LossKernel, accelerate_with


class SquaredError(Formula):
    r"""F4: c = ½ Σ_j (t_j - a_j)²,  dc/da = a - t,  dc/dt = t - a; all times `scale`.

    a, t of one shape -> c, in which the last `axes` axes, those of the sum, have size 1.
    """

    kernel = LossKernel(kernels.squared_error, kernels.squared_error_cost)

    @staticmethod
    @accelerate_with(kernel.value)
    def forward(a: Tensor, t: Tensor, axes: int, scale: int) -> Tensor:
        return multiply(sum_last_axes((widen(a) - widen(t)).square(), axes), scale / 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        a, t, ctx.axes, ctx.scale = inputs
        save(ctx, a, t)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        a, t = ctx.saved_tensors
        da = SquaredError.gradient(dc, a, t, ctx.axes, ctx.scale)
        needs_a, needs_t, *_ = ctx.needs_input_grad
        return da.to(a.dtype) if needs_a else None, -da.to(t.dtype) if needs_t else None, None, None

    @staticmethod
    @accelerate_with(kernel.gradient)
    def gradient(dc: Tensor, a: Tensor, t: Tensor, axes: int, scale: int) -> Tensor:
        """scale dc (a - t)."""
        return (widen(a) - widen(t)) * (scale * dc)  # in a's memory format

    @staticmethod
    def tangent(ctx: Any, da: Tensor | None, dt: Tensor | None, *_: None) -> Tensor:
        a, t = ctx.saved_tensors
        change = sum_present(None if da is None else widen(da), None if dt is None else -widen(dt))
        return ctx.scale * sum_last_axes((widen(a) - widen(t)) * change, ctx.axes)
