"""When a kernel computes what is written: where only numbers come of it, on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Kernel:
    """A loss's operator, `(dc or None, *inputs, wants_c) -> (c, gradient in the first input)`."""

    def __init__(self, both: Callable[..., Any]):
        self.both = both
        self.value = lambda *inputs: both(None, *inputs, True)[0]  # no methods: Dynamo meets them
        self.gradient = lambda dc, *inputs: both(dc, *inputs, False)[1]


def fast(kernel: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Has the kernel compute what is written, on the CPU, where nothing looks inside.

    Few entries are not worth it: one thread has them in its cache. Grad mode off does not tell that
    nothing looks: forward over reverse has it off too. A transform, a level of forward mode, a mode
    that dispatches, a tracer and a subclass of Tensor see the written operations; so does a
    compiler, which fuses them itself.
    """

    def choose(written: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(written)
        def chosen(*args: Any) -> Any:
            return (kernel if is_unseen(args) else written)(*args)

        return chosen

    return choose


PLAIN = (Tensor, torch.nn.Parameter)
FEW = 2**15  # entries, which PyTorch gives to one thread


def is_unseen(args: Any) -> bool:
    """Whether only numbers come of an operation on these, whatever it does inside."""
    return not torch.is_grad_enabled() and are_many_numbers(args)


def are_many_numbers(args: Any) -> bool:
    """Whether the tensors are numbers and enough for a kernel."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    sizes = [x.numel() for x in tensors]
    return min(sizes) > 0 and max(sizes) > FEW and are_numbers(*tensors)


def are_numbers(*tensors: Tensor) -> bool:
    """Whether these are numbers in the CPU's memory, which nothing watches, traces or batches."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return all(type(x) in PLAIN and x.device.type == "cpu" and not is_batch(x) for x in tensors)


def is_batch(x: Tensor) -> bool:
    """Whether `is_grads_batched` or `vectorize` of PyTorch's autograd batches x."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))  # nothing public tells


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward mode is active."""
    # nothing public tells either; the first is what `Function.apply` itself asks
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
