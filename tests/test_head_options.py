"""Scale, soft-cap, z-loss, log-probabilities, entropy and stats against logits in memory.

The plain expression is written out here. In float64 it is the truth; in float32 and bfloat16 ours
may be as far from that as the plain one is, but for rounding (see `tolerance`). Hypothesis searches
the combinations of options; numbers come from a seeded generator.
"""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import faults
from torch.func import grad, jvp, vmap

import torch_nnmath.functional as ours
from torch_nnmath import kernels, nn
from torch_nnmath.formulas import LinearCrossEntropy
from torch_nnmath.kernels import blocked, choice

F64 = torch.float64
D, C = 4, 7
IGNORED = -100
Tensors = dict[str, torch.Tensor]


def capped(z, s, cap):
    z = z * s
    return z if cap is None else cap * torch.tanh(z / cap)


def plain_loss(v, tensors: Tensors, reduction, smoothing, base, z_loss):
    """Cross entropy of the logits (N, C) or (N, C, K) that are left, and the z-loss."""
    t, w = tensors["t"], tensors.get("w")
    m = v.detach().amax(1, keepdim=True)  # PyTorch's own logsumexp has a less exact derivative
    q = (m + (v - m).exp().sum(1, keepdim=True).log()).squeeze(1).square()
    keep = torch.ones_like(q, dtype=torch.bool) if t.is_floating_point() else t != IGNORED
    if w is None or not (w.requires_grad or torch._C._functorch.is_gradtrackingtensor(w)):
        c = F.cross_entropy(v, t, w, reduction=reduction, label_smoothing=smoothing)
    else:  # PyTorch has no derivative in class weights
        w_of_classes = w.view(-1, *[1] * (v.dim() - 2))
        n = keep.sum()
        if not t.is_floating_point():
            y = t.clamp(min=0)
            n = (keep * w[y]).sum()
            t = F.one_hot(y, C).movedim(-1, 1).to(v.dtype)
        t = ((1 - smoothing) * t + smoothing / C) * w_of_classes
        c = torch.where(keep, -(t * v.log_softmax(1)).sum(1), 0)
        c = {"none": c, "sum": c.sum(), "mean": c.sum() / n}[reduction]
    q = z_loss * torch.where(keep, q, 0)
    q = {"none": q, "sum": q.sum(), "mean": q.sum() / keep.sum()}[reduction]
    return c / math.log(base) + q if z_loss else c / math.log(base)


def plain_logits(tensors: Tensors, s, cap):
    """(N, C), or (N, C, K) of a weight (C, K, D)."""
    x, W, b = tensors["x"], tensors["W"], tensors.get("b")
    return capped(F.linear(x, W.flatten(0, -2), None if b is None else b.flatten()), s, cap).view(
        len(x), *W.shape[:-1]
    )


