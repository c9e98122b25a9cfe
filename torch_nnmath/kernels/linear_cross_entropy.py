"""The head (F15 batch) block by block of rows, so that memory does not grow with rows x classes.

The operators take the fields of `HeadInputs` in its flat order. Half types are computed in float32
and results are rounded once. A result that is not needed is an empty tensor. Ignored rows are left
out of every product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type, zero_safe_product
from torch_nnmath._records import HeadInputs, PerInput, Requests, RowResults, Target, Upstream
from torch_nnmath.kernels._block import (
    MIN_SHIFTED,
    Block,
    Coefficients,
    Workspace,
    cap_slope,
    select_target,
)
from torch_nnmath.kernels._library import operator

INPUTS = (
    "Tensor x, Tensor W, Tensor? b, Tensor? y, Tensor? p, Tensor? t, Tensor? keep, float base,"
    " float? cap"
)


@operator(
    f"head({INPUTS}, Tensor? gamma, Tensor? omega, Tensor? eta, Tensor? sums, bool[] requests,"
    " bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor)",
    lambda x, W, b, y, p, t, keep, base, cap, gamma, omega, eta, sums, requests, needs: (
        *_allocate_rows(x, requests),
        *_round(
            HeadInputs(x, W, b, Target(y, p, t), keep), gamma, _allocate_gradients(x, W, t, needs)
        ),
    ),
)
def head(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor | None,
    p: Tensor | None,
    t: Tensor | None,
    keep: Tensor | None,
    base: float,
    cap: float | None,
    gamma: Tensor | None,
    omega: Tensor | None,
    eta: Tensor | None,
    sums: Tensor | None,
    requests: Sequence[bool],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the fields of `RowResults`; sums; the gradients of Σ γ c + ω q + η h (`PerInput`).

    `sums` (N, 3) are m, Σ e^{v-m} and Σ e^{v-m} (v-m). Given back, they save passes over the
    logits, and only the gradients are computed. A γ of shape () is that of a cost, whose gradients
    are still to be scaled: they are not rounded.
    """
    inputs, upstream = HeadInputs(x, W, b, Target(y, p, t), keep, base, cap), (gamma, omega, eta)
    needed, requested = PerInput(*needs), Requests(*requests)
    *rows, new_sums = _allocate_rows(x, requests)
    computed = requested._replace(entropy=requested.entropy or eta is not None)
    keeps_logits = computed.entropy or needed.t or (cap is not None and t is not None)
    workspace = Workspace(inputs, keeps_logits)
    gradients = _allocate_gradients(x, W, t, needs, fills_dW=bool(workspace.groups))
    for block in workspace.blocks():
        if sums is None or needed.p or needed.t:
            block.compute_softmax_(block.target.t, computed)
            _write_rows(block, RowResults(*rows), new_sums, requested)
        else:
            block.restore_softmax_(sums[block.rows])
        if gamma is not None:
            coefficients = block.select_coefficients(Upstream(*upstream), base)
            _add_gradients(block, coefficients, gradients, needed)
    return *rows, new_sums, *_round(inputs, gamma, gradients)


def _write_rows(block: Block, results: RowResults, sums: Tensor, requested: Requests) -> None:
    """c = (1/ln β)(T lse(v) - (p e_y + t)·v), lse, q = lse² and what is requested."""
    rows, target, ln = block.rows, block.target, math.log(block.workspace.inputs.base)
    loss = -block.tv + torch.zeros_like(block.s)
    if target.t is not None:
        loss += target.t.sum(1, keepdim=True) * block.s.log()
    if target.p is not None:
        loss += zero_safe_product(target.p, block.derivative_in_p())
    lse = block.mask(block.lse())
    results.loss[rows] = block.mask(loss) / ln
    results.lse[rows] = lse
    results.z_loss[rows] = lse.square()
    sums[rows] = torch.cat((block.m + torch.zeros_like(block.s), block.s, block.ev), 1)
    if requested.entropy:
        results.entropy[rows] = block.mask(block.entropy()) / ln
    if requested.predicted:
        results.predicted[rows] = block.mask(block.predicted, -1)


