"""R01 to R17: what people reported about other losses, layers and swaps, each for its whole kind.

A test is named after its report. Truth is a formula in float64, written out here, or plain PyTorch.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import torch_nnmath.functional as F
from torch_nnmath import nn

pytestmark = [  # warnings that PyTorch gives itself, in forward mode and in compilation
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function.*should not be inst:DeprecationWarning"),
]

C, D = 4, 3  # classes, features
REDUCTIONS = ("none", "sum", "mean")
HALF = (torch.bfloat16, torch.float16)


class Door(NamedTuple):
    """A way into cross entropy: its differentiable arguments, and the logits they stand for."""

    shapes: tuple[tuple[int, ...], ...]
    batch: tuple[int, ...]  # the shape of class indices, and of the losses
    logits: Callable[..., Tensor]  # in plain PyTorch, (*batch, C)
    loss: Callable[..., Tensor]  # loss(leaves, target, **options)
    axis: int = -1  # of the classes in a target of probabilities


def through_logits(leaves, target, **options):
    return F.cross_entropy(*leaves, target, **options)


def through_criterion(leaves, target, **options):
    return nn.CrossEntropyLoss(**options)(*leaves, target)


def through_head(leaves, target, **options):
    x, W, *b = leaves
    return F.linear_cross_entropy(x, W, target, linear_bias=b[0] if b else None, **options)


def through_head_criterion(leaves, target, **options):
    x, W, *b = leaves
    module = nn.LinearCrossEntropyLoss(D, C, out_features=W.shape[1:-1], bias=bool(b), **options)
    state = {"linear.weight": W.reshape(-1, D)}
    if b:
        state["linear.bias"] = b[0].reshape(-1)
    return functional_call(module, state, (x, target))


def affine(x, W, b=None):
    """(*, D), (C, *d, D), (C, *d) -> (*, *d, C)."""
    z = torch.nn.functional.linear(x, W.flatten(0, -2), None if b is None else b.flatten())
    return z.reshape(*x.shape[:-1], *W.shape[:-1]).movedim(x.dim() - 1, -1)


def as_is(z):
    return z


DOORS = {
    "logits": Door(((5, C),), (5,), as_is, through_logits),
    "logits unbatched": Door(((C,),), (), as_is, through_logits),
    "logits K": Door(((2, C, 3),), (2, 3), lambda z: z.movedim(1, -1), through_logits, 1),
    "criterion": Door(((5, C),), (5,), as_is, through_criterion),
    "head": Door(((5, D), (C, D)), (5,), affine, through_head),
    "head bias": Door(((5, D), (C, D), (C,)), (5,), affine, through_head),
    "head unbatched": Door(((D,), (C, D), (C,)), (), affine, through_head),
    "head sequence": Door(((2, 3, D), (C, D), (C,)), (2, 3), affine, through_head),
    "head K": Door(((3, D), (C, 2, D), (C, 2)), (3, 2), affine, through_head, 1),
    "head criterion": Door(((5, D), (C, D), (C,)), (5,), affine, through_head_criterion),
    "head criterion K": Door(((3, D), (C, 2, D)), (3, 2), affine, through_head_criterion, 1),
}
HEADS = [name for name in DOORS if name.startswith("head")]
BATCHED = [name for name, door in DOORS.items() if door.batch]

every_door = pytest.mark.parametrize("name", DOORS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


def draw(shapes, dtype=torch.float64):
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def labels(shape, *marks):
    """Class indices; the first of them are replaced by `marks`."""
    y = torch.randint(C, shape)
    for i, mark in enumerate(marks[: y.numel()]):
        y.view(-1)[i] = mark
    return y


def probabilities(door, dtype=torch.float64):
    """A target of probabilities, in the layout of the truth and in that of the door."""
    t = torch.rand(*door.batch, C, dtype=torch.float64).softmax(-1).to(dtype)
    return t, t.movedim(-1, door.axis) if door.batch else t


def class_weight(dtype=torch.float64):
    return torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=dtype)


def truth(
    z,
    target,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    base=math.e,
):
    """Cross entropy of logits (*, C) on indices (*) or probabilities (*, C), written out."""
    s, n_classes = label_smoothing, z.shape[-1]
    w = torch.ones(n_classes, dtype=z.dtype) if weight is None else weight
    log_a = (z - z.exp().sum(-1, keepdim=True).log()) / math.log(base)
    if target.is_floating_point():
        c = -(w * ((1 - s) * target + s / n_classes) * log_a).sum(-1)
        n = torch.tensor(float(c.numel()), dtype=z.dtype)
    else:
        keep = target.long() != ignore_index
        y = torch.where(keep, target.long(), 0)
        hit = (y.unsqueeze(-1) == torch.arange(n_classes)).to(z.dtype)
        w_y = (hit * w).sum(-1)
        c = -(1 - s) * w_y * (hit * log_a).sum(-1) - s / n_classes * (w * log_a).sum(-1)
        c, n = torch.where(keep, c, 0), (w_y * keep).sum()
    return {"none": c, "sum": c.sum(), "mean": c.sum() / n}[reduction]


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def is_zero(x):
    return x is not None and torch.equal(x, torch.zeros_like(x))


def primal(x):
    """x for forward mode: packed where PyTorch itself gives x no tangent, or none to its views."""
    x = x.detach()
    return x.resolve_neg().clone() if 0 in x.stride() or x.is_neg() else x


def derivatives(f, leaves, cotangent, directions):
    """Value, gradients, their derivative along directions (also in the cotangent), and a jvp."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    cotangent = cotangent.detach().requires_grad_()
    value = f(*leaves)
    first = torch.autograd.grad(value, leaves, cotangent, create_graph=True)
    along = sum((d * v).sum() for d, v in zip(first, directions, strict=True))
    second = torch.autograd.grad(along, [*leaves, cotangent], materialize_grads=True)
    _, tangent = jvp(f, tuple(map(primal, leaves)), tuple(directions))
    return [value.detach(), *(d.detach() for d in first), *second, tangent]


def agree(f, g, leaves, plain_leaves=None, cotangent=None):
    """f and g agree in value and derivatives: reverse, reverse over reverse, forward."""
    plain_leaves = leaves if plain_leaves is None else plain_leaves
    directions = [torch.randn(x.shape, dtype=x.dtype) for x in leaves]
    if cotangent is None:
        with torch.no_grad():
            cotangent = torch.randn_like(g(*plain_leaves))
    found = derivatives(f, leaves, cotangent, directions)
    expected = derivatives(g, plain_leaves, cotangent.contiguous(), directions)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def agree_at(door, leaves, target, plain_target=None, **options):
    """The door against the truth."""
    plain_target = target if plain_target is None else plain_target
    agree(
        lambda *leaves: door.loss(leaves, target, **options),
        lambda *leaves: truth(door.logits(*leaves), plain_target, **options),
        leaves,
    )


# R01: every label is ignored


@every_door
@every_reduction
@pytest.mark.parametrize(
    ("weighted", "label_smoothing", "ignore_index"),
    [(False, 0.0, -100), (True, 0.1, -100), (False, 0.1, 2), (True, 0.0, 2)],
)
def test_r01_all_ignored(name, reduction, weighted, label_smoothing, ignore_index):
    door = DOORS[name]
    leaves = draw(door.shapes)
    options = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "weight": class_weight() if weighted else None,
    }
    loss = door.loss(leaves, torch.full(door.batch, ignore_index), **options)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert is_zero(loss)
    assert loss.shape == (door.batch if reduction == "none" else ())
    first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    assert all(map(is_zero, first))
    along = sum((d * torch.randn_like(d)).sum() for d in first)
    assert all(map(is_zero, torch.autograd.grad(along, leaves, materialize_grads=True)))
    if reduction != "mean":
        _, tangent = jvp(
            lambda *leaves: door.loss(leaves, torch.full(door.batch, ignore_index), **options),
            tuple(x.detach() for x in leaves),
            tuple(torch.ones_like(x) for x in leaves),
        )
        assert is_zero(tangent)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("criterion", [nn.LinearCrossEntropyLoss(5, C, bias=True), None])
