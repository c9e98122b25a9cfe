"""The kernels of a call, by PyTorch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from torch_nnmath.bench.measure import make_wall_clock

CALLS = 3  # whose mean is taken
# Kernels of cuBLAS, cuBLASLt, CUTLASS and Tensile; operators of a CPU
PRODUCT = re.compile(
    r"gemm|nvjet|cutlass|xmma|splitk|cijk_|cublas|aten::(add)?(mm|bmm|mv)_?$", re.I
)


def profile_call(call: Callable[[], object], device: str, trace: Path) -> dict[str, Any]:
    """Returns the kernels' seconds in a call, the share of matrix products, and the call's time.

    On a CPU, operators take the place of kernels. Also writes a trace for chrome://tracing.
    """
    timer = make_wall_clock(device)
    for _ in range(2):  # compiles and tunes
        call()
    call_seconds = timer(call, CALLS)
    is_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        timer(call, CALLS)
    profiler.export_chrome_trace(str(trace))
    kernels = []
    for event in profiler.key_averages():
        if (event.device_type.name == "CUDA") != is_gpu:
            continue
        microseconds = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        kernels.append(
            {
                "name": event.key,
                "calls": event.count / CALLS,
                "seconds": microseconds / CALLS / 1e6,
                "is_product": is_product(event.key),
            }
        )
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    seconds = sum(kernel["seconds"] for kernel in kernels)
    product_seconds = sum(kernel["seconds"] for kernel in kernels if kernel["is_product"])
    return {
        "seconds": seconds,
        "call_seconds": call_seconds,
        "product_share": product_seconds / seconds if seconds else 0.0,
        "kernels": kernels[:20],
    }


def is_product(name: str) -> bool:
    """Whether a kernel of this name multiplies matrices."""
    return PRODUCT.search(name) is not None
