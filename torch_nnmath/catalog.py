"""The catalogue of formulas, which verification, tests and README read.

Each row is a formula: its ids and place in the document, the Function that holds its derivative,
its two reference forms, and samples of the public call. The first sample computes what the
reference forms compute. The others vary the call's options, and are compared with numerical
differentiation only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import formulas, nn, reference
from torch_nnmath import functional as F
from torch_nnmath._catalog_rows import (
    CLASSES,
    EXAMPLES,
    Input,
    Row,
    Sample,
    layer,
    make_module,
    per_example,
    vector,
)
from torch_nnmath._divergence_rows import DIVERGENCE_ROWS
from torch_nnmath._records import Target
from torch_nnmath.reference import Form, Forms
from torch_nnmath.reference_losses import WEIGHTED_COST
from torch_nnmath.reference_shards import SPLIT_LOG_SUM_EXP

__all__ = ["CATALOG", "CLASSES", "EXAMPLES", "Input", "Row", "Sample"]

# Calls with positional tensors only


def _with_weight(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Returns the loss with its weight as the last input."""

    def compute_loss(*inputs: Tensor) -> Tensor:
        *others, w = inputs
        return loss(*others, weight=w, **options)

    return compute_loss


def _compute_head_loss(x: Tensor, W: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    """Calls the head with (x, W, target) or (x, W, b, target)."""
    *bias, t = rest
    return F.linear_cross_entropy(x, W, t, linear_bias=bias[0] if bias else None, **options)


def _compute_scaled_head_loss(
    x: Tensor, W: Tensor, b: Tensor, t: Tensor, s: Tensor, **options: Any
) -> Tensor:
    return _compute_head_loss(x, W, b, t, logit_scale=s.squeeze(), **options)


def _compute_log_probs(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Computes the log-probabilities of class 1, to base 2."""
    y = torch.ones(x.shape[:1], dtype=torch.int64, device=x.device)
    return F.linear_log_probs(x, W, y, linear_bias=b, base=2)


def _compute_split_loss(z: Tensor, t: Tensor) -> Tensor:
    """Computes F13 of one rank's classes, with weight 0.5 for class 1 beside t, to base 2."""
    y = torch.ones_like(z[:, :1], dtype=torch.int64)
    target = Target(y, z.new_full((), 0.5), t, -1)
    return formulas.compute_split_rows(z, target, None, 2.0, None)[0].squeeze(1)


def _scale_logits(x: Tensor, s: Tensor) -> Tensor:
    return formulas.LogitScale.evaluate(x, s.squeeze())


def _average(c: Tensor) -> Tensor:
    return formulas.Cost.evaluate(
        c, torch.full((), c.shape[0], dtype=c.dtype, device=c.device), None
    )


def _average_weighted(c: Tensor, r: Tensor) -> Tensor:
    return formulas.Cost.evaluate(c, r.sum(), r)


def _with_row_weight(loss: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    """Returns the loss with the weight of each row as the last input."""

    def compute_loss(*inputs: Tensor) -> Any:
        *others, r = inputs
        return loss(*others, row_weight=r, **options)

    return compute_loss


def _run_network(x: Tensor, *parameters: Tensor, **options: str) -> Tensor:
    return F.feedforward(x, parameters[::2], parameters[1::2], **options)


def _flatten_parameters(form: Form) -> Form:
    """Returns the reference network with its parameters as W1, b1, W2, b2, ..."""

    def rule(x: Any, *parameters: Any, **options: Any) -> Any:
        value, nested_pullback = form.rule(x, parameters[::2], parameters[1::2], **options)

        def pullback(g: Any) -> Any:
            dx, dWs, dbs = nested_pullback(g)
            return dx, *(d for pair in zip(dWs, dbs, strict=True) for d in pair)

        return value, pullback

    return Form(rule)


_LOGITS = {"z": vector(CLASSES)}
_PROBABILITIES = {"t": vector(CLASSES, "positive")}
_LABELS = {"y": Input((), "label")}
_HEAD = {"x": vector(2), **layer(2, CLASSES)}
_CLASS_WEIGHT = {"w": Input((CLASSES,), "positive", shared=True)}
_ROW_WEIGHT = {"r": Input((), "positive")}
_SCALE = {"s": Input((1,), "positive", shared=True)}
_NETWORK = {"x": vector(3), **layer(3, 2, "1"), **layer(2, 2, "2")}

CATALOG: tuple[Row, ...] = (
    Row(
        ids=("F1", "F8"),
        section="1, 4",
        title="affine map",
        function=formulas.Affine,
        reference=reference.AFFINE,
        samples=(
            Sample(F.linear, {"x": vector(3), **layer(3, 2)}),
            Sample(lambda x, W: F.linear(x, W), {"x": vector(3), "W": layer(3, 2)["W"]}, "no bias"),
            Sample(make_module(nn.Linear, 3, 2), {"x": vector(3)}, "module"),
        ),
        slips=("E3", "E4", "E12"),
    ),
    Row(
        ids=("F2",),
        section="1",
        title="tanh",
        function=formulas.Tanh,
        reference=reference.TANH,
        samples=(
            Sample(F.tanh, {"z": vector(3)}),
            Sample(nn.Tanh(), {"z": vector(3)}, "module"),
        ),
    ),
    Row(
        ids=("F2",),
        section="1",
        title="relu",
        function=formulas.ReLU,
        reference=reference.RELU,
        samples=(
            Sample(F.relu, {"z": vector(4, "signed")}),
            Sample(lambda z: F.relu(z * 1, inplace=True), {"z": vector(4, "signed")}, "in place"),
            Sample(nn.ReLU(), {"z": vector(4, "signed")}, "module"),
        ),
    ),
    Row(
        ids=("F3",),
        section="2",
        title="cost of a batch",
        function=formulas.Cost,
        reference=reference.COST,
        samples=(
            Sample(_average, {"c": Input((4,), shared=True)}),
            Sample(
                lambda c, n: formulas.Cost.evaluate(c, n, None),
                {"c": Input((4,), shared=True), "n": Input((), "positive", shared=True)},
                "total weight",
            ),
        ),
        slips=("E15",),
    ),
    Row(
        ids=("F4",),
        section="2.1",
        title="squared error",
        function=formulas.SquaredError,
        reference=reference.SQUARED_ERROR,
        samples=(
            Sample(per_example(F.squared_error), {"a": vector(3), "t": vector(3)}),
            Sample(nn.SquaredErrorLoss(), {"a": vector(3), "t": vector(3)}, "module, mean"),
            Sample(nn.MSELoss(), {"a": vector(3), "t": vector(3)}, "mean squared error"),
            Sample(
                _with_weight(F.mse_loss),
                {"a": vector(3), "t": vector(3), "w": vector(3, "positive")},
                "mean squared error, weighted",
            ),
        ),
        slips=("E1", "E2", "E15"),
    ),
    Row(
        ids=("F5", "F16"),
        section="2.2, A",
        title="cross entropy of probabilities",
        function=formulas.CategoricalCrossEntropy,
        reference=reference.CATEGORICAL_CROSS_ENTROPY,
        samples=(
            Sample(
                per_example(F.categorical_cross_entropy, base=2),
                {"a": vector(CLASSES, "positive"), **_PROBABILITIES},
            ),
            Sample(
                per_example(F.categorical_cross_entropy),
                {"a": vector(CLASSES, "positive"), "y": Input((), "class")},
                "class indices",
            ),
            Sample(
                nn.CategoricalCrossEntropyLoss(base=10),
                {"a": vector(CLASSES, "positive"), "y": Input((), "class")},
                "module, class indices, mean",
            ),
        ),
        slips=("E8", "E16"),
        options={"beta": 2},
    ),
    Row(
        ids=("F6",),
        section="3.1",
        title="sigmoid",
        function=formulas.Sigmoid,
        reference=reference.SIGMOID,
        samples=(
            Sample(F.sigmoid, {"z": vector(3)}),
            Sample(nn.Sigmoid(), {"z": vector(3)}, "module"),
        ),
        slips=("E14",),
    ),
    Row(
        ids=("F7",),
        section="3.2, B",
        title="softmax",
        function=formulas.Softmax,
        reference=reference.SOFTMAX,
        samples=(
            Sample(partial(F.softmax, dim=-1), {"z": vector(3)}),
            Sample(partial(F.softmax, dim=1), {"z": Input((3, 2))}, "middle axis"),
            Sample(nn.Softmax(-1), {"z": vector(3)}, "module"),
        ),
        slips=("E10", "E11"),
    ),
    Row(
        ids=("F17",),
        section="B",
        title="softmax's Jacobian",
        function=formulas.Softmax,
        reference=reference.SOFTMAX_JACOBIAN,
        samples=(Sample(partial(F.softmax_jacobian, dim=-1), {"z": vector(3)}),),
        slips=("E9", "E10", "E11"),
    ),
    Row(
        ids=("F9", "F11"),
        section="5.1, layer L",
        title="affine, sigmoid, squared error",
        function=formulas.SigmoidSquaredError,
        reference=reference.SIGMOID_SQUARED_ERROR,
        samples=(
            Sample(
                lambda x, W, b, t: F.sigmoid_squared_error(F.linear(x, W, b), t, reduction="none"),
                {"x": vector(3), **layer(3, 2), "t": vector(2)},
            ),
            Sample(
                partial(F.sigmoid_squared_error, dim=(1, 2)),
                {"z": Input((2, 2)), "t": Input((2, 2))},
                "two axes, mean",
            ),
            Sample(
                nn.SigmoidSquaredErrorLoss(reduction="sum"),
                {"z": vector(2), "t": vector(2)},
                "module, sum",
            ),
        ),
        slips=("E1", "E14"),
    ),
    Row(
        ids=("F10", "F12"),
        section="5.1, earlier layers",
        title="feed-forward network",
        function=formulas.Feedforward,
        reference=Forms(
            _flatten_parameters(reference.FEEDFORWARD.element),
            _flatten_parameters(reference.FEEDFORWARD.matrix),
        ),
        samples=(
            Sample(_run_network, _NETWORK),
            Sample(
                partial(_run_network, activation="tanh", output_activation="softmax"),
                {**_NETWORK, **layer(2, 2, "3")},
                "three layers, tanh and softmax",
            ),
            Sample(
                partial(_run_network, activation="relu", output_activation="identity"),
                _NETWORK,
                "relu and identity",
            ),
            Sample(make_module(nn.Feedforward, (3, 2, 2)), {"x": vector(3)}, "module"),
        ),
        slips=("E5", "E13"),
    ),
    Row(
        ids=("F13",),
        section="5.2",
        title="softmax, cross entropy",
        function=formulas.CrossEntropy,
        reference=reference.CROSS_ENTROPY,
        samples=(
            Sample(per_example(F.cross_entropy, base=2), {**_LOGITS, **_PROBABILITIES}),
            Sample(per_example(F.cross_entropy), {**_LOGITS, **_LABELS}, "class indices"),
            Sample(
                _with_weight(F.cross_entropy, label_smoothing=0.2, base=10),
                {**_LOGITS, **_LABELS, **_CLASS_WEIGHT},
                "indices, weights, smoothing, mean",
            ),
            Sample(
                _with_weight(F.cross_entropy, label_smoothing=0.2, reduction="sum"),
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
        slips=("E6", "E7"),
        options={"beta": 2},
    ),
    Row(
        ids=("F14", "F15"),
        section="5.2, layer L",
        title="affine, softmax, cross entropy",
        function=formulas.LinearCrossEntropy,
        reference=reference.LINEAR_CROSS_ENTROPY,
        samples=(
            Sample(per_example(_compute_head_loss, base=2), {**_HEAD, **_PROBABILITIES}),
            Sample(per_example(_compute_head_loss), {**_HEAD, **_LABELS}, "class indices"),
            Sample(
                _with_weight(_compute_head_loss, label_smoothing=0.2, base=10),
                {**_HEAD, **_LABELS, **_CLASS_WEIGHT},
                "indices, weights, smoothing, mean",
            ),
            Sample(
                _with_weight(_compute_head_loss, label_smoothing=0.2, reduction="sum"),
                {"x": vector(2), "W": _HEAD["W"], **_PROBABILITIES, **_CLASS_WEIGHT},
                "probabilities, weights, smoothing, no bias, sum",
            ),
            Sample(
                _compute_head_loss,
                {
                    "x": vector(2),
                    "W": Input((CLASSES, 2, 2), shared=True),
                    "y": Input((2,), "label"),
                },
                "K-dimensional, mean",
            ),
            Sample(
                make_module(nn.LinearCrossEntropyLoss, 2, CLASSES),
                {"x": vector(2), **_LABELS},
                "module, mean",
            ),
        ),
        slips=("E6", "E7"),
        options={"beta": 2},
    ),
    Row(
        ids=("F18",),
        section="head",
        title="logit scale",
        function=formulas.LogitScale,
        reference=reference.LOGIT_SCALE,
        samples=(
            Sample(_scale_logits, {"x": vector(3), **_SCALE}),
            Sample(lambda x: formulas.LogitScale.evaluate(x, -0.7), {"x": vector(3)}, "a number"),
        ),
    ),
    Row(
        ids=("F19",),
        section="head",
        title="soft cap",
        function=formulas.SoftCap,
        reference=reference.SOFTCAP,
        samples=(Sample(lambda z: formulas.SoftCap.evaluate(z, 1.5), {"z": vector(3)}),),
        options={"cap": 1.5},
    ),
    Row(
        ids=("F20",),
        section="head",
        title="z-loss",
        function=formulas.ZLoss,
        reference=reference.Z_LOSS,
        samples=(
            Sample(lambda z: formulas.ZLoss.evaluate(z, 1).squeeze(1), _LOGITS),
            Sample(
                per_example(F.cross_entropy, z_loss=0.3),
                {**_LOGITS, **_LABELS},
                "in cross entropy",
            ),
        ),
    ),
    Row(
        ids=("F21",),
        section="head",
        title="entropy of softmax",
        function=formulas.Entropy,
        reference=reference.ENTROPY,
        samples=(
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
        ids=("F22",),
        section="head",
        title="log-probability of a class",
        function=formulas.LinearCrossEntropy,
        reference=reference.LINEAR_LOG_PROBS,
        samples=(
            Sample(_compute_log_probs, _HEAD),
            Sample(
                lambda x, W, y: sum(F.linear_log_probs(x, W, y, return_entropy=True)),
                {"x": vector(2), "W": _HEAD["W"], **_LABELS},
                "and the entropy, no bias",
            ),
        ),
        options={"y": 1, "beta": 2},
    ),
    Row(
        ids=("F23",),
        section="head",
        title="scaled and capped head with z-loss",
        function=formulas.LinearCrossEntropy,
        reference=reference.SCALED_HEAD,
        samples=(
            Sample(
                per_example(_compute_scaled_head_loss, base=2, softcap=1.5, z_loss=0.3),
                {**_HEAD, **_PROBABILITIES, **_SCALE},
            ),
            Sample(
                partial(_compute_scaled_head_loss, softcap=1.5, z_loss=0.3),
                {**_HEAD, **_LABELS, **_SCALE},
                "class indices, mean",
            ),
            Sample(
                lambda x, W, b: F.linear_log_sum_exp(
                    x, W, linear_bias=b, softcap=1.5, temperature=0.8
                ),
                _HEAD,
                "log-sum-exp",
            ),
            Sample(
                lambda x, W, b, y, w: _compute_head_loss(
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
                make_module(
                    nn.LinearCrossEntropyLoss,
                    *(2, CLASSES),
                    logit_scale=torch.nn.Parameter(torch.tensor(0.7)),
                    softcap=1.5,
                    z_loss=0.3,
                ),
                {"x": vector(2), **_LABELS},
                "module, learnt scale, mean",
            ),
        ),
        options={"beta": 2, "cap": 1.5, "zeta": 0.3},
    ),
    Row(
        ids=("F24",),
        section="scale",
        title="log-sum-exp of split classes",
        function=formulas.SplitLogSumExp,
        reference=SPLIT_LOG_SUM_EXP,
        samples=(
            Sample(lambda z: sum(formulas.SplitLogSumExp.evaluate(z, None)).squeeze(1), _LOGITS),
            Sample(_compute_split_loss, {**_LOGITS, **_PROBABILITIES}, "in cross entropy"),
        ),
        options={"sizes": (2, 0, 1)},
    ),
    *DIVERGENCE_ROWS,
    Row(
        ids=("F30",),
        section="head",
        title="cost of weighted rows",
        function=formulas.Cost,
        reference=WEIGHTED_COST,
        samples=(
            Sample(
                _average_weighted,
                {"c": Input((4,), shared=True), "r": Input((4,), "positive", shared=True)},
            ),
            Sample(
                _with_row_weight(_compute_head_loss, label_smoothing=0.2, z_loss=0.3, softcap=1.5),
                {**_HEAD, **_LABELS, **_ROW_WEIGHT},
                "head, smoothing, z-loss, cap, mean",
            ),
            Sample(
                lambda x, W, y, w, r: _compute_head_loss(
                    x, W, y, weight=w, row_weight=r, reduction="sum", base=2
                ),
                {
                    "x": vector(2),
                    "W": _HEAD["W"],
                    **_LABELS,
                    **_CLASS_WEIGHT,
                    "r": Input((), "signed"),
                },
                "head, class weights, signed row weights, sum",
            ),
            Sample(
                _with_row_weight(F.linear_log_probs),
                {"x": vector(2), "W": _HEAD["W"], **_LABELS, "r": Input((), "signed")},
                "log-probabilities",
            ),
            Sample(
                _with_row_weight(F.cross_entropy, label_smoothing=0.2, z_loss=0.3),
                {**_LOGITS, **_LABELS, **_ROW_WEIGHT},
                "cross entropy, smoothing, z-loss, mean",
            ),
            Sample(
                _with_row_weight(F.categorical_cross_entropy, reduction="sum"),
                {"a": vector(CLASSES, "positive"), **_PROBABILITIES, **_ROW_WEIGHT},
                "cross entropy of probabilities, sum",
            ),
        ),
    ),
)
