"""Compiles the row-wise kernels for all targets; fails if one does not compile or spills."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
from ahead_of_time import compile_kernel, get_targets

from torch_nnmath.kernels.gpu import row_plans, triton_rows, triton_softmax

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHAPES = {  # (B, C, n), and whether the classes are next to each other in memory
    "10": (1, 10, 4096),
    "1000": (1, 1000, 4096),
    "16384": (1, 16384, 512),
    "32000": (1, 32000, 4096),
    "50257": (1, 50257, 4096),
    "2^20": (1, 2**20, 1),
    "21 x 4096": (8, 21, 4096),
    "1000 x 49": (8, 1000, 49),
}


def make_view(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    B, C, n = shape
    if B == 1:
        return torch.empty(1, n, C, dtype=dtype, device="meta").transpose(1, 2)
    return torch.empty(B, C, n, dtype=dtype, device="meta")


def choose_plan(target: str, view: torch.Tensor, pointers: dict[str, str | None]) -> row_plans.Plan:
    """The plan on the target; a product has no `t` but two operands too."""
    with mock.patch.object(torch.version, "hip", "7" if target.startswith("gfx") else None):
        return row_plans.choose_plan(view, 1 if pointers.get("t", "") is None else 2, 132)


def compile_one(
    kernel: Any,
    target: str,
    view: torch.Tensor,
    pointers: dict[str, str | None],
    plan: row_plans.Plan,
    options: dict[str, Any],
) -> Any:
    """Compiles the plan's kernel for rows like `view`; an absent pointer is None."""
    is_strided = view.stride(2) == 1
    constants: dict[str, Any] = {name: None for name, type_ in pointers.items() if not type_}
    constants |= options
    constants["IS_ALIGNED"] = is_strided and view.shape[2] % 16 == 0
    if plan.is_tile:
        constants |= {"ROWS": plan.shape[0], "CLASSES": plan.shape[1]}
        del constants["PASSES"]
    else:
        constants |= {
            "IS_SHARED": plan.steps[0] > 0,
            "LANES": plan.shape[0],
            "WIDTH": plan.shape[1],
            "LANE_STEP": plan.steps[0],
            "STEP": plan.steps[1],
            "SLICES": 1 << (plan.slices - 1).bit_length(),
            "STAGES": plan.num_stages,
        }
        if plan.slices == 1:
            constants["partials"] = None
    integers: dict[str, tuple[str, int]] = {"b": ("i32", view.stride(0))}
    integers["n" if is_strided else "c"] = ("i32", 1)
    integers["c" if is_strided else "n"] = ("i32", view.stride(1 if is_strided else 2))
    types: dict[str, str] = {name: type_ for name, type_ in pointers.items() if type_}
    divisible = []
    for name in kernel.arg_names:
        if name in constants or name in types:
            continue
        if len(name) == 2 and name[1] in integers and name != "dc":
            types[name], value = integers[name[1]]
            if value == 1:
                constants[name] = types.pop(name) and 1
            elif value % 16 == 0:
                divisible.append(name)
        elif name == "dk":
            constants |= {} if is_strided else {"dk": 1}
            types |= {"dk": "i32"} if is_strided else {}
            divisible += ["dk"] if is_strided and view.stride(1) % 16 == 0 else []
        elif name == "partials":
            types[name] = "*fp32"
        elif name.endswith("_stride"):
            constants[name] = 1
        else:
            types[name] = "fp32" if name == "inverse_log" else "i32"
            if name == "C" and view.shape[1] % 16 == 0:
                divisible.append(name)
    return compile_kernel(
        kernel, target, types, constants, tuple(divisible), num_warps=plan.num_warps
    )


def list_cases() -> list[tuple[Any, str, torch.dtype, dict[str, str | None], dict[str, Any]]]:
    """(kernels, shape, dtype of the logits, pointers, constants)."""
    row_functions = triton_rows.row_function_tile, triton_rows.row_function_loop
    products = triton_softmax.product_tile, triton_softmax.product_loop
    cases = []
    for size in SHAPES:
        kinds = (triton_rows.FIRST, triton_rows.SECOND) if size == "2^20" else (triton_rows.WHOLE,)
        for dtype in (torch.float32, torch.bfloat16):
            z = POINTERS[dtype]
            hard: dict[str, str | None] = {"y": "*i64", "p": "*fp32", "t": None, "keep": "*u8"}
            dense: dict[str, str | None] = {"y": "*i64", "p": z, "t": z, "keep": None}
            none: dict[str, str | None] = {"y": None, "p": None, "t": None, "keep": None}
            targets = [(hard, triton_rows.CROSS_ENTROPY)]
            if dtype == torch.float32 or size == "32000":
                targets += [(dense, triton_rows.CROSS_ENTROPY), (none, triton_rows.ENTROPY)]
            if size == "32000":  # as cross entropy without a target
                targets.append((none, triton_rows.Z_LOSS))
            for passes in kinds:
                for target, function in targets:
                    pointers = {"z": z, **target, "dc": "*fp32", "c": "*fp32", "dz": z}
                    constants = {"FUNCTION": function.value, "PASSES": passes.value}
                    cases.append((row_functions, size, dtype, pointers, constants))
                is_long = size in ("16384", "32000")
                if dtype == torch.bfloat16 and not is_long:
                    continue
                for is_log in (False, True) if is_long and dtype == torch.float32 else (False,):
                    constants = {"IS_LOG": is_log, "PASSES": passes.value}
                    cases.append((products, size, dtype, {"a": z, "v": z, "out": z}, constants))
    return cases


def main() -> int:
    failures = 0
    for target in get_targets():
        # the code for the other NVIDIA GPUs differs little from that for sm_90
        step = 1 if target in ("sm_90", "gfx942") else 3
        for (tile, loop), size, dtype, pointers, constants in list_cases()[::step]:
            view = make_view(SHAPES[size], dtype)
            plan = choose_plan(target, view, pointers)
            kernel = tile if plan.is_tile else loop
            given = "".join(key[0] for key, type_ in pointers.items() if type_)
            label = f"{target} {kernel.__name__} {size} {dtype} {given} {constants}"
            try:
                usage = compile_one(kernel, target, view, pointers, plan, constants)
            except Exception as error:  # every failure is listed
                failures += 1
                print(f"{label}: {type(error).__name__}: {error}")
                continue
            failures += usage.has_spills
            print(f"{label} {plan.shape} warps={plan.num_warps}: {usage}", flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
