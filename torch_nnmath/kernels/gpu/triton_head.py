"""The head's row kernel in Triton: results of each row, and Δ, in two reads and one write.

The second read goes through the tiles in descending order, so that the end of a row comes from the
L2 cache. One program processes one row at a time. A tile has the shape (lanes, VECTOR): a
reduction over axis 1 stays in a thread, and each lane keeps its own maximum until the row ends.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_nnmath._records import UpstreamGradients
from torch_nnmath.kernels.gpu.launch import use_device
from torch_nnmath.kernels.gpu.records import RowInputs, RowOutputs
from torch_nnmath.kernels.gpu.triton_logits import (
    LN_2,
    LOWEST,
    MAX_WARPS,
    MIN_SHIFTED,
    VECTOR,
    Configuration,
    count_programs,
    exp,
    find_first_class,
    get_launch_options,
    load_class_logit,
    load_logits,
    load_target,
    shift,
)


def choose_configuration(C: int, has_options: bool, is_hip: bool) -> Configuration:
    """The largest tile that spills no registers, and no larger than a row.

    `has_options`: a bias, a dense target, a cap or an entropy, which take registers.
    """
    entries_per_thread = 8 if has_options else 16
    warp_size, max_warps = (64, MAX_WARPS // 2) if is_hip else (32, MAX_WARPS)
    row_size = triton.next_power_of_2(max(C, 1))
    entries_per_warp = entries_per_thread * warp_size
    num_warps = min(max(row_size // entries_per_warp, 1), max_warps)
    return Configuration(
        lanes=entries_per_warp * num_warps // VECTOR,
        num_warps=num_warps,
        num_stages=2 if has_options or is_hip else 3,
    )


def process_rows(
    z: Tensor,
    G: Tensor | None,
    rows: slice,
    inputs: RowInputs,
    upstream: UpstreamGradients | None,
    sums: Tensor | None,
    outputs: RowOutputs,
) -> None:
    """Writes the results of the rows `rows`, and Δ of these into G, rounded once.

    `z` (rows, C or more) are the products x Wᵀ in float32. Given `sums`, only G and dc/dp are
    computed.
    """
    C, b, scale, y, p, t, keep, base, cap = inputs
    γ, ω, η = (None, None, None) if upstream is None else upstream
    if len(z) == 0 or C == 0:
        return
    columns = z.shape[1] if G is None else min(z.shape[1], G.shape[1])
    has_entropy = outputs.entropy is not None or η is not None
    has_options = has_entropy or any(value is not None for value in (b, t, cap))
    configuration = choose_configuration(C, has_options, torch.version.hip is not None)
    grid = (min(len(z), count_programs(z.device, configuration.num_warps)),)
    with use_device(z):
        _process_rows[grid](
            z,
            z.stride(0),
            G,
            0 if G is None else G.stride(0),
            rows.start,
            len(z),
            C,
            columns,
            b,
            scale,
            y,
            p,
            t,
            keep,
            cap,
            None if cap is None else 1 / cap,
            1 / math.log(base),
            γ,
            ω,
            η,
            sums,
            *outputs,
            T_STRIDE=0 if t is None or len(t) == 1 else 1,
            HAS_ENTROPY=has_entropy,
            **get_launch_options(configuration, scale=scale, γ=γ, ω=ω, η=η),
        )


@triton.jit
def _add_tile(
    m, s, ev, tv, st, best, tile, z, k, C, columns, scale, b, cap, cap_reciprocal, t,
    HAS_ENTROPY: tl.constexpr, HAS_PREDICTED: tl.constexpr, IS_TAIL: tl.constexpr
):  # fmt: skip
    """Adds a tile to the sums of each lane, which refer to the lane's maximum m."""
    v, _ = load_logits(z, k, C, columns, scale, b, cap, cap_reciprocal, IS_TAIL)
    largest = tl.max(v, 1)
    if HAS_PREDICTED:
        best = tl.where(largest > m, tile, best)
    new_m = tl.where(largest > m, largest, m)
    change = shift(m, new_m)
    factor = exp(change)
    shifted = v - new_m[:, None]
    e = exp(shifted)
    if HAS_ENTROPY:
        ev = (ev + s * tl.maximum(change, MIN_SHIFTED)) * factor
        ev = ev - tl.sum(-e * tl.maximum(shifted, MIN_SHIFTED), 1)
    if t is not None:
        t_k = load_target(t, k, C, IS_TAIL)
        tv = tv + st * change
        # a target of 0 adds 0, also where v is infinite
        tv = tv - tl.sum(tl.where(t_k == 0, 0.0, -t_k * shifted), 1)
        st = st - tl.sum(-t_k, 1)
    s = s * factor - tl.sum(-e, 1)
    return new_m, s, ev, tv, st, best


@triton.jit
def _merge(m, s, other_m, other_s):
    new_m = tl.maximum(m, other_m)
    return new_m, s * exp(shift(m, new_m)) + other_s * exp(shift(other_m, new_m))


