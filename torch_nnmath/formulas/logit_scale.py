"""Logits times a scale, such as the inverse of a temperature."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nnmath._precision import multiply, widen
from torch_nnmath.formulas._formula import Formula, save, sum_present


class LogitScale(Formula):
    r"""F18: z = s x,  dz/dx = s,  dz/ds = x.

    x of any shape, s a number or () -> z, in float32 for a half x. The head scales its
    features and its bias, since s (W x + b) = W (s x) + s b, and never has all logits in memory.
    A GPU computes s (W x), so that its product has half operands (`HeadInputs.features`).
    """

    @staticmethod
    def forward(x: Tensor, s: Tensor | float) -> Tensor:
        return _scale(x, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, z: Tensor) -> None:
        x, s = inputs
        ctx.s = None if isinstance(s, Tensor) else s
        save(ctx, x, s if isinstance(s, Tensor) else None)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, s = ctx.saved_tensors
        needs_x, needs_s = ctx.needs_input_grad
        dx = _scale(dz, ctx.s if s is None else s).to(x.dtype) if needs_x else None
        return dx, (dz * widen(x)).sum().to(s.dtype) if needs_s else None

    @staticmethod
    def tangent(ctx: Any, dx: Tensor | None, ds: Tensor | None) -> Tensor:
        x, s = ctx.saved_tensors
        return sum_present(
            None if dx is None else _scale(dx, ctx.s if s is None else s),
            None if ds is None else widen(x) * ds,
        )


def _scale(x: Tensor, s: Tensor | float) -> Tensor:
    return widen(x) * s if isinstance(s, Tensor) else multiply(widen(x), s)
