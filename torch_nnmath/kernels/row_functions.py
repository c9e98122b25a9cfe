"""Operators of one number for each row of logits and of its gradient, which only GPUs have.

Shapes are those of the formulas. `c` is computed in float32 for half types if `needs_c`, and dc
times the gradient, rounded once, if dc is given; dc has one value for each row, or shape ().
"""

from __future__ import annotations

import torch

from torch_nnmath.kernels._library import register_gpu_operator
from torch_nnmath.kernels.cross_entropy import allocate_value_and_gradient

log_sum_exp = register_gpu_operator(
    "log_sum_exp(Tensor? dc, Tensor z, int dim, bool needs_c) -> (Tensor, Tensor)",
    lambda dc, z, dim, needs_c: allocate_value_and_gradient(dc, z, dim, needs_c),
    "triton_rows",
)
z_loss = register_gpu_operator(  # F20
    "z_loss(Tensor? dc, Tensor z, int dim, bool needs_c) -> (Tensor, Tensor)",
    lambda dc, z, dim, needs_c: allocate_value_and_gradient(dc, z, dim, needs_c),
    "triton_rows",
)
entropy = register_gpu_operator(  # F21
    "entropy(Tensor? dc, Tensor z, int dim, float base, bool needs_c) -> (Tensor, Tensor)",
    lambda dc, z, dim, base, needs_c: allocate_value_and_gradient(dc, z, dim, needs_c),
    "triton_rows",
)
# v - e^l Σ v, the backward of l = ln softmax
log_softmax_product = register_gpu_operator(
    "log_softmax_product(Tensor l, Tensor v, int dim) -> Tensor",
    lambda l, v, dim: torch.empty_like(v, memory_format=torch.contiguous_format),
    "triton_softmax",
)
