"""Tasks of the workers: swapped models, whose logits are deferred."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import deferred_helpers
import test_deferred_losses
import torch
import torch.distributed as dist
from swapped_models import defer_small_logits, make_batch, make_lm, shifted_loss
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from worker_tasks import CollectiveRecorder, gather, is_member, limit_blocks, make_mesh

from torch_nnmath import functional, swap, unswap
from torch_nnmath.deferred import MaterializedLogits
from torch_nnmath.parallel import VocabularyParallel, count_tokens_per_rank
from torch_nnmath.swapping import Report

F64 = torch.float64


@contextlib.contextmanager
def defer_all_logits() -> Iterator[None]:
    """Defers logits of any size; without warnings, since the tests read the logs."""
    defer_small_logits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaterializedLogits)
        warnings.filterwarnings("ignore", "size_average and reduce args")
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # no_grad
        yield


# Losses of the logits of a head whose classes are split

LOSSES = test_deferred_losses.FUSED | test_deferred_losses.FUSED_WITHOUT_BIAS
OF_CLASSES_ABOVE_9 = ("mask of flat logits", "mask of one example", "entropy of some rows")


@defer_all_logits()
def compare_deferred_losses(part: int) -> list[str]:
    """Returns a line for each loss that differs from that of one process, or that computes logits.

    Part 0 has every second loss, of 301 classes over three ranks. Part 1 has the others, of five
    classes over four ranks, of which the last one has none.
    """
    ranks, classes = ((3, deferred_helpers.C), (4, 5))[part]
    mesh, lines = make_mesh((ranks,)), []
    if not is_member(mesh):
        return []
    for name in [*LOSSES][part::2]:
        if classes < 10 and name in OF_CLASSES_ABOVE_9:
            continue
        has_bias = name in test_deferred_losses.FUSED
        plain, swapped, log = deferred_helpers.make_pair(has_bias, classes=classes)
        parallelize_module(swapped.lm_head, mesh, VocabularyParallel())
        inputs = functools.partial(deferred_helpers.make_inputs, classes=classes)
        with mock.patch.object(test_deferred_losses, "C", classes):
            results = deferred_helpers.compute_results(swapped, LOSSES[name], inputs())
            expected = deferred_helpers.compute_results(plain, LOSSES[name], inputs())
        lines += [f"{name}: {line}" for line in list_differences(results, expected)]
        counts = test_deferred_losses.LOSS_COUNTS.get(name, 1), 0
        if name.startswith("cross entropy"):
            counts = 0, 1  # a divergence of two heads has no formula for split classes
        if (log.fused, log.materialized.total()) != counts:
            lines.append(f"{name}: {log!r}")
    return lines


def list_differences(results: list[Any], expected: list[Any]) -> list[str]:
    """Returns a line for each result that differs by more than rounding."""
    lines = []
    for i, (v, w) in enumerate(zip(results, expected, strict=True)):
        if (v is None) != (w is None):
            lines.append(f"result {i} is {v}, not {w}")
        elif v is not None:
            v = gather(v)
            if type(v) is not Tensor or v.dtype != w.dtype or v.shape != w.shape:
                lines.append(f"result {i} is a {type(v)}, {v.dtype}, {v.shape}")
            elif not torch.allclose(v, w, rtol=1e-10, atol=1e-11, equal_nan=True):
                lines.append(f"result {i} is off by {(v - w).abs().max():.3g}")
    return lines


def penalise_gradient(value: Tensor, o: Any) -> Tensor:
    (gradient,) = torch.autograd.grad(value.square().sum(), o.x, create_graph=True)
    return value.sum() + gradient.square().sum()


def penalise_weight_gradient(value: Tensor, model: Any) -> Tensor:
    weight = model.lm_head.weight
    (gradient,) = torch.autograd.grad(value.square().sum(), weight, create_graph=True)
    total = gradient.square().sum()
    return value.sum() + (total.full_tensor() if isinstance(total, DTensor) else total)


def add_adapter(model: Any, o: Any) -> Tensor:
    """The loss of the sum of two heads, of which the second one's classes are not split."""
    features = model.body(o.x).tanh()
    adapter = nn.Linear(features.shape[-1], model.lm_head.out_features).to(F64)
    swap(adapter, head="")
    with torch.no_grad():
        adapter.weight.fill_(0.3)
        adapter.bias.fill_(0.1)
    return deferred_helpers.ce(model.lm_head(features) + adapter(features), o.y)


