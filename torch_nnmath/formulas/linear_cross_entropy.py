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
from torch_nnmath.formulas.entropy import Entropy
from torch_nnmath.formulas.softcap import SoftCap
from torch_nnmath.formulas.softmax import LogSoftmax, LogSumExp
from torch_nnmath.formulas.tanh import Tanh
from torch_nnmath.formulas.z_loss import ZLoss
from torch_nnmath.kernels._library import exact
from torch_nnmath.kernels.costs import HeadCost, only

vjp: Any = torch.func.vjp  # typed as if it could return three


class LinearCrossEntropy(KernelFormula):
    r"""F14, F15: c = F13(v), z = W x + b;  δ = (1/ln β)(T a - t):  dW = δ xᵀ, dx = Wᵀ δ, db = δ;
    dc/dt = (1/ln β)(lse(v) - v). Here v = z, or with a cap κ F19(z), whose slope is a factor of δ.

    For t = e_y c is -F22. Beside it there may be q = F20(v) and h = F21(v), for which δ has
    2 lse(v) a and -(1/ln β) a ∘ (l - a·l) more (F23). Without derivative there are lse(v), the
    class of the largest v, and sums (N, 3) that the backward need not compute again. Without y
    p is in T alone: for p = 1, t = 0, c is (1/ln β) lse(v).

    x (N, D), W (C, D), b (C) -> c, q, h, lse, class, (N) each, and the sums; of q, h and class
    those that `asks` does not name are None. The target of a row is `p e_y + t`: y, p (N) a class
    and its weight, t (N, C), or (1, C) for all rows; each may be None. Rows where keep (N) is False
    have 0 (and class -1) and take part in nothing. The logits exist for a block of rows at a time.
    """

    @staticmethod
    def forward(
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
    ) -> Any:
        c, q, lse, h, largest, sums, *_ = kernels.head(
            None, None, None, x, W, b, y, p, t, keep, None, base, cap, list(asks[1:]), [False] * 5
        )
        q, h, largest = only(asks, (q, h, largest))
        return c, q, h, lse, largest, sums

    @classmethod
    def in_the_open(
        cls,
        x: Any,
        W: Any,
        b: Any,
        p: Any,
        t: Any,
        y: Any,
        keep: Any,
        base: Any,
        cap: Any,
        asks: Any,
    ) -> Any:
        rows = None if keep is None else keep[:, None]
        y, p = (None if v is None else v[:, None] for v in (y, p))
        x, W, b = (None if v is None else wide(v) for v in (kept(rows, x), W, b))
        z = kept(rows, torch.nn.functional.linear(x, W, b))
        v = z if cap is None else SoftCap.in_the_open(z, cap)
        c = CrossEntropy.in_the_open(v, p, t, y, rows, 1, base).squeeze(1)
        if y is None and p is not None:
            p_lse = kept(rows, exact(p, LogSumExp.in_the_open(v, 1)))
            c = c + p_lse.squeeze(1) / math.log(base)
        q = kept(keep, ZLoss.in_the_open(v, 1).squeeze(1)) if asks[0] else None
        h = kept(keep, Entropy.in_the_open(v, 1, base).squeeze(1)) if asks[1] else None
        seen = v.detach()
        lse, largest = kept(keep, seen.logsumexp(1)), seen.argmax(1) if asks[2] else None
        if largest is not None and keep is not None:
            largest = largest.masked_fill(~keep, -1)
        return c, q, h, lse, largest, None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        *tensors, ctx.base, ctx.cap, ctx.asks = inputs
        *_, lse, largest, sums = outputs
        ctx.mark_non_differentiable(*(v for v in (lse, largest, sums) if v is not None))
        ctx.set_materialize_grads(False)
        save(ctx, *tensors, sums)

    @staticmethod
    def backward(ctx: Any, dc: Any, dq: Any, dh: Any, *_: None) -> Any:
        wants, γ = ctx.needs_input_grad[:5], dc
        if dc is None:
            if dq is None and dh is None:
                return (None,) * 10
            γ = torch.zeros_like(dh if dq is None else dq)
        *tensors, sums = ctx.saved_tensors
        options = ctx.base, ctx.cap, wants, None, sums
        gradients = HeadGradient.apply(γ, dq, dh, *tensors, *options)
        return *gradients, None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, dx: Any, dW: Any, db: Any, dp: Any, dt: Any, *_: None) -> Any:
        x, W, b, p, t, y, keep, _ = ctx.saved_tensors
        asks_q, asks_h, _ = ctx.asks
        one = wide(x.new_ones(x.shape[:1]))
        coefficients, direction = (one, None, one if asks_h else None), (dx, dW, db, dp, dt)
        options = ctx.base, ctx.cap, (False,) * 5
        dc, dq, dh, *_rest = HeadSecond.apply(
            *coefficients, x, W, b, p, t, *direction, y, keep, *options
        )
        return dc, dq if asks_q else None, dh, None, None, None


