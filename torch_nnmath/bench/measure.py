"""The measurements: time in alternating rounds in one process, peak memory in a fresh process."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from torch_nnmath._memory import MIB, read_available, read_peak, reset_peak
from torch_nnmath.bench import works
from torch_nnmath.bench.work import (
    Problem,
    Results,
    Size,
    Target,
    Work,
    format_dtype,
    format_size,
)
from torch_nnmath.testing._report import describe_error

MIN_SAMPLE_SECONDS = 2e-3  # shorter calls are repeated until a sample takes this long
MAX_CALL_SECONDS = 20.0  # a contender with a slower call is dropped
TOO_SLOW = f"a call takes more than {MAX_CALL_SECONDS:.0f} s"
MIN_ARGUMENT_BYTES = 2**20  # with smaller arguments, noise exceeds the peak
GIB = 2**30

Call = Callable[[], object]
Timer = Callable[[Call, int], float]


class RepeatedCall(NamedTuple):
    """A call, and how many calls in a row make one sample."""

    call: Call
    repeats: int


class ContenderError(Exception):
    """Raised when a contender cannot be measured. The message is the reason to print."""


def make_wall_clock(device: str) -> Timer:
    """Returns a timer, which measures the mean seconds of `repeats` calls in a row.

    On a GPU it synchronises before and after them.
    """
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None

    def time_calls(call: Call, repeats: int) -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(repeats):
            call()  # the result is not assigned, so that it is freed before the next call
        synchronise()
        return (time.perf_counter() - start) / repeats

    return time_calls


def compute_spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high]}


@dataclass
class Measurement:
    """The results of a work at one size, by contender.

    Samples are in seconds, one for each round; peaks in bytes; errors are relative. `reasons`
    tells why a contender has no result.
    """

    work: Work
    size: Size
    dtype: torch.dtype
    samples: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.work.name} {format_size(self.size)} {format_dtype(self.dtype)}"

    def ratio(self, contender: str, baseline: str) -> dict[str, Any] | None:
        """Returns the spread of the ratios of times, one ratio for each round.

        Paired ratios are insensitive to a machine that is slow for a whole round.
        """
        if contender not in self.samples or baseline not in self.samples:
            return None
        return compute_spread([a / b for a, b in self._pair_samples(contender, baseline)])

    def evaluate(self, target: Target, first: Measurement) -> float | None:
        """Returns the value that the target limits, or None if it was not measured.

        `first` is the measurement at the work's first size.
        """
        contender, baseline = target.contender, target.baseline
        try:
            match target.kind:
                case "peak":
                    return self.peaks[contender] / MIB
                case "growth":
                    return (self.peaks[contender] - first.peaks[contender]) / MIB
                case "memory":
                    return self.peaks[contender] / self.peaks[baseline]
                case "error":
                    return self.errors[contender] / self.errors[baseline]
                case "difference":
                    pairs = self._pair_samples(contender, baseline)
                    return 1e6 * statistics.median(a - b for a, b in pairs)
                case "time":
                    pairs = self._pair_samples(contender, baseline)
                    return statistics.median(a / b for a, b in pairs)
        except KeyError:  # one of the two could not run
            return None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for the table, the figure and the JSON file."""
        contenders = {}
        for name in (*self.work.contenders, *["floor"] * bool(self.work.floor)):
            is_timed = name in self.samples
            empty = {"median": None, "quartiles": None}
            contenders[name] = {
                **(compute_spread(self.samples[name]) if is_timed else empty),
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
            "dtype": format_dtype(self.dtype),
            "rounds": max(map(len, self.samples.values()), default=0),
            "floor": self.work.floor.description if self.work.floor else None,
            "contenders": contenders,
        }

    def _pair_samples(self, contender: str, baseline: str) -> list[tuple[float, float]]:
        return list(zip(self.samples[contender], self.samples[baseline], strict=True))


