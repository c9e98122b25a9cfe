"""`swap` under DDP, FSDP2 and tensor parallelism, in two processes."""

import datetime
import json
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from swapped_models import (
    IGNORED_WARNINGS,
    Pair,
    assert_agree,
    defer_small_logits,
    make_batch,
    make_lm,
    run_step,
    shifted_loss,
)
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import parallel as tensor_parallel
from torch.nn.parallel import DistributedDataParallel

pytestmark = IGNORED_WARNINGS


class Case(NamedTuple):
    kind: str
    options: dict
    loss: str  # inside the model or outside
    outcome: str  # "fused" or "computed", "freed" or "left"
    when: tuple[str, ...] = ("before", "after")  # swap, relative to the wrapper


CASES = [
    Case("ddp", {}, "inside", "fused"),
    Case("ddp", {}, "outside", "fused"),
    # these traverse the graph of the outputs, loss and logits
    Case("ddp", {"find_unused_parameters": True}, "inside", "fused"),
    Case("ddp", {"find_unused_parameters": True}, "outside", "computed"),
    Case("ddp", {"static_graph": True}, "outside", "computed"),
    Case("fsdp", {}, "inside", "fused"),
    Case("fsdp", {"reshard_after_forward": True}, "inside", "fused"),
    Case("fsdp", {"reshard_after_forward": False}, "inside", "fused"),
    # FSDP has a hook on the outputs
    Case("fsdp", {}, "outside", "computed"),
    Case("fsdp", {"reshard_after_forward": False}, "outside", "computed"),
    # the weight is freed when logits are needed
    Case("fsdp", {"reshard_after_forward": True}, "outside", "freed"),
    Case("fsdp", {}, "inside, then logits", "freed"),
    # the head is wrapped too: it has hooks and a class of its own
    Case("fsdp, the head too", {}, "inside", "computed", ("before",)),
    Case("fsdp, the head too", {}, "inside", "left", ("after",)),
    Case("tensor parallel", {}, "inside", "computed"),  # the weight is a DTensor
]
CASES = [(case, when) for case in CASES for when in case.when]


def run_case(case, when, ids, labels):
    """Asserts equal gradients; returns the fused losses, the reasons and the modules left."""

    def change(model):
        if case.kind == "ddp":
            return DistributedDataParallel(model, **case.options)
        if case.kind == "tensor parallel":
            plan = {"lm_head": tensor_parallel.ColwiseParallel(output_layouts=Replicate())}
            mesh = dist.init_device_mesh("cpu", (2,))
            return tensor_parallel.parallelize_module(model, mesh, plan)
        for module in (model.body, *[model.lm_head] * case.kind.endswith("too")):
            fsdp.fully_shard(module)
        return fsdp.fully_shard(model, **case.options)

    def loss_of(model):
        if case.loss == "outside":
            return shifted_loss(model(ids), labels)
        loss, loss_of.logits = model(ids, labels)
        return loss

    def gather_gradients(step):
        gradients = {name.removeprefix("module."): g for name, g in step.gradients.items()}
        return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}

    pair = Pair(
        make_lm(has_unused_layer=case.options.get("find_unused_parameters", False)), change, when
    )
    truth, step = run_step(pair.plain, loss_of), run_step(pair.swapped, loss_of)
    assert_agree({"loss": step.loss}, {"loss": truth.loss})
    assert_agree(gather_gradients(step), gather_gradients(truth))
    if case.loss == "inside, then logits":
        loss_of.logits.sum()
    return pair.fused, pair.reasons, pair.report.left


def run_process(rank, path):
    torch.set_num_threads(1)
    defer_small_logits()
    warnings.simplefilter("ignore")
    store, limit = f"file://{path}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    results = []
    for case, when in CASES:
        part = 0 if case.kind == "tensor parallel" else rank  # of the data
        ids, labels = make_batch(seed=10 + part)
        labels[0, : 9 * part] = -100  # so that each has another number of tokens
        try:
            results.append(run_case(case, when, ids, labels))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
            if case.outcome != "freed":  # else the other process would wait for ever
                results += [f"not run after {results[-1]}"] * (len(CASES) - len(results))
                break
    own, other = (Path(path, str(r)) for r in (rank, 1 - rank))
    own.write_text(json.dumps(results))
    while not other.exists():  # `spawn` ends this process if the other one fails
        time.sleep(0.01)
    os._exit(0)  # without C++ destructors, which abort now and then while a thread still runs


@pytest.fixture(scope="module")
def process_results(tmp_path_factory):
    """Lists, for each of two processes, its results in every case."""
    path = str(tmp_path_factory.mktemp("processes"))
    torch.multiprocessing.spawn(run_process, (path,), 2)
    return [json.loads(Path(path, str(rank)).read_text()) for rank in range(2)]


def describe(case):
    *words, _ = case[0]
    return " ".join([*map(str, words), case[1]])


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("i", range(len(CASES)), ids=[*map(describe, CASES)])
def test_gradients_agree_in_two_processes(process_results, i):
    """Where FSDP has freed the weight that logits need, an error says what to do."""
    outcome = CASES[i][0].outcome
    for results in process_results:
        if outcome == "freed":
            assert results[i].startswith("RuntimeError: the logits of head")
            assert "as FSDP does after the forward" in results[i]
            assert "reshard_after_forward=False" in results[i]
            continue
        assert isinstance(results[i], list), results[i]
        fused, reasons, left = results[i]
        assert fused == ("fused" in outcome)
        assert bool(reasons) == ("computed" in outcome), reasons
        is_split = "tensor parallel" in CASES[i][0].kind
        assert [*reasons] == ["by a weight that is a DTensor"] or not is_split
        assert [*left] == ["lm_head"] * (outcome == "left")
