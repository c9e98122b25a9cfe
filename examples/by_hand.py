"""The document with numbers: a network of 2, 3 and 2 nodes, one example, every formula worked out.

For reading *Neural Network Mathematics* with pen and paper. In the document's order and notation
stand each formula, its arithmetic for one entry and all its entries, four times side by side:

    element    the formula with indices and sums      (`torch_nnmath.reference`, NumPy)
    matrix     the same with matrices                 (`torch_nnmath.reference`, NumPy)
    library    the value or gradient of `torch_nnmath`
    numerical  differences, (f(x + h) - f(x - h)) / 2h, which know of no formula

Where the document slips (E1 to E17, docs/slips.md) stands what it prints, what is true and what the
slip would have cost. A picture, by_hand.png, shows the network with all activations, weights and
gradients, for both problems that the document works out.

    python examples/by_hand.py
    python examples/by_hand.py --section 5.1      # one part: 2, 5.1, 5.1.2, A, ...
    python examples/by_hand.py --slips            # the slips alone, as a table
    python examples/by_hand.py --check            # exit status 1 if two columns disagree

It needs `pip install .`, and matplotlib for the picture; it takes seconds.
"""

from __future__ import annotations

import argparse
import math
import re
import string
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_nnmath import functional as F
from torch_nnmath import reference as ref
from torch_nnmath.reference import Form, Forms, central_difference

Array = np.ndarray
COLUMNS = ("element", "matrix", "library", "numerical")
# In float64 formulas agree to rounding; differences with a step of 1e-6 to some 1e-10.
TOLERANCE = {"element": 1e-12, "matrix": 1e-12, "library": 1e-12, "numerical": 1e-8}


LEGEND = """\
Columns: `element` is the formula with indices and sums, `matrix` the same with matrices,
`library` what torch_nnmath gives, `numerical` a difference, (f(x + h) − f(x − h)) / 2h.
F1 to F17 are the document's formulas. E1 to E17 are its slips (docs/slips.md): what it prints,
what is true, what the printed one gives here, and what comes of it. A relative error is the
largest difference over the largest true entry."""


# What stands on the page


@dataclass(frozen=True)
class Row:
    """A quantity, in the four columns; a value has no numerical derivative, and None there.

    The letters of its name are its indices: dc/dw_jk^L has the entries dc/dw_00^L, dc/dw_01^L, ...
    `hand` is the arithmetic of some of them, (format, numbers...) by position.
    """

    name: str
    formulas: str
    text: str
    columns: Mapping[str, Array | None]
    hand: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)

    def wrong(self) -> list[str]:
        """Where it disagrees, the element form being compared with the others."""
        truth, found = self.columns["element"], []
        for column, value in self.columns.items():
            if value is not None and not agree(value, truth, TOLERANCE[column]):
                found.append(f"{self.name} ({self.formulas}): {column} form against element form")
        for i, (text, *numbers) in self.hand.items():
            if not agree(arithmetic(text, numbers), truth.flat[i], TOLERANCE["element"]):
                found.append(f"{self.name} ({self.formulas}): the arithmetic by hand, {text}")
        return found


class Equation:
    """Matrices, the operators · ∘ + − = between them, and labels; read from left to right."""

    def __init__(self, *pieces: Any):
        self.pieces = pieces

    def wrong(self) -> list[str]:
        operators = {"·": np.matmul, "∘": np.multiply, "+": np.add, "−": np.subtract}
        sides: list[Array] = []
        side, operator = None, None
        for piece in (*self.pieces, "="):
            if not isinstance(piece, str):
                side = piece if side is None else operator(side, piece)
            elif piece in operators:
                operator = operators[piece]
            else:
                if piece == "=" and side is not None:
                    sides.append(side)
                side = None
        right = all(agree(s, sides[-1], TOLERANCE["matrix"]) for s in sides)
        return [] if right else [f"{self.pieces[0]}: the equation of matrices"]


@dataclass(frozen=True)
class Slip:
    """What is printed and what is true, as formulas and as numbers, and what it would have cost."""

    id: str
    name: str
    printed: str
    true: str
    gives: Array
    truth: Array
    cost: str
    numbers: tuple[Any, ...] = ()  # of the cost
    shapes: str = ""  # why the printed form cannot even be computed

    @property
    def misfit(self) -> str:
        gives, truth = np.shape(self.gives), np.shape(self.truth)
        fits = gives == truth
        return self.shapes or ("" if fits else f"of shape {gives} for {truth or 'one number'}")

    @property
    def error(self) -> float:
        """The largest, relative to the largest entry of the truth."""
        return np.abs(np.subtract(self.gives, self.truth)).max() / np.abs(self.truth).max()

    @property
    def worst(self) -> tuple[str, float, float]:
        """The entry that is furthest off: its name, as printed and as it is."""
        gives, truth = np.broadcast_arrays(self.gives, self.truth)
        i = int(np.abs(gives - truth).argmax())
        return list(entries(self.name, gives))[i][0], gives.flat[i], truth.flat[i]

    def wrong(self) -> list[str]:
        return [] if self.error > 0.01 else [f"{self.id}: what is printed equals what is true"]


Item = Row | Equation | Slip | str
Hand = str | dict[int, str]  # arithmetic of a quantity's first entry, or of those so numbered


def agree(value: Any, truth: Any, tolerance: float) -> bool:
    """Of one shape, and close: relative to the numbers where they are above 1."""
    return np.shape(value) == np.shape(truth) and np.allclose(
        value, truth, rtol=tolerance, atol=tolerance
    )


def entries(name: str, value: Array) -> Iterator[tuple[str, float]]:
    """Each entry under its own name; the one column of a column is no index."""
    letters = "".join(dict.fromkeys("".join(re.findall(r"_([ijkq]+)", name))))
    value = np.squeeze(value)
    for index in np.ndindex(value.shape):
        digits = str.maketrans(dict(zip(letters, map(str, index), strict=False)))
        yield re.sub("_[ijkq]+", lambda m, d=digits: m[0].translate(d), name), value[index]


def arithmetic(text: str, numbers: Sequence[float]) -> float:
    """What a line of arithmetic comes to, with all digits of its numbers."""
    for sign, python in (("·", "*"), ("−", "-"), ("²", "**2"), ("e^", "e**")):
        text = text.replace(sign, python)
    line = text.format(*(f"({float(x)!r})" for x in numbers))
    return float(eval(line, {"e": math.e, "ln": math.log, "max": max}))


# The network


@dataclass(frozen=True)
class Pair:
    """A formula twice: in NumPy, in both of its forms, and as the library's function of columns.

    Rows are named by the left side of their text; `hand` takes its numbers from `names`.
    """

    forms: Forms
    library: Callable[..., torch.Tensor]
    names: Mapping[str, Any]

    def value(self, formulas: str, text: str, *inputs: Array, hand: Hand = "") -> Row:
        columns = {
            "element": np.asarray(self.forms.element.value(*inputs)),
            "matrix": np.asarray(self.forms.matrix.value(*inputs)),
            "library": self.library(*map(torch.tensor, inputs)).numpy(),
            "numerical": None,
        }
        return self.row(formulas, text, columns, hand)

    def derivative(
        self,
        formulas: str,
        text: str,
        *inputs: Array,
        wrt: int = 0,
        part: Callable[[Array], Array] = np.asarray,
        name: str = "",
        hand: Hand = "",
    ) -> Row:
        """Of the value in the input number `wrt`, or a part of that Jacobian."""
        columns = {
            "element": jacobian(self.forms.element, inputs, wrt),
            "matrix": jacobian(self.forms.matrix, inputs, wrt),
            "library": library_jacobian(self.library, inputs, wrt),
            "numerical": self.differences(*inputs, wrt=wrt),
        }
        return self.row(formulas, text, {k: part(v) for k, v in columns.items()}, hand, name)

    def row(self, formulas: str, text: str, columns: Any, hand: Hand, name: str = "") -> Row:
        lines = hand if isinstance(hand, dict) else {0: hand} if hand else {}
        filled = {i: numbered(line, self.names) for i, line in lines.items()}
        return Row(name or text.split(" = ")[0], formulas, text, columns, filled)

    def differences(self, *inputs: Array, wrt: int = 0) -> Array:
        def f(v: Array) -> Any:
            return self.forms.matrix.value(*inputs[:wrt], v, *inputs[wrt + 1 :])

        return central_difference(f, inputs[wrt])


