"""Row-wise kernels on given logits against float64, in Triton's interpreter without a GPU.

Tolerances: sums of float32 carry a few roundings, each 2^-24 of the terms' absolute values, and
exp2 about as many; a half result adds its own rounding.
"""

import math
import random

import gpu_helpers
import pytest
import torch

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
          ((2, 7, 5), 1), ((2, 33, 3, 3), 1), ((1, 40, 16), 1), ((3, 2, 36), 2)]  # fmt: skip


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


@pytest.mark.parametrize("rows", SIZES, indirect=True)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_extreme_logits(rows, transposed, dense):
    """Infinite logits, a difference of 200, a first and a last tile of -inf alone, a nan."""
    torch.manual_seed(0)
    N, C = 8, 70
    z = torch.randn(N, C)
    z[0, :40], z[1, 40:], z[2, 5], z[3, 69] = -math.inf, -math.inf, 200, 200
    z[4], z[5, 7], z[6, 69] = -math.inf, math.nan, math.inf
    z[7] = torch.linspace(-100, 100, C)
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


@pytest.mark.parametrize("rows", SIZES, indirect=True)
@pytest.mark.parametrize(("shape", "dim"), [*SHAPES, ((), 0)])
def test_softmax_product(rows, shape, dim):
    rng = random.Random(f"{shape}{dim}")
    torch.manual_seed(rng.randrange(10**6))
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(shape).softmax(dim).to(dtype).to(DEVICE)
        v = make_tensor(rng, shape, dtype) if shape else torch.randn((), device=DEVICE).to(dtype)
        result = rows.softmax_product(a, v, dim)
        a, v = a.double(), v.double()
        av = (a * v).sum(dim, keepdim=True)
        scale = a * (v.abs() + (a * v).abs().sum(dim, keepdim=True))
        assert result.dtype == dtype
        assert result.is_contiguous()
        check(result, a * (v - av), scale, dtype)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 3, 0), (2, 0, 3), (0,)])
@pytest.mark.parametrize("needs_dz", [False, True])
def test_empty(rows, shape, needs_dz):
    z = torch.empty(shape, device=DEVICE)
    dim = min(1, len(shape) - 1)
    dc = torch.ones((), device=DEVICE) if needs_dz else None
    c, dz = rows.cross_entropy(dc, z, None, None, z, None, dim, 2.0, True)
    row_shape = [1 if i == dim else n for i, n in enumerate(shape)]
    assert torch.equal(c, torch.zeros(row_shape, device=DEVICE))
    assert dz.shape == (shape if needs_dz else (0,))
    assert rows.softmax_product(z, z, dim).shape == shape


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
    from torch_nnmath.kernels.gpu import triton_rows

    calls = []
    for name in ("cross_entropy", "softmax_product"):
        function = getattr(triton_rows, name)

        def count(*args, function=function, name=name):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(triton_rows, name, count)
    z, y = torch.randn(3, 4), torch.tensor([[0], [1], [3]])
    operators = torch.ops.torch_nnmath
    c, _ = operators.cross_entropy(None, z, y, torch.ones(3, 1), None, None, 1, math.e, True)
    torch.testing.assert_close(
        c[:, 0], torch.nn.functional.cross_entropy(z, y[:, 0], reduction="none")
    )
    operators.softmax_product(z.softmax(1), z, 1)
    operators.softmax_product(z.softmax(1).double(), z.double(), 1)  # not for float64
    assert calls == ["cross_entropy", "softmax_product"]
