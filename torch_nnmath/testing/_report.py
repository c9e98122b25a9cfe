"""Verdicts, the exceptions that carry them, and the report with one row per transform."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch


class Verdict(StrEnum):
    """The result of checking a function under one transform."""

    RIGHT = "right"
    WRONG = "wrong"
    SILENT_ZERO = "silent zero"
    RAISES = "raises"
    WRITES = "writes its input"
    CANNOT = "PyTorch cannot"
    UNKNOWN = "truth unknown"
    NOT_APPLICABLE = "not applicable"

    @property
    def is_fault(self) -> bool:
        """Whether the function is at fault."""
        return self not in (*ACCEPTED_VERDICTS, Verdict.UNKNOWN)


ACCEPTED_VERDICTS = (Verdict.RIGHT, Verdict.CANNOT, Verdict.NOT_APPLICABLE)


class Finding(Exception):
    """Raised by a transform's check if the verdict is not `RIGHT`; its message is the detail."""

    verdict = Verdict.RAISES


class Wrong(Finding):
    verdict = Verdict.WRONG


class SilentZero(Finding):
    verdict = Verdict.SILENT_ZERO


class WritesInput(Finding):
    verdict = Verdict.WRITES


class Cannot(Finding):
    verdict = Verdict.CANNOT


class Unknown(Finding):
    verdict = Verdict.UNKNOWN


class NotApplicable(Finding):
    verdict = Verdict.NOT_APPLICABLE


@dataclass(frozen=True)
class Row:
    """A transform, its verdict, and the detail: numbers, an error or a reason; "" if right.

    `error` is the largest error of all compared tensors, relative to the largest entry of each;
    None if the transform compares none.
    """

    transform: str
    verdict: Verdict
    detail: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """The verdicts on a function, one row per transform."""

    function: str
    dtype: torch.dtype
    rows: tuple[Row, ...]

    @property
    def right(self) -> bool:
        """Whether no row is a fault of the function, and each expected value is known."""
        return all(row.verdict in ACCEPTED_VERDICTS for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, transform: str) -> Row:
        for row in self.rows:
            if row.transform == transform:
                return row
        raise KeyError(transform)

    def __str__(self) -> str:
        width = max((len(row.transform) for row in self.rows), default=0)
        lines = [f"{self.function}, {str(self.dtype).removeprefix('torch.')}"]
        for row in self.rows:
            line = f"{row.transform:{width}}  {row.verdict:16}  {shorten(row.detail, 120)}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dict of plain values, for JSON."""
        return {
            "function": self.function,
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "right": self.right,
            "rows": [{**asdict(row), "verdict": str(row.verdict)} for row in self.rows],
        }

    def raise_on_failure(self) -> None:
        """Raises AssertionError with the first row that is a fault, or whose truth is unknown."""
        for row in sorted(self.rows, key=lambda row: not row.verdict.is_fault):
            if row.verdict not in ACCEPTED_VERDICTS:
                message = f"{self.function}: {row.transform}: {row.verdict}"
                raise AssertionError(f"{message}: {row.detail}" if row.detail else message)


def describe_error(error: Exception) -> str:
    """Returns the error's type and message in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {shorten(message, 400)}"


def shorten(text: str, length: int) -> str:
    """Returns the text; one longer than `length` is cut to it and ends in an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"
