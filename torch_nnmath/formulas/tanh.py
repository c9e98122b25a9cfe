"""The hyperbolic tangent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import widen
from torch_nnmath.formulas._formula import Formula, SymmetricJacobian, round_once, save, sum_present
from torch_nnmath.kernels.dispatch import accelerate_with


class Tanh(SymmetricJacobian):
    r"""F2: a = tanh z,  da/dz = 1 - a².  z, a of any shape."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.tanh(z)

    @staticmethod
    def product(a: Tensor, v: Tensor) -> Tensor:
        """J v = (1 - a²) ∘ v."""
        return TanhProduct.evaluate(a, v)


class TanhProduct(Formula):
    r"""F2: J v = (1 - a) (1 + a) ∘ v, which rounds less than 1 - a² near |a| = 1.

    Its derivative is J with respect to v and -2 a ∘ v with respect to a, which as autograd's sum of
    two terms would lose its digits near a = 0. a, v of one shape.
    """

    @staticmethod
    @accelerate_with(kernels.tanh_product)
    @round_once
    def forward(a: Tensor, v: Tensor) -> Tensor:
        return (1 - a) * (1 + a) * v

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, product: Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        a, v = ctx.saved_tensors
        return TanhProduct.derivative_wrt_a(a, u, v), TanhProduct.apply(a, u)

    @staticmethod
    def tangent(ctx: Any, da: Tensor | None, dv: Tensor | None) -> Tensor:
        a, v = ctx.saved_tensors
        return sum_present(
            None if da is None else TanhProduct.derivative_wrt_a(a, da, v),
            None if dv is None else TanhProduct.apply(a, dv),
        )

    @staticmethod
    def derivative_wrt_a(a: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """-2 a ∘ u ∘ v."""
        return (-2 * widen(a) * widen(u) * widen(v)).to(a.dtype)
