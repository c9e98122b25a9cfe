"""How near to the truth a result must be: PyTorch's own error at that precision, plus rounding.

|ours - truth| <= |PyTorch's - truth| + roundings(dtype) · scale, each the largest of its tensor.

The truth is PyTorch's result in float64. The scale is the largest |truth| of the tensor, not of the
element: an element near 0 is what is left of terms as large as its neighbours.

Where that is too strict in float32 and float64, because a whole tensor is such a remainder, the
scale is how far the truth moves, for each unit by which its inputs move relative to themselves: a
sum of absolute values, growing with the length of the sum. A result as near as that is the exact
one for inputs that are a few last bits off. And as float64 has no better truth, PyTorch's error
there is taken to be its error in float32, in proportion.

In half precision there is no such allowance: sums are to be kept in float32 there, and a rounding
in between (logits in bfloat16, say) is allowed only where PyTorch has it too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEP = 1e-6  # of a move: float64 resolves it, and its square is nothing
HALF = (torch.float16, torch.bfloat16)
FLOAT32_TO_64 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def roundings(dtype: torch.dtype) -> float:
    """Relative error that counts as rounding: 4 eps, in half precision one."""
    return (1 if dtype in HALF else 4) * torch.finfo(dtype).eps


def moved(seed: int) -> Callable[[Tensor], Tensor]:
    """x in float64, each entry larger or smaller by a STEP of itself."""

    def move(x: Tensor) -> Tensor:
        sign = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return x.double() * (1 + STEP * sign)

    return move


def distance(x: Tensor, y: Tensor | float) -> float:
    """The largest |x - y|, of entries that are not nan in both."""
    d = (x.double() - y).abs()
    if isinstance(y, Tensor):
        d = d.masked_fill(x.isnan() & y.isnan(), 0)
    return d.max().item() if d.numel() else 0.0


def faults(
    names: Sequence[str],
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    truth: Callable[[Callable[[Tensor], Tensor]], Sequence[Tensor]],
) -> list[str]:
    """One line for each result that has another shape or dtype than PyTorch's, or is too far off.

    `truth(change)` is PyTorch's results with its inputs changed: to float64, or `moved`.
    """
    lines = []
    exact = truth(Tensor.double)
    for i, (name, a, b, t) in enumerate(zip(names, ours, theirs, exact, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            got, expected = f"{a.dtype} {tuple(a.shape)}", f"{b.dtype} {tuple(b.shape)}"
            lines.append(f"{name}: expected {expected}, got {got}")
            continue
        error, allowed, scale = distance(a, t), distance(b, t), distance(t.nan_to_num(), 0.0)
        k = roundings(a.dtype)
        if not error <= allowed + k * scale and a.dtype not in HALF:
            scale = max(scale, *(distance(truth(moved(s))[i], t) / STEP for s in (1, 2)))
            if a.dtype == torch.float64:
                narrow = truth(Tensor.float)[i]
                wide = truth(lambda x: x.float().double())[i]
                allowed = max(allowed, distance(narrow, wide) * FLOAT32_TO_64)
        if not error <= allowed + k * scale:
            eps = torch.finfo(a.dtype).eps * scale
            lines.append(
                f"{name}: off by {error:.3g}, PyTorch by {allowed:.3g} (eps·scale {eps:.3g})"
            )
    return lines
