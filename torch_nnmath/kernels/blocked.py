"""The head (F15 batch) block by block of rows, so that memory does not grow with rows x classes.

Shapes: γ (N) the coefficient of each row's loss, or () one for all; x (N, D), W (C, D), b (C). The
target of a row is `p e_y + t`: y, p (N) a class and its weight, t (N, C), or (1, C) for all rows;
each may be None. u, V, s, π, τ are a direction in which x, W, b, p, t move; each may be None.
keep (N) is False for the rows that are ignored: they are taken out of every product, on the CPU by
gathering the others, elsewhere, where counting them would wait for the device, by masks.
Where x is half, γ, p, t and c are float32, and so is all arithmetic: results are rounded once.
A result that is not wanted is empty.

A block's logits lie in memory class by class, which makes the products with W and for dW cheapest.
They are written over, in slices of classes that stay in the cache, by e^{z - m}, and then by Δ but
for a coefficient of each row, with which x and the rows of dx are scaled instead. m is the row's
maximum, or 0 where the sum of e^z, looked at on the CPU, shows that this does as well.
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
BLOCK_BYTES = (8 * 2**20, 64 * 2**20)  # of its logits: more rows for few classes, fewer for many


@operator(
    "head(Tensor? gamma, Tensor x, Tensor W, Tensor? b, Tensor? y, Tensor? p, Tensor? t,"
    " Tensor? keep, float base, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda gamma, x, W, b, y, p, t, keep, base, wants: (
        x.new_empty(x.shape[:1], dtype=wide_type(x.dtype)),
        *_rounded(x, W, gamma, *_results(x, W, t, wants)),
    ),
)
def head(
    gamma: Tensor | None,
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor | None,
    p: Tensor | None,
    t: Tensor | None,
    keep: Tensor | None,
    base: float,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """c of each row, and the gradients of Σ γ c in x, W, b, p, t that `wants` names.

    Where γ is one for all rows they are not rounded, for they are still to be scaled.
    """
    c = x.new_zeros(x.shape[:1], dtype=wide_type(x.dtype))
    coefficients = torch.ones_like(c) if gamma is None else gamma.expand(c.shape)
    groups = _groups_of_rows(x, W, keep)
    dx, dW, db, dp, dt = _results(x, W, t, wants, bool(groups))

    def add(block: _Block) -> None:
        rows, target, z = block.rows, block.target, block.z
        g = block.kept(coefficients[rows].unsqueeze(1)) / math.log(base)
        loss = torch.zeros_like(g)
        if wants[4]:
            _put(dt, rows, slice(None), torch.log_softmax(block.logits_(), 1).mul_(-g))
        for classes, zc in block.exponentials_(target.y, is_shown=target.t is not None):
            loss -= target.dot(zc, classes)
        if target.t is not None:
            loss += target.sum_of_t() * block.s.log()
        if block.l_y is not None and target.p is not None:
            loss -= exact(target.p, block.l_y)
            if wants[3]:
                dp[rows] = (-g * block.l_y).squeeze(1)
        c[rows] = block.kept(loss).squeeze(1) / math.log(base)
        if any(wants[:3]):
            k = g / block.s  # of a row: z k becomes Δ
            if target.t is None and target.p is not None and target.y is not None:
                k *= target.p
                z.scatter_add_(1, target.y, -block.s)
            else:
                T = target.total(like=g)
                for zc in _slices(z):
                    zc.mul_(T)
                target.subtract_from_(z, block.s)
            if wants[0]:
                dx[rows] = block.kept_((z @ block.W).mul_(k))
            if wants[1]:
                dW.addmm_(z.T, block.x * k, beta=block.beta)
            if wants[2]:
                db.addmv_(z.T, k.squeeze(1))

    for block in _blocks(groups, x, W, b, y, p, t, keep):
        add(block)
    return c, *_rounded(x, W, gamma, dx, dW, db, dp, dt)


@operator(
    "head_second(Tensor gamma, Tensor x, Tensor W, Tensor? b, Tensor? y, Tensor? p, Tensor? t,"
    " Tensor? keep, Tensor? u, Tensor? V, Tensor? s, Tensor? pi, Tensor? tau, float base,"
    " bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda gamma, x, W, b, y, p, t, keep, u, V, s, pi, tau, base, wants: (
        torch.empty_like(gamma),
        *_rounded(x, W, gamma, *_results(x, W, t, wants)),
    ),
)
def head_second(
    gamma: Tensor,
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
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """ρ, the derivative of each row's c along (u, V, s, π, τ), and the gradients of Σ γ ρ."""
    rho = torch.zeros_like(gamma)
    groups = _groups_of_rows(x, W, keep)
    hx, hW, hb, hp, ht = _results(x, W, t, wants, bool(groups))
    V, s = (None if v is None else v.to(gamma.dtype) for v in (V, s))
    buffer = _buffer(groups, W, gamma.dtype)

    def add(block: _Block) -> None:
        rows, target, a = block.rows, block.target, block.z
        direction = _Target.of(rows, y, pi, tau)
        g = block.kept(gamma[rows].unsqueeze(1)) / math.log(base)
        U = None if u is None else block.kept(u[rows].to(a.dtype))
        r = block.kept_(_direction_of_logits_(buffer[: len(a)], block.x, block.W, U, V, s))
        r_y = target.of_class(r)
        tz, tr, ar = (torch.zeros_like(g) for _ in range(3))
        for classes, zc in block.exponentials_(direction.y, is_shown=direction.t is not None):
            tz += direction.dot(zc, classes)
        if target.t is not None:
            for classes, rc in zip(_ranges(r), _slices(r), strict=True):
                tr += target.dot(rc, classes)
        q = 1 / block.s
        for ac, rc in zip(_slices(a), _slices(r), strict=True):
            ar += (ac.mul_(q) * rc).sum(1, keepdim=True)
        T, T_of_direction = target.total(like=g), direction.total(like=g)
        rho_rows = T * ar - tr - tz
        if direction.t is not None:
            rho_rows += direction.sum_of_t() * block.s.log()
        if r_y is not None and target.p is not None:
            rho_rows -= exact(target.p, r_y)
        if block.l_y is not None and direction.p is not None:
            rho_rows -= exact(direction.p, block.l_y)
        rho[rows] = block.kept(rho_rows).squeeze(1) / math.log(base)
        if wants[3] and r_y is not None:
            hp[rows] = (g * (ar - r_y)).squeeze(1)
        if wants[4]:
            for classes, rc in zip(_ranges(r), _slices(r), strict=True):
                _put(ht, rows, classes, g * (ar - rc))
        if any(wants[:3]):
            # r becomes Q = dΔ along the direction and a becomes Δ, but for g
            for ac, rc in zip(_slices(a), _slices(r), strict=True):
                rc.sub_(ar).mul_(T).add_(T_of_direction).mul_(ac)
                ac.mul_(T)
            Q, delta = r, a
            direction.subtract_from_(Q)
            target.subtract_from_(delta)
            if wants[0]:
                of_rows = Q @ block.W
                of_rows = of_rows if V is None else of_rows.addmm_(delta, V)
                hx[rows] = block.kept_(of_rows.mul_(g))
            if wants[1]:
                hW.addmm_(Q.T, block.x * g, beta=block.beta)
                if U is not None:
                    hW.addmm_(delta.T, U * g)
            if wants[2]:
                hb.addmv_(Q.T, g.squeeze(1))

    for block in _blocks(groups, x, W, b, y, p, t, keep):
        add(block)
    return rho, *_rounded(x, W, gamma, hx, hW, hb, hp, ht)


