"""The rectifier, and the same in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath.formulas._formula import Formula, save
from torch_nnmath.kernels.choice import fast, is_transformed


class ReLU(Formula):
    r"""F2: a = max(0, z),  da/dz = 0 where z <= 0, else 1 (nan passes).  z, a of any shape."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.relu(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, a: Tensor) -> None:
        save(ctx, a)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return ReLU.product(a, da)

    tangent = backward  # the Jacobian is symmetric

    @staticmethod
    def product(a: Tensor, v: Tensor) -> Tensor:
        """J v = v where a > 0, else 0."""
        return ReLUProduct.of(a, v)


class ReLUProduct(Formula):
    r"""F2: J v = v where a > 0, else 0, also where v is not finite;  in a: 0, in v: J."""

    @staticmethod
    @fast(kernels.relu_product)
    def forward(a: Tensor, v: Tensor) -> Tensor:
        return v.masked_fill(a <= 0, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, product: Tensor) -> None:
        save(ctx, inputs[0])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        (a,) = ctx.saved_tensors
        return None, ReLUProduct.apply(a, u)

    @staticmethod
    def tangent(ctx: Any, da: Tensor | None, dv: Tensor | None) -> Tensor:
        (a,) = ctx.saved_tensors
        return torch.zeros_like(a) if dv is None else ReLUProduct.apply(a, dv)


class ReLUInPlace(ReLU):
    r"""F2 written over its input, for reverse mode alone: PyTorch compares the tangent of what is
    changed in place by identity, which does not survive transforms; `relu_` says what they take.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.relu_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, a: Tensor) -> None:
        ctx.mark_dirty(*inputs)
        ctx.save_for_backward(a)


def relu_(z: Tensor) -> Tensor:
    """F2 in z: through a copy where a transform may be watching, or a compiler, which elides it."""
    if torch.compiler.is_compiling() or is_transformed():
        return z.copy_(ReLU.of(z))
    return ReLUInPlace.apply(z)
