"""Affine map, softmax and cross entropy as one formula: the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_nnmath import _torch, kernels
from torch_nnmath._precision import drop_infinite, weigh, widen
from torch_nnmath._records import (
    FLAT_SIZE,
    TENSOR_COUNT,
    HeadInputs,
    InputValues,
    Requests,
    UpstreamGradients,
)
from torch_nnmath.formulas._formula import KernelFormula, mask_ignored, requires_grad, save
from torch_nnmath.formulas._unfused_head import (
    check_all_classes,
    compute_rows,
    compute_second_order,
    pull_back,
    push_forward,
    split_second_order,
)
from torch_nnmath.kernels.scaling import may_scale, scale_gradient_

NO_UPSTREAM = (None, None, None)
NO_REQUESTS = Requests()
NO_GRADIENTS = InputValues(*[False] * 5)


class LinearCrossEntropy(KernelFormula):
    r"""F14, F15: c = F13(v), v = z = W x + b;  δ = (1/ln β)(T a - t):  dW = δ xᵀ, dx = Wᵀ δ,
    db = δ;  dc/dt = (1/ln β)(lse(v) - v).

    With a cap κ, v = F19(z), and δ is multiplied by dv/dz. With t = e_y, c = -F22 (derivative
    (1/ln β)(e_y - a)). The other results are q = F20(v) and h = F21(v); their upstream gradients
    add 2 lse(v) a and -(1/ln β) a ∘ (l - a·l) to δ (F23). With a weight p = 1 without a class,
    t = 0 and T = 1: c = (1/ln β) lse(v).

    `HeadInputs` (flat), `Requests` -> `RowResults`, and sums (N, 3) that the backward need not
    recompute. The logits exist for a block of rows at a time.
    """

    @staticmethod
    def forward(
        x: Any,
        W: Any,
        b: Any,
        y: Any,
        p: Any,
        t: Any,
        keep: Any,
        features: Any,
        scale: Any,
        base: float,
        cap: float | None,
        weight_dtype: torch.dtype | None,
        group: str | None,
        first_class: int,
        max_classes: int,
        requests: Requests,
    ) -> Any:
        options = base, cap, weight_dtype, group, first_class, max_classes
        inputs = x, W, b, y, p, t, keep, features, scale, *options
        outputs = kernels.head(*_pack_arguments(inputs, requests=requests))
        return _select_rows(outputs, requests)

    @classmethod
    def unfused(cls, *inputs: Any) -> Any:
        *flat, requests = inputs
        check_all_classes(flat)
        return *compute_rows(HeadInputs.from_flat(flat), requests), None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        *flat, _ = inputs
        _, lse, _, entropy, predicted, sums = outputs
        ctx.has_entropy = entropy is not None
        ctx.mark_non_differentiable(*(v for v in (lse, predicted, sums) if v is not None))
        _save(ctx, flat, sums)

    @staticmethod
    def backward(ctx: Any, γ: Any, _lse: None, ω: Any, η: Any, *_: None) -> Any:
        if γ is None:
            if ω is None and η is None:
                return (None,) * (FLAT_SIZE + 1)
            γ = torch.zeros_like(η if ω is None else ω)
        inputs, (sums,) = _restore(ctx)
        needs_gradient = InputValues.from_flat(ctx.needs_input_grad)
        gradients = LinearCrossEntropyGradient.apply(
            *inputs.flatten(), γ, ω, η, sums, needs_gradient, None
        )
        return *InputValues(*gradients).flatten(), None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        inputs, _ = _restore(ctx)
        direction = InputValues.from_flat(tangents)
        ones = widen(inputs.x.new_ones(len(inputs.x), 1))
        upstream = UpstreamGradients(ones, None, ones if ctx.has_entropy else None)
        dc, dq, dh, *_gradients = LinearCrossEntropySecondOrder.apply(
            *inputs.flatten(), *upstream, *direction, NO_GRADIENTS
        )
        return dc, None, dq, dh, None, None


class LinearCrossEntropyCost(Function):
    r"""F3, F30 of F14, F15: C = (1/n) Σ r c + ω Σ r q;  dC/dx, dC/dW, dC/db, dC/dp, dC/dt are those
    of Σ γ c + ω' q with γ = r/n, ω' = ω r (F15 batch);  dC/dr = c/n + ω q, dC/dn = -(1/n²) Σ r c,
    dC/dω = Σ r q.

    The forward computes the former along with C: three matrix products instead of four. The
    backward multiplies them by dC. (n, ω, r, `HeadInputs` flat, `Requests`, which gradients are
    needed) -> C, and without derivative lse, entropy, predicted class, c and q of each row, and the
    gradients. ω, and the weights r (N, 1), may be None.
    """

    @staticmethod
    def forward(n: Any, ω: Any, r: Any, *inputs: Any) -> Any:
        *flat, requests, needs_gradient = inputs
        upstream = _weigh_upstream(n, ω, r)
        outputs = kernels.head(
            *_pack_arguments(flat, upstream, requests=requests, needs_gradient=needs_gradient)
        )
        c, lse, q, entropy, predicted, _ = _select_rows(outputs, requests)
        C = weigh(r, c).sum() / n
        C = C if ω is None else C + ω * weigh(r, q).sum()
        return C, lse, entropy, predicted, c, q, *_select_gradients(outputs, needs_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        n, ω, r, *flat, _, _ = inputs
        _, _, _, _, c, q, *gradients = outputs
        ctx.losses = c, q
        ctx.gradients = InputValues(*gradients)
        ctx.mark_non_differentiable(*(v for v in outputs[1:] if v is not None))
        _save(ctx, flat, n, ω, r)

    @staticmethod
    def backward(ctx: Any, dC: Tensor | None, *_: None) -> Any:
        if dC is None:
            return (None,) * (FLAT_SIZE + 5)
        inputs, (n, ω, r) = _restore(ctx)
        needs_factors, needs_flat = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
        needs_gradient = InputValues.from_flat(needs_flat)
        factors = n, ω, r
        if torch.compiler.is_compiling():  # compiled: dC has no value to check
            gradients = _scale(dC, ctx.gradients.select(needs_gradient), inputs)
            changes = _differentiate_factors(dC, needs_factors, factors, ctx.losses, inputs.keep)
            return *changes, *gradients.flatten(), None, None
        known_gradients = None
        if may_scale(dC):  # the usual training step: scales the forward's gradients
            gradients = LinearCrossEntropyCost._take_gradients(ctx, needs_gradient, inputs, factors)
            gradients = _scale(dC, gradients, inputs)
            if not torch.is_grad_enabled():
                changes = _differentiate_factors(
                    dC, needs_factors, factors, ctx.losses, inputs.keep
                )
                return *changes, *gradients.flatten(), None, None
            known_gradients = gradients
        # a differentiated backward, or a dC that must not be multiplied
        shape = len(inputs.x), 1
        γ, ω = (dC / n).expand(shape), None if ω is None else (dC * ω).expand(shape)
        if r is not None:
            γ, ω = γ * r, None if ω is None else ω * r
        results = LinearCrossEntropyGradient.apply(
            *inputs.flatten(), γ, ω, None, None, needs_gradient, known_gradients
        )
        changes = None, None, None
        if any(needs_factors):
            c, _, q, *_ = LinearCrossEntropy.evaluate(*inputs.flatten(), NO_REQUESTS)
            changes = _differentiate_factors(dC, needs_factors, factors, (c, q), inputs.keep)
        return *changes, *InputValues(*results).flatten(), None, None

    @staticmethod
    def _take_gradients(
        ctx: Any, needs_gradient: InputValues, inputs: HeadInputs, factors: Any
    ) -> InputValues:
        """Gradients for dC = 1 that the caller may overwrite.

        The first call takes the forward's; later calls recompute them.
        """
        gradients = ctx.gradients.select(needs_gradient)
        ctx.gradients = ctx.gradients.select(InputValues(*(not need for need in needs_gradient)))
        if any(need and g is None for need, g in zip(needs_gradient, gradients, strict=True)):
            upstream = _weigh_upstream(*factors)
            outputs = kernels.head(
                *_pack_arguments(inputs.flatten(), upstream, needs_gradient=needs_gradient)
            )
            gradients = _select_gradients(outputs, needs_gradient)
        return gradients

    @staticmethod
    def select_gradients(inputs: HeadInputs) -> InputValues:
        """Which gradients the forward should compute."""
        return InputValues(*map(requires_grad, InputValues.from_flat(inputs.flatten())))

    @staticmethod
    def may_replace(needs_gradient: InputValues) -> bool:
        """Whether gradients are needed, and may be computed along with the cost.

        A transform would not see how the gradients depend on the inputs. An exported program
        differentiates the operator.
        """
        if _torch.is_transformed() or _torch.is_exporting():
            return False
        return torch.is_grad_enabled() and any(needs_gradient)


class LinearCrossEntropyGradient(KernelFormula):
    r"""F15 batch: the gradients of Σ γ c + ω q + η h with respect to x, W, b, p, t.

    (`HeadInputs` flat, `UpstreamGradients`, sums or None, which gradients are needed, gradients or
    None) -> `InputValues`. Gradients that are given are returned: so gradients that are already
    computed can be differentiated.
    """

    @staticmethod
    def forward(  # named, since Dynamo miscounts the arguments of `*inputs` here
        x: Any,
        W: Any,
        b: Any,
        y: Any,
        p: Any,
        t: Any,
        keep: Any,
        features: Any,
        scale: Any,
        base: float,
        cap: float | None,
        weight_dtype: torch.dtype | None,
        group: str | None,
        first_class: int,
        max_classes: int,
        γ: Any,
        ω: Any,
        η: Any,
        sums: Any,
        needs_gradient: InputValues,
        gradients: InputValues | None,
    ) -> Any:
        if gradients is None:
            options = base, cap, weight_dtype, group, first_class, max_classes
            inputs = x, W, b, y, p, t, keep, features, scale, *options
            outputs = kernels.head(
                *_pack_arguments(inputs, (γ, ω, η), sums, needs_gradient=needs_gradient)
            )
            gradients = _select_gradients(outputs, needs_gradient)
        return tuple(gradients.select(needs_gradient))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, gradients: Any) -> None:
        *flat, γ, ω, η, _, ctx.needs_gradient, _ = inputs
        _save(ctx, flat, γ, ω, η)

    @staticmethod
    def backward(ctx: Any, *direction: Tensor | None) -> Any:
        inputs, upstream = _restore(ctx)
        needs_gradient = InputValues.from_flat(ctx.needs_input_grad)
        ρ_c, ρ_q, ρ_h, *gradients = LinearCrossEntropySecondOrder.apply(
            *inputs.flatten(), *upstream, *direction, needs_gradient
        )
        _, ω, _ = upstream
        ρ_q = None if ω is None else ρ_q
        return *InputValues(*gradients).flatten(), ρ_c, ρ_q, ρ_h, None, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        inputs, upstream = _restore(ctx)
        direction = InputValues.from_flat(tangents)
        dγ, dω, dη = tangents[FLAT_SIZE : FLAT_SIZE + 3]
        results: Any = [None] * 5
        if any(d is not None for d in (dγ, dω, dη)):
            γ, _, _ = upstream
            dγ = torch.zeros_like(γ) if dγ is None else dγ
            results = LinearCrossEntropyGradient.apply(
                *inputs.flatten(), dγ, dω, dη, None, ctx.needs_gradient, None
            )
        if any(d is not None for d in direction):
            _, _, _, *second = LinearCrossEntropySecondOrder.apply(
                *inputs.flatten(), *upstream, *direction, ctx.needs_gradient
            )
            pairs = zip(results, second, strict=True)
            results = [s if d is None else d + s for d, s in pairs]
        return tuple(results)


class LinearCrossEntropySecondOrder(KernelFormula):
    r"""F15 batch: the backward of the backward (docs/head.md), along the direction (u, V, σ, π, τ)
    of x, W, b, p, t. With z = W x + b, l = v - lse(v), γβ = γ/ln β, ηβ = η/ln β, t' = π e_y + τ,
    T' = Σ t', B = γβ T + 2 ω lse - ηβ (l - a·l) and G = a ∘ B - γβ t:

    R = U Wᵀ + X Vᵀ + σ,  r = (1 - (v/κ)²) ∘ R (without a cap r = R and Δ = G):
    ρ_c = dc = (1/ln β)((T a - t)·r + (lse - v)·t'),  ρ_q = dq = 2 lse a·r,
    ρ_h = dh = -(1/ln β)(a ∘ (l - a·l))·r;
    dG = a ∘ ((r - a·r) ∘ (B - ηβ) + γβ T' + 2 ω a·r - η ρ_h) - γβ t',
    Δ = (1 - (v/κ)²) ∘ G,  Q = dΔ = (1 - (v/κ)²) ∘ dG - (2/κ²) v ∘ G ∘ r.

    (`HeadInputs` flat, `UpstreamGradients`, direction (`InputValues`), which gradients are needed)
    -> ρ_c, ρ_q, ρ_h (None without η) and the gradients of Σ γ ρ_c + ω ρ_q + η ρ_h (`InputValues`):
    dx = Q W + Δ V,  dW = Qᵀ X + Δᵀ U,  db = Σ_rows Q,  dt = γβ (a·r - r).
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *tensors, needs_gradient = inputs
        _, (_, _, η), _ = split_second_order(tensors)
        ρ_c, ρ_q, ρ_h, *gradients = kernels.head_second_order(*tensors, list(needs_gradient))
        ρ_h = None if η is None else ρ_h
        return ρ_c, ρ_q, ρ_h, *InputValues(*gradients).select(needs_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        *tensors, ctx.needs_gradient = inputs
        flat, upstream, direction = split_second_order(tensors)
        _save(ctx, flat, *upstream, *direction)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Third order, with the logits in memory."""
        tensors = _flat_tensors(ctx)
        check_all_classes(tensors)
        places = [i for i, _ in enumerate(tensors) if ctx.needs_input_grad[i]]
        return *pull_back(compute_second_order, tensors, places, cotangents), None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        """Third order, with the logits in memory."""
        tensors = _flat_tensors(ctx)
        check_all_classes(tensors)
        _, (_, _, η), _ = split_second_order(tensors)
        has_output = True, True, η is not None, *ctx.needs_gradient
        return push_forward(compute_second_order, tensors, tangents, has_output)


def _weigh_upstream(n: Tensor, ω: Tensor | None, r: Tensor | None) -> tuple[Any, Any, None]:
    """The upstream gradients of a cost: γ is () or, with weights, (N)."""
    if r is None:
        return 1 / n, ω, None
    return (r / n).squeeze(1), None if ω is None else ω * r, None


def _differentiate_factors(
    dC: Tensor, needs_gradient: Any, factors: Any, losses: Any, keep: Tensor | None
) -> tuple[Any, Any, Any]:
    """The gradients of n, ω and r, None for those that are not needed, of losses c and q."""
    (needs_n, needs_ω, needs_r), (n, ω, r), (c, q) = needs_gradient, factors, losses
    dn = dω = dr = None
    if needs_n:
        dn = -dC / n * (weigh(r, c).sum() / n)
    if needs_ω:
        dω = dC * weigh(r, q).sum()
    if needs_r:
        dr = dC / n * drop_infinite(r, c)
        dr = dr if ω is None else dr + dC * ω * drop_infinite(r, q)
        dr = mask_ignored(keep, dr)
    return dn, dω, dr


def _pack_arguments(
    flat: Any,
    upstream: Any = NO_UPSTREAM,
    sums: Any = None,
    requests: Requests = NO_REQUESTS,
    needs_gradient: InputValues = NO_GRADIENTS,
) -> tuple[Any, ...]:
    """The arguments of `kernels.head`."""
    return *flat, *upstream, sums, list(requests), list(needs_gradient)


def _select_rows(outputs: Any, requests: Requests) -> tuple[Any, ...]:
    """`RowResults` and sums of the operator's outputs, None for what was not requested."""
    loss, lse, squared_lse, entropy, predicted, sums, *_ = outputs
    entropy = entropy if requests.entropy else None
    return loss, lse, squared_lse, entropy, predicted if requests.predicted else None, sums


def _select_gradients(outputs: Any, needs_gradient: InputValues) -> InputValues:
    """The gradients among the operator's outputs, None for those that are not needed."""
    _, _, _, _, _, _, *gradients = outputs
    return InputValues(*gradients).select(needs_gradient)


def _scale(dC: Tensor, gradients: InputValues, inputs: HeadInputs) -> InputValues:
    """dC times the gradients, in the inputs' types; an eager step overwrites them.

    Where dC may be infinite, gradients from ignored rows alone are set to 0.
    """
    x, _, _, target, keep, *_ = inputs
    any_kept = None if keep is None else keep.any()

    def scale(g: Tensor, v: Tensor, is_per_row: bool) -> Tensor:
        if len(x) or keep is not None:
            g = scale_gradient_(g, dC, keep if is_per_row else any_kept)
        return g.to(v.dtype)

    has_rows = InputValues(True, False, False, True, target.t is not None)
    values = InputValues.from_flat(inputs.flatten())
    return InputValues(
        *(
            None if g is None else scale(g, v, may_be_per_row and len(g) == len(x))
            for g, v, may_be_per_row in zip(gradients, values, has_rows, strict=True)
        )
    )


def _save(ctx: Any, flat: Any, *others: Any) -> None:
    """Saves `HeadInputs` (flat) and other tensors."""
    tensors, ctx.options = flat[:TENSOR_COUNT], flat[TENSOR_COUNT:]
    ctx.set_materialize_grads(False)
    save(ctx, *tensors, *others)


def _restore(ctx: Any) -> tuple[HeadInputs, tuple[Any, ...]]:
    """`HeadInputs` and the tuple of the other tensors that `_save` saved."""
    saved = ctx.saved_tensors  # read once: checkpointing cannot unpack them twice
    tensors, others = saved[:TENSOR_COUNT], saved[TENSOR_COUNT:]
    return HeadInputs.from_flat((*tensors, *ctx.options)), others


def _flat_tensors(ctx: Any) -> list[Any]:
    """The same, in the order of the Function's arguments."""
    inputs, others = _restore(ctx)
    return [*inputs.flatten(), *others]


def _save_for_export(ctx: Any, inputs: Any, output: Any) -> None:
    *flat, _γ, _ω, _η, _sums, requests, _needs_gradient = inputs
    ctx.has_entropy = Requests(*requests).entropy
    tensors, ctx.options = flat[:TENSOR_COUNT], flat[TENSOR_COUNT:]
    ctx.save_for_backward(*tensors)


def _backward_of_export(ctx: Any, γ: Any, _lse: Any, ω: Any, η: Any, *_others: Any) -> Any:
    """F15 batch, where an exported program calls the operator itself and not a Function."""
    inputs, _ = _restore(ctx)
    needs_gradient = InputValues.from_flat(ctx.needs_input_grad)
    η = η if ctx.has_entropy else None
    gradients = LinearCrossEntropyGradient.apply(
        *inputs.flatten(), γ, ω, η, None, needs_gradient, None
    )
    return *InputValues(*gradients).flatten(), *[None] * 6


torch.library.register_autograd(
    "torch_nnmath::head", _backward_of_export, setup_context=_save_for_export
)
