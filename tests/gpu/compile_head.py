"""Compiles the head's row kernel for GPUs; fails if a configuration of use spills registers."""

from __future__ import annotations

import sys

from ahead_of_time import compile_kernel, get_targets

from torch_nnmath.kernels.gpu.triton_head import VECTOR, _process_rows, choose_configuration

INTEGERS = "z_stride", "G_stride", "first_row", "row_count", "C", "columns"
POINTERS = {
    **dict.fromkeys(("b", "scale", "p", "t", "γ", "ω", "η", "given_sums"), "*fp32"),
    **dict.fromkeys(("loss", "lse", "squared_lse", "entropy", "sums", "dc_dp"), "*fp32"),
    "y": "*i64",
    "predicted": "*i64",
    "keep": "*i1",
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


def compile_case(case: str, target: str) -> bool:
    """Prints one line. Returns whether nothing is spilled into memory."""
    arguments, G_type, is_divisible = CASES[case]
    types = dict.fromkeys(INTEGERS, "i32") | {n: POINTERS[n] for n in arguments if n in POINTERS}
    types |= {"z": "*fp32", "ln_reciprocal": "fp32"}
    if "cap" in arguments:
        types |= {"cap": "fp32", "cap_reciprocal": "fp32"}
    if G_type is not None:
        types |= {"G": f"*{G_type}", "γ": "*fp32"}
    has_entropy = "η" in arguments or "entropy" in arguments
    has_options = has_entropy or any(name in arguments for name in ("b", "t", "cap"))
    is_hip = target.startswith("gfx")
    configuration = choose_configuration(128256, has_options, is_hip)
    lanes, num_warps, num_stages = configuration
    constants = {n: None for n in _process_rows.arg_names if n not in types}
    constants |= dict.fromkeys(("SCALE_STRIDE", "γ_STRIDE", "ω_STRIDE", "η_STRIDE"), 1)
    constants |= {"T_STRIDE": int("t" in arguments)}
    constants |= {"HAS_ENTROPY": has_entropy, "LANES": lanes, "VECTOR": VECTOR}
    constants |= {"STAGES": num_stages}
    divisible = ("z_stride", "G_stride", "columns", *(("C",) if is_divisible else ()))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    usage = compile_kernel(_process_rows, target, types, constants, divisible, **options)
    print(f"{target} _process_rows {case} {tuple(configuration)} {tuple(usage)}", flush=True)
    return not usage.has_spills


if __name__ == "__main__":
    results = [compile_case(case, target) for case in CASES for target in get_targets()]
    sys.exit(0 if all(results) else 1)
