"""The entropy of softmax, on logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import widen, zero_safe_product
from torch_nnmath.formulas._formula import RowFunction
from torch_nnmath.formulas.softmax import LogSoftmax
from torch_nnmath.kernels.dispatch import LossKernel, accelerate_with


class Entropy(RowFunction):
    r"""F21: h = -(1/ln β) a·l,  dh/dz = -(1/ln β) a ∘ (l - a·l),  l = z - lse(z), a = e^l.

    z (*, n, *) with n at dim -> h, with size 1 at dim. A class whose logit is -inf adds 0.
    """

    gpu_kernel = LossKernel(kernels.entropy)

    @staticmethod
    @accelerate_with(gpu_kernel.value, is_gpu_only=True)
    def forward(z: Tensor, dim: int, base: float) -> Tensor:
        l = torch.log_softmax(widen(z), dim)
        return -zero_safe_product(l.exp(), l).sum(dim, keepdim=True) / math.log(base)

    @staticmethod
    def gradient(z: Tensor, dim: int, base: float) -> Tensor:
        """-(1/ln β) a ∘ (l - a·l)."""
        l = LogSoftmax.evaluate(z, dim)
        a = l.exp()
        al = zero_safe_product(a, l)
        return (a * al.sum(dim, keepdim=True) - al) / math.log(base)
