"""Elementwise operations on probabilities and their logarithms: the terms of divergences.

A `Combination` is one such operation. Its operands may come from several heads. Each of its values
is a sum of terms, and a kind says what a term is, such as "probability". `COMBINATIONS` maps an
operation to its rule. A rule gets the kinds of each operand's terms and returns those of the
result, or None if the operands must be materialised. Whether the sum over the classes needs the
logits is decided when it is taken (`divergences`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath.deferred.recipes import Combination, Recipe, capture_operand
from torch_nnmath.deferred.steps import STACK, Form, Layout, StepResult, aten, infer_layout
from torch_nnmath.kernels.dispatch import PLAIN_TYPES

Kinds: TypeAlias = frozenset[str]

# The kinds: a row is a tensor with one number for each row, a tensor has the shape of the logits.
LOG, PROBABILITY, NUMBER, ROW, PLAIN = "log-probability", "probability", "number", "row", "tensor"
PRODUCTS = {  # of two factors, by their kinds
    frozenset(pair): f"{pair[0]} x {pair[-1]}"
    for pair in ((PROBABILITY, LOG), (PLAIN, LOG), (PLAIN, PROBABILITY), (PLAIN,))
}

MAX_DEPTH = 64  # of a chain of combinations, which is read recursively

Rule: TypeAlias = Callable[..., Kinds | None]
COMBINATIONS: dict[Any, Rule] = {}


def register_combination(*operations: Any) -> Callable[[Rule], Rule]:
    """Registers the rule of these operations."""

    def register(rule: Rule) -> Rule:
        COMBINATIONS.update(dict.fromkeys(operations, rule))
        return rule

    return register


SUMS = (aten.add.Tensor, aten.sub.Tensor)


@register_combination(*SUMS)
def add(first: Kinds, second: Kinds) -> Kinds | None:
    """Numbers are added to log-probabilities alone, as for the logarithm of a mixture."""
    kinds = first | second
    return None if ROW in kinds or (NUMBER in kinds and not is_log(kinds)) else kinds


@register_combination(aten.lerp.Scalar, aten.lerp.Tensor)
def interpolate(first: Kinds, second: Kinds, weight: Kinds) -> Kinds | None:
    return add(first, second) if weight == {NUMBER} else None


@register_combination(aten.mul.Tensor)
def multiply(first: Kinds, second: Kinds) -> Kinds | None:
    if is_factor(first) or is_factor(second):
        return second if is_factor(first) else first
    products = {PRODUCTS.get(frozenset({a, b})) for a in first for b in second}
    return None if None in products else frozenset(filter(None, products))


@register_combination(aten.div.Tensor)
def divide(first: Kinds, second: Kinds) -> Kinds | None:
    return first if is_factor(second) else None


@register_combination(aten.neg.default)
def negate(kinds: Kinds) -> Kinds | None:
    return kinds


@register_combination(aten.xlogy.Tensor)
def multiply_by_logarithm(first: Kinds, second: Kinds) -> Kinds | None:
    return multiply(first, Kinds({LOG})) if first == second == {PROBABILITY} else None


@register_combination(aten.log.default)
def take_logarithm(kinds: Kinds) -> Kinds | None:
    return Kinds({LOG}) if kinds == {PROBABILITY} else None


@register_combination(aten.stack.default)
def stack(*operands: Kinds) -> Kinds | None:
    return Kinds({STACK}) if all(map(is_log, operands)) else None


@register_combination(aten.logsumexp.default)
def sum_exponentials_of_stack(kinds: Kinds) -> Kinds | None:
    return Kinds({LOG}) if kinds == {STACK} else None


@register_combination(aten.logaddexp.default)
def add_exponentials(first: Kinds, second: Kinds) -> Kinds | None:
    return Kinds({LOG}) if is_log(first) and is_log(second) else None


def is_log(kinds: Kinds) -> bool:
    """Whether the terms are log-probabilities and numbers."""
    return LOG in kinds and kinds <= {LOG, NUMBER}


def is_factor(kinds: Kinds) -> bool:
    """Whether the operand is a number, or one for each row."""
    return kinds in ({NUMBER}, {ROW})


def find_kinds(form: Form) -> Kinds | None:
    """The kinds of the terms of deferred logits; None for logits and their expectations."""
    if form.kinds:
        return form.kinds
    if form.log_sign and form.softmax_sign:
        return multiply(Kinds({PROBABILITY}), Kinds({LOG}))
    if form.log_sign or (form.softmax_sign and not form.is_product):
        return Kinds({LOG if form.log_sign else PROBABILITY})
    return None


def combine(func: Any, args: Any, kwargs: Any) -> Recipe | None:
    """Returns the recipe of an operation, some of whose arguments are recipes.

    Returns None if the recipes must be materialised. Deferred operands must have the same shape. A
    plain tensor of this shape is not copied, since it is as large as the logits: its version is
    recorded.
    """
    recipes = [v for v in _torch.tree_leaves(args) if isinstance(v, Recipe)]
    form, layout = recipes[0].form, recipes[0].layout
    for r in recipes:
        if r.layout.shape != layout.shape or r.form.axis != form.axis:
            return None
        if r.form.probe.device != form.probe.device:
            return None
        if r.call.depth >= MAX_DEPTH:
            return None
    if any(name != "alpha" or type(v) is bool for name, v in kwargs.items()):
        return None  # a bool raises
    if func in SUMS and any(type(v) in (int, float) and not v for v in args):
        return None  # x + 0 computes x
    operands, axis, dim = args, form.axis, 0
    if func is aten.stack.default:
        operands = args[0]
        dim = args[1] % (layout.dim() + 1) if len(args) > 1 else 0
        axis += dim <= axis
    elif func is aten.logsumexp.default:
        operands, dims = args[:1], [d % layout.dim() for d in args[1]]
        if form.kinds != {STACK} or len(args) > 2 or dims != [recipes[0].call.stack_axis]:
            return None
        (dim,) = dims
        axis -= dim < axis
    kinds = [_classify(v, form, layout) for v in operands]
    result_kinds = None if None in kinds else COMBINATIONS[func](*kinds)
    if result_kinds is None:
        return None
    arguments = _torch.tree_map(lambda v: v.layout if isinstance(v, Recipe) else v, args)
    try:
        out = infer_layout(func, arguments, kwargs)
    except (RuntimeError, IndexError):  # the operation raises it again on materialised logits
        return None
    probe = form.probe.new_empty([0 if d == axis else n for d, n in enumerate(out.shape)])
    call = Combination(func, kwargs, recipes, dim)
    call.args = _torch.tree_map(lambda v: _capture(v, form, call), args)
    return Recipe(call, StepResult(Form(axis, probe, has_bias=False, kinds=result_kinds), out))


def _classify(operand: Any, form: Form, layout: Layout) -> Kinds | None:
    """The kinds of an operand's terms; None for a shape or type that no combination has."""
    if isinstance(operand, Recipe):
        return find_kinds(operand.form)
    if isinstance(operand, bool | int | float):
        return Kinds({NUMBER})
    if type(operand) not in PLAIN_TYPES or operand.is_complex():
        return None
    if not operand.dim():
        return Kinds({NUMBER})
    if operand.device != form.probe.device or operand.dim() > layout.dim():
        return None
    if operand.shape == layout.shape and operand.stride(form.axis):
        has_version = operand.is_floating_point() and not operand.is_inference()
        return Kinds({PLAIN}) if has_version else None
    shape = [1] * (layout.dim() - operand.dim()) + [*operand.shape]
    # the gradient of one number for each row, read from an expanded tensor, is as large as logits
    is_expanded = operand.shape == layout.shape and not operand.requires_grad
    is_row = shape[form.axis] == 1 or is_expanded
    is_row &= all(n in (1, size) for n, size in zip(shape, layout.shape, strict=True))
    return Kinds({ROW}) if is_row else None


def _capture(operand: Any, form: Form, call: Combination) -> Any:
    """As `capture_operand`, but a tensor of the logits' shape is not copied."""
    if not isinstance(operand, Tensor):
        return operand
    if operand.dim() == form.probe.dim() and operand.shape[form.axis] > 1:
        if operand.stride(form.axis):
            call.record_version(operand)
            return operand
        operand = operand.narrow(form.axis, 0, 1)
    return capture_operand(operand, call)
