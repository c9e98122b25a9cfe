"""Value and gradient of every public function against 60 digits, over hostile numbers.

Inputs are drawn, cast to the dtype, and then exact; the truth is each formula in mpmath (`Real`).
Two things are asked of the value and of each gradient:

1. No element is farther from the truth than the formula's own rounding. To 60 digits a `Real`
   carries the error e that the document's formula makes in floating point: an operation passes on
   its operands' errors and adds one eps of its result, a sum of n terms √n/2 eps of Σ |terms|. So
   the scale is each element's own and grows only where the formula cancels; PyTorch's error, which
   may be all of the element (saturated sigmoids), does not excuse ours. Losses are held to float32
   arithmetic in half precision, and to half an eps for the one rounding at the end; layers may
   round between operations, as PyTorch's do. What is exactly 0 in the formula must be exactly 0.
2. The largest error is not above the largest of PyTorch's own operation at that dtype by more than
   `roundings(dtype)` of the largest |truth| (design.md, rule 3), or in float32 and float64 of how
   far the truth moves with its inputs (tolerance.py).

That the truth is true is asked of it as well: its gradients are its value's differences.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf
from tolerance import HALF, roundings
from torch import Tensor

import torch_nnmath.functional as F
from torch_nnmath.kernels import blocked

DTYPES = (torch.float64, torch.float32, *HALF)
WIDE = {dtype: torch.float32 if dtype in HALF else dtype for dtype in DTYPES}
N, C, D = 5, 6, 4  # rows, classes, features
plain = torch.nn.functional


@pytest.fixture(autouse=True)
def _60_digits_and_small_blocks(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_BYTES", (0, 1))  # blocks of 32 rows
    with mpmath.workdps(60), np.errstate(all="ignore"):  # an e may overflow where v does
        yield


def binary(f):
    """An operation of Real with a Real or a plain number; numpy does those with arrays."""

    @functools.wraps(f)
    def operation(self, other):
        if isinstance(other, np.ndarray):
            return NotImplemented
        return f(self, other if isinstance(other, Real) else type(self)(mpf(other)))

    return operation


class Real:
    """v to 60 digits, and e: how far from it floating point with this eps may be."""

    eps: float
    tiny: float  # what underflow loses

    def __init__(self, v, e=0.0):
        self.v, self.e = v, e

    def rounded(self, v, e):
        """What has error e before it is rounded; what is exactly 0 stays so."""
        if math.isinf(size(v)) or (v == 0 and e == 0):
            return type(self)(v)
        return type(self)(v, e + self.eps * size(v) + self.tiny)

    def is_zero(self):
        return self.v == 0 and self.e == 0

    def __neg__(self):
        return type(self)(-self.v, self.e)

    @binary
    def __add__(self, other):
        return self.rounded(self.v + other.v, self.e + other.e)

    @binary
    def __mul__(self, other):
        if self.is_zero() or other.is_zero():  # 0 log 0 too
            return type(self)(mpf(0))
        e = size(self.v) * other.e + size(other.v) * self.e
        return self.rounded(self.v * other.v, e)

    @binary
    def __truediv__(self, other):
        if self.is_zero():
            return self
        if other.v == 0:
            return type(self)(mpmath.sign(self.v) * mpmath.inf)
        v = self.v / other.v
        return self.rounded(v, (self.e + size(v) * other.e) / size(other.v))

    @binary
    def __sub__(self, other):
        return self + -other

    @binary
    def __rsub__(self, other):
        return other + -self

    @binary
    def __rtruediv__(self, other):
        return other / self

    @binary
    def __ge__(self, other):
        return self.v >= other.v

    @binary
    def __gt__(self, other):
        return self.v > other.v

    __radd__, __rmul__ = __add__, __mul__

    # numpy's exp, log and tanh of an array of objects call these; sigmoid is below

    def exp(self):
        v = mpmath.exp(self.v)
        return self.rounded(v, size(v) * self.e)

    def log(self):
        if self.v == 0:
            return type(self)(-mpmath.inf)
        return self.rounded(mpmath.log(self.v), self.e / size(self.v))

    def tanh(self):
        v = mpmath.tanh(self.v)
        return self.rounded(v, size(1 - v * v) * self.e)

    def sigmoid(self):
        v = 1 / (1 + mpmath.exp(-self.v))
        return self.rounded(v, size(v * (1 - v)) * self.e)


def size(v) -> float:
    return abs(float(v))


def _real(dtype):
    info, wide = torch.finfo(dtype), torch.finfo(WIDE[dtype])
    tiny = max(info.eps * info.smallest_normal, wide.smallest_normal)
    return type("Real", (Real,), {"eps": info.eps, "tiny": tiny})


REAL = {dtype: _real(dtype) for dtype in DTYPES}


def exact(x: Tensor, real) -> Any:
    """x's numbers as they are, an array of objects."""
    out = np.empty(x.shape, object)
    for i in np.ndindex(*x.shape):
        out[i] = real(mpf(x[i].item()))
    return out


