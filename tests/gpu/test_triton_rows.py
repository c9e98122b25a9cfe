"""Row-wise kernels on given logits against float64, in Triton's interpreter without a GPU.

Tolerances: sums of float32 carry a few roundings, each 2^-24 of the terms' absolute values, and
exp2 about as many; a half result adds its own rounding.
"""

import math
import random

import gpu_helpers
import pytest
import torch
from conftest import check_operator

from torch_nnmath import kernels
from torch_nnmath.formulas.entropy import Entropy
from torch_nnmath.formulas.softmax import LogSoftmax, LogSumExp
from torch_nnmath.formulas.z_loss import ZLoss

pytestmark = [
    pytest.mark.triton,
    gpu_helpers.needs_triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, for entries that are masked
]

gpu_operators = gpu_helpers.gpu_operators  # a fixture
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 64 * 2.0**-24
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZES = {  # as fields of Sizes; small ones reach every kind of plan with few entries
    "default": None,
    "small": (16, 32, 4, 32, 1),
    "narrow": (8, 16, 8, 64, 2),
}
SHAPES = [((5, 65), 1), ((3, 16), -1), ((1, 130), 1), ((4, 1), 1), ((17,), 0), ((33, 6), 0),
          ((2, 7, 5), 1), ((2, 33, 3, 2), 1), ((1, 40, 16), 1), ((3, 2, 36), 2)]  # fmt: skip


@pytest.fixture(autouse=True)
def round_like_a_gpu(monkeypatch):
    gpu_helpers.round_in_interpreter(monkeypatch)


@pytest.fixture
def rows(monkeypatch, request):
    from torch_nnmath.kernels.gpu import row_plans, triton_rows

    sizes = SIZES[getattr(request, "param", "default")]
    if sizes is not None:
        monkeypatch.setattr(row_plans, "SIZES", row_plans.Sizes(*sizes))
    return triton_rows


def make_tensor(rng, shape, dtype, scale=3.0):
    """Random values with random strides: contiguous, transposed, every second entry, permuted."""
    kind = rng.randrange(4)
    if kind == 1:
        x = torch.randn(shape[::-1], device=DEVICE).permute(*reversed(range(len(shape))))
    elif kind == 2:
        x = torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE)[..., ::2]
    elif kind == 3 and len(shape) > 2:
        x = torch.randn(shape[0], *shape[2:], shape[1], device=DEVICE).movedim(-1, 1)
    else:
        x = torch.randn(shape, device=DEVICE)
    return (x * scale).to(dtype)


def check(result, truth, scale, dtype):
    """|result - truth| <= EPSILON scale + the rounding of the type; nan exactly where truth is."""
    assert torch.equal(result.isnan().cpu(), truth.isnan().cpu())
    truth = truth.to(result.device)
    equal = (result.double() == truth) | truth.isnan()
    bound = EPSILON * scale.to(truth.device) + ROUNDING[dtype] * truth.abs() + 1e-7
    error = (result.double() - truth).abs()
    assert (equal | (error <= bound)).all(), (error - bound).nan_to_num().max()


def compute_truth(dc, z, y, p, t, keep, dim, base):
    """c and dz in float64, and the absolute values that their rounding errors grow with."""
    z = z.double()
    target = torch.zeros_like(z) if t is None else t.double().expand_as(z).clone()
    if y is not None:
        target.scatter_add_(dim, y, p.double().expand(y.shape))
    l = z - z.amax(dim, keepdim=True)
    l = l - l.exp().sum(dim, keepdim=True).log()
    is_ignorable = (target == 0) & l.isinf()
    terms = target * l.masked_fill(is_ignorable, 0)
    T = target.sum(dim, keepdim=True)
    c = -terms.sum(dim, keepdim=True) / math.log(base)
    k = dc.double() / math.log(base)
    dz = k * (T * l.exp() - target)
    c_scale = (terms.abs().sum(dim, keepdim=True) + target.abs().sum(dim, keepdim=True)) * 2
    sizes = target.abs().sum(dim, keepdim=True) * l.exp() + target.abs()
    dz_scale = k.abs() * sizes * (1 + l.abs().clamp(max=300) / 8)
    if keep is not None:
        c, dz = c.masked_fill(~keep, 0), dz.masked_fill(~keep, 0)
    return c, dz, c_scale.nan_to_num(0, 0, 0) / math.log(base), dz_scale.nan_to_num(0, 0, 0)


