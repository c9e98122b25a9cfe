"""The tables that the benchmark prints: results of a work, and targets with their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch_nnmath._memory import MIB
from torch_nnmath.bench.measure import Measurement
from torch_nnmath.bench.work import Work, format_dtype, format_size

COLUMNS = ("", "time", "spread", "ours/this", "(quartiles)", "this/floor", "peak", "error")


def format_table(result: dict[str, Any]) -> str:
    """Returns the table of a work at one size, with the reason for each missing contender."""
    size, dtype, rounds = format_size(result["size"]), result["dtype"], result["rounds"]
    title = f"{result['name']} {size} {dtype}, {rounds} rounds"
    if result["floor"]:
        title += f"; floor: {result['floor']}"
    rows, notes = [COLUMNS], [""]
    for name, values in result["contenders"].items():
        time, (low, high) = values["median"], values["quartiles"] or (0, 0)
        ratio, floor, peak, error = (
            values[key] for key in ("ours_over_it", "over_floor", "peak", "error")
        )
        row = (
            name,
            format_duration(time) if time else "-",
            format_duration(high - low) if time else "-",
            f"{ratio['median']:.2f}" if ratio else "-",
            "({:.2f} to {:.2f})".format(*ratio["quartiles"]) if ratio else "-",
            f"{floor['median']:.2f}" if floor else "-",
            "-" if peak is None else f"{peak / MIB:.0f} MiB",
            "-" if error is None else f"{error:.1e}",
        )
        rows.append(row)
        notes.append(values["reason"] or "")
    return "\n".join([title, *align_columns(rows, notes)])


def format_duration(seconds: float) -> str:
    """Formats a duration with three digits and a unit."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    value = seconds * scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def evaluate_targets(work: Work, measurements: Sequence[Measurement]) -> Iterator[dict[str, Any]]:
    """Yields each target of a work at each size that it applies to.

    A target that could not be evaluated has a reason instead of a value.
    """
    dtype = format_dtype(measurements[0].dtype)
    for target in work.targets:
        row = {"target": f"{work.name}: {target}", "dtype": dtype, "limit": target.limit}
        no_value = {"value": None, "met": None}
        applicable = [m for m in measurements if target.size in (None, m.size)]
        if target.kind == "growth":
            applicable = applicable[1:][-1:]  # the last size, if there are at least two
        if not applicable:
            reason = "needs two sizes" if target.kind == "growth" else "not run at this size"
            yield {**row, **no_value, "size": target.size, "reason": reason}
        for measurement in applicable:
            value = measurement.evaluate(target, measurements[0])
            size, reasons = measurement.size, measurement.reasons
            if value is None:
                missing = [n for n in (target.contender, target.baseline) if n in reasons]
                reason = "; ".join(f"{name}: {reasons[name]}" for name in missing)
                yield {**row, **no_value, "size": size, "reason": reason or "not measured"}
            else:
                result = {"value": value, "met": value <= target.limit}
                yield {**row, **result, "size": size, "reason": None}


def format_targets(targets: Sequence[dict[str, Any]]) -> str:
    """Returns the table of targets with their values."""
    rows, notes = [("target", "size", "limit", "value")], [""]
    for row in targets:
        size = f"{format_size(row['size'])} {row['dtype']}" if row["size"] else ""
        value = "-" if row["value"] is None else f"{row['value']:.3g}"
        rows.append((row["target"], size, f"{row['limit']:.3g}", value))
        notes.append(row["reason"] or ("met" if row["met"] else "missed"))
    return "\n".join(align_columns(rows, notes))


def align_columns(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> list[str]:
    """Returns a line for each row: the first column left-aligned, others right, then the note."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
    return [f"  {line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True)]
