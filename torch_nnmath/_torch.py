"""Every private API of PyTorch that this library uses, one function for each.

Each docstring gives the reason, and the public replacement if a later release has one.
`tests/test_torch.py` tests each function by name, so that an upgrade that breaks one says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor, unwrap_if_dead
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function, forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.nn.utils._expanded_weights.expanded_weights_impl import HANDLED_FUNCTIONS
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Which transforms, modes and tracers are active


def is_transformed() -> bool:
    """Whether a `torch.func` transform or a level of forward mode is active.

    `Function.apply` asks the first question itself; no public function answers either.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_functionalized() -> bool:
    """Whether a `torch.func.functionalize` is active, which refuses every `autograd.Function`.

    No public function tells.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == TransformType.Functionalize for level in stack)


def is_observed() -> bool:
    """`is_transformed()`, `has_dispatch_mode()` or `is_jit_tracing()`, in one call.

    It is asked several times a step, and each call in Python counts.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


def is_dynamo_tracing() -> bool:
    """Whether Dynamo traces, also in Dynamo's own Python code.

    There the public `torch.compiler.is_compiling()` is False up to PyTorch 2.12.
    """
    return CompileContext.try_get() is not None


def is_dynamo_loaded() -> bool:
    """Whether Dynamo, PyTorch's compiler, has been imported.

    Until then nothing is compiled. `torch.compiler.disable` would import it, which takes seconds.
    """
    return "torch._dynamo" in sys.modules


def may_break_graph() -> bool:
    """Whether Dynamo, which traces the caller, may end its graph there and resume after it.

    `fullgraph=True`, a strict export and a checkpoint's body forbid this. No public function tells.
    The result is a constant of the graph. The mark for that is private; the public
    `torch.compiler.assume_constant_result` would import Dynamo, which takes seconds.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.utils import _get_error_on_graph_break

    translator = InstructionTranslator.current_tx()
    return translator.should_compile_partial_graph() and not _get_error_on_graph_break()


may_break_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Whether `torch.export` traces, a constant of the graph.

    Dynamo of PyTorch 2.11 replaces the public function by True.
    """
    return torch.compiler.is_exporting()


is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` records.

    `torch.jit.is_tracing` is documented, but torch does not export it, so type checkers refuse it.
    """
    return torch._C._is_tracing()


def is_fx_tracing() -> bool:
    """Whether `make_fx` or an export records. No public function tells."""
    return get_proxy_mode() is not None


def has_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode` is active. No public function tells."""
    return torch._C._len_torch_dispatch_stack() > 0


class RandomOperatorWatch(TorchDispatchMode):
    """Records whether an operator draws random numbers. The base class is in a private module."""

    is_random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.is_random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class ResultHook(TorchDispatchMode):
    """Passes each tensor that an operator computes to a function, which may write to it.

    A view or a constant is not passed. The base class is in a private module.
    """

    def __init__(self, hook: Callable[[Tensor], object]):
        super().__init__()
        self.hook = hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and any(isinstance(x, Tensor) for x in tree_leaves(args)):
            for y in tree_leaves(result):
                if isinstance(y, Tensor):
                    self.hook(y)
        return result


def unwrap_transformed(x: Tensor) -> tuple[Tensor, int | None] | None:
    """The tensor in the wrapper of a `torch.func` transform, and the axis that a vmap batches.

    None if x is no wrapper. No public function tells.
    """
    functorch = torch._C._functorch
    if not functorch.is_functorch_wrapped_tensor(x):
        return None
    dim = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else None
    return functorch.get_unwrapped(x), dim


def is_legacy_batch(x: Tensor) -> bool:
    """Whether autograd's `is_grads_batched` or `vectorize` batches x. No public function tells."""
    return is_legacy_batchedtensor(x)


# autograd.Function and forward mode


def apply_without_signature(function: type[Function], inputs: Any) -> Any:
    """`function.apply(*inputs)` outside of transforms.

    `Function.apply` itself calls `inspect.signature` and binds the inputs, which takes 6 to 10 µs.
    Since PyTorch 2.14, this call does so too. A wrapper that a transform left behind is unwrapped,
    as there.
    """
    apply: Any = super(Function, function).apply  # type: ignore[misc]  # untyped
    return apply(*[unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in inputs])


def enable_forward_mode() -> AbstractContextManager[Any]:
    """Turns forward mode on inside a `jvp` rule, where PyTorch turns it off at every level.

    No public function turns it on.
    """
    return forward_ad._set_fwd_grad_enabled(True)


def drop_tangent(x: Tensor) -> Tensor:
    """x without its tangent. The public `unpack_dual` does not take a vmap batch."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(x):
        return forward_ad.unpack_dual(x).primal
    dim, level = functorch.maybe_get_bdim(x), functorch.maybe_get_level(x)
    return functorch._add_batch_dim(drop_tangent(functorch.get_unwrapped(x)), dim, level)


# Tensors


def drop_view_mark(x: Tensor) -> Tensor:
    """x without autograd's view mark, in the same memory.

    A Function's output that is a view could not be modified in place. Public operations that drop
    the mark copy x.
    """
    return torch.ops.aten._unsafe_view(x, x.shape)


def get_base(x: Tensor) -> Tensor | None:
    """The tensor that x is a view of, or None. No public function tells."""
    return x._base


def get_version(x: Tensor) -> int:
    """How often x was modified in place. Only `_version` counts this."""
    return x._version


def get_storage_id(x: Tensor) -> int:
    """An id of x's memory, also on the meta device, where the public `data_ptr` is 0."""
    return x.untyped_storage()._cdata


