"""Collectives of `torch.distributed` over a process group that is given by its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from torch_nnmath import _torch

MAX, MIN, SUM = "max", "min", "sum"


class Reduction:
    """A reduction over the group, in place, that runs until `wait`."""

    def __init__(self, x: Tensor, operation: str, group: str):
        self.x, self.group = x.contiguous(), group
        with explain_failure(group):
            self.work = dist.all_reduce(
                self.x,
                getattr(dist.ReduceOp, operation.upper()),
                _torch.find_process_group(group),
                async_op=True,
            )

    def wait(self) -> Tensor:
        """The reduced tensor."""
        with explain_failure(self.group):
            if self.work is not None:
                self.work.wait()
        return self.x


def all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    """x reduced over the group: a new tensor."""
    return Reduction(x.clone(memory_format=torch.contiguous_format), operation, group).wait()


def all_gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """The chunks of an axis of this size, one from each rank, as `torch.chunk` cuts it."""
    process_group = _torch.find_process_group(group)
    ranks = process_group.size()
    chunk = _pad(x.movedim(dim, 0), -(-size // ranks))
    gathered = chunk.new_empty((ranks * len(chunk), *chunk.shape[1:]))
    with explain_failure(group):
        # PyTorch before 2.13 has only the older name
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, chunk, process_group)
    return gathered[:size].movedim(0, dim)


def reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's chunk, as `torch.chunk` cuts the axis, of the sum over the group."""
    process_group = _torch.find_process_group(group)
    ranks, size = process_group.size(), x.shape[dim]
    length = -(-size // ranks)
    padded = _pad(x.movedim(dim, 0), ranks * length)
    chunk = padded.new_empty((length, *padded.shape[1:]))
    with explain_failure(group):
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(chunk, padded, group=process_group)
    _, count = find_chunk(size, ranks, process_group.rank())
    return chunk[:count].movedim(0, dim).contiguous()


def take_chunk(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's chunk of an axis: a new tensor."""
    process_group = _torch.find_process_group(group)
    chunk = find_chunk(x.shape[dim], process_group.size(), process_group.rank())
    return x.narrow(dim, *chunk).clone()


def find_chunk(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """First index and length of a rank's chunk of an axis, as `torch.chunk` cuts it."""
    length = -(-size // ranks)
    first = min(rank * length, size)
    return first, min(length, size - first)


@contextlib.contextmanager
def explain_failure(group: str) -> Iterator[None]:
    """Says, where a collective fails, what usually is the cause."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"a collective over process group {group!r} failed: another of its ranks raised an "
            f"error, stopped, or issued other collectives; see that rank's output ({error})"
        ) from error


def _pad(x: Tensor, length: int) -> Tensor:
    """x, contiguous, with zeros up to this length of the first axis."""
    if len(x) == length:
        return x.contiguous()
    padded = x.new_zeros((length, *x.shape[1:]))
    padded[: len(x)] = x
    return padded
