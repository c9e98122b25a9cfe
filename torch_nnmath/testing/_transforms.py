"""The transforms of autograd and of `torch.func`: each a check of a case against the truth.

A check returns if all is right; it raises a finding, or whatever the function itself raises.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

from torch_nnmath.testing._case import Case, Tensors, dot, module_function, real_tensors, same
from torch_nnmath.testing._report import NotApplicable, Wrong


class Transform(NamedTuple):
    """A name, its check, and whether it is one of the essential ones."""

    name: str
    check: Callable[[Case], None]
    quick: bool


ALL: dict[str, Transform] = {}


def transform(name: str, quick: bool = False) -> Callable[..., Any]:
    """Enters a check into the table, under its name."""

    def enter(check: Callable[[Case], None]) -> Callable[[Case], None]:
        ALL[name] = Transform(name, check, quick)
        return check

    return enter


# values and first derivatives


@transform("value", quick=True)
def value(case: Case) -> None:
    """The function's value against the reference's."""
    if not case.referred:
        raise NotApplicable("the truth is its own value: no reference was given")
    case.compare_value(case.f(*case.leaves()))


@transform("gradient", quick=True)
def gradient(case: Case) -> None:
    """`torch.autograd.grad`, with uneven upstream gradients."""
    xs = case.leaves()
    case.compare_gradient(grad(case, case.f(*xs), xs))


@transform("frozen inputs", quick=True)
def frozen_inputs(case: Case) -> None:
    """The gradient in each input alone, and in all but it."""
    count = len(case.places)
    if count == 1:
        raise NotApplicable("there is one differentiable input")
    truth = case.pulled(case.upstream)
    every = set(range(count))
    for wanted in [{i} for i in every] + [every - {i} for i in every if count > 2]:
        xs = tuple(x.requires_grad_(i in wanted) for i, x in enumerate(_data(case)))
        got = grad(case, case.f(*xs), [xs[i] for i in sorted(wanted)])
        labels = [case.labels[i] for i in sorted(wanted)]
        what = f"wanted in {' and '.join(labels)} alone, the gradient in {{}}"
        case.compare(got, [truth[i] for i in sorted(wanted)], what, labels=labels)


@transform("types of gradients", quick=True)
def types_of_gradients(case: Case) -> None:
    """Each backward returns gradients of its input's type: autograd would convert them silently."""
    xs = case.leaves()
    outputs = case.f(*xs)
    faults: list[str] = []
    with ExitStack() as stack:
        for function in {*autograd_functions(outputs)}:
            stack.enter_context(_recorded(function, faults))
        grad(case, outputs, xs)
    if faults:
        raise Wrong(faults[0])


@transform("upstream gradients", quick=True)
def upstream_gradients(case: Case) -> None:
    """Upstream gradients that are strided, expanded from one number, ones, and zeros."""
    xs = case.leaves()
    outputs = case.f(*xs)
    for make in (_strided, _expanded, torch.ones_like, torch.zeros_like):
        us = tuple(make(u.to(y.dtype)) for u, y in zip(case.upstream, outputs, strict=True))
        got = grad(case, outputs, xs, us)
        case.compare_gradient(got, us)


@transform("outputs left unused")
def outputs_left_unused(case: Case) -> None:
    """The gradient of each output alone."""
    if len(case.outputs) == 1:
        raise NotApplicable("there is one output")
    xs = case.leaves()
    outputs = case.f(*xs)
    for i in range(len(outputs)):
        if outputs[i].requires_grad:
            us = [u * (i == k) for k, u in enumerate(case.upstream)]
            got = torch.autograd.grad(
                outputs[i], xs, us[i].to(outputs[i].dtype), retain_graph=True, allow_unused=True
            )
            case.compare_gradient(got, us)


