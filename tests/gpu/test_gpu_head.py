"""The head's plan for a GPU, on CPU tensors, with the row kernels in PyTorch operations.

In float64 the path is exact, so the truth is the CPU's operator, which has tests of its own against
the plain expression. In half types Δ is rounded: a gradient may be wrong by 2^-8 Σ |Δ| |W|.
"""

import contextlib
import itertools
import math
import random
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import OperationRecorder
from gpu_helpers import emulate_products, needs_triton, round_in_interpreter
from torch import Tensor

from torch_nnmath import functional, kernels, testing, verify
from torch_nnmath._records import (
    NO_SHARD,
    HeadInputs,
    InputValues,
    Requests,
    Target,
    UpstreamGradients,
)
from torch_nnmath.catalog import CATALOG
from torch_nnmath.kernels._library import GPU_IMPLEMENTATIONS
from torch_nnmath.kernels.gpu import head, plan, single_read

EPSILON = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@contextlib.contextmanager
def gpu_head(has_triton: bool = False, reads_once: bool = False):
    """Runs the GPU's head on CPU tensors, in several small blocks and slabs.

    `reads_once`: the L2 cache is taken for too small for any number of classes.
    """
    products = torch.library.Library("aten", "IMPL")
    emulate_products(products)
    operators = torch.library.Library("torch_nnmath", "IMPL")
    for name in ("head", "head_second_order"):
        operators.impl(name, GPU_IMPLEMENTATIONS[name], "CPU")
    try:
        with (
            mock.patch.object(head, "has_triton", return_value=has_triton),
            mock.patch.object(single_read, "CACHE_SHARE", 0.0 if reads_once else 1e9),
            mock.patch.object(plan, "SLAB_ROWS", 16),
            mock.patch.object(plan, "MIN_SLAB_ROWS", 16),
            mock.patch.object(plan, "SINGLE_BLOCK_ROWS", 32),
        ):
            yield
    finally:
        operators._destroy()
        products._destroy()


