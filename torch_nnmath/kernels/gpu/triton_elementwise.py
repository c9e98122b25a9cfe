"""Products with the activations' Jacobians (F2, F6) and squared errors (F4, F9, F11) on a GPU.

Each kernel reads its inputs once and writes each result once. It computes in float32 and rounds
once. A program takes one tile. A full tile is loaded without a mask, so that its accesses are
128 bits wide for any number of entries.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_nnmath.kernels.elementwise import (
    allocate_loss,
    allocate_product,
    keep_memory_format,
    order_by_memory,
)
from torch_nnmath.kernels.gpu.launch import use_device

MIN_EXPONENT = tl.constexpr(-104.0)  # e^-104 rounds to 0 in float32
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693359375)  # 10 bits, so that its product with an exponent is exact
LN_2_LOW = tl.constexpr(-2.12194440054690583e-4)


class Tiles(NamedTuple):
    """Sizes of tiles, in entries."""

    flat: int  # of products, and of squared errors without examples
    example: int  # of a squared error; several examples, or a part of one
    longest_row: int  # examples up to this length are not split
    partial: int  # of the sum of the tiles' sums
    warps: int


NVIDIA_TILES = Tiles(flat=1024, example=1024, longest_row=1024, partial=1024, warps=4)
AMD_TILES = Tiles(flat=4096, example=4096, longest_row=4096, partial=2048, warps=8)


def choose_tiles() -> Tiles:
    """The sizes for the kind of GPU that PyTorch was built for. A wavefront has 64 threads."""
    return NVIDIA_TILES if torch.version.hip is None else AMD_TILES


def _launch(kernel: Any, programs: int, x: Tensor, *args: Any, **constants: Any) -> None:
    with use_device(x):
        kernel[(programs,)](
            *args, **constants, num_warps=choose_tiles().warps, enable_fp_fusion=True
        )


# Products


def sigmoid_product(a: Tensor, v: Tensor) -> Tensor:
    """F6: a (1 - a) v."""
    return _multiply(a, v, "sigmoid")


def tanh_product(a: Tensor, v: Tensor) -> Tensor:
    """F2: (1 - a²) v."""
    return _multiply(a, v, "tanh")


def relu_product(a: Tensor, v: Tensor) -> Tensor:
    """F2: v where a > 0 or nan, else 0."""
    return _multiply(a, v, "relu")


def _multiply(a: Tensor, v: Tensor, activation: str) -> Tensor:
    product = allocate_product(a, v)
    n, tile = v.numel(), choose_tiles().flat
    if n > 0:
        result, a, v = order_by_memory(product, a, v)
        programs = triton.cdiv(n, tile)
        _launch(product_kernel, programs, v, a, v, result, n, ACTIVATION=activation, TILE=tile)
    return product


@triton.jit(do_not_specialize=["n"])
def product_kernel(a, v, result, n, ACTIVATION: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    count = tl.minimum(n - start, TILE).to(tl.int32)
    a_tile = _load_tile(a + start, count, TILE)
    v_tile = _load_tile(v + start, count, TILE)
    if ACTIVATION == "relu":
        product = tl.where(a_tile.to(tl.float32) <= 0, 0.0, v_tile)
    else:
        a_tile = a_tile.to(tl.float32)
        # a - a² or 1 - a² with one rounding, so that no digit is lost near saturation
        if ACTIVATION == "sigmoid":
            slope = tl.fma(-a_tile, a_tile, a_tile)
        if ACTIVATION == "tanh":
            slope = tl.fma(-a_tile, a_tile, 1.0)
        product = slope * v_tile.to(tl.float32)
    _store_tile(result + start, product, count, TILE)


@triton.jit
def _load_tile(x, count, TILE: tl.constexpr):
    """The first `count` entries, then 0."""
    k = tl.arange(0, TILE)
    return tl.load(x + k) if count == TILE else tl.load(x + k, mask=k < count, other=0)


@triton.jit
def _store_tile(x, tile, count, TILE: tl.constexpr):
    """Stores the first `count` entries, rounded to the type of `x`."""
    k = tl.arange(0, TILE)
    tile = tile.to(x.dtype.element_ty)
    if count == TILE:
        tl.store(x + k, tile)
    else:
        tl.store(x + k, tile, mask=k < count)


# Squared errors


def squared_error(
    dc: Tensor | None, a: Tensor, t: Tensor, axes: int, scale: float, needs_c: bool
) -> tuple[Tensor, Tensor]:
    """F4: c = scale/2 Σ (t - a)² over the last axes, and da = scale dc (a - t)."""
    return _compute_squared_error(dc, a, t, axes, scale, False, needs_c)


def sigmoid_squared_error(
    dc: Tensor | None, z: Tensor, t: Tensor, axes: int, needs_c: bool
) -> tuple[Tensor, Tensor]:
    """F9, F11: `squared_error` of a = σ(z), and dz = dc (a - t) a σ(-z), since 1 - a cancels."""
    return _compute_squared_error(dc, z, t, axes, 1.0, True, needs_c)


class Coefficients(NamedTuple):
    """dc on the device: None, one value for all, for each example or for each entry."""

    dc: Tensor | None
    kind: str  # "none", "shared", "row" or "entry"


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
    example = a.shape[a.dim() - axes :]
    c, da = allocate_loss(dc, a, t, axes, needs_c)
    if a.numel() == 0:
        return c.zero_(), da
    entries = math.prod(example)
    coefficients = _classify(dc, entries)
    results = c if needs_c else None, da if dc is not None else None
    inputs = a.contiguous(), t.contiguous()
    tiles = choose_tiles()
    constants: dict[str, Any] = {"IS_SIGMOID": is_sigmoid}
    if entries == 1 or (not needs_c and coefficients.kind != "row"):
        constants |= {"C_KIND": "entry" if needs_c else "none", "TILE": tiles.flat}
        _launch_flat(coefficients, inputs, results, (1, a.numel()), scale, constants)
    elif entries <= tiles.longest_row:
        _launch_rows(coefficients, inputs, results, entries, scale, constants)
    else:
        constants |= {"C_KIND": "row" if needs_c else "none", "TILE": tiles.example}
        size = a.numel() // entries, entries
        _launch_flat(coefficients, inputs, results, size, scale, constants)
    return c, da


def _classify(dc: Tensor | None, entries: int) -> Coefficients:
    if dc is None:
        return Coefficients(None, "none")
    is_shared = all(stride == 0 or n == 1 for n, stride in zip(dc.shape, dc.stride(), strict=True))
    if is_shared:  # one number, perhaps expanded
        return Coefficients(dc, "shared")
    return Coefficients(dc.contiguous(), "entry" if entries == 1 else "row")


def _launch_flat(
    coefficients: Coefficients,
    inputs: tuple[Tensor, Tensor],
    results: tuple[Tensor | None, Tensor | None],
    size: tuple[int, int],
    scale: float,
    constants: dict[str, Any],
) -> None:
    """Splits each of `size[0]` examples, of `size[1]` entries each, into tiles."""
    (examples, entries), (c, da), a = size, results, inputs[0]
    tiles = triton.cdiv(entries, constants["TILE"])
    has_partial_sums = constants["C_KIND"] == "row" and tiles > 1
    sums = a.new_empty(examples * tiles, dtype=torch.float32) if has_partial_sums else c
    # a multiple of 16, which Triton knows, aligns the accesses; one example needs no stride
    stride = entries if examples > 1 else 0
    args = coefficients.dc, *inputs, sums, da, entries, stride, tiles, scale
    constants = {"DC_KIND": coefficients.kind, **constants}
    c_factor = 1.0 if has_partial_sums else scale / 2
    _launch(error_kernel, examples * tiles, a, *args, c_factor, **constants)
    if has_partial_sums:
        partial = choose_tiles().partial
        _launch(partial_sums_kernel, examples, a, sums, c, tiles, scale / 2, TILE=partial)


def _launch_rows(
    coefficients: Coefficients,
    inputs: tuple[Tensor, Tensor],
    results: tuple[Tensor | None, Tensor | None],
    entries: int,
    scale: float,
    constants: dict[str, Any],
) -> None:
    """Computes several short examples in each program."""
    columns = triton.next_power_of_2(entries)
    rows = max(choose_tiles().example // columns, 1)
    examples = inputs[0].numel() // entries
    args = coefficients.dc, *inputs, *results, examples, entries, scale
    constants = {"DC_KIND": coefficients.kind, "ROWS": rows, "COLUMNS": columns, **constants}
    _launch(error_rows_kernel, triton.cdiv(examples, rows), inputs[0], *args, **constants)


@triton.jit(do_not_specialize=["entries", "tiles"])
def error_kernel(
    dc,
    a,
    t,
    c,
    da,
    entries,
    stride,
    tiles,
    scale,
    c_factor,
    IS_SIGMOID: tl.constexpr,
    DC_KIND: tl.constexpr,
    C_KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of one example. With C_KIND = "row", c has a sum for each tile."""
    program = tl.program_id(0).to(tl.int64)
    column = program * TILE
    start = column
    if C_KIND == "row" or DC_KIND == "row":
        example = program // tiles
        column -= example * tiles * TILE
        start = example * stride + column
    count = tl.minimum(entries - column, TILE).to(tl.int32)
    a_tile = _load_tile(a + start, count, TILE)
    t_tile = _load_tile(t + start, count, TILE)
    error, slope = _evaluate_error(a_tile, t_tile, IS_SIGMOID)
    if C_KIND == "row":
        square = tl.where(tl.arange(0, TILE) < count, error * error, 0.0)
        tl.store(c + program, c_factor * tl.sum(square, 0))
    if DC_KIND != "none":
        if DC_KIND == "shared":
            dc_tile = tl.load(dc)
        if DC_KIND == "row":
            dc_tile = tl.load(dc + example)
        if DC_KIND == "entry":
            dc_tile = _load_tile(dc + start, count, TILE)
        gradient = error * slope if IS_SIGMOID else error
        _store_tile(da + start, gradient * (scale * dc_tile.to(tl.float32)), count, TILE)
    if C_KIND == "entry":
        _store_tile(c + start, c_factor * (error * error), count, TILE)


