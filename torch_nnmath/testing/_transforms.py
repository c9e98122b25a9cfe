"""The transforms of autograd and of `torch.func`: each checks a case against its exact values.

A check returns None if the function is right. Otherwise it raises a `Finding`, or the function's
own error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

from torch_nnmath.testing._calls import (
    CaseModule,
    compare_first_order,
    compute_gradients,
    copy_inputs,
    copy_tangents,
    differentiate_gradients,
    edit_in_place,
    expand_constant,
    find_autograd_functions,
    make_duals,
    make_gradient,
    make_large,
    make_loss,
    make_strided,
    record_dtype_errors,
    stack_members,
)
from torch_nnmath.testing._case import Case
from torch_nnmath.testing._functions import Tensors
from torch_nnmath.testing._point import dot, max_magnitude
from torch_nnmath.testing._report import NotApplicable, Wrong

FACTORS = (1.0, -2.0, 0.5)  # of the members of a batch of directions


class Transform(NamedTuple):
    """A transform: its name, its check, and whether `QUICK` includes it."""

    name: str
    check: Callable[[Case], None]
    is_quick: bool


REGISTRY: dict[str, Transform] = {}


def transform(name: str, quick: bool = False) -> Callable[..., Any]:
    """Registers the decorated check under the transform's name."""

    def register(check: Callable[[Case], None]) -> Callable[[Case], None]:
        REGISTRY[name] = Transform(name, check, quick)
        return check

    return register


# Values and first derivatives. The order is that of the report: a cause comes before its effects.
# So "second order" is before the transforms that take a second derivative under other conditions.


@transform("value", quick=True)
def check_value(case: Case) -> None:
    """Compares the value with the reference's."""
    if case.reference is None:
        raise NotApplicable("no reference was given")
    case.compare_outputs(case.call(*case.make_leaves()))


@transform("gradient", quick=True)
def check_gradient(case: Case) -> None:
    """Checks `torch.autograd.grad` with random upstream gradients."""
    xs = case.make_leaves()
    case.compare_gradient(compute_gradients(case, case.call(*xs), xs))


@transform("second order", quick=True)
def check_second_order(case: Case) -> None:
    """Checks reverse over reverse, in the inputs and in the upstream gradients."""
    xs = case.make_leaves()
    outputs = case.call(*xs)
    pairs = zip(case.upstream, outputs, strict=True)
    us = tuple(u.to(y.dtype, copy=True).requires_grad_() for u, y in pairs)
    gradients = compute_gradients(case, outputs, xs, us, create_graph=True)
    case.compare_gradient(gradients)
    case.compare_hessian_product(differentiate_gradients(case, gradients, xs))
    case.compare_tangents(differentiate_gradients(case, gradients, us))


@transform("frozen inputs", quick=True)
def check_frozen_inputs(case: Case) -> None:
    """Checks the gradient of each input alone, and of all inputs but one."""
    count = len(case.positions)
    if count == 1:
        raise NotApplicable("there is only one differentiable input")
    argnums = set(case.argnums)
    for subset in [{i} for i in argnums] + [argnums - {i} for i in argnums if count > 2]:
        xs = tuple(x.requires_grad_(i in subset) for i, x in enumerate(copy_inputs(case)))
        gradients = compute_gradients(case, case.call(*xs), [xs[i] for i in sorted(subset)])
        labels = [case.labels[i] for i in sorted(subset)]

        def select_gradients(point: Case, subset: set[int] = subset) -> Sequence[Tensor]:
            exact = point.compute_gradient(case.upstream)
            return [exact[i] for i in sorted(subset)]

        description = f"with only {' and '.join(labels)} requiring grad, the gradient of {{}}"
        case.compare(gradients, select_gradients, description, labels=labels)


@transform("types of gradients", quick=True)
def check_gradient_dtypes(case: Case) -> None:
    """Checks the dtype of the gradients that each backward returns; autograd casts silently."""
    xs = case.make_leaves()
    outputs = case.call(*xs)
    messages: list[str] = []
    with ExitStack() as stack:
        for function in {*find_autograd_functions(outputs)}:
            stack.enter_context(record_dtype_errors(function, messages))
        compute_gradients(case, outputs, xs)
    if messages:
        raise Wrong(messages[0])


