"""The transforms that trace: `torch.compile`, `torch.export`, `make_fx`, fake and meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from torch_nnmath.testing._case import Case, Tensors, real_tensors
from torch_nnmath.testing._report import NotApplicable, Wrong
from torch_nnmath.testing._transforms import (
    _argnums,
    _data,
    _duals,
    _grad_of_gradient,
    _gradient_of,
    _stacked,
    _tangents,
    grad,
    loss_of,
    transform,
)

CHEAP = "aot_eager"  # traces as Inductor does, and compiles nothing


@transform("meta device", quick=True)
def meta_device(case: Case) -> None:
    """Shapes and types without numbers, on the meta device."""
    _shapes(case, lambda x: x.to("meta"), nullcontext())


@transform("fake tensors", quick=True)
def fake_tensors(case: Case) -> None:
    """Shapes, types and devices under FakeTensorMode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _shapes(case, mode.from_tensor, mode)


@transform("make_fx")
def traced_by_make_fx(case: Case) -> None:
    """The graph of a value and of a gradient, run at another point; with symbolic sizes too."""
    xs = case.tensors
    other = case.members[1]
    for mode in ("real", "symbolic"):

        def trace(f: Callable[..., Any], mode: Any = mode) -> Callable[..., Any]:
            return make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(*xs)

        other.compare_value(trace(case.of_tensors)(*other.tensors))
        graph = trace(_gradient_of(case))
        other.compare_gradient(graph(*other.tensors), case.upstream)


@transform("compile", quick=True)
def compiled(case: Case) -> None:
    """`torch.compile(fullgraph=True)`, forward and backward, with gradients and without."""
    _compiled_gradient(case, _compile(case.f))
    with torch.no_grad():
        case.compare_value(_compile(case.f)(*_data(case)))


@transform("compile by Inductor")
def compiled_by_inductor(case: Case) -> None:
    """The same with the compiler that users get."""
    _compiled_gradient(case, _compile(case.f, "inductor"))


@transform("compile, dynamic shapes")
def compiled_with_dynamic_shapes(case: Case) -> None:
    """Batches of several sizes, down to 1 and 0 rows, with no more graphs than PyTorch's own."""
    n = case.rows
    several = [case, *(case.enlarged(k * n) for k in (2, 3))]
    for rows in {0, 1} - {n}:
        try:
            other = case.enlarged(rows)
        except NotApplicable:
            continue
        if all(y.isfinite().all() for y in other.outputs):  # the mean of nothing is no value
            several.append(other)
    ours = _graphs(case.of_tensors, several, check=True)
    least = _graphs(case.control(torch.sin).of_tensors, several, check=False)
    if ours > least:
        sizes = ", ".join(str(each.rows) for each in several)
        raise Wrong(f"{ours} graphs for batches of {sizes} rows, PyTorch's own sin {least}")


@transform("torch.func inside compile")
def transforms_inside_compile(case: Case) -> None:
    """`grad`, `jvp` and `vmap` of the function, inside one compiled function."""
    stacked = _stacked(case, case.members)
    tangents = _tangents(case)
    f, of_tensors = case.f, case.of_tensors
    gradient = torch.func.grad(loss_of(f, case.upstream), _argnums(case))

    def everything(xs: Tensors, stacked: Tensors) -> Any:
        return gradient(*xs), jvp(f, xs, tangents)[1], vmap(of_tensors)(*stacked)

    got, pushed, batch = _compile(everything)(_data(case), stacked)
    case.compare_gradient(got)
    case.compare_tangent(pushed)
    for i, member in enumerate(case.members):
        member.compare_value([y[i] for y in batch])


@transform("forward mode through compile")
def forward_mode_through_compile(case: Case) -> None:
    """The tangent of a compiled function."""
    with forward_ad.dual_level():
        outputs = _compile(case.f)(*_duals(case, case.leaves()))
        case.compare_tangent([forward_ad.unpack_dual(y).tangent for y in outputs])


