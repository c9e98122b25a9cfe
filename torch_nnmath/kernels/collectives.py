"""Collectives of `torch.distributed` over a process group that is given by its name.

They are operators, so that compilers do not trace them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath.kernels._library import register_operator

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


@register_operator(
    "all_reduce(Tensor x, str operation, str group) -> Tensor",
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    is_collective=True,
)
def all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    """x reduced over the group: a new tensor."""
    return Reduction(x.clone(memory_format=torch.contiguous_format), operation, group).wait()


@register_operator(
    "all_gather(Tensor x, int dim, SymInt size, str group) -> Tensor",
    lambda x, dim, size, _: x.new_empty(_replace_size(x, dim, size)),
    is_collective=True,
)
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
    return gathered[:size].movedim(0, dim).contiguous()


@register_operator(
    "reduce_scatter(Tensor x, int dim, str group) -> Tensor",
    lambda x, dim, group: x.new_empty(_replace_size(x, dim, _count_chunk(x.shape[dim], group))),
    is_collective=True,
)
def reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's chunk, as `torch.chunk` cuts the axis, of the sum over the group."""
    process_group, size = _torch.find_process_group(group), x.shape[dim]
    ranks = process_group.size()
    length = -(-size // ranks)
    padded = _pad(x.movedim(dim, 0), ranks * length)
    chunk = padded.new_empty((length, *padded.shape[1:]))
    with explain_failure(group):
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(chunk, padded, group=process_group)
    _, count = _find_own_chunk(size, group)
    return chunk[:count].movedim(0, dim).contiguous()


@register_operator(
    "take_chunk(Tensor x, int dim, str group) -> Tensor",
    lambda x, dim, group: x.new_empty(_replace_size(x, dim, _count_chunk(x.shape[dim], group))),
)
def take_chunk(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's chunk of an axis: a new tensor."""
    chunk = _find_own_chunk(x.shape[dim], group)
    return x.narrow(dim, *chunk).clone(memory_format=torch.contiguous_format)


def find_chunk(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """First index and length of a rank's chunk of an axis, as `torch.chunk` cuts it."""
    length = -(-size // ranks)
    first = min(rank * length, size)
    return first, min(length, size - first)


def _find_own_chunk(size: int, group: str) -> tuple[int, int]:
    process_group = _torch.find_process_group(group)
    return find_chunk(size, process_group.size(), process_group.rank())


def _count_chunk(size: int, group: str) -> int:
    _, count = _find_own_chunk(size, group)
    return count


def _replace_size(x: Tensor, dim: int, size: int) -> list[int]:
    """The shape of x with another size of one axis."""
    return [size if d == dim % x.dim() else n for d, n in enumerate(x.shape)]


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
