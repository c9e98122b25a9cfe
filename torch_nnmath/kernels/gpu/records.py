"""What the head's plan gives to a row kernel, and what the row kernel returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowInputs(NamedTuple):
    """What turns the products x Wᵀ of all N rows into logits and losses. All are contiguous.

    z = scale ∘ (x Wᵀ) + b, and v = F19(z). Floating-point tensors are float32.
    """

    C: int  # number of classes
    b: Tensor | None  # (C)
    scale: Tensor | None  # (N, 1), or () for one that all rows share
    y: Tensor | None  # class index, (N, 1), int64
    p: Tensor | None  # weight of that class, (N, 1); without y it counts only in T = p + Σ t
    t: Tensor | None  # dense part of the target, (N, C), or (1, C) for all rows
    keep: Tensor | None  # (N, 1), bool; False for an ignored row
    base: float  # β of the logarithm
    cap: float | None  # κ of F19


class RowOutputs(NamedTuple):
    """Results of all N rows, (N, 1) each and float32 where not said otherwise.

    A row kernel writes those of its rows: 0 for an ignored row, -1 as its predicted class. Where
    a field is None, the result is not needed.
    """

    loss: Tensor | None  # c = (1/ln β)(T lse(v) - (p e_y + t)·v)
    lse: Tensor | None  # ln Σ e^v
    squared_lse: Tensor | None  # lse²
    entropy: Tensor | None  # h = (1/ln β)(lse - a·v)
    predicted: Tensor | None  # the first class with the largest logit, int64
    sums: Tensor | None  # (N, 3): m = max v, s = Σ e^{v-m}, Σ e^{v-m} (v-m)
    dc_dp: Tensor | None  # ln β dc/dp: lse - v_y, or lse without y


class RowFactors(NamedTuple):
    """What makes Δ of E = dv/dz ∘ e^{v-r}, rounded; (N, 1) each, float32, 0 for an ignored row.

    E has an entry of its own for the class y. With it Δ = softmax ∘ E + class_error e_y. In
    exact ∘ E the entry of the class is that of Δ, and the others are wrong by half a rounding.
    """

    softmax: Tensor
    exact: Tensor
    class_error: Tensor | None  # None without y or p


class RowDirection(NamedTuple):
    """The direction of the second order in bias and target, float32; None where constant."""

    σ: Tensor | None  # of b, (C)
    π: Tensor | None  # of p, (N, 1)
    τ: Tensor | None  # of t, (N, C) or (1, C)


class SecondOrderOutputs(NamedTuple):
    """Results of the second order of all N rows, (N, 1) each; None where not needed.

    0 for an ignored row.
    """

    ρ_c: Tensor | None
    ρ_q: Tensor | None
    ρ_h: Tensor | None
    dp: Tensor | None  # γβ (a·r - r_y), or γβ a·r without y
