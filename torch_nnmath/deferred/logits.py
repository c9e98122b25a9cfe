"""Deferred logits: the tensor, its dispatch, and the calls of a head that create it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from torch_nnmath import _torch, formulas
from torch_nnmath import functional as F
from torch_nnmath._precision import disable_autocast
from torch_nnmath.deferred.combinations import COMBINATIONS, combine
from torch_nnmath.deferred.log import SPLIT_WEIGHT
from torch_nnmath.deferred.mark import get_head_log
from torch_nnmath.deferred.operands import (
    Operands,
    are_operands_of_head,
    find_gradient_rule,
    make_operands,
    set_inference_mode,
)
from torch_nnmath.deferred.recipes import HeadCall, Recipe, capture_operand
from torch_nnmath.deferred.reductions import REDUCTIONS, SELECTIONS
from torch_nnmath.deferred.steps import (
    STACK,
    STEPS,
    STEPS_OF_COMBINATIONS,
    Form,
    Operation,
    Rule,
    StepResult,
    aten,
    copy,
    is_same_value,
    make_packed_layout,
    multiply,
)
from torch_nnmath.deferred.wrappers import find_features, find_reader
from torch_nnmath.kernels.dispatch import PLAIN_TYPES, has_dtensor

# The calls of a head


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, module: Module) -> Tensor:
    """F1 with deferred logits where they can be deferred; otherwise `functional.linear`.

    `module` is the head; its mark is a `HeadLog`. Where Dynamo may break its graph, it does so at
    this call, and compiles what comes before and after it. PyTorch 2.11 cannot pass a module to
    the functions that this needs; its Dynamo takes `is_exporting` for True, so logits are plain.
    """
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        from torch_nnmath.deferred.compiled import (
            is_named_head,
            linear_between_graphs,
            log_plain_logits,
            log_unbroken_graph,
        )

        reason = None if is_named_head(module) else find_reason_for_plain_logits(input, weight)
        if reason is not None:
            log_plain_logits(module, reason)
        elif _torch.may_break_graph():
            return linear_between_graphs(input, weight, bias, module)
        else:
            log_unbroken_graph(module)
    log = None if torch.compiler.is_compiling() else get_head_log(module)
    if log is None or _torch.is_transformed() or is_traced():
        return F.linear(input, weight, bias)
    is_training = module.training and torch.is_grad_enabled()
    features = find_features(input, weight, bias, module)
    if features is None:
        if has_dtensor(weight):
            log.count_materialization(SPLIT_WEIGHT, is_training=is_training)
        return F.linear(input, weight, bias)
    reason = None if log.is_named else find_reason_for_plain_logits(input, weight)
    if reason is not None:
        log.count_materialization(reason)
        return F.linear(input, weight, bias)
    reader = find_reader(module)
    if reader is not None:
        log.count_materialization(reader, is_training=is_training)
        return F.linear(input, weight, bias)
    operands = make_operands(features, weight, bias)
    if operands is None or not are_operands_of_head(operands):
        return F.linear(input, weight, bias)
    logits = DeferredAffine.evaluate(*operands)
    call = logits.recipe.call
    call.log, call.grad_fn, call.is_training = log, get_grad_fn(logits), module.training
    return logits


MIN_DEFERRED_BYTES = 2**24
MIN_CLASSES_PER_FEATURE = 2


def has_few_classes(weight: Tensor) -> bool:
    """Whether the features outweigh the logits, whatever the number of rows."""
    return weight.shape[0] < MIN_CLASSES_PER_FEATURE * weight.shape[-1]


def find_reason_for_plain_logits(features: Tensor, weight: Tensor) -> str | None:
    """Returns why deferral would cost more time than its memory is worth; None if it would not.

    A fused loss saves two or three times the bytes of the logits. It costs about a millisecond of
    Python, and one more pass over the features for each block of rows. On two cores, a step with
    a fused loss is as fast as one with plain logits from about these limits on.
    """
    classes, row_length = weight.shape[0], weight.shape[-1]
    if has_few_classes(weight):
        return (
            f"by rule: fewer than {MIN_CLASSES_PER_FEATURE} classes for each feature, so logits "
            "are small beside the features"
        )
    rows = features.numel() // max(row_length, 1)
    if rows * classes * features.element_size() < MIN_DEFERRED_BYTES:
        return f"by rule: they take less than {MIN_DEFERRED_BYTES // 2**20} MiB"
    return None


def is_traced() -> bool:
    """Whether a tracer records operations. It must record those of plain logits."""
    return _torch.is_jit_tracing() or _torch.is_fx_tracing()


class DeferredAffine(formulas.Affine):
    """F1 with a forward that returns deferred logits; the backward is F8. It gets `Operands`."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, W: Tensor, b: Tensor | None, weight_dtype: torch.dtype | None
    ) -> Tensor:
        form = Form(x.dim() - 1, x.new_empty((*x.shape[:-1], 0)), has_bias=b is not None)
        layout = make_packed_layout((*x.shape[:-1], W.shape[0]), x.dtype)
        call = HeadCall(Operands(x, W, b, weight_dtype))
        return DeferredLogits(Recipe(call, StepResult(form, layout)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, logits: Tensor) -> None:
        x, W, _, ctx.weight_dtype = inputs
        ctx.W_dtype, ctx.compute_gradients = W.dtype, find_gradient_rule(x, W)
        formulas.Affine.setup_context(ctx, inputs, logits)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, W = ctx.saved_tensors
        if W is not None and ctx.weight_dtype is not None:
            W = W.to(ctx.weight_dtype)
        dx, dW, db = ctx.compute_gradients(dz, x, W, ctx.b_shape, ctx.needs_input_grad)
        return dx, dW if dW is None else dW.to(ctx.W_dtype), db, None


# The tensor


class DeferredLogits(Tensor):
    """Logits without memory, until an operation needs their values."""

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe: Recipe) -> DeferredLogits:
        layout = recipe.layout
        logits: DeferredLogits = _torch.make_wrapper(
            cls,
            layout.shape,
            strides=layout.stride,
            storage_offset=layout.offset,
            dtype=layout.dtype,
            device=recipe.form.probe.device,
        )
        _torch.forbid_memory_access(logits)
        logits.recipe, recipe.is_inference = recipe, logits.is_inference()
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _hide_from_compiler(_call_function)(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _hide_from_compiler(_call_operation)(func, args, kwargs or {})


def _hide_from_compiler(function: Any) -> Any:
    """Applies `torch.compiler.disable` if Dynamo is loaded; else the call would import Dynamo."""
    if not _torch.is_dynamo_loaded():
        return function
    if function not in _HIDDEN:
        _HIDDEN[function] = torch.compiler.disable(function)
    return _HIDDEN[function]


_HIDDEN: dict[Any, Any] = {}

OVERRIDES: dict[Any, Callable[..., Any]] = {}


def register_override(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a rule that overrides these functions for deferred logits.

    The rule gets the function and its arguments. If it returns NotImplemented, the function itself
    is called.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        OVERRIDES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _call_function(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function of PyTorch or of this library, above autograd."""
    if not all(cls in (DeferredLogits, *PLAIN_TYPES) for cls in types):
        # Another tensor subclass handles the call.
        return call_with_plain_tensors(func, *args, **kwargs)
    rule = OVERRIDES.get(func)
    with _torch.disable_torch_function():
        if rule is not None:
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def call_with_plain_tensors(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function with plain tensors that share the memory of the materialised logits."""

    def materialize(argument: Any) -> Any:
        if not isinstance(argument, DeferredLogits):
            return argument
        # Modes are disabled because fake tensors cannot be made from memory.
        with _torch.disable_torch_function(), _torch.disable_dispatch_modes():
            argument.recipe.call.materialize(function_name(func))
            return aten.alias(argument)

    args, kwargs = _torch.tree_map(materialize, (args, kwargs))
    return func(*args, **kwargs)


def materialize(tree: Any, reason: str) -> None:
    """Computes the logits in nested lists, tuples and dicts."""
    for leaf in _torch.tree_leaves(tree):
        if isinstance(leaf, DeferredLogits):
            leaf.recipe.call.materialize(reason)


# Operations that read only the dtype and the device of their tensor.
FACTORIES = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
FACTORIES |= {aten.new_empty.default, aten.new_empty_strided.default}


def _call_operation(func: Any, args: Any, kwargs: Any) -> Any:
    """Handles an operation below autograd: defers it by its rule, or materialises the logits."""
    rule = STEPS.get(func)
    if rule is not None:
        result = _defer(func, rule, args, kwargs)
        if result is not None:
            return result
    if func in COMBINATIONS:
        result = _combine(func, args, kwargs)
        if result is not None:
            return result
    if func in REDUCTIONS:
        result = _reduce(func, args, kwargs)
        if result is not None:
            return result
    # Without autograd, as in inference mode, composite operations arrive whole.
    parts = func.decompose(*args, **kwargs)
    if parts is not NotImplemented:
        return parts
    if func in FACTORIES:
        logits = args[0]
        template = torch.empty(0, dtype=logits.dtype, device=logits.device)
        return func(template, *args[1:], **kwargs)
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], DeferredLogits):
        raise RuntimeError(
            f"deferred logits cannot change their shape in place by {_operation_name(func)}: "
            f"use {_operation_name(func).rstrip('_')}"
        )
    deferred_of: dict[int, Tensor] = {}

    def materialize(argument: Any) -> Any:
        if not isinstance(argument, DeferredLogits):
            return argument
        argument.recipe.call.materialize(_operation_name(func))
        tensor = argument.recipe.tensor
        assert tensor is not None
        deferred_of[id(tensor)] = argument
        return tensor

    def restore(output: Any) -> Any:
        """Returns the deferred argument for an output that is its materialised tensor.

        An in-place operation returns the tensor that it was given.
        """
        return deferred_of.get(id(output), output) if isinstance(output, Tensor) else output

    args, kwargs = _torch.tree_map(materialize, (args, kwargs))
    return _torch.tree_map(restore, func(*args, **kwargs))


def _defer(func: Any, rule: Rule, args: Any, kwargs: Any) -> Any:
    """Returns the operation's result as deferred logits; None if the rule does not apply."""
    positions = [i for i, v in enumerate(args) if isinstance(v, DeferredLogits)]
    if func is aten.mul.Tensor and len(positions) == 2:
        return _defer_product(*args)
    if len(positions) != 1 or any(isinstance(v, DeferredLogits) for v in kwargs.values()):
        return None
    (position,) = positions
    recipe = args[position].recipe
    call, form, layout = recipe.call, recipe.form, recipe.layout
    if call.is_materialized or is_traced():
        return None
    if form.kinds and rule not in ((copy,) if STACK in form.kinds else STEPS_OF_COMBINATIONS):
        return None
    class_count = layout.shape[form.axis]
    row_count = math.prod(layout.shape) // class_count
    operands = [v for v in _torch.tree_leaves(args) if isinstance(v, Tensor)]
    for operand in operands:
        if operand is not args[position] and operand.numel() > max(class_count, row_count):
            return None  # larger than a row or a column: too large to be copied
    captured_args = [
        None if i == position else capture_operand(v, call) for i, v in enumerate(args)
    ]
    operation = Operation(func, tuple(captured_args), kwargs, position)
    try:
        rule_result = rule(form, layout, operation)
    except (RuntimeError, IndexError):  # the operation raises it again on materialised logits
        return None
    has_several_outputs = isinstance(rule_result, list)
    results: Any = rule_result if has_several_outputs else [rule_result]
    outputs = []
    for i, result in enumerate(results):
        if result is None or result.layout.shape[result.form.axis] != class_count:
            return None
        dtype = result.layout.dtype
        if dtype.is_complex:
            return None
        # a cast to a narrower dtype rounds, unless a term of the sum is that narrow
        if torch.promote_types(dtype, layout.dtype) != dtype and dtype not in call.term_dtypes:
            return None
        step = operation._replace(output=i) if has_several_outputs else operation
        # A view is an inference tensor if its base is one, whether inference mode is on or not.
        is_inference = recipe.is_inference if func.is_view else torch.is_inference_mode_enabled()
        with set_inference_mode(is_inference):
            outputs.append(DeferredLogits(Recipe(call, result, recipe, step)))
    return outputs if has_several_outputs else outputs[0]


def _defer_product(input: DeferredLogits, other: DeferredLogits) -> Any:
    """Returns the product of probabilities and the logits that they come from, or None."""
    first, second = input.recipe, other.recipe
    call = first.call
    if call.is_materialized or is_traced() or second.call is not call:
        return None
    if input.requires_grad != other.requires_grad:
        return None  # a combination, of which one factor is constant
    changes, other_changes = first.list_changes_of_logits(), second.list_changes_of_logits()
    pairs = zip(changes, other_changes, strict=False)
    is_same = all(s is t or is_same_value(s.operation, t.operation) for s, t in pairs)
    if not is_same or len(changes) != len(other_changes):
        return None
    p, v = (first, second) if first.form.softmax_sign else (second, first)
    result = multiply(p.form, v.form, first.layout, second.layout)
    operation = Operation(aten.mul.Tensor, (None, None), {}, 0)
    return result and DeferredLogits(Recipe(call, result, first, operation, second))


def _combine(func: Any, args: Any, kwargs: Any) -> Any:
    """Returns an elementwise operation on terms of divergences as deferred logits, or None."""
    leaves = _torch.tree_leaves((args, kwargs))
    calls = [v.recipe.call for v in leaves if isinstance(v, DeferredLogits)]
    if is_traced() or any(call.is_materialized for call in calls):
        return None

    def get_recipe(argument: Any) -> Any:
        return argument.recipe if isinstance(argument, DeferredLogits) else argument

    recipe = combine(func, *_torch.tree_map(get_recipe, (args, kwargs)))
    if recipe is None:
        return None
    with set_inference_mode(torch.is_inference_mode_enabled()):
        return DeferredLogits(recipe)


def _reduce(func: Any, args: Any, kwargs: Any) -> Any:
    """Computes a reduction block by block; None if the logits must be materialised."""
    logits, *others = args
    if not isinstance(logits, DeferredLogits) or any(
        isinstance(v, DeferredLogits) for v in _torch.tree_leaves((others, kwargs))
    ):
        return None
    recipe = logits.recipe
    call = recipe.call
    if call.is_materialized or is_traced() or recipe.form.kinds:
        return None
    try:
        operation = Operation(func, (None, *others), kwargs, 0)
        compute = REDUCTIONS[func](recipe.form, recipe.layout, operation)
    except (RuntimeError, IndexError):  # the operation raises it again on materialised logits
        return None
    if compute is None:
        return None
    call.check_operands()
    with torch.no_grad(), disable_autocast(call.operands.features):
        blocks = recipe.make_blocks()
        if blocks is None:
            return None
        result = compute(blocks)
    call.log.reduced += 1
    recipe.find_original().has_selection |= func in SELECTIONS
    return result


def _operation_name(func: Any) -> str:
    return str(func.overloadpacket).removeprefix("aten.")


def function_name(func: Any) -> str:
    """Returns a function's name; for the getter of an attribute, the attribute's name."""
    name: str = getattr(func, "__name__", str(func))
    return func.__self__.__name__ if name == "__get__" else name


def get_grad_fn(x: Tensor) -> Any:
    """Returns `grad_fn` past the override that records its readers as observers."""
    with _torch.disable_torch_function():
        return x.grad_fn