class Drawn:
    """A combination of options and the numbers for it."""

    def __init__(
        self, data: Any, dtypes: Any = (F64, torch.float32, torch.bfloat16), z_loss: float = 0.01
    ):
        def one_of(*options: Any) -> Any:
            return data.draw(st.sampled_from(options))

        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=F64, generator=generator).to(self.dtype)

        self.dtype, N = one_of(*dtypes), one_of(5, 1, 33, 70)
        positions = (2,) * one_of(0, 0, 1)
        self.tensors = {"x": normal(N, D), "W": normal(C, *positions, D)}
        if one_of(False, True):
            self.tensors["b"] = normal(C, *positions)
        if one_of(False, True):
            self.tensors["w"] = normal(C).abs() + 0.1
        kind = one_of("classes", "ignored", "probabilities")
        if kind == "probabilities":
            self.tensors["t"] = normal(N, C, *positions).softmax(1)
        else:
            y = torch.randint(C, (N, *positions), generator=generator)
            self.tensors["t"] = y
            if kind == "ignored":
                y[torch.rand(y.shape, generator=generator) < 0.4] = IGNORED
                y.view(-1)[0] = 0  # the mean of nothing is nan
        scale = one_of(1.0, -0.7, 0.0, 20.0, 3, "tensor")
        if scale == "tensor":
            self.tensors["s"] = normal()
        self.scale = scale
        self.options = {
            "reduction": one_of("mean", "sum", "none"),
            "base": one_of(math.e, 2.0, 0.5),
        }
        self.smoothing = one_of(0.0, 0.2)
        self.cap, self.z_loss = one_of(None, 1.5, 30.0), one_of(0.0, 0.3, z_loss)
        upstream = torch.randn(N, *positions, dtype=F64, generator=generator)
        self.upstream = upstream.bfloat16().double()  # the same at every precision

    @property
    def leaves(self) -> list[str]:
        return [k for k, v in self.tensors.items() if v.is_floating_point() and k != "w"]

    def plain(self, tensors: Tensors) -> torch.Tensor:
        v = plain_logits(tensors, tensors.get("s", self.scale), self.cap)
        return plain_loss(v, tensors, smoothing=self.smoothing, z_loss=self.z_loss, **self.options)

    def of_ours(self, tensors: Tensors) -> dict[str, Any]:
        return {
            **self.options,
            "weight": tensors.get("w"),
            "label_smoothing": self.smoothing,
            "logit_scale": tensors.get("s", self.scale),
            "softcap": self.cap,
            "z_loss": self.z_loss,
        }

    def head(self, tensors: Tensors, **more: Any) -> Any:
        x, W, t = (tensors[name] for name in "xWt")
        options = self.of_ours(tensors) | more
        return ours.linear_cross_entropy(x, W, t, linear_bias=tensors.get("b"), **options)

    def on_logits(self, tensors: Tensors, **more: Any) -> Any:
        z = plain_logits(tensors, 1, None)
        return ours.cross_entropy(z, tensors["t"], **self.of_ours(tensors), **more)

    def results(self, f: Any, change: Any = lambda x: x) -> list[torch.Tensor]:
        """The value and every gradient."""
        tensors = {
            k: change(v).detach().requires_grad_(k in self.leaves) if v.is_floating_point() else v
            for k, v in self.tensors.items()
        }
        value = f(tensors)
        upstream = self.upstream.view_as(value).to(value.dtype) if value.dim() else None
        gradients = torch.autograd.grad(value, [tensors[k] for k in self.leaves], upstream)
        return [value.detach(), *gradients]


def searched(number: int) -> Any:
    return settings(deadline=None, derandomize=True, max_examples=number)


@pytest.fixture
def several_blocks():
    """Blocks of 32 rows, slices of few classes, and kernels for few entries too."""
    with (
        mock.patch.object(blocked, "BLOCK_BYTES", (0, 1)),
        mock.patch.object(blocked, "SLICE", 64),
        mock.patch.object(choice, "FEW", 0),
    ):
        yield


@pytest.mark.parametrize("twin", ["head", "on_logits"])
def test_every_combination(several_blocks, twin):
    """Value and every gradient, at every precision."""

    @searched(400)
    @given(st.data())
    def search(data: Any) -> None:
        drawn = Drawn(data)
        found = faults(
            ["value", *drawn.leaves],
            drawn.results(getattr(drawn, twin)),
            drawn.results(drawn.plain),
            lambda change: drawn.results(drawn.plain, change),
        )
        assert not found, "\n".join(found)

    search()


def test_second_order_and_forward_mode_of_every_combination(several_blocks):
    @searched(150)
    @given(st.data())
    def search(data: Any) -> None:
        drawn = Drawn(data, [F64], z_loss=-0.1)
        names = [*drawn.leaves, *["w"] * ("w" in drawn.tensors)]
        points = tuple(drawn.tensors[name] for name in names)
        directions = tuple(v.sin() + 0.3 for v in points)

        def scalar(f: Any) -> Any:
            def of(*values: torch.Tensor) -> torch.Tensor:
                value = f(drawn.tensors | dict(zip(names, values, strict=True)))
                return (value * drawn.upstream.view_as(value)).sum() if value.dim() else value

            return of

        found = []
        for f in (drawn.head, drawn.on_logits, drawn.plain):
            leaves = [v.clone().requires_grad_() for v in points]
            first = torch.autograd.grad(scalar(f)(*leaves), leaves, create_graph=True)
            along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
            second = torch.autograd.grad(along, leaves)
            tangent = jvp(scalar(f), points, directions)[1]
            found.append([tangent.detach(), *(g.detach() for g in first), *second])
        for twin in found[:2]:
            for got, want in zip(twin, found[2], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    search()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [math.e, 2.0])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("scale", [1.0, -3.0])
