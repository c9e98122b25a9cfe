"""The formulas of weighted losses in NumPy, as in `torch_nnmath.reference`."""

from __future__ import annotations

from typing import Any

from torch_nnmath.reference import NUMPY, VJP, Array, Elementary, Form, Forms, column


def weighted_cost_element(c: Array, r: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F30: C = Σ_i r_i c_i / Σ_i r_i.

    dC/dc_i = r_i / Σ_k r_k,  dC/dr_i = (c_i - C) / Σ_k r_k.
    """
    I = range(len(c))
    total = sum(r[i, 0] for i in I)
    C = sum(r[i, 0] * c[i, 0] for i in I) / total
    return C, lambda g: (
        column(g * r[i, 0] / total for i in I),
        column(g * (c[i, 0] - C) / total for i in I),
    )


def weighted_cost_matrix(c: Array, r: Array, *, fn: Elementary = NUMPY) -> VJP:
    """F30: C = rᵀ c / (1ᵀ r),  dc = g r / (1ᵀ r), dr = g (c - C) / (1ᵀ r)."""
    total: Any = r.sum()
    C = (r.T @ c).item() / total
    return C, lambda g: (g * r / total, g * (c - C) / total)


WEIGHTED_COST = Forms(Form(weighted_cost_element), Form(weighted_cost_matrix))
