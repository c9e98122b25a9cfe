"""The head on a GPU: products by cuBLAS, one pass of a row kernel between them.

For each block of rows, slab by slab: z = X Wᵀ in float32, and the row kernel writes Δ of the
block; then dX = Δ W and dW += Δᵀ X, one product each. `plan` chooses blocks and slabs. The
arguments and results are those of the operators in `kernels.linear_cross_entropy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import HALF, wide_type
from torch_nnmath._records import HeadInputs, InputValues, Requests, UpstreamGradients
from torch_nnmath.kernels.dispatch import has_triton
from torch_nnmath.kernels.gpu import rows, rows_second_order
from torch_nnmath.kernels.gpu.plan import make_plan, pad
from torch_nnmath.kernels.gpu.products import add_product, multiply, multiply_split
from torch_nnmath.kernels.gpu.records import (
    RowDirection,
    RowInputs,
    RowOutputs,
    SecondOrderOutputs,
)
from torch_nnmath.kernels.gpu.single_read import SingleRead, may_read_once
from torch_nnmath.kernels.linear_cross_entropy import (
    allocate_rows,
    is_rounded_now,
    round_gradients,
)


def choose_row_kernels(dtype: torch.dtype) -> tuple[Callable[..., None], Callable[..., None]]:
    """`process_rows` of the first and of the second order, for logits of a type.

    Triton's if it is installed and the logits are float32.
    """
    if dtype == torch.float32 and has_triton():
        from torch_nnmath.kernels.gpu import triton_head, triton_second_order

        return triton_head.process_rows, triton_second_order.process_rows
    return rows.process_rows, rows_second_order.process_rows


class _Operands:
    """The head's inputs as operands of the products, and the buffers that all blocks share."""

    def __init__(
        self,
        inputs: HeadInputs,
        needs: InputValues,
        needs_delta: bool,
        buffers: int = 1,
        reads_once: bool = False,
    ):
        x, _, b, target, keep, base, cap, _, features, scale, _ = inputs
        y, p, t, _ = target
        W = inputs.round_weight()
        self.W, self.keep = W, keep
        self.dW_dtype = inputs.W.dtype
        is_dW_half = needs.W and self.dW_dtype in HALF
        self.plan = make_plan(x, W, buffers, is_dW_half, scales_features=reads_once)
        self.dtype = dtype = wide_type(W.dtype)  # of logits and sums
        x = x if keep is None else x.masked_fill(~keep, 0)  # 0 times nan would be nan
        self.x = self.features = x.to(W.dtype)
        self.wide_x = None  # features of wider type than the weight
        is_scaled = features is not None and features.dtype == W.dtype
        if is_scaled:
            assert features is not None
            self.features = features if keep is None else features.masked_fill(~keep, 0)
        elif x.dtype.itemsize > W.dtype.itemsize:
            self.wide_x = x
        self.row_inputs = RowInputs(
            C=len(W),
            b=_cast(b, dtype),
            scale=_cast(scale, dtype) if is_scaled else None,
            y=None if y is None else y.contiguous(),
            p=_cast(p, dtype),
            t=_cast(t, dtype),
            keep=None if keep is None else keep.contiguous(),
            base=base,
            cap=cap,
        )
        self.slab = W.new_empty((self.plan.slab_rows, pad(len(W))), dtype=dtype)
        self.delta = self.allocate_delta() if needs_delta else None

    def allocate_delta(self) -> Tensor:
        """Memory for Δ of a block."""
        return self.W.new_empty((self.plan.block_rows, pad(len(self.W))))

    def compute_products(self, rows: slice) -> Tensor:
        """X Wᵀ of some rows, in the slab; before the scale that `row_inputs` has."""
        z = self.slab[: rows.stop - rows.start]
        out = z[:, : len(self.W)]
        if self.wide_x is not None:
            multiply_split(self.wide_x[rows], self.W.t(), out)
        else:
            multiply(self.features[rows], self.W.t(), out)
        return z

    def compute_direction(
        self, rows: slice, R: Tensor, U: Tensor | None, V: Tensor | None
    ) -> Tensor:
        """U Wᵀ + X Vᵀ of some rows, in the slab R."""
        r = R[: rows.stop - rows.start]
        out = r[:, : len(self.W)]
        if U is None and V is None:
            out.zero_()
        elif U is None or V is None:
            A, B = (self.x, V) if U is None else (U, self.W)
            assert B is not None
            multiply(A[rows], B.t(), out)
        else:
            multiply(U[rows], self.W.t(), out)
            add_product(out, self.x[rows], V.t())
        return r


