"""A function at a point: its exact value and derivatives in float64.

The exact value is that of the reference, or else of the function itself. The exact derivatives are
numerical derivatives of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch_nnmath.testing._differences import (
    STEPS,
    Estimate,
    estimate_derivative,
    limit_by_magnitude,
    max_distance,
)
from torch_nnmath.testing._functions import Tensors, is_real_tensor, select_real_tensors
from torch_nnmath.testing._report import Unknown, Wrong

# For the value and the derivatives of order 1 to 3, relative to the exact tensor's largest entry.
TOLERANCES = {
    torch.float64: (1e-10, 1e-8, 1e-6, 1e-4),
    torch.float32: (1e-5, 1e-4, 1e-3, 1e-2),
    torch.float16: (1e-2, 2e-2, 5e-2, 2e-1),
    torch.bfloat16: (5e-2, 5e-2, 2e-1, 5e-1),
}
MAX_ENTRIES = 64  # of all inputs, each of which is a direction of numerical differentiation
EPS = torch.finfo(torch.float64).eps


@dataclass(eq=False)
class Point:
    """A function and its inputs; the differentiable ones are at `positions`.

    `exact_function` is the reference or the function itself. The surrogate is a function with the
    derivatives that the function declares. If the function is a module, the inputs begin with its
    parameters. `names` are those of all inputs in messages. `nesting` is the argument of
    `nest_inputs`.
    """

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    positions: tuple[int, ...]
    dtype: torch.dtype
    reference: Callable[..., Any] | None = None
    surrogate: Callable[..., Any] | None = None
    module: torch.nn.Module | None = None
    parameter_count: int = 0
    names: tuple[str, ...] = ()
    nesting: Any = None
    is_pytorch_function: bool = False
    is_neighbour: bool = False  # takes autograd's derivatives without confirmation
    # Relative to the largest entry, of each comparison; shared with the points made from this one
    errors: list[float] = field(default_factory=list)
    _max_value: float = field(default=0.0, init=False)  # of all values computed so far

    # Calls

    @cached_property
    def call(self) -> Callable[..., Tensors]:
        """The function of the differentiable inputs alone, which returns its real outputs."""
        function, inputs, positions = self.function, self.inputs, self.positions

        def call(*xs: Tensor) -> Tensors:
            arguments = list(inputs)
            for position, x in zip(positions, xs, strict=True):
                arguments[position] = x
            return select_real_tensors(function(*arguments))

        return call

    @property
    def call_tensors(self) -> Callable[..., Tensors]:
        """The function of all tensors among the inputs, which returns its real outputs."""
        return replace(self, positions=self.tensor_positions).call

    @property
    def argnums(self) -> tuple[int, ...]:
        """The positions of the differentiable inputs among the arguments of `call`."""
        return tuple(range(len(self.positions)))

    @property
    def tensor_argnums(self) -> tuple[int, ...]:
        """The positions of the differentiable inputs among the arguments of `call_tensors`."""
        return tuple(i for i, p in enumerate(self.tensor_positions) if p in self.positions)

    @property
    def tensor_positions(self) -> tuple[int, ...]:
        """The positions of the tensors among the inputs, differentiable or not."""
        return tuple(i for i, x in enumerate(self.inputs) if isinstance(x, Tensor))

    @property
    def tensors(self) -> Tensors:
        """All tensors among the inputs."""
        return tuple(self.inputs[i] for i in self.tensor_positions)

    @property
    def differentiable_inputs(self) -> Tensors:
        """The differentiable inputs, without requires_grad."""
        return tuple(self.inputs[i] for i in self.positions)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the differentiable inputs in messages."""
        return tuple(self.names[i] for i in self.positions)

    # Directions, the same in every transform

    @cached_property
    def upstream(self) -> Tensors:
        """A random upstream gradient for each output; no entry is 0 or 1."""
        return tuple(random_like(y, 1 + i) for i, y in enumerate(self.exact_outputs))

    @cached_property
    def tangents(self) -> Tensors:
        """A random tangent for each differentiable input, small for entries close to 0."""
        pairs = enumerate(self.differentiable_inputs)
        return tuple(limit_by_magnitude(random_like(x, 101 + i), x) for i, x in pairs)

    def draw_directions(self) -> None:
        """Draws the directions now: a transform would batch or trace the random numbers."""
        _ = self.upstream, self.tangents

    # Exact values and derivatives

    @property
    def exact_function(self) -> Callable[..., Any]:
        """The reference, or the function if there is none."""
        return self.reference or self.function

    def evaluate_exact(self, *xs: Tensor) -> Tensors:
        """Returns the exact outputs in float64, with xs as the differentiable inputs."""
        return self._evaluate(self.exact_function, xs)

    def _evaluate_surrogate(self, *xs: Tensor) -> Tensors:
        """Returns the outputs of the function that numerical differentiation differentiates."""
        return self._evaluate(self.surrogate or self.exact_function, xs)

    def _evaluate(self, function: Callable[..., Any], xs: Sequence[Tensor]) -> Tensors:
        with torch.no_grad():
            outputs = self._call_exactly(function, [x.detach().clone() for x in xs])
            values = tuple(y.clone() for y in outputs)
        self._max_value = max(self._max_value, *map(max_magnitude, values), 0.0)
        return values

    def _call_exactly(self, function: Callable[..., Any], xs: Sequence[Tensor]) -> Tensors:
        """Calls the function in float64, with xs as the differentiable inputs."""
        positions = {*self.positions}
        arguments = [
            x.to(torch.float64 if is_real_tensor(x) else x.dtype, copy=True)
            if isinstance(x, Tensor) and i not in positions
            else x
            for i, x in enumerate(self.inputs)
        ]
        for position, x in zip(self.positions, xs, strict=True):
            arguments[position] = x
        return select_real_tensors(function(*arguments))

    @cached_property
    def exact_outputs(self) -> Tensors:
        """The exact outputs at the inputs."""
        point = tuple(x.double() for x in self.differentiable_inputs)
        outputs, second_outputs = self.evaluate_exact(*point), self.evaluate_exact(*point)
        if not outputs:
            raise Wrong("the function returns no tensor of real or complex numbers")
        if self.surrogate is not None:
            shapes = [y.shape for y in self._evaluate_surrogate(*point)]
            if shapes != [y.shape for y in outputs]:
                raise Wrong(f"the surrogate returns tensors of shapes {[*map(tuple, shapes)]}")
        for y, second_y in zip(outputs, second_outputs, strict=True):
            if not are_equal(y, second_y):
                raise Wrong(
                    "the function returns another value at each call: seed random numbers inside "
                    "it, and call eval() of a module with dropout"
                )
        return outputs

    @property
    def jacobian(self) -> list[list[Tensor]]:
        """The exact Jacobian: a matrix for each output (row) and differentiable input (column)."""
        blocks, errors = self._jacobian_with_errors
        for o, (row, row_errors) in enumerate(zip(blocks, errors, strict=True)):
            for i, (block, error) in enumerate(zip(row, row_errors, strict=True)):
                self._require(error, block, 1, f"output {o} along {self.labels[i]}")
        return blocks

    @cached_property
    def _jacobian_with_errors(self) -> tuple[list[list[Tensor]], list[list[float]]]:
        candidate = self._try_autograd(self._compute_rows)
        columns = []
        for i in range(len(self.positions)):
            blocks = [row[i] for row in candidate] if candidate else None
            if blocks is None or not self._is_confirmed(i, blocks, []):
                columns.append(self._estimate_column(i))
            else:
                columns.append((blocks, [0.0] * len(blocks)))
        blocks_by_input, errors_by_input = zip(*columns, strict=True)
        outputs = range(len(self.exact_outputs))
        return (
            [[blocks[o] for blocks in blocks_by_input] for o in outputs],
            [[errors[o] for errors in errors_by_input] for o in outputs],
        )

    def _estimate_column(self, i: int) -> tuple[list[Tensor], list[float]]:
        """Returns the derivative of each output in each entry of input i, and its largest error."""
        estimates = [self._differentiate([d]) for d in self._list_unit_directions(i)]
        if not estimates:
            blocks = [y.new_zeros(y.numel(), 0) for y in self.exact_outputs]
            return blocks, [0.0] * len(blocks)
        rows = zip(*(each.derivatives for each in estimates), strict=True)
        errors = zip(*(each.errors for each in estimates), strict=True)
        return [torch.stack([*map(torch.flatten, row)], 1) for row in rows], [*map(max, errors)]

    @property
    def hessian_product(self) -> Tensors:
        """The exact Hessian of Σ upstream · f times the tangents, for each input."""
        for label, estimate in zip(self.labels, self._hessian_product_with_errors, strict=True):
            self._require(*estimate, 2, label)
        return tuple(product for _, product in self._hessian_product_with_errors)

    @cached_property
    def _hessian_product_with_errors(self) -> list[tuple[float, Tensor]]:
        candidate = self._try_autograd(self._differentiate_own_gradient)
        results = []
        for i, x in enumerate(self.differentiable_inputs):
            if candidate:
                product, error = candidate.derivatives[i], candidate.errors[i]
                is_exact = error <= 0.5 * self.tolerance(product, 2)
                if is_exact and self._is_confirmed(i, [product.view(1, -1)], [self.tangents]):
                    results.append((error, product))
                    continue
            directions = self._list_unit_directions(i)
            estimates = [self._differentiate([d, self.tangents]) for d in directions]
            entries = [each.derivatives[0] for each in estimates]
            product = torch.stack(entries).view_as(x) if entries else x.double()
            results.append((max((each.errors[0] for each in estimates), default=0.0), product))
        return results

    @property
    def third_derivative(self) -> Tensor:
        """The exact third derivative of Σ upstream · f along the tangents."""
        (derivative,), (error,) = self._third_derivative_with_error
        self._require(error, derivative, 3, "the tangents")
        return derivative

    @cached_property
    def _third_derivative_with_error(self) -> Estimate:
        return self._differentiate([self.tangents] * 3)

    def _require(self, error: float, exact: Tensor, order: int, name: str) -> None:
        """Raises Unknown if the error of numerical differentiation is not below the tolerance."""
        if not error <= 0.5 * self.tolerance(exact, order):
            raise Unknown(
                f"numerical differentiation of order {order} does not converge, of {name}: is "
                "there a kink, a singularity, or arithmetic of less than float64?"
            )

    # Autograd's derivatives at large inputs, which random directions confirm

    @property
    def _is_large(self) -> bool:
        """Whether the inputs have too many entries to differentiate along each of them."""
        entries = sum(x.numel() for x in self.differentiable_inputs)
        return entries > max(MAX_ENTRIES, sum(y.numel() for y in self.exact_outputs) / 8)

    def _try_autograd(self, compute: Callable[[], Any]) -> Any:
        """Returns what `compute` does; None at few entries, and if the backward raises an error."""
        if not (self._is_large or self.is_neighbour):
            return None
        try:
            return compute()
        except Exception:  # it may raise any exception; differences need no backward
            return None

    def _compute_rows(self) -> list[list[Tensor]]:
        """Returns the Jacobian by autograd, one backward for each entry of an output."""
        xs, outputs = self._call_with_graph(self.differentiable_inputs)
        rows = []
        for y in outputs:
            entries = [_differentiate_entry(entry, xs) for entry in y.flatten()]
            columns = zip(*entries, strict=True)
            blocks = [torch.stack(column) for column in columns]
            rows.append(blocks or [x.new_zeros(0, x.numel()) for x in xs])
        return rows

    def _differentiate_own_gradient(self) -> Estimate:
        """Returns the numerical derivative along the tangents of the gradient by autograd."""

        def compute_gradient(*inputs: Tensor) -> Tensors:
            xs, outputs = self._call_with_graph(inputs)
            gradients = _differentiate_entry(dot(self.upstream, outputs), xs)
            return tuple(g.view_as(x) for g, x in zip(gradients, xs, strict=True))

        point = [x.double() for x in self.differentiable_inputs]
        return estimate_derivative(
            compute_gradient, point, [self.tangents], lambda d: self.tolerance(d, 2)
        )

    def _call_with_graph(self, inputs: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        """Returns leaves with the inputs' values in float64, and the exact outputs."""
        xs = tuple(x.detach().double().clone().requires_grad_() for x in inputs)
        return xs, self._call_exactly(self.surrogate or self.exact_function, xs)

    def _is_confirmed(
        self, i: int, blocks: Sequence[Tensor], rest: Sequence[Sequence[Tensor]]
    ) -> bool:
        """Whether derivatives in input i agree with numerical ones along random directions.

        `rest` are the directions along which the blocks are differentiated, too. An entry that is
        wrong changes the derivative along a random direction, unless another error cancels it.

        At second order a direction has length 1, as that of an entry, since rounding allows no step
        that is as small against the distance to a kink. The error of numerical differentiation does
        not count: derivatives that agree are not both inexact.
        """
        if self.is_neighbour:
            return True
        order = 1 + len(rest)
        for k in range(2):
            direction = [torch.zeros_like(x.double()) for x in self.differentiable_inputs]
            direction[i] = random_like(direction[i], 401 + 2 * i + k)
            if order > 1:
                direction[i] /= direction[i].norm().clamp(min=1)
            estimate = self._differentiate([direction, *rest])
            for block, derivative, error in zip(blocks, *estimate, strict=True):
                distance = max_distance(block @ direction[i].flatten(), derivative.flatten())
                distance += error if order == 1 else 0.0
                if not distance <= 0.5 * self.tolerance(block, order):
                    return False
        return True

    def compute_gradient(self, upstream: Sequence[Tensor]) -> Tensors:
        """Returns the exact gradient: the upstream gradients times the Jacobian."""
        rows = zip(upstream, self.jacobian, strict=True)
        products = [[u.double().flatten() @ J for J in row] for u, row in rows]
        columns = zip(zip(*products, strict=True), self.differentiable_inputs, strict=True)
        return tuple(torch.stack(parts).sum(0).view(x.shape) for parts, x in columns)

    def compute_output_tangents(self, tangents: Sequence[Tensor]) -> Tensors:
        """Returns the exact tangent of each output: the Jacobian times the tangents."""
        flat = [t.double().flatten() for t in tangents]
        return tuple(
            torch.stack([J @ t for J, t in zip(row, flat, strict=True)]).sum(0).view(y.shape)
            for row, y in zip(self.jacobian, self.exact_outputs, strict=True)
        )

    def _list_unit_directions(self, i: int) -> Iterator[list[Tensor]]:
        """Yields the direction of each entry of input i."""
        for entry in range(self.differentiable_inputs[i].numel()):
            direction = [
                torch.zeros_like(x, dtype=torch.float64) for x in self.differentiable_inputs
            ]
            direction[i].view(-1)[entry] = 1
            yield direction

    def _differentiate(self, directions: Sequence[Sequence[Tensor]]) -> Estimate:
        """Differentiates along each direction the outputs or, beyond order 1, Σ upstream · f."""
        order = len(directions)

        def compute_loss(*xs: Tensor) -> Tensors:
            return (dot(self.upstream, self._evaluate_surrogate(*xs)),)

        f = self._evaluate_surrogate if order == 1 else compute_loss
        point = [x.double() for x in self.differentiable_inputs]
        return estimate_derivative(f, point, directions, lambda d: self.tolerance(d, order))

    def tolerance(self, exact: Tensor, order: int) -> float:
        """Returns the allowed distance: the dtype's tolerance plus the rounding of differences."""
        noise = 50 * EPS * self._max_value / (STEPS[order] / 4) ** order if order else 0.0
        return TOLERANCES[self.dtype][order] * max_magnitude(exact) + noise


def dot(us: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Returns Σ u · y over several tensors."""
    terms = [(u.to(y.dtype) * y).sum() for u, y in zip(us, ys, strict=True)]
    return torch.stack(terms).sum()


def _differentiate_entry(y: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the flat gradient of a number in each of xs."""
    if not y.requires_grad:
        return [x.new_zeros(x.numel()) for x in xs]
    gradients = torch.autograd.grad(y, xs, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, xs, strict=True)
    return [torch.zeros_like(x).flatten() if g is None else g.flatten() for g, x in pairs]


def are_equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal, nan for nan."""
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def max_magnitude(x: Tensor) -> float:
    return x.nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0


def random_like(x: Tensor, seed: int) -> Tensor:
    """Returns float64 numbers in the shape of x, of magnitude 0.4 to 1.2 and either sign."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.4 + 0.8 * torch.rand(x.shape, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    return (size * sign).to(x.device)
