"""The tracing transforms: `torch.compile`, `torch.export`, `make_fx`, fake and meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functionalize, jvp, vmap

from torch_nnmath import _torch
from torch_nnmath.testing._calls import (
    compare_first_order,
    compute_gradients,
    copy_inputs,
    copy_tangents,
    differentiate_gradients,
    make_duals,
    make_gradient,
    make_loss,
    stack_members,
)
from torch_nnmath.testing._case import Case
from torch_nnmath.testing._functions import Tensors, select_real_tensors
from torch_nnmath.testing._report import Cannot, NotApplicable, Wrong, describe_error
from torch_nnmath.testing._transforms import transform

TRACING_BACKEND = "aot_eager"  # traces forward and backward like Inductor, but generates no code


@transform("meta device", quick=True)
def check_meta_device(case: Case) -> None:
    """Checks shapes, dtypes and devices on the meta device."""
    _check_metadata(case, lambda x: x.to("meta"), nullcontext())


@transform("fake tensors", quick=True)
def check_fake_tensors(case: Case) -> None:
    """Checks shapes, dtypes and devices under FakeTensorMode."""
    mode = _torch.make_fake_tensor_mode()
    _check_metadata(case, mode.from_tensor, mode)


@transform("make_fx")
def check_make_fx(case: Case) -> None:
    """Traces value and gradient with real and symbolic sizes; runs the graphs at another point."""
    other = case.batch_members[1]
    for mode in ("real", "symbolic"):
        graph = _torch.trace_with_fx(case.call_tensors, mode)(*case.tensors)
        other.compare_outputs(graph(*other.tensors))
        graph = _torch.trace_with_fx(make_gradient(case), mode)(*case.tensors)
        other.compare_gradient(graph(*other.tensors), case.upstream)


@transform("functionalize", quick=True)
def check_functionalize(case: Case) -> None:
    """Checks `torch.func.functionalize` of value and gradient, alone and under `make_fx`."""
    value, gradient = (functionalize(f) for f in (case.call_tensors, make_gradient(case)))
    other = case.batch_members[1]
    try:
        case.compare_outputs(value(*case.tensors))
        case.compare_gradient(gradient(*case.tensors), case.upstream)
        graph = _torch.trace_with_fx(gradient, "real")(*case.tensors)
    except RuntimeError as error:
        if "functionalize rule" in str(error).lower():  # PyTorch refuses every Function
            raise Cannot(describe_error(error)) from error
        raise
    other.compare_gradient(graph(*other.tensors), case.upstream)


@transform("compile", quick=True)
def check_compile(case: Case) -> None:
    """Checks `torch.compile(fullgraph=True)`, forward and backward, with gradients and without."""
    _check_compiled(case, _compile(case.call))
    with torch.no_grad():
        case.compare_outputs(_compile(case.call)(*copy_inputs(case)))


@transform("compile by Inductor")
def check_compile_by_inductor(case: Case) -> None:
    """Checks `torch.compile(fullgraph=True)` with Inductor, the default backend."""
    _check_compiled(case, _compile(case.call, "inductor"))


@transform("compile, dynamic shapes")
def check_compile_with_dynamic_shapes(case: Case) -> None:
    """Checks batches of several sizes, also 1 and 0; they need no more graphs than `torch.sin`."""
    n = case.rows
    cases = [case, *(case.with_rows(k * n) for k in (2, 3)), *case.list_small_batches()]
    count = _count_graphs(case.call_tensors, cases, compare=True)
    control = case.make_control(torch.sin).call_tensors
    control_count = _count_graphs(control, cases, compare=False)
    if count > control_count:
        sizes = ", ".join(str(case.rows) for case in cases)
        raise Wrong(f"{count} graphs for batches of {sizes} rows, {control_count} for torch.sin")


@transform("compile, dynamic=True")
def check_compile_with_symbolic_numbers(case: Case) -> None:
    """Checks `torch.compile(dynamic=True)`: sizes and Python's numbers are symbols."""
    _check_compiled(case, _compile(case.call, dynamic=True))


@transform("torch.func inside compile")
def check_torch_func_inside_compile(case: Case) -> None:
    """Checks `grad`, `jvp` and `vmap` of the function, inside one compiled function."""
    batch = stack_members(case)
    tangents = copy_tangents(case)
    call, call_tensors = case.call, case.call_tensors
    gradient = torch.func.grad(make_loss(call, case.upstream), case.argnums)

    def compute_all(xs: Tensors, batch: Tensors) -> Any:
        return gradient(*xs), jvp(call, xs, tangents)[1], vmap(call_tensors)(*batch)

    gradients, output_tangents, outputs = _compile(compute_all)(copy_inputs(case), batch)
    case.compare_gradient(gradients)
    case.compare_tangents(output_tangents)
    for i, member in enumerate(case.batch_members):
        member.compare_outputs([y[i] for y in outputs])


