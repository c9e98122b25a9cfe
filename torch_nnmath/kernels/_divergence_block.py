"""A block of rows of a divergence between two heads: logits, scores, Δ and their derivatives.

The logits are class-major, and each pass over them processes slices of classes that fit in the
cache. Δ overwrites the logits, and dΔ their derivative along a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath._records import DivergenceInputs, PairValues
from torch_nnmath.kernels._block import fill_affine_, may_gather_rows
from torch_nnmath.kernels._library import SAFE_EXP, SLICE_SIZE

NO_VALUES = PairValues(*[False] * 6)


def choose_divergence_dtype(inputs: DivergenceInputs) -> torch.dtype:
    """The type of computation."""
    return torch.promote_types(wide_type(inputs.x.dtype), wide_type(inputs.xt.dtype))


class Side:
    """One of the two heads: a block of its logits z, and of their derivative R along a direction.

    The memory is that of all blocks. Without a weight, x holds the logits.
    """

    lse: LogSum  # ln Σ e^{z/τ} of each row
    k: Tensor  # q·s of the side's probabilities q and its score s
    qR: Tensor  # q·R/τ
    dk: Tensor  # derivative of k along the direction
    z: Tensor  # becomes Δ
    R: Tensor  # becomes Q = dΔ
    needs_mask: bool  # whether scores are masked where the probability is 0
    needs_maximum: bool  # whether the sum of exponentials is computed relative to the maximum

    def __init__(self, values: Any, direction: Any, C: int, row_count: int, dtype: torch.dtype):
        self.x, W, b = values
        self.W, self.b = (None if v is None else v.to(dtype) for v in (W, b))
        self.dtype = dtype
        # on a GPU reading a result would wait for it
        self.needs_mask = self.needs_maximum = self.x.device.type != "cpu"
        self.buffers = [self.x.new_empty((C, row_count), dtype=dtype).T]
        self.direction = None
        if direction is not None:
            u, *others = direction
            self.direction = u, *(None if v is None else v.to(dtype) for v in others)
            self.buffers.append(torch.empty_like(self.buffers[0]))

    def start_block(self, rows: Any, ignored: Tensor | None) -> None:
        """Selects the rows, and fills R along a direction."""
        self.rows, self.ignored = rows, ignored
        self.x_rows = self._select_rows(self.x)
        self.z, *others = (buffer[: len(self.x_rows)] for buffer in self.buffers)
        if self.direction is not None:
            (self.R,) = others
            self._fill_direction_(*self.direction)

    def _select_rows(self, x: Tensor) -> Tensor:
        return mask(x[self.rows].to(self.dtype), self.ignored)

    def fill_logits_(self, classes: slice) -> Tensor:
        """Writes the logits of some classes."""
        z = self.z[:, classes]
        if self.W is None:
            z.copy_(self.x_rows[:, classes])
        else:
            fill_affine_(z, self.x_rows, self.W, self.b, classes)
        return z if self.ignored is None else z.masked_fill_(self.ignored, 0)

    def start_sum(self, temperature: float) -> ExpSum:
        """An empty sum of exponentials of the block's logits."""
        return ExpSum(self.z.new_zeros((len(self.z), 1)), temperature, self.needs_maximum)

    def take_log(self, total: ExpSum, slices: Sequence[slice]) -> LogSum:
        """ln of the sum over all slices.

        Without the maximum it may overflow. Then it is computed again, and so for later blocks.
        """
        if not total.has_maximum and not total.is_safe():
            self.needs_maximum = True
            total = self.start_sum(total.temperature)
            for classes in slices:
                total.add(self.z[:, classes])
        return total.log()

    def _fill_direction_(self, u: Tensor | None, V: Tensor | None, σ: Tensor | None) -> None:
        """Writes R = U Wᵀ + X Vᵀ + σ, or U for given logits."""
        self.u_rows = None if u is None else self._select_rows(u)
        if self.u_rows is None:
            self.R.zero_()
        elif self.W is None:
            self.R.copy_(self.u_rows)
        else:
            torch.mm(self.u_rows, self.W.T, out=self.R)
        if V is not None:
            _add_product_(self.R, self.x_rows, V.T)
        if σ is not None:
            self.R.add_(σ)
        if self.ignored is not None:
            self.R.masked_fill_(self.ignored, 0)

    def add_gradients(
        self, gradients: Sequence[Tensor], needs: Sequence[bool], is_first: bool
    ) -> None:
        """dx = Δ W, dW += Δᵀ X, db += Σ_rows Δ; along a direction dx = Q W + Δ V and
        dW += Qᵀ X + Δᵀ U; for given logits dx = Δ or Q.
        """
        (dx, dW, db), (needs_x, needs_W, needs_b) = gradients, needs
        has_direction = self.direction is not None
        Δ, D = self.z, self.R if has_direction else self.z
        _, V, _ = self.direction or (None, None, None)
        if needs_x:
            result = D if self.W is None else D @ self.W
            if V is not None:
                result = _add_product_(result, Δ, V)
            dx[self.rows] = mask(result, self.ignored)
        if needs_W:
            dW.addmm_(D.T, self.x_rows, beta=0 if is_first else 1)
            if has_direction and self.u_rows is not None:
                dW.addmm_(Δ.T, self.u_rows)
        if needs_b:
            db.add_(D.sum(0))


