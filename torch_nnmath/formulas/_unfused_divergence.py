"""The divergence between two heads with the logits in memory: for tracers, and third order.

`compute_rows` is what `LinearDivergence` computes, `compute_second_order` what
`LinearDivergenceSecondOrder` computes, in operations that PyTorch can differentiate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import widen
from torch_nnmath._records import DivergenceInputs, PairValues
from torch_nnmath.formulas._formula import mask_ignored

vjp: Any = torch.func.vjp  # Any: its annotation is a union of two and of three results
INPUT_COUNT, VALUE_COUNT = len(DivergenceInputs._fields), len(PairValues._fields)


def compute_rows(inputs: DivergenceInputs) -> Tensor:
    """c of each row, (N, 1)."""
    z = _compute_logits(inputs.x, inputs.W, inputs.b, inputs.keep)
    l = _log_softmax(z / inputs.temperature)
    if inputs.indices is None:
        zt = _compute_logits(inputs.xt, inputs.Wt, inputs.bt, inputs.keep)
        c = _compute_divergence(l, _log_softmax(zt / inputs.temperature), inputs.mix)
    else:
        xt = widen(mask_ignored(inputs.keep, inputs.xt))
        c = _compute_divergence(
            *_select_classes(l, xt, inputs.indices, inputs.has_rest), inputs.mix
        )
    c = inputs.factor * c
    if inputs.y is not None and inputs.label_factor:
        label_l = l if inputs.temperature == 1 else _log_softmax(z)
        c = c - inputs.label_factor * label_l.gather(1, inputs.y)
    return mask_ignored(inputs.keep, c)


def _compute_logits(x: Tensor, W: Tensor | None, b: Tensor | None, keep: Tensor | None) -> Tensor:
    x = widen(mask_ignored(keep, x))
    if W is None:
        return x
    z = torch.nn.functional.linear(x, widen(W), None if b is None else widen(b))
    return mask_ignored(keep, z)


def _log_softmax(z: Tensor) -> Tensor:
    z = z - z.detach().amax(1, keepdim=True)
    return z - z.exp().sum(1, keepdim=True).log()


def _select_classes(
    l: Tensor, lt: Tensor, indices: Tensor, has_rest: bool
) -> tuple[Tensor, Tensor]:
    """l and lt of the teacher's classes, and of the others as one class."""
    selected = l.gather(1, indices)
    if not has_rest or indices.shape[1] == l.shape[1]:
        return selected, lt
    others = l.scatter(1, indices, -torch.inf)
    m = others.detach().amax(1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)
    l_rest = m + (others - m).exp().sum(1, keepdim=True).log()
    mass = (1 - lt.double().exp().sum(1, keepdim=True)).clamp(min=torch.finfo(lt.dtype).eps)
    lt_rest = mass.log().to(lt.dtype)
    return torch.cat((selected, l_rest), 1), torch.cat((lt, lt_rest), 1)


def _compute_divergence(l: Tensor, lt: Tensor, mix: float) -> Tensor:
    """Σ over the classes of the side's probability times its score; 0 where that is 0."""
    q, p = l.exp(), lt.exp()
    if mix == 0:
        terms = p * (lt - l).masked_fill(p == 0, 0)
    elif mix == 1:
        terms = q * (l - lt).masked_fill(q == 0, 0)
    else:
        lm = (mix * p + (1 - mix) * q).clamp(min=torch.finfo(l.dtype).tiny).log()
        terms = (1 - mix) * q * (l - lm).masked_fill(q == 0, 0)
        terms = terms + mix * p * (lt - lm).masked_fill(p == 0, 0)
    return terms.sum(1, keepdim=True)


def compute_second_order(*flat: Any) -> tuple[Any, ...]:
    """(`DivergenceInputs`, γ, direction) -> ρ (N, 1) and six gradients, None for an absent input.

    The gradients of Σ γ c are differentiated along the direction: h is their product with it, which
    is Σ γ ρ.
    """
    inputs, γ = DivergenceInputs(*flat[:INPUT_COUNT]), flat[INPUT_COUNT]
    direction = flat[INPUT_COUNT + 1 :]
    places = [i for i, v in enumerate(inputs.values) if v is not None]

    def h(γ: Tensor, *values: Tensor) -> Tensor:
        def f(*values: Tensor) -> Tensor:
            changes: Any = {
                DivergenceInputs._fields[i]: v for i, v in zip(places, values, strict=True)
            }
            return compute_rows(inputs._replace(**changes))

        _, pullback = vjp(f, *values)
        gradients = dict(zip(places, pullback(γ), strict=True))
        products = [(gradients[i] * u).sum() for i, u in enumerate(direction) if u is not None]
        return sum(products, torch.zeros_like(γ).sum())

    value, pullback = vjp(h, γ, *(inputs.values[i] for i in places))
    ρ, *gradients = pullback(torch.ones_like(value))
    gradient_at = dict(zip(places, gradients, strict=True))
    return ρ, *(gradient_at.get(i) for i in range(VALUE_COUNT))