def draw_arguments(seed: int, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """`HeadInputs` (flat), of features and weight in `dtype`, and `UpstreamGradients`."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    N, D, C = choose.choice([1, 5, 70]), choose.choice([1, 9]), choose.choice([1, 2, 33])

    def normal(*shape: int, type_: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(type_)

    def maybe(make: Any) -> Any:
        return make() if choose.random() < 0.5 else None

    keep = maybe(lambda: torch.rand(N, 1, generator=generator) < 0.6)
    # scaled features are wider than the weight, and may come with what was scaled
    x, features, scale = normal(N, D, type_=choose.choice([dtype, dtype, wide])), None, None
    if x.dtype != dtype:
        factor = choose.choice([torch.tensor(1.1), normal(N, 1)])
        features, scale = maybe(lambda: (x.to(dtype), factor)) or (None, None)
        x = x * factor
    if keep is not None:
        x = x.masked_fill(~keep, float("nan"))
        features = None if features is None else features.masked_fill(~keep, float("nan"))
    y = torch.randint(C, (N, 1), generator=generator)
    y = y if choose.random() < 0.9 else None
    p = normal(N, 1).abs() if choose.random() < 0.8 or y is None else None
    if p is not None and keep is not None:
        p = p.masked_fill(~keep, 0)
    t = maybe(lambda: normal(choose.choice([1, N]), C).softmax(1)) if p is not None else None
    t = normal(N, C).softmax(1) if p is None else t
    cap = choose.choice([None, 3.0])
    base = choose.choice([2.0, 2.718281828459045])
    W, b = normal(C, D, type_=dtype), maybe(lambda: normal(C, type_=dtype))
    weight_dtype = None
    if dtype != wide and choose.random() < 0.3:  # as under autocast
        W, weight_dtype = normal(C, D, type_=wide), dtype
    target = [y if p is not None else None, p, t]
    inputs = [x, W, b, *target, keep, features, scale, base, cap, weight_dtype, *NO_SHARD]
    upstream = [normal(N, 1), maybe(lambda: normal(N, 1)), maybe(lambda: normal(N, 1))]
    if D > 1 and choose.random() < 0.5:  # sums of few products cancel
        upstream[0][::3] = 0  # rows whose loss has the weight 0
    return inputs, upstream


def draw_direction(seed: int, inputs: Any) -> list[Any]:
    """A direction in some of x, W, b, p, t."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    direction = []
    for v in InputValues.from_flat(inputs):
        if v is None or choose.random() < 0.3:
            direction.append(None)
        else:
            normal = torch.randn(v.shape, generator=generator, dtype=torch.float64)
            direction.append(normal.bfloat16().to(v.dtype))
    return direction


def widen(arguments: Any) -> list[Any]:
    def to_double(v: Any) -> Any:
        if isinstance(v, torch.dtype):  # a weight in float64 is not rounded
            return None
        return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v

    return [to_double(v) for v in arguments]


def draw_needs(seed: int, inputs: Any) -> list[bool]:
    """Which of the gradients of x, W, b, p are needed; t's has no kernel for a GPU."""
    choose = random.Random(seed)
    _, _, b, _, p, *_ = inputs
    needs = [choose.random() < 0.7 for _ in range(4)]
    return [*needs[:2], needs[2] and b is not None, needs[3] and p is not None, False]


def check(results: Any, truth: Any, dtype: torch.dtype) -> None:
    """Compares outputs of an operator with those of the CPU in float64.

    A gradient in a half type sums rounded entries of Δ, which may cancel: its error is measured
    against the largest output.
    """
    finite = [v[v.isfinite()] for v in truth if v.is_floating_point()]
    scale = max([1.0, *(v.abs().max().item() for v in finite if v.numel())])
    for i, (result, expected) in enumerate(zip(results, truth, strict=True)):
        assert result.shape == expected.shape, i
        if expected.dtype == torch.int64:
            assert torch.equal(result, expected) or dtype.itemsize == 2
        else:
            error = (result.double() - expected).abs()
            assert (error <= EPSILON[dtype] * scale).all(), (i, error.max(), scale)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("has_sums", [False, True])
def test_head_on_a_gpu_equals_the_head_on_the_cpu(dtype, has_sums):
    for seed in range(60):
        inputs, upstream = draw_arguments(seed, dtype)
        requests, needs = [seed % 2 == 0, seed % 3 == 0], draw_needs(seed, inputs)
        if seed % 4 == 3:  # γ of a cost with a weight for each row
            upstream[0] = upstream[0].squeeze(1)
        arguments = [*inputs, *upstream, None, requests, needs]
        truth = kernels.head(*widen(arguments))
        if has_sums:
            requests = [False, False]
            with gpu_head():
                sums = kernels.head(*inputs, None, None, None, None, [True, False], [False] * 5)[5]
            arguments = [*inputs, *upstream, sums, requests, needs]
        with gpu_head():
            results = kernels.head(*arguments)
        places = [*range(6, 11)] if has_sums else [0, 1, 2, 3, 4, *range(6, 11)]
        check([results[i] for i in places], [truth[i] for i in places], dtype)
        x, keep = inputs[0], inputs[6]
        if keep is not None and needs[0]:
            assert not results[6][~keep.squeeze(1)].count_nonzero()
            assert x.isnan().any() or keep.all()


@pytest.mark.triton
@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_with_triton_equals_the_head_on_the_cpu(dtype, monkeypatch):
    round_in_interpreter(monkeypatch)
    for seed in range(5):
        inputs, upstream = draw_arguments(seed, dtype)
        arguments = [*inputs, *upstream, None, [True, True], draw_needs(seed, inputs)]
        truth = kernels.head(*widen(arguments))
        with gpu_head(has_triton=True):
            results = kernels.head(*arguments)
        places = [0, 1, 2, 3, 4, *range(6, 11)]
        check([results[i] for i in places], [truth[i] for i in places], dtype)


@pytest.mark.triton
@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["rows", "cost", "weighted cost"])
def test_head_with_one_read_equals_the_head_on_the_cpu(kind, monkeypatch):
    round_in_interpreter(monkeypatch)
    process_rows = mock.Mock(wraps=single_read.SingleRead.process_rows)
    monkeypatch.setattr(single_read.SingleRead, "process_rows", lambda *args: process_rows(*args))
    for seed in range(6):
        inputs, (γ, ω, _) = draw_arguments(seed, torch.bfloat16)
        inputs[5] = None
        γ = {"rows": γ, "cost": torch.tensor(0.3), "weighted cost": γ.squeeze(1)}[kind]
        needs = draw_needs(seed, inputs) if seed else [True, True, *draw_needs(seed, inputs)[2:]]
        arguments = [*inputs, γ, ω, None, None, [False, True], needs]
        truth = kernels.head(*widen(arguments))
        process_rows.reset_mock()
        with gpu_head(has_triton=True, reads_once=True):
            results = kernels.head(*arguments)
        assert process_rows.called == any(needs[:3])
        places = [0, 1, 2, 4, *range(6, 11)]
        check([results[i] for i in places], [truth[i] for i in places], torch.bfloat16)
        keep = inputs[6]
        if keep is not None and needs[0]:
            assert not results[6][~keep.squeeze(1)].count_nonzero()


