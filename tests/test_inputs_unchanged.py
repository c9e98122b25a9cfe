"""Valid calls and their derivatives change none of the caller's tensors, unless told to."""

import itertools

import pytest
import torch
from arguments import C, D, Snapshot, classes, floats, ints
from torch.func import jvp

import torch_nnmath.functional as F
from torch_nnmath import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


def combine(**choices):
    """Returns a dict of options for each combination of the values."""
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def class_weight(dtype):
    return torch.tensor([0.5, 2, 1, 0.25], dtype=dtype)


REDUCTIONS = combine(reduction=["none", "sum", "mean"])
SMOOTHINGS = {"reduction": ["none", "sum", "mean"], "label_smoothing": [0.0, 0.1]}
# name: function, shapes of differentiable tensors, constant arguments, options of each call
VALID_CALLS = {
    "linear": (F.linear, [(2, D), (5, D), (5,)], [], [{}]),
    "linear vector": (F.linear, [(2, D), (D,), ()], [], [{}]),
    "sigmoid": (F.sigmoid, [(2, D)], [], [{}]),
    "tanh": (F.tanh, [(2, D)], [], [{}]),
    "relu": (F.relu, [(2, D)], [], [{}]),
    "softmax": (F.softmax, [(2, D)], [], [{"dim": 0}, {"dim": 1, "dtype": torch.float64}]),
    "softmax_jacobian": (F.softmax_jacobian, [(2, D)], [], [{"dim": 0}, {"dim": 1}]),
    "mse_loss": (F.mse_loss, [(2, D), (2, D)], [], REDUCTIONS),
    "mse_loss weight": (
        lambda a, t, w, **o: F.mse_loss(a, t, weight=w, **o),
        [(2, D)] * 3,
        [],
        REDUCTIONS,
    ),
    "squared_error": (F.squared_error, [(2, D), (2, D)], [], [*REDUCTIONS, {"dim": (0, 1)}]),
    "sigmoid_squared_error": (
        F.sigmoid_squared_error,
        [(2, D), (2, D)],
        [],
        [*REDUCTIONS, {"dim": (0, 1)}],
    ),
    "categorical_cross_entropy": (
        F.categorical_cross_entropy,
        [(2, C), (2, C)],
        [],
        [*REDUCTIONS, {"base": 2}, {"dim": 0}],
    ),
    "categorical_cross_entropy indices": (
        F.categorical_cross_entropy,
        [(2, C)],
        [classes(0, 3)],
        REDUCTIONS,
    ),
    "cross_entropy": (
        F.cross_entropy,
        [(3, C)],
        [classes(0, -100, 3)],
        combine(**SMOOTHINGS, weight=[None, class_weight]),
    ),
    "cross_entropy bytes": (
        F.cross_entropy,
        [(3, C)],
        [classes(0, 255, 3).byte()],
        [{"ignore_index": 255}, {"ignore_index": 255, "label_smoothing": 0.1}],
    ),
    "cross_entropy probabilities": (
        F.cross_entropy,
        [(3, C), (3, C)],
        [],
        combine(**SMOOTHINGS, weight=[None, class_weight]),
    ),
    "cross_entropy K": (F.cross_entropy, [(2, C, 3)], [ints(2, 3)], REDUCTIONS),
    "head": (
        lambda x, W, b, y, **o: F.linear_cross_entropy(x, W, y, linear_bias=b, **o),
        [(3, D), (C, D), (C,)],
        [classes(0, -100, 3)],
        combine(**SMOOTHINGS, weight=[None, class_weight]),
    ),
    "head probabilities": (
        F.linear_cross_entropy,
        [(3, D), (C, D), (3, C)],
        [],
        combine(**SMOOTHINGS),
    ),
    "head sequence": (F.linear_cross_entropy, [(2, 3, D), (C, D)], [ints(2, 3)], REDUCTIONS),
    "head K": (F.linear_cross_entropy, [(3, D), (C, 2, D)], [ints(3, 2)], REDUCTIONS),
    "kl_div": (
        lambda x, W, b, xt, Wt, bt, y, **o: F.linear_kl_div(
            *(x, W, xt, Wt), student_bias=b, teacher_bias=bt, labels=y, **o
        ),
        [(3, D), (C, D), (C,), (3, 5), (C, 5), (C,)],
        [classes(0, -100, 3)],
        combine(reduction=["none", "sum", "mean"], reverse=[False, True], alpha=[0.0, 0.3]),
    ),
    "kl_div of logits": (
        F.linear_kl_div,
        [(3, D), (C, D), (3, C)],
        [],
        combine(reduction=["none", "mean"], temperature=[1.0, 2.0], temperature_factor=[True]),
    ),
    "kl_div of log-probabilities": (
        lambda x, W, z, i, **o: F.linear_kl_div(
            x, W, z.log_softmax(-1).gather(1, i), teacher_indices=i, **o
        ),
        [(3, D), (C, D), (3, C)],
        [torch.tensor([[0, 2], [3, 1], [1, 0]])],
        combine(reduction=["none", "sum"], remainder=["class", "drop"], reverse=[False, True]),
    ),
    "jsd": (
        lambda x, W, b, xt, Wt, bt, y, **o: F.linear_jsd(
            *(x, W, xt, Wt), student_bias=b, teacher_bias=bt, labels=y, **o
        ),
        [(3, D), (C, D), (C,), (3, 5), (C, 5), (C,)],
        [classes(0, -100, 3)],
        combine(reduction=["none", "mean"], beta=[0.0, 0.3, 1.0], alpha=[0.0, 0.3]),
    ),
    "feedforward": (
        lambda x, W, V, b, c, **o: F.feedforward(x, [W, V], [b, c], **o),
        [(2, D), (5, D), (2, 5), (5,), (2,)],
        [],
        [
            {"activation": f, "output_activation": g}
            for f, g in (
                ("sigmoid", "softmax"),
                ("tanh", "identity"),
                ("relu", "relu"),
                ("identity", "tanh"),
            )
        ],
    ),
}
VALID_CASES = [
    pytest.param(f, shapes, constants, options, id=f"{name}-{i}")
    for name, (f, shapes, constants, rows) in VALID_CALLS.items()
    for i, options in enumerate(rows)
]


