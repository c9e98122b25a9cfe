"""`python -m torch_nnmath.bench.stages NAME FOLDER`: one stage of the GPU's report.

Results are written after each step, so that a stage which is killed keeps what it has.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_nnmath.bench import gpu_works, plot, profiling
from torch_nnmath.bench.machine import describe_machine, format_machine
from torch_nnmath.bench.measure import Measurement, format_reason, make_wall_clock, measure_work
from torch_nnmath.bench.tables import (
    align_columns,
    evaluate_targets,
    format_duration,
    format_table,
    format_targets,
)
from torch_nnmath.bench.work import Size, Work, format_dtype, format_size

ROUND_SECONDS = 1.5  # of timing, for each work at each size
TOY_ROUND_SECONDS = 0.02
RESERVED_SHARE = 0.1  # of a stage's time, kept free for its pictures and the end of its process
MIN_CORES = 8  # with fewer, the verification is the quick one
PACKAGES = (
    "triton",
    "pytorch-triton",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "transformers",
    "lightning",
    "numpy",
)


class Context(NamedTuple):
    """What a stage is given, and its results, which are written to `folder/name.json`."""

    name: str
    folder: Path
    device: str
    is_toy: bool
    deadline: float  # by time.monotonic()
    results: dict[str, Any]
    steps: list[float]  # when each step began, and the stage itself

    def write(self) -> None:
        """Writes the results. A reader never sees half of them."""
        part = self.folder / f"{self.name}.json.part"
        part.write_text(json.dumps(self.results, indent=2), encoding="utf-8")
        part.replace(self.folder / f"{self.name}.json")

    def save(self, name: str, make_figure: Callable[[], Any]) -> None:
        """Saves a figure, if matplotlib is installed."""
        if importlib.util.find_spec("matplotlib") is None:
            print(f"no picture {name}.png: matplotlib is not installed")
        else:
            make_figure().savefig(self.folder / f"{name}.png", dpi=150)

    def starts_step(self, title: str) -> bool:
        """Whether there is time for another step, as long as the longest so far.

        If not, adds the title to the results' "not_run".
        """
        self.steps.append(time.monotonic())
        longest = max(b - a for a, b in itertools.pairwise(self.steps))
        if self.steps[-1] + longest < self.deadline:
            return True
        self.results["not_run"].append(title)
        return False

    @property
    def note(self) -> str:
        return plot.describe_briefly(self.results["machine"])

    def sizes_of(self, work: Work) -> tuple[Size, ...]:
        return work.sizes if self.is_toy else work.cuda_sizes


# Environment


def report_environment(context: Context) -> int:
    """Prints and writes devices, versions, and the rates of a product and of a copy."""
    results = context.results
    results["packages"] = {name: find_version(name) for name in PACKAGES}
    if context.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        results["device"] = {
            "name": properties.name,
            "memory": properties.total_memory,
            "processors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability()),
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
        results["driver"] = query_driver()
    context.write()
    results["rates"] = measure_rates(context)
    context.write()
    for name, value in results.items():
        if name != "machine":
            print(f"{name}: {json.dumps(value, indent=2)}", flush=True)
    rates = {name: {name: rate["per_second"]} for name, rate in results["rates"].items()}
    context.save(context.name, lambda: plot.plot_values(rates, "per second", context.note))
    return 0


def find_version(package: str) -> str | None:
    """Returns the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def query_driver() -> str:
    """Returns what nvidia-smi says of the driver, clocks and power limits; it changes nothing."""
    fields = (
        "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    )
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"


def measure_rates(context: Context) -> dict[str, dict[str, float]]:
    """Returns the rates of a product in bfloat16, in FLOP/s, and of a copy, in bytes/s."""
    n, nbytes = (64, 2**16) if context.is_toy else (8192, 2**31)
    a = torch.ones(n, n, dtype=torch.bfloat16, device=context.device)
    source = torch.zeros(nbytes // 8, dtype=torch.int64, device=context.device)
    product, copy = torch.empty_like(a), torch.empty_like(source)
    timer, rates = make_wall_clock(context.device), {}
    for name, call, amount in (
        ("product of bfloat16 matrices, FLOP", lambda: torch.mm(a, a, out=product), 2 * n**3),
        ("copy, bytes read and written", lambda: copy.copy_(source), 2 * nbytes),
    ):
        call()
        seconds = timer(call, 10)
        rates[name] = {"seconds": seconds, "per_second": amount / seconds}
    return rates


# Works


def measure_head(context: Context) -> int:
    return measure_works(context, [(gpu_works.head, None)])


def measure_options(context: Context) -> int:
    return measure_works(context, [(work, None) for work in gpu_works.options])


def measure_second(context: Context) -> int:
    dtypes = (torch.bfloat16, torch.float32)
    return measure_works(context, [(gpu_works.second, dtype) for dtype in dtypes])


def measure_rows(context: Context) -> int:
    pairs = [(work, d) for d in (torch.bfloat16, torch.float32) for work in gpu_works.rows]
    return measure_works(context, [*pairs, (gpu_works.compiled_row, None)])


def measure_works(context: Context, pairs: Sequence[tuple[Work, torch.dtype | None]]) -> int:
    """Measures works, each in a dtype or in its own, and returns 1 if one failed.

    A work fails if this library cannot run it. What is left when the time is up is named in
    "not_run".
    """
    results = context.results
    results |= {"works": [], "targets": [], "failures": [], "not_run": []}
    seconds = TOY_ROUND_SECONDS if context.is_toy else ROUND_SECONDS
    for work, dtype in pairs:
        dtype, targets = dtype or work.dtype, results["targets"]
        measurements: list[Measurement] = []
        work = remove_compiled(work) if context.is_toy else work
        for size in context.sizes_of(work):
            title = f"{work.name} {format_size(size)} {format_dtype(dtype)}"
            if not context.starts_step(title):
                continue
            try:
                measurement = measure_work(work, size, dtype, context.device, seconds, measurements)
                measurements.append(measurement)
                results["works"].append(measurement.to_dict())
                print(f"\n{format_table(results['works'][-1])}", flush=True)
                if "ours" in measurement.reasons:
                    results["failures"].append(f"{title}: {measurement.reasons['ours']}")
            except Exception as error:  # memory may run out, or CUDA fail; the others still count
                results["failures"].append(f"{title}: {format_reason(error)}")
                print(f"\n{results['failures'][-1]}", flush=True)
            free_memory(context.device)
            if measurements:
                results["targets"] = [*targets, *evaluate_targets(work, measurements)]
            context.write()
    if results["targets"]:
        print(f"\n{format_targets(results['targets'])}")
    context.write()
    for baseline in ("eager", "floor"):
        if any(has_ratios(work, baseline) for work in results["works"]):
            name = context.name if baseline == "eager" else f"{context.name}-over-floor"
            context.save(
                name, functools.partial(plot.plot_bars, results["works"], context.note, baseline)
            )
    return report_failures(results["failures"])


def has_ratios(result: dict[str, Any], baseline: str) -> bool:
    """Whether a contender was timed beside the baseline."""
    contenders = result["contenders"].items()
    return any(values[f"over_{baseline}"] for name, values in contenders if name != baseline)


def remove_compiled(work: Work) -> Work:
    """Returns the work without contenders that a compiler takes long for."""
    return replace(work, contenders=gpu_works.without_compile(work.contenders))


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def report_failures(failures: Sequence[str]) -> int:
    """Prints what failed and returns the exit status."""
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    return int(bool(failures))


# Errors


def measure_errors(context: Context) -> int:
    """Compares the loss and each gradient with the plain expression in float64."""
    results = context.results
    results |= {"errors": [], "failures": [], "not_run": []}
    rows: list[tuple[str, ...]] = [("", "dtype", "loss", "dx", "dW")]
    notes = [""]
    works = [gpu_works.errors, gpu_works.sharp_errors, *gpu_works.options]
    for work, dtype in iterate_error_pairs(works):
        size = gpu_works.errors.cuda_sizes[0] if not context.is_toy else work.sizes[0]
        title = f"{work.name} {format_size(size)} {format_dtype(dtype)}"
        if not context.starts_step(title):
            continue
        problem = work.make_problem(size, dtype, context.device)
        truth = work.prepare("eager", problem.copy(torch.float64))()
        for name, contender in work.contenders.items():
            if not contender.is_equivalent:
                continue
            try:
                values = work.prepare(name, problem)()
                errors = [compute_error(v, t) for v, t in zip(values, truth, strict=True)]
                rows.append(
                    (f"{work.name} {name}", format_dtype(dtype), *map("{:.1e}".format, errors))
                )
                notes.append("")
                entry = {"work": work.name, "size": list(size), "dtype": format_dtype(dtype)}
                results["errors"].append({**entry, "contender": name, "errors": errors})
            except Exception as error:  # other libraries raise any exception
                rows.append((f"{work.name} {name}", format_dtype(dtype), "-", "-", "-"))
                notes.append(format_reason(error))
                if name == "ours":
                    results["failures"].append(f"{title}: {format_reason(error)}")
        context.write()
        del problem, truth
        free_memory(context.device)
    print("\n".join(["relative errors against float64", *align_columns(rows, notes)]))
    groups: dict[str, dict[str, float]] = {}
    for entry in results["errors"]:
        if entry["dtype"] == "bfloat16":
            groups.setdefault(entry["work"], {})[entry["contender"]] = max(entry["errors"][1:])
    label = "largest relative error of the gradients in bfloat16"
    context.write()
    if groups:
        context.save(context.name, lambda: plot.plot_values(groups, label, context.note))
    return report_failures(results["failures"])


def iterate_error_pairs(works: Sequence[Work]) -> Iterator[tuple[Work, torch.dtype]]:
    """Yields the plain head in three dtypes, then the others in bfloat16."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield works[0], dtype
    for work in works[1:]:
        yield work, torch.bfloat16


def compute_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Returns the relative error in the Euclidean norm."""
    return ((value.double() - truth).norm() / truth.norm()).item()


# Share of the products


def profile_head(context: Context) -> int:
    """Prints what share of the head's kernels' time is in matrix products, and its top kernels."""
    results = context.results
    results |= {"profiles": [], "failures": [], "not_run": []}
    works = (gpu_works.head, gpu_works.second, gpu_works.options[0], *gpu_works.rows)
    groups: dict[str, dict[str, float]] = {}
    for work in works:
        size = work.sizes[0] if context.is_toy else work.cuda_sizes[0]
        title = f"{work.name} {format_size(size)} {format_dtype(work.dtype)}"
        if not context.starts_step(title):
            continue
        try:
            problem = work.make_problem(size, work.dtype, context.device)
            trace = context.folder / f"{context.name}-{work.name}.trace.json"
            profile = profiling.profile_call(work.prepare("ours", problem), context.device, trace)
            del problem
            results["profiles"].append({"work": title, **profile})
            print(f"\n{title}: {format_profile(profile)}", flush=True)
            if profile["kernels"]:
                top = profile["kernels"][:8]
                groups[title] = {
                    f"{k['name'][:60]} x{k['calls']:g}": 1e6 * k["seconds"] for k in top
                }
        except Exception as error:  # as in `measure_works`
            results["failures"].append(f"{title}: {format_reason(error)}")
        free_memory(context.device)
        context.write()
    context.write()
    if groups:
        label = "µs of a call in each kernel"
        context.save(context.name, lambda: plot.plot_values(groups, label, context.note))
    return report_failures(results["failures"])


def format_profile(profile: dict[str, Any]) -> str:
    """Returns the share of the products and the table of kernels."""
    rows, notes = [("time", "share", "calls", "product")], [""]
    for kernel in profile["kernels"]:
        share = kernel["seconds"] / profile["seconds"]
        product = "yes" if kernel["is_product"] else ""
        rows.append(
            (format_duration(kernel["seconds"]), f"{share:.1%}", f"{kernel['calls']:g}", product)
        )
        notes.append(kernel["name"][:140])
    title = (
        f"{profile['product_share']:.1%} in products; kernels {format_duration(profile['seconds'])}"
        f", a call {format_duration(profile['call_seconds'])}"
    )
    return "\n".join([title, *align_columns(rows, notes)])


# Verification


def verify_catalog(context: Context) -> int:
    """Verifies every row of the catalogue, several at the same time in processes of their own."""
    from torch_nnmath.catalog import CATALOG

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    is_quick = context.is_toy or (cores or 1) < MIN_CORES
    names = [row.name for row in CATALOG][: 1 if context.is_toy else None]
    results = context.results
    results |= {"quick": is_quick, "rows": {}, "failures": [], "not_run": [*names]}
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in each of the processes
    spawn = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    workers = min(len(names), max((cores or 1) - 1, 1))
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        # the last rows, of the head, take the longest
        jobs = {
            pool.submit(verify_row, name, context.device, is_quick): name
            for name in reversed(names)
        }
        seconds_left = max(context.deadline - time.monotonic(), 0)
        try:
            for job in concurrent.futures.as_completed(jobs, seconds_left):
                name = jobs[job]
                try:
                    output, faults = job.result()
                except Exception as error:  # a process of the pool died
                    output, faults = "", [f"{name}: {format_reason(error)}"]
                print(output or faults[0], flush=True)
                results["rows"][name] = faults
                results["failures"] += faults
                results["not_run"].remove(name)
                context.write()
        except TimeoutError:
            print(f"time was up before {', '.join(results['not_run'])}", flush=True)
            context.write()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
    counts = {name: float(len(faults)) for name, faults in results["rows"].items()}
    groups = {"faults of each row": counts}
    if counts:
        context.save(context.name, lambda: plot.plot_values(groups, "faults", context.note))
    return report_failures(results["failures"])


def verify_row(name: str, device: str, is_quick: bool) -> tuple[str, list[str]]:
    """Returns the printed lines and the faults of a row of the catalogue."""
    from torch_nnmath import verify
    from torch_nnmath.catalog import CATALOG

    rows = [row for row in CATALOG if row.name == name]
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        outcomes = verify.verify(device, verify.QUICK if is_quick else verify.TRANSFORMS, rows)
    return output.getvalue().rstrip(), outcomes[0].faults


STAGES: dict[str, Callable[[Context], int]] = {
    "environment": report_environment,
    "head": measure_head,
    "head-options": measure_options,
    "head-second": measure_second,
    "head-errors": measure_errors,
    "profile": profile_head,
    "verify": verify_catalog,
    "rows": measure_rows,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a stage and returns 1 if something in it failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m torch_nnmath.bench.stages")
    parser.add_argument("stage", choices=[*STAGES])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    deadline = start + (1 - RESERVED_SHARE) * arguments.seconds
    machine = describe_machine(arguments.device)
    context = Context(
        arguments.stage,
        arguments.folder,
        arguments.device,
        arguments.toy,
        deadline,
        {"machine": machine},
        [start],
    )
    print(format_machine(machine), flush=True)
    return STAGES[arguments.stage](context)


if __name__ == "__main__":
    sys.exit(main())
