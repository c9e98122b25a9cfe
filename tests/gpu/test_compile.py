"""Compiles every Triton kernel for GPUs that this machine does not have; none may spill.

Each script runs in a process of its own, in which no kernel is interpreted: with the installed
Triton, and for one GPU of each vendor with the oldest one that is supported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_helpers import needs_triton

pytestmark = [pytest.mark.triton, needs_triton]
SCRIPTS = sorted(Path(__file__).parent.glob("compile_*.py"))
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
OLDEST_TARGETS = ("sm_90", "gfx942")
OLDEST_TRITON = os.environ.get("TRITON_3_6")


def run(command, tmp_path, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), **variables}
    process = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_kernels_compile_for_every_target_without_spills(script, tmp_path):
    output = run([script], tmp_path)
    assert all(target in output for target in TARGETS)


@pytest.mark.skipif(not OLDEST_TRITON, reason="TRITON_3_6 names no folder with Triton 3.6.0")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_kernels_compile_with_the_oldest_triton_without_spills(script, tmp_path):
    paths = [OLDEST_TRITON, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths)}
    version = run(["-c", "import triton; print(triton.__version__)"], tmp_path, **variables)
    assert version.strip() == "3.6.0"
    output = run([script, *OLDEST_TARGETS], tmp_path, **variables)
    assert all(target in output for target in OLDEST_TARGETS)
    assert not any(target in output for target in {*TARGETS} - {*OLDEST_TARGETS})
