"""Products with the Jacobians of softmax (F7) and of its logarithm; rows as in `triton_rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_nnmath.kernels.gpu.launch import count_processors
from torch_nnmath.kernels.gpu.row_plans import choose_plan
from torch_nnmath.kernels.gpu.triton_rows import (
    FIRST,
    LOG2_E,
    SECOND,
    fold,
    get_strides,
    launch,
    load,
    locate,
    store,
)


@triton.jit
def _compute_term(a, v, IS_LOG: tl.constexpr):
    """The term of a row's sum: a v, or v if a is ln softmax."""
    return v if IS_LOG else a * v


@triton.jit
def _compute_product(a, v, total, IS_LOG: tl.constexpr):
    """a (v - a·v), or v - e^a Σ v if a is ln softmax."""
    return v - tl.exp2(a * LOG2_E) * total[:, None] if IS_LOG else a * (v - total[:, None])


@triton.jit(do_not_specialize=["n"])
def product_tile(a, v, out, n, C, ab, ac, an, vb, vc, vn, ob, oc, on,
                 IS_LOG: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
                 IS_ALIGNED: tl.constexpr):  # fmt: skip
    b, i, mask = locate(n, ROWS, IS_ALIGNED)
    i = i[:, None]
    k = tl.arange(0, CLASSES)[None, :]
    is_read = mask[:, None] & (k < C)
    a_tile = load(a, b, i, k, ab, ac, an, is_read, 0.0)
    v_tile = load(v, b, i, k, vb, vc, vn, is_read, 0.0)
    total = tl.sum(_compute_term(a_tile, v_tile, IS_LOG), 1)
    store(out, _compute_product(a_tile, v_tile, total, IS_LOG), b, i, k, ob, oc, on, is_read)


@triton.jit(do_not_specialize=["n"])
def product_loop(a, v, out, partials, n, C, ab, ac, an, vb, vc, vn, ob, oc, on,
                 slice_tiles, slices, IS_LOG: tl.constexpr, IS_SHARED: tl.constexpr,
                 LANES: tl.constexpr, WIDTH: tl.constexpr, LANE_STEP: tl.constexpr,
                 STEP: tl.constexpr, PASSES: tl.constexpr, SLICES: tl.constexpr,
                 IS_ALIGNED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """As `row_function_loop`; the partial sums have shape (rows, slices)."""
    ROWS: tl.constexpr = 1 if IS_SHARED else LANES
    TILE: tl.constexpr = LANES * WIDTH if IS_SHARED else WIDTH
    b, i, mask = locate(n, ROWS, IS_ALIGNED)
    row = b * n + i
    i = i[:, None]
    lane = tl.arange(0, LANES)[:, None] * LANE_STEP + tl.arange(0, WIDTH)[None, :] * STEP
    first = tl.program_id(1) * slice_tiles
    last = tl.minimum(first + slice_tiles, tl.cdiv(C, TILE))
    if PASSES == SECOND:
        j = tl.arange(0, SLICES)
        if IS_SHARED:
            place = partials + (b * n + tl.program_id(0) % n) * slices + j
            total = tl.sum(tl.load(place, mask=j < slices, other=0.0), 0)
            total = tl.zeros([1], tl.float32) + total
        else:
            place = partials + row[:, None] * slices + j[None, :]
            is_inside = mask[:, None] & (j < slices)[None, :]
            total = tl.sum(tl.load(place, mask=is_inside, other=0.0), 1)
    else:
        total = tl.zeros([LANES], tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            k = tile * TILE + lane
            is_read = mask[:, None] & (k < C)
            a_tile = load(a, b, i, k, ab, ac, an, is_read, 0.0)
            v_tile = load(v, b, i, k, vb, vc, vn, is_read, 0.0)
            total = total - tl.sum(-_compute_term(a_tile, v_tile, IS_LOG), 1)
        if IS_SHARED:
            total = tl.zeros([1], tl.float32) + tl.sum(total, 0)  # as in `_merge`
    if PASSES == FIRST:
        tl.store(partials + row * slices + tl.program_id(1), total, mask=mask)
    else:
        for tile in tl.range(0, last - first, num_stages=STAGES):
            k = (last - 1 - tile) * TILE + lane
            is_read = mask[:, None] & (k < C)
            a_tile = load(a, b, i, k, ab, ac, an, is_read, 0.0)
            v_tile = load(v, b, i, k, vb, vc, vn, is_read, 0.0)
            product = _compute_product(a_tile, v_tile, total, IS_LOG)
            store(out, product, b, i, k, ob, oc, on, is_read)


def softmax_product(a: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    """As `kernels.softmax_product`. Copies a or v if no (B, C, n) view of it exists."""
    return _multiply(a, v, dim, False)


def log_softmax_product(l: Tensor, v: Tensor, dim: int) -> Tensor:
    """As `kernels.log_softmax_product`."""
    return _multiply(l, v, dim, True)


def _multiply(a: Tensor, v: Tensor, dim: int, is_log: bool) -> Tensor:
    result = torch.empty_like(v, memory_format=torch.contiguous_format)
    if v.numel() == 0:
        return result
    if v.dim() == 0:
        return _multiply(a[None], v[None], 0, is_log)[0]
    a_view, v_view, out_view = (fold(x, dim % v.dim()) for x in (a, v, result))
    numbers = [s for x in (a_view, v_view, out_view) for s in get_strides(x)]
    plan = choose_plan(v_view, 2, count_processors(v.device))
    kernels, tensors = (product_tile, product_loop), [a_view, v_view, out_view]
    launch(kernels, plan, v_view, tensors, numbers, 1, {"IS_LOG": is_log})
    return result
