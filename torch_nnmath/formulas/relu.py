"""The rectifier, and the same in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath.formulas._formula import Formula, save


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
        return ReLU.product(*ctx.saved_tensors, da)

    tangent = backward  # the Jacobian is symmetric

    @staticmethod
    def product(a: Tensor, v: Tensor) -> Tensor:
        """J v = v where a > 0, else 0; exactly 0 also where v is not finite."""
        return v.masked_fill(a <= 0, 0)


class ReLUInPlace(ReLU):
    r"""F2 written over its input."""

    generate_vmap_rule = False  # a derived rule would lose that the output is the input

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.relu_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, a: Tensor) -> None:
        ctx.mark_dirty(*inputs)
        save(ctx, a)

    @staticmethod
    def tangent(ctx: Any, dz: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return dz.masked_fill_(a <= 0, 0)  # the tangent of what is changed in place is, too

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor) -> Any:
        return ReLUInPlace.apply(z), in_dims[0]
