"""Hooks of optimizers, which change the operands of deferred logits."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torch_nnmath.kernels.dispatch import has_dtensor

Call: TypeAlias = Any  # of `recipes`, which imports this module
LIVE_CALLS: weakref.WeakSet[Call] = weakref.WeakSet()


@functools.cache
def track_optimizers() -> None:
    """Registers hooks of the steps of all optimizers.

    Before a step that changes a head's operands, logits that left the graph are computed. After it
    the operands' versions are incremented, since fused optimizers do not do this.
    """
    register_optimizer_step_pre_hook(_compute_logits_before_step)
    register_optimizer_step_post_hook(_increment_versions)


def compute_logits_before_update(
    optimizer: Optimizer, reason: str, is_kept: Callable[[Call], bool]
) -> None:
    """Computes the logits of those live calls whose operands the optimizer will change.

    If FSDP2 has freed a weight, logits cannot be computed any more; reading them raises.
    """
    for call, parameters in _find_calls(optimizer):
        if parameters and is_kept(call) and not call.has_freed_operand():
            call.materialize(reason)


def _find_calls(optimizer: Optimizer) -> Iterator[tuple[Call, list[Any]]]:
    """Yields each live call, with those of its operands that the optimizer changes.

    Under FSDP2 the optimizer has the sharded parameters, and a call has those gathered from them,
    whose versions FSDP2 preserves. Nothing public links the two: they are matched by shape.
    """
    if not LIVE_CALLS:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ids, shapes = {*map(id, parameters)}, {p.shape for p in parameters if has_dtensor(p)}
    for call in [*LIVE_CALLS]:
        yield (
            call,
            [
                x
                for x, _, shape in call.versions
                if id(x) in ids or (isinstance(x, Parameter) and shape in shapes)
            ],
        )


def _compute_logits_before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    def compute_logits() -> None:
        reason = "detach, whose result an optimizer's step would invalidate,"
        compute_logits_before_update(optimizer, reason, lambda call: call.has_left_graph())

    def compute_logits_after(closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure runs within the step: what it detaches is computed when it ends."""

        @functools.wraps(closure)
        def run() -> Any:
            result = closure()
            compute_logits()
            return result

        return run

    compute_logits()
    first, *others = args
    args = (first, *(compute_logits_after(v) if callable(v) else v for v in others))
    if callable(kwargs.get("closure")):
        kwargs = kwargs | {"closure": compute_logits_after(kwargs["closure"])}
    return args, kwargs


def _increment_versions(optimizer: Optimizer, *_: Any) -> None:
    parameters = [x for _, parameters in _find_calls(optimizer) for x in parameters]
    torch.autograd.graph.increment_version(parameters)
