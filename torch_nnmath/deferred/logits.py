"""Deferred logits: the tensor, its dispatch, and the calls of a head that create it."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_nnmath import _torch, formulas
from torch_nnmath import functional as F
from torch_nnmath._precision import cast_for_product, disable_autocast
from torch_nnmath.deferred.log import HeadLog, find_user_frame
from torch_nnmath.deferred.mark import get_head_log
from torch_nnmath.deferred.steps import (
    INDEXING,
    STEPS,
    Form,
    Operation,
    Rule,
    StepResult,
    aten,
    make_packed_layout,
)
from torch_nnmath.kernels.dispatch import PLAIN_TYPES

# The calls of a head


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, module: Module) -> Tensor:
    """F1 with deferred logits where they can be deferred; otherwise `functional.linear`.

    `module` is the head; its mark is a `HeadLog`. Where Dynamo may break its graph, it does so at
    this call, and compiles what comes before and after it.
    """
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        from torch_nnmath.deferred.compiled import linear_between_graphs, log_unbroken_graph

        if _torch.may_break_graph():
            return linear_between_graphs(input, weight, bias, module)
        log_unbroken_graph(module)
    if torch.compiler.is_compiling() or not _are_plain_and_untraced(input, weight, bias):
        return F.linear(input, weight, bias)
    log = get_head_log(module)
    assert log is not None
    if _torch.has_forward_hooks(module):
        is_training = module.training and torch.is_grad_enabled()
        log.count_materialization("by forward hooks of the head", is_training=is_training)
        return F.linear(input, weight, bias)
    # Autocast's cast belongs here: the loss may be computed outside of the autocast region.
    operands = cast_for_product(input, weight, bias)
    if not _are_operands_of_head(*operands):
        return F.linear(input, weight, bias)
    logits = DeferredAffine.evaluate(*operands)
    call = logits.recipe.call
    call.log, call.grad_fn, call.is_training = log, get_grad_fn(logits), module.training
    return logits


def _are_plain_and_untraced(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors with values, and no transform or tracer is active."""
    if _torch.is_transformed() or torch.is_inference_mode_enabled() or is_traced():
        return False
    given_tensors = [x for x in tensors if x is not None]
    return all(
        type(x) in PLAIN_TYPES and not x.is_meta and not x.is_inference() for x in given_tensors
    )


def is_traced() -> bool:
    """Whether a tracer records operations. It must record those of plain logits."""
    return _torch.is_jit_tracing() or _torch.is_fx_tracing()


