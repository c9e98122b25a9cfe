"""Products with the activations' Jacobians (F2, F6, F7) and squared errors (F4, F9, F11).

Each computes its formula in cache-sized tiles and writes one result in place. Half types are
computed in float32 and rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import cast, get_constant, wide_type, widen
from torch_nnmath.kernels._library import SLICE_SIZE, register_operator

INTEGER_TYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def allocate_product(a: Tensor, v: Tensor) -> Tensor:
    """Memory for an elementwise product, in the memory format of a."""
    return torch.empty_like(a, dtype=v.dtype)


def order_by_memory(result: Tensor, *operands: Tensor) -> list[Tensor]:
    """The tensors in contiguous memory, with their axes in the order of the result's memory.

    The result, which `allocate_product` returned, is not copied.
    """
    tensors = (result, *operands)
    if not result.is_contiguous():
        axes = sorted(range(result.dim()), key=result.stride, reverse=True)
        tensors = tuple(x.permute(axes) for x in tensors)
    return [x.contiguous() for x in tensors]


@register_operator(
    "sigmoid_product(Tensor a, Tensor v) -> Tensor",
    allocate_product,
    gpu_module="triton_elementwise",
    is_fast_if_small=True,
)
def sigmoid_product(a: Tensor, v: Tensor) -> Tensor:
    """F6: a (1 - a) v."""
    return _write_tiles(_write_sigmoid_product, widen(a), widen(v), v.dtype)


def _write_sigmoid_product(out: Tensor | None, a: Tensor, v: Tensor) -> Tensor:
    if _has_fused_addcmul():
        return torch.addcmul(a, a, a, value=-1, out=out).mul_(v)
    return torch.sub(a.new_ones(()), a, out=out).mul_(a).mul_(v)


@register_operator(
    "tanh_product(Tensor a, Tensor v) -> Tensor",
    allocate_product,
    gpu_module="triton_elementwise",
    is_fast_if_small=True,
)
def tanh_product(a: Tensor, v: Tensor) -> Tensor:
    """F2: (1 - a²) v."""
    return _write_tiles(_write_tanh_product, widen(a), widen(v), v.dtype)


def _write_tanh_product(out: Tensor | None, a: Tensor, v: Tensor) -> Tensor:
    if _has_fused_addcmul():  # of w = (1 - a) v and (1 + a) w
        w = torch.addcmul(v, a, v, value=-1, out=out)
        return w.addcmul_(a, w)
    return torch.sub(a.new_ones(()), a, out=out).mul_(1 + a).mul_(v)


@register_operator(
    "relu_product(Tensor a, Tensor v) -> Tensor",
    allocate_product,
    gpu_module="triton_elementwise",
    is_fast_if_small=True,
)
def relu_product(a: Tensor, v: Tensor) -> Tensor:
    """F2: v where a > 0 or nan, else 0.

    Shifts v's bits left by the bit pattern of `a <= 0` as a float: 0.0 shifts by nothing; 1.0
    exceeds the width and clears v.
    """
    return _write_tiles(_write_relu_product, a, v, v.dtype)


def _write_relu_product(out: Tensor | None, a: Tensor, v: Tensor) -> Tensor:
    out = allocate_product(a, v) if out is None else out
    integers = INTEGER_TYPES[v.element_size()]
    bits = torch.le(a, get_constant(0.0, a.dtype), out=out).view(integers)  # those of 0.0 or 1.0
    # the bits of a lazily negated tensor have the wrong sign
    torch.bitwise_left_shift(v.resolve_neg().view(integers), bits, out=bits)
    return out


@register_operator(
    "softmax_product(Tensor a, Tensor v, int dim=-1) -> Tensor",
    lambda a, v, dim=-1: torch.empty_like(v, memory_format=torch.contiguous_format),
    gpu_module="triton_softmax",
    is_fast_if_small=True,
)
def softmax_product(a: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    """F7: a (v - a·v), over dim."""

    def write(out: Tensor | None, a: Tensor, v: Tensor) -> Tensor:
        out = torch.mul(a, v, out=out)
        return out.addcmul_(a, out.sum(dim, keepdim=True), value=-1)

    return _write_tiles(write, widen(a), widen(v), v.dtype, dim)


@functools.cache
def _has_fused_addcmul() -> bool:
    """Whether addcmul rounds once, as a fused multiply-add, so that a - a² is exact near a = 1."""
    a = 1 - torch.arange(1, 65) * 2.0**-24
    return torch.equal(torch.addcmul(a, a, a, value=-1), (a.double() * (1 - a.double())).float())


def _write_tiles(
    write: Callable[[Tensor | None, Tensor, Tensor], Tensor],
    a: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    dim: int | None = None,
) -> Tensor:
    """Calls `write(result, a, v)` for each tile; a tile holds all of the axis `dim`.

    The result has a's memory format; with a `dim` it is contiguous. `write` returns the result, and
    allocates it if it gets None.
    """
    if v.numel() <= SLICE_SIZE and a.is_contiguous() and v.is_contiguous():
        return cast(write(None, a, v), dtype)
    if dim is None:
        result = allocate_product(a, v)
    else:
        result = torch.empty_like(v, memory_format=torch.contiguous_format)
    if v.numel() <= SLICE_SIZE:  # one tile
        write(result, a, v)
        return cast(result, dtype)
    tensors = order_by_memory(result, a, v)
    if dim is None:
        tensors, size = [x.view(-1) for x in tensors], SLICE_SIZE
    elif v.dim() and dim % v.dim():
        size = max(SLICE_SIZE // max(v[:1].numel(), 1), 1)
    else:
        size = max(v.shape[0], 1) if v.dim() else 1
    for tile in zip(*(x.split(size) if x.dim() else (x,) for x in tensors), strict=True):
        write(*tile)
    return result.to(dtype)


def keep_memory_format(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `compute(dc, a, t, axes, ...)` so that its results have a's memory format.

    `compute` gets tensors whose axes are in the order of a's memory. Where this order would mix the
    axes of an example with others, the results are contiguous.
    """

    @functools.wraps(compute)
    def run(dc: Any, a: Tensor, t: Tensor, axes: int, *options: Any) -> Any:
        if a.is_contiguous():
            return compute(dc, a, t, axes, *options)
        order, leading = sorted(range(a.dim()), key=a.stride, reverse=True), a.dim() - axes
        if sorted(order[:leading]) != [*range(leading)]:
            return compute(dc, a, t, axes, *options)
        original_order = [order.index(axis) for axis in range(a.dim())]
        if isinstance(dc, Tensor) and dc.dim():
            dc = dc.permute(order)
        results = compute(dc, a.permute(order), t.permute(order), axes, *options)
        if results is None:
            return None
        return tuple(x.permute(original_order) if x.dim() == a.dim() else x for x in results)

    return run


