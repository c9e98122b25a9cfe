"""A block of rows of the head: its logits, their softmax, and Δ, in memory that all blocks reuse.

The logits of a block are stored class-major, which makes the products with W and for dW cheapest.
Each pass processes slices of classes that fit in the cache. With a cap, the buffer holds
u = tanh(z/κ), whose slope 1 - u² loses the fewest digits; v = κ u.

The buffer has two states. It keeps the logits, if something needs them again: the entropy, the
gradient of t, a cap beside a dense target, second order. Else the exponentials e^{v-m} dv/dz
overwrite the logits, and Δ/f overwrites these; the row factor f scales rows of x and dx instead.

The shift m is the row's maximum, or 0 where Σ e^v shows that no maximum is needed.

Where the ranks of a group share the classes (F24), the maximum and then the sums of a block's rows
are reduced over the group, both while something else is computed (`Workspace.iterate_softmaxes`).
From the sums on, each rank computes what belongs to its classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath._precision import wide_type, zero_safe_product
from torch_nnmath._records import HeadInputs, Requests, Target, UpstreamGradients
from torch_nnmath.kernels import collectives
from torch_nnmath.kernels._library import SLICE_SIZE, compute_log_probability
from torch_nnmath.kernels.collectives import Reduction

PREFERRED_BLOCK_ROWS = 256  # enough rows to amortise reading W and updating dW once per block
# (min, max) of a block's logits in float32; they override the preferred rows
BLOCK_BYTES = (8 * 2**20, 64 * 2**20)
MIN_SHIFTED = -1e4  # clamp for v - m, so that (v - m) e^(v - m) is 0 and not nan at v = -inf


class Coefficients(NamedTuple):
    """Upstream gradients of a block's rows, (rows, 1) each: γ/ln β, ω and η/ln β."""

    γβ: Tensor
    ω: Tensor | None
    ηβ: Tensor | None


class Workspace:
    """The head's inputs, widened, and the memory that the blocks of one call share.

    `dt` is the direction of the dense target t, if any.
    """

    def __init__(self, inputs: HeadInputs, needs_logits: bool, dt: Tensor | None = None):
        W = inputs.round_weight()
        dtype = wide_type(W.dtype)
        b = None if inputs.b is None else inputs.b.to(dtype)
        self.inputs = inputs._replace(W=W.to(dtype), b=b)
        self.needs_logits = needs_logits
        shard = inputs.shard
        C = len(W) if shard is None else shard.max_classes
        self.groups = group_rows(len(inputs.x), C, inputs.keep)
        # a block's logits exist while the products of the block before it run
        is_pipelined = shard is not None and len(self.groups) > 1
        self.buffers = [self.allocate_logits() for _ in range(2 if is_pipelined else 1)]
        self.slice_size = _get_slice_size(self.buffers[0])
        scratch_count = 0 if inputs.cap is None else 1
        if needs_logits:
            scratch_count = 2
        slice_of_logits = self.buffers[0][:, : self.slice_size]
        self.scratch = [torch.empty_like(slice_of_logits) for _ in range(scratch_count)]
        # all ranks of a group must take the same path
        self.needs_maximum = inputs.W.device.type != "cpu" or inputs.shard is not None
        self.t_total = self._sum_over_shards(inputs.target.t)
        self.dt_total = self._sum_over_shards(dt)

    def allocate_logits(self) -> Tensor:
        """Memory for the logits of one block, class-major."""
        W = self.inputs.W
        rows = self.groups[0] if self.groups else slice(0, 0)
        return W.new_empty((W.shape[0], count_rows(rows))).T

    def iterate_blocks(self) -> Iterator[Block]:
        """Each block is finished before the next, which reuses its memory."""
        for i, rows in enumerate(self.groups):
            yield Block(self, rows, index=i)

    def iterate_softmaxes(self, t: Tensor | None, requests: Requests) -> Iterator[Block]:
        """The same, for a caller that calls `compute_softmax_` with the rows of t first.

        Where ranks share the classes, a block's sums are reduced while the next block's logits are
        computed, and the next block's maximum while the caller computes with this block.
        """
        blocks = self.iterate_blocks()
        if self.inputs.shard is None:
            yield from blocks
            return
        following = next(blocks, None)
        if following is not None:
            following.start_maximum_(requests)
        while following is not None:
            block = following
            block.start_sums_(select_rows(t, block.rows), requests)
            following = next(blocks, None)
            if following is not None:
                following.start_maximum_(requests)
            yield block

    def reduce(self, x: Tensor, operation: str) -> Reduction:
        """Starts the reduction of x over the group."""
        assert self.inputs.shard is not None
        return collectives.Reduction(x, operation, self.inputs.shard.group)

    def _sum_over_shards(self, t: Tensor | None) -> Tensor | None:
        """Σ t of each row over the classes of all ranks."""
        if t is None or self.inputs.shard is None or not self.groups:
            return None
        total = t.to(self.inputs.W.dtype).sum(1, keepdim=True)
        return self.reduce(total, collectives.SUM).wait()


