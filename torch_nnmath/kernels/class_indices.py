"""Checks class indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath._precision import cast
from torch_nnmath.kernels._library import LIBRARY, register_operator
from torch_nnmath.kernels.dispatch import are_plain_cpu_tensors


def _fake(target: Tensor, classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(target, dtype=torch.int64), torch.empty_like(target, dtype=torch.bool)


@register_operator(
    "class_indices(Tensor target, SymInt classes, int? ignore_index) -> (Tensor, Tensor)", _fake
)
def class_indices(target: Tensor, classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Returns (y, keep): the class indices, 0 where ignored; and which rows are not ignored.

    Raises an IndexError for an index outside [0, classes). On a GPU the device asserts instead,
    without a synchronisation. It is an operator so that compiled graphs run the check.
    """
    y = target.to(torch.int64)
    keep = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
    y = y.masked_fill(~keep, 0)
    if not y.numel():
        return y, keep
    low, high = y.aminmax()
    is_inside = (low >= 0) & (high < classes)
    if target.device.type == "cuda":
        _torch.assert_async(is_inside, f"a class index is not in [0, {classes})")
    elif not is_inside:
        bad_index = y[(y < 0) | (y >= classes)][0].item()
        exception = "" if ignore_index is None else f" or equal ignore_index={ignore_index}"
        raise IndexError(
            f"Target {bad_index} is out of bounds: class indices must lie in [0, {classes})"
            f"{exception}"
        )
    return y, keep


def read_kept_indices(target: Tensor, classes: int, ignore_index: int) -> Tensor | None:
    """The class indices as int64 if all are in [0, classes) and none is ignored.

    None if one is not, or if they cannot be read. One pass over the values takes the place of the
    operator's several.
    """
    if not are_plain_cpu_tensors(target):
        return None
    return read_plain_indices(target, classes, ignore_index)


def read_plain_indices(target: Tensor, classes: int, ignore_index: int) -> Tensor | None:
    """As `read_kept_indices`, of a plain tensor on the CPU."""
    if not target.numel():
        return None
    minimum, maximum = target.aminmax()
    low, high = minimum.item(), maximum.item()
    if low < 0 or high >= classes or low <= ignore_index <= high:
        return None
    return target.clone() if target.is_inference() else cast(target, torch.int64)


def _vmap(info: Any, in_dims: Any, target: Tensor, classes: int, ignore_index: int | None) -> Any:
    return class_indices(target, classes, ignore_index), (in_dims[0], in_dims[0])


torch.library.register_vmap("torch_nnmath::class_indices", _vmap, lib=LIBRARY)
