"""Affine map, softmax and cross entropy as one formula: the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_nnmath import _torch, kernels
from torch_nnmath._precision import disable_autocast, widen
from torch_nnmath._records import HeadInputs, PerInput, Requests, Upstream
from torch_nnmath.formulas._formula import KernelFormula, requires_grad, save
from torch_nnmath.formulas._unfused_head import compute_rows, compute_second_order, restrict
from torch_nnmath.kernels.dispatch import are_plain_cpu_tensors

vjp: Any = torch.func.vjp  # its annotation allows for three results

NO_GRADIENTS = PerInput(*[False] * 5)


class LinearCrossEntropy(KernelFormula):
    r"""F14, F15: c = F13(v), z = W x + b;  δ = (1/ln β)(T a - t):  dW = δ xᵀ, dx = Wᵀ δ, db = δ;
    dc/dt = (1/ln β)(lse(v) - v). Here v = z, or with a cap κ F19(z), whose slope is a factor of δ.

    For t = e_y c is -F22. The other results are q = F20(v) and h = F21(v), for which δ has
    2 lse(v) a and -(1/ln β) a ∘ (l - a·l) more (F23). For a weight p = 1 without a class, t = 0 and
    T = 1: c is (1/ln β) lse(v).

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
        base: float,
        cap: float | None,
        requests: Requests,
    ) -> Any:
        inputs = x, W, b, y, p, t, keep, base, cap
        outputs = kernels.head(*inputs, None, None, None, None, list(requests), [False] * 5)
        return _select_rows(outputs, requests)

    @classmethod
    def unfused(cls, *inputs: Any) -> Any:
        *flat, requests = inputs
        return *compute_rows(HeadInputs.from_flat(flat), requests), None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        *flat, _ = inputs
        _, lse, _, entropy, predicted, sums = outputs
        ctx.has_entropy = entropy is not None
        ctx.mark_non_differentiable(*(v for v in (lse, predicted, sums) if v is not None))
        _save(ctx, flat, sums)

    @staticmethod
    def backward(ctx: Any, γ: Any, _: None, ω: Any, η: Any, *rest: None) -> Any:
        if γ is None:
            if ω is None and η is None:
                return (None,) * 10
            γ = torch.zeros_like(η if ω is None else ω)
        inputs, (sums,) = _restore(ctx)
        needs = PerInput.from_flat(ctx.needs_input_grad)
        gradients = LinearCrossEntropyGradient.apply(*inputs.flat(), γ, ω, η, sums, needs, None)
        return *PerInput(*gradients).flat(), None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        inputs, _ = _restore(ctx)
        direction, one = PerInput.from_flat(tangents), widen(inputs.x.new_ones(len(inputs.x), 1))
        upstream = Upstream(one, None, one if ctx.has_entropy else None)
        dc, dq, dh, *_rest = LinearCrossEntropySecondOrder.apply(
            *inputs.flat(), *upstream, *direction, NO_GRADIENTS
        )
        return dc, None, dq, dh, None, None


