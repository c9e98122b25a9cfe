"""Cross entropy on logits (F13), block by block of examples that stay in the cache.

Shapes are those of `formulas.CrossEntropy`. Half types are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import cast, wide_type, zero_safe_product
from torch_nnmath._records import Target
from torch_nnmath.kernels import dispatch
from torch_nnmath.kernels._library import SLICE_SIZE, compute_log_probability, register_operator


@register_operator(
    "cross_entropy(Tensor? dc, Tensor z, Tensor? y, Tensor? p, Tensor? t, Tensor? keep, int dim,"
    " float base, bool needs_c) -> (Tensor, Tensor)",
    lambda dc, z, y, p, t, keep, dim, base, needs_c: allocate_value_and_gradient(
        dc, z, dim, needs_c
    ),
    gpu_module="triton_rows",
)
def cross_entropy(
    dc: Tensor | None,
    z: Tensor,
    y: Tensor | None,
    p: Tensor | None,
    t: Tensor | None,
    keep: Tensor | None,
    dim: int,
    base: float,
    needs_c: bool,
) -> tuple[Tensor, Tensor]:
    """c = (1/ln β)(T lse(z) - t·z) and dz = (dc/ln β)(T softmax(z) - p e_y - t), rounded once.

    c is computed if `needs_c`, dz if dc is given; dc has one value for each row, or shape (). Both
    are 0 where keep is False.
    """
    c, dz = allocate_value_and_gradient(dc, z, dim, needs_c)
    p = None if p is None else p.expand(_row_shape(z, dim))
    t = None if t is None else t.expand_as(z)
    dc = None if dc is None else dc.expand(_row_shape(z, dim)) / math.log(base)
    may_write_dz = dc is not None and dz.dtype == wide_type(z.dtype)
    workspace = None if may_write_dz else z.new_empty(_block_shape(z, dim), dtype=c.dtype)
    for rows in _iterate_blocks(z, dim):
        e = dz[rows] if workspace is None else workspace[: z[rows].shape[0]]
        ignored_mask = None if keep is None or keep[rows].all() else ~keep[rows]
        l_y = T = tz = None
        if t is None and y is not None:  # without the maximum, if the sums are in the safe range
            torch.exp(z[rows].to(e.dtype), out=e)
            s = e.sum(dim, keepdim=True)
            l_y = compute_log_probability(e.gather(dim, y[rows]), s)
        if l_y is None:
            torch.sub(z[rows], z[rows].amax(dim, keepdim=True).to(e.dtype), out=e)
            z_y = None if y is None else e.gather(dim, y[rows])
            if t is not None:
                T = t[rows].sum(dim, keepdim=True)
                tz = zero_safe_product(t[rows], e).sum(dim, keepdim=True) if needs_c else None
            s = e.exp_().sum(dim, keepdim=True)
            l_y = None if z_y is None else z_y.sub_(s.log())
        if needs_c:
            loss = torch.zeros_like(s)
            if T is not None and tz is not None:
                loss += T * s.log() - tz
            if p is not None and l_y is not None:
                loss -= zero_safe_product(p[rows], l_y)
            c[rows] = loss if ignored_mask is None else loss.masked_fill_(ignored_mask, 0)
        if dc is None:
            continue
        if T is None and p is not None and y is not None:  # (dc p / s)(e - s e_y)
            e.scatter_add_(dim, y[rows], -s).mul_(dc[rows] * p[rows] / s)
        else:  # dc (T e / s - t - p e_y)
            assert t is not None
            assert T is not None
            e.mul_((T if p is None else T + p[rows]) / s).sub_(t[rows])
            if p is not None and y is not None:
                e.scatter_add_(dim, y[rows], -p[rows])
            e.mul_(dc[rows])
        if ignored_mask is not None:
            e.masked_fill_(ignored_mask, 0)
        if workspace is not None:
            dz[rows] = e
    return c.div_(math.log(base)), dz


def cross_entropy_cost(
    n: Any, z: Tensor, y: Any, p: Any, t: Any, keep: Any, dim: int, base: float
) -> Any:
    """As `cross_entropy` with dc = 1/n, and the cost Σ c / n; None for more than a few entries.

    The cost has the bits of the formula as it is written. What an ignored row holds changes none.
    """
    if z.numel() > dispatch.MIN_KERNEL_SIZE:
        return None
    ln = math.log(base)
    l = cast(z, wide_type(z.dtype)).log_softmax(dim)
    if t is None and y is not None:
        c = l.gather(dim, y)
        dz = l.exp_().scatter_(dim, y, -1, reduce="add")
        if p.dim() or p.item() != 1:
            c = zero_safe_product(p, c)
            dz.mul_(p)
    else:
        target = Target(y, p, t, dim)
        c = target.dot(l)
        dz = target.subtract_from(l.exp_().mul_(target.total()))
    c.neg_()
    if ln != 1:  # a division takes 2 µs
        c.div_(ln)
    dz.mul_(1 / (n * ln))
    if keep is not None:
        ignored_mask = ~keep
        c.masked_fill_(ignored_mask, 0)
        dz.masked_fill_(ignored_mask, 0)  # last: a mean over no rows has an infinite 1/n
    return c.sum().div_(n), dz


def allocate_value_and_gradient(
    dc: Tensor | None, z: Tensor, dim: int, needs_c: bool
) -> tuple[Tensor, Tensor]:
    """Memory for c and dz; an empty tensor for a result that is not needed."""
    c = z.new_empty(_row_shape(z, dim) if needs_c else (0,), dtype=wide_type(z.dtype))
    return c, z.new_empty(0) if dc is None else torch.empty_like(z)


def _row_shape(z: Tensor, dim: int) -> list[int]:
    """z's shape with size 1 at `dim`."""
    return [1 if i == dim % z.dim() else n for i, n in enumerate(z.shape)]


def _block_shape(z: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of a block: whole examples; all of z if the classes are on the first axis.

    A block holds four slices: a row needs few passes, so the cost of calls matters more than the
    cache.
    """
    N = z.shape[0]
    if dim % z.dim() == 0:
        return tuple(z.shape)
    return min(max(4 * SLICE_SIZE // z[:1].numel(), 1), N), *z.shape[1:]


def _iterate_blocks(z: Tensor, dim: int) -> Iterator[slice]:
    size, *_ = _block_shape(z, dim)
    return (slice(i, i + size) for i in range(0, z.shape[0], size))
