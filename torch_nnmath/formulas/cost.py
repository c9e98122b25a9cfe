"""The cost of a batch from the losses of its examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import HALF
from torch_nnmath.formulas._formula import Formula, requires_grad, save, total
from torch_nnmath.kernels.choice import are_many_numbers
from torch_nnmath.kernels.costs import CostWithGradient


class Cost(Formula):
    r"""F3: C = (1/n) Σ c,  dC/dc = 1/n,  dC/dn = -C/n.

    c of any shape; n the number of examples, their total weight (a scalar tensor), or 1 for a sum.
    """

    @staticmethod
    def forward(c: Tensor, n: Tensor | float) -> Tensor:
        return c.sum() / n

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, C: Tensor) -> None:
        c, n = inputs
        ctx.n = None if isinstance(n, Tensor) else n
        save(ctx, c, n if isinstance(n, Tensor) else None)  # not C, which users divide in place

    @staticmethod
    def backward(ctx: Any, dC: Tensor) -> Any:
        c, n = ctx.saved_tensors
        dc = dC / (ctx.n if n is None else n)
        return dc.expand(c.shape), -dc * (c.sum() / n) if ctx.needs_input_grad[1] else None

    @staticmethod
    def tangent(ctx: Any, dc: Tensor | None, dn: Tensor | None) -> Tensor:
        c, n = ctx.saved_tensors
        change = total(None if dc is None else dc.sum(), None if dn is None else -c.sum() / n * dn)
        return change / (ctx.n if n is None else n)


def cost(formula: Any, n: Tensor | float, *inputs: Any) -> Tensor:
    """F3 of a formula's losses: their sum over n."""
    x, *others = inputs
    comes_with_gradient = (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and formula.kernel is not None
        and requires_grad(x)
        and not any(map(requires_grad, (n, *others)))
        and are_many_numbers(inputs)
        and x.dtype not in HALF
    )
    if comes_with_gradient:
        return CostWithGradient.apply(formula, n, *inputs)
    return Cost.of(formula.of(*inputs), n)
