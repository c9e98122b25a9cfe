"""What only a GPU shows: synchronisation, CUDA graphs, repeated bits, memory, and its rounding."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_nnmath import formulas, kernels
from torch_nnmath import functional as F
from torch_nnmath._memory import read_peak, reset_peak

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
    # the first product of a thread of autograd
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100

# The functions, and what they compute, written out


def plain_cross_entropy(
    z: Tensor,
    y: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    keep = y != IGNORED
    z = logit_scale * z.masked_fill(~keep[:, None], 0)
    v = z if softcap is None else softcap * (z / softcap).tanh()
    lse = v.logsumexp(1, keepdim=True)
    w = torch.ones_like(v[0]) if weight is None else weight
    index = y.clamp(min=0)
    l, p = v - lse, w[index] * keep
    c = -(1 - label_smoothing) * p * l.gather(1, index[:, None])[:, 0]
    c = c - label_smoothing / len(w) * keep * (w * l).sum(1)
    q = z_loss * keep * lse[:, 0].square()
    if reduction == "none":
        return c + q
    return c.sum() + q.sum() if reduction == "sum" else c.sum() / p.sum() + q.sum() / keep.sum()


def plain_head(
    x: Tensor, W: Tensor, y: Tensor, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    z = x.masked_fill((y == IGNORED)[:, None], 0) @ W.T
    return plain_cross_entropy(z if linear_bias is None else z + linear_bias, y, **options)


def plain_log_probs(x: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    l = (x @ W.T).log_softmax(1)
    return l.gather(1, y[:, None])[:, 0], -(l.exp() * l).sum(1)


def softmax(z: Tensor) -> Tensor:
    e = (z - z.amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


class Case(NamedTuple):
    """A function, the same written out, and how to draw its leaves and its constants."""

    name: str
    function: Callable[..., Any]
    plain: Callable[..., Any]
    draw: Callable[[torch.Generator], tuple[list[Tensor], list[Tensor]]]


ROWS, FEATURES, CLASSES = 67, 48, 1003


def draw_head(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    x = 3 * torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    W = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5
    return [x, W], [torch.randint(CLASSES, (ROWS,), generator=generator)]


def draw_head_ignored(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    (x, W), (y,) = draw_head(generator)
    y[::3], x[::3] = IGNORED, torch.nan
    return [x, W], [y]


def draw_head_bias(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    (x, W), (y,) = draw_head(generator)
    b = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    return [x, W], [y, b]


def draw_head_weights(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    leaves, (y,) = draw_head_ignored(generator)
    w = torch.rand(CLASSES, generator=generator, dtype=torch.float64) + 0.1
    return leaves, [y, w]


def draw_logits(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    z = 3 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    y[::5] = IGNORED
    return [z], [y]


def draw_elements(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)], []


def draw_pairs(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    return [*draw_elements(generator)[0], *draw_elements(generator)[0]], []


def make_head_case(name: str, draw: Any = draw_head, **options: Any) -> Case:
    return Case(
        f"head {name}",
        lambda x, W, y: F.linear_cross_entropy(x, W, y, **options),
        lambda x, W, y: plain_head(x, W, y, **options),
        draw,
    )


CASES = [
    make_head_case("mean"),
    make_head_case("sum", reduction="sum"),
    make_head_case("none", reduction="none"),
    make_head_case("ignored", draw_head_ignored),
    make_head_case("ignored none", draw_head_ignored, reduction="none"),
    make_head_case("scaled", logit_scale=0.7),
    make_head_case("capped", softcap=5.0),
    make_head_case("z-loss", draw_head_ignored, z_loss=1e-2),
    make_head_case("smoothed", label_smoothing=0.1),
    make_head_case("all options", draw_head_ignored, softcap=8.0, z_loss=1e-2, label_smoothing=0.1),
    Case(
        "head biased",
        lambda x, W, y, b: F.linear_cross_entropy(x, W, y, linear_bias=b),
        plain_head,
        draw_head_bias,
    ),
    Case(
        "head class weights",
        lambda x, W, y, w: F.linear_cross_entropy(x, W, y, weight=w),
        lambda x, W, y, w: plain_head(x, W, y, weight=w),
        draw_head_weights,
    ),
    Case(
        "head stats",
        lambda x, W, y: F.linear_cross_entropy(x, W, y, return_stats=True)[0],
        plain_head,
        draw_head,
    ),
    Case("log_probs", F.linear_log_probs, lambda *a: plain_log_probs(*a)[0], draw_head),
    Case(
        "log_probs and entropy",
        lambda x, W, y: torch.stack(F.linear_log_probs(x, W, y, return_entropy=True)),
        lambda x, W, y: torch.stack(plain_log_probs(x, W, y)),
        draw_head,
    ),
    Case("cross_entropy", F.cross_entropy, plain_cross_entropy, draw_logits),
    Case(
        "cross_entropy none",
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
        lambda z, y: plain_cross_entropy(z, y, reduction="none"),
        draw_logits,
    ),
    Case(
        "cross_entropy all options",
        lambda z, y: F.cross_entropy(z, y, softcap=8.0, z_loss=1e-2, label_smoothing=0.1),
        lambda z, y: plain_cross_entropy(z, y, softcap=8.0, z_loss=1e-2, label_smoothing=0.1),
        draw_logits,
    ),
    Case(
        "linear_log_sum_exp",
        lambda x, W, y: F.linear_log_sum_exp(x, W),
        lambda x, W, y: (x @ W.T).logsumexp(1),
        draw_head,
    ),
    Case("softmax", lambda z: F.softmax(z, 1), softmax, draw_elements),
    Case("softmax of columns", lambda z: F.softmax(z, 0), lambda z: softmax(z.T).T, draw_elements),
    Case(
        "log_softmax",
        # a rounded result would have rounded the probabilities of the backward
        lambda z: formulas.LogSoftmax.evaluate(z.float(), 1),
        lambda z: z.log_softmax(1),
        draw_elements,
    ),
    Case(
        "entropy",
        lambda z: formulas.Entropy.evaluate(z, 1, 2.0),
        lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1, keepdim=True) / math.log(2),
        draw_elements,
    ),
    Case(
        "z_loss",
        lambda z: formulas.ZLoss.evaluate(z, 1),
        lambda z: z.logsumexp(1, keepdim=True).square(),
        draw_elements,
    ),
    Case("sigmoid", F.sigmoid, lambda z: 1 / (1 + (-z).exp()), draw_elements),
    Case("tanh", F.tanh, torch.tanh, draw_elements),
    Case("relu", F.relu, lambda z: z.clamp(min=0), draw_elements),
    Case("mse_loss", F.mse_loss, lambda a, t: (a - t).square().mean(), draw_pairs),
    Case(
        "squared_error",
        F.squared_error,
        lambda a, t: (a - t).square().sum(1).mean() / 2,
        draw_pairs,
    ),
    Case(
        "sigmoid_squared_error",
        F.sigmoid_squared_error,
        lambda z, t: (t - 1 / (1 + (-z).exp())).square().sum(1).mean() / 2,
        draw_pairs,
    ),
]
SECOND_ORDER = [
    case
    for case in CASES
    if case.name
    in ("head mean", "head ignored", "head all options", "log_probs and entropy", "cross_entropy")
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_second_order_case = pytest.mark.parametrize("case", SECOND_ORDER, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


class Arguments(NamedTuple):
    """A case's arguments on the GPU, and how the output is weighted to have gradients."""

    leaves: list[Tensor]
    constants: list[Tensor]
    upstream: Tensor
    vectors: list[Tensor]  # for a Hessian-vector product


