"""The operations after which logits stay deferred.

`STEPS` maps an operation to its rule. A rule gets the form and the layout of deferred logits and
the operation. It returns the result's `StepResult`, a list of them if the operation has several
outputs, or None if the logits must be materialised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath._precision import wide_type

aten = torch.ops.aten

# What deferred logits are


class Layout(NamedTuple):
    """A tensor's shape, strides, dtype and storage offset."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    def dim(self) -> int:
        return len(self.shape)


def make_packed_layout(shape: Any, dtype: torch.dtype) -> Layout:
    """Returns the layout of a contiguous tensor."""
    stride = [math.prod(max(size, 1) for size in shape[d + 1 :]) for d in range(len(shape))]
    return Layout(torch.Size(shape), tuple(stride), dtype)


class Scale(NamedTuple):
    """numerator / denominator, times each tensor of shape () to the power 1 or -1."""

    numerator: float = 1.0
    denominator: float = 1.0
    tensors: tuple[tuple[Tensor, int], ...] = ()

    def is_identity(self) -> bool:
        return self.numerator == self.denominator and not self.tensors

    def multiply(self, numerator: float, denominator: float, *tensors: tuple[Tensor, int]) -> Scale:
        return Scale(
            self.numerator * numerator, self.denominator * denominator, self.tensors + tensors
        )

    def evaluate(self, dtype: torch.dtype) -> Any:
        """Returns the scale as a number, or as a tensor of at least `dtype`'s precision."""
        product: Any = self.numerator / self.denominator
        for tensor, power in self.tensors:
            factor = tensor.to(torch.promote_types(wide_type(tensor.dtype), dtype))
            product = product * factor if power == 1 else product / factor
        return product


class Form(NamedTuple):
    """The value of deferred logits as a formula of the head's logits z and a row r.

    With z' = s (z + r), or z' = t tanh(s (z + r)) if capped, it is z', log softmax z' or
    -log softmax z'.
    """

    axis: int  # of the classes
    probe: Tensor  # shaped as the logits with 0 classes; its empty axis tells where classes went
    has_bias: bool  # of the head
    scale: Scale = Scale()  # s; if capped, t
    inner_scale: Scale | None = None  # if capped, s
    row: tuple[Tensor, ...] = ()  # r, as a sum
    log_sign: int = 0  # 1 for log-probabilities, -1 for negated ones, 0 for logits
    has_row_scales: bool = False  # whether each row has a scale of its own besides s

    @property
    def is_capped(self) -> bool:
        return self.inner_scale is not None

    @property
    def rows_shape(self) -> torch.Size:
        """The shape without the axis of the classes."""
        return self.probe.shape[: self.axis] + self.probe.shape[self.axis + 1 :]


class StepResult(NamedTuple):
    """An operation's result, and what the operation does to the features.

    `apply_to_rows` takes a tensor with any width at the axis of the classes; None leaves it as it
    is. `row_scale` returns a scale for each row, with size 1 at the axis of the classes.
    """

    form: Form
    layout: Layout
    apply_to_rows: Callable[[Tensor], Tensor] | None = None
    row_scale: Callable[[], Tensor] | None = None


# What is done to them


class Operation(NamedTuple):
    """A call of a PyTorch operation with deferred logits as one argument."""

    func: Any
    args: tuple[Any, ...]  # with None in place of the logits
    kwargs: dict[str, Any]
    position: int  # of the logits in `args`
    output: int | None = None  # the index of the output, if there are several

    @property
    def other_operand(self) -> Any:
        """The other one of two operands."""
        return self.args[1 - self.position]

    def apply(self, logits: Tensor) -> Any:
        out = self.func(*self._args_with(logits), **self.kwargs)
        return out if self.output is None else out[self.output]

    def infer_layout(self, layout: Layout) -> Any:
        """Returns the result's layout by PyTorch's own rules, or a list for several outputs."""
        args = self._args_with(layout)
        kwargs = tuple((name, v) for name, v in self.kwargs.items() if name != "device")
        types = tuple(map(type, args))  # 2 and 2 + 0j are equal keys
        return _infer_layout(self.func, _make_key(args), kwargs, self.position, types)

    def _args_with(self, logits: Any) -> list[Any]:
        return [*self.args[: self.position], logits, *self.args[self.position + 1 :]]