def total(x, axis=-1):
    """The sum over an axis, which stays with size 1."""
    x = np.moveaxis(x, axis, -1)
    out = np.empty((*x.shape[:-1], 1), object)
    for i in np.ndindex(*x.shape[:-1]):
        terms = x[i]
        out[i][0] = first = terms[0]
        if len(terms) > 1 and not all(r.is_zero() for r in terms):
            v = mpmath.fsum(r.v for r in terms)
            k = math.sqrt(len(terms)) / 2 * first.eps
            e = math.fsum(r.e + k * size(r.v) for r in terms) + first.tiny
            out[i][0] = type(first)(v, 0.0 if mpmath.isinf(v) else e)
    return np.moveaxis(out, -1, axis)


def total_of_all(x):
    return total(np.ravel(x)).reshape(())


def product(A, B):
    return total(A[:, :, None] * B[None], 1)[:, 0]


sigmoid = np.frompyfunc(Real.sigmoid, 1, 1)


def relu(z):
    return np.where(z > 0, z, 0 * z)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / total(e)


def log_softmax(z):
    s = z - z.max(-1, keepdims=True)
    return s - np.log(total(np.exp(s)))


class Activation(NamedTuple):
    f: Callable[..., Any]
    product: Callable[..., Any]  # of the Jacobian, from a and v
    theirs: Callable[..., Tensor]


ACTIVATIONS = {
    "sigmoid": Activation(sigmoid, lambda a, v: a * (1 - a) * v, torch.sigmoid),
    "tanh": Activation(np.tanh, lambda a, v: (1 - a) * (1 + a) * v, torch.tanh),
    "relu": Activation(relu, lambda a, v: np.where(a > 0, v, 0 * v), torch.relu),
    "softmax": Activation(
        softmax, lambda a, v: a * (v - total(a * v)), lambda z: torch.softmax(z, -1)
    ),
    "identity": Activation(lambda z: z, lambda a, v: v, lambda z: z),
}


def cost(c, G, reduction, n):
    """F3 of the losses c (rows, 1), and the factor of each row's gradient; G is the cotangent."""
    if reduction == "none":
        return c[:, 0], G[:, None]
    return (total_of_all(c), G) if reduction == "sum" else (total_of_all(c) / n, G / n)


def plain_cost(c, reduction):
    return {"none": lambda c: c, "sum": torch.sum, "mean": torch.mean}[reduction](c)


