"""Pictures of a report as the command writes it: its bars, or how the head scales."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from torch_nnmath.bench.measure import MIB
from torch_nnmath.bench.works import written

if TYPE_CHECKING:  # matplotlib is loaded where a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = dict[str, Any]
COLOURS = {
    "ours": "C0",
    "ours compiled": "C9",
    "eager": "C7",
    "compile": "C1",
    "chunked": "C2",
    "Liger": "C3",
    "CCE": "C4",
    "QuACK": "C5",
    "none ignored": "C8",
    "floor": "black",
}


def picture(report: dict[str, Any]) -> Figure:
    """Of scaling alone its panels, of anything else its bars."""
    machine = report["machine"]
    about = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    about += f", PyTorch {machine['torch']}"
    alone = all(work["name"] == "scaling" for work in report["works"])
    return scaling(report["works"], about) if alone else bars(report["works"], about)


def bars(works: Sequence[Found], about: str) -> Figure:
    """Each contender's time over eager's; the error bars are the quartiles."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups: list[tuple[str, dict[str, Found]]] = []
    for work in works:
        ratios = {name: one["over_eager"] for name, one in work["contenders"].items()}
        shown = {name: ratio for name, ratio in ratios.items() if ratio and name != "eager"}
        groups.append((f"{work['name']}\n{written(work['size'])} {work['dtype']}", shown))
    groups = [group for group in groups if group[1]]
    height = 1.9 + 0.21 * sum(len(shown) + 1 for _, shown in groups)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    y, ticks = 0, []
    for _, shown in groups:
        ticks.append(y + (len(shown) - 1) / 2)
        for name, ratio in shown.items():
            middle, (low, high) = ratio["median"], ratio["quartiles"]
            axes.barh(y, middle - 1, left=1, height=0.85, color=COLOURS[name], label=name)
            errors = [[middle - low], [high - middle]]
            axes.errorbar(middle, y, xerr=errors, color="0.4", elinewidth=1, capsize=1.5)
            slower = middle >= 1
            axes.annotate(
                f"{middle:.2f}",
                (high if slower else low, y),
                (4 if slower else -4, 0),
                textcoords="offset points",
                ha="left" if slower else "right",
                va="center_baseline",
                fontsize=7,
            )
            y += 1
        y += 1
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_yticks(ticks, [label for label, _ in groups], fontsize=8)
    axes.set_ylim(y - 1, -1)
    axes.set_xlabel("time over PyTorch eager's: median of the rounds' ratios, and quartiles")
    _finish(figure, axes, about)
    return figure


def scaling(works: Sequence[Found], about: str) -> Figure:
    """Time and peak memory, by rows and by classes; below, why a line ends."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    notes = []
    for column, axis in zip(panels.T, (0, 2), strict=True):
        points, constant = along(axis, works)
        xs = [point["size"][axis] for point in points]
        for name in points[0]["contenders"]:
            of = [point["contenders"][name] for point in points]
            ends = [p for p, one in zip(points, of, strict=True) if one["reason"]]
            for point in ends[:1]:
                why = point["contenders"][name]["reason"]
                notes.append(f"{name} from {written(point['size'])} on: {why}")
            style = {"color": COLOURS[name], "label": name, "marker": "o", "markersize": 4}
            column[0].plot(xs, [one["median"] or math.nan for one in of], **style)
            column[1].plot(xs, [(one["peak"] or math.nan) / MIB for one in of], **style)
        nbytes = getattr(torch, points[0]["dtype"]).itemsize
        logits = [nbytes * point["size"][0] * point["size"][2] / MIB for point in points]
        column[1].plot(xs, logits, color="0.5", linestyle=":", label="the logits alone")
        for axes in column:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(xs, [str(x) for x in xs], rotation=45)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.grid(color="0.9")
        column[0].set_title(constant)
        column[1].set_xlabel(("rows", "", "classes")[axis])
    panels[0][0].set_ylabel("forward and backward, seconds")
    panels[1][0].set_ylabel("peak memory, MiB\n(beyond arguments and gradients)")
    _finish(figure, panels[1][0], "\n".join([*notes, about]))
    return figure


def along(axis: int, works: Sequence[Found]) -> tuple[list[Found], str]:
    """The points that differ along an axis alone, in order, and what they have in common."""
    rests = [tuple(n for i, n in enumerate(work["size"]) if i != axis) for work in works]
    rest, _ = Counter(rests).most_common(1)[0]
    points = [work for work, its in zip(works, rests, strict=True) if its == rest]
    names = [name for i, name in enumerate(("rows", "features", "classes")) if i != axis]
    constant = ", ".join(f"{n} {name}" for n, name in zip(rest, names, strict=True))
    return sorted(points, key=lambda work: work["size"][axis]), constant


def _finish(figure: Figure, axes: Axes, note: str) -> None:
    """A legend with each name once, and a note below."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=5, fontsize=8)
    figure.supxlabel(note, fontsize=7, color="0.4")
