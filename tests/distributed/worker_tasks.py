"""Tasks of the workers: each runs on all ranks, which compare with one process in float64."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from torch_nnmath import _records, nn
from torch_nnmath import functional as F
from torch_nnmath.formulas import LinearCrossEntropy
from torch_nnmath.kernels import _block, collectives
from torch_nnmath.parallel import VocabularyParallel, count_tokens_per_rank

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
    """A call of the head with some options, and the placements of its tensors."""

    def __init__(
        self, layout: str, options: dict[str, Any], seed: int = 0, dtype: torch.dtype = F64
    ):
        self.layout, self.options = LAYOUTS[layout], dict(options)
        self.function = self.options.pop("function", "loss")
        self.draw(seed)
        self.cast(dtype)

    def cast(self, dtype: torch.dtype) -> None:
        for name in self.names:
            self.tensors[name] = self.tensors[name].to(dtype)

    def draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        layout, options = self.layout, self.options
        N, C = layout.row_count, layout.classes

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=F64, generator=generator)

        positions = options.pop("positions", ())
        if self.function == "cross_entropy":
            self.tensors = {"input": normal(N, C, *positions)}
            self.placements = {"input": layout.place_probabilities()}
        else:
            self.tensors = {"input": normal(N, D), "linear_weight": normal(C, *positions, D)}
            self.placements = {"input": layout.rows, "linear_weight": layout.weight}
        replicated = [Replicate()] * len(layout.mesh_shape)
        if options.pop("bias", False):
            self.tensors["linear_bias"] = normal(C, *positions)
            self.placements["linear_bias"] = layout.weight
        if weight := options.pop("weight", None):
            self.tensors["weight"] = normal(C).abs() + 0.1
            is_sharded = weight == "sharded"
            self.placements["weight"] = layout.weight if is_sharded else replicated
        if row_weight := options.pop("row_weight", None):
            self.tensors["row_weight"] = normal(N, *positions).abs() + 0.1
            is_sharded = row_weight == "sharded"
            self.placements["row_weight"] = layout.rows if is_sharded else replicated
        if options.get("divisor") == "replicated":
            self.tensors["divisor"] = normal().abs() + 3
            self.placements["divisor"] = replicated
            del options["divisor"]
        if options.get("logit_scale") == "learnt":
            del options["logit_scale"]
            self.tensors["logit_scale"] = normal()
            self.placements["logit_scale"] = replicated
        target = options.pop("target", "classes")
        if target == "probabilities":
            self.tensors["target"] = normal(N, C, *positions).softmax(1)
            self.placements["target"] = layout.place_probabilities()
        elif target == "replicated probabilities":
            self.tensors["target"] = normal(N, C, *positions).softmax(1)
            self.placements["target"] = replicated
        else:
            y = torch.randint(C, (N, *positions), generator=generator)
            if target == "ignored":
                y[torch.rand(y.shape, generator=generator) < 0.4] = IGNORE
                y[-1] = 0  # the mean over no row is nan
            elif target == "first rows ignored":  # all of one rank
                y[: N // 2 + 1] = IGNORE
            elif target == "all ignored":
                y[:] = IGNORE
            self.tensors["target"] = y
            self.placements["target"] = layout.rows if target != "classes" else replicated
        self.upstream = normal(N, *positions)

    @property
    def names(self) -> list[str]:
        return [name for name, v in self.tensors.items() if v.is_floating_point()]

    def call(self, tensors: dict[str, Tensor]) -> Any:
        x, W, y = (tensors.get(name) for name in ("input", "linear_weight", "target"))
        others = {k: v for k, v in tensors.items() if k not in ("input", "linear_weight", "target")}
        others |= self.options
        if self.function == "cross_entropy":
            return F.cross_entropy(x, y, **others)
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
        upstream = [self.make_upstream(mesh, v).requires_grad_(order > 1) for v in outputs]
        gradients = torch.autograd.grad(
            outputs, leaves, upstream, create_graph=order > 1, materialize_grads=True
        )
        results |= {f"gradient of {n}": g for n, g in zip(self.names, gradients, strict=True)}
        if order > 1:
            names = [*self.names, *(f"upstream {i}" for i, _ in enumerate(upstream))]
            second = torch.autograd.grad(
                gradients, [*leaves, *upstream], directions, materialize_grads=True
            )
            results |= {f"second order of {n}": g for n, g in zip(names, second, strict=True)}
        for name, v in results.items():
            leaf = name.rpartition(" of ")[2]
            if mesh is not None and leaf in self.names:
                assert list(v.placements) == list(self.placements[leaf]), (name, v.placements)
        return {name: gather(v) for name, v in results.items()}

    def make_upstream(self, mesh: DeviceMesh | None, v: Tensor) -> Tensor:
        upstream = (self.upstream if v.dim() else self.upstream.flatten()[0]).to(v.dtype)
        if mesh is None:
            return upstream.clone()
        placements = self.layout.rows if v.dim() else [Replicate()] * mesh.ndim
        return distribute_tensor(upstream, mesh, placements, src_data_rank=None)


def gather(v: Tensor) -> Tensor:
    return (v.full_tensor() if isinstance(v, DTensor) else v).detach()


class LateReduction(collectives.Reduction):
    """Writes its result in `wait`. Before, the buffer has a filler, which nobody may overwrite."""

    def __init__(self, x: Tensor, operation: str, group: str):
        self.arguments = x.clone(), operation, group
        x = x.contiguous()
        self.x, self.filler = x, float("nan") if x.is_floating_point() else -12345
        x.fill_(self.filler)

    def wait(self) -> Tensor:
        is_filler = self.x.isnan() if self.x.is_floating_point() else self.x == self.filler
        assert is_filler.all(), "the buffer was written before the reduction had ended"
        return self.x.copy_(REDUCTION(*self.arguments).wait())


REDUCTION = collectives.Reduction


def compare_with_late_reductions(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    with mock.patch.object(collectives, "Reduction", LateReduction):
        return compare_head(cases)


def compare_head(
    cases: list[tuple[str, dict[str, Any]]], order: int = 2, limits: Any = None
) -> list[str]:
    """Returns a line for each result that is not one process's; `limits` as `limit_blocks`."""
    lines = []
    for seed, (layout, options) in enumerate(cases):
        case = HeadCase(layout, options, seed)
        mesh = make_mesh(case.layout.mesh_shape)
        if not is_member(mesh):
            continue
        with limits or limit_blocks():
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


