"""The operations after which logits stay deferred.

`STEPS` maps an operation to its rule. A rule gets the form and the layout of deferred logits and
the operation. It returns the result's `StepResult`, a list of them if the operation has several
outputs, or None if the logits must be materialised.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath._precision import wide_type

aten = torch.ops.aten

# The description of deferred logits


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

    The value is z', or ±l with l = log softmax z', or ±a with a = softmax z', or the product ±a z'
    or ±a l, where z' = s (z + r), or z' = t tanh(s (z + r)) if capped. With `kinds` it is instead a
    sum of terms of these kinds, which `combinations` names.
    """

    axis: int  # of the classes
    probe: Tensor  # with the shape of the logits, but 0 classes; an operation moves its empty axis
    has_bias: bool  # of the head
    scale: Scale = Scale()  # s; if capped, t
    inner_scale: Scale | None = None  # if capped, s
    row: tuple[Tensor, ...] = ()  # r, as a sum
    log_sign: int = 0  # 1: log-probabilities, -1: negated log-probabilities, 0: logits
    softmax_sign: int = 0  # 1: probabilities, -1: negated probabilities, 0: neither
    is_product: bool = False  # of the probabilities and what `log_sign` says
    has_row_scales: bool = False  # whether each row is also multiplied by its own number
    kinds: frozenset[str] = frozenset()  # of the terms of a combination

    @property
    def is_capped(self) -> bool:
        return self.inner_scale is not None

    @property
    def is_logits(self) -> bool:
        return not (self.log_sign or self.softmax_sign or self.kinds)

    @property
    def rows_shape(self) -> torch.Size:
        """The shape without the axis of the classes."""
        return self.probe.shape[: self.axis] + self.probe.shape[self.axis + 1 :]


class StepResult(NamedTuple):
    """An operation's result, and what to do to the features instead.

    `apply_to_rows` applies the operation to a tensor that has any size at the axis of the classes;
    None if the operation moves no rows. `compute_row_scale` returns a scale for each row, with size
    1 at the axis of the classes; None if there are none. `apply_to_values` applies the operation to
    logits (n, C) of any rows; None if it moves rows, or treats them differently.
    """

    form: Form
    layout: Layout
    apply_to_rows: Callable[[Tensor], Tensor] | None = None
    compute_row_scale: Callable[[], Tensor] | None = None
    apply_to_values: Callable[[Tensor], Tensor] | None = None


# Operations on them


class Operation(NamedTuple):
    """A call of a PyTorch operation with deferred logits as one argument."""

    func: Any
    args: tuple[Any, ...]  # with None in place of the logits
    kwargs: dict[str, Any]
    position: int  # of the logits in `args`
    output: int | None = None  # the index of the output, if there are several

    @property
    def other_operand(self) -> Any:
        """Of two operands, the one that is not the logits."""
        return self.args[1 - self.position]

    def apply(self, logits: Tensor) -> Any:
        out = self.func(*self._args_with(logits), **self.kwargs)
        return out if self.output is None else out[self.output]

    def infer_layout(self, layout: Layout) -> Any:
        """Returns the result's layout by PyTorch's own rules, in a list if there are several."""
        return infer_layout(self.func, self._args_with(layout), self.kwargs, self.position)

    def _args_with(self, logits: Any) -> list[Any]:
        return [*self.args[: self.position], logits, *self.args[self.position + 1 :]]


def infer_layout(func: Any, args: Any, kwargs: Any, position: int | None = None) -> Any:
    """Returns the layout of an operation's result, with layouts in place of deferred tensors.

    `position` is that of the tensor of which the result may be a view.
    """
    kwargs = tuple((name, v) for name, v in kwargs.items() if name != "device")
    types = tuple(map(type, args))  # 2 and 2 + 0j are equal, but their results differ in dtype
    return _infer_layout(func, _make_key(args), kwargs, position, types)


def _make_key(argument: Any) -> Any:
    """Returns a hashable copy: layouts for tensors, tuples for lists."""
    if isinstance(argument, Tensor):
        return Layout(argument.shape, argument.stride(), argument.dtype)
    return tuple(map(_make_key, argument)) if type(argument) in (list, tuple) else argument


