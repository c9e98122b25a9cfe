"""The operators' library and how an operator is registered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import without_autocast

SLICE = 2**18  # entries that are gone through at a time, so that they stay in the cache
MOST = 1e20  # of a sum of e^z, and 1 / MOST of e^{z_y}: far from what float32 cannot hold

LIBRARY = torch.library.Library("torch_nnmath", "DEF")


def operator(signature: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function under `torch.ops.torch_nnmath`, for every device, with its fake.

    Nothing inside is differentiated. Autocast, which would narrow products in float32, is off.
    """
    name = signature.split("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def as_it_is(*args: Any) -> Any:
            tensor = next(arg for arg in args if isinstance(arg, Tensor))
            with torch.no_grad(), without_autocast(tensor):
                return function(*args)

        LIBRARY.define(signature)
        LIBRARY.impl(name, as_it_is, "CompositeExplicitAutograd")
        torch.library.register_fake(f"torch_nnmath::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.torch_nnmath, name).default

    return register


def log_of_share(e_y: Tensor, s: Tensor) -> Tensor | None:
    """ln(e^{z_y} / Σ e^z), or None unless both are far from what float32 cannot hold.

    Then it is as good as from z less its maximum: a quotient of e^z has lost nothing.
    """
    if not bool(((s < MOST) & (e_y > 1 / MOST)).all()):
        return None
    return (e_y.double() / s).log().to(e_y.dtype)


def exact(t: Tensor, v: Tensor) -> Tensor:
    """t v, and 0 where t is 0 and v infinite; differentiable, for the formulas use it too."""
    return t * v.masked_fill((t == 0) & v.isinf(), 0)
