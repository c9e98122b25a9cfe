"""The head with its logits in memory: for tracers, and for derivatives of third order.

`compute_rows` is what `LinearCrossEntropy` computes, `compute_second_order` what
`LinearCrossEntropySecondOrder` computes, in operations and formulas that PyTorch can differentiate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import widen, zero_safe_product
from torch_nnmath._records import HeadInputs, PerInput, Requests, RowResults, Upstream
from torch_nnmath.formulas._formula import mask_ignored
from torch_nnmath.formulas.affine import Affine
from torch_nnmath.formulas.cross_entropy import CrossEntropy
from torch_nnmath.formulas.entropy import Entropy
from torch_nnmath.formulas.softcap import SoftCap
from torch_nnmath.formulas.softmax import LogSoftmax, LogSumExp
from torch_nnmath.formulas.tanh import Tanh
from torch_nnmath.formulas.z_loss import ZLoss


def compute_rows(inputs: HeadInputs, requests: Requests) -> RowResults:
    """F14 and what comes with it, as a composition of the formulas."""
    x, W, b, target, keep, base, cap = inputs
    y, p, t, _ = target
    x, b = widen(mask_ignored(keep, x)), None if b is None else widen(b)
    z = mask_ignored(keep, torch.nn.functional.linear(x, widen(W), b))
    v = z if cap is None else SoftCap.unfused(z, cap)
    loss = CrossEntropy.unfused(v, y, p, t, keep, 1, base)
    if y is None and p is not None:
        p_lse = zero_safe_product(p, LogSumExp.unfused(v, 1))
        loss = loss + mask_ignored(keep, p_lse) / math.log(base)
    z_loss = mask_ignored(keep, ZLoss.unfused(v, 1))
    constant = v.detach()
    lse = mask_ignored(keep, constant.logsumexp(1, keepdim=True))
    entropy = mask_ignored(keep, Entropy.unfused(v, 1, base)) if requests.entropy else None
    predicted = constant.argmax(1, keepdim=True) if requests.predicted else None
    if predicted is not None and keep is not None:
        predicted = predicted.masked_fill(~keep, -1)
    return RowResults(loss, lse, z_loss, entropy, predicted)


def compute_second_order(*flat: Any) -> tuple[Tensor | None, ...]:
    """(`HeadInputs` flat, `Upstream`, direction) -> ρ_c, ρ_q, ρ_h and five gradients.

    In the symbols of `LinearCrossEntropySecondOrder`. `bend` is the cap's second derivative over
    its first.
    """
    (x, W, b, target, keep, base, cap), upstream = HeadInputs.from_flat(flat[:9]), flat[9:12]
    u, V, s, *_ = direction = PerInput(*flat[12:])
    x_type, W_type, b_type = x.dtype, W.dtype, (W if b is None else b).dtype
    V = torch.zeros_like(W) if V is None else V
    u = torch.zeros_like(x) if u is None else u
    x, u, W, V = (widen(v) for v in (mask_ignored(keep, x), mask_ignored(keep, u), W, V))
    b, s = (None if v is None else widen(v) for v in (b, s))
    γ, ω, η = (None if v is None else mask_ignored(keep, v) for v in Upstream(*upstream))
    k = 1 / math.log(base)
    g: Any = γ * k  # type: ignore[operator]  # γ is never None
    o: Any = 0.0 if ω is None else ω

    z = mask_ignored(keep, Affine.apply(x, W, b))
    r = mask_ignored(keep, Affine.apply(u, W, None) + Affine.apply(x, V, s))
    v, slope, bend = z, 1.0, 0.0
    if cap is not None:
        tanh = Tanh.apply(z / cap)
        v, slope, bend = cap * tanh, (1 - tanh) * (1 + tanh), -2 / cap * tanh
    r = slope * r
    l, lse = LogSoftmax.apply(v, 1), LogSumExp.apply(v, 1)
    a = l.exp()
    ar = (a * r).sum(1, keepdim=True)
    y, p, t, _ = target
    dtarget = direction.target(y)

    ρ_c = (target.subtract_from(target.total() * a) * r).sum(1, keepdim=True) - dtarget.dot(l)
    if y is None and dtarget.p is not None:
        ρ_c = ρ_c + zero_safe_product(dtarget.p, lse)
    ρ_q, ρ_h = 2 * lse * ar, None
    aB, D = (g * target.total() + 2 * o * lse) * a, g * dtarget.total() + 2 * o * ar
    change = (r - ar) * aB
    if η is not None:
        n = η * k
        al = zero_safe_product(a, l)
        al = al - a * al.sum(1, keepdim=True)
        dh = -(al * r).sum(1, keepdim=True)
        aB, D = aB - n * al, D - n * dh
        change = (r - ar) * (aB - n * a)
        ρ_h = mask_ignored(keep, k * dh)
    G = target.times(g).subtract_from(aB)
    dG = dtarget.times(g).subtract_from(change + a * D)
    Δ, Q = slope * G, slope * dG + bend * G * r
    dt = g * (ar - r)
    return (
        mask_ignored(keep, k * ρ_c),
        mask_ignored(keep, ρ_q),
        ρ_h,
        (Q @ W + Δ @ V).to(x_type),
        (Q.T @ x + Δ.T @ u).to(W_type),
        Q.sum(0).to(b_type),
        None if p is None else g * ar if y is None else dt.gather(1, y),
        None if t is None else dt.sum_to_size(t.shape),
    )


def restrict(
    function: Callable[..., Any], inputs: list[Any], places: list[int], has_output: Sequence[bool]
) -> Callable[..., Any]:
    """`function` of the inputs at some places, the others held fixed; with some of its outputs."""

    def restricted(*values: Tensor) -> tuple[Any, ...]:
        arguments = list(inputs)
        for i, value in zip(places, values, strict=True):
            arguments[i] = value
        outputs = zip(function(*arguments), has_output, strict=True)
        return tuple(output for output, has in outputs if has)

    return restricted
