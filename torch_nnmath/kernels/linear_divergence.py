"""The divergence between a student's and a teacher's head (F25 to F29), block by block of rows.

Two blocks of logits are in memory at a time, class-major, and each pass over them processes slices
of classes that fit in the cache. The operators take the fields of `DivergenceInputs`. Half types
are computed in float32 and results are rounded once. A result that is not needed is an empty
tensor. A GPU runs the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath._records import DivergenceInputs, PairValues
from torch_nnmath.kernels._block import count_rows, fill_affine_, group_rows, may_gather_rows
from torch_nnmath.kernels._library import SLICE_SIZE, register_operator
from torch_nnmath.kernels.linear_cross_entropy import is_rounded_now

INPUTS = (
    "Tensor x, Tensor W, Tensor? b, Tensor xt, Tensor? Wt, Tensor? bt, Tensor? indices, Tensor? y,"
    " Tensor? keep, float mix, float temperature, float factor, float label_factor, bool has_rest"
)
INPUT_COUNT = len(DivergenceInputs._fields)
GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"


@register_operator(
    f"divergence({INPUTS}, Tensor? gamma, bool[] needs_gradient) -> (Tensor, {GRADIENTS})",
    lambda *args: _allocate_results(*args),
    count_flops=lambda *args, out_shape: _count_flops(*args),
)
def divergence(*args: Any) -> tuple[Tensor, ...]:
    """Returns each row's loss c (N, 1), and the gradients of Σ γ c (`PairValues`).

    c is `factor` times the divergence plus `label_factor` times the cross entropy. γ is (N, 1), or
    () for one that all rows share; None if no gradient is needed.
    """
    inputs, (gamma, needs_gradient) = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    needs = PairValues(*needs_gradient)
    if gamma is None:
        needs = PairValues(*[False] * 6)
    c = inputs.x.new_zeros((len(inputs.x), 1), dtype=choose_divergence_dtype(inputs))
    gradients = _allocate_gradients(inputs, needs)
    for block in _iterate_blocks(inputs):
        c[block.rows] = block.compute_loss_()
        if gamma is not None:
            block.form_deltas_(block.select_rows(gamma), needs)
            block.add_gradients(gradients, needs)
    return c, *_round_gradients(inputs, gamma, gradients)


@register_operator(
    f"divergence_second_order({INPUTS}, Tensor gamma, Tensor? u, Tensor? V, Tensor? sigma,"
    " Tensor? ut, Tensor? Vt, Tensor? sigmat, bool[] needs_gradient)"
    f" -> (Tensor, {GRADIENTS})",
    lambda *args: _allocate_second_order(*args),
    count_flops=lambda *args, out_shape: _count_flops_of_second_order(*args),
)
def divergence_second_order(*args: Any) -> tuple[Tensor, ...]:
    """Returns ρ (N, 1), the derivative of each row's loss along the direction (u, V, σ) of x, W, b
    and (ut, Vt, σt) of xt, Wt, bt, and the gradients of Σ γ ρ (`PairValues`).
    """
    inputs, rest = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    gamma, *direction, needs_gradient = rest
    needs = PairValues(*needs_gradient)
    ρ = torch.zeros_like(gamma)
    gradients = _allocate_gradients(inputs, needs)
    for block in _iterate_blocks(inputs, PairValues(*direction)):
        ρ[block.rows] = block.compute_derivative_()
        block.form_second_deltas_(block.select_rows(gamma), needs)
        block.add_gradients(gradients, needs)
    return ρ, *_round_gradients(inputs, gamma, gradients)


class _Side:
    """One of the two heads: a block of its logits z, and of their derivative R along a direction.

    The logits become Δ, and R becomes Q = dΔ.
    """

    lse: Tensor  # ln Σ e^{z/τ} of each row
    k: Tensor  # the side's part of the divergence: q·s of its probabilities q and its score s
    qR: Tensor  # q·R/τ
    dk: Tensor  # derivative of k
    z: Tensor
    R: Tensor | None = None

    def __init__(self, values: Any, direction: Any, C: int, rows: int, dtype: torch.dtype):
        self.x, W, b = values
        self.W, self.b = (None if v is None else v.to(dtype) for v in (W, b))
        self.dtype = dtype
        self.buffer = self._allocate_buffer(C, rows)
        self.direction = None
        if direction is not None:
            u, *others = direction
            self.direction = u, *(None if v is None else v.to(dtype) for v in others)
            self.direction_buffer = self._allocate_buffer(C, rows)

    def _allocate_buffer(self, C: int, rows: int) -> Tensor:
        return self.x.new_empty((C, rows), dtype=self.dtype).T

    def start_block(self, rows: Any, ignored: Tensor | None) -> None:
        self.rows, self.ignored = rows, ignored
        self.x_rows = self._select_rows(self.x)
        self.z = self.buffer[: len(self.x_rows)]
        if self.direction is not None:
            self.R = self.direction_buffer[: len(self.x_rows)]
            self._fill_direction_(self.R, *self.direction)

    def _select_rows(self, x: Tensor) -> Tensor:
        x = x[self.rows].to(self.dtype)
        return x if self.ignored is None else x.masked_fill(self.ignored, 0)

    def fill_logits_(self, classes: slice) -> Tensor:
        """Writes the logits of some classes."""
        z = self.z[:, classes]
        if self.W is None:
            z.copy_(self.x_rows[:, classes])
        else:
            fill_affine_(z, self.x_rows, self.W, self.b, classes)
        return z if self.ignored is None else z.masked_fill_(self.ignored, 0)

    def _fill_direction_(self, R: Tensor, u: Any, V: Any, σ: Any) -> None:
        """Writes R = U Wᵀ + X Vᵀ + σ, or U for given logits."""
        self.u_rows = None if u is None else self._select_rows(u)
        if self.u_rows is None:
            R.zero_()
        elif self.W is None:
            R.copy_(self.u_rows)
        else:
            torch.mm(self.u_rows, self.W.T, out=R)
        if V is not None:
            _add_product_(R, self.x_rows, V.T)
        if σ is not None:
            R.add_(σ)
        if self.ignored is not None:
            R.masked_fill_(self.ignored, 0)

    def add_gradients(
        self, gradients: Sequence[Tensor], needs: Sequence[bool], is_first: bool
    ) -> None:
        """dx = Δ W, dW += Δᵀ X, db += Σ_rows Δ; along a direction dx = Q W + Δ V and
        dW += Qᵀ X + Δᵀ U; for given logits dx = Δ or Q.
        """
        dx, dW, db = gradients
        needs_x, needs_W, needs_b = needs
        Δ, D = self.z, self.z if self.R is None else self.R
        _, V, _ = self.direction or (None, None, None)
        if needs_x:
            if self.W is None:
                result = D
            else:
                result = D @ self.W
                result = result if V is None else _add_product_(result, Δ, V)
            if self.ignored is not None:
                result = result.masked_fill(self.ignored, 0)
            dx[self.rows] = result
        if needs_W:
            dW.addmm_(D.T, self.x_rows, beta=0 if is_first else 1)
            if self.R is not None and self.u_rows is not None:
                dW.addmm_(Δ.T, self.u_rows)
        if needs_b:
            db.add_(D.sum(0))


class _Block:
    """Some rows of both heads, in the symbols of `formulas.linear_divergence`.

    The student has the probabilities q, log-probabilities l and score s, the teacher p, lt and st.
    """

    def __init__(
        self, inputs: DivergenceInputs, sides: tuple[_Side, _Side], rows: Any, is_first: bool
    ):
        keep = inputs.keep
        self.inputs, self.rows, self.is_first = inputs, rows, is_first
        self.student, self.teacher = sides
        self.ignored = None if keep is None or may_gather_rows(keep) else ~keep[rows]
        for side in sides:
            side.start_block(rows, self.ignored)
        self.y = None if inputs.y is None or not inputs.label_factor else inputs.y[rows]
        rows_count, C = self.student.z.shape
        size = C if inputs.x.device.type != "cpu" else SLICE_SIZE // 2 // max(rows_count, 1)
        self.slice_size = max(size, 1)
        self.zeros = self.student.z.new_zeros((rows_count, 1))

    def iterate_slices(self) -> Iterator[slice]:
        C, size = self.student.z.shape[1], self.slice_size
        return (slice(i, min(i + size, C)) for i in range(0, C, size))

    def select_rows(self, gamma: Tensor) -> Tensor:
        """γ of the block's rows, 0 where ignored."""
        γ = gamma[self.rows] if gamma.dim() else gamma.expand(self.zeros.shape)
        return γ if self.ignored is None else γ.masked_fill(self.ignored, 0)

    # The loss

    def compute_loss_(self) -> Tensor:
        """Fills the logits; returns c of each row."""
        student, teacher, τ = self.student, self.teacher, self.inputs.temperature
        sums = [_OnlineSum(self.zeros, t) for t in (τ, τ, 1.0)]
        has_own_sum = self.y is not None and τ != 1
        for classes in self.iterate_slices():
            z = student.fill_logits_(classes)
            sums[0].add(z)
            if has_own_sum:
                sums[2].add(z)
            sums[1].add(teacher.fill_logits_(classes))
        student.lse, teacher.lse = sums[0].log(), sums[1].log()
        student.k, teacher.k = torch.zeros_like(self.zeros), torch.zeros_like(self.zeros)
        for classes in self.iterate_slices():
            parts = _Slice(self, classes)
            for side, q, s in parts.scores:
                side.k += q.mul_(s).sum(1, keepdim=True)
        c = (student.k + teacher.k) * self.inputs.factor
        if self.y is not None:
            self.label_lse = sums[2].log() if has_own_sum else student.lse
            z_y = student.z.gather(1, self.y)
            c += (self.label_lse - z_y) * self.inputs.label_factor
        return self._mask(c)

    def form_deltas_(self, γ: Tensor, needs: PairValues) -> None:
        """Overwrites the logits with the gradients of Σ γ c: (γ/τ) G, G = q ∘ (s - k) or q - p."""
        γD = γ * (self.inputs.factor / self.inputs.temperature)
        for classes in self.iterate_slices():
            parts = _Slice(self, classes)
            Δ, Δt = parts.compute_gradients(needs.needs_student, needs.needs_teacher)
            if Δ is not None:
                Δ.mul_(γD)
                if self.y is not None:
                    Δ.add_(parts.compute_label_probabilities() * (γ * self.inputs.label_factor))
                self.student.z[:, classes] = Δ
            if Δt is not None:
                self.teacher.z[:, classes] = Δt.mul_(γD)
        self._subtract_labels_(γ)

    def _subtract_labels_(self, γ: Tensor) -> None:
        """Δ -= γ label_factor e_y."""
        if self.y is not None:
            self.student.z.scatter_add_(1, self.y, -γ * self.inputs.label_factor)

    def _mask(self, v: Tensor) -> Tensor:
        return v if self.ignored is None else v.masked_fill(self.ignored, 0)

    # Second order

    def compute_derivative_(self) -> Tensor:
        """Fills the logits; returns ρ of each row."""
        self.compute_loss_()
        student, teacher = self.student, self.teacher
        for side in (student, teacher):
            side.qR, side.dk = torch.zeros_like(self.zeros), torch.zeros_like(self.zeros)
        self.aR = torch.zeros_like(self.zeros)
        for classes in self.iterate_slices():
            parts = _Slice(self, classes)
            if self.y is not None:
                R = _get(student.R)[:, classes]
                self.aR += (parts.compute_label_probabilities() * R).sum(1, keepdim=True)
            for side, q in ((student, parts.q), (teacher, parts.p)):
                side.qR += q.mul(_get(side.R)[:, classes]).sum(1, keepdim=True)
        for side in (student, teacher):
            side.qR /= self.inputs.temperature
        for classes in self.iterate_slices():
            parts = _Slice(self, classes)
            for (side, q, s), (r, ds) in zip(parts.scores, parts.differentiate_scores(), strict=True):
                side.dk += (s * r).add_(ds).mul_(q).sum(1, keepdim=True)
        ρ = (student.dk + teacher.dk) * self.inputs.factor
        if self.y is not None:
            ρ += (self.aR - _get(student.R).gather(1, self.y)) * self.inputs.label_factor
        return self._mask(ρ)

    def form_second_deltas_(self, γ: Tensor, needs: PairValues) -> None:
        """Overwrites the logits with Δ, and R with Q = dΔ.

        dG = q ∘ (r ∘ (s - k) + ds - dk), or q ∘ r - p ∘ rt.
        """
        student, teacher = self.student, self.teacher
        γD = γ * (self.inputs.factor / self.inputs.temperature)
        γ_y = γ * self.inputs.label_factor
        for classes in self.iterate_slices():
            parts = _Slice(self, classes)
            r, rt = parts.r, parts.rt
            linear = parts.q * r - parts.p * rt  # d(q - p)
            dG, dGt = linear, -linear
            for (side, q, s), (own_r, ds) in zip(
                parts.scores, parts.differentiate_scores(), strict=True
            ):
                d = (s - side.k).mul_(own_r).add_(ds).sub_(side.dk).mul_(q)
                dG, dGt = (d, dGt) if side is student else (dG, d)
            Q, Qt = dG.mul(γD), dGt.mul(γD)
            Δ, Δt = parts.compute_gradients(True, True)
            Δ, Δt = _get(Δ).mul_(γD), _get(Δt).mul_(γD)
            R = _get(student.R)[:, classes]
            if self.y is not None:
                a = parts.compute_label_probabilities() * γ_y
                Δ += a
                Q += a * (R - self.aR)
            R.copy_(Q)
            student.z[:, classes] = Δ
            _get(teacher.R)[:, classes] = Qt
            teacher.z[:, classes] = Δt
        self._subtract_labels_(γ)

    # Results

    def add_gradients(self, gradients: PairValues, needs: PairValues) -> None:
        """Adds the block's part to the gradients."""
        self.student.add_gradients(gradients[:3], needs[:3], self.is_first)
        self.teacher.add_gradients(gradients[3:], needs[3:], self.is_first)


