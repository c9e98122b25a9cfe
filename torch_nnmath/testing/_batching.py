"""Batches: `vmap` over some of the tensors, differentiated in some inputs; few rows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from torch_nnmath.testing._calls import (
    compare_first_order,
    compute_gradients,
    make_loss,
    stack_members,
)
from torch_nnmath.testing._case import Case
from torch_nnmath.testing._functions import Tensors
from torch_nnmath.testing._report import NotApplicable
from torch_nnmath.testing._transforms import transform

MAX_CHOICES = 50  # of batched tensors and differentiated inputs

Choice = tuple[tuple[int, ...], tuple[int, ...]]  # positions of batched and differentiated tensors


@transform("vmap of subsets")
def check_vmap_of_subsets(case: Case) -> None:
    """Checks each choice of batched tensors and differentiated inputs against a loop over members.

    If there are more choices than `MAX_CHOICES`, as many are drawn.
    """
    for member in case.batch_members:
        _ = member.jacobian  # unknown at a kink, where vmap may take another subgradient
    stacked = stack_members(case)
    loops: dict[tuple[int, ...], list[tuple[Tensors, dict[int, Tensor]]]] = {}
    for batched, differentiated in draw_choices(len(stacked), case.tensor_argnums):
        if batched not in loops:
            loops[batched] = _loop_over_members(case, batched)
        _compare_with_loop(case, stacked, (batched, differentiated), loops[batched])


@transform("small batches", quick=True)
def check_small_batches(case: Case) -> None:
    """Checks value and gradient of batches of 0 rows and of 1, if the function accepts them."""
    cases = case.list_small_batches()
    if not cases:
        raise NotApplicable("the function is not defined for a batch of 0 rows or of 1")
    for small in cases:
        xs = small.make_leaves()
        compare_first_order(small, small.call(*xs), xs)
        small.check_protected()


def draw_choices(tensor_count: int, argnums: Sequence[int]) -> Iterator[Choice]:
    """Yields each pair of a subset of the tensors and one of `argnums`, neither of them empty.

    If there are more than `MAX_CHOICES`, yields as many random ones, always the same.
    """
    tensors = range(tensor_count)
    if (2**tensor_count - 1) * (2 ** len(argnums) - 1) <= MAX_CHOICES:
        yield from itertools.product(_list_subsets(tensors), _list_subsets(argnums))
        return
    rng = random.Random(0)
    for _ in range(MAX_CHOICES):
        yield _draw_subset(rng, tensors), _draw_subset(rng, argnums)


def _list_subsets(elements: Sequence[int]) -> list[tuple[int, ...]]:
    sizes = range(1, len(elements) + 1)
    return [s for size in sizes for s in itertools.combinations(elements, size)]


def _draw_subset(rng: random.Random, elements: Sequence[int]) -> tuple[int, ...]:
    mask = rng.randrange(1, 2 ** len(elements))
    return tuple(x for bit, x in enumerate(elements) if mask >> bit & 1)


def _loop_over_members(
    case: Case, batched: Sequence[int]
) -> list[tuple[Tensors, dict[int, Tensor]]]:
    """The outputs of each member, and its gradient by position, in float64 without a transform."""
    case = case.to_dtype(torch.float64)
    results = []
    for member in case.batch_members:
        tensors, leaves = case.with_tensors(batched, member.tensors).make_tensor_leaves()
        outputs = case.call_tensors(*tensors)
        pairs = zip(leaves, compute_gradients(case, outputs, leaves), strict=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in pairs]
        exact = dict(zip(case.tensor_argnums, gradients, strict=True))
        results.append((tuple(y.detach() for y in outputs), exact))
    return results


def _compare_with_loop(
    case: Case, stacked: Tensors, choice: Choice, loop: list[tuple[Tensors, dict[int, Tensor]]]
) -> None:
    """Compares value, gradient through `vmap`, and `vmap` of the gradient."""
    batched, differentiated = choice
    names = dict(zip(case.tensor_argnums, case.labels, strict=True))
    labels = [names[i] for i in differentiated]
    context = f"with {batched} of the tensors batched and {differentiated} differentiated, "
    dims = tuple(0 if i in batched else None for i, _ in enumerate(stacked))

    def copy_arguments() -> list[Tensor]:
        tensors = case.with_tensors(batched, stacked).tensors
        return [x.clone() for x in tensors]

    def run_loop(point: Case) -> list[tuple[Tensors, dict[int, Tensor]]]:
        return loop if point is case else _loop_over_members(point, batched)

    def stack_outputs(point: Case) -> Sequence[Tensor]:
        rows = [ys for ys, _ in run_loop(point)]
        return [torch.stack(ys) for ys in zip(*rows, strict=True)]

    def stack_gradients(point: Case) -> Sequence[Tensor]:
        members = run_loop(point)
        return [torch.stack([gs[i] for _, gs in members]) for i in differentiated]

    def sum_gradients(point: Case) -> Sequence[Tensor]:
        pairs = zip(differentiated, stack_gradients(point), strict=True)
        return [g if i in batched else g.sum(0) for i, g in pairs]

    arguments = copy_arguments()
    xs = [arguments[i].requires_grad_() for i in differentiated]
    outputs = vmap(case.call_tensors, dims)(*arguments)
    case.compare(outputs, stack_outputs, context + "output {}", 0)
    us = [u.expand_as(y) for u, y in zip(case.upstream, outputs, strict=True)]
    gradients = compute_gradients(case, outputs, xs, us)
    case.compare(gradients, sum_gradients, context + "the gradient of {}", labels=labels)

    gradient = torch.func.grad(make_loss(case.call_tensors, case.upstream), differentiated)
    gradients = vmap(gradient, dims)(*copy_arguments())
    description = context + "the gradient of {} inside vmap"
    case.compare(gradients, stack_gradients, description, labels=labels)