@pytest.mark.parametrize("of", ["log_probs", "entropy", "both"])
def test_log_probs_and_entropy(several_blocks, of, scale, cap, base, dtype):
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(s, dtype=F64, generator=generator) for s in ((70, D), (C, D), (C,))]
    points = [v.to(dtype) for v in points]
    y = torch.randint(C, (70,), generator=generator)
    g, k = torch.randn(2, 70, dtype=F64, generator=generator)

    def both(x, W, b):
        return ours.linear_log_probs(
            *(x, W, y),
            linear_bias=b,
            base=base,
            logit_scale=scale,
            softcap=cap,
            return_entropy=True,
        )

    def plain(x, W, b):
        l = F.log_softmax(capped(F.linear(x, W, b), scale, cap), 1)
        pair = l.gather(1, y[:, None])[:, 0], -(l.exp() * l).sum(1)
        return tuple(v / math.log(base) for v in pair)

    def results(f, change=lambda x: x):
        leaves = [change(v).detach().requires_grad_() for v in points]
        log_probs, h = f(*leaves)
        of_value = {"log_probs": (g, 0 * k), "entropy": (0 * g, k), "both": (g, k)}[of]
        pairs = zip(of_value, (log_probs, h), strict=True)
        value = sum((u.to(v.dtype) * v).sum() for u, v in pairs if u.any())
        return [log_probs.detach(), h.detach(), *torch.autograd.grad(value, leaves)]

    names = ["log_probs", "entropy", "x", "W", "b"]
    found = faults(names, results(both), results(plain), lambda change: results(plain, change))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("of", ["log_probs", "entropy", "both"])
def test_second_order_of_log_probs_and_entropy(several_blocks, of, cap):
    """A Hessian-vector product, and the gradient of that."""
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(s, dtype=F64, generator=generator) for s in ((70, D), (C, D), (C,))]
    y = torch.randint(C, (70,), generator=generator)
    u = torch.randn(2, 70, dtype=F64, generator=generator)
    u = u * torch.tensor({"log_probs": (1, 0), "entropy": (0, 1), "both": (1, 1)}[of])[:, None]

    def mine(x, W, b):
        return ours.linear_log_probs(x, W, y, linear_bias=b, softcap=cap, return_entropy=True)

    def plain(x, W, b):
        l = F.log_softmax(capped(F.linear(x, W, b), 1, cap), 1)
        return l.gather(1, y[:, None])[:, 0], -(l.exp() * l).sum(1)

    found = []
    for f in (mine, plain):
        leaves = [v.clone().requires_grad_() for v in points]
        value = sum((g * v).sum() for g, v in zip(u, f(*leaves), strict=True) if g.any())
        results = []
        for _ in range(3):
            first = torch.autograd.grad(value, leaves, create_graph=True)
            results += [g.detach() for g in first]
            value = sum((g * v.detach().cos()).sum() for g, v in zip(first, leaves, strict=True))
        found.append(results)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_log_probs_of_ignored_rows_are_zero(several_blocks):
    x, W = torch.randn(40, D, dtype=F64), torch.randn(C, D, dtype=F64, requires_grad=True)
    y = torch.randint(C, (40,))
    y[::3] = IGNORED
    nan = x.clone()
    nan[::3] = math.nan
    found = []
    for features in (x, nan):
        features = features.clone().requires_grad_()
        s = torch.tensor(0.7, dtype=F64, requires_grad=True)
        both = ours.linear_log_probs(
            features, W, y, logit_scale=s, softcap=2.0, return_entropy=True
        )
        for v in both:
            assert (v[::3] == 0).all()
            assert (v[1::3] != 0).all()
        gradients = torch.autograd.grad(sum(v.sin().sum() for v in both), (features, W, s))
        assert (gradients[0][::3] == 0).all()
        found.append(gradients)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("twin", ["head", "logits"])
