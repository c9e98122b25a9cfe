"""Products with the Jacobians of the activations, and the squared errors, in blocks.

Each does the arithmetic of the formula that names it, written over one result, in blocks that stay
in the cache; where a type is half in float32, rounded once.
"""

from __future__ import annotations

import functools
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

    def step(o: Tensor, a: Tensor, v: Tensor) -> None:
        torch.le(a, 0, out=o)  # 0, or 1, whose bits make a large integer
        bits = BITS[o.element_size()]
        torch.bitwise_left_shift(v.view(bits), o.view(bits), out=o.view(bits))

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


def _losses(a: Tensor, t: Tensor, axes: int, *_: Any) -> Tensor:
    shape = [*a.shape[: a.dim() - axes], *[1] * axes]
    return torch.zeros(shape, dtype=_type(a, t), device=a.device)


@operator(
    "squared_error(Tensor a, Tensor t, int axes, float scale) -> Tensor",
    _losses,
)
def squared_error(a: Tensor, t: Tensor, axes: int, scale: float) -> Tensor:
    """F4: scale/2 Σ (t - a)² over the last axes."""
    return _sum_of_squares(a, t, axes, of_sigmoid=False).mul_(scale / 2)


@operator("sigmoid_squared_error(Tensor z, Tensor t, int axes) -> Tensor", _losses)
def sigmoid_squared_error(z: Tensor, t: Tensor, axes: int) -> Tensor:
    """F9: ½ Σ (t - σ(z))² over the last axes."""
    return _sum_of_squares(z, t, axes, of_sigmoid=True).div_(2)


def _sum_of_squares(a: Tensor, t: Tensor, axes: int, of_sigmoid: bool) -> Tensor:
    c = _losses(a, t, axes)
    per_example = c.view(-1)
    memory = torch.empty(min(SLICE, a.numel()), dtype=c.dtype, device=a.device)
    for rows, (x, y) in _tiles(c.numel(), a, t):
        e = memory[: x.numel()].view(x.shape)
        torch.sub(y, torch.sigmoid(x.to(e.dtype), out=e) if of_sigmoid else x.to(e.dtype), out=e)
        per_example[rows] += e.mul_(e).sum(1)
    return c


@operator(
    "squared_error_gradient(Tensor dc, Tensor a, Tensor t, float scale) -> Tensor",
    lambda dc, a, t, scale: torch.empty(a.shape, dtype=_type(a, t), device=a.device),
)
def squared_error_gradient(dc: Tensor, a: Tensor, t: Tensor, scale: float) -> Tensor:
    """F4: scale dc (a - t); not rounded, for -t has it too."""
    da = torch.empty(a.shape, dtype=_type(a, t), device=a.device)
    k = (scale * dc).reshape(-1, 1)
    for rows, (x, y, o) in _tiles(dc.numel(), a, t, da):
        torch.sub(x.to(o.dtype), y, out=o).mul_(k[rows])
    return da


@operator(
    "sigmoid_squared_error_gradient(Tensor dc, Tensor z, Tensor t) -> Tensor",
    lambda dc, z, t: torch.empty(z.shape, dtype=_type(z, t), device=z.device),
)
def sigmoid_squared_error_gradient(dc: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """F11: dc (σ(z) - t) σ(z) σ(-z), which is a (1 - a) without its cancellation."""
    dz = torch.empty(z.shape, dtype=_type(z, t), device=z.device)
    memory = torch.empty(min(SLICE, z.numel()), dtype=dz.dtype, device=z.device)
    k = dc.reshape(-1, 1)
    for rows, (x, y, o) in _tiles(dc.numel(), z, t, dz):
        x = x.to(o.dtype)
        rest = torch.neg(x, out=memory[: x.numel()].view(x.shape)).sigmoid_()
        torch.sigmoid(x, out=o)
        rest.mul_(o)
        o.sub_(y).mul_(rest).mul_(k[rows])
    return dz


def _type(a: Tensor, t: Tensor) -> torch.dtype:
    return torch.promote_types(wide_type(a.dtype), wide_type(t.dtype))


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
