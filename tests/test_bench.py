"""The benchmark: what it compares is comparable, and what it computes from timings is right."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torch_nnmath import bench
from torch_nnmath.__main__ import main
from torch_nnmath.bench import draw, measure, works
from torch_nnmath.bench.works import WORKS, Contender, Problem, Target

HEAD, MEMORY = (1024, 512, 32000), (4096, 256, 32000)
TARGETS = {
    "head": [
        ("time", "ours", "floor", 1.10, None),
        ("time", "ours", "eager", 0.85, None),
        ("time", "ours", "chunked", 0.5, None),
        ("time", "ours", "compile", 1.0, None),
        ("time", "ours compiled", "compile", 1.05, None),
    ],
    "head-bfloat16": [
        ("time", "ours", "eager", 0.95, None),
        ("error", "ours", "eager", 1.0, None),
    ],
    "head-ignored": [("time", "ours", "none ignored", 0.6, None)],
    **{
        name: [("time", "ours", "plain", 1.1, None), ("memory", "ours", "plain", 1.1, None)]
        for name in ("head-capped", "head-policy")
    },
    "head-forward": [("time", "ours", "floor", 1.15, None)],
    "head-second": [("time", "ours", "eager", 1.0, None)],
    "head-memory": [("peak", "ours", "", 128, MEMORY), ("growth", "ours", "", 8, None)],
    "cross_entropy": [
        ("time", "ours", "eager", 0.5, (2048, 32000)),
        ("time", "ours", "eager", 0.9, (8192, 1000)),
        ("time", "ours", "eager", 1.0, (65536, 10)),
        ("time", "ours", "compile", 1.0, (2048, 32000)),
        ("time", "ours compiled", "compile", 1.05, None),
    ],
    "sigmoid_squared_error": [
        ("time", "ours", "eager", 0.7, None),
        ("time", "ours compiled", "compile", 1.05, None),
    ],
    "linear": [
        ("time", "ours", "eager", 1.1, None),
        ("time", "ours compiled", "compile", 1.05, None),
    ],
    **{
        name: [
            ("time", "ours", "eager", 1.25, None),
            ("time", "ours compiled", "compile", 1.05, None),
        ]
        for name in ("sigmoid", "tanh", "softmax", "relu", "mse_loss")
    },
    **{
        f"fixed/{name}": [("difference", "ours", "eager", 25, None)]
        for name in ("sigmoid", "tanh", "softmax", "relu", "mse_loss", "linear", "cross_entropy")
    },
    "scaling": [],
}
inductor = pytest.mark.filterwarnings(  # which it raises as it is loaded
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
OTHERS = ("Liger", "CCE", "QuACK")  # which run on a GPU only


def small(work):
    """A size of the work that takes no time; its numbers differ, or an error of axes would hide."""
    return tuple(8 * (i + 2) for i in range(len(work.axes)))


def run(work, name, problem):
    return work.prepared(name, problem)()


def test_every_target_is_registered():
    found = {
        name: [(t.kind, t.of, t.over, t.limit, t.size) for t in work.targets]
        for name, work in WORKS.items()
    }
    assert found == TARGETS
    for work in WORKS.values():
        for target in work.targets:
            assert {target.of, target.over} <= {*work.contenders, "floor", ""}
            assert target.over != "floor" or work.floor
            assert target.size is None or target.size in work.sizes
            assert work.memory or target.kind not in ("peak", "growth", "memory")
            assert work.error or target.kind != "error"


@pytest.mark.parametrize("name", WORKS)
def test_contenders_compute_the_same(name):
    """In float64, where only a difference of meaning can be seen; one is compiled elsewhere."""
    work = WORKS[name]
    problem = work.drawn(small(work), torch.float64, "cpu")
    want = run(work, "ours", problem)
    assert len(want) == 1 + len(problem.leaves) * (work.mode is not works.forward)
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in want)
    for other, contender in work.contenders.items():
        if other in OTHERS or not contender.same:
            continue
        if other == "chunked" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            continue
        plain = replace(work, contenders={other: replace(contender, compiled=False)})
        torch.testing.assert_close(run(plain, other, problem), want)


@inductor
def test_what_is_compiled_computes_the_same_and_is_compiled():
    work = WORKS["sigmoid"]
    problem = work.drawn((4, 3), torch.float64, "cpu")
    for name in ("compile", "ours compiled"):
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(run(work, name, problem), run(work, "eager", problem))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for work in WORKS.values():
        for name, of in (("compile", "eager"), ("ours compiled", "ours")):
            if name in work.contenders:
                assert work.contenders[name].function is work.contenders[of].function
                assert work.contenders[name].compiled


@pytest.mark.parametrize("other", OTHERS)
def test_other_libraries_compute_the_same(other):
    """On a GPU where they are installed; elsewhere they say what they miss."""
    for work in (WORKS["head"], WORKS["head-ignored"], WORKS["cross_entropy"]):
        if other not in work.contenders:
            continue
        if not torch.cuda.is_available():
            with pytest.raises((ImportError, RuntimeError, ValueError, AssertionError)):
                run(work, other, work.drawn(small(work), torch.float32, "cpu"))
            continue
        pytest.importorskip(
            {"Liger": "liger_kernel", "CCE": "cut_cross_entropy", "QuACK": "quack"}[other]
        )
        size = (256, 512) if work.name == "cross_entropy" else (256, 128, 512)
        problem = work.drawn(size, torch.bfloat16, "cuda")
        truth = run(work, "eager", problem.copy(torch.float64))
        eager = measure.error(run(work, "eager", problem), truth)
        assert measure.error(run(work, other, problem), truth) < 4 * eager


def test_ignored_rows_and_the_contender_without_them():
    work = WORKS["head-ignored"]
    problem = work.drawn((100, 8, 16), torch.float64, "cpu")
    t = problem.others[0]
    assert (t == -100).sum() == 50
    full = replace(problem, others=(t.clamp(min=0),))
    torch.testing.assert_close(run(work, "none ignored", problem), run(work, "ours", full))


def test_the_second_order_is_a_hessian_vector_product():
    work = WORKS["head-second"]
    problem = work.drawn((6, 4, 5), torch.float64, "cpu")
    (x, W), (t,), v = problem.leaves, problem.others, problem.upstream
    value, want = torch.autograd.functional.hvp(lambda x, W: works.plain_head(x, W, t), (x, W), v)
    torch.testing.assert_close(run(work, "eager", problem), (value, *want))


def test_a_contender_that_overwrites_has_its_own_arguments():
    def double(z, t):
        z.detach().mul_(2)
        return z.sum()

    work = replace(WORKS["cross_entropy"], contenders={"x": Contender(double, overwrites=True)})
    problem = work.drawn((4, 3), torch.float32, "cpu")
    before = problem.leaves[0].detach().clone()
    run(work, "x", problem)
    assert torch.equal(problem.leaves[0], before)


@pytest.mark.parametrize(
    ("name", "size", "products"),
    [
        ("head", (8, 16, 24), 3),
        ("head-forward", (8, 16, 24), 1),
        ("head-ignored", (16, 16, 24), 3),
        ("linear", (8, 16, 24), 3),
    ],
)
def test_the_floor_of_a_product_does_its_products(name, size, products):
    problem = WORKS[name].drawn(size, torch.float32, "cpu")
    floor = WORKS[name].floor.prepared(problem)
    with FlopCounterMode(display=False) as counted:
        floor()
    assert counted.get_total_flops() == products * 2 * 8 * 16 * 24


def test_the_floor_of_a_copy_moves_what_is_read_and_written():
    matrix = 64 * 32 * 4
    for name, matrices in {"sigmoid": 4, "mse_loss": 3, "sigmoid_squared_error": 3}.items():
        target = WORKS[name].floor.prepared(WORKS[name].drawn((64, 32), torch.float32, "cpu"))()
        assert 2 * target.nbytes == matrices * matrix
    problem = WORKS["cross_entropy"].drawn((64, 32), torch.float32, "cpu")
    target = WORKS["cross_entropy"].floor.prepared(problem)()
    assert 2 * target.nbytes == 2 * matrix + 64 * 8


class Fake:
    """A timer: every call of a contender takes the next of its times, in ms, of which 1 is 1."""

    def __init__(self, **times):
        self.times = {name: iter(ms) for name, ms in times.items()}
        self.order = []

    def __call__(self, call, number):
        name = call()
        self.order.append(name)
        return next(self.times[name]) / 1000


def fake_rounds(fake, limits, reasons=None):
    runs = {name: (lambda name=name: name, 1) for name in fake.times}
    return measure.rounds(runs, fake, 0.0, limits, {} if reasons is None else reasons)


def test_rounds_alternate_in_any_order():
    fake = Fake(a=[1, 2, 3, 4, 5], b=[2] * 5, c=[3] * 5)
    samples = fake_rounds(fake, (5, 9))
    rounds = ["".join(fake.order[i : i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 2
    assert samples["a"] == [0.001, 0.002, 0.003, 0.004, 0.005]


def test_rounds_stop_at_most(monkeypatch):
    fake = Fake(a=iter(lambda: 1, 2))
    runs = {"a": (lambda: "a", 1)}
    assert len(measure.rounds(runs, fake, 1e9, (2, 7), {})["a"]) == 7


def test_who_fails_in_a_round_is_dropped():
    def broken():
        raise MemoryError("no more")

    reasons = {}
    runs = {"a": (broken, 1), "b": (lambda: "b", 1)}
    samples = measure.rounds(runs, Fake(b=[1] * 3), 0.0, (3, 3), reasons)
    assert samples == {"b": [0.001] * 3}
    assert reasons == {"a": "MemoryError: no more"}


def test_a_short_call_is_repeated_and_a_long_one_refused():
    assert measure.repeats(lambda: None, lambda call, number: 3e-4) == 8
    assert measure.repeats(lambda: None, lambda call, number: 1.0) == 1
    with pytest.raises(measure.Failed, match="more than 20 s: 21 s"):
        measure.repeats(lambda: None, lambda call, number: 21.0)


def found(samples, size=HEAD, **more):
    return measure.Measured(WORKS["head"], size, torch.float32, samples, **more)


def test_ratios_are_paired():
    """The machine is slower and slower, and the ratio of the medians would be 3/4."""
    one = found({"ours": [1, 2, 3, 4, 50], "eager": [2, 4, 4, 8, 100]})
    assert one.ratio("ours", "eager") == {"median": 0.5, "quartiles": [0.5, 0.5]}
    one = found({"ours": [1, 2, 3, 4, 5], "eager": [1, 1, 1, 1, 1]})
    assert one.ratio("ours", "eager") == {"median": 3, "quartiles": [2, 4]}
    assert one.ratio("ours", "chunked") is None


def test_targets_are_met_and_missed():
    mib = 2**20
    first = found({}, peaks={"ours": 100 * mib})
    one = found(
        {"ours": [3.0, 3.0, 9.0], "eager": [2.0, 4.0, 10.0]},
        peaks={"ours": 105 * mib, "eager": 100 * mib},
        errors={"ours": 1e-7, "eager": 2e-7},
    )
    cases = {
        Target(0.9, "eager"): (0.9, True),
        Target(0.89, "eager"): (0.9, False),
        Target(-1e6, "eager", kind="difference"): (-1e6, True),
        Target(-1.1e6, "eager", kind="difference"): (-1e6, False),
        Target(0.5, "eager", kind="error"): (0.5, True),
        Target(0.4, "eager", kind="error"): (0.5, False),
        Target(105, kind="peak", size=HEAD): (105, True),
        Target(104, kind="peak", size=HEAD): (105, False),
        Target(1.05, "eager", kind="memory"): (1.05, True),
        Target(1.04, "eager", kind="memory"): (1.05, False),
        Target(5, kind="growth"): (5, True),
        Target(4, kind="growth"): (5, False),
    }
    for target, (value, met) in cases.items():
        rows = list(bench.judged(replace(WORKS["head"], targets=(target,)), [first, one]))
        assert rows[-1]["value"] == pytest.approx(value)
        assert rows[-1]["met"] is met
        assert rows[-1]["reason"] is None
        assert bench.verdicts(rows).splitlines()[-1].endswith("met" if met else "missed")


def test_a_target_without_a_value_says_why():
    one = found({"ours": [1.0, 1.0]}, reasons={"chunked": "ZeroDivisionError: no"})
    targets = {
        Target(1, "chunked"): "chunked: ZeroDivisionError: no",
        Target(1, "eager"): "not measured",
        Target(1, "eager", size=(1, 2, 3)): "not run at this size",
        Target(1, kind="growth"): "takes two sizes",
    }
    rows = list(bench.judged(replace(WORKS["head"], targets=tuple(targets)), [one]))
    assert [row["reason"] for row in rows] == list(targets.values())
    assert [row["met"] for row in rows] == [None] * 4
    assert all(why in bench.verdicts(rows) for why in targets.values())


def measured(work, fake=None, size=(8, 4), before=()):
    timer = fake or (lambda call, number: 0.01)
    return measure.measured(work, size, torch.float32, "cpu", 0.0, before, timer)


def raising(z):
    raise ZeroDivisionError("planted")


def test_a_contender_that_raises_is_named_with_its_reason():
    contenders = {**WORKS["fixed/sigmoid"].contenders, "broken": Contender(raising)}
    one = measured(replace(WORKS["fixed/sigmoid"], contenders=contenders)).as_dict()
    assert one["contenders"]["broken"]["reason"] == "ZeroDivisionError: planted"
    assert one["contenders"]["broken"]["median"] is None
    assert one["contenders"]["ours"]["ours_over_it"] == {"median": 1, "quartiles": [1, 1]}
    (line,) = (line for line in bench.table(one).splitlines() if "broken" in line)
    assert line.endswith("ZeroDivisionError: planted")
    json.dumps(one)


def test_the_error_is_that_of_the_gradients():
    contenders = {
        **WORKS["fixed/sigmoid"].contenders,
        "off": Contender(lambda z: torch.sigmoid(z) + 1e-3 * z),
        "moved": Contender(lambda z: torch.sigmoid(z) + 1),
    }
    one = measured(replace(WORKS["fixed/sigmoid"], contenders=contenders))
    assert one.errors["ours"] < 1e-6
    assert 1e-3 < one.errors["off"] < 1e-1
    assert one.errors["moved"] < 1e-6
    forward = [torch.ones(3)], [torch.full((3,), 2.0)]
    assert measure.error(*forward) == pytest.approx(0.5)


def test_who_is_slow_or_does_not_fit_drops_out(monkeypatch):
    work = replace(WORKS["scaling"], memory=False)
    work = replace(work, contenders={name: work.contenders[name] for name in ("ours", "eager")})
    slow = measured(work, lambda call, number: 21.0, (8, 4, 16))
    assert slow.reasons["ours"] == "a call takes more than 20 s: 21 s"
    larger = measured(work, None, (16, 4, 16), [slow])
    assert larger.reasons == slow.reasons
    smaller = measured(work, None, (4, 4, 16), [slow])
    assert smaller.reasons == {}
    monkeypatch.setattr(measure, "_free", lambda device: 2**12)
    tight = measured(work, None, (16, 4, 16))
    assert list(tight.reasons) == ["eager"]
    assert "more than half of the" in tight.reasons["eager"]


def test_the_peak_of_a_known_allocation():
    MiB = 2**20
    problem = Problem((torch.ones(1, requires_grad=True),))

    def run():
        freed = torch.ones(48 * MiB // 4)
        return (freed[:1].clone(), torch.ones(16 * MiB // 4))  # the second is a result

    assert measure.peak(run, problem) == pytest.approx(48 * MiB, rel=0.1)


def test_the_peak_in_a_process_of_its_own():
    """PyTorch's cross entropy holds the logarithm of softmax, and its gradient."""
    one = measure.Measured(WORKS["cross_entropy"], (512, 32000), torch.float32)
    problem = WORKS["cross_entropy"].drawn((1, 1), torch.float32, "cpu")
    peak = measure._peak_of(one, "eager", problem)
    assert peak == pytest.approx(2 * 512 * 32000 * 4, rel=0.1)
    if not torch.cuda.is_available():
        with pytest.raises(measure.Failed):
            measure._peak_of(one, "QuACK", problem)