def test_ignored_rows_are_out_of_everything(twin):
    """Not a finite number in them, and the learnt scale and the z-loss do not see it."""
    x, W = torch.randn(6, D, dtype=F64), torch.randn(C, D, dtype=F64)
    y = torch.tensor([0, IGNORED, 2, 3, IGNORED, 1])
    found = []
    for filler in (0.0, math.nan, math.inf):
        x[y == IGNORED] = filler
        z = (x if twin == "head" else torch.where((y == IGNORED)[:, None], filler, x @ W.T)).clone()
        leaves = [z.requires_grad_(), torch.tensor(0.7, dtype=F64).requires_grad_()]
        options = {"logit_scale": leaves[1], "softcap": 2.0, "z_loss": 0.3, "return_stats": True}
        if twin == "head":
            loss, stats = ours.linear_cross_entropy(leaves[0], W, y, **options)
        else:
            loss, stats = ours.cross_entropy(leaves[0], y, **options)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in gradients), leaves)
        found.append([loss, *gradients, *second, *stats])
        for v in (gradients[0], second[0], *stats):
            ignored = v[y == IGNORED]
            assert (ignored == (-1 if v is stats.predicted else 0)).all()
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("masked", [False, True])
def test_stats(several_blocks, monkeypatch, masked, positions, wants, reduction, target):
    """Every field, of rows in several blocks; the loss beside them is the same; no gradient."""
    if masked:  # as on a GPU, where ignored rows are not gathered
        monkeypatch.setattr(blocked, "_is_counted", lambda keep: False)
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(s, dtype=F64, generator=generator) for s in ((70, D), (C, *positions, D)))
    t = torch.randint(C, (70, *positions), generator=generator)
    if target == "probabilities":
        t = torch.rand(70, C, *positions, dtype=F64, generator=generator)
    else:
        t[::7] = IGNORED
    x, W = x.requires_grad_(wants), W.requires_grad_(wants)
    options = {"reduction": reduction, "base": 2.0, "softcap": 2.0, "z_loss": 0.3}
    loss, stats = ours.linear_cross_entropy(x, W, t, **options, return_stats=True)
    z = (x @ W.flatten(0, -2).T).view(70, C, *positions)
    other, twins = ours.cross_entropy(z, t, **options, return_stats=True)
    torch.testing.assert_close(loss, ours.linear_cross_entropy(x, W, t, **options))
    torch.testing.assert_close(loss, other)
    v = capped(z.detach(), 1, 2.0)
    keep = t != IGNORED if target == "classes" else torch.ones(70, *positions, dtype=torch.bool)
    l = v.log_softmax(1) / math.log(2)
    label = t if target == "classes" else t.argmax(1)
    want = {
        "lse": v.logsumexp(1) * keep,
        "entropy": -(v.softmax(1) * l).sum(1) * keep,
        "predicted": torch.where(keep, v.argmax(1), -1),
        "correct": (v.argmax(1) == label) & keep,
        "z_loss": 0.3 * v.logsumexp(1).square() * keep,
    }
    assert stats._fields == tuple(want)
    assert 0 < want["correct"].sum() < keep.sum()
    for its in (stats, twins):
        for name, value in want.items():
            got = getattr(its, name)
            assert not got.requires_grad
            torch.testing.assert_close(got, value)


