"""The README says what is there."""

import re
from pathlib import Path

from torch_nnmath.catalog import CATALOG

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_formulas_is_the_catalog():
    lines = re.findall(r"^\| F\d.*$", README, re.MULTILINE)
    files = {row.function: row.function.__module__.replace(".", "/") + ".py" for row in CATALOG}
    assert lines == [
        f"| {' '.join(row.ids)} | {row.section} | {row.title} | "
        f"[`{row.function.__name__}`]({files[row.function]}) |"
        for row in CATALOG
    ]


def test_links_lead_somewhere():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    for page in (README, *pages):
        for link in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link


def test_the_examples_of_use_run(capsys):
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    printed = capsys.readouterr().out
    assert "3 modules changed\nhead 2: 1 loss without logits" in printed
    assert "second order" in printed  # the table of the checker
    assert names["HV"].shape == names["W"].shape
    assert abs(names["J"].sum()) < 1e-6


def test_the_example_of_swapping_prints_what_the_page_says(capsys):
    page = (ROOT / "docs" / "swapping.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (text,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == text
