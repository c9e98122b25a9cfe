"""Which path a call takes: the formula as it is written, a kernel for the CPU or one for GPUs."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath import _torch
from torch_nnmath._precision import make_scalar, wide_type
from torch_nnmath._records import FLAT_SIZE, HeadInputs

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
MIN_KERNEL_SIZE = 2**15  # entries; up to this PyTorch uses one thread, and few kernels are faster
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_FUNCTIONS: dict[Any, Callable[..., Any]] = {}  # what an operator runs on the CPU
FAST_IF_SMALL: set[str] = set()  # operators that the CPU uses for tensors of any size
GPU_MODULES: dict[str, str] = {}  # module of `kernels.gpu` by the operator's name
GPU_ONLY: set[str] = set()  # operators without a kernel for the CPU
NO_TRITON = "Triton is not installed"


def has_dtensor(*tensors: Any) -> bool:
    """Whether one of them is a DTensor, or a transform of `torch.func` wraps one.

    The module of DTensors takes half as long to import as PyTorch.
    """
    if _torch.is_transformed() and not torch.compiler.is_compiling():
        tensors = tuple(map(_unwrap, tensors))
    subclasses = [type(x) for x in tensors if type(x) not in PLAIN_TYPES]
    module = sys.modules.get("torch.distributed.tensor") if subclasses else None
    return module is not None and any(issubclass(cls, module.DTensor) for cls in subclasses)


def _unwrap(x: Any) -> Any:
    """x without the wrappers of transforms."""
    inner = _torch.unwrap_transformed(x) if isinstance(x, Tensor) else None
    return x if inner is None else _unwrap(inner[0])


class LossKernel:
    """The operator of a loss: `operator(dc, *inputs, needs_c)` gives c and dc times the gradient.

    The gradient is that of the first input. If `dc` is None, there is no gradient. The input at
    `keep_index`, if any, is False for ignored rows. `small_cost(n, *inputs)`, if any, gives the
    cost Σ c / n and its gradient for small inputs on the CPU, or None for others.
    """

    def __init__(
        self,
        operator: Callable[..., Any],
        small_cost: Callable[..., Any] | None = None,
        keep_index: int | None = None,
    ):
        run = bypass_operator_on_cpu(operator)
        self.value_and_gradient = run
        self.small_cost = small_cost
        self.keep_index = keep_index
        # lambdas, since Dynamo does not trace bound methods here
        self.value = lambda *inputs: run(None, *inputs, True)[0]
        self.gradient = lambda dc, *inputs: run(dc, *inputs, False)[1]

    def cost_and_gradient(self, n: Tensor | float, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Σ c / n, and its gradient with respect to the first input."""
        x = inputs[0]
        if self.small_cost is not None and x.is_cpu:
            result = self.small_cost(n, *inputs)
            if result is not None:
                return result
        dc = 1 / make_scalar(n, x.new_empty((), dtype=wide_type(x.dtype)))
        c, dx = self.value_and_gradient(dc, *inputs, True)
        return c.sum() / n, dx


