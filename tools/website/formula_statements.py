"""The statements of the catalogue's formulas, by title; a test proves each of them."""

from __future__ import annotations

from typing import Any

import sympy
from divergence_statements import DIVERGENCE_STATEMENTS
from statements import Statement, dot, kronecker, over
from sympy import IndexedBase, Symbol, exp, log, tanh

i, j, k, l, q, N = sympy.symbols("i j k l q N", integer=True)
y = Symbol("y", integer=True)  # the class of a log-probability
beta, cap, zeta = (Symbol(name, positive=True) for name in ("beta", "cap", "zeta"))
a, b, c, t, v, x, z, W, δ, J, h = map(
    IndexedBase, ("a", "b", "c", "t", "v", "x", "z", "w", r"\delta", "J", "h")
)
T, lse, s = Symbol("T"), Symbol(r"\mathrm{lse}"), Symbol("s")

HALF = sympy.Rational(1, 2)
CLASSES = 3  # of the catalogue's samples


def sigmoid(argument: Any) -> Any:
    return 1 / (1 + exp(-argument))


def state_activation(value: Any, slope: Any, curvature: Any, **options: Any) -> Statement:
    """Returns the statement of a function of each entry, from its first two derivatives."""
    left = options.pop("left", a[j])
    seconds = {}
    if curvature is not None:
        seconds[z[k], z[l]] = kronecker(j, k) * kronecker(j, l) * curvature
    return Statement(
        value=(left, value),
        partials={z[k]: kronecker(j, k) * slope},
        tangent=slope * dot(z[j]),
        seconds=seconds,
        inputs={"z": z},
        lengths={j: 3, k: 3, l: 3},
        **options,
    )


def state_affine() -> Statement:
    return Statement(
        value=(z[i], over(k, W[i, k] * x[k]) + b[i]),
        partials={x[k]: W[i, k], W[j, k]: kronecker(i, j) * x[k], b[j]: kronecker(i, j)},
        tangent=over(k, W[i, k] * dot(x)[k] + dot(W)[i, k] * x[k]) + dot(b)[i],
        seconds={(W[j, k], x[l]): kronecker(i, j) * kronecker(k, l)},
        inputs={"x": x, "W": W, "b": b},
        lengths={i: 2, j: 2, k: 3, l: 3},
    )


def state_tanh() -> Statement:
    return state_activation(tanh(z[j]), 1 - a[j] ** 2, -2 * a[j] * (1 - a[j] ** 2))


def state_relu() -> Statement:
    slope = sympy.Piecewise((0, z[j] <= 0), (1, True), evaluate=False)
    where = {h[j]: slope}
    return state_activation(sympy.Max(z[j], 0, evaluate=False), h[j], None, where=where)


def state_sigmoid() -> Statement:
    slope = a[j] * (1 - a[j])
    return state_activation(sigmoid(z[j]), slope, slope * (1 - 2 * a[j]))


def state_softcap() -> Statement:
    slope = 1 - (v[j] / cap) ** 2
    curvature = -(2 / cap**2) * v[j] * slope
    return state_activation(cap * tanh(z[j] / cap), slope, curvature, left=v[j])


def state_cost() -> Statement:
    cost = Symbol("C")
    return Statement(
        value=(cost, 1 / N * over(i, c[i])),
        partials={c[j]: 1 / N},
        tangent=1 / N * over(i, dot(c)[i]),
        inputs={"c": c},
        lengths={i: 4, j: 4},
        constants={N: 4},
    )


def state_squared_error() -> Statement:
    return Statement(
        value=(Symbol("c"), HALF * over(j, (t[j] - a[j]) ** 2)),
        partials={a[j]: a[j] - t[j], t[j]: t[j] - a[j]},
        tangent=over(j, (a[j] - t[j]) * (dot(a)[j] - dot(t)[j])),
        seconds={
            (a[j], a[k]): kronecker(j, k),
            (a[j], t[k]): -kronecker(j, k),
            (t[j], t[k]): kronecker(j, k),
        },
        inputs={"a": a, "t": t},
        lengths={j: 3, k: 3},
    )


