"""What the workers run: each function on all ranks, which compare with one process in float64."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from torch_nnmath import functional as F
from torch_nnmath.kernels import _block

F64 = torch.float64
D = 4
IGNORE = -100


class Layout(NamedTuple):
    """A mesh, where the classes and the rows are on it, and how many there are."""

    mesh_shape: tuple[int, ...]
    class_dim: int | None  # mesh dimension that splits the classes
    rows: tuple[Placement, ...]
    classes: int
    row_count: int

    @property
    def weight(self) -> list[Placement]:
        dims = range(len(self.mesh_shape))
        return [Shard(0) if i == self.class_dim else Replicate() for i in dims]

    def place_probabilities(self) -> list[Placement]:
        return [Shard(1) if i == self.class_dim else rows for i, rows in enumerate(self.rows)]


EVERYWHERE, SPLIT = Replicate(), Shard(0)
LAYOUTS = {
    "two equal shards": Layout((2,), 0, (EVERYWHERE,), 6, 70),
    "three uneven shards": Layout((3,), 0, (EVERYWHERE,), 7, 33),
    "empty shard": Layout((4,), 0, (EVERYWHERE,), 5, 5),
    "one class": Layout((2,), 0, (EVERYWHERE,), 1, 5),
    "sequence parallel": Layout((2,), 0, (SPLIT,), 7, 70),
    "sequence parallel, empty": Layout((4,), 0, (SPLIT,), 5, 5),
    "data x classes": Layout((2, 2), 1, (SPLIT, EVERYWHERE), 7, 70),
    "classes x data": Layout((2, 2), 0, (EVERYWHERE, SPLIT), 7, 7),
    "data x classes, sequence parallel": Layout((2, 2), 1, (SPLIT, SPLIT), 5, 67),
    "replicas x classes": Layout((2, 2), 1, (EVERYWHERE, EVERYWHERE), 7, 33),
    "data parallel": Layout((2,), None, (SPLIT,), 7, 33),
}


@functools.cache
def make_mesh(shape: tuple[int, ...]) -> DeviceMesh:
    """The mesh of the first ranks; all ranks make it."""
    count = torch.Size(shape).numel()
    return DeviceMesh("cpu", torch.arange(count).view(shape))


def is_member(mesh: DeviceMesh) -> bool:
    return mesh.get_coordinate() is not None


def limit_blocks() -> Any:
    """Blocks of 32 rows and slices of two classes."""
    return mock.patch.multiple(_block, BLOCK_BYTES=(1, 1), SLICE_SIZE=128)


class HeadCase:
    """A call of the head in float64 with some options, and the placements of its tensors."""

    def __init__(self, layout: str, options: dict[str, Any], seed: int = 0):
        self.layout, self.options = LAYOUTS[layout], dict(options)
        self.function = self.options.pop("function", "loss")
        self.draw(seed)

    def draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        layout, options = self.layout, self.options
        N, C = layout.row_count, layout.classes

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=F64, generator=generator)

        self.tensors = {"input": normal(N, D), "linear_weight": normal(C, D)}
        self.placements = {"input": layout.rows, "linear_weight": layout.weight}
        replicated = [Replicate()] * len(layout.mesh_shape)
        if options.pop("bias", False):
            self.tensors["linear_bias"] = normal(C)
            self.placements["linear_bias"] = layout.weight
        if weight := options.pop("weight", None):
            self.tensors["weight"] = normal(C).abs() + 0.1
            is_sharded = weight == "sharded"
            self.placements["weight"] = layout.weight if is_sharded else replicated
        if options.get("logit_scale") == "learnt":
            del options["logit_scale"]
            self.tensors["logit_scale"] = normal()
            self.placements["logit_scale"] = replicated
        target = options.pop("target", "classes")
        if target == "probabilities":
            self.tensors["target"] = normal(N, C).softmax(1)
            self.placements["target"] = layout.place_probabilities()
        elif target == "replicated probabilities":
            self.tensors["target"] = normal(N, C).softmax(1)
            self.placements["target"] = replicated
        else:
            y = torch.randint(C, (N,), generator=generator)
            if target == "ignored":
                y[torch.rand(N, generator=generator) < 0.4] = IGNORE
                y[-1] = 0  # the mean over no row is nan
            elif target == "first rows ignored":  # all of one rank
                y[: N // 2 + 1] = IGNORE
            elif target == "all ignored":
                y[:] = IGNORE
            self.tensors["target"] = y
            self.placements["target"] = layout.rows if target != "classes" else replicated
        self.upstream = normal(N)

    @property
    def names(self) -> list[str]:
        return [name for name, v in self.tensors.items() if v.is_floating_point()]

    def call(self, tensors: dict[str, Tensor]) -> Any:
        x, W, y = (tensors[name] for name in ("input", "linear_weight", "target"))
        others = {k: v for k, v in tensors.items() if k not in ("input", "linear_weight", "target")}
        others |= self.options
        if self.function == "loss":
            return F.linear_cross_entropy(x, W, y, **others)
        if self.function == "log_probs":
            return F.linear_log_probs(x, W, y, **others)
        return F.linear_log_sum_exp(x, W, **others)

    def distribute(self, mesh: DeviceMesh, name: str, v: Tensor) -> Tensor:
        return distribute_tensor(v, mesh, self.placements[name], src_data_rank=None)

    def compute(self, mesh: DeviceMesh | None, order: int = 2) -> dict[str, Tensor]:
        """Values, gradients and those of second order."""

        def place(name: str, v: Tensor) -> Tensor:
            return v.clone() if mesh is None else self.distribute(mesh, name, v)

        tensors = {name: place(name, v) for name, v in self.tensors.items()}
        leaves = [tensors[name].requires_grad_() for name in self.names]
        directions = [place(n, (self.tensors[n].sin() + 0.3)) for n in self.names]
        outputs = self.call(tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        stats = {}
        if self.options.get("return_stats"):
            outputs, (values,) = outputs[:1], outputs[1:]
            stats = values._asdict()
        results = {f"value {i}": v for i, v in enumerate(outputs)} | stats
        for name, v in results.items():
            if mesh is not None:
                expected = self.layout.rows if v.dim() else [Replicate()] * mesh.ndim
                assert isinstance(v, DTensor), name
                assert list(v.placements) == list(expected), (name, v.placements)
        upstream = [self.make_upstream(mesh, v) for v in outputs]
        gradients = torch.autograd.grad(
            outputs, leaves, upstream, create_graph=order > 1, materialize_grads=True
        )
        results |= {f"gradient of {n}": g for n, g in zip(self.names, gradients, strict=True)}
        if order > 1:
            second = torch.autograd.grad(gradients, leaves, directions, materialize_grads=True)
            results |= {f"second order of {n}": g for n, g in zip(self.names, second, strict=True)}
        for name, v in results.items():
            leaf = name.rpartition(" of ")[2]
            if mesh is not None and leaf in self.names:
                assert list(v.placements) == list(self.placements[leaf]), (name, v.placements)
        return {name: gather(v) for name, v in results.items()}

    def make_upstream(self, mesh: DeviceMesh | None, v: Tensor) -> Tensor:
        upstream = self.upstream if v.dim() else self.upstream[0].clone()
        if mesh is None:
            return upstream
        placements = self.layout.rows if v.dim() else [Replicate()] * mesh.ndim
        return distribute_tensor(upstream, mesh, placements, src_data_rank=None)


def gather(v: Tensor) -> Tensor:
    return (v.full_tensor() if isinstance(v, DTensor) else v).detach()


def compare_head(cases: list[tuple[str, dict[str, Any]]], order: int = 2) -> list[str]:
    """Returns a line for each result that is not one process's, and the number of results."""
    lines = []
    for seed, (layout, options) in enumerate(cases):
        case = HeadCase(layout, options, seed)
        mesh = make_mesh(case.layout.mesh_shape)
        if not is_member(mesh):
            continue
        with limit_blocks():
            expected = case.compute(None, order)
            try:
                results = case.compute(mesh, order)
            except Exception as error:
                raise AssertionError(f"{layout}, {options}") from error
        assert results.keys() == expected.keys()
        for name, v in results.items():
            scale = expected[name].double().nan_to_num().abs().max().item()
            error = (v.double() - expected[name].double()).abs()
            is_nan_alike = v.isnan() == expected[name].isnan()
            error = error.nan_to_num().max().item() if is_nan_alike.all() else float("inf")
            if not (v.shape == expected[name].shape and error <= 1e-12 * max(scale, 1)):
                lines.append(f"{layout}, {options}: {name} is off by {error:.3g} of {scale:.3g}")
    return lines
