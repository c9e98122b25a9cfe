"""The head of a swapped model: right under everything, and fused where nothing needs its logits.

The truth is the same model unswapped, in float64. What users write is in the tables: ways to a
loss that are fused (no logits are made), ways that need the logits, those who watch them, and what
reads their memory. A search composes the steps at random, and PyTorch's own samples put the
deferred logits where every operator's first argument is.
"""

import copy
import ctypes
import gc
import io
import itertools
import math
import pickle
import re
import warnings
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pytorch_samples import database
from tolerance import distance, roundings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import torch_nnmath
from torch_nnmath import functional as ours
from torch_nnmath import kernels, swap
from torch_nnmath.deferred import MaterializedLogits
from torch_nnmath.kernels import blocked

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # Dynamo's
    pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits"),
    pytest.mark.filterwarnings("ignore:size_average and reduce args"),
]

F64, BF16 = torch.float64, torch.bfloat16
B, T, D, C = 2, 9, 3, 301  # examples, tokens, features, classes: no weight has as many as logits
IGNORED = -100
HERE = "test_deferred.py"


def cases(table, marks=()):
    """The table's names (or tuples of names), some of them marked."""
    names, marks = [*table], dict(marks)
    assert set(marks) <= set(names)
    rows = [(name, name if isinstance(name, tuple) else (name,)) for name in names]
    return [pytest.param(*row, marks=marks.get(name, ()), id="-".join(row)) for name, row in rows]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Model(nn.Module):
    def __init__(self, bias=True, features=D, classes=C):
        super().__init__()
        self.body = nn.Linear(D, features)
        self.lm_head = nn.Linear(features, classes, bias=bias)

    def forward(self, x):
        return self.lm_head(self.body(x).tanh())


def pair(bias=True, dtype=F64, **sizes):
    """A model, its swapped like, and the account of the latter's head. Logits are some ±10."""
    torch.manual_seed(0)
    plain = Model(bias, **sizes)
    nn.init.normal_(plain.lm_head.weight, std=4)
    plain = plain.to(dtype)
    swapped = copy.deepcopy(plain)
    return plain, swapped, swap(swapped).heads["lm_head"]


def numbers(dtype=F64, examples=B, tokens=T, classes=C, exact=False):
    """What a loss may be given beside logits, with gradient where its name is in `learnt`.

    If `exact`, what was rounded to the type is float64.
    """
    g = torch.Generator().manual_seed(1)
    o = SimpleNamespace(learnt=["x", "row", "wide_row", "s", "narrow_s", "t", "narrow_t", "probs"])
    narrow, wide = (F64, F64) if dtype == F64 else (BF16, torch.float32)
    types = {"wide_row": wide, "wide_t": wide, "narrow_t": narrow, "narrow_s": narrow}

    def randn(name, *shape, of=lambda x: x):
        for its in (name, "fixed_" + name):  # fixed: without gradient
            value = of(torch.randn(shape, generator=g, dtype=F64)).to(types.get(name, dtype))
            value = value.to(F64 if exact else value.dtype)
            setattr(o, its, value.requires_grad_(its in o.learnt))

    def positive(x):
        return x.abs() + 0.5

    randn("x", examples, tokens, D)
    randn("row", classes)
    randn("wide_row", classes, of=lambda x: 60 + x)
    for name in ("s", "narrow_s"):
        randn(name, of=positive)
    for name in ("t", "wide_t", "narrow_t"):
        randn(name, examples, tokens, 1, of=positive)
    randn("probs", examples, tokens, classes, of=lambda x: x.softmax(-1))
    randn("weight", classes, of=positive)
    o.y = torch.randint(classes, (examples, tokens), generator=g)
    o.y[0, :3] = IGNORED
    o.all_y = o.y.clamp(min=0)
    return o


def results(model, way, o=None, backward=False):
    """What the way makes of logits, and the gradients of it in everything that has one."""
    o = o or numbers()
    out = way(model(o.x), o)
    leaves = [*model.parameters(), *(getattr(o, name) for name in o.learnt)]
    factors = torch.linspace(1, 2, out.numel()).to(out.dtype).view(out.shape)
    total = (out * factors).sum()
    if backward:
        for leaf in leaves:
            leaf.grad = None
        total.backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]
    return [out.detach(), *torch.autograd.grad(total, leaves, allow_unused=True)]


def agree(found, truth, **tolerance):
    for f, t in zip(found, truth, strict=True):
        assert (f is None) == (t is None)
        if t is not None:
            assert type(f) in (torch.Tensor, nn.Parameter)
            options = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": True} | tolerance
            torch.testing.assert_close(f.detach(), t.detach(), **options)


class Watch(TorchDispatchMode):
    """What operators make tensors of tokens x classes, and how often the head's kernel runs."""

    def __init__(self):
        super().__init__()
        self.made, self.heads = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {*types} - {torch.Tensor, nn.Parameter}:  # what a subclass does of it is seen in turn
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        self.heads += func is torch.ops.torch_nnmath.head.default
        for x in tree_leaves(out):
            is_tensor = type(x) is torch.Tensor and not x.is_meta
            if is_tensor and x.numel() > D * C and x.numel() % C == 0:
                self.made.append((str(func), tuple(x.shape)))
        return out


def ce(z, y, **options):
    return F.cross_entropy(z.flatten(0, -2), y.flatten(), **options)


# Losses that do without logits


def in_chunks(z, o):
    pairs = zip(z.chunk(3, 1), o.y.chunk(3, 1), strict=True)
    return sum(ce(v, y, reduction="sum") for v, y in pairs) / (o.y != IGNORED).sum()


def of_module(loss):
    """By a module of a class of ours, which has the options as attributes."""
    return lambda z, o: loss(o)(z.flatten(0, 1), o.y.flatten())


def with_stats(z, o):
    options = {"softcap": 5.0, "z_loss": 0.01, "base": 2.0, "reduction": "none"}
    loss, stats = ours.cross_entropy(z.mT, o.y, **options, return_stats=True)
    assert not any(v.requires_grad for v in stats)
    return torch.stack([loss, *(v.to(loss.dtype) for v in stats)])


def with_z_loss(z, o):
    return ce(z, o.y) + 1e-2 * z.logsumexp(-1).square().mean()


def log_probs_of_policy(z, o):
    """As trainers by reinforcement write it, an example at a time."""
    chosen = torch.gather(z, dim=-1, index=o.all_y.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(v, dim=-1) for v in z])


