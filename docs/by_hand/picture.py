"""The picture: both problems as graphs of the network, with all activations and gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from items import Array
from network import Network
from page import Formatter

INK = "#14202e"
INCREASES, DECREASES = "#1f5fa8", "#c0143c"  # what gradient descent does to a weight


def draw(n: Network, formatter: Formatter) -> Any:
    """Draws both problems, one above the other."""
    from matplotlib.figure import Figure  # imported here, as the text needs no matplotlib

    figure = Figure(figsize=(13, 15.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.15)
    figure.suptitle("Forward and backward pass of one example, worked out by hand", fontsize=19)
    panels = figure.subplots(2, 1)
    draw_network(panels[0], n, "sigmoid", formatter)
    draw_network(panels[1], n, "softmax", formatter)
    figure.supxlabel(
        "On each edge: the weight w above its gradient dc/dw. Gradient descent increases blue\n"
        "weights and decreases red ones. Within a layer, thicker edges change faster.",
        fontsize=13,
    )
    return figure


def draw_network(axes: Any, n: Network, output_activation: str, formatter: Formatter) -> None:
    from matplotlib.patches import FancyBboxPatch

    dx, dW1, db1, dW2, db2 = n.compute_gradients(output_activation)
    a = n.a2 if output_activation == "sigmoid" else n.p
    if output_activation == "sigmoid":
        title = "5.1 Sigmoid and squared error"
        c = n.squared_error.forms.matrix.value(a, n.t)
    else:
        title = f"5.2 Softmax and cross entropy (β = {n.beta:g})"
        c = n.cross_entropy_of_a.forms.matrix.value(a, n.t)
    axes.set_title(f"{title}: c = {formatter.format_short(c)}", fontsize=16, color=INK)
    axes.set(xlim=(-1.5, 13.3), ylim=(-4.6, 4.6), aspect="equal")
    axes.axis("off")
    # With these positions the edges between two layers are evenly spaced at 3/10 of the way from
    # the smaller layer, so their labels do not overlap.
    positions = [[(0, 2), (0, -2)], [(5, 3), (5, 0), (5, -3)], [(10, 2), (10, -2)]]
    for W, dW, source, target, share in ((n.W1, dW1, 0, 1, 0.3), (n.W2, dW2, 1, 2, 0.7)):
        for (to, start), w in np.ndenumerate(W):
            (x0, y0), (x1, y1) = positions[source][start], positions[target][to]
            d = dW[to, start]
            color = INCREASES if d < 0 else DECREASES
            width = 0.8 + 5 * math.sqrt(abs(d) / np.abs(dW).max())
            axes.plot([x0, x1], [y0, y1], color=color, lw=width, alpha=0.45, zorder=1)
            x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
            gap = {"fc": "white", "ec": "none", "boxstyle": "round,pad=0,rounding_size=0.15"}
            axes.add_patch(FancyBboxPatch((x - 0.52, y - 0.34), 1.04, 0.68, **gap, zorder=2))
            style = {"fontsize": 11.5, "ha": "center", "va": "center", "zorder": 3}
            axes.text(x, y + 0.17, formatter.format_short(w), color=INK, weight="bold", **style)
            axes.text(x, y - 0.18, formatter.format_number(d), color=color, **style)

    layers = (
        ("L-2", n.x, [f"dc/da = {formatter.format_number(d.item())}" for d in dx], "#eef1f5"),
        (
            "L-1",
            n.a1,
            [format_note(formatter, *v) for v in zip(n.z1, n.b1, db1, strict=True)],
            "#fdf3e1",
        ),
        (
            "L",
            a,
            [format_note(formatter, *v) for v in zip(n.z2, n.b2, db2, strict=True)],
            "#e6f4ea",
        ),
    )
    for nodes, (layer, values, notes, color) in zip(positions, layers, strict=True):
        for i, ((x, y), note) in enumerate(zip(nodes, notes, strict=True)):
            axes.scatter(x, y, s=3600, color=color, edgecolors=INK, linewidths=1.3, zorder=3)
            style = {"ha": "center", "va": "center", "color": INK, "zorder": 4}
            axes.text(x, y + 0.2, f"$a_{i}^{{{layer}}}$", fontsize=14, **style)
            axes.text(
                x,
                y - 0.22,
                formatter.format_short(values[i]),
                fontsize=12.5,
                weight="bold",
                **style,
            )
            is_above = y > 0
            if layer == "L":
                note += f"\n$t_{i}$ = {formatter.format_short(n.t[i])}"
                x, y, style["ha"] = x + 0.75, y, "left"
            else:
                y += 0.7 if is_above else -0.7
                style["va"] = "bottom" if is_above else "top"
            axes.text(x, y, note, fontsize=11.5, linespacing=1.35, **style)


def format_note(formatter: Formatter, z: Array, b: Array, d: Array) -> str:
    z_text, b_text = formatter.format_short(z), formatter.format_short(b)
    return f"z = {z_text}, b = {b_text}\ndc/dz = dc/db = {formatter.format_number(d.item())}"
