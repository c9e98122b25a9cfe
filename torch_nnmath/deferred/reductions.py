"""Reductions of deferred logits, such as `argmax`, that are computed block by block.

`REDUCTIONS` maps an operation to its rule. A rule gets the form and the layout of deferred logits
and the operation. It returns a function of the blocks that computes the operation's result, or None
if the logits must be materialised. The blocks have the values that materialised logits would have:
they come from the same operations in the same dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath.deferred.operands import Operands
from torch_nnmath.deferred.steps import Form, Layout, Operation, aten
from torch_nnmath.kernels._block import count_block_rows


class LogitBlocks(NamedTuple):
    """Deferred logits as the rows of a matrix (N, C), some rows at a time."""

    operands: Operands  # with features (N, D) and a rounded weight
    steps: list[Callable[[Tensor], Tensor]]  # applied to the logits of the head

    def map(self, function: Callable[[slice, Tensor], Any]) -> list[Any]:
        """Returns `function` of the rows and the logits (n, C) of each block.

        No variable keeps a block's logits while those of the next are computed.
        """
        N = len(self.operands.features)
        size = count_block_rows(N, len(self.operands.weight))
        slices = (slice(start, start + size) for start in range(0, N, size))
        return [function(rows, self._compute_logits(rows)) for rows in slices]

    def _compute_logits(self, rows: slice) -> Tensor:
        logits = self.operands._replace(features=self.operands.features[rows]).compute_logits()
        for apply in self.steps:
            logits = apply(logits)
        return logits


Rule: TypeAlias = Callable[[Form, Layout, Operation], Callable[[LogitBlocks], Any] | None]
REDUCTIONS: dict[Any, Rule] = {}
# Reductions whose results are some of the logits: users compare them with the other logits.
SELECTIONS = (aten.max.dim, aten.min.dim, aten.topk.default, aten.gather.default)
MIN_REDUCTION = 8  # a result with more than an eighth of the classes would save little memory


def register_reduction(*operations: Any) -> Callable[[Rule], Rule]:
    """Registers the rule of these operations."""

    def register(rule: Rule) -> Rule:
        REDUCTIONS.update(dict.fromkeys(operations, rule))
        return rule

    return register


def _reduce_each_row(
    form: Form,
    layout: Layout,
    operation: Operation,
    reduce: Callable[[slice, Tensor], Any],
) -> Callable[[LogitBlocks], Any]:
    """Returns the function that reduces each row on its own.

    `reduce` gets rows and their logits (n, C), and returns the (n, k) of each output of the
    operation. The outputs get the layout that PyTorch gives them.
    """
    layouts = operation.infer_layout(layout)

    def arrange(parts: Any, out: Layout) -> Tensor:
        rows = torch.cat(parts)
        values = rows.view(*form.rows_shape, rows.shape[1]).movedim(-1, form.axis)
        values = values.reshape(out.shape)
        if values.stride() == out.stride:
            return values
        return rows.new_empty_strided(out.shape, out.stride).copy_(values)

    def compute(blocks: LogitBlocks) -> Any:
        parts = blocks.map(reduce)
        if isinstance(layouts, Layout):
            return arrange(parts, layouts)
        return tuple(map(arrange, zip(*parts, strict=True), layouts))

    return compute


@register_reduction(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim)
def find_extremum(form: Form, layout: Layout, operation: Operation) -> Any:
    """The largest or smallest logit of each row, its class, or both."""
    dim = operation.args[1] if len(operation.args) > 1 else None
    if dim is None and layout.dim() == 1:
        dim = 0
    if dim is None or dim % layout.dim() != form.axis:
        return None
    func = operation.func
    return _reduce_each_row(form, layout, operation, lambda _, logits: func(logits, 1, True))


@register_reduction(aten.topk.default)
def find_top_classes(form: Form, layout: Layout, operation: Operation) -> Any:
    """The k largest or smallest logits of each row, and their classes."""
    _, k, dim, *options = (*operation.args, -1)[: max(3, len(operation.args))]
    if dim % layout.dim() != form.axis or MIN_REDUCTION * k > layout.shape[form.axis]:
        return None
    func = operation.func
    return _reduce_each_row(form, layout, operation, lambda _, logits: func(logits, k, 1, *options))


@register_reduction(aten.gather.default)
def gather_classes(form: Form, layout: Layout, operation: Operation) -> Any:
    """Some logits of each row."""
    _, dim, index = operation.args
    k = index.shape[form.axis] if index.dim() == layout.dim() else 0
    shape = [k if d == form.axis else size for d, size in enumerate(layout.shape)]
    if dim % layout.dim() != form.axis or [*index.shape] != shape:
        return None
    if MIN_REDUCTION * k > layout.shape[form.axis]:
        return None
    classes = index.movedim(form.axis, -1).reshape(-1, k)
    return _reduce_each_row(
        form, layout, operation, lambda rows, logits: logits.gather(1, classes[rows])
    )


@register_reduction(aten.sum.dim_IntList, aten.mean.dim)
def aggregate_classes(form: Form, layout: Layout, operation: Operation) -> Any:
    """The sum or mean of each row, or of all logits."""
    dims = operation.args[1] if len(operation.args) > 1 else None
    axes = {d % layout.dim() for d in dims or range(layout.dim())}
    func, kwargs = operation.func, operation.kwargs
    if axes == {form.axis}:
        return _reduce_each_row(
            form, layout, operation, lambda _, logits: func(logits, [1], True, **kwargs)
        )
    return aggregate_all(form, layout, operation) if len(axes) == layout.dim() else None


@register_reduction(aten.sum.default, aten.mean.default)
def aggregate_all(form: Form, layout: Layout, operation: Operation) -> Any:
    """The sum or mean of all logits."""
    out = operation.infer_layout(layout)
    if not out.dtype.is_floating_point:
        return None
    is_mean = operation.func.overloadpacket is aten.mean
    count = math.prod(layout.shape) if is_mean else 1

    def compute(blocks: LogitBlocks) -> Tensor:
        sums = blocks.map(lambda _, logits: logits.sum(dtype=wide_type(out.dtype)))
        return (torch.stack(sums).sum() / count).to(out.dtype).reshape(out.shape)

    return compute
