"""The command `race`: the checker runs on the heads of other libraries and on this one's.

Each peer computes the mean cross entropy of the classes `t (N,)` for logits x Wᵀ, with `x (N, D)`
and `W (C, D)`. Each runs in a process of its own. On a machine without a GPU those in Triton run in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_nnmath import testing
from torch_nnmath.bench.machine import describe_machine, format_machine
from torch_nnmath.bench.tables import align_columns
from torch_nnmath.race_peers import IGNORE_INDEX, NAN_ROW, PEERS, Head, Peer
from torch_nnmath.testing import Verdict

if TYPE_CHECKING:  # matplotlib is imported only when a figure is drawn
    from matplotlib.figure import Figure

ROWS, FEATURES, CLASSES = 6, 4, 7
SECONDS = 600  # for one peer

CANNOT_RUN, NOT_PROMISED = "cannot run", "not promised"
COLOURS = {
    "right": "#b7e1b0",
    "wrong": "#e8786f",
    "silent zero": "#f48fb1",
    "writes its input": "#e8786f",
    "raises": "#f6c667",
    NOT_PROMISED: "#dddddd",
    "PyTorch cannot": "#c9d8ee",
    "truth unknown": "#ffffff",
    "not applicable": "#ffffff",
    CANNOT_RUN: "#f4f4f4",
}


# Rows: the points at which a peer is called, and the checks


@dataclass(frozen=True)
class RaceRow:
    """A line of the table: a transform of the checker, or a check of its own, at one point.

    `dtype` is None if the peer's own is used. `scale` multiplies the features.
    """

    name: str
    transform: str = ""
    check: Callable[[Head, torch.dtype], Cell] | None = None
    dtype: torch.dtype | None = None
    has_ignored: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Cell:
    """A verdict with the largest relative error and the checker's detail."""

    verdict: str
    error: float | None = None
    detail: str = ""
    not_promised: str = ""  # the source

    def to_dict(self) -> dict[str, Any]:
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {
            "verdict": self.verdict,
            "error": error,
            "detail": self.detail,
            "not_promised": self.not_promised,
        }


