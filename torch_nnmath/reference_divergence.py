"""The divergences between two heads, F25 to F29, in NumPy: element form and matrix form.

As in `reference`. The student's logits are z = W x + b with q = softmax(z/τ) and l = ln q, the
teacher's zt = Wt xt + bt with p = softmax(zt/τ) and lt = ln p. μ is the mixing weight `mix`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from torch_nnmath.reference import (
    NUMPY,
    VJP,
    Array,
    Elementary,
    Form,
    Forms,
    Gradients,
    affine_element,
    affine_matrix,
    column,
    cross_entropy_element,
    cross_entropy_matrix,
    kronecker,
    log_softmax_element,
    log_softmax_matrix,
)

# The value, and the partial derivatives with respect to l and to lt
Partials = tuple[Any, list[Any], list[Any]]
Scores = tuple[Array | None, Array | None]


def kl_div(l: list[Any], lt: list[Any], mix: Any, fn: Elementary) -> Partials:
    """F25: c = Σ_j p_j (lt_j - l_j),  dc/dl_j = -p_j, dc/dlt_j = p_j (lt_j - l_j + 1)."""
    J, p = range(len(l)), [fn.exp(v) for v in lt]
    c = sum(p[j] * (lt[j] - l[j]) for j in J)
    return c, [-p[j] for j in J], [p[j] * (lt[j] - l[j] + 1) for j in J]


def kl_div_scores(q: Array, l: Array, p: Array, lt: Array, mix: Any, fn: Elementary) -> Scores:
    """F25: c = pᵀ st, st = lt - l;  dz = (q - p)/τ, dzt = p ∘ (st - pᵀ st)/τ."""
    return None, lt - l


def reverse_kl_div(l: list[Any], lt: list[Any], mix: Any, fn: Elementary) -> Partials:
    """F26: c = Σ_j q_j (l_j - lt_j): F25 with the roles exchanged."""
    c, ft, f = kl_div(lt, l, mix, fn)
    return c, f, ft


def reverse_kl_div_scores(
    q: Array, l: Array, p: Array, lt: Array, mix: Any, fn: Elementary
) -> Scores:
    """F26: c = qᵀ s, s = l - lt;  dz = q ∘ (s - qᵀ s)/τ, dzt = (p - q)/τ."""
    return l - lt, None


def jsd(l: list[Any], lt: list[Any], mix: Any, fn: Elementary) -> Partials:
    """F27: c = Σ_j (1-μ) q_j (l_j - ln m_j) + μ p_j (lt_j - ln m_j), m_j = μ p_j + (1-μ) q_j.

    dc/dl_j = (1-μ) q_j (l_j - ln m_j), dc/dlt_j = μ p_j (lt_j - ln m_j): the derivative of ln m_j
    cancels, as does that of l_j itself.
    """
    J, q, p = range(len(l)), [fn.exp(v) for v in l], [fn.exp(v) for v in lt]
    lm = [fn.log(mix * p[j] + (1 - mix) * q[j]) for j in J]
    f = [(1 - mix) * q[j] * (l[j] - lm[j]) for j in J]
    ft = [mix * p[j] * (lt[j] - lm[j]) for j in J]
    return sum(f[j] + ft[j] for j in J), f, ft


def jsd_scores(q: Array, l: Array, p: Array, lt: Array, mix: Any, fn: Elementary) -> Scores:
    """F27: c = qᵀ s + pᵀ st, s = (1-μ)(l - ln m), st = μ (lt - ln m), m = μ p + (1-μ) q;

    dz = q ∘ (s - qᵀ s)/τ, dzt = p ∘ (st - pᵀ st)/τ.
    """
    lm = fn.log(mix * p + (1 - mix) * q)
    return (1 - mix) * (l - lm), mix * (lt - lm)


def divergence_element(
    z: Array, zt: Array, partials: Callable[..., Partials], tau: Any, mix: Any, fn: Elementary
) -> VJP:
    """c of l and lt;  dc/dz_k = (1/τ) Σ_j dc/dl_j (δ_jk - q_k), and so for the teacher."""
    (q, l, _), (p, lt, _) = (log_softmax_element(v / tau, fn) for v in (z, zt))
    c, f, ft = partials(l, lt, mix, fn)
    J = range(len(l))

    def pullback(g: Any) -> Gradients:
        return tuple(
            column(sum(g * f[j] * (kronecker(j, k) - q[k]) for j in J) / tau for k in J)
            for f, q in ((f, q), (ft, p))
        )

    return c, pullback


def divergence_matrix(
    z: Array, zt: Array, scores: Callable[..., Scores], tau: Any, mix: Any, fn: Elementary
) -> VJP:
    """c = qᵀ s + pᵀ st of the scores s and st;  dz = q ∘ (s - qᵀ s)/τ, and so for the teacher.

    A side without a score has dz = (q - p)/τ or dzt = (p - q)/τ.
    """
    (q, l, _), (p, lt, _) = (log_softmax_matrix(v / tau, fn) for v in (z, zt))
    s, st = scores(q, l, p, lt, mix, fn)

    def differentiate(a: Array, s: Any, other: Array) -> Array:
        return (a - other if s is None else a * (s - (a.T @ s).item())) / tau

    c = sum((a.T @ s).item() for a, s in ((q, s), (p, st)) if s is not None)
    return c, lambda g: (g * differentiate(q, s, p), g * differentiate(p, st, q))


def _make_heads(form: str, kind: Callable[..., Any]) -> Callable[..., VJP]:
    """Returns F25, F26 or F27 of two heads in one of the forms, to the base β."""
    affine = {"element": affine_element, "matrix": affine_matrix}[form]
    divergence: Any = {"element": divergence_element, "matrix": divergence_matrix}[form]

    def rule(
        *inputs: Array, beta: Any = math.e, tau: Any = 1, mix: Any = None, fn: Elementary = NUMPY
    ) -> VJP:
        x, W, b, xt, Wt, bt = inputs
        (z, pullback_z), (zt, pullback_zt) = affine(x, W, b, fn=fn), affine(xt, Wt, bt, fn=fn)
        c, divergence_pullback = divergence(z, zt, kind, tau, mix, fn)
        ln = fn.log(beta)

        def pullback(g: Any) -> Gradients:
            dz, dzt = divergence_pullback(g / ln)
            return *pullback_z(dz), *pullback_zt(dzt)

        return c / ln, pullback

    return rule


def _make_distillation(form: str, kind: Callable[..., Any]) -> Callable[..., VJP]:
    """Returns F29 in one of the forms: α F14 with the label y, plus (1-α) τ² F25."""
    affine = {"element": affine_element, "matrix": affine_matrix}[form]
    divergence: Any = {"element": divergence_element, "matrix": divergence_matrix}[form]
    cross_entropy = {"element": cross_entropy_element, "matrix": cross_entropy_matrix}[form]

    def rule(
        *inputs: Array, y: int, alpha: Any, tau: Any, beta: Any = math.e, fn: Elementary = NUMPY
    ) -> VJP:
        x, W, b, xt, Wt, bt = inputs
        (z, pullback_z), (zt, pullback_zt) = affine(x, W, b, fn=fn), affine(xt, Wt, bt, fn=fn)
        d, divergence_pullback = divergence(z, zt, kind, tau, None, fn)
        e_y = column(kronecker(j, y) for j in range(len(z)))
        c, cross_entropy_pullback = cross_entropy(z, e_y, beta=beta, fn=fn)
        factor = (1 - alpha) * tau**2 / fn.log(beta)

        def pullback(g: Any) -> Gradients:
            dz, dzt = divergence_pullback(g * factor)
            label_dz, _ = cross_entropy_pullback(g * alpha)
            return *pullback_z(dz + label_dz), *pullback_zt(dzt)

        return alpha * c + factor * d, pullback

    return rule


def top_k_element(
    x: Array,
    W: Array,
    b: Array,
    lt: Array,
    *,
    indices: Sequence[int],
    beta: Any = math.e,
    tau: Any = 1,
    fn: Elementary = NUMPY,
) -> VJP:
    """F28: F25 of the classes `indices` = K, of which the teacher has lt_i, and of the rest r.

    q_r = Σ_{j∉K} q_j, p_r = 1 - Σ_i p_i.  With f and ft, the partial derivatives of F25:
    dc/dz_k = (1/τ)(Σ_{i∈K} f_i (δ_ik - q_k) + f_r Σ_{j∉K} (q_j/q_r) (δ_jk - q_k)),
    dc/dlt_i = ft_i - ft_r p_i/p_r.
    """
    z, affine_pullback = affine_element(x, W, b, fn=fn)
    q, l, _ = log_softmax_element(z / tau, fn)
    others = [j for j in range(len(q)) if j not in indices]
    p, ln = [fn.exp(v) for v in lt[:, 0]], fn.log(beta)
    q_r, p_r = sum(q[j] for j in others), 1 - sum(p)
    l_k, lt_k = [*(l[i] for i in indices), fn.log(q_r)], [*lt[:, 0], fn.log(p_r)]
    c, (*f, f_r), (*ft, ft_r) = kl_div(l_k, lt_k, None, fn)

    def differentiate(k: int) -> Any:
        of_k = sum(f_i * (kronecker(i, k) - q[k]) for i, f_i in zip(indices, f, strict=True))
        return of_k + sum(f_r * q[j] / q_r * (kronecker(j, k) - q[k]) for j in others)

    def pullback(g: Any) -> Gradients:
        dz = column(g * differentiate(k) / (tau * ln) for k in range(len(q)))
        dlt = column(g * (ft[i] - ft_r * p[i] / p_r) / ln for i in range(len(p)))
        return *affine_pullback(dz), dlt

    return c / ln, pullback


def top_k_matrix(
    x: Array,
    W: Array,
    b: Array,
    lt: Array,
    *,
    indices: Sequence[int],
    beta: Any = math.e,
    tau: Any = 1,
    fn: Elementary = NUMPY,
) -> VJP:
    """F28: with S, which selects K, and w = q/q_r of the other classes, 0 of K:

    dz = (1/τ)(Sᵀ f + f_r w - q (1ᵀ f + f_r)), f = -p, f_r = -p_r;
    dlt = p ∘ (st - st_r), st = lt - S l, st_r = ln p_r - ln q_r.
    """
    z, affine_pullback = affine_matrix(x, W, b, fn=fn)
    q, l, _ = log_softmax_matrix(z / tau, fn)
    S = np.array([[kronecker(i, j) for j in range(len(q))] for i in indices])
    others, p, ln = 1 - S.T.sum(1, keepdims=True), fn.exp(lt), fn.log(beta)
    q_r, p_r = (others.T @ q).item(), 1 - p.sum()
    w, st, st_r = others * q / q_r, lt - S @ l, fn.log(p_r) - fn.log(q_r)

    def pullback(g: Any) -> Gradients:
        dz = (q - S.T @ p - p_r * w) / (tau * ln)
        return *affine_pullback(g * dz), g * p * (st - st_r) / ln

    return ((p.T @ st).item() + p_r * st_r) / ln, pullback


def _make_forms(
    make: Callable[..., Callable[..., VJP]],
    partials: Callable[..., Partials],
    scores: Callable[..., Scores],
) -> Forms:
    return Forms(Form(make("element", partials)), Form(make("matrix", scores)))


LINEAR_KL_DIV = _make_forms(_make_heads, kl_div, kl_div_scores)
LINEAR_REVERSE_KL_DIV = _make_forms(_make_heads, reverse_kl_div, reverse_kl_div_scores)
LINEAR_JSD = _make_forms(_make_heads, jsd, jsd_scores)
TOP_K_KL_DIV = Forms(Form(top_k_element), Form(top_k_matrix))
DISTILLATION = _make_forms(_make_distillation, kl_div, kl_div_scores)
