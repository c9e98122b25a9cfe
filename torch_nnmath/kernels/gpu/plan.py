"""How the head divides its rows on a GPU, from a budget of memory.

The rows form blocks. A block keeps its half-precision Δ until one product gives dX and one gives
dW, so larger blocks use the matrix units better. The float32 logits exist for a slab of a block's
rows at a time. With C classes and D features, a call uses, beyond inputs and results:

    slab rows x 4 C  +  block rows x 2 C  +  4 C D if there are several blocks

The last term is dW in float32, which accumulates over the blocks; for float32 weights it is the
result itself. In products of float32, Δ takes 4 C bytes a row. A row kernel that reads once needs
scaled features of a block: 2 D bytes a row. Autocast's half copy of a float32 weight, 2 C D bytes,
is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from torch_nnmath._precision import wide_type

SLAB_ROWS = 640  # the product that fills a slab fills whole waves of 128 x 256 tiles
MIN_SLAB_ROWS = 128  # below, reading W takes longer than the product
SINGLE_BLOCK_ROWS = 4096  # up to this many rows, a block needs less memory than an accumulator
ALIGNMENT = 16  # entries; rows of a buffer start at multiples of 32 bytes, for wide loads

_budget = 3 * 2**29


def get_memory_budget() -> int:
    """Bytes that the head may use on a GPU beyond its inputs, gradients and results."""
    return _budget


def set_memory_budget(size: int) -> None:
    """Sets the bytes that the head may use on a GPU; 1.5 GiB by default.

    Larger budgets allow larger blocks of rows, which are faster. A head whose smallest plan needs
    more than the budget uses that plan: 128 rows at a time, and dW in float32 for half weights.
    """
    global _budget
    if size <= 0:
        raise ValueError(f"the budget must be positive, but is {size} bytes")
    _budget = size


class Plan(NamedTuple):
    """The rows of each block and of each slab, and whether dW accumulates apart in float32."""

    rows: int
    block_rows: int
    slab_rows: int
    has_accumulator: bool

    def iterate_blocks(self) -> Iterator[slice]:
        return _split(0, self.rows, self.block_rows)

    def iterate_slabs(self, block: slice) -> Iterator[slice]:
        return _split(block.start, block.stop, self.slab_rows)


def make_plan(
    x: Tensor,
    W: Tensor,
    buffers: int = 1,
    is_dW_half: bool = False,
    scales_features: bool = False,
) -> Plan:
    """Chooses the largest blocks and slabs within the budget.

    W is the operand of the products. `buffers` is the number of slabs and of matrices Δ: 2 for the
    second order. A dW of a half type, if it is needed, accumulates over several blocks in float32.
    """
    N, (C, D) = len(x), W.shape
    slab_row = buffers * wide_type(W.dtype).itemsize * C
    block_row = W.dtype.itemsize * (buffers * C + (D if scales_features else 0))
    accumulator = 4 * C * D if is_dW_half else 0
    smallest = accumulator + MIN_SLAB_ROWS * (slab_row + block_row)
    # one block of this many rows needs no more memory than several and the accumulator
    largest = SINGLE_BLOCK_ROWS + (2 * D if accumulator else 0)
    most = min(SLAB_ROWS, _round_up(N, ALIGNMENT))
    slab_rows = _fit(max(_budget, smallest) - N * block_row, slab_row, most)
    if largest >= N and slab_rows >= min(N, MIN_SLAB_ROWS):
        return Plan(N, N, slab_rows, False)
    left = _budget - accumulator
    slab_rows = max(_fit(left, slab_row + block_row, most), MIN_SLAB_ROWS)
    rows = _fit(left - slab_rows * slab_row, block_row, max(SINGLE_BLOCK_ROWS, 2 * D))
    rows = _divide_evenly(N, max(rows, slab_rows))
    return Plan(N, rows, min(slab_rows, rows), bool(accumulator) and rows < N)


def _fit(size: int, row: int, largest: int) -> int:
    """How many rows of `row` bytes fit into `size` bytes, at most `largest`; aligned."""
    return max(min(size // max(row, 1), largest), 0) // ALIGNMENT * ALIGNMENT


def pad(C: int) -> int:
    """The length of a buffer's row of C entries."""
    return _round_up(C, ALIGNMENT)


def _divide_evenly(N: int, rows: int) -> int:
    """Rows of a block so that the blocks are nearly equal, a multiple of the alignment."""
    return _round_up(math.ceil(N / math.ceil(N / rows)), ALIGNMENT)


def _split(start: int, stop: int, rows: int) -> Iterator[slice]:
    """Slices of equal size, none larger than `rows`."""
    if start == stop:
        return
    size = _divide_evenly(stop - start, rows)
    yield from (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
