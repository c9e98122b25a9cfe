"""A function at a point: how to call it, and the truth about it by numerical differentiation.

The truth needs values only: those of the reference, or else of the function itself, in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from torch_nnmath.testing._report import NotApplicable, SilentZero, WritesInput, Wrong

# Relative to the largest entry of the truth, for the value and the derivatives of each order.
TOLERANCES = {
    torch.float64: (1e-10, 1e-8, 1e-6, 1e-4),
    torch.float32: (1e-5, 1e-4, 1e-3, 1e-2),
    torch.float16: (1e-2, 2e-2, 5e-2, 2e-1),
    torch.bfloat16: (5e-2, 5e-2, 2e-1, 5e-1),
}
STEPS = (0.0, 1e-4, 5e-4, 4e-3)  # of the numerical derivative of each order
EPS = torch.finfo(torch.float64).eps

Tensors = tuple[Tensor, ...]


class Case:
    """A function and its inputs: the differentiable ones stand at `places` among the tensors."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        places: Sequence[int],
        exact: Callable[..., Any] | None = None,
        module: torch.nn.Module | None = None,
        parameters: Sequence[str] = (),
        dtype: torch.dtype = torch.float64,
        referred: bool = False,
    ):
        self.function = function
        self.inputs = tuple(inputs)
        self.places = tuple(places)
        self.exact = exact or function
        self.module = module
        self.parameters = tuple(parameters)  # of the module: the first inputs
        self.dtype = dtype
        self.referred = referred  # whether `exact` is a reference
        self._size = 0.0  # the largest value that was met
        self._watched: list[tuple[str, Tensor, Tensor, int]] = []

    def at(self, inputs: Sequence[Any], **changes: Any) -> Case:
        """The same function at another point."""
        options = {
            "exact": self.exact,
            "module": self.module,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "referred": self.referred,
        }
        return Case(self.function, inputs, self.places, **{**options, **changes})

    # calling it

    @cached_property
    def f(self) -> Callable[..., Tensors]:
        """The function of its differentiable inputs alone: a tuple of its real outputs."""
        function, inputs, places = self.function, self.inputs, self.places

        def f(*xs: Tensor) -> Tensors:
            arguments = list(inputs)
            for place, x in zip(places, xs, strict=True):
                arguments[place] = x
            return real_tensors(function(*arguments))

        return f

    @property
    def tensor_places(self) -> tuple[int, ...]:
        """Where tensors stand among the inputs, differentiable or not."""
        return tuple(i for i, x in enumerate(self.inputs) if isinstance(x, Tensor))

    @property
    def of_tensors(self) -> Callable[..., Tensors]:
        """The function of all of its tensors."""
        case = copy.copy(self)
        case.places = self.tensor_places
        case.__dict__.pop("f", None)
        return case.f

    @property
    def tensors(self) -> Tensors:
        """All tensors among the inputs."""
        return tuple(self.inputs[i] for i in self.tensor_places)

    @property
    def points(self) -> Tensors:
        """The differentiable inputs, as data."""
        return tuple(self.inputs[i] for i in self.places)

    def leaves(self, watch: bool = True) -> Tensors:
        """Fresh differentiable inputs that require gradients; they may not be written."""
        xs = tuple(x.clone().requires_grad_() for x in self.points)
        if watch:
            for name, x in zip(self.labels, xs, strict=True):
                self.watch(name, x)
        return xs

    def tensor_leaves(self) -> tuple[Tensors, Tensors]:
        """Copies of all tensors; and those that are differentiable, which require gradients."""
        tensors = tuple(x.clone() for x in self.tensors)
        pairs = zip(self.tensor_places, tensors, strict=True)
        return tensors, tuple(x.requires_grad_() for place, x in pairs if place in self.places)

    def watch(self, name: str, x: Tensor) -> Tensor:
        """Notes what x holds, for `unwritten`."""
        self._watched.append((name, x, x.detach().clone(), x._version))
        return x

    def unwritten(self) -> None:
        """Raises if a tensor that was given to the function has been written since."""
        watched, self._watched = self._watched, []
        for name, x, before, version in watched:
            if not same(x.detach(), before):
                off = (x.detach() - before).abs().max().item()
                raise WritesInput(f"{name} was changed, by up to {off:.3g}")
            if x._version != version:
                raise WritesInput(f"{name} was written in place (with the numbers that it had)")

    @property
    def labels(self) -> tuple[str, ...]:
        """What the differentiable inputs are called."""
        count = len(self.parameters)
        return tuple(self.parameters[i] if i < count else f"input {i - count}" for i in self.places)

    # directions: upstream gradients and tangents, the same whenever they are asked for

    @cached_property
    def upstream(self) -> Tensors:
        """An upstream gradient for each output: uneven, none of them 0 or 1."""
        return tuple(_numbers(y, 1 + i) for i, y in enumerate(self.outputs))

    @cached_property
    def tangents(self) -> Tensors:
        """A direction in each differentiable input."""
        return tuple(_numbers(x, 101 + i) for i, x in enumerate(self.points))

    def prepare(self) -> None:
        """Makes what may not be made inside a transform."""
        _ = self.upstream, self.tangents

    # the truth

    def evaluate(self, *xs: Tensor) -> Tensors:
        """The exact value in float64, at other differentiable inputs."""
        arguments = [x.double() if _is_real(x) else x for x in self.inputs]
        for place, x in zip(self.places, xs, strict=True):
            arguments[place] = x
        arguments = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments]
        with torch.no_grad():
            values = tuple(y.clone() for y in real_tensors(self.exact(*arguments)))
        self._size = max(self._size, *map(_largest, values), 0.0)
        return values

    @cached_property
    def outputs(self) -> Tensors:
        """The exact value."""
        point = tuple(x.double() for x in self.points)
        first, second = self.evaluate(*point), self.evaluate(*point)
        if not first:
            raise Wrong("it returns no tensor of real numbers")
        for y, again in zip(first, second, strict=True):
            if not same(y, again):
                raise Wrong("it gives another value each time it is called: seed it inside")
        return first

    @cached_property
    def jacobian(self) -> list[list[Tensor]]:
        """For each output and each input, the matrix of derivatives."""
        columns = [list(self._derivatives(i, 1)) for i in range(len(self.places))]
        return [
            [
                torch.stack([column[o].flatten() for column in of_input], 1)
                if of_input
                else y.new_zeros(y.numel(), 0)
                for of_input in columns
            ]
            for o, y in enumerate(self.outputs)
        ]

    @cached_property
    def second(self) -> Tensors:
        """The Hessian of Σ upstream · f times `tangents`: a vector for each input."""
        return tuple(
            torch.stack([dot(self.upstream, column) for column in self._derivatives(i, 2)]).view_as(
                x
            )
            if x.numel()
            else x.double()
            for i, x in enumerate(self.points)
        )

    @cached_property
    def third(self) -> Tensor:
        """The third derivative of Σ upstream · f along `tangents`."""
        return dot(self.upstream, self._along(self.tangents, 3, 3))

    def pulled(self, upstream: Sequence[Tensor]) -> Tensors:
        """The gradient: the upstream gradients times the Jacobian."""
        rows = zip(upstream, self.jacobian, strict=True)
        products = [[u.double().flatten() @ J for J in row] for u, row in rows]
        columns = zip(zip(*products, strict=True), self.points, strict=True)
        return tuple(torch.stack(parts).sum(0).view(x.shape) for parts, x in columns)

    def pushed(self, tangents: Sequence[Tensor]) -> Tensors:
        """The tangent of each output: the Jacobian times the tangents."""
        flat = [t.double().flatten() for t in tangents]
        return tuple(
            torch.stack([J @ t for J, t in zip(row, flat, strict=True)]).sum(0).view(y.shape)
            for row, y in zip(self.jacobian, self.outputs, strict=True)
        )

    def _derivatives(self, i: int, order: int) -> Any:
        """The derivative of the outputs in each entry of input i, of order 2 along tangents too."""
        for entry in range(self.points[i].numel()):
            direction = [torch.zeros_like(x, dtype=torch.float64) for x in self.points]
            direction[i].view(-1)[entry] = 1
            yield self._along(direction, 1, order)

    def _along(self, direction: Sequence[Tensor], times: int, order: int) -> Tensors:
        """The derivative `times` times along a direction, else along the tangents.

        The step is made smaller until the derivative no longer changes: so a kink nearby does no
        harm.
        """
        directions = [direction] * times + [self.tangents] * (order - times)
        step, previous = STEPS[order], None
        for _ in range(5):
            value = _difference(self.evaluate, [x.double() for x in self.points], directions, step)
            if previous is not None and all(
                far(a, b) <= 0.1 * self.allowed(b, order, step)
                for a, b in zip(previous, value, strict=True)
            ):
                return previous
            step, previous = step / 4, value
        raise Wrong("numerical differentiation of its value does not converge here: a kink?")

    def allowed(self, truth: Tensor, order: int, step: float = 0.0) -> float:
        """How far from the truth a result may be: rounding of the truth, and of the result."""
        noise = 50 * EPS * self._size / (step or STEPS[order] / 4) ** order if order else 0.0
        return TOLERANCES[self.dtype][order] * _largest(truth) + noise

    # comparing with it

    def compare(
        self,
        got: Sequence[Tensor | None],
        truth: Sequence[Tensor],
        what: str,
        order: int = 1,
        labels: Sequence[Any] | None = None,
    ) -> None:
        """Raises a finding unless each tensor is its truth; `what` says which, by its label."""
        labels = labels or range(len(truth))
        for label, mine, exact in zip(labels, got, truth, strict=True):
            name = what.format(label)
            allowed = self.allowed(exact, order)
            silent = "no graph" if mine is None else "zeros"
            if mine is None or (mine.numel() and not mine.detach().any()):
                if _largest(exact) > allowed:
                    raise SilentZero(f"{name} is 0 ({silent}), the truth {_largest(exact):.3g}")
                continue
            if mine.shape != exact.shape:
                raise Wrong(f"{name} has shape {tuple(mine.shape)}, not {tuple(exact.shape)}")
            mine = mine.detach().double().to(exact.device)
            off = far(mine, exact)
            if not off <= allowed:
                at = ((mine - exact).abs().nan_to_num(math.inf)).argmax()
                pair = mine.flatten()[at].item(), exact.flatten()[at].item()
                raise Wrong(f"{name} is {pair[0]:.6g}, the truth {pair[1]:.6g}")

    def compare_value(self, got: Sequence[Tensor]) -> None:
        if len(got) != len(self.outputs):
            raise Wrong(f"it returns {len(got)} tensors, not {len(self.outputs)}")
        self.compare(got, self.outputs, "output {}", 0)

    def compare_gradient(
        self, got: Sequence[Tensor | None], upstream: Sequence[Tensor] | None = None
    ) -> None:
        for label, g, x in zip(self.labels, got, self.points, strict=True):
            if g is not None and g.dtype != x.dtype:
                raise Wrong(f"the gradient in {label} is {g.dtype}, and {label} {x.dtype}")
        truth = self.pulled(upstream or self.upstream)
        self.compare(got, truth, "the gradient in {}", labels=self.labels)

    def compare_tangent(
        self, got: Sequence[Tensor | None], tangents: Sequence[Tensor] | None = None
    ) -> None:
        self.compare(got, self.pushed(tangents or self.tangents), "the tangent of output {}")

    def compare_second(self, got: Sequence[Tensor | None]) -> None:
        self.compare(got, self.second, "the Hessian times a vector, in {},", 2, self.labels)

    # other points

    @cached_property
    def members(self) -> list[Case]:
        """Three points for a batch: this one and two like it."""
        return [self, *(self.at(self._moved(k)) for k in (1, 2))]

    def _moved(self, k: int) -> list[Any]:
        moved = list(self.inputs)
        for place in self.places:
            x = moved[place]
            moved[place] = (x.double() * (1 + 0.05 * _numbers(x, 200 + 10 * k + place))).to(x.dtype)
        rolled = [
            x.roll(k, 0) if isinstance(x, Tensor) and not x.is_floating_point() and x.ndim else x
            for x in moved
        ]
        return rolled if self._takes(rolled) else moved

    def enlarged(self, rows: int) -> Case:
        """The case with its batch repeated to so many rows.

        The batch is the first dimension of the first input that has one, and of all inputs that
        have as many rows.
        """
        n = self.rows
        inputs = [
            x[torch.arange(rows, device=x.device) % n].clone() if in_batch else x
            for x, in_batch in zip(self.inputs, self.in_batch, strict=True)
        ]
        if not self._takes(inputs):
            raise NotApplicable(f"the function does not take {rows} rows for {n} of its inputs")
        return self.at(inputs)

    @property
    def rows(self) -> int:
        """How many rows the batch has."""
        for x in self.inputs[len(self.parameters) :]:
            if isinstance(x, Tensor) and x.numel() and x.ndim:
                return len(x)
        raise NotApplicable("no input has rows")

    @property
    def in_batch(self) -> list[bool]:
        """Which inputs have a row for each of the batch."""
        n = self.rows
        return [
            i >= len(self.parameters) and isinstance(x, Tensor) and x.ndim > 0 and len(x) == n
            for i, x in enumerate(self.inputs)
        ]

    def _takes(self, inputs: Sequence[Any]) -> bool:
        """Whether the function has a value there, of as many tensors: only it can tell."""
        try:
            values = self.at(inputs).evaluate(*(inputs[i].double() for i in self.places))
        except Exception:  # whatever a function raises says no
            return False
        return len(values) == len(self.outputs)

    def to(self, dtype: torch.dtype) -> Case:
        """The case with its real inputs in another precision."""
        return self.at([x.to(dtype) if _is_real(x) else x for x in self.inputs], dtype=dtype)

    def control(self, operation: Callable[[Tensor], Tensor]) -> Case:
        """An operation on each differentiable input in the place of the function, at tame numbers.

        It reads the other tensors too, so that a compiler meets as many.
        """
        places, others = self.places, sorted({*self.tensor_places} - {*self.places})

        def control(*inputs: Any) -> Any:
            nothing = [0 * inputs[i].sum().to(inputs[places[0]].dtype) for i in others]
            return tuple(sum(nothing, operation(inputs[i])) for i in places)

        inputs = [
            _numbers(x, 301 + i).to(x.dtype) if _is_real(x) else x
            for i, x in enumerate(self.inputs)
        ]
        return Case(control, inputs, self.places, dtype=self.dtype)


