"""How an operator is registered with `torch.library`, and what the kernels share."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import disable_autocast
from torch_nnmath.kernels._flops import count_nothing, register_flop_formula
from torch_nnmath.kernels.dispatch import (
    CPU_FUNCTIONS,
    FAST_IF_SMALL,
    GPU_MODULES,
    GPU_ONLY,
    find_gpu_obstacle,
)

SLICE_SIZE = 2**18  # entries of a slice, which stays in the cache over several passes
SAFE_EXP = 1e20  # while Σ e^z < this and e^{z_y} > 1/this, float32 neither overflows nor underflows

GPU_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}  # by the operator's name

LIBRARY = torch.library.Library("torch_nnmath", "DEF")


def register_operator(
    signature: str,
    fake: Callable[..., Any],
    gpu_module: str | None = None,
    count_flops: Callable[..., int] = count_nothing,
    is_fast_if_small: bool = False,
) -> Callable[[Callable[..., Any]], Any]:
    """Registers the decorated function as `torch.ops.torch_nnmath.<name>`, for every device.

    `fake` gives the results' shapes and types. The operator runs below autograd and with autocast
    off, since autocast would round the products that are computed in float32. On a GPU the function
    of the same name in `kernels.gpu.<gpu_module>` runs instead, unless there is a GPU obstacle.
    `count_flops` is the formula of `torch.utils.flop_counter`.
    `is_fast_if_small` says whether the CPU is as fast with it as with the formula at any size.
    """
    name = signature.split("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        run = _disable_grad_and_autocast(function)

        @functools.wraps(function)
        def run_on_gpu(*args: Any) -> Any:
            if find_gpu_obstacle(name, args):
                return run(*args)
            return _load_gpu_function(name)(*args)

        CPU_FUNCTIONS[name] = function
        if is_fast_if_small:
            FAST_IF_SMALL.add(name)
        LIBRARY.define(signature)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        if gpu_module is not None:
            _register_on_gpu(name, run_on_gpu, gpu_module)
        torch.library.register_fake(f"torch_nnmath::{name}", fake, lib=LIBRARY)
        register_flop_formula(name, count_flops)
        return getattr(torch.ops.torch_nnmath, name).default

    return register


def register_gpu_operator(signature: str, fake: Callable[..., Any], gpu_module: str) -> Any:
    """Registers an operator that only GPUs have, since other devices compute the formula.

    As `register_operator`. Raises NotImplementedError if there is a GPU obstacle.
    """
    name = signature.split("(")[0]

    def run_on_gpu(*args: Any) -> Any:
        obstacle = find_gpu_obstacle(name, args)
        if obstacle is not None:
            raise NotImplementedError(f"{name} has no kernel here: {obstacle}")
        return _load_gpu_function(name)(*args)

    LIBRARY.define(signature)
    _register_on_gpu(name, run_on_gpu, gpu_module)
    GPU_ONLY.add(name)
    torch.library.register_fake(f"torch_nnmath::{name}", fake, lib=LIBRARY)
    register_flop_formula(name, count_nothing)
    return getattr(torch.ops.torch_nnmath, name).default


def _register_on_gpu(name: str, function: Callable[..., Any], gpu_module: str) -> None:
    LIBRARY.impl(name, function, "CUDA")
    GPU_IMPLEMENTATIONS[name], GPU_MODULES[name] = function, gpu_module


def _load_gpu_function(name: str) -> Callable[..., Any]:
    """The operator's function in its Triton module, which is imported at the first call."""
    module = importlib.import_module(f"torch_nnmath.kernels.gpu.{GPU_MODULES[name]}")
    return _disable_grad_and_autocast(getattr(module, name))


def _disable_grad_and_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which runs below autograd and with autocast off."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.no_grad(), disable_autocast(tensor):
            return function(*args)

    return run


def compute_log_probability(e_y: Tensor, s: Tensor) -> Tensor | None:
    """ln(e^{z_y} / Σ e^z) from e^{z_y} and s = Σ e^z; None unless both are in the safe range.

    In the safe range the quotient is as exact as after subtracting the maximum from z.
    """
    if not bool(((s < SAFE_EXP) & (e_y > 1 / SAFE_EXP)).all()):
        return None
    return (e_y.double() / s).log().to(e_y.dtype)