def make_case(rng, shape, dim, dtype):
    row_shape = [1 if i == dim % len(shape) else n for i, n in enumerate(shape)]
    z = make_tensor(rng, shape, dtype)
    y = p = t = keep = None
    kind = rng.choice(["hard", "dense", "both"])
    if kind != "dense":
        y = torch.randint(shape[dim], row_shape, device=DEVICE)
        p = torch.rand(row_shape, device=DEVICE) * (torch.rand(row_shape, device=DEVICE) > 0.2)
    if kind != "hard":
        t = make_tensor(rng, shape, dtype, 1.0).abs()
        if rng.random() < 0.5:  # one row for all, or one number
            t = t[tuple(slice(None) if i == dim % len(shape) else slice(1) for i in range(z.dim()))]
    if rng.random() < 0.6:
        keep = torch.rand(row_shape, device=DEVICE) > 0.3
        z = torch.where(keep, z, float("nan")) if rng.random() < 0.7 else z
    dc = torch.randn(row_shape if rng.random() < 0.6 else (), device=DEVICE)
    return dc, z, y, p, t, keep, dim, rng.choice([math.e, 2.0, 10.0])


def check_case(rows, case, needs_c=True, needs_dz=True):
    dc, z, *rest, dim, base = case
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in case]
    c, dz = rows.cross_entropy(dc if needs_dz else None, z, *rest, dim, base, needs_c)
    for x, old in zip(case, before, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x.nan_to_num(7), old.nan_to_num(7))
    true_c, true_dz, c_scale, dz_scale = compute_truth(dc, z, *rest, dim, base)
    row_shape = [1 if i == dim % z.dim() else n for i, n in enumerate(z.shape)]
    expected_c = z.new_empty(row_shape if needs_c else (0,), dtype=torch.float32)
    expected_dz = torch.empty_like(z) if needs_dz else z.new_empty(0)
    for x, like in ((c, expected_c), (dz, expected_dz)):
        assert (x.shape, x.dtype, x.stride()) == (like.shape, like.dtype, like.stride())
    if needs_c:
        check(c, true_c, c_scale, torch.float32)
    if needs_dz:
        check(dz, true_dz, dz_scale, z.dtype)
    if rest[-1] is not None:
        assert not needs_c or not c.masked_select(~rest[-1]).any()
        assert not needs_dz or not dz.masked_select(~rest[-1]).any()


@pytest.mark.parametrize("rows", SIZES, indirect=True)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_cross_entropy(rows, shape, dim):
    rng = random.Random(f"{shape}{dim}")
    torch.manual_seed(rng.randrange(10**6))
    for dtype in (torch.float32, rng.choice([torch.bfloat16, torch.float16])):
        case = make_case(rng, shape, dim, dtype)
        check_case(
            rows, case, *rng.choice([(True, True), (True, True), (True, False), (False, True)])
        )


def make_extreme_logits():
    torch.manual_seed(0)
    N, C = 8, 70
    z = torch.randn(N, C)
    z[0, :40], z[1, 40:], z[2, 5], z[3, 69] = -math.inf, -math.inf, 200, 200
    z[4], z[5, 7], z[6, 69] = -math.inf, math.nan, math.inf
    z[7] = torch.linspace(-100, 100, C)
    return z


@pytest.mark.parametrize("rows", SIZES, indirect=True)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_extreme_logits(rows, transposed, dense):
    """Infinite logits, a difference of 200, a first and a last tile of -inf alone, a nan."""
    z = make_extreme_logits()
    N, C = z.shape
    y = torch.tensor([50, 3, 6, 69, 1, 2, 3, 0])[:, None]
    p, t = torch.ones(N, 1), None
    if dense:
        t = torch.rand(N, C).masked_fill(z == -math.inf, 0)
        t[1, 60] = 0.5  # an impossible class that is wanted: the loss is infinite
        y = p = None
    if transposed:
        z, t = z.t().contiguous().t(), None if t is None else t.t().contiguous().t()
    tensors = [None if x is None else x.to(DEVICE) for x in (torch.ones(()), z, y, p, t)]
    check_case(rows, (*tensors, None, 1, math.e))
    tensors = [None if x is None else x.to(DEVICE) for x in (torch.ones(()), z, y, p, t)]
    keep = ~z.isnan().any(1, keepdim=True).to(DEVICE)
    check_case(rows, (*tensors, keep, 1, math.e))


