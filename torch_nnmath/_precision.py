"""Types of arithmetic: half types are computed in float32 and rounded once; autocast's rules."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums and products of `dtype` are computed in: float32 for a half type."""
    return torch.float32 if dtype in HALF else dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another type; a call of `to` that changes nothing takes half a µs."""
    return x if x.dtype == dtype else x.to(dtype)


def widen(x: Tensor) -> Tensor:
    """Casts x to `wide_type` of its dtype."""
    return x.float() if x.dtype in HALF else x


def bool_to_int(x: Tensor) -> Tensor:
    """Casts bool to int, since bool cannot be subtracted."""
    return x.int() if x.dtype == torch.bool else x


def drop_infinite(t: Tensor, v: Tensor) -> Tensor:
    """v, but 0 where t is 0 and v infinite."""
    return v.masked_fill((t == 0) & v.isinf(), 0)


def zero_safe_product(t: Tensor, v: Tensor) -> Tensor:
    """t v, but 0 where t is 0 and v infinite; differentiable."""
    return t * drop_infinite(t, v)


def weigh(r: Tensor | None, c: Tensor) -> Tensor:
    """r c, one weight for each row; a weight of 0 gives 0, also if the loss is infinite."""
    return c if r is None else zero_safe_product(r, c)


def multiply(x: Tensor, factor: float) -> Tensor:
    """x times a number; the tangent has x's type.

    The tangent of PyTorch's product of a tensor () with a Python float is float64.
    """
    return x * factor if x.dim() or not x.is_floating_point() else x * make_scalar(factor, x)


def make_scalar(n: Tensor | float, like: Tensor) -> Tensor:
    """n as a tensor () of `like`'s type and device, without waiting for the device."""
    if isinstance(n, Tensor):
        return n.to(like)
    return torch.full((), n, dtype=like.dtype, device=like.device)


@functools.cache
def get_constant(number: float, dtype: torch.dtype) -> Tensor:
    """The number as a tensor () on the CPU that all calls share: it must not be written to."""
    with torch.inference_mode(False):
        return torch.full((), number, dtype=dtype)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = "cpu" if x.is_cpu else x.device.type  # which takes a quarter µs
    return device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast


def disable_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off for x's device, so that products in float32 stay in float32."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def cast_for_product(*tensors: Tensor | None) -> list[Any]:
    """Casts operands of a product to autocast's dtype where autocast is on; float64 stays."""
    first = tensors[0]
    assert first is not None
    if not is_autocast(first):
        return list(tensors)
    return [x if x is None else x.to(get_product_dtype(x)) for x in tensors]


def get_product_dtype(x: Tensor) -> torch.dtype:
    """The type of x as operand of a product: autocast's where autocast is on; float64 stays."""
    if not is_autocast(x) or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def find_weight_dtype(weight: Tensor) -> torch.dtype | None:
    """The type to which autocast rounds a weight; None if it stays as it is."""
    dtype = get_product_dtype(weight)
    return None if dtype == weight.dtype else dtype


def cast_for_loss(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Returns the loss's dtype and operands; under autocast, half types become float32."""
    first = tensors[0]
    assert first is not None
    if not is_autocast(first):
        return dtype, *tensors
    return wide_type(dtype), *(x if x is None else widen(x) for x in tensors)