class Block:
    """Some rows of the head; see the module's docstring for what its buffer `z` holds."""

    m: Tensor | float = 0.0  # shift of each row
    s: Tensor  # Σ e^{v-m}
    tv: Tensor | float = 0.0  # t·(v-m), of the dense part that `compute_softmax_` was given
    ev: Tensor  # Σ e^{v-m} (v-m), for the entropy
    predicted: Tensor  # class of the largest logit
    z_y: Tensor | None = None  # the buffer's logit of the target's class
    l_y: Tensor | None = None  # its log-probability
    is_elsewhere: Tensor | None = None  # whether another rank has the target's class
    reduction: Reduction  # that runs

    def __init__(self, workspace: Workspace, rows: Any, index: int):
        inputs = workspace.inputs
        keep = inputs.keep
        self.workspace, self.rows, self.is_first = workspace, rows, index == 0
        self.ignored_mask = None if keep is None or may_gather_rows(keep) else ~keep[rows]
        self.x = self.mask(inputs.x[rows].to(inputs.W.dtype))
        self.z = workspace.buffers[index % len(workspace.buffers)][: len(self.x)]
        self.target = select_target(inputs.target, rows)
        self._find_local_class()
        self.ev = self.z.new_zeros((len(self.z), 1))

    # The softmax of the rows

    def compute_softmax_(self, t: Tensor | None, requests: Requests) -> None:
        """Computes the logits, m, s, tv of the dense part t, and what `requests` ask for."""
        workspace = self.workspace
        if workspace.inputs.shard is not None:
            self._finish_sums(requests)
            return
        needs_maximum = workspace.needs_maximum or t is not None or any(requests)
        self.s = self.z.new_zeros((len(self.z), 1))
        for classes in self.iterate_slices():
            z = self.fill_logits_(classes)
            if not needs_maximum:
                self.s += self.exponentiate_(self.shift_(z), z).sum(1, keepdim=True)
        if needs_maximum or workspace.needs_logits:
            self._pick_class_logit()
        if needs_maximum:
            self._find_maximum(requests)
            self._shift_by_maximum_(t, requests)
            if self.z_y is not None:
                self.l_y = self.uncap(self.z_y) - self.m - self.s.log()
        elif not self._compute_class_log_probability_():
            workspace.needs_maximum = True  # later blocks probably need it, too
            self.compute_softmax_(t, requests)

    def start_maximum_(self, requests: Requests) -> None:
        """Computes the logits, and starts the reduction of their maxima over the group."""
        for classes in self.iterate_slices():
            self.fill_logits_(classes)
        self._pick_class_logit()
        self._find_maximum(requests)
        assert isinstance(self.m, Tensor)
        self.reduction = self.workspace.reduce(self.m.clone(), collectives.MAX)

    def start_sums_(self, t: Tensor | None, requests: Requests) -> None:
        """Computes the sums with the maximum over the group, and starts their reduction."""
        largest, self.m = self.m, self.reduction.wait()
        if requests.predicted:  # a later reduction selects the first of these classes
            assert isinstance(largest, Tensor)
            assert self.workspace.inputs.shard is not None
            is_largest = (largest == self.m) | largest.isnan()
            first_class = self.workspace.inputs.shard.first_class
            no_class = torch.iinfo(torch.int64).max
            self.predicted = torch.where(is_largest, self.predicted + first_class, no_class)
        self.s = self.z.new_zeros((len(self.z), 1))
        self._shift_by_maximum_(t, requests)
        sums = [self.s]
        if requests.entropy:
            sums.append(self.ev)
        if t is not None:
            sums.append(self.tv + torch.zeros_like(self.s))
        if self.z_y is not None:
            sums.append(self.leave_to_owner(self.uncap(self.z_y) - self.m))
        self.reduction = self.workspace.reduce(torch.cat(sums, 1), collectives.SUM)

    def _finish_sums(self, requests: Requests) -> None:
        """Waits for the sums that `start_sums_` began."""
        self.s, *sums = self.reduction.wait().split(1, 1)
        if requests.entropy:
            self.ev = sums.pop(0)
        if self.z_y is not None:
            self.l_y = sums.pop() - self.s.log()
        if sums:
            (self.tv,) = sums

    def restore_softmax_(self, sums: Tensor) -> None:
        """Recomputes the block's state from the sums that the forward saved.

        The slices are those of the forward, so that the logits are the same bit for bit.
        """
        self.m, self.s, self.ev = sums.split(1, 1)
        for classes in self.iterate_slices():
            z = self.fill_logits_(classes)
            if not self.workspace.needs_logits:
                self.exponentiate_(self.shift_(z), z)
        if self.workspace.needs_logits:
            self._pick_class_logit()

    def fill_logits_(self, classes: slice) -> Tensor:
        """Writes the logits of some classes: z = W x + b, or tanh(z/κ)."""
        workspace, z = self.workspace, self.z[:, classes]
        W, b, cap = workspace.inputs.W, workspace.inputs.b, workspace.inputs.cap
        z = self.mask_(fill_affine_(z, self.x, W, b, classes))
        if cap is None:
            return z
        if z.device.type != "cpu":
            z.div_(cap).tanh_()
        else:  # tanh = e / (e + 2) of e = expm1(2z/κ) is faster than `tanh_`
            # clamped where tanh rounds to ±1, since e may overflow and inf / inf is nan
            e = z.div_(cap / 2).clamp_(-50, 50).expm1_()
            e.div_(torch.add(e, 2, out=self._scratch(e)))
        if self.target.y is not None and not workspace.needs_logits:
            self._pick_capped_class_logit(z, classes)
        return z

    def iterate_slices(self) -> Iterator[slice]:
        """The classes of each slice. They do not depend on what is computed."""
        C, size = self.z.shape[1], self.workspace.slice_size
        return (slice(i, min(i + size, C)) for i in range(0, C, size))

    def shift_(self, z: Tensor) -> Tensor:
        """v - m of a slice z of the buffer.

        Overwrites z, unless the buffer keeps the logits or they are capped; then scratch memory.
        """
        cap = self.workspace.inputs.cap
        if cap is None and self.workspace.needs_logits:
            return torch.sub(z, self.m, out=self._scratch(z))
        v = z if cap is None else torch.mul(z, cap, out=self._scratch(z))
        return v if isinstance(self.m, float) else v.sub_(self.m)

    def exponentiate_(self, v: Tensor, z: Tensor) -> Tensor:
        """Overwrites v with e^v, and z with e^v dv/dz unless the buffer keeps the logits."""
        e = v.exp_()
        if self.workspace.inputs.cap is not None and not self.workspace.needs_logits:
            torch.addcmul(e, e, z.square_(), value=-1, out=z)
        return e

    def _find_maximum(self, requests: Requests) -> None:
        """Sets m, and the predicted class, from all logits of the block."""
        if not self.z.shape[1]:  # a rank without classes
            self.m = torch.full_like(self.ev, -math.inf)
            self.predicted = torch.zeros_like(self.ev, dtype=torch.int64)
            return
        if requests.predicted:
            largest, self.predicted = self.z.max(1, keepdim=True)
        else:
            largest = self.z.amax(1, keepdim=True)
        self.m = self.uncap(largest)

    def _shift_by_maximum_(self, t: Tensor | None, requests: Requests) -> None:
        """Computes the sums with the maximum as m."""
        for classes in self.iterate_slices():
            z = self.z[:, classes]
            v = self.shift_(z)
            if t is not None:
                self.tv = self.tv + zero_safe_product(t[:, classes], v).sum(1, keepdim=True)
            if requests.entropy:
                e = torch.exp(v, out=self._scratch(z, 1))
                self.ev += v.clamp_(min=MIN_SHIFTED).mul_(e).sum(1, keepdim=True)
            else:
                e = self.exponentiate_(v, z)
            self.s += e.sum(1, keepdim=True)

    def _compute_class_log_probability_(self) -> bool:
        """Sets l_y from sums without a maximum; returns whether they are in the safe range."""
        e_y, y = self.s, self.target.y
        if self.z_y is not None:
            e_y = self.uncap(self.z_y).exp()
        elif y is not None:  # the buffer holds e^z
            e_y = self.z.gather(1, y)
        l_y = compute_log_probability(e_y, self.s)
        self.l_y = None if y is None else l_y
        return l_y is not None

    # The target's class

    def _find_local_class(self) -> None:
        """Numbers the target's class among this rank's classes."""
        shard, y = self.workspace.inputs.shard, self.target.y
        if shard is None or y is None:
            return
        C, y = self.z.shape[1], y - shard.first_class
        self.is_elsewhere = (y < 0) | (y >= C)
        self.target = self.target._replace(y=y.clamp(0, max(C - 1, 0)))

    def leave_to_owner(self, v_y: Tensor) -> Tensor:
        """A value of the target's class, 0 where another rank has the class."""
        return v_y if self.is_elsewhere is None else v_y.masked_fill(self.is_elsewhere, 0)

    def pick(self, v: Tensor) -> Tensor:
        """The entries of v (rows, C) at the target's class; any number where that is elsewhere."""
        if not v.shape[1]:
            return torch.zeros_like(self.ev)
        assert self.target.y is not None
        return v.gather(1, self.target.y)

    def add_to_class_(self, v: Tensor, v_y: Tensor) -> None:
        """Adds to the entries of v (rows, C) at the target's class."""
        if v.shape[1]:
            assert self.target.y is not None
            v.scatter_add_(1, self.target.y, self.leave_to_owner(v_y))

    def _pick_class_logit(self) -> None:
        """Sets z_y from the logits in the buffer."""
        if self.target.y is not None:
            self.z_y = self.pick(self.z)

    def _pick_capped_class_logit(self, z: Tensor, classes: slice) -> None:
        """Sets z_y of the rows whose class is among these, before z is overwritten."""
        assert self.target.y is not None
        place = self.target.y - classes.start
        z_y = z.gather(1, place.clamp(0, z.shape[1] - 1))
        is_in_slice = (place >= 0) & (place < z.shape[1])
        self.z_y = torch.where(is_in_slice, z_y, 0.0 if self.z_y is None else self.z_y)

    # What follows from the sums

    def compute_lse(self) -> Tensor:
        """ln Σ e^v of each row."""
        return self.s.log() + self.m

    def compute_entropy(self) -> Tensor:
        """-Σ a ln a of each row, as a sum of terms of one sign."""
        return self.s.log() - self.ev / self.s

    def compute_derivative_wrt_p(self) -> Tensor:
        """ln β dc/dp of each row: -l_y or, for a weight without a class, lse."""
        return self.compute_lse() if self.l_y is None else -self.l_y

    def compute_weight(self, coefficients: Coefficients) -> Tensor:
        """γβ T + 2 ω lse + ηβ Σ a (v-m): B without the term -ηβ (v-m)."""
        γβ, ω, ηβ = coefficients
        weight = γβ * self.compute_total()
        if ω is not None:
            weight = weight + 2 * ω * self.compute_lse()
        return weight if ηβ is None else weight + ηβ * (self.ev / self.s)

    def compute_dense_total(self) -> Tensor | None:
        """Σ t of each row, over the classes of all ranks."""
        return sum_dense(self.target.t, self.workspace.t_total, self.rows)

    def compute_total(self) -> Tensor | float:
        """T = p + Σ t."""
        return add_totals(self.target.p, self.compute_dense_total())

    def compute_class_slope(self) -> Tensor | float:
        """dv/dz at the target's class."""
        if self.workspace.inputs.cap is None or self.z_y is None:
            return 1.0
        return cap_slope(self.z_y)

    def form_delta_(self, coefficients: Coefficients) -> Tensor | None:
        """Overwrites the buffer with Δ / f and returns the row factor f, or None for 1.

        Δ = dv/dz ∘ (a ∘ B - γβ t) - γβ p dv_y/dz_y e_y,  B = γβ T + 2 ω lse - ηβ (l - a·l).
        """
        y, p, t, _ = self.target
        γβ, _, ηβ = coefficients
        weight, class_term = self.compute_weight(coefficients), None
        if y is not None and p is not None:
            class_term = γβ * p * self.compute_class_slope()
        if not self.workspace.needs_logits and t is None:
            return self._scale_exponentials_(weight, class_term)
        weight = weight / self.s
        for classes in self.iterate_slices():
            z, slope = self.z[:, classes], None
            if not self.workspace.needs_logits:
                z.mul_(weight)
            else:
                v, slope = self.shift_(z), None if self.cap is None else cap_slope(z)
                torch.exp(v, out=z)
                if ηβ is None:
                    z.mul_(weight)
                else:
                    v.clamp_(min=MIN_SHIFTED)
                    z.mul_(torch.addcmul(weight, v, -ηβ / self.s, out=v))
            if t is not None:
                z.sub_(γβ * t[:, classes])
            if slope is not None:
                z.mul_(slope)
        if y is not None and class_term is not None:
            self.add_to_class_(self.z, -class_term)
        return None

    def _scale_exponentials_(self, weight: Tensor, class_term: Tensor | None) -> Tensor:
        """The same where E = e^{v-m} dv/dz fills the buffer: Δ = f (E - (class_term / f) e_y)."""
        if class_term is None or self.target.y is None:
            return weight / self.s
        # a weight of 0 would divide the true class's entry
        tiny = torch.finfo(weight.dtype).tiny ** 0.5
        weight = torch.where((weight == 0) & (class_term != 0), tiny, weight)
        # without a z-loss the share is exactly dv_y/dz_y
        share = torch.where(weight == 0, 0.0, class_term / weight)
        self.add_to_class_(self.z, -share * self.s)
        return weight / self.s

    # Rows and memory

    def select_coefficients(self, upstream: UpstreamGradients, base: float) -> Coefficients:
        """The coefficients of this block's rows, 0 where ignored."""
        ln = math.log(base)

        def select(v: Tensor | None, divisor: float) -> Any:
            if v is None:
                return None
            v = v[self.rows] if v.dim() else v.expand(len(self.x), 1)
            return self.mask(v) / divisor

        return Coefficients(select(upstream.γ, ln), select(upstream.ω, 1), select(upstream.η, ln))

    def mask(self, v: Tensor, value: int = 0) -> Tensor:
        """v, with `value` in the ignored rows."""
        return v if self.ignored_mask is None else v.masked_fill(self.ignored_mask, value)

    def mask_(self, v: Tensor) -> Tensor:
        """Overwrites the ignored rows of v with 0."""
        return v if self.ignored_mask is None else v.masked_fill_(self.ignored_mask, 0)

    def uncap(self, u: Tensor) -> Tensor:
        """v of the buffer's value u: κ u, or u itself without a cap."""
        return u if self.cap is None else u * self.cap

    @property
    def cap(self) -> float | None:
        return self.workspace.inputs.cap

    def _scratch(self, z: Tensor, index: int = 0) -> Tensor:
        """Scratch memory in the shape of a slice."""
        return self.workspace.scratch[index][: z.shape[0], : z.shape[1]]


