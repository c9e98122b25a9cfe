"""The row kernel of the head's second order in Triton: two reads of z and r, one write of Q and Δ.

The first read computes the sums of a row, each lane relative to its own maximum; the second goes
through the tiles in descending order, so that the end of a row comes from the L2 cache. One program
processes one row at a time. A tile has the shape (lanes, VECTOR) as in `triton_head`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_nnmath._records import UpstreamGradients
from torch_nnmath.kernels.gpu.launch import use_device
from torch_nnmath.kernels.gpu.records import RowDirection, RowInputs, SecondOrderOutputs
from torch_nnmath.kernels.gpu.triton_logits import (
    LN_2,
    LOWEST,
    MIN_SHIFTED,
    VECTOR,
    Configuration,
    count_programs,
    exp,
    get_launch_options,
    load_class_logit,
    load_logits,
    load_target,
    shift,
)

MAX_WARPS = 8


def process_rows(
    z: Tensor,
    r: Tensor,
    deltas: tuple[Tensor, Tensor] | None,
    rows: slice,
    inputs: RowInputs,
    upstream: UpstreamGradients,
    direction: RowDirection,
    outputs: SecondOrderOutputs,
) -> None:
    """Writes the second order of the rows `rows`, and into `deltas` Q and Δ, rounded once.

    `z` and `r` (rows, C or more) are x Wᵀ and U Wᵀ + X Vᵀ in float32. They are only read.
    """
    C, b, scale, y, p, t, keep, base, cap = inputs
    γ, ω, η = upstream
    σ, π, τ = direction
    if len(z) == 0 or C == 0:
        return
    Q, Δ = (None, None) if deltas is None else deltas
    columns = min(matrix.shape[1] for matrix in (z, r, Q, Δ) if matrix is not None)
    configuration = choose_tile(C, torch.version.hip is not None)
    grid = (min(len(z), count_programs(z.device, configuration.num_warps)),)
    with use_device(z):
        _process_rows[grid](
            z,
            z.stride(0),
            r,
            r.stride(0),
            Q,
            0 if Q is None else Q.stride(0),
            Δ,
            0 if Δ is None else Δ.stride(0),
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
            σ,
            π,
            τ,
            *outputs,
            T_STRIDE=0 if t is None or len(t) == 1 else 1,
            τ_STRIDE=0 if τ is None or len(τ) == 1 else 1,
            HAS_ENTROPY=η is not None or outputs.ρ_h is not None,
            **get_launch_options(configuration, scale=scale, γ=γ, ω=ω, η=η),
        )


def choose_tile(C: int, is_hip: bool) -> Configuration:
    """A vector for each thread, which spills no registers with all options; at most a row.

    A block of 8 warps may use 255 registers a thread, one of 16 warps only 128.
    """
    warp_size = 64 if is_hip else 32
    num_warps = min(max(triton.next_power_of_2(C) // (warp_size * VECTOR), 1), MAX_WARPS)
    return Configuration(warp_size * num_warps, num_warps, num_stages=2)


@triton.jit
def _load_direction(r, k, C, columns, σ, slope, IS_TAIL: tl.constexpr):
    """r = dv/dz ∘ (R + σ) of the classes k, 0 from class C on."""
    x = tl.load(r + k, mask=k < columns, other=0.0) if IS_TAIL else tl.load(r + k)
    if σ is not None:
        x = x + load_target(σ, k, C, IS_TAIL)
    x = x * slope
    if IS_TAIL:
        x = tl.where(k < C, x, 0.0)  # last, since the slope may be nan there
    return x


@triton.jit
def _add_tile(
    m, s, ar, ev, avr, tr, st, τv, sτ, z, r, k, C, columns, scale, b, cap, cap_reciprocal, σ, t, τ,
    HAS_ENTROPY: tl.constexpr, IS_TAIL: tl.constexpr
):  # fmt: skip
    """Adds a tile to the sums of each lane, which refer to the lane's maximum m."""
    v, slope = load_logits(z, k, C, columns, scale, b, cap, cap_reciprocal, IS_TAIL)
    r_k = _load_direction(r, k, C, columns, σ, slope, IS_TAIL)
    largest = tl.max(v, 1)
    new_m = tl.where(largest > m, largest, m)
    change = shift(m, new_m)
    factor = exp(change)
    shifted = v - new_m[:, None]
    e = exp(shifted)
    er = e * r_k
    if HAS_ENTROPY:
        clamped_change = tl.maximum(change, MIN_SHIFTED)
        clamped = tl.maximum(shifted, MIN_SHIFTED)
        ev = (ev + s * clamped_change) * factor - tl.sum(-e * clamped, 1)
        avr = (avr + ar * clamped_change) * factor - tl.sum(-er * clamped, 1)
    s = s * factor - tl.sum(-e, 1)
    ar = ar * factor - tl.sum(-er, 1)
    # a target of 0 adds 0, also where v or r is infinite
    if t is not None:
        t_k = load_target(t, k, C, IS_TAIL)
        tr = tr - tl.sum(tl.where(t_k == 0, 0.0, -t_k * r_k), 1)
        st = st - tl.sum(-t_k, 1)
    if τ is not None:
        τ_k = load_target(τ, k, C, IS_TAIL)
        τv = τv + sτ * change - tl.sum(tl.where(τ_k == 0, 0.0, -τ_k * shifted), 1)
        sτ = sτ - tl.sum(-τ_k, 1)
    return new_m, s, ar, ev, avr, tr, st, τv, sτ