FUSED: dict[str, Any] = {
    # where the classes are
    "view": lambda z, o: F.cross_entropy(z.view(-1, C), o.y.view(-1)),
    "reshape": lambda z, o: F.cross_entropy(z.reshape(-1, C), o.y.reshape(-1)),
    "flatten": lambda z, o: F.cross_entropy(z.flatten(0, 1), o.y.flatten()),
    "shift": lambda z, o: F.cross_entropy(z[:, :-1].reshape(-1, C), o.y[:, 1:].reshape(-1)),
    "shift, contiguous": lambda z, o: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, C), o.y[..., 1:].contiguous().view(-1)
    ),
    "shift, masked": lambda z, o: F.cross_entropy(
        z[:, :-1][o.y[:, 1:] != IGNORED], o.y[:, 1:][o.y[:, 1:] != IGNORED]
    ),
    "padded labels": lambda z, o: ce(z, F.pad(o.y, (0, 1), value=IGNORED)[..., 1:].contiguous()),
    "transpose": lambda z, o: F.cross_entropy(z.transpose(1, 2), o.y),
    "permute": lambda z, o: nn.CrossEntropyLoss(reduction="sum")(z.permute(0, 2, 1), o.y),
    "movedim": lambda z, o: F.cross_entropy(z.movedim(-1, 1), o.y),
    "mT": lambda z, o: nn.CrossEntropyLoss()(z.mT, o.y),
    "swapaxes, contiguous": lambda z, o: F.cross_entropy(z.swapaxes(-1, -2).contiguous(), o.y),
    "t": lambda z, o: F.cross_entropy(z[1].t().t(), o.y[1]),
    "transposed, then flattened": lambda z, o: ce(z.transpose(0, 1), o.y.T),
    "K dimensions": lambda z, o: F.cross_entropy(
        z.view(B, 3, 3, C).movedim(-1, 1), o.y.view(B, 3, 3), weight=o.weight, label_smoothing=0.1
    ),
    "unflatten": lambda z, o: F.cross_entropy(
        z.unflatten(1, (3, 3)).permute(0, 3, 1, 2), o.y.unflatten(1, (3, 3))
    ),
    "unsqueeze, squeeze": lambda z, o: ce(z.unsqueeze(1).squeeze(1)[:, None].squeeze((1, 3)), o.y),
    "squeeze of one example": lambda z, o: F.cross_entropy(z[:1].squeeze(0), o.y[0]),
    "squeeze of all": lambda z, o: F.cross_entropy(z[1:].squeeze(), o.y[1]),
    "unsqueezed classes": lambda z, o: F.cross_entropy(z.flatten(0, 1)[..., None], o.y.view(-1, 1)),
    # which rows
    "select": lambda z, o: F.cross_entropy(z[:, -1], o.y[:, -1]),
    "one row": lambda z, o: F.cross_entropy(z[1, -1], o.y[1, -1]),
    "mask": lambda z, o: F.cross_entropy(z[o.y != IGNORED], o.y[o.y != IGNORED]),
    "mask of flat logits": lambda z, o: F.cross_entropy(
        z.view(-1, C)[(o.y > 9).view(-1)], o.y[o.y > 9]
    ),
    "index": lambda z, o: ce(z[:, torch.tensor([1, 2, 5, 1])], o.y[:, [1, 2, 5, 1]]),
    "index, by a list": lambda z, o: ce(z[[1, 0]], o.y[[1, 0]]),
    "index of a part": lambda z, o: ce(z[1:][:, [1, 2]], o.y[1:, [1, 2]]),
    "mask of one example": lambda z, o: F.cross_entropy(z[1][o.y[1] > 9], o.y[1][o.y[1] > 9]),
    "index of pairs": lambda z, o: F.cross_entropy(
        z[torch.arange(B), torch.tensor([8, 4])], o.y[[0, 1], [8, 4]]
    ),
    "index, after the classes": lambda z, o: F.cross_entropy(
        z.mT.contiguous()[..., [4, 3]], o.y[:, [4, 3]]
    ),
    "index_select": lambda z, o: ce(z.index_select(1, torch.tensor([7, 3])), o.y[:, [7, 3]]),
    "every other": lambda z, o: ce(z[:, ::2], o.y[:, ::2]),
    "narrow": lambda z, o: ce(z.narrow(1, 2, 4), o.y[:, 2:6]),
    "iteration": lambda z, o: sum(F.cross_entropy(v, y) for v, y in zip(z, o.y, strict=True)),
    "unbind": lambda z, o: F.cross_entropy(z.unbind(1)[5], o.y[:, 5]),
    "split": lambda z, o: sum(
        ce(v, y) for v, y in zip(z.split(5, 1), o.y.split(5, 1), strict=True)
    ),
    "split by sizes": lambda z, o: ce(z.split([4, 5], 1)[1], o.y[:, 4:]),
    "chunk": in_chunks,
    "two losses": lambda z, o: ce(z, o.y) + 0.3 * ce(z[:, :-2], o.y[:, 2:]),
    # what is done to the numbers
    "clone": lambda z, o: ce(z.clone(), o.y),
    "the same type": lambda z, o: ce(z.double().to(F64).to("cpu").contiguous(), o.y),
    "a copy of the same type": lambda z, o: ce(z.to(F64, copy=True), o.y),
    "times a number": lambda z, o: ce(z * 0.3, o.y),
    "number times": lambda z, o: ce(-2 * z, o.y),
    "over a number": lambda z, o: ce(z / 3, o.y),
    "times a tensor": lambda z, o: ce(z * torch.tensor(0.3, dtype=F64), o.y),
    "over a tensor": lambda z, o: ce(z / torch.tensor(3), o.y),
    "times a learnt number": lambda z, o: ce(z * o.s, o.y),
    "over a learnt number": lambda z, o: ce(z / o.s, o.y),
    "times what is made of it": lambda z, o: ce(o.s.exp() * z, o.y),
    "several scales": lambda z, o: ce((z * o.s / 0.7 / o.s.square() * 3).neg(), o.y),
    "negated": lambda z, o: ce(-z, o.y),
    "cap": lambda z, o: ce(3 * torch.tanh(z / 3), o.y),
    "cap, in steps": lambda z, o: ce(z.div(30).mul(7).tanh().mul(5), o.y),
    "cap with factors": lambda z, o: ce(3 * torch.tanh(z * 0.2) / 0.7, o.y),
    "negative cap": lambda z, o: ce(-3 * (z / 3).tanh(), o.y),
    "cap of scaled logits": lambda z, o: ce(3 * torch.tanh(-z * o.s / 3), o.y),
    "cap of 1": lambda z, o: ce(z.tanh(), o.y),
    "capped, then shifted": lambda z, o: ce(5 * torch.tanh(z[:, :-1] / 5), o.y[:, 1:]),
    "a row": lambda z, o: ce(z + o.fixed_row, o.y),
    "row first": lambda z, o: ce(o.fixed_row[None, None] + z, o.y),
    "a learnt row": lambda z, o: ce(z + o.row, o.y),
    "two rows": lambda z, o: ce(z + o.row + o.fixed_row + 2 * o.row, o.y),
    "a row, then scaled": lambda z, o: ce((z + o.row) * 0.3, o.y),
    "a row, then capped": lambda z, o: ce(4 * torch.tanh((z + o.row) * o.s / 4), o.y),
    "a column": lambda z, o: F.cross_entropy(z.mT + o.row[:, None], o.y),
    # how the loss is called
    "by keywords": lambda z, o: F.cross_entropy(input=z.flatten(0, 1), target=o.y.flatten()),
    "none": lambda z, o: ce(z, o.y, reduction="none"),
    "sum": lambda z, o: ce(z, o.y, reduction="sum"),
    "class weights": lambda z, o: ce(z, o.y, weight=o.weight),
    "smoothing": lambda z, o: ce(z, o.y, label_smoothing=0.2, weight=o.weight, reduction="sum"),
    "all smoothing": lambda z, o: ce(z, o.y, label_smoothing=1.0),
    "ignore_index": lambda z, o: ce(z, o.all_y, ignore_index=0),
    "bytes": lambda z, o: ce(z, o.all_y.clamp(max=255).byte()),
    "legacy sum": lambda z, o: ce(z, o.y, size_average=False),
    "legacy none": lambda z, o: ce(z, o.y, reduce=False),
    "probabilities": lambda z, o: F.cross_entropy(z.flatten(0, 1), o.fixed_probs.flatten(0, 1)),
    "probabilities with everything": lambda z, o: F.cross_entropy(
        z.mT, o.fixed_probs.mT, o.weight, reduction="none", label_smoothing=0.2
    ),
    "learnt probabilities": lambda z, o: F.cross_entropy(z.mT, o.probs.mT),
    "module of PyTorch": lambda z, o: nn.CrossEntropyLoss(o.weight, label_smoothing=0.1)(z.mT, o.y),
    "module of ours": of_module(lambda o: torch_nnmath.nn.CrossEntropyLoss(o.weight, base=2)),
    "module of ours, capped": of_module(
        lambda o: torch_nnmath.nn.CrossEntropyLoss(softcap=4.0, logit_scale=o.s, z_loss=0.1)
    ),
    "function of ours": lambda z, o: ours.cross_entropy(
        z.mT, o.y, base=2, softcap=5.0, z_loss=1e-2, reduction="sum"
    ),
    "function of ours, scaled": lambda z, o: ours.cross_entropy(
        (z * 0.5).flatten(0, 1), o.y.flatten(), logit_scale=o.s, softcap=5.0, label_smoothing=0.1
    ),
    "function of ours, capped": lambda z, o: ours.cross_entropy(
        4 * torch.tanh(z.mT * o.s / 4), o.y, z_loss=1e-2, weight=o.weight
    ),
    "stats": with_stats,
    # by way of logarithms
    "nll_loss": lambda z, o: F.nll_loss(F.log_softmax(z, -1).flatten(0, 1), o.y.flatten()),
    "NLLLoss": lambda z, o: nn.NLLLoss(o.weight, reduction="none")(nn.LogSoftmax(1)(z.mT), o.y),
    "nll_loss of the capped": lambda z, o: F.nll_loss(
        F.log_softmax((2 * (z + o.row).tanh())[:, 1:].flatten(0, 1), dim=-1),
        o.y[:, 1:].flatten(),
    ),
    "gather": lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]).squeeze(-1),
    "negated gather": lambda z, o: (-z.log_softmax(-1)).gather(2, o.all_y[..., None]),
    "gather, by keywords": lambda z, o: torch.gather(
        input=-1 * z.mT.log_softmax(dim=1) / -1, dim=1, index=o.all_y[:, None]
    ),
    "gather of few": lambda z, o: (z[:, 2:] / o.s).log_softmax(-1).gather(-1, o.all_y[:, 2:, None]),
    "sum over classes": lambda z, o: z.log_softmax(-1).sum(-1),
    "negated sum": lambda z, o: (-torch.log_softmax(z, 2)).sum(dim=2, keepdim=True),
    "mean over classes": lambda z, o: torch.mean(F.log_softmax(z.mT, 1), dim=[1]),
    "sum, type": lambda z, o: torch.sum(z.log_softmax(-1), -1, dtype=F64),
    # a class's logits, and the sum of all exponentials
    "gather of logits": lambda z, o: z.gather(-1, o.all_y[..., None]).square(),
    "gather of capped logits": lambda z, o: (-2 * torch.tanh((z + o.row) * o.s)).mT.gather(
        1, o.all_y[:, None]
    ),
    "logsumexp": lambda z, o: z.logsumexp(-1),
    "logsumexp, function": lambda z, o: torch.logsumexp(z.mT, [1], keepdim=True),
    "logsumexp, special": lambda z, o: torch.special.logsumexp(z[:, 1:] + o.row, dim=2).sin(),
    "logsumexp of capped logits": lambda z, o: (3 * (z * o.s).tanh()).logsumexp(2),
    "logsumexp of negated logits": lambda z, o: (-z).logsumexp(-1),
    "z-loss of the user's": with_z_loss,
    "gather less logsumexp": lambda z, o: (
        z.gather(-1, o.all_y[..., None]) - z.logsumexp(-1, keepdim=True)
    ),
    "log-probabilities of a policy": log_probs_of_policy,
}
FUSED_WITHOUT_BIAS: dict[str, Any] = {
    "over temperatures": lambda z, o: ce(z / o.fixed_t, o.y),
    "times temperatures": lambda z, o: F.cross_entropy((z * o.fixed_t)[:, 1:].mT / 2, o.y[:, 1:]),
    "learnt temperatures": lambda z, o: ce(z / o.t, o.y),
    "times learnt temperatures": lambda z, o: F.cross_entropy(o.t.mT * z.mT, o.y),
    "two temperatures": lambda z, o: ce((z / o.fixed_t)[:, :-1] * o.t[:, 1:], o.y[:, 1:]),
    "temperatures of positions": lambda z, o: ce(z / o.fixed_t[0], o.y),
    "temperatures of examples": lambda z, o: ce(z / o.t[:, :1], o.y),
    "temperature of all": lambda z, o: ce(z / o.t[1, 1], o.y),
    "temperatures of some": lambda z, o: F.cross_entropy(
        (z / o.t)[o.y != IGNORED], o.y[o.y != IGNORED]
    ),
    "temperatures and a scale": lambda z, o: ce(o.s * (z / o.t), o.y),
    "temperatures, logarithms": lambda z, o: (z / o.t).log_softmax(-1).mean(-1),
    "temperatures, logsumexp": lambda z, o: (z / o.t).logsumexp(-1),
    "temperatures, gather of logits": lambda z, o: (z / o.t).gather(-1, o.all_y[..., None]),
    "temperatures, cap": lambda z, o: ours.cross_entropy((z / o.t).mT, o.y, softcap=3.0),
    "no bias": lambda z, o: ce(4 * torch.tanh((z + o.row) * o.s / 4), o.y),
}
LOSSES = {
    "iteration": 2,
    "split": 2,
    "chunk": 3,
    "two losses": 2,
    "z-loss of the user's": 2,
    "gather less logsumexp": 2,
    "log-probabilities of a policy": B + 1,
}


def is_fused(log, losses=None):
    assert log.fused == losses if losses else log.fused
    assert not log.materialized


@pytest.mark.parametrize("name", cases(FUSED | FUSED_WITHOUT_BIAS))
def test_fused_ways_to_a_loss(name):
    """Values and gradients are the plain model's, and no tensor of tokens x classes is made."""
    way = (FUSED | FUSED_WITHOUT_BIAS)[name]
    plain, swapped, log = pair(bias=name in FUSED)
    truth = results(plain, way)
    agree(results(swapped, way), truth)
    is_fused(log, LOSSES.get(name, 1))
    o = numbers()
    with Watch() as watch:
        found = results(swapped, way, o)
    agree(found, truth)
    assert not watch.made or "probabilities" in name  # which are as large themselves


def test_the_watcher_sees_plain_logits():
    (plain, *_), o = pair(), numbers()
    with Watch() as watch:
        results(plain, FUSED["view"], o)
    assert len(watch.made) > 2


BLOCKS = [
    *("shift", "cap of scaled logits", "stats", "smoothing", "gather", "learnt temperatures"),
    *("logsumexp", "logsumexp of capped logits", "gather of capped logits"),
]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rows", [3500, 150])
def test_fused_in_several_blocks_of_rows(name, rows):
    """At 3500 x 700 as it is, at 150 x 70 in blocks of 32."""
    sizes = {"examples": 2, "tokens": rows // 2, "classes": 700 if rows == 3500 else 70}
    way = (FUSED | FUSED_WITHOUT_BIAS)[name]
    plain, swapped, log = pair(bias=name in FUSED, classes=sizes["classes"])
    bound = (0, 1) if rows == 150 else blocked.BLOCK_BYTES
    with (
        mock.patch.object(blocked, "BLOCK_BYTES", bound),
        mock.patch.dict(globals(), C=sizes["classes"]),
    ):
        assert blocked.block_rows(rows, sizes["classes"]) < rows
        agree(*(results(model, way, numbers(**sizes)) for model in (swapped, plain)), atol=1e-10)
    is_fused(log)


# Types


def smoothed_by_trainer(z, o):
    """The label smoother of transformers, as it is written there."""
    labels, epsilon, ignore_index = o.y.clone(), 0.1, IGNORED
    log_probs = -nn.functional.log_softmax(z, dim=-1)
    if labels.dim() == log_probs.dim() - 1:
        labels = labels.unsqueeze(-1)
    padding_mask = labels.eq(ignore_index)
    labels = torch.clamp(labels, min=0)
    nll_loss = log_probs.gather(dim=-1, index=labels)
    smoothed_loss = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll_loss.masked_fill_(padding_mask, 0.0)
    smoothed_loss.masked_fill_(padding_mask, 0.0)
    num_active_elements = padding_mask.numel() - padding_mask.long().sum()
    nll_loss = nll_loss.sum() / num_active_elements
    smoothed_loss = smoothed_loss.sum() / (num_active_elements * log_probs.shape[-1])
    return (1 - epsilon) * nll_loss + epsilon * smoothed_loss


def widened(z):
    return z.float() if z.dtype in (BF16, torch.float16) else z.double()


TYPED: dict[str, Any] = {
    "as it is": lambda z, o: ce(z, o.y),
    "widened": lambda z, o: ce(widened(z), o.y),
    "at least float32": lambda z, o: ce(z.to(dtype=torch.float32)[:, 1:], o.y[:, 1:]),
    "widened, scaled": lambda z, o: ce(widened(z) * 0.7, o.y),
    "scaled": lambda z, o: ce(z / 3, o.y),
    "times a learnt number": lambda z, o: ce(z * o.s, o.y),
    "widened, times narrow numbers": lambda z, o: ce(
        0.3 * z.float() * o.narrow_s * o.narrow_s, o.y
    ),
    "widened, over a narrow number": lambda z, o: ce(z.float() / o.narrow_s, o.y),
    "cap": lambda z, o: ce(4 * torch.tanh(z / 4), o.y),
    "widened, cap": lambda z, o: ce(4 * torch.tanh(widened(z) / 4), o.y),
    "cap, widened": lambda z, o: ce(widened(4 * torch.tanh(z / 4)), o.y),
    "row": lambda z, o: ce(z + o.row, o.y),
    "wide row": lambda z, o: ce(z + o.wide_row, o.y),
    "widened, wide row": lambda z, o: ce(widened(z) + o.wide_row, o.y),
    "none": lambda z, o: ce(z, o.y, reduction="none"),
    "class weights": lambda z, o: ce(z.float(), o.y, weight=o.weight.float()),
    "probabilities": lambda z, o: F.cross_entropy(z.mT, o.probs.mT),
    "z-loss": lambda z, o: ours.cross_entropy(z.mT, o.y, z_loss=0.1, softcap=5.0),
    "gather": lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]),
    "gather of wide": lambda z, o: F.log_softmax(z, -1, dtype=torch.float32).gather(
        -1, o.all_y[..., None]
    ),
    "gather of logits": lambda z, o: z.gather(-1, o.all_y[..., None]),
    "logsumexp": lambda z, o: z.logsumexp(-1),
    "logsumexp of wide": lambda z, o: widened(z).logsumexp(-1),
    "sum": lambda z, o: z.log_softmax(-1).sum(-1, dtype=torch.float32),
    "mean": lambda z, o: z.log_softmax(-1).mean(-1),
    "smoothed by trainer": smoothed_by_trainer,
    "read": lambda z, o: (z / 9).exp().mean(),
    "read, detached": lambda z, o: (z.detach() / 9).exp().mean() + (z / 9).exp().mean(),
}
TYPED_WITHOUT_BIAS: dict[str, Any] = {
    "temperatures": lambda z, o: ce(z / o.t, o.y),
    "wide temperatures": lambda z, o: ce(z / o.wide_t, o.y),
    "widened, temperatures": lambda z, o: ce(widened(z) / o.t, o.y),
    "widened, wide temperatures": lambda z, o: ce(widened(z) * o.wide_t, o.y),
    "widened, narrow temperatures": lambda z, o: ce(z.float() / o.narrow_t, o.y),
}


KINDS = ["float32", "bfloat16", "float16", "inside", "outside", "before"]