def numbered(line: str, names: Mapping[str, Any]) -> tuple[Any, ...]:
    """("{}·{}", the two numbers) of "{W2[0][1]}·{a1[1]}"."""
    formatter = string.Formatter()
    fields = [name for _, name, _, _ in formatter.parse(line) if name]
    numbers = (float(formatter.get_field(name, (), names)[0]) for name in fields)
    return re.sub(r"{.*?}", "{}", line), *numbers


def jacobian(form: Form, inputs: Sequence[Array], wrt: int) -> Array:
    """Row by row from the pullback, of shape value.shape + input.shape; of a loss its gradient."""
    value, pullback = form.rule(*inputs)
    if np.ndim(value) == 0:
        return pullback(1.0)[wrt]
    units = np.eye(value.size).reshape(value.size, *value.shape)
    rows = np.stack([pullback(unit)[wrt] for unit in units])
    return rows.reshape(value.shape + inputs[wrt].shape)


def library_jacobian(f: Callable[..., torch.Tensor], inputs: Sequence[Array], wrt: int) -> Array:
    """The same by backward passes through the library."""
    tensors = [torch.tensor(v) for v in inputs]

    def of(v: torch.Tensor) -> torch.Tensor:
        return f(*tensors[:wrt], v, *tensors[wrt + 1 :])

    return torch.autograd.functional.jacobian(of, tensors[wrt]).numpy()


def both(rule: Callable[..., Any], *forms: Forms) -> Forms:
    """A rule in element and in matrix form, from the same forms of other formulas."""
    return Forms(
        Form(lambda *v: rule(*(f.element.rule for f in forms), *v)),
        Form(lambda *v: rule(*(f.matrix.rule for f in forms), *v)),
    )


def with_base(forms: Forms, beta: float) -> Forms:
    return both(lambda rule, *v: rule(*v, beta=beta), forms)


def chain(first: Forms, then: Forms) -> Forms:
    """The chain rule (which E8 gets wrong): then(first(z), ...)."""

    def rule(f: Any, g: Any, z: Array, *rest: Array) -> Any:
        a, f_pullback = f(z)
        c, g_pullback = g(a, *rest)

        def pullback(d: Any) -> Any:
            da, *others = g_pullback(d)
            return *f_pullback(da), *others

        return c, pullback

    return both(rule, first, then)


def whole_network(output: str, loss: Forms) -> Forms:
    """x, W^{L−1}, b^{L−1}, W^L, b^L, t -> c."""

    def rule(net: Any, loss: Any, x: Any, W1: Any, b1: Any, W2: Any, b2: Any, t: Any) -> Any:
        a, net_pullback = net(x, [W1, W2], [b1, b2], "sigmoid", output)
        c, loss_pullback = loss(a, t)

        def pullback(d: Any) -> Any:
            da, dt = loss_pullback(d)
            dx, (dW1, dW2), (db1, db2) = net_pullback(da)
            return dx, dW1, db1, dW2, db2, dt

        return c, pullback

    return both(rule, ref.FEEDFORWARD, loss)


def mean_of_two(loss: Forms, t: Array, t_: Array) -> Forms:
    """F3 of two examples: a, a' -> C."""

    def rule(loss: Any, cost: Any, a: Array, a_: Array) -> Any:
        (c, pullback), (c_, pullback_) = loss(a, t), loss(a_, t_)
        C, pullback_C = cost(ref.column([c, c_]))

        def pullbacks(d: Any) -> Any:
            (dc,), (dc_,) = pullback_C(d)[0]
            return pullback(dc)[0], pullback_(dc_)[0]

        return C, pullbacks

    return both(rule, loss, ref.COST)


class Network:
    """The numbers, and the formulas on them. Layer L − 1 has a 1 in its names, layer L a 2."""

    x = ref.column([0.5, -1.0])
    W1 = np.array([[0.4, -0.6], [1.2, 0.2], [-0.8, 0.5]])
    b1 = ref.column([0.1, -0.3, 0.2])
    W2 = np.array([[0.7, -0.5, 0.3], [-0.4, 0.6, 0.9]])
    b2 = ref.column([0.2, -0.1])
    t = ref.column([1.0, 0.5])  # which sum to 1.5, as class weights may have it: 1 would hide E6
    beta = 2.0  # with β = e no one would see the factor 1/ln β
    x_, t_ = ref.column([-1.0, 0.5]), ref.column([0.0, 1.0])  # another example, for F3

    def __init__(self) -> None:
        self.formulas()
        self.all = self.x, self.W1, self.b1, self.W2, self.b2, self.t
        self.z1 = ref.AFFINE.matrix.value(self.x, self.W1, self.b1)
        self.a1 = ref.SIGMOID.matrix.value(self.z1)
        self.last = self.a1, self.W2, self.b2, self.t
        self.z2 = ref.AFFINE.matrix.value(self.a1, self.W2, self.b2)
        self.a2 = ref.SIGMOID.matrix.value(self.z2)
        self.p = ref.SOFTMAX.matrix.value(self.z2)
        self.a2_ = ref.FEEDFORWARD.matrix.value(self.x_, [self.W1, self.W2], [self.b1, self.b2])
        # Layer L of the first two hidden nodes alone is square, which hides shapes that differ.
        self.W_square, self.a_square = self.W2[:, :2], self.a1[:2]
        self.names.update(
            {k: np.squeeze(v) for k, v in vars(self).items() if isinstance(v, np.ndarray)},
            **{k: np.squeeze(getattr(self, k)) for k in ("x", "W1", "b1", "W2", "b2", "t", "t_")},
            beta=self.beta,
            T=self.t.sum(),
            g=np.exp(self.z2).sum(),
            c=ref.SQUARED_ERROR.matrix.value(self.a2, self.t),
            c_=ref.SQUARED_ERROR.matrix.value(self.a2_, self.t_),
            d2=self.gradients("sigmoid")[4][:, 0],
            da1=self.layer_L.forms.matrix.pullback(1.0, *self.last)[0][:, 0],
            dp=self.cross_entropy_of_a.forms.matrix.pullback(1.0, self.p, self.t)[0][:, 0],
            J=ref.SOFTMAX_JACOBIAN.matrix.value(self.z2),
        )

    def formulas(self) -> None:
        self.names: dict[str, Any] = {}
        pair, beta = partial(Pair, names=self.names), self.beta
        self.affine = pair(ref.AFFINE, lambda x, W, b: F.linear(x.T, W, b[:, 0]).T)
        self.sigmoid = pair(ref.SIGMOID, F.sigmoid)
        self.tanh = pair(ref.TANH, F.tanh)
        self.relu = pair(ref.RELU, F.relu)
        self.softmax = pair(ref.SOFTMAX, lambda z: F.softmax(z, dim=0))
        self.jacobian = pair(ref.SOFTMAX_JACOBIAN, lambda z: F.softmax_jacobian(z[:, 0], dim=0))
        self.squared_error = pair(ref.SQUARED_ERROR, lambda a, t: F.squared_error(a, t, dim=0))
        targets = torch.tensor(np.hstack([self.t, self.t_]))
        self.mean = pair(
            mean_of_two(ref.SQUARED_ERROR, self.t, self.t_),
            lambda a, a_: F.squared_error(torch.hstack([a, a_]), targets, dim=0),
        )
        self.cross_entropy_of_a = self.cross_entropy_to(beta)
        self.sigmoid_squared_error = pair(
            chain(ref.SIGMOID, ref.SQUARED_ERROR),
            lambda z, t: F.sigmoid_squared_error(z, t, dim=0),
        )
        self.layer_L = pair(
            ref.SIGMOID_SQUARED_ERROR,
            lambda x, W, b, t: F.sigmoid_squared_error(F.linear(x.T, W, b[:, 0]), t.T),
        )
        self.net_squared_error = pair(
            whole_network("sigmoid", ref.SQUARED_ERROR),
            lambda x, W1, b1, W2, b2, t: F.squared_error(
                F.feedforward(x.T, [W1, W2], [b1[:, 0], b2[:, 0]]), t.T
            ),
        )
        self.softmax_cross_entropy = pair(
            chain(ref.SOFTMAX, self.cross_entropy_of_a.forms),
            lambda z, t: self.cross_entropy_of_a.library(F.softmax(z, dim=0), t),
        )
        self.cross_entropy = pair(
            with_base(ref.CROSS_ENTROPY, beta),
            lambda z, t: F.cross_entropy(z.T, t.T, base=beta),
        )
        self.head = pair(
            with_base(ref.LINEAR_CROSS_ENTROPY, beta),
            lambda x, W, b, t: F.linear_cross_entropy(x.T, W, t.T, linear_bias=b[:, 0], base=beta),
        )
        self.net_cross_entropy = pair(
            whole_network("softmax", self.cross_entropy_of_a.forms),
            lambda x, W1, b1, W2, b2, t: F.cross_entropy(
                F.feedforward(x.T, [W1, W2], [b1[:, 0], b2[:, 0]], output_activation="identity"),
                t.T,
                base=beta,
            ),
        )

    def cross_entropy_to(self, beta: float) -> Pair:
        return Pair(
            with_base(ref.CATEGORICAL_CROSS_ENTROPY, beta),
            lambda a, t: F.categorical_cross_entropy(a, t, dim=0, base=beta),
            self.names,
        )

    def gradients(self, output: str) -> tuple[Array, ...]:
        """dx, dW and db of both layers, for "sigmoid" (5.1) or "softmax" (5.2)."""
        net = self.net_squared_error if output == "sigmoid" else self.net_cross_entropy
        return net.forms.matrix.pullback(1.0, *self.all)[:5]