@transform("upstream gradients", quick=True)
def check_upstream_gradients(case: Case) -> None:
    """Checks upstream gradients that are strided, expanded from one number, large, ones, zeros."""
    xs = case.make_leaves()
    outputs = case.call(*xs)
    typical_sizes = [max_magnitude(g) for g in case.compute_gradient(case.upstream)]
    for make in (make_strided, expand_constant, make_large, torch.ones_like, torch.zeros_like):
        us = tuple(make(u.to(y.dtype)) for u, y in zip(case.upstream, outputs, strict=True))
        # of softmax or a normalisation, equal upstream gradients cancel
        sizes = [max(map(max_magnitude, us)) * size for size in typical_sizes]
        case.compare_gradient(compute_gradients(case, outputs, xs, us), us, sizes)


@transform("outputs left unused")
def check_unused_outputs(case: Case) -> None:
    """Checks the gradient of each output alone."""
    if len(case.exact_outputs) == 1:
        raise NotApplicable("there is only one output")
    xs = case.make_leaves()
    outputs = case.call(*xs)
    for i in range(len(outputs)):
        if outputs[i].requires_grad:
            us = [u * (i == k) for k, u in enumerate(case.upstream)]
            case.compare_gradient(compute_gradients(case, [outputs[i]], xs, [us[i]]), us)


@transform("retained graph", quick=True)
def check_retained_graph(case: Case) -> None:
    """Checks three passes through one graph, by `grad` and by `backward`, which accumulates."""
    xs = case.make_leaves()
    outputs = case.call(*xs)
    factors = (1.0, -2.5, 1.0)
    for factor in factors:
        us = tuple(factor * u for u in case.upstream)
        case.compare_gradient(compute_gradients(case, outputs, xs, us), us)
    differentiable = [
        (y, u) for y, u in zip(outputs, case.upstream, strict=True) if y.requires_grad
    ]
    for factor in factors:
        torch.autograd.backward(
            [y for y, _ in differentiable],
            [factor * u.to(y.dtype) for y, u in differentiable],
            retain_graph=True,
        )
    case.compare_gradient([x.grad for x in xs], tuple(sum(factors) * u for u in case.upstream))


@transform("gradcheck")
def check_gradcheck(case: Case) -> None:
    """Runs PyTorch's `gradcheck` in slow mode."""
    _run_gradcheck(torch.autograd.gradcheck, case, 1, fast_mode=False)


@transform("strided inputs", quick=True)
def check_strided_inputs(case: Case) -> None:
    """Checks inputs whose entries are neither adjacent nor in order in memory."""
    xs = tuple(make_strided(x).requires_grad_() for x in copy_inputs(case))
    outputs = case.call(*xs)
    compare_first_order(case, outputs, xs)


@transform("expanded inputs", quick=True)
def check_expanded_inputs(case: Case) -> None:
    """Checks that inputs with stride 0 give the same results as contiguous copies of them."""
    rows = [x[:1] if x.ndim else x for x in copy_inputs(case)]
    pairs = zip(rows, case.differentiable_inputs, strict=True)
    xs = tuple(row.expand_as(x).requires_grad_() for row, x in pairs)
    copies = tuple(x.detach().clone().requires_grad_() for x in xs)
    try:
        expected = case.call(*copies)
    except Exception as error:  # only a call can tell, and it may raise any exception
        raise NotApplicable("the function does not accept equal rows") from error
    expected_gradients = [
        torch.zeros_like(x, dtype=torch.float64) if g is None else g.double()
        for x, g in zip(copies, compute_gradients(case, expected, copies), strict=True)
    ]
    if not all(each.isfinite().all() for each in (*expected, *expected_gradients)):
        raise NotApplicable("the function is singular where rows are equal")
    outputs = case.call(*xs)
    # Of order 1, since the rounding of a value that cancels, such as a variance, is not relative.
    case.compare(outputs, lambda _: [y.detach().double() for y in expected], "output {}", 1)
    gradients = compute_gradients(case, outputs, xs)
    description = "the gradient of {}"
    case.compare(gradients, lambda _: expected_gradients, description, labels=case.labels)


