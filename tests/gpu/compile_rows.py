"""Compiles the row-wise kernels for all targets; fails if one does not compile or spills."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
from ahead_of_time import TARGETS, compile_kernel

from torch_nnmath.kernels.gpu import row_plans, triton_rows

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
    """The plan on the target; the softmax product has no `t` but two operands too."""
    with mock.patch.object(torch.version, "hip", "7" if target.startswith("gfx") else None):
        return row_plans.choose_plan(view, 1 if pointers.get("t", "") is None else 2, 132)


def compile_one(
    kernel: Any,
    target: str,
    view: torch.Tensor,
    pointers: dict[str, str | None],
    plan: row_plans.Plan,
    passes: Any,
) -> Any:
    """Compiles the plan's kernel for rows like `view`; an absent pointer is None."""
    is_strided = view.stride(2) == 1
    constants: dict[str, Any] = {name: None for name, type_ in pointers.items() if not type_}
    constants["IS_ALIGNED"] = is_strided and view.shape[2] % 16 == 0
    if plan.is_tile:
        constants |= {"ROWS": plan.shape[0], "CLASSES": plan.shape[1]}
    else:
        constants |= {
            "IS_SHARED": plan.steps[0] > 0,
            "LANES": plan.shape[0],
            "WIDTH": plan.shape[1],
            "LANE_STEP": plan.steps[0],
            "STEP": plan.steps[1],
            "PASSES": passes.value,
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


def list_cases() -> list[tuple[str, str, torch.dtype, dict[str, str | None], Any]]:
    """(kernel, shape, dtype of the logits, pointers, passes)."""
    cases = []
    for size in SHAPES:
        is_split = size == "2^20"
        for dtype in (torch.float32, torch.bfloat16):
            z = POINTERS[dtype]
            hard: dict[str, str | None] = {"y": "*i64", "p": "*fp32", "t": None, "keep": "*u8"}
            dense: dict[str, str | None] = {"y": "*i64", "p": z, "t": z, "keep": None}
            for target in (hard, dense) if dtype == torch.float32 or size == "32000" else (hard,):
                pointers = {"z": z, **target, "dc": "*fp32", "c": "*fp32", "dz": z}
                kinds = (
                    (triton_rows.FIRST, triton_rows.SECOND) if is_split else (triton_rows.WHOLE,)
                )
                cases += [("cross_entropy", size, dtype, pointers, kind) for kind in kinds]
        pointers = {"a": z, "v": z, "out": z}
        kinds = (triton_rows.FIRST, triton_rows.SECOND) if is_split else (triton_rows.WHOLE,)
        cases += [("softmax_product", size, dtype, pointers, kind) for kind in kinds]
    return cases


def main() -> int:
    failures = 0
    for target in sys.argv[1:] or TARGETS:
        for name, size, dtype, pointers, passes in list_cases():
            view = make_view(SHAPES[size], dtype)
            plan = choose_plan(target, view, pointers)
            kernel = getattr(triton_rows, f"{name}_{'tile' if plan.is_tile else 'loop'}")
            given = "".join(key[0] for key, type_ in pointers.items() if type_)
            label = f"{target} {kernel.__name__} {size} {dtype} {given} passes={passes.value}"
            try:
                usage = compile_one(kernel, target, view, pointers, plan, passes)
            except Exception as error:  # every failure is listed
                failures += 1
                print(f"{label}: {type(error).__name__}: {error}")
                continue
            failures += usage.spilled_bytes > 0
            print(f"{label} {plan.shape} warps={plan.num_warps}: {usage}", flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