def test_sum_over_rows_has_factors_of_float32():
    generator = torch.Generator().manual_seed(0)
    W, p = torch.empty(33, 3, dtype=torch.bfloat16), torch.ones(40, 1)
    rows = single_read.SingleRead(W, Target(p.long(), p, None), 40, 40)
    rows.factors.exact.copy_(torch.randn(40, 1, generator=generator) * 1e-6)
    E = torch.randn(16, 33, generator=generator).exp().bfloat16()
    with gpu_head():
        db = rows.sum_rows(E, slice(8, 24))
    terms = E.double() * rows.factors.exact[8:24]
    # products are exact, sums are not
    assert ((db - terms.sum(0)).abs() <= 2.0**-21 * terms.abs().sum(0)).all()


def compute_relative_error(result: Tensor, truth: Tensor) -> float:
    return ((result.bfloat16().double() - truth).norm() / truth.norm()).item()


@pytest.mark.triton
@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("deviation", [1.0, 4.0])
@pytest.mark.parametrize("N", [27, 32])
def test_one_read_is_as_exact_as_the_plain_expression(N, deviation, mean, monkeypatch):
    """At most 1.5 times the error of the expression that rounds only Δ, of float32 logits.

    That one is luckiest where 1/N is a power of two and every p_y nearly 0: then the entries of
    the classes are not rounded. Weights with a common mean show an error of a row's sum.
    """
    round_in_interpreter(monkeypatch)
    C, D, generator = 1000, 32, torch.Generator().manual_seed(N)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, y = normal(N, D).bfloat16(), torch.randint(C, (N, 1), generator=generator)
    W = (deviation / math.sqrt(D) * (normal(C, D) + mean * normal(D))).bfloat16()
    b = normal(C).bfloat16()
    inputs = HeadInputs(x, W, b, Target(y, torch.ones(N, 1), None), None).flatten()
    needs = [True, True, True, False, False]
    with gpu_head(has_triton=True, reads_once=True):
        results = kernels.head(*inputs, torch.tensor(1 / N), *[None] * 3, [False] * 2, needs)
    z = x.double() @ W.double().T + b.double()
    Δ = (z.softmax(1) - torch.zeros_like(z).scatter_(1, y, 1.0)) / N

    def compute_gradients(Δ: Tensor) -> tuple[Tensor, ...]:
        return Δ @ W.double(), Δ.T @ x.double(), Δ.sum(0)

    truth, plain = compute_gradients(Δ), compute_gradients(Δ.bfloat16().double())
    for result, value, expected in zip(results[6:9], plain, truth, strict=True):
        error = compute_relative_error(result, expected)
        assert error <= 1.5 * compute_relative_error(value, expected)


@pytest.mark.triton
@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_order_with_triton_equals_that_on_the_cpu(dtype, monkeypatch):
    round_in_interpreter(monkeypatch)
    for seed in range(5):
        inputs, upstream = draw_arguments(seed, dtype)
        direction, needs = draw_direction(seed, inputs), draw_needs(seed, inputs)
        arguments = [*inputs, *upstream, *direction, needs]
        truth = kernels.head_second_order(*widen(arguments))
        with gpu_head(has_triton=True):
            results = kernels.head_second_order(*arguments)
        check(results, truth, dtype)