# Uses of logits: a result, and how many losses without logits, reductions and computed logits the
# report counts
USES: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "second order": (
        lambda m, o: penalise_gradient(deferred_helpers.ce(m(o.x), o.y, reduction="none"), o),
        (1, 0, 0),
    ),
    "second order of the mean": (
        lambda m, o: penalise_gradient(deferred_helpers.ce(m(o.x), o.y), o),
        (1, 0, 0),
    ),
    "read": (lambda m, o: m(o.x).sin(), (0, 0, 1)),
    "read, second order": (lambda m, o: penalise_gradient(m(o.x).sin().sum(-1), o), (0, 0, 1)),
    "read, second order of the weight": (
        lambda m, o: penalise_weight_gradient(m(o.x).sin().sum(-1), m),
        (0, 0, 1),
    ),
    "second order of the weight": (
        lambda m, o: penalise_weight_gradient(m(o.x).logsumexp(-1), m),
        (1, 0, 0),
    ),
    "changed in place": (
        lambda m, o: deferred_helpers.ce(m(o.x).mul_(o.row.cos()), o.y),
        (0, 0, 1),
    ),
    "read of one row": (lambda m, o: m(o.x[0, 0]).sin(), (0, 0, 1)),
    "sum of all": (lambda m, o: m(o.x).sum(), (0, 1, 0)),
    "sum over classes": (lambda m, o: m(o.x).sum(-1), (0, 1, 0)),
    "argmax": (lambda m, o: m(o.x).argmax(-1).to(F64), (0, 1, 0)),
    "largest": (lambda m, o: m(o.x).detach().max(-1)[0], (0, 1, 0)),
    "loss and argmax": (
        lambda m, o: (lambda z: deferred_helpers.ce(z, o.y) * z.argmax(-1).sum())(m(o.x)),
        (1, 1, 0),
    ),
    "in inference mode": (torch.inference_mode()(lambda m, o: m(o.x).logsumexp(-1)), (1, 0, 0)),
    "without gradients": (
        torch.no_grad()(lambda m, o: deferred_helpers.ce(m(o.x), o.y)),
        (1, 0, 0),
    ),
    "plus an adapter": (add_adapter, (0, 0, 1)),
}


@defer_all_logits()
def compare_uses(ranks: int, classes: int) -> list[str]:
    """As `compare_deferred_losses`, for `USES`, some of which compute the logits."""
    mesh, lines = make_mesh((ranks,)), []
    if not is_member(mesh):
        return []
    for name, (use, counts) in USES.items():
        plain, swapped, log = deferred_helpers.make_pair(classes=classes)
        parallelize_module(swapped.lm_head, mesh, VocabularyParallel())
        results = []
        for model in (swapped, plain):
            o = deferred_helpers.make_inputs(classes=classes)
            value = use(model, o)
            results.append([value])
            if value.requires_grad:
                leaves = [*model.parameters(), o.x, o.row]
                total = deferred_helpers.weigh(value)
                results[-1] += torch.autograd.grad(total, leaves, allow_unused=True)
        lines += [f"{name}: {line}" for line in list_differences(*results)]
        if (log.fused, log.reduced, log.materialized.total()) != counts:
            lines.append(f"{name}: {log!r}")
    return lines


HALF_LOSSES = ("shift", "smoothing", "gather", "gather of logits", "a learnt row", "cap")