class Draw:
    """Draws numbers of a kind in a dtype."""

    def __init__(self, kind, dtype, real):
        self.kind, self.dtype, self.info, self.real = kind, dtype, torch.finfo(dtype), real
        self.generator = torch.Generator().manual_seed(0)
        self.rows, self.classes, self.features = N, C, D
        if kind == "many rows":
            self.rows, self.classes, self.features = 515, 2, 2  # a number bfloat16 has not
        if kind == "many classes":
            self.rows, self.classes, self.features = 1, 1000, 2

    def normal(self, *shape):
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def cast(self, *xs):
        return tuple(x.to(self.dtype) for x in xs)

    def logits(self):
        z = self.normal(self.rows, self.classes)
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

    def labels(self):
        y = torch.randint(self.classes, (self.rows,), generator=self.generator)
        if self.kind == "one at -80":
            y[0] = 1
        return y.masked_fill(y == 1, 0) if self.kind == "-inf" else y

    def probabilities(self):
        t = self.normal(self.rows, self.classes).softmax(-1)
        if self.kind == "-inf":
            t[:, 1] = 0
        return self.cast(t)[0]

    def layer(self):
        """x, W, b."""
        x = self.normal(self.rows, self.features)
        W, b = self.normal(self.classes, self.features), self.normal(self.classes)
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
                x = x.abs()  # sums that grow
        return self.cast(x, W, b)

    def pair(self):
        """Two tensors that are to be subtracted."""
        a, t = self.normal(2, self.rows, self.classes)
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
    """A call: functions of the tensors that are differentiated; each function below makes one."""

    leaves: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]  # PyTorch's own operation
    truth: Callable[..., Any]  # (cotangent, *leaves) -> value, gradients
    operations: int = 1  # how many of PyTorch's that is, if it rounds between them as ours does

    def twice(self, truth):
        """The gradient in all leaves, in one piece, as the value."""

        def gradient(f):
            def of(*leaves):
                gradients = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
                return torch.cat([g.flatten() for g in gradients])

            return of

        return Case(self.leaves, gradient(self.ours), gradient(self.theirs), truth)


def in_one(gradients):
    return np.concatenate([np.ravel(g) for g in gradients])


def linear(draw):
    def truth(dz, x, W, b):
        return product(x, W.T) + b, product(dz, W), product(dz.T, x), total(dz, 0)[0]

    return Case(draw.layer(), F.linear, plain.linear, truth)


def elementwise(draw, name):
    f, jacobian, theirs = ACTIVATIONS[name]

    def truth(da, z):
        return f(z), jacobian(f(z), da)

    return Case((draw.logits(),), getattr(F, name), theirs, truth)


def softmax_over(draw, dim):
    z = draw.logits() if dim == 1 else draw.logits().T.contiguous()

    def truth(da, z):
        a = softmax(np.moveaxis(z, dim, -1))
        dz = ACTIVATIONS["softmax"].product(a, np.moveaxis(da, dim, -1))
        return np.moveaxis(a, -1, dim), np.moveaxis(dz, -1, dim)

    return Case((z,), lambda z: F.softmax(z, dim), lambda z: torch.softmax(z, dim), truth)


def softmax_jacobian(draw):
    def theirs(z):
        a = torch.softmax(z, -1)
        return torch.diag_embed(a) - a.unsqueeze(-1) * a.unsqueeze(-2)

    def truth(dJ, z):
        a = softmax(z)
        J = np.eye(C, dtype=int) * a[..., None] - a[..., None] * a[..., None, :]
        da = np.einsum("njj->nj", dJ) - total((dJ + dJ.swapaxes(1, 2)) * a[:, None])[..., 0]
        return J, a * (da - total(a * da))

    return Case((draw.logits(),), lambda z: F.softmax_jacobian(z, -1), theirs, truth)


def feedforward(draw, activation, output):
    x, W, b = draw.layer()
    V, d = draw.cast(draw.normal(3, draw.classes), draw.normal(3))
    f, h = ACTIVATIONS[activation], ACTIVATIONS[output]

    def ours(x, W, b, V, d):
        return F.feedforward(x, [W, V], [b, d], activation=activation, output_activation=output)

    def theirs(x, W, b, V, d):
        return h.theirs(plain.linear(f.theirs(plain.linear(x, W, b)), V, d))

    def truth(da, x, W, b, V, d):
        a = f.f(product(x, W.T) + b)
        output = h.f(product(a, V.T) + d)
        dz = h.product(output, da)
        dy = f.product(a, product(dz, V))
        first = product(dy, W), product(dy.T, x), total(dy, 0)[0]
        return output, *first, product(dz.T, a), total(dz, 0)[0]

    return Case((x, W, b, V, d), ours, theirs, truth, operations=4)