class LinearCrossEntropyCost(Function):
    r"""F3 of F14, F15: C = (1/n) Σ c + ω Σ q;  dC/dx, dC/dW, dC/db, dC/dp, dC/dt are those of
    Σ γ c + ω q with γ = 1/n (F15 batch).

    The forward computes these gradients along with C: three matrix products instead of four. The
    backward multiplies them by dC. (n, ω, `HeadInputs` flat, `Requests`, which gradients are
    needed) -> C, and without derivative lse, entropy and predicted class of each row, and the
    gradients. ω may be None.
    """

    @staticmethod
    def forward(n: Any, ω: Any, *inputs: Any) -> Any:
        *flat, requests, needs = inputs
        outputs = kernels.head(*flat, 1 / n, ω, None, None, list(requests), list(needs))
        c, lse, q, entropy, predicted, _ = _select_rows(outputs, requests)
        C = c.sum() / n if ω is None else c.sum() / n + ω * q.sum()
        return C, lse, entropy, predicted, *_select_gradients(outputs, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        n, ω, *flat, _, _ = inputs
        ctx.gradients = PerInput(*outputs[4:])
        ctx.mark_non_differentiable(*(v for v in outputs[1:] if v is not None))
        _save(ctx, flat, n, ω)

    @staticmethod
    def backward(ctx: Any, dC: Tensor | None, *_: None) -> Any:
        if dC is None:
            return (None,) * 13
        inputs, (n, ω) = _restore(ctx)
        needs = PerInput.from_flat(ctx.needs_input_grad[2:])
        gradients = None
        if torch.compiler.is_compiling():
            gradients = _scale(dC, ctx.gradients.only(needs), inputs)
        elif _may_scale(dC):
            taken = LinearCrossEntropyCost._take_gradients(ctx, needs, inputs, n, ω)
            gradients = _scale(dC, taken, inputs)
        if gradients is None or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
            shape = len(inputs.x), 1
            γ, ω = (dC / n).expand(shape), None if ω is None else (dC * ω).expand(shape)
            upstream = γ, ω, None
            gradients = PerInput(
                *LinearCrossEntropyGradient.apply(*inputs.flat(), *upstream, None, needs, gradients)
            )
        return None, None, *gradients.flat(), None, None

    @staticmethod
    def _take_gradients(ctx: Any, needs: PerInput, inputs: HeadInputs, n: Any, ω: Any) -> PerInput:
        """The gradients for dC = 1, which the backward may overwrite: the forward's, once.

        Later backwards through the same graph recompute them.
        """
        gradients = ctx.gradients.only(needs)
        ctx.gradients = ctx.gradients.only(PerInput(*(not need for need in needs)))
        if any(need and g is None for need, g in zip(needs, gradients, strict=True)):
            outputs = kernels.head(*inputs.flat(), 1 / n, ω, None, None, [False] * 2, list(needs))
            gradients = _select_gradients(outputs, needs)
        return gradients

    @staticmethod
    def needed_gradients(n: Any, inputs: HeadInputs) -> PerInput | None:
        """Which gradients the forward should compute; None if this class may not be used.

        A transform would not see how the gradients depend on the inputs. An exported program
        differentiates the operator.
        """
        if _torch.is_transformed() or torch.compiler.is_exporting() or requires_grad(n):
            return None
        needs = PerInput(*map(requires_grad, PerInput.from_flat(inputs.flat())))
        return needs if torch.is_grad_enabled() and any(needs) else None


class LinearCrossEntropyGradient(KernelFormula):
    r"""F15 batch: the gradients of Σ γ c + ω q + η h in x, W, b, p, t.

    (`HeadInputs` flat, `Upstream`, sums or None, which gradients are needed, `gradients`) ->
    `PerInput`. ω and η may be None. If `gradients` are given, the forward returns them.
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
        base: float,
        cap: float | None,
        γ: Any,
        ω: Any,
        η: Any,
        sums: Any,
        needs: PerInput,
        gradients: PerInput | None,
    ) -> Any:
        if gradients is None:
            inputs = x, W, b, y, p, t, keep, base, cap
            outputs = kernels.head(*inputs, γ, ω, η, sums, [False] * 2, list(needs))
            gradients = _select_gradients(outputs, needs)
        return tuple(gradients.only(needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, gradients: Any) -> None:
        *flat, γ, ω, η, _, ctx.needs, _ = inputs
        _save(ctx, flat, γ, ω, η)

    @staticmethod
    def backward(ctx: Any, *direction: Tensor | None) -> Any:
        inputs, upstream = _restore(ctx)
        needs = PerInput.from_flat(ctx.needs_input_grad)
        ρ_c, ρ_q, ρ_h, *gradients = LinearCrossEntropySecondOrder.apply(
            *inputs.flat(), *upstream, *direction, needs
        )
        _, ω, _ = upstream
        ρ_q = None if ω is None else ρ_q
        return *PerInput(*gradients).flat(), ρ_c, ρ_q, ρ_h, None, None, None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        inputs, upstream = _restore(ctx)
        direction, (dγ, dω, dη) = PerInput.from_flat(tangents), tangents[9:12]
        results: Any = [None] * 5
        if any(d is not None for d in (dγ, dω, dη)):
            γ, _, _ = upstream
            dγ = torch.zeros_like(γ) if dγ is None else dγ
            results = LinearCrossEntropyGradient.apply(
                *inputs.flat(), dγ, dω, dη, None, ctx.needs, None
            )
        if any(d is not None for d in direction):
            _, _, _, *second = LinearCrossEntropySecondOrder.apply(
                *inputs.flat(), *upstream, *direction, ctx.needs
            )
            pairs = zip(results, second, strict=True)
            results = [s if d is None else d + s for d, s in pairs]
        return tuple(results)


class LinearCrossEntropySecondOrder(KernelFormula):
    r"""F15 batch, "then": along the direction (u, V, s, π, τ) of x, W, b, p, t, with z = W x + b,
    l = v - lse(v), G = a ∘ B - γ' t and γ' = γ/ln β, η' = η/ln β, B = γ' T + 2 ω lse - η'(l - a·l)

    R = U Wᵀ + X Vᵀ + s,  r = (1 - (v/κ)²) ∘ R, which is R without a cap, as here Δ = G:
    ρ_c = dc = (1/ln β)((T a - t)·r + (lse - v)·t'),  ρ_q = dq = 2 lse a·r,
    ρ_h = dh = -(1/ln β)(a ∘ (l - a·l))·r;
    dG = a ∘ ((r - a·r) ∘ (B - η') + γ' T' + 2 ω a·r - η ρ_h) - γ' t',
    Δ = (1 - (v/κ)²) ∘ G,  Q = dΔ = (1 - (v/κ)²) ∘ dG - (2/κ²) v ∘ G ∘ r.

    (`HeadInputs` flat, `Upstream`, direction (`PerInput`), which gradients are needed) -> ρ_c, ρ_q,
    ρ_h (None without η) and the gradients of Σ γ ρ_c + ω ρ_q + η ρ_h (`PerInput`):
    Q W + Δ V in x, Qᵀ X + Δᵀ U in W, Σ_rows Q in b, γ'(a·r - r) in t.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *tensors, needs = inputs
        η = tensors[11]
        ρ_c, ρ_q, ρ_h, *gradients = kernels.head_second_order(*tensors, list(needs))
        return ρ_c, ρ_q, None if η is None else ρ_h, *PerInput(*gradients).only(needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        *flat, ctx.needs = inputs
        _save(ctx, flat[:9], *flat[9:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Third order, with the logits in memory."""
        tensors = _flat_tensors(ctx)
        needed = [i for i, need in enumerate(ctx.needs_input_grad[:17]) if need]
        f = restrict(compute_second_order, tensors, needed, [c is not None for c in cotangents])
        with disable_autocast(tensors[0]):
            _, pullback = vjp(f, *(tensors[i] for i in needed))
            gradients = pullback(tuple(c for c in cotangents if c is not None))
        by_place = dict(zip(needed, gradients, strict=True))
        return *(by_place.get(i) for i in range(17)), None

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        """Third order: the pullback is linear, so its own pullback is the tangent map."""
        tensors = _flat_tensors(ctx)
        has_output = True, True, tensors[11] is not None, *ctx.needs
        moved = [i for i, d in enumerate(tangents[:17]) if isinstance(d, Tensor)]
        f = restrict(compute_second_order, tensors, moved, has_output)
        with disable_autocast(tensors[0]):
            values, pullback = vjp(f, *(tensors[i] for i in moved))
            zeros = tuple(torch.zeros_like(v) for v in values)
            _, pushforward = vjp(lambda c: pullback(c), zeros)
            (changes,) = pushforward(tuple(tangents[i] for i in moved))
        results = iter(changes)
        return tuple(next(results) if has else None for has in has_output)


def _select_rows(outputs: Any, requests: Requests) -> tuple[Any, ...]:
    """`RowResults` and sums of the operator's outputs, None for what was not requested."""
    loss, lse, z_loss, entropy, predicted, sums, *_ = outputs
    entropy = entropy if requests.entropy else None
    return loss, lse, z_loss, entropy, predicted if requests.predicted else None, sums


def _select_gradients(outputs: Any, needs: PerInput) -> PerInput:
    """The gradients among the operator's outputs, None for those that are not needed."""
    return PerInput(*outputs[6:]).only(needs)


def _may_scale(dC: Tensor) -> bool:
    """Whether the gradients for dC = 1 may be multiplied by dC.

    An infinite dC goes to the kernel instead, which keeps it from the ignored rows. So does a batch
    and whatever a transform sees.
    """
    if are_plain_cpu_tensors(dC):
        return bool(dC.isfinite())
    return not (_torch.is_transformed() or _torch.is_legacy_batch(dC))


def _scale(dC: Tensor, gradients: PerInput, inputs: HeadInputs) -> PerInput:
    """dC times the gradients, in the inputs' types; an eager step on the CPU overwrites them.

    Elsewhere dC may be infinite, since looking at it would wait for the device: what comes from
    ignored rows alone stays 0.
    """
    x, _, _, _, keep, *_ = inputs
    is_plain = are_plain_cpu_tensors(dC)

    def scale(g: Tensor, v: Tensor, is_per_row: bool) -> Tensor:
        if is_plain:
            g = g if dC == 1 else g.mul_(dC)
        elif keep is None:
            g = g * dC if len(x) else g
        else:
            g = torch.where(keep if is_per_row else keep.any(), g * dC, 0)
        return g.to(v.dtype)

    is_per_row = PerInput(True, False, False, True, inputs.target.t is not None)
    values = PerInput.from_flat(inputs.flat())
    return PerInput(
        *(
            None if g is None else scale(g, v, per_row and len(g) == len(x))
            for g, v, per_row in zip(gradients, values, is_per_row, strict=True)
        )
    )


def _save(ctx: Any, flat: Any, *more: Any) -> None:
    """Saves `HeadInputs` and more tensors."""
    *tensors, ctx.base, ctx.cap = flat
    ctx.set_materialize_grads(False)
    save(ctx, *tensors, *more)


def _restore(ctx: Any) -> tuple[HeadInputs, tuple[Any, ...]]:
    """What `_save` saved."""
    saved = ctx.saved_tensors  # read once, since checkpointing unpacks no second time
    return HeadInputs.from_flat((*saved[:7], ctx.base, ctx.cap)), saved[7:]


def _flat_tensors(ctx: Any) -> list[Any]:
    inputs, more = _restore(ctx)
    return [*inputs.flat(), *more]


def _save_for_export(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.has_entropy = inputs[13][0]
    *tensors, ctx.base, ctx.cap = inputs[:9]
    ctx.save_for_backward(*tensors)


def _backward_of_export(ctx: Any, γ: Any, _: Any, ω: Any, η: Any, *rest: Any) -> Any:
    """F15 batch, where an exported program calls the operator itself and not a Function."""
    inputs, needs = _restore(ctx)[0], PerInput.from_flat(ctx.needs_input_grad)
    η = η if ctx.has_entropy else None
    gradients = LinearCrossEntropyGradient.apply(*inputs.flat(), γ, ω, η, None, needs, None)
    return *PerInput(*gradients).flat(), *[None] * 6


torch.library.register_autograd(
    "torch_nnmath::head", _backward_of_export, setup_context=_save_for_export
)
