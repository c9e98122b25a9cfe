"""The fast paths: that they are taken, when they may be, and give what is written."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from torch_nnmath import formulas, kernels, testing, verify
from torch_nnmath import functional as G
from torch_nnmath.catalog import CATALOG
from torch_nnmath.kernels import _block, dispatch, elementwise
from torch_nnmath.kernels import cross_entropy as _op

N, D, C = 70, 5, 7


def drawn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def classes(ignored=True):
    y = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(1))
    if ignored:
        y[::3] = -100
    return y


@pytest.fixture
def small(monkeypatch):
    """Slices of a few entries and blocks of 32 rows."""
    for module in (blocked, elementwise, rowwise):
        monkeypatch.setattr(module, "SLICE", 64)
    monkeypatch.setattr(blocked, "BLOCK_BYTES", (0, 32 * 4 * C))
    monkeypatch.setattr(choice, "FEW", 0)


# ---- what an operator is to torch.library

y, keep = classes().clamp(min=0), classes() >= 0
z, p, t = drawn(N, C), drawn(N).abs(), drawn(N, C).softmax(1)
x, W, b = drawn(N, D), drawn(C, D), drawn(C)
column = (drawn(N, 1, seed=2), z, p[:, None], None, y[:, None], keep[:, None], 1, 2.0)
five = [True] * 5
sums = torch.stack([drawn(N, seed=3), drawn(N, seed=4).abs() + 1, drawn(N, seed=5)], 1)
OPERATORS = {
    "class_indices": [(classes(), C, -100), (classes(False), C, None)],
    "cross_entropy": [
        (None, *column[1:], True),
        (None, z, None, t, None, None, 1, 2.0, True),
        (None, z[0], None, t[0], None, None, 0, 3.0, True),
        (*column, False),
        (*column, True),
        (column[0], z, None, t, None, None, 1, 2.0, False),
        (p[0], z.half(), p.float()[:, None], t.float(), y[:, None], keep[:, None], 1, 2.0, True),
    ],
    "head": [
        (
            p[0],
            None,
            None,
            x,
            W,
            b,
            y,
            p,
            None,
            keep,
            None,
            2.0,
            None,
            [False] * 2,
            [*five[:4], False],
        ),
        (p, p[1], p, x, W, None, y, p, t[:1], keep, None, 2.0, 0.5, [True] * 2, five),
        (p, None, p, x, W, b, None, None, t, keep, None, 2.0, None, [False, True], five),
        (
            *(p.float(), p.float(), None, x.half(), W.half(), None, None, None, t.float(), None),
            *(None, 2.0, 1.0, [True, False], [*five[:2], False, False, True]),
        ),
        (None, None, None, x, W, None, y, p, None, None, None, 2.0, None, [False] * 2, [False] * 5),
        (p, p, p, x, W, b, y, p, t, keep, sums, 2.0, 0.5, [False] * 2, [*five[:3], False, False]),
    ],
    "head_second": [
        (p, None, None, x, W, b, y, p, t, keep, x, W, b, p, t, 2.0, None, five),
        (p, p, p, x, W, b, y, p, t, keep, x, W, b, p, t, 2.0, 0.5, five),
        (
            *(p, None, None, x, W, None, y, p, None, None, x, None, None, None, None, 2.0, None),
            [True, *[False] * 4],
        ),
    ],
    "relu_product": [(z.relu(), t), (z.relu().half(), t.half()), (z.relu()[0, 0], t[0, 0])],
    "sigmoid_product": [(z.sigmoid(), t), (z.sigmoid().bfloat16(), t.bfloat16())],
    "sigmoid_squared_error": [
        (None, z, t, 1, True),
        (None, z.half(), t, 2, True),
        (p[:, None], z, t, 1, False),
        (p[0], z.half(), t.half(), 2, True),
    ],
    "softmax_product": [(t, z, -1), (t, z, 0)],
    "squared_error": [
        (None, z, t, 1, 2.0, True),
        (None, z, t, 2, 1.0, True),
        (None, z.half(), t.half(), 0, 1.0, True),
        (p[:, None], z, t, 1, 2.0, True),
        (p[0], z, t, 2, 1.0, False),
        (z, t, z, 0, 1.0, False),
    ],
    "tanh_product": [(z.tanh().T, t.T), (z.tanh(), t), (z.tanh().half(), t.half())],
}


def test_every_operator_is_checked():
    assert sorted(OPERATORS) == sorted(kernels.__all__)


@pytest.mark.parametrize(
    ("name", "args"), [(name, args) for name, rows in OPERATORS.items() for args in rows]
)
def test_opcheck(name, args):
    """Schema, fake, no aliases; and nothing is read or left that was never written."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = getattr(kernels, name)
    torch.library.opcheck(operator, args, test_utils=tests)
    plain = operator(*args)
    torch.use_deterministic_algorithms(True)  # fills what is only allocated with nan
    try:
        filled = operator(*args)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(filled, plain, rtol=0, atol=0)


