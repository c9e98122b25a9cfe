"""Kernels: registered correctly, used where nothing can observe them, equal to the formulas."""

import functools
import importlib
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import check_operator, limit_head_blocks, measure_peak_growth, needs_linux_maxrss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from torch_nnmath import formulas, kernels, testing, verify
from torch_nnmath import functional as G
from torch_nnmath._records import HeadInputs, Target
from torch_nnmath.catalog import CATALOG
from torch_nnmath.kernels import _block, dispatch, elementwise

cost = importlib.import_module("torch_nnmath.formulas.cost")

N, D, C = 70, 5, 7


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw_classes(with_ignored=True):
    y = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(1))
    if with_ignored:
        y[::3] = -100
    return y


# Registration with torch.library

y, keep = draw_classes().clamp(min=0)[:, None], (draw_classes() >= 0)[:, None]
z, p, t = draw(N, C), draw(N, 1).abs(), draw(N, C).softmax(1)
x, W, b = draw(N, D), draw(C, D), draw(C)
ALL, NONE = [True] * 5, [False] * 5
sums = torch.stack([draw(N, seed=3), draw(N, seed=4).abs() + 1, draw(N, seed=5)], 1)
x16, W16, p32, t32 = x.half(), W.half(), p.float(), t.float()
one = p[0, 0]
ROWS = (draw(N, 1, seed=2), z, y, p, None, keep, 1, 2.0)
CLASS = HeadInputs(x, W, b, Target(y, p, None), keep, 2.0).flatten()
NO_BIAS = HeadInputs(x, W, None, Target(y, p, None), None, 2.0).flatten()
BOTH = HeadInputs(x, W, b, Target(y, p, t), keep, 2.0, 0.5).flatten()
SHARED = HeadInputs(x, W, None, Target(y, p, t[:1]), keep, 2.0, 0.5).flatten()
DENSE = HeadInputs(x, W, b, Target(None, None, t), keep, 2.0).flatten()
DENSE_BESIDE_CLASS = HeadInputs(x, W, b, Target(y, p, t), keep, 2.0).flatten()
HALF = HeadInputs(x16, W16, None, Target(None, None, t32), None, 2.0, 1.0).flatten()
AUTOCAST = HeadInputs(  # a float32 weight, and features that are scaled
    2 * x16.float(), W.float(), None, Target(y, p32, None), keep, 2.0, None, torch.float16,
    x16, torch.tensor(2.0),
).flatten()  # fmt: skip

