"""Logits in tiles, as both orders of the head's row kernel read them.

A tile has the shape (lanes, VECTOR): a reduction over axis 1 stays in a thread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_nnmath.kernels.gpu.launch import count_processors

VECTOR = 4  # float32 logits of a 16-byte load
MAX_WARPS = 16
PROGRAMS_WITHOUT_GPU = 2  # in Triton's interpreter

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# a lane's maximum before its first logit; finite, since -inf - (-inf) is nan
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
# clamp for v - m, so that (v - m) e^(v - m) is 0 and not nan at v = -inf
MIN_SHIFTED: tl.constexpr = tl.constexpr(-1e4)
NO_CLASS: tl.constexpr = tl.constexpr(2**31 - 1)


class Configuration(NamedTuple):
    """How a kernel is compiled."""

    lanes: int  # a tile has lanes x VECTOR logits
    num_warps: int
    num_stages: int


def get_launch_options(configuration: Configuration, **row_values: Tensor | None) -> dict[str, int]:
    """The constants and options with which a row kernel of this configuration is launched.

    `row_values` are the arguments of which each row has one, or all rows share one.
    """
    strides = {f"{name}_STRIDE": get_row_stride(value) for name, value in row_values.items()}
    return strides | {
        "LANES": configuration.lanes,
        "VECTOR": VECTOR,
        "STAGES": configuration.num_stages,
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
        "enable_fp_fusion": True,
    }


def get_row_stride(value: Tensor | None) -> int:
    """1 for a value of each row, 0 for one that all rows share."""
    return 0 if value is None or value.dim() == 0 else 1


def count_programs(device: torch.device, num_warps: int, max_warps: int = MAX_WARPS) -> int:
    """As many programs as the device runs at once, with `max_warps` warps a multiprocessor."""
    if device.type != "cuda":
        return PROGRAMS_WITHOUT_GPU
    return count_processors(device) * max(max_warps // num_warps, 1)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def finish_logits(z, cap, cap_reciprocal):
    """v = κ tanh(z/κ) and dv/dz; v = z and 1 without a cap."""
    v = z
    slope = 1.0
    if cap is not None:
        u = z * cap_reciprocal
        f = exp(-2 * tl.abs(u))
        r = 1 / (1 + f)
        tanh = (1 - f) * r
        tanh = tl.where(u < 0, -tanh, tanh)
        # near 0 the quotient loses digits, and an odd polynomial does not
        q = u * u
        c = -5.70498872745e-3 * q + 2.06390887954e-2
        c = c * q - 5.37397155531e-2
        c = c * q + 1.33314422036e-1
        c = c * q - 3.33332819422e-1
        tanh = tl.where(tl.abs(u) < 0.625, u + u * (q * c), tanh)
        v = cap * tanh
        slope = 4 * f * r * r
    return v, slope


@triton.jit
def load_logits(z, k, C, columns, scale, b, cap, cap_reciprocal, IS_TAIL: tl.constexpr):
    """v and dv/dz of the classes k. In a tail, v is -inf from class C on."""
    # the bound `columns` is a multiple of 16 and keeps the load vectorised
    x = tl.load(z + k, mask=k < columns, other=0.0) if IS_TAIL else tl.load(z + k)
    if scale is not None:
        x = x * scale
    if b is not None:
        x = x + (tl.load(b + k, mask=k < C, other=0.0) if IS_TAIL else tl.load(b + k))
    v, slope = finish_logits(x, cap, cap_reciprocal)
    if IS_TAIL:
        v = tl.where(k < C, v, float("-inf"))
    return v, slope


@triton.jit
def load_class_logit(z, y, scale, b, cap, cap_reciprocal):
    """v and dv/dz of the class y."""
    x = tl.load(z + y)
    if scale is not None:
        x = x * scale
    if b is not None:
        x = x + tl.load(b + y)
    return finish_logits(x, cap, cap_reciprocal)


@triton.jit
def find_first_class(m, row_m, best, z, k, C, columns, scale, b, cap, cap_reciprocal):
    """The first class whose logit is row_m, given each lane's maximum m and its tile `best`."""
    # the tile in which a lane found its maximum has the lane's first class with it
    classes = (best * (k.shape[0] * k.shape[1]))[:, None] + k
    v, _ = load_logits(z, classes, C, columns, scale, b, cap, cap_reciprocal, True)
    largest = tl.max(v, 1)
    candidates = tl.where(v == largest[:, None], classes, NO_CLASS)
    candidate = tl.where(m == row_m, tl.min(candidates, 1), NO_CLASS)
    first = tl.min(candidate, 0)
    # no logit equals the largest one if all are nan
    return tl.where(first < C, first, 0).to(tl.int64)


@triton.jit
def load_target(t, k, C, IS_TAIL: tl.constexpr):
    return tl.load(t + k, mask=k < C, other=0.0) if IS_TAIL else tl.load(t + k)


@triton.jit
def shift(m, new_m):
    """m - new_m, finite also if a lane has no logit."""
    return tl.maximum(m - new_m, LOWEST)
