"""The document's sections in its order and notation, as items on the network's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from formula import Formula, Steps, combine
from items import Array, Equation, Item, Slip
from network import Network, describe_product, take_diagonal, take_own_weights

from torch_nnmath import reference as ref
from torch_nnmath.reference import central_difference


@dataclass(frozen=True)
class Section:
    number: str
    title: str
    items: Callable[[Network], Iterator[Item]]


SECTIONS: list[Section] = []


def section(number: str, title: str) -> Callable[[Any], Any]:
    def register(items: Callable[[Network], Iterator[Item]]) -> Callable[[Network], Iterator[Item]]:
        SECTIONS.append(Section(number, title, items))
        return items

    return register


@section("1", "Notation")
def notation(n: Network) -> Iterator[Item]:
    yield "2 inputs, 3 hidden nodes, 2 outputs. The input is a^{L−2} = x. W^l has one row for each"
    yield "node of layer l:"
    yield Equation("x =", n.x, "  W^{L−1} =", n.W1, "  b^{L−1} =", n.b1)
    yield Equation("t =", n.t, "  W^L =", n.W2, "  b^L =", n.b2)
    yield f"The logarithm's base, the document's b, is written β, as b is the bias: β = {n.beta:g}."
    text = "z_k^{L−1} = Σ_q w_kq^{L−1} a_q^{L−2} + b_k^{L−1}"
    steps = "{W1[0][0]}·{x[0]} + {W1[0][1]}·{x[1]} + {b1[0]}"
    yield n.affine.value("F1", text, n.x, n.W1, n.b1, steps=steps)
    yield Equation("z^{L−1}", "=", n.W1, "·", n.x, "+", n.b1, "=", n.z1)
    text = "a_k^{L−1} = f(z_k^{L−1}), f = σ: 1 / (1 + e^−z)"
    yield n.sigmoid.value("F2, F6", text, n.z1, steps="1 / (1 + e^−{z1[0]})")
    steps = "(e^{z1[0]} − e^−{z1[0]}) / (e^{z1[0]} + e^−{z1[0]})"
    yield n.tanh.value("F2", "tanh(z_k) = (e^z_k − e^−z_k) / (e^z_k + e^−z_k)", n.z1, steps=steps)
    yield n.tanh.derivative("F2", "tanh'(z_k) = 1 − tanh²(z_k)", n.z1, part=take_diagonal)
    yield n.relu.value("F2", "relu(z_k) = max(z_k, 0)", n.z1, steps="max({z1[0]}, 0)")
    yield n.relu.derivative("F2", "relu'(z_k) = 0 where z_k ≤ 0, else 1", n.z1, part=take_diagonal)
    steps = "{W2[0][0]}·{a1[0]} + {W2[0][1]}·{a1[1]} + {W2[0][2]}·{a1[2]} + {b2[0]}"
    text = "z_j^L = Σ_k w_jk^L a_k^{L−1} + b_j^L"
    yield n.affine.value("F1", text, *n.head_inputs[:3], steps=steps)
    text = "a_j^L = f(z_j^L), f = σ in 5.1 (softmax, a function of all of z^L: see 3.2)"
    yield n.sigmoid.value("F2, F6", text, n.z2, steps="1 / (1 + e^−{z2[0]})")
    yield Slip(
        "E12",
        "z_j^L",
        "z^L = a^{L−1} W^L + B^L; sums from 0 to n with n nodes; W square",
        "z^L = W^L a^{L−1} + b^L; each index runs over the nodes of one layer",
        (n.a_square.T @ n.W_square).T,
        n.W_square @ n.a_square,
        "a sum from 0 to 3 has 4 terms, but there are 3 nodes. With only the first two hidden "
        "nodes W is square: the shapes fit, but a W and W a differ, as shown (without b)",
        shape_error=describe_product(n.a1.T, n.W2),
    )


@section("2", "Loss/Cost Function")
def loss_and_cost(n: Network) -> Iterator[Item]:
    yield "c is the loss of one example, C the mean over a batch. This batch has two: the example"
    yield "above, and x' = (-1, 0.5), t' = (0, 1) with output a' (squared errors, see 2.1):"
    yield Equation("a =", n.a2, "  a' =", n.a2_)
    batch = n.a2, n.a2_
    yield n.mean.value("F3", "C = (1/N) Σ_i c_i", *batch, steps="({c} + {c_}) / 2")
    text = "dC/da_j^L = (1/N) dc/da_j^L: each example's gradient is divided by N"
    yield n.mean.derivative("F3", text, *batch, steps="({a2[0]} − {t[0]}) / 2")
    text = "dC/da'_j^L = (1/N) dc'/da'_j^L"
    yield n.mean.derivative("F3", text, *batch, wrt=1, steps="({a2_[0]} − {t_[0]}) / 2")


@section("2.1", "Squared error")
def squared_error(n: Network) -> Iterator[Item]:
    a, t, loss = n.a2, n.t, n.squared_error
    steps = "(({t[0]} − {a2[0]})² + ({t[1]} − {a2[1]})²) / 2"
    yield loss.value("F4", "c = ½ Σ_j (t_j − a_j^L)²", a, t, steps=steps)
    c, printed, truth = loss.forms.matrix.value(a, t), t - a, loss.differentiate(a, t)
    yield Slip(
        "E2",
        "c",
        "c = ½ ((t − a^L) ∘ (t − a^L))",
        "c = ½ (t − a^L)ᵀ · (t − a^L)",
        (t - a) * (t - a) / 2,
        np.asarray(c),
        "as printed c is a vector, whose derivative with respect to a^L is a matrix, {}",
        (-np.diagflat(t - a),),
    )
    steps = {i: f"{{a2[{i}]}} − {{t[{i}]}}" for i in (0, 1)}
    yield loss.derivative("F4", "dc/da_j^L = a_j^L − t_j", a, t, steps=steps)
    yield Slip(
        "E1",
        "dc/da_j^L",
        "dc/da_j^L = t_j − a_j^L",
        "dc/da_j^L = a_j^L − t_j",
        printed,
        truth,
        "gradient descent increases c: a step of 0.1 on a^L takes c from {} to {}; with the "
        "correct sign it goes to {}",
        (c, *(loss.forms.matrix.value(a - 0.1 * d, t) for d in (printed, truth))),
    )
    a, t = n.a1, ref.column([1.0, 0.5, 0.0])
    after = {}
    for scale in (2 / 3, 1):
        v = a
        for _ in range(10):
            v = v - 2.5 * scale * loss.forms.matrix.pullback(1.0, v, t)[0]
        after[scale] = np.mean((t - v) ** 2)
    yield Slip(
        "E15",
        "dc/da_k",
        'leaving out 1/n "doesn\'t meaningfully affect the gradient descent"',
        "the mean squared error is 2/n times F4, so steps with F4 are n/2 times as long",
        loss.forms.matrix.pullback(1.0, a, t)[0],
        central_difference(lambda v: np.mean((t - v) ** 2), a),
        "n = 2 hides it, so take the 3 hidden nodes as outputs, with t = (1, 0.5, 0): 10 steps on "
        "a with learning rate 2.5 take (1/n) Σ (t − a)² from {} to {}, with F4 to {}",
        (np.mean((t - a) ** 2), after[2 / 3], after[1]),
    )


@section("2.2", "Cross entropy")
def cross_entropy(n: Network) -> Iterator[Item]:
    a, t, loss = n.p, n.t, n.cross_entropy_of_a
    yield "In this section a^L = softmax(z^L), see 3.2:"
    yield Equation("a^L =", a, "  t =", t)
    steps = "−({t[0]}·ln({p[0]}) + {t[1]}·ln({p[1]})) / ln({beta})"
    yield loss.value("F5", "c = −Σ_j t_j log_β(a_j^L)", a, t, steps=steps)
    text = "dc/da_j^L = −(1/ln β) t_j / a_j^L"
    yield loss.derivative("F5", text, a, t, steps="−{t[0]} / {p[0]} / ln({beta})")
    half = n.make_cross_entropy(0.5)
    wrong, right = half.differentiate(a, t), loss.differentiate(a, t)
    yield Slip(
        "E16",
        "dc/da_j^L",
        "log_b with any base b",
        "β > 1 (and a_j^L > 0)",
        wrong,
        right,
        "for β = ½ the derivative exists, but c is {} and decreases as a^L gets worse: a step of "
        "0.1 takes a_0^L from {} to {}; with β = 2 it goes to {}",
        (half.forms.matrix.value(a, t), a[0], (a - 0.1 * wrong)[0], (a - 0.1 * right)[0]),
    )


@section("3", "Activation Function")
def activation(n: Network) -> Iterator[Item]:
    yield "Sigmoid: a_j depends on z_j only, so the Jacobian is diagonal and a vector can represent"
    yield "it. Softmax: each a_j depends on all of z. Both are evaluated at"
    yield Equation("z^L =", n.z2)


@section("3.1", "Sigmoid")
def sigmoid(n: Network) -> Iterator[Item]:
    steps: Steps = {i: f"1 / (1 + e^−{{z2[{i}]}})" for i in (0, 1)}
    yield n.sigmoid.value("F6", "a_j^L = σ(z_j^L) = 1 / (1 + e^−z_j^L)", n.z2, steps=steps)
    steps = {3 * i: f"{{a2[{i}]}}·(1 − {{a2[{i}]}})" for i in (0, 1)}
    text = "da_j^L/dz_k^L = δ_jk a_j^L (1 − a_j^L)"
    yield n.sigmoid.derivative("F6", text, n.z2, steps=steps)
    yield make_slip_e14(n)


def make_slip_e14(n: Network) -> Slip:
    printed, truth = n.a2 * (1 - n.a2), np.squeeze(n.sigmoid.differentiate(n.z2))
    da = n.squared_error.differentiate(n.a2, n.t)
    return Slip(
        "E14",
        "da_j^L/dz_k^L",
        "da^L/dz^L = a^L ∘ (1 − a^L)",
        "da^L/dz^L = diag(a^L ∘ (1 − a^L)); as a vector it would need ∘, not ·",
        printed,
        truth,
        "used like softmax's matrix, (dc/da^L)ᵀ · da^L/dz^L gives the scalar {} instead of "
        "dc/dz^L = {}",
        (da.T @ printed, truth.T @ da),
    )


@section("3.2", "Softmax")
def softmax(n: Network) -> Iterator[Item]:
    steps: Steps = {i: f"e^{{z2[{i}]}} / (e^{{z2[0]}} + e^{{z2[1]}})" for i in (0, 1)}
    yield n.softmax.value("F7", "a_j^L = e^z_j^L / Σ_i e^z_i^L", n.z2, steps=steps)
    steps = {0: "{p[0]}·(1 − {p[0]})", 1: "{p[0]}·(0 − {p[1]})", 3: "{p[1]}·(1 − {p[1]})"}
    text = "da_j^L/dz_k^L = a_j^L (δ_jk − a_k^L)"
    yield n.softmax.derivative("F7", text, n.z2, steps=steps)
    literal, truth = np.diagflat(n.p * (1 - n.p)), np.squeeze(n.softmax.differentiate(n.z2))
    da = n.cross_entropy_of_a.differentiate(n.p, n.t)
    yield Slip(
        "E17",
        "da_j^L/dz_k^L",
        "a_j = S(z_j), a function of z_j only (in B also f(z_j) / g(z_j))",
        "a_j = S(z)_j: each a_j depends on all of z",
        literal,
        truth,
        "taken literally, da_0^L/dz_1^L is 0, and dc/dz^L is {} instead of {}",
        (literal.T @ da, truth.T @ da),
    )


@section("4", "Matrix weights")
def matrix_weights(n: Network) -> Iterator[Item]:
    inputs = a, W, b = n.head_inputs[:3]
    steps = "{W2[1][0]}·{a1[0]} + {W2[1][1]}·{a1[1]} + {W2[1][2]}·{a1[2]} + {b2[1]}"
    text = "z_j^L = Σ_k w_jk^L a_k^{L−1} + b_j^L"
    yield n.affine.value("F1", text, *inputs, steps={1: steps})
    yield Equation("z^L", "=", W, "·", a, "+", b, "=", n.z2)
    dW = np.squeeze(n.affine.differentiate(*inputs, wrt=1))
    yield Slip(
        "E3",
        "z_j^L",
        "z_j^L = a_k^{L−1} w_jk^L + b_j^L",
        "z_j^L = Σ_k w_jk^L a_k^{L−1} + b_j^L",
        a[0] * W[:, :1] + b,
        n.z2,
        "shown for k = 0, where z_j depends on no other weights: dz_0^L/dw_01^L is 0 instead of "
        "{}, and 4 of 6 weights are never updated",
        (dW[0, 0, 1],),
    )
    text = "dz_i^L/dw_jk^L = δ_ij a_k^{L−1}"
    steps = {0: "1·{a1[0]}", 3: "0·{a1[0]}"}
    yield n.affine.derivative("F8", text, *inputs, wrt=1, steps=steps)
    yield n.affine.derivative("F8", "dz_i^L/db_j^L = δ_ij", *inputs, wrt=2)
    printed = np.broadcast_to(a[:, 0], dW.shape)
    delta = n.sigmoid_squared_error.differentiate(n.z2, n.t)[:, 0]
    yield Slip(
        "E4",
        "dz_i^L/dw_jk^L",
        "dz^L/dW^L = a^{L−1}, dz^L/db^L = 1",
        "dz_i^L/dw_jk^L = δ_ij a_k^{L−1}, dz^L/db^L = I",
        printed,
        dW,
        "with 5.1's dc/dz^L, Σ_i dc/dz_i^L dz_i^L/dw_jk^L has equal rows: dc/dW^L is {} instead "
        "of {}",
        tuple(np.einsum("i,ijk->jk", delta, d) for d in (printed, dW)),
        f"shape {a.shape} instead of {dW.shape}",
    )
    yield n.affine.derivative("F8", "dz_j^L/da_k^{L−1} = w_jk^L", *inputs)


@section("5", "Backpropagation")
def backpropagation(n: Network) -> Iterator[Item]:
    yield "From the loss back to the input, with δ^L = dc/dz^L and δ^{L−1} = dc/dz^{L−1}."


@section("5.1", "Sigmoid and squared error")
def sigmoid_and_squared_error(n: Network) -> Iterator[Item]:
    yield Equation("a^{L−2} =", n.x, "  a^{L−1} =", n.a1, "  a^L =", n.a2, "  t =", n.t)


@section("5.1.1", "Element form")
def sigmoid_element_form(n: Network) -> Iterator[Item]:
    a, t = n.a2, n.t
    yield "Layer L: dc/dw_jk^L = dc/da_j^L · da_j^L/dz_j^L · dz_j^L/dw_jk^L, factor by factor"
    yield n.squared_error.derivative("F4", "dc/da_j^L = a_j^L − t_j", a, t)
    text = "da_j^L/dz_j^L = a_j^L (1 − a_j^L)"
    yield n.sigmoid.derivative("F6", text, n.z2, part=take_diagonal)
    text = "dc/dz_j^L = (a_j^L − t_j) (1 − a_j^L) a_j^L = δ_j^L"
    delta = "({{a2[{0}]}} − {{t[{0}]}})·(1 − {{a2[{0}]}})·{{a2[{0}]}}".format
    steps: Steps = {i: delta(i) for i in (0, 1)}
    yield n.sigmoid_squared_error.derivative("F9, F11", text, n.z2, t, steps=steps)
    text = "dz_j^L/dw_jk^L = a_k^{L−1}"
    yield n.affine.derivative("F8", text, *n.head_inputs[:3], wrt=1, part=take_own_weights)
    yield n.layer_L.value(
        "F9, F11", "c = ½ Σ_j (t_j − σ(Σ_k w_jk^L a_k^{L−1} + b_j^L))²", *n.head_inputs
    )
    text = "dc/dw_jk^L = (a_j^L − t_j) (1 − a_j^L) a_j^L a_k^{L−1}"
    steps = delta(0) + "·{a1[0]}"
    yield n.layer_L.derivative("F9, F11", text, *n.head_inputs, wrt=1, steps=steps)
    yield n.layer_L.derivative("F9, F11", "dc/db_j^L = dc/dz_j^L · 1", *n.head_inputs, wrt=2)
    printed, truth = (
        ((t - a) * (1 - a) * a) @ n.a1.T,
        n.layer_L.differentiate(*n.head_inputs, wrt=1),
    )
    losses = (
        n.layer_L.forms.matrix.value(n.a1, n.W2 - d, n.b2, t) for d in (0 * truth, printed, truth)
    )
    yield Slip(
        "E1",
        "dc/dw_jk^L",
        "dc/dw_jk^L = (t_j − a_j^L) (1 − a_j^L) a_j^L a_k^{L−1}",
        "dc/dw_jk^L = (a_j^L − t_j) (1 − a_j^L) a_j^L a_k^{L−1}",
        printed,
        truth,
        "5.1 inherits the sign: a step of 1 on W^L takes c from {} to {}; with the correct sign it "
        "goes to {}",
        tuple(losses),
    )

    net, sum_j = n.net_squared_error, "{d2[0]}·{W2[0][0]} + {d2[1]}·{W2[1][0]}"
    yield "Layer L − 1: dc/dw_kq^{L−1} ="
    yield "dc/da_k^{L−1} · da_k^{L−1}/dz_k^{L−1} · dz_k^{L−1}/dw_kq^{L−1}, factor by factor"
    yield n.affine.derivative("F8", "dz_j^L/da_k^{L−1} = w_jk^L", *n.head_inputs[:3])
    text = "dc/da_k^{L−1} = Σ_j dc/dz_j^L w_jk^L"
    yield n.layer_L.derivative("F10, F12", text, *n.head_inputs, steps=sum_j)
    text = "da_k^{L−1}/dz_k^{L−1} = a_k^{L−1} (1 − a_k^{L−1})"
    yield n.sigmoid.derivative("F6", text, n.z1, part=take_diagonal, steps="{a1[0]}·(1 − {a1[0]})")
    text = "dc/db_k^{L−1} = dc/dz_k^{L−1} = dc/da_k^{L−1} · a_k^{L−1} (1 − a_k^{L−1})"
    steps = "{da1[0]}·{a1[0]}·(1 − {a1[0]})"
    yield net.derivative("F10, F12", text, *n.network_inputs, wrt=2, steps=steps)
    text = "dz_k^{L−1}/dw_kq^{L−1} = a_q^{L−2}"
    yield n.affine.derivative("F8", text, *n.network_inputs[:3], wrt=1, part=take_own_weights)
    text = "dc/dw_kq^{L−1} = (Σ_j dc/dz_j^L w_jk^L) a_k^{L−1} (1 − a_k^{L−1}) a_q^{L−2}"
    steps = f"({sum_j})·{{a1[0]}}·(1 − {{a1[0]}})·{{x[0]}}"
    yield net.derivative("F10, F12", text, *n.network_inputs, wrt=1, steps=steps)
    printed, truth = (
        n.compute_gradients("sigmoid")[2] @ n.a1.T,
        net.differentiate(*n.network_inputs, wrt=1),
    )
    yield Slip(
        "E13",
        "dc/dw_kq^{L−1}",
        "dz_k^{L−1}/dw_kq^{L−1} = a_q^{L−1}",
        "dz_k^{L−1}/dw_kq^{L−1} = a_q^{L−2}, the input of layer L − 1",
        printed[:, :2],
        truth,
        "the first two columns are shown, with E1 corrected",
        shape_error=f"shape {printed.shape} instead of {truth.shape}",
    )


@section("5.1.2", "Matrix form")
def sigmoid_matrix_form(n: Network) -> Iterator[Item]:
    a, W, slope = n.a2, n.W2, n.a1 * (1 - n.a1)
    _, dW1, delta1, dW2, delta = n.compute_gradients("sigmoid")
    yield "Layer L: δ^L = (a^L − t) ∘ (a^L ∘ (1 − a^L))"
    yield Equation("δ^L", "=", a - n.t, "∘", a * (1 - a), "=", delta)
    text = "dc/dW^L = δ^L · (a^{L−1})ᵀ"
    yield n.layer_L.derivative("F11", text, *n.head_inputs, wrt=1, name="dc/dw_jk^L")
    yield Equation("dc/dW^L", "=", delta, "·", n.a1.T, "=", dW2)
    yield make_slip_e14(n)
    yield "Layer L − 1: δ^{L−1} = ((W^L)ᵀ · δ^L) ∘ (a^{L−1} ∘ (1 − a^{L−1}))"
    yield Equation("δ^{L−1}", "=", W.T, "·", delta, "∘", slope, "=", delta1)
    text, net = "dc/dW^{L−1} = δ^{L−1} · (a^{L−2})ᵀ", n.net_squared_error
    yield net.derivative("F12", text, *n.network_inputs, wrt=1, name="dc/dw_kq^{L−1}")
    yield Equation("dc/dW^{L−1}", "=", delta1, "·", n.x.T, "=", dW1)
    broadcast = ((delta.T @ W) * slope).shape
    yield Slip(
        "E5",
        "dc/da_k^{L−1}",
        "dc/dW^{L−1} = ((dc/dz^L · W^L) ∘ f') · a^{L−2}",
        "dc/dW^{L−1} = (((W^L)ᵀ · δ^L) ∘ f') · (a^{L−2})ᵀ",
        n.W_square @ delta,
        central_difference(lambda a: (delta.T @ n.W_square @ a).item(), n.a_square),
        f"for W^L · δ^L, {describe_product(W, delta)} either. With only the first two hidden nodes "
        f"it fits and is wrong, as shown. A row ∘ a column broadcasts silently to {broadcast}",
        shape_error=describe_product(delta, W),
    )
    yield "The same step leads to each earlier layer, and back to the input:"
    text = "dc/da^{L−2} = (W^{L−1})ᵀ · δ^{L−1}"
    yield net.derivative("F12", text, *n.network_inputs, name="dc/da_q^{L−2}")


@section("5.2", "Softmax and cross entropy")
def softmax_and_cross_entropy(n: Network) -> Iterator[Item]:
    yield Equation("a^{L−2} =", n.x, "  a^{L−1} =", n.a1, "  a^L =", n.p, "  t =", n.t)
    yield f"T = Σ_j t_j = {n.t.sum():g}; the document assumes T = 1. β = {n.beta:g}."


@section("5.2.1", "Element form")
def softmax_element_form(n: Network) -> Iterator[Item]:
    z, a, t, chained = n.z2, n.p, n.t, n.softmax_cross_entropy
    yield n.cross_entropy_of_a.derivative("F5", "dc/da_i^L = −(1/ln β) t_i / a_i^L", a, t)
    yield n.softmax.derivative("F7", "da_i^L/dz_j^L = a_i^L (δ_ij − a_j^L)", z)
    text = "dc/dz_j^L = Σ_i dc/da_i^L da_i^L/dz_j^L"
    steps: Steps = "{dp[0]}·{J[0][0]} + {dp[1]}·{J[1][0]}"
    yield chained.derivative("F5, F7", text, z, t, steps=steps)
    text = "c = (1/ln β) (T ln Σ_i e^z_i^L − Σ_j t_j z_j^L), the same loss as a function of z^L"
    steps = "({T}·ln(e^{z2[0]} + e^{z2[1]}) − ({t[0]}·{z2[0]} + {t[1]}·{z2[1]})) / ln({beta})"
    yield n.cross_entropy.value("F13", text, z, t, steps=steps)
    text = "dc/dz_j^L = (1/ln β) (T a_j^L − t_j) = δ_j^L"
    delta = "({{T}}·{{p[{0}]}} − {{t[{0}]}}) / ln({{beta}})".format
    steps = {i: delta(i) for i in (0, 1)}
    yield n.cross_entropy.derivative("F13", text, z, t, steps=steps)
    printed = (a - t) / math.log(n.beta)
    yield Slip(
        "E6",
        "dc/dz_j^L",
        "dc/dz_j^L = (1/ln b) (a_j^L − t_j), as softmax's outputs sum to 1",
        "dc/dz_j^L = (1/ln β) (T a_j^L − t_j); equal only if the targets sum to 1",
        printed,
        chained.differentiate(z, t),
        "adding a constant to z^L does not change c, so the entries must sum to 0; the printed "
        "ones sum to {}. For t = (1, 0) both formulas give {}",
        (printed.sum(), chained.differentiate(z, ref.column([1.0, 0.0]))),
    )
    text = "c = −Σ_j t_j log_β(softmax(z^L)_j), z_j^L = Σ_k w_jk^L a_k^{L−1} + b_j^L"
    yield n.head.value("F14, F15", text, *n.head_inputs)
    text = "dc/dw_jk^L = (1/ln β) (T a_j^L − t_j) a_k^{L−1}"
    yield n.head.derivative("F14, F15", text, *n.head_inputs, wrt=1, steps=delta(0) + "·{a1[0]}")
    yield n.head.derivative("F14, F15", "dc/db_j^L = dc/dz_j^L · 1", *n.head_inputs, wrt=2)


@section("5.2.2", "Matrix form")
def softmax_matrix_form(n: Network) -> Iterator[Item]:
    slope = n.a1 * (1 - n.a1)
    _, dW1, delta1, dW2, delta = n.compute_gradients("softmax")
    da, J = n.values["dp"][:, None], n.values["J"]
    yield "(δ^L)ᵀ = (dc/da^L)ᵀ · da^L/dz^L, a row"
    yield Equation("(δ^L)ᵀ", "=", da.T, "·", J, "=", delta.T)
    yield "The document writes an entry out as t_0 (1 − a_0^L) − t_1 a_0^L + ⋯ − t_n a_0^L. The"
    yield "omitted terms are subtracted, too (E17); with two classes there are none."
    text = "dc/dW^L = δ^L · (a^{L−1})ᵀ"
    yield n.head.derivative("F15", text, *n.head_inputs, wrt=1, name="dc/dw_jk^L")
    yield Equation("dc/dW^L", "=", delta, "·", n.a1.T, "=", dW2)
    yield Slip(
        "E7",
        "dc/dw_jk^L",
        "dc/dW^L = dc/dz^L · dz^L/dW^L, two columns",
        "dc/dW^L = δ^L · (a^{L−1})ᵀ, a column times a row",
        delta.T @ n.a_square,
        n.head.differentiate(*n.head_inputs, wrt=1)[:, :2],
        f"for (dc/da^L)ᵀ · da^L/dz^L, a row, {describe_product(delta.T, n.a1)} either. With only "
        "the first two hidden nodes, row · column gives one number instead of four, as shown",
        shape_error=describe_product(delta, n.a1),
    )
    text = "dc/da^{L−1} = (W^L)ᵀ · δ^L"
    yield n.head.derivative("F15", text, *n.head_inputs, name="dc/da_k^{L−1}")
    yield "Layer L − 1, as in 5.1.2: δ^{L−1} = ((W^L)ᵀ · δ^L) ∘ (a^{L−1} ∘ (1 − a^{L−1}))"
    yield Equation("δ^{L−1}", "=", n.W2.T, "·", delta, "∘", slope, "=", delta1)
    text, net = "dc/dW^{L−1} = δ^{L−1} · (a^{L−2})ᵀ", n.net_cross_entropy
    yield net.derivative("F12", text, *n.network_inputs, wrt=1, name="dc/dw_kq^{L−1}")
    yield Equation("dc/dW^{L−1}", "=", delta1, "·", n.x.T, "=", dW1)
    text = "dc/db^{L−1} = δ^{L−1}"
    yield net.derivative("F12", text, *n.network_inputs, wrt=2, name="dc/db_k^{L−1}")


@section("A", "Cross entropy derivation")
def cross_entropy_derivation(n: Network) -> Iterator[Item]:
    a, t, ln, loss = n.p, n.t, math.log(n.beta), n.cross_entropy_of_a

    def sum_of_logs(rule: Any, a: Array) -> Any:
        """Σ_j log_β a_j, whose terms depend on one a_j each: F5 with t = (-1, -1)."""
        c, pullback = rule(a, -np.ones_like(a))
        return c, lambda g: pullback(g)[:1]

    logs = Formula(
        combine(sum_of_logs, loss.forms), lambda a: loss.library(a, -torch.ones_like(a)), n.values
    )
    yield "Derivative of a logarithm: f(x) = log_β(x), f'(x) = 1 / (x ln β)"
    text = "d log_β(a_j)/da_j = 1 / (a_j ln β)"
    yield logs.derivative("F16", text, a, steps="1 / ({p[0]}·ln({beta}))")
    yield "Chain rule"
    yield Slip(
        "E8",
        "d log_β(σ(z_j))/dz_j",
        "c(z) = f(z) + g(z), c'(z) = f'(z) + g'(z), the sum rule",
        "c(z) = f(g(z)), c'(z) = f'(g(z)) g'(z)",
        1 / (n.a2 * ln) + n.a2 * (1 - n.a2),
        take_diagonal(central_difference(lambda z: np.log(ref.SIGMOID.matrix.value(z)) / ln, n.z2)),
        "shown for f = log_β and g = σ, at z^L",
    )
    yield "In c = −Σ_i t_i log_β(a_i^L) only the term i = j depends on a_j^L:"
    text = "dc/da_j^L = −t_j d log_β(a_j^L)/da_j^L"
    steps = {i: f"−{{t[{i}]}}·(1 / ({{p[{i}]}}·ln({{beta}})))" for i in (0, 1)}
    yield loss.derivative("F5, F16", text, a, t, steps=steps)
    yield "E16 again: f: ℝᴺ → ℝ is printed, but the logarithm needs a_j^L > 0."


@section("B", "Softmax derivation")
def softmax_derivation(n: Network) -> Iterator[Item]:
    z, a, chained = n.z2, n.p, n.softmax_cross_entropy
    J, dz = np.squeeze(n.softmax.differentiate(z)), chained.differentiate(z, n.t)
    yield "Derivative of a vector function with respect to a vector"
    truth = np.squeeze(n.affine.differentiate(n.a_square, n.W_square, n.b2))
    yield Slip(
        "E10",
        "dz_j^L/da_k^{L−1}",
        "dy/dx has dy_j/dx_i in row i, column j",
        "dy/dx has dy_i/dx_j in row i, column j, as in section 4's dz^L/da^{L−1} = W^L",
        truth.T,
        truth,
        "shown for the first two hidden nodes. Softmax's Jacobian is symmetric and hides the slip",
        shape_error=f"shape {n.W2.T.shape} instead of {n.W2.shape}",
    )
    yield "Total derivative"
    yield Slip(
        "E11",
        "da_j^L/dz_k^L",
        "da_j^L/dz^L = da_j^L/dz_0^L + da_j^L/dz_1^L; f'(x, y) = f'(x) + f'(y)",
        "da^L/dz^L is the matrix of all da_j^L/dz_k^L, without a sum",
        J.sum(1, keepdims=True),
        J,
        "each row of softmax's Jacobian sums to 0: dc/dz^L would be 0 and nothing would be "
        "learned; it is {}",
        (dz,),
    )
    yield "Law of independence"
    yield Slip(
        "E17",
        "de^z_j/dz_k",
        "de^z/de^x = 0",
        "de^z_j/dz_k = 0 for k ≠ j, and e^z_j for k = j",
        np.zeros((2, 2)),
        np.squeeze(central_difference(np.exp, z)),
        "taken literally, the derivative of softmax's numerator is 0",
    )
    yield "Chain rule"
    yield Slip(
        "E8",
        "dc/dz_j^L",
        "c'(z) = f'(z) + g'(z)",
        "c'(z) = f'(g(z)) g'(z)",
        n.cross_entropy_of_a.differentiate(a, n.t) + J.sum(0)[:, None],
        dz,
        "shown for f = cross entropy and g = softmax: dc/da_j^L + Σ_i da_i^L/dz_j^L",
    )
    yield "Quotient rule, f = e^z_j, g = Σ_i e^z_i: (g e^z_j − e^z_j e^z_j) / g² where j = k,"
    yield "(g 0 − e^z_j e^z_k) / g² where j ≠ k"
    steps = {
        0: "({g}·e^{z2[0]} − e^{z2[0]}·e^{z2[0]}) / {g}²",
        1: "({g}·0 − e^{z2[0]}·e^{z2[1]}) / {g}²",
    }
    text = "da_j^L/dz_k^L = a_j^L (δ_jk − a_k^L)"
    yield n.softmax.derivative("F7, F17", text, z, steps=steps)
    forms = n.jacobian.value("F17", "J_jk = (diag(a^L) (I − 1 (a^L)ᵀ))_jk", z)
    complement = np.eye(len(a)) - np.ones_like(a) @ a.T
    yield replace(forms, columns={**forms.columns, "numerical": J})
    yield Equation("J", "=", np.diagflat(a), "·", complement, "=", n.values["J"])
    yield Slip(
        "E9",
        "J_jk",
        "J = (a_0^L … a_n^L) (I_n − 1 (a^L)ᵀ), a row times a matrix",
        "J = diag(a^L) (I − 1 (a^L)ᵀ)",
        a.T @ complement,
        J,
        "the result is a row of zeros for every z^L: no gradient would pass through softmax",
        shape_error=describe_product(a.T, complement),
    )
