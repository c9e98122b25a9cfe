"""The row kernels of the head's second order, in Triton and in PyTorch, against float64."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import gpu_helpers
import pytest
import torch

from torch_nnmath._records import UpstreamGradients
from torch_nnmath.kernels.gpu import rows_second_order
from torch_nnmath.kernels.gpu.records import RowDirection, RowInputs, SecondOrderOutputs

# the interpreter computes in numpy, which warns of infinities and overflow
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LANES, VECTOR = 4, 4  # tiles of 16 classes, so that few classes fill several
TILE = LANES * VECTOR
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
UNWRITTEN = -7.0


TRITON = pytest.param("triton", marks=[pytest.mark.triton, gpu_helpers.needs_triton])
only_triton = pytest.mark.parametrize("module", [TRITON], indirect=True)


@pytest.fixture(params=[TRITON, "pytorch"])
def module(request, monkeypatch) -> ModuleType:
    """Each implementation, with small tiles or chunks of two rows."""
    if request.param == "pytorch":
        monkeypatch.setattr(rows_second_order, "CHUNK_BYTES", 8 * 2 * TILE)
        return rows_second_order
    from torch_nnmath.kernels.gpu import triton_second_order

    assert triton_second_order.VECTOR == VECTOR
    gpu_helpers.round_in_interpreter(monkeypatch)
    tile = triton_second_order.Configuration(LANES, num_warps=1, num_stages=2)
    monkeypatch.setattr(triton_second_order, "choose_tile", lambda *_: tile)
    return triton_second_order


class Case(NamedTuple):
    """Arguments of `process_rows` for all N rows."""

    z: torch.Tensor  # (N, P)
    r: torch.Tensor  # (N, P)
    inputs: RowInputs
    upstream: UpstreamGradients
    direction: RowDirection


class Truth(NamedTuple):
    """Results in float64."""

    outputs: SecondOrderOutputs
    Q: torch.Tensor
    Δ: torch.Tensor


def pad_columns(C):
    return -(-C // 16) * 16


def draw_case(seed, N, C, options=(), size=3.0):
    """Random products, nan in the padding; `options` names what is not None."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    def draw_products(scale):
        products = torch.full((N, pad_columns(C)), math.nan, device=DEVICE)
        products[:, :C] = scale * draw(N, C)
        return products

    def draw_target():
        t = draw(1 if "shared" in options else N, C)
        t[t.abs() < 0.3] = 0
        return t

    def draw_upstream():
        return draw() if "scalar" in options else draw(N, 1)

    z, r = draw_products(size), draw_products(1.0)
    inputs = RowInputs(
        C=C,
        b=draw(C) if "b" in options else None,
        scale=draw_upstream() if "scale" in options else None,
        y=torch.randint(C, (N, 1), generator=generator).to(DEVICE) if "y" in options else None,
        p=draw(N, 1).abs() if "p" in options else None,
        t=draw_target().abs() if "t" in options else None,
        keep=(draw(N, 1) > -0.5) if "keep" in options else None,
        base=2.0 if "base" in options else math.e,
        cap=4.0 if "cap" in options else None,
    )
    upstream = UpstreamGradients(
        draw_upstream(),
        draw_upstream() if "ω" in options else None,
        draw_upstream() if "η" in options else None,
    )
    direction = RowDirection(
        draw(C) if "σ" in options else None,
        draw(N, 1) if "π" in options else None,
        draw_target() if "τ" in options else None,
    )
    return Case(z, r, inputs, upstream, direction)


def zero_safe(t, v):
    return torch.where(t == 0, 0.0, t * v)