xt, Wt, bt, VALUES = draw(N, 3), draw(C, 3), draw(C, seed=6), [True] * 6
k_indices = draw(N, C, seed=7).topk(2).indices
STUDENT, HEADS = (x, W, b), (xt, Wt, bt)
OPTIONS = (0.3, 1.5, 0.4, 2.0, True, True)  # the last fields of `DivergenceInputs`, from mix on
TOP_K = (*STUDENT, -1 - t[:, :2], None, None, k_indices, y, keep)
OPERATORS = {
    "class_indices": [(draw_classes(), C, -100), (draw_classes(False), C, None)],
    "cross_entropy": [
        (None, *ROWS[1:], True),
        (None, z, None, None, t, None, 1, 2.0, True),
        (None, z[0], None, None, t[0], None, 0, 3.0, True),
        (*ROWS, False),
        (*ROWS, True),
        (ROWS[0], z, None, None, t, None, 1, 2.0, False),
        (one, z.half(), y, p32, t32, keep, 1, 2.0, True),
    ],
    "divergence": [
        (*STUDENT, *HEADS, None, y, keep, *OPTIONS, p, VALUES),
        (*STUDENT, *HEADS, None, None, None, 0.0, *OPTIONS[1:], one, [*VALUES[:3], *NONE[:3]]),
        (
            x16,
            W16,
            None,
            z,
            None,
            None,
            None,
            None,
            keep,
            1.0,
            *OPTIONS[1:],
            p,
            [True] * 4 + NONE[:2],
        ),
        (*TOP_K, *OPTIONS, one, [True] * 4 + NONE[:2]),
        (*TOP_K, *OPTIONS, None, [False] * 6),
    ],
    "divergence_second_order": [
        (*STUDENT, *HEADS, None, y, keep, *OPTIONS, p, *STUDENT, *HEADS, VALUES),
        (*STUDENT, *HEADS, None, y, keep, 0.0, *OPTIONS[1:], p, x, *[None] * 5, VALUES),
        (*TOP_K, *OPTIONS, p, *STUDENT, t[:, :2], None, None, [True] * 4 + NONE[:2]),
    ],
    "head": [
        (*CLASS, one, None, None, None, [False] * 2, [*ALL[:4], False]),
        (*SHARED, p, one, p, None, [True] * 2, ALL),
        (*DENSE, p, None, p, None, [False, True], ALL),
        (*HALF, p32, p32, None, None, [True, False], [*ALL[:2], False, False, True]),
        (*NO_BIAS, *[None] * 4, [False] * 2, NONE),
        (*AUTOCAST, p32, None, None, None, [True] * 2, [*ALL[:2], False, True, False]),
        (*BOTH, p, p, p, sums, [False] * 2, [*ALL[:3], False, False]),
        (*CLASS, p, p, p, None, [True] * 2, NONE),
    ],
    "head_second_order": [
        (*DENSE_BESIDE_CLASS, p, None, None, x, W, b, p, t, ALL),
        (*BOTH, p, p, p, x, W, b, p, t, ALL),
        (*NO_BIAS, p, None, None, x, *[None] * 4, ALL),
        (*AUTOCAST, p32, None, None, x16, W.float(), *[None] * 3, [True, True, *NONE[2:]]),
        (*CLASS, p, p, p, x, W, b, p, None, NONE),
    ],
    "relu_product": [(z.relu(), t), (z.relu().half(), t.half()), (z.relu()[0, 0], t[0, 0])],
    "sigmoid_product": [(z.sigmoid(), t), (z.sigmoid().bfloat16(), t.bfloat16())],
    "sigmoid_squared_error": [
        (None, z, t, 1, True),
        (None, z.half(), t, 2, True),
        (p, z, t, 1, False),
        (one, z.half(), t.half(), 2, True),
    ],
    "softmax_product": [(t, z, -1), (t, z, 0)],
    "squared_error": [
        (None, z, t, 1, 2.0, True),
        (None, z, t, 2, 1.0, True),
        (None, z.half(), t.half(), 0, 1.0, True),
        (p, z, t, 1, 2.0, True),
        (one, z, t, 2, 1.0, False),
        (z, t, z, 0, 1.0, False),
        (z.T, t.T, z, 0, 1.0, True),
        (one, z.T, t, 2, 1.0, True),
        (p[:1].expand(len(z.T), 1), z.T, t.T, 1, 1.0, True),
    ],
    "tanh_product": [
        (z.tanh().T, t.T),
        (z.tanh().T, t.T.contiguous()),
        (z.tanh(), t),
        (z.tanh().half(), t.half()),
    ],
}
OPERATORS["head_second_order"][2] = (*OPERATORS["head_second_order"][2][:-1], [True, *NONE[1:]])


def test_opcheck_covers_every_operator():
    values = {name: getattr(kernels, name) for name in kernels.__all__}
    operators = {name for name, v in values.items() if isinstance(v, torch._ops.OpOverload)}
    # tests/gpu checks those of GPUs
    assert {*OPERATORS} | dispatch.GPU_ONLY == operators


@pytest.mark.parametrize(
    ("name", "args"), [(name, args) for name, rows in OPERATORS.items() for args in rows]
)
def test_operator_passes_opcheck_and_writes_all_memory(name, args):
    check_operator(getattr(kernels, name), args)


def test_class_indices_message_names_ignore_index_only_if_given():
    target = torch.tensor([0, 3])
    with pytest.raises(IndexError, match=r"Target 3 .* \[0, 3\)$"):
        kernels.class_indices(target, 3, None)
    with pytest.raises(IndexError, match=r"Target 3 .* \[0, 3\) or equal ignore_index=-100$"):
        kernels.class_indices(target, 3, -100)


