"""The operators' library and how an operator is registered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import without_autocast

LIBRARY = torch.library.Library("torch_nnmath", "DEF")


def operator(signature: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function under `torch.ops.torch_nnmath`, for every device, with its fake.

    Autocast, which would narrow the products taken in float32, is off inside.
    """
    name = signature.split("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def as_it_is(*args: Any) -> Any:
            with without_autocast(next(arg for arg in args if isinstance(arg, Tensor))):
                return function(*args)

        LIBRARY.define(signature)
        LIBRARY.impl(name, as_it_is, "CompositeExplicitAutograd")
        torch.library.register_fake(f"torch_nnmath::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.torch_nnmath, name).default

    return register
