"""What the head promises beyond its numbers: blocks that do not show, and flat memory."""

import importlib
import subprocess
import sys

import pytest
import torch

from torch_nnmath import functional as F

head = importlib.import_module("torch_nnmath.kernels.blocked")
N, D, C = 97, 5, 7


def problem():
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    y = torch.randint(0, C, (N,), generator=g)
    y[::5] = -100
    return draw(N, D), draw(C, D), draw(C), y, draw(C).abs(), draw(N, C).softmax(-1)


def results(target, options):
    """Value, gradients, a Hessian-vector product and a tangent."""
    x, W, b, y, w, t = problem()
    target = y if target == "indices" else t
    options = {**options, "weight": w} if "weight" in options else options

    def loss(*leaves):
        x, W, b = leaves
        out = F.linear_cross_entropy(x, W, target, linear_bias=b, **options)
        return (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()

    leaves = [v.requires_grad_() for v in (x, W, b)]
    directions = tuple(torch.ones_like(v) for v in leaves)
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    product = torch.autograd.grad(gradients, leaves, directions)
    _, tangent = torch.func.jvp(loss, tuple(v.detach() for v in leaves), directions)
    return [value.detach(), *(g.detach() for g in gradients), *product, tangent]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("indices", {"reduction": "none"}),
        ("indices", {"reduction": "mean", "weight": True, "label_smoothing": 0.1, "base": 2}),
        ("probabilities", {"reduction": "none", "base": 10}),
        ("probabilities", {"reduction": "sum", "weight": True, "label_smoothing": 0.3}),
    ],
)
@pytest.mark.parametrize("rows", [32, 64])
def test_blocks_do_not_show(monkeypatch, rows, target, options):
    """Several blocks, the last one smaller, give what one block gives."""
    whole = results(target, options)
    monkeypatch.setattr(head, "BLOCK_BYTES", (0, rows * 4 * C))
    count = len(head._groups_of_rows(torch.empty(N, D), torch.empty(C, D), None))
    assert count == -(-N // rows)
    for blocked, expected in zip(results(target, options), whole, strict=True):
        torch.testing.assert_close(blocked, expected, rtol=1e-12, atol=1e-13)


PEAK = """
import resource, sys, torch
from torch_nnmath import functional as F
rows, order = int(sys.argv[1]), sys.argv[2]
x, W = torch.randn(rows, 16, requires_grad=True), torch.randn(32000, 16, requires_grad=True)
y = torch.randint(0, 32000, (rows,))
y[::3] = -100
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
F.linear_cross_entropy(x[:64], W, y[:64]).backward()  # what the first call loads
before = peak()
head = lambda x, W: F.linear_cross_entropy(x, W, y, label_smoothing=0.1)
ones = torch.ones_like(x), torch.ones_like(W)
if order == "jvp":
    torch.func.jvp(head, (x.detach(), W.detach()), ones)
else:
    gradients = torch.autograd.grad(head(x, W), (x, W), create_graph=order == "second")
if order == "second":
    torch.autograd.grad(gradients, (x, W), ones)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("order", ["first", "second", "jvp"])
def test_memory_does_not_grow_with_rows_times_classes(order):
    """The logits would take 250 MiB, twice that for twice the rows, and more at second order."""
    peaks = []
    for rows in (2048, 4096):
        run = [sys.executable, "-c", PEAK, str(rows), order]
        peaks.append(float(subprocess.check_output(run, text=True)))
    assert max(peaks) < 250, peaks
    assert peaks[1] - peaks[0] < 100, peaks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("target", ["indices", "probabilities"])
def test_operators_keep_their_contract(dtype, wanted, target):
    """Schema, no alias, and a fake that agrees with the real operator."""
    x, W, b, y, _, t = (v if v.dtype == torch.int64 else v.to(dtype) for v in problem())
    y, keep = torch.ops.torch_nnmath.class_indices.default(y, C, -100)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, p, t = keep.to(wide), keep.to(wide), t.to(wide)
    places = (y, p, None, keep) if target == "indices" else (None, None, t, None)
    directions = (x, W, b, *((p, None) if target == "indices" else (None, t)))
    wants = [wanted] * 3 + [wanted and target == "indices", wanted and target != "indices"]
    utils = ("test_schema", "test_faketensor")
    for operator, args in (
        ("class_indices", (y, C, None)),
        ("head", (gamma, gamma, gamma, x, W, b, *places, None, 2.0, 0.7, [True, True], wants)),
        ("head", (gamma, None, None, x, W, b, *places, None, 2.0, None, [False, False], wants)),
        ("head_second", (gamma, gamma, gamma, x, W, b, *places, *directions, 2.0, 0.7, wants)),
        ("head_second", (gamma, None, None, x, W, b, *places, *directions, 2.0, None, wants)),
    ):
        operator = getattr(torch.ops.torch_nnmath, operator).default
        assert set(torch.library.opcheck(operator, args, test_utils=utils).values()) == {"SUCCESS"}
