"""Value and gradient of every public function against 60 digits, for numbers hard to compute with.

Inputs are drawn and cast to the dtype, and are exact from then on. The truth is each formula in
`BoundedReal`s. Value and gradients pass two tests:

1. No element is farther from the truth than the rounding error of the formula itself (see
   `bounded_real.py`). The error of PyTorch's operation does not excuse ours: it may be as large as
   the element (saturated sigmoids). Losses in half precision are held to float32 arithmetic and one
   final rounding of half an eps; layers may round between operations, as PyTorch's do. What is
   exactly 0 in the formula must be exactly 0.
2. The largest error is at most the largest error of PyTorch's own operation at that dtype, plus
   `get_rounding_tolerance(dtype)` of the largest |truth|, or in float32 and float64 of how far the
   truth moves when its inputs move (see `tolerance.py`).

The gradients of each truth are themselves compared with finite differences of its value.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from bounded_real import (
    log_softmax,
    matmul,
    real_type,
    relu,
    sigmoid,
    softmax,
    sum_all,
    sum_over,
    to_reals,
    use_60_digits,
)
from conftest import limit_head_blocks
from mpmath import mpf
from tolerance import HALF, get_rounding_tolerance
from torch import Tensor

import torch_nnmath.functional as F

DTYPES = (torch.float64, torch.float32, *HALF)
N, C, D = 5, 6, 4  # rows, classes, features
pytorch = torch.nn.functional


@pytest.fixture(autouse=True)
def _60_digits_and_small_blocks():
    with limit_head_blocks(), use_60_digits():
        yield


def widen(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


class Activation(NamedTuple):
    f: Callable[..., Any]
    multiply_jacobian: Callable[..., Any]  # J v from a = f(z) and v
    compute_pytorch: Callable[..., Tensor]


ACTIVATIONS = {
    "sigmoid": Activation(sigmoid, lambda a, v: a * (1 - a) * v, torch.sigmoid),
    "tanh": Activation(np.tanh, lambda a, v: (1 - a) * (1 + a) * v, torch.tanh),
    "relu": Activation(relu, lambda a, v: np.where(a > 0, v, 0 * v), torch.relu),
    "softmax": Activation(
        softmax, lambda a, v: a * (v - sum_over(a * v)), lambda z: torch.softmax(z, -1)
    ),
    "identity": Activation(lambda z: z, lambda a, v: v, lambda z: z),
}


def reduce_rows(c, G, reduction, n):
    """Returns F3 of losses c (rows, 1), and the cotangent of each row for the cotangent G."""
    if reduction == "none":
        return c[:, 0], G[:, None]
    return (sum_all(c), G) if reduction == "sum" else (sum_all(c) / n, G / n)


def reduce_losses(c, reduction):
    return {"none": lambda c: c, "sum": torch.sum, "mean": torch.mean}[reduction](c)


class InputGenerator:
    """Draws random inputs of one kind, in one dtype."""

    def __init__(self, kind, dtype, real):
        self.kind, self.dtype, self.info, self.real = kind, dtype, torch.finfo(dtype), real
        self.generator = torch.Generator().manual_seed(0)
        self.rows, self.classes, self.features = N, C, D
        if kind == "many rows":
            self.rows, self.classes, self.features = 259, 2, 2  # bfloat16 cannot represent 259
        if kind == "many classes":
            self.rows, self.classes, self.features = 1, 1000, 2

    def draw_normal(self, *shape):
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def cast(self, *xs):
        return tuple(x.to(self.dtype) for x in xs)

    def draw_logits(self):
        z = self.draw_normal(self.rows, self.classes)
        match self.kind:
            case "peaked":
                z = 30 * z
            case "huge":
                z = z * (self.info.max / 64)
            case "shifted":
                z = z + 1e4
            case "subnormal":
                z = z * self.info.smallest_normal / 2
            case "one at -80":
                z[:, 1] = -80
            case "-inf":
                z[:, 1] = -math.inf
            case "saturated":
                z = z.sign() * (17 + 20 * z.square())
        return self.cast(z)[0]

    def draw_labels(self):
        y = torch.randint(self.classes, (self.rows,), generator=self.generator)
        if self.kind == "one at -80":
            y[0] = 1
        return y.masked_fill(y == 1, 0) if self.kind == "-inf" else y

    def draw_probabilities(self):
        t = self.draw_normal(self.rows, self.classes).softmax(-1)
        if self.kind == "-inf":
            t[:, 1] = 0
        return self.cast(t)[0]

    def draw_layer(self):
        """Draws x, W, b."""
        x = self.draw_normal(self.rows, self.features)
        W, b = self.draw_normal(self.classes, self.features), self.draw_normal(self.classes)
        match self.kind:
            case "peaked":
                W = 10 * W
            case "huge":
                x, W = (v * self.info.max**0.5 / 16 for v in (x, W))
            case "subnormal":
                x = x * self.info.smallest_normal / 2
            case "cancelling":
                x[:, 1] = -x[:, 0]
                W[:, 1] = W[:, 0] * (1 + W[:, 1] / 1000)
                W[:, 2:] /= 1000
            case "shifted":
                b = b + 1e4
            case "one at -80":
                b[1] = -80
            case "-inf":
                b[1] = -math.inf
            case "many rows":
                x = x.abs()  # so that sums over the rows grow
        return self.cast(x, W, b)

    def draw_pair(self):
        """Draws two tensors to be subtracted."""
        a, t = self.draw_normal(2, self.rows, self.classes)
        match self.kind:
            case "huge":
                a = a * self.info.max**0.5 / 8
            case "near":
                t = a * (1 + t / 100)
            case "shifted":
                a, t = a + 1e4, t + 1e4
            case "subnormal":
                a, t = (v * self.info.smallest_normal / 2 for v in (a, t))
        return self.cast(a, t)


class Case(NamedTuple):
    """A call as functions of its differentiable tensors. Each function below returns one."""

    leaves: tuple[Tensor, ...]
    compute: Callable[..., Tensor]
    compute_pytorch: Callable[..., Tensor]
    compute_truth: Callable[..., Any]  # (cotangent, *leaves) -> value, *gradients
    roundings: int = 1  # operations between which PyTorch, as this library, rounds

    def differentiate(self, truth):
        """Returns the case whose value is this one's gradient in all leaves, as one vector."""

        def gradient_of(f):
            def compute_gradient(*leaves):
                gradients = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
                return torch.cat([g.flatten() for g in gradients])

            return compute_gradient

        compute, compute_pytorch = gradient_of(self.compute), gradient_of(self.compute_pytorch)
        return Case(self.leaves, compute, compute_pytorch, truth)