@pytest.mark.parametrize(("f", "shapes", "constants", "options"), VALID_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_valid_call_changes_no_tensor(f, shapes, constants, options, dtype):
    """Neither arguments nor cotangents nor results, at two orders and in forward mode."""
    leaves = [floats(*shape, dtype=dtype) for shape in shapes]
    if options.get("weight"):
        options = options | {"weight": class_weight(dtype)}
    parents = [x * 1 for x in leaves]  # PyTorch would let a function write to these
    arguments = Snapshot(leaves, parents, constants, options)

    with torch.no_grad():
        f(*parents, *constants, **options)
    arguments.assert_unchanged()
    loss = f(*parents, *constants, **options)
    arguments.assert_unchanged()
    upstream = torch.rand_like(loss)
    inputs = Snapshot(upstream, loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
    results = Snapshot(first, again)
    total = sum(d.sum() for d in again)
    if total.requires_grad:
        torch.autograd.grad(total, leaves, materialize_grads=True)
    inputs.assert_unchanged()
    arguments.assert_unchanged()
    results.assert_unchanged()
    # the second backward is differentiable, and runs the formulas instead of the kernels
    eps = torch.finfo(dtype).eps
    for d, e in zip(first, again, strict=True):
        torch.testing.assert_close(d, e, rtol=4 * eps, atol=4 * eps, equal_nan=True)

    primals = [x.detach().clone() for x in leaves]
    tangents = [torch.rand_like(x) for x in leaves]
    inputs = Snapshot(primals, tangents)
    jvp(lambda *leaves: f(*leaves, *constants, **options), tuple(primals), tuple(tangents))
    inputs.assert_unchanged()
    arguments.assert_unchanged()


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "head",
        "kl_div",
        "jsd",
        "cross_entropy",
        "feedforward",
        "mse_loss",
        "squared_error",
    ],
)
def test_valid_call_under_autocast_changes_no_tensor(name):
    f, shapes, constants, rows = VALID_CALLS[name]
    leaves = [floats(*shape) for shape in shapes]
    arguments = Snapshot(leaves, constants)
    with torch.autocast("cpu", torch.bfloat16):
        loss = f(*leaves, *constants, **rows[0])
    torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    arguments.assert_unchanged()


@pytest.mark.parametrize("f", [F.relu, lambda x, inplace: nn.ReLU(inplace)(x)])
def test_relu_in_place_changes_its_input_alone(f):
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    parent = x * 1
    version = parent._version
    output = f(parent, inplace=True)
    assert output is parent
    assert parent._version > version
    assert parent.tolist() == [0, 2]
    upstream = torch.tensor([3.0, 4.0])
    snapshot = Snapshot(upstream, x, output)
    (dx,) = torch.autograd.grad(output, x, upstream)
    snapshot.assert_unchanged()
    assert dx.tolist() == [0, 4]
    assert x.tolist() == [-1, 2]
