"""The document's own modules; PyTorch's are held to its samples in test_pytorch_samples.py."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch

from torch_nnmath import functional as F
from torch_nnmath import nn

A = torch.tensor([[0.7, 0.2], [0.1, 0.4]], dtype=torch.float64)
T = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_own_losses(reduction):
    z = torch.logit(A)
    squared = (0.5 * (A - T) ** 2).sum(-1)
    cross = -(T * A.log2()).sum(-1)
    reduce = {"none": lambda c: c, "sum": torch.sum, "mean": torch.mean}[reduction]
    for module, input, want in (
        (nn.SquaredErrorLoss(reduction=reduction), A, squared),
        (nn.SigmoidSquaredErrorLoss(reduction=reduction), z, squared),
        (nn.CategoricalCrossEntropyLoss(base=2, reduction=reduction), A, cross),
    ):
        torch.testing.assert_close(module(input, T), reduce(want))
    axes = nn.SquaredErrorLoss(reduction=reduction, dim=(0, 1))(A, T)
    torch.testing.assert_close(axes, squared.sum())


def test_bases_of_logits():
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    want = torch.nn.functional.cross_entropy(z, y) / math.log(2)
    torch.testing.assert_close(nn.CrossEntropyLoss(base=2)(z, y), want)
    module = nn.LinearCrossEntropyLoss(3, 3, base=2, dtype=torch.float64)
    logits = z @ module.linear.weight.T
    want = torch.nn.functional.cross_entropy(logits, y) / math.log(2)
    torch.testing.assert_close(module(z, y), want)


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        (nn.CrossEntropyLoss(), "CrossEntropyLoss()"),
        (nn.CrossEntropyLoss(base=2), "CrossEntropyLoss(base=2)"),
        (nn.SquaredErrorLoss(), "SquaredErrorLoss(reduction='mean', dim=-1)"),
        (nn.Linear(2, 3), "Linear(in_features=2, out_features=3, bias=True)"),
    ],
)
def test_repr(module, shown):
    assert repr(module) == shown
    assert repr(pickle.loads(pickle.dumps(module))) == shown
    assert repr(copy.deepcopy(module)) == shown


def test_pytorchs_module_becomes_ours_by_its_class():
    module = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    want = module(z, y)
    module.__class__ = nn.CrossEntropyLoss
    torch.testing.assert_close(module(z, y), want)
    assert repr(module) == "CrossEntropyLoss()"


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "identity"])
@pytest.mark.parametrize("output", ["sigmoid", "tanh", "relu", "softmax", "identity"])
def test_feedforward_is_pytorchs_network(activation, output):
    torch.manual_seed(0)
    ours = nn.Feedforward((4, 5, 3, 2), activation, output, dtype=torch.float64)
    assert list(ours.state_dict()) == [
        f"layers.{i}.{p}" for i in range(3) for p in ("weight", "bias")
    ]
    f, g = (
        torch.nn.Identity() if name == "identity" else getattr(torch, name)
        for name in (activation, output.replace("softmax", "sigmoid"))
    )
    torch.manual_seed(0)
    linears = [torch.nn.Linear(n, m, dtype=torch.float64) for n, m in ((4, 5), (5, 3), (3, 2))]
    x = torch.randn(6, 4, dtype=torch.float64)
    a = x
    for linear in linears[:-1]:
        a = f(linear(a))
    z = linears[-1](a)
    want = z.softmax(-1) if output == "softmax" else g(z)
    got = ours(x)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    theirs = [p for linear in linears for p in linear.parameters()]
    for mine, other in zip(
        torch.autograd.grad(got, list(ours.parameters()), upstream),
        torch.autograd.grad(want, theirs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_feedforward_takes_only_what_it_is_told():
    with pytest.raises(ValueError, match="gelu"):
        nn.Feedforward((2, 2), "gelu")(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least an input and an output"):
        nn.Feedforward((2,))
    without = nn.Feedforward((2, 3, 1), bias=False)
    assert list(without.state_dict()) == ["layers.0.weight", "layers.1.weight"]
    x = torch.randn(5, 2)
    hidden = torch.sigmoid(x @ without.layers[0].weight.T)
    want = torch.sigmoid(hidden @ without.layers[1].weight.T)
    torch.testing.assert_close(without(x), want)


OLDER = """
import torch, torch.nn
new = getattr(torch.nn, "LinearCrossEntropyLoss", None)
if new is not None:
    del torch.nn.LinearCrossEntropyLoss
from torch_nnmath import nn
w = torch.tensor([1.0, 2.0, 3.0])
options = dict(out_features=(2,), bias=True, weight=w, label_smoothing=0.1, reduction="sum")
module = nn.LinearCrossEntropyLoss(4, 3, **options)
assert list(module.state_dict()) == ["weight", "linear.weight", "linear.bias"]
x, y = torch.randn(5, 4), torch.randint(0, 3, (5, 2))
logits = module.linear(x).reshape(5, 3, 2)
want = torch.nn.functional.cross_entropy(logits, y, w, reduction="sum", label_smoothing=0.1)
torch.testing.assert_close(module(x, y), want)
if new is not None:
    theirs = new(4, 3, **options)
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(theirs(x, y), want)
    assert repr(theirs).replace(" ", "") == repr(module).replace(" ", "")
for bad in (dict(weight=w[:2]), dict(label_smoothing=2.0)):
    try:
        nn.LinearCrossEntropyLoss(4, 3, **bad)
    except RuntimeError:
        continue
    raise AssertionError(bad)
"""


def test_the_head_module_where_pytorch_has_none():
    subprocess.run([sys.executable, "-c", OLDER], check=True)


def test_torch_function_is_honoured():
    calls = []

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            calls.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(2, 3).as_subclass(Mine)
    W, y = torch.randn(4, 3), torch.tensor([0, 1])
    p = torch.full((2, 3), 1 / 3)
    for function, args in (
        (F.linear, (x, W)),
        (F.sigmoid, (x,)),
        (F.tanh, (x,)),
        (F.relu, (x,)),
        (F.softmax, (x, -1)),
        (F.softmax_jacobian, (x, -1)),
        (F.mse_loss, (x, p)),
        (F.squared_error, (p, x)),
        (F.sigmoid_squared_error, (x, p)),
        (F.categorical_cross_entropy, (p, x)),
        (F.cross_entropy, (x, y)),
        (F.linear_cross_entropy, (x, W, y)),
        (F.feedforward, (p, [W.as_subclass(Mine)], [None])),
    ):
        calls.clear()
        out = function(*args)
        assert function in calls, function.__name__
        assert isinstance(out, Mine), function.__name__
