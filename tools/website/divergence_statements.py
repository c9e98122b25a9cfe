"""The statements of the divergences between two heads, by title.

The letters of the teacher have a t above them, as in `torch_nnmath.reference_divergence`.
"""

from __future__ import annotations

from typing import Any

import sympy
from statements import Statement, dot, kronecker, over
from sympy import IndexedBase, Symbol, exp, log

i, j, k, n = sympy.symbols("i j k n", integer=True)
y = Symbol("y", integer=True)  # the label
alpha, beta, mu, tau = (Symbol(name, positive=True) for name in ("alpha", "beta", "mix", "tau"))
a = IndexedBase("a")
K = Symbol("K")
M = IndexedBase("M")

TEACHER_NOTE = "The letters with t above them are those of the teacher."


class Head:
    """The letters of one head: of its inputs, logits, log-probabilities, probabilities, scores."""

    def __init__(self, mark: str, probability: str):
        names = ("x", "w", "b", "z", "l", "s", r"\delta")
        self.x, self.W, self.b, self.z, self.l, self.s, self.δ = (
            IndexedBase(f"{name}{mark}") for name in names
        )
        self.q = IndexedBase(probability)

    def define_logits(self) -> dict[Any, Any]:
        return {self.z[j]: over(k, self.W[j, k] * self.x[k]) + self.b[j]}

    def define_probabilities(self) -> dict[Any, Any]:
        total = over(i, exp(self.z[i] / tau))
        return {
            self.l[j]: self.z[j] / tau - log(total),
            self.q[j]: exp(self.z[j] / tau) / total,
        }

    def define_tangent(self) -> dict[Any, Any]:
        products = self.W[j, k] * dot(self.x)[k] + dot(self.W)[j, k] * self.x[k]
        return {dot(self.z)[j]: over(k, products) + dot(self.b)[j]}

    def list_partials(self) -> dict[Any, Any]:
        return {
            self.x[k]: over(j, self.δ[j] * self.W[j, k]),
            self.W[j, k]: self.δ[j] * self.x[k],
            self.b[j]: self.δ[j],
        }

    def list_products(self) -> dict[Any, Any]:
        return {
            self.x[k]: over(j, dot(self.δ)[j] * self.W[j, k] + self.δ[j] * dot(self.W)[j, k]),
            self.W[j, k]: dot(self.δ)[j] * self.x[k] + self.δ[j] * dot(self.x)[k],
            self.b[j]: dot(self.δ)[j],
        }

    def define_log_prob_tangent(self) -> dict[Any, Any]:
        z, l = dot(self.z), dot(self.l)
        return {l[j]: 1 / tau * (z[j] - over(i, self.q[i] * z[i]))}

    def differentiate_score_part(self, mean: Any) -> Any:
        """The derivative of q_j (s_j - mean), where the mean is that of the scores."""
        l, score = dot(self.l)[j], self.s[j] - mean
        return self.q[j] * (l * score + dot(self.s)[j] - dot(mean))

    def define_mean_tangent(self, mean: Any) -> dict[Any, Any]:
        l, q, s = dot(self.l), self.q, self.s
        return {dot(mean): over(j, q[j] * (l[j] * s[j] + dot(s)[j]))}


STUDENT, TEACHER = Head("", "q"), Head("^{t}", "p")


def state_heads(
    cost: Any,
    definitions: dict[Any, Any],
    tangents: dict[Any, Any],
    sizes: tuple[int, int],
    **rest: Any,
) -> Statement:
    """Returns a statement of two heads with a number of classes and of features."""
    classes, features = sizes
    heads = (STUDENT, TEACHER)
    where: dict[Any, Any] = {}
    for head in heads:
        where |= head.define_logits()
    for head in heads:
        where |= head.define_probabilities()
    where |= definitions
    partials: dict[Any, Any] = {}
    products: dict[Any, Any] = {}
    where_products: dict[Any, Any] = {}
    for head in heads:
        partials |= head.list_partials()
        products |= head.list_products()
        where |= head.define_tangent()
        where_products |= head.define_log_prob_tangent()
    s, t = heads
    return Statement(
        value=(Symbol("c"), cost),
        partials=partials,
        tangent=over(j, s.δ[j] * dot(s.z)[j] + t.δ[j] * dot(t.z)[j]),
        products=products,
        inputs={"x": s.x, "W": s.W, "b": s.b, "xt": t.x, "Wt": t.W, "bt": t.b},
        lengths={i: classes, j: classes, k: features},
        where=where,
        where_products=where_products | tangents,
        note=TEACHER_NOTE,
        **rest,
    )


def state_kl_div(source: Head, target: Head) -> Statement:
    """Returns the statement of Σ q (l - l') with q of the source; F25's source is the teacher."""
    first = 1 / (tau * log(beta))
    return state_heads(
        1 / log(beta) * over(j, source.q[j] * source.s[j]),
        {
            source.s[j]: source.l[j] - target.l[j],
            K: over(j, source.q[j] * source.s[j]),
            target.δ[j]: first * (target.q[j] - source.q[j]),
            source.δ[j]: first * source.q[j] * (source.s[j] - K),
        },
        {
            dot(source.s)[j]: dot(source.l)[j] - dot(target.l)[j],
            **source.define_mean_tangent(K),
            dot(target.δ)[j]: first
            * (target.q[j] * dot(target.l)[j] - source.q[j] * dot(source.l)[j]),
            dot(source.δ)[j]: first * source.differentiate_score_part(K),
        },
        (3, 2),
    )