def measure_work(
    work: Work,
    size: Size,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    earlier: Sequence[Measurement] = (),
    timer: Timer | None = None,
) -> Measurement:
    """Measures every contender of a work at one size, for about `seconds` of rounds.

    `earlier` has the measurements of the same work at other sizes: a contender that was too slow at
    a smaller size is skipped.
    """
    measurement = Measurement(work, size, dtype)
    torch.compiler.reset()  # otherwise a second size is compiled with dynamic shapes
    problem = work.make_problem(size, dtype, device)
    for name in work.contenders:
        if reason := _find_reason_to_skip(work, name, size, device, earlier):
            measurement.reasons[name] = reason
    if any(work.round_limits):
        _time_contenders(measurement, problem, seconds, timer or make_wall_clock(device))
    if work.measures_memory and sum(x.nbytes for x in problem.args) >= MIN_ARGUMENT_BYTES:
        _measure_peaks(measurement, problem)
    print_progress("")
    return measurement


def _find_reason_to_skip(
    work: Work, name: str, size: Size, device: str, earlier: Sequence[Measurement]
) -> str | None:
    """Returns why a contender must be skipped, or None.

    A contender is skipped if its logits need too much memory or it was too slow at a smaller size.
    """
    if work.contenders[name].materialises_logits:
        needed = 3 * size[0] * size[-1] * 4 / GIB  # three copies of the logits in float32
        available = read_available(torch.device(device)) / GIB
        if needed > available / 2:
            return (
                f"needs about {needed:.0f} GiB, more than half of the {available:.0f} GiB available"
            )
    for other in earlier:
        reason = other.reasons.get(name, "")
        if reason.startswith(TOO_SLOW) and math.prod(other.size) <= math.prod(size):
            return reason
    return None


def _time_contenders(
    measurement: Measurement, problem: Problem, seconds: float, timer: Timer
) -> None:
    """Adds errors and samples to the measurement, the floor's samples included."""
    work, truth = measurement.work, None
    if work.measures_error:
        print_progress(f"{measurement}: reference in float64")
        with contextlib.suppress(torch.OutOfMemoryError):
            truth = work.prepare("eager", problem.copy(torch.float64))()
    runs: dict[str, RepeatedCall] = {}
    for name, contender in work.contenders.items():
        if name in measurement.reasons:
            continue
        print_progress(f"{measurement}: warming up {name}")
        try:
            call = work.prepare(name, problem)
            results = call()
            if truth and contender.is_equivalent:
                measurement.errors[name] = compute_error(results, truth)
            del results
            runs[name] = RepeatedCall(call, count_repeats(call, timer))
        except Exception as error:  # other libraries raise any exception; the table shows it
            measurement.reasons[name] = format_reason(error)
    del truth
    if work.floor:
        floor = work.floor.prepare(problem)
        floor()
        runs["floor"] = RepeatedCall(floor, count_repeats(floor, timer))
    measurement.samples = time_rounds(
        runs, timer, seconds, work.round_limits, measurement.reasons, str(measurement)
    )


def format_reason(error: Exception) -> str:
    """Returns, in one line, why a contender has no result."""
    return str(error) if isinstance(error, ContenderError) else describe_error(error)


def count_repeats(call: Call, timer: Timer) -> int:
    """Returns how many calls a sample needs to be long enough for the clock."""
    repeats, seconds = 1, timer(call, 1)
    if seconds > MAX_CALL_SECONDS:
        raise ContenderError(f"{TOO_SLOW}: {seconds:.0f} s")
    while repeats * seconds < MIN_SAMPLE_SECONDS:
        repeats *= 2
        seconds = timer(call, repeats)
    return repeats