@triton.jit(do_not_specialize=["tiles"])
def partial_sums_kernel(sums, c, tiles, c_factor, TILE: tl.constexpr):
    """c of an example: `c_factor` times the sum of its tiles' sums."""
    example = tl.program_id(0).to(tl.int64)
    sums += example * tiles
    k = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, tiles, TILE):
        total += tl.load(sums + start + k, mask=start + k < tiles, other=0.0)
    tl.store(c + example, c_factor * tl.sum(total, 0))


@triton.jit(do_not_specialize=["examples"])
def error_rows_kernel(
    dc,
    a,
    t,
    c,
    da,
    examples,
    entries,
    scale,
    IS_SIGMOID: tl.constexpr,
    DC_KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS examples of at most COLUMNS entries."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    start = first * entries
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)[None, :]
    is_row = i < examples - first
    is_inside = is_row[:, None] & (j < entries)
    k = i[:, None] * entries + j
    a_tile = tl.load(a + start + k, mask=is_inside, other=0)
    t_tile = tl.load(t + start + k, mask=is_inside, other=0)
    error, slope = _evaluate_error(a_tile, t_tile, IS_SIGMOID)
    if c is not None:
        square = tl.where(is_inside, error * error, 0.0)
        tl.store(c + first + i, scale * 0.5 * tl.sum(square, 1), mask=is_row)
    if DC_KIND != "none":
        if IS_SIGMOID:
            error *= slope
        if DC_KIND == "row":
            dc_tile = tl.load(dc + first + i, mask=is_row, other=0).to(tl.float32)
            error *= scale * dc_tile[:, None]
        else:
            error *= scale * tl.load(dc).to(tl.float32)
        tl.store(da + start + k, error, mask=is_inside)