def state_jsd() -> Statement:
    s, t = STUDENT, TEACHER
    first = 1 / (tau * log(beta))
    Kt = Symbol("L")
    return state_heads(
        1 / log(beta) * over(j, s.q[j] * s.s[j] + t.q[j] * t.s[j]),
        {
            M[j]: mu * t.q[j] + (1 - mu) * s.q[j],
            s.s[j]: (1 - mu) * (s.l[j] - log(M[j])),
            t.s[j]: mu * (t.l[j] - log(M[j])),
            K: over(j, s.q[j] * s.s[j]),
            Kt: over(j, t.q[j] * t.s[j]),
            s.δ[j]: first * s.q[j] * (s.s[j] - K),
            t.δ[j]: first * t.q[j] * (t.s[j] - Kt),
        },
        {
            dot(s.s)[j]: mu * (1 - mu) * (t.q[j] / M[j]) * (dot(s.l)[j] - dot(t.l)[j]),
            dot(t.s)[j]: mu * (1 - mu) * (s.q[j] / M[j]) * (dot(t.l)[j] - dot(s.l)[j]),
            **s.define_mean_tangent(K),
            **t.define_mean_tangent(Kt),
            dot(s.δ)[j]: first * s.differentiate_score_part(K),
            dot(t.δ)[j]: first * t.differentiate_score_part(Kt),
        },
        (2, 1),
    )


def state_distillation() -> Statement:
    s, t = STUDENT, TEACHER
    factor, lse = 1 / log(beta), Symbol(r"\mathrm{lse}")
    return state_heads(
        factor * (alpha * (lse - s.z[y]) + (1 - alpha) * tau**2 * K),
        {
            lse: log(over(i, exp(s.z[i]))),
            a[j]: exp(s.z[j]) / over(i, exp(s.z[i])),
            t.s[j]: t.l[j] - s.l[j],
            K: over(j, t.q[j] * t.s[j]),
            s.δ[j]: factor
            * (alpha * (a[j] - kronecker(j, y)) + (1 - alpha) * tau * (s.q[j] - t.q[j])),
            t.δ[j]: factor * (1 - alpha) * tau * t.q[j] * (t.s[j] - K),
        },
        {
            dot(a)[j]: a[j] * (dot(s.z)[j] - over(i, a[i] * dot(s.z)[i])),
            dot(t.s)[j]: dot(t.l)[j] - dot(s.l)[j],
            **t.define_mean_tangent(K),
            dot(s.δ)[j]: factor
            * (
                alpha * dot(a)[j]
                + (1 - alpha) * tau * (s.q[j] * dot(s.l)[j] - t.q[j] * dot(t.l)[j])
            ),
            dot(t.δ)[j]: factor * (1 - alpha) * tau * t.differentiate_score_part(K),
        },
        (2, 1),
        constants={y: 1},
    )


def state_top_k() -> Statement:
    head, lt, p = STUDENT, TEACHER.l, TEACHER.q
    q, δ, s = head.q, head.δ, head.s
    S, u, v = IndexedBase("S"), IndexedBase("u"), IndexedBase("v")
    P, Q, r = Symbol("P"), Symbol("Q"), Symbol("r")
    factor = 1 / log(beta)
    first = 1 / (tau * log(beta))
    l = dot(head.l)
    return Statement(
        value=(Symbol("c"), factor * (over(n, p[n] * s[n]) + P * r)),
        partials={**head.list_partials(), lt[n]: factor * p[n] * (s[n] - r)},
        tangent=over(j, δ[j] * dot(head.z)[j]) + factor * over(n, p[n] * (s[n] - r) * dot(lt)[n]),
        products={
            **head.list_products(),
            lt[n]: factor * (dot(p)[n] * (s[n] - r) + p[n] * (dot(s)[n] - dot(r))),
        },
        inputs={"x": head.x, "W": head.W, "b": head.b, "lt": lt},
        lengths={i: 3, j: 3, k: 2, n: 2},
        where={
            **head.define_logits(),
            **head.define_probabilities(),
            p[n]: exp(lt[n]),
            u[j]: 1 - over(n, S[n, j]),
            P: 1 - over(n, p[n]),
            Q: over(j, u[j] * q[j]),
            s[n]: lt[n] - over(j, S[n, j] * head.l[j]),
            r: log(P) - log(Q),
            v[j]: 1 / Q * u[j] * q[j],
            δ[j]: first * (q[j] - over(n, S[n, j] * p[n]) - P * v[j]),
            **head.define_tangent(),
        },
        where_products={
            **head.define_log_prob_tangent(),
            dot(p)[n]: p[n] * dot(lt)[n],
            dot(P): -over(n, dot(p)[n]),
            dot(v)[j]: v[j] * (l[j] - over(i, v[i] * l[i])),
            dot(s)[n]: dot(lt)[n] - over(j, S[n, j] * l[j]),
            dot(r): 1 / P * dot(P) - over(j, v[j] * l[j]),
            dot(δ)[j]: first
            * (q[j] * l[j] - over(n, S[n, j] * dot(p)[n]) - dot(P) * v[j] - P * dot(v)[j]),
        },
        constants={S: ((0, 0, 1), (1, 0, 0))},  # the classes 2 and 0
        note=(
            f"{TEACHER_NOTE} It gives the log-probabilities of some classes: S is 1 where the "
            "n-th of them is class j, else 0. P and Q are the probabilities of all others."
        ),
    )


with sympy.evaluate(False):  # keeps the order in which terms are written
    DIVERGENCE_STATEMENTS: dict[str, Statement] = {
        "Kullback-Leibler divergence between two heads": state_kl_div(TEACHER, STUDENT),
        "reverse Kullback-Leibler divergence between two heads": state_kl_div(STUDENT, TEACHER),
        "generalised Jensen-Shannon divergence between two heads": state_jsd(),
        "divergence from a teacher's likeliest classes": state_top_k(),
        "distillation with labels": state_distillation(),
    }
