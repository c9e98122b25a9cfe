"""The head (F15 batch) block by block of rows, so that memory does not grow with rows x classes.

Shapes: x (N, D), W (C, D), b (C). The logits z = W x + b may be capped to v = cap tanh(z / cap).
Of each row there are the cross entropy c, lse = ln Σ e^v, its square q and the entropy h of the
softmax a; γ, ω, η, each (N), or () one for all, or None, are the coefficients of c, q and h.
The target of a row is `p e_y + t`: y, p (N) a class and its weight, t (N, C), or (1, C) for all
rows; each may be None, and p without y is in T = p + Σ t alone. u, V, s, π, τ are a direction in
which x, W, b, p, t move; each may be None.
keep (N) is False for the rows that are ignored: they are taken out of every product, on the CPU by
gathering the others, elsewhere, where counting them would wait for the device, by masks.
Where x is half, coefficients, p, t and what is computed of a row are float32, and so is all
arithmetic: results are rounded once. A result that is not wanted is empty.

A block's logits lie in memory class by class, which makes the products with W and for dW cheapest.
They are gone through in slices of classes that stay in the cache. Most often they are written over
by e^{v - m}, and then by Δ but for a coefficient of each row, with which x and the rows of dx are
scaled instead. Where the logits are needed again for Δ, they stay and e^{v - m} is computed twice.
Capped ones are there as tanh(z / cap), whose slope then loses fewest digits. m is the row's
maximum, or 0 where the sum of e^v, looked at on the CPU, shows that this does as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath.kernels._library import SLICE, exact, log_of_share, operator

ROWS = 256  # of a block, which share the cost of reading W and of adding to all of dW
LEAST = -1e4  # of v - m: e^v is 0 there, and (v - m) e^v is to be 0 where v is -inf
BLOCK_BYTES = (8 * 2**20, 64 * 2**20)  # of its logits: more rows for few classes, fewer for many


@operator(
    "head(Tensor? gamma, Tensor? omega, Tensor? eta, Tensor x, Tensor W, Tensor? b, Tensor? y,"
    " Tensor? p, Tensor? t, Tensor? keep, Tensor? sums, float base, float? cap, bool[] asks,"
    " bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor)",
    lambda gamma, omega, eta, x, W, b, y, p, t, keep, sums, base, cap, asks, wants: (
        *_of_rows(x, asks),
        *_rounded(x, W, b, gamma, *_gradients(x, W, t, wants)),
    ),
)
def head(
    gamma: Tensor | None,
    omega: Tensor | None,
    eta: Tensor | None,
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor | None,
    p: Tensor | None,
    t: Tensor | None,
    keep: Tensor | None,
    sums: Tensor | None,
    base: float,
    cap: float | None,
    asks: Sequence[bool],
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """c, q and lse of each row; if `asks` names them h and the largest logit's class (-1 of a row
    that is ignored); the `sums` m, Σ e^{v-m} and Σ e^{v-m} (v - m), (N, 3); and the gradients of
    Σ γ c + ω q + η h in x, W, b, p, t that `wants` names. Given the sums, it is these alone, in
    fewer passes.

    Where γ is one for all rows the gradients are not rounded, for they are still to be scaled.
    """
    c, q, lse, h, predicted, sums_ = _of_rows(x, asks)
    groups = _groups_of_rows(x, W, keep)
    dx, dW, db, dp, dt = _gradients(x, W, t, wants, bool(groups))
    ln = math.log(base)
    has_h = asks[0] or eta is not None

    def values(block: _Block) -> None:
        rows, target = block.rows, block.target
        loss = torch.zeros_like(block.s)
        shown = block.exponentials_(target.y, target.t is not None, has_h, asks[1])
        for classes, v in shown:
            loss -= target.dot(v, classes)
        if target.t is not None:
            loss += target.sum_of_t() * block.s.log()
        if target.p is not None:
            loss -= exact(target.p, block.of_p())
        sums_[rows] = torch.cat((block.m + torch.zeros_like(block.s), block.s, block.av), 1)
        c[rows] = block.kept(loss).squeeze(1) / ln
        lse[rows] = lse_rows = block.kept(block.lse()).squeeze(1)
        q[rows] = lse_rows.square()
        if asks[0]:
            h[rows] = block.kept(block.entropy()).squeeze(1) / ln
        if asks[1]:
            predicted[rows] = block.kept(block.top, -1).squeeze(1)

    def add(block: _Block) -> None:
        rows, z = block.rows, block.z
        g, o, n = block.column(gamma, ln), block.column(omega), block.column(eta, ln)
        if sums is None or wants[3] or wants[4]:
            values(block)
        else:
            block.come_again_(sums[rows])
        if g is None:
            return
        if wants[3]:
            dp[rows] = (-g * block.of_p()).squeeze(1)
        if wants[4]:
            for classes, v in block.shifted():
                _put(dt, rows, classes, v.sub_(block.s.log()).mul_(-g))
        if not any(wants[:3]):
            return
        k = _delta_(block, g, o, n)
        if wants[0]:
            dx[rows] = block.kept_((z @ block.W).mul_(k))
        if wants[1]:
            dW.addmm_(z.T, block.x * k, beta=block.beta)
        if wants[2]:
            db.addmv_(z.T, k.squeeze(1))

    stays = has_h or wants[4] or (cap is not None and t is not None)
    for block in _blocks(groups, x, W, b, y, p, t, keep, cap, stays):
        add(block)
    return c, q, lse, h, predicted, sums_, *_rounded(x, W, b, gamma, dx, dW, db, dp, dt)


@operator(
    "head_second(Tensor gamma, Tensor? omega, Tensor? eta, Tensor x, Tensor W, Tensor? b,"
    " Tensor? y, Tensor? p, Tensor? t, Tensor? keep, Tensor? u, Tensor? V, Tensor? s, Tensor? pi,"
    " Tensor? tau, float base, float? cap, bool[] wants)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda gamma, omega, eta, x, W, b, y, p, t, keep, u, V, s, pi, tau, base, cap, wants: (
        torch.empty_like(gamma),
        torch.empty_like(gamma),
        torch.empty_like(gamma) if eta is not None else gamma.new_empty(0),
        *_rounded(x, W, b, gamma, *_gradients(x, W, t, wants)),
    ),
)
def head_second(
    gamma: Tensor,
    omega: Tensor | None,
    eta: Tensor | None,
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor | None,
    p: Tensor | None,
    t: Tensor | None,
    keep: Tensor | None,
    u: Tensor | None,
    V: Tensor | None,
    s: Tensor | None,
    pi: Tensor | None,
    tau: Tensor | None,
    base: float,
    cap: float | None,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The derivatives of each row's c, q and, if there is η, h along (u, V, s, π, τ); and the
    gradients in x, W, b, p, t, which `wants` names, of their sum with coefficients γ, ω and η.
    """
    rho = torch.zeros_like(gamma), torch.zeros_like(gamma)
    rho_h = torch.zeros_like(gamma) if eta is not None else gamma.new_zeros(0)
    groups = _groups_of_rows(x, W, keep)
    hx, hW, hb, hp, ht = _gradients(x, W, t, wants, bool(groups))
    V, s = (None if v is None else v.to(gamma.dtype) for v in (V, s))
    ln = math.log(base)
    buffer = _buffer(groups, W, gamma.dtype)

    def add(block: _Block) -> None:
        rows, target, z = block.rows, block.target, block.z
        direction = _Target.of(rows, y, pi, tau)
        g, o, n = block.column(gamma, ln), block.column(omega), block.column(eta, ln)
        assert g is not None
        U = None if u is None else block.kept(u[rows].to(z.dtype))
        tz, tr, ar, avr = (torch.zeros_like(g) for _ in range(4))
        is_shown = direction.t is not None
        for classes, v in block.exponentials_(direction.y, is_shown, n is not None, False):
            tz += direction.dot(v, classes)
        r = block.kept_(_direction_of_logits_(buffer[: len(z)], block.x, block.W, U, V, s))
        for classes, rc in block.slices(r):  # from here on, of v
            if cap is not None:
                rc.mul_(_slope(z[:, classes]))
            if target.t is not None:
                tr += target.dot(rc, classes)
        r_y: Any = target.of_class(r)
        z_y: Any = target.of_class(z)
        for (_, v), (_, rc) in zip(block.shifted(), block.slices(r), strict=True):
            a = v.exp().div_(block.s)
            ar += a.mul_(rc).sum(1, keepdim=True)
            if n is not None:
                avr += a.mul_(v.clamp_(min=LEAST)).sum(1, keepdim=True)
        rho_c = target.total(like=g) * ar - tr - tz
        if direction.t is not None:
            rho_c += direction.sum_of_t() * block.s.log()
        if r_y is not None and target.p is not None:
            rho_c -= exact(target.p, r_y)
        if direction.p is not None:
            rho_c -= exact(direction.p, block.of_p())
        rho_q = 2 * block.lse() * ar
        for result, of_rows in zip(rho, (rho_c / ln, rho_q), strict=True):
            result[rows] = block.kept(of_rows).squeeze(1)
        D = g * direction.total(like=g)
        if n is not None:
            of_h = (block.s.log() - block.entropy()) * ar - avr
            rho_h[rows] = block.kept(of_h).squeeze(1) / ln
            D = D - n * of_h
        if o is not None:
            D = D + 2 * o * ar
        if wants[3]:
            hp[rows] = (g * (ar if r_y is None else ar - r_y)).squeeze(1)
        if wants[4]:
            for classes, rc in block.slices(r):
                _put(ht, rows, classes, g * (ar - rc))
        if not any(wants[:3]):
            return
        # r becomes Q = dΔ along the direction and z becomes Δ
        of_a = _weight_of_a(block, g, o, n)
        for (classes, v), (_, rc) in zip(block.shifted(), block.slices(r), strict=True):
            zc = z[:, classes]
            a = v.exp().div_(block.s)
            B = of_a if n is None else of_a - n * v.clamp_(min=LEAST)
            G = a * B
            Q = (rc - ar).mul_(B if n is None else B - n).add_(D).mul_(a)
            if target.t is not None:
                G -= g * target.t[:, classes]
            if direction.t is not None:
                Q -= g * direction.t[:, classes]
            if cap is not None:
                slope = _slope(zc)
                Q.mul_(slope).sub_(G.mul(zc).mul_(rc), alpha=2 / cap)
                G.mul_(slope)
            rc.copy_(Q)
            zc.copy_(G)
        Q, delta = r, z
        slope_y: Any = 1.0 if cap is None or z_y is None else _slope(z_y)
        if target.p is not None and target.y is not None:
            if cap is not None:
                Q.scatter_add_(1, target.y, g * target.p * r_y * z_y * (2 / cap))
            delta.scatter_add_(1, target.y, -g * target.p * slope_y)
        if direction.p is not None and direction.y is not None:
            Q.scatter_add_(1, direction.y, -g * direction.p * slope_y)
        if wants[0]:
            of_rows = Q @ block.W
            of_rows = of_rows if V is None else _add_product_(of_rows, delta, V)
            hx[rows] = block.kept_(of_rows)
        if wants[1]:
            hW.addmm_(Q.T, block.x, beta=block.beta)
            if U is not None:
                hW.addmm_(delta.T, U)
        if wants[2]:
            hb.add_(Q.sum(0))

    for block in _blocks(groups, x, W, b, y, p, t, keep, cap, stays=True):
        add(block)
    return *rho, rho_h, *_rounded(x, W, b, gamma, hx, hW, hb, hp, ht)