def diagonal(J: Array) -> Array:
    """dy_j/dx_j of dy_j/dx_k."""
    return np.diagonal(J[:, 0, :, 0])[:, None]


def own_weights(J: Array) -> Array:
    """dz_j/dw_jk of dz_i/dw_jk."""
    return np.einsum("jojk->jk", J)


def product(*factors: Array) -> str:
    """The shapes of a matrix product, and whether they fit; it is tried."""
    shapes = " · ".join(str(f.shape) for f in factors)
    try:
        return f"{shapes} is {np.linalg.multi_dot(factors).shape}"
    except ValueError:
        return f"{shapes} do not fit"


# The document


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
    yield "2 inputs, 3 hidden nodes, 2 outputs. The input layer is a^{L−2} = x; W has one row for"
    yield "each node of its own layer:"
    yield Equation("x =", n.x, "  W^{L−1} =", n.W1, "  b^{L−1} =", n.b1)
    yield Equation("t =", n.t, "  W^L =", n.W2, "  b^L =", n.b2)
    yield f"The logarithm's base b is β here, for b is the bias: β = {n.beta:g}."
    text = "z_k^{L−1} = Σ_q w_kq^{L−1} a_q^{L−2} + b_k^{L−1}"
    hand = "{W1[0][0]}·{x[0]} + {W1[0][1]}·{x[1]} + {b1[0]}"
    yield n.affine.value("F1", text, n.x, n.W1, n.b1, hand=hand)
    yield Equation("z^{L−1}", "=", n.W1, "·", n.x, "+", n.b1, "=", n.z1)
    text = "a_k^{L−1} = f(z_k^{L−1}), f = σ: 1 / (1 + e^−z)"
    yield n.sigmoid.value("F2, F6", text, n.z1, hand="1 / (1 + e^−{z1[0]})")
    hand = "(e^{z1[0]} − e^−{z1[0]}) / (e^{z1[0]} + e^−{z1[0]})"
    yield n.tanh.value("F2", "tanh(z_k) = (e^z_k − e^−z_k) / (e^z_k + e^−z_k)", n.z1, hand=hand)
    yield n.tanh.derivative("F2", "tanh'(z_k) = 1 − tanh²(z_k)", n.z1, part=diagonal)
    yield n.relu.value("F2", "relu(z_k) = max(z_k, 0)", n.z1, hand="max({z1[0]}, 0)")
    yield n.relu.derivative("F2", "relu'(z_k) = 0 where z_k ≤ 0, else 1", n.z1, part=diagonal)
    hand = "{W2[0][0]}·{a1[0]} + {W2[0][1]}·{a1[1]} + {W2[0][2]}·{a1[2]} + {b2[0]}"
    text = "z_j^L = Σ_k w_jk^L a_k^{L−1} + b_j^L"
    yield n.affine.value("F1", text, *n.last[:3], hand=hand)
    text = "a_j^L = f(z_j^L), f = σ in 5.1 (for softmax, which takes all of z^L, see 3.2)"
    yield n.sigmoid.value("F2, F6", text, n.z2, hand="1 / (1 + e^−{z2[0]})")
    yield Slip(
        "E12",
        "z_j^L",
        "z^L = a^{L−1} W^L + B^L; sums from 0 to n with n nodes; W square",
        "z^L = W^L a^{L−1} + b^L; an index runs over its own layer's nodes",
        (n.a_square.T @ n.W_square).T,
        n.W_square @ n.a_square,
        "from 0 to 3 there are 4 terms, and only 3 nodes. With the first two hidden nodes alone "
        "W is square, and the shapes hide that a W and W a differ, as shown (b left out)",
        shapes=product(n.a1.T, n.W2),
    )


@section("2", "Loss/Cost Function")
def loss_and_cost(n: Network) -> Iterator[Item]:
    yield "The loss c is of one example, the cost C the mean over a batch. Here are two: ours, and"
    yield "x' = (-1, 0.5), t' = (0, 1), for which the network gives a' (squared errors, see 2.1):"
    yield Equation("a =", n.a2, "  a' =", n.a2_)
    batch = n.a2, n.a2_
    yield n.mean.value("F3", "C = (1/N) Σ_i c_i", *batch, hand="({c} + {c_}) / 2")
    text = "dC/da_j^L = (1/N) dc/da_j^L: each example's gradient is divided by N"
    yield n.mean.derivative("F3", text, *batch, hand="({a2[0]} − {t[0]}) / 2")
    text = "dC/da'_j^L = (1/N) dc'/da'_j^L"
    yield n.mean.derivative("F3", text, *batch, wrt=1, hand="({a2_[0]} − {t_[0]}) / 2")