# ---- fast and written


def losses():
    """(name, function of leaves, leaves) of every option."""
    w = drawn(C, seed=3).abs()
    options = itertools.product(
        ("none", "sum", "mean"), (False, True), (0.0, 0.2), (torch.e, 2.0), ("y", "t")
    )
    ours = itertools.cycle([(None, 0.0), (1.5, 0.0), (None, 0.3), (0.5, 0.2), (None, 0.0)])
    for reduction, weighted, smoothing, base, target in options:
        kwargs = {"reduction": reduction, "label_smoothing": smoothing, "base": base}
        cap, z_loss = next(ours)
        kwargs |= {"softcap": cap, "z_loss": z_loss}
        name = f"{reduction}-{'weighted-' * weighted}{smoothing}-{base:.2g}-{target}-{cap}-{z_loss}"
        weights = [w] if weighted else []
        for ignored in (False, True) if target == "y" else (False,):
            goal = classes(ignored) if target == "y" else t

            def logits(z, *weights, goal=goal, kwargs=kwargs):
                return G.cross_entropy(z, goal, *weights, **kwargs)

            def head(x, W, *rest, goal=goal, kwargs=kwargs):
                named = dict(zip(("linear_bias", "weight"), rest, strict=False))
                return G.linear_cross_entropy(x, W, goal, **named, **kwargs)

            yield f"logits-{name}-{'ignored' * ignored}", logits, [z, *weights]
            yield f"head-{name}-{'ignored' * ignored}", head, [x, W, b, *weights]
            if not weighted:
                yield f"head-{name}-{'ignored' * ignored}-no bias", head, [x, W]


def elements():
    for f in (G.sigmoid, G.tanh, G.relu):
        yield f.__name__, f, [z]
    for dim in (0, 1, -1):
        yield f"softmax-{dim}", lambda z, dim=dim: G.softmax(z, dim), [z]
    for reduction in ("none", "sum", "mean"):
        for f in (G.mse_loss, G.squared_error, G.sigmoid_squared_error):
            yield (
                f"{f.__name__}-{reduction}",
                lambda z, t, f=f, reduction=reduction: f(z, t, reduction=reduction),
                [z, t],
            )
            yield (
                f"{f.__name__}-{reduction}-of a constant target",
                lambda z, f=f, reduction=reduction: f(z, t, reduction=reduction),
                [z],
            )
        yield (
            f"squared_error-all axes-{reduction}",
            lambda z, t, reduction=reduction: G.squared_error(
                z, t, dim=(0, 1), reduction=reduction
            ),
            [z, t],
        )


CASES = {name: (f, leaves) for name, f, leaves in (*losses(), *elements())}


def results(f, leaves, dtype=torch.float64, upstream="uneven"):
    leaves = [v.detach().to(dtype, copy=True).requires_grad_() for v in leaves]
    value = f(*leaves)
    g = drawn(*value.shape, seed=5).to(value.dtype)
    if upstream == "even":
        g = torch.full((), 0.7, dtype=value.dtype).expand(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, g)]