class _OnlineSum:
    """Σ e^{z/τ} of each row, slice by slice, relative to the maximum so far."""

    def __init__(self, zeros: Tensor, temperature: float):
        self.temperature = temperature
        self.m, self.s = zeros - torch.inf, zeros

    def add(self, z: Tensor) -> None:
        m = torch.maximum(self.m, z.amax(1, keepdim=True))
        shift = m.masked_fill(m == -torch.inf, 0)  # since -inf - -inf is nan
        e = (z - shift).div_(self.temperature).exp_()
        decay = ((self.m - shift) / self.temperature).exp()
        self.s, self.m = self.s * decay + e.sum(1, keepdim=True), m

    def log(self) -> Tensor:
        return self.s.log() + self.m / self.temperature


class _Slice:
    """Probabilities and scores of some classes of a block.

    A score s or st gives a part q·s of the divergence and the gradient q ∘ (s - q·s) of the side's
    logits over τ. The other side's gradient is q - p or p - q if only one side has a score.
    """

    def __init__(self, block: _Block, classes: slice):
        self.block, self.classes, inputs = block, classes, block.inputs
        self.τ, self.mix = inputs.temperature, inputs.mix
        l, lt = self._compute_log_probabilities(block.student), None
        lt = self._compute_log_probabilities(block.teacher)
        self.q, self.p = l.exp(), lt.exp()
        student, teacher = block.student, block.teacher
        if self.mix == 0:
            self.scores = [(teacher, self.p, (lt - l).masked_fill_(self.p == 0, 0))]
        elif self.mix == 1:
            self.scores = [(student, self.q, (l - lt).masked_fill_(self.q == 0, 0))]
        else:
            self.m = (self.mix * self.p).add_(self.q, alpha=1 - self.mix)
            self.m.clamp_(min=torch.finfo(l.dtype).tiny)
            lm = self.m.log()
            s = (l - lm).mul_(1 - self.mix).masked_fill_(self.q == 0, 0)
            st = (lt - lm).mul_(self.mix).masked_fill_(self.p == 0, 0)
            self.scores = [(student, self.q, s), (teacher, self.p, st)]

    def _compute_log_probabilities(self, side: _Side) -> Tensor:
        return torch.add(-side.lse, side.z[:, self.classes], alpha=1 / self.τ)

    def compute_label_probabilities(self) -> Tensor:
        """a = softmax(z), at temperature 1."""
        if self.τ == 1:
            return self.q
        return (self.block.student.z[:, self.classes] - self.block.label_lse).exp_()

    def compute_gradients(
        self, needs_student: bool, needs_teacher: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """G and Gt, the gradients of the divergence with respect to z/τ and zt/τ."""
        student, G, Gt = self.block.student, None, None
        if needs_student and self.mix == 0:
            G = self.q - self.p
        if needs_teacher and self.mix == 1:
            Gt = self.p - self.q
        for side, q, s in self.scores:
            if side is student and needs_student:
                G = (s - side.k).mul_(q)
            elif side is not student and needs_teacher:
                Gt = (s - side.k).mul_(q)
        return G, Gt

    @property
    def r(self) -> Tensor:
        """dl along the direction."""
        return self._differentiate_log_probabilities(self.block.student)

    @property
    def rt(self) -> Tensor:
        """dlt along the direction."""
        return self._differentiate_log_probabilities(self.block.teacher)

    def _differentiate_log_probabilities(self, side: _Side) -> Tensor:
        return torch.add(-side.qR, _get(side.R)[:, self.classes], alpha=1 / self.τ)

    def differentiate_scores(self) -> list[tuple[Tensor, Tensor]]:
        """For each score, dl of its own side and ds."""
        r, rt = self.r, self.rt
        if self.mix == 0:
            return [(rt, rt - r)]
        if self.mix == 1:
            return [(r, r - rt)]
        # ds = (1-μ) (r - dm/m) = (1-μ) (μ p/m) (r - rt)
        difference = (r - rt).mul_(self.mix * (1 - self.mix)).div_(self.m)
        return [(r, self.p * difference), (rt, -self.q * difference)]


def _iterate_blocks(
    inputs: DivergenceInputs, direction: PairValues | None = None
) -> Iterator[_Block]:
    """Each block is finished before the next, which reuses its memory."""
    N, C, dtype = len(inputs.x), len(inputs.W), choose_divergence_dtype(inputs)
    groups = group_rows(N, C, inputs.keep)
    if not groups:
        return
    size = count_rows(groups[0])
    values, steps = inputs.values, direction
    sides = (
        _Side(values[:3], None if steps is None else steps[:3], C, size, dtype),
        _Side(values[3:], None if steps is None else steps[3:], C, size, dtype),
    )
    for i, rows in enumerate(groups):
        yield _Block(inputs, sides, rows, is_first=i == 0)


def choose_divergence_dtype(inputs: DivergenceInputs) -> torch.dtype:
    """The type of computation."""
    return torch.promote_types(wide_type(inputs.x.dtype), wide_type(inputs.xt.dtype))


def _get(v: Tensor | None) -> Tensor:
    """v, which is known to be a tensor."""
    assert v is not None
    return v


def _add_product_(r: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """r += A B. cuBLASLt may reject an addmm with one row, which it reads as a bias."""
    return r.add_(A @ B) if len(r) == 1 else r.addmm_(A, B)


def _allocate_gradients(inputs: DivergenceInputs, needs_gradient: Sequence[bool]) -> PairValues:
    """Zeros for each gradient that is needed, in the type of computation; else an empty tensor."""
    x, W, _, xt, Wt, _ = inputs.values
    teacher_shapes = ((0,), (0,)) if Wt is None else (Wt.shape, Wt.shape[:1])
    shapes = x.shape, W.shape, W.shape[:1], xt.shape, *teacher_shapes
    dtype = choose_divergence_dtype(inputs)
    return PairValues(
        *(
            x.new_zeros(shape if is_needed else (0,), dtype=dtype)
            for shape, is_needed in zip(shapes, needs_gradient, strict=True)
        )
    )


def _round_gradients(
    inputs: DivergenceInputs, gamma: Tensor | None, gradients: PairValues
) -> PairValues:
    """The gradients in the types of their inputs; those of a cost on the CPU are left wide."""
    values = zip(gradients, inputs.values, strict=True)
    return PairValues(
        *(
            g.to(v.dtype) if v is not None and is_rounded_now(gamma, v.dtype, v.device) else g
            for g, v in values
        )
    )


def _allocate_results(*args: Any) -> tuple[Tensor, ...]:
    """Memory for the results of `divergence`."""
    inputs, (gamma, needs_gradient) = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    needs = [need and gamma is not None for need in needs_gradient]
    c = inputs.x.new_empty((len(inputs.x), 1), dtype=choose_divergence_dtype(inputs))
    return c, *_round_gradients(inputs, gamma, _allocate_gradients(inputs, needs))


def _allocate_second_order(*args: Any) -> tuple[Tensor, ...]:
    """Memory for the results of `divergence_second_order`."""
    inputs, gamma, needs = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT], args[-1]
    gradients = _allocate_gradients(inputs, needs)
    return torch.empty_like(gamma), *_round_gradients(inputs, gamma, gradients)


def _count_flops(*args: Any) -> int:
    """FLOP of `divergence`, of arguments with shapes in place of tensors: X Wᵀ, Δ W, Δᵀ X and the
    same for the teacher.
    """
    inputs, (gamma, needs_gradient) = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    needs = PairValues(*(need and gamma is not None for need in needs_gradient))
    return _count_flops_of_products(inputs, 1 + needs.x + needs.W, 1 + needs.xt + needs.Wt)


def _count_flops_of_second_order(*args: Any) -> int:
    """FLOP of `divergence_second_order`: X Wᵀ; U Wᵀ, X Vᵀ; Q W, Δ V; Qᵀ X, Δᵀ U, for both."""
    inputs, rest = DivergenceInputs(*args[:INPUT_COUNT]), args[INPUT_COUNT:]
    _gamma, *direction, needs_gradient = rest
    counts = []
    for i in (0, 3):
        has_u, has_V = direction[i] is not None, direction[i + 1] is not None
        needs_x, needs_W = needs_gradient[i : i + 2]
        counts.append(1 + has_u + has_V + needs_x * (1 + has_V) + needs_W * (1 + has_u))
    return _count_flops_of_products(inputs, *counts)


def _count_flops_of_products(inputs: Any, count: int, teacher_count: int) -> int:
    """FLOP of this number of products with the student's and with the teacher's weight."""
    (N, D), (C, _) = inputs.x, inputs.W
    teacher_features = 0 if inputs.Wt is None else inputs.Wt[1]
    return 2 * N * C * (D * count + teacher_features * teacher_count)
