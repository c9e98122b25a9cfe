"""The transforms of state: calls that follow one another, and copies of a module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import torch

from torch_nnmath.testing._calls import compare_first_order, compute_gradients
from torch_nnmath.testing._case import Case
from torch_nnmath.testing._functions import make_module_function, nest_inputs
from torch_nnmath.testing._point import are_equal
from torch_nnmath.testing._report import NotApplicable, Wrong
from torch_nnmath.testing._transforms import transform


@transform("interleaved calls", quick=True)
def check_interleaved_calls(case: Case) -> None:
    """Checks the gradients of two calls at different points, in either order of backward."""
    for order in ((0, 1), (1, 0)):
        members = case.batch_members[:2]
        inputs = [member.make_leaves() for member in members]
        outputs = [member.call(*xs) for member, xs in zip(members, inputs, strict=True)]
        for i in order:
            gradients = compute_gradients(case, outputs[i], inputs[i])
            members[i].compare_gradient(gradients, case.upstream)


@transform("deepcopy")
def check_deepcopy(case: Case) -> None:
    """Checks that a module's deep copy has equal value and gradients, and shares no parameter."""
    _check_copy(case, copy.deepcopy)


@transform("pickle")
def check_pickle(case: Case) -> None:
    """Checks that a module restored from a pickle has equal value and gradients."""
    _check_copy(case, lambda module: pickle.loads(pickle.dumps(module)))


def _check_copy(case: Case, make_copy: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    if case.module is None:
        raise NotApplicable("a function, not a module")
    module = make_copy(case.module)
    state, copied_state = case.module.state_dict(), module.state_dict()
    if list(state) != list(copied_state) or not all(
        are_equal(state[name], copied_state[name]) for name in state
    ):
        raise Wrong("the copy has other parameters or buffers")
    if {id(p) for p in case.module.parameters()} & {id(p) for p in module.parameters()}:
        raise Wrong("the copy shares a parameter")
    names = case.names[: case.parameter_count]
    function = make_module_function(module, names, (case.dtype,))
    function = nest_inputs(function, case.nesting, case.parameter_count)
    xs = case.make_leaves()
    outputs = replace(case, function=function).call(*xs)
    compare_first_order(case, outputs, xs)