@defer_all_logits()
def compare_half_precision(is_autocast: bool) -> list[str]:
    """Returns a line for each result in bfloat16 that is less exact than that of one process.

    The head is deferred in both, in bfloat16 or by autocast. An error is the root mean square.
    """
    mesh, lines = make_mesh((3,)), []
    if not is_member(mesh):
        return []
    dtype = torch.float32 if is_autocast else torch.bfloat16
    for name in HALF_LOSSES:
        results = []
        for is_split in (True, False):
            _, model, log = deferred_helpers.make_pair(dtype=dtype)
            if is_split:
                parallelize_module(model.lm_head, mesh, VocabularyParallel())
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                o = deferred_helpers.make_inputs(dtype)
                results.append(deferred_helpers.compute_results(model, LOSSES[name], o))
            if not log.fused or log.materialized:
                lines.append(f"{name}: {log!r}")
        exact_model = deferred_helpers.make_pair(dtype=dtype)[0].double()
        o = deferred_helpers.make_inputs(dtype, exact=True)
        exact = deferred_helpers.compute_results(exact_model, LOSSES[name], o)
        for i, (v, w, truth) in enumerate(zip(*results, exact, strict=True)):
            if truth is None:
                continue
            v = gather(v)
            error, allowed = ((u.double() - truth).square().mean().sqrt() for u in (v, w))
            if v.dtype != w.dtype or not error <= 1.05 * allowed + 1e-6 * truth.abs().max():
                lines.append(f"{name}: result {i} is off by {error:.3g}, not {allowed:.3g}")
    return lines


@defer_all_logits()
def record_collectives() -> list[list[Any]]:
    """Returns the collectives of a step of the fused head, and of one of deferred logits."""
    mesh, steps = make_mesh((3,)), []
    if not is_member(mesh):
        return []
    inputs = deferred_helpers.make_inputs(tokens=50)
    x, y = inputs.fixed_x.flatten(0, 1), inputs.y.flatten()
    for is_deferred in (False, True):
        _, model, _ = deferred_helpers.make_pair(bias=False)
        head = model.lm_head
        parallelize_module(head, mesh, VocabularyParallel())
        features = x.clone().requires_grad_()
        with limit_blocks(), CollectiveRecorder() as recorder:
            if is_deferred:
                loss = F.cross_entropy(head(features), y)
            else:
                split_features = DTensor.from_local(features, mesh, [Replicate()], run_check=False)
                loss = functional.linear_cross_entropy(split_features, head.weight, y)
            loss.backward()
        steps.append(recorder.events)
    return steps


@defer_all_logits()
def compare_split_linear(axis: int | None) -> list[str]:
    """Compares logits and gradients of a split Linear: plain, swapped, and swapped and restored.

    Each rank has some tokens, if `axis` is that of the tokens, or all of them, if it is None.
    """
    mesh, lines = make_mesh((3,)), []
    if not is_member(mesh):
        return []
    layout = Replicate() if axis is None else Shard(axis)
    torch.manual_seed(4)
    x, y = torch.randn(6, 9, 4, dtype=F64), torch.randint(7, (6, 9))
    for kind in ("plain", "swapped", "restored"):
        linear = nn.Linear(4, 7, dtype=F64)
        split_linear = copy.deepcopy(linear)
        parallelize_module(split_linear, mesh, VocabularyParallel(input_layout=layout))
        log = None if kind == "plain" else swap(split_linear, head="").heads[""]
        if kind == "restored":
            unswap(split_linear)
        local_x = distribute_tensor(x, mesh, [layout], src_data_rank=None).to_local().clone()
        results = []
        for model, input in ((split_linear, local_x), (linear, x.clone())):
            input.requires_grad_()
            logits = model(input=input) if kind == "plain" else model(input)
            loss = deferred_helpers.ce(logits, y)
            leaves = [input, *model.parameters()]
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(gradients[0].square().sum(), leaves)
            results.append([loss, *gradients, *second, logits + 0])
        for i in (1, 4):  # the gradients of the features, for the rank's tokens
            gradient = DTensor.from_local(results[0][i], mesh, [layout], run_check=False)
            results[0][i] = gradient.full_tensor()
        lines += [f"{kind}: {line}" for line in list_differences(*results)]
        if (log.fused if log else 0) != (kind == "swapped"):
            lines.append(f"{kind}: {log!r}")
    return lines


# Training steps of a wrapped model

