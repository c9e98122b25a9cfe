"""F24 in NumPy: a log-sum-exp whose classes are split, beside the one of all classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from torch_nnmath.reference import NUMPY, VJP, Array, Elementary, Form, Forms, column, shift


def split_log_sum_exp_element(z: Array, *, sizes: Sequence[int], fn: Elementary = NUMPY) -> VJP:
    """F24: m = max_r m_r,  s = Σ_r s_r,  s_r = Σ_{j in r} e^{z_j - m},  lse = m + ln s.

    dlse/dz_j = e^{z_j - m} / s = e^{z_j - lse}.
    """
    ends = list(accumulate(sizes))
    shards = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    m = max(shift(z[[*J]]) for J in shards if J)
    s = sum(sum(fn.exp(z[j, 0] - m) for j in J) for J in shards)

    def pullback(g: float) -> tuple[Array]:
        return (column(g * fn.exp(z[j, 0] - m) / s for J in shards for j in J),)

    return m + fn.log(s), pullback


def split_log_sum_exp_matrix(z: Array, *, sizes: Sequence[int], fn: Elementary = NUMPY) -> VJP:
    """F24: lse = ln 1ᵀ e^z of all classes,  dz = g softmax(z): what the split sums must give."""
    if sum(sizes) != len(z):
        raise ValueError(f"sizes {sizes} do not split {len(z)} classes")
    e = fn.exp(z - shift(z))
    s = np.ones_like(e).T @ e
    return shift(z) + fn.log(s.item()), lambda g: (g * e / s,)


SPLIT_LOG_SUM_EXP = Forms(Form(split_log_sum_exp_element), Form(split_log_sum_exp_matrix))
