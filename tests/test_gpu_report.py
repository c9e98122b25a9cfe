"""The report of a GPU: its works, its stages run with tiny sizes, and stages that fail."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from torch_nnmath import kernels
from torch_nnmath.__main__ import main
from torch_nnmath.bench import gpu_report, gpu_works, profiling, stages
from torch_nnmath.bench.gpu_report import Run, Stage
from torch_nnmath.bench.work import forward
from torch_nnmath.bench.works import WORKS

PEERS = ("Liger", "CCE", "QuACK", "chunked")


def run_toy_report(folder):
    """Runs the command with tiny sizes and returns what it printed."""
    command = [sys.executable, "-m", "torch_nnmath", "bench", "--toy", "--report", str(folder)]
    command += ["--minutes", "60"]  # no stage is stopped on a loaded machine
    # No pool of workers on a small machine, and nothing of this session's pytest.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(gpu_report.PACKAGE_PARENT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_toy_report_has_every_stage_work_and_product(tmp_path):
    """One test, since the report takes most of a minute."""
    printed = run_toy_report(tmp_path)
    check_files(tmp_path, printed)
    check_works(tmp_path)
    check_profile(tmp_path)


def check_files(folder, printed):
    """Every stage wrote its files."""
    report = read(folder, "report")
    assert [stage["name"] for stage in report["stages"]] == [s.name for s in gpu_report.STAGES]
    assert report["machine"]["torch"] == torch.__version__
    for stage in report["stages"]:
        name = stage["name"]
        is_large_example = name.startswith("example-") and name != "example-quickstart"
        assert stage["status"] == ("skipped" if is_large_example else "passed"), stage
        assert f"{name}, at most" in printed
        assert (folder / f"{name}.txt").stat().st_size
        assert read(folder, name)
        if name in stages.STAGES:
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert read(folder, name)["machine"] == report["machine"]
            assert not read(folder, name).get("not_run")
    summary = (folder / "summary.txt").read_text()
    assert printed.endswith(summary)
    assert len(report["targets"]) > len(gpu_works.HEAD_SIZES)
    for target in report["targets"]:
        assert target["target"] in summary
    assert "head: peak of ours, MiB" in summary


def check_works(folder):
    """The results have every work, with finite errors."""
    measured = {"head": [gpu_works.head], "head-options": gpu_works.options}
    for name, works in measured.items():
        results = read(folder, name)
        assert [work["name"] for work in results["works"]] == [work.name for work in works]
        assert not results["failures"]
        for work in results["works"]:
            assert work["contenders"]["ours"]["median"] > 0
    assert {work["dtype"] for work in read(folder, "rows")["works"]} == {"bfloat16", "float32"}
    errors = read(folder, "head-errors")["errors"]
    for entry in errors:
        limit = 1e-5 if entry["dtype"] == "float32" else 0.02
        assert all(error < limit for error in entry["errors"]), entry
    assert {e["dtype"] for e in errors} == {"bfloat16", "float16", "float32"}


def check_profile(folder):
    """The profile of the head has products."""
    profiles = {p["work"].split()[0]: p for p in read(folder, "profile")["profiles"]}
    assert 0 < profiles["head"]["product_share"] < 1
    assert profiles["softmax"]["product_share"] == 0
    kernels = profiles["head"]["kernels"]
    assert kernels == sorted(kernels, key=lambda kernel: -kernel["seconds"])
    assert (folder / "profile-head.trace.json").stat().st_size


# Stages that fail


def make_stage(name, code, share=1.0):
    return Stage(name, share, lambda name, run, limit: [sys.executable, "-c", code])


def test_failing_stages_are_reported_and_later_ones_run(tmp_path, capsys):
    sleep = "import time; print('asleep', flush=True); time.sleep(60)"
    planned = [
        make_stage("fails", "print('planted'); raise SystemExit(3)"),
        make_stage("raises", "raise ValueError('planted error')"),
        make_stage("crashes", "import os; os.abort()"),
        make_stage("hangs", sleep, share=0.1),
        Stage("missing", 1.0, lambda name, run, limit: [str(tmp_path / "missing")]),
        Stage("absent", 1.0, lambda name, run, limit: gpu_report.require("no_such_module")),
        make_stage("passes", "print('fine')", share=10.0),
    ]
    start = time.monotonic()
    assert gpu_report.run_report(Run(tmp_path, "cpu", True, 700.0), planned) == 1
    assert time.monotonic() - start < 30
    report = read(tmp_path, "report")
    outcomes = {stage["name"]: stage for stage in report["stages"]}
    assert {name: (o["status"], o["exit_status"]) for name, o in outcomes.items()} == {
        "fails": ("failed", 3),
        "raises": ("failed", 1),
        "crashes": ("failed", -6),
        "hangs": ("failed", None),
        "missing": ("failed", None),
        "absent": ("skipped", None),
        "passes": ("passed", 0),
    }
    assert outcomes["fails"]["output"] == "planted\n"
    assert "SIGABRT" in outcomes["crashes"]["note"]
    assert outcomes["hangs"]["output"] == "asleep\n"
    assert (
        outcomes["hangs"]["note"]
        == f"stopped after its limit of {outcomes['hangs']['limit']:.0f} s"
    )
    assert outcomes["absent"]["note"] == "not installed: no_such_module"
    printed = capsys.readouterr().out
    for text in ("fails failed: exit status 3\nplanted", "ValueError: planted error"):
        assert text in printed
    assert read(tmp_path, "passes")["status"] == "passed"
    assert outcomes["passes"]["note"] == "fine"


def test_limits_are_shares_of_the_time_left(tmp_path):
    limits = {}

    def note_limit(name, run, limit):
        limits[name] = limit
        return [sys.executable, "-c", ""]

    planned = [
        Stage("a", 1.0, note_limit),
        Stage("b", 2.0, note_limit),
        Stage("c", 1.0, note_limit),
    ]
    assert gpu_report.run_report(Run(tmp_path, "cpu", True, 100.0), planned) == 0
    assert limits["a"] == pytest.approx(25, abs=1)
    assert limits["b"] == pytest.approx(66, abs=2)
    assert limits["c"] == pytest.approx(100, abs=2)


def test_no_time_left_skips_stages_and_keeps_files(tmp_path):
    assert gpu_report.run_report(Run(tmp_path, "cpu", True, 1.0)) == 0
    report = read(tmp_path, "report")
    assert {stage["status"] for stage in report["stages"]} == {"skipped"}
    assert (tmp_path / "summary.txt").exists()


def test_killed_stage_kills_its_processes(tmp_path):
    sleep = "import time; time.sleep(60)"
    child = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {sleep!r}]); "
        "print(p.pid, flush=True); p.wait()"
    )
    with open(tmp_path / "log.txt", "w+") as log:
        assert gpu_report.run_in_process([sys.executable, "-c", child], log, 3.0) is None
        log.seek(0)
        pid = int(log.read())
    wait_for_end(pid)


def test_terminated_report_ends_its_stage(tmp_path):
    sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import sys; from pathlib import Path; from torch_nnmath.bench import gpu_report as g; "
        f"stage = g.Stage('hangs', 1.0, lambda *a: [sys.executable, '-c', {sleep!r}]); "
        f"g.run_report(g.Run(Path({str(tmp_path)!r}), 'cpu', True, 60.0), [stage])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "hangs.txt"
        deadline = time.monotonic() + 30
        while not (log.exists() and log.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(10) == 143
    wait_for_end(int(log.read_text()))


def wait_for_end(pid):
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    """Whether a process has not ended; a zombie that nobody waited for has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stage_with_a_work_that_fails_measures_the_others_and_returns_1(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("planted")

    contenders = gpu_works.head.contenders
    contenders = {**contenders, "ours": replace(contenders["ours"], function=fail)}
    broken = replace(gpu_works.head, name="broken", contenders=contenders)
    crash = replace(gpu_works.head, name="crash", draw_inputs=fail)
    monkeypatch.setattr(gpu_works, "options", (broken, crash, gpu_works.options[0]))
    options = ["head-options", str(tmp_path), "--toy", "--seconds", "60"]
    assert stages.main(options) == 1
    results = read(tmp_path, "head-options")
    assert [work["name"] for work in results["works"]] == ["broken", "head-softcap"]
    assert [text.split(" ", 1)[0] for text in results["failures"]] == ["broken", "crash"]
    assert all("planted" in text for text in results["failures"])
    assert stages.main([*options[:-1], "0"]) == 0
    assert len(read(tmp_path, "head-options")["not_run"]) == 3


def test_verification_without_time_ends_and_names_what_was_not_run(tmp_path):
    command = [sys.executable, "-m", "torch_nnmath.bench.stages", "verify", str(tmp_path)]
    options = ["--toy", "--seconds", "0.1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    results = read(tmp_path, "verify")
    assert len(results["not_run"]) == 1
    assert f"time was up before {results['not_run'][0]}" in done.stdout


# Works


@pytest.mark.parametrize("work", gpu_works.ALL, ids=lambda work: work.name)
def test_contenders_of_report_in_float64_agree(work):
    size = (6, 5, 9)[: len(work.axes)]
    problem = work.make_problem(size, torch.float64, "cpu")
    expected = work.prepare("ours", problem)()
    assert len(expected) == 1 + len(problem.leaves) * (work.mode is not forward)
    for name, contender in work.contenders.items():
        if name in PEERS or contender.is_compiled or not contender.is_equivalent:
            continue
        torch.testing.assert_close(work.prepare(name, problem)(), expected)


def test_targets_of_head_are_those_of_the_plan():
    limits = {(t.kind, t.size): t.limit for t in gpu_works.head.targets}
    for size in gpu_works.HEAD_SIZES:
        assert limits["time", size] == (1.08 if size[1] == 4096 else 1.15)
        assert limits["peak", size] == kernels.get_memory_budget() / 2**20
    assert {work.name: [t.limit for t in work.targets] for work in gpu_works.options} == {
        "head-softcap": [1.15],
        "head-z-loss": [1.08],
        "head-smoothing": [1.08],
        "head-class-weights": [1.08],
        "head-stats": [1.08],
        "head-none": [1.08],
        "head-policy": [1.15],
    }
    for work in (*gpu_works.rows, gpu_works.compiled_row):
        assert [t.limit for t in work.targets] == [pytest.approx(1 / 0.85)]


@pytest.mark.parametrize(("index", "passes"), [(0, 2), (1, 2), (2, 5)])
def test_floor_of_rows_copies_the_necessary_bytes(index, passes):
    work = gpu_works.rows[index]
    problem = work.make_problem((64, 128), torch.bfloat16, "cpu")
    copy = work.floor.prepare(problem)()
    assert 2 * copy.nbytes == passes * problem.leaves[0].nbytes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN", True),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256>",
            True,
        ),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", True),
        ("ampere_sgemm_128x64_nn", True),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", True),
        ("Cijk_Ailk_Bljk_BBS_BH_Bias_MT256x256x64_MI16x16x1", True),
        ("aten::addmm", True),
        ("aten::mm", True),
        ("aten::mul", False),
        ("exponentiate_rows", False),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            False,
        ),
        ("Memcpy DtoD (Device -> Device)", False),
    ],
)
def test_names_of_matrix_products_are_recognised(name, expected):
    assert profiling.is_product(name) is expected


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--toy"], "--toy needs --report"),
        (["--report", "x"], "--report on a CPU needs --toy"),
        (["head", "--report", "x", "--toy"], "--report takes only"),
        (["--report", "x", "--toy", "--json", "y"], "--report takes only"),
        (["--report", "x", "--toy", "--minutes", "0"], "--minutes must be above 0"),
    ],
)
def test_wrong_options_of_report_exit_with_a_message(capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_figure_of_work_with_plain_contender_is_drawn(tmp_path):
    """The colour of every contender is known."""
    from torch_nnmath.bench import plot

    for work in (*WORKS.values(), *gpu_works.ALL):
        assert {*work.contenders} <= {*plot.COLOURS}
