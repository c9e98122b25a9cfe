"""The elementwise kernels in Triton's interpreter, against their formulas in float64."""

from __future__ import annotations

import itertools
import random

import gpu_helpers
import pytest
import torch

from torch_nnmath import kernels

pytestmark = [
    pytest.mark.triton,
    gpu_helpers.needs_triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of inf and nan
]
gpu_operators = gpu_helpers.gpu_operators

ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
ROUNDING |= {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
u = ROUNDING[torch.float32]
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def elementwise(monkeypatch, gpu_operators):
    """The module, with tiles of few entries: sizes of 15 to 70 end before, at and after tiles."""
    from torch_nnmath.kernels.gpu import triton_elementwise

    tiles = triton_elementwise.Tiles(flat=16, example=16, longest_row=8, partial=2, warps=4)
    monkeypatch.setattr(triton_elementwise, "choose_tiles", lambda: tiles)
    return triton_elementwise


def draw(shape, dtype, seed, *, is_strided=False, scale=1.0):
    """Normal numbers; `is_strided` gives the same shape with gaps and reversed axes in memory."""
    generator = torch.Generator().manual_seed(seed)
    if is_strided:
        x = torch.randn((*shape[::-1], 2), generator=generator)[..., 0]
        x = x.permute(tuple(range(len(shape)))[::-1])
    else:
        x = torch.randn(shape, generator=generator)
    return (scale * x).to(dtype)


def check(got, true, tolerance):
    """Compares in float64; inf and nan must be equal."""
    got, is_finite = got.double(), true.isfinite()
    assert got.shape == true.shape
    torch.testing.assert_close(got[~is_finite], true[~is_finite], rtol=0, atol=0, equal_nan=True)
    excess = ((got - true).abs() - tolerance)[is_finite]
    assert excess.numel() == 0 or excess.max() <= 0, excess.max()


# Products

SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (3, 11), (4, 8), (2, 0, 3), (3, 5, 3)]
SLOPES = {
    "sigmoid": lambda a: a * (1 - a),
    "tanh": lambda a: (1 - a) * (1 + a),
    "relu": lambda a: torch.where(a <= 0, 0.0, 1.0),
}