@transform("edited before backward", quick=True)
def check_edit_before_backward(case: Case) -> None:
    """Checks that an in-place edit between forward and backward raises or has no effect."""
    for i in range(len(case.tensor_positions) + len(case.exact_outputs)):
        tensors, xs = case.make_tensor_leaves()
        outputs = case.call_tensors(*tensors)
        try:
            edit_in_place([*tensors, *outputs][i])
        except RuntimeError:  # of an expanded tensor, or of one of several views
            continue
        try:
            gradients = compute_gradients(case, outputs, xs)
        except RuntimeError as error:
            if re.search("modified (by an )?inplace", str(error)):
                continue
            raise
        case.compare_gradient(gradients)


@transform("checkpoint", quick=True)
def check_checkpoint(case: Case) -> None:
    """Checks `torch.utils.checkpoint`, non-reentrant."""
    xs = case.make_leaves()
    compare_first_order(case, checkpoint(case.call, *xs, use_reentrant=False), xs)


@transform("saved-tensor hooks", quick=True)
def check_saved_tensor_hooks(case: Case) -> None:
    """Checks `save_on_cpu`, and hooks that save copies, at first and second order."""
    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x.clone()),
    ):
        xs = case.make_leaves()
        with hooks:
            outputs = case.call(*xs)
            gradients = compute_gradients(case, outputs, xs, create_graph=True)
            case.compare_gradient(gradients)
        case.compare_hessian_product(differentiate_gradients(case, gradients, xs))


@transform("no_grad", quick=True)
def check_no_grad(case: Case) -> None:
    """Checks the value under `torch.no_grad`, and that of inputs that do not require gradients."""
    with torch.no_grad():
        case.compare_outputs(case.call(*case.make_leaves()))
    case.compare_outputs(case.call(*copy_inputs(case)))


@transform("inference mode", quick=True)
def check_inference_mode(case: Case) -> None:
    """Checks `torch.inference_mode`, with inputs made outside and inside of it."""
    xs = case.make_leaves()
    with torch.inference_mode():
        case.compare_outputs(case.call(*xs))
        case.compare_outputs(case.call(*(x.clone() for x in xs)))


@transform("autocast bfloat16", quick=True)
def check_autocast_bfloat16(case: Case) -> None:
    """Checks `torch.autocast` to bfloat16: the gradients are float32 and near the exact ones."""
    _check_autocast(case, torch.bfloat16)


@transform("autocast float16")
def check_autocast_float16(case: Case) -> None:
    """Checks `torch.autocast` to float16: the gradients are float32 and near the exact ones."""
    _check_autocast(case, torch.float16)


@transform("deterministic algorithms")
def check_deterministic_algorithms(case: Case) -> None:
    """Checks `torch.use_deterministic_algorithms`, which also fills new memory with nan."""
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        xs = case.make_leaves()
        outputs = case.call(*xs)
        case.compare_outputs(outputs)
        gradients = compute_gradients(case, outputs, xs, create_graph=True)
        case.compare_gradient(gradients)
        case.compare_hessian_product(differentiate_gradients(case, gradients, xs))
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)


@transform("default device")
def check_default_device(case: Case) -> None:
    """Checks that the function makes tensors on its inputs' device, not on the default one."""
    xs = case.make_leaves()
    with torch.device("meta"):
        outputs = case.call(*xs)
        gradients = compute_gradients(case, outputs, xs)
    case.compare_outputs(outputs)
    case.compare_gradient(gradients)


# Second derivatives and forward mode


@transform("gradgradcheck")
def check_gradgradcheck(case: Case) -> None:
    """Runs PyTorch's `gradgradcheck`."""
    _run_gradcheck(torch.autograd.gradgradcheck, case, 2)