def test_stats_cost_no_second_product(monkeypatch):
    calls = []
    real = kernels.head
    monkeypatch.setattr(kernels, "head", lambda *args: calls.append(args[-1]) or real(*args))
    x, W = torch.randn(6, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    y = torch.randint(C, (6,))
    loss, _ = ours.linear_cross_entropy(x, W, y, z_loss=0.3, softcap=2.0, return_stats=True)
    loss.backward()
    assert calls == [[True, True, False, False, False]]
    calls.clear()
    loss, _ = ours.linear_cross_entropy(x, W, y, reduction="none", return_stats=True)
    assert calls == [[False] * 5]


def test_the_z_loss_of_a_mean_is_over_the_kept_rows_without_class_weights():
    z = torch.randn(5, C, dtype=F64)
    y, w = torch.tensor([0, IGNORED, 2, 1, IGNORED]), torch.linspace(1, 9, C, dtype=F64)
    for base in (math.e, 10.0):
        without = ours.cross_entropy(z, y, w, base=base)
        with_it = ours.cross_entropy(z, y, w, base=base, z_loss=0.5)
        want = 0.5 * z.logsumexp(1)[[0, 2, 3]].square().mean()
        torch.testing.assert_close(with_it - without, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_where_all_rows_are_ignored(reduction):
    x = torch.randn(4, D, requires_grad=True)
    W = torch.randn(C, D, requires_grad=True)
    y = torch.full((4,), IGNORED)
    loss = ours.linear_cross_entropy(x, W, y, reduction=reduction, z_loss=0.3, softcap=2.0)
    assert loss.isnan() if reduction == "mean" else loss == 0
    for g in torch.autograd.grad(loss, (x, W)):
        assert (g == 0).all()
    twin = ours.cross_entropy(x @ W.T, y, reduction=reduction, z_loss=0.3, softcap=2.0)
    torch.testing.assert_close(twin, loss, equal_nan=True)


@pytest.mark.parametrize("options", [{"z_loss": 0.3}, {"softcap": 2.0}, {"logit_scale": 2.0}])
def test_no_rows(options):
    x, W = torch.zeros(0, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    y = torch.zeros(0, dtype=torch.int64)
    loss, stats = ours.linear_cross_entropy(x, W, y, reduction="sum", return_stats=True, **options)
    assert loss == 0
    assert all(v.shape == (0,) for v in stats)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, W)))
    assert ours.linear_log_probs(x, W, y).shape == (0,)


def test_logits_of_minus_infinity_have_no_part_in_the_entropy():
    """As where classes are masked by the bias."""
    x, W = torch.randn(5, D, dtype=F64), torch.randn(C, D, dtype=F64)
    b = torch.zeros(C, dtype=F64)
    b[2:4] = -math.inf
    rest = [0, 1, 4, 5, 6]
    y = torch.tensor([0, 1, 4, 5, 6])
    found = []
    for W_, b_, y_ in ((W, b, y), (W[rest], None, torch.arange(5))):
        leaves = [x.clone().requires_grad_(), W_.clone().requires_grad_()]
        both = ours.linear_log_probs(*leaves, y_, linear_bias=b_, return_entropy=True)
        first = torch.autograd.grad(sum(v.sin().sum() for v in both), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        found.append([*both, *first, *second])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got[rest] if got.shape == W.shape else got, want)
        assert got.shape != W.shape or (got[2:4] == 0).all()


def test_entropy_of_nearly_certain_rows_keeps_its_digits():
    """Near 0 it is a sum of small terms, not the difference of large ones."""
    W = torch.eye(3)
    x = torch.tensor([[40.0, 5.0, 0.0], [200.0, 190.0, 0.0]])
    _, h = ours.linear_log_probs(x, W, torch.tensor([0, 0]), return_entropy=True)
    l = x.double().log_softmax(1)
    torch.testing.assert_close(h.double(), -(l.exp() * l).sum(1), rtol=1e-4, atol=6e-8)