def check_product(name, a, v):
    got = getattr(kernels, f"{name}_product")(a, v)
    assert got.dtype == v.dtype
    assert got.stride() == torch.empty_like(a).stride()  # dense, in a's memory format
    true = SLOPES[name](a.double()) * v.double()
    # the slope, the product and the cast are rounded; half types may underflow
    tolerance = true.abs() * (2.01 * u + (v.dtype != f32) * ROUNDING[v.dtype])
    check(got, true, tolerance + torch.finfo(v.dtype).smallest_normal * ROUNDING[v.dtype])


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize(("a_type", "v_type"), [(f32, f32), (bf16, bf16), (f16, f16), (f32, bf16)])
def test_product(elementwise, name, a_type, v_type):
    for i, shape in enumerate(SHAPES):
        for a_strided, v_strided in ((False, False), (i % 2 == 0, i % 2 == 1)):
            z = draw(shape, f32, 2 * i, is_strided=a_strided, scale=3)
            a = getattr(torch, name)(z).to(a_type)
            check_product(name, a, draw(shape, v_type, 2 * i + 1, is_strided=v_strided))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_product_keeps_digits_near_saturation(elementwise, name):
    below_1 = 1 - torch.arange(48) * 2.0**-24
    a = torch.cat([below_1, 1 - below_1, -below_1 if name == "tanh" else below_1])
    check_product(name, a, torch.full_like(a, 0.7))


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_relu_product_passes_nan_where_a_is_positive_or_nan(elementwise, dtype):
    a = torch.tensor([-1.0, -0.0, 0.0, 1e-7, 1.0, INF, -INF, NAN], dtype=dtype)
    v = torch.tensor([NAN, INF, -INF, -2.0, 0.0], dtype=dtype)
    a, v = (x.flatten() for x in torch.meshgrid(a, v, indexing="ij"))
    true = torch.where(a <= 0, 0.0, v)
    torch.testing.assert_close(kernels.relu_product(a, v), true, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_product_passes_nan(elementwise, name):
    a, v = torch.tensor([NAN, 0.5, 1.0]), torch.tensor([1.0, NAN, INF])
    check_product(name, a, v)


# Squared errors


def compute_truth(dc, a, t, axes, scale, is_sigmoid):
    """Returns c and da in float64, and the largest errors that rounding may cause."""
    a, t = a.double(), t.double()
    slope = torch.ones_like(a)
    if is_sigmoid:
        a, slope = torch.sigmoid(a), torch.sigmoid(a) * torch.sigmoid(-a)
    error = a - t
    # σ(z) has about 8 roundings, those of the exponential among them; the difference has one
    error_bound = u * (error.abs() + (8 * a.abs() if is_sigmoid else 0))
    last = tuple(range(a.dim() - axes, a.dim()))
    entries = max(a[(0,) * (a.dim() - axes)].numel() if a.numel() else 0, 1)

    def sum_last(x):
        return x.sum(last, keepdim=True) if axes else x

    c = scale / 2 * sum_last(error.square())
    c_bound = scale / 2 * sum_last(2 * error.abs() * error_bound) + (entries + 3) * u * c
    tiny = torch.finfo(f32).smallest_normal  # below it, numbers may become 0
    c_bound += entries * tiny
    if dc is None:
        return c, None, c_bound, None
    k = scale * dc.double()
    da_bound = (k * slope).abs() * (error_bound + (16 if is_sigmoid else 3) * u * error.abs())
    return c, k * error * slope, c_bound, da_bound + (k.abs() * (error.abs() + 1) + 1) * tiny


def check_squared_error(is_sigmoid, dc, a, t, axes, scale, needs_c):
    if is_sigmoid:
        scale = 1.0
        args, operator = (dc, a, t, axes, needs_c), kernels.sigmoid_squared_error
    else:
        args, operator = (dc, a, t, axes, scale, needs_c), kernels.squared_error
    c, da = operator(*args)
    fakes = operator(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
    for got, fake in zip((c, da), fakes, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())
    true_c, true_da, c_bound, da_bound = compute_truth(dc, a, t, axes, scale, is_sigmoid)
    if needs_c:
        check(c, true_c, c_bound)
    if dc is not None:
        check(da, true_da, da_bound)
    again = operator(*args)
    assert all(x.equal(y) or x.isnan().any() for x, y in zip((c, da), again, strict=True))


def draw_dc(kind, shape, axes, seed):
    """One number, one expanded to the shape of c, a value for each example, or None."""
    batch = (*shape[: len(shape) - axes], *[1] * axes)
    match kind:
        case "none":
            return None
        case "shared":
            return draw((), f32, seed)
        case "expanded":
            return draw((), f32, seed).expand(batch)
        case "strided":
            return draw(batch, f32, seed, is_strided=True)
        case _:
            return draw(batch, f32, seed)


@pytest.mark.parametrize("is_sigmoid", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), 0),
        ((1,), 1),
        ((17,), 0),
        ((17, 1), 1),
        ((0, 3), 1),
        ((3, 0), 1),
        ((5, 2), 1),  # ten examples a tile, of which the last is not full
        ((9, 3), 1),
        ((2, 2, 2, 2), 2),
        ((3, 8), 1),
        ((3, 9), 1),  # longer than `longest_row`: tiles of one example
        ((2, 16), 1),
        ((2, 17), 1),
        ((1, 33), 1),
        ((3, 5, 10), 2),  # 4 tiles an example, 2 tiles of partial sums
        ((70,), 1),
    ],
)
def test_squared_error(elementwise, is_sigmoid, shape, axes):
    kinds = ("none", "shared", "expanded", "example")
    for seed, (kind, needs_c) in enumerate(itertools.product(kinds, (True, False))):
        if needs_c or kind != "none":
            dc = draw_dc(kind, shape, axes, seed)
            a, t = (draw(shape, f32, seed + i, scale=2) for i in (100, 200))
            check_squared_error(is_sigmoid, dc, a, t, axes, 2.0, needs_c)


