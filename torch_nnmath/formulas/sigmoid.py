"""The sigmoid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath.formulas._formula import Formula, rounded_once, save
from torch_nnmath.kernels.choice import fast


class Sigmoid(Formula):
    r"""F6: a = 1/(1 + e^-z),  da/dz = a (1 - a).  z, a of any shape."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, a: Tensor) -> None:
        save(ctx, a)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> Tensor:
        return Sigmoid.product(*ctx.saved_tensors, da)

    tangent = backward  # the Jacobian is symmetric

    @staticmethod
    @fast(kernels.sigmoid_product)
    @rounded_once
    def product(a: Tensor, v: Tensor) -> Tensor:
        """J v = a (1 - a) ∘ v."""
        return a * (1 - a) * v
