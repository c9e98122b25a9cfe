"""The table of formulas: what verification, tests and README read.

A formula is added by adding a row: its ids and place in the document, the Function that holds its
derivative, the call that a user makes, its two reference forms and its inputs. Further samples of
the row are options that change the arithmetic; they are held to numerical differentiation alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_nnmath import formulas, nn, reference
from torch_nnmath import functional as F
from torch_nnmath.reference import Form, Forms

EXAMPLES = 5  # in a batch: unlike the other sizes, so that it can be told from them
CLASSES = 3


class Input(NamedTuple):
    """An input of one example, or one that all examples share."""

    shape: tuple[int, ...]
    # signed: away from 0; class: an index; label: the same, and the first example's is ignored
    kind: Literal["real", "signed", "positive", "class", "label"] = "real"
    shared: bool = False

    def draw(self, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """Random numbers, for a batch of examples unless shared."""
        shape = self.shape if self.shared else (EXAMPLES, *self.shape)
        if self.kind in ("class", "label"):
            y = rng.integers(0, CLASSES, shape)
            if self.kind == "label":
                y[0] = -100
            return y
        if self.kind == "positive":
            return rng.uniform(0.2, 1.2, shape)
        if self.kind == "signed":
            return rng.uniform(0.2, 1.2, shape) * rng.choice([-1.0, 1.0], shape)
        return rng.normal(size=shape)


@dataclass(frozen=True)
class Sample:
    """A call and its inputs.

    A batch of examples goes in, a value each or their mean comes out; if all inputs are shared,
    they are one example.
    """

    call: Callable[..., Tensor]
    inputs: Mapping[str, Input]
    name: str = ""

    def draw(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
        """A tensor for each input: float64 that requires gradients, or class indices."""
        rng = np.random.default_rng(seed)
        drawn = (torch.tensor(i.draw(rng), device=device) for i in self.inputs.values())
        return tuple(x.requires_grad_(x.is_floating_point()) for x in drawn)

    def on(self, device: str) -> Callable[..., Tensor]:
        """The call; a module is moved there."""
        if isinstance(self.call, torch.nn.Module):
            return copy.deepcopy(self.call).to(device)
        return self.call

    @property
    def is_batch(self) -> bool:
        """Whether several examples go in."""
        return not all(i.shared for i in self.inputs.values())


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


def _each(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return partial(loss, reduction="none", **options)


def _weighted(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A loss whose last input is its weight."""

    def call(*inputs: Tensor) -> Tensor:
        *others, w = inputs
        return loss(*others, weight=w, **options)

    return call


