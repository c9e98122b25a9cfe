"""Cross entropy on probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import multiply, widen
from torch_nnmath.formulas._formula import Formula, save, sum_present


class CategoricalCrossEntropy(Formula):
    r"""F5, F16: c = -Σ_j t_j log_β a_j,  dc/da = -(1/ln β) t/a,  dc/dt = -log_β a.

    a, t of one shape, n classes at dim -> c, with size 1 at dim. 0 log 0 is 0, as is 0/0.
    """

    @staticmethod
    def forward(a: Tensor, t: Tensor, dim: int, base: float) -> Tensor:
        a, t = widen(a), widen(t)
        c = (t * mask_unused(t, a).log()).sum(dim, keepdim=True)
        return multiply(c, -1 / math.log(base))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        a, t, ctx.dim, ctx.base = inputs
        save(ctx, a, t)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        a, t = ctx.saved_tensors
        k = multiply(dc, -1 / math.log(ctx.base))
        needs_a, needs_t, *_ = ctx.needs_input_grad
        da = (k * widen(t) / mask_unused(t, widen(a))).to(a.dtype) if needs_a else None
        dt = (k * widen(a).log()).to(t.dtype) if needs_t else None
        return da, dt, None, None

    @staticmethod
    def tangent(ctx: Any, da: Tensor | None, dt: Tensor | None, *_: None) -> Tensor:
        a, t = (widen(x) for x in ctx.saved_tensors)
        change = sum_present(
            None if da is None else t / mask_unused(t, a) * widen(da),
            None if dt is None else torch.xlogy(widen(dt), a),
        )
        return multiply(change.sum(ctx.dim, keepdim=True), -1 / math.log(ctx.base))


def mask_unused(t: Tensor, a: Tensor) -> Tensor:
    """a, with 1 where t is 0 and a has no logarithm."""
    return a.masked_fill((t == 0) & (a <= 0), 1)
