"""`python -m torch_nnmath bench`: how fast and how lean, side by side with what else there is."""

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

from torch_nnmath.bench import draw
from torch_nnmath.bench.measure import MIB, Measured, measured
from torch_nnmath.bench.works import WORKS, Size, Work, chosen, name_of, scaling, written


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
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


def described(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}, Python {machine['python']}, {machine['platform']}"
    )


COLUMNS = ("", "time", "spread", "ours / it", "(quartiles)", "it / floor", "peak", "error")


def table(found: dict[str, Any]) -> str:
    """The contenders of a work at one size, and why who is missing is missing."""
    title = f"{found['name']} {written(found['size'])} {found['dtype']}, {found['rounds']} rounds"
    if found["floor"]:
        title += f"; floor: {found['floor']}"
    rows, notes = [COLUMNS], [""]
    for name, one in found["contenders"].items():
        time, (low, high) = one["median"], one["quartiles"] or (0, 0)
        ratio, floor, peak, error = (
            one[key] for key in ("ours_over_it", "over_floor", "peak", "error")
        )
        row = (
            name,
            duration(time) if time else "-",
            duration(high - low) if time else "-",
            f"{ratio['median']:.2f}" if ratio else "-",
            "({:.2f} to {:.2f})".format(*ratio["quartiles"]) if ratio else "-",
            f"{floor['median']:.2f}" if floor else "-",
            "-" if peak is None else f"{peak / MIB:.0f} MiB",
            "-" if error is None else f"{error:.1e}",
        )
        rows.append(row)
        notes.append(one["reason"] or "")
    return "\n".join([title, *aligned(rows, notes)])


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    value = seconds * scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def judged(work: Work, found: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """Each target of a work at each size that it is for: its value, or why there is none."""
    dtype = name_of(found[0].dtype)
    for target in work.targets:
        row = {"target": f"{work.name}: {target}", "dtype": dtype, "limit": target.limit}
        none = {"value": None, "met": None}
        at = [one for one in found if target.size in (None, one.size)]
        if target.kind == "growth":
            at = at[1:][-1:]
        if not at:
            why = "takes two sizes" if target.kind == "growth" else "not run at this size"
            yield {**row, **none, "size": target.size, "reason": why}
        for one in at:
            value = one.value(target, found[0])
            if value is None:
                names = [name for name in (target.of, target.over) if name in one.reasons]
                why = "; ".join(f"{name}: {one.reasons[name]}" for name in names)
                yield {**row, **none, "size": one.size, "reason": why or "not measured"}
            else:
                met = {"value": value, "met": value <= target.limit}
                yield {**row, **met, "size": one.size, "reason": None}


def verdicts(targets: Sequence[dict[str, Any]]) -> str:
    """The table of targets."""
    rows, notes = [("target", "size", "limit", "value")], [""]
    for one in targets:
        size = f"{written(one['size'])} {one['dtype']}" if one["size"] else ""
        value = "-" if one["value"] is None else f"{one['value']:.3g}"
        rows.append((one["target"], size, f"{one['limit']:.3g}", value))
        notes.append(one["reason"] or ("met" if one["met"] else "missed"))
    return "\n".join(aligned(rows, notes))


def aligned(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> list[str]:
    """Columns, the first to the left, the others to the right, and a note behind each row."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
    return [f"  {line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True)]


def listed(device: str) -> str:
    """The registry, a work a line."""
    works = WORKS.values()
    sizes = [", ".join(map(written, sizes_of(work, device))) for work in works]
    rows = [(work.name, name_of(work.dtype)) for work in works]
    notes = [f"{w.about}; {'x'.join(w.axes)}: {its}" for w, its in zip(works, sizes, strict=True)]
    return "\n".join(aligned(rows, notes))


def sizes_of(work: Work, device: str) -> Sequence[Size]:
    """Those that it is run at by default."""
    return (device == "cuda" and work.cuda_sizes) or work.sizes


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 whether targets are met or not."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_nnmath bench",
        description="Times every function against PyTorch, torch.compile, the machine's floor and, "
        "where they are installed, Liger, CCE and QuACK.",
    )
    parser.add_argument(
        "works", nargs="*", metavar="NAME", help="all but scaling, if none is named"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sizes", metavar="AxBxC,...", help="instead of the works' own")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of rounds for a work at a size (20)"
    )
    parser.add_argument("--json", metavar="FILE", help="write what was found there too")
    parser.add_argument("--plot", metavar="FILE", help="draw it (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="print the works and run none")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    try:
        works = chosen(arguments.works)
        texts = arguments.sizes.split(",") if arguments.sizes else []
        sizes = [[*map(work.size, texts)] or sizes_of(work, device) for work in works]
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        print(listed(device))
        return 0
    for file in filter(None, (arguments.json, arguments.plot)):
        if not Path(file).absolute().parent.is_dir():
            parser.error(f"{file}: there is no such directory")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")
    if arguments.plot and scaling in works and len(works) > 1:
        parser.error("--plot: scaling has a picture of its own, run it by itself")
    about, date = machine(device), datetime.datetime.now().astimezone().isoformat()
    report: dict[str, Any] = {"machine": about, "date": date, "works": [], "targets": []}
    print(described(about), flush=True)
    for work, its_sizes in zip(works, sizes, strict=True):
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else work.dtype
        found: list[Measured] = []
        for size in its_sizes:
            found.append(measured(work, size, dtype, device, arguments.seconds, found))
            report["works"].append(found[-1].as_dict())
            print(f"\n{table(report['works'][-1])}", flush=True)
        report["targets"] += judged(work, found)
    if report["targets"]:
        print(f"\n{verdicts(report['targets'])}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
    if arguments.plot:
        draw.picture(report).savefig(arguments.plot, dpi=150)
    return 0
