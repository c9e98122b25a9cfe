"""A linear map between the tensors of several ranks, with its adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath.formulas._formula import KernelFormula
from torch_nnmath.kernels import collectives

LinearMap = Callable[[Tensor], Tensor]


class Transfer(KernelFormula):
    r"""y = A x;  dx = Aᵀ dy, for a linear map A of the tensors of all ranks of a group.

    (x, A, Aᵀ) -> y; both maps are functions that all ranks call. An example: A copies a tensor to
    all ranks of a group, each of which uses it; Aᵀ sums their gradients.
    """

    @staticmethod
    def forward(x: Tensor, transfer: LinearMap, adjoint: LinearMap) -> Tensor:
        return transfer(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.transfer, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Transfer.evaluate(g, ctx.adjoint, ctx.transfer), None, None

    @staticmethod
    def tangent(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        result: Tensor = Transfer.evaluate(dx, ctx.transfer, ctx.adjoint)
        return result


def copy_to_ranks(v: Tensor, group: str | None) -> Tensor:
    """v, which all ranks have and each uses for a part; widened, as the sum of its gradients."""
    if group is None:
        return v
    dtype, wide = v.dtype, wide_type(v.dtype)
    result: Tensor = Transfer.evaluate(
        v,
        lambda v: v.view_as(v) if dtype == wide else v.to(wide),
        lambda g: collectives.all_reduce(g.to(wide), collectives.SUM, group).to(dtype),
    )
    return result


def sum_over_ranks(v: Tensor, group: str | None) -> Tensor:
    """Σ v over the ranks, which all of them have."""
    if group is None:
        return v
    result: Tensor = Transfer.evaluate(
        v, lambda v: collectives.all_reduce(v, collectives.SUM, group), lambda g: g.view_as(g)
    )
    return result


def reduce_constant(v: Tensor, operation: str, group: str) -> Tensor:
    """v reduced over the ranks, which all get the result; its derivative is 0."""

    def reduce(v: Tensor) -> Tensor:
        return collectives.all_reduce(v, operation, group)

    result: Tensor = Transfer.evaluate(v, reduce, torch.zeros_like)
    return result


def gather_from_ranks(v: Tensor, dim: int, size: int, group: str, is_summed: bool) -> Tensor:
    """The ranks' chunks of an axis of this size, in one tensor.

    `is_summed`: each rank has a part of the result's gradient. Then the result is widened.
    """
    dtype, wide = v.dtype, wide_type(v.dtype) if is_summed else v.dtype

    def scatter(g: Tensor) -> Tensor:
        if is_summed:
            return collectives.reduce_scatter(g.to(wide), dim, group).to(dtype)
        return collectives.take_chunk(g, dim, group)

    result: Tensor = Transfer.evaluate(
        v, lambda v: collectives.all_gather(v, dim, size, group).to(wide), scatter
    )
    return result


def scatter_to_ranks(v: Tensor, dim: int, group: str) -> Tensor:
    """This rank's chunk of an axis of v, which all ranks have."""
    size = v.shape[dim]
    result: Tensor = Transfer.evaluate(
        v,
        lambda v: collectives.take_chunk(v, dim, group),
        lambda g: collectives.all_gather(g, dim, size, group),
    )
    return result