@section("2.1", "Squared error")
def squared_error(n: Network) -> Iterator[Item]:
    a, t, loss = n.a2, n.t, n.squared_error
    hand = "(({t[0]} − {a2[0]})² + ({t[1]} − {a2[1]})²) / 2"
    yield loss.value("F4", "c = ½ Σ_j (t_j − a_j^L)²", a, t, hand=hand)
    c, printed, truth = loss.forms.matrix.value(a, t), t - a, loss.differences(a, t)
    yield Slip(
        "E2",
        "c",
        "c = ½ ((t − a^L) ∘ (t − a^L))",
        "c = ½ (t − a^L)ᵀ · (t − a^L)",
        (t - a) * (t - a) / 2,
        np.asarray(c),
        "a vector has no gradient: its derivative in a^L is a matrix, {}",
        (-np.diagflat(t - a),),
    )
    hand = {i: f"{{a2[{i}]}} − {{t[{i}]}}" for i in (0, 1)}
    yield loss.derivative("F4", "dc/da_j^L = a_j^L − t_j", a, t, hand=hand)
    yield Slip(
        "E1",
        "dc/da_j^L",
        "dc/da_j^L = t_j − a_j^L",
        "dc/da_j^L = a_j^L − t_j",
        printed,
        truth,
        "descent climbs: a step of 0.1 on a^L takes c from {} to {}, with the true sign to {}",
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
        "the mean squared error is 2/n times F4: F4's steps are n/2 times as long",
        loss.forms.matrix.pullback(1.0, a, t)[0],
        central_difference(lambda v: np.mean((t - v) ** 2), a),
        "n = 2 hides it, so let the 3 hidden nodes be outputs, with t = (1, 0.5, 0): 10 steps on "
        "a at a rate of 2.5 bring (1/n) Σ (t − a)² from {} to {}, with F4 to {}",
        (np.mean((t - a) ** 2), after[2 / 3], after[1]),
    )


@section("2.2", "Cross entropy")
def cross_entropy(n: Network) -> Iterator[Item]:
    a, t, loss = n.p, n.t, n.cross_entropy_of_a
    yield "Here a^L = softmax(z^L), see 3.2:"
    yield Equation("a^L =", a, "  t =", t)
    hand = "−({t[0]}·ln({p[0]}) + {t[1]}·ln({p[1]})) / ln({beta})"
    yield loss.value("F5", "c = −Σ_j t_j log_β(a_j^L)", a, t, hand=hand)
    text = "dc/da_j^L = −(1/ln β) t_j / a_j^L"
    yield loss.derivative("F5", text, a, t, hand="−{t[0]} / {p[0]} / ln({beta})")
    half = n.cross_entropy_to(0.5)
    wrong, right = half.differences(a, t), loss.differences(a, t)
    yield Slip(
        "E16",
        "dc/da_j^L",
        "log_b with any base b",
        "β > 1 (and a_j^L > 0)",
        wrong,
        right,
        "β = ½ has a derivative, too, but c is {} there, and falls as a^L gets worse: a step of "
        "0.1 takes a_0^L from {} to {}, with β = 2 to {}",
        (half.forms.matrix.value(a, t), a[0], (a - 0.1 * wrong)[0], (a - 0.1 * right)[0]),
    )


@section("3", "Activation Function")
def activation(n: Network) -> Iterator[Item]:
    yield "A sigmoid's a_j takes its own z_j alone: its Jacobian is diagonal, and a vector stands"
    yield "for it. Each of softmax's a_j takes all of z. Here for"
    yield Equation("z^L =", n.z2)


@section("3.1", "Sigmoid")
def sigmoid(n: Network) -> Iterator[Item]:
    hand: Hand = {i: f"1 / (1 + e^−{{z2[{i}]}})" for i in (0, 1)}
    yield n.sigmoid.value("F6", "a_j^L = σ(z_j^L) = 1 / (1 + e^−z_j^L)", n.z2, hand=hand)
    hand = {3 * i: f"{{a2[{i}]}}·(1 − {{a2[{i}]}})" for i in (0, 1)}
    text = "da_j^L/dz_k^L = δ_jk a_j^L (1 − a_j^L)"
    yield n.sigmoid.derivative("F6", text, n.z2, hand=hand)
    yield vector_for_a_matrix(n)


def vector_for_a_matrix(n: Network) -> Slip:
    printed, truth = n.a2 * (1 - n.a2), np.squeeze(n.sigmoid.differences(n.z2))
    da = n.squared_error.differences(n.a2, n.t)
    return Slip(
        "E14",
        "da_j^L/dz_k^L",
        "da^L/dz^L = a^L ∘ (1 − a^L)",
        "da^L/dz^L = diag(a^L ∘ (1 − a^L)); the vector wants ∘ where a matrix wants ·",
        printed,
        truth,
        "taken as softmax's matrix is, (dc/da^L)ᵀ · da^L/dz^L is the one number {}, for "
        "dc/dz^L = {}",
        (da.T @ printed, truth.T @ da),
    )


@section("3.2", "Softmax")
def softmax(n: Network) -> Iterator[Item]:
    hand: Hand = {i: f"e^{{z2[{i}]}} / (e^{{z2[0]}} + e^{{z2[1]}})" for i in (0, 1)}
    yield n.softmax.value("F7", "a_j^L = e^z_j^L / Σ_i e^z_i^L", n.z2, hand=hand)
    hand = {0: "{p[0]}·(1 − {p[0]})", 1: "{p[0]}·(0 − {p[1]})", 3: "{p[1]}·(1 − {p[1]})"}
    text = "da_j^L/dz_k^L = a_j^L (δ_jk − a_k^L)"
    yield n.softmax.derivative("F7", text, n.z2, hand=hand)
    by_letter, truth = np.diagflat(n.p * (1 - n.p)), np.squeeze(n.softmax.differences(n.z2))
    da = n.cross_entropy_of_a.differences(n.p, n.t)
    yield Slip(
        "E17",
        "da_j^L/dz_k^L",
        "a_j = S(z_j), as if of z_j alone (in B also f(z_j) / g(z_j))",
        "a_j = S(z)_j: each depends on all of z",
        by_letter,
        truth,
        "by the letter da_0^L/dz_1^L is 0, and dc/dz^L is {} for {}",
        (by_letter.T @ da, truth.T @ da),
    )


@section("4", "Matrix weights")
def matrix_weights(n: Network) -> Iterator[Item]:
    inputs = a, W, b = n.last[:3]
    hand = "{W2[1][0]}·{a1[0]} + {W2[1][1]}·{a1[1]} + {W2[1][2]}·{a1[2]} + {b2[1]}"
    text = "z_j^L = Σ_k w_jk^L a_k^{L−1} + b_j^L"
    yield n.affine.value("F1", text, *inputs, hand={1: hand})
    yield Equation("z^L", "=", W, "·", a, "+", b, "=", n.z2)
    dW = np.squeeze(n.affine.differences(*inputs, wrt=1))
    yield Slip(
        "E3",
        "z_j^L",
        "z_j^L = a_k^{L−1} w_jk^L + b_j^L",
        "z_j^L = Σ_k w_jk^L a_k^{L−1} + b_j^L",
        a[0] * W[:, :1] + b,
        n.z2,
        "shown for k = 0; z_j does not depend on the other k's weights then: dz_0^L/dw_01^L is "
        "0 for {}, and 4 of 6 weights never learn",
        (dW[0, 0, 1],),
    )
    text = "dz_i^L/dw_jk^L = δ_ij a_k^{L−1}"
    hand = {0: "1·{a1[0]}", 3: "0·{a1[0]}"}
    yield n.affine.derivative("F8", text, *inputs, wrt=1, hand=hand)
    yield n.affine.derivative("F8", "dz_i^L/db_j^L = δ_ij", *inputs, wrt=2)
    printed = np.broadcast_to(a[:, 0], dW.shape)
    delta = n.sigmoid_squared_error.differences(n.z2, n.t)[:, 0]
    yield Slip(
        "E4",
        "dz_i^L/dw_jk^L",
        "dz^L/dW^L = a^{L−1}, dz^L/db^L = 1",
        "dz_i^L/dw_jk^L = δ_ij a_k^{L−1}, dz^L/db^L = I",
        printed,
        dW,
        "with 5.1's dc/dz^L, Σ_i dc/dz_i^L dz_i^L/dw_jk^L has equal rows: dc/dW^L is {} for {}",
        tuple(np.einsum("i,ijk->jk", delta, d) for d in (printed, dW)),
        f"{a.shape} for {dW.shape}",
    )
    yield n.affine.derivative("F8", "dz_j^L/da_k^{L−1} = w_jk^L", *inputs)


