"""Functions as the checker calls them: of flat inputs, and with flat outputs of real tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from torch_nnmath import _torch

Tensors = tuple[Tensor, ...]


def make_module_function(
    module: torch.nn.Module, parameter_names: Sequence[str], dtypes: Sequence[torch.dtype]
) -> Callable[..., Any]:
    """Returns the module as a function of the named parameters, then of its inputs.

    It holds a copy of the other parameters and of the buffers for each dtype, and uses that of its
    first real argument. Each call starts from the same buffers.
    """
    states = {}
    for dtype in dtypes:
        states[dtype, False] = state = copy_state(module, parameter_names, dtype)
        states[dtype, True] = {name: x.to("meta") for name, x in state.items()}
    buffer_names = {name for name, _ in module.named_buffers()}
    count = len(parameter_names)

    def call(*inputs: Any) -> Any:
        key = next((x.dtype, x.is_meta) for x in inputs if is_real_tensor(x))
        state = {name: x.clone() if name in buffer_names else x for name, x in states[key].items()}
        parameters = dict(zip(parameter_names, inputs[:count], strict=True))
        return functional_call(module, {**state, **parameters}, inputs[count:])

    return call


def copy_state(
    module: torch.nn.Module, parameter_names: Sequence[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns copies of the module's buffers, and of its parameters except for the named ones."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: x.detach().to(dtype, copy=True) if is_real_tensor(x) else x.detach().clone()
        for name, x in state.items()
        if name not in parameter_names
    }


def nest_inputs(
    function: Callable[..., Any], nesting: Any, parameter_count: int
) -> Callable[..., Any]:
    """Returns the function with its inputs flattened, after the parameters.

    `nesting` has the structure of the inputs; its leaves are their positions.
    """
    if all(isinstance(i, int) for i in nesting):
        return function

    def call(*leaves: Any) -> Any:
        inputs = leaves[parameter_count:]
        nested_inputs = _torch.tree_map(lambda i: inputs[i], nesting)
        return function(*leaves[:parameter_count], *nested_inputs)

    return call


def select_real_tensors(result: Any) -> Tensors:
    """Returns the floating-point tensors in a function's result, however it is nested.

    A complex tensor is returned as a view of its real and imaginary parts.
    """
    tensors = [x for x in list_leaves(result) if isinstance(x, Tensor)]
    real = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in tensors]
    return tuple(filter(is_real_tensor, real))


def list_leaves(tree: Any) -> list[Any]:
    """Returns the leaves of pytrees, of dataclasses, and of subclasses of containers."""
    leaves = []
    for leaf in _torch.tree_leaves(tree):
        if isinstance(leaf, Mapping):
            leaves += list_leaves(list(leaf.values()))
        elif isinstance(leaf, tuple | list):
            leaves += list_leaves([*leaf])
        elif is_dataclass(leaf):
            leaves += list_leaves([getattr(leaf, each.name) for each in fields(leaf)])
        else:
            leaves.append(leaf)
    return leaves


def is_real_tensor(x: Any) -> bool:
    """Whether x is a floating-point tensor."""
    return isinstance(x, Tensor) and x.is_floating_point()