def draw_arguments(case: Case, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """Draws arguments in float64 and rounds them, so that float64 can represent them, too."""
    generator = torch.Generator().manual_seed(seed)
    leaves, constants = case.draw(generator)
    vectors = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in leaves]
    value = case.plain(*leaves, *constants)
    upstream = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
    return Arguments(
        [place(x, dtype).requires_grad_() for x in leaves],
        [place(x, dtype) for x in constants],
        place(upstream, dtype),
        [place(x, dtype) for x in vectors],
    )


def place(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(DEVICE, dtype if x.is_floating_point() else None)


def widen_on_cpu(arguments: Arguments) -> Arguments:
    """Returns the same numbers in float64 on the CPU."""

    def widen(x: Tensor) -> Tensor:
        copy = x.detach().cpu()
        copy = copy.double() if copy.is_floating_point() else copy
        return copy.requires_grad_(x.requires_grad)

    leaves, constants, upstream, vectors = arguments
    return Arguments(
        [*map(widen, leaves)], [*map(widen, constants)], widen(upstream), [*map(widen, vectors)]
    )


def run_first_order(function: Callable[..., Tensor], arguments: Arguments) -> list[Tensor]:
    """Returns the value and the gradient of each leaf."""
    leaves, constants, upstream, _ = arguments
    value = function(*leaves, *constants)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def run_second_order(function: Callable[..., Tensor], arguments: Arguments) -> list[Tensor]:
    """Returns a Hessian-vector product."""
    leaves, constants, upstream, vectors = arguments
    value = function(*leaves, *constants)
    upstream = upstream.to(value.dtype)
    gradients = torch.autograd.grad(value, leaves, upstream, create_graph=True)
    return [*torch.autograd.grad(gradients, leaves, vectors)]


def compute_error(value: Tensor, truth: Tensor) -> float:
    """Returns the relative error in the Euclidean norm."""
    assert value.shape == truth.shape
    assert value.isfinite().all()
    return ((value.cpu().double() - truth).norm() / truth.norm()).item()


def bound(dtype: torch.dtype, roundings: int) -> float:
    """Returns a bound of the relative error in the norm: that of so many roundings of every entry.

    float32 has no intermediate results in a smaller type, but long sums and fast exponentials.
    """
    return (16 if dtype == torch.float32 else 1) * roundings * torch.finfo(dtype).eps / 2


# Values and gradients


@by_dtype
@by_case
def test_values_and_gradients_on_gpu_equal_float64(case, dtype):
    """Rounded are: the gradient of the logits, a scaled factor beside it, and the result."""
    arguments = draw_arguments(case, dtype)
    results = run_first_order(case.function, arguments)
    truths = run_first_order(case.plain, widen_on_cpu(arguments))
    for result, truth in zip(results, truths, strict=True):
        assert result.device.type == DEVICE.type
        assert compute_error(result, truth) <= bound(dtype, 3)


@by_dtype
@by_second_order_case
def test_hessian_vector_products_on_gpu_equal_float64(case, dtype):
    """The two factors of a product are rounded, and so is the first gradient, and the result.

    A Hessian-vector product is a difference, so its relative error may double.
    """
    arguments = draw_arguments(case, dtype)
    results = run_second_order(case.function, arguments)
    truths = run_second_order(case.plain, widen_on_cpu(arguments))
    for result, truth in zip(results, truths, strict=True):
        assert compute_error(result, truth) <= bound(dtype, 8)


@by_dtype
def test_statistics_on_gpu_equal_float64(dtype):
    arguments = draw_arguments(CASES[3], dtype)  # with ignored rows
    x, W, y = *arguments.leaves, *arguments.constants
    _, stats = F.linear_cross_entropy(x, W, y, return_stats=True, z_loss=0.5)
    leaves, constants, *_ = widen_on_cpu(arguments)
    x, W, y = (t.detach() for t in (*leaves, *constants))
    kept = y != IGNORED
    z = x[kept] @ W.T
    lse, l = z.logsumexp(1), z.log_softmax(1)
    for result, truth in (
        (stats.lse, lse),
        (stats.entropy, -(l.exp() * l).sum(1)),
        (stats.z_loss, 0.5 * lse.square()),
    ):
        assert compute_error(result[kept.to(DEVICE)], truth) <= bound(dtype, 3)
        assert not result[~kept.to(DEVICE)].any()
    gaps = z.topk(2).values.diff().abs()[:, 0] > 1e-4  # else rounding decides
    predicted = stats.predicted.cpu()
    assert torch.equal(predicted[kept][gaps], z.argmax(1)[gaps])
    assert (predicted[~kept] == -1).all()
    assert torch.equal(stats.correct.cpu(), predicted == y)


# Synchronisation, graphs, repetition


@contextmanager
def forbid_synchronisation() -> Iterator[None]:
    """Makes calls that wait for the GPU raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sync_debug_mode_sees_a_synchronisation():
    x = torch.ones((), device=DEVICE)
    with forbid_synchronisation(), pytest.raises(RuntimeError, match="synchron"):
        x.item()


@by_dtype
@by_case
def test_forward_and_backward_do_not_synchronise(case, dtype):
    arguments = draw_arguments(case, dtype)
    run_first_order(case.function, arguments)  # compiles, and loads libraries
    with forbid_synchronisation():
        run_first_order(case.function, arguments)


@by_second_order_case
def test_second_order_does_not_synchronise(case):
    arguments = draw_arguments(case, torch.float32)
    run_second_order(case.function, arguments)
    with forbid_synchronisation():
        run_second_order(case.function, arguments)


@by_dtype
@by_case
def test_graph_replayed_with_new_inputs_equals_eager(case, dtype):
    check_graph(case, dtype, run_first_order)


@by_second_order_case
def test_graph_of_second_order_replayed_with_new_inputs_equals_eager(case):
    check_graph(case, torch.float32, run_second_order)


def check_graph(case: Case, dtype: torch.dtype, run: Callable[..., list[Tensor]]) -> None:
    static, new = draw_arguments(case, dtype), draw_arguments(case, dtype, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(case.function, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(case.function, static)
    with torch.no_grad():
        for group, new_group in zip(static, new, strict=True):
            for x, new_x in zip(tree_leaves(group), tree_leaves(new_group), strict=True):
                x.copy_(new_x)
    graph.replay()
    torch.cuda.synchronize()
    for result, expected in zip(results, run(case.function, new), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@by_dtype
@by_case
def test_repeated_results_are_equal_bit_for_bit(case, dtype):
    arguments = draw_arguments(case, dtype)
    expected = run_first_order(case.function, arguments)
    for _ in range(3):
        torch.empty(2**22, device=DEVICE).fill_(torch.nan)  # other memory, with other contents
        for result, first in zip(run_first_order(case.function, arguments), expected, strict=True):
            torch.testing.assert_close(result, first, rtol=0, atol=0)


# Memory and large sizes


def skip_without_memory(needed: int) -> None:
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")


@pytest.mark.parametrize(
    ("rows", "features", "classes"), [(4096, 1024, 128256), (16384, 512, 128256), (8192, 64, 10**6)]
)
def test_peak_memory_of_head_is_within_budget(rows, features, classes):
    budget = kernels.get_memory_budget()
    skip_without_memory(4 * 2**30 + 2 * budget)
    x = torch.randn(rows, features, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(classes, features, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(classes, (rows,), device=DEVICE)
    for _ in range(2):  # the first call allocates what libraries keep
        before = reset_peak(DEVICE)
        loss = F.linear_cross_entropy(x, W, y)
        gradients = torch.autograd.grad(loss, (x, W))
        used = read_peak(DEVICE) - before - sum(g.nbytes for g in gradients)
        del gradients, loss
    assert used <= budget, f"{used / 2**20:.0f} MiB"


@pytest.mark.parametrize(("rows", "classes"), [(3, 1_000_003), (1_000_003, 10)])
@by_dtype
def test_long_and_many_rows_equal_float64(rows, classes, dtype):
    """A row of a million classes; a million rows of ten."""

    def draw(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        z = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        return [z], [torch.randint(classes, (rows,), generator=generator)]

    pairs = [(F.cross_entropy, plain_cross_entropy)]
    if dtype != torch.float16:  # which has few digits for probabilities of a millionth
        pairs.append((lambda z, y: F.softmax(z, 1), lambda z, y: softmax(z)))
    for function, plain in pairs:
        arguments = draw_arguments(Case("", function, plain, draw), dtype)
        # large, since gradients of a mean of many rows would be 0 in float16
        arguments = arguments._replace(upstream=arguments.upstream * 1024)
        results = run_first_order(function, arguments)
        truths = run_first_order(plain, widen_on_cpu(arguments))
        for result, truth in zip(results, truths, strict=True):
            # a sum of a million terms in float32 has a larger error than one rounding
            assert compute_error(result, truth) <= bound(dtype, 32 if dtype == torch.float32 else 4)


@by_dtype
def test_head_of_a_million_classes_equals_float64(dtype):
    def draw(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        x = 2 * torch.randn(5, 16, generator=generator, dtype=torch.float64)
        W = torch.randn(1_000_003, 16, generator=generator, dtype=torch.float64) / 4
        return [x, W], [torch.randint(1_000_003, (5,), generator=generator)]

    case = Case("", F.linear_cross_entropy, plain_head, draw)
    arguments = draw_arguments(case, dtype)
    results = run_first_order(case.function, arguments)
    truths = run_first_order(case.plain, widen_on_cpu(arguments))
    for result, truth in zip(results, truths, strict=True):
        assert compute_error(result, truth) <= bound(dtype, 3)


def test_cross_entropy_of_more_than_two_billion_logits_is_right_in_the_last_row():
    rows, classes = 16800, 128256
    assert rows * classes > 2**31
    skip_without_memory(30 * 2**30)
    z = torch.zeros(rows, classes, device=DEVICE, dtype=torch.bfloat16)
    z[-1] = torch.randn(classes, device=DEVICE)
    z.requires_grad_()
    y = torch.full((rows,), classes - 1, device=DEVICE)
    loss = F.cross_entropy(z, y, reduction="none")
    (dz,) = torch.autograd.grad(loss.sum(), z)
    last = z[-1:].detach().cpu().double().requires_grad_()
    truth = plain_cross_entropy(last, y[-1:].cpu(), reduction="sum")
    (expected,) = torch.autograd.grad(truth, last)
    assert compute_error(loss[-1], truth.detach()) <= bound(torch.bfloat16, 3)
    assert compute_error(dz[-1:], expected) <= bound(torch.bfloat16, 3)