@triton.jit
def _evaluate_error(a, t, IS_SIGMOID: tl.constexpr):
    """a - t, and the slope of the sigmoid if `a` is z."""
    a = a.to(tl.float32)
    slope = a
    if IS_SIGMOID:
        is_positive = a > 0
        e = _exp(-tl.abs(a))
        large = 1.0 / (1.0 + e)
        slope = e * large * large
        a = tl.where(is_positive, large, e * large)
    return a - t.to(tl.float32), slope


@triton.jit
def _exp(x):
    """e^x for x <= 0, to a few roundings: x log₂ e would lose the digits of a large x."""
    x = tl.where(x < MIN_EXPONENT, MIN_EXPONENT, x)  # not `maximum`, which may drop nan
    n = tl.floor(x * LOG2_E)
    r = (x - n * LN_2_HIGH) - n * LN_2_LOW
    return tl.exp2(r * LOG2_E) * tl.exp2(n)


# The gradient times the cost's gradient


def scale_(gradient: Tensor, factor: Tensor, keep: Tensor | None) -> Tensor:
    """Multiplies a contiguous gradient (N, D) by `factor`, a scalar on the device, in place.

    If the factor is 1, no program touches the gradient. Rows whose keep, (N, 1) or (1, 1), is
    False are 0 and stay 0, also times inf and nan.
    """
    n, tile = gradient.numel(), choose_tiles().flat
    if n > 0:
        keep_kind = "none" if keep is None else "shared" if keep.numel() == 1 else "row"
        keep = None if keep is None else keep.contiguous()
        args = gradient, factor, keep, n, gradient.shape[-1] if gradient.dim() else 1
        constants = {"KEEP_KIND": keep_kind, "TILE": tile}
        _launch(scale_kernel, triton.cdiv(n, tile), gradient, *args, **constants)
    return gradient


@triton.jit(do_not_specialize=["n", "D"])
def scale_kernel(gradient, factor, keep, n, D, KEEP_KIND: tl.constexpr, TILE: tl.constexpr):
    k = tl.load(factor)
    if k != 1:
        start = tl.program_id(0).to(tl.int64) * TILE
        count = tl.minimum(n - start, TILE).to(tl.int32)
        g = _load_tile(gradient + start, count, TILE)
        if g.dtype != tl.float64:
            g = g.to(tl.float32)
        factor_g = k.to(g.dtype)
        product = g * factor_g
        if KEEP_KIND == "shared":
            product = tl.where(tl.load(keep) != 0, product, 0.0)
        # only inf and nan change the 0 of an ignored row
        if KEEP_KIND == "row" and factor_g - factor_g != 0:
            i = tl.arange(0, TILE)
            row = start // D
            rows = ((start - row * D).to(D.dtype) + i) // D  # from `row` on, by 32-bit division
            is_kept = tl.load(keep + row + rows, mask=i < count, other=0) != 0
            product = tl.where(is_kept, product, 0.0)
        _store_tile(gradient + start, product, count, TILE)
