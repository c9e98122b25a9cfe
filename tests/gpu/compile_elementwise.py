"""Compiles the elementwise kernels for every target; fails if a kernel spills.

Run it without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import sys

from ahead_of_time import compile_kernel, get_targets

from torch_nnmath.kernels.gpu import triton_elementwise as elementwise

INTEGERS = {"n": "i64", "entries": "i32", "stride": "i32", "tiles": "i32", "examples": "i32"}
NUMBERS = {"scale": "fp32", "c_factor": "fp32", "D": "i32"}


def list_kernels(tiles):
    """Yields the kernel, the types of its tensors, and its constants."""
    for activation, a, v in (
        ("sigmoid", "bf16", "bf16"),
        ("tanh", "fp32", "fp32"),
        ("relu", "bf16", "bf16"),
        ("sigmoid", "fp32", "fp16"),
    ):
        types = {"a": a, "v": v, "result": v}
        yield elementwise.product_kernel, types, {"ACTIVATION": activation, "TILE": tiles.flat}
    for is_sigmoid, dc_kind, c_kind, half in (
        (False, "shared", "row", "bf16"),
        (True, "row", "row", "fp32"),
        (True, "entry", "entry", "fp16"),
        (True, "none", "row", "bf16"),
    ):
        types = {"a": half, "t": "fp32", "c": "fp32", "da": "fp32", "dc": "fp32"}
        if dc_kind == "none":
            types = {"a": half, "t": half, "c": "fp32"}
        kinds = {"IS_SIGMOID": is_sigmoid, "DC_KIND": dc_kind}
        tile = tiles.flat if c_kind == "entry" else tiles.example
        yield elementwise.error_kernel, types, kinds | {"C_KIND": c_kind, "TILE": tile}
        if c_kind == "row":
            for columns in (16, tiles.longest_row):
                shape = {"ROWS": tiles.example // columns, "COLUMNS": columns}
                yield elementwise.error_rows_kernel, types, kinds | shape
    types = {"sums": "fp32", "c": "fp32"}
    yield elementwise.partial_sums_kernel, types, {"TILE": tiles.partial}
    for gradient, factor, keep_kind in (
        ("bf16", "fp32", "row"),
        ("fp32", "fp32", "shared"),
        ("fp64", "fp64", "row"),
        ("fp16", "fp16", "none"),
    ):
        types = {"gradient": gradient, "factor": factor}
        types |= {} if keep_kind == "none" else {"keep": "i1"}
        constants = {"KEEP_KIND": keep_kind, "TILE": tiles.flat}
        yield elementwise.scale_kernel, types, constants


def main() -> int:
    failures = 0
    for target in get_targets():
        tiles = elementwise.AMD_TILES if target.startswith("gfx") else elementwise.NVIDIA_TILES
        for kernel, tensors, constants in list_kernels(tiles):
            types = {name: f"*{type_}" for name, type_ in tensors.items()}
            types |= {n: t for n, t in (INTEGERS | NUMBERS).items() if n in kernel.arg_names}
            missing = {*kernel.arg_names} - {*types, *constants}
            configuration = " ".join(f"{k}={v}" for k, v in {**tensors, **constants}.items())
            usage = compile_kernel(
                kernel,
                target,
                types,
                constants | dict.fromkeys(missing),
                divisible=("stride",) if "stride" in types else (),
                num_warps=tiles.warps,
            )
            name = kernel.fn.__name__
            print(target, name, configuration, usage.registers, usage.spilled_bytes, flush=True)
            failures += usage.has_spills
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