def assert_async(condition: Tensor, message: str) -> None:
    """Asserts on the device, without a synchronisation. No public function does."""
    torch._assert_async(condition, message)


def find_process_group(name: str) -> Any:
    """The process group of this name. Operators take names, and no public function finds them."""
    resolve: Any = torch._C._distributed_c10d._resolve_process_group
    return resolve(name)


def wait_for_collective(x: Tensor) -> Tensor:
    """The plain tensor that `DTensor.redistribute` promised. No public function waits for it."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return x.wait() if isinstance(x, AsyncCollectiveTensor) else x


def support_dual_dtensors() -> None:
    """Registers DTensor's rule for the private operator that `forward_ad.make_dual` calls.

    The operator compares the sizes of two tensors' memory; PyTorch has no rule for DTensors.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def list_placements(x: Any, _other: Any) -> Any:
        """Placements of a result and of the two arguments, which must be alike."""
        places = Replicate(), *map(Shard, range(x.ndim))
        return [([place], [place, place]) for place in places]

    register_sharding(torch.ops.aten._has_same_storage_numel.default)(list_placements)


def list_forward_hooks(module: torch.nn.Module) -> list[Any]:
    """The forward hooks that are registered with a module. No public function lists them."""
    return [*module._forward_hooks.values()]


def frees_parameters(module: Any) -> bool:
    """Whether FSDP2, which wraps the module, frees its parameters after the forward.

    `FSDPModule` sets this, but does not tell.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # since PyTorch 2.12; before, only one
    groups = [state._fsdp_param_group] if groups is None else groups
    return any(g is not None and g.post_forward_mesh_info is not None for g in groups)


def make_wrapper(cls: type[Tensor], shape: torch.Size, **options: Any) -> Any:
    """An instance of a tensor subclass without memory. No public constructor makes one."""
    return Tensor._make_wrapper_subclass(cls, shape, **options)


def forbid_memory_access(x: Tensor) -> None:
    """Makes C functions that read x's memory raise instead of crash. No public function does."""
    torch._C._set_throw_on_mutable_data_ptr(x)


# Torch functions and dispatch


def disable_torch_function() -> AbstractContextManager[Any]:
    """Calls inside skip `__torch_function__` of subclasses, but not of modes.

    PyTorch's documentation names this class for the purpose; no public name exists.
    """
    return torch._C.DisableTorchFunctionSubclass()


def share_per_sample_gradient(torch_function: Any, function: Any) -> None:
    """Gives `function` the rule of `torch_function` for per-sample gradients, if there is one.

    `call_for_per_sample_grads` looks rules up in a private table.
    """
    rule = HANDLED_FUNCTIONS.get(torch_function)
    if rule is not None:
        HANDLED_FUNCTIONS[function] = rule


def disable_dispatch_modes() -> AbstractContextManager[Any]:
    """Operations inside skip every active `TorchDispatchMode`. No public function does this."""
    return _disable_current_modes()


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dicts. PyTorch's pytree module is private."""
    return _pytree.tree_leaves(tree)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` of every leaf, in the same nesting. PyTorch's pytree module is private."""
    return _pytree.tree_map(function, tree)


def tree_leaves_with_keys(tree: Any) -> list[tuple[str, Any]]:
    """The leaves, each after its keys, such as `[0]['a']`. PyTorch's pytree module is private."""
    return [(_pytree.keystr(keys), leaf) for keys, leaf in _pytree.tree_leaves_with_path(tree)]


# Modules


def get_attribute(module: torch.nn.Module, name: str, default: Any) -> Any:
    """An instance's own attribute, parameter or buffer.

    For one that is missing, the public `getattr` with a default writes an error message first.
    """
    for owner in (module.__dict__, module._parameters, module._buffers):
        if name in owner:
            return owner[name]
    return default


# Tracers and the nodes of the autograd graph, for the checker


def make_fake_tensor_mode() -> Any:
    """A FakeTensorMode that accepts real tensors together with fake ones.

    It has no public import.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace_with_fx(function: Callable[..., Any], tracing_mode: Any) -> Callable[..., Any]:
    """`make_fx` that accepts real tensors in the function's closure.

    Its option for that is private.
    """
    return make_fx(function, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)


def get_compiler_backend(name: str) -> Callable[..., Any]:
    """A backend of `torch.compile` by name. The public `list_backends` gives names only."""
    return torch._dynamo.lookup_backend(name)


def disable_donated_buffers() -> None:
    """Lets the backward of compiled functions run again through a retained graph, in this process.

    PyTorch's error message names this setting; no public function sets it.
    """
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False


def get_node_function(node: Any) -> type[Function]:
    """The Function whose backward a graph node runs. The node has no public reference to it."""
    return node._forward_cls


def get_gradient_dtype(node: Any, index: int) -> torch.dtype:
    """The dtype of the gradient that a graph node receives at `index`. No public function tells."""
    variable = getattr(node, "variable", None)  # of a node that accumulates a leaf's gradient
    return node._input_metadata[index].dtype if variable is None else variable.dtype
