"""The statements of the divergences between two heads, by title.

The letters of the teacher have a t above them, as in `torch_nnmath.reference_divergence`.
"""

from __future__ import annotations

from typing import Any

import sympy
from statements import Statement, dot, kronecker, over
from sympy import IndexedBase, Symbol, exp, log

i, j, k, l, m, n = sympy.symbols("i j k l m n", integer=True)
y = Symbol("y", integer=True)  # the label
alpha, beta, mu, tau = (Symbol(name, positive=True) for name in ("alpha", "beta", "mix", "tau"))
a = IndexedBase("a")
K = Symbol("K")
H, M = map(IndexedBase, ("H", "M"))

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


STUDENT, TEACHER = Head("", "q"), Head("^{t}", "p")


def state_heads(
    cost: Any,
    definitions: dict[Any, Any],
    seconds: dict[Any, Any],
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
    for head in heads:
        partials |= head.list_partials()
        where |= head.define_tangent()
    s, t = heads
    return Statement(
        value=(Symbol("c"), cost),
        partials=partials,
        tangent=over(j, s.δ[j] * dot(s.z)[j] + t.δ[j] * dot(t.z)[j]),
        seconds=seconds,
        inputs={"x": s.x, "W": s.W, "b": s.b, "xt": t.x, "Wt": t.W, "bt": t.b},
        lengths={i: classes, j: classes, k: features, l: features},
        where=where,
        note=TEACHER_NOTE,
        **rest,
    )


def list_seconds(head: Head) -> dict[Any, Any]:
    """Returns the second derivatives in the inputs of a head, whose logits have the Hessian H."""
    return {
        (head.b[i], head.b[j]): H[i, j],
        (head.W[j, k], head.W[i, l]): H[i, j] * head.x[k] * head.x[l],
        (head.W[j, k], head.x[l]): over(i, H[i, j] * head.W[i, l]) * head.x[k]
        + head.δ[j] * kronecker(k, l),
    }


def softmax_hessian(q: Any, first: Any, second: Any) -> Any:
    return q[first] * (kronecker(first, second) - q[second])


def score_hessian(head: Head, first: Any, second: Any) -> Any:
    """The derivative of q_i (s_i - K), K = Σ q s, where s_i is a log-probability and a constant."""
    q, s = head.q, head.s
    own = (kronecker(first, second) - q[second]) * (s[first] - K + 1)
    return q[first] * (own - q[second] * (s[second] - K))


def state_kl_div(source: Head, target: Head) -> Statement:
    """Returns the statement of Σ q (l - l') with q of the source; F25's source is the teacher."""
    first, second = 1 / (tau * log(beta)), 1 / (tau**2 * log(beta))
    return state_heads(
        1 / log(beta) * over(j, source.q[j] * source.s[j]),
        {
            source.s[j]: source.l[j] - target.l[j],
            K: over(j, source.q[j] * source.s[j]),
            target.δ[j]: first * (target.q[j] - source.q[j]),
            source.δ[j]: first * source.q[j] * (source.s[j] - K),
            H[i, j]: second * softmax_hessian(target.q, i, j),
        },
        {
            **list_seconds(target),
            (target.b[i], source.b[j]): -second * softmax_hessian(source.q, i, j),
            (source.b[i], source.b[j]): second * score_hessian(source, i, j),
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
        {},
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
            H[i, j]: factor
            * (alpha * softmax_hessian(a, i, j) + (1 - alpha) * softmax_hessian(s.q, i, j)),
        },
        {
            **list_seconds(s),
            (s.b[i], t.b[j]): factor * (alpha - 1) * softmax_hessian(t.q, i, j),
            (t.b[i], t.b[j]): factor * (1 - alpha) * score_hessian(t, i, j),
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
    first, second = 1 / (tau * log(beta)), 1 / (tau**2 * log(beta))
    return Statement(
        value=(Symbol("c"), factor * (over(n, p[n] * s[n]) + P * r)),
        partials={**head.list_partials(), lt[n]: factor * p[n] * (s[n] - r)},
        tangent=over(j, δ[j] * dot(head.z)[j]) + factor * over(n, p[n] * (s[n] - r) * dot(lt)[n]),
        seconds={
            **list_seconds(head),
            (head.b[j], lt[n]): first * p[n] * (v[j] - S[n, j]),
            (lt[n], lt[m]): factor * p[n] * (kronecker(n, m) * (s[n] - r + 1) + p[m] / P),
        },
        inputs={"x": head.x, "W": head.W, "b": head.b, "lt": lt},
        lengths={i: 3, j: 3, k: 2, l: 2, m: 2, n: 2},
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
            H[i, j]: second * (softmax_hessian(q, i, j) - P * softmax_hessian(v, i, j)),
            **head.define_tangent(),
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