def module_function(
    module: torch.nn.Module, parameters: Sequence[str], dtypes: Sequence[torch.dtype]
) -> Callable[..., Any]:
    """A module as a function of some of its parameters and its inputs, in several precisions."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    others = {name: x.detach() for name, x in state.items() if name not in parameters}
    states = {}
    for dtype in dtypes:
        there = {n: x.to(dtype, copy=True) if _is_real(x) else x.clone() for n, x in others.items()}
        states[dtype, False] = there
        states[dtype, True] = {n: x.to("meta") for n, x in there.items()}

    def call(*inputs: Any) -> Any:
        kind = next((x.dtype, x.is_meta) for x in inputs if _is_real(x))
        given = dict(zip(parameters, inputs[: len(parameters)], strict=True))
        return functional_call(module, {**states[kind], **given}, inputs[len(parameters) :])

    return call


def real_tensors(result: Any) -> Tensors:
    """The tensors of real numbers that a function returns."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(y for y in parts if isinstance(y, Tensor) and y.is_floating_point())


def dot(us: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Σ u · y over several tensors."""
    terms = [(u.to(y.dtype) * y).sum() for u, y in zip(us, ys, strict=True)]
    return torch.stack(terms).sum()


def far(x: Tensor, y: Tensor) -> float:
    """The largest |x - y|; equal infinities and nan in both are near."""
    distance = (x - y).abs().masked_fill((x == y) | (x.isnan() & y.isnan()), 0)
    return distance.max().item() if distance.numel() else 0.0


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal, nan for nan."""
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def _largest(x: Tensor) -> float:
    return x.nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _numbers(x: Tensor, seed: int) -> Tensor:
    """Numbers shaped as x, between 0.4 and 1.2 of either sign, in float64."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.4 + 0.8 * torch.rand(x.shape, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    return (size * sign).to(x.device)


def _difference(
    f: Callable[..., Tensors], point: Sequence[Tensor], directions: Sequence[Any], step: float
) -> Tensors:
    """The derivative along each direction in turn, by central differences of fourth order."""
    if not directions:
        return f(*point)
    first, *rest = directions
    total: Any = None
    for k, weight in ((1, 2 / 3), (-1, -2 / 3), (2, -1 / 12), (-2, 1 / 12)):
        moved = [x + k * step * d for x, d in zip(point, first, strict=True)]
        terms = [weight / step * y for y in _difference(f, moved, rest, step)]
        total = terms if total is None else [a + b for a, b in zip(total, terms, strict=True)]
    return tuple(total)