def test_r01_a_step_on_ignored_labels_moves_no_parameter(criterion, reduction):
    model = torch.nn.Sequential(nn.Linear(D, 5), nn.Tanh())
    if criterion is None:
        model.append(nn.Linear(5, C))
        criterion = nn.CrossEntropyLoss(reduction=reduction)
    else:
        criterion = copy.deepcopy(criterion)
        criterion.reduction = reduction
    parameters = [*model.parameters(), *criterion.parameters()]
    before = [p.detach().clone() for p in parameters]
    criterion(model(torch.randn(6, D)), torch.full((6,), -100)).backward()
    torch.optim.SGD(parameters, lr=1.0, weight_decay=0.0).step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@every_door
def test_r01_total_class_weight_0_is_nan_in_the_mean(name):
    door = DOORS[name]
    target = torch.full(door.batch, 1)
    weight = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64)
    assert door.loss(draw(door.shapes), target, weight=weight).isnan()
    assert is_zero(door.loss(draw(door.shapes), target, weight=weight, reduction="sum"))


# R02: class indices out of range


@every_door
@pytest.mark.parametrize(
    ("index", "ignore_index"),
    [(-1, -100), (C, -100), (-(2**63), -100), (2**63 - 1, -100), (-100, 255), (-100, 1), (255, -1)],
)
def test_r02_out_of_range(name, index, ignore_index):
    door = DOORS[name]
    leaves = draw(door.shapes)
    target = labels(door.batch, index, ignore_index)
    for reduction in REDUCTIONS:
        with Work() as work, pytest.raises(IndexError, match=str(index)):
            door.loss(leaves, target, reduction=reduction, ignore_index=ignore_index)
        assert not work.done


class Work(TorchDispatchMode):
    """Notes every operation that costs rows x classes."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        words = ("softmax", "logsumexp", "exp", "mm", "linear", "head", "gather", "xlogy")
        if any(word in func.name().split("::")[1].split(".")[0] for word in words):
            self.done.append(func.name())
        return func(*args, **(kwargs or {}))


@every_door
def test_r02_work_is_noticed(name):
    """The recorder above sees the work of a good call, so that its silence means something."""
    door = DOORS[name]
    with Work() as work:
        door.loss(draw(door.shapes), labels(door.batch))
    assert work.done


def of_indices(y):
    x, W, b = torch.ones(5, D), torch.ones(C, D), torch.zeros(C)
    return {
        "cross_entropy": lambda y: F.cross_entropy(x @ W.T, y, ignore_index=255),
        "linear_cross_entropy": lambda y: F.linear_cross_entropy(
            x, W, y, linear_bias=b, ignore_index=255
        ),
        "categorical_cross_entropy": lambda y: F.categorical_cross_entropy(
            torch.full((5, C), 0.25), y
        ),
    }[y]


INDEXED = ("cross_entropy", "linear_cross_entropy", "categorical_cross_entropy")


@pytest.mark.parametrize("loss", INDEXED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_r02_compiled(loss, backend):
    torch._dynamo.reset()
    f = torch.compile(of_indices(loss), backend=backend, fullgraph=True)
    close(f(torch.tensor([0, 1, 2, 3, 0])), torch.tensor(math.log(C)), 1e-6)
    for index in (-1, C, -100):
        with pytest.raises((IndexError, RuntimeError), match=f"{index} is out of bounds"):
            f(torch.tensor([0, 1, 2, 3, index]))


@pytest.mark.parametrize("loss", INDEXED)
@pytest.mark.parametrize("index", [-1, C, -100])
def test_r02_under_vmap(loss, index):
    f, good = of_indices(loss), torch.tensor([[0, 1, 2, 3, 0], [1, 1, 1, 1, 1]])
    close(vmap(f)(good), torch.full((2,), math.log(C)), 1e-6)
    bad = good.clone()
    bad[1, 2] = index
    with pytest.raises((IndexError, RuntimeError), match=f"{index} is out of bounds"):
        vmap(f)(bad)
    with pytest.raises((IndexError, RuntimeError), match=f"{index} is out of bounds"):
        vmap(vmap(f))(bad[None])


# a head's module draws random numbers when it is made, which vmap refuses
@pytest.mark.parametrize("name", [name for name in DOORS if "head criterion" not in name])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad"])
def test_r02_under_derivatives(name, transform):
    door = DOORS[name]
    leaves = tuple(x.detach() for x in draw(door.shapes))
    target = labels(door.batch, -1)

    def f(*leaves):
        return door.loss(leaves, target)

    transformed = {
        "grad": lambda: grad(f)(*leaves),
        "jvp": lambda: jvp(f, leaves, leaves),
        "vmap of grad": lambda: vmap(grad(f))(*(torch.stack([x, x]) for x in leaves)),
    }[transform]
    with pytest.raises((IndexError, RuntimeError), match="Target -1 is out of bounds"):
        transformed()


@every_reduction
@pytest.mark.parametrize("index", [-1, C, -100, 255])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_r02_categorical_cross_entropy(reduction, index, shape):
    probs = torch.full((*shape, C), 0.25)
    with Work() as work, pytest.raises(IndexError, match=str(index)):
        F.categorical_cross_entropy(probs, labels(shape, index), reduction=reduction)
    assert not work.done


# R03: any ignore_index, in every reduction


@every_door
@every_reduction
@pytest.mark.parametrize(
    ("ignore_index", "weighted"),
    [(-100, True), (255, False), (0, True), (3, False), (-1, True), (-(2**63), False)],
)
def test_r03_any_ignore_index(name, reduction, ignore_index, weighted):
    door = DOORS[name]
    weight = class_weight() if weighted else None
    target = labels(door.batch, 1, ignore_index, ignore_index)  # one is kept
    options = {"ignore_index": ignore_index, "reduction": reduction, "weight": weight}
    agree_at(door, draw(door.shapes), target, **options)


@pytest.mark.parametrize("name", BATCHED)
def test_r03_the_mean_counts_kept_rows(name):
    door = DOORS[name]
    leaves, target = draw(door.shapes), labels(door.batch, 1, 255, 255)
    total = door.loss(leaves, target, ignore_index=255, reduction="sum")
    kept = target.numel() - 2
    close(door.loss(leaves, target, ignore_index=255), total / kept)


# R04: label smoothing does not see ignored rows


@every_door
@every_reduction
@pytest.mark.parametrize(
    ("label_smoothing", "weighted", "base"),
    [(0.1, False, math.e), (0.1, True, 2.0), (1.0, True, math.e), (0.3, False, 0.5)],
)
def test_r04_smoothing(name, reduction, label_smoothing, weighted, base):
    door = DOORS[name]
    target = labels(door.batch, 3, -100, -100)
    options = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "weight": class_weight() if weighted else None,
        "base": base,
    }
    agree_at(door, draw(door.shapes), target, **options)


@pytest.mark.parametrize("name", BATCHED)
@every_reduction
@pytest.mark.parametrize(
    ("label_smoothing", "value"), [(0.0, math.nan), (0.3, math.nan), (0.3, math.inf)]
)
def test_r04_ignored_rows_of_any_value(name, reduction, label_smoothing, value):
    """What an ignored row holds changes nothing, at no order."""
    door = DOORS[name]
    target = labels(door.batch, -100, 1)
    if name in ("head K", "head criterion K"):
        target[0] = -100  # a row of features serves both positions
    leaves = [x.detach() for x in draw(door.shapes)]
    hostile = [leaves[0].clone(), *leaves[1:]]
    if name == "logits K":
        hostile[0][0, :, 0] = value
    else:
        hostile[0].view(-1, hostile[0].shape[-1])[0] = value
    weight = class_weight()

    def f(*leaves):
        options = {"reduction": reduction, "label_smoothing": label_smoothing, "weight": weight}
        return door.loss(leaves, target, **options)

    agree(f, f, hostile, leaves)
    hostile[0].requires_grad_()
    f(*hostile).sum().backward()
    gradient = hostile[0].grad[0, :, 0] if name == "logits K" else hostile[0].grad.flatten(0, -2)[0]
    assert is_zero(gradient)


@every_door
@every_reduction
@pytest.mark.parametrize(
    ("label_smoothing", "weighted"), [(0.0, False), (0.0, True), (0.1, True), (1.0, False)]
)
def test_r04_smoothed_probabilities(name, reduction, label_smoothing, weighted):
    door = DOORS[name]
    plain, target = probabilities(door)
    options = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "weight": class_weight() if weighted else None,
    }
    agree_at(door, draw(door.shapes), target, plain, **options)
    leaves = draw(door.shapes)  # the target's gradient, too
    agree(
        lambda t: door.loss(leaves, t.movedim(-1, door.axis) if door.batch else t, **options),
        lambda t: truth(door.logits(*leaves), t, **options),
        [plain],
    )


# R05: the value does not depend on who wants gradients


@every_door
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
def test_r05_value_without_gradients(name, reduction, dtype, kind):
    door = DOORS[name]
    leaves = [x.detach() for x in draw(door.shapes, dtype)]
    target = probabilities(door, dtype)[1] if kind == "probabilities" else labels(door.batch, -100)
    if kind == "indices" and not door.batch:
        target = labels(door.batch)
    options = {"label_smoothing": 0.1 if kind == "smoothed" else 0.0, "reduction": reduction}
    with torch.no_grad():
        value = door.loss(leaves, target, **options)
    with torch.inference_mode():
        assert same(door.loss(leaves, target, **options), value)
    for wanted in range(2 ** len(leaves)):
        some = [x.clone().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(leaves)]
        loss = door.loss(some, target, **options)
        assert loss.requires_grad == bool(wanted)
        assert same(loss.detach(), value)
    with torch.no_grad():
        assert same(door.loss(some, target, **options), value)
    if kind != "smoothed" or door.batch:
        expected = truth(
            door.logits(*(x.double() for x in leaves)),
            target.movedim(door.axis, -1).double() if kind == "probabilities" else target,
            **options,
        )
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), expected, rtol=32 * eps, atol=32 * eps)


def same(a, b):
    """Bit for bit, nan included."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


