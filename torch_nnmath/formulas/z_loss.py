"""The z-loss, which keeps the log-sum-exp near 0."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import widen
from torch_nnmath.formulas._formula import RowFunction
from torch_nnmath.formulas.softmax import LogSoftmax, LogSumExp
from torch_nnmath.kernels.dispatch import LossKernel, accelerate_with


class ZLoss(RowFunction):
    r"""F20: q = lse(z)²,  dq/dz = 2 lse(z) a,  a = softmax(z).

    z (*, n, *) with n at dim -> q, with size 1 at dim.
    """

    gpu_kernel = LossKernel(kernels.z_loss)

    @staticmethod
    @accelerate_with(gpu_kernel.value, is_gpu_only=True)
    def forward(z: Tensor, dim: int) -> Tensor:
        return torch.logsumexp(widen(z), dim, keepdim=True).square()

    @staticmethod
    def gradient(z: Tensor, dim: int) -> Tensor:
        """2 lse(z) a."""
        return 2 * LogSumExp.evaluate(z, dim) * LogSoftmax.evaluate(z, dim).exp()