class HeadGradient(KernelFormula):
    r"""F15 batch: the gradients of Σ γ c + ω q + η h in x, W, b, p, t; None for one not wanted.

    ω and η may be None. The gradients are `known`, or the kernel has its `sums`, if not None.
    """

    @staticmethod
    def forward(
        γ: Any,
        ω: Any,
        η: Any,
        x: Any,
        W: Any,
        b: Any,
        p: Any,
        t: Any,
        y: Any,
        keep: Any,
        base: float,
        cap: float | None,
        wants: Any,
        known: Any,
        sums: Any,
    ) -> Any:
        if known is None:
            *_, dx, dW, db, dp, dt = kernels.head(
                γ, ω, η, x, W, b, y, p, t, keep, sums, base, cap, [False] * 2, list(wants)
            )
            known = dx, dW, db, dp, dt
        return only(wants, known)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, gradients: Any) -> None:
        *tensors, ctx.base, ctx.cap, ctx.wants, _, _ = inputs
        ctx.set_materialize_grads(False)
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *direction: Tensor | None) -> Any:
        *tensors, y, keep = ctx.saved_tensors
        wants = ctx.needs_input_grad[3:8]
        options = ctx.base, ctx.cap, wants
        ρc, ρq, *rest = HeadSecond.apply(*tensors, *direction, y, keep, *options)
        return ρc, None if tensors[1] is None else ρq, *rest, *[None] * 7

    @staticmethod
    def tangent(ctx: Any, dγ: Any, dω: Any, dη: Any, *rest: Any) -> Any:
        γ, ω, η, *tensors, y, keep = ctx.saved_tensors
        direction, options = rest[:5], (ctx.base, ctx.cap, ctx.wants)
        tangents: Any = [None] * 5
        if any(d is not None for d in (dγ, dω, dη)):
            dγ = torch.zeros_like(γ) if dγ is None else dγ
            tangents = HeadGradient.apply(dγ, dω, dη, *tensors, y, keep, *options, None, None)
        if any(d is not None for d in direction):
            _, _, _, *second = HeadSecond.apply(γ, ω, η, *tensors, *direction, y, keep, *options)
            tangents = [s if d is None else d + s for d, s in zip(tangents, second, strict=True)]
        return tuple(tangents)


HeadCost.gradient = HeadGradient


class HeadSecond(KernelFormula):
    r"""F15 batch, "then": along the direction (u, V, s, π, τ) of x, W, b, p, t, with z = W x + b,
    l = v - lse(v), G = a ∘ B - γ' t and γ' = γ/ln β, η' = η/ln β, B = γ' T + 2 ω lse - η'(l - a·l)

    R = U Wᵀ + X Vᵀ + s,  r = (1 - (v/κ)²) ∘ R, which is R without a cap, as here Δ = G:
    ρ_c = dc = (1/ln β)((T a - t)·r + (lse - v)·t'),  ρ_q = dq = 2 lse a·r,
    ρ_h = dh = -(1/ln β)(a ∘ (l - a·l))·r;
    dG = a ∘ ((r - a·r) ∘ (B - η') + γ' T' + 2 ω a·r - η ρ_h) - γ' t',
    Δ = (1 - (v/κ)²) ∘ G,  Q = dΔ = (1 - (v/κ)²) ∘ dG - (2/κ²) v ∘ G ∘ r.

    It is ρ_c, ρ_q, ρ_h (None without η) and the gradients of Σ γ ρ_c + ω ρ_q + η ρ_h:
    Q W + Δ V in x, Qᵀ X + Δᵀ U in W, Σ_rows Q in b, γ'(a·r - r) in t.
    """

    @staticmethod
    def forward(γ: Any, ω: Any, η: Any, x: Any, W: Any, b: Any, p: Any, t: Any, *rest: Any) -> Any:
        *direction, y, keep, base, cap, wants = rest
        ρc, ρq, ρh, *gradients = kernels.head_second(
            γ, ω, η, x, W, b, y, p, t, keep, *direction, base, cap, list(wants)
        )
        return ρc, ρq, None if η is None else ρh, *only(wants, gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, derivatives: Any) -> None:
        *tensors, ctx.base, ctx.cap, ctx.wants = inputs
        ctx.has_h = inputs[2] is not None
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
        return *(found.get(i) for i in range(13)), None, None, None, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        there = True, True, ctx.has_h, *ctx.wants
        f = InTheOpen(ctx, there)
        moved = [i for i in f.present if tangents[i] is not None]
        with without_autocast(f.tensors[0]):
            values, pull = vjp(f.of(moved), *(f.tensors[i] for i in moved))
            # pull is linear, so its own pullback is the tangent map
            _, push = vjp(lambda c: pull(c), tuple(torch.zeros_like(v) for v in values))
            (changes,) = push(tuple(tangents[i] for i in moved))
        found = iter(changes)
        return tuple(next(found) if is_there else None for is_there in there)