@section("5", "Backpropagation")
def backpropagation(n: Network) -> Iterator[Item]:
    yield "From the loss back to the input; dc/dz^L is called δ^L, dc/dz^{L−1} δ^{L−1}."


@section("5.1", "Sigmoid and squared error")
def sigmoid_and_squared_error(n: Network) -> Iterator[Item]:
    yield Equation("a^{L−2} =", n.x, "  a^{L−1} =", n.a1, "  a^L =", n.a2, "  t =", n.t)


@section("5.1.1", "Element form")
def sigmoid_element_form(n: Network) -> Iterator[Item]:
    a, t = n.a2, n.t
    yield "Layer L: dc/dw_jk^L = dc/da_j^L · da_j^L/dz_j^L · dz_j^L/dw_jk^L, factor by factor"
    yield n.squared_error.derivative("F4", "dc/da_j^L = a_j^L − t_j", a, t)
    text = "da_j^L/dz_j^L = a_j^L (1 − a_j^L)"
    yield n.sigmoid.derivative("F6", text, n.z2, part=diagonal)
    text = "dc/dz_j^L = (a_j^L − t_j) (1 − a_j^L) a_j^L = δ_j^L"
    delta = "({{a2[{0}]}} − {{t[{0}]}})·(1 − {{a2[{0}]}})·{{a2[{0}]}}".format
    hand: Hand = {i: delta(i) for i in (0, 1)}
    yield n.sigmoid_squared_error.derivative("F9, F11", text, n.z2, t, hand=hand)
    text = "dz_j^L/dw_jk^L = a_k^{L−1}"
    yield n.affine.derivative("F8", text, *n.last[:3], wrt=1, part=own_weights)
    yield n.layer_L.value("F9, F11", "c = ½ Σ_j (t_j − σ(Σ_k w_jk^L a_k^{L−1} + b_j^L))²", *n.last)
    text = "dc/dw_jk^L = (a_j^L − t_j) (1 − a_j^L) a_j^L a_k^{L−1}"
    hand = delta(0) + "·{a1[0]}"
    yield n.layer_L.derivative("F9, F11", text, *n.last, wrt=1, hand=hand)
    yield n.layer_L.derivative("F9, F11", "dc/db_j^L = dc/dz_j^L · 1", *n.last, wrt=2)
    printed, truth = ((t - a) * (1 - a) * a) @ n.a1.T, n.layer_L.differences(*n.last, wrt=1)
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
        "5.1 inherits the sign: a step of 1 on W^L takes c from {} to {}, with the true sign to {}",
        tuple(losses),
    )

    net, sum_j = n.net_squared_error, "{d2[0]}·{W2[0][0]} + {d2[1]}·{W2[1][0]}"
    yield "Layer L − 1: dc/dw_kq^{L−1} ="
    yield "dc/da_k^{L−1} · da_k^{L−1}/dz_k^{L−1} · dz_k^{L−1}/dw_kq^{L−1}, factor by factor"
    yield n.affine.derivative("F8", "dz_j^L/da_k^{L−1} = w_jk^L", *n.last[:3])
    text = "dc/da_k^{L−1} = Σ_j dc/dz_j^L w_jk^L"
    yield n.layer_L.derivative("F10, F12", text, *n.last, hand=sum_j)
    text = "da_k^{L−1}/dz_k^{L−1} = a_k^{L−1} (1 − a_k^{L−1})"
    yield n.sigmoid.derivative("F6", text, n.z1, part=diagonal, hand="{a1[0]}·(1 − {a1[0]})")
    text = "dc/db_k^{L−1} = dc/dz_k^{L−1} = dc/da_k^{L−1} · a_k^{L−1} (1 − a_k^{L−1})"
    hand = "{da1[0]}·{a1[0]}·(1 − {a1[0]})"
    yield net.derivative("F10, F12", text, *n.all, wrt=2, hand=hand)
    text = "dz_k^{L−1}/dw_kq^{L−1} = a_q^{L−2}"
    yield n.affine.derivative("F8", text, *n.all[:3], wrt=1, part=own_weights)
    text = "dc/dw_kq^{L−1} = (Σ_j dc/dz_j^L w_jk^L) a_k^{L−1} (1 − a_k^{L−1}) a_q^{L−2}"
    hand = f"({sum_j})·{{a1[0]}}·(1 − {{a1[0]}})·{{x[0]}}"
    yield net.derivative("F10, F12", text, *n.all, wrt=1, hand=hand)
    printed, truth = n.gradients("sigmoid")[2] @ n.a1.T, net.differences(*n.all, wrt=1)
    yield Slip(
        "E13",
        "dc/dw_kq^{L−1}",
        "dz_k^{L−1}/dw_kq^{L−1} = a_q^{L−1}",
        "dz_k^{L−1}/dw_kq^{L−1} = a_q^{L−2}, that layer's input",
        printed[:, :2],
        truth,
        "no shape for W^{{L−1}}; shown are its first two columns, with E1 mended",
        shapes=f"of shape {printed.shape} for {truth.shape}",
    )


@section("5.1.2", "Matrix form")
def sigmoid_matrix_form(n: Network) -> Iterator[Item]:
    a, W, slope = n.a2, n.W2, n.a1 * (1 - n.a1)
    _, dW1, delta1, dW2, delta = n.gradients("sigmoid")
    yield "Layer L: δ^L = (a^L − t) ∘ (a^L ∘ (1 − a^L))"
    yield Equation("δ^L", "=", a - n.t, "∘", a * (1 - a), "=", delta)
    text = "dc/dW^L = δ^L · (a^{L−1})ᵀ"
    yield n.layer_L.derivative("F11", text, *n.last, wrt=1, name="dc/dw_jk^L")
    yield Equation("dc/dW^L", "=", delta, "·", n.a1.T, "=", dW2)
    yield vector_for_a_matrix(n)
    yield "Layer L − 1: δ^{L−1} = ((W^L)ᵀ · δ^L) ∘ (a^{L−1} ∘ (1 − a^{L−1}))"
    yield Equation("δ^{L−1}", "=", W.T, "·", delta, "∘", slope, "=", delta1)
    text, net = "dc/dW^{L−1} = δ^{L−1} · (a^{L−2})ᵀ", n.net_squared_error
    yield net.derivative("F12", text, *n.all, wrt=1, name="dc/dw_kq^{L−1}")
    yield Equation("dc/dW^{L−1}", "=", delta1, "·", n.x.T, "=", dW1)
    broadcast = ((delta.T @ W) * slope).shape
    yield Slip(
        "E5",
        "dc/da_k^{L−1}",
        "dc/dW^{L−1} = ((dc/dz^L · W^L) ∘ f') · a^{L−2}",
        "dc/dW^{L−1} = (((W^L)ᵀ · δ^L) ∘ f') · (a^{L−2})ᵀ",
        n.W_square @ delta,
        central_difference(lambda a: (delta.T @ n.W_square @ a).item(), n.a_square),
        f"nor does W^L · δ^L: {product(W, delta)}. With the first two hidden nodes alone it "
        f"would, and be wrong, as shown. A row ∘ a column broadcasts, unnoticed, to {broadcast}",
        shapes=product(delta, W),
    )
    yield "By induction for every layer before; back to the input:"
    text = "dc/da^{L−2} = (W^{L−1})ᵀ · δ^{L−1}"
    yield net.derivative("F12", text, *n.all, name="dc/da_q^{L−2}")


