"""Affine, softmax and cross entropy as one formula: the head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import kernels
from torch_nnmath._precision import wide, without_autocast
from torch_nnmath.formulas._formula import KernelFormula, save
from torch_nnmath.formulas.affine import Affine
from torch_nnmath.formulas.cross_entropy import CrossEntropy, dot, kept, less_target, sum_of
from torch_nnmath.formulas.softmax import LogSoftmax
from torch_nnmath.kernels.costs import HeadCost, only

vjp: Any = torch.func.vjp  # typed as if it could return three


class LinearCrossEntropy(KernelFormula):
    r"""F14, F15: c = F13(z), z = W x + b;  δ = (1/ln β)(T a - t):  dW = δ xᵀ, dx = Wᵀ δ, db = δ;
    dc/dt = (1/ln β)(lse(z) - z).

    x (N, D), W (C, D), b (C) -> c (N). The target of a row is `p e_y + t`: y, p (N) a class and its
    weight, t (N, C), or (1, C) for all rows; each may be None. Rows where keep (N) is False have
    c = 0 and take part in nothing. The logits z exist for a block of rows at a time.
    """

    @staticmethod
    def forward(x: Any, W: Any, b: Any, p: Any, t: Any, y: Any, keep: Any, base: float) -> Tensor:
        c, *_ = kernels.head(None, x, W, b, y, p, t, keep, base, [False] * 5)
        return c

    @classmethod
    def in_the_open(
        cls, x: Any, W: Any, b: Any, p: Any, t: Any, y: Any, keep: Any, base: Any
    ) -> Any:
        y, p, keep = (None if v is None else v[:, None] for v in (y, p, keep))
        x, W, b = (None if v is None else wide(v) for v in (kept(keep, x), W, b))
        z = torch.nn.functional.linear(x, W, b)
        return CrossEntropy.in_the_open(z, p, t, y, keep, 1, base).squeeze(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        *tensors, ctx.base = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> Any:
        wants = ctx.needs_input_grad[:5]
        gradients = HeadGradient.apply(dc, *ctx.saved_tensors, ctx.base, wants, None)
        return *gradients, None, None, None

    @staticmethod
    def tangent(ctx: Any, dx: Any, dW: Any, db: Any, dp: Any, dt: Any, *_: None) -> Tensor:
        x, W, b, p, t, y, keep = ctx.saved_tensors
        one = wide(x.new_ones(x.shape[:1]))
        direction, wants = (dx, dW, db, dp, dt), (False,) * 5
        dc, *_rest = HeadSecond.apply(one, x, W, b, p, t, *direction, y, keep, ctx.base, wants)
        return dc


class HeadGradient(KernelFormula):
    r"""F15 batch: the gradients of Σ γ c in x, W, b, p, t; None for one that is not wanted.

    They are `known` if it is not None.
    """

    @staticmethod
    def forward(
        γ: Any,
        x: Any,
        W: Any,
        b: Any,
        p: Any,
        t: Any,
        y: Any,
        keep: Any,
        base: float,
        wants: Any,
        known: Any,
    ) -> Any:
        if known is None:
            _, *known = kernels.head(γ, x, W, b, y, p, t, keep, base, list(wants))
        return only(wants, known)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, gradients: Any) -> None:
        *tensors, ctx.base, ctx.wants, _ = inputs
        ctx.set_materialize_grads(False)
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *direction: Tensor | None) -> Any:
        γ, x, W, b, p, t, y, keep = ctx.saved_tensors
        wants = ctx.needs_input_grad[1:6]
        derivatives = HeadSecond.apply(γ, x, W, b, p, t, *direction, y, keep, ctx.base, wants)
        return *derivatives, None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, dγ: Tensor | None, *rest: Any) -> Any:
        γ, x, W, b, p, t, y, keep = ctx.saved_tensors
        direction = rest[:5]
        tangents: Any = [None] * 5
        if dγ is not None:
            tangents = HeadGradient.apply(dγ, x, W, b, p, t, y, keep, ctx.base, ctx.wants, None)
        if any(d is not None for d in direction):
            _, *second = HeadSecond.apply(
                γ, x, W, b, p, t, *direction, y, keep, ctx.base, ctx.wants
            )
            tangents = [s if d is None else d + s for d, s in zip(tangents, second, strict=True)]
        return tuple(tangents)


HeadCost.gradient = HeadGradient


class HeadSecond(KernelFormula):
    r"""F15 batch, "then": along the direction (u, V, s, π, τ) of x, W, b, p, t

    R = U Wᵀ + X Vᵀ + s,  Q = dΔ = (γ/ln β)(T A ∘ (R - rowsum(A ∘ R)) + T' A - t'):
    ρ = dc = (1/ln β)((T A - t)·R + (lse(Z) - Z)·t'), and the gradients of Σ γ ρ:
    Q W + Δ V in x, Qᵀ X + Δᵀ U in W, Σ_rows Q in b, (γ/ln β)(A·R - R) in t.
    """

    @staticmethod
    def forward(γ: Any, x: Any, W: Any, b: Any, p: Any, t: Any, *rest: Any) -> Any:
        *direction, y, keep, base, wants = rest
        ρ, *gradients = kernels.head_second(
            γ, x, W, b, y, p, t, keep, *direction, base, list(wants)
        )
        return ρ, *only(wants, gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, derivatives: Any) -> None:
        *tensors, ctx.base, ctx.wants = inputs
        ctx.set_materialize_grads(False)
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        f = InTheOpen(ctx, [c is not None for c in cotangents])
        wanted = [i for i in f.present if ctx.needs_input_grad[i]]
        with without_autocast(f.tensors[0]):
            _, pull = vjp(f.of(wanted), *(f.tensors[i] for i in wanted))
            gradients = pull(tuple(c for c in cotangents if c is not None))
        found = dict(zip(wanted, gradients, strict=True))
        return *(found.get(i) for i in range(11)), None, None, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        f = InTheOpen(ctx, (True, *ctx.wants))
        moved = [i for i in f.present if tangents[i] is not None]
        with without_autocast(f.tensors[0]):
            values, pull = vjp(f.of(moved), *(f.tensors[i] for i in moved))
            # pull is linear, so its own pullback is the tangent map
            _, push = vjp(lambda c: pull(c), tuple(torch.zeros_like(v) for v in values))
            (changes,) = push(tuple(tangents[i] for i in moved))
        found = iter(changes)
        return tuple(next(found) if there else None for there in (True, *ctx.wants))


class InTheOpen:
    """What HeadSecond computes, with the logits in memory, for its derivative: third order."""

    def __init__(self, ctx: Any, outputs: Any):
        *self.tensors, self.y, self.keep = ctx.saved_tensors
        self.base, self.outputs = ctx.base, outputs
        self.present = [i for i, x in enumerate(self.tensors) if x is not None]

    def of(self, places: list[int]) -> Any:
        """As a function of the tensors in these places."""

        def f(*values: Tensor) -> tuple[Any, ...]:
            tensors = list(self.tensors)
            for i, value in zip(places, values, strict=True):
                tensors[i] = value
            return tuple(
                out for out, there in zip(self(*tensors), self.outputs, strict=True) if there
            )

        return f

    def __call__(
        self, γ: Any, x: Any, W: Any, b: Any, p: Any, t: Any, u: Any, V: Any, s: Any, π: Any, τ: Any
    ) -> tuple[Tensor | None, ...]:
        y = None if self.y is None else self.y[:, None]
        keep = None if self.keep is None else self.keep[:, None]
        p, π, γ = (None if v is None else v[:, None] for v in (p, π, γ))
        V = torch.zeros_like(W) if V is None else V
        u = torch.zeros_like(x) if u is None else u
        x_dtype, W_dtype = x.dtype, W.dtype
        x, u, W, V = (wide(v) for v in (kept(keep, x), kept(keep, u), W, V))
        b, s = (None if v is None else wide(v) for v in (b, s))
        g, k = kept(keep, γ) / math.log(self.base), 1 / math.log(self.base)

        l = LogSoftmax.apply(kept(keep, Affine.apply(x, W, b)), 1)
        a = l.exp()
        r = kept(keep, Affine.apply(u, W, None) + Affine.apply(x, V, s))
        ar = (a * r).sum(1, keepdim=True)
        Δ = less_target(sum_of(p, t, 1) * a, p, t, y, 1)
        Q = less_target(sum_of(p, t, 1) * a * (r - ar) + sum_of(π, τ, 1) * a, π, τ, y, 1)
        ρ = kept(keep, k * ((Δ * r).sum(1, keepdim=True) - dot(l, π, τ, y, 1))).squeeze(1)
        Q, Δ = g * Q, g * Δ
        ht = g * (ar - r)
        return (
            ρ,
            (Q @ W + Δ @ V).to(x_dtype),
            (Q.T @ x + Δ.T @ u).to(W_dtype),
            Q.sum(0).to(W_dtype),
            None if p is None else ht.gather(1, y).squeeze(1),
            None if t is None else ht.sum_to_size(t.shape),
        )
