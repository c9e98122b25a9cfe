"""Values that travel together: the target of a loss, the head's inputs and results.

`autograd.Function.apply` and the operators of `torch.library` take flat arguments. `flatten()`
gives them, in the one order that every formula and every kernel of the head has.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_nnmath._precision import zero_safe_product


class Target(NamedTuple):
    """The target p e_y + t of each row of a tensor v (*, C, *), whose C classes are at `dim`.

    Each part may be None. If y is None, p counts only in `total`.
    """

    y: Tensor | None  # class index, (*, 1, *)
    p: Tensor | None  # weight of that class, (*, 1, *) or ()
    t: Tensor | None  # dense part, which broadcasts to v
    dim: int = 1

    def total(self) -> Tensor | float:
        """T = p + Σ t."""
        T: Tensor | float = 0.0 if self.p is None else self.p
        return T if self.t is None else T + self.t.sum(self.dim, keepdim=True)

    def dot(self, v: Tensor) -> Tensor:
        """(p e_y + t)·v; a target of 0 adds 0, also where v is infinite."""
        # zeros in the shape of a sum over the classes, from none of v's entries
        result = torch.zeros_like(v.narrow(self.dim, 0, 0).sum(self.dim, keepdim=True))
        if self.p is not None and self.y is not None:
            result = result + zero_safe_product(self.p, v.gather(self.dim, self.y))
        if self.t is not None:
            result = result + zero_safe_product(self.t, v).sum(self.dim, keepdim=True)
        return result

    def subtract_from(self, v: Tensor) -> Tensor:
        """v - (p e_y + t)."""
        if self.p is not None and self.y is not None:
            if torch.compiler.is_compiling():  # a compiler fuses `where` with v, but not a scatter
                sizes = [-1 if d == self.dim % v.dim() else 1 for d in range(v.dim())]
                classes = torch.arange(v.shape[self.dim], device=v.device).view(sizes)
                v = v - torch.where(classes == self.y, self.p, 0)
            else:
                v = v.scatter_add(self.dim, self.y, -self.p.expand_as(self.y))
        return v if self.t is None else v - self.t

    def scale(self, factor: Tensor) -> Target:
        """The target times one factor for each row."""
        p, t = (None if v is None else factor * v for v in (self.p, self.t))
        return Target(self.y, p, t, self.dim)


class Shard(NamedTuple):
    """The classes of one rank, where the ranks of a process group share the head's classes.

    The size of the blocks follows from `max_classes`, so that all ranks have as many.
    """

    group: str  # name of the process group
    first_class: int  # of this rank
    max_classes: int  # of the largest shard


class HeadInputs(NamedTuple):
    """What the head computes from: features, weight, bias and target of N rows and C classes.

    Where `keep` is False, the row is ignored: its loss and its part of every gradient are 0.

    The last fields have no derivative. `weight_dtype` is autocast's type, to which the weight is
    rounded for the products; dW keeps the weight's type. Where x is `scale` times features of a
    half type, these are given, too: a GPU multiplies them in half precision. With a `shard`, W, b
    and t have the classes of this rank alone, and dx is this rank's part of a sum; the rest is the
    same on all ranks of the group.
    """

    x: Tensor  # (N, D)
    W: Tensor  # (C, D)
    b: Tensor | None  # (C)
    target: Target  # y, p (N, 1); t (N, C), or (1, C) for all rows
    keep: Tensor | None  # (N, 1)
    base: float = math.e  # of the logarithm
    cap: float | None = None  # of the logits (F19)
    weight_dtype: torch.dtype | None = None
    features: Tensor | None = None  # (N, D)
    scale: Tensor | None = None  # () or (N, 1), in x's type
    shard: Shard | None = None

    def flatten(self) -> tuple[Any, ...]:
        """The tensors, with y, p, t in the target's place; then base, cap, weight_dtype, shard."""
        y, p, t, _ = self.target
        tensors = self.x, self.W, self.b, y, p, t, self.keep, self.features, self.scale
        shard = NO_SHARD if self.shard is None else self.shard
        return *tensors, self.base, self.cap, self.weight_dtype, *shard

    @staticmethod
    def from_flat(flat: Any) -> HeadInputs:
        """The inverse of `flatten`."""
        x, W, b, y, p, t, keep, features, scale, base, cap, weight_dtype, *shard = flat
        options = base, cap, weight_dtype, features, scale
        is_split = shard[0] is not None
        return HeadInputs(
            x, W, b, Target(y, p, t), keep, *options, Shard(*shard) if is_split else None
        )

    def round_weight(self) -> Tensor:
        """The weight as operand of the products."""
        return self.W if self.weight_dtype is None else self.W.to(self.weight_dtype)


NO_SHARD = (None, 0, 0)
TENSOR_COUNT, FLAT_SIZE = 9, 15  # of `HeadInputs.flatten`


