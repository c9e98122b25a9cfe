"""Compiles the row kernel of the head's second order for GPUs; fails if a configuration of use
spills registers.
"""

from __future__ import annotations

import sys

from ahead_of_time import compile_kernel, get_targets

from torch_nnmath.kernels.gpu.triton_second_order import VECTOR, _process_rows, choose_tile

STRIDES = "z_stride", "r_stride", "Q_stride", "Δ_stride"
INTEGERS = *STRIDES, "first_row", "row_count", "C", "columns"
FLOATS = "b", "scale", "p", "t", "γ", "ω", "η", "σ", "π", "τ", "ρ_c", "ρ_q", "ρ_h", "dp"
POINTERS = {**dict.fromkeys(FLOATS, "*fp32"), "y": "*i64", "keep": "*i1"}
PLAIN = "y", "p", "keep", "γ", "ρ_c", "ρ_q"
ALL = *PLAIN, "b", "scale", "t", "cap", "ω", "η", "σ", "π", "τ", "ρ_h", "dp"
CASES = {  # optional arguments, type of Q and Δ, whether C is a multiple of 16
    "plain bf16": (PLAIN, "bf16", True),
    "plain float16, ragged": ((*PLAIN, "b", "σ", "ω"), "fp16", False),
    "derivatives alone": ((*PLAIN, "cap", "π"), None, False),
    "all bf16": (ALL, "bf16", True),
    "all float32, ragged": (ALL, "fp32", False),
}


def compile_case(case: str, target: str) -> bool:
    """Prints one line. Returns whether nothing is spilled into memory."""
    arguments, type_, is_divisible = CASES[case]
    types = dict.fromkeys(INTEGERS, "i32") | {n: POINTERS[n] for n in arguments if n in POINTERS}
    types |= {"z": "*fp32", "r": "*fp32", "ln_reciprocal": "fp32"}
    if "cap" in arguments:
        types |= {"cap": "fp32", "cap_reciprocal": "fp32"}
    if type_ is not None:
        types |= {"Q": f"*{type_}", "Δ": f"*{type_}"}
    is_hip = target.startswith("gfx")
    configuration = choose_tile(128256, is_hip)
    lanes, num_warps, num_stages = configuration
    constants = {n: None for n in _process_rows.arg_names if n not in types}
    constants |= dict.fromkeys(("scale_STRIDE", "γ_STRIDE", "ω_STRIDE", "η_STRIDE"), 1)
    constants |= {"T_STRIDE": int("t" in arguments), "τ_STRIDE": int("τ" in arguments)}
    constants |= {"HAS_ENTROPY": "η" in arguments, "LANES": lanes, "VECTOR": VECTOR}
    constants |= {"STAGES": num_stages}
    divisible = (*STRIDES, "columns", *(("C",) if is_divisible else ()))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    usage = compile_kernel(_process_rows, target, types, constants, divisible, **options)
    print(f"{target} _process_rows {case} {tuple(configuration)} {tuple(usage)}", flush=True)
    return not usage.has_spills


if __name__ == "__main__":
    results = [compile_case(case, target) for case in CASES for target in get_targets()]
    sys.exit(0 if all(results) else 1)
