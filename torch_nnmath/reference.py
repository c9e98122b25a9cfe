"""The formulas in NumPy, each in element form (indices and sums) and in matrix form.

Each formula is for one example: vectors are columns (n, 1), weights are (outputs, inputs), losses
are scalars. A rule takes the inputs of a formula and returns its value and its pullback. The
pullback maps g, the cotangent of the value, to a gradient for each input, in that input's shape:

    AFFINE.element.value(x, W, b)           z
    AFFINE.matrix.pullback(g, x, W, b)      (dx, dW, db)

The rules run on float64 arrays and, with another `Elementary`, on object arrays: of SymPy's symbols
for a proof, of mpmath's numbers for more digits. The derivatives are written out as in the
document, but without its slips (docs/slips.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Gradients: TypeAlias = tuple[Any, ...]
# A value and its pullback, which computes vector-Jacobian products.
VJP: TypeAlias = tuple[Any, Callable[[Any], Gradients]]


@dataclass(frozen=True)
class Elementary:
    """Elementary functions that accept a single entry or an array.

    For SymPy they are `np.frompyfunc(sympy.exp, 1, 1)`, and so on with log, Max and tanh.
    """

    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    maximum: Callable[[Any, Any], Any]
    tanh: Callable[[Any], Any]


# The limits 1 / (1 + inf) = 0 and log 0 = -inf are intended, so they need no warning.
NUMPY = Elementary(
    exp=np.errstate(over="ignore")(np.exp),
    log=np.errstate(divide="ignore")(np.log),
    maximum=np.maximum,
    tanh=np.tanh,
)


@dataclass(frozen=True)
class Form:
    """One form of a formula. `fn` and the formula's options are keyword arguments."""

    rule: Callable[..., VJP]

    def value(self, *inputs: Any, **options: Any) -> Any:
        """Returns the formula's value."""
        return self.rule(*inputs, **options)[0]

    def pullback(self, g: Any, *inputs: Any, **options: Any) -> Gradients:
        """Returns the gradient of each input, for the cotangent g of the value."""
        return self.rule(*inputs, **options)[1](g)


@dataclass(frozen=True)
class Forms:
    """A formula in element form and in matrix form."""

    element: Form
    matrix: Form


def column(entries: Iterable[Any]) -> Array:
    """Returns the entries as an array of shape (n, 1)."""
    return np.array([[entry] for entry in entries])


def matrix(rows: Iterable[Iterable[Any]]) -> Array:
    """Returns the rows as an array of shape (m, n)."""
    return np.array([list(row) for row in rows])


def kronecker(i: int, j: int) -> int:
    """Returns δ_ij."""
    return 1 if i == j else 0


def shift(z: Array) -> Any:
    """Returns max z, to subtract before e^z so that it stays finite; 0 for symbols."""
    return 0 if z.dtype == object else z.max()


def central_difference(f: Callable[[Array], Any], x: Array, h: float = 1e-6) -> Array:
    """Returns the Jacobian of f at x by central differences, of shape f(x).shape + x.shape."""
    partials = []
    for index in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[index] = h
        partials.append((np.asarray(f(x + step)) - np.asarray(f(x - step))) / (2 * h))
    return np.stack(partials, axis=-1).reshape(partials[0].shape + x.shape)


