"""Compiles the head's row kernels for GPUs; fails if a configuration of use spills registers."""

from __future__ import annotations

import sys
from typing import Any

from ahead_of_time import Usage, compile_kernel, get_targets

from torch_nnmath.kernels.gpu import triton_head, triton_head_single
from torch_nnmath.kernels.gpu.triton_logits import VECTOR, Configuration

INTEGERS = "z_stride", "first_row", "row_count", "C", "columns"
POINTERS = {
    **dict.fromkeys(("b", "scale", "p", "t", "γ", "ω", "η", "given_sums"), "*fp32"),
    **dict.fromkeys(("loss", "lse", "squared_lse", "entropy", "sums", "dc_dp"), "*fp32"),
    "y": "*i64",
    "predicted": "*i64",
    "keep": "*i1",
    "class_entries": "*bf16",
    "class_error": "*fp32",
}
RESULTS = "loss", "lse", "squared_lse", "sums"
PLAIN = "y", "p", "keep", *RESULTS
OPTIONS = "b", "scale", "t", "cap", "ω", "η", "entropy", "predicted", "dc_dp"
ALL = *PLAIN, *OPTIONS
CASES = {  # optional arguments, type of G, whether C is a multiple of 16
    "plain bf16": (PLAIN, "bf16", True),
    "plain float16, ragged": ((*PLAIN, "b"), "fp16", False),
    "plain float32": ((*PLAIN, "ω"), "fp32", True),
    "results": ((*PLAIN, "predicted"), None, False),
    "given sums": (("y", "p", "keep", "given_sums"), "bf16", True),
    "all bf16": (ALL, "bf16", True),
    "all float32, ragged": (ALL, "fp32", False),
    "all given sums": (
        ("y", "p", "keep", "b", "t", "cap", "ω", "η", "given_sums", "dc_dp"),
        "bf16",
        False,
    ),
}


CLASS = "class_entries", "class_error"
CASES_OF_ONE_READ = {  # optional arguments, whether C is a multiple of 16
    "plain": ((*PLAIN, *CLASS), True),
    "ragged": ((*PLAIN, *CLASS, "b", "predicted"), False),
    "cap": ((*PLAIN, *CLASS, "cap"), True),
    "all": ((*PLAIN, *CLASS, "b", "scale", "cap", "ω", "predicted", "dc_dp"), False),
}


def compile_case(case: str, target: str) -> bool:
    """The kernel with two reads."""
    arguments, G_type, is_divisible = CASES[case]
    types = {}
    if G_type is not None:
        types = {"G": f"*{G_type}", "G_stride": "i32", "γ": "*fp32"}
    has_entropy = "η" in arguments or "entropy" in arguments
    has_options = has_entropy or any(name in arguments for name in ("b", "t", "cap"))
    configuration = triton_head.choose_configuration(128256, has_options, target.startswith("gfx"))
    constants = {"T_STRIDE": int("t" in arguments), "η_STRIDE": 1, "HAS_ENTROPY": has_entropy}
    kernel = triton_head._process_rows
    usage = compile_rows(kernel, target, arguments, types, constants, configuration, is_divisible)
    print(f"{target} two reads, {case} {tuple(configuration)} {tuple(usage)}", flush=True)
    return not usage.has_spills


def compile_case_of_one_read(case: str, target: str) -> bool:
    arguments, is_divisible = CASES_OF_ONE_READ[case]
    types = dict.fromkeys(("γ", "softmax_factor", "exact_factor"), "*fp32")
    types |= {"E": "*bf16", "E_stride": "i32"}
    configuration = triton_head_single.choose_configuration(target.startswith("gfx"))
    kernel = triton_head_single._process_rows
    usage = compile_rows(kernel, target, arguments, types, {}, configuration, is_divisible)
    print(f"{target} one read, {case} {tuple(configuration)} {tuple(usage)}", flush=True)
    return not usage.has_spills


def compile_rows(
    kernel: Any,
    target: str,
    arguments: tuple[str, ...],
    types: dict[str, str],
    constants: dict[str, Any],
    configuration: Configuration,
    is_divisible: bool,
) -> Usage:
    """Compiles a kernel with `arguments`, and those in `types`; the others are None."""
    types = types | {n: POINTERS[n] for n in arguments if n in POINTERS}
    types |= dict.fromkeys(INTEGERS, "i32") | {"z": "*fp32", "ln_reciprocal": "fp32"}
    if "cap" in arguments:
        types |= {"cap": "fp32", "cap_reciprocal": "fp32"}
    lanes, num_warps, num_stages = configuration
    constants = {n: None for n in kernel.arg_names if n not in types} | constants
    constants |= dict.fromkeys(("scale_STRIDE", "γ_STRIDE", "ω_STRIDE"), 1)
    constants |= {"LANES": lanes, "VECTOR": VECTOR, "STAGES": num_stages}
    strides = [n for n in types if n.endswith("_stride")]
    divisible = (*strides, "columns", *(("C",) if is_divisible else ()))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return compile_kernel(kernel, target, types, constants, divisible, **options)


if __name__ == "__main__":
    targets = get_targets()
    results = [compile_case(case, target) for case in CASES for target in targets]
    results += [
        compile_case_of_one_read(case, target) for case in CASES_OF_ONE_READ for target in targets
    ]
    sys.exit(0 if all(results) else 1)
