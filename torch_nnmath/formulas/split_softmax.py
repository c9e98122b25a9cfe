"""Softmax and cross entropy of logits whose classes several ranks share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import zero_safe_product
from torch_nnmath._records import Shard, Target
from torch_nnmath.formulas._formula import KernelFormula, mask_ignored, save
from torch_nnmath.formulas.transfer import copy_to_ranks, sum_over_ranks
from torch_nnmath.kernels import collectives


class SplitLogSumExp(KernelFormula):
    r"""F24: m = max_r max z_r,  k = ln Σ_r Σ e^{z_r - m},  lse = m + k;
    dlse/dz_r = e^{z_r - m - k}, where z_r are the classes of rank r.

    z (*, n) of this rank -> m without derivative, and k, (*, 1) each, the same on all ranks of the
    group. They stay apart: m may be so large that m + k loses k. Without a group there is one rank.
    """

    @staticmethod
    def forward(z: Tensor, group: str | None) -> Any:
        shape = *z.shape[:-1], 1
        m = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full(shape, -math.inf)
        m = m if group is None else collectives.all_reduce(m, collectives.MAX, group)
        s = (z - m).exp().sum(-1, keepdim=True)
        s = s if group is None else collectives.all_reduce(s, collectives.SUM, group)
        return m, s.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        z, ctx.group = inputs
        m, k = outputs
        ctx.mark_non_differentiable(m)
        save(ctx, z, m, k)

    @staticmethod
    def backward(ctx: Any, _dm: Any, dk: Tensor) -> Any:
        z, m, k = ctx.saved_tensors
        dk, k = (copy_to_ranks(v, ctx.group) for v in (dk, k))
        return dk * (z - m - k).exp(), None

    @staticmethod
    def tangent(ctx: Any, dz: Tensor, _group: None) -> Any:
        z, m, k = ctx.saved_tensors
        a = (z - m - copy_to_ranks(k, ctx.group)).exp()
        return None, sum_over_ranks((a * dz).sum(-1, keepdim=True), ctx.group)


def compute_split_rows(
    z: Tensor, target: Target, keep: Tensor | None, base: float, shard: Shard | None
) -> tuple[Tensor, Tensor]:
    """F13 and the log-sum-exp of each row, (*, 1), of this rank's classes z (*, n).

    The target's class counts among all classes, its dense part has this rank's. c is computed from
    z - m, like the log-softmax: c = -(p e_y + t)·(z - m - k).
    """
    group, first_class = (None, 0) if shard is None else (shard.group, shard.first_class)
    z = mask_ignored(keep, z)
    m, k = SplitLogSumExp.evaluate(z, group)
    own_k = copy_to_ranks(k, group)
    y, p, t, _ = target
    c = torch.zeros_like(m)
    if y is not None and p is not None:
        C, place = z.shape[-1], y - first_class
        is_elsewhere = (place < 0) | (place >= C)
        # a rank without classes has the gradients, and so the collectives, of the others
        z_y = z.gather(-1, place.clamp(0, C - 1)) if C else z.sum(-1, keepdim=True)
        # ranks that do not have the class contribute 0 also to the gradients
        p = copy_to_ranks(p, group).expand_as(z_y).masked_fill(is_elsewhere, 0)
        c = c - zero_safe_product(p, (z_y - m - own_k).masked_fill(is_elsewhere, 0))
    if t is not None:
        c = c - zero_safe_product(t, z - m - own_k).sum(-1, keepdim=True)
    c = mask_ignored(keep, sum_over_ranks(c, group)) / math.log(base)
    return c, mask_ignored(keep, m + k)


def compute_split_entropy(z: Tensor, base: float, group: str | None) -> Tensor:
    """F21 of each row, (*, 1), of this rank's classes z (*, n)."""
    m, k = SplitLogSumExp.evaluate(z, group)
    l = z - m - copy_to_ranks(k, group)
    h = -zero_safe_product(l.exp(), l).sum(-1, keepdim=True)
    return sum_over_ranks(h, group) / math.log(base)