@pytest.mark.parametrize(
    ("kind", "name"), cases(itertools.product(KINDS, TYPED | TYPED_WITHOUT_BIAS))
)
def test_types(kind, name):
    """No further off than the plain model but for a rounding of each loss; and of its types.

    Logits and loss inside of autocast's region; the logits alone; the loss alone.
    """
    way = (TYPED | TYPED_WITHOUT_BIAS)[name]
    dtype = getattr(torch, kind, torch.float32)
    plain, swapped, log = pair(name in TYPED, dtype)
    exact = copy.deepcopy(plain).double()

    def run(model):
        def logits(x):
            with torch.autocast("cpu", BF16, enabled=kind in ("inside", "outside")):
                return model(x)

        def loss(z, o):
            with torch.autocast("cpu", BF16, enabled=kind in ("inside", "before")):
                return way(z, o)

        logits.parameters = model.parameters
        return results(logits, loss, numbers(dtype))

    truth, theirs, mine = results(exact, way, numbers(dtype, exact=True)), run(plain), run(swapped)
    limit = roundings(BF16 if kind in ("inside", "outside") else dtype) * max(log.fused, 1)
    for found, expected, true in zip(mine, theirs, truth, strict=True):
        assert (found is None) == (true is None)
        if true is not None:
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            scale = distance(true, 0.0)
            assert distance(found, true) <= distance(expected, true) + limit * scale
    if (kind, name) == ("inside", "logsumexp"):  # its type is the device's own
        assert not log.fused
    elif "read" not in name and (dtype, name) != (torch.float32, "at least float32"):
        is_fused(log)


