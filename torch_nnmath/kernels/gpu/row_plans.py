"""How rows of logits are distributed over the programs of a row-wise kernel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """Numbers of entries that `choose_plan` decides by; powers of two."""

    whole_row: int = 16384  # the longest row that one program keeps in registers
    tile: int = 2048  # entries of a tile of several rows
    strided_lanes: int = 128  # rows next to each other in memory, for one program
    loop_tile: int = 8192  # entries that a loop's step reads of a row, without a second operand
    slice_tiles: int = 4  # the fewest tiles of a slice


SIZES = Sizes()


class Plan(NamedTuple):
    """How the rows are distributed over programs."""

    is_tile: bool  # a program keeps its rows in registers
    rows: int  # rows of a program
    shape: tuple[int, int]  # of the tile: rows x classes, or lanes x entries of a lane
    steps: tuple[int, int]  # classes between two lanes, and between two entries of a lane
    slices: int
    slice_tiles: int  # tiles of a slice
    num_warps: int
    num_stages: int


def choose_plan(view: Tensor, operands: int, processors: int) -> Plan:
    """The plan for rows (B, C, n) like `view`, of which a kernel reads one or two operands.

    A tile in registers, if the row fits; else a loop. Where the rows are next to each other
    in memory, each lane has a row. A row is split into slices if there are too few programs.
    """
    B, C, n = view.shape
    width = next_power(C)
    if n > 1 and 0 < view.stride(2) < view.stride(1):
        lanes = min(SIZES.strided_lanes, next_power(n))
        rows = min(max(2 * SIZES.tile // width, SIZES.strided_lanes // 4), lanes)
        if rows * width <= 4 * SIZES.tile:
            return _make_tile_plan(rows, width, operands)
        shape, steps, rows = (lanes, max(SIZES.tile // lanes, 1)), (0, 1), lanes
        tile = shape[1]
    elif width <= SIZES.whole_row:
        return _make_tile_plan(max(min(SIZES.tile // width, next_power(n)), 1), width, operands)
    else:
        # aligned lanes have neighbours, which one instruction loads; otherwise lanes alternate
        vector = 16 // view.element_size()
        is_aligned = view.stride(1) == 1 and math.gcd(C, view.stride(2), vector) == vector
        tile = SIZES.loop_tile // (operands if is_aligned else 2)
        shape = (tile // vector, vector) if is_aligned else (tile // 8, 8)
        steps, rows = (vector, 1) if is_aligned else (1, shape[0]), 1
    tiles, programs = -(-C // tile), B * -(-n // rows)
    slices = 1
    if 2 * programs <= processors:
        slices = max(min(-(-2 * processors // programs), tiles // SIZES.slice_tiles, 128), 1)
    slice_tiles = -(-tiles // slices)
    warps = _count_warps(shape[0] * shape[1], 8)
    stages = 2 if torch.version.hip or operands > 1 else 3
    return Plan(False, rows, shape, steps, -(-tiles // slice_tiles), slice_tiles, warps, stages)


def _make_tile_plan(rows: int, width: int, operands: int) -> Plan:
    """ROCm's compiler spills masks if a thread has many entries of two operands."""
    thread_entries = 4 if torch.version.hip and operands > 1 else 16
    warps = _count_warps(rows * width, thread_entries)
    return Plan(True, rows, (rows, width), (0, 1), 1, 1, warps, 1)


def _count_warps(entries: int, thread_entries: int) -> int:
    """Warps with about that many entries a thread. A warp has 32 threads, 64 on ROCm."""
    threads, most = 32, 16
    if torch.version.hip:
        threads, most = 64, 16 if thread_entries < 8 else 8
    return min(max(entries // (threads * thread_entries), 1), most)


def next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()
