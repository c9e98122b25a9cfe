"""A block of rows of a divergence whose teacher has log-probabilities of k classes a row (F28).

The student's other classes are one more class, the rest, or they are left out. Their logits stay in
the buffer, in which those of the k classes are -inf.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath._records import DivergenceInputs, PairValues
from torch_nnmath.kernels._divergence_block import (
    NO_VALUES,
    Block,
    ExpSum,
    LogSum,
    Side,
    mask,
    subtract_log_mixture,
    widen_most,
)

ALL_VALUES = PairValues(*[True] * 6)


class Partials(NamedTuple):
    """A divergence of log-probabilities l, lt, and its partial derivatives f, ft with respect to
    them; not those with respect to logits, since l and lt need not be normalised.
    """

    c: Tensor  # (n, 1)
    f: Tensor
    ft: Tensor


def compute_partials(l: Tensor, lt: Tensor, mix: float) -> Partials:
    """The divergence of the classes in the last axis; terms with probability 0 are 0."""
    q, p = l.exp(), lt.exp()
    if mix == 0:
        f, ft = -p, p * (lt - l).masked_fill(p == 0, 0)
        return Partials(ft.sum(1, keepdim=True), f, ft + p)
    if mix == 1:
        f, ft = q * (l - lt).masked_fill(q == 0, 0), -q
        return Partials(f.sum(1, keepdim=True), f + q, ft)
    s, st = subtract_log_mixture(lt - l, mix)
    f = (1 - mix) * q * s.masked_fill_(q == 0, 0)
    ft = mix * p * st.masked_fill_(p == 0, 0)
    return Partials((f + ft).sum(1, keepdim=True), f, ft)


def differentiate_partials(
    l: Tensor, lt: Tensor, r: Tensor, rt: Tensor, mix: float
) -> tuple[Tensor, Tensor]:
    """The derivatives of f and ft along the direction r of l and rt of lt."""
    q, p = l.exp(), lt.exp()
    _, f, ft = compute_partials(l, lt, mix)
    if mix == 0:
        return -p * rt, ft * rt + p * (rt - r)
    if mix == 1:
        return f * r + q * (r - rt), -q * r
    m = (mix * p + (1 - mix) * q).clamp_(min=torch.finfo(l.dtype).tiny)
    difference = mix * (1 - mix) * q * (p / m) * (r - rt)
    return f * r + difference, ft * rt - difference


class TopKBlock(Block):
    """A block whose teacher has the log-probabilities lt of k classes in each row.

    w is the softmax of the rest's logits; q_j = w_j q_rest. Vectors of k or k + 1 entries hold the
    k classes, and then the rest.
    """

    def __init__(
        self, inputs: DivergenceInputs, student: Side, u: Tensor | None, rows: Any, is_first: bool
    ):
        super().__init__(inputs, student, rows, is_first)
        dtype, C = student.z.dtype, student.z.shape[1]
        assert inputs.indices is not None
        self.u = None if u is None else mask(u[rows].to(dtype), self.ignored)
        self.indices = inputs.indices[rows]
        self.given = mask(inputs.xt[rows].to(dtype), self.ignored)
        self.has_rest = inputs.has_rest and self.indices.shape[1] < C
        self.k = self.indices.shape[1]

    def compute_loss_(self, needs: PairValues = NO_VALUES) -> Tensor:
        """Fills the logits, sets those of the k classes to -inf; returns c of each row."""
        student = self.student
        for classes in self.slices:
            student.fill_logits_(classes)
        if self.y is not None:
            self.z_y = student.z.gather(1, self.y)
        self.z_k = student.z.gather(1, self.indices)
        student.z.scatter_(1, self.indices, -torch.inf)
        rest, label_rest = ExpSum(self.zeros, self.τ), ExpSum(self.zeros, 1.0)
        has_label_sum = self.y is not None and self.τ != 1
        for classes in self.slices:
            z = student.z[:, classes]
            rest.add(z)
            if has_label_sum:
                label_rest.add(z)
        self.rest_lse = rest.log()
        # w is then 0, and not nan
        self.rest_shift = self.rest_lse.high.masked_fill(self.rest_lse.high == -torch.inf, 0)
        l, _ = self._add_k_classes(self.rest_lse, self.τ)
        self.q_rest = l[:, self.k :].exp()
        self.l = l if self.has_rest else l[:, : self.k]
        self.lt = self.given
        if self.has_rest:
            mass = 1 - widen_most(self.given).exp().sum(1, keepdim=True)
            floor = torch.finfo(self.given.dtype).eps
            self.is_rest_given = (mass > floor).to(self.given.dtype)
            self.lt = torch.cat((self.given, mass.clamp_(min=floor).log_().to(l.dtype)), 1)
        self.partials = compute_partials(self.l, self.lt, self.inputs.mix)
        c = self.partials.c * self.inputs.factor
        if self.y is not None:
            label_sum = label_rest.log() if has_label_sum else self.rest_lse
            _, lse = self._add_k_classes(label_sum, 1.0)
            high = lse.to(self.z_k.dtype)
            self.label_lse = LogSum(high, (lse - high).to(high.dtype))
            c += (lse - self.z_y).to(c.dtype) * self.inputs.label_factor
        return mask(c, self.ignored)

    def _add_k_classes(self, rest: LogSum, τ: float) -> tuple[Tensor, Tensor]:
        """The log-probabilities of k classes and the rest, and ln of the sum over all classes."""
        z_k, high, low = (widen_most(v) for v in (self.z_k, *rest))
        logarithms = torch.cat((z_k / τ, high + low), 1)
        lse = logarithms.logsumexp(1, keepdim=True)
        return (logarithms - lse).to(self.z_k.dtype), lse

    def _extend(self, values: Tensor, rest: Tensor) -> Tensor:
        """The values of the k classes, and that of the rest if it counts."""
        return torch.cat((values, rest), 1) if self.has_rest else values

    def form_deltas_(self, γ: Tensor, needs: PairValues) -> None:
        """Overwrites the logits with the gradients of Σ γ c, those of lt in `dxt`.

        F = Σ f. Δ_j = (γ/τ)(f_j - q_j F) of the k classes, (γ/τ) w_j (f_rest - q_rest F) of others.
        """
        _, f, ft = self.partials
        γD = γ * (self.inputs.factor / self.τ)
        q, F = self.l[:, : self.k].exp(), f.sum(1, keepdim=True)
        rest = self._compute_rest(f, F)
        Δ_k = γD * (f[:, : self.k] - q * F)
        if self.y is not None:
            Δ_k += self._compute_label_probabilities_of_k() * (γ * self.inputs.label_factor)
        for classes in self.slices:
            Δ = self._compute_w(classes).mul_(γD * rest)
            if self.y is not None:
                a = self.compute_label_probabilities(classes)
                Δ += a.mul_(γ * self.inputs.label_factor)
            self.student.z[:, classes] = Δ
        self.student.z.scatter_(1, self.indices, Δ_k)
        self.subtract_labels_(γ)
        if needs.xt:
            self.dxt = (γ * self.inputs.factor) * self._subtract_rest(ft)

    def _compute_rest(self, f: Tensor, F: Tensor) -> Tensor:
        """f_rest - q_rest F."""
        f_rest = f[:, self.k :] if self.has_rest else self.zeros
        return f_rest - self.q_rest * F

    def _subtract_rest(self, ft: Tensor) -> Tensor:
        """ft_i - p_i ft_rest/p_rest, since p_rest = 1 - Σ p_i."""
        if not self.has_rest:
            return ft
        p = self.lt.exp()
        self.h = ft[:, self.k :] / p[:, self.k :] * self.is_rest_given
        return ft[:, : self.k] - p[:, : self.k] * self.h

    def _compute_w(self, classes: slice) -> Tensor:
        z = self.student.z[:, classes]
        return torch.add(-self.rest_shift, z, alpha=1 / self.τ).sub_(self.rest_lse.low).exp_()

    def _compute_label_probabilities_of_k(self) -> Tensor:
        high, low = self.label_lse
        return (self.z_k - high).sub_(low).exp_()

    # Second order

    def compute_derivative_(self) -> Tensor:
        """Fills the logits; returns ρ = f·r + ft·rt of each row."""
        self.compute_loss_()
        R, τ = self.student.R, self.τ
        self.R_k, self.wR, self.aR = R.gather(1, self.indices), self.zeros, self.zeros
        for classes in self.slices:
            self.wR = self.wR + self._compute_w(classes).mul_(R[:, classes]).sum(1, keepdim=True)
            if self.y is not None:
                a = self.compute_label_probabilities(classes)
                self.aR = self.aR + a.mul_(R[:, classes]).sum(1, keepdim=True)
        self.wR = self.wR / τ
        q = self.l[:, : self.k].exp()
        qR = self.q_rest * self.wR + (q * self.R_k).sum(1, keepdim=True) / τ
        self.r_rest = self.wR - qR
        self.r = self._extend(self.R_k / τ, self.wR) - qR
        self.rt = self.zeros.expand(self.given.shape) if self.u is None else self.u
        if self.has_rest:
            p = self.lt.exp()
            rest = -(p[:, : self.k] * self.rt).sum(1, keepdim=True) / p[:, self.k :]
            self.rt = torch.cat((self.rt, rest * self.is_rest_given), 1)
        _, f, ft = self.partials
        ρ = (f * self.r + ft * self.rt).sum(1, keepdim=True) * self.inputs.factor
        if self.y is not None:
            a = self._compute_label_probabilities_of_k()
            self.aR = self.aR + (a * self.R_k).sum(1, keepdim=True)
            ρ += self.compute_label_derivative()
        return mask(ρ, self.ignored)

    def form_second_deltas_(self, γ: Tensor) -> None:
        """Overwrites the logits with Δ, and R with Q = dΔ; dxt holds the derivative of its own.

        The Δ of other classes is w_j A, A = f_rest - q_rest F: Q_j = w_j ((R_j/τ - w·R/τ) A + dA).
        """
        _, f, _ = self.partials
        df, dft = differentiate_partials(self.l, self.lt, self.r, self.rt, self.inputs.mix)
        F, dF = f.sum(1, keepdim=True), df.sum(1, keepdim=True)
        q, k = self.l[:, : self.k].exp(), self.k
        A = self._compute_rest(f, F)
        dA = self._compute_rest(df, dF) - self.q_rest * self.r_rest * F
        γD = γ * (self.inputs.factor / self.τ)
        γ_y = γ * self.inputs.label_factor
        R, Q_k = self.student.R, γD * (df[:, :k] - q * (self.r[:, :k] * F + dF))
        if self.y is not None:
            Q_k += γ_y * self._compute_label_probabilities_of_k() * (self.R_k - self.aR)
        for classes in self.slices:
            r = torch.add(-self.wR, R[:, classes], alpha=1 / self.τ)
            Q = r.mul_(A).add_(dA).mul_(self._compute_w(classes)).mul_(γD)
            if self.y is not None:
                a = self.compute_label_probabilities(classes)
                Q += a.mul_(R[:, classes] - self.aR).mul_(γ_y)
            R[:, classes] = Q
        R.scatter_(1, self.indices, Q_k)
        self.form_deltas_(γ, ALL_VALUES)
        self.dxt = (γ * self.inputs.factor) * self._differentiate_rest(dft)

    def _differentiate_rest(self, dft: Tensor) -> Tensor:
        """The derivative of `_subtract_rest`, which has set h = ft_rest/p_rest."""
        if not self.has_rest:
            return dft
        k, p = self.k, self.lt.exp()
        dh = dft[:, k:] / p[:, k:] * self.is_rest_given - self.h * self.rt[:, k:]
        return dft[:, :k] - p[:, :k] * (self.rt[:, :k] * self.h + dh)

    def add_gradients(self, gradients: PairValues, needs: PairValues) -> None:
        """Adds the block's part to the gradients."""
        self.student.add_gradients(gradients[:3], needs[:3], self.is_first)
        if needs.xt:
            gradients.xt[self.rows] = mask(self.dxt, self.ignored)