def test_a_class_that_many_rows_choose():
    """Its row of the weight's gradient is a long sum, in float32."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(4096, 8, generator=random).to(BF16)
    head = nn.Sequential(nn.Linear(8, 30)).to(BF16)
    swap(head)
    chosen = head(x).gather(1, torch.full((4096, 1), 3))
    dW, db = torch.autograd.grad(chosen.sum(), [*head.parameters()])
    torch.testing.assert_close(dW[3], x.double().sum(0).to(BF16), rtol=2**-8, atol=0)
    assert db[3] == 4096
    assert not dW[4:].any()


# Chains of steps at random


class Chain:
    """Random steps from logits to a loss, to be run on either model.

    What moves rows and axes is done to the tokens' numbers too, to know the targets. `is_foldable`
    says whether the loss must do without logits.
    """

    def __init__(self, data: Any):
        self.data, self.steps = data, []
        self.examples, self.tokens = self.one_of(1, 2, 4), self.one_of(1, 3, 4)
        self.classes, self.features = self.one_of(4, 7), self.one_of(1, 3, 4, 9)
        self.bias, self.is_float32 = self.one_of(True, False), self.one_of(False, False, True)
        self.dtype = torch.float32 if self.is_float32 else F64
        shape = self.examples, self.tokens, self.classes
        self.token = torch.arange(shape[0] * shape[1]).view(*shape[:2], 1).expand(shape)
        self.cls = torch.arange(self.classes).expand(shape)
        self.like = torch.empty(shape)  # in memory as logits are
        self.is_foldable, self.is_scaled, self.is_capped, self.is_by_row = (True, *[False] * 3)
        for _ in range(self.one_of(0, 1, 2, 3, 4, 5)):
            getattr(self, self.one_of(*self.KINDS))()
        self.loss = self.one_of("cross_entropy", "ours", "nll_loss", "gather", "sum")
        getattr(self, f"draw_{self.loss}")()

    KINDS = (
        *("transpose", "flatten", "part", "select", "unsqueeze", "index", "mask", "pieces", "view"),
        *("copy", "number", "learnt", "cap", "bend", "row", "temperature", "widen", "negate") * 2,
        "foreign",
    )

    def one_of(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    @property
    def axis(self) -> int:
        """Of the classes."""
        v = self.cls
        (axis,) = [d for d, n in enumerate(v.shape) if n > 1 and (v.diff(dim=d) == 1).all()]
        return axis

    @property
    def row_axes(self) -> list[int]:
        return [d for d in range(self.cls.dim()) if d != self.axis]

    def move(self, f: Any) -> None:
        self.steps.append(lambda z, o: f(z))
        self.token, self.cls, self.like = f(self.token), f(self.cls), f(self.like)

    def value(self, f: Any, fold: bool) -> None:
        self.steps.append(f)
        self.is_foldable &= fold
        self.like = self.like + 1

    def is_packed(self) -> bool:
        return self.like.stride() == torch.empty(self.like.shape).stride()

    # steps

    def transpose(self):
        i, j = (self.one_of(*range(self.cls.dim())) for _ in range(2))
        self.move(lambda v: v.transpose(i, j))

    def flatten(self):
        axis, C = self.axis, self.classes
        self.move(lambda v: v.movedim(axis, -1).reshape(-1, C))

    def view(self):
        """The axes before the classes' become two, or theirs one, where that is a view."""
        n, sizes = math.prod(self.cls.shape[: self.axis]), self.cls.shape[self.axis :]
        first = self.one_of(*(k for k in range(1, n + 1) if n % k == 0))
        self.move(lambda v: v.reshape(first, n // first, *sizes))

    def part(self):
        if self.row_axes:
            d = self.one_of(*self.row_axes)
            start, step = self.one_of(0, 1), self.one_of(1, 1, 2)
            if self.cls.shape[d] > start:
                which = (slice(None),) * d + (slice(start, None, step),)
                self.move(lambda v: v[which])

    def select(self):
        if self.row_axes:
            d, i = self.one_of(*self.row_axes), self.one_of(0, -1)
            self.move(lambda v: v.select(d, i))

    def unsqueeze(self):
        d = self.one_of(*range(self.cls.dim() + 1))
        self.move(lambda v: v.unsqueeze(d))
        if self.one_of(True, False):
            self.move(lambda v: v.squeeze(d))

    def index(self):
        if self.row_axes:
            d = self.one_of(*self.row_axes)
            n = self.cls.shape[d]
            at = torch.tensor([self.one_of(*range(-n, n)) for _ in range(self.one_of(1, 2, 3))])
            self.is_foldable &= self.is_packed()
            self.move(lambda v: v[(slice(None),) * d + (at,)])

    def mask(self):
        if self.axis == self.cls.dim() - 1:
            mask = self.token.select(-1, 0) % self.one_of(1, 2, 3) == 0
            if mask.any():
                self.is_foldable &= self.is_packed()
                self.move(lambda v: v[mask])

    def pieces(self):
        if self.row_axes:
            d, i = self.one_of(*self.row_axes), self.one_of(0, -1)
            if self.one_of(True, False):
                self.move(lambda v: v.unbind(d)[i])
            else:
                self.move(lambda v: v.chunk(2, d)[i])

    def copy(self):
        f = self.one_of(torch.clone, torch.Tensor.contiguous, lambda v: v.view_as(v))
        self.move(f)

    def widen(self):
        self.value(lambda z, o: z.double(), fold=True)
        self.dtype = F64

    def number(self):
        k = self.one_of(0.5, -2, 3.0, torch.tensor(0.7))
        f = self.one_of(torch.mul, torch.div)
        self.value(lambda z, o: f(z, k), fold=True)
        self.is_scaled = True

    def negate(self):
        self.value(lambda z, o: -z, fold=True)
        self.is_scaled = True

    def learnt(self):
        f = self.one_of(torch.mul, torch.div)
        self.value(lambda z, o: f(z, o.s), fold=not self.is_capped)
        self.is_scaled = True

    def cap(self):
        cap = self.one_of(1.5, 4)
        self.value(
            lambda z, o: cap * torch.tanh(z / cap), fold=not (self.is_capped or self.is_by_row)
        )
        self.is_scaled = self.is_capped = True

    def bend(self):
        """A cap of 1, which is hardly one."""
        self.value(lambda z, o: z.tanh(), fold=not (self.is_capped or self.is_by_row))
        self.is_capped = True

    def row(self):
        axis, dim, name = self.axis, self.cls.dim(), self.one_of("row", "fixed_row")
        shape = [self.classes if d == axis else 1 for d in range(dim)]
        fold = not (self.is_scaled or self.is_capped or self.is_by_row)
        self.value(lambda z, o: z + getattr(o, name).view(shape).to(z.dtype), fold)
        self.has_row = True

    has_row = False

    def temperature(self):
        axis, token, name = self.axis, self.token, self.one_of("t", "fixed_t")
        f = self.one_of(torch.mul, torch.div)
        at = token.narrow(axis, 0, 1)
        fold = not (self.bias or self.has_row or self.is_capped)
        self.value(lambda z, o: f(z, getattr(o, name).flatten()[at].to(z.dtype)), fold)
        self.is_by_row = True

    def foreign(self):
        """What is no step."""
        axis = self.axis
        perm = torch.randperm(self.classes, generator=torch.Generator().manual_seed(0))
        functions = [
            lambda z, o: z.sub(1.0),
            lambda z, o: z.clamp(-2, 2),
            lambda z, o: z.index_select(axis, perm),
            lambda z, o: z.clone().mul_(2),
            lambda z, o: z + 0.1 * z.exp(),
            lambda z, o: z.masked_fill(z > 3, 3.0),
        ]
        self.value(self.one_of(*functions), fold=False)

    # losses

    def ready(self):
        """The classes' axis, after a move to where the losses of PyTorch want it."""
        self.steps.append(lambda z, o: z)
        axis = self.axis
        want = min(self.cls.dim() - 1, 1)
        if axis != want:
            self.move(lambda v: v.movedim(axis, want))
        self.targets = self.token.select(want, 0)

    def target(self, o: Any, ignored: int) -> torch.Tensor:
        return (o.y if ignored == IGNORED else o.all_y).flatten()[self.targets]

    def common(self):
        weighted, ignored = self.one_of(True, False), self.one_of(IGNORED, 2)
        return weighted, ignored, {"reduction": self.one_of("none", "sum", "mean")}

    def draw_cross_entropy(self, function=F.cross_entropy, **more):
        self.ready()
        weighted, ignored, options = self.common()
        options |= {"label_smoothing": self.one_of(0.0, 0.2), **more}
        is_distribution, at = self.one_of(False, False, True), self.targets
        axis = self.axis

        def loss(z, o):
            weight = {"weight": o.weight.to(z.dtype)} if weighted else {}
            if not is_distribution:
                y = self.target(o, ignored)
                return function(z, y, ignore_index=ignored, **options, **weight)
            p = o.probs.flatten(0, 1)[at].movedim(-1, axis).to(z.dtype)
            return function(z, p, **options, **weight)

        self.steps.append(loss)

    def draw_ours(self):
        cap, scale = self.one_of(None, 3.0), self.one_of(1.0, -0.5)
        more = {"base": self.one_of(math.e, 2.0), "z_loss": self.one_of(0.0, 0.1)}
        self.is_foldable &= not self.is_capped or (cap is None and scale == 1.0)
        self.draw_cross_entropy(ours.cross_entropy, softcap=cap, logit_scale=scale, **more)

    def draw_nll_loss(self):
        self.ready()
        weighted, ignored, options = self.common()
        axis = self.axis

        def loss(z, o):
            weight = o.weight.to(z.dtype) if weighted else None
            l = z.log_softmax(axis)
            return F.nll_loss(l, self.target(o, ignored), weight, ignore_index=ignored, **options)

        self.steps.append(loss)

    def draw_gather(self):
        axis, at = self.axis, self.token.narrow(self.axis, 0, 1)
        sign = self.one_of(torch.neg, torch.clone)
        self.steps.append(
            lambda z, o: sign(z.log_softmax(axis)).gather(axis, o.all_y.flatten()[at])
        )

    def draw_sum(self):
        axis, keepdim, f = self.axis, self.one_of(True, False), self.one_of(torch.sum, torch.mean)
        self.steps.append(lambda z, o: f(-z.log_softmax(axis), axis, keepdim))

    def __call__(self, z, o):
        for step in self.steps:
            z = step(z, o)
        return z


def test_random_chains_of_steps():
    """Right always; without logits where every step is one that the loss can take over."""
    fused = Counter()

    @settings(deadline=None, derandomize=True, max_examples=500)
    @given(st.data())
    def search(data):
        chain = Chain(data)
        sizes = {"examples": chain.examples, "tokens": chain.tokens, "classes": chain.classes}
        start = torch.float32 if chain.is_float32 else F64
        plain, swapped, log = pair(
            chain.bias, start, features=chain.features, classes=chain.classes
        )

        found, truth = (results(m, chain, numbers(start, **sizes)) for m in (swapped, plain))
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if chain.is_float32 else {}
        agree(found, truth, **tolerance)
        assert log.fused or log.materialized
        if chain.is_foldable:
            assert (log.fused, log.materialized) == (1, {})
        fused[chain.is_foldable] += 1

    search()
    assert min(fused[True], fused[False]) > 50


# What needs the logits


class Backward(torch.autograd.Function):
    """The same number, or another type, or its double in place; three times the gradient, with
    the other sign.
    """

    @staticmethod
    def forward(ctx, z, kind):
        ctx.dtype = z.dtype
        if kind == "in place":
            ctx.mark_dirty(z)
            return z.mul_(2)
        return {"as it is": lambda: z, "view": lambda: z.view_as(z), "cast": z.float}[kind]()

    @staticmethod
    def backward(ctx, g):
        return -3 * g.to(ctx.dtype), None


def through_function(kind):
    return lambda z, o: ce(Backward.apply(z, kind), o.y)


def edited(edit):
    """A loss of logits after an edit in place, which may give the logits to go on with."""

    def way(z, o):
        found = edit(z, o)
        return ce(z if found is None else found, o.y)

    return way


def set_first_class(z, o):
    z[:, :, 0] = -1e9


def set_rows(z, o):
    z[o.y == IGNORED] = 0.0


def edit_of_view(z, o):
    v, w = z.view(-1, C), z.float()
    v[:, 1] = 0
    return z + w + v.view(z.shape)


def edit_seen_by_relatives(z, o):
    v = z[:, :-1]
    u, w = v.transpose(1, 2), z.clone()
    z.mul_(2)
    return u.mT.repeat(1, 2, 1)[:, :T] + w


def edit_of_a_clone(z, o):
    z.clone().mul_(2)


def edit_of_a_part(z, o):
    z[:, 2:4].div_(3)


def edit_of_data(z, o):
    z.data.mul_(2)


def edit_without_gradient(z, o):
    with torch.no_grad():
        z[0] *= 2


def edit_after_a_loss(z, o):
    before = ce(z, o.y)
    z.mul_(2)
    return before + ce(z, o.y)


def after_steps(z, o):
    """Relatives of all kinds are still right once one of them is computed."""
    v, w, u = z.flatten(0, 1), (z + o.row) * o.s, 3 * torch.tanh(z.mT / 3)
    l = u.log_softmax(1)
    total = w.exp().mean()
    return total + ce(z, o.y) + F.cross_entropy(v, o.y.flatten()) + F.nll_loss(l, o.y) + u.sum()


def of_two_heads(z, o):
    return ce(z + z.detach().roll(1, 0).requires_grad_(), o.y)


def out_variant(z, o):
    return ce(z, o.y) + torch.add(z.detach(), 1, out=torch.empty_like(z.detach())).sum()


PLAIN: dict[str, tuple[str, Any]] = {
    # the operation that the report names, and the way
    "exp": ("exp", lambda z, o: z.exp().mean()),
    "softmax": ("_softmax", lambda z, o: z.softmax(-1)[..., 0]),
    "softmax, function": ("_softmax", lambda z, o: F.softmax(z, dim=2).square().sum(-1)),
    "logsumexp of rows": ("logsumexp|amax", lambda z, o: z.logsumexp(1)),
    "logsumexp of all": ("logsumexp|amax", lambda z, o: z.logsumexp((1, 2))),
    "logsumexp of logarithms": ("logsumexp|amax", lambda z, o: z.log_softmax(-1).logsumexp(-1)),
    "kl_div": ("mul|sub", lambda z, o: F.kl_div(z.log_softmax(-1), o.probs, reduction="sum")),
    "cat": ("cat", lambda z, o: ce(torch.cat([z, z]), torch.cat([o.y, o.y]))),
    "stack": ("stack|cat|unsqueeze", lambda z, o: torch.stack([z, 2 * z]).square().mean(-1)),
    "sum of logits": ("sum", lambda z, o: z.sum(-1)),
    "mean of all": ("mean", lambda z, o: z.log_softmax(-1).mean()),
    "sum over rows and classes": ("sum", lambda z, o: z.log_softmax(-1).sum((1, 2))),
    "sum over rows": ("sum", lambda z, o: z.log_softmax(-1).sum(1)),
    "sum by axis": ("sum", lambda z, o: z.log_softmax(-1).sum(axis=-1)),
    "a product": ("expand", lambda z, o: z @ z.mT),
    "einsum": ("sum", lambda z, o: torch.einsum("btc->bt", z)),
    "sums of logits": ("cumsum", lambda z, o: z.cumsum(1)[..., 5]),
    "log of sums": ("logcumsumexp", lambda z, o: z.logcumsumexp(-1)[..., -1]),
    "gather of few logits": ("gather", lambda z, o: z.gather(-1, o.all_y[:, :3, None])),
    "gather of several": (
        "gather",
        lambda z, o: z.log_softmax(-1).gather(-1, (o.all_y[..., None] + torch.arange(2)) % C),
    ),
    "gather over rows": (
        "gather",
        lambda z, o: z.log_softmax(-1).gather(1, o.all_y[..., None] % T),
    ),
    "some classes": ("slice", lambda z, o: ce(z[..., :-1], o.y.clamp(max=C - 2))),
    "every other class": ("slice", lambda z, o: ce(z[..., ::2], o.y.clamp(max=99))),
    "one class": ("select", lambda z, o: z[..., 7]),
    "classes reversed": ("flip", lambda z, o: ce(z.flip(-1), o.y)),
    "classes moved": ("index_select", lambda z, o: ce(z.index_select(2, torch.randperm(C)), o.y)),
    "classes by index": ("index", lambda z, o: ce(z[..., torch.arange(C).flip(0)], o.y)),
    "classes split": ("split", lambda z, o: ce(z.split(200, -1)[0], o.y.clamp(max=199))),
    "rows moved": ("roll", lambda z, o: ce(z.roll(1, 1), o.y)),
    "rows expanded": ("expand", lambda z, o: ce(z[:1].expand(3, -1, -1), o.y[:1].repeat(3, 1))),
    "rows repeated": ("repeat", lambda z, o: ce(z.repeat(2, 1, 1), o.y.repeat(2, 1))),
    "no rows": ("slice", lambda z, o: ce(z[:0], o.y[:0], reduction="sum")),
    "no rows, by mask": ("index", lambda z, o: z[o.y == 1000].sum()),
    "classes as rows": (
        "_log_softmax",
        lambda z, o: F.cross_entropy(z, o.all_y[:, :1].repeat(1, C) % T),
    ),
    "a narrower type": ("_to_copy", lambda z, o: ce(z.float(), o.y).double()),
    "narrower and back": ("_to_copy", lambda z, o: ce(z.half().double(), o.y)),
    "a number less": ("sub", lambda z, o: ce(z - 1.0, o.y)),
    "a number more": ("add", lambda z, o: ce(z + 1.0, o.y)),
    "a row less": ("sub", lambda z, o: ce(z - o.row, o.y)),
    "a row and a factor": ("add", lambda z, o: ce(torch.add(z, o.row, alpha=2), o.y)),
    "a row of scaled logits": ("add", lambda z, o: ce(z * 2 + o.row, o.y)),
    "a row of capped logits": ("add", lambda z, o: ce(z.tanh() + o.row, o.y)),
    "a row times": ("mul", lambda z, o: ce(z * o.row, o.y)),
    "as many": ("add", lambda z, o: ce(z + o.probs, o.y)),
    "temperatures with a bias": ("div", lambda z, o: ce(z / o.t, o.y)),
    "temperatures, a row; no bias": ("add", lambda z, o: ce(z / o.t + o.row, o.y)),
    "temperatures, a cap; no bias": ("tanh", lambda z, o: ce((z / o.t).tanh(), o.y)),
    "a row, temperatures; no bias": ("div", lambda z, o: ce((z + o.row) / o.t, o.y)),
    "number over": ("reciprocal", lambda z, o: ce(2 / z, o.y)),
    "power": ("pow", lambda z, o: ce(z**1, o.y)),
    "complex": ("mul", lambda z, o: ce((z[:, :7] * (2 + 0j)).real, o.y[:, :7])),
    "times 0": ("mul", lambda z, o: ce(z * 0, o.y)),
    "times nan": ("mul", lambda z, o: ce(z * math.nan, o.y)),
    "times inf": ("mul", lambda z, o: ce(z * math.inf, o.y)),
    "over 0": ("div", lambda z, o: ce(z / 0.0, o.y)),
    "rounded": ("div", lambda z, o: ce(torch.div(z, 3, rounding_mode="floor"), o.y)),
    "capped twice": ("tanh", lambda z, o: ce((2 * (z / 2).tanh()).tanh(), o.y)),
    "capped, times a learnt number": ("mul", lambda z, o: ce(z.tanh() * o.s, o.y)),
    "capped, of ours capped": (
        "masked_fill",
        lambda z, o: ours.cross_entropy(2 * z.mT.tanh(), o.y, softcap=3.0),
    ),
    "capped, of ours scaled": (
        "masked_fill",
        lambda z, o: ours.cross_entropy(2 * z.mT.tanh(), o.y, logit_scale=o.s / o.s.item()),
    ),
    "clamp": ("clamp", lambda z, o: ce(z.clamp(-5, 5), o.y)),
    "where": ("where", lambda z, o: ce(torch.where(o.fixed_row > 0, z, -100.0), o.y)),
    "masked_fill": ("masked_fill", lambda z, o: ce(z.masked_fill(o.fixed_row > 1, -1e4), o.y)),
    "dropout": ("empty_like", lambda z, o: ce(F.dropout(z, 0.5), o.y)),
    "logarithms scaled": (
        "mul",
        lambda z, o: 2 * z.log_softmax(-1).sum(-1) - (z.log_softmax(-1) * 3).sum(-1),
    ),
    "logarithms twice": ("_log_softmax", lambda z, o: F.cross_entropy(z.mT.log_softmax(1), o.y)),
    "logarithms over rows": (
        "nll_loss|_log_softmax",
        lambda z, o: F.nll_loss(z.mT.log_softmax(2), o.y),
    ),
    "nll_loss of logits": ("nll_loss2d_forward", lambda z, o: F.nll_loss(z.mT, o.y)),
    "nll_loss of the negated": (
        "nll_loss2d_forward",
        lambda z, o: F.nll_loss(-z.mT.log_softmax(1), o.y),
    ),
    "mse_loss": ("mse_loss", lambda z, o: F.mse_loss(z, o.probs)),
    "multi_margin_loss": (
        "multi_margin_loss",
        lambda z, o: F.multi_margin_loss(z.flatten(0, 1), o.all_y.flatten()),
    ),
    "binary_cross_entropy": (
        "binary_cross_entropy_with_logits",
        lambda z, o: F.binary_cross_entropy_with_logits(z, o.fixed_probs),
    ),
    "a second term": ("mul", lambda z, o: ce(z, o.y) + 1e-2 * (z * z).mean()),
    "accuracy": ("argmax", lambda z, o: ce(z, o.y) * (z.argmax(-1) == o.y).sum().add(1)),
    "topk": ("topk", lambda z, o: ce(z, o.y) + z.topk(3)[0].mean()),
    "sorting": ("sort", lambda z, o: z.sort(-1)[0][..., ::30]),
    "after steps": ("exp", after_steps),
    "sum of logits and targets": ("detach", of_two_heads),
    "detached": ("detach", lambda z, o: ce(z.detach(), o.y) + 0 * z.sum()),
    "data": ("data", lambda z, o: ce(z.data, o.y) + 0 * z.sum()),
    "own targets": ("_softmax", lambda z, o: F.cross_entropy(z.mT, z.mT.softmax(1))),
    "out": ("detach", out_variant),
    "as_strided": ("as_strided", lambda z, o: z[1].as_strided((T,), (C,))),
    # in place
    "add_": ("add_", edited(lambda z, o: z.add_(1))),
    "iadd": ("add_", edited(lambda z, o: z.__iadd__(o.row))),
    "mul_": ("mul_", edited(lambda z, o: z.mul_(o.s))),
    "tanh_": ("tanh_", edited(lambda z, o: z.tanh_())),
    "setitem": ("select|slice|fill_|copy_", edited(set_first_class)),
    "setitem, mask": ("index_put_", edited(set_rows)),
    "masked_fill_": ("masked_fill_", edited(lambda z, o: z.masked_fill_(o.fixed_row > 1, -1e4))),
    "zero_": ("zero_", edited(lambda z, o: z.zero_())),
    "copy_": ("copy_", edited(lambda z, o: z.copy_(o.probs))),
    "index_fill_": ("index_fill_", edited(lambda z, o: z.index_fill_(2, torch.tensor([3]), -5))),
    "scatter_": ("scatter_", edited(lambda z, o: z.scatter_(2, o.all_y[..., None], 0.0))),
    "of a view": ("_to_copy", edited(edit_of_view)),
    "of a part": ("div_", edited(edit_of_a_part)),
    "of a clone": ("mul_", edited(edit_of_a_clone)),
    "seen by relatives": ("mul_", edited(edit_seen_by_relatives)),
    "without gradient": ("mul_|select", edited(edit_without_gradient)),
    "after a loss": ("mul_", edit_after_a_loss),
    "of data": ("data", edited(edit_of_data)),
    # what the user has put between
    "Function, the same": ("BackwardBackward stands between", through_function("as it is")),
    "Function, a view": ("BackwardBackward stands between", through_function("view")),
    "Function, a cast": ("_to_copy", lambda z, o: through_function("cast")(z, o).double()),
    "Function, in place": ("mul_", through_function("in place")),
}


ALSO_FUSED = ["accuracy", "topk", "a second term", "logarithms scaled", "out", "after a loss"]


@pytest.mark.parametrize("name", cases(PLAIN))
def test_ways_that_need_logits(name):
    """Values and gradients are the plain model's; the report names the operation and this file."""
    operation, way = PLAIN[name]
    plain, swapped, log = pair(bias="no bias" not in name)
    found, truth = (seeded(results, model, way) for model in (swapped, plain))
    agree(found, truth)
    assert bool(log.fused) == (name in ALSO_FUSED)
    assert log.materialized
    for why in log.materialized:
        assert re.fullmatch(rf"({operation})\b.* at .*{HERE}:\d+ in .*", why), why


def seeded(function, *args):
    torch.manual_seed(5)
    return function(*args)


BEFORE: dict[str, Any] = {
    "nothing": lambda z, o: None,
    "a loss": lambda z, o: F.cross_entropy(z, o.y.flatten()),
    "read": lambda z, o: z.argmax(-1),
    "edited": lambda z, o: z.mul_(0.3),
    "edited without gradient": lambda z, o: z.data.mul_(0.3),
    "watched": lambda z, o: z.register_hook(lambda g: 2 * g),
    "retained": lambda z, o: z.retain_grad(),
    "its node read": lambda z, o: z.grad_fn.name(),
    "copied": lambda z, o: z.detach(),
}


@pytest.mark.parametrize("name", cases(BEFORE))
def test_logits_that_a_loss_takes_as_they_are(name):
    """Where features are rows, nothing need be between the head and the loss."""

    def way(z, o):
        BEFORE[name](z, o)
        return F.cross_entropy(z, o.y.flatten(), label_smoothing=0.1)

    plain, swapped, log = pair()
    found = []
    for model in (swapped, plain):
        o = numbers()
        z = model(o.x.flatten(0, 1))
        leaves = [*model.parameters(), o.x]
        loss = way(z, o)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    agree(*found)
    assert log.fused == {"nothing": 1, "a loss": 2}.get(name, 0)
    assert bool(log.materialized) != bool(log.fused)


MAYBE: dict[str, Any] = {
    "all classes": lambda z: z[..., : z.shape[-1]],
    "narrow": lambda z: z.narrow(-1, 0, z.shape[-1]),
    "from the end": lambda z: z[:, :, -z.shape[-1] :],
    "split in one": lambda z: z.split(z.shape[-1], -1)[0],
    "chunk in one": lambda z: z.chunk(1, -1)[0],
    "as wide as features": lambda z: z[..., :4],
    "but as many as features": lambda z: z[..., -4:],
    "squeeze": lambda z: z.squeeze(),
    "squeeze of the classes": lambda z: z.squeeze(-1),
    "temperatures, squeeze": lambda z: z.squeeze().view(-1, z.shape[-1]),
    "temperatures, all classes": lambda z: z[..., : z.shape[-1]].flatten(0, 1),
    "no classes": lambda z: torch.cat([z[..., :0], z, z[..., 4:0]], -1),
    "no classes, by a list": lambda z: torch.cat([z, z[..., []]], -1),
    "no classes, by an index": lambda z: torch.cat([z[..., torch.tensor([]).long()], z], -1),
    "classes joined with rows": lambda z: z.reshape(z.shape[0], -1).view_as(z),
    "classes taken apart": lambda z: z.unflatten(-1, (1, -1)).flatten(-2),
    "other rows": lambda z: z.transpose(0, 1).reshape(z.shape),
    "as if transposed": lambda z: z.mT.reshape(z.shape),
}
SIZES = {"1 feature": (1, 5, 3), "few classes": (9, 5, 5), "alike": (4, 4, 4), "1 token": (4, 9, 1)}


@pytest.mark.parametrize(("size", "name"), cases(itertools.product(SIZES, MAYBE)))
def test_what_is_as_large_as_classes_or_features(size, name):
    """Whether or not these are fused, they are right, where features are more or fewer."""
    features, classes, tokens = SIZES[size]
    plain, swapped, _ = pair("temperature" not in name, features=features, classes=classes)

    def way(z, o):
        v = MAYBE[name](z / o.t if "temperature" in name else z)
        return ce(v, o.all_y.clamp(max=v.shape[-1] - 1))

    sizes = {"tokens": tokens, "classes": classes}
    agree(*(results(model, way, numbers(**sizes)) for model in (swapped, plain)))


DESCRIBED: dict[str, Any] = {
    "itself": lambda z: z,
    "slice": lambda z: z[:, 1:],
    "slice, view": lambda z: z[1:].view(-1, C),
    "transpose": lambda z: z.mT,
    "transposed slice": lambda z: z[:, ::2].transpose(0, 1),
    "select": lambda z: z[:, -1],
    "unbind": lambda z: z.unbind(1)[3],
    "index": lambda z: z[:, [1, 4]],
    "index of both": lambda z: z[[1, 0], [3, 4]],
    "index of transposed": lambda z: z.mT[:, :, [1, 4]],
    "mask": lambda z: z[torch.arange(B * T).view(B, T) % 2 == 0],
    "permuted copy": lambda z: z.permute(1, 0, 2).contiguous(),
    "permuted product": lambda z: 2 * z.permute(2, 0, 1),
    "sliced logarithms": lambda z: z[:, 1:].log_softmax(-1),
    "negated transpose": lambda z: -z.mT,
    "clone of transposed": lambda z: z.mT.clone(),
    "cast": lambda z: z.to(torch.float32),
    "unsqueeze": lambda z: z[:, None],
    "tanh of a slice": lambda z: z[:, :3].tanh(),
    "with a row": lambda z: z.mT + torch.ones(C, 1, dtype=z.dtype),
}


def described(z):
    return {
        **{name: getattr(z, name) for name in ("shape", "dtype", "device", "layout", "ndim")},
        **{name: getattr(z, name)() for name in ("stride", "is_contiguous", "numel", "size")},
        **{name: getattr(z, name) for name in ("requires_grad", "is_leaf", "nbytes")},
        **{name: getattr(z, name)() for name in ("element_size", "is_floating_point", "type")},
        "length": len(z),
        "version": z._version,
        "view": z._is_view(),
    }


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", cases(DESCRIBED))
def test_all_but_the_numbers_is_known_before(name, grad):
    plain, swapped, log = pair()
    with torch.set_grad_enabled(grad):
        found, truth = (DESCRIBED[name](model(numbers().x)) for model in (swapped, plain))
    mine, theirs = described(found), described(truth)
    theirs["view"] = mine["view"] if name == "itself" else theirs["view"]  # of its own addmm
    assert mine == theirs
    if name not in ("cast", "index of transposed"):
        assert not log.materialized
    agree([found + 0], [truth + 0])
    assert found.stride() == truth.stride()


@pytest.mark.parametrize("name", ["slice", "select", "unbind"])
def test_the_storage_offset_is_known_before(name):
    plain, swapped, _ = pair()
    found, truth = (DESCRIBED[name](model(numbers().x)) for model in (swapped, plain))
    assert found.storage_offset() == truth.storage_offset()
    assert (2 * found).storage_offset() == 0


def test_an_error_of_the_head_is_raised_at_once():
    head = nn.Sequential(nn.Linear(4, C, dtype=F64))
    swap(head)
    x = torch.randn(3, 4, dtype=F64)
    for bad in (x.float(), x[..., 1:], x[0, 0]):
        with pytest.raises(RuntimeError) as expected:
            ours.linear(bad, head[0].weight, head[0].bias)
        with pytest.raises(RuntimeError, match=f"^{re.escape(str(expected.value))}$"):
            head(bad)


def test_a_complex_factor_is_not_remembered_as_the_real_one():
    plain, swapped, log = pair()
    (swapped(numbers().x)[:, :5] * (2 + 0j)).real.sum()
    agree(*(results(m, lambda z, o: ce(z[:, :5] * 2, o.y[:, :5])) for m in (swapped, plain)))
    assert log.fused == 1


def test_a_long_chain_of_steps():
    def way(z, o):
        for _ in range(1500):
            z = z * 1.001
        return ce(z, o.y)

    plain, swapped, _ = pair()
    agree(*(results(model, way) for model in (swapped, plain)))


# Errors are PyTorch's


WRONG: dict[str, Any] = {
    "a class too large": lambda z, o: ce(z, o.all_y.fill_(C)),
    "a negative class": lambda z, o: ce(z, o.all_y.fill_(-1)),
    "gather of a class too large": lambda z, o: z.log_softmax(-1).gather(
        -1, o.all_y[..., None] + C
    ),
    "gather of a negative class": lambda z, o: z.log_softmax(-1).gather(-1, o.y[..., None]),
    "types of targets": lambda z, o: ce(z, o.all_y.int()),
    "float targets": lambda z, o: ce(z, o.all_y.double()),
    "shapes": lambda z, o: F.cross_entropy(z.flatten(0, 1), o.y.flatten()[1:]),
    "other shapes": lambda z, o: F.cross_entropy(z, o.y),
    "reduction": lambda z, o: ce(z, o.y, reduction="some"),
    "smoothing": lambda z, o: ce(z, o.y, label_smoothing=2.0),
    "class weights": lambda z, o: ce(z, o.y, weight=o.weight[1:]),
    "types of class weights": lambda z, o: ce(z, o.y, weight=o.weight.float()),
    "ignored probabilities": lambda z, o: F.cross_entropy(z.mT, o.probs.mT, ignore_index=3),
    "an axis": lambda z, o: z.log_softmax(5),
    "a view": lambda z, o: z.view(-1, C + 1),
    "an index": lambda z, o: z[:, torch.tensor([T])],
    "a mask": lambda z, o: z[o.y[:1] > 0],
    "a row": lambda z, o: z + o.row[1:],
    "no target": lambda z, o: F.cross_entropy(z.flatten(0, 1), None),
    "an edit of what is saved": lambda z, o: ce(z.tanh().mul_(2), o.y),
    "an edit of a saved view": lambda z, o: (lambda t: t[0].zero_() + ce(t, o.y))(z.tanh()),
}


@pytest.mark.parametrize("name", cases(WRONG))
def test_what_is_wrong_raises_as_in_pytorch(name):
    plain, swapped, _ = pair()
    errors = []
    for model in (plain, swapped):
        with pytest.raises(Exception) as raised:  # noqa: PT011
            results(model, WRONG[name])
        errors.append(raised.type)
    assert errors[0] is errors[1]


# Whoever watches the logits


def seen(o, g):
    o.seen.append(g.clone())


def watched(watch, steps=lambda z: z):
    """A loss after someone has been put to watch the logits or what came of them."""

    def way(z, o):
        v = steps(z)
        watch(v, o)
        return ce(v, o.y)

    return way


def retained(z, o):
    z.retain_grad()
    o.after = lambda: seen(o, z.grad)


def late_view(z, o):
    """The logits are watched, a view of them from before is in the loss."""
    v = z[:, 1:]
    z.register_hook(lambda g: seen(o, g))
    return ce(v, o.y[:, 1:])


def late_transpose(z, o):
    """The loss is of what was there before, as it is."""
    v = z.mT
    z.register_hook(lambda g: seen(o, g))
    return F.cross_entropy(v, o.y)


def hook_on_what_the_loss_takes(z, o):
    v = z.mT
    v.register_hook(lambda g: seen(o, g) or 2 * g)
    return F.cross_entropy(v, o.y)


def hook_on_both(z, o):
    z.register_hook(lambda g: 2 * g)
    v = z * 3
    v.register_hook(lambda g: seen(o, g))
    return ce(v, o.y)


def of_a_deep_node(z, o):
    (z * 2)[:, 1:].grad_fn.next_functions[0][0].register_hook(lambda gi, go: seen(o, gi[0]))
    return ce((z * 2)[:, 1:], o.y[:, 1:])


def of_the_node_below(z, o):
    v = (z * 2)[:, 1:]
    v.grad_fn.next_functions[0][0].register_hook(lambda gi, go: seen(o, gi[0]))
    return ce(v, o.y[:, 1:])


WATCHERS: dict[str, Any] = {
    "hook": watched(lambda z, o: z.register_hook(lambda g: seen(o, g))),
    "hook that changes": watched(lambda z, o: z.register_hook(lambda g: seen(o, g) or 5 * g)),
    "hook on a view": watched(
        lambda z, o: z.register_hook(lambda g: seen(o, g) or -g), lambda z: z.mT.mT
    ),
    "hook on the scaled": watched(
        lambda z, o: z.register_hook(lambda g: seen(o, g)), lambda z: z / 3
    ),
    "hook on the capped": watched(lambda z, o: z.register_hook(lambda g: seen(o, g)), torch.tanh),
    "hooks on both": hook_on_both,
    "hook after a view": late_view,
    "hook after a transpose": late_transpose,
    "hook on the loss's own": hook_on_what_the_loss_takes,
    "retain_grad": watched(retained),
    "retain_grad of the scaled": watched(retained, lambda z: z * 0.5),
    "node's hook": watched(lambda z, o: z.grad_fn.register_hook(lambda gi, go: seen(o, go[0]))),
    "node's prehook": watched(
        lambda z, o: z.grad_fn.register_prehook(lambda go: seen(o, go[0]) or (go[0] * 2,))
    ),
    "view's node's prehook": watched(
        lambda z, o: z.grad_fn.register_prehook(lambda go: seen(o, go[0]) or (go[0] * 2,)),
        lambda z: z[:, :],
    ),
    "node below's hook": of_the_node_below,
    "multi-grad hook": watched(
        lambda z, o: torch.autograd.graph.register_multi_grad_hook((z,), lambda gs: seen(o, gs[0]))
    ),
    "multi-grad hook, any": watched(
        lambda z, o: torch.autograd.graph.register_multi_grad_hook(
            (z, o.x), lambda g: seen(o, g), mode="any"
        )
    ),
    "gradient in logits": lambda z, o: (
        seen(o, torch.autograd.grad(z.exp().sum(), z, retain_graph=True)[0]) or z.exp().mean()
    ),
    "edge of logits": lambda z, o: (
        lambda edge, l: seen(o, torch.autograd.grad(l, edge, retain_graph=True)[0]) or l
    )(torch.autograd.graph.get_gradient_edge(z), ce(z, o.y)),
}


@pytest.mark.parametrize("name", cases(WATCHERS))
def test_whoever_watches_logits_hears_what_they_do_of_plain_ones(name):
    plain, swapped, log = pair()
    found = []
    for model in (swapped, plain):
        o = numbers()
        o.seen, o.after = [], lambda: None
        found.append(results(model, WATCHERS[name], o, backward=True))
        o.after()
        assert o.seen
        found[-1] += o.seen
    agree(*found)
    assert not log.fused
    assert log.materialized


HOOKS: dict[str, Any] = {
    "full backward hook": lambda m, s: m.lm_head.register_full_backward_hook(
        lambda mod, gi, go: s.extend([*gi, *go]) or (gi[0] * 2,)
    ),
    "full backward pre-hook": lambda m, s: m.lm_head.register_full_backward_pre_hook(
        lambda mod, go: s.extend(go) or (go[0] * 2,)
    ),
    "full backward hook of the model": lambda m, s: m.register_full_backward_hook(
        lambda mod, gi, go: s.extend([*gi, *go]) or (gi[0] * 2,)
    ),
    "full backward pre-hook of the model": lambda m, s: m.register_full_backward_pre_hook(
        lambda mod, go: s.extend(go) or (go[0] * 2,)
    ),
    "forward hook": lambda m, s: m.lm_head.register_forward_hook(
        lambda mod, args, z: s.extend([*args, z + 0]) or z * 2
    ),
    "forward hook that only looks": lambda m, s: m.lm_head.register_forward_hook(
        lambda mod, args, z: s.append(z.sum())
    ),
    "forward hook of the model": lambda m, s: m.register_forward_hook(
        lambda mod, args, z: s.append(z.exp()) or z * 2
    ),
    "forward pre-hook": lambda m, s: m.lm_head.register_forward_pre_hook(
        lambda mod, args: s.extend(args) or (args[0] * 2,)
    ),
    "forward hook for all": lambda m, s: nn.modules.module.register_module_forward_hook(
        lambda mod, args, z: s.append(z + 0) if mod is m.lm_head else None
    ),
    "full backward hook for all": lambda m, s: nn.modules.module.register_module_full_backward_hook(
        lambda mod, gi, go: s.extend([*gi, *go]) if mod is m.lm_head else None
    ),
}


@pytest.mark.parametrize("name", cases(HOOKS))
def test_hooks_of_modules(name):
    plain, swapped, log = pair()
    found = []
    for model in (swapped, plain):
        heard: list[Any] = []
        handle = HOOKS[name](model, heard)
        found.append(results(model, FUSED["transpose"], backward=True))
        handle.remove()
        assert heard
        found[-1] += heard
    agree(*found)
    assert bool(log.fused) == (name == "forward pre-hook")
    assert bool(log.materialized) == (name != "forward pre-hook")


def test_whoever_comes_after_the_loss_hears_what_to_do():
    _, swapped, _ = pair()
    o = numbers()
    late = {
        "register_hook": lambda z, l: z.register_hook(lambda g: g),
        "retain_grad": lambda z, l: z.retain_grad(),
        "the gradient in logits": lambda z, l: torch.autograd.grad(l, z),
        "the gradient  in logits": lambda z, l: torch.autograd.grad(inputs=[o.x, z], outputs=[l]),
    }
    for what, do in late.items():
        z = swapped(o.x)
        loss = ce(z, o.y)
        with pytest.raises(RuntimeError) as raised:
            do(z, loss)
        said = str(raised.value)
        assert what.replace("  ", " ") in said
        assert "head 'lm_head'" in said
        assert "before the loss, or swap(model, head=None)" in said


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
def test_a_gradient_in_logits_by_backward(backward):
    """None comes after a fused loss, which PyTorch does not say but a warning does."""
    plain, swapped, _ = pair()
    o = numbers()
    z = swapped(o.x)
    backward(ce(z, o.y), inputs=[z])
    with pytest.warns(UserWarning, match=r"call logits.retain_grad\(\) before the loss"):
        assert z.grad is None
    found = []
    for model in (swapped, plain):
        z = model(o.x)
        z.retain_grad()
        backward(ce(z, o.y), inputs=[z])
        found.append([z.grad])
    agree(*found)


@pytest.mark.parametrize("name", ["hook", "retain_grad"])
def test_whoever_comes_after_a_loss_without_gradient(name):
    plain, swapped, _ = pair()
    found = []

    def way(z, o):
        with torch.no_grad():
            ce(z, o.y)
        return WATCHERS[name](z, o)

    for model in (swapped, plain):
        o = numbers()
        o.seen, o.after = [], lambda: None
        found.append(results(model, way, o, backward=True))
        o.after()
        found[-1] += o.seen
    agree(*found)


# Gradients switched off in part


def head_without_gradient(model, o):
    with torch.no_grad():
        return model(o.x)


def loss_without_gradient(model, o):
    z = model(o.x)
    with torch.no_grad():
        return ce(z, o.y)


def view_without_gradient(model, o):
    z = model(o.x)
    with torch.no_grad():
        v = z.view(-1, C)
    return ce(v, o.y)


def made_a_leaf(model, o):
    z = head_without_gradient(model, o).requires_grad_()
    ce(z, o.y).backward()
    return z.grad


def in_inference_mode(model, o):
    with torch.inference_mode():
        z = model(o.x)
        return ce(z, o.y), z.exp()


def loss_in_inference_mode(model, o):
    z = model(o.x)
    with torch.inference_mode():
        v = z[:, 1:]
        out = [ce(v, o.y[:, 1:]).clone(), v.sum().clone()]
    return [ce(z, o.y), z.exp().mean(), *(x.clone() for x in out)]


def frozen(model, o):
    model.requires_grad_(False)
    return model(o.x.detach())


def frozen_head(model, o):
    model.lm_head.requires_grad_(False)
    return ce(model(o.x), o.y)


def only_the_bias(model, o):
    model.requires_grad_(False)
    model.lm_head.bias.requires_grad_()
    return ce(model(o.x.detach()), o.y)


def chunked_by_hand(model, o):
    z = model(o.x)
    d = z.detach().requires_grad_()
    ce(d, o.y).backward()
    z.backward(d.grad)
    return model.lm_head.weight.grad, o.x.grad


def twice(model, o):
    loss = ce(model(o.x), o.y)
    loss.backward(retain_graph=True)
    loss.backward()
    return model.lm_head.weight.grad, o.x.grad


def saved_elsewhere(hooks):
    def f(model, o):
        with hooks():
            z = model(o.x)
            return ce(3 * torch.tanh(z / 3), o.y) + z.tanh().log_softmax(-1).exp().mean()

    return f


class Labels(torch.Tensor):
    pass


def in_context(model, o):
    with torch.device("cpu"):
        return ce(3 * torch.tanh(model(o.x) / 3), o.y)


PARTLY: dict[str, Any] = {
    "head without gradient": lambda m, o: ce(head_without_gradient(m, o), o.y),
    "head without, scale with": lambda m, o: ce(head_without_gradient(m, o) * o.s, o.y),
    "head without, row with": lambda m, o: ce(head_without_gradient(m, o) + o.row, o.y),
    "head without, cap of scaled": lambda m, o: ce(
        torch.tanh(head_without_gradient(m, o) / o.s), o.y
    ),
    "loss without gradient": loss_without_gradient,
    "view without gradient": view_without_gradient,
    "made a leaf": made_a_leaf,
    "inference mode": in_inference_mode,
    "loss in inference mode": loss_in_inference_mode,
    "frozen": lambda m, o: ce(frozen(m, o), o.y),
    "frozen, scale with": lambda m, o: ce(frozen(m, o) * o.s, o.y),
    "frozen, row with": lambda m, o: ce((frozen(m, o) + o.row).mT.mT, o.y),
    "frozen, view, scale with": lambda m, o: ce(frozen(m, o)[:, :] * o.s, o.y),
    "frozen, learnt targets": lambda m, o: F.cross_entropy(frozen(m, o).mT, o.probs.mT),
    "frozen, made a leaf": lambda m, o: ce(frozen(m, o).requires_grad_(), o.y),
    "detached in place": lambda m, o: ce((2 * m(o.x)).detach_(), o.y),
    "frozen head": frozen_head,
    "only the bias": only_the_bias,
    "chunked by hand": chunked_by_hand,
    "twice": twice,
    "logits as targets": lambda m, o: F.cross_entropy(m(o.x).mT, m(2 * o.x).mT),
    "two calls": lambda m, o: ce(m(o.x), o.y) + ce(m(o.x.flip(1)), o.y.flip(1)),
    "two calls, one sum": lambda m, o: ce(m(o.x) + m(2 * o.x), o.y),
    "saved on the CPU": saved_elsewhere(torch.autograd.graph.save_on_cpu),
    "saved as copies": saved_elsewhere(
        lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x)
    ),
    "in a device's context": in_context,
    "targets of another class": lambda m, o: ce(m(o.x), o.y.as_subclass(Labels)).as_subclass(
        torch.Tensor
    ),
    "tied": lambda m, o: ce(m(F.embedding(o.all_y, m.lm_head.weight)), o.y),
}


@pytest.mark.parametrize("name", cases(PARTLY))
def test_gradients_go_where_plain_ones_go(name):
    plain, swapped, _ = pair()
    found = []
    for model in (swapped, plain):
        o = numbers()
        out = PARTLY[name](model, o)
        out = [*out] if isinstance(out, list | tuple) else [out]
        if out[0].requires_grad:
            out[0].backward()
        leaves = [*model.parameters(), *(getattr(o, leaf) for leaf in o.learnt)]
        found.append([*out, *(leaf.grad for leaf in leaves)])
        assert [x.requires_grad for x in out] == [x.requires_grad for x in found[0][: len(out)]]
    agree(*found)


def test_new_memory_for_logits_is_refused():
    _, swapped, _ = pair()
    o = numbers()
    z = swapped(o.x)
    with pytest.raises(RuntimeError, match=r"no memory .* use copy_\(\)"):
        z.data = o.probs.detach()
    with torch.no_grad():
        z.copy_(o.probs)
    agree([z + 0], [o.probs])


RESHAPED: dict[str, Any] = {
    "unsqueeze_": lambda v: v.unsqueeze_(1),
    "squeeze_": lambda v: v.squeeze_(),
    "t_": lambda v: v.t_(),
    "transpose_": lambda v: v.transpose_(0, 1),
    "as_strided_": lambda v: v.as_strided_((2, 2), (1, 2)),
}


@pytest.mark.parametrize("name", cases(RESHAPED))
@pytest.mark.parametrize("is_computed", [True, False])
def test_another_shape_in_place_is_refused(is_computed, name):
    _, swapped, _ = pair()
    z = swapped(numbers().x)
    v = z[0]
    if is_computed:
        z.exp()
    with pytest.raises(RuntimeError, match=rf"in place by {name}: use {name[:-1]}$"):
        RESHAPED[name](v)
    assert v.shape == (T, C)


# What has changed since


def test_logits_that_were_read_before_a_step_of_the_optimizer_stay():
    plain, swapped, _ = pair()
    for model in (plain, swapped):
        o = numbers()
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        z = model(o.x)
        ce(z, o.y).backward()
        truth = z.detach().clone()
        optimizer.step()
        agree([z.detach(), z[1:].exp()], [truth, truth[1:].exp()])


STALE: dict[str, Any] = {
    "weight": lambda m, z, o: m.lm_head.weight.mul_(2),
    "bias": lambda m, z, o: m.lm_head.bias.zero_(),
    "SGD": lambda m, z, o: torch.optim.SGD(m.parameters(), 1.0).step(),
    "SGD, each": lambda m, z, o: torch.optim.SGD(m.parameters(), 1.0, foreach=True).step(),
    "SGD, fused": lambda m, z, o: torch.optim.SGD(m.parameters(), 1.0, fused=True).step(),
    "AdamW": lambda m, z, o: torch.optim.AdamW(m.parameters(), 1.0).step(),
    "AdamW, fused": lambda m, z, o: torch.optim.AdamW(m.parameters(), 1.0, fused=True).step(),
    "Adagrad, fused": lambda m, z, o: torch.optim.Adagrad(m.parameters(), 1.0, fused=True).step(),
    "features": lambda m, z, o: o.features.add_(1),
    "learnt scale": lambda m, z, o: o.s.mul_(2),
    "learnt row": lambda m, z, o: o.row.mul_(2),
}


@pytest.mark.parametrize("use", ["read", "loss", "read of the head"])
@pytest.mark.parametrize("name", cases(STALE))
def test_logits_of_what_was_changed_raise(name, use):
    _, swapped, log = pair()
    o = numbers()
    o.features = swapped.body(o.x).tanh()
    z = swapped.lm_head(o.features)
    v = (z + o.row) * o.s
    ce(z, o.y).backward()
    with torch.no_grad():
        STALE[name](swapped, z, o)
    with pytest.raises(
        RuntimeError, match=r"head 'lm_head' .* changed in place .* optimizer's step"
    ):
        v.sum() if use == "read" else z.sum() if use == "read of the head" else ce(v, o.y)
    assert log.fused == 1


OPERANDS: dict[str, Any] = {
    "index": (lambda z, v: z[:, v], torch.tensor([1, 4])),
    "index_select": (lambda z, v: z.index_select(1, v), torch.tensor([1, 4])),
    "mask": (lambda z, v: z[v], torch.arange(B * T).view(B, T) % 3 == 0),
    "scale": (lambda z, v: z * v, torch.tensor(0.7)),
    "divisor": (lambda z, v: z / v, torch.tensor([0.7], dtype=F64)),
    "temperatures": (lambda z, v: z / v, torch.full((T, 1), 0.7, dtype=F64)),
    "row": (lambda z, v: z + v, torch.ones(C, dtype=F64) * torch.arange(C)),
}


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("name", cases(OPERANDS))
def test_what_a_step_was_given_counts_as_it_was(name, is_read):
    """An index, a mask, a scale or a row that is changed in place later."""
    step, operand = OPERANDS[name]
    plain, swapped, log = pair(bias=False)
    found = []
    for model in (swapped, plain):
        v = operand.clone()
        z = step(model(numbers().x), v)
        if model is plain:
            z = z.detach().clone()
        v.logical_not_() if v.dtype == torch.bool else v.mul_(
            2
        ) if v.is_floating_point() else v.zero_()
        y = torch.arange(z.shape[:-1].numel())
        found.append([z.exp() if is_read else F.cross_entropy(z.flatten(0, -2), y)])
    agree(*found)
    assert log.fused == (not is_read)


# Checkpoints


CHECKPOINTS: dict[str, Any] = {
    "head": lambda m, o, c: ce(c(m, o.x), o.y),
    "loss": lambda m, o, c: c(ce, m(o.x), o.y),
    "scaled loss": lambda m, o, c: c(lambda z: ce(3 * torch.tanh(z / 3), o.y), m(o.x)),
    "both": lambda m, o, c: c(lambda x: ce(m(x), o.y), o.x),
    "both in turn": lambda m, o, c: c(ce, c(m, o.x), o.y),
    "body": lambda m, o, c: ce(m.lm_head(c(m.body, o.x)), o.y),
    "a view of the logits": lambda m, o, c: ce(c(lambda x: m(x)[:, 1:], o.x), o.y[:, 1:]),
    "logits and loss": lambda m, o, c: (lambda z, l: l + z.exp().mean())(
        *c(lambda x: (lambda z: (z, ce(z, o.y)))(m(x)), o.x)
    ),
}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", cases(CHECKPOINTS))
def test_checkpoints(name, use_reentrant):
    def way_of(model):
        def call(f, *args):
            return checkpoint(f, *args, use_reentrant=use_reentrant)

        def f(x):
            return None

        f.parameters = model.parameters
        return f, lambda _, o: CHECKPOINTS[name](model, o, call)

    plain, swapped, log = pair()
    agree(*(results(*way_of(model), backward=True) for model in (swapped, plain)))
    if not use_reentrant and name != "logits and loss":
        is_fused(log)


# Transforms and compilers


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def functional(model, parameters, o):
    return ce(torch.func.functional_call(model, parameters, (o.x,)), o.y)


def second_order(loss):
    """A Hessian-vector product in the head's weight, and through the features."""

    def f(model, o):
        leaves = [model.lm_head.weight, model.body.weight, o.x]
        first = torch.autograd.grad(loss(model(o.x), o), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    return f


def per_example(model, o):
    def loss(parameters, x, y):
        return ce(torch.func.functional_call(model, parameters, (x,)), y)

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
        parameters_of(model), o.x.detach(), o.all_y
    )


def primal_and_tangent(x):
    return [v.detach() for v in forward_ad.unpack_dual(x)]


def dual(model, o):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(o.x.detach(), torch.ones_like(o.x))
        return primal_and_tangent(ce(model(x), o.y))


def dual_scale(model, o):
    z = model(o.x)
    with forward_ad.dual_level():
        s = forward_ad.make_dual(o.s.detach(), torch.ones_like(o.s))
        return primal_and_tangent(ce(z * s, o.y))


def dual_logits(model, o):
    z = model(o.x)
    with forward_ad.dual_level():
        tangent = o.probs.detach()
        return primal_and_tangent(ce(forward_ad.make_dual(z, tangent), o.y))


def hessian_of_logits(model, o):
    return torch.func.hessian(lambda z: F.cross_entropy(z, o.y[1, 0]))(model(o.x)[1, 0])


def of_other_logits(trace):
    """A loss that is traced on deferred logits, then called with others."""

    def f(model, o):
        g = trace(lambda z: ce(z, o.y), model(o.x))
        others = (3 * o.probs.detach()).requires_grad_()
        return g(others), torch.autograd.grad(g(others), others)[0]

    return f


def traced(f, x):
    return torch.jit.trace(f, (x,), check_trace=False)


TRANSFORMS: dict[str, Any] = {
    "grad of parameters": lambda m, o: torch.func.grad(lambda p: functional(m, p, o))(
        parameters_of(m)
    ),
    "functional_call": lambda m, o: functional(m, {n: 2 * p for n, p in m.named_parameters()}, o),
    "grad of features": lambda m, o: torch.func.grad(lambda x: ce(m(x), o.y))(o.x),
    "vmap": lambda m, o: torch.func.vmap(lambda x: F.cross_entropy(m(x), o.all_y[0]))(o.x),
    "per-example gradients": per_example,
    "jvp": lambda m, o: torch.func.jvp(lambda x: ce(m(x), o.y), (o.x,), (torch.ones_like(o.x),)),
    "jacrev": lambda m, o: torch.func.jacrev(lambda x: ce(m(x), o.y, reduction="none"))(o.x),
    "jacfwd": lambda m, o: torch.func.jacfwd(lambda x: ce(m(x), o.y))(o.x),
    "forward mode": dual,
    "forward mode of a scale": dual_scale,
    "forward mode of logits": dual_logits,
    "second order": second_order(lambda z, o: ce(z, o.y)),
    "second order, capped": second_order(lambda z, o: ce(4 * torch.tanh(z * o.s / 4), o.y)),
    "second order, gather": second_order(
        lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]).square().mean()
    ),
    "second order, plain": second_order(lambda z, o: (z / 9).exp().mean()),
    "second order, both": second_order(lambda z, o: ce(z, o.y) + z.square().mean()),
    "second order, in place": second_order(lambda z, o: ce(z.mul_(0.3), o.y)),
    "vmap over scales": lambda m, o: (
        lambda z: torch.func.vmap(lambda s: ce(z * s, o.y))(torch.tensor([0.5, 2.0], dtype=F64))
    )(m(o.x)),
    "vmap over targets": lambda m, o: (
        lambda z: torch.func.vmap(lambda y: ce(z, y))(torch.stack([o.all_y, o.all_y.flip(0)]))
    )(m(o.x)),
    "vmap over logits": lambda m, o: torch.func.vmap(F.cross_entropy)(m(o.x), o.all_y),
    "grad of a scale": lambda m, o: (
        lambda z: torch.func.grad(lambda s: ce(z * s, o.y))(o.s.detach())
    )(m(o.x)),
    "jvp of a scale": lambda m, o: (
        lambda z: torch.func.jvp(lambda s: ce(z * s, o.y), (o.s,), (torch.ones_like(o.s),))
    )(m(o.x)),
    "grad of logits": lambda m, o: torch.func.grad(lambda z: ce(z, o.y))(m(o.x)),
    "vjp of logits": lambda m, o: (lambda value, pull: (value, *pull(torch.ones_like(value))))(
        *torch.func.vjp(lambda z: ce(z, o.y), m(o.x))
    ),
    "jvp of logits": lambda m, o: torch.func.jvp(
        lambda z: ce(z, o.y), (m(o.x),), (o.probs.detach(),)
    ),
    "Hessian of logits": hessian_of_logits,
    "trace of the model": lambda m, o: ce(traced(m, o.x)(o.x), o.y),
    "make_fx of the model": lambda m, o: ce(make_fx(m)(o.x.detach())(o.x.detach()), o.y),
    "make_fx of both": lambda m, o: make_fx(lambda x: ce(m(x), o.y))(o.x.detach())(o.x.detach()),
    "trace of the loss": of_other_logits(traced),
    "make_fx of the loss": of_other_logits(lambda f, x: make_fx(f)(x)),
    "export": lambda m, o: ce(torch.export.export(m, (o.x,)).module()(o.x), o.y),
    "symbolic trace": lambda m, o: ce(torch.fx.symbolic_trace(m)(o.x), o.y),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", cases(TRANSFORMS))
