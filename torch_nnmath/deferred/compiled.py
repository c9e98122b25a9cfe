"""What a head does while Dynamo traces its call. Importing this module imports Dynamo."""

from __future__ import annotations

import torch
from torch.nn import Module

from torch_nnmath.deferred.logits import linear
from torch_nnmath.deferred.mark import get_head_log

linear_between_graphs = torch.compiler.disable(linear)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_named_head(module: Module) -> bool:
    """Whether the user named the head, so that its logits are deferred at any size."""
    log = get_head_log(module)
    return log is not None and log.is_named


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def log_plain_logits(module: Module, reason: str) -> None:
    """Counts a graph that computes logits by rule. It runs when the graph is traced."""
    log = get_head_log(module)
    assert log is not None
    log.count_materialization(f"at each call of a compiled graph, {reason}")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def log_unbroken_graph(module: Module) -> None:
    """Counts a graph that computes logits. It runs when the graph is traced, not when it runs."""
    log = get_head_log(module)
    assert log is not None
    reason = "at each call of a compiled graph that may not break, as with fullgraph=True"
    log.count_materialization(reason, is_training=module.training and torch.is_grad_enabled())
