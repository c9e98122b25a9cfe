"""Deferred logits -> arguments of the fused head, if the graph has only the recorded steps."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from torch_nnmath._head import Head, LogitChanges, make_any_class, prepare_head
from torch_nnmath._logits import LogitOptions
from torch_nnmath._precision import wide_type
from torch_nnmath._target import TargetOptions
from torch_nnmath.deferred.logits import DeferredLogits, get_grad_fn, is_traced
from torch_nnmath.deferred.recipes import Recipe
from torch_nnmath.deferred.steps import Layout
from torch_nnmath.kernels.dispatch import has_dtensor

if TYPE_CHECKING:
    from torch_nnmath._sharding import Sharding

DEFAULT_TARGET_OPTIONS, DEFAULT_LOGIT_OPTIONS = TargetOptions(), LogitOptions()


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
        """How ranks share the classes; None if they do not."""
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


# From deferred logits


def find_obstacle(logits: DeferredLogits) -> str | None:
    """Returns the reason why a loss may not bypass the graph between it and the head, if any.

    The graph must consist of exactly the recorded steps: the loss would skip a user's Function or
    a checkpoint among them.
    """
    call = logits.recipe.call
    if call.observer or not (torch.is_grad_enabled() and logits.requires_grad):
        return call.observer
    if logits.is_leaf:
        return "requires_grad_ of logits"
    return find_foreign_node(logits.recipe, get_grad_fn(logits))


def find_foreign_node(recipe: Recipe, node: Any) -> str | None:
    """Names the first node, from this one to the head, that the recipe has no step for."""
    while recipe.parent is not None:
        operation = recipe.operation
        assert operation is not None
        if not is_node_of(node, operation.func):
            node_name = "nothing" if node is None else node.name()
            return f"{node_name} stands between head and loss, where {operation.func} was expected"
        if recipe.factor is not None:
            obstacle = find_foreign_node(recipe.factor, node.next_functions[1][0])
            if obstacle is not None:
                return obstacle
        node = node.next_functions[operation.position][0]
        recipe = recipe.parent
    if node is not recipe.call.grad_fn:
        return f"{'nothing' if node is None else node.name()} stands between head and loss"
    return None


def is_node_of(node: Any, func: Any) -> bool:
    """Whether a node of the graph is the one that PyTorch makes for an operation."""
    if node is None or isinstance(node, BackwardCFunction):
        return False
    name = func.overloadpacket.__name__.replace("_", "")
    return bool(re.sub(r"Backward\d+$", "", node.name()).lower() == name)


def make_rows(logits: DeferredLogits, *, is_log: bool, axis: int, is_product: bool = False) -> Any:
    """Returns the `HeadRows` of a loss over the classes at `axis`, of logits or log-probabilities.

    With `is_product`, the loss is of their product with the probabilities. Returns NotImplemented
    if the classes are at another axis, or for values of another form; also, after materialising
    the logits, if there is an obstacle between head and loss.
    """
    recipe, form = logits.recipe, logits.recipe.form
    call = recipe.call
    is_axis_of_classes = axis in (form.axis, form.axis - logits.dim())
    is_form_of_loss = bool(form.log_sign) == is_log and is_axis_of_classes
    is_form_of_loss &= bool(form.softmax_sign) == form.is_product == is_product
    is_form_of_loss &= not form.kinds
    if call.is_materialized or is_traced() or not is_form_of_loss:
        return NotImplemented
    obstacle = find_obstacle(logits)
    if obstacle is not None:
        call.materialize(obstacle)
        return NotImplemented
    return build_rows(recipe, recipe.list_steps(), recipe.layout, logits.requires_grad)


def build_rows(recipe: Recipe, steps: Sequence[Recipe], layout: Layout, requires_grad: bool) -> Any:
    """Returns the `HeadRows` of a result of a head after these steps, or NotImplemented.

    The layout is that after the last step; the form of the values is the recipe's. Without
    `requires_grad`, what the logits were computed from is detached. In inference mode nothing is,
    since there is no graph, and DTensors cannot be.
    """
    call, form, axis = recipe.call, recipe.form, (steps[-1] if steps else recipe).form.axis
    call.check_operands()

    def detach_unless(has_gradient: bool, value: Any) -> Any:
        return value if has_gradient or not isinstance(value, Tensor) else value.detach()

    is_inference = torch.is_inference_mode_enabled()
    detach = functools.partial(detach_unless, is_inference or requires_grad)
    has_head_gradient = requires_grad and call.grad_fn is not None
    detach_operand = functools.partial(detach_unless, is_inference or has_head_gradient)
    features, weight, bias, weight_dtype = map(detach_operand, call.operands)
    if layout.dtype == torch.float64 and features.dtype != torch.float64:
        weight = weight if weight_dtype is None else weight.to(weight_dtype)
        features, weight, weight_dtype = features.double(), weight.double(), None
        bias = None if bias is None else bias.double()
    rows, row_scale = _apply_steps(steps, features, detach)
    for x, width in ((rows, features.shape[-1]), (row_scale, 1)):
        shape = [width if d == axis else size for d, size in enumerate(layout.shape)]
        if x is not None and [*x.shape] != shape:
            return NotImplemented  # a step had another effect on the features than on the logits
    scale, softcap = detach(form.scale.evaluate(layout.dtype)), None
    if form.inner_scale is not None:  # t tanh(s z) = |t| tanh((s t) z / |t|)
        softcap = abs(scale)
        inner_scale = form.inner_scale.multiply(form.scale.numerator, form.scale.denominator)
        scale = detach(inner_scale.evaluate(layout.dtype))
    row = [detach(r).flatten().to(wide_type(weight.dtype)) for r in form.row]
    return HeadRows(
        rows.movedim(axis, -1),
        weight,
        bias,
        scale,
        softcap,
        layout.dtype,
        sum(row) if row else None,
        None if row_scale is None else row_scale.movedim(axis, -1),
        weight_dtype,
    )


def _apply_steps(
    steps: Sequence[Recipe], features: Tensor, detach: Callable[[Any], Any]
) -> tuple[Tensor, Tensor | None]:
    """Applies the recorded steps to the features, and to the scales of their rows."""
    rows, row_scale = features, None
    for recipe in steps:
        apply = recipe.result.apply_to_rows
        if apply is not None:
            rows = apply(rows)
            row_scale = None if row_scale is None else apply(row_scale)
        if recipe.result.compute_row_scale is not None:
            factor = detach(recipe.result.compute_row_scale())
            row_scale = factor if row_scale is None else row_scale * factor
    return rows, row_scale