def test_transforms(name):
    plain, swapped, _ = pair()
    found = []
    for model in (swapped, plain):
        o = numbers()
        out = tree_leaves(TRANSFORMS[name](model, o))
        leaves = [*model.parameters(), o.x]
        total = sum(x.sum() for x in out)
        if total.requires_grad:
            out += torch.autograd.grad(total, leaves, allow_unused=True)
        found.append([None if x is None else x.detach() for x in out])
    agree(*found)


class Apart(nn.Module):
    """A model and its loss with breaks of the graph around the head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        h = self.model.body(x).tanh()
        torch._dynamo.graph_break()
        z = self.model.lm_head(h)
        torch._dynamo.graph_break()
        return ce(z, y)


def with_break(model, o):
    def f(x):
        z = model(x)
        torch._dynamo.graph_break()
        return ce(z, o.y)

    return compiled(f)(o.x)


def with_disabled_head(model, o):
    model.lm_head.forward = torch._dynamo.disable(model.lm_head.forward)
    return torch.compile(lambda x: ce(model(x), o.y), backend="aot_eager")(o.x)


def compiled(f, **options):
    return torch.compile(f, backend="aot_eager", **options)


COMPILED: dict[str, Any] = {
    "all": lambda m, o: compiled(lambda x: ce(m(x), o.y), fullgraph=True)(o.x),
    "model": lambda m, o: ce(compiled(m, fullgraph=True)(o.x), o.y),
    "loss": lambda m, o: compiled(ce)(m(o.x), o.y),
    "capped loss": lambda m, o: compiled(lambda z: ce(2 * (z / 2).tanh(), o.y))(m(o.x)),
    "some function": lambda m, o: compiled(lambda z: z.exp().mean())(m(o.x)),
    "edit": lambda m, o: compiled(lambda z: ce(z.clone().mul_(2), o.y))(m(o.x)),
    "body": lambda m, o: ce(m.lm_head(compiled(m.body, fullgraph=True)(o.x).tanh()), o.y),
    "break": with_break,
    "breaks around the head": lambda m, o: compiled(Apart(m))(o.x, o.y),
    "disabled head": with_disabled_head,
    "in place": lambda m, o: (m.compile(backend="aot_eager"), ce(m(o.x), o.y))[1],
}
COMPILED |= {
    "loss of computed logits": lambda m, o: (lambda z: (z.argmax(), compiled(ce)(z, o.y))[1])(
        m(o.x)
    ),
    "loss of watched logits": lambda m, o: (lambda z: (z.grad_fn, compiled(ce)(z, o.y))[1])(m(o.x)),
}
COMPILED_AND_FUSED = ["loss", "body"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", cases(COMPILED))
def test_compiled(name):
    plain, swapped, log = pair()
    found = []
    for model in (swapped, plain):
        torch._dynamo.reset()
        o = numbers()
        out = COMPILED[name](model, o)
        leaves = [*model.parameters(), o.x]
        found.append([out, *torch.autograd.grad(out, leaves)])
    agree(*found)
    if name in COMPILED_AND_FUSED:
        is_fused(log, 1)


def test_without_numbers():
    """On the meta device and of fake tensors, logits are plain."""
    _, swapped, log = pair()
    o = numbers()
    loss = ce(swapped.to("meta")(o.x.detach().to("meta")), o.y.to("meta"))
    assert loss.is_meta
    loss.backward()
    with FakeTensorMode():
        model = Model()
        swap(model)
        loss = ce(model(torch.randn(B, T, D)), torch.zeros(B, T, dtype=torch.int64))
        assert type(loss) is FakeTensor
        loss.backward()
        assert model.lm_head.weight.grad.shape == (C, D)
    assert not log.fused
    assert not log.materialized


# Whoever reads memory


def through_file(z):
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    return torch.load(file)


def at(z, address):
    return ctypes.c_double.from_address(address).value


READ: dict[str, Any] = {
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "numpy by force": lambda z: torch.from_numpy(z.numpy(force=True)),
    "asarray": lambda z: torch.from_numpy(np.asarray(z.detach())),
    "array": lambda z: torch.from_numpy(np.array(z.detach(), dtype=np.float64)),
    "ufunc": lambda z: torch.as_tensor(np.exp(z.detach())),
    "tolist": lambda z: z.tolist(),
    "list": lambda z: [v.sum().item() for v in z],
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "save": through_file,
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "deepcopy with gradient": copy.deepcopy,
    "copy": copy.copy,
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "dlpack of numpy": lambda z: torch.from_numpy(np.from_dlpack(z.detach())),
    "to_dlpack": lambda z: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(z.detach())),
    "address": lambda z: at(z, z.data_ptr()),
    "address of a part": lambda z: at(z, z[1, 2:].data_ptr()),
    "distance in memory": lambda z: z[1, 2:].data_ptr() - z.data_ptr(),
    "storage": lambda z: z.untyped_storage().nbytes(),
    "typed storage": lambda z: z.untyped_storage().tolist()[:99],
    "repr": repr,
    "str": str,
    "format": lambda z: f"{z[0, 0, 0]:.3f}",
    "item": lambda z: z[1, 2, 3].item(),
    "float": lambda z: float(z[0, 0, 0]),
    "int": lambda z: int(z[0, 0, 0] * 10),
    "bool": lambda z: bool(z[0, 0, 0] > 0),
    "contains": lambda z: 5.0 in z,
    "equal": lambda z: torch.equal(z, z.clone()) and torch.allclose(z, z + 0),
    "cpu": lambda z: z.cpu() + 0,
    "meta": lambda z: z.to("meta").shape,
    "numpy of steps": lambda z: torch.from_numpy((2 * z[:, 1:]).mT.numpy(force=True)),
    "new_tensor": lambda z: z.new_tensor([1.0, 2.0]),
    "as_tensor": lambda z: torch.as_tensor(z) + 0,
    "new": lambda z: z.new(2).shape,
    "zeros_like": lambda z: torch.zeros_like(z),
    "share_memory_": lambda z: z.detach().share_memory_().is_shared(),
    "is_shared": lambda z: z.is_shared(),
    "apply_": lambda z: z.detach().apply_(lambda v: 2 * v),
    "map_": lambda z: z.detach().map_(z.detach().clone(), lambda a, b: a + 2 * b),
    "resize_": lambda z: z.detach().resize_(3) + 0,
    "set_": lambda z: torch.empty(0, dtype=F64).set_(z.detach()),
    "collate": lambda z: torch.utils.data.default_collate([z.detach(), z.detach()]),
    "unfold": lambda z: z.unfold(1, 2, 1) + 0,
    "view of bytes": lambda z: z.detach().view(torch.uint8),
    "isnan": lambda z: torch.isnan(z).any(),
    "unique": lambda z: z.unique(),
    "multinomial": lambda z: seeded(torch.multinomial, z[:, -1].softmax(-1), 3),
    "gradcheck": lambda z: torch.autograd.gradcheck(
        torch.sin, z.detach()[0, :1, :3].clone().requires_grad_()
    ),
    "hash": lambda z: hash(z) == hash(z),
    "numpy with gradient": lambda z: torch.from_numpy(z.numpy()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of Tensor.__array__
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", cases(READ))
def test_whoever_reads_memory(name, grad):
    plain, swapped, _ = pair()
    found = []
    for model in (swapped, plain):
        with torch.set_grad_enabled(grad):
            z = model(numbers().x)
            try:
                out = READ[name](z)
            except RuntimeError as error:
                out = str(error)
        found.append(re.sub("grad_fn=<.*>", "", out) if isinstance(out, str) else out)
    mine, theirs = found
    assert isinstance(mine, type(theirs))
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    else:
        assert mine == theirs


def test_what_needs_a_type_only_computes_nothing():
    _, swapped, log = pair()
    o = numbers()
    z = swapped(o.x)
    loss = ce(z, o.y) + z.new_zeros(()) + z.new_ones((2,)).sum() + z.new_full((), 3.0)
    assert z.new_empty(3).dtype == z.dtype
    assert loss.requires_grad
    is_fused(log, 1)
    assert type(z).__name__ == "DeferredLogits"
    assert isinstance(z, torch.Tensor)


# Memory and work


ALIVE: dict[str, Any] = {
    "loss": lambda z, o: ce(z, o.y),
    "cap": lambda z, o: ce(3 * torch.tanh(z / 3), o.y),
    "logarithms": lambda z, o: z.log_softmax(-1).gather(-1, o.all_y[..., None]).mean(),
    "both": lambda z, o: (2 * (z * o.s).tanh()).mT.log_softmax(1).mean(1).mean(),
    "learnt temperatures": lambda z, o: ce(z / o.t, o.y),
    "plain": lambda z, o: ce(z, o.y) + z.exp().mean(),
    "plain, cap": lambda z, o: ce(3 * torch.tanh(z / 3) - 1.0, o.y),
    "plain, logarithms": lambda z, o: z.log_softmax(-1).exp().mean(),
    "watched": lambda z, o: (z.register_hook(lambda g: None), ce(z, o.y))[1],
    "edited": lambda z, o: ce(z.mul_(2), o.y),
}


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("name", cases(ALIVE))
def test_nothing_is_left_over(name, backward):
    """Features, logits and what came of them die with their last name, without a collection."""
    _, swapped, _ = pair(bias="temperature" not in name)
    o = numbers()

    def references():
        h = swapped.body(o.x).tanh()
        z = swapped.lm_head(h)
        v = z[:, :]
        loss = ALIVE[name](z, o)
        if backward:
            loss.backward()
        return [weakref.ref(x) for x in (h, z, v, loss)]

    references()  # what PyTorch does at first, such as imports, may leave cycles
    gc.collect()
    gc.disable()
    try:
        assert [r() for r in references()] == [None] * 4
    finally:
        gc.enable()


def test_numbers_keep_no_features():
    _, swapped, _ = pair()
    with torch.no_grad():
        h = swapped.body(numbers().x).tanh()
        z = swapped.lm_head(h)
        z.exp()
        features = weakref.ref(h)
        del h
    assert features() is None
    assert z.isfinite().all()


class Kernels:
    """Calls of the head's kernel: what gradients each was asked for."""

    def __init__(self, monkeypatch):
        self.wants = []
        real = kernels.head
        monkeypatch.setattr(kernels, "head", lambda *args: self.note(args[-1]) or real(*args))

    def note(self, wants):
        self.wants.append(any(wants))