def state_categorical_cross_entropy() -> Statement:
    factor = -(1 / log(beta))
    return Statement(
        value=(Symbol("c"), factor * over(j, t[j] * log(a[j]))),
        partials={a[j]: factor * (t[j] / a[j]), t[j]: factor * log(a[j])},
        tangent=factor * over(j, t[j] / a[j] * dot(a)[j] + log(a[j]) * dot(t)[j]),
        seconds={
            (a[j], a[k]): 1 / log(beta) * kronecker(j, k) * (t[j] / a[j] ** 2),
            (a[j], t[k]): factor * kronecker(j, k) * (1 / a[j]),
        },
        inputs={"a": a, "t": t},
        lengths={j: CLASSES, k: CLASSES},
    )


def softmax(index: Any) -> Any:
    return exp(z[index]) / over(i, exp(z[i]))


def state_softmax() -> Statement:
    return Statement(
        value=(a[j], softmax(j)),
        partials={z[k]: a[j] * (kronecker(j, k) - a[k])},
        tangent=a[j] * (dot(z)[j] - over(i, a[i] * dot(z)[i])),
        seconds={
            (z[k], z[l]): a[j]
            * (
                (kronecker(j, k) - a[k]) * (kronecker(j, l) - a[l])
                - a[k] * (kronecker(k, l) - a[l])
            )
        },
        inputs={"z": z},
        lengths={i: 3, j: 3, k: 3, l: 3},
    )


def state_softmax_jacobian() -> Statement:
    d = IndexedBase("d")
    slope = a[j] * (dot(z)[j] - over(q, a[q] * dot(z)[q]))
    return Statement(
        value=(J[i, j], a[i] * (kronecker(i, j) - a[j])),
        partials={z[k]: a[i] * (d[i, k] * d[i, j] - a[j] * d[j, k])},
        tangent=dot(a)[i] * (kronecker(i, j) - a[j]) - a[i] * dot(a)[j],
        seconds={
            (z[k], z[l]): a[i]
            * (
                d[i, l] * (d[i, k] * d[i, j] - a[j] * d[j, k])
                - a[k] * d[k, l] * d[i, j]
                - a[j] * (d[i, k] * d[j, l] + d[j, l] * d[j, k] - a[k] * d[k, l])
            )
        },
        inputs={"z": z},
        lengths={i: 3, j: 3, k: 3, l: 3, q: 3},
        where={
            a[j]: exp(z[j]) / over(q, exp(z[q])),
            d[i, j]: kronecker(i, j) - a[j],
            dot(a)[j]: slope,
        },
    )


def state_sigmoid_squared_error() -> Statement:
    slope = a[j] * (1 - a[j])
    return Statement(
        value=(Symbol("c"), HALF * over(j, (t[j] - a[j]) ** 2)),
        partials={
            x[k]: over(j, δ[j] * W[j, k]),
            W[j, k]: δ[j] * x[k],
            b[j]: δ[j],
            t[j]: t[j] - a[j],
        },
        tangent=over(j, δ[j] * dot(z)[j] - (a[j] - t[j]) * dot(t)[j]),
        products={**AFFINE_PRODUCTS, t[j]: dot(t)[j] - slope * dot(z)[j]},
        inputs={"x": x, "W": W, "b": b, "t": t},
        lengths={j: 2, k: 3},
        where={
            z[j]: over(k, W[j, k] * x[k]) + b[j],
            a[j]: sigmoid(z[j]),
            δ[j]: (a[j] - t[j]) * a[j] * (1 - a[j]),
            dot(z)[j]: over(k, W[j, k] * dot(x)[k] + dot(W)[j, k] * x[k]) + dot(b)[j],
        },
        where_products={
            h[j]: slope * (slope + (a[j] - t[j]) * (1 - 2 * a[j])),
            dot(δ)[j]: h[j] * dot(z)[j] - slope * dot(t)[j],
        },
    )


