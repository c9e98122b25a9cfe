"""The hyperbolic tangent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath.formulas._formula import Formula, rounded_once, save


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
        return Tanh.product(*ctx.saved_tensors, da)

    tangent = backward  # the Jacobian is symmetric

    @staticmethod
    @rounded_once
    def product(a: Tensor, v: Tensor) -> Tensor:
        """J v = (1 - a²) ∘ v, as a product, which rounds less near |a| = 1."""
        return (1 - a) * (1 + a) * v
