"""The pictures of the formulas' pages: each computes its values and derivatives by the library."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from torch_nnmath import formulas
from torch_nnmath import functional as F

STYLES: dict[str, dict[str, Any]] = {
    "light": {"text": "#333333", "grid": "#dddddd", "lines": ("#3f51b5", "#d9480f", "#2b8a3e")},
    "dark": {"text": "#dddddd", "grid": "#4a4d57", "lines": ("#9fa8da", "#ffa94d", "#8ce99a")},
}
Draw = Callable[[Any], None]


def draw_picture(draw: Draw, style: str) -> str:
    """Returns a picture as SVG, with a transparent ground, in the colours of one style."""
    colours = STYLES[style]
    settings = {
        "svg.fonttype": "path",
        "svg.hashsalt": "torch_nnmath",  # the same identifiers in every build
        "font.size": 10,
        "axes.prop_cycle": matplotlib.cycler(color=colours["lines"]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": colours["grid"],
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), colours["text"]),
        **dict.fromkeys(("xtick.color", "ytick.color"), colours["text"]),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, labelcolor=colours["text"])
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def differentiate(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Any]:
    """Returns values, first and second derivatives of a function of one number, at each x."""
    x = x.clone().requires_grad_()
    value = function(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, materialize_grads=True)
    return [tensor.detach().numpy() for tensor in (value, first, second)]


def draw_function(
    function: Callable[[Tensor], Tensor],
    names: tuple[str, str, str],
    x_name: str,
    limits: tuple[float, float] = (-6.0, 6.0),
) -> Draw:
    """Draws a function of one number with its first two derivatives."""

    def draw(axes: Any) -> None:
        x = torch.linspace(*limits, 601, dtype=torch.float64)
        for values, name, line in zip(
            differentiate(function, x), names, ("-", "--", ":"), strict=True
        ):
            axes.plot(x, values, line, label=name, linewidth=2)
        axes.set_xlabel(x_name)

    return draw


def make_logits(margin: Tensor) -> Tensor:
    """Returns rows of two logits, the first of which is larger by the margin."""
    return torch.stack([margin, torch.zeros_like(margin)], -1)


def compute_loss(margin: Tensor, **options: Any) -> Tensor:
    y = torch.zeros(len(margin), dtype=torch.int64)
    return F.cross_entropy(make_logits(margin), y, reduction="none", **options)


def draw_softmax(axes: Any) -> None:
    margin = torch.linspace(-6, 6, 601, dtype=torch.float64)
    zeros = torch.zeros_like(margin)
    probabilities = F.softmax(torch.stack([margin, zeros, zeros + 1], -1), dim=-1)
    for j, line in enumerate(("-", "--", ":")):
        axes.plot(margin, probabilities[:, j], line, label=f"$a_{j}$", linewidth=2)
    axes.set_xlabel("$z_0$, with $z_1 = 0$ and $z_2 = 1$")


def draw_jacobian(axes: Any) -> None:
    z = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5], dtype=torch.float64)
    J = F.softmax_jacobian(z, dim=0)
    largest = float(J.abs().max())
    axes.grid(False)
    picture = axes.imshow(J, cmap="RdBu_r", vmin=-largest, vmax=largest)
    for i in range(len(z)):
        for j in range(len(z)):
            value = float(J[i, j])
            colour = "white" if abs(value) > 0.6 * largest else "#222222"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(z)), [f"$z_{j}$" for j in range(len(z))])
    axes.set_yticks(range(len(z)), [f"$a_{i}$" for i in range(len(z))])
    axes.figure.colorbar(picture, label=r"$\partial a_i / \partial z_j$")


def compare_to_teacher(margin: Tensor, **options: Any) -> Tensor:
    """Returns a divergence of two classes, of which the teacher gives the first 0.8."""
    student = make_logits(margin)
    teacher = make_logits(torch.full_like(margin, math.log(4)))
    one = torch.eye(2, dtype=margin.dtype)
    divergence = F.linear_jsd if "beta" in options else F.linear_kl_div
    return divergence(student, one, teacher, one, reduction="none", **options)


def draw_jsd(axes: Any) -> None:
    margin = torch.linspace(-6, 6, 601, dtype=torch.float64)
    for beta, line in ((0.1, "-"), (0.5, "--"), (0.9, ":")):
        values = compare_to_teacher(margin, beta=beta)
        axes.plot(margin, values, line, label=rf"$\mu = {beta}$", linewidth=2)
    axes.set_xlabel(STUDENT_MARGIN)


LOSS = ("$c$", "$c'$", "$c''$")
ACTIVATION = ("$a$", "$a'$", "$a''$")
MARGIN = "margin: the logit of the true class minus the other one"
STUDENT_MARGIN = "the student's margin; the teacher's is ln 4"

PICTURES: dict[str, tuple[str, Draw]] = {
    "tanh": ("tanh and its derivatives", draw_function(F.tanh, ACTIVATION, "$z$")),
    "relu": ("relu and its derivatives", draw_function(F.relu, ACTIVATION, "$z$")),
    "sigmoid": ("The sigmoid and its derivatives", draw_function(F.sigmoid, ACTIVATION, "$z$")),
    "soft cap": (
        "The soft cap at 2 and its derivatives",
        draw_function(lambda z: formulas.SoftCap.evaluate(z, 2.0), ("$v$", "$v'$", "$v''$"), "$z$"),
    ),
    "softmax": ("The softmax of three logits, one of which varies", draw_softmax),
    "softmax's Jacobian": ("The Jacobian of a softmax of six logits", draw_jacobian),
    "squared error": (
        "The squared error of one output and its derivatives, for the target 0",
        draw_function(
            lambda a: F.squared_error(a[:, None], torch.zeros_like(a)[:, None], reduction="none"),
            LOSS,
            "$a$",
            (-2.0, 2.0),
        ),
    ),
    "cross entropy of probabilities": (
        "The cross entropy of the true class and its first derivative",
        lambda axes: draw_cross_entropy_of_probability(axes),
    ),
    "affine, sigmoid, squared error": (
        "The squared error of one sigmoid and its derivatives, for the target 1: where c'' is "
        "negative, the loss is not convex",
        draw_function(
            lambda z: F.sigmoid_squared_error(
                z[:, None], torch.ones_like(z)[:, None], reduction="none"
            ),
            LOSS,
            "$z$",
        ),
    ),
    "softmax, cross entropy": (
        "Loss and gradient of two classes over the margin",
        draw_function(compute_loss, LOSS, MARGIN),
    ),
    "scaled and capped head with z-loss": (
        "Loss and gradient of two classes over the margin, with soft cap 2 and z-loss 0.1",
        draw_function(lambda m: compute_loss(m, softcap=2.0, z_loss=0.1), LOSS, MARGIN),
    ),
    "z-loss": (
        "The z-loss of two classes over the margin and its derivatives",
        draw_function(
            lambda m: formulas.ZLoss.evaluate(make_logits(m), 1).squeeze(1),
            ("$q$", "$q'$", "$q''$"),
            "$z_0$, with $z_1 = 0$",
        ),
    ),
    "entropy of softmax": (
        "The entropy of two classes over the margin, in bits, and its derivatives",
        draw_function(
            lambda m: formulas.Entropy.evaluate(make_logits(m), 1, 2).squeeze(1),
            ("$h$", "$h'$", "$h''$"),
            "$z_0$, with $z_1 = 0$",
        ),
    ),
    "Kullback-Leibler divergence between two heads": (
        "KL(p‖q) of two classes over the student's margin and its derivatives, for p = (0.8, 0.2)",
        draw_function(compare_to_teacher, LOSS, STUDENT_MARGIN),
    ),
    "reverse Kullback-Leibler divergence between two heads": (
        "KL(q‖p) of two classes over the student's margin and its derivatives, for p = (0.8, 0.2): "
        "it is bounded, and not convex",
        draw_function(lambda m: compare_to_teacher(m, reverse=True), LOSS, STUDENT_MARGIN),
    ),
    "generalised Jensen-Shannon divergence between two heads": (
        "The divergence of two classes over the student's margin, for three weights of the teacher "
        "and p = (0.8, 0.2)",
        draw_jsd,
    ),
    "log-probability of a class": (
        "The log-probability of one of two classes over the margin, and its derivatives",
        draw_function(lambda m: -compute_loss(m), ("$p$", "$p'$", "$p''$"), MARGIN),
    ),
}


def draw_cross_entropy_of_probability(axes: Any) -> None:
    a = torch.linspace(0.05, 1, 400, dtype=torch.float64)
    y = torch.zeros(len(a), dtype=torch.int64)
    value, first, _ = differentiate(
        lambda a: F.categorical_cross_entropy(a[:, None], y, reduction="none"), a
    )
    axes.plot(a, value, "-", label="$c$", linewidth=2)
    axes.plot(a, first, "--", label="$c'$", linewidth=2)
    axes.set_ylim(-8, 4)
    axes.set_xlabel("probability $a$ of the true class")
