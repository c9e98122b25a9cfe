"""Runs the GPU's implementations on CPU tensors: Triton's interpreter, and emulated products."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch

from torch_nnmath import formulas
from torch_nnmath.kernels import _library, dispatch
from torch_nnmath.kernels._library import GPU_IMPLEMENTATIONS

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def _round_to_nearest(convert):
    """Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest even."""
    import numpy as np
    import triton.language as tl

    def convert_float(value, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            x = torch.from_numpy(np.frombuffer(value.tobytes(), dtype=np.float32).copy())
            bits = x.bfloat16().view(torch.int16).numpy().view(np.uint16)
            return bits.reshape(value.shape)
        return convert(value, input_dtype, output_dtype, rounding_mode)

    return convert_float


def _round_fma_once(builder, x, y, z):
    """An fma of float32 or less. Triton's interpreter rounds the product too, up to Triton 3.8."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    exact = np.multiply(x.data, y.data, dtype=np.float64) + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _patch_index(patch_tensor):
    """Triton 3.6 converts an array of one element to an integer, which NumPy 2.4 refuses."""

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch


def round_in_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter round like a GPU, and that of Triton 3.6 take integers of NumPy 2.4."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    import triton
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", _round_to_nearest(convert))
    if triton.__version__.startswith("3.6."):
        patch = _patch_index(interpreter._patch_lang_tensor)
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", _round_fma_once)


@contextlib.contextmanager
def route_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the GPU's implementation of every operator on CPU tensors."""
    round_in_interpreter(monkeypatch)
    emulation = torch.library.Library("aten", "IMPL")
    emulate_products(emulation)
    operators = torch.library.Library("torch_nnmath", "IMPL")
    for name, implementation in GPU_IMPLEMENTATIONS.items():
        operators.impl(name, implementation, "CPU")
    try:
        yield
    finally:
        operators._destroy()
        emulation._destroy()


@pytest.fixture
def gpu_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with route_operators(monkeypatch):
        yield


def select_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Selects the kernels of `gpu_operators` for CPU tensors of every size, as for GPU tensors.

    Returns a list to which each call of a kernel appends its name.
    """
    find_obstacle, load = dispatch.find_kernel_obstacle, _library._load_gpu_function
    names: list[str] = []

    def load_and_note(name):
        names.append(name)
        return load(name)

    def find_obstacle_on_gpu(tensors, is_gpu_only=False, is_fast_if_small=False):
        return find_obstacle(tensors) or dispatch.find_triton_obstacle(tensors)

    monkeypatch.setattr(dispatch, "MIN_KERNEL_SIZE", 0)
    monkeypatch.setattr(dispatch, "CPU_FUNCTIONS", {})
    for formula in (formulas.CrossEntropy, formulas.SquaredError, formulas.SigmoidSquaredError):
        monkeypatch.setattr(formula.kernel, "small_cost", None)
    monkeypatch.setattr(dispatch, "find_kernel_obstacle", find_obstacle_on_gpu)
    monkeypatch.setattr(_library, "_load_gpu_function", load_and_note)
    return names


def emulate_products(library: torch.library.Library, device: str = "CPU") -> None:
    """Products of half types with a float32 result, which PyTorch has on GPUs only.

    On the meta device, PyTorch 2.11 and 2.12 take the type of the result for `beta`.
    """

    def mm(a, b, out_dtype):
        return a.to(out_dtype) @ b.to(out_dtype)

    def mm_out(a, b, out_dtype, *, out):
        return out.copy_(mm(a, b, out_dtype))

    def addmm(c, a, b, out_dtype, *, beta=1, alpha=1):
        product = alpha * mm(a, b, out_dtype)
        return product if beta == 0 else beta * c + product

    def addmm_out(c, a, b, out_dtype, *, beta=1, alpha=1, out):
        return out.copy_(addmm(c, a, b, out_dtype, beta=beta, alpha=alpha))

    emulations = {"mm.dtype": mm, "mm.dtype_out": mm_out}
    emulations |= {"addmm.dtype": addmm, "addmm.dtype_out": addmm_out}
    for name, emulation in emulations.items():
        library.impl(name, emulation, device, allow_override=True)