def fill_affine_(z: Tensor, x: Tensor, W: Tensor, b: Tensor | None, classes: slice) -> Tensor:
    """Writes x Wᵀ + b of some classes to z."""
    # cuBLASLt may reject an addmm with one row, which it reads as a bias
    if b is None or len(z) == 1:
        torch.mm(x, W[classes].T, out=z)
        return z if b is None else z.add_(b[classes])
    return torch.addmm(b[classes], x, W[classes].T, out=z)


def cap_slope(u: Tensor) -> Tensor:
    """dv/dz = 1 - u², u = tanh(z/κ)."""
    return (1 - u).mul_(1 + u)


def select_target(target: Target, rows: Any) -> Target:
    """The target of some rows; a dense part that all rows share is returned unchanged."""
    y, p, t, _ = target
    return Target(
        None if y is None else y[rows],
        None if p is None else p[rows],
        select_rows(t, rows),
    )


def select_rows(t: Tensor | None, rows: Any) -> Tensor | None:
    """Some rows of t, unless all rows share one."""
    return t if t is None or t.shape[0] == 1 else t[rows]


def sum_dense(t: Tensor | None, total: Tensor | None, rows: Any) -> Tensor | None:
    """Σ t of a block's rows; `total` are those of all rows, where ranks share the classes."""
    if t is None:
        return None
    return t.sum(1, keepdim=True) if total is None else select_rows(total, rows)


