"""The comparison of gradients entry by entry, and its tolerances."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_nnmath.lightning._replay import Gradients, max_abs

SOURCES = {
    "pytorch": "PyTorch's own operations give",
    "numerical": "numerical differentiation gives",
}


class Comparison(NamedTuple):
    """A derivative compared with its expected value.

    Error and uncertainty are relative to the gradient. If `parameter` is "", the derivative is that
    along a direction in all parameters.
    """

    kind: Literal["pytorch", "numerical"]
    parameter: str
    entry: tuple[int, ...]
    found: float
    expected: float
    error: float
    tolerance: float
    uncertainty: float = 0.0

    def __str__(self) -> str:
        subject = f"gradient with respect to {self.parameter}{list(self.entry)}"
        if not self.parameter:
            subject = "derivative along a random direction in all parameters"
        return (
            f"the {subject} is {self.found:.6g}, "
            f"{SOURCES[self.kind]} {self.expected:.6g}: the relative error is {self.error:.2g}, "
            f"{self.tolerance:.2g} is allowed"
        )


class Limits(NamedTuple):
    """The limits that rounding sets to a comparison in the training's precision."""

    tolerance: float  # the relative error that rounding may cause
    scale_floor: (
        float  # the smallest scale of an error, as a fraction of the gradients' largest entry
    )


def choose_limits(precision: str, parameters: Iterable[Tensor]) -> Limits:
    """Returns the limits for the Trainer's precision and the parameters' types."""
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    is_half = (
        "16" in precision
        or precision.startswith("transformer")
        or any(dtype.itemsize < 4 for dtype in dtypes)
    )
    if is_half:
        return Limits(1e-1, 1e-1)
    if torch.float32 not in dtypes:
        return Limits(1e-5, 1e-3)
    is_full_float32 = torch.get_float32_matmul_precision() == "highest"
    return Limits(1e-3 if is_full_float32 else 1e-2, 1e-3)


def compare_entries(
    name: str, gradients: Gradients, expected: Gradients, limits: Limits
) -> Comparison:
    """Compares a parameter's gradient with PyTorch's and returns its worst entry.

    Where both are nan or the same infinity, the error is 0.
    """
    a, b = gradients.by_name[name].double(), expected.by_name[name].double()
    is_same = (a == b) | (a.isnan() & b.isnan())
    distance = (a - b).abs().masked_fill(is_same, 0).nan_to_num(math.inf)
    entry = unravel_index(int(distance.argmax()), a.shape)
    scale = max(max_abs(b), limits.scale_floor * expected.largest)
    error = divide_error(distance[entry].item(), scale)
    found_entry, expected_entry = a[entry].item(), b[entry].item()
    return Comparison("pytorch", name, entry, found_entry, expected_entry, error, limits.tolerance)


def unravel_index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    """Returns the indices of an entry from its index in row-major order."""
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def divide_error(error: float, scale: float) -> float:
    """Returns error / scale; for a scale of 0, infinity, or 0 if there is no error."""
    return error / scale if scale else math.inf if error else 0.0