def _are_operands_of_head(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product is defined and has rows and several classes.

    If it is undefined, `functional.linear` raises PyTorch's error.
    """
    operands = [features, weight] if bias is None else [features, weight, bias]
    return (
        len({(x.dtype, x.device) for x in operands}) == 1
        and features.is_floating_point()
        and features.dim() > 0
        and features.numel() > 0
        and weight.dim() == 2
        and features.shape[-1] == weight.shape[1]
        and weight.shape[0] > 1
    )


class DeferredAffine(formulas.Affine):
    """F1 with a forward that returns deferred logits; the backward is F8."""

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        form = Form(x.dim() - 1, x.new_empty((*x.shape[:-1], 0)), has_bias=b is not None)
        layout = make_packed_layout((*x.shape[:-1], W.shape[0]), x.dtype)
        return DeferredLogits(Recipe(HeadCall(x, W, b), StepResult(form, layout)))


class HeadCall:
    """One call of a head: its operands, and the recipes of its logits and of all steps on them.

    The operands' versions tell whether the logits can still be computed: each must be unchanged.
    """

    log: HeadLog
    grad_fn: Any  # the node of the logits in the graph; None if they do not require grad
    is_training = False

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor | None):
        self.operands: Any = features, weight, bias
        self.versions: list[tuple[Tensor, int]] = []
        self.recipes: list[weakref.ref[Recipe]] = []
        self.is_materialized = False
        self.observer: str | None = None  # what first observed the logits' gradient
        self.has_fused_loss = False  # whether a loss bypassed the logits, which get no gradient
        for operand in self.operands:
            if operand is not None:
                self.record_version(operand)
        if not _LIVE_CALLS:
            _track_fused_optimizers()
        _LIVE_CALLS.add(self)

    def record_version(self, operand: Tensor) -> None:
        self.versions.append((operand, _torch.get_version(operand)))

    def check_operands(self) -> None:
        """Raises RuntimeError if an operand was freed or changed since the call."""
        if any(x.untyped_storage().nbytes() == 0 for x, _ in self.versions if x.numel()):
            raise RuntimeError(
                f"the logits of head {self.log.name!r} are needed, but its parameters' memory has "
                "since been freed, as FSDP does after the forward: compute the loss inside the "
                "wrapped model, keep the head's parameters (reshard_after_forward=False), read "
                "logits before backward, or swap(model, head=None)"
            )
        if any(_torch.get_version(x) != version for x, version in self.versions):
            raise RuntimeError(
                f"the logits of head {self.log.name!r} are needed, but its features, weight or "
                "bias, or a scale or row applied to the logits, were changed in place since, as by "
                "an optimizer's step: read logits before that, or swap(model, head=None)"
            )

    def materialize(self, operation: str) -> None:
        """Computes the logits and the results of all steps on them that are still alive."""
        if self.is_materialized:
            return
        self.check_operands()
        reason = f"{self.observer or operation} at {find_user_frame()[1]}"
        is_training = self.is_training and self.grad_fn is not None
        self.log.count_materialization(reason, is_training=is_training)
        features, weight, bias = self.operands
        with torch.inference_mode(False), torch.no_grad(), disable_autocast(features):
            for reference in self.recipes:
                recipe = reference()
                if recipe is not None and recipe.tensor is None:
                    recipe.materialize(features, weight, bias)
        self.is_materialized = True
        self.operands, self.recipes, self.versions = (), [], []


_LIVE_CALLS: weakref.WeakSet[HeadCall] = weakref.WeakSet()


@functools.cache
def _track_fused_optimizers() -> None:
    """Makes each optimizer step increment the versions of the operands of live calls.

    Fused optimizers change parameters without incrementing their versions.
    """

    def increment_versions(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        operand_ids = {id(x) for call in _LIVE_CALLS for x, _ in call.versions}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.autograd.graph.increment_version([p for p in parameters if id(p) in operand_ids])

    register_optimizer_step_post_hook(increment_versions)


class Recipe:
    """How to compute one deferred tensor: by the head's affine map, or by a step on its parent.

    After `materialize`, `tensor` has the values, and the parent is released.
    """

    def __init__(
        self,
        call: HeadCall,
        result: StepResult,
        parent: Recipe | None = None,
        operation: Operation | None = None,
    ):
        self.call, self.result, self.parent, self.operation = call, result, parent, operation
        self.form, self.layout = result.form, result.layout
        self.tensor: Tensor | None = None
        call.recipes.append(weakref.ref(self))

    def materialize(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if self.parent is None or self.operation is None:
            self.tensor = torch.nn.functional.linear(features, weight, bias)
            return
        assert self.parent.tensor is not None
        tensor = self.operation.apply(self.parent.tensor)
        self.tensor = tensor.contiguous() if self.operation.func in INDEXING else tensor
        self.parent = self.operation = None

    def list_steps(self) -> list[Recipe]:
        """Returns the recipes from the first one after the head to this one."""
        recipes, recipe = [], self
        while recipe.parent is not None:
            recipes.append(recipe)
            recipe = recipe.parent
        return recipes[::-1]


# The tensor


class DeferredLogits(Tensor):
    """Logits without memory, until an operation needs their values."""

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe: Recipe) -> DeferredLogits:
        if torch.is_inference_mode_enabled():  # a view must have a version counter if its base has
            with torch.inference_mode(False):
                return DeferredLogits(recipe)
        layout = recipe.layout
        logits: DeferredLogits = _torch.make_wrapper(
            cls,
            layout.shape,
            strides=layout.stride,
            storage_offset=layout.offset,
            dtype=layout.dtype,
            device=recipe.form.probe.device,
        )
        logits.recipe = recipe
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
    if func in FACTORIES:
        logits = args[0]
        template = torch.empty(0, dtype=logits.dtype, device=logits.device)
        return func(template, *args[1:], **kwargs)
    if torch.Tag.inplace_view in func.tags:
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
    if len(positions) != 1 or any(isinstance(v, DeferredLogits) for v in kwargs.values()):
        return None
    (position,) = positions
    recipe = args[position].recipe
    call, form, layout = recipe.call, recipe.form, recipe.layout
    if call.is_materialized or is_traced():
        return None
    class_count = layout.shape[form.axis]
    row_count = math.prod(layout.shape) // class_count
    operands = [v for v in _torch.tree_leaves(args) if isinstance(v, Tensor)]
    for operand in operands:
        if operand is not args[position] and operand.numel() > max(class_count, row_count):
            return None  # larger than a row or a column: too large to be copied
    captured_args = [
        None if i == position else _capture_operand(v, call) for i, v in enumerate(args)
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
        if torch.promote_types(dtype, layout.dtype) != dtype:
            return None  # a cast to a narrower dtype rounds
        step = operation._replace(output=i) if has_several_outputs else operation
        outputs.append(DeferredLogits(Recipe(call, result, recipe, step)))
    return outputs if has_several_outputs else outputs[0]


def _capture_operand(operand: Any, call: HeadCall) -> Any:
    """Returns an operand for later use.

    A tensor is copied. If it requires grad, it is returned itself and its version is recorded.
    """
    if isinstance(operand, list | tuple):
        return [_capture_operand(v, call) for v in operand]
    if not isinstance(operand, Tensor):
        return operand
    if not operand.requires_grad:
        return operand.clone()
    call.record_version(operand)
    return operand


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