def add_totals(p: Tensor | None, dense: Tensor | None) -> Tensor | float:
    """T = p + Σ t."""
    if dense is None:
        return 0.0 if p is None else p
    return dense if p is None else p + dense


def count_block_rows(N: int, C: int) -> int:
    """The number of rows of a block.

    A multiple of 32; N is divided so that the blocks are of nearly equal size.
    """
    min_rows, max_rows = (size // (4 * max(C, 1)) for size in BLOCK_BYTES)
    rows = min(max(PREFERRED_BLOCK_ROWS, min_rows), max_rows)
    rows = max(rows // 32, 1) * 32
    return math.ceil(N / math.ceil(N / rows) / 32) * 32


def group_rows(N: int, C: int, keep: Tensor | None) -> list[Any]:
    """The rows of each block: slices, or indices where some rows are ignored."""
    if not N or not C:
        return []
    if keep is not None and may_gather_rows(keep):
        rows = keep.squeeze(1).nonzero().squeeze(1)
        if not len(rows):
            return []
        if len(rows) < N:
            return list(rows.split(count_block_rows(len(rows), C)))
    size = count_block_rows(N, C)
    return [slice(i, min(i + size, N)) for i in range(0, N, size)]


def count_rows(rows: Any) -> int:
    """The number of rows in an entry of `group_rows`."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def may_gather_rows(keep: Tensor) -> bool:
    """Whether ignored rows are left out by gathering the others.

    On a GPU they are masked, since counting them would wait for the device.
    """
    return keep.device.type == "cpu"


def _get_slice_size(logits: Tensor) -> int:
    """How many classes a slice has.

    All of them on a GPU, where calls cost more than memory traffic.
    """
    rows, C = logits.shape
    if logits.device.type != "cpu":
        return C
    return max(SLICE_SIZE // 2 // max(rows, 1), 1)  # half, since scratch memory holds a copy
