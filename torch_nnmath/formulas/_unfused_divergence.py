"""The divergence between two heads with the logits in memory: for tracers, and third order.

`compute_rows` is what `LinearDivergence` computes, `compute_second_order` what
`LinearDivergenceSecondOrder` computes, in operations that PyTorch can differentiate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import widen
from torch_nnmath._records import DivergenceInputs, PairValues
from torch_nnmath.formulas._formula import mask_ignored

INPUT_COUNT, VALUE_COUNT = len(DivergenceInputs._fields), len(PairValues._fields)


def compute_rows(inputs: DivergenceInputs) -> Tensor:
    """c of each row, (N, 1)."""
    z = _compute_logits(inputs.x, inputs.W, inputs.b, inputs.keep)
    l = _log_softmax(z / inputs.temperature)
    if inputs.indices is None:
        zt = _compute_logits(inputs.xt, inputs.Wt, inputs.bt, inputs.keep)
        c = _compute_divergence(l, _log_softmax(zt / inputs.temperature), inputs.mix)
    else:
        xt = widen(mask_ignored(inputs.keep, inputs.xt))
        c = _compute_divergence(
            *_select_classes(l, xt, inputs.indices, inputs.has_rest), inputs.mix
        )
    c = inputs.factor * c
    if inputs.y is not None and inputs.label_factor:
        label_l = l if inputs.temperature == 1 else _log_softmax(z)
        c = c - inputs.label_factor * label_l.gather(1, inputs.y)
    return mask_ignored(inputs.keep, c)


def _compute_logits(x: Tensor, W: Tensor | None, b: Tensor | None, keep: Tensor | None) -> Tensor:
    x = widen(mask_ignored(keep, x))
    if W is None:
        return x
    z = torch.nn.functional.linear(x, widen(W), None if b is None else widen(b))
    return mask_ignored(keep, z)


def _log_softmax(z: Tensor) -> Tensor:
    z = z - z.detach().amax(1, keepdim=True)
    return z - z.exp().sum(1, keepdim=True).log()


def _select_classes(
    l: Tensor, lt: Tensor, indices: Tensor, has_rest: bool
) -> tuple[Tensor, Tensor]:
    """l and lt of the teacher's classes, and of the others as one class."""
    selected = l.gather(1, indices)
    if not has_rest or indices.shape[1] == l.shape[1]:
        return selected, lt
    others = l.scatter(1, indices, -torch.inf)
    m = others.detach().amax(1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)
    l_rest = m + (others - m).exp().sum(1, keepdim=True).log()
    mass = (1 - lt.double().exp().sum(1, keepdim=True)).clamp(min=torch.finfo(lt.dtype).eps)
    lt_rest = mass.log().to(lt.dtype)
    return torch.cat((selected, l_rest), 1), torch.cat((lt, lt_rest), 1)


def _compute_divergence(l: Tensor, lt: Tensor, mix: float) -> Tensor:
    """Σ over the classes of the side's probability times its score; 0 where that is 0."""
    q, p = l.exp(), lt.exp()
    if mix == 0:
        terms = p * (lt - l).masked_fill(p == 0, 0)
    elif mix == 1:
        terms = q * (l - lt).masked_fill(q == 0, 0)
    else:
        lm = (mix * p + (1 - mix) * q).clamp(min=torch.finfo(l.dtype).tiny).log()
        terms = (1 - mix) * q * (l - lm).masked_fill(q == 0, 0)
        terms = terms + mix * p * (lt - lm).masked_fill(p == 0, 0)
    return terms.sum(1, keepdim=True)


def compute_second_order(*flat: Any) -> tuple[Any, ...]:
    """(`DivergenceInputs`, γ, direction) -> ρ (N, 1) and six gradients, None for an absent input.

    The formulas of `LinearDivergenceSecondOrder`, in operations that PyTorch can differentiate.
    """
    inputs, γ = DivergenceInputs(*flat[:INPUT_COUNT]), flat[INPUT_COUNT]
    direction = PairValues(*flat[INPUT_COUNT + 1 :])
    keep, τ, (x, W, b, xt, Wt, bt) = inputs.keep, inputs.temperature, inputs.values
    γ = mask_ignored(keep, γ)
    z = _compute_logits(x, W, b, keep)
    R = _compute_direction((x, W, b), direction[:3], keep, z)
    l = _log_softmax(z / τ)
    q, r = l.exp(), _differentiate_log_softmax(l, R / τ)
    zt = _compute_logits(xt, Wt, bt, keep)
    Rt = _compute_direction((xt, Wt, bt), direction[3:], keep, zt)
    if inputs.indices is None:
        lt = _log_softmax(zt / τ)
        p, rt = lt.exp(), _differentiate_log_softmax(lt, Rt / τ)
        f, ft, df, dft = _differentiate_divergence(l, lt, r, rt, inputs.mix)
        ρ = (f * r + ft * rt).sum(1, keepdim=True)
        (F, Ft), (dF, dFt) = _sum(f, ft), _sum(df, dft)
        G, dG = f - q * F, df - q * (r * F + dF)
        Gt, dGt = (ft - p * Ft) / τ, (dft - p * (rt * Ft + dFt)) / τ
    else:
        ρ, G, dG, Gt, dGt = _differentiate_top_k(inputs.indices, inputs, (l, zt), (r, Rt))
    Δ, Q = inputs.factor * G / τ, inputs.factor * dG / τ
    ρ = inputs.factor * ρ
    if inputs.y is not None and inputs.label_factor:
        a = _log_softmax(z).exp()
        aR = (a * R).sum(1, keepdim=True)
        ρ = ρ + inputs.label_factor * (aR - R.gather(1, inputs.y))
        Δ = Δ + inputs.label_factor * a.scatter_add(1, inputs.y, -torch.ones_like(aR))
        Q = Q + inputs.label_factor * a * (R - aR)
    γt = γ * inputs.factor
    return (
        mask_ignored(keep, ρ),
        *_pull_back((x, W, b), direction[:3], γ * Δ, γ * Q, keep),
        *_pull_back((xt, Wt, bt), direction[3:], γt * Gt, γt * dGt, keep),
    )


