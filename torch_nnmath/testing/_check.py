"""The public functions `check` and `assert_right`."""

from __future__ import annotations

import inspect
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath.testing import _batching, _compilers, _state  # noqa: F401  (register transforms)
from torch_nnmath.testing._calls import find_autograd_functions
from torch_nnmath.testing._case import Case
from torch_nnmath.testing._functions import (
    is_real_tensor,
    list_leaves,
    make_module_function,
    nest_inputs,
)
from torch_nnmath.testing._point import TOLERANCES
from torch_nnmath.testing._report import Finding, Report, Row, Verdict, describe_error
from torch_nnmath.testing._transforms import REGISTRY, Transform

TRANSFORMS: tuple[str, ...] = tuple(REGISTRY)
"""The names of all transforms, in the order of a report."""
QUICK: tuple[str, ...] = tuple(name for name, entry in REGISTRY.items() if entry.is_quick)
"""The names of the essential transforms, which take seconds."""


def check(
    function: Callable[..., Any],
    inputs: Sequence[Any] | Tensor,
    *,
    reference: Callable[..., Any] | None = None,
    surrogate: Callable[..., Any] | None = None,
    transforms: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Checks a function under every transform of PyTorch, against exact values in float64.

    The exact derivatives come from numerical differentiation of the reference's value, or of the
    function's own if there is no reference. This takes several evaluations for each entry of the
    inputs, up to 64 entries. Beyond that, derivatives by autograd are the exact ones if numerical
    differentiation along random directions confirms them. Keep the inputs small nevertheless, as
    for `torch.autograd.gradcheck`, and away from kinks.
    The function must accept float64, or a reference must.

    Args:
        function: a function, an instance of a module, or a subclass of `torch.autograd.Function`,
            whose `apply` is checked. It returns tensors, nested in tuples, lists, dicts or
            dataclasses.
        inputs: the positional arguments: tensors, other values, or nested tuples, lists and dicts
            of them. The tensors that require gradients are differentiated; if none does, all
            floating-point tensors are. The check copies them and never writes to them. Parameters
            of a module that are not frozen are differentiated too.
        reference: a function of the same arguments that returns the right value; for a module, a
            module with parameters of the same names.
        surrogate: a function of the same arguments that has the derivatives which the function
            declares, if they are not those of its value: the identity for a straight-through
            estimator, -x for gradient reversal. For a module, a module, as the reference.
        transforms: names from `TRANSFORMS`, for example `QUICK`; None for all.
        dtype: floating-point inputs are cast to it. It also selects the tolerances.

    Returns:
        A report with one row for each transform.

    Raises:
        ValueError: an unknown transform, or no input that can be differentiated.
        TypeError: a function, reference, input or dtype of an unsupported type.
    """
    names = TRANSFORMS if transforms is None else tuple(transforms)
    for name in names:
        if name not in REGISTRY:
            raise ValueError(f"no transform {name!r}; there are {', '.join(TRANSFORMS)}")
    if dtype not in TOLERANCES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, not {dtype}")
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    case = _make_case(function, inputs, reference, surrogate, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads slow small tensors down
    devices = {x.device for x in case.tensors if x.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            rows = tuple(_make_row(name, case) for name in names)
    finally:
        torch.set_num_threads(threads)
    return Report(_get_name(function), dtype, rows)


def assert_right(
    function: Callable[..., Any],
    inputs: Sequence[Any] | Tensor,
    *,
    reference: Callable[..., Any] | None = None,
    surrogate: Callable[..., Any] | None = None,
    transforms: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Calls `check` and raises AssertionError with the first fault that it finds.

    A row whose truth is unknown is an error, too, if there is no fault.
    """
    check(
        function,
        inputs,
        reference=reference,
        surrogate=surrogate,
        transforms=transforms,
        dtype=dtype,
    ).raise_on_failure()


# What PyTorch says of its own operators, whose names have no other namespace than "aten". Those
# that read a tensor's values have no batching rule on purpose: a function should not call them.
MISSING_RULE = re.compile(
    r"Batching rule not implemented for aten::(?!_local_scalar_dense|item|is_nonzero|equal)"
    r"|derivative for '?(aten::)?\w+'? is not implemented"
    r"|forward AD with (aten::)?\w+ that does not support it"
)


def _make_row(name: str, case: Case) -> Row:
    case.errors.clear()
    verdict, detail = _judge(REGISTRY[name], case)
    return Row(name, verdict, detail, max(case.errors, default=None))


def _judge(transform: Transform, case: Case) -> tuple[Verdict, str]:
    """Returns the verdict and its detail.

    If a control fails under the transform too, the verdict is "PyTorch cannot", with two
    exceptions. A written input is always the function's fault. So is a result that is wrong without
    an error where the control raises one. An error is also a limit of PyTorch if its message names
    an operator of PyTorch that lacks a rule, or if the function is one of PyTorch.
    """
    verdict, detail = _run(transform, case)
    if verdict is Verdict.RAISES and (case.is_pytorch_function or MISSING_RULE.search(detail)):
        return Verdict.CANNOT, detail
    if verdict.is_fault and verdict is not Verdict.WRITES:
        for name, control in _make_controls(case):
            control_verdict, control_detail = _run(transform, case.make_control(control))
            control_raises = control_verdict is Verdict.RAISES
            if control_verdict.is_fault and (verdict is Verdict.RAISES or not control_raises):
                return Verdict.CANNOT, f"{name}: {control_verdict}: {control_detail}"
    return verdict, detail


def _is_pytorch_function(function: Any) -> bool:
    """Whether the function, or each class of the module, is defined in PyTorch."""
    if isinstance(function, torch.nn.Module):
        owners = [type(module).__module__ for module in function.modules()]
    elif inspect.isroutine(function):
        owner = getattr(function, "__objclass__", function)  # of a method of torch.Tensor
        receiver = getattr(function, "__self__", None)
        if isinstance(receiver, type):  # of a class method, such as `apply` of a user's Function
            owner = receiver
        owners = [owner.__module__ or ""]
    else:
        return False
    return all(owner.partition(".")[0] == "torch" for owner in owners)


def _make_controls(case: Case) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yields names and operations that are right wherever PyTorch supports a transform.

    The first two are PyTorch operations. The derivative of `sin` reads the input, that of `exp` and
    `square` an intermediate result. The others do what the checked function does, too: they draw
    random numbers, write to a buffer, or call a Function with a `jvp`.
    """
    yield "torch.sin", torch.sin
    yield "torch.exp, then square", lambda x: x.exp().square()
    try:
        with _torch.RandomOperatorWatch() as watch:
            outputs = case.call(*case.make_leaves(protect=False))
        updates_buffers = case.updates_buffers()
    except Exception:  # the function itself raises
        return
    if watch.is_random:
        yield "dropout with a seed", drop_with_seed
    if updates_buffers:
        yield "a running mean", make_running_mean(case.dtype)
    functions = find_autograd_functions(outputs)
    if any(function.jvp is not torch.autograd.Function.jvp for function in functions):
        yield "a correct Function with a jvp", Sine.apply


def drop_with_seed(x: Tensor) -> Tensor:
    """Returns x with random entries set to 0, the same at each call."""
    torch.manual_seed(0)
    return torch.nn.functional.dropout(x, 0.5)


def make_running_mean(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Returns a function that writes to a copy of its buffer, as a module under test does."""
    buffer = torch.zeros((), dtype=dtype)

    def update_running_mean(x: Tensor) -> Tensor:
        mean = buffer.to(x.device, x.dtype).clone()
        mean.lerp_(x.detach().mean(), 0.1)
        return x.sin()

    return update_running_mean


def _run(transform: Transform, case: Case) -> tuple[Verdict, str]:
    """Runs the transform's check once, with warnings and logging suppressed."""
    verdict, detail = Verdict.RIGHT, ""
    previous_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # the report shows the errors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.draw_directions()
            transform.check(case)
    except Finding as finding:
        verdict, detail = finding.verdict, str(finding)
    except Exception as error:  # the function may raise any exception
        verdict, detail = Verdict.RAISES, describe_error(error)
    finally:
        logging.disable(previous_level)
    try:
        case.check_protected()
    except Finding as finding:
        verdict, detail = finding.verdict, str(finding)
    return verdict, detail


def _make_case(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    reference: Callable[..., Any] | None,
    surrogate: Callable[..., Any] | None,
    dtype: torch.dtype,
) -> Case:
    if not callable(function):
        raise TypeError(f"function must be callable, not {type(function).__name__}")
    if isinstance(function, type) and issubclass(function, torch.nn.Module):
        raise TypeError(f"give an instance of {function.__name__}, not the class")
    nesting, names, inputs = _flatten_inputs(inputs)
    positions = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    if not positions:
        positions = [i for i, x in enumerate(inputs) if is_real_tensor(x)]
    module, parameters = None, dict[str, Tensor]()
    if isinstance(function, torch.nn.Module):
        module = function
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        count = len(parameters)
        positions = [*range(count), *(count + i for i in positions)]
        for name, other in (("reference", reference), ("surrogate", surrogate)):
            if other is not None and not isinstance(other, torch.nn.Module):
                raise TypeError(f"the {name} of a module must be a module with the same parameters")
    if not positions:
        raise ValueError("no input is a tensor of real numbers: there is nothing to differentiate")

    def make_flat(function: Any, dtype: torch.dtype) -> Any:
        if function is None:
            return None
        positional = _make_positional(function, tuple(parameters), dtype)
        return nest_inputs(positional, nesting, len(parameters))

    arguments = (*parameters.values(), *inputs)
    return Case(
        function=make_flat(function, dtype),
        inputs=tuple(_copy(x, dtype) if isinstance(x, Tensor) else x for x in arguments),
        positions=tuple(positions),
        dtype=dtype,
        reference=make_flat(reference, torch.float64),
        surrogate=make_flat(surrogate, torch.float64),
        module=module,
        parameter_count=len(parameters),
        names=(*parameters, *names),
        nesting=nesting,
        is_pytorch_function=_is_pytorch_function(function),
    )


def _flatten_inputs(inputs: Sequence[Any]) -> tuple[Any, list[str], list[Any]]:
    """Returns the nesting of the inputs (see `nest_inputs`), the names and the leaves in it."""
    named_leaves = _torch.tree_leaves_with_keys(list(inputs))
    for _, x in named_leaves:
        if is_dataclass(x) and any(isinstance(each, Tensor) for each in list_leaves(x)):
            raise TypeError(
                f"an input is a {type(x).__name__}: register it by torch.export.register_dataclass"
            )
        if isinstance(x, Tensor) and x.is_complex():
            raise TypeError("complex inputs are not supported")
    positions = itertools.count()
    nesting = _torch.tree_map(lambda _: next(positions), list(inputs))
    names = [re.sub(r"^\[(\d+)\]", r"input \1", keys) for keys, _ in named_leaves]
    return nesting, names, [x for _, x in named_leaves]


class Sine(torch.autograd.Function):
    """A correct Function, written as PyTorch's documentation recommends."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.cos()

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dx * x.cos()


def _make_positional(
    function: Callable[..., Any], parameter_names: Sequence[str], dtype: torch.dtype
) -> Callable[..., Any]:
    """Returns a function of positional arguments, a module's parameters first."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return function.apply
    if not isinstance(function, torch.nn.Module):
        return function
    return make_module_function(function, parameter_names, (dtype, torch.float32, torch.float64))


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.detach().clone()
    return x.to(dtype) if x.is_floating_point() else x


def _get_name(function: Any) -> str:
    if isinstance(function, torch.nn.Module):
        return type(function).__name__
    return getattr(function, "__name__", None) or str(function)
