"""The cost of a batch from the losses of its examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_nnmath import _torch
from torch_nnmath._precision import HALF, cast, drop_infinite, weigh
from torch_nnmath.formulas._formula import Formula, save, sum_present
from torch_nnmath.kernels.dispatch import find_kernel_obstacle
from torch_nnmath.kernels.scaling import may_scale_in_place, scale_plain_gradient_


class Cost(Formula):
    r"""F3: C = (1/n) Σ c,  dC/dc = 1/n,  dC/dn = -C/n.

    F30, with a weight r for each example: C = (1/n) Σ r c,  dC/dc = r/n,  dC/dr = c/n.

    c of any shape, r of the same or None; n the number of examples, their total weight (a scalar
    tensor), or 1 for a sum. A number n is an int, since the tangent of a tensor () divided by a
    float is float64 in PyTorch. Where r is 0 and c infinite, r c and dC/dr are 0.
    """

    @staticmethod
    def forward(c: Tensor, n: Tensor | int, r: Tensor | None) -> Tensor:
        return weigh(r, c).sum() / n

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, C: Tensor) -> None:
        c, n, r = inputs
        ctx.n = None if isinstance(n, Tensor) else n
        save(ctx, c, n if isinstance(n, Tensor) else None, r)  # not C, which users may overwrite

    @staticmethod
    def backward(ctx: Any, dC: Tensor) -> Any:
        c, n, r = ctx.saved_tensors
        needs_c, needs_n, needs_r = ctx.needs_input_grad
        dC_n = dC / (ctx.n if n is None else n)
        dc = dn = dr = None
        if needs_c:
            dc = dC_n.expand(c.shape) if r is None else dC_n * r
        if needs_n:
            dn = -dC_n * (weigh(r, c).sum() / n)
        if needs_r:
            dr = dC_n * drop_infinite(r, c)
        return dc, dn, dr

    @staticmethod
    def tangent(ctx: Any, dc: Tensor | None, dn: Tensor | None, dr: Tensor | None) -> Tensor:
        c, n, r = ctx.saved_tensors
        change = sum_present(
            None if dc is None else (dc if r is None else r * dc).sum(),
            None if dn is None else -weigh(r, c).sum() / n * dn,
            None if dr is None else (dr * drop_infinite(r, c)).sum(),
        )
        return change / (ctx.n if n is None else n)


class CostWithGradient(Function):
    r"""F3 of the losses c of a formula f: C = (1/n) Σ f(x, ...),  dC/dx = (1/n) df/dx.

    `f.kernel` computes C and dC/dx in one pass over x. The first backward scales that gradient in
    place; a second backward calls the kernel again. A differentiated backward, or one whose dC must
    not be multiplied, calls `f.gradient`. Inputs other than x travel as one, since the Function
    takes a third of a µs for each.
    """

    @classmethod
    def evaluate(cls, f: Any, n: Any, x: Tensor, *constants: Any) -> Tensor:
        """The cost, where `may_replace` holds."""
        C: Tensor = _torch.apply_without_signature(cls, (x, (f, n, constants)))
        return C

    @staticmethod
    def forward(ctx: Any, x: Tensor, others: Any) -> Tensor:
        ctx.f, ctx.n, constants = others
        tensors: list[Tensor | None] = [x]
        ctx.options = [None]
        for v in constants:
            is_tensor = isinstance(v, Tensor)
            tensors.append(v if is_tensor else None)
            ctx.options.append(None if is_tensor else v)
        ctx.save_for_backward(*tensors)
        C, ctx.gradient = ctx.f.kernel.cost_and_gradient(ctx.n, x, *constants)
        return C

    @staticmethod
    def backward(ctx: Any, dC: Tensor) -> Any:
        f, saved = ctx.f, ctx.saved_tensors
        keep = None if f.kernel.keep_index is None else saved[f.kernel.keep_index]
        may_scale = not torch.is_grad_enabled() and may_scale_in_place(dC, keep)
        dx, ctx.gradient = ctx.gradient if may_scale else None, None
        if dx is None:
            inputs = [v if t is None else t for t, v in zip(saved, ctx.options, strict=True)]
            if may_scale:  # an earlier backward overwrote the gradient
                _, dx = f.kernel.cost_and_gradient(ctx.n, *inputs)
            else:
                dx = f.gradient(dC / ctx.n, *inputs)
        if may_scale:
            dx = scale_plain_gradient_(dx, dC, keep)
        return cast(dx, saved[0].dtype), None

    @staticmethod
    def may_replace(f: Any, n: Any, inputs: Any) -> bool:
        """Whether only the first input needs a gradient, and the one-pass kernel is faster."""
        x, *constants = inputs
        if f.kernel is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        # rounding before the multiplication costs the CPU a digit, and float16 its range
        if x.dtype in HALF and not (x.dtype == torch.bfloat16 and x.is_cuda):
            return False
        if not x.requires_grad or not x.numel():
            return False
        tensors = [x]
        for v in (n, *constants):
            if isinstance(v, Tensor):
                if v.requires_grad:
                    return False
                tensors.append(v)
        return find_kernel_obstacle(tensors, is_fast_if_small=True) is None