OTHERS = {
    "linear": (F.linear, ((4, D), (5, D), (5,))),
    "sigmoid": (F.sigmoid, ((4, D),)),
    "tanh": (F.tanh, ((4, D),)),
    "relu": (F.relu, ((4, D),)),
    "softmax": (lambda z: F.softmax(z, 0), ((4, D),)),
    "mse_loss": (F.mse_loss, ((4, D), (4, D))),
    "squared_error": (F.squared_error, ((4, D), (4, D))),
    "sigmoid_squared_error": (F.sigmoid_squared_error, ((4, D), (4, D))),
    "categorical_cross_entropy": (
        lambda z, t: F.categorical_cross_entropy(z.sigmoid(), t),
        ((4, C), (4, C)),
    ),
    "feedforward": (
        lambda x, *p: F.feedforward(x, p[:2], p[2:], activation="relu"),
        ((4, D), (5, D), (2, 5), (5,), (2,)),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_r05_other_functions(name, dtype):
    f, shapes = OTHERS[name]
    leaves = draw(shapes, dtype)
    value = f(*leaves)
    assert value.requires_grad
    with torch.no_grad():
        assert same(f(*leaves), value)
    with torch.inference_mode():
        assert same(f(*leaves), value)
    assert same(f(*(x.detach() for x in leaves)), value)


# R06: labels of every integer type


@every_door
@every_reduction
@pytest.mark.parametrize(
    ("ignore_index", "label_smoothing"), [(-100, 0.2), (255, 0.0), (255, 0.2), (2, 0.2)]
)
def test_r06_bytes(name, reduction, ignore_index, label_smoothing):
    door = DOORS[name]
    marks = (1, ignore_index, ignore_index) if ignore_index >= 0 else (1,)
    target = labels(door.batch, *marks).to(torch.uint8)
    options = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    agree_at(door, draw(door.shapes), target, **options)


@every_door
@pytest.mark.parametrize("ignore_index", [-100, -1])
def test_r06_bytes_do_not_wrap(name, ignore_index):
    """As a byte, -100 is 156 and -1 is 255; neither is the ignored index that was named."""
    door = DOORS[name]
    target = labels(door.batch, ignore_index % 256).to(torch.uint8)
    with pytest.raises(IndexError, match=str(ignore_index % 256)):
        door.loss(draw(door.shapes), target, ignore_index=ignore_index)


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)


@every_door
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool])
def test_r06_other_integers_are_refused(name, dtype):
    door = DOORS[name]
    leaves, y = draw(door.shapes), labels(door.batch)
    for reduction in REDUCTIONS:
        with pytest.raises(RuntimeError, match=str(dtype)):
            door.loss(leaves, y.to(dtype), reduction=reduction)


@every_reduction
@pytest.mark.parametrize("dtype", [torch.uint8, *INTEGERS])
def test_r06_categorical_cross_entropy_takes_all(reduction, dtype):
    y = labels((5,), 3)
    agree(
        lambda p: F.categorical_cross_entropy(p, y.to(dtype), reduction=reduction),
        lambda p: truth(p.log() - 0 * p, y, reduction=reduction) - normaliser(p, reduction),
        [torch.rand(5, C, dtype=torch.float64) + 0.1],
    )


def normaliser(p, reduction):
    """What softmax of log p divides by, which cross entropy on probabilities does not."""
    c = p.sum(-1).log()
    return {"none": c, "sum": c.sum(), "mean": c.mean()}[reduction]


# R07: without a batch


@pytest.mark.parametrize("name", [name for name, door in DOORS.items() if not door.batch])
@every_reduction
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_r07_unbatched(name, reduction, kind, label_smoothing, weighted):
    door = DOORS[name]
    target = labels(()) if kind == "index" else probabilities(door)[1]
    options = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "weight": class_weight() if weighted else None,
    }
    leaves = draw(door.shapes)
    assert door.loss(leaves, target, **options).shape == ()
    agree_at(door, leaves, target, **options)
    close(
        door.loss(leaves, target, **options),
        torch.nn.functional.cross_entropy(door.logits(*leaves), target, **options),
    )


@every_reduction
def test_r07_unbatched_modules_and_own_losses(reduction):
    z, y = torch.randn(C, dtype=torch.float64), torch.tensor(2)
    expected = truth(z, y)
    close(nn.CrossEntropyLoss(reduction=reduction)(z, y), expected)
    head = nn.LinearCrossEntropyLoss(D, C, reduction=reduction, dtype=torch.float64)
    x = torch.randn(D, dtype=torch.float64)
    close(head(x, y), truth(head.linear(x), y))
    close(nn.CategoricalCrossEntropyLoss(reduction=reduction)(z.softmax(0), y), expected)
    t = torch.rand(C, dtype=torch.float64)
    close(nn.SquaredErrorLoss(reduction=reduction)(z, t), ((z - t) ** 2).sum() / 2)
    a = 1 / (1 + (-z).exp())
    close(nn.SigmoidSquaredErrorLoss(reduction=reduction)(z, t), ((a - t) ** 2).sum() / 2)


