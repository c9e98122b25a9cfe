"""The rectifier, and the same in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch, kernels
from torch_nnmath.formulas._formula import Formula, SymmetricJacobian, save
from torch_nnmath.kernels.dispatch import accelerate_with


class ReLU(SymmetricJacobian):
    r"""F2: a = max(0, z),  da/dz = 0 where z <= 0, else 1; nan passes.  z, a of any shape."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.relu(z)

    @staticmethod
    def product(a: Tensor, v: Tensor) -> Tensor:
        """J v = v where a > 0, else 0."""
        return ReLUProduct.evaluate(a, v)


class ReLUProduct(Formula):
    r"""F2: J v = v where a > 0, else 0, also where v is not finite.

    Its derivative is 0 with respect to a and J with respect to v.
    """

    @staticmethod
    @accelerate_with(kernels.relu_product)
    def forward(a: Tensor, v: Tensor) -> Tensor:
        return torch.where(a <= 0, 0, v)  # in a's memory format

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, product: Tensor) -> None:
        save(ctx, inputs[0])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        (a,) = ctx.saved_tensors
        return None, ReLUProduct.apply(a, u)

    @staticmethod
    def tangent(ctx: Any, da: Tensor | None, dv: Tensor | None) -> Tensor:
        (a,) = ctx.saved_tensors
        return torch.zeros_like(a) if dv is None else ReLUProduct.apply(a, dv)


class ReLUInPlace(ReLU):
    r"""F2, overwriting its input; for reverse mode alone.

    In forward mode PyTorch checks with `is` that the in-place tensor kept its tangent; a transform
    replaces that object. Under transforms `relu_` works on a copy.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.relu_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, a: Tensor) -> None:
        ctx.options = ()
        ctx.mark_dirty(*inputs)
        ctx.save_for_backward(a)


def relu_(z: Tensor) -> Tensor:
    """Overwrites z with F2; works on a copy if a transform is active or a compiler traces."""
    if not torch.compiler.is_compiling() and _torch.is_functionalized():
        return z.relu_()  # PyTorch cannot differentiate a functionalized `copy_`
    if torch.compiler.is_compiling() or _torch.is_transformed():
        return z.copy_(ReLU.evaluate(z))
    return ReLUInPlace.apply(z)