def _sum(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.sum(1, keepdim=True) for v in values)


def _compute_direction(values: Any, direction: Any, keep: Tensor | None, z: Tensor) -> Tensor:
    """R = u Wᵀ + x Vᵀ + σ; the direction of given logits is u."""
    (x, W, _), (u, V, σ) = values, direction
    R = torch.zeros_like(z)
    if u is not None:
        R = R + _compute_logits(u, W, None, keep)
    if V is not None:
        R = R + _compute_logits(x, V, None, keep)
    return R if σ is None else mask_ignored(keep, R + widen(σ))


def _pull_back(
    values: Any, direction: Any, Δ: Tensor, Q: Tensor, keep: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dx = Q W + Δ V,  dW = Qᵀ x + Δᵀ u,  db = Σ_rows Q; dx = Q of given logits."""
    (x, W, b), (u, V, _) = values, direction
    Δ, Q = mask_ignored(keep, Δ), mask_ignored(keep, Q)
    if W is None:
        return Q.to(x.dtype), None, None
    dx, dW = Q @ widen(W), Q.T @ widen(mask_ignored(keep, x))
    if V is not None:
        dx = dx + Δ @ widen(V)
    if u is not None:
        dW = dW + Δ.T @ widen(mask_ignored(keep, u))
    return dx.to(x.dtype), dW.to(W.dtype), None if b is None else Q.sum(0).to(b.dtype)


def _differentiate_log_softmax(l: Tensor, R: Tensor) -> Tensor:
    """dl = R - q·R."""
    return R - (l.exp() * R).sum(1, keepdim=True)


def _differentiate_divergence(
    l: Tensor, lt: Tensor, r: Tensor, rt: Tensor, mix: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f = dc/dl and ft = dc/dlt of each class, and their derivatives along (r, rt)."""
    q, p = l.exp(), lt.exp()
    if mix == 0:
        s = (lt - l).masked_fill(p == 0, 0) + 1
        return -p, p * s, -p * rt, p * (rt * s + rt - r)
    if mix == 1:
        s = (l - lt).masked_fill(q == 0, 0) + 1
        return q * s, -q, q * (r * s + r - rt), -q * r
    m = (mix * p + (1 - mix) * q).clamp(min=torch.finfo(l.dtype).tiny)
    dlm = ((1 - mix) * q * r + mix * p * rt) / m
    s = (l - m.log()).masked_fill(q == 0, 0)
    st = (lt - m.log()).masked_fill(p == 0, 0)
    wq, wp = (1 - mix) * q, mix * p
    return wq * s, wp * st, wq * (r * s + r - dlm), wp * (rt * st + rt - dlm)


def _differentiate_top_k(
    indices: Tensor, inputs: DivergenceInputs, log_probs: Any, direction: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """F28: ρ, and dc/d(z/τ) and dc/dlt, each followed by its derivative along (r, rt)."""
    (l, lt), (r, rt), k = log_probs, direction, indices.shape[1]
    q, p = l.exp(), lt.exp()
    l_k, lt_k = _select_classes(l, lt, indices, inputs.has_rest)
    r_k, rt_k, w, wr = r.gather(1, indices), rt, torch.zeros_like(l), torch.zeros_like(l[:, :1])
    has_rest = l_k.shape[1] > k
    p_over_rest = torch.zeros_like(lt)
    if has_rest:
        w = (l.scatter(1, indices, -torch.inf) - l_k[:, k:]).exp()
        wr = (w * r).sum(1, keepdim=True)
        mass = 1 - lt.double().exp().sum(1, keepdim=True)
        is_free = mass > torch.finfo(lt.dtype).eps  # else the mass of the rest is a constant
        p_over_rest = torch.where(is_free, p / lt_k[:, k:].exp(), 0)
        rest = -(p_over_rest * rt).sum(1, keepdim=True)
        r_k, rt_k = torch.cat((r_k, wr), 1), torch.cat((rt, rest), 1)
    f, ft, df, dft = _differentiate_divergence(l_k, lt_k, r_k, rt_k, inputs.mix)
    ρ = (f * r_k + ft * rt_k).sum(1, keepdim=True)
    (F,), (dF,) = _sum(f), _sum(df)
    zeros = torch.zeros_like(l)
    dl, ddl = zeros.scatter(1, indices, f[:, :k]), zeros.scatter(1, indices, df[:, :k])
    dlt, ddlt = ft[:, :k], dft[:, :k]
    if has_rest:
        f_r, ft_r, df_r, dft_r = (v[:, k:] for v in (f, ft, df, dft))
        dl, ddl = dl + f_r * w, ddl + df_r * w + f_r * w * (r - wr)
        dlt = dlt - p_over_rest * ft_r
        ddlt = ddlt - p_over_rest * (rt * ft_r + dft_r - ft_r * rt_k[:, k:])
    return ρ, dl - q * F, ddl - q * (r * F + dF), dlt, ddlt