@pytest.mark.parametrize("seed", range(60))
def test_squared_error_of_random_options(elementwise, seed):
    rng = random.Random(seed)
    shape = tuple(rng.choice((1, 2, 3, 4, 7, 8, 9, 17)) for _ in range(rng.randint(0, 3)))
    axes = rng.randint(0, len(shape))
    kind = rng.choice(("none", "shared", "expanded", "strided", "example"))
    a_type, t_type = (rng.choice((f32, bf16, f16)) for _ in range(2))
    a = draw(shape, a_type, seed, is_strided=rng.random() < 0.3, scale=3)
    t = draw(shape, t_type, seed + 1000, is_strided=rng.random() < 0.3)
    if rng.random() < 0.2:
        t = (10 * t).long()  # integers, as PyTorch's mse_loss accepts
    dc = draw_dc(kind, shape, axes, seed)
    needs_c = dc is None or rng.random() < 0.5
    scale = rng.choice((1.0, 2.0))
    check_squared_error(rng.random() < 0.5, dc, a, t, axes, scale, needs_c)


@pytest.mark.parametrize("width", [1, 7, 25])
def test_sigmoid_squared_error_of_extreme_logits(elementwise, width):
    z = torch.cat([torch.linspace(-200, 200, 161), torch.linspace(-12, 12, 36)])
    z = torch.cat([z, torch.tensor([0.0, -0.0, INF])])
    z = z[: len(z) // width * width].reshape(-1, width)
    dc = draw((len(z), 1), f32, 1)
    for t in (torch.zeros_like(z), torch.ones_like(z)):
        check_squared_error(True, dc, z, t, 1, 1.0, True)


@pytest.mark.parametrize("is_sigmoid", [False, True])
@pytest.mark.parametrize("shape", [(5, 1), (3, 6), (2, 20)])
def test_squared_error_keeps_nan_in_its_example(elementwise, is_sigmoid, shape):
    a, t = draw(shape, f32, 1), draw(shape, f32, 2)
    a[1, -1] = NAN
    t[0, 0] = INF
    check_squared_error(is_sigmoid, draw((shape[0], 1), f32, 3), a, t, 1, 1.0, True)


# The gradient times the cost's gradient


@pytest.mark.parametrize("dtype", [f32, bf16, f16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 3), (2, 16), (3, 17), (16, 1), (1, 40)])
def test_scale(elementwise, dtype, shape):
    factors = [1.0, 0.37, -2.0, 0.0, INF, -INF, NAN]
    for seed, (value, kind) in enumerate(itertools.product(factors, ("none", "all", "row"))):
        factor = torch.tensor(value, dtype=(f32, dtype)[seed % 2])
        gradient = draw(shape, dtype, seed)
        keep = None
        if kind == "all":
            keep = torch.tensor([[seed % 4 != 0]])
        elif kind == "row":
            keep = draw((shape[0], 1), f32, seed + 1) > 0
        if keep is not None:
            gradient = gradient.masked_fill(~keep, 0)
        true = gradient.double() * factor.double()
        if keep is not None:
            true = true.masked_fill(~keep, 0)
        bound = ROUNDING[dtype] + (u if dtype in (bf16, f16) else 0)
        got = elementwise.scale_(gradient, factor, keep)
        assert got is gradient
        check(got, true, true.abs() * bound + torch.finfo(dtype).smallest_normal * ROUNDING[dtype])


def test_scale_by_1_changes_no_bit(elementwise):
    gradient = torch.arange(-(2**15), 2**15 - 1, 997, dtype=torch.int16).view(bf16)  # also nan
    before = gradient.view(torch.int16).clone()
    elementwise.scale_(gradient, torch.ones(()), None)
    assert gradient.view(torch.int16).equal(before)


def test_offsets_exceed_32_bits(elementwise, monkeypatch):
    """Runs the last program alone, in memory of which only its tile is touched."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    n = 2**31 + 24
    try:
        a, v, result = (torch.empty(n, dtype=f16) for _ in range(3))
    except RuntimeError:
        pytest.skip("this machine does not promise so much memory")
    tail = slice(2**31, n)
    a[tail], v[tail] = torch.linspace(0, 1, 24), torch.linspace(-1, 1, 24)
    get_program_id = InterpreterBuilder.create_get_program_id

    def get_late_program_id(self, axis):
        handle = get_program_id(self, axis)
        return TensorHandle(handle.data + 2**31 // 16, handle.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", get_late_program_id)
    kernel = elementwise.product_kernel
    kernel[(2,)](a, v, result, n, ACTIVATION="relu", TILE=16, enable_fp_fusion=True)
    assert result[tail].equal(torch.where(a[tail] <= 0, 0, v[tail]))