def accelerate_with(
    kernel: Callable[..., Any], is_gpu_only: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Runs `kernel` in place of the decorated formula where that cannot be observed.

    A transform, a level of forward mode, a dispatch mode, a tracer, a compiler and a tensor
    subclass get the formula as it is written.
    """
    run, is_fast_if_small = bypass_operator_on_cpu(kernel), _get_name(kernel) in FAST_IF_SMALL

    def decorate(formula: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(formula)
        def kernel_or_formula(*args: Any) -> Any:
            may_run = may_use_kernel(args, is_gpu_only, is_fast_if_small)
            return (run if may_run else formula)(*args)

        return kernel_or_formula

    return decorate


def bypass_operator_on_cpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel for plain tensors; if it is an operator, the CPU runs its function alone.

    The Python layer of an operator takes 10 µs a call. Autocast is left to the operator.
    """
    name = _get_name(kernel)
    if name not in CPU_FUNCTIONS:
        return kernel

    def run(first: Tensor | None, x: Tensor, *args: Any) -> Any:
        if x.is_cpu and name in CPU_FUNCTIONS and not torch.is_autocast_enabled("cpu"):
            return CPU_FUNCTIONS[name](first, x, *args)
        return kernel(first, x, *args)

    return run


def _get_name(kernel: Any) -> str | None:
    """An operator's name; None for a function."""
    get_name = getattr(kernel, "name", None)
    return None if get_name is None else get_name().split("::")[1]


def may_use_kernel(args: Any, is_gpu_only: bool = False, is_fast_if_small: bool = False) -> bool:
    """Whether nothing can differentiate, trace or batch through the operation on `args`.

    Disabled grad mode alone does not prove it: forward over reverse disables it, too.
    """
    if torch.is_grad_enabled():
        return False
    tensors = [x for x in args if isinstance(x, Tensor)]
    return find_kernel_obstacle(tensors, is_gpu_only, is_fast_if_small) is None


def find_kernel_obstacle(
    tensors: Sequence[Tensor], is_gpu_only: bool = False, is_fast_if_small: bool = False
) -> str | None:
    """Why the formula is computed as it is written, and not by a kernel; None for a kernel."""
    watcher = find_watcher(*tensors)
    if watcher is not None:
        return watcher
    is_on_cpu = True
    for x in tensors:
        is_on_cpu = is_on_cpu and x.is_cpu
    if is_on_cpu and is_fast_if_small:
        return None
    sizes = [x.numel() for x in tensors]
    if min(sizes) == 0 or max(sizes) <= MIN_KERNEL_SIZE:
        return f"no tensor has more than {MIN_KERNEL_SIZE} entries, or one has none"
    if is_on_cpu:
        return "there is a kernel for GPUs only" if is_gpu_only else None
    if {x.device.type for x in tensors} != {"cuda"}:
        return "there are kernels for the CPU and for GPUs only"
    return find_triton_obstacle(tensors)


def find_triton_obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why a Triton kernel does not take the tensors; None if it does."""
    if not has_triton():
        return NO_TRITON
    if any(x.is_floating_point() and x.dtype not in TRITON_TYPES for x in tensors):
        return "a type is not float32, bfloat16 or float16"
    return None


def find_gpu_obstacle(name: str, args: Any) -> str | None:
    """Why the GPU's implementation of an operator does not take the arguments; None if it does."""
    if GPU_MODULES[name] != "head":
        return find_triton_obstacle([x for x in args if isinstance(x, Tensor)])
    x, W, *_, needs_gradient = args
    if HeadInputs.from_flat(args[:FLAT_SIZE]).shard is not None:
        return "the ranks of a process group share the classes"
    if not x.numel() or not W.numel():
        return "a tensor is empty"
    is_half_beside_float = wide_type(x.dtype) == wide_type(W.dtype) in (x.dtype, W.dtype)
    if x.dtype != W.dtype and not is_half_beside_float:
        return "the types of features and weight do not fit together"
    return "the target needs a gradient" if needs_gradient[4] else None


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. It is imported when the first GPU tensor arrives."""
    return importlib.util.find_spec("triton") is not None


def find_watcher(*tensors: Tensor) -> str | None:
    """What traces, batches or transforms the call, or else observes it; None if nothing does."""
    if torch.compiler.is_compiling():
        return "a compiler traces the call"
    if _torch.is_observed():
        if _torch.has_dispatch_mode():
            return "a dispatch mode observes the call"
        if _torch.is_jit_tracing():
            return "torch.jit traces the call"
        return "a transform or forward mode is active"
    for x in tensors:
        if type(x) not in PLAIN_TYPES:
            return "an argument is a tensor subclass"
        if _torch.is_legacy_batch(x):
            return "a transform or forward mode is active"
    return None


def are_plain_tensors(*tensors: Tensor) -> bool:
    """Whether nothing traces, batches or observes the tensors."""
    return find_watcher(*tensors) is None


def are_plain_cpu_tensors(*tensors: Tensor) -> bool:
    """Whether the tensors are plain, and reading their values does not wait for a device."""
    for x in tensors:
        if not x.is_cpu:
            return False
    return are_plain_tensors(*tensors)


def explain(name: str, *args: Any) -> str:
    """Says in one sentence how the operator `name`, or its formula, is computed, and why.

    `args` are those of the operator `torch.ops.torch_nnmath.<name>`.
    """
    tensors = [x for x in args if isinstance(x, Tensor)]
    is_head = GPU_MODULES.get(name) == "head"
    sizes = name in GPU_ONLY, name in FAST_IF_SMALL
    obstacle = None if is_head else find_kernel_obstacle(tensors, *sizes)
    if obstacle is not None:
        return f"{name} is computed by the formula as it is written: {obstacle}."
    if tensors[0].device.type != "cuda":
        return f"{name} is computed by PyTorch operations, block by block."
    obstacle = find_gpu_obstacle(name, args)
    if obstacle is not None:
        return f"{name} is computed by PyTorch operations, block by block: {obstacle}."
    if not is_head:
        return f"{name} is computed by a Triton kernel."
    rows = "Triton kernels" if has_triton() else f"PyTorch operations on rows, since {NO_TRITON}"
    return f"{name} is computed by half-precision or float32 matrix products and {rows}."