def mse_loss(draw, reduction="mean"):
    def truth(G, a, t):
        value, g = cost(((a - t) * (a - t)).reshape(-1, 1), G.reshape(-1), reduction, a.size)
        da = 2 * (a - t) * np.reshape(g, G.shape)
        return np.reshape(value, G.shape), da, -da

    def of(f):
        return lambda a, t: f(a, t, reduction=reduction)

    return Case(draw.pair(), of(F.mse_loss), of(plain.mse_loss), truth)


def weighted_mse_loss(draw):
    w = draw.cast(draw.normal(draw.rows, draw.classes).abs())

    def truth(G, a, t, w):
        c, n = (a - t) * (a - t), total_of_all(w)
        value = total_of_all(w * c) / n
        da = 2 * w * (a - t) * (G / n)
        return value, da, -da, (c - value) * (G / n)

    def of(f):
        return lambda a, t, w: f(a, t, weight=w)

    return Case((*draw.pair(), *w), of(F.mse_loss), of(plain.mse_loss), truth)


def squared_error(draw, reduction="mean"):
    def truth(G, a, t):
        value, g = cost(total((t - a) * (t - a)) / 2, G, reduction, len(a))
        return value, g * (a - t), g * (t - a)

    return Case(
        draw.pair(),
        functools.partial(F.squared_error, reduction=reduction),
        lambda a, t: plain_cost((t - a).square().sum(-1) / 2, reduction),
        truth,
    )


def sigmoid_squared_error(draw, reduction="mean", twice=False):
    z, t = draw.logits(), draw.probabilities()
    t[:, ::2] = (z[:, ::2] > 0).to(t.dtype)  # right ones too, where the difference is small

    def truth(G, z, t):
        a = sigmoid(z)
        value, g = cost(total((t - a) * (t - a)) / 2, G, reduction, len(z))
        return value, g * (a - t) * a * sigmoid(-z), g * (t - a)

    def second(direction, z, t):
        u, v = direction.reshape(2, *z.shape)
        a, n = sigmoid(z), len(z)
        slope = a * sigmoid(-z)
        first = (a - t) * slope / n, (t - a) / n
        dz = u * slope * (slope + (a - t) * (sigmoid(-z) - a)) / n - v * slope / n
        return in_one(first), dz, (v - u * slope) / n

    case = Case(
        (z, t),
        functools.partial(F.sigmoid_squared_error, reduction=reduction),
        lambda z, t: plain_cost((t - z.sigmoid()).square().sum(-1) / 2, reduction),
        truth,
    )
    return case.twice(second) if twice else case


def categorical_cross_entropy(draw, indices=False, reduction="mean", base=math.e):
    z = draw.normal(draw.rows, draw.classes)
    z[:, 1] -= {"one at -80": 80, "-inf": math.inf}.get(draw.kind, 0)
    a = (30 * z if draw.kind == "peaked" else z).softmax(-1)
    if draw.kind == "subnormal":
        a[:, 2:] *= draw.info.smallest_normal / 4
    (a,) = draw.cast(a)
    y, t = draw.labels(), draw.probabilities()

    def ours(a, t=y):
        return F.categorical_cross_entropy(a, t, base=base, reduction=reduction)

    def theirs(a, t=None):
        t = torch.eye(draw.classes, dtype=a.dtype)[y] if t is None else t
        return plain_cost(-torch.xlogy(t, a).sum(-1) / math.log(base), reduction)

    def truth(G, a, t=None):
        T = exact(torch.eye(draw.classes)[y], draw.real) if t is None else t
        value, g = cost(total(T * np.log(a)) / -mpmath.log(base), G, reduction, len(a))
        g = g / -mpmath.log(base)
        return (value, g * T / a) if t is None else (value, g * T / a, g * np.log(a))

    return Case((a,) if indices else (a, t), ours, theirs, truth)


