"""The records of the benchmark: a work, its arguments, contenders, floor and targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Size = tuple[int, ...]
Results = tuple[Tensor, ...]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """The arguments of a work: leaves, which get a gradient, then constants.

    `upstream` is the upstream gradient if the output is not a scalar. For a Hessian-vector product
    it is the vector: a tensor for each leaf.
    """

    leaves: Results
    constants: Results = ()
    upstream: Results | None = None

    @property
    def args(self) -> Results:
        return self.leaves + self.constants

    def copy(self, dtype: torch.dtype | None = None) -> Problem:
        """Returns a copy; casts floating-point tensors to `dtype`, if given."""

        def copy_tensor(x: Tensor) -> Tensor:
            target = dtype if dtype and x.is_floating_point() else x.dtype
            return x.detach().to(target, copy=True).requires_grad_(x.requires_grad)

        groups = (self.leaves, self.constants, self.upstream or ())
        leaves, constants, upstream = (tuple(map(copy_tensor, tensors)) for tensors in groups)
        return Problem(leaves, constants, upstream or None)


class RandomTensors:
    """Random tensors from a fixed seed, so that every run has the same arguments."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        generator, dtype, device = self.generator, self.dtype, self.device
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    def class_indices(self, rows: int, classes: int) -> Tensor:
        return torch.randint(classes, (rows,), generator=self.generator, device=self.device)


# The modes: what one timed call computes. Each returns the value, then the derivatives.
# They call `autograd.grad`, because `backward` would also add each gradient to `.grad`.


def forward_backward(function: Function, problem: Problem) -> Results:
    """Returns the value and the gradients of the leaves."""
    value = function(*problem.args)
    return value.detach(), *torch.autograd.grad(value, problem.leaves, problem.upstream)


def forward(function: Function, problem: Problem) -> Results:
    """Returns the value alone, computed without a graph."""
    with torch.no_grad():
        return (function(*problem.args),)


def hessian_vector_product(function: Function, problem: Problem) -> Results:
    """Returns the value and the Hessian-vector product, computed by double backward."""
    value, leaves = function(*problem.args), problem.leaves
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    return value.detach(), *torch.autograd.grad(gradients, leaves, problem.upstream)


@dataclass(frozen=True)
class Contender:
    """One implementation of a work."""

    function: Function
    is_compiled: bool = False  # by torch.compile
    materialises_logits: bool = False  # all of the head's logits at once
    overwrites_arguments: bool = False  # and therefore gets a copy of them
    is_equivalent: bool = True  # computes the same values as the other contenders


@dataclass(frozen=True)
class Floor:
    """A lower bound of a work's time on this machine: the least operations that it needs."""

    description: str
    prepare: Callable[[Problem], Callable[[], object]]


@dataclass(frozen=True)
class Target:
    """An upper limit that this project sets for a contender, mostly relative to a baseline.

    "time", "memory" (peaks) and "error" limit the ratio contender / baseline, "difference" the
    difference of their times in µs, "peak" the contender's peak in MiB, "growth" its increase in
    MiB from the first size to the last. A target without a size holds at every size.
    """

    limit: float
    baseline: str = ""
    contender: str = "ours"
    kind: Literal["time", "memory", "error", "difference", "peak", "growth"] = "time"
    size: Size | None = None

    def __str__(self) -> str:
        return {
            "time": f"{self.contender} / {self.baseline}",
            "memory": f"peak of {self.contender} / of {self.baseline}",
            "error": f"error of {self.contender} / of {self.baseline}",
            "difference": f"{self.contender} - {self.baseline}, µs",
            "peak": f"peak of {self.contender}, MiB",
            "growth": f"peak of {self.contender}, MiB more than at the first size",
        }[self.kind]


@dataclass(frozen=True)
class Work:
    """A computation and its contenders, with the sizes to run and what to measure."""

    name: str
    description: str
    axes: tuple[str, ...]
    draw_inputs: Callable[..., Problem]  # called with RandomTensors and the size's numbers
    contenders: Mapping[str, Contender]
    sizes: tuple[Size, ...]
    cuda_sizes: tuple[Size, ...]
    floor: Floor | None = None
    targets: tuple[Target, ...] = ()
    mode: Callable[[Function, Problem], Results] = forward_backward
    dtype: torch.dtype = torch.float32
    round_limits: tuple[int, int] = (5, 101)  # the least and the most rounds; (0, 0): not timed
    measures_error: bool = True
    measures_memory: bool = False
    is_training_step: bool = False  # functions take the problem and return the call to time

    def make_problem(self, size: Size, dtype: torch.dtype, device: str) -> Problem:
        """Returns random arguments of this size."""
        problem = self.draw_inputs(RandomTensors(dtype, device), *size)
        for x in problem.leaves:
            x.requires_grad_()
        return problem

    def prepare(self, name: str, problem: Problem) -> Callable[[], Results]:
        """Returns a contender as a repeatable call without arguments."""
        contender = self.contenders[name]
        function = contender.function
        if contender.is_compiled:
            function = torch.compile(function)
        problem = problem.copy() if contender.overwrites_arguments else problem
        if self.is_training_step:
            step: Callable[[], Results] = function(problem)  # type: ignore[assignment]
            return step
        return functools.partial(self.mode, function, problem)

    def parse_size(self, text: str) -> Size:
        """Parses a size such as 1024x512. Raises ValueError with the expected format."""
        numbers = text.split("x")
        if len(numbers) != len(self.axes) or not all(n.isdecimal() and int(n) for n in numbers):
            expected = f"{'x'.join(self.axes)}, such as {format_size(self.sizes[0])}"
            raise ValueError(f"a size of {self.name} is {expected}, not {text!r}")
        return tuple(map(int, numbers))

    def default_sizes(self, device: str) -> tuple[Size, ...]:
        """Returns the sizes to run on this device when none are given."""
        return (device == "cuda" and self.cuda_sizes) or self.sizes


def format_size(size: Size) -> str:
    """Formats a size, for example as 1024x512."""
    return "x".join(map(str, size))


def format_dtype(dtype: torch.dtype) -> str:
    """Formats a dtype, for example as float32."""
    return str(dtype).removeprefix("torch.")
