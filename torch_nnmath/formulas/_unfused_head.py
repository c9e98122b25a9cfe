"""The head with its logits in memory: for tracers, and for derivatives of third order.

`compute_rows` is what `LinearCrossEntropy` computes, `compute_second_order` what
`LinearCrossEntropySecondOrder` computes, in operations and formulas that PyTorch can differentiate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath._precision import disable_autocast, widen, zero_safe_product
from torch_nnmath._records import (
    FLAT_SIZE,
    HeadInputs,
    InputValues,
    Requests,
    RowResults,
    Target,
    UpstreamGradients,
)
from torch_nnmath.formulas._formula import mask_ignored
from torch_nnmath.formulas.affine import Affine
from torch_nnmath.formulas.cross_entropy import CrossEntropy
from torch_nnmath.formulas.entropy import Entropy
from torch_nnmath.formulas.softcap import SoftCap
from torch_nnmath.formulas.softmax import LogSoftmax, LogSumExp
from torch_nnmath.formulas.tanh import Tanh
from torch_nnmath.formulas.z_loss import ZLoss

vjp: Any = torch.func.vjp  # Any: its annotation is a union of two and of three results


def check_all_classes(flat: Any) -> None:
    """Raises for `HeadInputs` (flat) whose classes several ranks share."""
    if HeadInputs.from_flat(flat[:FLAT_SIZE]).shard is not None:
        raise NotImplementedError(
            "the head over split classes has derivatives up to second order, outside of compiled "
            "transforms: for others gather the weight with full_tensor()"
        )


def compute_rows(inputs: HeadInputs, requests: Requests) -> RowResults:
    """F14 and the other `RowResults`, as a composition of the formulas."""
    x, _, b, target, keep, base, cap, *_ = inputs
    y, p, t, _ = target
    x, b = widen(mask_ignored(keep, x)), None if b is None else widen(b)
    z = mask_ignored(keep, torch.nn.functional.linear(x, widen(inputs.round_weight()), b))
    v = z if cap is None else SoftCap.unfused(z, cap)
    loss = CrossEntropy.unfused(v, y, p, t, keep, 1, base)
    if y is None and p is not None:
        p_lse = zero_safe_product(p, LogSumExp.unfused(v, 1))
        loss = loss + mask_ignored(keep, p_lse) / math.log(base)
    squared_lse = mask_ignored(keep, ZLoss.unfused(v, 1))
    constant = v.detach()
    lse = mask_ignored(keep, constant.logsumexp(1, keepdim=True))
    entropy = mask_ignored(keep, Entropy.unfused(v, 1, base)) if requests.entropy else None
    predicted = constant.argmax(1, keepdim=True) if requests.predicted else None
    if predicted is not None and keep is not None:
        predicted = predicted.masked_fill(~keep, -1)
    return RowResults(loss, lse, squared_lse, entropy, predicted)


def split_second_order(flat: Any) -> tuple[Any, Any, Any]:
    """`HeadInputs` (flat), `UpstreamGradients` and direction of the second order's arguments."""
    return flat[:FLAT_SIZE], flat[FLAT_SIZE : FLAT_SIZE + 3], flat[FLAT_SIZE + 3 :]


class _SoftmaxTerms(NamedTuple):
    """What the derivatives along r have in common, in the symbols of the second order."""

    r: Tensor
    l: Tensor
    lse: Tensor
    a: Tensor
    ar: Tensor  # a·r
    al_centred: Tensor | None  # a ∘ (l - a·l), for the entropy


def compute_second_order(*flat: Any) -> tuple[Tensor | None, ...]:
    """(`HeadInputs` flat, `UpstreamGradients`, direction) -> ρ_c, ρ_q, ρ_h and five gradients.

    In the symbols of `LinearCrossEntropySecondOrder`.
    """
    flat_inputs, flat_upstream, flat_direction = split_second_order(flat)
    inputs = HeadInputs.from_flat(flat_inputs)
    x, W, b, target, keep, base, cap, *_ = inputs
    upstream, direction = UpstreamGradients(*flat_upstream), InputValues(*flat_direction)
    x_dtype, W_dtype, b_dtype = x.dtype, W.dtype, (W if b is None else b).dtype
    W = inputs.round_weight()
    u, V, σ, _, _ = direction
    u = torch.zeros_like(x) if u is None else u
    V = torch.zeros_like(W) if V is None else V
    x, u, W, V = (widen(v) for v in (mask_ignored(keep, x), mask_ignored(keep, u), W, V))
    b, σ = (None if v is None else widen(v) for v in (b, σ))
    y, p, t, _ = target
    dtarget = direction.to_target(y)

    z = mask_ignored(keep, Affine.apply(x, W, b))
    R = mask_ignored(keep, Affine.apply(u, W, None) + Affine.apply(x, V, σ))
    v, slope, curvature = z, 1.0, 0.0  # dv/dz, and d²v/dz² over dv/dz
    if cap is not None:
        tanh = Tanh.apply(z / cap)
        v, slope, curvature = cap * tanh, (1 - tanh) * (1 + tanh), -2 / cap * tanh
    r = slope * R
    l, lse = LogSoftmax.apply(v, 1), LogSumExp.apply(v, 1)
    a = l.exp()
    al_centred = None
    if upstream.η is not None:
        al = zero_safe_product(a, l)
        al_centred = al - a * al.sum(1, keepdim=True)
    terms = _SoftmaxTerms(r, l, lse, a, (a * r).sum(1, keepdim=True), al_centred)

    dc, dq, dh = _differentiate_values(terms, target, dtarget)
    inverse_ln = 1 / math.log(base)
    γ, ω, η = (None if v is None else mask_ignored(keep, v) for v in upstream)
    assert γ is not None
    γβ, ηβ = γ * inverse_ln, None if η is None else η * inverse_ln
    G, dG = _differentiate_gradient(terms, target, dtarget, (γβ, ω, ηβ), dh)
    Δ, Q = slope * G, slope * dG + curvature * G * r
    dt = γβ * (terms.ar - r)
    dp = None
    if p is not None:
        dp = γβ * terms.ar if y is None else dt.gather(1, y)
    return (
        mask_ignored(keep, inverse_ln * dc),
        mask_ignored(keep, dq),
        None if dh is None else mask_ignored(keep, inverse_ln * dh),
        (Q @ W + Δ @ V).to(x_dtype),
        (Q.T @ x + Δ.T @ u).to(W_dtype),
        Q.sum(0).to(b_dtype),
        dp,
        None if t is None else dt.sum_to_size(t.shape),
    )