@transform("retained graph", quick=True)
def retained_graph(case: Case) -> None:
    """A graph walked three times, with other upstream gradients, accumulating."""
    xs = case.leaves()
    outputs = case.f(*xs)
    factors = (1.0, -2.5, 1.0)
    for factor in factors:
        us = tuple(factor * u for u in case.upstream)
        case.compare_gradient(grad(case, outputs, xs, us), us)
    differentiable = [(y, u) for y, u in zip(outputs, case.upstream, strict=True) if y.grad_fn]
    for factor in factors:
        torch.autograd.backward(
            [y for y, _ in differentiable],
            [factor * u.to(y.dtype) for y, u in differentiable],
            retain_graph=True,
        )
    case.compare_gradient([x.grad for x in xs], tuple(sum(factors) * u for u in case.upstream))


@transform("gradcheck")
def gradcheck(case: Case) -> None:
    """PyTorch's own check, in slow mode."""
    _numerically(torch.autograd.gradcheck, case, fast_mode=False)


@transform("strided inputs", quick=True)
def strided_inputs(case: Case) -> None:
    """Inputs whose entries are not adjacent in memory, nor in order."""
    xs = tuple(_strided(x).requires_grad_() for x in _data(case))
    outputs = case.f(*xs)
    case.compare_value(outputs)
    case.compare_gradient(grad(case, outputs, xs))


@transform("expanded inputs", quick=True)
def expanded_inputs(case: Case) -> None:
    """Inputs with stride 0 give what their copies give."""
    narrow = [x[:1] if x.ndim else x for x in _data(case)]
    xs = tuple(n.expand_as(x).requires_grad_() for n, x in zip(narrow, case.points, strict=True))
    copies = tuple(x.detach().clone().requires_grad_() for x in xs)
    try:
        theirs = case.f(*copies)
    except Exception as error:  # whatever a function raises where it has no value
        raise NotApplicable("the function does not take equal rows") from error
    ours = case.f(*xs)
    case.compare(ours, [y.detach().double() for y in theirs], "output {}", 0)
    wanted = [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(copies, grad(case, theirs, copies), strict=True)
    ]
    truth = [g.double() for g in wanted]
    case.compare(grad(case, ours, xs), truth, "the gradient in {}", labels=case.labels)


@transform("edited before backward", quick=True)
def edited_before_backward(case: Case) -> None:
    """A tensor edited in place between forward and backward: an error, or no effect."""
    for edited in range(len(case.tensor_places) + len(case.outputs)):
        tensors, xs = case.tensor_leaves()
        outputs = case.of_tensors(*tensors)
        target = [*tensors, *outputs][edited]
        try:
            _edit(target)
        except RuntimeError:  # an expanded tensor, or one of several views
            continue
        try:
            got = grad(case, outputs, xs)
        except RuntimeError as error:
            if re.search("modified (by an )?inplace", str(error)):
                continue
            raise
        case.compare_gradient(got)


@transform("checkpoint", quick=True)
def checkpointed(case: Case) -> None:
    """`torch.utils.checkpoint`, non-reentrant."""
    xs = case.leaves()
    outputs = real_tensors(checkpoint(case.f, *xs, use_reentrant=False))
    case.compare_value(outputs)
    case.compare_gradient(grad(case, outputs, xs))


@transform("saved-tensor hooks", quick=True)
def saved_tensor_hooks(case: Case) -> None:
    """`save_on_cpu`, and hooks that save copies; second order through them too."""
    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x.clone()),
    ):
        xs = case.leaves()
        with hooks:
            outputs = case.f(*xs)
            first = grad(case, outputs, xs, create_graph=True)
            case.compare_gradient(first)
        case.compare_second(_grad_of_gradient(case, first, xs))


@transform("no_grad", quick=True)
def no_grad(case: Case) -> None:
    """The value is the same where no gradient is wanted."""
    with torch.no_grad():
        case.compare_value(case.f(*case.leaves()))
    case.compare_value(case.f(*_data(case)))


@transform("inference mode", quick=True)
def inference_mode(case: Case) -> None:
    """`torch.inference_mode`, with inputs from outside and from inside."""
    xs = case.leaves()
    with torch.inference_mode():
        case.compare_value(case.f(*xs))
        case.compare_value(case.f(*(x.clone() for x in xs)))