class Block:
    """Some rows of the student's head, and of the cross entropy with their labels."""

    label_lse: LogSum  # ln Σ e^z of each row
    aR: Tensor  # a·R

    def __init__(self, inputs: DivergenceInputs, student: Side, rows: Any, is_first: bool):
        keep = inputs.keep
        self.inputs, self.student, self.rows, self.is_first = inputs, student, rows, is_first
        self.ignored = None if keep is None or may_gather_rows(keep) else ~keep[rows]
        student.start_block(rows, self.ignored)
        self.y = None if inputs.y is None or not inputs.label_factor else inputs.y[rows]
        row_count, C = student.z.shape
        # a GPU takes all classes at once, since calls cost it more than memory traffic
        size = C if student.z.device.type != "cpu" else SLICE_SIZE // 4 // max(row_count, 1)
        self.slices = [slice(i, i + max(size, 1)) for i in range(0, C, max(size, 1))]
        self.zeros = student.z.new_zeros((row_count, 1))

    @property
    def τ(self) -> float:
        return self.inputs.temperature

    def select_gamma(self, gamma: Tensor) -> Tensor:
        """γ of the block's rows, 0 where ignored."""
        γ = gamma[self.rows] if gamma.dim() else gamma.expand(self.zeros.shape)
        return mask(γ, self.ignored)

    def compute_label_probabilities(self, classes: slice) -> Tensor:
        """a = softmax(z), at temperature 1, of some classes."""
        high, low = self.label_lse
        return (self.student.z[:, classes] - high).sub_(low).exp_()

    def compute_label_loss(self) -> Tensor:
        """ln Σ e^z - z_y, times its factor."""
        assert self.y is not None
        high, low = self.label_lse
        return (high - self.student.z.gather(1, self.y) + low) * self.inputs.label_factor

    def compute_label_derivative(self) -> Tensor:
        """The derivative of `compute_label_loss`: a·R - R_y."""
        assert self.y is not None
        return (self.aR - self.student.R.gather(1, self.y)) * self.inputs.label_factor

    def subtract_labels_(self, γ: Tensor) -> None:
        """Δ -= γ e_y, times the factor of the cross entropy."""
        if self.y is not None:
            self.student.z.scatter_add_(1, self.y, -γ * self.inputs.label_factor)


