"""DTensors as arguments of the head -> this rank's part of each, and its results -> DTensors.

Each step is a linear map with its adjoint (`formulas.Transfer`), so it has derivatives of every
order, in reverse and in forward mode. Sums of gradients over ranks are computed in float32 or
wider, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torch_nnmath import _records, _torch, kernels
from torch_nnmath._precision import make_scalar
from torch_nnmath.formulas.transfer import (
    Transfer,
    copy_to_ranks,
    gather_from_ranks,
    reduce_constant,
    scatter_to_ranks,
    sum_over_ranks,
)
from torch_nnmath.kernels import collectives


class Layout(NamedTuple):
    """Where the parts of a DTensor are."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]


class Sharding(NamedTuple):
    """How a device mesh splits the classes and the rows of a call.

    On the mesh dimension `class_dim` each rank has some of the classes and computes all rows. On
    every other dimension each rank has all classes and, where `rows` is a `Shard`, some rows.
    """

    mesh: DeviceMesh
    class_dim: int | None  # mesh dimension
    rows: tuple[Placement, ...]  # of the features and of the results of each row
    batch: tuple[int, ...]  # shape of the features without the last axis, on all ranks together
    classes: int  # on all ranks together
    class_axis: int = -1  # of logits in memory
    gives_dtensors: bool = True  # else the features are plain tensors, and so are the results

    # Arguments

    @property
    def shard(self) -> _records.Shard | None:
        """This rank's classes."""
        if self.class_dim is None:
            return None
        first, _ = self._find_chunk(self.classes, self.class_dim)
        _, max_classes = collectives.find_chunk(self.classes, self.mesh.size(self.class_dim), 0)
        return _records.Shard(self._get_group(self.class_dim), first, max_classes)

    @property
    def row_dims(self) -> list[int]:
        """The mesh dimensions whose ranks compute different rows."""
        return [i for i, rows in enumerate(self.rows) if rows.is_shard() and i != self.class_dim]

    def take_features(self, x: Tensor) -> Tensor:
        """The features of the rows that this rank computes; widened, as is their gradient."""
        return self._place("input", x, self._place_rows(), {self.class_dim})

    def take_weight(self, name: str, v: Tensor) -> Tensor:
        """This rank's classes of the weight or the bias, (C, *)."""
        return self._place(name, v, self._place_classes(), {*self.row_dims})

    def take_rows(self, name: str, v: Tensor) -> Tensor:
        """The class indices or weights of the rows that this rank computes."""
        return self._place(name, v, self._place_rows(), set())

    def take_probabilities(self, target: Tensor) -> Tensor:
        """The target (*batch, C, *): the rows that this rank computes, and its classes."""
        placements = self._place_rows()
        if self.class_dim is not None:
            placements[self.class_dim] = Shard(len(self.batch))
        return self._place("target", target, placements, set())

    def take_logits(self, name: str, v: Tensor) -> Tensor:
        """This rank's rows and classes of logits, or of probabilities, with the classes last."""
        placements: list[Placement] = []
        for i, rows in enumerate(self.rows):
            placements.append(rows)
            if i == self.class_dim:
                placements[i] = Shard(self.class_axis)
            elif isinstance(rows, Shard):
                placements[i] = Shard(rows.dim + (rows.dim >= self.class_axis))
        return self._place(name, v, placements, set()).movedim(self.class_axis, -1)

    def take_replicated(self, name: str, v: Tensor, is_of_classes: bool) -> Tensor:
        """A tensor that all ranks have in full.

        `is_of_classes`: each rank uses it for its classes alone, so its gradient is summed.
        """
        replicated: list[Placement] = [Replicate()] * self.mesh.ndim
        class_dim = self.class_dim if is_of_classes else None
        return self._place(name, v, replicated, {*self.row_dims, class_dim})

    def select_classes(self, v: Tensor) -> Tensor:
        """This rank's classes of v (C), which all ranks have in full."""
        if self.class_dim is None:
            return v
        v = copy_to_ranks(v, self._get_group(self.class_dim))
        return v.narrow(0, *self._find_chunk(len(v), self.class_dim))

    # Results of all ranks together

    def sum_over_rows(self, n: Any, like: Tensor) -> Tensor:
        """The sum over all ranks of a number, such as the count of a rank's rows.

        Each rank uses it for its own rows, so its gradient is summed over the ranks, too.
        """
        n = make_scalar(n, like)
        for i in self.row_dims:
            n = copy_to_ranks(sum_over_ranks(n, self._get_group(i)), self._get_group(i))
        return n

    def check_indices(self, target: Tensor, ignore_index: int | None) -> None:
        """Raises on every rank if one rank has a class index that is out of range."""
        y = target.to(torch.int64)
        y = y.masked_fill(y == (-100 if ignore_index is None else ignore_index), 0)
        low, high = y.aminmax() if y.numel() else (y.new_zeros(()), y.new_zeros(()))
        extremes = torch.stack((-low, high))
        for i in self.row_dims:
            extremes = reduce_constant(extremes, collectives.MAX, self._get_group(i))
        negated_low, high = extremes
        kernels.class_indices(torch.stack((-negated_low, high)), self.classes, ignore_index)

    def argmax(self, v: Tensor, dim: int) -> Tensor:
        """The class of the largest entry of v, the first of several; v has this rank's classes."""
        shard = self.shard
        if shard is None:
            return v.argmax(dim)
        v = v.detach()
        if v.shape[dim]:
            largest, index = v.max(dim)
        else:
            largest = torch.full_like(v.sum(dim), -math.inf)
            index = torch.zeros_like(largest, dtype=torch.int64)
        of_all = reduce_constant(largest, collectives.MAX, shard.group)
        no_class = torch.iinfo(torch.int64).max
        index = (index + shard.first_class).masked_fill(largest < of_all, no_class)
        return reduce_constant(index, collectives.MIN, shard.group)

    # Results

    def give_total(self, total: Tensor) -> Tensor:
        """The sum over all ranks of a number of each rank's rows, as a replicated DTensor."""
        for i in self.row_dims:
            total = sum_over_ranks(total, self._get_group(i))
        if not self.gives_dtensors:
            return total
        return self._from_local(total, [Replicate()] * self.mesh.ndim, total.shape)

    def give_rows(self, v: Tensor) -> Tensor:
        """A result of each row, as a DTensor that is placed as the features."""
        axes = v.shape[len(self.batch) :]
        i = self.class_dim
        if i is not None and isinstance(rows := self.rows[i], Shard):
            v = scatter_to_ranks(v, rows.dim, self._get_group(i))
        if not self.gives_dtensors:
            return v
        return self._from_local(v, self.rows, (*self.batch, *axes))

    def give_weight(self, v: Tensor) -> Tensor:
        """This rank's classes of a gradient (C, *), as a DTensor that is placed as the weight."""
        return self._from_local(v, self._place_classes(), (self.classes, *v.shape[1:]))

    # Placements

    def _place_rows(self) -> list[Placement]:
        return [Replicate() if i == self.class_dim else rows for i, rows in enumerate(self.rows)]

    def _place_classes(self) -> list[Placement]:
        return [Shard(0) if i == self.class_dim else Replicate() for i in range(self.mesh.ndim)]

    def _get_group(self, i: int) -> str:
        return self.mesh.get_group(i).group_name

    def _find_chunk(self, size: int, i: int) -> tuple[int, int]:
        return collectives.find_chunk(size, self.mesh.size(i), self.mesh.get_local_rank(i))

    def _place(
        self, name: str, x: Tensor, placements: Sequence[Placement], sums: Collection[int | None]
    ) -> Tensor:
        """This rank's part of x after a redistribution to these placements.

        A plain tensor counts as replicated. On the mesh dimensions in `sums` each rank has a
        summand of the gradient, so the gradient is summed over them.
        """
        old: Sequence[Placement] = [Replicate()] * self.mesh.ndim
        v, layout = x, read_layout(name, x)
        if layout is not None:
            check_mesh(name, layout.mesh, self.mesh)
            old = layout.placements
            v = take_local(x, layout)
        sizes, shape = self._split_shape(old, x.shape)
        if v.shape != torch.Size(shape):  # `DTensor.from_local` accepts parts of any shape
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} and placements {tuple(old)} has a part of shape "
                f"{tuple(v.shape)} on this rank, expected {tuple(shape)}, as torch.chunk cuts it: "
                "use distribute_tensor, or give DTensor.from_local the shape of the whole"
            )
        for i in reversed(range(self.mesh.ndim)):
            is_summed = i in sums and v.is_floating_point()
            if isinstance(shard := old[i], Shard) and placements[i].is_replicate():
                v = gather_from_ranks(v, shard.dim, sizes[i], self._get_group(i), is_summed)
            elif old[i].is_replicate() and (is_summed or placements[i].is_shard()):
                v = copy_to_ranks(v, self._get_group(i)) if v.is_floating_point() else v
            elif old[i] != placements[i]:
                raise ValueError(
                    f"{name} has placement {old[i]} on mesh dimension {i}, but {placements[i]} "
                    "is expected: redistribute it first"
                )
        sizes, _ = self._split_shape(placements, x.shape)
        for i in range(self.mesh.ndim):
            if old[i].is_replicate() and isinstance(shard := placements[i], Shard):
                v = v.narrow(shard.dim, *self._find_chunk(sizes[i], i))
        return v

    def _split_shape(
        self, placements: Sequence[Placement], shape: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """For each mesh dimension, the size of the axis that it splits; this rank's shape."""
        own, sizes = list(shape), []
        for i, placement in enumerate(placements):
            sizes.append(0)
            if isinstance(placement, Shard):
                sizes[i] = own[placement.dim]
                _, own[placement.dim] = self._find_chunk(sizes[i], i)
        return sizes, own

    def _from_local(
        self, v: Tensor, placements: Sequence[Placement], shape: Sequence[int]
    ) -> Tensor:
        return make_dtensor(v, Layout(self.mesh, tuple(placements)), shape)


def read_sharding(input: Tensor, linear_weight: Tensor) -> Sharding:
    """How the head's features (*, D) and weight (C, *, D) are split."""
    layout, weight_layout = (
        read_layout(name, v) for name, v in (("input", input), ("linear_weight", linear_weight))
    )
    if layout is None or weight_layout is None:
        raise TypeError(
            "input and linear_weight must both be DTensors, or none of them: make one of the other "
            "by DTensor.from_local, with Replicate() where all ranks have the same values, or use "
            "torch_nnmath.parallel.VocabularyParallel. If FSDP2 has sharded the weight, call the "
            "module that it wraps, whose forward has the whole weight"
        )
    mesh, rows = layout
    check_mesh("linear_weight", weight_layout.mesh, mesh)
    places = weight_layout.placements
    class_dims = [i for i, place in enumerate(places) if not place.is_replicate()]
    if len(class_dims) > 1 or any(places[i] != Shard(0) for i in class_dims):
        raise ValueError(
            f"linear_weight has placements {places}: expected Shard(0), the classes, on at most "
            "one mesh dimension, and Replicate() on the others"
        )
    class_dim = class_dims[0] if class_dims else None
    for i, place in enumerate(rows):
        if not place.is_replicate() and not _is_row_shard(place, input.dim() - 1):
            raise ValueError(
                f"input has placement {place} on mesh dimension {i}: expected Replicate(), or "
                "Shard of an axis other than the features, the last one"
            )
        if class_dim is not None and class_dim < i and place == rows[class_dim] != Replicate():
            raise ValueError(
                f"mesh dimensions {class_dim} and {i} both split axis {place} of input: "
                "the one that splits the classes must be the later one"
            )
    return Sharding(mesh, class_dim, rows, tuple(input.shape[:-1]), linear_weight.shape[0])


def read_layout(name: str, x: Tensor) -> Layout | None:
    """Where the parts of x are, also inside transforms; None if it is no DTensor.

    Raises a ValueError if a mesh dimension splits the axis that a vmap batches.
    """
    if isinstance(x, DTensor):
        return Layout(x.device_mesh, x.placements)
    wrapped = _torch.unwrap_transformed(x)
    if wrapped is None:
        return None
    inner, batch_axis = wrapped
    layout = read_layout(name, inner)
    if layout is None or batch_axis is None:
        return layout
    places: list[Placement] = []
    for place in layout.placements:
        dim = place.dim if isinstance(place, Shard) else -1
        if dim == batch_axis:
            raise ValueError(
                f"{name} has placements {layout.placements}, which split the axis that vmap "
                "batches: redistribute it first"
            )
        is_moved = type(place) is Shard and dim > batch_axis
        places.append(Shard(dim - 1) if is_moved else place)
    return Layout(layout.mesh, tuple(places))


def take_local(x: Tensor, layout: Layout) -> Tensor:
    """This rank's part of the DTensor x."""
    from_local, to_local = _make_conversions(layout, x.shape)
    v: Tensor = Transfer.evaluate(x, to_local, from_local)
    return v


def make_dtensor(v: Tensor, layout: Layout, shape: Sequence[int] | None = None) -> Tensor:
    """The DTensor whose part on this rank is v. Without its shape, all parts have v's shape."""
    if shape is None:
        shape = [*v.shape]
        for i, place in enumerate(layout.placements):
            if isinstance(place, Shard):
                shape[place.dim] *= layout.mesh.size(i)
    x: Tensor = Transfer.evaluate(v, *_make_conversions(layout, torch.Size(shape)))
    return x


def check_mesh(name: str, mesh: DeviceMesh, expected: DeviceMesh) -> None:
    """Raises a ValueError if a tensor is on another mesh than the features."""
    if mesh != expected:
        raise ValueError(f"{name} is on {mesh}, input on {expected}: use one mesh for both")


def _is_row_shard(place: Placement, row_axes: int) -> bool:
    return type(place) is Shard and 0 <= place.dim < row_axes


def _make_conversions(layout: Layout, shape: torch.Size) -> Any:
    """`from_local` and `to_local` of a DTensor, which are adjoint."""
    mesh, placements = layout
    stride = torch.empty(shape, device="meta").stride()

    def from_local(v: Tensor) -> Tensor:
        v = v.contiguous()  # as the stride says
        return DTensor.from_local(v, mesh, placements, run_check=False, shape=shape, stride=stride)

    def to_local(x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):  # only a gradient may be none
            raise TypeError(
                "the gradient of a DTensor must be a DTensor, too, and outside of is_grads_batched "
                "and vectorize, which batch no DTensors: torch.func.vmap does"
            )
        x = x if x.placements == placements else x.redistribute(mesh, placements)
        v: Tensor = _torch.wait_for_collective(x.to_local())
        return v.view_as(v)

    return from_local, to_local