class Target:
    """A target of cross entropy, its options, and both as the formula's t."""

    def __init__(
        self, draw, probabilities=False, weighted=False, ignored=False, base=math.e, **options
    ):
        y, t = draw.labels(), draw.probabilities()
        if ignored:
            y[1::2] = -100
        w = draw.cast(draw.normal(draw.classes).abs())[0] if weighted else None
        self.draw, self.probabilities, self.base = draw, probabilities, base
        self.given, self.leaves = (t, (t,)) if probabilities else (y, ())
        self.options = {"weight": w, "label_smoothing": 0.0, "reduction": "mean", **options}

    def ours(self, f, *inputs, t=None, **options):
        return f(*inputs, self.given if t is None else t, **self.options, **options, base=self.base)

    def theirs(self, z, t=None):
        t = self.given if t is None else t
        return plain.cross_entropy(z, t, **self.options) / math.log(self.base)

    def full(self, t=None):
        """t weighted and smoothed, the mean's divisor, and the first's derivative in t."""
        real, n = self.draw.real, self.draw.classes
        w, s = self.options["weight"], real(mpf(self.options["label_smoothing"]))
        w = exact(torch.ones(n) if w is None else w, real)
        kept = 1
        if t is None:
            kept = exact((self.given >= 0).double()[:, None], real)
            t = exact(torch.eye(n)[self.given.clamp(0)], real) * kept
        divisor = len(t) if self.probabilities else total_of_all(w * t)
        if s.is_zero():
            return w * t, divisor, w
        return w * ((1 - s) * t + s / n * kept), divisor, w * (1 - s)

    def truth(self, G, z, t=None):
        """Value, dz, and dt where t is given."""
        T, n, slope = self.full(t)
        l = log_softmax(z)
        value, g = cost(total(T * l) / -mpmath.log(self.base), G, self.options["reduction"], n)
        g = g / mpmath.log(self.base)
        dz = g * (total(T) * np.exp(l) - T)
        return (value, dz) if t is None else (value, dz, -(g * slope * l))

    def second(self, z, R):
        """dz of the mean, and its derivative along R."""
        T, n, _ = self.full()
        a, g = np.exp(log_softmax(z)), 1 / (n * mpmath.log(self.base))
        return g * (total(T) * a - T), g * total(T) * a * (R - total(a * R))


def cross_entropy(draw, twice=False, **options):
    target = Target(draw, **options)
    case = Case(
        (draw.logits(), *target.leaves),
        lambda z, t=None: target.ours(F.cross_entropy, z, t=t),
        target.theirs,
        target.truth,
    )

    def second(direction, z):
        delta, Q = target.second(z, direction.reshape(z.shape))
        return in_one([delta]), Q

    return case.twice(second) if twice else case


def cross_entropy_of_positions(draw):
    """The classes not at the last axis, where other kernels run: (1, C, rows)."""
    case = cross_entropy(draw, probabilities=True)

    def turned(f):
        return lambda z, t: f(z.T[None], t.T[None])

    return case._replace(ours=turned(case.ours), theirs=turned(case.theirs))


