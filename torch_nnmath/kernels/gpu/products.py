"""Matrix products with half-precision operands, accumulated in float32.

float32 operands obey PyTorch's precision settings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """out = A B, in the operands' type or in float32."""
    if A.dtype == out.dtype:
        return torch.mm(A, B, out=out)
    return torch.mm(A, B, out_dtype=out.dtype, out=out)


def add_product(out: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """out += A B, in the operands' type or in float32."""
    if len(out) == 1:  # cuBLASLt may reject an addmm with one row, which it reads as a bias
        product = torch.empty_like(out)
        return out.add_(multiply(A, B, product))
    if A.dtype == out.dtype:
        return torch.addmm(out, A, B, out=out)
    return torch.addmm(out, A, B, out_dtype=out.dtype, out=out)


def multiply_split(x: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """out = x B for float32 x and half B, as the sum of two products: x = high + low."""
    high = x.to(B.dtype)
    low = (x - high).to(B.dtype)
    return add_product(multiply(high, B, out), low, B)
