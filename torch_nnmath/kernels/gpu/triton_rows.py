"""Row-wise kernels on given logits: cross entropy (F13) and the softmax product (F7).

Every tensor is viewed as (B, C, n), classes on the middle axis; row b n + i has the entries
[b, :, i]. If the classes are on the last axis, B is 1 and n the number of rows. Sums are float32,
results are rounded once, and no kernel needs the order of two programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_nnmath.kernels.gpu.launch import count_processors, use_device
from torch_nnmath.kernels.gpu.row_plans import Plan, choose_plan, next_power

LOG2_E = tl.constexpr(math.log2(math.e))
WHOLE, FIRST, SECOND = (tl.constexpr(i) for i in range(3))  # which passes a program makes


@triton.jit
def _locate(n, ROWS: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The batch index b, the places i of a program's rows, and which of them exist."""
    if IS_ALIGNED:
        n = tl.multiple_of(n, 16)
    programs = tl.cdiv(n, ROWS)
    program = tl.program_id(0)
    i = (program % programs) * ROWS + tl.arange(0, ROWS)
    return (program // programs).to(tl.int64), i, i < n


@triton.jit
def _load_row(x, row, stride, mask):
    return tl.load(x + row * stride, mask=mask, other=0)


@triton.jit
def _load(x, b, i, k, sb, sc, sn, mask, other: tl.constexpr):
    """Entries [b, k, i] in float32; i and k broadcast to a tile."""
    place = b * sb + i.to(tl.int64) * sn + k.to(tl.int64) * sc
    return tl.load(x + place, mask=mask, other=other).to(tl.float32)


@triton.jit
def _store(out, x, b, i, k, sb, sc, sn, mask):
    place = b * sb + i.to(tl.int64) * sn + k.to(tl.int64) * sc
    tl.store(out + place, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _multiply_zero_safe(t, x):
    """t x, but 0 where t is 0 and x infinite."""
    return tl.where((t == 0.0) & (tl.abs(x) == float("inf")), 0.0, t * x)


@triton.jit
def _extend(m, s, T, tz, z, t, HAS_T: tl.constexpr):
    """Adds a tile to a lane's m = max z, s = Σ e^{z-m}, T = Σ t, tz = Σ t (z-m).

    Sums are written as `x - tl.sum(-y)`, since Triton 3.6 fails at `x += tl.sum(y)` in a loop.
    """
    highest = tl.max(z, 1)
    highest = tl.where(highest > m, highest, m)
    r = tl.where(highest == float("-inf"), 0.0, highest)
    x = z - r[:, None]
    s = s * tl.exp2((m - r) * LOG2_E) - tl.sum(-tl.exp2(x * LOG2_E), 1)
    if HAS_T:
        tz = tz + tl.where(m == float("-inf"), 0.0, T * (m - r))
        tz = tz - tl.sum(-_multiply_zero_safe(t, x), 1)
        T = T - tl.sum(-t, 1)
    return highest, s, T, tz


@triton.jit
def _merge(m, s, T, tz, IS_SHARED: tl.constexpr, HAS_T: tl.constexpr):
    """Merges lanes or slices of one row, (X), with IS_SHARED; else slices of (rows, slices).

    The sums of one row become scalars first, so that Triton 3.6 keeps the tile's layout.
    """
    AXIS: tl.constexpr = 0 if IS_SHARED else 1
    highest = tl.max(m, AXIS)
    r = tl.where(highest == float("-inf"), 0.0, highest)
    distance = m - (r if IS_SHARED else r[:, None])
    s = tl.sum(s * tl.exp2(distance * LOG2_E), AXIS)
    if HAS_T:
        tz = tl.sum(tz + tl.where(m == float("-inf"), 0.0, T * distance), AXIS)
        T = tl.sum(T, AXIS)
    if IS_SHARED:
        zero = tl.zeros([1], tl.float32)
        highest = zero + highest
        s = zero + s
        if HAS_T:
            T = zero + T
            tz = zero + tz
    if not HAS_T:
        T = s
        tz = s
    return highest, s, T, tz


@triton.jit
def _write_loss(c, row, mask, is_kept, m, s, T, tz, z_y, p, inverse_log, HAS_T: tl.constexpr,
                HAS_Y: tl.constexpr):  # fmt: skip
    log_s = tl.log(s)
    loss = log_s * 0.0
    if HAS_T:
        loss = T * log_s - tz
    if HAS_Y:
        loss -= _multiply_zero_safe(p, z_y - m - log_s)
    tl.store(c + row, tl.where(is_kept, loss * inverse_log, 0.0), mask=mask)


@triton.jit
def _compute_gradient(z, t, k, y, is_kept, m, factor, g, gp, HAS_T: tl.constexpr,
                      HAS_Y: tl.constexpr):  # fmt: skip
    """dz = factor e^{z-m} - g t - g p e_y, with factor = g T / s."""
    dz = factor[:, None] * tl.exp2((z - m[:, None]) * LOG2_E)
    if HAS_T:
        dz -= g[:, None] * t
    if HAS_Y:
        dz -= tl.where(k == y[:, None], gp[:, None], 0.0)
    return tl.where(is_kept[:, None], dz, 0.0)


@triton.jit(do_not_specialize=["n"])
def cross_entropy_tile(z, t, y, p, keep, dc, c, dz, n, C, zb, zc, zn, tb, tc, tn, db, dk, dn,
                       y_stride, p_stride, keep_stride, dc_stride, inverse_log,
                       ROWS: tl.constexpr, CLASSES: tl.constexpr,
                       IS_ALIGNED: tl.constexpr):  # fmt: skip
    """Rows that fit in registers: one read and one write."""
    HAS_T: tl.constexpr = t is not None
    HAS_Y: tl.constexpr = y is not None
    b, i, mask = _locate(n, ROWS, IS_ALIGNED)
    row = b * n + i
    is_kept = mask
    if keep is not None:
        is_kept = mask & (_load_row(keep, row, keep_stride, mask) != 0)
    k = tl.arange(0, CLASSES)[None, :]
    is_read = is_kept[:, None] & (k < C)
    z_tile = _load(z, b, i[:, None], k, zb, zc, zn, is_read, float("-inf"))
    m = tl.max(z_tile, 1)
    x = z_tile - m[:, None]
    s = tl.sum(tl.exp2(x * LOG2_E), 1)
    t_tile = z_tile
    total = s * 0.0
    T = s
    tz = s
    if HAS_T:
        t_tile = _load(t, b, i[:, None], k, tb, tc, tn, is_read, 0.0)
        tz = tl.sum(_multiply_zero_safe(t_tile, x), 1)
        T = tl.sum(t_tile, 1)
        total = T
    y_row = i
    p_row = s
    z_y = s
    if HAS_Y:
        y_row = _load_row(y, row, y_stride, is_kept).to(tl.int32)
        p_row = _load_row(p, row, p_stride, is_kept).to(tl.float32)
        z_y = _load(z, b, i, y_row, zb, zc, zn, is_kept & (y_row >= 0) & (y_row < C), float("nan"))
        total = T + p_row if HAS_T else p_row
    if c is not None:
        _write_loss(c, row, mask, is_kept, m, s, T, tz, z_y, p_row, inverse_log, HAS_T, HAS_Y)
    if dz is not None:
        g = _load_row(dc, row, dc_stride, is_kept).to(tl.float32) * inverse_log
        result = _compute_gradient(
            z_tile, t_tile, k, y_row, is_kept, m, g * total / s, g, g * p_row, HAS_T, HAS_Y
        )
        _store(dz, result, b, i[:, None], k, db, dk, dn, mask[:, None] & (k < C))


@triton.jit(do_not_specialize=["n"])
def cross_entropy_loop(z, t, y, p, keep, dc, c, dz, partials, n, C, zb, zc, zn, tb, tc, tn,
                       db, dk, dn, y_stride, p_stride, keep_stride, dc_stride, inverse_log,
                       slice_tiles, slices, IS_SHARED: tl.constexpr, LANES: tl.constexpr,
                       WIDTH: tl.constexpr, LANE_STEP: tl.constexpr, STEP: tl.constexpr,
                       PASSES: tl.constexpr, SLICES: tl.constexpr, IS_ALIGNED: tl.constexpr,
                       STAGES: tl.constexpr):  # fmt: skip
    """Longer rows: a pass for the sums, and one for the gradient.

    With IS_SHARED, a program's lanes share one row; otherwise each has a row. If a row is split
    into slices, the first launch writes each slice's sums to `partials` (rows, slices, 4), and
    the second merges them.
    """
    HAS_T: tl.constexpr = t is not None
    HAS_Y: tl.constexpr = y is not None
    ROWS: tl.constexpr = 1 if IS_SHARED else LANES
    TILE: tl.constexpr = LANES * WIDTH if IS_SHARED else WIDTH
    b, i, mask = _locate(n, ROWS, IS_ALIGNED)
    row = b * n + i
    is_kept = mask
    if keep is not None:
        is_kept = mask & (_load_row(keep, row, keep_stride, mask) != 0)
    lane = tl.arange(0, LANES)[:, None] * LANE_STEP + tl.arange(0, WIDTH)[None, :] * STEP
    first = tl.program_id(1) * slice_tiles
    last = tl.minimum(first + slice_tiles, tl.cdiv(C, TILE))

    T = tl.zeros([LANES], tl.float32)
    if PASSES == SECOND:
        j = tl.arange(0, SLICES)
        if IS_SHARED:
            place = partials + ((b * n + tl.program_id(0) % n) * slices + j) * 4
            is_inside = j < slices
        else:
            place = partials + (row[:, None] * slices + j[None, :]) * 4
            is_inside = mask[:, None] & (j < slices)[None, :]
        m = tl.load(place, mask=is_inside, other=float("-inf"))
        s = tl.load(place + 1, mask=is_inside, other=0.0)
        T = tl.load(place + 2, mask=is_inside, other=0.0)
        tz = tl.load(place + 3, mask=is_inside, other=0.0)
        m, s, T, tz = _merge(m, s, T, tz, IS_SHARED, HAS_T)
    else:
        m = tl.full([LANES], float("-inf"), tl.float32)
        s = tl.zeros([LANES], tl.float32)
        tz = tl.zeros([LANES], tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            k = tile * TILE + lane
            is_read = is_kept[:, None] & (k < C)
            z_tile = _load(z, b, i[:, None], k, zb, zc, zn, is_read, float("-inf"))
            t_tile = z_tile
            if HAS_T:
                t_tile = _load(t, b, i[:, None], k, tb, tc, tn, is_read, 0.0)
            m, s, T, tz = _extend(m, s, T, tz, z_tile, t_tile, HAS_T)
        if IS_SHARED:
            m, s, T, tz = _merge(m, s, T, tz, True, HAS_T)
    if PASSES == FIRST:
        place = partials + (row * slices + tl.program_id(1)) * 4
        tl.store(place, m, mask=mask)
        tl.store(place + 1, s, mask=mask)
        if HAS_T:
            tl.store(place + 2, T, mask=mask)
            tl.store(place + 3, tz, mask=mask)
    else:
        s = tl.where(m == float("-inf"), float("nan"), s)  # as if the maximum were subtracted
        total = s * 0.0
        if HAS_T:
            total = T
        y_row = i
        p_row = s
        z_y = s
        if HAS_Y:
            y_row = _load_row(y, row, y_stride, is_kept).to(tl.int32)
            p_row = _load_row(p, row, p_stride, is_kept).to(tl.float32)
            is_inside = is_kept & (y_row >= 0) & (y_row < C)
            z_y = _load(z, b, i, y_row, zb, zc, zn, is_inside, float("nan"))
            total = T + p_row if HAS_T else p_row
        if c is not None and tl.program_id(1) == 0:
            _write_loss(c, row, mask, is_kept, m, s, T, tz, z_y, p_row, inverse_log, HAS_T, HAS_Y)
        if dz is not None:
            g = _load_row(dc, row, dc_stride, is_kept).to(tl.float32) * inverse_log
            factor = g * total / s
            gp = g * p_row
            # descending: what the first pass read last is still in the cache
            for tile in tl.range(0, last - first, num_stages=STAGES):
                k = (last - 1 - tile) * TILE + lane
                is_read = is_kept[:, None] & (k < C)
                z_tile = _load(z, b, i[:, None], k, zb, zc, zn, is_read, float("-inf"))
                t_tile = z_tile
                if HAS_T:
                    t_tile = _load(t, b, i[:, None], k, tb, tc, tn, is_read, 0.0)
                result = _compute_gradient(
                    z_tile, t_tile, k, y_row, is_kept, m, factor, g, gp, HAS_T, HAS_Y
                )
                _store(dz, result, b, i[:, None], k, db, dk, dn, mask[:, None] & (k < C))


@triton.jit(do_not_specialize=["n"])
def softmax_product_tile(a, v, out, n, C, ab, ac, an, vb, vc, vn, ob, oc, on,
                         ROWS: tl.constexpr, CLASSES: tl.constexpr,
                         IS_ALIGNED: tl.constexpr):  # fmt: skip
    b, i, mask = _locate(n, ROWS, IS_ALIGNED)
    i = i[:, None]
    k = tl.arange(0, CLASSES)[None, :]
    is_read = mask[:, None] & (k < C)
    a_tile = _load(a, b, i, k, ab, ac, an, is_read, 0.0)
    v_tile = _load(v, b, i, k, vb, vc, vn, is_read, 0.0)
    av = tl.sum(a_tile * v_tile, 1)
    _store(out, a_tile * (v_tile - av[:, None]), b, i, k, ob, oc, on, is_read)


@triton.jit(do_not_specialize=["n"])
def softmax_product_loop(a, v, out, partials, n, C, ab, ac, an, vb, vc, vn, ob, oc, on,
                         slice_tiles, slices, IS_SHARED: tl.constexpr, LANES: tl.constexpr,
                         WIDTH: tl.constexpr, LANE_STEP: tl.constexpr, STEP: tl.constexpr,
                         PASSES: tl.constexpr, SLICES: tl.constexpr, IS_ALIGNED: tl.constexpr,
                         STAGES: tl.constexpr):  # fmt: skip
    """As `cross_entropy_loop`; the partial sums have shape (rows, slices)."""
    ROWS: tl.constexpr = 1 if IS_SHARED else LANES
    TILE: tl.constexpr = LANES * WIDTH if IS_SHARED else WIDTH
    b, i, mask = _locate(n, ROWS, IS_ALIGNED)
    row = b * n + i
    i = i[:, None]
    lane = tl.arange(0, LANES)[:, None] * LANE_STEP + tl.arange(0, WIDTH)[None, :] * STEP
    first = tl.program_id(1) * slice_tiles
    last = tl.minimum(first + slice_tiles, tl.cdiv(C, TILE))
    if PASSES == SECOND:
        j = tl.arange(0, SLICES)
        if IS_SHARED:
            place = partials + (b * n + tl.program_id(0) % n) * slices + j
            av = tl.zeros([1], tl.float32) + tl.sum(tl.load(place, mask=j < slices, other=0.0), 0)
        else:
            place = partials + row[:, None] * slices + j[None, :]
            is_inside = mask[:, None] & (j < slices)[None, :]
            av = tl.sum(tl.load(place, mask=is_inside, other=0.0), 1)
    else:
        av = tl.zeros([LANES], tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            k = tile * TILE + lane
            is_read = mask[:, None] & (k < C)
            a_tile = _load(a, b, i, k, ab, ac, an, is_read, 0.0)
            v_tile = _load(v, b, i, k, vb, vc, vn, is_read, 0.0)
            av = av - tl.sum(-a_tile * v_tile, 1)
        if IS_SHARED:
            av = tl.zeros([1], tl.float32) + tl.sum(av, 0)  # as in `_merge`
    if PASSES == FIRST:
        tl.store(partials + row * slices + tl.program_id(1), av, mask=mask)
    else:
        for tile in tl.range(0, last - first, num_stages=STAGES):
            k = (last - 1 - tile) * TILE + lane
            is_read = mask[:, None] & (k < C)
            a_tile = _load(a, b, i, k, ab, ac, an, is_read, 0.0)
            v_tile = _load(v, b, i, k, vb, vc, vn, is_read, 0.0)
            _store(out, a_tile * (v_tile - av[:, None]), b, i, k, ob, oc, on, is_read)


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
    """As `kernels.cross_entropy`. Copies z or t if no (B, C, n) view of it exists."""
    dim %= z.dim()
    row_shape = (*z.shape[:dim], 1, *z.shape[dim + 1 :])
    c = z.new_zeros(row_shape if needs_c else (0,), dtype=torch.float32)
    dz = z.new_empty(0) if dc is None else torch.empty_like(z)
    if z.numel() == 0 or (dc is None and not needs_c):
        return c, dz
    z_view = _fold(z, dim)
    t_view = None if t is None else _fold(t.expand_as(z), dim)
    dz_view = None if dc is None else _fold(dz, dim)
    y, p = (None, None) if y is None or p is None else (y, p)
    row_tensors = [
        None if x is None else x.expand(row_shape).reshape(-1)
        for x in (y, p, None if keep is None else keep.view(torch.uint8), dc)
    ]
    plan = choose_plan(z_view, 1 if t is None else 2, count_processors(z.device))
    tensors = [z_view, t_view, *row_tensors, c if needs_c else None, dz_view]
    strides = [_strides(z_view), _strides(t_view), _strides(dz_view)]
    numbers = [s for group in strides for s in group]
    numbers += [0 if x is None else x.stride(0) for x in row_tensors]
    kernels = (cross_entropy_tile, cross_entropy_loop)
    _launch(kernels, plan, z_view, tensors, [*numbers, 1 / math.log(base)], sums=4)
    return c, dz if dz_view is None else _copy_back(dz, dz_view, dim)


def softmax_product(a: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    """As `kernels.softmax_product`. Copies a or v if no (B, C, n) view of it exists."""
    result = torch.empty_like(v, memory_format=torch.contiguous_format)
    if v.numel() == 0:
        return result
    if v.dim() == 0:
        return softmax_product(a[None], v[None])[0]
    a_view, v_view, out_view = (_fold(x, dim % v.dim()) for x in (a, v, result))
    numbers = [s for x in (a_view, v_view, out_view) for s in _strides(x)]
    plan = choose_plan(v_view, 2, count_processors(v.device))
    kernels = (softmax_product_tile, softmax_product_loop)
    _launch(kernels, plan, v_view, [a_view, v_view, out_view], numbers, sums=1)
    return result


def _launch(
    kernels: tuple[Any, Any],
    plan: Plan,
    view: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    sums: int,
) -> None:
    """Launches the kernel of the plan, twice if rows are split; `sums` partial sums a slice."""
    B, C, n = view.shape
    is_strided = n > 1 and view.stride(2) == 1
    options: dict[str, Any] = {
        "num_warps": plan.num_warps,
        "enable_fp_fusion": True,
        "IS_ALIGNED": is_strided and n % 16 == 0,
    }
    programs, tile, loop = B * -(-n // plan.rows), *kernels
    with use_device(view):
        if plan.is_tile:
            rows, width = plan.shape
            tile[(programs,)](*tensors, n, C, *numbers, ROWS=rows, CLASSES=width, **options)
            return
        partials = None
        if plan.slices > 1:
            partials = view.new_empty((B * n, plan.slices, sums), dtype=torch.float32)
        options |= {
            "IS_SHARED": plan.steps[0] > 0,
            "LANES": plan.shape[0],
            "WIDTH": plan.shape[1],
            "LANE_STEP": plan.steps[0],
            "STEP": plan.steps[1],
            "SLICES": next_power(plan.slices),
            "STAGES": plan.num_stages,
        }
        for passes in (WHOLE,) if partials is None else (FIRST, SECOND):
            arguments = (*tensors, partials, n, C, *numbers, plan.slice_tiles, plan.slices)
            loop[(programs, plan.slices)](*arguments, PASSES=passes, **options)


def _fold(x: Tensor, dim: int) -> Tensor:
    """x as (B, C, n): the axes before dim, dim, and those after it; (1, C, B) if n is 1."""
    B, n = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    view = x.reshape(B, x.shape[dim], n)
    return view if n > 1 else view.permute(2, 1, 0)


def _copy_back(result: Tensor, view: Tensor, dim: int) -> Tensor:
    """Copies a folded result to its memory, if `_fold` could not make a view of it."""
    if view.data_ptr() == result.data_ptr():
        return result
    is_permuted = math.prod(result.shape[dim + 1 :]) == 1
    return result.copy_((view.permute(2, 1, 0) if is_permuted else view).reshape(result.shape))


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
