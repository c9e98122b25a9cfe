"""Products with the Jacobians of the activations, and the squared errors, in blocks.

Each does the arithmetic of the formula that names it, written over one result, in blocks that stay
in the cache; where a type is half in float32, rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import wide, wide_type
from torch_nnmath.kernels._library import SLICE, operator

Step = Callable[..., Any]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _like_v(a: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@operator("sigmoid_product(Tensor a, Tensor v) -> Tensor", _like_v)
def sigmoid_product(a: Tensor, v: Tensor) -> Tensor:
    """F6: a (1 - a) v."""

    def step(o: Tensor, a: Tensor, v: Tensor) -> None:
        if _rounds_once():
            torch.addcmul(a, a, a, value=-1, out=o).mul_(v)
        else:
            torch.sub(_one(a), a, out=o).mul_(a).mul_(v)

    return _in_blocks(step, wide(a), wide(v), v)


@operator("tanh_product(Tensor a, Tensor v) -> Tensor", _like_v)
def tanh_product(a: Tensor, v: Tensor) -> Tensor:
    """F2: (1 - a²) v."""

    def step(o: Tensor, a: Tensor, v: Tensor) -> None:
        if _rounds_once():
            torch.addcmul(_one(a), a, a, value=-1, out=o).mul_(v)
        else:
            torch.sub(_one(a), a, out=o).mul_(1 + a).mul_(v)

    return _in_blocks(step, wide(a), wide(v), v)


@operator("relu_product(Tensor a, Tensor v) -> Tensor", _like_v)
def relu_product(a: Tensor, v: Tensor) -> Tensor:
    """F2: v where a > 0 or nan, else 0: v's bits, shifted by none or by more than there are."""

    bits, zero = BITS[v.element_size()], torch.zeros((), dtype=a.dtype, device=a.device)

    def step(o: Tensor, a: Tensor, v: Tensor) -> None:
        torch.le(a, zero, out=o)  # 0, or 1, whose bits make a large integer
        n = o.view(bits)
        torch.bitwise_left_shift(v.view(bits), n, out=n)

    return _in_blocks(step, a, v, v)


