"""A function in float64 with rounding errors, which shows where rounding decides the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath.testing._functions import is_real_tensor


def add_rounding(function: Callable[..., Any], eps: float, seed: int) -> Callable[..., Any]:
    """Returns the function whose inputs and operations have relative errors of up to eps.

    The errors are the same at each call, so that the function can be differentiated.
    """

    def call(*inputs: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def draw_factors(x: Tensor) -> Tensor:
            random = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            return (1 + eps * (2 * random - 1)).to(x.device, x.dtype)

        def round_in_place(y: Tensor) -> None:
            if is_real_tensor(y):
                y.mul_(draw_factors(y))

        rounded = [x * draw_factors(x) if is_real_tensor(x) else x for x in inputs]
        with _torch.ResultHook(round_in_place):
            return function(*rounded)

    return call
