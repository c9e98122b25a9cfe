"""How deferred tensors are computed.

A `Call` is where a computation starts: a call of a head, or a combination of deferred tensors. A
`Recipe` is the result of a call, or of a step on another recipe's tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath._precision import disable_autocast
from torch_nnmath.deferred.log import HeadLog, find_user_frame
from torch_nnmath.deferred.operands import Operands, is_freed, set_inference_mode
from torch_nnmath.deferred.optimizers import LIVE_CALLS, track_optimizers
from torch_nnmath.deferred.reductions import LogitBlocks
from torch_nnmath.deferred.steps import INDEXING, Operation, StepResult, aten, set_source
from torch_nnmath.deferred.wrappers import Hook


class Call:
    """The start of a computation, with the recipes of its result and of all steps on it.

    It can be computed as long as the tensors that it keeps have the versions of that time.
    """

    log: HeadLog
    probe: Tensor  # on the device of the logits
    term_dtypes: Collection[torch.dtype] = ()  # of the terms, if the logits are a sum
    depth = 0  # the longest chain of combinations from a head to this call

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}  # of the operands
        self.versions: list[tuple[Tensor, int, torch.Size]] = []
        self.recipes: list[weakref.ref[Recipe]] = []
        self.dependents: list[weakref.ref[Combination]] = []
        self.wrapper_hooks: list[Hook] = []  # of FSDP2, for the losses that bypass the logits
        self.is_materialized = False
        self.observer: str | None = None  # what first observed the logits' gradient
        self.has_fused_loss = False  # whether a loss bypassed the logits, which get no gradient
        track_optimizers()
        LIVE_CALLS.add(self)

    def record_version(self, operand: Tensor) -> None:
        self.versions.append((operand, _torch.get_version(operand), operand.shape))

    def has_freed_operand(self) -> bool:
        return any(is_freed(x, shape) for x, _, shape in self.versions)

    def check_operands(self) -> None:
        """Raises RuntimeError if an operand was freed or changed since the call."""
        if self.has_freed_operand():
            raise RuntimeError(
                f"the logits of head {self.log.name!r} are needed, but its parameters' memory has "
                "since been freed, as FSDP does after the forward, and ZeRO-3: compute the loss "
                "inside the wrapped model, keep the head's parameters "
                "(reshard_after_forward=False), read logits before backward, or "
                "swap(model, head=None)"
            )
        if any(_torch.get_version(x) != version for x, version, _ in self.versions):
            raise RuntimeError(
                f"the logits of head {self.log.name!r} are needed, but its features, weight or "
                "bias, or a scale, row or tensor applied to the logits, were changed in place "
                "since, as by an optimizer's step: read logits before that, or "
                "swap(model, head=None)"
            )

    def has_left_graph(self) -> bool:
        """Whether logits that left the graph are alive."""
        recipes = [reference() for reference in self.recipes]
        return any(recipe is not None and recipe.has_left_graph for recipe in recipes)

    def materialize(self, operation: str) -> None:
        """Computes the logits and the results of all steps on them that are still alive.

        Combinations of these results are computed, too, since the operation that needs the logits
        may change them in place.
        """
        if self.is_materialized:
            return
        self.check_operands()
        self.prepare(operation)
        if self.is_materialized:
            return  # `prepare` materialised an operand, and with it this dependent
        with torch.no_grad(), disable_autocast(self.probe):
            recipes = [r for reference in self.recipes if (r := reference()) is not None]
            selected = [(r, r.make_blocks()) for r in recipes if r.has_selection]
            for recipe in recipes:
                with torch.inference_mode(recipe.is_inference):
                    recipe.materialize()
            for recipe, blocks in selected:
                with torch.inference_mode(recipe.is_inference):
                    recipe.overwrite_by(blocks)
            for recipe in recipes:
                with torch.inference_mode(recipe.is_inference):
                    recipe.write_gathered()
        self.is_materialized = True
        self.release()
        for reference in self.dependents:
            dependent = reference()
            if dependent is not None:
                dependent.materialize(operation)
        self.recipes, self.versions, self.dependents = [], [], []

    def list_calls(self) -> list[Call]:
        """Returns this call and those that it depends on, each once."""
        calls: dict[int, Call] = {}
        waiting = [self]
        while waiting:
            call = waiting.pop()
            if id(call) not in calls:
                calls[id(call)] = call
                waiting += call.calls.values()
        return [*calls.values()]

    def prepare(self, operation: str) -> None:
        """Does what must precede the computation."""

    def compute(self) -> Tensor:
        """Returns the tensor that the steps start from."""
        raise NotImplementedError

    def release(self) -> None:
        """Drops the operands."""
        raise NotImplementedError


class HeadCall(Call):
    """One call of a head."""

    grad_fn: Any  # the node of the logits in the graph; None if they do not require grad
    is_training = False

    def __init__(self, operands: Operands):
        super().__init__()
        self.operands: Any = operands
        self.probe = operands.features
        for operand in operands.list_tensors():
            self.record_version(operand)

    def prepare(self, operation: str) -> None:
        reason = f"{self.observer or operation} at {find_user_frame()[1]}"
        is_training = self.is_training and self.grad_fn is not None
        self.log.count_materialization(reason, is_training=is_training)

    def compute(self) -> Tensor:
        logits: Tensor = self.operands.compute_logits()
        return logits

    def release(self) -> None:
        del self.probe
        self.operands = ()


class Combination(Call):
    """One elementwise operation on log-probabilities, probabilities or products of them.

    Its operands may come from several heads. In `args`, recipes take the place of deferred tensors.
    """

    args: Any

    def __init__(self, func: Any, kwargs: Any, recipes: list[Recipe], stack_axis: int):
        super().__init__()
        self.func, self.kwargs, self.stack_axis = func, kwargs, stack_axis
        self.calls = {id(recipe.call): recipe.call for recipe in recipes}
        self.depth = 1 + max(call.depth for call in self.calls.values())
        self.log, self.probe = recipes[0].call.log, recipes[0].form.probe
        for call in self.calls.values():
            call.dependents.append(weakref.ref(self))

    def list_operands(self) -> Any:
        """Returns the operands in the order of the nodes that they have in the graph."""
        if self.func is aten.stack.default:
            return self.args[0]
        return self.args[:1] if self.func is aten.logsumexp.default else self.args

    def prepare(self, operation: str) -> None:
        for call in [*self.calls.values()]:
            call.materialize(self.observer or operation)

    def compute(self) -> Tensor:
        def read(argument: Any) -> Any:
            return argument.tensor if isinstance(argument, Recipe) else argument

        result: Tensor = self.func(*_torch.tree_map(read, self.args), **self.kwargs)
        return result

    def release(self) -> None:
        self.args, self.calls = (), {}


def capture_operand(operand: Any, call: Call) -> Any:
    """Returns an operand for later use.

    A tensor is copied. If a gradient may reach it, it is returned itself and its version is
    recorded.
    """
    if isinstance(operand, list | tuple):
        return [capture_operand(v, call) for v in operand]
    if not isinstance(operand, Tensor):
        return operand
    if not operand.requires_grad or operand.is_inference():
        with torch.no_grad(), set_inference_mode(False):
            copy = operand.clone()
        if not operand.is_inference():
            set_source(copy, operand)
        return copy
    call.record_version(operand)
    return operand


class Recipe:
    """How to compute one deferred tensor: by the head's affine map, or by a step on its parent.

    After `materialize`, `tensor` has the values, and the parent is released. It is an inference
    tensor if the deferred tensor is one. `factor` is the second factor of a product.
    """

    is_inference = False
    has_selection = False  # whether a reduction returned some of these logits
    has_left_graph = False  # by `detach`: its user may read it after the weights have changed

    def __init__(
        self,
        call: Any,
        result: StepResult,
        parent: Recipe | None = None,
        operation: Operation | None = None,
        factor: Recipe | None = None,
    ):
        self.factor = factor
        self.call, self.result, self.parent, self.operation = call, result, parent, operation
        self.form, self.layout = result.form, result.layout
        self.tensor: Tensor | None = None
        self.gathered: list[tuple[Tensor, Tensor]] = []  # classes, and logits that users have
        call.recipes.append(weakref.ref(self))

    def materialize(self) -> None:
        if self.parent is None or self.operation is None:
            self.tensor = self.call.compute()
            return
        assert self.parent.tensor is not None
        operation = self.operation
        if self.factor is not None:
            operation = operation._replace(args=(None, self.factor.tensor))
        tensor = operation.apply(self.parent.tensor)
        self.tensor = tensor.contiguous() if operation.func in INDEXING else tensor
        self.parent = self.operation = self.factor = None

    def make_blocks(self) -> LogitBlocks | None:
        """Returns these logits as blocks; None if a step treats rows differently."""
        steps = [step.result for step in self.list_steps()]
        if any(step.apply_to_rows is None and step.apply_to_values is None for step in steps):
            return None
        operands = self.call.operands.round_weight()
        features = operands.features
        for step in steps:
            features = features if step.apply_to_rows is None else step.apply_to_rows(features)
        features = features.movedim(self.form.axis, -1).reshape(-1, operands.weight.shape[1])
        value_steps = [step.apply_to_values for step in steps if step.apply_to_values is not None]
        return LogitBlocks(operands._replace(features=features), value_steps)

    def overwrite_by(self, blocks: LogitBlocks | None) -> None:
        """Overwrites the logits by those of the blocks, of which a reduction has returned some.

        The product of all rows may be rounded differently from that of a block.
        """
        assert self.tensor is not None
        assert blocks is not None
        logits = self.tensor.movedim(self.form.axis, -1)
        logits.copy_(torch.cat(blocks.map(lambda _, values: values)).view(logits.shape))

    def write_gathered(self) -> None:
        """Overwrites the logits that a fused head has returned, as `overwrite_by` does."""
        assert self.tensor is not None
        for index, values in self.gathered:
            self.tensor.scatter_(self.form.axis, index, values)
        self.gathered = []

    def leave_graph(self) -> None:
        """Marks this recipe and the operands that it needs."""
        if self.has_left_graph:
            return
        self.has_left_graph = True
        if isinstance(self.call, Combination):
            for v in _torch.tree_leaves(self.call.args):
                if isinstance(v, Recipe):
                    v.leave_graph()

    def find_original(self) -> Recipe:
        """Returns the recipe that this one is an alias of; it may live longer."""
        recipe = self
        while recipe.parent is not None and recipe.operation is not None:
            if recipe.operation.func not in (aten.alias.default, aten.detach.default):
                break
            recipe = recipe.parent
        return recipe

    def list_changes_of_logits(self) -> list[Recipe]:
        """Returns the steps without the softmax and those that change its sign or logarithm."""
        return [
            step
            for step in self.list_steps()
            if step.parent is None
            or step.form.is_logits
            or (step.form.log_sign, step.form.softmax_sign)
            == (step.parent.form.log_sign, step.parent.form.softmax_sign)
        ]

    def list_steps(self) -> list[Recipe]:
        """Returns the recipes from the first one after the head to this one."""
        recipes, recipe = [], self
        while recipe.parent is not None:
            recipes.append(recipe)
            recipe = recipe.parent
        return recipes[::-1]
