"""Tolerances from PyTorch's own error: |ours - truth| <= |PyTorch's - truth| + k eps scale.

Both errors are the largest of their tensor. The truth is PyTorch's result in float64, k is 4, or 1
in half precision. The scale is the largest |truth| of the tensor, not of the element: an element
near 0 may be the remainder of terms as large as its neighbours.

In float32 and float64 a whole tensor may be such a remainder. There the scale may also be the
condition number: how far the truth moves per unit by which its inputs move relative to themselves.
A result within that bound is exact for inputs that differ in a few last bits. As nothing is more
exact than float64, PyTorch's error there is derived from its error in float32.

In half precision the allowance is that of float32, in which sums have to be accumulated. An
intermediate rounding, of logits to bfloat16 for example, is allowed only where PyTorch has it too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEP = 1e-6  # relative; float64 resolves it, and its square is negligible
HALF = (torch.float16, torch.bfloat16)
FLOAT32_TO_64 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def get_rounding_tolerance(dtype: torch.dtype) -> float:
    """Returns the relative error that counts as rounding: 4 eps, in half precision one."""
    return (1 if dtype in HALF else 4) * torch.finfo(dtype).eps


def make_perturbation(seed: int) -> Callable[[Tensor], Tensor]:
    """Returns a function of x: x in float64, each entry times 1 + STEP or 1 - STEP."""

    def perturb(x: Tensor) -> Tensor:
        sign = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return x.double() * (1 + STEP * sign)

    return perturb


def compute_distance(x: Tensor, y: Tensor | float) -> float:
    """Returns the largest |x - y| over the entries that are not nan in both."""
    d = (x.double() - y).abs()
    if isinstance(y, Tensor):
        d = d.masked_fill(x.isnan() & y.isnan(), 0)
    return d.max().item() if d.numel() else 0.0


def find_errors(
    names: Sequence[str],
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    truth: Callable[[Callable[[Tensor], Tensor]], Sequence[Tensor]],
    cancellation: float = 0.0,
) -> list[str]:
    """Returns a line for each result with a wrong shape or dtype or too large an error.

    `truth(change)` computes PyTorch's results with `change` applied to each input, which casts or
    perturbs it. `cancellation` is the absolute error of terms that cancel, which is allowed, too.
    """
    lines = []
    in_float64 = truth(Tensor.double)
    for i, (name, a, b, t) in enumerate(zip(names, ours, theirs, in_float64, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            got, expected = f"{a.dtype} {tuple(a.shape)}", f"{b.dtype} {tuple(b.shape)}"
            lines.append(f"{name}: expected {expected}, got {got}")
            continue
        error, allowed = compute_distance(a, t), compute_distance(b, t) + cancellation
        scale = compute_distance(t.nan_to_num(), 0.0)
        k = get_rounding_tolerance(a.dtype)
        if not error <= allowed + k * scale:
            condition = max(
                compute_distance(truth(make_perturbation(s))[i], t) / STEP for s in (1, 2)
            )
            if a.dtype in HALF:
                allowed += get_rounding_tolerance(torch.float32) * condition
            else:
                scale = max(scale, condition)
            if a.dtype == torch.float64:
                in_float32 = truth(Tensor.float)[i]
                of_rounded_inputs = truth(lambda x: x.float().double())[i]
                error_in_float32 = compute_distance(in_float32, of_rounded_inputs)
                allowed = max(allowed, error_in_float32 * FLOAT32_TO_64)
        if not error <= allowed + k * scale:
            eps = torch.finfo(a.dtype).eps * scale
            lines.append(
                f"{name}: off by {error:.3g}, PyTorch by {allowed:.3g} (eps·scale {eps:.3g})"
            )
    return lines
