"""The head (F15 batch) block by block of rows, so that memory does not grow with rows x classes.

The operators take the fields of `HeadInputs` in its flat order. Half types are computed in float32
and results are rounded once. A result that is not needed is an empty tensor. Ignored rows add
nothing; on the CPU they are left out of every product. Where the ranks of a group share the
classes, all of them call the operator, and dx is each rank's part of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type, zero_safe_product
from torch_nnmath._records import (
    HeadInputs,
    InputValues,
    Requests,
    RowResults,
    UpstreamGradients,
)
from torch_nnmath.kernels import collectives
from torch_nnmath.kernels._block import (
    MIN_SHIFTED,
    Block,
    Coefficients,
    Workspace,
    add_totals,
    cap_slope,
    select_target,
    sum_dense,
)
from torch_nnmath.kernels._library import register_operator

INPUTS = (
    "Tensor x, Tensor W, Tensor? b, Tensor? y, Tensor? p, Tensor? t, Tensor? keep,"
    " Tensor? features, Tensor? scale, float base, float? cap, ScalarType? weight_dtype,"
    " str? group, int first_class, int max_classes"
)


@register_operator(
    f"head({INPUTS}, Tensor? gamma, Tensor? omega, Tensor? eta, Tensor? sums, bool[] requests,"
    " bool[] needs_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor)",
    lambda *args: _allocate_results(*args),
    gpu_module="head",
    count_flops=lambda *args, out_shape: _count_flops(*args),
)
def head(*args: Any) -> tuple[Tensor, ...]:
    """Returns the fields of `RowResults`; sums; the gradients of Σ γ c + ω q + η h (`InputValues`).

    `sums` (N, 3) are m, Σ e^{v-m} and Σ e^{v-m} (v-m). Given back, they save passes over the
    logits, and only the gradients are computed, unless those of p or t are needed. For the types
    of the gradients see `round_gradients`.
    """
    *flat, gamma, omega, eta, sums, requests, needs_gradient = args
    inputs = HeadInputs.from_flat(flat)
    upstream = UpstreamGradients.from_flat(gamma, omega, eta)
    needs_gradient, requests = InputValues(*needs_gradient), Requests(*requests)
    *rows, new_sums = allocate_rows(inputs.x, requests)
    block_requests = requests._replace(entropy=requests.entropy or eta is not None)
    has_capped_t = inputs.cap is not None and inputs.target.t is not None
    workspace = Workspace(
        inputs, needs_logits=block_requests.entropy or needs_gradient.t or has_capped_t
    )
    gradients = _allocate_gradients(inputs, needs_gradient, bool(workspace.groups))
    needs_sums = sums is None or needs_gradient.p or needs_gradient.t
    if needs_sums:
        blocks = workspace.iterate_softmaxes(inputs.target.t, block_requests)
    else:
        blocks = workspace.iterate_blocks()
    for block in blocks:
        if needs_sums:
            block.compute_softmax_(block.target.t, block_requests)
            _write_rows(block, RowResults(*rows), new_sums, requests)
        else:
            block.restore_softmax_(sums[block.rows])
        if upstream is not None:
            coefficients = block.select_coefficients(upstream, inputs.base)
            _add_gradients(block, coefficients, gradients, needs_gradient)
    if requests.predicted and inputs.shard is not None and workspace.groups:
        *others, predicted = rows
        rows = [*others, workspace.reduce(predicted, collectives.MIN).wait()]
    return *rows, new_sums, *round_gradients(inputs, gamma, gradients)


def _write_rows(block: Block, results: RowResults, sums: Tensor, requests: Requests) -> None:
    """c = (1/ln β)(T lse(v) - (p e_y + t)·v), lse, q = lse² and the optional results."""
    rows, target, ln = block.rows, block.target, math.log(block.workspace.inputs.base)
    loss = -block.tv + torch.zeros_like(block.s)
    dense_total = block.compute_dense_total()
    if dense_total is not None:
        loss += dense_total * block.s.log()
    if target.p is not None:
        loss += zero_safe_product(target.p, block.compute_derivative_wrt_p())
    lse = block.mask(block.compute_lse())
    results.loss[rows] = block.mask(loss) / ln
    results.lse[rows] = lse
    results.squared_lse[rows] = lse.square()
    sums[rows] = torch.cat((block.m + torch.zeros_like(block.s), block.s, block.ev), 1)
    if requests.entropy:
        results.entropy[rows] = block.mask(block.compute_entropy()) / ln
    if requests.predicted:
        results.predicted[rows] = block.mask(block.predicted, -1)


def _add_gradients(
    block: Block, coefficients: Coefficients, gradients: InputValues, needs_gradient: InputValues
) -> None:
    """dX = Δ W,  dW += Δᵀ X,  db += Σ_rows Δ,  dp = γ dc/dp,  dt = -γβ l."""
    rows, z, W, γβ = block.rows, block.z, block.workspace.inputs.W, coefficients.γβ
    if needs_gradient.p:
        gradients.p[rows] = γβ * block.compute_derivative_wrt_p()
    if needs_gradient.t:
        for classes in block.iterate_slices():
            l = block.shift_(z[:, classes]).sub_(block.s.log())
            _write_dt(gradients.t, rows, classes, l.mul_(-γβ))
    if not (needs_gradient.x or needs_gradient.W or needs_gradient.b):
        return
    f = block.form_delta_(coefficients)  # the row factor
    if needs_gradient.x:
        dx = z @ W
        gradients.x[rows] = block.mask_(dx if f is None else dx.mul_(f))
    if needs_gradient.W:
        x = block.x if f is None else block.x * f
        gradients.W.addmm_(z.T, x, beta=0 if block.is_first else 1)
    if needs_gradient.b:
        gradients.b.add_(z.sum(0) if f is None else z.T @ f.squeeze(1))


@register_operator(
    f"head_second_order({INPUTS}, Tensor gamma, Tensor? omega, Tensor? eta, Tensor? u, Tensor? V,"
    " Tensor? sigma, Tensor? pi, Tensor? tau, bool[] needs_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *args: _allocate_second_order(*args),
    gpu_module="head",
    count_flops=lambda *args, out_shape: _count_flops_of_second_order(*args),
)
def head_second_order(*args: Any) -> tuple[Tensor, ...]:
    """Derivatives along the direction (u, V, σ, π, τ) of x, W, b, p, t, and their gradients.

    Returns ρ_c, ρ_q and, given η, ρ_h: the derivatives of each row's loss, squared log-sum-exp and
    entropy; then the gradients of Σ γ ρ_c + ω ρ_q + η ρ_h (`InputValues`). The formula is written
    out in `formulas.linear_cross_entropy.LinearCrossEntropySecondOrder`.
    """
    *flat, gamma, omega, eta, u, V, sigma, pi, tau, needs_gradient = args
    inputs = HeadInputs.from_flat(flat)
    needs_gradient = InputValues(*needs_gradient)
    V, sigma = (None if v is None else v.to(gamma.dtype) for v in (V, sigma))
    direction = InputValues(u, V, sigma, pi, tau)
    upstream = UpstreamGradients(gamma, omega, eta)
    ρ_c, ρ_q = torch.zeros_like(gamma), torch.zeros_like(gamma)
    ρ_h = gamma.new_zeros(0) if eta is None else torch.zeros_like(gamma)
    workspace = Workspace(inputs, needs_logits=True, dt=tau)
    R = workspace.allocate_logits()
    gradients = _allocate_gradients(inputs, needs_gradient, bool(workspace.groups))
    for block in workspace.iterate_softmaxes(tau, Requests(entropy=eta is not None)):
        coefficients = block.select_coefficients(upstream, inputs.base)
        second_order = _SecondOrder(block, direction, R, coefficients)
        second_order.write_derivatives(ρ_c, ρ_q, ρ_h)
        second_order.add_gradients(gradients, needs_gradient)
    return ρ_c, ρ_q, ρ_h, *round_gradients(inputs, gamma, gradients)


class _SecondOrder:
    """Second order of one block along a direction.

    `r` holds r = dv/dz ∘ R, R = U Wᵀ + X Vᵀ + σ, and then Q = dΔ.
    """

    def __init__(
        self, block: Block, direction: InputValues, buffer: Tensor, coefficients: Coefficients
    ):
        self.block = block
        self.coefficients = coefficients
        U, self.V, σ, _, _ = direction
        self.U = None if U is None else block.mask(U[block.rows].to(block.z.dtype))
        target = direction.to_target(block.workspace.inputs.target.y)
        self.dtarget = select_target(target, block.rows)
        dt_total = block.workspace.dt_total
        self.dense_dtotal = sum_dense(self.dtarget.t, dt_total, block.rows)
        has_entropy = coefficients.ηβ is not None
        block.compute_softmax_(self.dtarget.t, Requests(entropy=has_entropy))
        self.r = block.mask_(self._fill_direction_(buffer[: len(block.z)], σ))
        self._sum_direction_()

    def _fill_direction_(self, r: Tensor, σ: Tensor | None) -> Tensor:
        """Writes r = dv/dz ∘ (U Wᵀ + X Vᵀ + σ)."""
        W = self.block.workspace.inputs.W
        if self.U is None:
            r.zero_()
        else:
            torch.mm(self.U, W.T, out=r)
        if self.V is not None:
            _add_product_(r, self.block.x, self.V.T)
        if σ is not None:
            r.add_(σ)
        if self.block.cap is not None:
            for classes in self.block.iterate_slices():
                r[:, classes].mul_(cap_slope(self.block.z[:, classes]))
        return r

    def _sum_direction_(self) -> None:
        """Computes a·r, (a ∘ (v-m))·r, t·r and r_y of each row."""
        block, t = self.block, self.block.target.t
        self.ar, self.avr, self.tr = (torch.zeros_like(block.s) for _ in range(3))
        for classes in block.iterate_slices():
            r, v = self.r[:, classes], block.shift_(block.z[:, classes])
            if t is not None:
                self.tr += zero_safe_product(t[:, classes], r).sum(1, keepdim=True)
            a = v.exp().div_(block.s)
            self.ar += a.mul_(r).sum(1, keepdim=True)
            if self.coefficients.ηβ is not None:
                self.avr += a.mul_(v.clamp_(min=MIN_SHIFTED)).sum(1, keepdim=True)
        y, p, _, _ = block.target
        self.r_y: Any = None if y is None or p is None else block.leave_to_owner(block.pick(self.r))
        if block.workspace.inputs.shard is not None:
            self._reduce_sums()

    def _reduce_sums(self) -> None:
        """Sums what the ranks of a group have of these sums."""
        names = ["ar"]
        names += ["avr"] if self.coefficients.ηβ is not None else []
        names += ["tr"] if self.block.target.t is not None else []
        names += ["r_y"] if self.r_y is not None else []
        sums = torch.cat([getattr(self, name) for name in names], 1)
        reduced = self.block.workspace.reduce(sums, collectives.SUM).wait()
        for name, v in zip(names, reduced.split(1, 1), strict=True):
            setattr(self, name, v)

    def write_derivatives(self, ρ_c: Tensor, ρ_q: Tensor, ρ_h: Tensor) -> None:
        """ρ_c = (1/ln β)((T a - t)·r + (lse - v)·t'), ρ_q = 2 lse a·r, ρ_h = dh."""
        block, ar, target, dtarget = self.block, self.ar, self.block.target, self.dtarget
        rows, ln = block.rows, math.log(block.workspace.inputs.base)
        dc = block.compute_total() * ar - self.tr - block.tv
        if self.dense_dtotal is not None:
            dc += self.dense_dtotal * block.s.log()
        if self.r_y is not None and target.p is not None:
            dc -= zero_safe_product(target.p, self.r_y)
        if dtarget.p is not None:
            dc += zero_safe_product(dtarget.p, block.compute_derivative_wrt_p())
        ρ_c[rows] = block.mask(dc) / ln
        ρ_q[rows] = block.mask(2 * block.compute_lse() * ar)
        if self.coefficients.ηβ is not None:
            ρ_h[rows] = block.mask(self._compute_entropy_derivative()) / ln

    def _compute_entropy_derivative(self) -> Tensor:
        """ln β dh = -(a ∘ (l - a·l))·r."""
        return self.block.ev / self.block.s * self.ar - self.avr

    def add_gradients(self, gradients: InputValues, needs_gradient: InputValues) -> None:
        """dx = Q W + Δ V,  dW = Qᵀ X + Δᵀ U,  db = Σ_rows Q,  dt = γβ (a·r - r), dp = dt_y."""
        block, γβ, ar = self.block, self.coefficients.γβ, self.ar
        if needs_gradient.p:
            gradients.p[block.rows] = γβ * (ar if self.r_y is None else ar - self.r_y)
        if needs_gradient.t:
            for classes in block.iterate_slices():
                _write_dt(gradients.t, block.rows, classes, γβ * (ar - self.r[:, classes]))
        if not (needs_gradient.x or needs_gradient.W or needs_gradient.b):
            return
        self._form_deltas_()
        Q, Δ = self.r, block.z
        if needs_gradient.x:
            dx = Q @ block.workspace.inputs.W
            dx = dx if self.V is None else _add_product_(dx, Δ, self.V)
            gradients.x[block.rows] = block.mask_(dx)
        if needs_gradient.W:
            gradients.W.addmm_(Q.T, block.x, beta=0 if block.is_first else 1)
            if self.U is not None:
                gradients.W.addmm_(Δ.T, self.U)
        if needs_gradient.b:
            gradients.b.add_(Q.sum(0))

    def _form_deltas_(self) -> None:
        """Overwrites r with Q = dΔ and the block's logits with Δ.

        With slope = dv/dz and the row term D = γβ T' + 2 ω a·r - η ρ_h:
        G = a ∘ B - γβ t,  dG = a ∘ ((r - a·r) ∘ (B - ηβ) + D) - γβ t',
        Δ = slope ∘ G,  Q = slope ∘ dG - (2/κ²) v ∘ G ∘ r.
        """
        block, cap, (γβ, ω, ηβ) = self.block, self.block.cap, self.coefficients
        (y, p, t, _), dtarget = block.target, self.dtarget
        D = γβ * add_totals(dtarget.p, self.dense_dtotal)
        if ηβ is not None:
            D = D - ηβ * self._compute_entropy_derivative()
        if ω is not None:
            D = D + 2 * ω * self.ar
        weight = block.compute_weight(self.coefficients)
        class_slope, z_y = block.compute_class_slope(), block.z_y
        for classes in block.iterate_slices():
            z, r = block.z[:, classes], self.r[:, classes]
            v = block.shift_(z)
            a = v.exp().div_(block.s)
            B = weight if ηβ is None else weight - ηβ * v.clamp_(min=MIN_SHIFTED)
            G = a * B
            Q = (r - self.ar).mul_(B if ηβ is None else B - ηβ).add_(D).mul_(a)
            if t is not None:
                G -= γβ * t[:, classes]
            if dtarget.t is not None:
                Q -= γβ * dtarget.t[:, classes]
            if cap is not None:
                slope = cap_slope(z)
                Q.mul_(slope).sub_(G.mul(z).mul_(r), alpha=2 / cap)
                G.mul_(slope)
            r.copy_(Q)
            z.copy_(G)
        if y is not None and p is not None:
            if cap is not None and z_y is not None:
                block.add_to_class_(self.r, γβ * p * self.r_y * z_y * (2 / cap))
            block.add_to_class_(block.z, -γβ * p * class_slope)
        if y is not None and dtarget.p is not None:
            block.add_to_class_(self.r, -γβ * dtarget.p * class_slope)


def _add_product_(r: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """r += A B. cuBLASLt may reject an addmm with one row, which it reads as a bias."""
    return r.add_(A @ B) if len(r) == 1 else r.addmm_(A, B)


def _write_dt(dt: Tensor, rows: Any, classes: slice, value: Tensor) -> None:
    """Writes a slice of dt; adds it up over the rows if they share one dense target."""
    if dt.shape[0] == 1:
        dt[:, classes] += value.sum(0, keepdim=True)
    else:
        dt[rows, classes] = value


def _count_flops(*args: Any) -> int:
    """FLOP of `head`, of arguments with shapes in place of tensors: X Wᵀ, Δ W and Δᵀ X."""
    *flat, gamma, _omega, _eta, _sums, _requests, needs_gradient = args
    needs = InputValues(*needs_gradient)
    return _count_flops_of_products(flat, 1 + (gamma is not None) * (needs.x + needs.W))


def _count_flops_of_second_order(*args: Any) -> int:
    """FLOP of `head_second_order`: X Wᵀ; U Wᵀ, X Vᵀ; Q W, Δ V; Qᵀ X, Δᵀ U."""
    *flat, _gamma, _omega, _eta, u, V, _sigma, _pi, _tau, needs_gradient = args
    needs, has_u, has_V = InputValues(*needs_gradient), u is not None, V is not None
    products = 1 + has_u + has_V + needs.x * (1 + has_V) + needs.W * (1 + has_u)
    return _count_flops_of_products(flat, products)


def _count_flops_of_products(flat: Any, count: int) -> int:
    (N, D), (C, _), *_ = flat
    return 2 * N * D * C * count


def allocate_rows(x: Tensor, requests: Sequence[bool]) -> tuple[Tensor, ...]:
    """Memory for `RowResults` and sums: 0, and -1 for the predicted class."""
    N, dtype, requests = x.shape[0], wide_type(x.dtype), Requests(*requests)
    loss, lse, squared_lse = (x.new_zeros((N, 1), dtype=dtype) for _ in range(3))
    entropy = x.new_zeros((N, 1) if requests.entropy else (0,), dtype=dtype)
    predicted = x.new_full((N, 1) if requests.predicted else (0,), -1, dtype=torch.int64)
    return loss, lse, squared_lse, entropy, predicted, x.new_zeros((N, 3), dtype=dtype)


def _allocate_results(*args: Any) -> tuple[Tensor, ...]:
    """Memory for the results of `head`."""
    *flat, gamma, _omega, _eta, _sums, requests, needs_gradient = args
    inputs = HeadInputs.from_flat(flat)
    gradients = _allocate_gradients(inputs, needs_gradient)
    return *allocate_rows(inputs.x, requests), *round_gradients(inputs, gamma, gradients)


def _allocate_second_order(*args: Any) -> tuple[Tensor, ...]:
    """Memory for the results of `head_second_order`."""
    *flat, gamma, _omega, eta, _u, _V, _sigma, _pi, _tau, needs_gradient = args
    inputs = HeadInputs.from_flat(flat)
    ρ_c, ρ_q = torch.empty_like(gamma), torch.empty_like(gamma)
    ρ_h = gamma.new_empty(0) if eta is None else torch.empty_like(gamma)
    gradients = _allocate_gradients(inputs, needs_gradient)
    return ρ_c, ρ_q, ρ_h, *round_gradients(inputs, gamma, gradients)


def _allocate_gradients(
    inputs: HeadInputs, needs_gradient: Sequence[bool], is_dW_overwritten: bool = False
) -> InputValues:
    """Zeros for each gradient that is needed, in the type of computation; else an empty tensor.

    `is_dW_overwritten`: the first block overwrites dW, which then need not be zeroed.
    """
    x, W, t = inputs.x, inputs.W, inputs.target.t
    shapes = x.shape, W.shape, W.shape[:1], (x.shape[0], 1), () if t is None else t.shape
    overwritten = False, is_dW_overwritten, False, False, False
    dtype = wide_type(x.dtype)
    return InputValues(
        *(
            (torch.empty if is_overwritten else torch.zeros)(
                shape if is_needed else (0,), dtype=dtype, device=x.device
            )
            for shape, is_needed, is_overwritten in zip(
                shapes, needs_gradient, overwritten, strict=True
            )
        )
    )


def round_gradients(
    inputs: HeadInputs, gamma: Tensor | None, gradients: InputValues
) -> InputValues:
    """Rounds the gradients of x, W, b to the types of these where `is_rounded_now`."""

    def round_once(gradient: Tensor, value: Tensor) -> Tensor:
        is_rounded = is_rounded_now(gamma, value.dtype, value.device)
        return gradient.to(value.dtype) if is_rounded else gradient

    x, W, b = inputs.x, inputs.W, inputs.W if inputs.b is None else inputs.b
    return gradients._replace(
        x=round_once(gradients.x, x), W=round_once(gradients.W, W), b=round_once(gradients.b, b)
    )


def is_rounded_now(gamma: Tensor | None, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the operator rounds the gradient of an input of type `dtype` to that type.

    A γ of shape () or (N) is that of a cost, whose gradients are still to be multiplied by dC.
    Rounded before, those of float16 may underflow. On a GPU those of bfloat16 are rounded twice,
    since the passes over a wider dW would take a tenth of the time; dC is mostly a power of two.
    """
    is_of_cost = gamma is None or gamma.dim() < 2
    return not is_of_cost or (dtype != torch.float16 and device.type == "cuda")
