"""The operators' library and how an operator is registered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("torch_nnmath", "DEF")


def operator(signature: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function under `torch.ops.torch_nnmath`, for every device, with its fake.

    Autocast, which would narrow the products taken in float32, is off inside.
    """
    name = signature.split("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def without_autocast(*args: Any) -> Any:
            device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
            if not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):
                return function(*args)

        LIBRARY.define(signature)
        LIBRARY.impl(name, without_autocast, "CompositeExplicitAutograd")
        torch.library.register_fake(f"torch_nnmath::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.torch_nnmath, name).default

    return register