def test_a_tied_weight_trains_as_one():
    """One parameter gets the gradients of both of its uses."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(C, D, dtype=F64)
    loss = nn.LinearCrossEntropyLoss(D, C, dtype=F64, softcap=2.0, z_loss=0.1)
    loss.linear.weight = embedding.weight
    assert len({*embedding.parameters(), *loss.parameters()}) == 1
    plain = torch.nn.Embedding(C, D, dtype=F64)
    plain.load_state_dict(embedding.state_dict())
    words = torch.randint(C, (20,))
    optimizers = [torch.optim.Adam(e.parameters(), 0.1) for e in (embedding, plain)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        mine = loss(embedding(words[:-1]).tanh(), words[1:])
        v = capped(plain(words[:-1]).tanh() @ plain.weight.T, 1, 2.0)
        theirs = F.cross_entropy(v, words[1:]) + 0.1 * v.logsumexp(1).square().mean()
        torch.testing.assert_close(mine, theirs)
        for c in (mine, theirs):
            c.backward()
        torch.testing.assert_close(embedding.weight.grad, plain.weight.grad)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(embedding.weight, plain.weight)


@pytest.mark.parametrize(
    "make", [lambda **o: nn.LinearCrossEntropyLoss(D, C, **o), nn.CrossEntropyLoss]
)
def test_modules(make):
    learnt = torch.nn.Parameter(torch.tensor(0.7))
    module = make(logit_scale=learnt, softcap=2.0, z_loss=0.1, return_stats=True)
    assert dict(module.named_parameters())["logit_scale"] is learnt
    assert "softcap=2.0" in repr(module)
    assert "z_loss=0.1" in repr(module)
    assert "logit_scale=Parameter" in repr(module)
    x = torch.randn(5, D if isinstance(module, nn.LinearCrossEntropyLoss) else C)
    y = torch.randint(C, (5,))
    loss, stats = module(x, y)
    loss.backward()
    weight = module.linear.weight if hasattr(module, "linear") else torch.eye(C)
    options = {"softcap": 2.0, "z_loss": 0.1, "return_stats": True}
    value, want = ours.linear_cross_entropy(x, weight, y, logit_scale=0.7, **options)
    torch.testing.assert_close(loss, value)
    for got, other in zip(stats, want, strict=True):
        torch.testing.assert_close(got, other)
    h = 1e-3
    up, down = (
        ours.linear_cross_entropy(
            x.double(), weight.double(), y, logit_scale=0.7 + d, softcap=2.0, z_loss=0.1
        )
        for d in (h, -h)
    )
    torch.testing.assert_close(learnt.grad.double(), (up - down) / (2 * h), rtol=1e-4, atol=1e-6)
    fixed = make(logit_scale=torch.tensor(2.0))
    assert [*dict(fixed.named_buffers())][-1] == "logit_scale"
    assert fixed.double().logit_scale.dtype == F64
    default = make()
    names = [
        name for name, _ in itertools.chain(default.named_parameters(), default.named_buffers())
    ]
    assert "logit_scale" not in names
    assert "scale" not in repr(default)


def test_per_sample_gradients_through_every_option():
    x, W, y = torch.randn(3, D, dtype=F64), torch.randn(C, D, dtype=F64), torch.tensor([0, 2, 6])
    s = torch.tensor(1.3, dtype=F64)

    def mine(s, W, x, y):
        x, y = x[None], y[None]
        return ours.linear_cross_entropy(x, W, y, logit_scale=s, softcap=2.0, z_loss=0.2)

    def plain(s, W, x, y):
        v = capped(x[None] @ W.T, s, 2.0)
        return F.cross_entropy(v, y[None]) + 0.2 * v.logsumexp(1).square().mean()

    for got, want in zip(
        *(vmap(grad(f, (0, 1)), (None, None, 0, 0))(s, W, x, y) for f in (mine, plain)), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stats_and_entropy_when_compiled(reduction):
    x, W = torch.randn(6, D, dtype=F64), torch.randn(C, D, dtype=F64)
    y = torch.tensor([0, 1, IGNORED, 3, 4, 5])

    def f(x, W, s):
        options = {"logit_scale": s, "softcap": 2.0, "z_loss": 0.1, "return_stats": True}
        loss, stats = ours.linear_cross_entropy(x, W, y, reduction=reduction, **options)
        log_probs, h = ours.linear_log_probs(x, W, y, return_entropy=True)
        return loss.sum() + (log_probs * h).sum(), *stats

    found = []
    for g in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves = [v.clone().requires_grad_() for v in (x, W, torch.tensor(0.7, dtype=F64))]
        value, *stats = g(*leaves)
        found.append([value, *stats, *torch.autograd.grad(value, leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


PEAK = """
import resource, sys, torch
from torch_nnmath import functional as F
rows, of = int(sys.argv[1]), sys.argv[2]
x, W = torch.randn(rows, 16, requires_grad=True), torch.randn(32000, 16, requires_grad=True)
y, s = torch.randint(32000, (rows,)), torch.tensor(0.7, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if of == "loss":
    options = {"logit_scale": s, "softcap": 20.0, "z_loss": 0.1}
    loss, _ = F.linear_cross_entropy(x, W, y, return_stats=True, **options)
else:
    pair = F.linear_log_probs(x, W, y, logit_scale=s, softcap=20.0, return_entropy=True)
    loss = sum(v.mean() for v in pair)
gradients = torch.autograd.grad(loss, (x, W, s), create_graph=True)
torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, W, s))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("of", ["loss", "log_probs"])
def test_memory_is_flat_at_second_order(of):
    """The logits would take 250 MiB, and twice that for twice the rows."""
    peaks = []
    for rows in (2048, 4096):
        run = [sys.executable, "-c", PEAK, str(rows), of]
        peaks.append(float(subprocess.check_output(run, text=True)))
    assert max(peaks) < 250, peaks
    assert peaks[1] - peaks[0] < 100, peaks


