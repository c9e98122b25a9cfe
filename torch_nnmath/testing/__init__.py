"""A checker of derivatives: any function or `autograd.Function` under every transform of PyTorch.

>>> import torch
>>> from torch_nnmath import testing
>>> report = testing.check(torch.tanh, [torch.tensor([0.3, -1.2])], transforms=["gradient", "vmap"])
>>> print(report)
tanh, float64
gradient  right
vmap      right
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath.testing import _compilers  # noqa: F401  (enters its transforms into the table)
from torch_nnmath.testing._case import TOLERANCES, Case, module_function
from torch_nnmath.testing._report import Finding, Report, Row, Verdict, described
from torch_nnmath.testing._transforms import ALL, Transform, autograd_functions

__all__ = ["QUICK", "TRANSFORMS", "Report", "Row", "Verdict", "assert_right", "check"]

TRANSFORMS: tuple[str, ...] = tuple(ALL)
QUICK: tuple[str, ...] = tuple(name for name, each in ALL.items() if each.quick)


def check(
    function: Callable[..., Any],
    inputs: Sequence[Any] | Tensor,
    *,
    reference: Callable[..., Any] | None = None,
    transforms: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Tries a function under every transform of PyTorch, against the truth in float64.

    The truth comes from numerical differentiation of the function's value, or of the reference's.
    That takes some evaluations for each entry of the inputs: keep them small, as for
    `torch.autograd.gradcheck`, away from kinks, and let the function take float64 (or give a
    reference that does).

    Args:
        function: what is checked: a function, a module (its parameters are then inputs too) or a
            subclass of `torch.autograd.Function` (its `apply`). It returns a tensor, or a tuple
            of tensors.
        inputs: its positional arguments, tensors or not. Those that require gradients are
            differentiated; if none does, all tensors of real numbers are. They are not written.
            A module's parameters are differentiated beside them, unless they are frozen.
        reference: a function of the same arguments with the right value; for a module, a module
            with parameters of the same names.
        transforms: names from `TRANSFORMS`, such as `QUICK`; all if None.
        dtype: the precision of the inputs in the check, and that of its tolerances.

    Returns:
        A report: a row for each transform.

    Raises:
        ValueError: a transform that does not exist, or no input that could be differentiated.
        TypeError: a function that cannot be called, or inputs of a type that cannot be checked.
    """
    names = TRANSFORMS if transforms is None else tuple(transforms)
    for name in names:
        if name not in ALL:
            raise ValueError(f"no transform {name!r}; there are {', '.join(TRANSFORMS)}")
    if dtype not in TOLERANCES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, not {dtype}")
    case = _case(function, [inputs] if isinstance(inputs, Tensor) else inputs, reference, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so few numbers they would only wait for one another
    try:
        rows = tuple(Row(name, *_judge(ALL[name], case)) for name in names)
    finally:
        torch.set_num_threads(threads)
    return Report(_name(function), dtype, rows)


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
    """The verdict; a fault that PyTorch's own has too is PyTorch's.

    But to be silently wrong where PyTorch's own raises is a fault.
    """
    verdict, detail = _try(transform, case)
    if verdict.is_fault and verdict is not Verdict.WRITES:
        for name, control in _controls(case):
            own, why = _try(transform, case.control(control))
            if own.is_fault and (verdict is Verdict.RAISES or own is not Verdict.RAISES):
                return Verdict.CANNOT, f"{name}: {own}: {why}"
    return verdict, detail


def _controls(case: Case) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """What is right wherever PyTorch can be.

    Operations of its own (the derivative of one reads the input, that of the other something in
    between) and, if the function is made of Functions with a `jvp`, one of those.
    """
    yield "its own sin", torch.sin
    yield "its own exp and square", lambda x: x.exp().square()
    try:
        functions = [*autograd_functions(case.f(*case.leaves(watch=False)))]
    except Exception:  # it has no value
        return
    if any(function.jvp is not torch.autograd.Function.jvp for function in functions):
        yield "any Function with a jvp", Sine.apply


def _try(transform: Transform, case: Case) -> tuple[Verdict, str]:
    verdict, detail = Verdict.RIGHT, ""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what fails is said in the report
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.prepare()
            transform.check(case)
    except Finding as finding:
        verdict, detail = finding.verdict, str(finding)
    except Exception as error:  # whatever a function raises is what is found
        verdict, detail = Verdict.RAISES, described(error)
    finally:
        logging.disable(disabled)
    try:
        case.unwritten()
    except Finding as finding:
        verdict, detail = finding.verdict, str(finding)
    return verdict, detail


def _case(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    reference: Callable[..., Any] | None,
    dtype: torch.dtype,
) -> Case:
    if not callable(function):
        raise TypeError(f"function must be callable, not {type(function).__name__}")
    if isinstance(function, type) and issubclass(function, torch.nn.Module):
        raise TypeError(f"give an instance of {function.__name__}, not the class")
    given = []
    for x in inputs:
        if isinstance(x, Tensor) and x.is_complex():
            raise TypeError("complex inputs are not supported")
        given.append(_copy(x, dtype) if isinstance(x, Tensor) else x)
    places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    if not places:
        places = [i for i, x in enumerate(given) if _is_real(x)]
    module, names = None, tuple[str, ...]()
    if isinstance(function, torch.nn.Module):
        module = function
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        names = tuple(parameters)
        given = [*(_copy(p, dtype) for p in parameters.values()), *given]
        places = [*range(len(names)), *(len(names) + i for i in places)]
        if reference is not None and not isinstance(reference, torch.nn.Module):
            raise TypeError("the reference of a module must be a module with the same parameters")
    if not places:
        raise ValueError("no input is a tensor of real numbers: there is nothing to differentiate")
    return Case(
        _as_function(function, names, dtype),
        given,
        places,
        exact=None if reference is None else _as_function(reference, names, torch.float64),
        module=module,
        parameters=names,
        dtype=dtype,
        referred=reference is not None,
    )


class Sine(torch.autograd.Function):
    """A right Function, as PyTorch's documentation tells how to write one."""

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


def _as_function(
    function: Callable[..., Any], names: Sequence[str], dtype: torch.dtype
) -> Callable[..., Any]:
    """A function of positional arguments, a module's parameters first."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return function.apply
    if not isinstance(function, torch.nn.Module):
        return function
    return module_function(function, names, (dtype, torch.float32, torch.float64))


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.detach().clone()
    return x.to(dtype) if x.is_floating_point() else x


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _name(function: Any) -> str:
    if isinstance(function, torch.nn.Module):
        return type(function).__name__
    return getattr(function, "__name__", None) or str(function)