BF16_POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard_body(model: Any, mesh: DeviceMesh, **options: Any) -> None:
    for layer in model.body:
        fully_shard(layer, mesh=mesh["data"], **options)


def shard_with_root(model: Any, mesh: DeviceMesh, reshard: bool | None = None, **options: Any):
    shard_body(model, mesh, **options)
    fully_shard(model, mesh=mesh["data"], reshard_after_forward=reshard, **options)


def shard_head_alone(model: Any, mesh: DeviceMesh, reshard: bool | None = None, **options: Any):
    fully_shard(model.lm_head, mesh=mesh["data"], reshard_after_forward=reshard, **options)
    shard_with_root(model, mesh, **options)


shard_kept_head_alone = functools.partial(shard_head_alone, reshard=False)


def shard_head_in_group(model: Any, mesh: DeviceMesh, **options: Any) -> None:
    group = [model.body[1], model.lm_head]
    fully_shard(group, mesh=mesh["data"], reshard_after_forward=False, **options)
    fully_shard(model.body[0], mesh=mesh["data"], **options)
    fully_shard(model, mesh=mesh["data"], **options)


def split_head(model: Any, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh["classes"], {"lm_head": VocabularyParallel()})


def split_tied_head(model: Any, mesh: DeviceMesh) -> None:
    """`parallelize_module` gives each module a parameter of its own."""
    plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "lm_head": VocabularyParallel()}
    parallelize_module(model, mesh["classes"], plan)
    model.lm_head.weight = model.embed.weight


def split_by_columns(model: Any, mesh: DeviceMesh) -> None:
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, mesh["classes"], plan)


def shard_and_split(shard: Any) -> Any:
    def wrap(model: Any, mesh: DeviceMesh, **options: Any) -> None:
        split_head(model, mesh)
        shard(model, mesh, **options)

    return wrap


def wrap_with_ddp(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    return DistributedDataParallel(model, process_group=mesh.get_group("data"), **options)


# The number of ranks that split the classes, and the function that wraps a model
WRAPPERS: dict[str, tuple[int, Any]] = {
    "ddp": (1, wrap_with_ddp),
    "ddp, unused": (1, functools.partial(wrap_with_ddp, find_unused_parameters=True)),
    "ddp, static": (1, functools.partial(wrap_with_ddp, static_graph=True)),
    "root": (1, shard_with_root),
    "root, freed": (1, functools.partial(shard_with_root, reshard=True)),
    "head alone": (1, shard_head_alone),
    "head alone, kept": (1, shard_kept_head_alone),
    "head in a group": (1, shard_head_in_group),
    "classes": (4, split_head),
    "tied classes": (4, split_tied_head),
    "classes by ColwiseParallel": (4, split_by_columns),
    "root x classes": (2, shard_and_split(shard_with_root)),
    "head alone x classes": (2, shard_and_split(shard_kept_head_alone)),
}


def compute_policy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of log-probabilities, with an entropy bonus."""
    l = logits[:, :-1].log_softmax(-1)
    log_probs = l.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    entropy = -(l.exp() * l).sum(-1)
    return (log_probs.exp() - 0.1 * entropy).mean()


def compute_two_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted_loss(logits, labels) + 0.1 * logits.logsumexp(-1).square().mean()


@functools.cache
def make_teacher() -> Any:
    """A swapped model that all ranks have in full."""
    teacher = make_lm(hidden=16)
    swap(teacher, head="lm_head")
    return teacher.requires_grad_(False)


def compute_divergence(logits: Tensor, ids: Tensor) -> Tensor:
    """The divergence from a teacher's head."""
    log_probs = (z.log_softmax(-1) for z in (logits, make_teacher()(ids)))
    return F.kl_div(*log_probs, reduction="batchmean", log_target=True)


LOSS_OF = {
    "outside": lambda model, ids, labels: shifted_loss(model(ids), labels),
    "inside": lambda model, ids, labels: model(ids, labels)[0],
    "policy": lambda model, ids, labels: compute_policy_loss(model(ids), labels),
    "two losses": lambda model, ids, labels: compute_two_losses(model(ids), labels),
    "divergence": lambda model, ids, labels: compute_divergence(model(ids), ids),
    "read": lambda model, ids, labels: model(ids).sin().mean(),
    "sum": lambda model, ids, labels: F.cross_entropy(
        model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    ),
}


def make_model(features: tuple[str, ...] = ()) -> Any:
    model: Any = make_lm(bias="tied" not in features, has_unused_layer="unused" in features)
    if "tied" in features:
        model.lm_head.weight = model.embed.weight
    for use_reentrant in (True, False):
        if f"checkpoint {use_reentrant}" in features:
            for layer in model.body:
                run = functools.partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
                layer.forward = run
    if "frozen body" in features:
        model.embed.requires_grad_(False)
        model.body.requires_grad_(False)
    return model


def make_data_mesh(ranks_of_classes: int) -> DeviceMesh:
    """A mesh of all ranks. Those along its dimension "data" have different data."""
    shape = dist.get_world_size() // ranks_of_classes, ranks_of_classes
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "classes"))


