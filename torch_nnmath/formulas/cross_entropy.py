"""Softmax and cross entropy as one formula, on logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import widen, zero_safe_product
from torch_nnmath._records import Target
from torch_nnmath.formulas._formula import Formula, mask_ignored, save, sum_present
from torch_nnmath.formulas.softmax import LogSoftmax
from torch_nnmath.kernels.dispatch import LossKernel, accelerate_with


class CrossEntropy(Formula):
    r"""F13: c = (1/ln β)(T lse(z) - t·z), T = Σ t;  dc/dz = (1/ln β)(T a - t), a = softmax(z),
    dc/dt = (1/ln β)(lse(z) - z).

    z (*, n, *) with n at dim -> c, with size 1 at dim. The target is `p e_y + t` (`Target`). Where
    keep, shaped as c, is False, c and its derivatives of every order are 0, whatever z is.
    """

    kernel = LossKernel(kernels.cross_entropy, kernels.cross_entropy_cost, keep_index=4)

    @staticmethod
    @accelerate_with(kernel.value)
    def forward(z: Tensor, y: Any, p: Any, t: Any, keep: Any, dim: int, base: float) -> Tensor:
        l = torch.log_softmax(widen(mask_ignored(keep, z)), dim)
        return mask_ignored(keep, -Target(y, p, t, dim).dot(l) / math.log(base))

    @classmethod
    def unfused(cls, z: Tensor, y: Any, p: Any, t: Any, keep: Any, *options: Any) -> Any:
        return cls.forward(mask_ignored(keep, z), y, p, t, keep, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        *tensors, ctx.dim, ctx.base = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        saved = ctx.saved_tensors
        z, y, _, t, keep = saved
        needs_z, _, needs_p, needs_t, *_ = ctx.needs_input_grad
        dz = CrossEntropy.gradient(dc, *saved, ctx.dim, ctx.base) if needs_z else None
        dp = dt = None
        if needs_p or needs_t:
            k = mask_ignored(keep, dc) / math.log(ctx.base)
            kl = zero_safe_product(k, log_softmax(z, keep, ctx.dim))
            dp = -kl.gather(ctx.dim, y) if needs_p else None
            dt = -kl.sum_to_size(t.shape) if needs_t else None
        return dz, None, dp, dt, None, None, None

    @staticmethod
    @accelerate_with(kernel.gradient)
    def gradient(
        dc: Tensor, z: Tensor, y: Any, p: Any, t: Any, keep: Any, dim: int, base: float
    ) -> Tensor:
        """dc (1/ln β)(T a - t)."""
        a, target = log_softmax(z, keep, dim).exp(), Target(y, p, t, dim)
        k = mask_ignored(keep, dc) / math.log(base)
        return (k * target.subtract_from(target.total() * a)).to(z.dtype)

    @staticmethod
    def tangent(ctx: Any, dz: Tensor | None, _dy: None, dp: Any, dt: Any, *_: None) -> Tensor:
        z, y, p, t, keep = ctx.saved_tensors
        target, l = Target(y, p, t, ctx.dim), log_softmax(z, keep, ctx.dim)
        dc = -Target(y, dp, dt, ctx.dim).dot(l)
        if dz is not None:
            delta = target.subtract_from(target.total() * l.exp())
            dc = dc + (delta * mask_ignored(keep, dz)).sum(ctx.dim, keepdim=True)
        return mask_ignored(keep, dc) / math.log(ctx.base)


class WeightedTarget(Formula):
    r"""w ∘ t, the target of F13 with class weights w.

    t (*, n, *), w broadcasting to it. Where t is 0 and a logit is -inf, dc/dw is 0, not 0 · inf.
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
        dt = zero_safe_product(w, g) if ctx.needs_input_grad[0] else None
        dw = zero_safe_product(t, g).sum_to_size(w.shape) if ctx.needs_input_grad[1] else None
        return dt, dw

    @staticmethod
    def tangent(ctx: Any, dt: Tensor | None, dw: Tensor | None) -> Tensor:
        t, w = ctx.saved_tensors
        return sum_present(None if dt is None else w * dt, None if dw is None else t * dw)


def log_softmax(z: Tensor, keep: Tensor | None, dim: int) -> Tensor:
    """l = z - lse(z), with z = 0 in ignored rows."""
    l: Tensor = LogSoftmax.evaluate(widen(mask_ignored(keep, z)), dim)
    return l
