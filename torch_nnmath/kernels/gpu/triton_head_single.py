"""The head's row kernel in Triton in one read and one write, for Δ that has a factor per row.

A row's sum of exponentials is known only at its end. So the kernel writes E = dv/dz ∘ e^{v-r} with
a reference r that the row's first tile gives, and Δ = k ∘ E, except for the entry of the class y.
`single_read` says where this is used, and multiplies by the factors.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_nnmath._records import UpstreamGradients
from torch_nnmath.kernels.gpu.launch import use_device
from torch_nnmath.kernels.gpu.records import RowFactors, RowInputs, RowOutputs
from torch_nnmath.kernels.gpu.triton_head import write_results, write_zeros
from torch_nnmath.kernels.gpu.triton_logits import (
    LN_2,
    LOWEST,
    MAX_WARPS,
    Configuration,
    count_programs,
    exp,
    find_first_class,
    get_launch_options,
    load_class_logit,
    load_logits,
)

# the most that a row's maximum may exceed the reference: e^40 C and its reciprocal times a
# coefficient are far from the limits of bfloat16
MAX_DISTANCE: tl.constexpr = tl.constexpr(40.0)
# the softmax's least weight relative to the class's: what is smaller does not change a float32
MIN_WEIGHT: tl.constexpr = tl.constexpr(2.0**-30)
MIN_ENTRY: tl.constexpr = tl.constexpr(2.0**-100)  # far above the subnormal numbers


def choose_configuration(is_hip: bool) -> Configuration:
    """A tile of 2048 classes, which spills no registers."""
    num_warps = 4 if is_hip else 8
    return Configuration(lanes=512, num_warps=num_warps, num_stages=2 if is_hip else 3)


def choose_program_count(rows: int, num_warps: int, has_options: bool, device: torch.device) -> int:
    """As many programs as run at once, with the same number of rows each.

    Rows that run at once hide each other's ends. A program too many would run alone at the end.
    `has_options`: a bias, a scale, a cap or the predicted class, which take registers.
    """
    max_warps = MAX_WARPS if has_options else 2 * MAX_WARPS
    most = count_programs(device, num_warps, max_warps)
    return math.ceil(rows / math.ceil(rows / most))


def process_rows(
    z: Tensor,
    E: Tensor,
    rows: slice,
    inputs: RowInputs,
    upstream: UpstreamGradients,
    outputs: RowOutputs,
    factors: RowFactors,
) -> None:
    """Writes the results and the factors of the rows `rows`, and E of these, rounded once.

    `z` (rows, C or more) are the products x Wᵀ in float32. A dense target and an entropy are not
    supported.
    """
    C, b, scale, y, p, _, keep, base, cap = inputs
    γ, ω, _ = upstream
    if len(z) == 0 or C == 0:
        return
    class_entries = None if factors.class_error is None else E.new_empty((len(z), 1))
    configuration = choose_configuration(torch.version.hip is not None)
    has_options = any(v is not None for v in (b, scale, cap, outputs.predicted))
    programs = choose_program_count(len(z), configuration.num_warps, has_options, z.device)
    with use_device(z):
        _process_rows[(programs,)](
            z,
            z.stride(0),
            E,
            E.stride(0),
            rows.start,
            len(z),
            C,
            min(z.shape[1], E.shape[1]),
            b,
            scale,
            y,
            p,
            keep,
            cap,
            None if cap is None else 1 / cap,
            1 / math.log(base),
            γ,
            ω,
            outputs.loss,
            outputs.lse,
            outputs.squared_lse,
            outputs.predicted,
            outputs.sums,
            outputs.dc_dp,
            class_entries,
            *factors,
            **get_launch_options(configuration, scale=scale, γ=γ, ω=ω),
        )
    if class_entries is not None:
        assert y is not None
        # a launch of its own: in the kernel, another thread writes the tile with this entry
        E.scatter_(1, y[rows], class_entries)


@triton.jit
def _add_tile(
    r, m, s, best, tile, E, z, k, C, columns, scale, b, cap, cap_reciprocal,
    HAS_PREDICTED: tl.constexpr, IS_TAIL: tl.constexpr
):  # fmt: skip
    """Writes dv/dz ∘ e^{v-r} of the classes k, and adds e^{v-r} to each lane's sum."""
    v, slope = load_logits(z, k, C, columns, scale, b, cap, cap_reciprocal, IS_TAIL)
    largest = tl.max(v, 1)
    if HAS_PREDICTED:
        best = tl.where(largest > m, tile, best)
    m = tl.where(largest > m, largest, m)
    e = exp(v - r)
    s = s - tl.sum(-e, 1)
    if cap is not None:
        e = e * slope
    if IS_TAIL:
        e = tl.where(k < C, e, 0.0)  # the slope may be nan there
        tl.store(E + k, e.to(E.dtype.element_ty), mask=k < columns)
    else:
        tl.store(E + k, e.to(E.dtype.element_ty))
    return m, s, best


