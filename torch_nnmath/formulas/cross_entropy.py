"""Softmax and cross entropy as one formula, on logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import wide
from torch_nnmath.formulas._formula import Formula, save, total
from torch_nnmath.formulas.softmax import LogSoftmax
from torch_nnmath.kernels._library import exact
from torch_nnmath.kernels.choice import Kernel, fast


class CrossEntropy(Formula):
    r"""F13: c = (1/ln β)(T lse(z) - t·z), T = Σ t;  dc/dz = (1/ln β)(T a - t), a = softmax(z),
    dc/dt = (1/ln β)(lse(z) - z).

    z (*, n, *) with n at dim -> c, with size 1 at dim. The target is `p e_y + t`: y, p the class
    and its weight, shaped as c; t shaped as z, or broadcasting to it; each may be None. Where
    keep, shaped as c, is False, c and its derivatives of every order are 0, whatever z is.
    """

    kernel = Kernel(kernels.cross_entropy)

    @staticmethod
    @fast(kernel.value)
    def forward(
        z: Tensor,
        p: Tensor | None,
        t: Tensor | None,
        y: Tensor | None,
        keep: Tensor | None,
        dim: int,
        base: float,
    ) -> Tensor:
        l = torch.log_softmax(wide(kept(keep, z)), dim)
        return kept(keep, -dot(l, p, t, y, dim) / math.log(base))

    @classmethod
    def in_the_open(cls, z: Tensor, p: Any, t: Any, y: Any, keep: Any, *options: Any) -> Any:
        return cls.forward(kept(keep, z), p, t, y, keep, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        *tensors, ctx.dim, ctx.base = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        z, _, t, y, keep = saved = ctx.saved_tensors
        wants_z, wants_p, wants_t, *_ = ctx.needs_input_grad
        dz = CrossEntropy.gradient(dc, *saved, ctx.dim, ctx.base) if wants_z else None
        dp = dt = None
        if wants_p or wants_t:
            kl = exact(kept(keep, dc) / math.log(ctx.base), log_softmax(z, keep, ctx.dim))
            dp = -kl.gather(ctx.dim, y) if wants_p else None
            dt = -kl.sum_to_size(t.shape) if wants_t else None
        return dz, dp, dt, None, None, None, None

    @staticmethod
    @fast(kernel.gradient)
    def gradient(
        dc: Tensor, z: Tensor, p: Any, t: Any, y: Any, keep: Any, dim: int, base: float
    ) -> Tensor:
        """dc (1/ln β)(T a - t)."""
        a = log_softmax(z, keep, dim).exp()
        k = kept(keep, dc) / math.log(base)
        return (k * less_target(sum_of(p, t, dim) * a, p, t, y, dim)).to(z.dtype)

    @staticmethod
    def tangent(ctx: Any, dz: Tensor | None, dp: Any, dt: Any, *_: None) -> Tensor:
        z, p, t, y, keep = ctx.saved_tensors
        l = log_softmax(z, keep, ctx.dim)
        dc = -dot(l, dp, dt, y, ctx.dim)
        if dz is not None:
            delta = less_target(sum_of(p, t, ctx.dim) * l.exp(), p, t, y, ctx.dim)
            dc = dc + (delta * kept(keep, dz)).sum(ctx.dim, keepdim=True)
        return kept(keep, dc) / math.log(ctx.base)


class Weighted(Formula):
    r"""w ∘ t, the target of F13 with class weights w; the derivatives of what is 0 stay 0.

    t (*, n, *), w broadcasting to it: where t is 0 and a logit -inf, dc/dw is 0, not 0 inf.
    """

    @staticmethod
    def forward(t: Tensor, w: Tensor) -> Tensor:
        return t * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        t, w = ctx.saved_tensors
        dt = exact(w, g) if ctx.needs_input_grad[0] else None
        dw = exact(t, g).sum_to_size(w.shape) if ctx.needs_input_grad[1] else None
        return dt, dw

    @staticmethod
    def tangent(ctx: Any, dt: Tensor | None, dw: Tensor | None) -> Tensor:
        t, w = ctx.saved_tensors
        return total(None if dt is None else w * dt, None if dw is None else t * dw)


def log_softmax(z: Tensor, keep: Tensor | None, dim: int) -> Tensor:
    """l = z - lse(z)."""
    l: Tensor = LogSoftmax.of(wide(kept(keep, z)), dim)
    return l


def kept(keep: Tensor | None, x: Tensor) -> Tensor:
    """x, 0 where it is ignored."""
    return x if keep is None else x.masked_fill(~keep, 0)


def dot(v: Tensor, p: Tensor | None, t: Tensor | None, y: Tensor | None, dim: int) -> Tensor:
    """(p e_y + t)·v."""
    result = torch.zeros_like(v.narrow(dim, 0, 0).sum(dim, keepdim=True))
    if p is not None and y is not None:
        result = result + exact(p, v.gather(dim, y))
    if t is not None:
        result = result + exact(t, v).sum(dim, keepdim=True)
    return result


def sum_of(p: Tensor | None, t: Tensor | None, dim: int) -> Tensor | float:
    """T = Σ (p e_y + t)."""
    T: Tensor | float = 0.0 if p is None else p
    return T if t is None else T + t.sum(dim, keepdim=True)


def less_target(
    v: Tensor, p: Tensor | None, t: Tensor | None, y: Tensor | None, dim: int
) -> Tensor:
    """v - (p e_y + t)."""
    if p is not None and y is not None:
        if torch.compiler.is_compiling():  # which fuses this with what v is, but no scatter
            classes = torch.arange(v.shape[dim], device=v.device).view(
                [-1 if d == dim % v.dim() else 1 for d in range(v.dim())]
            )
            v = v - torch.where(classes == y, p, 0)
        else:
            v = v.scatter_add(dim, y, -p)
    return v if t is None else v - t
