"""The affine map of a layer and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath.formulas._formula import Formula, save, sum_present


class Affine(Formula):
    r"""F1, F8: Z = X Wᵀ + b;  from Δ = dc/dZ:  dX = Δ W,  dW = Δᵀ X,  db = Σ_rows Δ.

    x (*, n), W (m, n), b (m) or None -> z (*, m).
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return apply_affine(x, W, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, z: Tensor) -> None:
        x, W, b, *_ = inputs
        needs_x, needs_W, *_ = ctx.needs_input_grad
        save(ctx, x, W, backward=(x if needs_W else None, W if needs_x else None))
        ctx.b_shape = None if b is None else b.shape

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, W = ctx.saved_tensors
        return compute_affine_gradients(dz, x, W, ctx.b_shape, ctx.needs_input_grad)

    @staticmethod
    def tangent(ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None) -> Tensor:
        x, W = ctx.saved_tensors
        dz = compute_affine_tangent(x, W, dx, dW, db)
        return dz.expand(*x.shape[:-1], W.shape[0])


def apply_affine(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """F1, without a view mark: a view that a Function returns cannot be modified in place."""
    z = torch.nn.functional.linear(x, W, b)
    return z if x.dim() == 2 else _torch.drop_view_mark(z)  # the product of matrices is no view


def compute_affine_gradients(
    dz: Tensor, x: Any, W: Any, b_shape: Any, needs_gradient: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """F8: (Δ W, Δᵀ X, Σ_rows Δ), None for those that are not needed."""
    dx = dW = db = None
    if dz.dim() == 2:
        dx = dz.mm(W) if needs_gradient[0] else None
        dW = dz.t().mm(x) if needs_gradient[1] else None
    else:
        rows = tuple(range(dz.dim() - 1))
        dx = dz @ W if needs_gradient[0] else None
        dW = torch.tensordot(dz, x, dims=(rows, rows)) if needs_gradient[1] else None
    if needs_gradient[2]:
        db = dz.sum(0) if dz.dim() == 2 and dz.shape[1:] == b_shape else dz.sum_to_size(b_shape)
    return dx, dW, db


def compute_affine_tangent(
    x: Tensor, W: Tensor, dx: Tensor | None, dW: Tensor | None, db: Tensor | None
) -> Tensor:
    """F1: ż = W ẋ + Ẇ x + ḃ, without the tangents that are None."""
    dz: Tensor = sum_present(
        None if dx is None else torch.nn.functional.linear(dx, W),
        None if dW is None else torch.nn.functional.linear(x, dW),
        db,
    )
    return dz
