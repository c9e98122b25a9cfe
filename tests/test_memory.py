"""Peak memory of a known allocation."""

import math
import sys

import pytest
import torch

from torch_nnmath import _memory
from torch_nnmath._memory import MIB, can_reset_peak, read_available, read_peak, reset_peak

CPU = torch.device("cpu")
SIZE = 64 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the CPU's peak is restarted on Linux only")
def test_peak_on_cpu_includes_freed_memory_and_restarts():
    before = reset_peak(CPU)
    torch.ones(SIZE // 4)
    assert read_peak(CPU) - before == pytest.approx(SIZE, rel=0.1)
    assert reset_peak(CPU) < before + SIZE // 2
    assert can_reset_peak(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda_includes_freed_memory_and_restarts():
    device = torch.device("cuda")
    before = reset_peak(device)
    torch.ones(SIZE // 4, device=device)
    assert read_peak(device) - before == SIZE
    assert reset_peak(device) == before
    assert can_reset_peak(device)
    assert SIZE < read_available(device) < math.inf


def test_peak_outside_linux_is_the_process_maximum(monkeypatch):
    pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not can_reset_peak(CPU)
    assert 0 < reset_peak(CPU) <= read_peak(CPU)
    assert read_available(CPU) == math.inf


def test_other_devices_cannot_reset_their_peak():
    assert not can_reset_peak(torch.device("mps"))


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_available_memory_on_linux_is_below_the_total():
    assert 0 < read_available(CPU) <= _memory._read_proc("meminfo")["MemTotal"]