# Kernel and formula


def make_losses():
    """Returns (name, function of leaves, leaves) for every option."""
    w = draw(C, seed=3).abs()
    options = itertools.product(
        ("none", "sum", "mean"), (False, True), (0.0, 0.2), (torch.e, 2.0), ("y", "t")
    )
    caps_and_z_losses = itertools.cycle([(None, 0), (1.5, 0), (None, 0.3), (0.5, 0.2), (None, 0)])
    for reduction, is_weighted, smoothing, base, target in options:
        kwargs = {"reduction": reduction, "label_smoothing": smoothing, "base": base}
        cap, z_loss = next(caps_and_z_losses)
        kwargs |= {"softcap": cap, "z_loss": float(z_loss)}
        name = f"{reduction}-{'weighted-' * is_weighted}{smoothing}-{base:.2g}-{target}"
        name = f"{name}-{cap}-{z_loss}"
        weights = [w] if is_weighted else []
        for ignored in (False, True) if target == "y" else (False,):
            goal = draw_classes(ignored) if target == "y" else t

            def logits(z, *weights, goal=goal, kwargs=kwargs):
                return G.cross_entropy(z, goal, *weights, **kwargs)

            def head(x, W, *rest, goal=goal, kwargs=kwargs):
                named = dict(zip(("linear_bias", "weight"), rest, strict=False))
                return G.linear_cross_entropy(x, W, goal, **named, **kwargs)

            yield f"logits-{name}-{'ignored' * ignored}", logits, [z, *weights]
            yield f"head-{name}-{'ignored' * ignored}", head, [x, W, b, *weights]
            if not is_weighted:
                yield f"head-{name}-{'ignored' * ignored}-no bias", head, [x, W]


def make_elementwise():
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
                f"{f.__name__}-{reduction}-constant target",
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


CASES = {name: (f, leaves) for name, f, leaves in (*make_losses(), *make_elementwise())}


def evaluate(f, leaves, dtype=torch.float64, upstream="random"):
    """Returns f's value and gradients; the upstream gradient is random or 0.7 everywhere."""
    leaves = [v.detach().to(dtype, copy=True).requires_grad_() for v in leaves]
    value = f(*leaves)
    g = draw(*value.shape, seed=5).to(value.dtype)
    if upstream == "constant":
        g = torch.full((), 0.7, dtype=value.dtype).expand(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, g)]


