"""The entropy of softmax, on logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import wide
from torch_nnmath.formulas._formula import Formula, save
from torch_nnmath.formulas.softmax import LogSoftmax
from torch_nnmath.kernels._library import exact


class Entropy(Formula):
    r"""F21: h = -(1/ln β) Σ a l = (1/ln β)(lse(z) - a·z),  dh/dz = -(1/ln β) a ∘ (l - a·l),
    l = z - lse(z), a = e^l.

    z (*, n, *) with n at dim -> h, with size 1 at dim. A class whose logit is -inf adds 0.
    """

    @staticmethod
    def forward(z: Tensor, dim: int, base: float) -> Tensor:
        l = torch.log_softmax(wide(z), dim)
        return -exact(l.exp(), l).sum(dim, keepdim=True) / math.log(base)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, h: Tensor) -> None:
        z, ctx.dim, ctx.base = inputs
        save(ctx, z)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return (dh * Entropy.gradient(wide(z), ctx.dim, ctx.base)).to(z.dtype), None, None

    @staticmethod
    def tangent(ctx: Any, dz: Tensor, *_: None) -> Tensor:
        (z,) = ctx.saved_tensors
        return (Entropy.gradient(wide(z), ctx.dim, ctx.base) * dz).sum(ctx.dim, keepdim=True)

    @staticmethod
    def gradient(z: Tensor, dim: int, base: float) -> Tensor:
        """-(1/ln β) a ∘ (l - a·l)."""
        l = LogSoftmax.of(z, dim)
        a = l.exp()
        al = exact(a, l)
        return (a * al.sum(dim, keepdim=True) - al) / math.log(base)