@section("5.2", "Softmax and cross entropy")
def softmax_and_cross_entropy(n: Network) -> Iterator[Item]:
    yield Equation("a^{L−2} =", n.x, "  a^{L−1} =", n.a1, "  a^L =", n.p, "  t =", n.t)
    yield f"T = Σ_j t_j = {n.t.sum():g}, which the document takes to be 1; β = {n.beta:g}."


@section("5.2.1", "Element form")
def softmax_element_form(n: Network) -> Iterator[Item]:
    z, a, t, chained = n.z2, n.p, n.t, n.softmax_cross_entropy
    yield n.cross_entropy_of_a.derivative("F5", "dc/da_i^L = −(1/ln β) t_i / a_i^L", a, t)
    yield n.softmax.derivative("F7", "da_i^L/dz_j^L = a_i^L (δ_ij − a_j^L)", z)
    text = "dc/dz_j^L = Σ_i dc/da_i^L da_i^L/dz_j^L"
    hand: Hand = "{dp[0]}·{J[0][0]} + {dp[1]}·{J[1][0]}"
    yield chained.derivative("F5, F7", text, z, t, hand=hand)
    text = "c = (1/ln β) (T ln Σ_i e^z_i^L − Σ_j t_j z_j^L), the same loss from z^L"
    hand = "({T}·ln(e^{z2[0]} + e^{z2[1]}) − ({t[0]}·{z2[0]} + {t[1]}·{z2[1]})) / ln({beta})"
    yield n.cross_entropy.value("F13", text, z, t, hand=hand)
    text = "dc/dz_j^L = (1/ln β) (T a_j^L − t_j) = δ_j^L"
    delta = "({{T}}·{{p[{0}]}} − {{t[{0}]}}) / ln({{beta}})".format
    hand = {i: delta(i) for i in (0, 1)}
    yield n.cross_entropy.derivative("F13", text, z, t, hand=hand)
    printed = (a - t) / math.log(n.beta)
    yield Slip(
        "E6",
        "dc/dz_j^L",
        "dc/dz_j^L = (1/ln b) (a_j^L − t_j), as softmax's outputs sum to 1",
        "dc/dz_j^L = (1/ln β) (T a_j^L − t_j): it is the targets that would have to",
        printed,
        chained.differences(z, t),
        "to add a number to all of z^L changes nothing, so that the entries must sum to 0, but as "
        "printed they sum to {}. For t = (1, 0) both forms give {}",
        (printed.sum(), chained.differences(z, ref.column([1.0, 0.0]))),
    )
    text = "c = −Σ_j t_j log_β(softmax(z^L)_j), z_j^L = Σ_k w_jk^L a_k^{L−1} + b_j^L"
    yield n.head.value("F14, F15", text, *n.last)
    text = "dc/dw_jk^L = (1/ln β) (T a_j^L − t_j) a_k^{L−1}"
    yield n.head.derivative("F14, F15", text, *n.last, wrt=1, hand=delta(0) + "·{a1[0]}")
    yield n.head.derivative("F14, F15", "dc/db_j^L = dc/dz_j^L · 1", *n.last, wrt=2)


@section("5.2.2", "Matrix form")
def softmax_matrix_form(n: Network) -> Iterator[Item]:
    slope = n.a1 * (1 - n.a1)
    _, dW1, delta1, dW2, delta = n.gradients("softmax")
    da, J = n.names["dp"][:, None], n.names["J"]
    yield "(δ^L)ᵀ = (dc/da^L)ᵀ · da^L/dz^L, a row"
    yield Equation("(δ^L)ᵀ", "=", da.T, "·", J, "=", delta.T)
    yield "The document writes its entries out, t_0 (1 − a_0^L) − t_1 a_0^L + ⋯ − t_n a_0^L. The"
    yield "terms in ⋯ are subtracted, too (E17); with two classes there are none."
    text = "dc/dW^L = δ^L · (a^{L−1})ᵀ"
    yield n.head.derivative("F15", text, *n.last, wrt=1, name="dc/dw_jk^L")
    yield Equation("dc/dW^L", "=", delta, "·", n.a1.T, "=", dW2)
    yield Slip(
        "E7",
        "dc/dw_jk^L",
        "dc/dW^L = dc/dz^L · dz^L/dW^L, two columns",
        "dc/dW^L = δ^L · (a^{L−1})ᵀ, a column times a row",
        delta.T @ n.a_square,
        n.head.differences(*n.last, wrt=1)[:, :2],
        f"(dc/da^L)ᵀ · da^L/dz^L is a row, but {product(delta.T, n.a1)}, either. With the first "
        "two hidden nodes alone row · column is one number where four are due, as shown",
        shapes=product(delta, n.a1),
    )
    text = "dc/da^{L−1} = (W^L)ᵀ · δ^L"
    yield n.head.derivative("F15", text, *n.last, name="dc/da_k^{L−1}")
    yield "Layer L − 1, as in 5.1.2: δ^{L−1} = ((W^L)ᵀ · δ^L) ∘ (a^{L−1} ∘ (1 − a^{L−1}))"
    yield Equation("δ^{L−1}", "=", n.W2.T, "·", delta, "∘", slope, "=", delta1)
    text, net = "dc/dW^{L−1} = δ^{L−1} · (a^{L−2})ᵀ", n.net_cross_entropy
    yield net.derivative("F12", text, *n.all, wrt=1, name="dc/dw_kq^{L−1}")
    yield Equation("dc/dW^{L−1}", "=", delta1, "·", n.x.T, "=", dW1)
    text = "dc/db^{L−1} = δ^{L−1}"
    yield net.derivative("F12", text, *n.all, wrt=2, name="dc/db_k^{L−1}")


@section("A", "Cross entropy derivation")
def cross_entropy_derivation(n: Network) -> Iterator[Item]:
    a, t, ln, loss = n.p, n.t, math.log(n.beta), n.cross_entropy_of_a

    def sum_of_logs(rule: Any, a: Array) -> Any:
        """Σ_j log_β a_j, each of whose terms takes one a_j: F5 for t = (-1, -1)."""
        c, pullback = rule(a, -np.ones_like(a))
        return c, lambda g: pullback(g)[:1]

    logs = Pair(
        both(sum_of_logs, loss.forms), lambda a: loss.library(a, -torch.ones_like(a)), n.names
    )
    yield "Derivative of a logarithm: f(x) = log_β(x), f'(x) = 1 / (x ln β)"
    text = "d log_β(a_j)/da_j = 1 / (a_j ln β)"
    yield logs.derivative("F16", text, a, hand="1 / ({p[0]}·ln({beta}))")
    yield "Chain rule"
    yield Slip(
        "E8",
        "d log_β(σ(z_j))/dz_j",
        "c(z) = f(z) + g(z), c'(z) = f'(z) + g'(z): that is the sum rule",
        "c(z) = f(g(z)), c'(z) = f'(g(z)) g'(z)",
        1 / (n.a2 * ln) + n.a2 * (1 - n.a2),
        diagonal(central_difference(lambda z: np.log(ref.SIGMOID.matrix.value(z)) / ln, n.z2)),
        "here with f = log_β and g = σ, at z^L",
    )
    yield "In the sum c = −Σ_i t_i log_β(a_i^L) only the term i = j depends on a_j^L:"
    text = "dc/da_j^L = −t_j d log_β(a_j^L)/da_j^L"
    hand = {i: f"−{{t[{i}]}}·(1 / ({{p[{i}]}}·ln({{beta}})))" for i in (0, 1)}
    yield loss.derivative("F5, F16", text, a, t, hand=hand)
    yield "E16 stands here again, f: ℝᴺ → ℝ: there is no logarithm of a_j^L ≤ 0."