def compare_bfloat16(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Returns a line for each result in bfloat16 that is less exact than one process's.

    The error is the root of the mean square: where single entries are rounded is chance.
    """
    lines = []
    for seed, (layout, options) in enumerate(cases):
        case = HeadCase(layout, options, seed, torch.bfloat16)
        mesh = make_mesh(case.layout.mesh_shape)
        if not is_member(mesh):
            continue
        with limit_blocks():
            results, of_one_process = case.compute(mesh, 1), case.compute(None, 1)
            case.cast(F64)
            truth = case.compute(None, 1)
        for name, exact in truth.items():
            error, allowed = (
                (v[name].double() - exact.double()).square().mean().sqrt().item()
                for v in (results, of_one_process)
            )
            scale = exact.double().abs().max().item()
            if results[name].dtype != of_one_process[name].dtype:
                lines.append(f"{layout}, {options}: {name} is {results[name].dtype}")
            if not error <= 1.02 * allowed + 1e-6 * scale:
                lines.append(
                    f"{layout}, {options}: {name} is off by {error:.3g}, not {allowed:.3g}"
                )
    return lines


def compare_large_blocks() -> list[str]:
    """As `compare_head`, in blocks of 64 rows for three classes, and of 256 for one."""
    LAYOUTS["many rows"] = LAYOUTS["three uneven shards"]._replace(row_count=200)
    cases: Any = [("many rows", o) for o in ({}, {"return_stats": True})]
    return compare_head(cases, limits=mock.patch.object(_block, "BLOCK_BYTES", (1, 1024)))


class CollectiveRecorder:
    """Records each collective in a `with` block: its name, the shape and the bytes it sends."""

    def __init__(self):
        self.events: list[tuple[Any, ...]] = []

    def __enter__(self) -> CollectiveRecorder:
        record = self.make_recorder
        gather, scatter = collectives.all_gather, collectives.reduce_scatter
        wait = collectives.Reduction.wait

        def record_wait(reduction: Any) -> Tensor:
            self.events.append(("wait",))
            return wait(reduction)

        self.patches = [
            mock.patch.object(dist, "all_reduce", record("all_reduce", dist.all_reduce)),
            mock.patch.object(collectives, "all_gather", record("all_gather", gather)),
            mock.patch.object(collectives, "reduce_scatter", record("reduce_scatter", scatter)),
            mock.patch.object(collectives.Reduction, "wait", record_wait),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def make_recorder(self, name: str, function: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            x, operation = args[0], name
            if name == "all_reduce":
                operation = str(args[1]).rpartition(".")[2]
            self.events.append((operation, tuple(x.shape), str(x.dtype)[6:]))
            return function(*args, **kwargs)

        return record


def record_step(
    layout: str, options: dict[str, Any], order: int, classes: int | None = None
) -> list[list[tuple[Any, ...]]]:
    """Returns the collectives of the forward, of the backward and of the second order."""
    if classes is not None:
        LAYOUTS["resized"] = LAYOUTS[layout]._replace(classes=classes)
        layout = "resized"
    case = HeadCase(layout, options, 0, torch.float32)
    mesh = make_mesh(case.layout.mesh_shape)
    if not is_member(mesh):
        return []
    tensors = {n: case.distribute(mesh, n, v) for n, v in case.tensors.items()}
    leaves = [tensors[name].requires_grad_() for name in ("input", "linear_weight")]
    directions = [g.detach().clone() for g in leaves]
    steps = [CollectiveRecorder() for _ in range(order + 1)]
    with limit_blocks():
        with steps[0]:
            loss = case.call(tensors)
            loss = loss[0] if isinstance(loss, tuple) else loss
        with steps[1]:
            gradients = torch.autograd.grad(loss, leaves, create_graph=order > 1)
        if order > 1:
            with steps[2]:
                torch.autograd.grad(gradients, leaves, directions)
    return [step.events for step in steps]


class DTensorMessages(TorchDispatchMode):
    """Records the collectives that DTensor itself calls, such as those of `redistribute`."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # the mode then sees what DTensor calls
        if "c10d_functional" in func.namespace:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def record_dtensor_messages(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Returns a line for each collective of a step, up to second order, that is DTensor's own."""
    lines = []
    for layout, options in cases:
        case = HeadCase(layout, options)
        mesh = make_mesh(case.layout.mesh_shape)
        if not is_member(mesh):
            continue
        tensors = {n: case.distribute(mesh, n, v) for n, v in case.tensors.items()}
        leaves = [tensors[name].requires_grad_() for name in case.names]
        with limit_blocks(), DTensorMessages() as messages:
            outputs = case.call(tensors)
            loss = outputs[0] if isinstance(outputs, tuple) else outputs
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            directions = [g.detach() for g in gradients]
            torch.autograd.grad(gradients, leaves, directions)
        lines += [f"{layout}, {options}: {name}" for name in messages.names]
    return lines


def raise_index_error(layout: str, index: int) -> str:
    """Returns the message of the IndexError that a class index of the last row raises."""
    case = HeadCase(layout, {"target": "ignored"})
    mesh = make_mesh(case.layout.mesh_shape)
    case.tensors["target"][-1] = index
    tensors = {n: case.distribute(mesh, n, v) for n, v in case.tensors.items()}
    try:
        case.call(tensors)
    except IndexError as error:
        return str(error)
    return "no error"


def fail_on_one_rank(place: str) -> tuple[str, float]:
    """Rank 1 raises; returns the error of each rank and the seconds.

    It raises before the call, at the sums of its second block, or in the backward.
    """
    group = dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu")
    case = HeadCase("two equal shards", {})
    tensors = {n: case.distribute(mesh, n, v) for n, v in case.tensors.items()}
    start, start_sums, count = time.monotonic(), _block.Block.start_sums_, [0]

    def fail() -> None:
        if dist.get_rank() == 1:
            raise ValueError("rank 1 failed")

    def start_second_sums(block: Any, *args: Any) -> None:
        count[0] += 1
        if count[0] == 2 and place == "second block":
            fail()
        start_sums(block, *args)

    try:
        if place == "before the call":
            fail()
        with limit_blocks(), mock.patch.object(_block.Block, "start_sums_", start_second_sums):
            loss = case.call({n: v.requires_grad_(n in case.names) for n, v in tensors.items()})
        if place == "backward":
            fail()
        loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", 0.0


def compare_tangents(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Compares the tangents of the head's formula with one process's.

    A DTensor has no forward mode, so each rank gets its part of the tensors and of the tangents.
    """
    lines = []
    for seed, (layout, options) in enumerate(cases):
        case = HeadCase(layout, {"target": "probabilities", "bias": True}, seed)
        mesh = make_mesh(case.layout.mesh_shape)
        if not is_member(mesh):
            continue
        x, W, t, b = (case.tensors[n] for n in ("input", "linear_weight", "target", "linear_bias"))
        y = torch.arange(len(x))[:, None] % len(W)
        p, keep = x[:, :1].abs(), (y % 3 > 0) if options.get("ignored") else None
        first, size = collectives.find_chunk(len(W), mesh.size(), mesh.get_local_rank())
        _, max_classes = collectives.find_chunk(len(W), mesh.size(), 0)
        shard = _records.Shard(mesh.get_group().group_name, first, max_classes)
        full = x, W, b, p, t
        local = x, *(v.narrow(0, first, size) for v in (W, b)), p, t.narrow(1, first, size)
        evaluate = functools.partial(evaluate_rows, y, keep, options.get("softcap"))
        with limit_blocks():
            expected = compute_tangents(functools.partial(evaluate, None), full)
            results = compute_tangents(functools.partial(evaluate, shard), local)
        for i, (v, e) in enumerate(zip(results, expected, strict=True)):
            error = (v - e).abs().max().item()
            if not error <= 1e-12 * max(e.abs().max().item(), 1):
                lines.append(f"{layout}, {options}: tangent {i} is off by {error:.3g}")
    return lines


def evaluate_rows(y: Tensor, keep: Any, cap: Any, shard: Any, *values: Tensor) -> tuple[Any, ...]:
    """Loss, squared log-sum-exp and entropy of each row, of x, W, b, p, t."""
    x, W, b, p, t = values
    target = _records.Target(y, p, t)
    inputs = _records.HeadInputs(x, W, b, target, keep, 2.0, cap, shard=shard)
    requests = _records.Requests(entropy=True)
    loss, _, squared_lse, entropy, *_ = LinearCrossEntropy.evaluate(*inputs.flatten(), requests)
    return loss, squared_lse, entropy


def compute_tangents(function: Any, values: Sequence[Tensor]) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, v.sin() + 0.3) for v in values]
        return [forward_ad.unpack_dual(v).tangent for v in function(*duals)]


def compare_module(layout: str, use_local_output: bool) -> list[str]:
    """Compares a training step of a parallelised module, and its statistics, with one process's."""
    size, input_layout = LAYOUTS[layout].mesh_shape[0], LAYOUTS[layout].rows[0]
    mesh, lines = make_mesh((size,)), []
    if not is_member(mesh):
        return []
    torch.manual_seed(3)
    options = {"bias": True, "return_stats": True, "label_smoothing": 0.1, "softcap": 3.0}
    head = nn.LinearCrossEntropyLoss(D, LAYOUTS[layout].classes, dtype=F64, **options)
    split_head = copy.deepcopy(head)
    style = VocabularyParallel(input_layout=input_layout, use_local_output=use_local_output)
    parallelize_module(split_head, mesh, style)
    x = torch.randn(2, 6 * size, D, dtype=F64)
    y = torch.randint(head.num_classes, x.shape[:2])
    places = [input_layout]
    own_x, own_y = (distribute_tensor(v, mesh, places, src_data_rank=None) for v in (x, y))
    own_x, own_y = own_x.to_local().requires_grad_(), own_y.to_local()
    x.requires_grad_()
    loss, stats = head(x, y)
    split_loss, split_stats = split_head(own_x, own_y)
    assert isinstance(split_loss, DTensor) != use_local_output
    loss.backward()
    split_loss.backward()
    results = {"loss": split_loss} | split_stats._asdict()
    results["input"] = DTensor.from_local(own_x.grad, mesh, places, run_check=False)
    for name, parameter in split_head.named_parameters():
        assert parameter.grad.placements == parameter.placements == (Shard(0),), name
        results[name] = parameter.grad
    if use_local_output:
        for name in stats._fields:
            results[name] = DTensor.from_local(results[name], mesh, places, run_check=False)
    gradients = {name: p.grad for name, p in head.named_parameters()}
    expected = {"loss": loss, "input": x.grad} | stats._asdict() | gradients
    for name, v in expected.items():
        if not torch.allclose(gather(results[name]).double(), v.double(), rtol=1e-12, atol=1e-12):
            lines.append(f"{layout}: {name}")
    return lines


class TokenModel(torch.nn.Module):
    """Features and target to the loss, by a head of its own."""

    def __init__(self, reduction: str):
        super().__init__()
        self.body = torch.nn.Linear(D, D, dtype=F64)
        self.head = nn.LinearCrossEntropyLoss(D, 7, reduction=reduction, dtype=F64)

    def forward(self, x: Tensor, y: Tensor, divisor: Any = None) -> Tensor:
        return self.head(self.body(x).tanh(), y, divisor=divisor)


def compare_mean(wrapper: str, micro_batches: int, mean: str) -> tuple[float, float]:
    """Relative errors of loss and gradients of the mean over all tokens, against one process's.

    `mean` is "of means", or counted by `count_tokens_per_rank`: a "sum, divided", or a "mean" with
    this divisor. Each rank has `micro_batches`, every one with another number of tokens that are
    not ignored.
    """
    generator = torch.Generator().manual_seed(5)
    world, rank, rows, group = dist.get_world_size(), dist.get_rank(), 24, None
    x = torch.randn(world * micro_batches, rows, D, dtype=F64, generator=generator)
    y = torch.randint(7, x.shape[:2], generator=generator)
    for i, target in enumerate(y):
        target[: 23 - 5 * (i % 5)] = IGNORE
    torch.manual_seed(3)
    model = TokenModel("mean")
    wrapped: Any = copy.deepcopy(model)
    wrapped.head.reduction = "sum" if mean == "sum, divided" else "mean"
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(wrapped)
    else:
        is_split = wrapper.endswith("classes split")
        shape = (2, world // 2) if is_split else (world, 1)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "classes"))
        if is_split:
            parallelize_module(wrapped.head, mesh["classes"], VocabularyParallel())
        for module in (wrapped.body, *[wrapped.head] * ("head" in wrapper), wrapped):
            fully_shard(module, mesh=mesh["data"])
        rank, world, group = mesh.get_local_rank("data"), shape[0], mesh.get_group("data")
    x, y = x[: world * micro_batches], y[: world * micro_batches]
    own = slice(rank * micro_batches, (rank + 1) * micro_batches)
    inputs, targets = x[own], list(y[own])
    option: Any = None
    divisor: Any = micro_batches
    if mean != "of means":
        divisor = count_tokens_per_rank(targets, group=group)
    if mean == "mean":
        divisor, option = 1, divisor
    total = torch.zeros((), dtype=F64)
    for i in range(micro_batches):
        is_last = i == micro_batches - 1
        with contextlib.ExitStack() as stack:
            if wrapper == "ddp" and not is_last:
                stack.enter_context(wrapped.no_sync())
            elif wrapper != "ddp":
                wrapped.set_requires_gradient_sync(is_last)
            loss = wrapped(inputs[i], targets[i], option) / divisor
            loss.backward()
        total += loss.detach()
    dist.all_reduce(total, group=group)
    expected = model(x, y)
    expected.backward()
    error = 0.0
    for p, own_p in zip(model.parameters(), wrapped.parameters(), strict=True):
        difference = gather(own_p.grad) - p.grad
        error = max(error, (difference.abs().max() / p.grad.abs().max()).item())
    return abs(total.item() / world / expected.item() - 1), error


def count_weighted_tokens() -> tuple[float, float, float]:
    """Counts of 4 ranks in groups of two: of all, of the own group, and with class weights."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("vocabulary", "data"))
    y = torch.full((2, 5), IGNORE)
    y[0, : rank + 1] = torch.arange(rank + 1)  # 1, 2, 3 and 4 tokens
    count = functools.partial(count_tokens_per_rank, group=mesh.get_group("data"))
    weighted = count([y, y.clamp(max=0)], weight=torch.tensor([0.5, 1.0, 2.0, 4.0]))
    return count_tokens_per_rank(y).item(), count(y).item(), weighted.item()


def collect_errors() -> dict[str, str]:
    """Returns the messages of errors, by what is wrong."""
    mesh, other = make_mesh((4,)), make_mesh((2, 2))
    x = distribute_tensor(torch.randn(8, D), mesh, [Replicate()], src_data_rank=None)
    W = distribute_tensor(torch.randn(8, D), mesh, [Shard(0)], src_data_rank=None)
    W.requires_grad_()
    y, b = torch.zeros(8, dtype=torch.int64), torch.zeros(8)

    def differentiate_three_times() -> None:
        value: Any = F.linear_cross_entropy(x, W, y)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, W, create_graph=True)
            value = gradient.full_tensor().square().sum()

    calls = {
        "plain features": lambda: F.linear_cross_entropy(torch.randn(8, D), W, y),
        "weight split over features": lambda: F.linear_cross_entropy(
            x, W.redistribute(mesh, [Shard(1)]), y
        ),
        "features split over features": lambda: F.linear_cross_entropy(
            x.redistribute(mesh, [Shard(1)]), W, y
        ),
        "another mesh": lambda: F.linear_cross_entropy(
            distribute_tensor(x.to_local(), other, [Replicate()] * 2, src_data_rank=None), W, y
        ),
        "bias on another axis": lambda: F.linear_cross_entropy(
            x, W, y, linear_bias=DTensor.from_local(b, mesh, [Partial()], run_check=False)
        ),
        "target of another shape": lambda: F.linear_cross_entropy(x, W, y[:3]),
        "third order": differentiate_three_times,
        "tokens of a DTensor": lambda: count_tokens_per_rank(
            distribute_tensor(y, mesh, [Shard(0)], src_data_rank=None)
        ),
        "module": lambda: parallelize_module(torch.nn.Tanh(), mesh, VocabularyParallel()),
        "logits as DTensors": lambda: parallelize_module(
            torch.nn.Linear(2, 3), mesh, VocabularyParallel(use_local_output=False)
        ),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "no error"
        except Exception as error:  # the test compares them
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


# Tasks that test the pool


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def stop_on_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    time.sleep(30)


def get_rank() -> int:
    return dist.get_rank()