def state_feedforward() -> Statement:
    W1, W2, b1, b2, a1, z1, z2 = map(
        IndexedBase, ("w^{1}", "w^{2}", "b^{1}", "b^{2}", "a^{1}", "z^{1}", "z^{2}")
    )
    out, f1, f2, e = map(IndexedBase, ("a^{2}", "f'^{1}", "f'^{2}", "e"))

    def slope(activation: Any) -> Any:
        return activation * (1 - activation)

    return Statement(
        value=(out[i], sigmoid(z2[i])),
        partials={
            W2[j, k]: kronecker(i, j) * f2[i] * a1[k],
            b2[j]: kronecker(i, j) * f2[i],
            W1[k, q]: e[i, k] * x[q],
            b1[k]: e[i, k],
            x[q]: over(k, e[i, k] * W1[k, q]),
        },
        tangent=f2[i] * dot(z2)[i],
        products={
            W2[j, k]: kronecker(i, j) * (dot(f2)[i] * a1[k] + f2[i] * dot(a1)[k]),
            b2[j]: kronecker(i, j) * dot(f2)[i],
            W1[k, q]: dot(e)[i, k] * x[q] + e[i, k] * dot(x)[q],
            b1[k]: dot(e)[i, k],
            x[q]: over(k, dot(e)[i, k] * W1[k, q] + e[i, k] * dot(W1)[k, q]),
        },
        inputs={"x": x, "W1": W1, "b1": b1, "W2": W2, "b2": b2},
        lengths={i: 2, j: 2, k: 2, q: 3},
        where={
            z1[k]: over(q, W1[k, q] * x[q]) + b1[k],
            a1[k]: sigmoid(z1[k]),
            z2[i]: over(k, W2[i, k] * a1[k]) + b2[i],
            f1[k]: slope(a1[k]),
            f2[i]: slope(out[i]),
            e[i, k]: f2[i] * W2[i, k] * f1[k],
            dot(z1)[k]: over(q, W1[k, q] * dot(x)[q] + dot(W1)[k, q] * x[q]) + dot(b1)[k],
            dot(a1)[k]: f1[k] * dot(z1)[k],
            dot(z2)[i]: over(k, W2[i, k] * dot(a1)[k] + dot(W2)[i, k] * a1[k]) + dot(b2)[i],
        },
        where_products={
            dot(f1)[k]: (1 - 2 * a1[k]) * dot(a1)[k],
            dot(f2)[i]: (1 - 2 * out[i]) * f2[i] * dot(z2)[i],
            dot(e)[i, k]: dot(f2)[i] * W2[i, k] * f1[k]
            + f2[i] * dot(W2)[i, k] * f1[k]
            + f2[i] * W2[i, k] * dot(f1)[k],
        },
    )


def define_softmax(logits: Any) -> dict[Any, Any]:
    """Returns the definitions of T, lse and a for these logits."""
    return {
        lse: log(over(i, exp(logits[i]))),
        a[j]: exp(logits[j]) / over(i, exp(logits[i])),
    }


def state_cross_entropy() -> Statement:
    factor = 1 / log(beta)
    return Statement(
        value=(Symbol("c"), factor * (T * lse - over(j, t[j] * z[j]))),
        partials={z[j]: factor * (T * a[j] - t[j]), t[j]: factor * (lse - z[j])},
        tangent=factor * over(j, (T * a[j] - t[j]) * dot(z)[j] + (lse - z[j]) * dot(t)[j]),
        seconds={
            (z[j], z[k]): T / log(beta) * a[j] * (kronecker(j, k) - a[k]),
            (z[j], t[k]): factor * (a[j] - kronecker(j, k)),
        },
        inputs={"z": z, "t": t},
        lengths={i: CLASSES, j: CLASSES, k: CLASSES},
        where=TOTAL | define_softmax(z),
    )


HEAD_LENGTHS = {i: CLASSES, j: CLASSES, k: 2}


def state_head() -> Statement:
    factor = 1 / log(beta)
    return Statement(
        value=(Symbol("c"), factor * (T * lse - over(j, t[j] * z[j]))),
        partials={
            x[k]: over(j, δ[j] * W[j, k]),
            W[j, k]: δ[j] * x[k],
            b[j]: δ[j],
            t[j]: factor * (lse - z[j]),
        },
        tangent=over(j, δ[j] * dot(z)[j] + factor * (lse - z[j]) * dot(t)[j]),
        products={
            **AFFINE_PRODUCTS,
            t[j]: factor * (over(i, a[i] * dot(z)[i]) - dot(z)[j]),
        },
        inputs={"x": x, "W": W, "b": b, "t": t},
        lengths=HEAD_LENGTHS,
        where=AFFINE
        | TOTAL
        | define_softmax(z)
        | {δ[j]: factor * (T * a[j] - t[j])}
        | AFFINE_TANGENT,
        where_products={
            dot(T): over(j, dot(t)[j]),
            dot(a)[j]: a[j] * (dot(z)[j] - over(i, a[i] * dot(z)[i])),
            dot(δ)[j]: factor * (T * dot(a)[j] + dot(T) * a[j] - dot(t)[j]),
        },
    )


