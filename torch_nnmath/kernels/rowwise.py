"""Cross entropy on logits (F13), row by row in blocks that stay in the cache.

Shapes and meaning of z, p, t, y, keep are those of `formulas.CrossEntropy`. Where z is half, all
arithmetic is in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath.kernels._library import SLICE, exact, log_of_share, operator


@operator(
    "cross_entropy(Tensor? dc, Tensor z, Tensor? p, Tensor? t, Tensor? y, Tensor? keep, int dim,"
    " float base, bool wants_c) -> (Tensor, Tensor)",
    lambda dc, z, p, t, y, keep, dim, base, wants_c: _results(dc, z, dim, wants_c),
)
def cross_entropy(
    dc: Tensor | None,
    z: Tensor,
    p: Tensor | None,
    t: Tensor | None,
    y: Tensor | None,
    keep: Tensor | None,
    dim: int,
    base: float,
    wants_c: bool,
) -> tuple[Tensor, Tensor]:
    """c = (1/ln β)(T lse(z) - t·z) of each row, if it is wanted; 0 where keep is False; and,
    given dc, of each row or one for all, dz = (dc/ln β)(T softmax(z) - p e_y - t), rounded once.
    """
    c, dz = _results(dc, z, dim, wants_c)
    t = None if t is None else t.expand_as(z)
    dc = None if dc is None else dc.expand(_shape(z, dim)) / math.log(base)
    is_memory = dc is not None and dz.dtype == wide_type(z.dtype)
    memory = None if is_memory else z.new_empty(_size(z, dim), dtype=wide_type(z.dtype))
    for rows in _blocks(z, dim):
        e = dz[rows] if memory is None else memory[: z[rows].shape[0]]
        drop = None if keep is None or keep[rows].all() else ~keep[rows]
        l_y = T = tz = None
        if t is None and y is not None:
            torch.exp(z[rows].to(e.dtype), out=e)
            s = e.sum(dim, keepdim=True)
            l_y = log_of_share(e.gather(dim, y[rows]), s)
        if l_y is None:
            torch.sub(z[rows], z[rows].amax(dim, keepdim=True).to(e.dtype), out=e)
            z_y = None if y is None else e.gather(dim, y[rows])
            if t is not None:
                T = t[rows].sum(dim, keepdim=True)
                tz = exact(t[rows], e).sum(dim, keepdim=True) if wants_c else None
            s = e.exp_().sum(dim, keepdim=True)
            l_y = None if z_y is None else z_y.sub_(s.log())
        if wants_c:
            loss = torch.zeros_like(s)
            if T is not None and tz is not None:
                loss += T * s.log() - tz
            if p is not None and l_y is not None:
                loss -= exact(p[rows], l_y)
            c[rows] = loss if drop is None else loss.masked_fill_(drop, 0)
        if dc is None:
            continue
        if T is None and p is not None and y is not None:
            e.scatter_add_(dim, y[rows], -s).mul_(dc[rows] * p[rows] / s)
        else:
            assert t is not None
            assert T is not None
            e.mul_((T if p is None else T + p[rows]) / s).sub_(t[rows])
            if p is not None and y is not None:
                e.scatter_add_(dim, y[rows], -p[rows])
            e.mul_(dc[rows])
        if drop is not None:
            e.masked_fill_(drop, 0)
        if memory is not None:
            dz[rows] = e
    return c.div_(math.log(base)), dz


def _results(dc: Tensor | None, z: Tensor, dim: int, wants_c: bool) -> tuple[Tensor, Tensor]:
    """Memory for c and dz; an empty tensor for one that is not wanted."""
    c = z.new_empty(_shape(z, dim) if wants_c else (0,), dtype=wide_type(z.dtype))
    return c, z.new_empty(0) if dc is None else torch.empty_like(z)


def _shape(z: Tensor, dim: int) -> list[int]:
    """Of a number for each row."""
    return [1 if i == dim % z.dim() else n for i, n in enumerate(z.shape)]


def _size(z: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of a block: whole examples; all of them where dim is the first axis.

    Few passes and many small calls for each block: it pays to have fewer of them.
    """
    N = z.shape[0]
    n = N if dim % z.dim() == 0 else min(max(4 * SLICE // z[:1].numel(), 1), N)
    return n, *z.shape[1:]


def _blocks(z: Tensor, dim: int) -> Iterator[slice]:
    size, *_ = _size(z, dim)
    return (slice(i, i + size) for i in range(0, z.shape[0], size))