class InTheOpen:
    """What HeadSecond computes, with the logits in memory, for its derivative: third order."""

    def __init__(self, ctx: Any, outputs: Any):
        *self.tensors, self.y, self.keep = ctx.saved_tensors
        self.base, self.cap, self.outputs = ctx.base, ctx.cap, outputs
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
        self,
        γ: Any,
        ω: Any,
        η: Any,
        x: Any,
        W: Any,
        b: Any,
        p: Any,
        t: Any,
        u: Any,
        V: Any,
        s: Any,
        π: Any,
        τ: Any,
    ) -> tuple[Tensor | None, ...]:
        y = None if self.y is None else self.y[:, None]
        keep = None if self.keep is None else self.keep[:, None]
        p, π, γ, ω, η = (None if v is None else v[:, None] for v in (p, π, γ, ω, η))
        V = torch.zeros_like(W) if V is None else V
        u = torch.zeros_like(x) if u is None else u
        x_dtype, W_dtype, b_dtype = x.dtype, W.dtype, (W if b is None else b).dtype
        x, u, W, V = (wide(v) for v in (kept(keep, x), kept(keep, u), W, V))
        b, s = (None if v is None else wide(v) for v in (b, s))
        k = 1 / math.log(self.base)
        g, ω = kept(keep, γ) * k, 0.0 if ω is None else kept(keep, ω)

        z = kept(keep, Affine.apply(x, W, b))
        r = kept(keep, Affine.apply(u, W, None) + Affine.apply(x, V, s))
        v, slope, bend = z, 1.0, 0.0  # of the cap, and its second derivative over its first
        if self.cap is not None:
            tanh = Tanh.apply(z / self.cap)
            v, slope, bend = self.cap * tanh, (1 - tanh) * (1 + tanh), -2 / self.cap * tanh
        r = slope * r
        l, lse = LogSoftmax.apply(v, 1), LogSumExp.apply(v, 1)
        a = l.exp()
        ar = (a * r).sum(1, keepdim=True)
        T, dT = sum_of(p, t, 1), sum_of(π, τ, 1)
        δ = less_target(T * a, p, t, y, 1)
        ρc = (δ * r).sum(1, keepdim=True) - dot(l, π, τ, y, 1)
        if y is None and π is not None:
            ρc = ρc + exact(π, lse)
        ρc = kept(keep, k * ρc)
        ρq, ρh = kept(keep, 2 * lse * ar), None
        aB, D = (g * T + 2 * ω * lse) * a, g * dT + 2 * ω * ar
        change = (r - ar) * aB
        if η is not None:
            η = kept(keep, η) * k
            al = exact(a, l)
            al = al - a * al.sum(1, keepdim=True)
            ρh = -(al * r).sum(1, keepdim=True)
            aB, D = aB - η * al, D - η * ρh
            change = (r - ar) * (aB - η * a)
            ρh = kept(keep, k * ρh).squeeze(1)
        gp, gt, gπ, gτ = (None if v is None else g * v for v in (p, t, π, τ))
        G, dG = less_target(aB, gp, gt, y, 1), less_target(change + a * D, gπ, gτ, y, 1)
        Δ, Q = slope * G, slope * dG + bend * G * r
        ht = g * (ar - r)
        return (
            ρc.squeeze(1),
            ρq.squeeze(1),
            ρh,
            (Q @ W + Δ @ V).to(x_dtype),
            (Q.T @ x + Δ.T @ u).to(W_dtype),
            Q.sum(0).to(b_dtype),
            None if p is None else (g * ar if y is None else ht.gather(1, y)).squeeze(1),
            None if t is None else ht.sum_to_size(t.shape),
        )