class _Gradients:
    """The gradients of x, W and b, block by block.

    Of several blocks, dW accumulates in float32. Gradients of float16 are divided by `unit` in
    float32, which makes Δ as large as the upstream gradients of a sum.
    """

    def __init__(
        self,
        operands: _Operands,
        needs: InputValues,
        gamma: Tensor | None,
        unit: Tensor | None,
        single_read: SingleRead | None = None,
    ):
        self.operands, self.unit, self.single_read = operands, unit, single_read
        x, W, dtype = operands.x, operands.W, operands.dW_dtype
        N, (C, D) = len(x), W.shape
        is_rounded = is_rounded_now(gamma, dtype, W.device)
        if operands.plan.has_accumulator or unit is not None or not is_rounded:
            dtype = operands.dtype
        self.dx = x.new_empty((N, D) if needs.x else 0, dtype=operands.dtype)
        self.dW = W.new_empty((C, D) if needs.W else 0, dtype=dtype)
        self.db = W.new_zeros(C if needs.b else 0, dtype=operands.dtype)
        self.needs, self.is_first = needs, True

    def add_block(self, block: slice, delta: Tensor, direction: Any = None) -> None:
        """dX = Δ W,  dW += Δᵀ X,  db += Σ_rows Δ.

        With a direction (Q, V, U), the second order: Q takes the place of Δ, and Δ V and Δᵀ U are
        added. With a single read, E takes the place of Δ.
        """
        x, W, single_read = self.operands.x[block], self.operands.W, self.single_read
        Δ = delta[: block.stop - block.start, : len(W)]
        Q, V, U = (Δ, None, None) if direction is None else direction
        Q = Q[: block.stop - block.start, : len(W)]
        if self.needs.x:
            dx = multiply(Q, W, self.dx[block])
            if V is not None:
                add_product(dx, Δ, V)
            if single_read is not None:
                single_read.finish_dx_(dx, block)
            if self.operands.keep is not None:  # 0 times inf is nan
                dx.masked_fill_(~self.operands.keep[block], 0)
        if self.needs.W:
            if single_read is not None:
                x = single_read.scale_features(x, block)
            if self.is_first:
                multiply(Q.t(), x, self.dW)
            else:
                add_product(self.dW, Q.t(), x)
            if U is not None:
                add_product(self.dW, Δ.t(), U[block])
        if self.needs.b and single_read is not None:
            self.db += single_read.sum_rows(Q, block)
        elif self.needs.b:
            self.db += Q.sum(0, dtype=self.db.dtype)
        self.is_first = False

    def finish(self) -> InputValues:
        """The gradients, not yet rounded; empty where they are not needed."""
        dx, dW, db = self.dx, self.dW, self.db
        if self.unit is not None:
            dx, dW, db = dx.div_(self.unit), dW.div_(self.unit), db.div_(self.unit)
        empty = self.db.new_empty(0)
        return InputValues(dx, dW, db, empty, empty)


def head(*args: Any) -> tuple[Tensor, ...]:
    """First order; see `kernels.linear_cross_entropy.head`."""
    *flat, gamma, omega, eta, sums, requests, needs_gradient = args
    inputs, needs = HeadInputs.from_flat(flat), InputValues(*needs_gradient)
    loss, lse, squared_lse, entropy, predicted, new_sums = allocate_rows(inputs.x, requests)
    is_requested = Requests(*requests)
    needs_delta = gamma is not None and any((needs.x, needs.W, needs.b))
    given_upstream = UpstreamGradients.from_flat(gamma, omega, eta)
    reads_once = False
    if needs_delta and has_triton():
        reads_once = may_read_once(inputs, given_upstream, sums, is_requested)
    operands = _Operands(inputs, needs, needs_delta, reads_once=reads_once)
    plan = operands.plan
    dc_dp = torch.zeros_like(loss) if needs.p else None
    outputs = RowOutputs(None, None, None, None, None, None, dc_dp)
    if sums is None:
        outputs = RowOutputs(
            loss,
            lse,
            squared_lse,
            entropy if is_requested.entropy else None,
            predicted if is_requested.predicted else None,
            new_sums,
            dc_dp,
        )
    upstream, unit = _normalise(given_upstream, operands.W.dtype)
    process_rows, _ = choose_row_kernels(operands.dtype)
    single_read = None
    if reads_once:
        single_read = SingleRead(operands.W, inputs.target, len(loss), plan.block_rows)
    gradients = _Gradients(operands, needs, gamma, unit, single_read)
    for block in plan.iterate_blocks():
        for slab in plan.iterate_slabs(block):
            z = operands.compute_products(slab)
            place = slice(slab.start - block.start, slab.stop - block.start)
            delta = None if operands.delta is None else operands.delta[place]
            if single_read is None or delta is None or upstream is None:
                process_rows(z, delta, slab, operands.row_inputs, upstream, sums, outputs)
            else:
                single_read.process_rows(z, delta, slab, operands.row_inputs, upstream, outputs)
        if operands.delta is not None:
            gradients.add_block(block, operands.delta)
    results = gradients.finish()
    if dc_dp is not None and given_upstream is not None:
        results = results._replace(p=given_upstream.γ / math.log(inputs.base) * dc_dp)
    rounded = round_gradients(inputs, gamma, results)
    return loss, lse, squared_lse, entropy, predicted, new_sums, *rounded


