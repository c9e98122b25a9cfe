"""The z-loss, which keeps the logarithm of softmax's denominator near 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import wide
from torch_nnmath.formulas._formula import Formula, save
from torch_nnmath.formulas.softmax import LogSoftmax, LogSumExp


class ZLoss(Formula):
    r"""F20: q = lse(z)²,  dq/dz = 2 lse(z) a,  a = softmax(z).

    z (*, n, *) with n at dim -> q, with size 1 at dim.
    """

    @staticmethod
    def forward(z: Tensor, dim: int) -> Tensor:
        return torch.logsumexp(wide(z), dim, keepdim=True).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, q: Tensor) -> None:
        z, ctx.dim = inputs
        save(ctx, z)

    @staticmethod
    def backward(ctx: Any, dq: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return (dq * ZLoss.gradient(wide(z), ctx.dim)).to(z.dtype), None

    @staticmethod
    def tangent(ctx: Any, dz: Tensor, _: None) -> Tensor:
        (z,) = ctx.saved_tensors
        return (ZLoss.gradient(wide(z), ctx.dim) * dz).sum(ctx.dim, keepdim=True)

    @staticmethod
    def gradient(z: Tensor, dim: int) -> Tensor:
        """2 lse(z) a."""
        return 2 * LogSumExp.of(z, dim) * LogSoftmax.of(z, dim).exp()