@pytest.mark.parametrize("upstream", ["random", "constant"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_formula(small_blocks, monkeypatch, name, upstream):
    f, leaves = CASES[name]
    kernel_results = evaluate(f, leaves, upstream=upstream)
    monkeypatch.setattr(dispatch, "MIN_KERNEL_SIZE", 2**40)
    head, cost = formulas.LinearCrossEntropy, formulas.LinearCrossEntropyCost
    monkeypatch.setattr(head, "evaluate", head.unfused)
    monkeypatch.setattr(cost, "may_replace", lambda needs_gradient: False)
    formula_results = evaluate(f, leaves, upstream=upstream)
    for got, want in zip(kernel_results, formula_results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


SMALL_COSTS = [
    name
    for name in CASES
    if "none" not in name and ("logits-" in name or "constant target" in name)
] + ["sigmoid", "tanh", "relu", *(f"softmax-{dim}" for dim in (0, 1, -1))]


@pytest.mark.parametrize("upstream", ["random", "constant"])
@pytest.mark.parametrize("name", SMALL_COSTS)
def test_small_tensors_equal_formula(monkeypatch, name, upstream):
    """Without `small_blocks`: one tile, and one Function for a loss and its cost."""
    f, leaves = CASES[name]
    results = evaluate(f, leaves, upstream=upstream)
    monkeypatch.setattr(dispatch, "find_kernel_obstacle", lambda *_, **__: "the formula is wanted")
    monkeypatch.setattr(cost, "find_kernel_obstacle", lambda *_, **__: "the formula is wanted")
    for got, want in zip(results, evaluate(f, leaves, upstream=upstream), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("f", [G.mse_loss, G.squared_error, G.sigmoid_squared_error])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "mixed types"])
def test_small_cost_of_unusual_layouts_equals_formula(monkeypatch, f, layout):
    a, goal = draw(6, 8), draw(6, 8, seed=1)
    if layout == "transposed":
        a, goal = a.T, goal.T
    elif layout == "expanded":
        a, goal = a[:1].expand(6, 8), goal
    else:
        goal = goal.float()
    leaf = a.detach().requires_grad_()
    results = []
    for _ in range(2):
        loss = f(leaf, goal)
        results.append((loss.detach(), *torch.autograd.grad(loss * 3, leaf)))
        monkeypatch.setattr(cost, "find_kernel_obstacle", lambda *_, **__: "wanted")
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


SQUARED_ERRORS = {
    **{
        f"mse_loss, {reduction}": functools.partial(G.mse_loss, reduction=reduction)
        for reduction in ("none", "mean", "sum")
    },
    **{
        f"{f.__name__}, {reduction}, {axes}": functools.partial(f, reduction=reduction, dim=axes)
        for f in (G.squared_error, G.sigmoid_squared_error)
        for reduction in ("none", "mean")
        for axes in ((-3, -2, -1), (-3,), (0, 1, 2, 3))
    },
}


@pytest.mark.parametrize("name", SQUARED_ERRORS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 192, 240), (2, 3, 2, 4, 5)])
def test_gradients_of_squared_errors_keep_channels_last(name, shape):
    f, memory_format = SQUARED_ERRORS[name], torch.channels_last
    if len(shape) == 5:
        memory_format = torch.channels_last_3d
        if "(-3, -2, -1)" in name or "(0, 1" in name:
            f = functools.partial(f, dim=tuple(range(-4, 0)))
    a = draw(*shape).contiguous(memory_format=memory_format).requires_grad_()
    copy = a.detach().contiguous().requires_grad_()
    goal = draw(*shape, seed=1)
    for t in (goal, goal.contiguous(memory_format=memory_format)):
        for create_graph in (False, True):
            c, expected_c = f(a, t), f(copy, goal)
            dc = draw(*c.shape, seed=2)
            (da,) = torch.autograd.grad(c, a, dc, create_graph=create_graph)
            (expected,) = torch.autograd.grad(expected_c, copy, dc, create_graph=create_graph)
            assert da.stride() == a.stride()
            torch.testing.assert_close([c, da], [expected_c, expected], rtol=1e-11, atol=1e-13)


def test_training_step_of_a_loss_is_one_function():
    for f, args in (
        (G.cross_entropy, (z, draw_classes(False))),
        (G.cross_entropy, (z, draw_classes())),
        (G.mse_loss, (z, t)),
        (G.sigmoid_squared_error, (z, t)),
    ):
        leaf = args[0].clone().requires_grad_()
        loss = f(leaf, *args[1:])  # PyTorch up to 2.12 frees the graph with it
        assert loss.grad_fn.name() == "CostWithGradientBackward"
        assert loss.grad_fn.next_functions[0][0].name() == "torch::autograd::AccumulateGrad"


