"""A head whose classes a device mesh splits, with logits that are plain tensors of all classes.

`parallel.VocabularyParallel` gives a Linear's weight the placement `Shard(0)`, and the Linear the
forward hook `give_plain_logits`. All ranks have all features. Imported only where DTensors exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Module

from torch_nnmath import _torch
from torch_nnmath._precision import widen
from torch_nnmath._sharding import Sharding, read_layout
from torch_nnmath.formulas.affine import compute_affine_gradients
from torch_nnmath.formulas.transfer import copy_to_ranks, gather_from_ranks, sum_over_ranks


def make_sharding(weight: Any, batch: Sequence[int]) -> Sharding:
    """The split of this weight's classes, for features and results that are plain tensors."""
    mesh, rows = weight.device_mesh, (Replicate(),)
    return Sharding(mesh, 0, rows, (*batch,), len(weight), gives_dtensors=False)


def take_features(input: Tensor, weight: Any, bias: Any, module: Module) -> Tensor | None:
    """The features as a plain tensor; None if the head's caller expects a DTensor."""
    if give_plain_logits not in _torch.list_forward_hooks(module):
        return None
    parameters = [x for x in (weight, bias) if x is not None]
    if any(not isinstance(x, DTensor) or x.placements != (Shard(0),) for x in parameters):
        return None
    return make_sharding(weight, input.shape[:-1]).take_rows("input", input)


def give_plain_logits(module: Module, inputs: Any, logits: Tensor) -> Tensor:
    """A forward hook: gathers logits that are a DTensor. Deferred logits are plain already."""
    del module, inputs
    layout = read_layout("logits", logits)
    if layout is None:
        return logits
    *batch, classes = logits.shape
    sharding = Sharding(layout.mesh, 0, (Replicate(),), (*batch,), classes, len(batch))
    return _gather_classes(sharding, sharding.take_logits("logits", logits))


def compute_logits(x: Tensor, W: Any, b: Any) -> Tensor:
    """F1 of this rank's classes, gathered. It has no derivative."""
    sharding = make_sharding(W, x.shape[:-1])
    W, b = (v if v is None else sharding.take_weight("linear_weight", v) for v in (W, b))
    return _gather_classes(sharding, torch.nn.functional.linear(x, W, b))


def compute_gradients(
    sharding: Sharding, dz: Tensor, x: Any, W: Any, b_shape: Any, needs_gradient: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """F8 of this rank's classes: dX, which all ranks get, and dW and db, which are DTensors."""
    dtype, group = dz.dtype, _get_group(sharding)
    dz = sharding.select_classes(dz.movedim(-1, 0)).movedim(0, -1)
    x = None if x is None else copy_to_ranks(x, group)
    W = None if W is None else widen(sharding.take_weight("linear_weight", W))
    dx, *of_classes = compute_affine_gradients(dz, x, W, dz.shape[-1:], needs_gradient)
    dx = None if dx is None else sum_over_ranks(dx, group).to(dtype)
    dW, db = (None if v is None else sharding.give_weight(v.to(dtype)) for v in of_classes)
    return dx, dW, db


def _gather_classes(sharding: Sharding, logits: Tensor) -> Tensor:
    """The logits of all classes."""
    classes, group = sharding.classes, _get_group(sharding)
    return gather_from_ranks(logits, -1, classes, group, is_summed=False)


def _get_group(sharding: Sharding) -> str:
    assert sharding.shard is not None
    return sharding.shard.group
