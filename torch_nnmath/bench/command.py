"""The command `python -m torch_nnmath bench`: its options, tables and JSON file."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_nnmath._memory import MIB
from torch_nnmath.bench import plot
from torch_nnmath.bench.measure import Measurement, measure_work
from torch_nnmath.bench.work import Size, Work, format_dtype, format_size
from torch_nnmath.bench.works import WORKS, scaling, select_works


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, which is 0 even if a target is missed."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    works, sizes = check_arguments(parser, arguments)
    device = arguments.device
    if arguments.list:
        print(format_list(device))
        return 0
    machine, date = describe_machine(device), datetime.datetime.now().astimezone().isoformat()
    report: dict[str, Any] = {"machine": machine, "date": date, "works": [], "targets": []}
    print(format_machine(machine), flush=True)
    for work in works:
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else work.dtype
        measurements: list[Measurement] = []
        for size in sizes[work.name]:
            measurements.append(
                measure_work(work, size, dtype, device, arguments.seconds, measurements)
            )
            report["works"].append(measurements[-1].to_dict())
            print(f"\n{format_table(report['works'][-1])}", flush=True)
        report["targets"] += evaluate_targets(work, measurements)
    if arguments.targets and report["targets"]:
        print(f"\n{format_targets(report['targets'])}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
    if arguments.plot:
        plot.plot_report(report).savefig(arguments.plot, dpi=150)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_nnmath bench",
        description="Times every function against PyTorch, torch.compile, a lower bound (the "
        "floor) and, where they are installed, Liger, CCE and QuACK.",
    )
    parser.add_argument(
        "works",
        nargs="*",
        metavar="NAME",
        help="what to measure, see --list (default: all but scaling)",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sizes", metavar="AxBxC,...", help="sizes to run instead of the defaults")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="how long to time each work at each size (default: 20)",
    )
    parser.add_argument(
        "--targets",
        action="store_true",
        help="also print this project's performance targets and whether they are met",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", metavar="FILE", help="plot the results (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="list the works and exit")
    return parser


def check_arguments(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> tuple[list[Work], dict[str, tuple[Size, ...]]]:
    """Returns the works to run, and their sizes by name; exits with an error if one is invalid."""
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    try:
        works = select_works(arguments.works)
        texts = arguments.sizes.split(",") if arguments.sizes else []
        sizes = {
            work.name: tuple(map(work.parse_size, texts)) or work.default_sizes(device)
            for work in works
        }
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        return works, sizes
    for file in filter(None, (arguments.json, arguments.plot)):
        if not Path(file).absolute().parent.is_dir():
            parser.error(f"{file}: there is no such directory")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")
    if arguments.plot and scaling in works and len(works) > 1:
        parser.error("--plot: scaling has a figure of its own; run it alone")
    return works, sizes


def describe_machine(device: str) -> dict[str, Any]:
    """Returns the hardware and the versions on which the results depend."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "device": device,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def format_machine(machine: dict[str, Any]) -> str:
    """Describes the machine in one line."""
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}, Python {machine['python']}, {machine['platform']}"
    )


COLUMNS = ("", "time", "spread", "ours/this", "(quartiles)", "this/floor", "peak", "error")


def format_table(result: dict[str, Any]) -> str:
    """Returns the table of a work at one size, with the reason for each missing contender."""
    size, dtype, rounds = format_size(result["size"]), result["dtype"], result["rounds"]
    title = f"{result['name']} {size} {dtype}, {rounds} rounds"
    if result["floor"]:
        title += f"; floor: {result['floor']}"
    rows, notes = [COLUMNS], [""]
    for name, values in result["contenders"].items():
        time, (low, high) = values["median"], values["quartiles"] or (0, 0)
        ratio, floor, peak, error = (
            values[key] for key in ("ours_over_it", "over_floor", "peak", "error")
        )
        row = (
            name,
            format_duration(time) if time else "-",
            format_duration(high - low) if time else "-",
            f"{ratio['median']:.2f}" if ratio else "-",
            "({:.2f} to {:.2f})".format(*ratio["quartiles"]) if ratio else "-",
            f"{floor['median']:.2f}" if floor else "-",
            "-" if peak is None else f"{peak / MIB:.0f} MiB",
            "-" if error is None else f"{error:.1e}",
        )
        rows.append(row)
        notes.append(values["reason"] or "")
    return "\n".join([title, *align_columns(rows, notes)])


def format_duration(seconds: float) -> str:
    """Formats a duration with three digits and a unit."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    value = seconds * scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def evaluate_targets(work: Work, measurements: Sequence[Measurement]) -> Iterator[dict[str, Any]]:
    """Yields each target of a work at each size that it applies to.

    A target that could not be evaluated has a reason instead of a value.
    """
    dtype = format_dtype(measurements[0].dtype)
    for target in work.targets:
        row = {"target": f"{work.name}: {target}", "dtype": dtype, "limit": target.limit}
        no_value = {"value": None, "met": None}
        applicable = [m for m in measurements if target.size in (None, m.size)]
        if target.kind == "growth":
            applicable = applicable[1:][-1:]  # the last size, if there are at least two
        if not applicable:
            reason = "needs two sizes" if target.kind == "growth" else "not run at this size"
            yield {**row, **no_value, "size": target.size, "reason": reason}
        for measurement in applicable:
            value = measurement.evaluate(target, measurements[0])
            size, reasons = measurement.size, measurement.reasons
            if value is None:
                missing = [n for n in (target.contender, target.baseline) if n in reasons]
                reason = "; ".join(f"{name}: {reasons[name]}" for name in missing)
                yield {**row, **no_value, "size": size, "reason": reason or "not measured"}
            else:
                result = {"value": value, "met": value <= target.limit}
                yield {**row, **result, "size": size, "reason": None}


def format_targets(targets: Sequence[dict[str, Any]]) -> str:
    """Returns the table of targets with their values."""
    rows, notes = [("target", "size", "limit", "value")], [""]
    for row in targets:
        size = f"{format_size(row['size'])} {row['dtype']}" if row["size"] else ""
        value = "-" if row["value"] is None else f"{row['value']:.3g}"
        rows.append((row["target"], size, f"{row['limit']:.3g}", value))
        notes.append(row["reason"] or ("met" if row["met"] else "missed"))
    return "\n".join(align_columns(rows, notes))


def format_list(device: str) -> str:
    """Returns the list of works, one per line."""
    rows, notes = [], []
    for work in WORKS.values():
        sizes = ", ".join(map(format_size, work.default_sizes(device)))
        rows.append((work.name, format_dtype(work.dtype)))
        notes.append(f"{work.description}; {'x'.join(work.axes)}: {sizes}")
    return "\n".join(align_columns(rows, notes))


def align_columns(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> list[str]:
    """Returns a line for each row: the first column left-aligned, others right, then the note."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
    return [f"  {line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True)]
