"""The network of 2, 3 and 2 nodes: its numbers, and every formula evaluated on them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from formula import Formula, compose, compose_mean, compose_network, set_base
from items import Array

from torch_nnmath import functional as F
from torch_nnmath import reference as ref


class Network:
    """Names of layer L − 1 end in 1, names of layer L in 2, names of the second example in _."""

    x = ref.column([0.5, -1.0])
    W1 = np.array([[0.4, -0.6], [1.2, 0.2], [-0.8, 0.5]])
    b1 = ref.column([0.1, -0.3, 0.2])
    W2 = np.array([[0.7, -0.5, 0.3], [-0.4, 0.6, 0.9]])
    b2 = ref.column([0.2, -0.1])
    t = ref.column([1.0, 0.5])  # sums to 1.5, as with class weights; a sum of 1 would hide E6
    beta = 2.0  # β = e would hide the factor 1/ln β
    x_, t_ = ref.column([-1.0, 0.5]), ref.column([0.0, 1.0])  # the second example of F3

    def __init__(self) -> None:
        self._define_formulas()
        self.network_inputs = self.x, self.W1, self.b1, self.W2, self.b2, self.t
        self.z1 = ref.AFFINE.matrix.value(self.x, self.W1, self.b1)
        self.a1 = ref.SIGMOID.matrix.value(self.z1)
        self.head_inputs = self.a1, self.W2, self.b2, self.t
        self.z2 = ref.AFFINE.matrix.value(self.a1, self.W2, self.b2)
        self.a2 = ref.SIGMOID.matrix.value(self.z2)
        self.p = ref.SOFTMAX.matrix.value(self.z2)
        self.a2_ = ref.FEEDFORWARD.matrix.value(self.x_, [self.W1, self.W2], [self.b1, self.b2])
        # Layer L with only the first two hidden nodes: W is square, which hides wrong shapes.
        self.W_square, self.a_square = self.W2[:, :2], self.a1[:2]
        self.values.update(
            {k: np.squeeze(v) for k, v in vars(self).items() if isinstance(v, np.ndarray)},
            **{k: np.squeeze(getattr(self, k)) for k in ("x", "W1", "b1", "W2", "b2", "t", "t_")},
            beta=self.beta,
            T=self.t.sum(),
            g=np.exp(self.z2).sum(),
            c=ref.SQUARED_ERROR.matrix.value(self.a2, self.t),
            c_=ref.SQUARED_ERROR.matrix.value(self.a2_, self.t_),
            d2=self.compute_gradients("sigmoid")[4][:, 0],
            da1=self.layer_L.forms.matrix.pullback(1.0, *self.head_inputs)[0][:, 0],
            dp=self.cross_entropy_of_a.forms.matrix.pullback(1.0, self.p, self.t)[0][:, 0],
            J=ref.SOFTMAX_JACOBIAN.matrix.value(self.z2),
        )

    def _define_formulas(self) -> None:
        self.values: dict[str, Any] = {}
        formula, beta = partial(Formula, values=self.values), self.beta
        self.affine = formula(ref.AFFINE, lambda x, W, b: F.linear(x.T, W, b[:, 0]).T)
        self.sigmoid = formula(ref.SIGMOID, F.sigmoid)
        self.tanh = formula(ref.TANH, F.tanh)
        self.relu = formula(ref.RELU, F.relu)
        self.softmax = formula(ref.SOFTMAX, lambda z: F.softmax(z, dim=0))
        self.jacobian = formula(ref.SOFTMAX_JACOBIAN, lambda z: F.softmax_jacobian(z[:, 0], dim=0))
        self.squared_error = formula(ref.SQUARED_ERROR, lambda a, t: F.squared_error(a, t, dim=0))
        targets = torch.tensor(np.hstack([self.t, self.t_]))
        self.mean = formula(
            compose_mean(ref.SQUARED_ERROR, self.t, self.t_),
            lambda a, a_: F.squared_error(torch.hstack([a, a_]), targets, dim=0),
        )
        self.cross_entropy_of_a = self.make_cross_entropy(beta)
        self.sigmoid_squared_error = formula(
            compose(ref.SIGMOID, ref.SQUARED_ERROR),
            lambda z, t: F.sigmoid_squared_error(z, t, dim=0),
        )
        self.layer_L = formula(
            ref.SIGMOID_SQUARED_ERROR,
            lambda x, W, b, t: F.sigmoid_squared_error(F.linear(x.T, W, b[:, 0]), t.T),
        )
        self.net_squared_error = formula(
            compose_network("sigmoid", ref.SQUARED_ERROR),
            lambda x, W1, b1, W2, b2, t: F.squared_error(
                F.feedforward(x.T, [W1, W2], [b1[:, 0], b2[:, 0]]), t.T
            ),
        )
        self.softmax_cross_entropy = formula(
            compose(ref.SOFTMAX, self.cross_entropy_of_a.forms),
            lambda z, t: self.cross_entropy_of_a.library(F.softmax(z, dim=0), t),
        )
        self.cross_entropy = formula(
            set_base(ref.CROSS_ENTROPY, beta),
            lambda z, t: F.cross_entropy(z.T, t.T, base=beta),
        )
        self.head = formula(
            set_base(ref.LINEAR_CROSS_ENTROPY, beta),
            lambda x, W, b, t: F.linear_cross_entropy(x.T, W, t.T, linear_bias=b[:, 0], base=beta),
        )
        self.net_cross_entropy = formula(
            compose_network("softmax", self.cross_entropy_of_a.forms),
            lambda x, W1, b1, W2, b2, t: F.cross_entropy(
                F.feedforward(x.T, [W1, W2], [b1[:, 0], b2[:, 0]], output_activation="identity"),
                t.T,
                base=beta,
            ),
        )

    def make_cross_entropy(self, beta: float) -> Formula:
        return Formula(
            set_base(ref.CATEGORICAL_CROSS_ENTROPY, beta),
            lambda a, t: F.categorical_cross_entropy(a, t, dim=0, base=beta),
            self.values,
        )

    def compute_gradients(self, output_activation: str) -> tuple[Array, ...]:
        """Returns dx, dW1, db1, dW2, db2 for "sigmoid" (5.1) or "softmax" (5.2)."""
        net = self.net_squared_error if output_activation == "sigmoid" else self.net_cross_entropy
        return net.forms.matrix.pullback(1.0, *self.network_inputs)[:5]


def take_diagonal(J: Array) -> Array:
    """Selects dy_j/dx_j from dy_j/dx_k."""
    return np.diagonal(J[:, 0, :, 0])[:, None]


def take_own_weights(J: Array) -> Array:
    """Selects dz_j/dw_jk from dz_i/dw_jk."""
    return np.einsum("jojk->jk", J)


def describe_product(*factors: Array) -> str:
    """Tries a matrix product and describes its shapes."""
    shapes = " · ".join(str(f.shape) for f in factors)
    try:
        return f"{shapes} is {np.linalg.multi_dot(factors).shape}"
    except ValueError:
        return f"{shapes} do not fit"