@pytest.mark.parametrize("upstream", ["uneven", "even"])
@pytest.mark.parametrize("name", CASES)
def test_fast_is_what_is_written(small, monkeypatch, name, upstream):
    f, leaves = CASES[name]
    fast = results(f, leaves, upstream=upstream)
    monkeypatch.setattr(choice, "FEW", 2**40)

    class Open(formulas.LinearCrossEntropy):
        @classmethod
        def of(cls, *inputs):
            return cls.in_the_open(*inputs)

    monkeypatch.setattr(formulas, "LinearCrossEntropy", Open)
    monkeypatch.setattr(costs, "wanted_of_head", lambda n, inputs: None)
    for got, want in zip(fast, results(f, leaves, upstream=upstream), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in CASES if "ignored" in name and "head" in name])
def test_masks_do_what_gathering_does(small, monkeypatch, name):
    f, leaves = CASES[name]
    gathered = results(f, leaves)
    monkeypatch.setattr(blocked, "_is_counted", lambda keep: False)
    for got, want in zip(results(f, leaves), gathered, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("f", [G.sigmoid, G.tanh])
@pytest.mark.parametrize("fused", [True, False])
def test_near_saturation(monkeypatch, f, fused):
    """Whether or not the machine multiplies and adds with one rounding."""
    if fused and not elementwise._rounds_once():
        pytest.skip("this machine does not")
    monkeypatch.setattr(elementwise, "_rounds_once", lambda: fused)
    z = torch.linspace(-9, 9, 1001)
    _, slope = results(f, [z], dtype=torch.float32, upstream="even")
    a = f(z).double()  # the derivative from the rounded output, as all of PyTorch's
    true = 0.7 * (a * (1 - a) if f is G.sigmoid else (1 - a) * (1 + a))
    torch.testing.assert_close(slope.double(), true, rtol=5e-7, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_where_the_sigmoid_is_nearly_one(small, reduction):
    """σ(z) σ(-z), for 1 - σ(z) is 0 in float32 from z = 17 on."""
    z = torch.linspace(-60, 60, 999)[:, None]
    t = torch.zeros_like(z)
    _, slope, _ = results(
        lambda z, t: G.sigmoid_squared_error(z, t, reduction=reduction),
        [z, t],
        torch.float32,
        "even",
    )
    a, rest = torch.sigmoid(z.double()), torch.sigmoid(-z.double())
    true = 0.7 * a * a * rest / (999 if reduction == "mean" else 1)
    normal = true > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(slope.double()[normal], true[normal], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("bias", "x_scale"),
    [
        pytest.param([300.0] * C, 1, id="sums overflow"),
        pytest.param([-300.0] * C, 1, id="sums vanish"),
        pytest.param([85.0] * C, 1e-5, id="what is over them vanishes"),
        pytest.param([*[0.0] * (C - 1), -150.0], 1, id="a target is far below"),
        pytest.param([40.0, *[30.0] * (C - 1)], 0, id="the loss is small, the logits not"),
        pytest.param([0.0] * C, 1000, id="spread"),
    ],
)
@pytest.mark.parametrize("target", ["most likely", "least likely"])
@pytest.mark.parametrize("f", [G.linear_cross_entropy, G.cross_entropy])
def test_logits_far_from_zero(small, bias, x_scale, target, f):
    """Where sums of e^z would overflow, or vanish, a block starts again from the maximum."""
    exact = drawn(N, D) * x_scale, drawn(C, D, seed=4), torch.tensor(bias, dtype=torch.float64)
    leaves = [v.float().requires_grad_() for v in exact]
    true = [v.detach().double().requires_grad_() for v in leaves]
    z = F.linear(*true)
    y = z.argmax(1) if target == "most likely" else z.argmin(1)

    def found(loss, leaves):
        return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves))]

    truth = found(F.cross_entropy(z, y), true)
    eager = found(F.cross_entropy(F.linear(*leaves), y), leaves)
    if f is G.cross_entropy:
        loss = f(F.linear(*leaves), y)
    else:
        loss = f(leaves[0], leaves[1], y, linear_bias=leaves[2])
    for got, plain, want in zip(found(loss, leaves), eager, truth, strict=True):
        slack = 4 * (plain - want).abs().max() + 4e-7 * want.abs().max()
        assert (got - want).abs().max() <= slack