@triton.jit
def _write_tile(
    Q, Δ, z, r, k, C, columns, scale, b, cap, cap_reciprocal, σ, t, τ, m, row_ar, inverse_s, weight,
    ηβ, D, γβ, y, class_Q, class_Δ, HAS_CLASS: tl.constexpr, IS_TAIL: tl.constexpr
):  # fmt: skip
    """Q and Δ of the classes k, with entry y as given.

    G = a ∘ B - γβ t, dG = a ∘ ((r - a·r) ∘ (B - ηβ) + D) - γβ τ, B = weight - ηβ (v - m).
    """
    v, slope = load_logits(z, k, C, columns, scale, b, cap, cap_reciprocal, IS_TAIL)
    r_k = _load_direction(r, k, C, columns, σ, slope, IS_TAIL)
    shifted = v - m
    a = exp(shifted) * inverse_s
    if ηβ is None:
        G = a * weight
        dG = a * ((r_k - row_ar) * weight + D)
    else:
        B = weight - ηβ * tl.maximum(shifted, MIN_SHIFTED)
        G = a * B
        dG = a * ((r_k - row_ar) * (B - ηβ) + D)
    if t is not None:
        G = G - γβ * load_target(t, k, C, IS_TAIL)
    if τ is not None:
        dG = dG - γβ * load_target(τ, k, C, IS_TAIL)
    dG, G = _uncap(G, dG, v, r_k, slope, cap, cap_reciprocal)
    if HAS_CLASS:
        dG = tl.where(k == y, class_Q, dG)
        G = tl.where(k == y, class_Δ, G)
    if IS_TAIL:
        dG = tl.where(k < C, dG, 0.0)
        G = tl.where(k < C, G, 0.0)
        tl.store(Q + k, dG.to(Q.dtype.element_ty), mask=k < columns)
        tl.store(Δ + k, G.to(Δ.dtype.element_ty), mask=k < columns)
    else:
        tl.store(Q + k, dG.to(Q.dtype.element_ty))
        tl.store(Δ + k, G.to(Δ.dtype.element_ty))


@triton.jit
def _uncap(G, dG, v, r, slope, cap, cap_reciprocal):
    """Q = slope ∘ dG - (2/κ²) v ∘ G ∘ r and Δ = slope ∘ G; dG and G without a cap."""
    Q = dG
    Δ = G
    if cap is not None:
        Q = slope * dG - 2 * cap_reciprocal * (v * cap_reciprocal) * G * r
        Δ = slope * G
    return Q, Δ


