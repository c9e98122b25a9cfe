"""Multiplies gradients that the forward computed by the upstream gradient, in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath.kernels.dispatch import (
    are_plain_cpu_tensors,
    are_plain_tensors,
    find_triton_obstacle,
)


def may_scale(dC: Tensor) -> bool:
    """Whether gradients for dC = 1 may be multiplied by dC.

    On the CPU an infinite dC goes to the kernel, which masks the ignored rows. Elsewhere reading
    dC would synchronise, and `scale_gradient_` masks them. Batched and transformed values must not
    be multiplied.
    """
    if are_plain_cpu_tensors(dC):
        return math.isfinite(dC.item())
    return not (_torch.is_transformed() or _torch.is_legacy_batch(dC))


def may_scale_in_place(dC: Tensor, keep: Tensor | None) -> bool:
    """As `may_scale`, for a gradient that is to be overwritten, and whose rows `keep` masks."""
    if not are_plain_tensors(dC):
        return False
    return keep is None or not dC.is_cpu or math.isfinite(dC.item())


def scale_gradient_(gradient: Tensor, dC: Tensor, keep: Tensor | None = None) -> Tensor:
    """dC times the gradient; 0 where keep, which broadcasts, is False.

    Overwrites the gradient, unless something traces or observes dC. A dC of 1 costs no pass over
    the gradient, on a GPU if Triton is installed.
    """
    if are_plain_tensors(dC):
        return scale_plain_gradient_(gradient, dC, keep)
    return gradient * dC if keep is None else torch.where(keep, gradient * dC, 0)


def scale_plain_gradient_(gradient: Tensor, dC: Tensor, keep: Tensor | None) -> Tensor:
    """As `scale_gradient_`, where dC is plain."""
    if dC.is_cpu:
        return gradient if dC.item() == 1 else gradient.mul_(dC)
    is_per_row = keep is None or keep.numel() == 1 or keep.shape == (*gradient.shape[:-1], 1)
    is_rows = is_per_row and gradient.is_contiguous()
    if is_rows and find_triton_obstacle([gradient]) is None:
        from torch_nnmath.kernels.gpu import triton_elementwise

        rows = gradient.view(-1, gradient.shape[-1]) if gradient.dim() else gradient.view(1, 1)
        triton_elementwise.scale_(rows, dC, keep if keep is None else keep.view(-1, 1))
        return gradient
    gradient.mul_(dC)
    return gradient if keep is None else gradient.masked_fill_(~keep, 0)