@section("B", "Softmax derivation")
def softmax_derivation(n: Network) -> Iterator[Item]:
    z, a, chained = n.z2, n.p, n.softmax_cross_entropy
    J, dz = np.squeeze(n.softmax.differences(z)), chained.differences(z, n.t)
    yield "Derivative of a vector function with respect to a vector"
    truth = np.squeeze(n.affine.differences(n.a_square, n.W_square, n.b2))
    yield Slip(
        "E10",
        "dz_j^L/da_k^{L−1}",
        "dy/dx has dy_j/dx_i in row i, column j",
        "dy/dx has dy_i/dx_j in row i, column j, as in section 4's dz^L/da^{L−1} = W^L",
        truth.T,
        truth,
        "shown for the first two hidden nodes. Softmax's own Jacobian is symmetric and hides it",
        shapes=f"of shape {n.W2.T.shape} for {n.W2.shape}",
    )
    yield "Total derivative"
    yield Slip(
        "E11",
        "da_j^L/dz_k^L",
        "da_j^L/dz^L = da_j^L/dz_0^L + da_j^L/dz_1^L; f'(x, y) = f'(x) + f'(y)",
        "da^L/dz^L is the matrix of the da_j^L/dz_k^L, unsummed",
        J.sum(1, keepdims=True),
        J,
        "each of softmax's rows sums to 0: dc/dz^L would be 0, and nothing learn, where it is {}",
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
        "by the letter softmax's numerator has no derivative at all",
    )
    yield "Chain rule"
    yield Slip(
        "E8",
        "dc/dz_j^L",
        "c'(z) = f'(z) + g'(z)",
        "c'(z) = f'(g(z)) g'(z)",
        n.cross_entropy_of_a.differences(a, n.t) + J.sum(0)[:, None],
        dz,
        "here with f = cross entropy and g = softmax, dc/da_j^L + Σ_i da_i^L/dz_j^L",
    )
    yield "Quotient rule, f = e^z_j, g = Σ_i e^z_i: (g e^z_j − e^z_j e^z_j) / g² where j = k,"
    yield "(g 0 − e^z_j e^z_k) / g² where j ≠ k"
    hand = {
        0: "({g}·e^{z2[0]} − e^{z2[0]}·e^{z2[0]}) / {g}²",
        1: "({g}·0 − e^{z2[0]}·e^{z2[1]}) / {g}²",
    }
    text = "da_j^L/dz_k^L = a_j^L (δ_jk − a_k^L)"
    yield n.softmax.derivative("F7, F17", text, z, hand=hand)
    forms = n.jacobian.value("F17", "J_jk = (diag(a^L) (I − 1 (a^L)ᵀ))_jk", z)
    complement = np.eye(len(a)) - np.ones_like(a) @ a.T
    yield replace(forms, columns={**forms.columns, "numerical": J})
    yield Equation("J", "=", np.diagflat(a), "·", complement, "=", n.names["J"])
    yield Slip(
        "E9",
        "J_jk",
        "J = (a_0^L … a_n^L) (I_n − 1 (a^L)ᵀ), a row times a matrix",
        "J = diag(a^L) (I − 1 (a^L)ᵀ)",
        a.T @ complement,
        J,
        "a row, and 0 whatever z^L is: no gradient gets through softmax",
        shapes=product(a.T, complement),
    )


# On paper


@dataclass(frozen=True)
class Paper:
    """Everything as lines of text, numbers with so many digits after the point."""

    digits: int

    def number(self, v: float) -> str:
        text = f"{v:.{self.digits}f}"
        return text.lstrip("-") if float(text) == 0 else text

    def short(self, v: Any) -> str:
        """Within a line: 0.4 for 0.4000, vectors as (1, 2), matrices as [[1, 2], [3, 4]]."""
        v = np.squeeze(v)
        if v.ndim > 1:
            return f"[{', '.join(self.short(row).translate(BRACKETS) for row in v)}]"
        if v.ndim:
            return f"({', '.join(map(self.short, v))})"
        text = self.number(float(v))
        return text.rstrip("0").rstrip(".") if "." in text else text

    def factor(self, v: float) -> str:
        return f"({self.short(v)})" if v < 0 else self.short(v)

    def row(self, row: Row) -> Iterator[str]:
        yield f"  {row.formulas:8} {row.text}"
        shown = {c: None if v is None else np.ravel(v) for c, v in row.columns.items()}
        for i, (name, value) in enumerate(entries(row.name, row.columns["element"])):
            if i in row.hand:
                text, *numbers = row.hand[i]
                by_hand = text.format(*map(self.factor, numbers))
                yield f"           {name} = {by_hand} = {self.short(value)}"
        for i, (name, _) in enumerate(entries(row.name, row.columns["element"])):
            numbers = ("" if v is None else self.number(v[i]) for v in shown.values())
            yield self.cells(f"{'':13}{name}", *numbers)

    def cells(self, label: str, *cells: str) -> str:
        width = max(10, self.digits + 5)
        return (f"{label:40}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip()

    def matrix(self, v: Array) -> list[str]:
        texts = [[self.short(entry) for entry in row] for row in np.atleast_2d(v)]
        width = max(len(text) for row in texts for text in row)
        rows = ["  ".join(text.rjust(width) for text in row) for row in texts]
        if len(rows) == 1:
            return [f"( {rows[0]} )"]
        left = "⎛" + "⎜" * (len(rows) - 2) + "⎝"
        right = "⎞" + "⎟" * (len(rows) - 2) + "⎠"
        return [f"{l} {row} {r}" for l, row, r in zip(left, rows, right, strict=True)]

    def equation(self, equation: Equation) -> Iterator[str]:
        """Side by side, each piece in the middle of the height."""
        blocks = [[p] if isinstance(p, str) else self.matrix(p) for p in equation.pieces]
        height = max(map(len, blocks))
        for y in range(height):
            line = []
            for block in blocks:
                i = y - (height - len(block)) // 2
                line.append(block[i] if 0 <= i < len(block) else " " * len(block[0]))
            yield f"           {' '.join(line)}".rstrip()

    def slip(self, slip: Slip) -> Iterator[str]:
        yield f"  {slip.id + ' slip':8} printed  {slip.printed}"
        yield f"           true     {slip.true}"
        gives, truth = self.short(slip.gives), self.short(slip.truth)
        what = f"{slip.name} = {gives}, but it is {truth}"
        yield from wrapped(f"           gives    {what}; relative error {slip.error:.2g}")
        costs = [slip.misfit, slip.cost.format(*map(self.short, slip.numbers))]
        yield from wrapped(f"           effect   {'; '.join(filter(None, costs))}")

    def item(self, item: Item) -> Iterator[str]:
        if isinstance(item, Row):
            return self.row(item)
        if isinstance(item, Equation):
            return self.equation(item)
        if isinstance(item, Slip):
            return self.slip(item)
        return iter([f"  {item}"])

    def page(self, pages: Pages) -> Iterator[str]:
        yield LEGEND
        for part, items in pages:
            yield ""
            title = f"{part.number} {part.title}"
            yield self.cells(title, *(COLUMNS if any(isinstance(i, Row) for i in items) else ()))
            yield "─" * len(self.cells("", *COLUMNS))
            for item in items:
                yield from self.item(item)

    def slips(self, pages: Pages) -> Iterator[str]:
        head = f"{'slip':5}{'where':7}{'of':20}{'printed':>10}{'true':>10}{'rel. error':>12}  "
        yield f"{LEGEND}\n\n{head}as printed"
        yield "─" * 110
        slips = [(item, part.number) for part, items in pages for item in items]
        slips = [(item, number) for item, number in slips if isinstance(item, Slip)]
        for slip, number in sorted(slips, key=lambda s: int(s[0].id[1:])):
            name, gives, truth = slip.worst
            yield (
                f"{slip.id:5}{number:7}{name:20}{self.number(gives):>10}{self.number(truth):>10}"
                f"{slip.error:12.2g}  {slip.printed}"
            )
            if slip.misfit:
                yield f"{'':66}{slip.misfit}"


Pages = Sequence[tuple[Section, list[Item]]]
BRACKETS = str.maketrans("()", "[]")


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent=" " * 20, break_on_hyphens=False)


