"""The terms of a combination of deferred logits, read from the recorded operations.

A term is a product: a number, factors that each row has one of, plain tensors of the logits' shape,
a probability and a log-probability of the class.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath.deferred.logits import DeferredLogits, get_grad_fn
from torch_nnmath.deferred.recipes import Combination, Recipe
from torch_nnmath.deferred.rows import find_foreign_node, is_node_of
from torch_nnmath.deferred.steps import aten, is_same_value

MAX_TERMS = 64  # a Jensen-Shannon divergence has six
COPIES = (aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default)


class Side(NamedTuple):
    """The softmax of one head's logits: one side of a divergence."""

    recipe: Recipe  # of probabilities or log-probabilities
    moves: tuple[Recipe, ...]  # later steps, which select or move the rows of a combination
    has_gradient: bool  # whether a gradient may reach the head

    def is_same(self, other: Side) -> bool:
        """Whether both are made of the same logits by the same operations."""
        if (self.recipe.call, self.has_gradient) != (other.recipe.call, other.has_gradient):
            return False
        steps, other_steps = self._list_steps(), other._list_steps()
        return len(steps) == len(other_steps) and all(
            s is t or is_same_value(s.operation, t.operation)
            for s, t in zip(steps, other_steps, strict=True)
        )

    def _list_steps(self) -> list[Any]:
        """The steps that change the logits or move their rows, without copies."""
        steps: Any = [*self.recipe.list_changes_of_logits(), *self.moves]
        return [step for step in steps if step.operation.func not in COPIES]


class Mixture(NamedTuple):
    """The logarithm of a weighted sum of probabilities."""

    weights: tuple[tuple[Side, float], ...]


class Term(NamedTuple):
    """A product of all that is not None or empty."""

    number: float = 1.0
    factors: tuple[Tensor, ...] = ()  # of shape (), or of one number for each row
    tensors: tuple[Tensor, ...] = ()  # of the logits' shape, the classes at the last axis
    probability: Side | None = None
    log: Side | Mixture | None = None

    def multiply(self, other: Term) -> Term:
        """The product of terms of which at most one has a probability, and one a logarithm."""
        return Term(
            self.number * other.number,
            self.factors + other.factors,
            self.tensors + other.tensors,
            self.probability or other.probability,
            self.log or other.log,
        )

    def read_numbers(self) -> Term:
        """Reads the constant factors of shape () into the number, which waits for a GPU."""
        is_read = [not f.dim() and not f.requires_grad for f in self.factors]
        factors = zip(self.factors, is_read, strict=True)
        numbers = (f.item() for f, read in zip(self.factors, is_read, strict=True) if read)
        return self._replace(
            number=math.prod(numbers, start=self.number),
            factors=tuple(f for f, read in factors if not read),
        )