def affine_element(x: Array, W: Array, b: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F1: z_j = Σ_k w_jk x_k + b_j.

    F8: dz_i/dx_k = w_ik, dz_i/dw_jk = δ_ij x_k, dz_i/db_j = δ_ij.
    """
    J, K = map(range, W.shape)
    z = column(sum(W[j, k] * x[k, 0] for k in K) + b[j, 0] for j in J)

    def pullback(g: Any) -> Gradients:
        dx = column(sum(g[i, 0] * W[i, k] for i in J) for k in K)
        dW = matrix((sum(g[i, 0] * kronecker(i, j) * x[k, 0] for i in J) for k in K) for j in J)
        db = column(sum(g[i, 0] * kronecker(i, j) for i in J) for j in J)
        return dx, dW, db

    return z, pullback


def affine_matrix(x: Array, W: Array, b: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F1: z = W x + b.  F8: from δ = g, dx = Wᵀ δ, dW = δ xᵀ, db = δ."""
    return W @ x + b, lambda g: (W.T @ g, g @ x.T, g)


def sigmoid_element(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F6: a_j = 1 / (1 + e^-z_j),  da_j/dz_j = a_j (1 - a_j)."""
    J = range(len(z))
    a = [1 / (1 + fn.exp(-z[j, 0])) for j in J]
    return column(a), lambda g: (column(g[j, 0] * a[j] * (1 - a[j]) for j in J),)


def sigmoid_matrix(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F6: a = 1 / (1 + e^-z),  da/dz = diag(a ∘ (1 - a)), so dz = g ∘ a ∘ (1 - a)."""
    a = 1 / (1 + fn.exp(-z))
    return a, lambda g: (g * a * (1 - a),)


def tanh_element(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F2: a_j = tanh z_j,  da_j/dz_j = 1 - a_j²."""
    J = range(len(z))
    a = [fn.tanh(z[j, 0]) for j in J]
    return column(a), lambda g: (column(g[j, 0] * (1 - a[j] ** 2) for j in J),)


def tanh_matrix(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F2: a = tanh z,  dz = g ∘ (1 - a ∘ a)."""
    a = fn.tanh(z)
    return a, lambda g: (g * (1 - a * a),)


def relu_element(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F2: a_j = max(z_j, 0),  da_j/dz_j = 0 where z_j <= 0, else 1 (symbols need a known sign)."""
    J = range(len(z))
    a = column(fn.maximum(z[j, 0], 0) for j in J)
    return a, lambda g: (column(g[j, 0] * (0 if z[j, 0] <= 0 else 1) for j in J),)


def relu_matrix(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F2: a = max(z, 0),  dz = g ∘ [0 where z <= 0, else 1]."""
    return fn.maximum(z, 0), lambda g: (g * np.where(z <= 0, 0, 1),)


def identity(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F2 with f(z) = z: the activation of a linear layer."""
    return z, lambda g: (g,)


def softmax_element(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F7: a_j = e^z_j / Σ_i e^z_i,  da_j/dz_k = a_j (δ_jk - a_k)."""
    J = range(len(z))
    e = [fn.exp(z[j, 0] - shift(z)) for j in J]
    a = [e[j] / sum(e[i] for i in J) for j in J]

    def pullback(g: Any) -> Gradients:
        return (column(sum(g[j, 0] * a[j] * (kronecker(j, k) - a[k]) for j in J) for k in J),)

    return column(a), pullback


def softmax_matrix(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F7: a = e^z / Σ e^z.  F17: da/dz = J = diag(a) - a aᵀ, symmetric, so dz = J g."""
    e = fn.exp(z - shift(z))
    a = e / e.sum()
    return a, lambda g: ((np.diagflat(a) - a @ a.T) @ g,)


def softmax_jacobian_element(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F17: J_ij = da_i/dz_j = a_i (δ_ij - a_j).

    d²a_i/dz_j dz_k = a_i ((δ_ij - a_j) (δ_ik - a_k) - a_j (δ_jk - a_k)).
    """
    N = range(len(z))
    a = softmax_element(z, fn=fn)[0][:, 0]

    def second(i: int, j: int, k: int) -> Any:
        d = kronecker
        return a[i] * ((d(i, j) - a[j]) * (d(i, k) - a[k]) - a[j] * (d(j, k) - a[k]))

    def pullback(g: Any) -> Gradients:
        return (column(sum(g[i, j] * second(i, j, k) for i in N for j in N) for k in N),)

    return matrix((a[i] * (kronecker(i, j) - a[j]) for j in N) for i in N), pullback


def softmax_jacobian_matrix(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F17: J = diag(a) - a aᵀ.

    Its differential is diag(da) - da aᵀ - a daᵀ, da = J dz: so dz = J (diagonal(g) - g a - gᵀ a).
    """
    a = softmax_matrix(z, fn=fn)[0]
    J = np.diagflat(a) - a @ a.T
    return J, lambda g: (J @ (np.diagonal(g)[:, None] - g @ a - g.T @ a),)


def cost_element(c: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F3: C = (1/N) Σ_i c_i,  dC/dc_i = 1/N."""
    N = len(c)
    return sum(c[i, 0] for i in range(N)) / N, lambda g: (column(g / N for _ in range(N)),)


def cost_matrix(c: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F3: C = 1ᵀ c / N,  dC/dc = 1 / N."""
    N, one = len(c), np.ones_like(c)
    return (one.T @ c).item() / N, lambda g: (one * g / N,)


def squared_error_element(a: Array, t: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F4: c = ½ Σ_j (t_j - a_j)²,  dc/da_j = a_j - t_j, dc/dt_j = t_j - a_j."""
    J = range(len(a))

    def pullback(g: Any) -> Gradients:
        da = column(g * (a[j, 0] - t[j, 0]) for j in J)
        dt = column(g * (t[j, 0] - a[j, 0]) for j in J)
        return da, dt

    return sum((t[j, 0] - a[j, 0]) ** 2 for j in J) / 2, pullback


def squared_error_matrix(a: Array, t: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F4: c = ½ (t - a)ᵀ (t - a),  dc/da = a - t, dc/dt = t - a."""
    return ((t - a).T @ (t - a)).item() / 2, lambda g: (g * (a - t), g * (t - a))


def categorical_cross_entropy_element(
    a: Array, t: Array, *, beta: Any = math.e, fn: Elementary = NUMPY
) -> VJP:
    """F5: c = -Σ_j t_j log_β a_j,  dc/da_j = -(1/ln β) t_j / a_j (F16), dc/dt_j = -log_β a_j."""
    J = range(len(a))
    ln = fn.log(beta)

    # Terms with t = 0 are dropped, because 0 log 0 and 0/0 count as 0. No symbol equals 0.
    def pullback(g: Any) -> Gradients:
        da = column(g * (0 if t[j, 0] == 0 else -(t[j, 0] / a[j, 0]) / ln) for j in J)
        dt = column(-g * fn.log(a[j, 0]) / ln for j in J)
        return da, dt

    return -sum(t[j, 0] * fn.log(a[j, 0]) / ln for j in J if t[j, 0] != 0), pullback


def categorical_cross_entropy_matrix(
    a: Array, t: Array, *, beta: Any = math.e, fn: Elementary = NUMPY
) -> VJP:
    """F5: c = -tᵀ log_β a,  dc/da = -(1/ln β) t ⊘ a, dc/dt = -log_β a."""
    ln = fn.log(beta)
    safe_a = np.where(t == 0, 1, a)  # since 0 log 0 and 0/0 count as 0
    c = -(t.T @ fn.log(safe_a)).item() / ln
    return c, lambda g: (-g * (t / safe_a) / ln, -g * fn.log(a) / ln)


def sigmoid_squared_error_element(
    x: Array, W: Array, b: Array, t: Array, *, fn: Elementary = NUMPY
) -> VJP:
    """F9: c = ½ Σ_j (t_j - a_j)², a_j = σ(Σ_k w_jk x_k + b_j).

    δ_j = (a_j - t_j) a_j (1 - a_j):  dc/dw_jk = δ_j x_k, dc/db_j = δ_j, dc/dx_k = Σ_j δ_j w_jk.
    """
    J, K = map(range, W.shape)
    z = [sum(W[j, k] * x[k, 0] for k in K) + b[j, 0] for j in J]
    a = [1 / (1 + fn.exp(-z[j])) for j in J]

    def pullback(g: Any) -> Gradients:
        dz = [g * (a[j] - t[j, 0]) * a[j] * (1 - a[j]) for j in J]
        dx = column(sum(dz[j] * W[j, k] for j in J) for k in K)
        dW = matrix((dz[j] * x[k, 0] for k in K) for j in J)
        return dx, dW, column(dz), column(g * (t[j, 0] - a[j]) for j in J)

    return sum((t[j, 0] - a[j]) ** 2 for j in J) / 2, pullback


def sigmoid_squared_error_matrix(
    x: Array, W: Array, b: Array, t: Array, *, fn: Elementary = NUMPY
) -> VJP:
    """F11: c = ½ (t - a)ᵀ (t - a), a = σ(W x + b).

    δ = (a - t) ∘ a ∘ (1 - a):  dW = δ xᵀ, db = δ, dx = Wᵀ δ, dt = t - a.
    """
    a = 1 / (1 + fn.exp(-(W @ x + b)))

    def pullback(g: Any) -> Gradients:
        dz = g * (a - t) * a * (1 - a)
        return W.T @ dz, dz @ x.T, dz, g * (t - a)

    return ((t - a).T @ (t - a)).item() / 2, pullback


def cross_entropy_element(z: Array, t: Array, *, beta: Any = math.e, fn: Elementary = NUMPY) -> VJP:
    """F13: c = (1/ln β) (T lse - Σ_j t_j z_j), T = Σ_j t_j, lse = ln Σ_i e^z_i.

    dc/dz_j = (1/ln β) (T a_j - t_j), a = softmax(z);  dc/dt_j = (1/ln β) (lse - z_j).
    """
    J = range(len(z))
    ln, T, s = fn.log(beta), sum(t[j, 0] for j in J), shift(z)
    total = sum(fn.exp(z[i, 0] - s) for i in J)
    lse = s + fn.log(total)
    a = [fn.exp(z[j, 0] - s) / total for j in J]

    def pullback(g: Any) -> Gradients:
        dz = column(g * (T * a[j] - t[j, 0]) / ln for j in J)
        dt = column(g * (lse - z[j, 0]) / ln for j in J)
        return dz, dt

    return (T * lse - sum(t[j, 0] * z[j, 0] for j in J)) / ln, pullback


def cross_entropy_matrix(z: Array, t: Array, *, beta: Any = math.e, fn: Elementary = NUMPY) -> VJP:
    """F13: c = (1/ln β) (T lse(z) - tᵀ z),  dz = (1/ln β) (T a - t), dt = (1/ln β) (lse(z) - z)."""
    ln, T, s = fn.log(beta), t.sum(), shift(z)
    e = fn.exp(z - s)
    a, lse = e / e.sum(), s + fn.log(e.sum())
    c = (T * lse - (t.T @ z).item()) / ln
    return c, lambda g: (g * (T * a - t) / ln, g * (lse - z) / ln)


def linear_cross_entropy_element(
    x: Array, W: Array, b: Array, t: Array, *, beta: Any = math.e, fn: Elementary = NUMPY
) -> VJP:
    """F14: F13 of z_j = Σ_k w_jk x_k + b_j;  dc/dw_jk = (1/ln β) (T a_j - t_j) x_k."""
    J, K = map(range, W.shape)
    z = column(sum(W[j, k] * x[k, 0] for k in K) + b[j, 0] for j in J)
    c, cross_entropy_pullback = cross_entropy_element(z, t, beta=beta, fn=fn)

    def pullback(g: Any) -> Gradients:
        dz, dt = cross_entropy_pullback(g)
        dx = column(sum(dz[j, 0] * W[j, k] for j in J) for k in K)
        dW = matrix((dz[j, 0] * x[k, 0] for k in K) for j in J)
        return dx, dW, dz, dt

    return c, pullback


def linear_cross_entropy_matrix(
    x: Array, W: Array, b: Array, t: Array, *, beta: Any = math.e, fn: Elementary = NUMPY
) -> VJP:
    """F15: F13 of z = W x + b;  δ = (1/ln β) (T a - t): dx = Wᵀ δ, dW = δ xᵀ, db = δ."""
    c, cross_entropy_pullback = cross_entropy_matrix(W @ x + b, t, beta=beta, fn=fn)

    def pullback(g: Any) -> Gradients:
        dz, dt = cross_entropy_pullback(g)
        return W.T @ dz, dz @ x.T, dz, dt

    return c, pullback


def logit_scale_element(x: Array, s: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F18: z_j = s x_j,  dz_i/dx_j = δ_ij s, dz_j/ds = x_j."""
    J, factor = range(len(x)), s[0, 0]

    def pullback(g: Any) -> Gradients:
        dx = column(sum(g[i, 0] * kronecker(i, j) * factor for i in J) for j in J)
        return dx, column([sum(g[j, 0] * x[j, 0] for j in J)])

    return column(factor * x[j, 0] for j in J), pullback


def logit_scale_matrix(x: Array, s: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F18: z = s x,  dx = s g, ds = xᵀ g."""
    return s[0, 0] * x, lambda g: (s[0, 0] * g, x.T @ g)


def softcap_element(z: Array, *, cap: Any, fn: Elementary = NUMPY) -> VJP:
    """F19: v_j = κ tanh(z_j/κ),  dv_i/dz_j = δ_ij (1 - (v_j/κ)²)."""
    J = range(len(z))
    v = [cap * fn.tanh(z[j, 0] / cap) for j in J]
    return column(v), lambda g: (column(g[j, 0] * (1 - (v[j] / cap) ** 2) for j in J),)


def softcap_matrix(z: Array, *, cap: Any, fn: Elementary = NUMPY) -> VJP:
    """F19: v = κ tanh(z/κ),  dz = g ∘ (1 - (v/κ)²)."""
    v = cap * fn.tanh(z / cap)
    return v, lambda g: (g * (1 - (v / cap) ** 2),)


def log_softmax_element(z: Array, fn: Elementary) -> tuple[list[Any], list[Any], Any]:
    """Returns a_j = e^z_j / Σ_i e^z_i, l_j = ln a_j = z_j - lse, and lse = ln Σ_i e^z_i."""
    J, s = range(len(z)), shift(z)
    total = sum(fn.exp(z[i, 0] - s) for i in J)
    lse = s + fn.log(total)
    return [fn.exp(z[j, 0] - s) / total for j in J], [z[j, 0] - lse for j in J], lse


def log_softmax_matrix(z: Array, fn: Elementary) -> tuple[Array, Array, Any]:
    """Returns a = e^z / (1ᵀ e^z), l = z - lse, and lse = ln 1ᵀ e^z."""
    s = shift(z)
    e = fn.exp(z - s)
    lse = s + fn.log(e.sum())
    return e / e.sum(), z - lse, lse


def z_loss_element(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F20: q = lse²,  dq/dz_j = 2 lse a_j."""
    a, _, lse = log_softmax_element(z, fn)
    return lse**2, lambda g: (column(g * 2 * lse * a_j for a_j in a),)


def z_loss_matrix(z: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F20: q = lse(z)²,  dz = 2 lse(z) a."""
    a, _, lse = log_softmax_matrix(z, fn)
    return lse**2, lambda g: (g * 2 * lse * a,)


def entropy_element(z: Array, *, beta: Any = math.e, fn: Elementary = NUMPY) -> VJP:
    """F21: h = -(1/ln β) Σ_j a_j l_j,  dh/dz_j = -(1/ln β) a_j (l_j - Σ_i a_i l_i)."""
    a, l, _ = log_softmax_element(z, fn)
    J, ln = range(len(z)), fn.log(beta)
    al = sum(a[j] * l[j] for j in J)
    return -al / ln, lambda g: (column(-g * a[j] * (l[j] - al) / ln for j in J),)


def entropy_matrix(z: Array, *, beta: Any = math.e, fn: Elementary = NUMPY) -> VJP:
    """F21: h = -(1/ln β) aᵀ l,  dz = -(1/ln β) a ∘ (l - aᵀ l)."""
    a, l, _ = log_softmax_matrix(z, fn)
    ln, al = fn.log(beta), (a.T @ l).item()
    return -al / ln, lambda g: (-g * a * (l - al) / ln,)


def linear_log_probs_element(
    x: Array, W: Array, b: Array, *, y: int, beta: Any = math.e, fn: Elementary = NUMPY
) -> VJP:
    """F22: log_β a_y = (1/ln β)(z_y - lse), z_j = Σ_k w_jk x_k + b_j.

    d log_β a_y/dz_j = (1/ln β)(δ_jy - a_j).
    """
    z, affine_pullback = affine_element(x, W, b, fn=fn)
    a, l, _ = log_softmax_element(z, fn)
    ln, J = fn.log(beta), range(len(z))
    return l[y] / ln, lambda g: affine_pullback(
        column(g * (kronecker(j, y) - a[j]) / ln for j in J)
    )


def linear_log_probs_matrix(
    x: Array, W: Array, b: Array, *, y: int, beta: Any = math.e, fn: Elementary = NUMPY
) -> VJP:
    """F22: log_β a_y = (1/ln β) e_yᵀ l, z = W x + b;  δ = (1/ln β)(e_y - a)."""
    z, affine_pullback = affine_matrix(x, W, b, fn=fn)
    a, l, _ = log_softmax_matrix(z, fn)
    ln, e_y = fn.log(beta), column(kronecker(j, y) for j in range(len(z)))
    return (e_y.T @ l).item() / ln, lambda g: affine_pullback(g * (e_y - a) / ln)


def _make_scaled_head(form: str) -> Callable[..., VJP]:
    """Returns F23 in one of the forms: the chain of F1, F18, F19 and F13 + ζ F20."""

    def rule(
        x: Array,
        W: Array,
        b: Array,
        t: Array,
        s: Array,
        *,
        cap: Any,
        zeta: Any,
        beta: Any = math.e,
        fn: Elementary = NUMPY,
    ) -> VJP:
        affine, scale, softcap, cross_entropy, z_loss = (
            getattr(forms, form).rule
            for forms in (AFFINE, LOGIT_SCALE, SOFTCAP, CROSS_ENTROPY, Z_LOSS)
        )
        z, affine_pullback = affine(x, W, b, fn=fn)
        scaled, scale_pullback = scale(z, s, fn=fn)
        v, softcap_pullback = softcap(scaled, cap=cap, fn=fn)
        c, cross_entropy_pullback = cross_entropy(v, t, beta=beta, fn=fn)
        q, z_loss_pullback = z_loss(v, fn=fn)

        def pullback(g: Any) -> Gradients:
            dv, dt = cross_entropy_pullback(g)
            (dv_z_loss,) = z_loss_pullback(g * zeta)
            (dscaled,) = softcap_pullback(dv + dv_z_loss)
            dz, ds = scale_pullback(dscaled)
            return *affine_pullback(dz), dt, ds

        return c + zeta * q, pullback

    return rule


def layer_activations(count: int, activation: str, output_activation: str) -> list[Forms]:
    """Returns each layer's activation. Softmax may only be the last: F12 needs elementwise f'."""
    return [HIDDEN[activation]] * (count - 1) + [OUTPUT[output_activation]]


def feedforward_element(
    x: Array,
    weights: Sequence[Array],
    biases: Sequence[Array],
    activation: str = "sigmoid",
    output_activation: str = "sigmoid",
    *,
    fn: Elementary = NUMPY,
) -> VJP:
    """F10: layer by layer a_k = f(z_k), z_k = Σ_q w_kq a_q^{l-1} + b_k.

    δ_k^l = (Σ_j δ_j^{l+1} w_jk^{l+1}) f'(z_k^l):  dc/dw_kq^l = δ_k^l a_q^{l-1}, dc/db_k^l = δ_k^l.
    """
    fs = layer_activations(len(weights), activation, output_activation)
    a, pullbacks = [x], []
    for W, b, f in zip(weights, biases, fs, strict=True):
        K, Q = map(range, W.shape)
        z = column(sum(W[k, q] * a[-1][q, 0] for q in Q) + b[k, 0] for k in K)
        value, pullback_f = f.element.rule(z, fn=fn)
        a.append(value)
        pullbacks.append(pullback_f)

    def pullback(g: Any) -> Gradients:
        da, dW, db = g, [], []
        for W, x, pullback_f in zip(reversed(weights), a[-2::-1], reversed(pullbacks), strict=True):
            K, Q = map(range, W.shape)
            (dz,) = pullback_f(da)
            dW.append(matrix((dz[k, 0] * x[q, 0] for q in Q) for k in K))
            db.append(dz)
            da = column(sum(dz[k, 0] * W[k, q] for k in K) for q in Q)
        return da, dW[::-1], db[::-1]

    return a[-1], pullback


def feedforward_matrix(
    x: Array,
    weights: Sequence[Array],
    biases: Sequence[Array],
    activation: str = "sigmoid",
    output_activation: str = "sigmoid",
    *,
    fn: Elementary = NUMPY,
) -> VJP:
    """F12: layer by layer a = f(z), z = W a^{l-1} + b.

    δ^L = J g, δ^l = ((W^{l+1})ᵀ δ^{l+1}) ∘ f'(z^l):  dW^l = δ^l (a^{l-1})ᵀ, db^l = δ^l.
    """
    fs = layer_activations(len(weights), activation, output_activation)
    a, pullbacks = [x], []
    for W, b, f in zip(weights, biases, fs, strict=True):
        value, pullback_f = f.matrix.rule(W @ a[-1] + b, fn=fn)
        a.append(value)
        pullbacks.append(pullback_f)

    def pullback(g: Any) -> Gradients:
        da, dW, db = g, [], []
        for W, x, pullback_f in zip(reversed(weights), a[-2::-1], reversed(pullbacks), strict=True):
            (dz,) = pullback_f(da)
            dW.append(dz @ x.T)
            db.append(dz)
            da = W.T @ dz
        return da, dW[::-1], db[::-1]

    return a[-1], pullback


AFFINE = Forms(Form(affine_element), Form(affine_matrix))
SIGMOID = Forms(Form(sigmoid_element), Form(sigmoid_matrix))
TANH = Forms(Form(tanh_element), Form(tanh_matrix))
RELU = Forms(Form(relu_element), Form(relu_matrix))
IDENTITY = Forms(Form(identity), Form(identity))
SOFTMAX = Forms(Form(softmax_element), Form(softmax_matrix))
SOFTMAX_JACOBIAN = Forms(Form(softmax_jacobian_element), Form(softmax_jacobian_matrix))
COST = Forms(Form(cost_element), Form(cost_matrix))
SQUARED_ERROR = Forms(Form(squared_error_element), Form(squared_error_matrix))
CATEGORICAL_CROSS_ENTROPY = Forms(
    Form(categorical_cross_entropy_element), Form(categorical_cross_entropy_matrix)
)
SIGMOID_SQUARED_ERROR = Forms(
    Form(sigmoid_squared_error_element), Form(sigmoid_squared_error_matrix)
)
CROSS_ENTROPY = Forms(Form(cross_entropy_element), Form(cross_entropy_matrix))
LINEAR_CROSS_ENTROPY = Forms(Form(linear_cross_entropy_element), Form(linear_cross_entropy_matrix))
LOGIT_SCALE = Forms(Form(logit_scale_element), Form(logit_scale_matrix))
SOFTCAP = Forms(Form(softcap_element), Form(softcap_matrix))
Z_LOSS = Forms(Form(z_loss_element), Form(z_loss_matrix))
ENTROPY = Forms(Form(entropy_element), Form(entropy_matrix))
LINEAR_LOG_PROBS = Forms(Form(linear_log_probs_element), Form(linear_log_probs_matrix))
SCALED_HEAD = Forms(Form(_make_scaled_head("element")), Form(_make_scaled_head("matrix")))
FEEDFORWARD = Forms(Form(feedforward_element), Form(feedforward_matrix))

HIDDEN = {"sigmoid": SIGMOID, "tanh": TANH, "relu": RELU, "identity": IDENTITY}
OUTPUT = HIDDEN | {"softmax": SOFTMAX}