@transform("third order")
def check_third_order(case: Case) -> None:
    """Checks the third derivative along a direction, by reverse mode three times."""
    xs = case.make_leaves()
    derivative: Tensor | None = dot(case.upstream, case.call(*xs))
    for _ in range(3):
        if derivative is None or not derivative.requires_grad:
            derivative = None
            break
        gs = torch.autograd.grad(derivative, xs, create_graph=True, allow_unused=True)
        pairs = zip(gs, case.tangents, strict=True)
        terms = [(g * t.to(g.dtype)).sum() for g, t in pairs if g is not None]
        derivative = torch.stack(terms).sum() if terms else None
    description = "the third derivative along a direction"
    case.compare([derivative], lambda point: [point.third_derivative], description, 3)


@transform("forward mode", quick=True)
def check_forward_mode(case: Case) -> None:
    """Checks `torch.autograd.forward_ad`, with tangents of all inputs and of each alone."""
    argnums = set(case.argnums)
    for subset in [argnums, *({i} for i in argnums if len(argnums) > 1)]:
        tangents = [t * (i in subset) for i, t in enumerate(case.tangents)]
        with forward_ad.dual_level():
            outputs = case.call(*make_duals(case, case.make_leaves(), subset))
            primals, output_tangents = zip(*map(forward_ad.unpack_dual, outputs), strict=True)
            case.compare_tangents(output_tangents, tangents)
            case.compare_outputs(primals)


@transform("forward over reverse", quick=True)
def check_forward_over_reverse(case: Case) -> None:
    """Checks the tangent of a gradient."""
    xs = case.make_leaves()
    with forward_ad.dual_level():
        duals = make_duals(case, xs)
        gradients = compute_gradients(case, case.call(*duals), duals)
        unpacked = [None if g is None else forward_ad.unpack_dual(g) for g in gradients]
        case.compare_gradient([None if u is None else u.primal for u in unpacked])
        case.compare_hessian_product([None if u is None else u.tangent for u in unpacked])


@transform("reverse over forward", quick=True)
def check_reverse_over_forward(case: Case) -> None:
    """Checks the gradient of a tangent."""
    ts = copy_tangents(case)

    def compute_tangent(*xs: Tensor) -> Tensor:
        return dot(case.upstream, jvp(case.call, xs, ts)[1])

    products = torch.func.grad(compute_tangent, case.argnums)(*copy_inputs(case))
    case.compare_hessian_product(products)


@transform("forward over forward")
def check_forward_over_forward(case: Case) -> None:
    """Checks the tangent of a tangent, along one direction twice."""
    ts = copy_tangents(case)

    def compute_tangents(*xs: Tensor) -> Tensors:
        return jvp(case.call, xs, ts)[1]

    derivatives = jvp(compute_tangents, copy_inputs(case), ts)[1]
    description = "the second derivative along a direction"
    results = [dot(case.upstream, derivatives)]
    case.compare(
        results, lambda point: [dot(point.tangents, point.hessian_product)], description, 2
    )


# Batches of directions


@transform("batched gradients", quick=True)
def check_batched_gradients(case: Case) -> None:
    """Checks a batch of upstream gradients (`is_grads_batched`), at first and second order."""
    xs = case.make_leaves()
    outputs = case.call(*xs)
    pairs = zip(case.upstream, outputs, strict=True)
    us = [torch.stack([factor * u.to(y.dtype) for factor in FACTORS]) for u, y in pairs]
    gradients = compute_gradients(case, outputs, xs, us, is_grads_batched=True)
    for i, factor in enumerate(FACTORS):
        entries = [None if g is None else g[i] for g in gradients]
        case.compare_gradient(entries, [factor * u for u in case.upstream])
    gradients = compute_gradients(case, outputs, xs, create_graph=True)
    products = differentiate_gradients(case, gradients, xs, FACTORS)
    for i, factor in enumerate(FACTORS):
        entries = [None if h is None else h[i] for h in products]
        case.compare_hessian_product(entries, factor, "batched ")


