"""A linear map between the tensors of several ranks, with its adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torch_nnmath.formulas._formula import KernelFormula

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
