"""Sigmoid and squared error as one formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import widen
from torch_nnmath.formulas._formula import Formula, save, sum_last_axes, sum_present
from torch_nnmath.kernels.dispatch import LossKernel, accelerate_with


class SigmoidSquaredError(Formula):
    r"""F9, F11: c = ½ Σ_j (t_j - a_j)², a = σ(z);  dc/dz = (a - t) ∘ a ∘ (1 - a),  dc/dt = t - a.

    z, t of one shape -> c, in which the last `axes` axes, those of the sum, have size 1.
    """

    kernel = LossKernel(kernels.sigmoid_squared_error, kernels.sigmoid_squared_error_cost)

    @staticmethod
    @accelerate_with(kernel.value)
    def forward(z: Tensor, t: Tensor, axes: int) -> Tensor:
        return sum_last_axes((widen(t) - widen(z).sigmoid()).square(), axes) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        z, t, ctx.axes = inputs
        save(ctx, z, t)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        saved = ctx.saved_tensors
        z, t = map(widen, saved)
        needs_z, needs_t, _ = ctx.needs_input_grad
        dz = SigmoidSquaredError.gradient(dc, z, t, ctx.axes) if needs_z else None
        dt = (t - SigmoidPair.evaluate(z)[0]) * dc if needs_t else None
        pairs = zip((dz, dt), saved, strict=True)
        return *(g if g is None else g.to(x.dtype) for g, x in pairs), None

    @staticmethod
    @accelerate_with(kernel.gradient)
    def gradient(dc: Tensor, z: Tensor, t: Tensor, axes: int) -> Tensor:
        """dc (a - t) a (1 - a)."""
        a, complement = SigmoidPair.evaluate(widen(z))
        return (a - widen(t)) * dc * a * complement  # in z's memory format

    @staticmethod
    def tangent(ctx: Any, dz: Tensor | None, dt: Tensor | None, *_: None) -> Tensor:
        z, t = map(widen, ctx.saved_tensors)
        a, complement = SigmoidPair.evaluate(z)
        change = sum_present(
            None if dz is None else a * complement * dz, None if dt is None else -widen(dt)
        )
        return sum_last_axes((a - t) * change, ctx.axes)


class SigmoidPair(Formula):
    """F6 of z and of -z with one exponential: a and 1 - a, whose digits a subtraction would lose.

    da/dz = a (1 - a), d(1 - a)/dz = -a (1 - a).
    """

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        e = z.abs().neg().exp()
        large = 1 / (1 + e)
        small = e * large
        return torch.where(z > 0, large, small), torch.where(z > 0, small, large)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        save(ctx, *outputs)

    @staticmethod
    def backward(ctx: Any, da: Tensor, dcomplement: Tensor) -> Tensor:
        a, complement = ctx.saved_tensors
        return (da - dcomplement) * a * complement

    @staticmethod
    def tangent(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        a, complement = ctx.saved_tensors
        da = dz * a * complement
        return da, -da
