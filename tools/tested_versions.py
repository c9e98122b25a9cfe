"""Writes the result of a test run to the table of a page, in the row of the installed PyTorch.

    pytest --junitxml=results.xml
    python tools/tested_versions.py results.xml docs/versions.md

With more files than one, tests of a later run replace those of an earlier one:

    pytest --last-failed --junitxml=again.xml
    python tools/tested_versions.py results.xml again.xml docs/versions.md

A row that the page has of this release is replaced. The exit status is 1 if a test failed.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

TABLE = re.compile(r"^\| PyTorch \|.*\n\|[-| ]+\|\n(?P<rows>(\|.*\n)*)", re.MULTILINE)


class Result(NamedTuple):
    """What a JUnit file tells about a test run."""

    date: str
    passed: int
    failed: int
    skipped: Counter[str]  # by reason


def read_result(paths: Sequence[Path]) -> Result:
    """Reads files that `pytest --junitxml` wrote. Errors count as failures, expected ones not."""
    cases: dict[tuple[str, str], ElementTree.Element] = {}
    for path in paths:
        (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
        cases |= {(case.attrib["classname"], case.attrib["name"]): case for case in suite}
    passed, failed, skipped = 0, 0, Counter[str]()
    for case in cases.values():
        kinds = {child.tag: child for child in case}
        if kinds.keys() & {"failure", "error"}:
            failed += 1
        elif "skipped" in kinds and kinds["skipped"].get("type") != "pytest.xfail":
            skipped[kinds["skipped"].get("message", "")] += 1
        else:
            passed += 1
    if not passed:
        raise ValueError(f"{paths[0]} has no test that passed")
    return Result(suite.attrib["timestamp"][:10], passed, failed, skipped)


def format_row(release: str, triton: str, result: Result) -> str:
    """Returns a line of the table; the reasons of skipped tests, the most frequent first."""
    reasons = sorted(result.skipped.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"{count} {reason}".replace("|", "\\|") for reason, count in reasons]
    cells = [
        *(release, triton, result.date, result.passed, result.failed, result.skipped.total()),
        "<br>".join(lines),
    ]
    return f"| {' | '.join(map(str, cells))} |\n"


def insert_row(page: str, row: str) -> str:
    """Returns the page with the row in its table, whose rows are sorted by release."""
    table = TABLE.search(page)
    if table is None:
        raise ValueError("the page has no table whose first column is PyTorch")
    rows = {get_release(line): line for line in [*table["rows"].splitlines(keepends=True), row]}
    ordered = "".join(rows[release] for release in sorted(rows))
    return page[: table.start("rows")] + ordered + page[table.end("rows") :]


def get_release(row: str) -> tuple[int, ...]:
    return tuple(int(part) for part in row.split("|")[1].split("."))


def main(arguments: Sequence[str]) -> int:
    *results, page = map(Path, arguments)
    result = read_result(results)
    release = version("torch").partition("+")[0]
    row = format_row(release, version("triton"), result)
    page.write_text(insert_row(page.read_text(encoding="utf-8"), row), encoding="utf-8")
    print(row, end="")
    return int(result.failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