@pytest.mark.triton
@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("stride", [0, 2])
def test_upstream_gradients_of_any_stride_reach_triton(stride, monkeypatch):
    """The loss of unreduced rows may be summed: its upstream gradient is one number, expanded."""
    round_in_interpreter(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 3, generator=generator) for n in (5, 7))
    y, p = torch.arange(5).view(5, 1), torch.ones(5, 1)
    flat = torch.randn(3, 10, generator=generator)
    upstream = [v.as_strided((5, 1), (stride, 1), v.storage_offset()) for v in flat]
    needs = [True, True, False, True, False]
    inputs = HeadInputs(x, W, None, Target(y, p, None), None, 2.0).flatten()
    first = [*inputs, *upstream, None, [True, True], needs]
    second = [*inputs, *upstream, x.flip(0), W.flip(0), None, None, None, needs]
    for operator, arguments in ((kernels.head, first), (kernels.head_second_order, second)):
        truth = operator(*widen(arguments))
        with gpu_head(has_triton=True):
            results = operator(*arguments)
        places = [*range(len(truth))]
        if operator is kernels.head:
            places.remove(5)  # the sums' shift may differ
        check([results[i] for i in places], [truth[i] for i in places], torch.float32)


def test_rows_of_several_blocks_and_slabs_have_their_own_offsets():
    with gpu_head():
        head_plan = plan.make_plan(torch.empty(70, 9), torch.empty(33, 9))
    assert len([*head_plan.iterate_blocks()]) > 1
    assert head_plan.slab_rows < head_plan.block_rows


def test_logits_far_apart_do_not_overflow():
    x, W = torch.tensor([[400.0], [-400.0]]), torch.tensor([[1.0], [0.5], [-1.0]])
    y, p = torch.tensor([[0], [1]]), torch.ones(2, 1)
    needs = [True, True, False, False, False]
    inputs = HeadInputs(x, W, None, Target(y, p, None), None, 2.0).flatten()
    arguments = [*inputs, p, None, None, None, [True] * 2, needs]
    truth = kernels.head(*widen(arguments))
    with gpu_head():
        check(kernels.head(*arguments), truth, torch.float32)


def test_ignored_rows_get_no_gradient_from_an_infinite_weight():
    x, W = torch.ones(2, 1), torch.tensor([[1.0], [-float("inf")]])
    y, p = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[1.0], [0.0]])
    keep = torch.tensor([[True], [False]])
    needs = [True, False, False, False, False]
    inputs = HeadInputs(x, W, None, Target(y, p, None), keep, 2.0).flatten()
    with gpu_head():
        dx = kernels.head(*inputs, p, None, None, None, [False] * 2, needs)[6]
    assert dx[1] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", EPSILON)
