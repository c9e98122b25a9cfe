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

from torch_nnmath._precision import wide_type
from torch_nnmath._records import HeadInputs, InputValues, Requests, UpstreamGradients
from torch_nnmath.kernels.dispatch import has_triton
from torch_nnmath.kernels.gpu import rows, rows_second_order
from torch_nnmath.kernels.gpu.plan import Plan, make_plan, pad
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
    is_rounded_later,
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

    def __init__(self, inputs: HeadInputs, plan: Plan, needs_delta: bool):
        x, W, b, target, keep, base, cap = inputs
        y, p, t, _ = target
        self.W, self.plan, self.keep = W, plan, keep
        self.dtype = dtype = wide_type(W.dtype)  # of logits and sums
        x = x if keep is None else x.masked_fill(~keep, 0)  # 0 times nan would be nan
        self.x = x.to(W.dtype)
        # features of wider type than the weight, such as scaled ones
        self.wide_x = x if x.dtype.itemsize > W.dtype.itemsize else None
        self.row_inputs = RowInputs(
            C=len(W),
            b=_cast(b, dtype),
            scale=None,
            y=None if y is None else y.contiguous(),
            p=_cast(p, dtype),
            t=_cast(t, dtype),
            keep=None if keep is None else keep.contiguous(),
            base=base,
            cap=cap,
        )
        self.slab = W.new_empty((plan.slab_rows, pad(len(W))), dtype=dtype)
        self.delta = self.allocate_delta() if needs_delta else None

    def allocate_delta(self) -> Tensor:
        """Memory for Δ of a block."""
        return self.W.new_empty((self.plan.block_rows, pad(len(self.W))))

    def compute_products(self, rows: slice) -> Tensor:
        """X Wᵀ of some rows, in the slab."""
        z = self.slab[: rows.stop - rows.start]
        out = z[:, : len(self.W)]
        if self.wide_x is not None:
            multiply_split(self.wide_x[rows], self.W.t(), out)
        else:
            multiply(self.x[rows], self.W.t(), out)
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
        x, W = operands.x, operands.W
        N, (C, D) = len(x), W.shape
        is_wide = operands.plan.has_accumulator or unit is not None or is_rounded_later(gamma, W)
        dtype = operands.dtype if is_wide else W.dtype
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
    x, W = inputs.x, inputs.W
    loss, lse, squared_lse, entropy, predicted, new_sums = allocate_rows(x, requests)
    is_requested = Requests(*requests)
    needs_delta = gamma is not None and any((needs.x, needs.W, needs.b))
    upstream = None if gamma is None else UpstreamGradients(gamma, omega, eta)
    reads_once = False
    if needs_delta and has_triton():
        reads_once = may_read_once(inputs, upstream, sums, is_requested)
    plan = make_plan(x, W, needs_dW=needs.W, scales_features=reads_once)
    operands = _Operands(inputs, plan, needs_delta)
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
    upstream, unit = _normalise(upstream, W.dtype)
    process_rows, _ = choose_row_kernels(operands.dtype)
    single_read = SingleRead(inputs, plan.block_rows) if reads_once else None
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
    if dc_dp is not None and gamma is not None:
        results = results._replace(p=gamma / math.log(inputs.base) * dc_dp)
    rounded = round_gradients(inputs, gamma, results)
    return loss, lse, squared_lse, entropy, predicted, new_sums, *rounded


def head_second_order(*args: Any) -> tuple[Tensor, ...]:
    """Second order; see `kernels.linear_cross_entropy.head_second_order`."""
    *flat, gamma, omega, eta, u, V, sigma, pi, tau, needs_gradient = args
    inputs, needs = HeadInputs.from_flat(flat), InputValues(*needs_gradient)
    x, W, keep = inputs.x, inputs.W, inputs.keep
    needs_deltas = any((needs.x, needs.W, needs.b))
    plan = make_plan(x, W, buffers=2, needs_dW=needs.W)
    operands = _Operands(inputs, plan, needs_deltas)
    U = None
    if u is not None:
        U = (u if keep is None else u.masked_fill(~keep, 0)).to(W.dtype)
    V = None if V is None else V.to(W.dtype)
    R = torch.empty_like(operands.slab)
    Q = operands.allocate_delta() if needs_deltas else None
    direction = RowDirection(*(_cast(v, operands.dtype) for v in (sigma, pi, tau)))
    ρ_c, ρ_q = torch.zeros_like(gamma), torch.zeros_like(gamma)
    ρ_h = None if eta is None else torch.zeros_like(gamma)
    dp = torch.zeros_like(gamma) if needs.p else None
    outputs = SecondOrderOutputs(ρ_c, ρ_q, ρ_h, dp)
    upstream, unit = _normalise(UpstreamGradients(gamma, omega, eta), W.dtype)
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
    """The upstream gradients; for float16 times a power of two that makes the largest about 1.

    Also returns that factor, which stays on the device. Δ of float16 would underflow at 1/N.
    """
    if upstream is None or dtype != torch.float16:
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