def _of_rows(x: Tensor, asks: Sequence[bool]) -> tuple[Tensor, ...]:
    """Zeros for c, q, lse, h and the sums, and -1 for the largest logit's class."""
    N, dtype = x.shape[0], wide_type(x.dtype)
    of_rows = [x.new_zeros(n, dtype=dtype) for n in (N, N, N, N if asks[0] else 0)]
    largest = x.new_full((N if asks[1] else 0,), -1, dtype=torch.int64)
    return *of_rows, largest, x.new_zeros((N, 3), dtype=dtype)


def _gradients(
    x: Tensor, W: Tensor, t: Tensor | None, wants: Sequence[bool], is_written: bool = False
) -> list[Tensor]:
    """Zeros for a gradient in x, W, b, p, t each; an empty tensor for one that is not wanted.

    Only that in W is not filled with zeros where the first block is to write all of it.
    """
    shapes = x.shape, W.shape, W.shape[:1], x.shape[:1], () if t is None else t.shape
    dtype = wide_type(x.dtype)
    return [
        (torch.empty if is_written and i == 1 else torch.zeros)(
            shape if wanted else (0,), dtype=dtype, device=x.device
        )
        for i, (shape, wanted) in enumerate(zip(shapes, wants, strict=True))
    ]


def _rounded(
    x: Tensor, W: Tensor, b: Tensor | None, gamma: Tensor | None, *gradients: Tensor
) -> tuple[Tensor, ...]:
    """The gradients in x, W, b in the types of these, if γ has a coefficient for each row."""
    if gamma is None or not gamma.dim():
        return gradients
    dx, dW, db, *rest = gradients
    return dx.to(x.dtype), dW.to(W.dtype), db.to((W if b is None else b).dtype), *rest