def draw_inputs(has_ignored: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns features, weight and classes; with ignored ones, every third row is ignored."""
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    W = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    t = torch.randint(CLASSES, (ROWS,), generator=generator)
    if has_ignored:
        t[::3] = IGNORE_INDEX
    return x, W, t


def define_head(x: Tensor, W: Tensor, t: Tensor) -> Tensor:
    """Computes the mean loss of the kept rows by its definition."""
    keep = t != IGNORE_INDEX
    z = x @ W.T
    losses = z.logsumexp(-1) - z.gather(-1, t.clamp(min=0)[:, None])[:, 0]
    return torch.where(keep, losses, 0).sum() / keep.sum()


def compute_head_gradients(
    head: Head, x: Tensor, W: Tensor, t: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns the loss and, after `backward`, the gradients of x and W."""
    x, W = x.clone().requires_grad_(), W.clone().requires_grad_()
    loss = head(x, W, t)
    loss.backward()
    return loss.detach(), (x.grad, W.grad)


def check_nan_in_ignored_row(head: Head, dtype: torch.dtype) -> Cell:
    """Checks loss and gradients where the features of ignored rows are nan, as padding may be."""
    x, W, t = draw_inputs(has_ignored=True)
    _, exact_gradients = compute_head_gradients(define_head, x, W, t)
    x[t == IGNORE_INDEX] = math.nan
    loss, gradients = compute_head_gradients(head, x.to(dtype), W.to(dtype), t)
    return judge_gradients(gradients, exact_gradients, dtype, f"the loss is {loss.item():.6g}")


def check_all_ignored(head: Head, dtype: torch.dtype) -> Cell:
    """Checks that the gradients are zero if all rows are ignored; the loss may be 0 or nan."""
    x, W, t = draw_inputs()
    t = torch.full_like(t, IGNORE_INDEX)
    loss, gradients = compute_head_gradients(head, x.to(dtype), W.to(dtype), t)
    exact_gradients = torch.zeros_like(x), torch.zeros_like(W)
    return judge_gradients(gradients, exact_gradients, dtype, f"the loss is {loss.item():.6g}")


TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def judge_gradients(
    gradients: Sequence[Tensor | None],
    exact_gradients: Sequence[Tensor | None],
    dtype: torch.dtype,
    detail: str,
) -> Cell:
    """Returns whether the gradients are within the tolerance; a gradient of None is zero."""
    errors = []
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert exact is not None
        gradient = torch.zeros_like(exact) if gradient is None else gradient.double()
        size = exact.abs().max().item()
        distance = (gradient - exact).abs().max().item()
        errors.append(distance / size if size else distance)
    error = math.inf if any(map(math.isnan, errors)) else max(errors)
    verdict = Verdict.RIGHT if error <= TOLERANCE[dtype] else Verdict.WRONG
    if not math.isfinite(error):
        detail = f"a gradient is nan or infinite; {detail}"
    return Cell(str(verdict), error, detail)


RACE_ROWS = (
    RaceRow("value", "value"),
    RaceRow("gradient", "gradient"),
    RaceRow("frozen weight, frozen features", "frozen inputs"),
    RaceRow("second backward, accumulation", "retained graph"),
    RaceRow("interleaved calls", "interleaved calls"),
    RaceRow("edited before backward", "edited before backward"),
    RaceRow("checkpoint", "checkpoint"),
    RaceRow("second order", "second order"),
    RaceRow("forward mode", "forward mode"),
    RaceRow("forward over reverse", "forward over reverse"),
    RaceRow("torch.func.vjp", "vjp"),
    RaceRow("vmap", "vmap"),
    RaceRow("per-sample gradients", "per-sample gradients"),
    RaceRow("batched upstream gradients", "batched gradients"),
    RaceRow("compile, full graph", "compile"),
    RaceRow("autocast bfloat16", "autocast bfloat16"),
    RaceRow("ignored rows", "gradient", has_ignored=True),
    RaceRow(NAN_ROW, check=check_nan_in_ignored_row),
    RaceRow("all rows ignored", check=check_all_ignored),
    RaceRow("logits of some hundreds", "gradient", scale=100.0),
    RaceRow("float32", "gradient", dtype=torch.float32),
    RaceRow("bfloat16", "gradient", dtype=torch.bfloat16),
    RaceRow("float16", "gradient", dtype=torch.float16),
)

# The race


def race_peer(peer: Peer, rows: Sequence[RaceRow] = RACE_ROWS) -> dict[str, Any]:
    """Returns the peer's call, its versions and its cells by row, as plain values.

    A peer whose first call raises cannot run: each of its cells has that error as the detail.
    """
    result: dict[str, Any] = {
        "call": peer.call,
        "versions": find_versions(peer.packages),
        "dtype": format_dtype(peer.dtype),
        "reason": "",
    }
    x, W, t = draw_inputs()
    try:
        head = peer.load()
        loss = head(x.to(peer.dtype).requires_grad_(), W.to(peer.dtype), t)
        loss.backward()
    except Exception as error:  # a library that cannot run here may raise anything
        result["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        cell = Cell(CANNOT_RUN, detail=result["reason"]).to_dict()
        return {**result, "cells": {row.name: cell for row in rows}}
    cells = {row.name: judge(peer, head, row).to_dict() for row in rows}
    return {**result, "cells": cells}


def judge(peer: Peer, head: Head, row: RaceRow) -> Cell:
    """Returns the verdict on a peer in one row.

    An error in a row that the peer does not promise is no fault: the verdict is "not promised". A
    wrong result or a silent zero stays one, with the source that does not promise it.
    """
    torch.compiler.reset()  # else a compiled head reaches its limit of graphs and runs eagerly
    dtype = row.dtype or peer.dtype
    if row.check:
        if not peer.differentiates_weight:
            head = detach_weight(head)
        try:
            cell = row.check(head, peer.dtype)
        except Exception as error:  # the peer may raise any exception
            cell = Cell(str(Verdict.RAISES), detail=f"{type(error).__name__}: {error}"[:300])
    else:
        x, W, t = draw_inputs(row.has_ignored, row.scale)
        x.requires_grad_()
        W.requires_grad_(peer.differentiates_weight)
        report = testing.check(
            head, [x, W, t], reference=define_head, transforms=[row.transform], dtype=dtype
        )
        result = report[row.transform]
        cell = Cell(str(result.verdict), result.error, result.detail)
    source = peer.limits.get(row.name, "")
    is_right = cell.verdict in (Verdict.RIGHT, Verdict.NOT_APPLICABLE)
    if not source or is_right:
        return cell
    verdict = NOT_PROMISED if cell.verdict in (Verdict.RAISES, Verdict.CANNOT) else cell.verdict
    return Cell(verdict, cell.error, cell.detail, source)


def detach_weight(head: Head) -> Head:
    return lambda x, W, t: head(x, W.detach(), t)


def find_versions(packages: Sequence[str]) -> str:
    """Returns each package with its version, and PyTorch with its own if there is none."""
    versions = []
    for package in packages or ("torch",):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} is not installed")
    return ", ".join(versions)


def format_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def race_in_process(name: str) -> dict[str, Any]:
    """Runs one peer in a process of its own and returns its result.

    A crash, or more than `SECONDS`, ends only this peer.
    """
    peer = PEERS[name]
    environment = dict(os.environ)
    if peer.is_triton and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        # Inductor's cache may return code compiled for other settings, which can be wrong here.
        environment["TORCHINDUCTOR_CACHE_DIR"] = folder
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch_nnmath", "race", name, "--worker", str(file)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
            reason = f"its process ends with status {done.returncode}: {done.stderr[-200:]}"
        except subprocess.TimeoutExpired:
            reason = f"it needs more than {SECONDS} s"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
    cell = Cell(CANNOT_RUN, detail=reason).to_dict()
    return {
        "call": peer.call,
        "versions": find_versions(peer.packages),
        "dtype": format_dtype(peer.dtype),
        "reason": reason,
        "cells": {row.name: cell for row in RACE_ROWS},
    }


# The report


def format_cell(cell: Mapping[str, Any]) -> str:
    """Returns the verdict with its error, and with * if the peer does not promise the row."""
    verdict, error = cell["verdict"], cell["error"]
    star = "*" if cell["not_promised"] and verdict != NOT_PROMISED else ""
    has_number = verdict in ("right", "wrong", "silent zero") and error is not None
    return f"{verdict}{star} {error:.0e}" if has_number else f"{verdict}{star}"


def format_report(report: Mapping[str, Any]) -> str:
    """Returns the text: for each peer its version, its call and a line for each row."""
    lines = [format_machine(report["machine"]), report["date"], "", LEGEND]
    for name, peer in report["peers"].items():
        lines += ["", f"{name}: {peer['versions']}, {peer['dtype']}", f"  {peer['call']}"]
        if peer["reason"]:
            lines.append(f"  cannot run: {peer['reason']}")
            continue
        rows = [(f"  {row}", format_cell(cell)) for row, cell in peer["cells"].items()]
        notes = [
            " ".join(filter(None, (cell["not_promised"] and f"[{cell['not_promised']}]", detail)))
            for cell, detail in ((cell, shorten(cell["detail"])) for cell in peer["cells"].values())
        ]
        lines += align_columns(rows, notes)
    return "\n".join(line.rstrip() for line in lines) + "\n"


LEGEND = (
    "Numbers are the largest error relative to the exact tensor's largest entry.\n"
    "not promised: raises, and the peer does not promise it. *: a silent fault that the peer does "
    "not promise to avoid."
)


def shorten(text: str, length: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def format_markdown(report: Mapping[str, Any]) -> str:
    """Returns the tables of docs/race.md: verdicts, and how each peer is called."""
    peers = {name: peer for name, peer in report["peers"].items() if not peer["reason"]}
    lines = [f"| | {' | '.join(peers)} |", f"| --- |{' --- |' * len(peers)}"]
    for row in next(iter(report["peers"].values()))["cells"]:
        cells = " | ".join(
            format_cell(peer["cells"][row]).replace("*", "\\*") for peer in peers.values()
        )
        lines.append(f"| {row} | {cells} |")
    lines += ["", "| peer | version | precision | call |", "| --- | --- | --- | --- |"]
    for name, peer in report["peers"].items():
        reason = shorten(peer["reason"]).replace("|", "\\|")
        note = f". Cannot run here: {reason}" if reason else ""
        lines.append(f"| {name} | {peer['versions']} | {peer['dtype']} | `{peer['call']}`{note} |")
    return "\n".join(lines) + "\n"


def plot_report(report: Mapping[str, Any]) -> Figure:
    """Plots the table: a coloured cell with its verdict for each row and peer."""
    from matplotlib.figure import Figure

    peers = report["peers"]
    rows = [*next(iter(peers.values()))["cells"]]
    size = (2.6 + 1.05 * len(peers), 1.6 + 0.3 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for i, peer in enumerate(peers.values()):
        for k, row in enumerate(rows):
            cell = peer["cells"][row]
            axes.barh(k, 0.96, left=i - 0.48, height=0.92, color=COLOURS[cell["verdict"]])
            text = format_cell(cell)
            axes.text(i, k, text, ha="center", va="center", fontsize=6)
    axes.set_xlim(-0.5, len(peers) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(peers)), [name.replace(" ", "\n") for name in peers], fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    note = f"{report['machine']['cpu']}, PyTorch {report['machine']['torch']}. {LEGEND}"
    figure.supxlabel(note, fontsize=7, color="0.4")
    return figure


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, which is 1 if this library is at fault."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_nnmath race",
        description="Checks the heads of all installed libraries, and this one's, under every "
        "transform. A peer that cannot run here says why.",
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--text", metavar="FILE", help="write the printed text to this file")
    parser.add_argument("--plot", metavar="FILE", help="plot the table (needs matplotlib)")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables of docs/race.md")
    parser.add_argument("--jobs", type=int, default=1, help="peers that run at the same time")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in arguments.peers:
        if name not in PEERS:
            parser.error(f"no peer {name!r}; there are {', '.join(PEERS)}")
    names: list[str] = arguments.peers or [*PEERS]
    if arguments.worker:
        result = json.dumps(race_peer(PEERS[names[0]]))
        Path(arguments.worker).write_text(result, encoding="utf-8")
        return 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = [*pool.map(race_in_process, names)]
    report: dict[str, Any] = {
        "machine": describe_machine("cpu"),
        "date": datetime.datetime.now().astimezone().isoformat(),
        "peers": dict(zip(names, results, strict=True)),
    }
    text = format_report(report)
    print(text, end="")
    outputs = {
        arguments.json: json.dumps(report, indent=1),
        arguments.text: text,
        arguments.markdown: format_markdown(report),
    }
    for file, content in outputs.items():
        if file:
            Path(file).write_text(content, encoding="utf-8")
    if arguments.plot:
        plot_report(report).savefig(arguments.plot, dpi=150)
    return int("ours" in names and has_fault(report["peers"]["ours"]))


def has_fault(result: Mapping[str, Any]) -> bool:
    """Whether a verdict of the peer is a fault."""
    verdicts = [Verdict(cell["verdict"]) for cell in result["cells"].values()]
    return any(verdict.is_fault for verdict in verdicts)