def time_rounds(
    runs: Mapping[str, RepeatedCall],
    timer: Timer,
    seconds: float,
    limits: tuple[int, int],
    reasons: dict[str, str],
    title: str = "",
) -> dict[str, list[float]]:
    """Returns the samples of each contender, one for each round.

    A contender that raises is dropped, and its error is added to `reasons`. The order within a
    round is random. In a fixed order, each contender would always run after the same other one,
    which leaves the caches and the heap in the same state.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names, start, rounds, total = list(runs), time.perf_counter(), 0, limits[0]
    order = random.Random(0)
    while rounds < total:
        print_progress(f"{title}: round {rounds + 1} of about {total}", is_transient=True)
        for name in names:
            try:
                samples[name].append(timer(*runs[name]))
            except Exception as error:  # memory may run out in a later round
                reasons[name] = format_reason(error)
        names = [name for name in names if name not in reasons]
        order.shuffle(names)
        rounds += 1
        affordable = int(seconds * rounds / (time.perf_counter() - start))
        total = min(max(affordable, limits[0]), limits[1])
    return {name: times for name, times in samples.items() if name not in reasons}


def compute_error(results: Results, truth: Results) -> float:
    """Returns the largest relative error of the gradients, or of the value if there are none."""
    pairs = zip(results[1:] or results, truth[1:] or truth, strict=True)
    return max(((g.double() - t).norm() / t.norm()).item() for g, t in pairs)


def _measure_peaks(measurement: Measurement, problem: Problem) -> None:
    """Adds the peaks to the measurement."""
    work = measurement.work
    # The system maps memory in pages of up to 2 MiB. A ratio needs the median to reduce this noise.
    times = 3 if any(target.kind == "memory" for target in work.targets) else 1
    for name in work.contenders:
        if name in measurement.reasons:
            continue
        print_progress(f"{measurement}: peak memory of {name}")
        try:
            peaks = [measure_contender_peak(measurement, name, problem) for _ in range(times)]
            measurement.peaks[name] = int(statistics.median(peaks))
        except Exception as error:  # as in `_time_contenders`
            measurement.reasons[name] = f"peak memory: {format_reason(error)}"


def measure_contender_peak(measurement: Measurement, name: str, problem: Problem) -> int:
    """Returns a contender's peak in bytes. On a CPU, a fresh process measures it."""
    if problem.args[0].is_cuda:
        call = measurement.work.prepare(name, problem)
        call()  # compiles and tunes
        return measure_peak(call, problem)
    code = f"from {__name__} import print_peak; import sys; print_peak(*sys.argv[1:])"
    size, dtype = format_size(measurement.size), format_dtype(measurement.dtype)
    command = [sys.executable, "-c", code, measurement.work.name, size, dtype, name]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if process.returncode:
        messages = process.stderr.splitlines() or [f"exit status {process.returncode}"]
        raise ContenderError(messages[-1])
    return json.loads(process.stdout.splitlines()[-1])


def print_peak(work_name: str, size_text: str, dtype_name: str, contender_name: str) -> None:
    """Prints a contender's peak in bytes. The process must have run nothing else.

    A small first call loads libraries, whose memory is not the contender's. A compiled contender
    is specialised to the size, so its first call has the full size.
    """
    work, dtype = works.WORKS[work_name], getattr(torch, dtype_name)
    size = work.parse_size(size_text)
    problem = work.make_problem(size, dtype, "cpu")
    call = work.prepare(contender_name, problem)
    if work.contenders[contender_name].is_compiled:
        call()
    else:
        small_size = tuple(min(n, 32) for n in size)
        work.prepare(contender_name, work.make_problem(small_size, dtype, "cpu"))()
    print(measure_peak(call, problem))


def measure_peak(call: Callable[[], Results], problem: Problem) -> int:
    """Returns the peak of a call in bytes, less its results and the memory in use before it."""
    gc.collect()
    device = problem.args[0].device
    before = reset_peak(device)
    results = call()
    peak = read_peak(device)
    result_bytes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    for x in problem.args:  # Liger writes its gradient over the logits, which are an argument
        result_bytes.pop(x.untyped_storage().data_ptr(), None)
    return max(0, peak - before - sum(result_bytes.values()))


def print_progress(text: str, is_transient: bool = False) -> None:
    """Prints progress on stderr: on a terminal in one line, elsewhere only lasting messages."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
    elif text and not is_transient:
        print(text, file=sys.stderr, flush=True)
