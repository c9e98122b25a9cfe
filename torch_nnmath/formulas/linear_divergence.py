"""The divergence between a student's and a teacher's head as one formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_nnmath import _torch, kernels
from torch_nnmath._records import DIVERGENCE_TENSOR_COUNT, DivergenceInputs, PairValues
from torch_nnmath.formulas._formula import KernelFormula, requires_grad, save
from torch_nnmath.formulas._unfused_divergence import (
    INPUT_COUNT,
    VALUE_COUNT,
    compute_rows,
    compute_second_order,
)
from torch_nnmath.formulas._unfused_head import pull_back, push_forward
from torch_nnmath.kernels.scaling import may_scale, scale_gradient_

NO_GRADIENTS = PairValues(*[False] * VALUE_COUNT)


class LinearDivergence(KernelFormula):
    r"""F25, F26, F27: the divergence c of a teacher's p = softmax(zt/τ), zt = xt Wtᵀ + bt, from a
    student's q = softmax(z/τ), z = x Wᵀ + b. With l = ln q, lt = ln p and m = μ p + (1-μ) q:

    F25, μ = 0:  c = Σ p st,  st = lt - l
    F26, μ = 1:  c = Σ q s,   s = l - lt
    F27, else:   c = Σ q s + p st,  s = (1-μ)(l - ln m),  st = μ (lt - ln m)

    A score s gives dc/d(z/τ) = G = q ∘ (s - q·s), and st likewise Gt = p ∘ (st - p·st). Without a
    score, G = q - p in F25 and Gt = p - q in F26. Δ = G/τ:  dW = Δᵀ x, dx = Δ W, db = Σ_rows Δ.

    With `indices`, F28: lt = xt are log-probabilities of these classes; the others are one class of
    student and teacher, or are left out. With the partial derivatives f, ft of the same c with
    respect to l and lt, w the softmax of the others' logits, and F = Σ f:
    G_i = f_i - q_i F of the given classes, w_j (f_rest - q_rest F) of the others,
    dlt_i = ft_i - p_i ft_rest/p_rest.

    c is multiplied by `factor`; `label_factor` times F14 of z and the label is added (F29). Without
    Wt, zt = xt. `DivergenceInputs` -> c (N, 1). The logits exist for a block of rows at a time.
    """

    @staticmethod
    def forward(  # named, since Dynamo miscounts the arguments of `*inputs`
        x: Any,
        W: Any,
        b: Any,
        xt: Any,
        Wt: Any,
        bt: Any,
        indices: Any,
        y: Any,
        keep: Any,
        mix: float,
        temperature: float,
        alpha: float,
        base: float,
        has_temperature_factor: bool,
        has_rest: bool,
    ) -> Any:
        tensors = x, W, b, xt, Wt, bt, indices, y, keep
        options = mix, temperature, alpha, base, has_temperature_factor, has_rest
        c, *_ = kernels.divergence(*tensors, *options, None, list(NO_GRADIENTS))
        return c

    @classmethod
    def unfused(cls, *inputs: Any) -> Any:
        return compute_rows(DivergenceInputs(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Any) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, γ: Any) -> Any:
        if γ is None:
            return (None,) * INPUT_COUNT
        inputs, _ = _restore(ctx)
        needs = PairValues(*ctx.needs_input_grad[:VALUE_COUNT])
        gradients = LinearDivergenceGradient.apply(*inputs, γ, needs, None)
        return _pad(gradients)

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        inputs, _ = _restore(ctx)
        γ = torch.ones_like(_make_rows(inputs))
        direction = tangents[:VALUE_COUNT]
        ρ, *_ = LinearDivergenceSecondOrder.apply(*inputs, γ, *direction, NO_GRADIENTS)
        return ρ


class LinearDivergenceCost(Function):
    r"""F3 of F25 to F29: C = (1/n) Σ c, with the gradients of Σ γ c for γ = 1/n.

    The forward computes these along with C: three products with the student's weight and one with
    a frozen teacher's. The backward multiplies them by dC.
    (n, `DivergenceInputs`, which gradients are needed) -> C, and the gradients, without derivative.
    """

    @staticmethod
    def forward(n: Any, *inputs: Any) -> Any:
        *flat, needs_gradient = inputs
        c, *gradients = kernels.divergence(*flat, 1 / n, list(needs_gradient))
        return c.sum() / n, *PairValues(*gradients).select(needs_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        n, *flat, _ = inputs
        _, *gradients = outputs
        ctx.gradients = PairValues(*gradients)
        ctx.mark_non_differentiable(*(g for g in gradients if g is not None))
        _save(ctx, flat, n)

    @staticmethod
    def backward(ctx: Any, dC: Tensor | None, *_: None) -> Any:
        if dC is None:
            return (None,) * (INPUT_COUNT + 2)
        inputs, (n,) = _restore(ctx)
        needs = PairValues(*ctx.needs_input_grad[1 : VALUE_COUNT + 1])
        if torch.compiler.is_compiling():  # compiled: dC has no value to check
            return None, *_pad(_scale(dC, ctx.gradients.select(needs), inputs)), None
        known_gradients = None
        if may_scale(dC):  # the usual training step: scales the forward's gradients
            gradients = LinearDivergenceCost._take_gradients(ctx, needs, inputs, n)
            gradients = _scale(dC, gradients, inputs)
            if not torch.is_grad_enabled():
                return None, *_pad(gradients), None
            known_gradients = gradients
        # a differentiated backward, or a dC that must not be multiplied
        γ = (dC / n).expand(inputs.x.shape[0], 1)
        results = LinearDivergenceGradient.apply(*inputs, γ, needs, known_gradients)
        return None, *_pad(results), None

    @staticmethod
    def _take_gradients(
        ctx: Any, needs: PairValues, inputs: DivergenceInputs, n: Tensor
    ) -> PairValues:
        """Gradients for dC = 1 that the caller may overwrite.

        The first call takes the forward's; later calls recompute them.
        """
        gradients = ctx.gradients.select(needs)
        ctx.gradients = ctx.gradients.select(PairValues(*(not need for need in needs)))
        if any(need and g is None for need, g in zip(needs, gradients, strict=True)):
            _, *new_gradients = kernels.divergence(*inputs, 1 / n, list(needs))
            gradients = PairValues(*new_gradients).select(needs)
        return gradients

    @staticmethod
    def select_gradients(inputs: DivergenceInputs) -> PairValues:
        """Which gradients the forward should compute."""
        return PairValues(*map(requires_grad, inputs.values))

    @staticmethod
    def may_replace(n: Any, needs_gradient: PairValues) -> bool:
        """As `LinearCrossEntropyCost.may_replace`."""
        if _torch.is_transformed() or _torch.is_exporting() or requires_grad(n):
            return False
        return torch.is_grad_enabled() and any(needs_gradient)


class LinearDivergenceGradient(KernelFormula):
    r"""The gradients of Σ γ c with respect to x, W, b, xt, Wt, bt.

    (`DivergenceInputs`, γ (N, 1), which gradients are needed, gradients or None) -> `PairValues`.
    Gradients that are given are returned: so gradients that are already computed can be
    differentiated.
    """

    @staticmethod
    def forward(
        x: Any,
        W: Any,
        b: Any,
        xt: Any,
        Wt: Any,
        bt: Any,
        indices: Any,
        y: Any,
        keep: Any,
        mix: float,
        temperature: float,
        alpha: float,
        base: float,
        has_temperature_factor: bool,
        has_rest: bool,
        γ: Any,
        needs_gradient: PairValues,
        gradients: PairValues | None,
    ) -> Any:
        if gradients is None:
            tensors = x, W, b, xt, Wt, bt, indices, y, keep
            options = mix, temperature, alpha, base, has_temperature_factor, has_rest
            _, *results = kernels.divergence(*tensors, *options, γ, list(needs_gradient))
            gradients = PairValues(*results)
        return tuple(gradients.select(needs_gradient))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, gradients: Any) -> None:
        *flat, γ, ctx.needs_gradient, _ = inputs
        _save(ctx, flat, γ)

    @staticmethod
    def backward(ctx: Any, *direction: Tensor | None) -> Any:
        inputs, (γ,) = _restore(ctx)
        needs = PairValues(*ctx.needs_input_grad[:VALUE_COUNT])
        ρ, *gradients = LinearDivergenceSecondOrder.apply(*inputs, γ, *direction, needs)
        return *_pad(gradients), ρ, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        inputs, (γ,) = _restore(ctx)
        direction, dγ = tangents[:VALUE_COUNT], tangents[INPUT_COUNT]
        results: Any = [None] * VALUE_COUNT
        if dγ is not None:
            results = LinearDivergenceGradient.apply(*inputs, dγ, ctx.needs_gradient, None)
        if any(d is not None for d in direction):
            _, *second = LinearDivergenceSecondOrder.apply(
                *inputs, γ, *direction, ctx.needs_gradient
            )
            pairs = zip(results, second, strict=True)
            results = [s if d is None else d + s for d, s in pairs]
        return tuple(results)


class LinearDivergenceSecondOrder(KernelFormula):
    r"""The backward of the backward (docs/tuning.md), along the direction (u, V, σ, ut, Vt, σt) of
    x, W, b, xt, Wt, bt. With R = u Wᵀ + x Vᵀ + σ and the teacher's Rt:

    r = dl = R/τ - q·R/τ,  rt = dlt = Rt/τ - p·Rt/τ
    ds = r - rt (F26), or (1-μ)(μ p/m)(r - rt);  dst = rt - r (F25), or μ((1-μ) q/m)(rt - r)
    k = q·s,  dk = q·(r ∘ s + ds),  ρ = dc = dk + dkt, of the sides that have a score
    dG = q ∘ (r ∘ (s - k) + ds - dk), or q ∘ r - p ∘ rt without a score;  Q = dΔ = γ dG/τ.

    (`DivergenceInputs`, γ, direction (`PairValues`), which gradients are needed) -> ρ (N, 1) and
    the gradients of Σ γ ρ (`PairValues`):  dx = Q W + Δ V, dW = Qᵀ x + Δᵀ u, db = Σ_rows Q.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *tensors, needs_gradient = inputs
        ρ, *gradients = kernels.divergence_second_order(*tensors, list(needs_gradient))
        return ρ, *PairValues(*gradients).select(needs_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        *tensors, ctx.needs_gradient = inputs
        _save(ctx, tensors[:INPUT_COUNT], *tensors[INPUT_COUNT:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Third order, with the logits in memory."""
        arguments = _restore_arguments(ctx)
        places = [i for i, _ in enumerate(arguments) if ctx.needs_input_grad[i]]
        return *pull_back(compute_second_order, arguments, places, cotangents), None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        """Third order, with the logits in memory."""
        arguments = _restore_arguments(ctx)
        has_output = True, *ctx.needs_gradient
        return push_forward(compute_second_order, arguments, tangents, has_output)


def _make_rows(inputs: DivergenceInputs) -> Tensor:
    """A tensor of the shape and type of c."""
    dtype = kernels.choose_divergence_dtype(inputs)
    return inputs.x.new_empty((inputs.x.shape[0], 1), dtype=dtype)


def _pad(gradients: Any) -> tuple[Any, ...]:
    """`PairValues` in the order of `DivergenceInputs`, None for what has no derivative."""
    return *gradients, *[None] * (INPUT_COUNT - VALUE_COUNT)


def _scale(dC: Tensor, gradients: PairValues, inputs: DivergenceInputs) -> PairValues:
    """dC times the gradients, in the inputs' types; an eager step overwrites them.

    Where dC may be infinite, gradients from ignored rows alone are set to 0.
    """
    keep = inputs.keep
    any_kept = None if keep is None else keep.any()

    def scale(g: Tensor, v: Tensor, is_per_row: bool) -> Tensor:
        if inputs.x.shape[0] or keep is not None:
            g = scale_gradient_(g, dC, keep if is_per_row else any_kept)
        return g.to(v.dtype)

    is_per_row = PairValues(True, False, False, True, False, False)
    return PairValues(
        *(
            None if g is None else scale(g, v, is_row)
            for g, v, is_row in zip(gradients, inputs.values, is_per_row, strict=True)
        )
    )


def _save(ctx: Any, inputs: Any, *others: Any) -> None:
    """Saves `DivergenceInputs` and other tensors."""
    ctx.options = inputs[DIVERGENCE_TENSOR_COUNT:]
    ctx.set_materialize_grads(False)
    save(ctx, *inputs[:DIVERGENCE_TENSOR_COUNT], *others)


def _restore(ctx: Any) -> tuple[DivergenceInputs, tuple[Any, ...]]:
    """`DivergenceInputs` and the tuple of the other tensors that `_save` saved."""
    saved = ctx.saved_tensors  # read once: checkpointing cannot unpack them twice
    tensors, others = saved[:DIVERGENCE_TENSOR_COUNT], saved[DIVERGENCE_TENSOR_COUNT:]
    return DivergenceInputs(*tensors, *ctx.options), others


def _restore_arguments(ctx: Any) -> list[Any]:
    """The same, in the order of the Function's arguments."""
    inputs, others = _restore(ctx)
    return [*inputs, *others]


def _save_for_export(ctx: Any, inputs: Any, output: Any) -> None:
    *flat, _γ, _needs_gradient = inputs
    ctx.options = flat[DIVERGENCE_TENSOR_COUNT:]
    ctx.save_for_backward(*flat[:DIVERGENCE_TENSOR_COUNT])


def _backward_of_export(ctx: Any, γ: Any, *_others: Any) -> Any:
    """The gradients, where an exported program calls the operator itself and not a Function."""
    inputs, _ = _restore(ctx)
    needs = PairValues(*ctx.needs_input_grad[:VALUE_COUNT])
    gradients = LinearDivergenceGradient.apply(*inputs, γ, needs, None)
    return *_pad(gradients), None, None


torch.library.register_autograd(
    "torch_nnmath::divergence", _backward_of_export, setup_context=_save_for_export
)