@transform("autocast bfloat16", quick=True)
def autocast_bfloat16(case: Case) -> None:
    """`torch.autocast` to bfloat16: float32 gradients, near the truth."""
    _autocast(case, torch.bfloat16)


@transform("autocast float16")
def autocast_float16(case: Case) -> None:
    """`torch.autocast` to float16."""
    _autocast(case, torch.float16)


@transform("deterministic algorithms")
def deterministic_algorithms(case: Case) -> None:
    """`torch.use_deterministic_algorithms`, which also fills fresh memory with nan."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        xs = case.leaves()
        outputs = case.f(*xs)
        case.compare_value(outputs)
        first = grad(case, outputs, xs, create_graph=True)
        case.compare_gradient(first)
        case.compare_second(_grad_of_gradient(case, first, xs))
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@transform("default device")
def default_device(case: Case) -> None:
    """`torch.set_default_device`: what the function makes is where its inputs are."""
    xs = case.leaves()
    with torch.device("meta"):
        outputs = case.f(*xs)
        got = grad(case, outputs, xs)
    case.compare_value(outputs)
    case.compare_gradient(got)


# second derivatives and forward mode


@transform("second order", quick=True)
def second_order(case: Case) -> None:
    """Reverse over reverse: the Hessian times a vector, and the derivative in the upstream."""
    xs = case.leaves()
    outputs = case.f(*xs)
    pairs = zip(case.upstream, outputs, strict=True)
    us = tuple(u.to(y.dtype, copy=True).requires_grad_() for u, y in pairs)
    first = grad(case, outputs, xs, us, create_graph=True)
    case.compare_gradient(first)
    case.compare_second(_grad_of_gradient(case, first, xs))
    case.compare_tangent(_grad_of_gradient(case, first, us))


@transform("gradgradcheck")
def gradgradcheck(case: Case) -> None:
    """PyTorch's own check of second derivatives."""
    _numerically(torch.autograd.gradgradcheck, case)


@transform("third order")
def third_order(case: Case) -> None:
    """The third derivative along a direction, by reverse mode three times."""
    xs = case.leaves()
    derivative: Tensor | None = dot(case.upstream, case.f(*xs))
    for _ in range(3):
        if derivative is None or not derivative.requires_grad:
            derivative = None
            break
        gs = torch.autograd.grad(derivative, xs, create_graph=True, allow_unused=True)
        pairs = zip(gs, case.tangents, strict=True)
        terms = [(g * t.to(g.dtype)).sum() for g, t in pairs if g is not None]
        derivative = torch.stack(terms).sum() if terms else None
    case.compare([derivative], [case.third], "the third derivative along a direction", 3)


@transform("forward mode", quick=True)
def forward_mode(case: Case) -> None:
    """Tangents by `torch.autograd.forward_ad`, of all inputs and of each alone."""
    every = set(range(len(case.places)))
    for chosen in [every, *({i} for i in every if len(every) > 1)]:
        tangents = [t * (i in chosen) for i, t in enumerate(case.tangents)]
        with forward_ad.dual_level():
            outputs = case.f(*_duals(case, case.leaves(), chosen))
            primals, got = zip(*map(forward_ad.unpack_dual, outputs), strict=True)
            case.compare_tangent(got, tangents)
            case.compare_value(primals)


@transform("forward over reverse", quick=True)
def forward_over_reverse(case: Case) -> None:
    """The tangent of a gradient."""
    xs = case.leaves()
    with forward_ad.dual_level():
        duals = _duals(case, xs)
        first = grad(case, case.f(*duals), duals)
        unpacked = [None if g is None else forward_ad.unpack_dual(g) for g in first]
        case.compare_gradient([None if u is None else u.primal for u in unpacked])
        case.compare_second([None if u is None else u.tangent for u in unpacked])


@transform("reverse over forward", quick=True)
def reverse_over_forward(case: Case) -> None:
    """The gradient of a tangent."""
    ts = _tangents(case)

    def tangent(*xs: Tensor) -> Tensor:
        return dot(case.upstream, jvp(case.f, xs, ts)[1])

    case.compare_second(torch.func.grad(tangent, _argnums(case))(*_data(case)))