# R08: empty batches


def emptied(name):
    """The door with no example, or, of several batch axes, none along the first or the last."""
    door = DOORS[name]
    places = [0] if len(door.batch) == 1 else [0, 1]
    for place in places:
        batch = tuple(0 if i == place else n for i, n in enumerate(door.batch))
        first = list(door.shapes[0])
        axis = place if name != "logits K" else 2 * place
        if place == 1 and door.axis == 1 and name != "logits K":
            continue  # positions are axes of W
        first[axis] = 0
        yield door._replace(batch=batch, shapes=(tuple(first), *door.shapes[1:]))


@pytest.mark.parametrize("name", BATCHED)
@every_reduction
@pytest.mark.parametrize("kind", ["indices", "bytes", "smoothed", "weighted", "probabilities"])
def test_r08_empty(name, reduction, kind):
    options = {
        "reduction": reduction,
        "label_smoothing": 0.1 if kind == "smoothed" else 0.0,
        "weight": class_weight() if kind == "weighted" else None,
    }
    for door in emptied(name):
        target = probabilities(door)[1] if kind == "probabilities" else labels(door.batch)
        target = target.byte() if kind == "bytes" else target
        check_empty(
            lambda *leaves, door=door, target=target: door.loss(leaves, target, **options),
            door.shapes,
            reduction,
            door.batch,
        )


def check_empty(f, shapes, reduction, batch):
    leaves = draw(shapes)
    loss = f(*leaves)
    if reduction == "none":
        assert loss.shape == batch
        assert loss.numel() == 0
    elif reduction == "sum":
        assert is_zero(loss)
    else:
        assert loss.isnan()
    first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    assert [d.shape for d in first] == [x.shape for x in leaves]
    assert all(map(is_zero, first))
    along = sum((d * torch.ones_like(d)).sum() for d in first)
    if along.requires_grad:
        second = torch.autograd.grad(along, leaves, materialize_grads=True)
        assert all(map(is_zero, second))


EMPTY = {
    "mse_loss": (F.mse_loss, ((0, D), (0, D)), (0, D)),
    "mse_loss rows": (F.mse_loss, ((2, 0), (2, 0)), (2, 0)),
    "MSELoss": (lambda a, t, reduction: nn.MSELoss(reduction=reduction)(a, t), ((0,), (0,)), (0,)),
    "squared_error": (F.squared_error, ((0, D), (0, D)), (0,)),
    "sigmoid_squared_error": (F.sigmoid_squared_error, ((0, D), (0, D)), (0,)),
    "categorical_cross_entropy": (F.categorical_cross_entropy, ((0, C), (0, C)), (0,)),
    "categorical_cross_entropy indices": (
        lambda p, **o: F.categorical_cross_entropy(p, labels((0, 2)), **o),
        ((0, 2, C),),
        (0, 2),
    ),
}


@pytest.mark.parametrize("name", EMPTY)
@every_reduction
def test_r08_empty_own_losses(name, reduction):
    f, shapes, batch = EMPTY[name]
    check_empty(lambda *leaves: f(*leaves, reduction=reduction), shapes, reduction, batch)


@pytest.mark.parametrize("name", ["linear", "sigmoid", "tanh", "relu", "softmax", "feedforward"])
def test_r08_empty_layers(name):
    f, shapes = OTHERS[name]
    leaves = draw(((0, D), *shapes[1:]))
    out = f(*leaves)
    assert out.shape == (0, *f(*draw(shapes)).shape[1:])
    out.sum().backward()
    assert all(is_zero(x.grad) and x.grad.shape == x.shape for x in leaves)


# R09: classes that are forbidden by a logit of -inf


def forbid(name, leaves):
    """Makes class 0 impossible: in the logits, or by the head's bias."""
    if name.startswith("head"):
        *rest, b = leaves
        forbidden = torch.zeros_like(b).movedim(0, -1)
        forbidden[..., 0] = -math.inf
        return [*(x.detach() for x in rest), b.detach() + forbidden.movedim(-1, 0)]
    (z,) = leaves
    z = z.detach().clone()
    (z.select(1, 0) if z.dim() > 1 else z[0]).fill_(-math.inf)
    return [z]


def at_forbidden(name, gradients):
    """The gradients that belong to class 0."""
    if name.startswith("head"):
        return [d[0] for d in gradients[1:]]
    return [d.select(1, 0) if d.dim() > 1 else d[0] for d in gradients]


FORBIDDING = [name for name in DOORS if name not in ("head", "head criterion K")]


@pytest.mark.parametrize("name", FORBIDDING)
@every_reduction
@pytest.mark.parametrize("kind", ["indices", "weighted", "probabilities", "smoothed, no weight"])
def test_r09_forbidden_class(name, reduction, kind):
    """As if the class were not there; also smoothed, if the forbidden class weighs nothing."""
    door = DOORS[name]
    leaves = forbid(name, draw(door.shapes))
    target = labels(door.batch).clamp(min=1)
    plain, options = target - 1, {"reduction": reduction}
    if kind == "weighted":
        options["weight"] = class_weight()
    if kind == "smoothed, no weight":
        options |= {"label_smoothing": 0.1, "weight": class_weight() * torch.tensor([0, 1, 1, 1])}
    plain_options = dict(options)
    if "weight" in options:
        plain_options["weight"] = options["weight"][1:]
    if kind == "probabilities":
        target, _ = probabilities(door)
        target[..., 0] = 0
        plain = target[..., 1:]
        target = target.movedim(-1, door.axis) if door.batch else target

    def g(*leaves):
        z = door.logits(*leaves)[..., 1:]
        if kind != "smoothed, no weight":
            return truth(z, plain, **plain_options)
        # the share is spread over all four classes, one of which weighs nothing
        s, w = 0.1, plain_options["weight"]
        log_a = z - z.exp().sum(-1, keepdim=True).log()
        hit = (plain.unsqueeze(-1) == torch.arange(3)).double()
        c = -(((1 - s) * hit + s / C) * w * log_a).sum(-1)
        n = (hit * w).sum()
        return {"none": c, "sum": c.sum(), "mean": c.sum() / n}[reduction]

    agree(lambda *leaves: door.loss(leaves, target, **options), g, leaves)
    leaves = [x.requires_grad_() for x in leaves]
    loss = door.loss(leaves, target, **options)
    assert loss.isfinite().all()
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert all(map(is_zero, at_forbidden(name, gradients)))


@pytest.mark.parametrize("name", FORBIDDING)
@every_reduction
@pytest.mark.parametrize("kind", ["smoothed", "true class", "probabilities"])
def test_r09_mass_on_a_forbidden_class_costs_infinity(name, reduction, kind):
    door = DOORS[name]
    leaves = [x.requires_grad_() for x in forbid(name, draw(door.shapes))]
    target = torch.full(door.batch, 0 if kind == "true class" else 2)
    if kind == "probabilities":
        target = probabilities(door)[1]
    smoothing = 0.1 if kind == "smoothed" else 0.0
    loss = door.loss(leaves, target, reduction=reduction, label_smoothing=smoothing)
    assert (loss == math.inf).all()
    assert not any(d.isnan().any() for d in torch.autograd.grad(loss.sum(), leaves))


@every_reduction
def test_r09_one_class_left(reduction):
    z = torch.full((3, C), -math.inf, dtype=torch.float64)
    z[:, 1] = 5.0
    z.requires_grad_()
    loss = F.cross_entropy(z, torch.ones(3, dtype=torch.long), reduction=reduction)
    loss.sum().backward()
    assert is_zero(loss)
    assert is_zero(z.grad)


