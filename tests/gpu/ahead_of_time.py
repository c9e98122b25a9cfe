"""Compiles Triton kernels for GPUs that this machine does not have, and reads what they use.

A kernel must not be decorated under `TRITON_INTERPRET`, so tests run this in a process of their
own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

BYTES_OF_RELEASES = {"3.7.": 8, "3.8.": 16}


def get_targets() -> list[str]:
    """The targets that the script's arguments name; all if there are none."""
    return sys.argv[1:] or list(TARGETS)


class Usage(NamedTuple):
    """What a thread of a compiled kernel uses."""

    registers: int
    spilled_bytes: int  # in memory

    @property
    def has_spills(self) -> bool:
        """Whether registers are spilled; a few may be by Triton 3.7 and 3.8.

        These give some kernels fewer registers than the releases before and after them do.
        """
        return self.spilled_bytes > BYTES_OF_RELEASES.get(triton.__version__[:4], 0)


def compile_kernel(
    kernel: Any,
    target: str,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...] = (),
    **options: Any,
) -> Usage:
    """Compiles `kernel` for a target.

    `types` has the type of each argument that is no constant, as "*bf16", "*fp32", "*i64", "i32",
    "fp32". An argument that is None belongs to `constants`. `divisible` names the arguments
    that are multiples of 16; every pointer is one.
    """
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: i for i, name in enumerate(kernel.arg_names)}
    pointers = [name for name, type_ in types.items() if type_.startswith("*")]
    attributes = {(places[n],): [["tt.divisibility", 16]] for n in (*pointers, *divisible)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs=attributes,
    )
    options.setdefault("enable_fp_fusion", True)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        return _read_amd(compiled.asm["amdgcn"])
    return _read_nvidia(compiled.asm["cubin"])


def _read_nvidia(binary: bytes) -> Usage:
    """Asks cuobjdump, which comes with Triton. Registers that are spilled lie on the stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(usage["REG"], usage["STACK"] + usage["LOCAL"])


def _read_amd(assembly: str) -> Usage:
    """Reads the kernel's metadata. Only what lies in the private segment is in memory.

    Scalar registers are spilled into lanes of vector registers.
    """

    def read(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert match is not None, key
        return int(match[1])

    return Usage(read("vgpr_count"), read("private_segment_fixed_size"))
