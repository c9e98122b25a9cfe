"""Softmax, its logarithm, and its Jacobian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import widen
from torch_nnmath.formulas._formula import (
    Formula,
    RowFunction,
    SymmetricJacobian,
    round_once,
    save,
)
from torch_nnmath.kernels.dispatch import LossKernel, accelerate_with


class Softmax(SymmetricJacobian):
    r"""F7: a_j = e^{z_j} / Σ_i e^{z_i},  da_j/dz_k = a_j (δ_jk - a_k).

    z, a (*, n, *) with n at dim.
    """

    @staticmethod
    def forward(z: Tensor, dim: int) -> Tensor:
        return torch.softmax(z, dim)

    @staticmethod
    @accelerate_with(kernels.softmax_product)
    @round_once
    def product(a: Tensor, v: Tensor, dim: int = -1) -> Tensor:
        """J v = a ∘ (v - a·v)."""
        return a * (v - (a * v).sum(dim, keepdim=True))


class LogSoftmax(Formula):
    r"""ln of F7: l = z - lse(z),  dl_j/dz_k = δ_jk - e^{l_k}.  z, l (*, n, *) with n at dim."""

    @staticmethod
    def forward(z: Tensor, dim: int) -> Tensor:
        return torch.log_softmax(z, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, l: Tensor) -> None:
        save(ctx, l)
        _, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, dl: Tensor) -> Any:
        (l,) = ctx.saved_tensors
        return LogSoftmax.transposed_product(l, dl, ctx.dim), None

    @staticmethod
    @accelerate_with(kernels.log_softmax_product, is_gpu_only=True)
    @round_once
    def transposed_product(l: Tensor, v: Tensor, dim: int) -> Tensor:
        """Jᵀ v = v - e^l Σ v."""
        return v - l.exp() * v.sum(dim, keepdim=True)

    @staticmethod
    def tangent(ctx: Any, dz: Tensor, _: None) -> Tensor:
        (l,) = ctx.saved_tensors
        return dz - (l.exp() * dz).sum(ctx.dim, keepdim=True)


class LogSumExp(RowFunction):
    r"""lse = ln Σ e^z, the logarithm of F7's denominator; its derivative is F7.

    z (*, n, *) -> (*, 1, *).
    """

    gpu_kernel = LossKernel(kernels.log_sum_exp)

    @staticmethod
    @accelerate_with(gpu_kernel.value, is_gpu_only=True)
    def forward(z: Tensor, dim: int) -> Tensor:
        return torch.logsumexp(widen(z), dim, keepdim=True)

    @staticmethod
    def gradient(z: Tensor, dim: int) -> Tensor:
        """a = e^l."""
        return LogSoftmax.evaluate(z, dim).exp()


def softmax_jacobian(z: Tensor, dim: int) -> Tensor:
    r"""F17: J = diag(a) - a aᵀ,  z (*, n, *) with n at dim -> J (*, *, n, n)."""
    a = Softmax.evaluate(z, dim).movedim(dim, -1)
    return torch.diag_embed(a) - a.unsqueeze(-1) * a.unsqueeze(-2)
