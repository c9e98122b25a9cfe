"""How the checks call a case: copies of its inputs, and its derivatives by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_nnmath import _torch
from torch_nnmath.testing._case import Case
from torch_nnmath.testing._functions import Tensors
from torch_nnmath.testing._point import dot

# Inputs, to which the function must not write


def copy_inputs(case: Case) -> Tensors:
    """Returns protected copies of the differentiable inputs, without requires_grad."""
    pairs = zip(case.labels, case.differentiable_inputs, strict=True)
    return tuple(case.protect(label, x.clone()) for label, x in pairs)


def copy_tangents(case: Case) -> Tensors:
    """Returns protected copies of the tangents."""
    triples = zip(case.labels, case.tangents, case.differentiable_inputs, strict=True)
    return tuple(
        case.protect(f"the tangent of {label}", t.to(x.dtype, copy=True)) for label, t, x in triples
    )


def make_duals(case: Case, xs: Sequence[Tensor], argnums: set[int] | None = None) -> Tensors:
    """Returns the inputs as dual numbers; with argnums, only these get a tangent."""
    return tuple(
        forward_ad.make_dual(x, t) if argnums is None or i in argnums else x
        for i, (x, t) in enumerate(zip(xs, copy_tangents(case), strict=True))
    )


def stack_members(case: Case) -> Tensors:
    """Returns each tensor of the batch members, stacked along a new first dimension."""
    columns = zip(*(member.tensors for member in case.batch_members), strict=True)
    return tuple(case.protect("a batch of inputs", torch.stack(xs)) for xs in columns)


def make_strided(x: Tensor) -> Tensor:
    """Returns a copy of x that in memory has gaps and its dimensions in reverse order."""
    wide = x.new_zeros([2 * n for n in reversed(x.shape)])
    view = wide.permute(tuple(reversed(range(x.ndim))))[(slice(None, None, 2),) * x.ndim]
    return view.copy_(x)


def make_large(u: Tensor) -> Tensor:
    """Returns 64 u, which float16 can still hold: no backward may clip it."""
    return 64 * u


def expand_constant(u: Tensor) -> Tensor:
    """Returns one number expanded to the shape of u, with strides of 0."""
    return u.new_tensor(0.7).expand_as(u)


@torch.no_grad()
def edit_in_place(x: Tensor) -> None:
    """Changes the values of x in place."""
    if x.is_floating_point():
        x.mul_(1.5).add_(0.25)
    elif x.ndim:
        x.copy_(x.flip(0))


# Derivatives


def compute_gradients(
    case: Case,
    outputs: Sequence[Tensor],
    xs: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None,
    **options: Any,
) -> list[Tensor | None]:
    """Returns the outputs' gradients in xs by `torch.autograd.grad`, and retains the graph.

    A gradient is None where autograd finds no dependence. The upstream gradients are protected.
    """
    pairs = zip(outputs, upstream or [u.clone() for u in case.upstream], strict=True)
    differentiable = [(y, u.to(y.dtype)) for y, u in pairs if y.requires_grad]
    if not differentiable:
        return [None] * len(xs)
    ys, us = zip(*differentiable, strict=True)
    for u in us:
        case.protect("the upstream gradient", u)
    options = {"retain_graph": True, "allow_unused": True, **options}
    return list(torch.autograd.grad(ys, xs, us, **options))


def differentiate_gradients(
    case: Case,
    gradients: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    factors: Sequence[float] | None = None,
) -> Sequence[Tensor | None]:
    """Returns the Hessian-vector product: the gradient of Σ tangents · gradients in xs.

    With factors, returns a batch of products, one for each factor times the tangents.
    """
    differentiable = [
        (g, t.to(g.dtype))
        for g, t in zip(gradients, case.tangents, strict=True)
        if g is not None and g.requires_grad
    ]
    if not differentiable:
        return [None] * len(xs)
    gs, ts = zip(*differentiable, strict=True)
    is_batched = factors is not None
    if factors is not None:
        ts = tuple(torch.stack([factor * t for factor in factors]) for t in ts)
    return torch.autograd.grad(
        gs, xs, ts, retain_graph=True, allow_unused=True, is_grads_batched=is_batched
    )


def make_loss(f: Callable[..., Tensors], upstream: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Returns the function Σ upstream · f, a scalar."""

    def loss(*xs: Tensor) -> Tensor:
        return dot(upstream, f(*xs))

    return loss


def make_gradient(case: Case) -> Callable[..., Tensors]:
    """Returns the gradient of Σ upstream · f as a function of all tensors."""
    return torch.func.grad(make_loss(case.call_tensors, case.upstream), case.tensor_argnums)


def compare_first_order(case: Case, outputs: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
    """Compares the outputs, and their gradients with respect to xs, with the exact ones."""
    case.compare_outputs(outputs)
    case.compare_gradient(compute_gradients(case, outputs, xs))


class CaseModule(torch.nn.Module):
    """The case as a module: `forward` takes the input at `first`, the other inputs are parameters.

    A parameter `scale` multiplies the input, so that there is always a parameter.
    """

    def __init__(self, case: Case, first: int):
        super().__init__()
        self.case, self.first = case, first
        x = case.inputs[first]
        self.scale = torch.nn.Parameter(torch.ones((), dtype=x.dtype, device=x.device))
        for p in case.positions:
            if p != first:
                self.register_parameter(f"p{p}", torch.nn.Parameter(case.inputs[p].clone()))

    def forward(self, x: Tensor) -> Tensors:
        arguments = (
            self.scale * x if p == self.first else getattr(self, f"p{p}")
            for p in self.case.positions
        )
        return self.case.call(*arguments)


# The autograd graph


def find_autograd_functions(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Yields the subclasses of `torch.autograd.Function` in the outputs' graph."""
    visited, stack = set(), [y.grad_fn for y in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in visited:
            visited.add(node)
            stack += [next_node for next_node, _ in node.next_functions]
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                yield _torch.get_node_function(node)


@contextmanager
def record_dtype_errors(function: Any, messages: list[str]) -> Iterator[None]:
    """Appends a message for each gradient of the Function whose dtype is not its input's."""
    name = "backward" if function.vjp is torch.autograd.Function.vjp else "vjp"
    own_method, method = function.__dict__.get(name), getattr(function, name)

    def record(ctx: Any, *upstream: Any) -> Any:
        result = method(ctx, *upstream)
        gradients = result if isinstance(result, tuple) else (result,)
        pairs = zip(gradients, ctx.needs_input_grad, strict=False)
        needed = [g for g, is_needed in pairs if is_needed]
        edges = [(node, index) for node, index in ctx.next_functions if node is not None]
        for g, edge in zip(needed, edges, strict=True):
            expected = _torch.get_gradient_dtype(*edge)
            if g is not None and g.dtype != expected:
                messages.append(
                    f"{function.__name__}.{name} returns {g.dtype} for a tensor of {expected}"
                )
        return result

    setattr(function, name, staticmethod(record))
    try:
        yield
    finally:
        if own_method is None:
            delattr(function, name)
        else:
            setattr(function, name, own_method)