@triton.jit(do_not_specialize=["first_row", "row_count"])
def _process_rows(
    z,
    z_stride,
    E,
    E_stride,
    first_row,
    row_count,
    C,
    columns,
    b,
    scale,
    y,
    p,
    keep,
    cap,
    cap_reciprocal,
    ln_reciprocal,
    γ,
    ω,
    loss,
    lse,
    squared_lse,
    predicted,
    sums,
    dc_dp,
    class_entries,
    softmax_factor,
    exact_factor,
    class_error,
    scale_STRIDE: tl.constexpr,
    γ_STRIDE: tl.constexpr,
    ω_STRIDE: tl.constexpr,
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
        E_row = E + i * E_stride
        is_kept = True
        if keep is not None:
            is_kept = tl.load(keep + row) != 0
        row_factor, row_exact_factor, row_class_error = 0.0, 0.0, 0.0
        class_entry = 0.0
        if is_kept:
            z_row = z + i * z_stride
            scale_row = None
            if scale is not None:
                scale_row = tl.load(scale + row * scale_STRIDE)

            # one read, and a second one if the reference is far below the maximum, or -inf
            v, _ = load_logits(z_row, k, C, columns, scale_row, b, cap, cap_reciprocal, True)
            r = tl.max(tl.max(v, 1), 0)
            row_m, row_s = r, 0.0
            m = tl.full((LANES,), LOWEST, tl.float32)
            best = tl.zeros((LANES,), tl.int32)
            is_far = True
            while is_far:
                m = tl.full((LANES,), LOWEST, tl.float32)
                s = tl.zeros((LANES,), tl.float32)
                for j in tl.range(0, tile_count, num_stages=STAGES):
                    m, s, best = _add_tile(
                        r, m, s, best, j, E_row, z_row, j * TILE + k, C, columns,
                        scale_row, b, cap, cap_reciprocal, predicted is not None, False
                    )  # fmt: skip
                if tail < C:
                    m, s, best = _add_tile(
                        r, m, s, best, tile_count, E_row, z_row, tail + k, C, columns, scale_row,
                        b, cap, cap_reciprocal, predicted is not None, True
                    )  # fmt: skip
                row_m, row_s = tl.max(m, 0), tl.sum(s, 0)
                is_far = row_m - r > MAX_DISTANCE
                r = tl.where(is_far, row_m, r)
            if predicted is not None:
                first = find_first_class(
                    m, row_m, best, z_row, k, C, columns, scale_row, b, cap, cap_reciprocal
                )
                tl.store(predicted + row, first)

            # the results of the row, which refer to the maximum
            reference_s = row_s
            row_s = row_s / exp(row_m - r)
            log_s = tl.log2(row_s) * LN_2
            row_lse = log_s + row_m
            row_dc_dp = row_lse
            shifted_y = 0.0
            slope_y = 1.0
            if y is not None:
                row_y = tl.load(y + row).to(tl.int32)
                v_y, slope_y = load_class_logit(z_row, row_y, scale_row, b, cap, cap_reciprocal)
                shifted_y = v_y - row_m
                row_dc_dp = log_s - shifted_y  # lse - v_y would cancel
            row_p = 0.0
            if p is not None:
                row_p = tl.load(p + row)
            row_loss = tl.where(row_p == 0, 0.0, row_p * row_dc_dp)
            write_results(
                row, loss, lse, squared_lse, None, sums, dc_dp, row_loss * ln_reciprocal,
                row_lse, 0.0, row_m, row_s, 0.0, row_dc_dp
            )  # fmt: skip

            # the factors: Δ = a ∘ weight, but for the entry of the class
            γβp = tl.load(γ + row * γ_STRIDE) * ln_reciprocal * row_p
            ω_weight = 0.0
            if ω is not None:
                ω_weight = 2 * tl.load(ω + row * ω_STRIDE) * row_lse
            weight = γβp + ω_weight
            least = γβp * MIN_WEIGHT
            weight = tl.where(tl.abs(weight) < tl.abs(least), least, weight)
            row_factor = weight / reference_s
            row_exact_factor = row_factor
            if class_entries is not None:
                # T e_y - p s, written with e_y - s, which is exact where e_y is nearly s
                e_y = exp(shifted_y)
                class_delta = (γβp * (e_y - row_s) + ω_weight * e_y) / row_s * slope_y
                class_entry = tl.where(weight == 0, 0.0, class_delta / row_factor)
                rounded = class_entry.to(class_entries.dtype.element_ty).to(tl.float32)
                # rounding moves this factor, by as much as an entry of E, and not the class's Δ
                is_small = tl.abs(rounded) < MIN_ENTRY
                row_exact_factor = tl.where(is_small, row_factor, class_delta / rounded)
                row_class_error = class_delta - row_factor * rounded
        else:
            write_results(
                row, loss, lse, squared_lse, None, sums, dc_dp, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0
            )  # fmt: skip
            if predicted is not None:
                tl.store(predicted + row, -1)
            write_zeros(E_row, k, C, columns)
        tl.store(softmax_factor + row, row_factor)
        tl.store(exact_factor + row, row_exact_factor)
        if class_entries is not None:
            tl.store(class_entries + i, class_entry)
            tl.store(class_error + row, row_class_error)