def concatenate(gradients):
    return np.concatenate([np.ravel(g) for g in gradients])


def linear(inputs):
    def truth(dz, x, W, b):
        return matmul(x, W.T) + b, matmul(dz, W), matmul(dz.T, x), sum_over(dz, 0)[0]

    return Case(inputs.draw_layer(), F.linear, pytorch.linear, truth)


def elementwise(inputs, name):
    f, multiply_jacobian, compute_pytorch = ACTIVATIONS[name]

    def truth(da, z):
        return f(z), multiply_jacobian(f(z), da)

    return Case((inputs.draw_logits(),), getattr(F, name), compute_pytorch, truth)


def softmax_over(inputs, dim):
    z = inputs.draw_logits() if dim == 1 else inputs.draw_logits().T.contiguous()

    def truth(da, z):
        a = softmax(np.moveaxis(z, dim, -1))
        dz = ACTIVATIONS["softmax"].multiply_jacobian(a, np.moveaxis(da, dim, -1))
        return np.moveaxis(a, -1, dim), np.moveaxis(dz, -1, dim)

    return Case((z,), lambda z: F.softmax(z, dim), lambda z: torch.softmax(z, dim), truth)


def softmax_jacobian(inputs):
    def compute_pytorch(z):
        a = torch.softmax(z, -1)
        return torch.diag_embed(a) - a.unsqueeze(-1) * a.unsqueeze(-2)

    def truth(dJ, z):
        a = softmax(z)
        J = np.eye(C, dtype=int) * a[..., None] - a[..., None] * a[..., None, :]
        da = np.einsum("njj->nj", dJ) - sum_over((dJ + dJ.swapaxes(1, 2)) * a[:, None])[..., 0]
        return J, a * (da - sum_over(a * da))

    return Case(
        (inputs.draw_logits(),), lambda z: F.softmax_jacobian(z, -1), compute_pytorch, truth
    )


