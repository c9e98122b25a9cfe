"""The public functions `check` and `assert_right`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath.testing import _compilers  # noqa: F401  (registers its transforms)
from torch_nnmath.testing._calls import find_autograd_functions
from torch_nnmath.testing._case import TOLERANCES, Case, is_real_tensor, make_module_function
from torch_nnmath.testing._report import Finding, Report, Row, Verdict, describe_error
from torch_nnmath.testing._transforms import REGISTRY, Transform

TRANSFORMS: tuple[str, ...] = tuple(REGISTRY)
QUICK: tuple[str, ...] = tuple(name for name, each in REGISTRY.items() if each.is_quick)


def check(
    function: Callable[..., Any],
    inputs: Sequence[Any] | Tensor,
    *,
    reference: Callable[..., Any] | None = None,
    transforms: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Checks a function under every transform of PyTorch, against exact values in float64.

    The exact derivatives come from numerical differentiation of the function's value, or of the
    reference's. This evaluates the function several times for each entry of the inputs: keep them
    small, as for `torch.autograd.gradcheck`, and away from kinks. The function must accept float64,
    unless there is a reference that does.

    Args:
        function: a function, a module (its parameters are then inputs too) or a subclass of
            `torch.autograd.Function` (its `apply`). It returns a tensor or a tuple of tensors.
        inputs: the positional arguments, tensors or not. Those that require gradients are
            differentiated; if none does, all floating-point tensors are. They are never written.
            A module's parameters are differentiated too, unless they are frozen.
        reference: a function of the same arguments with the right value; for a module, a module
            with parameters of the same names.
        transforms: names from `TRANSFORMS`, such as `QUICK`; None for all.
        dtype: the precision of the inputs in the check, and that of its tolerances.

    Returns:
        A report with one row for each transform.

    Raises:
        ValueError: a transform that does not exist, or no input that can be differentiated.
        TypeError: a function that is not callable, or inputs of an unsupported type.
    """
    names = TRANSFORMS if transforms is None else tuple(transforms)
    for name in names:
        if name not in REGISTRY:
            raise ValueError(f"no transform {name!r}; there are {', '.join(TRANSFORMS)}")
    if dtype not in TOLERANCES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, not {dtype}")
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    case = _make_case(function, inputs, reference, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small for more
    try:
        rows = tuple(Row(name, *_judge(REGISTRY[name], case)) for name in names)
    finally:
        torch.set_num_threads(threads)
    return Report(_get_name(function), dtype, rows)


def assert_right(
    function: Callable[..., Any],
    inputs: Sequence[Any] | Tensor,
    *,
    reference: Callable[..., Any] | None = None,
    transforms: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Raises AssertionError with the first transform under which `check` finds a fault."""
    check(
        function, inputs, reference=reference, transforms=transforms, dtype=dtype
    ).raise_on_failure()


def _judge(transform: Transform, case: Case) -> tuple[Verdict, str]:
    """Returns the verdict and its detail.

    A fault that a control has too is PyTorch's. But if the control raises, a function that is
    silently wrong is still at fault.
    """
    verdict, detail = _run(transform, case)
    if verdict.is_fault and verdict is not Verdict.WRITES:
        for name, control in _make_controls(case):
            control_verdict, control_detail = _run(transform, case.make_control(control))
            is_loud = control_verdict is Verdict.RAISES
            if control_verdict.is_fault and (verdict is Verdict.RAISES or not is_loud):
                return Verdict.CANNOT, f"{name}: {control_verdict}: {control_detail}"
    return verdict, detail


def _make_controls(case: Case) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yields names and operations that are right wherever PyTorch supports a transform.

    Two are PyTorch's: the derivative of one reads the input, that of the other an intermediate
    result. If the function consists of Functions with a `jvp`, the third is such a Function.
    """
    yield "torch.sin", torch.sin
    yield "torch.exp, then square", lambda x: x.exp().square()
    try:
        functions = [*find_autograd_functions(case.call(*case.make_leaves(protect=False)))]
    except Exception:  # the function itself raises
        return
    if any(function.jvp is not torch.autograd.Function.jvp for function in functions):
        yield "a correct Function with a jvp", Sine.apply


def _run(transform: Transform, case: Case) -> tuple[Verdict, str]:
    """Runs the transform's check once, without its warnings and logs."""
    verdict, detail = Verdict.RIGHT, ""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # the report contains the errors
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
        logging.disable(disabled)
    try:
        case.check_protected()
    except Finding as finding:
        verdict, detail = finding.verdict, str(finding)
    return verdict, detail


def _make_case(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    reference: Callable[..., Any] | None,
    dtype: torch.dtype,
) -> Case:
    if not callable(function):
        raise TypeError(f"function must be callable, not {type(function).__name__}")
    if isinstance(function, type) and issubclass(function, torch.nn.Module):
        raise TypeError(f"give an instance of {function.__name__}, not the class")
    if any(isinstance(x, Tensor) and x.is_complex() for x in inputs):
        raise TypeError("complex inputs are not supported")
    positions = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    if not positions:
        positions = [i for i, x in enumerate(inputs) if is_real_tensor(x)]
    module, parameters = None, dict[str, Tensor]()
    if isinstance(function, torch.nn.Module):
        module = function
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        count = len(parameters)
        positions = [*range(count), *(count + i for i in positions)]
        if reference is not None and not isinstance(reference, torch.nn.Module):
            raise TypeError("the reference of a module must be a module with the same parameters")
    if not positions:
        raise ValueError("no input is a tensor of real numbers: there is nothing to differentiate")
    names = tuple(parameters)
    arguments = (*parameters.values(), *inputs)
    return Case(
        function=_make_positional(function, names, dtype),
        inputs=tuple(_copy(x, dtype) if isinstance(x, Tensor) else x for x in arguments),
        positions=tuple(positions),
        dtype=dtype,
        reference=None if reference is None else _make_positional(reference, names, torch.float64),
        module=module,
        parameter_names=names,
    )


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