def compute_truth(case):
    """Results, the size of each (the sum of the sizes of its terms), and the error of a term."""
    C, b, scale, y, p, t, keep, base, cap = case.inputs
    z, R = (matrix[:, :C].double() for matrix in (case.z, case.r))
    if keep is not None:
        z, R = (torch.where(keep, matrix, 0.0) for matrix in (z, R))
    N, ln = len(z), math.log(base)
    σ, π, τ = (None if d is None else d.double() for d in case.direction)
    γ, ω, η = (0.0 if u is None else u.double() for u in case.upstream)
    γβ, ηβ = γ / ln, η / ln
    z = z if scale is None else z * scale.double()
    z = z if b is None else z + b.double()
    R_size = R.abs() if σ is None else R.abs() + σ.abs()
    R = R if σ is None else R + σ
    v, slope, curvature = z, torch.ones_like(z), 0.0
    if cap is not None:
        v = cap * torch.tanh(z / cap)
        slope = 1 / torch.cosh(z / cap) ** 2
        curvature = 2 / cap**2 * v
    r, r_size = slope * R, slope * R_size
    at_class = torch.zeros_like(z)
    if y is not None:
        at_class.scatter_(1, y, 1.0)

    def complete(p, t):
        """p e_y + t of each row, and T = p + Σ t, also without a class."""
        p = torch.zeros_like(z[:, :1]) if p is None else p.double()
        t = torch.zeros_like(z) if t is None else t.double().expand(N, C)
        return p * at_class + t, p + t.sum(1, keepdim=True)

    (target, T), (dtarget, dT) = complete(p, t), complete(π, τ)
    m = v.amax(1, keepdim=True)
    lse = m + (v - m).exp().sum(1, keepdim=True).log()
    l = v - lse
    a = l.exp()
    al = zero_safe(a, l).sum(1, keepdim=True)
    ar = zero_safe(a, r).sum(1, keepdim=True)
    centred = torch.where(a == 0, 0.0, l - al)
    B = γβ * T + 2 * ω * lse - ηβ * centred
    dh = -(a * centred * r).sum(1, keepdim=True) / ln
    dc = T * ar - zero_safe(target, r).sum(1, keepdim=True)
    terms = zero_safe(dtarget, -l)
    dc = dc + terms.sum(1, keepdim=True)
    if y is None and π is not None:  # a weight without a class multiplies lse
        dc = dc + π * lse
    G = a * B - γβ * target
    D = γβ * dT + 2 * ω * ar - η * dh
    dG = a * ((r - ar) * (B - ηβ) + D) - γβ * dtarget
    r_y = 0.0 if y is None else r.gather(1, y)
    truth = Truth(
        SecondOrderOutputs(dc / ln, 2 * lse * ar, dh, γβ * (ar - r_y)),
        slope * dG - curvature * G * r,
        slope * G,
    )

    # sizes of the terms
    ar_size = (a * r_size).sum(1, keepdim=True)
    l_size = torch.where(a == 0, 0.0, l.abs()) + al.abs() + 1
    dh_size = (a * l_size * (r_size + ar_size)).sum(1, keepdim=True) / ln
    T_size, dT_size = (part.abs().sum(1, keepdim=True) for part in (target, dtarget))
    T_size, dT_size = T_size + T.abs(), dT_size + dT.abs()
    B_size = abs(γβ) * T_size + abs(2 * ω * lse) + abs(ηβ) * l_size
    D_size = abs(γβ) * dT_size + abs(2 * ω) * ar_size + abs(η) * dh_size
    G_size = a * B_size + abs(γβ) * target.abs()
    dG_size = a * ((r_size + ar_size) * (B_size + abs(ηβ)) + D_size) + abs(γβ) * dtarget.abs()
    lse_size = lse.abs() + m.abs() + 1
    dc_size = T_size * ar_size + zero_safe(target.abs(), r_size).sum(1, keepdim=True)
    dc_size = dc_size + terms.abs().sum(1, keepdim=True) + dT_size * lse_size
    r_y_size = 0.0 if y is None else r_size.gather(1, y)
    sizes = Truth(
        SecondOrderOutputs(
            dc_size / ln, 2 * lse_size * ar_size, dh_size, abs(γβ) * (ar_size + r_y_size)
        ),
        slope * dG_size + abs(curvature) * G_size * r_size,
        slope * G_size,
    )
    if keep is not None:
        outputs, Q, Δ = truth
        outputs = SecondOrderOutputs(*(torch.where(keep, value, 0.0) for value in outputs))
        truth = Truth(outputs, torch.where(keep, Q, 0.0), torch.where(keep, Δ, 0.0))
    # a logit has a few roundings, relative to z; e^{v-m} has the error of its argument; the sums of
    # a row add theirs, and a quotient of two sums has both
    largest = torch.where(z.isfinite(), z, 0.0).abs().amax().item()
    return truth, sizes, (32 + 8 * largest) * EPS[torch.float32]


