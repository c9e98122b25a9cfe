"""Prints the table of docs/scale.md: what a step of the head costs on many GPUs, on paper.

The counts are those of the page's section "What travels"; the speeds are the vendor's peaks, so
the times are lower bounds. Nothing is measured.

    python tools/scale_costs.py
"""

from __future__ import annotations

from typing import NamedTuple

# Per GPU, one direction; NVIDIA's published peaks for DGX H100
PRODUCT_RATE = 989e12  # bfloat16 operations a second, dense
NVLINK = 450e9  # bytes a second: half of "900 GB/s bidirectional"
INFINIBAND = 50e9  # bytes a second: one "400 Gb/s" ConnectX-7 for each GPU
NODE = 8  # GPUs, each with one NIC

WIDTH = 4096  # features, bfloat16
TOKENS = 2**20  # of a step, on all GPUs together
GPU_COUNTS = (8, 64, 1024)
CLASSES = (128_000, 256_000, 1_000_000)


class Costs(NamedTuple):
    """Of one GPU in a step: forward and backward of the head's mean loss."""

    products: float  # seconds
    weights: float  # seconds: all-gather of the weight, reduce-scatter of its gradient
    rows: float  # seconds: features, maxima, sums, gradient of the features
    memory: int  # bytes: the gathered weight, and its gradient before it is scattered


def get_speed(ranks: int, stride: int) -> float:
    """Bytes a second of each rank in a ring of ranks that are `stride` GPUs apart.

    Rings of neighbours fill a node: as many of them as it has NICs share the message, and NVLink
    carries all of it. Ranks a node apart have one NIC each.
    """
    if ranks * stride <= NODE:
        return NVLINK
    return min(NVLINK, INFINIBAND * max(1, NODE // stride))


def compute_costs(gpus: int, classes: int, vocabulary_ranks: int, tokens: int = TOKENS) -> Costs:
    """The classes split over neighbours, the rest of the weight by FSDP over the other GPUs.

    With `vocabulary_ranks=1`, FSDP alone.
    """
    shards, copies = vocabulary_ranks, gpus // vocabulary_ranks
    if shards * copies != gpus:
        raise ValueError(f"{gpus} GPUs are not a multiple of {shards}")
    rows = tokens // copies  # that each GPU computes, for its classes
    own = WIDTH * -(-classes // shards)  # entries of the weight of these classes
    products = 3 * 2 * rows * own / PRODUCT_RATE  # logits, dX, dW
    share = (copies - 1) / copies
    weights = share * (2 + 4) * own / get_speed(copies, shards)  # bfloat16 in, float32 out
    share = (shards - 1) / shards
    gathered = (2 + 4) * rows * WIDTH  # features in bfloat16, dX in float32
    reduced = 2 * (4 + 8) * rows  # a maximum and two sums a row; an all-reduce sends twice
    of_rows = share * (gathered + reduced) / get_speed(shards, 1)
    return Costs(products, weights, of_rows, (2 + 4) * own)


def find_break_even_tokens(speed: float = NVLINK) -> float:
    """Rows a GPU above which FSDP's products take longer than its weights: 6 r C D / rate."""
    return PRODUCT_RATE / speed


def format_table() -> str:
    lines = [
        "| GPUs | classes | products | FSDP alone: weights | GB | vocabulary over | weights | rows "
        "| GB |",
        "| --- " * 9 + "|",
    ]
    for gpus in GPU_COUNTS:
        for classes in CLASSES:
            for shards in sorted({NODE, min(64, gpus)}):
                alone = compute_costs(gpus, classes, 1)
                split = compute_costs(gpus, classes, shards)
                cells = [
                    *(f"{gpus}", f"{classes // 1000} k", format_ms(alone.products)),
                    *(format_ms(alone.weights), f"{alone.memory / 1e9:.2f}", f"{shards}"),
                    *(format_ms(split.weights), format_ms(split.rows)),
                    f"{split.memory / 1e9:.2f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


if __name__ == "__main__":
    print(format_table())