@triton.jit(do_not_specialize=["first_row", "row_count"])
def _process_rows(
    z,
    z_stride,
    r,
    r_stride,
    Q,
    Q_stride,
    Δ,
    Δ_stride,
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
    σ,
    π,
    τ,
    ρ_c,
    ρ_q,
    ρ_h,
    dp,
    scale_STRIDE: tl.constexpr,
    T_STRIDE: tl.constexpr,
    τ_STRIDE: tl.constexpr,
    γ_STRIDE: tl.constexpr,
    ω_STRIDE: tl.constexpr,
    η_STRIDE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILE: tl.constexpr = LANES * VECTOR
    HAS_CLASS: tl.constexpr = (y is not None) and ((p is not None) or (π is not None))
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
            r_row = r + i * r_stride
            t_row = t
            if T_STRIDE:
                t_row = t + row * C
            τ_row = τ
            if τ_STRIDE:
                τ_row = τ + row * C
            scale_row = None
            if scale is not None:
                scale_row = tl.load(scale + row * scale_STRIDE)

            # first read: the sums
            m = tl.full((LANES,), LOWEST, tl.float32)
            s = tl.zeros((LANES,), tl.float32)
            ar = tl.zeros((LANES,), tl.float32)
            ev = tl.zeros((LANES,), tl.float32)
            avr = tl.zeros((LANES,), tl.float32)
            tr = tl.zeros((LANES,), tl.float32)
            st = tl.zeros((LANES,), tl.float32)
            τv = tl.zeros((LANES,), tl.float32)
            sτ = tl.zeros((LANES,), tl.float32)
            for j in tl.range(0, tile_count, num_stages=STAGES):
                m, s, ar, ev, avr, tr, st, τv, sτ = _add_tile(
                    m, s, ar, ev, avr, tr, st, τv, sτ, z_row, r_row, j * TILE + k, C, columns,
                    scale_row, b, cap, cap_reciprocal, σ, t_row, τ_row, HAS_ENTROPY, False
                )  # fmt: skip
            if tail < C:
                m, s, ar, ev, avr, tr, st, τv, sτ = _add_tile(
                    m, s, ar, ev, avr, tr, st, τv, sτ, z_row, r_row, tail + k, C, columns,
                    scale_row, b, cap, cap_reciprocal, σ, t_row, τ_row, HAS_ENTROPY, True
                )  # fmt: skip
            row_m = tl.max(m, 0)
            change = shift(m, row_m)
            factor = exp(change)
            row_s = tl.sum(s * factor, 0)
            inverse_s = 1 / row_s
            row_ar = tl.sum(ar * factor, 0) * inverse_s
            av = 0.0
            entropy_derivative = 0.0  # ln β dh = -(a ∘ (l - a·l))·r
            if HAS_ENTROPY:
                clamped = tl.maximum(change, MIN_SHIFTED)
                av = tl.sum((ev + s * clamped) * factor, 0) * inverse_s
                row_avr = tl.sum((avr + ar * clamped) * factor, 0) * inverse_s
                entropy_derivative = av * row_ar - row_avr
            row_tr, row_st, row_τv, row_sτ = 0.0, 0.0, 0.0, 0.0
            if t is not None:
                row_tr = tl.sum(tr, 0)
                row_st = tl.sum(st, 0)
            if τ is not None:
                row_τv = tl.sum(τv + sτ * change, 0)
                row_sτ = tl.sum(sτ, 0)

            # the results of the row
            log_s = tl.log2(row_s) * LN_2
            row_lse = log_s + row_m
            dc_dp = row_lse
            shifted_y = 0.0
            v_y = 0.0
            slope_y = 1.0
            r_y = 0.0
            row_y = 0
            if y is not None:
                row_y = tl.load(y + row).to(tl.int32)
                v_y, slope_y = load_class_logit(z_row, row_y, scale_row, b, cap, cap_reciprocal)
                r_y = tl.load(r_row + row_y)
                if σ is not None:
                    r_y = r_y + tl.load(σ + row_y)
                r_y = r_y * slope_y
                shifted_y = v_y - row_m
                dc_dp = log_s - shifted_y  # lse - v_y would cancel
            row_p, row_π = 0.0, 0.0
            if p is not None:
                row_p = tl.load(p + row)
            if π is not None:
                row_π = tl.load(π + row)
            if ρ_c is not None:
                dc = row_st * row_ar - row_tr + (row_sτ * log_s - row_τv)
                dc += tl.where(row_p == 0, 0.0, row_p * (row_ar - r_y))
                dc += tl.where(row_π == 0, 0.0, row_π * dc_dp)
                tl.store(ρ_c + row, dc * ln_reciprocal)
            if ρ_q is not None:
                tl.store(ρ_q + row, 2 * row_lse * row_ar)
            if ρ_h is not None:
                tl.store(ρ_h + row, entropy_derivative * ln_reciprocal)
            γβ = tl.load(γ + row * γ_STRIDE) * ln_reciprocal
            if dp is not None:
                tl.store(dp + row, γβ * (row_ar - r_y))

            # second read: Q and Δ
            if Q is not None:
                Q_row = Q + i * Q_stride
                Δ_row = Δ + i * Δ_stride
                # B and D without p and π, and η's term in v - m
                extra_weight = γβ * row_st
                extra_D = γβ * row_sτ
                if ω is not None:
                    double_ω = 2 * tl.load(ω + row * ω_STRIDE)
                    extra_weight += double_ω * row_lse
                    extra_D += double_ω * row_ar
                ηβ = None
                class_ηβ = 0.0
                if η is not None:
                    ηβ = tl.load(η + row * η_STRIDE) * ln_reciprocal
                    extra_weight += ηβ * av
                    extra_D -= ηβ * entropy_derivative
                    class_ηβ = ηβ
                weight = γβ * row_p + extra_weight
                D = γβ * row_π + extra_D
                class_Q, class_Δ = 0.0, 0.0
                if HAS_CLASS:
                    # a p - p is written p (e - s) / s, which is exact where e is nearly s
                    e_y = exp(shifted_y)
                    a_y = e_y * inverse_s
                    others = γβ * (e_y - row_s) * inverse_s
                    extra_B = extra_weight - class_ηβ * tl.maximum(shifted_y, MIN_SHIFTED)
                    B_y = γβ * row_p + extra_B
                    G_y = row_p * others + a_y * extra_B
                    dG_y = a_y * ((r_y - row_ar) * (B_y - class_ηβ) + extra_D) + row_π * others
                    if t is not None:
                        G_y -= γβ * tl.load(t_row + row_y)
                    if τ is not None:
                        dG_y -= γβ * tl.load(τ_row + row_y)
                    class_Q, class_Δ = _uncap(G_y, dG_y, v_y, r_y, slope_y, cap, cap_reciprocal)
                if tail < C:
                    _write_tile(
                        Q_row, Δ_row, z_row, r_row, tail + k, C, columns, scale_row, b, cap,
                        cap_reciprocal, σ, t_row, τ_row, row_m, row_ar, inverse_s, weight, ηβ, D,
                        γβ, row_y, class_Q, class_Δ, HAS_CLASS, True
                    )  # fmt: skip
                for j in tl.range(0, tile_count, num_stages=STAGES):
                    start = (tile_count - 1 - j) * TILE
                    _write_tile(
                        Q_row, Δ_row, z_row, r_row, start + k, C, columns, scale_row, b, cap,
                        cap_reciprocal, σ, t_row, τ_row, row_m, row_ar, inverse_s, weight, ηβ, D,
                        γβ, row_y, class_Q, class_Δ, HAS_CLASS, False
                    )  # fmt: skip
        else:
            if ρ_c is not None:
                tl.store(ρ_c + row, 0.0)
            if ρ_q is not None:
                tl.store(ρ_q + row, 0.0)
            if ρ_h is not None:
                tl.store(ρ_h + row, 0.0)
            if dp is not None:
                tl.store(dp + row, 0.0)
            if Q is not None:
                Q_row = Q + i * Q_stride
                Δ_row = Δ + i * Δ_stride
                zeros = tl.zeros((LANES, VECTOR), tl.float32)
                for j in range(tile_count):
                    tl.store(Q_row + j * TILE + k, zeros.to(Q.dtype.element_ty))
                    tl.store(Δ_row + j * TILE + k, zeros.to(Δ.dtype.element_ty))
                if tail < C:
                    tl.store(
                        Q_row + tail + k, zeros.to(Q.dtype.element_ty), mask=tail + k < columns
                    )
                    tl.store(
                        Δ_row + tail + k, zeros.to(Δ.dtype.element_ty), mask=tail + k < columns
                    )
