"""The squared error."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import wide
from torch_nnmath.formulas._formula import Formula, save, summed, total
from torch_nnmath.kernels.choice import Kernel, fast


class SquaredError(Formula):
    r"""F4: c = ½ Σ_j (t_j - a_j)²,  dc/da = a - t,  dc/dt = t - a; all times `scale`.

    a, t of one shape -> c, in which the last `axes` axes, those of the sum, have size 1.
    """

    kernel = Kernel(kernels.squared_error)

    @staticmethod
    @fast(kernel.value)
    def forward(a: Tensor, t: Tensor, axes: int, scale: float) -> Tensor:
        return summed((wide(t) - wide(a)).square(), axes) * (scale / 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        a, t, ctx.axes, ctx.scale = inputs
        save(ctx, a, t)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        a, t = ctx.saved_tensors
        da = SquaredError.gradient(dc, a, t, ctx.axes, ctx.scale)
        wants_a, wants_t, *_ = ctx.needs_input_grad
        return da.to(a.dtype) if wants_a else None, -da.to(t.dtype) if wants_t else None, None, None

    @staticmethod
    @fast(kernel.gradient)
    def gradient(dc: Tensor, a: Tensor, t: Tensor, axes: int, scale: float) -> Tensor:
        """scale dc (a - t)."""
        return scale * dc * (wide(a) - wide(t))

    @staticmethod
    def tangent(ctx: Any, da: Tensor | None, dt: Tensor | None, *_: None) -> Tensor:
        a, t = ctx.saved_tensors
        change = total(None if da is None else wide(da), None if dt is None else -wide(dt))
        return ctx.scale * summed((wide(a) - wide(t)) * change, ctx.axes)