@transform("forward mode through compile")
def check_forward_mode_through_compile(case: Case) -> None:
    """Checks the tangent of a compiled function."""
    with forward_ad.dual_level():
        outputs = _compile(case.call)(*make_duals(case, case.make_leaves()))
        case.compare_tangents([forward_ad.unpack_dual(y).tangent for y in outputs])


@transform("second order through compile")
def check_second_order_through_compile(case: Case) -> None:
    """Checks the gradient of a compiled function's gradient."""
    xs = case.make_leaves()
    gradients = compute_gradients(case, _compile(case.call)(*xs), xs, create_graph=True)
    case.compare_gradient(gradients)
    case.compare_hessian_product(differentiate_gradients(case, gradients, xs))


@transform("export")
def check_export(case: Case) -> None:
    """Checks non-strict `torch.export`, with a dynamic batch size if the function accepts one."""
    _check_export(case, strict=False)


@transform("export, strict")
def check_strict_export(case: Case) -> None:
    """Checks strict `torch.export`, which traces with Dynamo."""
    _check_export(case, strict=True)


def _compile(
    f: Callable[..., Any], backend: Any = TRACING_BACKEND, dynamic: bool | None = None
) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True)


def _check_compiled(case: Case, compiled: Callable[..., Tensors]) -> None:
    xs = case.make_leaves()
    outputs = compiled(*xs)
    case.compare_outputs(outputs)
    case.compare_gradient(compute_gradients(case, outputs, xs, retain_graph=False))


def _count_graphs(f: Callable[..., Tensors], cases: Sequence[Case], compare: bool) -> int:
    """Returns how many graphs the cases need, forward and backward; compares if asked to."""
    count = 0
    tracing_backend = _torch.get_compiler_backend(TRACING_BACKEND)

    def count_graph(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return tracing_backend(graph, inputs)

    compiled = _compile(f, count_graph)
    for case in cases:
        tensors, xs = case.make_tensor_leaves()
        outputs = compiled(*tensors)
        if compare:
            case.compare_outputs(outputs)
            case.compare_gradient(compute_gradients(case, outputs, xs, retain_graph=False))
        else:
            torch.autograd.grad([y.sum() for y in outputs if y.requires_grad], xs)
    return count


def _check_metadata(
    case: Case, convert: Callable[[Tensor], Tensor], mode: AbstractContextManager[Any]
) -> None:
    """Compares shapes, dtypes and devices of outputs and gradients, for converted inputs."""
    xs = case.make_leaves()
    outputs = case.call(*xs)
    expected_results = [*outputs, *_differentiate_sum(outputs, xs)]
    with mode:
        inputs = [convert(x) if isinstance(x, Tensor) else x for x in case.inputs]
        xs = tuple(inputs[position].requires_grad_() for position in case.positions)
        outputs = select_real_tensors(case.function(*inputs))
        results = [*outputs, *_differentiate_sum(outputs, xs)]
    device = xs[0].device
    for result, expected in zip(results, expected_results, strict=True):
        if (result is None) != (expected is None):
            raise Wrong("a gradient is None only with, or only without, this transform")
        if result is None or expected is None:
            continue
        if (result.shape, result.dtype, result.device) != (expected.shape, expected.dtype, device):
            raise Wrong(
                f"{result.dtype} {tuple(result.shape)} on {result.device}, "
                f"not {expected.dtype} {tuple(expected.shape)} on {device}"
            )


def _differentiate_sum(outputs: Sequence[Tensor], xs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    ys = [y for y in outputs if y.requires_grad]
    if not ys:
        return [None] * len(xs)
    return torch.autograd.grad(ys, xs, [torch.ones_like(y) for y in ys], allow_unused=True)


class _FunctionModule(torch.nn.Module):
    """A function as the module that `torch.export` requires."""

    def __init__(self, f: Callable[..., Any]):
        super().__init__()
        self.f = f

    def forward(self, *inputs: Tensor) -> Any:
        return self.f(*inputs)


def _check_export(case: Case, strict: bool) -> None:
    cases = [case]
    dynamic_shapes: Any = None
    try:
        cases.append(case.with_rows(2 * case.rows))
        is_batched = [case.batched_inputs[position] for position in case.tensor_positions]
        dynamic_shapes = (tuple({0: Dim.DYNAMIC} if b else None for b in is_batched),)
    except NotApplicable:  # the function accepts no other number of rows
        pass
    program = torch.export.export(
        _FunctionModule(case.call_tensors),
        case.tensors,
        dynamic_shapes=dynamic_shapes,
        strict=strict,
    )
    exported = program.module()
    for case in cases:
        tensors, xs = case.make_tensor_leaves()
        compare_first_order(case, select_real_tensors(exported(*tensors)), xs)