@every_reduction
def test_r09_categorical_cross_entropy(reduction):
    """0 log 0 is 0; a true class of probability 0 costs infinity."""
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 3, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.0, 0.25, 0.75, 0.0], dtype=torch.float64).expand(3, C)
    for target, parts in ((t, t[0]), (torch.tensor([1, 1, 1]), torch.eye(C).double()[1])):
        loss = F.categorical_cross_entropy(p, target, reduction=reduction)
        n = 3 if reduction == "mean" else 1
        close(loss.sum(), torch.tensor(math.log(2) * 3 / n, dtype=torch.float64))
        (d,) = torch.autograd.grad(loss.sum(), p)
        close(d, (-parts / torch.tensor([1, 0.5, 0.5, 1]) / n).expand(3, C))
    loss = F.categorical_cross_entropy(p, torch.tensor([0, 0, 0]), reduction=reduction)
    assert (loss == math.inf).all()


# R10: mixed precision

autocast_types = pytest.mark.parametrize("half", HALF)


def mixtures(n):
    """float32 parameters and activations, either half, all half (by place)."""
    return [["float"] * n, ["half"] + ["float"] * (n - 1), ["float"] + ["half"] * (n - 1)]


@every_door
@autocast_types
@pytest.mark.parametrize("mixture", range(3))
@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        ("indices", "none"),
        ("weighted", "mean"),
        ("half weights", "sum"),
        ("smoothed", "mean"),
        ("probabilities", "sum"),
    ],
)
def test_r10_autocast(name, reduction, half, mixture, kind):
    door = DOORS[name]
    types = {"float": torch.float32, "half": half}
    leaves = [
        x.detach().to(types[type_]).requires_grad_()
        for x, type_ in zip(draw(door.shapes), mixtures(len(door.shapes))[mixture], strict=True)
    ]
    options = {"reduction": reduction}
    plain = target = labels(door.batch)
    if kind == "probabilities":
        plain, target = probabilities(door, torch.float32)
    if kind == "smoothed":
        options["label_smoothing"] = 0.1
    if "weight" in kind:
        options["weight"] = class_weight(half if kind == "half weights" else torch.float32)
    with torch.autocast("cpu", half):
        loss = door.loss(leaves, target, **options)
        weight = options.pop("weight", None)
        theirs = torch.nn.functional.cross_entropy(
            channels_second(door.logits(*leaves)).float(),
            channels_second(plain) if kind == "probabilities" else plain,
            weight=None if weight is None else weight.float(),
            **options,
        )
    assert loss.dtype == torch.float32
    ours = torch.autograd.grad(loss.sum(), leaves)
    assert [d.dtype for d in ours] == [x.dtype for x in leaves]

    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = truth(
        door.logits(*exact),
        plain.double() if kind == "probabilities" else plain,
        weight=None if weight is None else weight.double(),
        **options,
    )
    values = [(loss, theirs, expected)]
    values += zip(
        ours,
        torch.autograd.grad(theirs.sum(), leaves),
        torch.autograd.grad(expected.sum(), exact),
        strict=True,
    )
    for found, their, true in values:
        assert_no_worse(found, their, true, torch.finfo(half).eps)


def channels_second(x):
    return x.movedim(-1, 1) if x.dim() > 1 else x


def assert_no_worse(found, theirs, true, eps):
    def error(x):
        return (x.detach().double() - true).abs().max().item()

    assert error(found) <= error(theirs) + eps * true.abs().max().item()


@autocast_types
def test_r10_autocast_casts_the_product(half):
    x, W, b = draw(((5, D), (C, D), (C,)), torch.float32)
    with torch.autocast("cpu", half):
        z = F.linear(x, W, b)
        a = F.feedforward(x, [W], [b], activation="relu", output_activation="identity")
        plain = torch.nn.functional.linear(x, W, b)
    assert z.dtype == a.dtype == half
    assert torch.equal(z, plain)
    assert torch.equal(a, plain)
    for out in (z, a):
        assert {d.dtype for d in torch.autograd.grad(out.sum(), [x, W, b])} == {torch.float32}


@autocast_types
@every_reduction
@pytest.mark.parametrize("name", ["mse_loss", "squared_error", "sigmoid_squared_error"])
@pytest.mark.parametrize("other", ["half", "float"])
def test_r10_autocast_other_losses(name, half, reduction, other):
    f = getattr(F, name)
    a, t = (x.detach().to(half).requires_grad_() for x in draw(((5, D), (5, D))))
    t = t.detach().float().requires_grad_() if other == "float" else t
    with torch.autocast("cpu", half):
        loss = f(a, t, reduction=reduction)
    assert loss.dtype == torch.float32
    da, dt = torch.autograd.grad(loss.sum(), [a, t])
    assert (da.dtype, dt.dtype) == (a.dtype, t.dtype)
    exact = [x.detach().double().requires_grad_() for x in (a, t)]
    expected = f(*exact, reduction=reduction)
    close(loss.double(), expected, 1e-5)
    for d, e in zip((da, dt), torch.autograd.grad(expected.sum(), exact), strict=True):
        close(d.double(), e, torch.finfo(d.dtype).eps)


@autocast_types
@every_reduction
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_r10_autocast_categorical_cross_entropy(half, reduction, kind):
    p = torch.rand(5, C).softmax(-1).to(half).requires_grad_()
    target = labels((5,)) if kind == "indices" else torch.rand(5, C).to(half)
    with torch.autocast("cpu", half):
        loss = F.categorical_cross_entropy(p, target, reduction=reduction)
    t = torch.eye(C)[target].double() if kind == "indices" else target.double()
    c = -(t * p.detach().double().log()).sum(-1)
    assert loss.dtype == torch.float32
    close(loss.double(), {"none": c, "sum": c.sum(), "mean": c.mean()}[reduction], 1e-5)
    (d,) = torch.autograd.grad(loss.sum(), p)
    assert d.dtype == half