PAGE = (Path(__file__).parents[1] / "docs" / "head.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGE, re.S | re.M)
EXAMPLES = [(code, printed) for code, printed in BLOCKS if printed]


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_the_page_prints_what_it_says(code, printed, capsys):
    exec(code, {})
    assert capsys.readouterr().out == printed
    assert "within a millionth: True" in printed


def test_the_page_begins_with_what_runs():
    names: dict = {}
    exec(BLOCKS[0][0], names)
    loss, features, weight = (names[name] for name in ("loss", "features", "weight"))
    v = capped(F.linear(features, weight), 1 / 0.7, 30.0)
    torch.testing.assert_close(
        loss, F.cross_entropy(v, names["target"]) + 1e-4 * v.logsumexp(1).square().mean()
    )
    assert names["log_probs"].shape == names["entropy"].shape == (6,)


def test_the_page_has_a_policy_gradient_and_a_distillation():
    assert ["linear_log_probs" in code for code, _ in EXAMPLES] == [True, False]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("keep", [None, [True, False, True, True]])
@pytest.mark.parametrize("scale", [1, 300])  # with e^v as it is, and less the row's maximum
def test_a_weight_without_class_is_that_of_lse(cap, has_bias, keep, scale):
    """F14 for p without y is p lse(v), in all derivatives to the third order and in p."""
    keep = None if keep is None else torch.tensor(keep)
    random = torch.Generator().manual_seed(0)

    def made(*shape, times=1.0):
        return (times * torch.randn(shape, generator=random, dtype=F64)).requires_grad_()

    x, W, p, b = made(4, D, times=scale), made(C, D), made(4), made(C)
    inputs = (x, W, p, b) if has_bias else (x, W, p)

    def of_formula(x, W, p, b=None):
        return LinearCrossEntropy.of(x, W, b, p, None, None, keep, 2, cap, (False,) * 3)[0]

    def written_out(x, W, p, b=None):
        v = capped(F.linear(x, W, b), 1, cap)
        m = v.detach().amax(1)
        c = p * (m + (v - m[:, None]).exp().sum(1).log()) / math.log(2)
        return c if keep is None else torch.where(keep, c, 0)

    def orders(f):
        found = [f(*inputs).square()]
        for _ in range(3):
            weights = [torch.randn(v.shape, generator=random, dtype=F64) for v in found[-1:]]
            (c,) = found[-1:]
            g = torch.autograd.grad(c, inputs, weights, create_graph=True)
            found += [*g, sum(v.square().sum() for v in g)]
        return found

    def pushed(f):
        ones = tuple(torch.ones_like(v).cumsum(0) for v in inputs)
        gradient = grad(lambda *v: f(*v).square().sum(), tuple(range(len(inputs))))
        return [jvp(f, inputs, ones)[1], *jvp(gradient, inputs, ones)[1]]

    for results in (orders, pushed):
        random.manual_seed(1)
        expected = results(written_out)
        random.manual_seed(1)
        for found, true in zip(results(of_formula), expected, strict=True):
            torch.testing.assert_close(
                found, true, rtol=1e-8, atol=1e-8 * (1 + true.abs().max().item())
            )


def test_a_weight_without_class_compiled():
    x, W, p = torch.randn(5, D), torch.randn(C, D), torch.rand(5)

    def f(x, W):
        return LinearCrossEntropy.of(x, W, None, p, None, None, None, math.e, None, (False,) * 3)[0]

    compiled = torch.compile(lambda x, W: grad(lambda x: f(x, W).sum())(x), fullgraph=True)
    torch.testing.assert_close(compiled(x, W), p[:, None] * F.linear(x, W).softmax(1) @ W)
