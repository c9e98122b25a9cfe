"""The benchmark: its contenders are equivalent, and its statistics are right."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torch_nnmath.__main__ import main
from torch_nnmath.bench import machine, measure, plot, tables, works
from torch_nnmath.bench.work import Contender, Problem, Target, forward
from torch_nnmath.bench.works import WORKS

MIB = 2**20
HEAD_SIZE, MEMORY_SIZE = (1024, 512, 32000), (4096, 256, 32000)
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
    "distillation": [
        ("time", "ours", "floor", 1.25, None),
        ("time", "ours, Jensen-Shannon", "floor", 1.25, None),
        ("time", "ours", "eager", 1.00, None),
    ],
    "row_weight": [("time", "ours", "plain", 1.03, None), ("memory", "ours", "plain", 1.05, None)],
    "head-forward": [("time", "ours", "floor", 1.15, None)],
    "head-second": [("time", "ours", "eager", 1.0, None)],
    "head-memory": [("peak", "ours", "", 128, MEMORY_SIZE), ("growth", "ours", "", 8, None)],
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
        f"fixed/{name}": [("difference", "ours", "eager", 15, None)]
        for name in ("sigmoid", "tanh", "softmax", "relu")
    },
    "convolutions": [
        ("time", "ours", "eager", 1.05, None),
        ("time", "swapped", "eager", 1.05, None),
    ],
    "fixed/mse_loss": [("difference", "ours", "eager", 40, None)],
    "fixed/sigmoid_squared_error": [("difference", "ours", "eager", 50, None)],
    "fixed/linear": [("difference", "ours", "eager", 20, None)],
    "fixed/cross_entropy": [("time", "ours", "eager", 2.0, None)],
    "fixed/step": [
        ("time", "ours", "eager", 1.6, None),
        ("time", "swapped", "modules", 1.1, None),
    ],
    "scaling": [],
}
OTHER_LIBRARIES = {
    "Liger": "liger_kernel",
    "CCE": "cut_cross_entropy",
    "QuACK": "quack",
}  # GPU only


def make_small_size(work):
    """Returns a small size with a different number for each axis, so that a mix-up shows."""
    return tuple(8 * (i + 2) for i in range(len(work.axes)))


def run(work, name, problem):
    return work.prepare(name, problem)()


def test_targets_of_every_work_match_the_list():
    registered = {
        name: [(t.kind, t.contender, t.baseline, t.limit, t.size) for t in work.targets]
        for name, work in WORKS.items()
    }
    assert registered == TARGETS
    for work in WORKS.values():
        for target in work.targets:
            assert {target.contender, target.baseline} <= {*work.contenders, "floor", ""}
            assert target.baseline != "floor" or work.floor
            assert target.size is None or target.size in work.sizes
            assert work.measures_memory or target.kind not in ("peak", "growth", "memory")
            assert work.measures_error or target.kind != "error"


@pytest.mark.parametrize("name", WORKS)
def test_contenders_in_float64_agree(name):
    """Runs compiled contenders without compiling; the test of the command compiles two."""
    work = WORKS[name]
    problem = work.make_problem(make_small_size(work), torch.float64, "cpu")
    expected = run(work, "ours", problem)
    assert len(expected) == 1 + len(problem.leaves) * (work.mode is not forward)
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in expected)
    for other, contender in work.contenders.items():
        if other in OTHER_LIBRARIES or not contender.is_equivalent:
            continue
        if other == "chunked" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            continue
        eager = replace(work, contenders={other: replace(contender, is_compiled=False)})
        torch.testing.assert_close(run(eager, other, problem), expected)


def test_compiled_contenders_compile_the_eager_functions():
    for work in WORKS.values():
        for compiled, eager in (("compile", "eager"), ("ours compiled", "ours")):
            if compiled in work.contenders:
                assert work.contenders[compiled].function is work.contenders[eager].function
                assert work.contenders[compiled].is_compiled


@pytest.mark.parametrize("library", OTHER_LIBRARIES)
def test_other_libraries_on_gpu_agree_and_on_cpu_raise(library):
    """On a GPU, skips a library that is not installed."""
    for work in (WORKS["head"], WORKS["head-ignored"], WORKS["cross_entropy"]):
        if library not in work.contenders:
            continue
        if not torch.cuda.is_available():
            problem = work.make_problem(make_small_size(work), torch.float32, "cpu")
            with pytest.raises((ImportError, RuntimeError, ValueError, AssertionError)):
                run(work, library, problem)
            continue
        pytest.importorskip(OTHER_LIBRARIES[library])
        size = (256, 512) if work.name == "cross_entropy" else (256, 128, 512)
        problem = work.make_problem(size, torch.bfloat16, "cuda")
        truth = run(work, "eager", problem.copy(torch.float64))
        eager_error = measure.compute_error(run(work, "eager", problem), truth)
        assert measure.compute_error(run(work, library, problem), truth) < 4 * eager_error


def test_head_ignored_ignores_half_of_the_rows_and_its_baseline_none():
    work = WORKS["head-ignored"]
    problem = work.make_problem((100, 8, 16), torch.float64, "cpu")
    t = problem.constants[0]
    assert (t == -100).sum() == 50
    none_ignored = replace(problem, constants=(t.clamp(min=0),))
    torch.testing.assert_close(run(work, "none ignored", problem), run(work, "ours", none_ignored))


def test_head_second_computes_a_hessian_vector_product():
    work = WORKS["head-second"]
    problem = work.make_problem((6, 4, 5), torch.float64, "cpu")
    (x, W), (t,), v = problem.leaves, problem.constants, problem.upstream
    value, product = torch.autograd.functional.hvp(
        lambda x, W: works.eager_head(x, W, t), (x, W), v
    )
    torch.testing.assert_close(run(work, "eager", problem), (value, *product))


def test_contender_that_overwrites_gets_a_copy_of_the_arguments():
    def double_in_place(z, t):
        z.detach().mul_(2)
        return z.sum()

    contender = Contender(double_in_place, overwrites_arguments=True)
    work = replace(WORKS["cross_entropy"], contenders={"x": contender})
    problem = work.make_problem((4, 3), torch.float32, "cpu")
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
def test_floor_of_products_has_the_flops_of_the_products(name, size, products):
    problem = WORKS[name].make_problem(size, torch.float32, "cpu")
    floor = WORKS[name].floor.prepare(problem)
    with FlopCounterMode(display=False) as counter:
        floor()
    assert counter.get_total_flops() == products * 2 * 8 * 16 * 24


def test_floor_of_a_copy_moves_the_bytes_of_the_work():
    matrix = 64 * 32 * 4
    for name, matrices in {"sigmoid": 4, "mse_loss": 3, "sigmoid_squared_error": 3}.items():
        problem = WORKS[name].make_problem((64, 32), torch.float32, "cpu")
        destination = WORKS[name].floor.prepare(problem)()
        assert 2 * destination.nbytes == matrices * matrix
    problem = WORKS["cross_entropy"].make_problem((64, 32), torch.float32, "cpu")
    destination = WORKS["cross_entropy"].floor.prepare(problem)()
    assert 2 * destination.nbytes == 2 * matrix + 64 * 8


class FakeTimer:
    """A timer that returns the given milliseconds of each contender, one after the other.

    The call of a contender returns its name.
    """

    def __init__(self, **times):
        self.times = {name: iter(ms) for name, ms in times.items()}
        self.order = []

    def __call__(self, call, repeats):
        name = call()
        self.order.append(name)
        return next(self.times[name]) / 1000


def test_rounds_run_every_contender_in_varying_order():
    timer = FakeTimer(a=[1, 2, 3, 4, 5], b=[2] * 5, c=[3] * 5)
    runs = {name: (lambda name=name: name, 1) for name in timer.times}
    samples = measure.time_rounds(runs, timer, 0.0, (5, 9), {})
    rounds = ["".join(timer.order[i : i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 2
    assert samples["a"] == [0.001, 0.002, 0.003, 0.004, 0.005]


def test_rounds_with_much_time_stop_at_the_limit():
    timer = FakeTimer(a=iter(lambda: 1, 2))
    runs = {"a": (lambda: "a", 1)}
    assert len(measure.time_rounds(runs, timer, 1e9, (2, 7), {})["a"]) == 7


def test_contender_that_fails_in_a_round_is_dropped():
    def fail():
        raise MemoryError("no more")

    reasons = {}
    runs = {"a": (fail, 1), "b": (lambda: "b", 1)}
    samples = measure.time_rounds(runs, FakeTimer(b=[1] * 3), 0.0, (3, 3), reasons)
    assert samples == {"b": [0.001] * 3}
    assert reasons == {"a": "MemoryError: no more"}


def test_short_calls_are_repeated_and_long_calls_refused():
    assert measure.count_repeats(lambda: None, lambda call, repeats: 3e-4) == 8
    assert measure.count_repeats(lambda: None, lambda call, repeats: 1.0) == 1
    with pytest.raises(measure.ContenderError, match="more than 20 s: 21 s"):
        measure.count_repeats(lambda: None, lambda call, repeats: 21.0)


def make_measurement(samples, size=HEAD_SIZE, **results):
    return measure.Measurement(WORKS["head"], size, torch.float32, samples, **results)


def test_ratios_are_paired_by_round():
    # The machine slows down; the ratio of the medians would be 3/4.
    measurement = make_measurement({"ours": [1, 2, 3, 4, 50], "eager": [2, 4, 4, 8, 100]})
    assert measurement.ratio("ours", "eager") == {"median": 0.5, "quartiles": [0.5, 0.5]}
    measurement = make_measurement({"ours": [1, 2, 3, 4, 5], "eager": [1, 1, 1, 1, 1]})
    assert measurement.ratio("ours", "eager") == {"median": 3, "quartiles": [2, 4]}
    assert measurement.ratio("ours", "chunked") is None


def test_targets_of_each_kind_are_met_or_missed():
    first = make_measurement({}, peaks={"ours": 100 * MIB})
    last = make_measurement(
        {"ours": [3.0, 3.0, 9.0], "eager": [2.0, 4.0, 10.0]},
        peaks={"ours": 105 * MIB, "eager": 100 * MIB},
        errors={"ours": 1e-7, "eager": 2e-7},
    )
    cases = {
        Target(0.9, "eager"): (0.9, True),
        Target(0.89, "eager"): (0.9, False),
        Target(-1e6, "eager", kind="difference"): (-1e6, True),
        Target(-1.1e6, "eager", kind="difference"): (-1e6, False),
        Target(0.5, "eager", kind="error"): (0.5, True),
        Target(0.4, "eager", kind="error"): (0.5, False),
        Target(105, kind="peak", size=HEAD_SIZE): (105, True),
        Target(104, kind="peak", size=HEAD_SIZE): (105, False),
        Target(1.05, "eager", kind="memory"): (1.05, True),
        Target(1.04, "eager", kind="memory"): (1.05, False),
        Target(5, kind="growth"): (5, True),
        Target(4, kind="growth"): (5, False),
    }
    for target, (value, is_met) in cases.items():
        work = replace(WORKS["head"], targets=(target,))
        rows = list(tables.evaluate_targets(work, [first, last]))
        assert rows[-1]["value"] == pytest.approx(value)
        assert rows[-1]["met"] is is_met
        assert rows[-1]["reason"] is None
        line = tables.format_targets(rows).splitlines()[-1]
        assert line.endswith("met" if is_met else "missed")


def test_target_without_a_value_has_a_reason():
    measurement = make_measurement(
        {"ours": [1.0, 1.0]}, reasons={"chunked": "ZeroDivisionError: no"}
    )
    reasons = {
        Target(1, "chunked"): "chunked: ZeroDivisionError: no",
        Target(1, "eager"): "not measured",
        Target(1, "eager", size=(1, 2, 3)): "not run at this size",
        Target(1, kind="growth"): "needs two sizes",
    }
    work = replace(WORKS["head"], targets=tuple(reasons))
    rows = list(tables.evaluate_targets(work, [measurement]))
    assert [row["reason"] for row in rows] == list(reasons.values())
    assert [row["met"] for row in rows] == [None] * 4
    assert all(reason in tables.format_targets(rows) for reason in reasons.values())


def measure_on_cpu(work, timer=None, size=(8, 4), earlier=()):
    timer = timer or (lambda call, repeats: 0.01)
    return measure.measure_work(work, size, torch.float32, "cpu", 0.0, earlier, timer)


def raise_planted_error(z):
    raise ZeroDivisionError("planted")


def test_contender_that_raises_is_listed_with_the_reason():
    contenders = {**WORKS["fixed/sigmoid"].contenders, "broken": Contender(raise_planted_error)}
    result = measure_on_cpu(replace(WORKS["fixed/sigmoid"], contenders=contenders)).to_dict()
    assert result["contenders"]["broken"]["reason"] == "ZeroDivisionError: planted"
    assert result["contenders"]["broken"]["median"] is None
    assert result["contenders"]["ours"]["ours_over_it"] == {"median": 1, "quartiles": [1, 1]}
    (line,) = (line for line in tables.format_table(result).splitlines() if "broken" in line)
    assert line.endswith("ZeroDivisionError: planted")
    json.dumps(result)


def test_error_is_of_the_gradients_or_else_of_the_value():
    contenders = {
        **WORKS["fixed/sigmoid"].contenders,
        "wrong gradient": Contender(lambda z: torch.sigmoid(z) + 1e-3 * z),
        "wrong value": Contender(lambda z: torch.sigmoid(z) + 1),
    }
    measurement = measure_on_cpu(replace(WORKS["fixed/sigmoid"], contenders=contenders))
    assert measurement.errors["ours"] < 1e-6
    assert 1e-3 < measurement.errors["wrong gradient"] < 1e-1
    assert measurement.errors["wrong value"] < 1e-6
    values = [torch.ones(3)], [torch.full((3,), 2.0)]
    assert measure.compute_error(*values) == pytest.approx(0.5)


def test_contender_too_slow_or_too_large_is_skipped(monkeypatch):
    contenders = {name: WORKS["scaling"].contenders[name] for name in ("ours", "eager")}
    work = replace(WORKS["scaling"], measures_memory=False, contenders=contenders)
    slow = measure_on_cpu(work, lambda call, repeats: 21.0, (8, 4, 16))
    assert slow.reasons["ours"] == "a call takes more than 20 s: 21 s"
    larger = measure_on_cpu(work, None, (16, 4, 16), [slow])
    assert larger.reasons == slow.reasons
    smaller = measure_on_cpu(work, None, (4, 4, 16), [slow])
    assert smaller.reasons == {}
    monkeypatch.setattr(measure, "read_available", lambda device: 2**12)
    little_memory = measure_on_cpu(work, None, (16, 4, 16))
    assert list(little_memory.reasons) == ["eager"]
    assert "more than half of the" in little_memory.reasons["eager"]


def test_peak_excludes_results():
    problem = Problem((torch.ones(1, requires_grad=True),))

    def allocate():
        temporary = torch.ones(48 * MIB // 4)
        return (temporary[:1].clone(), torch.ones(16 * MIB // 4))  # the second is a result

    assert measure.measure_peak(allocate, problem) == pytest.approx(48 * MIB, rel=0.1)


def test_peak_in_a_fresh_process_is_that_of_the_contender():
    """PyTorch's cross entropy keeps the log-softmax and its gradient."""
    work = WORKS["cross_entropy"]
    cpu_problem = work.make_problem((1, 1), torch.float32, "cpu")
    measurement = measure.Measurement(work, (512, 32000), torch.float32)
    peak = measure.measure_contender_peak(measurement, "eager", cpu_problem)
    assert peak == pytest.approx(2 * 512 * 32000 * 4, rel=0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_peak_in_a_process_that_fails_raises_the_last_line(monkeypatch, tmp_path):
    executable = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(executable))
    problem = WORKS["cross_entropy"].make_problem((1, 1), torch.float32, "cpu")
    measurement = measure.Measurement(WORKS["cross_entropy"], (8, 8), torch.float32)
    for output, message in (("echo first >&2; echo last >&2", "last"), ("", "exit status 3")):
        executable.write_text(f"#!/bin/sh\n{output}\nexit 3\n")
        executable.chmod(0o755)
        with pytest.raises(measure.ContenderError, match=f"^{message}$"):
            measure.measure_contender_peak(measurement, "eager", problem)