@transform("forward over forward")
def forward_over_forward(case: Case) -> None:
    """The tangent of a tangent, along one direction twice."""
    ts = _tangents(case)

    def first(*xs: Tensor) -> Tensors:
        return jvp(case.f, xs, ts)[1]

    got = jvp(first, _data(case), ts)[1]
    truth = dot(case.tangents, case.second)
    case.compare([dot(case.upstream, got)], [truth], "the second derivative along a direction", 2)


# batches of directions


@transform("batched gradients", quick=True)
def batched_gradients(case: Case) -> None:
    """Several upstream gradients at once, at first and second order."""
    xs = case.leaves()
    outputs = case.f(*xs)
    factors = (1.0, -2.0, 0.5)
    pairs = zip(case.upstream, outputs, strict=True)
    us = [torch.stack([f * u.to(y.dtype) for f in factors]) for u, y in pairs]
    got = grad(case, outputs, xs, us, is_grads_batched=True)
    for i, f in enumerate(factors):
        case.compare_gradient([_at(g, i) for g in got], [f * u for u in case.upstream])
    first = grad(case, outputs, xs, create_graph=True)
    second = _grad_of_gradient(case, first, xs, factors)
    for i, f in enumerate(factors):
        truth = [f * h for h in case.second]
        case.compare([_at(g, i) for g in second], truth, "batched Hessian {}", 2, case.labels)


@transform("batched tangents", quick=True)
def batched_tangents(case: Case) -> None:
    """Several tangents at once."""
    xs, factors = _data(case), (1.0, -2.0, 0.5)
    ts = [torch.stack([f * t for f in factors]) for t in _tangents(case)]
    got = vmap(lambda *t: jvp(case.f, xs, t)[1])(*ts)
    for i, f in enumerate(factors):
        case.compare_tangent([y[i] for y in got], [f * t for t in case.tangents])


# torch.func


@transform("vjp", quick=True)
def vjp_(case: Case) -> None:
    """`torch.func.vjp`."""
    outputs, pull = vjp(case.f, *_data(case))  # type: ignore[misc]
    case.compare_value(outputs)
    pairs = zip(case.upstream, outputs, strict=True)
    us = tuple(case.watch("the upstream gradient", u.to(y.dtype, copy=True)) for u, y in pairs)
    case.compare_gradient(pull(us))


@transform("jvp", quick=True)
def jvp_(case: Case) -> None:
    """`torch.func.jvp`."""
    outputs, tangents = jvp(case.f, _data(case), _tangents(case))  # type: ignore[misc]
    case.compare_value(outputs)
    case.compare_tangent(tangents)


@transform("linearize")
def linearize_(case: Case) -> None:
    """`torch.func.linearize`."""
    outputs, push = linearize(case.f, *_data(case))
    case.compare_value(outputs)
    case.compare_tangent(push(*_tangents(case)))


@transform("jacrev", quick=True)
def jacrev_(case: Case) -> None:
    """`torch.func.jacrev`."""
    _compare_jacobian(case, jacrev(case.f, _argnums(case))(*_data(case)))


@transform("jacfwd", quick=True)
def jacfwd_(case: Case) -> None:
    """`torch.func.jacfwd`."""
    _compare_jacobian(case, jacfwd(case.f, _argnums(case))(*_data(case)))


@transform("hessian", quick=True)
def hessian_(case: Case) -> None:
    """`torch.func.hessian`, forward over reverse."""
    blocks = torch.func.hessian(loss_of(case.f, case.upstream), _argnums(case))(*_data(case))
    got = []
    for row, x in zip(blocks, case.points, strict=True):
        pairs = zip(row, case.tangents, strict=True)
        products = [b.reshape(x.numel(), -1) @ t.to(b.dtype).flatten() for b, t in pairs]
        got.append(torch.stack(products).sum(0).view(x.shape))
    case.compare_second(got)


