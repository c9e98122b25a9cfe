"""How it is measured: times in turn in one process, peak memory each in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torch_nnmath.bench import works
from torch_nnmath.bench.works import Problem, Results, Size, Target, Work, name_of, written
from torch_nnmath.testing._report import describe_error as described

SAMPLE = 2e-3  # seconds: a shorter call is repeated until a sample takes as long
SLOW = 20.0  # seconds: a contender whose call takes longer drops out
TOO_SLOW = f"a call takes more than {SLOW:.0f} s"
SMALL = 2**20  # bytes of arguments: below, a peak says nothing
MIB = 2**20

Call = Callable[[], object]
Timer = Callable[[Call, int], float]


def wall_clock(device: str) -> Timer:
    """Seconds of one of `number` calls in a row; a GPU is waited for before and after them."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timer(call: Call, number: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(number):
            call()  # what it returns is freed before the next one
        wait()
        return (time.perf_counter() - start) / number

    return timer


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high]}


@dataclass
class Measured:
    """What was found at one size. Samples are in seconds, one for each round."""

    work: Work
    size: Size
    dtype: torch.dtype
    samples: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.work.name} {written(self.size)} {name_of(self.dtype)}"

    def ratio(self, of: str, over: str) -> dict[str, Any] | None:
        """Of the rounds' ratios, which do not change with what slows down a whole round."""
        if of not in self.samples or over not in self.samples:
            return None
        pairs = zip(self.samples[of], self.samples[over], strict=True)
        return spread([a / b for a, b in pairs])

    def value(self, target: Target, first: Measured) -> float | None:
        """What a target limits, or None where it was not measured."""
        of, over = target.of, target.over
        try:
            match target.kind:
                case "peak":
                    return self.peaks[of] / MIB
                case "growth":
                    return (self.peaks[of] - first.peaks[of]) / MIB
                case "memory":
                    return self.peaks[of] / self.peaks[over]
                case "error":
                    return self.errors[of] / self.errors[over]
                case "difference":
                    pairs = zip(self.samples[of], self.samples[over], strict=True)
                    return 1e6 * statistics.median(a - b for a, b in pairs)
                case "time":
                    pairs = zip(self.samples[of], self.samples[over], strict=True)
                    return statistics.median(a / b for a, b in pairs)
        except KeyError:  # a contender that could not run
            return None

    def as_dict(self) -> dict[str, Any]:
        """What is printed, drawn and written."""
        contenders = {}
        for name in (*self.work.contenders, *["floor"] * bool(self.work.floor)):
            timed = name in self.samples
            contenders[name] = {
                **(spread(self.samples[name]) if timed else {"median": None, "quartiles": None}),
                "ours_over_it": self.ratio("ours", name),
                "over_eager": self.ratio(name, "eager"),
                "over_floor": self.ratio(name, "floor"),
                "peak": self.peaks.get(name),
                "error": self.errors.get(name),
                "reason": self.reasons.get(name),
            }
        return {
            "name": self.work.name,
            "size": list(self.size),
            "dtype": name_of(self.dtype),
            "rounds": max(map(len, self.samples.values()), default=0),
            "floor": self.work.floor.what if self.work.floor else None,
            "contenders": contenders,
        }


def measured(
    work: Work,
    size: Size,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    before: Sequence[Measured] = (),
    timer: Timer | None = None,
) -> Measured:
    """Every contender of a work at one size, after `before` at others."""
    found = Measured(work, size, dtype)
    torch.compiler.reset()  # or the second size would be compiled for sizes in general
    problem = work.drawn(size, dtype, device)
    for name in work.contenders:
        if reason := _hopeless(work, name, size, device, before):
            found.reasons[name] = reason
    if any(work.rounds):
        _time(found, problem, seconds, timer or wall_clock(device))
    if work.memory and sum(x.nbytes for x in problem.args) >= SMALL:
        # pages come and go by the MiB, which a ratio would show
        times = 3 if any(target.kind == "memory" for target in work.targets) else 1
        for name in work.contenders:
            if name in found.reasons:
                continue
            say(f"{found}: peak memory of {name}")
            try:
                peaks = [_peak_of(found, name, problem) for _ in range(times)]
                found.peaks[name] = int(statistics.median(peaks))
            except Exception as raised:  # as in `_time`
                found.reasons[name] = f"peak memory: {why(raised)}"
    say("")
    return found


def _time(found: Measured, problem: Problem, seconds: float, timer: Timer) -> None:
    work, truth = found.work, None
    if work.error:
        say(f"{found}: the truth, in float64")
        with contextlib.suppress(torch.OutOfMemoryError):
            truth = work.prepared("eager", problem.copy(torch.float64))()
    runs: dict[str, tuple[Call, int]] = {}
    for name, contender in work.contenders.items():
        if name in found.reasons:
            continue
        say(f"{found}: warming up {name}")
        try:
            run = work.prepared(name, problem)
            results = run()
            if truth and contender.same:
                found.errors[name] = error(results, truth)
            del results
            runs[name] = run, repeats(run, timer)
        except Exception as raised:  # whatever a contender cannot do is said in its row
            found.reasons[name] = why(raised)
    del truth
    if work.floor:
        floor = work.floor.prepared(problem)
        floor()
        runs["floor"] = floor, repeats(floor, timer)
    found.samples = rounds(runs, timer, seconds, work.rounds, found.reasons, str(found))


