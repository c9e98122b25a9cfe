"""Properties of every public function, over random shapes, options, dtypes and strides.

Hypothesis draws shapes and options; numbers come from a seeded generator, so that a failing example
shrinks to something that can be read. The truth is a plain float64 expression, written out here.
A tolerance is what PyTorch's own operation is off by at that precision, and rounding: 4 eps in
float64 and float32, 1 eps in half precision, of the magnitude of what is summed (`Case.scale`).

NNMATH_EXAMPLES multiplies the number of examples.
"""

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_nnmath.functional as ours

HEAD = importlib.import_module(
    "torch_nnmath.kernels.blocked"
)  # the package's name is the operator's
F64 = torch.float64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 0, 5)
ROWS = (
    1,
    2,
    0,
    5,
    32,
    31,
    33,
    65,
    97,
    33,
    65,
    97,
)  # groups of 32 rows are the head's unit of a block
BASES = (math.e, 2.0, 10.0, 0.5)
REDUCTIONS = ("none", "sum", "mean")


def examples(number: int) -> Any:
    return settings(
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        derandomize=True,
        max_examples=number * int(os.environ.get("NNMATH_EXAMPLES", "1")),
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(scope="module", autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """`torch.empty` filled with nan, so that an element never written shows; and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@dataclass
class Case:
    """One call: a function of the tensors that can be differentiated, and what it should be."""

    inputs: dict[str, Tensor]
    ours: Callable[..., Tensor]
    truth: Callable[..., Tensor]  # in float64
    theirs: Callable[..., Tensor]  # PyTorch's own operation
    # (inputs, |upstream|) -> the magnitudes summed in the value, and in each input's gradient
    scale: Callable[..., tuple[Tensor, Sequence[Tensor]]]
    block_bytes: int | None = None
    elementwise: bool = False  # PyTorch's error is then that of each element
    rounded_to: torch.dtype | None = None  # what intermediate numbers are, if not the result's

    def blocks(self) -> Any:
        if self.block_bytes is None:
            return contextlib.nullcontext()
        return mock.patch.object(HEAD, "BLOCK_BYTES", (self.block_bytes,) * 2)


class Numbers:
    """Draws options by hypothesis and numbers by a generator."""

    def __init__(self, data: Any, dtypes: Sequence[torch.dtype], finite_mean: bool = False):
        self.draw = data.draw
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
        self.dtype = self.one_of(*dtypes)
        self.finite_mean = finite_mean  # no mean over nothing, whose derivatives are nan

    def one_of(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def shape(self, least: int = 0, most: int = 3) -> tuple[int, ...]:
        rank = self.draw(st.integers(least, most))
        shape = [self.one_of(*SIZES) for _ in range(rank)]
        if rank and self.one_of(False, False, True):
            shape[0] = self.one_of(17, 33, 65)
        if self.finite_mean:
            shape = [max(n, 1) for n in shape]
        return tuple(shape)

    def subset(self, names: Sequence[Any]) -> list[Any]:
        """Some of the names; all of them first, because shrinking goes there."""
        left_out = self.draw(st.sets(st.sampled_from(list(names))))
        return [name for name in names if name not in left_out]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=F64, generator=self.generator)

    def tensor(self, *shape: int, large: bool = False) -> Tensor:
        factor = self.one_of(1.0, 10.0) if large else 1.0
        return self.strided((self.normal(*shape) * factor).to(self.dtype))

    def positive(self, *shape: int) -> Tensor:
        return self.strided((self.uniform(*shape) + 0.05).to(self.dtype))

    def indices(self, shape: Sequence[int], high: int) -> Tensor:
        return torch.randint(high, tuple(shape), generator=self.generator)

    def strided(self, x: Tensor) -> Tensor:
        """x laid out in some way; what lies between its elements is nan."""
        layout = self.one_of("contiguous", "offset", "transposed", "stepped", "expanded")
        nan = math.nan if x.is_floating_point() else 77
        if layout == "offset":
            return x.new_full((x.numel() + 3,), nan)[3:].view(x.shape).copy_(x)
        if layout == "transposed":
            axes = tuple(reversed(range(x.dim())))
            return x.permute(axes).contiguous().permute(axes)
        if layout == "stepped":
            room = x.new_full([2 * n + 1 for n in x.shape], nan)
            return room[(slice(1, None, 2),) * x.dim()].copy_(x)
        if layout == "expanded" and x.dim():
            axis = self.draw(st.integers(0, x.dim() - 1))
            return x.narrow(axis, 0, min(x.shape[axis], 1)).expand(x.shape)
        return x


# The cases. Each function draws the arguments of one public function.


def linear(n: Numbers) -> Case:
    features, outputs = n.one_of(*SIZES), n.one_of(*SIZES)
    matrix = n.one_of(True, True, False)
    inputs = {
        "input": n.tensor(*n.shape(0, 2), features),
        "weight": n.tensor(*[outputs] * matrix, features),
    }
    if n.one_of(True, False):
        inputs["bias"] = n.tensor(*[outputs] * matrix)

    def truth(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        z = (x.unsqueeze(-2) * W).sum(-1) if matrix else (x * W).sum(-1)
        return z if b is None else z + b

    def scale(g: Tensor, *xs: Tensor) -> Any:
        return pulled_back(truth, g, *xs)

    def theirs(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        # F.linear itself refuses some shapes with a one-dimensional weight
        return F.linear(x, W, b) if matrix else x @ W if b is None else x @ W + b

    return Case(inputs, ours.linear, truth, theirs, scale)


def elementwise(f: Any, truth: Any, theirs: Any, slope: Any) -> Callable[[Numbers], Case]:
    def case(n: Numbers) -> Case:
        def scale(g: Tensor, z: Tensor) -> Any:
            z = z.requires_grad_()
            a = truth(z).abs()
            if n.dtype in (torch.float64, torch.float32):
                return a, [g * slope(a)]
            return a, [torch.autograd.grad(a, z, g)[0].abs()]  # computed in float32

        inputs = {"input": n.tensor(*n.shape(), large=True)}
        return Case(inputs, f, truth, theirs, scale, elementwise=True)

    return case


def softmax(n: Numbers) -> Case:
    shape = n.shape()
    dim = n.draw(st.integers(-max(len(shape), 1), max(len(shape), 1) - 1))
    dtype = n.one_of(None, torch.float64, *[torch.float32] * (not n.finite_mean))

    def truth(z: Tensor) -> Tensor:
        e = (z - z.detach().amax(dim, keepdim=True)).exp() if z.numel() else z.exp()
        return e / e.sum(dim, keepdim=True)

    def scale(g: Tensor, z: Tensor) -> Any:
        a = truth(z) * (1 + spread(z))
        return a, [a * (g + (a * g).sum(dim, keepdim=True))]

    return Case(
        {"input": n.tensor(*shape, large=True)},
        lambda z: ours.softmax(z, dim, dtype=dtype),
        truth,
        lambda z: F.softmax(z, dim, dtype=dtype),
        scale,
        rounded_to=dtype,
    )


def softmax_jacobian(n: Numbers) -> Case:
    shape = n.shape(1)
    dim = n.draw(st.integers(-len(shape), len(shape) - 1))

    def plain(z: Tensor) -> Tensor:
        a = torch.softmax(z, dim).movedim(dim, -1)
        identity = torch.eye(a.shape[-1], dtype=a.dtype)
        return a.unsqueeze(-1) * (identity - a.unsqueeze(-2))

    def scale(g: Tensor, z: Tensor) -> Any:
        a = torch.softmax(z, dim).movedim(dim, -1) * (1 + spread(z))
        value = torch.diag_embed(a) + a.unsqueeze(-1) * a.unsqueeze(-2)
        v = g.diagonal(dim1=-2, dim2=-1) + ((g + g.mT) @ a.unsqueeze(-1)).squeeze(-1)
        return value, [(a * (v + (a * v).sum(-1, keepdim=True))).movedim(-1, dim)]

    inputs = {"input": n.tensor(*shape, large=True)}
    return Case(inputs, lambda z: ours.softmax_jacobian(z, dim), plain, plain, scale)


def mse_loss(n: Numbers) -> Case:
    shape, reduction = n.shape(), n.one_of(*REDUCTIONS)
    if shape and n.one_of(False, True):  # broadcasting, either way
        narrow = tuple(n.one_of(size, 1) for size in shape)[n.draw(st.integers(0, len(shape))) :]
        shapes = n.one_of((shape, narrow), (narrow, shape))
    else:
        shapes = shape, shape
    inputs = {"input": n.tensor(*shapes[0]), "target": n.tensor(*shapes[1])}
    if n.one_of(False, True):
        inputs["weight"] = n.positive(*shapes[0])

    def loss(x: Tensor, t: Tensor, w: Tensor | None = None) -> Tensor:
        c = (x - t).square()
        return reduced(c if w is None else c * w, reduction, c.numel() if w is None else w.sum())

    def call(f: Any) -> Any:
        return lambda x, t, w=None: f(x, t, reduction=reduction, weight=w)

    def scale(g: Tensor, x: Tensor, t: Tensor, w: Tensor | None = None) -> Any:
        total = w.sum() if w is not None else torch.tensor(float((x - t).numel()), dtype=F64)
        g = g / total if reduction == "mean" else g
        c = (x - t).square()
        value = loss(x, t, w)
        d = g * 2 * (x - t).abs() * (1 if w is None else w)
        gradients = [d.sum_to_size(x.shape), d.sum_to_size(t.shape)]
        if w is not None:
            gradients.append((g * c).sum_to_size(w.shape))
            if reduction == "mean":
                gradients[-1] = gradients[-1] + g * value * c.numel() / max(w.numel(), 1)
        return value, gradients

    return Case(inputs, call(ours.mse_loss), loss, call(F.mse_loss), scale)


def per_example(f: Any, activation: Any) -> Callable[[Numbers], Case]:
    """squared_error, or with a sigmoid before it."""

    def case(n: Numbers) -> Case:
        shape, reduction = n.shape(), n.one_of(*REDUCTIONS)
        axes = n.draw(st.sets(st.integers(0, len(shape) - 1))) if shape else set()
        dim = tuple(axis - n.one_of(0, len(shape)) for axis in axes)
        if shape and len(dim) == 1 and n.one_of(True, False):
            dim = dim[0]
        elif not shape and n.one_of(True, False):
            dim = -1
        inputs = {"input": n.tensor(*shape, large=True), "target": n.tensor(*shape)}

        def summed(c: Tensor) -> Tensor:
            return c.sum(tuple(axes)) if axes else c

        def loss(x: Tensor, t: Tensor) -> Tensor:
            c = summed((activation(x) - t).square()) / 2
            return reduced(c, reduction, c.numel())

        def rounded_once(x: Tensor, t: Tensor) -> Tensor:
            return loss(x.to(F64), t.to(F64)).to(x.dtype)

        def scale(g: Tensor, x: Tensor, t: Tensor) -> Any:
            a = activation(x).abs()
            size = a + t.abs()
            value = summed(size.square())
            if reduction == "mean":
                g, value = g / value.numel(), value / max(value.numel(), 1)
            g = expanded_back(g, axes, reduction)
            slope = a * activation(-x) if activation is plain_sigmoid else 1
            return reduced(value, min(reduction, "sum"), 1), [g * size * slope, g * size]

        def call(x: Tensor, t: Tensor) -> Tensor:
            return f(x, t, reduction=reduction, dim=dim)

        return Case(inputs, call, loss, rounded_once, scale)

    return case


def expanded_back(g: Tensor, axes: Any, reduction: str) -> Tensor:
    """The upstream gradient against the input's axes, where none are summed over yet."""
    if reduction == "none":
        for axis in sorted(axes):
            g = g.unsqueeze(axis)
    return g


def categorical_cross_entropy(n: Numbers) -> Case:
    shape = n.shape()
    dim = n.draw(st.integers(-max(len(shape), 1), max(len(shape), 1) - 1))
    base, reduction, indices = n.one_of(*BASES), n.one_of(*REDUCTIONS), n.one_of(False, True)
    classes = shape[dim] if shape else 1
    inputs = {"probs": n.positive(*shape)}
    if indices and classes and shape:
        y = n.indices(inputs["probs"].sum(dim).shape, classes)
        one_hot = torch.zeros(shape, dtype=F64)
        one_hot.scatter_(
            dim, y.unsqueeze(dim), torch.ones((), dtype=F64).expand(y.unsqueeze(dim).shape)
        )
    else:
        y, one_hot = None, None
        inputs["target"] = n.positive(*shape)

    def loss(a: Tensor, t: Tensor | None = None) -> Tensor:
        c = -((one_hot if t is None else t) * a.log()).sum(dim) / math.log(base)
        return reduced(c, reduction, c.numel())

    def rounded_once(a: Tensor, t: Tensor | None = None) -> Tensor:
        return loss(a.to(F64), None if t is None else t.to(F64)).to(a.dtype)

    def call(a: Tensor, t: Tensor | None = None) -> Tensor:
        target = y if t is None else t
        return ours.categorical_cross_entropy(a, target, base=base, reduction=reduction, dim=dim)

    def scale(g: Tensor, a: Tensor, t: Tensor | None = None) -> Any:
        weights, k = one_hot if t is None else t, 1 / abs(math.log(base))
        value = k * (weights * a.log().abs()).sum(dim)
        if reduction == "mean":
            g, value = g / value.numel(), value / max(value.numel(), 1)
        if reduction == "none":
            g = g.unsqueeze(dim) if shape else g
        gradients = [k * g * weights / a, k * g * a.log().abs()]
        return reduced(value, min(reduction, "sum"), 1), gradients[: 1 + (t is not None)]

    return Case(inputs, call, loss, rounded_once, scale)


@dataclass
class CrossEntropyOptions:
    """What cross_entropy and the head have in common; here the classes are the last axis."""

    reduction: str
    base: float
    label_smoothing: float
    ignore_index: int
    y: Tensor | None  # class indices, or a probability target among the inputs

    @staticmethod
    def drawn(n: Numbers, rows: Sequence[int], C: int) -> tuple[Any, Tensor | None, Tensor | None]:
        """Options, and the tensors of target probabilities (*rows, C) and class weights."""
        indices = n.one_of(True, False)
        ignore_index = n.one_of(-100, 0, -1) if indices else -100
        y, t = None, None
        if indices:
            y = n.indices(rows, C)
            if n.one_of(False, True):
                y.masked_fill_(n.uniform(*rows) < 0.4, ignore_index)
            if n.finite_mean and y.numel():
                y.view(-1)[0] = C - 1 if ignore_index == 0 else 0
            if ignore_index == 0 and n.finite_mean and C == 1:
                ignore_index = -100
            y = n.strided(y if (y < 0).any() or n.one_of(True, False) else y.to(torch.uint8))
            if n.finite_mean and y.numel() and not (y.long() != ignore_index).any():
                ignore_index = -100  # the layout repeated an ignored row
        else:
            kind = n.one_of("any", "probabilities", "with zeros")
            t = n.uniform(*rows, C)
            if kind == "probabilities":
                t = t / t.sum(-1, keepdim=True)
            elif kind == "with zeros":
                t = t.masked_fill(n.uniform(*rows, C) < 0.5, 0)
        weight = None
        if n.one_of(False, True):
            weight = n.positive(C)
            if not n.finite_mean and n.one_of(False, False, True):
                weight = weight.clone().fill_(0)
        smoothing = n.one_of(0.0, 0.1, 1.0)
        options = CrossEntropyOptions(
            n.one_of(*REDUCTIONS), n.one_of(*BASES), smoothing, ignore_index, y
        )
        return options, t, weight

    def target(self, t: Tensor | None, w: Tensor | None, C: int, dtype: Any) -> Any:
        """The smoothed target before and after class weights, which rows count, the divisor."""
        w = torch.ones(C, dtype=dtype) if w is None else w
        s = self.label_smoothing
        if self.y is None:
            u = (1 - s) * t + s / C
            return u, u * w, torch.ones(u.shape[:-1], dtype=torch.bool), u[..., 0].numel()
        keep = self.y.long() != self.ignore_index
        one_hot = F.one_hot(self.y.long().masked_fill(~keep, 0), C).to(dtype)
        u = (1 - s) * one_hot + s / C
        w_y = w[self.y.long().masked_fill(~keep, 0)]
        return u, u * w, keep, w_y.masked_fill(~keep, 0).sum()

    def loss(self, z: Tensor, t: Tensor | None, w: Tensor | None) -> Tensor:
        _, u, keep, count = self.target(t, w, z.shape[-1], z.dtype)
        z = z.masked_fill(~keep.unsqueeze(-1), 0)
        l = z - z.logsumexp(-1, keepdim=True)
        if self.y is None:
            c = (u * l).sum(-1)
        else:  # picked out, so that a class that does not occur has no 0 times nan
            y = self.y.long().masked_fill(~keep, 0)
            s, w = self.label_smoothing, torch.ones(z.shape[-1], dtype=F64) if w is None else w
            c = (1 - s) * l.gather(-1, y.unsqueeze(-1)).squeeze(-1) * w[y]
            c = c + s / z.shape[-1] * (w * l).sum(-1) if s else c
        return reduced(-c.masked_fill(~keep, 0) / math.log(self.base), self.reduction, count)

    def scale(self, g: Tensor, z: Tensor, size: Tensor, t: Any, w: Any) -> Any:
        """Magnitudes in the value, and in the gradients of z, t and w; size: that of the logits."""
        u, t, keep, count = self.target(t, w, z.shape[-1], F64)
        z = z.masked_fill(~keep.unsqueeze(-1), 0)
        k = 1 / abs(math.log(self.base))
        a = z.softmax(-1)
        width = 1 + size.amax(-1, keepdim=True)
        l = z.log_softmax(-1).abs() + width
        value = k * (t * l).sum(-1) * keep
        if self.reduction == "mean":
            g = g / count
        γ = (k * g * keep).unsqueeze(-1) if self.reduction != "none" else k * (g * keep)[..., None]
        γ = γ.expand(*keep.shape, 1)
        dz = γ * (t.sum(-1, keepdim=True) * a * width + t)
        total = reduced(value, self.reduction, count)
        rows = tuple(range(z.dim() - 1))
        dw = (γ * u * l).sum(rows) if rows else γ * u * l
        if self.reduction == "mean" and self.y is not None:
            dw = dw + g * total * keep.sum()
        return total, dz, γ * l * (1 if w is None else w), dw

    def named(self) -> dict[str, Any]:
        return {
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
        }

    def theirs(self, z: Tensor, target: Tensor, w: Tensor | None) -> Tensor:
        """F.cross_entropy, whose weight has no gradient beside indices."""
        if self.y is not None:
            target, w = target.long(), None if w is None else w.detach()
        c = F.cross_entropy(z, target, w, **self.named())
        return c if self.base == math.e else c / math.log(self.base)


def named_inputs(n: Numbers, inputs: dict[str, Any], t: Tensor | None, w: Tensor | None) -> Any:
    if t is not None:
        inputs["target"] = n.strided(
            t.to(n.one_of(n.dtype, n.dtype, torch.promote_types(n.dtype, torch.float32)))
        )
    if w is not None:
        inputs["class_weight"] = w
    return {name: x for name, x in inputs.items() if x is not None}


def cross_entropy(n: Numbers) -> Case:
    C = n.one_of(1, 2, 3, 5, 17)
    rows = n.shape()
    if rows and rows[0] > 5 and len(rows) > 1:
        C = min(C, 5)
    options, t, w = CrossEntropyOptions.drawn(n, rows, C)
    dim = 1 if rows else 0
    if t is not None:
        t = t.movedim(-1, dim)
    logits = (*rows[:1], C, *rows[1:])
    inputs = named_inputs(n, {"input": n.tensor(*logits, large=True)}, t, w)
    names = tuple(inputs)

    def last(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.movedim(dim, -1)

    def loss(*xs: Tensor) -> Tensor:
        x = dict(zip(names, xs, strict=True))
        return options.loss(last(x["input"]), last(x.get("target")), x.get("class_weight"))

    def call(*xs: Tensor) -> Tensor:
        x = dict(zip(names, xs, strict=True))
        target = options.y if options.y is not None else x["target"]
        w = x.get("class_weight")
        return ours.cross_entropy(x["input"], target, w, base=options.base, **options.named())

    def theirs(*xs: Tensor) -> Tensor:
        x = dict(zip(names, xs, strict=True))
        target = options.y if options.y is not None else x["target"]
        return options.theirs(x["input"], target, x.get("class_weight"))

    def scale(g: Tensor, *xs: Tensor) -> Any:
        x = dict(zip(names, xs, strict=True))
        z, t, w = last(x["input"]), last(x.get("target")), x.get("class_weight")
        value, dz, dt, dw = options.scale(g, z, z.abs(), t, w)
        sizes = {"input": dz.movedim(-1, dim), "target": dt.movedim(-1, dim), "class_weight": dw}
        return value, [sizes[name] for name in names]

    return Case(inputs, call, loss, theirs, scale)


def linear_cross_entropy(n: Numbers) -> Case:
    C, D = n.one_of(2, 3, 1, 5, 17), n.one_of(2, 3, 1, 0, 5)
    kind = n.one_of("rows", "K-dimensional", "vector", "N-dimensional")
    N = n.one_of(*ROWS)
    if n.finite_mean:
        N = max(N, 1)
    batch: tuple[int, ...] = (N,)
    positions: tuple[int, ...] = ()
    if kind == "vector":
        batch = ()
    elif kind == "N-dimensional":
        batch = (n.one_of(2, 1, 3), N)
    elif kind == "K-dimensional":
        positions = tuple(n.one_of(2, 1, 3) for _ in range(n.one_of(1, 2)))
    rows = (*batch, *positions)
    options, t, w = CrossEntropyOptions.drawn(n, rows, C)
    class_axis = len(batch)
    if t is not None:
        t = t.movedim(-1, class_axis)
    inputs = {
        "input": n.tensor(*batch, D, large=True),
        "linear_weight": n.tensor(C, *positions, D),
        "linear_bias": n.tensor(C, *positions) if n.one_of(True, False) else None,
    }
    inputs = named_inputs(n, inputs, t, w)
    names = tuple(inputs)
    ignore = options.ignore_index
    if options.y is None or (ignore == -100 and n.one_of(True, False)):
        ignore = None
    y = options.y

    def logits(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """Classes last."""
        z = (x.view(*batch, *[1] * (W.dim() - 1), D) * W).sum(-1)
        return (z if b is None else z + b).movedim(class_axis, -1)

    def parts(xs: Sequence[Tensor]) -> Any:
        x = dict(zip(names, xs, strict=True))
        head = [x[name] for name in names if name in ("input", "linear_weight", "linear_bias")]
        return head, x.get("target"), x.get("class_weight")

    def loss(*xs: Tensor) -> Tensor:
        (x, *Wb), t, w = parts(xs)
        z = logits(x.contiguous(), *Wb)
        return options.loss(z, None if t is None else t.movedim(class_axis, -1), w)

    def call(*xs: Tensor) -> Tensor:
        (x, W, *b), t, w = parts(xs)
        named = {**options.named(), "ignore_index": ignore}
        return ours.linear_cross_entropy(
            x,
            W,
            t if y is None else y,
            linear_bias=b[0] if b else None,
            weight=w,
            base=options.base,
            **named,
        )

    def theirs(*xs: Tensor) -> Tensor:
        (x, W, *b), t, w = parts(xs)
        z = F.linear(x, W.reshape(C * math.prod(positions), D), b[0].reshape(-1) if b else None)
        target = t if y is None else y
        if kind == "K-dimensional":
            return options.theirs(z.reshape(N, C, *positions), target, w)
        if kind == "N-dimensional":
            target = target.reshape(-1, C) if y is None else target.reshape(-1)
            c = options.theirs(z.reshape(-1, C), target, w)
            return c.view(rows) if options.reduction == "none" else c
        return options.theirs(z, target, w)

    def scale(g: Tensor, *xs: Tensor) -> Any:
        (x, *Wb), t, w = parts(xs)
        x = x.contiguous()
        z, size = logits(x, *Wb), logits(x.abs(), *(v.abs() for v in Wb))
        t = None if t is None else t.movedim(class_axis, -1)
        value, dz, dt, dw = options.scale(g, z, size, t, w)
        _, gradients = pulled_back(logits, dz, x, *Wb)
        gradients = dict(zip(("input", "linear_weight", "linear_bias"), gradients, strict=False))
        gradients |= {"target": dt.movedim(-1, class_axis), "class_weight": dw}
        return value, [gradients[name] for name in names]

    block_bytes = n.one_of(1, 4 * C * 64, None, 1)
    return Case(inputs, call, loss, theirs, scale, block_bytes, rounded_to=n.dtype)


ACTIVATIONS = {
    "sigmoid": (torch.sigmoid, lambda a: a),
    "tanh": (torch.tanh, torch.ones_like),
    "relu": (torch.relu, torch.ones_like),
    "identity": (lambda z: z, torch.ones_like),
    "softmax": (lambda z: z.softmax(-1), lambda a: a),
}


def feedforward(n: Numbers) -> Case:
    depth = n.one_of(1, 2, 3)
    sizes = [n.one_of(2, 3, 1, 5, 0) for _ in range(depth + 1)]
    names = list(ACTIVATIONS)
    hidden, last = n.one_of(*names[:-1]), n.one_of(*names)
    has_bias = [n.one_of(True, False) for _ in range(depth)]
    inputs = {"input": n.tensor(*n.shape(0, 2), sizes[0])}
    for i in range(depth):
        inputs[f"W{i}"] = n.tensor(sizes[i + 1], sizes[i])
    for i in range(depth):
        if has_bias[i]:
            inputs[f"b{i}"] = n.tensor(sizes[i + 1])

    def parameters(Wb: Sequence[Tensor]) -> Any:
        biases = iter(Wb[depth:])
        return list(Wb[:depth]), [next(biases) if has else None for has in has_bias]

    def plain(x: Tensor, *Wb: Tensor) -> Tensor:
        for i, (W, b) in enumerate(zip(*parameters(Wb), strict=True)):
            x = F.linear(x, W, b)
            x = ACTIVATIONS[last if i == depth - 1 else hidden][0](x)
        return x

    def call(x: Tensor, *Wb: Tensor) -> Tensor:
        return ours.feedforward(x, *parameters(Wb), activation=hidden, output_activation=last)

    def scale(g: Tensor, x: Tensor, *Wb: Tensor) -> Any:
        """A running error analysis, in units of eps; a second derivative of f is at most 1."""
        weights, biases = parameters([v.abs() for v in Wb])
        signed = parameters(Wb)
        a, error = x, torch.zeros_like(x)
        values, errors = [a], [error]
        for i, (W, b) in enumerate(zip(weights, biases, strict=True)):
            error = F.linear(error, W) + F.linear(a.abs(), W, b)
            a = F.linear(a, signed[0][i], signed[1][i])
            a = ACTIVATIONS[last if i == depth - 1 else hidden][0](a)
            error = error + a.abs()
            values.append(a)
            errors.append(error)
        dWs, dbs = [], []
        da = g
        for i in reversed(range(depth)):
            size, slope = da, ACTIVATIONS[last if i == depth - 1 else hidden][1]
            if i == depth - 1 and last == "softmax":
                size = da + (values[i + 1] * da).sum(-1, keepdim=True)
            dz = size * (slope(values[i + 1].abs()) + errors[i + 1])
            below = values[i].abs() + errors[i]
            rows = tuple(range(x.dim() - 1))
            dWs.append(torch.tensordot(dz, below, (rows, rows)))
            dbs.append(dz.sum(rows) if rows else dz)
            da = dz @ weights[i]
        dbs = [db for db, has in zip(dbs[::-1], has_bias, strict=True) if has]
        return errors[-1], [da, *dWs[::-1], *dbs]

    return Case(inputs, call, plain, plain, scale)


def spread(z: Tensor) -> Tensor:
    return z.abs().amax() if z.numel() else z.new_zeros(())


def reduced(c: Tensor, reduction: str, count: Any) -> Tensor:
    return c if reduction == "none" else c.sum() if reduction == "sum" else c.sum() / count


def pulled_back(f: Any, g: Tensor, *xs: Tensor) -> Any:
    """Value and gradients of f with every number's magnitude in its place."""
    sizes = [x.abs().requires_grad_() for x in xs]
    value = f(*sizes)
    return value.detach(), torch.autograd.grad(value, sizes, g.abs())


def relu_in_place(x: Tensor) -> Tensor:
    return ours.relu(x.clone(), inplace=True)


def plain_relu(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, 0)


def plain_sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


CASES: dict[str, Callable[[Numbers], Case]] = {
    "linear": linear,
    "sigmoid": elementwise(ours.sigmoid, plain_sigmoid, torch.sigmoid, lambda a: a),
    "tanh": elementwise(ours.tanh, torch.tanh, torch.tanh, torch.ones_like),
    "relu": elementwise(ours.relu, plain_relu, F.relu, torch.ones_like),
    "relu in place": elementwise(relu_in_place, plain_relu, F.relu, torch.ones_like),
    "softmax": softmax,
    "softmax_jacobian": softmax_jacobian,
    "mse_loss": mse_loss,
    "squared_error": per_example(ours.squared_error, lambda x: x),
    "sigmoid_squared_error": per_example(ours.sigmoid_squared_error, plain_sigmoid),
    "categorical_cross_entropy": categorical_cross_entropy,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "feedforward": feedforward,
}

every_function = pytest.mark.parametrize("name", CASES)
# mse_loss says so where it broadcasts; vmap-free forward mode compiles nothing, yet says this
pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")


# Comparisons.


def assert_close(
    what: str,
    found: Tensor,
    truth: Tensor,
    theirs: Tensor | None,
    scale: Tensor,
    rounded_to: torch.dtype | None,
    elementwise: bool,
):
    """|found - truth| within what PyTorch is off by, and rounding, of the magnitude summed."""
    assert found.shape == truth.shape, what
    if not found.numel():
        return
    info = max(map(torch.finfo, (found.dtype, rounded_to or found.dtype)), key=lambda i: i.eps)
    scale = scale.expand(truth.shape)
    fits = ~(truth.abs() + scale > info.max / 2)
    found, scale = found.to(F64), scale.nan_to_num(0, 0, 0)
    rounding = 4 * info.eps if info.bits >= 32 else info.eps + 4 * torch.finfo(torch.float32).eps
    underflow = 16 * info.eps * info.smallest_normal
    allowed = rounding * scale + underflow * (1 + scale)
    if theirs is not None:
        off = (theirs.to(F64) - truth).abs()
        if not elementwise:
            relative = (off / scale.clamp(min=underflow))[fits & off.isfinite()]
            off = relative.max() * scale if relative.numel() else torch.zeros_like(scale)
        allowed = allowed + off.nan_to_num(0, 0, 0)
    error = (found - truth).abs()
    same = (found == truth) | (found.isnan() & truth.isnan())  # infinite, nan
    bad = fits & ~(error <= allowed) & ~same
    assert not bad.any(), (
        f"{what}: found {found[bad][:3].tolist()}, truth {truth[bad][:3].tolist()}, "
        f"error {error[bad][:3].tolist()}, allowed {allowed[bad][:3].tolist()}"
    )


def assert_same(what: str, found: Tensor, truth: Tensor, tolerance: float = 1e-10):
    """Equal in float64, against the largest number in the truth."""
    assert found.shape == truth.shape, what
    size = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    torch.testing.assert_close(
        found, truth, rtol=tolerance, atol=tolerance * size, msg=lambda m: f"{what}: {m}"
    )


def assert_bitwise(what: str, found: Tensor | None, other: Tensor | None):
    assert (found is None) == (other is None), what
    if found is not None:
        torch.testing.assert_close(
            found, other, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )


def only_what_was_asked(result: Tensor) -> list[str]:
    """Watches the backward of every formula in the graph; the faults it finds are appended."""
    faults: list[str] = []
    seen, nodes = set(), [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(next_node for next_node, _ in node.next_functions)
        if hasattr(node, "needs_input_grad"):
            needed = [next_node is not None for next_node, _ in node.next_functions]

            def watch(got: Any, _: Any, name: str = node.name(), needed: Any = needed) -> None:
                for i, gradient in enumerate(got):
                    if gradient is not None and not needed[i]:
                        faults.append(f"{name} computed a gradient for its tensor {i}")

            node.register_hook(watch)
    return faults


def leaves_of(case: Case, wanted: Sequence[str], dtype: Any = None) -> dict[str, Tensor]:
    return {
        name: x.detach().to(dtype or x.dtype).requires_grad_(name in wanted)
        for name, x in case.inputs.items()
    }


@every_function
@examples(100)
@given(data=st.data())
def test_value_and_gradients(name: str, data: Any):
    n = Numbers(data, DTYPES)
    case = CASES[name](n)
    wanted = n.subset(tuple(case.inputs))
    before = {name: (x.clone(), x._version) for name, x in case.inputs.items()}
    with case.blocks():
        leaves = leaves_of(case, wanted)
        value = case.ours(*leaves.values())
        assert value.requires_grad == bool(wanted)
        assert not any(value.data_ptr() == x.data_ptr() for x in leaves.values() if x.numel())

        reference = leaves_of(case, wanted)
        theirs = case.theirs(*reference.values())
        exact = leaves_of(case, wanted, F64)
        truth = case.truth(*exact.values())
        assert (value.dtype, value.shape) == (theirs.dtype, theirs.shape)

        g = n.strided(n.normal(*value.shape).to(value.dtype))
        plain = [x.detach() for x in exact.values()]
        scale, scales = case.scale(g.to(F64).abs(), *plain)
        close = functools.partial(
            assert_close, rounded_to=case.rounded_to, elementwise=case.elementwise
        )
        close("value", value.detach(), truth.detach(), theirs.detach(), scale.detach())
        if not wanted:
            return

        asked = [leaves[name] for name in wanted]
        faults = only_what_was_asked(value)
        gradients = torch.autograd.grad(value, asked, g, retain_graph=True)
        assert not faults
        again = torch.autograd.grad(value, asked, g)
        expected = torch.autograd.grad(truth, [exact[name] for name in wanted], g.to(F64))
        if theirs.requires_grad:
            measured = torch.autograd.grad(
                theirs, [reference[name] for name in wanted], g, allow_unused=True
            )
        else:
            measured = [None] * len(wanted)
        sizes = dict(zip(case.inputs, scales, strict=True))
        for i, key in enumerate(wanted):
            assert gradients[i].dtype == leaves[key].dtype
            what = f"gradient in {key}"
            close(what, gradients[i], expected[i], measured[i], sizes[key].detach())
            assert_bitwise(f"second backward in {key}", again[i], gradients[i])
    for key, (numbers, version) in before.items():
        assert case.inputs[key]._version == leaves[key]._version == version, f"{key} was written"
        assert_bitwise(f"{key} was written", case.inputs[key], numbers)


@every_function
@examples(25)
@given(data=st.data())
def test_second_and_third_order(name: str, data: Any):
    """Derivatives of (v, gradient) and of (w, its gradient), in the inputs and the upstream."""
    n = Numbers(data, (F64,), finite_mean=True)
    case = CASES[name](n)
    names = tuple(case.inputs)
    wanted = n.subset(names) or list(names[:1])
    seed = n.draw(st.integers(0, 2**31), "directions")

    def derivatives(f: Any) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)

        def along(xs: Sequence[Any]) -> Tensor:
            total = torch.zeros((), dtype=F64)
            for x in xs:
                v = torch.randn(asked_shape(x), dtype=F64, generator=generator)
                if isinstance(x, Tensor):
                    total = total + (x * v).sum()
            return total

        leaves = leaves_of(case, wanted)
        asked = [leaves[key] for key in wanted]
        value = f(*leaves.values())
        g = torch.randn(value.shape, dtype=F64, generator=generator).requires_grad_()
        asked.append(g)
        found = []
        derivative: Any = value
        for order in (1, 2, 3):
            upstream = g if order == 1 else None
            if not derivative.requires_grad:
                break
            gradients = torch.autograd.grad(
                derivative, asked, upstream, create_graph=True, allow_unused=True
            )
            gradients = [
                d if d is not None else torch.zeros_like(x)
                for d, x in zip(gradients, asked, strict=True)
            ]
            found.append(gradients)
            derivative = along(gradients)
        return found

    def asked_shape(x: Tensor) -> torch.Size:
        return x.shape

    with case.blocks():
        found, truth = derivatives(case.ours), derivatives(case.truth)
    zero = [torch.zeros_like(x) for x in truth[0]]
    for order in range(3):
        ours_here = found[order] if order < len(found) else zero
        truth_here = truth[order] if order < len(truth) else zero
        for key, mine, right in zip((*wanted, "upstream"), ours_here, truth_here, strict=True):
            assert_same(f"order {order + 1} in {key}", mine, right, 1e-9)


@every_function
@examples(25)
@given(data=st.data())
def test_forward_mode(name: str, data: Any):
    """jvp, jvp of jvp, jvp of vjp and vjp of jvp, with some of the inputs moving."""
    n = Numbers(data, (F64,), finite_mean=True)
    case = CASES[name](n)
    names = tuple(case.inputs)
    moving = n.subset(names) or list(names[:1])
    points = tuple(case.inputs[key] for key in moving)
    points = tuple(x.clone() if 0 in x.stride() else x for x in points)  # jvp wants its own memory
    v, w = (tuple(n.normal(*x.shape) for x in points) for _ in range(2))

    def all_of(f: Any) -> dict[str, Any]:
        def of(*xs: Tensor) -> Tensor:
            return f(*{**case.inputs, **dict(zip(moving, xs, strict=True))}.values())

        def pushed(*xs: Tensor) -> Tensor:
            return torch.func.jvp(of, xs, v)[1]

        value, tangent = torch.func.jvp(of, points, v)
        g = torch.randn(value.shape, dtype=F64, generator=torch.Generator().manual_seed(n_seed))

        def pulled(*xs: Tensor) -> Any:
            return torch.func.vjp(of, *xs)[1](g)

        return {
            "value": (value,),
            "jvp": (tangent,),
            "jvp of jvp": (torch.func.jvp(pushed, points, w)[1],),
            "jvp of vjp": torch.func.jvp(pulled, points, w)[1],
            "vjp of jvp": torch.func.vjp(pushed, *points)[1](g),
        }

    n_seed = n.draw(st.integers(0, 2**31), "upstream")
    with case.blocks():
        found, truth = all_of(case.ours), all_of(case.truth)
    for what, expected in truth.items():
        for mine, right in zip(found[what], expected, strict=True):
            assert_same(what, mine, right, 1e-9)


# Invariants. `loss` and its gradients are compared with themselves, in float64.


def gradients_of(f: Any, *xs: Tensor, create_graph: bool = False) -> Any:
    value = f(*xs)
    return torch.autograd.grad(value, xs, create_graph=create_graph, materialize_grads=True)


def fresh(*xs: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in xs]


class Rows:
    """Rows of logits or features with class indices or probabilities, and options."""

    def __init__(self, data: Any, least: int = 1):
        self.n = n = Numbers(data, (F64,))
        self.N = max(n.one_of(*ROWS), least)
        self.C, self.D = n.one_of(2, 3, 1, 5, 17), n.one_of(2, 3, 1, 5)
        self.base, self.label_smoothing = n.one_of(*BASES), n.one_of(0.0, 0.1, 1.0)
        self.indices = n.one_of(True, False)
        self.weight = n.one_of(None, n.uniform(self.C) + 0.1)
        self.reduction = n.one_of("sum", "mean", "none")
        self.z = n.normal(self.N, self.C) * 3
        self.x, self.W = n.normal(self.N, self.D), n.normal(self.C, self.D)
        self.b = n.one_of(None, n.normal(self.C))
        self.target = n.indices((self.N,), self.C) if self.indices else n.uniform(self.N, self.C)
        self.block_bytes = n.one_of(1, 4 * self.C * 64)

    def cross_entropy(self, z: Tensor, target: Tensor | None = None, **changes: Any) -> Tensor:
        options = {
            "base": self.base,
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
            "weight": self.weight,
            **changes,
        }
        return ours.cross_entropy(z, self.target if target is None else target, **options)

    def head(
        self,
        x: Tensor,
        W: Tensor,
        b: Tensor | None = None,
        target: Tensor | None = None,
        **changes: Any,
    ) -> Tensor:
        options = {
            "base": self.base,
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
            "weight": self.weight,
            **changes,
        }
        target = self.target if target is None else target
        return ours.linear_cross_entropy(x, W, target, linear_bias=b, **options)

    def in_blocks(self, block_bytes: int | None = None) -> Any:
        return mock.patch.object(HEAD, "BLOCK_BYTES", (block_bytes or self.block_bytes,) * 2)

    def parameters(self) -> list[Tensor]:
        return [self.W] if self.b is None else [self.W, self.b]


@examples(60)
@given(data=st.data())
def test_a_constant_added_to_a_rows_logits_changes_nothing(data: Any):
    rows = Rows(data)
    shift = rows.n.normal(rows.N, 1) * 100
    assert_same("loss", rows.cross_entropy(rows.z + shift), rows.cross_entropy(rows.z), 1e-12)
    upstream = rows.n.normal(rows.N)
    found, expected = (
        gradients_of(lambda z: (rows.cross_entropy(z) * upstream).sum(), z)[0]
        for z in fresh(rows.z + shift, rows.z)
    )
    assert_same("gradient", found, expected, 1e-11)


@examples(60)
@given(data=st.data())
def test_the_gradient_of_logits_sums_to_zero_and_their_hessian_ends_ones(data: Any):
    """T is constant, so c is invariant along 1: dc/dz·1 = 0 and H 1 = 0."""
    rows = Rows(data)
    with rows.in_blocks():
        upstream = rows.n.normal(rows.N)
        (z,) = fresh(rows.z)
        (dz,) = gradients_of(
            lambda z: (rows.cross_entropy(z) * upstream).sum(), z, create_graph=True
        )
        assert_same("Σ dz", dz.detach().sum(1), torch.zeros(rows.N, dtype=F64), 1e-12)
        along = rows.n.normal(rows.N, 1).expand_as(z)
        (Hv,) = torch.autograd.grad(dz, z, along)
        assert_same("H 1", Hv, torch.zeros_like(Hv), 1e-11)
        x, W = fresh(rows.x, rows.W)
        b = torch.zeros(rows.C, dtype=F64, requires_grad=True)
        _, dW, db = gradients_of(lambda *xs: (rows.head(*xs) * upstream).sum(), x, W, b)
        assert_same("Σ_classes dW", dW.sum(0), torch.zeros_like(dW[0]), 1e-11)
        assert_same("Σ_classes db", db.sum(), torch.zeros((), dtype=F64), 1e-11)


@examples(60)
@given(data=st.data())
def test_permuted_rows_give_permuted_results(data: Any):
    rows = Rows(data)
    with rows.in_blocks():
        order = torch.randperm(rows.N, generator=rows.n.generator)
        upstream = rows.n.normal(rows.N)
        y = rows.target

        def results(order: Tensor) -> Any:
            z, x, *Wb = fresh(rows.z, rows.x, *rows.parameters())
            c = rows.cross_entropy(z[order], y[order], reduction="none")
            h = rows.head(x[order], *Wb, target=y[order], reduction="none")
            squares = ours.squared_error(z[order], rows.z.flip(0)[order], reduction="none")
            fused = ours.sigmoid_squared_error(z[order], rows.z.flip(0)[order], reduction="none")
            losses = (c, h, squares, fused)
            total = sum((v * upstream[order]).sum() for v in losses)
            return losses, torch.autograd.grad(total, [z, x, *Wb])

        losses, gradients = results(order)
        plain_losses, plain_gradients = results(torch.arange(rows.N))
        for found, expected in zip(losses, plain_losses, strict=True):
            assert_same("losses", found.detach(), expected.detach()[order], 1e-12)
        for found, expected in zip(gradients, plain_gradients, strict=True):
            assert_same("gradients", found, expected, 1e-11)


@examples(60)
@given(data=st.data())
def test_the_head_is_cross_entropy_of_linear(data: Any):
    """Value, gradient, and the gradient's derivative."""
    rows = Rows(data)
    with rows.in_blocks():
        xs = [rows.x, *rows.parameters()]
        ignored = rows.n.one_of(False, True) and rows.indices
        target = rows.target.clone()
        if ignored:
            target[rows.n.uniform(rows.N) < 0.5] = -100
            target[-1] = 0
        upstream, directions = rows.n.normal(rows.N), [rows.n.normal(*x.shape) for x in xs]

        def results(f: Any) -> list[Tensor]:
            leaves = fresh(*xs)
            value = f(*leaves)
            first = torch.autograd.grad((value * upstream).sum(), leaves, create_graph=True)
            along = sum((d * v).sum() for d, v in zip(first, directions, strict=True))
            second = torch.autograd.grad(along, leaves)
            return [v.detach() for v in (value, *first, *second)]

        found = results(lambda *xs: rows.head(*xs, target=target))
        expected = results(lambda *xs: rows.cross_entropy(ours.linear(*xs), target))
        for mine, right in zip(found, expected, strict=True):
            assert_same("head", mine, right, 1e-10)


@pytest.mark.parametrize("name", ["cross_entropy", "head", "categorical_cross_entropy"])
@examples(40)
@given(data=st.data())
def test_base_divides_by_its_logarithm(name: str, data: Any):
    rows = Rows(data)
    with rows.in_blocks():
        base = rows.n.draw(st.sampled_from((2, 10, 0.5, 1.5)) | st.floats(1.01, 1e6))

        def probabilities(z: Tensor, **options: Any) -> Tensor:
            return ours.categorical_cross_entropy(
                z.sigmoid(), rows.target, reduction=rows.reduction, **options
            )

        f, xs = {
            "cross_entropy": (rows.cross_entropy, [rows.z]),
            "head": (rows.head, [rows.x, *rows.parameters()]),
            "categorical_cross_entropy": (probabilities, [rows.z]),
        }[name]
        xs = fresh(*xs)
        found, natural = f(*xs, base=base), f(*xs, base=math.e)
        assert_same("value", found.detach(), natural.detach() / math.log(base), 1e-12)
        upstream = rows.n.normal(*found.shape)
        for mine, right in zip(
            torch.autograd.grad(found, xs, upstream),
            torch.autograd.grad(natural, xs, upstream),
            strict=True,
        ):
            assert_same("gradient", mine, right / math.log(base), 1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "head"])
@examples(60)
@given(data=st.data())
def test_what_is_ignored_is_not_there(name: str, data: Any):
    """Ignored rows of nan or inf change no number, and have gradients of exactly 0."""
    rows = Rows(data, least=2)
    with rows.in_blocks():
        n = rows.n
        ignored = n.uniform(rows.N) < n.one_of(0.2, 0.7)
        ignored[0], ignored[-1] = True, False
        y = n.indices((rows.N,), rows.C).masked_fill(ignored, -100)
        bad = n.one_of(math.nan, math.inf, -math.inf, 1e300)
        directions = [n.normal(*x.shape) for x in (rows.z, rows.x, rows.W, rows.W[:, 0])]
        upstream = n.normal(rows.N)
        reduction = rows.reduction

        def results(number: float | None) -> tuple[list[Tensor], list[Tensor]]:
            rowwise = rows.z if name == "cross_entropy" else rows.x
            if number is not None:
                rowwise = torch.where(ignored[:, None], number, rowwise)
            others = [] if name == "cross_entropy" else rows.parameters()
            xs = fresh(rowwise, *others)
            f = rows.cross_entropy if name == "cross_entropy" else rows.head
            value = f(*xs, target=y)
            g = upstream if reduction == "none" else upstream[0]
            vs = directions[:1] if name == "cross_entropy" else directions[1 : 1 + len(xs)]
            if number is not None:
                vs = [torch.where(ignored[:, None], number, vs[0]), *vs[1:]]
            first = torch.autograd.grad(value, xs, g, create_graph=True)
            second = torch.autograd.grad(first, xs, vs)
            tangent = torch.func.jvp(
                lambda *xs: f(*xs, target=y), tuple(x.detach() for x in xs), tuple(vs)
            )[1]
            everything = [v.detach() for v in (value, tangent, *first, *second)]
            return everything, [first[0].detach(), second[0]]

        plain, own = results(None)
        spoilt, own_spoilt = results(bad)
        for k, (mine, right) in enumerate(zip(spoilt, plain, strict=True)):
            assert right.isfinite().all()
            assert_bitwise(f"result {k}", mine, right)
        for gradient in (*own, *own_spoilt):
            assert (gradient[ignored] == 0).all()


@examples(60)
@given(data=st.data())
def test_losses_of_parts_add_up(data: Any):
    rows = Rows(data, least=2)
    with rows.in_blocks():
        n = rows.n
        cut = n.draw(st.integers(0, rows.N))
        parts = (slice(0, cut), slice(cut, None))
        y, other = rows.target, n.normal(rows.N, rows.C)
        target_columns = n.normal(rows.N, rows.C)
        functions = {
            "cross_entropy": lambda z, x, W, s: rows.cross_entropy(z[s], y[s], reduction="sum"),
            "head": lambda z, x, W, s: rows.head(x[s], W, target=y[s], reduction="sum"),
            "squared_error": lambda z, x, W, s: ours.squared_error(z[s], other[s], reduction="sum"),
            "sigmoid_squared_error": lambda z, x, W, s: ours.sigmoid_squared_error(
                z[s], other[s], reduction="sum"
            ),
            "mse_loss": lambda z, x, W, s: ours.mse_loss(z[s], target_columns[s], reduction="sum"),
            "categorical_cross_entropy": lambda z, x, W, s: ours.categorical_cross_entropy(
                z[s].sigmoid(), y[s], reduction="sum"
            ),
        }
        xs = fresh(rows.z, rows.x, rows.W)
        for name, f in functions.items():
            whole = f(*xs, slice(None))
            total = sum(f(*xs, part) for part in parts)
            assert_same(name, total.detach(), whole.detach(), 1e-12)
            options = {"allow_unused": True, "materialize_grads": True}
            for found, expected in zip(
                torch.autograd.grad(total, xs, **options),
                torch.autograd.grad(whole, xs, **options),
                strict=True,
            ):
                assert_same(f"gradient of {name}", found, expected, 1e-11)


@examples(30)
@given(data=st.data())
def test_blocks_change_nothing_but_rounding(data: Any):
    """In half precision too: what is summed over the rows is summed in float32."""
    rows = Rows(data, least=65)
    n = rows.n
    dtype = n.one_of(torch.bfloat16, torch.float16, torch.float32, F64)
    repeats = n.one_of(1, 20)
    xs = [x.to(dtype) for x in (rows.x.repeat(repeats, 1), *rows.parameters())]
    rows.target = rows.target.repeat(repeats, *[1] * (rows.target.dim() - 1)).to(
        torch.int64 if rows.indices else dtype
    )
    rows.weight = None if rows.weight is None else rows.weight.to(dtype)
    rows.reduction = "mean"
    directions = [n.normal(*x.shape).to(dtype) for x in xs]

    def results(block_bytes: int) -> Any:
        with rows.in_blocks(block_bytes):
            leaves = fresh(*xs)
            value = rows.head(*leaves)
            first = torch.autograd.grad(value, leaves, create_graph=True)
            second = torch.autograd.grad(first, leaves, directions)
            return [v.detach() for v in (value, *first, *second)]

    blocks, whole = results(1), results(2**40)
    eps = torch.finfo(dtype).eps
    for found, expected in zip(blocks, whole, strict=True):
        size = expected.abs().max().item()
        # the result is rounded twice (once for each term); sums of up to 2000 in float32 between
        between = 100 * min(eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(found, expected, rtol=2 * eps, atol=between * max(size, 1.0))


@examples(30)
@given(data=st.data())
def test_the_head_normalises_half_precision_in_float32(data: Any):
    """Its losses are those of its logits, which are in half precision, rounded once."""
    rows = Rows(data)
    dtype = rows.n.one_of(torch.bfloat16, torch.float16)
    x, W, *b = (v.to(dtype) for v in (rows.x, *rows.parameters()))
    target = rows.target if rows.indices else rows.target.to(dtype)
    rows.weight = None if rows.weight is None else rows.weight.to(dtype)
    rows.reduction = "none"
    with rows.in_blocks():
        found = rows.head(x, W, *b, target=target)
    z = F.linear(x, W, *b)
    wide = [None if v is None else v.float() for v in (rows.weight, target)]
    expected = rows.cross_entropy(z.float(), target if rows.indices else wide[1], weight=wide[0])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected, rtol=eps, atol=eps / 50)
