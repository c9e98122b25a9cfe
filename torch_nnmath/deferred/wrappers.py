"""Wrappers of `torch.distributed`: when a head under them can defer its logits, and their hooks.

FSDP2 gathers the weight before the forward of the module that it wraps, the head or one around it.
A hook of that module's results gathers it before the backward. In between the weight is freed,
unless `reshard_after_forward` is False, as by default for the outermost module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import Module

from torch_nnmath import _torch
from torch_nnmath.deferred.log import FORWARD_HOOKS, FREED_WEIGHT
from torch_nnmath.kernels.dispatch import PLAIN_TYPES, has_dtensor

Hook: TypeAlias = Callable[[Tensor], Any]


def find_features(
    input: Tensor, weight: Tensor, bias: Tensor | None, module: Module
) -> Tensor | None:
    """Returns the features as a plain tensor; None if the logits cannot be one without memory."""
    if has_dtensor(weight):
        from torch_nnmath.deferred import split

        return split.take_features(input, weight, bias, module)
    tensors = [x for x in (input, weight, bias) if x is not None]
    are_plain = all(type(x) in PLAIN_TYPES and not x.is_meta for x in tensors)
    return input if are_plain else None


def find_reader(module: Module) -> str | None:
    """Returns what needs the logits as soon as the head's forward ends; None if nothing does."""
    hooks = _torch.list_forward_hooks(module)
    own_module = f"{__package__}.split"  # by name, since its import needs DTensors
    if not all(is_fsdp_hook(hook) or hook.__module__ == own_module for hook in hooks):
        return FORWARD_HOOKS
    is_wrapped = any(map(is_fsdp_hook, hooks))
    return FREED_WEIGHT if is_wrapped and _torch.frees_parameters(module) else None


def is_fsdp_hook(hook: Any) -> bool:
    """Whether FSDP2 registered the hook, which returns what it gets."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp.")


def move_hooks(hooks: Sequence[Hook], result: Any) -> None:
    """Registers hooks of logits with the loss that bypasses them."""
    loss = result if isinstance(result, Tensor) else result[0]  # statistics have no gradient
    if loss.requires_grad:
        for hook in hooks:
            loss.register_hook(hook)
