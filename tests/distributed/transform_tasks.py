"""Tasks of the workers: the head under transforms, compilers and checkpointing, and its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from worker_tasks import (
    F64,
    LAYOUTS,
    D,
    HeadCase,
    gather,
    is_member,
    limit_blocks,
    make_mesh,
)

from torch_nnmath import functional as F
from torch_nnmath import nn
from torch_nnmath._memory import read_peak, reset_peak
from torch_nnmath.kernels import _block
from torch_nnmath.parallel import VocabularyParallel, enable_forward_mode

Function = Callable[..., Tensor]
Values = Sequence[Tensor]


def make_argnums(leaves: Values) -> tuple[int, ...]:
    return tuple(range(len(leaves)))


def take_gradients(f: Function, leaves: Values, _directions: Values) -> Any:
    return grad(f, argnums=make_argnums(leaves))(*leaves)


def take_vjp_of_grad(f: Function, leaves: Values, directions: Values) -> Any:
    _, pull_back = vjp(grad(f, argnums=make_argnums(leaves)), *leaves)
    return pull_back(tuple(directions))


def take_jvp(f: Function, leaves: Values, directions: Values) -> Any:
    return jvp(f, tuple(leaves), tuple(directions))


def take_jvp_of_grad(f: Function, leaves: Values, directions: Values) -> Any:
    return take_jvp(grad(f, argnums=make_argnums(leaves)), leaves, directions)[1]


def take_duals(f: Function, leaves: Values, directions: Values) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, leaves, directions)))


def take_jacobians(f: Function, leaves: Values, _directions: Values) -> Any:
    return jacfwd(f)(*leaves), jacrev(f)(*leaves)


def take_batch(f: Function, leaves: Values, directions: Values) -> Any:
    batches = [torch.stack(pair) for pair in zip(leaves, directions, strict=True)]
    return vmap(f)(*batches), *vmap(grad(f, argnums=make_argnums(leaves)))(*batches)


def take_hessian_products(f: Function, leaves: Values, directions: Values) -> Any:
    """Products with Hessian and Jacobian by PyTorch's functions that use two backwards."""
    functional: Any = torch.autograd.functional
    _, products = functional.vhp(f, tuple(leaves), tuple(directions))
    _, tangent = functional.jvp(f, tuple(leaves), tuple(directions))
    return *products, tangent


def take_checkpointed(f: Function, leaves: Values, directions: Values) -> Any:
    results: list[Tensor] = []
    for is_reentrant in (False, True):
        inputs = [v.detach().clone().requires_grad_() for v in leaves]
        value = checkpoint(f, *inputs, use_reentrant=is_reentrant)
        if is_reentrant:  # then PyTorch supports `backward` alone
            value.backward()
            results += [v.grad for v in inputs]
            continue
        gradients = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(gradients, inputs, tuple(directions))
        results += [value, *gradients, *second]
    return results


TRANSFORMS = {
    "grad": take_gradients,
    "vjp of grad": take_vjp_of_grad,
    "jvp": take_jvp,
    "jvp of grad": take_jvp_of_grad,
    "duals": take_duals,
    "jacobians": take_jacobians,
    "vmap": take_batch,
    "Hessian products": take_hessian_products,
    "checkpoint": take_checkpointed,
}


