"""Trains in two processes under DDP and FSDP2; each writes its results as JSON into a folder.

`test_lightning_package.py` runs it. Both processes are forked from one that has imported Lightning,
which takes longer than all that they do.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_models import Classifier, is_marked, make_loader, make_trainer, make_wrong_body
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

from torch_nnmath import nn
from torch_nnmath.lightning import GradientCheck, GradientError, PeakMemory, SwapFormulas
from torch_nnmath.parallel import VocabularyParallel


class Plain(Classifier):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(body=torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh()))
        self.register_buffer("unused", torch.zeros(1))


class NetWithLoss(torch.nn.Sequential):
    """Computes the loss inside the sharded module, whose outputs FSDP hooks."""

    def forward(self, x, t):
        return F.cross_entropy(super().forward(x), t)


class Sharded(Plain):
    """A model whose `configure_model` wraps its parts.

    `kind` says where the loss is, how the head is wrapped, or that its classes are split.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        net_class = NetWithLoss if kind == "inside" else torch.nn.Sequential
        self.net = net_class(*self.body, self.head)
        del self.body, self.head

    def configure_model(self):
        if self.kind == "not wrapped":
            return
        if self.kind == "classes":
            style = VocabularyParallel()
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"2": style})
            return
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        if "head alone" in self.kind:
            fully_shard(self.net[2], mesh=mesh, reshard_after_forward="freed" in self.kind)
        fully_shard(self.net, mesh=mesh)

    def loss(self, batch):
        self.class_names = [type(m).__name__ for m in self.net]
        self.is_swapped = all(isinstance(m, nn.Linear | nn.Tanh) for m in self.net)
        x, t = batch
        return self.net(x, t) if self.kind == "inside" else F.cross_entropy(self.net(x), t)


def fit(model, *callbacks, strategy="ddp", **options):
    trainer = make_trainer(*callbacks, devices=2, strategy=strategy, **options)
    trainer.fit(model, make_loader())
    return trainer


def full_parameters(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def max_difference(a, b):
    pairs = zip(full_parameters(a), full_parameters(b), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def train_with_ddp(plain, folder):
    model = Plain()
    swap, check, peak = SwapFormulas(head="head"), GradientCheck(1), PeakMemory(1)
    logger = CSVLogger(folder, "", "")
    fit(model, swap, check, peak, logger=logger, log_every_n_steps=1)
    return {
        "head types": [str(cls) for cls in model.head_types],
        "fused": swap.report.heads["head"].fused,
        "is marked": is_marked(model),
        "errors": check.errors,
        "peaks": peak.peaks,
        "difference to plain": max_difference(plain, model),
        "difference to start": max_difference(plain, Plain()),
    }


def train_with_wrong_gradient_in_one_process(rank):
    model = Plain()
    if rank == 1:
        model.body = make_wrong_body()
    try:
        fit(model, SwapFormulas(head="head"), GradientCheck(1, parameters=4, entries=16))
        message = ""
    except GradientError as error:
        message = str(error)
    return {"message": message, "is marked": is_marked(model)}


def make_strategy(kind):
    has_all_data = kind in ("classes", "not wrapped")
    sizes = (1, 2) if has_all_data else (2, 1)
    return ModelParallelStrategy(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])


def train_sharded(plain, kind):
    model, swap = Sharded(kind), SwapFormulas(head="net.2")
    fit(model, swap, PeakMemory(1), strategy=make_strategy(kind))
    log = swap.report.heads["net.2"]
    return {
        "class names": model.class_names,
        "is swapped": model.is_swapped,
        "fused": log.fused,
        "computed": [*log.materialized],
        "difference to plain": max_difference(plain, model),
        "class names after": [type(m).__name__ for m in model.net.modules()],
        "is swapped after": any(isinstance(m, nn.Linear | nn.Tanh) for m in model.modules()),
        "is marked": is_marked(model),
    }


def check_with_fsdp():
    try:
        fit(Sharded("inside"), GradientCheck(1), strategy=make_strategy("inside"))
    except ValueError as error:
        return str(error)
    return ""


def run_rank(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that the processes exist
    torch.set_num_threads(1)
    plain = Plain()
    assert fit(plain).global_rank == rank
    results = {
        "ddp": train_with_ddp(plain, folder),
        "wrong": train_with_wrong_gradient_in_one_process(rank),
        "fsdp check": check_with_fsdp(),
    }
    for kind in ("inside", "outside", "head alone", "head alone, freed"):
        results[kind] = train_sharded(plain, kind)
    plain_with_all_data = Sharded("not wrapped")
    fit(plain_with_all_data, strategy=make_strategy("not wrapped"))
    results["classes"] = train_sharded(plain_with_all_data, "classes")
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    start_method = "fork" if sys.platform == "linux" else "spawn"
    args = find_free_network_port(), Path(sys.argv[1])
    torch.multiprocessing.start_processes(run_rank, args, nprocs=2, start_method=start_method)
