"""The cost of a batch from the losses of its examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_nnmath._precision import HALF, make_scalar, wide_type
from torch_nnmath.formulas._formula import Formula, requires_grad, save, sum_present
from torch_nnmath.kernels.dispatch import are_large_plain_tensors, are_plain_tensors
from torch_nnmath.kernels.scaling import may_scale, scale_gradient_


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
        save(ctx, c, n if isinstance(n, Tensor) else None)  # not C: users may modify it in place

    @staticmethod
    def backward(ctx: Any, dC: Tensor) -> Any:
        c, n = ctx.saved_tensors
        dc = dC / (ctx.n if n is None else n)
        return dc.expand(c.shape), -dc * (c.sum() / n) if ctx.needs_input_grad[1] else None

    @staticmethod
    def tangent(ctx: Any, dc: Tensor | None, dn: Tensor | None) -> Tensor:
        c, n = ctx.saved_tensors
        change = sum_present(
            None if dc is None else dc.sum(), None if dn is None else -c.sum() / n * dn
        )
        return change / (ctx.n if n is None else n)


class CostWithGradient(Function):
    r"""F3 of the losses c of a formula f: C = (1/n) Σ f(x, ...),  dC/dx = (1/n) df/dx.

    `f.kernel` computes the losses and dC/dx in one pass over x. The first backward scales that
    gradient in place; a second backward calls the kernel again. A differentiated backward, or one
    whose dC must not be multiplied (`may_scale`), calls `f.gradient`.
    """

    @staticmethod
    def forward(ctx: Any, f: Any, n: Any, *inputs: Any) -> Tensor:
        x = inputs[0]
        ctx.f, ctx.n = f, make_scalar(n, x.new_empty((), dtype=wide_type(x.dtype)))
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]
        c, ctx.gradient = f.kernel.value_and_gradient(1 / ctx.n, *inputs, True)
        return c.sum() / n

    @staticmethod
    def backward(ctx: Any, dC: Tensor) -> Any:
        pairs = zip(ctx.saved_tensors, ctx.options, strict=True)
        inputs = [option if x is None else x for x, option in pairs]
        if torch.is_grad_enabled() or not (are_plain_tensors(dC) and may_scale(dC)):
            dx = ctx.f.gradient(dC / ctx.n, *inputs)
        else:
            dx, ctx.gradient = ctx.gradient, None
            if dx is None:  # an earlier backward overwrote it
                dx = ctx.f.kernel.gradient(1 / ctx.n, *inputs)
            keep_index = ctx.f.kernel.keep_index
            dx = scale_gradient_(dx, dC, None if keep_index is None else inputs[keep_index])
        return None, None, dx.to(inputs[0].dtype), *[None] * (len(inputs) - 1)

    @staticmethod
    def may_replace(f: Any, n: Any, inputs: Any) -> bool:
        """Whether only the first input needs a gradient, and the one-pass kernel is faster."""
        x, *others = inputs
        return (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and f.kernel is not None
            and requires_grad(x)
            and not any(map(requires_grad, (n, *others)))
            and are_large_plain_tensors(inputs)
            # rounding before the multiplication costs the CPU a digit, and float16 its range
            and (x.dtype not in HALF or (x.dtype == torch.bfloat16 and x.is_cuda))
        )