def test_operators_layer_is_skipped_on_cpu_but_not_under_autocast():
    calls = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.namespace)
            return func(*args, **(kwargs or {}))

    run = dispatch.bypass_operator_on_cpu(kernels.sigmoid_product)
    a, v = z.float().sigmoid(), t.float()
    with Mode(), torch.no_grad():
        direct = run(a, v)
    assert "torch_nnmath" not in calls
    with Mode(), torch.no_grad(), torch.autocast("cpu"):
        through_operator = run(a, v)
    assert "torch_nnmath" in calls
    torch.testing.assert_close(direct, through_operator, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("target", "ignore_index", "is_read"),
    [
        ([0, 2], -100, True),
        ([0, 2], 3, True),
        ([0, 2], 2, False),
        ([0, 2], 1, False),
        ([0, 3], -100, False),
        ([-1, 2], -100, False),
        ([-100, 2], -100, False),
        ([], -100, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_indices_are_read_in_one_pass_if_all_are_kept(target, ignore_index, is_read, dtype):
    if dtype == torch.uint8 and min(target, default=0) < 0:
        return
    indices = torch.tensor(target, dtype=dtype)
    y = kernels.read_kept_indices(indices, 3, ignore_index)
    assert (y is not None) is is_read
    if y is not None:
        assert y.dtype == torch.int64
        assert y.tolist() == target


def test_indices_made_in_inference_mode_can_be_saved_for_the_backward():
    with torch.inference_mode():
        indices = draw_classes(False)
    leaf = z.clone().requires_grad_()
    (got,) = torch.autograd.grad(G.cross_entropy(leaf, indices), leaf)
    (want,) = torch.autograd.grad(F.cross_entropy(leaf, draw_classes(False)), leaf)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", [name for name in CASES if "ignored" in name and "head" in name])
def test_head_masking_ignored_rows_equals_gathering(small_blocks, monkeypatch, name):
    f, leaves = CASES[name]
    gathered = evaluate(f, leaves)
    monkeypatch.setattr(_block, "may_gather_rows", lambda keep: False)
    for got, want in zip(evaluate(f, leaves), gathered, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("f", [G.sigmoid, G.tanh])
@pytest.mark.parametrize("is_fused", [True, False])
def test_slope_near_saturation_with_and_without_fused_addcmul(monkeypatch, f, is_fused):
    if is_fused and not elementwise._has_fused_addcmul():
        pytest.skip("this machine's addcmul rounds twice")
    monkeypatch.setattr(elementwise, "_has_fused_addcmul", lambda: is_fused)
    z = torch.linspace(-9, 9, 1001)
    _, slope = evaluate(f, [z], dtype=torch.float32, upstream="constant")
    a = f(z).double()  # the derivative follows from the rounded output, as in PyTorch
    true = 0.7 * (a * (1 - a) if f is G.sigmoid else (1 - a) * (1 + a))
    torch.testing.assert_close(slope.double(), true, rtol=5e-7, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_sigmoid_squared_error_keeps_slope_where_sigmoid_rounds_to_one(small_blocks, reduction):
    """σ(z) σ(-z): in float32 1 - σ(z) is 0 from z = 17 on."""
    z = torch.linspace(-60, 60, 999)[:, None]
    t = torch.zeros_like(z)
    _, slope, _ = evaluate(
        lambda z, t: G.sigmoid_squared_error(z, t, reduction=reduction),
        [z, t],
        torch.float32,
        "constant",
    )
    a, complement = torch.sigmoid(z.double()), torch.sigmoid(-z.double())
    true = 0.7 * a * a * complement / (999 if reduction == "mean" else 1)
    normal = true > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(slope.double()[normal], true[normal], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("bias", "x_scale"),
    [
        pytest.param([300.0] * C, 1, id="sums overflow"),
        pytest.param([-300.0] * C, 1, id="sums underflow"),
        pytest.param([85.0] * C, 1e-5, id="inverse sums underflow"),
        pytest.param([-95.0] * C, 1e-5, id="sums are denormal"),
        pytest.param([*[0.0] * (C - 1), -150.0], 1, id="target is far below"),
        pytest.param([40.0, *[30.0] * (C - 1)], 0, id="small loss of large logits"),
        pytest.param([0.0] * C, 1000, id="logits are far apart"),
    ],
)
@pytest.mark.parametrize("target", ["most likely", "least likely"])
@pytest.mark.parametrize("f", [G.linear_cross_entropy, G.cross_entropy])
def test_logits_far_from_zero_use_the_maximum(small_blocks, bias, x_scale, target, f):
    exact = draw(N, D) * x_scale, draw(C, D, seed=4), torch.tensor(bias, dtype=torch.float64)
    leaves = [v.float().requires_grad_() for v in exact]
    true_leaves = [v.detach().double().requires_grad_() for v in leaves]
    z = F.linear(*true_leaves)
    y = z.argmax(1) if target == "most likely" else z.argmin(1)

    def differentiate(loss, leaves):
        return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, leaves))]

    truth = differentiate(F.cross_entropy(z, y), true_leaves)
    eager = differentiate(F.cross_entropy(F.linear(*leaves), y), leaves)
    if f is G.cross_entropy:
        loss = f(F.linear(*leaves), y)
    else:
        loss = f(leaves[0], leaves[1], y, linear_bias=leaves[2])
    for got, plain, want in zip(differentiate(loss, leaves), eager, truth, strict=True):
        tolerance = 4 * (plain - want).abs().max() + 4e-7 * want.abs().max()
        assert (got - want).abs().max() <= tolerance


def test_blocks_after_one_that_needs_the_maximum_take_it_at_once(small_blocks, monkeypatch):
    filled = []
    fill_logits_ = _block.Block.fill_logits_

    def record(block, classes):
        filled.append(classes.stop)
        return fill_logits_(block, classes)

    monkeypatch.setattr(_block.Block, "fill_logits_", record)
    bias = torch.full_like(b, 300)
    G.linear_cross_entropy(x, W, draw_classes(False), linear_bias=bias)
    assert filled == [*range(1, C + 1)] * 4  # the first of three blocks twice


# Blocks of rows


def evaluate_head(target, options):
    """Returns value, gradients, a Hessian-vector product and a tangent of the head."""
    goal = draw_classes() if target == "indices" else t
    options = {**options, "weight": draw(C, seed=6).abs()} if "weight" in options else options

    def loss(*leaves):
        x, W, b = leaves
        out = G.linear_cross_entropy(x, W, goal, linear_bias=b, **options)
        return (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()

    leaves = [v.clone().requires_grad_() for v in (x, W, b)]
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
def test_head_in_several_blocks_equals_one_block(rows, target, options):
    whole = evaluate_head(target, options)
    with limit_head_blocks(rows * 4 * C):
        assert _block.count_block_rows(N, C) < N
        several = evaluate_head(target, options)
    for got, want in zip(several, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


SETUP = """
import torch
from torch_nnmath import functional as F
rows, order = int(sys.argv[1]), sys.argv[2]
x, W = torch.randn(rows, 16, requires_grad=True), torch.randn(32000, 16, requires_grad=True)
y = torch.randint(0, 32000, (rows,))
y[::3] = -100
F.linear_cross_entropy(x[:64], W, y[:64]).backward()  # loads what the first call loads
"""
BODY = """
head = lambda x, W: F.linear_cross_entropy(x, W, y, label_smoothing=0.1)
ones = torch.ones_like(x), torch.ones_like(W)
if order == "jvp":
    torch.func.jvp(head, (x.detach(), W.detach()), ones)
else:
    gradients = torch.autograd.grad(head(x, W), (x, W), create_graph=order == "second")
if order == "second":
    torch.autograd.grad(gradients, (x, W), ones)
"""


@needs_linux_maxrss
@pytest.mark.parametrize("order", ["first", "second", "jvp"])
def test_head_memory_does_not_grow_with_rows_times_classes(order):
    """The logits would take 250 MiB, twice that for twice the rows, and more at second order."""
    peaks = [measure_peak_growth(SETUP, BODY, rows, order) for rows in (2048, 4096)]
    assert max(peaks) < 250, peaks
    assert peaks[1] - peaks[0] < 100, peaks


# Dispatch

LOSSES = (G.mse_loss, G.sigmoid_squared_error, G.cross_entropy)


@pytest.mark.parametrize("f", [G.sigmoid, G.tanh, G.relu, *LOSSES])
def test_kernel_runs_where_nothing_differentiates_through_it(monkeypatch, f):
    decisions = []
    monkeypatch.setattr(dispatch, "MIN_KERNEL_SIZE", 0)
    may_use_kernel = dispatch.may_use_kernel

    def record(*args):
        decisions.append(may_use_kernel(*args))
        return decisions[-1]

    monkeypatch.setattr(dispatch, "may_use_kernel", record)
    leaf = z.clone().requires_grad_()
    loss = (f(leaf, t, reduction="none") if f in LOSSES else f(leaf)).sum()
    decisions.clear()
    torch.autograd.grad(loss, leaf, retain_graph=True)
    assert decisions == [True]
    decisions.clear()
    torch.autograd.grad(loss, leaf, create_graph=True)
    assert True not in decisions or f in (G.tanh, G.relu)  # their products are Functions


# Costs with gradients


def head(x, W):
    return G.linear_cross_entropy(x, W, draw_classes())


probabilities = draw(N, C, seed=8).softmax(1)
COSTS = {
    "head": (head, (x, W)),
    "logits": (lambda z: G.cross_entropy(z, draw_classes()), (z,)),
    "probabilities": (lambda z: G.cross_entropy(z, probabilities, reduction="sum"), (z,)),
    "squared error": (lambda z: G.mse_loss(z, t), (z,)),
    "sigmoid": (lambda z: G.sigmoid_squared_error(z, t), (z,)),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_repeated_backward_gives_the_same_gradients(small_blocks, name):
    f, tensors = COSTS[name]
    leaves = [v.clone().requires_grad_() for v in tensors]
    loss = f(*leaves) * 3
    (first,) = torch.autograd.grad(loss, leaves[:1], retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    doubled = torch.autograd.grad(loss, leaves, torch.tensor(2.0, dtype=loss.dtype))
    torch.testing.assert_close(first, second[0], rtol=0, atol=0)
    for g, h in zip(second, doubled, strict=True):
        torch.testing.assert_close(2 * g, h, rtol=1e-13, atol=0)
    loss = f(*leaves)
    loss.backward(retain_graph=True)
    once = [v.grad.clone() for v in leaves]
    loss.backward()
    for g, v in zip(once, leaves, strict=True):
        torch.testing.assert_close(2 * g, v.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["head", "logits"])
def test_cost_infinite_upstream_gradient_spares_ignored_rows(small_blocks, name):
    f, tensors = COSTS[name]
    leaves = [v.clone().requires_grad_() for v in tensors]
    got, *_ = torch.autograd.grad(f(*leaves) * torch.inf, leaves)
    kept_rows = keep.squeeze(1)
    assert (got[~kept_rows] == 0).all()
    assert not got[kept_rows].isfinite().any()


@pytest.mark.parametrize("name", [name for name in COSTS if name != "head"])
def test_cost_computes_value_and_gradient_in_one_pass_if_needed(small_blocks, monkeypatch, name):
    f, (v,) = COSTS[name]
    calls = []
    losses = (formulas.CrossEntropy, formulas.SquaredError, formulas.SigmoidSquaredError)
    for formula in losses:
        kernel = formula.kernel

        def record(dc, *args, run=kernel.value_and_gradient):
            calls.append((dc is not None, args[-1]))
            return run(dc, *args)

        def record_part(part, needs):  # without defaults, which `apply` would pass on
            return staticmethod(lambda *args: calls.append(needs) or part(*args))

        monkeypatch.setattr(kernel, "value_and_gradient", record)
        monkeypatch.setattr(formula, "forward", record_part(kernel.value, (False, True)))
        monkeypatch.setattr(formula, "gradient", record_part(kernel.gradient, (True, False)))
    leaf = v.clone().requires_grad_()
    (f(leaf) * 2).backward()
    assert calls == [(True, True)]
    calls.clear()
    f(v)
    with torch.no_grad():
        f(leaf)
    assert calls == [(False, True)] * 2


def test_head_cost_takes_three_products(monkeypatch):
    calls = []
    run = kernels.head
    monkeypatch.setattr(kernels, "head", lambda *args: calls.append(args[-1]) or run(*args))
    leaves = [v.clone().requires_grad_() for v in (x, W)]
    head(*leaves).backward()
    assert calls == [[True, True, False, False, False]]
    calls.clear()
    head(x, leaves[1]).backward()
    assert calls == [[False, True, False, False, False]]
    calls.clear()
    with torch.no_grad():
        head(*leaves)
    assert calls == [NONE]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_cost_is_scaled_before_it_is_rounded(dtype):
    """A loss scaled up, as for float16, does not lose gradients to underflow."""
    scale = 2.0**12
    leaves = [(v * 2.0**-9).to(dtype).requires_grad_() for v in (x, W)]
    gradients = torch.autograd.grad(head(*leaves).float() * scale, leaves)
    wide = [v.detach().double().requires_grad_() for v in leaves]
    true = torch.autograd.grad(head(*wide) * scale, wide)
    for got, want in zip(gradients, true, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * want.abs().max() / 100)


@pytest.mark.parametrize("name", COSTS)
def test_cost_hessian_vector_product_equals_pytorch(small_blocks, name):
    f, tensors = COSTS[name]
    plain = {
        "head": lambda x, W: F.cross_entropy(x @ W.T, draw_classes()),
        "logits": lambda z: F.cross_entropy(z, draw_classes()),
        "probabilities": lambda z: F.cross_entropy(z, probabilities, reduction="sum"),
        "squared error": lambda z: F.mse_loss(z, t),
        "sigmoid": lambda z: F.mse_loss(z.sigmoid(), t, reduction="sum") / (2 * N),
    }[name]
    leaves = [v.clone().requires_grad_() for v in tensors]
    directions = [draw(*v.shape, seed=7) for v in tensors]
    results = []
    for function in (f, plain):
        gradients = torch.autograd.grad(function(*leaves) ** 2, leaves, create_graph=True)
        results.append([*gradients, *torch.autograd.grad(gradients, leaves, directions)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# Transforms and hostile values

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
def test_eager_transforms_are_right_where_kernels_run(small_blocks, sample):
    """The catalogue's samples are small; with `small_blocks` their kernels run, too."""
    report = testing.check(sample.call, sample.draw(device="cpu"), transforms=EAGER)
    assert report.right, str(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_not_finite_where_target_is_zero_equal_formula(monkeypatch, small_blocks, value):
    w = torch.ones(C, dtype=torch.float64)
    w[0] = 0
    y = torch.arange(N) % C
    hostile = z.clone()
    hostile[:4, 0] = value
    without_class_0 = t.masked_fill(torch.arange(C) == 0, 0)

    def evaluate_both():
        return [
            *evaluate(lambda z: G.cross_entropy(z, y, w, reduction="none"), [hostile]),
            *evaluate(lambda z: G.cross_entropy(z, without_class_0, reduction="none"), [hostile]),
        ]

    kernel_results = evaluate_both()
    monkeypatch.setattr(dispatch, "MIN_KERNEL_SIZE", 2**40)
    torch.testing.assert_close(
        kernel_results, evaluate_both(), rtol=1e-11, atol=1e-13, equal_nan=True
    )


def test_many_rows_without_classes_give_zero():
    """Enough rows for a kernel, but no entries."""
    empty = torch.empty(2**15 + 1, 0, requires_grad=True)
    loss = G.cross_entropy(empty, torch.empty(empty.shape), reduction="none")
    loss.backward(torch.ones_like(loss))
    assert not loss.any()
    assert empty.grad.shape == empty.shape


# FLOP counts


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_of_the_head_are_those_of_its_products():
    leaves, product = [v.clone().requires_grad_() for v in (x, W)], 2 * N * D * C
    frozen = x, leaves[1]

    def differentiate_twice():
        gradients = torch.autograd.grad(head(*leaves), leaves, create_graph=True)
        sum((g * g).sum() for g in gradients).backward()

    assert count_flops(lambda: head(x, W)) == product
    assert count_flops(lambda: head(*leaves).backward()) == 3 * product
    assert count_flops(lambda: head(*frozen).backward()) == 2 * product
    assert count_flops(differentiate_twice) == (3 + 7) * product


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_flop_formula(name):
    assert getattr(torch.ops.torch_nnmath, name) in flop_registry


def test_flop_counter_is_not_imported_with_the_package():
    """It imports Triton."""
    code = (
        "import sys, torch, torch_nnmath; assert not {'triton', 'torch.utils.flop_counter'} &"
        " {*sys.modules}; from torch.utils.flop_counter import flop_registry;"
        " assert torch.ops.torch_nnmath.head in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