@autocast_types
@pytest.mark.parametrize("f", [F.sigmoid, F.tanh, F.relu, lambda z: F.softmax(z, -1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_r10_autocast_keeps_elementwise_types(half, f, dtype):
    z = torch.randn(4, D).to(dtype)
    with torch.autocast("cpu", half):
        assert f(z).dtype == dtype
        assert torch.equal(f(z), f(z.clone()))


@every_door
@autocast_types
def test_r10_autocast_leaves_float64_alone(name, half):
    door = DOORS[name]
    leaves, target = draw(door.shapes), labels(door.batch)
    value = door.loss(leaves, target)
    with torch.autocast("cpu", half):
        assert same(door.loss(leaves, target), value)
    assert value.dtype == torch.float64


@every_door
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_r10_without_autocast_the_loss_has_the_logits_type(name, dtype):
    door = DOORS[name]
    leaves = draw(door.shapes, dtype)
    loss = door.loss(leaves, labels(door.batch))
    assert loss.dtype == dtype
    assert {d.dtype for d in torch.autograd.grad(loss, leaves)} == {dtype}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("half", [*HALF, torch.float64])
@every_reduction
def test_r10_without_autocast_mixed_types_raise(name, half, reduction):
    door = DOORS[name]
    for i in range(len(door.shapes)):
        leaves = draw(door.shapes, torch.float32)
        leaves[i] = leaves[i].to(half)
        with pytest.raises(RuntimeError, match=str(half)):
            door.loss(leaves, labels(door.batch), reduction=reduction)


@every_door
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_r10_without_autocast_class_weights_of_another_type_raise(name, half, label_smoothing):
    door = DOORS[name]
    options = {"weight": class_weight(torch.float32), "label_smoothing": label_smoothing}
    with pytest.raises(RuntimeError, match="float32"):
        door.loss(draw(door.shapes, half), labels(door.batch), **options)


# R11: relu passes nan, and is flat at 0

RELUS = {
    "function": F.relu,
    "in place": lambda z: F.relu(z.clone(), inplace=True),
    "module": nn.ReLU(),
    "module in place": lambda z: nn.ReLU(inplace=True)(z.clone()),
    "feedforward": lambda z: F.feedforward(
        z.unsqueeze(-1),
        [torch.ones(1, 1, dtype=z.dtype), torch.ones(1, 1, dtype=z.dtype)],
        [None, None],
        activation="relu",
        output_activation="relu",
    ).squeeze(-1),
}


@pytest.mark.parametrize("name", RELUS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_r11_relu(name, dtype):
    z = torch.tensor([-2.0, -0.0, 0.0, 1e-7, 3.0, math.nan, math.inf, -math.inf], dtype=dtype)
    a = torch.tensor([0.0, 0.0, 0.0, 1e-7, 3.0, math.nan, math.inf, 0.0], dtype=dtype)
    slope = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0], dtype=dtype)
    z.requires_grad_()
    da = torch.arange(2, 10).to(dtype).requires_grad_()
    found = RELUS[name](z)
    torch.testing.assert_close(found, a, rtol=0, atol=0, equal_nan=True)
    (dz,) = torch.autograd.grad(found, z, da, create_graph=True)
    assert torch.equal(dz, da * slope)
    second = torch.autograd.grad(dz.sum(), [z, da], materialize_grads=True)
    assert is_zero(second[0])
    assert torch.equal(second[1], slope)
    _, tangent = jvp(RELUS[name], (z.detach(),), (da.detach(),))
    assert torch.equal(tangent, da * slope)
    (theirs,) = torch.autograd.grad(torch.relu(z), z, da.detach())
    assert torch.equal(dz, theirs)


@pytest.mark.parametrize("name", ["function", "in place", "module", "module in place"])
@pytest.mark.parametrize("size", [1, 33, 5000])
def test_r11_nan_anywhere(name, size):
    """Also where a vectorised loop ends."""
    for place in {0, size // 2, size - 1}:
        z = torch.full((size,), -1.0)
        z[place] = math.nan
        assert RELUS[name](z).isnan().nonzero().flatten().tolist() == [place]


# R12: any strides of any argument


def garbage(x, shape):
    """Memory around a view: whoever reads it as packed will notice."""
    if x.is_floating_point():
        return torch.full(shape, math.nan, dtype=x.dtype)
    return torch.full(shape, 77, dtype=x.dtype)


def transposed(x):
    axes = list(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def sliced(x):
    room = garbage(x, [n + 3 for n in x.shape])
    view = room[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def stepped(x):
    room = garbage(x, [2 * n + 1 for n in x.shape])
    view = room[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
    return view.copy_(x)


def expanded(x):
    """One entry or row, again and again: strides of 0."""
    return x[:1].clone().expand_as(x) if x.dim() else x


def constant(x):
    return x.reshape(-1)[:1].clone().expand(x.shape) if x.dim() else x


def negated(x):
    """A view with the negative bit, as the imaginary part of a conjugate has."""
    if not x.is_floating_point():
        return x
    return torch.complex(torch.zeros_like(x), -x).conj().imag


LAYOUTS = (transposed, sliced, stepped, expanded, constant, negated)


def probs(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.1


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def mean_of_squares(a, t):
    return ((a - t) ** 2).mean()


class Case(NamedTuple):
    """A function of ours, the same written out, and differentiable arguments; then the others."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    leaves: Callable[[], list[Tensor]]
    rest: Callable[[], list[Tensor]] = list


def written_softmax(z, dim):
    return z.exp() / z.exp().sum(dim, keepdim=True)


def head_case(*shapes, batch, axis=-1, kind="indices", **options):
    def ours(*args):
        *leaves, target, weight = args
        return through_head(leaves, target, weight=weight, **options)

    def plain(*args):
        *leaves, target, weight = args
        if target.is_floating_point():
            target = target.movedim(axis, -1)
        return truth(affine(*leaves), target, weight, **options)

    def rest():
        t = labels(batch) if kind == "indices" else probs(*batch, C).movedim(-1, axis).contiguous()
        return [t, class_weight()]

    return Case(ours, plain, lambda: [normal(*s) for s in shapes], rest)


CASES = {
    "linear": Case(
        F.linear, lambda x, W, b: x @ W.T + b, lambda: [normal(2, 4, D), normal(5, D), normal(5)]
    ),
    "sigmoid": Case(F.sigmoid, lambda z: 1 / (1 + (-z).exp()), lambda: [normal(4, D)]),
    "tanh": Case(
        F.tanh, lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()), lambda: [normal(4, D)]
    ),
    "relu": Case(F.relu, lambda z: torch.where(z > 0, z, 0), lambda: [normal(4, D)]),
    "softmax 0": Case(
        lambda z: F.softmax(z, 0), lambda z: written_softmax(z, 0), lambda: [normal(4, D, 2)]
    ),
    "softmax 1": Case(
        lambda z: F.softmax(z, 1), lambda z: written_softmax(z, 1), lambda: [normal(4, D, 2)]
    ),
    "softmax -1": Case(
        lambda z: F.softmax(z, -1), lambda z: written_softmax(z, -1), lambda: [normal(4, D, 2)]
    ),
    "softmax_jacobian": Case(
        lambda z: F.softmax_jacobian(z, 0),
        lambda z: torch.stack(
            [
                written_softmax(r, 0).diag()
                - written_softmax(r, 0)[:, None] * written_softmax(r, 0)[None, :]
                for r in z.T
            ]
        ),
        lambda: [normal(D, 4)],
    ),
    "mse_loss": Case(F.mse_loss, mean_of_squares, lambda: [normal(4, D), normal(4, D)]),
    "mse_loss none": Case(
        lambda a, t: F.mse_loss(a, t, reduction="none"),
        lambda a, t: (a - t) ** 2,
        lambda: [normal(4, D), normal(4, D)],
    ),
    "mse_loss weight": Case(
        lambda a, t, w: F.mse_loss(a, t, weight=w),
        lambda a, t, w: ((a - t) ** 2 * w).sum() / w.sum(),
        lambda: [normal(4, D), normal(4, D), probs(4, D)],
    ),
    "squared_error": Case(
        F.squared_error,
        lambda a, t: ((a - t) ** 2).sum(-1).mean() / 2,
        lambda: [normal(4, D), normal(4, D)],
    ),
    "squared_error axes": Case(
        lambda a, t: F.squared_error(a, t, reduction="none", dim=(0, 2)),
        lambda a, t: ((a - t) ** 2).sum((0, 2)) / 2,
        lambda: [normal(4, D, 2), normal(4, D, 2)],
    ),
    "sigmoid_squared_error": Case(
        lambda z, t: F.sigmoid_squared_error(z, t, reduction="none", dim=0),
        lambda z, t: ((1 / (1 + (-z).exp()) - t) ** 2).sum(0) / 2,
        lambda: [normal(4, D), normal(4, D)],
    ),
    "categorical_cross_entropy": Case(
        lambda p, t: F.categorical_cross_entropy(p, t, dim=1, base=2, reduction="none"),
        lambda p, t: -(t * p.log()).sum(1) / math.log(2),
        lambda: [probs(2, C, 3), probs(2, C, 3)],
    ),
    "categorical_cross_entropy indices": Case(
        lambda p, y: F.categorical_cross_entropy(p, y, dim=1),
        lambda p, y: -p.gather(1, y.long().unsqueeze(1)).log().mean(),
        lambda: [probs(2, C, 3)],
        lambda: [labels((2, 3))],
    ),
    "cross_entropy": Case(
        lambda z, y, w: F.cross_entropy(z, y, w, label_smoothing=0.1),
        lambda z, y, w: truth(z, y, w, label_smoothing=0.1),
        lambda: [normal(5, C)],
        lambda: [labels((5,)), class_weight()],
    ),
    "cross_entropy K": Case(
        lambda z, y, w: F.cross_entropy(z, y, w, reduction="none"),
        lambda z, y, w: truth(z.movedim(1, -1), y, w, reduction="none"),
        lambda: [normal(2, C, 3)],
        lambda: [labels((2, 3)), class_weight()],
    ),
    "cross_entropy probabilities": Case(
        lambda z, t, w: F.cross_entropy(z, t, w),
        lambda z, t, w: truth(z.movedim(1, -1), t.movedim(1, -1), w),
        lambda: [normal(2, C, 3), probs(2, C, 3)],
        lambda: [class_weight()],
    ),
    "head": head_case((5, D), (C, D), batch=(5,)),
    "head bias": head_case((5, D), (C, D), (C,), batch=(5,), reduction="none"),
    "head smoothed": head_case((5, D), (C, D), (C,), batch=(5,), label_smoothing=0.1),
    "head sequence": head_case((2, 3, D), (C, D), (C,), batch=(2, 3), reduction="none"),
    "head K": head_case((3, D), (C, 2, D), (C, 2), batch=(3, 2), axis=1, reduction="none"),
    "head probabilities": head_case((5, D), (C, D), (C,), batch=(5,), kind="probabilities"),
    "head sequence probabilities": head_case(
        (2, 3, D), (C, D), batch=(2, 3), kind="probabilities", reduction="none"
    ),
    "head K probabilities": head_case(
        (3, D), (C, 2, D), batch=(3, 2), axis=1, kind="probabilities"
    ),
    "feedforward": Case(
        lambda x, W, V, b, c: F.feedforward(
            x, [W, V], [b, c], activation="sigmoid", output_activation="softmax"
        ),
        lambda x, W, V, b, c: written_softmax((1 / (1 + (-x @ W.T - b).exp())) @ V.T + c, -1),
        lambda: [normal(4, D), normal(5, D), normal(2, 5), normal(5), normal(2)],
    ),
}


def put(f, rest, *leaves):
    return f(*leaves, *rest)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_r12_any_strides(name, layout):
    case = CASES[name]
    leaves, rest = case.leaves(), case.rest()
    n = len(leaves) + len(rest)
    with torch.no_grad():
        shape = case.plain(*leaves, *rest).shape
    k = len(leaves)
    for places in [*([i] for i in range(n)), list(range(n))]:
        args = [layout(x) if i in places else x for i, x in enumerate([*leaves, *rest])]
        plain = [x.resolve_neg().clone(memory_format=torch.contiguous_format) for x in args]
        cotangent = layout(torch.randn(shape, dtype=torch.float64))
        agree(
            functools.partial(put, case.ours, args[k:]),
            functools.partial(put, case.plain, plain[k:]),
            args[:k],
            plain[:k],
            cotangent,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["head", "head bias", "head sequence", "head K", "logits"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_r12_strided_labels_with_ignored_rows(layout, name, dtype):
    door = DOORS[name]
    target = layout(labels(door.batch, 3, 255, 1).to(dtype))
    options = {"ignore_index": 255, "reduction": "none", "label_smoothing": 0.1}
    agree_at(door, draw(door.shapes), target, target.contiguous(), **options)


def test_r12_relu_in_place_on_a_view():
    room = torch.randn(6, 8, dtype=torch.float64)
    before = room.clone()
    view = room[1:4, ::2]
    assert F.relu(view, inplace=True) is view
    expected = before.clone()
    expected[1:4, ::2] = before[1:4, ::2].clamp(min=0)
    assert torch.equal(room, expected)


# R13: softmax in another type, on any axis


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("source", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_r13_softmax_dtype(axis, source, dtype):
    z = torch.randn(3, 4, 2).to(source).requires_grad_()
    da = torch.randn(3, 4, 2).to(dtype)
    found = F.softmax(z, axis, dtype=dtype)
    assert found.dtype == dtype
    (dz,) = torch.autograd.grad(found, z, da, create_graph=True)
    assert dz.dtype == source
    (second,) = torch.autograd.grad(dz.sum(), z)
    assert second.dtype == source

    x = z.detach().to(dtype).double().requires_grad_()  # cast first
    a = written_softmax(x, axis)
    (dx,) = torch.autograd.grad(a, x, da.double(), create_graph=True)
    (dxx,) = torch.autograd.grad(dx.sum(), x)
    _, tangent = jvp(
        lambda z: F.softmax(z, axis, dtype=dtype), (z.detach(),), (torch.ones_like(z),)
    )
    assert tangent.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(source).eps)
    torch.testing.assert_close(found.double(), a, rtol=4 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(dz.double(), dx, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(second.double(), dxx, rtol=8 * eps, atol=8 * eps)
    assert tangent.abs().max() <= 4 * torch.finfo(dtype).eps  # a shift of all moves nothing


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("source", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_r13_integers(axis, source, dtype):
    z = torch.tensor([[0, 1, 3], [2, 1, 0]]).to(source)
    found = F.softmax(z, axis, dtype=dtype)
    assert found.dtype == dtype
    expected = written_softmax(z.double(), axis)
    torch.testing.assert_close(found.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    with pytest.raises(NotImplementedError):
        torch.softmax(z, axis)
    with pytest.raises(NotImplementedError):
        F.softmax(z, axis)


def test_r13_large_halves_do_not_overflow_first():
    z = torch.tensor([60000.0, 60000.0, -60000.0], dtype=torch.float16)
    expected = torch.tensor([0.5, 0.5, 0.0])
    assert torch.equal(F.softmax(z, 0, dtype=torch.float32), expected)


# R14: (n, 1) against (n)

MISMATCHED = [
    ((4, 1), (4,)),
    ((4,), (4, 1)),
    ((4, 3), (3,)),
    ((2, 4, 1), (4,)),
    ((), (4,)),
    ((4,), ()),
    ((4,), (1,)),
]
mismatched = pytest.mark.parametrize(("shape", "other"), MISMATCHED)


@mismatched
@every_reduction
@pytest.mark.parametrize("module", [False, True])
def test_r14_mse_loss_warns_and_broadcasts(shape, other, reduction, module):
    a, t = normal(*shape).requires_grad_(), normal(*other).requires_grad_()
    f = nn.MSELoss(reduction=reduction) if module else F.mse_loss
    options = {} if module else {"reduction": reduction}
    with pytest.warns(UserWarning, match="target size.*different to the input size"):
        loss = f(a, t, **options)
    with pytest.warns(UserWarning, match="different"):
        theirs = torch.nn.functional.mse_loss(a, t, reduction=reduction)
    squares = (a.detach() - t.detach()) ** 2
    expected = {"none": squares, "sum": squares.sum(), "mean": squares.mean()}[reduction]
    close(loss.detach(), expected)
    cotangent = torch.randn_like(loss)
    found = torch.autograd.grad(loss, [a, t], cotangent, create_graph=True)
    assert [d.shape for d in found] == [a.shape, t.shape]
    plain = torch.autograd.grad(theirs, [a, t], cotangent, create_graph=True)
    for d, e in zip(found, plain, strict=True):
        close(d, e)
        seconds = (torch.autograd.grad(x.square().sum(), [a, t], retain_graph=True) for x in (d, e))
        for second, their_second in zip(*seconds, strict=True):
            close(second, their_second)


def test_r14_mse_loss_warning_names_the_caller():
    with pytest.warns(UserWarning, match="broadcasting") as caught:
        F.mse_loss(torch.zeros(4, 1), torch.zeros(4))
    assert caught[0].filename == __file__


@mismatched
@every_reduction
@pytest.mark.parametrize(
    ("f", "module"),
    [
        (F.squared_error, nn.SquaredErrorLoss),
        (F.sigmoid_squared_error, nn.SigmoidSquaredErrorLoss),
    ],
)
def test_r14_own_losses_refuse(shape, other, reduction, f, module):
    a, t = normal(*shape), normal(*other)
    for g in (lambda a, t: f(a, t, reduction=reduction), module(reduction=reduction)):
        with pytest.raises(ValueError, match="one shape") as error:
            g(a, t)
        assert str(shape) in str(error.value)
        assert str(other) in str(error.value)


# R15: accumulated micro-batches


@pytest.mark.parametrize("name", ["logits", "criterion", "head", "head bias", "head sequence"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_r15_micro_batches(name, weighted, label_smoothing, dtype):
    """Of 1, 5, 0 and 3 tokens that count, beside ignored ones."""
    door = DOORS[name]
    N = 12
    trailing = door.batch[1:]
    first = draw([(N, *door.shapes[0][1:])], dtype)[0]
    parameters = draw(door.shapes[1:], dtype)
    target = labels((N, *trailing))
    target.view(N, -1)[[1, 2, 8, 9]] = -100
    weight = class_weight(dtype) if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing}

    full = door.loss([first, *parameters], target, **options)
    leaves = [first, *parameters]
    expected = torch.autograd.grad(full, leaves)

    kept = target[target != -100]
    count = kept.numel() if weight is None else weight[kept].sum()
    total = 0.0
    for rows in (slice(0, 3), slice(3, 8), slice(8, 10), slice(10, 12)):
        part = door.loss([first[rows], *parameters], target[rows], reduction="sum", **options)
        (part / count).backward()
        total += part.item()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    close(torch.tensor(total / float(count), dtype=dtype), full.detach(), tolerance)
    for x, d in zip(leaves, expected, strict=True):
        close(x.grad, d, tolerance)
    rows = first.detach().double()
    plain = [rows, *(x.detach().double() for x in parameters)]
    plain = [x.requires_grad_() for x in plain]
    options["weight"] = None if weight is None else weight.double()
    loss = truth(door.logits(*plain), target, **options)
    for x, d in zip(leaves, torch.autograd.grad(loss, plain), strict=True):
        close(x.grad.double(), d, tolerance)


@pytest.mark.parametrize(
    ("f", "count"),
    [(F.mse_loss, 10 * D), (F.squared_error, 10), (F.sigmoid_squared_error, 10)],
)
def test_r15_other_losses(f, count):
    a, t = draw(((10, D), (10, D)))
    expected = torch.autograd.grad(f(a, t), [a, t])
    for rows in (slice(0, 1), slice(1, 8), slice(8, 8), slice(8, 10)):
        (f(a[rows], t[rows], reduction="sum") / count).backward()
    close(a.grad, expected[0])
    close(t.grad, expected[1])


# R16: hooks through a swap

HOOKS = {
    "forward_pre": lambda m, note: m.register_forward_pre_hook(lambda *_: note()),
    "forward": lambda m, note: m.register_forward_hook(lambda *_: note()),
    "forward with kwargs": lambda m, note: m.register_forward_hook(
        lambda *_: note(), with_kwargs=True
    ),
    "forward always": lambda m, note: m.register_forward_hook(lambda *_: note(), always_call=True),
    "full_backward_pre": lambda m, note: m.register_full_backward_pre_hook(lambda *_: note()),
    "full_backward": lambda m, note: m.register_full_backward_hook(lambda *_: note()),
    "state_dict_pre": lambda m, note: m.register_state_dict_pre_hook(lambda *_: note()),
    "state_dict_post": lambda m, note: m.register_state_dict_post_hook(lambda *_: note()),
    "load_state_dict_pre": lambda m, note: m.register_load_state_dict_pre_hook(lambda *_: note()),
    "load_state_dict_post": lambda m, note: m.register_load_state_dict_post_hook(lambda *_: note()),
}


@pytest.mark.filterwarnings("ignore::torch_nnmath.deferred.MaterializedLogits")
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("kind", HOOKS)
def test_r16_hooks_fire_once_and_can_be_removed(place, kind):
    from torch_nnmath import swap, unswap

    model = torch.nn.Sequential(
        torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, C), torch.nn.Softmax(-1)
    )
    plain = copy.deepcopy(model)
    calls = []
    handle = HOOKS[kind](model[place], lambda: calls.append(kind))

    def fired():
        calls.clear()
        x = torch.ones(2, D, requires_grad=True)
        out = model(x)
        torch.testing.assert_close(out, plain(x))
        out.sum().backward()
        model.load_state_dict(model.state_dict())
        return len(calls)

    assert fired() == 1
    swap(model)
    assert type(model[place]) is getattr(nn, type(plain[place]).__name__)
    assert fired() == 1
    unswap(model)
    assert type(model[place]) is type(plain[place])
    assert fired() == 1
    swap(model)
    handle.remove()
    assert fired() == 0
    unswap(model)
    assert fired() == 0


# R17: state dicts of criteria

needs_head = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"),
    reason="nn.LinearCrossEntropyLoss came with PyTorch 2.13",
)


def pairs():
    options: list[dict[str, Any]] = [{}, {"weight": class_weight(torch.float32)}]
    for i, more in enumerate(options):
        for bias in (False, True):
            yield pytest.param(
                lambda module, more=more, bias=bias: module.LinearCrossEntropyLoss(
                    D, C, bias=bias, **more
                ),
                id=f"LinearCrossEntropyLoss-{bias}-{i}",
                marks=needs_head,
            )
        yield pytest.param(
            lambda module, more=more: module.CrossEntropyLoss(**more), id=f"CrossEntropyLoss-{i}"
        )


@pytest.mark.parametrize("make", [*pairs()])
def test_r17_state_dicts_load_strictly_both_ways(make):
    ours, theirs = make(nn), make(torch.nn)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    changed = {key: value + 1 for key, value in theirs.state_dict().items()}
    assert not any(ours.load_state_dict(changed, strict=True))
    for key, value in ours.state_dict().items():
        assert torch.equal(value, changed[key])
    assert not any(theirs.load_state_dict(ours.state_dict(), strict=True))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, changed[key])


def test_r17_a_checkpoint_without_class_weights_is_refused_as_by_pytorch():
    weight = class_weight(torch.float32)
    for module in (nn, torch.nn):
        with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
            module.CrossEntropyLoss(weight=weight).load_state_dict({})
        with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
            module.CrossEntropyLoss().load_state_dict({"weight": weight})


@pytest.mark.parametrize("weighted", [False, True])
def test_r17_swapping_keeps_the_keys(weighted):
    from torch_nnmath import swap, unswap

    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(D, C)
            weight = class_weight(torch.float32) if weighted else None
            self.criterion = torch.nn.CrossEntropyLoss(weight)

        def forward(self, x, y):
            return self.criterion(self.net(x), y)

    task, plain = Task(), Task()
    checkpoint = copy.deepcopy(plain.state_dict())
    for change in (swap, unswap):
        change(task)
        assert list(task.state_dict()) == list(checkpoint)
        assert not any(task.load_state_dict(checkpoint, strict=True))
        assert not any(plain.load_state_dict(task.state_dict(), strict=True))
        x, y = torch.randn(5, D), labels((5,), -100)
        torch.testing.assert_close(task(x, y), plain(x, y))
