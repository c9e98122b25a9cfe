"""Figures of the command's report: bars, or time and memory of the head as it scales."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from torch_nnmath._memory import MIB
from torch_nnmath.bench.work import format_size

if TYPE_CHECKING:  # matplotlib is imported only when a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WorkResult = dict[str, Any]  # as `Measurement.to_dict` returns it
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
    "plain": "C6",
    "modules": "teal",
    "swapped": "goldenrod",
    "ours, Jensen-Shannon": "royalblue",
    "floor": "black",
}


def plot_report(report: dict[str, Any]) -> Figure:
    """Returns the figure of scaling if the report has only that work, else bars."""
    works, note = report["works"], describe_briefly(report["machine"])
    is_scaling = all(work["name"] == "scaling" for work in works)
    return plot_scaling(works, note) if is_scaling else plot_bars(works, note)


def describe_briefly(machine: dict[str, Any]) -> str:
    """Returns the note below a figure."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{device}, PyTorch {machine['torch']}"


def plot_bars(works: Sequence[WorkResult], note: str, baseline: str = "eager") -> Figure:
    """Plots each contender's time over the baseline's: eager's, or the floor's.

    The error bars are the quartiles.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups: list[tuple[str, dict[str, WorkResult]]] = []
    for work in works:
        key = f"over_{baseline}"
        ratios = {name: values[key] for name, values in work["contenders"].items()}
        ratios = {name: ratio for name, ratio in ratios.items() if ratio and name != baseline}
        if ratios:
            groups.append((f"{work['name']}\n{format_size(work['size'])} {work['dtype']}", ratios))
    height = 1.9 + 0.21 * sum(len(ratios) + 1 for _, ratios in groups)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    y, ticks = 0, []
    for _, ratios in groups:
        ticks.append(y + (len(ratios) - 1) / 2)
        for name, ratio in ratios.items():
            plot_bar(axes, y, name, ratio)
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
    name = "PyTorch eager's" if baseline == "eager" else "the floor's"
    axes.set_xlabel(f"time over {name}: median and quartiles of the ratios of the rounds")
    add_legend(figure, axes, note)
    return figure


def plot_bar(axes: Axes, y: int, name: str, ratio: WorkResult) -> None:
    """Plots a bar from 1 to the median ratio, with its error bar and its value."""
    median, (low, high) = ratio["median"], ratio["quartiles"]
    axes.barh(y, median - 1, left=1, height=0.85, color=COLOURS[name], label=name)
    errors = [[median - low], [high - median]]
    axes.errorbar(median, y, xerr=errors, color="0.4", elinewidth=1, capsize=1.5)
    is_slower = median >= 1
    axes.annotate(
        f"{median:.2f}",
        (high if is_slower else low, y),
        (4 if is_slower else -4, 0),
        textcoords="offset points",
        ha="left" if is_slower else "right",
        va="center_baseline",
        fontsize=7,
    )


def plot_values(groups: dict[str, dict[str, float]], label: str, note: str) -> Figure:
    """Plots the values of each group as bars with their names, one group below the other."""
    from matplotlib.figure import Figure

    height = 1.2 + sum(0.4 + 0.24 * len(values) for values in groups.values())
    figure = Figure(figsize=(9, height), layout="constrained")
    ratios = [len(values) + 1 for values in groups.values()]
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (title, values) in zip(panels, groups.items(), strict=True):
        bars = axes.barh([*values], [*values.values()], color="C0", height=0.8)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.tick_params(labelsize=7)
        axes.set_title(title, fontsize=8)
    panels[-1].set_xlabel(label, fontsize=8)
    figure.supxlabel(note, fontsize=7, color="0.4")
    return figure


def plot_scaling(works: Sequence[WorkResult], note: str) -> Figure:
    """Plots time and peak memory against rows and classes; a note says why a line ends."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    notes = []
    for (time_axes, memory_axes), axis in zip(panels.T, (0, 2), strict=True):
        points, constants = select_points(axis, works)
        xs = [point["size"][axis] for point in points]
        for name in points[0]["contenders"]:
            results = [point["contenders"][name] for point in points]
            for point, result in zip(points, results, strict=True):
                if result["reason"]:
                    notes.append(f"{name} from {format_size(point['size'])} on: {result['reason']}")
                    break
            style = {"color": COLOURS[name], "label": name, "marker": "o", "markersize": 4}
            times = [result["median"] or math.nan for result in results]
            peaks = [(result["peak"] or math.nan) / MIB for result in results]
            time_axes.plot(xs, times, **style)
            memory_axes.plot(xs, peaks, **style)
        nbytes = getattr(torch, points[0]["dtype"]).itemsize
        logits = [nbytes * point["size"][0] * point["size"][2] / MIB for point in points]
        memory_axes.plot(xs, logits, color="0.5", linestyle=":", label="the logits alone")
        for axes in (time_axes, memory_axes):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(xs, [str(x) for x in xs], rotation=45)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.grid(color="0.9")
        time_axes.set_title(constants)
        memory_axes.set_xlabel(("rows", "", "classes")[axis])
    panels[0][0].set_ylabel("forward and backward, seconds")
    panels[1][0].set_ylabel("peak memory, MiB\n(beyond arguments and gradients)")
    add_legend(figure, panels[1][0], "\n".join([*notes, note]))
    return figure


def select_points(axis: int, works: Sequence[WorkResult]) -> tuple[list[WorkResult], str]:
    """Returns the points that differ only along an axis, sorted, and a text with the other axes."""
    other_axes = [tuple(n for i, n in enumerate(work["size"]) if i != axis) for work in works]
    constants, _ = Counter(other_axes).most_common(1)[0]
    points = [work for work, other in zip(works, other_axes, strict=True) if other == constants]
    names = [name for i, name in enumerate(("rows", "features", "classes")) if i != axis]
    text = ", ".join(f"{n} {name}" for n, name in zip(constants, names, strict=True))
    return sorted(points, key=lambda work: work["size"][axis]), text


def add_legend(figure: Figure, axes: Axes, note: str) -> None:
    """Adds a legend with each name once, and a note below the figure."""
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=5, fontsize=8)
    figure.supxlabel(note, fontsize=7, color="0.4")