class DenseBlock(Block):
    """A block whose teacher has a logit for every class."""

    def __init__(
        self, inputs: DivergenceInputs, student: Side, teacher: Side, rows: Any, is_first: bool
    ):
        super().__init__(inputs, student, rows, is_first)
        self.teacher = teacher
        teacher.start_block(rows, self.ignored)

    def compute_loss_(self, needs: PairValues = NO_VALUES) -> Tensor:
        """Fills the logits; returns c of each row.

        If the student alone needs gradients, its logits become q ∘ s or G, and the teacher's q.
        """
        self._compute_sums_()
        is_student_alone = needs.needs_student and not needs.needs_teacher
        # labels need the logits again if their temperature differs
        self.is_overwritten = is_student_alone and (self.y is None or self.τ == 1)
        c = self._sum_scores_()
        # 0 * inf is nan: these rows and those of later blocks are masked
        if not self.student.needs_mask and not bool(c.isfinite().all()):
            self.student.needs_mask = True
            if self.is_overwritten:
                self._compute_sums_()
            c = self._sum_scores_()
        c = c * self.inputs.factor
        return mask(c if self.y is None else c + self.label_loss, self.ignored)

    def _compute_sums_(self) -> None:
        """Fills the logits; computes what follows from the sums of their exponentials."""
        student, teacher, τ = self.student, self.teacher, self.τ
        sums = student.start_sum(τ), teacher.start_sum(τ)
        label_sum = student.start_sum(1.0) if self.y is not None and τ != 1 else None
        for classes in self.slices:
            z = student.fill_logits_(classes)
            sums[0].add(z)
            if label_sum is not None:
                label_sum.add(z)
            sums[1].add(teacher.fill_logits_(classes))
        student.lse, teacher.lse = (
            side.take_log(total, self.slices)
            for side, total in zip((student, teacher), sums, strict=True)
        )
        if self.y is not None:
            self.label_lse = student.lse
            if label_sum is not None:
                self.label_lse = student.take_log(label_sum, self.slices)
            self.label_loss = self.compute_label_loss()

    def _sum_scores_(self) -> Tensor:
        """The divergence of each row, k + kt."""
        student, teacher = self.student, self.teacher
        student.k, teacher.k = torch.zeros_like(self.zeros), torch.zeros_like(self.zeros)
        for classes in self.slices:
            parts, z = _Slice(self, classes), student.z[:, classes]
            if self.is_overwritten and self.inputs.mix == 0:
                difference = parts.subtract_other()
            for side, q, s in parts.scores:
                out = z if self.is_overwritten and side is student else s
                side.k += torch.mul(s, q, out=out).sum(1, keepdim=True)
            if self.is_overwritten:
                if self.inputs.mix == 0:
                    z.copy_(difference)
                if self.inputs.mix != 0 or self.y is not None:
                    teacher.z[:, classes] = parts.q
        return student.k + teacher.k

    def form_deltas_(self, γ: Tensor, needs: PairValues) -> None:
        """Overwrites the logits with the gradients of Σ γ c: (γ/τ) G, G = q ∘ (s - k) or q - p."""
        γD = γ * (self.inputs.factor / self.τ)
        if self.is_overwritten:
            self._form_deltas_from_products_(γD, γ * self.inputs.label_factor)
        else:
            self._form_deltas_from_logits_(γD, γ * self.inputs.label_factor, needs)
        self.subtract_labels_(γ)

    def _form_deltas_from_products_(self, γD: Tensor, γ_y: Tensor) -> None:
        """The same where q ∘ s or q - p, and q, are in the memory of the logits."""
        factor = -γD * self.student.k if self.y is None else γ_y - γD * self.student.k
        for classes in self.slices:
            Δ, q = self.student.z[:, classes].mul_(γD), self.teacher.z[:, classes]
            if self.inputs.mix != 0 or self.y is not None:
                Δ.addcmul_(q, factor)

    def _form_deltas_from_logits_(self, γD: Tensor, γ_y: Tensor, needs: PairValues) -> None:
        for classes in self.slices:
            G, Gt = _Slice(self, classes).compute_gradients(
                needs.needs_student, needs.needs_teacher
            )
            if G is not None:
                Δ = G.mul_(γD)
                if self.y is not None:
                    Δ += self.compute_label_probabilities(classes).mul_(γ_y)
                self.student.z[:, classes] = Δ
            if Gt is not None:
                torch.mul(Gt, γD, out=self.teacher.z[:, classes])

    def compute_derivative_(self) -> Tensor:
        """Fills the logits; returns ρ of each row."""
        self.compute_loss_()
        student, teacher = self.student, self.teacher
        for side in (student, teacher):
            side.qR, side.dk = torch.zeros_like(self.zeros), torch.zeros_like(self.zeros)
        self.aR = torch.zeros_like(self.zeros)
        for classes in self.slices:
            parts = _Slice(self, classes)
            if self.y is not None:
                a = self.compute_label_probabilities(classes)
                self.aR += a.mul_(student.R[:, classes]).sum(1, keepdim=True)
            for side, q in ((student, parts.q), (teacher, parts.p)):
                side.qR += q.mul(side.R[:, classes]).sum(1, keepdim=True)
        for side in (student, teacher):
            side.qR /= self.τ
        for classes in self.slices:
            parts = _Slice(self, classes)
            steps = parts.differentiate_scores()
            for (side, q, s), (r, ds) in zip(parts.scores, steps, strict=True):
                side.dk += s.mul_(r).add_(ds).mul_(q).sum(1, keepdim=True)
        ρ = (student.dk + teacher.dk) * self.inputs.factor
        if self.y is not None:
            ρ += self.compute_label_derivative()
        return mask(ρ, self.ignored)

    def form_second_deltas_(self, γ: Tensor) -> None:
        """Overwrites the logits with Δ, and R with Q = dΔ.

        dG = q ∘ (r ∘ (s - k) + ds - dk), or q ∘ r - p ∘ rt.
        """
        student, teacher = self.student, self.teacher
        γD = γ * (self.inputs.factor / self.τ)
        for classes in self.slices:
            parts = _Slice(self, classes)
            linear = parts.q * parts.r - parts.p * parts.rt  # d(q - p)
            dG, dGt = linear, -linear
            steps = parts.differentiate_scores()
            for (side, q, s), (own_r, ds) in zip(parts.scores, steps, strict=True):
                d = (s - side.k).mul_(own_r).add_(ds).sub_(side.dk).mul_(q)
                dG, dGt = (d, dGt) if side is student else (dG, d)
            G, Gt = parts.compute_gradients(True, True)
            assert G is not None
            assert Gt is not None
            Δ, Q, R = G.mul_(γD), dG.mul(γD), student.R[:, classes]
            if self.y is not None:
                a = self.compute_label_probabilities(classes) * (γ * self.inputs.label_factor)
                Δ += a
                Q += a * (R - self.aR)
            R.copy_(Q)
            student.z[:, classes] = Δ
            torch.mul(dGt, γD, out=teacher.R[:, classes])
            torch.mul(Gt, γD, out=teacher.z[:, classes])
        self.subtract_labels_(γ)

    def add_gradients(self, gradients: PairValues, needs: PairValues) -> None:
        """Adds the block's part to the gradients."""
        self.student.add_gradients(gradients[:3], needs[:3], self.is_first)
        self.teacher.add_gradients(gradients[3:], needs[3:], self.is_first)


