"""The sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath.formulas._formula import SymmetricJacobian, round_once
from torch_nnmath.kernels.dispatch import accelerate_with


class Sigmoid(SymmetricJacobian):
    r"""F6: a = 1/(1 + e^-z),  da/dz = a (1 - a).  z, a of any shape."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    @staticmethod
    @accelerate_with(kernels.sigmoid_product)
    @round_once
    def product(a: Tensor, v: Tensor) -> Tensor:
        """J v = a (1 - a) ∘ v."""
        return a * (1 - a) * v