def test_command_prints_tables_and_writes_files(capsys, tmp_path):
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    options = ["--sizes", "8x8", "--seconds", "0.1", "--targets"]
    torch._dynamo.utils.counters.clear()
    assert main(["bench", "sigmoid", *options, *files]) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of two contenders
    printed = capsys.readouterr()
    assert f"PyTorch {torch.__version__}" in printed.out.splitlines()[0]
    assert "sigmoid 8x8 float32: warming up compile" in printed.err
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["threads"] == torch.get_num_threads()
    (result,) = report["works"]
    assert (result["name"], result["size"], result["dtype"]) == ("sigmoid", [8, 8], "float32")
    assert list(result["contenders"]) == ["ours", "eager", "compile", "ours compiled", "floor"]
    for name, values in result["contenders"].items():
        assert f"\n  {name} " in printed.out
        assert values["reason"] is None, values["reason"]
        low, high = values["quartiles"]
        assert 0 < low <= values["median"] <= high
        for ratio in ("ours_over_it", "over_eager", "over_floor"):
            assert values[ratio]["median"] > 0
        assert name == "floor" or values["error"] < 1e-6
    assert [row["target"] for row in report["targets"]] == [
        "sigmoid: ours / eager",
        "sigmoid: ours compiled / compile",
    ]
    assert all(row["target"] in printed.out for row in report["targets"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_command_without_targets_option_writes_but_does_not_print_them(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert main(["bench", "fixed/sigmoid", "--seconds", "0.01", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "fixed/sigmoid 64x64" in printed
    assert not any(word in printed for word in ("target", "met", "missed"))
    (row,) = json.loads(file.read_text())["targets"]
    assert row["target"] == "fixed/sigmoid: ours - eager, µs"
    assert row["met"] is (row["value"] <= 15)


def test_figure_of_scaling_from_json_has_a_line_for_each_contender(tmp_path):
    work = WORKS["scaling"]
    results = []
    for size in [(64, 8, 32), (128, 8, 32), (256, 8, 32), (64, 4, 32), (64, 4, 64)]:
        times = {name: [0.1, 0.2, 0.3] for name in work.contenders}
        measurement = measure.Measurement(work, size, torch.float32, times, {"ours": MIB})
        if size[0] == 256:
            measurement.reasons["eager"] = "planted"
        results.append(measurement.to_dict())
    report = json.loads(json.dumps({"machine": machine.describe_machine("cpu"), "works": results}))
    figure = plot.plot_report(report)
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
        (["sigmod"], "there is no work 'sigmod'; the works are head, head-bfloat16, "),
        (["head", "--sizes", "8x8"], "head is ROWSxFEATURESxCLASSES, such as 1024x512x32000, not"),
        (["sigmoid", "--sizes", "8x0"], "sigmoid is ROWSxCOLUMNS, such as 4096x1024, not '8x0'"),
        (["sigmoid", "--sizes", "8x8,axb"], "not 'axb'"),
        (["scaling", "tanh", "--plot", "x.png"], "scaling has a figure of its own"),
        (["--json", "nowhere/x.json"], "nowhere/x.json: there is no such directory"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_wrong_arguments_exit_with_a_message(capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_names_select_works_and_groups(capsys):
    assert [work.name for work in works.select_works([])] == [*WORKS][:-1]
    assert [work.name for work in works.select_works(["tanh"])] == ["tanh"]
    assert len(works.select_works(["fixed"])) == 9
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(WORKS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without CUDA")
def test_cuda_without_a_device_exits_with_a_message(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_import_does_not_import_matplotlib():
    code = "import sys, torch_nnmath.bench; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_durations_have_three_digits():
    texts = [tables.format_duration(s) for s in (12.345, 0.0123456, 0.5, 1.5e-5, 9.99e-7)]
    assert texts == ["12.3 s", "12.3 ms", "500 ms", "15.0 µs", "1.00 µs"]


def test_spread_has_the_median():
    assert math.isclose(measure.compute_spread([1, 2, 3])["median"], 2)