def _head(x: Tensor, W: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    """The head with its bias among the positions: (x, W, target) or (x, W, b, target)."""
    *bias, t = rest
    return F.linear_cross_entropy(x, W, t, linear_bias=bias[0] if bias else None, **options)


def _scale(x: Tensor, s: Tensor) -> Tensor:
    return formulas.LogitScale.evaluate(x, s.squeeze())


def _log_probs(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Of class 1, to base 2."""
    y = torch.ones(x.shape[:1], dtype=torch.int64, device=x.device)
    return F.linear_log_probs(x, W, y, linear_bias=b, base=2)


def _scaled_head(x: Tensor, W: Tensor, b: Tensor, t: Tensor, s: Tensor, **options: Any) -> Tensor:
    return _head(x, W, b, t, logit_scale=s.squeeze(), **options)


def _module(kind: Callable[..., torch.nn.Module], *sizes: Any, **options: Any) -> torch.nn.Module:
    """A module in float64, always with the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*sizes, **options).double()


def _mean(c: Tensor) -> Tensor:
    return formulas.Cost.evaluate(c, torch.full((), c.shape[0], dtype=c.dtype, device=c.device))


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


_LOGITS = {"z": _vector(CLASSES)}
_PROBABILITIES = {"t": _vector(CLASSES, "positive")}
_LABELS = {"y": Input((), "label")}
_HEAD = {"x": _vector(2), **_layer(2, CLASSES)}
_CLASS_WEIGHT = {"w": Input((CLASSES,), "positive", shared=True)}
_SCALE = {"s": Input((1,), "positive", shared=True)}
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
            Sample(_module(nn.Linear, 3, 2), {"x": _vector(3)}, "module"),
        ),
        ("E3", "E4", "E12"),
    ),
    Row(
        ("F2",),
        "1",
        "tanh",
        formulas.Tanh,
        reference.TANH,
        (
            Sample(F.tanh, {"z": _vector(3)}),
            Sample(nn.Tanh(), {"z": _vector(3)}, "module"),
        ),
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
            Sample(nn.ReLU(), {"z": _vector(4, "signed")}, "module"),
        ),
    ),
    Row(
        ("F3",),
        "2",
        "cost of a batch",
        formulas.Cost,
        reference.COST,
        (
            Sample(_mean, {"c": Input((4,), shared=True)}),
            Sample(
                formulas.Cost.evaluate,
                {"c": Input((4,), shared=True), "n": Input((), "positive", shared=True)},
                "total weight",
            ),
        ),
        ("E15",),
    ),
    Row(
        ("F4",),
        "2.1",
        "squared error",
        formulas.SquaredError,
        reference.SQUARED_ERROR,
        (
            Sample(_each(F.squared_error), {"a": _vector(3), "t": _vector(3)}),
            Sample(nn.SquaredErrorLoss(), {"a": _vector(3), "t": _vector(3)}, "module, mean"),
            Sample(nn.MSELoss(), {"a": _vector(3), "t": _vector(3)}, "mean squared error"),
            Sample(
                _weighted(F.mse_loss),
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
                _each(F.categorical_cross_entropy, base=2),
                {"a": _vector(CLASSES, "positive"), **_PROBABILITIES},
            ),
            Sample(
                _each(F.categorical_cross_entropy),
                {"a": _vector(CLASSES, "positive"), "y": Input((), "class")},
                "class indices",
            ),
            Sample(
                nn.CategoricalCrossEntropyLoss(base=10),
                {"a": _vector(CLASSES, "positive"), "y": Input((), "class")},
                "module, class indices, mean",
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
        (
            Sample(F.sigmoid, {"z": _vector(3)}),
            Sample(nn.Sigmoid(), {"z": _vector(3)}, "module"),
        ),
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
            Sample(nn.Softmax(-1), {"z": _vector(3)}, "module"),
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
            Sample(
                nn.SigmoidSquaredErrorLoss(reduction="sum"),
                {"z": _vector(2), "t": _vector(2)},
                "module, sum",
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
            Sample(_module(nn.Feedforward, (3, 2, 2)), {"x": _vector(3)}, "module"),
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
            Sample(_each(F.cross_entropy, base=2), {**_LOGITS, **_PROBABILITIES}),
            Sample(_each(F.cross_entropy), {**_LOGITS, **_LABELS}, "class indices"),
            Sample(
                _weighted(F.cross_entropy, label_smoothing=0.2, base=10),
                {**_LOGITS, **_LABELS, **_CLASS_WEIGHT},
                "indices, weights, smoothing, mean",
            ),
            Sample(
                _weighted(F.cross_entropy, label_smoothing=0.2, reduction="sum"),
                {**_LOGITS, **_PROBABILITIES, **_CLASS_WEIGHT},
                "probabilities, weights, smoothing, sum",
            ),
            Sample(
                F.cross_entropy,
                {"z": Input((CLASSES, 2)), "y": Input((2,), "label")},
                "K-dimensional, mean",
            ),
            Sample(nn.CrossEntropyLoss(), {**_LOGITS, **_LABELS}, "module, mean"),
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
            Sample(_each(_head, base=2), {**_HEAD, **_PROBABILITIES}),
            Sample(_each(_head), {**_HEAD, **_LABELS}, "class indices"),
            Sample(
                _weighted(_head, label_smoothing=0.2, base=10),
                {**_HEAD, **_LABELS, **_CLASS_WEIGHT},
                "indices, weights, smoothing, mean",
            ),
            Sample(
                _weighted(_head, label_smoothing=0.2, reduction="sum"),
                {"x": _vector(2), "W": _HEAD["W"], **_PROBABILITIES, **_CLASS_WEIGHT},
                "probabilities, weights, smoothing, no bias, sum",
            ),
            Sample(
                _head,
                {
                    "x": _vector(2),
                    "W": Input((CLASSES, 2, 2), shared=True),
                    "y": Input((2,), "label"),
                },
                "K-dimensional, mean",
            ),
            Sample(
                _module(nn.LinearCrossEntropyLoss, 2, CLASSES),
                {"x": _vector(2), **_LABELS},
                "module, mean",
            ),
        ),
        ("E6", "E7"),
        {"beta": 2},
    ),
    Row(
        ("F18",),
        "head",
        "logit scale",
        formulas.LogitScale,
        reference.LOGIT_SCALE,
        (
            Sample(_scale, {"x": _vector(3), **_SCALE}),
            Sample(lambda x: formulas.LogitScale.evaluate(x, -0.7), {"x": _vector(3)}, "a number"),
        ),
    ),
    Row(
        ("F19",),
        "head",
        "soft cap",
        formulas.SoftCap,
        reference.SOFTCAP,
        (Sample(lambda z: formulas.SoftCap.evaluate(z, 1.5), {"z": _vector(3)}),),
        options={"cap": 1.5},
    ),
    Row(
        ("F20",),
        "head",
        "z-loss",
        formulas.ZLoss,
        reference.Z_LOSS,
        (
            Sample(lambda z: formulas.ZLoss.evaluate(z, 1).squeeze(1), _LOGITS),
            Sample(_each(F.cross_entropy, z_loss=0.3), {**_LOGITS, **_LABELS}, "in cross entropy"),
        ),
    ),
    Row(
        ("F21",),
        "head",
        "entropy of softmax",
        formulas.Entropy,
        reference.ENTROPY,
        (
            Sample(lambda z: formulas.Entropy.evaluate(z, 1, 2).squeeze(1), _LOGITS),
            Sample(
                lambda x, W, b, y: F.linear_log_probs(
                    x, W, y, linear_bias=b, softcap=1.5, return_entropy=True
                )[1],
                {**_HEAD, **_LABELS},
                "of the head, capped",
            ),
        ),
        options={"beta": 2},
    ),
    Row(
        ("F22",),
        "head",
        "log-probability of a class",
        formulas.LinearCrossEntropy,
        reference.LINEAR_LOG_PROBS,
        (
            Sample(_log_probs, _HEAD),
            Sample(
                lambda x, W, y: sum(F.linear_log_probs(x, W, y, return_entropy=True)),
                {"x": _vector(2), "W": _HEAD["W"], **_LABELS},
                "and the entropy, no bias",
            ),
        ),
        options={"y": 1, "beta": 2},
    ),
    Row(
        ("F23",),
        "head",
        "scaled and capped head with z-loss",
        formulas.LinearCrossEntropy,
        reference.SCALED_HEAD,
        (
            Sample(
                _each(_scaled_head, base=2, softcap=1.5, z_loss=0.3),
                {**_HEAD, **_PROBABILITIES, **_SCALE},
            ),
            Sample(
                partial(_scaled_head, softcap=1.5, z_loss=0.3),
                {**_HEAD, **_LABELS, **_SCALE},
                "class indices, mean",
            ),
            Sample(
                lambda x, W, b, y, w: _head(
                    x, W, b, y, weight=w, label_smoothing=0.2, z_loss=0.3, logit_scale=-0.7
                ),
                {**_HEAD, **_LABELS, **_CLASS_WEIGHT},
                "indices, weights, smoothing, no cap, mean",
            ),
            Sample(
                lambda z, y, s: F.cross_entropy(
                    z, y, logit_scale=s.squeeze(), softcap=1.5, z_loss=0.3
                ),
                {**_LOGITS, **_LABELS, **_SCALE},
                "on logits, mean",
            ),
            Sample(
                _module(
                    nn.LinearCrossEntropyLoss,
                    *(2, CLASSES),
                    logit_scale=torch.nn.Parameter(torch.tensor(0.7)),
                    softcap=1.5,
                    z_loss=0.3,
                ),
                {"x": _vector(2), **_LABELS},
                "module, learnt scale, mean",
            ),
        ),
        options={"beta": 2, "cap": 1.5, "zeta": 0.3},
    ),
)
