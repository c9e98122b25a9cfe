"""Sigmoid and squared error as one formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import wide
from torch_nnmath.formulas._formula import Formula, fast, save, summed, total


class SigmoidSquaredError(Formula):
    r"""F9, F11: c = ½ Σ_j (t_j - a_j)², a = σ(z);  dc/dz = (a - t) ∘ a ∘ (1 - a),  dc/dt = t - a.

    z, t of one shape -> c, in which the last `axes` axes, those of the sum, have size 1.
    """

    @staticmethod
    @fast(kernels.sigmoid_squared_error)
    def forward(z: Tensor, t: Tensor, axes: int) -> Tensor:
        return summed((wide(t) - wide(z).sigmoid()).square(), axes) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        z, t, ctx.axes = inputs
        save(ctx, z, t)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        saved = ctx.saved_tensors
        z, t = map(wide, saved)
        wants_z, wants_t, _ = ctx.needs_input_grad
        dz = SigmoidSquaredError.in_z(dc, z, t).to(saved[0].dtype) if wants_z else None
        dt = (dc * (t - SigmoidOfInput.of(z))).to(saved[1].dtype) if wants_t else None
        return dz, dt, None

    @staticmethod
    @fast(kernels.sigmoid_squared_error_gradient)
    def in_z(dc: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """dc (a - t) a (1 - a)."""
        return dc * (SigmoidOfInput.apply(z) - t) * slope(z)

    @staticmethod
    def tangent(ctx: Any, dz: Tensor | None, dt: Tensor | None, *_: None) -> Tensor:
        z, t = map(wide, ctx.saved_tensors)
        change = total(None if dz is None else slope(z) * dz, None if dt is None else -wide(dt))
        return summed((SigmoidOfInput.apply(z) - t) * change, ctx.axes)


class SigmoidOfInput(Formula):
    """F6 with its derivative at every order from z: da/dz = σ(z) σ(-z)."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, a: Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:
        return da * slope(*ctx.saved_tensors)

    tangent = backward  # the Jacobian is symmetric


def slope(z: Tensor) -> Tensor:
    """σ(z) σ(-z), which is a (1 - a) without its cancellation at large z."""
    return SigmoidOfInput.apply(z) * SigmoidOfInput.apply(-z)