def _differentiate_values(
    terms: _SoftmaxTerms, target: Target, dtarget: Target
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ln β dc, dq and ln β dh along the direction."""
    r, l, lse, a, ar, al_centred = terms
    dc = (target.subtract_from(target.total() * a) * r).sum(1, keepdim=True) - dtarget.dot(l)
    if target.y is None and dtarget.p is not None:
        dc = dc + zero_safe_product(dtarget.p, lse)
    dh = None if al_centred is None else -(al_centred * r).sum(1, keepdim=True)
    return dc, 2 * lse * ar, dh


def _differentiate_gradient(
    terms: _SoftmaxTerms, target: Target, dtarget: Target, coefficients: Any, dh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """G and dG from γβ, ω, ηβ, and ln β dh."""
    r, _, lse, a, ar, al_centred = terms
    γβ, ω, ηβ = coefficients
    ω = 0.0 if ω is None else ω
    aB = (γβ * target.total() + 2 * ω * lse) * a
    row_term = γβ * dtarget.total() + 2 * ω * ar
    a_slope = aB  # a ∘ (B - ηβ)
    if ηβ is not None:
        aB, row_term = aB - ηβ * al_centred, row_term - ηβ * dh
        a_slope = aB - ηβ * a
    G = target.scale(γβ).subtract_from(aB)
    dG = dtarget.scale(γβ).subtract_from((r - ar) * a_slope + a * row_term)
    return G, dG


def restrict(
    function: Callable[..., Any], inputs: list[Any], places: list[int], has_output: Sequence[bool]
) -> Callable[..., Any]:
    """Returns `function` restricted to the inputs at `places` and the outputs in `has_output`.

    The other inputs stay those of `inputs`.
    """

    def restricted(*values: Tensor) -> tuple[Any, ...]:
        arguments = list(inputs)
        for i, value in zip(places, values, strict=True):
            arguments[i] = value
        pairs = zip(function(*arguments), has_output, strict=True)
        return tuple(output for output, is_selected in pairs if is_selected)

    return restricted


def pull_back(
    function: Callable[..., Any], inputs: list[Any], places: list[int], cotangents: Sequence[Any]
) -> list[Any]:
    """Returns a gradient for each input, None for those that are not at `places`."""
    f = restrict(function, inputs, places, [c is not None for c in cotangents])
    with disable_autocast(inputs[0]):
        _, pullback = vjp(f, *(inputs[i] for i in places))
        gradients = pullback(tuple(c for c in cotangents if c is not None))
    gradient_at = dict(zip(places, gradients, strict=True))
    return [gradient_at.get(i) for i, _ in enumerate(inputs)]


def push_forward(
    function: Callable[..., Any],
    inputs: list[Any],
    tangents: Sequence[Any],
    has_output: Sequence[bool],
) -> tuple[Any, ...]:
    """Returns the tangent of each output in `has_output`, None for the others.

    The pullback is linear, so its own pullback is the tangent map.
    """
    places = [i for i, _ in enumerate(inputs) if isinstance(tangents[i], Tensor)]
    f = restrict(function, inputs, places, has_output)
    with disable_autocast(inputs[0]):
        values, pullback = vjp(f, *(inputs[i] for i in places))
        zeros = tuple(torch.zeros_like(v) for v in values)
        _, pushforward = vjp(lambda c: pullback(c), zeros)
        (changes,) = pushforward(tuple(tangents[i] for i in places))
    results = iter(changes)
    return tuple(next(results) if is_computed else None for is_computed in has_output)