@triton.jit
def _merge_all(m, s, ev, tv, st, other_m, other_s, other_ev, other_tv, other_st):
    new_m = tl.maximum(m, other_m)
    change, other_change = shift(m, new_m), shift(other_m, new_m)
    f, other_f = exp(change), exp(other_change)
    ev = (ev + s * tl.maximum(change, MIN_SHIFTED)) * f
    other_ev = (other_ev + other_s * tl.maximum(other_change, MIN_SHIFTED)) * other_f
    tv = tv + st * change + (other_tv + other_st * other_change)
    return new_m, s * f + other_s * other_f, ev + other_ev, tv, st + other_st


@triton.jit
def _write_tile(
    G, z, k, C, columns, scale, b, cap, cap_reciprocal, t, m, weight, η_weight, γβ, y, class_entry,
    HAS_CLASS: tl.constexpr, IS_TAIL: tl.constexpr
):  # fmt: skip
    """Δ of the classes k: dv/dz ∘ (e^{v-m} (weight - η_weight (v-m)) - γβ t), and entry y."""
    v, slope = load_logits(z, k, C, columns, scale, b, cap, cap_reciprocal, IS_TAIL)
    shifted = v - m
    e = exp(shifted)
    if η_weight is None:
        delta = e * weight
    else:
        delta = e * (weight - η_weight * tl.maximum(shifted, MIN_SHIFTED))
    if t is not None:
        delta = delta - γβ * load_target(t, k, C, IS_TAIL)
    if cap is not None:
        delta = delta * slope
    if HAS_CLASS:
        delta = tl.where(k == y, class_entry, delta)
    if IS_TAIL:
        delta = tl.where(k < C, delta, 0.0)
        tl.store(G + k, delta.to(G.dtype.element_ty), mask=k < columns)
    else:
        tl.store(G + k, delta.to(G.dtype.element_ty))


@triton.jit
def write_results(
    row, loss, lse, squared_lse, entropy, sums, dc_dp, row_loss, row_lse, row_entropy, m, s, ev,
    row_dc_dp
):  # fmt: skip
    """Writes the results that are needed of one row, except for the predicted class."""
    if loss is not None:
        tl.store(loss + row, row_loss)
    if lse is not None:
        tl.store(lse + row, row_lse)
    if squared_lse is not None:
        tl.store(squared_lse + row, row_lse * row_lse)
    if entropy is not None:
        tl.store(entropy + row, row_entropy)
    if sums is not None:
        tl.store(sums + 3 * row, m)
        tl.store(sums + 3 * row + 1, s)
        tl.store(sums + 3 * row + 2, ev)
    if dc_dp is not None:
        tl.store(dc_dp + row, row_dc_dp)


@triton.jit
def write_zeros(G, k, C, columns):
    """Overwrites one row with 0."""
    TILE: tl.constexpr = k.shape[0] * k.shape[1]
    zeros = tl.zeros(k.shape, tl.float32).to(G.dtype.element_ty)
    tile_count = C // TILE
    for j in range(tile_count):
        tl.store(G + j * TILE + k, zeros)
    tail = tile_count * TILE
    if tail < C:
        tl.store(G + tail + k, zeros, mask=tail + k < columns)