def _make_key(argument: Any) -> Any:
    """Returns a hashable copy: layouts for tensors, tuples for lists."""
    if isinstance(argument, Tensor):
        return Layout(argument.shape, argument.stride(), argument.dtype)
    return tuple(map(_make_key, argument)) if type(argument) in (list, tuple) else argument


@functools.lru_cache(maxsize=4096)
def _infer_layout(func: Any, key: Any, kwargs: Any, position: int, types: Any) -> Any:
    """Runs the operation on the meta device."""

    def make_argument(key: Any) -> Any:
        if isinstance(key, Layout):
            return torch.empty_strided(key.shape, key.stride, dtype=key.dtype, device="meta")
        return [*map(make_argument, key)] if type(key) is tuple else key

    def read_layout(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return [*map(read_layout, out)]
        is_view = _torch.get_storage_id(out) == storage_id
        offset = out.storage_offset() + key[position].offset if is_view else 0
        return Layout(out.shape, out.stride(), out.dtype, offset)

    args = make_argument(key)
    storage_id = _torch.get_storage_id(args[position])
    return read_layout(func(*args, **dict(kwargs)))


# The rules


Rule: TypeAlias = Callable[[Form, Layout, Operation], "StepResult | list[StepResult] | None"]
STEPS: dict[Any, Rule] = {}
INDEXING = (aten.index.Tensor, aten.index_select.default)


def step(*operations: Any) -> Callable[[Rule], Rule]:
    """Enters a rule into the table, under its operations."""

    def enter(rule: Rule) -> Rule:
        STEPS.update(dict.fromkeys(operations, rule))
        return rule

    return enter


@step(aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default)
def copy(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """Copies keep values and shape; only the dtype may change."""
    device = operation.kwargs.get("device")
    if device is not None and torch.device(device) != form.probe.device:
        return None
    return StepResult(form, operation.infer_layout(layout))


@step(aten.slice.Tensor, aten.select.int, *INDEXING)
@step(aten.transpose.int, aten.permute.default, aten.t.default)
@step(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def select_rows_or_move_axes(
    form: Form, layout: Layout, operation: Operation
) -> StepResult | list[StepResult] | None:
    """Selects rows or permutes axes, and leaves every row whole.

    The operation runs on two tensors without entries. In the result of the probe, the empty axis
    is the axis of the classes. A tensor with another number of classes must keep them all, so that
    the operation can be applied to the features.
    """
    probes, axis = operation.apply(form.probe), form.axis
    has_several = not isinstance(probes, Tensor)
    if operation.func in INDEXING:
        # The shape depends on a mask's values, which the meta device lacks; the result is packed.
        width, layouts = 1, None
    else:
        width, layouts = layout.shape[axis] + 1, operation.infer_layout(layout)
        layouts = layouts if has_several else [layouts]
    shape = [width if d == axis else size for d, size in enumerate(form.probe.shape)]
    others = operation.apply(form.probe.new_empty(()).expand(shape))
    probes, others = (out if has_several else [out] for out in (probes, others))
    if len(others) != len(probes):
        return None
    results = []
    for i, (probe, other) in enumerate(zip(probes, others, strict=True)):
        empty_axes = [d for d, size in enumerate(probe.shape) if size == 0]
        if len(empty_axes) != 1 or other.shape[empty_axes[0]] != width:
            return None
        shape = [layout.shape[axis] if size == 0 else size for size in probe.shape]
        out = layouts[i] if layouts else make_packed_layout(shape, layout.dtype)
        if [*out.shape] != shape:
            return None
        apply = operation._replace(output=i).apply if has_several else operation.apply
        results.append(StepResult(form._replace(axis=empty_axes[0], probe=probe), out, apply))
    return results if has_several else results[0]


@step(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default)
@step(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def reshape(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """Splits and joins axes of rows.

    The classes are at the axis that has as many entries after it as before the operation.
    """
    out = operation.infer_layout(layout)
    class_count, inner_count = layout.shape[form.axis], math.prod(layout.shape[form.axis + 1 :])
    for axis, size in enumerate(out.shape):
        if size == class_count and math.prod(out.shape[axis + 1 :]) == inner_count:
            break
    else:
        return None
    outer_shape, inner_shape = out.shape[:axis], out.shape[axis + 1 :]

    def apply(rows: Tensor) -> Tensor:
        return rows.reshape(*outer_shape, rows.shape[form.axis], *inner_shape)

    return StepResult(form._replace(axis=axis, probe=apply(form.probe)), out, apply)


@step(aten.mul.Tensor, aten.div.Tensor)
def scale(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """F18: multiplies or divides by a number, a tensor of shape (), or one scale for each row."""
    is_division = operation.func is aten.div.Tensor
    power = -1 if is_division else 1
    if is_division and operation.position:
        return None
    out, other = operation.infer_layout(layout), operation.other_operand
    if isinstance(other, Tensor) and other.dim():
        return _scale_rows(form, layout, operation, out, power)
    if isinstance(other, Tensor) and other.device.type == "cpu" and not other.requires_grad:
        other = other.item()
    if isinstance(other, Tensor):
        if form.is_capped or form.log_sign or other.is_complex():
            return None
        return StepResult(form._replace(scale=form.scale.multiply(1, 1, (other, power))), out)
    if isinstance(other, complex) or not (math.isfinite(other) and other):
        return None
    if form.log_sign:
        return StepResult(form._replace(log_sign=-form.log_sign), out) if other == -1 else None
    numerator, denominator = (1.0, other) if is_division else (other, 1.0)
    return StepResult(form._replace(scale=form.scale.multiply(numerator, denominator)), out)


def _scale_rows(
    form: Form, layout: Layout, operation: Operation, out: Layout, power: int
) -> StepResult | None:
    """Scales each row: of a head without bias the features can be scaled instead."""
    other = operation.other_operand
    is_scalable = not (form.has_bias or form.row or form.is_capped or form.log_sign)
    if not is_scalable or out.shape != layout.shape:
        return None
    shape = [1] * (layout.dim() - other.dim()) + [*other.shape]
    if shape[form.axis] != 1 or not other.is_floating_point():
        return None
    rows_shape = [1 if d == form.axis else size for d, size in enumerate(layout.shape)]

    def row_scale() -> Tensor:
        factor = other.to(torch.promote_types(wide_type(other.dtype), out.dtype))
        return (factor if power == 1 else 1 / factor).expand(rows_shape)

    return StepResult(form._replace(has_row_scales=True), out, None, row_scale)


@step(aten.add.Tensor)
def add_row(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """Adds the same row to all rows: it is added to the bias."""
    row, out = operation.other_operand, operation.infer_layout(layout)
    is_changed = form.is_capped or form.log_sign or form.has_row_scales
    if is_changed or not form.scale.is_identity() or operation.kwargs:
        return None
    if not isinstance(row, Tensor) or not row.is_floating_point():
        return None
    shape = [1] * (layout.dim() - row.dim()) + [*row.shape]
    if out.shape != layout.shape or not row.numel() == layout.shape[form.axis] == shape[form.axis]:
        return None
    return StepResult(form._replace(row=(*form.row, row)), out)


@step(aten.neg.default)
def negate(form: Form, layout: Layout, operation: Operation) -> StepResult:
    """Changes the sign."""
    out = operation.infer_layout(layout)
    if form.log_sign:
        return StepResult(form._replace(log_sign=-form.log_sign), out)
    return StepResult(form._replace(scale=form.scale.multiply(-1, 1)), out)


@step(aten.tanh.default)
def cap(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """F19 without the factor: tanh of scaled logits."""
    if form.is_capped or form.log_sign or form.has_row_scales:
        return None
    out = operation.infer_layout(layout)
    return StepResult(form._replace(inner_scale=form.scale, scale=Scale()), out)


@step(aten._log_softmax.default)
def take_log_softmax(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """F7: log-probabilities over the classes."""
    if form.log_sign or operation.args[1] % layout.dim() != form.axis:
        return None
    return StepResult(form._replace(log_sign=1), operation.infer_layout(layout))