def head_second_order(*args: Any) -> tuple[Tensor, ...]:
    """Second order; see `kernels.linear_cross_entropy.head_second_order`."""
    *flat, gamma, omega, eta, u, V, sigma, pi, tau, needs_gradient = args
    inputs, needs = HeadInputs.from_flat(flat), InputValues(*needs_gradient)
    needs_delta = any((needs.x, needs.W, needs.b))
    operands = _Operands(inputs, needs, needs_delta, buffers=2)
    plan, dtype = operands.plan, operands.W.dtype
    U = None
    if u is not None:
        U = (u if inputs.keep is None else u.masked_fill(~inputs.keep, 0)).to(dtype)
    V = None if V is None else V.to(dtype)
    R = torch.empty_like(operands.slab)
    Q = None if operands.delta is None else operands.allocate_delta()
    direction = RowDirection(*(_cast(v, operands.dtype) for v in (sigma, pi, tau)))
    ρ_c, ρ_q = torch.zeros_like(gamma), torch.zeros_like(gamma)
    ρ_h = None if eta is None else torch.zeros_like(gamma)
    dp = torch.zeros_like(gamma) if needs.p else None
    outputs = SecondOrderOutputs(ρ_c, ρ_q, ρ_h, dp)
    upstream, unit = _normalise(UpstreamGradients(gamma, omega, eta), dtype)
    _, process_rows = choose_row_kernels(operands.dtype)
    gradients = _Gradients(operands, needs, gamma, unit)
    for block in plan.iterate_blocks():
        for slab in plan.iterate_slabs(block):
            z = operands.compute_products(slab)
            r = operands.compute_direction(slab, R, U, V)
            place = slice(slab.start - block.start, slab.stop - block.start)
            deltas = None
            if Q is not None and operands.delta is not None:
                deltas = Q[place], operands.delta[place]
            process_rows(z, r, deltas, slab, operands.row_inputs, upstream, direction, outputs)
        if operands.delta is not None:
            gradients.add_block(block, operands.delta, (Q, V, U))
    results = gradients.finish()
    if dp is not None:
        results = results._replace(p=dp if unit is None else dp / unit)
    rounded = round_gradients(inputs, gamma, results)
    return ρ_c, ρ_q, gamma.new_empty(0) if ρ_h is None else ρ_h, *rounded


def _normalise(
    upstream: UpstreamGradients | None, dtype: torch.dtype
) -> tuple[UpstreamGradients | None, Tensor | None]:
    """The upstream gradients, contiguous; for float16 times a power of two: the largest is about 1.

    Also returns that factor, which stays on the device. Δ of float16 would underflow at 1/N.
    """
    if upstream is None:
        return None, None
    γ, ω, η = (None if v is None else v.contiguous() for v in upstream)  # may be expanded
    assert γ is not None
    upstream = UpstreamGradients(γ, ω, η)
    if dtype != torch.float16:
        return upstream, None
    largest = torch.stack([v.abs().amax() for v in upstream if v is not None]).amax()
    exponent = torch.frexp(largest).exponent
    unit = torch.ldexp(torch.ones_like(largest), -exponent)
    unit = torch.where(largest.isfinite() & (largest > 0), unit, 1.0)
    γ, ω, η = (None if v is None else v * unit for v in upstream)
    assert γ is not None
    return UpstreamGradients(γ, ω, η), unit


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The value in a type, contiguous."""
    return None if value is None else value.to(dtype).contiguous()