@transform("batched tangents", quick=True)
def check_batched_tangents(case: Case) -> None:
    """Checks a batch of tangents: `vmap` of `jvp`."""
    xs = copy_inputs(case)
    ts = [torch.stack([factor * t for factor in FACTORS]) for t in copy_tangents(case)]
    tangents = vmap(lambda *t: jvp(case.call, xs, t)[1])(*ts)
    for i, factor in enumerate(FACTORS):
        case.compare_tangents([y[i] for y in tangents], [factor * t for t in case.tangents])


# torch.func


@transform("vjp", quick=True)
def check_vjp(case: Case) -> None:
    """Checks `torch.func.vjp`."""
    outputs, pullback = vjp(case.call, *copy_inputs(case))  # type: ignore[misc]
    case.compare_outputs(outputs)
    pairs = zip(case.upstream, outputs, strict=True)
    us = tuple(case.protect("the upstream gradient", u.to(y.dtype, copy=True)) for u, y in pairs)
    case.compare_gradient(pullback(us))


@transform("jvp", quick=True)
def check_jvp(case: Case) -> None:
    """Checks `torch.func.jvp`."""
    outputs, tangents = jvp(case.call, copy_inputs(case), copy_tangents(case))  # type: ignore[misc]
    case.compare_outputs(outputs)
    case.compare_tangents(tangents)


@transform("linearize")
def check_linearize(case: Case) -> None:
    """Checks `torch.func.linearize`."""
    outputs, pushforward = linearize(case.call, *copy_inputs(case))
    case.compare_outputs(outputs)
    case.compare_tangents(pushforward(*copy_tangents(case)))


@transform("jacrev", quick=True)
def check_jacrev(case: Case) -> None:
    """Checks `torch.func.jacrev`."""
    case.compare_jacobian(jacrev(case.call, case.argnums)(*copy_inputs(case)))


@transform("jacfwd", quick=True)
def check_jacfwd(case: Case) -> None:
    """Checks `torch.func.jacfwd`."""
    case.compare_jacobian(jacfwd(case.call, case.argnums)(*copy_inputs(case)))


@transform("hessian", quick=True)
def check_hessian(case: Case) -> None:
    """Checks `torch.func.hessian`, forward over reverse."""
    loss = make_loss(case.call, case.upstream)
    blocks = torch.func.hessian(loss, case.argnums)(*copy_inputs(case))
    products = []
    for row, x in zip(blocks, case.differentiable_inputs, strict=True):
        pairs = zip(row, case.tangents, strict=True)
        terms = [block.reshape(x.numel(), -1) @ t.to(x.dtype).flatten() for block, t in pairs]
        products.append(torch.stack(terms).sum(0).view(x.shape))
    case.compare_hessian_product(products)


@transform("vmap", quick=True)
def check_vmap(case: Case) -> None:
    """Checks `vmap` over all tensors, and over each alone along its last dimension."""
    members = case.batch_members
    stacked = stack_members(case)
    for i, member in enumerate(members):
        member.compare_outputs([y[i] for y in vmap(case.call_tensors)(*stacked)])
    for k, position in enumerate(case.tensor_positions):
        arguments = list(case.tensors)
        arguments[k] = stacked[k].movedim(0, -1)
        dims = tuple(-1 if i == k else None for i in range(len(arguments)))
        outputs = vmap(case.call_tensors, dims)(*arguments)
        for i, member in enumerate(members):
            moved = case.with_input(position, member.inputs[position])
            moved.compare_outputs([y[i] for y in outputs])


@transform("vmap(grad)", quick=True)
def check_vmap_of_grad(case: Case) -> None:
    """Checks the gradient of each member of a batch."""
    gradients = vmap(make_gradient(case))(*stack_members(case))
    for i, member in enumerate(case.batch_members):
        member.compare_gradient([g[i] for g in gradients], case.upstream)


@transform("grad(vmap)", quick=True)
def check_grad_of_vmap(case: Case) -> None:
    """Checks the gradient of a loss summed over a batch."""
    us = [u.expand(len(case.batch_members), *u.shape) for u in case.upstream]
    loss = make_loss(vmap(case.call_tensors), us)
    gradients = torch.func.grad(loss, case.tensor_argnums)(*stack_members(case))
    for i, member in enumerate(case.batch_members):
        member.compare_gradient([g[i] for g in gradients], case.upstream)


