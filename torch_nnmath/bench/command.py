"""The command `python -m torch_nnmath bench`: its options, tables and JSON file."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torch_nnmath.bench import gpu_report, plot
from torch_nnmath.bench.machine import describe_machine, format_machine
from torch_nnmath.bench.measure import Measurement, measure_work
from torch_nnmath.bench.tables import align_columns, evaluate_targets, format_table, format_targets
from torch_nnmath.bench.work import Size, Work, format_dtype, format_size
from torch_nnmath.bench.works import WORKS, scaling, select_works


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, which is 0 even if a target is missed.

    With `--report` it is 1 if a stage of the report failed.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    works, sizes = check_arguments(parser, arguments)
    device = arguments.device
    if arguments.list:
        print(format_list(device))
        return 0
    if arguments.report:
        folder = Path(arguments.report)
        run = gpu_report.Run(folder.absolute(), device, arguments.toy, 60 * arguments.minutes)
        return gpu_report.run_report(run)
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
    parser.add_argument(
        "--report",
        metavar="FOLDER",
        help="measure, test and verify everything that needs a GPU, and write it to this folder; "
        "see the page On a GPU (docs/gpu.md)",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="how long the report takes (default: 10)"
    )
    parser.add_argument(
        "--toy", action="store_true", help="the report with tiny sizes, which a CPU can run, too"
    )
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
    check_report_arguments(parser, arguments)
    for file in filter(None, (arguments.json, arguments.plot)):
        if not Path(file).absolute().parent.is_dir():
            parser.error(f"{file}: there is no such directory")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")
    if arguments.plot and scaling in works and len(works) > 1:
        parser.error("--plot: scaling has a figure of its own; run it alone")
    return works, sizes


def check_report_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exits with an error if the options of the report do not fit together."""
    if not arguments.report:
        if arguments.toy:
            parser.error("--toy needs --report")
        return
    if arguments.works or arguments.sizes or arguments.dtype or arguments.json or arguments.plot:
        parser.error("--report takes only --device, --minutes and --toy")
    if arguments.device == "cpu" and not arguments.toy:
        parser.error("--report on a CPU needs --toy: the sizes are those of a GPU")
    if not arguments.minutes > 0:
        parser.error("--minutes must be above 0")


def format_list(device: str) -> str:
    """Returns the list of works, one per line."""
    rows, notes = [], []
    for work in WORKS.values():
        sizes = ", ".join(map(format_size, work.default_sizes(device)))
        rows.append((work.name, format_dtype(work.dtype)))
        notes.append(f"{work.description}; {'x'.join(work.axes)}: {sizes}")
    return "\n".join(align_columns(rows, notes))