def feedforward(inputs, activation, output):
    x, W, b = inputs.draw_layer()
    V, d = inputs.cast(inputs.draw_normal(3, inputs.classes), inputs.draw_normal(3))
    f, h = ACTIVATIONS[activation], ACTIVATIONS[output]

    def compute(x, W, b, V, d):
        return F.feedforward(x, [W, V], [b, d], activation=activation, output_activation=output)

    def compute_pytorch(x, W, b, V, d):
        return h.compute_pytorch(pytorch.linear(f.compute_pytorch(pytorch.linear(x, W, b)), V, d))

    def truth(da, x, W, b, V, d):
        a = f.f(matmul(x, W.T) + b)
        output = h.f(matmul(a, V.T) + d)
        dz = h.multiply_jacobian(output, da)
        dy = f.multiply_jacobian(a, matmul(dz, V))
        first = matmul(dy, W), matmul(dy.T, x), sum_over(dy, 0)[0]
        return output, *first, matmul(dz.T, a), sum_over(dz, 0)[0]

    return Case((x, W, b, V, d), compute, compute_pytorch, truth, roundings=4)


def mse_loss(inputs, reduction="mean"):
    def truth(G, a, t):
        value, g = reduce_rows(((a - t) * (a - t)).reshape(-1, 1), G.reshape(-1), reduction, a.size)
        da = 2 * (a - t) * np.reshape(g, G.shape)
        return np.reshape(value, G.shape), da, -da

    def with_reduction(f):
        return lambda a, t: f(a, t, reduction=reduction)

    return Case(
        inputs.draw_pair(), with_reduction(F.mse_loss), with_reduction(pytorch.mse_loss), truth
    )


def weighted_mse_loss(inputs):
    w = inputs.cast(inputs.draw_normal(inputs.rows, inputs.classes).abs())

    def truth(G, a, t, w):
        c, n = (a - t) * (a - t), sum_all(w)
        value = sum_all(w * c) / n
        da = 2 * w * (a - t) * (G / n)
        return value, da, -da, (c - value) * (G / n)

    def with_weight(f):
        return lambda a, t, w: f(a, t, weight=w)

    return Case(
        (*inputs.draw_pair(), *w), with_weight(F.mse_loss), with_weight(pytorch.mse_loss), truth
    )


def squared_error(inputs, reduction="mean"):
    def truth(G, a, t):
        value, g = reduce_rows(sum_over((t - a) * (t - a)) / 2, G, reduction, len(a))
        return value, g * (a - t), g * (t - a)

    return Case(
        inputs.draw_pair(),
        functools.partial(F.squared_error, reduction=reduction),
        lambda a, t: reduce_losses((t - a).square().sum(-1) / 2, reduction),
        truth,
    )