class _Target(NamedTuple):
    """p e_y + t (or a direction of it) for the rows of a block; y and p are columns."""

    y: Tensor | None
    p: Tensor | None
    t: Tensor | None

    @staticmethod
    def of(rows: Any, y: Tensor | None, p: Tensor | None, t: Tensor | None) -> _Target:
        return _Target(
            None if y is None else y[rows].unsqueeze(1),
            None if p is None else p[rows].unsqueeze(1),
            t if t is None or t.shape[0] == 1 else t[rows],
        )

    def of_class(self, v: Tensor) -> Tensor | None:
        """v_y of each row, if there is a y with a weight."""
        return None if self.y is None or self.p is None else v.gather(1, self.y)

    def sum_of_t(self) -> Tensor:
        """Σ t of each row."""
        assert self.t is not None
        return self.t.sum(1, keepdim=True)

    def total(self, like: Tensor) -> Tensor:
        """T = p + Σ t of each row."""
        total = torch.zeros_like(like) if self.p is None else self.p
        return total if self.t is None else total + self.sum_of_t()

    def dot(self, v: Tensor, classes: slice) -> Tensor:
        """t·v over some classes; where t is 0 it adds 0, also where v is -inf."""
        assert self.t is not None
        return exact(self.t[:, classes], v).sum(1, keepdim=True)