class Expansion:
    """The terms of a combination; `obstacle` says why there are none, "" if there are.

    The graph must consist of exactly the recorded operations. An operand that it does not reach is
    a constant.
    """

    def __init__(self, result: DeferredLogits):
        self.axis, self.obstacle = result.recipe.form.axis, ""
        self.eps = sys.float_info.epsilon  # of the narrowest dtype that a number was read from
        node = None
        if torch.is_grad_enabled() and result.requires_grad:
            node = get_grad_fn(result)
            if node is None:
                self.obstacle = "requires_grad_ of logits"
        self.terms = self._expand(result.recipe, node, ())
        if any(isinstance(term.log, Mixture) for term in self.terms):
            self.terms = [term.read_numbers() for term in self.terms]

    def group_terms(self) -> list[list[Term]]:
        """Returns the terms in lists of those that have the same factors."""
        groups: dict[tuple[int, ...], list[Term]] = {}
        for term in self.terms:
            groups.setdefault(tuple(map(id, term.factors)), []).append(term)
        return [*groups.values()]

    def refuse(self, obstacle: str) -> list[Term]:
        """Records the first obstacle."""
        self.obstacle = self.obstacle or obstacle
        return []

    def _expand(self, recipe: Recipe, node: Any, moves: tuple[Recipe, ...]) -> list[Term]:
        """The terms of a recipe, after the moves. Without a node they are constant."""
        if self.obstacle:
            return []  # terms that doubled often would be visited exponentially often
        if recipe.call.observer:
            return self.refuse(recipe.call.observer)
        if not recipe.form.kinds:
            return self._make_term(recipe, node, moves)
        while recipe.parent is not None and recipe.operation is not None:
            if node is not None:
                if not is_node_of(node, recipe.operation.func):
                    return self.refuse(f"{node.name()} stands between head and loss")
                node = node.next_functions[recipe.operation.position][0]
            if recipe.result.apply_to_rows is not None:
                moves = (recipe, *moves)
            recipe = recipe.parent
        call: Combination = recipe.call
        if node is not None and not is_node_of(node, call.func):
            return self.refuse(f"{node.name()} stands between head and loss")
        operands = [
            self._expand_operand(v, find_next_node(node, i), (recipe, moves))
            for i, v in enumerate(call.list_operands())
        ]
        terms = EXPANSIONS[call.func](self, *operands, **call.kwargs)
        return terms if len(terms) <= MAX_TERMS else self.refuse("many terms")

    def _make_term(self, recipe: Recipe, node: Any, moves: tuple[Recipe, ...]) -> list[Term]:
        """The term of a head's probabilities, log-probabilities, or product of both."""
        obstacle = None if node is None else find_foreign_node(recipe, node)
        if obstacle is not None:
            return self.refuse(obstacle)
        form, side = recipe.form, Side(recipe, moves, node is not None)
        sign = (form.log_sign or 1) * (form.softmax_sign or 1)
        return [
            Term(
                sign,
                probability=side if form.softmax_sign else None,
                log=side if form.log_sign else None,
            )
        ]

    def _expand_operand(self, operand: Any, node: Any, place: Any) -> list[Term]:
        """The terms of a combination's operand; `place` is its recipe, and the moves after it."""
        recipe, moves = place
        if isinstance(operand, Recipe):
            return self._expand(operand, node, moves)
        if not isinstance(operand, Tensor):
            return [Term(operand)]
        operand = operand if node is not None else operand.detach()
        shape, axis = recipe.layout.shape, recipe.form.axis
        if operand.shape == shape:
            return [Term(tensors=(self._move(operand, moves),))]
        if not operand.dim() and operand.is_floating_point():
            self.eps = max(self.eps, torch.finfo(operand.dtype).eps)
        if not operand.dim() and operand.is_cpu and not operand.requires_grad:
            return [Term(operand.item())]
        dtypes = wide_type(operand.dtype), wide_type(recipe.layout.dtype)
        operand = operand.to(torch.promote_types(*dtypes))
        if operand.dim():
            operand = operand.expand([1 if d == axis else n for d, n in enumerate(shape)])
            operand = self._move(operand, moves).squeeze(-1)
        return [Term(factors=(operand,))]

    def _move(self, x: Tensor, moves: tuple[Recipe, ...]) -> Tensor:
        """Applies the moves to a tensor, and moves the classes to the last axis."""
        for move in moves:
            assert move.result.apply_to_rows is not None
            x = move.result.apply_to_rows(x)
        return x.movedim(self.axis, -1)

    # The operations

    def add(self, first: list[Term], second: list[Term], alpha: Any = 1) -> list[Term]:
        return first + self.multiply([Term(alpha)], second)

    def subtract(self, first: list[Term], second: list[Term], alpha: Any = 1) -> list[Term]:
        return self.add(first, second, -alpha)

    def multiply(self, first: list[Term], second: list[Term]) -> list[Term]:
        return [a.multiply(b) for a in first for b in second]

    def divide(self, first: list[Term], second: list[Term]) -> list[Term]:
        if not all(term.number for term in second):
            return self.refuse("a division by 0")
        inverses = [Term(1 / n, tuple(1 / f for f in factors)) for n, factors, *_ in second]
        return self.multiply(first, inverses)

    def negate(self, terms: list[Term]) -> list[Term]:
        return self.multiply([Term(-1.0)], terms)

    def interpolate(self, first: list[Term], second: list[Term], weight: list[Term]) -> list[Term]:
        """(1 - weight) first + weight second; 1 - weight is one number if it can be."""
        complement = [Term(), *self.negate(weight)]
        if not any(term.factors for term in weight):
            complement = [Term(sum(term.number for term in complement))]
        return self.multiply(complement, first) + self.multiply(weight, second)

    def multiply_by_logarithm(self, first: list[Term], second: list[Term]) -> list[Term]:
        return self.multiply(first, self.take_logarithm(second))

    def take_logarithm(self, terms: list[Term]) -> list[Term]:
        """The logarithm of a weighted sum of probabilities."""
        weights: list[tuple[Side, float]] = []
        for number, factors, _, side, _ in (term.read_numbers() for term in terms):
            if factors or side is None or number <= 0:
                return self.refuse("a logarithm of other values than a mixture of probabilities")
            weights.append((side, number))
        if len(weights) == 1 and weights[0][1] == 1:
            return [Term(log=weights[0][0])]
        return [Term(log=Mixture(tuple(weights)))]

    def take_exponential(self, terms: list[Term]) -> list[Term]:
        """The probabilities of a log-probability, times e to the sum of the numbers added to it."""
        terms = [term.read_numbers() for term in terms]
        logs = [term for term in terms if term.log is not None]
        if len(logs) != 1 or logs[0].number != 1 or any(term.factors for term in terms):
            return self.refuse("an exponential of other values than a log-probability")
        weight = math.exp(sum(term.number for term in terms if term.log is None))
        (log,) = (term.log for term in logs)
        sides = log.weights if isinstance(log, Mixture) else ((log, 1.0),)
        return [Term(weight * w, probability=side) for side, w in sides if side is not None]

    def stack(self, *operands: list[Term]) -> list[Term]:
        """The sum of the exponentials, since only a log-sum-exp of a stack is taken."""
        return [term for terms in operands for term in self.take_exponential(terms)]

    def add_exponentials(self, first: list[Term], second: list[Term]) -> list[Term]:
        return self.take_logarithm(self.stack(first, second))


def find_next_node(node: Any, i: int) -> Any:
    """The node of an operation's i-th operand; None if no gradient reaches it."""
    is_known = node is not None and i < len(node.next_functions)
    return node.next_functions[i][0] if is_known else None


EXPANSIONS: dict[Any, Callable[..., list[Term]]] = {
    aten.add.Tensor: Expansion.add,
    aten.sub.Tensor: Expansion.subtract,
    aten.mul.Tensor: Expansion.multiply,
    aten.div.Tensor: Expansion.divide,
    aten.neg.default: Expansion.negate,
    aten.lerp.Scalar: Expansion.interpolate,
    aten.lerp.Tensor: Expansion.interpolate,
    aten.xlogy.Tensor: Expansion.multiply_by_logarithm,
    aten.log.default: Expansion.take_logarithm,
    aten.logsumexp.default: Expansion.take_logarithm,
    aten.logaddexp.default: Expansion.add_exponentials,
    aten.stack.default: Expansion.stack,
}