class LogSum(NamedTuple):
    """A logarithm of a sum as two terms: rounded, it would be less exact than the largest logit."""

    high: Tensor
    low: Tensor


def widen_most(v: Tensor) -> Tensor:
    """v in float64 on the CPU; other devices may lack it, or be slow."""
    return v.double() if v.device.type == "cpu" else v


class ExpSum:
    """Σ e^{z/τ} of each row, slice by slice; with `has_maximum` relative to the maximum so far."""

    def __init__(self, zeros: Tensor, temperature: float, has_maximum: bool = True):
        self.temperature, self.has_maximum = temperature, has_maximum
        self.m, self.s = zeros - torch.inf if has_maximum else zeros, zeros

    def add(self, z: Tensor) -> None:
        """Adds the terms of some classes."""
        if not self.has_maximum:
            v = z.exp() if self.temperature == 1 else (z / self.temperature).exp_()
            self.s = self.s + v.sum(1, keepdim=True)
            return
        m = torch.maximum(self.m, z.amax(1, keepdim=True))
        shift = m.masked_fill(m == -torch.inf, 0)  # since -inf - -inf is nan
        v = z - shift
        if self.temperature != 1:
            v /= self.temperature
        decay = ((self.m - shift) / self.temperature).exp()
        self.s, self.m = self.s * decay + v.exp_().sum(1, keepdim=True), m

    def is_safe(self) -> bool:
        """Whether a sum without maximum neither overflowed nor lost terms."""
        return bool(((self.s < SAFE_EXP) & (self.s > 1 / SAFE_EXP)).all())

    def log(self) -> LogSum:
        """ln Σ e^{z/τ}."""
        a, b = widen_most(self.m) / self.temperature, widen_most(self.s).log()
        high = (a + b).to(self.s.dtype)
        if a.dtype != high.dtype:
            low = (a + b - high).to(high.dtype)
        else:
            shift = high - a  # low is the rounding error of a + b
            low = (a - (high - shift)) + (b - shift)
        return LogSum(high, low.masked_fill(high.isinf(), 0))