def allocate_outputs(N):
    return SecondOrderOutputs(*(torch.full((N, 1), UNWRITTEN, device=DEVICE) for _ in range(4)))


def run(module, case, dtype=torch.float32, rows=None, outputs=None, needs_deltas=True):
    """Outputs, Q and Δ of some rows of a case, whose z and r may be overwritten."""
    rows = slice(0, len(case.z)) if rows is None else rows
    z, r = case.z[rows].clone(), case.r[rows].clone()
    outputs = allocate_outputs(len(case.z)) if outputs is None else outputs
    deltas = None
    if needs_deltas:
        deltas = tuple(torch.full_like(z, UNWRITTEN, dtype=dtype) for _ in range(2))
    module.process_rows(z, r, deltas, rows, case.inputs, case.upstream, case.direction, outputs)
    return outputs, *((None, None) if deltas is None else deltas)


def check(module, case, dtype=torch.float32):
    truth, sizes, error = compute_truth(case)
    outputs, Q, Δ = run(module, case, dtype)
    for name in SecondOrderOutputs._fields:
        if name == "ρ_h" and case.upstream.η is None:
            continue
        result, expected = getattr(outputs, name), getattr(truth.outputs, name)
        difference = (result - expected).abs()
        tolerance = error * getattr(sizes.outputs, name) + 2.0**-125
        assert ((difference <= tolerance) | (result == expected)).all(), (name, result, expected)
    C = case.inputs.C
    # below the normal numbers, rounding is absolute
    tiny = 2.0**-25 if dtype == torch.float16 else 2.0**-125
    for name, result in (("Q", Q), ("Δ", Δ)):
        expected = getattr(truth, name)
        tolerance = 1.01 * EPS[dtype] * expected.abs() + error * getattr(sizes, name) + tiny
        is_close = (result[:, :C] - expected).abs() <= tolerance
        assert is_close.all(), (name, result[:, :C], expected)
        assert ((result[:, C:] == 0) | (result[:, C:] == UNWRITTEN)).all()


ALL = ["b", "scale", "y", "p", "t", "keep", "base", "cap", "ω", "η", "σ", "π", "τ"]


@pytest.mark.parametrize("options", [ALL, [n for n in ALL if n != "cap"], ["p", "t", "π", "η"]])
def test_truth_equals_derivatives_of_the_losses(options):
    """Derivatives along the direction by autograd, in float64."""
    case = draw_case(20, 3, 7, [name for name in options if name != "keep"])
    C, b, scale, y, p, t, _, base, cap = case.inputs
    z, R = case.z[:, :C].double(), case.r[:, :C].double()
    z = z if scale is None else z * scale.double()
    z = z if b is None else z + b.double()
    R = R if case.direction.σ is None else R + case.direction.σ.double()
    zeros = torch.zeros_like(z[:, :1]), torch.zeros_like(z)
    p, t = (o if v is None else v.double() for o, v in zip(zeros, (p, t), strict=True))
    _, π, τ = case.direction
    π, τ = (o if v is None else v.double() for o, v in zip(zeros, (π, τ), strict=True))

    def compute_losses(z, p, t):
        v = z if cap is None else cap * torch.tanh(z / cap)
        lse, l = v.logsumexp(1, keepdim=True), v.log_softmax(1)
        c = p * (lse if y is None else -l.gather(1, y)) - (t * l).sum(1, keepdim=True)
        h = -(l.exp() * l).sum(1, keepdim=True)
        return c / math.log(base), lse**2, h / math.log(base)

    def compute_gradients(z, p, t):
        upstream = (0.0 if u is None else u.double() for u in case.upstream)

        def add_losses(z, p):
            losses = compute_losses(z, p, t)
            return sum((u * f).sum() for u, f in zip(upstream, losses, strict=True))

        return torch.func.grad(add_losses, (0, 1))(z, p)

    point, direction = (z, p, t), (R, π, τ)
    _, derivatives = torch.func.jvp(compute_losses, point, direction)
    (Δ, _), (Q, dp) = torch.func.jvp(compute_gradients, point, direction)
    truth, _, _ = compute_truth(case)
    for result, expected in zip(truth.outputs, (*derivatives, dp), strict=True):
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(truth.Q, Q)
    torch.testing.assert_close(truth.Δ, Δ)


