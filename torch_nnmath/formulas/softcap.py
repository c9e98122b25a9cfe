"""The soft cap, which keeps logits between -cap and cap."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nnmath._precision import multiply, widen
from torch_nnmath.formulas._formula import Formula, save
from torch_nnmath.formulas.tanh import Tanh


class SoftCap(Formula):
    r"""F19: v = κ tanh(z/κ),  dv/dz = 1 - (v/κ)².

    z, v of any shape; v in float32 for a half z.
    """

    @staticmethod
    def forward(z: Tensor, cap: float) -> Tensor:
        return multiply(_divide(z, cap).tanh(), cap)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, v: Tensor) -> None:
        z, ctx.cap = inputs
        save(ctx, z)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return Tanh.product(Tanh.evaluate(_divide(z, ctx.cap)), dv).to(z.dtype), None

    @staticmethod
    def tangent(ctx: Any, dz: Tensor, _: None) -> Tensor:
        (z,) = ctx.saved_tensors
        return Tanh.product(Tanh.evaluate(_divide(z, ctx.cap)), widen(dz))


def _divide(z: Tensor, cap: float) -> Tensor:
    return multiply(widen(z), 1 / cap)
