"""The head's row kernel with one read against float64, in Triton's interpreter."""

from __future__ import annotations

import math

import gpu_helpers
import pytest
import torch
from row_cases import DEVICE, EPS, allocate_outputs, compute_truth, draw_case

from torch_nnmath._records import UpstreamGradients
from torch_nnmath.kernels.gpu.records import RowFactors

pytestmark = [
    pytest.mark.triton,
    gpu_helpers.needs_triton,
    # the interpreter computes in numpy, which warns of infinities and overflow
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
triton_head_single = pytest.importorskip("torch_nnmath.kernels.gpu.triton_head_single")
triton_logits = pytest.importorskip("torch_nnmath.kernels.gpu.triton_logits")

LANES = 4  # tiles of 16 classes, so that few classes fill several
TILE = LANES * triton_logits.VECTOR
MAX_DISTANCE = triton_head_single.MAX_DISTANCE.value
NAMES = "loss", "lse", "squared_lse", "sums", "dc_dp"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    gpu_helpers.round_in_interpreter(monkeypatch)
    configuration = triton_head_single.Configuration(LANES, num_warps=1, num_stages=2)
    monkeypatch.setattr(triton_head_single, "choose_configuration", lambda _: configuration)


def run(case, dtype=torch.bfloat16, rows=None, results=None):
    """E, the results and the factors, of all rows or written into `results`."""
    N, has_class = len(case.z), case.inputs.y is not None and case.inputs.p is not None
    rows = slice(0, N) if rows is None else rows
    if results is None:
        E = torch.full(case.z.shape, -7.0, dtype=dtype, device=DEVICE)
        factors = torch.full((3, N, 1), -7.0, device=DEVICE)
        factors = RowFactors(*factors[:2], factors[2] if has_class else None)
        results = E, allocate_outputs(N)._replace(entropy=None), factors
    E, outputs, factors = results
    triton_head_single.process_rows(
        case.z[rows], E[rows], rows, case.inputs, case.upstream, outputs, factors
    )
    return results


def check(case, dtype=torch.bfloat16):
    """Compares the results, and Δ from E and each of the two factors.

    A logit has the relative error of some roundings, and e^{v-r} that of its argument: |v - r| ε,
    which is at most `MAX_DISTANCE` ε beyond that of v - m.
    """
    C = case.inputs.C
    results, delta, loss_size, size = compute_truth(case)
    results.sums[:, 2] = 0  # without an entropy it is not computed
    before = case.z.clone()
    E, outputs, factors = run(case, dtype)
    torch.testing.assert_close(case.z, before, rtol=0, atol=0, equal_nan=True)
    largest = results.sums[:, 0].abs().nan_to_num(0, 0, 0).amax().item()
    logit_error = (32 + 8 * largest + 2 * MAX_DISTANCE) * EPS[torch.float32]
    for name in NAMES:
        truth, result = getattr(results, name), getattr(outputs, name)
        tolerance = logit_error * (1 + truth.abs())
        if name == "loss":
            tolerance = tolerance + logit_error * loss_size
        assert (((result - truth).abs() <= tolerance) | (result == truth)).all(), name
    torch.testing.assert_close(outputs.predicted, results.predicted)

    softmax, exact, class_error = factors
    assert ((E[:, C:] == 0) | (E[:, C:] == -7)).all()
    E = E[:, :C].double()
    # the factors and E have the range of float32; below its normal numbers, rounding is absolute
    exact_size = logit_error * size + 2.0**-125
    of_exact, of_softmax = E * exact, E * softmax
    at_class = torch.zeros_like(delta, dtype=torch.bool)
    if class_error is not None:
        at_class.scatter_(1, case.inputs.y, True)
        of_softmax += torch.zeros_like(E).scatter_(1, case.inputs.y, class_error.double())
    rounding = EPS[dtype] * delta.abs()
    for result, roundings in ((of_exact, 2.02), (of_softmax, 1.01)):
        tolerance = exact_size + torch.where(at_class, 0.0, roundings * rounding)
        assert ((result - delta).abs() <= tolerance).all(), (roundings, result, delta)


ALL = ["b", "scale", "y", "p", "keep", "base", "cap", "ω"]


@pytest.mark.parametrize("C", [1, 3, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 5])
def test_class_counts(C):
    check(draw_case(C, 3, C, ("y", "p")))
    check(draw_case(C, 1, C, ALL))


@pytest.mark.parametrize(
    "options",
    [
        "y",
        "p",
        "ω",
        "y p b",
        "y p scale scalar",
        "y p cap",
        "y p ω base",
        "y ω scalar",
        "y p keep",
    ],
)
def test_options(options):
    check(draw_case(1, 3, 2 * TILE + 3, options.split()))


@pytest.mark.parametrize("options", [("y", "p"), ALL])
def test_float32_entries(options):
    """E that is not rounded to half shows errors that its rounding hides."""
    check(draw_case(2, 3, 2 * TILE + 2, options), torch.float32)


@pytest.mark.parametrize("seed", range(8))
def test_random_options(seed):
    generator = torch.Generator().manual_seed(seed)
    names = [*ALL, "scalar"]
    chosen = torch.rand(len(names), generator=generator) < 0.6
    C = int(torch.randint(1, 3 * TILE, (), generator=generator))
    options = [name for name, is_chosen in zip(names, chosen.tolist(), strict=True) if is_chosen]
    check(draw_case(seed, 3, C, options))


def test_some_rows():
    """The operands of all rows are indexed by row; z and E start with the first of some rows."""
    case = draw_case(6, 6, TILE + 3, ALL)
    expected, results = run(case), run(case)
    for tensor in (results[0], *results[1][:3], *results[2]):
        tensor.fill_(-7)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        run(case, rows=rows, results=results)
    assert torch.equal(results[0][:, : case.inputs.C], expected[0][:, : case.inputs.C])
    for part in (1, 2):
        for result, value in zip(results[part], expected[part], strict=True):
            assert result is value is None or torch.equal(result, value)


@pytest.mark.parametrize("options", [("y", "p"), ALL])
def test_ignored_nan(options):
    case = draw_case(7, 4, 2 * TILE + 3, (*options, "keep"))
    keep = torch.tensor([[True], [False], [True], [False]], device=DEVICE)
    case.z[1], case.z[3, 2] = math.nan, math.inf
    case = case._replace(inputs=case.inputs._replace(keep=keep))
    check(case)
    E, _, factors = run(case)
    ignored = ~keep.squeeze(1)
    assert not E[ignored, : case.inputs.C].count_nonzero()
    assert not torch.stack(factors)[:, ignored].count_nonzero()


def test_infinite_logits():
    """Logits of -inf: a = 0. A whole first tile of them gives no reference."""
    case = draw_case(8, 3, 3 * TILE + 2, ("y", "p", "ω"))
    case.z[0, :TILE] = -math.inf
    case.z[1, 1::2] = -math.inf
    case.z[2, 1 : case.inputs.C] = -math.inf  # one class is left
    case.inputs.y.copy_(torch.tensor([[TILE], [2], [0]]))
    check(case)


def test_target_at_infinite_logit():
    for place in (3, TILE + 1):
        case = draw_case(9, 1, TILE + 2, ("y", "p"))
        case.z[0, place] = -math.inf
        case.inputs.y.fill_(place)
        check(case)


@pytest.mark.parametrize("place", [0, TILE, 2 * TILE + 1])
@pytest.mark.parametrize("distance", [0.9 * MAX_DISTANCE, 1.1 * MAX_DISTANCE, 200.0])
def test_distant_logits(place, distance):
    """One logit is far above the others: in the first tile, or in another one, after which the row
    is read again if the distance is large."""
    for options in (("y", "p"), ("y", "p", "ω", "b", "base")):
        case = draw_case(11, 2, 2 * TILE + 2, options, size=0.5)
        case.z[:, place] += distance
        case.inputs.y.copy_(torch.tensor([[place], [5]]))
        check(case)
        E, *_ = run(case)
        largest = math.log(E[1, place])
        if place < TILE or distance > MAX_DISTANCE + 2:
            assert abs(largest) < 0.01
        else:
            assert abs(largest - distance) < 4


def test_nan_logits():
    for place in (5, TILE + 1):
        case = draw_case(10, 2, TILE + 2, ("y", "p"))
        case.z[0, place] = math.nan
        E, outputs, factors = run(case)
        assert outputs.loss[0].isnan()
        assert outputs.lse[0].isnan()
        assert (E * factors.softmax)[0, : case.inputs.C].isnan().all()
        assert not outputs.loss[1].isnan()


@pytest.mark.parametrize("change", [0.0, 2.0**-23, -(2.0**-23)])
@pytest.mark.parametrize("distance", [200.0, 35.0])
def test_no_softmax_weight(change, distance):
    """γβ T + 2 ω lse is 0 or as good as 0, but the class's entry is not."""
    case = draw_case(14, 1, TILE + 3, ("y", "p"))
    case.z[:] = -distance
    case.z[0, TILE + 1] = 1.0  # then lse is 1
    case.inputs.y.fill_(2)
    case.inputs.p.fill_(1.0)
    γ, ω = torch.ones(1, 1, device=DEVICE), torch.full((1, 1), -0.5 - change, device=DEVICE)
    case = case._replace(upstream=UpstreamGradients(γ, ω, None))
    check(case)
    E, _, factors = run(case)
    assert E[0, : case.inputs.C].isfinite().all()
    assert E[0, 2].item() * factors.exact.item() == pytest.approx(-1, rel=2.0**-21)


@pytest.mark.parametrize("γ", [0.0, 1e-30])
def test_small_upstream(γ):
    case = draw_case(15, 2, TILE + 3, ("y", "p"))
    case.upstream.γ.fill_(γ)
    check(case)


def test_certain_class():
    """Where p_y is nearly 1, the entry of the class is -Σ of the others, to a few digits."""
    case = draw_case(12, 1, TILE + 4, ("y", "p"), size=0.5)
    case.z[0, 3] = 14.0
    case.inputs.y.fill_(3)
    _, delta, *_ = compute_truth(case)
    E, _, factors = run(case)
    # s = 1 + δ is rounded to 2^-24, and δ is about 2e-5
    torch.testing.assert_close((E * factors.exact)[0, 3].double(), delta[0, 3], rtol=1e-2, atol=0)


def test_saturated_class():
    """A cap with a slope below the normal numbers: the class's entry gives no factor."""
    case = draw_case(16, 1, TILE + 3, ("y", "p", "cap"))
    case.z[0, 4] = 186.0  # the slope is 4 e^{-93}
    case.inputs.y.fill_(4)
    check(case)


def test_first_of_equal_logits():
    case = draw_case(13, 3, 3 * TILE, ("y", "p"))
    case.z[0, [7, 20, 41]] = 50.0
    case.z[1, [TILE + 1, TILE + 2, 2 * TILE]] = 90.0
    case.z[2] = 0.0
    _, outputs, _ = run(case)
    assert outputs.predicted.flatten().tolist() == [7, TILE + 1, 0]


def test_columns_without_padding():
    """z and E may be views with C columns of a wider buffer."""
    case = draw_case(14, 2, TILE + 3, ("y", "p"))
    C = case.inputs.C
    E, outputs, factors = run(case)
    wide = torch.full_like(E, -7)
    view = case._replace(z=case.z[:, :C])
    run(view, results=(wide[:, :C], outputs, factors))
    assert torch.equal(wide[:, :C], E[:, :C])
    assert (wide[:, C:] == -7).all()
