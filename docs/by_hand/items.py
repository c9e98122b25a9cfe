"""The items on a page: quantities, matrix equations and the document's slips."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
COLUMNS = ("element", "matrix", "library", "numerical")
# In float64 the formulas agree to rounding; central differences with a step of 1e-6 agree to
# about 1e-10.
TOLERANCE = {"element": 1e-12, "matrix": 1e-12, "library": 1e-12, "numerical": 1e-8}


@dataclass(frozen=True)
class Quantity:
    """A value or a derivative, computed in four ways. A value has no numerical derivative (None).

    The letters in its name are its indices: dc/dw_jk^L has the entries dc/dw_00^L, dc/dw_01^L, ...
    `steps` holds the written-out arithmetic of some entries: position -> (template, numbers...).
    """

    name: str
    formulas: str
    text: str
    columns: Mapping[str, Array | None]
    steps: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)

    def find_errors(self) -> list[str]:
        """Compares every column and the written-out arithmetic with the element form."""
        expected, errors = self.columns["element"], []
        for column, value in self.columns.items():
            if value is not None and not is_close(value, expected, TOLERANCE[column]):
                errors.append(f"{self.name} ({self.formulas}): {column} form against element form")
        for i, (text, *numbers) in self.steps.items():
            if not is_close(evaluate(text, numbers), expected.flat[i], TOLERANCE["element"]):
                errors.append(f"{self.name} ({self.formulas}): the arithmetic {text}")
        return errors


class Equation:
    """Matrices, the operators · ∘ + − = between them, and labels, read from left to right."""

    def __init__(self, *pieces: Any):
        self.pieces = pieces

    def find_errors(self) -> list[str]:
        """Evaluates each side and compares it with the last one."""
        operators = {"·": np.matmul, "∘": np.multiply, "+": np.add, "−": np.subtract}
        sides: list[Array] = []
        side, operator = None, None
        for piece in (*self.pieces, "="):
            if not isinstance(piece, str):
                side = piece if side is None else operator(side, piece)
            elif piece in operators:
                operator = operators[piece]
            else:
                if piece == "=" and side is not None:
                    sides.append(side)
                side = None
        is_right = all(is_close(side, sides[-1], TOLERANCE["matrix"]) for side in sides)
        return [] if is_right else [f"{self.pieces[0]}: the matrix equation does not hold"]


@dataclass(frozen=True)
class Slip:
    """A slip of the document: its printed and its correct formula, both values, and the effect."""

    id: str
    name: str
    printed_formula: str
    correct_formula: str
    printed_value: Array
    correct_value: Array
    effect: str  # a template for `effect_values`
    effect_values: tuple[Any, ...] = ()
    shape_error: str = ""  # why the printed formula cannot be computed at all

    @property
    def shape_mismatch(self) -> str:
        """Says how the shapes differ; empty if they agree."""
        printed, correct = np.shape(self.printed_value), np.shape(self.correct_value)
        mismatch = f"shape {printed} instead of {correct or 'a scalar'}"
        return self.shape_error or ("" if printed == correct else mismatch)

    @property
    def error(self) -> float:
        """The largest absolute error over the largest absolute correct entry."""
        difference = np.abs(np.subtract(self.printed_value, self.correct_value))
        return difference.max() / np.abs(self.correct_value).max()

    @property
    def worst_entry(self) -> tuple[str, float, float]:
        """The entry with the largest error: its name, printed value and correct value."""
        printed, correct = np.broadcast_arrays(self.printed_value, self.correct_value)
        i = int(np.abs(printed - correct).argmax())
        return list(name_entries(self.name, printed))[i][0], printed.flat[i], correct.flat[i]

    def find_errors(self) -> list[str]:
        """A slip must make a difference."""
        return [] if self.error > 0.01 else [f"{self.id}: printed and correct value are equal"]


Item = Quantity | Equation | Slip | str


def is_close(value: Any, expected: Any, tolerance: float) -> bool:
    """Whether shapes are equal and values close; relative to the values where they exceed 1."""
    return np.shape(value) == np.shape(expected) and np.allclose(
        value, expected, rtol=tolerance, atol=tolerance
    )


def name_entries(name: str, value: Array) -> Iterator[tuple[str, float]]:
    """Yields (name, value) of each entry. The axis of length 1 of a column has no index."""
    letters = "".join(dict.fromkeys("".join(re.findall(r"_([ijkq]+)", name))))
    value = np.squeeze(value)
    for index in np.ndindex(value.shape):
        digits = str.maketrans(dict(zip(letters, map(str, index), strict=False)))
        yield re.sub("_[ijkq]+", lambda m, d=digits: m[0].translate(d), name), value[index]


def evaluate(text: str, numbers: Sequence[float]) -> float:
    """Evaluates a line of arithmetic with all digits of its numbers."""
    for sign, python in (("·", "*"), ("−", "-"), ("²", "**2"), ("e^", "e**")):
        text = text.replace(sign, python)
    line = text.format(*(f"({float(x)!r})" for x in numbers))
    return float(eval(line, {"e": math.e, "ln": math.log, "max": max}))