def make_part(part: int) -> list[tuple[Tensor, Tensor]]:
    """Two micro-batches of the data; each has another number of tokens that are not ignored."""
    batches = []
    for i in range(2):
        ids, labels = make_batch(seed=10 + 2 * part + i)
        labels[0, : 5 * part + 4 * i] = -100
        batches.append((ids, labels))
    return batches


class Job:
    """A model under a wrapper, beside the same model in one process with all ranks' data.

    `swap` changes the wrapped model "before" or "after" the wrapper, or "never".
    """

    def __init__(self, wrapper: str, loss: str, features: tuple[str, ...], when: str):
        self.loss, self.features, self.plain = loss, features, make_model(features)
        ranks_of_classes, wrap = WRAPPERS[wrapper]
        self.mesh = make_data_mesh(ranks_of_classes)
        model, options = make_model(features), {}
        if "bfloat16" in features:
            model, options = model.float(), {"mp_policy": BF16_POLICY}
        self.report = swap(model, head="lm_head") if when == "before" else Report()
        self.model = wrap(model, self.mesh, **options) or model
        if when == "after":
            self.report = swap(self.model, head=model.lm_head)
        if "compiled" in features:
            warnings.simplefilter("ignore")
            self.model.compile(backend="eager")
        # one part of the data for each rank along the mesh dimension "data"
        count = 2 if "accumulate" in features else 1
        self.parts = [make_part(i)[:count] for i in range(self.mesh.size(0))]
        self.batches = self.parts[self.mesh.get_local_rank("data")]

    def compute_gradients(self) -> None:
        """Computes the wrapped model's gradients, which only the last micro-batch communicates."""
        divisor: Any = len(self.batches)
        if self.loss == "sum":
            targets = [labels[:, 1:] for _, labels in self.batches]
            divisor = count_tokens_per_rank(targets, group=self.mesh.get_group("data"))

        def compute_loss(batch: Any) -> Tensor:
            return LOSS_OF[self.loss](self.model, *batch) / divisor

        are_losses_first = "losses first" in self.features
        losses = [compute_loss(batch) for batch in self.batches] if are_losses_first else []
        for i, batch in enumerate(self.batches):
            is_last = i == len(self.batches) - 1
            with contextlib.ExitStack() as stack:
                if isinstance(self.model, DistributedDataParallel) and not is_last:
                    stack.enter_context(self.model.no_sync())
                elif isinstance(self.model, FSDPModule):
                    self.model.set_requires_gradient_sync(is_last)
                    self.model.set_reshard_after_backward(is_last or "kept" not in self.features)
                (losses[i] if are_losses_first else compute_loss(batch)).backward()

    def compute_true_gradients(self) -> None:
        """Computes the plain model's gradients, of the data of all ranks."""
        batches = [batch for part in self.parts for batch in part]
        divisor: Any = len(batches)
        if "all tokens" in self.features:
            divisor = sum((labels[:, 1:] != -100).sum() for _, labels in batches)
        loss_of = LOSS_OF["sum" if "all tokens" in self.features else self.loss]
        sum(loss_of(self.plain, *batch) / divisor for batch in batches).backward()

    def compare_step(self) -> float:
        """Trains both models for a step; returns the largest error of a gradient's entry.

        It is relative to the largest entry of all gradients.
        """
        self.compute_gradients()
        self.compute_true_gradients()
        errors, scales = [], []
        pairs = zip(self.model.parameters(), self.plain.parameters(), strict=True)
        for p, plain_p in pairs:
            assert (p.grad is None) == (plain_p.grad is None)
            if plain_p.grad is not None:
                errors.append((gather(p.grad).double() - plain_p.grad).abs().max().item())
                scales.append(plain_p.grad.abs().max().item())
        for model in (self.model, self.plain):  # the optimizer has the parameters that are sharded
            torch.optim.SGD(model.parameters(), lr=0.3, foreach=False).step()
            model.zero_grad()
        return max(errors) / max(scales)

    def compare_evaluation(self) -> float:
        """Returns the relative error of the loss under `no_grad`."""
        with torch.no_grad():
            losses = [LOSS_OF["outside"](m, *self.batches[0]) for m in (self.model, self.plain)]
        return abs((losses[0] / losses[1]).item() - 1)