def _results(
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
    x: Tensor, W: Tensor, gamma: Tensor | None, dx: Tensor, dW: Tensor, db: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    """The gradients in x, W, b in the types of these, if γ has a coefficient for each row."""
    if gamma is None or not gamma.dim():
        return dx, dW, db, *rest
    return dx.to(x.dtype), dW.to(W.dtype), db.to(W.dtype), *rest


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

    def subtract_from_(self, v: Tensor, scale: Tensor | None = None) -> None:
        """v -= scale (p e_y + t), the scale one of each row."""
        if self.p is not None and self.y is not None:
            v.scatter_add_(1, self.y, -(self.p if scale is None else scale * self.p))
        if self.t is not None:
            for classes in _ranges(v):
                t = self.t[:, classes]
                v[:, classes].sub_(t if scale is None else t * scale)


class _Block:
    """Some rows of the head, widened; `drop` marks those that are ignored, a column."""

    def __init__(
        self,
        rows: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: _Target,
        drop: Tensor | None,
        z: Tensor,
        beta: int,
        is_shifted: bool,
    ):
        self.rows, self.x, self.W, self.b = rows, x, W, b
        self.target, self.drop, self.z, self.beta = target, drop, z, beta
        self.is_shifted = is_shifted
        self.l_y: Tensor | None = None

    def logits_(self, classes: slice = slice(None)) -> Tensor:
        """z = W x + b, in this block's memory; of some classes."""
        z, W, b = self.z[:, classes], self.W[classes], None if self.b is None else self.b[classes]
        torch.mm(self.x, W.T, out=z) if b is None else torch.addmm(b, self.x, W.T, out=z)
        return self.kept_(z)

    def exponentials_(self, y: Tensor | None, is_shown: bool) -> Iterator[tuple[slice, Tensor]]:
        """Makes e^{z-m}, their sum s, and l_y = z_y - m - ln s; shows z - m, slice by slice."""
        self.s = torch.zeros_like(self.z[:, :1])
        if not (self.is_shifted or is_shown):
            for classes in _ranges(self.z):  # while they are in the cache
                self.s += self.logits_(classes).exp_().sum(1, keepdim=True)
            e_y = self.s if y is None else self.z.gather(1, y)
            self.l_y = log_of_share(e_y, self.s)
            if self.l_y is not None:
                return
            self.is_shifted = True
        z = self.logits_()
        z_y, m = None if y is None else z.gather(1, y), z.amax(1, keepdim=True)
        self.s.zero_()
        for classes, zc in zip(_ranges(z), _slices(z), strict=True):
            zc.sub_(m)
            if is_shown:
                yield classes, zc
            self.s += zc.exp_().sum(1, keepdim=True)
        self.l_y = None if z_y is None else z_y.sub_(m).sub_(self.s.log())

    def kept(self, v: Tensor) -> Tensor:
        """v, 0 in the rows that are ignored."""
        return v if self.drop is None else v.masked_fill(self.drop, 0)

    def kept_(self, v: Tensor) -> Tensor:
        """The same in v."""
        return v if self.drop is None else v.masked_fill_(self.drop, 0)


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
) -> Iterator[_Block]:
    W, b = W.to(wide_type(W.dtype)), None if b is None else b.to(wide_type(b.dtype))
    buffer, is_shifted = _buffer(groups, W, W.dtype), W.device.type != "cpu"
    for i, rows in enumerate(groups):
        drop = None if keep is None or _is_counted(keep) else ~keep[rows].unsqueeze(1)
        X = x[rows].to(W.dtype)
        X = X if drop is None else X.masked_fill(drop, 0)
        z = buffer[: len(X)]
        block = _Block(rows, X, W, b, _Target.of(rows, y, p, t), drop, z, min(i, 1), is_shifted)
        yield block
        is_shifted = block.is_shifted  # what one block needs, the next ones will


def _ranges(v: Tensor) -> Iterator[slice]:
    """The classes of each slice."""
    rows, C = v.shape
    size = max(SLICE // max(rows, 1), 1)
    return (slice(i, min(i + size, C)) for i in range(0, C, size))


def _slices(v: Tensor) -> Iterator[Tensor]:
    return (v[:, classes] for classes in _ranges(v))


def _direction_of_logits_(
    r: Tensor, x: Tensor, W: Tensor, u: Tensor | None, V: Tensor | None, s: Tensor | None
) -> Tensor:
    """W u + V x + s for a block, in r; 0 where nothing moves."""
    r.zero_() if u is None else torch.mm(u, W.T, out=r)
    if V is not None:
        r.addmm_(x, V.T)
    return r if s is None else r.add_(s)


def _put(result: Tensor, rows: Any, classes: slice, value: Tensor) -> None:
    """A slice of a block's gradient in t: into its rows, or summed where one row stands for all."""
    if result.shape[0] == 1:
        result[:, classes] += value.sum(0, keepdim=True)
    else:
        result[rows, classes] = value