def test_a_loss_computes_its_gradient_once(monkeypatch):
    _, swapped, _ = pair()
    o, calls = numbers(), Kernels(monkeypatch)
    z = swapped(o.x)
    ce(z, o.y).backward()
    assert calls.wants == [True]
    calls.wants.clear()
    ce(swapped(o.x), o.y, reduction="none").sum().backward()
    assert calls.wants == [False, True]
    calls.wants.clear()
    with torch.no_grad():
        ce(swapped(o.x), o.y)
    ce(swapped.requires_grad_(False)(o.x.detach()), o.y)
    assert calls.wants == [False, False]


def test_logits_that_are_kept_take_no_memory():
    _, swapped, log = pair()
    o, kept = numbers(), []
    with Watch() as watch:
        for _ in range(3):
            z = swapped(o.x)
            v, l = z[:, 1:].mT, (3 * torch.tanh(z / 3)).log_softmax(-1)
            loss = F.cross_entropy(v, o.y[:, 1:]) - l.gather(-1, o.all_y[..., None]).mean()
            loss.backward()
            kept += [z, v, l, loss]
    assert watch.made == []
    assert watch.heads == 3 * 3  # the mean's, and of each row the value and the gradient
    is_fused(log, 6)


def test_numbers_are_computed_once():
    """For all that came from them, which share memory as PyTorch's do."""
    _, swapped, log = pair()
    z = swapped(numbers().x)
    v = z[:, 1:]
    with Watch() as watch:
        z.exp().sum() + z.square().sum() + v.sum()
    assert sum("mm" in name for name, _ in watch.made) == 1
    assert sum(log.materialized.values()) == 1
    assert z.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


