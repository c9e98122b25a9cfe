"""Losses of deferred logits that call the fused head instead of computing the logits."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from torch_nnmath import _check as check
from torch_nnmath import functional as F
from torch_nnmath._head import Head, LogitChanges, make_any_class, prepare_head
from torch_nnmath._logits import LogitOptions, is_scaled, read_logit_options
from torch_nnmath._precision import disable_autocast, is_autocast, wide_type, widen
from torch_nnmath._target import TargetOptions
from torch_nnmath.deferred.logits import (
    DeferredLogits,
    Recipe,
    get_grad_fn,
    is_traced,
    register_override,
)
from torch_nnmath.deferred.wrappers import move_hooks
from torch_nnmath.kernels.dispatch import has_dtensor

if TYPE_CHECKING:
    from torch_nnmath._sharding import Sharding

DEFAULT_TARGET_OPTIONS, DEFAULT_LOGIT_OPTIONS = TargetOptions(), LogitOptions()

# The fused head


class HeadRows(NamedTuple):
    """The arguments of the fused head that take the place of deferred logits."""

    features: Tensor  # (*, in_features), in the order of the logits' axes without the classes
    weight: Tensor
    bias: Tensor | None
    scale: Any
    softcap: float | None
    dtype: torch.dtype  # of the logits
    row: Tensor | None  # added to each row of logits
    row_scale: Tensor | None  # (*, 1), a scale for each row
    weight_dtype: torch.dtype | None  # to which autocast rounded the weight

    @property
    def sharding(self) -> Sharding | None:
        """How ranks share the classes, if they do."""
        if not has_dtensor(self.weight):
            return None
        from torch_nnmath.deferred import split

        return split.make_sharding(self.weight, self.features.shape[:-1])

    def prepare_head(
        self,
        target: Tensor,
        target_options: TargetOptions = DEFAULT_TARGET_OPTIONS,
        logit_options: LogitOptions = DEFAULT_LOGIT_OPTIONS,
    ) -> Head:
        """Returns the fused head for a target, with the options of the loss."""
        base, scale, softcap = logit_options
        return prepare_head(
            self.features,
            self.weight,
            target,
            self.bias,
            target_options,
            LogitOptions(base, self.scale * scale, self.softcap if softcap is None else softcap),
            LogitChanges(self.dtype, self.row, self.row_scale, self.weight_dtype, self.sharding),
        )

    def prepare_head_of_any_class(
        self, target_options: TargetOptions = DEFAULT_TARGET_OPTIONS
    ) -> Head:
        """Returns the fused head for a value that does not depend on the target."""
        target = make_any_class(self.features, self.weight)
        return self.prepare_head(target, target_options)


# Arguments of the fused head, from deferred logits


def find_obstacle(logits: DeferredLogits) -> str | None:
    """Returns the reason why a loss may not bypass the graph between it and the head, if any.

    The graph must consist of exactly the recorded steps: the loss would skip a Function or a
    checkpoint between them.
    """
    call = logits.recipe.call
    if call.observer or not (torch.is_grad_enabled() and logits.requires_grad):
        return call.observer
    if logits.is_leaf:
        return "requires_grad_ of logits"
    return _find_foreign_node(logits.recipe, get_grad_fn(logits))


def _find_foreign_node(recipe: Recipe, node: Any) -> str | None:
    """Names the first node of the graph, from this one to the head, that is of no step."""
    while recipe.parent is not None:
        operation = recipe.operation
        assert operation is not None
        if not _is_node_of(node, operation.func):
            node_name = "nothing" if node is None else node.name()
            return f"{node_name} stands between head and loss, where {operation.func} was expected"
        if recipe.factor is not None:
            obstacle = _find_foreign_node(recipe.factor, node.next_functions[1][0])
            if obstacle is not None:
                return obstacle
        node = node.next_functions[operation.position][0]
        recipe = recipe.parent
    if node is not recipe.call.grad_fn:
        return f"{'nothing' if node is None else node.name()} stands between head and loss"
    return None


def _is_node_of(node: Any, func: Any) -> bool:
    """Whether a node of the graph is the one that PyTorch makes for an operation."""
    if node is None or isinstance(node, BackwardCFunction):
        return False
    name = func.overloadpacket.__name__.replace("_", "")
    return bool(re.sub(r"Backward\d+$", "", node.name()).lower() == name)


def make_rows(logits: DeferredLogits, *, is_log: bool, axis: int, is_product: bool = False) -> Any:
    """Returns the `HeadRows` of a loss over the classes at `axis`, of logits or log-probabilities.

    With `is_product`, of their product with the probabilities. Returns NotImplemented if the
    classes are at another axis, or for values of another form; also, after materialising the
    logits, if the graph has an obstacle between head and loss.
    """
    recipe, form = logits.recipe, logits.recipe.form
    call = recipe.call
    is_form_of_loss = bool(form.log_sign) == is_log and form.axis == axis % logits.dim()
    is_form_of_loss &= bool(form.softmax_sign) == form.is_product == is_product
    if call.is_materialized or is_traced() or not is_form_of_loss:
        return NotImplemented
    obstacle = find_obstacle(logits)
    if obstacle is not None:
        call.materialize(obstacle)
        return NotImplemented
    call.check_operands()

    def detach_unless(has_gradient: bool, value: Any) -> Any:
        return value if has_gradient or not isinstance(value, Tensor) else value.detach()

    # If the logits do not require grad, no gradient may reach what they were computed from. In
    # inference mode none can, and DTensors cannot be detached.
    is_inference = torch.is_inference_mode_enabled()
    detach = functools.partial(detach_unless, is_inference or logits.requires_grad)
    has_head_gradient = logits.requires_grad and call.grad_fn is not None
    detach_operand = functools.partial(detach_unless, is_inference or has_head_gradient)
    features, weight, bias, weight_dtype = map(detach_operand, call.operands)
    if logits.dtype == torch.float64 and features.dtype != torch.float64:
        weight = weight if weight_dtype is None else weight.to(weight_dtype)
        features, weight, weight_dtype = features.double(), weight.double(), None
        bias = None if bias is None else bias.double()
    rows, row_scale = _apply_steps(logits, features, detach)
    for x, width in ((rows, features.shape[-1]), (row_scale, 1)):
        shape = [width if d == form.axis else size for d, size in enumerate(logits.shape)]
        if x is not None and [*x.shape] != shape:
            return NotImplemented  # a step had another effect on the features than on the logits
    scale, softcap = detach(form.scale.evaluate(logits.dtype)), None
    if form.inner_scale is not None:  # t tanh(s z) = |t| tanh((s t) z / |t|)
        softcap = abs(scale)
        inner_scale = form.inner_scale.multiply(form.scale.numerator, form.scale.denominator)
        scale = detach(inner_scale.evaluate(logits.dtype))
    row = [detach(r).flatten().to(wide_type(weight.dtype)) for r in form.row]
    return HeadRows(
        rows.movedim(form.axis, -1),
        weight,
        bias,
        scale,
        softcap,
        logits.dtype,
        sum(row) if row else None,
        None if row_scale is None else row_scale.movedim(form.axis, -1),
        weight_dtype,
    )


def _apply_steps(
    logits: DeferredLogits, features: Tensor, detach: Callable[[Any], Any]
) -> tuple[Tensor, Tensor | None]:
    """Applies the recorded steps to the features, and to the scales of their rows."""
    rows, row_scale = features, None
    for recipe in logits.recipe.list_steps():
        apply = recipe.result.apply_to_rows
        if apply is not None:
            rows = apply(rows)
            row_scale = None if row_scale is None else apply(row_scale)
        if recipe.result.compute_row_scale is not None:
            factor = detach(recipe.result.compute_row_scale())
            row_scale = factor if row_scale is None else row_scale * factor
    return rows, row_scale


# The losses


def register_loss(*functions: Any) -> Callable[..., Any]:
    """Registers a rule that computes these functions without logits.

    The rule gets the function, the deferred logits, whether autocast is on and the function's other
    arguments. It runs without autocast, since the head has cast the operands of the product
    already. It returns NotImplemented if the function needs the logits.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        @register_override(*functions)
        @functools.wraps(rule)
        def loss(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(input, DeferredLogits):
                return NotImplemented
            is_loss_autocast = is_autocast(input)
            with disable_autocast(input):
                result = rule(func, input, is_loss_autocast, *args, **kwargs)
            if result is not NotImplemented:
                call = input.recipe.call
                call.log.fused += 1
                call.has_fused_loss |= torch.is_grad_enabled() and input.requires_grad
                move_hooks(call.wrapper_hooks, result)
            return result

        return loss

    return register


@dataclass
class CrossEntropyArguments:
    """The arguments of `cross_entropy` after the logits: PyTorch's, then this library's.

    Those of `nll_loss` are the first six.
    """

    target: Any
    weight: Tensor | None = None
    size_average: bool | None = None
    ignore_index: int = -100
    reduce: bool | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0
    _: KW_ONLY
    row_weight: Tensor | None = None
    base: float = torch.e
    logit_scale: Any = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    z_loss: float = 0.0
    return_stats: bool = False
    output_dtype: torch.dtype | None = None

    def read_logit_options(self) -> LogitOptions:
        return read_logit_options(self.base, self.logit_scale, self.softcap, self.temperature)


@register_loss(torch.nn.functional.cross_entropy, F.cross_entropy, torch.nn.functional.nll_loss)
def cross_entropy(
    func: Any, input: DeferredLogits, is_loss_autocast: bool, *args: Any, **kwargs: Any
) -> Any:
    """F14, F15: `cross_entropy` of logits, or `nll_loss` of log-probabilities."""
    arguments = CrossEntropyArguments(*args, **kwargs)
    target, weight, is_log = (
        arguments.target,
        arguments.weight,
        func is torch.nn.functional.nll_loss,
    )
    form, axis = input.recipe.form, min(input.dim() - 1, 1)
    is_plain_target = isinstance(target, Tensor) and not isinstance(target, DeferredLogits)
    if not is_plain_target or form.log_sign < 0:
        return NotImplemented
    options = arguments.read_logit_options()
    if form.is_capped and (options.cap is not None or is_scaled(options.scale)):
        return NotImplemented
    is_distribution = target.shape == input.shape and target.is_floating_point()
    if is_distribution and not is_log:
        check.probabilities(target, arguments.ignore_index)
        target = target.movedim(axis, -1)
    elif target.shape != form.rows_shape or target.dtype not in (torch.int64, torch.uint8):
        return NotImplemented
    rows = make_rows(input, is_log=is_log, axis=axis)
    if rows is NotImplemented:
        return NotImplemented
    if is_loss_autocast:
        rows = rows._replace(dtype=wide_type(rows.dtype))
        target, weight = widen(target), None if weight is None else widen(weight)
    ignore_index = None if is_distribution else arguments.ignore_index
    head = rows.prepare_head(
        target,
        TargetOptions(weight, ignore_index, arguments.label_smoothing, arguments.row_weight),
        options,
    ).with_output_dtype(arguments.output_dtype)
    reduction = check.resolve_reduction(
        arguments.reduction, arguments.size_average, arguments.reduce
    )
    return head.compute_loss(reduction, arguments.z_loss, arguments.return_stats)


@register_loss(torch.gather, Tensor.gather)
def gather(
    func: Any, input: DeferredLogits, is_loss_autocast: bool, dim: Any, index: Any, **kwargs: Any
) -> Any:
    """One class of each row: F22 for log-probabilities, F1 for logits."""
    form, axis = input.recipe.form, input.recipe.form.axis
    if (
        form.softmax_sign
        or not isinstance(index, Tensor)
        or index.dtype != torch.int64
        or "out" in kwargs
    ):
        return NotImplemented
    if [*index.shape] != [1 if d == axis else size for d, size in enumerate(input.shape)]:
        return NotImplemented
    rows = make_rows(input, is_log=bool(form.log_sign), axis=dim)
    if rows is NotImplemented:
        return NotImplemented
    try:
        ignore_nothing = TargetOptions(ignore_index=torch.iinfo(torch.int64).min)
        head = rows.prepare_head(index.squeeze(axis), ignore_nothing)
    except IndexError:  # an index out of range, for which `gather` raises a RuntimeError
        return NotImplemented
    result = (
        form.log_sign * head.compute_log_probs(False)
        if form.log_sign
        else head.compute_class_logits()
    )
    result = result.to(input.dtype).unsqueeze(axis)
    input.recipe.find_original().gathered.append((index.clone(), result.detach().clone()))
    return result


MEANS = (torch.mean, Tensor.mean)


@register_loss(torch.sum, Tensor.sum, *MEANS)
def sum_over_classes(
    func: Any,
    input: DeferredLogits,
    is_loss_autocast: bool,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    **kwargs: Any,
) -> Any:
    """The sum or mean over the classes of log-probabilities, or of their expectation's terms.

    The former is a cross entropy whose target has the same probability for every class. The latter
    is the negated entropy (F21), or for terms of logits the log-sum-exp minus the entropy.
    """
    form, axis, dtype = input.recipe.form, _get_only_axis(dim), dtype or input.dtype
    if kwargs or axis is None or torch.promote_types(dtype, input.dtype) != dtype:
        return NotImplemented
    is_log = bool(form.log_sign) or not form.is_product
    rows = make_rows(input, is_log=is_log, axis=axis, is_product=form.is_product)
    if rows is NotImplemented:
        return NotImplemented
    rows, class_count = rows._replace(dtype=dtype), input.shape[form.axis]
    if form.is_product:
        expectation = rows.prepare_head_of_any_class().compute_expectation(is_log)
        sign = form.softmax_sign * (form.log_sign or 1)
        result = sign * expectation.to(dtype) / (class_count if func in MEANS else 1)
    else:
        head = rows.prepare_head_of_any_class(TargetOptions(label_smoothing=1.0))
        factor = -form.log_sign * (1 if func in MEANS else class_count)
        result = factor * head.compute_loss("none", 0.0, False).to(dtype)
    return result.unsqueeze(form.axis) if keepdim else result


@register_loss(torch.logsumexp, torch.special.logsumexp, Tensor.logsumexp)
def log_sum_exp(
    func: Any,
    input: DeferredLogits,
    is_loss_autocast: bool,
    dim: Any,
    keepdim: bool = False,
    **kwargs: Any,
) -> Any:
    """The log-sum-exp over the classes, the logarithm of F7's denominator."""
    form, axis = input.recipe.form, _get_only_axis(dim)
    if kwargs or axis is None or (is_loss_autocast and input.dtype.itemsize < 4):
        return NotImplemented  # autocast's dtype for half-precision logits depends on the device
    rows = make_rows(input, is_log=False, axis=axis)
    if rows is NotImplemented:
        return NotImplemented
    result = rows.prepare_head_of_any_class().compute_log_sum_exp().to(input.dtype)
    return result.unsqueeze(form.axis) if keepdim else result


def _get_only_axis(dim: Any) -> int | None:
    axes = dim if isinstance(dim, list | tuple) else [dim]
    return axes[0] if len(axes) == 1 and isinstance(axes[0], int) else None
