"""Costs (F3) with their gradients, which a kernel has at hand while it computes the losses.

The first backward takes them. What differentiates further sees the formulas: theirs are passed in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_nnmath import kernels
from torch_nnmath._precision import HALF
from torch_nnmath.kernels.choice import (
    are_many_numbers,
    are_numbers,
    is_batch,
    is_transformed,
    requires_grad,
)


class CostWithGradient(Function):
    """F3 of a formula's losses with its gradient in the first input, which a kernel has at hand.

    `formula` has a `kernel`, and `gradient(dc, *inputs)`, which is differentiable.
    """

    @staticmethod
    def forward(ctx: Any, formula: Any, n: Any, *inputs: Any) -> Tensor:
        ctx.formula = formula
        ctx.n = torch.as_tensor(n, dtype=inputs[0].dtype)
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]
        c, ctx.known = formula.kernel.both(1 / ctx.n, *inputs, True)
        return c.sum() / n

    @staticmethod
    def backward(ctx: Any, dC: Tensor) -> Any:
        pairs = zip(ctx.saved_tensors, ctx.options, strict=True)
        inputs = [option if x is None else x for x, option in pairs]
        if torch.is_grad_enabled() or not are_numbers(dC) or not dC.isfinite():
            gradient = ctx.formula.gradient(dC / ctx.n, *inputs)
        else:
            known, ctx.known = ctx.known, None
            if known is None:
                known = ctx.formula.kernel.gradient(1 / ctx.n, *inputs)
            gradient = known if dC == 1 else known.mul_(dC)
        return None, None, gradient.to(inputs[0].dtype), *[None] * (len(inputs) - 1)


def comes_with_gradient(formula: Any, n: Any, inputs: Any) -> bool:
    """Whether only the first input will want a gradient, and one pass over it is worth it."""
    x, *others = inputs
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and formula.kernel is not None
        and requires_grad(x)
        and not any(map(requires_grad, (n, *others)))
        and are_many_numbers(inputs)
        and x.dtype not in HALF
    )


class HeadCost(Function):
    r"""F3 of F14, F15: C = (1/n) Σ c + ω Σ q, with its gradients dx, dW, db, dp, dt, which `wants`
    names: three products, not four. A backward takes them; after that they are what `gradient`
    says. Then come h, lse and the largest logit's class of each row, without derivative.
    """

    gradient: Any = None  # F15 batch, a formula; its file names it here

    @staticmethod
    def forward(
        n: Any,
        ω: Any,
        x: Any,
        W: Any,
        b: Any,
        p: Any,
        t: Any,
        y: Any,
        keep: Any,
        base: float,
        cap: float | None,
        asks: Any,
        wants: Any,
    ) -> Any:
        c, q, lse, h, largest, _, dx, dW, db, dp, dt = kernels.head(
            1 / n, ω, None, x, W, b, y, p, t, keep, None, base, cap, list(asks), list(wants)
        )
        C = c.sum() / n
        C = C if ω is None else C + ω * q.sum()
        return C, *only(wants, (dx, dW, db, dp, dt)), *only(asks, (h, largest)), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        *tensors, ctx.base, ctx.cap, _, _ = inputs
        ctx.known = outputs[1:6]
        ctx.mark_non_differentiable(*(v for v in outputs[1:] if v is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dC: Tensor | None, *_: None) -> Any:
        if dC is None:
            return (None,) * 13
        (n, ω, *saved), wants, options = (
            ctx.saved_tensors,
            ctx.needs_input_grad[2:7],
            (ctx.base, ctx.cap),
        )
        known = only(wants, ctx.known)
        if torch.compiler.is_compiling():
            return None, None, *scaled(dC, known, saved), *[None] * 6
        # an infinite dC is left to the kernel, which keeps it from the rows that are ignored
        is_number = (
            bool(dC.isfinite()) if are_numbers(dC) else not (is_transformed() or is_batch(dC))
        )
        if is_number:
            ctx.known = only([not want for want in wants], ctx.known)
            if any(want and g is None for want, g in zip(wants, known, strict=True)):
                x, W, b, p, t, y, keep = saved
                *_rest, dx, dW, db, dp, dt = kernels.head(
                    1 / n, ω, None, x, W, b, y, p, t, keep, None, *options, [False] * 2, list(wants)
                )
                known = only(wants, (dx, dW, db, dp, dt))
            known = scaled(dC, known, saved)
        if not is_number or torch.is_grad_enabled():
            N = saved[0].shape[:1]
            γ, ω = (dC / n).expand(N), None if ω is None else (dC * ω).expand(N)
            known = HeadCost.gradient.apply(
                γ, ω, None, *saved, *options, wants, known if is_number else None, None
            )
        return None, None, *known, *[None] * 6


def wanted_of_head(n: Any, inputs: Any) -> tuple[bool, ...] | None:
    """Which gradients in x, W, b, p, t will be wanted, or None where they are not to come with C.

    A transform would not see how they depend on its inputs; an exported program has its own.
    """
    if is_transformed() or torch.compiler.is_exporting() or requires_grad(n):
        return None
    wants = tuple(requires_grad(v) for v in inputs[:5])
    return wants if torch.is_grad_enabled() and any(wants) else None


def _save_for_export(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, _, x, W, b, y, p, t, keep, _, ctx.base, ctx.cap, (ctx.asks_h, _), _ = inputs
    ctx.save_for_backward(x, W, b, p, t, y, keep)


def _backward_of_export(ctx: Any, dc: Tensor, dq: Tensor, _: Any, dh: Tensor, *_rest: Any) -> Any:
    """F15 batch, where an exported program, which has no Function, calls the operator itself."""
    wants = tuple(ctx.needs_input_grad[i] for i in (3, 4, 5, 7, 8))
    dx, dW, db, dp, dt = HeadCost.gradient.apply(
        dc, dq, dh if ctx.asks_h else None, *ctx.saved_tensors, ctx.base, ctx.cap, wants, None, None
    )
    return None, None, None, dx, dW, db, None, dp, dt, *[None] * 6


torch.library.register_autograd(
    "torch_nnmath::head", _backward_of_export, setup_context=_save_for_export
)


def scaled(k: Tensor, gradients: Any, saved: Any) -> tuple[Tensor | None, ...]:
    """k times the gradients in x, W, b, p, t, in the types of these; written over in an eager step.

    Where k may be infinite, since looking at it would wait, what comes of no kept row stays 0.
    """
    *_, keep = saved
    is_seen = are_numbers(k)

    def times_k(g: Tensor, v: Tensor) -> Tensor:
        if is_seen:
            return g if k == 1 else g.mul_(k)
        if keep is None:
            return g * k if len(saved[0]) else g
        of_rows = v is not saved[1] and v is not saved[2] and g.shape[0] == len(keep)
        kept_rows = keep.view(-1, *[1] * (g.dim() - 1)) if of_rows else keep.any()
        return torch.where(kept_rows, g * k, 0)

    return tuple(
        None if g is None else times_k(g, v).to(v.dtype)
        for g, v in zip(gradients, saved[:5], strict=True)
    )


def only(wants: Any, results: Any) -> tuple[Tensor | None, ...]:
    """The results that are wanted, None for the others."""
    return tuple(result if wanted else None for wanted, result in zip(wants, results, strict=True))