# The warning and the report


def heard(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [w for w in caught if w.category is MaterializedLogits]


@pytest.mark.parametrize("model", ["one", "another"])
def test_the_warning_comes_once_a_head_and_says_why_and_where(model):
    _, swapped, log = pair()
    x = numbers().x
    (one,) = heard(lambda: swapped(x).exp())
    said = str(one.message)
    assert re.search(rf"head lm_head were computed.*: exp at .*{HERE}:\d+ in <lambda>\.", said)
    assert "report of swap() counts how often" in said
    assert "swap(model, head=None)" in said
    assert one.filename.endswith(HERE)
    assert not heard(lambda: swapped(x).exp())
    assert not heard(lambda: swapped(x).softmax(-1))
    assert sum(log.materialized.values()) == 3


def test_the_warning_of_a_forward_hook():
    _, swapped, log = pair()
    swapped.lm_head.register_forward_hook(lambda *args: None)
    (one,) = heard(lambda: swapped(numbers().x))
    assert "forward hooks of the head" in str(one.message)
    assert [*log.materialized.values()] == [1]


@pytest.mark.parametrize("name", ["loss", "eval", "no_grad", "frozen", "inference", "hook in eval"])
def test_there_is_no_warning_where_memory_does_not_matter(name):
    _, swapped, _ = pair()
    o = numbers()

    def do():
        swapped.train("eval" not in name)
        if name == "loss":
            ce(swapped(o.x), o.y).backward()
        elif name == "frozen":
            swapped.requires_grad_(False)(o.x.detach()).exp()
        elif name == "inference":
            with torch.inference_mode():
                swapped(o.x).exp()
        else:
            if "hook" in name:
                swapped.lm_head.register_forward_hook(lambda *args: None)
            with torch.set_grad_enabled(name != "no_grad"):
                swapped(o.x).exp()

    assert not heard(do)
    swapped.lm_head._forward_hooks.clear()
    swapped.train().requires_grad_()
    assert len(heard(lambda: swapped(o.x).exp())) == 1  # what came before is no matter


def test_the_report_counts():
    torch.manual_seed(0)
    model = Model().double()
    report = swap(model)
    log, o = report.heads["lm_head"], numbers()
    for _ in range(2):
        ce(model(o.x), o.y)
    for _ in range(3):
        model(o.x).exp()
    model(o.x).square()
    first, second = log.materialized.most_common()
    assert (log.fused, first[1], second[1]) == (2, 3, 1)
    *table, head, one, two = str(report).splitlines()
    assert "head lm_head: 2 losses without logits" in head
    assert one == f"  logits computed 3 x: {first[0]}"
    assert two == f"  logits computed 1 x: {second[0]}"
    assert first[0].startswith("exp at ")
    assert second[0].startswith("pow at ")
    assert "2 modules changed" in table


# Everything that PyTorch has samples of


WITHOUT_NUMBERS = {"empty_like", "new_empty", "new_empty_strided", "empty_permuted"}
IN_ANOTHER_SHAPE = {  # in place, which is refused; dropout3d calls unsqueeze_
    *("unsqueeze", "squeeze", "t", "transpose", "swapaxes", "swapdims", "as_strided"),
    "nn.functional.dropout3d",
}
SHARES = 8


def value_and_gradient(function, model, sample):
    """Of an operator on logits in place of its first argument; or the error's type."""
    x = sample.input.detach().clone().requires_grad_()
    args, kwargs = copy.deepcopy((sample.args, sample.kwargs))
    z = model(x)
    try:
        out = tree_leaves(seeded(lambda: function(z, *args, **kwargs)))
        out = [v for v in out if isinstance(v, torch.Tensor)]
        pairs = [(v, 1 + torch.arange(v.numel()).view(v.shape) % 3) for v in out if v.requires_grad]
        total = sum((v * factors).sum().abs() for v, factors in pairs)
        gradients = torch.autograd.grad(total, x, materialize_grads=True) if pairs else ()
    except Exception as error:
        return type(error)
    return [v.detach() for v in (*out, *gradients)]


def difference(mine, theirs):
    if isinstance(mine, type) or isinstance(theirs, type):
        return "" if mine is theirs else f"{mine} for {theirs}"
    options = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}
    try:
        torch.testing.assert_close([*map(plain_tensor, mine)], theirs, **options)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def plain_tensor(x):
    return x if type(x) is torch.Tensor else x + 0


