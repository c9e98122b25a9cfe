"""Peak memory: of a CUDA device by PyTorch's allocator, of a CPU by the process's resident memory.

    before = reset_peak(device)
    run()
    used = read_peak(device) - before

The allocator's statistics are kept on the host, so a CUDA device need not be synchronised.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path

import torch

MIB = 2**20


def can_reset_peak(device: torch.device) -> bool:
    """Whether the peak can be reset: on CUDA, and on a CPU under Linux."""
    return device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")


def reset_peak(device: torch.device) -> int:
    """Resets the peak and returns the bytes in use.

    On a CPU without Linux it resets nothing and returns the peak so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps freed memory resident until it is trimmed
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return read_peak(device)


def read_peak(device: torch.device) -> int:
    """Returns the peak, in bytes, since `reset_peak`; since the start where that resets nothing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return _read_proc("self/status")["VmHWM"]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def read_available(device: torch.device) -> float:
    """Returns the bytes that can still be allocated; infinity where the system reports none."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        return _read_proc("meminfo").get("MemAvailable", math.inf)
    return math.inf


def _read_proc(name: str) -> dict[str, int]:
    """Returns the bytes of each `key: n kB` line of a file in /proc."""
    lines = [line.split() for line in Path("/proc", name).read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1:] == ["kB"]}
