"""The hyperbolic tangent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import wide
from torch_nnmath.formulas._formula import Formula, rounded_once, save, total
from torch_nnmath.kernels.choice import fast


class Tanh(Formula):
    r"""F2: a = tanh z,  da/dz = 1 - a².  z, a of any shape."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.tanh(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, a: Tensor) -> None:
        save(ctx, a)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return Tanh.product(a, da)

    tangent = backward  # the Jacobian is symmetric

    @staticmethod
    def product(a: Tensor, v: Tensor) -> Tensor:
        """J v = (1 - a²) ∘ v."""
        return TanhProduct.of(a, v)


class TanhProduct(Formula):
    r"""F2: J v = (1 - a) (1 + a) ∘ v, which rounds less than 1 - a² near |a| = 1;  in a: -2 a ∘ v,
    which would be lost near 0 as the sum of two terms, and in v: J.  a, v of one shape.
    """

    @staticmethod
    @fast(kernels.tanh_product)
    @rounded_once
    def forward(a: Tensor, v: Tensor) -> Tensor:
        return (1 - a) * (1 + a) * v

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, product: Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        a, v = ctx.saved_tensors
        return TanhProduct.in_a(a, u, v), TanhProduct.apply(a, u)

    @staticmethod
    def tangent(ctx: Any, da: Tensor | None, dv: Tensor | None) -> Tensor:
        a, v = ctx.saved_tensors
        return total(
            None if da is None else TanhProduct.in_a(a, da, v),
            None if dv is None else TanhProduct.apply(a, dv),
        )

    @staticmethod
    def in_a(a: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """-2 a ∘ u ∘ v."""
        return (-2 * wide(a) * wide(u) * wide(v)).to(a.dtype)
