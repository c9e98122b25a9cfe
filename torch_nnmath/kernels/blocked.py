"""The head (F15 batch) block by block of rows, so that memory does not grow with rows x classes.

Shapes: γ (N) the coefficient of each row's loss, x (N, D), W (C, D), b (C). The target of a row is
`p e_y + t`: y, p (N) a class and its weight, t (N, C), or (1, C) for all rows; each may be None.
keep (N) is False for the rows that are ignored: they are taken out of every product.
u, V, s, π, τ are a direction in which x, W, b, p, t move; each may be None.
Where x is half, γ, p, t and c are float32, and so is all arithmetic: results are rounded once.
A result that is not wanted is empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type
from torch_nnmath.kernels._library import operator

BLOCK_BYTES = 16 * 2**20  # of logits in float32; each block reads all of W and adds to all of dW


@operator(
    "head(Tensor? gamma, Tensor x, Tensor W, Tensor? b, Tensor? y, Tensor? p, Tensor? t,"
    " Tensor? keep, float base, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda gamma, x, W, b, y, p, t, keep, base, wants: (
        x.new_empty(x.shape[:1], dtype=wide_type(x.dtype)),
        *_results(x, W, t, wants),
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
    """c of each row, and the gradients of Σ γ c in x, W, b, p, t that `wants` names."""
    c = x.new_empty(x.shape[:1], dtype=wide_type(x.dtype))
    dx, dW, db, dp, dt = _results(x, W, t, wants)
    dW, db = dW.to(c.dtype), db.to(c.dtype)

    def add(block: _Block) -> None:
        rows, X, l, target = block.rows, block.x, block.log_softmax(), block.target
        c[rows] = block.kept(target.dot(l) / -math.log(base)).squeeze(1)
        if gamma is None:
            return
        g = block.kept(gamma[rows, None]) / math.log(base)
        if wants[3]:
            dp[rows] = (-g * target.of_class(l)).squeeze(1)
        if wants[4]:
            _put(dt, rows, -g * l)
        if any(wants[:3]):
            delta = target.subtracted_from(l.exp_().mul_(target.total())).mul_(g)
            if wants[0]:
                dx[rows] = block.kept_(delta @ block.W).to(dx.dtype)
            if wants[1]:
                dW.addmm_(delta.T, X)
            if wants[2]:
                db.add_(delta.sum(0))

    for block in _blocks(x, W, b, y, p, t, keep):
        add(block)
    return c, dx, dW.to(W.dtype), db.to(W.dtype), dp, dt


@operator(
    "head_second(Tensor gamma, Tensor x, Tensor W, Tensor? b, Tensor? y, Tensor? p, Tensor? t,"
    " Tensor? keep, Tensor? u, Tensor? V, Tensor? s, Tensor? pi, Tensor? tau, float base,"
    " bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda gamma, x, W, b, y, p, t, keep, u, V, s, pi, tau, base, wants: (
        torch.empty_like(gamma),
        *_results(x, W, t, wants),
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
    rho = torch.empty_like(gamma)
    hx, hW, hb, hp, ht = _results(x, W, t, wants)
    hW, hb = hW.to(gamma.dtype), hb.to(gamma.dtype)
    V, s = (None if v is None else v.to(gamma.dtype) for v in (V, s))

    def add(block: _Block) -> None:
        rows, X, l, target = block.rows, block.x, block.log_softmax(), block.target
        direction = _Target.of(rows, y, pi, tau)
        U = None if u is None else block.kept(u[rows].to(l.dtype))
        r = block.kept_(_direction_of_logits(X, block.W, U, V, s, like=l))
        rho_rows = target.dot(r) + direction.dot(l)
        a = l.exp_()
        ar = (a * r).sum(1, keepdim=True)
        rho_rows = target.total() * ar - rho_rows
        rho[rows] = block.kept(rho_rows).squeeze(1) / math.log(base)
        if not any(wants):
            return
        g = block.kept(gamma[rows, None]) / math.log(base)
        if wants[3]:
            hp[rows] = (g * (ar - target.of_class(r))).squeeze(1)
        if wants[4]:
            _put(ht, rows, g * (ar - r))
        if any(wants[:3]):
            # Q = dΔ along the direction; r makes way for it, and a for Δ
            Q = r.neg_().add_(ar).mul_(-target.total()).add_(direction.total()).mul_(a)
            Q = direction.subtracted_from(Q).mul_(g)
            delta = target.subtracted_from(a.mul_(target.total())).mul_(g)
            if wants[0]:
                of_rows = Q @ block.W
                of_rows = of_rows if V is None else of_rows.addmm_(delta, V)
                hx[rows] = block.kept_(of_rows).to(hx.dtype)
            if wants[1]:
                hW.addmm_(Q.T, X)
                if U is not None:
                    hW.addmm_(delta.T, U)
            if wants[2]:
                hb.add_(Q.sum(0))

    for block in _blocks(x, W, b, y, p, t, keep):
        add(block)
    return rho, hx, hW.to(W.dtype), hb.to(W.dtype), hp, ht


def _results(x: Tensor, W: Tensor, t: Tensor | None, wants: Sequence[bool]) -> tuple[Tensor, ...]:
    """Memory for a gradient in x, W, b, p, t each; an empty tensor for one that is not wanted."""

    def zeros(wanted: bool, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return x.new_zeros(shape if wanted else (0,), dtype=dtype)

    wide = wide_type(x.dtype)
    return (
        zeros(wants[0], x.shape, x.dtype),
        zeros(wants[1], W.shape, W.dtype),
        zeros(wants[2], W.shape[:1], W.dtype),
        zeros(wants[3], x.shape[:1], wide),
        zeros(wants[4], () if t is None else t.shape, wide),
    )


class _Target(NamedTuple):
    """p e_y + t (or a direction of it) for the rows of a block; y and p are columns."""

    y: Tensor | None
    p: Tensor | None
    t: Tensor | None

    @staticmethod
    def of(rows: slice, y: Tensor | None, p: Tensor | None, t: Tensor | None) -> _Target:
        return _Target(
            None if y is None else y[rows, None],
            None if p is None else p[rows, None],
            t if t is None or t.shape[0] == 1 else t[rows],
        )

    def of_class(self, v: Tensor) -> Tensor:
        """v_y of each row."""
        assert self.y is not None
        return v.gather(1, self.y)

    def total(self) -> Tensor | float:
        """T of each row."""
        T: Tensor | float = 0.0 if self.p is None else self.p
        return T if self.t is None else T + self.t.sum(1, keepdim=True)

    def dot(self, v: Tensor) -> Tensor:
        """The target times v, row by row; a target of 0 adds 0, also where v is -inf."""
        result = torch.zeros_like(v[:, :1])
        if self.p is not None:
            result += (self.p * self.of_class(v)).masked_fill_(self.p == 0, 0)
        if self.t is not None:
            result += (self.t * v).masked_fill_(self.t == 0, 0).sum(1, keepdim=True)
        return result

    def subtracted_from(self, v: Tensor) -> Tensor:
        """v minus the target, in v."""
        if self.p is not None:
            assert self.y is not None
            v.scatter_add_(1, self.y, -self.p)
        return v if self.t is None else v.sub_(self.t)


class _Block(NamedTuple):
    """Some rows of the head, widened; `drop` marks those that are ignored, a column."""

    rows: slice
    x: Tensor
    W: Tensor
    b: Tensor | None
    target: _Target
    drop: Tensor | None

    def log_softmax(self) -> Tensor:
        """l = z - lse(z), z = W x + b."""
        z = torch.nn.functional.linear(self.x, self.W, self.b)
        return torch.log_softmax(self.kept_(z), 1)

    def kept(self, v: Tensor) -> Tensor:
        """v, 0 in the rows that are ignored."""
        return v if self.drop is None else v.masked_fill(self.drop, 0)

    def kept_(self, v: Tensor) -> Tensor:
        """The same in v."""
        return v if self.drop is None else v.masked_fill_(self.drop, 0)


def _blocks(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    y: Tensor | None,
    p: Tensor | None,
    t: Tensor | None,
    keep: Tensor | None,
) -> Iterator[_Block]:
    """Blocks of equal size, of whole groups of 32 rows, within BLOCK_BYTES where 32 rows are."""
    N, C = x.shape[0], W.shape[0]
    W, b = W.to(wide_type(W.dtype)), None if b is None else b.to(wide_type(b.dtype))
    most = max(BLOCK_BYTES // (4 * max(C, 1)) // 32, 1) * 32
    size = math.ceil(N / max(math.ceil(N / most), 1) / 32) * 32
    for start in range(0, N, max(size, 1)):
        rows = slice(start, min(start + size, N))
        drop = None if keep is None else ~keep[rows, None]
        X = x[rows].to(W.dtype)
        X = X if drop is None else X.masked_fill(drop, 0)
        yield _Block(rows, X, W, b, _Target.of(rows, y, p, t), drop)


def _direction_of_logits(
    x: Tensor, W: Tensor, u: Tensor | None, V: Tensor | None, s: Tensor | None, like: Tensor
) -> Tensor:
    """r = W u + V x + s for a block; 0 where nothing moves."""
    r = torch.zeros_like(like)
    if u is not None:
        r += u @ W.T
    if V is not None:
        r += x @ V.T
    if s is not None:
        r += s
    return r


def _put(result: Tensor, rows: slice, value: Tensor) -> None:
    """A block's gradient in t: into its rows, or summed where one row stands for all."""
    if result.shape[0] == 1:
        result += value.sum(0, keepdim=True)
    else:
        result[rows] = value
