"""Public arguments of cross entropy on a DTensor of logits -> losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from torch_nnmath import _check as check
from torch_nnmath import formulas
from torch_nnmath._logits import LogitOptions, LossStats, make_stats, scale_logits
from torch_nnmath._precision import cast, cast_for_loss, multiply, weigh, widen
from torch_nnmath._records import Target
from torch_nnmath._reduction import choose_divisor, count_kept, read_divisor
from torch_nnmath._sharding import Sharding, read_layout
from torch_nnmath._target import (
    TargetOptions,
    read_indices,
    read_probabilities,
    read_row_weight,
)
from torch_nnmath.formulas.split_softmax import compute_split_entropy, compute_split_rows


def compute_split_cross_entropy(
    input: Tensor,
    target: Tensor,
    target_options: TargetOptions,
    logit_options: LogitOptions,
    reduction: str,
    z_loss: float,
    return_stats: bool,
    output_dtype: torch.dtype | None,
) -> Any:
    """As `compute_cross_entropy`, for logits whose classes or rows a device mesh splits."""
    check.finite("z_loss", z_loss)
    check.output_dtype(output_dtype)
    check.smoothing(target_options.label_smoothing)
    base, logit_scale, softcap = logit_options
    input_dtype, sharding = input.dtype, _read_sharding(input)
    dtype, input, target, weight = cast_for_loss(input_dtype, input, target, target_options.weight)
    if weight is not None:
        weight = sharding.take_replicated("weight", weight, is_of_classes=False)
    row_weight = target_options.row_weight
    if row_weight is not None:
        row_weight = sharding.take_rows("row_weight", row_weight)
    options = target_options._replace(weight=weight, row_weight=row_weight, sharding=sharding)
    is_distribution = input.shape == target.shape
    z = widen(sharding.take_logits("input", input))
    keep, C, rows = None, sharding.classes, math.prod(z.shape[:-1])
    if is_distribution:
        check.probabilities(target, -100 if options.ignore_index is None else options.ignore_index)
        t = sharding.take_logits("target", target)
        t, dtype = read_probabilities(t, options, t.dim() - 1, C, dtype)
        read_target = Target(None, None, t, -1)
        r = read_row_weight(options, t.shape[:-1], None, z.dtype)
        total_weight: Any = count_kept(None, rows, r)
        label = sharding.argmax(t, -1)
    else:
        check.indices(input.shape, target)
        target = sharding.take_rows("target", target)
        sharding.check_indices(target, options.ignore_index)
        indices = read_indices(target, C, options, input_dtype)
        label, total_weight, r = indices.y, indices.total_weight, indices.row_weight
        p = indices.p.unsqueeze(-1) if indices.p.dim() else indices.p
        keep = None if indices.keep is None else indices.keep.unsqueeze(-1)
        read_target = Target(label.unsqueeze(-1), p, indices.smoothing, -1)
    if isinstance(logit_scale, Tensor):
        logit_scale = sharding.take_replicated("logit_scale", logit_scale, is_of_classes=True)
    z = scale_logits(formulas.mask_ignored(keep, z), logit_scale)
    z = z if softcap is None else formulas.SoftCap.evaluate(z, softcap)
    c, lse = compute_split_rows(z, read_target, keep, base, sharding.shard)
    c, q = c.squeeze(-1), lse.squeeze(-1).square()
    if reduction == "none":
        c = c + multiply(q, z_loss) if z_loss else c
        loss = sharding.give_rows(cast(weigh(r, c), output_dtype or dtype))
    else:
        zero = z.new_zeros(())
        divisor = options.divisor
        if isinstance(divisor, Tensor):
            divisor = sharding.take_replicated("divisor", divisor, is_of_classes=False)
        divisor = read_divisor(divisor, reduction, z)
        counts: Any = divisor, divisor
        if divisor is None:
            counts = total_weight, count_kept(keep, rows, r)
            counts = [sharding.sum_over_rows(v, zero) for v in counts]
        n, kept = (choose_divisor(reduction, v, z) for v in counts)
        loss = formulas.Cost.evaluate(c, n, r)
        if z_loss:
            loss = loss + multiply(formulas.Cost.evaluate(q, kept, r), z_loss)
        loss = cast(sharding.give_total(loss), output_dtype or dtype)
    if not return_stats:
        return loss
    shard = sharding.shard
    constant = formulas.mask_ignored(keep, z.detach())
    entropy = compute_split_entropy(constant, base, None if shard is None else shard.group)
    entropy = formulas.mask_ignored(keep, entropy).squeeze(-1)
    predicted = sharding.argmax(constant, -1)
    if keep is not None:
        predicted = predicted.masked_fill(~keep.squeeze(-1), -1)
    stats = make_stats(lse.squeeze(-1), entropy, predicted, label, z_loss)
    return loss, LossStats(*map(sharding.give_rows, stats))


def _read_sharding(input: Tensor) -> Sharding:
    """How logits (C), (N, C) or (N, C, d_1, ..., d_K) are split."""
    layout = read_layout("input", input)
    assert layout is not None
    class_axis = 0 if input.dim() == 1 else 1
    C = input.size(class_axis)  # an IndexError if there is no axis
    if not input.is_floating_point():
        raise NotImplementedError(f"cross_entropy does not support {input.dtype}: cast the logits")
    batch = [size for axis, size in enumerate(input.shape) if axis != class_axis]
    class_dim: int | None = None
    rows: list[Placement] = []
    for i, place in enumerate(layout.placements):
        rows.append(Replicate())
        if place.is_replicate():
            continue
        if type(place) is not Shard or (place.dim == class_axis and class_dim is not None):
            raise ValueError(
                f"input has placements {layout.placements}: expected Replicate() or Shard, of the "
                "classes on at most one mesh dimension"
            )
        if place.dim == class_axis:
            class_dim = i
        else:
            rows[i] = Shard(place.dim - (place.dim > class_axis))
    return Sharding(layout.mesh, class_dim, tuple(rows), tuple(batch), C, class_axis)