@triton.jit(do_not_specialize=["first_row", "row_count"])
def _process_rows(
    z,
    z_stride,
    G,
    G_stride,
    first_row,
    row_count,
    C,
    columns,
    b,
    scale,
    y,
    p,
    t,
    keep,
    cap,
    cap_reciprocal,
    ln_reciprocal,
    γ,
    ω,
    η,
    given_sums,
    loss,
    lse,
    squared_lse,
    entropy,
    predicted,
    sums,
    dc_dp,
    scale_STRIDE: tl.constexpr,
    T_STRIDE: tl.constexpr,
    γ_STRIDE: tl.constexpr,
    ω_STRIDE: tl.constexpr,
    η_STRIDE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILE: tl.constexpr = LANES * VECTOR
    lane = tl.arange(0, LANES) * VECTOR
    k = lane[:, None] + tl.arange(0, VECTOR)[None, :]
    tile_count = C // TILE
    tail = tile_count * TILE
    # 64-bit row numbers: offsets may exceed 2^31
    for i in range(tl.program_id(0).to(tl.int64), row_count, tl.num_programs(0)):
        row = i + first_row
        is_kept = True
        if keep is not None:
            is_kept = tl.load(keep + row) != 0
        if is_kept:
            z_row = z + i * z_stride
            t_row = t
            if T_STRIDE:
                t_row = t + row * C
            scale_row = None
            if scale is not None:
                scale_row = tl.load(scale + row * scale_STRIDE)

            # first read: the sums
            row_ev, row_tv, row_st = 0.0, 0.0, 0.0
            if given_sums is not None:
                row_m = tl.load(given_sums + 3 * row)
                row_s = tl.load(given_sums + 3 * row + 1)
                row_ev = tl.load(given_sums + 3 * row + 2)
                if t is not None:
                    st = tl.zeros((LANES,), tl.float32)
                    for j in tl.range(0, tile_count, num_stages=STAGES):
                        st = st - tl.sum(-load_target(t_row, j * TILE + k, C, False), 1)
                    if tail < C:
                        st = st - tl.sum(-load_target(t_row, tail + k, C, True), 1)
                    row_st = tl.sum(st, 0)
            else:
                m = tl.full((LANES,), LOWEST, tl.float32)
                s = tl.zeros((LANES,), tl.float32)
                ev = tl.zeros((LANES,), tl.float32)
                tv = tl.zeros((LANES,), tl.float32)
                st = tl.zeros((LANES,), tl.float32)
                best = tl.zeros((LANES,), tl.int32)
                for j in tl.range(0, tile_count, num_stages=STAGES):
                    m, s, ev, tv, st, best = _add_tile(
                        m, s, ev, tv, st, best, j, z_row, j * TILE + k, C, columns, scale_row, b,
                        cap, cap_reciprocal, t_row, HAS_ENTROPY, predicted is not None, False
                    )  # fmt: skip
                if tail < C:
                    m, s, ev, tv, st, best = _add_tile(
                        m, s, ev, tv, st, best, tile_count, z_row, tail + k, C, columns, scale_row,
                        b, cap, cap_reciprocal, t_row, HAS_ENTROPY, predicted is not None, True
                    )  # fmt: skip
                if HAS_ENTROPY or t is not None:
                    row_m, row_s, row_ev, row_tv, row_st = tl.reduce(
                        (m, s, ev, tv, st), 0, _merge_all
                    )
                else:
                    row_m, row_s = tl.reduce((m, s), 0, _merge)

                if predicted is not None:
                    first = find_first_class(
                        m, row_m, best, z_row, k, C, columns, scale_row, b, cap, cap_reciprocal
                    )
                    tl.store(predicted + row, first)

            # the results of the row
            log_s = tl.log2(row_s) * LN_2
            row_lse = log_s + row_m
            row_dc_dp = row_lse
            shifted_y = 0.0
            slope_y = 1.0
            row_y = 0
            if y is not None:
                row_y = tl.load(y + row).to(tl.int32)
                v_y, slope_y = load_class_logit(z_row, row_y, scale_row, b, cap, cap_reciprocal)
                shifted_y = v_y - row_m
                row_dc_dp = log_s - shifted_y  # lse - v_y would cancel
            row_p = 0.0
            if p is not None:
                row_p = tl.load(p + row)
            row_loss = row_st * log_s - row_tv + tl.where(row_p == 0, 0.0, row_p * row_dc_dp)
            row_entropy = log_s - row_ev / row_s
            write_results(
                row, loss, lse, squared_lse, entropy, sums, dc_dp, row_loss * ln_reciprocal,
                row_lse, row_entropy * ln_reciprocal, row_m, row_s, row_ev, row_dc_dp
            )  # fmt: skip

            # second read: Δ
            if G is not None:
                G_row = G + i * G_stride
                γβ = tl.load(γ + row * γ_STRIDE) * ln_reciprocal
                η_weight = None
                extra_weight = γβ * row_st  # B without p, η's term in v - m
                class_η = 0.0
                if ω is not None:
                    extra_weight += 2 * tl.load(ω + row * ω_STRIDE) * row_lse
                if η is not None:
                    ηβ = tl.load(η + row * η_STRIDE) * ln_reciprocal
                    extra_weight += ηβ * (row_ev / row_s)
                    η_weight = ηβ / row_s
                    class_η = ηβ * tl.maximum(shifted_y, MIN_SHIFTED)
                weight = (γβ * row_p + extra_weight) / row_s
                class_entry = 0.0
                if y is not None and p is not None:
                    # T e_y - p s, written with e_y - s, which is exact where e_y is nearly s
                    e_y = exp(shifted_y)
                    class_entry = γβ * row_p * (e_y - row_s) + (extra_weight - class_η) * e_y
                    class_entry = class_entry / row_s
                    if t is not None:
                        class_entry -= γβ * tl.load(t_row + row_y)
                    class_entry = class_entry * slope_y
                if tail < C:
                    _write_tile(
                        G_row, z_row, tail + k, C, columns, scale_row, b, cap, cap_reciprocal,
                        t_row, row_m, weight, η_weight, γβ, row_y, class_entry,
                        y is not None and p is not None, True
                    )  # fmt: skip
                for j in tl.range(0, tile_count, num_stages=STAGES):
                    start = (tile_count - 1 - j) * TILE
                    _write_tile(
                        G_row, z_row, start + k, C, columns, scale_row, b, cap, cap_reciprocal,
                        t_row, row_m, weight, η_weight, γβ, row_y, class_entry,
                        y is not None and p is not None, False
                    )  # fmt: skip
        else:
            write_results(
                row, loss, lse, squared_lse, entropy, sums, dc_dp, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0
            )  # fmt: skip
            if predicted is not None:
                tl.store(predicted + row, -1)
            if G is not None:
                write_zeros(G + i * G_stride, k, C, columns)
