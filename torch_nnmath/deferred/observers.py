"""Functions that observe the gradient of deferred logits, or read their memory."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from torch_nnmath.deferred.log import find_user_frame
from torch_nnmath.deferred.logits import (
    DeferredLogits,
    call_with_plain_tensors,
    function_name,
    register_override,
)
from torch_nnmath.deferred.wrappers import is_fsdp_hook

HOOKS = (Tensor.register_hook, Tensor.retain_grad)
GET_GRAD_FN, GET_GRAD, GET_DATA = (
    getattr(Tensor, name).__get__ for name in ("grad_fn", "grad", "data")
)
SET_DATA = getattr(Tensor, "data").__set__  # noqa: B009 (mypy does not know it as a descriptor)
MEMORY_READERS = [
    getattr(Tensor, name)
    for name in (
        *("numpy", "tolist", "data_ptr", "storage", "untyped_storage", "_typed_storage"),
        *("share_memory_", "is_shared", "apply_", "map_", "__array__", "__dlpack__"),
        *("__deepcopy__", "__reduce_ex__", "__repr__", "__format__", "new_tensor"),
    )
]


@register_override(*HOOKS, GET_GRAD_FN)
def observe_gradient(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    """Records the observer; later losses are computed from materialised logits.

    A hook of FSDP2 is none: it does not use the gradient. A loss that bypasses the logits gets it.
    """
    if isinstance(logits, DeferredLogits):
        call, name = logits.recipe.call, function_name(func)
        if func is Tensor.register_hook and all(map(is_fsdp_hook, args)):
            call.wrapper_hooks.extend(args)
            return NotImplemented
        if call.has_fused_loss and func in HOOKS:
            raise RuntimeError(
                f"{name} on logits of head {call.log.name!r} after their loss was computed without "
                "them: no gradient will reach them. Call it before the loss, or "
                "swap(model, head=None)"
            )
        call.observer = call.observer or f"{name} of logits"
    return NotImplemented


@register_override(torch.autograd.grad)
def check_gradient_inputs(func: Any, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Raises RuntimeError for the gradient of logits that a fused loss has bypassed."""
    for x in inputs if isinstance(inputs, list | tuple) else [inputs]:
        if isinstance(x, DeferredLogits) and x.recipe.call.has_fused_loss:
            raise RuntimeError(
                f"the gradient of the logits of head {x.recipe.call.log.name!r} is needed, but "
                "their loss was computed without them: call logits.retain_grad() before the loss, "
                "or swap(model, head=None)"
            )
    return NotImplemented


@register_override(GET_GRAD)
def get_grad(func: Any, logits: Any) -> Any:
    """Warns that logits have no gradient. PyTorch warns too, but not after `backward(inputs=)`."""
    if not isinstance(logits, DeferredLogits) or not logits.recipe.call.has_fused_loss:
        return NotImplemented
    warnings.warn(
        f"the gradient of the logits of head {logits.recipe.call.log.name!r} is read, but their "
        "loss was computed without them: call logits.retain_grad() before the loss, or "
        "swap(model, head=None)",
        stacklevel=find_user_frame()[0],
    )
    return None


@register_override(Tensor.detach, torch.detach, GET_DATA)
def leave_graph(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    """Detaches logits. If they are alive at an optimizer's step, they are computed before it."""
    result = func(logits, *args, **kwargs)
    if isinstance(result, DeferredLogits):
        result.recipe.leave_graph()
    return result


@register_override(SET_DATA)
def refuse_setting_data(func: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("deferred logits have no memory to replace: use copy_()")


@register_override(*MEMORY_READERS)
def read_memory(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function that reads memory with materialised logits."""
    return call_with_plain_tensors(func, *args, **kwargs)