def test_what_one_block_needs_the_next_ones_have_at_once(small, monkeypatch):
    asked = []
    real = blocked._Block.logits_

    def logits(block, classes):
        asked.append(classes.stop)
        return real(block, classes)

    monkeypatch.setattr(blocked._Block, "logits_", logits)
    G.linear_cross_entropy(x, W, classes(False), linear_bias=torch.full_like(b, 300))
    slices = [*range(1, C + 1)]
    assert asked == slices * 4  # of the first of 3 blocks twice


# ---- when


LOSSES = (G.mse_loss, G.sigmoid_squared_error, G.cross_entropy)


@pytest.mark.parametrize("f", [G.sigmoid, G.tanh, G.relu, *LOSSES])
def test_fast_where_nothing_differentiates_through_it(monkeypatch, f):
    found = []
    monkeypatch.setattr(choice, "FEW", 0)
    real = choice.is_unseen
    monkeypatch.setattr(choice, "is_unseen", lambda args: found.append(real(args)) or found[-1])

    def scalar(z):
        return (f(z, t, reduction="none") if f in LOSSES else f(z)).sum()

    leaf = z.clone().requires_grad_()
    loss = scalar(leaf)
    found.clear()
    torch.autograd.grad(loss, leaf, retain_graph=True)
    assert found == [True]
    found.clear()
    torch.autograd.grad(loss, leaf, create_graph=True)
    assert True not in found or f in (G.tanh, G.relu)  # their products are Functions themselves


# ---- gradients that come with a cost


def head(x, W):
    return G.linear_cross_entropy(x, W, classes())


