"""The head's row kernel against float64, in Triton's interpreter."""

from __future__ import annotations

import math

import gpu_helpers
import pytest
import torch
from row_cases import DEVICE, EPS, allocate_outputs, compute_truth, draw_case

from torch_nnmath.kernels.gpu.records import RowOutputs

pytestmark = [
    pytest.mark.triton,
    gpu_helpers.needs_triton,
    # the interpreter computes in numpy, which warns of infinities and overflow
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
triton_head = pytest.importorskip("torch_nnmath.kernels.gpu.triton_head")

LANES = 4  # tiles of 16 classes, so that few classes fill several
TILE = LANES * triton_head.VECTOR
NO_OUTPUTS = RowOutputs(*[None] * 7)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    gpu_helpers.round_in_interpreter(monkeypatch)
    configuration = triton_head.Configuration(LANES, num_warps=1, num_stages=2)
    monkeypatch.setattr(triton_head, "choose_configuration", lambda *_: configuration)


def check(case, dtype=torch.float32, omitted=()):
    """Compares results and Δ, and Δ once more with the sums given.

    A logit has the relative error of some roundings, and e^{v-m} that of its argument: |v| ε.
    """
    N, C = case.z.shape[0], case.inputs.C
    results, delta, loss_size, size = compute_truth(case)
    outputs = allocate_outputs(N)._replace(**dict.fromkeys(omitted))
    if "entropy" in omitted and case.upstream.η is None:  # then the third sum is not computed
        results.sums[:, 2] = 0
    G = torch.full((N, case.z.shape[1]), -7.0, dtype=dtype, device=DEVICE)
    before = case.z.clone()
    rows = slice(0, N)
    triton_head.process_rows(case.z, G, rows, case.inputs, case.upstream, None, outputs)
    torch.testing.assert_close(case.z, before, rtol=0, atol=0, equal_nan=True)
    # a dozen roundings, those of the logit and of the argument of exp among them
    largest = results.sums[:, 0].abs().nan_to_num(0, 0, 0).amax().item()
    logit_error = (32 + 8 * largest) * EPS[torch.float32]
    for name in set(RowOutputs._fields) - {"predicted", *omitted}:
        truth, result = getattr(results, name), getattr(outputs, name)
        tolerance = logit_error * (1 + truth.abs())
        if name == "loss":
            tolerance = tolerance + logit_error * loss_size
        is_close = (result - truth).abs() <= tolerance
        assert (is_close | (result == truth)).all(), (name, result, truth)
    if "predicted" not in omitted:
        torch.testing.assert_close(outputs.predicted, results.predicted)
    tolerance = EPS[dtype] * delta.abs() * 1.01 + logit_error * size
    # below the normal numbers, rounding is absolute
    tolerance = tolerance + (2.0**-25 if dtype == torch.float16 else 2.0**-125)
    for given in (False, True):
        if given:
            G.fill_(-7)
            given_sums = results.sums.float()
            dc_dp = allocate_outputs(N).dc_dp
            triton_head.process_rows(
                case.z,
                G,
                rows,
                case.inputs,
                case.upstream,
                given_sums,
                NO_OUTPUTS._replace(dc_dp=dc_dp),
            )
            limit = logit_error * (1 + results.dc_dp.abs())
            difference = (dc_dp - results.dc_dp).abs()
            assert ((difference <= limit) | (dc_dp == results.dc_dp)).all()
        assert ((G[:, :C] - delta).abs() <= tolerance).all(), (given, G[:, :C], delta)
        assert ((G[:, C:] == 0) | (G[:, C:] == -7)).all()


ALL = ["b", "scale", "y", "p", "t", "keep", "base", "cap", "ω", "η"]


@pytest.mark.parametrize("C", [1, 3, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 5])
def test_class_counts(C):
    check(draw_case(C, 3, C, ("y", "p")))
    check(draw_case(C, 2, C, ALL))


@pytest.mark.parametrize(
    "options",
    [
        "y",
        "p",
        "y p b",
        "y p scale scalar",
        "y p cap",
        "y p ω base",
        "y p η",
        "t",
        "t shared p",
        "t shared y p cap",
        "t cap ω η scalar scale",
        "y p keep",
    ],
)
def test_options(options):
    check(draw_case(1, 3, 2 * TILE + 3, options.split()))


@pytest.mark.parametrize("seed", range(6))
def test_random_options(seed):
    generator = torch.Generator().manual_seed(seed)
    names = [*ALL, "scalar", "shared"]
    chosen = torch.rand(len(names), generator=generator) < 0.5
    C = int(torch.randint(1, 3 * TILE, (), generator=generator))
    options = [name for name, is_chosen in zip(names, chosen.tolist(), strict=True) if is_chosen]
    check(draw_case(seed, 3, C, options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [("y", "p"), ALL])
def test_half_delta(dtype, options):
    check(draw_case(2, 3, 2 * TILE + 2, options), dtype)


def test_omitted_results():
    for name in RowOutputs._fields:
        check(draw_case(4, 2, TILE + 3, ("y", "p")), omitted=(name,))


def test_without_delta():
    case = draw_case(5, 3, TILE + 3, ("y", "p"))
    outputs, with_delta = allocate_outputs(3), allocate_outputs(3)
    triton_head.process_rows(case.z, None, slice(0, 3), case.inputs, None, None, outputs)
    G = torch.empty_like(case.z)
    triton_head.process_rows(case.z, G, slice(0, 3), case.inputs, case.upstream, None, with_delta)
    for result, expected in zip(outputs, with_delta, strict=True):
        assert torch.equal(result, expected)


def test_some_rows():
    """The operands of all rows are indexed by row; z and G start with the first of some rows."""
    case = draw_case(6, 6, TILE + 3, ALL)
    results, expected = allocate_outputs(6), allocate_outputs(6)
    wide, G = torch.zeros_like(case.z), torch.zeros_like(case.z)
    triton_head.process_rows(case.z, wide, slice(0, 6), case.inputs, case.upstream, None, expected)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        triton_head.process_rows(
            case.z[rows], G[rows], rows, case.inputs, case.upstream, None, results
        )
    assert torch.equal(G, wide)
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("options", [("y", "p"), ALL])
def test_ignored_nan(options):
    case = draw_case(7, 4, TILE + 3, (*options, "keep"))
    keep = torch.tensor([[True], [False], [True], [False]], device=DEVICE)
    case.z[1], case.z[3, 2] = math.nan, math.inf
    y = case.inputs.y.clone()
    y[1] = -100
    check_case = case._replace(inputs=case.inputs._replace(keep=keep, y=case.inputs.y))
    check(check_case)
    outputs, G = allocate_outputs(4), torch.full_like(case.z, math.nan)
    inputs = case.inputs._replace(keep=keep, y=y)
    triton_head.process_rows(case.z, G, slice(0, 4), inputs, case.upstream, None, outputs)
    assert (G[[1, 3], : inputs.C] == 0).all()
    assert outputs.predicted[1] == -1
    assert outputs.loss[1] == 0


def test_infinite_logits():
    """Logits of -inf: a = 0, and a target of 0 there adds 0."""
    case = draw_case(8, 3, 3 * TILE + 2, ("y", "p", "t", "ω", "η"))
    case.z[0, :TILE] = -math.inf  # a whole tile
    case.z[1, 1::2] = -math.inf
    case.z[2, 1 : case.inputs.C] = -math.inf  # one class is left
    case.inputs.t[case.z[:, : case.inputs.C] == -math.inf] = 0
    case.inputs.y.copy_(torch.tensor([[TILE], [2], [0]]))
    check(case)


def test_target_at_infinite_logit():
    case = draw_case(9, 1, TILE + 2, ("y", "p"))
    case.z[0, 3] = -math.inf
    case.inputs.y.fill_(3)
    check(case)


def test_nan_logits():
    case = draw_case(10, 2, TILE + 2, ("y", "p"))
    case.z[0, 5] = math.nan
    outputs, G = allocate_outputs(2), torch.zeros_like(case.z)
    triton_head.process_rows(case.z, G, slice(0, 2), case.inputs, case.upstream, None, outputs)
    assert outputs.loss[0].isnan()
    assert outputs.lse[0].isnan()
    assert G[0, : case.inputs.C].isnan().all()
    assert not outputs.loss[1].isnan()


@pytest.mark.parametrize("place", [0, 2 * TILE])
def test_distant_logits(place):
    """One logit is 200 above the others, as the first or in the last tile."""
    for options in (("y", "p"), ("y", "p", "t", "ω", "η")):
        case = draw_case(11, 2, 2 * TILE + 2, options)
        case.z[:, place] += 200
        case.inputs.y.copy_(torch.tensor([[place], [5]]))
        check(case)


def test_certain_class():
    """Where p_y is nearly 1, the entry of the class is -Σ of the others, to a few digits."""
    case = draw_case(12, 1, TILE + 4, ("y", "p"), size=0.5)
    case.z[0, 3] = 14.0
    case.inputs.y.fill_(3)
    _, delta, *_ = compute_truth(case)
    G = torch.zeros_like(case.z)
    triton_head.process_rows(
        case.z, G, slice(0, 1), case.inputs, case.upstream, None, allocate_outputs(1)
    )
    # s = 1 + δ is rounded to 2^-24, and δ is about 2e-5
    torch.testing.assert_close(G[0, 3].double(), delta[0, 3], rtol=1e-2, atol=0)


def test_first_of_equal_logits():
    case = draw_case(13, 3, 3 * TILE, ("y", "p"))
    case.z[0, [7, 20, 41]] = 50.0
    case.z[1, [TILE + 1, TILE + 2, 2 * TILE]] = 50.0
    case.z[2] = 0.0
    outputs = allocate_outputs(3)
    triton_head.process_rows(case.z, None, slice(0, 3), case.inputs, None, None, outputs)
    assert outputs.predicted.flatten().tolist() == [7, TILE + 1, 0]


def test_columns_without_padding():
    """z and G may be views with C columns of a wider buffer."""
    case = draw_case(14, 2, TILE + 3, ("y", "p"))
    G = torch.full_like(case.z, -7)
    C = case.inputs.C
    triton_head.process_rows(
        case.z[:, :C], G[:, :C], slice(0, 2), case.inputs, case.upstream, None, NO_OUTPUTS
    )
    _, delta, *_ = compute_truth(case)
    torch.testing.assert_close(G[:, :C].double(), delta, rtol=1e-5, atol=1e-6)
    assert (G[:, C:] == -7).all()