def samples(op):
    """Few, whose first argument the logits of a head can be."""
    for sample in itertools.islice(op.sample_inputs("cpu", F64), 40):
        x = sample.input
        is_tensor = isinstance(x, torch.Tensor) and x.dtype == F64 and x.dim() >= 2
        if is_tensor and 0 < x.numel() < 3000 and x.shape[-1] > 1:
            yield sample


@pytest.mark.parametrize("share", range(SHARES))
def test_every_operator_of_pytorch(share):
    """On deferred logits in place of its first argument: the value, the gradient or the error."""
    ops = [op for op in database("op_db") if F64 in op.dtypes and op.name not in WITHOUT_NUMBERS]
    calls = [(op, False, op.op) for op in ops]
    calls += [(op, True, op.inplace_variant) for op in ops if op.inplace_variant is not None]
    calls = [c for c in calls if not (c[1] and c[0].name in IN_ANOTHER_SHAPE)][share::SHARES]
    count, wrong = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, in_place, function in calls:
            for sample in itertools.islice(samples(op), 2):
                n = sample.input.shape[-1]
                plain = nn.Linear(n, n, bias=False, dtype=F64)
                nn.init.eye_(plain.weight)  # the logits are the sample's numbers
                swapped = copy.deepcopy(plain)
                swap(swapped)
                found = [value_and_gradient(function, m, sample) for m in (swapped, plain)]
                count += 1
                if said := difference(*found):
                    name = f"{op.name} {op.variant_test_name}{' in place' * in_place}"
                    shape = tuple(sample.input.shape)
                    wrong.append(f"{name} {shape} {sample.args} {sample.kwargs}: {said}"[:400])
    assert count > 5
    assert not wrong, "\n".join([f"{len(wrong)} of {count}:", *wrong])