@transform("second order through compile")
def second_order_through_compile(case: Case) -> None:
    """The gradient of a compiled function's gradient."""
    xs = case.leaves()
    first = grad(case, _compile(case.f)(*xs), xs, create_graph=True)
    case.compare_gradient(first)
    case.compare_second(_grad_of_gradient(case, first, xs))


@transform("export")
def exported(case: Case) -> None:
    """`torch.export`, not strict, with a dynamic batch where the function takes one."""
    _export(case, strict=False)


@transform("export, strict")
def exported_strictly(case: Case) -> None:
    """The same through Dynamo."""
    _export(case, strict=True)


def _compile(f: Callable[..., Any], backend: Any = CHEAP) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, backend=backend, fullgraph=True)


def _compiled_gradient(case: Case, f: Callable[..., Tensors]) -> None:
    xs = case.leaves()
    outputs = f(*xs)
    case.compare_value(outputs)
    case.compare_gradient(grad(case, outputs, xs, retain_graph=False))


def _graphs(f: Callable[..., Tensors], cases: Sequence[Case], check: bool) -> int:
    """How many graphs a function needs for cases of several sizes, forward and backward."""
    count = 0
    cheap = torch._dynamo.lookup_backend(CHEAP)

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return cheap(graph, inputs)

    compiled = _compile(f, backend)
    for case in cases:
        tensors, xs = case.tensor_leaves()
        outputs = compiled(*tensors)
        if check:
            case.compare_value(outputs)
            case.compare_gradient(grad(case, outputs, xs, retain_graph=False))
        else:
            torch.autograd.grad([y.sum() for y in outputs if y.requires_grad], xs)
    return count


def _shapes(
    case: Case, convert: Callable[[Tensor], Tensor], mode: AbstractContextManager[Any]
) -> None:
    """Outputs and gradients have the shape, type and device of their like."""
    xs = case.leaves()
    outputs = case.f(*xs)
    wanted = [*outputs, *_gradients_of_sum(outputs, xs)]
    with mode:
        inputs = [convert(x) if isinstance(x, Tensor) else x for x in case.inputs]
        xs = tuple(inputs[place].requires_grad_() for place in case.places)
        outputs = real_tensors(case.function(*inputs))
        got = [*outputs, *_gradients_of_sum(outputs, xs)]
    for mine, like in zip(got, wanted, strict=True):
        if (mine is None) != (like is None):
            raise Wrong("a gradient is there in one, and not in the other")
        if mine is None or like is None:
            continue
        if (mine.shape, mine.dtype, mine.device) != (like.shape, like.dtype, xs[0].device):
            raise Wrong(
                f"{mine.dtype} {tuple(mine.shape)} on {mine.device}, "
                f"not {like.dtype} {tuple(like.shape)} on {xs[0].device}"
            )


def _gradients_of_sum(outputs: Sequence[Tensor], xs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    ys = [y for y in outputs if y.requires_grad]
    if not ys:
        return [None] * len(xs)
    return torch.autograd.grad(ys, xs, [torch.ones_like(y) for y in ys], allow_unused=True)


class _Module(torch.nn.Module):
    def __init__(self, f: Callable[..., Any]):
        super().__init__()
        self.f = f

    def forward(self, *inputs: Tensor) -> Any:
        return self.f(*inputs)


def _export(case: Case, strict: bool) -> None:
    points = [case]
    dynamic: Any = None
    try:
        points.append(case.enlarged(2 * case.rows))
        chosen = [case.in_batch[place] for place in case.tensor_places]
        dynamic = (tuple({0: Dim.DYNAMIC} if b else None for b in chosen),)
    except NotApplicable:  # it takes inputs of these sizes only
        pass
    program = torch.export.export(
        _Module(case.of_tensors), case.tensors, dynamic_shapes=dynamic, strict=strict
    )
    f = program.module()
    for each in points:
        tensors, xs = each.tensor_leaves()
        outputs = real_tensors(f(*tensors))
        each.compare_value(outputs)
        each.compare_gradient(grad(each, outputs, xs))
