"""A function at a point: how to call it, and its exact value and derivatives in float64.

The exact value is that of the reference, or else of the function itself. The exact derivatives are
numerical derivatives of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from torch_nnmath import _torch
from torch_nnmath.testing._differences import (
    STEPS,
    Estimate,
    estimate_derivative,
    limit_by_magnitude,
    max_distance,
)
from torch_nnmath.testing._functions import (
    Tensors,
    copy_state,
    is_real_tensor,
    nest_inputs,
    select_real_tensors,
)
from torch_nnmath.testing._report import NotApplicable, SilentZero, Unknown, WritesInput, Wrong

# For the value and the derivatives of order 1 to 3, relative to the exact tensor's largest entry.
TOLERANCES = {
    torch.float64: (1e-10, 1e-8, 1e-6, 1e-4),
    torch.float32: (1e-5, 1e-4, 1e-3, 1e-2),
    torch.float16: (1e-2, 2e-2, 5e-2, 2e-1),
    torch.bfloat16: (5e-2, 5e-2, 2e-1, 5e-1),
}
EPS = torch.finfo(torch.float64).eps


@dataclass(eq=False)
class Case:
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
    _max_value: float = field(default=0.0, init=False)  # of all values computed so far
    _protected: list[tuple[str, Tensor, Tensor, int]] = field(default_factory=list, init=False)

    def with_inputs(self, inputs: Sequence[Any]) -> Case:
        """Returns the same function at another point."""
        return replace(self, inputs=tuple(inputs))

    def with_input(self, position: int, x: Any) -> Case:
        """Returns the case with another input at one position."""
        return self.with_inputs([*self.inputs[:position], x, *self.inputs[position + 1 :]])

    def with_tensors(self, places: Sequence[int], tensors: Sequence[Tensor]) -> Case:
        """Returns the case with other tensors at some places among `self.tensors`."""
        inputs = list(self.inputs)
        for k in places:
            inputs[self.tensor_positions[k]] = tensors[k]
        return self.with_inputs(inputs)

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

    def make_leaves(self, protect: bool = True) -> Tensors:
        """Returns copies of the differentiable inputs that require gradients."""
        xs = tuple(x.clone().requires_grad_() for x in self.differentiable_inputs)
        if protect:
            for label, x in zip(self.labels, xs, strict=True):
                self.protect(label, x)
        return xs

    def make_tensor_leaves(self) -> tuple[Tensors, Tensors]:
        """Returns copies of all tensors, and those of them that are differentiable leaves."""
        tensors = tuple(x.clone() for x in self.tensors)
        return tensors, tuple(tensors[i].requires_grad_() for i in self.tensor_argnums)

    # Inputs to which the function must not write

    def protect(self, name: str, x: Tensor) -> Tensor:
        """Records the content of x, which `check_protected` compares; returns x."""
        self._protected.append((name, x, x.detach().clone(), _torch.get_version(x)))
        return x

    def check_protected(self) -> None:
        """Raises WritesInput if a protected tensor was written to, and ends the protection."""
        protected, self._protected = self._protected, []
        for name, x, before, version in protected:
            if not are_equal(x.detach(), before):
                change = (x.detach() - before).abs().max().item()
                raise WritesInput(f"{name} was changed in place, by up to {change:.3g}")
            if _torch.get_version(x) != version:
                raise WritesInput(f"{name} was overwritten in place with its own values")

    # Directions, the same in every transform

    @cached_property
    def upstream(self) -> Tensors:
        """A random upstream gradient for each output; no entry is 0 or 1."""
        return tuple(_random_like(y, 1 + i) for i, y in enumerate(self.exact_outputs))

    @cached_property
    def tangents(self) -> Tensors:
        """A random tangent for each differentiable input, small for entries close to 0."""
        pairs = enumerate(self.differentiable_inputs)
        return tuple(limit_by_magnitude(_random_like(x, 101 + i), x) for i, x in pairs)

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
        arguments = [x.double() if is_real_tensor(x) else x for x in self.inputs]
        for position, x in zip(self.positions, xs, strict=True):
            arguments[position] = x
        arguments = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments]
        with torch.no_grad():
            values = tuple(y.clone() for y in select_real_tensors(function(*arguments)))
        self._max_value = max(self._max_value, *map(_max_magnitude, values), 0.0)
        return values

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
        columns = [
            [self._differentiate([direction]) for direction in self._list_unit_directions(i)]
            for i in range(len(self.positions))
        ]
        blocks, errors = [], []
        for o, y in enumerate(self.exact_outputs):
            blocks.append(
                [
                    torch.stack([each.derivatives[o].flatten() for each in estimates], 1)
                    if estimates
                    else y.new_zeros(y.numel(), 0)
                    for estimates in columns
                ]
            )
            errors.append(
                [max((each.errors[o] for each in estimates), default=0.0) for estimates in columns]
            )
        return blocks, errors

    @property
    def hessian_product(self) -> Tensors:
        """The exact Hessian of Σ upstream · f times the tangents, for each input."""
        for label, estimate in zip(self.labels, self._hessian_product_with_errors, strict=True):
            self._require(*estimate, 2, label)
        return tuple(product for _, product in self._hessian_product_with_errors)

    @cached_property
    def _hessian_product_with_errors(self) -> list[tuple[float, Tensor]]:
        results = []
        for i, x in enumerate(self.differentiable_inputs):
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
        return TOLERANCES[self.dtype][order] * _max_magnitude(exact) + noise

    # Comparisons

    def compare(
        self,
        results: Sequence[Tensor | None],
        exact_results: Sequence[Tensor],
        description: str,
        order: int = 1,
        labels: Sequence[Any] | None = None,
    ) -> None:
        """Raises a Finding unless each result is near the exact one.

        A result of None means that autograd found no dependence. `description` is a format string
        for the label.
        """
        labels = labels or range(len(exact_results))
        # In half precision a result may cancel what is rounded at the size of the others.
        is_half = torch.finfo(self.dtype).bits == 16
        largest = max(map(_max_magnitude, exact_results), default=0.0) if is_half else 0.0
        for label, result, exact in zip(labels, results, exact_results, strict=True):
            name = description.format(label)
            tolerance = self.tolerance(exact, order) + TOLERANCES[self.dtype][order] * largest
            if result is None or (result.numel() and not result.detach().any()):
                if _max_magnitude(exact) > tolerance:
                    kind = "no graph" if result is None else "zeros"
                    raise SilentZero(f"{name} is 0 ({kind}), expected {_max_magnitude(exact):.3g}")
                continue
            if result.shape != exact.shape:
                raise Wrong(f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}")
            result = result.detach().double().to(exact.device)
            if not max_distance(result, exact) <= tolerance:
                worst = ((result - exact).abs().nan_to_num(math.inf)).argmax()
                entry, expected = result.flatten()[worst].item(), exact.flatten()[worst].item()
                pairs = ((f"{entry:.{n}g}", f"{expected:.{n}g}") for n in (6, 9, 12, 17))
                texts = next(pair for pair in pairs if pair[0] != pair[1])
                raise Wrong("{} is {}, expected {}".format(name, *texts))

    def compare_outputs(self, outputs: Sequence[Tensor]) -> None:
        """Raises a Finding unless the outputs are near the exact ones."""
        if len(outputs) != len(self.exact_outputs):
            raise Wrong(
                f"the function returns {len(outputs)} tensors, not {len(self.exact_outputs)}"
            )
        self.compare(outputs, self.exact_outputs, "output {}", 0)

    def compare_gradient(
        self, gradients: Sequence[Tensor | None], upstream: Sequence[Tensor] | None = None
    ) -> None:
        """Raises a Finding unless the gradients are near the exact ones, in their input's dtype."""
        triples = zip(self.labels, gradients, self.differentiable_inputs, strict=True)
        for label, gradient, x in triples:
            if gradient is not None and gradient.dtype != x.dtype:
                raise Wrong(f"the gradient of {label} is {gradient.dtype}, {label} is {x.dtype}")
        exact = self.compute_gradient(upstream or self.upstream)
        self.compare(gradients, exact, "the gradient of {}", labels=self.labels)

    def compare_tangents(
        self, results: Sequence[Tensor | None], tangents: Sequence[Tensor] | None = None
    ) -> None:
        """Raises a Finding unless the outputs' tangents are near the exact ones."""
        exact = self.compute_output_tangents(tangents or self.tangents)
        self.compare(results, exact, "the tangent of output {}")

    def compare_hessian_product(self, products: Sequence[Tensor | None]) -> None:
        """Raises a Finding unless the products are near `hessian_product`."""
        description = "the Hessian-vector product of {}"
        self.compare(products, self.hessian_product, description, 2, self.labels)

    def compare_jacobian(self, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Raises a Finding unless the Jacobian's blocks are near the exact ones."""
        for o, (row, exact_row) in enumerate(zip(blocks, self.jacobian, strict=True)):
            shape = self.exact_outputs[o].shape
            pairs = zip(exact_row, self.differentiable_inputs, strict=True)
            exact = [J.view(shape + x.shape) for J, x in pairs]
            description = f"the Jacobian of output {o} with respect to {{}}"
            self.compare(row, exact, description, labels=self.labels)

    # Other points

    @cached_property
    def batch_members(self) -> list[Case]:
        """Three points that make a batch: this one and two perturbed ones."""
        return [self, *(self.with_inputs(self._perturb_inputs(k)) for k in (1, 2))]

    def _perturb_inputs(self, k: int) -> list[Any]:
        """Perturbs differentiable inputs; permutes integer tensors if the function accepts it."""
        inputs = list(self.inputs)
        for p in self.positions:
            x = inputs[p]
            inputs[p] = (x.double() * (1 + 0.05 * _random_like(x, 200 + 10 * k + p))).to(x.dtype)
        permuted_inputs = [
            x.roll(k, 0) if isinstance(x, Tensor) and not x.is_floating_point() and x.ndim else x
            for x in inputs
        ]
        return permuted_inputs if self._accepts(permuted_inputs) else inputs

    def with_rows(self, rows: int) -> Case:
        """Returns the case with its batch repeated or cut to this number of rows.

        The batch is the first dimension of the first input that has dimensions, and of all inputs
        that have as many rows.
        """
        n = self.rows
        inputs = [
            x[torch.arange(rows, device=x.device) % n].clone() if is_batched else x
            for x, is_batched in zip(self.inputs, self.batched_inputs, strict=True)
        ]
        if not self._accepts(inputs):
            raise NotApplicable(f"the function does not accept {rows} rows in place of {n}")
        return self.with_inputs(inputs)

    @property
    def rows(self) -> int:
        """The number of rows of the batch."""
        for x in self.inputs[self.parameter_count :]:
            if isinstance(x, Tensor) and x.numel() and x.ndim:
                return len(x)
        raise NotApplicable("no input has rows")

    @property
    def batched_inputs(self) -> list[bool]:
        """For each input, whether its first dimension is the batch."""
        n, first = self.rows, self.parameter_count
        return [
            i >= first and isinstance(x, Tensor) and x.ndim > 0 and len(x) == n
            for i, x in enumerate(self.inputs)
        ]

    def _accepts(self, inputs: Sequence[Any]) -> bool:
        """Whether the exact function returns as many tensors at these inputs as at its own."""
        point = [inputs[i].double() for i in self.positions]
        try:
            values = self.with_inputs(inputs).evaluate_exact(*point)
        except Exception:  # only a call can tell, and it may raise any exception
            return False
        return len(values) == len(self.exact_outputs)

    def to_dtype(self, dtype: torch.dtype) -> Case:
        """Returns the case with its real inputs in another precision, and other tolerances."""
        inputs = tuple(x.to(dtype) if is_real_tensor(x) else x for x in self.inputs)
        return replace(self, inputs=inputs, dtype=dtype)

    def with_exact_values_of(self, case: Case) -> Case:
        """Returns the case with the exact values of a more precise case of the same function.

        The inputs of the two differ by less than the tolerance.
        """
        copy = replace(self)
        for name in ("exact_outputs", "_jacobian_with_errors"):
            copy.__dict__[name] = getattr(case, name)
        copy._max_value = case._max_value
        return copy

    def updates_buffers(self) -> bool:
        """Whether a call of the module writes to its buffers."""
        module, names = self.module, self.names[: self.parameter_count]
        if module is None:
            return False
        state = copy_state(module, names, self.dtype)
        parameters = dict(zip(names, self.inputs[: self.parameter_count], strict=True))

        def call(*inputs: Any) -> Any:
            return functional_call(module, {**state, **parameters}, inputs)

        nest_inputs(call, self.nesting, 0)(*self.inputs[self.parameter_count :])
        return any(_torch.get_version(x) for x in state.values())

    def make_control(self, operation: Callable[[Tensor], Tensor]) -> Case:
        """Returns a case that applies the operation to each differentiable input instead.

        The control reads the other tensors, too, so that a compiled graph has as many inputs. Its
        own inputs are numbers of moderate size, at which the operation has finite derivatives.
        """
        positions = self.positions
        others = sorted({*self.tensor_positions} - {*positions})

        def control(*inputs: Any) -> Any:
            zeros = [0 * inputs[i].sum().to(inputs[positions[0]].dtype) for i in others]
            return tuple(sum(zeros, operation(inputs[i])) for i in positions)

        inputs = tuple(
            _random_like(x, 301 + i).to(x.dtype) if is_real_tensor(x) else x
            for i, x in enumerate(self.inputs)
        )
        return Case(control, inputs, positions, self.dtype, names=self.names)


def dot(us: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Returns Σ u · y over several tensors."""
    terms = [(u.to(y.dtype) * y).sum() for u, y in zip(us, ys, strict=True)]
    return torch.stack(terms).sum()


def are_equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal, nan for nan."""
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def _max_magnitude(x: Tensor) -> float:
    return x.nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0


def _random_like(x: Tensor, seed: int) -> Tensor:
    """Returns float64 numbers in the shape of x, of magnitude 0.4 to 1.2 and either sign."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.4 + 0.8 * torch.rand(x.shape, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    return (size * sign).to(x.device)