@transform("vmap(vmap)")
def check_vmap_of_vmap(case: Case) -> None:
    """Checks a batch of batches: values and gradients."""
    members = case.batch_members
    stacked = [torch.stack([x, x.flip(0)]) for x in stack_members(case)]
    outputs = vmap(vmap(case.call_tensors))(*stacked)
    gradients = vmap(vmap(make_gradient(case)))(*stacked)
    for i, member in enumerate(members):
        for j, k in ((0, i), (1, len(members) - 1 - i)):
            member.compare_outputs([y[j, k] for y in outputs])
            member.compare_gradient([g[j, k] for g in gradients], case.upstream)


@transform("vmap(jacfwd)")
def check_vmap_of_jacfwd(case: Case) -> None:
    """Checks the Jacobian of each member of a batch, by forward mode."""
    blocks = vmap(jacfwd(case.call_tensors, case.tensor_argnums))(*stack_members(case))
    for i, member in enumerate(case.batch_members):
        member.compare_jacobian([[block[i] for block in row] for row in blocks])


@transform("per-sample gradients", quick=True)
def check_per_sample_gradients(case: Case) -> None:
    """Checks `vmap(grad(functional_call))` over the first input, with the parameters shared."""
    positions = case.positions[case.parameter_count :]
    if not positions:
        raise NotApplicable("no input except parameters is differentiable")
    first = positions[0]
    module = CaseModule(case, first)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    samples = [case, case.with_input(first, case.batch_members[1].inputs[first])]
    batch = torch.stack([sample.inputs[first] for sample in samples])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return dot(case.upstream, functional_call(module, parameters, (x,)))

    gradients = vmap(torch.func.grad(loss), (None, 0))(parameters, batch)
    others = [p for p in case.positions if p != first]
    labels = ["a factor", *(case.labels[case.positions.index(p)] for p in others)]

    def compute_exact(point: Case) -> Sequence[Tensor]:
        exact = dict(zip(point.positions, point.compute_gradient(case.upstream), strict=True))
        scale = (exact.pop(first) * point.inputs[first].double()).sum()
        return [scale, *exact.values()]

    for i, sample in enumerate(samples):
        results = [gradients["scale"][i], *(gradients[f"p{p}"][i] for p in others)]
        description = f"the gradient of {{}} for sample {i}"
        sample.compare(results, compute_exact, description, labels=labels)


# Shared by several checks


def _run_gradcheck(check: Callable[..., bool], case: Case, order: int, **options: Any) -> None:
    """Runs PyTorch's check; repeats a failed one with a step that fits the smallest entry."""
    if case.dtype != torch.float64:
        raise NotApplicable("numerical differentiation needs float64")
    if case.surrogate is not None:
        raise NotApplicable("the gradient is declared")
    steps = [1e-6]
    sizes = torch.cat([x[x != 0].abs().flatten() for x in case.differentiable_inputs])
    if sizes.numel() and sizes.min() < 1e-3:
        steps.append(1e-3 * sizes.min().item())
    for step in steps:
        try:
            check(case.call, case.make_leaves(), eps=step, **options)
            return
        except GradcheckError as error:
            _ = case.jacobian if order == 1 else case.hessian_product  # may be unknown
            if step == steps[-1]:
                raise Wrong(" ".join(str(error).split())) from error


def _check_autocast(case: Case, dtype: torch.dtype) -> None:
    float_case = case.to_dtype(torch.float32)
    xs = float_case.make_leaves()
    with torch.autocast(xs[0].device.type, dtype):
        outputs = float_case.call(*xs)
    gradients = compute_gradients(float_case, outputs, xs)
    tolerant_case = replace(float_case, dtype=dtype).with_exact_values_of(case)
    tolerant_case.compare_outputs(outputs)
    tolerant_case.compare_gradient(gradients)