def linear_cross_entropy(draw, twice=False, **options):
    target = Target(draw, **options)

    def ours(x, W, b, t=None):
        return target.ours(F.linear_cross_entropy, x, W, t=t, linear_bias=b)

    def theirs(x, W, b, t=None):
        return target.theirs(plain.linear(x, W, b), t)

    def truth(G, x, W, b, t=None):
        value, dz, *dt = target.truth(G, product(x, W.T) + b, t)
        return value, product(dz, W), product(dz.T, x), total(dz, 0)[0], *dt

    def second(direction, x, W, b):
        u, V, s = np.split(direction, np.cumsum([x.size, W.size]))
        u, V = u.reshape(x.shape), V.reshape(W.shape)
        R = product(u, W.T) + product(x, V.T) + s
        delta, Q = target.second(product(x, W.T) + b, R)
        first = product(delta, W), product(delta.T, x), total(delta, 0)
        dx, dW = product(Q, W) + product(delta, V), product(Q.T, x) + product(delta.T, u)
        return in_one(first), dx, dW, total(Q, 0)[0]

    case = Case((*draw.layer(), *target.leaves), ours, theirs, truth)
    return case.twice(second) if twice else case


LOGITS = ("plain", "peaked", "huge", "shifted", "subnormal", "one at -80", "-inf")
LINEAR = ("plain", "peaked", "huge", "cancelling", "subnormal")
HEAD = ("plain", "peaked", "cancelling", "subnormal", "shifted", "one at -80", "-inf")
PAIRS = ("plain", "near", "huge", "shifted", "subnormal")
PROBABILITIES = ("plain", "peaked", "subnormal", "one at -80", "-inf")
REDUCTIONS = ({}, {"reduction": "sum"}, {"reduction": "none"})
INDICES = {"weighted": True, "ignored": True, "label_smoothing": 0.1, "base": 2.0}
ENTROPY = (
    *REDUCTIONS,
    {"weighted": True, "base": 2.0},
    {"ignored": True, "label_smoothing": 0.1, "reduction": "sum"},
    INDICES,
    {"probabilities": True, "base": 2.0, "reduction": "none"},
    {"probabilities": True, "weighted": True, "label_smoothing": 0.3},
)
ROWS = [  # of Case, options, kinds
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
    (sigmoid_squared_error, {"twice": True}, (*LOGITS, "saturated")),
    *((categorical_cross_entropy, options, PROBABILITIES) for options in REDUCTIONS),
    (categorical_cross_entropy, {"indices": True, "base": 2.0}, PROBABILITIES),
    *((cross_entropy, options, LOGITS) for options in ENTROPY),
    (cross_entropy, {"weighted": True}, ("many rows", "many classes")),
    (cross_entropy_of_positions, {}, LOGITS),
    *((linear_cross_entropy, options, HEAD) for options in ENTROPY),
    (linear_cross_entropy, {"weighted": True}, ("many rows", "many classes")),
    *((cross_entropy, {"twice": True, **options}, LOGITS) for options in ({}, INDICES)),
    *((linear_cross_entropy, {"twice": True, **options}, HEAD) for options in ({}, INDICES)),
    (linear_cross_entropy, {"twice": True, "weighted": True}, ("many rows",)),
]
LAYERS = (linear, elementwise, softmax_over, softmax_jacobian, feedforward)


def label(function, options):
    words = (key if value is True else f"{key}={value}" for key, value in options.items())
    return " ".join((function.__name__, *words))


def drawn(function, options, kind, dtype):
    """The case, a cotangent for its value, and the Real that it is held to."""
    real = REAL[dtype if function in LAYERS else WIDE[dtype]]
    draw = Draw(kind, dtype, real)
    case = function(draw, **options)
    value = case.theirs(*(x.requires_grad_() for x in case.leaves))
    return case, draw.cast(draw.normal(*value.shape))[0], real


def off(x, v, largest):
    """|x - v|: 0 for the infinity that v is or overflows to, and inf for nan."""
    if abs(v) > largest:
        return 0.0 if x == float(mpmath.sign(v)) * math.inf else math.inf
    return math.inf if math.isnan(x) else size(x - v)


def bound(r, info):
    """r's error, and the rounding at the end; 0 where r is exactly 0, or infinite."""
    last = 0.0 if r.eps == info.eps else info.eps / 2
    return r.e and r.e + last * max(size(r.v), info.smallest_normal)