def sigmoid_squared_error(inputs, reduction="mean", second_order=False):
    z, t = inputs.draw_logits(), inputs.draw_probabilities()
    t[:, ::2] = (z[:, ::2] > 0).to(t.dtype)  # some are right, so that a - t is small

    def truth(G, z, t):
        a = sigmoid(z)
        value, g = reduce_rows(sum_over((t - a) * (t - a)) / 2, G, reduction, len(z))
        return value, g * (a - t) * a * sigmoid(-z), g * (t - a)

    def second_truth(direction, z, t):
        u, v = direction.reshape(2, *z.shape)
        a, n = sigmoid(z), len(z)
        slope = a * sigmoid(-z)
        first = (a - t) * slope / n, (t - a) / n
        dz = u * slope * (slope + (a - t) * (sigmoid(-z) - a)) / n - v * slope / n
        return concatenate(first), dz, (v - u * slope) / n

    case = Case(
        (z, t),
        functools.partial(F.sigmoid_squared_error, reduction=reduction),
        lambda z, t: reduce_losses((t - z.sigmoid()).square().sum(-1) / 2, reduction),
        truth,
    )
    return case.differentiate(second_truth) if second_order else case


def categorical_cross_entropy(inputs, indices=False, reduction="mean", base=math.e):
    z = inputs.draw_normal(inputs.rows, inputs.classes)
    z[:, 1] -= {"one at -80": 80, "-inf": math.inf}.get(inputs.kind, 0)
    a = (30 * z if inputs.kind == "peaked" else z).softmax(-1)
    if inputs.kind == "subnormal":
        a[:, 2:] *= inputs.info.smallest_normal / 4
    (a,) = inputs.cast(a)
    y, t = inputs.draw_labels(), inputs.draw_probabilities()

    def compute(a, t=y):
        return F.categorical_cross_entropy(a, t, base=base, reduction=reduction)

    def compute_pytorch(a, t=None):
        t = torch.eye(inputs.classes, dtype=a.dtype)[y] if t is None else t
        return reduce_losses(-torch.xlogy(t, a).sum(-1) / math.log(base), reduction)

    def truth(G, a, t=None):
        T = to_reals(torch.eye(inputs.classes)[y], inputs.real) if t is None else t
        value, g = reduce_rows(sum_over(T * np.log(a)) / -mpmath.log(base), G, reduction, len(a))
        g = g / -mpmath.log(base)
        return (value, g * T / a) if t is None else (value, g * T / a, g * np.log(a))

    return Case((a,) if indices else (a, t), compute, compute_pytorch, truth)


class CrossEntropyTarget:
    """Class indices or probabilities, with the options of cross entropy."""

    def __init__(
        self, inputs, probabilities=False, weighted=False, ignored=False, base=math.e, **options
    ):
        y, t = inputs.draw_labels(), inputs.draw_probabilities()
        if ignored:
            y[1::2] = -100
        w = inputs.cast(inputs.draw_normal(inputs.classes).abs())[0] if weighted else None
        self.inputs, self.probabilities, self.base = inputs, probabilities, base
        self.target, self.leaves = (t, (t,)) if probabilities else (y, ())
        self.options = {"weight": w, "label_smoothing": 0.0, "reduction": "mean", **options}

    def compute(self, f, *inputs, t=None, **options):
        return f(
            *inputs, self.target if t is None else t, **self.options, **options, base=self.base
        )

    def compute_pytorch(self, z, t=None):
        t = self.target if t is None else t
        return pytorch.cross_entropy(z, t, **self.options) / math.log(self.base)

    def expand(self, t=None):
        """Returns the weighted and smoothed target (rows, C), the mean's divisor, and dT/dt."""
        real, n = self.inputs.real, self.inputs.classes
        w, s = self.options["weight"], real(mpf(self.options["label_smoothing"]))
        w = to_reals(torch.ones(n) if w is None else w, real)
        keep = 1
        if t is None:
            keep = to_reals((self.target >= 0).double()[:, None], real)
            t = to_reals(torch.eye(n)[self.target.clamp(0)], real) * keep
        divisor = len(t) if self.probabilities else sum_all(w * t)
        if s.is_zero():
            return w * t, divisor, w
        return w * ((1 - s) * t + s / n * keep), divisor, w * (1 - s)

    def compute_truth(self, G, z, t=None):
        """Returns the value, dz, and dt if t is given."""
        T, n, slope = self.expand(t)
        l = log_softmax(z)
        c = sum_over(T * l) / -mpmath.log(self.base)
        value, g = reduce_rows(c, G, self.options["reduction"], n)
        g = g / mpmath.log(self.base)
        dz = g * (sum_over(T) * np.exp(l) - T)
        return (value, dz) if t is None else (value, dz, -(g * slope * l))

    def compute_second_truth(self, z, R):
        """Returns dz of the mean, and its derivative along R."""
        T, n, _ = self.expand()
        a, g = np.exp(log_softmax(z)), 1 / (n * mpmath.log(self.base))
        return g * (sum_over(T) * a - T), g * sum_over(T) * a * (R - sum_over(a * R))