class Failed(Exception):
    """Says by itself why a contender is not measured."""


def why(raised: Exception) -> str:
    """In a line."""
    return str(raised) if isinstance(raised, Failed) else described(raised)


def repeats(run: Call, timer: Timer) -> int:
    """How many calls a sample needs."""
    number, once = 1, timer(run, 1)
    if once > SLOW:
        raise Failed(f"{TOO_SLOW}: {once:.0f} s")
    while number * once < SAMPLE:
        number *= 2
        once = timer(run, number)
    return number


def rounds(
    runs: dict[str, tuple[Call, int]],
    timer: Timer,
    seconds: float,
    limits: tuple[int, int],
    reasons: dict[str, str],
    what: str = "",
) -> dict[str, list[float]]:
    """Each round times each contender once, in an order of its own.

    In one order for all, each would always find the cache and the heap as the same other left them.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names, start, done, total = list(runs), time.perf_counter(), 0, limits[0]
    order = random.Random(0)
    while done < total:
        say(f"{what}: round {done + 1} of about {total}", passing=True)
        for name in names:
            try:
                samples[name].append(timer(*runs[name]))
            except Exception as raised:  # memory may run out late
                reasons[name] = why(raised)
        names = [name for name in names if name not in reasons]
        order.shuffle(names)
        done += 1
        fit = int(seconds * done / (time.perf_counter() - start))
        total = min(max(fit, limits[0]), limits[1])
    return {name: times for name, times in samples.items() if name not in reasons}


def error(results: Results, truth: Results) -> float:
    """The largest relative error of the gradients, or of the value where there are none."""
    pairs = zip(results[1:] or results, truth[1:] or truth, strict=True)
    return max(((g.double() - t).norm() / t.norm()).item() for g, t in pairs)


def _hopeless(
    work: Work, name: str, size: Size, device: str, before: Sequence[Measured]
) -> str | None:
    """Why a contender is not tried: its logits do not fit, or it was too slow at a smaller size."""
    if work.contenders[name].logits:
        need, free = 3 * size[0] * size[-1] * 4 / 2**30, _free(device) / 2**30
        if need > free / 2:
            return f"needs about {need:.0f} GiB, more than half of the {free:.0f} GiB there are"
    for other in before:
        reason = other.reasons.get(name, "")
        if reason.startswith(TOO_SLOW) and math.prod(other.size) <= math.prod(size):
            return reason
    return None


def _free(device: str) -> float:
    """Bytes of memory that can be had."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _proc("meminfo", "MemAvailable") or math.inf


def _proc(file: str, key: str) -> int | None:
    """Bytes, from a line of a file in /proc; None where there is none."""
    path = Path("/proc", file)
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{key}:")), None)


def _peak_of(found: Measured, name: str, problem: Problem) -> int:
    if problem.args[0].is_cuda:
        run = found.work.prepared(name, problem)
        run()  # compiles and tunes
        return peak(run, problem)
    code = f"from {__name__} import child; import sys; child(*sys.argv[1:])"
    arguments = [found.work.name, written(found.size), name_of(found.dtype), name]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        said = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        raise Failed(said[-1])
    return json.loads(done.stdout.splitlines()[-1])


def child(work_name: str, text: str, dtype_name: str, name: str) -> None:
    """Prints the peak of a contender, in a process that has run nothing else.

    What a first call loads is excluded by a tiny one before. What is compiled, and that for one
    size, runs once at that size instead.
    """
    work, dtype = works.WORKS[work_name], getattr(torch, dtype_name)
    size = work.size(text)
    problem = work.drawn(size, dtype, "cpu")
    run = work.prepared(name, problem)
    if work.contenders[name].compiled:
        run()
    else:
        tiny = tuple(min(n, 32) for n in size)
        work.prepared(name, work.drawn(tiny, dtype, "cpu"))()
    print(peak(run, problem))


def peak(run: Callable[[], Results], problem: Problem) -> int:
    """Bytes at the peak of a run beyond those before it and those of what it returns."""
    gc.collect()
    if problem.args[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        high = torch.cuda.max_memory_allocated()
    else:
        before = _high_water(reset=True)
        results = run()
        high = _high_water()
    pieces = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    for x in problem.args:  # Liger's gradient lies where the logits were
        pieces.pop(x.untyped_storage().data_ptr(), None)
    return max(0, high - before - sum(pieces.values()))


def _high_water(reset: bool = False) -> int:
    """The most memory that the process has had, on Linux since the last reset."""
    if sys.platform != "linux":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    if reset:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps what was freed
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _proc("self/status", "VmHWM") or 0


def say(text: str, passing: bool = False) -> None:
    """Progress on stderr: one line, written over, or a line each where it is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
    elif text and not passing:
        print(text, file=sys.stderr, flush=True)