FUNCTIONS = ("log_sum_exp", "z_loss", "entropy")


def compute_function(name, g, z, dim, base):
    """Value, g times gradient, and the absolute values that their rounding errors grow with."""
    z = z.double()
    m = z.amax(dim, keepdim=True)
    lse = (z - m.masked_fill(m.isinf(), 0)).exp().sum(dim, keepdim=True).log()
    lse = lse + m.masked_fill(m.isinf(), 0)
    l = z - m
    l = l - l.exp().sum(dim, keepdim=True).log()
    a, terms = l.exp(), (l.exp() * l).masked_fill(l == -math.inf, 0)
    size = a * (1 + l.abs().clamp(max=300) / 8) * g.abs()
    if name == "log_sum_exp":
        results = lse, g * a, 1 + m.abs() + lse.abs(), size
    elif name == "z_loss":
        c_scale = 2 * lse.abs() * (1 + m.abs() + lse.abs())
        results = lse * lse, 2 * g * lse * a, c_scale, 2 * size * (1 + m.abs() + lse.abs())
    else:
        k, h = g / math.log(base), -terms.sum(dim, keepdim=True)
        dz = (-k * (terms + a * h)).masked_fill(l == -math.inf, 0)
        c_scale = (1 + terms.abs().sum(dim, keepdim=True)) / math.log(base)
        dz_scale = size * (1 + l.abs().clamp(max=300) + h) / math.log(base)
        results = h / math.log(base), dz, c_scale, dz_scale
    c, dz, *scales = results
    return c, dz, *(x.nan_to_num(0, 0, 0) for x in scales)


def check_function(rows, name, g, z, dim, needs_c=True, needs_dz=True):
    base = 2.0
    options = (base,) if name == "entropy" else ()
    before = z.clone()
    c, dz = getattr(rows, name)(g if needs_dz else None, z, dim, *options, needs_c)
    assert torch.equal(z.nan_to_num(7), before.nan_to_num(7))
    true_c, true_dz, c_scale, dz_scale = compute_function(name, g, z, dim, base)
    assert c.dtype == torch.float32
    assert (dz.shape, dz.dtype) == (z.shape if needs_dz else (0,), z.dtype)
    if needs_c:
        check(c, true_c, c_scale, torch.float32)
    if needs_dz:
        check(dz, true_dz, dz_scale, z.dtype)


@pytest.mark.parametrize("rows", SIZES, indirect=True)
@pytest.mark.parametrize(("shape", "dim"), [*SHAPES, ((), 0)])
def test_value_and_gradient_of_row_functions(rows, shape, dim):
    rng = random.Random(f"{shape}{dim}")
    torch.manual_seed(rng.randrange(10**6))
    for name in ("entropy", rng.choice(["log_sum_exp", "z_loss"])):
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        z = make_tensor(rng, shape, dtype) if shape else torch.randn((), device=DEVICE).to(dtype)
        row_shape = [1 if i == dim % z.dim() else n for i, n in enumerate(shape)]
        g = torch.randn(row_shape if rng.random() < 0.6 else (), device=DEVICE)
        needs = rng.choice([(True, True), (True, True), (True, False), (False, True)])
        check_function(rows, name, g, z, dim, *needs)


@pytest.mark.parametrize("rows", SIZES, indirect=True)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_logits_of_row_functions(rows, transposed, name):
    z = make_extreme_logits()
    z = z.t().contiguous().t() if transposed else z
    check_function(rows, name, torch.ones((), device=DEVICE), z.to(DEVICE), 1)


