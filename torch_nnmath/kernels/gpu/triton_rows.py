"""Row-wise kernels on given logits: cross entropy (F13), log-sum-exp, z-loss (F20), entropy (F21).

One kernel computes one of these functions and its gradient. Every tensor is viewed as (B, C, n),
classes on the middle axis; row b n + i has the entries [b, :, i]. If the classes are on the last
axis, B is 1 and n the number of rows. Sums are float32, results are rounded once, and no kernel
needs the order of two programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_nnmath._records import Target
from torch_nnmath.kernels.gpu.launch import count_processors, use_device
from torch_nnmath.kernels.gpu.row_plans import Plan, choose_plan, next_power

LOG2_E = tl.constexpr(math.log2(math.e))
WHOLE, FIRST, SECOND = (tl.constexpr(i) for i in range(3))  # which passes a program makes
CROSS_ENTROPY, LOG_SUM_EXP, Z_LOSS, ENTROPY = (tl.constexpr(i) for i in range(4))
EMPTY_VALUES = (0.0, -math.inf, math.inf, 0.0)  # of these functions, for a row without classes
NO_TARGET = Target(None, None, None), None
MIN_SHIFTED = tl.constexpr(-1e4)  # instead of z - m = -inf, so that (z-m) e^{z-m} is 0


@triton.jit
def locate(n, ROWS: tl.constexpr, IS_ALIGNED: tl.constexpr):
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
def load(x, b, i, k, sb, sc, sn, mask, other: tl.constexpr):
    """Entries [b, k, i] in float32; i and k broadcast to a tile."""
    place = b * sb + i.to(tl.int64) * sn + k.to(tl.int64) * sc
    return tl.load(x + place, mask=mask, other=other).to(tl.float32)


@triton.jit
def store(out, x, b, i, k, sb, sc, sn, mask):
    place = b * sb + i.to(tl.int64) * sn + k.to(tl.int64) * sc
    tl.store(out + place, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _multiply_zero_safe(t, x):
    """t x, but 0 where t is 0 and x infinite."""
    return tl.where((t == 0.0) & (tl.abs(x) == float("inf")), 0.0, t * x)


@triton.jit
def _get_origin(m):
    """What is subtracted from logits whose maximum is m: m, or 0 if m is infinite."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def _extend(m, s, T, tz, z, t, FUNCTION: tl.constexpr, HAS_T: tl.constexpr):
    """Adds a tile to a lane's m = max z, s = Σ e^{z-m}, T = Σ t, tz = Σ t (z-m).

    The weights t of the entropy are e^{z-m}. Sums are written as `x - tl.sum(-y)`, since Triton 3.6
    fails at `x += tl.sum(y)` in a loop.
    """
    highest = tl.max(z, 1)
    highest = tl.where(highest > m, highest, m)
    r = _get_origin(highest)
    x = z - r[:, None]
    e = tl.exp2(x * LOG2_E)
    factor = tl.exp2((m - r) * LOG2_E)
    if FUNCTION == ENTROPY:
        tz = (tz + s * tl.maximum(m - r, MIN_SHIFTED)) * factor
        tz = tz - tl.sum(-e * tl.maximum(x, MIN_SHIFTED), 1)
    s = s * factor - tl.sum(-e, 1)
    if HAS_T:
        tz = tz + tl.where(m == float("-inf"), 0.0, T * (m - r))
        tz = tz - tl.sum(-_multiply_zero_safe(t, x), 1)
        T = T - tl.sum(-t, 1)
    return highest, s, T, tz


@triton.jit
def _merge(m, s, T, tz, IS_SHARED: tl.constexpr, FUNCTION: tl.constexpr, HAS_T: tl.constexpr):
    """Merges lanes or slices of one row, (X), with IS_SHARED; else slices of (rows, slices).

    The sums of one row become scalars first, so that Triton 3.6 keeps the tile's layout.
    """
    AXIS: tl.constexpr = 0 if IS_SHARED else 1
    highest = tl.max(m, AXIS)
    r = _get_origin(highest)
    distance = m - (r if IS_SHARED else r[:, None])
    factor = tl.exp2(distance * LOG2_E)
    if FUNCTION == ENTROPY:
        tz = tl.sum((tz + s * tl.maximum(distance, MIN_SHIFTED)) * factor, AXIS)
    s = tl.sum(s * factor, AXIS)
    if HAS_T:
        tz = tl.sum(tz + tl.where(m == float("-inf"), 0.0, T * distance), AXIS)
        T = tl.sum(T, AXIS)
    if IS_SHARED:
        zero = tl.zeros([1], tl.float32)
        highest = zero + highest
        s = zero + s
        if HAS_T:
            T = zero + T
        if HAS_T or FUNCTION == ENTROPY:
            tz = zero + tz
    if not HAS_T:
        T = s
        if FUNCTION != ENTROPY:
            tz = s
    return highest, s, T, tz