def state_logit_scale() -> Statement:
    return Statement(
        value=(z[j], s * x[j]),
        partials={x[k]: kronecker(j, k) * s, s: x[j]},
        tangent=s * dot(x)[j] + dot(s) * x[j],
        seconds={(x[k], s): kronecker(j, k)},
        inputs={"x": x, "s": s},
        lengths={j: 3, k: 3},
    )


def state_z_loss() -> Statement:
    return Statement(
        value=(Symbol("q"), lse**2),
        partials={z[j]: 2 * lse * a[j]},
        tangent=2 * lse * over(j, a[j] * dot(z)[j]),
        seconds={(z[j], z[k]): 2 * a[j] * a[k] + 2 * lse * a[j] * (kronecker(j, k) - a[k])},
        inputs={"z": z},
        lengths={i: CLASSES, j: CLASSES, k: CLASSES},
        where=define_softmax(z),
    )


def state_entropy() -> Statement:
    logs, mean = IndexedBase("l"), Symbol("m")
    factor = -(1 / log(beta))
    return Statement(
        value=(Symbol("h"), factor * over(j, a[j] * logs[j])),
        partials={z[j]: factor * a[j] * (logs[j] - mean)},
        tangent=factor * over(j, a[j] * (logs[j] - mean) * dot(z)[j]),
        seconds={
            (z[j], z[k]): factor
            * a[j]
            * ((kronecker(j, k) - a[k]) * (logs[j] - mean + 1) - a[k] * (logs[k] - mean))
        },
        inputs={"z": z},
        lengths={i: CLASSES, j: CLASSES, k: CLASSES},
        where=define_softmax(z) | {logs[j]: z[j] - lse, mean: over(j, a[j] * logs[j])},
    )


def state_log_probs() -> Statement:
    factor = 1 / log(beta)
    return Statement(
        value=(Symbol("p"), factor * (z[y] - lse)),
        partials={x[k]: over(j, δ[j] * W[j, k]), W[j, k]: δ[j] * x[k], b[j]: δ[j]},
        tangent=over(j, δ[j] * dot(z)[j]),
        products=AFFINE_PRODUCTS,
        inputs={"x": x, "W": W, "b": b},
        lengths=HEAD_LENGTHS,
        where=AFFINE
        | define_softmax(z)
        | {δ[j]: factor * (kronecker(j, y) - a[j])}
        | AFFINE_TANGENT,
        where_products={
            dot(δ)[j]: -factor * a[j] * (dot(z)[j] - over(i, a[i] * dot(z)[i])),
        },
        constants={y: 1},
    )


def state_scaled_head() -> Statement:
    factor = 1 / log(beta)
    G, r = IndexedBase("G"), IndexedBase("r")
    mean = over(i, a[i] * dot(v)[i])
    coefficient = T / log(beta) + 2 * zeta * lse
    return Statement(
        value=(Symbol("c"), factor * (T * lse - over(j, t[j] * v[j])) + zeta * lse**2),
        partials={
            x[k]: over(j, δ[j] * W[j, k]),
            W[j, k]: δ[j] * x[k],
            b[j]: δ[j],
            t[j]: factor * (lse - v[j]),
            s: over(j, G[j] * r[j] * z[j]),
        },
        tangent=over(j, G[j] * dot(v)[j] + factor * (lse - v[j]) * dot(t)[j]),
        products={
            **AFFINE_PRODUCTS,
            t[j]: factor * (mean - dot(v)[j]),
            s: over(j, dot(G)[j] * r[j] * z[j] + G[j] * (dot(r)[j] * z[j] + r[j] * dot(z)[j])),
        },
        inputs={"x": x, "W": W, "b": b, "t": t, "s": s},
        lengths=HEAD_LENGTHS,
        where=AFFINE
        | {v[j]: cap * tanh(s * z[j] / cap)}
        | TOTAL
        | define_softmax(v)
        | {
            G[j]: coefficient * a[j] - t[j] / log(beta),
            r[j]: 1 - (v[j] / cap) ** 2,
            δ[j]: s * r[j] * G[j],
        }
        | AFFINE_TANGENT
        | {dot(v)[j]: r[j] * (s * dot(z)[j] + dot(s) * z[j])},
        where_products={
            dot(T): over(j, dot(t)[j]),
            dot(a)[j]: a[j] * (dot(v)[j] - mean),
            dot(G)[j]: coefficient * dot(a)[j]
            + (dot(T) / log(beta) + 2 * zeta * mean) * a[j]
            - dot(t)[j] / log(beta),
            dot(r)[j]: -(2 / cap**2) * v[j] * dot(v)[j],
            dot(δ)[j]: dot(s) * r[j] * G[j] + s * dot(r)[j] * G[j] + s * r[j] * dot(G)[j],
        },
    )