@transform("vmap", quick=True)
def vmap_(case: Case) -> None:
    """`vmap` over all inputs, and over each alone along its last dimension."""
    members = case.members
    stacked = _stacked(case, members)
    for i, member in enumerate(members):
        member.compare_value([y[i] for y in vmap(case.of_tensors)(*stacked)])
    for k, place in enumerate(case.tensor_places):
        arguments = list(case.tensors)
        arguments[k] = stacked[k].movedim(0, -1)
        dims = tuple(-1 if i == k else None for i in range(len(arguments)))
        outputs = vmap(case.of_tensors, dims)(*arguments)
        for i, member in enumerate(members):
            inputs = list(case.inputs)
            inputs[place] = member.inputs[place]
            case.at(inputs).compare_value([y[i] for y in outputs])


@transform("vmap(grad)", quick=True)
def vmap_of_grad(case: Case) -> None:
    """A gradient for each member of a batch."""
    got = vmap(_gradient_of(case))(*_stacked(case, case.members))
    for i, member in enumerate(case.members):
        member.compare_gradient([g[i] for g in got], case.upstream)


@transform("grad(vmap)", quick=True)
def grad_of_vmap(case: Case) -> None:
    """The gradient of a loss summed over a batch."""

    us = [u.expand(len(case.members), *u.shape) for u in case.upstream]
    loss = loss_of(vmap(case.of_tensors), us)
    got = torch.func.grad(loss, _places_among_tensors(case))(*_stacked(case, case.members))
    for i, member in enumerate(case.members):
        member.compare_gradient([g[i] for g in got], case.upstream)


@transform("vmap(vmap)")
def vmap_of_vmap(case: Case) -> None:
    """A batch of batches: values and gradients."""
    members = case.members
    stacked = [torch.stack([x, x.flip(0)]) for x in _stacked(case, members)]
    outputs = vmap(vmap(case.of_tensors))(*stacked)
    gradients = vmap(vmap(_gradient_of(case)))(*stacked)
    for i, member in enumerate(members):
        for j, k in ((0, i), (1, len(members) - 1 - i)):
            member.compare_value([y[j, k] for y in outputs])
            member.compare_gradient([g[j, k] for g in gradients], case.upstream)


@transform("vmap(jacfwd)")
def vmap_of_jacfwd(case: Case) -> None:
    """A Jacobian for each member of a batch, by forward mode."""
    got = vmap(jacfwd(case.of_tensors, _places_among_tensors(case)))(*_stacked(case, case.members))
    for i, member in enumerate(case.members):
        _compare_jacobian(member, [[block[i] for block in row] for row in got])


@transform("per-sample gradients", quick=True)
def per_sample_gradients(case: Case) -> None:
    """`vmap(grad(functional_call))`: a module's parameters shared, its first input batched."""
    if case.places[len(case.parameters) :]:
        first = case.places[len(case.parameters)]
    else:
        raise NotApplicable("no differentiable input beside the parameters")
    module = _Parametrised(case, first)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    batch = torch.stack([m.inputs[first] for m in case.members])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return dot(case.upstream, functional_call(module, parameters, (x,)))

    got = vmap(torch.func.grad(loss), (None, 0))(parameters, batch)
    for i, x in enumerate(batch):
        inputs = list(case.inputs)
        inputs[first] = x
        member = case.at(inputs)
        truth = dict(zip(case.places, member.pulled(case.upstream), strict=True))
        scale = (truth.pop(first) * x.double()).sum()
        mine = [got["scale"][i], *(got[f"p{place}"][i] for place in truth)]
        labels = ["a factor", *(case.labels[case.places.index(place)] for place in truth)]
        what = f"sample {i}'s gradient in {{}}"
        member.compare(mine, [scale, *truth.values()], what, labels=labels)


# modules


@transform("deepcopy")
def deepcopied(case: Case) -> None:
    """A deep copy of a module: the same value and gradients, nothing shared."""
    _copied(case, copy.deepcopy)


@transform("pickle")
def pickled(case: Case) -> None:
    """A module after pickling."""
    _copied(case, lambda module: pickle.loads(pickle.dumps(module)))


# helpers