@triton.jit
def _finish_sums(m, s):
    """The log-sum-exp, and s; nan if m is infinite, as if the maximum had been subtracted."""
    return _get_origin(m) + tl.log(s), tl.where(tl.abs(m) == float("inf"), float("nan"), s)


@triton.jit
def _write_value(c, row, mask, is_kept, m, s, lse, T, tz, z_y, p, inverse_log,
                 FUNCTION: tl.constexpr, HAS_T: tl.constexpr, HAS_Y: tl.constexpr):  # fmt: skip
    if FUNCTION == LOG_SUM_EXP:
        value = lse
    elif FUNCTION == Z_LOSS:
        value = lse * lse
    elif FUNCTION == ENTROPY:
        value = tl.log(s) - tz / s
    else:
        log_s = tl.log(s)
        value = log_s * 0.0
        if HAS_T:
            value = T * log_s - tz
        if HAS_Y:
            value -= _multiply_zero_safe(p, z_y - m - log_s)
    tl.store(c + row, tl.where(is_kept, value * inverse_log, 0.0), mask=mask)


@triton.jit
def _compute_factor(g, s, lse, total, FUNCTION: tl.constexpr):
    """The factor of e^{z-m} in the gradient, given g = dc/ln β and T = Σ t."""
    if FUNCTION == CROSS_ENTROPY:
        g = g * total
    elif FUNCTION == Z_LOSS:
        g = 2 * lse * g
    return g / s


@triton.jit
def _compute_gradient(z, t, k, y, is_kept, m, factor, g, gp, mean, FUNCTION: tl.constexpr,
                      HAS_T: tl.constexpr, HAS_Y: tl.constexpr):  # fmt: skip
    """dz = factor e^{z-m} - g t - g p e_y; of the entropy factor e^{z-m} (mean - (z-m))."""
    x = z - m[:, None]
    dz = factor[:, None] * tl.exp2(x * LOG2_E)
    if FUNCTION == ENTROPY:
        dz *= mean[:, None] - tl.maximum(x, MIN_SHIFTED)
    if HAS_T:
        dz -= g[:, None] * t
    if HAS_Y:
        dz -= tl.where(k == y[:, None], gp[:, None], 0.0)
    return tl.where(is_kept[:, None], dz, 0.0)


@triton.jit(do_not_specialize=["n"])
def row_function_tile(z, t, y, p, keep, dc, c, dz, n, C, zb, zc, zn, tb, tc, tn, db, dk, dn,
                      y_stride, p_stride, keep_stride, dc_stride, inverse_log,
                      FUNCTION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
                      IS_ALIGNED: tl.constexpr):  # fmt: skip
    """Rows that fit in registers: one read and one write."""
    HAS_T: tl.constexpr = t is not None
    HAS_Y: tl.constexpr = y is not None
    b, i, mask = locate(n, ROWS, IS_ALIGNED)
    row = b * n + i
    is_kept = mask
    if keep is not None:
        is_kept = mask & (_load_row(keep, row, keep_stride, mask) != 0)
    k = tl.arange(0, CLASSES)[None, :]
    is_read = is_kept[:, None] & (k < C)
    z_tile = load(z, b, i[:, None], k, zb, zc, zn, is_read, float("-inf"))
    m = tl.max(z_tile, 1)
    r = _get_origin(m)
    x = z_tile - r[:, None]
    e = tl.exp2(x * LOG2_E)
    s = tl.sum(e, 1)
    t_tile = z_tile
    T = s
    tz = s
    if FUNCTION == ENTROPY:
        tz = tl.sum(e * tl.maximum(x, MIN_SHIFTED), 1)
    lse, s = _finish_sums(m, s)
    total = s * 0.0
    if HAS_T:
        t_tile = load(t, b, i[:, None], k, tb, tc, tn, is_read, 0.0)
        tz = tl.sum(_multiply_zero_safe(t_tile, x), 1)
        T = tl.sum(t_tile, 1)
        total = T
    y_row = i
    p_row = s
    z_y = s
    if HAS_Y:
        y_row = _load_row(y, row, y_stride, is_kept).to(tl.int32)
        p_row = _load_row(p, row, p_stride, is_kept).to(tl.float32)
        z_y = load(z, b, i, y_row, zb, zc, zn, is_kept & (y_row >= 0) & (y_row < C), float("nan"))
        total = T + p_row if HAS_T else p_row
    if c is not None:
        _write_value(c, row, mask, is_kept, m, s, lse, T, tz, z_y, p_row, inverse_log,
                     FUNCTION, HAS_T, HAS_Y)  # fmt: skip
    if dz is not None:
        g = _load_row(dc, row, dc_stride, is_kept).to(tl.float32) * inverse_log
        factor = _compute_factor(g, s, lse, total, FUNCTION)
        result = _compute_gradient(z_tile, t_tile, k, y_row, is_kept, m, factor, g, g * p_row,
                                   tz / s, FUNCTION, HAS_T, HAS_Y)  # fmt: skip
        store(dz, result, b, i[:, None], k, db, dk, dn, mask[:, None] & (k < C))