@pytest.mark.parametrize("rows", SIZES, indirect=True)
@pytest.mark.parametrize(("shape", "dim"), [*SHAPES, ((), 0)])
def test_products_with_the_jacobians_of_softmax_and_its_logarithm(rows, shape, dim):
    from torch_nnmath.kernels.gpu import triton_softmax

    rng = random.Random(f"{shape}{dim}")
    torch.manual_seed(rng.randrange(10**6))
    for is_log in (False, True):
        dtype = rng.choice([torch.float32, torch.bfloat16])
        l = torch.randn(shape, device=DEVICE).log_softmax(dim).to(dtype)
        a = l.exp()
        v = make_tensor(rng, shape, dtype) if shape else torch.randn((), device=DEVICE).to(dtype)
        if is_log:
            result = triton_softmax.log_softmax_product(l, v, dim)
        else:
            result = triton_softmax.softmax_product(a, v, dim)
        l, a, v = l.double(), a.double(), v.double()
        if is_log:
            truth = v - l.exp() * v.sum(dim, keepdim=True)
            scale = v.abs() + l.exp() * (1 + l.abs() / 8) * v.abs().sum(dim, keepdim=True)
        else:
            truth = a * (v - (a * v).sum(dim, keepdim=True))
            scale = a * (v.abs() + (a * v).abs().sum(dim, keepdim=True))
        assert result.dtype == dtype
        assert result.is_contiguous()
        check(result, truth, scale, dtype)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 3, 0), (2, 0, 3), (0,)])
@pytest.mark.parametrize("needs_dz", [False, True])
def test_empty(rows, shape, needs_dz):
    from torch_nnmath.kernels.gpu import triton_softmax

    z = torch.empty(shape, device=DEVICE)
    dim = min(1, len(shape) - 1)
    dc = torch.ones((), device=DEVICE) if needs_dz else None
    row_shape = [1 if i == dim else n for i, n in enumerate(shape)]
    for value, (c, dz) in (
        (0.0, rows.cross_entropy(dc, z, None, None, z, None, dim, 2.0, True)),
        (-math.inf, rows.log_sum_exp(dc, z, dim, True)),
        (math.inf, rows.z_loss(dc, z, dim, True)),
        (0.0, rows.entropy(dc, z, dim, 2.0, True)),
    ):
        assert torch.equal(c, torch.full(row_shape, value, device=DEVICE))
        assert dz.shape == (shape if needs_dz else (0,))
    assert triton_softmax.softmax_product(z, z, dim).shape == shape
    assert triton_softmax.log_softmax_product(z, z, dim).shape == shape


def test_no_view(rows):
    """Axes whose strides do not merge: the logits are read, and the gradient written, by a copy."""
    torch.manual_seed(1)
    z = torch.randn(3, 6, 4, 2, device=DEVICE).permute(2, 1, 0, 3).transpose(2, 3)
    y = torch.randint(6, (4, 1, 2, 3), device=DEVICE)
    p, dc = torch.rand(y.shape, device=DEVICE), torch.randn(y.shape, device=DEVICE)
    check_case(rows, (dc, z, y, p, None, None, 1, math.e))
    z = torch.randn(4, 3, 6, device=DEVICE).transpose(0, 1)
    y = torch.randint(6, (3, 4, 1), device=DEVICE)
    p, dc = torch.rand(y.shape, device=DEVICE), torch.randn(y.shape, device=DEVICE)
    check_case(rows, (dc, z, y, p, None, None, 2, math.e))


def test_repeats_and_kinds_of_plans(rows):
    """The rule's limits, and slices only where few rows are long."""

    def choose(B, C, n, is_strided=False):
        view = torch.empty(B, C, n, device="meta")
        if not is_strided:
            view = torch.empty(B, n, C, device="meta").transpose(1, 2)
        return rows.choose_plan(view, 1, 132)

    assert choose(1, 10, 4096).shape == (128, 16)
    assert choose(1, 16384, 64).is_tile
    assert not choose(1, 16385, 64).is_tile
    assert choose(1, 2**20, 64).slices > 1
    assert choose(1, 2**20, 67).slices == 1
    assert choose(8, 21, 4096, True).is_tile
    assert not choose(8, 1000, 4096, True).is_tile
    for C in (16385, 2**17, 2**20 + 1):
        plan = choose(1, C, 1)
        tile = plan.shape[0] * plan.shape[1]
        assert plan.slices * plan.slice_tiles * tile >= C
        assert (plan.slices - 1) * plan.slice_tiles * tile < C