class InputValues(NamedTuple):
    """One value for each differentiable input of the head.

    Gradients, a direction in which the inputs change, or whether a gradient is needed.
    """

    x: Any
    W: Any
    b: Any
    p: Any
    t: Any

    @staticmethod
    def from_flat(flat: Any) -> InputValues:
        """Picks the differentiable entries of a tuple in `HeadInputs.flatten`'s order."""
        x, W, b, _, p, t, *_ = flat
        return InputValues(x, W, b, p, t)

    def flatten(self) -> tuple[Any, ...]:
        """In the order of `HeadInputs.flatten`, None for what has no derivative."""
        return self.x, self.W, self.b, None, self.p, self.t, *[None] * (FLAT_SIZE - 6)

    def to_target(self, y: Tensor | None) -> Target:
        """The target's direction; the class y is constant."""
        return Target(y, self.p, self.t)

    def select(self, needs_gradient: InputValues) -> InputValues:
        """The values whose gradient is needed, None for the others."""
        pairs = zip(self, needs_gradient, strict=True)
        return InputValues(*(value if is_needed else None for value, is_needed in pairs))


class UpstreamGradients(NamedTuple):
    """Upstream gradients γ, ω, η of each row's loss, squared log-sum-exp and entropy.

    (N, 1) each, or () for one that all rows share. ω and η may be None.
    """

    γ: Tensor
    ω: Tensor | None
    η: Tensor | None

    @staticmethod
    def from_flat(γ: Tensor | None, *others: Tensor | None) -> UpstreamGradients | None:
        """Reads an operator's arguments, where γ of a cost is () or (N); None without γ."""
        if γ is None:
            return None
        return UpstreamGradients(γ.unsqueeze(1) if γ.dim() == 1 else γ, *others)


class Requests(NamedTuple):
    """Which of a row's optional results are computed."""

    entropy: bool = False
    predicted: bool = False


class RowResults(NamedTuple):
    """What the head gives for each row, (N, 1) each; None where it was not requested."""

    loss: Any
    lse: Any  # ln Σ e^v, without derivative
    squared_lse: Any
    entropy: Any
    predicted: Any  # class of the largest logit, -1 for an ignored row, without derivative


class DivergenceInputs(NamedTuple):
    """What a divergence of a teacher's distribution p from a student's q is computed from.

    N rows and C classes. q is the softmax of (x Wᵀ + b)/τ. p is that of (xt Wtᵀ + bt)/τ; without
    Wt, xt holds the teacher's logits (N, C); with `indices` it holds log-probabilities (N, k) of
    these classes. Rows where `keep` is False add nothing. The fields from `indices` on have no
    derivative. The record is flat, as `autograd.Function.apply` and operators need it.
    """

    x: Tensor  # (N, D)
    W: Tensor  # (C, D)
    b: Tensor | None  # (C)
    xt: Tensor  # (N, D'), (N, C) or (N, k)
    Wt: Tensor | None  # (C, D')
    bt: Tensor | None  # (C)
    indices: Tensor | None  # (N, k), different classes in each row
    y: Tensor | None  # (N, 1), labels of the cross entropy
    keep: Tensor | None  # (N, 1)
    mix: float  # μ of the divergence: 0 is KL(p||q), 1 is KL(q||p)
    temperature: float  # τ
    alpha: float  # weight of the cross entropy; that of the divergence is 1 - alpha
    base: float  # of the logarithm
    has_temperature_factor: bool  # whether the divergence is multiplied by τ²
    has_rest: bool  # whether the classes that are not among `indices` count, as one class

    @property
    def factor(self) -> float:
        """The factor of the divergence.

        It is not a field, since Dynamo takes fields for constants, and guards a computed number by
        the equality of a rounded expression.
        """
        factor = self.temperature**2 if self.has_temperature_factor else 1.0
        return (1 - self.alpha) * factor / math.log(self.base)

    @property
    def label_factor(self) -> float:
        """The factor of the cross entropy."""
        return self.alpha / math.log(self.base)

    @property
    def values(self) -> PairValues:
        """The differentiable inputs."""
        return PairValues(*self[:6])


DIVERGENCE_TENSOR_COUNT = 9  # the first fields of `DivergenceInputs`


class PairValues(NamedTuple):
    """One value for each differentiable input of `DivergenceInputs`, as `InputValues`."""

    x: Any
    W: Any
    b: Any
    xt: Any
    Wt: Any
    bt: Any

    def select(self, needs_gradient: PairValues) -> PairValues:
        """The values whose gradient is needed, None for the others."""
        pairs = zip(self, needs_gradient, strict=True)
        return PairValues(*(value if is_needed else None for value, is_needed in pairs))

    @property
    def needs_student(self) -> bool:
        """Of values that say whether a gradient is needed: whether one of the student's is."""
        return bool(self.x or self.W or self.b)

    @property
    def needs_teacher(self) -> bool:
        """Of values that say whether a gradient is needed: whether one of the teacher's is."""
        return bool(self.xt or self.Wt or self.bt)
