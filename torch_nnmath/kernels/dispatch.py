"""When a kernel may stand in for a formula as it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
MIN_KERNEL_SIZE = 2**15  # entries; up to this PyTorch uses one thread, and no kernel is faster


class LossKernel:
    """The operator of a loss: `operator(dc, *inputs, needs_c)` gives c and dc times the gradient.

    The gradient is that of the first input. If `dc` is None, there is no gradient.
    """

    def __init__(self, operator: Callable[..., Any]):
        self.value_and_gradient = operator
        # lambdas, since Dynamo does not trace bound methods here
        self.value = lambda *inputs: operator(None, *inputs, True)[0]
        self.gradient = lambda dc, *inputs: operator(dc, *inputs, False)[1]


def accelerate_with(kernel: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Runs `kernel` in place of the decorated formula where that cannot be observed.

    A transform, a level of forward mode, a dispatch mode, a tracer, a compiler and a tensor
    subclass get the formula as it is written.
    """

    def decorate(formula: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(formula)
        def kernel_or_formula(*args: Any) -> Any:
            return (kernel if may_use_kernel(args) else formula)(*args)

        return kernel_or_formula

    return decorate


def may_use_kernel(args: Any) -> bool:
    """Whether nothing can differentiate, trace or batch through the operation on `args`.

    Disabled grad mode alone does not prove it: forward over reverse disables it, too.
    """
    return not torch.is_grad_enabled() and are_large_plain_cpu_tensors(args)


def are_large_plain_cpu_tensors(args: Any) -> bool:
    """Whether the tensors among `args` are plain and large enough for a kernel."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    sizes = [x.numel() for x in tensors]
    return min(sizes) > 0 and max(sizes) > MIN_KERNEL_SIZE and are_plain_cpu_tensors(*tensors)


def are_plain_cpu_tensors(*tensors: Tensor) -> bool:
    """Whether the tensors have values in the CPU's memory, and nothing traces or batches them."""
    if torch.compiler.is_compiling() or _torch.is_transformed():
        return False
    if _torch.has_dispatch_mode() or _torch.is_jit_tracing():
        return False
    return all(
        type(x) in PLAIN_TYPES and x.device.type == "cpu" and not _torch.is_legacy_batch(x)
        for x in tensors
    )