@functools.lru_cache(maxsize=4096)
def _infer_layout(func: Any, key: Any, kwargs: Any, position: int | None, types: Any) -> Any:
    """Runs the operation on the meta device and returns the layout of its result."""

    def make_argument(key: Any) -> Any:
        if isinstance(key, Layout):
            return torch.empty_strided(key.shape, key.stride, dtype=key.dtype, device="meta")
        return [*map(make_argument, key)] if type(key) is tuple else key

    def read_layout(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return [*map(read_layout, out)]
        is_view = position is not None and _torch.get_storage_id(out) == storage_id
        offset = out.storage_offset() + key[position].offset if is_view else 0
        return Layout(out.shape, out.stride(), out.dtype, offset)

    args = make_argument(key)
    storage_id = None if position is None else _torch.get_storage_id(args[position])
    return read_layout(func(*args, **dict(kwargs)))


# The rules


Rule: TypeAlias = Callable[[Form, Layout, Operation], "StepResult | list[StepResult] | None"]
STEPS: dict[Any, Rule] = {}
STACK = "stack"  # the kind of a tensor with an axis of terms, of which only a log-sum-exp is taken
INDEXING = (aten.index.Tensor, aten.index_select.default)


def register_step(*operations: Any) -> Callable[[Rule], Rule]:
    """Registers the rule of these operations."""

    def register(rule: Rule) -> Rule:
        STEPS.update(dict.fromkeys(operations, rule))
        return rule

    return register


@register_step(aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default)
def copy(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """Keeps values and shape: aliases, copies and casts."""
    device = operation.kwargs.get("device")
    if device is not None and torch.device(device) != form.probe.device:
        return None
    out = operation.infer_layout(layout)
    return StepResult(form, out, apply_to_values=lambda logits: logits.to(out.dtype))


@register_step(aten.slice.Tensor, aten.select.int, *INDEXING)
@register_step(aten.transpose.int, aten.permute.default, aten.t.default)
@register_step(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def select_rows_or_move_axes(
    form: Form, layout: Layout, operation: Operation
) -> StepResult | list[StepResult] | None:
    """Selects whole rows or permutes axes.

    To see what the operation does to the classes, it runs on two tensors of almost no memory. The
    empty axis of the probe's result is the axis of the classes. A tensor with another number of
    classes must keep all of them: then the operation can be applied to the features.
    """
    probes, axis = operation.apply(form.probe), form.axis
    has_several_outputs = not isinstance(probes, Tensor)
    if operation.func in INDEXING:
        # The shape depends on a mask's values, which the meta device lacks. The result is packed.
        width, layouts = 1, None
    else:
        width, layouts = layout.shape[axis] + 1, operation.infer_layout(layout)
        layouts = layouts if has_several_outputs else [layouts]
    shape = [width if d == axis else size for d, size in enumerate(form.probe.shape)]
    wide_probes = operation.apply(form.probe.new_empty(()).expand(shape))
    if not has_several_outputs:
        probes, wide_probes = [probes], [wide_probes]
    if len(wide_probes) != len(probes):
        return None
    results = []
    for i, (probe, wide_probe) in enumerate(zip(probes, wide_probes, strict=True)):
        empty_axes = [d for d, size in enumerate(probe.shape) if size == 0]
        if len(empty_axes) != 1 or wide_probe.shape[empty_axes[0]] != width:
            return None
        shape = [layout.shape[axis] if size == 0 else size for size in probe.shape]
        out = layouts[i] if layouts else make_packed_layout(shape, layout.dtype)
        if [*out.shape] != shape:
            return None
        apply = operation._replace(output=i).apply if has_several_outputs else operation.apply
        results.append(StepResult(form._replace(axis=empty_axes[0], probe=probe), out, apply))
    return results if has_several_outputs else results[0]


@register_step(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default)
@register_step(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def reshape(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """Splits and joins axes other than that of the classes.

    The axis of the classes is the one that has the same size as before, and as many entries in the
    axes after it.
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


@register_step(aten.mul.Tensor, aten.div.Tensor)
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
        if form.is_capped or not form.is_logits or other.is_complex():
            return None
        new_scale = form.scale.multiply(1, 1, (other, power))
        return _change_values(operation, form._replace(scale=new_scale), out)
    if isinstance(other, complex) or not (math.isfinite(other) and other):
        return None
    if not form.is_logits:
        return _change_values(operation, _negate(form), out) if other == -1 else None
    numerator, denominator = (1.0, other) if is_division else (other, 1.0)
    new_scale = form.scale.multiply(numerator, denominator)
    return _change_values(operation, form._replace(scale=new_scale), out)


def _negate(form: Form) -> Form:
    """The form of the negated values, which are not logits."""
    if form.softmax_sign:
        return form._replace(softmax_sign=-form.softmax_sign)
    return form._replace(log_sign=-form.log_sign)


def _change_values(operation: Operation, form: Form, layout: Layout) -> StepResult:
    """The result of an operation that does the same to every logit."""
    return StepResult(form, layout, apply_to_values=operation.apply)


def _scale_rows(
    form: Form, layout: Layout, operation: Operation, out: Layout, power: int
) -> StepResult | None:
    """Multiplies or divides each row by its own number.

    The features are scaled instead, which is the same for a head without bias.
    """
    other = operation.other_operand
    is_scalable = form.is_logits and not (form.has_bias or form.row or form.is_capped)
    if not is_scalable or out.shape != layout.shape:
        return None
    shape = [1] * (layout.dim() - other.dim()) + [*other.shape]
    if shape[form.axis] != 1 or not other.is_floating_point():
        return None
    rows_shape = [1 if d == form.axis else size for d, size in enumerate(layout.shape)]

    def compute_row_scale() -> Tensor:
        factor = other.to(torch.promote_types(wide_type(other.dtype), out.dtype))
        return (factor if power == 1 else 1 / factor).expand(rows_shape)

    return StepResult(form._replace(has_row_scales=True), out, None, compute_row_scale)


@register_step(aten.add.Tensor)
def add_row(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """Adds the same row to all rows. The fused head adds it to the bias."""
    row, out = operation.other_operand, operation.infer_layout(layout)
    is_transformed = form.is_capped or not form.is_logits or form.has_row_scales
    if is_transformed or not form.scale.is_identity() or operation.kwargs:
        return None
    if not isinstance(row, Tensor) or not row.is_floating_point():
        return None
    shape = [1] * (layout.dim() - row.dim()) + [*row.shape]
    if out.shape != layout.shape or not row.numel() == layout.shape[form.axis] == shape[form.axis]:
        return None
    return StepResult(
        form._replace(row=(*form.row, row)),
        out,
        apply_to_values=lambda logits: logits + row.flatten(),
    )


@register_step(aten.neg.default)
def negate(form: Form, layout: Layout, operation: Operation) -> StepResult:
    """Changes the sign."""
    out = operation.infer_layout(layout)
    if not form.is_logits:
        return _change_values(operation, _negate(form), out)
    return _change_values(operation, form._replace(scale=form.scale.multiply(-1, 1)), out)


@register_step(aten.tanh.default)
def cap(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """F19 without its last factor: the tanh of scaled logits."""
    if form.is_capped or not form.is_logits or form.has_row_scales:
        return None
    out = operation.infer_layout(layout)
    return _change_values(operation, form._replace(inner_scale=form.scale, scale=Scale()), out)


@register_step(aten._log_softmax.default, aten._softmax.default)
def take_softmax(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """F7: probabilities over the classes, or their logarithms."""
    if not form.is_logits or operation.args[1] % layout.dim() != form.axis:
        return None
    half_to_float, is_last_axis = operation.args[2], form.axis == layout.dim() - 1

    def apply_to_values(logits: Tensor) -> Tensor:
        # PyTorch rounds half types differently over another axis than the last
        if is_last_axis:
            return operation.func(logits, 1, half_to_float)
        return operation.func(logits.T, 0, half_to_float).T

    out = operation.infer_layout(layout)
    is_log = operation.func is aten._log_softmax.default
    form = form._replace(log_sign=int(is_log), softmax_sign=int(not is_log))
    return StepResult(form, out, apply_to_values=apply_to_values)


@register_step(aten.exp.default)
def take_exponential(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """F7: probabilities from their logarithms."""
    if form.softmax_sign or form.log_sign != 1:
        return None
    out = operation.infer_layout(layout)
    return _change_values(operation, form._replace(log_sign=0, softmax_sign=1), out)


@register_step(aten.special_entr.default)
def take_terms_of_entropy(form: Form, layout: Layout, operation: Operation) -> StepResult | None:
    """-a l of each probability a = e^l."""
    if form.softmax_sign != 1 or form.is_product:
        return None
    out = operation.infer_layout(layout)
    return _change_values(operation, form._replace(log_sign=-1, is_product=True), out)


def multiply(p: Form, v: Form, layout: Layout, other_layout: Layout) -> StepResult | None:
    """Probabilities p times the logits or log-probabilities v of the same logits."""
    if not p.softmax_sign or p.is_product or v.softmax_sign or p.axis != v.axis:
        return None
    if layout.shape != other_layout.shape:
        return None
    out = Operation(aten.mul.Tensor, (None, other_layout), {}, 0).infer_layout(layout)
    return StepResult(p._replace(log_sign=v.log_sign, is_product=True), out)


# The rules that also apply to combinations, since they change no values.
STEPS_OF_COMBINATIONS = (copy, select_rows_or_move_axes, reshape)


def is_same_value(operation: Any, other: Any) -> bool:
    """Whether two operations do the same. Tensors must be the same object, or copies of one."""
    if (operation.func, operation.position) != (other.func, other.position):
        return False
    leaves, other_leaves = (
        _torch.tree_leaves((o.args, o.kwargs, o.output)) for o in (operation, other)
    )
    return len(leaves) == len(other_leaves) and all(
        _is_same_tensor(v, w)
        if isinstance(v, Tensor)
        else v is w or (type(v) is type(w) and bool(v == w))
        for v, w in zip(leaves, other_leaves, strict=True)
    )


_SOURCE = "_nnmath_source"


def set_source(copy: Tensor, original: Tensor) -> None:
    """Records that a tensor is a copy of the original, in its present version."""
    setattr(copy, _SOURCE, (weakref.ref(original), _torch.get_version(original)))


def _is_same_tensor(v: Tensor, w: Any) -> bool:
    """Whether both are the same object, or copies of the same version of one."""
    if v is w:
        return True
    source, version = getattr(v, _SOURCE, (None, 0))
    other_source, other_version = getattr(w, _SOURCE, (None, 0))
    return source is not None and source is other_source and version == other_version
