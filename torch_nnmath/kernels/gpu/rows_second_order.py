"""The row kernel of the head's second order in PyTorch operations, for a GPU without Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nnmath._precision import zero_safe_product
from torch_nnmath._records import Target, UpstreamGradients
from torch_nnmath.kernels._block import select_target
from torch_nnmath.kernels.gpu.records import (
    RowDirection,
    RowInputs,
    RowOutputs,
    SecondOrderOutputs,
)
from torch_nnmath.kernels.gpu.rows import CHUNK_BYTES, Rows

NO_OUTPUTS = RowOutputs(*[None] * 7)


def process_rows(
    z: Tensor,
    r: Tensor,
    deltas: tuple[Tensor, Tensor] | None,
    rows: slice,
    inputs: RowInputs,
    upstream: UpstreamGradients,
    direction: RowDirection,
    outputs: SecondOrderOutputs,
) -> None:
    """Writes the second order of the rows `rows`, and into `deltas` Q and Δ, rounded once.

    `z` and `r` (rows, C or more) are x Wᵀ and U Wᵀ + X Vᵀ, which are overwritten.
    """
    size, C = max(CHUNK_BYTES // (4 * max(inputs.C, 1)), 1), inputs.C
    for i in range(0, len(z), size):
        chunk = slice(rows.start + i, min(rows.start + i + size, rows.stop))
        chunk_of_rows = Rows(z[i : i + size, :C], chunk, inputs)
        second_order = _SecondOrderRows(chunk_of_rows, r[i : i + size, :C], upstream, direction)
        second_order.write_derivatives(outputs)
        if deltas is not None:
            Q, Δ = (matrix[i : i + size, :C] for matrix in deltas)
            second_order.write_deltas(Q, Δ)


class _SecondOrderRows:
    """Some rows: r = dv/dz ∘ (R + σ), and their sums along the direction."""

    def __init__(self, rows: Rows, r: Tensor, upstream: UpstreamGradients, direction: RowDirection):
        self.rows = rows
        rows.compute_softmax(None, NO_OUTPUTS)
        self.coefficients = rows.select_coefficients(upstream)
        σ, π, τ = direction
        self.dtarget = select_target(Target(None, π, τ), rows.rows)._replace(y=rows.target.y)
        r = r if σ is None else r.add_(σ)
        self.r = rows.mask_(r if rows.cap is None else r.mul_(rows.compute_slope()))
        self.shifted = rows.v - rows.m
        self.a = self.shifted.exp() / rows.s
        ar = self.a * self.r
        self.ar = ar.sum(1, keepdim=True)
        self.avr = zero_safe_product(ar, self.shifted).sum(1, keepdim=True)
        y = rows.target.y
        self.r_y: Any = 0.0 if y is None else self.r.gather(1, y)

    def write_derivatives(self, outputs: SecondOrderOutputs) -> None:
        """ρ_c = (1/ln β)((T a - t)·r + (lse - v)·t'), ρ_q = 2 lse a·r, ρ_h = dh, dp."""
        rows, ar, mask, ln = self.rows, self.ar, self.rows.mask, self.rows.ln
        place, target = rows.rows, rows.target
        if outputs.ρ_c is not None:
            dc = target.total() * ar - target.dot(self.r) + rows.compute_loss(self.dtarget)
            outputs.ρ_c[place] = mask(dc) / ln
        if outputs.ρ_q is not None:
            outputs.ρ_q[place] = mask(2 * (rows.s.log() + rows.m) * ar)
        if outputs.ρ_h is not None:
            outputs.ρ_h[place] = mask(self._compute_entropy_derivative()) / ln
        if outputs.dp is not None:
            γβ, _, _ = self.coefficients
            outputs.dp[place] = mask(γβ * (ar - self.r_y))

    def _compute_entropy_derivative(self) -> Tensor:
        """ln β dh = -(a ∘ (l - a·l))·r."""
        return self.rows.ev / self.rows.s * self.ar - self.avr

    def write_deltas(self, Q: Tensor, Δ: Tensor) -> None:
        """With slope = dv/dz and D = γβ T' + 2 ω a·r - η ρ_h:
        G = a ∘ B - γβ (p e_y + t), dG = a ∘ ((r - a·r) ∘ (B - ηβ) + D) - γβ (π e_y + τ),
        Δ = slope ∘ G, Q = slope ∘ dG - (2/κ²) v ∘ G ∘ r.
        """
        rows, r, (γβ, ω, ηβ) = self.rows, self.r, self.coefficients
        D = γβ * self.dtarget.total()
        if ω is not None:
            D = D + 2 * ω * self.ar
        if ηβ is not None:
            D = D - ηβ * rows.mask(self._compute_entropy_derivative())
        B = rows.compute_weight(self.coefficients)
        G = rows.compute_logit_gradient(self.shifted, B, self.coefficients)
        # where v is -inf, B is infinite with an entropy, and r - a·r may be 0
        change = (r - self.ar) * B if ηβ is None else zero_safe_product(r - self.ar, B - ηβ)
        dG = zero_safe_product(self.a, change + D)
        dG = self.dtarget.scale(γβ).subtract_from(dG)
        if rows.cap is not None:
            slope = rows.compute_slope()
            dG = slope * dG - (2 / rows.cap**2) * rows.v * G * r
            G = slope * G
        Q.copy_(rows.mask_(dG))
        Δ.copy_(rows.mask_(G))