def test_row_weights_have_the_derivatives_of_the_head_on_the_cpu(dtype, reduction):
    """Also in the weights, of which some are 0; those of ignored rows do not matter."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, W, y = normal(70, 9), normal(33, 9), torch.randint(33, (70,), generator=generator)
    ignored_mask = torch.arange(70) % 5 == 0
    y[ignored_mask] = -100
    r = torch.randn(70, generator=generator).square()
    r[::7] = 0

    def differentiate(weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
        leaves = [v.to(dtype).requires_grad_() for v in (x, W)]
        weight = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        loss = functional.linear_cross_entropy(
            *leaves, y, row_weight=weight, reduction=reduction, z_loss=0.1
        )
        first = torch.autograd.grad(loss, [*leaves, weight], create_graph=True)
        again = torch.autograd.grad(loss, [*leaves, weight], retain_graph=True)
        for g, expected in zip(again, first, strict=True):
            torch.testing.assert_close(g, expected.detach())
        squares = sum(g.double().square().sum() for g in first)
        return [loss.detach(), *again, *torch.autograd.grad(squares, [*leaves, weight])]

    expected = differentiate(r, torch.float64)
    with gpu_head():
        results = differentiate(r.masked_fill(ignored_mask, float("nan")), dtype)
    for result, exact in zip(results, expected, strict=True):
        size = exact.abs().max().item()
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=8 * EPSILON[dtype] * size)
        if result.shape[:1] == (70,):
            assert not result[ignored_mask].count_nonzero()


@pytest.mark.parametrize("dtype", EPSILON)
def test_second_order_on_a_gpu_equals_that_on_the_cpu(dtype):
    for seed in range(60):
        inputs, upstream = draw_arguments(seed, dtype)
        direction = draw_direction(seed, inputs)
        arguments = [*inputs, *upstream, *direction, draw_needs(seed, inputs)]
        truth = kernels.head_second_order(*widen(arguments))
        with gpu_head():
            results = kernels.head_second_order(*arguments)
        check(results, truth, dtype)


@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=3)])
def test_frozen_features_and_weight_need_no_product(needs):
    needs_x, needs_W, _ = needs
    x, W, b = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    p, y = torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int64)
    inputs = HeadInputs(x, W, b, Target(y, p, None), None, 2.0).flatten()
    with gpu_head(), OperationRecorder() as recorder:
        GPU_IMPLEMENTATIONS["head"](
            *inputs, torch.ones(()), None, None, None, [False] * 2, [*needs, False, False]
        )
    assert recorder.names.count("mm") == 1 + needs_x + needs_W
    assert recorder.names.count("addmm") == 0


@pytest.mark.parametrize("scale", [1.3, torch.tensor(0.7), torch.tensor(2.0, dtype=torch.float64)])
def test_scaled_half_features_need_no_second_product(scale):
    """The product takes the features before the scale, which the row kernel applies."""
    x, W = torch.randn(70, 9).bfloat16(), torch.randn(33, 9).bfloat16()
    y = torch.randint(33, (70,)).masked_fill(torch.arange(70) % 5 == 0, -100)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [v.to(dtype).requires_grad_() for v in (x, W)]
        with gpu_head(), mock.patch.object(head, "multiply_split", side_effect=AssertionError):
            loss = functional.linear_cross_entropy(*leaves, y, logit_scale=scale, reduction="none")
            gradients = torch.autograd.grad(loss.sum(), leaves)
        results.append([loss.detach(), *gradients])
    for result, expected in zip(*results, strict=True):
        atol = 2**-7 * expected.abs().max().item()
        torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=atol)


@pytest.mark.parametrize("N", [5, 70])
def test_gradient_of_a_float32_weight_needs_no_accumulator_under_autocast(N):
    x, W, y = torch.randn(N, 9).bfloat16(), torch.randn(33, 9), torch.randint(33, (N, 1))
    inputs = HeadInputs(x, W, None, Target(y, torch.ones(N, 1), None), None)
    needs = [True, True, False, False, False]
    tail = torch.ones(()), None, None, None, [False] * 2, needs
    exact = inputs._replace(x=x.double(), W=W.bfloat16().double()).flatten()
    expected = kernels.head(*exact, *tail)[7]
    with gpu_head(), OperationRecorder() as recorder:
        arguments = inputs._replace(weight_dtype=torch.bfloat16).flatten()
        dW = GPU_IMPLEMENTATIONS["head"](*arguments, *tail)[7]
    assert dW.dtype == torch.float32
    # Δ has one rounding, and no entry of dW another: each is a sum over N rows
    error = (dW.double() - expected).abs().max() / expected.abs().max()
    assert error < 2**-9
    created = [op.name for op in recorder.operations if (33, 9) in op.shapes]
    assert created.count("new_empty") == 1  # dW
    assert created.count("_to_copy") == 1  # W in bfloat16


@pytest.fixture
def products_on_meta_device():
    products = torch.library.Library("aten", "IMPL")
    emulate_products(products, "Meta")
    yield
    products._destroy()


@pytest.mark.usefixtures("products_on_meta_device")
def test_head_and_second_order_never_wait_for_the_device():
    """Tensors without values raise an error where the host reads one."""
    for seed, dtype in itertools.product(range(30), EPSILON):
        inputs, upstream = draw_arguments(seed, dtype)
        needs, direction = draw_needs(seed, inputs), draw_direction(seed, inputs)
        γ, *others = upstream
        first = [*inputs, γ.squeeze(1), *others, None, [True, True], needs]
        second = [*inputs, *upstream, *direction, needs]
        with mock.patch.object(head, "has_triton", return_value=False), torch.no_grad():
            for function, arguments in ((head.head, first), (head.head_second_order, second)):
                results = function(
                    *(v.to("meta") if isinstance(v, Tensor) else v for v in arguments)
                )
                assert all(v.is_meta for v in results)


@pytest.mark.parametrize("budget", [2**20, 2**28, 3 * 2**29, 2**34])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("buffers", "scales_features"), [(1, False), (2, False), (1, True)])
def test_plan_covers_every_row_once_within_the_budget(
    budget, dtype, buffers, scales_features, monkeypatch
):
    monkeypatch.setattr(plan, "_budget", plan._budget)
    kernels.set_memory_budget(budget)
    assert kernels.get_memory_budget() == budget
    sizes = itertools.product(
        [1, 15, 640, 4096, 4097, 8192, 16384, 100_003], [1, 1000, 128256, 256000], [1, 1024, 4096]
    )
    for N, C, D in sizes:
        x, W = (torch.empty(n, D, dtype=dtype, device="meta") for n in (N, C))
        is_half = dtype == torch.bfloat16
        head_plan = plan.make_plan(
            x, W, buffers, is_dW_half=is_half, scales_features=scales_features
        )
        blocks = [*head_plan.iterate_blocks()]
        slabs = [slab for block in blocks for slab in head_plan.iterate_slabs(block)]
        for parts in (blocks, slabs):
            assert [i for part in parts for i in (part.start, part.stop)][1:-1:2] == [
                part.start for part in parts[1:]
            ]
            assert (parts[0].start, parts[-1].stop) == (0, N)
        assert max(s.stop - s.start for s in blocks) <= head_plan.block_rows
        assert max(s.stop - s.start for s in slabs) <= head_plan.slab_rows
        assert head_plan.has_accumulator == (is_half and len(blocks) > 1)
        row = dtype.itemsize * (buffers * C + scales_features * D)
        rows = 4 * buffers * C * head_plan.slab_rows + row * head_plan.block_rows
        memory = rows + head_plan.has_accumulator * 4 * C * D
        smallest = (4 * buffers * C + row) * plan.MIN_SLAB_ROWS
        smallest += 4 * C * D if is_half else 0
        assert memory <= max(budget, smallest), (N, C, D, memory)


def test_plan_of_the_default_budget_is_one_block_at_4096_rows_of_128256_classes():
    x, W = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (4096, 128256))
    head_plan = plan.make_plan(x, W, is_dW_half=True)
    assert not head_plan.has_accumulator
    assert head_plan.block_rows == 4096
    assert head_plan.slab_rows >= 512


def test_rows_are_read_once_where_the_kernel_supports_it_and_the_cache_is_too_small():
    def may_read_once(**changes: Any) -> bool:
        x, W, p = torch.empty(5, 8), torch.empty(128256, 8, dtype=torch.bfloat16), torch.empty(5, 1)
        target = Target(p.long(), p, changes.get("t"))
        inputs = HeadInputs(x, changes.get("W", W), None, target, None, 2.0, None)
        upstream = changes.get("upstream", UpstreamGradients(p, p, None))
        requests = Requests(entropy=changes.get("entropy", False), predicted=True)
        return single_read.may_read_once(inputs, upstream, changes.get("sums"), requests)

    p = torch.empty(5, 1)
    assert may_read_once()
    assert not may_read_once(W=torch.empty(32000, 8, dtype=torch.bfloat16))
    assert not may_read_once(W=torch.empty(128256, 8))
    assert not may_read_once(W=torch.empty(128256, 8, dtype=torch.float16))
    assert not may_read_once(t=torch.empty(1, 128256))
    assert not may_read_once(upstream=None)
    assert not may_read_once(upstream=UpstreamGradients(p, None, p))
    assert not may_read_once(entropy=True)
    assert not may_read_once(sums=torch.empty(5, 3))


def test_memory_budget_must_be_positive():
    with pytest.raises(ValueError, match="must be positive, but is 0"):
        kernels.set_memory_budget(0)


EAGER_TRANSFORMS = [name for name in verify.QUICK if "compile" not in name]


@pytest.mark.parametrize("row", CATALOG, ids=lambda row: row.name)
def test_catalogue_is_right_through_the_plan(row):
    with gpu_head():
        verify.compare_with_reference(row, "cpu")
        for sample in row.samples:
            report = testing.check(sample.on("cpu"), sample.draw(), transforms=EAGER_TRANSFORMS)
            report.raise_on_failure()