@triton.jit(do_not_specialize=["n"])
def row_function_loop(z, t, y, p, keep, dc, c, dz, partials, n, C, zb, zc, zn, tb, tc, tn,
                      db, dk, dn, y_stride, p_stride, keep_stride, dc_stride, inverse_log,
                      slice_tiles, slices, FUNCTION: tl.constexpr, IS_SHARED: tl.constexpr,
                      LANES: tl.constexpr, WIDTH: tl.constexpr, LANE_STEP: tl.constexpr,
                      STEP: tl.constexpr, PASSES: tl.constexpr, SLICES: tl.constexpr,
                      IS_ALIGNED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Longer rows: a pass for the sums, and one for the gradient.

    With IS_SHARED, a program's lanes share one row; otherwise each has a row. If a row is split
    into slices, the first launch writes each slice's sums to `partials` (rows, slices, 4), and
    the second merges them.
    """
    HAS_T: tl.constexpr = t is not None
    HAS_Y: tl.constexpr = y is not None
    ROWS: tl.constexpr = 1 if IS_SHARED else LANES
    TILE: tl.constexpr = LANES * WIDTH if IS_SHARED else WIDTH
    b, i, mask = locate(n, ROWS, IS_ALIGNED)
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
        m, s, T, tz = _merge(m, s, T, tz, IS_SHARED, FUNCTION, HAS_T)
    else:
        m = tl.full([LANES], float("-inf"), tl.float32)
        s = tl.zeros([LANES], tl.float32)
        tz = tl.zeros([LANES], tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            k = tile * TILE + lane
            is_read = is_kept[:, None] & (k < C)
            z_tile = load(z, b, i[:, None], k, zb, zc, zn, is_read, float("-inf"))
            t_tile = z_tile
            if HAS_T:
                t_tile = load(t, b, i[:, None], k, tb, tc, tn, is_read, 0.0)
            m, s, T, tz = _extend(m, s, T, tz, z_tile, t_tile, FUNCTION, HAS_T)
        if IS_SHARED:
            m, s, T, tz = _merge(m, s, T, tz, True, FUNCTION, HAS_T)
    if PASSES == FIRST:
        place = partials + (row * slices + tl.program_id(1)) * 4
        tl.store(place, m, mask=mask)
        tl.store(place + 1, s, mask=mask)
        if HAS_T:
            tl.store(place + 2, T, mask=mask)
        if HAS_T or FUNCTION == ENTROPY:
            tl.store(place + 3, tz, mask=mask)
    else:
        lse, s = _finish_sums(m, s)
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
            z_y = load(z, b, i, y_row, zb, zc, zn, is_inside, float("nan"))
            total = T + p_row if HAS_T else p_row
        if c is not None and tl.program_id(1) == 0:
            _write_value(c, row, mask, is_kept, m, s, lse, T, tz, z_y, p_row, inverse_log,
                         FUNCTION, HAS_T, HAS_Y)  # fmt: skip
        if dz is not None:
            g = _load_row(dc, row, dc_stride, is_kept).to(tl.float32) * inverse_log
            factor = _compute_factor(g, s, lse, total, FUNCTION)
            gp = g * p_row
            mean = tz / s
            # descending: what the first pass read last is still in the cache
            for tile in tl.range(0, last - first, num_stages=STAGES):
                k = (last - 1 - tile) * TILE + lane
                is_read = is_kept[:, None] & (k < C)
                z_tile = load(z, b, i[:, None], k, zb, zc, zn, is_read, float("-inf"))
                t_tile = z_tile
                if HAS_T:
                    t_tile = load(t, b, i[:, None], k, tb, tc, tn, is_read, 0.0)
                result = _compute_gradient(z_tile, t_tile, k, y_row, is_kept, m, factor, g, gp,
                                           mean, FUNCTION, HAS_T, HAS_Y)  # fmt: skip
                store(dz, result, b, i[:, None], k, db, dk, dn, mask[:, None] & (k < C))


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
    y, p = (None, None) if y is None or p is None else (y, p)
    target_and_keep = Target(y, p, t), None if keep is None else keep.view(torch.uint8)
    return _compute(CROSS_ENTROPY, dc, z, target_and_keep, dim, base, needs_c)


def log_sum_exp(dc: Tensor | None, z: Tensor, dim: int, needs_c: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.log_sum_exp`."""
    return _compute(LOG_SUM_EXP, dc, z, NO_TARGET, dim, math.e, needs_c)


def z_loss(dc: Tensor | None, z: Tensor, dim: int, needs_c: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.z_loss`."""
    return _compute(Z_LOSS, dc, z, NO_TARGET, dim, math.e, needs_c)


def entropy(
    dc: Tensor | None, z: Tensor, dim: int, base: float, needs_c: bool
) -> tuple[Tensor, Tensor]:
    """As `kernels.entropy`."""
    return _compute(ENTROPY, dc, z, NO_TARGET, dim, base, needs_c)


def _compute(
    function: tl.constexpr,
    dc: Tensor | None,
    z: Tensor,
    target_and_keep: tuple[Target, Tensor | None],
    dim: int,
    base: float,
    needs_c: bool,
) -> tuple[Tensor, Tensor]:
    """The function of each row of z, and dc times its gradient; as `kernels.cross_entropy`."""
    (y, p, t, _), keep = target_and_keep
    if z.dim() == 0:  # one row of one class
        c, dz = _compute(function, dc, z[None], target_and_keep, 0, base, needs_c)
        return c[0] if needs_c else c, dz if dc is None else dz[0]
    dim %= z.dim()
    row_shape = (*z.shape[:dim], 1, *z.shape[dim + 1 :])
    c_shape = row_shape if needs_c else (0,)
    c = z.new_full(c_shape, EMPTY_VALUES[function.value], dtype=torch.float32)
    dz = z.new_empty(0) if dc is None else torch.empty_like(z)
    if z.numel() == 0 or (dc is None and not needs_c):
        return c, dz
    z_view = fold(z, dim)
    t_view = None if t is None else fold(t.expand_as(z), dim)
    dz_view = None if dc is None else fold(dz, dim)
    row_tensors = [None if x is None else x.expand(row_shape).reshape(-1) for x in (y, p, keep, dc)]
    plan = choose_plan(z_view, 1 if t is None else 2, count_processors(z.device))
    tensors = [z_view, t_view, *row_tensors, c if needs_c else None, dz_view]
    strides = [get_strides(z_view), get_strides(t_view), get_strides(dz_view)]
    numbers = [s for group in strides for s in group]
    numbers += [0 if x is None else x.stride(0) for x in row_tensors]
    kernels = (row_function_tile, row_function_loop)
    constants = {"FUNCTION": function}
    launch(kernels, plan, z_view, tensors, [*numbers, 1 / math.log(base)], 4, constants)
    return c, dz if dz_view is None else _copy_back(dz, dz_view, dim)


def launch(
    kernels: tuple[Any, Any],
    plan: Plan,
    view: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    sums: int,
    constants: dict[str, Any],
) -> None:
    """Launches the kernel of the plan, twice if rows are split; `sums` partial sums a slice."""
    B, C, n = view.shape
    is_strided = n > 1 and view.stride(2) == 1
    options: dict[str, Any] = {
        **constants,
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


def fold(x: Tensor, dim: int) -> Tensor:
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


def get_strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