def grad(
    case: Case,
    outputs: Sequence[Tensor],
    xs: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None,
    **options: Any,
) -> list[Tensor | None]:
    """`torch.autograd.grad` on a graph that is kept; None where autograd sees no dependence.

    The upstream gradients may not be written.
    """
    pairs = zip(outputs, upstream or [u.clone() for u in case.upstream], strict=True)
    chosen = [(y, u.to(y.dtype)) for y, u in pairs if y.requires_grad]
    if not chosen:
        return [None] * len(xs)
    ys, us = zip(*chosen, strict=True)
    for u in us:
        case.watch("the upstream gradient", u)
    options = {"retain_graph": True, "allow_unused": True, **options}
    return list(torch.autograd.grad(ys, xs, us, **options))


def loss_of(f: Callable[..., Tensors], upstream: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Σ upstream · f, the scalar whose gradients are compared."""

    def loss(*xs: Tensor) -> Tensor:
        return dot(upstream, f(*xs))

    return loss


def _grad_of_gradient(
    case: Case,
    first: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    factors: Sequence[float] | None = None,
) -> Sequence[Tensor | None]:
    """The derivative of tangents · first in xs; several at once, of so many times the tangents."""
    present = [
        (g, t.to(g.dtype))
        for g, t in zip(first, case.tangents, strict=True)
        if g is not None and g.requires_grad
    ]
    if not present:
        return [None] * len(xs)
    gs, ts = zip(*present, strict=True)
    if factors is not None:
        ts = tuple(torch.stack([f * t for f in factors]) for t in ts)
    batched = factors is not None
    return torch.autograd.grad(
        gs, xs, ts, retain_graph=True, allow_unused=True, is_grads_batched=batched
    )


def _gradient_of(case: Case) -> Callable[..., Tensors]:
    """The gradient of Σ upstream · f, as a function of all tensors."""
    return torch.func.grad(loss_of(case.of_tensors, case.upstream), _places_among_tensors(case))


def _data(case: Case) -> Tensors:
    """Copies of the differentiable inputs, which may not be written."""
    return tuple(
        case.watch(label, x.clone()) for label, x in zip(case.labels, case.points, strict=True)
    )


def _tangents(case: Case) -> Tensors:
    """The tangents, which may not be written."""
    rows = zip(case.labels, case.tangents, case.points, strict=True)
    return tuple(case.watch(f"the tangent of {n}", t.to(x.dtype, copy=True)) for n, t, x in rows)


def _duals(case: Case, xs: Sequence[Tensor], chosen: set[int] | None = None) -> Tensors:
    """The inputs with their tangents; without one where it is not chosen."""
    return tuple(
        forward_ad.make_dual(x, t) if chosen is None or i in chosen else x
        for i, (x, t) in enumerate(zip(xs, _tangents(case), strict=True))
    )


def _stacked(case: Case, members: Sequence[Case]) -> Tensors:
    columns = zip(*(m.tensors for m in members), strict=True)
    return tuple(case.watch("a batch of inputs", torch.stack(xs)) for xs in columns)


def _argnums(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.places)))


def _places_among_tensors(case: Case) -> tuple[int, ...]:
    return tuple(i for i, p in enumerate(case.tensor_places) if p in case.places)


def _at(x: Tensor | None, i: int) -> Tensor | None:
    return None if x is None else x[i]


def _compare_jacobian(case: Case, got: Any) -> None:
    for o, (row, truth) in enumerate(zip(got, case.jacobian, strict=True)):
        shape = case.outputs[o].shape
        wanted = [J.view(shape + x.shape) for J, x in zip(truth, case.points, strict=True)]
        case.compare(list(row), wanted, f"the Jacobian of output {o} in {{}}", labels=case.labels)


@torch.no_grad()
def _edit(x: Tensor) -> None:
    """Changes x in place."""
    if x.is_floating_point():
        x.mul_(1.5).add_(0.25)
    elif x.ndim:
        x.copy_(x.flip(0))


def _strided(x: Tensor) -> Tensor:
    """x, every second entry of a wider tensor whose dimensions are in reverse order."""
    wide = x.new_zeros([2 * n for n in reversed(x.shape)])
    view = wide.permute(tuple(reversed(range(x.ndim))))[(slice(None, None, 2),) * x.ndim]
    return view.copy_(x)


def _expanded(u: Tensor) -> Tensor:
    return u.new_tensor(0.7).expand_as(u)


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """All nodes of a graph."""
    seen, todo = set(), [y.grad_fn for y in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]


def autograd_functions(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """The subclasses of `torch.autograd.Function` in a graph."""
    for node in _nodes(outputs):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            yield node._forward_cls  # type: ignore[attr-defined]


@contextmanager
def _recorded(function: Any, faults: list[str]) -> Iterator[None]:
    """Notes what is wrong with the types of what a Function's backward returns."""
    name = "backward" if function.vjp is torch.autograd.Function.vjp else "vjp"
    own, plain = function.__dict__.get(name), getattr(function, name)

    def recording(ctx: Any, *upstream: Any) -> Any:
        returned = plain(ctx, *upstream)
        gradients = returned if isinstance(returned, tuple) else (returned,)
        wanted = [g for g, n in zip(gradients, ctx.needs_input_grad, strict=False) if n]
        edges = [(node, k) for node, k in ctx.next_functions if node is not None]
        for g, edge in zip(wanted, edges, strict=True):
            expected = _metadata(*edge)
            if g is not None and g.dtype != expected:
                what = f"{function.__name__}.{name}"
                faults.append(f"{what} returns {g.dtype} for a tensor that is {expected}")
        return returned

    setattr(function, name, staticmethod(recording))
    try:
        yield
    finally:
        if own is None:
            delattr(function, name)
        else:
            setattr(function, name, own)


def _metadata(node: Any, k: int) -> torch.dtype:
    """The type that a node takes in the place k."""
    variable = getattr(node, "variable", None)
    return node._input_metadata[k].dtype if variable is None else variable.dtype


def _numerically(check: Callable[..., bool], case: Case, **options: Any) -> None:
    if case.dtype != torch.float64:
        raise NotApplicable("numerical differentiation needs float64")
    try:
        check(case.f, case.leaves(), **options)
    except GradcheckError as error:
        raise Wrong(" ".join(str(error).split())) from error


def _autocast(case: Case, dtype: torch.dtype) -> None:
    narrow = case.to(torch.float32)
    xs = narrow.leaves()
    device = xs[0].device.type
    with torch.autocast(device, dtype):
        outputs = narrow.f(*xs)
    got = grad(narrow, outputs, xs)
    rough = case.at(narrow.inputs, dtype=dtype)  # the tolerance of that type
    rough.compare_value(outputs)
    rough.compare_gradient(got)


class _Parametrised(torch.nn.Module):
    """The function as a module: its first differentiable input is data, the others parameters."""

    def __init__(self, case: Case, first: int):
        super().__init__()
        self.case, self.first = case, first
        x = case.inputs[first]
        self.scale = torch.nn.Parameter(torch.ones((), dtype=x.dtype, device=x.device))
        for place in case.places:
            if place != first:
                self.register_parameter(f"p{place}", torch.nn.Parameter(case.inputs[place].clone()))

    def forward(self, x: Tensor) -> Tensors:
        return self.case.f(
            *(
                self.scale * x if place == self.first else getattr(self, f"p{place}")
                for place in self.case.places
            )
        )


def _copied(case: Case, duplicate: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    if case.module is None:
        raise NotApplicable("a function, not a module")
    module = duplicate(case.module)
    before, after = case.module.state_dict(), module.state_dict()
    if list(before) != list(after) or not all(same(before[k], after[k]) for k in before):
        raise Wrong("the copy has other parameters or buffers")
    if {id(p) for p in case.module.parameters()} & {id(p) for p in module.parameters()}:
        raise Wrong("the copy shares a parameter")
    function = module_function(module, case.parameters, (case.dtype,))
    again = Case(function, case.inputs, case.places, exact=case.exact, dtype=case.dtype)
    xs = again.leaves()
    outputs = again.f(*xs)
    case.compare_value(outputs)
    case.compare_gradient(grad(case, outputs, xs))