class _Slice:
    """Probabilities and scores of some classes of a `DenseBlock`.

    A score s or st gives a part q·s of the divergence and the gradient q ∘ (s - q·s) of the side's
    logits over τ. A side without a score has the gradient q - p or p - q.
    """

    def __init__(self, block: DenseBlock, classes: slice):
        self.block, self.classes, self.mix = block, classes, block.inputs.mix
        self.student, self.teacher = block.student, block.teacher
        (high, low), (high_t, low_t) = self.student.lse, self.teacher.lse
        u, ut = self._subtract(high, self.student.z), self._subtract(high_t, self.teacher.z)
        self.q, self.p = (u - low).exp_(), (ut - low_t).exp_()
        # lost in the rounding of u, the low parts would shift all classes of a row alike
        t = ut.sub_(u).sub_(low_t - low)
        if self.mix == 0:
            s, st = None, t
        elif self.mix == 1:
            s, st = t.neg_(), None
        else:
            s, st = subtract_log_mixture(t, self.mix)
            s, st = s.mul_(1 - self.mix), st.mul_(self.mix)
        self.log_ratio = s if st is None else st  # of F25 and F26, not masked
        sides = (self.student, self.q, s), (self.teacher, self.p, st)
        self.scores = [(side, q, self._mask_(s, q)) for side, q, s in sides if s is not None]

    def _mask_(self, s: Tensor, q: Tensor) -> Tensor:
        """s, 0 where q is: 0 ln 0 = 0, also where a logarithm is infinite."""
        return s.masked_fill(q == 0, 0) if self.student.needs_mask else s

    def _subtract(self, sums: Tensor, values: Tensor) -> Tensor:
        """values/τ - sums, of the slice."""
        values = values[:, self.classes]
        if self.block.τ == 1:
            return values - sums
        return torch.add(-sums, values, alpha=1 / self.block.τ)

    def compute_gradients(
        self, needs_student: bool, needs_teacher: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """G and Gt, the gradients of the divergence with respect to z/τ and zt/τ."""
        G = self.subtract_other() if needs_student and self.mix == 0 else None
        Gt = self.subtract_other() if needs_teacher and self.mix == 1 else None
        for side, q, s in self.scores:
            if side is self.student and needs_student:
                G = s.sub_(side.k).mul_(q)
            elif side is self.teacher and needs_teacher:
                Gt = s.sub_(side.k).mul_(q)
        return G, Gt

    def subtract_other(self) -> Tensor:
        """The gradient of the side without a score, q - p or p - q.

        It is exact where both are nearly 1: max(p, q) (1 - e^{-|s|}), with the sign of -s.
        """
        assert self.log_ratio is not None
        larger = torch.maximum(self.p, self.q)
        difference = self.log_ratio.abs().neg_().expm1_().mul_(larger).abs_()
        if self.student.needs_mask:
            difference.masked_fill_(larger == 0, 0)
        return difference.copysign_(self.log_ratio).neg_()

    @property
    def r(self) -> Tensor:
        """dl along the direction."""
        return self._subtract(self.student.qR, self.student.R)

    @property
    def rt(self) -> Tensor:
        """dlt along the direction."""
        return self._subtract(self.teacher.qR, self.teacher.R)

    def differentiate_scores(self) -> list[tuple[Tensor, Tensor]]:
        """For each score, dl of its own side and ds."""
        r, rt = self.r, self.rt
        if self.mix == 0:
            return [(rt, rt - r)]
        if self.mix == 1:
            return [(r, r - rt)]
        # ds = (1-μ)(r - dm/m) = (1-μ)(μ p/m)(r - rt)
        m = (self.mix * self.p).add_(self.q, alpha=1 - self.mix)
        m.clamp_(min=torch.finfo(m.dtype).tiny)
        difference = (r - rt).mul_(self.mix * (1 - self.mix)).div_(m)
        return [(r, self.p * difference), (rt, -self.q * difference)]


def subtract_log_mixture(t: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """l - ln m and lt - ln m of t = lt - l and m = μ e^lt + (1-μ) e^l, exact also where t is small.

    The logarithm of the larger side's probability over m is
    g = -ln(1 + w (e^{-|t|} - 1)), w the weight of the other side; that of the other is g - |t|.
    """
    g = t.abs().neg_().expm1_()
    g = g.mul_(mix) if mix == 0.5 else g.mul_(torch.where(t > 0, t.new_tensor(1 - mix), mix))
    g = g.log1p_().neg_()
    return g - t.clamp(min=0), g + t.clamp_(max=0)


def mask(v: Tensor, ignored: Tensor | None) -> Tensor:
    """v, with 0 in the ignored rows."""
    return v if ignored is None else v.masked_fill(ignored, 0)


def _add_product_(r: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """r += A B. cuBLASLt may reject an addmm with one row, which it reads as a bias."""
    return r.add_(A @ B) if len(r) == 1 else r.addmm_(A, B)
