"""What every formula shares: evaluation, forward mode, batching, saving, precision."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_nnmath import _torch
from torch_nnmath._precision import HALF, widen
from torch_nnmath.kernels.dispatch import LossKernel, accelerate_with


class _TangentRule:
    """`Function.jvp`: the formula's `tangent`, hidden from Dynamo.

    Dynamo refuses a Function that overrides `jvp`. It does not need one: it traces forward and
    backward, and PyTorch differentiates what it traced.
    """

    def __get__(self, instance: object, owner: type[Formula]) -> Callable[..., Any]:
        if torch.compiler.is_compiling() or _torch.is_dynamo_tracing():
            return Function.jvp
        return functools.partial(_apply_tangent_rule, owner.tangent)


def _apply_tangent_rule(tangent: Callable[..., Any], ctx: Any, *tangents: Any) -> Any:
    """Applies a tangent rule so that an outer forward mode differentiates it.

    PyTorch turns forward mode off around a `jvp`, at every level of nesting: a jvp of a jvp would
    silently lose its second term. Here it is on. The saved tensors come without the tangent of the
    innermost level, since the rule itself accounts for that.
    """
    with _torch.enable_forward_mode():
        return tangent(_ContextWithoutTangents(ctx), *tangents)


class _ContextWithoutTangents:
    """A context whose saved tensors have no tangent at the innermost level."""

    def __init__(self, ctx: Any):
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        saved = self._ctx.saved_tensors
        return tuple(x if x is None else _torch.drop_tangent(x) for x in saved)


class Formula(Function):
    """A formula: `forward`, hand-written `backward`, and `tangent` for forward mode.

    `tangent(ctx, *tangents)` gets a tangent, or None, for each input and returns the output's.
    Backward and tangent consist of differentiable operations and of other formulas, so that
    derivatives of every order follow. PyTorch derives the batching rule from the three, but only
    where no argument is a tuple or a list.
    """

    generate_vmap_rule = True
    jvp = _TangentRule()
    kernel: LossKernel | None = None  # of a loss

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "forward" in vars(cls):
            # `apply` calls `inspect.signature`, which takes 5 µs less where it finds this
            forward: Any = cls.forward
            forward.__signature__ = inspect.signature(forward)

    @classmethod
    def evaluate(cls, *inputs: Any) -> Any:
        """Like `apply`, but skips its Python overhead, and autograd where no gradient is needed.

        Functions and backwards call this; `apply` is for a Function whose inputs are known to need
        gradients. `unfused` runs where PyTorch takes no Function: where Dynamo traces a transform,
        and under `functionalize`.
        """
        if torch.compiler.is_compiling():
            if _torch.is_transformed():  # traced inside a transform
                return cls.unfused(*inputs)
            if not torch.is_grad_enabled() or not any(map(requires_grad, inputs)):
                return cls.forward(*inputs)  # traced without a derivative
        elif not _torch.is_transformed():
            if not torch.is_grad_enabled():  # eager without a derivative
                return cls.forward(*inputs)
            return _torch.apply_without_signature(cls, inputs)  # eager
        elif _torch.is_functionalized():
            return cls.unfused(*inputs)
        return cls.apply(*inputs)  # an eager transform, or traced with a derivative

    @classmethod
    def unfused(cls, *inputs: Any) -> Any:
        """The forward in operations that PyTorch can differentiate."""
        return cls.forward(*inputs)

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("this formula has no tangent rule")


class SymmetricJacobian(Formula):
    """An activation a = f(z, *options) whose Jacobian J is symmetric and can be computed from a.

    Backward and tangent are both `product(a, v, *options)` = J v.
    """

    product: Callable[..., Tensor]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def backward(ctx: Any, da: Tensor) -> Any:
            (a,) = ctx.saved_tensors
            if not ctx.options:
                return cls.product(a, da)
            return cls.product(a, da, *ctx.options), *[None] * len(ctx.options)

        def tangent(ctx: Any, dz: Tensor, *_: None) -> Tensor:
            (a,) = ctx.saved_tensors
            return cls.product(a, dz, *ctx.options)

        # functions of each class, since Dynamo refuses a backward that is a classmethod
        cls.backward, cls.tangent = staticmethod(backward), staticmethod(tangent)  # type: ignore[method-assign]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, a: Tensor) -> None:
        ctx.options = inputs[1:]
        save(ctx, a)


class RowFunction(Formula):
    """One number c for each row of z (*, n, *), n at `dim`: c = f(z, dim, *options).

    Its derivative is `gradient(z, dim, *options)` = dc/dz; `gradient` gets z widened. On a GPU
    `gpu_kernel` computes both.
    """

    gradient: Callable[..., Tensor]
    gpu_kernel: LossKernel

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        @accelerate_with(cls.gpu_kernel.gradient, is_gpu_only=True)
        def scale_gradient(dc: Tensor, z: Tensor, *options: Any) -> Tensor:
            return (dc * cls.gradient(widen(z), *options)).to(z.dtype)

        def backward(ctx: Any, dc: Tensor) -> Any:
            (z,) = ctx.saved_tensors
            return scale_gradient(dc, z, *ctx.options), *[None] * len(ctx.options)

        def tangent(ctx: Any, dz: Tensor, *_: None) -> Tensor:
            (z,) = ctx.saved_tensors
            return (cls.gradient(widen(z), *ctx.options) * dz).sum(ctx.options[0], keepdim=True)

        cls.backward, cls.tangent = staticmethod(backward), staticmethod(tangent)  # type: ignore[method-assign]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, c: Tensor) -> None:
        ctx.options = inputs[1:]
        save(ctx, inputs[0])


class KernelFormula(Formula):
    """A formula computed by an operator, from which PyTorch cannot derive a batching rule.

    The rule here applies the formula to each member of the batch. That is correct, and uses the
    memory of one member at a time, however deeply transforms are nested.
    """

    generate_vmap_rule = False

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def apply_to_member(i: int) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return cls.apply(*(x if d is None else _select(x, d, i) for x, d in pairs))

        members = [apply_to_member(i) for i in range(info.batch_size)]
        if not isinstance(members[0], tuple):
            return torch.stack(members), 0
        outputs = [None if m[0] is None else torch.stack(m) for m in zip(*members, strict=True)]
        return tuple(outputs), tuple(None if out is None else 0 for out in outputs)


def _select(x: Any, dim: Any, i: int) -> Any:
    return x.select(dim, i) if isinstance(x, Tensor) else x


def save(ctx: Any, *tensors: Tensor | None, backward: Sequence[Tensor | None] = ()) -> None:
    """Saves `tensors` for the tangent, and `backward`, by default the same, for the backward.

    A transform gets `tensors` for both: PyTorch's vmap keeps the batch axes of only one list.
    """
    is_transformed = _torch.is_transformed()
    ctx.save_for_backward(*(tensors if is_transformed or not backward else backward))
    # only a transform has a tangent; Dynamo does not know `save_for_forward`
    if is_transformed and not torch.compiler.is_compiling():
        ctx.save_for_forward(*tensors)


def requires_grad(x: Any) -> bool:
    """Whether x is a tensor that requires a gradient."""
    return isinstance(x, Tensor) and x.requires_grad


def round_once(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates `product(a, v)`: half types are computed in float32, and the result rounded."""

    @functools.wraps(product)
    def rounded_product(a: Tensor, v: Tensor, *options: Any) -> Tensor:
        if a.dtype in HALF or v.dtype in HALF:
            return product(widen(a), widen(v), *options).to(v.dtype)
        return product(a, v, *options)

    return rounded_product


def sum_present(*terms: Tensor | None) -> Any:
    """The sum of the terms that are not None; None if all are."""
    present = [term for term in terms if term is not None]
    return functools.reduce(torch.add, present) if present else None


def sum_last_axes(x: Tensor, axes: int) -> Tensor:
    """Sums over the last `axes` axes, keeping them with size 1."""
    return x.sum(tuple(range(-axes, 0)), keepdim=True) if axes else x


def mask_ignored(keep: Tensor | None, x: Tensor) -> Tensor:
    """x, 0 where keep is False."""
    return x if keep is None else x.masked_fill(~keep, 0)