def cross_entropy(inputs, second_order=False, **options):
    target = CrossEntropyTarget(inputs, **options)
    case = Case(
        (inputs.draw_logits(), *target.leaves),
        lambda z, t=None: target.compute(F.cross_entropy, z, t=t),
        target.compute_pytorch,
        target.compute_truth,
    )

    def second_truth(direction, z):
        delta, Q = target.compute_second_truth(z, direction.reshape(z.shape))
        return concatenate([delta]), Q

    return case.differentiate(second_truth) if second_order else case


def cross_entropy_of_positions(inputs):
    """Logits (1, C, rows): the classes are not at the last axis, where other kernels run."""
    case = cross_entropy(inputs, probabilities=True)

    def transpose_inputs(f):
        return lambda z, t: f(z.T[None], t.T[None])

    return case._replace(
        compute=transpose_inputs(case.compute),
        compute_pytorch=transpose_inputs(case.compute_pytorch),
    )


def linear_cross_entropy(inputs, second_order=False, **options):
    target = CrossEntropyTarget(inputs, **options)

    def compute(x, W, b, t=None):
        return target.compute(F.linear_cross_entropy, x, W, t=t, linear_bias=b)

    def compute_pytorch(x, W, b, t=None):
        return target.compute_pytorch(pytorch.linear(x, W, b), t)

    def truth(G, x, W, b, t=None):
        value, dz, *dt = target.compute_truth(G, matmul(x, W.T) + b, t)
        return value, matmul(dz, W), matmul(dz.T, x), sum_over(dz, 0)[0], *dt

    def second_truth(direction, x, W, b):
        u, V, s = np.split(direction, np.cumsum([x.size, W.size]))
        u, V = u.reshape(x.shape), V.reshape(W.shape)
        R = matmul(u, W.T) + matmul(x, V.T) + s
        delta, Q = target.compute_second_truth(matmul(x, W.T) + b, R)
        first = matmul(delta, W), matmul(delta.T, x), sum_over(delta, 0)
        dx, dW = matmul(Q, W) + matmul(delta, V), matmul(Q.T, x) + matmul(delta.T, u)
        return concatenate(first), dx, dW, sum_over(Q, 0)[0]

    case = Case((*inputs.draw_layer(), *target.leaves), compute, compute_pytorch, truth)
    return case.differentiate(second_truth) if second_order else case