def state_split_log_sum_exp() -> Statement:
    part, member = IndexedBase("s"), IndexedBase("u")
    return Statement(
        value=(lse, log(over(i, part[i]))),
        partials={z[j]: a[j]},
        tangent=over(j, a[j] * dot(z)[j]),
        seconds={(z[j], z[k]): a[j] * (kronecker(j, k) - a[k])},
        inputs={"z": z},
        lengths={i: 3, j: CLASSES, k: CLASSES},
        where={
            part[i]: over(j, member[i, j] * exp(z[j])),
            a[j]: exp(z[j]) / over(i, part[i]),
        },
        constants={member: ((1, 1, 0), (0, 0, 0), (0, 0, 1))},  # the sizes 2, 0 and 1
        note=(
            "Rank i has the sum s of its own classes: u is 1 where it has class j, else 0. Every "
            "rank first subtracts the maximum of all logits, which the sum of both restores."
        ),
    )


def state_weighted_cost() -> Statement:
    cost, r, total = Symbol("C"), IndexedBase("r"), Symbol("R")
    return Statement(
        value=(cost, 1 / total * over(i, r[i] * c[i])),
        partials={c[j]: r[j] / total, r[j]: 1 / total * (c[j] - cost)},
        tangent=1 / total * over(i, r[i] * dot(c)[i] + (c[i] - cost) * dot(r)[i]),
        seconds={
            (c[j], r[k]): 1 / total * (kronecker(j, k) - r[j] / total),
            (r[j], r[k]): 1 / total**2 * (2 * cost - c[j] - c[k]),
        },
        inputs={"c": c, "r": r},
        lengths={i: 4, j: 4, k: 4},
        where={total: over(i, r[i])},
    )


with sympy.evaluate(False):  # keeps the order in which terms are written
    AFFINE = {z[j]: over(k, W[j, k] * x[k]) + b[j]}
    TOTAL = {T: over(j, t[j])}
    AFFINE_TANGENT = {
        dot(z)[j]: over(k, W[j, k] * dot(x)[k] + dot(W)[j, k] * x[k]) + dot(b)[j],
    }
    AFFINE_PRODUCTS = {
        x[k]: over(j, dot(δ)[j] * W[j, k] + δ[j] * dot(W)[j, k]),
        W[j, k]: dot(δ)[j] * x[k] + δ[j] * dot(x)[k],
        b[j]: dot(δ)[j],
    }
    STATEMENTS: dict[str, Statement] = {
        "affine map": state_affine(),
        "tanh": state_tanh(),
        "relu": state_relu(),
        "cost of a batch": state_cost(),
        "squared error": state_squared_error(),
        "cross entropy of probabilities": state_categorical_cross_entropy(),
        "sigmoid": state_sigmoid(),
        "softmax": state_softmax(),
        "softmax's Jacobian": state_softmax_jacobian(),
        "affine, sigmoid, squared error": state_sigmoid_squared_error(),
        "feed-forward network": state_feedforward(),
        "softmax, cross entropy": state_cross_entropy(),
        "affine, softmax, cross entropy": state_head(),
        "logit scale": state_logit_scale(),
        "soft cap": state_softcap(),
        "z-loss": state_z_loss(),
        "entropy of softmax": state_entropy(),
        "log-probability of a class": state_log_probs(),
        "scaled and capped head with z-loss": state_scaled_head(),
        "log-sum-exp of split classes": state_split_log_sum_exp(),
        **DIVERGENCE_STATEMENTS,
        "cost of weighted rows": state_weighted_cost(),
    }
