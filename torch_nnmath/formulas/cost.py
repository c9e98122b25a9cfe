"""The cost of a batch from the losses of its examples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nnmath.formulas._formula import Formula, save, total


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
