"""Cross entropy on logits (F13), row by row in blocks that stay in the cache.

Shapes and meaning of z, p, t, y, keep are those of `formulas.CrossEntropy`. Where z is half, all
arithmetic is in float32, and a gradient is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath.kernels._library import SLICE, exact, operator


@operator(
    "cross_entropy(Tensor z, Tensor? p, Tensor? t, Tensor? y, Tensor? keep, int dim, float base)"
    " -> Tensor",
    lambda z, p, t, y, keep, dim, base: _losses(z, dim),
)
def cross_entropy(
    z: Tensor,
    p: Tensor | None,
    t: Tensor | None,
    y: Tensor | None,
    keep: Tensor | None,
    dim: int,
    base: float,
) -> Tensor:
    """c = (1/ln β)(T lse(z) - t·z) of each row; 0 where keep is False."""
    c = _losses(z, dim)
    memory = _memory(z, dim)
    t = None if t is None else t.expand_as(z)
    for rows in _blocks(z, dim):
        e = _less_maximum(z[rows], memory, dim)
        loss = torch.zeros_like(c[rows])
        l_y = None if y is None else e.gather(dim, y[rows])
        if t is not None:
            loss -= exact(t[rows], e).sum(dim, keepdim=True)
        lse = e.exp_().sum(dim, keepdim=True).log_()
        if t is not None:
            loss += exact(t[rows].sum(dim, keepdim=True), lse)
        if p is not None and l_y is not None:
            loss -= exact(p[rows], l_y.sub_(lse))
        c[rows] = loss if keep is None else loss.masked_fill_(~keep[rows], 0)
    return c.div_(math.log(base))


@operator(
    "cross_entropy_gradient(Tensor dc, Tensor z, Tensor? p, Tensor? t, Tensor? y, Tensor? keep,"
    " int dim, float base) -> Tensor",
    lambda dc, z, p, t, y, keep, dim, base: torch.empty_like(z),
)
def cross_entropy_gradient(
    dc: Tensor,
    z: Tensor,
    p: Tensor | None,
    t: Tensor | None,
    y: Tensor | None,
    keep: Tensor | None,
    dim: int,
    base: float,
) -> Tensor:
    """dz = (dc/ln β)(T softmax(z) - p e_y - t), 0 where keep is False."""
    dz = torch.empty_like(z)
    memory = _memory(z, dim) if dz.dtype != wide_type(z.dtype) else dz
    t = None if t is None else t.expand_as(z)
    for rows in _blocks(z, dim):
        e = _less_maximum(z[rows], dz[rows] if memory is dz else memory, dim)
        s = e.exp_().sum(dim, keepdim=True)
        k = dc[rows] / math.log(base)
        if t is None and p is not None and y is not None:
            e.scatter_add_(dim, y[rows], -s).mul_(k * p[rows] / s)
        else:
            assert t is not None
            T = t[rows].sum(dim, keepdim=True)
            e.mul_((T if p is None else T + p[rows]) / s).sub_(t[rows])
            if p is not None and y is not None:
                e.scatter_add_(dim, y[rows], -p[rows])
            e.mul_(k)
        if keep is not None and not keep[rows].all():
            e.masked_fill_(~keep[rows], 0)
        if memory is not dz:
            dz[rows] = e
    return dz


def _losses(z: Tensor, dim: int) -> Tensor:
    """Memory for a number of each row."""
    shape = list(z.shape)
    shape[dim] = 1
    return z.new_empty(shape, dtype=wide_type(z.dtype))


def _less_maximum(z: Tensor, memory: Tensor, dim: int) -> Tensor:
    """z minus the maximum of its row, in this memory."""
    e = memory[: z.shape[0]]
    return torch.sub(z, z.amax(dim, keepdim=True).to(e.dtype), out=e)


def _memory(z: Tensor, dim: int) -> Tensor:
    """Memory for a block."""
    return z.new_empty((_size(z, dim), *z.shape[1:]), dtype=wide_type(z.dtype))


def _size(z: Tensor, dim: int) -> int:
    """The examples of a block; all of them where dim is the first axis."""
    N = z.shape[0]
    return N if dim % z.dim() == 0 else min(max(SLICE // z[:1].numel(), 1), N)


def _blocks(z: Tensor, dim: int) -> Iterator[slice]:
    size = _size(z, dim)
    return (slice(i, i + size) for i in range(0, z.shape[0], size))