class _Block:
    """Some rows of the head, widened; `drop` marks those that are ignored, a column.

    z holds their logits, capped ones as tanh(z / cap), and unless they stay then e^{v - m} dv/dz.
    """

    def __init__(
        self,
        rows: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: _Target,
        drop: Tensor | None,
        z: Tensor,
        spare: Sequence[Tensor],
        size: int,
        beta: int,
        cap: float | None,
        stays: bool,
        is_shifted: bool,
    ):
        self.rows, self.x, self.W, self.b = rows, x, W, b
        self.target, self.drop, self.z, self.beta = target, drop, z, beta
        self.cap, self.stays, self.is_shifted = cap, stays, is_shifted
        self.spare, self.size = spare, size
        self.m: Tensor | float = 0.0
        self.comes_again = False
        self.z_y: Tensor | None = None
        self.l_y: Tensor | None = None
        self.s, self.av = torch.zeros_like(z[:, :1]), torch.zeros_like(z[:, :1])
        self.largest = torch.full_like(self.s, -math.inf)
        self.top = torch.zeros_like(z[:, :1], dtype=torch.int64)

    def logits_(self, classes: slice) -> Tensor:
        """z = W x + b, in this block's memory, or tanh(z / cap); of some classes."""
        z, W, b = self.z[:, classes], self.W[classes], None if self.b is None else self.b[classes]
        if b is None or len(z) == 1:  # see _add_product_
            torch.mm(self.x, W.T, out=z)
            z = z if b is None else z.add_(b)
        else:
            torch.addmm(b, self.x, W.T, out=z)
        z = self.kept_(z)
        if self.cap is None:
            return z
        if z.device.type != "cpu":
            return z.div_(self.cap).tanh_()
        e = z.div_(self.cap / 2).clamp_(-50, 50).expm1_()  # of 2 z / cap: faster than `tanh_`
        return e.div_(torch.add(e, 2, out=self.beside(e)))

    def value(self, z: Tensor) -> Tensor:
        """v of what is in memory: that, or cap tanh(z / cap) in memory of its own."""
        return z if self.cap is None else z * self.cap

    def exponentials_(
        self, y: Tensor | None, is_shown: bool, has_h: bool, has_top: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Makes e^{v-m}, their sum s, and l_y = v_y - m - ln s; shows v - m, slice by slice.

        If they are asked for, Σ e^{v-m} (v - m) and the class of the largest v too.
        """
        self.s.zero_()
        if (has_h or has_top) and not is_shown:
            self._as_they_come_(has_top)
            self.z_y = None if y is None else self.z.gather(1, y)
        elif self.is_shifted or is_shown or not self._unshifted_(y):
            self.is_shifted = True
            for classes, _ in self.slices(self.z):
                self.logits_(classes)
            self.z_y = None if y is None else self.z.gather(1, y)
            for shown in self._less_their_maximum_(has_h, has_top):
                if is_shown:
                    yield shown
        if y is None:
            self.l_y = None
        elif self.l_y is None and self.z_y is not None:
            self.l_y = self.value(self.z_y).sub(self.m).sub_(self.s.log())

    def _unshifted_(self, y: Tensor | None) -> bool:
        """With m = 0, each slice while it is in the cache; whether that does."""
        for classes, z in self.slices(self.z):
            self.logits_(classes)
            if y is not None and self.cap is not None:
                self.z_y = _taken(z, classes, y, self.z_y)
            self.s += self._exp_(self.less_m(z), z).sum(1, keepdim=True)
        e_y = self.s
        if y is not None and self.cap is not None and self.z_y is not None:
            e_y = self.value(self.z_y).exp_()
        elif y is not None:
            e_y = self.z.gather(1, y)
            e_y = e_y.exp_() if self.stays else e_y
        self.l_y = log_of_share(e_y, self.s)
        return self.l_y is not None

    def _less_their_maximum_(self, has_h: bool, has_top: bool) -> Iterator[tuple[slice, Tensor]]:
        """With the maximum as m, all logits of the block one after the other."""
        self.s.zero_()
        self.m = self.value(self.z.amax(1, keepdim=True))
        for classes, v in self.shifted():
            if has_top:
                self._see_the_largest(v, classes)
            yield classes, v
            if has_h:
                self.av += v.exp().mul_(v.clamp(min=LEAST)).sum(1, keepdim=True)
            self.s += self._exp_(v, self.z[:, classes]).sum(1, keepdim=True)

    def _as_they_come_(self, has_top: bool) -> None:
        """With the maximum so far as m, each slice while it is in the cache; the logits stay."""
        self.m = torch.full_like(self.s, -1e30)
        for classes, z in self.slices(self.z):
            self.logits_(classes)
            if has_top:
                self._see_the_largest(z, classes)
            before = self.m
            self.m = torch.maximum(before, self.value(z.amax(1, keepdim=True)))
            v, less = self.less_m(z), self.m - before
            e, kept = torch.exp(v, out=self.beside(z, 1)), less.neg().exp_()
            av = v.clamp_(min=LEAST).mul_(e).sum(1, keepdim=True)
            self.av = kept * (self.av - less * self.s) + av
            self.s = kept * self.s + e.sum(1, keepdim=True)

    def come_again_(self, sums: Tensor) -> None:
        """As after `exponentials_`, whose sums these are; logits that stay come with `shifted`."""
        self.m, self.s, self.av = sums.split(1, 1)
        self.comes_again = True
        if not self.stays:
            for classes, v in self.shifted():
                self._exp_(v, self.z[:, classes])

    def _see_the_largest(self, v: Tensor, classes: slice) -> None:
        largest, place = v.max(1, keepdim=True)
        self.top = torch.where(largest > self.largest, place + classes.start, self.top)
        self.largest = torch.maximum(self.largest, largest)

    def _exp_(self, v: Tensor, z: Tensor) -> Tensor:
        """e^v in its place; and in z, unless the logits stay, e^v dv/dz."""
        e = v.exp_()
        if self.cap is not None and not self.stays:
            torch.addcmul(e, e, z.square_(), value=-1, out=z)
        return e

    def less_m(self, z: Tensor) -> Tensor:
        """v - m of a slice; in its memory, unless the logits stay or are capped."""
        if self.cap is None and self.stays:
            return torch.sub(z, self.m, out=self.beside(z))
        v = z if self.cap is None else torch.mul(z, self.cap, out=self.beside(z))
        return v if isinstance(self.m, float) else v.sub_(self.m)

    def beside(self, z: Tensor, which: int = 0) -> Tensor:
        """Memory for as much as a slice, always the same."""
        return self.spare[which][: z.shape[0], : z.shape[1]]

    def slices(self, v: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The classes of each slice, and what v has there.

        They are the same whatever is computed, so that the backward has bit for bit the logits of
        the forward, whose sums it may take.
        """
        for i in range(0, v.shape[1], self.size):
            classes = slice(i, min(i + self.size, v.shape[1]))
            yield classes, v[:, classes]

    def shifted(self) -> Iterator[tuple[slice, Tensor]]:
        """v - m, slice by slice, in memory of its own or, unless the logits stay, in theirs."""
        for classes, z in self.slices(self.z):
            if self.comes_again:
                self.logits_(classes)
                if self.cap is not None and self.target.y is not None:
                    self.z_y = _taken(z, classes, self.target.y, self.z_y)
            yield classes, self.less_m(z)

    def lse(self) -> Tensor:
        """ln Σ e^v of each row."""
        return self.s.log() + self.m

    def of_p(self) -> Tensor:
        """-dc/dp of each row: l_y or, without y, -ln Σ e^v."""
        return -self.lse() if self.l_y is None else self.l_y

    def entropy(self) -> Tensor:
        """-Σ a ln a of each row; its terms are of one sign."""
        return self.s.log() - self.av / self.s

    def column(self, v: Tensor | None, divisor: float = 1.0) -> Tensor | None:
        """Of coefficients, those of these rows."""
        if v is None:
            return None
        v = v[self.rows] if v.dim() else v.expand(len(self.x))
        return self.kept(v.unsqueeze(1)) / divisor

    def kept(self, v: Tensor, ignored: int = 0) -> Tensor:
        """v, 0 or another number in the rows that are ignored."""
        return v if self.drop is None else v.masked_fill(self.drop, ignored)

    def kept_(self, v: Tensor) -> Tensor:
        """v, written over with 0 there."""
        return v if self.drop is None else v.masked_fill_(self.drop, 0)


def _weight_of_a(block: _Block, g: Tensor, o: Tensor | None, n: Tensor | None) -> Tensor:
    """Of each row, what a is multiplied with in Δ, where it is not with -n (v - m)."""
    weight = g * block.target.total(like=g)
    if o is not None:
        weight = weight + 2 * o * block.lse()
    return weight if n is None else weight + n * (block.s.log() - block.entropy())


def _delta_(block: _Block, g: Tensor, o: Tensor | None, n: Tensor | None) -> Tensor:
    """Makes Δ of what is in the block's memory, but for the factor of each row that it returns."""
    target, z, s = block.target, block.z, block.s
    y: Any = target.y
    p: Any = target.p
    has_y = y is not None and p is not None

    def slope_y() -> Any:  # of the true class, known when it has come
        return 1.0 if block.cap is None or block.z_y is None else _slope(block.z_y)

    if not block.stays and target.t is None:
        if not has_y:
            return _weight_of_a(block, g, o, None) / s
        if o is None:
            k, at_y = g * p / s, -s * slope_y()
        else:
            of_a, of_y = _weight_of_a(block, g, o, None), g * p * slope_y()
            least = torch.finfo(z.dtype).tiny ** 0.5  # stands for 0, by which at_y would be divided
            k = torch.where(of_a == 0, torch.where(of_y == 0, 0.0, least), of_a) / s
            at_y = torch.where(k == 0, 0.0, -of_y / k)
        z.scatter_add_(1, y, at_y)
        return k
    of_a = _weight_of_a(block, g, o, n)
    if not block.stays and target.t is not None:
        for classes, zc in block.slices(z):
            zc.mul_(of_a).sub_(target.t[:, classes] * (g * s))
        if has_y:
            z.scatter_add_(1, y, -g * p * s)
        return 1 / s
    of_a /= s
    for classes, v in block.shifted():
        zc = z[:, classes]
        slope = None if block.cap is None else _slope(zc)
        if n is None:
            torch.mul(v.exp_(), of_a, out=zc)
        else:
            torch.exp(v, out=zc)
            zc.mul_(torch.addcmul(of_a, v.clamp_(min=LEAST), -n / s, out=v))
        if target.t is not None:
            zc.sub_(g * target.t[:, classes])
        if slope is not None:
            zc.mul_(slope)
    if has_y:
        z.scatter_add_(1, y, -g * p * slope_y())
    return torch.ones_like(g)


def _taken(z: Tensor, classes: slice, y: Tensor, so_far: Tensor | None) -> Tensor:
    """z_y of the rows whose y is among the classes of this slice, else what it was so far."""
    place = y - classes.start
    z_y = z.gather(1, place.clamp(0, z.shape[1] - 1))
    is_here = (place >= 0) & (place < z.shape[1])
    return torch.where(is_here, z_y, 0.0 if so_far is None else so_far)


def _slope(u: Tensor) -> Tensor:
    """dv/dz = 1 - u², u = tanh(z / cap)."""
    return (1 - u).mul_(1 + u)


def block_rows(N: int, C: int) -> int:
    """The rows of a block: whole groups of 32, and blocks of equal size."""
    least, most = (size // (4 * max(C, 1)) for size in BLOCK_BYTES)
    rows = max(min(max(ROWS, least), most) // 32, 1) * 32
    return math.ceil(N / math.ceil(N / rows) / 32) * 32


def _groups_of_rows(x: Tensor, W: Tensor, keep: Tensor | None) -> list[Any]:
    """The rows of each block, as a slice, or as indices where some rows are ignored."""
    N, C = x.shape[0], W.shape[0]
    if keep is not None and _is_counted(keep):
        kept = keep.nonzero().squeeze(1)
        if len(kept) < N:
            return list(kept.split(block_rows(len(kept), C))) if len(kept) and C else []
    if not N or not C:
        return []
    size = block_rows(N, C)
    return [slice(i, min(i + size, N)) for i in range(0, N, size)]


def _is_counted(keep: Tensor) -> bool:
    """Whether the rows that are kept are gathered."""
    return keep.device.type == "cpu"


def _buffer(groups: list[Any], W: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for rows x classes of a block, class by class."""
    rows = groups[0] if groups else slice(0, 0)
    n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    return W.new_empty((W.shape[0], n), dtype=dtype).T


def _blocks(
    groups: list[Any],
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor | None,
    p: Tensor | None,
    t: Tensor | None,
    keep: Tensor | None,
    cap: float | None,
    stays: bool,
) -> Iterator[_Block]:
    W, b = W.to(wide_type(W.dtype)), None if b is None else b.to(wide_type(b.dtype))
    buffer, is_shifted = _buffer(groups, W, W.dtype), W.device.type != "cpu"
    size = _slice(buffer)
    spare = [torch.empty_like(buffer[:, :size]) for _ in range(2 if stays else cap is not None)]
    for i, rows in enumerate(groups):
        drop = None if keep is None or _is_counted(keep) else ~keep[rows].unsqueeze(1)
        X = x[rows].to(W.dtype)
        X = X if drop is None else X.masked_fill(drop, 0)
        z = buffer[: len(X)]
        target, beta = _Target.of(rows, y, p, t), min(i, 1)
        block = _Block(rows, X, W, b, target, drop, z, spare, size, beta, cap, stays, is_shifted)
        yield block
        is_shifted = block.is_shifted  # what one block needs, the next ones will


def _slice(v: Tensor) -> int:
    """How many classes of a block are one; on a GPU all, for calls cost more than memory there."""
    rows, C = v.shape
    if v.device.type != "cpu":
        return C
    return max(SLICE // 2 // max(rows, 1), 1)  # a half, because there may be a copy of it


def _direction_of_logits_(
    r: Tensor, x: Tensor, W: Tensor, u: Tensor | None, V: Tensor | None, s: Tensor | None
) -> Tensor:
    """W u + V x + s for a block, in r; 0 where nothing moves."""
    r.zero_() if u is None else torch.mm(u, W.T, out=r)
    if V is not None:
        _add_product_(r, x, V.T)
    return r if s is None else r.add_(s)


def _add_product_(r: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """r + A B, in r. Of one row, which is also a bias, cuBLASLt may refuse to do it in one call."""
    return r.add_(A @ B) if len(r) == 1 else r.addmm_(A, B)


def _put(result: Tensor, rows: Any, classes: slice, value: Tensor) -> None:
    """A slice of a block's gradient in t: into its rows, or summed where one row stands for all."""
    if result.shape[0] == 1:
        result[:, classes] += value.sum(0, keepdim=True)
    else:
        result[rows, classes] = value
