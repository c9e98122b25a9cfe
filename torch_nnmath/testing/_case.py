"""A function at a point: how the checks call it, and how they compare its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from torch_nnmath import _torch
from torch_nnmath.testing._differences import max_distance
from torch_nnmath.testing._functions import Tensors, copy_state, is_real_tensor, nest_inputs
from torch_nnmath.testing._point import TOLERANCES, Point, are_equal, max_magnitude, random_like
from torch_nnmath.testing._report import (
    Finding,
    NotApplicable,
    SilentZero,
    Unknown,
    WritesInput,
    Wrong,
)
from torch_nnmath.testing._rounding import add_rounding

# With rounding errors: a branch that one in four takes otherwise is seen in 97 of 100 cases.
NEIGHBOURS = 12


@dataclass(eq=False)
class Case(Point):
    """A point at which the checks call the function."""

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

    # Comparisons

    def compare(
        self,
        results: Sequence[Tensor | None],
        compute_exact: Callable[[Case], Sequence[Tensor]],
        description: str,
        order: int = 1,
        labels: Sequence[Any] | None = None,
        sizes: Sequence[float] | None = None,
    ) -> None:
        """Raises a Finding unless each result is near the exact one, which a case computes.

        A result of None means that autograd found no dependence. `description` is a format string
        for the label. `sizes` are those of the terms that a result may cancel, and are rounded.
        """
        exact_results = compute_exact(self)
        labels = labels or range(len(exact_results))
        # In half precision a result may cancel what is rounded at the size of the others.
        is_half = torch.finfo(self.dtype).bits == 16
        largest = max(map(max_magnitude, exact_results), default=0.0) if is_half else 0.0
        for i, (result, exact) in enumerate(zip(results, exact_results, strict=True)):
            name = description.format(labels[i])
            cancelled = sizes[i] if sizes else 0.0
            rounding = TOLERANCES[self.dtype][order] * (largest + cancelled)
            tolerance = self.tolerance(exact, order) + rounding
            is_zero = result is None or (result.numel() > 0 and not result.detach().any())
            if is_zero:
                kind = "no graph" if result is None else "zeros"
                finding = f"{name} is 0 ({kind}), expected {max_magnitude(exact):.3g}"
                error: Finding = SilentZero(finding)
                result, exact = torch.zeros_like(exact), exact.nan_to_num(0, 0, 0)
            assert result is not None
            if result.shape != exact.shape:
                raise Wrong(f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}")
            result = result.detach().double().to(exact.device)
            distance = max_distance(result, exact)
            size = max(max_magnitude(exact), cancelled)
            self.errors.append(distance / size if size else distance)
            if distance <= tolerance:
                continue

            def compute_entry(case: Case, i: int = i) -> Tensor:
                return compute_exact(case)[i]

            if self._may_be_rounded(name, result, exact, tolerance, compute_entry):
                continue
            if not is_zero:
                error = Wrong(f"{name} is {describe_difference(result, exact)}")
            raise error

    def _may_be_rounded(
        self,
        name: str,
        result: Tensor,
        exact: Tensor,
        tolerance: float,
        compute_exact: Callable[[Case], Tensor],
    ) -> bool:
        """Whether rounding explains a distance above the tolerance, as near a kink.

        There the result in float64 changes where the operations have rounding errors of the dtype.
        An entry may differ by twice the largest change. If this leaves no entry to be compared,
        raises Unknown.
        """
        if self.dtype == torch.float64:
            return False
        distance = (result - exact).abs().masked_fill(result == exact, 0)  # of infinities
        change = torch.zeros_like(exact)
        unrounded = replace(self, is_neighbour=True)
        for neighbour in self._neighbours:
            try:
                new_change = (compute_exact(neighbour) - compute_exact(unrounded)).abs()
            except Unknown:
                raise
            except Exception:  # the function may refuse inexact numbers by any exception
                return False
            change = torch.maximum(change, new_change.nan_to_num(0, torch.inf))
            if (distance <= tolerance + 2 * change).all():
                if (2 * change >= max_magnitude(exact)).all():
                    raise Unknown(f"rounding to {self.dtype} changes {name} by {change.max():.3g}")
                return True
        return False

    @cached_property
    def _neighbours(self) -> list[Case]:
        """This point of the functions with rounding errors of the dtype, each with other errors."""
        eps = torch.finfo(self.dtype).eps

        def add(function: Any, seed: int) -> Any:
            return None if function is None else add_rounding(function, eps, seed)

        return [
            replace(
                self,
                function=add(self.function, seed),
                reference=add(self.reference, seed),
                surrogate=add(self.surrogate, seed),
                is_neighbour=True,
            )
            for seed in range(NEIGHBOURS)
        ]

    def compare_outputs(self, outputs: Sequence[Tensor]) -> None:
        """Raises a Finding unless the outputs are near the exact ones."""
        if len(outputs) != len(self.exact_outputs):
            raise Wrong(
                f"the function returns {len(outputs)} tensors, not {len(self.exact_outputs)}"
            )
        self.compare(outputs, lambda case: case.exact_outputs, "output {}", 0)

    def compare_gradient(
        self,
        gradients: Sequence[Tensor | None],
        upstream: Sequence[Tensor] | None = None,
        sizes: Sequence[float] | None = None,
    ) -> None:
        """Raises a Finding unless the gradients are near the exact ones, in their input's dtype.

        `sizes` are those of `compare`.
        """
        triples = zip(self.labels, gradients, self.differentiable_inputs, strict=True)
        for label, gradient, x in triples:
            if gradient is not None and gradient.dtype != x.dtype:
                raise Wrong(f"the gradient of {label} is {gradient.dtype}, {label} is {x.dtype}")

        def compute_gradient(case: Case) -> Tensors:
            return case.compute_gradient(upstream or self.upstream)

        description = "the gradient of {}"
        self.compare(gradients, compute_gradient, description, labels=self.labels, sizes=sizes)

    def compare_tangents(
        self, results: Sequence[Tensor | None], tangents: Sequence[Tensor] | None = None
    ) -> None:
        """Raises a Finding unless the outputs' tangents are near the exact ones."""

        def compute_tangents(case: Case) -> Tensors:
            return case.compute_output_tangents(tangents or self.tangents)

        self.compare(results, compute_tangents, "the tangent of output {}")

    def compare_hessian_product(
        self, products: Sequence[Tensor | None], factor: float = 1.0, kind: str = ""
    ) -> None:
        """Raises a Finding unless the products are near the factor times `hessian_product`."""

        def compute_products(case: Case) -> Sequence[Tensor]:
            return [factor * h for h in case.hessian_product]

        description = f"the {kind}Hessian-vector product of {{}}"
        self.compare(products, compute_products, description, 2, self.labels)

    def compare_jacobian(self, blocks: Sequence[Sequence[Tensor]]) -> None:
        """Raises a Finding unless the Jacobian's blocks are near the exact ones."""
        for o, row in enumerate(blocks):

            def list_blocks(case: Case, o: int = o) -> Sequence[Tensor]:
                shape = case.exact_outputs[o].shape
                pairs = zip(case.jacobian[o], case.differentiable_inputs, strict=True)
                return [J.view(shape + x.shape) for J, x in pairs]

            description = f"the Jacobian of output {o} with respect to {{}}"
            self.compare(row, list_blocks, description, labels=self.labels)

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
            inputs[p] = (x.double() * (1 + 0.05 * random_like(x, 200 + 10 * k + p))).to(x.dtype)
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

    def list_small_batches(self) -> list[Case]:
        """The case with a batch of 0 rows and of 1, where it is defined and has another number.

        A mean over 0 rows is nan, and a standard deviation of 1 row has no derivative.
        """
        cases = []
        for rows in sorted({0, 1} - {self.rows}):
            try:
                case = self.with_rows(rows)
                gradients = case.compute_gradient(case.upstream)
            except (NotApplicable, Unknown):
                continue
            if all(x.isfinite().all() for x in (*case.exact_outputs, *gradients)):
                cases.append(case)
        return cases

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
            random_like(x, 301 + i).to(x.dtype) if is_real_tensor(x) else x
            for i, x in enumerate(self.inputs)
        )
        return Case(control, inputs, positions, self.dtype, names=self.names)


def describe_difference(result: Tensor, exact: Tensor) -> str:
    """Returns the entries that differ most, with as many digits as distinguish them."""
    distance = (result - exact).abs().masked_fill(result == exact, 0)
    worst = distance.nan_to_num(math.inf).argmax()
    entry, expected = result.flatten()[worst].item(), exact.flatten()[worst].item()
    pairs = ((f"{entry:.{n}g}", f"{expected:.{n}g}") for n in (6, 9, 12, 17))
    return "{}, expected {}".format(*next(pair for pair in pairs if pair[0] != pair[1]))
