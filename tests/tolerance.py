"""How near to the truth a result must be: PyTorch's own error at that precision, plus rounding.

|ours - truth| <= |PyTorch's - truth| + roundings(dtype) · scale, each the largest of its tensor.

The scale is the largest |truth| of the tensor, not of the element: an element near 0 is what is
left of terms as large as its neighbours. Where that is too strict in float32 and float64, because
every element of the tensor is such a remainder, the scale is how far the truth moves, for each unit
by which its inputs move relative to themselves: sums of absolute values, growing with the length of
the sum. A result as near as that is the exact one for inputs that are a few last bits off. In
half precision there is no such allowance: sums are to be kept in float32 there, and a rounding in
between (logits in bfloat16, say) is allowed only where PyTorch has it too.

In float64 PyTorch's result is the truth itself, so that its error is 0.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEP = 1e-6  # of a move: float64 resolves it, and its square is nothing
HALF = (torch.float16, torch.bfloat16)


def roundings(dtype: torch.dtype) -> float:
    """Relative error that counts as rounding: 4 eps, in half precision one."""
    return (1 if dtype in HALF else 4) * torch.finfo(dtype).eps


def moved(x: Tensor, seed: int) -> Tensor:
    """x in float64, each entry larger or smaller by a STEP of itself."""
    sign = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x.double() * (1 + STEP * sign)


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def faults(
    names: Sequence[str],
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    truth: Sequence[Tensor],
    truth_moved: Callable[[int], Sequence[Tensor]],
) -> list[str]:
    """One line for each result that has another shape or dtype than PyTorch's, or is too far off.

    `truth_moved(seed)` is the truth with its inputs `moved`; it is asked only where it matters.
    """
    lines = []
    for i, (name, a, b, exact) in enumerate(zip(names, ours, theirs, truth, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            got, expected = f"{a.dtype} {tuple(a.shape)}", f"{b.dtype} {tuple(b.shape)}"
            lines.append(f"{name}: expected {expected}, got {got}")
            continue
        ours_error, allowed = largest(a.double() - exact), largest(b.double() - exact)
        scale = largest(exact)
        near = ours_error <= allowed + roundings(a.dtype) * scale
        if not near and a.dtype not in HALF:
            moves = [largest(truth_moved(seed)[i] - exact) / STEP for seed in (1, 2)]
            scale = max(scale, *moves)
            near = ours_error <= allowed + roundings(a.dtype) * scale
        if not near:
            unit = torch.finfo(a.dtype).eps * scale
            lines.append(
                f"{name}: off by {ours_error:.3g}, PyTorch by {allowed:.3g} (eps·scale is "
                f"{unit:.3g})"
            )
    return lines