def _add_gradients(block: Block, k: Coefficients, gradients: PerInput, needed: PerInput) -> None:
    """dX = Δ W,  dW += Δᵀ X,  db += Σ_rows Δ,  dp = g dc/dp,  dt = -g l."""
    rows, z, W = block.rows, block.z, block.workspace.inputs.W
    if needed.p:
        gradients.p[rows] = k.g * block.derivative_in_p()
    if needed.t:
        for classes in block.slices():
            l = block.shift(z[:, classes]).sub_(block.s.log())
            _write_dt(gradients.t, rows, classes, l.mul_(-k.g))
    if not (needed.x or needed.W or needed.b):
        return
    factor = block.form_delta_(k)
    if needed.x:
        dx = z @ W
        gradients.x[rows] = block.mask_(dx if factor is None else dx.mul_(factor))
    if needed.W:
        x = block.x if factor is None else block.x * factor
        gradients.W.addmm_(z.T, x, beta=0 if block.is_first else 1)
    if needed.b:
        gradients.b.add_(z.sum(0) if factor is None else z.T @ factor.squeeze(1))


@operator(
    f"head_second_order({INPUTS}, Tensor gamma, Tensor? omega, Tensor? eta, Tensor? u, Tensor? V,"
    " Tensor? s, Tensor? pi, Tensor? tau, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, W, b, y, p, t, keep, base, cap, gamma, omega, eta, u, V, s, pi, tau, needs: (
        *(torch.empty_like(gamma) for _ in range(2)),
        gamma.new_empty(0) if eta is None else torch.empty_like(gamma),
        *_round(
            HeadInputs(x, W, b, Target(y, p, t), keep), gamma, _allocate_gradients(x, W, t, needs)
        ),
    ),
)
def head_second_order(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor | None,
    p: Tensor | None,
    t: Tensor | None,
    keep: Tensor | None,
    base: float,
    cap: float | None,
    gamma: Tensor,
    omega: Tensor | None,
    eta: Tensor | None,
    u: Tensor | None,
    V: Tensor | None,
    s: Tensor | None,
    pi: Tensor | None,
    tau: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Derivatives along the direction (u, V, s, π, τ) of x, W, b, p, t, and their gradients.

    Returns ρ_c, ρ_q and, given η, ρ_h: the derivatives of each row's loss, z-loss and entropy;
    then the gradients of Σ γ ρ_c + ω ρ_q + η ρ_h (`PerInput`). The formula is written out in
    `formulas.linear_cross_entropy.LinearCrossEntropySecondOrder`.
    """
    inputs, needed = HeadInputs(x, W, b, Target(y, p, t), keep, base, cap), PerInput(*needs)
    V, s = (None if v is None else v.to(gamma.dtype) for v in (V, s))
    direction, upstream = PerInput(u, V, s, pi, tau), Upstream(gamma, omega, eta)
    ρ_c, ρ_q = torch.zeros_like(gamma), torch.zeros_like(gamma)
    ρ_h = gamma.new_zeros(0) if eta is None else torch.zeros_like(gamma)
    workspace = Workspace(inputs, keeps_logits=True)
    R = workspace.allocate_logits()
    gradients = _allocate_gradients(x, W, t, needs, fills_dW=bool(workspace.groups))
    for block in workspace.blocks():
        second = _SecondOrder(block, direction, R, block.select_coefficients(upstream, base))
        second.write_derivatives(ρ_c, ρ_q, ρ_h)
        second.add_gradients(gradients, needed)
    return ρ_c, ρ_q, ρ_h, *_round(inputs, gamma, gradients)


class _SecondOrder:
    """Second order of one block along a direction.

    `r` holds r = dv/dz ∘ R, R = U Wᵀ + X Vᵀ + s, and then Q = dΔ.
    """

    def __init__(self, block: Block, direction: PerInput, buffer: Tensor, k: Coefficients):
        self.block, self.k, (_, self.V, s, _, _) = block, k, direction
        y = block.workspace.inputs.target.y
        self.dtarget = select_target(direction.target(y), block.rows)
        U = direction.x
        self.U = None if U is None else block.mask(U[block.rows].to(block.z.dtype))
        block.compute_softmax_(self.dtarget.t, Requests(entropy=k.n is not None))
        self.r = block.mask_(self._fill_direction_(buffer[: len(block.z)], s))
        self._sum_direction_()

    def _fill_direction_(self, r: Tensor, s: Tensor | None) -> Tensor:
        """Writes r = dv/dz ∘ (U Wᵀ + X Vᵀ + s)."""
        W = self.block.workspace.inputs.W
        r.zero_() if self.U is None else torch.mm(self.U, W.T, out=r)
        if self.V is not None:
            _add_product_(r, self.block.x, self.V.T)
        if s is not None:
            r.add_(s)
        if self.block.cap is not None:
            for classes in self.block.slices():
                r[:, classes].mul_(cap_slope(self.block.z[:, classes]))
        return r

    def _sum_direction_(self) -> None:
        """Computes a·r, (a ∘ (v-m))·r, t·r and r_y of each row."""
        block, t = self.block, self.block.target.t
        self.ar, self.avr, self.tr = (torch.zeros_like(block.s) for _ in range(3))
        for classes in block.slices():
            r, v = self.r[:, classes], block.shift(block.z[:, classes])
            if t is not None:
                self.tr += zero_safe_product(t[:, classes], r).sum(1, keepdim=True)
            a = v.exp().div_(block.s)
            self.ar += a.mul_(r).sum(1, keepdim=True)
            if self.k.n is not None:
                self.avr += a.mul_(v.clamp_(min=MIN_SHIFTED)).sum(1, keepdim=True)
        y, p, _, _ = block.target
        self.r_y: Any = None if y is None or p is None else self.r.gather(1, y)

    def write_derivatives(self, ρ_c: Tensor, ρ_q: Tensor, ρ_h: Tensor) -> None:
        """ρ_c = (1/ln β)((T a - t)·r + (lse - v)·t'), ρ_q = 2 lse a·r, ρ_h = dh."""
        block, ar, change = self.block, self.ar, self.dtarget
        rows, target, ln = block.rows, block.target, math.log(block.workspace.inputs.base)
        dc = target.total() * ar - self.tr - block.tv
        if change.t is not None:
            dc += change.t.sum(1, keepdim=True) * block.s.log()
        if self.r_y is not None and target.p is not None:
            dc -= zero_safe_product(target.p, self.r_y)
        if change.p is not None:
            dc += zero_safe_product(change.p, block.derivative_in_p())
        ρ_c[rows] = block.mask(dc) / ln
        ρ_q[rows] = block.mask(2 * block.lse() * ar)
        if self.k.n is not None:
            ρ_h[rows] = block.mask(self._entropy_derivative()) / ln

    def _entropy_derivative(self) -> Tensor:
        """ln β dh = -(a ∘ (l - a·l))·r."""
        return self.block.ev / self.block.s * self.ar - self.avr

    def add_gradients(self, gradients: PerInput, needed: PerInput) -> None:
        """Q W + Δ V in x,  Qᵀ X + Δᵀ U in W,  Σ_rows Q in b,  g (a·r - r) in p and t."""
        block, (g, _, _), ar = self.block, self.k, self.ar
        if needed.p:
            gradients.p[block.rows] = g * (ar if self.r_y is None else ar - self.r_y)
        if needed.t:
            for classes in block.slices():
                _write_dt(gradients.t, block.rows, classes, g * (ar - self.r[:, classes]))
        if not (needed.x or needed.W or needed.b):
            return
        self._form_deltas_()
        Q, Δ = self.r, block.z
        if needed.x:
            dx = Q @ block.workspace.inputs.W
            dx = dx if self.V is None else _add_product_(dx, Δ, self.V)
            gradients.x[block.rows] = block.mask_(dx)
        if needed.W:
            gradients.W.addmm_(Q.T, block.x, beta=0 if block.is_first else 1)
            if self.U is not None:
                gradients.W.addmm_(Δ.T, self.U)
        if needed.b:
            gradients.b.add_(Q.sum(0))

    def _form_deltas_(self) -> None:
        """Overwrites r with Q = dΔ and the block's logits with Δ.

        With slope = dv/dz: G = a ∘ B - g t,  dG = a ∘ ((r - a·r) ∘ (B - n) + D) - g t',
        Δ = slope ∘ G,  Q = slope ∘ dG - (2/κ²) v ∘ G ∘ r.
        """
        block, (g, o, n), cap = self.block, self.k, self.block.cap
        (y, p, t, _), change = block.target, self.dtarget
        D = g * change.total()
        if n is not None:
            D = D - n * self._entropy_derivative()
        if o is not None:
            D = D + 2 * o * self.ar
        weight = block.weight_of_a(self.k)
        class_slope, z_y = block.class_slope(), block.z_y
        for classes in block.slices():
            z, r = block.z[:, classes], self.r[:, classes]
            v = block.shift(z)
            a = v.exp().div_(block.s)
            B = weight if n is None else weight - n * v.clamp_(min=MIN_SHIFTED)
            G = a * B
            Q = (r - self.ar).mul_(B if n is None else B - n).add_(D).mul_(a)
            if t is not None:
                G -= g * t[:, classes]
            if change.t is not None:
                Q -= g * change.t[:, classes]
            if cap is not None:
                slope = cap_slope(z)
                Q.mul_(slope).sub_(G.mul(z).mul_(r), alpha=2 / cap)
                G.mul_(slope)
            r.copy_(Q)
            z.copy_(G)
        if y is not None and p is not None:
            if cap is not None and z_y is not None:
                self.r.scatter_add_(1, y, g * p * self.r_y * z_y * (2 / cap))
            block.z.scatter_add_(1, y, -g * p * class_slope)
        if y is not None and change.p is not None:
            self.r.scatter_add_(1, y, -g * change.p * class_slope)


def _add_product_(r: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """r += A B. With one row, which may be a bias, cuBLASLt may refuse to do it in one call."""
    return r.add_(A @ B) if len(r) == 1 else r.addmm_(A, B)


def _write_dt(dt: Tensor, rows: Any, classes: slice, value: Tensor) -> None:
    """Writes a slice of dt; adds it up over the rows if they share one dense target."""
    if dt.shape[0] == 1:
        dt[:, classes] += value.sum(0, keepdim=True)
    else:
        dt[rows, classes] = value


def _allocate_rows(x: Tensor, requests: Sequence[bool]) -> tuple[Tensor, ...]:
    """Memory for `RowResults` and sums: 0, and -1 for the predicted class."""
    N, dtype, requested = x.shape[0], wide_type(x.dtype), Requests(*requests)
    loss, lse, z_loss = (x.new_zeros((N, 1), dtype=dtype) for _ in range(3))
    entropy = x.new_zeros((N, 1) if requested.entropy else (0,), dtype=dtype)
    predicted = x.new_full((N, 1) if requested.predicted else (0,), -1, dtype=torch.int64)
    return loss, lse, z_loss, entropy, predicted, x.new_zeros((N, 3), dtype=dtype)


def _allocate_gradients(
    x: Tensor, W: Tensor, t: Tensor | None, needs: Sequence[bool], fills_dW: bool = False
) -> PerInput:
    """Zeros for each gradient that is needed, in the type of computation; else an empty tensor.

    `fills_dW`: the first block overwrites dW, which then need not be zeroed.
    """
    shapes = x.shape, W.shape, W.shape[:1], (x.shape[0], 1), () if t is None else t.shape
    dtype = wide_type(x.dtype)
    return PerInput(
        *(
            (torch.empty if fills_dW and i == 1 else torch.zeros)(
                shape if needed else (0,), dtype=dtype, device=x.device
            )
            for i, (shape, needed) in enumerate(zip(shapes, needs, strict=True))
        )
    )


def _round(inputs: HeadInputs, gamma: Tensor | None, gradients: PerInput) -> PerInput:
    """Rounds the gradients in x, W, b to the types of these, unless γ is that of a cost."""
    if gamma is None or not gamma.dim():
        return gradients
    x, W, b = inputs.x, inputs.W, inputs.W if inputs.b is None else inputs.b
    return gradients._replace(
        x=gradients.x.to(x.dtype), W=gradients.W.to(W.dtype), b=gradients.b.to(b.dtype)
    )