@operator("softmax_product(Tensor a, Tensor v, int dim=-1) -> Tensor", _like_v)
def softmax_product(a: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    """F7: a (v - a·v), over dim."""

    def step(o: Tensor, a: Tensor, v: Tensor) -> None:
        torch.mul(a, v, out=o)
        o.addcmul_(a, o.sum(dim, keepdim=True), value=-1)

    return _in_blocks(step, wide(a), wide(v), v, dim)


@functools.cache
def _rounds_once() -> bool:
    """Whether addcmul rounds its sum of a product once, so that nothing is lost near a = 1."""
    a = 1 - torch.arange(1, 65) * 2.0**-24
    return torch.equal(torch.addcmul(a, a, a, value=-1), (a.double() * (1 - a.double())).float())


def _one(a: Tensor) -> Tensor:
    return torch.ones((), dtype=a.dtype, device=a.device)


def _in_blocks(step: Step, a: Tensor, v: Tensor, like: Tensor, dim: int | None = None) -> Tensor:
    """`step(result, a, v)` for blocks of whole rows, those along dim; the result like `like`."""
    result = torch.empty_like(v, memory_format=torch.contiguous_format)
    rows = [x.contiguous() for x in (result, a, v)]
    if dim is None:
        rows, size = [x.view(-1) for x in rows], SLICE
    elif v.dim() and dim % v.dim():  # whole examples, each with its axis dim
        size = max(SLICE // max(v[:1].numel(), 1), 1)
    else:
        size = max(v.shape[0], 1) if v.dim() else 1
    for block in zip(*(x.split(size) if x.dim() else (x,) for x in rows), strict=True):
        step(*block)
    return result.to(like.dtype)


@operator(
    "squared_error(Tensor? dc, Tensor a, Tensor t, int axes, float scale, bool wants_c)"
    " -> (Tensor, Tensor)",
    lambda dc, a, t, axes, scale, wants_c: _results(dc, a, t, axes, wants_c),
)
def squared_error(
    dc: Tensor | None, a: Tensor, t: Tensor, axes: int, scale: float, wants_c: bool
) -> tuple[Tensor, Tensor]:
    """F4: c = scale/2 Σ (t - a)² over the last axes, if it is wanted; and, given dc, of each
    example or one for all, da = scale dc (a - t), which is not rounded, for -t has it too.
    """
    return _squared_error(dc, a, t, axes, scale, False, wants_c)


@operator(
    "sigmoid_squared_error(Tensor? dc, Tensor z, Tensor t, int axes, bool wants_c)"
    " -> (Tensor, Tensor)",
    lambda dc, z, t, axes, wants_c: _results(dc, z, t, axes, wants_c),
)
def sigmoid_squared_error(
    dc: Tensor | None, z: Tensor, t: Tensor, axes: int, wants_c: bool
) -> tuple[Tensor, Tensor]:
    """F9, F11: the same of a = σ(z); dz = dc (a - t) a σ(-z), for 1 - a cancels; not rounded."""
    return _squared_error(dc, z, t, axes, 1.0, True, wants_c)


def _squared_error(
    dc: Tensor | None,
    a: Tensor,
    t: Tensor,
    axes: int,
    scale: float,
    of_sigmoid: bool,
    wants_c: bool,
) -> tuple[Tensor, Tensor]:
    c, da = _results(dc, a, t, axes, wants_c)
    per_example, examples = c.view(-1).zero_(), math.prod(a.shape[: a.dim() - axes])
    k = None if dc is None else scale * dc
    one_for_all = float(k) if k is not None and k.numel() == 1 else 0.0
    each = None if k is None or k.numel() == 1 else k.reshape(-1, 1)
    zero = c.new_zeros(())
    memory = [a.new_empty(min(SLICE, a.numel()), dtype=c.dtype) for _ in range(2)]
    for rows, (x, y, *into) in _tiles(examples, a, t, *[da] * (k is not None)):
        e, slope = (m[: x.numel()].view(x.shape) for m in memory)
        d, x = into[0] if into else e, x.to(c.dtype)
        if not of_sigmoid:
            torch.sub(x, y, out=d)
        elif k is None:
            torch.sigmoid(x, out=d).sub_(y)
        else:
            torch.neg(x, out=slope).sigmoid_()
            slope.mul_(torch.sigmoid(x, out=d))
            d.sub_(y)
        if wants_c:
            per_example[rows] += torch.mul(d, d, out=e).sum(1) if len(d) > 1 else d[0].dot(d[0])
        if each is not None:
            (d.mul_(slope) if of_sigmoid else d).mul_(each[rows])
        elif into and of_sigmoid:
            torch.addcmul(zero, d, slope, value=one_for_all, out=d)
        elif into:
            d.mul_(one_for_all)
    return c.mul_(scale / 2), da


def _shape(a: Tensor, axes: int) -> list[int]:
    """Of a number for each example."""
    return [*a.shape[: a.dim() - axes], *[1] * axes]


def _results(
    dc: Tensor | None, a: Tensor, t: Tensor, axes: int, wants_c: bool
) -> tuple[Tensor, Tensor]:
    """Memory for c and da; an empty tensor for one that is not wanted."""
    dtype = torch.promote_types(wide_type(a.dtype), wide_type(t.dtype))
    c = a.new_empty(_shape(a, axes) if wants_c else (0,), dtype=dtype)
    return c, a.new_empty((0,) if dc is None else a.shape, dtype=dtype)


def _tiles(examples: int, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Each tensor as examples x entries, in tiles of SLICE entries; and which examples they are."""
    rows = [x.reshape(examples, -1) for x in tensors]
    entries = rows[0].shape[1]
    columns = min(entries, SLICE)
    size = SLICE // columns
    for i in range(0, examples, size):
        for j in range(0, entries, columns):
            where = slice(i, i + size)
            yield where, [x[where, j : j + columns] for x in rows]
