"""The type that arithmetic is done in: half precision in float32, rounded once; autocast's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """float32 for a half type, in which sums and products of several factors are taken."""
    return torch.float32 if dtype in HALF else dtype


def wide(x: Tensor) -> Tensor:
    """x in that type."""
    return x.float() if x.dtype in HALF else x


def number(x: Tensor) -> Tensor:
    """bool as integers, which can be subtracted."""
    return x.int() if x.dtype == torch.bool else x


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # there is none for meta


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where products taken in float32 stay so; for x's device."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def for_product(*tensors: Tensor | None) -> list[Any]:
    """Operands of a product: in autocast's type where it is on; float64 is left alone."""
    first = tensors[0]
    assert first is not None
    if not is_autocast(first):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]


def for_loss(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The loss's dtype and operands: under autocast what is half becomes float32."""
    first = tensors[0]
    assert first is not None
    if not is_autocast(first):
        return dtype, *tensors
    return wide_type(dtype), *(x if x is None else wide(x) for x in tensors)
