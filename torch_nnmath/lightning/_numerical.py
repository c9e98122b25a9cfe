"""The comparison of gradients with central differences of the loss in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_nnmath.lightning._comparison import Comparison, divide_error, unravel_index
from torch_nnmath.lightning._replay import Displacement, Gradients, LossReplay, Segment, max_abs


class NumericalCheck:
    """Compares the gradients of a batch's loss with central differences.

    Args:
        replay: the batch's loss.
        gradients: of all parameters to check, in float64.
        tolerance: the largest allowed error.
    """

    def __init__(self, replay: LossReplay, gradients: Gradients, tolerance: float):
        self.gradients, self.tolerance = gradients, tolerance
        norms = [g.norm().nan_to_num(0, 0).item() for g in gradients.by_name.values()]
        self._norm = math.hypot(*norms)
        self._parameters = dict(replay.pl_module.named_parameters())
        self._replay = replay

    def compare_entry(self, name: str, index: int) -> Comparison:
        """Compares an entry of a parameter's gradient, given by its index in row-major order."""
        g = self.gradients.by_name[name]
        entry = unravel_index(index, g.shape)
        h = 1e-5 * max(1.0, abs(self._parameters[name][entry].item()))
        unit = torch.ones(1, dtype=g.dtype, device=g.device)
        difference = self._differentiate([(Segment(name, index, index + 1), unit)], h)
        scale = max(max_abs(g), 1e-3 * self.gradients.largest)
        return self._compare(name, entry, g[entry].item(), difference, scale)

    def compare_direction(self, seed: int) -> Comparison:
        """Compares the derivative along a random direction in all parameters.

        If it is wrong, bisection over all entries looks for a wrong one. If that finds one, its
        comparison is returned instead.
        """
        gradients = self.gradients.by_name
        generator = torch.Generator().manual_seed(seed)
        direction = {
            name: torch.randn(g.numel(), generator=generator, dtype=g.dtype).to(g.device)
            for name, g in gradients.items()
        }
        segments = [Segment(name, 0, g.numel()) for name, g in gradients.items()]
        whole = self._compare_along(direction, segments)
        if whole.error <= self.tolerance:
            return whole
        while halves := bisect_segments(segments):
            segments = max(halves, key=lambda half: self._compare_along(direction, half).error)
        entry = self.compare_entry(segments[0].parameter, segments[0].start)
        return entry if entry.error > self.tolerance else whole

    def _compare_along(self, direction: dict[str, Tensor], segments: list[Segment]) -> Comparison:
        """Compares the derivative along a direction that is 0 outside of the segments."""
        gradients = self.gradients.by_name
        displacement = [(s, direction[s.parameter][s.start : s.stop]) for s in segments]
        found = sum(gradients[s.parameter].flatten()[s.start : s.stop] @ v for s, v in displacement)
        difference = self._differentiate(displacement, 1e-7)
        return self._compare("", (), float(found), difference, self._norm)

    def _differentiate(self, displacement: Displacement, h: float) -> Difference:
        return central_difference(
            lambda step: self._replay.compute_displaced_loss(displacement, step), h
        )

    def _compare(
        self,
        name: str,
        entry: tuple[int, ...],
        found: float,
        difference: Difference,
        scale: float,
    ) -> Comparison:
        """Compares a derivative with a central difference.

        The error is the distance minus the difference's uncertainty.
        """
        expected, uncertainty = difference
        if not math.isfinite(expected + uncertainty):  # the difference tells nothing
            error, uncertainty = 0.0, math.inf
        elif not math.isfinite(found):
            error = math.inf
        else:
            error = max(abs(found - expected) - uncertainty, 0.0)
        return Comparison(
            kind="numerical",
            parameter=name,
            entry=entry,
            found=found,
            expected=expected,
            error=divide_error(error, scale),
            tolerance=self.tolerance,
            uncertainty=divide_error(uncertainty, scale),
        )


class Difference(NamedTuple):
    """A derivative by a central difference, and a bound for its error."""

    value: float
    uncertainty: float


def central_difference(function: Callable[[float], float], h: float) -> Difference:
    """Returns (f(h) - f(-h)) / 2h.

    The uncertainty is the distance from the difference with 2h, plus a bound for rounding.
    """
    f = {step: function(step * h) for step in (-2, -1, 1, 2)}
    value, wider = (f[1] - f[-1]) / (2 * h), (f[2] - f[-2]) / (4 * h)
    rounding = 64 * torch.finfo(torch.float64).eps * max(map(abs, f.values())) / h
    return Difference(value, abs(value - wider) + rounding)


def bisect_segments(segments: list[Segment]) -> list[list[Segment]]:
    """Returns two halves of several segments, or of the entries of one; [] for a single entry."""
    if len(segments) > 1:
        middle = len(segments) // 2
        return [segments[:middle], segments[middle:]]
    name, start, stop = segments[0]
    middle = (start + stop) // 2
    if middle == start:
        return []
    return [[Segment(name, start, middle)], [Segment(name, middle, stop)]]