def compare_transforms(cases: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    """Returns a line for each result that differs from that of one process."""
    enable_forward_mode()
    lines = []
    for seed, (transform, layout, options) in enumerate(cases):
        case = HeadCase(layout, options, seed)
        mesh = make_mesh(case.layout.mesh_shape)
        if not is_member(mesh):
            continue

        with limit_blocks():
            try:
                results = apply_transform(transform, case, mesh)
            except Exception as error:
                raise AssertionError(f"{transform}, {layout}, {options}") from error
            expected = apply_transform(transform, case, None)
        assert len(results) == len(expected)
        for i, (v, e) in enumerate(zip(results, expected, strict=True)):
            error = find_error(v, e)
            if error > 1e-12:
                lines.append(f"{transform}, {layout}, {options}: result {i} is off by {error:.3g}")
    return lines


def apply_transform(name: str, case: HeadCase, mesh: DeviceMesh | None) -> list[Tensor]:
    tensors, directions = place_tensors(case, mesh)

    def call(*leaves: Tensor) -> Tensor:
        return select_loss(case.call(tensors | dict(zip(case.names, leaves, strict=True))))

    leaves = [tensors[key] for key in case.names]
    return tree_leaves(TRANSFORMS[name](call, leaves, directions))


def place_tensors(
    case: HeadCase, mesh: DeviceMesh | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The tensors of the case, and directions of its differentiable ones."""

    def place(key: str, v: Tensor) -> Tensor:
        return v if mesh is None else case.distribute(mesh, key, v)

    tensors = {key: place(key, v) for key, v in case.tensors.items()}
    return tensors, [place(key, case.tensors[key].sin() + 0.3) for key in case.names]


def select_loss(outputs: Any) -> Tensor:
    """The loss without the statistics."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def find_error(v: Tensor, expected: Tensor) -> float:
    """The largest error over the largest entry or 1; infinite for another shape."""
    v, expected = gather(v).double(), gather(expected).double()
    if v.shape != expected.shape:
        return float("inf")
    return ((v - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def compare_per_sample_gradients() -> list[str]:
    """Per-sample gradients of a parallelised module, by `vmap`, `grad` and `functional_call`."""
    mesh = make_mesh((4,))
    torch.manual_seed(3)
    head = nn.LinearCrossEntropyLoss(D, 7, bias=True, dtype=F64)
    split_head = copy.deepcopy(head)
    parallelize_module(split_head, mesh, VocabularyParallel())
    x, y = torch.randn(5, 3, D, dtype=F64), torch.randint(7, (5, 3))

    def take(module: torch.nn.Module) -> Any:
        def compute(parameters: Any, x: Tensor, y: Tensor) -> Tensor:
            return functional_call(module, parameters, (x, y))

        return vmap(grad(compute), in_dims=(None, 0, 0))(dict(module.named_parameters()), x, y)

    expected, lines = take(head), []
    for name, v in take(split_head).items():
        assert v.placements == (Shard(1),), name
        error = find_error(v, expected[name])
        if error > 1e-12:
            lines.append(f"{name} is off by {error:.3g}")
    return lines


def compare_autocast() -> list[str]:
    """Returns a line for each result under autocast that has another type or value in one process.

    The results are the loss and its derivatives of first and second order. Sums differ in order.
    """
    lines = []
    for layout in ("three uneven shards", "data x classes, sequence parallel"):
        options = {"bias": True, "label_smoothing": 0.1, "z_loss": 0.1}
        case = HeadCase(layout, options, 0, torch.float32)
        mesh = make_mesh(case.layout.mesh_shape)
        if not is_member(mesh):
            continue
        with limit_blocks(), torch.autocast("cpu", torch.bfloat16):
            results, expected = case.compute(mesh), case.compute(None)
        for name, v in results.items():
            error = find_error(v, expected[name])
            if v.dtype != expected[name].dtype or error > 1e-5:
                lines.append(f"{layout}: {name}, {v.dtype}, is off by {error:.3g}")
    return lines


# Compilers


def compare_compiled(backend: str, layout: str, options: dict[str, Any]) -> list[str]:
    """Compares compiled losses and gradients with one process's.

    The second call has one row more, but some ranks have as many rows as before.
    """
    torch.compiler.reset()
    lines, rows = [], LAYOUTS[layout].row_count

    @torch.compile(backend=backend)
    def compute(case: HeadCase, tensors: dict[str, Tensor]) -> Tensor:
        loss = select_loss(case.call(tensors))
        return loss * loss.detach()

    for row_count in (rows, rows + 1):
        LAYOUTS["compiled"] = LAYOUTS[layout]._replace(row_count=row_count)
        case = HeadCase("compiled", options)
        mesh = make_mesh(case.layout.mesh_shape)
        if not is_member(mesh):
            break
        results = take_training_step(case, mesh, compute)
        expected = take_training_step(case, None, compute.__wrapped__)
        for name, v in results.items():
            error = find_error(v, expected[name])
            if error > 1e-12:
                lines.append(f"{row_count} rows: {name} is off by {error:.3g}")
    return lines


def take_training_step(case: HeadCase, mesh: DeviceMesh | None, compute: Any) -> dict[str, Tensor]:
    """The loss, and the gradients along it."""
    tensors, _ = place_tensors(case, mesh)
    leaves = {key: tensors[key].detach().clone().requires_grad_() for key in case.names}
    loss = compute(case, tensors | leaves)
    gradients = torch.autograd.grad(loss, [*leaves.values()], loss.detach())
    return {"loss": loss} | dict(zip(leaves, gradients, strict=True))


def count_graphs() -> list[int]:
    """Returns into how many graphs Dynamo cuts a function that calls a loss of DTensors."""
    case = HeadCase("two equal shards", {})
    mesh, counts = make_mesh(case.layout.mesh_shape), []
    if not is_member(mesh):
        return []
    tensors, _ = place_tensors(case, mesh)
    x, W, y = (tensors[name] for name in ("input", "linear_weight", "target"))
    calls: list[tuple[Any, ...]] = [
        (F.linear_cross_entropy, x, W, y),
        (F.linear_log_probs, x, W, y),
        (F.linear_log_sum_exp, x, W),
        (F.cross_entropy, x, x.detach()),
    ]
    for head, *values in calls:
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")

        @torch.compile(backend=counter)
        def compute(x: Tensor, *others: Tensor, head: Any = head) -> Tensor:
            return head(x.exp(), *others).exp()

        compute(*values)
        counts.append(counter.frame_count)
    return counts


# Memory


def measure_memory(order: int, is_fused: bool) -> float:
    """The peak memory of a rank, over the size of its logits, in blocks of 32 rows.

    With `is_fused=False` the logits are in memory: the test must be able to see them.
    """
    classes = 2**14
    with mock.patch.object(_block, "BLOCK_BYTES", (1, 32 * classes)):
        measure_peak(32, classes, order, is_fused)  # first calls import modules
        return measure_peak(2**11, classes, order, is_fused) / (2**11 * classes)


def measure_peak(rows: int, classes: int, order: int, is_fused: bool) -> float:
    """By how many bytes a call raises the peak memory of this rank, one of four."""
    mesh = make_mesh((4,))
    shapes_and_places = ((rows, D), Replicate()), ((classes, D), Shard(0))
    leaves = [
        distribute_tensor(torch.randn(shape), mesh, [place], src_data_rank=None).requires_grad_()
        for shape, place in shapes_and_places
    ]
    directions = [v.detach().clone() for v in leaves]
    y = distribute_tensor(torch.zeros(rows).long(), mesh, [Replicate()], src_data_rank=None)
    (x, W), options = leaves, {"label_smoothing": 0.1, "z_loss": 0.1, "return_stats": True}
    before = reset_peak(torch.device("cpu"))
    if is_fused:
        loss, _ = F.linear_cross_entropy(x, W, y, **options)
    else:
        loss, _ = F.cross_entropy(torch.nn.functional.linear(x, W), y, **options)
    gradients = torch.autograd.grad(loss, leaves, create_graph=order > 1)
    if order > 1:
        torch.autograd.grad(gradients, leaves, directions)
    return read_peak(torch.device("cpu")) - before


# Errors


def collect_transform_errors() -> dict[str, str]:
    """Returns the messages of errors, by what is wrong."""
    mesh = make_mesh((4,))
    x = distribute_tensor(torch.randn(8, D), mesh, [Replicate()], src_data_rank=None)
    W = distribute_tensor(torch.randn(6, D), mesh, [Shard(0)], src_data_rank=None)
    y, W = torch.zeros(8, dtype=torch.int64), W.requires_grad_()

    def compute(x: Tensor, W: Tensor = W) -> Tensor:
        return F.linear_cross_entropy(x, W, y)

    def batch_gradients() -> None:
        losses = F.linear_cross_entropy(x, W, y, reduction="none")
        basis = distribute_tensor(torch.eye(8), mesh, [Replicate()], src_data_rank=None)
        torch.autograd.grad(losses, W, basis, is_grads_batched=True)

    # torch.chunk cuts 6 into 2, 2, 2, 0
    part, whole = torch.randn((3, 1, 1, 1)[dist.get_rank()], D), torch.Size((6, D))
    odd_W = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=whole, stride=(D, 1))
    batch = distribute_tensor(torch.randn(4, 8, D), mesh, [Shard(0)], src_data_rank=None)
    functional: Any = torch.autograd.functional

    @torch.compile(backend="eager", fullgraph=True)
    def compute_in_one_graph(x: Tensor) -> Tensor:
        return compute(x)

    calls = {
        "one graph": lambda: compute_in_one_graph(x),
        "vmap over a split axis": lambda: vmap(compute)(batch),
        "vmap of plain features": lambda: vmap(compute)(torch.randn(2, 8, D)),
        "is_grads_batched": batch_gradients,
        "plain upstream gradient": lambda: torch.autograd.grad(compute(x), W, torch.ones(())),
        "hvp, of third order": lambda: functional.hvp(compute, x, x),
        "parts of another size": lambda: compute(x, odd_W),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "no error"
        except Exception as error:  # the test compares them
            messages[name] = f"{type(error).__name__}: {error}"
    return messages