def write(which: str | None = None) -> Pages:
    """The sections whose number begins so, with their numbers."""
    n = Network()
    return [(s, list(s.items(n))) for s in SECTIONS if which is None or is_part(s.number, which)]


def is_part(number: str, of: str) -> bool:
    return number == of or number.startswith(f"{of}.")


def check(pages: Pages) -> list[str]:
    """What is wrong, and where."""
    return [
        f"{part.number} {wrong}"
        for part, items in pages
        for item in items
        if not isinstance(item, str)
        for wrong in item.wrong()
    ]


# The picture


RISES, FALLS, INK = "#1f5fa8", "#c0143c", "#14202e"  # what descent does to a weight


def draw(n: Network, paper: Paper) -> Any:
    """Both problems, one above the other, each a graph of the network."""
    from matplotlib.figure import Figure  # here, so that what is printed needs no matplotlib

    figure = Figure(figsize=(13, 15.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.15)
    figure.suptitle("One example through the network and back, all numbers by hand", fontsize=19)
    panels = figure.subplots(2, 1)
    draw_network(panels[0], n, "sigmoid", paper)
    draw_network(panels[1], n, "softmax", paper)
    figure.supxlabel(
        "On an edge: the weight w, and below it dc/dw. Descent makes blue weights larger and red "
        "ones smaller, the thick ones of a layer fastest.",
        fontsize=13,
    )
    return figure


def draw_network(axes: Any, n: Network, output: str, paper: Paper) -> None:
    from matplotlib.patches import FancyBboxPatch

    dx, dW1, db1, dW2, db2 = n.gradients(output)
    a = n.a2 if output == "sigmoid" else n.p
    if output == "sigmoid":
        title = "5.1 Sigmoid and squared error"
        c = n.squared_error.forms.matrix.value(a, n.t)
    else:
        title = f"5.2 Softmax and cross entropy (β = {n.beta:g})"
        c = n.cross_entropy_of_a.forms.matrix.value(a, n.t)
    axes.set_title(f"{title}: c = {paper.short(c)}", fontsize=16, color=INK)
    axes.set(xlim=(-1.5, 13.3), ylim=(-4.6, 4.6), aspect="equal")
    axes.axis("off")
    # At these places the edges of two neighbouring layers are evenly spaced 3/10 of the way from
    # the smaller layer, where their labels stand one above the other.
    places = [[(0, 2), (0, -2)], [(5, 3), (5, 0), (5, -3)], [(10, 2), (10, -2)]]
    for W, dW, near, far, at in ((n.W1, dW1, 0, 1, 0.3), (n.W2, dW2, 1, 2, 0.7)):
        for (to, start), w in np.ndenumerate(W):
            (x0, y0), (x1, y1) = places[near][start], places[far][to]
            d = dW[to, start]
            color = RISES if d < 0 else FALLS
            width = 0.8 + 5 * math.sqrt(abs(d) / np.abs(dW).max())
            axes.plot([x0, x1], [y0, y1], color=color, lw=width, alpha=0.45, zorder=1)
            x, y = x0 + at * (x1 - x0), y0 + at * (y1 - y0)
            gap = {"fc": "white", "ec": "none", "boxstyle": "round,pad=0,rounding_size=0.15"}
            axes.add_patch(FancyBboxPatch((x - 0.52, y - 0.34), 1.04, 0.68, **gap, zorder=2))
            style = {"fontsize": 11.5, "ha": "center", "va": "center", "zorder": 3}
            axes.text(x, y + 0.17, paper.short(w), color=INK, weight="bold", **style)
            axes.text(x, y - 0.18, paper.number(d), color=color, **style)

    layers = (
        ("L-2", n.x, [f"dc/da = {paper.number(d.item())}" for d in dx], "#eef1f5"),
        ("L-1", n.a1, [beside(paper, *v) for v in zip(n.z1, n.b1, db1, strict=True)], "#fdf3e1"),
        ("L", a, [beside(paper, *v) for v in zip(n.z2, n.b2, db2, strict=True)], "#e6f4ea"),
    )
    for nodes, (layer, values, notes, color) in zip(places, layers, strict=True):
        for i, ((x, y), note) in enumerate(zip(nodes, notes, strict=True)):
            axes.scatter(x, y, s=3600, color=color, edgecolors=INK, linewidths=1.3, zorder=3)
            style = {"ha": "center", "va": "center", "color": INK, "zorder": 4}
            axes.text(x, y + 0.2, f"$a_{i}^{{{layer}}}$", fontsize=14, **style)
            axes.text(x, y - 0.22, paper.short(values[i]), fontsize=12.5, weight="bold", **style)
            above = y > 0
            if layer == "L":
                note += f"\n$t_{i}$ = {paper.short(n.t[i])}"
                x, y, style["ha"] = x + 0.75, y, "left"
            else:
                y += 0.7 if above else -0.7
                style["va"] = "bottom" if above else "top"
            axes.text(x, y, note, fontsize=11.5, linespacing=1.35, **style)


def beside(paper: Paper, z: Array, b: Array, d: Array) -> str:
    return f"z = {paper.short(z)}, b = {paper.short(b)}\ndc/dz = dc/db = {paper.number(d.item())}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Neural Network Mathematics with numbers: every formula worked out by hand, "
        "for a network of 2, 3 and 2 nodes and one example.",
        epilog=LEGEND.replace("`", "").replace("\n", " "),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--section", metavar="N", help="print one part, such as 2, 5.1, 5.1.2, A")
    parser.add_argument("--slips", action="store_true", help="print the slips alone, as a table")
    parser.add_argument("--check", action="store_true", help="say whether all columns agree")
    parser.add_argument("--digits", type=int, default=4, help="shown after the point, 1 to 15")
    parser.add_argument(
        "--out", type=Path, default=Path("by_hand_out"), help="the picture's folder"
    )
    args = parser.parse_args(argv)
    numbers = [s.number for s in SECTIONS]
    if args.section and not any(is_part(number, args.section) for number in numbers):
        parser.error(f"--section must be one of {', '.join(numbers)}")
    if not 1 <= args.digits <= 15:
        parser.error("--digits must be from 1 to 15")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    paper, pages = Paper(args.digits), write(args.section)
    if args.check:
        wrong = check(pages)
        rows = [item for _, items in pages for item in items if isinstance(item, Row)]
        numbers = sum(np.size(row.columns["element"]) for row in rows)
        print(*wrong, sep="\n", end="\n" if wrong else "")
        print(f"{numbers} numbers of {len(rows)} quantities: {len(wrong) or 'none'} wrong")
        return 1 if wrong else 0
    print(*(paper.slips(pages) if args.slips else paper.page(pages)), sep="\n")
    if not args.slips and not args.section:
        args.out.mkdir(parents=True, exist_ok=True)
        picture = args.out / "by_hand.png"
        draw(Network(), Paper(min(args.digits, 4))).savefig(picture, dpi=100)
        print(f"\npicture: {picture}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # for ∘ and δ, whatever the terminal's
    sys.exit(main())
