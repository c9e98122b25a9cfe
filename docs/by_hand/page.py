"""The items as lines of text: the page, and the table of slips."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from items import COLUMNS, Array, Equation, Item, Quantity, Slip, name_entries
from sections import Section

Pages = Sequence[tuple[Section, list[Item]]]
BRACKETS = str.maketrans("()", "[]")
LEGEND = """\
Columns: `element` is the formula with indices and sums, `matrix` the same with matrices,
`library` the result of torch_nnmath, `numerical` a central difference, (f(x + h) − f(x − h)) / 2h.
F1 to F17 are the document's formulas. E1 to E17 are its slips (docs/slips.md), each with the
printed formula, the correct formula, the value of the printed one here, and its effect. A relative
error is the largest absolute error over the largest absolute correct entry."""


@dataclass(frozen=True)
class Formatter:
    """Formats items as text, with `digits` digits after the decimal point."""

    digits: int

    def format_number(self, v: float) -> str:
        text = f"{v:.{self.digits}f}"
        return text.lstrip("-") if float(text) == 0 else text

    def format_short(self, v: Any) -> str:
        """Formats for use in a line: 0.4 for 0.4000, vectors as (1, 2), matrices as
        [[1, 2], [3, 4]]."""
        v = np.squeeze(v)
        if v.ndim > 1:
            return f"[{', '.join(self.format_short(row).translate(BRACKETS) for row in v)}]"
        if v.ndim:
            return f"({', '.join(map(self.format_short, v))})"
        text = self.format_number(float(v))
        return text.rstrip("0").rstrip(".") if "." in text else text

    def format_factor(self, v: float) -> str:
        return f"({self.format_short(v)})" if v < 0 else self.format_short(v)

    def format_quantity(self, quantity: Quantity) -> Iterator[str]:
        yield f"  {quantity.formulas:8} {quantity.text}"
        columns = [None if v is None else np.ravel(v) for v in quantity.columns.values()]
        entries = list(name_entries(quantity.name, quantity.columns["element"]))
        for i, (name, value) in enumerate(entries):
            if i in quantity.steps:
                template, *numbers = quantity.steps[i]
                steps = template.format(*map(self.format_factor, numbers))
                yield f"           {name} = {steps} = {self.format_short(value)}"
        for i, (name, _) in enumerate(entries):
            numbers = ("" if v is None else self.format_number(v[i]) for v in columns)
            yield self.format_cells(f"{'':13}{name}", *numbers)

    def format_cells(self, label: str, *cells: str) -> str:
        width = max(10, self.digits + 5)
        return (f"{label:40}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip()

    def format_matrix(self, v: Array) -> list[str]:
        texts = [[self.format_short(entry) for entry in row] for row in np.atleast_2d(v)]
        width = max(len(text) for row in texts for text in row)
        rows = ["  ".join(text.rjust(width) for text in row) for row in texts]
        if len(rows) == 1:
            return [f"( {rows[0]} )"]
        left = "⎛" + "⎜" * (len(rows) - 2) + "⎝"
        right = "⎞" + "⎟" * (len(rows) - 2) + "⎠"
        return [f"{l} {row} {r}" for l, row, r in zip(left, rows, right, strict=True)]

    def format_equation(self, equation: Equation) -> Iterator[str]:
        """Formats the pieces side by side, centred vertically."""
        blocks = [[p] if isinstance(p, str) else self.format_matrix(p) for p in equation.pieces]
        height = max(map(len, blocks))
        for y in range(height):
            line = []
            for block in blocks:
                i = y - (height - len(block)) // 2
                line.append(block[i] if 0 <= i < len(block) else " " * len(block[0]))
            yield f"           {' '.join(line)}".rstrip()

    def format_slip(self, slip: Slip) -> Iterator[str]:
        yield f"  {slip.id + ' slip':8} printed  {slip.printed_formula}"
        yield f"           correct  {slip.correct_formula}"
        printed = self.format_short(slip.printed_value)
        correct = self.format_short(slip.correct_value)
        values = f"{slip.name} = {printed} instead of {correct}; relative error {slip.error:.2g}"
        yield from wrap(f"           value    {values}")
        effect = slip.effect.format(*map(self.format_short, slip.effect_values))
        effects = "; ".join(filter(None, [slip.shape_mismatch, effect]))
        yield from wrap(f"           effect   {effects}")

    def format_item(self, item: Item) -> Iterator[str]:
        if isinstance(item, Quantity):
            return self.format_quantity(item)
        if isinstance(item, Equation):
            return self.format_equation(item)
        if isinstance(item, Slip):
            return self.format_slip(item)
        return iter([f"  {item}"])

    def format_pages(self, pages: Pages) -> Iterator[str]:
        yield LEGEND
        for section, items in pages:
            yield ""
            title = f"{section.number} {section.title}"
            has_columns = any(isinstance(item, Quantity) for item in items)
            yield self.format_cells(title, *(COLUMNS if has_columns else ()))
            yield "─" * len(self.format_cells("", *COLUMNS))
            for item in items:
                yield from self.format_item(item)

    def format_slips(self, pages: Pages) -> Iterator[str]:
        """Formats all slips as a table, each with its worst entry."""
        head = (
            f"{'slip':5}{'section':9}{'entry':20}{'printed':>10}{'correct':>10}{'rel. error':>12}"
        )
        yield f"{LEGEND}\n\n{head}  printed formula"
        yield "─" * 112
        slips = [
            (item, section.number)
            for section, items in pages
            for item in items
            if isinstance(item, Slip)
        ]
        for slip, number in sorted(slips, key=lambda s: int(s[0].id[1:])):
            name, printed, correct = slip.worst_entry
            yield (
                f"{slip.id:5}{number:9}{name:20}{self.format_number(printed):>10}"
                f"{self.format_number(correct):>10}{slip.error:12.2g}  {slip.printed_formula}"
            )
            if slip.shape_mismatch:
                yield f"{'':68}{slip.shape_mismatch}"


def wrap(line: str) -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent=" " * 20, break_on_hyphens=False)