@pytest.mark.parametrize("C", [1, 3, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 5])
def test_class_counts(module, C):
    check(module, draw_case(C, 3, C, ("y", "p")))
    check(module, draw_case(C, 2, C, ALL))


@pytest.mark.parametrize(
    "options",
    [
        "",
        "y",
        "p",
        "p π",
        "y p π",
        "y π",
        "y p b σ",
        "y p scale scalar",
        "y p cap",
        "y p ω base",
        "y p η",
        "t",
        "τ",
        "τ shared η",
        "t τ shared p",
        "t shared y p cap σ",
        "t cap ω η scalar scale",
        "y p π t τ",
        "y p keep",
    ],
)
def test_options(module, options):
    check(module, draw_case(1, 3, 2 * TILE + 3, options.split()))


@pytest.mark.parametrize("seed", range(6))
def test_random_options(module, seed):
    generator = torch.Generator().manual_seed(seed)
    names = [*ALL, "scalar", "shared"]
    chosen = torch.rand(len(names), generator=generator) < 0.5
    C = int(torch.randint(1, 3 * TILE, (), generator=generator))
    options = [name for name, is_chosen in zip(names, chosen.tolist(), strict=True) if is_chosen]
    check(module, draw_case(seed, 3, C, options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [("y", "p"), ALL])
def test_half_deltas(module, dtype, options):
    check(module, draw_case(2, 3, 2 * TILE + 2, options), dtype)


def test_omitted_outputs(module):
    """What is not needed changes nothing else."""
    case = draw_case(4, 3, TILE + 3, ALL)
    expected, Q, Δ = run(module, case)
    for name in SecondOrderOutputs._fields:
        outputs = allocate_outputs(3)._replace(**{name: None})
        _, *deltas = run(module, case, outputs=outputs)
        assert all(map(torch.equal, deltas, (Q, Δ)))
        pairs = zip(outputs, expected, strict=True)
        assert all(torch.equal(result, value) for result, value in pairs if result is not None)
    outputs, _, _ = run(module, case, needs_deltas=False)
    assert all(map(torch.equal, outputs, expected))


def test_some_rows(module):
    """The operands of all rows are indexed by row; z, r, Q and Δ start with the first of some."""
    case = draw_case(6, 6, TILE + 3, ALL)
    expected, Q, Δ = run(module, case)
    outputs = allocate_outputs(6)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        _, some_Q, some_Δ = run(module, case, rows=rows, outputs=outputs)
        C = case.inputs.C
        torch.testing.assert_close(some_Q[:, :C], Q[rows, :C])
        torch.testing.assert_close(some_Δ[:, :C], Δ[rows, :C])
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("options", [("y", "p"), ALL])
def test_ignored_nan(module, options):
    """Rows that are ignored give 0, whatever they and their coefficients hold."""
    case = draw_case(7, 4, 2 * TILE + 3, (*options, "keep"))
    keep = torch.tensor([[True], [False], [True], [False]], device=DEVICE)
    case.inputs.keep.copy_(keep)
    case.z[1], case.z[3, 2], case.r[1, 1], case.r[3] = math.nan, math.inf, math.inf, math.nan
    check(module, case)
    outputs, Q, Δ = run(module, case)
    for result in (*outputs, Q[:, : case.inputs.C], Δ[:, : case.inputs.C]):
        assert (result[[1, 3]] == 0).all()


INFINITE = [("y", "p"), ("y", "p", "t", "ω", "η", "π", "τ"), ("y", "p", "b", "cap", "η", "σ")]


@pytest.mark.parametrize("options", INFINITE)
def test_infinite_logits(module, options):
    """Logits of -inf: a = 0, and a target of 0 there adds 0."""
    case = draw_case(8, 3, 3 * TILE + 2, options)
    C = case.inputs.C
    case.z[0, :TILE] = -math.inf  # a whole tile
    case.z[1, 1:C:2] = -math.inf
    case.z[2, 1:C] = -math.inf  # one class is left
    for t in (case.inputs.t, case.direction.τ):
        if t is not None:
            t[case.z[:, :C] == -math.inf] = 0
    case.inputs.y.copy_(torch.tensor([[TILE], [2], [0]]))
    check(module, case)


def test_infinite_logits_with_one_direction_for_all_classes(module):
    """r - a·r is 0 where B is infinite."""
    case = draw_case(9, 2, TILE + 2, ("y", "p", "η", "ω"))
    case.r.fill_(0.5)
    case.z[:, 3] = -math.inf
    case.inputs.y.fill_(1)
    check(module, case)


def test_class_weight_of_0_at_infinite_logit(module):
    case = draw_case(9, 1, TILE + 2, ("y", "p", "π"))
    case.inputs.p.fill_(0)
    case.direction.π.fill_(0)
    case.z[0, 3] = -math.inf
    case.inputs.y.fill_(3)
    check(module, case)


@only_triton
def test_certain_class(module):
    """Where p_y is nearly 1, the class's entry of Δ and of Q is right to a few digits."""
    case = draw_case(12, 1, TILE + 4, ("y", "p", "π"), size=0.5)
    case.z[0, 3] = 14.0
    case.inputs.y.fill_(3)
    truth, _, _ = compute_truth(case)
    _, Q, Δ = run(module, case)
    # s = 1 + δ is rounded to 2^-24, and δ is about 2e-5
    torch.testing.assert_close(Δ[0, 3].double(), truth.Δ[0, 3], rtol=1e-2, atol=0)
    torch.testing.assert_close(Q[0, 3].double(), truth.Q[0, 3], rtol=1e-2, atol=0)


def test_results_repeat_bit_for_bit(module):
    case = draw_case(15, 5, 2 * TILE + 3, ALL)
    (first, *first_deltas), (second, *second_deltas) = run(module, case), run(module, case)
    assert all(map(torch.equal, first, second))
    for one, other in zip(first_deltas, second_deltas, strict=True):
        assert torch.equal(one, other)


def test_nan_logits(module):
    case = draw_case(10, 2, TILE + 2, ("y", "p", "η"))
    case.z[0, 5] = math.nan
    outputs, Q, Δ = run(module, case)
    for result in (*outputs, Q[:, : case.inputs.C], Δ[:, : case.inputs.C]):
        assert result[0].isnan().all()
        assert not result[1].isnan().any()


@pytest.mark.parametrize("place", [0, 2 * TILE])
def test_distant_logits(module, place):
    """One logit is 200 above the others, as the first or in the last tile."""
    for options in (("y", "p"), ("y", "p", "t", "ω", "η", "π", "τ")):
        case = draw_case(11, 2, 2 * TILE + 2, options)
        case.z[:, place] += 200
        case.inputs.y.copy_(torch.tensor([[place], [5]]))
        check(module, case)


def test_columns_without_padding(module):
    """z, r, Q and Δ may be views with C columns of wider buffers; z and r are nan beyond."""
    case = draw_case(14, 2, TILE + 3, ("y", "p"))
    C = case.inputs.C
    z, r = case.z.clone(), case.r.clone()
    Q, Δ = torch.full_like(z, UNWRITTEN), torch.full_like(z, UNWRITTEN)
    _, expected_Q, expected_Δ = run(module, case)
    module.process_rows(
        z[:, :C],
        r[:, :C],
        (Q[:, :C], Δ[:, :C]),
        slice(0, 2),
        case.inputs,
        case.upstream,
        case.direction,
        allocate_outputs(2),
    )
    for result, expected in ((Q, expected_Q), (Δ, expected_Δ)):
        assert torch.equal(result[:, :C], expected[:, :C])
        assert (result[:, C:] == UNWRITTEN).all()
