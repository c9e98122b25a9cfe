"""The head's row kernel in PyTorch operations, for a GPU without Triton.

`triton_head.process_rows` does the same in two reads and one write.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import zero_safe_product
from torch_nnmath._records import Target, UpstreamGradients
from torch_nnmath.kernels._block import select_target
from torch_nnmath.kernels.gpu.records import RowInputs, RowOutputs

CHUNK_BYTES = 2**25  # of the rows that are processed together: their temporaries stay in the L2


def process_rows(
    z: Tensor,
    G: Tensor | None,
    rows: slice,
    inputs: RowInputs,
    upstream: UpstreamGradients | None,
    sums: Tensor | None,
    outputs: RowOutputs,
) -> None:
    """Writes the results of the rows `rows`, and Δ of these into G, rounded once.

    `z` (rows, C or more) are the products x Wᵀ, which are overwritten. Given `sums`, only G and
    dc/dp are computed.
    """
    size = max(CHUNK_BYTES // (4 * max(inputs.C, 1)), 1)
    for i in range(0, len(z), size):
        chunk = slice(rows.start + i, min(rows.start + i + size, rows.stop))
        G_chunk = None if G is None else G[i : i + size, : inputs.C]
        chunk_of_rows = Rows(z[i : i + size, : inputs.C], chunk, inputs)
        chunk_of_rows.compute_softmax(sums, outputs)
        if G_chunk is not None and upstream is not None:
            chunk_of_rows.write_delta(G_chunk, upstream)


class Rows:
    """Some rows: v, and the sums m, s, Σ e^{v-m} (v-m)."""

    def __init__(self, z: Tensor, rows: slice, inputs: RowInputs):
        _, b, scale, y, p, t, keep, base, cap = inputs
        self.ln, self.cap, self.rows = math.log(base), cap, rows
        self.target = select_target(Target(y, p, t), rows)
        self.ignored_mask = None if keep is None else ~keep[rows]
        if scale is not None:
            z.mul_(scale[rows] if scale.dim() else scale)
        if b is not None:
            z.add_(b)
        z = self.mask_(z)
        self.v = z if cap is None else z.div_(cap).tanh_().mul_(cap)

    def compute_softmax(self, sums: Tensor | None, outputs: RowOutputs) -> None:
        """Computes the sums, unless they are given, and writes the results."""
        rows, v = self.rows, self.v
        if sums is not None:
            self.m, self.s, self.ev = sums[rows].split(1, 1)
        else:
            self.m = v.amax(1, keepdim=True)
            shifted = v - self.m
            e = shifted.exp()
            self.s = e.sum(1, keepdim=True)
            self.ev = zero_safe_product(e, shifted).sum(1, keepdim=True)
        lse = self.mask(self.s.log() + self.m)
        # the class's log-probability from v - m, since lse - v_y cancels
        self.dc_dp = dc_dp = lse
        if self.target.y is not None:
            self.dc_dp = dc_dp = self.s.log() - (v.gather(1, self.target.y) - self.m)
        if outputs.dc_dp is not None:
            outputs.dc_dp[rows] = self.mask(dc_dp)
        if outputs.loss is not None:
            outputs.loss[rows] = self.mask(self.compute_loss(self.target)) / self.ln
        if outputs.lse is not None:
            outputs.lse[rows] = lse
        if outputs.squared_lse is not None:
            outputs.squared_lse[rows] = lse.square()
        if outputs.entropy is not None:
            outputs.entropy[rows] = self.mask(self.s.log() - self.ev / self.s) / self.ln
        if outputs.predicted is not None:
            outputs.predicted[rows] = self.mask(v.argmax(1, keepdim=True), -1)
        if outputs.sums is not None:
            outputs.sums[rows] = torch.cat((self.m, self.s, self.ev), 1)

    def compute_loss(self, target: Target) -> Tensor:
        """ln β c of a target with the rows' classes: p dc/dp + Σ t (lse - v)."""
        loss, (_, p, t, _) = torch.zeros_like(self.dc_dp), target
        if p is not None:
            loss = loss + zero_safe_product(p, self.dc_dp)
        if t is not None:
            terms = zero_safe_product(t, self.v - self.m)
            loss = loss + t.sum(1, keepdim=True) * self.s.log() - terms.sum(1, keepdim=True)
        return loss

    def write_delta(self, G: Tensor, upstream: UpstreamGradients) -> None:
        """Δ = dv/dz ∘ (a ∘ B - γβ t) - γβ p dv_y/dz_y e_y, B = γβ T + 2 ω lse - ηβ (l - a·l)."""
        coefficients = self.select_coefficients(upstream)
        B = self.compute_weight(coefficients)
        delta = self.compute_logit_gradient(self.v - self.m, B, coefficients)
        if self.cap is not None:
            delta *= self.compute_slope()
        G.copy_(self.mask_(delta))

    def compute_weight(self, coefficients: tuple[Any, Any, Any]) -> Tensor:
        """B of each entry, or of each row without an entropy."""
        γβ, ω, ηβ = coefficients
        B: Tensor = γβ * self.target.total()
        if ω is not None:
            B = B + 2 * ω * self.mask(self.s.log() + self.m)
        if ηβ is not None:  # l - a·l = (v - m) - a·(v - m)
            B = B + ηβ * (self.ev / self.s) - zero_safe_product(ηβ, self.v - self.m)
        return B

    def compute_logit_gradient(
        self, shifted: Tensor, B: Tensor, coefficients: tuple[Any, Any, Any]
    ) -> Tensor:
        """a ∘ B - γβ (p e_y + t), a = e^{v-m} / s."""
        γβ, _, _ = coefficients
        gradient = zero_safe_product(shifted.exp() / self.s, B)
        return self.target.scale(γβ).subtract_from(gradient)

    def compute_slope(self) -> Tensor:
        """dv/dz = 1 - (v/κ)²."""
        assert self.cap is not None
        u = self.v / self.cap
        return (1 - u) * (1 + u)

    def select_coefficients(self, upstream: UpstreamGradients) -> tuple[Any, Any, Any]:
        """γ/ln β, ω and η/ln β of each row, 0 where ignored."""

        def select(value: Tensor | None, divisor: float) -> Tensor | None:
            if value is None:
                return None
            return self.mask((value[self.rows] if value.dim() else value) / divisor)

        γ, ω, η = upstream
        return select(γ, self.ln), select(ω, 1), select(η, self.ln)

    def mask(self, value: Tensor, fill: int = 0) -> Tensor:
        """The value of each row, `fill` in the ignored ones."""
        return value if self.ignored_mask is None else value.masked_fill(self.ignored_mask, fill)

    def mask_(self, z: Tensor) -> Tensor:
        """Overwrites the ignored rows with 0."""
        return z if self.ignored_mask is None else z.masked_fill_(self.ignored_mask, 0)
