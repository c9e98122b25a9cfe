"""The machinery that every formula shares: forward mode, batching, saving, precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch._guards import CompileContext
from torch.autograd import Function, forward_ad

from torch_nnmath._precision import HALF, wide
from torch_nnmath.kernels.choice import Kernel, is_transformed, requires_grad


class _TangentRule:
    """`Function.jvp`: the formula's `tangent`, out of sight of Dynamo.

    Dynamo refuses a Function that overrides `jvp`, and does not need it: it traces forward and
    backward, and differentiates what it traced. (In its own Python, that which looks at the class,
    `is_compiling` is true from PyTorch 2.13 on.)
    """

    def __get__(self, instance: object, owner: type[Formula]) -> Callable[..., Any]:
        if torch.compiler.is_compiling() or CompileContext.try_get():
            return Function.jvp
        return functools.partial(_differentiable, owner.tangent)


def _differentiable(tangent: Callable[..., Any], ctx: Any, *tangents: Any) -> Any:
    """Applies a tangent rule so that an outer forward mode sees it.

    PyTorch turns forward mode off around a rule, for every level of nesting: a jvp of a jvp would
    silently lose its second term. So it is turned on again, over saved tensors without the tangent
    of the innermost level, which the rule itself accounts for.
    """
    with forward_ad._set_fwd_grad_enabled(True):  # nothing public does this
        return tangent(_Primals(ctx), *tangents)


class _Primals:
    """A context whose saved tensors carry no tangent of the current level."""

    def __init__(self, ctx: Any):
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(x if x is None else _primal(x) for x in self._ctx.saved_tensors)


def _primal(x: Tensor) -> Tensor:
    """x without its tangent; also a batch, which PyTorch's `unpack_dual` does not take."""
    functorch = torch._C._functorch  # there is no public way to look into a batch
    if not functorch.is_batchedtensor(x):
        return forward_ad.unpack_dual(x).primal
    dim, level = functorch.maybe_get_bdim(x), functorch.maybe_get_level(x)
    return functorch._add_batch_dim(_primal(functorch.get_unwrapped(x)), dim, level)


class Formula(Function):
    """A formula of the document: `forward`, `backward` by hand, and `tangent` for forward mode.

    `tangent(ctx, *tangents)` gets a tangent, or None, for each input and returns the output's.
    A backward or a tangent consists of differentiable operations and of other formulas, so that
    derivatives of every order follow from it; the batching rule is derived from the three (by
    PyTorch, which does so only where no argument is a tuple or a list).
    """

    generate_vmap_rule = True
    jvp = _TangentRule()
    kernel: Kernel | None = None  # of a loss, if there is one

    @classmethod
    def of(cls, *inputs: Any) -> Any:
        """The formula's value: `apply`, save where no gradient is wanted or a compiler traces.

        Inside a transform Dynamo cannot carry a Function (its vmap raises, its gradient may miss an
        input), so that PyTorch differentiates what it can trace: `in_the_open`. Where no gradient
        is wanted Dynamo calls `forward`, but miscounts its arguments if it takes `*inputs`.
        """
        if torch.compiler.is_compiling():
            if is_transformed():
                return cls.in_the_open(*inputs)
            if not torch.is_grad_enabled() or not any(map(requires_grad, inputs)):
                return cls.forward(*inputs)
        elif not is_transformed():
            if not torch.is_grad_enabled():
                return cls.forward(*inputs)
            # what `apply` comes to, without looking for default arguments in the signature
            plain_apply: Any = super(Function, cls).apply  # type: ignore[misc]  # untyped
            return plain_apply(*unwrap_dead_wrappers(inputs))
        return cls.apply(*inputs)

    @classmethod
    def in_the_open(cls, *inputs: Any) -> Any:
        """The forward in operations that PyTorch can differentiate."""
        return cls.forward(*inputs)

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("this formula has no tangent rule")


class KernelFormula(Formula):
    """A formula computed by an operator of ours, which cannot be traced for its batching rule.

    The rule applies the formula to each member of the batch: right, and flat in memory, however
    deeply transforms are nested.
    """

    generate_vmap_rule = False

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def member(i: int) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return cls.apply(*(x if d is None else _select(x, d, i) for x, d in pairs))

        members = [member(i) for i in range(info.batch_size)]
        if not isinstance(members[0], tuple):
            return torch.stack(members), 0
        outputs = [None if m[0] is None else torch.stack(m) for m in zip(*members, strict=True)]
        return tuple(outputs), tuple(None if out is None else 0 for out in outputs)


def _select(x: Any, dim: Any, i: int) -> Any:
    return x.select(dim, i) if isinstance(x, Tensor) else x


def save(ctx: Any, *tensors: Tensor | None, backward: Sequence[Tensor | None] = ()) -> None:
    """Saves for backward, where it may need less, and for the tangent, unknown to Dynamo."""
    ctx.save_for_backward(*(backward or tensors))
    if not torch.compiler.is_compiling():
        ctx.save_for_forward(*tensors)


def rounded_once(
    product: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """Makes `product(a, v)` compute in float32 where a or v is half, and round its result once."""

    @functools.wraps(product)
    def rounded(a: Tensor, v: Tensor, *options: Any) -> Tensor:
        if a.dtype in HALF or v.dtype in HALF:
            return product(wide(a), wide(v), *options).to(v.dtype)
        return product(a, v, *options)

    return rounded


def total(*terms: Tensor | None) -> Any:
    """The sum of the terms that are there; None if none is."""
    present = [term for term in terms if term is not None]
    return functools.reduce(torch.add, present) if present else None


def summed(x: Tensor, axes: int) -> Tensor:
    """The sum over the last axes, which stay with size 1."""
    return x.sum(tuple(range(-axes, 0)), keepdim=True) if axes else x
