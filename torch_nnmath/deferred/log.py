"""The record of what happened to a head's logits, and the warning that they were materialised."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from typing import Any

import torch

from torch_nnmath import _check as check

_EXPONENTIALS = (
    "logits.logsumexp(-1).exp() is a sum of exponentials without logits, logits.softmax(-1) is not "
    "computed, and an entropy comes from functional.cross_entropy(logits, target, "
    "return_stats=True) or, with a gradient, functional.linear_log_probs(..., return_entropy=True)"
)
_KEPT = "drop logits before the step, or keep a reduction, such as logits.detach().mean()"
SPLIT_WEIGHT = "by a weight that is a DTensor"
FORWARD_HOOKS = "by forward hooks of the head"
FREED_WEIGHT = "by FSDP2, which frees the head's weight after the head's forward"
REMEDIES = {
    SPLIT_WEIGHT: "split the head by torch_nnmath.parallel.VocabularyParallel: "
    'parallelize_module(model, mesh, {"lm_head": VocabularyParallel()})',
    FREED_WEIGHT: "fully_shard(head, reshard_after_forward=False), or wrap it with the whole model",
    "exp": _EXPONENTIALS,
    "sub": "logits.log_softmax(-1) is not computed, logits - logits.logsumexp(-1, True) is",
    "_log_softmax_backward_data": "only gather of one class, nll_loss, divergences, sum and "
    "mean of log-probabilities have a gradient without logits",
    "a mixture in other terms than those of a Jensen-Shannon divergence": "add the terms of both "
    "halves (reduction='none'), then sum over the classes",
    "detach, whose result an optimizer's step would invalidate,": _KEPT,
    "use after the training step": _KEPT,
}  # by the reason why logits were computed, without its line of code


class MaterializedLogits(UserWarning):
    """The logits of a head were computed in training, so that no memory was saved."""


class HeadLog:
    """Counts what happened to a head's logits.

    Attributes:
        name: the head's name in the model; "" is the model itself.
        is_swapped: whether `swap` changed the head's class; False if it was this library's before.
        is_named: whether the user named the head, so that its logits are deferred at any size.
        fused: how many losses were computed without logits.
        reduced: how many other results, such as `argmax`, were computed from blocks of logits.
        materialized: how often logits were computed, by operation and line of code.
    """

    def __init__(self, name: str, *, is_swapped: bool = True, is_named: bool = False):
        self.name, self.is_swapped, self.is_named = name, is_swapped, is_named
        self.fused = self.reduced = 0
        self.materialized: Counter[str] = Counter()
        self.has_warned = False

    def __repr__(self) -> str:
        losses = f"{self.fused or 'no'} loss{'es' * (self.fused != 1)} without logits"
        lines = [f"head {self.name or '(root)'}: {losses} so far"]
        if self.reduced:
            lines.append(f"  computed {self.reduced} x from blocks of logits: argmax and the like")
        for reason, count in self.materialized.most_common():
            lines.append(f"  logits computed {count} x: {reason}")
            remedy = find_remedy(reason)
            if remedy is not None:
                lines.append(f"    {remedy}")
        return "\n".join(lines)

    def count_materialization(self, reason: str, *, is_training: bool = False) -> None:
        """Counts a materialisation by its reason. Warns at the first one in training."""
        if is_training and not self.has_warned:
            self.has_warned = True
            remedy = find_remedy(reason)
            hint = "" if remedy is None else f" ({remedy})"
            warnings.warn(
                f"the logits of head {self.name or '(root)'} were computed, and memory was not "
                f"saved: {reason}{hint}. The page Swap of the documentation (docs/swapping.md) "
                "lists remedies under 'Why was memory not saved?'; the report of swap() counts how "
                "often it happens. If another Linear computes the logits, pass its name: "
                "swap(model, head=NAME). With swap(model, head=None) no logits are deferred",
                MaterializedLogits,
                stacklevel=find_user_frame()[0],
            )
        self.materialized[reason] += 1


def find_remedy(reason: str) -> str | None:
    """Says what to do instead of the operation that computed logits; None if nothing is known."""
    return REMEDIES.get(reason.split(" at ")[0])


_LIBRARY_FOLDERS = tuple(
    os.path.dirname(str(module.__file__)) + os.sep for module in (torch, check)
)


def find_user_frame() -> tuple[int, str]:
    """Returns the nearest frame outside of PyTorch and this library: its level and its location.

    The level counts from the caller, as `stacklevel` of `warnings.warn` does.
    """
    frame: Any = sys._getframe(1)
    level = 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY_FOLDERS):
        frame, level = frame.f_back, level + 1
    code = frame.f_code
    return level, f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