@defer_all_logits()
def train(
    wrapper: str, loss: str = "outside", features: tuple[str, ...] = (), when: str = "before"
) -> dict[str, Any]:
    """Two steps and an evaluation; returns the largest error and what the report counts."""
    if when == "never":  # PyTorch's Linear returns views
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    job = Job(wrapper, loss, features, when)
    errors = [job.compare_step(), job.compare_step(), job.compare_evaluation()]
    results: dict[str, Any] = {"error": max(errors), "report": repr(job.report)}
    for log in job.report.heads.values():
        results["fused"] = log.fused
        results["computed"] = [reason.split(" at ")[0] for reason in log.materialized]
    unswap(job.model)
    types = {cls for module in job.model.modules() for cls in type(module).__mro__}
    results["types left"] = [str(cls) for cls in types if "torch_nnmath" in cls.__module__]
    return results


# Logits whose weight has been freed or has changed


@defer_all_logits()
def collect_logit_errors() -> dict[str, str]:
    """Returns the messages of errors, by the use of logits that cannot be computed any more."""
    messages = {}

    def run(name: str, job: Job, function: Any) -> None:
        try:
            function(job.model, *job.batches[0])
            messages[name] = "no error"
        except RuntimeError as error:
            messages[name] = str(error)

    def train_step(model: Any, loss: Tensor) -> None:
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()

    def read_after_backward(model: Any, ids: Tensor, labels: Tensor) -> None:
        loss, logits = model(ids, labels)
        loss.backward()
        logits.sum()

    def read_after_next_forward(model: Any, ids: Tensor, labels: Tensor) -> None:
        """The weight is in memory again, at the same version, with other values."""
        with torch.no_grad():
            logits = model(ids)
        train_step(model, model(ids, labels)[0])
        model(ids)
        logits.sum()

    def read_detached_after_step(model: Any, ids: Tensor, labels: Tensor) -> None:
        logits = model(ids)
        kept = logits.detach()
        train_step(model, shifted_loss(logits, labels))
        messages["the step itself"] = "no error"
        kept.sum()

    def change_own_classes(model: Any, ids: Tensor, labels: Tensor) -> None:
        logits = model(ids)
        with torch.no_grad():
            model.lm_head.weight.to_local().mul_(2)
        shifted_loss(logits, labels)

    outside = "root, freed", "outside", (), "before"
    run("loss outside", Job(*outside), lambda model, *batch: LOSS_OF["outside"](model, *batch))
    inside = "root", "inside", (), "before"
    run("read after backward", Job(*inside), read_after_backward)
    run("read after the next forward", Job(*inside), read_after_next_forward)
    run("detached, read after a step", Job(*inside), read_detached_after_step)
    run("split, read after a step", Job("classes", *inside[1:]), read_after_next_forward)
    run("split, changed", Job("classes", *inside[1:]), change_own_classes)
    return messages
