"""The sum of the deferred logits of two heads, such as a Linear and its adapter: one head.

x Wᵀ + u Bᵀ = [x, u] [W, B]ᵀ: features and weights are concatenated. That copies the weight, but no
logits are computed, neither those of the terms nor their sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import disable_autocast, widen
from torch_nnmath.deferred.logits import (
    DeferredAffine,
    DeferredLogits,
    get_grad_fn,
    register_override,
)
from torch_nnmath.deferred.operands import Operands, are_operands_of_head, set_inference_mode
from torch_nnmath.deferred.rows import HeadRows, make_rows


@register_override(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(func: Any, input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
    """The sum as deferred logits of the concatenated operands (F1)."""
    terms = input, other
    if args or kwargs or not all(isinstance(z, DeferredLogits) for z in terms):
        return NotImplemented
    is_any_capped = any(z.recipe.form.is_capped for z in terms)
    if is_any_capped or input.recipe.call is other.recipe.call or input.shape != other.shape:
        return NotImplemented
    is_inference = torch.is_inference_mode_enabled()
    with (
        disable_autocast(input),
        set_inference_mode(False),
        torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference),
    ):
        rows = []
        for z in terms:
            rows.append(make_rows(z, is_log=False, axis=-1))
            if rows[-1] is NotImplemented:
                return NotImplemented
        operands = _concatenate(rows, torch.promote_types(input.dtype, other.dtype))
    if not are_operands_of_head(operands):
        return NotImplemented
    logits = DeferredAffine.evaluate(*operands)
    calls = [z.recipe.call for z in terms]
    call = logits.recipe.call
    widest = max(calls, key=lambda c: c.operands.features.shape[-1])
    call.log, call.grad_fn = widest.log, get_grad_fn(logits)
    call.is_training = any(c.is_training for c in calls)
    call.term_dtypes = {z.dtype for z in terms}
    for z, c in zip(terms, calls, strict=True):
        c.has_fused_loss |= torch.is_grad_enabled() and z.requires_grad
    return logits


def _concatenate(terms: list[HeadRows], dtype: torch.dtype) -> Operands:
    """The operands of the sum, whose logits have this type. Scales are those of the features."""
    features, biases = [], []
    for x, _, b, scale, _, _, row, row_scale, _ in terms:
        is_scaled = isinstance(scale, Tensor) or scale != 1
        x = x if not is_scaled and row_scale is None else widen(x) * scale
        features.append((x if row_scale is None else x * row_scale).to(dtype))
        for v in (b, row):
            if v is not None:
                biases.append((widen(v) * scale if is_scaled else v).to(dtype))
    weight_dtype = terms[0].weight_dtype
    weights = [term.weight for term in terms]
    if weight_dtype != dtype or any(term.weight_dtype != dtype for term in terms):
        weights = [
            (W if term.weight_dtype is None else W.to(term.weight_dtype)).to(dtype)
            for W, term in zip(weights, terms, strict=True)
        ]
        weight_dtype = None
    weight, bias = torch.cat(weights, 1), sum(biases[1:], biases[0]) if biases else None
    return Operands(torch.cat(features, -1), weight, bias, weight_dtype)