@inductor
def test_the_command_prints_and_writes(capsys, tmp_path):
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert main(["bench", "sigmoid", "--sizes", "8x8", "--seconds", "0.1", *files]) == 0
    printed = capsys.readouterr()
    assert f"PyTorch {torch.__version__}" in printed.out.splitlines()[0]
    assert "sigmoid 8x8 float32: warming up compile" in printed.err
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["threads"] == torch.get_num_threads()
    (one,) = written["works"]
    assert (one["name"], one["size"], one["dtype"]) == ("sigmoid", [8, 8], "float32")
    assert list(one["contenders"]) == ["ours", "eager", "compile", "ours compiled", "floor"]
    for name, row in one["contenders"].items():
        assert f"\n  {name} " in printed.out
        assert row["reason"] is None, row["reason"]
        low, high = row["quartiles"]
        assert 0 < low <= row["median"] <= high
        for ratio in ("ours_over_it", "over_eager", "over_floor"):
            assert row[ratio]["median"] > 0
    assert [row["target"] for row in written["targets"]] == [
        "sigmoid: ours / eager",
        "sigmoid: ours compiled / compile",
    ]
    assert all(row["target"] in printed.out for row in written["targets"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_scaling_is_made_from_its_json(tmp_path):
    work = WORKS["scaling"]
    tables = []
    for size in [(64, 8, 32), (128, 8, 32), (256, 8, 32), (64, 4, 32), (64, 4, 64)]:
        times = {name: [0.1, 0.2, 0.3] for name in work.contenders}
        one = measure.Measured(work, size, torch.float32, times, {"ours": 2**20})
        if size[0] == 256:
            one.reasons["eager"] = "planted"
        tables.append(one.as_dict())
    report = json.loads(json.dumps({"machine": bench.machine("cpu"), "works": tables}))
    figure = draw.picture(report)
    figure.savefig(tmp_path / "out.png")
    rows, classes = figure.axes[0], figure.axes[1]
    assert [*rows.lines[0].get_xdata()] == [64, 128, 256]
    assert [*classes.lines[0].get_xdata()] == [32, 64]
    assert "eager from 256x8x32 on: planted" in figure.get_supxlabel()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*work.contenders, "the logits alone"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sigmod"], "there is no work 'sigmod', but head, head-bfloat16, "),
        (["head", "--sizes", "8x8"], "head is ROWSxFEATURESxCLASSES, such as 1024x512x32000, not"),
        (["sigmoid", "--sizes", "8x0"], "sigmoid is ROWSxCOLUMNS, such as 4096x1024, not '8x0'"),
        (["sigmoid", "--sizes", "8x8,axb"], "not 'axb'"),
        (["scaling", "tanh", "--plot", "x.png"], "scaling has a picture of its own"),
        (["--json", "nowhere/x.json"], "nowhere/x.json: there is no such directory"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_errors(capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_names(capsys):
    assert [work.name for work in works.chosen([])] == [*WORKS][:-1]
    assert [work.name for work in works.chosen(["tanh"])] == ["tanh"]
    assert len(works.chosen(["fixed"])) == 7
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(WORKS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without CUDA")
def test_cuda_without_cuda_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_matplotlib_is_loaded_for_a_picture_only():
    code = "import sys, torch_nnmath.bench; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_durations():
    shown = [bench.duration(s) for s in (12.345, 0.0123456, 0.5, 1.5e-5, 9.99e-7)]
    assert shown == ["12.3 s", "12.3 ms", "500 ms", "15.0 µs", "1.00 µs"]
    assert math.isclose(measure.spread([1, 2, 3])["median"], 2)
