"""What the launches of all Triton kernels share."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# those of an H200, in Triton's interpreter
PROCESSORS_WITHOUT_GPU = 132
CACHE_WITHOUT_GPU = 50 * 2**20


def use_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's GPU the current one: an operator written in Python has no device guard."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def count_processors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU."""
    if device.type != "cuda":
        return PROCESSORS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def get_cache_size(device: torch.device) -> int:
    """Bytes of a GPU's L2 cache."""
    if device.type != "cuda":
        return CACHE_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).L2_cache_size