other = drawn(N, C, seed=8).softmax(1)
COSTS = {
    "head": (head, (x, W)),
    "logits": (lambda z: G.cross_entropy(z, classes()), (z,)),
    "probabilities": (lambda z: G.cross_entropy(z, other, reduction="sum"), (z,)),
    "squared error": (lambda z: G.mse_loss(z, t), (z,)),
    "sigmoid": (lambda z: G.sigmoid_squared_error(z, t), (z,)),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_graph_may_be_walked_as_often_as_one_likes(small, name):
    f, tensors = COSTS[name]
    leaves = [v.clone().requires_grad_() for v in tensors]
    loss = f(*leaves) * 3
    (first,) = torch.autograd.grad(loss, leaves[:1], retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, torch.tensor(2.0, dtype=loss.dtype))
    torch.testing.assert_close(first, again[0], rtol=0, atol=0)
    for a, b in zip(again, third, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-13, atol=0)
    loss = f(*leaves)
    loss.backward(retain_graph=True)
    once = [v.grad.clone() for v in leaves]
    loss.backward()
    for a, v in zip(once, leaves, strict=True):
        torch.testing.assert_close(2 * a, v.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["head", "logits"])
def test_an_infinite_upstream_gradient_spares_the_ignored_rows(small, name):
    f, tensors = COSTS[name]
    leaves = [v.clone().requires_grad_() for v in tensors]
    got, *_ = torch.autograd.grad(f(*leaves) * torch.inf, leaves)
    assert (got[~keep] == 0).all()
    assert not got[keep].isfinite().any()


@pytest.mark.parametrize("name", [name for name in COSTS if name != "head"])
def test_the_gradient_is_found_with_the_value(small, monkeypatch, name):
    """In one pass, and only where it will be wanted."""
    f, (v,) = COSTS[name]
    calls = []
    for module in (rowwise, elementwise):
        real = module._results
        monkeypatch.setattr(
            module,
            "_results",
            lambda dc, *args, real=real: calls.append(dc is not None) or real(dc, *args),
        )
    leaf = v.clone().requires_grad_()
    (f(leaf) * 2).backward()
    assert calls == [True]
    calls.clear()
    f(v)
    with torch.no_grad():
        f(leaf)
    assert calls == [False, False]


def test_three_products_not_four(monkeypatch):
    calls = []
    real = kernels.head
    monkeypatch.setattr(kernels, "head", lambda *args: calls.append(args[-1]) or real(*args))
    leaves = [v.clone().requires_grad_() for v in (x, W)]
    head(*leaves).backward()
    assert calls == [[True, True, False, False, False]]
    calls.clear()
    head(x, leaves[1]).backward()
    assert calls == [[False, True, False, False, False]]
    calls.clear()
    with torch.no_grad():
        head(*leaves)
    assert calls == [[False] * 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_before_it_is_rounded(dtype):
    """A loss scaled up, as for float16, has gradients that are not lost below its least number."""
    scale = 2.0**12
    leaves = [(v * 2.0**-9).to(dtype).requires_grad_() for v in (x, W)]
    gradients = torch.autograd.grad(head(*leaves).float() * scale, leaves)
    wide = [v.detach().double().requires_grad_() for v in leaves]
    true = torch.autograd.grad(head(*wide) * scale, wide)
    for got, want in zip(gradients, true, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * want.abs().max() / 100)


@pytest.mark.parametrize("name", COSTS)
def test_a_hessian_vector_product_does_not_see_that_they_came_before(small, name):
    f, tensors = COSTS[name]
    plain = {
        "head": lambda x, W: F.cross_entropy(x @ W.T, classes()),
        "logits": lambda z: F.cross_entropy(z, classes()),
        "probabilities": lambda z: F.cross_entropy(z, other, reduction="sum"),
        "squared error": lambda z: F.mse_loss(z, t),
        "sigmoid": lambda z: F.mse_loss(z.sigmoid(), t, reduction="sum") / (2 * N),
    }[name]
    leaves = [v.clone().requires_grad_() for v in tensors]
    directions = [drawn(*v.shape, seed=7) for v in tensors]
    fast, written = [], []
    for products, function in ((fast, f), (written, plain)):
        gradients = torch.autograd.grad(function(*leaves) ** 2, leaves, create_graph=True)
        products += [*gradients, *torch.autograd.grad(gradients, leaves, directions)]
    for a, b in zip(fast, written, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


EAGER = tuple(
    name for name in verify.TRANSFORMS if not any(w in name for w in ("compile", "export", "trace"))
)


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(sample, id=f"{row.name}: {sample.name}")
        for row in CATALOG
        if {"F2", "F4", "F6", "F7", "F9", "F12", "F13", "F15"} & set(row.ids)
        for sample in row.samples
    ],
)
def test_every_transform_of_few_entries(small, sample):
    """The catalog's samples are small; here they too take the fast paths."""
    report = testing.check(sample.call, sample.draw(device="cpu"), transforms=EAGER)
    assert report.right, str(report)


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), float("-inf")])
def test_of_what_weighs_nothing(monkeypatch, small, hostile):
    """A logit that is not finite, in the class and outside it, where the target there is 0."""
    w = torch.ones(C, dtype=torch.float64)
    w[0] = 0
    y = torch.arange(N) % C
    odd = z.clone()
    odd[:4, 0] = hostile
    zeros = t.masked_fill(torch.arange(C) == 0, 0)

    def found():
        return [
            *results(lambda z: G.cross_entropy(z, y, w, reduction="none"), [odd]),
            *results(lambda z: G.cross_entropy(z, zeros, reduction="none"), [odd]),
        ]

    fast = found()
    monkeypatch.setattr(choice, "FEW", 2**40)
    torch.testing.assert_close(fast, found(), rtol=1e-11, atol=1e-13, equal_nan=True)


def test_many_rows_without_a_class():
    """Too many for the written path by their number, but there is nothing in them."""
    empty = torch.empty(2**15 + 1, 0, requires_grad=True)
    loss = G.cross_entropy(empty, torch.empty(empty.shape), reduction="none")
    loss.backward(torch.ones_like(loss))
    assert not loss.any()
    assert empty.grad.shape == empty.shape