def movement(case, G, leaves):
    """How far each result moves at most, for each unit by which leaves move relative to it."""
    step = mpf("1e-20")
    generator = np.random.default_rng(0)
    moved = (x * (1 + step * generator.choice((-1, 1), x.shape)) for x in leaves)
    pairs = zip(case.truth(G, *leaves), case.truth(G, *moved), strict=True)
    return [max(size(r.v / step) for r in np.ravel(a - b)) for a, b in pairs]


@pytest.mark.parametrize(
    ("function", "options", "kind", "dtype"),
    [
        pytest.param(*row, kind, dtype, id=f"{label(*row)}-{kind}-{str(dtype)[6:]}")
        for *row, kinds in ROWS
        for kind in kinds
        for dtype in DTYPES
    ],
)
def test_error_is_rounding(function, options, kind, dtype):
    case, G, real = drawn(function, options, kind, dtype)
    values = [f(*case.leaves) for f in (case.ours, case.theirs)]
    ours, theirs = ([v, *torch.autograd.grad(v, case.leaves, G)] for v in values)
    G, *leaves = (exact(x, real) for x in (G, *case.leaves))
    info, k = torch.finfo(dtype), roundings(dtype) * case.operations
    faults = []
    for i, (a, b, t) in enumerate(zip(ours, theirs, case.truth(G, *leaves), strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) == (dtype, np.shape(t))
        a, b, t = a.flatten().tolist(), b.flatten().tolist(), np.ravel(t)
        errors = [off(x, r.v, info.max) for x, r in zip(a, t, strict=True)]
        faults += [
            f"result {i}[{j}]: {x}, truth {mpmath.nstr(r.v, 9)}, bound {bound(r, info):.3g}"
            for j, (x, r, error) in enumerate(zip(a, t, errors, strict=True))
            if not error <= bound(r, info)
        ]
        error = max(errors)
        allowed = max(off(x, r.v, info.max) for x, r in zip(b, t, strict=True))
        scale = max([info.smallest_normal, *(size(r.v) for r in t if abs(r.v) <= info.max)])
        if not error <= allowed + k * scale and dtype not in HALF:
            scale = max(scale, movement(case, G, leaves)[i])
        if not error <= allowed + k * scale:
            faults.append(f"result {i}: off {error:.3g}, PyTorch {allowed:.3g}, scale {scale:.3g}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("function", "options"),
    [pytest.param(*row, id=label(*row)) for *row, kinds in ROWS if "plain" in kinds],
)
def test_truth_is_true(function, options):
    case, G, real = drawn(function, options, "plain", torch.float64)
    G, *leaves = (exact(x, real) for x in (G, *case.leaves))
    _, *gradients = case.truth(G, *leaves)
    generator = np.random.default_rng(0)
    for i, (x, dx) in enumerate(zip(leaves, gradients, strict=True)):
        step = generator.normal(size=x.shape) * real(mpf("1e-20"))
        ends = ([*leaves[:i], x + s, *leaves[i + 1 :]] for s in (step, -step))
        above, below = (total_of_all(G * case.truth(G, *end)[0]).item().v for end in ends)
        expected = total_of_all(dx * step).item().v
        assert abs((above - below) / 2 - expected) <= 1e-30 * abs(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softmax"])
def test_gradient_of_a_saved_output(name, dtype):
    """What a gives, in half precision rounded once; 1 - a² would lose digits to a rounded a²."""
    draw, info = Draw("plain", dtype, REAL[WIDE[dtype]]), torch.finfo(dtype)
    case = softmax_over(draw, 1) if name == "softmax" else elementwise(draw, name)
    z = (3 * case.leaves[0]).requires_grad_()
    a = case.ours(z)
    (v,) = draw.cast(draw.normal(*a.shape))
    (dz,) = torch.autograd.grad(a, z, v)
    truth = ACTIVATIONS[name].product(exact(a, draw.real), exact(v, draw.real))
    for x, r in zip(dz.flatten().tolist(), np.ravel(truth), strict=True):
        assert off(x, r.v, info.max) <= bound(r, info)
