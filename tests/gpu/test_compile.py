"""Compiles every Triton kernel for GPUs that this machine does not have; none may spill.

Each script runs in a process of its own, in which no kernel is interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_helpers import needs_triton

pytestmark = [pytest.mark.triton, needs_triton]
SCRIPTS = sorted(Path(__file__).parent.glob("compile_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_kernels_compile_for_every_target_without_spills(script, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, script]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert target in run.stdout
