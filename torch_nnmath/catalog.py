"""The table of formulas: what verification, tests and README read.

A formula is added by adding a row: its ids and place in the document, the Function that holds its
derivative, the call that a user makes, its two reference forms and its inputs. Further samples of
the row are options that change the arithmetic; they are held to numerical differentiation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_nnmath import formulas, reference
from torch_nnmath import functional as F
from torch_nnmath.reference import Form, Forms

EXAMPLES = 3  # in a batch


class Input(NamedTuple):
    """An input of one example, or one that all examples share."""

    shape: tuple[int, ...]
    kind: Literal["real", "signed", "positive"] = "real"  # signed: away from 0
    shared: bool = False

    def draw(self, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """Random numbers, for a batch of examples unless shared."""
        shape = self.shape if self.shared else (EXAMPLES, *self.shape)
        if self.kind == "positive":
            return rng.uniform(0.2, 1.2, shape)
        if self.kind == "signed":
            return rng.uniform(0.2, 1.2, shape) * rng.choice([-1.0, 1.0], shape)
        return rng.normal(size=shape)


@dataclass(frozen=True)
class Sample:
    """A call and its differentiable inputs: a batch of examples goes in, a value each comes out."""

    call: Callable[..., Tensor]
    inputs: Mapping[str, Input]
    name: str = ""

    def draw(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
        """float64 tensors that require gradients, one for each input."""
        rng = np.random.default_rng(seed)
        drawn = (torch.tensor(i.draw(rng), device=device) for i in self.inputs.values())
        return tuple(x.requires_grad_() for x in drawn)


@dataclass(frozen=True)
class Row:
    """A formula; `options` are those of its reference forms in the first sample."""

    ids: tuple[str, ...]
    section: str
    title: str
    function: type[torch.autograd.Function]
    reference: Forms
    samples: tuple[Sample, ...]
    slips: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{' '.join(self.ids)} {self.title}"


def _vector(n: int, kind: Literal["real", "signed", "positive"] = "real") -> Input:
    return Input((n,), kind)


def _layer(n_in: int, n_out: int, tag: str = "") -> dict[str, Input]:
    return {f"W{tag}": Input((n_out, n_in), shared=True), f"b{tag}": Input((n_out,), shared=True)}


def _indices(*y: int) -> Tensor:
    return torch.tensor(y)


def _loss(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return partial(function, **{"reduction": "none", **options})


def _with_indices(function: Callable[..., Tensor], y: Tensor, **options: Any) -> Any:
    """A loss of everything but its target, which is y."""

    def call(*inputs: Tensor) -> Tensor:
        return _loss(function, **options)(*inputs, y.to(inputs[0].device))

    return call


def _with_class_weight(function: Callable[..., Tensor], y: Tensor, **options: Any) -> Any:
    """The same; the last input is the class weight."""

    def call(*inputs: Tensor) -> Tensor:
        *first, w = inputs
        return _with_indices(function, y, weight=w, **options)(*first)

    return call


def _head(x: Tensor, W: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    """The head with its bias among the positions: (x, W, target) or (x, W, b, target)."""
    *bias, t = rest
    return F.linear_cross_entropy(x, W, t, linear_bias=bias[0] if bias else None, **options)


def _costs(c: Tensor) -> Tensor:
    """The cost of each row of losses."""
    return torch.stack([formulas.Cost.of(row, row.new_tensor(len(row))) for row in c])


def _network(x: Tensor, *parameters: Tensor, **options: str) -> Tensor:
    return F.feedforward(x, parameters[::2], parameters[1::2], **options)


def _flat(form: Form) -> Form:
    """The reference network with its parameters one after the other: W1, b1, W2, b2."""

    def rule(x: Any, *parameters: Any, **options: Any) -> Any:
        value, pull = form.rule(x, parameters[::2], parameters[1::2], **options)

        def pullback(g: Any) -> Any:
            dx, dWs, dbs = pull(g)
            return dx, *(d for pair in zip(dWs, dbs, strict=True) for d in pair)

        return value, pullback

    return Form(rule)


_Y = _indices(2, 0, 1)
_IGNORED = _indices(2, -100, 1)
_LOGITS = {"z": _vector(3)}
_HEAD = {"x": _vector(2), **_layer(2, 3)}
_CLASS_WEIGHT = {"w": Input((3,), "positive", shared=True)}
_NETWORK = {"x": _vector(3), **_layer(3, 2, "1"), **_layer(2, 2, "2")}

CATALOG: tuple[Row, ...] = (
    Row(
        ("F1", "F8"),
        "1, 4",
        "affine map",
        formulas.Affine,
        reference.AFFINE,
        (
            Sample(F.linear, {"x": _vector(3), **_layer(3, 2)}),
            Sample(
                lambda x, W: F.linear(x, W), {"x": _vector(3), "W": _layer(3, 2)["W"]}, "no bias"
            ),
        ),
        ("E3", "E4", "E12"),
    ),
    Row(
        ("F2",),
        "1",
        "tanh",
        formulas.Tanh,
        reference.TANH,
        (Sample(F.tanh, {"z": _vector(3)}),),
    ),
    Row(
        ("F2",),
        "1",
        "relu",
        formulas.ReLU,
        reference.RELU,
        (
            Sample(F.relu, {"z": _vector(4, "signed")}),
            Sample(lambda z: F.relu(z * 1, inplace=True), {"z": _vector(4, "signed")}, "in place"),
        ),
    ),
    Row(
        ("F3",),
        "2",
        "cost of a batch",
        formulas.Cost,
        reference.COST,
        (Sample(_costs, {"c": _vector(4)}),),
        ("E15",),
    ),
    Row(
        ("F4",),
        "2.1",
        "squared error",
        formulas.SquaredError,
        reference.SQUARED_ERROR,
        (
            Sample(_loss(F.squared_error), {"a": _vector(3), "t": _vector(3)}),
            Sample(F.mse_loss, {"a": _vector(3), "t": _vector(3)}, "mean squared error"),
            Sample(
                lambda a, t, w: F.mse_loss(a, t, weight=w),
                {"a": _vector(3), "t": _vector(3), "w": _vector(3, "positive")},
                "mean squared error, weighted",
            ),
        ),
        ("E1", "E2", "E15"),
    ),
    Row(
        ("F5", "F16"),
        "2.2, A",
        "cross entropy of probabilities",
        formulas.CategoricalCrossEntropy,
        reference.CATEGORICAL_CROSS_ENTROPY,
        (
            Sample(
                _loss(F.categorical_cross_entropy, base=2),
                {"a": _vector(3, "positive"), "t": _vector(3, "positive")},
            ),
            Sample(
                _with_indices(F.categorical_cross_entropy, _Y),
                {"a": _vector(3, "positive")},
                "class indices",
            ),
        ),
        ("E8", "E16"),
        {"beta": 2},
    ),
    Row(
        ("F6",),
        "3.1",
        "sigmoid",
        formulas.Sigmoid,
        reference.SIGMOID,
        (Sample(F.sigmoid, {"z": _vector(3)}),),
        ("E14",),
    ),
    Row(
        ("F7",),
        "3.2, B",
        "softmax",
        formulas.Softmax,
        reference.SOFTMAX,
        (
            Sample(partial(F.softmax, dim=-1), {"z": _vector(3)}),
            Sample(partial(F.softmax, dim=1), {"z": Input((3, 2))}, "middle axis"),
        ),
        ("E10", "E11"),
    ),
    Row(
        ("F17",),
        "B",
        "softmax's Jacobian",
        formulas.Softmax,
        reference.SOFTMAX_JACOBIAN,
        (Sample(partial(F.softmax_jacobian, dim=-1), {"z": _vector(3)}),),
        ("E9", "E10", "E11"),
    ),
    Row(
        ("F9", "F11"),
        "5.1, layer L",
        "affine, sigmoid, squared error",
        formulas.SigmoidSquaredError,
        reference.SIGMOID_SQUARED_ERROR,
        (
            Sample(
                lambda x, W, b, t: F.sigmoid_squared_error(F.linear(x, W, b), t, reduction="none"),
                {"x": _vector(3), **_layer(3, 2), "t": _vector(2)},
            ),
            Sample(
                partial(F.sigmoid_squared_error, dim=(1, 2)),
                {"z": Input((2, 2)), "t": Input((2, 2))},
                "two axes, mean",
            ),
        ),
        ("E1", "E14"),
    ),
    Row(
        ("F10", "F12"),
        "5.1, earlier layers",
        "feed-forward network",
        formulas.Feedforward,
        Forms(_flat(reference.FEEDFORWARD.element), _flat(reference.FEEDFORWARD.matrix)),
        (
            Sample(_network, _NETWORK),
            Sample(
                partial(_network, activation="tanh", output_activation="softmax"),
                {**_NETWORK, **_layer(2, 2, "3")},
                "three layers, tanh and softmax",
            ),
            Sample(
                partial(_network, activation="relu", output_activation="identity"),
                _NETWORK,
                "relu and identity",
            ),
        ),
        ("E5", "E13"),
    ),
    Row(
        ("F13",),
        "5.2",
        "softmax, cross entropy",
        formulas.CrossEntropy,
        reference.CROSS_ENTROPY,
        (
            Sample(_loss(F.cross_entropy, base=2), {**_LOGITS, "t": _vector(3, "positive")}),
            Sample(_with_indices(F.cross_entropy, _IGNORED), _LOGITS, "class indices"),
            Sample(
                _with_class_weight(
                    F.cross_entropy, _IGNORED, label_smoothing=0.2, base=10, reduction="mean"
                ),
                {**_LOGITS, **_CLASS_WEIGHT},
                "indices, weights, smoothing, mean",
            ),
            Sample(
                lambda z, t, w: F.cross_entropy(z, t, w, label_smoothing=0.2),
                {**_LOGITS, "t": _vector(3, "positive"), **_CLASS_WEIGHT},
                "probabilities, weights, smoothing",
            ),
            Sample(
                _with_indices(F.cross_entropy, torch.tensor([[2, 0], [1, -100], [2, 2]])),
                {"z": Input((3, 2))},
                "K-dimensional",
            ),
        ),
        ("E6", "E7"),
        {"beta": 2},
    ),
    Row(
        ("F14", "F15"),
        "5.2, layer L",
        "affine, softmax, cross entropy",
        formulas.LinearCrossEntropy,
        reference.LINEAR_CROSS_ENTROPY,
        (
            Sample(_loss(_head, base=2), {**_HEAD, "t": _vector(3, "positive")}),
            Sample(_with_indices(_head, _IGNORED), _HEAD, "class indices"),
            Sample(
                _with_class_weight(_head, _IGNORED, label_smoothing=0.2, base=10, reduction="mean"),
                {**_HEAD, **_CLASS_WEIGHT},
                "indices, weights, smoothing, mean",
            ),
            Sample(
                lambda x, W, t, w: _head(x, W, t, weight=w, label_smoothing=0.2),
                {
                    "x": _vector(2),
                    "W": _HEAD["W"],
                    "t": _vector(3, "positive"),
                    **_CLASS_WEIGHT,
                },
                "probabilities, weights, smoothing, no bias",
            ),
            Sample(
                _with_indices(_head, torch.tensor([[2, 0], [1, -100], [2, 2]])),
                {"x": _vector(2), "W": Input((3, 2, 2), shared=True)},
                "K-dimensional",
            ),
        ),
        ("E6", "E7"),
        {"beta": 2},
    ),
)