@register_operator(
    "squared_error(Tensor? dc, Tensor a, Tensor t, int axes, float scale, bool needs_c)"
    " -> (Tensor, Tensor)",
    lambda dc, a, t, axes, scale, needs_c: allocate_loss(dc, a, t, axes, needs_c),
    gpu_module="triton_elementwise",
)
def squared_error(
    dc: Tensor | None, a: Tensor, t: Tensor, axes: int, scale: float, needs_c: bool
) -> tuple[Tensor, Tensor]:
    """F4: c = scale/2 Σ (t - a)² over the last axes, and da = scale dc (a - t).

    c is computed if `needs_c`, da if dc is given; dc has one value for each example, or shape ().
    da is not rounded, since -da is the gradient of t.
    """
    return _compute_squared_error(dc, a, t, axes, scale, False, needs_c)


@register_operator(
    "sigmoid_squared_error(Tensor? dc, Tensor z, Tensor t, int axes, bool needs_c)"
    " -> (Tensor, Tensor)",
    lambda dc, z, t, axes, needs_c: allocate_loss(dc, z, t, axes, needs_c),
    gpu_module="triton_elementwise",
)
def sigmoid_squared_error(
    dc: Tensor | None, z: Tensor, t: Tensor, axes: int, needs_c: bool
) -> tuple[Tensor, Tensor]:
    """F9, F11: `squared_error` of a = σ(z), and dz = dc (a - t) a σ(-z), since 1 - a cancels."""
    return _compute_squared_error(dc, z, t, axes, 1.0, True, needs_c)