def test_operators_reach_the_kernels(gpu_operators, monkeypatch):
    from torch_nnmath.kernels.gpu import triton_rows, triton_softmax

    calls = []
    for module, name in (
        (triton_rows, "cross_entropy"),
        *((triton_rows, name) for name in FUNCTIONS),
        (triton_softmax, "softmax_product"),
        (triton_softmax, "log_softmax_product"),
    ):
        function = getattr(module, name)

        def count(*args, function=function, name=name):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, count)
    z, y = torch.randn(3, 4), torch.tensor([[0], [1], [3]])
    operators = torch.ops.torch_nnmath
    c, _ = operators.cross_entropy(None, z, y, torch.ones(3, 1), None, None, 1, math.e, True)
    torch.testing.assert_close(
        c[:, 0], torch.nn.functional.cross_entropy(z, y[:, 0], reduction="none")
    )
    torch.testing.assert_close(operators.log_sum_exp(None, z, 1, True)[0], z.logsumexp(1, True))
    operators.z_loss(None, z, 1, True)
    operators.entropy(None, z, 1, 2.0, True)
    operators.softmax_product(z.softmax(1), z, 1)
    operators.log_softmax_product(z.log_softmax(1), z, 1)
    assert calls == ["cross_entropy", *FUNCTIONS, "softmax_product", "log_softmax_product"]
    operators.softmax_product(z.softmax(1).double(), z.double(), 1)  # not for float64
    with pytest.raises(NotImplementedError, match="z_loss has no kernel here: a type is not"):
        operators.z_loss(None, z.double(), 1, True)
    assert len(calls) == 6


def test_operators_of_gpus_pass_opcheck(gpu_operators):
    z, g = torch.randn(3, 4), torch.randn(3, 1)
    for args in ((None, z, 1, True), (g, z, 1, False), (g, z.T.half().T, 1, True)):
        for name in ("log_sum_exp", "z_loss"):
            check_operator(getattr(kernels, name), args)
        check_operator(kernels.entropy, (*args[:3], 2.0, args[3]))
    check_operator(kernels.log_softmax_product, (z.log_softmax(1), z, 1))
    check_operator(kernels.log_softmax_product, (z.T, z.T.bfloat16(), 0))


def test_formulas_use_the_kernels_of_gpus_for_value_and_gradient(gpu_operators, monkeypatch):
    """The kernel's gradient is rounded once; the formula in float64 is the truth."""
    kernel_names = gpu_helpers.select_like_a_gpu(monkeypatch)
    z = torch.randn(4, 6, dtype=torch.float64).half().double()
    for formula, options in ((LogSumExp, ()), (ZLoss, ()), (Entropy, (2.0,))):
        (truth, true_gradient), results = [
            differentiate(formula, x, *options) for x in (z, z.half())
        ]
        assert results[0].dtype == torch.float32
        torch.testing.assert_close(results[0].double(), truth, rtol=1e-5, atol=1e-5)
        assert results[1].dtype == torch.float16
        torch.testing.assert_close(results[1].double(), true_gradient, rtol=2**-11, atol=1e-5)
    assert kernel_names == ["log_sum_exp"] * 2 + ["z_loss"] * 2 + ["entropy"] * 2
    kernel_names.clear()
    _, true_dz = differentiate(LogSoftmax, z)
    assert not kernel_names
    _, dz = differentiate(LogSoftmax, z.float())
    torch.testing.assert_close(dz.double(), true_dz, rtol=1e-5, atol=1e-5)
    assert kernel_names == ["log_softmax_product"]


def differentiate(formula, z, *options):
    """The value, and the gradient of Σ value²."""
    z = z.clone().requires_grad_()
    c = formula.evaluate(z, 1, *options)
    return c.detach(), *torch.autograd.grad(c.double().square().sum(), z)