LOGITS = ("plain", "peaked", "huge", "shifted", "subnormal", "one at -80", "-inf")
LINEAR = ("plain", "peaked", "huge", "cancelling", "subnormal")
HEAD = ("plain", "peaked", "cancelling", "subnormal", "shifted", "one at -80", "-inf")
PAIRS = ("plain", "near", "huge", "shifted", "subnormal")
PROBABILITIES = ("plain", "peaked", "subnormal", "one at -80", "-inf")
REDUCTIONS = ({}, {"reduction": "sum"}, {"reduction": "none"})
INDICES = {"weighted": True, "ignored": True, "label_smoothing": 0.1, "base": 2.0}
CROSS_ENTROPY = (
    *REDUCTIONS,
    {"weighted": True, "base": 2.0},
    {"ignored": True, "label_smoothing": 0.1, "reduction": "sum"},
    INDICES,
    {"probabilities": True, "base": 2.0, "reduction": "none"},
    {"probabilities": True, "weighted": True, "label_smoothing": 0.3},
)
CASES = [  # function, options, kinds of inputs
    (linear, {}, (*LINEAR, "many rows")),
    (elementwise, {"name": "sigmoid"}, (*LOGITS, "saturated")),
    (elementwise, {"name": "tanh"}, (*LOGITS, "saturated")),
    (elementwise, {"name": "relu"}, LOGITS),
    (softmax_over, {"dim": 1}, (*LOGITS, "many classes")),
    (softmax_over, {"dim": 0}, (*LOGITS, "many classes")),
    (softmax_jacobian, {}, LOGITS),
    (feedforward, {"activation": "sigmoid", "output": "sigmoid"}, LINEAR),
    (feedforward, {"activation": "tanh", "output": "softmax"}, LINEAR),
    (feedforward, {"activation": "relu", "output": "identity"}, LINEAR),
    *((mse_loss, options, (*PAIRS, "many rows")) for options in REDUCTIONS),
    (weighted_mse_loss, {}, (*PAIRS, "many rows")),
    *((squared_error, options, PAIRS) for options in REDUCTIONS),
    *((sigmoid_squared_error, options, (*LOGITS, "saturated")) for options in REDUCTIONS),
    (sigmoid_squared_error, {"second_order": True}, (*LOGITS, "saturated")),
    *((categorical_cross_entropy, options, PROBABILITIES) for options in REDUCTIONS),
    (categorical_cross_entropy, {"indices": True, "base": 2.0}, PROBABILITIES),
    *((cross_entropy, options, LOGITS) for options in CROSS_ENTROPY),
    (cross_entropy, {"weighted": True}, ("many rows", "many classes")),
    (cross_entropy_of_positions, {}, LOGITS),
    *((linear_cross_entropy, options, HEAD) for options in CROSS_ENTROPY),
    (linear_cross_entropy, {"weighted": True}, ("many rows", "many classes")),
    *((cross_entropy, {"second_order": True, **options}, LOGITS) for options in ({}, INDICES)),
    *((linear_cross_entropy, {"second_order": True, **options}, HEAD) for options in ({}, INDICES)),
    (linear_cross_entropy, {"second_order": True, "weighted": True}, ("many rows",)),
]
LAYERS = (linear, elementwise, softmax_over, softmax_jacobian, feedforward)


def format_id(function, options):
    words = (key if value is True else f"{key}={value}" for key, value in options.items())
    return " ".join((function.__name__, *words))


def make_case(function, options, kind, dtype):
    """Returns the case, a cotangent for its value, and the type of the truth's numbers."""
    wide = widen(dtype)
    real = real_type(dtype if function in LAYERS else wide, wide)
    inputs = InputGenerator(kind, dtype, real)
    case = function(inputs, **options)
    value = case.compute_pytorch(*(x.requires_grad_() for x in case.leaves))
    return case, inputs.cast(inputs.draw_normal(*value.shape))[0], real


def distance(x, v, largest):
    """Returns |x - v|: 0 if v is or overflows to the same infinity as x, inf if x is nan."""
    if abs(v) > largest:
        return 0.0 if x == float(mpmath.sign(v)) * math.inf else math.inf
    return math.inf if math.isnan(x) else abs(float(x - v))


def error_bound(r, info):
    """Returns r's error plus that of the final rounding; 0 if r is exactly 0 or infinite."""
    last = 0.0 if r.eps == info.eps else info.eps / 2
    return r.e and r.e + last * max(r.size, info.smallest_normal)


def measure_sensitivity(case, G, leaves):
    """Returns how far each result moves at most, per unit of the leaves' relative movement."""
    step = mpf("1e-20")
    generator = np.random.default_rng(0)
    moved = (x * (1 + step * generator.choice((-1, 1), x.shape)) for x in leaves)
    pairs = zip(case.compute_truth(G, *leaves), case.compute_truth(G, *moved), strict=True)
    return [max(abs(float(r.v / step)) for r in np.ravel(a - b)) for a, b in pairs]


