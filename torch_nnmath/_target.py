"""Public target arguments -> the target of the formulas (`Target`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath import _check as check
from torch_nnmath import formulas, kernels
from torch_nnmath._precision import get_constant, is_autocast, wide_type, widen
from torch_nnmath._records import Target
from torch_nnmath.kernels.dispatch import are_plain_cpu_tensors

if TYPE_CHECKING:
    from torch_nnmath._sharding import Sharding


class TargetOptions(NamedTuple):
    """Options of a target: its weights and how it is interpreted."""

    weight: Tensor | None = None  # (C)
    ignore_index: int | None = None  # None is -100
    label_smoothing: float = 0.0
    row_weight: Tensor | None = None  # in the shape of class indices
    sharding: Sharding | None = None  # where ranks share the classes; the weight has all of them
    divisor: Any = None  # of a mean, a number or a tensor of shape (); None is the total weight


class IndexTarget(NamedTuple):
    """Class indices, checked and converted."""

    y: Tensor  # 0 in ignored rows
    keep: Tensor | None  # None if it is known that no row is ignored
    p: Tensor  # weight of the class; () if it is known that all rows have the same
    smoothing: Tensor | None  # weight of this rank's classes from label smoothing; None without
    row_weight: Tensor | None  # 0 in ignored rows
    total_weight: Tensor | int  # the divisor of a mean

    def make_target(self, y: Tensor, p: Tensor, dim: int, rank: int) -> Target:
        """Returns the `Target` of y and p, which have `rank` axes, with the classes at `dim`."""
        t = self.smoothing
        if t is not None:
            t = t.view([-1 if d == dim else 1 for d in range(rank)])
        return Target(y, p, t, dim)


def read_indices(target: Tensor, C: int, options: TargetOptions, dtype: torch.dtype) -> IndexTarget:
    """Checks and converts class indices for logits of `dtype`: the target is p e_y + smoothing."""
    weight, ignore_index, label_smoothing, _, sharding, _ = options
    check.class_weight(weight, C)
    weight_dtypes = (dtype, wide_type(dtype))
    if weight is not None and weight.dtype not in weight_dtypes and not is_autocast(target):
        raise RuntimeError(f"weight must have input's dtype {dtype}, got {weight.dtype}")
    ignore_index = -100 if ignore_index is None else ignore_index
    dtype, keep = wide_type(dtype), None
    y = kernels.read_kept_indices(target, C, ignore_index)
    if y is None:
        y, keep = kernels.class_indices(target, C, ignore_index)
        # only on the CPU: reading the value would synchronise a GPU
        if are_plain_cpu_tensors(keep) and bool(keep.all()):
            keep = None
    r = read_row_weight(options, target.shape, keep, dtype)
    total_weight: Any = y.numel() if r is None else r.sum()
    if weight is not None:
        w = weight.to(dtype)
        p = w[y] if keep is None else w[y].masked_fill(~keep, 0)
        total_weight = (p if r is None else p * r).sum()
    elif keep is not None:
        p = keep.to(dtype)
        total_weight = p.sum() if r is None else total_weight
    else:
        p = get_constant(1.0, dtype)
    smoothing = None
    if label_smoothing:
        w = torch.ones((C,), dtype=dtype, device=target.device) if weight is None else w
        p, smoothing = (1 - label_smoothing) * p, label_smoothing / max(C, 1) * w
        smoothing = smoothing if sharding is None else sharding.select_classes(smoothing)
    return IndexTarget(y, keep, p, smoothing, r, total_weight)


def read_row_weight(
    options: TargetOptions, rows: Sequence[int], keep: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Checks the weights of rows of this shape; returns them in a wide type, 0 where ignored."""
    r = options.row_weight
    if r is None:
        return None
    check.row_weight(r, rows, dtype)
    return formulas.mask_ignored(keep, r.to(dtype))


def read_probabilities(
    target: Tensor, options: TargetOptions, dim: int, C: int, dtype: torch.dtype
) -> tuple[Tensor, torch.dtype]:
    """Returns probabilities, smoothed and weighted, and the loss's dtype. Classes are at `dim`."""
    weight, _, label_smoothing, _, sharding, _ = options
    check.class_weight(weight, C)
    dtype = torch.promote_types(dtype, target.dtype)
    t = widen(target)
    if label_smoothing:
        t = t * (1 - label_smoothing) + label_smoothing / max(C, 1)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
        w = widen(weight) if sharding is None else sharding.select_classes(widen(weight))
        w = w.view(-1, *[1] * (t.dim() - 1 - dim))
        t = formulas.WeightedTarget.evaluate(t, w)
    return t, dtype