@keep_memory_format
def _compute_squared_error(
    dc: Tensor | None,
    a: Tensor,
    t: Tensor,
    axes: int,
    scale: float,
    is_sigmoid: bool,
    needs_c: bool,
) -> tuple[Tensor, Tensor]:
    """Both losses; with `is_sigmoid`, `a` is z."""
    c, da = allocate_loss(dc, a, t, axes, needs_c)
    losses, examples = c.view(-1).zero_(), math.prod(a.shape[: a.dim() - axes])
    tensors = [a, t] if dc is None else [a, t, da]
    k = None if dc is None else scale * dc  # one factor of da, or one for each example
    common_k = float(k) if k is not None and k.numel() == 1 else 0.0
    row_k = None if k is None or k.numel() == 1 else k.reshape(-1, 1)
    zero = c.new_zeros(())
    workspace = [a.new_empty(min(SLICE_SIZE, a.numel()), dtype=c.dtype) for _ in range(2)]
    for rows, (a_tile, t_tile, *da_tiles) in _split_tiles(examples, *tensors):
        scratch, slope = (m[: a_tile.numel()].view(a_tile.shape) for m in workspace)
        error = da_tiles[0] if da_tiles else scratch
        a_tile = a_tile.to(c.dtype)
        if not is_sigmoid:
            torch.sub(a_tile, t_tile, out=error)
        elif k is None:
            torch.sigmoid(a_tile, out=error).sub_(t_tile)
        else:
            torch.neg(a_tile, out=slope).sigmoid_()
            slope.mul_(torch.sigmoid(a_tile, out=error))
            error.sub_(t_tile)
        if needs_c and len(error) > 1:
            losses[rows] += torch.mul(error, error, out=scratch).sum(1)
        elif needs_c:
            losses[rows] += error[0].dot(error[0])
        if row_k is not None:
            (error.mul_(slope) if is_sigmoid else error).mul_(row_k[rows])
        elif k is not None and is_sigmoid:
            torch.addcmul(zero, error, slope, value=common_k, out=error)
        elif k is not None:
            error.mul_(common_k)
    return c.mul_(scale / 2), da


@keep_memory_format
def squared_error_cost(n: float, a: Tensor, t: Tensor, axes: int, scale: float) -> Any:
    """As `squared_error` of one example and dc = 1/n, with the cost c/n; None for larger inputs."""
    if axes < a.dim() or a.numel() > SLICE_SIZE:
        return None
    error = _subtract(a, t)
    cost = _sum_squares(error).mul_(scale / (2 * n))
    return cost, error.mul_(scale / n)


@keep_memory_format
def sigmoid_squared_error_cost(n: float, z: Tensor, t: Tensor, axes: int) -> Any:
    """As `sigmoid_squared_error` and dc = 1/n, with the cost c/n; None for larger inputs."""
    if axes < z.dim() or z.numel() > SLICE_SIZE:
        return None
    z = widen(z)
    a = z.sigmoid()
    error = _subtract(a, t)
    cost = _sum_squares(error).mul_(1 / (2 * n))
    return cost, error.mul_(a).mul_(z.neg().sigmoid_()).mul_(1 / n)


def _subtract(a: Tensor, t: Tensor) -> Tensor:
    """a - t in the type of the loss and in contiguous memory."""
    return cast(a, _find_loss_type(a, t)).contiguous() - t.contiguous()


def _sum_squares(x: Tensor) -> Tensor:
    entries = x.view(-1)
    return entries.dot(entries)


@keep_memory_format
def allocate_loss(
    dc: Tensor | None, a: Tensor, t: Tensor, axes: int, needs_c: bool
) -> tuple[Tensor, Tensor]:
    """Memory for c and da; an empty tensor for a result that is not needed."""
    dtype = _find_loss_type(a, t)
    shape = (*a.shape[: a.dim() - axes], *[1] * axes)
    c = a.new_empty(shape if needs_c else (0,), dtype=dtype)
    return c, a.new_empty((0,) if dc is None else a.shape, dtype=dtype)


def _find_loss_type(a: Tensor, t: Tensor) -> torch.dtype:
    dtype = torch.promote_types(wide_type(a.dtype), wide_type(t.dtype))
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _split_tiles(examples: int, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Splits each tensor, as examples x entries, into tiles; yields the examples and the tiles."""
    matrices = [x.reshape(examples, -1) for x in tensors]
    entries = matrices[0].shape[1]
    width = min(entries, SLICE_SIZE)
    height = SLICE_SIZE // width
    for i in range(0, examples, height):
        for j in range(0, entries, width):
            rows = slice(i, i + height)
            yield rows, [x[rows, j : j + width] for x in matrices]