@pytest.mark.parametrize(
    ("function", "options", "kind", "dtype"),
    [
        pytest.param(*row, kind, dtype, id=f"{format_id(*row)}-{kind}-{str(dtype)[6:]}")
        for *row, kinds in CASES
        for kind in kinds
        for dtype in DTYPES
    ],
)
def test_value_and_gradients_are_within_rounding_of_the_truth(function, options, kind, dtype):
    case, G, real = make_case(function, options, kind, dtype)
    values = [f(*case.leaves) for f in (case.compute, case.compute_pytorch)]
    results, pytorch_results = ([v, *torch.autograd.grad(v, case.leaves, G)] for v in values)
    G, *leaves = (to_reals(x, real) for x in (G, *case.leaves))
    truth = case.compute_truth(G, *leaves)
    info, k = torch.finfo(dtype), get_rounding_tolerance(dtype) * case.roundings
    faults = []
    for i, (a, b, t) in enumerate(zip(results, pytorch_results, truth, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) == (dtype, np.shape(t))
        a, b, t = a.flatten().tolist(), b.flatten().tolist(), np.ravel(t)
        errors = [distance(x, r.v, info.max) for x, r in zip(a, t, strict=True)]
        bounds = [error_bound(r, info) for r in t]
        faults += [
            f"result {i}[{j}]: {a[j]}, truth {mpmath.nstr(t[j].v, 9)}, bound {bounds[j]:.3g}"
            for j, error in enumerate(errors)
            if not error <= bounds[j]
        ]
        error = max(errors)
        allowed = max(distance(x, r.v, info.max) for x, r in zip(b, t, strict=True))
        scale = max([info.smallest_normal, *(r.size for r in t if abs(r.v) <= info.max)])
        if not error <= allowed + k * scale and dtype not in HALF:
            scale = max(scale, measure_sensitivity(case, G, leaves)[i])
        if not error <= allowed + k * scale:
            faults.append(f"result {i}: off {error:.3g}, PyTorch {allowed:.3g}, scale {scale:.3g}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("function", "options"),
    [pytest.param(*row, id=format_id(*row)) for *row, kinds in CASES if "plain" in kinds],
)
def test_gradients_of_the_truth_equal_its_differences(function, options):
    case, G, real = make_case(function, options, "plain", torch.float64)
    G, *leaves = (to_reals(x, real) for x in (G, *case.leaves))
    _, *gradients = case.compute_truth(G, *leaves)
    generator = np.random.default_rng(0)
    for i, (x, dx) in enumerate(zip(leaves, gradients, strict=True)):
        step = generator.normal(size=x.shape) * real(mpf("1e-20"))
        ends = ([*leaves[:i], x + s, *leaves[i + 1 :]] for s in (step, -step))
        above, below = (sum_all(G * case.compute_truth(G, *end)[0]).item().v for end in ends)
        expected = sum_all(dx * step).item().v
        assert abs((above - below) / 2 - expected) <= 1e-30 * abs(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softmax"])
def test_gradient_from_a_saved_activation_is_rounded_once(name, dtype):
    """In half precision 1 - a² would lose digits to a rounded a²."""
    inputs = InputGenerator("plain", dtype, real_type(widen(dtype), widen(dtype)))
    case = softmax_over(inputs, 1) if name == "softmax" else elementwise(inputs, name)
    z = (3 * case.leaves[0]).requires_grad_()
    a = case.compute(z)
    (v,) = inputs.cast(inputs.draw_normal(*a.shape))
    (dz,) = torch.autograd.grad(a, z, v)
    truth = ACTIVATIONS[name].multiply_jacobian(to_reals(a, inputs.real), to_reals(v, inputs.real))
    info = torch.finfo(dtype)
    for x, r in zip(dz.flatten().tolist(), np.ravel(truth), strict=True):
        assert distance(x, r.v, info.max) <= error_bound(r, info)
